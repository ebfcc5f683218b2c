//! gRPC over turmoil's simulated TCP.
//!
//! turmoil sends no segment twice: a partition kills what stands, for good, and nobody is told. A hold is a stall.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::stream;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_stream::Stream;
use tonic::transport::{Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};
use uncloud_proto::dial::Dial;

/// A connection that came in.
#[derive(Debug)]
pub(super) struct SimStream(TcpStream);

impl Connected for SimStream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for SimStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// The connections to a port of this simulated machine.
///
/// # Errors
///
/// The port is taken.
pub(super) async fn incoming(port: u16) -> io::Result<impl Stream<Item = io::Result<SimStream>> + Send + 'static> {
    let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), port)).await?;
    Ok(stream::unfold(listener, |listener| async move {
        let next = listener.accept().await.map(|(stream, _)| SimStream(stream));
        Some((next, listener))
    }))
}

/// How simulated machines reach each other.
#[must_use]
pub(super) fn dial() -> Dial {
    Dial::custom(
        |endpoint| endpoint.connect_with_connector_lazy(tower::service_fn(connect)),
        |endpoint| Box::pin(async move { endpoint.connect_with_connector(tower::service_fn(connect)).await }),
    )
}

async fn connect(uri: Uri) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().ok_or_else(|| io::Error::other("an address without a host"))?;
    let stream = TcpStream::connect((host.to_owned(), uri.port_u16().unwrap_or(80))).await?;
    Ok(TokioIo::new(stream))
}
