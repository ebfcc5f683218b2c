//! The brake: when the leader hears from fewer than half of the hosts, it assumes that the fault is on its own side.
//!
//! It engages at once, and lets go when half of the hosts have been heard without a break for as long as silence takes to
//! notice: after a fault of the network the others are then given time to come back, too, before any is declared
//! lapsed. It has no part in safety, it only withholds verdicts (L7).

use std::{collections::BTreeSet, time::Duration};

use uncloud_proto::{clock::Tick, ids::HostId};

/// The brake, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BrakeState {
    /// Whether it is on.
    pub engaged: bool,
    /// Hosts that are heard.
    pub heard: u32,
    /// Hosts that should be: all but those that have been declared lapsed.
    pub total: u32,
    /// Since when it is on.
    pub since: Option<Tick>,
}

#[derive(Debug, Default)]
pub(super) struct Brake {
    state: BrakeState,
    /// While engaged: since when enough hosts are heard.
    enough_since: Option<Tick>,
    /// Hosts that a person has said are really dead.
    released: BTreeSet<HostId>,
}

impl Brake {
    pub(super) const fn state(&self) -> BrakeState {
        self.state
    }

    /// Takes in how many hosts are heard now. `settle`: how long enough of them must be heard before it lets go.
    pub(super) fn observe(&mut self, heard: u32, total: u32, now: Tick, settle: Duration) {
        self.state.heard = heard;
        self.state.total = total;
        // Of two hosts, one is enough.
        if heard.saturating_mul(2) < total {
            self.enough_since = None;
            self.state.engaged = true;
            self.state.since.get_or_insert(now);
        } else if self.state.engaged {
            let since = *self.enough_since.get_or_insert(now);
            if now.since(since) >= settle {
                self.enough_since = None;
                self.state.engaged = false;
                self.state.since = None;
            }
        }
    }

    /// Whether a verdict on this host is withheld.
    pub(super) fn holds(&self, host: HostId) -> bool {
        self.state.engaged && !self.released.contains(&host)
    }

    /// A person said that these hosts are really dead.
    pub(super) fn release(&mut self, silent: impl IntoIterator<Item = HostId>) -> u32 {
        let before = self.released.len();
        self.released.extend(silent);
        u32::try_from(self.released.len() - before).unwrap_or(u32::MAX)
    }

    /// The host was heard, or is gone: what a person said of it no longer counts.
    pub(super) fn forget(&mut self, host: HostId) {
        self.released.remove(&host);
    }
}
