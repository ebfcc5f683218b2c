//! What users ask of images.

use std::sync::Arc;

use uncloud_proto::ids::ImageId;

use super::{
    command::{Answer, Arrival, Refusal, RequestId},
    draft::Draft,
};
use crate::model::{EventType, ImageRecord, Key, Record, RequestAnswer, Subject, VmRecord, image::ImageState};

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

/// Deletes an image that no VM uses: from now on no VM can be made from it, and its copies may go (P5). The one writer decides this
/// and every creation of a VM, one after the other, so there is no moment between.
pub(super) fn delete(draft: &mut Draft<'_>, id: ImageId) -> Result<Answer, Refusal> {
    let state = draft.state;
    let record = find(draft, id)?;
    if record.state == ImageState::Deleting {
        return Ok(Answer::Done);
    }
    if let Some(vm) = state.vms.values().find(|vm| uses(&vm.record, id)) {
        let message = format!("image `{}` is used by VM `{}`; delete that one first", record.name, vm.record.name);
        return Err(Refusal::Precondition(message));
    }
    // A VM whose record cannot be read may use any image.
    if let Some(key) = state.unreadable.keys().find(|key| matches!(Key::parse(key.as_bytes()), Some(Key::Vm(_)))) {
        return Err(Refusal::Unreadable(key.clone()));
    }
    begin_removal(draft, &record, "deleted by a user; its copies in the pools are being removed".into())?;
    Ok(Answer::Done)
}

/// Takes in how a first fetch or an upload ended.
pub(super) fn arrived(draft: &mut Draft<'_>, id: ImageId, outcome: &Arrival) -> Result<Answer, Refusal> {
    let before = find(draft, id)?;
    match before.state {
        ImageState::Fetching | ImageState::Uploading => {}
        // Somebody has deleted it meanwhile, or another host was first.
        ImageState::Ready | ImageState::Failed | ImageState::Deleting => {
            let message = format!("nothing is on its way for image `{}` any more", before.name);
            return Err(Refusal::Precondition(message));
        }
    }
    let mut record = (*before).clone();
    let (state, kind, message) = match outcome {
        Arrival::Complete(files) => {
            record.files.clone_from(files);
            let bytes: u64 = files.iter().map(|f| f.size_bytes).sum();
            (ImageState::Ready, EventType::ImageReady, format!("{bytes} bytes are there and have been checked"))
        }
        Arrival::Failed(why) => (ImageState::Failed, EventType::ImageFailed, why.clone()),
        Arrival::BrokenOff(why) => {
            begin_removal(draft, &before, why.clone())?;
            return Ok(Answer::Done);
        }
    };
    record.state = state;
    record.reason = if state == ImageState::Failed { message.clone() } else { String::new() };
    let record = Arc::new(record);
    draft.put(Key::Image(id), Record::Image(Arc::clone(&record)))?;
    draft.event(Subject::Image(id), &record.name, kind, message);
    Ok(Answer::Image(record))
}

/// Forgets a deleted image of which no copy is left.
pub(super) fn forget(draft: &mut Draft<'_>, id: ImageId) -> Result<Answer, Refusal> {
    let record = find(draft, id)?;
    if record.state != ImageState::Deleting {
        return Err(Refusal::Precondition(format!("image `{}` has not been deleted", record.name)));
    }
    draft.delete(Key::Image(id))?;
    Ok(Answer::Done)
}

fn find(draft: &Draft<'_>, id: ImageId) -> Result<Arc<ImageRecord>, Refusal> {
    let key = Key::Image(id);
    if draft.state.is_unreadable(&key) {
        return Err(Refusal::Unreadable(key.to_string()));
    }
    match draft.state.images.get(&id) {
        Some(entry) => Ok(Arc::clone(&entry.record)),
        None => Err(Refusal::NoImage { field: "image".into(), name: id.to_string() }),
    }
}

fn begin_removal(draft: &mut Draft<'_>, before: &Arc<ImageRecord>, why: String) -> Result<(), Refusal> {
    let record = ImageRecord { state: ImageState::Deleting, reason: String::new(), ..(**before).clone() };
    draft.put(Key::Image(record.id), Record::Image(Arc::new(record)))?;
    draft.event(Subject::Image(before.id), &before.name, EventType::ImageDeleted, why);
    Ok(())
}

/// Why no VM can be made from an image now.
pub(super) fn unusable(record: &ImageRecord) -> Option<String> {
    let name = &record.name;
    match record.state {
        ImageState::Ready => None,
        ImageState::Fetching | ImageState::Uploading => Some(format!(
            "names image `{name}`, whose files are still on their way; `uncloud image show {name}` says how far they are"
        )),
        ImageState::Failed => {
            Some(format!("names image `{name}`, which cannot be used: {}; delete it and add it again", record.reason))
        }
        ImageState::Deleting => Some(format!("names image `{name}`, which has been deleted")),
    }
}

fn uses(vm: &VmRecord, id: ImageId) -> bool {
    vm.spec.kernel.as_ref().is_some_and(|k| k.image == id) || vm.spec.disks.iter().any(|d| d.image == Some(id))
}
