//! Finds the processes of a host of the development cluster, and ends them as a power cut would.
//!
//! A process is only ever killed after it was recognised: by process id *and* start time, through a pidfd that was
//! opened before the start time was checked. So a process id that was given to somebody else meanwhile is safe.

use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;
use tokio::time::{Instant, sleep};

/// A process that cannot be mistaken for another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: Pid,
    /// Start time in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub start: u64,
    /// What it is, for people.
    pub what: String,
}

/// One process as `/proc` shows it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Who.
    pub identity: Identity,
    /// Its parent.
    pub parent: i32,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
}

/// What a keeper writes about itself and its QEMU (the agent's `keeper.json`).
#[derive(Debug, Deserialize)]
struct KeeperFile {
    boot_id: String,
    #[serde(default)]
    keeper_pid: i32,
    #[serde(default)]
    keeper_start: u64,
    #[serde(default)]
    qemu_pid: i32,
    #[serde(default)]
    qemu_start: u64,
}

/// The program names of a cluster. Nothing else is ever taken for a part of one.
const PROGRAMS: [&str; 4] = ["uncloud-controller", "uncloud-agent", "uncloud-keeper", "etcd"];

impl Identity {
    /// The process that has this id now, unless it has ended.
    #[must_use]
    pub fn of(pid: Pid, what: &str) -> Option<Self> {
        let stat = stat(pid.as_raw_nonzero().get())?;
        stat.alive.then(|| Self { pid, start: stat.start, what: what.to_owned() })
    }

    /// Whether it still exists (a zombie does not).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid.as_raw_nonzero().get()).is_some_and(|s| s.alive && s.start == self.start)
    }

    /// Sends a signal, to this very process or to nobody.
    pub fn signal(&self, signal: Signal) {
        let Ok(fd) = pidfd_open(self.pid, PidfdFlags::empty()) else { return };
        if self.is_alive() {
            let _ = pidfd_send_signal(fd, signal);
        }
    }
}

/// The keepers and QEMUs of the host with this state directory.
///
/// Looks into `keeper.json` of each VM, and also for keepers by their arguments and for their children, so that one
/// that is just being started is found, too.
#[must_use]
pub fn guests(state_dir: &Path) -> Vec<Identity> {
    let mut found: Vec<Identity> = Vec::new();
    let mut add = |identity: Identity| {
        if !found.contains(&identity) {
            found.push(identity);
        }
    };
    let everybody = processes();
    let vms = state_dir.join("vms");
    let keepers = everybody.iter().filter(|p| is_keeper_of(p, &vms));
    for keeper in keepers {
        add(Identity { what: "keeper".to_owned(), ..keeper.identity.clone() });
        let pid = keeper.identity.pid.as_raw_nonzero().get();
        for child in everybody.iter().filter(|p| p.parent == pid) {
            add(Identity { what: "QEMU".to_owned(), ..child.identity.clone() });
        }
    }
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    for file in keeper_files(&vms).into_iter().filter(|f| f.boot_id.trim() == boot_id.trim()) {
        for (pid, start, what) in
            [(file.keeper_pid, file.keeper_start, "keeper"), (file.qemu_pid, file.qemu_start, "QEMU")]
        {
            let Some(pid) = Pid::from_raw(pid) else { continue };
            let identity = Identity { pid, start, what: what.to_owned() };
            if identity.is_alive() {
                add(identity);
            }
        }
    }
    found
}

/// Kills these, and the guests of this host, at once and until nothing of it is left. Gives how many were killed.
///
/// # Errors
///
/// Something would not die within five seconds.
pub async fn cut(state_dir: &Path, also: Vec<Identity>) -> Result<usize, String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut victims = also;
    victims.extend(guests(state_dir));
    let mut killed = Vec::new();
    loop {
        for victim in &victims {
            victim.signal(Signal::KILL);
        }
        killed.extend(victims);
        // Once more: an agent may have started a keeper between the look and its own end.
        victims = guests(state_dir).into_iter().filter(|g| !killed.contains(g)).collect();
        let last = killed.iter().find(|k| k.is_alive());
        match (victims.is_empty(), last) {
            (true, None) => return Ok(killed.len()),
            (_, Some(stubborn)) if Instant::now() >= deadline => {
                return Err(format!("{} {:?} does not die", stubborn.what, stubborn.pid));
            }
            _ => sleep(Duration::from_millis(2)).await,
        }
    }
}

