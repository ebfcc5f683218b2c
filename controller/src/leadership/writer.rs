//! The single writer: commands in, transactions out, many commands per transaction.
//!
//! One transaction is under way at a time. What arrives meanwhile goes into the next one, so throughput grows with load
//! and a command alone costs one transaction. Each command is decided against a working state that already has the
//! changes of those before it; nobody is answered, not even refused, before what the answer rests on is durable. While etcd
//! works on one transaction the next is decided, if what waits will fill it.
//!
//! When a transaction fails or its outcome is not known, the term ends (T3): the working state is thrown away, and whoever
//! waited for it is told that the outcome is not known. What was decided on top of it was not sent, and changed nothing.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use futures_util::poll;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use uncloud_proto::{
    clock::{Clock, Tick},
    ids::Revision,
};

use super::{Leader, LeaderToken, Mirror, Validity};
use crate::{
    metrics::Transaction,
    model::{Key, Record},
    report,
    state::{
        State,
        command::{Answer, Change, Command, Context, Mutation, Refusal},
    },
    store::{CommitError, MAX_OPERATIONS, RetentionLeases, Store, Write},
};

/// How many commands may wait. Beyond that callers are told to come back.
const QUEUE: usize = 4096;
/// How many of one kind may wait there of those that take turns: some transactions full.
const IN_TURN: usize = 512;
/// How many commands one transaction may answer: refusals and repetitions cost no operation.
const MAX_COMMANDS: usize = 512;
/// How many bytes of records one transaction may have: well below etcd's limit of 1.5 MiB for a request.
const MAX_BYTES: usize = 1024 * 1024;
/// How many bytes the records of one command may have. etcd would refuse more than 1.5 MiB in a way that does not say that
/// nothing was written, and the term would end.
const MAX_COMMAND_BYTES: usize = 1_450_000;
/// How many bytes a key has, about.
const KEY_BYTES: usize = 64;
/// How often history is compacted, and how old what remains is at least.
const COMPACT_EVERY: Duration = Duration::from_secs(300);

/// What was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    /// What the caller is told.
    pub answer: Answer,
    /// The revision at which it holds.
    pub revision: Revision,
    /// For an answer that was given before: the revision at which it was stored.
    pub replayed: Option<Revision>,
}

/// Why a command was not carried out, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The state does not allow it. Nothing was changed.
    #[error(transparent)]
    Refused(Refusal),
    /// This controller does not lead (any more). Nothing was changed.
    #[error("this controller does not lead")]
    NotLeader,
    /// It may or may not have been carried out.
    #[error(
        "etcd's answer was lost: it is not known whether this was carried out; look, or repeat it with the same request id"
    )]
    Unknown,
    /// etcd has reached its quota. Nothing was changed.
    #[error("etcd is full: it has reached its quota")]
    StoreFull,
    /// Too many commands wait. Nothing was changed.
    #[error("too many requests are waiting")]
    Overloaded,
}

impl WriteError {
    /// Nothing was changed, and the same command may be tried again in this term.
    #[must_use]
    pub const fn is_temporary(&self) -> bool {
        match self {
            Self::StoreFull | Self::Overloaded => true,
            Self::Refused(_) | Self::NotLeader | Self::Unknown => false,
        }
    }
}

struct Job {
    command: Command,
    reply: oneshot::Sender<Result<Committed, WriteError>>,
    /// Of one that waited for its turn: until it is decided, its place is taken, whoever still waits for it.
    place: Option<OwnedSemaphorePermit>,
}

impl Job {
    /// A session that has ended says the same again in its next one.
    fn is_abandoned(&self) -> bool {
        self.place.is_some() && self.reply.is_closed()
    }
}

/// Where commands go. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
    /// Places in the queue for each [`Turn`].
    registrations: Arc<Semaphore>,
    reports: Arc<Semaphore>,
    transactions: watch::Receiver<Transactions>,
}

/// What a session has to store. Those that have the same wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Hosts that say Hello: until then they hold no lease.
    Registration,
    /// What hosts say of their VMs.
    Report,
}

/// How many transactions there were in this term.
#[derive(Clone, Copy, Debug, Default)]
struct Transactions {
    sent: u64,
    /// Of which the outcome is known, and absorbed if they were carried out.
    settled: u64,
}

impl Writer {
    /// How many commands wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// Waits until everything that etcd may have stored so far is in the mirror. Until then somebody who follows etcd may have
    /// seen more than this leader (C2). Cancel safe.
    ///
    /// # Errors
    ///
    /// When the term ends first.
    pub async fn settled(&self) -> Result<(), NotSettled> {
        let mut transactions = self.transactions.clone();
        let sent = transactions.borrow().sent;
        transactions.wait_for(|t| t.settled >= sent).await.map(drop).map_err(|_| NotSettled)
    }

