//! `uncloud host`.

use clap::{Args, Subcommand};
use uncloud_proto::v1::{self, watch_hosts_response::Event};

use super::{Context, Error, drain};
use crate::{output, watch::Step};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists all hosts.
    List,
    /// Shows one host and its VMs.
    Show(Named),
    /// Lets a host take no new VMs; those it has stay. Ends a drain.
    Cordon(Cordon),
    /// Empties a host: its VMs migrate to other hosts, and it takes no new ones.
    ///
    /// Says how that goes until nothing executes there any more, and fails if something is left that cannot leave. The drain
    /// goes on without this command; `uncordon` ends it.
    Drain(drain::Arguments),
    /// Lets a host take VMs again. Ends a drain.
    Uncordon(Named),
    /// Forgets a host that is down and has no VMs.
    Remove(Named),
    /// Says where VMs would go if these hosts died now, and which would not fit.
    WhatIf(WhatIf),
    /// Shows all hosts, then every change, until Ctrl-C.
    Watch(Watch),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name, UUID or unique prefix of one.
    host: String,
}

#[derive(Debug, Args)]
pub(crate) struct Cordon {
    /// Name, UUID or unique prefix of one.
    host: String,
    /// Why, for those who wonder.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct WhatIf {
    /// The hosts that die at once: name, UUID or unique prefix of each.
    #[arg(required = true, value_name = "HOST")]
    hosts: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Only changes after this revision.
    #[arg(long, default_value = "0", hide_default_value = true, value_name = "REVISION",
          value_parser = clap::value_parser!(i64).range(0..))]
    from_revision: i64,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    let client = &context.client;
    let row = |host: &Option<v1::Host>| output::hosts(host.as_slice(), context.now());
    match command {
        Command::List => {
            let answer = client.list_hosts(v1::ListHostsRequest {}).await?;
            context.print(&answer, |a| output::hosts(&a.hosts, context.now()))
        }
        Command::Show(Named { host }) => {
            let answer = client.get_host(v1::GetHostRequest { host }).await?;
            context.print(&answer, |a| output::show_host(a, context.now()))
        }
        Command::Cordon(Cordon { host, reason }) => {
            let answer = client.cordon_host(v1::CordonHostRequest { host, reason }).await?;
            context.print(&answer, |a| row(&a.host))
        }
        Command::Drain(arguments) => drain::run(context, arguments).await,
        Command::Uncordon(Named { host }) => {
            let answer = client.uncordon_host(v1::UncordonHostRequest { host }).await?;
            context.print(&answer, |a| row(&a.host))
        }
        Command::Remove(Named { host }) => {
            let answer = client.remove_host(v1::RemoveHostRequest { host: host.clone() }).await?;
            context.print(&answer, |_| format!("{} is forgotten.", output::clean(&host)))
        }
        Command::WhatIf(WhatIf { hosts }) => {
            let answer = client.simulate_host_failure(v1::SimulateHostFailureRequest { hosts }).await?;
            context.print(&answer, output::what_if)
        }
        Command::Watch(Watch { from_revision }) => watch(context, from_revision).await,
    }
}

async fn watch(context: &Context, from_revision: i64) -> Result<(), Error> {
    let mut watch = context.client.watch_hosts(v1::WatchHostsRequest { from_revision });
    loop {
        match watch.next().await? {
            Step::Restarted => output::note("the watch began anew: all hosts follow again"),
            Step::Answer(answer) => context.print_step(&answer, |a| match &a.event {
                Some(Event::Host(host)) => Some(output::host_line(host)),
                Some(Event::DeletedId(id)) => Some(format!("{}  gone", output::clean(id))),
                Some(Event::Bookmark(_)) | None => None,
            })?,
        }
    }
}
