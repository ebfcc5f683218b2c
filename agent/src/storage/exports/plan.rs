//! Which exports must go and which must be made, from what is there and what the leader wants. Pure.
//!
//! An export serves one disk of a VM to one incarnation, and says so in its name. QEMU opens a disk by that name, so a QEMU of
//! another incarnation can open nothing, and whatever it had open was closed when the export went.
//!
//! # Safety argument (docs/fencing.md)
//!
//! * **N1** An export for an incarnation is made only when no export of the same VM for another incarnation is there, by what
//!   the daemon itself has said *after* they were taken away ([`additions`]); but for N5.
//! * **N2** An incarnation that is older than one that is exported, or than the newest that was asked for, gets no export
//!   ([`revocations`], [`additions`], and `want` in the parent module).
//! * **N5** While a VM migrates, the incarnation that it gets on the target has exports beside the source's, made when those are
//!   all there. When the target is no longer named, its exports go while the source has its own, and stay if the source has none:
//!   then the order is one from before the hand-over.
//! * **N3** A VM counts as served to an incarnation only while its exports for that one are there, and none for another ([`reached`]).
//! * **N6** The export of a disk that is detached stays as long as the incarnation that has it ([`revocations`]): its machine may not
//!   have let go of it yet, and what it still writes is not lost. One that is to be deleted has let go of (D5, controller/src/state/attach.rs).
//! * **R4** (controller/src/state/snapshots.rs) A VM whose disks are put back has no export, and nothing is put back beside a newer one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    str::FromStr,
};

use uncloud_proto::ids::{Incarnation, VmId};

use crate::vm::desired::Format;

/// Name of an export: whom it serves what. Both sides make it from what they know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The VM.
    pub vm: VmId,
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The disk.
    pub disk: String,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It is the export's id for QMP, too, which must begin with a letter.
        write!(f, "vm-{}.{}.{}", self.vm, self.incarnation.0, self.disk)
    }
}

/// What is no name of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAName;

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let mut parts = text.strip_prefix("vm-").ok_or(NotAName)?.splitn(3, '.');
        let (vm, incarnation, disk) = (parts.next(), parts.next(), parts.next());
        let vm = vm.and_then(|v| v.parse().ok()).ok_or(NotAName)?;
        let incarnation = incarnation.and_then(|i| i.parse().ok()).map(Incarnation).ok_or(NotAName)?;
        Ok(Self { vm, incarnation, disk: disk.ok_or(NotAName)?.to_owned() })
    }
}

/// A disk that can be served.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// The block node that the daemon has for it. The same disk always has the same, and no other has it.
    pub node: String,
    /// Its file.
    pub path: PathBuf,
    /// What that is: the variables of UEFI are as they are, everything else is qcow2.
    pub format: Format,
    /// How large it should be at least, in bytes. 0: that is not said.
    pub size_bytes: u64,
}

/// What should be there of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Exports for this incarnation, and for no other but the next.
    Serve {
        /// The incarnation.
        incarnation: Incarnation,
        /// The one on the target of its migration, which has exports, too (N5).
        next: Option<Incarnation>,
        /// The disks. Empty while they are not made yet.
        disks: Vec<Disk>,
        /// Disks that have none, because they are about to be deleted.
        gone: BTreeSet<String>,
    },
    /// None at all, while its disks are put back for this incarnation.
    Rest {
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// None at all.
    Nothing,
}

/// What the daemon has: the node that each export serves.
pub type Have = BTreeMap<String, String>;

fn of(have: &Have, vm: VmId) -> impl Iterator<Item = (Name, &String)> {
    // All names of one VM stand together.
    let begin = format!("vm-{vm}.");
    let end = format!("vm-{vm}/");
    have.range(begin..end).filter_map(|(id, node)| Some((id.parse().ok()?, node)))
}

/// N2: something newer than this has taken its place, so the goal is old.
fn outdated(have: &Have, vm: VmId, incarnation: Incarnation) -> bool {
    newer(have, vm, incarnation) && of(have, vm).all(|(name, _)| name.incarnation != incarnation)
}

fn newer(have: &Have, vm: VmId, incarnation: Incarnation) -> bool {
    of(have, vm).any(|(name, _)| name.incarnation > incarnation)
}

