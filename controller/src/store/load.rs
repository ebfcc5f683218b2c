//! Reading: the whole state at one revision, one key, events.

use etcd_client::{GetOptions, KeyValue, SortOrder, SortTarget};
use tokio::task;
use tokio_util::task::AbortOnDropHandle;
use uncloud_proto::ids::{Revision, Term};
use uuid::Uuid;

use super::{Error, LOAD_TIMEOUT, REQUEST_TIMEOUT, Store, kv};
use crate::{
    model::{
        EventRecord, Key, Record,
        keys::{self, EVENTS, EVENTS_END, ROOT, ROOT_END},
    },
    state::Stored,
};

/// Keys per page. For each page etcd goes through all keys up to the end of what was asked for, and counts them, so pages are large
/// and what is left of a large range is asked for in pieces ([`keys::cut`]).
const PAGE: i64 = 25_000;

/// So many keys are read into records in the task that asked for them; more are handed to a thread that may take its time.
const AT_ONCE: usize = 1000;

/// The state as it was at one revision, without the events.
#[derive(Debug)]
pub struct Loaded {
    /// The revision.
    pub revision: Revision,
    /// What is stored.
    pub entries: Vec<Stored>,
}

/// An event as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredEvent {
    /// When it was stored.
    pub revision: Revision,
    /// What happened.
    pub event: EventRecord,
}

impl Store {
    /// Reads everything but the events, all at one revision. Pages are read into records while etcd sends the next.
    ///
    /// # Errors
    ///
    /// When etcd does not answer.
    pub async fn load(&self) -> Result<Loaded, Error> {
        let mut revision = None;
        let mut pages = Vec::new();
        // Events may be many, and no decision needs them.
        let all = [(EVENTS_END, ROOT_END), (ROOT, EVENTS)];
        let mut ranges: Vec<(Vec<u8>, Vec<u8>)> = all.map(|(from, end)| (from.into(), end.into())).into();
        while let Some((from, end)) = ranges.pop() {
            let mut options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
            if let Some(r) = revision {
                options = options.with_revision(r);
            }
            let get = |client| {
                let (from, options) = (from.clone(), options.clone());
                async move { kv(&client).get(from, Some(options)).await }
            };
            let mut page = self.members.ask(LOAD_TIMEOUT, get).await?;
            if revision.is_none() {
                let header = page.header().ok_or_else(|| Error::Protocol("a range has no header".into()))?;
                revision = Some(header.revision());
            }
            let more = page.more();
            let kvs = page.take_kvs();
            if let Some(last) = kvs.last().filter(|_| more) {
                let mut from = last.key().to_vec();
                from.push(0);
                ranges.extend(keys::cut(from, end).into_iter().rev());
            }
            pages.push(Page::read(kvs));
        }
        let mut entries = Vec::new();
        for page in pages {
            entries.extend(page.records().await?);
        }
        Ok(Loaded { revision: Revision(revision.unwrap_or(0)), entries })
    }

    /// The leader key: its value and the revision at which it was created. `None`: nobody leads.
    pub(crate) async fn leader(&self) -> Result<Option<(Vec<u8>, Term)>, Error> {
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let get = |client| async move { kv(&client).get(Key::Leader.to_string(), None).await };
        let mut answer = self.members.ask(limit, get).await?;
        Ok(answer.take_kvs().into_iter().next().map(|kv| {
            let term = Term(kv.create_revision());
            (kv.into_key_value().1, term)
        }))
    }

    /// The newest events, newest first: of one subject (the nil UUID: the cluster), or of all.
    ///
    /// # Errors
    ///
    /// When etcd does not answer.
    pub async fn list_events(&self, subject: Option<Uuid>, limit: usize) -> Result<Vec<StoredEvent>, Error> {
        let prefix = subject.map_or_else(|| EVENTS.to_owned(), |s| format!("{EVENTS}{s}/"));
        let options = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
        let get = |client| {
            let (prefix, options) = (prefix.clone(), options.clone());
            async move { kv(&client).get(prefix, Some(options)).await }
        };
        let mut answer = self.members.ask(LOAD_TIMEOUT, get).await?;
        let mut events: Vec<(Key, StoredEvent)> = answer
            .take_kvs()
            .into_iter()
            .filter_map(|kv| {
                let revision = Revision(kv.mod_revision());
                let (key, value) = kv.into_key_value();
                // An event that cannot be read is worth nothing to anybody; it goes by itself within a week.
                let key = Key::parse(&key)?;
                match Record::from_json(&key, &value).ok()? {
                    Record::Event(event) => Some((key, StoredEvent { revision, event: (*event).clone() })),
                    _ => None,
                }
            })
            .collect();
        // Events of one transaction have one revision; their keys tell their order.
        events.sort_by_key(|(key, event)| std::cmp::Reverse((event.revision, order(key))));
        Ok(events.into_iter().map(|(_, event)| event).collect())
    }
}

/// Keys that are being read.
enum Page {
    Here(Vec<Stored>),
    Elsewhere(AbortOnDropHandle<Vec<Stored>>),
}

impl Page {
    fn read(kvs: Vec<KeyValue>) -> Self {
        fn read(kvs: Vec<KeyValue>) -> Vec<Stored> {
            kvs.into_iter().map(|kv| Stored::read(kv.key(), kv.value(), Revision(kv.mod_revision()))).collect()
        }
        if kvs.len() <= AT_ONCE {
            return Self::Here(read(kvs));
        }
        Self::Elsewhere(AbortOnDropHandle::new(task::spawn_blocking(move || read(kvs))))
    }

    async fn records(self) -> Result<Vec<Stored>, Error> {
        match self {
            Self::Here(records) => Ok(records),
            Self::Elsewhere(reading) => {
                reading.await.map_err(|error| Error::Protocol(format!("the state could not be read: {error}")))
            }
        }
    }
}

/// Where an event stands among those of its transaction.
const fn order(key: &Key) -> u32 {
    match key {
        Key::Event { n, .. } => *n,
        _ => 0,
    }
}
