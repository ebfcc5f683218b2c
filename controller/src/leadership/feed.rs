//! What has been committed, as it is committed: for watches, sessions and the reconciler.
//!
//! A bounded history is kept in memory; what came before is asked of etcd (`store/history.rs`).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::broadcast;
use uncloud_proto::ids::{Revision, VmId};

use crate::{
    model::{Key, VmRecord},
    state::{
        State,
        command::{Change, Mutation},
    },
    store::{self, Store},
};

/// How many changes are kept in memory.
const HISTORY: usize = 4096;
/// How many changes a subscriber may be behind before it is cut off.
const BACKLOG: usize = 1024;
/// Of how many changes it is kept what watches show: those that follow are seldom further apart. A change has a transaction's records
/// at the most, so this is some MiB.
const SHOWN: usize = 16;

/// One committed change.
#[derive(Debug)]
pub struct FeedItem {
    /// The revision at which it was committed.
    pub revision: Revision,
    /// What was changed.
    pub change: Change,
    /// What the VMs were that it deleted. Of changes that were read from etcd's history it is not known.
    pub deleted: BTreeMap<VmId, Arc<VmRecord>>,
    /// See [`Feed::shown`].
    shown: Mutex<Weak<Vec<ShownVm>>>,
}

impl FeedItem {
    /// A change of which it is not known what it deleted.
    #[must_use]
    pub fn new(revision: Revision, change: Change) -> Self {
        Self { revision, change, deleted: BTreeMap::new(), shown: Mutex::default() }
    }

    /// A change to `state`, which does not have it yet.
    #[must_use]
    pub fn before(state: &State, revision: Revision, change: Change) -> Self {
        let deleted = change.mutations.iter().filter_map(|m| match m {
            Mutation { key: Key::Vm(id), value: None } => Some((*id, state.vm(*id)?.record.clone())),
            Mutation { .. } => None,
        });
        Self { deleted: deleted.collect(), ..Self::new(revision, change) }
    }
}

/// What watches show of one VM after a change: the same for all of them, and encoded once.
#[derive(Debug)]
pub struct ShownVm {
    /// The VM.
    pub vm: VmId,
    /// Whose it is.
    pub owner: String,
    /// The message, without its revision.
    pub event: Bytes,
}

/// The history before the revision that was asked for is gone: list again.
#[derive(Debug, thiserror::Error)]
pub enum Compacted {
    /// Compacted, or longer than anybody wants to read.
    #[error("the changes after revision {0} are no longer kept; list again and watch from the revision of the list")]
    Gone(Revision),
    /// It lies in the future.
    #[error("revision {0} has not happened yet")]
    Future(Revision),
    /// etcd could not be asked.
    #[error("the history could not be read")]
    Store(#[source] store::Error),
}

/// The subscriber was too slow and has missed changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lagged {
    /// It was too slow.
    #[error("too slow: changes were missed; resume from the newest revision that was seen")]
    TooSlow,
    /// This controller reads its copy anew.
    #[error("this controller reads its copy of the state anew")]
    Ended,
}

/// Hands out committed changes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    store: Store,
}

#[derive(Debug)]
struct Shared {
    history: Mutex<History>,
    sender: broadcast::Sender<Arc<FeedItem>>,
    /// What was shown last.
    shown: LastShown,
    /// Subscribers that were too slow.
    cut_off: Arc<AtomicU64>,
}

#[derive(Debug)]
struct History {
    /// All changes after this one are in `items`.
    complete_after: Revision,
    newest: Revision,
    items: VecDeque<Arc<FeedItem>>,
}

/// What was shown of the last changes, oldest first.
#[derive(Debug, Default)]
struct LastShown(Mutex<VecDeque<Arc<Vec<ShownVm>>>>);

impl LastShown {
    fn of(&self, item: &FeedItem, make: impl FnOnce() -> Vec<ShownVm>) -> Arc<Vec<ShownVm>> {
        let mut slot = item.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shown) = slot.upgrade() {
            return shown;
        }
        let made = Arc::new(make());
        *slot = Arc::downgrade(&made);
        drop(slot);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == SHOWN {
            kept.pop_front();
        }
        kept.push_back(made.clone());
        made
    }
}

impl Feed {
    /// A feed whose first change comes after `loaded`, the revision at which the state was read.
    pub(super) fn new(store: Store, loaded: Revision) -> Self {
        let history = Mutex::new(History { complete_after: loaded, newest: loaded, items: VecDeque::new() });
        let sender = broadcast::Sender::new(BACKLOG);
        let shared = Shared { history, sender, shown: LastShown::default(), cut_off: Arc::default() };
        Self { shared: Arc::new(shared), store }
    }

    /// How many subscribers there are.
    #[must_use]
    pub fn followers(&self) -> usize {
        self.shared.sender.receiver_count()
    }

    /// How many were cut off because they were too slow.
    #[must_use]
    pub fn cut_off(&self) -> u64 {
        self.shared.cut_off.load(Ordering::Relaxed)
    }

