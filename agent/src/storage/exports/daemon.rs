//! The daemon that serves disks: one `qemu-storage-daemon`, told what to do over QMP.
//!
//! It outlives the agent, so that a restart of the agent is noticed by no guest; the next agent finds it by the lock that it
//! holds. What it exports is known by asking it and by nothing else: no file says so. A new daemon exports nothing.
//!
//! A daemon that does not answer is left alone: nobody can say what it does, so nothing is acknowledged meanwhile.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    net::SocketAddr,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    sync::Notify,
    time::{self, Instant},
};
use tracing::{info, warn};

use super::{
    super::{place, pools::User},
    plan::{Disk, Have, Name, Sizes},
};
use crate::{
    keeper::sys,
    qemu::{
        disks::{self, SnapshotStep},
        qmp::{self, Client},
    },
    vm::{desired::Format, disks::SnapshotOrder},
};

/// The daemon is ready after some 50 ms.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long a daemon that lives may take to take a connection, or one that dies to be gone.
const FIND_LIMIT: Duration = Duration::from_secs(1);
/// How often to look at what is about to happen.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long requests that are under way may take until their export is gone.
const REVOKE_LIMIT: Duration = Duration::from_secs(5);
/// Held by the daemon as long as it lives.
const LOCK: &str = "lock";
/// Where it serves.
const RECORD: &str = "daemon.json";
/// Its directory.
const RUN: &str = "run";
const SOCKET: &str = "qmp.sock";
const LOG: &str = "daemon.log";

/// Why the daemon could not be asked, or did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the daemon's.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It ended at once.
    #[error("the daemon that serves disks ended with {status}: {words}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        words: String,
    },
    /// It does not answer.
    #[error("the daemon that serves disks does not answer")]
    Silent(#[source] qmp::Error),
    /// It was started with another address.
    #[error(
        "disks are served at {old} and VMs may use them there; keep --export-address {old}, or stop these VMs and end \
         the process {pid}"
    )]
    OtherAddress {
        /// Where it serves.
        old: SocketAddr,
        /// Its process.
        pid: u32,
    },
    /// It did not do what it was told.
    #[error("the daemon that serves disks")]
    Qmp(#[from] qmp::Error),
    /// What is under way on an export takes too long.
    #[error("the export {0} was taken away, and requests of it are still under way")]
    StillThere(Name),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// How the daemon is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// qemu-storage-daemon.
    pub program: PathBuf,
    /// The directory of what belongs to it.
    pub dir: PathBuf,
    /// Where it serves.
    pub address: SocketAddr,
    /// Who it runs as: who the disks belong to. Absent: the agent's own user.
    pub user: Option<User>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: u32,
    address: SocketAddr,
}

/// The daemon, as far as it is known.
#[derive(Debug)]
pub struct Daemon {
    options: Options,
    link: Option<Client>,
    /// Notified when the daemon, or the line to it, has ended.
    ended: Arc<Notify>,
}

impl Daemon {
    /// Nothing is started before it is needed.
    #[must_use]
    pub fn new(options: Options, ended: Arc<Notify>) -> Self {
        Self { options, link: None, ended }
    }

    /// What it exports now. Finds the daemon that runs, or starts one.
    ///
    /// # Errors
    ///
    /// It does not say.
    pub async fn have(&mut self) -> Result<Have, Error> {
        const QUERY: &str = "query-block-exports";
        let found = match self.execute(QUERY, None).await {
            // The daemon of before has ended, maybe; now another is found or started.
            Err(Error::Silent(qmp::Error::Closed | qmp::Error::Io(_))) => self.execute(QUERY, None).await?,
            other => other?,
        };
        let text = |entry: &Value, key: &str| entry[key].as_str().map(str::to_owned);
        let entries = found.as_array().into_iter().flatten();
        Ok(entries.filter_map(|e| Some((text(e, "id")?, text(e, "node-name")?))).collect())
    }

    /// How large the disks are that it has open.
    ///
    /// # Errors
    ///
    /// It does not say.
    pub async fn sizes(&mut self) -> Result<Sizes, Error> {
        Ok(disks::nodes(&self.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?))
    }

