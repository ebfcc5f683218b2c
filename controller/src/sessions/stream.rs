//! One agent's session: a task that owns its state, from Hello to Goodbye.
//!
//! `message → rules → effects`: the decisions are in `rules.rs` and `desired.rs`. This file waits, sends, and asks the
//! writer and `health/`. Heartbeats are answered by this task itself, while reports are being stored, because a lease must
//! not wait for etcd.
//!
//! # Safety argument (P1)
//!
//! * A heartbeat is answered only if the leadership is valid at a moment that was read after the heartbeat was received
//!   (L2), `health/` grants it (L4), and nothing that belongs elsewhere may execute on the host (S3). S3 is judged by the
//!   newest committed state and everything that the host reported before the heartbeat.
//! * Another machine with a host's id, or the same one after a reboot, registers only once the leases of before have surely run
//!   out (S6, [`other_machine`]).
//! * A Hello may have been read before this controller led ([`Waiting`]). It is as old as one that was long on its way, and all that is judged
//!   by time is judged after the wait: the leadership, the leases of before, the verdicts.
//! * A host is granted leases only after `RegisterHost` is stored, with no verdict between (L4), and is told what to run only
//!   after that.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time,
};
use tonic::{Status, Streaming};
use tracing::{Instrument, debug, info, info_span, warn};
use uncloud_proto::{
    ids::{HostId, Incarnation, Revision, Term, VmId},
    v1::{self, session_request, session_response::Message},
};

use super::{
    desired::{self, Plan},
    job::{self, Job, JobResult},
    outgoing::{End, Item, Outgoing},
    parse::{self, Greeting},
    registry::{Claim, Fetched, LiveFacts, Order, Reply},
    rules::{self, OnHeartbeat, Rules},
    serving::{self, Grants, Said},
};
use crate::{
    health::Grant,
    leadership::{Leader, LeaderSlot, NotLeader, Sleeper, Turn, WriteError},
    metrics::{Heartbeat, Metrics},
    model::{Liveness, host::Pool},
    report,
    state::command::{Command, HostFacts, Refusal, ServedObservation},
};

/// How long an agent may take to say Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an agent may wait at a controller that does not lead and knows nobody else who does. It costs that much of the lease, if the
/// leader is there after all.
const ELECTION_PATIENCE: Duration = Duration::from_secs(1);
/// So many controllers can be named as not reached.
const UNREACHED: usize = 16;
/// How often an agent sends a heartbeat, at the most. The short lease holds at least six.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// How many heartbeats fit into the short lease, at the least. Fewer, and one lost packet would matter.
const HEARTBEATS_PER_LEASE: u32 = 6;
/// How long a job waits that etcd had no room for.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// How long a registration waits for room. Shorter than the lease that the host may still have.
const GREETING_PATIENCE: Duration = Duration::from_secs(3);
/// VMs in one message, and bytes: one with much user data has 200 KiB. Well below the limit of a message.
const VMS_PER_MESSAGE: usize = 500;
const BYTES_PER_MESSAGE: usize = 2 << 20;

/// Where an agent may go that says Hello to this controller.
#[derive(Debug)]
pub(crate) struct Waiting {
    slot: LeaderSlot,
    metrics: Metrics,
    /// Controllers that the agent has lost or not reached.
    unreached: Vec<String>,
}

impl Waiting {
    /// For an agent that says this in its metadata ([`uncloud_proto::UNREACHED_METADATA_KEY`]).
    pub(crate) fn new(slot: LeaderSlot, metrics: Metrics, unreached: Option<&str>) -> Self {
        let unreached = unreached.into_iter().flat_map(|all| all.split(',')).take(UNREACHED).map(str::to_owned);
        Self { slot, metrics, unreached: unreached.collect() }
    }

