//! How much of each place is promised to disks, whether their VMs run or not.

use std::collections::BTreeMap;

use uncloud_proto::ids::{HostId, VmId};
use uuid::Uuid;

use crate::{model::host::Pool, pieces::Pieces};

/// A place for disks. A directory that several hosts share is one place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The shared pool with this id in its marker.
    Shared(Uuid),
    /// The pool of this name on this host: one that only it has, or one whose id the VM's record does not say yet.
    OnHost(HostId, String),
}

/// The virtual sizes of all disks. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Disks {
    shared: BTreeMap<Uuid, Promised>,
    /// By the names of the pools.
    on_hosts: Pieces<HostId, BTreeMap<String, Promised>>,
    /// None is empty, and none has a place twice. A map would take ten times as much memory for the one or two that most have.
    of_vms: Pieces<VmId, Box<[(Place, u64)]>>,
}

/// What is promised in one place. It goes with the last VM.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Promised {
    vms: u32,
    /// The sum, in bytes.
    total: u64,
}

impl Promised {
    fn add(&mut self, bytes: u64) {
        self.vms += 1;
        self.total = self.total.saturating_add(bytes);
    }

    /// Whether somebody is left.
    fn take(&mut self, bytes: u64) -> bool {
        self.vms = self.vms.saturating_sub(1);
        self.total = self.total.saturating_sub(bytes);
        self.vms > 0
    }
}

impl Disks {
    /// A VM's disks have these sizes in these places, and in no others. Whether that leaves more room anywhere.
    pub(super) fn set(&mut self, vm: VmId, disks: BTreeMap<Place, u64>) -> bool {
        if self
            .of_vms
            .get(&vm)
            .map_or(disks.is_empty(), |now| now.iter().map(|(place, bytes)| (place, bytes)).eq(&disks))
        {
            return false;
        }
        let mut shrinks = false;
        for (place, bytes) in self.of_vms.remove(&vm).unwrap_or_default() {
            shrinks |= disks.get(&place).is_none_or(|&now| now < bytes);
            self.take(place, bytes);
        }
        for (place, &bytes) in &disks {
            match place {
                Place::Shared(id) => self.shared.entry(*id).or_default().add(bytes),
                Place::OnHost(host, pool) => {
                    let pools = self.on_hosts.piece_mut(host).entry(*host).or_default();
                    match pools.get_mut(pool) {
                        Some(promised) => promised.add(bytes),
                        None => drop(pools.insert(pool.clone(), Promised { vms: 1, total: bytes })),
                    }
                }
            }
        }
        if !disks.is_empty() {
            self.of_vms.insert(vm, disks.into_iter().collect());
        }
        shrinks
    }

    fn take(&mut self, place: Place, bytes: u64) {
        match place {
            Place::Shared(id) => {
                if self.shared.get_mut(&id).is_some_and(|promised| !promised.take(bytes)) {
                    self.shared.remove(&id);
                }
            }
            Place::OnHost(host, pool) => {
                let hosts = self.on_hosts.piece_mut(&host);
                let Some(pools) = hosts.get_mut(&host) else { return };
                if pools.get_mut(&pool).is_some_and(|promised| !promised.take(bytes)) {
                    pools.remove(&pool);
                }
                if pools.is_empty() {
                    hosts.remove(&host);
                }
            }
        }
    }

    fn promised(&self, host: HostId, pool: &Pool) -> (Option<&Promised>, Option<(Uuid, &Promised)>) {
        let here = self.on_hosts.get(&host).and_then(|pools| pools.get(&pool.name));
        (here, pool.shared_id.and_then(|id| Some((id, self.shared.get(&id)?))))
    }

    /// How large the disks of all VMs may become in a pool of this host, in bytes.
    pub(super) fn of_all(&self, host: HostId, pool: &Pool) -> u64 {
        let (here, shared) = self.promised(host, pool);
        let (here, shared) = (here.map_or(0, |p| p.total), shared.map_or(0, |(_, p)| p.total));
        here.saturating_add(shared)
    }

    /// How large the disks of all VMs but `vm` may become in a pool of this host, in bytes.
    pub(super) fn of_others(&self, host: HostId, pool: &Pool, vm: VmId) -> u64 {
        let own = self.of_vms.get(&vm);
        // A VM has few places.
        let own = |is: &dyn Fn(&Place) -> bool| {
            own.and_then(|own| own.iter().find(|(place, _)| is(place))).map_or(0, |(_, bytes)| *bytes)
        };
        let (here, shared) = self.promised(host, pool);
        let here = here.map_or(0, |promised| {
            let own = own(&|place| matches!(place, Place::OnHost(on, name) if *on == host && *name == pool.name));
            promised.total.saturating_sub(own)
        });
        let shared =
            shared.map_or(0, |(id, promised)| promised.total.saturating_sub(own(&|place| *place == Place::Shared(id))));
        here.saturating_add(shared)
    }
}
