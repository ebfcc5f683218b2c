//! What happens to hosts: they join, return, are cordoned, are declared lost, and go.

use std::sync::Arc;

use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, VmId},
};

use super::{
    command::{Answer, FailoverChange, HostFacts, Lapsed, Refusal},
    decide::MAX_PLACEMENTS,
    draft::Draft,
    placement::{self, mark_unreachable, placing_order},
};
use crate::model::{
    ClusterRecord, Desired, DrainHow, EventType, Extra, FailoverOff, HostMode, HostRecord, Key, Liveness, OwnDisks,
    Record, Subject, host::Pool, vm::Failover,
};

pub(super) fn register(draft: &mut Draft<'_>, facts: &HostFacts) -> Result<Answer, Refusal> {
    let state = draft.state;
    let before = match draft.host(facts.id) {
        Ok(record) => Some(record),
        Err(Refusal::NoHost(_)) => None,
        Err(other) => return Err(other),
    };
    if let Some(&other) = state.host_names.get(&facts.name).and_then(|ids| ids.iter().find(|&&id| id != facts.id)) {
        return Err(Refusal::HostNameTaken { name: facts.name.clone(), other });
    }
    let now = draft.cx.now;
    let Some(before) = before else {
        let record = HostRecord {
            id: facts.id,
            name: facts.name.clone(),
            labels: facts.labels.clone(),
            vcpus: facts.vcpus,
            memory_mib: facts.memory_mib,
            pools: facts.pools.clone(),
            accelerator: facts.accelerator.clone(),
            migration_address: facts.migration_address.clone(),
            cpu: facts.cpu.clone(),
            bridges: facts.bridges.clone(),
            mode: HostMode::Active,
            mode_reason: String::new(),
            drain_how: DrainHow::LiveOnly,
            drain_disks: OwnDisks::Stay,
            liveness: Liveness::Up,
            liveness_since: now,
            agent_version: facts.agent_version.clone(),
            boot_id: facts.boot_id,
            created: now,
            extra: Extra::new(),
        };
        let message = format!("joined with {} CPU threads and {} MiB of memory", record.vcpus, record.memory_mib);
        draft.host_event(&record, EventType::HostJoined, message);
        draft.put_host(record)?;
        return Ok(Answer::Done);
    };

    let heard = before.liveness == Liveness::Up && !draft.cx.silent.contains(&facts.id);
    if before.boot_id != facts.boot_id && heard {
        return Err(Refusal::DuplicateHost(facts.id, before.boot_id));
    }
    let mut record = HostRecord {
        name: facts.name.clone(),
        labels: facts.labels.clone(),
        vcpus: facts.vcpus,
        memory_mib: facts.memory_mib,
        pools: facts.pools.clone(),
        accelerator: facts.accelerator.clone(),
        migration_address: facts.migration_address.clone(),
        cpu: facts.cpu.clone(),
        bridges: facts.bridges.clone(),
        agent_version: facts.agent_version.clone(),
        boot_id: facts.boot_id,
        ..(*before).clone()
    };
    if record.liveness != Liveness::Up {
        record.liveness = Liveness::Up;
        record.liveness_since = now;
        let how = if record.boot_id == before.boot_id { "without having been restarted" } else { "after a restart" };
        draft.host_event(&record, EventType::HostReturned, format!("is back {how}"));
    } else if record != *before {
        let message = format!("registered with changes: {}", differences(&before, &record).join(", "));
        draft.host_event(&record, EventType::HostChanged, message);
    }
    if record != *before {
        draft.put_host(record)?;
    }
    Ok(Answer::Done)
}

fn differences(before: &HostRecord, now: &HostRecord) -> Vec<&'static str> {
    [
        (before.name != now.name, "name"),
        (before.labels != now.labels, "labels"),
        (before.vcpus != now.vcpus, "CPU threads"),
        (before.memory_mib != now.memory_mib, "memory"),
        (before.pools != now.pools, "pools"),
        (before.accelerator != now.accelerator, "accelerator"),
        (before.migration_address != now.migration_address, "migration address"),
        (before.cpu != now.cpu, "CPU"),
        (before.bridges != now.bridges, "bridges"),
        (before.agent_version != now.agent_version, "version"),
        (before.boot_id != now.boot_id, "restarted"),
    ]
    .into_iter()
    .filter_map(|(differs, what)| differs.then_some(what))
    .collect()
}

