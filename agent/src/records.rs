//! What survives a restart of the agent: `agent.json`, and a `record.json` for each VM.
//!
//! A record holds what is needed to run and to adopt its VM without the controller. It is replaced as a whole
//! (temporary file, fsync, rename), and always before the agent acts on what it says.
//!
//! A record that cannot be read is reported and left alone: its VM is neither started nor deleted, and it stops
//! nothing else. To mend it, an operator removes the file and restarts the agent; the leader then says anew what the
//! VM should be.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, Incarnation, Term, VmId},
};

use crate::vm::{
    desired::Desired,
    hypervisor::{Exit, ExitKind},
};

/// What the agent knows about one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VM. The same as the name of its directory.
    pub vm: VmId,
    /// What it should be, with the newest incarnation that was seen.
    pub desired: Desired,
    /// The launch that may be executing. Written before the keeper is started.
    #[serde(default)]
    pub launched: Option<Launched>,
    /// The newest restart counter that has been carried out.
    #[serde(default)]
    pub restarts_done: u64,
    /// All its disks have been made.
    #[serde(default)]
    pub disks_ready: bool,
    /// How the current incarnation came to rest. Absent while it runs or is to run.
    #[serde(default)]
    pub settled: Option<Settled>,
    /// When that was. For people.
    #[serde(default)]
    pub settled_at: WallTime,
    /// How QEMU last ended.
    #[serde(default)]
    pub last_exit: Option<LastExit>,
    /// The migration (by the incarnation on its target) that the QEMU which executes is or was part of, until it is known that
    /// its guest goes on. Written before QEMU is told anything of it.
    #[serde(default)]
    pub moving: Option<Incarnation>,
    /// The migration of which its memory is or was sent. If its disks are copied, they had been before that.
    /// Written before QEMU is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sending: Option<Incarnation>,
    /// The QEMU that executes has been told to let its guest stand still, and it is not known yet that it goes on again.
    #[serde(default)]
    pub stands_still: bool,
}

/// A launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launched {
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The lease generation that its keeper watches.
    pub lease_generation: u16,
    /// When it was launched. For people.
    #[serde(default)]
    pub at: WallTime,
    /// Whether its guest may have executed.
    #[serde(default)]
    pub role: Role,
}

/// What a QEMU was launched for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Its guest executes, or has.
    #[default]
    Executes,
    /// To wait for a guest from another host, which has never been told to go on here.
    Incoming,
}

/// How an incarnation came to rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Settled {
    /// It was stopped, as desired.
    Stopped,
    /// The guest powered itself off.
    PoweredOff,
    /// It ended with an error and is not started again.
    Failed {
        /// Why, in words.
        reason: String,
    },
    /// The host's lease ran out.
    Fenced,
    /// Its disks are gone.
    Deleted,
    /// It belongs elsewhere.
    Forgotten,
}

/// How QEMU last ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastExit {
    /// Exit status, -1 if there is none.
    pub code: i32,
    /// The signal that ended it, 0 if none.
    pub signal: i32,
    /// What that means.
    pub reason: String,
    /// When it was noticed.
    pub at: WallTime,
}

impl LastExit {
    /// From how QEMU ended and what that means.
    #[must_use]
    pub fn new(exit: &Exit, reason: String) -> Self {
        let (code, signal) = match exit.kind {
            ExitKind::Exited(code) => (code, 0),
            ExitKind::Signaled(signal) => (-1, signal),
            ExitKind::Fenced | ExitKind::NotStarted | ExitKind::KeeperKilled => (-1, 0),
        };
        Self { code, signal, reason, at: exit.at }
    }
}

impl Record {
    /// The record of a VM that has just been named.
    #[must_use]
    pub fn new(vm: VmId, desired: Desired) -> Self {
        Self {
            vm,
            desired,
            launched: None,
            restarts_done: 0,
            disks_ready: false,
            settled: None,
            settled_at: WallTime::default(),
            last_exit: None,
            moving: None,
            sending: None,
            stands_still: false,
        }
    }
}

/// What the agent knows about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    /// This host, made at the first start.
    pub host_id: HostId,
    /// The newest term that was seen.
    #[serde(default)]
    pub newest_term: Term,
    /// What the accelerator probe found, and when that is still true.
    #[serde(default)]
    pub accelerator: Option<AcceleratorRecord>,
}

/// A finding of the accelerator probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceleratorRecord {
    /// It is good as long as this is the same: the boot, and the QEMU binary.
    pub good_for: String,
    /// `kvm` or `tcg`.
    pub kind: String,
    /// What was measured.
    pub why: String,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{} cannot be read", path.display())]
    Garbage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Another agent uses it.
    #[error("{} is in use by another agent; give each agent a --state-dir of its own", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// A record that is in the wrong directory.
    #[error("{} is about VM {found}, not about the VM that its directory is named after", path.display())]
    Misplaced {
        /// The file.
        path: PathBuf,
        /// What it is about.
        found: VmId,
    },
}

