//! Watches that resume by themselves: on another controller, from the newest revision that was seen.
//!
//! A watch yields what the server sends. When the connection is lost it is opened again; while the first picture is
//! incomplete from its beginning, later from the revision reached, so that nothing is missed. Where the server has
//! forgotten that revision the watch begins anew and says so ([`Step::Restarted`]), and the caller drops its picture.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep};
use tonic::{Code, Response, Status, Streaming, transport::Channel};
use uncloud_proto::v1;

use crate::{
    client::{Client, cluster, fate_of, hosts, vms},
    retry::{self, Fate, Safety, Target},
};

/// How long a watch tries to get back before it gives up. Much longer than a takeover, so that a watch outlives the
/// restart of a single controller; short enough that a script learns that the cluster is gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request that opens a watch.
pub trait Watchable: Clone + Send + Sync + 'static {
    /// What the server sends.
    type Answer: Send + 'static;

    /// The revision after which changes are asked for; 0: the initial state is.
    fn start(&self) -> i64;
    /// Asks for everything after a revision; 0 asks for the initial state.
    fn resume_from(&mut self, revision: i64);
    /// The revision that an answer completes, and whether it is the bookmark.
    fn position(answer: &Self::Answer) -> (i64, IsBookmark);
    /// Opens the stream.
    fn open(
        self,
        channel: Channel,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Answer>>, Status>> + Send + 'static;
}

/// Whether an answer marks the end of the initial state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsBookmark {
    /// It does.
    Yes,
    /// It does not.
    No,
}

/// One step of a watch.
#[derive(Clone, Debug)]
pub enum Step<A> {
    /// What the server sent.
    Answer(A),
    /// The initial state follows again: forget what was seen.
    Restarted,
}

/// A watch.
#[derive(Debug)]
pub struct Watch<W: Watchable> {
    client: Client,
    request: W,
    stream: Option<Streaming<W::Answer>>,
    /// Set once the initial state is complete, or if the caller asked for changes only.
    complete_to: Option<i64>,
    started: bool,
    failures: u32,
    give_up_at: Option<Instant>,
}

impl<W: Watchable> Watch<W> {
    pub(crate) fn new(client: Client, request: W) -> Self {
        let complete_to = Some(request.start()).filter(|r| *r > 0);
        Self { client, request, stream: None, complete_to, started: false, failures: 0, give_up_at: None }
    }

    /// The next step. Waits for one as long as it takes. Cancel safe.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that no controller could be reached: at the first try for as long as a call may take,
    /// later for a minute.
    pub async fn next(&mut self) -> Result<Step<W::Answer>, Status> {
        loop {
            let outcome = match &mut self.stream {
                Some(stream) => stream.message().await,
                None => match self.open().await {
                    Ok(None) => continue,
                    Ok(Some(restarted)) => return Ok(restarted),
                    Err(status) => Err(status),
                },
            };
            let status = match outcome {
                Ok(Some(answer)) => {
                    self.failures = 0;
                    self.give_up_at = None;
                    self.note(&answer);
                    return Ok(Step::Answer(answer));
                }
                // A controller that stops ends its streams in order.
                Ok(None) => Status::unavailable("the watch was ended by the controller"),
                Err(status) => status,
            };
            self.stream = None;
            self.recover(status).await?;
        }
    }

    async fn open(&mut self) -> Result<Option<Step<W::Answer>>, Status> {
        let mut request = self.request.clone();
        if let Some(revision) = self.complete_to {
            request.resume_from(revision);
        }
        self.stream = Some(self.client.call(Safety::Repeatable, request, |c, r: W| r.open(c)).await?);
        // What was seen of an initial state that broke off comes again.
        let again = self.started && self.complete_to.is_none();
        self.started = true;
        Ok(again.then_some(Step::Restarted))
    }

    fn note(&mut self, answer: &W::Answer) {
        match W::position(answer) {
            (revision, IsBookmark::Yes) => self.complete_to = Some(revision),
            (revision, IsBookmark::No) => {
                if let Some(seen) = &mut self.complete_to {
                    *seen = revision.max(*seen);
                }
            }
        }
    }

    /// Decides whether to go on after a failure, and waits before it does.
    async fn recover(&mut self, status: Status) -> Result<(), Status> {
        if !self.started {
            return Err(status);
        }
        if status.code() == Code::OutOfRange && self.complete_to.is_some() {
            self.complete_to = None;
            self.request.resume_from(0);
            return Ok(());
        }
        let target = match fate_of(&status) {
            Fate::NotTaken { leader: Some(leader) } => Target::Leader(leader),
            Fate::NotTaken { leader: None } | Fate::Lost => Target::Next,
            Fate::Refused if status.code() == Code::DeadlineExceeded => Target::Next,
            Fate::Refused => return Err(status),
        };
        let now = Instant::now();
        if now >= *self.give_up_at.get_or_insert(now + PATIENCE) {
            return Err(status);
        }
        self.failures += 1;
        let from = self.client.endpoint();
        self.client.turn_to(&target, &from);
        sleep(retry::pause(self.failures, rand::random())).await;
        Ok(())
    }
}

/// Declares how a watch of one kind is opened and read.
macro_rules! watchable {
    ($request:ident, $answer:ident, $service:ident, $method:ident, $field:ident, $bookmark:path) => {
        impl Watchable for v1::$request {
            type Answer = v1::$answer;

            fn start(&self) -> i64 {
                self.from_revision
            }

            fn resume_from(&mut self, revision: i64) {
                self.from_revision = revision;
            }

            fn position(answer: &Self::Answer) -> (i64, IsBookmark) {
                let bookmark = matches!(answer.$field, Some($bookmark(_)));
                (answer.revision, if bookmark { IsBookmark::Yes } else { IsBookmark::No })
            }

            fn open(
                self,
                channel: Channel,
            ) -> impl Future<Output = Result<Response<Streaming<Self::Answer>>, Status>> + Send + 'static {
                async move { $service(channel).$method(self).await }
            }
        }
    };
}

watchable!(WatchVmsRequest, WatchVmsResponse, vms, watch_vms, event, v1::watch_vms_response::Event::Bookmark);
watchable!(WatchHostsRequest, WatchHostsResponse, hosts, watch_hosts, event, v1::watch_hosts_response::Event::Bookmark);
watchable!(
    WatchEventsRequest,
    WatchEventsResponse,
    cluster,
    watch_events,
    step,
    v1::watch_events_response::Step::Bookmark
);
