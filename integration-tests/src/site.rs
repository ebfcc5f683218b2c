//! A small web server for images that does what a test wants of it, good and bad. HTTP/1.1, one request per connection.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    fs,
    io::{self, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time,
};

/// What is served under a path.
#[derive(Clone, Debug)]
pub enum Page {
    /// A file, whole or in part, with an entity tag.
    File(Vec<u8>),
    /// The same, but each connection breaks off after so many bytes, for so many connections; then it is whole.
    Breaks { content: Vec<u8>, after: usize, times: usize },
    /// The same, which knows nothing of parts.
    BreaksWithoutParts { content: Vec<u8>, after: usize, times: usize },
    /// A file that comes this slowly: so many bytes, and then this pause.
    Slow { content: Vec<u8>, piece: usize, pause: Duration },
    /// Whole for who only looks at its beginning; then so many bytes, and nothing more, with the connection open.
    Stalls { content: Vec<u8>, after: usize },
    /// A whole file to who only looks at its beginning the first time; then more than that, without saying how much.
    GrowsWithoutEnd { content: Vec<u8> },
    /// A file of this machine, whole, read while it is sent: for what is too large to be held in memory.
    Disk(PathBuf),
    /// Another place.
    Redirect(String),
    /// A status alone.
    Status(u16),
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Its path.
    pub path: String,
    /// Its `Range`.
    pub range: Option<String>,
    /// Its `If-Range`.
    pub if_range: Option<String>,
}

/// A running server. Ends when it is dropped.
#[derive(Debug)]
pub struct Site {
    address: SocketAddr,
    inner: Arc<Inner>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Inner {
    pages: Mutex<BTreeMap<String, Page>>,
    hits: Mutex<Vec<Hit>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Site {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Site {
    /// Starts one on loopback.
    ///
    /// # Errors
    ///
    /// There is no free port.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_at("127.0.0.1").await
    }

    /// Starts one at an address of this machine.
    ///
    /// # Errors
    ///
    /// There is no free port, or no such address.
    pub async fn start_at(address: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        let inner = Arc::new(Inner::default());
        let serving = Arc::clone(&inner);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let inner = Arc::clone(&serving);
                // A client that goes away is no fault.
                tokio::spawn(async move { drop(serve(&inner, stream).await) });
            }
        });
        Ok(Self { address, inner, task })
    }

    /// Serves a page under a path from now on. Returns its address.
    pub fn put(&self, path: &str, page: Page) -> String {
        lock(&self.inner.pages).insert(path.to_owned(), page);
        format!("http://{}{path}", self.address)
    }

    /// The requests for a path so far.
    #[must_use]
    pub fn hits(&self, path: &str) -> Vec<Hit> {
        lock(&self.inner.hits).iter().filter(|h| h.path == path).cloned().collect()
    }
}

async fn serve(inner: &Inner, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < 16 * 1024 {
        let mut buffer = [0; 1024];
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        request.extend(&buffer[..n]);
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let header = |name: &str| {
        let mut lines = text.lines().filter_map(|l| l.split_once(':'));
        lines.find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim().to_owned())
    };
    let hit = Hit { path: path.clone(), range: header("range"), if_range: header("if-range") };
    let number = {
        let mut hits = lock(&inner.hits);
        hits.push(hit.clone());
        hits.iter().filter(|h| h.path == path).count()
    };
    let page = lock(&inner.pages).get(&path).cloned().unwrap_or(Page::Status(404));
    answer(page, &hit, number, &mut stream).await?;
    stream.shutdown().await
}

/// A tag that changes with the content.
fn tag(content: &[u8]) -> String {
    let sum = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    format!("\"{sum:x}-{}\"", content.len())
}

async fn answer(page: Page, hit: &Hit, number: usize, stream: &mut TcpStream) -> std::io::Result<()> {
    match page {
        Page::File(content) => send(stream, &content, hit, usize::MAX, Parts::Known).await,
        Page::Breaks { content, after, times } => {
            // The first request only looks at the beginning.
            let most = if (2..2 + times).contains(&number) { after } else { usize::MAX };
            send(stream, &content, hit, most, Parts::Known).await
        }
        Page::BreaksWithoutParts { content, after, times } => {
            let most = if (2..2 + times).contains(&number) { after } else { usize::MAX };
            send(stream, &content, hit, most, Parts::Unknown).await
        }
        Page::Slow { content, piece, pause } => {
            head(stream, &content, 0, Parts::Known).await?;
            for bytes in content.chunks(piece) {
                stream.write_all(bytes).await?;
                time::sleep(pause).await;
            }
            Ok(())
        }
        Page::Stalls { content, .. } if number == 1 => send(stream, &content, hit, usize::MAX, Parts::Known).await,
        Page::Stalls { content, after } => {
            send(stream, &content, hit, after, Parts::Known).await?;
            // Until the client has had enough.
            drop(stream.read(&mut [0; 1]).await);
            Ok(())
        }
        Page::GrowsWithoutEnd { content } if number == 1 => send(stream, &content, hit, usize::MAX, Parts::Known).await,
        Page::GrowsWithoutEnd { content } => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await?;
            loop {
                stream.write_all(&content).await?;
            }
        }
        Page::Disk(path) => {
            let mut file = fs::File::open(path).await?;
            let size = file.metadata().await?.len();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            io::copy(&mut file, stream).await.map(drop)
        }
        Page::Redirect(to) => {
            let head =
                format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await
        }
        Page::Status(code) => {
            let head = format!("HTTP/1.1 {code} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await
        }
    }
}

/// Whether a server can send parts of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parts {
    Known,
    Unknown,
}

async fn head(stream: &mut TcpStream, content: &[u8], from: usize, parts: Parts) -> std::io::Result<()> {
    let (size, left) = (content.len(), content.len() - from);
    let mut head = match from {
        0 => "HTTP/1.1 200 OK\r\n".to_owned(),
        from => format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}\r\n", size - 1),
    };
    if parts == Parts::Known {
        head.push_str(&format!("ETag: {}\r\n", tag(content)));
    }
    head.push_str(&format!("Content-Length: {left}\r\nConnection: close\r\n\r\n"));
    stream.write_all(head.as_bytes()).await
}

/// Sends a file, or the part that was asked for, but at most `most` bytes of it.
async fn send(stream: &mut TcpStream, content: &[u8], hit: &Hit, most: usize, parts: Parts) -> std::io::Result<()> {
    let asked = hit.range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let same = hit.if_range.as_ref().is_none_or(|t| *t == tag(content));
    let from = asked.filter(|from| parts == Parts::Known && same && *from < content.len()).unwrap_or(0);
    head(stream, content, from, parts).await?;
    stream.write_all(&content[from..][..most.min(content.len() - from)]).await
}
