//! Network pools: who is told to run what, when, and who deletes the files.

use uncloud_proto::{
    ids::{HostId, Incarnation, VmId},
    v1,
};
use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::{
        Desired, DrainHow, OwnDisks,
        host::{Pool, PoolAccess},
        vm::{DiskHotplug, DiskState, GuestAgent, SnapshotGuest, SnapshotState, VmSpec},
    },
    sessions::{
        desired::{self, Plan},
        serving::{self, Grants, Said},
    },
    state::{
        Prospect,
        command::{
            Command, DetachHow, DiskToAttach, DisksObservation, DrainStep, HostFacts, Lapsed, ObservedState,
            PowerChange, ServedObservation, VmObservation,
        },
        exports,
    },
};

const NET: Uuid = Uuid::from_u128(0xe7);

fn net(access: PoolAccess) -> Pool {
    Pool { shared_id: Some(NET), access, ..local("net") }
}

fn exported() -> Pool {
    net(PoolAccess::Exported { address: "10.0.0.3:10809".into() })
}

fn with_pool(n: u128, pool: Pool) -> Command {
    let mut facts = facts(n);
    facts.pools.push(pool);
    Command::RegisterHost { host: Box::new(facts) }
}

/// Hosts 1 and 2 have the pool over the network, host 3 exports it and runs nothing.
fn world() -> World {
    let mut world = World::with_hosts(0);
    world.ok(with_pool(1, net(PoolAccess::Network)));
    world.ok(with_pool(2, net(PoolAccess::Network)));
    world.ok(with_pool(3, exported()));
    cordon(&mut world, 3);
    world
}

fn cordon(world: &mut World, n: u128) {
    let mode = crate::model::HostMode::Cordoned;
    world.ok(Command::SetHostMode { host: host_id(n), mode, reason: String::new() });
}

fn plan(world: &World, grants: &Grants, host: HostId) -> Plan {
    let mut plan = desired::plan(&world.state, host, &Default::default());
    serving::withhold(&world.state, grants, host, &mut plan);
    plan
}

/// What the host of a VM is told about it now.
fn told(world: &World, grants: &Grants, vm: VmId) -> Option<v1::DesiredVm> {
    let host = world.host_of(vm).unwrap();
    let wanted = *plan(world, grants, host).vms.get(&vm)?;
    let message = desired::message(&world.state, host, vm, wanted)?;
    serving::complete(&world.state, grants, host, vm, message)
}

/// The storage host says that a VM's disks are served to this incarnation.
fn serve(world: &mut World, grants: &Grants, vm: VmId, incarnation: u64) {
    let incarnation = Incarnation(incarnation);
    let served = ServedObservation { incarnation, served: true, ..Default::default() };
    world.ok(Command::NoteServed { host: host_id(3), vm, said: Box::new(served) });
    said(world, grants, host_id(3), vm, incarnation, None);
}

fn said(world: &World, grants: &Grants, by: HostId, vm: VmId, incarnation: Incarnation, next: Option<Incarnation>) {
    grants.take(&world.state, by, vm, Said { incarnation, next, problem: String::new() });
}

#[test]
fn n4_a_host_is_told_to_run_only_what_the_storage_host_serves_to_this_incarnation() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    let host = world.host_of(vm).unwrap();
    assert_ne!(host, host_id(3));
    assert_eq!(told(&world, &grants, vm), None);
    assert!(serving::waits(&world.state, &grants, host, world.record(vm)).unwrap().contains("host-3"));
    let order = serving::order(&world.state, host_id(3), vm).unwrap();
    assert_eq!((order.incarnation, order.disks_exist), (1, false));
    assert_eq!(serving::wanted(&world.state, host_id(3)).keys().collect::<Vec<_>>(), [&vm]);
    assert!(serving::wanted(&world.state, host).is_empty());

    // P5: that the disks are made is stored before anybody is told to run from them.
    said(&world, &grants, host_id(3), vm, Incarnation(1), None);
    assert_eq!(told(&world, &grants, vm), None);
    serve(&mut world, &grants, vm, 1);
    let message = told(&world, &grants, vm).unwrap();
    assert_eq!((message.disposition(), message.incarnation, message.disks_exist), (v1::Disposition::Run, 1, true));
    assert_eq!(message.network_pools[0].address, "10.0.0.3:10809");

    // Its host dies: what was said of the incarnation of before is no grant for the next.
    world.report(vm, ObservedState::Running);
    world.lapse(host, Lapsed::Fast);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
    assert_eq!(told(&world, &grants, vm), None);
    assert!(serving::order(&world.state, host_id(3), vm).unwrap().disks_exist);
    serve(&mut world, &grants, vm, 1);
    assert_eq!(told(&world, &grants, vm), None, "late news of the incarnation of before");
    serve(&mut world, &grants, vm, 2);
    assert_eq!(told(&world, &grants, vm).unwrap().incarnation, 2);
}

