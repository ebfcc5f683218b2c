//! What hosts report of VMs.

use uncloud_proto::{clock::WallTime, ids::Incarnation};

use super::fixtures::*;
use crate::{
    model::{Desired, EventType, HostMode, Phase, vm::LastExit},
    state::{
        MAX_REPORTS,
        command::{Command, ObservedState, PowerChange, Refusal, VmObservation},
    },
};

#[test]
fn a_status_comes_from_reports_and_an_unchanged_one_writes_nothing() {
    let mut world = World::with_hosts(1);
    let vm = world.create(1, with_disk("shared"));
    for (said, phase) in [
        (ObservedState::Preparing, Phase::Preparing),
        (ObservedState::Starting, Phase::Starting),
        (ObservedState::Running, Phase::Running),
        (ObservedState::Stopping, Phase::Stopping),
        (ObservedState::Failed, Phase::Failed),
    ] {
        world.report(vm, said);
        assert_eq!(world.phase(vm), phase);
        let since = world.vm(vm).status.as_ref().unwrap().since;
        world.report(vm, said);
        assert!(world.last.mutations.is_empty(), "{said:?} again");
        assert_eq!(world.vm(vm).status.as_ref().unwrap().since, since);
    }
}

#[test]
fn reports_about_the_past_say_nothing() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, spec());
    let host = world.host_of(vm).unwrap();
    let say = |host, incarnation, state| {
        let observation = VmObservation { incarnation: Incarnation(incarnation), ..world.observation(vm, state) };
        Command::Report { host, reports: vec![observation] }
    };
    let all = [
        ObservedState::Stopped,
        ObservedState::Fenced,
        ObservedState::PoweredOff,
        ObservedState::Failed,
        ObservedState::Deleted,
        ObservedState::Forgotten,
    ];
    let commands: Vec<Command> = all
        .into_iter()
        .flat_map(|state| [say(host, 0, state), say(host, 2, state), say(other(host), 1, state)])
        .chain([say(host, 1, ObservedState::Deleted), say(host, 1, ObservedState::Forgotten)])
        .collect();
    for command in commands {
        let shown = format!("{command:?}");
        world.ok(command);
        assert!(world.last.mutations.is_empty(), "{shown}");
    }
    let unknown = VmObservation { vm: vm_id(99), ..world.observation(vm, ObservedState::Running) };
    world.ok(Command::Report { host, reports: vec![unknown] });
    assert!(world.last.mutations.is_empty());
}

#[test]
fn the_disks_exist_from_the_first_time_that_a_host_says_so() {
    let mut world = World::with_hosts(1);
    let vm = world.create(1, with_disk("shared"));
    world.report(vm, ObservedState::Preparing);
    assert!(!world.record(vm).disks_exist);
    world.report(vm, ObservedState::Starting);
    let home = world.record(vm).disk_home.clone().unwrap();
    assert!(world.record(vm).disks_exist);
    assert_eq!((home.host, home.pools), (host_id(1), [("shared".to_owned(), Some(SHARED))].into()));
    // What the host says of its pools later does not move the disks.
    world.ok(Command::UpdatePools { host: host_id(1), pools: vec![local("shared")] });
    world.report(vm, ObservedState::Running);
    assert_eq!(world.record(vm).disk_home.clone().unwrap().pools["shared"], Some(SHARED));
}

#[test]
fn a_fenced_vm_gets_a_new_incarnation_on_the_same_host() {
    let mut world = World::with_hosts(3);
    let vm = world.running(1, with_disk("shared"));
    let host = world.host_of(vm);
    world.report(vm, ObservedState::Fenced);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (host, 2));
    assert_eq!(world.last_events(), [EventType::Fenced, EventType::Placed]);
    // Another host, if that one takes none.
    let mode = HostMode::Cordoned;
    world.ok(Command::SetHostMode { host: host.unwrap(), mode, reason: String::new() });
    world.report(vm, ObservedState::Fenced);
    assert!(world.host_of(vm) != host && world.incarnation(vm) == 3);
}

#[test]
fn a_fenced_vm_that_fits_nowhere_is_pending() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, with_disk("local"));
    world.ok(Command::SetHostMode { host: host_id(1), mode: HostMode::Cordoned, reason: String::new() });
    world.report(vm, ObservedState::Fenced);
    assert_eq!((world.host_of(vm), world.phase(vm), world.incarnation(vm)), (None, Phase::Pending, 1));
    assert_eq!(world.last_events(), [EventType::Fenced, EventType::Pending]);
    world.ok(Command::SetHostMode { host: host_id(1), mode: HostMode::Active, reason: String::new() });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host_id(1)), 2));
}

