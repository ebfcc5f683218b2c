//! Giving hosts to VMs, and taking them away from hosts that are lost.
//!
//! # Safety argument (P1)
//!
//! A VM leaves a host in four ways only, and each knows that it does not execute there:
//!
//! * [`displace`]: the host's record says that the lease the VM lives under has surely run out (`health/` decided, and
//!   the host takes part again only through `RegisterHost`, which makes it Up in the same order of writes);
//! * [`replace_fenced`]: the host itself says that the VM was fenced under its present incarnation;
//! * `vms::start`: the host itself says that it has stopped under its present incarnation
//!   ([`VmEntry::ended_for_good`]);
//! * `migration::hand_over`: the host itself says that it has sent the VM to the target of this very migration, and it
//!   lets it execute no more unless it is told that the migration was given up.
//!
//! Everything else leaves the VM where it is.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, VmId},
};

use super::{VmEntry, attach, command::Refusal, draft::Draft, exports, migration, vms};
use crate::{
    model::{
        Desired, EventType, Extra, HostRecord, Key, Liveness, Phase, VmRecord, VmStatusRecord,
        vm::{CpuModel, DiskCache, DiskHome, DiskState, Failover, OnDiskLoss, Placement},
    },
    scheduler::{self, Arrival, Choice, Home, Place, Request, Unplaceable},
};

/// Whether the lease that VMs of this class live under has surely run out on a host of this liveness.
#[must_use]
pub const fn lease_lapsed(class: Failover, liveness: Liveness) -> bool {
    match (class, liveness) {
        (Failover::Fast, Liveness::FastLapsed | Liveness::Dead) | (Failover::Patient, Liveness::Dead) => true,
        (Failover::Fast, Liveness::Up)
        | (Failover::Patient, Liveness::Up | Liveness::FastLapsed)
        | (Failover::Hold, Liveness::Up | Liveness::FastLapsed | Liveness::Dead) => false,
    }
}

/// Where the disks of a VM are, for the scheduler. Disks that no host has said to be made are nowhere.
#[must_use]
pub fn home(vm: &VmRecord) -> Home {
    if !vm.disks_exist || vm.spec.disks.is_empty() {
        return Home::Anywhere;
    }
    let Some(disk_home) = &vm.disk_home else {
        // Written by a program that did not keep it. The host that has the VM has its disks.
        return vm.placement.host.map_or(Home::SharedPools { ids: BTreeMap::new() }, Home::OnlyHost);
    };
    at(disk_home, vm)
}

/// Where it can be started: where its disks are, or those are that they are to be copies of.
fn start_home(vm: &VmRecord) -> Home {
    match &vm.clone_of {
        Some(clone) if !vm.disks_exist && !vm.spec.disks.is_empty() => at(&clone.home, vm),
        Some(_) | None => home(vm),
    }
}

fn at(disk_home: &DiskHome, vm: &VmRecord) -> Home {
    let mut ids = BTreeMap::new();
    for disk in &vm.spec.disks {
        match disk_home.pools.get(&disk.pool) {
            Some(Some(id)) => ids.insert(disk.pool.clone(), *id),
            Some(None) | None => return Home::OnlyHost(disk_home.host),
        };
    }
    Home::SharedPools { ids }
}

/// The order in which VMs that need hosts are given them: higher priority first, and of equals the largest first, which are the
/// hardest to fit.
#[must_use]
pub fn placing_order(vm: &VmRecord) -> impl Ord + use<> {
    (Reverse(vm.spec.priority), Reverse(vm.next_spec().memory_mib), vm.id)
}

/// What the scheduler is asked for this VM when it is given a host the next time. It has no favourite.
#[must_use]
pub fn request(vm: &VmRecord) -> Request {
    let next = vm.next_spec();
    Request {
        vm: vm.id,
        vcpus: next.vcpus,
        memory_mib: next.memory_mib,
        pools: pools(vm),
        writeback_pools: writeback_pools(vm),
        bridges: next.bridges(),
        host_labels: vm.spec.host_labels.clone(),
        group: vm.spec.anti_affinity_group.clone(),
        home: start_home(vm),
        prefer: None,
        cpu: next.cpu,
        arrival: Arrival::Start,
        holds: holds(vm),
    }
}

/// The hosts on which it may be promised something (`absorb.rs`).
fn holds(vm: &VmRecord) -> Vec<HostId> {
    vm.placement.host.into_iter().chain(vm.migration.as_ref().map(|m| m.target)).collect()
}

