//! Network pools in the sessions: what a storage host is told to serve, and which hosts must wait for it. Pure, but for
//! [`Grants`], which only remembers.
//!
//! ```text
//!  placement stored ──▶ ServeDisks to the storage host ──▶ it revokes every older incarnation, then exports this one
//!                                                             │
//!  RUN to the VM's host ◀── disks noted as made, stored ◀── ServedDisks
//! ```
//!
//! # Safety argument (docs/fencing.md)
//!
//! * **N4** A host is told RUN for a VM with disks in a network pool only after the one host that exports the pool has said, in a
//!   session of this term, that these disks are served to this incarnation and to none that is older.
//! * **N5** The target of a migration is told to open them when they are served to its incarnation, too. It is told RUN as any other
//!   host (N4): when the source has them no more, which is taken away from it only after the hand-over is stored.
//!
//! * **D5**, **R4** (`state/attach.rs`, `state/snapshots.rs`) What is to be done to disks is told to the one of the two hosts that has to do it now.
//!
//! What was acknowledged is not stored and not taken back while the term lasts: that older incarnations have no access any more
//! stays true, whatever becomes of the storage host, because it never serves an older incarnation again (N2). A new leader asks anew.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use uncloud_proto::{
    ids::{HostId, Incarnation, Revision, VmId},
    v1,
};

use super::desired::{self, Plan, Wanted};
use crate::{
    model::{
        Desired, VmRecord,
        host::PoolAccess,
        vm::{DiskState, GuestAgent, Snapshot, SnapshotState},
    },
    state::{
        State, VmEntry,
        command::{DisksObservation, ServedObservation},
        exports,
    },
};

/// An acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grant {
    by: HostId,
    /// None that is older has access.
    incarnation: Incarnation,
    /// The one on the target of its migration has access, too.
    next: Option<Incarnation>,
}

/// An access that a host must have.
#[derive(Clone, Copy, Debug)]
enum Access {
    /// Nothing older than this has it any more.
    Sole(Incarnation),
    /// Beside the one that it migrates from.
    Beside(Incarnation),
}

/// What a storage host says of a VM.
#[derive(Clone, Debug)]
pub struct Said {
    /// To whom its disks are served.
    pub incarnation: Incarnation,
    /// To the one on the target of its migration, too.
    pub next: Option<Incarnation>,
    /// Why they are not. Empty: they are.
    pub problem: String,
}

/// Whether anything that a storage host has said is to be stored.
#[must_use]
pub fn is_news(state: &State, vm: VmId, said: &ServedObservation) -> bool {
    state.vm(vm).is_some_and(|entry| {
        let record = &entry.record;
        let nothing = said.disks == DisksObservation::default() && said.trouble.is_empty();
        said.served && !record.disks_exist || record.has_disk_orders() && !nothing
    })
}

