//! What users ask of VMs: create, start, stop, restart, delete. Migrations are in `migration.rs`.

use std::{collections::BTreeSet, sync::Arc};

use uncloud_proto::ids::{HostId, ImageId, Incarnation, VmId};

use super::{
    VmEntry,
    absorb::needs,
    attach,
    clone::{self, Use},
    command::{Answer, ImageUse, NewVm, PowerChange, Refusal, RequestId},
    draft::Draft,
    full_name, images, migration,
    placement::{
        self, assign_deletion, deletion_request, find_host, give_host, home, lease_lapsed, park, placed_message,
        schedule,
    },
};
use crate::{
    model::{
        Desired, EventType, Extra, ImageRecord, Key, Phase, Record, RequestAnswer, VmRecord,
        image::{FileRole, ImageKind},
        vm::{CloneOf, Placement, VmSpec},
    },
    scheduler::{self, Choice, Home},
};

pub(super) fn create(draft: &mut Draft<'_>, request: Option<&RequestId>, new: &NewVm) -> Result<Answer, Refusal> {
    check_free(draft, new)?;
    let spec = resolved(draft, new)?;
    store(draft, request, new, spec, None)
}

/// Whether nobody has the id, the name and the MAC addresses of a new VM.
pub(super) fn check_free(draft: &Draft<'_>, new: &NewVm) -> Result<(), Refusal> {
    let id = new.id;
    for key in [Key::Vm(id), Key::VmStatus(id)] {
        if draft.state.is_unreadable(&key) {
            return Err(Refusal::Unreadable(key.to_string()));
        }
    }
    if draft.state.vms.contains_key(&id) {
        return Err(Refusal::Precondition(format!("there is already a VM with the id {id}")));
    }
    let name_key = Key::VmName { owner: new.owner.clone(), name: new.name.clone() };
    let taken = draft.state.vm_names.contains_key(full_name(&new.owner, &new.name).as_str());
    if taken || draft.state.is_unreadable(&name_key) {
        return Err(Refusal::VmNameTaken { owner: new.owner.clone(), name: new.name.clone() });
    }
    let mut macs = BTreeSet::new();
    for nic in &new.spec.nics {
        let taken =
            draft.state.macs.contains_key(nic.mac.as_str()) || draft.state.is_unreadable(&Key::Mac(nic.mac.clone()));
        if taken || !macs.insert(&nic.mac) {
            return Err(Refusal::MacTaken(nic.mac.clone()));
        }
    }
    Ok(())
}

/// Makes the records of a new VM of which everything has been checked, and finds a host for it.
pub(super) fn store(
    draft: &mut Draft<'_>,
    request: Option<&RequestId>,
    new: &NewVm,
    spec: VmSpec,
    clone_of: Option<CloneOf>,
) -> Result<Answer, Refusal> {
    let id = new.id;
    let now = draft.cx.now;
    let mut record = VmRecord {
        id,
        name: new.name.clone(),
        owner: new.owner.clone(),
        labels: new.labels.clone(),
        spec,
        pending: None,
        desired: new.desired,
        placement: Placement { host: None, incarnation: Incarnation::NONE, why: String::new(), since: now },
        migration: None,
        reserved: Incarnation::NONE,
        restarts: 0,
        restart_force: false,
        stop_force: false,
        paused: false,
        moving_out: Incarnation::NONE,
        disks_exist: false,
        disk_home: None,
        disk_generation: 0,
        disks_reserved: 0,
        disks_copied_from: None,
        clone_of,
        snapshots: Vec::new(),
        revert: None,
        reverts: 0,
        disk_orders: 0,
        created: now,
        extra: Extra::new(),
    };
    let message = match &record.clone_of {
        None => format!("created by owner `{}`", record.owner),
        Some(clone) => format!("created by owner `{}` as a copy of VM `{}`", record.owner, clone.name),
    };
    draft.vm_event(&record, EventType::Created, message);
    match new.desired {
        Desired::Running => match schedule(draft, &placement::request(&record)) {
            Ok(choice) => {
                let message = placed_message(draft, &choice);
                draft.vm_event(&record, EventType::Placed, message);
                let incarnation = Incarnation::NONE.next();
                record.placement = Placement { host: Some(choice.host), incarnation, why: choice.why, since: now };
            }
            Err(unplaceable) => {
                record.placement.why = unplaceable.summary();
                draft.vm_event(&record, EventType::Pending, format!("no host can take it: {}", record.placement.why));
            }
        },
        Desired::Stopped => record.placement.why = "created stopped; it is given a host when it is started".into(),
        Desired::Deleted => return Err(Refusal::Precondition("a VM cannot be created deleted".into())),
    }

    let record = draft.put_vm(record)?;
    draft.put(Key::VmName { owner: new.owner.clone(), name: new.name.clone() }, Record::VmName(id))?;
    for nic in &record.spec.nics {
        draft.put(Key::Mac(nic.mac.clone()), Record::Mac(id))?;
    }
    draft.remember(request, RequestAnswer::Vm { id, record: Box::new((*record).clone()) })?;
    Ok(Answer::Vm(record))
}

