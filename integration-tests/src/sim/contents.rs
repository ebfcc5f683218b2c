//! Judges what is on the disks: snapshots, and disks that are put back. (R1 to R3, P5)
//!
//! A disk's contents are one number, which its guest raises whenever it is looked at. So what a guest finds says which of all the
//! writes was the last one.

use std::collections::BTreeMap;

use uncloud_controller::model::{Desired, VmRecord, vm::SnapshotState};
use uncloud_proto::ids::VmId;
use uuid::Uuid;

/// What is on a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    /// What its guest has written last. 0: nothing.
    pub(crate) count: u64,
    /// What it was at each snapshot that is there.
    pub(crate) snapshots: BTreeMap<Uuid, u64>,
}

/// Which disk: the pool or the host, and the generation.
pub(crate) type Place = (Uuid, u32);

/// Disks that were put back.
#[derive(Clone, Copy, Debug)]
struct PutBack {
    number: u64,
    /// The guest has executed since.
    ran: bool,
}

/// What is true about the disks of a VM.
#[derive(Clone, Debug, Default)]
struct Truth {
    /// What is written last, and where. `None`: there was nothing to be known.
    count: Option<(Place, u64)>,
    /// What each snapshot was when it was first taken.
    taken: BTreeMap<Uuid, u64>,
    put_back: Option<PutBack>,
}

/// Those of all VMs. Each call gives what it finds to be wrong.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    vms: BTreeMap<VmId, Truth>,
}

impl Contents {
    /// A guest begins to execute, finds `found`, and writes. That it has the disks that it should have is judged elsewhere: those that
    /// nobody was told of before their host was lost are made anew in another place.
    pub(crate) fn began(
        &mut self,
        vm: VmId,
        place: Place,
        (found, wrote): (u64, u64),
        record: Option<&VmRecord>,
    ) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        let expected =
            truth.count.replace((place, wrote)).filter(|(before, _)| *before == place).map(|(_, count)| count);
        if let Some(put_back) = &mut truth.put_back {
            put_back.ran = true;
            if record.and_then(|r| r.revert).is_some_and(|r| r.number == put_back.number) {
                return Some(format!("R1: {vm} executes while its disks are being put back"));
            }
        }
        match expected {
            Some(expected) if expected != found => {
                Some(format!("P5: {vm} begins with {found} on its disk, and should find {expected}"))
            }
            Some(_) | None => None,
        }
    }

    /// Its guest writes.
    pub(crate) fn wrote(&mut self, vm: VmId, place: Place, count: u64) {
        self.vms.entry(vm).or_default().count = Some((place, count));
    }

    /// A snapshot is there, just taken or from before.
    pub(crate) fn taken(&mut self, vm: VmId, id: Uuid, count: u64) -> Option<String> {
        let first = *self.vms.entry(vm).or_default().taken.entry(id).or_insert(count);
        (first != count).then(|| format!("P5: snapshot {id} of {vm} was {first}, and is {count}"))
    }

    /// A snapshot is removed.
    pub(crate) fn removed(vm: VmId, id: Uuid, record: Option<&VmRecord>) -> Option<String> {
        let kept = record.is_some_and(|r| {
            r.desired != Desired::Deleted
                && r.snapshots.iter().any(|s| s.id == id && s.state != SnapshotState::Deleting)
        });
        kept.then(|| format!("P5: snapshot {id} of {vm} is removed, and nobody deleted it"))
    }

    /// Disks are put back to a snapshot; they are `count` now.
    pub(crate) fn put_back(&mut self, vm: VmId, place: Place, number: u64, id: Uuid, count: u64) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        let before = truth.put_back.replace(PutBack { number, ran: false });
        truth.count = Some((place, count));
        if before.is_some_and(|b| b.number == number && b.ran) {
            return Some(format!("R2: the disks of {vm} are put back again after its guest has run"));
        }
        if before.is_some_and(|b| b.number > number) {
            return Some(format!("R2: the disks of {vm} are put back by an order that another one has replaced"));
        }
        let was = truth.taken.get(&id).copied();
        (was != Some(count)).then(|| format!("P5: {vm} is put back to {count}, and snapshot {id} was {was:?}"))
    }

    /// The record of a VM changes.
    pub(crate) fn changed(&mut self, before: &VmRecord, after: &VmRecord) -> Option<String> {
        let vm = after.id;
        let truth = self.vms.entry(vm).or_default();
        if before.disk_generation != after.disk_generation {
            *truth = Truth::default();
            return None;
        }
        let was = |id: Uuid| before.snapshots.iter().find(|s| s.id == id).map(|s| s.state);
        for snapshot in &after.snapshots {
            let id = snapshot.id;
            let is_new = snapshot.state == SnapshotState::Ready && was(id) != Some(SnapshotState::Ready);
            if is_new && !truth.taken.contains_key(&id) {
                return Some(format!("P2: snapshot {id} of {vm} is said to be taken, and is not"));
            }
        }
        let over = before.revert.filter(|_| after.revert.is_none() && after.desired != Desired::Deleted);
        let carried_out = |number| truth.put_back.is_some_and(|p| p.number == number);
        over.filter(|r| !carried_out(r.number))
            .map(|_| format!("R2: the disks of {vm} are said to be put back, and are not"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId::from_uuid(Uuid::from_u128(1));
    const HERE: Place = (Uuid::from_u128(5), 0);
    const A: Uuid = Uuid::from_u128(10);
    const B: Uuid = Uuid::from_u128(11);

    /// A guest that has written 5, snapshot A of that, then 6.
    fn with_snapshot() -> Contents {
        let mut contents = Contents::default();
        assert_eq!(contents.began(VM, HERE, (0, 5), None), None);
        assert_eq!(contents.taken(VM, A, 5), None);
        contents.wrote(VM, HERE, 6);
        contents
    }

    #[test]
    fn a_guest_that_does_not_find_what_was_written_last_is_seen() {
        assert_eq!(with_snapshot().began(VM, HERE, (6, 7), None), None);
        assert!(with_snapshot().began(VM, HERE, (5, 7), None).is_some_and(|w| w.contains("P5")));
        assert_eq!(with_snapshot().began(VM, (A, 0), (0, 7), None), None, "another disk");
    }

    #[test]
    fn disks_that_are_put_back_once_more_after_the_guest_ran_are_seen() {
        let mut contents = with_snapshot();
        assert_eq!(contents.put_back(VM, HERE, 1, A, 5), None);
        assert_eq!(contents.put_back(VM, HERE, 1, A, 5), None, "nothing has run since");
        assert_eq!(contents.began(VM, HERE, (5, 8), None), None);
        assert!(contents.put_back(VM, HERE, 1, A, 5).is_some_and(|w| w.contains("R2")));
        let mut contents = with_snapshot();
        assert_eq!(contents.put_back(VM, HERE, 2, A, 5), None);
        assert!(contents.put_back(VM, HERE, 1, A, 5).is_some_and(|w| w.contains("R2")), "an older order");
    }

    #[test]
    fn a_snapshot_that_is_not_what_it_was_is_seen() {
        assert_eq!(with_snapshot().taken(VM, A, 5), None);
        assert!(with_snapshot().taken(VM, A, 6).is_some_and(|w| w.contains("P5")));
        assert!(with_snapshot().put_back(VM, HERE, 1, A, 6).is_some_and(|w| w.contains("P5")));
        assert!(with_snapshot().put_back(VM, HERE, 1, B, 6).is_some_and(|w| w.contains("P5")), "it was never taken");
    }
}