    /// Makes a disk larger that is open and that nothing exports.
    ///
    /// # Errors
    ///
    /// It did not.
    pub async fn grow(&mut self, disk: &Disk) -> Result<(), Error> {
        let arguments = json!({ "node-name": disk.node, "size": disk.size_bytes });
        self.execute("block_resize", Some(arguments)).await.map(drop)
    }

    /// Takes and removes snapshots of one VM's disks, each on all of them at one moment.
    ///
    /// # Errors
    ///
    /// It did not. Those before the one that failed are done.
    pub async fn snapshots(&mut self, nodes: &[&str], orders: &[SnapshotOrder]) -> Result<(), Error> {
        let answer = self.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
        for step in disks::snapshot_steps(&answer, nodes, orders) {
            match step {
                SnapshotStep::Remove(arguments) => self.execute(disks::REMOVE_SNAPSHOT, Some(arguments)).await?,
                SnapshotStep::Take(_, arguments) => self.execute(disks::TAKE_SNAPSHOT, Some(arguments)).await?,
            };
        }
        Ok(())
    }

    /// Takes exports away: their clients are cut off at once. Returns what is exported then, when the last request of theirs has
    /// ended, so that nothing of them is written later.
    ///
    /// # Errors
    ///
    /// That is not known, or takes too long.
    pub async fn revoke(&mut self, names: &[Name]) -> Result<Have, Error> {
        for name in names {
            let arguments = json!({ "id": name.to_string(), "mode": "hard" });
            match self.execute("block-export-del", Some(arguments)).await {
                Ok(_) => {}
                // It is on its way out already, or gone: what is there is looked at anyway.
                Err(Error::Qmp(qmp::Error::Refused { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        let give_up = Instant::now() + REVOKE_LIMIT;
        loop {
            let have = self.have().await?;
            let Some(left) = names.iter().find(|n| have.contains_key(&n.to_string())) else { return Ok(have) };
            if Instant::now() >= give_up {
                return Err(Error::StillThere(left.clone()));
            }
            time::sleep(LOOK_EVERY).await;
        }
    }

    /// Makes an export.
    ///
    /// # Errors
    ///
    /// It could not be made.
    pub async fn add(&mut self, name: &Name, disk: &Disk) -> Result<(), Error> {
        let path = disk.path.to_string_lossy();
        let file = match disk.format {
            Format::Qcow2 => place::qcow2(&disk.node, &path),
            Format::Raw => place::raw(&disk.node, &path),
        };
        match self.execute("blockdev-add", Some(file)).await {
            Ok(_) => {}
            // The disk is open already: its node has this name, and no other has. Otherwise the export is refused, too.
            Err(Error::Qmp(qmp::Error::Refused { description, .. })) if description.contains("Duplicate nodes") => {}
            Err(error) => return Err(error),
        }
        let export = json!({
            "type": "nbd",
            "id": name.to_string(),
            "name": name.to_string(),
            "node-name": disk.node,
            "writable": true,
            // Each write lies on the storage host's disk before the guest hears of it. A guest outlives this daemon and its
            // host: what they had only in memory would be lost to it without a word.
            "writethrough": true,
        });
        self.execute("block-export-add", Some(export)).await.map(drop)
    }

    /// Closes a disk that nothing exports.
    ///
    /// # Errors
    ///
    /// It is still in use, or the daemon does not answer.
    pub async fn close(&mut self, node: &str) -> Result<(), Error> {
        match self.execute("blockdev-del", Some(json!({ "node-name": node }))).await {
            Ok(_) => Ok(()),
            Err(Error::Qmp(qmp::Error::Refused { description, .. })) if description.contains("Failed to find node") => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<Value, Error> {
        let client = match self.link.take() {
            Some(client) => client,
            None => self.find_or_start().await?,
        };
        let result = client.execute(command, arguments).await;
        match result {
            Ok(value) => {
                self.link = Some(client);
                Ok(value)
            }
            Err(error @ qmp::Error::Refused { .. }) => {
                self.link = Some(client);
                Err(Error::Qmp(error))
            }
            // The line is not used again: what it has done and what not is asked on a new one.
            Err(error) => Err(Error::Silent(error)),
        }
    }

    async fn find_or_start(&self) -> Result<Client, Error> {
        let Options { dir, address, .. } = &self.options;
        make_dirs(&self.options)?;
        let path = dir.join(LOCK);
        let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.map_err(io_error("open", &path))?;
        let give_up = Instant::now() + FIND_LIMIT;
        loop {
            match lock.try_lock() {
                Ok(()) => return self.start(&lock).await,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(io_error("lock", &path)(e)),
            }
            if let Some(record) = read_record(dir)
                && record.address != *address
            {
                return Err(Error::OtherAddress { old: record.address, pid: record.pid });
            }
            match self.connect().await {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() >= give_up => return Err(error),
                // It is about to be gone.
                Err(_) => time::sleep(LOOK_EVERY).await,
            }
        }
    }

    async fn start(&self, lock: &File) -> Result<Client, Error> {
        let Options { program, dir, address, user } = &self.options;
        let path = dir.join(LOG);
        let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&path);
        let log = log.map_err(io_error("open", &path))?;
        let mut command = std::process::Command::new(program);
        command
            .args(["--chardev", &format!("socket,id=qmp,path={SOCKET},server=on,wait=off")])
            .args(["--monitor", "chardev=qmp,mode=control"])
            .arg("--nbd-server")
            .arg(format!("addr.type=inet,addr.host={},addr.port={},max-connections=0", address.ip(), address.port()))
            .current_dir(dir.join(RUN))
            // Nothing of the agent's environment is its business.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(user) = user {
            use std::os::unix::process::CommandExt;
            command.uid(user.uid).gid(user.gid);
        }
        sys::detach(&mut command, vec![lock.as_raw_fd()]);
        let mut child = Command::from(command).spawn().map_err(io_error("start", program))?;
        let record = Record { pid: child.id().unwrap_or(0), address: *address };
        let path = dir.join(RECORD);
        let json = serde_json::to_vec(&record).expect("numbers and an address");
        fs::write(&path, json).map_err(io_error("write", &path))?;

        let give_up = Instant::now() + START_LIMIT;
        let client = loop {
            match self.connect().await {
                Ok(client) => break client,
                Err(error) if Instant::now() >= give_up => {
                    reap(child, Arc::clone(&self.ended));
                    return Err(error);
                }
                Err(_) => {}
            }
            if let Ok(Some(status)) = child.try_wait() {
                let words = fs::read_to_string(dir.join(LOG)).unwrap_or_default();
                let words = words.trim().chars().take(500).collect();
                return Err(Error::Ended { status, words });
            }
            time::sleep(LOOK_EVERY).await;
        };
        info!(%address, pid = record.pid, "disks are served");
        reap(child, Arc::clone(&self.ended));
        Ok(client)
    }

    async fn connect(&self) -> Result<Client, Error> {
        let run = self.options.dir.join(RUN);
        let open = File::open(&run).map_err(io_error("open", &run))?;
        // Through the descriptor the address is short, however long the directory's path.
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", open.as_raw_fd())).await;
        let stream = stream.map_err(io_error("connect to", &run.join(SOCKET)))?;
        let (client, mut events) = Client::connect(stream).await.map_err(Error::Silent)?;
        let ended = Arc::clone(&self.ended);
        tokio::spawn(async move {
            while events.next().await.is_some() {}
            ended.notify_one();
        });
        Ok(client)
    }
}

/// Waits for the end of a child, whatever becomes of the rest.
fn reap(mut child: Child, ended: Arc<Notify>) {
    tokio::spawn(async move {
        match child.wait().await {
            Ok(status) => warn!(%status, "the daemon that serves disks has ended"),
            Err(error) => warn!("the daemon that serves disks cannot be waited for: {error}"),
        }
        ended.notify_one();
    });
}

fn read_record(dir: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()
}

fn make_dirs(options: &Options) -> Result<(), Error> {
    let run = options.dir.join(RUN);
    for (dir, mode) in [(&options.dir, 0o755), (&run, 0o700)] {
        match fs::DirBuilder::new().mode(mode).create(dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error("make", dir)(e)),
        }
    }
    // Whatever the umask is: its user must get to its socket.
    fs::set_permissions(&options.dir, fs::Permissions::from_mode(0o755)).map_err(io_error("open up", &options.dir))?;
    if let Some(user) = options.user {
        std::os::unix::fs::chown(&run, Some(user.uid), Some(user.gid)).map_err(io_error("give away", &run))?;
    }
    Ok(())
}
