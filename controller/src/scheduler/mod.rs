//! Chooses a host for a VM, and says why every other host lost.
//!
//! Pure functions of their arguments: the same [`ClusterView`], [`Request`] and [`Limits`] give the same answer on
//! every controller, at any time. No clock, no randomness, no logging: whoever calls (`state/`, `api/`) stores and
//! shows what comes out. It knows nothing of etcd or of agents. "What if this host died now" is the same function
//! on a changed copy of the view.
//!
//! Two kinds of rule, always in this order:
//!
//! 1. *Filters* (`filter.rs`) must hold. A host is refused for the first one that it fails, so each host is counted
//!    under exactly one [`Rejection`].
//! 2. *Scores* (`score.rs`) are preferences, compared field by field; the order of the fields is the policy. The host
//!    id comes last, so a tie never depends on the order of a map.
//!
//! # Invariants
//!
//! * A choice never promises more memory than a host has, nor more vCPUs than `capacity × overcommit`.
//! * What a VM is already promised on a host does not count against the VM itself.
//! * The view that was kept up to date change by change equals the one that is built anew, and so does its index (`index.rs`).
//! * The index gives the answer that the scan over all hosts gives.

mod disks;
mod explain;
mod filter;
mod index;
mod kind;
mod score;
mod search;
mod view;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::ids::{HostId, VmId};
use uuid::Uuid;

use crate::model::{host::AcceleratorKind, vm::CpuModel};
pub use explain::{Explanation, Group, Unplaceable};
pub use filter::Rejection;

pub use disks::Place;
pub use view::{ClusterView, HostView, Needs, Resources};

/// A VM that wants a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The VM.
    pub vm: VmId,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The pools that its disks lie in, or will; and how large the disks may become that are yet to be made there, in bytes.
    pub pools: BTreeMap<String, u64>,
    /// Those of them in which it has disks that are written late (`DiskCache::Writeback`): no other host may have such a pool (D3).
    pub writeback_pools: BTreeSet<String>,
    /// The bridges that its network interfaces are ports of.
    pub bridges: BTreeSet<String>,
    /// Labels that the host must have, each with exactly this value.
    pub host_labels: BTreeMap<String, String>,
    /// Its anti-affinity group: no host takes two VMs of one group.
    pub group: Option<String>,
    /// Where its disks already are.
    pub home: Home,
    /// Taken if it passes every filter, however the scores stand.
    pub prefer: Option<HostId>,
    /// The CPU that its guest sees.
    pub cpu: CpuModel,
    /// How it comes to its host.
    pub arrival: Arrival,
    /// All hosts on which it is promised something already: what it holds does not count against itself. Others may be named, too.
    pub holds: Vec<HostId>,
}

impl Request {
    /// What the VM will be promised on its host.
    #[must_use]
    pub fn needs(&self) -> Needs {
        Needs { resources: self.resources(), group: self.group.clone() }
    }

    pub(crate) const fn resources(&self) -> Resources {
        Resources { vcpus: self.vcpus, memory_mib: self.memory_mib }
    }
}

/// How a VM comes to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is started there.
    Start,
    /// It does not: its disks are removed there.
    Removal,
    /// It goes on there, and comes from a host where it executes.
    Migration {
        /// Where it executes.
        from: HostId,
        /// How it executes there. A guest cannot go on in another way.
        accelerator: AcceleratorKind,
        /// Which CPU it has there, if its guest sees all of it. A guest cannot go on with another.
        fingerprint: String,
        /// Hosts that have as many migrations under way as they may.
        busy: BTreeSet<HostId>,
    },
}

/// Where a VM's disks already are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Home {
    /// Nowhere yet, or it has none.
    Anywhere,
    /// In shared pools: any host that has these very pools can open them.
    SharedPools {
        /// The id of the directory behind each pool's name.
        ids: BTreeMap<String, Uuid>,
    },
    /// On this host and nowhere else.
    OnlyHost(HostId),
}

