//! The leader's side of one agent's session.
//!
//! Mirrors `controller/src/sessions/stream.rs` and `job.rs`: Hello, claim, registration, Welcome, and then messages, commits and
//! stored reports as they come. What is decided is decided by the real `parse`, `Rules`, `desired` and `HealthTable`.

use std::time::Duration;

use uncloud_controller::{
    health::{Entry, Grant},
    leadership::WriteError,
    model::{Liveness, host::Pool},
    sessions::{
        desired::{self, Plan},
        parse::{self, Reported},
        rules::{self, OnHeartbeat, Rules},
    },
    state::{
        MAX_REPORTS,
        command::{Command, HostFacts, Refusal},
    },
};
use uncloud_proto::{
    ids::HostId,
    v1::{self, GoodbyeReason, session_request, session_response::Message},
};
use uuid::Uuid;

use super::{
    clock::{NodeClock, Ns},
    core::Core,
    lead::{Lead, Reply},
    net::CONTROLLER,
    queue::{Down, What, Whom, Written},
};

// `sessions/stream.rs`
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
const HEARTBEATS_PER_LEASE: u32 = 6;
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// What a session has stored.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    /// The host's registration.
    Register,
    /// Reports.
    Reports(Vec<Reported>),
    /// Anything else.
    Note(Command),
}

/// The last word of a session.
pub(crate) type Goodbye = (GoodbyeReason, String);

/// The term is over.
#[must_use]
pub(crate) fn not_leader() -> Goodbye {
    (GoodbyeReason::NotLeader, "this controller does not lead (any more)".to_owned())
}

#[derive(Debug)]
struct Job {
    outstanding: usize,
    acks: Vec<v1::ReportAckEntry>,
    /// What there was no room for.
    reports_again: Vec<Reported>,
    commands_again: Vec<Command>,
}

impl Job {
    const fn of(outstanding: usize) -> Self {
        Self { outstanding, acks: Vec::new(), reports_again: Vec::new(), commands_again: Vec::new() }
    }
}

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    host: HostId,
    boot_id: Uuid,
    rules: Rules,
    /// Until it is registered.
    entry: Option<Entry>,
    facts: Option<Box<HostFacts>>,
    not_before: Ns,
    welcomed: bool,
    commands: Vec<Command>,
    job: Option<Job>,
    pools: Vec<Pool>,
    /// Something was committed that it has not looked at.
    pub(super) dirty: bool,
}

impl Lead {
    /// A message of an agent.
    pub(super) fn received(
        &mut self,
        core: &mut Core,
        clock: &NodeClock,
        stream: u64,
        message: session_request::Message,
    ) {
        if !core.net.is_open(stream, CONTROLLER) {
            return; // what was on its way when this end was closed
        }
        if self.sessions.contains_key(&stream) {
            let end = self.on_message(core, clock, stream, message);
            return self.ended(core, stream, end);
        }
        let session_request::Message::Hello(hello) = message else { return };
        if !self.serves(core, clock) {
            core.send_down(stream, Down::NotLeader(None));
            return core.close(stream, CONTROLLER);
        }
        let end = self.greet(core, clock, stream, hello);
        self.ended(core, stream, end);
    }

    fn ended(&mut self, core: &mut Core, stream: u64, end: Result<(), Goodbye>) {
        if let Err(goodbye) = end {
            self.end_session(core, stream, Some(goodbye));
        }
    }

    /// Ends a session, with a last word if the agent is to have one.
    pub(super) fn end_session(&mut self, core: &mut Core, stream: u64, goodbye: Option<Goodbye>) {
        if let Some(session) = self.sessions.remove(&stream)
            && self.by_host.get(&session.host) == Some(&stream)
        {
            self.by_host.remove(&session.host);
        }
        if let Some((reason, message)) = goodbye {
            core.log(format_args!("term {}: stream {stream} ends: {}", self.term, reason.as_str_name()));
            let goodbye = v1::Goodbye { reason: reason.into(), message, leader_address: String::new() };
            self.send(core, stream, Message::Goodbye(goodbye));
        }
        core.close(stream, CONTROLLER);
    }

    /// The agent has gone.
    pub(super) fn gone(&mut self, core: &mut Core, stream: u64) {
        self.end_session(core, stream, None);
    }

    fn send(&self, core: &mut Core, stream: u64, message: Message) {
        let response = v1::SessionResponse { term: self.term.0, message: Some(message) };
        core.send_down(stream, Down::Response(Box::new(response)));
    }

