//! `uncloud failover`.

use clap::Subcommand;
use uncloud_proto::v1;

use super::{Context, Error};
use crate::{output, units};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lets failover go on although fewer than half of the hosts are heard.
    ///
    /// When the leader hears from fewer than half of the hosts, it takes the fault to be on its own side and declares
    /// no more hosts dead. This command says that the silent hosts are really dead. Be sure of it: their VMs are
    /// started elsewhere once their leases have run out.
    Proceed,
    /// Switches failover off for a while, for work on the network.
    ///
    /// Meanwhile no host is declared dead, and no VM is killed because its host has no contact: every host that is heard
    /// now holds a lease until the end. A host that dies meanwhile is waited for until then. Wait a few seconds before
    /// you cut anything off, so that every host has heard of it (`uncloud host list` shows the last heartbeats).
    Off {
        /// For how long, up to 1h. Then failover goes on by itself.
        #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = units::parse_seconds)]
        for_: u32,
        /// Why, for whoever looks at `uncloud status`.
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
    /// Switches failover on again.
    ///
    /// Leases that were granted while it was off are waited out before a host that falls silent is declared dead.
    On,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    match command {
        Command::Proceed => {
            let answer = context.client.release_brake(v1::ReleaseBrakeRequest {}).await?;
            context.print(&answer, |a| {
                let plural = if a.silent_hosts == 1 { "" } else { "s" };
                format!("The brake is released: {} silent host{plural} may be declared dead.", a.silent_hosts)
            })
        }
        Command::Off { for_, reason } => {
            set(context, v1::FailoverMode::Off, for_, reason, |time| {
                format!("Failover is off until {time}. Whatever falls silent until then is left alone.")
            })
            .await
        }
        Command::On => {
            set(context, v1::FailoverMode::On, 0, String::new(), |time| {
                format!("Failover is on. A host that falls silent now is not declared dead before {time}, plus a lease as usual.")
            })
            .await
        }
    }
}

async fn set(
    context: &Context,
    mode: v1::FailoverMode,
    for_seconds: u32,
    reason: String,
    say: impl Fn(&str) -> String,
) -> Result<(), Error> {
    let request = v1::SetFailoverRequest { mode: mode.into(), for_seconds, reason };
    let answer = context.client.set_failover(request).await?;
    context.print(&answer, |a| say(&output::text::moment(a.effective.as_ref())))
}
