//! `uncloud-agent`: reads the configuration, and runs what [`uncloud_agent::app`] puts together.

use std::{io, process::ExitCode, time::Duration};

use clap::Parser;
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing_subscriber::EnvFilter;
use uncloud_agent::{
    accelerator, app,
    config::{Cli, Command},
    host,
};

/// A copy of an image, or a pool that hangs, may still be under way when the agent ends. It is not waited for.
const LEFTOVERS: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Some(Command::ProbeKvmChild)) {
        return accelerator::child_main();
    }
    let filter = EnvFilter::try_from_env("UNCLOUD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uncloud-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(mut cli: Cli) -> anyhow::Result<()> {
    // Two at least, so that no task that forgets itself holds up the heartbeat; few, because all of them wait mostly.
    let threads = host::vcpus().clamp(2, 4) as usize;
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let result = match cli.command.take() {
        Some(Command::InitPool { path, name }) => app::init_pool(&path, &name),
        Some(Command::Probe) => {
            runtime.block_on(app::probe());
            Ok(())
        }
        Some(Command::ProbeKvmChild) | None => runtime.block_on(run(cli)),
    };
    runtime.shutdown_timeout(LEFTOVERS);
    result
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let config = cli.merged()?.validate()?;
    host::raise_file_limit();
    let cancel = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = cancel.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("asked to stop");
        stop.cancel();
    });
    app::run(config, cancel).await
}
