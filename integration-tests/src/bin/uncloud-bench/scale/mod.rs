//! The control plane at full size: 10,000 agents and 100,000 VMs (`make bench-scale`).
//!
//! One etcd, one site, and the stages one after the other, each on what the one before has left. The agents are played by this
//! process ([`harness::load`]); controllers and etcd are the real ones. Whatever happens, all of it goes when this process does.

mod agents;
mod bare;
mod churn;
mod deaths;
mod raw;
mod reads;
mod takeover;

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use harness::load::{Fleet, Plane, Site, usage};
use uncloud_proto::v1::{CreateVmRequest, Disk, PowerState, VmSpec};

use super::Measured;

pub(crate) use bare::serve as bare_server;

const HOSTS: usize = 10_000;
const VMS: usize = 100_000;
/// VMs of the host that dies alone.
const CROWDED: usize = 1000;
/// Hosts that die together, and VMs of each of them.
const FULLER: (usize, usize) = (50, 20);
/// Agents are all connected long before that.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// The stages, in the order in which they are run.
pub(crate) const STAGES: [&str; 6] = ["cold-start", "agents", "reads", "deaths", "takeover", "agents-max"];
/// The one that takes minutes, and is run only when it is asked for.
pub(crate) const CHURN: &str = "churn";

/// What the stages work on.
struct Scale {
    plane: Plane,
    site: Site,
    fleet: Fleet,
    /// What a server does that only answers heartbeats, with as many agents. Measured in the same run.
    bare: bare::Bare,
    /// Memory of a controller of an empty cluster, in KiB.
    empty_kib: f64,
    all: Vec<Measured>,
}

/// Runs the stages that are named, after what they need.
pub(crate) async fn measure(stages: &[&str]) -> anyhow::Result<Vec<Measured>> {
    let begin = Instant::now();
    let empty_kib = empty_controller_kib().await?;
    let plane = Plane::start().await?;
    let site = Site::new(HOSTS, VMS, CROWDED, FULLER);
    let bare = bare::measure(&site).await?;
    say(begin, &format!("a bare server: {bare:?}"));
    let bytes = plane.fill(&site).await?;
    say(begin, &format!("etcd is filled: {HOSTS} hosts, {VMS} VMs, {} MiB", bytes >> 20));
    let fleet = plane.fleet()?;
    let mut scale = Scale { plane, site, fleet, bare, empty_kib, all: Vec::new() };
    agents::cold_start(&mut scale).await?;
    say(begin, "the controller leads");
    agents::connect(&mut scale).await?;
    say(begin, "all agents are connected");
    for stage in stages {
        if let Err(error) = run(&mut scale, stage).await {
            // What was measured before is worth having.
            super::print_table(&scale.all);
            return Err(error.context(format!("the stage {stage}")));
        }
        say(begin, stage);
    }
    Ok(scale.all)
}

async fn run(scale: &mut Scale, stage: &str) -> anyhow::Result<()> {
    match stage {
        "cold-start" => Ok(()),
        "agents" => agents::steady(scale).await,
        "reads" => reads::measure(scale).await,
        "deaths" => deaths::measure(scale).await,
        "takeover" => takeover::measure(scale).await,
        "agents-max" => agents::most(scale).await,
        CHURN => churn::measure(scale).await,
        other => bail!("`{other}` is no stage"),
    }
}

/// Progress, for whoever waits.
fn say(begin: Instant, what: &str) {
    eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64());
}

impl Scale {
    fn add(&mut self, name: &str, ours: f64, limit: f64, unit: &'static str, beside: impl Into<String>) {
        self.all.push(Measured::new(name, ours, limit, unit, beside));
    }

    /// Process id of a controller, counted from 0.
    fn pid(&mut self, controller: usize) -> anyhow::Result<u32> {
        let controller = self.plane.controllers.get_mut(controller).context("a controller")?;
        controller.process().pid().context("the controller runs")
    }

    fn resident_kib(&mut self, controller: usize) -> anyhow::Result<f64> {
        Ok(usage::resident_kib(self.pid(controller)?)? as f64)
    }
}

/// What a controller needs that has nothing to do.
async fn empty_controller_kib() -> anyhow::Result<f64> {
    let mut plane = Plane::start().await?;
    let controller = plane.spawn()?;
    controller.wait_serving().await?;
    Ok(usage::resident_kib(controller.process().pid().context("it runs")?)? as f64)
}

/// A small VM that is to be created stopped, once.
fn small(name: &str) -> CreateVmRequest {
    let disks = vec![Disk { size_bytes: 1 << 20, ..Disk::default() }];
    CreateVmRequest {
        name: name.into(),
        spec: Some(VmSpec { memory_mib: 16, disks, ..VmSpec::default() }),
        desired: PowerState::Stopped.into(),
        request_id: name.into(),
        ..CreateVmRequest::default()
    }
}

/// The value that `share` of them (0 to 1) do not exceed. They are sorted.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(at - 1).copied().unwrap_or(f64::NAN)
}
