//! A client of QEMU's control socket (QMP).
//!
//! One task per connection owns the socket; [`Client`] sends it commands and [`Events`] hears what happens. The
//! connection ends when either side of it is broken, late or too loud: whoever uses it connects again and asks for the
//! state, so a lost event costs nothing but time.
//!
//! # Invariants
//!
//! * **Q1** Nothing is sent before QEMU's greeting. A socket serves one client at a time and executes what a waiting client has
//!   sent when its turn comes, which can be long after that client has given up.
//! * **Q2** After a command without an answer in time, the connection is closed: a late answer is nobody's.

mod wire;

use std::{collections::HashMap, io, time::Duration};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf},
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::{
    codec::{FramedRead, LinesCodec, LinesCodecError},
    sync::{CancellationToken, DropGuard},
};

pub use wire::Event;
use wire::{Message, Turn};

/// How long a QEMU that runs may take to greet and to agree on capabilities. It takes a millisecond; a socket that
/// somebody else uses never greets.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// How long a command may take. None that the agent uses does anything but set a flag.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// The longest line that is taken. The longest that QEMU sends here has a few KiB.
const MAX_LINE: usize = 1 << 20;
/// Commands without an answer yet.
const MAX_PENDING: usize = 16;
/// Events that nobody has taken yet.
const MAX_EVENTS: usize = 256;

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection at the moment.
    #[error("QEMU's control socket is not connected")]
    NotConnected,
    /// The connection ended before the answer came. Whether the command was carried out is unknown.
    #[error("QEMU's control socket was closed")]
    Closed,
    /// There was no answer in time. Whether the command is carried out, now or later, is unknown.
    #[error("QEMU did not answer `{what}` within {limit:?}")]
    Timeout {
        /// The command.
        what: String,
        /// How long was waited.
        limit: Duration,
    },
    /// Too many commands wait for an answer.
    #[error("too many commands wait for QEMU")]
    Overloaded,
    /// QEMU did not do it.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// What came is not QMP.
    #[error("QEMU's control socket does not speak QMP: {0}")]
    Protocol(String),
    /// The socket failed.
    #[error("QEMU's control socket")]
    Io(#[from] io::Error),
}

/// Sends commands over one connection. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    requests: mpsc::Sender<Request>,
    connection: CancellationToken,
    _close: DropGuard,
}

/// The events of one connection, in their order.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<Event>,
}

impl Events {
    /// The next event; nothing when the connection has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.queue.recv().await
    }
}

#[derive(Debug)]
struct Request {
    command: String,
    arguments: Option<Value>,
    turn: Turn,
    answer: oneshot::Sender<Result<Value, Error>>,
}

impl Client {
    /// Waits for the greeting and takes up the conversation.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if there is no greeting, because the socket serves somebody else or QEMU is stopped.
    pub async fn connect(stream: UnixStream) -> Result<(Self, Events), Error> {
        Self::connect_within(stream, HANDSHAKE_LIMIT).await
    }

    async fn connect_within(stream: UnixStream, limit: Duration) -> Result<(Self, Events), Error> {
        let (read, write) = tokio::io::split(stream);
        let mut wire = Wire { lines: FramedRead::new(read, LinesCodec::new_with_max_length(MAX_LINE)), write };
        timeout(limit, wire.handshake())
            .await
            .map_err(|_| Error::Timeout { what: "the greeting".to_owned(), limit })??;

        let (requests, requested) = mpsc::channel(MAX_PENDING);
        let (events, queue) = mpsc::channel(MAX_EVENTS);
        let connection = CancellationToken::new();
        let closed = connection.clone();
        tokio::spawn(async move {
            let end = closed.run_until_cancelled(wire.serve(requested, events)).await;
            if let Some(Err(e)) = end {
                tracing::debug!(error = %e, "a connection to QEMU ended");
            }
            closed.cancel();
        });
        Ok((Self { requests, _close: connection.clone().drop_guard(), connection }, Events { queue }))
    }

    /// Carries out a command and gives its result.
    ///
    /// Dropping the future does not take the command back.
    ///
    /// # Errors
    ///
    /// See [`Error`]: except after [`Error::Refused`] the command may or may not have been carried out.
    pub async fn execute(&self, command: &str, arguments: Option<Value>) -> Result<Value, Error> {
        self.execute_within(command, arguments, Turn::InOrder, COMMAND_LIMIT).await
    }

