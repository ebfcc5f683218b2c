//! What this machine offers, and who it is.

use std::{fs, thread};

/// Memory that VMs do not get: the kernel, the agent, and what keepers and QEMUs need besides the guests' memory.
const RESERVE_MIB: u64 = 512;

/// CPU threads.
#[must_use]
pub fn vcpus() -> u32 {
    thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Memory for VMs, in MiB.
#[must_use]
pub fn memory_mib() -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_mib(&text));
    total.unwrap_or(0).saturating_sub(RESERVE_MIB)
}

fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

/// The machine's name.
#[must_use]
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Lets this process have as many open files as it may: each VM needs a few.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(total_mib("MemTotal:       24684544 kB\nMemFree: 1 kB\n"), Some(24106));
        assert_eq!(total_mib("MemFree: 1 kB\n"), None);
        assert!(memory_mib() > 0 && vcpus() > 0);
    }
}
