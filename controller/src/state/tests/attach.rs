//! Disks that come and go.

use uncloud_proto::ids::VmId;
use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::vm::{Disk, DiskBus, DiskCache, DiskHotplug, DiskState, VmSpec},
    state::{
        MAX_DISKS,
        command::{
            Command, DetachHow, DiskToAttach, DisksObservation, Lapsed, NewClone, ObservedState, PowerChange, Refusal,
            VmObservation,
        },
    },
};

fn new(name: &str) -> DiskToAttach {
    DiskToAttach {
        id: Uuid::from_u128(0xd15c),
        name: Some(name.into()),
        pool: Some("shared".into()),
        size_bytes: 1 << 30,
        bus: None,
        cache: None,
    }
}

fn attach(vm: VmId, disk: DiskToAttach) -> Command {
    Command::AttachDisk { vm, disk: Box::new(disk) }
}

fn again(name: &str) -> DiskToAttach {
    DiskToAttach { pool: None, size_bytes: 0, ..new(name) }
}

fn detach(vm: VmId, name: &str, how: DetachHow) -> Command {
    Command::DetachDisk { vm, disk: name.into(), how }
}

fn hotplug() -> VmSpec {
    VmSpec { disk_hotplug: DiskHotplug::Enabled, ..with_disk("shared") }
}

fn field(refusal: Refusal) -> String {
    match refusal {
        Refusal::Invalid { field, .. } => field,
        other => panic!("{other}"),
    }
}

impl World {
    /// The VM's host says that it has done these.
    fn has_done(&mut self, vm: VmId, state: ObservedState, orders: &[u64]) {
        let host = self.host_of(vm).unwrap();
        let disks = DisksObservation { orders: orders.to_vec(), ..Default::default() };
        let report = VmObservation { disks, ..self.observation(vm, state) };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn disk(&self, vm: VmId, name: &str) -> Option<Disk> {
        self.record(vm).spec.disks.iter().find(|d| d.name == name).cloned()
    }

    fn disk_state(&self, vm: VmId, name: &str) -> Option<DiskState> {
        self.disk(vm, name).map(|d| d.state)
    }
}

/// D1
#[test]
fn a_disk_comes_and_goes_when_the_host_says_so_by_the_number_of_the_order() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, hotplug());
    world.ok(attach(vm, new("data")));
    let data = world.disk(vm, "data").unwrap();
    assert_eq!((data.state, data.bus, data.unit, data.order), (DiskState::Attaching, DiskBus::Scsi, 0, 1));
    assert_eq!(data.id, Some(Uuid::from_u128(0xd15c)));
    assert_eq!(field(world.refused(attach(vm, new("data")))), "disk.name");
    world.has_done(vm, ObservedState::Running, &[7]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attaching), "of another one");
    world.has_done(vm, ObservedState::Running, &[1]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attached));
    assert_eq!(world.incarnation(vm), 1, "it ran all along");

    world.ok(detach(vm, "data", DetachHow::Keep));
    world.ok(detach(vm, "data", DetachHow::Keep));
    assert!(world.last.mutations.is_empty(), "again: nothing");
    // What was said of the first order says nothing about the second.
    world.has_done(vm, ObservedState::Running, &[1]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Detaching));
    world.has_done(vm, ObservedState::Running, &[2]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Detached));

    assert_eq!(
        field(world.refused(attach(vm, DiskToAttach { size_bytes: 2 << 30, ..again("data") }))),
        "disk.size_bytes"
    );
    world.ok(attach(vm, again("data")));
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Returning));
    world.has_done(vm, ObservedState::Running, &[3]);
    world.ok(detach(vm, "data", DetachHow::Delete));
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Deleting));
    world.has_done(vm, ObservedState::Running, &[1, 2, 3]);
    assert!(world.disk(vm, "data").is_some());
    world.has_done(vm, ObservedState::Running, &[4]);
    assert_eq!(world.disk(vm, "data"), None);
    assert_eq!(field(world.refused(detach(vm, "data", DetachHow::Keep))), "disk");
}

