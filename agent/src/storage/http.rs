//! Fetches files from web servers, which are trusted with nothing: not to answer, not to go on, not to send what they said, and not
//! to send the same as yesterday.
//!
//! A file comes in pieces that go to a writer; when the connection breaks, the next one goes on where this one ended (`Range`), but
//! only if the server vouches that it is still the same file (`If-Range` with its entity tag or date). Otherwise it begins anew. What
//! was fetched is checked by its sha256 afterwards, by others.
//!
//! # Invariants
//!
//! * **H1** Never more bytes come out than `Wanted::most`, and if the size is known, never more than that.
//! * **H2** Every wait has an end: a server that is silent, or drips, is left ([`Patience`]), and a fetch that makes no headway
//!   fails after [`ATTEMPTS`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, RANGE},
    redirect::{Action, Attempt, Policy},
};
use tokio::time::{self, Instant};
use tracing::debug;
use uncloud_proto::v1::FileProblemKind;

use super::{
    outside::{self, Inside, OutsideNames},
    source::{Error, problem},
};
use crate::vm::runner::chain;

/// So many connections in a row may bring nothing before a fetch fails.
const ATTEMPTS: u32 = 5;
/// So often a file may turn out to be another one, or a server may be unable to go on, before a fetch fails.
const RESTARTS: u32 = 5;
/// The first pause between two attempts. Doubled each time.
const PAUSE: Duration = Duration::from_millis(500);
/// Redirections that are followed.
const REDIRECTS: usize = 5;
/// However slow a server may be within the bounds above: at this many bytes in a second a file must come, and a while longer.
const SLOWEST: u64 = 1 << 17;
const GRACE: Duration = Duration::from_secs(600);
/// A file whose size is not known beforehand must come in this time.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Over this time a server must send at least [`LEAST`], or it is taken for one that drips to hold us up.
const WINDOW: Duration = Duration::from_secs(60);
const LEAST: u64 = 256 * 1024;

/// How long servers may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// To take a connection.
    pub connect: Duration,
    /// To say or send anything.
    pub silence: Duration,
}

/// Which addresses may be asked. What users must not reach (such as a cloud's metadata service) is kept from them by this.
#[derive(Debug, Clone)]
pub enum Allowed {
    /// Any that leads away from the host itself and its link.
    Outside,
    /// As the operator says: any that begins with one of these, wherever it leads.
    Listed(Vec<String>),
}

impl Allowed {
    fn check(&self, url: &Url) -> Result<(), String> {
        let text = url.as_str();
        match self {
            Self::Outside => match outside::literal(url) {
                Some(address) if !outside::is_outside(address) => Err(format!("{text}: {}", Inside(address))),
                Some(_) | None => Ok(()),
            },
            Self::Listed(prefixes) if prefixes.iter().any(|prefix| text.starts_with(prefix.as_str())) => Ok(()),
            Self::Listed(_) => {
                Err(format!("{text} is not among the addresses that this host's agent fetches from (--image-url)"))
            }
        }
    }
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The address.
    pub url: String,
    /// Its size, if it is known.
    pub size: Option<u64>,
    /// It must not be larger than this.
    pub most: u64,
}

/// Takes what comes.
pub trait Sink {
    /// The next bytes. An error ends the fetch.
    fn take(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), Error>> + Send;
    /// It begins anew: what came so far is void.
    fn restart(&mut self) -> impl Future<Output = Result<(), Error>> + Send;
    /// How large it will be, as the server says.
    fn expect(&mut self, total: u64);
}

/// Speaks with web servers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Http {
    client: Client,
    allowed: Allowed,
    patience: Patience,
}

/// Why an attempt ended without the file.
enum Stop {
    /// Another attempt would end the same way.
    Final(Error),
    /// Try again: what happened, in words.
    Again(String),
    /// Try again from the beginning: why.
    Anew(String),
}

fn last(kind: FileProblemKind, words: impl Into<String>) -> Stop {
    Stop::Final(problem(kind, words))
}

/// How much has come lately, over all connections: a server that breaks off and is asked again is no faster for that.
struct Rate {
    since: Instant,
    bytes: u64,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0 }
    }

    /// Whether it drips.
    fn is_too_slow(&mut self, now: Instant) -> bool {
        if now - self.since < WINDOW {
            return false;
        }
        let slow = self.bytes < LEAST;
        *self = Self::new(now);
        slow
    }
}

