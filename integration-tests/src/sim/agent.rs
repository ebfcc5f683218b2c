//! An agent process: its start, and its session with the leader. The tasks of its VMs are in `runner.rs`.
//!
//! Mirrors `agent/src/app.rs` (start), `session/connect.rs` (dial), `session/pump.rs` (Hello, Welcome, messages, heartbeats)
//! and `vm/manager.rs`. What is decided is decided by the real `Dialer`, `Gate`, `Heartbeats`,
//! `Outbox`, `Mailbox`, `Acceptance`, `LeaseWord` and `VmState`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use uncloud_agent::{
    lease::LeaseClass,
    session::{
        dialer::{Dialer, Outcome},
        gate::{Admission, Gate},
        heartbeat::{self, Heartbeats},
        outbox::Outbox,
        pump::{End, end_of_goodbye},
    },
    vm::{
        desired::{self, Desired},
        state::{Acceptance, Effect, Event as VmEvent, VmState},
    },
};
use uncloud_proto::{
    AGENT_PROTOCOL,
    clock::Tick,
    ids::{Term, VmId},
    v1::{self, session_request, session_response::Message},
};

use super::{
    clock::MS,
    controller,
    core::Core,
    host::Host,
    net::{AGENT, WELCOME_TIMEOUT},
    queue::{DiskWork, Down, Up, What, Whom},
    runner::Runner,
};

// `session/pump.rs`
const HEARTBEAT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));
const MOST_LEASE: Duration = Duration::from_secs(3600);
const SILENT_BEATS: u32 = 2;
const SILENCE_SLACK: Duration = Duration::from_millis(200);
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Session {
    pub(super) stream: u64,
    book: Heartbeats,
    interval: Option<Duration>,
    /// When the leader said something, on the host's clock.
    heard: Tick,
}

/// An agent process.
#[derive(Debug)]
pub(crate) struct Agent {
    gate: Gate,
    pub(super) outbox: Outbox,
    dialer: Dialer,
    pub(super) runners: BTreeMap<VmId, Runner>,
    pub(super) looking: BTreeSet<VmId>,
    pub(super) session: Option<Session>,
    dialled: bool,
    /// Until then the session is held up in writing a renewal: it is one task, which takes nothing else meanwhile.
    renewing_until: u64,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    Welcomed,
}

impl Agent {
    fn has_session(&self, stream: u64, stage: Stage) -> bool {
        let is = |s: &Session| if s.interval.is_some() { Stage::Welcomed } else { Stage::Greeting };
        self.session.as_ref().is_some_and(|s| s.stream == stream && is(s) == stage)
    }
}

impl Host {
    /// Starts the agent. Its VMs have not noticed that it was away.
    pub(crate) fn start_agent(&mut self, core: &mut Core) {
        if !self.powered || self.agent.is_some() {
            return;
        }
        self.agent_epoch += 1;
        self.open_lease();
        core.log(format_args!("host {}: the agent starts", self.index));
        let controllers = (0..core.config.controllers).map(controller::address).collect();
        let mut agent = Agent {
            gate: Gate::new(self.term, BTreeMap::new()),
            outbox: Outbox::default(),
            dialer: Dialer::new(controllers),
            runners: BTreeMap::new(),
            looking: BTreeSet::new(),
            session: None,
            dialled: false,
            renewing_until: 0,
        };
        // `Manager::adopt_all`
        let mut incarnations = BTreeMap::new();
        for vm in self.dirs() {
            let state = match self.records.get(&vm) {
                Some(record) => {
                    incarnations.insert(vm, record.desired.incarnation);
                    VmState::from_record(record.clone())
                }
                None => VmState::without_record(vm),
            };
            agent.looking.insert(vm);
            let now = self.now(core);
            let mut runner = Runner::new(state, now);
            self.perform_one(core, vm, &mut runner, Effect::Adopt);
            agent.outbox.put(vm, runner.state.report());
            agent.runners.insert(vm, runner);
        }
        agent.gate = Gate::new(self.term, incarnations);
        let patience = if agent.looking.is_empty() { MS } else { 500 * MS };
        core.after(patience, Whom::Agent(self.index), self.agent_epoch, What::Patience);
        self.agent = Some(Box::new(agent));
    }

    /// Kills the agent. Its streams break; its VMs go on.
    pub(crate) fn kill_agent(&mut self, core: &mut Core) {
        if self.agent.take().is_none() {
            return;
        }
        core.log(format_args!("host {}: the agent dies", self.index));
        self.agent_epoch += 1;
        for stream in core.streams_of(AGENT, self.index) {
            core.close(stream, AGENT);
        }
    }

