//! Breaking a [`Stage`] and mending it again.
//!
//! Each fault knows which guests it may cost their QEMU. Everything else that dies is a false alarm.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, CompactionOptions, DeleteOptions};
use rand::{Rng as _, rngs::StdRng};
use uncloud_proto::v1::FailoverPolicy;

use super::{kind::Kind, stage::Stage};
use crate::{
    netns::{self, Cut},
    proc_table::{self, Kind as Process, Proc},
    process::{Signal, signal_pid},
    proxy::Line,
    wait_for,
};

/// The quota of each member of etcd, so that it can be used up. Small, because it is filled with rubbish.
pub const QUOTA: &str = "16777216";
/// The rubbish.
const FILLER: &str = "/filler/";
const FILLER_BYTES: usize = 1024 * 1024;
/// A killed keeper takes its QEMU with it long before that, and the checker has seen it.
const GONE_LIMIT: Duration = Duration::from_secs(2);
/// A killed member of etcd is back, and part of its cluster, within this.
const LEADER_LIMIT: Duration = Duration::from_secs(15);

/// A fault that has happened.
pub struct Fault {
    /// Of what kind.
    pub kind: Kind,
    /// What it hit, for people.
    pub what: String,
    /// When it began.
    pub began: Instant,
    /// The guests that it may cost their QEMU.
    pub may_kill: BTreeSet<String>,
    /// The hosts where it may cost every guest its QEMU that is there, or arrives there, while it stays.
    pub hosts: BTreeSet<String>,
    repairs: Vec<Repair>,
}

/// What makes it whole again.
enum Repair {
    StartAgent(String),
    WakeAgent(String),
    StartController(usize),
    WakeController(usize),
    StartMember(usize),
    WakeMember(usize),
    WakeProcess(Proc),
    HealNetwork(String),
    ClearLines,
    EmptyEtcd,
}

/// Which guests of a host a fault may kill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Those that live under the short lease.
    Fast,
    All,
}

impl Fault {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            what: String::new(),
            began: Instant::now(),
            may_kill: BTreeSet::new(),
            hosts: BTreeSet::new(),
            repairs: Vec::new(),
        }
    }

    fn hit(&mut self, what: impl Into<String>, repair: Option<Repair>) {
        if !self.what.is_empty() {
            self.what.push_str(" and ");
        }
        self.what.push_str(&what.into());
        self.repairs.extend(repair);
    }
}

