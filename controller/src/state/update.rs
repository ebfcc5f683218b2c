//! Changes of a VM: what changes at once, and what waits for the next incarnation.
//!
//! # Safety argument (W4)
//!
//! The class (`failover`) in a VM's record says under which lease its present incarnation may execute: the host's keeper was
//! started with it, and the leader judges by it when the host falls silent. It must never say less than what executes was
//! given. So an update never touches the class of a VM that has a host: it notes it as pending, and [`VmRecord::begin_next`]
//! makes it so where the VM is known not to execute (`placement::find_host`), in the write that gives it a new incarnation.

use uncloud_proto::ids::VmId;

use super::{
    VmEntry,
    command::{Answer, Refusal, VmUpdate},
    draft::Draft,
    vms,
};
use crate::{
    model::{Desired, EventType, VmRecord},
    scheduler,
};

pub(super) fn update(draft: &mut Draft<'_>, vm: VmId, update: &VmUpdate) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    let before = &*entry.record;
    if before.desired == Desired::Deleted {
        return Err(vms::being_deleted(before));
    }
    let after = changed(before, update);
    // First of all: a call whose answer was lost may come again, and finds everything done.
    if after == *before {
        return Ok(Answer::Vm(entry.record));
    }
    let touched = draft.state.touched.contains(&vm);
    if update.read.is_some_and(|read| entry.record_revision > read || touched) {
        return Err(Refusal::Outdated(before.name.clone()));
    }
    if before.migration.is_some() && after.pending != before.pending {
        return Err(Refusal::Precondition(format!(
            "VM `{}` is being migrated; change what waits for its next start when that is over, or cancel it",
            before.name
        )));
    }
    check_room(draft, &entry, &after)?;
    let message = message(before, &after);
    draft.vm_event(&after, EventType::Updated, message);
    Ok(Answer::Vm(draft.put_vm(after)?))
}

/// The record with the changes in it.
fn changed(before: &VmRecord, update: &VmUpdate) -> VmRecord {
    let VmUpdate {
        read: _,
        labels,
        restart,
        on_disk_loss,
        priority,
        stop_grace_seconds,
        vcpus,
        memory_mib,
        failover,
        display,
        guest_agent,
        cpu,
    } = update;
    let mut after = before.clone();
    if let Some(labels) = labels {
        after.labels.clone_from(labels);
    }
    let spec = &mut after.spec;
    spec.restart = restart.unwrap_or(spec.restart);
    spec.on_disk_loss = on_disk_loss.unwrap_or(spec.on_disk_loss);
    spec.priority = priority.unwrap_or(spec.priority);
    spec.stop_grace_seconds = stop_grace_seconds.unwrap_or(spec.stop_grace_seconds);

    let mut pending = before.pending.clone().unwrap_or_default();
    wait(&mut pending.vcpus, *vcpus, spec.vcpus);
    wait(&mut pending.memory_mib, *memory_mib, spec.memory_mib);
    wait(&mut pending.failover, *failover, spec.failover);
    wait(&mut pending.display, *display, spec.display);
    wait(&mut pending.guest_agent, *guest_agent, spec.guest_agent);
    wait(&mut pending.cpu, *cpu, spec.cpu);
    after.pending = (!pending.is_empty()).then_some(pending);
    // Without a host it executes nowhere (W2), and its next incarnation is given with its next host.
    if after.placement.host.is_none() {
        after.begin_next();
    }
    after
}

/// Notes what a field is to be, or that nothing waits any more.
fn wait<T: PartialEq>(pending: &mut Option<T>, wanted: Option<T>, now: T) {
    if let Some(wanted) = wanted {
        *pending = (wanted != now).then_some(wanted);
    }
}

/// A VM that takes up room on a host must fit there also with what it is to have: its room is promised from now on.
fn check_room(draft: &mut Draft<'_>, entry: &VmEntry, after: &VmRecord) -> Result<(), Refusal> {
    let Some(host) = after.placement.host.filter(|_| entry.holds_room()) else { return Ok(()) };
    let (old, new) = (super::absorb::needs(&entry.record).resources, super::absorb::needs(after).resources);
    if new.vcpus <= old.vcpus && new.memory_mib <= old.memory_mib {
        return Ok(());
    }
    let limits = draft.limits();
    let Some(Err(why)) = scheduler::room(draft.view(), host, after.id, new, &limits) else { return Ok(()) };
    let name = draft.host_name(host);
    Err(Refusal::Precondition(format!(
        "host `{name}`, which has VM `{}`, {why} for that; choose less, or stop the VM first: then it is given a host \
         with room when it is started",
        after.name
    )))
}

fn message(before: &VmRecord, after: &VmRecord) -> String {
    let waits = |record: &VmRecord| record.pending.as_ref().map(|p| p.fields()).unwrap_or_default();
    let (was, is) = (waits(before), waits(after));
    let at_once = before.labels != after.labels || before.spec != after.spec;
    let mut words = Vec::new();
    if at_once {
        words.push("a user changed it".to_owned());
    }
    if !is.is_empty() {
        words.push(format!("from the next start on it has another {}", is.join(", ")));
    } else if !was.is_empty() {
        words.push("nothing waits for the next start any more".to_owned());
    }
    words.join("; ")
}
