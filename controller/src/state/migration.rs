//! Moving a running VM to another host: how a migration begins, what its two hosts report of it, and how it ends.
//!
//! ```text
//!                  target listens          source has sent everything,
//!   begin ─▶ Preparing ─▶ Listening ─▶ ...  and target has everything  ─▶ hand_over: the VM is the target's
//!      └──────────┴───────────┴──────────────────┴────────────────────────▶ give_up:  the VM stays the source's
//! ```
//!
//! # Safety argument (P1)
//!
//! * **M1** A migration ends by one write, [`hand_over`] or [`dropped`], and both need the record to have that very
//!   migration and take it out. The writer makes them one after the other, so one of them happens and the other does not.
//! * **M2** The target lets the guest go on only when it is told RUN with the migration's incarnation, which is said only of
//!   what is stored as placed: after the hand-over. The incarnation was reserved for this migration and is never given to
//!   anything else, so after a give-up no such word is ever said.
//! * **M3** [`hand_over`] happens only after the source has said that it has sent everything. From then on the source lets
//!   the guest go on only when it is told RUN without this migration, which is said only after a give-up.
//!
//! Disks that only the source has are copied by the two QEMUs before the memory is sent:
//!
//! * **M6** There is a hand-over of such a VM only after the source has also said that all of its disks were copied, up to the
//!   guest's last write.
//! * **M7** The copies have a generation that was reserved for them. They become the VM's disks by the hand-over, and never without it.
//!   Its disks in pools that both hosts share are not copied, and keep the generation that they had.
//!
//! So after a hand-over only the target can execute, after a give-up only the source, and before either the source alone.
//! No lease and no time is part of the argument: who is late, cut off or restarted waits for the leader's word.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::ids::{HostId, Incarnation, VmId};
use uuid::Uuid;

use super::{
    VmEntry, absorb,
    command::{Answer, ObservedState, Refusal, VmObservation},
    draft::Draft,
    placement::{self, schedule, status_or_new},
    reports, snapshots, vms,
};
use crate::{
    model::{
        Desired, EventType, Extra, HostRecord, Liveness, OwnDisks, Phase, VmRecord, VmStatusRecord,
        migration::{Arrival, Migration, MigrationEnd, MigrationResult},
        vm::{Disk, DiskState, Placement},
    },
    scheduler::{self, Home, Limits, Request, Resources},
};

/// Migrations that a host may be part of at once, as source or as target: more only share its network, and each takes longer.
pub const MIGRATIONS_PER_HOST: usize = 2;

/// How a VM's disks get to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disks {
    /// It has them, or there are none.
    Shared,
    /// Those are copied that only its host has.
    Copied,
}

/// Somebody wants a VM to go to another host.
pub(super) fn begin(
    draft: &mut Draft<'_>,
    vm: VmId,
    to: Option<HostId>,
    secret: &str,
    bytes_per_second: u64,
    own: OwnDisks,
) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    let (source, disks) = may_leave(draft, &entry, own)?;
    let from = draft.host(source)?;
    let busy = busy(draft);
    if busy.contains(&source) {
        return refuse(format!(
            "host `{}` has {MIGRATIONS_PER_HOST} migrations under way, as many as it may; try again later",
            from.name
        ));
    }
    let request = request(&entry.record, &from, busy, disks);
    let (target, why) = match to {
        Some(host) => {
            let limits = draft.limits();
            if let Err(why) = scheduler::check(draft.view(), host, &request, &limits) {
                return refuse(format!("host `{}` {why}", draft.host_name(host)));
            }
            (host, "chosen by whoever asked for it".to_owned())
        }
        None => match schedule(draft, &request) {
            Ok(choice) => (choice.host, choice.why),
            Err(unplaceable) => {
                return refuse(format!("no host can take VM `{}`: {}", entry.record.name, unplaceable.summary()));
            }
        },
    };
    let mut record = (*entry.record).clone();
    let incarnation = record.next_incarnation();
    record.reserved = incarnation;
    let disk_generation = match disks {
        Disks::Shared => None,
        Disks::Copied => {
            // M7
            record.disks_reserved = record.next_disk_generation();
            keep_shared(&mut record);
            Some(record.disks_reserved)
        }
    };
    record.migration = Some(Migration {
        target,
        incarnation,
        since: draft.cx.now,
        why: why.clone(),
        secret: secret.to_owned(),
        bytes_per_second,
        arrival: Arrival::Preparing,
        address: String::new(),
        disk_generation,
        disks_address: String::new(),
        handed_over: None,
        extra: Extra::new(),
    });
    let message = format!("from host `{}` to host `{}`: {why}", from.name, draft.host_name(target));
    draft.vm_event(&record, EventType::MigrationStarted, message);
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// What the scheduler is asked for a VM that leaves `from`. `busy` are hosts that may not be part of another migration.
fn request(record: &VmRecord, from: &HostRecord, busy: BTreeSet<HostId>, disks: Disks) -> Request {
    let (accelerator, fingerprint) = (from.accelerator.kind, from.cpu.fingerprint.clone());
    let arrival = scheduler::Arrival::Migration { from: from.id, accelerator, fingerprint, busy };
    // Room for what it has, and for what it has from its next incarnation on.
    let Resources { vcpus, memory_mib } = absorb::needs(record).resources;
    // The CPU that the guest sees now.
    let request = Request { arrival, vcpus, memory_mib, cpu: record.spec.cpu, ..placement::request(record) };
    match disks {
        Disks::Shared => request,
        Disks::Copied => {
            let ids: BTreeMap<_, _> = shared_pools(record).collect();
            let pools = placement::room(record).into_iter();
            let pools = pools.map(|(pool, bytes)| if ids.contains_key(&pool) { (pool, 0) } else { (pool, bytes) });
            Request { pools: pools.collect(), home: Home::SharedPools { ids }, ..request }
        }
    }
}