    /// The same for one of the few commands that QEMU carries out although its main thread waits for something (out-of-band), before
    /// those that wait for it.
    ///
    /// # Errors
    ///
    /// As [`Client::execute`].
    pub async fn execute_at_once(&self, command: &str, arguments: Option<Value>) -> Result<Value, Error> {
        self.execute_within(command, arguments, Turn::AtOnce, COMMAND_LIMIT).await
    }

    async fn execute_within(
        &self,
        command: &str,
        arguments: Option<Value>,
        turn: Turn,
        limit: Duration,
    ) -> Result<Value, Error> {
        let (answer, answered) = oneshot::channel();
        let request = Request { command: command.to_owned(), arguments, turn, answer };
        self.requests.try_send(request).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => Error::Overloaded,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })?;
        match timeout(limit, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => {
                // Q2
                self.connection.cancel();
                Err(Error::Timeout { what: command.to_owned(), limit })
            }
        }
    }
}

/// One connection.
struct Wire {
    lines: FramedRead<ReadHalf<UnixStream>, LinesCodec>,
    write: WriteHalf<UnixStream>,
}

impl Wire {
    /// The next message. Cancel safe.
    async fn receive(&mut self) -> Result<Message, Error> {
        match self.lines.next().await {
            Some(Ok(line)) => wire::parse(&line).map_err(Error::Protocol),
            Some(Err(LinesCodecError::MaxLineLengthExceeded)) => {
                Err(Error::Protocol(format!("a line has more than {MAX_LINE} bytes")))
            }
            // A QEMU that was killed resets the connection instead of closing it.
            Some(Err(LinesCodecError::Io(e))) if e.kind() == io::ErrorKind::ConnectionReset => Err(Error::Closed),
            Some(Err(LinesCodecError::Io(e))) => Err(Error::Io(e)),
            None => Err(Error::Closed),
        }
    }

