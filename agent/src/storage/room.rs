//! How much room a pool has, and how much of it stays free for the disks that are there.
//!
//! A disk takes room as its guest writes. A guest whose pool is full is held still by QEMU until there is room again, so what is new
//! (an image, a disk) never takes the last of it.

use std::{io, os::fd::AsFd, path::Path};

/// So much stays free for the disks of VMs; of a small pool, a twentieth.
const RESERVE: u64 = 1 << 30;
/// With so much free, guests that were held still go on; of a small pool, with a hundredth. Less would be gone at once.
const GOES_ON: u64 = 64 << 20;

/// The room of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    free: u64,
    capacity: u64,
}

impl Space {
    /// Of the file system that this path lies on.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from_kernel(&rustix::fs::statvfs(path)?))
    }

    /// Of the file system that this file lies on.
    pub(super) fn of_file(file: impl AsFd) -> io::Result<Self> {
        Ok(Self::from_kernel(&rustix::fs::fstatvfs(file)?))
    }

    fn from_kernel(s: &rustix::fs::StatVfs) -> Self {
        // What only root may use is not there for a QEMU that is not root.
        Self { free: s.f_bavail.saturating_mul(s.f_frsize), capacity: s.f_blocks.saturating_mul(s.f_frsize) }
    }

    /// What stays free for the disks that are there.
    pub(super) fn reserve(self) -> u64 {
        RESERVE.min(self.capacity / 20)
    }

    /// What may be taken by something new.
    pub(super) fn beside_reserve(self) -> u64 {
        self.free.saturating_sub(self.reserve())
    }

    /// What is free, all in all.
    pub(super) fn free(self) -> u64 {
        self.free
    }

    /// Whether a guest that was held still may go on.
    pub(super) fn lets_go_on(self) -> bool {
        self.free >= GOES_ON.min(self.capacity / 100).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_leaves_room_for_the_disks() {
        const GIB: u64 = 1 << 30;
        let space = |free, capacity| Space { free, capacity };
        assert_eq!(space(3 * GIB, 100 * GIB).beside_reserve(), 2 * GIB);
        assert_eq!(space(GIB, 100 * GIB).beside_reserve(), 0);
        // Of a small pool a twentieth.
        assert_eq!(space(GIB, 10 * GIB).beside_reserve(), GIB / 2);
    }

    #[test]
    fn a_guest_goes_on_with_some_room_and_not_with_the_last_byte() {
        let space = |free, capacity| Space { free, capacity };
        assert!(!space(0, 0).lets_go_on() && !space(5, 1000).lets_go_on() && space(10, 1000).lets_go_on());
        assert!(!space(1 << 20, 1 << 40).lets_go_on() && space(64 << 20, 1 << 40).lets_go_on());
    }
}
