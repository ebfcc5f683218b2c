//! Tests of both sides of a migration: stories, and the rules M2 to M4 over random histories.

use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::vm::{
    fake::desired,
    migration::{Guest, MigrateTo, Mirror, Progress, Transfer},
};

const SECRET: &str = "00000000000000000000000000000000000000000000000000000000000000aa";

pub(super) fn at(millis: u64) -> Moment {
    lease_at(millis, 1, true)
}

pub(super) fn lease_at(millis: u64, generation: u16, valid: bool) -> Moment {
    let now = Tick::from_boot(Duration::from_millis(millis));
    Moment { now, wall: WallTime(millis), lease: Lease { generation, valid } }
}

pub(super) fn order(incarnation: u64) -> MigrateTo {
    MigrateTo {
        incarnation: Incarnation(incarnation),
        address: "127.0.0.1:4444".parse().unwrap(),
        secret: SECRET.into(),
        bytes_per_second: 0,
        disks: None,
    }
}

pub(super) fn run(incarnation: u64, to: Option<u64>) -> Desired {
    Desired { migrate_to: to.map(order), ..desired(incarnation) }
}

pub(super) fn incoming(incarnation: u64) -> Desired {
    let disposition = Disposition::Incoming;
    Desired { disposition, restarts: 3, migration_secret: SECRET.into(), ..desired(incarnation) }
}

pub(super) fn word(desired: Desired) -> Event {
    Event::Desired(Box::new(desired), Acceptance::Firm(1))
}

pub(super) fn stands(guest: Guest, transfer: Transfer) -> Event {
    Event::Stands(Some(Box::new(standing(guest, transfer))))
}

pub(super) fn standing(guest: Guest, transfer: Transfer) -> Standing {
    Standing {
        guest,
        transfer,
        address: None,
        disks_address: None,
        mirror: Mirror::None,
        progress: Progress::default(),
        problem: String::new(),
    }
}

pub(super) fn listening() -> Event {
    let address = Some("127.0.0.1:4444".parse().unwrap());
    Event::Stands(Some(Box::new(Standing { address, ..standing(Guest::Awaited, Transfer::None) })))
}

pub(super) fn launched(desired: Desired) -> VmState {
    let incarnation = desired.incarnation;
    let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
    state.on(word(desired), at(0));
    let launch = Effect::Launch { incarnation, lease_generation: 1 };
    assert_eq!(state.on(Event::Prepared, at(0)), [Effect::Persist, launch]);
    state
}

/// A target that has everything.
fn received() -> VmState {
    let mut state = launched(incoming(2));
    assert_eq!(state.report().state, ReportState::Preparing, "what cannot execute is not reported as starting");
    assert_eq!(state.on(Event::Started(Incarnation(2), 1), at(0)), [Effect::Persist, Effect::Look]);
    let effects = state.on(stands(Guest::Awaited, Transfer::None), at(1));
    assert_eq!(effects, [Effect::Listen, Effect::Look]);
    assert_eq!(state.on(listening(), at(2)), []);
    let report = state.report();
    assert_eq!((report.state, report.incarnation), (ReportState::Incoming, Incarnation(2)));
    assert_eq!(report.migration.unwrap().address, Some("127.0.0.1:4444".parse().unwrap()));
    assert_eq!(state.on(Event::MigrationMoved, at(3)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Completed), at(4)), []);
    assert_eq!(state.report().state, ReportState::Received);
    state
}

/// A source that has sent everything.
fn sent() -> VmState {
    let mut state = launched(run(1, None));
    assert_eq!(state.on(Event::Started(Incarnation(1), 1), at(0)), []);
    let effects = state.on(word(run(1, Some(2))), at(10));
    assert_eq!(effects, [Effect::Persist, Effect::Send, Effect::Look]);
    assert_eq!(state.on(stands(Guest::Executes, Transfer::Active), at(11)), []);
    assert_eq!(state.report().state, ReportState::Running);
    assert_eq!(state.on(Event::MigrationMoved, at(20)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Ready), at(21)), [Effect::Continue]);
    assert_eq!(state.report().state, ReportState::Running);
    assert_eq!(state.on(Event::MigrationMoved, at(22)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Sent, Transfer::Completed), at(23)), []);
    let report = state.report();
    assert_eq!((report.state, report.incarnation), (ReportState::HandedOver, Incarnation(1)));
    assert_eq!(report.migration.unwrap().incarnation, Incarnation(2));
    state
}

