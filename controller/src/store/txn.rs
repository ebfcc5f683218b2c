//! Writing. Every transaction compares the leader key's create revision with the term.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use uncloud_proto::ids::{Revision, Term};

use super::{Error, REQUEST_TIMEOUT, Retention, RetentionLeases, Store, kv};
use crate::{
    leadership::LeaderToken,
    model::{Key, Record},
};

/// Operations that one transaction may have: etcd's default `max-txn-ops`. Comparisons do not count.
pub const MAX_OPERATIONS: usize = 128;

/// How long a transaction may take. Longer than etcd is held up by an election of its own; whoever waits longer than that for a
/// member that hangs keeps everybody else from writing.
const TRANSACTION_TIMEOUT: Duration = Duration::from_millis(1200);

/// What is written under a key.
#[derive(Debug)]
pub(crate) struct Write {
    /// The key.
    pub(crate) key: Key,
    /// The record, encoded. `None`: it is deleted.
    pub(crate) json: Option<Vec<u8>>,
}

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
    /// Writes all of `writes` in one transaction, or nothing. Everything that was written before is not newer than `based_on`. A key may stand there once, and there may be
    /// [`MAX_OPERATIONS`] at the most.
    ///
    /// # Errors
    ///
    /// See [`CommitError`]. After each the caller's state is worth nothing.
    pub(crate) async fn commit(
        &self,
        token: &LeaderToken,
        writes: Vec<Write>,
        leases: &RetentionLeases,
        based_on: Revision,
    ) -> Result<Revision, CommitError> {
        let put = writes.iter().find(|w| w.json.is_some()).map(|w| w.key.to_string());
        let operations: Vec<TxnOp> = writes.into_iter().map(|w| operation(w, leases)).collect();
        let txn = Txn::new().when([token.compare()]).and_then(operations);
        let send = |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        let answer = match self.members.ask_once(TRANSACTION_TIMEOUT, send).await {
            Ok(answer) => answer,
            Err(error) if is_full(&error) => return self.landed(put, based_on).await,
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

    /// Whether a transaction was carried out that etcd answered with "full". It says so before it proposes one, when it refuses one,
    /// and also when it has carried out the one with which the quota was reached. Whichever it was is over when the answer
    /// comes, so a quorum's newest value of `put`, a key that was to be put, tells.
    async fn landed(&self, put: Option<String>, based_on: Revision) -> Result<Revision, CommitError> {
        let Some(put) = put else {
            let error = Error::Protocol("etcd says that it is full for a transaction that only deletes".into());
            return Err(CommitError::Unknown(error));
        };
        let get = |client| {
            let key = put.clone();
            async move { kv(&client).get(key, None).await }
        };
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let answer = self.members.ask(limit, get).await.map_err(CommitError::Unknown)?;
        match answer.kvs().first().map(|found| Revision(found.mod_revision())) {
            // Nobody else writes in this term.
            Some(revision) if revision > based_on => Ok(revision),
            Some(_) | None => Err(CommitError::Full),
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

/// etcd has reached its quota.
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

fn operation(write: Write, leases: &RetentionLeases) -> TxnOp {
    let key = write.key.to_string();
    match write.json {
        Some(json) => {
            let options = retention(&write.key).map(|r| PutOptions::new().with_lease(leases.id(r)));
            TxnOp::put(key, json, options)
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

/// Holds during that term.
pub(super) fn leads(term: Term) -> Compare {
    Compare::create_revision(Key::Leader.to_string(), CompareOp::Equal, term.0)
}

impl LeaderToken {
    /// Holds as long as the leader key is the one that this token was made for.
    pub(super) fn compare(&self) -> Compare {
        leads(self.term())
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
        let txn = Txn::new().when([leads(term)]).and_then([TxnOp::delete(Key::Leader.to_string(), None)]);
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let send = |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        };
        self.members.ask(limit, send).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use uncloud_proto::ids::VmId;
    use uuid::Uuid;

    use super::*;

    fn mac(n: u8) -> Key {
        Key::Mac(format!("42:00:00:00:00:{n:02}"))
    }

    #[tokio::test]
    async fn whether_a_transaction_landed_although_etcd_is_full_is_seen_in_etcd() {
        let dir = tempfile::tempdir().unwrap();
        let etcd = super::super::embedded::EmbeddedEtcd::start(dir.path(), None).unwrap();
        let store = Store::connect(&[etcd.endpoint().to_owned()]).await.unwrap();
        let begin = std::time::Instant::now();
        let before = loop {
            match store.revision().await {
                Ok(revision) => break revision,
                Err(error) => assert!(begin.elapsed() < Duration::from_secs(30), "{error}"),
            }
        };
        assert!(matches!(store.landed(Some(mac(1).to_string()), before).await, Err(CommitError::Full)));
        let value = Record::Mac(VmId::from_uuid(Uuid::from_u128(1))).to_json();
        store.client().kv_client().put(mac(1).to_string(), value, None).await.unwrap();
        let landed = store.landed(Some(mac(1).to_string()), before).await.unwrap();
        assert!(landed > before);
        // An older value of the key says that it did not.
        assert!(matches!(store.landed(Some(mac(1).to_string()), landed).await, Err(CommitError::Full)));
        assert!(matches!(store.landed(None, before).await, Err(CommitError::Unknown(_))), "it only deletes");
    }
}
