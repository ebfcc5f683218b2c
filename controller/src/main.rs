//! The `uncloud-controller` command.

use std::{io, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    runtime::{Builder, Handle},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use uncloud_controller::{app, config::Config};
use uncloud_proto::clock::Clock;

/// For the leadership, the writer and the connections to etcd: one is enough for their work, and another for when that one is busy.
const CONTROL_THREADS: usize = 2;

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

fn run(config: Config) -> anyhow::Result<()> {
    let serving = Builder::new_multi_thread().enable_all().thread_name("serving").build().context("start threads")?;
    let control = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .thread_name("control")
        .build()
        .context("start threads")?;
    let ended = control.block_on(until_stopped(config, serving.handle().clone()));
    // What is left of a call is over with the process.
    serving.shutdown_background();
    ended
}

async fn until_stopped(config: Config, serving: Handle) -> anyhow::Result<()> {
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
    app::run(config, Clock::system(), serving, stop).await
}