/// How long a fetch may take in all. `total` is what the server says, which it is not trusted with.
fn longest(size: Option<u64>, total: Option<u64>) -> Duration {
    let at_slowest = |bytes: u64| Duration::from_secs(bytes / SLOWEST) + GRACE;
    match (size, total) {
        (Some(size), _) => at_slowest(size),
        (None, Some(total)) => at_slowest(total).min(LONGEST),
        (None, None) => LONGEST,
    }
}

/// What has come so far.
#[derive(Default)]
struct Progress {
    at: u64,
    /// The whole size, as the server has said.
    total: Option<u64>,
    /// By what the server knows that it is the same file.
    validator: Option<String>,
}

impl Http {
    /// The certificates are those of the operating system, or those in `SSL_CERT_FILE`.
    ///
    /// # Errors
    ///
    /// There are none that can be read.
    pub fn new(allowed: Allowed, patience: Patience) -> Result<Self, reqwest::Error> {
        // May have been done before, by a test beside this one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let check = allowed.clone();
        let follow = move |attempt: Attempt<'_>| -> Action {
            let down = attempt.previous().last().is_some_and(|from| from.scheme() == "https")
                && attempt.url().scheme() != "https";
            if attempt.previous().len() > REDIRECTS {
                return attempt.error("too many redirections");
            }
            if down {
                return attempt.error("it leads from https to http");
            }
            match check.check(attempt.url()) {
                Ok(()) => attempt.follow(),
                Err(words) => attempt.error(words),
            }
        };
        let builder = match &allowed {
            // Names, also those that redirections lead to, are checked by what they stand for when they are connected to.
            Allowed::Outside => Client::builder().no_proxy().dns_resolver(Arc::new(OutsideNames)),
            Allowed::Listed(_) => Client::builder(),
        };
        let client = builder
            .user_agent(concat!("uncloud-agent/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(patience.connect)
            .redirect(Policy::custom(follow))
            .http1_only()
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Self { client, allowed, patience })
    }

