//! Makes a disk that nobody has open as large as it should be.
//!
//! A disk never becomes smaller: one that is larger than it should be stays as it is (P5). QEMU's image lock refuses what somebody
//! has open.

use std::{fs::File, io::Read as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use tokio::process::Command;
use tracing::info;

use super::{
    Error, blocking,
    disks::{io_error, run},
    format::{self, HEADER_BYTES},
    plan::DiskPlan,
    pools::User,
};

/// Grows the disk, if it is smaller than it should be.
///
/// # Errors
///
/// It cannot be read, is no qcow2 file, or qemu-img failed.
pub(super) async fn grow(disk: &DiskPlan, user: Option<User>, tool: &Path) -> Result<(), Error> {
    let looked = disk.clone();
    let now = blocking(move || virtual_size(&looked)).await?;
    if now >= disk.size_bytes {
        return Ok(());
    }
    let mut command = Command::new(tool);
    command.args(["resize", "-q", "-f", "qcow2", "--"]).arg(&disk.path).arg(disk.size_bytes.to_string());
    run(command, disk, user).await?;
    info!(disk = disk.name, pool = disk.pool, from = now, to = disk.size_bytes, "the disk has grown");
    Ok(())
}

/// The size that a guest would see, by the header of the file.
fn virtual_size(disk: &DiskPlan) -> Result<u64, Error> {
    let failed = || io_error("read", &disk.path);
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&disk.path).map_err(failed())?;
    let mut header = Vec::with_capacity(HEADER_BYTES);
    file.take(HEADER_BYTES as u64).read_to_end(&mut header).map_err(failed())?;
    format::qcow2_size(&header).ok_or_else(|| Error::Tool {
        disk: disk.name.clone(),
        words: format!("{} is no qcow2 file", disk.path.display()),
    })
}
