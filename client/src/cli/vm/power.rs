//! `uncloud vm start|stop|restart|pause|resume|delete`.

use clap::Args;
use uncloud_proto::v1;

use super::{
    super::{Context, Error},
    wait::{WaitArguments, wait_for},
};
use crate::{output, wait::Goal};

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Name, UUID or unique prefix of one.
    vm: String,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Kills it at once instead of asking the guest.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Restart {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Resets the machine at once instead of asking the guest. Nothing tells when the guest is up again.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// Name, UUID or unique prefix of one.
    vm: String,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// Name, UUID or unique prefix of one.
    vm: String,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Name, UUID or unique prefix of one.
    vm: String,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn start(context: &Context, a: Start) -> Result<(), Error> {
    let request = v1::StartVmRequest { vm: a.vm, owner: context.owner.clone() };
    let mut answer = context.client.start_vm(request).await?;
    answer.vm = waited(context, answer.vm, &Goal::Running, a.wait).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

pub(crate) async fn stop(context: &Context, a: Stop) -> Result<(), Error> {
    let request = v1::StopVmRequest { vm: a.vm, owner: context.owner.clone(), force: a.force };
    let mut answer = context.client.stop_vm(request).await?;
    answer.vm = waited(context, answer.vm, &Goal::Stopped, a.wait).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

pub(crate) async fn restart(context: &Context, a: Restart) -> Result<(), Error> {
    let request = v1::RestartVmRequest { vm: a.vm, owner: context.owner.clone(), force: a.force };
    let mut answer = context.client.restart_vm(request).await?;
    let before = answer.vm.as_ref().and_then(|vm| vm.status.as_ref()).and_then(|status| status.since);
    // A reset shows in no phase: the machine runs all the time.
    let goal = if a.force { Goal::Running } else { Goal::RunningSince(before) };
    answer.vm = waited(context, answer.vm, &goal, a.wait).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

pub(crate) async fn pause(context: &Context, a: Pause) -> Result<(), Error> {
    let request = v1::PauseVmRequest { vm: a.vm, owner: context.owner.clone() };
    let mut answer = context.client.pause_vm(request).await?;
    answer.vm = waited(context, answer.vm, &Goal::Paused, a.wait).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

pub(crate) async fn resume(context: &Context, a: Resume) -> Result<(), Error> {
    let request = v1::ResumeVmRequest { vm: a.vm, owner: context.owner.clone() };
    let mut answer = context.client.resume_vm(request).await?;
    answer.vm = waited(context, answer.vm, &Goal::Running, a.wait).await?;
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

pub(crate) async fn delete(context: &Context, a: Delete) -> Result<(), Error> {
    let request = v1::DeleteVmRequest { vm: a.vm, owner: context.owner.clone() };
    let answer = context.client.delete_vm(request).await?;
    let left = waited(context, answer.vm.clone(), &Goal::Gone, a.wait).await?;
    context.print(&answer, |a| {
        let name = a.vm.as_ref().map(|vm| format!("{} ({})", vm.name, vm.id)).unwrap_or_default();
        output::clean(&if left.is_none() { format!("{name} is gone.") } else { format!("{name} is being deleted.") })
    })
}

/// Waits, if that was asked for.
async fn waited(
    context: &Context,
    vm: Option<v1::Vm>,
    goal: &Goal,
    arguments: WaitArguments,
) -> Result<Option<v1::Vm>, Error> {
    match vm {
        Some(vm) if arguments.wait => wait_for(context, vm, goal, arguments).await,
        vm => Ok(vm),
    }
}
