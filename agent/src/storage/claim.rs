//! One fetch of a file at a time in a pool, whichever hosts have the pool: a lock beside the file.
//!
//! The lock only saves work. What is right does not depend on it: each host writes a temporary file of its own, and a file
//! appears under its name only when it is complete and checked. So where a file system has no locks, or takes one away from a host
//! that it has lost sight of, the same bytes come twice and nothing else happens.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{fs::FlockOperation, io::Errno};
use tracing::warn;

/// The right to bring a file. Given up when it is dropped, or its process ends.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    /// Absent where there are no locks.
    lock: Option<File>,
}

impl Claim {
    /// Tries to get it. `None`: somebody else has it.
    ///
    /// # Errors
    ///
    /// The lock's file cannot be made.
    pub(super) fn take(dir: &Path, name: &str) -> io::Result<Option<Self>> {
        let path = dir.join(format!(".{name}.lock"));
        loop {
            let file = File::options().write(true).create(true).truncate(false).open(&path)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(e) => {
                    warn!(path = %path.display(), "the pool has no locks, so hosts may fetch the same twice: {e}");
                    let _ = fs::remove_file(&path);
                    return Ok(Some(Self { path, lock: None }));
                }
            }
            // Who had it before may have removed the file between our opening and our locking it.
            let same = |m: &fs::Metadata, n: &fs::Metadata| (m.dev(), m.ino()) == (n.dev(), n.ino());
            match (file.metadata(), fs::symlink_metadata(&path)) {
                (Ok(ours), Ok(there)) if same(&ours, &there) => return Ok(Some(Self { path, lock: Some(file) })),
                _ => {}
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Removed while it is still held: see the loop above.
        if self.lock.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let first = Claim::take(dir.path(), "disk").unwrap().unwrap();
        assert!(Claim::take(dir.path(), "disk").unwrap().is_none());
        let other = Claim::take(dir.path(), "kernel").unwrap().unwrap();
        drop((first, other));
        let again = Claim::take(dir.path(), "disk").unwrap();
        assert!(again.is_some());
        drop(again);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
