//! Snapshots of a VM's disks: taken, deleted, and put back.
//!
//! The record says which snapshots there should be; the VM's host makes it so and says when it has. Both may happen any number of
//! times.
//!
//! # Safety argument (P5)
//!
//! Putting disks back destroys what was written since, so it must never be done after the guest has run again:
//!
//! * **R1** While a record has a `revert`, its VM is told to no host as RUN (`sessions/desired.rs`): the guest does not run between the
//!   request and the write that takes the revert out.
//! * **R2** That write is made only when the VM's own host, under the present incarnation, has said that this very revert was carried
//!   out (or its disks are given up for new ones). A host never carries a revert out that it was told for an older incarnation, or under
//!   a lease that is over; and the VM gets a new incarnation with that write, before it may run.
//! * **R3** Until then the VM is its host's as if it executed there (`has_disk_orders`): it goes elsewhere only when that host's lease has
//!   surely run out, or the host says that it will do nothing more under this incarnation.
//! * **R4** Disks in a network pool are put back by their storage host, which is told to only when the VM's host has said that nothing
//!   executes under the present incarnation ([`Revert::at_rest`]), and which serves them to nobody meanwhile.
//!   Afterwards it may serve them to that incarnation again, and nobody is there who could write what it had in mind before.

use uncloud_proto::ids::VmId;
use uuid::Uuid;

use super::{
    VmEntry,
    attach::{self, By, Executes},
    clone::{self, Use},
    command::{Answer, DisksObservation, ObservedState, Refusal, ServedObservation, VmObservation},
    draft::Draft,
    exports, placement, vms,
};
use crate::{
    model::{
        Desired, EventType, Phase, VmRecord,
        vm::{Disk, GuestAgent, Revert, Snapshot, SnapshotGuest, SnapshotState},
    },
    scheduler::Choice,
};

/// Snapshots that one VM may have. Each makes its disks' files larger, and what is told to its host.
pub const MAX_SNAPSHOTS: usize = 32;

/// The VM, if something may be done to its disks now.
pub(super) fn ready(draft: &Draft<'_>, vm: VmId) -> Result<VmEntry, Refusal> {
    let entry = draft.vm(vm)?;
    let record = &entry.record;
    let name = &record.name;
    if record.desired == Desired::Deleted {
        return Err(vms::being_deleted(record));
    }
    if record.migration.is_some() {
        return Err(Refusal::Precondition(format!("VM `{name}` is being migrated; try again when that is over")));
    }
    if !record.spec.disks.iter().any(Disk::is_in_machine) {
        return Err(Refusal::Precondition(format!("VM `{name}` has no disks")));
    }
    if !record.disks_exist {
        let message = format!("the disks of VM `{name}` are not made yet; start it, and try again when it runs");
        return Err(Refusal::Precondition(message));
    }
    Ok(entry)
}

pub(super) fn reverting(record: &VmRecord) -> Refusal {
    Refusal::Precondition(format!(
        "the disks of VM `{}` are being put back to a snapshot; wait until that is done",
        record.name
    ))
}

/// A snapshot and a copy are of the disks that the machine has: that must be known.
pub(super) fn check_disks_settled(record: &VmRecord) -> Result<(), Refusal> {
    match record.spec.disks.iter().find(|d| d.is_pending()) {
        None => Ok(()),
        Some(disk) => Err(Refusal::Precondition(format!(
            "disk `{}` of VM `{}` is being attached, detached or deleted; try again when that is done",
            disk.name, record.name
        ))),
    }
}

fn find<'a>(record: &'a VmRecord, name: &str) -> Result<&'a Snapshot, Refusal> {
    record.snapshots.iter().find(|s| s.name == name).ok_or_else(|| {
        let names: Vec<&str> = record.snapshots.iter().map(|s| s.name.as_str()).collect();
        let has = if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) };
        Refusal::Invalid {
            field: "snapshot".into(),
            problem: format!("names no snapshot of VM `{}`; {has}", record.name),
        }
    })
}

/// The snapshot, if it is there to go back to.
pub(super) fn when_taken<'a>(record: &'a VmRecord, name: &str) -> Result<&'a Snapshot, Refusal> {
    let snapshot = find(record, name)?;
    match snapshot.state {
        SnapshotState::Ready => Ok(snapshot),
        SnapshotState::Creating => {
            Err(Refusal::Precondition(format!("snapshot `{name}` is not taken yet; wait until it is READY")))
        }
        SnapshotState::Deleting => Err(Refusal::Precondition(format!("snapshot `{name}` is being deleted"))),
    }
}

