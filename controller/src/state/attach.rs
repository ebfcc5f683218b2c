//! Disks that come to a VM that is there, and go.
//!
//! The record says of each disk whether the machine should have it, and numbers what is still to be done for that. The VM's host makes it
//! so and says which numbers it has done; all of it may happen any number of times. Until then the VM is its host's as if it executed there
//! ([`VmRecord::has_disk_orders`]).
//!
//! A disk that was detached stays in the record: it takes up room, and is attached again or deleted by a person.
//!
//! # Safety argument (P5)
//!
//! * **D1** A report counts by the number of the order, which no other order has: a late one about an order of long ago says nothing about
//!   the newest.
//! * **D2** (agent/src/storage/plan.rs) The file of a disk that is attached has a random id in its name, so an order to delete one that is
//!   carried out late never finds another disk that has the same name.
//! * **D5** In a network pool two hosts have a part in an order. A disk that comes is there when its storage host has made it, and the machine
//!   has it or there is none. One that is to be deleted goes when the VM's host has said that no machine has it, and not before: only then
//!   is its storage host told to ([`step`], `sessions/serving.rs`).
//! * Snapshots are of all disks, so disks come and go only while there are none.

use uncloud_proto::ids::VmId;

use super::{
    VmEntry,
    clone::{self, Use},
    command::{Answer, DetachHow, DiskToAttach, Refusal},
    disks,
    draft::Draft,
    exports, snapshots, vms,
};
use crate::model::{
    Desired, EventType, Phase, VmRecord,
    vm::{Disk, DiskBus, DiskCache, DiskHotplug, DiskState, Firmware},
};

/// Disks that one VM may have, with those that are detached.
pub const MAX_DISKS: usize = 16;
/// Ports of an AHCI controller.
pub const MAX_SATA_DISKS: usize = 6;

/// Whether a VM's machine exists now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    /// It may: its disks come and go while it runs.
    MayExist,
    /// It surely does not, and the next one belongs to another incarnation.
    IsNot,
}

/// The VM, if its disks may come and go now.
fn ready(draft: &Draft<'_>, vm: VmId) -> Result<(VmEntry, Machine), Refusal> {
    let entry = draft.vm(vm)?;
    let record = &entry.record;
    let name = &record.name;
    let refuse = |why: String| Err(Refusal::Precondition(format!("VM `{name}` {why}")));
    if record.desired == Desired::Deleted {
        return Err(vms::being_deleted(record));
    }
    if record.migration.is_some() {
        return refuse("is being migrated; try again when that is over, or cancel it".into());
    }
    if record.revert.is_some() {
        return Err(snapshots::reverting(record));
    }
    if record.is_moving_out() {
        return refuse("is being stopped to be started on another host; try again when it runs there".into());
    }
    if let Some(snapshot) = record.snapshots.first() {
        return refuse(format!(
            "has snapshots, which are of all its disks (`{}`); delete them before disks come or go",
            snapshot.name
        ));
    }
    clone::check_unused(draft, record, Use::ChangeDisks)?;
    let stopped = entry.current_status().is_some_and(|s| s.phase == Phase::Stopped);
    let machine = match record.placement.host {
        None if record.disks_exist => {
            return refuse(format!("has no host now: {}; try again when it has", record.placement.why));
        }
        // Each of its disks is made a copy of the one that its source has; of a new one there is none.
        None if record.clone_of.is_some() => {
            return refuse("has disks that are still to be copied; try again when it runs".into());
        }
        None => Machine::IsNot,
        Some(_) if !record.disks_exist => {
            return refuse("has disks that are not made yet; try again when it runs".into());
        }
        Some(_) if stopped && record.desired == Desired::Stopped => Machine::IsNot,
        Some(_) => Machine::MayExist,
    };
    Ok((entry, machine))
}

fn invalid(field: &str, problem: String) -> Refusal {
    Refusal::Invalid { field: field.to_owned(), problem }
}