    /// Carries a command out. When this returns `Ok`, it is in etcd and in the mirror. Dropping the future does not
    /// take the command back.
    ///
    /// # Errors
    ///
    /// See [`WriteError`].
    pub async fn submit(&self, command: Command) -> Result<Committed, WriteError> {
        self.hand_in(command, None).await
    }

    async fn hand_in(&self, command: Command, place: Option<OwnedSemaphorePermit>) -> Result<Committed, WriteError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.try_send(Job { command, reply, place }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => WriteError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => WriteError::NotLeader,
        })?;
        // A writer that ends without a word may have been in the middle of a transaction.
        answer.await.unwrap_or(Err(WriteError::Unknown))
    }

    /// The same, after waiting for a turn among those of the same kind: ten thousand sessions may have something to store at
    /// once, and neither users nor sessions of another kind are to wait for all of them. Dropping the future may take the command
    /// back.
    ///
    /// # Errors
    ///
    /// See [`WriteError`].
    pub async fn submit_in_turn(&self, turn: Turn, command: Command) -> Result<Committed, WriteError> {
        let places = match turn {
            Turn::Registration => &self.registrations,
            Turn::Report => &self.reports,
        };
        let place = places.clone().acquire_owned().await.map_err(|_| WriteError::NotLeader)?;
        self.hand_in(command, Some(place)).await
    }
}

/// The term has ended, and perhaps not everything that it stored is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this controller does not lead any more")]
pub struct NotSettled;

/// The writer's half of the queue.
pub struct WriterParts {
    jobs: mpsc::Receiver<Job>,
    transactions: watch::Sender<Transactions>,
}

impl Writer {
    /// Makes the queue.
    #[must_use]
    pub fn queue() -> (Self, WriterParts) {
        let (sender, jobs) = mpsc::channel(QUEUE);
        let (transactions, seen) = watch::channel(Transactions::default());
        let places = || Arc::new(Semaphore::new(IN_TURN));
        let writer = Self { jobs: sender, registrations: places(), reports: places(), transactions: seen };
        (writer, WriterParts { jobs, transactions })
    }
}

/// What the writer works with.
pub(super) struct Work {
    pub(super) token: LeaderToken,
    pub(super) validity: Validity,
    pub(super) store: Store,
    pub(super) clock: Clock,
    pub(super) state: State,
    pub(super) mirror: Mirror,
    pub(super) leases: RetentionLeases,
    pub(super) leader: Arc<Leader>,
    pub(super) cancel: CancellationToken,
}

/// A command that was decided and waits for its transaction.
struct Waiting {
    reply: oneshot::Sender<Result<Committed, WriteError>>,
    outcome: Result<(Answer, Option<Revision>), Refusal>,
}

/// What goes into one transaction.
#[derive(Default)]
struct Batch {
    /// What a key was changed to last, and the same as it is stored: a transaction may have a key once.
    mutations: BTreeMap<Key, (Option<Record>, Option<Vec<u8>>)>,
    bytes: usize,
    waiting: Vec<Waiting>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// What becomes of the term.
enum Term {
    GoesOn,
    IsOver,
}

impl Work {
    /// Runs until the term ends. Returns the token, so that the caller can resign.
    pub(super) async fn run(mut self, mut parts: WriterParts) -> LeaderToken {
        let mut jobs = Received::default();
        // Decided on top of what is being stored.
        let mut next = Batch::default();
        let mut compaction = Compaction::new(self.clock.now(), self.state.revision());
        loop {
            if jobs.waiting.is_empty() && next.is_empty() {
                tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => break,
                    job = parts.jobs.recv() => match job {
                        Some(job) => jobs.waiting.push_back(job),
                        None => break,
                    },
                    () = tokio::time::sleep(COMPACT_EVERY) => {
                        self.compact(&mut compaction).await;
                        continue;
                    }
                }
            }
            if self.leases.stale(self.clock.now()) {
                match self.store.retention_leases(self.clock.now(), Some(self.leases)).await {
                    Ok(leases) => self.leases = leases,
                    // Those of before last for much longer; if etcd does not answer, the transaction will tell.
                    Err(error) => warn!("etcd gives no leases for events and answers: {}", report(&error)),
                }
            }
            let mut batch = std::mem::take(&mut next);
            jobs.receive(&mut parts);
            fill(&mut batch, &mut jobs, &mut self.state, &self.leader);
            match self.commit(batch, &mut next, &mut jobs, &mut parts).await {
                Term::GoesOn => self.compact(&mut compaction).await,
                Term::IsOver => break,
            }
        }
        // The term is over: nothing more is decided, and nobody is left waiting.
        self.cancel.cancel();
        self.validity.end();
        parts.jobs.close();
        answer_all(next.waiting, &WriteError::NotLeader);
        for job in jobs.waiting {
            let _ = job.reply.send(Err(WriteError::NotLeader));
        }
        while let Ok(job) = parts.jobs.try_recv() {
            let _ = job.reply.send(Err(WriteError::NotLeader));
        }
        self.token
    }

