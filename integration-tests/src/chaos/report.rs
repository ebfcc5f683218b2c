//! What a run or a series of trials gives in the end.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::kind::Kind;

/// Times of one kind.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// One more.
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
        self.0.sort();
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The smallest time that this share of all (0 to 1) does not exceed.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "small"
        )]
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied()
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Option<Duration> {
        self.0.last().copied()
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |time: Option<Duration>| time.map_or("-".into(), |t| format!("{:.2} s", t.as_secs_f64()));
        let (p50, p99, max) = (self.percentile(0.5), self.percentile(0.99), self.max());
        write!(f, "n {:>3}  p50 {:>8}  p99 {:>8}  max {:>8}", self.len(), seconds(p50), seconds(p99), seconds(max))
    }
}

/// What one kind of fault did.
#[derive(Clone, Debug, Default)]
pub struct OfKind {
    /// How often it happened.
    pub faults: u32,
    /// From the fault to the first line of a fast guest that it cost its QEMU.
    pub running: Times,
    /// The same for guests that wait for their host, for a minute or for ever.
    pub waited: Times,
    /// From the fault to the acknowledgement of the first write that was sent after it.
    pub written: Times,
    /// From the end of the fault until all was well.
    pub settled: Times,
}

/// A whole run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By kind.
    pub kinds: BTreeMap<Kind, OfKind>,
    /// Guests that went on elsewhere.
    pub failovers: u32,
    /// Guests that were started again where they were.
    pub restarts: u32,
    /// Guests that were elsewhere after a fault than before it, without having been started anew.
    pub migrated: u32,
    /// Migrations that the user began, and that it called off.
    pub asked: (u64, u64),
    /// Drains without and with `--stop-and-move`, and those that were ended by uncordoning the host.
    pub drains: (u64, u64, u64),
    /// Guests that were killed though nothing that happened should have cost them.
    pub false_alarms: Vec<String>,
    /// Promises that were broken.
    pub violations: Vec<String>,
    /// What the user did: acknowledged, refused, and with an unknown outcome.
    pub calls: (u64, u64, u64),
}

impl Report {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.false_alarms.is_empty() && self.violations.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: u32 = self.kinds.values().map(|k| k.faults).sum();
        writeln!(f, "faults: {faults}; guests moved: {}, started again in place: {}", self.failovers, self.restarts)?;
        let (begun, called_off) = self.asked;
        writeln!(
            f,
            "migrations: {begun} begun, {called_off} called off; guests elsewhere and the same after a fault: {}",
            self.migrated
        )?;
        let (live, stopping, ended) = self.drains;
        writeln!(f, "drains: {live} live only, {stopping} that may stop guests; {ended} ended by uncordoning")?;
        for (kind, of) in &self.kinds {
            writeln!(f, "  {kind:<22} {:>3}", of.faults)?;
            for (what, times) in [
                ("to the guest's first line", &of.running),
                ("the same, patient or hold", &of.waited),
                ("to an acknowledged write", &of.written),
                ("until all was well", &of.settled),
            ] {
                if !times.is_empty() {
                    writeln!(f, "      {what:<26} {times}")?;
                }
            }
        }
        let (acknowledged, refused, unknown) = self.calls;
        writeln!(
            f,
            "the user's calls: {acknowledged} acknowledged, {refused} refused, {unknown} with an unknown outcome"
        )?;
        writeln!(f, "false alarms: {}", self.false_alarms.len())?;
        for alarm in &self.false_alarms {
            writeln!(f, "  {alarm}")?;
        }
        writeln!(f, "violations: {}", self.violations.len())?;
        for violation in &self.violations {
            writeln!(f, "  {violation}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let mut times = Times::default();
        assert_eq!((times.percentile(0.5), times.max()), (None, None));
        for n in (1..=100).rev() {
            times.add(Duration::from_secs(n));
        }
        let seconds = |share| times.percentile(share).map(|t| t.as_secs());
        assert_eq!((seconds(0.0), seconds(0.5), seconds(0.99), seconds(1.0)), (Some(1), Some(50), Some(99), Some(100)));
        assert_eq!(times.max(), Some(Duration::from_secs(100)));
    }
}
