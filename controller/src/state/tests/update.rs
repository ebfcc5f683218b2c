//! Changes of what a VM is made of: at once, or from its next incarnation on.

use uncloud_proto::ids::{Revision, VmId};

use super::fixtures::*;
use crate::{
    model::{
        EventType, HostMode, Phase,
        vm::{Display, Failover, OnDiskLoss, RestartPolicy},
    },
    scheduler::Resources,
    state::command::{Command, Lapsed, ObservedState, PowerChange, Refusal, VmUpdate},
};

fn update(vm: VmId, update: VmUpdate) -> Command {
    Command::UpdateVm { vm, update: Box::new(update) }
}

fn class(failover: Failover) -> VmUpdate {
    VmUpdate { failover: Some(failover), ..VmUpdate::default() }
}

fn memory(memory_mib: u64) -> VmUpdate {
    VmUpdate { memory_mib: Some(memory_mib), ..VmUpdate::default() }
}

fn stop_and_start(world: &mut World, vm: VmId) {
    world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
    world.report(vm, ObservedState::Stopped);
    world.ok(Command::SetDesired { vm, desired: PowerChange::Start });
}

#[test]
fn what_no_qemu_knows_changes_at_once_and_the_rest_with_the_next_start() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    let change = VmUpdate {
        labels: Some([("a".to_owned(), "b".to_owned())].into()),
        restart: Some(RestartPolicy::Never),
        on_disk_loss: Some(OnDiskLoss::Recreate),
        priority: Some(7),
        stop_grace_seconds: Some(5),
        vcpus: Some(2),
        memory_mib: Some(2048),
        failover: Some(Failover::Patient),
        display: Some(Display::Standard),
        ..VmUpdate::default()
    };
    world.ok(update(vm, change.clone()));
    let record = world.record(vm).clone();
    assert_eq!((record.labels.len(), record.spec.priority, record.spec.stop_grace_seconds), (1, 7, 5));
    assert_eq!((record.spec.restart, record.spec.on_disk_loss), (RestartPolicy::Never, OnDiskLoss::Recreate));
    assert_eq!((record.spec.vcpus, record.spec.memory_mib, record.spec.failover), (1, 1024, Failover::Fast));
    let pending = record.pending.as_ref().unwrap().fields();
    assert_eq!(pending, ["spec.vcpus", "spec.memory_mib", "spec.failover", "spec.display"]);
    assert_eq!((world.incarnation(vm), world.phase(vm)), (1, Phase::Running), "nothing stops");
    assert_eq!(world.last_events(), [EventType::Updated]);
    // Again: nothing.
    world.ok(update(vm, change));
    assert!(world.last.mutations.is_empty());

    stop_and_start(&mut world, vm);
    let record = world.record(vm);
    assert_eq!((record.pending.clone(), record.placement.incarnation.0), (None, 2));
    assert_eq!((record.spec.vcpus, record.spec.memory_mib, record.spec.failover), (2, 2048, Failover::Patient));
    assert_eq!(record.spec.display, Display::Standard);
}

#[test]
fn what_is_taken_back_does_not_wait_any_more() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.ok(update(vm, memory(2048)));
    world.ok(update(vm, memory(1024)));
    assert_eq!(world.record(vm).pending, None);
}

#[test]
fn without_a_host_everything_changes_at_once() {
    let mut world = World::with_hosts(0);
    let vm = world.create(1, spec());
    world.ok(update(vm, VmUpdate { memory_mib: Some(2048), ..class(Failover::Hold) }));
    let record = world.record(vm);
    assert_eq!((record.spec.memory_mib, record.spec.failover, &record.pending), (2048, Failover::Hold, &None));
}

#[test]
fn w4_the_leader_judges_by_the_class_that_the_running_incarnation_was_given() {
    // (the class that it runs under, the one that it is to have, the lapse, whether it may be moved)
    for (runs_under, next, lapsed, moves) in [
        (Failover::Hold, Failover::Fast, Lapsed::Both, false),
        (Failover::Patient, Failover::Fast, Lapsed::Fast, false),
        (Failover::Patient, Failover::Fast, Lapsed::Both, true),
        (Failover::Fast, Failover::Hold, Lapsed::Fast, true),
        (Failover::Fast, Failover::Patient, Lapsed::Fast, true),
    ] {
        let mut world = World::with_hosts(2);
        let vm = world.running(1, crate::model::vm::VmSpec { failover: runs_under, ..with_disk("shared") });
        let host = world.host_of(vm).unwrap();
        world.ok(update(vm, class(next)));
        world.lapse(host, lapsed);
        world.ok(Command::Place { vms: vec![vm] });
        let case = format!("{runs_under:?} to {next:?}, {lapsed:?}");
        assert_eq!(world.host_of(vm) != Some(host), moves, "{case}");
        let class = if moves { next } else { runs_under };
        assert_eq!(world.record(vm).spec.failover, class, "{case}: the class comes with the incarnation");
    }
}