pub(super) fn update_pools(draft: &mut Draft<'_>, host: HostId, pools: &[Pool]) -> Result<Answer, Refusal> {
    let before = draft.host(host)?;
    if before.pools == pools {
        return Ok(Answer::Done);
    }
    let record = HostRecord { pools: pools.to_vec(), ..(*before).clone() };
    let problems: Vec<String> = record
        .pools
        .iter()
        .filter(|pool| !pool.problem.is_empty())
        .map(|pool| format!("`{}`: {}", pool.name, pool.problem))
        .collect();
    let message = match problems.as_slice() {
        [] => "its pools have changed; none has a problem".to_owned(),
        problems => format!("its pools have changed; {}", problems.join(", ")),
    };
    draft.host_event(&record, EventType::HostChanged, message);
    draft.put_host(record)?;
    Ok(Answer::Done)
}

/// How it is emptied counts for [`HostMode::Draining`] only.
pub(super) fn set_mode(
    draft: &mut Draft<'_>,
    host: HostId,
    mode: HostMode,
    drain: (DrainHow, OwnDisks),
    reason: &str,
) -> Result<Answer, Refusal> {
    let before = draft.host(host)?;
    let (drain_how, drain_disks) = if mode == HostMode::Draining { drain } else { Default::default() };
    let record = HostRecord { mode, mode_reason: reason.to_owned(), drain_how, drain_disks, ..(*before).clone() };
    if record == *before {
        return Ok(Answer::Done);
    }
    let (event, what) = match mode {
        HostMode::Active => (EventType::HostUncordoned, "takes new VMs again"),
        HostMode::Cordoned => (EventType::HostCordoned, "takes no new VMs"),
        HostMode::Draining => match drain_how {
            DrainHow::LiveOnly => (EventType::HostDraining, "takes no new VMs, and its VMs migrate to other hosts"),
            DrainHow::StopAndMove => (
                EventType::HostDraining,
                "takes no new VMs, and its VMs migrate to other hosts, or are stopped and started there",
            ),
        },
    };
    let what = match drain_disks {
        OwnDisks::Stay => what.to_owned(),
        OwnDisks::Copied => format!("{what}; disks that only it has are copied"),
    };
    let message = if reason.is_empty() { what } else { format!("{what}: {reason}") };
    draft.host_event(&record, event, message);
    draft.put_host(record)?;
    Ok(Answer::Done)
}

/// Forgets a host that is down. Deleted VMs that wait for it to remove their disks go with it: that is what removing
/// it says of the disks that only it has. Those that do not fit into one change are found by the next pass
/// ([`State::pending`](super::State::pending)).
pub(super) fn remove(draft: &mut Draft<'_>, host: HostId) -> Result<Answer, Refusal> {
    let record = draft.host(host)?;
    if record.liveness == Liveness::Up {
        let message =
            format!("host `{}` is up, or was not declared down yet; stop its agent and wait for that", record.name);
        return Err(Refusal::Precondition(message));
    }
    let vms: Vec<VmId> = draft.state.vms_on(host).collect();
    let mut left = Vec::new();
    for &vm in &vms {
        match draft.state.vms.get(&vm) {
            Some(entry) if entry.record.desired != Desired::Deleted => left.push(entry.record.name.clone()),
            Some(_) | None => {}
        }
    }
    if !left.is_empty() {
        let (count, more) = (left.len(), if left.len() > 5 { ", …" } else { "" });
        left.truncate(5);
        let message = format!(
            "host `{}` still has {count} VMs ({}{more}); delete them, or wait until they have moved",
            record.name,
            left.join(", ")
        );
        return Err(Refusal::Precondition(message));
    }
    draft.event(Subject::Host(host), &record.name, EventType::HostRemoved, "removed by a user".into());
    draft.delete(Key::Host(host))?;
    for vm in vms {
        if draft.is_full() {
            break;
        }
        super::decide::place_one(draft, vm)?;
    }
    Ok(Answer::Done)
}

pub(super) fn note_unknown_vm(draft: &mut Draft<'_>, host: HostId, vm: VmId) -> Result<Answer, Refusal> {
    let record = draft.host(host)?;
    if draft.state.vms.contains_key(&vm) {
        return Ok(Answer::Done); // it is known by now
    }
    let why =
        if draft.state.is_unreadable(&Key::Vm(vm)) { "its record cannot be read" } else { "there is no record of it" };
    draft.host_event(&record, EventType::UnknownVm, format!("has VM {vm}, and {why}; it is left alone"));
    Ok(Answer::Done)
}