/// A user wants a VM to have one more disk.
pub(super) fn attach(draft: &mut Draft<'_>, vm: VmId, wanted: &DiskToAttach) -> Result<Answer, Refusal> {
    let (entry, machine) = ready(draft, vm)?;
    let mut record = (*entry.record).clone();
    let there = wanted.name.as_ref().and_then(|name| record.spec.disks.iter().position(|d| d.name == *name));
    let index = match there {
        Some(index) => again(&mut record, index, wanted)?,
        None => anew(&mut record, wanted)?,
    };
    fit(draft, &mut record, index, machine)?;
    let name = record.spec.disks[index].name.clone();
    match record.placement.host {
        // Made with the others, when it is started for the first time.
        None => {
            record.spec.disks[index].state = DiskState::Attached;
            record.spec.disks[index].order = 0;
        }
        Some(_) => number(&mut record, index),
    }
    draft.vm_event(&record, EventType::Updated, format!("a user attached disk `{name}`"));
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// A disk that was detached.
fn again(record: &mut VmRecord, index: usize, wanted: &DiskToAttach) -> Result<usize, Refusal> {
    let name = record.name.clone();
    let disk = &mut record.spec.disks[index];
    let has = match disk.state {
        DiskState::Detached => None,
        DiskState::Attached => Some("has a disk of that name; choose another name"),
        DiskState::Attaching | DiskState::Returning => Some("is being given a disk of that name already"),
        DiskState::Detaching => Some("is still losing its disk of that name; try again in a moment"),
        DiskState::Deleting => Some("has a disk of that name that is being deleted; try again in a moment"),
    };
    if let Some(has) = has {
        return Err(invalid("disk.name", format!("is `{}`, and VM `{name}` {has}", disk.name)));
    }
    if wanted.size_bytes != 0 && wanted.size_bytes != disk.size_bytes {
        let problem = format!(
            "is {}, and disk `{}`, which is detached, has {} bytes; leave it empty to attach that disk, or choose another \
             name for a new one",
            wanted.size_bytes, disk.name, disk.size_bytes
        );
        return Err(invalid("disk.size_bytes", problem));
    }
    if wanted.pool.as_ref().is_some_and(|pool| *pool != disk.pool) {
        let problem = format!("is another than that of disk `{}`, which is detached: `{}`", disk.name, disk.pool);
        return Err(invalid("disk.pool", problem));
    }
    disk.bus = wanted.bus.unwrap_or(disk.bus);
    disk.cache = wanted.cache.unwrap_or(disk.cache);
    disk.state = DiskState::Returning;
    Ok(index)
}

fn anew(record: &mut VmRecord, wanted: &DiskToAttach) -> Result<usize, Refusal> {
    let disks = &mut record.spec.disks;
    if disks.len() >= MAX_DISKS {
        let problem = format!(
            "would be one more than the {MAX_DISKS} that VM `{}` may have, with those that are detached; delete one first",
            record.name
        );
        return Err(invalid("disk", problem));
    }
    if wanted.size_bytes == 0 {
        let has: Vec<&str> = disks.iter().filter(|d| d.state == DiskState::Detached).map(|d| d.name.as_str()).collect();
        let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
        let problem = format!("is required for a new disk; disks of VM `{}` that are detached: {has}", record.name);
        return Err(invalid("disk.size_bytes", problem));
    }
    let free = || (0..=MAX_DISKS).map(|i| format!("disk{i}")).find(|n| disks.iter().all(|d| d.name != *n));
    let name = wanted.name.clone().or_else(free).unwrap_or_default();
    disks.push(Disk {
        name,
        pool: wanted.pool.clone().unwrap_or_else(|| "default".to_owned()),
        size_bytes: wanted.size_bytes,
        bus: wanted.bus.unwrap_or(DiskBus::Scsi),
        cache: wanted.cache.unwrap_or_default(),
        // D2
        id: Some(wanted.id),
        state: DiskState::Attaching,
        ..Disk::default()
    });
    Ok(disks.len() - 1)
}

/// Checks that the disk can be where it should be, and gives it its place.
fn fit(draft: &mut Draft<'_>, record: &mut VmRecord, index: usize, machine: Machine) -> Result<(), Refusal> {
    let disk = record.spec.disks[index].clone();
    match (machine, disk.bus) {
        (Machine::MayExist, DiskBus::Scsi) if record.spec.disk_hotplug == DiskHotplug::Enabled => {}
        (Machine::MayExist, DiskBus::Scsi) => {
            return Err(Refusal::Precondition(format!(
                "VM `{}` was started without a controller for disks that come while it runs; stop it, attach the disk, and \
                 start it: then it has one",
                record.name
            )));
        }
        (Machine::MayExist, DiskBus::Virtio | DiskBus::Sata) => {
            let problem = format!(
                "is {}, and VM `{}` runs: a VM that runs takes disks on the bus scsi only; choose that, or stop the VM first",
                disk.bus.word(),
                record.name
            );
            return Err(invalid("disk.bus", problem));
        }
        (Machine::IsNot, DiskBus::Scsi) => record.spec.disk_hotplug = DiskHotplug::Enabled,
        (Machine::IsNot, DiskBus::Virtio) => {}
        (Machine::IsNot, DiskBus::Sata) => {
            if record.spec.disks.iter().filter(|d| d.bus == DiskBus::Sata).count() > MAX_SATA_DISKS {
                let problem = format!("is sata, and VM `{}` has {MAX_SATA_DISKS} such disks already", record.name);
                return Err(invalid("disk.bus", problem));
            }
        }
    }
    if disk.bus == DiskBus::Scsi {
        let taken = |unit: &u32| {
            let others = record.spec.disks.iter().enumerate().filter(|(i, _)| *i != index);
            others.map(|(_, d)| d).any(|d| d.bus == DiskBus::Scsi && d.unit == *unit)
        };
        // What was detached finds its old place, unless it had another bus.
        let unit = std::iter::once(disk.unit).chain(0..).find(|unit| !taken(unit));
        record.spec.disks[index].unit = unit.unwrap_or_default();
    }
    check_pool(draft, record, &disk)?;
    check_network(draft, record)?;
    disks::check_room(draft, record, index, "disk.size_bytes")
}

/// The disk's pool must be one that the VM's host has, and that takes such a disk.
fn check_pool(draft: &Draft<'_>, record: &mut VmRecord, disk: &Disk) -> Result<(), Refusal> {
    check_cache(draft, disk, "disk.cache")?;
    if let Some(host) = record.placement.host {
        let pools = draft.peek_host(host).map(|host| host.pools.clone()).unwrap_or_default();
        let Some(pool) = pools.iter().find(|p| p.name == disk.pool) else {
            let names: Vec<&str> = pools.iter().map(|p| p.name.as_str()).collect();
            let problem = format!(
                "is `{}`, which host `{}` of VM `{}` does not have; it has: {}",
                disk.pool,
                draft.host_name(host),
                record.name,
                names.join(", ")
            );
            return Err(invalid("disk.pool", problem));
        };
        // P5: from now on the VM runs only where that pool is, whatever the host says of the disk and when.
        if let Some(home) = &mut record.disk_home {
            home.pools.entry(disk.pool.clone()).or_insert(pool.shared_id);
            // Whoever has disks in a pool of one host alone runs on that host.
            if pool.shared_id.is_none() {
                home.host = host;
            }
        }
    }
    Ok(())
}

/// One host has all disks of a VM, if they are reached over the network: two orders for one disk follow each other then.
fn check_network(draft: &Draft<'_>, record: &VmRecord) -> Result<(), Refusal> {
    let Some(pool) = exports::network_pool(draft.state, record) else { return Ok(()) };
    let Some(other) = record.spec.disks.iter().find(|d| d.pool != pool) else { return Ok(()) };
    let problem = format!(
        "is another pool than the other disks of VM `{}` are in: `{}` beside `{pool}`, which hosts reach over the network; \
         then all disks of a VM must lie in it",
        record.name, other.pool
    );
    Err(invalid("disk.pool", problem))
}

/// D3: what a killed VM has left in the memory of its host is written when another host may run it.
pub(super) fn check_cache(draft: &Draft<'_>, disk: &Disk, field: &str) -> Result<(), Refusal> {
    match disk.cache {
        DiskCache::None | DiskCache::Writethrough => return Ok(()),
        DiskCache::Writeback => {}
    }
    let mut pools = draft.state.hosts().flat_map(|(_, host)| &host.record.pools);
    if pools.any(|p| p.name == disk.pool && p.shared_id.is_some()) {
        let problem = format!(
            "is writeback, and pool `{}` is shared by hosts: what a killed VM has left in its host's memory would be written \
             when the VM runs on another one; choose none or writethrough, or a pool that one host has alone",
            disk.pool
        );
        return Err(invalid(field, problem));
    }
    Ok(())
}

/// D1
fn number(record: &mut VmRecord, index: usize) {
    record.disk_orders += 1;
    record.spec.disks[index].order = record.disk_orders;
}

/// A user wants a disk to go.
pub(super) fn detach(draft: &mut Draft<'_>, vm: VmId, name: &str, how: DetachHow) -> Result<Answer, Refusal> {
    let (entry, machine) = ready(draft, vm)?;
    let mut record = (*entry.record).clone();
    let index = disks::index_of(&record, name)?;
    let disk = &record.spec.disks[index];
    let state = match (disk.state, how) {
        // A call whose answer was lost may come again, and finds everything done.
        (DiskState::Detached | DiskState::Detaching, DetachHow::Keep)
        | (DiskState::Deleting, DetachHow::Keep | DetachHow::Delete) => return Ok(Answer::Vm(entry.record)),
        // Its host would say that no machine has it, whether it has made it or not.
        (DiskState::Attaching, DetachHow::Keep) => {
            return Err(Refusal::Precondition(format!(
                "disk `{name}` of VM `{}` is still being attached, and perhaps there is nothing to keep; try again in a \
                 moment, or delete it (--delete)",
                record.name
            )));
        }
        (DiskState::Attached | DiskState::Returning, DetachHow::Keep) => DiskState::Detaching,
        (
            DiskState::Attached
            | DiskState::Attaching
            | DiskState::Returning
            | DiskState::Detaching
            | DiskState::Detached,
            DetachHow::Delete,
        ) => DiskState::Deleting,
    };
    if index == 0 && (record.spec.kernel.is_none() || record.spec.firmware == Firmware::Uefi) {
        let problem = format!("is the disk that VM `{}` boots from; it cannot be detached", record.name);
        return Err(invalid("disk", problem));
    }
    let there = matches!(disk.state, DiskState::Attached | DiskState::Attaching | DiskState::Returning);
    if machine == Machine::MayExist && there && disk.bus != DiskBus::Scsi {
        return Err(Refusal::Precondition(format!(
            "disk `{name}` of VM `{}` is on the bus {}, and the VM runs; only disks on the bus scsi can go while it runs: stop \
             the VM first",
            record.name,
            disk.bus.word()
        )));
    }
    let words = match how {
        DetachHow::Keep => "detached",
        DetachHow::Delete => "deleted",
    };
    draft.vm_event(&record, EventType::Updated, format!("a user {words} disk `{name}`"));
    match (record.placement.host, how) {
        // It was never made.
        (None, DetachHow::Delete) => {
            record.spec.disks.remove(index);
        }
        (None, DetachHow::Keep) => {
            return Err(Refusal::Precondition(format!(
                "disk `{name}` of VM `{}` is not made yet, so there is nothing to keep; delete it (--delete)",
                record.name
            )));
        }
        (Some(_), DetachHow::Keep | DetachHow::Delete) => {
            let disk = &mut record.spec.disks[index];
            // D5: of one that was detached it is known.
            disk.half_done = state == DiskState::Deleting && disk.state == DiskState::Detached;
            disk.state = state;
            number(&mut record, index);
        }
    }
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// Who says that something was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The VM's host, which has its disks.
    Host,
    /// The VM's host, whose disks lie in a network pool.
    Machine(Executes),
    /// The storage host that has them.
    Storage(Executes),
}

/// Whether something of a VM may execute under its present incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Executes {
    /// Its host has said that nothing does, nor will.
    No,
    /// It may.
    Perhaps,
}

