//! VMs that begin as copies of others. CL1 is looked at after every change, in all tests (`fixtures.rs`).

use uncloud_proto::ids::{Revision, VmId};
use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::{Desired, EventType, Key, vm::VmSpec},
    sessions::desired::{self, Wanted},
    state::command::{
        Answer, Command, DisksObservation, Lapsed, NewClone, ObservedState, PowerChange, Refusal, RequestId,
    },
};

fn snapshot_id() -> Uuid {
    Uuid::from_u128(0x50a9)
}

fn clone(source: VmId, n: u128, snapshot: Option<&str>) -> Command {
    let macs = (0..8).map(|i| format!("42:00:00:00:{n:02}:{i:02}")).collect();
    let clone = Box::new(NewClone { id: vm_id(n), name: format!("vm-{n}"), macs });
    Command::CloneVm { request: None, source, snapshot: snapshot.map(str::to_owned), clone }
}

fn delete_snapshot(vm: VmId) -> Command {
    Command::DeleteSnapshot { vm, name: "s".into() }
}

fn set(vm: VmId, desired: PowerChange) -> Command {
    Command::SetDesired { vm, desired }
}

impl World {
    /// VM 1, which runs and has the snapshot `s`.
    fn source(&mut self, pool: &str) -> VmId {
        let vm = self.running(1, VmSpec { nics: vec![nic("42:00:00:00:00:01")], ..with_disk(pool) });
        self.ok(Command::CreateSnapshot { vm, id: snapshot_id(), name: "s".into() });
        let host = self.host_of(vm).unwrap();
        let mut report = self.observation(vm, ObservedState::Running);
        report.disks = DisksObservation { made: vec![snapshot_id()], ..Default::default() };
        self.ok(Command::Report { host, reports: vec![report] });
        vm
    }

