//! Time. The only place that reads a clock.
//!
//! Everything that a lease depends on is measured on `CLOCK_BOOTTIME`, which goes on while the machine is
//! suspended and which nobody can set. Wall-clock time is for people to read, never for a decision.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A point on this machine's boot-time clock.
///
/// Pure code receives one as an argument and never reads the clock. `Tick` deliberately has no `now()`:
/// only a [`Clock`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(Duration);

impl Tick {
    /// The moment of boot.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// The tick `d` after this one.
    #[must_use]
    pub const fn after(self, d: Duration) -> Self {
        Self(self.0.saturating_add(d))
    }

    /// Time from `earlier` to `self`; zero if `earlier` is in fact later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Time since boot.
    #[must_use]
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// The tick at `d` after boot.
    #[must_use]
    pub const fn from_boot(d: Duration) -> Self {
        Self(d)
    }
}

/// Where a process gets the time from. Cheap to clone; a test gives one that it controls.
#[derive(Clone)]
pub struct Clock {
    boot: Arc<dyn Fn() -> Tick + Send + Sync>,
    wall: Arc<dyn Fn() -> WallTime + Send + Sync>,
}

impl Clock {
    /// The clocks of this machine.
    #[must_use]
    pub fn system() -> Self {
        Self { boot: Arc::new(boottime_now), wall: Arc::new(wall_now) }
    }

    /// Clocks that a test or a simulation controls.
    #[must_use]
    pub fn custom(
        boot: impl Fn() -> Tick + Send + Sync + 'static,
        wall: impl Fn() -> WallTime + Send + Sync + 'static,
    ) -> Self {
        Self { boot: Arc::new(boot), wall: Arc::new(wall) }
    }

    /// Now, on the boot-time clock.
    #[must_use]
    pub fn now(&self) -> Tick {
        (self.boot)()
    }

    /// Now, for people.
    #[must_use]
    pub fn wall(&self) -> WallTime {
        (self.wall)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Milliseconds since 1970, UTC. For people to read; no decision about a VM depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct WallTime(pub u64);

impl WallTime {
    /// As it goes on the wire.
    #[must_use]
    pub fn to_proto(self) -> prost_types::Timestamp {
        crate::timestamp_from_millis(self.0)
    }

    /// From the wire.
    #[must_use]
    pub fn from_proto(t: &prost_types::Timestamp) -> Self {
        Self(crate::millis_from_timestamp(t))
    }
}

fn boottime_now() -> Tick {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Tick(Duration::new(u64::try_from(t.tv_sec).unwrap_or(0), u32::try_from(t.tv_nsec).unwrap_or(0)))
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
fn wall_now() -> WallTime {
    let d = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