/// What becomes of a disk with an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The order is carried out.
    Done,
    /// One of two hosts has done its part (D5).
    Half,
    /// Nothing.
    None,
}

/// D5. `said`: that the order is done.
const fn step(disk: &Disk, by: By, said: bool) -> Step {
    use DiskState::{Attached, Attaching, Deleting, Detached, Detaching, Returning};
    use Executes::{No, Perhaps};
    match (disk.state, by, said) {
        (Attached | Detached, ..) => Step::None,
        (Attaching | Returning | Detaching | Deleting, By::Host, true) => Step::Done,
        // A machine has opened it, so it is made.
        (Attaching | Returning, By::Machine(Perhaps), true) => Step::Done,
        // It has nothing to do for what the next machine will have.
        (Attaching | Returning, By::Machine(No), _) if disk.half_done => Step::Done,
        (Attaching | Returning, By::Storage(No), true) => Step::Done,
        (Attaching | Returning, By::Storage(Perhaps), true) => Step::Half,
        (Detaching, By::Machine(_), true) => Step::Done,
        (Deleting, By::Machine(_), true) if !disk.half_done => Step::Half,
        (Deleting, By::Storage(_), true) if disk.half_done => Step::Done,
        (Attaching | Returning | Detaching | Deleting, By::Host | By::Machine(_) | By::Storage(_), _) => Step::None,
    }
}

