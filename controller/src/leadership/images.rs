//! What a leader knows of images that are on their way, and that nobody stores: how far they are, what they wait for, and which
//! uploads are under way in this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uncloud_proto::ids::{HostId, ImageId};

/// What is known of one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Who fetches it, or takes it.
    pub host: Option<HostId>,
    /// Bytes that are there.
    pub done: u64,
    /// Bytes that there will be; 0: not known.
    pub total: u64,
    /// What else there is to say, such as what is waited for.
    pub note: String,
}

/// The images that are on their way. Cheap to clone; ends with the term.
#[derive(Clone, Debug, Default)]
pub struct ImageBoard {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    live: BTreeMap<ImageId, Live>,
    uploads: BTreeSet<ImageId>,
    /// Hosts that have said that they have no copy (any more).
    without: BTreeMap<ImageId, BTreeSet<HostId>>,
}

impl ImageBoard {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of an image. `None`: nothing is on its way.
    #[must_use]
    pub fn get(&self, image: ImageId) -> Option<Live> {
        self.lock().live.get(&image).cloned()
    }

    /// Says how it is now.
    pub fn show(&self, image: ImageId, live: Live) {
        self.lock().live.insert(image, live);
    }

    /// Nothing is on its way any more.
    pub fn clear(&self, image: ImageId) {
        self.lock().live.remove(&image);
    }

    /// Hosts that have said that they have no copy of a deleted image.
    #[must_use]
    pub fn without(&self, image: ImageId) -> BTreeSet<HostId> {
        self.lock().without.get(&image).cloned().unwrap_or_default()
    }

    /// A host has said that it has no copy of a deleted image.
    pub fn note_without(&self, image: ImageId, host: HostId) {
        self.lock().without.entry(image).or_default().insert(host);
    }

    /// Forgets all but these.
    pub fn retain(&self, keep: impl Fn(ImageId) -> bool) {
        let mut inner = self.lock();
        inner.live.retain(|id, _| keep(*id));
        inner.without.retain(|id, _| keep(*id));
    }

    /// An upload begins in this process, and is under way until the guard is dropped.
    #[must_use]
    pub fn begin_upload(&self, image: ImageId) -> Upload {
        self.lock().uploads.insert(image);
        Upload { board: self.clone(), image }
    }

    /// Whether an upload is under way in this process.
    #[must_use]
    pub fn is_uploading(&self, image: ImageId) -> bool {
        self.lock().uploads.contains(&image)
    }
}

/// An upload that is under way.
#[derive(Debug)]
pub struct Upload {
    board: ImageBoard,
    image: ImageId,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.board.lock().uploads.remove(&self.image);
    }
}
