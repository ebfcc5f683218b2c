//! What hosts report of VMs.
//!
//! A report counts only if it comes from the host that the VM was given, and is about its present incarnation, or from the
//! target of its migration (`migration.rs`): anything else is about the past. A report that says nothing new writes nothing.

use std::collections::BTreeMap;

use uncloud_proto::ids::HostId;

use super::{
    VmEntry,
    command::{ObservedState, Refusal, VmObservation},
    draft::Draft,
    exports, migration,
    placement::{assign_deletion, mark_unreachable, replace_fenced, status_or_new},
    snapshots, vms,
};
use crate::model::{
    Desired, EventType, Phase, VmRecord, VmStatusRecord,
    migration::{Migration, MigrationProgress},
    vm::DiskHome,
};

pub(super) fn take(draft: &mut Draft<'_>, host: HostId, report: &VmObservation) -> Result<(), Refusal> {
    let entry = match draft.vm(report.vm) {
        Ok(entry) => entry,
        // Not known, or not to be touched: the session tells people of it.
        Err(Refusal::NoVm(_) | Refusal::Unreadable(_)) => return Ok(()),
        Err(other) => return Err(other),
    };
    let placement = &entry.record.placement;
    let arrives = |m: &Migration| m.target == host && m.incarnation == report.incarnation;
    if entry.record.migration.as_ref().is_some_and(arrives) {
        return migration::from_target(draft, &entry, report);
    }
    if placement.host != Some(host) || placement.incarnation != report.incarnation {
        return Ok(());
    }
    let desired = entry.record.desired;
    if report.state == ObservedState::Deleted && desired == Desired::Deleted {
        let by = draft.host_name(host);
        return match exports::keeper_of_files(draft.state, &entry.record, host) {
            Ok(None) => vms::remove(draft, &entry, format!("host `{by}` has removed it")),
            // P5
            Ok(Some(keeper)) => assign_deletion(
                draft,
                &entry,
                (*entry.record).clone(),
                keeper,
                "removes its disks from the pool that it exports",
            ),
            Err(pool) => mark_unreachable(
                draft,
                &entry,
                format!(
                    "host `{by}` has removed it; its disks are left, because there is not exactly one host that exports pool `{pool}`"
                ),
            ),
        };
    }
    let entry = note_disks(draft, entry, host, report)?;
    let entry = migration::from_source(draft, entry, report)?;
    if entry.record.placement.host != Some(host) {
        return Ok(()); // It has been handed over.
    }
    let entry = snapshots::take_report(draft, entry, report)?;
    if entry.record.placement.incarnation != report.incarnation {
        return Ok(()); // It has been put back, and starts anew.
    }
    let on = format!("on host `{}`", draft.host_name(host));
    match report.state {
        // Never asked for at this incarnation: what was asked for since will be reported, too.
        ObservedState::Deleted | ObservedState::Forgotten | ObservedState::Incoming => Ok(()),
        // It stands still until it is told how its migration ended.
        ObservedState::HandedOver | ObservedState::Received => observe(draft, &entry, report, Phase::Migrating),
        ObservedState::Preparing => observe(draft, &entry, report, Phase::Preparing),
        ObservedState::Starting => observe(draft, &entry, report, Phase::Starting),
        ObservedState::Stopping => observe(draft, &entry, report, Phase::Stopping),
        ObservedState::Running => {
            if !matches!(phase(&entry), Some(Phase::Running | Phase::Migrating)) {
                draft.vm_event(&entry.record, EventType::Started, format!("runs {on}"));
            }
            note_trouble(draft, &entry, report, &on);
            observe(draft, &entry, report, Phase::Running)
        }
        ObservedState::Failed => {
            let known = entry.current_status().is_some_and(|s| s.phase == Phase::Failed && s.reason == report.reason);
            if !known {
                draft.vm_event(&entry.record, EventType::Failed, format!("{on}: {}", report.reason));
            }
            observe(draft, &entry, report, Phase::Failed)
        }
        // While its disks are being put back it does not matter how it came to rest.
        ObservedState::PoweredOff | ObservedState::Stopped if entry.record.revert.is_some() => {
            observe(draft, &entry, report, Phase::Stopped)
        }
        // R3: what may start elsewhere has something done to its disks first.
        ObservedState::Stopped if desired == Desired::Running && entry.record.has_disk_orders() => {
            observe(draft, &entry, report, Phase::Stopped)
        }
        ObservedState::Fenced if entry.record.revert.is_some() && desired != Desired::Deleted => {
            draft.vm_event(&entry.record, EventType::Fenced, format!("{on}: {}", report.reason));
            let entry = keep_exit(&entry, report);
            replace_fenced(draft, &entry)
        }
        ObservedState::PoweredOff => powered_off(draft, &entry, report, &on),
        // Over for good under this incarnation.
        ObservedState::Stopped | ObservedState::Fenced => match desired {
            Desired::Running => {
                if entry.record.is_moving_out() && report.state == ObservedState::Stopped {
                    draft.vm_event(&entry.record, EventType::Stopped, format!("has stopped {on}, to start elsewhere"));
                } else {
                    draft.vm_event(&entry.record, EventType::Fenced, format!("{on}: {}", report.reason));
                }
                let entry = keep_exit(&entry, report);
                replace_fenced(draft, &entry)
            }
            Desired::Stopped | Desired::Deleted => stopped(draft, &entry, report, &on),
        },
    }
}