/// The pools of its disks, and how much of each they take if they are made anew.
pub(super) fn room(vm: &VmRecord) -> BTreeMap<String, u64> {
    let mut pools = BTreeMap::new();
    for disk in &vm.spec.disks {
        let sum: &mut u64 = pools.entry(disk.pool.clone()).or_default();
        *sum = sum.saturating_add(disk.size_bytes);
    }
    pools
}

/// The pools in which it has disks that are written late. What a user wants to go need not fit any more.
fn writeback_pools(vm: &VmRecord) -> BTreeSet<String> {
    let disks = vm.spec.disks.iter().filter(|disk| match disk.state {
        DiskState::Attached | DiskState::Attaching | DiskState::Returning => disk.cache == DiskCache::Writeback,
        DiskState::Detaching | DiskState::Detached | DiskState::Deleting => false,
    });
    disks.map(|disk| disk.pool.clone()).collect()
}

/// The pools of its disks, and how much of each is for disks that are not there yet.
fn pools(vm: &VmRecord) -> BTreeMap<String, u64> {
    let mut pools = BTreeMap::new();
    for disk in &vm.spec.disks {
        let new = if vm.disks_exist { 0 } else { disk.size_bytes };
        let sum: &mut u64 = pools.entry(disk.pool.clone()).or_default();
        *sum = sum.saturating_add(new);
    }
    pools
}

/// Where the VM's disks are, or are about to be made or copied to, and how large they may become there.
pub(super) fn disk_places(vm: &VmRecord) -> BTreeMap<Place, u64> {
    let mut places = BTreeMap::new();
    for disk in &vm.spec.disks {
        let place = match (&vm.disk_home, vm.placement.host) {
            (Some(home), _) => match home.pools.get(&disk.pool) {
                Some(Some(id)) => Place::Shared(*id),
                Some(None) | None => Place::OnHost(home.host, disk.pool.clone()),
            },
            (None, Some(host)) => Place::OnHost(host, disk.pool.clone()),
            (None, None) => continue,
        };
        let coming = vm.migration.as_ref().filter(|m| m.disk_generation.is_some());
        let copied = |place: &Place| matches!(place, Place::OnHost(..));
        let coming = coming.filter(|_| copied(&place)).map(|m| Place::OnHost(m.target, disk.pool.clone()));
        for place in coming.into_iter().chain([place]) {
            let sum: &mut u64 = places.entry(place).or_default();
            *sum = sum.saturating_add(disk.size_bytes);
        }
    }
    places
}

pub(super) fn schedule(draft: &mut Draft<'_>, request: &Request) -> Result<Choice, Unplaceable> {
    let limits = draft.limits();
    scheduler::place(draft.view(), request, &limits)
}

/// Finds a host for a VM that may leave the one that it has. Gives up disks that are lost with their host, if that is
/// what its user chose and another host takes the VM.
///
/// W4: whoever calls this knows that the VM does not execute, and gives it a new incarnation or leaves it without a host. So
/// here its pending changes become what it is made of.
pub(super) fn find_host(
    draft: &mut Draft<'_>,
    record: &mut VmRecord,
    prefer: Option<HostId>,
) -> Result<Choice, Unplaceable> {
    // Whether its lease has run out is judged by the class that it had.
    let class = record.spec.failover;
    record.begin_next();
    let mut request = Request { prefer, ..request(record) };
    let new_disks = disks_given_up(draft, record, class);
    if new_disks {
        request.home = Home::Anywhere;
    }
    let choice = schedule(draft, &request)?;
    if !new_disks {
        return Ok(choice);
    }
    record.disks_exist = false;
    record.disk_home = None;
    record.disk_generation = record.next_disk_generation();
    record.disks_copied_from = None;
    // They are lost with the disks.
    record.snapshots.clear();
    record.revert = None;
    attach::begin_anew(record);
    Ok(Choice { why: format!("{}; with NEW disks, the old ones are lost with their host", choice.why), ..choice })
}

fn disks_given_up(draft: &Draft<'_>, record: &VmRecord, class: Failover) -> bool {
    let Home::OnlyHost(host) = home(record) else { return false };
    match record.spec.on_disk_loss {
        OnDiskLoss::Wait => false,
        OnDiskLoss::Recreate => match draft.peek_host(host) {
            Some(host) => lease_lapsed(class, host.liveness),
            None => !draft.state.is_unreadable(&Key::Host(host)),
        },
    }
}

