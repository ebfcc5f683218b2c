//! How long a VM that failed waits before it is started again. Pure.

use std::time::Duration;

/// Waits before the first, second, ... new attempt; the last one repeats.
///
/// The first is zero because most failures are not repeated. The others are what keeps a host with a hundred VMs
/// that all fail from doing nothing but starting them.
const WAITS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(300),
];

/// A VM that ran for so long is well: its next failure counts as the first.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(600);

/// The wait after `failures` failures in a row.
#[must_use]
pub fn wait_after(failures: u32) -> Duration {
    let index = usize::try_from(failures.saturating_sub(1)).unwrap_or(usize::MAX);
    WAITS[index.min(WAITS.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_then_stay() {
        let waits: Vec<u64> = (0..8).map(|n| wait_after(n).as_secs()).collect();
        assert_eq!(waits, [0, 0, 10, 30, 60, 300, 300, 300]);
    }
}