    /// What watches show of a change. `make` is called by the first who asks; whoever comes soon after that shares it.
    pub fn shown(&self, item: &FeedItem, make: impl FnOnce() -> Vec<ShownVm>) -> Arc<Vec<ShownVm>> {
        self.shared.shown.of(item, make)
    }

    /// Nothing of ours was changed at this revision.
    pub(super) fn pass(&self, revision: Revision) {
        let mut history = self.history();
        history.newest = history.newest.max(revision);
    }

    /// A change was committed.
    pub(super) fn publish(&self, item: FeedItem) {
        let item = Arc::new(item);
        let mut history = self.history();
        history.newest = history.newest.max(item.revision);
        history.items.push_back(item.clone());
        if history.items.len() > HISTORY
            && let Some(dropped) = history.items.pop_front()
        {
            history.complete_after = dropped.revision;
        }
        // Under the lock, so that a subscriber sees it either in the history or on its channel, never twice or not at all.
        // Nobody listening is no error.
        let _ = self.shared.sender.send(item);
    }

    /// All changes after `from`, and then those to come.
    ///
    /// # Errors
    ///
    /// When they are no longer kept, or `from` lies in the future.
    pub async fn subscribe(&self, from: Revision) -> Result<FeedStream, Compacted> {
        let complete_after = match self.in_memory(from) {
            InMemory::All(stream) => return Ok(stream),
            InMemory::After(revision) => revision,
            InMemory::Future(receiver) => {
                // Another controller may have seen more. Has it happened, then everything that comes after it comes here, too;
                // what still comes of before it has been seen.
                if from > self.store.revision().await.map_err(Compacted::Store)? {
                    return Err(Compacted::Future(from));
                }
                return Ok(self.stream(VecDeque::new(), receiver, from));
            }
        };
        let older = self.store.history(from, complete_after).await.map_err(|error| match error {
            store::Error::Compacted(_) => Compacted::Gone(from),
            other => Compacted::Store(other),
        })?;
        // More has come meanwhile, and perhaps too much.
        let InMemory::All(mut stream) = self.in_memory(complete_after) else { return Err(Compacted::Gone(from)) };
        for logged in older.into_iter().rev().filter(|l| !l.change.mutations.is_empty()) {
            stream.backlog.push_front(Arc::new(FeedItem::new(logged.revision, logged.change)));
        }
        Ok(stream)
    }

    fn stream(
        &self,
        backlog: VecDeque<Arc<FeedItem>>,
        receiver: broadcast::Receiver<Arc<FeedItem>>,
        seen: Revision,
    ) -> FeedStream {
        FeedStream { backlog, receiver, seen, cut_off: Arc::clone(&self.shared.cut_off) }
    }

    fn in_memory(&self, from: Revision) -> InMemory {
        let history = self.history();
        if from > history.newest {
            return InMemory::Future(self.shared.sender.subscribe());
        }
        if from < history.complete_after {
            return InMemory::After(history.complete_after);
        }
        let backlog = history.items.iter().filter(|item| item.revision > from).cloned().collect();
        let receiver = self.shared.sender.subscribe();
        InMemory::All(self.stream(backlog, receiver, from))
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.shared.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much of what was asked for is in memory.
enum InMemory {
    /// Everything.
    All(FeedStream),
    /// Only what came after this.
    After(Revision),
    /// It has not been heard of yet. What comes from now on, whatever it is.
    Future(broadcast::Receiver<Arc<FeedItem>>),
}

/// One subscriber's stream.
#[derive(Debug)]
pub struct FeedStream {
    backlog: VecDeque<Arc<FeedItem>>,
    receiver: broadcast::Receiver<Arc<FeedItem>>,
    /// Up to here the subscriber knows everything.
    seen: Revision,
    cut_off: Arc<AtomicU64>,
}

impl FeedStream {
    /// The next change. Cancel safe.
    ///
    /// # Errors
    ///
    /// When this subscriber was too slow, or the feed has ended.
    pub async fn next(&mut self) -> Result<Arc<FeedItem>, Lagged> {
        if let Some(item) = self.backlog.pop_front() {
            return Ok(item);
        }
        loop {
            let item = self.receiver.recv().await.map_err(|error| match error {
                broadcast::error::RecvError::Lagged(_) => {
                    self.cut_off.fetch_add(1, Ordering::Relaxed);
                    Lagged::TooSlow
                }
                broadcast::error::RecvError::Closed => Lagged::Ended,
            })?;
            if item.revision > self.seen {
                return Ok(item);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_change_shows_is_made_once_and_not_kept_for_ever() {
        let last = LastShown::default();
        let items: Vec<FeedItem> =
            (0..=SHOWN as i64).map(|n| FeedItem::new(Revision(n), Change { mutations: Vec::new() })).collect();
        let first = last.of(&items[0], Vec::new);
        assert!(Arc::ptr_eq(&first, &last.of(&items[0], || unreachable!("it was made before"))));
        drop(first);
        assert!(items[0].shown.lock().unwrap().upgrade().is_some(), "the next watch will want it soon");
        for item in &items[1..] {
            last.of(item, Vec::new);
        }
        assert!(items[0].shown.lock().unwrap().upgrade().is_none(), "so many came after it");
    }
}