#[test]
fn m2_the_target_goes_on_only_at_the_leaders_word() {
    let mut state = received();
    for millis in [100, 2_000, 60_000] {
        let effects = state.on(Event::Wake, at(millis));
        assert!(!effects.contains(&Effect::Resume), "{effects:?}");
        state.on(stands(Guest::Still, Transfer::Completed), at(millis));
    }
    // The same word once more changes nothing either.
    assert!(!state.on(word(incoming(2)), at(60_001)).contains(&Effect::Resume));
    let effects = state.on(word(Desired { restarts: 3, ..run(2, None) }), at(60_002));
    assert_eq!(effects, [Effect::Persist, Effect::Resume], "with the record first");
    assert_eq!(state.report().state, ReportState::Running);
    assert_eq!(state.on(Event::Wake, at(60_100)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Executes, Transfer::Completed), at(60_101)), [Effect::Persist]);
    assert_eq!(state.deadline(at(60_101).now), None, "nothing is looked at any more");
}

/// M2: a word of another lease, or of an older session, is not the word.
#[test]
fn m2_the_word_must_have_come_under_the_lease_of_the_launch() {
    let mut state = received();
    let late = Event::Desired(Box::new(run(2, None)), Acceptance::Expected(2));
    assert!(!state.on(late, at(5)).contains(&Effect::Resume));
    let mut state = received();
    let effects = state.on(word(run(2, None)), lease_at(5, 2, true));
    assert_eq!(effects, [Effect::Persist, Effect::Kill], "its lease is over");
}

/// M2: an agent that was restarted goes by its record, and a record is not the leader's word.
#[test]
fn m2_after_a_restart_of_the_agent_the_word_must_come_again() {
    let mut state = received();
    state.on(word(run(2, None)), at(5));
    // The agent died between the record and the command.
    let mut state = VmState::from_record(state.record().clone());
    state.on(Event::Started(Incarnation(2), 1), at(6));
    assert_eq!(state.on(stands(Guest::Still, Transfer::Completed), at(7)), []);
    assert_eq!(state.on(word(run(2, None)), at(8)), [Effect::Resume]);

    let mut state = VmState::from_record(received().record().clone());
    assert_eq!(state.report().state, ReportState::Preparing);
    assert_eq!(state.on(Event::Started(Incarnation(2), 1), at(6)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Completed), at(7)), []);
    assert_eq!(state.report().state, ReportState::Received);
}

#[test]
fn a_target_that_is_told_to_run_without_having_anything_starts_anew() {
    let mut state = launched(incoming(2));
    state.on(Event::Started(Incarnation(2), 1), at(0));
    state.on(listening(), at(1));
    assert_eq!(state.on(word(run(2, None)), at(2)), [Effect::Persist, Effect::Kill]);
}

#[test]
fn a_target_that_fails_is_not_tried_again_until_the_vm_is_its_own() {
    let exit =
        Exit { incarnation: Incarnation(2), kind: ExitKind::Exited(1), at: WallTime(1), last_words: String::new() };
    let mut state = received();
    state.on(Event::Ended(exit), at(5));
    assert_eq!(state.report().state, ReportState::Failed);
    assert_eq!(state.on(Event::Wake, at(600_000)), []);
    // The leader had given it the VM before it heard.
    assert!(state.on(word(run(2, None)), at(600_001)).contains(&Effect::Prepare));

    let mut state = launched(incoming(2));
    state.on(Event::Started(Incarnation(2), 1), at(0));
    state.on(stands(Guest::Awaited, Transfer::None), at(1));
    assert!(state.on(Event::StepFailed("no port".into()), at(2)).contains(&Effect::Kill));
}

#[test]
fn a_target_is_forgotten_when_the_migration_is_given_up() {
    let mut state = received();
    let forget = Desired { disposition: Disposition::Forget, spec: None, ..incoming(2) };
    assert_eq!(state.on(word(forget), at(5)), [Effect::Persist, Effect::Kill]);
    assert_eq!(state.report().state, ReportState::Preparing, "it has never executed");
}