#[test]
fn n4_a_message_that_was_planned_before_the_vm_was_given_a_new_incarnation_is_not_sent() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    let host = world.host_of(vm).unwrap();
    let wanted = plan(&world, &grants, host).vms[&vm];
    world.set(vm, PowerChange::Stop);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 2));
    let message = desired::message(&world.state, host, vm, wanted).unwrap();
    assert_eq!(serving::complete(&world.state, &grants, host, vm, message), None);
}

#[test]
fn n4_only_the_one_host_that_exports_the_pool_can_grant() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    assert!(told(&world, &grants, vm).is_some());
    said(&world, &grants, other(world.host_of(vm).unwrap()), vm, Incarnation(1), None);
    assert_eq!(told(&world, &grants, vm), None, "said by a host that has nothing to say");
    serve(&mut world, &grants, vm, 1);
    // Two hosts export it: what one takes away, the other may still give.
    world.ok(with_pool(4, exported()));
    assert_eq!(exports::exporter(&world.state, "net", NET), None);
    assert_eq!(told(&world, &grants, vm), None);
    assert!(serving::wanted(&world.state, host_id(3)).is_empty());
}

#[test]
fn a_new_leader_asks_anew_and_a_stop_needs_no_grant() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    world.report(vm, ObservedState::Running);
    let fresh = Grants::default();
    assert_eq!(told(&world, &fresh, vm), None, "nothing is said of it, so it stays as it is");
    world.set(vm, PowerChange::Stop);
    assert_eq!(told(&world, &fresh, vm).unwrap().disposition(), v1::Disposition::Stop);
    assert!(serving::order(&world.state, host_id(3), vm).is_some(), "it may still write");
}

/// P5: the record goes only when the host that has the files says that they are gone.
#[test]
fn the_storage_host_deletes_the_files_after_the_vm_is_gone_elsewhere() {
    for host_dies in [false, true] {
        let (mut world, grants) = (world(), Grants::default());
        let vm = world.create(1, with_disk("net"));
        serve(&mut world, &grants, vm, 1);
        world.report(vm, ObservedState::Running);
        let host = world.host_of(vm).unwrap();
        world.ok(Command::DeleteVm { vm });
        assert!(serving::order(&world.state, host_id(3), vm).is_none(), "nobody is given access any more");
        if host_dies {
            world.lapse(host, Lapsed::Fast);
        } else {
            assert_eq!(told(&world, &grants, vm).unwrap().disposition(), v1::Disposition::Delete);
            world.report(vm, ObservedState::Deleted);
        }
        assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host_id(3)), 2), "host dies: {host_dies}");
        assert_eq!(told(&world, &grants, vm).unwrap().disposition(), v1::Disposition::Delete);
        world.report(vm, ObservedState::Deleted);
        assert!(world.state.vm(vm).is_none());
    }
}

#[test]
fn a_vm_without_a_host_has_its_files_deleted_though_no_host_ever_said_that_it_ran() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    cordon(&mut world, 1);
    cordon(&mut world, 2);
    let host = world.host_of(vm).unwrap();
    world.lapse(host, Lapsed::Fast);
    assert_eq!(world.host_of(vm), None);
    world.ok(Command::DeleteVm { vm });
    assert_eq!((world.host_of(vm), world.record(vm).desired), (Some(host_id(3)), Desired::Deleted));
}

