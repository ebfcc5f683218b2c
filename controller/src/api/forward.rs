//! Passes on to the leader what only the leader can do, so that every controller serves the whole API.
//!
//! Whole HTTP/2 requests are passed on, streams included, without looking into them: the bytes go to the leader and its
//! answer comes back, so nothing here knows a method by more than its name. It decides nothing else; when no leader is known
//! the services answer themselves, and say so.
//!
//! A call is passed on once: a controller that gets one which was passed on, and does not lead, refuses it with the address
//! of the leader as it knows it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::{Layer, Service, ServiceExt as _};
use tracing::debug;
use uncloud_proto::{FORWARDED_METADATA_KEY, dial::Dial};

use super::error;
use crate::leadership::{LeaderSlot, WarmCopy};

/// A leader that cannot be reached within this is told to the client as not reachable.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// A leader that hangs must not hold calls for longer than a change of leader takes.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// What every controller answers from its own copy, or about itself. All else of ours goes to the leader: it writes, or it
/// tells what only the leader knows (who is heard, what hosts say).
const ANSWERED_HERE: [&str; 10] = [
    "/uncloud.v1.VmService/GetVm",
    "/uncloud.v1.VmService/ListVms",
    "/uncloud.v1.VmService/WatchVms",
    "/uncloud.v1.HostService/SimulateHostFailure",
    "/uncloud.v1.ImageService/GetImage",
    "/uncloud.v1.ImageService/ListImages",
    "/uncloud.v1.ClusterService/ListEvents",
    "/uncloud.v1.ClusterService/WatchEvents",
    // Agents follow the leader themselves: a heartbeat must not go round.
    "/uncloud.v1.AgentService/Session",
    "/uncloud.v1.AgentService/AttachStream",
];

/// Whether a path is a method that only the leader serves.
fn needs_leader(path: &str) -> bool {
    path.starts_with("/uncloud.v1.") && !ANSWERED_HERE.contains(&path)
}

/// Puts [`Forward`] before the services.
#[derive(Clone, Debug)]
pub(super) struct ForwardLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    slot: LeaderSlot,
    copy: WarmCopy,
    /// Where this controller serves: it passes nothing on to itself.
    address: String,
    dial: Dial,
    /// The connection to the leader, by its address. One at the most.
    channel: Mutex<BTreeMap<String, Channel>>,
}

impl ForwardLayer {
    pub(super) fn new(slot: LeaderSlot, copy: WarmCopy, address: String, dial: Dial) -> Self {
        Self { shared: Arc::new(Shared { slot, copy, address, dial, channel: Mutex::default() }) }
    }
}

impl<S> Layer<S> for ForwardLayer {
    type Service = Forward<S>;

    fn layer(&self, inner: S) -> Forward<S> {
        Forward { inner, shared: self.shared.clone() }
    }
}

/// The services, with the leader behind them.
#[derive(Clone, Debug)]
pub(super) struct Forward<S> {
    inner: S,
    shared: Arc<Shared>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> Service<Request<Body>> for Forward<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        match self.shared.destination(&request) {
            None => Box::pin(self.inner.call(request)),
            Some(leader) => {
                let shared = self.shared.clone();
                Box::pin(async move { Ok(shared.pass_on(&leader, request).await) })
            }
        }
    }
}

impl Shared {
    /// The leader to whom this request goes. `None`: it is answered here.
    fn destination(&self, request: &Request<Body>) -> Option<String> {
        if !needs_leader(request.uri().path()) || request.headers().contains_key(FORWARDED_METADATA_KEY) {
            return None;
        }
        // The copy knows of a new leader before the campaign has looked.
        let hint = match self.slot.get() {
            Ok(_) => return None,
            Err(not_leader) => self.copy.leader().or(not_leader.hint),
        };
        hint.filter(|address| *address != self.address)
    }

    async fn pass_on(&self, leader: &str, mut request: Request<Body>) -> Response<Body> {
        request.headers_mut().insert(FORWARDED_METADATA_KEY, HeaderValue::from_static("1"));
        let channel = match self.channel(leader).await {
            Ok(channel) => channel,
            Err(problem) => {
                debug!(leader, "the leader cannot be reached: {problem}");
                return error::leader_not_reached(leader).into_http();
            }
        };
        match channel.oneshot(request).await {
            Ok(answer) => answer.map(|body| Body::new(Relayed { body, leader: leader.to_owned(), over: false })),
            Err(problem) => {
                debug!(leader, "a call that was passed on broke: {problem}");
                self.channels().remove(leader);
                error::leader_lost(leader).into_http()
            }
        }
    }

    /// A connection that stands. One that breaks later is made again by itself.
    async fn channel(&self, leader: &str) -> Result<Channel, tonic::transport::Error> {
        if let Some(channel) = self.channels().get(leader) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{leader}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let channel = self.dial.now(endpoint).await?;
        let mut channels = self.channels();
        channels.clear();
        channels.insert(leader.to_owned(), channel.clone());
        Ok(channel)
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leader's answer on its way back. When the leader dies in the middle of it, the client gets a status all the same.
struct Relayed {
    body: Body,
    leader: String,
    over: bool,
}

impl HttpBody for Relayed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Err(problem)) => {
                debug!(leader = self.leader, "a stream that was passed on broke: {}", problem.message());
                self.over = true;
                let mut trailers = HeaderMap::new();
                match error::leader_lost(&self.leader).add_header(&mut trailers) {
                    Ok(()) => Some(Ok(Frame::trailers(trailers))),
                    Err(status) => Some(Err(status)),
                }
            }
            other => other,
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_writes_or_needs_live_facts_goes_to_the_leader() {
        for path in ["VmService/CreateVm", "VmService/Console", "HostService/ListHosts", "ClusterService/GetStatus"] {
            assert!(needs_leader(&format!("/uncloud.v1.{path}")), "{path}");
        }
        for path in ANSWERED_HERE {
            assert!(!needs_leader(path), "{path}");
        }
        assert!(!needs_leader("/grpc.health.v1.Health/Check"));
        assert!(!needs_leader("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"));
    }

    #[test]
    fn what_is_answered_here_exists() {
        let pool = prost_reflect::DescriptorPool::decode(uncloud_proto::FILE_DESCRIPTOR_SET).unwrap();
        for path in ANSWERED_HERE {
            let (service, method) = path[1..].split_once('/').unwrap();
            let service = pool.get_service_by_name(service).unwrap_or_else(|| panic!("no service {service}"));
            assert!(service.methods().any(|m| m.name() == method), "{path}");
        }
    }
}
