//! A cluster on this machine: one controller with its own etcd, and some agents that share a pool.
//!
//! ```text
//!  DIR/controller   data of the controller and its etcd
//!  DIR/pool         the shared pool `default`
//!  DIR/host-N       state of an agent
//!  DIR/logs/*.log   what each process writes
//! ```
//!
//! Whatever happens to this process, nothing stays: [`Cluster::down`] ends everything in order, dropping a cluster
//! kills it, and if this process is killed its children get SIGTERM from the kernel and the guests die with their leases.

use std::{
    fmt, fs, io,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use uncloud_proto::v1;

use super::{
    power::{self, Identity},
    process::{Death, Process, tail},
};
use crate::client::{Client, DEFAULT_TIMEOUT, Options as ClientOptions, Reads};

/// How long a start may take. Far longer than it does: etcd needs about a second, an agent's probe 0.3 s.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long an agent may take to end when it is asked.
const AGENT_GRACE: Duration = Duration::from_secs(3);
/// How long the controller may take to end when it is asked: it drains its calls and stops its etcd.
const CONTROLLER_GRACE: Duration = Duration::from_secs(10);
/// How long the rest may take to be gone after that.
const LAST_GRACE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the cluster is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many hosts.
    pub hosts: u32,
    /// Where everything goes.
    pub dir: PathBuf,
    /// Where the controller listens. Port 0: any free one.
    pub listen: SocketAddr,
    /// Virtual CPUs of each host; without it, the threads of this machine.
    pub vcpus: Option<u32>,
    /// Memory of each host for VMs, in MiB.
    pub memory_mib: u64,
    /// The short lease; without it, the controller's default.
    pub fast_lease: Option<Duration>,
}

/// Why a cluster could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is missing.
    #[error("cannot find `{0}` beside this program or on PATH; `cargo build` makes it")]
    NoProgram(&'static str),
    /// Something with a file or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it did not work.
        #[source]
        source: io::Error,
    },
    /// The pool could not be set up.
    #[error("cannot set up the pool: {0}")]
    Pool(String),
    /// A process ended while everything was being started.
    #[error("{0}")]
    Died(Death),
    /// It took too long.
    #[error("the cluster is not up after {} s: {state}\n{logs}", START_LIMIT.as_secs())]
    TooSlow {
        /// How far it came.
        state: String,
        /// The ends of the logs.
        logs: String,
    },
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.last_words.replace('\n', "\n  | ");
        write!(f, "{} ended by itself ({}). The end of {}:\n  | {words}", self.name, self.status, self.log.display())
    }
}

/// A host of the cluster.
#[derive(Debug)]
pub struct Host {
    /// Its name, `host-1` and so on.
    pub name: String,
    /// The state directory of its agent.
    pub state_dir: PathBuf,
    agent: Option<Process>,
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    address: SocketAddr,
    client: Client,
    controller: Option<Process>,
    hosts: Vec<Host>,
    is_down: bool,
}

/// How taking it down went.
#[derive(Debug, Default)]
pub struct Down {
    /// How many keepers and QEMUs were killed.
    pub guests: usize,
    /// Processes that had to be killed because they did not end when they should have.
    pub forced: Vec<String>,
    /// Processes that are still there. Empty, or something is very wrong.
    pub left: Vec<String>,
}

impl Cluster {
    /// Prepares a cluster; nothing is started yet.
    ///
    /// # Errors
    ///
    /// No port is free.
    pub fn new(mut options: Options) -> Result<Self, Error> {
        let mut address = options.listen;
        if address.port() == 0 {
            let picked = TcpListener::bind(address).and_then(|l| l.local_addr());
            address = picked.map_err(io_error("find a free port"))?;
        }
        options.dir = std::path::absolute(&options.dir).map_err(io_error("find the directory"))?;
        let endpoints = vec![address.to_string()];
        let client = Client::new(ClientOptions { endpoints, timeout: DEFAULT_TIMEOUT, reads: Reads::default() })
            .expect("the address of a socket is a valid endpoint");
        Ok(Self { options, address, client, controller: None, hosts: Vec::new(), is_down: false })
    }

