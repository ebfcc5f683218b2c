//! A process under test: started with a log file, signalled, killed, started again with the same arguments.

use std::{
    ffi::OsString,
    fs::OpenOptions,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process, set_parent_process_death_signal};

use crate::{proc_table, wait_for};

/// How a process is started, each time.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What it is called in messages.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its environment, besides what this process has.
    pub env: Vec<(String, OsString)>,
    /// Where stdout and stderr go. Appended to.
    pub log: PathBuf,
    /// The network namespace that it runs in.
    pub netns: Option<String>,
}

/// A process that ends with this value.
pub struct Process {
    spec: Spec,
    child: Option<Child>,
}

impl Process {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// The program or its log file cannot be opened.
    pub fn start(spec: Spec) -> anyhow::Result<Self> {
        let mut process = Self { spec, child: None };
        process.start_again()?;
        Ok(process)
    }

    /// Starts it again after its end, with the same arguments and the same log.
    ///
    /// # Errors
    ///
    /// It still runs, or cannot be started.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            bail!("{} still runs", self.spec.name);
        }
        let spec = &self.spec;
        let log = OpenOptions::new().create(true).append(true).open(&spec.log);
        let log = log.with_context(|| format!("open {}", spec.log.display()))?;
        let mut command = match &spec.netns {
            None => Command::new(&spec.program),
            Some(netns) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{netns}")).arg("--").arg(&spec.program);
                command
            }
        };
        command.args(&spec.args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.envs(spec.env.iter().map(|(k, v)| (k, v)));
        // SAFETY: the closure only makes one system call, which is allowed between fork and exec.
        unsafe {
            // What the tests start ends with them, also when they are killed. (A QEMU ends with its lease.)
            command.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into));
        }
        let child = command.spawn().with_context(|| format!("start {} ({})", spec.name, spec.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// How it is started.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its log file.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.spec.log
    }

    /// How it will be started the next time.
    pub fn spec_mut(&mut self) -> &mut Spec {
        &mut self.spec
    }

    /// Its process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it runs (or is stopped by a signal).
    pub fn is_running(&mut self) -> bool {
        match &mut self.child {
            None => false,
            Some(child) => match child.try_wait() {
                Ok(None) => true,
                Ok(Some(_)) | Err(_) => {
                    self.child = None;
                    false
                }
            },
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid().with_context(|| format!("{} does not run", self.spec.name))?;
        kill_process(to_pid(pid)?, signal).with_context(|| format!("send {signal:?} to {}", self.spec.name))
    }

    /// SIGSTOP; returns when the last of its threads stands still, so that nothing that is sent afterwards is answered.
    ///
    /// # Errors
    ///
    /// It does not run, or does not stand still within a second.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)?;
        let pid = self.pid().context("it runs")?;
        wait_for(&format!("{} stands still", self.spec.name), Duration::from_secs(1), async || {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
            for thread in threads.filter_map(Result::ok) {
                let id = thread.file_name().to_string_lossy().parse().unwrap_or(pid);
                match proc_table::stat(id) {
                    Some(('T', _)) | None => {}
                    Some((state, _)) => return Err(format!("thread {id} is {state}")),
                }
            }
            Ok(())
        })
        .await
    }

    /// SIGKILL; returns when it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; waits for its end.
    ///
    /// # Errors
    ///
    /// It has not ended within the limit.
    pub async fn terminate(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit).await
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// It has not ended within the limit.
    pub async fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let start = Instant::now();
        let child = self.child.as_mut().with_context(|| format!("{} does not run", self.spec.name))?;
        loop {
            if let Some(status) = child.try_wait()? {
                self.child = None;
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("{} did not end within {limit:?}", self.spec.name);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Kills any process by its id. One that is gone is fine.
pub fn kill_pid(pid: u32) {
    if let Ok(pid) = to_pid(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Sends a signal to any process.
///
/// # Errors
///
/// There is no such process.
pub fn signal_pid(pid: u32, signal: Signal) -> anyhow::Result<()> {
    kill_process(to_pid(pid)?, signal).with_context(|| format!("send {signal:?} to {pid}"))
}

fn to_pid(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")
}