/// The pools of its disks that hosts share, by name, with the id of the directory behind it.
fn shared_pools(record: &VmRecord) -> impl Iterator<Item = (String, Uuid)> {
    let pools = record.disk_home.iter().flat_map(|home| &home.pools);
    pools.filter_map(|(pool, id)| Some((pool.clone(), (*id)?)))
}

/// M7: what is not copied keeps the name that it has, also when the copies become the VM's disks.
fn keep_shared(record: &mut VmRecord) {
    let shared: BTreeSet<String> = shared_pools(record).map(|(pool, _)| pool).collect();
    let generation = record.disk_generation;
    for disk in record.spec.disks.iter_mut().filter(|d| shared.contains(&d.pool)) {
        disk.kept_generation.get_or_insert(generation);
    }
}

/// Whether there is a host that could take the VM from `from` if it were not busy or silent at the moment.
pub(super) fn could_later(draft: &mut Draft<'_>, record: &VmRecord, from: &HostRecord) -> bool {
    let disks = match placement::home(record) {
        Home::OnlyHost(_) => Disks::Copied,
        Home::Anywhere | Home::SharedPools { .. } => Disks::Shared,
    };
    let silent = BTreeSet::new();
    let limits = Limits { silent: &silent, ..draft.limits() };
    scheduler::place(draft.view(), &request(record, from, BTreeSet::new(), disks), &limits).is_ok()
}

fn refuse<T>(message: String) -> Result<T, Refusal> {
    Err(Refusal::Precondition(message))
}