/// M3
#[test]
fn m3_what_was_sent_goes_on_only_at_the_leaders_word() {
    let mut state = sent();
    for millis in [100, 2_000, 60_000] {
        let effects = state.on(Event::Wake, at(millis));
        assert!(effects.iter().all(|e| *e == Effect::Look), "{effects:?}");
        state.on(stands(Guest::Sent, Transfer::Completed), at(millis));
        assert!(state.on(word(run(1, Some(2))), at(millis)).is_empty(), "the same word");
    }
    let effects = state.on(word(run(1, None)), at(60_001));
    assert_eq!(effects, [Effect::Persist, Effect::Resume]);
    assert_eq!(state.report().state, ReportState::Running, "before it is told, it counts as executing");
    assert_eq!(state.on(Event::Wake, at(60_100)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Executes, Transfer::Completed), at(60_101)), [Effect::Persist]);
    assert_eq!(state.record().moving, None);
}

/// The guest stands still meanwhile.
#[test]
fn a_source_that_has_nearly_sent_everything_is_asked_again_at_once() {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    state.on(stands(Guest::Executes, Transfer::Active), at(11));
    assert_eq!(state.on(Event::MigrationMoved, at(22)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Completed), at(23)), []);
    assert_eq!(state.report().state, ReportState::Running, "not yet");
    let due = state.deadline(at(23).now).expect("it is asked again");
    assert!(due.since(at(23).now) <= Duration::from_millis(20), "{due:?}");
    assert_eq!(state.on(Event::Wake, at(43)), [Effect::Look]);
    state.on(stands(Guest::Sent, Transfer::Completed), at(44));
    assert_eq!(state.report().state, ReportState::HandedOver);
}

/// M3: a record is not the leader's word.
#[test]
fn m3_a_restarted_agent_leaves_what_was_sent_alone() {
    let mut state = VmState::from_record(sent().record().clone());
    assert_eq!(state.on(Event::Started(Incarnation(1), 1), at(30)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Sent, Transfer::Completed), at(31)), []);
    assert_eq!(state.report().state, ReportState::HandedOver);
    let mut given_up = sent();
    given_up.on(word(run(1, None)), at(32));
    let mut state = VmState::from_record(given_up.record().clone());
    state.on(Event::Started(Incarnation(1), 1), at(33));
    assert_eq!(state.on(stands(Guest::Sent, Transfer::Completed), at(34)), []);
    assert_eq!(state.on(word(run(1, None)), at(35)), [Effect::Resume]);
}

/// M4
#[test]
fn m3_a_source_whose_record_was_lost_leaves_what_was_sent_alone() {
    let mut state = VmState::without_record(VmId::from_uuid(Uuid::from_u128(7)));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    for millis in [11, 40, 2_000, 60_000] {
        for event in [stands(Guest::Sent, Transfer::Completed), Event::Wake] {
            let effects = state.on(event, at(millis));
            assert!(!effects.contains(&Effect::Resume) && !effects.contains(&Effect::Cancel), "{effects:?}");
        }
    }
    let report = state.report();
    assert_eq!((report.state, report.migration.unwrap().incarnation), (ReportState::HandedOver, Incarnation(2)));
    // The leader gives it up.
    let effects = state.on(word(run(1, None)), at(60_010));
    assert!(effects.contains(&Effect::Resume), "{effects:?}");
}

/// S3: its host need not wait for its end to get its lease.
#[test]
fn what_was_sent_does_not_execute_while_it_is_killed() {
    let mut state = sent();
    let effects = state.on(word(Desired { disposition: Disposition::Forget, ..desired(2) }), at(30));
    assert!(effects.contains(&Effect::Kill), "{effects:?}");
    assert_eq!(state.report().state, ReportState::HandedOver);
}

#[test]
fn m4_a_source_that_dies_is_not_started_before_the_leader_has_decided() {
    let exit =
        Exit { incarnation: Incarnation(1), kind: ExitKind::Signaled(9), at: WallTime(1), last_words: String::new() };
    let mut state = sent();
    state.on(Event::Ended(exit), at(30));
    assert_eq!(state.report().state, ReportState::Failed);
    assert_eq!(state.on(Event::Wake, at(600_000)), []);
    assert!(state.on(word(run(1, None)), at(600_001)).contains(&Effect::Prepare));
}

#[test]
fn a_migration_is_given_up_on_the_way_and_another_is_begun() {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    state.on(stands(Guest::Executes, Transfer::Active), at(11));
    let effects = state.on(word(run(1, None)), at(12));
    assert_eq!(effects, [Effect::Persist, Effect::Cancel]);
    // The next order comes before it is known how that ended.
    assert_eq!(state.on(word(run(1, Some(3))), at(13)), [Effect::Persist]);
    assert_eq!(state.on(Event::MigrationMoved, at(14)), [Effect::Look]);
    let effects = state.on(stands(Guest::Executes, Transfer::Cancelled), at(15));
    assert_eq!(effects, [Effect::Persist, Effect::Send, Effect::Look], "nothing else would wake it");
    assert_eq!(state.record().moving, Some(Incarnation(3)));
}

