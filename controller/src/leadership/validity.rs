//! Until when this process counts itself as the leader (T1).

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use uncloud_proto::clock::Tick;

/// Taken off the TTL: for clocks that run at different rates (1 % of 2 s is 20 ms) and for what happens between a look at the
/// clock and the act. Larger costs needless changes of leader when etcd is slow; smaller is unsafe with bad clocks.
const MARGIN: Duration = Duration::from_millis(500);

/// The moment until which a leadership is valid. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Validity(Arc<AtomicU64>);

impl Validity {
    /// Of a lease that was granted, or kept alive, by a request sent at `sent`.
    #[must_use]
    pub fn new(sent: Tick, ttl: Duration) -> Self {
        let this = Self(Arc::new(AtomicU64::new(0)));
        this.extend(sent, ttl);
        this
    }

    /// A keep-alive that was sent at `sent` has been answered with this TTL. Never shortens.
    pub fn extend(&self, sent: Tick, ttl: Duration) {
        let until = sent.after(ttl.saturating_sub(MARGIN)).since_boot();
        self.0.fetch_max(u64::try_from(until.as_nanos()).unwrap_or(0), Ordering::AcqRel);
    }

    /// Ends it now, for a clean stop or a lost write.
    pub fn end(&self) {
        // `extend` after this would bring it back; the keep-alive task has ended by then, or the term's token is cancelled.
        self.0.store(0, Ordering::Release);
    }

    /// Whether this process may still act as the leader.
    #[must_use]
    pub fn holds(&self, now: Tick) -> bool {
        now < self.until()
    }

    /// The moment itself.
    #[must_use]
    pub fn until(&self) -> Tick {
        Tick::from_boot(Duration::from_nanos(self.0.load(Ordering::Acquire)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Tick {
        Tick::from_boot(Duration::from_millis(ms))
    }

    #[test]
    fn it_runs_from_the_sending_of_what_was_answered() {
        let validity = Validity::new(at(1_000), Duration::from_secs(2));
        assert!(validity.holds(at(2_499)));
        assert!(!validity.holds(at(2_500)));

        // Sent at 1.5 s, answered at 2.4 s: counts from 1.5 s.
        validity.extend(at(1_500), Duration::from_secs(2));
        assert!(validity.holds(at(2_999)));
        assert!(!validity.holds(at(3_000)));

        // An answer that was overtaken changes nothing.
        validity.extend(at(1_200), Duration::from_secs(2));
        assert_eq!(validity.until(), at(3_000));
    }

    #[test]
    fn an_ended_one_does_not_hold() {
        let validity = Validity::new(at(1_000), Duration::from_secs(2));
        validity.end();
        assert!(!validity.holds(at(1_000)));
    }
}