    /// Where it may go at once: to this controller, which leads, or away. `None`: it comes from the only leader that is known here, and another
    /// may be elected.
    pub(crate) fn place(&self) -> Option<Result<Arc<Leader>, NotLeader>> {
        match self.slot.get() {
            Ok(leader) => Some(Ok(leader)),
            Err(NotLeader { hint: Some(hint) }) if self.unreached.contains(&hint) => None,
            // Who knows of no leader does not see etcd, or stops, or had to stop leading: it is not the next one.
            Err(other) => Some(Err(other)),
        }
    }

    fn hint(&self) -> Option<String> {
        self.slot.get().err().and_then(|e| e.hint)
    }

    /// Waits for that. When a leader dies its agents are here, with their Hello read, before the next one is elected, instead of all of
    /// them dialling this controller again and again until it leads.
    async fn wait(&self) -> Result<Arc<Leader>, NotLeader> {
        let mut changed = self.slot.changed();
        if let Some(place) = self.place() {
            return place;
        }
        let before = self.hint();
        // Whoever is elected now is news, also if the agent did not reach it before. That nobody is known for a moment is none: so it is
        // here while another takes the leader key.
        let elected = changed.wait_for(|now| match now {
            Ok(_) => true,
            Err(NotLeader { hint }) => hint.is_some() && *hint != before,
        });
        // Without any: perhaps the leader is there and the agent did not reach it for a moment.
        let _ = time::timeout(ELECTION_PATIENCE, elected).await;
        self.slot.get()
    }
}

/// Serves one session until it ends, and says why to the agent.
pub(crate) async fn run(waiting: Waiting, mut inbound: Streaming<v1::SessionRequest>, queue: mpsc::Sender<Item>) {
    let span = info_span!(parent: None, "session", host = tracing::field::Empty, term = tracing::field::Empty);
    async {
        let (leader, greeting) = match receive(&waiting, &mut inbound, &queue).await {
            Ok(found) => found,
            Err(end) => {
                waiting.metrics.session_ended(end.name());
                match &end {
                    End::Goodbye(v1::GoodbyeReason::Invalid, message) => info!("no session: {message}"),
                    End::Gone | End::Goodbye(..) | End::Failed(_) => debug!("no session: {end:?}"),
                }
                let term = waiting.slot.get().map_or(Term(0), |leader| leader.term);
                return Outgoing::new(term, queue).finish(end, waiting.hint());
            }
        };
        tracing::Span::current().record("term", tracing::field::display(leader.term));
        let out = Outgoing::new(leader.term, queue);
        let end = tokio::select! {
            biased;
            () = leader.cancel.cancelled() => End::not_leader(),
            end = serve(&leader, greeting, &mut inbound, &out) => end,
        };
        leader.settings.metrics.session_ended(end.name());
        match &end {
            End::Gone => info!("the agent has gone"),
            End::Goodbye(reason, message) => info!(reason = reason.as_str_name(), "session ended: {message}"),
            End::Failed(status) => warn!("session ended: {}", status.message()),
        }
        out.finish(end, waiting.hint());
    }
    .instrument(span)
    .await;
}

/// Reads the Hello, and finds the leader who takes it.
async fn receive(
    waiting: &Waiting,
    inbound: &mut Streaming<v1::SessionRequest>,
    queue: &mpsc::Sender<Item>,
) -> Result<(Arc<Leader>, Greeting), End> {
    let greeting = match greet(inbound).await {
        Err(End::Gone) => return Err(End::Gone),
        // What is wrong with it is said by the leader.
        greeting => greeting,
    };
    let leader = tokio::select! {
        biased;
        () = queue.closed() => return Err(End::Gone),
        leader = waiting.wait() => leader.map_err(|_| End::not_leader())?,
    };
    let greeting = greeting?;
    if greeting.newest_term > leader.term {
        // Somebody leads who was elected after this controller.
        return Err(End::not_leader());
    }
    Ok((leader, greeting))
}

