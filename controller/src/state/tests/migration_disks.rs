//! Migrations that copy disks which only the VM's host has.

use uncloud_proto::{
    ids::{HostId, Incarnation, VmId},
    v1::VoidDisks,
};

use super::fixtures::*;
use crate::{
    model::{
        DrainHow, OwnDisks,
        host::Pool,
        migration::MigrationResult,
        vm::{Disk, DiskBus, DiskState, VmSpec},
    },
    sessions::desired::{Wanted, message},
    state::{
        Prospect,
        command::{Command, DisksObservation, DrainStep, Lapsed, NewClone, ObservedState, PowerChange, VmObservation},
    },
};

const ADDRESS: &str = "127.0.0.1:4444";
const DISKS: &str = "127.0.0.1:4445";

fn begin(vm: VmId, to: Option<HostId>) -> Command {
    Command::MigrateVm { vm, to, secret: "ab".repeat(32), bytes_per_second: 0 }
}

/// Which of the source's disks its agent says that it has copied.
#[derive(Clone, Copy)]
enum Copied {
    No,
    All,
}

impl World {
    fn copying(&mut self, n: u128) -> VmId {
        let vm = self.running(n, with_disk("local"));
        self.ok(begin(vm, None));
        vm
    }

    fn target_reports(&mut self, vm: VmId, state: ObservedState, disks_address: &str) {
        let migration = self.record(vm).migration.clone().expect("it migrates");
        let mut seen = seen(migration.incarnation.0, ADDRESS);
        seen.disks_address = disks_address.to_owned();
        seen.disks = if disks_address.is_empty() { 0 } else { 1 };
        let incarnation = migration.incarnation;
        let report = VmObservation { incarnation, migration: Some(seen), ..self.observation(vm, state) };
        self.ok(Command::Report { host: migration.target, reports: vec![report] });
    }

    fn source_has_sent(&mut self, vm: VmId, copied: Copied) {
        let host = self.host_of(vm).unwrap();
        let mut seen = seen(self.record(vm).migration.as_ref().unwrap().incarnation.0, "");
        seen.disks = if matches!(copied, Copied::All) { 1 } else { 0 };
        let report = VmObservation { migration: Some(seen), ..self.observation(vm, ObservedState::HandedOver) };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn arrives(&mut self, vm: VmId) {
        self.target_reports(vm, ObservedState::Incoming, DISKS);
        self.target_reports(vm, ObservedState::Received, DISKS);
        self.source_has_sent(vm, Copied::All);
    }

    /// What a host is told to remove when it is told to forget a VM.
    fn void_on(&self, host: HostId, vm: VmId) -> Option<VoidDisks> {
        message(&self.state, host, vm, Wanted::Forget(Incarnation(9))).unwrap().void_disks
    }

    fn how_it_ended(&self, vm: VmId) -> (MigrationResult, String) {
        let end = self.vm(vm).status.as_ref().unwrap().last_migration.clone().expect("one has ended");
        (end.result, end.reason)
    }
}

#[test]
fn m7_the_copies_become_the_disks_by_the_handover_and_the_old_ones_are_void_then() {
    let mut world = World::with_hosts(2);
    let vm = world.copying(1);
    let (source, target) = (world.host_of(vm).unwrap(), other(world.host_of(vm).unwrap()));
    let told = message(&world.state, target, vm, Wanted::AsRecorded(Default::default())).unwrap();
    assert_eq!((told.disks_exist, told.disk_generation), (false, 1), "it makes disks of the reserved generation");
    world.target_reports(vm, ObservedState::Incoming, DISKS);
    let told = message(&world.state, source, vm, Wanted::AsRecorded(Default::default())).unwrap();
    assert_eq!((told.disks_exist, told.disk_generation), (true, 0));
    assert_eq!(told.migrate_to.unwrap().disks_address, DISKS);
    assert_eq!(world.record(vm).disk_home.as_ref().unwrap().host, source, "until the hand-over");
    world.target_reports(vm, ObservedState::Received, DISKS);
    world.source_has_sent(vm, Copied::All);

    let record = world.record(vm);
    assert_eq!((record.placement.host, record.disk_generation, record.disks_exist), (Some(target), 1, true));
    let home = record.disk_home.clone().unwrap();
    assert_eq!((home.host, home.pools["local"]), (target, None));
    assert_eq!(world.void_on(source, vm), Some(VoidDisks { copied_from: 0, current: 1 }));
    assert_eq!(world.void_on(target, vm), None, "never where its disks are");

    // On the way back the old number is not used again.
    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, Some(source)));
    world.arrives(vm);
    assert_eq!((world.host_of(vm), world.record(vm).disk_generation), (Some(source), 2));
    assert_eq!(world.void_on(target, vm), Some(VoidDisks { copied_from: 0, current: 2 }));
}

