//! What users ask of the disks of a VM that is there: a disk grows.
//!
//! The record says how large a disk is. The host makes it so: what executes is told at once, what does not is made to fit before it
//! starts. So nothing is lost when a host dies in between, and the next host does what the first one could not.

use uncloud_proto::ids::VmId;

use super::{
    command::{Answer, Refusal},
    draft::Draft,
    exports, vms,
};
use crate::{
    model::{Desired, EventType, VmRecord},
    scheduler,
};

/// Makes a disk larger.
pub(super) fn resize(draft: &mut Draft<'_>, vm: VmId, name: &str, size_bytes: u64) -> Result<Answer, Refusal> {
    let entry = draft.vm(vm)?;
    let mut record = (*entry.record).clone();
    if record.desired == Desired::Deleted {
        return Err(vms::being_deleted(&record));
    }
    let index = index_of(&record, name)?;
    let old = record.spec.disks[index].size_bytes;
    // A call whose answer was lost may come again, and finds everything done.
    if size_bytes == old {
        return Ok(Answer::Vm(entry.record));
    }
    if size_bytes < old {
        let problem = format!(
            "is {size_bytes}, and disk `{name}` has {old} bytes; a disk can only grow, because what lies behind its new \
             end would be lost"
        );
        return Err(invalid("size_bytes", problem));
    }
    if record.migration.is_some() {
        return Err(Refusal::Precondition(format!(
            "VM `{}` is being migrated; resize its disk when that is over, or cancel it",
            record.name
        )));
    }
    record.spec.disks[index].size_bytes = size_bytes;
    check_room(draft, &record, index, "size_bytes")?;
    draft.vm_event(
        &record,
        EventType::Updated,
        format!("a user made disk `{name}` {size_bytes} bytes large; it had {old}"),
    );
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// Which of the VM's disks has this name.
pub(super) fn index_of(record: &VmRecord, name: &str) -> Result<usize, Refusal> {
    let names: Vec<&str> = record.spec.disks.iter().map(|d| d.name.as_str()).collect();
    names.iter().position(|n| *n == name).ok_or_else(|| {
        let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        invalid("disk", format!("names no disk of VM `{}`; its disks are: {has}", record.name))
    })
}

/// The pool must have room for all of the VM's disks in it, by what is promised.
pub(super) fn check_room(draft: &mut Draft<'_>, record: &VmRecord, index: usize, field: &str) -> Result<(), Refusal> {
    let pool = record.spec.disks[index].pool.clone();
    // Where nothing is made yet, the scheduler looks when it is.
    let Some(user) = record.disk_home.as_ref().map(|h| h.host).or(record.placement.host) else { return Ok(()) };
    // A network pool has its room where its files are.
    let id = exports::network_pools(draft.state, record, user).get(&pool).copied().flatten();
    let host = id.and_then(|id| exports::exporter(draft.state, &pool, id)).map_or(user, |exporter| exporter.host);
    let bytes =
        record.spec.disks.iter().filter(|d| d.pool == pool).fold(0_u64, |sum, d| sum.saturating_add(d.size_bytes));
    let limits = draft.limits();
    scheduler::disk_room(draft.view(), host, &pool, record.id, bytes, &limits).map_err(|_| {
        let problem = format!(
            "is more than pool `{pool}` has left for it by what is promised to all disks (--disk-overcommit); choose less, or \
             make the pool larger"
        );
        invalid(field, problem)
    })
}

fn invalid(field: &str, problem: String) -> Refusal {
    Refusal::Invalid { field: field.to_owned(), problem }
}
