//! True time, and the clocks of machines that run a little fast or slow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use uncloud_proto::clock::{Clock, Tick, WallTime};

/// Machines have been up for so long when the simulation begins.
const UPTIME: Duration = Duration::from_secs(1000);
/// When it begins, in milliseconds since 1970.
const BEGIN: u64 = 1_800_000_000_000;

/// The simulation's own time, that no machine sees. Moved on by whoever steps the simulation; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct TrueTime(Arc<AtomicU64>);

impl TrueTime {
    /// Since the beginning.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }

    /// It is this late.
    pub fn set(&self, now: Duration) {
        self.0.store(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    /// A machine's clock that is wrong by so many millionths.
    #[must_use]
    pub fn clock(&self, ppm: i32) -> Clock {
        let (boot, wall) = (self.clone(), self.clone());
        let rate = 1.0 + f64::from(ppm) / 1e6;
        Clock::custom(
            move || Tick::from_boot(UPTIME + boot.now().mul_f64(rate)),
            move || WallTime(BEGIN + u64::try_from(wall.now().as_millis()).unwrap_or(0)),
        )
    }
}
