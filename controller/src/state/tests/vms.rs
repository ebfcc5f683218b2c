//! What users ask of VMs.

use super::fixtures::*;
use crate::{
    model::{Desired, EventType, Key, Phase, image::ImageKind, vm::KernelBoot},
    state::command::{Answer, Command, ImageUse, NewVm, ObservedState, PowerChange, Refusal, RequestId, VmObservation},
};

fn create(vm: NewVm) -> Command {
    Command::CreateVm { request: None, vm: Box::new(vm) }
}

#[test]
fn a_vm_is_created_and_given_a_host_in_one_write() {
    let mut world = World::with_hosts(2);
    let mut spec = spec();
    spec.nics = vec![nic("42:00:00:00:00:01")];
    let Answer::Vm(answered) = world.ok(create(new_vm(1, spec))) else { panic!("no VM is answered") };
    assert_eq!(*answered, *world.record(vm_id(1)));
    assert_eq!(world.last_events(), [EventType::Created, EventType::Placed]);
    assert!(world.host_of(vm_id(1)).is_some());
    assert_eq!(world.incarnation(vm_id(1)), 1);
    assert_eq!(world.phase(vm_id(1)), Phase::Scheduled);
    assert!(!world.reason(vm_id(1)).is_empty());
    assert!(world.stored.contains_key(&Key::Mac("42:00:00:00:00:01".into())));
    assert!(world.stored.contains_key(&Key::VmName { owner: "default".into(), name: "vm-1".into() }));
}

#[test]
fn a_vm_that_fits_nowhere_is_pending_with_the_reason_and_starts_when_there_is_room() {
    let mut world = World::with_hosts(0);
    let vm = world.create(1, spec());
    assert_eq!((world.phase(vm), world.reason(vm)), (Phase::Pending, "no hosts have joined yet".into()));
    assert_eq!(world.incarnation(vm), 0);
    assert_eq!(world.state.pending().collect::<Vec<_>>(), [vm]);

    world.ok(Command::Place { vms: vec![vm] });
    assert!(world.last.mutations.is_empty(), "an unchanged reason writes nothing");

    let mut small = facts(1);
    small.memory_mib = 512;
    world.ok(Command::RegisterHost { host: Box::new(small) });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!(world.reason(vm), "1 host: 1 lacks 1024 MiB of memory");
    assert!(world.last_events().is_empty());

    world.ok(Command::RegisterHost { host: Box::new(facts(2)) });
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host_id(2)), 1));
    assert_eq!(world.last_events(), [EventType::Placed]);
    assert_eq!(world.state.pending().count(), 0);
}

#[test]
fn capacity_that_is_promised_counts_at_once() {
    let mut world = World::with_hosts(1);
    for n in 1..=4 {
        assert!(world.create(n, spec()) == vm_id(n) && world.host_of(vm_id(n)).is_some());
    }
    assert_eq!(world.host_of(world.record(vm_id(4)).id), Some(host_id(1)));
    let fifth = world.create(5, spec());
    assert_eq!(world.phase(fifth), Phase::Pending);
}

#[test]
fn one_batch_of_placements_sees_what_it_has_promised_itself() {
    let mut world = World::with_hosts(0);
    let vms: Vec<_> = (1..=6).map(|n| world.create(n, spec())).collect();
    world.ok(Command::RegisterHost { host: Box::new(facts(1)) });
    world.ok(Command::Place { vms: vms.clone() });
    assert_eq!(vms.iter().filter(|&&vm| world.host_of(vm).is_some()).count(), 4, "4 GiB take four of 1 GiB");
}