/// What storage hosts have acknowledged in this term. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    granted: Arc<Mutex<BTreeMap<VmId, Grant>>>,
    /// What the storage host said of a VM last, if it could not.
    problems: Arc<Mutex<BTreeMap<VmId, String>>>,
    changed: watch::Sender<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Grants {
    /// A storage host has said how far a VM's disks are served.
    pub fn take(&self, state: &State, by: HostId, vm: VmId, said: Said) {
        let Said { incarnation, next, problem } = said;
        if state.vm(vm).is_none() {
            return;
        }
        if !problem.is_empty() {
            lock(&self.problems).insert(vm, problem);
            return;
        }
        lock(&self.problems).remove(&vm);
        let grant = Grant { by, incarnation, next };
        if lock(&self.granted).insert(vm, grant) != Some(grant) {
            self.changed.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    /// Forgets VMs that have been deleted since.
    pub fn prune(&self, state: &State) {
        lock(&self.granted).retain(|vm, _| state.vm(*vm).is_some());
        lock(&self.problems).retain(|vm, _| state.vm(*vm).is_some());
    }

    /// Tells when something was acknowledged.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn has(&self, vm: VmId, by: HostId, access: Access) -> bool {
        lock(&self.granted).get(&vm).is_some_and(|grant| {
            let there = match access {
                Access::Sole(incarnation) => grant.incarnation == incarnation,
                Access::Beside(incarnation) => grant.next == Some(incarnation),
            };
            there && grant.by == by
        })
    }
}

/// N4, N5: what a VM that should run on `host`, or migrates to it, waits for, in words. `None`: nothing.
#[must_use]
pub fn waits(state: &State, grants: &Grants, host: HostId, vm: &VmRecord) -> Option<String> {
    // A stop needs no access, also one that a drain asks for, or somebody who wants its disks put back.
    if vm.desired != Desired::Running || vm.is_moving_out() || vm.revert.is_some() {
        return None;
    }
    let access = match &vm.migration {
        _ if vm.placement.host == Some(host) => Access::Sole(vm.placement.incarnation),
        Some(migration) if migration.target == host => Access::Beside(migration.incarnation),
        Some(_) | None => return None,
    };
    for (name, id) in exports::network_pools(state, vm, host) {
        let Some(exporter) = id.and_then(|id| exports::exporter(state, &name, id)) else {
            return Some(format!("it waits for exactly one host that exports pool `{name}`"));
        };
        if !grants.has(vm.id, exporter.host, access) || !vm.disks_exist {
            let host = state.host(exporter.host).map_or_else(|| exporter.host.to_string(), |h| h.record.name.clone());
            let why = lock(&grants.problems).get(&vm.id).map(|p| format!(", which says: {p}")).unwrap_or_default();
            return Some(format!("it waits for storage host `{host}` to give it access to its disks{why}"));
        }
    }
    None
}

/// Takes those VMs out of a host's plan that it must not be told to run yet (N4). They stay as they are.
pub fn withhold(state: &State, grants: &Grants, host: HostId, plan: &mut Plan) {
    plan.vms.retain(|&vm, wanted| match wanted {
        Wanted::AsRecorded(_) => state.vm(vm).is_none_or(|entry| waits(state, grants, host, &entry.record).is_none()),
        Wanted::Forget(_) => true,
    });
}

/// Completes what a host is told about a VM, or says that it must not be told: it may have been given another incarnation since
/// the plan was made (N4).
pub fn complete(
    state: &State,
    grants: &Grants,
    host: HostId,
    vm: VmId,
    message: v1::DesiredVm,
) -> Option<v1::DesiredVm> {
    match message.disposition() {
        v1::Disposition::Forget | v1::Disposition::Unspecified => return Some(message),
        v1::Disposition::Run | v1::Disposition::Stop | v1::Disposition::Delete | v1::Disposition::Incoming => {}
    }
    let Some(entry) = state.vm(vm) else { return Some(message) };
    if waits(state, grants, host, &entry.record).is_some() {
        return None;
    }
    let network_pools = exports::network_pools(state, &entry.record, host)
        .into_iter()
        .filter_map(|(pool, id)| {
            let address = exports::exporter(state, &pool, id?)?.address;
            Some(v1::PoolAddress { pool, address })
        })
        .collect();
    let mut message = v1::DesiredVm { network_pools, ..message };
    if exports::network_pool(state, &entry.record).is_some() {
        keep_machine(&entry.record, &mut message);
    }
    Some(message)
}

/// D5, R4: leaves the VM's host what its machine has to do with; the rest is its storage host's.
fn keep_machine(record: &VmRecord, message: &mut v1::DesiredVm) {
    // A guest with an agent holds its file systems still until they are taken.
    let holds = message.disposition() == v1::Disposition::Run && record.spec.guest_agent == GuestAgent::Enabled;
    message.snapshots.retain(|snapshot| holds && !snapshot.remove);
    (message.revert, message.clone_from) = (None, None);
    let stops = message.disposition() == v1::Disposition::Stop;
    for (disk, told) in record.spec.disks.iter().zip(message.spec.iter_mut().flat_map(|s| &mut s.disks)) {
        let state = match disk.state {
            DiskState::Attaching | DiskState::Returning if stops => v1::DiskState::Unspecified,
            DiskState::Deleting if disk.half_done => v1::DiskState::Detached,
            DiskState::Deleting => {
                told.state = v1::DiskState::Detaching.into();
                continue;
            }
            DiskState::Attached
            | DiskState::Attaching
            | DiskState::Returning
            | DiskState::Detaching
            | DiskState::Detached => continue,
        };
        (told.state, told.order) = (state.into(), 0);
    }
}

/// D5, R4: leaves the storage host what it may do now.
fn keep_files(record: &VmRecord, message: &mut v1::DesiredVm) {
    if record.revert.is_none_or(|r| !r.at_rest) {
        message.revert = None;
    }
    let waits = |s: &Snapshot| s.state == SnapshotState::Creating && s.hold.is_none();
    let waiting: Vec<String> = record.snapshots.iter().filter(|s| waits(s)).map(|s| s.id.to_string()).collect();
    message.snapshots.retain(|order| !waiting.contains(&order.id));
    for (disk, told) in record.spec.disks.iter().zip(message.spec.iter_mut().flat_map(|s| &mut s.disks)) {
        // It is served as long as a machine may have it (N6).
        if disk.state == DiskState::Detaching || disk.state == DiskState::Deleting && !disk.half_done {
            (told.state, told.order) = (v1::DiskState::Detached.into(), 0);
        }
    }
}

/// The VMs whose disks `host` should serve, and when their records were last written.
#[must_use]
pub fn wanted(state: &State, host: HostId) -> BTreeMap<VmId, Revision> {
    let Some(storage) = state.host(host) else { return BTreeMap::new() };
    let exported = |p: &&crate::model::host::Pool| matches!(p.access, PoolAccess::Exported { .. });
    let ours: Vec<_> =
        storage.record.pools.iter().filter(exported).filter_map(|p| Some((&p.name, p.shared_id?))).collect();
    let mut wanted = BTreeMap::new();
    for (name, id) in ours {
        if exports::exporter(state, name, id).is_none_or(|e| e.host != host) {
            continue;
        }
        for (_, user) in state.hosts_of_network_pool(id) {
            let uses = |p: &&crate::model::host::Pool| p.name == *name && p.shared_id == Some(id);
            if !user.record.pools.iter().find(uses).is_some_and(|p| p.access != PoolAccess::Directory) {
                continue;
            }
            let entries = user.vms.iter().filter_map(|&vm| state.vm(vm));
            let served = entries.filter(|e| e.record.spec.disks.iter().any(|d| d.pool == *name) && is_served(e));
            wanted.extend(served.map(|e| (e.record.id, e.record_revision)));
        }
    }
    wanted
}

/// Once it is to be deleted nobody is given access any more; the storage host takes it away when it deletes the disks.
fn is_served(entry: &VmEntry) -> bool {
    match entry.record.desired {
        Desired::Running | Desired::Stopped => true,
        Desired::Deleted => false,
    }
}

/// What a storage host is told about a VM whose disks it should serve. `None`: it has changed, and will be planned anew.
#[must_use]
pub fn order(state: &State, host: HostId, vm: VmId) -> Option<v1::DesiredVm> {
    let entry = state.vm(vm).filter(|e| is_served(e) && e.record.placement.host.is_some())?;
    wanted_of(state, host, entry).then(|| {
        let mut message = v1::DesiredVm {
            migrate_to: None,
            next_incarnation: entry.record.migration.as_ref().map_or(0, |m| m.incarnation.0),
            ..desired::as_recorded(state, entry)
        };
        keep_files(&entry.record, &mut message);
        let disposition = if message.revert.is_some() { v1::Disposition::Stop } else { v1::Disposition::Run };
        message.disposition = disposition.into();
        message
    })
}

fn wanted_of(state: &State, host: HostId, entry: &VmEntry) -> bool {
    let Some(on) = entry.record.placement.host else { return false };
    let mut pools = exports::network_pools(state, &entry.record, on).into_iter();
    pools.any(|(name, id)| id.and_then(|id| exports::exporter(state, &name, id)).is_some_and(|e| e.host == host))
}
