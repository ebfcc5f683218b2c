//! Writing. Every transaction compares the leader key's create revision with the term.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use uncloud_proto::ids::{Revision, Term};

use super::{Error, REQUEST_TIMEOUT, Retention, RetentionLeases, Store, kv};
use crate::{
    leadership::LeaderToken,
    model::{Key, Record},
    state::command::Mutation,
};

/// Operations that one transaction may have: etcd's default `max-txn-ops`. Comparisons do not count.
pub const MAX_OPERATIONS: usize = 128;

/// How long a transaction may take. Longer than etcd is held up by an election of its own; whoever waits longer than that for a
/// member that hangs keeps everybody else from writing.
const TRANSACTION_TIMEOUT: Duration = Duration::from_millis(1200);

/// Why a transaction was not carried out, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Another leader, or none, holds the leader key: nothing was written.
    #[error("leadership was lost")]
    Deposed,
    /// etcd has reached its quota (`NOSPACE`) and refuses to grow: nothing was written.
    #[error("etcd is full")]
    Full,
    /// It may or may not have been carried out. The state must be read again before anything is decided.
    #[error("the outcome of a transaction is not known")]
    Unknown(#[source] Error),
}

impl Store {
    /// Writes all of `mutations` in one transaction, or nothing. A key may stand there once, and there may be
    /// [`MAX_OPERATIONS`] at the most.
    ///
    /// # Errors
    ///
    /// See [`CommitError`]. After each the caller's state is worth nothing.
    pub(crate) async fn commit(
        &self,
        token: &LeaderToken,
        mutations: &[Mutation],
        leases: &RetentionLeases,
    ) -> Result<Revision, CommitError> {
        let operations: Vec<TxnOp> = mutations.iter().map(|m| operation(m, leases)).collect();
        let txn = Txn::new().when([token.compare()]).and_then(operations);
        let send = |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        let answer = match self.members.ask_once(TRANSACTION_TIMEOUT, send).await {
            Ok(answer) => answer,
            Err(error) if is_full(&error) => return Err(CommitError::Full),
            Err(error) => return Err(CommitError::Unknown(error)),
        };
        if !answer.succeeded() {
            return Err(CommitError::Deposed);
        }
        match answer.header() {
            Some(header) => Ok(Revision(header.revision())),
            None => Err(CommitError::Unknown(Error::Protocol("a transaction's answer has no header".into()))),
        }
    }

    /// Throws away the history before `revision`.
    ///
    /// # Errors
    ///
    /// When etcd does not answer; the next time will do.
    pub async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        self.members.ask(limit, |client| async move { kv(&client).compact(revision.0, None).await }).await?;
        Ok(())
    }
}

/// etcd refuses what would need room, before it is proposed or when it is applied, on all members alike. So this is an answer: the
/// transaction was not carried out.
fn is_full(error: &Error) -> bool {
    match error {
        Error::Unavailable(error) => match &**error {
            etcd_client::Error::GRpcStatus(status) => {
                status.code() == tonic::Code::ResourceExhausted && status.message().contains("database space exceeded")
            }
            _ => false,
        },
        Error::Timeout(_) | Error::Protocol(_) | Error::Compacted(_) => false,
    }
}

fn operation(mutation: &Mutation, leases: &RetentionLeases) -> TxnOp {
    let key = mutation.key.to_string();
    match &mutation.value {
        Some(record) => {
            let options = retention(&mutation.key).map(|r| PutOptions::new().with_lease(leases.id(r)));
            TxnOp::put(key, record.to_json(), options)
        }
        None => TxnOp::delete(key, None),
    }
}

/// Keys that go by themselves after a while.
const fn retention(key: &Key) -> Option<Retention> {
    match key {
        Key::Request(_) => Some(Retention::Requests),
        Key::Event { .. } => Some(Retention::Events),
        Key::Vm(_)
        | Key::VmStatus(_)
        | Key::VmName { .. }
        | Key::Mac(_)
        | Key::Host(_)
        | Key::Image(_)
        | Key::Leader
        | Key::Cluster => None,
    }
}

impl LeaderToken {
    /// Holds as long as the leader key is the one that this token was made for.
    pub(super) fn compare(&self) -> Compare {
        Compare::create_revision(Key::Leader.to_string(), CompareOp::Equal, self.term().0)
    }
}

/// The outcome of a try to create the leader key.
#[derive(Debug)]
pub(crate) enum Claim {
    /// It was created at this revision, which is the term.
    Won(Revision),
    /// Somebody has it.
    Taken,
}

impl Store {
    /// Creates the leader key under an etcd lease, if nobody has it.
    pub(crate) async fn claim_leader(&self, record: &Record, lease: i64) -> Result<Claim, Error> {
        let key = Key::Leader.to_string();
        let txn = Txn::new().when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)]).and_then([TxnOp::put(
            key,
            record.to_json(),
            Some(PutOptions::new().with_lease(lease)),
        )]);
        // What became of a claim whose answer is lost is seen at the next look.
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let send = |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        let answer = self.members.ask_once(limit, send).await?;
        let header = answer.header().ok_or_else(|| Error::Protocol("a transaction's answer has no header".into()))?;
        Ok(if answer.succeeded() { Claim::Won(Revision(header.revision())) } else { Claim::Taken })
    }

    /// Deletes the leader key, if it is still the one that was created at this revision.
    pub(crate) async fn remove_leader(&self, term: Term) -> Result<(), Error> {
        let same = Compare::create_revision(Key::Leader.to_string(), CompareOp::Equal, term.0);
        let txn = Txn::new().when([same]).and_then([TxnOp::delete(Key::Leader.to_string(), None)]);
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let send = |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        self.members.ask(limit, send).await?;
        Ok(())
    }
}