/// The host that the VM may leave, or why it may not.
fn may_leave(draft: &Draft<'_>, entry: &VmEntry, own: OwnDisks) -> Result<(HostId, Disks), Refusal> {
    let record = &entry.record;
    let name = &record.name;
    if record.desired == Desired::Deleted {
        return Err(vms::being_deleted(record));
    }
    if let Some(migration) = &record.migration {
        let target = draft.host_name(migration.target);
        return refuse(format!("VM `{name}` is being migrated to host `{target}` already; wait, or cancel that first"));
    }
    if record.is_moving_out() {
        return refuse(format!("VM `{name}` is being stopped to be started on another host; wait for that"));
    }
    if record.paused {
        return refuse(format!("VM `{name}` is paused; resume it first"));
    }
    if record.revert.is_some() {
        return refuse(format!("the disks of VM `{name}` are being put back to a snapshot; wait until it runs again"));
    }
    // The target must have the machine that the source has.
    snapshots::check_disks_settled(record)?;
    let phase = entry.current_status().map(|s| s.phase);
    let (Desired::Running, Some(Phase::Running), Some(source)) = (record.desired, phase, record.placement.host) else {
        return refuse(format!("VM `{name}` does not run, so there is nothing to migrate; start it instead"));
    };
    // What its host has not carried out yet, the target would take for done.
    if entry.current_status().is_none_or(|s| s.restarts_done < record.restarts) {
        return refuse(format!("VM `{name}` is being restarted; try again when that is done"));
    }
    if draft.host(source)?.liveness != Liveness::Up {
        return refuse(format!("host `{}` of VM `{name}` is down", draft.host_name(source)));
    }
    match placement::home(record) {
        Home::OnlyHost(_) => {
            // First, so that nobody is told to do what would be refused.
            may_be_copied(draft, record, source)?;
            match own {
                OwnDisks::Copied => Ok((source, Disks::Copied)),
                OwnDisks::Stay => refuse(format!(
                    "VM `{name}` has a disk in a pool that only host `{}` has, and is not moved with it by itself; `uncloud vm \
                     migrate` copies its disks to another host while it runs, and so does a drain with `--copy-disks`",
                    draft.host_name(source)
                )),
            }
        }
        Home::Anywhere if !record.spec.disks.is_empty() => {
            refuse(format!("the disks of VM `{name}` are not known to be made yet; try again in a second"))
        }
        Home::Anywhere | Home::SharedPools { .. } => Ok((source, Disks::Shared)),
    }
}

/// M5: whether a VM's disks can be copied while it runs, or why not.
pub(super) fn may_be_copied(draft: &Draft<'_>, record: &VmRecord, source: HostId) -> Result<(), Refusal> {
    let name = &record.name;
    let host = draft.host_name(source);
    if !record.snapshots.is_empty() {
        return refuse(format!(
            "VM `{name}` has snapshots and a disk in a pool that only host `{host}` has; the disk would be copied without its \
             snapshots. Delete them first (`uncloud vm snapshot delete`)"
        ));
    }
    // Its machine does not have it, so nobody could copy it.
    let shared: BTreeSet<String> = shared_pools(record).map(|(pool, _)| pool).collect();
    let own = |disk: &&Disk| !shared.contains(&disk.pool);
    if let Some(disk) = record.spec.disks.iter().filter(own).find(|d| d.state != DiskState::Attached) {
        return refuse(format!(
            "VM `{name}` has a disk in a pool that only host `{host}` has, and disk `{}` is detached, so it would stay behind: attach it \
             (`uncloud vm attach-disk`) or delete it first",
            disk.name
        ));
    }
    Ok(())
}

/// Hosts that have as many migrations under way as they may.
pub(super) fn busy(draft: &Draft<'_>) -> BTreeSet<HostId> {
    let mut counts: BTreeMap<HostId, usize> = BTreeMap::new();
    let entries = draft.state.migrating().filter_map(|vm| draft.state.vm(vm));
    for entry in entries {
        let target = entry.record.migration.as_ref().map(|m| m.target);
        for host in entry.record.placement.host.into_iter().chain(target) {
            *counts.entry(host).or_default() += 1;
        }
    }
    counts.into_iter().filter_map(|(host, n)| (n >= MIGRATIONS_PER_HOST).then_some(host)).collect()
}

/// A user gives the migration up.
pub(super) fn cancel(draft: &mut Draft<'_>, vm: VmId) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    if entry.record.migration.is_none() {
        return refuse(format!("VM `{}` is not being migrated", entry.record.name));
    }
    Ok(Answer::Vm(give_up(draft, &entry, "a user cancelled it")?.record))
}

/// This very migration cannot go on.
pub(super) fn cannot_go_on(
    draft: &mut Draft<'_>,
    vm: VmId,
    migration: Incarnation,
    why: &str,
) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    if entry.record.migration.as_ref().is_some_and(|m| m.incarnation == migration) {
        give_up(draft, &entry, why)?;
    }
    Ok(Answer::Done)
}

/// The VM stays with its host. Returns it as it is then; as it was if it is not being migrated.
pub(super) fn give_up(draft: &mut Draft<'_>, entry: &VmEntry, why: &str) -> Result<VmEntry, Refusal> {
    if entry.record.migration.is_none() {
        return Ok(entry.clone());
    }
    let mut record = (*entry.record).clone();
    let after = dropped(draft, entry, &mut record, why);
    let record = draft.put_vm(record)?;
    if let Some(status) = &after.status {
        draft.put_status(record.id, (**status).clone())?;
    }
    Ok(VmEntry { record, ..after })
}