#[test]
fn m7_copies_that_were_given_up_are_void_and_their_number_never_comes_again() {
    let mut world = World::with_hosts(2);
    let vm = world.copying(1);
    let (source, target) = (world.host_of(vm).unwrap(), other(world.host_of(vm).unwrap()));
    world.target_reports(vm, ObservedState::Incoming, DISKS);
    world.ok(Command::CancelMigration { vm });
    let record = world.record(vm);
    assert_eq!((record.placement.host, record.disk_generation), (Some(source), 0));
    assert_eq!(record.disk_home.as_ref().unwrap().host, source);
    assert_eq!(world.void_on(target, vm), Some(VoidDisks { copied_from: 0, current: 0 }), "only what is newer");
    assert_eq!(world.void_on(source, vm), None);
    world.ok(begin(vm, None));
    assert_eq!(world.record(vm).migration.as_ref().unwrap().disk_generation, Some(2));
    world.arrives(vm);
    assert_eq!(world.record(vm).disk_generation, 2);
}

/// M6: an agent that knows nothing of it sends the memory all the same.
#[test]
fn m6_nothing_is_handed_over_to_a_target_that_has_not_the_disks() {
    let mut world = World::with_hosts(2);
    let vm = world.copying(1);
    let source = world.host_of(vm);
    world.target_reports(vm, ObservedState::Incoming, DISKS);
    world.target_reports(vm, ObservedState::Received, DISKS);
    world.source_has_sent(vm, Copied::No);
    assert_eq!((world.host_of(vm), world.record(vm).disk_generation), (source, 0));
    let (result, reason) = world.how_it_ended(vm);
    assert!(result == MigrationResult::GivenUp && reason.contains("not copied"), "{reason}");

    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, None));
    world.target_reports(vm, ObservedState::Incoming, "");
    let (result, reason) = world.how_it_ended(vm);
    assert!(result == MigrationResult::GivenUp && reason.contains("takes 0 disks, not 1"), "{reason}");

    // One that does not know that a disk stays would make another in its place.
    let more = Disk { name: "data".into(), ..disk("shared") };
    let vm = world.running(2, VmSpec { disks: vec![disk("local"), disk("local"), more], ..spec() });
    world.ok(begin(vm, None));
    world.target_reports(vm, ObservedState::Incoming, DISKS);
    let (result, reason) = world.how_it_ended(vm);
    assert!(result == MigrationResult::GivenUp && reason.contains("takes 1 disks, not 2"), "{reason}");
}

/// P5: until the hand-over the disks are the source's, whatever the target has by then.
#[test]
fn a_source_that_dies_before_the_handover_keeps_the_disks() {
    let mut world = World::with_hosts(2);
    let vm = world.copying(1);
    let source = world.host_of(vm).unwrap();
    world.target_reports(vm, ObservedState::Incoming, DISKS);
    world.target_reports(vm, ObservedState::Received, DISKS);
    world.lapse(source, Lapsed::Fast);
    let record = world.record(vm);
    assert_eq!((record.placement.host, record.disk_generation), (Some(source), 0));
    assert_eq!(record.disk_home.as_ref().unwrap().host, source);
}

