//! `AgentService`: hands agents' streams to `sessions/` and `console.rs`.

use std::{pin::Pin, time::Duration};

use futures_util::{StreamExt as _, stream::Map};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uncloud_proto::{
    UNREACHED_METADATA_KEY,
    ids::HostId,
    v1::{self, agent_service_server::AgentService},
};
use uuid::Uuid;

use super::{console, context::Context, validate::Violations};
use crate::{
    metrics::Metrics,
    sessions::{self, Item, Waiting},
};

/// How long an agent may take to say which stream it attaches.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Agents {
    pub(super) context: Context,
    pub(super) metrics: Metrics,
}

#[tonic::async_trait]
impl AgentService for Agents {
    type SessionStream = Map<ReceiverStream<Item>, fn(Item) -> Result<v1::SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let unreached = request.metadata().get(UNREACHED_METADATA_KEY).and_then(|v| v.to_str().ok());
        let waiting = Waiting::new(self.context.slot.clone(), self.metrics.clone(), unreached);
        if let Some(Err(other)) = waiting.place() {
            return Err(other.into());
        }
        let (queue, receiver) = mpsc::channel(sessions::QUEUE);
        tokio::spawn(sessions::run(waiting, request.into_inner(), queue));
        Ok(Response::new(ReceiverStream::new(receiver).map(|item| *item)))
    }

    type AttachStreamStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::AttachStreamResponse, Status>> + Send>>;

    async fn attach_stream(
        &self,
        request: Request<Streaming<v1::AttachStreamRequest>>,
    ) -> Result<Response<Self::AttachStreamStream>, Status> {
        let leader = self.context.leader()?;
        let mut inbound = request.into_inner();
        let first = time::timeout(ATTACH_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("there was no first message; send `attach` at once"))??;
        let (host, stream) = parse_attach(first)?;
        let pipe = leader
            .sessions
            .attach(host, stream)
            .ok_or_else(|| Status::not_found(format!("nobody waits for stream {stream} of host {host}; it is over")))?;
        let answer = console::attach(self.context.clone(), leader, pipe, inbound);
        Ok(Response::new(Box::pin(answer)))
    }
}

fn parse_attach(first: Option<v1::AttachStreamRequest>) -> Result<(HostId, Uuid), Violations> {
    let Some(v1::attach_stream_request::Message::Attach(attach)) = first.and_then(|m| m.message) else {
        return Err(Violations::one("attach", "is required in the first message"));
    };
    let host = attach.host_id.parse().map_err(|e| Violations::one("attach.host_id", format!("{e}")))?;
    let stream =
        Uuid::try_parse(&attach.stream_id).map_err(|_| Violations::one("attach.stream_id", "is not a UUID"))?;
    Ok((host, stream))
}
