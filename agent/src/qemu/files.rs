//! What lies in a VM's directory, read by the agent: the keeper's records, and what QEMU said.
//!
//! The directory belongs to root, its `run` directory to the VM's user. Whatever is read below `run` may have been put
//! there by a guest that broke out of its QEMU, so it is opened without following links and only if it is what it
//! should be.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::{Mode, OFlags};
use serde::Deserialize;
use uncloud_proto::{
    clock::{Clock, WallTime},
    ids::{Incarnation, VmId},
};
use uuid::Uuid;

use crate::keeper::files;

/// How much of what QEMU said is kept, in bytes.
const LAST_WORDS: u64 = 2048;
/// No record of a keeper is longer.
const MAX_RECORD: u64 = 4096;

/// How a VM's QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Of which incarnation.
    pub incarnation: Incarnation,
    /// How.
    pub outcome: ExitOutcome,
    /// When. For people.
    pub at: WallTime,
    /// The end of what QEMU and its keeper said, at most 2 KiB.
    pub last_words: String,
}

/// How a VM's QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitOutcome {
    /// By itself.
    Exited {
        /// Its exit status.
        code: i32,
    },
    /// A signal killed it.
    Signaled {
        /// Which.
        signal: i32,
    },
    /// It was not started, because the lease under which the start was decided was over.
    Fenced,
    /// It was not started, because something that the keeper needs could not be had; the last words say what.
    Refused,
    /// It was not started, because it cannot be executed.
    NotStarted {
        /// Why.
        reason: String,
    },
    /// The keeper was killed, by its lease's deadline or by somebody, and QEMU with it; or the machine went down.
    KeeperKilled,
}

/// Which processes a VM is: `keeper.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct KeeperRecord {
    pub(super) vm: VmId,
    pub(super) incarnation: Incarnation,
    pub(super) lease_generation: u16,
    pub(super) boot_id: Uuid,
    pub(super) keeper_pid: u32,
    pub(super) keeper_start: u64,
    pub(super) qemu_pid: u32,
    pub(super) qemu_start: u64,
}

/// How it ended: `exit.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct ExitRecord {
    vm: VmId,
    incarnation: Incarnation,
    outcome: String,
    code: i32,
    signal: i32,
    at_ms: u64,
}

impl ExitRecord {
    fn outcome(&self) -> Option<ExitOutcome> {
        match self.outcome.as_str() {
            "exited" => Some(ExitOutcome::Exited { code: self.code }),
            "signaled" => Some(ExitOutcome::Signaled { signal: self.signal }),
            "fenced" => Some(ExitOutcome::Fenced),
            "refused" => Some(ExitOutcome::Refused),
            "exec-failed" => {
                Some(ExitOutcome::NotStarted { reason: io::Error::from_raw_os_error(self.code).to_string() })
            }
            _ => None,
        }
    }
}

/// The record of this VM's newest keeper. Nothing, if there is none or it is not (yet) whole.
pub(super) fn read_keeper(vm_dir: &Path, vm: VmId) -> Option<KeeperRecord> {
    parse_keeper(&read_record(vm_dir, files::KEEPER)?, vm)
}

/// The record of the newest keeper of whichever VM has this directory.
pub(super) fn read_any_keeper(vm_dir: &Path) -> Option<KeeperRecord> {
    serde_json::from_str(&read_record(vm_dir, files::KEEPER)?).ok()
}

fn parse_keeper(text: &str, vm: VmId) -> Option<KeeperRecord> {
    serde_json::from_str(text).ok().filter(|r: &KeeperRecord| r.vm == vm)
}

/// How the newest keeper's QEMU ended, if that was written down.
pub(super) fn read_exit(vm_dir: &Path, vm: VmId) -> Option<Exit> {
    let (incarnation, outcome, at) = parse_exit(&read_record(vm_dir, files::EXIT)?, vm)?;
    Some(Exit { incarnation, outcome, at, last_words: last_words(vm_dir) })
}

fn parse_exit(text: &str, vm: VmId) -> Option<(Incarnation, ExitOutcome, WallTime)> {
    let record: ExitRecord = serde_json::from_str(text).ok().filter(|r: &ExitRecord| r.vm == vm)?;
    Some((record.incarnation, record.outcome()?, WallTime(record.at_ms)))
}

/// The exit of a VM whose keeper could not write one.
pub(super) fn keeper_killed(vm_dir: &Path, incarnation: Incarnation) -> Exit {
    Exit { incarnation, outcome: ExitOutcome::KeeperKilled, at: Clock::system().wall(), last_words: last_words(vm_dir) }
}