/// The exports that must go. Whatever is not named by a goal stays.
#[must_use]
pub fn revocations(have: &Have, goals: &BTreeMap<VmId, Goal>) -> Vec<Name> {
    let mut going = Vec::new();
    for (&vm, goal) in goals {
        match goal {
            Goal::Nothing => going.extend(of(have, vm).map(|(name, _)| name)),
            // N2
            Goal::Rest { incarnation } if newer(have, vm, *incarnation) => {}
            Goal::Rest { .. } => going.extend(of(have, vm).map(|(name, _)| name)),
            Goal::Serve { incarnation, .. } if outdated(have, vm, *incarnation) => {}
            Goal::Serve { incarnation, next, gone, .. } => {
                let stays = |n: &Name| {
                    (n.incarnation == *incarnation || Some(n.incarnation) == *next) && !gone.contains(&n.disk)
                };
                going.extend(of(have, vm).map(|(name, _)| name).filter(|name| !stays(name)));
            }
        }
    }
    going
}

/// The exports that can be made now, by what the daemon has now. When they are made there may be more (N5).
#[must_use]
pub fn additions(have: &Have, goals: &BTreeMap<VmId, Goal>) -> Vec<(Name, Disk)> {
    let mut made = Vec::new();
    for (&vm, goal) in goals {
        match goal {
            Goal::Nothing | Goal::Rest { .. } => {}
            Goal::Serve { incarnation, next, disks, .. } => {
                // N1
                if of(have, vm).any(|(name, _)| name.incarnation != *incarnation && Some(name.incarnation) != *next) {
                    continue;
                }
                let mine = missing(have, vm, *incarnation, disks);
                if !mine.is_empty() {
                    // N2
                    if !newer(have, vm, *incarnation) {
                        made.extend(mine);
                    }
                } else if let Some(next) = next {
                    // N5
                    made.extend(missing(have, vm, *next, disks));
                }
            }
        }
    }
    made
}

/// Virtual sizes of the block nodes that the daemon has open, in bytes.
pub type Sizes = BTreeMap<String, u64>;

/// Disks that are open and smaller than they should be, and the exports that must go before they can grow, because an export's size
/// is fixed. Not while the VM migrates: the target has read the size, and an export of its source is not made anew beside it (N2).
#[must_use]
pub fn outgrown(have: &Have, sizes: &Sizes, goals: &BTreeMap<VmId, Goal>) -> Vec<(Name, Disk)> {
    let mut found = Vec::new();
    for (&vm, goal) in goals {
        match goal {
            Goal::Nothing | Goal::Rest { .. } | Goal::Serve { next: Some(_), .. } => {}
            Goal::Serve { incarnation, next: None, disks, .. } => {
                if of(have, vm).any(|(name, _)| name.incarnation != *incarnation) {
                    continue;
                }
                let small = disks.iter().filter(|d| sizes.get(&d.node).is_some_and(|&size| size < d.size_bytes));
                let incarnation = *incarnation;
                found.extend(small.map(|d| (Name { vm, incarnation, disk: d.name.clone() }, d.clone())));
            }
        }
    }
    found
}

/// The exports of this incarnation that are not there.
fn missing(have: &Have, vm: VmId, incarnation: Incarnation, disks: &[Disk]) -> Vec<(Name, Disk)> {
    let names = disks.iter().map(|disk| (Name { vm, incarnation, disk: disk.name.clone() }, disk.clone()));
    names.filter(|(name, _)| !have.contains_key(&name.to_string())).collect()
}