/// M1: takes the migration out of a record that is about to be written, if it has one. Returns the VM with what its status
/// is to say of it.
pub(super) fn dropped(draft: &mut Draft<'_>, entry: &VmEntry, record: &mut VmRecord, why: &str) -> VmEntry {
    let mut entry = entry.clone();
    if let Some(migration) = record.migration.take() {
        let message = format!("to host `{}`: {why}", draft.host_name(migration.target));
        draft.vm_event(record, EventType::MigrationGivenUp, message);
        entry.status = Some(ended(draft, &entry, &migration, MigrationResult::GivenUp, why).into());
    }
    entry
}

fn ended(
    draft: &Draft<'_>,
    entry: &VmEntry,
    migration: &Migration,
    result: MigrationResult,
    reason: &str,
) -> VmStatusRecord {
    let (incarnation, target, at) = (migration.incarnation, migration.target, draft.cx.now);
    let end = MigrationEnd { incarnation, target, result, reason: reason.to_owned(), at };
    VmStatusRecord { migration: None, last_migration: Some(end), ..status_or_new(entry, at) }
}

/// The target of the migration under way says what it is. Whoever calls has checked host and incarnation.
pub(super) fn from_target(draft: &mut Draft<'_>, entry: &VmEntry, report: &VmObservation) -> Result<(), Refusal> {
    let Some(migration) = &entry.record.migration else { return Ok(()) };
    let mut now = migration.clone();
    match report.state {
        // On its way, or the agent was restarted and looks.
        ObservedState::Preparing | ObservedState::Starting => return Ok(()),
        ObservedState::Incoming => {
            if let (Arrival::Preparing, Some(seen)) = (now.arrival, &report.migration)
                && !seen.address.is_empty()
            {
                now.arrival = Arrival::Listening;
                now.address.clone_from(&seen.address);
                now.disks_address.clone_from(&seen.disks_address);
                // M6
                let expected = disks_to_copy(&entry.record, &now);
                if seen.disks != expected || (expected > 0 && now.disks_address.is_empty()) {
                    let host = draft.host_name(now.target);
                    let why = format!("host `{host}` takes {} disks, not {expected}; update its agent", seen.disks);
                    return give_up(draft, entry, &why).map(drop);
                }
            }
        }
        ObservedState::Received => return advance(draft, entry, now, Arrived::Yes).map(drop),
        ObservedState::Running
        | ObservedState::Stopping
        | ObservedState::Stopped
        | ObservedState::PoweredOff
        | ObservedState::Failed
        | ObservedState::Fenced
        | ObservedState::Deleted
        | ObservedState::Forgotten
        | ObservedState::HandedOver => {
            let reason = if report.reason.is_empty() { "it is not ready for it any more" } else { &report.reason };
            let why = format!("host `{}`: {reason}", draft.host_name(now.target));
            return give_up(draft, entry, &why).map(drop);
        }
    }
    advance(draft, entry, now, Arrived::No).map(drop)
}

/// The host that has the VM reports on it. Returns the VM as it is with what that means for its migration.
pub(super) fn from_source(draft: &mut Draft<'_>, entry: VmEntry, report: &VmObservation) -> Result<VmEntry, Refusal> {
    let Some(migration) = entry.record.migration.clone() else { return Ok(entry) };
    let seen = report.migration.as_ref().filter(|m| m.progress.incarnation == migration.incarnation);
    match report.state {
        // M6
        ObservedState::HandedOver
            if seen.is_some_and(|seen| seen.disks != disks_to_copy(&entry.record, &migration)) =>
        {
            let failure = seen.map(|seen| seen.failure.clone()).filter(|f| !f.is_empty());
            give_up(
                draft,
                &entry,
                &failure.unwrap_or_else(|| "its disks were not copied; update its host's agent".to_owned()),
            )
        }
        ObservedState::HandedOver if seen.is_some() => {
            let handed_over = migration.handed_over.or(Some(draft.cx.now));
            let arrived = draft.cx.arrived.get(&entry.record.id) == Some(&migration.incarnation);
            let arrived = if arrived { Arrived::Yes } else { Arrived::No };
            advance(draft, &entry, Migration { handed_over, ..migration }, arrived)
        }
        ObservedState::Running | ObservedState::HandedOver => match seen {
            Some(seen) if !seen.failure.is_empty() => give_up(draft, &entry, &seen.failure),
            // M3: it has sent everything, and does not know of it any more.
            None if migration.handed_over.is_some() => give_up(draft, &entry, "its host does not know of it any more"),
            Some(_) | None => Ok(entry),
        },
        // The agent was restarted and looks, or the guest is on its way out.
        ObservedState::Starting | ObservedState::Stopping => Ok(entry),
        // It has sent everything, and what it has left is of no use any more: the target may have it yet.
        ObservedState::Failed if migration.handed_over.is_some() => Ok(entry),
        ObservedState::Preparing
        | ObservedState::Stopped
        | ObservedState::PoweredOff
        | ObservedState::Failed
        | ObservedState::Fenced
        | ObservedState::Deleted
        | ObservedState::Forgotten
        | ObservedState::Incoming
        | ObservedState::Received => {
            let why = if report.reason.is_empty() { "the VM does not run any more" } else { &report.reason };
            give_up(draft, &entry, why)
        }
    }
}

