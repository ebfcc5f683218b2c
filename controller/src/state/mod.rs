//! The cluster in memory: what is stored, indexed; a command goes in, a change comes out.
//!
//! Everything here is pure: no I/O, no clock, no randomness. The writer (`leadership/writer.rs`) asks
//! [`State::decide`], writes the change to etcd, and lets every copy [`State::absorb`] it. Loading from etcd and
//! following a leader absorb in the same way, so a copy is always what rebuilding it from the records would give.
//!
//! # Invariants
//!
//! * An incarnation only grows, and grows whenever a VM is given a host.
//! * A VM is given to another host only if the record of its present host says that the VM's lease has surely run
//!   out there, or the present host itself has said that the VM does not execute (P1), or will not go on with it after a
//!   migration (`migration.rs`).
//! * A change has a key at most once, and never has a key whose record cannot be read.

mod absorb;
mod attach;
mod clone;
pub mod command;
mod concerned;
mod decide;
mod disks;
mod draft;
mod drain;
mod effective;
pub mod exports;
mod host_index;
mod hosts;
mod images;
mod load;
mod migration;
mod placement;
mod reports;
mod resolve;
mod simulate;
mod snapshots;
#[cfg(test)]
mod tests;
mod update;
mod vms;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, ImageId, Revision, VmId},
};

use crate::{
    model::{ClusterRecord, Desired, HostRecord, ImageRecord, Key, RequestRecord, VmRecord, VmStatusRecord},
    pieces::Pieces,
    scheduler::{ClusterView, Resources},
};

use host_index::HostIndex;

pub use attach::{MAX_DISKS, MAX_SATA_DISKS};
pub use concerned::{Concerned, concerned};
pub use decide::{MAX_PLACEMENTS, MAX_REPORTS};
pub use drain::Prospect;
pub use effective::EffectiveStatus;
pub use load::Stored;
pub use migration::MIGRATIONS_PER_HOST;
pub use placement::{home, lease_lapsed, placing_order, request};
pub use simulate::{Fate, Outcome};
pub use snapshots::MAX_SNAPSHOTS;

/// How long the answer to a request is kept.
pub const REQUESTS_KEPT_MS: u64 = 3_600_000;

/// When a copy forgets it, if etcd has not dropped it before. The times in the records are those of several controllers:
/// their clocks may differ by as much as this is longer, and no repeated request makes anything twice.
const REQUESTS_FORGOTTEN_MS: u64 = 2 * REQUESTS_KEPT_MS;

/// The cluster. Cheap to clone compared with what it describes: records are shared.
#[derive(Clone, Debug, Default)]
pub struct State {
    revision: Revision,
    /// Events decided since `revision`, so that the keys of a batch's events differ.
    events: u32,
    /// VMs whose records have been changed by what was decided since `revision`. Their own revisions do not show it yet.
    touched: BTreeSet<VmId>,
    vms: Pieces<VmId, VmEntry>,
    /// Statuses whose VM is not there: keys may come in any order, and one of the two may be unreadable.
    stray_statuses: BTreeMap<VmId, (Arc<VmStatusRecord>, Revision)>,
    /// By [`full_name`].
    vm_names: Pieces<String, VmId>,
    macs: Pieces<String, VmId>,
    hosts: Pieces<HostId, HostEntry>,
    host_names: BTreeMap<String, BTreeSet<HostId>>,
    host_index: HostIndex,
    /// VMs whose placement names a host that is not there.
    orphans: BTreeMap<HostId, BTreeSet<VmId>>,
    images: BTreeMap<ImageId, ImageEntry>,
    image_names: BTreeMap<String, BTreeSet<ImageId>>,
    requests: BTreeMap<String, (Arc<RequestRecord>, Revision)>,
    requests_by_age: BTreeSet<(WallTime, String)>,
    cluster: Option<Arc<ClusterRecord>>,
    pending: BTreeSet<VmId>,
    /// Migrations under way, by their targets.
    incoming: BTreeMap<HostId, BTreeSet<VmId>>,
    /// VMs whose disks are not copied yet, by the VMs that they are copied from.
    clones: BTreeMap<VmId, BTreeSet<VmId>>,
    unreadable: BTreeMap<String, String>,
    view: ClusterView,
}

/// What a VM is called: names are unique among the VMs of an owner.
fn full_name(owner: &str, name: &str) -> String {
    // No owner has a slash in it (`keys.rs`).
    format!("{owner}/{name}")
}

