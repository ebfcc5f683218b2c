//! What users ask of images.

use std::sync::Arc;

use uncloud_proto::ids::ImageId;

use super::{
    command::{Answer, Refusal, RequestId},
    draft::Draft,
};
use crate::model::{EventType, ImageRecord, Key, Record, RequestAnswer, Subject, VmRecord};

pub(super) fn create(
    draft: &mut Draft<'_>,
    request: Option<&RequestId>,
    image: &ImageRecord,
) -> Result<Answer, Refusal> {
    let state = draft.state;
    let id = image.id;
    if state.images.contains_key(&id) {
        return Err(Refusal::Precondition(format!("there is already an image with the id {id}")));
    }
    if state.image_names.contains_key(&image.name) {
        return Err(Refusal::ImageNameTaken(image.name.clone()));
    }
    let record = Arc::new(ImageRecord { created: draft.cx.now, ..image.clone() });
    draft.put(Key::Image(id), Record::Image(Arc::clone(&record)))?;
    draft.remember(request, RequestAnswer::Image { id })?;
    let sources: Vec<&str> = record.files.iter().map(|f| f.source.as_str()).collect();
    let message = format!("registered from {}", sources.join(", "));
    draft.event(Subject::Image(id), &record.name, EventType::ImageCreated, message);
    Ok(Answer::Image(record))
}

/// Forgets an image that no VM uses. Its files, and copies in pools, stay.
pub(super) fn delete(draft: &mut Draft<'_>, id: ImageId) -> Result<Answer, Refusal> {
    let state = draft.state;
    let key = Key::Image(id);
    if state.is_unreadable(&key) {
        return Err(Refusal::Unreadable(key.to_string()));
    }
    let Some(entry) = state.images.get(&id) else {
        return Err(Refusal::NoImage { field: "image".into(), name: id.to_string() });
    };
    if let Some(vm) = state.vms.values().find(|vm| uses(&vm.record, id)) {
        let message =
            format!("image `{}` is used by VM `{}`; delete that one first", entry.record.name, vm.record.name);
        return Err(Refusal::Precondition(message));
    }
    // A VM whose record cannot be read may use any image.
    if let Some(key) = state.unreadable.keys().find(|key| matches!(Key::parse(key.as_bytes()), Some(Key::Vm(_)))) {
        return Err(Refusal::Unreadable(key.clone()));
    }
    draft.delete(key)?;
    let name = &entry.record.name;
    draft.event(Subject::Image(id), name, EventType::ImageDeleted, "deleted by a user; its files stay".into());
    Ok(Answer::Done)
}

fn uses(vm: &VmRecord, id: ImageId) -> bool {
    vm.spec.kernel.as_ref().is_some_and(|k| k.image == id) || vm.spec.disks.iter().any(|d| d.image == Some(id))
}