    /// Looks at the beginning of a file: its first `length` bytes, and its size, if the server says it.
    ///
    /// # Errors
    ///
    /// It cannot be had.
    pub async fn peek(&self, url: &str, length: usize) -> Result<(Vec<u8>, Option<u64>), Error> {
        let url = self.parse(url)?;
        let io = |words: String| problem(FileProblemKind::Io, words);
        let mut response = match self.ask(&url, None).await {
            Ok(response) => response,
            Err(Stop::Final(error)) => return Err(error),
            Err(Stop::Again(words) | Stop::Anew(words)) => return Err(io(words)),
        };
        let size = response.content_length();
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            match time::timeout(self.patience.silence, response.chunk()).await {
                Ok(Ok(Some(chunk))) => bytes.extend(chunk.iter().take(length - bytes.len())),
                Ok(Ok(None)) => break,
                Ok(Err(e)) => return Err(io(format!("{url}: {}", chain(&e)))),
                Err(_) => return Err(io(self.silent(&url))),
            }
        }
        Ok((bytes, size))
    }

    /// Fetches a file into `sink`.
    ///
    /// # Errors
    ///
    /// It cannot be had, or is not what is wanted. `sink` has an unknown part of it then.
    pub async fn fetch(&self, wanted: &Wanted, sink: &mut (impl Sink + Send)) -> Result<(), Error> {
        let url = self.parse(&wanted.url)?;
        let mut progress = Progress::default();
        let (mut failures, mut restarts) = (0, 0);
        let begun = Instant::now();
        let mut rate = Rate::new(begun);
        loop {
            let before = progress.at;
            let words = match self.attempt(&url, wanted, &mut progress, (begun, &mut rate), sink).await {
                Ok(()) => return Ok(()),
                Err(Stop::Final(error)) => return Err(error),
                Err(Stop::Anew(words)) => {
                    restarts += 1;
                    progress = Progress::default();
                    sink.restart().await?;
                    words
                }
                Err(Stop::Again(words)) => {
                    if progress.at - before >= LEAST {
                        failures = 0;
                    }
                    words
                }
            };
            failures += 1;
            if failures >= ATTEMPTS || restarts >= RESTARTS {
                let words =
                    format!("{words}; {} bytes had come, after {ATTEMPTS} attempts it is given up", progress.at);
                return Err(problem(FileProblemKind::Io, words));
            }
            debug!(%url, at = progress.at, "trying again: {words}");
            let pause = PAUSE * 2_u32.saturating_pow(failures - 1);
            time::sleep(pause.mul_f64(0.75 + 0.5 * rand::random::<f64>())).await;
        }
    }

    /// One connection.
    async fn attempt(
        &self,
        url: &Url,
        wanted: &Wanted,
        progress: &mut Progress,
        (begun, rate): (Instant, &mut Rate),
        sink: &mut (impl Sink + Send),
    ) -> Result<(), Stop> {
        if progress.at > 0 && progress.validator.is_none() {
            return Err(Stop::Anew(format!(
                "{url} broke off, and its server cannot say whether it is the same file still"
            )));
        }
        let resume = progress.validator.as_deref().filter(|_| progress.at > 0).map(|v| (progress.at, v));
        let mut response = self.ask(url, resume).await?;
        self.begin(url, wanted, progress, &response, sink)?;
        loop {
            let chunk = match time::timeout(self.patience.silence, response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => break,
                Ok(Err(e)) => return Err(Stop::Again(format!("{url}: {}", chain(&e)))),
                Err(_) => return Err(Stop::Again(self.silent(url))),
            };
            let length = chunk.len() as u64;
            // H1
            let most = wanted.size.or(progress.total).unwrap_or(wanted.most).min(wanted.most);
            if progress.at + length > most {
                let words = format!("{url} sends more than {most} bytes, and was cut off");
                return Err(last(FileProblemKind::Invalid, words));
            }
            sink.take(chunk).await.map_err(Stop::Final)?;
            progress.at += length;
            rate.bytes += length;
            let now = Instant::now();
            let longest = longest(wanted.size, progress.total);
            if now - begun > longest {
                let words = format!("{url} is too slow: {} bytes had come after {longest:?}", progress.at);
                return Err(last(FileProblemKind::Io, words));
            }
            if rate.is_too_slow(now) {
                return Err(Stop::Again(format!("{url} sends fewer than {LEAST} bytes in {} s", WINDOW.as_secs())));
            }
        }
        match wanted.size.or(progress.total) {
            Some(size) if progress.at < size => {
                Err(Stop::Again(format!("{url} ended after {} of {size} bytes", progress.at)))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Takes in what a response says about the file.
    fn begin(
        &self,
        url: &Url,
        wanted: &Wanted,
        progress: &mut Progress,
        response: &Response,
        sink: &mut (impl Sink + Send),
    ) -> Result<(), Stop> {
        let total = if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = content_range(response.headers());
            match range {
                Some((from, total)) if from == progress.at && progress.at > 0 => total,
                _ => return Err(Stop::Anew(format!("{url} sends another part than it was asked for"))),
            }
        } else {
            if progress.at > 0 {
                return Err(Stop::Anew(format!("{url} has changed while it was fetched, or its server cannot go on")));
            }
            response.content_length()
        };
        if let Some(total) = total {
            if let Some(size) = wanted.size
                && size != total
            {
                let words = format!("{url} has {total} bytes, not {size}: it is not the file that it was");
                return Err(last(FileProblemKind::Invalid, words));
            }
            if total > wanted.most {
                let words = format!("{url} has {total} bytes; at most {} are allowed (--max-image-gib)", wanted.most);
                return Err(last(FileProblemKind::Invalid, words));
            }
            sink.expect(total);
        }
        progress.total = total.or(progress.total);
        progress.validator = validator(response.headers());
        Ok(())
    }

    async fn ask(&self, url: &Url, resume: Option<(u64, &str)>) -> Result<Response, Stop> {
        let mut request = self.client.get(url.clone());
        if let Some((at, validator)) = resume {
            request = request.header(RANGE, format!("bytes={at}-")).header(IF_RANGE, validator);
        }
        let response = match time::timeout(self.patience.connect + self.patience.silence, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(e)) if e.is_redirect() => {
                return Err(last(FileProblemKind::Forbidden, format!("{url}: {}", chain(&e))));
            }
            Ok(Err(e)) if outside::is_refusal(&e) => {
                return Err(last(FileProblemKind::Forbidden, format!("{url}: {}", chain(&e))));
            }
            Ok(Err(e)) => return Err(Stop::Again(chain(&e))),
            Err(_) => return Err(Stop::Again(self.silent(url))),
        };
        let status = response.status();
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            StatusCode::RANGE_NOT_SATISFIABLE => Err(Stop::Anew(format!("{url}: the server answers {status}"))),
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                Err(last(FileProblemKind::Invalid, format!("{url}: the server answers {status}")))
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                Err(Stop::Again(format!("{url}: the server answers {status}")))
            }
            _ if status.is_server_error() => Err(Stop::Again(format!("{url}: the server answers {status}"))),
            _ => Err(last(FileProblemKind::Forbidden, format!("{url}: the server answers {status}"))),
        }
    }

    fn parse(&self, text: &str) -> Result<Url, Error> {
        let url =
            Url::parse(text).map_err(|e| problem(FileProblemKind::Invalid, format!("{text} is no address: {e}")))?;
        self.allowed.check(&url).map_err(|words| problem(FileProblemKind::Forbidden, words))?;
        Ok(url)
    }

    fn silent(&self, url: &Url) -> String {
        format!("{url}: nothing came for {:?}", self.patience.silence)
    }
}

