//! What the scheduler may know of the cluster: the hosts, and what is promised on each.
//!
//! `state/` keeps it up to date with each change. The order of the changes does not matter, not even whether a host
//! or the VMs on it come first: what is promised on a host that is not known (yet, or any more) is kept, too.

use std::{collections::BTreeMap, sync::Arc};

use uncloud_proto::ids::{HostId, VmId};

use super::{
    disks::{Disks, Place},
    index::{ClassId, Index, Position, Rank},
    kind::Kind,
};
use crate::{
    model::{HostMode, HostRecord, Liveness, host::Pool},
    pieces::Pieces,
};

/// CPU and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// What a VM is promised on its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// CPU and memory.
    pub resources: Resources,
    /// Its anti-affinity group.
    pub group: Option<String>,
}

/// The hosts, and what is promised on each. Cheap to clone: hosts are shared until they change.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    hosts: Pieces<HostId, Arc<Entry>>,
    disks: Disks,
    /// The hosts that take VMs, by kind and score. It follows from `hosts`.
    index: Index,
    openings: u64,
}

/// Views that say the same are equal, however they came about.
impl PartialEq for ClusterView {
    fn eq(&self, other: &Self) -> bool {
        self.hosts == other.hosts && self.disks == other.disks
    }
}

/// A host as it is known so far. It goes when neither a record nor a VM is left.
#[derive(Clone, Debug, Default, PartialEq)]
struct Entry {
    known: Option<Known>,
    promises: Promises,
}

/// What a host's record says.
#[derive(Clone, Debug)]
struct Known {
    record: Arc<HostRecord>,
    kind: Arc<Kind>,
    class: ClassId,
}

/// Both others follow from the record.
impl PartialEq for Known {
    fn eq(&self, other: &Self) -> bool {
        self.record == other.record
    }
}

