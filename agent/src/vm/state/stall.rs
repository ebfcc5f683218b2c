//! A guest whose pool is full, and disks that fail. Pure.
//!
//! ```text
//!            Stalled               GoOn: there is room
//!   fine ───────────────▶ held ───────────────────────────▶ on trial ── five seconds ──▶ fine
//!                          ▲ │ GoOn: still full               │
//!                          └─┘ looked at every two seconds    │ Stalled: looked at half as often, at least every minute
//!                          ▲──────────────────────────────────┘
//! ```
//!
//! QEMU holds a guest still when its pool is full, and keeps the write that did not fit. So nothing is lost: the guest goes on where
//! it was. Until then the VM counts as running, with the reason. A disk that fails in another way is the guest's to deal with; it is
//! shown for some minutes.

use std::time::Duration;

use uncloud_proto::clock::Tick;

use super::{Effect, Execution, Hold, Moment, Pause, Role, VmState};

/// How often a pool is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// ... at least, if it was full again each time that the guest went on.
const LOOK_AT_LEAST: Duration = Duration::from_secs(60);
/// A guest that has not been held still for so long after it was told to go on does go on.
const TRIAL: Duration = Duration::from_secs(5);
/// For how long a failure is shown.
const SHOWN: Duration = Duration::from_secs(300);

/// What pools and disks make a guest suffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Trouble {
    stall: Option<Stall>,
    /// What failed last, and until when that is shown.
    failed: Option<(String, Tick)>,
}

/// It is held still, or was a moment ago.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stall {
    /// In words.
    reason: String,
    stage: Stage,
    /// How long to wait before the next look.
    wait: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is held still.
    Held { look_at: Tick },
    /// It was told to go on.
    Trial { until: Tick },
}

impl Trouble {
    /// When something is to be done.
    pub(super) fn deadline(&self) -> Option<Tick> {
        let stall = self.stall.as_ref().map(|s| match s.stage {
            Stage::Held { look_at: at } | Stage::Trial { until: at } => at,
        });
        [stall, self.failed.as_ref().map(|(_, until)| *until)].into_iter().flatten().min()
    }
}

fn words(pool: Option<&str>) -> String {
    let pool = pool.map_or_else(|| "its pool".to_owned(), |pool| format!("pool {pool}"));
    format!("the guest stands still because {pool} is full; it goes on by itself when there is room again")
}

impl VmState {
    /// QEMU holds the guest still.
    pub(super) fn stalled(&mut self, at: Moment) {
        let Some(x) = self.execution.as_mut().filter(|x| x.role == Role::Executes) else { return };
        match &mut x.stall.stall {
            Some(Stall { stage: Stage::Held { .. }, .. }) => {}
            Some(stall) => {
                stall.wait = (stall.wait * 2).min(LOOK_AT_LEAST);
                stall.stage = Stage::Held { look_at: at.now.after(stall.wait) };
            }
            // The first look is now: it tells which pool.
            None => {
                let stage = Stage::Held { look_at: at.now };
                x.stall.stall = Some(Stall { reason: words(None), stage, wait: LOOK });
            }
        }
    }

    /// What came of letting it go on.
    pub(super) fn held(&mut self, held: Result<Hold, String>, at: Moment) {
        let Some(stall) = self.execution.as_mut().and_then(|x| x.stall.stall.as_mut()) else { return };
        match held {
            Ok(Hold::Over) => stall.stage = Stage::Trial { until: at.now.after(TRIAL) },
            Ok(Hold::Full(pool)) => stall.reason = words(Some(&pool)),
            Err(reason) => stall.reason = format!("{}: {reason}", words(None)),
        }
    }

    /// A disk could not be read or written.
    pub(super) fn disk_failed(&mut self, words: String, at: Moment) {
        let Some(x) = &mut self.execution else { return };
        x.stall.failed = Some((words, at.now.after(SHOWN)));
    }

    /// Takes the next step of a guest that should execute.
    pub(super) fn mind_stall(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        // Of one that its user wants to stand still, nothing is known before it is resumed; then QEMU tries its write again.
        let paused = self.record.stands_still || self.record.desired.pause == Pause::StandStill;
        let Some(x) = self.execution.as_mut().filter(|x| x.role == Role::Executes && x.ending.is_none()) else {
            return;
        };
        if paused {
            x.stall.stall = None;
            return;
        }
        x.stall.failed.take_if(|(_, until)| at.now >= *until);
        let Some(stall) = &mut x.stall.stall else { return };
        match stall.stage {
            Stage::Held { look_at } if at.now >= look_at => {
                stall.stage = Stage::Held { look_at: at.now.after(stall.wait) };
                effects.push(Effect::GoOn);
            }
            Stage::Trial { until } if at.now >= until => x.stall.stall = None,
            Stage::Held { .. } | Stage::Trial { .. } => {}
        }
    }
}

