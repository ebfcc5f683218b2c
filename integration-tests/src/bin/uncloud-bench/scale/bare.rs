//! A server that welcomes agents and answers heartbeats, and does nothing else: what the transport alone costs.
//!
//! It is a process of its own, as the controller is: `uncloud-bench bare-server HOST:PORT`.

use std::{
    pin::Pin,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harness::{
    load::{Fleet, Site, raise_descriptors, usage},
    ports::free_port,
};
use tokio::{io::AsyncReadExt as _, net::TcpListener};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use uncloud_proto::v1::{
    self,
    agent_service_server::{AgentService, AgentServiceServer},
    session_request,
    session_response::Message,
};

use super::{CONNECT_LIMIT, quantile};

/// How long heartbeats are counted.
const MEASURE: Duration = Duration::from_secs(8);

/// What it needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bare {
    /// CPU cores.
    pub(super) cores: f64,
    /// KiB of all sessions together.
    pub(super) sessions_kib: f64,
    /// ms.
    pub(super) answer_p99: f64,
    /// Seconds until all agents that dial at once are connected.
    pub(super) connected_after: f64,
}

/// Measures it with the agents of a site, without their VMs.
pub(super) async fn measure(site: &Site) -> anyhow::Result<Bare> {
    let mut site = site.clone();
    site.hosts.iter_mut().for_each(|h| h.vms.clear());
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut server = tokio::process::Command::new(std::env::current_exe()?)
        .args(["bare-server", &address])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut ready = [0; 5];
    server.stdout.take().context("its output")?.read_exact(&mut ready).await?;
    let pid = server.id().context("it runs")?;
    let before = usage::resident_kib(pid)? as f64;

    let mut fleet = Fleet::new(vec![address])?;
    let begin = Instant::now();
    fleet.start(&site);
    fleet.wait_sessions(site.hosts.len(), CONNECT_LIMIT).await?;
    let connected_after = fleet.welcomed_at().duration_since(begin).as_secs_f64();
    let (cores, answers) = beat(&fleet, pid, MEASURE).await?;
    let sessions_kib = usage::resident_kib(pid)? as f64 - before;
    drop(fleet);
    server.kill().await?;
    Ok(Bare { cores, sessions_kib, answer_p99: quantile(&answers, 0.99), connected_after })
}

/// Lets the agents beat for a while. CPU cores that the process used, and how long answers took in ms, shortest first.
pub(super) async fn beat(fleet: &Fleet, pid: u32, time: Duration) -> anyhow::Result<(f64, Vec<f64>)> {
    // The connecting is over only when everybody's first heartbeats are answered.
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(fleet.take_answers());
    let (begin, before) = (Instant::now(), usage::cpu(pid)?);
    tokio::time::sleep(time).await;
    let used = usage::cpu(pid)?.saturating_sub(before);
    Ok((used.as_secs_f64() / begin.elapsed().as_secs_f64(), fleet.take_answers()))
}

/// The program.
pub(crate) async fn serve(address: &str) -> anyhow::Result<()> {
    raise_descriptors()?;
    let listener = TcpListener::bind(address).await?;
    println!("ready");
    let incoming = TcpListenerStream::new(listener).map(|connection| {
        let connection = connection?;
        connection.set_nodelay(true)?;
        std::io::Result::Ok(connection)
    });
    Server::builder().add_service(AgentServiceServer::new(Agents)).serve_with_incoming(incoming).await?;
    Ok(())
}

struct Agents;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Agents {
    type SessionStream = Answers<v1::SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let answers = request.into_inner().filter_map(|message| {
            let answer = match message.ok()?.message? {
                session_request::Message::Hello(_) => Message::Welcome(v1::Welcome {
                    heartbeat_interval_ms: 1000,
                    vms: Vec::new(),
                    controllers: Vec::new(),
                }),
                session_request::Message::Heartbeat(heartbeat) => Message::Renewal(v1::Renewal {
                    sequence: heartbeat.sequence,
                    fast_lease_ms: 6000,
                    patient_lease_ms: 60_000,
                }),
                _ => return None,
            };
            Some(Ok(v1::SessionResponse { term: 1, message: Some(answer) }))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    type AttachStreamStream = Answers<v1::AttachStreamResponse>;

    async fn attach_stream(
        &self,
        _: Request<Streaming<v1::AttachStreamRequest>>,
    ) -> Result<Response<Self::AttachStreamStream>, Status> {
        Err(Status::unimplemented("there are no streams here"))
    }
}
