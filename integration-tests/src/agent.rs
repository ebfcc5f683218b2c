//! A host under test: an agent with its directories, its keepers and its QEMUs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    paths,
    proc_table::{self, Kind, Proc},
    process::{self, Process, Signal, Spec},
    specs,
};

/// What a host offers, and where.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Memory for VMs in MiB.
    pub memory_mib: u64,
    /// CPU threads for VMs.
    pub vcpus: u32,
    /// Labels, `key=value`.
    pub labels: Vec<String>,
    /// `auto` lets the agent probe.
    pub accelerator: String,
    /// Where VMs that migrate to it arrive. Empty: none can come.
    pub migration_address: String,
    /// Further arguments.
    pub args: Vec<String>,
    /// Further environment.
    pub env: Vec<(String, String)>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            memory_mib: 2048,
            vcpus: 8,
            labels: Vec::new(),
            accelerator: "tcg".into(),
            migration_address: "127.0.0.1".into(),
            args: Vec::new(),
            env: Vec::new(),
        }
    }
}

/// A host under test.
pub struct Agent {
    name: String,
    dir: PathBuf,
    process: Process,
}

impl Agent {
    /// Starts the agent of host `name` in `root/name`. The shared pool is `root/pool`.
    ///
    /// # Errors
    ///
    /// Directories cannot be made, or the program is not there.
    pub fn start(
        root: &Path,
        name: &str,
        controller: &str,
        netns: Option<String>,
        options: &HostOptions,
    ) -> anyhow::Result<Self> {
        let dir = root.join(name);
        fs::create_dir_all(dir.join("state"))?;
        fs::create_dir_all(dir.join("pool"))?;
        let mut args: Vec<String> = vec!["--controller".into(), controller.into(), "--name".into(), name.into()];
        let mut flag = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
        flag("--state-dir", dir.join("state").display().to_string());
        flag("--pool", format!("{}={},shared", specs::SHARED, root.join("pool").display()));
        flag("--pool", format!("{}={}", specs::LOCAL, dir.join("pool").display()));
        flag("--image-dir", paths::guest_dir().display().to_string());
        flag("--image-dir", root.join("images").display().to_string());
        flag("--memory-mib", options.memory_mib.to_string());
        flag("--vcpus", options.vcpus.to_string());
        flag("--accelerator", options.accelerator.clone());
        if !options.migration_address.is_empty() {
            flag("--migration-address", options.migration_address.clone());
        }
        for label in &options.labels {
            flag("--label", label.clone());
        }
        args.extend(options.args.iter().cloned());
        // The tests' web servers are on this machine, and an agent asks such only if it is told to.
        if !args.iter().any(|arg| arg == "--image-url") {
            args.extend(["--image-url", "http://", "--image-url", "https://"].map(str::to_owned));
        }
        let mut env = vec![("UNCLOUD_LOG".into(), "info,uncloud_agent=debug".into())];
        env.extend(options.env.iter().map(|(k, v)| (k.into(), v.into())));
        let process = Process::start(Spec {
            name: name.to_owned(),
            program: paths::binary("uncloud-agent")?,
            args: args.into_iter().map(Into::into).collect(),
            env,
            log: dir.join("agent.log"),
            netns,
        })?;
        Ok(Self { name: name.to_owned(), dir, process })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of all that is its own.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The agent's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The namespace that it lives in.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn netns(&self) -> anyhow::Result<&str> {
        self.process.spec().netns.as_deref().context("this cluster was made without namespaces")
    }

    /// Its keepers and QEMUs.
    #[must_use]
    pub fn processes(&self) -> Vec<Proc> {
        proc_table::under(&self.dir)
    }

    /// The keeper or QEMU of one VM.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn process_of(&self, vm: &str, kind: Kind) -> anyhow::Result<Proc> {
        let found = self.processes().into_iter().find(|p| p.vm == vm && p.kind == kind);
        found.with_context(|| format!("{} has no {kind:?} of VM {vm}", self.name))
    }

    /// Process id of the daemon that serves its disks over the network, if it lives.
    #[must_use]
    pub fn storage_daemon(&self) -> Option<u32> {
        let record = fs::read(self.state_dir().join("exports/daemon.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        let pid = u32::try_from(record["pid"].as_u64()?).ok()?;
        // The process table has room for 15 characters.
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "qemu-storage-da").then_some(pid)
    }

    /// SIGKILL to the agent alone.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends the agent alone a signal.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Starts the agent again.
    ///
    /// # Errors
    ///
    /// It still runs.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.start_again()
    }

    /// Cuts the power: agent, keepers and QEMUs are killed at once, and nothing of them is left when this returns.
    pub fn cut_power(&mut self) {
        self.process.kill();
        if let Some(daemon) = self.storage_daemon() {
            process::kill_pid(daemon);
        }
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for process in left {
                process::kill_pid(process.pid);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.cut_power();
    }
}
