//! `uncloud vm list` and `uncloud vm watch`.

use clap::{Args, ValueEnum};
use uncloud_proto::v1::{self, VmPhase, watch_vms_response::Event};

use super::super::{Context, Error};
use crate::{
    output::{self, Columns},
    units,
    watch::Step,
};

#[derive(Debug, Args)]
pub(crate) struct List {
    /// VMs of every owner.
    #[arg(short = 'A', long)]
    all_owners: bool,
    /// Only VMs on this host (name or UUID).
    #[arg(long, default_value = "", hide_default_value = true)]
    host: String,
    /// Only VMs in this phase.
    #[arg(long, value_enum)]
    phase: Option<Phase>,
    /// Only VMs with this label. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::parse_pair)]
    label: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Only this VM (name, UUID or unique prefix of one).
    #[arg(conflicts_with = "all_owners")]
    vm: Option<String>,
    /// VMs of every owner.
    #[arg(short = 'A', long)]
    all_owners: bool,
    /// Only changes after this revision.
    #[arg(long, default_value = "0", hide_default_value = true, value_name = "REVISION",
          value_parser = clap::value_parser!(i64).range(0..))]
    from_revision: i64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Phase {
    Pending,
    Scheduled,
    Preparing,
    Starting,
    Running,
    Stopping,
    Stopped,
    Failed,
    Unreachable,
    Deleting,
    Migrating,
    Paused,
}

impl From<Phase> for VmPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Pending => Self::Pending,
            Phase::Scheduled => Self::Scheduled,
            Phase::Preparing => Self::Preparing,
            Phase::Starting => Self::Starting,
            Phase::Running => Self::Running,
            Phase::Stopping => Self::Stopping,
            Phase::Stopped => Self::Stopped,
            Phase::Failed => Self::Failed,
            Phase::Unreachable => Self::Unreachable,
            Phase::Deleting => Self::Deleting,
            Phase::Migrating => Self::Migrating,
            Phase::Paused => Self::Paused,
        }
    }
}

/// As many as one page may have: few calls, and each well below the limit on a message's size.
const PAGE: u32 = 1000;

pub(crate) async fn list(context: &Context, a: List) -> Result<(), Error> {
    let columns = if a.all_owners { Columns::AllOwners } else { Columns::OneOwner };
    let request = v1::ListVmsRequest {
        owner: if a.all_owners { String::new() } else { context.owner.clone() },
        host: a.host,
        phase: a.phase.map_or(VmPhase::Unspecified, VmPhase::from).into(),
        labels: a.label.into_iter().collect(),
        page_size: PAGE,
        page_token: String::new(),
    };
    let answer = context.client.list_all_vms(request).await?;
    context.print(&answer, |a| {
        let mut vms = a.vms.clone();
        vms.sort_by(|x, y| (&x.owner, &x.name).cmp(&(&y.owner, &y.name)));
        output::vms(&vms, columns, context.now())
    })
}

pub(crate) async fn watch(context: &Context, a: Watch) -> Result<(), Error> {
    let request = v1::WatchVmsRequest {
        owner: if a.all_owners { String::new() } else { context.owner.clone() },
        vm: a.vm.unwrap_or_default(),
        from_revision: a.from_revision,
    };
    let mut watch = context.client.watch_vms(request);
    loop {
        match watch.next().await? {
            Step::Restarted => output::note("the watch began anew: all VMs follow again"),
            Step::Answer(answer) => context.print_step(&answer, |a| match &a.event {
                Some(Event::Vm(vm)) => Some(output::vm_line(vm)),
                Some(Event::Deleted(vm)) => Some(format!("{}  gone", output::clean(&vm.name))),
                Some(Event::Bookmark(_)) | None => None,
            })?,
        }
    }
}