#[test]
fn names_and_macs_are_unique_and_free_again_after_deletion() {
    let mut world = World::with_hosts(1);
    let with_nic = |n: u128, mac: &str| {
        let mut vm = new_vm(n, spec());
        vm.spec.nics = vec![nic(mac)];
        vm
    };
    world.ok(create(with_nic(1, "42:00:00:00:00:01")));
    let same_name = NewVm { id: vm_id(2), ..new_vm(1, spec()) };
    assert!(matches!(world.refused(create(same_name.clone())), Refusal::VmNameTaken { .. }));
    world.ok(create(NewVm { owner: "somebody".into(), ..same_name }));
    assert_eq!(world.refused(create(with_nic(3, "42:00:00:00:00:01"))), Refusal::MacTaken("42:00:00:00:00:01".into()));
    let mut twice = with_nic(3, "42:00:00:00:00:02");
    twice.spec.nics.push(nic("42:00:00:00:00:02"));
    assert!(matches!(world.refused(create(twice)), Refusal::MacTaken(_)));

    world.ok(Command::DeleteVm { vm: vm_id(1) });
    assert!(matches!(world.refused(create(NewVm { id: vm_id(4), ..new_vm(1, spec()) })), Refusal::VmNameTaken { .. }));
    world.report(vm_id(1), ObservedState::Deleted);
    assert!(world.state.vm(vm_id(1)).is_none());
    assert_eq!(world.last_events(), [EventType::Deleted]);
    let again = NewVm { name: "vm-1".into(), ..with_nic(5, "42:00:00:00:00:01") };
    world.ok(create(again));
}

#[test]
fn the_same_request_gets_the_same_answer_for_an_hour_and_longer_under_other_clocks() {
    let mut world = World::with_hosts(1);
    let id = RequestId { id: "r1".into(), fingerprint: "f".into() };
    let first = Command::CreateVm { request: Some(id.clone()), vm: Box::new(new_vm(1, spec())) };
    let answer = world.ok(first);
    let stored_at = world.state.revision();
    world.set(vm_id(1), PowerChange::Stop);

    // The second try was given another id at the edge.
    let second = Command::CreateVm { request: Some(id.clone()), vm: Box::new(new_vm(2, spec())) };
    let decision = world.state.decide(&second, &world.cx()).unwrap();
    assert_eq!((decision.answer, decision.replayed), (answer, Some(stored_at)));
    assert!(decision.change.mutations.is_empty());

    let other = RequestId { fingerprint: "g".into(), ..id.clone() };
    let other = Command::CreateVm { request: Some(other), vm: Box::new(new_vm(3, spec())) };
    assert_eq!(world.refused(other), Refusal::RequestIdReused("r1".into()));

    // A leader whose clock is most of an hour ahead stores another answer. etcd, which has the last word, has both.
    world.now += 3_599_000;
    let later = RequestId { id: "r2".into(), fingerprint: "f".into() };
    world.ok(Command::CreateVm { request: Some(later), vm: Box::new(new_vm(4, spec())) });
    world.now += 3_600_000;
    assert_eq!(world.state.decide(&second, &world.cx()).unwrap().replayed, Some(stored_at));

    world.now += 1_000;
    world.ok(second);
    assert!(world.state.vm(vm_id(2)).is_some());
}

#[test]
fn answers_are_forgotten_in_memory() {
    let mut world = World::with_hosts(0);
    for n in 0..4 {
        world.now += 6_000_000;
        let request = Some(RequestId { id: format!("r{n}"), fingerprint: "f".into() });
        // Expiry in etcd goes by leases; the test's records are taken out when the state has forgotten them.
        let decision =
            world.state.decide(&Command::CreateVm { request, vm: Box::new(new_vm(n, spec())) }, &world.cx()).unwrap();
        let forgotten = (n >= 2).then(|| format!("r{}", n - 2));
        world.stored.retain(|key, _| !matches!(key, Key::Request(id) if Some(id) == forgotten.as_ref()));
        world.commit(decision.change);
    }
    assert_eq!(world.state.requests.keys().collect::<Vec<_>>(), ["r2", "r3"]);
}