#[test]
fn all_disks_of_a_vm_lie_in_one_network_pool_or_in_none() {
    let mut world = world();
    let mut mixed = with_disk("net");
    mixed.disks.push(crate::model::vm::Disk { name: "disk1".into(), ..disk("local") });
    let vm = world.create(1, mixed);
    assert_eq!(world.host_of(vm), None);
    assert!(world.reason(vm).contains("all disks of a VM must lie in it"), "{}", world.reason(vm));
}

/// A disk comes while the VM runs and is told to both hosts; what cannot be is refused and changes nothing.
#[test]
fn a_disk_comes_to_a_network_pool_and_goes_where_a_machine_shows_that_it_is_made() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, VmSpec { disk_hotplug: DiskHotplug::Enabled, ..with_disk("net") });
    let attach = |pool: &str| {
        let (id, name, pool) = (Uuid::from_u128(9), Some("data".to_owned()), Some(pool.to_owned()));
        let disk = DiskToAttach { id, name, pool, size_bytes: 1 << 30, bus: None, cache: None };
        Command::AttachDisk { vm, disk: Box::new(disk) }
    };
    let detach = |how| Command::DetachDisk { vm, disk: "data".into(), how };
    serve(&mut world, &grants, vm, 1);
    world.report(vm, ObservedState::Running);
    let refused = world.refused(attach("local")).to_string();
    assert!(refused.contains("all disks of a VM must lie in it"), "{refused}");
    assert_eq!(world.record(vm).spec.disks.len(), 1);

    world.ok(attach("net"));
    let state = |message: v1::DesiredVm| message.spec.unwrap().disks[1].state();
    let to_storage = |world: &World| state(serving::order(&world.state, host_id(3), vm).unwrap());
    assert_eq!(to_storage(&world), v1::DiskState::Attaching);
    assert_eq!(state(told(&world, &grants, vm).unwrap()), v1::DiskState::Attaching);
    let machine_has_done = |world: &mut World| {
        let host = world.host_of(vm).unwrap();
        let disks = DisksObservation { orders: vec![world.record(vm).disk_orders], ..Default::default() };
        let report = VmObservation { disks, ..world.observation(vm, ObservedState::Running) };
        world.ok(Command::Report { host, reports: vec![report] });
    };
    assert!(world.refused(detach(DetachHow::Keep)).to_string().contains("still being attached"));
    machine_has_done(&mut world);
    world.ok(detach(DetachHow::Keep));
    assert_eq!(
        to_storage(&world),
        v1::DiskState::Detached,
        "the machine may have it; its storage host has nothing to do"
    );
    machine_has_done(&mut world);
    assert_eq!(to_storage(&world), v1::DiskState::Detached);
}

/// The storage host is told of the new size, whether the VM runs, has been made or not; the room is that of the storage host.
#[test]
fn a_disk_in_a_network_pool_grows_where_its_files_are() {
    let (mut world, grants) = (world(), Grants::default());
    let resize = |vm, size_bytes| Command::ResizeDisk { vm, disk: "disk0".into(), size_bytes };
    let vm = world.create(1, with_disk("net"));
    let size = |world: &World| serving::order(&world.state, host_id(3), vm).unwrap().spec.unwrap().disks[0].size_bytes;
    world.ok(resize(vm, 2 << 30));
    assert_eq!(size(&world), 2 << 30);
    serve(&mut world, &grants, vm, 1);
    world.report(vm, ObservedState::Running);
    world.ok(resize(vm, 3 << 30));
    assert_eq!(size(&world), 3 << 30);
    assert_eq!(told(&world, &grants, vm).unwrap().spec.unwrap().disks[0].size_bytes, 3 << 30, "so its QEMU looks");
    let too_much = world.refused(resize(vm, 1 << 60)).to_string();
    assert!(too_much.contains("more than pool `net` has left"), "{too_much}");
    world.ok(Command::MigrateVm { vm, to: None, secret: "0".repeat(64), bytes_per_second: 0 });
    assert!(world.refused(resize(vm, 4 << 30)).to_string().contains("is being migrated"));
}