    /// Writes a batch and answers everybody in it. What waits is decided into `next` while etcd works.
    async fn commit(&mut self, batch: Batch, next: &mut Batch, jobs: &mut Received, parts: &mut WriterParts) -> Term {
        let Batch { mutations, waiting, .. } = batch;
        if !self.validity.holds(self.clock.now()) || self.cancel.is_cancelled() {
            answer_all(waiting, &WriteError::NotLeader);
            return Term::IsOver;
        }
        let revision = if mutations.is_empty() {
            // Nothing to write, and what the answers rest on was durable before.
            self.state.revision()
        } else {
            let written = mutations.into_iter().map(|(key, (value, json))| {
                let write = Write { key: key.clone(), json };
                (Mutation { key, value }, write)
            });
            let (mutations, writes): (Vec<Mutation>, Vec<Write>) = written.unzip();
            parts.transactions.send_modify(|t| t.sent += 1);
            // The working state has the batch, at the revision that it is based on.
            let based_on = self.state.revision();
            let (metrics, began) = (self.leader.settings.metrics.clone(), self.clock.now());
            let stored = {
                let mut storing = pin!(self.store.commit(&self.token, writes, &self.leases, based_on));
                match poll!(storing.as_mut()) {
                    Poll::Ready(stored) => stored,
                    Poll::Pending => {
                        jobs.receive(parts);
                        // Less is decided only when it is sent, together with what comes until then: the largest first.
                        if jobs.waiting.iter().map(|job| expected(&job.command)).sum::<usize>() >= MAX_OPERATIONS {
                            fill(next, jobs, &mut self.state, &self.leader);
                        }
                        storing.await
                    }
                }
            };
            let end = match &stored {
                Ok(_) => Transaction::Stored,
                Err(CommitError::Full) => Transaction::Full,
                Err(CommitError::Deposed | CommitError::Unknown(_)) => Transaction::Lost,
            };
            metrics.transaction(end, waiting.len(), &mutations, self.clock.now().since(began));
            let revision = match stored {
                Ok(revision) => revision,
                Err(CommitError::Full) => {
                    error!(
                        "etcd is full: nothing can be stored until its quota is raised, or it is compacted and defragmented"
                    );
                    // The term goes on, or else every host would lose its leases; what was decided is forgotten.
                    self.state = self.mirror.read(State::clone);
                    parts.transactions.send_modify(|t| t.settled = t.sent);
                    answer_all(waiting, &WriteError::StoreFull);
                    answer_all(std::mem::take(next).waiting, &WriteError::StoreFull);
                    return Term::GoesOn;
                }
                Err(CommitError::Deposed) => {
                    warn!(term = %self.token.term(), "another controller leads: a write was refused by etcd");
                    answer_all(waiting, &WriteError::NotLeader);
                    return Term::IsOver;
                }
                Err(error @ CommitError::Unknown(_)) => {
                    warn!(term = %self.token.term(), "stepping down: {}", report(&error));
                    answer_all(waiting, &WriteError::Unknown);
                    return Term::IsOver;
                }
            };
            let change = Change { mutations };
            self.state.stored(&change, revision, |key| next.mutations.contains_key(key));
            self.state.touch(next.mutations.keys());
            self.mirror.absorb(change, revision);
            parts.transactions.send_modify(|t| t.settled = t.sent);
            revision
        };
        for Waiting { reply, outcome } in waiting {
            let result = match outcome {
                Ok((answer, replayed)) => Ok(Committed { answer, revision, replayed }),
                Err(refusal) => Err(WriteError::Refused(refusal)),
            };
            // A caller that has gone away is no error.
            let _ = reply.send(result);
        }
        Term::GoesOn
    }

    async fn compact(&self, compaction: &mut Compaction) {
        if let Some(revision) = compaction.due(self.clock.now(), self.state.revision())
            && let Err(error) = self.store.compact(revision).await
        {
            warn!("history could not be compacted: {}", report(&error));
        }
    }
}

/// What was taken out of the queue, and is still to be decided.
#[derive(Default)]
struct Received {
    waiting: VecDeque<Job>,
    /// The first so many had no room in a transaction, and are not overtaken.
    carried: usize,
}

impl Received {
    /// Takes as much as can be decided at once.
    fn receive(&mut self, parts: &mut WriterParts) {
        let room = MAX_COMMANDS.saturating_sub(self.waiting.len());
        let received = std::iter::from_fn(|| parts.jobs.try_recv().ok()).filter(|job| !job.is_abandoned());
        self.waiting.extend(received.take(room));
        largest_first(&mut self.waiting.make_contiguous()[self.carried..]);
    }
}

