//! What a storage host does to the files of disks that nobody is served: puts them back to a snapshot, and deletes single ones. Beside
//! everything else, because it may take long.
//!
//! # Safety argument (docs/fencing.md)
//!
//! * **R4** Nothing is begun while anything of what it concerns is exported, by what the daemon has just said, and nothing is exported
//!   while it is under way ([`Chores::is_putting_back`]). A `qemu-img` that has outlived its agent is held off by QEMU's image lock once the
//!   disk is open again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};
use tracing::{error, info, warn};
use uncloud_proto::ids::VmId;

use super::super::Storage;
use crate::vm::{
    desired::{Desired, DiskState},
    disks::{Done, Wanted},
};

/// What failed is tried again after this.
pub(super) const AGAIN: Duration = Duration::from_secs(10);

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chore {
    /// Put the disks back, for the revert of this number.
    PutBack(u64),
    /// Delete disks, for the orders of these numbers.
    Delete(Vec<u64>),
}

/// What is being done, and was. Of each VM one thing at a time.
#[derive(Debug, Default)]
pub(super) struct Chores {
    tasks: JoinSet<(VmId, Chore, Result<(), String>)>,
    busy: BTreeMap<VmId, Chore>,
    /// The newest revert, and the deletions, that were carried out.
    reverted: BTreeMap<VmId, u64>,
    deleted: BTreeSet<(VmId, u64)>,
    failed: BTreeMap<VmId, (String, Instant)>,
}

impl Chores {
    /// Whether a VM's disks are being put back, so that nobody may be served them.
    pub(super) fn is_putting_back(&self, vm: VmId) -> bool {
        matches!(self.busy.get(&vm), Some(Chore::PutBack(_)))
    }

    /// Whether something is being done to a VM's disks.
    pub(super) fn is_busy(&self, vm: VmId) -> bool {
        self.busy.contains_key(&vm)
    }

    /// What is to be done now for a VM, if anything is. The caller knows that nobody is served what it concerns.
    pub(super) fn due(&self, vm: VmId, desired: &Desired) -> Option<Chore> {
        if self.busy.contains_key(&vm) || !self.may_try(vm) {
            return None;
        }
        if let Some(revert) = desired.orders.revert {
            return (self.reverted.get(&vm) != Some(&revert.number)).then_some(Chore::PutBack(revert.number));
        }
        let left: Vec<u64> = deleting(desired).filter(|&order| !self.deleted.contains(&(vm, order))).collect();
        (!left.is_empty()).then_some(Chore::Delete(left))
    }

    /// Whether nothing of this VM failed a moment ago.
    pub(super) fn may_try(&self, vm: VmId) -> bool {
        self.failed.get(&vm).is_none_or(|(_, since)| since.elapsed() >= AGAIN)
    }

    /// Begins what is due.
    pub(super) fn begin(&mut self, vm: VmId, chore: Chore, desired: &Desired, storage: &Arc<Storage>) {
        self.busy.insert(vm, chore.clone());
        let (desired, storage) = (desired.clone(), Arc::clone(storage));
        self.tasks.spawn(async move {
            let outcome = match chore {
                Chore::PutBack(_) => storage.put_back(vm, &desired).await,
                Chore::Delete(_) => storage.delete_detached(vm, &desired).await,
            };
            (vm, chore, outcome.map_err(|e| e.reason()))
        });
    }

    /// Waits until something is done, and takes it in. `None`: nothing is under way. Cancel safe.
    pub(super) async fn finished(&mut self) -> Option<()> {
        match self.tasks.join_next().await? {
            Ok((vm, chore, outcome)) => {
                self.busy.remove(&vm);
                match outcome {
                    Ok(()) => self.note(vm, chore),
                    Err(why) => self.note_failed(vm, why),
                }
            }
            // It is not known of which VM: all are done anew when the tasks that are left have ended.
            Err(problem) => {
                error!("a task that changes disks failed: {problem}");
                if self.tasks.is_empty() {
                    self.busy.clear();
                }
            }
        }
        Some(())
    }

    fn note(&mut self, vm: VmId, chore: Chore) {
        info!(%vm, ?chore, "done to the disks");
        self.failed.remove(&vm);
        match chore {
            Chore::PutBack(number) => drop(self.reverted.insert(vm, number)),
            Chore::Delete(orders) => self.deleted.extend(orders.into_iter().map(|order| (vm, order))),
        }
    }

    /// Something of this VM could not be done; it is tried again later.
    pub(super) fn note_failed(&mut self, vm: VmId, why: String) {
        warn!(%vm, "its disks: {why}");
        self.failed.insert(vm, (why, Instant::now()));
    }

    /// All of it could be done.
    pub(super) fn note_well(&mut self, vm: VmId) {
        self.failed.remove(&vm);
    }

    /// Why something could not be done the last time. Empty: nothing is known to be wrong.
    pub(super) fn trouble(&self, vm: VmId) -> String {
        self.failed.get(&vm).map(|(why, _)| why.clone()).unwrap_or_default()
    }

    /// Forgets all VMs but these.
    pub(super) fn retain(&mut self, known: impl Fn(VmId) -> bool) {
        self.reverted.retain(|vm, _| known(*vm));
        self.deleted.retain(|(vm, _)| known(*vm));
        self.failed.retain(|vm, _| known(*vm));
    }

    /// What was done of what is ordered now, where the disks are served as wanted or not, and have the snapshots that they should have or not.
    pub(super) fn done(&self, vm: VmId, desired: &Desired, served: bool, snapshots: bool) -> Done {
        let orders = &desired.orders;
        let reverted = self.reverted.get(&vm).copied().unwrap_or(0);
        let disks = desired.spec.iter().flat_map(|s| &s.disks).filter(|d| d.order != 0);
        let is_done = |state: DiskState, order: u64| match state {
            DiskState::Attaching | DiskState::Returning => served,
            DiskState::Deleting => self.deleted.contains(&(vm, order)),
            // The VM's host says that.
            DiskState::Detaching | DiskState::Attached | DiskState::Detached => false,
        };
        Done {
            made: orders.ids(Wanted::There).filter(|_| snapshots).collect(),
            removed: orders.ids(Wanted::Gone).filter(|_| snapshots).collect(),
            reverted: orders.revert.filter(|r| r.number == reverted).map_or(0, |r| r.number),
            disks: disks.filter(|d| is_done(d.state, d.order)).map(|d| d.order).collect(),
            ..Done::default()
        }
    }
}

fn deleting(desired: &Desired) -> impl Iterator<Item = u64> + '_ {
    let disks = desired.spec.iter().flat_map(|s| &s.disks);
    disks.filter(|d| d.state == DiskState::Deleting && d.order != 0).map(|d| d.order)
}
