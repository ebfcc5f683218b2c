//! What happens to hosts.

use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::{EventType, HostMode, Liveness, vm::Failover},
    state::{
        MAX_PLACEMENTS,
        command::{Command, FailoverChange, HostFacts, Lapsed, ObservedState, Refusal},
    },
};

fn register(facts: HostFacts) -> Command {
    Command::RegisterHost { host: Box::new(facts) }
}

#[test]
fn a_host_joins_once_and_is_brought_up_to_date() {
    let mut world = World::with_hosts(1);
    assert_eq!(world.last_events(), [EventType::HostJoined]);
    world.ok(register(facts(1)));
    assert!(world.last.mutations.is_empty(), "nothing new writes nothing");
    let more = HostFacts { memory_mib: 8192, agent_version: "0.2.0".into(), ..facts(1) };
    world.ok(register(more));
    assert_eq!(world.message(EventType::HostChanged), "registered with changes: memory, version");
    assert_eq!(world.host(host_id(1)).memory_mib, 8192);
}

#[test]
fn a_host_name_belongs_to_one_host() {
    let mut world = World::with_hosts(1);
    let same = HostFacts { name: "host-1".into(), ..facts(2) };
    assert!(matches!(world.refused(register(same)), Refusal::HostNameTaken { other, .. } if other == host_id(1)));
}

#[test]
fn another_machine_with_the_same_id_is_refused_while_the_host_is_heard() {
    let mut world = World::with_hosts(1);
    let other = HostFacts { boot_id: Uuid::from_u128(99), ..facts(1) };
    assert_eq!(world.refused(register(other.clone())), Refusal::DuplicateHost(host_id(1), Uuid::from_u128(1)));
    // Silent: it may have been restarted.
    world.silent.insert(host_id(1));
    world.ok(register(other.clone()));
    assert_eq!(world.host(host_id(1)).boot_id, Uuid::from_u128(99));
    world.silent.clear();
    assert!(matches!(world.refused(register(facts(1))), Refusal::DuplicateHost(..)));
    // Declared dead: likewise.
    world.lapse(host_id(1), Lapsed::Both);
    world.ok(register(facts(1)));
    assert_eq!(world.message(EventType::HostReturned), "is back after a restart");
}

#[test]
fn a_host_is_cordoned_and_uncordoned() {
    let mut world = World::with_hosts(1);
    let set = |mode, reason: &str| Command::SetHostMode { host: host_id(1), mode, reason: reason.into() };
    world.ok(set(HostMode::Cordoned, "new memory"));
    assert_eq!(world.message(EventType::HostCordoned), "takes no new VMs: new memory");
    world.ok(set(HostMode::Cordoned, "new memory"));
    assert!(world.last.mutations.is_empty());
    let vm = world.create(1, spec());
    assert_eq!(world.reason(vm), "1 host: 1 is cordoned");
    // Registering again does not uncordon it.
    world.ok(register(facts(1)));
    assert_eq!(world.host(host_id(1)).mode, HostMode::Cordoned);
    world.ok(set(HostMode::Active, ""));
    assert_eq!(world.last_events(), [EventType::HostUncordoned]);
}

#[test]
fn pools_are_brought_up_to_date() {
    let mut world = World::with_hosts(1);
    let mut pools = facts(1).pools;
    pools[1].problem = "the marker is gone".into();
    let update = Command::UpdatePools { host: host_id(1), pools };
    world.ok(update.clone());
    assert!(world.message(EventType::HostChanged).contains("`shared`: the marker is gone"));
    world.ok(update);
    assert!(world.last.mutations.is_empty());
}

