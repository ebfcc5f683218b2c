//! What goes wrong in a migration, and when.

use std::{fmt, path::PathBuf, time::Duration};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{
    Cluster, Signal,
    netns::{self, Cut},
    proc_table::{Kind, Proc},
    process::kill_pid,
    qmp::{MONITOR, Monitor},
    wait_for,
};

/// How far a migration is when something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// The target's QEMU has just been started.
    Preparing,
    /// The source copies its disk, and the guest executes. Only of guests whose disk only their host has.
    Copying,
    /// The source sends the guest's memory, and the guest executes.
    Sending,
    /// The source has sent everything and the target has it; nobody executes. The leader has been stopped by SIGSTOP meanwhile, so
    /// that it surely has not written the hand-over yet, and goes on right after the fault.
    HandingOver,
}

/// All of them.
pub const MOMENTS: [Moment; 4] = [Moment::Preparing, Moment::Copying, Moment::Sending, Moment::HandingOver];

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing.
    None,
    /// The QEMU of the source is killed.
    SourceQemuKilled,
    /// The QEMU of the target is killed.
    TargetQemuKilled,
    /// The agent of the source is killed, and started again.
    SourceAgentKilled,
    /// The agent of the target is killed, and started again.
    TargetAgentKilled,
    /// The agent of the source is stopped for a while.
    SourceAgentHung,
    /// The agent of the target is stopped for a while.
    TargetAgentHung,
    /// The leading controller is killed.
    LeaderKilled,
    /// The source loses its power.
    SourceHostDead,
    /// The target loses its power.
    TargetHostDead,
    /// What the source sends to the target is lost.
    SourceToTargetCut,
    /// What the target sends to the source is lost.
    TargetToSourceCut,
    /// The hosts do not reach each other.
    HostsCut,
    /// The source does not reach the controllers.
    SourceCutOff,
    /// The target does not reach the controllers.
    TargetCutOff,
}

/// All of them.
pub const FAULTS: [Fault; 15] = [
    Fault::None,
    Fault::SourceQemuKilled,
    Fault::TargetQemuKilled,
    Fault::SourceAgentKilled,
    Fault::TargetAgentKilled,
    Fault::SourceAgentHung,
    Fault::TargetAgentHung,
    Fault::LeaderKilled,
    Fault::SourceHostDead,
    Fault::TargetHostDead,
    Fault::SourceToTargetCut,
    Fault::TargetToSourceCut,
    Fault::HostsCut,
    Fault::SourceCutOff,
    Fault::TargetCutOff,
];

impl Fault {
    /// For how long it stays, at the default leases of 6 s. What does not end by itself stays until the migration is over, if that is
    /// longer, but for [`Fault::MOST`] at the most.
    pub(super) fn stays(self) -> Duration {
        Duration::from_millis(match self {
            Self::None | Self::SourceQemuKilled | Self::TargetQemuKilled => 0,
            Self::SourceAgentKilled | Self::TargetAgentKilled => 500,
            Self::SourceAgentHung | Self::TargetAgentHung => 2_000,
            Self::LeaderKilled => 3_000,
            // Longer than lease, allowance and a start.
            Self::SourceHostDead | Self::TargetHostDead | Self::SourceCutOff | Self::TargetCutOff => 12_000,
            Self::SourceToTargetCut | Self::TargetToSourceCut | Self::HostsCut => 5_000,
        })
    }

    pub(super) const MOST: Duration = Duration::from_secs(40);

    pub(super) fn stays_until_the_end(self) -> bool {
        matches!(self, Self::SourceToTargetCut | Self::TargetToSourceCut | Self::HostsCut)
    }

