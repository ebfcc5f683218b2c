//! Puts the services on a listener.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::watch,
    time,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::warn;
use uncloud_proto::{
    FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES,
    clock::Clock,
    dial::Dial,
    v1::{
        agent_service_server::AgentServiceServer, cluster_service_server::ClusterServiceServer,
        host_service_server::HostServiceServer, image_service_server::ImageServiceServer,
        vm_service_server::VmServiceServer,
    },
};

use super::{
    agent_service::Agents, cluster_service::Cluster, context::Context, forward::ForwardLayer, host_service::Hosts,
    image_service::Images, shared_watch::SharedWatches, vm_service::Vms,
};
use crate::{
    leadership::{LeaderSlot, WarmCopy},
    metrics::{MeasureLayer, Metrics},
    store::Store,
};

/// How often an idle peer is asked whether it is alive, and how long it may take to answer. A host that falls silent must
/// lose its session well within its lease (6 s), so that a new one can take its place; a stream without this stays open for
/// ever after a partition.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Streams of one connection at a time. An agent has one session and one for each console.
const MAX_STREAMS: u32 = 1024;
/// Headers of one request, in bytes.
const MAX_HEADERS: u32 = 16 * 1024;

/// How long to wait when no connection can be accepted. Trying at once would keep a CPU busy and fill the log.
const ACCEPT_AGAIN: Duration = Duration::from_millis(500);

/// The largest message that a user may send, in bytes. A VM with everything that is allowed has less than half of that.
const MAX_REQUEST_BYTES: usize = 1024 * 1024;

/// The services whose health is told, besides the server's own (the empty name).
const HEALTH_NAMES: [&str; 5] =
    ["", "uncloud.v1.VmService", "uncloud.v1.HostService", "uncloud.v1.ImageService", "uncloud.v1.ClusterService"];

/// Why serving has ended, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptors of the services do not decode.
    #[error("server reflection cannot be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("the server failed")]
    Transport(#[from] tonic::transport::Error),
}

/// What is served from.
#[derive(Clone, Debug)]
pub struct Serving {
    /// The leadership of this process.
    pub slot: LeaderSlot,
    /// Its copy of the state.
    pub copy: WarmCopy,
    /// etcd, once it has been reached.
    pub store: watch::Receiver<Option<Store>>,
    /// The time.
    pub clock: Clock,
    /// vCPUs promised per CPU thread, in percent.
    pub cpu_overcommit_percent: u32,
    /// Bytes of disks promised per byte of a pool, in percent.
    pub disk_overcommit_percent: u32,
    /// Where others reach this controller, `HOST:PORT`.
    pub address: String,
    /// How it reaches others.
    pub dial: Dial,
    /// Where calls are counted.
    pub metrics: Metrics,
}

/// Serves the connections that come in until `stop` fires and they have ended.
///
/// # Errors
///
/// When the server cannot be set up, or its listener fails.
pub async fn serve<S>(
    incoming: impl Stream<Item = io::Result<S>>,
    serving: Serving,
    stop: CancellationToken,
) -> Result<(), Error>
where
    S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let (health, health_service) = tonic_health::server::health_reporter();
    let Serving { slot, copy, store, clock, cpu_overcommit_percent, disk_overcommit_percent, address, dial, metrics } =
        serving;
    let context = Context {
        slot: slot.clone(),
        copy: copy.clone(),
        store,
        clock,
        cpu_overcommit_percent,
        disk_overcommit_percent,
    };
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can show the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(SharedWatches::new(
            VmServiceServer::new(Vms { context: context.clone() }).max_decoding_message_size(MAX_REQUEST_BYTES),
            context.clone(),
            MAX_REQUEST_BYTES,
        ))
        .add_service(
            HostServiceServer::new(Hosts { context: context.clone() }).max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(
            ImageServiceServer::new(Images { context: context.clone() }).max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(
            ClusterServiceServer::new(Cluster { context: context.clone() })
                .max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(
            AgentServiceServer::new(Agents { context, metrics: metrics.clone() })
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        );

    let own = address.clone();
    let server = Server::builder()
        .layer(MeasureLayer(metrics))
        .layer(ForwardLayer::new(slot.clone(), copy.clone(), address, dial))
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::select! {
        result = server => Ok(result?),
        () = tell_health(slot, copy, own, health, stop) => unreachable!("health is told for ever"),
    }
}

/// The connections that come in over TCP. Never ends: when there are no file descriptors left, it waits until there are again.
pub fn accept(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    futures_util::stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Without this, small messages wait for each other, up to 40 ms.
                    if let Err(error) = stream.set_nodelay(true) {
                        warn!("TCP_NODELAY cannot be set: {error}");
                    }
                    return Some((Ok(stream), listener));
                }
                // The peer has given up before its turn came.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
                Err(error) => {
                    warn!("a connection cannot be accepted: {error}");
                    time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    })
}

/// Says SERVING while this process leads, or follows a leader with a copy of its own.
async fn tell_health(slot: LeaderSlot, copy: WarmCopy, own: String, health: HealthReporter, stop: CancellationToken) {
    let mut leads = slot.changed();
    let mut follows = copy.changed();
    loop {
        let leading = leads.borrow_and_update().is_ok();
        let following = follows.serves(&own);
        let status = if (leading || following) && !stop.is_cancelled() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in HEALTH_NAMES {
            health.set_service_status(name, status).await;
        }
        tokio::select! {
            Ok(()) = leads.changed() => {}
            () = follows.changed() => {}
            () = stop.cancelled(), if status == ServingStatus::Serving => {}
        }
    }
}
