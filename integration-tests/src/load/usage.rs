//! What a process uses: CPU time and memory, as the kernel counts them.

use std::{fs, time::Duration};

use anyhow::Context as _;

/// In which the kernel counts for programs (`USER_HZ`): the same on every x86 machine.
const TICKS_PER_SECOND: u64 = 100;

/// CPU time that a process has used, in user and kernel mode.
///
/// # Errors
///
/// It is gone.
pub fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The name, in parentheses, may have spaces and parentheses in it.
    let after = text.rfind(')').map(|at| &text[at + 1..]).context("a name")?;
    let ticks: u64 = after.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Resident memory of a process in KiB.
///
/// # Errors
///
/// It is gone.
pub fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    value.trim().trim_end_matches(" kB").trim().parse().context("VmRSS is a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_its_cpu_time_grows() {
        let me = std::process::id();
        assert!(resident_kib(me).unwrap() > 100);
        let (before, begin) = (cpu(me).unwrap(), std::time::Instant::now());
        while cpu(me).unwrap() == before {
            assert!(begin.elapsed() < Duration::from_secs(30), "no CPU time is counted");
        }
    }
}
