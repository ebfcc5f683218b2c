//! What users ask of images.

use super::fixtures::*;
use crate::{
    model::{
        EventType, ImageRecord,
        image::{ImageKind, ImageState},
    },
    state::command::{Answer, Arrival, Command, ObservedState, Refusal, RequestId},
};

fn create(n: u128, request: Option<RequestId>) -> Command {
    Command::CreateImage { request, image: Box::new(image(n, ImageKind::Disk)) }
}

#[test]
fn an_image_has_a_name_of_its_own() {
    let mut world = World::with_hosts(0);
    world.ok(create(1, None));
    assert_eq!(world.last_events(), [EventType::ImageCreated]);
    let mut same = image(2, ImageKind::Kernel);
    same.name = "image-1".into();
    assert_eq!(
        world.refused(Command::CreateImage { request: None, image: Box::new(same) }),
        Refusal::ImageNameTaken("image-1".into())
    );
    assert_eq!(world.state.resolve_image("image-1"), Ok(image_id(1)));
}

#[test]
fn an_image_that_is_used_stays() {
    let mut world = World::with_hosts(1);
    world.ok(create(1, None));
    let mut spec = with_disk("local");
    spec.disks[0].image = Some(image_id(1));
    spec.disks[0].size_bytes = 4 << 30;
    let vm = world.create(1, spec);
    let delete = Command::DeleteImage { image: image_id(1) };
    let refusal = world.refused(delete.clone());
    assert!(refusal.to_string().contains("vm-1"), "{refusal}");
    // A deleted VM uses it for as long as its disks are there (P5).
    world.ok(Command::DeleteVm { vm });
    assert!(world.refused(delete.clone()).to_string().contains("vm-1"));
    world.report(vm, ObservedState::Deleted);
    world.ok(delete.clone());
    assert_eq!(world.last_events(), [EventType::ImageDeleted]);

    // While its copies are being removed nothing can be made from it, by whatever name, and its name is free.
    let mut spec = with_disk("local");
    spec.disks[0].image = Some(image_id(1));
    let refusal = world.refused(Command::CreateVm { request: None, vm: Box::new(new_vm(2, spec)) });
    assert!(refusal.to_string().contains("has been deleted"), "{refusal}");
    assert!(matches!(world.state.resolve_image("image-1"), Err(Refusal::NoImage { .. })));
    let mut again = image(3, ImageKind::Disk);
    again.name = "image-1".into();
    world.ok(Command::CreateImage { request: None, image: Box::new(again) });
    assert_eq!(world.state.resolve_image("image-1"), Ok(image_id(3)));
    world.ok(delete);
    world.ok(Command::ForgetImage { image: image_id(1) });
    assert!(world.state.image(image_id(1)).is_none());
    assert_eq!(world.state.resolve_image("image-1"), Ok(image_id(3)));
    assert!(matches!(world.refused(Command::ForgetImage { image: image_id(3) }), Refusal::Precondition(_)));
}

/// Whatever the order, the state is judged once: a file that comes late makes no image that was deleted meanwhile.
#[test]
fn an_image_that_is_fetched_can_be_used_when_all_is_there() {
    let fetching = |n: u128| ImageRecord { state: ImageState::Fetching, ..image(n, ImageKind::Disk) };
    let create = |n: u128| Command::CreateImage { request: None, image: Box::new(fetching(n)) };
    let arrived = |n: u128, outcome| Command::ImageArrived { image: image_id(n), outcome };
    let vm = |n: u128| {
        let mut spec = with_disk("local");
        (spec.disks[0].image, spec.disks[0].size_bytes) = (Some(image_id(n)), 0);
        Command::CreateVm { request: None, vm: Box::new(new_vm(n, spec)) }
    };
    let mut world = World::with_hosts(1);
    (1..=4).for_each(|n| drop(world.ok(create(n))));
    let refusal = world.refused(vm(1));
    assert!(refusal.to_string().starts_with("spec.disks[0].image names image `image-1`, whose files"), "{refusal}");
    let files = fetching(1).files;
    world.ok(arrived(1, Arrival::Complete(files.clone())));
    assert_eq!(world.last_events(), [EventType::ImageReady]);
    world.ok(vm(1));

    world.ok(arrived(2, Arrival::Failed("404".into())));
    let refusal = world.refused(vm(2));
    assert!(refusal.to_string().contains("404"), "{refusal}");
    world.ok(Command::DeleteImage { image: image_id(2) });

    world.ok(Command::DeleteImage { image: image_id(3) });
    assert!(matches!(world.refused(arrived(3, Arrival::Complete(files.clone()))), Refusal::Precondition(_)));
    assert_eq!(world.state.image(image_id(3)).unwrap().record.state, ImageState::Deleting);

    world.ok(arrived(4, Arrival::BrokenOff("the client has gone".into())));
    assert_eq!(world.state.image(image_id(4)).unwrap().record.state, ImageState::Deleting);
    assert!(matches!(world.refused(arrived(1, Arrival::Complete(files))), Refusal::Precondition(_)));
}

#[test]
fn the_same_request_registers_an_image_once() {
    let mut world = World::with_hosts(0);
    let request = RequestId { id: "r".into(), fingerprint: "f".into() };
    let first = world.ok(create(1, Some(request.clone())));
    let second = world.ok(create(2, Some(request.clone())));
    assert_eq!(first, second);
    assert!(matches!(first, Answer::Image(i) if i.id == image_id(1)));
    world.ok(Command::DeleteImage { image: image_id(1) });
    assert!(matches!(world.refused(create(3, Some(request))), Refusal::Precondition(_)));
}
