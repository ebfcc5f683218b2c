//! What a VM's record and its last status mean together.

use uncloud_proto::clock::WallTime;

use super::VmEntry;
use crate::model::{Desired, Phase, VmStatusRecord};

/// What a VM is, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectiveStatus<'a> {
    /// The phase.
    pub phase: Phase,
    /// Why, in words.
    pub reason: &'a str,
    /// Since when.
    pub since: WallTime,
}

impl VmEntry {
    /// The status, if it is about the present incarnation on the present host.
    #[must_use]
    pub fn current_status(&self) -> Option<&VmStatusRecord> {
        let placement = &self.record.placement;
        self.status.as_deref().filter(|s| placement.host.is_some() && s.incarnation == placement.incarnation)
    }

    /// What the VM is now. A status about an older incarnation says nothing.
    #[must_use]
    pub fn effective_status(&self) -> EffectiveStatus<'_> {
        let placement = &self.record.placement;
        let from_placement = |phase| EffectiveStatus { phase, reason: &placement.why, since: placement.since };
        let current = self.current_status();
        match (self.record.desired, placement.host) {
            (Desired::Deleted, _) => match current {
                Some(s) if s.phase == Phase::Deleting || s.phase == Phase::Unreachable => {
                    EffectiveStatus { phase: Phase::Deleting, reason: &s.reason, since: s.since }
                }
                Some(_) | None => EffectiveStatus {
                    phase: Phase::Deleting,
                    reason: "waiting for the host to remove it",
                    since: placement.since,
                },
            },
            (Desired::Running, None) => from_placement(Phase::Pending),
            (Desired::Stopped, None) => from_placement(Phase::Stopped),
            (Desired::Running | Desired::Stopped, Some(_)) => match current {
                Some(s) => {
                    let phase = match (&self.record.migration, s.phase) {
                        (Some(_), Phase::Running) => Phase::Migrating,
                        (None, Phase::Running) if s.paused => Phase::Paused,
                        (_, phase) => phase,
                    };
                    EffectiveStatus { phase, reason: &s.reason, since: s.since }
                }
                None => from_placement(Phase::Scheduled),
            },
        }
    }

    /// Whether the VM takes up room on the host that its placement names: it should run there, or may still execute
    /// there.
    #[must_use]
    pub fn holds_room(&self) -> bool {
        if self.record.placement.host.is_none() {
            return false;
        }
        let phase = self.current_status().map(|s| s.phase);
        match self.record.desired {
            Desired::Running => true,
            Desired::Stopped => phase != Some(Phase::Stopped),
            // A host that only removes what another one has left is given no guest.
            Desired::Deleted => phase != Some(Phase::Stopped) && phase != Some(Phase::Deleting),
        }
    }

    /// Whether the host that the VM was given has said that the VM does not execute, and that it will not under this
    /// incarnation. `Failed` does not say so: an agent that has not heard that it should stop tries again by itself. Neither does one
    /// that is still to do something to the disks: it may be at it.
    #[must_use]
    pub fn ended_for_good(&self) -> bool {
        self.current_status().is_some_and(|s| s.phase == Phase::Stopped) && !self.record.has_disk_orders()
    }
}
