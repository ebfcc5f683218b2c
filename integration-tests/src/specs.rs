//! Requests for the test guests.

use std::path::Path;

use uncloud_proto::v1::{
    CreateImageRequest, CreateVmRequest, Disk, DisplayType, GuestAgentMode, ImageFile, ImageFileRole, ImageKind,
    KernelBoot, VmSpec,
};

use crate::paths;

/// Name of the image of the boot-sector guest.
pub const MICRO: &str = "micro";
/// Name of the image of the Linux guest.
pub const LINUX: &str = "linux";
/// The pool that all hosts share.
pub const SHARED: &str = "default";
/// The pool that each host has for itself.
pub const LOCAL: &str = "local";

/// The 512-byte guest: its disk is an overlay of [`MICRO`] in the shared pool.
#[must_use]
pub fn micro(name: &str) -> CreateVmRequest {
    let disk = Disk { image: MICRO.into(), ..Disk::default() };
    let spec = VmSpec {
        memory_mib: 16,
        machine: "pc".into(),
        disks: vec![disk],
        // It has nothing to show and knows no agent, and many of them run at once.
        display: DisplayType::None.into(),
        guest_agent: GuestAgentMode::Disabled.into(),
        ..VmSpec::default()
    };
    request(name, spec)
}

/// The Linux guest: [`LINUX`] and an empty disk in the shared pool.
#[must_use]
pub fn linux(name: &str) -> CreateVmRequest {
    let kernel = KernelBoot { image: LINUX.into(), command_line: String::new() };
    let disk = Disk { size_bytes: 1 << 20, ..Disk::default() };
    request(name, VmSpec { memory_mib: 96, kernel: Some(kernel), disks: vec![disk], ..VmSpec::default() })
}

/// The same, with the spec changed.
#[must_use]
pub fn with(mut request: CreateVmRequest, change: impl FnOnce(&mut VmSpec)) -> CreateVmRequest {
    change(spec_mut(&mut request));
    request
}

/// The spec of a request.
pub fn spec_mut(request: &mut CreateVmRequest) -> &mut VmSpec {
    request.spec.get_or_insert_default()
}

fn request(name: &str, mut spec: VmSpec) -> CreateVmRequest {
    spec.vcpus = 1;
    spec.stop_grace_seconds = 10;
    CreateVmRequest { name: name.into(), spec: Some(spec), ..CreateVmRequest::default() }
}

/// The image of the boot-sector guest.
///
/// # Errors
///
/// The guest has not been made.
pub fn micro_image() -> anyhow::Result<CreateImageRequest> {
    Ok(disk_image(MICRO, &paths::guest("micro.img")?))
}

/// An image of one disk.
#[must_use]
pub fn disk_image(name: &str, path: &Path) -> CreateImageRequest {
    CreateImageRequest {
        name: name.into(),
        kind: ImageKind::Disk.into(),
        files: vec![file(ImageFileRole::Disk, path)],
        ..CreateImageRequest::default()
    }
}

/// The image of the Linux guest.
///
/// # Errors
///
/// The guest has not been made.
pub fn linux_image() -> anyhow::Result<CreateImageRequest> {
    let kernel = file(ImageFileRole::Kernel, &paths::guest("vmlinuz")?);
    let initrd = file(ImageFileRole::Initrd, &paths::guest("initrd.img")?);
    Ok(CreateImageRequest {
        name: LINUX.into(),
        kind: ImageKind::Kernel.into(),
        files: vec![kernel, initrd],
        command_line: "console=ttyS0 quiet".into(),
        ..CreateImageRequest::default()
    })
}

fn file(role: ImageFileRole, path: &Path) -> ImageFile {
    ImageFile { role: role.into(), source: path.display().to_string(), ..ImageFile::default() }
}