    /// `greet`, `serve` and the first half of `Session::open`.
    fn greet(&mut self, core: &mut Core, clock: &NodeClock, stream: u64, hello: v1::Hello) -> Result<(), Goodbye> {
        let greeting = parse::hello(hello).map_err(|v| {
            core.check.violation(format!("a Hello is refused: {v}"));
            (GoodbyeReason::Invalid, v.to_string())
        })?;
        if greeting.newest_term > self.term {
            return Err(not_leader());
        }
        let facts = greeting.facts;
        // `SessionRegistry::claim` (S1)
        if let Some(&old) = self.by_host.get(&facts.id) {
            if self.sessions.get(&old).is_some_and(|s| s.boot_id != facts.boot_id) {
                return Err((GoodbyeReason::DuplicateHost, "another machine has a session".into()));
            }
            self.end_session(core, old, Some((GoodbyeReason::Replaced, "a newer session".into())));
        }
        let host = facts.id;
        self.by_host.insert(host, stream);
        self.arrivals.note(&self.mirror, host, &greeting.vms);
        let session = Session {
            host,
            boot_id: facts.boot_id,
            rules: Rules::new(greeting.vms),
            entry: None,
            facts: None,
            not_before: 0,
            welcomed: false,
            commands: Vec::new(),
            job: None,
            pools: facts.pools.clone(),
            dirty: false,
        };
        self.sessions.insert(stream, session);
        let entry = self.enter(core, clock, &facts)?;
        if let Some(session) = self.sessions.get_mut(&stream) {
            session.entry = Some(entry);
            session.facts = Some(Box::new(facts.clone()));
        }
        self.submit(core, Command::RegisterHost { host: Box::new(facts) }, Reply::Session(stream, Purpose::Register));
        Ok(())
    }

    fn enter(&self, core: &Core, clock: &NodeClock, facts: &HostFacts) -> Result<Entry, Goodbye> {
        // S6
        let proven = self.health.proven(facts.id, clock.tick(core.now));
        if let Some(vm) = rules::other_machine(&self.mirror, facts, proven) {
            return Err((GoodbyeReason::DuplicateHost, format!("VM {vm} may still execute")));
        }
        self.health.enter(facts.id).map_err(|e| (GoodbyeReason::DeclaredDead, e.to_string()))
    }

    /// Something that the session wanted stored is, or is not.
    pub(super) fn stored(
        &mut self,
        core: &mut Core,
        clock: &NodeClock,
        stream: u64,
        purpose: Purpose,
        result: Written,
    ) {
        let end = self.on_stored(core, clock, stream, purpose, result);
        self.ended(core, stream, end);
    }

    fn on_stored(
        &mut self,
        core: &mut Core,
        clock: &NodeClock,
        stream: u64,
        purpose: Purpose,
        result: Written,
    ) -> Result<(), Goodbye> {
        let Some(session) = self.sessions.get_mut(&stream) else { return Ok(()) };
        match (purpose, result) {
            // `register` tries again for a while; the agent's patience ends that.
            (Purpose::Register, Err(WriteError::Overloaded | WriteError::StoreFull)) => {
                self.later(core, clock.spans(BUSY_PAUSE), What::SessionAgain(stream));
                Ok(())
            }
            (Purpose::Register, Ok(_)) => {
                session.facts = None;
                self.welcome(core, clock, stream)
            }
            (Purpose::Register, Err(WriteError::Refused(refusal @ Refusal::DuplicateHost(..)))) => {
                Err((GoodbyeReason::DuplicateHost, refusal.to_string()))
            }
            (Purpose::Register, Err(WriteError::Refused(refusal))) => {
                Err((GoodbyeReason::Invalid, refusal.to_string()))
            }
            (_, Err(WriteError::NotLeader | WriteError::Unknown)) => Err(not_leader()),
            (Purpose::Reports(reports), result) => {
                session.settle(reports, &result);
                self.job_if_done(core, clock, stream);
                Ok(())
            }
            (Purpose::Note(command), result) => {
                session.settle(Vec::new(), &result);
                if let (Some(job), true) = (&mut session.job, result.is_err_and(|e| e.is_temporary())) {
                    job.commands_again.push(command);
                }
                self.job_if_done(core, clock, stream);
                Ok(())
            }
        }
    }

