//! The leader's side of one session's stream: a bounded queue, and how a session ends.

use tokio::sync::mpsc;
use tonic::Status;
use uncloud_proto::{
    ids::Term,
    v1::{self, session_response::Message},
};

/// Messages that may wait for one agent. An agent that lets this many wait is not reading (the leader sends one a second
/// and one for each burst of changes), and is cut off rather than waited for.
pub(crate) const QUEUE: usize = 64;

/// What the stream carries, in a box: a queue has room for 32 from the beginning, and each host has one.
pub(crate) type Item = Box<Result<v1::SessionResponse, Status>>;

/// Why a session ends.
#[derive(Debug)]
pub(crate) enum End {
    /// The agent has gone.
    Gone,
    /// With a last message.
    Goodbye(v1::GoodbyeReason, String),
    /// With an error: the agent tries again.
    Failed(Status),
}

impl End {
    pub(crate) fn goodbye(reason: v1::GoodbyeReason, message: impl Into<String>) -> Self {
        Self::Goodbye(reason, message.into())
    }

    /// For counting.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Failed(_) => "failed",
            Self::Goodbye(reason, _) => match reason {
                v1::GoodbyeReason::Unspecified => "unspecified",
                v1::GoodbyeReason::NotLeader => "not-leader",
                v1::GoodbyeReason::DeclaredDead => "declared-dead",
                v1::GoodbyeReason::Replaced => "replaced",
                v1::GoodbyeReason::DuplicateHost => "duplicate-host",
                v1::GoodbyeReason::Invalid => "invalid",
                v1::GoodbyeReason::TooSlow => "too-slow",
            },
        }
    }

    /// The term has ended.
    pub(crate) fn not_leader() -> Self {
        Self::goodbye(v1::GoodbyeReason::NotLeader, "this controller does not lead (any more)")
    }
}

/// The sending half of a session.
#[derive(Debug)]
pub(crate) struct Outgoing {
    term: Term,
    queue: mpsc::Sender<Item>,
}

impl Outgoing {
    pub(crate) const fn new(term: Term, queue: mpsc::Sender<Item>) -> Self {
        Self { term, queue }
    }

    fn item(&self, message: Message) -> Item {
        Box::new(Ok(v1::SessionResponse { term: self.term.0, message: Some(message) }))
    }

    /// Sends a message, or says that the session must end. Never waits.
    pub(crate) fn send(&self, message: Message) -> Result<(), End> {
        // The last place is for the Goodbye.
        if self.queue.capacity() <= 1 && !self.queue.is_closed() {
            let message = format!("{QUEUE} messages wait to be read; say Hello again");
            return Err(End::goodbye(v1::GoodbyeReason::TooSlow, message));
        }
        self.queue.try_send(self.item(message)).map_err(|_| End::Gone)
    }

    /// Sends the last message. `leader` is where the leader is, as far as known.
    pub(crate) fn finish(self, end: End, leader: Option<String>) {
        let item = match end {
            End::Gone => return,
            End::Failed(status) => Box::new(Err(status)),
            End::Goodbye(reason, message) => self.item(Message::Goodbye(v1::Goodbye {
                reason: reason.into(),
                message,
                leader_address: leader.unwrap_or_default(),
            })),
        };
        // If the agent has gone, there is nobody to tell.
        let _ = self.queue.try_send(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_agent_is_cut_off_and_told_so() {
        let (queue, mut received) = mpsc::channel(QUEUE);
        let out = Outgoing::new(Term(7), queue);
        let mut sent = 0;
        let end = loop {
            match out.send(Message::Renewal(v1::Renewal::default())) {
                Ok(()) => sent += 1,
                Err(end) => break end,
            }
        };
        assert_eq!(sent, QUEUE - 1);
        out.finish(end, None);
        let mut last = None;
        while let Ok(item) = received.try_recv() {
            last = Some(item.unwrap());
        }
        let last = last.unwrap();
        assert_eq!(last.term, 7);
        let Some(Message::Goodbye(goodbye)) = last.message else { panic!() };
        assert_eq!(goodbye.reason(), v1::GoodbyeReason::TooSlow);
    }

    #[test]
    fn an_agent_that_has_gone_ends_the_session() {
        let (queue, received) = mpsc::channel(QUEUE);
        drop(received);
        let out = Outgoing::new(Term(7), queue);
        assert!(matches!(out.send(Message::Renewal(v1::Renewal::default())), Err(End::Gone)));
    }
}
