//! Who is connected: one entry for each host with a session, the questions that were put to agents, and the byte
//! streams that agents have been asked to open.
//!
//! Sessions enter and leave; API calls ask through it. It decides nothing about hosts or VMs, and nothing in it is
//! stored: it lives as long as the leader's term.
//!
//! # Invariants
//!
//! * **S1** A host has one session at a time. The same machine (boot id) replaces its old one; another machine is refused
//!   while the old session lives.
//! * **S2** Whoever waits for an agent is told at once when its session ends: everything that waits is dropped with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uncloud_proto::{
    ids::{HostId, ImageId, VmId},
    v1,
};
use uuid::Uuid;

use super::{arrivals::Arrivals, serving::Grants};

/// Orders that may wait for one session. More than this means that the agent does not read.
const ORDERS: usize = 64;

/// Pieces of a byte stream that may wait in one direction. With pieces of up to 64 KiB this bounds a console to 1 MiB.
pub const PIECES: usize = 16;

/// The table of sessions. Cheap to clone.
#[derive(Clone, Default)]
pub struct SessionRegistry {
    inner: Arc<Mutex<Inner>>,
    grants: Grants,
    arrivals: Arrivals,
}

impl std::fmt::Debug for SessionRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionRegistry").field("connected", &self.lock().sessions.len()).finish()
    }
}

#[derive(Default)]
struct Inner {
    sessions: BTreeMap<HostId, Connected>,
    queries: BTreeMap<u64, Query>,
    streams: BTreeMap<Uuid, WaitingStream>,
    last_session: u64,
    last_query: u64,
}

struct Connected {
    session: u64,
    boot_id: Uuid,
    /// It has had its Welcome: it may be asked things.
    stage: Stage,
    /// In a box each: a queue has room for 32 from the beginning, and each host has one.
    orders: mpsc::Sender<Box<Order>>,
    replaced: CancellationToken,
    facts: LiveFacts,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Greeting,
    Welcomed,
}

struct Query {
    host: HostId,
    answer: Answer,
}

/// What is waited for.
enum Answer {
    Inspection(oneshot::Sender<v1::file_inspection::Result>),
    Fetched(oneshot::Sender<v1::ImageFetched>, watch::Sender<Fetched>),
    Removed(oneshot::Sender<v1::ImageRemoved>),
}

impl Answer {
    fn is_closed(&self) -> bool {
        match self {
            Self::Inspection(sender) => sender.is_closed(),
            Self::Fetched(sender, _) => sender.is_closed(),
            Self::Removed(sender) => sender.is_closed(),
        }
    }
}

/// How far a fetch has come, as the host said last. Said anew even if nothing has come, so each word is a sign of life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes that are there.
    pub done: u64,
    /// Bytes that there will be; 0: not known.
    pub total: u64,
}

/// A fetch that a host was asked for.
#[derive(Debug)]
pub struct Fetching {
    /// How it ended. Dropped unanswered when the session ends.
    pub answer: oneshot::Receiver<v1::ImageFetched>,
    /// How far it has come.
    pub progress: watch::Receiver<Fetched>,
}

/// What an agent answers.
#[derive(Debug)]
pub enum Reply {
    /// To `InspectFile`.
    Inspection(v1::file_inspection::Result),
    /// To `FetchImage`.
    Fetched(v1::ImageFetched),
    /// To `RemoveImage`.
    Removed(v1::ImageRemoved),
}

struct WaitingStream {
    host: HostId,
    pipe: Pipe,
    attached: oneshot::Sender<()>,
}

/// What is known about a host only while it is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveFacts {
    /// Free space of each pool in bytes.
    pub free_bytes: BTreeMap<String, u64>,
    /// VMs that execute there and that the cluster knows nothing about.
    pub unknown_vms: BTreeSet<VmId>,
}

/// Something that an API call wants a session to send.
#[derive(Debug)]
pub enum Order {
    /// Attach a stream.
    OpenStream(v1::OpenStream),
    /// Look at a file.
    InspectFile(v1::InspectFile),
    /// Fetch an image.
    FetchImage(v1::FetchImage),
    /// Remove the copies of an image.
    RemoveImage(v1::RemoveImage),
}

/// The agent's end of a byte stream between a user and a guest.
#[derive(Debug)]
pub struct Pipe {
    /// To the user. Ends with an error if something went wrong.
    pub to_user: mpsc::Sender<Result<Bytes, Status>>,
    /// From the user.
    pub from_user: mpsc::Receiver<Bytes>,
    /// Both sides cancel it when they end, and end when it is cancelled.
    pub done: CancellationToken,
}