#[test]
fn only_a_host_that_is_down_and_empty_is_removed() {
    let mut world = World::with_hosts(1);
    let remove = Command::RemoveHost { host: host_id(1) };
    assert!(matches!(world.refused(remove.clone()), Refusal::Precondition(_)), "it is up");
    let vm = world.running(1, with_disk("local"));
    world.lapse(host_id(1), Lapsed::Both);
    let refusal = world.refused(remove.clone()).to_string();
    assert!(refusal.contains("1 VMs (vm-1)"), "{refusal}");
    // A deleted one waits for its host; removing the host gives its disks up.
    world.ok(Command::DeleteVm { vm });
    assert!(world.state.vm(vm).is_some());
    world.ok(remove);
    assert!(world.state.vm(vm).is_none() && world.state.host(host_id(1)).is_none());
    assert_eq!(world.last_events(), [EventType::HostRemoved, EventType::Deleted]);
}

#[test]
fn deleted_vms_that_do_not_fit_into_one_change_are_found_after_their_host_was_removed() {
    let mut world = World::with_hosts(0);
    world.ok(register(HostFacts { vcpus: 100, memory_mib: 1 << 20, ..facts(1) }));
    let vms: Vec<_> = (1..=60).map(|n| world.running(n, with_disk("local"))).collect();
    for &vm in &vms {
        world.ok(Command::DeleteVm { vm });
    }
    world.lapse(host_id(1), Lapsed::Both);
    world.ok(Command::RemoveHost { host: host_id(1) });
    let mut rounds = 0;
    while world.state.vms().count() > 0 {
        let left: Vec<_> = world.state.pending().collect();
        assert!(!left.is_empty());
        world.ok(Command::Place { vms: left });
        rounds += 1;
    }
    assert!(rounds > 0, "they do not fit into one change");
}

#[test]
fn a_lapse_is_declared_once_for_each_lease() {
    let mut world = World::with_hosts(1);
    world.lapse(host_id(1), Lapsed::Fast);
    assert_eq!(world.last_events(), [EventType::HostLapsed]);
    world.lapse(host_id(1), Lapsed::Fast);
    assert!(world.last.mutations.is_empty());
    world.lapse(host_id(1), Lapsed::Both);
    assert_eq!(world.last_events(), [EventType::HostDead]);
    world.lapse(host_id(1), Lapsed::Fast);
    assert_eq!((world.last.mutations.len(), world.host(host_id(1)).liveness), (0, Liveness::Dead));
    world.return_of(1);
    assert_eq!(world.message(EventType::HostReturned), "is back without having been restarted");
}

#[test]
fn a_lapse_moves_as_many_vms_as_it_is_told_and_the_next_pass_moves_the_rest() {
    let mut world = World::with_hosts(0);
    for n in 1..=2 {
        world.ok(register(HostFacts { vcpus: 100, memory_mib: 1 << 20, ..facts(n) }));
    }
    world.ok(Command::SetHostMode { host: host_id(2), mode: HostMode::Cordoned, reason: String::new() });
    let vms: Vec<_> = (1..=40).map(|n| world.running(n, with_disk("shared"))).collect();
    world.ok(Command::SetHostMode { host: host_id(2), mode: HostMode::Active, reason: String::new() });
    let on = |world: &World, n| world.state.vms_on(host_id(n)).count();
    world.ok(Command::DeclareLapsed { host: host_id(1), lapsed: Lapsed::Fast, limit: 10 });
    assert_eq!((on(&world, 1), on(&world, 2)), (30, 10));
    world.ok(Command::Place { vms: world.state.vms_on(host_id(1)).collect() });
    assert_eq!(
        (on(&world, 1), on(&world, 2)),
        (30 - MAX_PLACEMENTS, 10 + MAX_PLACEMENTS),
        "so many at once at the most"
    );
    world.ok(Command::Place { vms });
    assert_eq!(on(&world, 1), 30 - MAX_PLACEMENTS, "the first of the list are all moved");
    world.ok(Command::Place { vms: world.state.vms_on(host_id(1)).collect() });
    assert_eq!(on(&world, 2), 40);
}

