//! `WatchVms` on the wire. The generated service would encode every message for every client; here what many watches show alike
//! is sent as it was encoded once.
//!
//! Put around the generated service, whose own `watch_vms` is for callers within this process.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context as TaskContext, Poll},
};

use bytes::BufMut as _;
use http::{Request, Response};
use prost::Message as _;
use tonic::{
    Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, ServerStreamingService},
};
use tower::Service;
use uncloud_proto::v1;

use super::{context::Context, vm_service, vm_watch::Shown, watch::Stream};

/// The method that is served here.
const METHOD: &str = "/uncloud.v1.VmService/WatchVms";

/// The VM service with watches that share what they send.
#[derive(Clone, Debug)]
pub(super) struct SharedWatches<S> {
    inner: S,
    context: Context,
    max_request_bytes: usize,
}

impl<S> SharedWatches<S> {
    /// Around the generated service. A request may have `max_request_bytes`.
    pub(super) fn new(inner: S, context: Context, max_request_bytes: usize) -> Self {
        Self { inner, context, max_request_bytes }
    }
}

impl<S: NamedService> NamedService for SharedWatches<S> {
    const NAME: &'static str = S::NAME;
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> Service<Request<Body>> for SharedWatches<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        if request.uri().path() != METHOD {
            return Box::pin(self.inner.call(request));
        }
        let (watch, limit) = (Watch(self.context.clone()), self.max_request_bytes);
        Box::pin(async move {
            let mut grpc = Grpc::new(Encoded).max_decoding_message_size(limit);
            Ok(grpc.server_streaming(watch, request).await)
        })
    }
}

struct Watch(Context);

impl ServerStreamingService<v1::WatchVmsRequest> for Watch {
    type Response = Shown;
    type ResponseStream = Stream<Shown>;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<Stream<Shown>>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<v1::WatchVmsRequest>) -> Self::Future {
        let context = self.0.clone();
        Box::pin(async move { Ok(tonic::Response::new(vm_service::watch(&context, request).await?)) })
    }
}

/// Requests are decoded as ever, answers are encoded already.
#[derive(Clone, Copy, Debug)]
struct Encoded;

impl Codec for Encoded {
    type Encode = Shown;
    type Decode = v1::WatchVmsRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Encoded {
    type Item = Shown;
    type Error = Status;

    fn encode(&mut self, item: Shown, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let parts = item.parts();
        buffer.reserve(parts.iter().map(|p| p.len()).sum());
        for part in parts {
            buffer.put(part);
        }
        Ok(())
    }
}

impl Decoder for Encoded {
    type Item = v1::WatchVmsRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<v1::WatchVmsRequest>, Status> {
        let request = v1::WatchVmsRequest::decode(buffer);
        request.map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
