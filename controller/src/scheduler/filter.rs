//! What a host must fulfil to be given a VM. What concerns only its kind is in `kind.rs`.

use std::fmt;

use uncloud_proto::ids::{HostId, VmId};

use super::{Arrival, ClusterView, Home, HostView, Limits, Request, Resources};
use crate::model::{HostMode, Liveness, host::Pool};

/// Why a host cannot take a VM. Says so in the singular: "lacks 4 vCPUs".
///
/// The order of the variants is the order in which the filters are asked: first what concerns the host, then whether
/// it fits at all, then whether there is room.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rejection {
    /// Its lease has run out.
    Down,
    /// Its heartbeats are late.
    Silent,
    /// An operator said that it takes no VMs.
    Cordoned,
    /// It is being emptied.
    Draining,
    /// It is the one that the VM is to leave.
    Here,
    /// It cannot be the target of a migration.
    NoMigrations,
    /// It has as many migrations under way as it may.
    Busy,
    /// It executes guests in another way than the host that the VM comes from.
    OtherAccelerator,
    /// Its guests cannot have some features of the VM's CPU model.
    Features {
        /// Which, by QEMU's names, with commas.
        missing: String,
        /// The model.
        model: &'static str,
    },
    /// The VM is to see the host's own CPU, and QEMU's translator has none.
    NoOwnCpu,
    /// The VM sees the CPU of the host that it comes from, and this is another.
    OtherCpu,
    /// It does not have a label that the VM asks for.
    Label {
        /// The label.
        key: String,
        /// The value it should have.
        value: String,
    },
    /// It has no bridge of this name.
    NoBridge(String),
    /// It has no pool of this name.
    NoPool(String),
    /// Its pool of this name has a problem.
    PoolProblem(String),
    /// Its pool of this name is not the one that has the VM's disks.
    OtherPool(String),
    /// It has this pool over the network, and only the host that has the files can remove disks.
    NotItsFiles(String),
    /// It has this pool over the network, and then all disks of a VM must lie there.
    MixedPools(String),
    /// Its pool of this name is not its alone, and a disk there has the cache mode writeback.
    Writeback(String),
    /// The VM's disks are on another host and only there.
    NotHome,
    /// It has a VM of the same anti-affinity group.
    Group(String),
    /// It has not enough vCPUs left.
    Vcpus {
        /// How many are needed.
        needed: u32,
    },
    /// It has not enough memory left.
    Memory {
        /// How much is needed.
        needed_mib: u64,
    },
    /// Its pool of this name has not enough left that is not promised to other disks.
    PoolSpace {
        /// The pool.
        pool: String,
        /// How much is needed.
        needed_mib: u64,
    },
}

impl Rejection {
    /// The reason as it is said of `count` hosts: "2 lack 4 vCPUs".
    #[must_use]
    pub fn of(&self, count: usize) -> String {
        if count == 1 { format!("1 {self}") } else { format!("{count} {}", self.words(&PLURAL)) }
    }

    fn words(&self, verbs: &Verbs) -> String {
        let Verbs { is, has, lacks, does } = verbs;
        match self {
            Self::Down => format!("{is} down"),
            Self::Silent => format!("{is} silent"),
            Self::Cordoned => format!("{is} cordoned"),
            Self::Draining => format!("{is} being drained"),
            Self::Here => format!("{has} the VM already"),
            Self::NoMigrations => format!("{has} no migration address (the agent's --migration-address)"),
            Self::Busy => format!("{has} enough migrations under way; try again later"),
            Self::OtherAccelerator => format!("{does} not execute guests in the way in which its host does"),
            Self::Features { missing, model } => format!("{lacks} the CPU features {missing} of {model}"),
            Self::NoOwnCpu => format!("{has} no KVM, so a guest cannot see the host's own CPU"),
            Self::OtherCpu => format!("{has} another CPU than the host that it runs on, which the guest sees"),
            Self::Label { key, value } => format!("{lacks} label {key}={value}"),
            Self::NoBridge(bridge) => format!("{lacks} bridge `{bridge}` (the agent's --bridge)"),
            Self::NoPool(pool) => format!("{lacks} pool `{pool}`"),
            Self::PoolProblem(pool) => format!("{has} a problem with pool `{pool}`"),
            Self::OtherPool(pool) => format!("{has} another pool `{pool}` than the one with its disks"),
            Self::NotItsFiles(pool) => format!("{does} not have the files of pool `{pool}`"),
            Self::MixedPools(pool) => {
                format!("{has} pool `{pool}` over the network, and then all disks of a VM must lie in it")
            }
            Self::Writeback(pool) => {
                format!("{has} pool `{pool}` in common with others, where no disk can have the cache mode writeback")
            }
            Self::NotHome => format!("{does} not have its disks"),
            Self::Group(group) => format!("{has} a VM of group `{group}`"),
            Self::Vcpus { needed: 1 } => format!("{lacks} 1 vCPU"),
            Self::Vcpus { needed } => format!("{lacks} {needed} vCPUs"),
            Self::Memory { needed_mib } => format!("{lacks} {needed_mib} MiB of memory"),
            Self::PoolSpace { pool, needed_mib } => format!("{lacks} {needed_mib} MiB in pool `{pool}`"),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words(&SINGULAR))
    }
}

struct Verbs {
    is: &'static str,
    has: &'static str,
    lacks: &'static str,
    does: &'static str,
}