#[test]
fn huge_vms_do_not_make_a_change_that_etcd_refuses() {
    let mut world = World::with_hosts(0);
    for n in 1..=2 {
        world.ok(register(HostFacts { vcpus: 100, memory_mib: 1 << 20, ..facts(n) }));
    }
    for n in 1..=25 {
        let mut vm = new_vm(n, spec());
        vm.labels = (0..64).map(|i| (format!("{i}"), "\u{1}".repeat(500))).collect();
        world.ok(Command::CreateVm { request: None, vm: Box::new(vm) });
    }
    for n in 1..=2 {
        while world.state.vms_on(host_id(n)).count() > 0 && world.host(host_id(other_n(n))).liveness == Liveness::Up {
            world.lapse(host_id(n), Lapsed::Fast);
            let bytes: usize =
                world.last.mutations.iter().filter_map(|m| Some(m.value.as_ref()?.to_json().len())).sum();
            assert!(bytes < 1_000_000, "{bytes} bytes");
        }
    }
}

fn other_n(n: u128) -> u128 {
    3 - n
}

#[test]
fn an_unknown_vm_is_noted_on_its_host() {
    let mut world = World::with_hosts(1);
    world.ok(Command::NoteUnknownVm { host: host_id(1), vm: vm_id(7) });
    assert!(world.message(EventType::UnknownVm).contains("there is no record of it"));
    let vm = world.create(7, spec());
    world.ok(Command::NoteUnknownVm { host: host_id(1), vm });
    assert!(world.last.mutations.is_empty());
}

#[test]
fn lengths_of_leases_are_stored_when_they_change() {
    let mut world = World::with_hosts(0);
    let set = |fast_lease_ms| Command::SetLeases { fast_lease_ms, patient_lease_ms: 60_000 };
    world.ok(set(6000));
    assert!(world.last_events().is_empty());
    world.ok(set(6000));
    assert!(world.last.mutations.is_empty());
    world.ok(set(3000));
    assert_eq!(world.last_events(), [EventType::SettingsChanged]);
    assert_eq!(world.state.cluster().unwrap().fast_lease_ms, 3000);
}

#[test]
fn while_failover_is_off_long_leases_are_on_record() {
    let mut world = World::with_hosts(0);
    let off = |seconds: u64| Command::SetFailover {
        change: FailoverChange::Off { for_ms: seconds * 1000, reason: "a new switch".into() },
    };
    assert!(matches!(world.refused(off(60)), Refusal::Unreadable(_)));
    world.ok(Command::SetLeases { fast_lease_ms: 6_000, patient_lease_ms: 60_000 });
    world.ok(off(600));
    assert!(world.message(EventType::FailoverOff).contains("a new switch"));
    let leases = |world: &World| {
        let record = world.state.cluster().unwrap();
        (record.fast_lease_ms, record.patient_lease_ms)
    };
    assert_eq!(leases(&world), (600_000, 600_000));
    // What was decided before it was switched off lowers nothing.
    world.ok(Command::SetLeases { fast_lease_ms: 6_000, patient_lease_ms: 60_000 });
    let (fast, patient) = leases(&world);
    assert!(fast > 599_000 && patient > 599_000, "{fast} {patient}");
    world.ok(Command::SetFailover { change: FailoverChange::On });
    assert!(world.message(EventType::FailoverOn).contains("waited out"));
    assert_eq!(leases(&world), (fast, patient), "they may still run");
    world.ok(Command::SetLeases { fast_lease_ms: 6_000, patient_lease_ms: 60_000 });
    assert_eq!(leases(&world), (6_000, 60_000));
}

#[test]
fn the_cluster_notes_what_people_should_know() {
    let mut world = World::with_hosts(0);
    world.ok(Command::Note { event: EventType::BrakeEngaged, message: "m".into() });
    assert_eq!(world.message(EventType::BrakeEngaged), "m");
}

#[test]
fn a_vm_on_hold_is_shown_as_unreachable_and_comes_back_with_its_host() {
    let mut world = World::with_hosts(2);
    let mut hold = spec();
    hold.failover = Failover::Hold;
    let vm = world.running(1, hold);
    let host = world.host_of(vm).unwrap();
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.phase(vm), crate::model::Phase::Unreachable);
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 1));
    world.report(vm, ObservedState::Running);
    assert_eq!(world.phase(vm), crate::model::Phase::Running);
}