    /// Something happens to the agent.
    pub(crate) fn on_agent(&mut self, core: &mut Core, what: What) {
        let Some(mut agent) = self.agent.take() else { return };
        match what {
            What::Patience => self.dial_first(core, &mut agent),
            What::Dial => self.dial(core, &mut agent),
            What::Beat(stream) => self.beat(core, &mut agent, stream),
            What::WelcomeTimeout(stream) if agent.has_session(stream, Stage::Greeting) => {
                // It is not known here whether the Hello came through.
                let reached = core.rng.permille(500);
                let end = if reached { End::Unanswered } else { End::Unreachable("no Welcome".into()) };
                self.session_ended(core, &mut agent, end);
            }
            // The session is one task; what comes while it is held up waits, in its order.
            What::Down(..) | What::Broken(_) | What::Silent(_) if core.now <= agent.renewing_until => {
                self.agent_later(core, agent.renewing_until - core.now + 1, what);
            }
            What::Silent(stream) if agent.has_session(stream, Stage::Welcomed) => self.silent(core, &mut agent),
            What::Down(stream, down) if agent.session.as_ref().is_some_and(|s| s.stream == stream) => {
                if let Some(session) = &mut agent.session {
                    session.heard = self.now(core);
                }
                if let Err(end) = self.take(core, &mut agent, *down) {
                    self.session_ended(core, &mut agent, end);
                }
            }
            What::Broken(stream) => {
                if let Some(session) = agent.session.as_ref().filter(|s| s.stream == stream) {
                    let words = "the connection is gone".to_owned();
                    let end = if session.interval.is_some() { End::Served(words) } else { End::Unreachable(words) };
                    self.session_ended(core, &mut agent, end);
                } else {
                    core.close(stream, AGENT);
                }
            }
            What::Flush(stream) if agent.has_session(stream, Stage::Welcomed) => {
                let vms = agent.outbox.unsent(256);
                if !vms.is_empty() {
                    core.send_up(stream, Up(session_request::Message::Report(v1::Report { vms })));
                }
            }
            What::Renew(class, deadline, now) => {
                let fresh = self.write_renewal(core, class, deadline, now);
                self.lease_changed(core, &agent, fresh);
            }
            What::Spawn(start) => self.spawn(core, *start),
            What::Mail(vm) => self.mail(core, &mut agent, vm),
            What::Timer(vm) => {
                let now = self.now(core);
                match agent.runners.get(&vm).and_then(|r| r.state.deadline(r.now)) {
                    Some(at) if now >= at => self.handle(core, &mut agent, vm, VmEvent::Wake),
                    // The clock runs at another rate than when this was planned.
                    Some(at) => {
                        let at = self.clock.when(at, core.now) + 1;
                        core.at(at, Whom::Agent(self.index), self.agent_epoch, What::Timer(vm));
                    }
                    None => {}
                }
            }
            What::Disks(vm, epoch, work, DiskWork::Copied(desired, copies)) => {
                self.copied(core, &agent, vm, (epoch, work), &desired, copies);
            }
            What::Disks(vm, _, _, DiskWork::Drop(paths)) => self.drop_files(core, vm, &paths),
            What::Done(vm, work, event, uid) => self.work_done(core, &mut agent, vm, work, *event, uid),
            What::Instance(vm, uid, event) => {
                if let Some(runner) = agent.runners.get_mut(&vm).filter(|r| r.instance == Some(uid)) {
                    if matches!(*event, VmEvent::Ended(_)) {
                        runner.instance = None;
                    }
                    self.handle(core, &mut agent, vm, *event);
                }
            }
            _ => {}
        }
        self.agent = Some(agent);
    }

    pub(super) fn agent_later(&self, core: &mut Core, delay: u64, what: What) {
        core.after(delay, Whom::Agent(self.index), self.agent_epoch, what);
    }

    // --- the session ---

    pub(super) fn dial_first(&self, core: &mut Core, agent: &mut Agent) {
        if !agent.dialled {
            agent.dialled = true;
            self.agent_later(core, 0, What::Dial);
        }
    }

