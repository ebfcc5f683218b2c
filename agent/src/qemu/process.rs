//! Starts a VM's QEMU under a keeper, or finds it again.
//!
//! # Safety argument
//!
//! * The VM's lock is taken *before* a keeper is spawned and passed on to it, so that there is no moment at which a keeper
//!   is on its way and nobody can see it: an agent that was killed in the middle of a start leaves either a lock that
//!   is held, and then [`adopt`] waits for what comes of it, or nothing.
//! * A process is found by its pid, its start time and the boot id, from a record in a directory that only root can write; and
//!   a QMP socket is trusted only if that very process serves it, because its directory belongs to the VM's user.

use std::{
    ffi::OsString,
    fmt, fs, io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use uncloud_proto::{
    clock::Clock,
    ids::{Incarnation, VmId},
};

use super::{
    files::{self, KeeperRecord, Lock},
    instance::{self, Processes},
};
pub use super::{
    files::{Exit, ExitOutcome},
    instance::{Instance, InstanceEvent},
};
use crate::{
    keeper::{self, EXIT_BUSY, EXIT_FENCED, sys},
    lease::{LeaseClass, LeaseView, boot_id},
};

/// How long QEMU may take until it answers on QMP. It takes 0.2 s, and much longer when a whole host's VMs start at once.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a lock may be held by somebody who is about to let go of it.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);
/// How long what holds a VM's lock may take to say who it is, or to be gone.
const ADOPT_LIMIT: Duration = Duration::from_secs(5);
/// How often to look at a file or a socket that is about to appear. A start takes twenty times as long.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Who QEMU runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmUser {
    /// Its user id.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
}

/// What a start needs.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Which VM.
    pub vm: VmId,
    /// Which incarnation of it.
    pub incarnation: Incarnation,
    /// Which of the host's leases it lives under.
    pub class: LeaseClass,
    /// The generation of that lease when the start was decided.
    pub lease_generation: u16,
    /// Where the leases are.
    pub lease_file: PathBuf,
    /// The VM's directory; made if it is missing.
    pub vm_dir: PathBuf,
    /// Who QEMU runs as; the agent's own user when there is none. Anybody but that needs root.
    pub user: Option<VmUser>,
    /// The keeper's program.
    pub keeper: PathBuf,
    /// QEMU and its arguments.
    pub argv: Vec<OsString>,
    /// What QEMU finds open, under the numbers that its arguments name. Closed here as soon as the start is over.
    pub pass: Vec<Arc<OwnedFd>>,
}

/// Why a VM was not started. Nothing of it runs then, unless it is [`LaunchError::Busy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The lease under which the start was decided is over.
    #[error("the host's lease ran out before the VM was started")]
    Fenced,
    /// A keeper of this VM, or its QEMU, lives.
    #[error("another process of this VM still lives on this host")]
    Busy,
    /// Something failed.
    #[error("{reason}")]
    Failed {
        /// What, in QEMU's own words if it had any.
        reason: String,
    },
}

impl LaunchError {
    fn failed(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::Failed { reason: format!("{what}: {error}") }
    }
}

/// What was found of a VM.
#[derive(Debug)]
pub enum Adoption {
    /// It executes.
    Running(Instance),
    /// It does not; this is how it ended.
    Ended(Exit),
    /// It never did, as far as its directory says.
    Never,
    /// Something holds its lock and does not say what it is. Nothing is known; ask again.
    Unclear {
        /// What is wrong.
        reason: String,
    },
}

/// Starts a VM. Returns when QEMU has greeted on QMP.
///
/// Not to be dropped midway: a VM that was started then runs without an [`Instance`], until [`adopt`] finds it.
///
/// # Errors
///
/// See [`LaunchError`].
pub async fn launch(launch: &Launch) -> Result<Instance, LaunchError> {
    make_directories(launch).map_err(|e| LaunchError::failed("the VM's directory cannot be made", e))?;
    let lock = lock(&launch.vm_dir).await?;
    let mut child = spawn_keeper(launch, &lock)?;
    // The keeper has it now.
    drop(lock);

    let pid = child.id();
    let started = tokio::select! {
        status = child.wait() => Err(not_started(launch, status)),
        ready = timeout(START_LIMIT, ready(launch, pid)) => match ready {
            Ok(ready) => ready.map_err(|e| LaunchError::failed("QEMU's process cannot be watched", e)),
            Err(_) => Err(LaunchError::Failed { reason: format!("QEMU did not answer on QMP within {START_LIMIT:?}") }),
        },
    };
    match started {
        Ok((record, processes, link)) => {
            // The keeper is a child of this process and has to be reaped, whatever becomes of the instance.
            tokio::spawn(async move { child.wait().await });
            Ok(Instance::watch(&launch.vm_dir, record, processes, Some(link)))
        }
        Err(e) => {
            end(launch, &mut child).await;
            Err(e)
        }
    }
}

