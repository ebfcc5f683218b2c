//! A TCP proxy that is slow, or holds everything back, when a test wants it to: this kernel has no netem.
//!
//! It passes bytes on; what a connection is told is what the other side did: an end becomes an end, and a side that
//! refuses becomes a reset. It loses nothing: packets are lost in `netns.rs`.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

/// What a proxy does with the bytes that arrive from now on, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Passed on at once.
    Clear,
    /// Passed on after this time.
    Slow(Duration),
    /// Kept until the line is another one. Connections are accepted, as by a machine whose program hangs.
    Held,
}

/// One chunk on its way; about what a socket takes at once.
const CHUNK: usize = 16 * 1024;
/// What may be on its way in one direction. More stays in the sockets.
const ON_ITS_WAY: usize = 4 * 1024 * 1024;

/// A proxy in front of one address. Its connections end with it.
pub struct Proxy {
    address: SocketAddr,
    line: watch::Sender<Line>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of `host`; everything goes to `target`.
    ///
    /// # Errors
    ///
    /// The address is not this machine's.
    pub async fn start(host: &str, target: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((host, 0)).await.with_context(|| format!("listen on {host}"))?;
        let address = listener.local_addr()?;
        let (line, lines) = watch::channel(Line::Clear);
        let task = tokio::spawn(serve(listener, target.to_owned(), lines));
        Ok(Self { address, line, task })
    }

    /// `host:port` to dial.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Changes what is done with the bytes that arrive from now on.
    pub fn set(&self, line: Line) {
        self.line.send_replace(line);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, target: String, line: watch::Receiver<Line>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let (target, line) = (target.clone(), line.clone());
                connections.spawn(async move { connection(client, &target, line).await });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(client: TcpStream, target: &str, mut line: watch::Receiver<Line>) {
    let _ = client.set_nodelay(true);
    if line.wait_for(|l| *l != Line::Held).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else {
        // A reset, as if it had been refused.
        let _ = client.set_zero_linger();
        return;
    };
    let _ = server.set_nodelay(true);
    let (mut client_in, mut client_out) = client.into_split();
    let (mut server_in, mut server_out) = server.into_split();
    // When one direction breaks, the other one is worth nothing; when one ends, the other one may go on.
    let there = pass(&mut client_in, &mut server_out, line.clone());
    let back = pass(&mut server_in, &mut client_out, line);
    let _ = tokio::try_join!(there, back);
}

struct Broken;

/// Chunks, and when each is due. An empty one is the end.
type Queue = VecDeque<(Instant, Vec<u8>)>;

/// Passes one direction on until its end, which is passed on, too.
async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut line: watch::Receiver<Line>,
) -> Result<(), Broken> {
    let queue: Mutex<Queue> = Mutex::default();
    let locked = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    let (arrived, mut arrivals) = watch::channel(());
    let (left, mut leavings) = watch::channel(());
    let delays = line.clone();
    let read = async {
        loop {
            let mut chunk = vec![0; CHUNK];
            let n = from.read(&mut chunk).await.unwrap_or(0);
            chunk.truncate(n);
            let delay = match *delays.borrow() {
                Line::Slow(delay) => delay,
                Line::Clear | Line::Held => Duration::ZERO,
            };
            locked().push_back((Instant::now() + delay, chunk));
            arrived.send_replace(());
            while locked().iter().map(|(_, c)| c.len()).sum::<usize>() > ON_ITS_WAY {
                if leavings.changed().await.is_err() {
                    return;
                }
            }
            if n == 0 {
                return;
            }
        }
    };
    let write = async {
        loop {
            let next = locked().front().map(|(due, _)| *due);
            let Some(due) = next else {
                arrivals.changed().await.map_err(|_| Broken)?;
                continue;
            };
            sleep_until(due).await;
            line.wait_for(|l| *l != Line::Held).await.map_err(|_| Broken)?;
            let Some((_, chunk)) = locked().pop_front() else { continue };
            left.send_replace(());
            if chunk.is_empty() {
                return to.shutdown().await.map_err(|_| Broken);
            }
            to.write_all(&chunk).await.map_err(|_| Broken)?;
        }
    };
    tokio::select! {
        written = write => written,
        () = async {
            read.await;
            std::future::pending().await
        } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut r, mut w) = stream.into_split();
                    let _ = tokio::io::copy(&mut r, &mut w).await;
                });
            }
        });
        (address, task)
    }

    /// How long four bytes take there and back.
    async fn round_trip(stream: &mut TcpStream) -> Duration {
        let start = Instant::now();
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
        start.elapsed()
    }

    #[tokio::test]
    async fn it_is_clear_slow_and_held_and_passes_the_end_on() {
        let (target, _echo) = echo().await;
        let proxy = Proxy::start("127.0.0.1", &target).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream).await;
        let delay = Duration::from_millis(150);
        proxy.set(Line::Slow(delay));
        assert!(round_trip(&mut stream).await >= delay * 2, "both ways");
        proxy.set(Line::Held);
        let held = tokio::time::timeout(Duration::from_millis(200), round_trip(&mut stream)).await;
        assert!(held.is_err(), "{held:?}");
        proxy.set(Line::Clear);
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping", "what was held is not lost");
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn nobody_behind_it_is_a_refusal() {
        let proxy = Proxy::start("127.0.0.1", "127.0.0.1:1").await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        let mut answer = [0; 1];
        let got = stream.read(&mut answer).await;
        assert!(got.as_ref().is_err() || got.as_ref().is_ok_and(|n| *n == 0), "{got:?}");
    }
}