impl Stage {
    /// Lets a fault of this kind happen.
    ///
    /// # Errors
    ///
    /// What should be broken is not there.
    pub async fn break_it(&mut self, kind: Kind, rng: &mut StdRng) -> anyhow::Result<Fault> {
        // Who leads is asked before the clock starts.
        let leader = self.cluster.leader().await?;
        let follower = (leader + rng.random_range(1..self.controllers())) % self.controllers();
        let etcd = self.cluster.etcd.as_ref().context("an etcd")?;
        let (etcd_leader, members) = (etcd.leader().await?, etcd.members().len());
        let other_member = (etcd_leader + rng.random_range(1..members.max(2))) % members;
        let host = self.some_host_with_guests(rng)?;
        let mut fault = Fault::new(kind);
        match kind {
            Kind::HostLost | Kind::HostReboots => self.cut_power(&mut fault, &host)?,
            Kind::LeaderAndHostLost => {
                self.kill_controller(&mut fault, leader);
                self.cut_power(&mut fault, &host)?;
            }
            Kind::AgentUpgraded => {
                self.cluster.host(&host)?.kill();
                fault.hit(format!("the agent of {host}"), Some(Repair::StartAgent(host)));
            }
            Kind::AgentHung | Kind::AgentHungBriefly => {
                if kind == Kind::AgentHung {
                    self.reaches(&mut fault, &host, Reach::Fast);
                }
                self.cluster.host(&host)?.signal(Signal::STOP)?;
                fault.hit(format!("the agent of {host}"), Some(Repair::WakeAgent(host)));
            }
            Kind::KeeperKilled => self.signal_part(&mut fault, Process::Keeper, Signal::KILL, rng).await?,
            Kind::KeeperHung => self.signal_part(&mut fault, Process::Keeper, Signal::STOP, rng).await?,
            Kind::QemuKilled => self.signal_part(&mut fault, Process::Qemu, Signal::KILL, rng).await?,
            Kind::QemuHung => self.signal_part(&mut fault, Process::Qemu, Signal::STOP, rng).await?,
            Kind::CutBoth => self.cut(&mut fault, &host, Cut::Both, Some(Reach::Fast))?,
            Kind::CutOutgoing => self.cut(&mut fault, &host, Cut::Outgoing, Some(Reach::Fast))?,
            Kind::CutIncoming => self.cut(&mut fault, &host, Cut::Incoming, Some(Reach::Fast))?,
            Kind::CutBriefly => self.cut(&mut fault, &host, Cut::Both, None)?,
            Kind::PacketLoss => self.lose_packets(&mut fault, &host, 10)?,
            Kind::HeavyPacketLoss => {
                self.reaches(&mut fault, &host, Reach::Fast);
                self.lose_packets(&mut fault, &host, 33)?;
            }
            Kind::LeaderSlow => {
                let delay = Duration::from_millis(rng.random_range(50..=400));
                self.front(leader)?.api.set(Line::Slow(delay));
                fault.hit(format!("{delay:?} each way at controller {leader}, the leader"), Some(Repair::ClearLines));
            }
            Kind::LeadersEtcdSlow => {
                // An answer after 600 ms in all is well within the validity of a leadership, 1.5 s.
                let delay = Duration::from_millis(rng.random_range(20..=300));
                self.front(leader)?.etcd.iter().for_each(|p| p.set(Line::Slow(delay)));
                let what = format!("{delay:?} each way between controller {leader}, the leader, and etcd");
                fault.hit(what, Some(Repair::ClearLines));
            }
            Kind::LeaderWithoutEtcd => {
                self.front(leader)?.etcd.iter().for_each(|p| p.set(Line::Held));
                fault.hit(format!("etcd for controller {leader}, the leader"), Some(Repair::ClearLines));
            }
            Kind::FollowerLost => self.kill_controller(&mut fault, follower),
            Kind::LeaderLost => self.kill_controller(&mut fault, leader),
            Kind::LeaderHung => {
                self.cluster.controller_at(leader).signal(Signal::STOP)?;
                fault.hit(format!("controller {leader}, the leader"), Some(Repair::WakeController(leader)));
            }
            Kind::MemberLost => self.kill_member(&mut fault, other_member)?,
            Kind::MemberHung => self.stop_member(&mut fault, other_member)?,
            Kind::EtcdLeaderLost => self.kill_member(&mut fault, etcd_leader)?,
            Kind::EtcdLeaderHung => self.stop_member(&mut fault, etcd_leader)?,
            Kind::BothLeadersLost => {
                // Two faults: etcd needs up to 2 s to elect, and then begins the TTL of the leader key anew and adds its election
                // timeout. With what an agent needs to find the next leader that can be more than the lease.
                for n in 0..self.cluster.hosts.len() {
                    let host = self.cluster.hosts[n].name().to_owned();
                    self.reaches(&mut fault, &host, Reach::Fast);
                }
                self.kill_controller(&mut fault, leader);
                self.kill_member(&mut fault, etcd_leader)?;
            }
            Kind::ControllersRestarted => {
                for n in 0..self.controllers() {
                    self.kill_controller(&mut fault, n);
                }
            }
            Kind::EtcdFull => {
                self.fill_etcd().await?;
                fault.began = Instant::now();
                fault.hit("etcd has used up its quota", Some(Repair::EmptyEtcd));
            }
        }
        Ok(fault)
    }