impl Execution {
    /// Why it does not do as well as it should. Empty: it does.
    pub(super) fn suffers(&self) -> String {
        match (&self.stall.stall, &self.stall.failed) {
            (Some(stall), _) => stall.reason.clone(),
            (None, _) if !self.disks.trouble.is_empty() => self.disks.trouble.clone(),
            (None, Some((words, _))) => words.clone(),
            (None, None) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use uncloud_proto::{
        clock::WallTime,
        ids::{Incarnation, VmId},
    };
    use uuid::Uuid;

    use super::*;
    use crate::vm::{
        desired::{Desired, Disposition},
        fake,
        state::{Acceptance, Event, Lease, ReportState},
    };

    fn at(secs: u64) -> Moment {
        let lease = Lease { generation: 1, valid: true };
        Moment { now: Tick::from_boot(Duration::from_secs(secs)), wall: WallTime(secs * 1000), lease }
    }

    fn full() -> Event {
        Event::Held(Ok(Hold::Full("p".into())))
    }

    fn running() -> VmState {
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        state.on(Event::Desired(Box::new(fake::desired(1)), Acceptance::Firm(1)), at(10));
        state.on(Event::Prepared, at(10));
        state.on(Event::Started(Incarnation(1), 1), at(10));
        state
    }

    fn reason(state: &VmState) -> String {
        assert_eq!(state.report().state, ReportState::Running);
        state.report().reason
    }

    #[test]
    fn a_guest_whose_pool_is_full_goes_on_when_there_is_room() {
        let mut state = running();
        assert_eq!(state.on(Event::Stalled, at(20)), [Effect::GoOn]);
        assert_eq!(state.on(full(), at(20)), []);
        assert!(reason(&state).contains("pool p is full"), "{}", reason(&state));
        assert_eq!(state.on(Event::Stalled, at(21)), [], "the same again");
        assert_eq!(state.deadline(at(21).now), Some(at(22).now));
        assert_eq!(state.on(Event::Wake, at(22)), [Effect::GoOn]);
        state.on(Event::Held(Ok(Hold::Over)), at(22));
        assert!(!reason(&state).is_empty(), "not before it is known to last");
        assert_eq!(state.on(Event::Wake, at(27)), []);
        assert_eq!(reason(&state), "");
        assert_eq!(state.deadline(at(27).now), None);
    }

    #[test]
    fn a_pool_that_is_full_again_at_once_is_looked_at_less_and_less_often() {
        let mut state = running();
        assert_eq!(state.on(Event::Stalled, at(20)), [Effect::GoOn]);
        let (mut now, mut waits) = (20, Vec::new());
        for _ in 0..8 {
            state.on(Event::Held(Ok(Hold::Over)), at(now));
            assert_eq!(state.on(Event::Stalled, at(now)), []);
            let due = state.deadline(at(now).now).unwrap();
            waits.push(due.since(at(now).now).as_secs());
            now += waits.last().unwrap();
            assert_eq!(state.on(Event::Wake, at(now)), [Effect::GoOn]);
        }
        assert_eq!(waits, [4, 8, 16, 32, 60, 60, 60, 60]);
    }

    #[test]
    fn one_that_should_stop_is_not_told_to_go_on() {
        let mut state = running();
        let stop = Desired { disposition: Disposition::Stop, ..fake::desired(1) };
        state.on(Event::Desired(Box::new(stop), Acceptance::Firm(1)), at(20));
        assert!(!state.on(Event::Stalled, at(21)).contains(&Effect::GoOn));
    }

    /// Whoever makes room must not let a guest go on that its user wants to stand still.
    #[test]
    fn one_that_is_paused_is_not_told_to_go_on() {
        let mut state = running();
        state.on(Event::Stalled, at(20));
        let pause = Desired { pause: Pause::StandStill, ..fake::desired(1) };
        state.on(Event::Desired(Box::new(pause), Acceptance::Firm(1)), at(21));
        for secs in 21..40 {
            assert!(!state.on(Event::Wake, at(secs)).contains(&Effect::GoOn));
        }
    }

    #[test]
    fn a_disk_that_fails_is_shown_for_a_while() {
        let mut state = running();
        state.on(Event::DiskFailed("disk0 cannot be read: Input/output error".into()), at(20));
        assert_eq!(reason(&state), "disk0 cannot be read: Input/output error");
        state.on(Event::Wake, at(320));
        assert_eq!(reason(&state), "");
    }
}
