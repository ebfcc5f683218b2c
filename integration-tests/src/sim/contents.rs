//! Judges what is on the disks: snapshots, disks that are put back, copies, and disks that come and go. (R1 to R3, CL1, CL2, D1, D2, P5)
//!
//! A disk's contents are one number, which its guest raises whenever it is looked at. So what a guest finds says which of all the
//! writes was the last one.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_controller::model::{
    Desired, VmRecord,
    vm::{CloneOf, Disk as Recorded, DiskState, SnapshotState},
};
use uncloud_proto::ids::{Incarnation, VmId};
use uuid::Uuid;

/// Which disk of a VM: its name, and the id of one that came later.
pub(crate) type Key = (String, Option<Uuid>);
/// Where a disk is: the pool or the host, and the generation.
pub(crate) type Place = (Uuid, u32);

/// What is written last, and where. No place: it is a copy that is still to be made.
type Known = (Option<Place>, u64);

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
    /// What is written last to each.
    last: BTreeMap<Key, Known>,
    /// What each was in each snapshot when that was first taken.
    taken: BTreeMap<Uuid, BTreeMap<Key, u64>>,
    put_back: Option<PutBack>,
    /// Disks whose files were made.
    made: BTreeSet<Key>,
    /// Disks that the leader has said to be deleted.
    dropped: BTreeSet<Key>,
    /// The newest incarnation that has executed.
    newest: Incarnation,
    /// Of a clone: what is to be copied.
    origin: BTreeMap<Key, u64>,
}

/// Those of all VMs. Each call gives what it finds to be wrong.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    vms: BTreeMap<VmId, Truth>,
}

fn key(disk: &Recorded) -> Key {
    (disk.name.clone(), disk.id)
}

impl Contents {
    /// A guest begins to execute with a disk, or gets one: finds `found`, and writes. That it has the disks that it should have is judged
    /// elsewhere: those that nobody was told of before their host was lost are made anew in another place.
    pub(crate) fn began(
        &mut self,
        vm: VmId,
        (key, place): (&Key, Place),
        (found, wrote): (u64, u64),
        record: Option<&VmRecord>,
    ) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        let before = truth.last.insert(key.clone(), (Some(place), wrote));
        let expected = before.filter(|(before, _)| before.is_none_or(|b| b == place)).map(|(_, count)| count);
        if let Some(put_back) = &mut truth.put_back {
            put_back.ran = true;
            if record.and_then(|r| r.revert).is_some_and(|r| r.number == put_back.number) {
                return Some(format!("R1: {vm} executes while its disks are being put back"));
            }
        }
        match expected {
            Some(expected) if expected != found => {
                let name = &key.0;
                Some(format!("P5: {vm} begins with {found} on its disk {name}, and should find {expected}"))
            }
            Some(_) | None => None,
        }
    }

    /// Its guest, of this incarnation, writes.
    pub(crate) fn wrote(
        &mut self,
        vm: VmId,
        key: &Key,
        place: Place,
        incarnation: Incarnation,
        count: u64,
    ) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        truth.last.insert(key.clone(), (Some(place), count));
        let newest = truth.newest;
        (incarnation < newest)
            .then(|| format!("P1: incarnation {incarnation} of {vm} writes after {newest} has executed"))
    }

    /// An incarnation executes.
    pub(crate) fn executes(&mut self, vm: VmId, incarnation: Incarnation) {
        let truth = self.vms.entry(vm).or_default();
        truth.newest = truth.newest.max(incarnation);
    }

    /// The file of a disk is made.
    pub(crate) fn made(&mut self, vm: VmId, key: &Key) {
        self.vms.entry(vm).or_default().made.insert(key.clone());
    }

    /// The file of one disk of a VM that stays is removed.
    pub(crate) fn file_removed(&mut self, vm: VmId, key: &Key) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        truth.made.remove(key);
        let told = truth.dropped.contains(key);
        (!told).then(|| format!("P5: disk {} ({:?}) of {vm} is removed, and nobody deleted it", key.0, key.1))
    }

    /// A snapshot of a disk is there, just taken or from before.
    pub(crate) fn taken(&mut self, vm: VmId, key: &Key, id: Uuid, count: u64) -> Option<String> {
        let taken = self.vms.entry(vm).or_default().taken.entry(id).or_default();
        let first = *taken.entry(key.clone()).or_insert(count);
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

    /// A disk is put back to a snapshot; it is `count` now.
    pub(crate) fn put_back(
        &mut self,
        vm: VmId,
        (key, place): (&Key, Place),
        number: u64,
        id: Uuid,
        count: u64,
    ) -> Option<String> {
        let truth = self.vms.entry(vm).or_default();
        let before = truth.put_back.replace(PutBack { number, ran: false });
        truth.last.insert(key.clone(), (Some(place), count));
        if before.is_some_and(|b| b.number == number && b.ran) {
            return Some(format!("R2: the disks of {vm} are put back again after its guest has run"));
        }
        if before.is_some_and(|b| b.number > number) {
            return Some(format!("R2: the disks of {vm} are put back by an order that another one has replaced"));
        }
        let was = truth.taken.get(&id).and_then(|t| t.get(key)).copied();
        (was != Some(count)).then(|| format!("P5: {vm} is put back to {count}, and snapshot {id} was {was:?}"))
    }

    /// A new VM is stored. What a clone must find is what its source has now, or what the snapshot was.
    pub(crate) fn created(&mut self, record: &VmRecord) {
        let Some(CloneOf { vm: source, snapshot, .. }) = &record.clone_of else { return };
        let Some(source) = self.vms.get(source) else { return };
        let was = |disk: &Recorded| {
            let key = key(disk);
            let count = match snapshot {
                Some(id) => source.taken.get(id)?.get(&key).copied(),
                None => source.last.get(&key).map(|(_, count)| *count),
            }?;
            Some((key, count))
        };
        let origin = record.spec.disks.iter().filter_map(was).collect();
        let truth = self.vms.entry(record.id).or_default();
        truth.origin = origin;
        truth.last = truth.copies();
    }

    /// The record of a VM changes. `open`: the disks that whatever executes has.
    pub(crate) fn changed(
        &mut self,
        before: &VmRecord,
        after: &VmRecord,
        open: Option<&BTreeSet<Key>>,
    ) -> Option<String> {
        let vm = after.id;
        let truth = self.vms.entry(vm).or_default();
        if before.disk_generation != after.disk_generation {
            truth.new_generation(before, after);
        }
        let was = |id: Uuid| before.snapshots.iter().find(|s| s.id == id).map(|s| s.state);
        for snapshot in &after.snapshots {
            let id = snapshot.id;
            let is_new = snapshot.state == SnapshotState::Ready && was(id) != Some(SnapshotState::Ready);
            if is_new && !truth.taken.contains_key(&id) {
                return Some(format!("P2: snapshot {id} of {vm} is said to be taken, and is not"));
            }
        }
        if before.disk_generation == after.disk_generation
            && let Some(wrong) = truth.orders_done(before, after, open)
        {
            return Some(wrong);
        }
        let over = before.revert.filter(|_| after.revert.is_none() && after.desired != Desired::Deleted);
        let same_disks = before.disk_generation == after.disk_generation;
        let carried_out = |number| truth.put_back.is_some_and(|p| p.number == number);
        over.filter(|r| same_disks && !carried_out(r.number))
            .map(|_| format!("R2: the disks of {vm} are said to be put back, and are not"))
    }
}