async fn serve(
    leader: &Leader,
    greeting: Greeting,
    inbound: &mut Streaming<v1::SessionRequest>,
    out: &Outgoing,
) -> End {
    tracing::Span::current().record("host", tracing::field::display(greeting.facts.id));
    let facts = &greeting.facts;
    // Taken first, so that of two sessions of one host only one registers (S1).
    let claim = match leader.sessions.claim(facts.id, facts.boot_id) {
        Ok(claim) => claim,
        Err(other) => return End::goodbye(v1::GoodbyeReason::DuplicateHost, other.to_string()),
    };
    let mut session = match Session::open(leader, greeting, claim, out).await {
        Ok(session) => session,
        Err(end) => return end,
    };
    match session.pump(inbound).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

/// Reads and checks the Hello.
async fn greet(inbound: &mut Streaming<v1::SessionRequest>) -> Result<Greeting, End> {
    let invalid = |message: String| End::goodbye(v1::GoodbyeReason::Invalid, message);
    let first = match time::timeout(HELLO_TIMEOUT, inbound.message()).await {
        Ok(Ok(Some(first))) => first,
        Ok(Ok(None) | Err(_)) => return Err(End::Gone),
        Err(_) => return Err(invalid(format!("there was no Hello within {} s", HELLO_TIMEOUT.as_secs()))),
    };
    let Some(session_request::Message::Hello(hello)) = first.message else {
        return Err(invalid("the first message must be Hello".to_owned()));
    };
    parse::hello(hello).map_err(|v| invalid(v.to_string()))
}

/// Refuses another machine that uses a host's id while a VM of the first machine may execute (S6). After a reboot the
/// same machine is another one; its agent calls again until the leases of before have surely run out.
///
/// The session has the claim on the host id by now, so the first machine is granted nothing meanwhile.
fn other_machine(leader: &Leader, facts: &HostFacts) -> Result<(), End> {
    let proven = leader.health().proven(facts.id, leader.clock.now());
    let may_execute = leader.mirror.read(|state| rules::other_machine(state, facts, proven));
    match may_execute {
        None => Ok(()),
        Some(name) => Err(End::goodbye(
            v1::GoodbyeReason::DuplicateHost,
            format!(
                "host {} was another machine, or this one before it was restarted, and VM `{name}` may still execute there; \
                 wait until its lease has run out, and give each host a state directory of its own",
                facts.id
            ),
        )),
    }
}

/// A session that has been welcomed.
struct Session<'a> {
    leader: &'a Leader,
    host: HostId,
    claim: Claim,
    out: &'a Outgoing,
    rules: Rules,
    changed: watch::Receiver<Revision>,
    sleeper: Sleeper,
    /// What storage hosts have acknowledged.
    grants: Grants,
    granted: watch::Receiver<u64>,
    /// What this host was last told to serve.
    serving: BTreeMap<VmId, Revision>,
    /// Commands to submit with the next job.
    commands: Vec<Command>,
    /// What is being stored.
    job: Option<BoxFuture<'a, JobResult>>,
    /// When the next job may begin.
    not_before: time::Instant,
    pools: Vec<Pool>,
    facts: LiveFacts,
    /// The last heartbeat was not answered because of misplaced VMs.
    withheld: bool,
}

enum Never {}

impl<'a> Session<'a> {
    /// Registers the host and welcomes it. What it reported is stored after that, like what it reports later: when thousands of hosts come
    /// back at once, a lease does not wait for the VMs of others, and a VM whose host has just come back is started there again.
    async fn open(leader: &'a Leader, greeting: Greeting, claim: Claim, out: &'a Outgoing) -> Result<Self, End> {
        let Greeting { facts, free_bytes, vms, newest_term: _ } = greeting;
        let host = facts.id;
        let pools = facts.pools.clone();
        let pending = |e: &dyn std::error::Error| End::goodbye(v1::GoodbyeReason::DeclaredDead, e.to_string());
        other_machine(leader, &facts)?;
        let entry = leader.health().enter(host).map_err(|e| pending(&e))?;
        tokio::select! {
            biased;
            () = claim.replaced.cancelled() => return Err(replaced()),
            stored = register(leader, facts) => stored.map_err(refused)?,
        }
        leader.health().register(entry, leader.clock.now()).map_err(|e| pending(&e))?;

        leader.mirror.read(|state| leader.sessions.arrivals().note(state, host, &vms));
        let mut session = Self {
            leader,
            host,
            claim,
            out,
            rules: Rules::new(vms),
            changed: leader.mirror.changed(),
            // Before the first plan, so that nothing comes between.
            sleeper: leader.mirror.sleeper(host),
            grants: leader.sessions.grants().clone(),
            granted: leader.sessions.grants().changed(),
            serving: BTreeMap::new(),
            commands: Vec::new(),
            job: None,
            not_before: time::Instant::now(),
            pools,
            facts: LiveFacts { free_bytes, ..LiveFacts::default() },
            withheld: false,
        };
        session.welcome()?;
        Ok(session)
    }

