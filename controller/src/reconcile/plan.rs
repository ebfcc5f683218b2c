//! What is to be done now: which VMs need a host, mainly. Pure, so that a pass can be planned again at any time.
//!
//! A plan is made from the state alone, never from what has just changed: a lost wake-up costs time and nothing else.
//! [`Attempts`] remembers which VMs no host could take, so that they are not tried again before something has changed.
//! Whether and where a VM may go is decided by [`State::decide`], which looks again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use uncloud_proto::{
    clock::Tick,
    ids::{HostId, VmId},
};

use crate::{
    health::Timings,
    model::{ClusterRecord, Desired, VmRecord},
    state::{MAX_PLACEMENTS, State, command::Command, lease_lapsed, placing_order},
};

/// How many VMs one command may move.
pub const BATCH: usize = MAX_PLACEMENTS;

/// A VM that no host could take is tried again after this long, even if nothing seems to have changed.
const RETRY: Duration = Duration::from_secs(5);

/// It is tried again sooner when room may have appeared, but not more often than this: in a busy cluster something is
/// released all the time, and each try looks at every host.
const RETRY_SOON: Duration = Duration::from_millis(250);

/// What decides, besides the VM itself, whether a host can be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Situation {
    /// [`ClusterView::openings`](crate::scheduler::ClusterView::openings).
    pub openings: u64,
    /// Hosts on which nothing is placed because they are silent.
    pub silent: Arc<BTreeSet<HostId>>,
}

/// VMs that were tried and that no host could take. Lives as long as the term.
#[derive(Debug, Default)]
pub struct Attempts {
    tried: BTreeMap<VmId, Attempt>,
}

#[derive(Debug)]
struct Attempt {
    at: Tick,
    situation: Arc<Situation>,
    /// What the VM was then; another one is another matter.
    desired: Desired,
    host: Option<HostId>,
}

impl Attempts {
    /// These VMs were tried in this situation. Forgets all that have found a host since, or need none any more.
    pub fn note(&mut self, vms: &[VmId], situation: &Arc<Situation>, state: &State, now: Tick) {
        for &vm in vms {
            if let Some(entry) = state.vm(vm) {
                let (desired, host) = (entry.record.desired, entry.record.placement.host);
                self.tried.insert(vm, Attempt { at: now, situation: Arc::clone(situation), desired, host });
            }
        }
        let wanting: BTreeSet<VmId> = wanting(state).map(|vm| vm.id).collect();
        self.tried.retain(|vm, _| wanting.contains(vm));
    }

    fn is_due(&self, vm: &VmRecord, situation: &Situation, now: Tick) -> bool {
        let Some(last) = self.tried.get(&vm.id) else { return true };
        if (last.desired, last.host) != (vm.desired, vm.placement.host) {
            return true;
        }
        let pause = if *last.situation == *situation { RETRY } else { RETRY_SOON };
        now.since(last.at) >= pause
    }
}

/// The VMs that need a host and are due for a try, in batches: higher priority first, and of equals the largest first,
/// which are the hardest to fit.
#[must_use]
pub fn plan(state: &State, attempts: &Attempts, situation: &Situation, now: Tick) -> Vec<Vec<VmId>> {
    let mut due: Vec<&VmRecord> = wanting(state).filter(|vm| attempts.is_due(vm, situation, now)).collect();
    due.sort_by_cached_key(|vm| placing_order(vm));
    due.chunks(BATCH).map(|batch| batch.iter().map(|vm| vm.id).collect()).collect()
}

/// Longer leases on record are lowered in steps of this at least. Smaller ones would only cost writes.
const STEP_MS: u64 = 60_000;

/// What to do about the lengths of the leases on record: a successor waits for so long. They may be lowered to what this leader
/// grants once nothing runs under a longer lease, and until then to what is left of the longest (W3). `running` is
/// [`crate::health::HealthTable::running`], `off` for how much longer failover is off: leases of that length are granted.
#[must_use]
pub fn shorter_leases(
    stored: &ClusterRecord,
    own: &Timings,
    running: (Duration, Duration),
    off: Duration,
) -> Option<Command> {
    let shorter = |stored_ms: u64, own_lease: Duration, running: Duration| {
        let millis = |d: Duration| u64::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        if running <= own.wait(own_lease) && off.is_zero() {
            return millis(own_lease);
        }
        let left = millis(running.max(off));
        if left.saturating_add(STEP_MS) <= stored_ms { left } else { stored_ms }
    };
    let fast_lease_ms = shorter(stored.fast_lease_ms, own.fast, running.0);
    let patient_lease_ms = shorter(stored.patient_lease_ms, own.patient, running.1);
    let differ = (stored.fast_lease_ms, stored.patient_lease_ms) != (fast_lease_ms, patient_lease_ms);
    differ.then_some(Command::SetLeases { fast_lease_ms, patient_lease_ms })
}

/// All VMs that need a host, or another one than they have: those that the state says wait for one, and those on a host
/// on which the lease that they live under has surely run out. A host whose record cannot be read is not known to be lost.
fn wanting(state: &State) -> impl Iterator<Item = &VmRecord> {
    let stranded = state.lapsed_hosts().flat_map(|(_, host)| {
        let records = host.vms.iter().filter_map(|&vm| Some(&*state.vm(vm)?.record));
        records.filter(|vm| lease_lapsed(vm.spec.failover, host.record.liveness) && is_moved(vm.desired))
    });
    let homeless = state.pending().filter_map(|vm| Some(&*state.vm(vm)?.record));
    homeless.chain(stranded)
}

/// Whether a VM leaves a lost host. A stopped one is moved when it is started; of a deleted one another host can perhaps
/// remove the disks.
const fn is_moved(desired: Desired) -> bool {
    match desired {
        Desired::Running | Desired::Deleted => true,
        Desired::Stopped => false,
    }
}
