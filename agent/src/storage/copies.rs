//! Removes this host's copies of an image that was deleted.
//!
//! # Invariants
//!
//! * **P5** A copy that a disk in its pool is an overlay of is never removed, whoever asks: the disk would be lost with it. The leader
//!   asks only when no VM uses the image; this is the second line, for disks that no record speaks of. What cannot be looked at is
//!   taken for an overlay.
//! * Files are named one by one. There is no recursion.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use tracing::info;
use uncloud_proto::ids::ImageId;

use super::images::sync_dir;
use crate::vm::desired::Role;

/// No name of a backing file is longer (qcow2's own limit).
const MAX_NAME: u32 = 1023;

/// Removes the copies in one pool. Idempotent.
///
/// # Errors
///
/// Why one stays, in words.
pub(super) fn remove(pool: &Path, image: ImageId) -> Result<(), String> {
    let dir = pool.join("images").join(image.to_string());
    match fs::symlink_metadata(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("{}: {e}", dir.display())),
        Ok(_) => {}
    }
    if let Some(disk) = overlay_of(pool, image)? {
        return Err(format!("{} is needed by the disk {}, so it stays", dir.display(), disk.display()));
    }
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| format!("{path}: {e}")
    };
    for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
        let path = entry.map_err(failed(&dir))?.path();
        if is_ours(&path) {
            remove_file(&path).map_err(failed(&path))?;
        }
    }
    match fs::remove_dir(&dir) {
        Ok(()) => info!(dir = %dir.display(), "the copy of a deleted image is removed"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(&dir)(e)),
    }
    sync_dir(&pool.join("images")).map_err(|e| e.reason())
}

/// Another host that has the pool may be removing the same.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A file of an image, or one that a fetch has left.
fn is_ours(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return false };
    [Role::Disk, Role::Kernel, Role::Initrd].iter().any(|role| {
        let role = role.file_name();
        let left = name.strip_prefix('.').and_then(|n| n.strip_prefix(role)).is_some_and(|n| n.starts_with('.'));
        name == role || (left && (name.ends_with(".tmp") || name.ends_with(".lock")))
    })
}

/// A disk in the pool that is an overlay of the image.
fn overlay_of(pool: &Path, image: ImageId) -> Result<Option<PathBuf>, String> {
    let part = format!("images/{image}/");
    let disks = pool.join("disks");
    for vm in entries(&disks)? {
        if !fs::symlink_metadata(&vm).is_ok_and(|m| m.is_dir()) {
            continue;
        }
        for disk in entries(&vm)? {
            match backing_name(&disk) {
                Ok(Some(name)) if name.contains(&part) => return Ok(Some(disk)),
                Ok(_) => {}
                // Deleted meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("{} cannot be looked at ({e}), so the image stays", disk.display())),
            }
        }
    }
    Ok(None)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |e: io::Error| format!("{}: {e}", dir.display());
    match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(failed(e)),
        Ok(entries) => entries.map(|e| e.map(|e| e.path()).map_err(failed)).collect(),
    }
}

/// The name of the backing file in a qcow2 header. `None`: there is none, or it is no qcow2 file.
fn backing_name(path: &Path) -> io::Result<Option<String>> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let mut header = [0; 20];
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let offset = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(header[16..20].try_into().expect("four bytes"));
    if !header.starts_with(b"QFI\xfb") || offset == 0 {
        return Ok(None);
    }
    if length > MAX_NAME {
        return Err(io::Error::other("the name of its backing file is too long"));
    }
    let mut name = vec![0; length as usize];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut name)?;
    Ok(Some(String::from_utf8_lossy(&name).into_owned()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use uuid::Uuid;

    use super::*;

    fn image(n: u128) -> ImageId {
        ImageId::from_uuid(Uuid::from_u128(n))
    }

    struct Place(tempfile::TempDir);

    impl Place {
        /// A pool with images 1 and 2.
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for n in [1, 2] {
                let dir = place.dir(n);
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("disk"), vec![0; 4096]).unwrap();
                fs::write(dir.join(format!(".kernel.{}.tmp", Uuid::nil())), "half").unwrap();
                fs::write(dir.join(".disk.lock"), "").unwrap();
            }
            place
        }

        fn dir(&self, n: u128) -> PathBuf {
            self.0.path().join("images").join(image(n).to_string())
        }

        fn overlay(&self, n: u128) -> PathBuf {
            let vm = self.0.path().join("disks").join(Uuid::from_u128(7).to_string());
            fs::create_dir_all(&vm).unwrap();
            let disk = vm.join("root.0.qcow2");
            let base = format!("../../images/{}/disk", image(n));
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base])
                .arg(&disk)
                .status()
                .unwrap();
            assert!(made.success());
            disk
        }
    }

    #[test]
    fn copies_and_what_fetches_have_left_go_and_nothing_else_does() {
        let place = Place::new();
        fs::write(place.dir(1).join("precious"), "x").unwrap();
        assert!(remove(place.0.path(), image(1)).is_err());
        assert_eq!(fs::read_dir(place.dir(1)).unwrap().count(), 1, "what is not ours stays");
        fs::remove_file(place.dir(1).join("precious")).unwrap();
        remove(place.0.path(), image(1)).unwrap();
        remove(place.0.path(), image(1)).unwrap();
        assert!(!place.dir(1).exists() && place.dir(2).join("disk").exists());
    }

    /// P5.
    #[test]
    fn a_copy_that_a_disk_needs_stays_although_no_record_speaks_of_the_disk() {
        let place = Place::new();
        let disk = place.overlay(1);
        let why = remove(place.0.path(), image(1)).unwrap_err();
        assert!(why.contains(disk.to_str().unwrap()), "{why}");
        assert!(place.dir(1).join("disk").exists());
        remove(place.0.path(), image(2)).unwrap();
        // A disk that is damaged says nothing, so it counts.
        fs::write(&disk, [b"QFI\xfb".as_slice(), &[0xff; 16]].concat()).unwrap();
        assert!(remove(place.0.path(), image(1)).unwrap_err().contains("cannot be looked at"));
        fs::remove_file(&disk).unwrap();
        remove(place.0.path(), image(1)).unwrap();
    }
}
