//! Records that cannot be read are reported and left alone, and stop nothing else.

use uncloud_proto::ids::Revision;

use super::fixtures::*;
use crate::{
    model::{Key, Phase, image::ImageKind},
    state::{
        State,
        command::{Change, Command, Lapsed, Mutation, NewVm, ObservedState, PowerChange, Refusal, RequestId},
    },
};

/// What somebody has spoilt by hand.
fn spoil(world: &mut World, key: &Key) {
    world.stored.remove(key);
    world.state.absorb_unreadable(key.to_string(), "not JSON".into(), Revision(1));
    world.check();
}

fn create(vm: NewVm) -> Command {
    Command::CreateVm { request: None, vm: Box::new(vm) }
}

#[test]
fn a_vm_with_an_unreadable_record_is_not_touched_and_its_name_stays_taken() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    let host = world.host_of(vm).unwrap();
    let observation = world.observation(vm, ObservedState::Fenced);
    for key in [Key::Vm(vm), Key::VmStatus(vm)] {
        let mut world = World { ..clone(&world) };
        spoil(&mut world, &key);
        assert_eq!(world.state.unreadable().len(), 1);
        let unreadable = Refusal::Unreadable(key.to_string());
        for command in [
            Command::SetDesired { vm, desired: PowerChange::Stop },
            Command::RestartVm { vm, force: false },
            Command::DeleteVm { vm },
        ] {
            assert_eq!(world.refused(command), unreadable);
        }
        world.ok(Command::Report { host, reports: vec![observation.clone()] });
        assert!(world.last.mutations.is_empty());
        world.ok(Command::Place { vms: vec![vm] });
        assert!(world.last.mutations.is_empty());
        world.lapse(host, Lapsed::Both);
        assert_eq!(world.last.mutations.len(), 2, "the host and its event: {:?}", world.last);
        let same_name = NewVm { id: vm_id(2), ..new_vm(1, spec()) };
        assert!(matches!(world.refused(create(same_name)), Refusal::VmNameTaken { .. }));
        let same_id = NewVm { name: "other".into(), ..new_vm(1, spec()) };
        assert!(world.run(create(same_id)).is_err());
        // The rest goes on.
        world.create(3, spec());
    }
}

fn clone(world: &World) -> World {
    World {
        state: world.state.clone(),
        now: world.now,
        silent: world.silent.clone(),
        arrived: world.arrived.clone(),
        stored: world.stored.clone(),
        last: world.last.clone(),
        events: world.events.clone(),
    }
}

#[test]
fn claims_that_cannot_be_read_are_taken() {
    let mut world = World::with_hosts(1);
    spoil(&mut world, &Key::VmName { owner: "default".into(), name: "vm-1".into() });
    assert!(matches!(world.refused(create(new_vm(1, spec()))), Refusal::VmNameTaken { .. }));
    spoil(&mut world, &Key::Mac("42:00:00:00:00:01".into()));
    let mut vm = new_vm(2, spec());
    vm.spec.nics = vec![nic("42:00:00:00:00:01")];
    assert!(matches!(world.refused(create(vm)), Refusal::MacTaken(_)));
    spoil(&mut world, &Key::Request("r".into()));
    let request = Some(RequestId { id: "r".into(), fingerprint: "f".into() });
    let command = Command::CreateVm { request, vm: Box::new(new_vm(3, spec())) };
    assert!(matches!(world.refused(command), Refusal::Unreadable(_)));
}

#[test]
fn a_claim_that_cannot_be_read_is_left_alone_when_its_vm_goes() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    spoil(&mut world, &Key::VmName { owner: "default".into(), name: "vm-1".into() });
    world.ok(Command::DeleteVm { vm });
    world.report(vm, ObservedState::Deleted);
    assert!(world.state.vm(vm).is_none() && world.state.unreadable().len() == 1);
}

#[test]
fn a_host_with_an_unreadable_record_is_left_alone_with_its_vms() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    let host = world.host_of(vm).unwrap();
    spoil(&mut world, &Key::Host(host));
    let n = if host == host_id(1) { 1 } else { 2 };
    for command in [
        Command::RegisterHost { host: Box::new(facts(n)) },
        Command::RemoveHost { host },
        Command::DeclareLapsed { host, lapsed: Lapsed::Both, limit: 25 },
        Command::UpdatePools { host, pools: Vec::new() },
    ] {
        assert_eq!(world.refused(command), Refusal::Unreadable(Key::Host(host).to_string()));
    }
    world.ok(Command::Place { vms: vec![vm] });
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Running));
    world.ok(Command::DeleteVm { vm });
    world.ok(Command::Place { vms: vec![vm] });
    assert!(world.state.vm(vm).is_some(), "the host is there, whatever it is");
    assert_eq!(world.state.pending().count(), 0);
}

#[test]
fn nothing_is_written_over_what_cannot_be_read() {
    let mut world = World::with_hosts(0);
    spoil(&mut world, &Key::Image(image_id(1)));
    let create = Command::CreateImage { request: None, image: Box::new(image(1, ImageKind::Disk)) };
    assert_eq!(world.refused(create), Refusal::Unreadable(Key::Image(image_id(1)).to_string()));
    spoil(&mut world, &Key::Cluster);
    let set = Command::SetLeases { fast_lease_ms: 6000, patient_lease_ms: 60_000 };
    assert_eq!(world.refused(set), Refusal::Unreadable(Key::Cluster.to_string()));
}

#[test]
fn an_image_may_be_used_by_a_vm_that_cannot_be_read() {
    let mut world = World::with_hosts(1);
    world.ok(Command::CreateImage { request: None, image: Box::new(image(1, ImageKind::Disk)) });
    let vm = world.create(1, spec());
    spoil(&mut world, &Key::Vm(vm));
    let refusal = world.refused(Command::DeleteImage { image: image_id(1) });
    assert_eq!(refusal, Refusal::Unreadable(Key::Vm(vm).to_string()));
}

#[test]
fn a_record_that_was_mended_counts_again() {
    let mut world = World::with_hosts(1);
    let vm = world.running(1, spec());
    let key = Key::Vm(vm);
    let (record, revision) = world.stored[&key].clone();
    spoil(&mut world, &key);
    world.stored.insert(key.clone(), (record.clone(), revision));
    world.state.absorb(&Change { mutations: vec![Mutation { key, value: Some(record) }] }, revision);
    world.check();
    assert!(world.state.unreadable().is_empty());
    assert_eq!(world.phase(vm), Phase::Running);
}

#[test]
fn keys_of_a_newer_program_are_reported_and_harm_nothing() {
    let mut state = State::default();
    state.absorb_unreadable("/uncloud/v1/networks/x".into(), "not a key that this program knows".into(), Revision(3));
    assert_eq!(state.unreadable().len(), 1);
}