impl Truth {
    /// The disks of before are no longer the VM's.
    fn new_generation(&mut self, before: &VmRecord, after: &VmRecord) {
        let copied = before.migration.as_ref().is_some_and(|m| m.disk_generation == Some(after.disk_generation));
        if copied {
            // M5: they were sent along, and must be what they were. M7: what both hosts have is where it was.
            let home = after.disk_home.as_ref().map(|h| (h.host.uuid(), after.disk_generation));
            let stays: BTreeSet<Key> =
                after.spec.disks.iter().filter(|d| d.kept_generation.is_some()).map(key).collect();
            self.last.iter_mut().filter(|(key, _)| !stays.contains(*key)).for_each(|(_, (place, _))| *place = home);
            return;
        }
        let newest = self.newest;
        // A clone whose disks nobody was told of is made a copy elsewhere.
        let unmade = after.clone_of.is_some() && !after.disks_exist;
        let origin = if unmade { std::mem::take(&mut self.origin) } else { BTreeMap::new() };
        *self = Self { newest, dropped: std::mem::take(&mut self.dropped), origin, ..Self::default() };
        self.last = self.copies();
    }

    /// What a clone finds on disks that are still to be copied.
    fn copies(&self) -> BTreeMap<Key, Known> {
        self.origin.iter().map(|(key, count)| (key.clone(), (None, *count))).collect()
    }

    /// D1: what is said to be done to disks is.
    fn orders_done(&mut self, before: &VmRecord, after: &VmRecord, open: Option<&BTreeSet<Key>>) -> Option<String> {
        let vm = after.id;
        let has = |key: &Key| open.is_none_or(|open| open.contains(key));
        let has_not = |key: &Key| open.is_none_or(|open| !open.contains(key));
        for disk in &before.spec.disks {
            let key = key(disk);
            let now = after.spec.disks.iter().find(|d| d.name == disk.name && d.id == disk.id).map(|d| d.state);
            let wrong = match (disk.state, now) {
                (DiskState::Attaching | DiskState::Returning, Some(DiskState::Attached))
                    if !self.made.contains(&key) || !has(&key) =>
                {
                    "D1: it is said to be attached, and is not"
                }
                (DiskState::Detaching, Some(DiskState::Detached)) if !has_not(&key) => {
                    "D1: it is said to be detached, and is not"
                }
                (DiskState::Deleting, None) if self.made.contains(&key) || !has_not(&key) => {
                    "D1: it is said to be deleted, and is not"
                }
                (DiskState::Deleting, None) => continue,
                // It was never made.
                (_, None) if before.placement.host.is_none() && !before.disks_exist => continue,
                (_, None) => "P5: it is gone, and was not deleted",
                (_, Some(DiskState::Deleting)) => {
                    self.dropped.insert(key);
                    continue;
                }
                (DiskState::Deleting, Some(_)) => "D1: its deletion is taken back",
                (
                    DiskState::Attached
                    | DiskState::Attaching
                    | DiskState::Returning
                    | DiskState::Detaching
                    | DiskState::Detached,
                    Some(
                        DiskState::Attached
                        | DiskState::Attaching
                        | DiskState::Returning
                        | DiskState::Detaching
                        | DiskState::Detached,
                    ),
                ) => continue,
            };
            return Some(format!("{wrong}: disk {} ({:?}) of {vm}", key.0, key.1));
        }
        None
    }
}