    /// Starts everything and waits until the controller serves and every host is up.
    ///
    /// # Errors
    ///
    /// Says what went wrong, with the end of the log. What was started so far still runs: call [`Cluster::down`].
    pub async fn start(&mut self) -> Result<(), Error> {
        let controller = find_program("uncloud-controller")?;
        let agent = find_program("uncloud-agent")?;
        find_program("uncloud-keeper")?;
        self.make_directories()?;
        self.make_pool(&agent)?;

        let mut command = Command::new(controller);
        command.arg("--data-dir").arg(self.options.dir.join("controller"));
        command.arg("--listen").arg(self.address.to_string());
        if let Some(lease) = self.options.fast_lease {
            command.arg("--fast-lease").arg(format!("{}ms", lease.as_millis()));
        }
        self.controller = Some(self.launch("controller", command)?);
        for n in 1..=self.options.hosts {
            let host = self.start_host(&agent, &format!("host-{n}"))?;
            self.hosts.push(host);
        }
        self.wait_until_up().await
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// A client that talks to it.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Ends agent, keepers and QEMUs of a host at once, as a power cut would. Gives how many processes that were.
    ///
    /// # Errors
    ///
    /// There is no such host, or something would not die.
    pub async fn cut_power(&mut self, name: &str) -> Result<usize, String> {
        let host = self.hosts.iter_mut().find(|h| h.name == name).ok_or_else(|| format!("no host `{name}`"))?;
        let agent = host.agent.take().and_then(|p| Identity::of(p.pid(), "agent").map(|identity| (p, identity)));
        let Some((mut process, identity)) = agent else { return Err(format!("{name} has no agent that runs")) };
        let killed = power::cut(&host.state_dir, vec![identity]).await;
        process.ended_within(LAST_GRACE).await;
        killed
    }

    /// Children that have ended by themselves since the last call.
    pub fn deaths(&mut self) -> Vec<Death> {
        let slots = self.hosts.iter_mut().map(|h| &mut h.agent).chain([&mut self.controller]);
        let mut deaths = Vec::new();
        for slot in slots {
            if let Some(death) = slot.as_mut().and_then(Process::death) {
                deaths.push(death);
                *slot = None;
            }
        }
        deaths
    }

    /// The ends of all logs, for a report.
    #[must_use]
    pub fn logs(&self) -> String {
        let names = self.hosts.iter().map(|h| h.name.as_str()).chain(["controller"]);
        let log = |name: &str| {
            let path = self.log_of(name);
            format!("The end of {}:\n  | {}\n", path.display(), tail(&path).replace('\n', "\n  | "))
        };
        names.map(log).collect()
    }

    /// Ends everything: agents, guests, then the controller, which ends its etcd; and looks whether anything is left.
    pub async fn down(&mut self) -> Down {
        let mut down = Down::default();
        for process in self.hosts.iter_mut().filter_map(|h| h.agent.as_mut()) {
            process.signal(Signal::TERM);
        }
        for host in &mut self.hosts {
            if let Some(mut process) = host.agent.take()
                && !process.ended_within(AGENT_GRACE).await
            {
                process.signal(Signal::KILL);
                process.ended_within(LAST_GRACE).await;
                down.forced.push(host.name.clone());
            }
        }
        for host in &self.hosts {
            match power::cut(&host.state_dir, Vec::new()).await {
                Ok(n) => down.guests += n,
                Err(stubborn) => down.left.push(stubborn),
            }
        }
        if let Some(mut process) = self.controller.take() {
            process.signal(Signal::TERM);
            if !process.ended_within(CONTROLLER_GRACE).await {
                process.signal(Signal::KILL);
                process.ended_within(LAST_GRACE).await;
                down.forced.push("controller".to_owned());
            }
        }
        self.look_for_leftovers(&mut down).await;
        self.is_down = true;
        down
    }

    async fn look_for_leftovers(&self, down: &mut Down) {
        let deadline = Instant::now() + LAST_GRACE;
        while !power::leftovers(&self.options.dir).is_empty() && Instant::now() < deadline {
            sleep(LOOK_EVERY).await;
        }
        for identity in power::leftovers(&self.options.dir) {
            identity.signal(Signal::KILL);
            down.forced.push(format!("{} ({})", identity.what, identity.pid.as_raw_nonzero()));
        }
        let deadline = Instant::now() + LAST_GRACE;
        while !power::leftovers(&self.options.dir).is_empty() && Instant::now() < deadline {
            sleep(LOOK_EVERY).await;
        }
        let left = power::leftovers(&self.options.dir);
        down.left.extend(left.iter().map(|i| format!("{} ({})", i.what, i.pid.as_raw_nonzero())));
    }

    fn make_directories(&self) -> Result<(), Error> {
        for dir in ["", "logs", "pool", "controller"].map(|d| self.options.dir.join(d)) {
            fs::create_dir_all(&dir).map_err(io_error(&format!("make {}", dir.display())))?;
        }
        // QEMU runs as somebody else and must reach its files.
        for dir in [self.options.dir.clone(), self.options.dir.join("pool")] {
            let open = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&dir, open).map_err(io_error(&format!("open {}", dir.display())))?;
        }
        Ok(())
    }

