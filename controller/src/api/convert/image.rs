//! Images.

use uncloud_proto::v1;

use super::timestamp;
use crate::{
    model::image::{DiskFormat, FileRole, ImageFile, ImageKind, ImageState},
    state::ImageEntry,
};

/// An image.
pub(crate) fn image(entry: &ImageEntry) -> v1::Image {
    let record = &entry.record;
    let kind = match record.kind {
        ImageKind::Disk => v1::ImageKind::Disk,
        ImageKind::Kernel => v1::ImageKind::Kernel,
    };
    v1::Image {
        id: record.id.to_string(),
        name: record.name.clone(),
        kind: kind.into(),
        files: record.files.iter().map(file).collect(),
        command_line: record.command_line.clone(),
        created: timestamp(record.created),
        revision: entry.revision.0,
        state: match record.state {
            ImageState::Ready => v1::ImageState::Ready,
            ImageState::Fetching => v1::ImageState::Fetching,
            ImageState::Uploading => v1::ImageState::Uploading,
            ImageState::Failed => v1::ImageState::Failed,
            ImageState::Deleting => v1::ImageState::Deleting,
        }
        .into(),
        reason: record.reason.clone(),
    }
}

fn file(file: &ImageFile) -> v1::ImageFile {
    let role = match file.role {
        FileRole::Disk => v1::ImageFileRole::Disk,
        FileRole::Kernel => v1::ImageFileRole::Kernel,
        FileRole::Initrd => v1::ImageFileRole::Initrd,
    };
    let format = match file.format {
        Some(DiskFormat::Raw) => v1::ImageFormat::Raw,
        Some(DiskFormat::Qcow2) => v1::ImageFormat::Qcow2,
        None => v1::ImageFormat::Unspecified,
    };
    v1::ImageFile {
        role: role.into(),
        source: file.source.clone(),
        sha256: file.sha256.clone(),
        size_bytes: file.size_bytes,
        format: format.into(),
        virtual_size_bytes: file.virtual_size_bytes.unwrap_or(0),
    }
}
