//! How long leases last, and how long the leader waits for one to run out.

use std::time::Duration;

/// By how much two clocks may differ in rate (ε), as a fraction of one: 1/100.
///
/// Quartz is off by less than 0.01 %, and NTP slews by 0.05 % at the most; a virtual machine's clock can be worse. A larger
/// value makes failover slower (60 ms per percent with a lease of 6 s); with a smaller one a bad clock breaks L1.
const CLOCK_RATE_FRACTION: u32 = 100;

/// How long leases last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// The lease of VMs of the class `fast`.
    pub fast: Duration,
    /// The lease of VMs of the class `patient`. Not shorter than `fast`.
    pub patient: Duration,
    /// How long after its deadline a QEMU process may still be dying. The kernel's timer was measured to kill within
    /// 10 ms; the default of 1 s is for a host that is short of everything.
    pub kill_allowance: Duration,
}

impl Timings {
    /// How long after the leader received a heartbeat a lease of length `lease`, granted for it, has surely run out
    /// and the guests under it are dead: `lease·(1+ε)` and the kill allowance (L1).
    #[must_use]
    pub fn wait(&self, lease: Duration) -> Duration {
        let drift = lease / CLOCK_RATE_FRACTION + Duration::from_nanos(1); // rounded up
        lease.saturating_add(drift).saturating_add(self.kill_allowance)
    }

    /// The longer of each.
    #[must_use]
    pub fn longest(self, other: Self) -> Self {
        Self {
            fast: self.fast.max(other.fast),
            patient: self.patient.max(other.patient),
            kill_allowance: self.kill_allowance.max(other.kill_allowance),
        }
    }

    /// A host that has not been heard for longer than this is silent: nothing new is placed there. Half of the short
    /// lease: two heartbeats may be lost (at the default, one a second) before it means anything, and a host is known to
    /// be silent well before it is declared lapsed.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.fast / 2
    }
}
