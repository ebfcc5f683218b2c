//! What all services share: finding the leadership, reading under it, and time limits.

use std::{sync::Arc, time::Duration};

use tonic::Status;

use super::error;
use crate::{
    leadership::{Committed, Leader, LeaderSlot, WriteError},
    state::{State, command::Command},
};

/// How long a request may take. Much longer than anything but a fault takes; an answer that comes later helps nobody.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Where services find the leadership. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// The leadership of this process.
    pub(crate) slot: LeaderSlot,
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

    /// Reads the committed state. What was acknowledged before this was called is seen: the mirror has a change before its
    /// caller is answered, and while the leadership is valid nobody else writes.
    pub(crate) fn read<T>(&self, f: impl FnOnce(&Leader, &State) -> Result<T, Status>) -> Result<T, Status> {
        let leader = self.leader()?;
        let result = leader.mirror.read(|state| f(&leader, state));
        // Asked again: this process may have been stopped for a while in between.
        if leader.is_valid() { result } else { Err(error::term_ended(self.hint())) }
    }

    /// Has a command carried out.
    pub(crate) async fn submit(&self, leader: &Leader, command: Command) -> Result<Committed, Status> {
        leader.writer.submit(command).await.map_err(|e| self.write_failed(e))
    }

    /// Why a command was not carried out.
    pub(crate) fn write_failed(&self, error: WriteError) -> Status {
        match error {
            WriteError::NotLeader => error::not_taken(self.hint()),
            WriteError::Refused(_) | WriteError::Unknown | WriteError::Overloaded => error.into(),
        }
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
