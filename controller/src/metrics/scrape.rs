//! What is looked up when somebody asks.

use std::{collections::BTreeMap, sync::atomic::AtomicU64};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use uncloud_proto::ids::VmId;

use super::{One, Sources};
use crate::{
    leadership::{Leader, Mirror},
    model::{Liveness, host::HostMode, vm::Phase},
};

/// So many VMs are counted at once: the writer waits meanwhile.
const PIECE: usize = 1000;

pub(super) async fn look(sources: &Sources) -> Registry {
    let mut registry = Registry::with_prefix("uncloud");
    let leader = sources.slot.get().ok();
    let leads = Gauge::<i64>::default();
    leads.set(i64::from(leader.is_some()));
    registry.register("leader", "1 while this controller leads", leads);
    let mirror = leader.as_ref().map(|l| l.mirror.clone()).or_else(|| sources.copy.now());
    if let Some(mirror) = mirror {
        state(&mut registry, &mirror).await;
    }
    if let Some(leader) = leader {
        term(&mut registry, &leader, sources);
    }
    registry
}

/// What every controller has a copy of.
async fn state(registry: &mut Registry, mirror: &Mirror) {
    let revision = Gauge::<i64>::default();
    revision.set(mirror.read(|s| s.revision().0));
    registry.register("revision", "Revision of etcd that this controller has seen", revision);
    let followers = Gauge::<i64>::default();
    followers.set(i64::try_from(mirror.feed().followers()).unwrap_or(i64::MAX));
    registry.register("watchers", "Who follows the changes: watches, and parts of the controller", followers);

    let slow = Counter::<u64>::default();
    slow.inc_by(mirror.feed().cut_off());
    registry.register("slow_watchers", "Watches that were ended because they were not read fast enough", slow);

    let vms = Family::<One, Gauge>::default();
    for (phase, count) in phases(mirror).await {
        vms.get_or_create(&[("phase", phase_name(phase))]).set(count);
    }
    registry.register("vms", "VMs, by phase", vms);
    let hosts = Family::<[(&'static str, &'static str); 2], Gauge>::default();
    mirror.read(|state| {
        for (_, host) in state.hosts() {
            let labels = [("state", liveness_name(host.record.liveness)), ("mode", mode_name(host.record.mode))];
            hosts.get_or_create(&labels).inc();
        }
    });
    registry.register("hosts", "Hosts, by what is known of them and what people want of them", hosts);
    let unreadable = Gauge::<i64>::default();
    unreadable.set(i64::try_from(mirror.read(|s| s.unreadable().len())).unwrap_or(i64::MAX));
    registry.register("unreadable_records", "Records in etcd that cannot be read", unreadable);
}

/// What only the leader knows.
fn term(registry: &mut Registry, leader: &Leader, sources: &Sources) {
    let now = sources.clock.now();
    let number = |n: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        gauge
    };
    registry.register("term", "Number of this leadership", number(u64::try_from(leader.term.0).unwrap_or(0)));
    let valid = Gauge::<f64, AtomicU64>::default();
    valid.set(leader.validity.until().since(now).as_secs_f64());
    let what = "How long this controller may still act as the leader without word from etcd";
    registry.register_with_unit("leadership_valid", what, Unit::Seconds, valid);
    registry.register("sessions", "Hosts with a session", number(leader.sessions.connected().len() as u64));
    registry.register("writer_queue", "Commands that wait to be stored", number(leader.writer.waiting() as u64));
    let (brake, silent) = {
        let mut health = leader.health();
        (health.brake(), health.silent(now).len())
    };
    registry.register("hosts_heard", "Hosts that are heard, as of the newest look", number(brake.heard.into()));
    registry.register("hosts_silent", "Hosts that have not been heard for too long", number(silent as u64));
    let what = "1 while no more hosts are declared lapsed, because fewer than half of them are heard";
    registry.register("failover_brake", what, number(brake.engaged.into()));
}

async fn phases(mirror: &Mirror) -> BTreeMap<Phase, i64> {
    let mut counts = BTreeMap::new();
    let mut last: Option<VmId> = None;
    loop {
        let counted = mirror.read(|state| {
            let mut counted = 0;
            for (id, vm) in state.vms_from(last).take(PIECE) {
                *counts.entry(vm.effective_status().phase).or_insert(0) += 1;
                last = Some(*id);
                counted += 1;
            }
            counted
        });
        if counted < PIECE {
            return counts;
        }
        tokio::task::yield_now().await;
    }
}

const fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "pending",
        Phase::Scheduled => "scheduled",
        Phase::Preparing => "preparing",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
        Phase::Unreachable => "unreachable",
        Phase::Deleting => "deleting",
        Phase::Migrating => "migrating",
        Phase::Paused => "paused",
    }
}

const fn liveness_name(liveness: Liveness) -> &'static str {
    match liveness {
        Liveness::Up => "up",
        Liveness::FastLapsed => "fast-lapsed",
        Liveness::Dead => "dead",
    }
}

const fn mode_name(mode: HostMode) -> &'static str {
    match mode {
        HostMode::Active => "active",
        HostMode::Cordoned => "cordoned",
        HostMode::Draining => "draining",
    }
}