/// By what the server can say whether a file is still the same: a strong entity tag, or else a date.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    text(ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| text(LAST_MODIFIED))
}

/// First byte and whole size of a part.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(reqwest::header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (k.clone(), v.parse().unwrap())).collect()
    }

    #[test]
    fn only_what_is_sure_to_change_with_the_file_vouches_for_it() {
        assert_eq!(validator(&headers(&[(ETAG, "\"a\""), (LAST_MODIFIED, "x")])), Some("\"a\"".into()));
        assert_eq!(validator(&headers(&[(ETAG, "W/\"a\""), (LAST_MODIFIED, "x")])), Some("x".into()));
        assert_eq!(validator(&headers(&[(ETAG, "W/\"a\"")])), None);
    }

    #[test]
    fn who_drips_is_found_out_over_all_connections() {
        let begun = Instant::now();
        let mut rate = Rate::new(begun);
        rate.bytes = LEAST - 1;
        assert!(!rate.is_too_slow(begun + WINDOW / 2));
        assert!(rate.is_too_slow(begun + WINDOW));
        rate.bytes = LEAST;
        assert!(!rate.is_too_slow(begun + 2 * WINDOW));
        assert_eq!(rate.bytes, 0);
    }

    #[test]
    fn a_fetch_has_an_end() {
        assert_eq!(longest(Some(1 << 30), Some(1)), Duration::from_secs(8192 + 600));
        assert_eq!(longest(None, Some(1 << 30)), Duration::from_secs(8192 + 600));
        assert_eq!(longest(None, Some(u64::MAX)), LONGEST);
        assert_eq!(longest(None, None), LONGEST);
    }

    #[test]
    fn parts_are_read_and_nonsense_is_not() {
        let range = |text: &str| content_range(&headers(&[(CONTENT_RANGE, text)]));
        assert_eq!(range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes", "bytes */10", "bytes -5/10", "lines 1-2/3", "bytes 99999999999999999999-1/2"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_are_allowed_by_their_beginning() {
        let allowed = Allowed::Listed(vec!["https://images.example.org/".into()]);
        let check = |url: &str| allowed.check(&Url::parse(url).unwrap()).is_ok();
        assert!(check("https://images.example.org/debian.qcow2"));
        // Parsing makes them plain, so neither dots nor a user name get past the beginning.
        assert!(!check("https://images.example.org@evil.org/"));
        assert!(!check("https://images.example.org.evil.org/x"));
        assert!(!check("http://169.254.169.254/latest"));
    }

    #[tokio::test]
    async fn without_a_list_nothing_inside_is_asked() {
        let patience = Patience { connect: Duration::from_secs(5), silence: Duration::from_secs(5) };
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let http = Http::new(Allowed::Outside, patience).unwrap();
        for host in ["127.0.0.1", "localhost", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"] {
            let error = http.peek(&format!("http://{host}:{port}/x"), 1).await.unwrap_err();
            assert_eq!(error.kind, FileProblemKind::Forbidden, "{error}");
            assert!(error.message.contains("--image-url"), "{error}");
        }
        assert!(time::timeout(Duration::ZERO, server.accept()).await.is_err(), "nobody has connected");
        // The operator's word counts for more.
        let http = Http::new(Allowed::Listed(vec![format!("http://127.0.0.1:{port}/")]), patience).unwrap();
        let url = format!("http://127.0.0.1:{port}/x");
        let (peeked, accepted) = tokio::join!(http.peek(&url, 1), async { server.accept().await.map(drop) });
        accepted.unwrap();
        assert_eq!(peeked.unwrap_err().kind, FileProblemKind::Io);
    }
}