/// A user wants a snapshot.
pub(super) fn create(draft: &mut Draft<'_>, vm: VmId, id: Uuid, name: &str) -> Result<Answer, Refusal> {
    let entry = ready(draft, vm)?;
    if entry.record.revert.is_some() {
        return Err(reverting(&entry.record));
    }
    check_disks_settled(&entry.record)?;
    let invalid = |problem: String| Refusal::Invalid { field: "snapshot".into(), problem };
    if entry.record.snapshots.iter().any(|s| s.name == name) {
        return Err(invalid(format!(
            "is `{name}`, and there is one of that name already; choose another, or delete that one"
        )));
    }
    if entry.record.snapshots.len() >= MAX_SNAPSHOTS {
        let problem = format!("would be one more than the {MAX_SNAPSHOTS} that a VM may have; delete one first");
        return Err(invalid(problem));
    }
    let mut record = (*entry.record).clone();
    record.snapshots.push(Snapshot {
        id,
        name: name.to_owned(),
        created: draft.cx.now,
        state: SnapshotState::Creating,
        guest: None,
        hold: first_hold(draft, &entry),
    });
    draft.vm_event(&record, EventType::SnapshotRequested, format!("a user wants snapshot `{name}`"));
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// The storage host of a VM in a network pool waits until the guest is ready, if there is one that could hold its file systems still.
fn first_hold(draft: &Draft<'_>, entry: &VmEntry) -> Option<Uuid> {
    let runs = entry.current_status().is_some_and(|s| s.phase == Phase::Running && !s.paused);
    let can = entry.record.spec.guest_agent == GuestAgent::Enabled && runs;
    let served = exports::network_pool(draft.state, &entry.record).is_some();
    (served && !can).then_some(Uuid::nil())
}

/// What the VM's host says of the holds under which its storage host takes snapshots.
fn take_holds(draft: &mut Draft<'_>, record: &mut VmRecord, report: &VmObservation) {
    let said = &report.disks;
    let can = record.spec.guest_agent == GuestAgent::Enabled;
    let mut words = Vec::new();
    for snapshot in &mut record.snapshots {
        match (snapshot.state, snapshot.hold) {
            // What does not run need not hold still, and what has no agent cannot.
            (SnapshotState::Creating, None) if report.state != ObservedState::Running || !can => {
                snapshot.hold = Some(Uuid::nil());
            }
            (SnapshotState::Creating, None) if said.ready.contains(&snapshot.id) => {
                snapshot.hold = Some(said.hold.unwrap_or_default());
            }
            (SnapshotState::Ready, Some(hold)) if !hold.is_nil() && snapshot.guest.is_none() => {
                if said.held == Some(hold) {
                    snapshot.guest = Some(SnapshotGuest::Frozen);
                    words.push(format!("the guest held its file systems still for snapshot `{}`", snapshot.name));
                } else if said.hold != Some(hold) || report.state != ObservedState::Running {
                    snapshot.guest = Some(SnapshotGuest::Running);
                    words.push(format!("the disks are in snapshot `{}` as after a power cut", snapshot.name));
                }
            }
            (SnapshotState::Creating | SnapshotState::Ready | SnapshotState::Deleting, _) => {}
        }
    }
    for words in words {
        draft.vm_event(record, EventType::SnapshotTaken, words);
    }
}

/// A user deletes a snapshot.
pub(super) fn delete(draft: &mut Draft<'_>, vm: VmId, name: &str) -> Result<Answer, Refusal> {
    let entry = ready(draft, vm)?;
    let snapshot = find(&entry.record, name)?;
    // Again.
    if snapshot.state == SnapshotState::Deleting {
        return Ok(Answer::Vm(entry.record));
    }
    if entry.record.revert.is_some_and(|r| r.snapshot == snapshot.id) {
        return Err(reverting(&entry.record));
    }
    clone::check_unused(draft, &entry.record, Use::DeleteSnapshot(snapshot))?;
    let (id, mut record) = (snapshot.id, (*entry.record).clone());
    for snapshot in record.snapshots.iter_mut().filter(|s| s.id == id) {
        snapshot.state = SnapshotState::Deleting;
    }
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// A user wants the disks as they were.
pub(super) fn revert(draft: &mut Draft<'_>, vm: VmId, name: &str) -> Result<Answer, Refusal> {
    let entry = ready(draft, vm)?;
    let snapshot = when_taken(&entry.record, name)?;
    // Again, while it is under way.
    if entry.record.revert.is_some_and(|r| r.snapshot == snapshot.id) {
        return Ok(Answer::Vm(entry.record));
    }
    clone::check_unused(draft, &entry.record, Use::Revert)?;
    let mut record = (*entry.record).clone();
    record.reverts += 1;
    record.revert = Some(Revert { snapshot: snapshot.id, number: record.reverts, at_rest: is_at_rest(&entry) });
    let message = format!("a user wants its disks as they were in snapshot `{name}`; what was written since is lost");
    draft.vm_event(&record, EventType::RevertRequested, message);
    // Without a host nobody could do it; it is done where the VM is given one.
    if record.placement.host.is_none() {
        let message = format!("VM `{}` has no host now: {}; try again when it has", record.name, record.placement.why);
        return Err(Refusal::Precondition(message));
    }
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// Whether the VM's host has said that nothing of the VM executes under the present incarnation, nor will.
fn is_at_rest(entry: &VmEntry) -> bool {
    entry.current_status().is_some_and(|s| s.phase == Phase::Stopped)
}

/// What the VM's host, under its present incarnation, says that it has done.
pub(super) fn take_report(draft: &mut Draft<'_>, entry: VmEntry, report: &VmObservation) -> Result<VmEntry, Refusal> {
    let unsettled = |s: &Snapshot| s.guest.is_none() && s.hold.is_some_and(|hold| !hold.is_nil());
    if !entry.record.has_disk_orders() && !entry.record.snapshots.iter().any(unsettled) {
        return Ok(entry);
    }
    let mut record = (*entry.record).clone();
    if exports::network_pool(draft.state, &record).is_none() {
        attach::take_report(draft, &mut record, &report.disks.orders, By::Host);
        return take_done(draft, entry, record, &report.disks);
    }
    let executes = match report.state {
        ObservedState::Stopped => Executes::No,
        _ => Executes::Perhaps,
    };
    // R4
    if let (Some(revert), Executes::No) = (&mut record.revert, executes) {
        revert.at_rest = true;
    }
    take_holds(draft, &mut record, report);
    attach::take_report(draft, &mut record, &report.disks.orders, By::Machine(executes));
    take_done(draft, entry, record, &DisksObservation::default())
}

/// What the storage host of a VM says that it has done for the present incarnation.
pub(super) fn take_served(draft: &mut Draft<'_>, entry: VmEntry, said: &ServedObservation) -> Result<(), Refusal> {
    if !entry.record.has_disk_orders() {
        return Ok(());
    }
    let mut record = (*entry.record).clone();
    let mut done = said.disks.clone();
    // R4: it was told nothing before.
    if record.revert.is_some_and(|r| !r.at_rest) {
        done.reverted = 0;
    }
    let idle = record.desired == Desired::Stopped && is_at_rest(&entry);
    let guest = if is_at_rest(&entry) { SnapshotGuest::Off } else { SnapshotGuest::Running };
    // What is taken under a hold is worth what the VM's host says that it lasted.
    let held = record.snapshots.iter().filter(|s| s.hold.is_some_and(|hold| !hold.is_nil())).map(|s| s.id);
    let held: Vec<Uuid> = held.collect();
    // It was told nothing before.
    let waits = |id: &Uuid| record.snapshots.iter().any(|s| s.id == *id && s.hold.is_none());
    done.made.retain(|id| !waits(id));
    done.guests = done.made.iter().filter(|id| !held.contains(id)).map(|&id| (id, guest)).collect();
    attach::take_report(
        draft,
        &mut record,
        &done.orders,
        By::Storage(if idle { Executes::No } else { Executes::Perhaps }),
    );
    if !said.trouble.is_empty() {
        draft.vm_event(&record, EventType::Troubled, format!("its storage host: {}", said.trouble));
    }
    take_done(draft, entry, record, &done).map(drop)
}

/// Stores a record whose single disks are up to date, with the rest of what was done.
fn take_done(
    draft: &mut Draft<'_>,
    entry: VmEntry,
    mut record: VmRecord,
    done: &DisksObservation,
) -> Result<VmEntry, Refusal> {
    for snapshot in &mut record.snapshots {
        if snapshot.state == SnapshotState::Creating && done.made.contains(&snapshot.id) {
            snapshot.state = SnapshotState::Ready;
            snapshot.guest = done.guests.get(&snapshot.id).copied();
            let guest = match snapshot.guest {
                Some(SnapshotGuest::Frozen) => "; the guest held its file systems still",
                Some(SnapshotGuest::Running) => "; the disks are in it as after a power cut",
                Some(SnapshotGuest::Off) | None => "",
            };
            let message = format!("snapshot `{}` is taken{guest}", snapshot.name);
            draft.vm_event(&entry.record, EventType::SnapshotTaken, message);
        }
    }
    for gone in record.snapshots.extract_if(.., |s| s.state == SnapshotState::Deleting && done.removed.contains(&s.id))
    {
        draft.vm_event(&entry.record, EventType::SnapshotDeleted, format!("snapshot `{}` is gone", gone.name));
    }
    // R2
    let reverted = record.revert.is_some_and(|r| r.number == done.reverted);
    if reverted {
        let name =
            record.revert.and_then(|r| record.snapshots.iter().find(|s| s.id == r.snapshot)).map(|s| s.name.clone());
        record.revert = None;
        let message = format!("its disks are as they were in snapshot `{}`", name.unwrap_or_default());
        draft.vm_event(&record, EventType::Reverted, message);
    }
    if record == *entry.record {
        return Ok(entry);
    }
    match (reverted, record.desired, record.placement.host) {
        (true, Desired::Running, Some(host)) => {
            let entry = VmEntry { record: draft.put_vm(record.clone())?, ..entry };
            let why = "its disks were put back there".to_owned();
            placement::give_host(draft, &entry, record, Choice { host, why })?;
            draft.vm(entry.record.id)
        }
        (true | false, Desired::Running | Desired::Stopped | Desired::Deleted, _) => {
            let record = draft.put_vm(record)?;
            Ok(VmEntry { record, ..entry })
        }
    }
}