/// The host cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It has no session with this leader, or had none any more before it answered.
    #[error("the host is not connected")]
    NotConnected,
    /// Its session has too much to send already.
    #[error("the host does not take messages fast enough")]
    Busy,
}

/// Another machine has a session under this host id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "host id {host} is in use by another machine (boot id {boot_id}); each host needs a state directory of its own"
)]
pub struct OtherMachine {
    /// The host id.
    pub host: HostId,
    /// The boot id of the machine that has it.
    pub boot_id: Uuid,
}

impl SessionRegistry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What storage hosts have acknowledged.
    #[must_use]
    pub fn grants(&self) -> &Grants {
        &self.grants
    }

    /// What the targets of migrations have said to have.
    #[must_use]
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    /// Takes the place of a host's session, and ends an older one of the same machine.
    ///
    /// # Errors
    ///
    /// When another machine has it.
    pub fn claim(&self, host: HostId, boot_id: Uuid) -> Result<Claim, OtherMachine> {
        let mut inner = self.lock();
        if let Some(old) = inner.sessions.get(&host)
            && old.boot_id != boot_id
        {
            return Err(OtherMachine { host, boot_id: old.boot_id });
        }
        inner.forget(host);
        inner.last_session += 1;
        let session = inner.last_session;
        let (orders, receiver) = mpsc::channel(ORDERS);
        let replaced = CancellationToken::new();
        let connected = Connected {
            session,
            boot_id,
            stage: Stage::Greeting,
            orders,
            replaced: replaced.clone(),
            facts: LiveFacts::default(),
        };
        inner.sessions.insert(host, connected);
        Ok(Claim { registry: self.clone(), host, session, orders: receiver, replaced })
    }

    /// The hosts that have had their Welcome, in the order of their ids.
    #[must_use]
    pub fn connected(&self) -> Vec<HostId> {
        let inner = self.lock();
        inner.sessions.iter().filter(|(_, c)| c.stage == Stage::Welcomed).map(|(id, _)| *id).collect()
    }

    /// What is known about a host because it is connected. `None`: it is not.
    #[must_use]
    pub fn facts(&self, host: HostId) -> Option<LiveFacts> {
        self.lock().sessions.get(&host).filter(|c| c.stage == Stage::Welcomed).map(|c| c.facts.clone())
    }

    /// Asks a host about a file. The receiver is dropped unanswered when the session ends.
    ///
    /// # Errors
    ///
    /// When the host cannot be asked.
    pub fn inspect(
        &self,
        host: HostId,
        source: &str,
        role: v1::ImageFileRole,
    ) -> Result<oneshot::Receiver<v1::file_inspection::Result>, AskError> {
        let (answer, receiver) = oneshot::channel();
        let order =
            |query_id| Order::InspectFile(v1::InspectFile { query_id, source: source.to_owned(), role: role.into() });
        self.lock().ask(host, order, Answer::Inspection(answer))?;
        Ok(receiver)
    }

    /// Asks a host to fetch an image.
    ///
    /// # Errors
    ///
    /// When the host cannot be asked.
    pub fn fetch_image(&self, host: HostId, image: v1::Image) -> Result<Fetching, AskError> {
        let (answer, receiver) = oneshot::channel();
        let (sender, progress) = watch::channel(Fetched::default());
        let order = |query_id| Order::FetchImage(v1::FetchImage { query_id, image: Some(image) });
        self.lock().ask(host, order, Answer::Fetched(answer, sender))?;
        Ok(Fetching { answer: receiver, progress })
    }

    /// Asks a host to remove its copies of an image. The receiver is dropped unanswered when the session ends.
    ///
    /// # Errors
    ///
    /// When the host cannot be asked.
    pub fn remove_image(&self, host: HostId, image: ImageId) -> Result<oneshot::Receiver<v1::ImageRemoved>, AskError> {
        let (answer, receiver) = oneshot::channel();
        let order = |query_id| Order::RemoveImage(v1::RemoveImage { query_id, image_id: image.to_string() });
        self.lock().ask(host, order, Answer::Removed(answer))?;
        Ok(receiver)
    }

    /// Asks a host for a byte stream. `request.stream_id` is set here, at random, so that nobody can guess it.
    ///
    /// # Errors
    ///
    /// When the host cannot be asked.
    pub fn open_stream(&self, host: HostId, mut request: v1::OpenStream, pipe: Pipe) -> Result<Waiting, AskError> {
        let id = Uuid::new_v4();
        request.stream_id = id.to_string();
        let mut inner = self.lock();
        inner.send(host, Order::OpenStream(request))?;
        let (attached, receiver) = oneshot::channel();
        inner.streams.insert(id, WaitingStream { host, pipe, attached });
        Ok(Waiting { registry: self.clone(), id, attached: receiver })
    }

    /// An agent attaches a stream that it was asked for. `None`: nobody waits for it (any more).
    #[must_use]
    pub fn attach(&self, host: HostId, stream: Uuid) -> Option<Pipe> {
        let mut inner = self.lock();
        if inner.streams.get(&stream)?.host != host {
            return None;
        }
        let waiting = inner.streams.remove(&stream)?;
        // Whoever waited may just have given up; then `done` is cancelled and the pipe ends by itself.
        let _ = waiting.attached.send(());
        Some(waiting.pipe)
    }
}