#[test]
fn a_pool_that_disks_are_copied_into_must_have_room_for_them() {
    let mut world = World::with_hosts(2);
    // Twice what the pools are said to hold is promised at the most.
    let huge = VmSpec { disks: vec![crate::model::vm::Disk { size_bytes: 3 << 39, ..disk("local") }], ..spec() };
    let first = world.running(1, huge.clone());
    let second = world.running(2, huge);
    assert_ne!(world.host_of(first), world.host_of(second));
    let refusal = world.refused(begin(first, None)).to_string();
    assert!(refusal.contains("local"), "{refusal}");
}

/// Of a VM with disks of both kinds only those are copied that its host has alone. The others keep the name that they have, whatever
/// becomes of the migration, so both hosts find them.
#[test]
fn m7_what_hosts_share_is_not_copied_and_keeps_its_name() {
    let mut world = World::with_hosts(2);
    let more = |name: &str, state| Disk {
        name: name.into(),
        bus: DiskBus::Scsi,
        unit: if state == DiskState::Attached { 0 } else { 1 },
        id: Some(uuid::Uuid::from_u128(7)),
        state,
        ..disk("shared")
    };
    let disks = vec![disk("local"), more("data", DiskState::Attached), more("spare", DiskState::Detached)];
    let vm = world.running(1, VmSpec { disks, ..spec() });
    let source = world.host_of(vm).unwrap();
    let kept = |world: &World| -> Vec<_> { world.record(vm).spec.disks.iter().map(|d| d.kept_generation).collect() };
    let told = |world: &World, host| {
        let told = message(&world.state, host, vm, Wanted::AsRecorded(Default::default())).unwrap();
        let kept: Vec<_> = told.spec.unwrap().disks.iter().map(|d| d.kept_generation).collect();
        (told.disks_exist, told.disk_generation, kept)
    };
    world.ok(begin(vm, None));
    let all = vec![None, Some(0), Some(0)];
    assert_eq!(kept(&world), all, "what both are told from the beginning");
    assert_eq!(told(&world, other(source)), (false, 1, all.clone()));
    assert_eq!(told(&world, source), (true, 0, all.clone()));
    world.ok(Command::CancelMigration { vm });
    assert_eq!((world.record(vm).disk_generation, kept(&world)), (0, all.clone()), "the same files");

    for generation in [2, 3] {
        world.ok(begin(vm, None));
        // The target has trouble with what they share, for a moment.
        let target = world.record(vm).migration.as_ref().unwrap().target;
        let pools = |shared_id| vec![local("local"), Pool { shared_id, ..shared("shared") }];
        world.ok(Command::UpdatePools { host: target, pools: pools(None) });
        world.arrives(vm);
        world.ok(Command::UpdatePools { host: target, pools: pools(shared("shared").shared_id) });
        world.report(vm, ObservedState::Running);
        assert_eq!((world.record(vm).disk_generation, kept(&world)), (generation, all.clone()));
    }
    let home = world.record(vm).disk_home.clone().unwrap();
    assert_eq!((home.host, home.pools["local"], home.pools["shared"].is_some()), (source, None, true));

    // A clone of it has to know where everything is, and has nothing of that itself.
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    let clone = NewClone { id: vm_id(2), name: "copy".into(), macs: Vec::new() };
    world.ok(Command::CloneVm { request: None, source: vm, snapshot: None, clone: Box::new(clone) });
    let record = world.record(vm_id(2));
    let of = record.clone_of.clone().unwrap();
    assert_eq!(
        (of.disk_generation, of.kept_generations.get("data"), of.kept_generations.get("root")),
        (3, Some(&0), None)
    );
    assert!(record.spec.disks.iter().all(|d| d.kept_generation.is_none()));
}

/// The room is needed where disks are made, and only there.
#[test]
fn what_is_not_copied_needs_no_room() {
    let mut world = World::with_hosts(2);
    let huge = Disk { name: "data".into(), size_bytes: 3 << 39, ..disk("shared") };
    let vm = world.running(1, VmSpec { disks: vec![disk("local"), huge], ..spec() });
    world.ok(begin(vm, None));
}

