//! What has happened since a revision, from etcd's own history.
//!
//! A leader has the changes of its own term in memory (`leadership/feed.rs`). What came before is asked of etcd, once,
//! by a watch from that revision until the leader key of this term, which is always among the changes.

use std::time::Duration;

use etcd_client::{EventType, WatchOptions};
use uncloud_proto::ids::{Revision, Term};

use super::{Error, Store, limited};
use crate::{
    model::{Key, Record, keys::ROOT},
    state::command::{Change, Mutation},
};

/// How long reading the history may take.
const HISTORY_TIMEOUT: Duration = Duration::from_secs(10);
/// How many changes are read before it is said that the history is gone: listing again is cheaper than that.
const MAX_CHANGES: usize = 100_000;

/// What was changed at one revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Logged {
    /// The revision.
    pub revision: Revision,
    /// What was changed. Records that cannot be read are left out.
    pub change: Change,
}

impl Store {
    /// All changes after `from`, up to the one that created the leader key of `term` (not included).
    ///
    /// # Errors
    ///
    /// [`Error::Compacted`] when etcd no longer has them all.
    pub async fn history(&self, from: Revision, term: Term) -> Result<Vec<Logged>, Error> {
        match tokio::time::timeout(HISTORY_TIMEOUT, self.read_history(from, term)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(HISTORY_TIMEOUT)),
        }
    }

    async fn read_history(&self, from: Revision, term: Term) -> Result<Vec<Logged>, Error> {
        let mut client = self.client.watch_client().max_decoding_message_size(super::MAX_ANSWER_BYTES);
        let options = WatchOptions::new().with_prefix().with_start_revision(from.0 + 1);
        let mut stream = limited(HISTORY_TIMEOUT, client.watch(ROOT, Some(options))).await?;
        let mut logged: Vec<Logged> = Vec::new();
        while let Some(message) = stream.message().await? {
            if message.canceled() {
                return Err(match message.compact_revision() {
                    0 => Error::Protocol(message.cancel_reason().to_owned()),
                    revision => Error::Compacted(revision),
                });
            }
            for event in message.events() {
                let Some(kv) = event.kv() else { continue };
                let revision = Revision(kv.mod_revision());
                if revision.0 >= term.0 {
                    return Ok(logged);
                }
                let Some(mutation) = mutation(event.event_type(), kv.key(), kv.value()) else { continue };
                match logged.last_mut() {
                    Some(last) if last.revision == revision => last.change.mutations.push(mutation),
                    Some(_) | None => logged.push(Logged { revision, change: Change { mutations: vec![mutation] } }),
                }
                if logged.len() > MAX_CHANGES {
                    return Err(Error::Compacted(from.0));
                }
            }
        }
        Err(Error::Protocol("the watch ended before the leader key".into()))
    }
}

fn mutation(kind: EventType, key: &[u8], value: &[u8]) -> Option<Mutation> {
    let key = Key::parse(key)?;
    let value = match kind {
        EventType::Put => Some(Record::from_json(&key, value).ok()?),
        EventType::Delete => None,
    };
    Some(Mutation { key, value })
}
