//! One session: moves messages between the leader and the VMs.
//!
//! One task does all of it but the heartbeats, which have a task of their own. Nothing in here waits for a disk or
//! for a VM once the session stands, so a renewal of the lease is never held up.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::Stream;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{self, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Streaming, transport::Channel};
use tracing::{debug, error, info, warn};
use uncloud_proto::{
    AGENT_PROTOCOL, LEADER_METADATA_KEY, MAX_MESSAGE_BYTES, UNREACHED_METADATA_KEY,
    clock::Clock,
    ids::{HostId, Term},
    v1::{
        self, GoodbyeReason, SessionRequest, SessionResponse, agent_service_client::AgentServiceClient,
        session_request::Message as Ours, session_response::Message as Theirs,
    },
};
use uuid::Uuid;

use super::{
    gate::{Admission, Gate},
    heartbeat::{self, Heartbeats},
    orders,
    serving::Serving,
    streams::Streams,
};
use crate::{
    lease::{LeaseClass, LeaseFile},
    records::AgentFile,
    storage::{blocking, images::Images, inspect::Inspector},
    vm::{
        desired::{self, Desired},
        hypervisor::Hypervisor,
        manager::Manager,
        runner::chain,
        state::{Report, ReportState},
    },
};

/// How long a controller may take to say whether it leads. One that works says so at once; one that hangs, or is off, must not
/// cost more of the lease than this.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the leader may be silent: two heartbeats without an answer, and a little. A leader that hangs keeps its connections,
/// and HTTP/2 keep-alive takes most of a lease to notice. Longer costs leases when a leader hangs; shorter costs sessions when
/// one is slow for a moment.
const SILENT_BEATS: u32 = 2;
const SILENCE_SLACK: Duration = Duration::from_millis(200);
const SHORTEST_SILENCE: Duration = Duration::from_secs(1);
/// Heartbeats that wait for the network. More than these, and the leader takes none.
const BEATS: usize = 8;
/// Other messages that wait for the network.
const MESSAGES: usize = 32;
/// Reports in one message.
const REPORTS: usize = 256;
/// Bounds of what a leader may say about time. A lease never moves back, so a slip of the leader's must not last.
const MOST_LEASE: Duration = Duration::from_secs(3600);
const HEARTBEAT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// Who this host is. Said in every `Hello`.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub host: HostId,
    /// Its name.
    pub name: String,
    /// The kernel's boot id.
    pub boot: Uuid,
    /// This process.
    pub instance: Uuid,
    /// What it offers.
    pub capacity: v1::Resources,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// How guests execute.
    pub accelerator: v1::Accelerator,
    /// Where VMs that migrate to it arrive. `None`: none can come.
    pub migration_address: Option<IpAddr>,
    /// The CPU that guests can have.
    pub cpu: v1::Cpu,
    /// Bridges that VMs may be connected to.
    pub bridges: Vec<String>,
}

/// How a session is opened.
#[derive(Debug, Clone)]
pub struct Opening {
    /// [`UNREACHED_METADATA_KEY`]; may be empty.
    pub unreached: String,
    /// How long the controller may take to answer `Hello`.
    pub patience: Duration,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The agent stops.
    Cancelled,
    /// The leader took it; then it ended, for this reason.
    Served(String),
    /// This controller does not lead.
    NotLeader(Option<String>),
    /// The leader took it; then it was heard no more.
    Silent,
    /// It could not be reached, or did not answer.
    Unreachable(String),
    /// It took the Hello, and did not answer it in time.
    Unanswered,
    /// The leader is there, and does not take the session now.
    Deferred(String),
    /// It does not take this host.
    Refused(String),
}

/// What sessions need, one after the other.
pub struct Session<H: Hypervisor> {
    /// Who this host is.
    pub identity: Identity,
    /// The VMs.
    pub manager: Arc<Manager<H>>,
    /// What may pass.
    pub gate: Gate,
    /// Where the newest term is written.
    pub agent: Arc<AgentFile>,
    /// The host's lease.
    pub lease: Arc<LeaseFile>,
    /// The time.
    pub clock: Clock,
    /// The pools as they are.
    pub pools: watch::Receiver<Vec<v1::Pool>>,
    /// The pools that other hosts serve.
    pub network_pools: Vec<v1::Pool>,
    /// What this host serves.
    pub exports: Serving,
    /// Answers questions about files.
    pub inspector: Inspector,
    /// Consoles and logs.
    pub streams: Streams,
    /// The images of this host's pools.
    pub images: Images,
}

