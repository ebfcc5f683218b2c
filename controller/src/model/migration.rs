//! A VM's migration as it is stored: in the VM's record while it is under way, in its status how far it is and how the last
//! one ended.

use serde::{Deserialize, Serialize};
use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, Incarnation},
};

use super::{Extra, vm::VmRecord};

/// A migration under way. It ends by one write of the VM's record: the hand-over, which gives the VM to `target` with
/// `incarnation`, or the one that gives it up. Both drop it, so only one of them ever happens (docs/fencing.md, M1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// Where it goes.
    pub target: HostId,
    /// What it will be there. Reserved: nobody else ever gets this number.
    pub incarnation: Incarnation,
    /// Since when, ms since 1970.
    pub since: WallTime,
    /// Why there, in words.
    pub why: String,
    /// What both QEMUs know and nobody else: 64 hexadecimal digits. Good for this migration only.
    pub secret: String,
    /// The most that may be sent. 0: no limit.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// How far the target is.
    #[serde(default)]
    pub arrival: Arrival,
    /// Where the target's QEMU listens, IP:PORT. Empty while it does not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub address: String,
    /// The generation of the copies of its disks that the target makes. Reserved: no other disks ever get this number. `None`: both
    /// hosts share the disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_generation: Option<u32>,
    /// Where the target takes the disks, IP:PORT. Empty: it does not, or not yet.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub disks_address: String,
    /// When the source said that it has sent everything and stands still, ms since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<WallTime>,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// How far the target of a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// It is being made ready.
    #[default]
    Preparing,
    /// It listens.
    // `received` was stored once. Now a new leader is told of it.
    #[serde(alias = "received")]
    Listening,
}

/// How far a migration is, by the newest report of its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationProgress {
    /// Which one.
    pub incarnation: Incarnation,
    /// Bytes that have been sent.
    pub transferred_bytes: u64,
    /// Bytes that are left.
    pub remaining_bytes: u64,
    /// How fast.
    pub bytes_per_second: u64,
    /// How long the guest would stand still now.
    pub expected_downtime_ms: u32,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationEnd {
    /// Which one.
    pub incarnation: Incarnation,
    /// Where it went.
    pub target: HostId,
    /// What came of it.
    pub result: MigrationResult,
    /// Why. Empty if it is done.
    #[serde(default)]
    pub reason: String,
    /// When, ms since 1970.
    pub at: WallTime,
}

/// What came of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationResult {
    /// The VM is on the target.
    Done,
    /// It is not.
    GivenUp,
}

impl VmRecord {
    /// The incarnation that it gets next: larger than every one that it was ever given or that was reserved for it.
    #[must_use]
    pub fn next_incarnation(&self) -> Incarnation {
        let migration = self.migration.as_ref().map_or(Incarnation::NONE, |m| m.incarnation);
        self.placement.incarnation.max(self.reserved).max(migration).next()
    }

    /// The generation that its next disks get: larger than every one that its disks ever had or that was reserved for them.
    #[must_use]
    pub fn next_disk_generation(&self) -> u32 {
        self.disk_generation.max(self.disks_reserved).saturating_add(1)
    }
}