#[test]
fn w4_a_start_before_it_has_stopped_keeps_the_class() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, crate::model::vm::VmSpec { failover: Failover::Hold, ..with_disk("shared") });
    let host = world.host_of(vm).unwrap();
    world.ok(update(vm, class(Failover::Fast)));
    // Its first incarnation may go on for the whole grace period.
    world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
    world.ok(Command::SetDesired { vm, desired: PowerChange::Start });
    assert_eq!((world.incarnation(vm), world.record(vm).spec.failover), (2, Failover::Hold));
    world.lapse(host, Lapsed::Both);
    assert_eq!(world.host_of(vm), Some(host));
    assert!(world.record(vm).pending.is_some());
}

#[test]
fn w4_a_new_try_of_what_failed_keeps_the_class() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    world.ok(update(vm, class(Failover::Hold)));
    world.report(vm, ObservedState::Failed);
    // The agent may be starting it again by itself at this moment.
    world.ok(Command::SetDesired { vm, desired: PowerChange::Start });
    assert_eq!((world.incarnation(vm), world.record(vm).spec.failover), (2, Failover::Fast));
    world.report(vm, ObservedState::Fenced);
    assert_eq!((world.incarnation(vm), world.record(vm).spec.failover), (3, Failover::Hold));
}

#[test]
fn room_is_promised_for_what_it_has_and_for_what_it_will_have() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    let promised = |world: &World| world.state.host(host_id(1)).unwrap().promised;
    world.ok(update(vm, memory(2048)));
    assert_eq!(promised(&world), Resources { vcpus: 1, memory_mib: 2048 });
    world.ok(update(vm, memory(512)));
    assert_eq!(promised(&world).memory_mib, 1024, "what it has is not given away while it runs");
    stop_and_start(&mut world, vm);
    assert_eq!(promised(&world).memory_mib, 512);
}

#[test]
fn what_does_not_fit_is_refused_and_says_where_and_what_to_do() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.create(2, spec());
    let refused = world.refused(update(vm, memory(3073)));
    let message = refused.to_string();
    assert!(matches!(refused, Refusal::Precondition(_)), "{refused:?}");
    assert!(message.contains("host-1") && message.contains("lacks 3073 MiB") && message.contains("stop"), "{message}");
    assert_eq!(world.record(vm).pending, None);
    // Whether the host takes new VMs says nothing about those that it has.
    world.ok(Command::SetHostMode { host: host_id(1), mode: HostMode::Cordoned, reason: String::new() });
    world.ok(update(vm, memory(3072)));
    // A stopped VM takes up no room: it is placed when it is started.
    world.ok(Command::SetDesired { vm, desired: PowerChange::Stop });
    world.report(vm, ObservedState::Stopped);
    world.ok(update(vm, memory(100_000)));
}

#[test]
fn an_update_of_what_has_changed_since_is_refused_unless_it_changes_nothing() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    let read = world.vm(vm).revision();
    let with_revision = |read: Revision, change: VmUpdate| update(vm, VmUpdate { read: Some(read), ..change });
    world.report(vm, ObservedState::Failed);
    world.ok(with_revision(read, memory(2048))); // what a host has reported is no change of the VM
    let refused = world.refused(with_revision(read, memory(512)));
    assert!(matches!(refused, Refusal::Outdated(_)), "{refused:?}");
    world.ok(with_revision(read, memory(2048))); // the answer was lost, and the call came again
    world.ok(with_revision(world.vm(vm).revision(), memory(512)));

    // Two in one batch: the second is decided on a state that has the first and no revision yet.
    let read = world.vm(vm).revision();
    let mut state = world.state.clone();
    let first = state.decide(&with_revision(read, memory(256)), &world.cx()).unwrap();
    state.absorb(&first.change, state.revision());
    let second = state.decide(&with_revision(read, memory(128)), &world.cx()).unwrap_err();
    assert!(matches!(second, Refusal::Outdated(_)), "{second:?}");
    state.absorb(&first.change, Revision(state.revision().0 + 1));
    let read = state.vm(vm).unwrap().revision();
    state.decide(&with_revision(read, memory(128)), &world.cx()).unwrap();
}

#[test]
fn a_deleted_vm_is_not_changed() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, with_disk("shared"));
    world.ok(Command::DeleteVm { vm });
    assert!(matches!(world.refused(update(vm, memory(512))), Refusal::Precondition(_)));
}