/// A drain that is told to copies disks; what cannot be copied stays, and what has no turn waits for it.
#[test]
fn a_drain_that_may_copy_disks_moves_vms_with_own_disks() {
    let mut world = World::with_hosts(1);
    let vms = [1, 2, 3].map(|n| world.running(n, with_disk("local")));
    let snapshotted = world.running(4, with_disk("local"));
    let id = uuid::Uuid::from_u128(7);
    world.ok(Command::CreateSnapshot { vm: snapshotted, id, name: "s1".into() });
    world.ok(Command::RegisterHost { host: Box::new(facts(2)) });
    let host = host_id(1);
    let drain = |disks| Command::DrainHost { host, how: DrainHow::LiveOnly, disks, reason: String::new() };
    world.ok(drain(OwnDisks::Stay));
    let stuck = world.state.prospect(vms[0], &world.cx());
    assert!(matches!(&stuck, Prospect::Stuck(why) if why.contains("`--copy-disks`")), "{stuck:?}");
    world.ok(drain(OwnDisks::Copied));
    assert!(world.events.last().unwrap().1.contains("are copied"), "{:?}", world.events.last());
    for vm in &vms[..2] {
        assert_eq!(world.state.prospect(*vm, &world.cx()), Prospect::CanMigrate);
        let step = DrainStep::Migrate { secret: "ab".repeat(32) };
        world.ok(Command::DrainVm { vm: *vm, from: host, step });
        assert!(world.record(*vm).migration.as_ref().unwrap().disk_generation.is_some());
    }
    let waits = world.state.prospect(vms[2], &world.cx());
    assert!(matches!(waits, Prospect::Waits(_)), "{waits:?}");
    let waits = world.state.prospect(snapshotted, &world.cx());
    assert!(matches!(&waits, Prospect::Waits(_)), "{waits:?}");
    for vm in &vms[..2] {
        world.arrives(*vm);
        world.report(*vm, ObservedState::Running);
    }
    // The other host is only silent for a moment.
    world.silent.insert(host_id(2));
    let waits = world.state.prospect(vms[2], &world.cx());
    assert!(matches!(waits, Prospect::Waits(_)), "{waits:?}");
    let stuck = world.state.prospect(snapshotted, &world.cx());
    assert!(matches!(&stuck, Prospect::Stuck(why) if why.contains("snapshots")), "{stuck:?}");
}

/// A drain does not copy disks by itself, and sends nobody to a command that would be refused.
#[test]
fn a_drain_says_of_a_vm_with_own_disks_what_can_be_done() {
    let mut world = World::with_hosts(2);
    let id = uuid::Uuid::from_u128(7);
    let plain = world.running(1, with_disk("local"));
    let snapshotted = world.running(2, with_disk("local"));
    world.ok(Command::CreateSnapshot { vm: snapshotted, id, name: "s1".into() });
    let host = world.host_of(snapshotted).unwrap();
    let disks = DisksObservation { made: vec![id], ..Default::default() };
    let report = VmObservation { disks, ..world.observation(snapshotted, ObservedState::Running) };
    world.ok(Command::Report { host, reports: vec![report] });
    let more = |state| Disk { name: "more".into(), bus: DiskBus::Scsi, id: Some(id), state, ..disk("local") };
    let detached = VmSpec { disks: vec![disk("local"), more(DiskState::Detached)], ..spec() };
    let detached = world.running(3, detached);
    let later = world.running(4, VmSpec { disks: vec![disk("local"), more(DiskState::Attached)], ..spec() });

    let cases = [
        (plain, "`uncloud vm migrate` copies"),
        (snapshotted, "`uncloud vm snapshot delete`"),
        (detached, "disk `more` is detached"),
        (later, "`uncloud vm migrate` copies"),
    ];
    for (vm, said) in cases {
        let prospect = world.state.prospect(vm, &world.cx());
        assert!(matches!(&prospect, Prospect::Stuck(why) if why.contains(said)), "{prospect:?}");
        // It is what happens.
        if vm == plain || vm == later {
            world.ok(begin(vm, None));
        } else {
            assert!(world.refused(begin(vm, None)).to_string().contains(said));
        }
    }
}
