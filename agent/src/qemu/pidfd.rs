//! A process that is held by a descriptor instead of its number: nothing else can be taken for it, waited for or killed.

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::keeper;

/// One process, for good: nothing that gets its pid later is taken for it.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pid: u32,
    fd: Arc<AsyncFd<OwnedFd>>,
}

impl Process {
    /// The process with this pid, if it is the one that started then and has not ended.
    pub(super) fn find(pid: u32, start: u64) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // After the descriptor is open: if the process in it were another, this would be that one's start.
        if keeper::start_of(pid).ok() != Some(start) {
            return Ok(None);
        }
        // Nobody may have reaped it yet.
        let mut ended = [PollFd::new(&fd, PollFlags::IN)];
        if rustix::event::poll(&mut ended, Some(&Timespec::default()))? > 0 {
            return Ok(None);
        }
        let fd = watched(fd)?;
        Ok(Some(Self { pid, fd: Arc::new(fd) }))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Until it has ended. Cancel safe.
    pub(super) async fn gone(&self) {
        // Readiness stays: nobody clears it. An error can only mean that the runtime shuts down.
        if let Err(e) = self.fd.readable().await.map(|mut ready| ready.retain_ready()) {
            tracing::error!(pid = self.pid, error = %e, "a process cannot be waited for");
            std::future::pending::<()>().await;
        }
    }

    /// SIGKILL. A process that is gone is fine.
    pub(super) fn kill(&self) {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => tracing::error!(pid = self.pid, error = %e, "QEMU cannot be killed"),
        }
    }
}

/// Lets the runtime watch a pidfd, which becomes readable when its process has ended.
fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pid_alone_names_no_process() {
        let pid = std::process::id();
        let start = keeper::start_of(pid).unwrap();
        assert!(Process::find(pid, start).unwrap().is_some());
        assert!(Process::find(pid, start + 1).unwrap().is_none());
        assert!(Process::find(0, start).unwrap().is_none());
        assert!(Process::find(u32::MAX, start).unwrap().is_none());
    }
}
