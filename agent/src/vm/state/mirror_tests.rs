//! Migrations that copy a guest's disks, and what is removed afterwards.

use super::{migrate_tests::*, *};
use crate::{
    records::Settled,
    vm::{
        desired::VoidDisks,
        fake::desired,
        migration::{Copies, DisksTo, Guest, MigrateTo, Mirror, Nodes, Step, Transfer},
    },
};

/// The word to send it with its two disks.
fn with_disks(incarnation: u64, to: u64) -> Desired {
    let nodes = Nodes { copied: vec!["disk0".into(), "disk1".into()], shared: Vec::new() };
    let disks = Some(DisksTo { address: "127.0.0.1:4445".parse().unwrap(), nodes });
    Desired { migrate_to: Some(MigrateTo { disks, ..order(to) }), ..desired(incarnation) }
}

fn copies(mirror: Mirror, transfer: Transfer) -> Event {
    Event::Stands(Some(Box::new(Standing { mirror, ..standing(Guest::Executes, transfer) })))
}

/// A source that copies its disks.
fn copying() -> VmState {
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    assert_eq!(state.on(word(with_disks(1, 2)), at(10)), [Effect::Persist, Effect::Send, Effect::Look]);
    state
}

fn failure(state: &VmState) -> String {
    state.report().migration.unwrap().failure
}

#[test]
fn m5_memory_is_sent_only_when_all_disks_are_the_same_on_both_sides() {
    let mut state = copying();
    for (millis, mirror) in [(11, Mirror::Copying), (1_100, Mirror::Ready(1)), (2_200, Mirror::Copying)] {
        // What an earlier migration came to says nothing.
        assert_eq!(state.on(copies(mirror, Transfer::Cancelled), at(millis)), []);
        assert_eq!(failure(&state), "");
        assert_eq!(state.on(Event::Wake, at(millis + 1_000)), [Effect::Look]);
    }
    let effects = state.on(copies(Mirror::Ready(2), Transfer::None), at(3_300));
    assert_eq!(effects, [Effect::Persist, Effect::SendMemory, Effect::Look], "with the record first");
    assert_eq!(state.record().sending, Some(Incarnation(2)));
    state.on(copies(Mirror::Ready(2), Transfer::Active), at(3_400));
    assert_eq!(state.on(Event::MigrationMoved, at(3_500)), [Effect::Look]);
    let ready = Standing { mirror: Mirror::Ready(2), ..standing(Guest::Still, Transfer::Ready) };
    assert_eq!(state.on(Event::Stands(Some(Box::new(ready))), at(3_501)), [Effect::Continue]);
    state.on(Event::MigrationMoved, at(3_502));
    state.on(stands(Guest::Sent, Transfer::Completed), at(3_503));
    let report = state.report();
    assert_eq!(report.state, ReportState::HandedOver);
    assert_eq!(report.migration.unwrap().disks, 2);
}

/// What a guest that stands still need not wait for is not asked, and only that.
#[test]
fn qemu_is_not_asked_for_copies_of_disks_where_there_are_none() {
    let mut shared = launched(run(1, None));
    shared.on(Event::Started(Incarnation(1), 1), at(0));
    assert_eq!(shared.copies(), Copies::Possible, "an earlier migration may have left some");
    shared.on(word(run(1, Some(2))), at(10));
    assert_eq!((shared.copies(), shared.step(Effect::Continue)), (Copies::None, Some(Step::Continue(Copies::None))));
    // Given up: nothing is taken for granted.
    shared.on(word(run(1, None)), at(20));
    assert_eq!(shared.copies(), Copies::Possible);
    // Another one, while the earlier one is not put right yet.
    shared.on(word(run(1, Some(3))), at(30));
    assert_eq!((shared.record().moving, shared.copies()), (Some(Incarnation(2)), Copies::Possible));
    assert_eq!(copying().copies(), Copies::Possible);
}

/// M6: an agent whose record is lost does not know whether the disks were copied, and does not say so.
#[test]
fn m6_what_is_not_remembered_is_not_said_to_be_copied() {
    let mut state = VmState::without_record(VmId::from_uuid(uuid::Uuid::from_u128(7)));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    state.on(word(with_disks(1, 2)), at(10));
    state.on(stands(Guest::Sent, Transfer::Completed), at(11));
    let report = state.report();
    assert_eq!(report.state, ReportState::HandedOver);
    let migration = report.migration.unwrap();
    assert_eq!((migration.disks, migration.failure.is_empty()), (0, false));
}

