//! The `uncloud` command: one file for each noun. Parses, calls the library, prints.
//!
//! Data goes to stdout, everything else to stderr; `exit.rs` says what the exit codes mean.

mod apply;
mod completions;
mod dev;
mod drain;
mod error;
mod events;
mod failover;
mod host;
mod image;
mod progress;
mod signals;
mod status;
mod vm;

use std::{process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use uncloud_proto::clock::{Clock, WallTime};

pub(crate) use self::{error::Error, signals::Signals};
use crate::{
    client::{Client, Options, Reads},
    exit::{self, Exit},
    output::{self, Format, json},
    units,
};

/// Runs virtual machines on Linux hosts and keeps them running when a host dies.
#[derive(Debug, Parser)]
#[command(name = "uncloud", version, after_help = exit::HELP, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Controllers to talk to, separated by commas.
    #[arg(
        long,
        global = true,
        env = "UNCLOUD_ENDPOINTS",
        hide_env_values = true,
        value_delimiter = ',',
        default_value = "127.0.0.1:7400",
        value_name = "HOST:PORT",
        help_heading = "Global options"
    )]
    endpoint: Vec<String>,
    /// Whose VMs are meant.
    #[arg(
        long,
        global = true,
        env = "UNCLOUD_OWNER",
        hide_env_values = true,
        default_value = "default",
        value_name = "NAME",
        help_heading = "Global options"
    )]
    owner: String,
    /// Form of the output.
    #[arg(short, long, global = true, value_enum, default_value = "table", help_heading = "Global options")]
    output: Format,
    /// How long a call may take, with everything that is tried again.
    #[arg(
        long,
        global = true,
        value_parser = units::parse_duration,
        default_value = "10s",
        value_name = "DURATION",
        help_heading = "Global options"
    )]
    timeout: Duration,
    /// Takes an answer that may be old from any controller that has one, also when etcd does not answer. Counts for what is
    /// shown of VMs, images and events, and for what-if.
    #[arg(long, global = true, help_heading = "Global options")]
    stale: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Virtual machines.
    #[command(subcommand)]
    Vm(vm::Command),
    /// Hosts: the machines that run VMs.
    #[command(subcommand)]
    Host(host::Command),
    /// Images: what disks and kernels are made from.
    #[command(subcommand)]
    Image(image::Command),
    /// Makes VMs as files describe them: creates those that are not there, and changes the others.
    ///
    /// What a file does not say of a VM is left as it is.
    Apply(apply::Arguments),
    /// Shows the cluster as a whole, and what an operator should look at.
    Status,
    /// Shows what happened.
    Events(events::Arguments),
    /// What happens when hosts die.
    #[command(subcommand)]
    Failover(failover::Command),
    /// Prints completions for a shell.
    Completions(completions::Arguments),
    /// Runs a whole cluster on this machine until Ctrl-C.
    ///
    /// Starts a controller with its own etcd and some agents that share a pool, prints how to talk to them, and takes
    /// everything down at the end, leaving no process behind. There is no TLS: for this machine only.
    Dev(dev::Arguments),
}

/// What every command needs.
pub(crate) struct Context {
    client: Client,
    owner: String,
    format: Format,
    clock: Clock,
}

impl Context {
    fn now(&self) -> WallTime {
        self.clock.wall()
    }

    /// Prints an answer: as JSON, or as the text that `table` makes of it.
    fn print<M: json::Named>(&self, answer: &M, table: impl FnOnce(&M) -> String) -> Result<(), Error> {
        match self.format {
            Format::Json => output::print(&json::pretty(answer))?,
            Format::Table => output::print(&table(answer))?,
        }
        Ok(())
    }

    /// Prints a step of a watch: as JSON on one line, or as the line that `line` makes of it, if it makes one.
    fn print_step<M: json::Named>(&self, step: &M, line: impl FnOnce(&M) -> Option<String>) -> Result<(), Error> {
        match self.format {
            Format::Json => output::print(&json::line(step))?,
            Format::Table => {
                if let Some(line) = line(step) {
                    output::print(&line)?;
                }
            }
        }
        Ok(())
    }
}

/// Parses the arguments of the process and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    // Ends the process itself on wrong usage (code 2), `--help` and `--version`.
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            output::note(&format!("error: cannot start: {e}"));
            return ExitCode::from(Exit::Failed.code());
        }
    };
    let exit = match runtime.block_on(run(cli)) {
        Ok(exit) => exit,
        Err(error) => error.report(),
    };
    // A read of stdin that is under way must not keep the process.
    runtime.shutdown_background();
    ExitCode::from(exit.code())
}

/// The definition of the command line, for completions and for the golden files of the help texts.
#[must_use]
pub fn definition() -> clap::Command {
    Cli::command()
}

async fn run(cli: Cli) -> Result<Exit, Error> {
    let Global { endpoint, owner, output, timeout, stale } = cli.global;
    let command = match cli.command {
        Command::Completions(arguments) => return completions::run(&arguments).map(|()| Exit::Done),
        Command::Dev(arguments) => return dev::run(arguments).await,
        other => other,
    };
    let reads = if stale { Reads::Stale } else { Reads::Linearizable };
    let client =
        Client::new(Options { endpoints: endpoint, timeout, reads }).map_err(|e| Error::Usage(e.to_string()))?;
    let context = Context { client, owner, format: output, clock: Clock::system() };
    match command {
        Command::Vm(command) => vm::run(&context, command).await?,
        Command::Host(command) => host::run(&context, command).await?,
        Command::Image(command) => image::run(&context, command).await?,
        Command::Apply(arguments) => apply::run(&context, arguments).await?,
        Command::Status => status::run(&context).await?,
        Command::Events(arguments) => events::run(&context, arguments).await?,
        Command::Failover(command) => failover::run(&context, command).await?,
        Command::Completions(_) | Command::Dev(_) => unreachable!("these two need no client and were done above"),
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        definition().debug_assert();
    }
}
