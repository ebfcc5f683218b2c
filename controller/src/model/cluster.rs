//! Who leads, what all leaders must agree on, and the answers that were given.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uncloud_proto::{
    clock::WallTime,
    ids::{ControllerId, ImageId, VmId},
};

use super::Extra;

/// Who leads. The key's create revision is the term.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// The process.
    pub id: ControllerId,
    /// Where it serves.
    pub address: String,
    /// Since when, ms since 1970.
    pub since: WallTime,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What all leaders must agree on: a new leader waits out the longest lease that its predecessor may have granted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The short lease in ms.
    pub fast_lease_ms: u64,
    /// The long lease in ms.
    pub patient_lease_ms: u64,
    /// Failover is switched off, by a person and for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover_off: Option<FailoverOff>,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Failover is switched off: hosts hold leases until then, and none is declared lapsed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverOff {
    /// Until when, ms since 1970. It goes on by itself then.
    pub until: WallTime,
    /// For how long it was switched off, in ms. A leader whose clock is behind makes no more than this of `until`.
    #[serde(default = "longest_off_ms")]
    pub for_ms: u64,
    /// Why, as somebody said.
    pub reason: String,
}

/// What a record says that is silent about it: the longest that the API takes.
const fn longest_off_ms() -> u64 {
    3_600_000
}

impl FailoverOff {
    /// How much of it is left at `now`, on the reader's clock.
    #[must_use]
    pub fn left(&self, now: WallTime) -> Duration {
        Duration::from_millis(self.until.0.saturating_sub(now.0).min(self.for_ms))
    }
}

/// The answer that was given to a create request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// sha256 (or another digest, in hexadecimal) of the request: the same id with another request is refused.
    pub fingerprint: String,
    /// What was made.
    pub answer: RequestAnswer,
    /// When, ms since 1970.
    pub at: WallTime,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a create request made: the record as it was answered, so that the same call gets the same answer for ever.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestAnswer {
    /// A VM, as created.
    Vm {
        /// Its id.
        id: VmId,
        /// The record as it was.
        record: Box<super::VmRecord>,
    },
    /// An image.
    Image {
        /// Its id.
        id: ImageId,
    },
}