/// What goes out: heartbeats before anything else.
struct Outgoing {
    beats: mpsc::Receiver<SessionRequest>,
    messages: mpsc::Receiver<SessionRequest>,
}

impl Stream for Outgoing {
    type Item = SessionRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<SessionRequest>> {
        if let Poll::Ready(Some(beat)) = self.beats.poll_recv(cx) {
            return Poll::Ready(Some(beat));
        }
        self.messages.poll_recv(cx)
    }
}

/// The state of one session.
struct Line {
    channel: Channel,
    incoming: Streaming<SessionResponse>,
    messages: mpsc::Sender<SessionRequest>,
    beats: mpsc::Sender<SessionRequest>,
    book: Arc<Mutex<Heartbeats>>,
    /// Heartbeats, questions about files, streams: they end with the session.
    tasks: JoinSet<()>,
    /// Ends when the leader takes no heartbeats.
    stalled: CancellationToken,
    /// How long the leader may be silent.
    silence: Duration,
}

impl<H: Hypervisor> Session<H> {
    /// Runs one session over `channel`. `welcomed` hears the addresses of all controllers when the leader takes it.
    pub async fn run(
        &mut self,
        channel: Channel,
        opening: Opening,
        cancel: &CancellationToken,
        welcomed: impl FnOnce(&[String]),
    ) -> End {
        let mut line = tokio::select! {
            biased;
            () = cancel.cancelled() => return End::Cancelled,
            line = self.open(channel, &opening) => match line {
                Ok(line) => line,
                Err(end) => return end,
            },
        };
        let welcome = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(End::Cancelled),
            welcome = self.welcome(&mut line, opening.patience, welcomed) => welcome,
        };
        let end = match welcome {
            Ok(()) => self.pump(&mut line, cancel).await,
            Err(end) => end,
        };
        // Before anything of the next session is taken (P1: what this one said and did not grant is void).
        self.manager.session_ended();
        end
    }

    fn hello(&mut self) -> v1::Hello {
        let pools = self.all_pools();
        let id = &self.identity;
        v1::Hello {
            host_id: id.host.to_string(),
            name: id.name.clone(),
            boot_id: id.boot.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: AGENT_PROTOCOL,
            capacity: Some(id.capacity),
            labels: id.labels.clone().into_iter().collect(),
            pools,
            accelerator: Some(id.accelerator.clone()),
            vms: self.manager.host().outbox.lock().hello(),
            newest_term: self.gate.newest_term().0,
            agent_instance: id.instance.to_string(),
            migration_address: id.migration_address.map(|a| a.to_string()).unwrap_or_default(),
            cpu: Some(id.cpu.clone()),
            bridges: id.bridges.clone(),
        }
    }

    fn all_pools(&mut self) -> Vec<v1::Pool> {
        let mut pools = self.pools.borrow_and_update().clone();
        pools.extend(self.network_pools.iter().cloned());
        pools
    }

    async fn open(&mut self, channel: Channel, opening: &Opening) -> Result<Line, End> {
        let (beats, beats_out) = mpsc::channel(BEATS);
        let (messages, messages_out) = mpsc::channel(MESSAGES);
        let hello = SessionRequest { message: Some(Ours::Hello(self.hello())) };
        messages.try_send(hello).expect("the queue is new");
        let mut client = AgentServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut request = Request::new(Outgoing { beats: beats_out, messages: messages_out });
        // What no header can carry is no address.
        if !opening.unreached.is_empty()
            && let Ok(unreached) = opening.unreached.parse()
        {
            request.metadata_mut().insert(UNREACHED_METADATA_KEY, unreached);
        }
        let call = client.session(request);
        let incoming = match time::timeout(OPEN_TIMEOUT, call).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err(end_of_status(&status, false)),
            Err(_) => return Err(End::Unreachable("the controller does not answer".to_owned())),
        };
        Ok(Line {
            channel,
            incoming,
            messages,
            beats,
            book: Arc::default(),
            tasks: JoinSet::new(),
            stalled: CancellationToken::new(),
            silence: SHORTEST_SILENCE,
        })
    }

    /// The first message decides whether there is a session.
    async fn welcome(
        &mut self,
        line: &mut Line,
        patience: Duration,
        welcomed: impl FnOnce(&[String]),
    ) -> Result<(), End> {
        let first = match time::timeout(patience, line.incoming.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Ok(None)) => return Err(End::Unreachable("the controller ended the session".to_owned())),
            Ok(Err(status)) => return Err(end_of_status(&status, false)),
            Err(_) => return Err(End::Unanswered),
        };
        let term = Term(first.term);
        let welcome = match first.message {
            Some(Theirs::Welcome(welcome)) => welcome,
            Some(Theirs::Goodbye(goodbye)) => return Err(end_of_goodbye(&goodbye, false)),
            Some(_) | None => return Err(End::Refused("the first message of the controller is no Welcome".to_owned())),
        };
        self.admit(term).await.map_err(End::Unreachable)?;
        info!(%term, vms = welcome.vms.len(), "the leader has taken the session");
        welcomed(&welcome.controllers);
        self.start_heart(line, welcome.heartbeat_interval_ms);
        self.exports.begin();
        for vm in &welcome.vms {
            self.obey(vm);
        }
        Ok(())
    }

    /// G1 and G3. Anything but `Ok` ends the session.
    async fn admit(&mut self, term: Term) -> Result<(), String> {
        match self.gate.term(term) {
            Ok(Admission::Same) => Ok(()),
            Ok(Admission::Newer(term)) => {
                let agent = Arc::clone(&self.agent);
                let written = blocking(move || agent.change(|record| record.newest_term = term)).await;
                written.map_err(|e| format!("the term cannot be written: {}", chain(&e)))?;
                self.gate.term_stored(term);
                Ok(())
            }
            Err(stale) => {
                warn!(%term, newest = %stale.newest, "a leader that has been replaced is not obeyed");
                Err(stale.to_string())
            }
        }
    }

    fn start_heart(&self, line: &mut Line, interval_ms: u32) {
        let interval = Duration::from_millis(interval_ms.into()).clamp(HEARTBEAT.0, HEARTBEAT.1);
        line.silence = (interval * SILENT_BEATS + SILENCE_SLACK).max(SHORTEST_SILENCE);
        let (clock, book) = (self.clock.clone(), Arc::clone(&line.book));
        let (beats, stalled) = (line.beats.clone(), line.stalled.clone());
        line.tasks.spawn(async move {
            let mut ticker = time::interval(interval);
            ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticker.tick().await;
                // L1: the moment is taken before the heartbeat is on its way.
                let sequence = book.lock().unwrap_or_else(PoisonError::into_inner).send(clock.now());
                let beat = SessionRequest { message: Some(Ours::Heartbeat(v1::Heartbeat { sequence })) };
                if beats.try_send(beat).is_err() {
                    return stalled.cancel();
                }
            }
        });
    }

    async fn pump(&mut self, line: &mut Line, cancel: &CancellationToken) -> End {
        let outbox = self.manager.host().outbox.clone();
        let messages = line.messages.clone();
        let mut heard = time::Instant::now();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return End::Cancelled,
                message = line.incoming.message() => match message {
                    Ok(Some(message)) => {
                        heard = time::Instant::now();
                        if let Err(end) = self.take(line, message).await {
                            return end;
                        }
                    }
                    Ok(None) => return End::Served("the leader ended it".to_owned()),
                    Err(status) => return end_of_status(&status, true),
                },
                // After what has come: an agent that was stopped for a while reads that first.
                () = time::sleep_until(heard + line.silence) => return End::Silent,
                () = line.stalled.cancelled() => return End::Served("the leader takes no heartbeats".to_owned()),
                permit = reserve_when(&messages, outbox.wait()) => {
                    let vms = outbox.lock().unsent(REPORTS);
                    match permit {
                        Some(permit) => permit.send(SessionRequest { message: Some(Ours::Report(v1::Report { vms })) }),
                        None => return End::Served("the connection is gone".to_owned()),
                    }
                }
                Some(permit) = reserve_when(&messages, changed(self.pools.clone())) => {
                    let pools = self.all_pools();
                    permit.send(SessionRequest { message: Some(Ours::Pools(v1::PoolsReport { pools })) });
                }
                Some(permit) = reserve_when(&messages, self.exports.changed()) => {
                    let served = self.exports.unsent();
                    if !served.vms.is_empty() {
                        permit.send(SessionRequest { message: Some(Ours::Served(served)) });
                    }
                }
                Some(ended) = line.tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!("a task of the session failed: {error}");
                    }
                }
            }
        }
    }

    /// Takes one message. The gate comes first.
    async fn take(&mut self, line: &mut Line, message: SessionResponse) -> Result<(), End> {
        self.admit(Term(message.term)).await.map_err(End::Served)?;
        match message.message {
            Some(Theirs::Renewal(renewal)) => self.renew(line, &renewal),
            Some(Theirs::Desired(desired)) => desired.vms.iter().for_each(|vm| self.obey(vm)),
            Some(Theirs::Ack(ack)) => self.acknowledged(&ack),
            Some(Theirs::OpenStream(request)) => {
                let (streams, channel) = (self.streams.clone(), line.channel.clone());
                line.tasks.spawn(async move { streams.serve(channel, request).await });
            }
            Some(Theirs::InspectFile(question)) => {
                let (inspector, messages) = (self.inspector.clone(), line.messages.clone());
                line.tasks.spawn(answer(inspector, question, messages));
            }
            Some(Theirs::FetchImage(question)) => {
                let (images, messages) = (self.images.clone(), line.messages.clone());
                line.tasks.spawn(orders::fetch(images, question, messages));
            }
            Some(Theirs::RemoveImage(question)) => {
                let (images, messages) = (self.images.clone(), line.messages.clone());
                line.tasks.spawn(orders::remove(images, question, messages));
            }
            Some(Theirs::Serve(order)) => self.exports.obey(&order),
            Some(Theirs::Goodbye(goodbye)) => return Err(end_of_goodbye(&goodbye, true)),
            Some(Theirs::Welcome(_)) => return Err(End::Served("the leader sent Welcome twice".to_owned())),
            None => warn!("a message of the leader is of a kind that this agent does not know"),
        }
        Ok(())
    }

    /// L1, L2: the lease runs from when the heartbeat was sent that is answered here.
    fn renew(&self, line: &Line, renewal: &v1::Renewal) {
        let sent = line.book.lock().unwrap_or_else(PoisonError::into_inner).answered(renewal.sequence);
        let Some(sent) = sent else {
            return debug!(sequence = renewal.sequence, "a renewal answers no heartbeat of this session");
        };
        let now = self.clock.now();
        let leases = [(LeaseClass::Fast, renewal.fast_lease_ms), (LeaseClass::Patient, renewal.patient_lease_ms)];
        let mut fresh = false;
        for (class, length_ms) in leases {
            let length = Duration::from_millis(length_ms).min(MOST_LEASE);
            let Some(deadline) = heartbeat::deadline(sent, length, now) else {
                warn!(%class, "a renewal came when its lease was over");
                continue;
            };
            let before = self.lease.word(class);
            let word = self.lease.renew(class, deadline, now);
            if word.generation != before.generation {
                info!(%class, generation = word.generation, "the host has a lease");
                fresh = true;
            }
        }
        if fresh {
            self.manager.lease_changed();
        }
    }

    /// Takes what one VM should be.
    fn obey(&mut self, message: &v1::DesiredVm) {
        let (vm, incarnation) = match desired::identify(message) {
            Ok(found) => found,
            Err(problem) => return error!(vm = message.vm_id.escape_debug().to_string(), "desired state: {problem}"),
        };
        if let Err(stale) = self.gate.incarnation(vm, incarnation) {
            return warn!(%vm, "a desired state is ignored: {stale}");
        }
        match Desired::from_proto(incarnation, message) {
            Ok(desired) => self.manager.desired(vm, desired),
            Err(problem) => {
                error!(%vm, %incarnation, "a desired state cannot be used: {problem}");
                if !self.manager.has(vm) {
                    let report = Report {
                        incarnation,
                        state: ReportState::Failed,
                        reason: format!("this host's agent cannot use what the leader sent: {problem}"),
                        since: self.clock.wall(),
                        disks_ready: false,
                        last_exit: None,
                        next_attempt: None,
                        restarts_done: 0,
                        addresses: Vec::new(),
                        migration: None,
                        paused: false,
                        disks: Default::default(),
                    };
                    self.manager.host().outbox.put(vm, report);
                }
            }
        }
    }

    fn acknowledged(&mut self, ack: &v1::ReportAck) {
        for entry in &ack.entries {
            let Ok(vm) = entry.vm_id.parse() else { continue };
            if self.manager.host().outbox.lock().acknowledge(vm, entry.sequence) {
                self.gate.over(vm);
                self.manager.over(vm);
            }
        }
    }
}