/// The spec with images by their ids, and with what they say where the spec says nothing.
fn resolved(draft: &Draft<'_>, new: &NewVm) -> Result<VmSpec, Refusal> {
    let mut spec = new.spec.clone();
    for (place, name) in &new.image_names {
        let field = place.field();
        let id = draft.state.resolve_image(name).map_err(|refusal| match refusal {
            Refusal::NoImage { name, .. } => Refusal::NoImage { field: field.clone(), name },
            other => Refusal::Invalid { field: field.clone(), problem: other.to_string() },
        })?;
        match *place {
            ImageUse::Kernel => {
                if let Some(kernel) = &mut spec.kernel {
                    kernel.image = id;
                }
            }
            ImageUse::Disk(i) => {
                if let Some(disk) = spec.disks.get_mut(i) {
                    disk.image = Some(id);
                }
            }
        }
    }
    if let Some(kernel) = &mut spec.kernel {
        let image = image(draft, ImageUse::Kernel, kernel.image, ImageKind::Kernel)?;
        if kernel.command_line.is_empty() {
            kernel.command_line.clone_from(&image.command_line);
        }
    }
    for (i, disk) in spec.disks.iter_mut().enumerate() {
        let field = format!("spec.disks[{i}].size_bytes");
        let invalid = |problem: String| Refusal::Invalid { field: field.clone(), problem };
        let smallest = match disk.image {
            Some(id) => {
                let image = image(draft, ImageUse::Disk(i), id, ImageKind::Disk)?;
                image.files.iter().find(|f| f.role == FileRole::Disk).and_then(|f| f.virtual_size_bytes).unwrap_or(0)
            }
            None => 0,
        };
        if disk.size_bytes == 0 {
            disk.size_bytes = smallest;
        }
        if disk.size_bytes == 0 {
            return Err(invalid("is required for a disk without an image".into()));
        }
        attach::check_cache(draft, disk, &format!("spec.disks[{i}].cache"))?;
        if disk.size_bytes < smallest {
            return Err(invalid(format!("is smaller than the image, which has {smallest} bytes")));
        }
    }
    Ok(spec)
}

impl ImageUse {
    /// The request's field.
    #[must_use]
    pub fn field(self) -> String {
        match self {
            Self::Kernel => "spec.kernel.image".to_owned(),
            Self::Disk(i) => format!("spec.disks[{i}].image"),
        }
    }
}

fn image<'a>(draft: &Draft<'a>, place: ImageUse, id: ImageId, kind: ImageKind) -> Result<&'a ImageRecord, Refusal> {
    let field = place.field();
    let Some(entry) = draft.state.images.get(&id) else {
        return Err(Refusal::NoImage { field, name: id.to_string() });
    };
    if entry.record.kind != kind {
        let (is, should) = match entry.record.kind {
            ImageKind::Disk => ("a disk", "a kernel"),
            ImageKind::Kernel => ("a kernel", "a disk"),
        };
        let problem = format!("names image `{}`, which is {is} and not {should}", entry.record.name);
        return Err(Refusal::Invalid { field, problem });
    }
    if let Some(problem) = images::unusable(&entry.record) {
        return Err(Refusal::Precondition(format!("{field} {problem}")));
    }
    Ok(&entry.record)
}

pub(super) fn set_desired(draft: &mut Draft<'_>, vm: VmId, change: PowerChange) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    if entry.record.desired == Desired::Deleted {
        return Err(being_deleted(&entry.record));
    }
    match change {
        PowerChange::Start => start(draft, &entry)?,
        PowerChange::Stop => stop(draft, &entry, false)?,
        PowerChange::ForceStop => stop(draft, &entry, true)?,
        PowerChange::Pause => pause(draft, &entry)?,
        PowerChange::Resume => resume(draft, &entry)?,
    }
    Ok(Answer::Vm(draft.vm(vm)?.record))
}