/// Whether a VM's goal is reached (N3).
#[must_use]
pub fn reached(have: &Have, vm: VmId, goal: &Goal) -> bool {
    match goal {
        Goal::Nothing | Goal::Rest { .. } => of(have, vm).next().is_none(),
        Goal::Serve { incarnation, next, disks, gone } => {
            let there: BTreeSet<(Incarnation, String, &str)> =
                of(have, vm).map(|(name, node)| (name.incarnation, name.disk, node.as_str())).collect();
            let of_one = |i: Incarnation| disks.iter().map(move |d| (i, d.name.clone(), d.node.as_str()));
            let wanted: BTreeSet<_> = [*incarnation].into_iter().chain(*next).flat_map(of_one).collect();
            let theirs = |i: Incarnation| i == *incarnation || Some(i) == *next;
            // N6
            let stays = |(i, disk, _): &(Incarnation, String, &str)| theirs(*i) && !gone.contains(disk);
            !disks.is_empty() && wanted.is_subset(&there) && there.iter().all(stays)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn vm(n: u128) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n))
    }

    fn name(vm_n: u128, incarnation: u64, disk: &str) -> Name {
        Name { vm: vm(vm_n), incarnation: Incarnation(incarnation), disk: disk.to_owned() }
    }

    fn disk(vm_n: u128, name: &str) -> Disk {
        let (node, path) = (format!("node-{vm_n}-{name}"), format!("/p/{vm_n}/{name}").into());
        Disk { name: name.to_owned(), node, path, format: Format::Qcow2, size_bytes: 1024 }
    }

    fn have(exports: &[(u128, u64, &str)]) -> Have {
        exports.iter().map(|(v, i, d)| (name(*v, *i, d).to_string(), disk(*v, d).node)).collect()
    }

    fn serve(vm_n: u128, incarnation: u64, disks: &[&str]) -> BTreeMap<VmId, Goal> {
        let disks = disks.iter().map(|d| disk(vm_n, d)).collect();
        [(vm(vm_n), Goal::Serve { incarnation: Incarnation(incarnation), next: None, disks, gone: BTreeSet::new() })]
            .into()
    }

    fn migrate(vm_n: u128, incarnation: u64, to: u64, disks: &[&str]) -> BTreeMap<VmId, Goal> {
        let disks = disks.iter().map(|d| disk(vm_n, d)).collect();
        let (incarnation, next) = (Incarnation(incarnation), Some(Incarnation(to)));
        [(vm(vm_n), Goal::Serve { incarnation, next, disks, gone: BTreeSet::new() })].into()
    }

    fn made(have: &Have, goals: &BTreeMap<VmId, Goal>) -> Vec<Name> {
        additions(have, goals).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn a_name_is_read_as_it_was_written() {
        for disk in ["root", "a.b", "0"] {
            let name = name(7, 12, disk);
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for bad in ["", "vm-", "vm-x.1.root", "other", "vm-00000000-0000-0000-0000-000000000007.x.root"] {
            assert_eq!(bad.parse::<Name>(), Err(NotAName), "{bad}");
        }
    }

    #[test]
    fn n1_nothing_is_exported_while_another_incarnation_is() {
        let goals = serve(1, 2, &["root", "data"]);
        let old = have(&[(1, 1, "root"), (2, 9, "root")]);
        assert_eq!(revocations(&old, &goals), [name(1, 1, "root")], "and nothing of other VMs");
        assert_eq!(additions(&old, &goals), [], "not before the old one is gone");
        assert!(!reached(&old, vm(1), &goals[&vm(1)]));
        let gone = have(&[(2, 9, "root")]);
        assert_eq!(additions(&gone, &goals).len(), 2);
        let done = have(&[(1, 2, "root"), (1, 2, "data"), (2, 9, "root")]);
        assert!(revocations(&done, &goals).is_empty() && additions(&done, &goals).is_empty());
        assert!(reached(&done, vm(1), &goals[&vm(1)]));
    }

    #[test]
    fn an_old_incarnation_goes_at_once_though_the_disks_are_not_made_yet() {
        let goals = serve(1, 2, &[]);
        assert_eq!(revocations(&have(&[(1, 1, "root")]), &goals).len(), 1);
        assert!(!reached(&Have::new(), vm(1), &goals[&vm(1)]), "nothing is served");
    }

    #[test]
    fn n2_an_older_incarnation_than_the_one_that_is_there_changes_nothing() {
        let newer = have(&[(1, 3, "root")]);
        let goals = serve(1, 2, &["root"]);
        assert!(revocations(&newer, &goals).is_empty() && additions(&newer, &goals).is_empty());
        assert!(!reached(&newer, vm(1), &goals[&vm(1)]));
    }

    #[test]
    fn n5_the_target_of_a_migration_is_served_beside_its_source_and_never_alone_before_the_handover() {
        let disks = ["root", "data"];
        let (before, during, after) = (serve(1, 1, &disks), migrate(1, 1, 2, &disks), serve(1, 2, &disks));
        let source = have(&[(1, 1, "root"), (1, 1, "data")]);
        let both = have(&[(1, 1, "root"), (1, 1, "data"), (1, 2, "root"), (1, 2, "data")]);
        let target = have(&[(1, 2, "root"), (1, 2, "data")]);
        assert!(reached(&source, vm(1), &before[&vm(1)]) && !reached(&source, vm(1), &during[&vm(1)]));
        assert!(revocations(&source, &during).is_empty());
        assert_eq!(made(&source, &during), [name(1, 2, "root"), name(1, 2, "data")]);
        assert!(reached(&both, vm(1), &during[&vm(1)]) && made(&both, &during).is_empty());
        // A new daemon: first what runs.
        assert_eq!(made(&Have::new(), &during), [name(1, 1, "root"), name(1, 1, "data")]);
        assert_eq!(made(&have(&[(1, 1, "root")]), &during), [name(1, 1, "data")]);
        // Handed over: the source's go first.
        assert_eq!(revocations(&both, &after).iter().map(|n| n.incarnation.0).collect::<BTreeSet<_>>(), [1].into());
        assert!(!reached(&both, vm(1), &after[&vm(1)]) && reached(&target, vm(1), &after[&vm(1)]));
        // Given up: the target's go, and the next target has another number.
        assert_eq!(revocations(&both, &before).iter().map(|n| n.incarnation.0).collect::<BTreeSet<_>>(), [2].into());
        assert!(!reached(&both, vm(1), &before[&vm(1)]));
        assert!(made(&both, &migrate(1, 1, 3, &disks)).is_empty());
        // N2: orders of before the hand-over.
        for old in [&before, &during] {
            assert!(revocations(&target, old).is_empty() && made(&target, old).is_empty());
            assert!(!reached(&target, vm(1), &old[&vm(1)]));
        }
    }

    #[test]
    fn a_disk_grows_when_it_is_open_and_too_small_and_its_vm_does_not_migrate() {
        let there = have(&[(1, 1, "root"), (1, 1, "data")]);
        let sizes: Sizes = [(disk(1, "root").node, 1023), (disk(1, "data").node, 1025)].into();
        let goals = serve(1, 1, &["root", "data", "not-open"]);
        assert_eq!(outgrown(&there, &sizes, &goals), [(name(1, 1, "root"), disk(1, "root"))]);
        let grown: Sizes = [(disk(1, "root").node, 1024)].into();
        assert_eq!(outgrown(&there, &grown, &goals), []);
        assert_eq!(outgrown(&there, &sizes, &migrate(1, 1, 2, &["root"])), [], "it migrates");
        assert_eq!(outgrown(&there, &sizes, &serve(1, 2, &["root"])), [], "another incarnation has it");
    }

    #[test]
    fn n3_the_wrong_disk_under_the_right_name_does_not_count() {
        let goals = serve(1, 2, &["root"]);
        let wrong: Have = [(name(1, 2, "root").to_string(), "node-of-an-older-generation".to_owned())].into();
        assert!(!reached(&wrong, vm(1), &goals[&vm(1)]));
    }

    #[test]
    fn n6_a_disk_that_is_detached_is_served_until_the_incarnation_goes() {
        let goals = serve(1, 2, &["root"]);
        let there = have(&[(1, 2, "root"), (1, 2, "data")]);
        assert_eq!(revocations(&there, &goals), []);
        assert!(reached(&there, vm(1), &goals[&vm(1)]), "the machine does not wait for it");
        let next = serve(1, 3, &["root"]);
        assert_eq!(revocations(&there, &next).len(), 2);
        assert!(
            !reached(&have(&[(1, 3, "root"), (1, 2, "data")]), vm(1), &next[&vm(1)]),
            "the old one may still write to it"
        );
        assert!(made(&have(&[(1, 2, "data")]), &next).is_empty());
    }

    /// R4
    #[test]
    fn what_is_put_back_is_served_to_nobody_and_never_taken_from_a_newer_incarnation() {
        let rest: BTreeMap<_, _> = [(vm(1), Goal::Rest { incarnation: Incarnation(2) })].into();
        let there = have(&[(1, 1, "root"), (1, 2, "data"), (2, 1, "root")]);
        assert_eq!(revocations(&there, &rest).len(), 2);
        assert!(additions(&Have::new(), &rest).is_empty());
        assert!(reached(&have(&[(2, 1, "root")]), vm(1), &rest[&vm(1)]) && !reached(&there, vm(1), &rest[&vm(1)]));
        let newer = have(&[(1, 3, "root")]);
        assert_eq!(revocations(&newer, &rest), []);
        assert!(!reached(&newer, vm(1), &rest[&vm(1)]), "so nothing is put back");
    }

    /// D5
    #[test]
    fn a_disk_that_is_to_be_deleted_is_served_to_nobody_and_the_others_are() {
        let mut goals = serve(1, 2, &["root"]);
        let there = have(&[(1, 2, "root"), (1, 2, "data")]);
        if let Some(Goal::Serve { gone, .. }) = goals.get_mut(&vm(1)) {
            gone.insert("data".into());
        }
        assert_eq!(revocations(&there, &goals), [name(1, 2, "data")]);
        assert!(!reached(&there, vm(1), &goals[&vm(1)]));
        assert!(reached(&have(&[(1, 2, "root")]), vm(1), &goals[&vm(1)]));
    }

    #[test]
    fn nothing_means_nothing() {
        let goals: BTreeMap<_, _> = [(vm(1), Goal::Nothing)].into();
        let there = have(&[(1, 1, "root"), (1, 5, "data"), (2, 1, "root")]);
        assert_eq!(revocations(&there, &goals).len(), 2);
        assert!(additions(&there, &goals).is_empty());
        assert!(reached(&have(&[(2, 1, "root")]), vm(1), &Goal::Nothing));
    }

    proptest! {
        /// N1, N2 and N5 over any sequence of goals, with a daemon that takes exports away late: there are never two incarnations
        /// of one VM but the two of a migration, no export is made beside a newer one, and none of the target's before all of the source's.
        #[test]
        fn n1_n2_n5_only_a_migration_has_two_incarnations_and_none_is_made_beside_a_newer_one(
            steps in prop::collection::vec((1_u128..3, 1_u64..6, 0_u64..3, any::<bool>(), any::<bool>()), 1..40)
        ) {
            let mut there = Have::new();
            for (n, incarnation, next, nothing, late) in steps {
                let (mine, to) = (Incarnation(incarnation), Incarnation(incarnation + next));
                let goals = match (nothing, next) {
                    (true, _) => [(vm(n), Goal::Nothing)].into(),
                    (false, 0) => serve(n, incarnation, &["a", "b"]),
                    (false, _) => migrate(n, incarnation, to.0, &["a", "b"]),
                };
                let gone = revocations(&there, &goals);
                let alone = of(&there, vm(n)).all(|(name, _)| name.incarnation != mine);
                prop_assert!(nothing || !alone || gone.iter().all(|name| name.incarnation < mine));
                for name in gone.iter().skip(usize::from(late)) {
                    there.remove(&name.to_string());
                }
                for _ in 0..2 {
                    let have = there.clone();
                    for (name, disk) in additions(&have, &goals) {
                        prop_assert!(of(&have, name.vm).all(|(n, _)| n.incarnation == mine || n.incarnation == to));
                        prop_assert!(of(&have, name.vm).all(|(n, _)| n.incarnation <= name.incarnation));
                        let source = of(&have, name.vm).filter(|(n, _)| n.incarnation == mine).count();
                        prop_assert!(name.incarnation == mine || source == 2);
                        there.insert(name.to_string(), disk.node);
                    }
                }
                if goals.iter().any(|(&vm, goal)| reached(&there, vm, goal)) {
                    let seen: BTreeSet<_> = of(&there, vm(n)).map(|(name, _)| name.incarnation).collect();
                    let wanted: BTreeSet<_> = if nothing { [].into() } else { [mine, to].into() };
                    prop_assert_eq!(seen, wanted);
                }
            }
        }
    }
}
