//! `uncloud failover`.

use clap::Subcommand;
use uncloud_proto::v1;

use super::{Context, Error};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lets failover go on although fewer than half of the hosts are heard.
    ///
    /// When the leader hears from fewer than half of the hosts, it takes the fault to be on its own side and declares
    /// no more hosts dead. This command says that the silent hosts are really dead. Be sure of it: their VMs are
    /// started elsewhere once their leases have run out.
    Proceed,
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
    }
}