pub(super) fn being_deleted(record: &VmRecord) -> Refusal {
    Refusal::Precondition(format!("VM `{}` is being deleted", record.name))
}

/// Every step from stopped to running is a new incarnation: what an agent holds to be over for good under one
/// incarnation stays so.
fn start(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    if record.paused {
        return Err(Refusal::Precondition(format!("VM `{}` is paused; resume it instead", record.name)));
    }
    let was = record.desired;
    if was == Desired::Running {
        // Somebody who starts a VM that has failed wants it tried again now.
        let failed = entry.current_status().is_some_and(|s| s.phase == Phase::Failed);
        let lapsed =
            |host| draft.peek_host(host).is_some_and(|host| lease_lapsed(entry.record.spec.failover, host.liveness));
        return match record.placement.host {
            Some(host) if failed && !lapsed(host) => {
                draft.vm_event(&record, EventType::StartRequested, "a user asked for a new try".into());
                give_host(draft, entry, record, Choice { host, why: "a user asked for a new try".into() })
            }
            Some(_) | None => Ok(()),
        };
    }

    clone::check_unused(draft, &record, Use::Start)?;
    record.desired = Desired::Running;
    record.stop_force = false;
    draft.vm_event(&record, EventType::StartRequested, "a user asked for it".into());
    match record.placement.host {
        // It may still execute there, so it can be nowhere else.
        Some(host) if !entry.ended_for_good() => {
            check_room_where_it_is(draft, entry, host)?;
            let why = "it had not stopped there yet when it was started again".to_owned();
            give_host(draft, entry, record, Choice { host, why })?;
            // Unless the lease has run out there.
            let entry = draft.vm(entry.record.id)?;
            placement::displace(draft, &entry)
        }
        prefer => match find_host(draft, &mut record, prefer) {
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
        },
    }
}

/// A VM that has stopped, and whose disks are still worked on, has no room there any more and cannot go elsewhere: memory is never
/// promised twice.
fn check_room_where_it_is(draft: &mut Draft<'_>, entry: &VmEntry, host: HostId) -> Result<(), Refusal> {
    let Some(record) = draft.peek_host(host) else { return Ok(()) };
    let leaves =
        lease_lapsed(entry.record.spec.failover, record.liveness) && home(&entry.record) != Home::OnlyHost(host);
    if entry.holds_room() || leaves {
        return Ok(());
    }
    let (needed, limits) = (needs(&entry.record).resources, draft.limits());
    let Some(Err(why)) = scheduler::room(draft.view(), host, entry.record.id, needed, &limits) else { return Ok(()) };
    let host = draft.host_name(host);
    Err(Refusal::Precondition(format!(
        "host `{host}` has still to work on the disks of VM `{}` and {why} for it now; start it when that is done: then it is given a \
         host with room",
        entry.record.name
    )))
}

fn stop(draft: &mut Draft<'_>, entry: &VmEntry, force: bool) -> Result<(), Refusal> {
    let stopped = entry.record.desired == Desired::Stopped;
    if stopped && (!force || entry.record.stop_force) {
        return Ok(());
    }
    let entry = migration::give_up(draft, entry, "a user asked to stop the VM")?;
    let mut record = (*entry.record).clone();
    record.desired = Desired::Stopped;
    record.stop_force = force;
    record.paused = false;
    if record.placement.host.is_none() {
        record.placement.why = "stopped; it is given a host when it is started".into();
        record.placement.since = draft.cx.now;
    }
    let message = if force { "a user asked for it, by force" } else { "a user asked for it" };
    draft.vm_event(&record, EventType::StopRequested, message.into());
    draft.put_vm(record)?;
    Ok(())
}

/// The guest stands still from now on. It keeps its host and its room there.
fn pause(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let before = &entry.record;
    if before.paused {
        return Ok(());
    }
    let refuse = |why: &str| Err(Refusal::Precondition(format!("VM `{}` {why}", before.name)));
    if before.migration.is_some() {
        return refuse("is being migrated; pause it when that is over, or cancel that first");
    }
    let running = entry.current_status().is_some_and(|s| s.phase == Phase::Running);
    if before.desired != Desired::Running || !running {
        return refuse("does not run, so there is nothing to pause");
    }
    let mut record = (**before).clone();
    record.paused = true;
    draft.vm_event(&record, EventType::PauseRequested, "a user asked for it".into());
    draft.put_vm(record)?;
    Ok(())
}

