//! The controller as a whole: its etcd, its elections, its server, and their end.
//!
//! A clean stop goes in an order that cannot lose work: *refuse* (the slot is cleared: health says NOT_SERVING), *drain*
//! (the writer finishes its transaction), *resign* (a successor need not wait), then stop the controller's own etcd.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::JoinHandle,
    time,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{info, warn};
use uncloud_proto::{clock::Clock, dial::Dial, ids::ControllerId};

use crate::{
    api,
    config::Config,
    leadership::{Campaign, Candidate, Elected, Follower, Leader, LeaderSlot, LeaderToken, Settings, WarmCopy},
    metrics::{self, Metrics},
    reconcile, report,
    store::{Store, embedded::EmbeddedEtcd},
};

/// How long the end of a term may take before it is left behind. Nothing that is left behind can write (T2).
const TERM_END: Duration = Duration::from_secs(5);
/// How long to wait before connecting to etcd is tried again.
const CONNECT_AGAIN: Duration = Duration::from_millis(500);
/// Connections that may wait to be accepted. After a takeover all agents come at once, and who finds no room tries again only after a
/// second. The kernel has a limit of its own (`net.core.somaxconn`, 4096).
const BACKLOG: u32 = 16_384;
/// How long the server may take to end its connections.
const SERVER_END: Duration = Duration::from_secs(2);

/// Runs a controller until `stop` fires.
///
/// # Errors
///
/// When it cannot begin: a bad configuration, a data directory in use, no etcd to start, a port that is taken. Once it
/// runs, nothing ends it but `stop`.
pub async fn run(config: Config, clock: Clock, stop: CancellationToken) -> anyhow::Result<()> {
    config.validate()?;
    let _lock = lock(&config.data_dir)?;
    let mut embedded = if config.etcd.is_empty() {
        Some(EmbeddedEtcd::start(&config.data_dir, config.etcd_binary.as_deref())?)
    } else {
        None
    };
    let endpoints = embedded.as_ref().map_or_else(|| config.etcd.clone(), |e| vec![e.endpoint().to_owned()]);

    let listener = listen(config.listen).with_context(|| format!("cannot listen on {}", config.listen))?;
    info!(address = %config.listen, "serving");
    let metrics = Metrics::default();
    if let Some(address) = config.metrics_listen {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on --metrics-listen {address}"))?;
        info!(%address, "metrics at /metrics");
        tokio::spawn(metrics::serve(listener, metrics.clone(), stop.clone()));
    }
    let edge = Edge { incoming: api::accept(listener), store: connect(&endpoints), dial: Dial::tcp(), metrics };
    control(&config, &clock, edge, stop).await;
    if let Some(mut etcd) = embedded.take() {
        tokio::task::spawn_blocking(move || etcd.stop()).await.context("stop etcd")?;
    }
    info!("stopped");
    Ok(())
}

/// Listens for clients and agents.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Where a controller touches the network. A simulation has another one.
#[derive(Debug)]
pub struct Edge<I, F> {
    /// The connections that come in.
    pub incoming: I,
    /// Gives etcd, when it can be had.
    pub store: F,
    /// How other controllers are reached.
    pub dial: Dial,
    /// What is counted.
    pub metrics: Metrics,
}

/// All of a controller but its files and its own etcd: serves, stands for election and leads until `stop` fires.
pub async fn control<S>(
    config: &Config,
    clock: &Clock,
    edge: Edge<impl Stream<Item = io::Result<S>> + Send + 'static, impl Future<Output = Store>>,
    stop: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let part = Part { slot: LeaderSlot::default(), copy: WarmCopy::default() };
    edge.metrics.look_at(part.slot.clone(), part.copy.clone(), clock.clone());
    let (store, known) = watch::channel(None);
    let served = CancellationToken::new();
    let serving = api::Serving {
        slot: part.slot.clone(),
        copy: part.copy.clone(),
        store: known,
        clock: clock.clone(),
        cpu_overcommit_percent: config.cpu_overcommit,
        disk_overcommit_percent: config.disk_overcommit,
        address: config.address(),
        dial: edge.dial,
        metrics: edge.metrics.clone(),
    };
    let server = tokio::spawn(api::serve(edge.incoming, serving, served.clone()));

    // Ends by itself when `stop` fires, after a hand-over.
    elections(config, clock, edge.store, &part, &store, &edge.metrics, &stop).await;

    served.cancel();
    match time::timeout(SERVER_END, server).await {
        Ok(Ok(Ok(()))) | Err(_) => {}
        Ok(Ok(Err(error))) => warn!("the server ended: {}", report(&error)),
        Ok(Err(error)) => warn!("the server ended badly: {error}"),
    }
}

/// What this process is at the moment: the leader, or one that follows.
struct Part {
    slot: LeaderSlot,
    copy: WarmCopy,
}

