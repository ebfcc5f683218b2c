//! Many agents in one process: a task, a connection and a session each, as the real agent has them. They have threads of their own:
//! who measures is a user elsewhere, and does not stand in line with ten thousand agents.
//!
//! They dial by the real agent's own rules (`uncloud_agent::session::dialer`), beat at the interval that Welcome says, and
//! count: answers and how long they took, and leases that ran out because no answer came in time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, transport::Channel};
use uncloud_agent::session::{
    connect::endpoint,
    dialer::{Dialer, Outcome},
};
use uncloud_proto::{
    LEADER_METADATA_KEY, MAX_MESSAGE_BYTES, UNREACHED_METADATA_KEY,
    v1::{self, GoodbyeReason, agent_service_client::AgentServiceClient, session_request, session_response::Message},
};

use super::{Site, played::Played, site::PlayedHost};
use crate::wait_for;

/// How long a controller may take to say whether it leads, and how long a leader may leave heartbeats without an answer, before the agent
/// looks for another: as the real agent.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_millis(2200);
/// Messages that may wait to be sent by one agent.
const OUTBOX: usize = 16;

/// The agents. They end when it is dropped.
pub struct Fleet {
    shared: Arc<Shared>,
    agents: Vec<CancellationToken>,
    tasks: TaskTracker,
    /// There until it is dropped.
    threads: Option<Runtime>,
}

struct Shared {
    addresses: Vec<String>,
    begin: Instant,
    sessions: AtomicU64,
    welcomes: AtomicU64,
    renewals: AtomicU64,
    lost: AtomicU64,
    /// µs after `begin` of the newest Welcome.
    welcomed_at: AtomicU64,
    /// How long answers took, in µs.
    answers: Mutex<Vec<u32>>,
    ended: Mutex<Vec<String>>,
}

/// What the agents have counted so far.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Sessions that have had their Welcome and have not ended.
    pub sessions: u64,
    /// Welcomes.
    pub welcomes: u64,
    /// Heartbeats that were answered with a renewal.
    pub renewals: u64,
    /// Leases that ran out.
    pub lost: u64,
}

impl Fleet {
    /// No agents yet. They dial these controllers.
    ///
    /// # Errors
    ///
    /// There can be no more threads.
    pub fn new(addresses: Vec<String>) -> anyhow::Result<Self> {
        let threads =
            Builder::new_multi_thread().enable_all().thread_name("agents").build().context("start threads")?;
        let shared = Shared {
            addresses,
            begin: Instant::now(),
            sessions: AtomicU64::new(0),
            welcomes: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            welcomed_at: AtomicU64::new(0),
            answers: Mutex::default(),
            ended: Mutex::default(),
        };
        let (agents, tasks) = (Vec::new(), TaskTracker::new());
        Ok(Self { shared: Arc::new(shared), agents, tasks, threads: Some(threads) })
    }