#[test]
fn the_leader_is_told_why_it_fails() {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    let failed = Standing { problem: "no route".into(), ..standing(Guest::Executes, Transfer::Failed) };
    state.on(Event::Stands(Some(Box::new(failed))), at(11));
    let report = state.report();
    assert_eq!(report.state, ReportState::Running);
    assert_eq!(report.migration.unwrap().failure, "sending it failed: no route");

    // The target does not acknowledge the last of it: only the leader knows what is to be done.
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    state.on(stands(Guest::Still, Transfer::Ready), at(11));
    state.on(stands(Guest::Still, Transfer::Last), at(40));
    assert_eq!(state.report().migration.unwrap().failure, "");
    let effects = state.on(Event::Wake, at(5_000));
    assert_eq!(effects, [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Last), at(5_001)), []);
    assert_eq!(state.report().migration.unwrap().failure, "the target does not say that it has everything");
}

/// It was told to send the last of it, and does not: the guest stands still meanwhile.
#[test]
fn a_source_that_does_not_send_the_last_of_it_says_so() {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    assert_eq!(state.on(stands(Guest::Still, Transfer::Ready), at(11)), [Effect::Continue]);
    assert_eq!(state.on(Event::Wake, at(40)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still, Transfer::Ready), at(41)), [Effect::Continue], "told again");
    assert_eq!(state.report().migration.unwrap().failure, "");
    state.on(stands(Guest::Still, Transfer::Ready), at(5_000));
    assert_eq!(state.report().migration.unwrap().failure, "QEMU does not send the last of it");
    // The leader gives it up.
    assert!(state.on(word(run(1, None)), at(5_010)).contains(&Effect::Cancel));
}

/// An agent was killed between the two things that QEMU must be told to cancel it.
#[test]
fn what_is_being_cancelled_for_long_is_cancelled_again() {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(run(1, Some(2))), at(10));
    state.on(stands(Guest::Executes, Transfer::Active), at(11));
    assert_eq!(state.on(word(run(1, None)), at(12)), [Effect::Persist, Effect::Cancel]);
    state.on(stands(Guest::Still, Transfer::Cancelling), at(40));
    assert_eq!(state.on(Event::Wake, at(41)), [], "not at once");
    assert_eq!(state.on(Event::Wake, at(200)), [Effect::Cancel, Effect::Look]);
    state.on(stands(Guest::Executes, Transfer::Cancelled), at(201));
    assert_eq!(state.record().moving, None);
}

#[test]
fn a_guest_that_was_off_when_it_was_sent_is_off() {
    let mut state = received();
    state.on(stands(Guest::Off, Transfer::Completed), at(5));
    assert_eq!(state.report().state, ReportState::Received);
    state.on(word(Desired { restarts: 3, ..run(2, None) }), at(6));
    state.on(Event::Wake, at(100));
    assert!(state.on(stands(Guest::Off, Transfer::Completed), at(101)).contains(&Effect::Quit));
}

/// QEMU hangs, and what it was sending is to be put right first: it is killed when its time is over.
#[test]
fn a_hung_source_does_not_keep_a_vm_from_ending() {
    for ending in [Desired { disposition: Disposition::Stop, ..run(1, None) }, Desired { restarts: 1, ..run(1, None) }]
    {
        let mut state = launched(run(1, None));
        state.on(Event::Started(Incarnation(1), 1), at(0));
        state.on(word(run(1, Some(2))), at(10));
        state.on(stands(Guest::Executes, Transfer::Active), at(11));
        let disposition = ending.disposition;
        let effects = state.on(word(ending), at(20));
        assert_eq!(effects, [Effect::Persist, Effect::Cancel]);
        let mut now = 20;
        while let Some(next) = state.deadline(at(now).now) {
            now = u64::try_from(next.since(at(0).now).as_millis()).unwrap();
            let effects = state.on(Event::Wake, at(now));
            if effects.contains(&Effect::Kill) {
                break;
            }
            assert_eq!(effects, [Effect::Look]);
            state.on(Event::Stands(None), at(now));
        }
        assert_eq!(now, 60_020, "the grace period");
        let (incarnation, kind) = (Incarnation(1), ExitKind::Signaled(9));
        state.on(Event::Ended(Exit { incarnation, kind, at: WallTime(1), last_words: String::new() }), at(now));
        match disposition {
            Disposition::Stop => assert_eq!(state.report().state, ReportState::Stopped),
            _ => assert_eq!(state.report().restarts_done, 1),
        }
    }
}