/// What the view does not know: settings, and what has been heard.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// vCPUs promised per CPU thread, in percent (400: four).
    pub cpu_overcommit_percent: u32,
    /// Bytes of disks promised per byte of a pool, in percent (200: two).
    pub disk_overcommit_percent: u32,
    /// Hosts whose heartbeats are late. Nothing is moved away from them, and nothing is placed there.
    pub silent: &'a BTreeSet<HostId>,
}

/// The host that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The host.
    pub host: HostId,
    /// Why this one, in words.
    pub why: String,
}

/// Chooses a host by the index, which asks few hosts.
///
/// # Errors
///
/// When every host fails a filter: which, and why. That asks all of them.
pub fn place(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Result<Choice, Unplaceable> {
    match search::best(view, request, limits) {
        Some((best, others)) => Ok(Choice { host: best.host, why: best.why(others) }),
        // When there is nothing to choose it is worth while to ask everybody for the reason.
        None => place_by_scan(view, request, limits),
    }
}

/// Chooses a host by asking all of them: what [`place`] is held against. Its answer is the same.
///
/// # Errors
///
/// When every host fails a filter: which, and why.
pub fn place_by_scan(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Result<Choice, Unplaceable> {
    let mut best: Option<score::Score> = None;
    let mut candidates = 0_usize;
    for (id, host) in view.hosts() {
        if filter::check(view, id, host, request, limits).is_ok() {
            let score = score::score(id, host, request);
            best = Some(best.map_or(score, |b| b.min(score)));
            candidates += 1;
        }
    }
    match best {
        Some(best) => {
            let others = if candidates > 1 { score::Others::Some } else { score::Others::None };
            Ok(Choice { host: best.host, why: best.why(others) })
        }
        // Only now, when there is nothing to choose, is it worth while to gather the reasons.
        None => Err(Unplaceable { groups: explain(view, request, limits).groups }),
    }
}

/// Whether a host has room for a VM of this size that it may have already. Nothing but room is looked at: a VM stays where it
/// is, whatever else would keep it from being placed there. `None`: there is no such host.
#[must_use]
pub fn room(
    view: &ClusterView,
    host: HostId,
    vm: VmId,
    needed: Resources,
    limits: &Limits<'_>,
) -> Option<Result<(), Rejection>> {
    view.host(host).map(|host| filter::check_room(host, vm, needed, limits))
}

/// Whether a host's pool has room for disks of `bytes` of a VM that may have some there already. Hosts and pools that are not
/// known have room: whoever needs them finds out.
///
/// # Errors
///
/// It has not.
pub fn disk_room(
    view: &ClusterView,
    host: HostId,
    pool: &str,
    vm: VmId,
    bytes: u64,
    limits: &Limits<'_>,
) -> Result<(), Rejection> {
    match view.host(host).and_then(|h| h.record.pools.iter().find(|p| p.name == pool)) {
        Some(pool) => filter::check_disks(view, host, pool, vm, bytes, limits),
        None => Ok(()),
    }
}

/// Says whether this host can take the VM now.
///
/// # Errors
///
/// Why it cannot. A host that is not known is down.
pub fn check(view: &ClusterView, host: HostId, request: &Request, limits: &Limits<'_>) -> Result<(), Rejection> {
    view.host(host).map_or(Err(Rejection::Down), |found| filter::check(view, host, found, request, limits))
}

/// Says of every host whether it could take the VM now, and if not, why.
#[must_use]
pub fn explain(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Explanation {
    let mut candidates = Vec::new();
    let mut refused: BTreeMap<Rejection, Vec<HostId>> = BTreeMap::new();
    for (id, host) in view.hosts() {
        match filter::check(view, id, host, request, limits) {
            Ok(()) => candidates.push(score::score(id, host, request)),
            Err(why) => refused.entry(why).or_default().push(id),
        }
    }
    candidates.sort_unstable();
    Explanation { candidates: candidates.into_iter().map(|s| s.host).collect(), groups: explain::grouped(refused) }
}
