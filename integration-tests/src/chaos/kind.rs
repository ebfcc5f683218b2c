//! The kinds of faults.

use std::{fmt, time::Duration};

use rand::{Rng as _, rngs::StdRng, seq::SliceRandom as _};

/// A kind of fault. *Lost* is killed and away for a while, *hung* is stopped by SIGSTOP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Agent, keepers and QEMUs of one host are killed at once; the host is away for longer than the lease.
    HostLost,
    /// The same, and it is back before its lease has run out.
    HostReboots,
    /// The leader and a host at the same moment.
    LeaderAndHostLost,
    /// An agent is killed and started again: an upgrade.
    AgentUpgraded,
    /// An agent is stopped for longer than the lease.
    AgentHung,
    /// An agent is stopped for less than the lease.
    AgentHungBriefly,
    /// The keeper of one VM is killed.
    KeeperKilled,
    /// The keeper of one VM is stopped for longer than the lease.
    KeeperHung,
    /// The QEMU of one VM is killed.
    QemuKilled,
    /// The QEMU of one VM is stopped for a moment.
    QemuHung,
    /// A host is cut off, both ways, for longer than the lease.
    CutBoth,
    /// What a host sends is lost, for longer than the lease.
    CutOutgoing,
    /// What a host should hear is lost, for longer than the lease.
    CutIncoming,
    /// A host is cut off for less than the lease.
    CutBriefly,
    /// A tenth of a host's packets is lost.
    PacketLoss,
    /// A third of a host's packets is lost: its lease may run out.
    HeavyPacketLoss,
    /// What goes to the leader and comes from it is late.
    LeaderSlow,
    /// The leader's way to etcd is slow.
    LeadersEtcdSlow,
    /// The leader is cut off from etcd.
    LeaderWithoutEtcd,
    /// A controller that does not lead is killed.
    FollowerLost,
    /// The leader is killed.
    LeaderLost,
    /// The leader is stopped.
    LeaderHung,
    /// A member of etcd that does not lead is killed.
    MemberLost,
    /// A member of etcd that does not lead is stopped.
    MemberHung,
    /// etcd's leader is killed.
    EtcdLeaderLost,
    /// etcd's leader is stopped.
    EtcdLeaderHung,
    /// The leader and etcd's leader are killed at the same moment.
    BothLeadersLost,
    /// All controllers are killed and started again.
    ControllersRestarted,
    /// etcd's quota is used up.
    EtcdFull,
}

/// Every kind.
pub const ALL: [Kind; 29] = [
    Kind::HostLost,
    Kind::HostReboots,
    Kind::LeaderAndHostLost,
    Kind::AgentUpgraded,
    Kind::AgentHung,
    Kind::AgentHungBriefly,
    Kind::KeeperKilled,
    Kind::KeeperHung,
    Kind::QemuKilled,
    Kind::QemuHung,
    Kind::CutBoth,
    Kind::CutOutgoing,
    Kind::CutIncoming,
    Kind::CutBriefly,
    Kind::PacketLoss,
    Kind::HeavyPacketLoss,
    Kind::LeaderSlow,
    Kind::LeadersEtcdSlow,
    Kind::LeaderWithoutEtcd,
    Kind::FollowerLost,
    Kind::LeaderLost,
    Kind::LeaderHung,
    Kind::MemberLost,
    Kind::MemberHung,
    Kind::EtcdLeaderLost,
    Kind::EtcdLeaderHung,
    Kind::BothLeadersLost,
    Kind::ControllersRestarted,
    Kind::EtcdFull,
];

impl Kind {
    /// The kind that is called this, as `host-lost`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|kind| kind.to_string() == name)
    }

    /// For how long the fault stays, with the default lease of 6 s in mind.
    pub fn lasts(self, rng: &mut StdRng) -> Duration {
        let (least, most) = match self {
            // Longer than lease, allowance and a start: whoever is moved is moved while the fault stays.
            Self::HostLost | Self::LeaderAndHostLost => (12_000, 16_000),
            Self::AgentHung | Self::KeeperHung | Self::CutBoth | Self::CutOutgoing | Self::CutIncoming => {
                (8_000, 13_000)
            }
            Self::HostReboots => (200, 3_000),
            // With the second that the last heartbeat may be old and a dial afterwards, this is less than 6 s.
            Self::AgentHungBriefly | Self::CutBriefly => (500, 2_500),
            Self::AgentUpgraded | Self::ControllersRestarted => (0, 300),
            Self::KeeperKilled | Self::QemuKilled => (0, 0),
            Self::QemuHung => (500, 4_000),
            Self::PacketLoss | Self::HeavyPacketLoss | Self::LeaderSlow | Self::LeadersEtcdSlow => (4_000, 8_000),
            Self::LeaderWithoutEtcd | Self::LeaderLost | Self::LeaderHung | Self::FollowerLost => (3_000, 8_000),
            Self::MemberLost | Self::MemberHung | Self::EtcdLeaderLost | Self::EtcdLeaderHung => (5_000, 10_000),
            Self::BothLeadersLost => (5_000, 10_000),
            Self::EtcdFull => (3_000, 8_000),
        };
        Duration::from_millis(rng.random_range(least..=most))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = String::new();
        for c in format!("{self:?}").chars() {
            if c.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(c.to_ascii_lowercase());
        }
        f.pad(&name)
    }
}

/// Draws kinds so that each has had its turn before any comes again.
pub struct Deck {
    kinds: Vec<Kind>,
    left: Vec<Kind>,
}

impl Deck {
    /// Of these kinds, at least one.
    #[must_use]
    pub fn new(kinds: &[Kind]) -> Self {
        Self { kinds: kinds.to_vec(), left: Vec::new() }
    }

    /// The next one.
    pub fn draw(&mut self, rng: &mut StdRng) -> Kind {
        if self.left.is_empty() {
            self.left.clone_from(&self.kinds);
            self.left.shuffle(rng);
        }
        self.left.pop().expect("a deck has at least one kind")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn names_are_read_back_and_a_deck_has_every_kind() {
        for kind in ALL {
            assert_eq!(Kind::named(&kind.to_string()), Some(kind));
        }
        assert_eq!(Kind::LeadersEtcdSlow.to_string(), "leaders-etcd-slow");
        let draw = |seed| {
            let (mut deck, mut rng) = (Deck::new(&ALL), StdRng::seed_from_u64(seed));
            (0..ALL.len()).map(|_| deck.draw(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1).into_iter().collect::<BTreeSet<_>>().len(), ALL.len());
        assert_eq!(draw(7), draw(7), "the seed decides");
        assert_ne!(draw(7), draw(8));
    }
}