    fn dial(&self, core: &mut Core, agent: &mut Agent) {
        if agent.session.is_some() {
            return;
        }
        let Some(to) = controller::index_of(agent.dialer.address()) else { return };
        let stream = core.open_stream(self.index, to, [self.agent_epoch, u64::MAX]);
        agent.session = Some(Session { stream, book: Heartbeats::default(), interval: None, heard: self.now(core) });
        let pool = |name: &str, kind: v1::PoolKind, id: String| v1::Pool {
            name: name.into(),
            kind: kind.into(),
            id,
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            ..Default::default()
        };
        let hello = v1::Hello {
            host_id: self.id.to_string(),
            name: format!("host-{}", self.index),
            boot_id: self.boot_id.to_string(),
            agent_version: "0".into(),
            protocol: AGENT_PROTOCOL,
            capacity: Some(v1::Resources { vcpus: 64, memory_mib: 65_536 }),
            pools: vec![
                pool("local", v1::PoolKind::Local, String::new()),
                pool("shared", v1::PoolKind::Shared, self.shared_pool.to_string()),
            ],
            accelerator: Some(v1::Accelerator { kind: v1::AcceleratorKind::Kvm.into(), ..Default::default() }),
            vms: agent.outbox.hello(),
            newest_term: agent.gate.newest_term().0,
            // In one of three clusters only the first host takes migrations: a drain of it may have to stop VMs.
            migration_address: if self.index == 0 || !self.shared_pool.as_bytes()[0].is_multiple_of(3) {
                format!("10.0.0.{}", self.index)
            } else {
                String::new()
            },
            ..Default::default()
        };
        core.send_up(stream, Up(session_request::Message::Hello(hello)));
        self.agent_later(core, WELCOME_TIMEOUT, What::WelcomeTimeout(stream));
    }

    /// The end of `Session::run`, and what `connect.rs` makes of it.
    fn session_ended(&self, core: &mut Core, agent: &mut Agent, end: End) {
        let Some(session) = agent.session.take() else { return };
        core.close(session.stream, AGENT);
        let generations = self.generations();
        for (&vm, runner) in &agent.runners {
            runner.mailbox.session_ended(generations);
            self.wake_runner(core, vm);
        }
        core.log(format_args!("host {}: stream {} ends: {end:?}", self.index, session.stream));
        agent.dialer.ended(match end {
            End::Served(_) | End::Cancelled => Outcome::Served,
            End::NotLeader(hint) => Outcome::NotLeader(hint),
            End::Silent => Outcome::Silent,
            End::Unreachable(_) => Outcome::Unreachable,
            End::Unanswered => Outcome::Unanswered,
            End::Deferred(_) => Outcome::Deferred,
            End::Refused(_) => Outcome::Refused,
        });
        let random = core.rng.fraction();
        let wait = self.clock.spans(agent.dialer.wait(random)) + MS;
        self.agent_later(core, wait, What::Dial);
    }

    /// `Session::pump`: a leader that hangs keeps its connections, and is left.
    fn silent(&self, core: &mut Core, agent: &mut Agent) {
        let Some(Session { stream, interval: Some(interval), heard, .. }) = &agent.session else { return };
        let patience = (*interval * SILENT_BEATS + SILENCE_SLACK).max(SHORTEST_SILENCE);
        let until = heard.after(patience);
        if self.now(core) >= until {
            return self.session_ended(core, agent, End::Silent);
        }
        let at = self.clock.when(until, core.now).max(core.now + 1);
        core.at(at, Whom::Agent(self.index), self.agent_epoch, What::Silent(*stream));
    }

    /// G1 and G3 (`Session::admit`).
    fn admit(&mut self, agent: &mut Agent, term: Term) -> Result<(), String> {
        match agent.gate.term(term) {
            Ok(Admission::Same) => Ok(()),
            Ok(Admission::Newer(term)) => {
                if self.disk_full > 0 {
                    return Err("the term cannot be written".into());
                }
                self.term = term;
                agent.gate.term_stored(term);
                Ok(())
            }
            Err(stale) => Err(stale.to_string()),
        }
    }

    /// `Session::welcome` and `Session::take`.
    fn take(&mut self, core: &mut Core, agent: &mut Agent, down: Down) -> Result<(), End> {
        let served = agent.session.as_ref().is_some_and(|s| s.interval.is_some());
        let failed = |words: String| if served { End::Served(words) } else { End::Unreachable(words) };
        let response = match down {
            Down::Response(response) => *response,
            Down::NotLeader(hint) => return Err(End::NotLeader(hint)),
        };
        let Some(message) = response.message else { return Ok(()) };
        if !served && let Message::Goodbye(goodbye) = &message {
            return Err(end_of_goodbye(goodbye, false));
        }
        self.admit(agent, Term(response.term)).map_err(failed)?;
        match message {
            Message::Welcome(welcome) => {
                agent.dialer.welcomed(&welcome.controllers);
                let interval = Duration::from_millis(welcome.heartbeat_interval_ms.into());
                if let Some(session) = &mut agent.session {
                    session.interval = Some(interval.clamp(HEARTBEAT.0, HEARTBEAT.1));
                    let stream = session.stream;
                    self.agent_later(core, 0, What::Beat(stream));
                    self.agent_later(core, 0, What::Flush(stream));
                    self.agent_later(core, 0, What::Silent(stream));
                }
                for vm in &welcome.vms {
                    self.obey(core, agent, vm);
                }
            }
            Message::Renewal(renewal) => self.renewed(core, agent, &renewal),
            Message::Desired(desired) => desired.vms.iter().for_each(|vm| self.obey(core, agent, vm)),
            Message::Ack(ack) => self.acknowledged(core, agent, &ack),
            Message::Goodbye(goodbye) => return Err(end_of_goodbye(&goodbye, true)),
            Message::OpenStream(_) | Message::InspectFile(_) | Message::FetchImage(_) | Message::RemoveImage(_) => {}
            // It exports no pool.
            Message::Serve(_) => {}
        }
        Ok(())
    }