/// What there is on disk about a VM that has a directory.
#[derive(Debug)]
pub enum Loaded {
    /// Its record.
    Record(Record),
    /// No record, but a keeper was started once: an operator has removed the record, or it never got that far.
    Missing,
    /// A record that cannot be read.
    Unreadable(Error),
}

/// How long a lock may be held that is to be free. An agent that was killed while it was starting a process leaves it to that
/// process, until that one has become the program that it is to be.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// How often to look.
const LOCK_PERIOD: Duration = Duration::from_millis(10);

/// The agent's state directory. Its lock is held as long as this lives.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Opens it, and makes it when it is not there.
    ///
    /// # Errors
    ///
    /// It cannot be made, or another agent uses it.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let vms = root.join("vms");
        make_dir(root)?;
        make_dir(&vms)?;
        let lock_path = root.join("lock");
        let lock = File::options().create(true).write(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(io_error("open", &lock_path))?;
        let began = Instant::now();
        while rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            if began.elapsed() > LOCK_PATIENCE {
                return Err(Error::Locked { path: root.to_owned() });
            }
            thread::sleep(LOCK_PERIOD);
        }
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// The lease file.
    #[must_use]
    pub fn lease_path(&self) -> PathBuf {
        self.root.join("lease")
    }

    /// The directory of the VMs' directories.
    #[must_use]
    pub fn vms(&self) -> VmDirs {
        VmDirs { root: self.root.join("vms") }
    }

    /// Reads `agent.json`; at the first start, makes it with `fresh` as the host's id.
    ///
    /// # Errors
    ///
    /// It cannot be read. It is not replaced: a host that lost its id would come back as another one.
    pub fn agent(&self, fresh: HostId) -> Result<AgentRecord, Error> {
        let path = self.root.join("agent.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| Error::Garbage { path, source }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let record = AgentRecord { host_id: fresh, newest_term: Term::default(), accelerator: None };
                self.write_agent(&record)?;
                Ok(record)
            }
            Err(source) => Err(Error::Io { what: "read", path, source }),
        }
    }

    /// Replaces `agent.json`.
    ///
    /// # Errors
    ///
    /// It could not be written; the old one is still there.
    pub fn write_agent(&self, record: &AgentRecord) -> Result<(), Error> {
        write_json(&self.root, "agent.json", record)
    }
}

/// `agent.json` with what was last written to it. Shared by those who change a part of it.
#[derive(Debug)]
pub struct AgentFile {
    dir: StateDir,
    record: Mutex<AgentRecord>,
}

impl AgentFile {
    /// Takes over the state directory. At the first start, `fresh` becomes the host's id.
    ///
    /// # Errors
    ///
    /// See [`StateDir::agent`].
    pub fn open(dir: StateDir, fresh: HostId) -> Result<Self, Error> {
        let record = Mutex::new(dir.agent(fresh)?);
        Ok(Self { dir, record })
    }

    /// The state directory.
    #[must_use]
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// What is in the file.
    #[must_use]
    pub fn get(&self) -> AgentRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it, on disk first.
    ///
    /// # Errors
    ///
    /// It could not be written; nothing has changed.
    pub fn change(&self, change: impl FnOnce(&mut AgentRecord)) -> Result<(), Error> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            self.dir.write_agent(&changed)?;
            *record = changed;
        }
        Ok(())
    }
}

/// The directory that has one directory for each VM.
#[derive(Clone, Debug)]
pub struct VmDirs {
    root: PathBuf,
}

impl VmDirs {
    /// The directory of the VMs' directories, wherever it is.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory of one VM.
    #[must_use]
    pub fn dir(&self, vm: VmId) -> PathBuf {
        self.root.join(vm.to_string())
    }

    /// Whether there is no VM.
    ///
    /// # Errors
    ///
    /// The directory itself cannot be read.
    pub fn is_empty(&self) -> Result<bool, Error> {
        let mut entries = fs::read_dir(&self.root).map_err(io_error("list", &self.root))?;
        Ok(entries.next().is_none())
    }

