//! An etcd of the controller's own, for clusters with one controller: started in its data directory, restarted when it
//! dies, stopped with the controller. It is the same store with the same code path.

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

/// A log larger than this is begun anew at the next start.
const MAX_LOG_BYTES: u64 = 10 * 1024 * 1024;
/// How often the child is looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long a clean stop may take before the child is killed.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long to wait before a dead child is started again; doubled up to the limit while it dies at once.
const RESTART_AFTER: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// A child that lived this long has started well.
const LIVED: Duration = Duration::from_secs(10);

/// Why there is no etcd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No program was found.
    #[error(
        "no `etcd` found in {0}; install it (Debian: apt-get install etcd-server), name it with --etcd-binary, or use a \
         cluster that runs already with --etcd"
    )]
    NoBinary(String),
    /// Its directory or files cannot be used.
    #[error("cannot use {path}")]
    Files {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be executed.
    #[error("cannot start {binary}")]
    Spawn {
        /// What.
        binary: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The ports, remembered so that a restart is found where it was.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Ports {
    client: u16,
    peer: u16,
}

/// A supervised etcd. Dropping it stops it.
#[derive(Debug)]
pub struct EmbeddedEtcd {
    endpoint: String,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl EmbeddedEtcd {
    /// Starts one in `data_dir`, with the data that is there. Blocks only for files; etcd serves a little later.
    ///
    /// # Errors
    ///
    /// When there is no etcd, or it cannot be started at all.
    pub fn start(data_dir: &Path, binary: Option<&Path>) -> Result<Self, Error> {
        let binary = find(binary)?;
        let ports = ports(data_dir)?;
        let launch = Launch { binary, data_dir: data_dir.to_owned(), ports };
        let (stop, stopped) = mpsc::channel();
        let (started, first) = mpsc::channel();
        // The parent-death signal follows the thread that spawns, so this thread lives as long as the process does.
        let thread = thread::Builder::new()
            .name("etcd".into())
            .spawn(move || supervise(&launch, &started, &stopped))
            .map_err(|source| Error::Files { path: data_dir.to_owned(), source })?;
        match first.recv() {
            Ok(Ok(())) => {
                let endpoint = format!("http://127.0.0.1:{}", ports.client);
                info!(endpoint, "started an etcd of its own");
                Ok(Self { endpoint, stop: Some(stop), thread: Some(thread) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Files { path: data_dir.to_owned(), source: io::Error::other("the supervisor ended") }),
        }
    }

    /// Where it serves.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Stops it and waits until it is gone.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the supervisor of etcd ended badly");
        }
    }
}

impl Drop for EmbeddedEtcd {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Launch {
    binary: PathBuf,
    data_dir: PathBuf,
    ports: Ports,
}

fn supervise(launch: &Launch, started: &mpsc::Sender<Result<(), Error>>, stopped: &mpsc::Receiver<()>) {
    let mut child = match launch.spawn() {
        Ok(child) => {
            let _ = started.send(Ok(()));
            child
        }
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let mut wait = RESTART_AFTER.0;
    loop {
        let mut lived = Duration::ZERO;
        let status = loop {
            match stopped.recv_timeout(POLL) {
                Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => return end(&mut child),
                Err(mpsc::RecvTimeoutError::Timeout) => lived += POLL,
            }
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break status.to_string(),
                Err(error) => break error.to_string(),
            }
        };
        wait = if lived >= LIVED { RESTART_AFTER.0 } else { (wait * 2).min(RESTART_AFTER.1) };
        warn!("etcd ended ({status}); it is started again in {wait:?}; its log is {}", launch.log_path().display());
        loop {
            match stopped.recv_timeout(wait) {
                Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            match launch.spawn() {
                Ok(new) => break child = new,
                Err(error) => warn!("etcd cannot be started again: {}", crate::report(&error)),
            }
        }
    }
}

/// Asks the child to end, and kills it when it does not.
fn end(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself: then there is nothing to do.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    let mut waited = Duration::ZERO;
    let status: io::Result<ExitStatus> = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if waited < STOP_GRACE => {
                // The supervisor's own thread: nothing else waits on it.
                thread::park_timeout(POLL);
                waited += POLL;
            }
            Ok(None) => {
                let _ = child.kill();
                break child.wait();
            }
            Err(error) => break Err(error),
        }
    };
    match status {
        Ok(status) => info!("etcd ended ({status})"),
        Err(error) => warn!("etcd could not be waited for: {error}"),
    }
}

impl Launch {
    fn log_path(&self) -> PathBuf {
        self.data_dir.join("etcd.log")
    }

    fn spawn(&self) -> Result<Child, Error> {
        let log = self.open_log()?;
        let errors = log.try_clone().map_err(|source| Error::Files { path: self.log_path(), source })?;
        let client = format!("http://127.0.0.1:{}", self.ports.client);
        let peer = format!("http://127.0.0.1:{}", self.ports.peer);
        let mut command = Command::new(&self.binary);
        command
            .args(["--name", "uncloud", "--data-dir"])
            .arg(self.data_dir.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("uncloud={peer}")])
            // In its environment somebody may have left settings for another etcd.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let parent = rustix::process::getpid();
        // SAFETY: prctl and getppid are async-signal-safe; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                // The parent may have died before the signal was set.
                if rustix::process::getppid() == Some(parent) {
                    Ok(())
                } else {
                    Err(io::Error::other("the controller has ended"))
                }
            });
        }
        command.spawn().map_err(|source| Error::Spawn { binary: self.binary.clone(), source })
    }

    fn open_log(&self) -> Result<File, Error> {
        let path = self.log_path();
        let begin_anew = fs::metadata(&path).is_ok_and(|m| m.len() > MAX_LOG_BYTES);
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        if begin_anew {
            // Failing to make it shorter is no reason not to start.
            let _ = fs::remove_file(&path);
        }
        options.open(&path).map_err(|source| Error::Files { path, source })
    }
}

/// The flag, `$UNCLOUD_ETCD`, beside this program, then `$PATH`.
fn find(flag: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(path) = flag {
        return if path.is_file() { Ok(path.to_owned()) } else { Err(Error::NoBinary(path.display().to_string())) };
    }
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join("etcd")));
    let on_path = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).map(|dir| dir.join("etcd")).collect::<Vec<_>>())
        .unwrap_or_default();
    std::env::var_os("UNCLOUD_ETCD")
        .map(PathBuf::from)
        .into_iter()
        .chain(beside)
        .chain(on_path)
        .find(|path| path.is_file())
        .ok_or_else(|| Error::NoBinary("$UNCLOUD_ETCD, beside this program, or $PATH".into()))
}

/// The remembered ports if they are free, otherwise others, which are then remembered.
fn ports(data_dir: &Path) -> Result<Ports, Error> {
    let path = data_dir.join("etcd.json");
    if let Ok(text) = fs::read_to_string(&path)
        && let Ok(ports) = serde_json::from_str::<Ports>(&text)
        && is_free(ports.client)
        && is_free(ports.peer)
    {
        return Ok(ports);
    }
    let files = |source| Error::Files { path: path.clone(), source };
    // Both held until both are known, so that they differ.
    let (client, peer) = (TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
    let port = |listener: io::Result<TcpListener>| listener.and_then(|l| l.local_addr()).map(|a| a.port());
    let ports = Ports { client: port(client).map_err(files)?, peer: port(peer).map_err(files)? };
    let text = serde_json::to_string(&ports).expect("two numbers are JSON");
    fs::write(&path, text).map_err(files)?;
    Ok(ports)
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}
