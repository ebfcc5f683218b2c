//! What a VM's task is told to do with disks that are there, and what it says that it has done. Data only: `state/disks.rs` decides,
//! `storage/` and `qemu/disks.rs` act.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uncloud_proto::ids::VmId;
use uuid::Uuid;

/// What the leader wants done to the disks of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Snapshots to take and to remove.
    #[serde(default)]
    pub snapshots: Vec<SnapshotOrder>,
    /// Put all disks back to a snapshot. Only of what is stopped.
    #[serde(default)]
    pub revert: Option<Revert>,
    /// Numbers of what is to be done to single disks; their states in the spec say what.
    #[serde(default)]
    pub disks: Vec<u64>,
}

/// A snapshot to take or to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOrder {
    /// Its name in the disks' files.
    pub id: Uuid,
    /// Which of the two.
    pub wanted: Wanted,
}

/// Whether a snapshot should be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// It should.
    There,
    /// It should not.
    Gone,
}

/// Disks to be put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// The snapshot.
    pub snapshot: Uuid,
    /// Tells it from those before.
    pub number: u64,
}

/// Whose disks those of a VM are copies of, as long as they are not made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneFrom {
    /// The VM that they belong to.
    pub vm: VmId,
    /// Part of their file names.
    pub disk_generation: u32,
    /// The generations of those disks that have another, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kept_generations: BTreeMap<String, u32>,
    /// The snapshot that is copied. Absent: the disks as they are.
    #[serde(default)]
    pub snapshot: Option<Uuid>,
}

/// What the guest did when a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestThen {
    /// It held its file systems still.
    Frozen,
    /// It ran.
    Ran,
    /// It did not run.
    Off,
}

/// What has been done to the disks of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Snapshots that should be there and are.
    pub made: Vec<Uuid>,
    /// What the guest did when they were taken, where that is known.
    pub guests: BTreeMap<Uuid, GuestThen>,
    /// Snapshots that should be gone and are.
    pub removed: Vec<Uuid>,
    /// The newest revert that was carried out. 0: none.
    pub reverted: u64,
    /// Numbers of what was done to single disks.
    pub disks: Vec<u64>,
    /// What the guest does for snapshots that another host takes.
    pub holds: Holds,
}

/// Holds of a guest's file systems, under which another host takes snapshots of its disks. Each has an id of its own: nobody takes one for
/// another that came later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holds {
    /// Snapshots that may be taken now: the guest holds still, or cannot.
    pub ready: Vec<Uuid>,
    /// The one that stands.
    pub now: Option<Uuid>,
    /// The newest one, if it lasted until nothing was to be taken any more.
    pub lasted: Option<Uuid>,
}

impl Orders {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshots.is_empty() && self.revert.is_none() && self.disks.is_empty()
    }

    /// Ids of the snapshots that should be there, or gone.
    pub fn ids(&self, wanted: Wanted) -> impl Iterator<Item = Uuid> + '_ {
        self.snapshots.iter().filter(move |s| s.wanted == wanted).map(|s| s.id)
    }

    /// What is to be said when all of it is done.
    #[must_use]
    pub fn done(&self) -> Done {
        Done {
            made: self.ids(Wanted::There).collect(),
            guests: BTreeMap::new(),
            removed: self.ids(Wanted::Gone).collect(),
            reverted: self.revert.map_or(0, |r| r.number),
            disks: self.disks.clone(),
            holds: Holds::default(),
        }
    }
}