    /// Makes whole what a fault broke.
    ///
    /// # Errors
    ///
    /// What does not come back.
    pub async fn mend(&mut self, fault: &mut Fault) -> anyhow::Result<()> {
        for repair in fault.repairs.drain(..) {
            match repair {
                Repair::StartAgent(host) => self.cluster.host(&host)?.start_again()?,
                Repair::WakeAgent(host) => self.cluster.host(&host)?.signal(Signal::CONT)?,
                Repair::StartController(n) => self.cluster.controller_at(n).spawn_again()?,
                Repair::WakeController(n) => self.cluster.controller_at(n).signal(Signal::CONT)?,
                Repair::StartMember(n) => {
                    self.cluster.etcd.as_mut().context("an etcd")?.member(n).start_again().await?;
                }
                Repair::WakeMember(n) => {
                    self.cluster.etcd.as_mut().context("an etcd")?.member(n).signal(Signal::CONT)?;
                }
                Repair::WakeProcess(process) => {
                    // It may have been killed meanwhile, and its id may be somebody else's by now.
                    if proc_table::is_alive(process.pid, process.start) {
                        let _ = signal_pid(process.pid, Signal::CONT);
                    }
                }
                Repair::HealNetwork(netns) => netns::heal(&netns)?,
                Repair::ClearLines => {
                    for front in &self.cluster.fronts {
                        front.api.set(Line::Clear);
                        front.etcd.iter().for_each(|p| p.set(Line::Clear));
                    }
                }
                Repair::EmptyEtcd => self.empty_etcd().await?,
            }
        }
        let etcd = self.cluster.etcd.as_ref().context("an etcd")?;
        wait_for("etcd has a leader", LEADER_LIMIT, async || etcd.leader().await.map_err(|e| format!("{e:#}"))).await?;
        Ok(())
    }

    fn controllers(&self) -> usize {
        self.cluster.addresses().len()
    }

    fn front(&self, controller: usize) -> anyhow::Result<&crate::control_plane::Front> {
        self.cluster.fronts.get(controller).context("this cluster was made without proxies")
    }

    /// A host that has a guest under the short lease, if there is one; else any that has a guest.
    fn some_host_with_guests(&self, rng: &mut StdRng) -> anyhow::Result<String> {
        let hosts = |fast_only: bool| -> Vec<String> {
            let names = self.cluster.hosts.iter().map(|h| h.name().to_owned());
            let counts = |name: &String| self.on(name).iter().any(|g| !fast_only || g.failover == FailoverPolicy::Fast);
            names.filter(counts).collect()
        };
        let (fast, any) = (hosts(true), hosts(false));
        let from = if fast.is_empty() { any } else { fast };
        ensure!(!from.is_empty(), "no host has a guest");
        Ok(from[rng.random_range(0..from.len())].clone())
    }

    fn reaches(&self, fault: &mut Fault, host: &str, reach: Reach) {
        let hit = |g: &super::stage::Guest| reach == Reach::All || g.failover == FailoverPolicy::Fast;
        fault.may_kill.extend(self.on(host).into_iter().filter(hit).map(|g| g.id));
        fault.hosts.insert(host.to_owned());
    }

    fn cut_power(&mut self, fault: &mut Fault, host: &str) -> anyhow::Result<()> {
        self.reaches(fault, host, Reach::All);
        self.cluster.host(host)?.cut_power();
        fault.hit(format!("the power of {host}"), Some(Repair::StartAgent(host.to_owned())));
        Ok(())
    }

    fn kill_controller(&mut self, fault: &mut Fault, n: usize) {
        self.cluster.controller_at(n).kill();
        fault.hit(format!("controller {n}"), Some(Repair::StartController(n)));
    }

    fn kill_member(&mut self, fault: &mut Fault, n: usize) -> anyhow::Result<()> {
        self.cluster.etcd.as_mut().context("an etcd")?.member(n).kill();
        fault.hit(format!("member {n} of etcd"), Some(Repair::StartMember(n)));
        Ok(())
    }

    fn stop_member(&mut self, fault: &mut Fault, n: usize) -> anyhow::Result<()> {
        self.cluster.etcd.as_mut().context("an etcd")?.member(n).signal(Signal::STOP)?;
        fault.hit(format!("member {n} of etcd"), Some(Repair::WakeMember(n)));
        Ok(())
    }

