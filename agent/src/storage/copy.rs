//! Makes the disk of a clone: a copy of another VM's disk in the same pool, as it is or as it was in a snapshot. By qemu-img.
//!
//! The copy is an overlay of the same image, if the disk is one of an image; it has no snapshots.
//!
//! # Safety argument (P5)
//!
//! * **CL1** What is copied does not change meanwhile. The clusters of a snapshot are never written again while it is there, so its disk
//!   may be in use. A disk is copied as it is only if nobody has it open for writing: qemu-img holds QEMU's image lock, and neither
//!   gets it from the other. What serves a disk over the network has it open, so there is no such lock; but each write that it has answered is in
//!   the file, and its VM is stopped. That snapshot and disk are left alone until all is copied is up to the leader
//!   (controller/src/state/clone.rs).
//! * **CL2** A disk has its name only when it is complete: the copy is written to a file that was opened before, and that very file is
//!   given the name. In a shared pool another host may have taken this file away and begun one of its own under the same temporary
//!   name, because the lease ran out here; then nothing is left that could be given a name.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    time::Duration,
};

use rustix::fs::{AtFlags, CWD, linkat};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time,
};
use tracing::{info, warn};

use super::{
    Error, blocking,
    disks::{confine, ended_well, exists, io_error, make_ready, run_tool},
    grow::virtual_size,
    images::sync_dir,
    plan::{DiskPlan, Origin},
    room::Space,
    snapshots::Tool,
};

/// How often the room in the pool is looked at: others write into it, too.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// So much of what qemu-img complains about is kept, in bytes.
const MAX_WORDS: usize = 4096;

/// Makes a disk a copy of another, unless it is there. Idempotent, and may be dropped: then qemu-img ends, and what it has written is
/// taken away by the next try, or with the VM. `said` hears how much is copied, in percent.
///
/// # Errors
///
/// The other disk or its snapshot is not there, or is in use; the pool has too little room; qemu-img failed.
pub(super) async fn copy(
    disk: &DiskPlan,
    origin: &Origin,
    tool: Tool<'_>,
    said: &(dyn Fn(u8) + Sync),
) -> Result<(), Error> {
    let (plan, from, user) = (disk.clone(), origin.clone(), tool.user);
    let Some(size_bytes) = blocking(move || begin(&plan, &from, user)).await? else { return Ok(()) };
    said(0);
    let target = DiskPlan { size_bytes, ..disk.clone() };
    let copied = fill(&target, origin, tool, said).await;
    if copied.is_err() {
        let temporary = target.temporary.clone();
        let _ = blocking(move || fs::remove_file(temporary)).await;
    }
    copied?;
    info!(disk = disk.name, pool = disk.pool, from = %origin.vm, snapshot = ?origin.snapshot, "disk copied");
    Ok(())
}

/// Looks whether it can be done. Gives the virtual size that the copy will have; `None`: it is there.
fn begin(disk: &DiskPlan, origin: &Origin, user: Option<super::pools::User>) -> Result<Option<u64>, Error> {
    if exists(&disk.path)? {
        return Ok(None);
    }
    if !exists(&origin.path)? {
        return Err(Error::OriginMissing { disk: disk.name.clone(), vm: origin.vm, pool: disk.pool.clone() });
    }
    make_ready(disk, user)?;
    let failed = || io_error("look at", &origin.path);
    // With all its snapshots, so it is never too little.
    let needed = fs::symlink_metadata(&origin.path).map_err(failed())?.blocks().saturating_mul(512);
    let space = Space::of(&origin.path).map_err(failed())?;
    if space.beside_reserve() <= needed {
        return Err(Error::NoRoomToCopy {
            pool: disk.pool.clone(),
            disk: disk.name.clone(),
            needed_mib: needed.div_ceil(1 << 20),
            free_mib: space.free() >> 20,
            reserve_mib: space.reserve() >> 20,
        });
    }
    // A disk never becomes smaller.
    Ok(Some(disk.size_bytes.max(virtual_size(&disk.name, &origin.path)?)))
}

async fn fill(disk: &DiskPlan, origin: &Origin, tool: Tool<'_>, said: &(dyn Fn(u8) + Sync)) -> Result<(), Error> {
    run_tool(disk, tool.user, tool.path).await?;
    let temporary = disk.temporary.clone();
    let file = blocking(move || {
        let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&temporary);
        opened.map_err(io_error("open", &temporary))
    })
    .await?;
    patiently(convert(disk, origin, tool), disk, tool, said).await?;
    let mut check = Command::new(tool.path);
    check.args(["check", "-q", "-f", "qcow2", "--"]).arg(&disk.temporary);
    patiently(check, disk, tool, &|_| ()).await?;
    let disk = disk.clone();
    blocking(move || put_in_place(&file, &disk)).await
}

/// Writes what the other disk has, and its image does not, to the new disk.
fn convert(disk: &DiskPlan, origin: &Origin, tool: Tool<'_>) -> Command {
    let mut command = Command::new(tool.path);
    command.args(["convert", "-p", "-n", "-f", "qcow2", "-O", "qcow2"]);
    // CL1
    if origin.snapshot.is_some() || origin.served {
        command.arg("-U");
    }
    if let Some(snapshot) = origin.snapshot {
        command.args(["-l", &format!("snapshot.name={snapshot}")]);
    }
    match &disk.base {
        Some(base) => {
            let dir = disk.path.parent().expect("a disk lies in its VM's directory");
            command.args(["-F", base.format.name(), "-B"]).arg(dir.join(&base.path))
        }
        None => command.arg("--target-is-zero"),
    };
    command.arg("--").arg(&origin.path).arg(&disk.temporary);
    command
}

