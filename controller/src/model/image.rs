//! Images as they are stored.

use serde::{Deserialize, Serialize};
use uncloud_proto::{clock::WallTime, ids::ImageId};

use super::Extra;

/// An image: a disk, or a kernel with its initrd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Random (version 4).
    pub id: ImageId,
    /// Unique in the cluster.
    pub name: String,
    /// The kind.
    pub kind: ImageKind,
    /// Its files.
    pub files: Vec<ImageFile>,
    /// For a kernel, the command line of VMs that name none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command_line: String,
    /// When it was created, ms since 1970.
    pub created: WallTime,
    /// Whether VMs can be made from it. Not there: they can.
    #[serde(default, skip_serializing_if = "ImageState::is_ready")]
    pub state: ImageState,
    /// Why it is in this state, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A disk.
    Disk,
    /// A kernel, perhaps with an initrd.
    Kernel,
}

/// Whether VMs can be made from an image. Documented in `image.proto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in image.proto")]
pub enum ImageState {
    #[default]
    Ready,
    Fetching,
    Uploading,
    Failed,
    Deleting,
}

impl ImageState {
    /// What a record need not say.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// What it is to the image.
    pub role: FileRole,
    /// An absolute path on a host, `pool:NAME/path`, an address, or `upload:POOL`.
    pub source: String,
    /// 64 lower-case hexadecimal digits. Empty while an image is being fetched and nobody has said what it should be.
    pub sha256: String,
    /// Size in bytes. 0 while an image is being fetched and its server does not say.
    pub size_bytes: u64,
    /// Format of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Size of a disk as a guest sees it, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size_bytes: Option<u64>,
}

/// What a file is to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the words say it")]
pub enum FileRole {
    Disk,
    Kernel,
    Initrd,
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "QEMU's own names")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}