/// Gives a VM a host: a new incarnation. What was last seen of it says nothing any more.
pub(super) fn give_host(
    draft: &mut Draft<'_>,
    entry: &VmEntry,
    mut record: VmRecord,
    choice: Choice,
) -> Result<(), Refusal> {
    let now = draft.cx.now;
    let entry = &migration::dropped(draft, entry, &mut record, &choice.why);
    let incarnation = record.next_incarnation();
    leave_disks(draft, entry, &mut record, Some(choice.host));
    // R4
    if let Some(revert) = &mut record.revert {
        revert.at_rest = false;
    }
    record.placement = Placement { host: Some(choice.host), incarnation, why: choice.why, since: now };
    let record = draft.put_vm(record)?;
    if let Some(status) = &entry.status {
        let reason = record.placement.why.clone();
        let status = VmStatusRecord {
            paused: false,
            phase: Phase::Scheduled,
            reason,
            incarnation,
            addresses: Vec::new(),
            next_attempt: None,
            since: now,
            ..(**status).clone()
        };
        draft.put_status(record.id, status)?;
    }
    Ok(())
}

/// A host may have begun disks and not have said so. Where only it has them, they are left behind with it: a new
/// generation makes sure that they are never taken for the VM's, should it come back there.
fn leave_disks(draft: &Draft<'_>, before: &VmEntry, record: &mut VmRecord, to: Option<HostId>) {
    let before = &before.record;
    let Some(old) = before.placement.host.filter(|&old| Some(old) != to) else { return };
    if !before.disks_exist
        && !before.spec.disks.is_empty()
        && draft.peek_host(old).is_none_or(|old| !shared_on(&old, before))
    {
        record.disk_generation = record.next_disk_generation();
        record.disks_copied_from = None;
    }
}

/// A VM that should run has no host. The caller knows that it executes nowhere.
pub(super) fn park(draft: &mut Draft<'_>, entry: &VmEntry, mut record: VmRecord, why: String) -> Result<(), Refusal> {
    let now = draft.cx.now;
    let entry = &migration::dropped(draft, entry, &mut record, &why);
    let had_host = record.placement.host.is_some();
    let since = if had_host { now } else { record.placement.since };
    leave_disks(draft, entry, &mut record, None);
    record.placement = Placement { host: None, why, since, ..record.placement };
    let record = draft.put_vm(record)?;
    if had_host && let Some(status) = &entry.status {
        let reason = record.placement.why.clone();
        let status = VmStatusRecord {
            phase: Phase::Pending,
            reason,
            incarnation: record.placement.incarnation,
            addresses: Vec::new(),
            next_attempt: None,
            since: now,
            ..(**status).clone()
        };
        draft.put_status(record.id, status)?;
    }
    Ok(())
}

/// Finds a host for a VM that should have one: pending, on a lost host, or deleted and left over by a removed host.
/// Nothing changes if there is nothing to do, or nothing new to say.
pub(super) fn place(draft: &mut Draft<'_>, vm: VmId) -> Result<(), Refusal> {
    let entry = draft.vm(vm)?;
    match (entry.record.desired, entry.record.placement.host) {
        (Desired::Running, None) => place_pending(draft, &entry),
        (Desired::Deleted, None) => vms::delete_homeless(draft, &entry, (*entry.record).clone()),
        (Desired::Deleted, Some(host)) if draft.peek_host(host).is_none() => {
            if draft.state.is_unreadable(&Key::Host(host)) {
                return Ok(()); // it is there, whatever it is
            }
            vms::remove(draft, &entry, "its host has been removed from the cluster, and its disks with it".into())
        }
        (Desired::Running | Desired::Deleted, Some(_)) => displace(draft, &entry),
        (Desired::Stopped, _) => Ok(()),
    }
}

fn place_pending(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    match find_host(draft, &mut record, None) {
        Ok(choice) => {
            let message = placed_message(draft, &choice);
            draft.vm_event(&record, EventType::Placed, message);
            give_host(draft, entry, record, choice)
        }
        Err(unplaceable) => {
            let why = unplaceable.summary();
            if why == record.placement.why {
                return Ok(());
            }
            park(draft, entry, record, why)
        }
    }
}

pub(super) fn placed_message(draft: &Draft<'_>, choice: &Choice) -> String {
    format!("placed on host `{}`: {}", draft.host_name(choice.host), choice.why)
}

