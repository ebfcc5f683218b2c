//! A VM that begins as a copy of another one.
//!
//! Its record says whose disks its own are copies of; the host that it is given copies them before it starts, and says when it has.
//!
//! # Safety argument (P5)
//!
//! * **CL1** (agent/src/storage/copy.rs) What is copied must not change until all of it is copied. So while a record has a `clone_of`
//!   the snapshot that it names stays; and a VM whose disks are copied as they are is stopped, stays so, and is not put back.
//! * Whoever deletes the clone has given the copies up: what its host may still be copying then is nobody's disk, whatever it reads.

use std::collections::BTreeMap;

use uncloud_proto::ids::VmId;
use uuid::Uuid;

use super::{
    VmEntry,
    command::{Answer, NewClone, NewVm, Refusal, RequestId},
    draft::Draft,
    snapshots, vms,
};
use crate::model::{
    Desired, VmRecord,
    vm::{CloneOf, Disk, DiskHome, Snapshot},
};

/// What a user wants to do to a VM whose disks may be being copied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Use<'a> {
    /// Start it.
    Start,
    /// Put its disks back.
    Revert,
    /// Delete a snapshot of them.
    DeleteSnapshot(&'a Snapshot),
    /// Have disks come or go.
    ChangeDisks,
    /// Delete it.
    Delete,
}

impl Use<'_> {
    /// Whether what is copied from this snapshot, or from the disks as they are, would suffer.
    fn harms(self, snapshot: Option<Uuid>) -> bool {
        match self {
            Self::Start | Self::Revert | Self::ChangeDisks => snapshot.is_none(),
            Self::DeleteSnapshot(deleted) => snapshot == Some(deleted.id),
            Self::Delete => true,
        }
    }

    fn refusal(self, name: &str, clone: &VmRecord) -> String {
        let desired = clone.desired;
        let clone = &clone.name;
        let wait = match desired {
            // Its host copies them before it starts.
            Desired::Stopped => format!("start VM `{clone}`, which is stopped, so that it is done, or delete it"),
            Desired::Running | Desired::Deleted => format!("wait until that is done, or delete VM `{clone}`"),
        };
        match self {
            Self::Start => {
                format!("VM `{name}` cannot be started while its disks are being copied to VM `{clone}`; {wait}")
            }
            Self::Revert => format!(
                "the disks of VM `{name}` cannot be put back while they are being copied to VM `{clone}`; {wait}"
            ),
            Self::DeleteSnapshot(snapshot) => format!(
                "snapshot `{}` of VM `{name}` cannot be deleted while it is being copied to VM `{clone}`; {wait}",
                snapshot.name
            ),
            Self::ChangeDisks => {
                format!("disks of VM `{name}` cannot come or go while they are being copied to VM `{clone}`; {wait}")
            }
            Self::Delete => {
                format!("VM `{name}` cannot be deleted while its disks are being copied to VM `{clone}`; {wait}")
            }
        }
    }
}

/// CL1: refuses what a copy under way must be spared.
pub(super) fn check_unused(draft: &Draft<'_>, record: &VmRecord, wanted: Use<'_>) -> Result<(), Refusal> {
    for clone in draft.state.clones.get(&record.id).into_iter().flatten() {
        let Some(clone) = draft.state.vms.get(clone).map(|entry| &entry.record) else { continue };
        let copies = clone.clone_of.as_ref().is_some_and(|c| wanted.harms(c.snapshot));
        if copies && clone.desired != Desired::Deleted {
            return Err(Refusal::Precondition(wanted.refusal(&record.name, clone)));
        }
    }
    Ok(())
}

/// A user wants a copy of a VM.
pub(super) fn create(
    draft: &mut Draft<'_>,
    request: Option<&RequestId>,
    source: VmId,
    snapshot: Option<&str>,
    clone: &NewClone,
) -> Result<Answer, Refusal> {
    let entry = snapshots::ready(draft, source)?;
    let record = &entry.record;
    if record.revert.is_some() {
        return Err(snapshots::reverting(record));
    }
    snapshots::check_disks_settled(record)?;
    let snapshot = match snapshot {
        Some(name) => Some(snapshots::when_taken(record, name)?.id),
        None => {
            check_stopped(&entry)?;
            None
        }
    };
    let clone_of = CloneOf {
        vm: source,
        name: record.name.clone(),
        disk_generation: record.disk_generation,
        kept_generations: disks_kept(record),
        snapshot,
        home: disk_home(record)?,
    };
    let mut spec = record.next_spec();
    // What the machine does not have is not part of the copy.
    spec.disks.retain(Disk::is_in_machine);
    spec.disks.iter_mut().for_each(|disk| disk.kept_generation = None);
    if spec.nics.len() > clone.macs.len() {
        return Err(Refusal::Precondition(format!("VM `{}` has too many network interfaces", record.name)));
    }
    for (nic, mac) in spec.nics.iter_mut().zip(&clone.macs) {
        nic.mac.clone_from(mac);
    }
    let new = NewVm {
        id: clone.id,
        name: clone.name.clone(),
        owner: record.owner.clone(),
        labels: record.labels.clone(),
        spec: spec.clone(),
        image_names: Vec::new(),
        desired: Desired::Running,
    };
    vms::check_free(draft, &new)?;
    vms::store(draft, request, &new, spec, Some(clone_of))
}

fn check_stopped(entry: &VmEntry) -> Result<(), Refusal> {
    let record = &entry.record;
    let never_again = record.placement.host.is_none() || entry.ended_for_good();
    if record.desired == Desired::Stopped && never_again && !record.has_disk_orders() {
        return Ok(());
    }
    let name = &record.name;
    Err(Refusal::Precondition(match record.desired {
        Desired::Stopped => format!(
            "VM `{name}` is not at rest yet: it is being stopped, or something is done to its disks; try again in a moment"
        ),
        Desired::Running | Desired::Deleted => format!(
            "VM `{name}` is to run, so its disks cannot be copied as they are; take a snapshot first and name it, or stop the VM"
        ),
    }))
}

fn disks_kept(record: &VmRecord) -> BTreeMap<String, u32> {
    record.spec.disks.iter().filter_map(|d| Some((d.name.clone(), d.kept_generation?))).collect()
}

fn disk_home(record: &VmRecord) -> Result<DiskHome, Refusal> {
    if let Some(home) = &record.disk_home {
        return Ok(home.clone());
    }
    // Written by a program that did not keep it. The host that has the VM has its disks.
    let home = record.placement.host.map(|host| DiskHome { host, pools: BTreeMap::new() });
    home.ok_or_else(|| {
        let name = &record.name;
        Refusal::Precondition(format!("it is not known where the disks of VM `{name}` are; start it, then try again"))
    })
}