    /// Marks the pool as shared, unless that was done when this directory was used before.
    fn make_pool(&self, agent: &Path) -> Result<(), Error> {
        let pool = self.options.dir.join("pool");
        if pool.join(".uncloud-pool").exists() {
            return Ok(());
        }
        let made = Command::new(agent).arg("init-pool").arg(&pool).args(["--name", "default"]).output();
        let made = made.map_err(io_error("run uncloud-agent"))?;
        if made.status.success() {
            Ok(())
        } else {
            Err(Error::Pool(String::from_utf8_lossy(&made.stderr).into_owned()))
        }
    }

    fn start_host(&self, agent: &Path, name: &str) -> Result<Host, Error> {
        let state_dir = self.options.dir.join(name);
        let mut pool = std::ffi::OsString::from("default=");
        pool.push(self.options.dir.join("pool"));
        pool.push(",shared");
        let mut command = Command::new(agent);
        command.arg("--controller").arg(self.address.to_string());
        command.arg("--state-dir").arg(&state_dir).args(["--name", name]);
        // Images may come from anywhere on this machine: who may talk to this cluster is on it already.
        command.arg("--pool").arg(pool).args(["--image-dir", "/", "--image-url", "http://", "--image-url", "https://"]);
        // All hosts are this machine.
        command.args(["--migration-address", "127.0.0.1"]);
        command.arg("--memory-mib").arg(self.options.memory_mib.to_string());
        if let Some(vcpus) = self.options.vcpus {
            command.arg("--vcpus").arg(vcpus.to_string());
        }
        let process = self.launch(name, command)?;
        Ok(Host { name: name.to_owned(), state_dir, agent: Some(process) })
    }

    fn launch(&self, name: &str, command: Command) -> Result<Process, Error> {
        Process::start(name, command, &self.log_of(name)).map_err(io_error(&format!("start {name}")))
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.options.dir.join("logs").join(format!("{name}.log"))
    }

    async fn wait_until_up(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(death) = self.deaths().into_iter().next() {
                return Err(Error::Died(death));
            }
            let state = if self.client.is_serving().await {
                let hosts = self.client.list_hosts(v1::ListHostsRequest {}).await;
                let is_up = |h: &&v1::Host| h.state() == v1::HostState::Up;
                let up = hosts.map(|a| a.hosts.iter().filter(is_up).count()).unwrap_or_default();
                if up >= self.hosts.len() {
                    return Ok(());
                }
                format!("{up} of {} hosts are up", self.hosts.len())
            } else {
                "the controller does not serve".to_owned()
            };
            if Instant::now() >= deadline {
                return Err(Error::TooSlow { state, logs: self.logs() });
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

impl Drop for Cluster {
    /// For ways out on which nobody called [`Cluster::down`], such as a panic.
    fn drop(&mut self) {
        if self.is_down {
            return;
        }
        let agents = self.hosts.iter_mut().filter_map(|h| h.agent.as_mut());
        for process in agents.chain(self.controller.as_mut()) {
            process.signal(Signal::KILL);
        }
        for _ in 0..100 {
            let left = power::leftovers(&self.options.dir);
            if left.is_empty() {
                return;
            }
            left.iter().for_each(|identity| identity.signal(Signal::KILL));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A program of uncloud: beside this one (or one directory up, for tests), or on PATH.
fn find_program(name: &'static str) -> Result<PathBuf, Error> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    let above = beside.as_ref().and_then(|dir| Some(dir.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = beside.into_iter().chain(above).chain(std::env::split_paths(&path));
    places.map(|dir| dir.join(name)).find(|p| is_executable(p)).ok_or(Error::NoProgram(name))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::Io { what, source }
}