    /// Starts the agents of those hosts of a site that have none yet, all at once.
    pub fn start(&mut self, site: &Site) {
        let Some(threads) = &self.threads else { return };
        for host in site.hosts.iter().skip(self.agents.len()) {
            let stop = CancellationToken::new();
            self.agents.push(stop.clone());
            let agent = agent(Arc::clone(&self.shared), host.clone(), site.pool);
            let agent = async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    never = agent => match never {},
                }
            };
            self.tasks.spawn_on(agent, threads.handle());
        }
    }

    /// How many agents there are, dead ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.agents.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }

    /// These hosts, counted from 0 in the order of the site, lose their power. They never come back.
    pub fn kill(&self, hosts: std::ops::Range<usize>) {
        self.agents[hosts].iter().for_each(CancellationToken::cancel);
    }

    /// What has been counted.
    #[must_use]
    pub fn counted(&self) -> Counted {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Counted {
            sessions: get(&self.shared.sessions),
            welcomes: get(&self.shared.welcomes),
            renewals: get(&self.shared.renewals),
            lost: get(&self.shared.lost),
        }
    }

    /// When the newest Welcome came.
    #[must_use]
    pub fn welcomed_at(&self) -> Instant {
        self.shared.begin + Duration::from_micros(self.shared.welcomed_at.load(Ordering::Relaxed))
    }

    /// Takes the times that answers took since this was last asked, shortest first, in ms.
    #[must_use]
    pub fn take_answers(&self) -> Vec<f64> {
        let mut taken = std::mem::take(&mut *lock(&self.shared.answers));
        taken.sort_unstable();
        taken.into_iter().map(|us| f64::from(us) / 1000.0).collect()
    }

    /// Waits until so many have a session.
    ///
    /// # Errors
    ///
    /// They have not within the limit. Says how the newest sessions ended.
    pub async fn wait_sessions(&self, n: usize, limit: Duration) -> anyhow::Result<()> {
        wait_for(&format!("{n} agents are connected"), limit, async || {
            let counted = self.counted();
            if counted.sessions >= n as u64 {
                Ok(())
            } else {
                Err(format!("{counted:?}, {:?}", lock(&self.shared.ended)))
            }
        })
        .await
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.agents.iter().for_each(CancellationToken::cancel);
        // Whoever drops this must not wait.
        self.threads.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Never {}

async fn agent(shared: Arc<Shared>, host: PlayedHost, pool: uuid::Uuid) -> Never {
    let mut dialer = Dialer::new(shared.addresses.clone());
    let mut played = Played::new(host, pool);
    let mut channels = BTreeMap::new();
    loop {
        let wait = dialer.wait(rand::random());
        time::sleep(wait).await;
        shared.look(&mut played);
        let (outcome, words) = session(&shared, &mut dialer, &mut channels, &mut played).await;
        let mut ended = lock(&shared.ended);
        // The newest few are enough to see what is wrong.
        if ended.len() == 4 {
            ended.remove(0);
        }
        ended.push(words);
        drop(ended);
        dialer.ended(outcome);
    }
}

impl Shared {
    fn look(&self, played: &mut Played) {
        if played.look(Instant::now()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Counts as a session while it lives, also when its task is dropped.
struct Counts<'a>(&'a AtomicU64);

impl<'a> Counts<'a> {
    fn new(sessions: &'a AtomicU64) -> Self {
        sessions.fetch_add(1, Ordering::Relaxed);
        Self(sessions)
    }
}

impl Drop for Counts<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One session, from the connection to its end, and why it ended.
async fn session(
    shared: &Shared,
    dialer: &mut Dialer,
    channels: &mut BTreeMap<String, Channel>,
    played: &mut Played,
) -> (Outcome, String) {
    let unreachable = |words: String| (Outcome::Unreachable, words);
    let address = dialer.address().to_owned();
    let channel = match channels.get(&address) {
        Some(channel) => channel.clone(),
        None => match endpoint(&address) {
            Ok(endpoint) => channels.entry(address.clone()).or_insert(endpoint.connect_lazy()).clone(),
            Err(error) => return unreachable(error),
        },
    };
    let (out, outbox) = mpsc::channel(OUTBOX);
    let send = |message| out.try_send(v1::SessionRequest { message: Some(message) });
    let _ = send(session_request::Message::Hello(played.hello()));
    let mut request = Request::new(ReceiverStream::new(outbox));
    if let Ok(unreached) = dialer.unreached().parse() {
        request.metadata_mut().insert(UNREACHED_METADATA_KEY, unreached);
    }
    let mut client = AgentServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let opened = time::timeout(OPEN_TIMEOUT, client.session(request)).await;
    let mut inbound = match opened {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return ended_by(&status, Outcome::Unreachable),
        Err(_) => return unreachable("no answer".into()),
    };
    let welcome = match time::timeout(dialer.patience(), inbound.message()).await {
        Ok(Ok(Some(v1::SessionResponse { term, message: Some(Message::Welcome(welcome)) }))) => {
            played.saw_term(term);
            welcome
        }
        Ok(Ok(Some(v1::SessionResponse { message: Some(Message::Goodbye(goodbye)), .. }))) => {
            return dismissed(goodbye, Outcome::Deferred);
        }
        Ok(Err(status)) => return ended_by(&status, Outcome::Unreachable),
        Ok(Ok(other)) => return unreachable(format!("no Welcome: {other:?}")),
        Err(_) => return (Outcome::Unanswered, "no Welcome in time".into()),
    };
    // Where the real agent would keep its other connections: so many files cannot be open.
    channels.retain(|other, _| *other == address);
    let _counts = Counts::new(&shared.sessions);
    shared.welcomes.fetch_add(1, Ordering::Relaxed);
    let at = u64::try_from(shared.begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    shared.welcomed_at.fetch_max(at, Ordering::Relaxed);
    dialer.welcomed(&welcome.controllers);
    let reports = played.obey(welcome.vms);
    let mut full = !reports.is_empty() && send(session_request::Message::Report(v1::Report { vms: reports })).is_err();

    let interval = Duration::from_millis(u64::from(welcome.heartbeat_interval_ms.max(1)));
    // The real agent sends the first at once; from then on agents are spread as their connections were.
    let mut ticker = time::interval(interval);
    loop {
        if full {
            return (Outcome::Served, "the leader does not read".into());
        }
        tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(v1::SessionResponse { term, message: Some(message) })) => {
                    played.saw_term(term);
                    match message {
                        Message::Renewal(renewal) => shared.renewed(played, &renewal),
                        Message::Desired(desired) => {
                            let vms = played.obey(desired.vms);
                            full = !vms.is_empty()
                                && send(session_request::Message::Report(v1::Report { vms })).is_err();
                        }
                        Message::Goodbye(goodbye) => return dismissed(goodbye, Outcome::Served),
                        // There are no images, no files and no consoles.
                        Message::Welcome(_) | Message::Ack(_) | Message::OpenStream(_) | Message::InspectFile(_)
                        | Message::FetchImage(_) | Message::RemoveImage(_) | Message::Serve(_) => {}
                    }
                }
                Ok(Some(v1::SessionResponse { message: None, .. })) => {}
                Ok(None) => return (Outcome::Served, "the stream has ended".into()),
                Err(status) => return ended_by(&status, Outcome::Served),
            },
            _ = ticker.tick() => {
                shared.look(played);
                if played.unanswered_for(Instant::now()) > SILENCE {
                    return (Outcome::Silent, "heartbeats are not answered".into());
                }
                full = send(session_request::Message::Heartbeat(played.heartbeat(Instant::now()))).is_err();
            }
        }
    }
}

impl Shared {
    fn renewed(&self, played: &mut Played, renewal: &v1::Renewal) {
        // A renewal that comes too late brings nothing back.
        self.look(played);
        if let Some(took) = played.renewed(renewal, Instant::now()) {
            self.renewals.fetch_add(1, Ordering::Relaxed);
            lock(&self.answers).push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
        }
        self.look(played);
    }
}

fn dismissed(goodbye: v1::Goodbye, otherwise: Outcome) -> (Outcome, String) {
    let outcome = match goodbye.reason() {
        GoodbyeReason::NotLeader => Outcome::NotLeader(Some(goodbye.leader_address).filter(|l| !l.is_empty())),
        GoodbyeReason::DuplicateHost | GoodbyeReason::Invalid => Outcome::Refused,
        GoodbyeReason::DeclaredDead | GoodbyeReason::Replaced | GoodbyeReason::TooSlow | GoodbyeReason::Unspecified => {
            otherwise
        }
    };
    (outcome, format!("Goodbye: {}", goodbye.message))
}

fn ended_by(status: &tonic::Status, otherwise: Outcome) -> (Outcome, String) {
    let leader = status.metadata().get(LEADER_METADATA_KEY).and_then(|v| v.to_str().ok());
    let outcome =
        leader.map_or(otherwise, |leader| Outcome::NotLeader(Some(leader.to_owned()).filter(|l| !l.is_empty())));
    (outcome, format!("{}: {}", status.code(), status.message()))
}
