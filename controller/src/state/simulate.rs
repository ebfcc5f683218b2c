//! What would become of VMs if their hosts died: the code that decides it when they do, on a changed copy of what it is decided
//! on. Nothing is written.

use std::collections::BTreeSet;

use uncloud_proto::ids::{HostId, VmId};

use super::{
    State,
    command::{Context, Refusal},
    decide::place_one,
    draft::Draft,
    placement::{lease_lapsed, placing_order},
};
use crate::model::{Desired, HostRecord, Liveness, VmRecord, vm::Failover};

/// What would become of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// The VM.
    pub vm: VmId,
    /// Where it is.
    pub from: HostId,
    /// What would become of it.
    pub outcome: Outcome,
}

/// What would become of a VM whose host died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It would run elsewhere.
    Moves {
        /// Where.
        to: HostId,
        /// Why there.
        why: String,
    },
    /// It would run elsewhere, with new disks.
    MovesWithNewDisks {
        /// Where.
        to: HostId,
        /// Why there.
        why: String,
    },
    /// No host could take it.
    Pending {
        /// Why not.
        why: String,
    },
    /// It would wait for its host.
    Unreachable {
        /// Why.
        why: String,
    },
}

impl State {
    /// What would become of the VMs that should run on these hosts if all of them died now, in the order in which they would be
    /// given hosts: first those that live under the short lease, then the others.
    ///
    /// # Errors
    ///
    /// A host is not there, or its record cannot be read.
    pub fn simulate_failure(&self, hosts: &BTreeSet<HostId>, cx: &Context) -> Result<Vec<Fate>, Refusal> {
        let mut draft = Draft::new(self, cx);
        for &host in hosts {
            draft.host(host)?;
        }
        let on_them = hosts.iter().flat_map(|&host| self.vms_on(host)).filter_map(|vm| Some(&self.vm(vm)?.record));
        let mut left: Vec<&VmRecord> = on_them.map(|r| &**r).filter(|r| r.desired == Desired::Running).collect();
        left.sort_by_cached_key(|vm| placing_order(vm));
        let mut fates = Vec::with_capacity(left.len());
        // A verdict on the short leases comes first, and moves those that live under it.
        for liveness in [Liveness::FastLapsed, Liveness::Dead] {
            for &host in hosts {
                let record = draft.host(host)?;
                if record.liveness != Liveness::Dead {
                    draft.put_host(HostRecord { liveness, ..(*record).clone() })?;
                }
            }
            let mut stay = Vec::new();
            for vm in left {
                if !lease_lapsed(vm.spec.failover, liveness) {
                    stay.push(vm);
                    continue;
                }
                place_one(&mut draft, vm.id)?;
                match fate(&draft, vm, hosts) {
                    Some(moved @ Fate { outcome: Outcome::Moves { .. } | Outcome::MovesWithNewDisks { .. }, .. }) => {
                        fates.push(moved);
                    }
                    // It is tried again with the rest.
                    Some(Fate { outcome: Outcome::Pending { .. } | Outcome::Unreachable { .. }, .. }) | None => {
                        stay.push(vm);
                    }
                }
            }
            left = stay;
        }
        fates.extend(left.into_iter().filter_map(|vm| fate(&draft, vm, hosts)));
        Ok(fates)
    }
}

/// What has been decided about a VM. Nothing if its record cannot be read.
fn fate(draft: &Draft<'_>, before: &VmRecord, hosts: &BTreeSet<HostId>) -> Option<Fate> {
    let entry = draft.vm(before.id).ok()?;
    let after = &entry.record;
    let why = after.placement.why.clone();
    let outcome = match after.placement.host {
        None => Outcome::Pending { why },
        Some(to) if !hosts.contains(&to) => {
            if before.disks_exist && after.disk_generation != before.disk_generation {
                Outcome::MovesWithNewDisks { to, why }
            } else {
                Outcome::Moves { to, why }
            }
        }
        Some(_) if before.spec.failover == Failover::Hold => {
            Outcome::Unreachable { why: "`failover: hold` keeps it on its host".to_owned() }
        }
        Some(_) => Outcome::Unreachable { why: entry.effective_status().reason.to_owned() },
    };
    Some(Fate { vm: before.id, from: before.placement.host?, outcome })
}