    fn welcome(&mut self) -> Result<(), End> {
        self.changed.mark_unchanged();
        self.granted.mark_unchanged();
        let plan = self.plan()?;
        let (mut messages, count) = self.take_plan(plan);
        let first = if messages.is_empty() { Vec::new() } else { messages.remove(0) };
        let interval = self.leader.settings.timings.fast / HEARTBEATS_PER_LEASE;
        self.out.send(Message::Welcome(v1::Welcome {
            heartbeat_interval_ms: millis(interval.clamp(Duration::from_millis(50), HEARTBEAT_INTERVAL)),
            vms: first,
            controllers: self.leader.settings.controllers.clone(),
        }))?;
        for vms in messages {
            self.out.send(Message::Desired(v1::DesiredVms { vms }))?;
        }
        self.serve()?;
        self.facts.unknown_vms.clone_from(self.rules.unknown());
        self.claim.publish(self.facts.clone());
        self.claim.welcomed();
        info!(vms = count, "host connected");
        Ok(())
    }

    async fn pump(&mut self, inbound: &mut Streaming<v1::SessionRequest>) -> Result<Never, End> {
        loop {
            self.begin_job();
            tokio::select! {
                biased;
                () = self.claim.replaced.cancelled() => return Err(replaced()),
                result = job::finished(&mut self.job) => self.on_stored(result)?,
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.on_message(message)?,
                    Ok(None) | Err(_) => return Err(End::Gone),
                },
                order = self.claim.orders.recv() => match order.map(|order| *order) {
                    Some(Order::OpenStream(order)) => self.out.send(Message::OpenStream(order))?,
                    Some(Order::InspectFile(order)) => self.out.send(Message::InspectFile(order))?,
                    Some(Order::FetchImage(order)) => self.out.send(Message::FetchImage(order))?,
                    Some(Order::RemoveImage(order)) => self.out.send(Message::RemoveImage(order))?,
                    None => return Err(replaced()),
                },
                () = self.sleeper.woken() => self.replan()?,
                // It cannot end: `self` has a clone of the sender.
                _ = self.granted.changed() => self.replan()?,
                // Only so that `begin_job` is tried again.
                () = time::sleep_until(self.not_before), if self.has_job() => {}
            }
        }
    }

    fn on_message(&mut self, message: v1::SessionRequest) -> Result<(), End> {
        let invalid = |message: String| End::goodbye(v1::GoodbyeReason::Invalid, message);
        match message.message {
            Some(session_request::Message::Heartbeat(heartbeat)) => self.on_heartbeat(heartbeat.sequence),
            Some(session_request::Message::Report(message)) => {
                let (reports, problems) = parse::report(message);
                if let Some(problems) = problems {
                    warn!("a report makes no sense and is ignored: {problems}");
                }
                self.leader.settings.metrics.reports(reports.len());
                self.leader.mirror.read(|state| self.leader.sessions.arrivals().note(state, self.host, &reports));
                self.rules.reported(reports);
                if self.rules.seen().len() > parse::MAX_VMS {
                    return Err(invalid(format!("a host has at most {} VMs", parse::MAX_VMS)));
                }
                self.replan()
            }
            Some(session_request::Message::Inspection(inspection)) => {
                match inspection.result {
                    Some(result) => self.claim.answer(inspection.query_id, Reply::Inspection(result)),
                    None => warn!(query = inspection.query_id, "an inspection without a result is ignored"),
                }
                Ok(())
            }
            Some(session_request::Message::FetchProgress(p)) => {
                self.claim.progress(p.query_id, Fetched { done: p.done_bytes, total: p.total_bytes });
                Ok(())
            }
            Some(session_request::Message::ImageFetched(fetched)) => {
                self.claim.answer(fetched.query_id, Reply::Fetched(fetched));
                Ok(())
            }
            Some(session_request::Message::ImageRemoved(removed)) => {
                self.claim.answer(removed.query_id, Reply::Removed(removed));
                Ok(())
            }
            Some(session_request::Message::Served(message)) => {
                self.on_served(message);
                Ok(())
            }
            Some(session_request::Message::Pools(message)) => {
                let (pools, free_bytes) = parse::pools(message).map_err(|v| invalid(v.to_string()))?;
                self.facts.free_bytes = free_bytes;
                self.claim.publish(self.facts.clone());
                if pools != self.pools {
                    self.pools.clone_from(&pools);
                    // Only the newest is of interest.
                    self.commands.retain(|c| !matches!(c, Command::UpdatePools { .. }));
                    self.commands.push(Command::UpdatePools { host: self.host, pools });
                }
                Ok(())
            }
            Some(session_request::Message::Hello(_)) => {
                Err(invalid("Hello comes once, as the first message".to_owned()))
            }
            // Something that a newer agent says.
            None => Ok(()),
        }
    }

    fn on_heartbeat(&mut self, sequence: u64) -> Result<(), End> {
        let now = self.leader.clock.now();
        // S3 is judged by the newest state, whether or not this session was woken for it.
        if self.changed.has_changed().unwrap_or(true) {
            self.replan()?;
        }
        match self.rules.heartbeat(sequence) {
            OnHeartbeat::Stale => return Ok(()),
            OnHeartbeat::Withhold(vms) => {
                if !self.withheld {
                    let vms: Vec<String> = vms.iter().map(ToString::to_string).collect();
                    warn!(vms = vms.join(" "), "no lease is granted: VMs execute here that belong elsewhere");
                }
                self.withheld = true;
                self.leader.settings.metrics.heartbeat(Heartbeat::Withheld);
                // It grants nothing, and says that this leader is there.
                return self.out.send(Message::Ack(v1::ReportAck::default()));
            }
            OnHeartbeat::Ask => self.withheld = false,
        }
        let metrics = &self.leader.settings.metrics;
        if !self.leader.validity.holds(now) {
            metrics.heartbeat(Heartbeat::Refused);
            return Ok(());
        }
        let grant = self.leader.health().heartbeat(self.host, now);
        metrics.heartbeat(match &grant {
            Grant::Renew { .. } => Heartbeat::Renewed,
            Grant::Refused(_) => Heartbeat::Refused,
        });
        match grant {
            Grant::Renew { fast, patient } => self.out.send(Message::Renewal(v1::Renewal {
                sequence,
                fast_lease_ms: u64::from(millis(fast)),
                patient_lease_ms: u64::from(millis(patient)),
            })),
            Grant::Refused(why) => Err(End::goodbye(v1::GoodbyeReason::DeclaredDead, why.to_string())),
        }
    }

    /// What the host should have now, or why its session must end.
    fn plan(&mut self) -> Result<Plan, End> {
        let (registered, plan) = self.leader.mirror.read(|state| {
            let registered = state.host(self.host).is_some_and(|h| h.record.liveness == Liveness::Up);
            let mut plan = desired::plan(state, self.host, self.rules.seen());
            serving::withhold(state, &self.grants, self.host, &mut plan);
            (registered, plan)
        });
        if registered {
            return Ok(plan);
        }
        Err(End::goodbye(v1::GoodbyeReason::DeclaredDead, "the host was declared dead or removed; say Hello again"))
    }

    /// Sends what has changed for this host.
    fn replan(&mut self) -> Result<(), End> {
        self.changed.mark_unchanged();
        self.granted.mark_unchanged();
        let plan = self.plan()?;
        let (messages, _) = self.take_plan(plan);
        for vms in messages {
            self.out.send(Message::Desired(v1::DesiredVms { vms }))?;
        }
        self.serve()?;
        if self.facts.unknown_vms != *self.rules.unknown() {
            self.facts.unknown_vms.clone_from(self.rules.unknown());
            self.claim.publish(self.facts.clone());
        }
        Ok(())
    }

    /// Takes a plan in. Returns what is to be sent, in pieces, and how many VMs that is.
    fn take_plan(&mut self, plan: Plan) -> (Vec<Vec<v1::DesiredVm>>, usize) {
        let changes = self.rules.planned(plan);
        for vm in changes.newly_unknown {
            warn!(%vm, "a VM runs here that the cluster knows nothing about; it is left alone");
            self.commands.push(Command::NoteUnknownVm { host: self.host, vm });
        }
        let count = changes.send.len();
        let found = |(vm, wanted)| {
            self.leader.mirror.read(|state| {
                let message = desired::message(state, self.host, vm, wanted)?;
                serving::complete(state, &self.grants, self.host, vm, message)
            })
        };
        (pieces(changes.send.into_iter().filter_map(found)), count)
    }

    /// Tells a storage host what has changed of what it should serve.
    fn serve(&mut self) -> Result<(), End> {
        let wanted = self.leader.mirror.read(|state| serving::wanted(state, self.host));
        let news = wanted.iter().filter(|(vm, revision)| self.serving.get(vm) != Some(revision));
        let orders = news.filter_map(|(&vm, _)| self.leader.mirror.read(|state| serving::order(state, self.host, vm)));
        for vms in pieces(orders) {
            self.out.send(Message::Serve(v1::ServeDisks { vms }))?;
        }
        self.serving = wanted;
        Ok(())
    }

    /// A storage host says what it serves (N4). Disks that it has made are noted before anybody is told to run from them.
    fn on_served(&mut self, message: v1::ServedDisks) {
        for served in message.vms.into_iter().take(parse::MAX_VMS) {
            let Ok(vm) = served.vm_id.parse::<VmId>() else {
                warn!("what is served makes no sense and is ignored: vm_id");
                continue;
            };
            let incarnation = Incarnation(served.incarnation);
            let problem = parse::clean(&served.problem);
            let note = ServedObservation {
                incarnation,
                served: problem.is_empty(),
                disks: parse::served_disks(&served),
                trouble: parse::clean(&served.trouble),
            };
            if self.leader.mirror.read(|state| serving::is_news(state, vm, &note)) {
                // Only the newest is of interest.
                self.commands.retain(|c| !matches!(c, Command::NoteServed { vm: other, .. } if *other == vm));
                self.commands.push(Command::NoteServed { host: self.host, vm, said: Box::new(note) });
            }
            let next = Some(Incarnation(served.next_incarnation)).filter(|&next| next != Incarnation::NONE);
            let said = Said { incarnation, next, problem };
            self.leader.mirror.read(|state| self.grants.take(state, self.host, vm, said));
        }
        self.leader.mirror.read(|state| self.grants.prune(state));
    }

    fn has_job(&self) -> bool {
        self.job.is_none() && (self.rules.has_batch() || !self.commands.is_empty())
    }

    fn begin_job(&mut self) {
        if self.has_job() && self.not_before <= time::Instant::now() {
            let job = Job { reports: self.rules.batch(), commands: std::mem::take(&mut self.commands) };
            self.job = Some(job::run(&self.leader.writer, self.host, job).boxed());
        }
    }

    fn on_stored(&mut self, result: JobResult) -> Result<(), End> {
        let JobResult { acks, reports_again, commands_again, failed } = result;
        self.rules.settled(reports_again);
        self.commands.splice(..0, commands_again);
        match failed {
            None => {}
            // What did not fit is tried again; the pause lets the writer catch up.
            Some(error) if error.is_temporary() => self.not_before = time::Instant::now() + BUSY_PAUSE,
            Some(error) => return Err(refused(error)),
        }
        if acks.is_empty() {
            return Ok(());
        }
        self.out.send(Message::Ack(v1::ReportAck { entries: acks }))
    }
}

