//! Snapshots, and disks that are put back. R1 is looked at after every change, in all tests (`fixtures.rs`).

use uncloud_proto::ids::VmId;
use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::{
        Desired, EventType, Phase,
        vm::{Failover, SnapshotState, VmSpec},
    },
    state::{
        MAX_SNAPSHOTS,
        command::{Command, DisksObservation, Lapsed, ObservedState, PowerChange, Refusal, VmObservation},
    },
};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x50a9 + n)
}

fn create(vm: VmId, n: u128) -> Command {
    Command::CreateSnapshot { vm, id: id(n), name: format!("s{n}") }
}

fn revert(vm: VmId, n: u128) -> Command {
    Command::RevertToSnapshot { vm, name: format!("s{n}") }
}

impl World {
    /// The VM's host says this of it, and that it has done this to its disks.
    fn says(&mut self, vm: VmId, state: ObservedState, disks: DisksObservation) {
        let host = self.host_of(vm).unwrap();
        let report = VmObservation { disks, ..self.observation(vm, state) };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn with_snapshot(&mut self, n: u128) -> VmId {
        let vm = self.running(n, with_disk("shared"));
        self.ok(create(vm, 1));
        self.says(vm, ObservedState::Running, DisksObservation { made: vec![id(1)], ..Default::default() });
        vm
    }
}

fn reverted(number: u64) -> DisksObservation {
    DisksObservation { reverted: number, ..Default::default() }
}

#[test]
fn a_snapshot_is_there_when_the_host_says_so_and_gone_likewise() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    world.ok(create(vm, 1));
    assert_eq!(world.record(vm).snapshots[0].state, SnapshotState::Creating);
    assert!(matches!(world.refused(revert(vm, 1)), Refusal::Precondition(_)));
    // Of another one.
    world.says(vm, ObservedState::Running, DisksObservation { made: vec![id(7)], ..Default::default() });
    assert_eq!(world.record(vm).snapshots[0].state, SnapshotState::Creating);
    world.says(vm, ObservedState::Running, DisksObservation { made: vec![id(1)], ..Default::default() });
    assert_eq!(world.record(vm).snapshots[0].state, SnapshotState::Ready);
    assert_eq!(world.last_events(), [EventType::SnapshotTaken]);

    let delete = Command::DeleteSnapshot { vm, name: "s1".into() };
    world.ok(delete.clone());
    world.ok(delete.clone());
    assert!(world.last.mutations.is_empty(), "again: nothing");
    world.says(vm, ObservedState::Running, DisksObservation { removed: vec![id(1)], ..Default::default() });
    assert!(world.record(vm).snapshots.is_empty());
    assert!(matches!(world.refused(delete), Refusal::Invalid { field, .. } if field == "snapshot"));
    assert_eq!(world.incarnation(vm), 1, "it ran all along");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let mut world = World::with_hosts(2);
    let vm = world.with_snapshot(1);
    let why = |refusal: Refusal| refusal.to_string();
    assert!(why(world.refused(create(vm, 1))).contains("one of that name already"));
    assert!(why(world.refused(revert(vm, 2))).contains("it has s1"));
    for n in 2..=MAX_SNAPSHOTS as u128 {
        world.ok(create(vm, n));
    }
    assert!(why(world.refused(create(vm, 99))).contains("delete one first"));
    let diskless = world.running(2, spec());
    assert!(why(world.refused(create(diskless, 1))).contains("has no disks"));
    let new = world.create(3, with_disk("shared"));
    assert!(why(world.refused(create(new, 1))).contains("not made yet"));
}

#[test]
fn disks_are_put_back_while_the_vm_stands_still_and_then_it_starts_anew() {
    let mut world = World::with_hosts(2);
    let vm = world.with_snapshot(1);
    let host = world.host_of(vm);
    world.ok(revert(vm, 1));
    assert_eq!(world.record(vm).revert.map(|r| r.number), Some(1));
    world.ok(revert(vm, 1));
    assert!(world.last.mutations.is_empty(), "again: nothing");
    for refused in [
        create(vm, 2),
        Command::DeleteSnapshot { vm, name: "s1".into() },
        Command::MigrateVm { vm, to: None, secret: "s".into(), bytes_per_second: 0 },
    ] {
        assert!(world.refused(refused).to_string().contains("put back"));
    }
    // It has stopped; that is not the end.
    world.says(vm, ObservedState::Stopped, DisksObservation::default());
    assert_eq!((world.incarnation(vm), world.host_of(vm)), (1, host));
    world.says(vm, ObservedState::Stopped, reverted(7));
    assert!(world.record(vm).revert.is_some(), "that was another one");
    world.says(vm, ObservedState::Stopped, reverted(1));
    assert_eq!(world.record(vm).revert, None);
    assert_eq!((world.incarnation(vm), world.host_of(vm)), (2, host));
    // The same words again are about the past.
    world.says(vm, ObservedState::Running, reverted(1));
    assert_eq!((world.incarnation(vm), world.record(vm).desired), (2, Desired::Running));
}