fn make_directories(launch: &Launch) -> io::Result<()> {
    fs::create_dir_all(&launch.vm_dir)?;
    fs::set_permissions(&launch.vm_dir, fs::Permissions::from_mode(0o755))?;
    let run = launch.vm_dir.join(keeper::files::RUN);
    match fs::DirBuilder::new().mode(0o700).create(&run) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        Ok(()) | Err(_) => {}
    }
    if let Some(user) = launch.user {
        chown(&run, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

async fn lock(vm_dir: &Path) -> Result<fs::File, LaunchError> {
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match files::take_lock(vm_dir) {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) if Instant::now() >= give_up => return Err(LaunchError::Busy),
            Ok(None) => sleep(LOOK_EVERY).await,
            Err(e) => return Err(LaunchError::failed("the VM's lock cannot be taken", e)),
        }
    }
}

fn spawn_keeper(launch: &Launch, lock: &fs::File) -> Result<Child, LaunchError> {
    // For what goes wrong before the keeper has opened it itself. It belongs to this start, since the lock is held.
    let log = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(launch.vm_dir.join(keeper::files::LOG))
        .map_err(|e| LaunchError::failed("QEMU's log cannot be opened", e))?;

    let mut command = std::process::Command::new(&launch.keeper);
    command
        .args(["--vm", &launch.vm.to_string(), "--incarnation", &launch.incarnation.to_string()])
        .arg("--vm-dir")
        .arg(&launch.vm_dir)
        .args(["--class", &launch.class.to_string()])
        .arg("--lease-file")
        .arg(&launch.lease_file)
        .args(["--lease-generation", &launch.lease_generation.to_string()])
        .args(["--lock-fd", &lock.as_raw_fd().to_string()]);
    if let Some(user) = launch.user {
        command.args(["--uid", &user.uid.to_string(), "--gid", &user.gid.to_string()]);
    }
    let pass: Vec<RawFd> = launch.pass.iter().map(|fd| fd.as_raw_fd()).collect();
    if !pass.is_empty() {
        let numbers: Vec<String> = pass.iter().map(ToString::to_string).collect();
        command.args(["--pass-fds", &numbers.join(",")]);
    }
    // Nothing of the agent's environment is QEMU's business.
    command
        .arg("--")
        .args(&launch.argv)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    sys::detach(&mut command, pass.into_iter().chain([lock.as_raw_fd()]).collect());
    Command::from(command)
        .spawn()
        .map_err(|e| LaunchError::failed(format_args!("the keeper {} cannot be started", launch.keeper.display()), e))
}