/// Messages about VMs, in pieces of a size that can be sent.
fn pieces(vms: impl Iterator<Item = v1::DesiredVm>) -> Vec<Vec<v1::DesiredVm>> {
    let mut messages: Vec<Vec<v1::DesiredVm>> = Vec::new();
    let mut bytes = 0;
    for vm in vms {
        let length = vm.encoded_len();
        match messages.last_mut() {
            Some(last) if last.len() < VMS_PER_MESSAGE && bytes + length <= BYTES_PER_MESSAGE => {
                bytes += length;
                last.push(vm);
            }
            Some(_) | None => {
                bytes = length;
                messages.push(vec![vm]);
            }
        }
    }
    messages
}

/// Stores a host's registration. After a takeover all hosts do this at once, and each waits for its turn; what a full etcd has no room
/// for is tried again for a while: both are cheaper than a new session.
async fn register(leader: &Leader, facts: HostFacts) -> Result<(), WriteError> {
    let give_up = time::Instant::now() + GREETING_PATIENCE;
    let register = Command::RegisterHost { host: Box::new(facts) };
    loop {
        match leader.writer.submit_in_turn(Turn::Registration, register.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_temporary() && time::Instant::now() < give_up => time::sleep(BUSY_PAUSE).await,
            Err(error) => return Err(error),
        }
    }
}

