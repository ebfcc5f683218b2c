//! Which of the hosts that can take a VM is the best.

use std::cmp::Ordering;

use uncloud_proto::ids::HostId;

use super::{HostView, Request, index::Rank, kind::Size};
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
    /// Then the one with the smallest share of its memory promised once the VM is there.
    memory_share: Share,
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

/// A part of a whole, compared exactly: of hosts of one size, the order is that of what is promised on them (`index.rs`).
#[derive(Clone, Copy, Debug)]
struct Share {
    part: u64,
    /// Not 0.
    whole: u64,
}

impl Ord for Share {
    fn cmp(&self, other: &Self) -> Ordering {
        if self.whole == other.whole {
            return self.part.cmp(&other.part);
        }
        // As almost always: less than 4 PiB, in MiB.
        if let (Ok(part), Ok(whole), Ok(other_part), Ok(other_whole)) =
            (u32::try_from(self.part), u32::try_from(self.whole), u32::try_from(other.part), u32::try_from(other.whole))
        {
            return (u64::from(part) * u64::from(other_whole)).cmp(&(u64::from(other_part) * u64::from(whole)));
        }
        let (ours, theirs) =
            (u128::from(self.part) * u128::from(other.whole), u128::from(other.part) * u128::from(self.whole));
        ours.cmp(&theirs)
    }
}

impl PartialOrd for Share {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Share {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Share {}

/// Whether the host that was chosen was the only one that could take the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    None,
    /// At least one, or none of many that were asked. How many is not known: the index does not ask them all.
    Some,
}

impl Score {
    /// Why the host with this score was chosen.
    pub(super) fn why(&self, others: Others) -> String {
        match (self.preference, others) {
            (_, Others::None) => "the only host that can take it".to_owned(),
            (Preference::Preferred, Others::Some) => "preferred among the hosts that can take it".to_owned(),
            (Preference::Indifferent, Others::Some) => {
                let Share { part, whole } = self.memory_share;
                let percent = part.saturating_mul(100) / whole;
                format!("the best of the hosts that can take it ({percent} % of its memory promised with it)")
            }
        }
    }

    pub(super) fn is_preferred(&self) -> bool {
        self.preference == Preference::Preferred
    }

    /// Of a host of this size on which the VM holds nothing yet, and which is not preferred.
    pub(super) fn of_rank(size: Size, rank: Rank, request: &Request) -> Self {
        Self {
            preference: Preference::Indifferent,
            speed: speed(size.accelerator),
            memory_share: share(rank.memory_mib, request.memory_mib, size.memory_mib),
            vms: usize::try_from(rank.vms).unwrap_or(usize::MAX),
            host: rank.host,
        }
    }
}

/// Scores a host that passed every filter.
pub(super) fn score(id: HostId, host: HostView<'_>, request: &Request) -> Score {
    let promised = host.promised_to_others(request.vm).memory_mib;
    Score {
        preference: if request.prefer == Some(id) { Preference::Preferred } else { Preference::Indifferent },
        speed: speed(host.record.accelerator.kind),
        memory_share: share(promised, request.memory_mib, host.record.memory_mib),
        vms: host.others(request.vm),
        host: id,
    }
}

const fn speed(accelerator: AcceleratorKind) -> Speed {
    match accelerator {
        AcceleratorKind::Kvm => Speed::Hardware,
        AcceleratorKind::Tcg => Speed::Translated,
    }
}

fn share(promised_mib: u64, new_mib: u64, of_mib: u64) -> Share {
    Share { part: promised_mib.saturating_add(new_mib), whole: of_mib.max(1) }
}