/// Moves a VM away from a host on which its lease has surely run out, if that is so.
pub(super) fn displace(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let Some((host, host_record)) = entry.record.placement.host.and_then(|id| Some((id, draft.peek_host(id)?))) else {
        return Ok(());
    };
    if !lease_lapsed(entry.record.spec.failover, host_record.liveness) {
        return Ok(());
    }
    let from = format!("host `{}` is down ({})", host_record.name, lapse_words(entry.record.spec.failover));
    match entry.record.desired {
        Desired::Stopped => mark_unreachable(draft, entry, format!("{from}; it is not started again")),
        Desired::Deleted => move_deletion(draft, entry, &host_record, &from),
        Desired::Running => match home(&entry.record) {
            Home::OnlyHost(home) if home == host => match entry.record.spec.on_disk_loss {
                OnDiskLoss::Wait => mark_unreachable(
                    draft,
                    entry,
                    format!("{from} and has the only copy of its disks; it waits for the host"),
                ),
                OnDiskLoss::Recreate => recreate(draft, entry, &from),
            },
            Home::Anywhere | Home::SharedPools { .. } | Home::OnlyHost(_) => fail_over(draft, entry, &from),
        },
    }
}

const fn lapse_words(class: Failover) -> &'static str {
    match class {
        Failover::Fast => "its fast lease ran out",
        Failover::Patient => "its patient lease ran out",
        Failover::Hold => "its leases ran out",
    }
}

fn fail_over(draft: &mut Draft<'_>, entry: &VmEntry, from: &str) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    match find_host(draft, &mut record, None) {
        Ok(choice) => {
            let message = format!("{from}; moved to host `{}`: {}", draft.host_name(choice.host), choice.why);
            draft.vm_event(&record, EventType::FailedOver, message);
            give_host(draft, entry, record, choice)
        }
        Err(unplaceable) => {
            let why = unplaceable.summary();
            draft.vm_event(&record, EventType::Pending, format!("{from}; no host can take it: {why}"));
            park(draft, entry, record, why)
        }
    }
}

/// Gives up disks that are lost with their host. As long as no host can take the VM it stays with its disks: the host
/// may be back first.
fn recreate(draft: &mut Draft<'_>, entry: &VmEntry, from: &str) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    match find_host(draft, &mut record, None) {
        Ok(choice) => {
            let host = draft.host_name(choice.host);
            draft.vm_event(&record, EventType::FailedOver, format!("{from}; moved to host `{host}`: {}", choice.why));
            give_host(draft, entry, record, choice)
        }
        Err(unplaceable) => {
            let why = unplaceable.summary();
            mark_unreachable(draft, entry, format!("{from}, and no host can take it with new disks: {why}"))
        }
    }
}

/// Has another host remove the disks of a deleted VM, if another host can.
fn move_deletion(draft: &mut Draft<'_>, entry: &VmEntry, old: &HostRecord, from: &str) -> Result<(), Refusal> {
    let record = (*entry.record).clone();
    if record.spec.disks.is_empty() {
        return vms::remove(draft, entry, format!("{from}; it has no disks"));
    }
    // It takes no VMs, maybe, but this.
    if let Ok(Some(keeper)) = exports::keeper_of_files(draft.state, &record, old.id) {
        let host = draft.host_name(keeper);
        draft.vm_event(&record, EventType::Placed, format!("{from}; host `{host}` removes its disks"));
        return assign_deletion(draft, entry, record, keeper, "removes its disks");
    }
    let home = match home(&record) {
        // Not said to be made; the lost host may have begun them.
        Home::Anywhere if shared_on(old, &record) => Home::SharedPools { ids: shared_ids(old) },
        Home::Anywhere => Home::OnlyHost(old.id),
        known @ (Home::SharedPools { .. } | Home::OnlyHost(_)) => known,
    };
    match schedule(draft, &deletion_request(&record, home)) {
        Ok(choice) => {
            let host = draft.host_name(choice.host);
            draft.vm_event(&record, EventType::Placed, format!("{from}; host `{host}` removes its disks"));
            assign_deletion(draft, entry, record, choice.host, "removes its disks")
        }
        Err(_) => mark_unreachable(draft, entry, format!("{from}, and no other host can remove its disks now")),
    }
}