fn replaced() -> End {
    End::goodbye(v1::GoodbyeReason::Replaced, "a newer session of this host has replaced this one")
}

/// Why the host cannot be registered, or its reports not be stored.
fn refused(error: WriteError) -> End {
    match error {
        WriteError::Refused(refusal @ Refusal::DuplicateHost(..)) => {
            End::goodbye(v1::GoodbyeReason::DuplicateHost, refusal.to_string())
        }
        WriteError::Refused(refusal) => End::goodbye(v1::GoodbyeReason::Invalid, report(&refusal)),
        WriteError::NotLeader | WriteError::Unknown => End::not_leader(),
        WriteError::Overloaded | WriteError::StoreFull => End::Failed(Status::from(error)),
    }
}

fn millis(d: Duration) -> u32 {
    u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_leader(hint: &str) -> NotLeader {
        NotLeader { hint: Some(hint.to_owned()) }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_comes_from_the_only_known_leader_waits_for_another() {
        let slot = LeaderSlot::default();
        let waits = |unreached| Waiting::new(slot.clone(), Metrics::default(), Some(unreached));
        assert_eq!(waits("").place().map(Result::unwrap_err), Some(NotLeader { hint: None }), "elsewhere, perhaps");
        slot.clear(Some("a:1".into()));
        assert_eq!(waits("b:1").place().map(Result::unwrap_err), Some(not_leader("a:1")));
        let begin = time::Instant::now();
        assert_eq!(waits("b:1,a:1").wait().await.unwrap_err(), not_leader("a:1"), "it may be back");
        assert_eq!(begin.elapsed(), ELECTION_PATIENCE);

        let waiting = waits("b:1,a:1");
        let (found, ()) = tokio::join!(waiting.wait(), async {
            time::sleep(ELECTION_PATIENCE / 4).await;
            slot.clear(None);
            time::sleep(ELECTION_PATIENCE / 4).await;
            slot.clear(Some("b:1".into()));
        });
        assert_eq!(found.unwrap_err(), not_leader("b:1"), "it was not reached before, and has been elected now");
        assert_eq!(begin.elapsed(), ELECTION_PATIENCE * 3 / 2);
    }
}