/// What QEMU is, and what it is told.
#[derive(Clone, Debug)]
struct Qemu {
    standing: Standing,
    incarnation: Incarnation,
}

#[derive(Clone, Debug)]
enum Happens {
    Word(u64, Said),
    Look,
    Pass(u64),
    Moves,
    Restart,
    SessionEnd,
    StepFails,
}

#[derive(Clone, Copy, Debug)]
enum Said {
    Run,
    Paused,
    RunTo,
    Incoming,
    Stop,
    Forget,
}

fn any_happening() -> impl Strategy<Value = Happens> {
    let said = prop_oneof![
        Just(Said::Run),
        Just(Said::Paused),
        Just(Said::RunTo),
        Just(Said::Incoming),
        Just(Said::Stop),
        Just(Said::Forget)
    ];
    prop_oneof![
        4 => (0u64..2, said).prop_map(|(bump, said)| Happens::Word(bump, said)),
        6 => Just(Happens::Look),
        3 => (0u64..4000).prop_map(Happens::Pass),
        4 => Just(Happens::Moves),
        1 => Just(Happens::Restart),
        1 => Just(Happens::SessionEnd),
        1 => Just(Happens::StepFails),
    ]
}

struct World {
    state: VmState,
    millis: u64,
    qemu: Option<Qemu>,
    /// The newest word, as long as the agent that heard it lives.
    newest: Option<Desired>,
    sent_for: u64,
    /// The migration that QEMU was last told to begin.
    sent: Option<Incarnation>,
}

