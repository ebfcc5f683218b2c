//! `uncloud vm clone`.

use clap::Args;
use uncloud_proto::v1;
use uuid::Uuid;

use super::{
    super::{Context, Error},
    create::again,
    wait::{WaitArguments, wait_for},
};
use crate::wait::Goal;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The VM to copy: name, UUID or unique prefix of one.
    vm: String,
    /// Name of the new VM.
    name: String,
    /// Copies the disks as they were in this snapshot, whether the VM runs or not. Without it the VM must be stopped.
    #[arg(long)]
    snapshot: Option<String>,
    /// Makes it safe to run this command again when its answer was lost: the same id gives the same VM.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let request_id = a.request_id.unwrap_or_else(|| Uuid::new_v4().to_string());
    let request = v1::CloneVmRequest {
        request_id: request_id.clone(),
        vm: a.vm,
        owner: context.owner.clone(),
        name: a.name,
        snapshot: a.snapshot.unwrap_or_default(),
    };
    let mut answer = context.client.clone_vm(request).await.map_err(|status| again(status, &request_id))?;
    if a.wait.wait
        && let Some(vm) = answer.vm.take()
    {
        answer.vm = wait_for(context, vm, &Goal::Running, a.wait).await?;
    }
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}