#[test]
fn a_vm_that_runs_takes_disks_on_the_bus_scsi_and_one_that_is_stopped_any() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, hotplug());
    let sata = DiskToAttach { bus: Some(DiskBus::Sata), ..new("old") };
    assert_eq!(field(world.refused(attach(vm, sata.clone()))), "disk.bus");
    // Started by a version that knew nothing of it.
    let before = world.running(2, with_disk("shared"));
    let why = world.refused(attach(before, new("data"))).to_string();
    assert!(why.contains("stop it, attach the disk, and start it"), "{why}");
    for vm in [vm, before] {
        world.set(vm, PowerChange::Stop);
        // Asked to stop, it may still run.
        assert!(world.run(attach(vm, sata.clone())).is_err());
        world.has_done(vm, ObservedState::Stopped, &[]);
        world.ok(attach(vm, sata.clone()));
        world.ok(attach(vm, new("data")));
        world.has_done(vm, ObservedState::Stopped, &[1, 2]);
        assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attached));
        world.set(vm, PowerChange::Start);
        assert_eq!((world.incarnation(vm), world.record(vm).spec.disk_hotplug), (2, DiskHotplug::Enabled));
        world.has_done(vm, ObservedState::Running, &[]);
        assert!(world.refused(detach(vm, "old", DetachHow::Keep)).to_string().contains("stop the VM first"));
        world.ok(attach(vm, DiskToAttach { name: None, ..new("") }));
        assert_eq!(world.disk(vm, "disk1").unwrap().unit, 1, "the next target number");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_reason_and_changes_nothing() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, hotplug());
    let without_pool = DiskToAttach { pool: Some("nowhere".into()), ..new("data") };
    assert_eq!(field(world.refused(attach(vm, without_pool))), "disk.pool");
    assert_eq!(field(world.refused(attach(vm, again("data")))), "disk.size_bytes");
    let huge = DiskToAttach { size_bytes: 60 << 40, ..new("data") };
    assert_eq!(field(world.refused(attach(vm, huge))), "disk.size_bytes");
    assert_eq!(field(world.refused(detach(vm, "disk0", DetachHow::Keep))), "disk", "it boots from it");
    assert_eq!(world.record(vm).spec, hotplug());

    for n in 1..MAX_DISKS {
        world.ok(attach(vm, new(&format!("d{n}"))));
    }
    assert_eq!(field(world.refused(attach(vm, new("one-more")))), "disk");
    let migrate = Command::MigrateVm { vm, to: None, secret: "s".into(), bytes_per_second: 0 };
    assert!(world.refused(migrate.clone()).to_string().contains("is being attached"));
    let snapshot = Command::CreateSnapshot { vm, id: Uuid::from_u128(1), name: "s1".into() };
    assert!(world.refused(snapshot.clone()).to_string().contains("is being attached"));
    let all: Vec<u64> = (1..MAX_DISKS as u64).collect();
    world.has_done(vm, ObservedState::Running, &all);

    world.ok(migrate);
    assert!(world.refused(detach(vm, "d1", DetachHow::Keep)).to_string().contains("is being migrated"));
    world.ok(Command::CancelMigration { vm });
    world.ok(snapshot);
    assert!(world.refused(detach(vm, "d1", DetachHow::Delete)).to_string().contains("has snapshots"));
    assert!(world.refused(attach(vm, new("x"))).to_string().contains("has snapshots"));
    world.ok(Command::DeleteVm { vm });
    assert!(world.refused(attach(vm, new("x"))).to_string().contains("is being deleted"));
}

/// P5: the next host does what the first one could not, and a disk in a pool that one host has alone stays where it is.
#[test]
fn an_order_goes_with_the_vm_and_the_vm_stays_where_its_disks_are() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, hotplug());
    world.ok(attach(vm, new("data")));
    let host = world.host_of(vm).unwrap();
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.host_of(vm), Some(other(host)));
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attaching));
    world.has_done(vm, ObservedState::Running, &[1]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attached));

    // Now it has one on another host than the one that made its first disk.
    let local = DiskToAttach { pool: Some("local".into()), ..new("more") };
    world.ok(attach(vm, local));
    let host = other(host);
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.host_of(vm), Some(host), "the disk may have been made there, and written to");
}

/// A VM whose disks are not made yet begins with what it is given before; there is no file to keep or to delete.
#[test]
fn before_the_first_start_disks_are_part_of_what_is_made() {
    let mut world = World::with_hosts(1);
    let mut stopped = new_vm(1, with_disk("shared"));
    stopped.desired = crate::model::Desired::Stopped;
    let vm = stopped.id;
    world.ok(Command::CreateVm { request: None, vm: Box::new(stopped) });
    world.ok(attach(vm, new("data")));
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Attached));
    assert!(world.refused(detach(vm, "data", DetachHow::Keep)).to_string().contains("not made yet"));
    world.ok(detach(vm, "data", DetachHow::Delete));
    assert_eq!(world.disk(vm, "data"), None);
    assert!(!world.record(vm).has_disk_orders());
}