impl World {
    fn event(&mut self, event: Event) -> Result<(), TestCaseError> {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let effects = self.state.on(event, at(self.millis));
            for effect in effects {
                self.effect(effect, &mut events)?;
            }
        }
        Ok(())
    }

    fn effect(&mut self, effect: Effect, events: &mut Vec<Event>) -> Result<(), TestCaseError> {
        let word = self.newest.clone();
        let says = |d: Disposition| word.as_ref().is_some_and(|w| w.disposition == d);
        let sends = word.as_ref().is_some_and(|w| w.migrate_to.is_some());
        match effect {
            Effect::Prepare => events.push(Event::Prepared),
            Effect::GoOn | Effect::TendIdle { .. } | Effect::CancelTend => prop_assert!(false, "nothing is ordered"),
            Effect::TendDisks => {
                // What is being sent is not to change.
                prop_assert!(!sends && self.qemu.is_some());
                events.push(Event::DisksTended(Default::default()));
            }
            Effect::Launch { incarnation, lease_generation } => {
                // M4
                prop_assert!(!sends && self.qemu.is_none());
                let guest = if says(Disposition::Incoming) { Guest::Awaited } else { Guest::Executes };
                self.qemu = Some(Qemu { standing: standing(guest, Transfer::None), incarnation });
                events.push(Event::Started(incarnation, lease_generation));
            }
            Effect::Kill | Effect::Quit | Effect::PowerDown => {
                if let Some(qemu) = self.qemu.take() {
                    let (incarnation, kind) = (qemu.incarnation, ExitKind::Signaled(9));
                    events.push(Event::Ended(Exit { incarnation, kind, at: WallTime(1), last_words: String::new() }));
                }
            }
            Effect::Look => {
                let qemu = self.qemu.as_ref();
                events.push(Event::Stands(qemu.map(|q| Box::new(q.standing.clone()))));
            }
            Effect::Listen => {
                prop_assert!(says(Disposition::Incoming) || word.is_none());
                if let Some(qemu) = &mut self.qemu {
                    qemu.standing.address = Some("127.0.0.1:4444".parse().unwrap());
                }
            }
            Effect::Send => {
                prop_assert!(sends || word.is_none());
                self.sent = self.state.record().desired.migrate_to.as_ref().map(|m| m.incarnation);
                if let Some(qemu) = &mut self.qemu {
                    qemu.standing.transfer = Transfer::Active;
                }
            }
            Effect::SendMemory => prop_assert!(false, "no disks are copied"),
            Effect::Continue => {
                if let Some(qemu) = self.qemu.as_mut().filter(|q| q.standing.transfer == Transfer::Ready) {
                    qemu.standing.transfer = Transfer::Last;
                }
            }
            Effect::Cancel | Effect::Resume => {
                // M2, M3: only at a word that this very process of the agent has heard, and not while the word is to send it
                // for the very migration that was begun.
                let word = word.ok_or_else(|| TestCaseError::fail("it goes on without the leader's word"))?;
                let ordered = word.migrate_to.as_ref().map(|m| m.incarnation);
                prop_assert!(ordered.is_none() || ordered != self.sent, "it is to be sent, and goes on");
                prop_assert!(matches!(word.disposition, Disposition::Run | Disposition::Stop));
                if let Some(qemu) = &mut self.qemu {
                    prop_assert_eq!(qemu.incarnation, word.incarnation);
                    prop_assert!(word.disposition == Disposition::Run || qemu.standing.guest != Guest::Awaited);
                    qemu.standing.guest = Guest::Executes;
                    if effect == Effect::Cancel {
                        qemu.standing.transfer = Transfer::Cancelled;
                    }
                }
            }
            Effect::Pause => {
                // To stand still does no harm, so the word may be one that an earlier agent heard.
                prop_assert!(word.is_none_or(|w| w.pause == Pause::StandStill));
                if let Some(qemu) = self.qemu.as_mut().filter(|q| q.standing.guest == Guest::Executes) {
                    qemu.standing.guest = Guest::Still;
                }
            }
            Effect::Persist | Effect::CancelPrepare | Effect::Adopt | Effect::Reset | Effect::DeleteDisks => {}
        }
        Ok(())
    }

    fn happens(&mut self, what: Happens) -> Result<(), TestCaseError> {
        match what {
            Happens::Word(bump, said) => {
                let incarnation = self.state.record().desired.incarnation.0.max(1) + bump;
                let word_ = match said {
                    Said::Run => run(incarnation, None),
                    Said::Paused => Desired { pause: Pause::StandStill, ..run(incarnation, None) },
                    Said::RunTo => {
                        self.sent_for = self.sent_for.max(incarnation) + 1;
                        run(incarnation, Some(self.sent_for))
                    }
                    Said::Incoming => incoming(incarnation),
                    Said::Stop => Desired { disposition: Disposition::Stop, ..run(incarnation, None) },
                    Said::Forget => Desired { disposition: Disposition::Forget, ..run(incarnation, None) },
                };
                self.newest = Some(word_.clone());
                self.event(word(word_))
            }
            Happens::Look => {
                let standing = self.qemu.as_ref().map(|q| Box::new(q.standing.clone()));
                self.event(Event::Stands(standing))
            }
            Happens::Pass(millis) => {
                self.millis += millis;
                self.event(Event::Wake)
            }
            Happens::Moves => {
                let Some(qemu) = &mut self.qemu else { return Ok(()) };
                let s = &mut qemu.standing;
                (s.guest, s.transfer) = match (s.guest, s.transfer) {
                    (Guest::Awaited, _) if s.address.is_some() => (Guest::Still, Transfer::Completed),
                    (_, Transfer::Active) => (Guest::Still, Transfer::Ready),
                    (_, Transfer::Last) => (Guest::Sent, Transfer::Completed),
                    same => same,
                };
                self.event(Event::MigrationMoved)
            }
            Happens::Restart => {
                self.newest = None;
                self.state = VmState::from_record(self.state.record().clone());
                match self.qemu.as_ref().map(|q| q.incarnation) {
                    Some(incarnation) => self.event(Event::Started(incarnation, 1)),
                    None => self.event(Event::NotFound(None)),
                }
            }
            Happens::SessionEnd => self.event(Event::SessionEnded(1)),
            Happens::StepFails => self.event(Event::StepFailed("no".into())),
        }
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let Some(qemu) = &self.qemu else { return Ok(()) };
        let report = self.state.report();
        // Whatever executes is reported as executing; what is reported as sent stands still.
        let executing = [ReportState::Starting, ReportState::Running, ReportState::Stopping].contains(&report.state);
        prop_assert!(qemu.standing.guest != Guest::Executes || executing, "{:?} {qemu:?}", report);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn nothing_goes_on_without_the_leaders_word(steps in prop::collection::vec(any_happening(), 1..60)) {
        let state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let mut world = World { state, millis: 0, qemu: None, newest: None, sent_for: 0, sent: None };
        for step in steps {
            world.happens(step)?;
            world.check()?;
        }
    }
}