    fn why(&mut self, command: Command) -> String {
        match self.refused(command) {
            Refusal::Precondition(message) => message,
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_clone_is_a_vm_of_its_own_and_its_host_is_told_what_to_copy() {
    let mut world = World::with_hosts(2);
    let source = world.source("shared");
    let Answer::Vm(record) = world.ok(clone(source, 2, Some("s"))) else { panic!("a VM") };
    assert_eq!((record.name.as_str(), record.owner.as_str()), ("vm-2", "default"));
    assert_eq!(record.spec.nics[0].mac, "42:00:00:00:02:00");
    assert_eq!(record.spec.disks, world.record(source).spec.disks);
    assert!(record.snapshots.is_empty() && !record.disks_exist);
    assert!(world.stored.contains_key(&Key::Mac("42:00:00:00:02:00".into())));
    assert!(world.events.iter().any(|(kind, m)| *kind == EventType::Created && m.contains("a copy of VM `vm-1`")));

    let told = |world: &World| {
        let host = world.host_of(vm_id(2)).unwrap();
        desired::message(&world.state, host, vm_id(2), Wanted::AsRecorded(Revision(0))).unwrap().clone_from
    };
    let from = told(&world).unwrap();
    assert_eq!((from.vm_id, from.disk_generation), (source.to_string(), 0));
    assert_eq!(from.snapshot_id, snapshot_id().to_string());
    world.report(vm_id(2), ObservedState::Preparing);
    assert!(told(&world).is_some());
    world.report(vm_id(2), ObservedState::Running);
    assert_eq!(told(&world), None, "they are made");
    assert_eq!(world.record(vm_id(2)).clone_of, None);
    world.ok(delete_snapshot(source));
    world.ok(Command::DeleteVm { vm: source });
}

/// CL1
#[test]
fn what_a_copy_needs_stays_until_it_is_made_or_given_up() {
    let mut world = World::with_hosts(2);
    let source = world.source("shared");
    world.ok(clone(source, 2, Some("s")));
    for command in [delete_snapshot(source), Command::DeleteVm { vm: source }] {
        let why = world.why(command);
        assert!(why.contains("being copied to VM `vm-2`") && why.contains("delete VM `vm-2`"), "{why}");
    }
    // What does not harm it.
    world.ok(Command::RevertToSnapshot { vm: source, name: "s".into() });
    world.ok(set(source, PowerChange::Stop));
    world.ok(set(source, PowerChange::Start));
    // Who deletes the clone gives it up, wherever its host is.
    world.ok(Command::DeleteVm { vm: vm_id(2) });
    assert_eq!(world.record(vm_id(2)).desired, Desired::Deleted);
    world.ok(Command::DeleteVm { vm: source });
}

/// CL1
/// Nobody copies for it until it is started, so waiting does not help.
#[test]
fn whoever_needs_the_source_of_a_stopped_clone_is_told_to_start_that() {
    let mut world = World::with_hosts(1);
    let source = world.source("shared");
    world.ok(clone(source, 2, Some("s")));
    assert!(world.why(delete_snapshot(source)).contains("wait until that is done"));
    world.ok(set(vm_id(2), PowerChange::ForceStop));
    assert!(world.why(delete_snapshot(source)).contains("start VM `vm-2`"));
    assert!(world.why(Command::DeleteVm { vm: source }).contains("start VM `vm-2`"));
}

#[test]
fn disks_are_copied_as_they_are_only_of_what_is_stopped_and_stays_so() {
    let mut world = World::with_hosts(2);
    let source = world.source("shared");
    assert!(world.why(clone(source, 2, None)).contains("take a snapshot first and name it, or stop the VM"));
    world.ok(set(source, PowerChange::Stop));
    assert!(world.why(clone(source, 2, None)).contains("not at rest yet"));
    world.report(source, ObservedState::Stopped);
    world.ok(clone(source, 2, None));
    assert!(world.why(set(source, PowerChange::Start)).contains("cannot be started"));
    let revert = Command::RevertToSnapshot { vm: source, name: "s".into() };
    assert!(world.why(revert).contains("cannot be put back"));
    assert!(world.why(Command::DeleteVm { vm: source }).contains("cannot be deleted"));
    world.ok(delete_snapshot(source));
    world.report(vm_id(2), ObservedState::Running);
    world.ok(set(source, PowerChange::Start));
}

#[test]
fn what_cannot_be_copied_is_refused_with_the_reason() {
    let mut world = World::with_hosts(2);
    let source = world.source("shared");
    let Refusal::Invalid { field, problem } = world.refused(clone(source, 2, Some("t"))) else { panic!("invalid") };
    assert_eq!((field.as_str(), problem.contains("it has s")), ("snapshot", true));
    world.ok(Command::CreateSnapshot { vm: source, id: Uuid::from_u128(7), name: "t".into() });
    assert!(world.why(clone(source, 2, Some("t"))).contains("not taken yet"));
    assert!(matches!(world.refused(clone(source, 1, Some("s"))), Refusal::Precondition(_)), "its own id");
    let taken = match clone(source, 2, Some("s")) {
        Command::CloneVm { clone, .. } => Box::new(NewClone { name: "vm-1".into(), ..*clone }),
        _ => unreachable!(),
    };
    let named = Command::CloneVm { request: None, source, snapshot: Some("s".into()), clone: taken };
    assert!(matches!(world.refused(named), Refusal::VmNameTaken { .. }));
    world.create(3, spec());
    assert!(world.why(clone(vm_id(3), 2, None)).contains("has no disks"));
    world.create(4, with_disk("shared"));
    assert!(world.why(clone(vm_id(4), 2, None)).contains("not made yet"));
    world.ok(clone(source, 2, Some("s")));
    assert!(world.why(clone(vm_id(2), 5, None)).contains("not made yet"), "a clone of a clone");
    assert!(world.state.vm(vm_id(5)).is_none());
}

#[test]
fn a_clone_is_placed_where_the_disks_are_that_it_is_a_copy_of() {
    let mut world = World::with_hosts(3);
    let source = world.source("local");
    let host = world.host_of(source).unwrap();
    world.ok(clone(source, 2, Some("s")));
    assert_eq!(world.host_of(vm_id(2)), Some(host));
    // It waits for that host, and is nowhere else meanwhile.
    world.ok(Command::DeclareLapsed { host, lapsed: Lapsed::Both, limit: 10 });
    world.ok(Command::Place { vms: vec![vm_id(2)] });
    assert_eq!(world.host_of(vm_id(2)), None, "{}", world.reason(vm_id(2)));
    assert!(world.why(delete_snapshot(source)).contains("vm-2"));
    let facts = (1..=3).map(facts).find(|f| f.id == host).unwrap();
    world.ok(Command::RegisterHost { host: Box::new(facts) });
    world.ok(Command::Place { vms: vec![vm_id(2)] });
    assert_eq!(world.host_of(vm_id(2)), Some(host));
    // One that has no host, and no disk yet, is gone at once.
    world.ok(Command::DeclareLapsed { host, lapsed: Lapsed::Both, limit: 10 });
    world.ok(Command::Place { vms: vec![vm_id(2)] });
    world.ok(Command::DeleteVm { vm: vm_id(2) });
    assert!(world.state.vm(vm_id(2)).is_none());
}

#[test]
fn a_pool_must_have_room_for_the_copy() {
    let mut world = World::with_hosts(1);
    let mut spec = with_disk("local");
    spec.disks[0].size_bytes = 3 << 39; // of 2 TiB that may be promised
    let source = world.running(1, spec);
    world.ok(set(source, PowerChange::Stop));
    world.report(source, ObservedState::Stopped);
    world.ok(clone(source, 2, None));
    assert_eq!(world.host_of(vm_id(2)), None);
    assert!(world.reason(vm_id(2)).contains("in pool `local`"), "{}", world.reason(vm_id(2)));
}

#[test]
fn the_same_request_makes_one_clone() {
    let mut world = World::with_hosts(1);
    let source = world.source("shared");
    let request = |command, fingerprint: &str| match command {
        Command::CloneVm { source, snapshot, clone, .. } => {
            let request = Some(RequestId { id: "r".into(), fingerprint: fingerprint.into() });
            Command::CloneVm { request, source, snapshot, clone }
        }
        _ => unreachable!(),
    };
    world.ok(request(clone(source, 2, Some("s")), "a"));
    let Answer::Vm(again) = world.ok(request(clone(source, 3, Some("s")), "a")) else { panic!("a VM") };
    assert_eq!(again.id, vm_id(2));
    assert!(world.state.vm(vm_id(3)).is_none());
    let other = request(clone(source, 3, Some("s")), "b");
    assert!(matches!(world.refused(other), Refusal::RequestIdReused(_)));
}
