//! Hosts by what they need: lists of the few among many that somebody looks for at each change of the state.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::ids::HostId;
use uuid::Uuid;

use super::{HostEntry, State};
use crate::model::{
    HostMode, HostRecord, Liveness,
    host::{Pool, PoolAccess},
};

/// Follows from the hosts' records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostIndex {
    /// On which a lease has surely run out.
    lapsed: BTreeSet<HostId>,
    draining: BTreeSet<HostId>,
    /// That have a pool over the network, or serve one.
    networked: BTreeSet<HostId>,
    /// The same, by the ids of these pools.
    network_pools: BTreeMap<Uuid, BTreeSet<HostId>>,
}

impl HostIndex {
    pub(super) fn add(&mut self, host: &HostRecord) {
        match host.liveness {
            Liveness::Up => {}
            Liveness::FastLapsed | Liveness::Dead => drop(self.lapsed.insert(host.id)),
        }
        match host.mode {
            HostMode::Active | HostMode::Cordoned => {}
            HostMode::Draining => drop(self.draining.insert(host.id)),
        }
        for pool in over_network(host) {
            self.networked.insert(host.id);
            if let Some(id) = pool.shared_id {
                self.network_pools.entry(id).or_default().insert(host.id);
            }
        }
    }

    pub(super) fn remove(&mut self, host: &HostRecord) {
        self.lapsed.remove(&host.id);
        self.draining.remove(&host.id);
        self.networked.remove(&host.id);
        for id in over_network(host).filter_map(|pool| pool.shared_id) {
            if let Some(hosts) = self.network_pools.get_mut(&id) {
                hosts.remove(&host.id);
                if hosts.is_empty() {
                    self.network_pools.remove(&id);
                }
            }
        }
    }
}

fn over_network(host: &HostRecord) -> impl Iterator<Item = &Pool> {
    host.pools.iter().filter(|pool| match pool.access {
        PoolAccess::Directory => false,
        PoolAccess::Network | PoolAccess::Exported { .. } => true,
    })
}

impl State {
    /// Hosts on which a lease has surely run out, in the order of their ids.
    pub fn lapsed_hosts(&self) -> impl Iterator<Item = (HostId, &HostEntry)> {
        self.these(&self.host_index.lapsed)
    }

    /// Hosts that are being drained, in the order of their ids.
    pub fn draining_hosts(&self) -> impl Iterator<Item = (HostId, &HostEntry)> {
        self.these(&self.host_index.draining)
    }

    /// Hosts that have a pool over the network, or serve one, in the order of their ids.
    pub fn networked_hosts(&self) -> impl Iterator<Item = (HostId, &HostEntry)> {
        self.these(&self.host_index.networked)
    }

    /// Hosts that have the pool with this id over the network, or serve it, in the order of their ids.
    pub fn hosts_of_network_pool(&self, id: Uuid) -> impl Iterator<Item = (HostId, &HostEntry)> {
        self.host_index.network_pools.get(&id).into_iter().flat_map(|hosts| self.these(hosts))
    }

    fn these<'a>(&'a self, ids: &'a BTreeSet<HostId>) -> impl Iterator<Item = (HostId, &'a HostEntry)> {
        ids.iter().filter_map(|&id| Some((id, self.hosts.get(&id)?)))
    }

    /// What the index would be if it were made anew.
    #[cfg(test)]
    pub(super) fn host_index_is_right(&self) -> bool {
        let mut anew = HostIndex::default();
        self.hosts.values().for_each(|host| anew.add(&host.record));
        anew == self.host_index
    }
}
