//! The numbers, as a table and in a file: `make bench`.
//!
//! Each is put beside its limit, measured in the same run on the same machine: what raw etcd, a bare QEMU, an empty
//! process or the lease itself would give. Medians, unless the name says otherwise. The guests are the micro guests of
//! `guests/micro`, the programs are those that were built beside this one.
//!
//! ```text
//! uncloud-bench [--only PART] [--out FILE]     (a part: creates, guests, burst, failover, migrations, placement)
//! uncloud-bench --only scale [--out FILE]      (10,000 agents and 100,000 VMs: `make bench-scale`; or stages of it, with commas: cold-start,
//!                                               agents, reads, deaths, takeover, agents-max; or churn)
//! uncloud-bench idle-client HOST:PORT          (what agent_memory is compared with; started by the above)
//! uncloud-bench bare-server HOST:PORT          (what the sessions are compared with; started by the above)
//! ```

mod burst;
mod creates;
mod failover;
mod guests;
mod migrations;
mod placement;
mod scale;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use serde::Serialize;

/// One number beside its limit.
#[derive(Clone, Debug, Serialize)]
struct Measured {
    name: String,
    ours: f64,
    limit: f64,
    /// `ours / limit`.
    ratio: f64,
    unit: &'static str,
    /// What the limit is, for the table.
    #[serde(skip)]
    beside: String,
}

impl Measured {
    fn new(name: impl Into<String>, ours: f64, limit: f64, unit: &'static str, beside: impl Into<String>) -> Self {
        Self { name: name.into(), ours, limit, ratio: ours / limit, unit, beside: beside.into() }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (mut out, mut only) = (None, None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--out" => out = Some(PathBuf::from(args.next().context("--out needs a file")?)),
            "--only" => only = Some(args.next().context("--only needs a part")?),
            "idle-client" => return guests::idle_client(&args.next().context("idle-client needs an address")?).await,
            "bare-server" => {
                return scale::bare_server(&args.next().context("bare-server needs an address")?).await;
            }
            other => bail!("unknown argument `{other}`; usage: uncloud-bench [--only PART] [--out FILE]"),
        }
    }
    let mut all = Vec::new();
    match only.as_deref() {
        None => {
            all.extend(creates::measure().await?);
            all.extend(guests::measure().await?);
            all.extend(burst::measure().await?);
            all.extend(failover::measure().await?);
            all.extend(migrations::measure().await?);
            all.extend(placement::measure()?);
        }
        Some("creates") => all = creates::measure().await?,
        Some("guests") => all = guests::measure().await?,
        Some("burst") => all = burst::measure().await?,
        Some("failover") => all = failover::measure().await?,
        Some("migrations") => all = migrations::measure().await?,
        Some("placement") => all = placement::measure()?,
        Some("scale") => all = scale::measure(&scale::STAGES).await?,
        Some(stages) if stages.split(',').all(|s| scale::STAGES.contains(&s) || s == scale::CHURN) => {
            all = scale::measure(&stages.split(',').collect::<Vec<_>>()).await?
        }
        Some(other) => bail!(
            "`{other}` is no part; there are creates, guests, burst, failover, migrations, placement, scale and its stages {}, and {}",
            scale::STAGES.join(", "),
            scale::CHURN
        ),
    }
    print_table(&all);
    if let Some(out) = out {
        std::fs::write(&out, serde_json::to_string_pretty(&all)? + "\n").context("write the results")?;
        println!("written to {}", out.display());
    }
    Ok(())
}

fn print_table(all: &[Measured]) {
    println!("{:<22} {:>12} {:>12} {:>8}  {:<6} limit", "name", "ours", "limit", "ratio", "unit");
    for m in all {
        println!("{:<22} {:>12.2} {:>12.2} {:>8.2}  {:<6} {}", m.name, m.ours, m.limit, m.ratio, m.unit, m.beside);
    }
}

/// The middle value.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}