/// N5: both ends of a migration have the disks until it is handed over, and then the target goes on when the source has them no more.
#[test]
fn n5_the_target_opens_the_disks_beside_the_source_and_goes_on_when_the_source_has_them_no_more() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    world.report(vm, ObservedState::Running);
    let source = world.host_of(vm).unwrap();
    let target = other(source);
    let served_to = |world: &World| {
        let order = serving::order(&world.state, host_id(3), vm).unwrap();
        (order.incarnation, order.next_incarnation)
    };
    let arrives = |world: &World, grants: &Grants| {
        let wanted = *plan(world, grants, target).vms.get(&vm)?;
        let message = desired::message(&world.state, target, vm, wanted)?;
        serving::complete(&world.state, grants, target, vm, message)
    };
    let begin = Command::MigrateVm { vm, to: None, secret: "0".repeat(64), bytes_per_second: 0 };
    world.ok(begin.clone());
    assert_eq!(served_to(&world), (1, 2));
    assert_eq!(arrives(&world, &grants), None, "it could open nothing");
    assert_eq!(told(&world, &grants, vm).unwrap().disposition(), v1::Disposition::Run, "the source has what it needs");
    said(&world, &grants, host_id(3), vm, Incarnation(1), Some(Incarnation(2)));
    let message = arrives(&world, &grants).unwrap();
    assert_eq!((message.disposition(), message.incarnation), (v1::Disposition::Incoming, 2));
    assert_eq!(message.network_pools[0].address, "10.0.0.3:10809");

    // Called off: the next one has another number.
    world.ok(Command::CancelMigration { vm });
    assert_eq!(served_to(&world), (1, 0));
    assert_eq!(told(&world, &grants, vm).unwrap().migrate_to, None, "the source is told at once");
    world.ok(begin);
    assert_eq!(served_to(&world), (1, 3));
    assert_eq!(arrives(&world, &grants), None, "said of the migration of before");
    said(&world, &grants, host_id(3), vm, Incarnation(1), Some(Incarnation(3)));
    assert!(arrives(&world, &grants).is_some());

    // Handed over.
    let report = |state, incarnation, address: &str| VmObservation {
        incarnation: Incarnation(incarnation),
        migration: Some(seen(3, address)),
        ..world.observation(vm, state)
    };
    let reports = [
        (target, report(ObservedState::Incoming, 3, "127.0.0.1:4444")),
        (target, report(ObservedState::Received, 3, "127.0.0.1:4444")),
        (source, report(ObservedState::HandedOver, 1, "")),
    ];
    for (host, report) in reports {
        world.ok(Command::Report { host, reports: vec![report] });
    }
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(target), 3));
    assert_eq!(served_to(&world), (3, 0));
    assert_eq!(told(&world, &grants, vm), None, "the source may still have them");
    assert!(serving::waits(&world.state, &grants, target, world.record(vm)).unwrap().contains("host-3"));
    assert_eq!(told(&world, &Grants::default(), vm), None, "nor by a new leader");
    serve(&mut world, &grants, vm, 3);
    let message = told(&world, &grants, vm).unwrap();
    assert_eq!((message.disposition(), message.incarnation), (v1::Disposition::Run, 3));
}