fn resume(draft: &mut Draft<'_>, entry: &VmEntry) -> Result<(), Refusal> {
    let mut record = (*entry.record).clone();
    if !record.paused {
        return match record.desired {
            Desired::Running => Ok(()),
            Desired::Stopped | Desired::Deleted => {
                Err(Refusal::Precondition(format!("VM `{}` is stopped; start it instead", record.name)))
            }
        };
    }
    record.paused = false;
    draft.vm_event(&record, EventType::ResumeRequested, "a user asked for it".into());
    draft.put_vm(record)?;
    Ok(())
}

pub(super) fn restart(draft: &mut Draft<'_>, vm: VmId, force: bool) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    let before = &entry.record;
    match before.desired {
        Desired::Deleted => return Err(being_deleted(before)),
        Desired::Stopped => {
            return Err(Refusal::Precondition(format!("VM `{}` is stopped; start it instead", before.name)));
        }
        Desired::Running => {}
    }
    if before.placement.host.is_none() {
        let message = format!("VM `{}` has no host and does not run: {}", before.name, before.placement.why);
        return Err(Refusal::Precondition(message));
    }
    let entry = migration::give_up(draft, &entry, "a user asked to restart the VM")?;
    let mut record = (*entry.record).clone();
    record.restarts = record.restarts.saturating_add(1);
    record.restart_force = force;
    record.paused = false;
    let message = if force { "a user asked for a reset" } else { "a user asked for it" };
    draft.vm_event(&record, EventType::RestartRequested, message.into());
    Ok(Answer::Vm(draft.put_vm(record)?))
}

pub(super) fn delete(draft: &mut Draft<'_>, vm: VmId) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    if entry.record.desired == Desired::Deleted {
        return Ok(Answer::Vm(entry.record));
    }
    clone::check_unused(draft, &entry.record, Use::Delete)?;
    let entry = migration::give_up(draft, &entry, "a user deleted the VM")?;
    let mut record = (*entry.record).clone();
    record.desired = Desired::Deleted;
    record.paused = false;
    draft.vm_event(&record, EventType::DeleteRequested, "a user asked for it".into());
    if record.placement.host.is_none() {
        let answer = Arc::new(record.clone());
        delete_homeless(draft, &entry, record)?;
        return Ok(Answer::Vm(answer));
    }
    let record = draft.put_vm(record)?;
    let entry = VmEntry { record, ..entry };
    placement::displace(draft, &entry)?; // its host may be lost
    Ok(Answer::Vm(draft.vm(vm).map_or(entry.record, |e| e.record)))
}

/// Deletes a VM that has no host, so it executes nowhere. Its disks, if it has any, lie where it was.
pub(super) fn delete_homeless(draft: &mut Draft<'_>, entry: &VmEntry, record: VmRecord) -> Result<(), Refusal> {
    let home = home(&record);
    if home == Home::Anywhere {
        return remove(draft, entry, "it was never made on a host".into());
    }
    let host = match schedule(draft, &deletion_request(&record, home.clone())) {
        Ok(choice) => Some(choice.host),
        // None can now. The host that made the disks will do when it is back, whatever is wrong with it now.
        Err(_) => record.disk_home.as_ref().map(|h| h.host).filter(|&h| draft.peek_host(h).is_some()),
    };
    let Some(host) = host else {
        let message = format!("no host that can remove the disks of VM `{}` is up; try again when one is", record.name);
        return Err(Refusal::Precondition(message));
    };
    assign_deletion(draft, entry, record, host, "removes its disks")
}

/// Removes everything that is stored of a VM.
pub(super) fn remove(draft: &mut Draft<'_>, entry: &VmEntry, why: String) -> Result<(), Refusal> {
    let record = &entry.record;
    draft.delete(Key::Vm(record.id))?;
    if entry.status.is_some() {
        draft.delete(Key::VmStatus(record.id))?;
    }
    // A claim that is somebody else's, or that cannot be read, is left alone.
    if draft.state.vm_names.get(full_name(&record.owner, &record.name).as_str()) == Some(&record.id) {
        draft.delete(Key::VmName { owner: record.owner.clone(), name: record.name.clone() })?;
    }
    for nic in &record.spec.nics {
        if draft.state.macs.get(nic.mac.as_str()) == Some(&record.id) {
            draft.delete(Key::Mac(nic.mac.clone()))?;
        }
    }
    draft.vm_event(record, EventType::Deleted, why);
    Ok(())
}