const SINGULAR: Verbs = Verbs { is: "is", has: "has", lacks: "lacks", does: "does" };
const PLURAL: Verbs = Verbs { is: "are", has: "have", lacks: "lack", does: "do" };

/// The first reason why `host` cannot take the VM.
pub(super) fn check(
    view: &ClusterView,
    id: HostId,
    host: HostView<'_>,
    request: &Request,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    check_presence(id, host, limits)?;
    check_not_here(id, request)?;
    host.kind.check_arrival(request)?;
    check_not_busy(id, request)?;
    host.kind.check_fit(request)?;
    check_home(id, request)?;
    check_now(view, id, host, request, limits)
}

/// What is asked of a host itself, and neither of its kind nor of the room on it.
pub(super) fn check_this_host(
    id: HostId,
    host: HostView<'_>,
    request: &Request,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    check_presence(id, host, limits)?;
    check_not_here(id, request)?;
    check_not_busy(id, request)?;
    check_home(id, request)
}

fn check_presence(id: HostId, host: HostView<'_>, limits: &Limits<'_>) -> Result<(), Rejection> {
    match host.record.liveness {
        Liveness::Up => {}
        Liveness::FastLapsed | Liveness::Dead => return Err(Rejection::Down),
    }
    if limits.silent.contains(&id) {
        return Err(Rejection::Silent);
    }
    match host.record.mode {
        HostMode::Active => Ok(()),
        HostMode::Cordoned => Err(Rejection::Cordoned),
        HostMode::Draining => Err(Rejection::Draining),
    }
}

fn check_not_here(id: HostId, request: &Request) -> Result<(), Rejection> {
    match &request.arrival {
        Arrival::Migration { from, .. } if *from == id => Err(Rejection::Here),
        Arrival::Start | Arrival::Removal | Arrival::Migration { .. } => Ok(()),
    }
}

fn check_not_busy(id: HostId, request: &Request) -> Result<(), Rejection> {
    match &request.arrival {
        Arrival::Migration { busy, .. } if busy.contains(&id) => Err(Rejection::Busy),
        Arrival::Start | Arrival::Removal | Arrival::Migration { .. } => Ok(()),
    }
}

fn check_home(id: HostId, request: &Request) -> Result<(), Rejection> {
    match request.home {
        Home::Anywhere | Home::SharedPools { .. } => Ok(()),
        Home::OnlyHost(home) if home == id => Ok(()),
        Home::OnlyHost(_) => Err(Rejection::NotHome),
    }
}

/// Whether there is room for it now, and none of its group.
pub(super) fn check_now(
    view: &ClusterView,
    id: HostId,
    host: HostView<'_>,
    request: &Request,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    if let Some(group) = &request.group
        && host.others_in_group(request.vm, group) > 0
    {
        return Err(Rejection::Group(group.clone()));
    }
    check_room(host, request.vm, request.resources(), limits)?;
    let new = request.pools.iter().filter(|(_, bytes)| **bytes > 0);
    for (pool, &bytes) in
        new.filter_map(|(name, bytes)| Some((host.record.pools.iter().find(|p| p.name == *name)?, bytes)))
    {
        check_disks(view, id, pool, request.vm, bytes, limits)?;
    }
    Ok(())
}

/// How many vCPUs may be promised on a host with so many CPU threads.
pub(super) fn vcpus(threads: u32, limits: &Limits<'_>) -> u64 {
    // 64 bits: the product of two u32 fits.
    u64::from(threads) * u64::from(limits.cpu_overcommit_percent) / 100
}

/// Whether a pool has room for disks of this size.
pub(super) fn check_disks(
    view: &ClusterView,
    host: HostId,
    pool: &Pool,
    vm: VmId,
    bytes: u64,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    // A pool that does not say how large it is has not been looked at yet, or is broken, which is told otherwise.
    let room = u128::from(pool.capacity_bytes) * u128::from(limits.disk_overcommit_percent) / 100;
    let is_full = |promised: u64| room < u128::from(promised) + u128::from(bytes);
    // Mostly there is room whether the VM has a part of that itself or not.
    if pool.capacity_bytes > 0
        && is_full(view.disks_of_all(host, pool))
        && is_full(view.disks_of_others(host, pool, vm))
    {
        return Err(Rejection::PoolSpace { pool: pool.name.clone(), needed_mib: bytes.div_ceil(1 << 20) });
    }
    Ok(())
}

/// Whether there is room for a VM of this size.
pub(super) fn check_room(
    host: HostView<'_>,
    vm: VmId,
    needed: Resources,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    let fits = |promised: Resources| {
        u64::from(promised.vcpus) + u64::from(needed.vcpus) <= vcpus(host.record.vcpus, limits)
            && promised.memory_mib.saturating_add(needed.memory_mib) <= host.record.memory_mib
    };
    // Mostly there is room whether the VM has a part of that itself or not.
    if fits(host.promised()) {
        return Ok(());
    }
    let promised = host.promised_to_others(vm);
    if vcpus(host.record.vcpus, limits) < u64::from(promised.vcpus) + u64::from(needed.vcpus) {
        return Err(Rejection::Vcpus { needed: needed.vcpus });
    }
    // Never overcommitted: a host that runs out of memory kills guests.
    if host.record.memory_mib < promised.memory_mib.saturating_add(needed.memory_mib) {
        return Err(Rejection::Memory { needed_mib: needed.memory_mib });
    }
    Ok(())
}
