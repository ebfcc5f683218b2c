//! Hosts.

use std::time::Duration;

use uncloud_proto::v1;

use super::timestamp;
use crate::{
    health::Hearing,
    model::{
        HostMode,
        host::{AcceleratorKind, Pool, PoolAccess},
    },
    sessions::LiveFacts,
    state::HostEntry,
};

/// What is known about a host and not stored.
#[derive(Clone, Debug)]
pub(crate) struct HostExtras {
    /// Whether it is heard.
    pub(crate) hearing: Hearing,
    /// How long ago its newest heartbeat came.
    pub(crate) heartbeat_age: Option<Duration>,
    /// What its session says. `None`: it has none.
    pub(crate) live: Option<LiveFacts>,
}

/// A host as it is now.
pub(crate) fn host(entry: &HostEntry, extras: &HostExtras) -> v1::Host {
    let record = &entry.record;
    let kind = match record.accelerator.kind {
        AcceleratorKind::Kvm => v1::AcceleratorKind::Kvm,
        AcceleratorKind::Tcg => v1::AcceleratorKind::Tcg,
    };
    let mode = match record.mode {
        HostMode::Active => v1::HostMode::Active,
        HostMode::Cordoned => v1::HostMode::Cordoned,
        HostMode::Draining => v1::HostMode::Draining,
    };
    let live = extras.live.as_ref();
    v1::Host {
        id: record.id.to_string(),
        name: record.name.clone(),
        labels: record.labels.clone().into_iter().collect(),
        capacity: Some(v1::Resources { vcpus: record.vcpus, memory_mib: record.memory_mib }),
        promised: Some(v1::Resources { vcpus: entry.promised.vcpus, memory_mib: entry.promised.memory_mib }),
        pools: record.pools.iter().map(|p| pool(p, live)).collect(),
        cpu: Some(v1::Cpu {
            name: record.cpu.name.clone(),
            features: record.cpu.features.iter().cloned().collect(),
            fingerprint: record.cpu.fingerprint.clone(),
        }),
        accelerator: Some(v1::Accelerator { kind: kind.into(), why: record.accelerator.why.clone() }),
        mode: mode.into(),
        state: host_state(extras.hearing).into(),
        reason: reason(entry, extras.hearing),
        agent_version: record.agent_version.clone(),
        vms: u32::try_from(entry.vms.len()).unwrap_or(u32::MAX),
        last_heartbeat_ms: live
            .and(extras.heartbeat_age)
            .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        created: timestamp(record.created),
        revision: entry.revision.0,
        bridges: record.bridges.iter().cloned().collect(),
        unknown_vms: live.map(|l| l.unknown_vms.iter().map(ToString::to_string).collect()).unwrap_or_default(),
    }
}

/// Whether a host is heard. A host of which one lease has surely run out is down: its VMs of that class are moved.
pub(crate) const fn host_state(hearing: Hearing) -> v1::HostState {
    match hearing {
        Hearing::Up => v1::HostState::Up,
        Hearing::Silent { .. } => v1::HostState::Silent,
        Hearing::FastLapsed | Hearing::Dead => v1::HostState::Down,
    }
}

fn reason(entry: &HostEntry, hearing: Hearing) -> String {
    let state = match hearing {
        Hearing::Up => None,
        // No number of seconds: a watch would have to say it again each second.
        Hearing::Silent { .. } => Some("its heartbeats do not come, but its lease may still be valid"),
        Hearing::FastLapsed => Some("its short lease has run out; patient VMs may still run there"),
        Hearing::Dead => Some("its leases have run out"),
    };
    let mode = match entry.record.mode {
        HostMode::Active => None,
        HostMode::Cordoned => Some("cordoned"),
        HostMode::Draining => Some("draining"),
    };
    let mode = mode.map(|m| match entry.record.mode_reason.as_str() {
        "" => m.to_owned(),
        why => format!("{m}: {why}"),
    });
    let parts: Vec<String> = state.map(ToOwned::to_owned).into_iter().chain(mode).collect();
    parts.join("; ")
}

fn pool(pool: &Pool, live: Option<&LiveFacts>) -> v1::Pool {
    let (kind, export_address) = match &pool.access {
        PoolAccess::Directory if pool.shared_id.is_some() => (v1::PoolKind::Shared, String::new()),
        PoolAccess::Directory => (v1::PoolKind::Local, String::new()),
        PoolAccess::Network => (v1::PoolKind::Network, String::new()),
        PoolAccess::Exported { address } => (v1::PoolKind::Exported, address.clone()),
    };
    v1::Pool {
        name: pool.name.clone(),
        kind: kind.into(),
        id: pool.shared_id.map(|id| id.to_string()).unwrap_or_default(),
        capacity_bytes: pool.capacity_bytes,
        free_bytes: live.and_then(|l| l.free_bytes.get(&pool.name).copied()).unwrap_or(0),
        problem: pool.problem.clone(),
        export_address,
    }
}