/// Waits until there is something to send, and then for room. Cancel safe.
async fn reserve_when(
    messages: &mpsc::Sender<SessionRequest>,
    something: impl Future<Output = ()>,
) -> Option<mpsc::Permit<'_, SessionRequest>> {
    something.await;
    messages.reserve().await.ok()
}

/// Takes a copy, so that the change counts as seen only when it has been sent.
async fn changed(mut pools: watch::Receiver<Vec<v1::Pool>>) {
    if pools.changed().await.is_err() {
        std::future::pending().await
    }
}

async fn answer(inspector: Inspector, question: v1::InspectFile, messages: mpsc::Sender<SessionRequest>) {
    let role = question.role();
    let result = match inspector.inspect(question.source, role).await {
        Ok(facts) => v1::file_inspection::Result::Facts(facts),
        Err(error) => {
            let kind = error.kind.into();
            v1::file_inspection::Result::Problem(v1::FileProblem { kind, message: error.message })
        }
    };
    let inspection = v1::FileInspection { query_id: question.query_id, result: Some(result) };
    // The session may have ended meanwhile; then nobody waits for the answer.
    let _ = messages.send(SessionRequest { message: Some(Ours::Inspection(inspection)) }).await;
}

/// What a Goodbye means. `served`: the session had had its Welcome.
#[must_use]
pub fn end_of_goodbye(goodbye: &v1::Goodbye, served: bool) -> End {
    let hint = Some(goodbye.leader_address.clone()).filter(|a| !a.is_empty());
    let words = format!("{}: {}", goodbye.reason().as_str_name(), goodbye.message);
    match goodbye.reason() {
        GoodbyeReason::NotLeader => End::NotLeader(hint),
        GoodbyeReason::DuplicateHost | GoodbyeReason::Invalid => End::Refused(words),
        GoodbyeReason::DeclaredDead | GoodbyeReason::Replaced | GoodbyeReason::TooSlow | GoodbyeReason::Unspecified
            if served =>
        {
            End::Served(words)
        }
        GoodbyeReason::DeclaredDead | GoodbyeReason::Replaced | GoodbyeReason::TooSlow | GoodbyeReason::Unspecified => {
            End::Deferred(words)
        }
    }
}

fn end_of_status(status: &tonic::Status, served: bool) -> End {
    let words = format!("{}: {}", status.code(), status.message());
    if let Some(leader) = status.metadata().get(LEADER_METADATA_KEY).and_then(|v| v.to_str().ok()) {
        return End::NotLeader(Some(leader.to_owned()).filter(|l| !l.is_empty()));
    }
    match (status.code(), served) {
        (tonic::Code::InvalidArgument | tonic::Code::PermissionDenied | tonic::Code::Unauthenticated, _) => {
            End::Refused(words)
        }
        (_, true) => End::Served(words),
        // Said by a leader that has too much to do.
        (tonic::Code::ResourceExhausted, false) => End::Deferred(words),
        (_, false) => End::Unreachable(words),
    }
}