/// D3
#[test]
fn writeback_is_for_pools_that_one_host_has_alone() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, hotplug());
    let cached = |pool: &str| DiskToAttach { pool: Some(pool.into()), cache: Some(DiskCache::Writeback), ..new(pool) };
    assert_eq!(field(world.refused(attach(vm, cached("shared")))), "disk.cache");
    world.ok(attach(vm, cached("local")));
    let mut spec = with_disk("shared");
    spec.disks[0].cache = DiskCache::Writeback;
    let refused = world.refused(Command::CreateVm { request: None, vm: Box::new(new_vm(2, spec)) });
    assert_eq!(field(refused), "spec.disks[0].cache");
}

/// Its host would say that no machine has it, and nobody that it was never made: it could come back, and its file is missing.
#[test]
fn a_disk_is_kept_only_if_it_is_known_to_be_made() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, hotplug());
    world.ok(attach(vm, new("data")));
    let refused = world.refused(detach(vm, "data", DetachHow::Keep)).to_string();
    assert!(refused.contains("still being attached") && refused.contains("--delete"), "{refused}");
    world.has_done(vm, ObservedState::Running, &[1]);
    world.ok(detach(vm, "data", DetachHow::Keep));
    world.has_done(vm, ObservedState::Running, &[2]);
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Detached));
    // It is there, whether it comes back or not.
    world.ok(attach(vm, again("data")));
    world.ok(detach(vm, "data", DetachHow::Keep));
    assert_eq!(world.disk_state(vm, "data"), Some(DiskState::Detaching));
}

/// Nobody knew the pool when the disk came: whoever has it with others is no host for the VM (D3), and the disk can go.
#[test]
fn a_vm_with_a_writeback_disk_waits_for_a_host_that_has_the_pool_alone() {
    let mut world = World::with_hosts(0);
    let cached = DiskToAttach { cache: Some(DiskCache::Writeback), ..new("data") };
    let vm = vm_id(1);
    world.ok(Command::CreateVm { request: None, vm: Box::new(new_vm(1, hotplug())) });
    world.ok(attach(vm, cached));
    world.ok(Command::RegisterHost { host: Box::new(facts(1)) });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!(world.host_of(vm), None);
    let why = &world.record(vm).placement.why;
    assert!(why.contains("1 has pool `shared` in common with others"), "{why}");
    world.ok(detach(vm, "data", DetachHow::Delete));
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!(world.host_of(vm), Some(host_id(1)));
}

/// What the machine does not have is no part of a copy.
#[test]
fn a_clone_has_the_disks_that_the_machine_has() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, hotplug());
    world.ok(attach(vm, new("data")));
    world.ok(attach(vm, new("more")));
    world.set(vm, PowerChange::Stop);
    let clone = NewClone { id: vm_id(2), name: "vm-2".into(), macs: Vec::new() };
    let clone = Command::CloneVm { request: None, source: vm, snapshot: None, clone: Box::new(clone) };
    world.has_done(vm, ObservedState::Stopped, &[1]);
    assert!(world.refused(clone.clone()).to_string().contains("`more`"));
    world.has_done(vm, ObservedState::Stopped, &[2]);
    world.ok(detach(vm, "data", DetachHow::Keep));
    world.has_done(vm, ObservedState::Stopped, &[3]);
    world.ok(clone);
    let names: Vec<String> = world.record(vm_id(2)).spec.disks.iter().map(|d| d.name.clone()).collect();
    assert_eq!(names, ["disk0", "more"]);
    assert!(world.refused(detach(vm, "more", DetachHow::Delete)).to_string().contains("being copied"));
}

/// Its host would look for a disk to copy that nobody has.
#[test]
fn a_clone_that_waits_for_a_host_is_given_no_disk_before_its_own_are_copied() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("local"));
    world.set(vm, PowerChange::Stop);
    world.has_done(vm, ObservedState::Stopped, &[]);
    let host = world.host_of(vm).unwrap();
    let clone = NewClone { id: vm_id(2), name: "vm-2".into(), macs: Vec::new() };
    world.ok(Command::CloneVm { request: None, source: vm, snapshot: None, clone: Box::new(clone) });
    world.ok(Command::DeclareLapsed { host, lapsed: Lapsed::Both, limit: 10 });
    world.ok(Command::Place { vms: vec![vm_id(2)] });
    assert_eq!(world.host_of(vm_id(2)), None);
    assert!(world.refused(attach(vm_id(2), new("data"))).to_string().contains("still to be copied"));
}
