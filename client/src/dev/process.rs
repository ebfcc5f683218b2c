//! A child process with a log file.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use super::spawner;

/// How much of a log is shown when its process has died.
const TAIL_BYTES: u64 = 8 * 1024;
const TAIL_LINES: usize = 15;

/// A child of ours.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A child that ended.
#[derive(Debug)]
pub struct Death {
    /// Its name, such as `host-1`.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// The last lines of its log.
    pub last_words: String,
    /// The log.
    pub log: PathBuf,
}

impl Process {
    pub(super) fn start(name: &str, mut command: Command, log: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = spawner::spawn(command)?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// How it ended, if it has.
    pub(super) fn death(&mut self) -> Option<Death> {
        // An error here means that there is no such child any more.
        let status = self.child.try_wait().ok().flatten()?;
        Some(Death { name: self.name.clone(), status, last_words: tail(&self.log), log: self.log.clone() })
    }

    /// Sends a signal. A child that has not been waited for keeps its process id, so this hits nobody else.
    pub(super) fn signal(&mut self, signal: Signal) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = kill_process(self.pid(), signal);
        }
    }

    /// Waits for its end, for a time.
    pub(super) async fn ended_within(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The last lines of a log.
pub(super) fn tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = fs::metadata(log)?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let Ok(bytes) = read() else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
