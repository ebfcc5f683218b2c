//! A model of etcd that speaks etcd's own gRPC API, so that the controller's real store code runs against it.
//!
//! It is one member that is always right: linearizable, because everything happens under one lock. What can go wrong with
//! an etcd is asked for: answers that are lost with the request applied or not, watches that lag, a change of etcd's leader
//! (leases have their whole TTL again), a full database. It serves over any transport: TCP in `tests/etcd_model.rs`, where
//! it is compared with the real etcd, and simulated TCP in `netsim`.
//!
//! The data outlives the server, as a disk does: an [`Etcd`] that is served again is the same one after a restart.

mod services;
mod store;

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::proto::{PbKvServer, PbLeaseServer, PbMaintenanceServer, PbWatchServer};
use store::Store;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time,
};
use tokio_stream::Stream;
use tonic::transport::{Server, server::Connected};
use uncloud_proto::clock::Clock;

/// The controllers' leader key.
const LEADER: &[u8] = b"/uncloud/v1/leader";
/// How often the model looks for leases that are over. As etcd: so a lease lasts up to this much longer than its TTL.
const EXPIRE_EVERY: Duration = Duration::from_millis(500);

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is carried out and answered.
    Answered,
    /// It is carried out, and nobody learns of it.
    AppliedAnswerLost,
    /// It is not carried out, and nobody learns of that.
    LostAnswerLost,
}

/// The model. Cheap to clone; all clones are the same etcd.
#[derive(Clone)]
pub struct Etcd {
    shared: Arc<Shared>,
}

struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    /// The newest revision and compaction: wakes the watches.
    changed: watch::Sender<u64>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Faults {
    outcomes: VecDeque<Outcome>,
    watch_delay: Duration,
}

impl Etcd {
    /// An empty one, whose leases run on `clock`.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let shared =
            Shared { store: Mutex::default(), faults: Mutex::default(), changed: watch::Sender::new(0), clock };
        Self { shared: Arc::new(shared) }
    }

    /// The next writes end so, one after the other; those after them are answered.
    pub fn next_outcomes(&self, outcomes: impl IntoIterator<Item = Outcome>) {
        self.faults().outcomes.extend(outcomes);
    }

    /// Watches tell what has happened so much later.
    pub fn delay_watches(&self, by: Duration) {
        self.faults().watch_delay = by;
    }

    /// From now on the database is full, or not any more.
    pub fn set_full(&self, full: Quota) {
        self.store().full = full == Quota::Reached;
    }

    /// Another member leads: every lease has its whole TTL again.
    pub fn leader_changed(&self) {
        let now = self.shared.clock.now();
        self.store().restart_leases(now);
    }

    /// The create revision of the key under which the leader of the controllers stands: its term.
    #[must_use]
    pub fn leader_term(&self) -> Option<i64> {
        self.store().create_revision(LEADER)
    }

    /// Forgets the history before the newest revision.
    pub fn compact(&self) {
        let mut store = self.store();
        let newest = store.revision();
        // It was compacted there already: nothing to forget.
        let _ = store.compact(newest);
        drop(store);
        self.wake();
    }

    /// Serves until it is dropped, or the connections that come in end.
    ///
    /// # Errors
    ///
    /// The transport failed.
    pub async fn serve<S>(&self, incoming: impl Stream<Item = io::Result<S>>) -> Result<(), tonic::transport::Error>
    where
        S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        // It may have been down: a member that comes up elects a leader.
        self.leader_changed();
        let server = Server::builder()
            .add_service(PbKvServer::new(self.clone()))
            .add_service(PbLeaseServer::new(self.clone()))
            .add_service(PbMaintenanceServer::new(self.clone()))
            .add_service(PbWatchServer::new(self.clone()))
            .serve_with_incoming(incoming);
        tokio::select! {
            biased;
            result = server => result,
            () = self.expire() => Ok(()),
        }
    }

    async fn expire(&self) {
        loop {
            time::sleep(EXPIRE_EVERY).await;
            let now = self.shared.clock.now();
            let mut store = self.store();
            let overdue = store.overdue(now);
            for id in &overdue {
                // It was there under the same lock.
                let _ = store.revoke(*id);
            }
            drop(store);
            if !overdue.is_empty() {
                self.wake();
            }
        }
    }

    fn wake(&self) {
        self.shared.changed.send_modify(|n| *n += 1);
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.shared.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether etcd's database has reached its quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// There is room.
    Room,
    /// It is full.
    Reached,
}