    /// Signals the keeper or QEMU of some guest.
    async fn signal_part(
        &mut self,
        fault: &mut Fault,
        part: Process,
        signal: Signal,
        rng: &mut StdRng,
    ) -> anyhow::Result<()> {
        let fast: Vec<_> = self.guests.iter().filter(|g| g.failover == FailoverPolicy::Fast).cloned().collect();
        ensure!(!fast.is_empty(), "no guest lives under the short lease");
        let guest = &fast[rng.random_range(0..fast.len())];
        let instance = self.cluster.checker.running(&guest.id).with_context(|| format!("{} runs", guest.name))?;
        let process = self.cluster.host(&instance.host)?.process_of(&guest.id, part)?;
        // A QEMU that stands still for a moment goes on. Everything else costs the guest its QEMU.
        if !(part == Process::Qemu && signal == Signal::STOP) {
            fault.may_kill.insert(guest.id.clone());
        }
        signal_pid(process.pid, signal)?;
        if signal == Signal::KILL {
            // Nothing that is asked from now on is told of the one that was killed.
            let checker = &self.cluster.checker;
            wait_for("the end of QEMU is seen", GONE_LIMIT, async || match checker.running(&guest.id) {
                Some(now) if (now.pid, now.start) == (instance.pid, instance.start) => Err(format!("{now:?}")),
                Some(_) | None => Ok(()),
            })
            .await?;
        }
        let repair = (signal == Signal::STOP).then_some(Repair::WakeProcess(process));
        fault.hit(format!("the {part:?} of {} on {}", guest.name, instance.host), repair);
        Ok(())
    }

    fn cut(&mut self, fault: &mut Fault, host: &str, cut: Cut, reach: Option<Reach>) -> anyhow::Result<()> {
        if let Some(reach) = reach {
            self.reaches(fault, host, reach);
        }
        let netns = self.cluster.host(host)?.netns()?.to_owned();
        netns::cut(&netns, cut)?;
        fault.hit(format!("the network of {host} ({cut:?})"), Some(Repair::HealNetwork(netns)));
        Ok(())
    }

    fn lose_packets(&mut self, fault: &mut Fault, host: &str, percent: u32) -> anyhow::Result<()> {
        let netns = self.cluster.host(host)?.netns()?.to_owned();
        netns::lose(&netns, percent)?;
        fault.hit(format!("{percent} % of the packets of {host}, each way"), Some(Repair::HealNetwork(netns)));
        Ok(())
    }

    /// Puts rubbish into etcd until it takes nothing more.
    async fn fill_etcd(&mut self) -> anyhow::Result<()> {
        let etcd = self.cluster.etcd.as_ref().context("an etcd")?;
        let mut client = etcd.client().await?;
        for n in 0..64 {
            match client.put(format!("{FILLER}{n}"), vec![b'x'; FILLER_BYTES], None).await {
                Ok(_) => {}
                Err(etcd_client::Error::GRpcStatus(status)) if status.message().contains("space exceeded") => {
                    return Ok(());
                }
                Err(error) => return Err(error).context("fill etcd"),
            }
        }
        bail!("etcd took 64 MiB, and its quota should be {QUOTA} bytes");
    }

    /// What an operator does with an etcd that is full: deletes, compacts, defragments each member, ends the alarm.
    async fn empty_etcd(&mut self) -> anyhow::Result<()> {
        let etcd = self.cluster.etcd.as_ref().context("an etcd")?;
        let mut client = etcd.client().await?;
        let deleted = client.delete(FILLER, Some(DeleteOptions::new().with_prefix())).await?;
        let revision = deleted.header().map_or(0, etcd_client::ResponseHeader::revision);
        // Until it is done: what is not yet compacted is not given back by the next step.
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.context("compact")?;
        for member in etcd.members() {
            member.client().await?.defragment().await.context("defragment")?;
        }
        let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.context("ask for alarms")?;
        for alarm in alarms.alarms() {
            let mut options = AlarmOptions::new();
            options.with_member(alarm.member_id());
            client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options)).await.context("end an alarm")?;
        }
        // It takes writes again, or the error says why not.
        client.put(FILLER, "", None).await.context("write into the emptied etcd")?;
        client.delete(FILLER, None).await?;
        Ok(())
    }
}
