//! The frame of all watches: a task that sends until the client goes, what it watches is over, or the client falls behind.

use std::time::Duration;

use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Messages that wait for a client. Beyond that the watch waits for it, and is cut off when the feed's backlog is full.
const QUEUE: usize = 256;
/// How long the last message, which says why a watch ends, may wait for the client to take it.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a client of a watch receives.
pub(crate) type Stream<T> = ReceiverStream<Result<T, Status>>;

/// The sending half of a watch.
pub(crate) struct Sink<T>(mpsc::Sender<Result<T, Status>>);

/// The client has gone.
pub(crate) struct ClientGone;

impl<T> Sink<T> {
    /// Sends, waiting for the client.
    pub(crate) async fn send(&self, message: T) -> Result<(), ClientGone> {
        self.0.send(Ok(message)).await.map_err(|_| ClientGone)
    }
}

/// Why a watch ends.
pub(crate) enum End {
    /// Nobody listens.
    ClientGone,
    /// It is complete.
    Done,
    /// The client is told.
    Because(Status),
}

impl From<ClientGone> for End {
    fn from(ClientGone: ClientGone) -> Self {
        Self::ClientGone
    }
}

/// Runs a watch in a task of its own. `over` is ready when what it shows is over, and says why; `body` gets the sink and returns
/// why it ends by itself.
pub(crate) fn spawn<T, F>(
    over: impl Future<Output = Status> + Send + 'static,
    body: impl FnOnce(Sink<T>) -> F,
) -> Stream<T>
where
    T: Send + 'static,
    F: Future<Output = End> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let body = body(Sink(sender.clone()));
    tokio::spawn(async move {
        let end = tokio::select! {
            biased;
            () = sender.closed() => End::ClientGone,
            status = over => End::Because(status),
            end = body => end,
        };
        match end {
            End::ClientGone | End::Done => {}
            // If the client does not read, or has gone, there is nobody to tell.
            End::Because(status) => drop(time::timeout(FAREWELL, sender.send(Err(status))).await),
        }
    });
    ReceiverStream::new(receiver)
}