#[test]
fn a_copying_that_fails_or_never_began_is_said_and_nothing_is_sent() {
    for (mirror, words) in [(Mirror::Failed("No space left".into()), "No space left"), (Mirror::None, "did not begin")]
    {
        let mut state = copying();
        assert_eq!(state.on(copies(mirror, Transfer::None), at(20)), []);
        assert!(failure(&state).contains(words), "{}", failure(&state));
        assert!(!state.on(Event::Wake, at(2_000)).contains(&Effect::SendMemory));
    }
}

/// Given up while disks are copied, also if nothing of the memory was ever sent: nothing of it is left.
#[test]
fn a_copying_that_is_given_up_is_cancelled_before_the_next_one_begins() {
    let mut state = copying();
    state.on(copies(Mirror::Copying, Transfer::None), at(20));
    assert_eq!(state.on(word(run(1, None)), at(30)), [Effect::Persist, Effect::Cancel]);
    assert_eq!(state.on(Event::Wake, at(60)), [Effect::Look]);
    // Not over yet: another one waits.
    assert_eq!(state.on(word(with_disks(1, 3)), at(61)), [Effect::Persist]);
    assert_eq!(state.on(copies(Mirror::Copying, Transfer::None), at(62)), [Effect::Cancel]);
    assert_eq!(state.on(Event::Wake, at(100)), [Effect::Look]);
    let effects = state.on(copies(Mirror::None, Transfer::None), at(101));
    assert_eq!(effects, [Effect::Persist, Effect::Send, Effect::Look]);
    assert_eq!((state.record().moving, state.record().sending), (Some(Incarnation(3)), None));
}

#[test]
fn m7_what_is_void_is_removed_before_the_vm_is_forgotten_and_only_when_nothing_executes() {
    let forget = Desired {
        disposition: Disposition::Forget,
        spec: None,
        void: Some(VoidDisks { copied_from: 0, current: 1 }),
        ..desired(2)
    };
    let mut state = launched(run(1, None));
    state.on(Event::Started(Incarnation(1), 1), at(0));
    assert_eq!(state.on(word(forget), at(10)), [Effect::Persist, Effect::Kill]);
    let exit =
        Exit { incarnation: Incarnation(1), kind: ExitKind::Signaled(9), at: WallTime(1), last_words: String::new() };
    let effects = state.on(Event::Ended(exit), at(20));
    assert_eq!(effects, [Effect::Persist, Effect::DeleteDisks]);
    assert!(!state.is_over());
    let hangs = || Event::DeleteFailed("the pool hangs".into());
    assert_eq!(state.on(hangs(), at(30)), [Effect::DeleteDisks], "the first time at once");
    assert_eq!(state.on(hangs(), at(31)), []);
    assert!(state.record().settled.is_none() && state.deadline(at(31).now).is_some(), "it is tried again");
    assert_eq!(state.on(Event::Wake, at(120_000)), [Effect::DeleteDisks]);
    state.on(Event::DisksDeleted, at(120_010));
    assert_eq!(state.record().settled, Some(Settled::Forgotten));
    assert!(state.is_over());
    assert_eq!(state.on(Event::Wake, at(130_000)), []);
}

/// P5: that something void was removed is not that the VM's disks were.
#[test]
fn a_deletion_that_comes_meanwhile_is_still_carried_out() {
    let void = Some(VoidDisks { copied_from: 0, current: 1 });
    let mut state = VmState::new(VmId::from_uuid(uuid::Uuid::from_u128(7)));
    let forget = Desired { disposition: Disposition::Forget, spec: None, void, ..desired(2) };
    assert_eq!(state.on(word(forget), at(10)), [Effect::Persist, Effect::DeleteDisks]);
    let delete = Desired { disposition: Disposition::Delete, ..desired(3) };
    assert_eq!(state.on(word(delete), at(20)), [Effect::Persist]);
    assert_eq!(state.on(Event::DisksDeleted, at(30)), [Effect::DeleteDisks]);
    state.on(Event::DisksDeleted, at(40));
    assert_eq!(state.record().settled, Some(Settled::Deleted));
}
