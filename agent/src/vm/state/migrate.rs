//! Both sides of a live migration: the next step of a QEMU that waits for a guest, and of one whose guest is sent. Pure.
//!
//! ```text
//!  target:  launched ─▶ Listen ─▶ listens ─▶ has it, holds it still ──── RUN, same incarnation ───▶ Resume
//!  source:  Send ─▶ active ─▶ ready ─▶ Continue ─▶ last ─▶ sent, still ── FORGET ──────────────────▶ Kill
//!             └──────── RUN without `migrate_to`, at any moment: Cancel, Resume ◀──┘
//! ```
//!
//! What QEMU says of itself ([`Standing`]) is looked at before every step, so it does not matter which events were lost, or
//! whether the agent was away in between.
//!
//! # Invariants
//!
//! * **M2** The target lets a guest go on only when the leader has said RUN with the very incarnation that QEMU was launched
//!   with, under the lease generation of that launch.
//! * **M3** The source, once it has begun to send, lets the guest go on only when the leader has said RUN (or STOP) without
//!   `migrate_to`, under the lease generation of its launch. (Until the last of it has been sent QEMU lets it go on by
//!   itself when sending fails: it has not handed anything over then.)
//! * **M5** The memory of a guest whose disks are copied is sent only when all of them have been, and the last of it only when they are
//!   the same on both sides (`qemu/mirror.rs`).
//! * **M4** While the leader's word has `migrate_to`, nothing is launched: what was sent may execute elsewhere.

use std::time::Duration;

use super::{Acceptance, Disposition, Effect, Ending, Execution, Moment, Push, Role, StopMode, VmState};
use crate::{
    records::Settled,
    vm::migration::{Copies, Guest, Mirror, Standing, Step, Transfer},
};

/// How often QEMU is asked how much it has sent. Each answer is stored, so not more often.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);
/// How often QEMU is asked what it does while the guest stands still. Its events say so at once; this is for lost ones.
const STILL_PERIOD: Duration = Duration::from_millis(100);
/// When to ask after QEMU was told something: it has done it by then.
const SOON: Duration = Duration::from_millis(20);
/// When to ask again what QEMU is about to be: it takes less than a millisecond.
const AT_ONCE: Duration = Duration::from_millis(2);
/// How long the target may take to acknowledge the last of a guest, which stands still meanwhile. It takes milliseconds.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(3);

/// Whether the rest of what should be may be looked at.
pub(super) enum Migrating {
    /// Nothing is in the way.
    No,
    /// It is on its way, or must first be as if it never had been.
    Yes,
}

/// What of a migration is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The disks, this many.
    Disks {
        /// How many.
        count: usize,
    },
    /// The memory, after this many disks.
    Memory {
        /// How many.
        disks: usize,
    },
}

impl VmState {
    /// The next step of a QEMU that was launched as a target and has not been told to go on.
    pub(super) fn settle_incoming(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        let desired = &self.record.desired;
        let same = x.incarnation == desired.incarnation;
        match desired.disposition {
            Disposition::Stop => {
                x.ending.get_or_insert(Ending::Stop);
                x.kill(at.now, effects);
            }
            Disposition::Incoming if same => {
                let silent = x.standing.as_ref().is_some_and(|s| s.guest == Guest::Awaited && s.address.is_none());
                if silent && !x.listens && x.ending.is_none() {
                    x.listens = true;
                    x.standing = None;
                    x.look_at = at.now;
                    effects.push(Effect::Listen);
                }
                x.look(at, effects);
            }
            Disposition::Run if same => match x.standing.as_ref().map(|s| s.guest) {
                None => x.look(at, effects),
                // Nothing has come, so there is nothing to go on with: it is started from its disks.
                Some(Guest::Awaited) => x.kill(at.now, effects),
                Some(Guest::Sent | Guest::Still | Guest::Executes | Guest::Off | Guest::Panicked) => {
                    if x.ending.is_none() && self.acceptance == Acceptance::Firm(x.lease_generation) {
                        // M2. From here on it executes, as far as anybody can know.
                        x.role = Role::Executes;
                        x.standing = None;
                        x.look_at = at.now.after(SOON);
                        if let Some(launched) = &mut self.record.launched {
                            launched.role = Role::Executes;
                        }
                        effects.push(Effect::Resume);
                    }
                }
            },
            Disposition::Forget | Disposition::Delete | Disposition::Incoming | Disposition::Run => {
                x.kill(at.now, effects);
            }
        }
    }

