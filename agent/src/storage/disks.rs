//! Makes and removes the disks of VMs.
//!
//! qemu-img runs as the user that QEMU runs as, in a directory that belongs to that user: it reads images that users
//! brought, so it gets no more power than the guest will have. The agent itself, which may be root, follows no
//! symbolic link there: it only links, renames and removes names.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{process::Command, time};
use tracing::{info, warn};

use super::{
    Error, blocking,
    images::{make_dirs, sync_dir},
    is_full,
    plan::{DiskPlan, Removal, VarsPlan},
    pools::User,
    room::Space,
};
use crate::vm::desired::DisksExpected;

/// Making an overlay takes milliseconds; a pool that takes longer than this hangs.
const TOOL_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// Checks that disks which have been made before are there (P5).
///
/// # Errors
///
/// Names the first that is not.
pub async fn check_expected(disks: &[DiskPlan]) -> Result<(), Error> {
    for disk in disks {
        let path = disk.path.clone();
        if !blocking(move || exists(&path)).await? && disk.expected == DisksExpected::Exist {
            return Err(Error::DiskMissing { disk: disk.name.clone(), pool: disk.pool.clone() });
        }
    }
    Ok(())
}

/// Whether a disk is there. What is there under its name and is no file is an error, not a reason to make one.
pub(super) fn exists(path: &Path) -> Result<bool, Error> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(true),
        Ok(_) => Err(io_error("use", path)(io::Error::other("it is not a regular file"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("look at", path)(e)),
    }
}

/// Makes a disk unless it is there.
///
/// # Errors
///
/// It could not be made, or should be there and is not.
pub async fn make(disk: &DiskPlan, user: Option<User>, tool: &Path) -> Result<(), Error> {
    check_expected(std::slice::from_ref(disk)).await?;
    let path = disk.path.clone();
    if blocking(move || exists(&path)).await? {
        return Ok(());
    }
    // Copies are made before (`copy.rs`). One that is gone again is not replaced by an empty disk (P5).
    if disk.origin.is_some() {
        return Err(Error::DiskMissing { disk: disk.name.clone(), pool: disk.pool.clone() });
    }
    let begin = disk.clone();
    blocking(move || {
        make_ready(&begin, user)?;
        check_room(&begin)
    })
    .await?;
    let made = run_tool(disk, user, tool).await;
    let end = disk.clone();
    match made {
        Ok(()) => {
            blocking(move || put_in_place(&end)).await?;
            info!(disk = disk.name, pool = disk.pool, "disk made");
            Ok(())
        }
        Err(error) => {
            let _ = blocking(move || fs::remove_file(end.temporary)).await;
            Err(error)
        }
    }
}

/// Makes the variable store of UEFI unless it is there: a copy of `template`, which belongs to the VM's user.
///
/// One that is missing is made also when the disks exist: what is lost then is the boot order, and every system that boots
/// by UEFI has a way to boot without it.
///
/// # Errors
///
/// The template is not there, or the copy could not be made.
pub async fn make_vars(vars: &VarsPlan, user: Option<User>, template: &Path) -> Result<(), Error> {
    let (vars, template) = (vars.clone(), template.to_owned());
    blocking(move || {
        if exists(&vars.path)? {
            return Ok(());
        }
        ready(&vars.path, &vars.temporary, user)?;
        let made = copy_vars(&vars, user, &template).and_then(|()| link(&vars.temporary, &vars.path));
        if made.is_err() {
            let _ = fs::remove_file(&vars.temporary);
        }
        made
    })
    .await
}

fn copy_vars(vars: &VarsPlan, user: Option<User>, template: &Path) -> Result<(), Error> {
    let mut from = File::open(template).map_err(|source| Error::NoFirmware { path: template.to_owned(), source })?;
    let writing = |source: io::Error| match is_full(&source) {
        true => Error::Full { pool: vars.pool.clone(), what: "the variables of UEFI".to_owned() },
        false => Error::Io { what: "write", path: vars.temporary.clone(), source },
    };
    let mut to = File::options().write(true).create_new(true).mode(0o600).open(&vars.temporary).map_err(writing)?;
    io::copy(&mut from, &mut to).map_err(writing)?;
    if let Some(user) = user {
        std::os::unix::fs::fchown(&to, Some(user.uid), Some(user.gid))
            .map_err(io_error("give away", &vars.temporary))?;
    }
    Ok(())
}

/// The disks that are there come first.
fn check_room(disk: &DiskPlan) -> Result<(), Error> {
    let dir = disk.path.parent().expect("a disk lies in its VM's directory");
    let space = Space::of(dir).map_err(io_error("look at", dir))?;
    if space.beside_reserve() > 0 {
        return Ok(());
    }
    Err(Error::NoRoom {
        pool: disk.pool.clone(),
        disk: disk.name.clone(),
        free_mib: space.free() >> 20,
        reserve_mib: space.reserve() >> 20,
    })
}

pub(super) fn make_ready(disk: &DiskPlan, user: Option<User>) -> Result<(), Error> {
    ready(&disk.path, &disk.temporary, user)
}

fn ready(path: &Path, temporary: &Path, user: Option<User>) -> Result<(), Error> {
    let dir = path.parent().expect("a disk lies in its VM's directory");
    make_dirs(dir)?;
    if let Some(user) = user {
        std::os::unix::fs::lchown(dir, Some(user.uid), Some(user.gid)).map_err(io_error("give away", dir))?;
    }
    match fs::remove_file(temporary) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_error("remove", temporary)(e)),
    }
}

