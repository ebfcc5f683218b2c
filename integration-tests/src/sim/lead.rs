//! One term of a leader: its beginning, the writer, and its end.
//!
//! Mirrors `controller/src/leadership/writer.rs` (group commit: decide against the working state, one transaction at a time,
//! answer when it is durable, end the term when the outcome is unknown) and `leadership/leader.rs` (`begin`, `announce`). What
//! is decided is decided by the real `State`, `HealthTable` and `Validity`.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use uncloud_controller::{
    health::{HealthTable, Timings, Verdict},
    leadership::{Committed, Validity, WriteError},
    model::{EventType, Key, Record},
    reconcile::drain::Drains,
    reconcile::migrations::Migrations,
    reconcile::plan::Attempts,
    sessions::arrivals::Arrivals,
    state::{
        State,
        command::{Answer, Change, Command, Context, Mutation, Refusal},
    },
    store::MAX_OPERATIONS,
};
use uncloud_proto::ids::{HostId, Revision, Term, VmId};

use super::{
    clock::{MS, NodeClock},
    core::Core,
    etcd::{Basis, Response},
    queue::{What, Whom, Written},
    reconciler::{Driver, Pass},
    session::{Purpose, Session},
    user::{Answered, Call},
};

// `reconcile/driver.rs`
const PERIOD: Duration = Duration::from_millis(100);
/// `reconcile/driver.rs`
const BUSY_PAUSE: Duration = Duration::from_millis(500);
// `leadership/writer.rs`
const MAX_COMMANDS: usize = 512;

/// Who waits for a command.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// A user, for a call.
    User(u64),
    /// A session.
    Session(u64, Purpose),
    /// The reconciler: what it said about the brake is stored.
    Brake(bool),
    /// The reconciler: a verdict.
    Verdict(Verdict),
    /// The reconciler: the leases on record.
    Leases,
    /// The reconciler: a migration that cannot go on. Nobody waits.
    GaveUp,
    /// The reconciler: a batch of placements.
    Placed,
    /// The reconciler: a step of a drain, about this VM.
    Drained(VmId),
    /// The beginning of the term: the leases are on record.
    Announced,
    /// The beginning of the term: the election is noted.
    Elected,
}

#[derive(Debug)]
struct Job {
    command: Command,
    reply: Reply,
}

type Outcome = Result<(Answer, Option<Revision>), Refusal>;

#[derive(Debug, Default)]
struct Batch {
    mutations: BTreeMap<Key, Option<Record>>,
    waiting: Vec<(Reply, Outcome)>,
}

/// A term.
#[derive(Debug)]
pub(crate) struct Lead {
    pub(super) serial: u64,
    pub(super) term: Term,
    pub(super) lease: i64,
    pub(super) validity: Validity,
    pub(super) mirror: State,
    pub(super) health: HealthTable,
    pub(super) sessions: BTreeMap<u64, Session>,
    pub(super) by_host: BTreeMap<HostId, u64>,
    pub(super) arrivals: Arrivals,
    pub(super) timings: Timings,
    pub(super) controllers: usize,
    /// A transaction that the process is to send.
    pub(super) to_commit: Option<(Vec<Mutation>, Basis)>,
    pub(super) process: (usize, u64),
    state: State,
    queue: VecDeque<Job>,
    writing: Option<Batch>,
    pub(super) driver: Driver,
    serving: bool,
    over: bool,
}

