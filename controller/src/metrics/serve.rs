//! Serves the numbers over HTTP/1.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, time};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Metrics;

/// Connections at a time; others wait to be accepted.
const CONNECTIONS: usize = 16;
/// How long a connection may last without a request, and a request without an answer.
const IDLE: Duration = Duration::from_secs(90);
/// How long to wait when no connection can be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(500);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers `GET /metrics` until `stop` fires.
pub async fn serve(listener: TcpListener, metrics: Metrics, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let accept = async {
        loop {
            let place = Arc::clone(&places).acquire_owned().await.expect("it is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    warn!("a connection for metrics cannot be accepted: {error}");
                    time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let (metrics, stop) = (metrics.clone(), stop.clone());
            tokio::spawn(async move {
                let _place = place;
                let service = service_fn(|request| answer(&metrics, request));
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(IDLE)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    end = connection => if let Err(error) = end {
                        debug!("a connection for metrics ended: {error}");
                    },
                    () = stop.cancelled() => {}
                }
            });
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept => {}
    }
}

async fn answer(metrics: &Metrics, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, OPENMETRICS, metrics.text().await),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET only\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "the numbers are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    Ok(response)
}