#[test]
fn a_fenced_vm_that_should_not_run_is_stopped() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Fenced);
    assert_eq!(
        (world.phase(vm), world.incarnation(vm), world.last_events()),
        (Phase::Stopped, 1, vec![EventType::Stopped])
    );
}

#[test]
fn a_guest_that_switches_itself_off_stays_off() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.report(vm, ObservedState::PoweredOff);
    assert_eq!((world.record(vm).desired, world.phase(vm)), (Desired::Stopped, Phase::Stopped));
    assert_eq!(world.last_events(), [EventType::PoweredOff]);
    world.report(vm, ObservedState::PoweredOff);
    assert!(world.last.mutations.is_empty());
    world.set(vm, PowerChange::Start);
    assert_eq!((world.incarnation(vm), world.phase(vm)), (2, Phase::Scheduled));
}

#[test]
fn a_guest_that_switches_itself_off_while_a_restart_is_on_its_way_is_not_off_for_good() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, spec());
    let host = world.host_of(vm).unwrap();
    world.ok(Command::RestartVm { vm, force: false });
    let before = VmObservation { restarts_done: 0, ..world.observation(vm, ObservedState::PoweredOff) };
    world.ok(Command::Report { host, reports: vec![before] });
    assert_eq!(world.record(vm).desired, Desired::Running);
    // The agent may start it any moment, so it must not be given away, even if it was stopped meanwhile.
    world.ok(Command::SetHostMode { host, mode: HostMode::Cordoned, reason: String::new() });
    world.set(vm, PowerChange::Stop);
    let again = VmObservation { restarts_done: 0, ..world.observation(vm, ObservedState::PoweredOff) };
    world.ok(Command::Report { host, reports: vec![again] });
    world.set(vm, PowerChange::Start);
    assert_eq!(world.host_of(vm), Some(host));
}

#[test]
fn how_qemu_ended_is_kept_until_it_ends_otherwise() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    let exit = LastExit { code: -1, signal: 9, reason: "killed".into(), at: WallTime(5) };
    let mut failed = world.observation(vm, ObservedState::Failed);
    failed.last_exit = Some(exit.clone());
    failed.next_attempt = Some(WallTime(77));
    world.ok(Command::Report { host: host_id(1), reports: vec![failed] });
    assert_eq!(world.message(EventType::Failed), "on host `host-1`: Failed");
    let status = world.vm(vm).status.clone().unwrap();
    assert_eq!((status.last_exit.as_ref(), status.next_attempt), (Some(&exit), Some(WallTime(77))));
    world.report(vm, ObservedState::Running);
    let status = world.vm(vm).status.clone().unwrap();
    assert_eq!((status.last_exit.as_ref(), status.next_attempt), (Some(&exit), None));
    world.report(vm, ObservedState::Fenced);
    assert_eq!(world.vm(vm).status.clone().unwrap().last_exit, Some(exit));
}

#[test]
fn a_status_about_an_older_incarnation_is_not_shown() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.set(vm, PowerChange::Stop);
    world.set(vm, PowerChange::Start);
    assert_eq!(world.phase(vm), Phase::Scheduled);
}

#[test]
fn too_many_reports_at_once_are_refused() {
    let mut world = World::with_hosts(1);
    let vm = world.create(1, spec());
    let reports = vec![world.observation(vm, ObservedState::Running); MAX_REPORTS + 1];
    assert!(matches!(world.refused(Command::Report { host: host_id(1), reports }), Refusal::Precondition(_)));
}

#[test]
fn as_many_ends_as_are_taken_at_once_fit_into_a_transaction() {
    let mut world = World::with_hosts(0);
    let large = crate::state::command::HostFacts { vcpus: 100, memory_mib: 1 << 20, ..facts(1) };
    world.ok(Command::RegisterHost { host: Box::new(large) });
    let vms: Vec<_> = (0..MAX_REPORTS as u128)
        .map(|n| {
            let mut spec = spec();
            spec.nics = (0..8).map(|i| nic(&format!("42:00:00:00:{n:02}:{i:02}"))).collect();
            let vm = world.running(n, spec);
            world.ok(Command::DeleteVm { vm });
            vm
        })
        .collect();
    let reports = vms.iter().map(|&vm| world.observation(vm, ObservedState::Deleted)).collect();
    world.ok(Command::Report { host: host_id(1), reports });
    assert_eq!(world.state.vms().count(), 0);
}
