//! What a keeper leaves in the VM's directory for the agent, now or after the agent's restart.
//!
//! The JSON is put together by hand, because a serializer is larger than the rest of the keeper. Every value is a number,
//! an id or a constant word, so nothing needs escaping. The agent reads it in `qemu/files.rs`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use super::{Arguments, sys};

/// The files of a VM's directory that a keeper has open. They are opened before privileges are dropped.
#[derive(Debug)]
pub(super) struct Files {
    /// Held locked by the keeper and QEMU.
    pub(super) lock: File,
    /// Who they are, until that has been written. While QEMU runs, nothing is open here whose end could wait for a file system.
    keeper: Option<File>,
    /// How QEMU ended. Nothing is written to it before that.
    exit: File,
    /// What QEMU said.
    pub(super) log: File,
}

/// Names of the files in a VM's directory.
pub mod files {
    /// Held locked by the keeper and QEMU.
    pub const LOCK: &str = "lock";
    /// Which processes they are.
    pub const KEEPER: &str = "keeper.json";
    /// How QEMU ended.
    pub const EXIT: &str = "exit.json";
    /// QEMU's output.
    pub const LOG: &str = "qemu.log";
    /// The directory in which QEMU runs, and which belongs to its user.
    pub const RUN: &str = "run";
}

impl Files {
    /// Opens them, changing nothing yet. `lock` is the lock file if the parent has given it.
    pub(super) fn open(vm_dir: &Path, lock: Option<File>) -> io::Result<Self> {
        let open = |name: &str, append: bool| {
            OpenOptions::new()
                .read(true)
                .write(!append)
                .append(append)
                .create(true)
                .mode(0o644)
                .custom_flags(libc::O_NOFOLLOW)
                .open(vm_dir.join(name))
        };
        let own = open(files::LOCK, false)?;
        let lock = match lock {
            Some(given) if !same_file(&given, &own)? => {
                return Err(io::Error::other("the lock that was passed on is not this VM's"));
            }
            Some(given) => given,
            None => own,
        };
        Ok(Self {
            lock,
            keeper: Some(open(files::KEEPER, false)?),
            exit: open(files::EXIT, false)?,
            log: open(files::LOG, true)?,
        })
    }

    /// Forgets what an earlier keeper wrote. Only with the lock.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.keeper.as_ref().map_or(Ok(()), |f| f.set_len(0))?;
        self.exit.set_len(0)?;
        self.log.set_len(0)?;
        sys::reserve_page(&self.exit);
        Ok(())
    }

    /// Writes down who they are, once, by a child: QEMU runs, and no write may keep this process from dying in time.
    pub(super) fn write_keeper(&mut self, arguments: &Arguments, record: &KeeperRecord<'_>) -> io::Result<()> {
        let Some(file) = self.keeper.take() else { return Err(io::Error::other("written already")) };
        let text = keeper_json(arguments, record);
        sys::in_child(move || file.write_all_at(text.as_bytes(), 0))
    }

    pub(super) fn write_exit(&self, arguments: &Arguments, outcome: Outcome, at_ms: u64) -> io::Result<()> {
        self.exit.write_all_at(exit_json(arguments, outcome, at_ms).as_bytes(), 0)
    }
}

fn same_file(a: &File, b: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (a, b) = (a.metadata()?, b.metadata()?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}

/// The processes of a VM.
#[derive(Debug)]
pub(super) struct KeeperRecord<'a> {
    pub(super) boot_id: &'a str,
    pub(super) keeper_pid: u32,
    pub(super) keeper_start: u64,
    pub(super) qemu_pid: u32,
    pub(super) qemu_start: u64,
}

/// How it ended, in one of the words that `exit.json` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Exited {
        code: i32,
    },
    Signaled {
        signal: i32,
    },
    /// The lease was over or another: nothing was started.
    Fenced,
    /// Something that is needed could not be had: nothing was started.
    Refused {
        errno: i32,
    },
    /// QEMU could not be executed.
    ExecFailed {
        errno: i32,
    },
}

fn keeper_json(a: &Arguments, r: &KeeperRecord<'_>) -> String {
    format!(
        "{{\"vm\":\"{}\",\"incarnation\":{},\"class\":\"{}\",\"lease_generation\":{},\"boot_id\":\"{}\",\
         \"keeper_pid\":{},\"keeper_start\":{},\"qemu_pid\":{},\"qemu_start\":{}}}\n",
        a.vm,
        a.incarnation,
        a.class,
        a.lease_generation,
        r.boot_id,
        r.keeper_pid,
        r.keeper_start,
        r.qemu_pid,
        r.qemu_start
    )
}

fn exit_json(a: &Arguments, outcome: Outcome, at_ms: u64) -> String {
    let (word, code, signal) = match outcome {
        Outcome::Exited { code } => ("exited", code, 0),
        Outcome::Signaled { signal } => ("signaled", 0, signal),
        Outcome::Fenced => ("fenced", 0, 0),
        Outcome::Refused { errno } => ("refused", errno, 0),
        Outcome::ExecFailed { errno } => ("exec-failed", errno, 0),
    };
    format!(
        "{{\"vm\":\"{}\",\"incarnation\":{},\"outcome\":\"{word}\",\"code\":{code},\"signal\":{signal},\"at_ms\":{at_ms}}}\n",
        a.vm, a.incarnation
    )
}

/// One `keeper.json` and each kind of `exit.json`, for the tests of both sides.
#[cfg(test)]
pub(crate) fn record_samples() -> (String, Vec<String>) {
    let line = "--vm 00000000-0000-4000-8000-000000000abc --incarnation 3 --vm-dir /d --class patient \
                --lease-file /l --lease-generation 9 -- q";
    let a = Arguments::parse(line.split_whitespace().map(std::ffi::OsString::from)).unwrap();
    let record = KeeperRecord {
        boot_id: "11111111-2222-4333-8444-555555555555",
        keeper_pid: 10,
        keeper_start: 100,
        qemu_pid: 11,
        qemu_start: 101,
    };
    let exits = [
        Outcome::Exited { code: 1 },
        Outcome::Signaled { signal: 9 },
        Outcome::Fenced,
        Outcome::Refused { errno: 13 },
        Outcome::ExecFailed { errno: 2 },
    ];
    (keeper_json(&a, &record), exits.into_iter().map(|o| exit_json(&a, o, 1_700_000_000_000)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_records_are_as_they_were() {
        let (keeper, exits) = record_samples();
        assert_eq!(
            keeper,
            "{\"vm\":\"00000000-0000-4000-8000-000000000abc\",\"incarnation\":3,\"class\":\"patient\",\
             \"lease_generation\":9,\"boot_id\":\"11111111-2222-4333-8444-555555555555\",\"keeper_pid\":10,\
             \"keeper_start\":100,\"qemu_pid\":11,\"qemu_start\":101}\n"
        );
        assert_eq!(
            exits[1],
            "{\"vm\":\"00000000-0000-4000-8000-000000000abc\",\"incarnation\":3,\"outcome\":\"signaled\",\"code\":0,\
             \"signal\":9,\"at_ms\":1700000000000}\n"
        );
    }
}
