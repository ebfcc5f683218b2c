//! Which heartbeat was sent when. Pure.
//!
//! # Invariants
//!
//! * **L1** A lease runs from the moment that was noted *before* its heartbeat was handed to the network, never from
//!   when the answer came (P1: the leader counts from when it received the heartbeat, which is later).
//! * **L2** An answer counts once, and only in the session in which its heartbeat was sent: each session has its own book.

use std::{collections::VecDeque, time::Duration};

use uncloud_proto::clock::Tick;

/// So many heartbeats may be unanswered before the oldest are given up. At one a second, that is far longer than any
/// lease.
const MOST: usize = 256;

/// The heartbeats of one session that have not been answered.
#[derive(Debug, Default)]
pub struct Heartbeats {
    last: u64,
    sent: VecDeque<(u64, Tick)>,
}

impl Heartbeats {
    /// Notes that a heartbeat is about to be sent. Returns its sequence.
    pub fn send(&mut self, now: Tick) -> u64 {
        self.last += 1;
        if self.sent.len() == MOST {
            self.sent.pop_front();
        }
        self.sent.push_back((self.last, now));
        self.last
    }

    /// A heartbeat was answered. Returns when it was sent, if it is one of this session that was not answered before.
    /// Older ones will not be answered any more: the stream keeps the order.
    pub fn answered(&mut self, sequence: u64) -> Option<Tick> {
        let index = self.sent.iter().position(|(s, _)| *s == sequence)?;
        self.sent.drain(..=index).next_back().map(|(_, at)| at)
    }
}

/// Until when a lease of `length` runs that answers a heartbeat of `sent`. Absent: it is over already, as when the
/// agent was stopped between the two.
#[must_use]
pub fn deadline(sent: Tick, length: Duration, now: Tick) -> Option<Tick> {
    let deadline = sent.after(length);
    (deadline > now).then_some(deadline)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: u64) -> Tick {
        Tick::from_boot(Duration::from_secs(secs))
    }

    #[test]
    fn an_answer_counts_once_and_from_when_its_heartbeat_was_sent() {
        let mut book = Heartbeats::default();
        let (first, second) = (book.send(at(10)), book.send(at(11)));
        assert_eq!(book.answered(second), Some(at(11)));
        assert_eq!(book.answered(second), None);
        assert_eq!(book.answered(first), None, "the stream keeps the order");
        assert_eq!(book.answered(99), None);
        assert_eq!(Heartbeats::default().answered(1), None, "of another session");
    }

    #[test]
    fn a_lease_that_is_over_when_it_comes_is_none() {
        let length = Duration::from_secs(6);
        assert_eq!(deadline(at(10), length, at(15)), Some(at(16)));
        assert_eq!(deadline(at(10), length, at(16)), None);
    }

    proptest! {
        /// L1 and L2, and the book is bounded.
        #[test]
        fn every_answer_is_the_moment_of_its_own_heartbeat(steps in prop::collection::vec((any::<bool>(), 0u64..400), 0..600)) {
            let mut book = Heartbeats::default();
            let mut moments = vec![];
            let mut answered = 0;
            for (i, (send, sequence)) in steps.into_iter().enumerate() {
                if send {
                    moments.push(at(i as u64));
                    prop_assert_eq!(book.send(at(i as u64)), moments.len() as u64);
                } else if let Some(tick) = book.answered(sequence) {
                    prop_assert!(sequence > answered);
                    prop_assert_eq!(tick, moments[sequence as usize - 1]);
                    answered = sequence;
                }
                prop_assert!(book.sent.len() <= MOST);
            }
        }
    }
}
