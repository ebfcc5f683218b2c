//! What happened, to whom and why.

use std::fmt;

use serde::{Deserialize, Serialize};
use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, ImageId, VmId},
};
use uuid::Uuid;

use super::Extra;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", content = "id", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the words say it")]
pub enum Subject {
    Vm(VmId),
    Host(HostId),
    Image(ImageId),
    Cluster,
}

impl Subject {
    /// As it stands in an event's key; the nil UUID for the cluster.
    #[must_use]
    pub const fn uuid(self) -> Uuid {
        match self {
            Self::Vm(id) => id.uuid(),
            Self::Host(id) => id.uuid(),
            Self::Image(id) => id.uuid(),
            Self::Cluster => Uuid::nil(),
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// To whom.
    pub subject: Subject,
    /// The name that the subject had.
    pub subject_name: String,
    /// What.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// What and why, a sentence.
    pub message: String,
    /// When, ms since 1970.
    pub time: WallTime,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What can happen. The words are part of the API (`Event.type`) and are listed in docs/architecture.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/architecture.md lists them")]
pub enum EventType {
    // VMs
    Created,
    Placed,
    Pending,
    Started,
    StopRequested,
    StartRequested,
    RestartRequested,
    PauseRequested,
    ResumeRequested,
    DeleteRequested,
    Updated,
    Stopped,
    PoweredOff,
    Failed,
    Fenced,
    FailedOver,
    Unreachable,
    Deleted,
    MigrationStarted,
    Migrated,
    MigrationGivenUp,
    SnapshotRequested,
    SnapshotTaken,
    SnapshotDeleted,
    RevertRequested,
    Reverted,
    Troubled,
    Recovered,
    // hosts
    HostJoined,
    HostReturned,
    HostLapsed,
    HostDead,
    HostCordoned,
    HostUncordoned,
    HostDraining,
    HostRemoved,
    HostChanged,
    UnknownVm,
    // images
    ImageCreated,
    ImageDeleted,
    ImageReady,
    ImageFailed,
    // the cluster
    LeaderElected,
    BrakeEngaged,
    BrakeReleased,
    SettingsChanged,
    /// Failover was switched off for a while.
    FailoverOff,
    /// Failover was switched on again.
    FailoverOn,
    /// An event of a newer program.
    #[serde(other)]
    Other,
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names of the variants are the words of the API.
        fmt::Debug::fmt(self, f)
    }
}