/// Stands for election and leads, again and again, and follows whoever leads otherwise. Returns when a term has ended and
/// `stop` has fired.
async fn elections(
    config: &Config,
    clock: &Clock,
    store: impl Future<Output = Store>,
    part: &Part,
    known: &watch::Sender<Option<Store>>,
    metrics: &Metrics,
    stop: &CancellationToken,
) {
    let store = tokio::select! {
        biased;
        () = stop.cancelled() => return,
        store = store => store,
    };
    known.send_replace(Some(store.clone()));
    // A process is a candidate once: after a restart it is another.
    let id = ControllerId::from_uuid(uuid::Uuid::new_v4());
    // With an etcd of its own only: there, whoever copies the data directory has copied the cluster, too. With a shared etcd
    // the copy of a directory in use would take a living leader's key away.
    let predecessor = if config.etcd.is_empty() { succeed(&config.data_dir, id) } else { None };
    let candidate = Candidate { id, address: config.address(), predecessor };
    let campaign = Campaign::new(store.clone(), clock.clone(), candidate).woken_by(part.copy.leader_gone());
    let mut follower = Follower::new(store.clone(), part.copy.clone());
    let controllers = if config.controllers.is_empty() { vec![config.address()] } else { config.controllers.clone() };
    let settings = Settings {
        timings: config.timings(),
        cpu_overcommit_percent: config.cpu_overcommit,
        disk_overcommit_percent: config.disk_overcommit,
        address: config.address(),
        controllers,
        metrics: metrics.clone(),
    };
    loop {
        let elected = tokio::select! {
            biased;
            // An election that is won at this very moment is left to run out.
            () = stop.cancelled() => return,
            elected = campaign.win(|hint| part.slot.clear(hint)) => elected,
            never = follower.run() => match never {},
        };
        lead(&campaign, &mut follower, &store, clock, id, elected, &settings, &part.slot, stop).await;
    }
}

/// Leaves this process's id in the data directory and returns the one that was there. The directory is locked.
fn succeed(data_dir: &Path, id: ControllerId) -> Option<ControllerId> {
    let path = data_dir.join("controller-id");
    let predecessor = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
    if let Err(error) = fs::write(&path, format!("{id}\n")) {
        // Without it the next start only takes a little longer.
        warn!("cannot write {}: {error}", path.display());
    }
    predecessor
}

async fn connect(endpoints: &[String]) -> Store {
    let mut complained = false;
    loop {
        match Store::connect(endpoints).await {
            Ok(store) => return store,
            Err(error) => {
                if !complained {
                    warn!("cannot connect to etcd at {}: {}", endpoints.join(", "), report(&error));
                    complained = true;
                }
                time::sleep(CONNECT_AGAIN).await;
            }
        }
    }
}

/// One term, from the election to its end.
#[expect(clippy::too_many_arguments, reason = "the parts of a process meet here and nowhere else")]
async fn lead(
    campaign: &Campaign,
    follower: &mut Follower,
    store: &Store,
    clock: &Clock,
    id: ControllerId,
    elected: Elected,
    settings: &Settings,
    slot: &LeaderSlot,
    stop: &CancellationToken,
) {
    let cancel = elected.cancel.clone();
    let lease = elected.lease();
    let keeping = elected.keeper();
    let term = async {
        let mirror = tokio::select! {
            biased;
            () = cancel.cancelled() => return Some(elected.token),
            () = stop.cancelled() => return Some(elected.token),
            caught_up = follower.catch_up(elected.term) => match caught_up {
                Ok(mirror) => mirror,
                Err(error) => {
                    warn!("elected, but {}", report(&error));
                    return Some(elected.token);
                }
            },
        };
        match Leader::begin(store.clone(), clock.clone(), id, elected, settings.clone(), mirror).await {
            Ok((leader, writer)) => {
                reign(leader, slot, stop).await;
                finish(writer).await
            }
            Err((error, token)) => {
                warn!("elected, but the term cannot begin: {}", report(&error));
                Some(token)
            }
        }
    };
    let (token, ()) = tokio::join!(
        async {
            let token = term.await;
            // The key is given up by whoever still holds the token; if it is no longer ours, etcd says so.
            if let Some(token) = &token {
                campaign.resign(token, lease).await;
            }
            cancel.cancel();
            token
        },
        campaign.keep(&keeping),
    );
    if token.is_none() {
        warn!("the writer of the last term did not end in time; its token is lost with it");
    }
}

/// Leads until the term is over or the process is to stop.
async fn reign(leader: Arc<Leader>, slot: &LeaderSlot, stop: &CancellationToken) {
    let reconciler = tokio::spawn(reconcile::driver::run(leader.clone()));
    slot.set(leader.clone());
    tokio::select! {
        biased;
        () = leader.cancel.cancelled() => {}
        () = stop.cancelled() => info!("stopping: handing over"),
    }
    slot.clear(None);
    // Sessions, the reconciler and the writer end with it.
    leader.cancel.cancel();
    if time::timeout(TERM_END, reconciler).await.is_err() {
        warn!("the reconciler did not end in time");
    }
}

async fn finish(writer: JoinHandle<LeaderToken>) -> Option<LeaderToken> {
    match time::timeout(TERM_END, writer).await {
        Ok(Ok(token)) => Some(token),
        Ok(Err(error)) => {
            warn!("the writer ended badly: {error}");
            None
        }
        Err(_) => None,
    }
}

/// Makes the data directory and holds it: two controllers must not share one.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(data_dir).with_context(|| format!("cannot make --data-dir {}", data_dir.display()))?;
    let path = data_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "--data-dir {} is in use by another controller; give this one a directory of its own",
            data_dir.display()
        );
    }
    Ok(file)
}