impl Lead {
    pub(super) fn begin(
        core: &mut Core,
        clock: &NodeClock,
        process: (usize, u64),
        (serial, term, lease): (u64, Term, i64),
        validity: Validity,
        state: State,
    ) -> Self {
        let took_over = clock.tick(core.now);
        let timings = core.config.timings[process.0];
        // `Stored::longest`
        let stored = state.cluster().cloned();
        let longest = stored.as_ref().map_or(timings, |c| {
            timings.longest(Timings {
                fast: Duration::from_millis(c.fast_lease_ms),
                patient: Duration::from_millis(c.patient_lease_ms),
                ..timings
            })
        });
        let hosts = state.hosts().map(|(&id, entry)| (id, entry.record.liveness));
        let health = HealthTable::new(timings, longest, hosts, took_over);
        let driver = Driver {
            attempts: Attempts::default(),
            migrations: Migrations::default(),
            drains: Drains::default(),
            announced: false,
            verdicts: Vec::new(),
            pass: Pass::Idle,
            again: false,
            busy_until: 0,
        };
        let mut lead = Self {
            serial,
            term,
            lease,
            validity,
            mirror: state.clone(),
            health,
            sessions: BTreeMap::new(),
            by_host: BTreeMap::new(),
            arrivals: Arrivals::default(),
            timings,
            controllers: core.config.controllers,
            to_commit: None,
            process,
            state,
            queue: VecDeque::new(),
            writing: None,
            driver,
            serving: false,
            over: false,
        };
        lead.later(core, 0, What::Watch(serial));
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let (fast_lease_ms, patient_lease_ms) = (millis(longest.fast), millis(longest.patient));
        let needed = stored.is_none_or(|c| c.fast_lease_ms != fast_lease_ms || c.patient_lease_ms != patient_lease_ms);
        if needed {
            lead.submit(core, Command::SetLeases { fast_lease_ms, patient_lease_ms }, Reply::Announced);
        } else {
            lead.note_election(core);
        }
        lead
    }

    fn note_election(&mut self, core: &mut Core) {
        let message = format!("controller {} leads, term {}", self.process.0, self.term);
        self.submit(core, Command::Note { event: EventType::LeaderElected, message }, Reply::Elected);
    }

    pub(super) fn later(&self, core: &mut Core, delay: u64, what: What) {
        core.after(delay, Whom::Controller(self.process.0), self.process.1, what);
    }

    /// A session has something to do a moment later.
    pub(super) fn wake_session(&self, core: &mut Core, stream: u64) {
        let delay = core.latency();
        self.later(core, delay, What::SessionWake(stream));
    }

    /// The term ends.
    pub(super) fn cancel(&mut self) {
        self.over = true;
        self.validity.end();
    }

    pub(super) const fn is_over(&self) -> bool {
        self.over
    }

    pub(super) const fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Whether it may act as the leader (`LeaderSlot::get`).
    pub(super) fn serves(&self, core: &Core, clock: &NodeClock) -> bool {
        self.serving && !self.over && self.validity.holds(clock.tick(core.now))
    }

    /// What happens in this term.
    pub(super) fn on(&mut self, core: &mut Core, clock: &NodeClock, what: What) {
        match what {
            What::Watch(serial) if serial == self.serial && !self.over => {
                if self.validity.holds(clock.tick(core.now)) {
                    let at = clock.when(self.validity.until(), core.now);
                    self.later(core, at - core.now, What::Watch(serial));
                } else {
                    core.log(format_args!("term {}: no longer certain", self.term));
                    self.cancel();
                }
            }
            What::WriterWake(serial) if serial == self.serial => self.write(core, clock),
            What::DriverTick(serial) if serial == self.serial && !self.over => {
                self.later(core, clock.spans(PERIOD), What::DriverTick(serial));
                if self.driver.may_begin(core.now) {
                    self.look(core, clock);
                }
            }
            What::DriverWake(serial) if serial == self.serial && !self.over && self.driver.is_wanted(core.now) => {
                self.place(core, clock);
            }
            What::SessionWake(stream) if !self.over => self.wake(core, clock, stream),
            What::SessionAgain(stream) if !self.over => self.try_again(core, stream),
            _ => {}
        }
    }

    pub(super) fn call(&mut self, core: &mut Core, call: Call) {
        self.submit(core, call.command, Reply::User(call.op));
    }

    /// The sessions end, and nobody is left waiting.
    pub(super) fn finish(&mut self, core: &mut Core) {
        let jobs = std::mem::take(&mut self.queue);
        for job in jobs {
            self.tell(core, job.reply, Err(WriteError::NotLeader));
        }
        let streams: Vec<u64> = self.sessions.keys().copied().collect();
        for stream in streams {
            self.end_session(core, stream, Some(super::session::not_leader()));
        }
    }

    // --- the writer ---

    pub(super) fn submit(&mut self, core: &mut Core, command: Command, reply: Reply) {
        if self.over {
            return self.tell(core, reply, Err(WriteError::NotLeader));
        }
        self.queue.push_back(Job { command, reply });
        if self.writing.is_none() {
            let delay = core.rng.range(1, MS / 2);
            self.later(core, delay, What::WriterWake(self.serial));
        }
    }