/// D1, D5: a host says that it has done these, for the present incarnation.
pub(super) fn take_report(draft: &mut Draft<'_>, record: &mut VmRecord, done: &[u64], by: By) {
    let mut words = Vec::new();
    let mut gone = Vec::new();
    for index in 0..record.spec.disks.len() {
        let disk = &mut record.spec.disks[index];
        match (step(disk, by, done.contains(&disk.order)), disk.state) {
            (Step::None, _) | (_, DiskState::Attached | DiskState::Detached) => {}
            (Step::Half, DiskState::Deleting) => {
                disk.half_done = true;
                // What was said of the first half says nothing of the second.
                number(record, index);
            }
            (Step::Half, DiskState::Attaching | DiskState::Returning | DiskState::Detaching) => disk.half_done = true,
            (Step::Done, DiskState::Deleting) => gone.push(disk.order),
            (Step::Done, state @ (DiskState::Attaching | DiskState::Returning | DiskState::Detaching)) => {
                let (state, what) = match state {
                    DiskState::Detaching => (DiskState::Detached, "is detached; it is kept"),
                    _ => (DiskState::Attached, "is attached"),
                };
                (disk.state, disk.order, disk.half_done) = (state, 0, false);
                words.push(format!("disk `{}` {what}", disk.name));
            }
        }
    }
    let gone = record.spec.disks.extract_if(.., |d| d.state == DiskState::Deleting && gone.contains(&d.order));
    words.extend(gone.map(|d| format!("disk `{}` is deleted", d.name)));
    if words.is_empty() {
        return;
    }
    let disks = &record.spec.disks;
    if let Some(home) = &mut record.disk_home {
        home.pools.retain(|pool, _| disks.iter().any(|d| d.pool == *pool));
    }
    draft.vm_event(record, EventType::Updated, words.join("; "));
}

/// The disks are made anew: what the machine has is there from the beginning. One that was detached is given up like the others, and
/// stays until a person deletes it.
pub(super) fn begin_anew(record: &mut VmRecord) {
    for disk in &mut record.spec.disks {
        if disk.state != DiskState::Deleting {
            disk.half_done = false;
            disk.kept_generation = None;
        }
        (disk.state, disk.order) = match disk.state {
            DiskState::Attached | DiskState::Attaching | DiskState::Returning => (DiskState::Attached, 0),
            DiskState::Detaching | DiskState::Detached => (DiskState::Detached, 0),
            DiskState::Deleting => (DiskState::Deleting, disk.order),
        };
    }
}
