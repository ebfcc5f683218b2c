//! What has been committed, in memory: what reads are answered from.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uncloud_proto::ids::{HostId, Revision};

use super::{
    Feed, FeedItem,
    wake::{Sleeper, Sleepers},
};
use crate::{
    state::{State, command::Change, concerned},
    store::Logged,
};

/// The committed state. Cheap to clone; all clones are the same state.
///
/// One at a time takes changes in: while this process leads its writer, as soon as a transaction is answered; otherwise
/// the follower, as etcd tells them.
#[derive(Clone, Debug)]
pub struct Mirror {
    state: Arc<RwLock<State>>,
    feed: Feed,
    changed: watch::Sender<Revision>,
    sleepers: Sleepers,
    retired: CancellationToken,
}

impl Mirror {
    pub(super) fn new(state: State, feed: Feed) -> Self {
        let changed = watch::Sender::new(state.revision());
        Self {
            state: Arc::new(RwLock::new(state)),
            feed,
            changed,
            sleepers: Sleepers::default(),
            retired: CancellationToken::new(),
        }
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

    /// Tells the session of a host when something was committed that concerns it: soon, but perhaps not everything. Who must
    /// not miss anything asks [`Mirror::changed`].
    #[must_use]
    pub fn sleeper(&self, host: HostId) -> Sleeper {
        self.sleepers.add(host)
    }

    /// The changes themselves.
    #[must_use]
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Fires when this is no longer kept up to date, because the state is read anew. Who watches it asks again.
    #[must_use]
    pub fn retired(&self) -> &CancellationToken {
        &self.retired
    }

    /// Waits until everything up to `revision` is in. Cancel safe.
    pub(super) async fn reached(&self, revision: Revision) {
        // Cannot fail: the sender lives as long as `self`.
        let _ = self.changed.subscribe().wait_for(|now| *now >= revision).await;
    }

    /// Takes a committed change in. A reader that comes after this sees it.
    pub(super) fn absorb(&self, change: Change, revision: Revision) {
        let (item, concerned) = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let concerned = concerned(&state, &change);
            let item = FeedItem::before(&state, revision, change);
            state.absorb(&item.change, revision);
            (item, concerned)
        };
        self.feed.publish(item);
        self.changed.send_replace(revision);
        self.sleepers.wake(concerned);
    }

    /// Takes in what etcd told.
    pub(super) fn follow(&self, logged: Logged) {
        let Logged { revision, change, unreadable, leader: _ } = logged;
        let item = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let item = FeedItem::before(&state, revision, change);
            state.absorb(&item.change, revision);
            for (key, error) in unreadable {
                state.absorb_unreadable(key, error, revision);
            }
            item
        };
        if item.change.mutations.is_empty() {
            self.feed.pass(revision);
        } else {
            self.feed.publish(item);
        }
        // Who does not lead has no sessions to wake.
        self.changed.send_replace(revision);
    }
}
