//! Faults at random, or one fault again and again: `make chaos MINUTES=10 [SEED=…]`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use harness::chaos::{
    kind::{ALL, Kind},
    run::{self, Plan},
};

/// Breaks a cluster of three controllers, three members of etcd and four hosts in every way that there is, and checks that no
/// guest runs twice, that nothing acknowledged is lost, and that everything runs in the end.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Random faults from a seed.
    Run {
        /// For how long faults begin.
        #[arg(long, default_value_t = 10.0)]
        minutes: f64,
        /// Where the random numbers come from [default: the clock].
        #[arg(long)]
        seed: Option<u64>,
        /// Only faults of these kinds, such as `host-lost`.
        #[arg(long, value_delimiter = ',', value_parser = kind)]
        only: Vec<Kind>,
    },
}

fn kind(name: &str) -> Result<Kind, String> {
    Kind::named(name).ok_or_else(|| {
        let all: Vec<String> = ALL.iter().map(ToString::to_string).collect();
        format!("it is none of {}", all.join(", "))
    })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    // What is dropped here takes processes, namespaces and directories with it.
    tokio::select! {
        done = work(args) => done,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminated.recv() => bail!("terminated"),
    }
}

async fn work(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Run { minutes, seed, only } => {
            let seed = match seed {
                Some(seed) => seed,
                None => clock()?,
            };
            let kinds = if only.is_empty() { ALL.to_vec() } else { only };
            println!("seed {seed}");
            let report = run::run(Plan { seed, time: Duration::from_secs_f64(minutes * 60.0), kinds }).await?;
            println!("seed {seed}\n{report}");
            if !report.is_good() {
                bail!("promises were broken");
            }
        }
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "any number will do")]
fn clock() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(now.as_secs() % 1_000_000)
}
