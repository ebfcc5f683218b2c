//! What becomes of VMs when a lease of their host has surely run out.

use super::fixtures::*;
use crate::{
    model::{
        Desired, EventType, HostMode, Phase,
        vm::{Failover, OnDiskLoss, VmSpec},
    },
    state::command::{Command, HostFacts, Lapsed, ObservedState, PowerChange, Refusal},
};

/// A running VM, and the host that it runs on.
fn running(world: &mut World, spec: VmSpec) -> (uncloud_proto::ids::VmId, uncloud_proto::ids::HostId) {
    let vm = world.running(1, spec);
    (vm, world.host_of(vm).unwrap())
}

fn with(failover: Failover, spec: VmSpec) -> VmSpec {
    VmSpec { failover, ..spec }
}

#[test]
fn a_vm_with_shared_disks_moves_in_one_write() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.lapse(host, Lapsed::Fast);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
    assert_eq!(world.last_events(), [EventType::HostLapsed, EventType::FailedOver]);
    let message = world.message(EventType::FailedOver);
    assert!(message.contains("host-1") && message.contains("host-2") && message.contains("fast lease"), "{message}");
    assert_eq!(world.phase(vm), Phase::Scheduled);
    assert!(world.record(vm).disks_exist && world.record(vm).disk_generation == 0);
}

#[test]
fn only_the_lapsed_classes_move() {
    for (failover, lapsed, moves) in [
        (Failover::Fast, Lapsed::Fast, true),
        (Failover::Fast, Lapsed::Both, true),
        (Failover::Patient, Lapsed::Fast, false),
        (Failover::Patient, Lapsed::Both, true),
        (Failover::Hold, Lapsed::Fast, false),
        (Failover::Hold, Lapsed::Both, false),
    ] {
        let mut world = World::with_hosts(2);
        let (vm, host) = running(&mut world, with(failover, with_disk("shared")));
        world.lapse(host, lapsed);
        world.ok(Command::Place { vms: vec![vm] });
        assert_eq!(world.host_of(vm) != Some(host), moves, "{failover:?} {lapsed:?}");
        assert_eq!(world.incarnation(vm), if moves { 2 } else { 1 });
    }
}

#[test]
fn nothing_moves_from_a_host_that_is_up_or_back() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.silent.insert(host);
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!(world.host_of(vm), Some(host), "silent is not lapsed");
    world.silent.clear();
    world.ok(Command::DeclareLapsed { host, lapsed: Lapsed::Fast, limit: 0 });
    assert_eq!(world.host_of(vm), Some(host));
    world.return_of(if host == host_id(1) { 1 } else { 2 });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 1));
}

#[test]
fn a_vm_that_fits_nowhere_else_is_pending_and_says_why() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Cordoned, reason: String::new() });
    world.lapse(host, Lapsed::Fast);
    assert_eq!((world.host_of(vm), world.phase(vm), world.incarnation(vm)), (None, Phase::Pending, 1));
    assert_eq!(world.reason(vm), "2 hosts: 1 is down, 1 is cordoned");
    assert_eq!(world.last_events(), [EventType::HostLapsed, EventType::Pending]);
    world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Active, reason: String::new() });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
}

#[test]
fn the_same_pool_name_does_not_make_it_the_same_pool() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    // Mounted by mistake: a pool of this name, with another marker.
    let mut pools = facts(1).pools;
    pools[1].shared_id = Some(uuid::Uuid::from_u128(666));
    world.ok(Command::UpdatePools { host: other(host), pools });
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.phase(vm)), (None, Phase::Pending));
    assert!(world.reason(vm).contains("another pool `shared`"), "{}", world.reason(vm));
}

