//! Counts the calls of the API and how long they take.

use std::{
    collections::BTreeSet,
    task::{Context, Poll},
    time::Instant,
};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use prost::Message as _;
use tonic::{Code, Status};
use tower::{Layer, Service};
use uncloud_proto::FILE_DESCRIPTOR_SET;

use super::Metrics;

/// The methods of the API, as `uncloud.v1.VmService/CreateVm`.
pub(super) fn methods() -> BTreeSet<String> {
    let Ok(set) = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET) else { return BTreeSet::new() };
    let mut methods = BTreeSet::new();
    for file in &set.file {
        for service in &file.service {
            let name =
                |m: &prost_types::MethodDescriptorProto| format!("{}.{}/{}", file.package(), service.name(), m.name());
            methods.extend(service.method.iter().map(name));
        }
    }
    methods
}

/// Puts [`Measure`] before the services.
#[derive(Clone, Debug)]
pub(crate) struct MeasureLayer(pub(crate) Metrics);

impl<S> Layer<S> for MeasureLayer {
    type Service = Measure<S>;

    fn layer(&self, inner: S) -> Measure<S> {
        Measure { inner, metrics: self.0.clone() }
    }
}

/// The services, with somebody who counts.
#[derive(Clone, Debug)]
pub(crate) struct Measure<S> {
    inner: S,
    metrics: Metrics,
}

impl<S, B, R> Service<Request<B>> for Measure<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (metrics, path, began) = (self.metrics.clone(), request.uri().path().to_owned(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // An error is in the headers. What a stream ends with is in its trailers, and is not counted here.
            let code = Status::from_header_map(answer.headers()).map_or(Code::Ok, |s| s.code());
            metrics.call(&path, name(code), began.elapsed());
            Ok(answer)
        })
    }
}

/// As gRPC spells it.
const fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_methods_are_those_of_the_services() {
        let methods = methods();
        assert!(methods.contains("uncloud.v1.VmService/CreateVm"), "{methods:?}");
        assert!(methods.contains("uncloud.v1.AgentService/Session"));
    }
}
