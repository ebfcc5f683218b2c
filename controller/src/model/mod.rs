//! What is stored in etcd: one JSON document per key.
//!
//! Fields that an older program does not know survive its rewrite of a record: every record keeps them in
//! `extra`. Nothing in here does I/O.

pub mod cluster;
pub mod event;
pub mod host;
pub mod image;
pub mod keys;
pub mod migration;
pub mod vm;

use std::{fmt::Display, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use uncloud_proto::ids::VmId;

pub use cluster::{ClusterRecord, FailoverOff, LeaderRecord, RequestAnswer, RequestRecord};
pub use event::{EventRecord, EventType, Subject};
pub use host::{DrainHow, HostMode, HostRecord, Liveness, OwnDisks};
pub use image::ImageRecord;
pub use keys::Key;
pub use vm::{Desired, Phase, VmRecord, VmStatusRecord};

/// The fields of a record that this program does not know.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// One record, as it is stored under a [`Key`] of the same kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Under [`Key::Vm`].
    Vm(Arc<VmRecord>),
    /// Under [`Key::VmStatus`].
    VmStatus(Arc<VmStatusRecord>),
    /// Under [`Key::VmName`].
    VmName(VmId),
    /// Under [`Key::Mac`].
    Mac(VmId),
    /// Under [`Key::Host`].
    Host(Arc<HostRecord>),
    /// Under [`Key::Image`].
    Image(Arc<ImageRecord>),
    /// Under [`Key::Request`].
    Request(Arc<RequestRecord>),
    /// Under [`Key::Event`].
    Event(Arc<EventRecord>),
    /// Under [`Key::Leader`].
    Leader(Arc<LeaderRecord>),
    /// Under [`Key::Cluster`].
    Cluster(Arc<ClusterRecord>),
}

/// Why the bytes under a key are not a record.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON of the right shape.
    #[error("not a valid record")]
    Json(#[from] serde_json::Error),
    /// The record is about something else than its key says.
    #[error("the record's id is `{found}`, which is not what its key says")]
    WrongKey {
        /// The id in the record.
        found: String,
    },
}

impl Record {
    /// The bytes that are stored.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        match self {
            Self::Vm(r) => encode(r.as_ref()),
            Self::VmStatus(r) => encode(r.as_ref()),
            Self::VmName(id) | Self::Mac(id) => encode(id),
            Self::Host(r) => encode(r.as_ref()),
            Self::Image(r) => encode(r.as_ref()),
            Self::Request(r) => encode(r.as_ref()),
            Self::Event(r) => encode(r.as_ref()),
            Self::Leader(r) => encode(r.as_ref()),
            Self::Cluster(r) => encode(r.as_ref()),
        }
    }

    /// Reads the bytes that were stored under `key`.
    ///
    /// # Errors
    ///
    /// When they are not a record of the kind that `key` calls for, or it carries another id.
    pub fn from_json(key: &Key, bytes: &[u8]) -> Result<Self, Error> {
        fn same<T: PartialEq + Display>(found: &T, expected: &T) -> Result<(), Error> {
            if found == expected { Ok(()) } else { Err(Error::WrongKey { found: found.to_string() }) }
        }
        Ok(match key {
            Key::Vm(id) => {
                let mut r: VmRecord = decode(bytes)?;
                same(&r.id, id)?;
                // Lists that were read have room for four, and most VMs have one disk and one NIC.
                r.spec.disks.shrink_to_fit();
                r.spec.nics.shrink_to_fit();
                Self::Vm(Arc::new(r))
            }
            Key::VmStatus(_) => Self::VmStatus(Arc::new(decode(bytes)?)),
            Key::VmName { .. } => Self::VmName(decode(bytes)?),
            Key::Mac(_) => Self::Mac(decode(bytes)?),
            Key::Host(id) => {
                let r: HostRecord = decode(bytes)?;
                same(&r.id, id)?;
                Self::Host(Arc::new(r))
            }
            Key::Image(id) => {
                let r: ImageRecord = decode(bytes)?;
                same(&r.id, id)?;
                Self::Image(Arc::new(r))
            }
            Key::Request(_) => Self::Request(Arc::new(decode(bytes)?)),
            Key::Event { .. } => Self::Event(Arc::new(decode(bytes)?)),
            Key::Leader => Self::Leader(Arc::new(decode(bytes)?)),
            Key::Cluster => Self::Cluster(Arc::new(decode(bytes)?)),
        })
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("records have string keys and no values that JSON lacks")
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    Ok(serde_json::from_slice(bytes)?)
}