/// Removing disks takes neither CPU nor memory nor a network, and no label forbids it.
pub(super) fn deletion_request(vm: &VmRecord, home: Home) -> Request {
    Request {
        vm: vm.id,
        vcpus: 0,
        memory_mib: 0,
        // Nothing is made any more.
        pools: pools(vm).into_keys().map(|pool| (pool, 0)).collect(),
        writeback_pools: BTreeSet::new(),
        bridges: BTreeSet::new(),
        host_labels: BTreeMap::new(),
        group: None,
        home,
        prefer: None,
        // No guest is started. What every host has.
        cpu: CpuModel::V2,
        arrival: Arrival::Removal,
        holds: holds(vm),
    }
}

/// A host is to remove the disks of a deleted VM that never executes there.
pub(super) fn assign_deletion(
    draft: &mut Draft<'_>,
    entry: &VmEntry,
    mut record: VmRecord,
    host: HostId,
    why: &str,
) -> Result<(), Refusal> {
    let now = draft.cx.now;
    let entry = &migration::dropped(draft, entry, &mut record, why);
    let incarnation = record.next_incarnation();
    record.placement = Placement { host: Some(host), incarnation, why: why.to_owned(), since: now };
    let record = draft.put_vm(record)?;
    let mut status = status_or_new(entry, now);
    status.phase = Phase::Deleting;
    status.reason = format!("host `{}` {why}", draft.host_name(host));
    status.incarnation = incarnation;
    status.since = now;
    status.next_attempt = None;
    draft.put_status(record.id, status)
}

/// Whether every pool that the VM uses is a shared one on this host.
fn shared_on(host: &HostRecord, vm: &VmRecord) -> bool {
    let ids = shared_ids(host);
    pools(vm).keys().all(|pool| ids.contains_key(pool))
}

fn shared_ids(host: &HostRecord) -> BTreeMap<String, uuid::Uuid> {
    host.pools.iter().filter_map(|pool| Some((pool.name.clone(), pool.shared_id?))).collect()
}

/// The VM stays with a host that is lost.
pub(super) fn mark_unreachable(draft: &mut Draft<'_>, entry: &VmEntry, reason: String) -> Result<(), Refusal> {
    let current = entry.current_status();
    if entry.record.desired == Desired::Stopped && current.is_some_and(|s| s.phase == Phase::Stopped) {
        // It does not execute, and takes up no room there, whatever is still to be done to its disks.
        return Ok(());
    }
    // Where only disks are left to be removed, no guest may execute.
    let only_disks = entry.record.desired == Desired::Deleted
        && current.is_some_and(|s| s.phase == Phase::Deleting || s.phase == Phase::Stopped);
    let phase = if only_disks { Phase::Deleting } else { Phase::Unreachable };
    if current.is_some_and(|s| s.phase == phase && s.reason == reason) {
        return Ok(());
    }
    let now = draft.cx.now;
    let mut status = status_or_new(entry, now);
    if current.is_none_or(|s| s.phase != phase) {
        draft.vm_event(&entry.record, EventType::Unreachable, reason.clone());
        status.since = now;
    }
    status.phase = phase;
    status.reason = reason;
    status.incarnation = entry.record.placement.incarnation;
    status.next_attempt = None;
    draft.put_status(entry.record.id, status)
}

/// The status as it is stored, to be changed, or one that says nothing yet.
pub(super) fn status_or_new(entry: &VmEntry, now: WallTime) -> VmStatusRecord {
    entry.status.as_deref().cloned().unwrap_or_else(|| VmStatusRecord {
        phase: Phase::Scheduled,
        reason: String::new(),
        since: now,
        incarnation: entry.record.placement.incarnation,
        addresses: Vec::new(),
        last_exit: None,
        next_attempt: None,
        paused: false,
        restarts_done: 0,
        migration: None,
        last_migration: None,
        extra: Extra::new(),
    })
}

/// The VM's host says that it was fenced under its present incarnation: it gets a new one, on the same host if that
/// may have it.
pub(super) fn replace_fenced(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    let prefer = record.placement.host;
    match find_host(draft, &mut record, prefer) {
        Ok(choice) => {
            let message = placed_message(draft, &choice);
            draft.vm_event(&record, EventType::Placed, message);
            give_host(draft, entry, record, choice)
        }
        Err(unplaceable) => {
            let why = unplaceable.summary();
            draft.vm_event(&record, EventType::Pending, format!("no host can take it: {why}"));
            park(draft, entry, record, why)
        }
    }
}