    fn submit_reports(&mut self, core: &mut Core, stream: u64, piece: Vec<Reported>) {
        let Some(session) = self.sessions.get(&stream) else { return };
        let reports = piece.iter().map(|r| r.seen.clone()).collect();
        let command = Command::Report { host: session.host, reports };
        self.submit(core, command, Reply::Session(stream, Purpose::Reports(piece)));
    }

    /// The second half of `Session::open`, and `Session::welcome`.
    fn welcome(&mut self, core: &mut Core, clock: &NodeClock, stream: u64) -> Result<(), Goodbye> {
        let Some(session) = self.sessions.get_mut(&stream) else { return Ok(()) };
        if let Some(entry) = session.entry.take() {
            let now = clock.tick(core.now);
            self.health.register(entry, now).map_err(|e| (GoodbyeReason::DeclaredDead, e.to_string()))?;
        }
        session.welcomed = true;
        session.dirty = false;
        let host = session.host;
        let plan = self.plan(stream)?;
        let vms = self.take_plan(stream, plan);
        let interval = (self.timings.fast / HEARTBEATS_PER_LEASE).clamp(Duration::from_millis(50), HEARTBEAT_INTERVAL);
        core.log(format_args!("term {}: host {host} is welcome, with {} VMs", self.term, vms.len()));
        self.send(
            core,
            stream,
            Message::Welcome(v1::Welcome {
                heartbeat_interval_ms: u32::try_from(interval.as_millis()).unwrap_or(u32::MAX),
                vms,
                controllers: (0..self.controllers).map(super::controller::address).collect(),
            }),
        );
        self.begin_job(core, stream);
        Ok(())
    }

    fn on_message(
        &mut self,
        core: &mut Core,
        clock: &NodeClock,
        stream: u64,
        message: session_request::Message,
    ) -> Result<(), Goodbye> {
        let Some(session) = self.sessions.get_mut(&stream) else { return Ok(()) };
        match message {
            session_request::Message::Heartbeat(heartbeat) => {
                return self.on_heartbeat(core, clock, stream, heartbeat.sequence);
            }
            session_request::Message::Report(message) => {
                let (reports, problems) = parse::report(message);
                if let Some(problems) = problems {
                    core.check.violation(format!("a report is refused: {problems}"));
                }
                self.arrivals.note(&self.mirror, session.host, &reports);
                session.rules.reported(reports);
                self.replan(core, stream)?;
            }
            session_request::Message::Pools(message) => {
                if let Ok((pools, _)) = parse::pools(message)
                    && pools != session.pools
                {
                    session.pools.clone_from(&pools);
                    session.commands.push(Command::UpdatePools { host: session.host, pools });
                }
            }
            session_request::Message::Hello(_)
            | session_request::Message::Inspection(_)
            | session_request::Message::FetchProgress(_)
            | session_request::Message::ImageFetched(_)
            | session_request::Message::ImageRemoved(_)
            // No simulated host exports a pool.
            | session_request::Message::Served(_) => {}
        }
        self.begin_job(core, stream);
        Ok(())
    }

    fn on_heartbeat(&mut self, core: &mut Core, clock: &NodeClock, stream: u64, sequence: u64) -> Result<(), Goodbye> {
        let now = clock.tick(core.now);
        // S3 is judged by the newest state.
        if self.sessions.get(&stream).is_some_and(|s| s.dirty) {
            self.replan(core, stream)?;
        }
        let Some(session) = self.sessions.get_mut(&stream) else { return Ok(()) };
        match session.rules.heartbeat(sequence) {
            OnHeartbeat::Stale => return Ok(()),
            OnHeartbeat::Withhold(vms) => {
                core.log(format_args!("term {}: no renewal for {}: {vms:?}", self.term, session.host));
                // It says that this leader is there.
                self.send(core, stream, Message::Ack(v1::ReportAck::default()));
                return Ok(());
            }
            OnHeartbeat::Ask => {}
        }
        if !self.validity.holds(now) {
            return Ok(());
        }
        match self.health.heartbeat(session.host, now) {
            Grant::Renew { fast, patient } => {
                let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
                let renewal = v1::Renewal { sequence, fast_lease_ms: millis(fast), patient_lease_ms: millis(patient) };
                self.send(core, stream, Message::Renewal(renewal));
                Ok(())
            }
            Grant::Refused(why) => Err((GoodbyeReason::DeclaredDead, why.to_string())),
        }
    }