/// Runs qemu-img for as long as it takes, and gives up when the room that is left is for the disks that are there.
async fn patiently(
    mut command: Command,
    disk: &DiskPlan,
    tool: Tool<'_>,
    said: &(dyn Fn(u8) + Sync),
) -> Result<(), Error> {
    confine(&mut command, tool.user);
    let failed = |e: io::Error| Error::Tool { disk: disk.name.clone(), words: e.to_string() };
    let mut child = command.spawn().map_err(failed)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let end = async { tokio::join!(follow(stdout, said), words(stderr), child.wait()) };
    tokio::pin!(end);
    loop {
        tokio::select! {
            ((), words, status) = &mut end => return ended_well(disk, status.map_err(failed)?, &words),
            () = time::sleep(LOOK_EVERY) => {
                let dir = disk.path.parent().expect("a disk lies in its VM's directory").to_owned();
                let space = blocking(move || Space::of(&dir)).await;
                if space.is_ok_and(|space| space.beside_reserve() == 0) {
                    return Err(Error::Full { pool: disk.pool.clone(), what: format!("the copy of disk {}", disk.name) });
                }
            }
        }
    }
}

/// Reads how far qemu-img is: `    (12.50/100%)` again and again.
async fn follow(output: Option<impl AsyncRead + Unpin>, said: &(dyn Fn(u8) + Sync)) {
    let Some(mut output) = output else { return };
    let mut bytes = [0; 256];
    while let Ok(n @ 1..) = output.read(&mut bytes).await {
        if let Some(percent) = last_percent(&bytes[..n]) {
            said(percent);
        }
    }
}

/// The newest number that is complete. One that is cut in two by the reads is left out; the next comes soon.
fn last_percent(bytes: &[u8]) -> Option<u8> {
    let text = String::from_utf8_lossy(bytes);
    let (before, _) = text.rsplit_once("/100%)")?;
    let (_, number) = before.rsplit_once('(')?;
    number.split('.').next()?.parse().ok().filter(|percent| *percent <= 100)
}

/// The beginning of what it complains about. All of it is read, so that it does not wait for us.
async fn words(output: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut output) = output else { return kept };
    let mut bytes = [0; 1024];
    while let Ok(n @ 1..) = output.read(&mut bytes).await {
        kept.extend(bytes[..n].iter().take(MAX_WORDS - kept.len()));
    }
    kept
}

/// CL2
fn put_in_place(file: &File, disk: &DiskPlan) -> Result<(), Error> {
    file.sync_all().map_err(io_error("sync", &disk.temporary))?;
    let this_very = format!("/proc/self/fd/{}", file.as_raw_fd());
    // A link, not a rename: it never replaces a disk that is there (P5).
    match linkat(CWD, this_very, CWD, &disk.path, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => warn!(path = %disk.path.display(), "the disk is there"),
        Err(e) => return Err(io_error("link", &disk.path)(e)),
    }
    // Another host's may go with it: that one finds this disk.
    match fs::remove_file(&disk.temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &disk.temporary)(e)),
        Ok(()) | Err(_) => {}
    }
    let dir = disk.path.parent().expect("a disk lies in its VM's directory");
    sync_dir(dir)?;
    sync_dir(dir.parent().unwrap_or_else(|| Path::new("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is_can_be_read() {
        for (text, percent) in [
            ("    (0.00/100%)\r", Some(0)),
            ("    (12.50/100%)\r    (99.99/100%)\r    (1", Some(99)),
            (".12/100%)\r", None),
            ("0/100%)", None),
            ("(999/100%)", None),
            ("", None),
        ] {
            assert_eq!(last_percent(text.as_bytes()), percent, "{text:?}");
        }
    }

    /// CL2
    #[test]
    fn only_the_file_that_was_written_gets_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let vm = dir.path().join("vm");
        fs::create_dir(&vm).unwrap();
        let (path, temporary) = (vm.join("root.0.qcow2"), vm.join(".root.0.qcow2.tmp"));
        let (name, pool) = ("root".to_owned(), "p".to_owned());
        let disk = DiskPlan {
            name,
            pool,
            path,
            temporary,
            base: None,
            size_bytes: 512,
            expected: crate::vm::desired::DisksExpected::New,
            origin: None,
        };
        let written = |text: &str| {
            fs::write(&disk.temporary, text).unwrap();
            File::open(&disk.temporary).unwrap()
        };
        // Another host has taken it away and begun its own.
        let ours = written("complete");
        fs::remove_file(&disk.temporary).unwrap();
        let theirs = written("half");
        assert!(put_in_place(&ours, &disk).is_err());
        assert!(!disk.path.exists() && disk.temporary.exists());
        fs::write(&disk.temporary, "complete, too").unwrap();
        put_in_place(&theirs, &disk).unwrap();
        assert_eq!(fs::read_to_string(&disk.path).unwrap(), "complete, too");
        // A disk that is there stays.
        let late = written("late");
        put_in_place(&late, &disk).unwrap();
        assert_eq!(fs::read_to_string(&disk.path).unwrap(), "complete, too");
        assert!(!disk.temporary.exists());
    }
}
