//! Which of the hosts that can take a VM is the best.

use uncloud_proto::ids::HostId;

use super::{HostView, Request};
use crate::model::host::AcceleratorKind;

/// How a host compares. Lower is better; fields are compared from the top, so their order is the policy.
///
/// The policy is to *spread*. Packing would leave larger holes for large VMs, but it puts all VMs of a small cluster on
/// one host, whose death then stops all of them; and spreading leaves room on every host for those of a host that
/// dies. VMs of one anti-affinity group need no field here: the filter never lets two of them share a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// First the host that the VM was on or should be on: its images and disks are there.
    preference: Preference,
    /// Then one that executes guests by its CPU: the translator is slower by an order of magnitude.
    speed: Speed,
    /// Then the one with the smallest share of its memory promised once the VM is there, in parts per 100,000.
    memory_share: u64,
    /// Then the one with the fewest VMs.
    vms: usize,
    /// Then the lowest id, so that there is never a tie.
    pub(super) host: HostId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Preference {
    Preferred,
    Indifferent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Speed {
    Hardware,
    Translated,
}

impl Score {
    /// Why the host with this score was chosen among `candidates` hosts that passed every filter.
    pub(super) fn why(&self, candidates: usize) -> String {
        let share = self.memory_share / 1_000;
        match (self.preference, candidates) {
            (_, 1) => "the only host that can take it".to_owned(),
            (Preference::Preferred, _) => format!("preferred among {candidates} hosts that can take it"),
            (Preference::Indifferent, _) => {
                format!("the best of {candidates} hosts that can take it ({share} % of its memory promised with it)")
            }
        }
    }
}

/// Scores a host that passed every filter.
pub(super) fn score(id: HostId, host: HostView<'_>, request: &Request) -> Score {
    let promised = host.promised_to_others(request.vm).memory_mib;
    let after = u128::from(promised) + u128::from(request.memory_mib);
    let share = after * 100_000 / u128::from(host.record.memory_mib).max(1);
    Score {
        preference: if request.prefer == Some(id) { Preference::Preferred } else { Preference::Indifferent },
        speed: match host.record.accelerator.kind {
            AcceleratorKind::Kvm => Speed::Hardware,
            AcceleratorKind::Tcg => Speed::Translated,
        },
        memory_share: u64::try_from(share).unwrap_or(u64::MAX),
        vms: host.others(request.vm),
        host: id,
    }
}