impl Inner {
    fn ask(&mut self, host: HostId, order: impl FnOnce(u64) -> Order, answer: Answer) -> Result<(), AskError> {
        self.queries.retain(|_, q| !q.answer.is_closed());
        self.last_query += 1;
        let query_id = self.last_query;
        self.send(host, order(query_id))?;
        self.queries.insert(query_id, Query { host, answer });
        Ok(())
    }

    fn send(&mut self, host: HostId, order: Order) -> Result<(), AskError> {
        let connected =
            self.sessions.get(&host).filter(|c| c.stage == Stage::Welcomed).ok_or(AskError::NotConnected)?;
        connected.orders.try_send(Box::new(order)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => AskError::Busy,
            mpsc::error::TrySendError::Closed(_) => AskError::NotConnected,
        })
    }

    /// Drops a host's session and all that wait for it (S2).
    fn forget(&mut self, host: HostId) {
        if let Some(old) = self.sessions.remove(&host) {
            old.replaced.cancel();
            self.queries.retain(|_, q| q.host != host);
            self.streams.retain(|_, s| s.host != host);
        }
    }
}

/// A session's place in the table. Leaves when it is dropped.
#[derive(Debug)]
pub struct Claim {
    registry: SessionRegistry,
    host: HostId,
    session: u64,
    /// What API calls want sent.
    pub orders: mpsc::Receiver<Box<Order>>,
    /// Cancelled when a newer session has taken the place.
    pub replaced: CancellationToken,
}

impl Claim {
    /// The session has had its Welcome.
    pub fn welcomed(&self) {
        self.with(|c| c.stage = Stage::Welcomed);
    }

    /// Shows what is now known about the host.
    pub fn publish(&self, facts: LiveFacts) {
        self.with(|c| c.facts = facts);
    }

    /// Passes on what the agent found. Answers to questions that nobody asked this host are ignored.
    pub fn answer(&self, query: u64, reply: Reply) {
        let mut inner = self.registry.lock();
        let fits = |q: &Query| {
            q.host == self.host
                && matches!(
                    (&q.answer, &reply),
                    (Answer::Inspection(_), Reply::Inspection(_))
                        | (Answer::Fetched(..), Reply::Fetched(_))
                        | (Answer::Removed(_), Reply::Removed(_))
                )
        };
        if !inner.queries.get(&query).is_some_and(fits) {
            return;
        }
        let Some(asked) = inner.queries.remove(&query) else { return };
        // Whoever asked may have gone.
        match (asked.answer, reply) {
            (Answer::Inspection(sender), Reply::Inspection(result)) => drop(sender.send(result)),
            (Answer::Fetched(sender, _), Reply::Fetched(result)) => drop(sender.send(result)),
            (Answer::Removed(sender), Reply::Removed(result)) => drop(sender.send(result)),
            (Answer::Inspection(_) | Answer::Fetched(..) | Answer::Removed(_), _) => {}
        }
    }

    /// Passes on how far a fetch has come.
    pub fn progress(&self, query: u64, fetched: Fetched) {
        let inner = self.registry.lock();
        if let Some(Query { host, answer: Answer::Fetched(_, sender) }) = inner.queries.get(&query)
            && *host == self.host
        {
            sender.send_replace(fetched);
        }
    }

    fn with(&self, f: impl FnOnce(&mut Connected)) {
        let mut inner = self.registry.lock();
        if let Some(c) = inner.sessions.get_mut(&self.host).filter(|c| c.session == self.session) {
            f(c);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        if inner.sessions.get(&self.host).is_some_and(|c| c.session == self.session) {
            inner.forget(self.host);
        }
    }
}

/// A stream that an agent has been asked for. Nobody can attach it any more once this is dropped.
#[derive(Debug)]
pub struct Waiting {
    registry: SessionRegistry,
    id: Uuid,
    attached: oneshot::Receiver<()>,
}

impl Waiting {
    /// Waits until the agent has attached the stream. Cancel safe.
    ///
    /// # Errors
    ///
    /// When the host's session ended first.
    pub async fn attached(&mut self) -> Result<(), AskError> {
        (&mut self.attached).await.map_err(|_| AskError::NotConnected)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.registry.lock().streams.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u128) -> HostId {
        HostId::from_uuid(Uuid::from_u128(n))
    }