/// Whether a machine that begins has the disks that it should have: `None` if so.
pub(crate) fn misfit(record: &VmRecord, open: &BTreeSet<Key>) -> Option<String> {
    let disks = record.spec.disks.iter();
    let wrong = disks.filter(|disk| match disk.state {
        DiskState::Attached => !open.contains(&key(disk)),
        DiskState::Detached => open.contains(&key(disk)),
        // It may be told of that now, or later.
        DiskState::Attaching | DiskState::Returning | DiskState::Detaching | DiskState::Deleting => false,
    });
    let names: Vec<String> = wrong.map(|d| format!("{} ({:?})", d.name, d.state)).collect();
    (!names.is_empty()).then(|| format!("D1: {} executes with or without {}", record.id, names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId::from_uuid(Uuid::from_u128(1));
    const HERE: Place = (Uuid::from_u128(5), 0);
    const A: Uuid = Uuid::from_u128(10);
    const B: Uuid = Uuid::from_u128(11);

    fn disk0() -> Key {
        ("disk0".to_owned(), None)
    }

    /// A guest that has written 5, snapshot A of that, then 6.
    fn with_snapshot() -> Contents {
        let mut contents = Contents::default();
        assert_eq!(contents.began(VM, (&disk0(), HERE), (0, 5), None), None);
        contents.executes(VM, Incarnation(2));
        assert_eq!(contents.taken(VM, &disk0(), A, 5), None);
        assert_eq!(contents.wrote(VM, &disk0(), HERE, Incarnation(2), 6), None);
        contents
    }

    #[test]
    fn a_guest_that_does_not_find_what_was_written_last_is_seen() {
        let began = |place, found| with_snapshot().began(VM, (&disk0(), place), (found, 7), None);
        assert_eq!(began(HERE, 6), None);
        assert!(began(HERE, 5).is_some_and(|w| w.contains("P5")));
        assert_eq!(began((A, 0), 0), None, "another disk");
    }

    #[test]
    fn one_that_writes_after_a_newer_one_has_executed_is_seen() {
        let wrote = |n| with_snapshot().wrote(VM, &disk0(), HERE, Incarnation(n), 7);
        assert!(wrote(1).is_some_and(|w| w.contains("P1")));
        assert_eq!(wrote(2), None);
    }

    #[test]
    fn disks_that_are_put_back_once_more_after_the_guest_ran_are_seen() {
        let put_back = |contents: &mut Contents, number| contents.put_back(VM, (&disk0(), HERE), number, A, 5);
        let mut contents = with_snapshot();
        assert_eq!(put_back(&mut contents, 1), None);
        assert_eq!(put_back(&mut contents, 1), None, "nothing has run since");
        assert_eq!(contents.began(VM, (&disk0(), HERE), (5, 8), None), None);
        assert!(put_back(&mut contents, 1).is_some_and(|w| w.contains("R2")));
        let mut contents = with_snapshot();
        assert_eq!(put_back(&mut contents, 2), None);
        assert!(put_back(&mut contents, 1).is_some_and(|w| w.contains("R2")), "an older order");
    }

    #[test]
    fn a_snapshot_that_is_not_what_it_was_is_seen() {
        assert_eq!(with_snapshot().taken(VM, &disk0(), A, 5), None);
        assert!(with_snapshot().taken(VM, &disk0(), A, 6).is_some_and(|w| w.contains("P5")));
        let put_back = |id| with_snapshot().put_back(VM, (&disk0(), HERE), 1, id, 6);
        assert!(put_back(A).is_some_and(|w| w.contains("P5")));
        assert!(put_back(B).is_some_and(|w| w.contains("P5")), "it was never taken");
    }

    #[test]
    fn a_disk_that_is_removed_though_only_another_of_its_name_was_deleted_is_seen() {
        let mut contents = Contents::default();
        let (old, new) = (("data".to_owned(), Some(A)), ("data".to_owned(), Some(B)));
        contents.vms.entry(VM).or_default().dropped.insert(old.clone());
        assert_eq!(contents.file_removed(VM, &old), None);
        assert!(contents.file_removed(VM, &new).is_some_and(|w| w.contains("P5")));
    }
}