fn read_record(vm_dir: &Path, name: &str) -> Option<String> {
    let mut text = String::new();
    File::open(vm_dir.join(name)).ok()?.take(MAX_RECORD).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The end of `qemu.log`, as text.
pub(super) fn last_words(vm_dir: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut log = File::open(vm_dir.join(files::LOG))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
        let mut bytes = Vec::new();
        log.take(LAST_WORDS).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // Without a log there are no words; what matters is in the outcome.
    let bytes = read().unwrap_or_default();
    // The cut may go through a character; and text from a guest must not move a terminal's cursor.
    let text: String = String::from_utf8_lossy(&bytes)
        .trim_start_matches('\u{fffd}')
        .chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect();
    text.trim().to_owned()
}

/// Who has a VM's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    /// There never was a keeper.
    Missing,
    /// Nobody: neither a keeper nor its QEMU lives.
    Free,
    /// Somebody lives.
    Held,
}

/// Looks who has the lock, holding it for an instant if nobody has.
pub(super) fn look_at_lock(vm_dir: &Path) -> io::Result<Lock> {
    let file = match File::open(vm_dir.join(files::LOCK)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Lock::Missing),
        Err(e) => return Err(e),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(Lock::Free),
        Err(fs::TryLockError::WouldBlock) => Ok(Lock::Held),
        Err(fs::TryLockError::Error(e)) => Err(e),
    }
}

/// Takes the lock, if nobody has it.
pub(super) fn take_lock(vm_dir: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .open(vm_dir.join(files::LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(e)) => Err(e),
    }
}

/// Opens the `run` directory, only to name what lies in it.
pub(super) fn run_dir(vm_dir: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(vm_dir.join(files::RUN), flags, Mode::empty())?)
}

/// Opens a regular file in the `run` directory, which a broken-out guest may have filled with traps: links to other
/// files, or pipes that never answer.
pub(super) fn open_in_run(vm_dir: &Path, name: &str, flags: OFlags) -> io::Result<File> {
    let dir = run_dir(vm_dir)?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&dir, name, flags, Mode::empty())?);
    let about = file.metadata()?;
    if about.is_file() && about.nlink() == 1 {
        Ok(file)
    } else {
        Err(io::Error::other(format!("{name} is not what QEMU made")))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::keeper::record_samples;

    #[test]
    fn what_the_keeper_writes_is_what_the_agent_reads() {
        let vm: VmId = "00000000-0000-4000-8000-000000000abc".parse().unwrap();
        let (keeper, exits) = record_samples();
        let record = parse_keeper(&keeper, vm).unwrap();
        assert_eq!(record.incarnation, Incarnation(3));
        assert_eq!(record.lease_generation, 9);
        assert_eq!((record.keeper_pid, record.keeper_start, record.qemu_pid, record.qemu_start), (10, 100, 11, 101));
        let outcomes: Vec<_> = exits.iter().map(|e| parse_exit(e, vm).unwrap().1).collect();
        assert_eq!(outcomes[0], ExitOutcome::Exited { code: 1 });
        assert_eq!(outcomes[1], ExitOutcome::Signaled { signal: 9 });
        assert_eq!(outcomes[2], ExitOutcome::Fenced);
        assert_eq!(outcomes[3], ExitOutcome::Refused);
        assert!(matches!(&outcomes[4], ExitOutcome::NotStarted { reason } if reason.contains("No such file")));

        let other = VmId::from_uuid(Uuid::from_u128(5));
        assert_eq!(parse_keeper(&keeper, other), None);
        assert_eq!(parse_exit(&exits[0], other), None);
        for cut in 0..keeper.len() - 1 {
            assert_eq!(parse_keeper(&keeper[..cut], vm), None, "half a record is none");
        }
    }

    #[test]
    fn last_words_are_short_and_cannot_move_a_cursor() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_words(dir.path()), "");
        fs::write(dir.path().join(files::LOG), "ä".repeat(4000) + "\x1b[2J\nthe end\n").unwrap();
        let words = last_words(dir.path());
        assert!(words.len() <= 2048 && words.ends_with("[2J\nthe end"), "{words}");
        assert!(words.starts_with('ä'));
    }

    #[test]
    fn traps_in_the_run_directory_are_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join(files::RUN);
        fs::create_dir(&run).unwrap();
        fs::write(dir.path().join("secret"), "s").unwrap();
        symlink("../secret", run.join("link")).unwrap();
        fs::hard_link(dir.path().join("secret"), run.join("hard")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, run.join("pipe"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::write(run.join("good"), "g").unwrap();
        for trap in ["link", "hard", "pipe", "."] {
            assert!(open_in_run(dir.path(), trap, OFlags::RDONLY).is_err(), "{trap}");
        }
        assert!(open_in_run(dir.path(), "good", OFlags::RDONLY).is_ok());
    }
}