/// Where VMs cannot migrate to, one with disks in a network pool may be stopped and started.
#[test]
fn a_drain_stops_and_moves_a_vm_with_disks_in_a_network_pool_or_says_why_it_stays() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = world.create(1, with_disk("net"));
    serve(&mut world, &grants, vm, 1);
    world.report(vm, ObservedState::Running);
    let host = world.host_of(vm).unwrap();
    assert_eq!(world.state.prospect(vm, &world.cx()), Prospect::CanMigrate);
    for n in [1, 2] {
        let mut facts = HostFacts { migration_address: String::new(), ..facts(n) };
        facts.pools.push(net(PoolAccess::Network));
        world.ok(Command::RegisterHost { host: Box::new(facts) });
    }
    let drain = |how| Command::DrainHost { host, how, disks: OwnDisks::Stay, reason: String::new() };
    let step = Command::DrainVm { vm, from: host, step: DrainStep::Stop };
    world.ok(drain(DrainHow::LiveOnly));
    let Prospect::CanStop(why) = world.state.prospect(vm, &world.cx()) else { panic!() };
    assert!(why.contains("migration address"), "{why}");
    assert!(world.refused(step.clone()).to_string().contains("may not be stopped"));

    world.ok(drain(DrainHow::StopAndMove));
    world.ok(step);
    assert!(matches!(world.state.prospect(vm, &world.cx()), Prospect::Moving(_)));
    // N4: also for a leader that no storage host has said anything to, a stop needs no access.
    let message = told(&world, &Grants::default(), vm).unwrap();
    assert_eq!((message.disposition(), message.incarnation), (v1::Disposition::Stop, 1));
    world.report(vm, ObservedState::Stopped);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
    assert_eq!(told(&world, &grants, vm), None, "N4: not before the next incarnation has access");
    serve(&mut world, &grants, vm, 2);
    assert_eq!(told(&world, &grants, vm).unwrap().disposition(), v1::Disposition::Run);

    // Nowhere to go.
    world.report(vm, ObservedState::Running);
    let host = other(host);
    world.ok(Command::DrainHost { host, how: DrainHow::StopAndMove, disks: OwnDisks::Stay, reason: String::new() });
    assert!(matches!(world.state.prospect(vm, &world.cx()), Prospect::Stuck(_)));
    assert!(
        world.refused(Command::DrainVm { vm, from: host, step: DrainStep::Stop }).to_string().contains("cannot leave")
    );
}

/// The storage host says that it has done this for an incarnation.
fn storage_has_done(world: &mut World, vm: VmId, incarnation: u64, disks: DisksObservation) {
    let said = ServedObservation { incarnation: Incarnation(incarnation), served: true, disks, trouble: String::new() };
    world.ok(Command::NoteServed { host: host_id(3), vm, said: Box::new(said) });
}

fn orders(numbers: &[u64]) -> DisksObservation {
    DisksObservation { orders: numbers.to_vec(), ..Default::default() }
}

fn snapshot_ready(world: &mut World, vm: VmId, id: Uuid, name: &str) {
    world.ok(Command::CreateSnapshot { vm, id, name: name.into() });
    let incarnation = world.incarnation(vm);
    storage_has_done(world, vm, incarnation, DisksObservation { made: vec![id], ..Default::default() });
}

/// A VM that runs with a disk in the pool.
fn running(world: &mut World, grants: &Grants, n: u128, spec: VmSpec) -> VmId {
    let vm = world.create(n, spec);
    serve(world, grants, vm, 1);
    world.report(vm, ObservedState::Running);
    vm
}

#[test]
fn the_storage_host_takes_and_removes_snapshots_and_the_host_of_the_vm_hears_nothing_of_it() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = running(&mut world, &grants, 1, with_disk("net"));
    let id = Uuid::from_u128(0x51);
    let create = Command::CreateSnapshot { vm, id, name: "s".into() };
    world.ok(create);
    assert_eq!(told(&world, &grants, vm).unwrap().snapshots, []);
    let order = serving::order(&world.state, host_id(3), vm).unwrap();
    assert_eq!(order.snapshots, [v1::SnapshotOrder { id: id.to_string(), remove: false }]);
    let made = || DisksObservation { made: vec![id], ..Default::default() };
    // Neither the VM's host nor another one has the disk, and what was said of another incarnation is late.
    let host = world.host_of(vm).unwrap();
    let report = VmObservation { disks: made(), ..world.observation(vm, ObservedState::Running) };
    world.ok(Command::Report { host, reports: vec![report] });
    storage_has_done(&mut world, vm, 7, made());
    let by_other = ServedObservation { incarnation: Incarnation(1), disks: made(), ..Default::default() };
    world.ok(Command::NoteServed { host, vm, said: Box::new(by_other) });
    assert_eq!(world.record(vm).snapshots[0].state, SnapshotState::Creating);
    storage_has_done(&mut world, vm, 1, made());
    let snapshot = world.record(vm).snapshots[0].clone();
    assert_eq!((snapshot.state, snapshot.guest), (SnapshotState::Ready, Some(SnapshotGuest::Running)));

    world.ok(Command::DeleteSnapshot { vm, name: "s".into() });
    assert!(serving::order(&world.state, host_id(3), vm).unwrap().snapshots[0].remove);
    storage_has_done(&mut world, vm, 1, DisksObservation { removed: vec![id], ..Default::default() });
    assert!(world.record(vm).snapshots.is_empty());
}

