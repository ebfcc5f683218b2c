//! `uncloud vm migrate`.

use clap::Args;
use uncloud_proto::v1;

use super::{
    super::{Context, Error},
    wait::{WaitArguments, wait_for},
};
use crate::{units, wait::Goal};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Name or UUID of the host that it should go to. The cluster chooses, if not given.
    #[arg(conflicts_with = "cancel")]
    host: Option<String>,
    /// Gives up the migration that is under way: the VM stays where it is.
    #[arg(long, conflicts_with_all = ["wait", "limit"])]
    cancel: bool,
    /// The most that may be sent in a second, like 100M.
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    limit: Option<u64>,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let owner = context.owner.clone();
    if a.cancel {
        let request = v1::CancelMigrationRequest { vm: a.vm, owner };
        let answer = context.client.cancel_migration(request).await?;
        return context.print(&answer, |a| super::row(context, a.vm.as_ref()));
    }
    let request = v1::MigrateVmRequest {
        vm: a.vm,
        owner,
        host: a.host.unwrap_or_default(),
        bytes_per_second: a.limit.unwrap_or_default(),
    };
    let mut answer = context.client.migrate_vm(request).await?;
    let migration = answer.vm.as_ref().and_then(|vm| vm.status.as_ref()?.migration.as_ref()).map(|m| m.incarnation);
    if let (true, Some(incarnation), Some(vm)) = (a.wait.wait, migration, answer.vm.clone()) {
        answer.vm = wait_for(context, vm, &Goal::Migrated(incarnation), a.wait).await?;
    }
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}