#[test]
fn images_are_resolved_by_name_and_fill_in_what_the_spec_leaves_open() {
    let mut world = World::with_hosts(1);
    world.ok(Command::CreateImage { request: None, image: Box::new(image(1, ImageKind::Kernel)) });
    world.ok(Command::CreateImage { request: None, image: Box::new(image(2, ImageKind::Disk)) });
    let mut vm = new_vm(1, with_disk("local"));
    vm.spec.disks[0].size_bytes = 0;
    vm.spec.kernel = Some(KernelBoot { image: image_id(0), command_line: String::new() });
    vm.image_names = vec![(ImageUse::Kernel, "image-1".into()), (ImageUse::Disk(0), image_id(2).to_string())];
    world.ok(create(vm.clone()));
    let spec = &world.record(vm_id(1)).spec;
    let kernel = spec.kernel.as_ref().unwrap();
    assert_eq!((kernel.image, kernel.command_line.as_str()), (image_id(1), "console=ttyS0"));
    assert_eq!((spec.disks[0].image, spec.disks[0].size_bytes), (Some(image_id(2)), 2 << 30));

    let with = |names: &[(ImageUse, &str)], size: u64| {
        let mut vm = NewVm { id: vm_id(2), name: "other".into(), ..vm.clone() };
        vm.spec.disks[0].size_bytes = size;
        vm.image_names = names.iter().map(|(place, name)| (*place, (*name).to_owned())).collect();
        create(vm)
    };
    let kernel = (ImageUse::Kernel, "image-1");
    assert_eq!(
        world.refused(with(&[kernel, (ImageUse::Disk(0), "nope")], 0)),
        Refusal::NoImage { field: "spec.disks[0].image".into(), name: "nope".into() }
    );
    let wrong = world.refused(with(&[kernel, (ImageUse::Disk(0), "image-1")], 0));
    assert!(wrong.to_string().starts_with("spec.disks[0].image names image `image-1`, which is a kernel"), "{wrong}");
    let small = world.refused(with(&[kernel, (ImageUse::Disk(0), "image-2")], 512));
    assert!(small.to_string().starts_with("spec.disks[0].size_bytes is smaller"), "{small}");
    let empty = world.refused(with(&[kernel], 0));
    assert!(empty.to_string().starts_with("spec.disks[0].size_bytes is required"), "{empty}");
}

#[test]
fn each_start_of_a_stopped_vm_is_a_new_incarnation() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, with_disk("local"));
    for round in 1..=3 {
        assert_eq!(world.incarnation(vm), round);
        world.set(vm, PowerChange::Stop);
        assert_eq!(world.incarnation(vm), round);
        world.report(vm, ObservedState::Stopped);
        assert_eq!(world.phase(vm), Phase::Stopped);
        world.set(vm, PowerChange::Start);
        assert_eq!((world.phase(vm), world.host_of(vm)), (Phase::Scheduled, Some(host_id(1))));
    }
}

#[test]
fn a_vm_that_was_created_stopped_gets_its_host_when_it_is_started() {
    let mut world = World::with_hosts(1);
    world.ok(create(NewVm { desired: Desired::Stopped, ..new_vm(1, spec()) }));
    let vm = vm_id(1);
    assert_eq!((world.phase(vm), world.host_of(vm)), (Phase::Stopped, None));
    assert_eq!(world.state.pending().count(), 0);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.phase(vm), world.incarnation(vm)), (Phase::Scheduled, 1));
}

#[test]
fn a_vm_that_has_not_said_that_it_stopped_is_started_where_it_is() {
    for said in [ObservedState::Running, ObservedState::Stopping, ObservedState::Failed, ObservedState::Preparing] {
        let mut world = World::with_hosts(2);
        let vm = world.create(1, spec());
        world.report(vm, said);
        let host = world.host_of(vm).unwrap();
        // A cordoned host would not be chosen.
        let mode = crate::model::HostMode::Cordoned;
        world.ok(Command::SetHostMode { host, mode, reason: String::new() });
        world.set(vm, PowerChange::Stop);
        world.set(vm, PowerChange::Start);
        assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 2), "{said:?}");
    }
    // One that has said so goes elsewhere.
    let mut world = World::with_hosts(2);
    let vm = world.running(1, spec());
    let host = world.host_of(vm).unwrap();
    let mode = crate::model::HostMode::Cordoned;
    world.ok(Command::SetHostMode { host, mode, reason: String::new() });
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(other(host)), 2));
}