impl Entry {
    /// `None`: no record of it.
    fn view(&self) -> Option<HostView<'_>> {
        let known = self.known.as_ref()?;
        Some(HostView { record: &known.record, kind: &known.kind, promises: &self.promises })
    }

    /// Where it is in the index: nowhere, if it takes no VMs.
    fn position(&self, host: HostId) -> Option<Position> {
        let known = self.known.as_ref()?;
        match (known.record.liveness, known.record.mode) {
            (Liveness::Up, HostMode::Active) => {
                let vms = u32::try_from(self.promises.vms.len()).unwrap_or(u32::MAX);
                let Resources { vcpus, memory_mib } = self.promises.total;
                Some(Position { class: known.class, vcpus, rank: Rank { memory_mib, vms, host } })
            }
            (
                Liveness::Up | Liveness::FastLapsed | Liveness::Dead,
                HostMode::Active | HostMode::Cordoned | HostMode::Draining,
            ) => None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Promises {
    vms: BTreeMap<VmId, Needs>,
    /// The sum over `vms`.
    total: Resources,
    /// How many of `vms` are in each group; no zeros.
    groups: BTreeMap<String, u32>,
}

impl ClusterView {
    /// A host is there, or is now as this record says.
    pub fn upsert_host(&mut self, record: Arc<HostRecord>) {
        let host = record.id;
        let before = self.hosts.get(&host).and_then(|entry| entry.known.as_ref());
        if before.is_some_and(|known| known.record == record) {
            return;
        }
        let left = before.map(|known| known.class);
        let (class, kind) = self.index.join(Kind::of(&record));
        self.change(host, |entry| entry.known = Some(Known { record, kind, class }));
        if let Some(class) = left {
            self.index.leave(class);
        }
        self.openings += 1;
    }

    /// A host is gone. What is promised on it stays, until it is released.
    pub fn remove_host(&mut self, host: HostId) {
        let mut left = None;
        self.change(host, |entry| left = entry.known.take());
        if let Some(known) = left {
            self.index.leave(known.class);
        }
    }

    /// A VM is promised this on this host; a promise that it already has there is replaced.
    pub fn assign(&mut self, host: HostId, vm: VmId, needs: Needs) {
        let mut shrinks = false;
        self.change(host, |entry| {
            if entry.promises.vms.get(&vm) != Some(&needs) {
                shrinks = entry.promises.release(vm);
                entry.promises.assign(vm, needs);
            }
        });
        self.openings += u64::from(shrinks);
    }

    /// A VM is promised nothing on this host any more. Nothing happens if it was not.
    pub fn release(&mut self, host: HostId, vm: VmId) {
        let mut released = false;
        if self.hosts.get(&host).is_some() {
            self.change(host, |entry| released = entry.promises.release(vm));
        }
        self.openings += u64::from(released);
    }

    /// A VM's disks have these sizes in these places, and in no others. Sizes are in bytes.
    pub fn set_disks(&mut self, vm: VmId, disks: BTreeMap<Place, u64>) {
        self.openings += u64::from(self.disks.set(vm, disks));
    }

    /// How large the disks of all VMs may become in a pool of this host, in bytes.
    pub(super) fn disks_of_all(&self, host: HostId, pool: &Pool) -> u64 {
        self.disks.of_all(host, pool)
    }

    /// How large the disks of all VMs but `vm` may become in a pool of this host, in bytes.
    #[must_use]
    pub fn disks_of_others(&self, host: HostId, pool: &Pool, vm: VmId) -> u64 {
        self.disks.of_others(host, pool, vm)
    }

    /// Grows whenever a VM that no host could take might find one: a host came or changed, or a promise was given back.
    #[must_use]
    pub const fn openings(&self) -> u64 {
        self.openings
    }

    /// Hosts that have a record, in the order of their ids.
    pub fn hosts(&self) -> impl Iterator<Item = (HostId, HostView<'_>)> {
        self.hosts.iter().filter_map(|(&id, entry)| Some((id, entry.view()?)))
    }

    /// One host. `None`: no record of it.
    #[must_use]
    pub fn host(&self, host: HostId) -> Option<HostView<'_>> {
        self.hosts.get(&host)?.view()
    }

    /// What is promised on a host in all.
    #[must_use]
    pub fn promised(&self, host: HostId) -> Resources {
        self.hosts.get(&host).map(|entry| entry.promises.total).unwrap_or_default()
    }

    fn change(&mut self, host: HostId, change: impl FnOnce(&mut Entry)) {
        let entry = Arc::make_mut(self.hosts.piece_mut(&host).entry(host).or_default());
        let from = entry.position(host);
        change(entry);
        let to = entry.position(host);
        if entry.known.is_none() && entry.promises.vms.is_empty() {
            self.hosts.remove(&host);
        }
        self.index.moved(from, to);
    }

    pub(super) const fn index(&self) -> &Index {
        &self.index
    }
}

impl Promises {
    fn assign(&mut self, vm: VmId, needs: Needs) {
        self.total.vcpus = self.total.vcpus.saturating_add(needs.resources.vcpus);
        self.total.memory_mib = self.total.memory_mib.saturating_add(needs.resources.memory_mib);
        if let Some(group) = &needs.group {
            *self.groups.entry(group.clone()).or_default() += 1;
        }
        self.vms.insert(vm, needs);
    }

    /// Whether there was anything to release.
    fn release(&mut self, vm: VmId) -> bool {
        let Some(needs) = self.vms.remove(&vm) else { return false };
        self.total.vcpus = self.total.vcpus.saturating_sub(needs.resources.vcpus);
        self.total.memory_mib = self.total.memory_mib.saturating_sub(needs.resources.memory_mib);
        if let Some(group) = needs.group
            && let Some(count) = self.groups.get_mut(&group)
        {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(&group);
            }
        }
        true
    }
}

/// One host, for reading.
#[derive(Clone, Copy, Debug)]
pub struct HostView<'a> {
    /// Its record.
    pub record: &'a HostRecord,
    pub(super) kind: &'a Kind,
    promises: &'a Promises,
}

impl HostView<'_> {
    /// How many VMs are promised something here, `vm` not counted.
    #[must_use]
    pub fn others(&self, vm: VmId) -> usize {
        self.promises.vms.len() - usize::from(self.promises.vms.contains_key(&vm))
    }

    /// What is promised here.
    pub(super) const fn promised(&self) -> Resources {
        self.promises.total
    }

    /// What is promised here to other VMs than `vm`.
    #[must_use]
    pub fn promised_to_others(&self, vm: VmId) -> Resources {
        let total = self.promises.total;
        let own = self.promises.vms.get(&vm).map(|n| n.resources).unwrap_or_default();
        Resources {
            vcpus: total.vcpus.saturating_sub(own.vcpus),
            memory_mib: total.memory_mib.saturating_sub(own.memory_mib),
        }
    }

    /// How many VMs of `group` are here, `vm` not counted.
    #[must_use]
    pub fn others_in_group(&self, vm: VmId, group: &str) -> u32 {
        let Some(&all) = self.promises.groups.get(group) else { return 0 };
        let own = self.promises.vms.get(&vm).is_some_and(|n| n.group.as_deref() == Some(group));
        all - u32::from(own)
    }
}