/// The guest holds its file systems still before the storage host is told, and until its own host has heard that the snapshot is taken. What is not
/// known to have stood all that time is worth no more than after a power cut.
#[test]
fn a_guest_with_an_agent_holds_still_before_its_storage_host_takes_a_snapshot() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = running(&mut world, &grants, 1, VmSpec { guest_agent: GuestAgent::Enabled, ..with_disk("net") });
    let says = |world: &mut World, state, disks| {
        let report = VmObservation { disks, ..world.observation(vm, state) };
        world.ok(Command::Report { host: world.host_of(vm).unwrap(), reports: vec![report] });
    };
    let ordered = |world: &World| serving::order(&world.state, host_id(3), vm).unwrap().snapshots.len();
    let worth = |world: &World, n: usize| world.record(vm).snapshots[n].guest;
    let (hold, later) = (Some(Uuid::from_u128(0xa1)), Some(Uuid::from_u128(0xa2)));
    // Which hold stands, and which has stood to the end, when its host has heard that it is taken.
    let ends = [
        (hold, None, hold, Some(SnapshotGuest::Frozen)),
        (hold, None, None, Some(SnapshotGuest::Running)),
        // Its agent was started again meanwhile.
        (hold, None, later, Some(SnapshotGuest::Running)),
        (hold, later, None, Some(SnapshotGuest::Running)),
        // The guest does not answer.
        (None, None, None, Some(SnapshotGuest::Running)),
        (None, None, later, Some(SnapshotGuest::Running)),
    ];
    for (n, (first, now, held, expected)) in ends.into_iter().enumerate() {
        let id = Uuid::from_u128(0x50 + n as u128);
        let made = || DisksObservation { made: vec![id], ..Default::default() };
        world.ok(Command::CreateSnapshot { vm, id, name: format!("s{n}") });
        assert_eq!(told(&world, &grants, vm).unwrap().snapshots.len(), 1, "{n}");
        assert_eq!(ordered(&world), 0, "{n}: it waits");
        storage_has_done(&mut world, vm, 1, made());
        assert_eq!(world.record(vm).snapshots[n].state, SnapshotState::Creating, "{n}: it was not told");
        says(
            &mut world,
            ObservedState::Running,
            DisksObservation { ready: vec![id], hold: first, ..Default::default() },
        );
        assert_eq!(ordered(&world), 1, "{n}");
        storage_has_done(&mut world, vm, 1, made());
        assert_eq!(world.record(vm).snapshots[n].state, SnapshotState::Ready, "{n}");
        assert_eq!(told(&world, &grants, vm).unwrap().snapshots, [], "{n}: it need not hold still any more");
        assert_eq!(worth(&world, n).is_none(), first.is_some(), "{n}");
        // What it said before it heard of that.
        says(&mut world, ObservedState::Running, DisksObservation { hold: first, ..Default::default() });
        assert_eq!(worth(&world, n).is_none(), first.is_some(), "{n}");
        says(&mut world, ObservedState::Running, DisksObservation { hold: now, held, ..Default::default() });
        assert_eq!(worth(&world, n), expected, "{n}");
    }
    // It stops before its host has heard that the snapshot is taken.
    let id = Uuid::from_u128(0x5f);
    world.ok(Command::CreateSnapshot { vm, id, name: "last".into() });
    says(&mut world, ObservedState::Running, DisksObservation { ready: vec![id], hold, ..Default::default() });
    storage_has_done(&mut world, vm, 1, DisksObservation { made: vec![id], ..Default::default() });
    says(&mut world, ObservedState::Stopping, DisksObservation { hold, ..Default::default() });
    assert_eq!(world.record(vm).snapshots.last().unwrap().guest, Some(SnapshotGuest::Running));
    world.report(vm, ObservedState::Running);

    // What stops, or does not run, does not hold still.
    world.ok(Command::CreateSnapshot { vm, id: Uuid::from_u128(0x60), name: "stops".into() });
    assert_eq!(ordered(&world), 0);
    world.set(vm, PowerChange::Stop);
    assert_eq!(told(&world, &grants, vm).unwrap().snapshots, []);
    says(&mut world, ObservedState::Stopped, DisksObservation::default());
    assert_eq!(ordered(&world), 1);
    world.ok(Command::CreateSnapshot { vm, id: Uuid::from_u128(0x61), name: "stopped".into() });
    assert_eq!(ordered(&world), 2);
}