#[test]
fn a_stopped_vm_gives_its_room_away_and_waits_for_room_when_it_is_started() {
    let mut world = World::with_hosts(1);
    let mut large = with_disk("local");
    large.memory_mib = 4096;
    let first = world.running(1, large.clone());
    world.set(first, PowerChange::Stop);
    let second = world.create(2, large);
    assert_eq!(world.phase(second), Phase::Pending, "it still executes");
    world.report(first, ObservedState::Stopped);
    world.ok(Command::Place { vms: vec![second] });
    assert_eq!(world.phase(second), Phase::Scheduled);
    world.set(first, PowerChange::Start);
    assert_eq!((world.phase(first), world.host_of(first)), (Phase::Pending, None));
    world.ok(Command::DeleteVm { vm: second });
    world.report(second, ObservedState::Deleted);
    world.ok(Command::Place { vms: vec![first] });
    assert_eq!((world.host_of(first), world.incarnation(first)), (Some(host_id(1)), 2));
    assert!(world.record(first).disks_exist);
}

#[test]
fn starting_a_failed_vm_tries_it_again_now() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, spec());
    let host = world.host_of(vm);
    world.set(vm, PowerChange::Start);
    assert!(world.last.mutations.is_empty(), "it runs");
    world.report(vm, ObservedState::Failed);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.incarnation(vm), world.phase(vm)), (host, 2, Phase::Scheduled));
}

#[test]
fn stopping_is_said_once_and_can_be_forced_later() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.set(vm, PowerChange::Stop);
    assert_eq!(world.last_events(), [EventType::StopRequested]);
    world.set(vm, PowerChange::Stop);
    assert!(world.last.mutations.is_empty());
    world.set(vm, PowerChange::ForceStop);
    assert!(world.record(vm).stop_force);
    world.set(vm, PowerChange::Stop);
    assert!(world.last.mutations.is_empty(), "a forced stop is not taken back");
}

#[test]
fn stopping_a_pending_vm_ends_its_wait() {
    let mut world = World::with_hosts(0);
    let vm = world.create(1, spec());
    world.set(vm, PowerChange::Stop);
    assert_eq!((world.phase(vm), world.state.pending().count()), (Phase::Stopped, 0));
}

#[test]
fn restarts_are_counted_for_vms_that_should_run_on_a_host() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.ok(Command::RestartVm { vm, force: true });
    assert_eq!((world.record(vm).restarts, world.record(vm).restart_force, world.incarnation(vm)), (1, true, 1));
    world.set(vm, PowerChange::Stop);
    assert!(matches!(world.refused(Command::RestartVm { vm, force: false }), Refusal::Precondition(_)));
    let mut large = spec();
    large.memory_mib = 1 << 20;
    let pending = world.create(2, large);
    assert!(matches!(world.refused(Command::RestartVm { vm: pending, force: false }), Refusal::Precondition(_)));
}

#[test]
fn deleting_wins() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    world.ok(Command::DeleteVm { vm });
    assert_eq!((world.phase(vm), world.last_events()), (Phase::Deleting, vec![EventType::DeleteRequested]));
    for desired in [PowerChange::Start, PowerChange::Stop, PowerChange::ForceStop] {
        assert!(matches!(world.refused(Command::SetDesired { vm, desired }), Refusal::Precondition(_)));
    }
    assert!(matches!(world.refused(Command::RestartVm { vm, force: false }), Refusal::Precondition(_)));
    world.ok(Command::DeleteVm { vm });
    assert!(world.last.mutations.is_empty());
    world.report(vm, ObservedState::Running);
    assert_eq!(world.phase(vm), Phase::Deleting);
}

#[test]
fn a_vm_that_never_had_a_host_goes_at_once() {
    let mut world = World::with_hosts(0);
    let mut spec = with_disk("local");
    spec.nics = vec![nic("42:00:00:00:00:01")];
    let vm = world.create(1, spec);
    let Answer::Vm(answered) = world.ok(Command::DeleteVm { vm }) else { panic!("no VM is answered") };
    assert_eq!(answered.desired, Desired::Deleted);
    assert!(world.state.vm(vm).is_none());
    assert!(world.stored.keys().all(|key| matches!(key, Key::Event { .. })), "{:?}", world.stored.keys());
    assert_eq!(world.last_events(), [EventType::DeleteRequested, EventType::Deleted]);
}