/// A lease of a host has surely run out: the host is marked, and its VMs of the lapsed classes are moved, up to `limit`.
/// Idempotent; what is left over is found by the next pass.
pub(super) fn declare_lapsed(
    draft: &mut Draft<'_>,
    host: HostId,
    lapsed: Lapsed,
    limit: usize,
) -> Result<Answer, Refusal> {
    let before = draft.host(host)?;
    let liveness = match (before.liveness, lapsed) {
        (Liveness::Up | Liveness::FastLapsed, Lapsed::Fast) => Liveness::FastLapsed,
        (Liveness::Dead, Lapsed::Fast) | (_, Lapsed::Both) => Liveness::Dead,
    };
    if liveness != before.liveness {
        let record = HostRecord { liveness, liveness_since: draft.cx.now, ..(*before).clone() };
        let (event, message) = match lapsed {
            Lapsed::Fast => (EventType::HostLapsed, "no heartbeat for so long that its fast lease has surely run out"),
            Lapsed::Both => (EventType::HostDead, "no heartbeat for so long that both its leases have surely run out"),
        };
        draft.host_event(&record, event, message.into());
        draft.put_host(record)?;
    }

    let mut moved = 0;
    let mut vms: Vec<VmId> = draft.state.vms_on(host).collect();
    vms.sort_by_cached_key(|vm| draft.state.vm(*vm).map(|entry| placing_order(&entry.record)));
    for vm in vms {
        if moved >= limit.min(MAX_PLACEMENTS) || draft.is_full() {
            break;
        }
        let operations = draft.operations();
        match displace(draft, vm, liveness) {
            Ok(()) | Err(Refusal::NoVm(_) | Refusal::Unreadable(_)) => {}
            Err(other) => return Err(other),
        }
        if draft.operations() > operations {
            moved += 1;
        }
    }
    Ok(Answer::Done)
}

fn displace(draft: &mut Draft<'_>, vm: VmId, liveness: Liveness) -> Result<(), Refusal> {
    let entry = draft.vm(vm)?;
    if entry.record.spec.failover == Failover::Hold && liveness != Liveness::Up && !entry.ended_for_good() {
        let reason = "its host is down, and `failover: hold` keeps it there; it may still execute";
        return mark_unreachable(draft, &entry, reason.into());
    }
    placement::displace(draft, &entry)
}

/// The lengths of the leases that are granted from now on, for this leader's successors. While failover is off, not less than
/// what is left of that: it may have been switched off after the lengths were decided.
pub(super) fn set_leases(draft: &mut Draft<'_>, fast_lease_ms: u64, patient_lease_ms: u64) -> Result<Answer, Refusal> {
    let before = draft.state.cluster().map(|record| (**record).clone());
    let off = before.as_ref().and_then(|record| record.failover_off.as_ref());
    let left = off.map_or(0, |off| u64::try_from(off.left(draft.cx.now).as_millis()).unwrap_or(u64::MAX));
    let (fast_lease_ms, patient_lease_ms) = (fast_lease_ms.max(left), patient_lease_ms.max(left));
    let record = match before.clone() {
        Some(record) => ClusterRecord { fast_lease_ms, patient_lease_ms, ..record },
        None => ClusterRecord { fast_lease_ms, patient_lease_ms, failover_off: None, extra: Extra::new() },
    };
    if before.as_ref() == Some(&record) {
        return Ok(Answer::Done);
    }
    if before.is_some() {
        let message = format!("leases are {fast_lease_ms} ms (fast) and {patient_lease_ms} ms (patient)");
        draft.event(Subject::Cluster, "cluster", EventType::SettingsChanged, message);
    }
    draft.put(Key::Cluster, Record::Cluster(Arc::new(record)))?;
    Ok(Answer::Done)
}

/// Failover is switched off or on, for the whole cluster.
pub(super) fn set_failover(draft: &mut Draft<'_>, change: &FailoverChange) -> Result<Answer, Refusal> {
    let Some(before) = draft.state.cluster().map(|record| (**record).clone()) else {
        return Err(Refusal::Unreadable(Key::Cluster.to_string()));
    };
    let (record, event, message) = match change {
        FailoverChange::Off { for_ms, reason } => {
            let until = WallTime(draft.cx.now.0.saturating_add(*for_ms));
            let record = ClusterRecord {
                fast_lease_ms: before.fast_lease_ms.max(*for_ms),
                patient_lease_ms: before.patient_lease_ms.max(*for_ms),
                failover_off: Some(FailoverOff { until, for_ms: *for_ms, reason: reason.clone() }),
                extra: before.extra.clone(),
            };
            let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            let message = format!(
                "no host is declared lapsed, and no VM is killed for want of a lease, for {} s{why}",
                for_ms / 1000
            );
            (record, EventType::FailoverOff, message)
        }
        FailoverChange::On => {
            let record = ClusterRecord { failover_off: None, ..before.clone() };
            let message =
                "leases that were granted meanwhile are waited out before a host is declared lapsed".to_owned();
            (record, EventType::FailoverOn, message)
        }
    };
    if record != before {
        draft.event(Subject::Cluster, "cluster", event, message);
        draft.put(Key::Cluster, Record::Cluster(Arc::new(record)))?;
    }
    Ok(Answer::Done)
}