    fn beat(&self, core: &mut Core, agent: &mut Agent, stream: u64) {
        let now = self.now(core);
        let Some(Session { book, interval: Some(interval), .. }) =
            agent.session.as_mut().filter(|s| s.stream == stream)
        else {
            return;
        };
        // H1: the moment is taken before the heartbeat is on its way.
        let sequence = book.send(now);
        let wait = self.clock.spans(*interval);
        core.send_up(stream, Up(session_request::Message::Heartbeat(v1::Heartbeat { sequence })));
        self.agent_later(core, wait, What::Beat(stream));
    }

    /// `Session::renew`
    fn renewed(&mut self, core: &mut Core, agent: &mut Agent, renewal: &v1::Renewal) {
        let Some(session) = &mut agent.session else { return };
        let Some(sent) = session.book.answered(renewal.sequence) else { return };
        let now = self.now(core);
        let leases = [(LeaseClass::Fast, renewal.fast_lease_ms), (LeaseClass::Patient, renewal.patient_lease_ms)];
        let mut fresh = false;
        for (class, length_ms) in leases {
            let length = Duration::from_millis(length_ms).min(MOST_LEASE);
            let Some(deadline) = heartbeat::deadline(sent, length, now) else { continue };
            if !core.healed && core.rng.permille(10) {
                core.stats.fault("renewal written late");
                let delay = core.between(1, 7000);
                agent.renewing_until = agent.renewing_until.max(core.now + delay);
                self.agent_later(core, delay, What::Renew(class, deadline, now));
            } else {
                fresh |= self.write_renewal(core, class, deadline, now);
            }
        }
        self.lease_changed(core, agent, fresh);
    }

    /// Whether it began a new lease.
    fn write_renewal(&mut self, core: &mut Core, class: LeaseClass, deadline: Tick, now: Tick) -> bool {
        let before = self.word(class);
        let word = self.renew(core, class, deadline, now);
        if word.generation != before.generation {
            core.log(format_args!("host {}: a new lease, {class}, generation {}", self.index, word.generation));
        }
        word.generation != before.generation
    }

    /// `Manager::lease_changed`
    fn lease_changed(&self, core: &mut Core, agent: &Agent, fresh: bool) {
        if fresh {
            for (&vm, runner) in &agent.runners {
                runner.mailbox.lease_changed();
                self.wake_runner(core, vm);
            }
        }
    }

    /// `Session::obey` and `Manager::desired`
    fn obey(&self, core: &mut Core, agent: &mut Agent, message: &v1::DesiredVm) {
        let Ok((vm, incarnation)) = desired::identify(message) else { return };
        if agent.gate.incarnation(vm, incarnation).is_err() {
            return core.log(format_args!("host {}: an old word about {vm} is ignored", self.index));
        }
        let desired = match Desired::from_proto(incarnation, message) {
            Ok(desired) => desired,
            Err(problem) => return core.check.violation(format!("a desired state is refused: {problem}")),
        };
        core.log(format_args!("host {}: {vm} {incarnation} {:?}", self.index, desired.disposition));
        let now = self.now(core);
        let acceptance = Acceptance::of(self.word(desired.class()), now);
        let runner = agent.runners.entry(vm).or_insert_with(|| Runner::new(VmState::new(vm), now));
        // A runner that is there has an open mailbox: it is removed in the same step in which it closes.
        if runner.mailbox.desired(desired, acceptance).is_err() {
            core.check.violation("a mailbox is closed".into());
        }
        self.wake_runner(core, vm);
    }

    fn acknowledged(&self, core: &mut Core, agent: &mut Agent, ack: &v1::ReportAck) {
        for entry in &ack.entries {
            let Ok(vm) = entry.vm_id.parse() else { continue };
            if agent.outbox.acknowledge(vm, entry.sequence) {
                agent.gate.over(vm);
                if let Some(runner) = agent.runners.get(&vm) {
                    runner.mailbox.over();
                    self.wake_runner(core, vm);
                }
            }
        }
    }

    fn wake_runner(&self, core: &mut Core, vm: VmId) {
        let delay = core.latency();
        self.agent_later(core, delay, What::Mail(vm));
    }
}
