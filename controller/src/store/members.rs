//! Which member of the etcd cluster is asked, and when another one.
//!
//! One at a time, through a client of its own. A client that balances over all members hands every third request to a
//! dead one, and a hung one keeps what it gets for the whole time limit: with one member of three lost, a leader would fall
//! with nearly every transaction. So everybody stays with one member until that fails, and then all go on to the next.
//!
//! What only reads, or does the same when it is done twice, is asked of the next member within the same call. A
//! transaction is not, unless the first member was surely not reached: its outcome would be unknown.

use std::{
    error::Error as StdError,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use etcd_client::{Client, ConnectOptions};
use tracing::debug;

use super::{CONNECT_TIMEOUT, Error, REQUEST_TIMEOUT};
use crate::report;

/// How long one member may take to answer a read when there are others to ask. Longer than a healthy one ever takes; shorter
/// leaves time for two more within the validity of a leadership.
const ATTEMPT: Duration = Duration::from_millis(700);

/// The members that are known. Cheap to clone; all clones ask the same one.
#[derive(Clone)]
pub(super) struct Members {
    clients: Arc<Vec<Client>>,
    current: Arc<AtomicUsize>,
}

/// The member that is asked.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) client: Client,
    index: usize,
}

impl Members {
    /// Prepares connections; they are made when they are needed. `first` says which member is asked at first: controllers that
    /// begin at different ones do not all suffer from the loss of one.
    pub(super) async fn connect(endpoints: &[String], first: usize) -> Result<Self, Error> {
        let mut clients = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let options = ConnectOptions::new()
                .with_connect_timeout(CONNECT_TIMEOUT)
                .with_keep_alive(Duration::from_secs(2), Duration::from_secs(2))
                .with_keep_alive_while_idle(true)
                // A member that is cut off from the others says so at once, and ends its watches, instead of keeping silent.
                .with_require_leader(true);
            clients.push(limited(REQUEST_TIMEOUT, Client::connect([endpoint], Some(options))).await?);
        }
        Self::new(clients, first)
    }

    /// One client for each member.
    pub(super) fn new(clients: Vec<Client>, first: usize) -> Result<Self, Error> {
        if clients.is_empty() {
            return Err(Error::Protocol("no etcd endpoint is configured".into()));
        }
        let current = Arc::new(AtomicUsize::new(first % clients.len()));
        Ok(Self { clients: Arc::new(clients), current })
    }

    /// The member to ask now.
    pub(super) fn current(&self) -> Member {
        let index = self.current.load(Ordering::Acquire);
        Member { client: self.clients[index].clone(), index }
    }

    /// That member failed: the next one is asked from now on, unless somebody has said so already.
    pub(super) fn failed(&self, member: &Member) {
        let next = (member.index + 1) % self.clients.len();
        // If the choice has changed since, the one who changed it knows more.
        let _ = self.current.compare_exchange(member.index, next, Ordering::AcqRel, Ordering::Acquire);
    }

    /// How long one member may take when all together may take `limit`.
    pub(super) fn attempt(&self, limit: Duration) -> Duration {
        if self.clients.len() > 1 { limit.min(ATTEMPT) } else { limit }
    }

    /// Asks one member after the other until one answers. Only for what may be done twice. `limit` is for one member, if
    /// there are others to ask.
    pub(super) async fn ask<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &self,
        limit: Duration,
        request: impl Fn(Client) -> F,
    ) -> Result<T, Error> {
        self.ask_while(limit, request, |_| true).await
    }

    /// Asks for what may be done once only: another member is asked only when one was surely not reached.
    pub(super) async fn ask_once<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &self,
        limit: Duration,
        request: impl Fn(Client) -> F,
    ) -> Result<T, Error> {
        self.ask_while(limit, request, never_sent).await
    }

    /// Asks the next member as long as the failure was the member's and `again` allows it, each of them once.
    async fn ask_while<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &self,
        limit: Duration,
        request: impl Fn(Client) -> F,
        again: impl Fn(&Error) -> bool,
    ) -> Result<T, Error> {
        let mut attempts = self.clients.len();
        loop {
            let member = self.current();
            let error = match limited(limit, request(member.client.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !is_the_members(&error) {
                return Err(error);
            }
            self.failed(&member);
            attempts -= 1;
            if attempts == 0 || !again(&error) {
                return Err(error);
            }
            debug!("one etcd member did not answer, another one is asked: {}", report(&error));
        }
    }
}

/// Another member may know better; it would say the same about what is wrong with the request.
fn is_the_members(error: &Error) -> bool {
    match error {
        Error::Timeout(_) => true,
        Error::Unavailable(error) => match &**error {
            etcd_client::Error::GRpcStatus(status) => !matches!(
                status.code(),
                tonic::Code::ResourceExhausted
                    | tonic::Code::InvalidArgument
                    | tonic::Code::OutOfRange
                    | tonic::Code::NotFound
                    | tonic::Code::FailedPrecondition
            ),
            _ => true,
        },
        Error::Protocol(_) | Error::Compacted(_) => false,
    }
}

/// Nothing was sent: the connection was refused when it was made.
fn never_sent(error: &Error) -> bool {
    let first: &(dyn StdError + 'static) = match error {
        // etcd-client's own error does not name its source.
        Error::Unavailable(error) => match &**error {
            etcd_client::Error::GRpcStatus(status) => status,
            other => other,
        },
        other => other,
    };
    // The kernel says so only of a connection that never stood.
    std::iter::successors(Some(first), |e| (*e).source())
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// Gives up on a request after a while. What it would have written may have been written all the same.
pub(super) async fn limited<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::Timeout(limit)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::*;

    /// An address at which nobody listens.
    async fn dead() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    }

    /// Takes connections and never says anything: what a stopped process looks like.
    async fn hung() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut some = [0; 24];
                let _ = stream.read(&mut some).await;
                open.push(stream);
            }
        });
        address
    }

    async fn get(client: Client) -> Result<etcd_client::GetResponse, etcd_client::Error> {
        client.kv_client().get("k", None).await
    }

    #[tokio::test]
    async fn a_read_goes_on_to_the_member_that_answers_and_stays_there() {
        let dir = tempfile::tempdir().unwrap();
        let etcd = super::super::embedded::EmbeddedEtcd::start(dir.path(), None).unwrap();
        let endpoints = [dead().await, hung().await, etcd.endpoint().to_owned()];
        let members = Members::connect(&endpoints, 0).await.unwrap();
        // etcd may not serve yet.
        let begin = std::time::Instant::now();
        while members.ask(ATTEMPT, get).await.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(30));
        }
        assert_eq!(members.current().index, 2);
        let again = std::time::Instant::now();
        for _ in 0..20 {
            members.ask(ATTEMPT, get).await.unwrap();
        }
        assert!(again.elapsed() < ATTEMPT, "nobody else is asked: {:?}", again.elapsed());
        // One who was slow to notice does not send the others away.
        let stale = Member { client: members.current().client, index: 1 };
        members.failed(&stale);
        assert_eq!(members.current().index, 2);
    }

    #[tokio::test]
    async fn what_may_be_done_once_is_sent_again_only_if_it_was_never_sent() {
        let members = Members::connect(&[dead().await, dead().await, hung().await], 0).await.unwrap();
        let tried = AtomicUsize::new(0);
        let put = |client: Client| {
            tried.fetch_add(1, Ordering::Relaxed);
            async move { client.kv_client().put("k", "v", None).await }
        };
        // Twice refused; the third has it and does not answer: unknown.
        let outcome = members.ask_once(Duration::from_millis(300), put).await;
        assert!(matches!(outcome, Err(Error::Timeout(_))), "{outcome:?}");
        assert_eq!(tried.load(Ordering::Relaxed), 3);
        let members = Members::connect(&[hung().await, dead().await], 0).await.unwrap();
        tried.store(0, Ordering::Relaxed);
        members.ask_once(Duration::from_millis(300), put).await.unwrap_err();
        assert_eq!(tried.load(Ordering::Relaxed), 1);
        assert_eq!(members.current().index, 1, "the next one is asked next");
    }
}