    fn write(&mut self, core: &mut Core, clock: &NodeClock) {
        if self.writing.is_some() || self.over || self.queue.is_empty() {
            return;
        }
        let batch = self.fill(core, clock);
        if !self.validity.holds(clock.tick(core.now)) {
            for (reply, _) in batch.waiting {
                self.tell(core, reply, Err(WriteError::NotLeader));
            }
            return self.cancel();
        }
        if batch.mutations.is_empty() {
            let revision = self.state.revision();
            self.answer(core, clock, batch.waiting, revision);
            return self.go_on(core);
        }
        let mutations: Vec<Mutation> =
            batch.mutations.iter().map(|(key, value)| Mutation { key: key.clone(), value: value.clone() }).collect();
        let basis = mutations.iter().filter_map(|m| self.believed(&m.key)).collect();
        self.to_commit = Some((mutations, basis));
        self.writing = Some(batch);
    }

    fn go_on(&self, core: &mut Core) {
        if !self.queue.is_empty() {
            self.later(core, 1, What::WriterWake(self.serial));
        }
    }

    fn fill(&mut self, core: &Core, clock: &NodeClock) -> Batch {
        let silent = self.health.silent(clock.tick(core.now));
        let cx = Context {
            now: core.wall_of(self.process.0),
            silent,
            arrived: self.arrivals.all(),
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
        };
        let mut batch = Batch::default();
        while let Some(job) = self.queue.pop_front() {
            match self.state.decide(&job.command, &cx) {
                Err(refusal) => batch.waiting.push((job.reply, Err(refusal))),
                Ok(decision) => {
                    let added = decision.change.mutations.len();
                    if added > MAX_OPERATIONS {
                        let refusal = Refusal::Precondition("this is too much at once; ask for less".into());
                        batch.waiting.push((job.reply, Err(refusal)));
                    } else if !batch.mutations.is_empty() && batch.mutations.len() + added > MAX_OPERATIONS {
                        self.queue.push_front(job);
                        break;
                    } else {
                        let expected = Revision(self.state.revision().0.max(1));
                        self.state.absorb(&decision.change, expected);
                        for mutation in decision.change.mutations {
                            batch.mutations.insert(mutation.key, mutation.value);
                        }
                        batch.waiting.push((job.reply, Ok((decision.answer, decision.replayed))));
                    }
                }
            }
            if batch.waiting.len() >= MAX_COMMANDS {
                break;
            }
        }
        batch
    }

    /// What this leader takes a record in etcd to be. Only for the checker.
    fn believed(&self, key: &Key) -> Option<(Key, Option<Record>)> {
        let record = match key {
            Key::Vm(id) => self.mirror.vm(*id).map(|e| Record::Vm(e.record.clone())),
            Key::VmStatus(id) => self.mirror.vm(*id)?.status.clone().map(Record::VmStatus),
            Key::Host(id) => self.mirror.host(*id).map(|e| Record::Host(e.record.clone())),
            _ => return None,
        };
        Some((key.clone(), record))
    }

    /// etcd has answered, or not.
    pub(super) fn committed(&mut self, core: &mut Core, clock: &NodeClock, response: Option<Response>) {
        let Some(Batch { mutations, waiting }) = self.writing.take() else { return };
        let error = match response {
            Some(Response::Written(revision)) => {
                let mutations = mutations.into_iter().map(|(key, value)| Mutation { key, value }).collect();
                let change = Change { mutations };
                self.state.absorb(&change, revision);
                self.mirror.absorb(&change, revision);
                self.changed(core);
                self.answer(core, clock, waiting, revision);
                return self.go_on(core);
            }
            Some(Response::Full) => {
                // The term goes on; what was decided is forgotten.
                core.log(format_args!("term {}: {}", self.term, WriteError::StoreFull));
                self.state = self.mirror.clone();
                for (reply, _) in waiting {
                    self.told(core, clock, reply, Err(WriteError::StoreFull));
                }
                return self.go_on(core);
            }
            Some(Response::Deposed) => WriteError::NotLeader,
            // T3
            Some(_) | None => WriteError::Unknown,
        };
        core.log(format_args!("term {}: {error}", self.term));
        for (reply, _) in waiting {
            self.tell(core, reply, Err(error.clone()));
        }
        self.cancel();
    }