#[test]
fn a_vm_with_local_disks_waits_for_its_host() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("local"));
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.phase(vm), world.incarnation(vm)), (Some(host), Phase::Unreachable, 1));
    assert!(world.reason(vm).contains("only copy of its disks"), "{}", world.reason(vm));
    assert_eq!(world.last_events(), [EventType::HostDead, EventType::Unreachable]);
    world.ok(Command::Place { vms: vec![vm] });
    assert!(world.last.mutations.is_empty());
    // It is back, was fenced, and runs there again.
    world.return_of(if host == host_id(1) { 1 } else { 2 });
    world.report(vm, ObservedState::Fenced);
    assert_eq!((world.host_of(vm), world.incarnation(vm), world.phase(vm)), (Some(host), 2, Phase::Scheduled));
}

#[test]
fn disks_that_nobody_has_said_to_be_made_keep_no_vm_waiting() {
    let mut world = World::with_hosts(2);
    let vm = world.create(1, with_disk("local"));
    let host = world.host_of(vm).unwrap();
    world.report(vm, ObservedState::Preparing);
    world.lapse(host, Lapsed::Fast);
    assert_eq!(world.host_of(vm), Some(other(host)));
    assert_eq!(world.record(vm).disk_generation, 1, "what the lost host may have begun is never used");
}

#[test]
fn new_disks_are_made_elsewhere_if_the_user_wants_that() {
    let mut world = World::with_hosts(2);
    let spec = VmSpec { on_disk_loss: OnDiskLoss::Recreate, ..with_disk("local") };
    let (vm, host) = running(&mut world, spec);
    world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Cordoned, reason: String::new() });
    world.lapse(host, Lapsed::Fast);
    // Its disks are not given up for nothing.
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Unreachable));
    assert!(world.record(vm).disks_exist && world.reason(vm).contains("1 is cordoned"), "{}", world.reason(vm));
    world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Active, reason: String::new() });
    world.ok(Command::Place { vms: vec![vm] });
    let record = world.record(vm);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
    assert_eq!((record.disks_exist, record.disk_generation, &record.disk_home), (false, 1, &None));
    assert!(world.message(EventType::FailedOver).contains("NEW disks"));
}

#[test]
fn disks_on_a_host_that_is_up_are_not_given_up() {
    let mut world = World::with_hosts(2);
    let spec = VmSpec { on_disk_loss: OnDiskLoss::Recreate, ..with_disk("local") };
    let (vm, host) = running(&mut world, spec);
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.ok(Command::SetHostMode { host, mode: HostMode::Cordoned, reason: String::new() });
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.record(vm).disk_generation), (None, 0));
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.record(vm).disk_generation), (None, 0));
    // When the host is lost, they are.
    world.lapse(host, Lapsed::Fast);
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.record(vm).disk_generation), (Some(other(host)), 1));
}

#[test]
fn a_stopped_vm_stays_on_its_dead_host_until_it_is_started() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Stopped));
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
}

#[test]
fn a_vm_whose_stop_was_not_confirmed_starts_elsewhere_only_after_the_lapse() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.set(vm, PowerChange::Stop);
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Unreachable));
    world.set(vm, PowerChange::Start);
    assert_eq!(world.host_of(vm), Some(other(host)));
    assert!(world.incarnation(vm) >= 2);
}

#[test]
fn a_stopped_vm_with_local_disks_on_a_dead_host_waits_when_it_is_started() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("local"));
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.lapse(host, Lapsed::Both);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.phase(vm)), (None, Phase::Pending));
    assert_eq!(world.reason(vm), "2 hosts: 1 is down, 1 does not have its disks");
    world.return_of(if host == host_id(1) { 1 } else { 2 });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 2));
}