/// R4
#[test]
fn disks_in_a_network_pool_are_put_back_only_when_nothing_executes_under_their_incarnation() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = running(&mut world, &grants, 1, with_disk("net"));
    snapshot_ready(&mut world, vm, Uuid::from_u128(0x51), "s");
    world.ok(Command::RevertToSnapshot { vm, name: "s".into() });
    let reverted = |number| DisksObservation { reverted: number, ..Default::default() };
    let order = |world: &World| serving::order(&world.state, host_id(3), vm).unwrap();
    // Also by a leader that knows of no grant: what executes is to be killed.
    let message = told(&world, &Grants::default(), vm).unwrap();
    assert_eq!((message.disposition(), message.stop_force, message.revert), (v1::Disposition::Stop, true, None));
    assert_eq!(order(&world).revert, None, "it may still execute");
    storage_has_done(&mut world, vm, 1, reverted(1));
    assert!(world.record(vm).revert.is_some(), "nobody was told to");
    world.report(vm, ObservedState::Stopping);
    assert_eq!(order(&world).revert, None);

    // Its host dies, and so does what it had said.
    world.report(vm, ObservedState::Stopped);
    assert_eq!(order(&world).revert.unwrap().number, 1);
    let host = world.host_of(vm).unwrap();
    world.lapse(host, Lapsed::Fast);
    assert_eq!(world.incarnation(vm), 2);
    assert_eq!(order(&world).revert, None, "nobody has said that of this incarnation");
    storage_has_done(&mut world, vm, 1, reverted(1));
    storage_has_done(&mut world, vm, 2, reverted(1));
    assert!(world.record(vm).revert.is_some());
    world.report(vm, ObservedState::Stopped);
    let told_to = order(&world);
    assert_eq!((told_to.revert.unwrap().number, told_to.incarnation), (1, 2));

    // R2
    storage_has_done(&mut world, vm, 2, reverted(1));
    assert_eq!((world.record(vm).revert, world.incarnation(vm)), (None, 3));
    assert_eq!(told(&world, &grants, vm), None, "N4");
    serve(&mut world, &grants, vm, 3);
    assert_eq!(told(&world, &grants, vm).unwrap().disposition(), v1::Disposition::Run);

    // One that stands still already.
    world.report(vm, ObservedState::Running);
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.ok(Command::RevertToSnapshot { vm, name: "s".into() });
    assert_eq!(order(&world).revert.unwrap().number, 2);
    storage_has_done(&mut world, vm, 3, reverted(2));
    assert_eq!((world.record(vm).revert, world.incarnation(vm)), (None, 3));
}