pub(super) async fn run_tool(disk: &DiskPlan, user: Option<User>, tool: &Path) -> Result<(), Error> {
    let mut command = Command::new(tool);
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(base) = &disk.base {
        // The format is always said: a guest that writes a qcow2 header into a raw image must not gain by it.
        command.args(["-F", base.format.name(), "-b", &base.path]);
    }
    command.arg("--").arg(&disk.temporary);
    if disk.size_bytes > 0 {
        command.arg(disk.size_bytes.to_string());
    }
    run(command, disk, user).await
}

/// Runs qemu-img on a disk, as the user that QEMU runs as and for a bounded time.
pub(super) async fn run(command: Command, disk: &DiskPlan, user: Option<User>) -> Result<(), Error> {
    output_of(command, disk, user).await.map(drop)
}

/// Makes a command run as the user that QEMU runs as, with nothing of ours, and end when nobody waits for it any more.
pub(super) fn confine(command: &mut Command, user: Option<User>) {
    if let Some(user) = user {
        // Supplementary groups go, too: the standard library sees to it when it changes the user as root.
        command.uid(user.uid).gid(user.gid);
    }
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command.current_dir("/");
}

/// The same, and gives what it printed.
pub(super) async fn output_of(mut command: Command, disk: &DiskPlan, user: Option<User>) -> Result<Vec<u8>, Error> {
    confine(&mut command, user);
    let failed = |words: String| Error::Tool { disk: disk.name.clone(), words };
    let output = match time::timeout(TOOL_TIMEOUT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(e)) => {
            let tool = command.as_std().get_program().to_string_lossy().into_owned();
            return Err(failed(format!("{tool} cannot be run: {e}")));
        }
        Err(_) => return Err(failed(format!("it took longer than {} s", TOOL_TIMEOUT.as_secs()))),
    };
    ended_well(disk, output.status, &output.stderr)?;
    Ok(output.stdout)
}

/// What the end of qemu-img means.
pub(super) fn ended_well(disk: &DiskPlan, status: ExitStatus, stderr: &[u8]) -> Result<(), Error> {
    if status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(stderr).trim().chars().take(500).collect();
    if words.contains("No space left on device") || words.contains("Disk quota exceeded") {
        return Err(Error::Full { pool: disk.pool.clone(), what: format!("disk {}", disk.name) });
    }
    let words = if words.is_empty() { status.to_string() } else { words };
    Err(Error::Tool { disk: disk.name.clone(), words })
}

fn put_in_place(disk: &DiskPlan) -> Result<(), Error> {
    link(&disk.temporary, &disk.path)
}

fn link(temporary: &Path, path: &Path) -> Result<(), Error> {
    let dir = path.parent().expect("a disk lies in its VM's directory");
    let options = |path: &Path| File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    options(temporary).and_then(|f| f.sync_all()).map_err(io_error("sync", temporary))?;
    // A link, not a rename: it never replaces a disk that is there (P5).
    match fs::hard_link(temporary, path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => warn!(path = %path.display(), "the disk is there"),
        Err(e) => return Err(io_error("link", path)(e)),
    }
    fs::remove_file(temporary).map_err(io_error("remove", temporary))?;
    sync_dir(dir)?;
    sync_dir(dir.parent().expect("it lies below the pool"))
}

/// Removes exactly the files that are named, and directories that are empty then.
///
/// # Errors
///
/// A file that is there could not be removed.
pub async fn remove(removals: Vec<Removal>) -> Result<(), Error> {
    blocking(move || removals.iter().try_for_each(remove_one)).await
}

/// The same of a VM that stays: other disks of it may lie in the directory.
///
/// # Errors
///
/// A file that is there could not be removed.
pub async fn remove_some(removals: Vec<Removal>) -> Result<(), Error> {
    blocking(move || {
        for removal in &removals {
            remove_files(removal)?;
            // Not empty, most of the time.
            let _ = fs::remove_dir(&removal.dir);
        }
        Ok(())
    })
    .await
}

fn absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn remove_files(removal: &Removal) -> Result<(), Error> {
    let mut gone: Vec<&PathBuf> = Vec::new();
    for file in &removal.files {
        match fs::remove_file(file) {
            Ok(()) => gone.push(file),
            Err(e) if absent(&e) => {}
            Err(e) => return Err(io_error("remove", file)(e)),
        }
    }
    if !gone.is_empty() {
        info!(pool = removal.pool, files = gone.len(), "disks deleted");
        sync_dir(&removal.dir)?;
    }
    Ok(())
}

fn remove_one(removal: &Removal) -> Result<(), Error> {
    remove_files(removal)?;
    match fs::remove_dir(&removal.dir) {
        Ok(()) => Ok(()),
        Err(e) if absent(&e) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
            warn!(dir = %removal.dir.display(), "not empty, so it stays: there are files that are no disks of the VM");
            Ok(())
        }
        Err(e) => Err(io_error("remove", &removal.dir)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P5: even if it appeared while another was being made.
    #[test]
    fn a_disk_that_is_there_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, temporary) = (dir.path().join("vm/root.0.qcow2"), dir.path().join("vm/.root.0.qcow2.tmp"));
        fs::create_dir(dir.path().join("vm")).unwrap();
        fs::write(&path, "data").unwrap();
        fs::write(&temporary, "empty").unwrap();
        let (name, pool) = ("root".to_owned(), "p".to_owned());
        let disk = DiskPlan {
            name,
            pool,
            path,
            temporary,
            base: None,
            size_bytes: 512,
            expected: DisksExpected::New,
            origin: None,
        };
        put_in_place(&disk).unwrap();
        assert_eq!(fs::read_to_string(&disk.path).unwrap(), "data");
        assert!(!disk.temporary.exists());
    }
}