    fn answer(&mut self, core: &mut Core, clock: &NodeClock, waiting: Vec<(Reply, Outcome)>, revision: Revision) {
        for (reply, outcome) in waiting {
            let result = match outcome {
                Ok((answer, replayed)) => Ok(Committed { answer, revision, replayed }),
                Err(refusal) => Err(WriteError::Refused(refusal)),
            };
            self.told(core, clock, reply, result);
        }
    }

    /// Tells those who need no clock to hear that they are too late.
    fn tell(&mut self, core: &mut Core, reply: Reply, result: Written) {
        match reply {
            Reply::User(op) => super::user::answer(core, op, Answered::Written(result)),
            // Their tasks end with the term.
            Reply::Session(..)
            | Reply::Brake(_)
            | Reply::Verdict(_)
            | Reply::Leases
            | Reply::GaveUp
            | Reply::Placed
            | Reply::Drained(_)
            | Reply::Announced
            | Reply::Elected => {}
        }
    }

    fn told(&mut self, core: &mut Core, clock: &NodeClock, reply: Reply, result: Written) {
        match reply {
            Reply::User(op) => super::user::answer(core, op, Answered::Written(result)),
            _ if self.over => {}
            // `Stop::Busy`: the pass ends, and another comes after a while. A term that cannot say what it grants ends.
            Reply::Announced if is_temporary(&result) => self.cancel(),
            Reply::Verdict(_) if is_temporary(&result) => {
                self.driver.busy(core.now + clock.spans(BUSY_PAUSE));
                self.verdict_stored(core, clock);
            }
            Reply::Brake(_) | Reply::Leases | Reply::Placed | Reply::Drained(_) if is_temporary(&result) => {
                self.driver.busy(core.now + clock.spans(BUSY_PAUSE));
                self.driver.pass = Pass::Idle;
            }
            Reply::Session(stream, purpose) => self.stored(core, clock, stream, purpose, result),
            Reply::Announced => self.note_election(core),
            Reply::Elected => {
                self.serving = true;
                self.later(core, 0, What::DriverTick(self.serial));
            }
            Reply::Brake(engaged) => {
                self.driver.announced = engaged;
                self.declare(core, clock);
            }
            Reply::Verdict(verdict) => {
                match result {
                    Ok(_) => self.health.declared(verdict),
                    Err(_) => self.health.remove(verdict.host),
                }
                self.verdict_stored(core, clock);
            }
            Reply::GaveUp => {}
            Reply::Leases => self.place(core, clock),
            Reply::Placed => {
                if let Pass::Placing { current, situation, now, .. } = &mut self.driver.pass {
                    let (vms, situation, now) = (std::mem::take(current), situation.clone(), *now);
                    self.driver.attempts.note(&vms, &situation, &self.mirror, now);
                }
                self.next_batch(core, clock);
            }
            Reply::Drained(vm) => {
                if result.is_err() {
                    self.driver.drains.refused(vm, clock.tick(core.now));
                }
                self.drain(core, clock);
            }
        }
    }

    fn verdict_stored(&mut self, core: &mut Core, clock: &NodeClock) {
        if let Pass::Declaring(left) = &mut self.driver.pass {
            *left -= 1;
            if *left == 0 {
                if self.driver.is_busy(core.now) {
                    self.driver.pass = Pass::Idle;
                } else {
                    self.shorten(core, clock);
                }
            }
        }
    }

    /// The revision that a transaction is based on.
    pub(super) const fn based_on(&self) -> Revision {
        self.state.revision()
    }

    /// Something was committed: the reconciler and the sessions are woken.
    fn changed(&mut self, core: &mut Core) {
        self.driver.again = true;
        let delay = core.latency();
        self.later(core, delay, What::DriverWake(self.serial));
        let streams: Vec<u64> = self.sessions.keys().copied().collect();
        for stream in streams {
            if let Some(session) = self.sessions.get_mut(&stream) {
                session.dirty = true;
            }
            self.wake_session(core, stream);
        }
    }
}

fn is_temporary(result: &Written) -> bool {
    result.as_ref().is_err_and(WriteError::is_temporary)
}
