//! Tests of pauses. That nothing which was sent elsewhere goes on by one is checked over random histories in `migrate_tests.rs`.

use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::vm::{
    fake::desired,
    migration::{Guest, Mirror, Progress, Transfer},
};

fn at(millis: u64) -> Moment {
    let now = Tick::from_boot(Duration::from_millis(millis));
    Moment { now, wall: WallTime(millis), lease: Lease { generation: 1, valid: true } }
}

fn word(pause: Pause) -> Event {
    Event::Desired(Box::new(Desired { pause, ..desired(1) }), Acceptance::Firm(1))
}

fn stands(guest: Guest) -> Event {
    let (transfer, progress) = (Transfer::None, Progress::default());
    Event::Stands(Some(Box::new(Standing {
        guest,
        transfer,
        address: None,
        disks_address: None,
        mirror: Mirror::None,
        progress,
        problem: String::new(),
    })))
}

fn running() -> VmState {
    let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
    state.on(word(Pause::GoOn), at(0));
    state.on(Event::Prepared, at(0));
    assert_eq!(state.on(Event::Started(Incarnation(1), 1), at(0)), []);
    state
}

fn paused() -> VmState {
    let mut state = running();
    assert_eq!(state.on(word(Pause::StandStill), at(10)), [Effect::Persist, Effect::Pause]);
    assert!(!state.report().paused, "QEMU has not said so");
    assert_eq!(state.deadline(at(10).now), Some(at(30).now));
    assert_eq!(state.on(Event::Wake, at(30)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Still), at(31)), []);
    let report = state.report();
    assert_eq!((report.state, report.paused), (ReportState::Running, true));
    assert_eq!(state.deadline(at(31).now), None, "nobody is asked any more");
    state
}

#[test]
fn a_guest_stands_still_and_goes_on() {
    let mut state = paused();
    assert_eq!(state.on(word(Pause::StandStill), at(40)), [], "a word that comes twice does nothing");
    assert_eq!(state.on(word(Pause::GoOn), at(50)), [Effect::Persist, Effect::Resume]);
    assert_eq!(state.on(Event::Wake, at(70)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Executes), at(71)), [Effect::Persist]);
    assert!(!state.report().paused);
    assert_eq!(state.deadline(at(71).now), None);
}

#[test]
fn what_does_not_obey_is_told_again() {
    let mut state = running();
    state.on(word(Pause::StandStill), at(0));
    state.on(Event::StepFailed("QEMU hangs".into()), at(1));
    assert_eq!(state.on(Event::Wake, at(20)), [Effect::Look]);
    assert_eq!(state.on(stands(Guest::Executes), at(21)), [Effect::Pause]);
    let mut state = paused();
    state.on(word(Pause::GoOn), at(50));
    state.on(Event::Wake, at(70));
    assert_eq!(state.on(stands(Guest::Still), at(71)), [Effect::Resume]);
}

/// The agent was away while it was resumed: the record says that it may stand still.
#[test]
fn a_new_agent_lets_it_go_on() {
    let mut state = VmState::from_record(paused().record().clone());
    assert_eq!(state.on(Event::Started(Incarnation(1), 1), at(100)), [Effect::Look]);
    state.on(stands(Guest::Still), at(101));
    assert!(state.report().paused, "nothing is changed without the leader's word");
    assert_eq!(state.on(word(Pause::GoOn), at(110)), [Effect::Persist, Effect::Resume]);
}

#[test]
fn to_power_down_it_must_go_on() {
    let mut state = paused();
    let stop = Desired { disposition: Disposition::Stop, ..desired(1) };
    let effects = state.on(Event::Desired(Box::new(stop), Acceptance::Firm(1)), at(50));
    assert_eq!(effects, [Effect::Persist, Effect::Resume, Effect::PowerDown]);
    // After a restart of the agent nobody knows at once that it stands still.
    let mut state = VmState::from_record(paused().record().clone());
    state.on(Event::Started(Incarnation(1), 1), at(100));
    let stop = Desired { disposition: Disposition::Stop, ..desired(1) };
    let effects = state.on(Event::Desired(Box::new(stop), Acceptance::Firm(1)), at(101));
    assert_eq!(effects, [Effect::Persist, Effect::PowerDown]);
    assert_eq!(state.on(stands(Guest::Still), at(102)), [Effect::Resume]);
    let restart = Desired { restarts: 1, ..desired(1) };
    let effects = paused().on(Event::Desired(Box::new(restart), Acceptance::Firm(1)), at(50));
    assert_eq!(effects, [Effect::Persist, Effect::Resume, Effect::PowerDown]);
}

/// The user wants it to stand still, whatever becomes of its QEMU.
#[test]
fn a_new_qemu_of_a_paused_vm_is_paused() {
    let mut state = paused();
    let exit =
        Exit { incarnation: Incarnation(1), kind: ExitKind::Signaled(9), at: WallTime(1), last_words: String::new() };
    state.on(Event::Ended(exit), at(60));
    assert!(!state.report().paused && !state.record().stands_still);
    state.on(Event::Wake, at(60_000));
    state.on(Event::Prepared, at(60_000));
    let effects = state.on(Event::Started(Incarnation(1), 1), at(60_001));
    assert_eq!(effects, [Effect::Persist, Effect::Pause]);
}

/// Without its record nobody knows whether it was paused or sent away.
#[test]
fn of_a_vm_whose_record_cannot_be_read_nothing_is_told() {
    let mut state = VmState::unreadable(VmId::from_uuid(Uuid::from_u128(7)), "bad JSON".into());
    state.on(Event::Started(Incarnation(1), 1), at(0));
    for pause in [Pause::StandStill, Pause::GoOn] {
        assert_eq!(state.on(word(pause), at(10)), []);
    }
}