    async fn send(&mut self, line: String) -> Result<(), Error> {
        self.write.write_all((line + "\n").as_bytes()).await.map_err(|e| match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
            _ => Error::Io(e),
        })
    }

    async fn handshake(&mut self) -> Result<(), Error> {
        // Q1
        match self.receive().await? {
            Message::Greeting => {}
            other => return Err(Error::Protocol(format!("{other:?} instead of a greeting"))),
        }
        let at_once = json!({ "enable": ["oob"] });
        self.send(wire::command("qmp_capabilities", Some(at_once), Turn::InOrder, 0)).await?;
        loop {
            match self.receive().await? {
                Message::Reply { id: 0, result: Ok(_) } => return Ok(()),
                Message::Event(_) => {}
                other => return Err(Error::Protocol(format!("{other:?} instead of an agreement"))),
            }
        }
    }

    /// Until the connection ends, for whatever reason.
    async fn serve(mut self, mut requests: mpsc::Receiver<Request>, events: mpsc::Sender<Event>) -> Result<(), Error> {
        let mut pending: HashMap<u64, (String, oneshot::Sender<Result<Value, Error>>)> = HashMap::new();
        let mut next_id = 1;
        loop {
            let may_ask = pending.len() < MAX_PENDING;
            tokio::select! {
                message = self.receive() => match message? {
                    Message::Event(event) => {
                        events.try_send(event).map_err(|_| Error::Protocol("events come faster than they are taken".into()))?;
                    }
                    Message::Reply { id, result } => {
                        let (command, answer) = pending
                            .remove(&id)
                            .ok_or_else(|| Error::Protocol(format!("an answer to command {id}, which was not sent")))?;
                        // Whoever asked may have gone away.
                        let _ = answer.send(result.map_err(|e| Error::Refused { command, class: e.class, description: e.desc }));
                    }
                    Message::Greeting => return Err(Error::Protocol("a second greeting".into())),
                },
                request = requests.recv(), if may_ask => {
                    let Some(Request { command, arguments, turn, answer }) = request else { return Ok(()) };
                    let line = wire::command(&command, arguments, turn, next_id);
                    pending.insert(next_id, (command, answer));
                    next_id += 1;
                    // Cannot hang for long: at most a few small commands lie in the socket, and whoever waits for
                    // one of them in vain cancels this connection.
                    self.send(line).await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

    use super::*;

    const GREETING: &str = "{\"QMP\": {}}\n";
    const SHORT: Duration = Duration::from_millis(100);

    /// QEMU's side of a connection, in the hands of a test.
    struct Fake(BufReader<UnixStream>);

    impl Fake {
        async fn say(&mut self, text: &str) {
            self.0.write_all(text.as_bytes()).await.unwrap();
        }

        async fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            serde_json::from_str(&line).unwrap()
        }
    }

    async fn connected() -> (Client, Events, Fake) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qemu = Fake(BufReader::new(theirs));
        let greet = async {
            qemu.say(GREETING).await;
            assert_eq!(qemu.hear().await["execute"], "qmp_capabilities");
            qemu.say("{\"return\": {}, \"id\": 0}\n").await;
        };
        let (connection, ()) = tokio::join!(Client::connect(ours), greet);
        let (client, events) = connection.unwrap();
        (client, events, qemu)
    }

    #[tokio::test]
    async fn nothing_is_sent_before_the_greeting() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let failed = Client::connect_within(ours, SHORT).await;
        assert!(matches!(failed, Err(Error::Timeout { .. })));
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).await.unwrap();
        assert!(sent.is_empty(), "{sent:?}");
    }

    #[tokio::test]
    async fn answers_find_their_commands_in_any_order() {
        let (client, _events, mut qemu) = connected().await;
        let serve = async {
            let (first, second) = (qemu.hear().await, qemu.hear().await);
            qemu.say(&format!(
                "{{\"return\": \"{}\", \"id\": {}}}\n",
                second["execute"].as_str().unwrap(),
                second["id"]
            ))
            .await;
            let refusal = "{\"class\": \"GenericError\", \"desc\": \"not now\"}";
            qemu.say(&format!("{{\"error\": {refusal}, \"id\": {}}}\n", first["id"])).await;
        };
        let (a, b, ()) = tokio::join!(client.execute("a", None), client.execute("b", None), serve);
        let Err(Error::Refused { command, description, .. }) = a else { panic!("{a:?}") };
        assert_eq!((command.as_str(), description.as_str()), ("a", "not now"));
        assert_eq!(b.unwrap(), "b");
    }

    #[tokio::test]
    async fn a_command_without_an_answer_closes_the_connection() {
        let (client, mut events, mut qemu) = connected().await;
        let late = client.execute_within("stop", None, Turn::InOrder, SHORT).await;
        assert!(matches!(late, Err(Error::Timeout { .. })));
        assert_eq!(timeout(COMMAND_LIMIT, events.next()).await, Ok(None));
        assert!(matches!(client.execute("cont", None).await, Err(Error::Closed)));
        assert_eq!(qemu.hear().await["execute"], "stop");
        assert_eq!(qemu.0.read_u8().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn events_come_in_order_and_too_many_end_the_connection() {
        let (client, mut events, mut qemu) = connected().await;
        qemu.say("{\"event\": \"A\"}\n{\"event\": \"B\"}\n").await;
        assert_eq!(events.next().await.unwrap().name, "A");
        assert_eq!(events.next().await.unwrap().name, "B");
        for _ in 0..=MAX_EVENTS {
            qemu.say("{\"event\": \"C\"}\n").await;
        }
        client.connection.cancelled().await;
        assert!(matches!(client.execute("cont", None).await, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn a_line_without_end_ends_the_connection() {
        let (client, mut events, mut qemu) = connected().await;
        let flood = async {
            let chunk = vec![b'x'; 64 << 10];
            while qemu.0.write_all(&chunk).await.is_ok() {}
        };
        let (_, end) = tokio::join!(flood, events.next());
        assert_eq!(end, None);
        assert!(matches!(client.execute("cont", None).await, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn a_killed_qemu_ends_what_waits() {
        let (client, _events, mut qemu) = connected().await;
        let die = async move {
            qemu.hear().await;
            drop(qemu);
        };
        let (result, ()) = tokio::join!(client.execute("quit", None), die);
        assert!(matches!(result, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn dropping_the_client_closes_the_connection() {
        let (client, events, mut qemu) = connected().await;
        drop((client, events));
        assert_eq!(qemu.0.read_u8().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
