//! Whose plan a change may alter. Pure.

use std::collections::BTreeSet;

use uncloud_proto::ids::HostId;

use super::{
    State,
    command::{Change, Mutation},
};
use crate::model::{HostRecord, Key, Record, VmRecord, host::PoolAccess};

/// Whom a change concerns.
#[derive(Debug, PartialEq, Eq)]
pub enum Concerned {
    /// These hosts.
    Hosts(BTreeSet<HostId>),
    /// Whoever they are: it is rare, and not worth finding out.
    Everybody,
}

/// Whom a change concerns that `state` does not have yet: the hosts that VMs had, have, come from or go to. What a VM was last
/// seen to be changes nothing of what its host should do.
pub fn concerned(state: &State, change: &Change) -> Concerned {
    let mut hosts = BTreeSet::new();
    for Mutation { key, value } in &change.mutations {
        match key {
            Key::Vm(id) => {
                let before = state.vm(*id).map(|entry| entry.record.as_ref());
                let after = match value {
                    Some(Record::Vm(record)) => Some(record.as_ref()),
                    _ => None,
                };
                for record in before.into_iter().chain(after) {
                    let of_vm = hosts_of(record);
                    // The host that serves its disks is concerned, too.
                    if of_vm.iter().any(|&host| state.host(host).is_some_and(|h| is_joined(&h.record))) {
                        return Concerned::Everybody;
                    }
                    hosts.extend(of_vm);
                }
            }
            Key::Host(id) => {
                let before = state.host(*id).map(|entry| entry.record.as_ref());
                let after = match value {
                    Some(Record::Host(record)) => Some(record.as_ref()),
                    _ => None,
                };
                if before.into_iter().chain(after).any(is_joined) {
                    return Concerned::Everybody;
                }
                hosts.insert(*id);
            }
            Key::Image(_) => return Concerned::Everybody,
            Key::VmStatus(_)
            | Key::VmName { .. }
            | Key::Mac(_)
            | Key::Request(_)
            | Key::Event { .. }
            | Key::Leader
            | Key::Cluster => {}
        }
    }
    Concerned::Hosts(hosts)
}

fn hosts_of(vm: &VmRecord) -> BTreeSet<HostId> {
    vm.placement.host.into_iter().chain(vm.migration.as_ref().map(|m| m.target)).collect()
}

/// Whether it shares disks with other hosts by way of one of them, so that what one should do depends on the others.
fn is_joined(host: &HostRecord) -> bool {
    host.pools.iter().any(|pool| match pool.access {
        PoolAccess::Directory => false,
        PoolAccess::Network | PoolAccess::Exported { .. } => true,
    })
}
