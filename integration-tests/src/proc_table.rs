//! The keepers and QEMUs in the process table.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What kind of process it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An `uncloud-keeper`.
    Keeper,
    /// A `qemu-system-…`.
    Qemu,
}

/// A keeper or QEMU.
#[derive(Clone, Debug)]
pub struct Proc {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot: with the process id this names one process for ever.
    pub start: u64,
    /// What it is.
    pub kind: Kind,
    /// UUID of its VM.
    pub vm: String,
    /// The VM's directory on its host: `…/vms/<uuid>`.
    pub vm_dir: PathBuf,
    /// Its command line.
    pub argv: Vec<String>,
}

/// What one process is.
#[derive(Debug)]
pub enum Look {
    /// A keeper or QEMU.
    Ours(Proc),
    /// Something else, for now: it may become one by `exec`.
    Other,
    /// It is gone, or a zombie.
    Gone,
}

/// Every process id there is.
#[must_use]
pub fn pids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Looks at one process.
#[must_use]
pub fn look(pid: u32) -> Look {
    let Ok(raw) = fs::read(format!("/proc/{pid}/cmdline")) else { return Look::Gone };
    let argv: Vec<String> =
        raw.split(|b| *b == 0).filter(|a| !a.is_empty()).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    let Some(program) = argv.first().and_then(|a| Path::new(a).file_name()?.to_str()) else { return Look::Other };
    let kind = match program {
        "uncloud-keeper" => Kind::Keeper,
        name if name.starts_with("qemu-system-") => Kind::Qemu,
        _ => return Look::Other,
    };
    let value_of = |flag: &str| argv.iter().position(|a| a == flag).and_then(|i| argv.get(i + 1)).cloned();
    let (vm, vm_dir) = match kind {
        Kind::Keeper => (value_of("--vm"), value_of("--vm-dir").map(PathBuf::from)),
        // QEMU's working directory is `run` in the VM's directory.
        Kind::Qemu => (
            value_of("-uuid"),
            fs::read_link(format!("/proc/{pid}/cwd")).ok().and_then(|d| d.parent().map(Path::to_path_buf)),
        ),
    };
    let (Some(vm), Some(vm_dir)) = (vm, vm_dir) else { return Look::Other };
    match stat(pid) {
        Some((state, start)) if state != 'Z' && state != 'X' => Look::Ours(Proc { pid, start, kind, vm, vm_dir, argv }),
        _ => Look::Gone,
    }
}

/// Every keeper and QEMU whose VM directory lies under `dir`.
#[must_use]
pub fn under(dir: &Path) -> Vec<Proc> {
    let found = pids().into_iter().filter_map(|pid| match look(pid) {
        Look::Ours(p) if p.vm_dir.starts_with(dir) => Some(p),
        _ => None,
    });
    found.collect()
}

/// State letter and start time of a process.
#[must_use]
pub fn stat(pid: u32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have spaces and parentheses in it.
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// Whether this very process is there and is not a zombie.
#[must_use]
pub fn is_alive(pid: u32, start: u64) -> bool {
    matches!(stat(pid), Some((state, found)) if found == start && state != 'Z' && state != 'X')
}

/// Proportional memory of a process in KiB, as the kernel counts it: (PSS, private).
#[must_use]
pub fn memory_kib(pid: u32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let field = |name: &str| -> u64 {
        let values = text.lines().filter_map(|l| l.strip_prefix(name));
        values.filter_map(|v| v.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).sum()
    };
    Some((field("Pss:"), field("Private_Clean:") + field("Private_Dirty:")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_alive_and_is_neither_keeper_nor_qemu() {
        let me = std::process::id();
        let (state, start) = stat(me).expect("this process has a stat file");
        assert!(matches!(state, 'R' | 'S' | 'D'), "{state}");
        assert!(is_alive(me, start));
        assert!(!is_alive(me, start + 1), "another process with the same id is another process");
        assert!(matches!(look(me), Look::Other));
        assert!(pids().contains(&me));
        assert!(memory_kib(me).is_some_and(|(pss, private)| pss > 0 && private > 0));
    }
}
