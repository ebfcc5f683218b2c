//! A guest that its user wants to stand still, or to go on again. Pure.
//!
//! That it was told to stand still is in the record before it is told, so an agent that is restarted in between lets it go on
//! when it should. What QEMU says of itself ([`Standing`](crate::vm::migration::Standing)) decides when that is done.
//!
//! # Safety argument (M2, M3)
//!
//! A guest that was sent to another host, or waits for one, stands still, too, and must not go on here. [`VmState::settle_pause`] is
//! reached only when no migration is in the record (`settle_outgoing` has said `No`, and what came from another host has been
//! told to run), and tells a guest to go on only when QEMU itself says that it stands still for no such reason.

use std::time::Duration;

use super::{Acceptance, Disposition, Effect, Ending, Execution, Moment, Push, VmState};
use crate::vm::{desired::Pause, migration::Guest};

/// When to look at whether QEMU has done what it was told.
const SOON: Duration = Duration::from_millis(20);
/// When to look again at a guest that goes on, or does not, against what it was told.
const AGAIN: Duration = Duration::from_secs(1);

impl VmState {
    /// The next step towards a guest that stands still, or goes on, as it should.
    pub(super) fn settle_pause(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        let ends = match x.ending {
            // To power down, the guest must hear of it.
            None | Some(Ending::Stop | Ending::Restart) => matches!(x.push, Push::Killed { .. }),
            Some(Ending::PoweredOff | Ending::Panicked | Ending::Killed) => true,
        };
        let elsewhere = self.record.moving.is_some() || x.incarnation != self.record.desired.incarnation;
        if ends || elsewhere || self.frozen.is_some() {
            return;
        }
        let wanted = match self.record.desired.disposition {
            Disposition::Run => self.record.desired.pause,
            // To power down it must execute.
            Disposition::Stop => Pause::GoOn,
            Disposition::Delete | Disposition::Forget | Disposition::Incoming => return,
        };
        let guest = x.standing.as_ref().map(|s| s.guest);
        match (wanted, self.record.stands_still, guest) {
            (Pause::GoOn, false, _) => {}
            (Pause::StandStill, false, _) => {
                self.record.stands_still = true;
                effects.push(Effect::Pause);
                x.look_after(SOON, at);
            }
            (Pause::StandStill | Pause::GoOn, true, None) => x.look(at, effects),
            // It was resumed by hand, or reset.
            (Pause::StandStill, true, Some(Guest::Executes)) => {
                effects.push(Effect::Pause);
                x.look_after(AGAIN, at);
            }
            (
                Pause::StandStill,
                true,
                Some(Guest::Still | Guest::Off | Guest::Panicked | Guest::Sent | Guest::Awaited),
            ) => {}
            (Pause::GoOn, true, Some(Guest::Executes | Guest::Off | Guest::Panicked)) => {
                self.record.stands_still = false
            }
            (Pause::GoOn, true, Some(Guest::Still)) => {
                if self.acceptance == Acceptance::Firm(x.lease_generation) {
                    effects.push(Effect::Resume);
                    x.look_after(SOON, at);
                }
            }
            // Not by a pause: nothing that this may let go on.
            (Pause::GoOn, true, Some(Guest::Sent | Guest::Awaited)) => {}
        }
    }

    /// Whether the guest is known to stand still as its user wants.
    pub(super) fn is_paused(&self) -> bool {
        let still = |x: &Execution| x.standing.as_ref().is_some_and(|s| s.guest == Guest::Still);
        self.record.stands_still && self.record.moving.is_none() && self.execution.as_ref().is_some_and(still)
    }

    /// Whether QEMU is to be asked what the guest does.
    pub(super) fn pause_is_open(&self) -> bool {
        self.record.stands_still && !(self.is_paused() && self.record.desired.pause == Pause::StandStill)
    }
}

impl Execution {
    fn look_after(&mut self, wait: Duration, at: Moment) {
        self.standing = None;
        self.look_at = at.now.after(wait);
    }
}