/// A VM and what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct VmEntry {
    /// What is stored.
    pub record: Arc<VmRecord>,
    /// When `record` was last written.
    pub record_revision: Revision,
    /// What it was last seen to be. [`VmEntry::effective_status`] says what that means now.
    pub status: Option<Arc<VmStatusRecord>>,
    /// When `status` was last written; 0 if it never was.
    pub status_revision: Revision,
}

impl VmEntry {
    /// When either was last written.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.record_revision.max(self.status_revision)
    }
}

/// A host and what it has been given.
#[derive(Clone, Debug, PartialEq)]
pub struct HostEntry {
    /// What is stored.
    pub record: Arc<HostRecord>,
    /// When it was last written.
    pub revision: Revision,
    /// The sum of what its VMs are promised.
    pub promised: Resources,
    /// The VMs whose placement names it, whether they run or not.
    pub vms: BTreeSet<VmId>,
}

/// An image.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageEntry {
    /// What is stored.
    pub record: Arc<ImageRecord>,
    /// When it was last written.
    pub revision: Revision,
}

impl State {
    /// The revision of etcd that this is the state of.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// One VM.
    #[must_use]
    pub fn vm(&self, id: VmId) -> Option<&VmEntry> {
        self.vms.get(&id)
    }

    /// All VMs, in the order of their ids.
    pub fn vms(&self) -> impl Iterator<Item = (&VmId, &VmEntry)> {
        self.vms.iter()
    }

    /// The VMs that come after `after` in the order of their ids.
    pub fn vms_from(&self, after: Option<VmId>) -> impl Iterator<Item = (&VmId, &VmEntry)> {
        self.vms.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded))
    }

    /// The VMs whose placement names this host, whether they run or not.
    pub fn vms_on(&self, host: HostId) -> impl Iterator<Item = VmId> {
        let vms = self.hosts.get(&host).map(|h| &h.vms).or_else(|| self.orphans.get(&host));
        vms.into_iter().flatten().copied()
    }

    /// The VMs that are on their way to this host.
    pub fn incoming(&self, host: HostId) -> impl Iterator<Item = VmId> {
        self.incoming.get(&host).into_iter().flatten().copied()
    }

    /// The VMs that are on their way from one host to another.
    pub fn migrating(&self) -> impl Iterator<Item = VmId> {
        self.incoming.values().flatten().copied()
    }

    /// VMs that should run and have no host, and deleted ones whose host has been removed.
    pub fn pending(&self) -> impl Iterator<Item = VmId> {
        let given_up = self.orphans.keys().filter(|&&host| !self.is_unreadable(&Key::Host(host)));
        let deleted = given_up.flat_map(|&host| self.vms_on(host)).filter(|&vm| self.is_deleted(vm));
        self.pending.iter().copied().chain(deleted)
    }

    fn is_deleted(&self, vm: VmId) -> bool {
        self.vms.get(&vm).is_some_and(|entry| entry.record.desired == Desired::Deleted)
    }

    /// One host.
    #[must_use]
    pub fn host(&self, id: HostId) -> Option<&HostEntry> {
        self.hosts.get(&id)
    }

    /// All hosts, in the order of their ids.
    pub fn hosts(&self) -> impl Iterator<Item = (&HostId, &HostEntry)> {
        self.hosts.iter()
    }

    /// One image.
    #[must_use]
    pub fn image(&self, id: ImageId) -> Option<&ImageEntry> {
        self.images.get(&id)
    }

    /// All images, in the order of their ids.
    pub fn images(&self) -> impl Iterator<Item = (&ImageId, &ImageEntry)> {
        self.images.iter()
    }

    /// What all leaders must agree on, if a leader has stored it.
    #[must_use]
    pub fn cluster(&self) -> Option<&Arc<ClusterRecord>> {
        self.cluster.as_ref()
    }

    /// Keys in etcd that cannot be read, and why.
    #[must_use]
    pub fn unreadable(&self) -> &BTreeMap<String, String> {
        &self.unreadable
    }

    /// Whether there is something under this key that cannot be read.
    #[must_use]
    pub fn is_unreadable(&self, key: &Key) -> bool {
        !self.unreadable.is_empty() && self.unreadable.contains_key(&key.to_string())
    }

    /// The scheduler's view, kept up to date with every change.
    #[must_use]
    pub fn view(&self) -> &ClusterView {
        &self.view
    }
}