    /// The next step of a QEMU whose guest executes, or did before it was sent.
    pub(super) fn settle_outgoing(&mut self, at: Moment, effects: &mut Vec<Effect>) -> Migrating {
        let Some(x) = &mut self.execution else { return Migrating::No };
        if x.ending.is_some() || x.incarnation < self.record.desired.incarnation {
            return Migrating::No;
        }
        let order = match (self.record.desired.disposition, self.record.desired.stop_mode) {
            (Disposition::Run, _) => self.record.desired.migrate_to.clone(),
            (Disposition::Stop, StopMode::Graceful) => None,
            // It is killed, however it stands.
            (Disposition::Stop, StopMode::Kill)
            | (Disposition::Forget | Disposition::Delete | Disposition::Incoming, _) => return Migrating::No,
        };
        match (order, self.record.moving) {
            (None, None) => Migrating::No,
            // What could not be remembered is not begun.
            (Some(_), None) if self.frozen.is_some() => Migrating::No,
            (Some(order), None) => {
                self.record.moving = Some(order.incarnation);
                self.record.sending = order.disks.is_none().then_some(order.incarnation);
                x.standing = None;
                x.look_at = at.now;
                x.last_since = None;
                x.trouble = String::new();
                effects.push(Effect::Send);
                x.look(at, effects);
                Migrating::Yes
            }
            (Some(order), Some(moving)) if order.incarnation == moving => {
                self.follow(at, effects);
                Migrating::Yes
            }
            // The record was lost: which migration it was sent in, nobody knows, but every one has a larger number than the VM.
            // It is taken for the one that the leader names: while that stands the guest is not to go on (M3). If it is
            // another one, its target has nothing, and the leader gives it up.
            (Some(order), Some(moving)) if moving == x.incarnation => {
                self.record.moving = Some(order.incarnation);
                self.follow(at, effects);
                Migrating::Yes
            }
            (_, Some(_)) => self.put_right(at, effects),
        }
    }

    /// It is on its way.
    fn follow(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let phase = self.phase();
        let Some(x) = &mut self.execution else { return };
        if let Phase::Disks { count } = phase {
            // M5: no memory is sent before all disks have been copied.
            if x.standing.as_ref().is_some_and(|s| s.mirror == Mirror::Ready(count)) && self.frozen.is_none() {
                self.record.sending = self.record.moving;
                x.standing = None;
                x.look_at = at.now;
                effects.push(Effect::SendMemory);
            }
            return x.look(at, effects);
        }
        // One that takes no notice for long is reported, and the leader gives it up.
        if x.standing.as_ref().is_some_and(|s| s.transfer == Transfer::Ready) && !x.overdue {
            x.standing = None;
            x.look_at = at.now.after(SOON);
            effects.push(Effect::Continue);
        }
        x.look(at, effects);
    }

    /// Whether disks may be on their way. Where it is not certain they may.
    #[must_use]
    pub fn copies(&self) -> Copies {
        let desired = &self.record.desired;
        // What an earlier migration has left is put right before `moving` says so of this one.
        let none = match desired.disposition {
            Disposition::Incoming => desired.disks_to_copy().copied.is_empty(),
            Disposition::Run => desired
                .migrate_to
                .as_ref()
                .is_some_and(|o| o.disks.is_none() && self.record.moving == Some(o.incarnation)),
            Disposition::Stop | Disposition::Delete | Disposition::Forget => false,
        };
        if none { Copies::None } else { Copies::Possible }
    }

    /// What QEMU is told to do for `effect`, if it is a step of a migration.
    #[must_use]
    pub fn step(&self, effect: Effect) -> Option<Step> {
        let desired = &self.record.desired;
        Some(match effect {
            Effect::Listen => Step::Listen { secret: desired.migration_secret.clone(), disks: desired.disks_to_copy() },
            Effect::Send => Step::Send(desired.migrate_to.clone()?),
            Effect::SendMemory => Step::SendMemory(desired.migrate_to.clone()?),
            Effect::Continue => Step::Continue(self.copies()),
            Effect::Cancel => Step::Cancel,
            Effect::Resume => Step::Resume,
            Effect::Pause => Step::Pause,
            Effect::Persist
            | Effect::Look
            | Effect::Prepare
            | Effect::CancelPrepare
            | Effect::Launch { .. }
            | Effect::Adopt
            | Effect::PowerDown
            | Effect::Reset
            | Effect::Quit
            | Effect::Kill
            | Effect::TendDisks
            | Effect::TendIdle { .. }
            | Effect::CancelTend
            | Effect::GoOn
            | Effect::DeleteDisks => return None,
        })
    }

    /// What of a migration under way is on its way.
    pub(super) fn phase(&self) -> Phase {
        let order = self.record.desired.migrate_to.as_ref();
        let disks = order.filter(|o| self.record.moving == Some(o.incarnation)).and_then(|o| o.disks.as_ref());
        match disks {
            Some(to) if self.record.sending == self.record.moving => Phase::Memory { disks: to.nodes.copied.len() },
            Some(to) => Phase::Disks { count: to.nodes.copied.len() },
            None => Phase::Memory { disks: 0 },
        }
    }

