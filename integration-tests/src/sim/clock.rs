//! Clocks that run at different rates, as functions of true time. All times are in nanoseconds.

use std::time::Duration;

use uncloud_proto::clock::Tick;

/// Nanoseconds of true time since the beginning of a run.
pub(crate) type Ns = u64;
/// A millisecond.
pub(crate) const MS: Ns = 1_000_000;
/// A second.
pub(crate) const SEC: Ns = 1_000_000_000;

/// The boot-time clock of one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeClock {
    since: Ns,
    base: u64,
    /// How many of its own nanoseconds pass in a millisecond of true time.
    rate: u64,
}

/// The rate of a clock that is right.
pub(crate) const RIGHT: u64 = 1_000_000;

impl NodeClock {
    /// Shows `base` at `now`.
    #[must_use]
    pub(crate) const fn new(now: Ns, base: u64, rate: u64) -> Self {
        Self { since: now, base, rate }
    }

    /// What it shows.
    #[must_use]
    pub(crate) fn tick(&self, now: Ns) -> Tick {
        let passed = u128::from(now.saturating_sub(self.since)) * u128::from(self.rate) / u128::from(RIGHT);
        Tick::from_boot(Duration::from_nanos(self.base + u64::try_from(passed).unwrap_or(u64::MAX)))
    }

    /// The first moment of true time, from `now` on, at which it shows `tick` or more.
    #[must_use]
    pub(crate) fn when(&self, tick: Tick, now: Ns) -> Ns {
        let tick = u64::try_from(tick.since_boot().as_nanos()).unwrap_or(u64::MAX);
        let ahead = u128::from(tick.saturating_sub(self.base)) * u128::from(RIGHT);
        let at = self.since.saturating_add(u64::try_from(ahead.div_ceil(u128::from(self.rate))).unwrap_or(u64::MAX));
        at.max(now)
    }

    /// How much true time passes while it counts `d`.
    #[must_use]
    pub(crate) fn spans(&self, d: Duration) -> Ns {
        u64::try_from(d.as_nanos() * u128::from(RIGHT) / u128::from(self.rate)).unwrap_or(u64::MAX)
    }

    /// From now on it runs at this rate.
    pub(crate) fn set_rate(&mut self, now: Ns, rate: u64) {
        let shows = u64::try_from(self.tick(now).since_boot().as_nanos()).unwrap_or(u64::MAX);
        *self = Self::new(now, shows, rate);
    }
}
