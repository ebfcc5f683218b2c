//! Where the process finds its copy of the state, and how to read what is surely not old.
//!
//! # Safety argument
//!
//! * **C1** A read on a controller that does not lead sees everything that was acknowledged before it began: etcd's quorum is
//!   asked for its newest revision *after* the read began, and the read waits until the copy has that revision.
//! * **C2** A leader answers from its copy without asking, because while its leadership is valid nobody else writes (T1). First
//!   it waits for the transaction that is under way, if there is one ([`super::Writer::settled`]): etcd may have stored that one,
//!   and who follows etcd may have read it. That the leadership was valid is asked after the reading.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify, watch},
    time,
};
use uncloud_proto::ids::Revision;

use super::Mirror;
use crate::store::{self, LeaderChange, Store};

/// How long a read waits until the copy has what it must have. More than a change of etcd's leader takes; a client that waits
/// longer is better off with another controller.
const FRESH_WITHIN: Duration = Duration::from_secs(4);

/// A copy that has not heard after so long of what etcd's quorum knows follows a member that is not worth it.
const BEHIND_AFTER: Duration = Duration::from_secs(1);

/// The copy of this process. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct WarmCopy {
    mirror: watch::Sender<Option<Mirror>>,
    asked: Arc<AtomicU64>,
    newest: Arc<Mutex<Newest>>,
    leader_gone: Arc<Notify>,
    behind: Arc<Notify>,
    leader: watch::Sender<Option<String>>,
}

/// What etcd last answered.
#[derive(Debug, Default)]
struct Newest {
    /// Everybody who asked up to here is answered by it: etcd was asked after them.
    covers: u64,
    revision: Revision,
}

/// The copy is not known to be new enough.
#[derive(Debug, thiserror::Error)]
pub enum Stale {
    /// etcd could not be asked.
    #[error("it cannot be told what is newest")]
    Store(#[source] store::Error),
    /// The copy does not get on.
    #[error("this controller's copy of the state is not up to date")]
    Behind,
}

impl Default for WarmCopy {
    fn default() -> Self {
        Self {
            mirror: watch::Sender::new(None),
            asked: Arc::default(),
            newest: Arc::default(),
            leader_gone: Arc::default(),
            behind: Arc::default(),
            leader: watch::Sender::new(None),
        }
    }
}

impl WarmCopy {
    /// The copy as it is, which may be old. `None`: it is being read.
    #[must_use]
    pub fn now(&self) -> Option<Mirror> {
        self.mirror.borrow().clone()
    }

    /// The copy once it has everything that was acknowledged before this was called (C1).
    ///
    /// # Errors
    ///
    /// When etcd does not answer, or the copy is too far behind.
    pub async fn fresh(&self, store: &Store) -> Result<Mirror, Stale> {
        let fresh = async {
            let revision = self.newest(store).await.map_err(Stale::Store)?;
            loop {
                match time::timeout(BEHIND_AFTER, self.reached(revision)).await {
                    Ok(mirror) => return Ok(mirror),
                    Err(_) => self.behind.notify_one(),
                }
            }
        };
        time::timeout(FRESH_WITHIN, fresh).await.unwrap_or(Err(Stale::Behind))
    }

    /// etcd's newest revision at a moment after the call. Whoever asks while etcd is being asked waits for the next answer, and
    /// shares it with all who wait: reads cost etcd one request at a time.
    async fn newest(&self, store: &Store) -> Result<Revision, store::Error> {
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut newest = self.newest.lock().await;
        if newest.covers < mine {
            // Before etcd is asked: nobody who asks after this is covered.
            let covers = self.asked.load(Ordering::Acquire);
            let revision = store.revision().await?;
            *newest = Newest { covers, revision };
        }
        Ok(newest.revision)
    }

    /// Waits until the copy has everything up to `revision`. Cancel safe.
    pub(super) async fn reached(&self, revision: Revision) -> Mirror {
        let mut changed = self.mirror.subscribe();
        loop {
            let mirror = changed.borrow_and_update().clone();
            let reached = async {
                match mirror {
                    Some(mirror) => {
                        mirror.reached(revision).await;
                        mirror
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                mirror = reached => return mirror,
                // Cannot fail: `self` has the sender.
                _ = changed.changed() => {}
            }
        }
    }

    /// Replaces the copy. Returns whether there was one; whoever watches that one is told.
    pub(super) fn put(&self, mirror: Option<Mirror>) -> bool {
        let before = self.mirror.send_replace(mirror);
        if let Some(before) = &before {
            before.retired().cancel();
        }
        before.is_some()
    }

    /// etcd told what became of the leader key.
    pub(super) fn leader_changed(&self, change: LeaderChange) {
        let address = match change {
            LeaderChange::Leads(leader) => leader.map(|l| l.address),
            LeaderChange::Gone => {
                // Whoever stands for election need not look for it.
                self.leader_gone.notify_one();
                None
            }
        };
        self.leader.send_if_modified(|known| {
            let changed = *known != address;
            *known = address;
            changed
        });
    }

    /// Waits until somebody says that the copy does not get on. Cancel safe.
    pub(super) async fn behind(&self) {
        self.behind.notified().await;
    }

    /// Told when nobody leads any more.
    #[must_use]
    pub fn leader_gone(&self) -> Arc<Notify> {
        self.leader_gone.clone()
    }

    /// Tells when it begins or ceases to be of use.
    #[must_use]
    pub fn changed(&self) -> CopyWatch {
        CopyWatch { mirror: self.mirror.subscribe(), leader: self.leader.subscribe() }
    }

    /// Where the leader serves, as the copy has it.
    #[must_use]
    pub fn leader(&self) -> Option<String> {
        self.leader.borrow().clone()
    }
}

/// See [`WarmCopy::changed`].
#[derive(Clone, Debug)]
pub struct CopyWatch {
    mirror: watch::Receiver<Option<Mirror>>,
    leader: watch::Receiver<Option<String>>,
}

impl CopyWatch {
    /// There is a copy to read, and a leader to whom all else can be passed on, who is somebody else than the one at `own`.
    pub fn serves(&mut self, own: &str) -> bool {
        let led = self.leader.borrow_and_update().as_ref().is_some_and(|leader| leader != own);
        self.mirror.borrow_and_update().is_some() && led
    }

    /// Waits for a change. For ever, if the copy is gone. Cancel safe.
    pub async fn changed(&mut self) {
        let changed = tokio::select! {
            changed = self.mirror.changed() => changed,
            changed = self.leader.changed() => changed,
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
