//! The files of disks that come to a VM that is there, and go.
//!
//! Whether a machine has them is QEMU's to know (`qemu/hotplug.rs`); here files are made and deleted.

use std::path::PathBuf;

use uncloud_proto::ids::VmId;

use super::{Error, Storage, disks, plan};
use crate::vm::desired::{Desired, Disk, DiskState, DisksExpected};

impl Storage {
    /// Makes the files of disks that are to come, unless they are there. Idempotent, and may be dropped.
    ///
    /// # Errors
    ///
    /// A pool cannot be used or is full, or qemu-img failed.
    pub async fn make_attached(&self, vm: VmId, desired: &Desired) -> Result<(), Error> {
        let Some(spec) = &desired.spec else { return Ok(()) };
        if !spec.disks.iter().any(|d| matches!(d.state, DiskState::Attaching | DiskState::Returning)) {
            return Ok(());
        }
        let plan = plan::disks(vm, desired, &self.pools)?;
        self.check_pools(plan.iter().map(|d| d.pool.clone()).collect()).await?;
        disks::check_expected(&plan).await?;
        for disk in plan.iter().filter(|d| d.expected == DisksExpected::New) {
            let _tool = self.tools.acquire().await.expect("it is never closed");
            disks::make(disk, self.user, &self.qemu_img).await?;
        }
        Ok(())
    }

    /// Deletes the files of disks that are to be deleted, and nothing else (P5). Whoever calls this knows that no machine has them.
    ///
    /// # Errors
    ///
    /// A pool cannot be used, so that nobody can say what is in it; or a file cannot be removed.
    pub async fn delete_detached(&self, vm: VmId, desired: &Desired) -> Result<(), Error> {
        let Some(spec) = &desired.spec else { return Ok(()) };
        let gone = spec.disks.iter().filter(|d| match d.state {
            DiskState::Deleting => true,
            DiskState::Attached
            | DiskState::Attaching
            | DiskState::Returning
            | DiskState::Detaching
            | DiskState::Detached => false,
        });
        let removals = gone.map(|disk| plan::removal(vm, disk, desired, &self.pools)).collect::<Result<Vec<_>, _>>()?;
        self.check_pools(removals.iter().map(|r| r.pool.clone()).collect()).await?;
        disks::remove_some(removals).await
    }

    /// The file of a disk of this VM that lies in a directory of this host, and all that it may ever have had.
    ///
    /// # Errors
    ///
    /// Its pool is not there.
    pub fn files_of(&self, vm: VmId, disk: &Disk, desired: &Desired) -> Result<Files, Error> {
        let all = plan::removal(vm, disk, desired, &self.pools)?.files;
        let file = all.last().cloned().unwrap_or_default();
        Ok(Files { file, all })
    }
}

/// Where a disk is.
#[derive(Debug)]
pub struct Files {
    /// Its file.
    pub file: PathBuf,
    /// That, and those of older generations and those that were not finished.
    pub all: Vec<PathBuf>,
}
