//! What users ask of images.

use super::fixtures::*;
use crate::{
    model::{EventType, image::ImageKind},
    state::command::{Answer, Command, ObservedState, Refusal, RequestId},
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
    world.ok(Command::DeleteVm { vm });
    world.report(vm, ObservedState::Deleted);
    world.ok(delete);
    assert_eq!(world.last_events(), [EventType::ImageDeleted]);
    assert!(world.state.image(image_id(1)).is_none());
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
