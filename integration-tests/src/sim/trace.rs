//! What happened in a run: the newest lines, and a hash of all of them, by which two runs are compared.

use std::{collections::VecDeque, fmt, fmt::Write as _};

use super::clock::Ns;

/// How many lines are kept for a report.
const KEPT: usize = 60;

/// The trace.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    lines: VecDeque<String>,
    kept: usize,
    /// Each line is also printed.
    pub(crate) verbose: bool,
}

impl Default for Trace {
    fn default() -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, lines: VecDeque::new(), kept: KEPT, verbose: false }
    }
}

impl Trace {
    /// Adds a line.
    pub(crate) fn line(&mut self, now: Ns, what: fmt::Arguments<'_>) {
        let mut line =
            if self.lines.len() >= self.kept { self.lines.pop_front().unwrap_or_default() } else { String::new() };
        line.clear();
        // Writing into a String cannot fail.
        let _ = write!(line, "{:>11.6} {what}", std::time::Duration::from_nanos(now).as_secs_f64());
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.verbose {
            println!("{line}");
        }
        self.lines.push_back(line);
    }

    /// FNV-1a of all lines.
    #[must_use]
    pub(crate) const fn hash(&self) -> u64 {
        self.hash
    }

    /// The newest lines.
    pub(crate) fn newest(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}