#[test]
fn deletion_moves_to_a_host_that_has_the_pools() {
    for deleted_first in [true, false] {
        let mut world = World::with_hosts(2);
        let (vm, host) = running(&mut world, with_disk("shared"));
        if deleted_first {
            world.ok(Command::DeleteVm { vm });
            world.lapse(host, Lapsed::Fast);
        } else {
            world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Cordoned, reason: String::new() });
            world.lapse(host, Lapsed::Fast);
            assert_eq!(world.host_of(vm), None);
            world.ok(Command::SetHostMode { host: other(host), mode: HostMode::Active, reason: String::new() });
            world.ok(Command::DeleteVm { vm });
        }
        assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
        assert_eq!(world.phase(vm), Phase::Deleting);
        assert_eq!(world.state.host(other(host)).unwrap().promised.memory_mib, 0, "no guest runs there");
        world.report(vm, ObservedState::Failed);
        assert_eq!(world.state.host(other(host)).unwrap().promised.memory_mib, 0);
        world.report(vm, ObservedState::Deleted);
        assert!(world.state.vm(vm).is_none());
    }
}

#[test]
fn deletion_of_local_disks_waits_for_their_host() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("local"));
    world.lapse(host, Lapsed::Both);
    world.ok(Command::DeleteVm { vm });
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Deleting));
    assert!(world.reason(vm).contains("no other host can remove its disks"), "{}", world.reason(vm));
    world.ok(Command::Place { vms: vec![vm] });
    assert!(world.last.mutations.is_empty());
    world.return_of(if host == host_id(1) { 1 } else { 2 });
    world.report(vm, ObservedState::Deleted);
    assert!(world.state.vm(vm).is_none());
}

#[test]
fn deletion_of_disks_that_may_have_been_begun_waits_too() {
    let mut world = World::with_hosts(2);
    let vm = world.create(1, with_disk("local"));
    let host = world.host_of(vm).unwrap();
    world.ok(Command::DeleteVm { vm });
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.host_of(vm), Some(host));
}

#[test]
fn a_vm_without_disks_goes_with_its_dead_host() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, spec());
    world.ok(Command::DeleteVm { vm });
    assert!(world.state.vm(vm).is_some());
    world.lapse(host, Lapsed::Fast);
    assert!(world.state.vm(vm).is_none());
}

#[test]
fn a_deletion_that_no_host_can_carry_out_is_refused() {
    let mut world = World::with_hosts(1);
    let (vm, host) = running(&mut world, with_disk("shared"));
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.host_of(vm), None);
    world.ok(Command::RemoveHost { host });
    assert!(matches!(world.refused(Command::DeleteVm { vm }), Refusal::Precondition(_)));
    assert_eq!(world.record(vm).desired, Desired::Running);
    world.ok(Command::RegisterHost { host: Box::new(facts(2)) });
    world.ok(Command::DeleteVm { vm });
    assert_eq!(world.host_of(vm), Some(host_id(2)));
}

#[test]
fn a_host_whose_record_is_gone_is_not_known_to_be_lost() {
    let mut world = World::with_hosts(2);
    let (vm, host) = running(&mut world, with_disk("shared"));
    let gone = crate::state::command::Mutation { key: crate::model::Key::Host(host), value: None };
    world.commit(crate::state::command::Change { mutations: vec![gone] });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!(world.host_of(vm), Some(host));
    world.set(vm, PowerChange::Stop);
    world.set(vm, PowerChange::Start);
    assert_eq!(world.host_of(vm), Some(host));
}

#[test]
fn a_mass_failover_never_promises_more_than_there_is() {
    let mut world = World::with_hosts(0);
    for n in 1..=4 {
        world.ok(Command::RegisterHost { host: Box::new(HostFacts { memory_mib: 3072, ..facts(n) }) });
    }
    let vms: Vec<_> = (1..=11).map(|n| world.running(n, with_disk("shared"))).collect();
    world.lapse(host_id(1), Lapsed::Fast);
    for n in 2..=4 {
        assert!(world.state.host(host_id(n)).unwrap().promised.memory_mib <= 3072);
    }
    let placed = vms.iter().filter(|&&vm| world.host_of(vm).is_some()).count();
    assert_eq!(placed, 9);
    assert_eq!(world.state.pending().count(), 2);
}