/// What still runs of a cluster in this directory: programs of a cluster that work in it or name it.
#[must_use]
pub fn leftovers(dir: &Path) -> Vec<Identity> {
    let path = dir.as_os_str().as_bytes();
    let mut found = Vec::new();
    for process in processes() {
        let name = program(&process);
        if !PROGRAMS.contains(&name.as_str()) && !name.starts_with("qemu-system-") {
            continue;
        }
        let pid = process.identity.pid.as_raw_nonzero();
        let works_there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        let names_it = process.arguments.iter().any(|a| a.windows(path.len()).any(|w| w == path));
        if works_there || names_it {
            found.push(Identity { what: name, ..process.identity });
        }
    }
    found
}

/// Every process that is alive.
#[must_use]
pub fn processes() -> Vec<Seen> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let stat = stat(pid).filter(|s| s.alive)?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments = line.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
        let identity = Identity { pid: Pid::from_raw(pid)?, start: stat.start, what: String::new() };
        Some(Seen { identity, parent: stat.parent, arguments })
    })
    .collect()
}

struct Stat {
    alive: bool,
    parent: i32,
    start: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The program's name stands in brackets and may hold spaces and brackets itself; the fields follow the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // Field 3 is the first of these.
    let alive = !matches!(*fields.first()?, "Z" | "X");
    Some(Stat { alive, parent: fields.get(1)?.parse().ok()?, start: fields.get(19)?.parse().ok()? })
}

fn program(process: &Seen) -> String {
    let path = process.arguments.first().map(|a| String::from_utf8_lossy(a).into_owned()).unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

fn is_keeper_of(process: &Seen, vms: &Path) -> bool {
    let place = process.arguments.windows(2).find(|w| w[0] == b"--vm-dir");
    let under = |dir: &[u8]| PathBuf::from(std::ffi::OsStr::from_bytes(dir)).starts_with(vms);
    program(process) == "uncloud-keeper" && place.is_some_and(|w| under(&w[1]))
}

fn keeper_files(vms: &Path) -> Vec<KeeperFile> {
    let Ok(entries) = fs::read_dir(vms) else { return Vec::new() };
    let texts = entries.filter_map(|e| fs::read(e.ok()?.path().join("keeper.json")).ok());
    // Empty or half-written while a keeper starts; then its arguments give it away.
    texts.filter_map(|text| serde_json::from_slice(&text).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn fields_of_stat_are_found_behind_any_name() {
        let tail = "S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        for name in ["cat", "a b", "evil) Z 1 (x"] {
            let stat = parse_stat(&format!("12 ({name}) {tail}")).unwrap();
            assert!(stat.alive && stat.parent == 7 && stat.start == 4242);
        }
        assert!(!parse_stat("12 (x) Z 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242").unwrap().alive);
        assert!(parse_stat("").is_none() && parse_stat("1 (x) S").is_none());
    }

    #[tokio::test]
    async fn a_keeper_and_its_child_are_found_by_arguments_and_by_record_and_die() {
        let dir = tempfile::tempdir().unwrap();
        let vm = dir.path().join("vms/x");
        fs::create_dir_all(&vm).unwrap();
        // A shell that calls itself a keeper and has a child, as a keeper has its QEMU.
        let keeper = dir.path().join("uncloud-keeper");
        std::os::unix::fs::symlink("/bin/sh", &keeper).unwrap();
        let mut child = Command::new(&keeper)
            .args(["-c", "sleep 60 & wait", "--vm-dir"])
            .arg(&vm)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while guests(dir.path()).len() < 2 {
            assert!(std::time::Instant::now() < deadline);
            sleep(Duration::from_millis(5)).await;
        }
        assert!(guests(&dir.path().join("other")).is_empty());
        assert_eq!(leftovers(dir.path()).len(), 1);

        // A stranger with the right process id and the wrong start time is left alone.
        let mut stranger = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let record = |start: u64| {
            let (pid, boot_id) = (stranger.id(), boot_id.trim());
            format!(r#"{{"boot_id":"{boot_id}","qemu_pid":{pid},"qemu_start":{start}}}"#)
        };
        let start = Identity::of(Pid::from_child(&stranger), "").unwrap().start;
        fs::write(vm.join("keeper.json"), record(start + 1)).unwrap();
        assert_eq!(guests(dir.path()).len(), 2);
        fs::write(vm.join("keeper.json"), record(start)).unwrap();
        assert_eq!(guests(dir.path()).len(), 3);
        fs::write(vm.join("keeper.json"), record(start + 1)).unwrap();

        assert_eq!(cut(dir.path(), Vec::new()).await, Ok(2));
        assert!(guests(dir.path()).is_empty() && leftovers(dir.path()).is_empty());
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        child.wait().unwrap();
    }
}