    /// Every VM that there is a directory for. Removes what an interrupted [`VmDirs::remove`] left, and directories
    /// in which nothing ever happened.
    ///
    /// # Errors
    ///
    /// The directory itself cannot be read.
    pub fn load(&self) -> Result<Vec<(VmId, Loaded)>, Error> {
        let mut loaded = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error("list", &self.root))? {
            let entry = entry.map_err(io_error("list", &self.root))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(GONE) {
                if let Err(error) = fs::remove_dir_all(entry.path()) {
                    tracing::warn!(path = %entry.path().display(), %error, "cannot remove what is left of a VM");
                }
                continue;
            }
            let Ok(vm) = name.parse::<VmId>() else { continue };
            match self.read(vm) {
                Loaded::Missing if !entry.path().join("keeper.json").exists() => {
                    if let Err(error) = self.remove(vm) {
                        tracing::warn!(%vm, %error, "cannot remove an empty directory");
                    }
                }
                found => loaded.push((vm, found)),
            }
        }
        loaded.sort_by_key(|(vm, _)| *vm);
        Ok(loaded)
    }

    fn read(&self, vm: VmId) -> Loaded {
        let path = self.dir(vm).join("record.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Loaded::Missing,
            Err(source) => return Loaded::Unreadable(Error::Io { what: "read", path, source }),
        };
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) if record.vm == vm => Loaded::Record(record),
            Ok(record) => Loaded::Unreadable(Error::Misplaced { path, found: record.vm }),
            Err(source) => Loaded::Unreadable(Error::Garbage { path, source }),
        }
    }

    /// Replaces the record of a VM.
    ///
    /// # Errors
    ///
    /// It could not be written; the old one, if any, is still there.
    pub fn write(&self, record: &Record) -> Result<(), Error> {
        let dir = self.dir(record.vm);
        make_dir(&dir)?;
        write_json(&dir, "record.json", record)
    }

    /// Removes all that is known about a VM: at once, as far as a restart can see.
    ///
    /// # Errors
    ///
    /// Its directory could not be moved out of the way.
    pub fn remove(&self, vm: VmId) -> Result<(), Error> {
        let dir = self.dir(vm);
        let gone = self.root.join(format!("{GONE}{vm}"));
        let _ = fs::remove_dir_all(&gone);
        match fs::rename(&dir, &gone) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::Io { what: "remove", path: dir, source }),
        }
        fs::remove_dir_all(&gone).map_err(io_error("remove", &gone))
    }
}

/// Prefix of a directory that is being removed.
const GONE: &str = ".gone-";

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

fn make_dir(path: &Path) -> Result<(), Error> {
    // The VM user passes through on the way to its sockets, so others may search, whatever the umask says.
    match fs::DirBuilder::new().mode(0o755).recursive(false).create(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io_error("open up", path)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().unwrap_or(path);
            fs::create_dir_all(parent).map_err(io_error("make", parent))?;
            make_dir(path)
        }
        Err(source) => Err(Error::Io { what: "make", path: path.to_owned(), source }),
    }
}

/// Writes `name` in `dir` so that after a crash there is the old file or the new one, never a part of one.
fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), Error> {
    let path = dir.join(name);
    let temporary = dir.join(format!(".{name}.tmp"));
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|source| Error::Garbage { path: path.clone(), source })?;
    bytes.push(b'\n');
    let write = || -> io::Result<()> {
        // What a user told cloud-init, and the secret of a migration, are nobody else's business. One that a crash has left
        // keeps its old mode.
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(io_error("write", &path))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::vm::fake::desired;

    fn vm(n: u128) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n))
    }

    #[test]
    fn records_survive_and_a_truncated_one_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let vms = state.vms();
        let record = Record { disks_ready: true, ..Record::new(vm(1), desired(3)) };
        vms.write(&record).unwrap();
        vms.write(&Record::new(vm(2), desired(1))).unwrap();
        vms.write(&Record::new(vm(3), desired(1))).unwrap();
        let path = vms.dir(vm(2)).join("record.json");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "it has secrets");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        fs::rename(vms.dir(vm(3)), vms.dir(vm(4))).unwrap();
        fs::create_dir(vms.dir(vm(5))).unwrap();
        fs::create_dir(vms.dir(vm(6))).unwrap();
        fs::write(vms.dir(vm(6)).join("keeper.json"), "{}").unwrap();

        let loaded = vms.load().unwrap();
        assert_eq!(loaded.iter().map(|(vm, _)| *vm).collect::<Vec<_>>(), [1, 2, 4, 6].map(vm));
        assert!(matches!(&loaded[0].1, Loaded::Record(r) if *r == record));
        assert!(matches!(loaded[1].1, Loaded::Unreadable(Error::Garbage { .. })));
        assert!(matches!(loaded[2].1, Loaded::Unreadable(Error::Misplaced { .. })));
        assert!(matches!(loaded[3].1, Loaded::Missing));
        assert!(path.exists(), "left alone");

        vms.remove(vm(1)).unwrap();
        vms.remove(vm(1)).unwrap();
        assert_eq!(vms.load().unwrap().len(), 3);
    }

    #[test]
    fn a_state_directory_has_one_agent_and_one_id() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep/state");
        let state = StateDir::open(&root).unwrap();
        assert!(matches!(StateDir::open(&root), Err(Error::Locked { .. })));
        // It is free in a moment.
        let opened = thread::scope(|threads| {
            threads.spawn(|| {
                thread::sleep(LOCK_PERIOD * 3);
                drop(state);
            });
            StateDir::open(&root)
        });
        let state = opened.unwrap();
        let id = HostId::from_uuid(Uuid::from_u128(1));
        let record = state.agent(id).unwrap();
        assert_eq!(record.host_id, id);
        drop(state);
        let state = StateDir::open(&root).unwrap();
        assert_eq!(state.agent(HostId::from_uuid(Uuid::from_u128(2))).unwrap(), record);
        fs::write(root.join("agent.json"), "{").unwrap();
        assert!(matches!(state.agent(id), Err(Error::Garbage { .. })));
    }
}
