//! `uncloud vm snapshot`.

use clap::{Args, Subcommand};
use uncloud_proto::v1;

use super::{
    super::{Context, Error},
    Named,
};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Takes a snapshot of all disks at one moment, whether the VM runs or not.
    Create(One),
    /// Lists the snapshots of a VM.
    List(Named),
    /// Puts all disks back to a snapshot: what was written since is lost. A VM that runs is killed first and started again.
    Revert(One),
    /// Deletes a snapshot; the disks stay as they are.
    Delete(One),
}

/// Names a snapshot.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Name of the snapshot.
    name: String,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    let owner = context.owner.clone();
    let table = |vm: &Option<v1::Vm>| output::snapshots(&vm.clone().unwrap_or_default(), context.now());
    match command {
        Command::Create(One { vm, name: snapshot }) => {
            let answer = context.client.create_snapshot(v1::CreateSnapshotRequest { vm, owner, snapshot }).await?;
            context.print(&answer, |a| table(&a.vm))
        }
        Command::List(Named { vm }) => {
            let answer = context.client.get_vm(v1::GetVmRequest { vm, owner }).await?;
            context.print(&answer, |a| table(&a.vm))
        }
        Command::Revert(One { vm, name: snapshot }) => {
            let request = v1::RevertToSnapshotRequest { vm, owner, snapshot };
            let answer = context.client.revert_to_snapshot(request).await?;
            context.print(&answer, |a| table(&a.vm))
        }
        Command::Delete(One { vm, name: snapshot }) => {
            let answer = context.client.delete_snapshot(v1::DeleteSnapshotRequest { vm, owner, snapshot }).await?;
            context.print(&answer, |a| table(&a.vm))
        }
    }
}
