//! What is done to the disks of a VM that is there: `uncloud vm resize-disk`, `attach-disk` and `detach-disk`.

use clap::Args;
use uncloud_proto::v1;

use super::super::{Context, Error};
use crate::units;

#[derive(Debug, Args)]
#[command(
    after_help = "A guest that runs sees the new size a moment later; partitions and file systems on the disk are the \
                        guest's to grow. A disk never becomes smaller."
)]
pub(crate) struct Resize {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Name of the disk, such as disk0 (`uncloud vm show` lists them).
    disk: String,
    /// Its new size, such as 20G.
    #[arg(value_parser = units::parse_size)]
    size: u64,
}

pub(crate) async fn resize(context: &Context, a: Resize) -> Result<(), Error> {
    let request = v1::ResizeDiskRequest { vm: a.vm, owner: context.owner.clone(), disk: a.disk, size_bytes: a.size };
    let answer = context.client.resize_disk(request).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

#[derive(Debug, Args)]
#[command(
    after_help = "A VM that runs takes disks on the bus scsi, which is the default here; the guest sees the disk a moment later. \
                  name= of a disk that was detached attaches that one again, and needs nothing else."
)]
pub(crate) struct Attach {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// The disk: any of size=SIZE, pool=POOL, name=NAME, bus=virtio|scsi|sata, cache=none|writethrough|writeback, separated by
    /// commas.
    #[arg(value_name = "KEY=VALUE,…", value_parser = parse_attached)]
    disk: v1::Disk,
}

fn parse_attached(text: &str) -> Result<v1::Disk, String> {
    let disk = super::create::parse_disk_words(text)?;
    if !disk.image.is_empty() {
        return Err("a disk that is attached begins empty; leave image= out".to_owned());
    }
    if disk.size_bytes == 0 && disk.name.is_empty() {
        return Err("needs size=SIZE for a new disk, or name=NAME of one that was detached".to_owned());
    }
    Ok(disk)
}

pub(crate) async fn attach(context: &Context, a: Attach) -> Result<(), Error> {
    let request = v1::AttachDiskRequest { vm: a.vm, owner: context.owner.clone(), disk: Some(a.disk) };
    let answer = context.client.attach_disk(request).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

#[derive(Debug, Args)]
#[command(
    after_help = "For a guest that runs the disk is pulled out at once: unmount its file systems first. The disk is kept, and \
                  `attach-disk VM name=DISK` attaches it again."
)]
pub(crate) struct Detach {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Name of the disk, such as disk1 (`uncloud vm show` lists them).
    disk: String,
    /// Deletes the disk, with all that is on it; also one that was detached.
    #[arg(long)]
    delete: bool,
}

pub(crate) async fn detach(context: &Context, a: Detach) -> Result<(), Error> {
    let request = v1::DetachDiskRequest { vm: a.vm, owner: context.owner.clone(), disk: a.disk, delete: a.delete };
    let answer = context.client.detach_disk(request).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}