/// The next host does what the first one could not, and a start in between waits for it.
#[test]
fn after_a_failover_the_next_host_puts_them_back() {
    let mut world = World::with_hosts(2);
    let vm = world.with_snapshot(1);
    let first = world.host_of(vm).unwrap();
    world.ok(revert(vm, 1));
    world.lapse(first, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(first)), 2));
    assert!(world.record(vm).revert.is_some());
    // The first one comes back and says that it has done it: under an incarnation that is over.
    world.return_of(if first == host_id(1) { 1 } else { 2 });
    let late = VmObservation {
        incarnation: uncloud_proto::ids::Incarnation(1),
        disks: reverted(1),
        ..world.observation(vm, ObservedState::Stopped)
    };
    world.ok(Command::Report { host: first, reports: vec![late] });
    assert!(world.record(vm).revert.is_some());
    world.says(vm, ObservedState::Stopped, reverted(1));
    assert_eq!((world.record(vm).revert, world.incarnation(vm)), (None, 3));
}

/// R3: the host may be at it.
/// R3. No host says so of a VM that it was told to run; but it is not for a host to say whose the disks are.
#[test]
fn what_has_stopped_although_it_should_run_stays_until_its_snapshot_is_made() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    let host = world.host_of(vm).unwrap();
    world.ok(Command::SetHostMode { host, mode: crate::model::HostMode::Cordoned, reason: String::new() });
    world.ok(create(vm, 1));
    world.says(vm, ObservedState::Stopped, DisksObservation::default());
    assert_eq!(world.host_of(vm), Some(host), "it would have gone to the other one");
    world.says(vm, ObservedState::Stopped, DisksObservation { made: vec![id(1)], ..Default::default() });
    assert_eq!(world.host_of(vm), Some(other(host)));
}

#[test]
fn what_is_stopped_stays_with_the_host_that_has_something_to_do_to_its_disks() {
    let mut world = World::with_hosts(2);
    let vm = world.with_snapshot(1);
    let host = world.host_of(vm).unwrap();
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.ok(revert(vm, 1));
    world.ok(Command::SetHostMode { host, mode: crate::model::HostMode::Cordoned, reason: String::new() });
    world.set(vm, PowerChange::Start);
    assert_eq!(world.host_of(vm), Some(host), "it would have gone to the other one");
    world.says(vm, ObservedState::Fenced, DisksObservation::default());
    assert_eq!(world.host_of(vm), Some(other(host)), "the host says that it will do no more");
    assert!(world.record(vm).revert.is_some());
    // Stopped before and after.
    world.set(vm, PowerChange::Stop);
    world.says(vm, ObservedState::Stopped, reverted(1));
    assert_eq!((world.record(vm).revert, world.record(vm).desired), (None, Desired::Stopped));
}

#[test]
fn a_stopped_vm_takes_up_no_room_on_a_lost_host_while_its_disks_are_to_be_worked_on() {
    for failover in [Failover::Fast, Failover::Hold] {
        let mut world = World::with_hosts(1);
        let vm = world.running(1, VmSpec { failover, ..with_disk("shared") });
        world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
        world.says(vm, ObservedState::Stopped, DisksObservation::default());
        world.ok(create(vm, 1));
        world.lapse(host_id(1), Lapsed::Both);
        assert_eq!(world.state.host(host_id(1)).unwrap().promised.memory_mib, 0, "{failover:?}");
        assert_eq!(world.state.vm(vm).unwrap().effective_status().phase, Phase::Stopped, "its guest does not execute");
        assert_eq!(world.record(vm).snapshots[0].state, SnapshotState::Creating, "that waits for the host");
    }
}

#[test]
fn a_vm_that_must_stay_where_its_disks_are_worked_on_is_started_only_if_there_is_room() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, VmSpec { memory_mib: 3072, ..with_disk("shared") });
    world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
    world.says(vm, ObservedState::Stopped, DisksObservation::default());
    world.ok(create(vm, 1));
    let other = world.running(2, VmSpec { memory_mib: 2048, ..with_disk("shared") });
    let start = Command::SetDesired { vm, desired: PowerChange::Start };
    let why = world.refused(start.clone()).to_string();
    assert!(why.starts_with("host `host-1` has still to work on the disks of VM `vm-1` and lacks"), "{why}");
    assert_eq!(world.record(vm).desired, Desired::Stopped);

    world.ok(Command::SetDesired { vm: other, desired: PowerChange::Stop });
    world.says(other, ObservedState::Stopped, DisksObservation::default());
    world.ok(start);
    assert_eq!((world.record(vm).desired, world.host_of(vm)), (Desired::Running, Some(host_id(1))));
}

#[test]
fn a_stopped_vm_whose_host_is_lost_starts_elsewhere_though_there_is_no_room_where_its_disks_were_worked_on() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, VmSpec { memory_mib: 3072, ..with_disk("shared") });
    world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
    world.says(vm, ObservedState::Stopped, DisksObservation::default());
    world.ok(create(vm, 1));
    world.running(2, VmSpec { memory_mib: 2048, failover: Failover::Hold, ..with_disk("shared") });
    world.ok(Command::RegisterHost { host: Box::new(facts(2)) });
    world.lapse(host_id(1), Lapsed::Fast);
    world.ok(Command::SetDesired { vm, desired: PowerChange::Start });
    assert_eq!((world.record(vm).desired, world.host_of(vm)), (Desired::Running, Some(host_id(2))));
}
