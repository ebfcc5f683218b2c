//! Starts processes that end when this one does.
//!
//! A parent-death signal follows the *thread* that made the child, so one thread that lives as long as the process
//! makes them all.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::{Child, Command},
    sync::{
        OnceLock,
        mpsc::{Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

type Job = (Command, SyncSender<io::Result<Child>>);

/// Starts a process in a process group of its own (so that Ctrl-C reaches only us, and we take things down in
/// order), which gets SIGTERM when this process dies, however it dies.
///
/// # Errors
///
/// It could not be started.
pub(super) fn spawn(mut command: Command) -> io::Result<Child> {
    let parent = getpid();
    let bind_to_parent = move || {
        set_parent_process_death_signal(Some(Signal::TERM))?;
        // The parent may have died before the signal was asked for.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()))
        }
    };
    command.process_group(0);
    // SAFETY: between fork and exec the closure makes two system calls and neither allocates nor takes locks.
    unsafe { command.pre_exec(bind_to_parent) };
    let (answer, child) = sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes is gone");
    spawner().send((command, answer)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

fn spawner() -> Sender<Job> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    SPAWNER
        .get_or_init(|| {
            let (jobs, queue) = channel::<Job>();
            thread::spawn(move || {
                // For ever: the other end is in a static.
                for (mut command, answer) in queue {
                    let _ = answer.send(command.spawn());
                }
            });
            jobs
        })
        .clone()
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut command = Command::new("sleep");
        command.arg("60").stdin(Stdio::null());
        let mut child = thread::spawn(move || spawn(command).unwrap()).join().unwrap();
        thread::sleep(std::time::Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(spawn(Command::new("/does/not/exist")).is_err());
    }
}
