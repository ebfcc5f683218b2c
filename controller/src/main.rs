//! The `uncloud-controller` command.

use std::{io, process::ExitCode};

use clap::Parser as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use uncloud_controller::{app, config::Config};
use uncloud_proto::clock::Clock;

fn main() -> ExitCode {
    let config = Config::parse();
    let filter = EnvFilter::try_from_env("UNCLOUD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    raise_descriptors();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Each agent has a connection, and what a process is given at its start is often 1024 file descriptors.
fn raise_descriptors() {
    let most = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }) {
        warn!("the limit on file descriptors cannot be raised: {error}");
    }
}

#[tokio::main]
async fn run(config: Config) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopped = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => info!("SIGTERM: stopping"),
            _ = int.recv() => info!("SIGINT: stopping"),
        }
        stopped.cancel();
    });
    app::run(config, Clock::system(), stop).await
}
