//! What is done to the disks of a VM that is there: `uncloud vm resize-disk`.

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