/// A guest that executes and yet does not do well: people hear of it when that begins and when it ends.
fn note_trouble(draft: &mut Draft<'_>, entry: &VmEntry, report: &VmObservation, on: &str) {
    let ran = entry.current_status().filter(|s| matches!(s.phase, Phase::Running | Phase::Migrating));
    let before = ran.map_or("", |s| s.reason.as_str());
    match (before.is_empty(), report.reason.is_empty()) {
        (true, false) => draft.vm_event(&entry.record, EventType::Troubled, format!("{on}: {}", report.reason)),
        (false, true) => draft.vm_event(&entry.record, EventType::Recovered, format!("{on}: no more: {before}")),
        (true, true) | (false, false) => {}
    }
}

fn phase(entry: &VmEntry) -> Option<Phase> {
    entry.current_status().map(|s| s.phase)
}

/// The guest switched itself off. That is what its user wants from now on. But if the agent has not carried out the
/// newest restart yet, one is on its way to it, and when that arrives it starts the guest again under this incarnation:
/// whatever the user has asked for since, it is not over for good.
fn powered_off(draft: &mut Draft<'_>, entry: &VmEntry, report: &VmObservation, on: &str) -> Result<(), Refusal> {
    if report.restarts_done < entry.record.restarts {
        return observe(draft, entry, report, Phase::Stopping);
    }
    match entry.record.desired {
        Desired::Running => {
            let record = VmRecord { desired: Desired::Stopped, paused: false, ..(*entry.record).clone() };
            draft.vm_event(&record, EventType::PoweredOff, format!("the guest switched itself off {on}; it stays off"));
            let record = draft.put_vm(record)?;
            observe(draft, &VmEntry { record, ..entry.clone() }, report, Phase::Stopped)
        }
        Desired::Stopped | Desired::Deleted => stopped(draft, entry, report, on),
    }
}

fn stopped(draft: &mut Draft<'_>, entry: &VmEntry, report: &VmObservation, on: &str) -> Result<(), Refusal> {
    if phase(entry) != Some(Phase::Stopped) {
        let message = if report.reason.is_empty() {
            format!("has stopped {on}")
        } else {
            format!("has stopped {on}: {}", report.reason)
        };
        draft.vm_event(&entry.record, EventType::Stopped, message);
    }
    observe(draft, entry, report, Phase::Stopped)
}

/// Writes the status, if it says anything new.
fn observe(draft: &mut Draft<'_>, entry: &VmEntry, report: &VmObservation, phase: Phase) -> Result<(), Refusal> {
    let now = draft.cx.now;
    let before = status_or_new(entry, now);
    // A host that only removes what another one has left never has the VM itself.
    let only_removes = entry.current_status().is_some_and(|s| s.phase == Phase::Deleting);
    let phase = if only_removes { Phase::Deleting } else { phase };
    let since = match entry.current_status() {
        Some(current) if current.phase == phase => current.since,
        Some(_) | None => now,
    };
    let status = VmStatusRecord {
        phase,
        reason: report.reason.clone(),
        since,
        incarnation: report.incarnation,
        last_exit: report.last_exit.clone().or_else(|| before.last_exit.clone()),
        next_attempt: report.next_attempt,
        addresses: report.addresses.clone(),
        paused: report.paused && phase == Phase::Running,
        restarts_done: report.restarts_done,
        migration: progress(entry, report),
        ..before
    };
    if entry.status.as_deref() == Some(&status) {
        return Ok(());
    }
    draft.put_status(entry.record.id, status)
}

/// How far the migration under way is.
fn progress(entry: &VmEntry, report: &VmObservation) -> Option<MigrationProgress> {
    let migration = entry.record.migration.as_ref()?;
    let seen = report.migration.as_ref()?;
    (seen.progress.incarnation == migration.incarnation).then(|| seen.progress.clone())
}

/// How QEMU ended is kept when the VM gets a new incarnation.
fn keep_exit(entry: &VmEntry, report: &VmObservation) -> VmEntry {
    let mut entry = entry.clone();
    if let (Some(status), Some(exit)) = (&entry.status, &report.last_exit) {
        entry.status = Some(VmStatusRecord { last_exit: Some(exit.clone()), ..(**status).clone() }.into());
    }
    entry
}

/// Where a VM's disks lie if a host has made them.
pub(super) fn disk_home(draft: &Draft<'_>, record: &VmRecord, host: HostId) -> DiskHome {
    let host_pools = draft.peek_host(host).map(|host| host.pools.clone()).unwrap_or_default();
    let shared_id = |name: &str| host_pools.iter().find(|p| p.name == *name).and_then(|p| p.shared_id);
    let pools: BTreeMap<_, _> =
        record.spec.disks.iter().map(|disk| (disk.pool.clone(), shared_id(&disk.pool))).collect();
    DiskHome { host, pools }
}

/// From the first time that a host says so, the VM has disks, and they lie where that host has its pools now.
fn note_disks(draft: &mut Draft<'_>, entry: VmEntry, host: HostId, report: &VmObservation) -> Result<VmEntry, Refusal> {
    if !report.disks_ready || entry.record.disks_exist {
        return Ok(entry);
    }
    let disk_home = Some(disk_home(draft, &entry.record, host));
    let record = VmRecord { disks_exist: true, disk_home, clone_of: None, ..(*entry.record).clone() };
    let record = draft.put_vm(record)?;
    Ok(VmEntry { record, ..entry })
}