/// Decides what waits, as long as it fits into one transaction. The rest stays, for the next one.
fn fill(batch: &mut Batch, jobs: &mut Received, state: &mut State, leader: &Leader) {
    let Received { waiting: jobs, carried } = jobs;
    if jobs.is_empty() {
        return;
    }
    let cx = Context {
        now: leader.clock.wall(),
        silent: leader.silent_hosts(),
        arrived: leader.sessions.arrivals().all(),
        cpu_overcommit_percent: leader.settings.cpu_overcommit_percent,
        disk_overcommit_percent: leader.settings.disk_overcommit_percent,
    };
    while let Some(job) = jobs.pop_front() {
        if !batch.mutations.is_empty() && batch.mutations.len() + expected(&job.command) > MAX_OPERATIONS {
            jobs.push_front(job);
            break;
        }
        match state.decide(&job.command, &cx) {
            Err(refusal) => {
                leader.settings.metrics.refused();
                batch.waiting.push(Waiting { reply: job.reply, outcome: Err(refusal) });
            }
            Ok(decision) => {
                let mutations = &decision.change.mutations;
                let json: Vec<_> = mutations.iter().map(|m| m.value.as_ref().map(Record::to_json)).collect();
                let added = mutations.len();
                let bytes: usize = json.iter().map(|json| KEY_BYTES + json.as_ref().map_or(0, Vec::len)).sum();
                if added > MAX_OPERATIONS || bytes > MAX_COMMAND_BYTES {
                    error!(operations = added, bytes, "a command wants more than a transaction may have");
                    let refusal = Refusal::Precondition("this is too much at once; ask for less".into());
                    batch.waiting.push(Waiting { reply: job.reply, outcome: Err(refusal) });
                } else if !batch.mutations.is_empty()
                    && (batch.mutations.len() + added > MAX_OPERATIONS || batch.bytes + bytes > MAX_BYTES)
                {
                    jobs.push_front(job);
                    break;
                } else {
                    let expected = Revision(state.revision().0.max(1));
                    state.absorb(&decision.change, expected);
                    for (mutation, json) in decision.change.mutations.into_iter().zip(json) {
                        batch.mutations.insert(mutation.key, (mutation.value, json));
                    }
                    batch.bytes += bytes;
                    let outcome = Ok((decision.answer, decision.replayed));
                    batch.waiting.push(Waiting { reply: job.reply, outcome });
                }
            }
        }
    }
    *carried = jobs.len();
}

/// VMs that are created at the same time are given hosts higher priority first, and of equals the largest first, which are the hardest to
/// fit. Nobody can tell: whoever waits for an answer before asking for the next is never in one batch with himself. What stands
/// between creates stays where it is.
fn largest_first(jobs: &mut [Job]) {
    let size = |job: &Job| {
        let Command::CreateVm { vm, .. } = &job.command else { return None };
        Some((Reverse(vm.spec.priority), Reverse(vm.spec.memory_mib)))
    };
    for run in jobs.chunk_by_mut(|a, b| size(a).is_some() && size(b).is_some()) {
        run.sort_by_key(size);
    }
}

/// How many operations a command will probably want. What would not fit is decided only when there is a transaction for it, or
/// else it would be decided twice.
fn expected(command: &Command) -> usize {
    if let Command::Place { vms } = command {
        // A record, a status and an event for each.
        3 * vms.len()
    } else if let Command::CreateVm { .. } = command {
        // A record, its name and an event.
        3
    } else {
        1
    }
}

fn answer_all(waiting: Vec<Waiting>, error: &WriteError) {
    for Waiting { reply, .. } in waiting {
        let _ = reply.send(Err(error.clone()));
    }
}

/// When to throw history away: what is kept is between one and two periods old.
struct Compaction {
    last: Tick,
    then: Revision,
}

impl Compaction {
    const fn new(now: Tick, revision: Revision) -> Self {
        Self { last: now, then: revision }
    }

    /// The revision before which history may go, if it is time.
    fn due(&mut self, now: Tick, revision: Revision) -> Option<Revision> {
        if now.since(self.last) < COMPACT_EVERY {
            return None;
        }
        let then = self.then;
        self.last = now;
        self.then = revision;
        (then.0 > 0).then_some(then)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_of_the_last_period_is_kept() {
        let at = |s: u64| Tick::from_boot(Duration::from_secs(s));
        let mut compaction = Compaction::new(at(0), Revision(10));
        assert_eq!(compaction.due(at(299), Revision(20)), None);
        assert_eq!(compaction.due(at(300), Revision(20)), Some(Revision(10)));
        assert_eq!(compaction.due(at(400), Revision(30)), None);
        assert_eq!(compaction.due(at(600), Revision(40)), Some(Revision(20)));
    }
}
