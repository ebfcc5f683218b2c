//! What has been committed, in memory: what reads are answered from.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;
use uncloud_proto::ids::Revision;

use super::{Feed, FeedItem};
use crate::state::{State, command::Change};

/// The committed state. Cheap to clone; all clones are the same state.
#[derive(Clone, Debug)]
pub struct Mirror {
    state: Arc<RwLock<State>>,
    feed: Feed,
    changed: watch::Sender<Revision>,
}

impl Mirror {
    pub(super) fn new(state: State, feed: Feed) -> Self {
        let changed = watch::Sender::new(state.revision());
        Self { state: Arc::new(RwLock::new(state)), feed, changed }
    }

    /// Looks at the state. `f` must be short: the writer waits meanwhile.
    pub fn read<R>(&self, f: impl FnOnce(&State) -> R) -> R {
        f(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells when something was committed.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<Revision> {
        self.changed.subscribe()
    }

    /// The changes themselves.
    #[must_use]
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Takes a committed change in. A reader that comes after this sees it.
    pub(super) fn absorb(&self, change: Change, revision: Revision) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).absorb(&change, revision);
        self.feed.publish(FeedItem { revision, change });
        self.changed.send_replace(revision);
    }
}