/// Waits until QEMU has greeted.
async fn ready(launch: &Launch, keeper: Option<u32>) -> io::Result<(KeeperRecord, Processes, instance::Link)> {
    loop {
        // A record of an earlier keeper is still there until the new one has cleared it.
        if let Some(record) = files::read_keeper(&launch.vm_dir, launch.vm).filter(|r| Some(r.keeper_pid) == keeper) {
            match instance::connect(&launch.vm_dir, &record, 0).await {
                Ok(link) => {
                    let processes = Processes::find(&record)?;
                    return Ok((record, processes, link));
                }
                Err(e) => tracing::trace!(vm = %launch.vm, error = %e, "QEMU is not ready yet"),
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// What the end of a keeper says about a start that did not come about.
fn not_started(launch: &Launch, status: io::Result<ExitStatus>) -> LaunchError {
    let status = match status {
        Ok(status) => status,
        Err(e) => return LaunchError::failed("the keeper cannot be waited for", e),
    };
    let code = status.code().and_then(|c| u8::try_from(c).ok());
    if code == Some(EXIT_FENCED) || (code.is_none() && lease_is_over(launch)) {
        return LaunchError::Fenced;
    }
    if code == Some(EXIT_BUSY) {
        return LaunchError::Busy;
    }
    let words = files::last_words(&launch.vm_dir);
    if !words.is_empty() {
        return LaunchError::Failed { reason: words };
    }
    let reason = match files::read_exit(&launch.vm_dir, launch.vm).map(|e| e.outcome) {
        Some(ExitOutcome::Exited { code }) => format!("QEMU ended at once, with exit status {code}"),
        Some(ExitOutcome::Signaled { signal }) => format!("QEMU was killed at once by signal {signal}"),
        Some(ExitOutcome::NotStarted { reason }) => format!("QEMU cannot be executed: {reason}"),
        Some(ExitOutcome::Fenced | ExitOutcome::Refused | ExitOutcome::KeeperKilled) | None => {
            format!("the keeper ended with {status}")
        }
    };
    LaunchError::Failed { reason }
}

/// Whether the lease of this start is over. Unknown counts as no: the start has failed in either case.
fn lease_is_over(launch: &Launch) -> bool {
    match launch.class {
        LeaseClass::Hold => false,
        LeaseClass::Fast | LeaseClass::Patient => LeaseView::open(&launch.lease_file)
            .is_ok_and(|lease| !lease.word(launch.class).permits(launch.lease_generation, Clock::system().now())),
    }
}

/// Makes sure that nothing of a failed start lives on: kills the keeper, if it lives, and waits until the lock is free.
async fn end(launch: &Launch, child: &mut Child) {
    if let Err(e) = child.kill().await {
        tracing::debug!(vm = %launch.vm, error = %e, "the keeper of a failed start is gone already");
    }
    let free = async {
        while matches!(files::look_at_lock(&launch.vm_dir), Ok(Lock::Held)) {
            sleep(LOOK_EVERY).await;
        }
    };
    if timeout(ADOPT_LIMIT, free).await.is_err() {
        tracing::warn!(vm = %launch.vm, "a process of a failed start still holds the VM's lock");
    }
}

/// Looks for what runs of a VM, or how it ended.
///
/// Takes a few seconds at most. A QEMU that lives but does not answer counts as running: its [`Instance`] goes on trying.
pub async fn adopt(vm_dir: &Path, vm: VmId) -> Adoption {
    let give_up = Instant::now() + ADOPT_LIMIT;
    loop {
        let reason = match look(vm_dir, vm) {
            Ok(Look::Gone) => return gone(vm_dir, vm),
            Ok(Look::Lives(record, processes)) => {
                let link = instance::connect_any(vm_dir, &record).await;
                if link.is_none() {
                    tracing::warn!(%vm, pid = record.qemu_pid, "QEMU runs but does not answer on any of its QMP sockets");
                }
                return Adoption::Running(Instance::watch(vm_dir, record, processes, link));
            }
            Ok(Look::Waiting) => "its lock is held, but not by the processes in keeper.json".to_owned(),
            Err(e) => e.to_string(),
        };
        if Instant::now() >= give_up {
            return Adoption::Unclear { reason };
        }
        sleep(LOOK_EVERY).await;
    }
}

enum Look {
    /// Nobody has the lock.
    Gone,
    /// These processes have it.
    Lives(KeeperRecord, Processes),
    /// Somebody has it who has not said yet who he is, or who is about to be gone.
    Waiting,
}

fn look(vm_dir: &Path, vm: VmId) -> io::Result<Look> {
    match files::look_at_lock(vm_dir)? {
        Lock::Missing | Lock::Free => return Ok(Look::Gone),
        Lock::Held => {}
    }
    let boot = boot_id()?;
    let Some(record) = files::read_keeper(vm_dir, vm).filter(|r| r.boot_id == boot) else { return Ok(Look::Waiting) };
    let processes = Processes::find(&record)?;
    Ok(if processes.qemu_lives() { Look::Lives(record, processes) } else { Look::Waiting })
}

fn gone(vm_dir: &Path, vm: VmId) -> Adoption {
    if let Some(exit) = files::read_exit(vm_dir, vm) {
        return Adoption::Ended(exit);
    }
    match files::read_keeper(vm_dir, vm) {
        Some(record) => Adoption::Ended(files::keeper_killed(vm_dir, record.incarnation)),
        None => Adoption::Never,
    }
}

#[cfg(test)]
mod tests {
    use std::process::id;

    use uuid::Uuid;

    use super::*;

    fn vm() -> VmId {
        VmId::from_uuid(Uuid::from_u128(0xabc))
    }

    fn keeper_json(boot: Uuid, qemu_start: u64) -> String {
        format!(
            r#"{{"vm":"{}","incarnation":4,"class":"fast","lease_generation":1,"boot_id":"{boot}","keeper_pid":{},"keeper_start":1,"qemu_pid":{},"qemu_start":{qemu_start}}}"#,
            vm(),
            id(),
            id(),
        )
    }

    #[tokio::test]
    async fn a_directory_without_a_keepers_traces_never_ran() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(adopt(&dir.path().join("missing"), vm()).await, Adoption::Never));
        fs::write(dir.path().join("lock"), "").unwrap();
        fs::write(dir.path().join("keeper.json"), "{\"vm\":").unwrap();
        assert!(matches!(adopt(dir.path(), vm()).await, Adoption::Never));
    }

    #[tokio::test]
    async fn a_free_lock_means_ended_even_if_the_pids_live() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lock"), "").unwrap();
        // This test's own process, with the right start time.
        let start = keeper::start_of(id()).unwrap();
        fs::write(dir.path().join("keeper.json"), keeper_json(boot_id().unwrap(), start)).unwrap();
        let Adoption::Ended(exit) = adopt(dir.path(), vm()).await else { panic!("it does not run") };
        assert_eq!((exit.incarnation, exit.outcome), (Incarnation(4), ExitOutcome::KeeperKilled));
    }

    /// Neither another boot's pid, nor a pid that was given to another process, is taken for QEMU.
    #[tokio::test]
    async fn a_held_lock_without_its_processes_is_unclear() {
        for record in
            [keeper_json(Uuid::from_u128(1), keeper::start_of(id()).unwrap()), keeper_json(boot_id().unwrap(), 1)]
        {
            let dir = tempfile::tempdir().unwrap();
            let _held = files::take_lock(dir.path()).unwrap().unwrap();
            fs::write(dir.path().join("keeper.json"), record).unwrap();
            assert!(matches!(look(dir.path(), vm()), Ok(Look::Waiting)));
        }
    }
}
