//! What users ask of disks.

use uncloud_proto::ids::VmId;

use super::fixtures::*;
use crate::{
    model::{EventType, vm::VmSpec},
    state::command::{Command, Lapsed, ObservedState, PowerChange, Refusal},
};

fn resize(vm: VmId, disk: &str, size_bytes: u64) -> Command {
    Command::ResizeDisk { vm, disk: disk.into(), size_bytes }
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    world.ok(resize(vm, "disk0", 2 << 30));
    assert_eq!(world.record(vm).spec.disks[0].size_bytes, 2 << 30);
    assert_eq!(world.last_events(), [EventType::Updated]);
    assert_eq!(world.incarnation(vm), 1, "it goes on");
    // Again: nothing.
    world.ok(resize(vm, "disk0", 2 << 30));
    assert!(world.last.mutations.is_empty());
    let field = |refusal| match refusal {
        Refusal::Invalid { field, problem } => (field, problem),
        other => panic!("{other}"),
    };
    let (name, why) = field(world.refused(resize(vm, "disk0", 1 << 30)));
    assert!(name == "size_bytes" && why.contains("only grow"), "{name} {why}");
    let (name, why) = field(world.refused(resize(vm, "disk7", 3 << 30)));
    assert!(name == "disk" && why.contains("its disks are: disk0"), "{name} {why}");
    // It keeps what it has grown to on the next host.
    let host = world.host_of(vm).unwrap();
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.record(vm).spec.disks[0].size_bytes), (Some(other(host)), 2 << 30));
    // The disks of what is stopped can grow, those of what is deleted cannot.
    world.set(vm, PowerChange::Stop);
    world.ok(resize(vm, "disk0", 3 << 30));
    world.ok(Command::DeleteVm { vm });
    assert!(matches!(world.refused(resize(vm, "disk0", 4 << 30)), Refusal::Precondition(_)));
}

/// The target has read the disk.
#[test]
fn a_disk_does_not_grow_during_a_migration() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    world.ok(Command::MigrateVm { vm, to: None, secret: "s".into(), bytes_per_second: 0 });
    assert!(world.refused(resize(vm, "disk0", 2 << 30)).to_string().contains("being migrated"));
    world.ok(Command::CancelMigration { vm });
    world.ok(resize(vm, "disk0", 2 << 30));
}

/// The pools of the fixtures have a tebibyte, and two may be promised.
#[test]
fn a_pool_promises_no_more_than_it_may() {
    let mut world = World::with_hosts(1);
    let large = |size_bytes| {
        let mut disk = disk("shared");
        disk.size_bytes = size_bytes;
        VmSpec { disks: vec![disk], ..spec() }
    };
    let first = world.running(1, large(1 << 40));
    let second = world.create(2, large(1 << 40));
    assert!(world.host_of(second).is_some());
    let third = world.create(3, large(512));
    assert_eq!(world.host_of(third), None);
    assert_eq!(world.reason(third), "1 host: 1 lacks 1 MiB in pool `shared`");
    assert!(
        matches!(world.refused(resize(first, "disk0", (1 << 40) + 512)), Refusal::Invalid { field, .. } if field == "size_bytes")
    );
    // One that does not run takes its room, too; it is there again when the VM has gone.
    world.set(second, PowerChange::Stop);
    world.report(second, ObservedState::Stopped);
    world.ok(Command::Place { vms: vec![third] });
    assert_eq!(world.host_of(third), None);
    world.ok(Command::DeleteVm { vm: second });
    world.report(second, ObservedState::Deleted);
    world.ok(Command::Place { vms: vec![third] });
    assert!(world.host_of(third).is_some());
}