/// M6: how many disks are copied.
fn disks_to_copy(record: &VmRecord, migration: &Migration) -> u32 {
    let copied =
        record.spec.disks.iter().filter(|d| migration.disk_generation.is_some() && d.kept_generation.is_none());
    u32::try_from(copied.count()).unwrap_or(u32::MAX)
}

/// Whether the target has the whole guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrived {
    Yes,
    No,
}

/// The migration is further. When both sides are done, the VM changes hosts in the same write. What the target has is not stored for itself
/// ([`Context::arrived`](super::command::Context)).
fn advance(draft: &mut Draft<'_>, entry: &VmEntry, migration: Migration, arrived: Arrived) -> Result<VmEntry, Refusal> {
    if migration.handed_over.is_some() && arrived == Arrived::Yes && takes_over(draft, &migration) {
        return hand_over(draft, entry, &migration);
    }
    if entry.record.migration.as_ref() == Some(&migration) {
        return Ok(entry.clone());
    }
    let record = VmRecord { migration: Some(migration), ..(*entry.record).clone() };
    let record = draft.put_vm(record)?;
    Ok(VmEntry { record, ..entry.clone() })
}

/// Whether the target is heard. If it is not, the source is the better place for the VM.
fn takes_over(draft: &Draft<'_>, migration: &Migration) -> bool {
    let target = draft.peek_host(migration.target);
    target.is_some_and(|h| h.liveness == Liveness::Up) && !draft.cx.silent.contains(&migration.target)
}

/// M3: the source has sent everything and stands still, the target has it. From this write on the VM is the target's.
fn hand_over(draft: &mut Draft<'_>, entry: &VmEntry, migration: &Migration) -> Result<VmEntry, Refusal> {
    let now = draft.cx.now;
    let from = entry.record.placement.host.map_or_else(String::new, |host| draft.host_name(host));
    let to = draft.host_name(migration.target);
    let mut record = (*entry.record).clone();
    record.migration = None;
    let why = format!("migrated from host `{from}`: {}", migration.why);
    record.placement = Placement { host: Some(migration.target), incarnation: migration.incarnation, why, since: now };
    if let Some(generation) = migration.disk_generation {
        // M7: in the same write its disks are the copies, and the old ones are not its disks any more.
        record.disks_copied_from.get_or_insert(record.disk_generation);
        record.disk_generation = generation;
        // What hosts share is what it was, also while the target has trouble with it.
        let shared: Vec<_> = shared_pools(&record).collect();
        let mut home = reports::disk_home(draft, &record, migration.target);
        home.pools.extend(shared.into_iter().map(|(pool, id)| (pool, Some(id))));
        record.disk_home = Some(home);
    }
    draft.vm_event(&record, EventType::Migrated, format!("from host `{from}` to host `{to}`"));
    let status = VmStatusRecord {
        phase: Phase::Migrating,
        reason: format!("goes on on host `{to}`"),
        since: now,
        incarnation: migration.incarnation,
        addresses: Vec::new(),
        next_attempt: None,
        ..ended(draft, entry, migration, MigrationResult::Done, "")
    };
    let record = draft.put_vm(record)?;
    draft.put_status(record.id, status.clone())?;
    Ok(VmEntry { record, status: Some(status.into()), ..entry.clone() })
}
