//! What all services share: finding the leadership, reading, and time limits.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use tonic::{Status, metadata::MetadataMap};
use uncloud_proto::{READ_METADATA_KEY, clock::Clock};

use super::error;
use crate::{
    leadership::{Committed, Leader, LeaderSlot, Mirror, NotSettled, WarmCopy, WriteError},
    state::{State, command::Command},
    store::Store,
};

/// How long a request may take. Much longer than anything but a fault takes; an answer that comes later helps nobody.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Where services find the leadership. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// The leadership of this process.
    pub(crate) slot: LeaderSlot,
    /// Its copy of the state.
    pub(crate) copy: WarmCopy,
    /// etcd, once it has been reached.
    pub(crate) store: watch::Receiver<Option<Store>>,
    /// The time.
    pub(crate) clock: Clock,
    /// vCPUs promised per CPU thread, in percent.
    pub(crate) cpu_overcommit_percent: u32,
    /// Bytes of disks promised per byte of a pool, in percent.
    pub(crate) disk_overcommit_percent: u32,
}

/// How new an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// It shows everything that was acknowledged before it was asked for.
    Linearizable,
    /// It may be old: whatever this controller has at hand.
    Stale,
}

impl Freshness {
    /// What a request says in its metadata.
    pub(crate) fn of(metadata: &MetadataMap) -> Result<Self, Status> {
        match metadata.get(READ_METADATA_KEY).map(|v| v.as_bytes()) {
            None | Some(b"linearizable") => Ok(Self::Linearizable),
            Some(b"stale") => Ok(Self::Stale),
            Some(_) => Err(Status::invalid_argument(format!(
                "the metadata {READ_METADATA_KEY} must be `linearizable` (the default) or `stale`"
            ))),
        }
    }
}

/// A copy of the state that may be read.
#[derive(Clone, Debug)]
pub(crate) struct Readable {
    mirror: Mirror,
    /// What makes it fresh, if it must be asked again after the reading (C2).
    leader: Option<Arc<Leader>>,
}

impl Readable {
    /// The copy.
    pub(crate) const fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// Who leads, if this process does.
    pub(crate) fn leader(&self) -> Option<&Leader> {
        self.leader.as_deref()
    }
}

impl Context {
    /// The present leadership. Only the leader serves.
    pub(crate) fn leader(&self) -> Result<Arc<Leader>, Status> {
        Ok(self.slot.get()?)
    }

    /// Where the leader is, as far as known.
    pub(crate) fn hint(&self) -> Option<String> {
        self.slot.get().err().and_then(|e| e.hint)
    }

    /// Reads the committed state as the leader, together with what only the leader knows. What was acknowledged before this was
    /// called is seen (C2).
    pub(crate) async fn read<T>(&self, f: impl FnOnce(&Leader, &State) -> Result<T, Status>) -> Result<T, Status> {
        let leader = self.leader()?;
        leader.writer.settled().await.map_err(|NotSettled| self.term_ended())?;
        let result = leader.mirror.read(|state| f(&leader, state));
        // Asked again: this process may have been stopped for a while in between.
        if leader.is_valid() { result } else { Err(error::term_ended(self.hint())) }
    }

    /// The copy, as new as it must be: this process's own while it leads, or else the one that follows (C1).
    pub(crate) async fn readable(&self, freshness: Freshness) -> Result<Readable, Status> {
        if let Ok(leader) = self.slot.get() {
            if freshness == Freshness::Linearizable {
                leader.writer.settled().await.map_err(|NotSettled| self.term_ended())?;
            }
            return Ok(Readable { mirror: leader.mirror.clone(), leader: Some(leader) });
        }
        let mirror = match freshness {
            Freshness::Stale => self.copy.now().ok_or_else(error::no_copy)?,
            Freshness::Linearizable => {
                let store = self.store.borrow().clone().ok_or_else(error::no_copy)?;
                self.copy.fresh(&store).await.map_err(|e| error::stale(&e))?
            }
        };
        Ok(Readable { mirror, leader: None })
    }

    /// Reads what [`Context::readable`] has found.
    pub(crate) fn read_in<T>(
        &self,
        readable: &Readable,
        f: impl FnOnce(&State) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let result = readable.mirror.read(f);
        match &readable.leader {
            // This process may have been stopped for a while in between.
            Some(leader) if !leader.is_valid() => Err(error::term_ended(self.hint())),
            Some(_) | None => result,
        }
    }

    /// etcd, for what is not in memory.
    pub(crate) fn store(&self) -> Result<Store, Status> {
        self.store.borrow().clone().ok_or_else(error::no_copy)
    }

    /// Has a command carried out.
    pub(crate) async fn submit(&self, leader: &Leader, command: Command) -> Result<Committed, Status> {
        leader.writer.submit(command).await.map_err(|e| self.write_failed(e))
    }

    /// Why a command was not carried out.
    pub(crate) fn write_failed(&self, error: WriteError) -> Status {
        match error {
            WriteError::NotLeader => error::not_taken(self.hint()),
            WriteError::Refused(_) | WriteError::Unknown | WriteError::Overloaded | WriteError::StoreFull => {
                error.into()
            }
        }
    }

    /// Waits for the end of a term, for what ends with it.
    pub(crate) async fn term_over(self, leader: Arc<Leader>) -> Status {
        leader.cancel.cancelled().await;
        self.term_ended()
    }

    /// The end of a stream whose term has ended.
    pub(crate) fn term_ended(&self) -> Status {
        error::term_ended(self.hint())
    }
}

/// Answers within the time that a request may take.
pub(crate) async fn timely<T>(work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    within(REQUEST_TIMEOUT, work).await
}

/// Answers within `limit`. What is under way when it is over may still be carried out.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(error::took_too_long(limit)))
}