/// D5
#[test]
fn a_disk_in_a_network_pool_is_deleted_when_no_machine_has_it_and_not_before() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = running(&mut world, &grants, 1, VmSpec { disk_hotplug: DiskHotplug::Enabled, ..with_disk("net") });
    let state = |world: &World| world.record(vm).spec.disks.get(1).map(|d| d.state);
    let at = |order: Option<v1::DesiredVm>| {
        let disk = order.unwrap().spec.unwrap().disks[1].clone();
        (disk.state(), disk.order)
    };
    let machine = |world: &mut World, seen, numbers: &[u64]| {
        let host = world.host_of(vm).unwrap();
        let report = VmObservation { disks: orders(numbers), ..world.observation(vm, seen) };
        world.ok(Command::Report { host, reports: vec![report] });
    };
    let attach = Command::AttachDisk {
        vm,
        disk: Box::new(DiskToAttach {
            id: Uuid::from_u128(9),
            name: Some("data".into()),
            pool: Some("net".into()),
            size_bytes: 1 << 20,
            bus: None,
            cache: None,
        }),
    };
    world.ok(attach.clone());
    storage_has_done(&mut world, vm, 1, orders(&[1]));
    assert_eq!(state(&world), Some(DiskState::Attaching), "the machine does not have it yet");
    machine(&mut world, ObservedState::Running, &[1]);
    assert_eq!(state(&world), Some(DiskState::Attached));

    let delete = |how| Command::DetachDisk { vm, disk: "data".into(), how };
    world.ok(delete(DetachHow::Delete));
    assert_eq!(at(told(&world, &grants, vm)), (v1::DiskState::Detaching, 2));
    assert_eq!(at(serving::order(&world.state, host_id(3), vm)), (v1::DiskState::Detached, 0), "a machine may have it");
    storage_has_done(&mut world, vm, 1, orders(&[2]));
    assert_eq!(state(&world), Some(DiskState::Deleting));
    machine(&mut world, ObservedState::Running, &[2]);
    assert_eq!(state(&world), Some(DiskState::Deleting), "its file is still there");
    assert_eq!(at(told(&world, &grants, vm)), (v1::DiskState::Detached, 0));
    assert_eq!(at(serving::order(&world.state, host_id(3), vm)), (v1::DiskState::Deleting, 3));
    // D1: what was said of the first half is not the second.
    machine(&mut world, ObservedState::Running, &[2, 3]);
    storage_has_done(&mut world, vm, 1, orders(&[2]));
    assert_eq!(state(&world), Some(DiskState::Deleting));
    storage_has_done(&mut world, vm, 1, orders(&[3]));
    assert_eq!(state(&world), None);

    // While it is stopped: the storage host alone makes it.
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.ok(attach.clone());
    assert_eq!(at(told(&world, &grants, vm)), (v1::DiskState::Unspecified, 0));
    machine(&mut world, ObservedState::Stopped, &[4]);
    assert_eq!(state(&world), Some(DiskState::Attaching), "it is not made yet");
    storage_has_done(&mut world, vm, 1, orders(&[4]));
    assert_eq!(state(&world), Some(DiskState::Attached));
    world.ok(delete(DetachHow::Keep));
    machine(&mut world, ObservedState::Stopped, &[5]);
    assert_eq!(state(&world), Some(DiskState::Detached));
    // No machine has it: the storage host is told at once.
    world.ok(delete(DetachHow::Delete));
    assert_eq!(at(serving::order(&world.state, host_id(3), vm)), (v1::DiskState::Deleting, 6));
    storage_has_done(&mut world, vm, 1, orders(&[6]));
    assert_eq!(state(&world), None);

    // It is stopped between the two halves.
    world.set(vm, PowerChange::Start);
    serve(&mut world, &grants, vm, 2);
    world.report(vm, ObservedState::Running);
    world.ok(attach);
    storage_has_done(&mut world, vm, 2, orders(&[7]));
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    assert_eq!(state(&world), Some(DiskState::Attached));
}

/// P5: that a clone's disks are made is said by the storage host, and then its source may change.
#[test]
fn a_clone_in_a_network_pool_is_made_by_the_storage_host() {
    let (mut world, grants) = (world(), Grants::default());
    let vm = running(&mut world, &grants, 1, with_disk("net"));
    let id = Uuid::from_u128(0x51);
    snapshot_ready(&mut world, vm, id, "s");
    let clone = crate::state::command::NewClone { id: vm_id(2), name: "copy".into(), macs: Vec::new() };
    world.ok(Command::CloneVm { request: None, source: vm, snapshot: Some("s".into()), clone: Box::new(clone) });
    let copy = vm_id(2);
    world.ok(Command::Place { vms: vec![copy] });
    assert_ne!(world.host_of(copy), Some(host_id(3)));
    let order = serving::order(&world.state, host_id(3), copy).unwrap();
    assert_eq!(order.clone_from.unwrap().snapshot_id, id.to_string());
    let delete = Command::DeleteSnapshot { vm, name: "s".into() };
    assert!(world.refused(delete.clone()).to_string().contains("is being copied"));
    assert_eq!(told(&world, &grants, copy), None);
    serve(&mut world, &grants, copy, 1);
    assert_eq!(told(&world, &grants, copy).unwrap().clone_from, None);
    assert!(world.record(copy).clone_of.is_none());
    world.ok(delete);
}