    /// A session notices that something was committed.
    pub(super) fn wake(&mut self, core: &mut Core, _clock: &NodeClock, stream: u64) {
        if self.sessions.get(&stream).is_some_and(|s| s.dirty && s.welcomed) {
            let end = self.replan(core, stream);
            self.ended(core, stream, end);
            self.begin_job(core, stream);
        }
    }

    fn plan(&self, stream: u64) -> Result<Plan, Goodbye> {
        let Some(session) = self.sessions.get(&stream) else { return Ok(Plan::default()) };
        if self.mirror.host(session.host).is_some_and(|h| h.record.liveness == Liveness::Up) {
            return Ok(desired::plan(&self.mirror, session.host, session.rules.seen()));
        }
        Err((GoodbyeReason::DeclaredDead, "the host was declared dead or removed; say Hello again".into()))
    }

    fn replan(&mut self, core: &mut Core, stream: u64) -> Result<(), Goodbye> {
        match self.sessions.get_mut(&stream) {
            Some(session) if session.welcomed => session.dirty = false,
            Some(_) | None => return Ok(()),
        }
        let plan = self.plan(stream)?;
        let vms = self.take_plan(stream, plan);
        if !vms.is_empty() {
            self.send(core, stream, Message::Desired(v1::DesiredVms { vms }));
        }
        Ok(())
    }

    fn take_plan(&mut self, stream: u64, plan: Plan) -> Vec<v1::DesiredVm> {
        let Some(session) = self.sessions.get_mut(&stream) else { return Vec::new() };
        let changes = session.rules.planned(plan);
        for vm in changes.newly_unknown {
            session.commands.push(Command::NoteUnknownVm { host: session.host, vm });
        }
        let host = session.host;
        changes.send.iter().filter_map(|(vm, wanted)| desired::message(&self.mirror, host, *vm, *wanted)).collect()
    }

    fn begin_job(&mut self, core: &mut Core, stream: u64) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        if !session.welcomed
            || session.job.is_some()
            || core.now < session.not_before
            || (!session.rules.has_batch() && session.commands.is_empty())
        {
            return;
        }
        let reports = session.rules.batch();
        let commands = std::mem::take(&mut session.commands);
        let pieces: Vec<Vec<Reported>> = reports.chunks(MAX_REPORTS).map(<[Reported]>::to_vec).collect();
        session.job = Some(Job::of(pieces.len() + commands.len()));
        for piece in pieces {
            self.submit_reports(core, stream, piece);
        }
        for command in commands {
            self.submit(core, command.clone(), Reply::Session(stream, Purpose::Note(command)));
        }
    }

    /// What there was no room for is tried again.
    pub(super) fn try_again(&mut self, core: &mut Core, stream: u64) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        if session.welcomed {
            return self.begin_job(core, stream);
        }
        if let Some(facts) = session.facts.clone() {
            let command = Command::RegisterHost { host: facts };
            self.submit(core, command, Reply::Session(stream, Purpose::Register));
        }
    }

    fn job_if_done(&mut self, core: &mut Core, clock: &NodeClock, stream: u64) {
        let Some(session) = self.sessions.get_mut(&stream) else { return };
        if session.job.as_ref().is_none_or(|job| job.outstanding > 0) {
            return;
        }
        let Some(Job { acks, reports_again, commands_again, .. }) = session.job.take() else { return };
        if !(reports_again.is_empty() && commands_again.is_empty()) {
            let pause = clock.spans(BUSY_PAUSE);
            session.not_before = core.now + pause;
            core.after(pause, Whom::Controller(self.process.0), self.process.1, What::SessionAgain(stream));
        }
        session.rules.settled(reports_again);
        session.commands.splice(..0, commands_again);
        if !acks.is_empty() {
            self.send(core, stream, Message::Ack(v1::ReportAck { entries: acks }));
        }
        self.begin_job(core, stream);
    }
}

impl Session {
    fn settle(&mut self, reports: Vec<Reported>, result: &Written) {
        let Some(job) = &mut self.job else { return };
        job.outstanding = job.outstanding.saturating_sub(1);
        let ack = |r: &Reported| v1::ReportAckEntry { vm_id: r.seen.vm.to_string(), sequence: r.sequence };
        match result {
            Ok(_) => job.acks.extend(reports.iter().map(ack)),
            Err(error) if error.is_temporary() => job.reports_again.extend(reports),
            // It would be refused again.
            Err(_) => {}
        }
    }
}