    fn boot(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn pipe() -> (Pipe, mpsc::Receiver<Result<Bytes, Status>>) {
        let (to_user, output) = mpsc::channel(1);
        let (_, from_user) = mpsc::channel(1);
        (Pipe { to_user, from_user, done: CancellationToken::new() }, output)
    }

    #[test]
    fn s1_the_same_machine_replaces_its_session_and_another_machine_is_refused() {
        let registry = SessionRegistry::default();
        let first = registry.claim(host(1), boot(1)).unwrap();
        first.welcomed();
        assert_eq!(registry.claim(host(1), boot(2)).unwrap_err().boot_id, boot(1));
        assert!(!first.replaced.is_cancelled());
        let second = registry.claim(host(1), boot(1)).unwrap();
        assert!(first.replaced.is_cancelled() && !second.replaced.is_cancelled());
        // Not yet welcomed, so it cannot be asked.
        assert!(registry.connected().is_empty());
        // The end of the old session does not end the new one.
        drop(first);
        second.welcomed();
        assert_eq!(registry.connected(), [host(1)]);
        drop(second);
        assert!(registry.connected().is_empty());
        assert!(registry.claim(host(1), boot(2)).is_ok());
    }

    #[tokio::test]
    async fn s2_whoever_waits_is_told_when_the_session_ends() {
        let registry = SessionRegistry::default();
        let claim = registry.claim(host(1), boot(1)).unwrap();
        assert_eq!(registry.inspect(host(1), "/x", v1::ImageFileRole::Disk).unwrap_err(), AskError::NotConnected);
        claim.welcomed();
        let answer = registry.inspect(host(1), "/x", v1::ImageFileRole::Disk).unwrap();
        let (pipe, mut output) = pipe();
        let mut waiting = registry.open_stream(host(1), v1::OpenStream::default(), pipe).unwrap();
        drop(claim);
        assert!(answer.await.is_err());
        assert_eq!(waiting.attached().await, Err(AskError::NotConnected));
        assert!(output.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_goes_to_the_host_that_was_asked_and_once() {
        let registry = SessionRegistry::default();
        let mut claim = registry.claim(host(1), boot(1)).unwrap();
        claim.welcomed();
        let mut waiting = registry.open_stream(host(1), v1::OpenStream::default(), pipe().0).unwrap();
        let Some(Order::OpenStream(order)) = claim.orders.recv().await.map(|order| *order) else { panic!() };
        let id: Uuid = order.stream_id.parse().unwrap();
        assert!(registry.attach(host(2), id).is_none());
        assert!(registry.attach(host(1), boot(9)).is_none());
        assert!(registry.attach(host(1), id).is_some());
        assert_eq!(waiting.attached().await, Ok(()));
        assert!(registry.attach(host(1), id).is_none());
        // Given up: nobody can attach it.
        let waiting = registry.open_stream(host(1), v1::OpenStream::default(), pipe().0).unwrap();
        let Some(Order::OpenStream(order)) = claim.orders.recv().await.map(|order| *order) else { panic!() };
        drop(waiting);
        assert!(registry.attach(host(1), order.stream_id.parse().unwrap()).is_none());
    }

    #[tokio::test]
    async fn an_answer_of_another_host_is_ignored_and_orders_are_bounded() {
        let registry = SessionRegistry::default();
        let (one, two) = (registry.claim(host(1), boot(1)).unwrap(), registry.claim(host(2), boot(2)).unwrap());
        one.welcomed();
        two.welcomed();
        let answer = registry.inspect(host(1), "/x", v1::ImageFileRole::Disk).unwrap();
        let found = |size_bytes| v1::file_inspection::Result::Facts(v1::FileFacts { size_bytes, ..Default::default() });
        two.answer(1, Reply::Inspection(found(2)));
        one.answer(7, Reply::Inspection(found(7)));
        one.answer(1, Reply::Removed(v1::ImageRemoved::default()));
        one.answer(1, Reply::Inspection(found(1)));
        assert_eq!(answer.await.unwrap(), found(1));
        for _ in 1..ORDERS {
            registry.inspect(host(1), "/x", v1::ImageFileRole::Disk).map(drop).unwrap();
        }
        assert_eq!(registry.inspect(host(1), "/x", v1::ImageFileRole::Disk).unwrap_err(), AskError::Busy);
    }
}
