//! What happens in etcd after a revision, as it happens, or until another one.
//!
//! The copy of each controller follows etcd in this way (`leadership/follow.rs`), and a watch that resumes at a revision
//! that is no longer in memory reads what it has missed (`leadership/feed.rs`).
//!
//! All keys are watched, not only ours: then the newest revision that was seen is etcd's own, so it can be told whether a
//! copy has everything up to a revision. Keys that are not ours are counted and otherwise passed over.

use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use uncloud_proto::ids::Revision;

use super::{
    Error, REQUEST_TIMEOUT, Store, kv,
    members::{Member, Members, limited},
};
use crate::{
    model::{
        Key, LeaderRecord, Record,
        keys::{ROOT, ROOT_END},
    },
    report,
    state::command::{Change, Mutation},
};

/// How long reading the history may take.
const HISTORY_TIMEOUT: Duration = Duration::from_secs(10);
/// How many changes are read before it is said that the history is gone: listing again is cheaper than that.
const MAX_CHANGES: usize = 100_000;

/// What was changed at one revision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logged {
    /// The revision.
    pub revision: Revision,
    /// What was changed. Records that cannot be read are not in it. Empty if it was none of our keys.
    pub change: Change,
    /// Keys of ours whose record cannot be read, and why.
    pub unreadable: Vec<(String, String)>,
    /// What became of the leader key.
    pub leader: Option<LeaderChange>,
}

/// What became of the leader key.
#[derive(Clone, Debug, PartialEq)]
pub enum LeaderChange {
    /// Somebody leads; `None` if the record cannot be read.
    Leads(Option<LeaderRecord>),
    /// Nobody does.
    Gone,
}

/// Changes as they happen.
pub(crate) struct Changes {
    stream: WatchStream,
    member: Member,
    members: Members,
}

impl Changes {
    /// The next ones, oldest first, each revision whole. Waits for them; may be none. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Vec<Logged>, Error> {
        let message = match self.stream.message().await {
            Ok(Some(message)) if !message.canceled() => return Ok(logged(&message)),
            Ok(message) => message,
            Err(error) => {
                self.give_up();
                return Err(error.into());
            }
        };
        match message.as_ref().map_or(0, WatchResponse::compact_revision) {
            0 => {
                self.give_up();
                let reason = message.as_ref().map_or("", WatchResponse::cancel_reason);
                Err(Error::Protocol(format!("the watch ended: {reason}")))
            }
            revision => Err(Error::Compacted(revision)),
        }
    }

    /// The member that tells them is not to be asked any more.
    pub(crate) fn give_up(&self) {
        self.members.failed(&self.member);
    }
}

/// etcd splits no revision over two messages, unless it is asked to.
fn logged(message: &WatchResponse) -> Vec<Logged> {
    let mut list: Vec<Logged> = Vec::new();
    for event in message.events() {
        let Some(kv) = event.kv() else { continue };
        let revision = Revision(kv.mod_revision());
        if list.last().is_none_or(|last| last.revision != revision) {
            list.push(Logged { revision, ..Logged::default() });
        }
        if let Some(last) = list.last_mut() {
            last.take(event.event_type(), kv.key(), kv.value());
        }
    }
    list
}

impl Logged {
    fn take(&mut self, kind: EventType, key: &[u8], value: &[u8]) {
        if !(ROOT.as_bytes()..ROOT_END.as_bytes()).contains(&key) {
            return;
        }
        let text = || String::from_utf8_lossy(key).into_owned();
        let value = match kind {
            EventType::Put => Some(value),
            EventType::Delete => None,
        };
        let Some(parsed) = Key::parse(key) else {
            if value.is_some() {
                self.unreadable.push((text(), "not a key that this program knows".into()));
            }
            return;
        };
        let record = value.map(|v| Record::from_json(&parsed, v)).transpose();
        if parsed == Key::Leader {
            self.leader = Some(match &record {
                Ok(None) => LeaderChange::Gone,
                Ok(Some(Record::Leader(leader))) => LeaderChange::Leads(Some((**leader).clone())),
                Ok(Some(_)) | Err(_) => LeaderChange::Leads(None),
            });
        }
        match record {
            Ok(value) => self.change.mutations.push(Mutation { key: parsed, value }),
            Err(error) => self.unreadable.push((text(), report(&error))),
        }
    }
}

impl Store {
    /// All changes after `from`, as they happen.
    ///
    /// # Errors
    ///
    /// When etcd does not answer. That the history is gone is said by the first [`Changes::next`].
    pub(crate) async fn changes(&self, from: Revision) -> Result<Changes, Error> {
        let member = self.members.current();
        let mut client = member.client.watch_client().max_decoding_message_size(super::MAX_ANSWER_BYTES);
        let options = WatchOptions::new().with_all_keys().with_start_revision(from.0 + 1);
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let opened = limited(limit, client.watch(Vec::new(), Some(options))).await;
        let members = self.members.clone();
        match opened {
            Ok(stream) => Ok(Changes { stream, member, members }),
            Err(error) => {
                members.failed(&member);
                Err(error)
            }
        }
    }

    /// All changes after `from` up to and with `until`, which has happened.
    ///
    /// # Errors
    ///
    /// [`Error::Compacted`] when etcd no longer has them all, or they are more than anybody wants to read.
    pub async fn history(&self, from: Revision, until: Revision) -> Result<Vec<Logged>, Error> {
        let read = async {
            let mut changes = self.changes(from).await?;
            let mut all: Vec<Logged> = Vec::new();
            // Something has happened at every revision, and all keys are watched.
            while all.last().is_none_or(|last| last.revision < until) {
                all.extend(changes.next().await?);
                if all.len() > MAX_CHANGES {
                    return Err(Error::Compacted(from.0));
                }
            }
            all.retain(|logged| logged.revision <= until);
            Ok(all)
        };
        if from >= until {
            return Ok(Vec::new());
        }
        match tokio::time::timeout(HISTORY_TIMEOUT, read).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(HISTORY_TIMEOUT)),
        }
    }

    /// etcd's newest revision, as a quorum of its members knows it: everything that was acknowledged before this was called
    /// is not newer.
    ///
    /// # Errors
    ///
    /// When etcd does not answer.
    pub async fn revision(&self) -> Result<Revision, Error> {
        let options = etcd_client::GetOptions::new().with_keys_only();
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let get = |client| {
            let options = options.clone();
            async move { kv(&client).get(Key::Leader.to_string(), Some(options)).await }
        };
        let answer = self.members.ask(limit, get).await?;
        let header = answer.header().ok_or_else(|| Error::Protocol("a range has no header".into()))?;
        Ok(Revision(header.revision()))
    }
}