    /// The migration is over without the VM having left: it is to be as if it never had been (M3).
    fn put_right(&mut self, at: Moment, effects: &mut Vec<Effect>) -> Migrating {
        let Some(x) = &mut self.execution else { return Migrating::No };
        let word = self.acceptance == Acceptance::Firm(x.lease_generation);
        let Some(standing) = &x.standing else {
            x.look(at, effects);
            return Migrating::Yes;
        };
        let under_way = match standing.transfer {
            Transfer::Active | Transfer::Ready | Transfer::Last => true,
            Transfer::None | Transfer::Completed | Transfer::Failed | Transfer::Cancelled => {
                standing.mirror != Mirror::None
            }
            // Told again: an agent that was killed half-way through it has left a QEMU that waits (`qemu/migration.rs`).
            Transfer::Cancelling => {
                if word && x.look_at <= at.now {
                    effects.push(Effect::Cancel);
                }
                x.look(at, effects);
                return Migrating::Yes;
            }
        };
        match standing.guest {
            Guest::Executes if !under_way => {
                self.record.moving = None;
                self.record.sending = None;
                x.standing = None;
                // The next one may be waiting.
                return self.settle_outgoing(at, effects);
            }
            Guest::Off | Guest::Panicked if !under_way => {
                let ending = if standing.guest == Guest::Off { Ending::PoweredOff } else { Ending::Panicked };
                self.guest_down(ending, at, effects);
                return Migrating::No;
            }
            Guest::Awaited => x.kill(at.now, effects),
            Guest::Executes | Guest::Sent | Guest::Still | Guest::Off | Guest::Panicked => {
                if word {
                    effects.push(if under_way { Effect::Cancel } else { Effect::Resume });
                    // What stands still for another reason (its disk is full, it sleeps) may not go on however often it is told.
                    let again = if standing.guest == Guest::Still && !under_way { PROGRESS_PERIOD } else { SOON };
                    x.standing = None;
                    x.look_at = at.now.after(again);
                }
            }
        }
        Migrating::Yes
    }

    /// QEMU did not take a step, and says why.
    pub(super) fn step_failed(&mut self, reason: String, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        x.trouble.clone_from(&reason);
        // A target that cannot take anybody is of no use.
        if x.role == Role::Incoming && self.record.settled.is_none() {
            self.record.settled = Some(Settled::Failed { reason });
            x.kill(at.now, effects);
        }
    }

    /// QEMU has said how it stands.
    pub(super) fn stands(&mut self, standing: Standing, at: Moment) {
        let Some(x) = &mut self.execution else { return };
        if matches!(standing.transfer, Transfer::Ready | Transfer::Last) {
            x.last_since.get_or_insert(at.now);
        } else {
            x.last_since = None;
        }
        // A source's QEMU says that all was sent a moment before it says that the guest was, and has no event for that.
        let nearly_sent = x.role == Role::Executes
            && self.record.moving.is_some()
            && (standing.transfer, standing.guest) == (Transfer::Completed, Guest::Still);
        x.look_at = at.now.after(match (standing.transfer, standing.guest) {
            _ if nearly_sent => AT_ONCE,
            (Transfer::Ready | Transfer::Last | Transfer::Cancelling, _) => STILL_PERIOD,
            (_, Guest::Executes | Guest::Awaited | Guest::Sent | Guest::Still | Guest::Off | Guest::Panicked) => {
                PROGRESS_PERIOD
            }
        });
        x.overdue = x.last_since.is_some_and(|since| at.now.since(since) >= ACKNOWLEDGE_LIMIT);
        x.standing = Some(standing);
    }
}

impl Execution {
    /// Asks QEMU how it stands, when that is due.
    pub(super) fn look(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        if self.look_at <= at.now && !matches!(self.push, Push::Killed { .. }) {
            self.look_at = at.now.after(PROGRESS_PERIOD);
            effects.push(Effect::Look);
        }
    }

    /// Whether the guest has been sent and stands still, so that the target may go on with it.
    pub(super) fn is_sent(&self) -> bool {
        let sent = |s: &Standing| s.guest == Guest::Sent && s.transfer == Transfer::Completed;
        self.standing.as_ref().is_some_and(sent)
    }

    /// Why sending it has failed. Empty: it has not.
    pub(super) fn send_failure(&self, phase: Phase) -> String {
        let Some(standing) = &self.standing else { return String::new() };
        let words = |what: &str| match standing.problem.as_str() {
            "" if self.trouble.is_empty() => what.to_owned(),
            "" => format!("{what}: {}", self.trouble),
            problem => format!("{what}: {problem}"),
        };
        if let Mirror::Failed(problem) = &standing.mirror {
            return format!("copying its disks failed: {problem}");
        }
        if let Phase::Disks { .. } = phase {
            // What the newest transfer is says nothing: it is of an earlier migration.
            return match &standing.mirror {
                Mirror::None => words("QEMU did not begin to copy its disks"),
                Mirror::Copying | Mirror::Ready(_) | Mirror::Failed(_) => String::new(),
            };
        }
        match standing.transfer {
            Transfer::None => words("QEMU did not begin to send it"),
            Transfer::Failed => words("sending it failed"),
            Transfer::Cancelled => words("sending it was cancelled"),
            Transfer::Completed if standing.guest == Guest::Executes => words("QEMU did not begin to send it"),
            Transfer::Ready if self.overdue => words("QEMU does not send the last of it"),
            Transfer::Last if self.overdue => "the target does not say that it has everything".to_owned(),
            Transfer::Active | Transfer::Ready | Transfer::Last | Transfer::Completed | Transfer::Cancelling => {
                String::new()
            }
        }
    }
}
