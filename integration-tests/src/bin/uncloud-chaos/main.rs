//! Faults at random, or one fault again and again: `make chaos MINUTES=10 [SEED=…]`.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use harness::{
    Options,
    chaos::{
        kind::{ALL, Kind},
        report::Times,
        run::{self, Plan},
        stage::Stage,
        trials,
    },
    migration::cases::{Case, Disk, HEAD, Trials},
    slots::Share,
};
use uncloud_proto::v1::FailoverPolicy;

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
    /// One fault again and again, with what it costs measured. Fails if it costs more than is promised.
    Trials {
        /// What is lost: host, host+leader, controller, controller-leader, etcd-member, etcd-leader, both-leaders, the last four
        /// also with `-hung` behind them where they are stopped instead of killed; or all-controllers.
        #[arg(long)]
        kind: String,
        /// How often.
        #[arg(long, default_value_t = 30)]
        n: usize,
        /// Where the random numbers come from.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// A further flag of the members of etcd, such as `--etcd-flag=--election-timeout=500`. May be repeated.
        #[arg(long)]
        etcd_flag: Vec<String>,
    },
    /// Everything that can go wrong in a live migration, at each of its moments, one after the other; what came of it as a table.
    MigrationFaults {
        /// Only these, such as `target-qemu-killed@sending`.
        #[arg(long, value_delimiter = ',', value_parser = case)]
        only: Vec<Case>,
        /// The guest's disk is one that only its host has, and is copied.
        #[arg(long)]
        own_disk: bool,
    },
}

fn case(name: &str) -> Result<Case, String> {
    Case::named(name).ok_or_else(|| {
        let all: Vec<String> = Case::all().map(|c| c.to_string()).collect();
        format!("it is none of {}", all.join(", "))
    })
}

fn kind(name: &str) -> Result<Kind, String> {
    Kind::named(name).ok_or_else(|| {
        let all: Vec<String> = ALL.iter().map(ToString::to_string).collect();
        format!("it is none of {}", all.join(", "))
    })
}

#[tokio::main]
async fn main() -> ExitCode {
    match until_stopped(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uncloud-chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn until_stopped(args: Args) -> anyhow::Result<()> {
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
        What::Trials { kind, n, seed, etcd_flag } => measure(&kind, n, seed, &etcd_flag).await?,
        What::MigrationFaults { only, own_disk } => {
            migration_faults(only, if own_disk { Disk::Own } else { Disk::Shared }).await?;
        }
    }
    Ok(())
}

async fn migration_faults(only: Vec<Case>, disk: Disk) -> anyhow::Result<()> {
    let cases: Vec<Case> = if only.is_empty() { Case::all().filter(|c| c.fits(disk)).collect() } else { only };
    if let Some(case) = cases.iter().find(|c| !c.fits(disk)) {
        bail!("{case}: no disk is copied; see --own-disk");
    }
    let mut trials = Trials::start(disk).await?;
    println!("{HEAD}");
    for case in cases {
        match trials.run(case).await {
            Ok(row) => println!("{row}"),
            Err(error) => {
                trials.cluster.keep_directory();
                return Err(error);
            }
        }
    }
    trials.finish().await
}

/// The kind of fault by the name that it has in trials.
fn lost(name: &str) -> anyhow::Result<Kind> {
    Ok(match name {
        "host" => Kind::HostLost,
        "host+leader" => Kind::LeaderAndHostLost,
        "controller" => Kind::FollowerLost,
        "controller-leader" => Kind::LeaderLost,
        "controller-leader-hung" => Kind::LeaderHung,
        "etcd-member" => Kind::MemberLost,
        "etcd-member-hung" => Kind::MemberHung,
        "etcd-leader" => Kind::EtcdLeaderLost,
        "etcd-leader-hung" => Kind::EtcdLeaderHung,
        "both-leaders" => Kind::BothLeadersLost,
        other => bail!("`{other}` is no kind of trial; see --help"),
    })
}

async fn measure(name: &str, n: usize, seed: u64, etcd_flags: &[String]) -> anyhow::Result<()> {
    if name == "all-controllers" {
        return all_controllers(n).await;
    }
    let kind = lost(name)?;
    let mut stage = trials::stage(etcd_flags).await?;
    let done = trials::series(&mut stage, kind, n, seed).await?;
    println!("{name}, {n} times");
    for (what, times) in [
        ("until the API says Running", &done.running),
        ("until the guest's first line", &done.spoke),
        ("without an acknowledged write", &done.written),
    ] {
        if !times.is_empty() {
            println!("  {what:<30} {times}");
        }
    }
    println!("  broken promises: {}", done.violations.len());
    for violation in &done.violations {
        println!("    {violation}");
    }
    stage.finish().await?;
    if !done.violations.is_empty() {
        bail!("promises were broken");
    }
    Ok(())
}

/// At the default settings.
async fn all_controllers(n: usize) -> anyhow::Result<()> {
    let lease = Duration::from_secs(6);
    let mut options = Options::hosts(3).default_leases().controllers(3).etcd_members(3);
    options.share = Share::Whole;
    let guests = [("fast", FailoverPolicy::Fast), ("patient", FailoverPolicy::Patient), ("hold", FailoverPolicy::Hold)];
    let mut stage = Stage::start(options, &guests).await?;
    let (mut died, mut written, mut settled) = (Times::default(), Times::default(), Times::default());
    for trial in 1..=n {
        stage.settle(Duration::from_secs(60)).await?;
        let down = trials::all_controllers_down(&mut stage, lease).await.with_context(|| format!("trial {trial}"))?;
        eprintln!("trial {trial} of {n}: {down:.2?}");
        died.add(down.died);
        written.add(down.written);
        settled.add(down.settled);
    }
    println!("all-controllers, {n} times, lease {lease:?}; guests that are patient or on hold were never touched");
    println!("  until the fast guest is dead                           {died}");
    println!("  from their start until a write is acknowledged         {written}");
    println!("  from their start until the fast guest runs again       {settled}");
    stage.finish().await
}

#[expect(clippy::disallowed_methods, reason = "any number will do")]
fn clock() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(now.as_secs() % 1_000_000)
}