#[test]
fn things_that_are_not_there_are_refused_by_name() {
    let mut world = World::with_hosts(0);
    let vm = vm_id(9);
    assert_eq!(world.refused(Command::DeleteVm { vm }), Refusal::NoVm(vm.to_string()));
    assert_eq!(world.refused(Command::RemoveHost { host: host_id(9) }), Refusal::NoHost(host_id(9).to_string()));
    assert!(matches!(world.refused(Command::DeleteImage { image: image_id(9) }), Refusal::NoImage { .. }));
}

#[test]
fn names_ids_and_unique_prefixes_resolve() {
    let mut world = World::with_hosts(1);
    let first = world.create(1, spec());
    let second = world.create(2, spec());
    let resolve = |text: &str| world.state.resolve_vm(text, "default");
    assert_eq!(resolve("vm-1"), Ok(first));
    assert_eq!(resolve(&second.to_string()), Ok(second));
    assert_eq!(resolve(&second.to_string()[..8]), Ok(second));
    assert_eq!(resolve(&second.to_string()[..14]), Ok(second));
    let ambiguous = resolve("beef").unwrap_err().to_string();
    assert!(ambiguous.contains(&format!("{first} (vm-1), {second} (vm-2)")), "{ambiguous}");
    for bad in ["bee", "vm-3", "beef0003", "BEEF0001", &vm_id(3).to_string(), ""] {
        assert_eq!(resolve(bad), Err(Refusal::NoVm(bad.to_owned())), "{bad}");
    }
    assert_eq!(world.state.resolve_vm("vm-1", "somebody"), Err(Refusal::NoVm("vm-1".into())));
    assert_eq!(world.state.resolve_host("host-1"), Ok(host_id(1)));
    assert_eq!(world.state.resolve_host("0000"), Ok(host_id(1)));
    assert!(matches!(world.state.resolve_image("nope"), Err(Refusal::NoImage { .. })));
}

#[test]
fn a_pause_is_what_a_user_wants_until_it_ends() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, spec());
    world.set(vm, PowerChange::Pause);
    assert!(world.record(vm).paused && world.phase(vm) == Phase::Running, "its host has not said so");
    assert_eq!(world.last_events(), [EventType::PauseRequested]);
    let still = VmObservation { paused: true, ..world.observation(vm, ObservedState::Running) };
    let host = world.host_of(vm).unwrap();
    world.ok(Command::Report { host, reports: vec![still] });
    assert_eq!(world.phase(vm), Phase::Paused);
    world.set(vm, PowerChange::Pause);
    assert!(world.last.mutations.is_empty(), "the same call again does nothing");
    assert!(matches!(world.refused(Command::SetDesired { vm, desired: PowerChange::Start }), Refusal::Precondition(_)));
    let migrate = Command::MigrateVm { vm, to: None, secret: "0".repeat(64), bytes_per_second: 0 };
    assert!(world.refused(migrate).to_string().contains("is paused"));
    world.set(vm, PowerChange::Resume);
    assert_eq!((world.record(vm).paused, world.last_events()), (false, vec![EventType::ResumeRequested]));
    world.set(vm, PowerChange::Resume);
    assert!(world.last.mutations.is_empty());

    // Each of these ends it.
    for end in [Command::RestartVm { vm, force: false }, Command::SetDesired { vm, desired: PowerChange::Stop }] {
        world.set(vm, PowerChange::Pause);
        world.ok(end);
        assert!(!world.record(vm).paused);
    }
    // What does not run cannot be paused, nor resumed.
    for desired in [PowerChange::Pause, PowerChange::Resume] {
        assert!(matches!(world.refused(Command::SetDesired { vm, desired }), Refusal::Precondition(_)));
    }
}
