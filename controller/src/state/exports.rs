//! Network pools: which host serves the disks of a VM to the host that runs it. Pure.
//!
//! A storage host reports a pool as exported, with the id in its marker and an address; the hosts that may use it report a
//! network pool with the same name and id. Whose disks are served to whom is not stored: it follows from the VM's placement.
//!
//! # Invariants
//!
//! * A pool that two hosts export is exported by none: access that one of them takes away is not taken away by the other.
//! * **P5** The record of a VM with disks in a network pool goes only when the host that has the files says that they are gone.

use std::collections::BTreeMap;

use uncloud_proto::ids::{HostId, VmId};
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Refusal, ServedObservation},
    draft::Draft,
    snapshots,
};
use crate::model::{VmRecord, host::PoolAccess, vm::DiskHome};

/// The host that serves a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exporter {
    /// The host.
    pub host: HostId,
    /// Where it serves, IP:PORT.
    pub address: String,
}

/// The one host that exports the pool with this name and id.
#[must_use]
pub fn exporter(state: &State, name: &str, id: Uuid) -> Option<Exporter> {
    let mut found = state.hosts_of_network_pool(id).filter_map(|(host, entry)| {
        let pool = entry.record.pools.iter().find(|p| p.name == name && p.shared_id == Some(id))?;
        match &pool.access {
            PoolAccess::Exported { address } => Some(Exporter { host, address: address.clone() }),
            PoolAccess::Directory | PoolAccess::Network => None,
        }
    });
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

/// Those of a VM's pools that host `on` reaches over the network, and their ids. `None`: not known, because the pool has a problem.
#[must_use]
pub fn network_pools(state: &State, vm: &VmRecord, on: HostId) -> BTreeMap<String, Option<Uuid>> {
    let Some(host) = state.host(on) else { return BTreeMap::new() };
    let mut pools = BTreeMap::new();
    for disk in &vm.spec.disks {
        if let Some(pool) = host.record.pools.iter().find(|p| p.name == disk.pool) {
            match pool.access {
                PoolAccess::Directory => {}
                PoolAccess::Network | PoolAccess::Exported { .. } => {
                    pools.insert(pool.name.clone(), pool.shared_id);
                }
            }
        }
    }
    pools
}

/// The first of a VM's pools that hosts reach over the network, as far as is known: where its disks are or are about to be made;
/// of a VM that has neither disks nor a host, where any host does.
#[must_use]
pub fn network_pool(state: &State, vm: &VmRecord) -> Option<String> {
    let known: Vec<HostId> = vm.disk_home.as_ref().map(|h| h.host).into_iter().chain(vm.placement.host).collect();
    let first = |host: HostId| network_pools(state, vm, host).into_keys().next();
    match known.is_empty() {
        true => state.networked_hosts().find_map(|(host, _)| first(host)),
        false => known.into_iter().find_map(first),
    }
}

/// Who has the files of a VM that host `on` has removed, if `on` has not.
///
/// # Errors
///
/// The pool that has them, if no host exports it.
pub(super) fn keeper_of_files(state: &State, vm: &VmRecord, on: HostId) -> Result<Option<HostId>, String> {
    // All of its disks lie in the same one, if any does.
    let Some((name, id)) = network_pools(state, vm, on).into_iter().next() else { return Ok(None) };
    let found = id.and_then(|id| exporter(state, &name, id)).ok_or(name)?;
    Ok(Some(found.host).filter(|&host| host != on))
}

/// The pools of a VM on host `on`, if they are all exported by `host`.
fn served_by(state: &State, record: &VmRecord, on: HostId, host: HostId) -> Option<BTreeMap<String, Option<Uuid>>> {
    let pools = network_pools(state, record, on);
    let served = |name: &String| {
        let id = pools.get(name).copied().flatten()?;
        exporter(state, name, id).filter(|e| e.host == host).map(|_| (name.clone(), Some(id)))
    };
    record.spec.disks.iter().map(|d| served(&d.pool)).collect()
}

/// A storage host has said how far it is. P5: when it has made all disks of a VM and serves them they may hold data from now on.
pub(super) fn note_served(
    draft: &mut Draft<'_>,
    host: HostId,
    vm: VmId,
    said: &ServedObservation,
) -> Result<Answer, Refusal> {
    let Ok(mut entry) = draft.vm(vm) else { return Ok(Answer::Done) };
    let Some(on) = entry.record.placement.host else { return Ok(Answer::Done) };
    if entry.record.placement.incarnation != said.incarnation {
        return Ok(Answer::Done);
    }
    let Some(pools) = served_by(draft.state, &entry.record, on, host) else { return Ok(Answer::Done) };
    if said.served && !entry.record.disks_exist {
        let disk_home = Some(DiskHome { host, pools });
        draft.put_vm(VmRecord { disks_exist: true, disk_home, clone_of: None, ..(*entry.record).clone() })?;
        entry = draft.vm(vm)?;
    }
    snapshots::take_served(draft, entry, said)?;
    Ok(Answer::Done)
}
