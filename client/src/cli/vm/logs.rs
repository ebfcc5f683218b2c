//! `uncloud vm logs`.

use clap::Args;
use uncloud_proto::v1;

use super::super::{Context, Error};
use crate::{output, units};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Only the last so many bytes, such as 4096 or 64K.
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes)]
    tail: Option<u32>,
    /// Goes on with what is written from now on, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let request = v1::GetVmLogRequest {
        vm: a.vm,
        owner: context.owner.clone(),
        tail_bytes: a.tail.unwrap_or(0),
        follow: a.follow,
    };
    let mut log = context.client.get_vm_log(request).await?;
    while let Some(piece) = log.message().await? {
        // What the guest wrote, byte for byte: this is data, not a table.
        output::print_raw(&piece.data)?;
    }
    Ok(())
}
