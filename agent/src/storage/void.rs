//! Removes files of a VM's disks that are not its disks any more, or never were (docs/fencing.md, M7): the old ones on the source of a
//! migration that has copied them, the half-made ones on the target of one that was given up.
//!
//! # Invariants
//!
//! * **P5** Only in pools that nobody but this host has, only in the VM's own directory, only files with the name of a disk, and only
//!   of a generation that the leader has called void.

use std::{fs, io, path::Path};

use tracing::info;
use uncloud_proto::ids::VmId;

use super::{
    Error, blocking,
    disks::io_error,
    images::sync_dir,
    plan::disks_dir,
    pools::{Kind, Pool},
};
use crate::vm::desired::VoidDisks;

/// Removes what is void of a VM. Idempotent.
///
/// # Errors
///
/// A file cannot be removed.
pub(super) async fn remove(vm: VmId, void: VoidDisks, pools: Vec<Pool>) -> Result<(), Error> {
    blocking(move || {
        let local = pools.iter().filter(|pool| match pool.kind {
            Kind::Local => true,
            Kind::Shared | Kind::Exported(_) => false,
        });
        local.into_iter().try_for_each(|pool| remove_in(&disks_dir(&pool.path, vm), void))
    })
    .await
}

fn remove_in(dir: &Path, void: VoidDisks) -> Result<(), Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error("look at", dir)(e)),
    };
    let mut gone = 0_usize;
    for entry in entries {
        let entry = entry.map_err(io_error("look at", dir))?;
        if entry.file_name().to_str().and_then(generation).is_some_and(|g| void.has(g)) {
            let path = entry.path();
            match fs::remove_file(&path) {
                Ok(()) => gone += 1,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("remove", &path)(e)),
            }
        }
    }
    if gone > 0 {
        info!(dir = %dir.display(), files = gone, "disks that are void removed");
        sync_dir(dir)?;
    }
    match fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        // Other generations, which are not void.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
        Err(e) => Err(io_error("remove", dir)(e)),
    }
}

/// The generation of a disk, of the variables of UEFI, or of a half-made one of either, by its file's name.
fn generation(name: &str) -> Option<u32> {
    let name = name.strip_prefix('.').and_then(|n| n.strip_suffix(".tmp")).unwrap_or(name);
    let stem = match name.strip_suffix(".qcow2") {
        Some(stem) => stem,
        None => name.strip_suffix(".fd").filter(|stem| stem.starts_with("uefi-vars."))?,
    };
    let (_, digits) = stem.rsplit_once('.')?;
    digits.parse().ok().filter(|g: &u32| g.to_string() == digits)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn only_void_generations_of_the_vms_own_disks_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::from_uuid(Uuid::from_u128(1));
        let pool = |name: &str, kind| Pool { name: name.into(), path: dir.path().join(name), kind };
        let pools = vec![pool("local", Kind::Local), pool("shared", Kind::Shared)];
        let names = [
            "root.1.qcow2",
            "root.2.qcow2",
            "data.3.qcow2",
            "root.4.qcow2",
            ".root.5.qcow2.tmp",
            "uefi-vars.2.fd",
            "root.02.qcow2",
            "root.2.qcow2.bak",
            "notes.2.txt",
            "2.qcow2",
        ];
        for pool in &pools {
            let disks = disks_dir(&pool.path, vm);
            fs::create_dir_all(&disks).unwrap();
            names.iter().for_each(|name| fs::write(disks.join(name), "data").unwrap());
        }
        let left = |pool: &Pool| {
            let mut left: Vec<String> = fs::read_dir(disks_dir(&pool.path, vm))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            left.sort();
            left
        };
        remove(vm, VoidDisks { copied_from: 2, current: 4 }, pools.clone()).await.unwrap();
        assert_eq!(
            left(&pools[0]),
            ["2.qcow2", "notes.2.txt", "root.02.qcow2", "root.1.qcow2", "root.2.qcow2.bak", "root.4.qcow2"]
        );
        assert_eq!(left(&pools[1]).len(), names.len(), "others may have a shared pool's files open");
        // Again, and where there is nothing.
        remove(vm, VoidDisks { copied_from: 2, current: 4 }, pools.clone()).await.unwrap();
        remove(VmId::from_uuid(Uuid::from_u128(2)), VoidDisks { copied_from: 0, current: 9 }, pools).await.unwrap();
    }

    #[test]
    fn the_vms_own_generation_is_never_void() {
        for copied_from in 0..6 {
            for current in 0..6 {
                assert!(!VoidDisks { copied_from, current }.has(current));
            }
        }
    }
}