    /// Whether the guest may be started anew: what executes it may be lost.
    pub(super) fn may_cost_the_guest(self, moment: Moment) -> bool {
        match self {
            Self::SourceQemuKilled | Self::SourceHostDead | Self::SourceCutOff => true,
            // The leader may have heard that all is done before it hears of this.
            Self::TargetQemuKilled | Self::TargetHostDead | Self::TargetCutOff => moment == Moment::HandingOver,
            Self::None
            | Self::SourceAgentKilled
            | Self::TargetAgentKilled
            | Self::SourceAgentHung
            | Self::TargetAgentHung
            | Self::LeaderKilled
            | Self::SourceToTargetCut
            | Self::TargetToSourceCut
            | Self::HostsCut => false,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&kebab(&format!("{self:?}")))
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&kebab(&format!("{self:?}")))
    }
}

fn kebab(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

/// What makes it whole again.
pub(super) enum Repair {
    StartAgent(String),
    WakeAgent(String),
    StartController(usize),
    Heal(String),
}

/// The two sides of a migration under way.
pub(super) struct Sides {
    pub(super) vm: String,
    pub(super) source: String,
    pub(super) target: String,
}

impl Sides {
    /// The QEMU of one side, as soon as it is there.
    async fn qemu(&self, cluster: &mut Cluster, host: &str) -> anyhow::Result<Proc> {
        let host = cluster.host(host)?;
        wait_for("QEMU is there", Duration::from_secs(20), async || {
            host.process_of(&self.vm, Kind::Qemu).map_err(|e| e.to_string())
        })
        .await
    }

    fn monitor(&self, cluster: &mut Cluster, host: &str) -> anyhow::Result<PathBuf> {
        Ok(cluster.host(host)?.state_dir().join("vms").join(&self.vm).join(MONITOR))
    }

    /// Waits for a moment of the migration, which has begun. Returns the controller that has been stopped for it.
    pub(super) async fn wait(&self, cluster: &mut Cluster, moment: Moment) -> anyhow::Result<Option<usize>> {
        self.qemu(cluster, &self.target).await?;
        if moment == Moment::Preparing {
            return Ok(None);
        }
        let socket = self.monitor(cluster, &self.source)?;
        let socket = || socket.clone();
        if moment == Moment::Copying {
            wait_for("its disk is being copied", Duration::from_secs(30), async || {
                let jobs = ask(socket(), "query-jobs", json!({})).await.map_err(|e| format!("{e:#}"))?;
                let under_way = |j: &Value| j["status"] == "running" && j["current-progress"].as_u64() > Some(1 << 20);
                if jobs.as_array().is_some_and(|j| j.iter().any(under_way)) { Ok(()) } else { Err(jobs.to_string()) }
            })
            .await?;
            return Ok(None);
        }
        wait_for("memory is being sent", Duration::from_secs(30), async || {
            let answer = ask(socket(), "query-migrate", json!({})).await.map_err(|e| format!("{e:#}"))?;
            let number = |field: &str| answer["ram"][field].as_u64().unwrap_or(0);
            // All of it has been sent once when what is left is less than what the guest writes to.
            let far = match moment {
                Moment::HandingOver => number("dirty-sync-count") > 1,
                Moment::Preparing | Moment::Copying | Moment::Sending => number("transferred") > 1 << 20,
            };
            if answer["status"] == "active" && far { Ok(()) } else { Err(answer.to_string()) }
        })
        .await?;
        if moment == Moment::Sending {
            return Ok(None);
        }
        let leader = cluster.leader().await?;
        cluster.controller_at(leader).freeze().await?;
        ask(socket(), "migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 2000 }))
            .await?;
        wait_for("all has been sent", Duration::from_secs(20), async || {
            let answer = ask(socket(), "query-status", json!({})).await.map_err(|e| format!("{e:#}"))?;
            if answer["status"] == "postmigrate" { Ok(()) } else { Err(answer.to_string()) }
        })
        .await?;
        Ok(Some(leader))
    }

    /// Sees to it that the source is not done before [`Sides::hurry`]: QEMU slows a guest that it cannot send fast enough, but not to a stand.
    pub(super) async fn hold(&self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let never = json!({ "downtime-limit": 1 });
        ask(self.monitor(cluster, &self.source)?, "migrate-set-parameters", never).await.map(drop)
    }

    /// Lifts the limit of the source, under which it would never be done.
    pub(super) async fn hurry(&self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let socket = self.monitor(cluster, &self.source)?;
        let jobs = ask(socket.clone(), "query-jobs", json!({})).await?;
        for id in jobs.as_array().into_iter().flatten().filter_map(|j| j["id"].as_str()) {
            // One that is about to end has no speed any more.
            drop(ask(socket.clone(), "block-job-set-speed", json!({ "device": id, "speed": 0 })).await);
        }
        let fast = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 2000 });
        ask(socket, "migrate-set-parameters", fast).await.map(drop)
    }

    /// Lets it go wrong.
    pub(super) async fn strike(&self, cluster: &mut Cluster, fault: Fault) -> anyhow::Result<Vec<Repair>> {
        let (source, target) = (self.source.as_str(), self.target.as_str());
        let mut repairs = Vec::new();
        match fault {
            Fault::None => {}
            Fault::SourceQemuKilled => kill_pid(self.qemu(cluster, source).await?.pid),
            Fault::TargetQemuKilled => kill_pid(self.qemu(cluster, target).await?.pid),
            Fault::SourceAgentKilled | Fault::TargetAgentKilled => {
                let host = if fault == Fault::SourceAgentKilled { source } else { target };
                cluster.host(host)?.kill();
                repairs.push(Repair::StartAgent(host.to_owned()));
            }
            Fault::SourceAgentHung | Fault::TargetAgentHung => {
                let host = if fault == Fault::SourceAgentHung { source } else { target };
                cluster.host(host)?.signal(Signal::STOP)?;
                repairs.push(Repair::WakeAgent(host.to_owned()));
            }
            Fault::LeaderKilled => {
                let leader = cluster.leader().await?;
                cluster.controller_at(leader).kill();
                repairs.push(Repair::StartController(leader));
            }
            Fault::SourceHostDead | Fault::TargetHostDead => {
                let host = if fault == Fault::SourceHostDead { source } else { target };
                cluster.host(host)?.cut_power();
                repairs.push(Repair::StartAgent(host.to_owned()));
            }
            Fault::SourceToTargetCut | Fault::TargetToSourceCut | Fault::HostsCut => {
                let way = match fault {
                    Fault::SourceToTargetCut => Cut::Outgoing,
                    Fault::TargetToSourceCut => Cut::Incoming,
                    _ => Cut::Both,
                };
                let address = cluster.address_of(Some(target))?;
                repairs.push(cut(cluster, source, &address, way)?);
            }
            Fault::SourceCutOff | Fault::TargetCutOff => {
                let host = if fault == Fault::SourceCutOff { source } else { target };
                let address = cluster.address_of(None)?;
                repairs.push(cut(cluster, host, &address, Cut::Both)?);
            }
        }
        Ok(repairs)
    }
}

fn cut(cluster: &mut Cluster, host: &str, address: &str, way: Cut) -> anyhow::Result<Repair> {
    let netns = cluster.host(host)?.netns()?.to_owned();
    netns::cut_from(&netns, address, way)?;
    Ok(Repair::Heal(netns))
}

/// Makes it whole again.
pub(super) fn mend(cluster: &mut Cluster, repairs: Vec<Repair>) -> anyhow::Result<()> {
    for repair in repairs {
        match repair {
            Repair::StartAgent(host) => cluster.host(&host)?.start_again()?,
            Repair::WakeAgent(host) => cluster.host(&host)?.signal(Signal::CONT)?,
            Repair::StartController(n) => cluster.controller_at(n).spawn_again()?,
            Repair::Heal(netns) => netns::heal(&netns)?,
        }
    }
    Ok(())
}

/// One command, on a connection of its own.
async fn ask(socket: PathBuf, command: &'static str, arguments: Value) -> anyhow::Result<Value> {
    tokio::task::spawn_blocking(move || Monitor::connect(&socket)?.execute(command, arguments))
        .await
        .context("ask QEMU")?
}
