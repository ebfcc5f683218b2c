//! `uncloud vm`.

mod clone;
mod cloud_init;
mod console;
mod create;
mod disk;
mod escape;
mod list;
mod logs;
mod migrate;
mod power;
mod screen;
mod snapshot;
mod update;
mod wait;

use clap::{Args, Subcommand};
use uncloud_proto::v1;

pub(crate) use self::{
    update::note_pending,
    wait::{WaitArguments, wait_for},
};
use super::{Context, Error};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates a VM and starts it.
    Create(Box<create::Arguments>),
    /// Lists VMs.
    List(list::List),
    /// Shows one VM.
    Show(Named),
    /// Starts a VM.
    Start(power::Start),
    /// Stops a VM: asks the guest, and kills it when its grace period is over.
    Stop(power::Stop),
    /// Restarts a running VM.
    Restart(power::Restart),
    /// Lets a running guest stand still: it keeps its memory and does not execute.
    Pause(power::Pause),
    /// Lets a paused guest go on.
    Resume(power::Resume),
    /// Changes what a VM is made of; some of it from its next start on.
    Update(Box<update::Arguments>),
    /// Moves a running VM to another host while it runs, or gives that up.
    Migrate(migrate::Arguments),
    /// Makes a disk of a VM larger, running or not.
    ResizeDisk(disk::Resize),
    /// Gives a VM one more disk, running or not.
    AttachDisk(disk::Attach),
    /// Takes a disk from a VM, running or not.
    DetachDisk(disk::Detach),
    /// Snapshots of a VM's disks.
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Creates a VM like another one, with copies of its disks, and starts it.
    Clone(clone::Arguments),
    /// Deletes a VM and its disks.
    Delete(power::Delete),
    /// Connects to the serial console; Ctrl-] then `.` or `q` leaves it.
    Console(console::Arguments),
    /// Takes a picture of what the guest's screen shows.
    Screenshot(screen::Screenshot),
    /// Opens a local port for VNC viewers: the guest's screen, keyboard and mouse.
    Vnc(screen::Listen),
    /// Prints the serial log.
    Logs(logs::Arguments),
    /// Says why a VM is where it is, or why it is nowhere.
    Explain(Named),
    /// Shows VMs, then every change, until Ctrl-C.
    Watch(list::Watch),
}

/// Names one VM.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name, UUID or unique prefix of one.
    vm: String,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    let owner = context.owner.clone();
    match command {
        Command::Create(arguments) => create::run(context, *arguments).await,
        Command::List(arguments) => list::list(context, arguments).await,
        Command::Show(Named { vm }) => {
            let answer = context.client.get_vm(v1::GetVmRequest { vm, owner }).await?;
            context.print(&answer, |a| output::show_vm(&a.vm.clone().unwrap_or_default(), context.now()))
        }
        Command::Start(arguments) => power::start(context, arguments).await,
        Command::Stop(arguments) => power::stop(context, arguments).await,
        Command::Restart(arguments) => power::restart(context, arguments).await,
        Command::Pause(arguments) => power::pause(context, arguments).await,
        Command::Resume(arguments) => power::resume(context, arguments).await,
        Command::Migrate(arguments) => migrate::run(context, arguments).await,
        Command::ResizeDisk(arguments) => disk::resize(context, arguments).await,
        Command::AttachDisk(arguments) => disk::attach(context, arguments).await,
        Command::DetachDisk(arguments) => disk::detach(context, arguments).await,
        Command::Snapshot(command) => snapshot::run(context, command).await,
        Command::Clone(arguments) => clone::run(context, arguments).await,
        Command::Delete(arguments) => power::delete(context, arguments).await,
        Command::Console(arguments) => console::run(context, arguments).await,
        Command::Update(arguments) => update::run(context, *arguments).await,
        Command::Screenshot(arguments) => screen::screenshot(context, arguments).await,
        Command::Vnc(arguments) => screen::vnc(context, arguments).await,
        Command::Logs(arguments) => logs::run(context, arguments).await,
        Command::Explain(Named { vm }) => {
            let answer = context.client.explain_vm(v1::ExplainVmRequest { vm, owner }).await?;
            context.print(&answer, output::explain)
        }
        Command::Watch(arguments) => list::watch(context, arguments).await,
    }
}

/// The table of one VM.
fn row(context: &Context, vm: Option<&v1::Vm>) -> String {
    let vms: Vec<v1::Vm> = vm.cloned().into_iter().collect();
    output::vms(&vms, output::Columns::OneOwner, context.now())
}
