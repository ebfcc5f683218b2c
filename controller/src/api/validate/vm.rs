//! Checks `CreateVm` and fills in its defaults; checks `UpdateVm`.

use std::collections::BTreeSet;

use uncloud_proto::{
    ids::{ImageId, Revision, VmId},
    names, v1,
};
use uuid::Uuid;

use super::{Checker, DEFAULT_OWNER, MAX_COMMAND_LINE, Violations, VmRef, quoted};
use crate::{
    model::{
        Desired,
        vm::{
            CpuModel, Disk, DiskBus, DiskCache, DiskHotplug, Display, Failover, Firmware, GuestAgent, KernelBoot,
            Machine, Nic, NicKind, OnDiskLoss, RestartPolicy, VmSpec,
        },
    },
    state::{
        MAX_DISKS, MAX_SATA_DISKS,
        command::{ImageUse, NewVm, VmUpdate},
    },
};

const MAX_VCPUS: u64 = 256;
const MAX_MEMORY_MIB: u64 = 4 * 1024 * 1024;
/// How many network interfaces a VM may have.
pub(crate) const MAX_NICS: usize = 8;
const MAX_DISK_BYTES: u64 = 64 << 40;
const SECTOR: u64 = 512;
const MAX_PRIORITY: u64 = 1000;
const MAX_GRACE_SECONDS: u64 = 3600;
const DEFAULT_GRACE_SECONDS: u32 = 60;
const DEFAULT_POOL: &str = "default";

/// First byte of every MAC address that the cluster gives: locally administered, unicast.
const MAC_PREFIX: u8 = 0x42;

/// Checks a request to create a VM. `id` and the random bytes are made by the caller.
///
/// # Errors
///
/// All that is wrong with it.
pub(crate) fn create_vm(
    request: v1::CreateVmRequest,
    id: VmId,
    random: &mut dyn FnMut() -> [u8; 5],
) -> Result<NewVm, Violations> {
    let mut check = Checker::default();
    check.request_id(&request.request_id);
    let name = check.name("name", request.name);
    let owner = check.name_or("owner", request.owner, DEFAULT_OWNER);
    let labels = check.labels("labels", request.labels);
    let states = ["POWER_STATE_RUNNING", "POWER_STATE_STOPPED"];
    let desired = match check.known("desired", request.desired, &states) {
        Some(v1::PowerState::Unspecified | v1::PowerState::Running) | None => Desired::Running,
        Some(v1::PowerState::Stopped) => Desired::Stopped,
    };
    let Some(spec) = request.spec else {
        check.fail("spec", "is required: it says what the VM is made of, at least `memory_mib` and a disk or a kernel");
        return Err(check.finish(()).expect_err("a violation was noted"));
    };
    let mut image_names = Vec::new();
    let mut spec = check_spec(&mut check, spec, &mut image_names);
    let vm = {
        mint_macs(&mut spec, random);
        NewVm { id, name, owner, labels, spec, image_names, desired }
    };
    check.finish(vm)
}

/// Gives every network interface a new MAC address, all different.
pub(crate) fn mint_macs(spec: &mut VmSpec, random: &mut dyn FnMut() -> [u8; 5]) {
    let nics = spec.nics.len();
    for (nic, mac) in spec.nics.iter_mut().zip(macs(nics, random)) {
        nic.mac = mac;
    }
}

/// So many MAC addresses, all different.
pub(crate) fn macs(count: usize, random: &mut dyn FnMut() -> [u8; 5]) -> Vec<String> {
    let mut macs = Vec::with_capacity(count);
    while macs.len() < count {
        let [b, c, d, e, f] = random();
        let mac = format!("{MAC_PREFIX:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        if !macs.contains(&mac) {
            macs.push(mac);
        }
    }
    macs
}

fn check_spec(check: &mut Checker, spec: v1::VmSpec, images: &mut Vec<(ImageUse, String)>) -> VmSpec {
    let vcpus = check_vcpus(check, spec.vcpus);
    check_memory(check, spec.memory_mib);
    let machine = match spec.machine.as_str() {
        "" | "q35" => Machine::Q35,
        "pc" => Machine::Pc,
        other => {
            check.fail("spec.machine", format!("is `{}`; give `q35` or `pc`", quoted(other)));
            Machine::Q35
        }
    };
    if spec.kernel.is_none() && spec.disks.is_empty() {
        check.fail("spec.disks", "is empty, and there is no `spec.kernel`: give the VM something to boot from");
    }
    let kernel = spec.kernel.map(|kernel| check_kernel(check, kernel, images));
    let disks = check_disks(check, spec.disks, images);
    let disk_hotplug = disk_hotplug(check, spec.disk_hotplug, &disks);
    let nics = check_nics(check, &spec.nics);
    let grace = check_grace(check, spec.stop_grace_seconds);
    check.range("spec.priority", u64::from(spec.priority), 0, MAX_PRIORITY, "");
    // What boots by itself is taken for a whole machine.
    let whole = kernel.is_none();
    let display = display(check, spec.display).unwrap_or(if whole { Display::Standard } else { Display::None });
    let guest_agent =
        guest_agent(check, spec.guest_agent).unwrap_or(if whole { GuestAgent::Enabled } else { GuestAgent::Disabled });
    let host_labels = check.labels("spec.host_labels", spec.host_labels);
    let firmware = firmware(check, spec.firmware);
    if firmware == Firmware::Uefi && disks.is_empty() {
        check.fail(
            "spec.firmware",
            "is FIRMWARE_UEFI, whose variables lie beside the first disk: give `spec.disks` one",
        );
    }
    let cpu = cpu(check, spec.cpu).unwrap_or_default();
    let cloud_init = spec.cloud_init.map(|c| super::cloud_init::check(check, c));
    let group = spec.anti_affinity_group;
    let anti_affinity_group = (!group.is_empty()).then(|| check.name("spec.anti_affinity_group", group));
    VmSpec {
        vcpus,
        memory_mib: spec.memory_mib,
        machine,
        kernel,
        disks,
        nics,
        restart: restart_policy(check, spec.restart),
        failover: failover(check, spec.failover),
        on_disk_loss: on_disk_loss(check, spec.on_disk_loss),
        priority: spec.priority,
        host_labels,
        anti_affinity_group,
        stop_grace_seconds: grace,
        display,
        guest_agent,
        firmware,
        cpu,
        cloud_init,
        disk_hotplug,
        extra: Default::default(),
    }
}

fn check_vcpus(check: &mut Checker, vcpus: u32) -> u32 {
    let vcpus = if vcpus == 0 { 1 } else { vcpus };
    check.range("spec.vcpus", u64::from(vcpus), 1, MAX_VCPUS, "");
    vcpus
}

fn check_memory(check: &mut Checker, memory_mib: u64) {
    if memory_mib == 0 {
        check.fail("spec.memory_mib", format!("is required: give 1 to {MAX_MEMORY_MIB} MiB"));
    } else {
        check.range("spec.memory_mib", memory_mib, 1, MAX_MEMORY_MIB, " MiB");
    }
}

/// The virtual size of a disk. 0 is for the caller to judge.
pub(super) fn check_disk_size(check: &mut Checker, field: &str, size: u64) {
    if size > MAX_DISK_BYTES {
        check.fail(field, format!("is {size}; at most {MAX_DISK_BYTES} (64 TiB) are allowed"));
    } else if !size.is_multiple_of(SECTOR) {
        check.fail(field, format!("is {size}, which is not a multiple of {SECTOR}"));
    }
}

fn check_grace(check: &mut Checker, seconds: u32) -> u32 {
    let grace = if seconds == 0 { DEFAULT_GRACE_SECONDS } else { seconds };
    check.range("spec.stop_grace_seconds", u64::from(grace), 1, MAX_GRACE_SECONDS, " seconds");
    grace
}

/// Checks a request to change a VM.
///
/// # Errors
///
/// All that is wrong with it.
pub(crate) fn update_vm(request: v1::UpdateVmRequest) -> Result<(VmRef, VmUpdate), Violations> {
    let mut check = Checker::default();
    let vm =
        VmRef { vm: check.reference("vm", request.vm), owner: check.name_or("owner", request.owner, DEFAULT_OWNER) };
    if request.revision < 0 {
        check.fail("revision", "is negative; give the `revision` of the VM as it was read, or 0");
    }
    let mut update =
        VmUpdate { read: (request.revision > 0).then_some(Revision(request.revision)), ..VmUpdate::default() };
    let spec = request.spec.unwrap_or_default();
    let mut labels = Some(request.labels);
    let paths = request.update_mask.unwrap_or_default().paths;
    if paths.is_empty() {
        check.fail("update_mask", format!("is required: name the fields to change, of {}", UPDATABLE.join(", ")));
    }
    for (i, path) in paths.iter().enumerate() {
        match path.as_str() {
            // A path that is there twice says nothing new.
            "labels" => {
                if let Some(labels) = labels.take() {
                    update.labels = Some(check.labels("labels", labels));
                }
            }
            "spec.restart" => update.restart = Some(restart_policy(&mut check, spec.restart)),
            "spec.on_disk_loss" => update.on_disk_loss = Some(on_disk_loss(&mut check, spec.on_disk_loss)),
            "spec.priority" => {
                check.range("spec.priority", u64::from(spec.priority), 0, MAX_PRIORITY, "");
                update.priority = Some(spec.priority);
            }
            "spec.stop_grace_seconds" => {
                update.stop_grace_seconds = Some(check_grace(&mut check, spec.stop_grace_seconds));
            }
            "spec.vcpus" => update.vcpus = Some(check_vcpus(&mut check, spec.vcpus)),
            "spec.memory_mib" => {
                check_memory(&mut check, spec.memory_mib);
                update.memory_mib = Some(spec.memory_mib);
            }
            "spec.failover" => update.failover = Some(failover(&mut check, spec.failover)),
            "spec.display" => {
                update.display = display(&mut check, spec.display);
                if spec.display == 0 {
                    check.fail("spec.display", "is required when `update_mask` names it");
                }
            }
            "spec.guest_agent" => {
                update.guest_agent = guest_agent(&mut check, spec.guest_agent);
                if spec.guest_agent == 0 {
                    check.fail("spec.guest_agent", "is required when `update_mask` names it");
                }
            }
            "spec.cpu" => {
                update.cpu = cpu(&mut check, spec.cpu);
                if spec.cpu == 0 {
                    check.fail("spec.cpu", "is required when `update_mask` names it");
                }
            }
            other => {
                let problem =
                    format!("is `{}`; a VM's fields that can be changed are {}", quoted(other), UPDATABLE.join(", "));
                check.fail(format!("update_mask.paths[{i}]"), problem);
            }
        }
    }
    check.finish((vm, update))
}

/// The fields that `UpdateVm` can change.
const UPDATABLE: [&str; 11] = [
    "labels",
    "spec.vcpus",
    "spec.memory_mib",
    "spec.restart",
    "spec.failover",
    "spec.on_disk_loss",
    "spec.priority",
    "spec.stop_grace_seconds",
    "spec.display",
    "spec.guest_agent",
    "spec.cpu",
];

fn display(check: &mut Checker, value: i32) -> Option<Display> {
    match check.known("spec.display", value, &["DISPLAY_TYPE_NONE", "DISPLAY_TYPE_STANDARD"])? {
        v1::DisplayType::Unspecified => None,
        v1::DisplayType::None => Some(Display::None),
        v1::DisplayType::Standard => Some(Display::Standard),
    }
}

fn guest_agent(check: &mut Checker, value: i32) -> Option<GuestAgent> {
    match check.known("spec.guest_agent", value, &["GUEST_AGENT_MODE_DISABLED", "GUEST_AGENT_MODE_ENABLED"])? {
        v1::GuestAgentMode::Unspecified => None,
        v1::GuestAgentMode::Disabled => Some(GuestAgent::Disabled),
        v1::GuestAgentMode::Enabled => Some(GuestAgent::Enabled),
    }
}

fn cpu(check: &mut Checker, value: i32) -> Option<CpuModel> {
    let names = ["CPU_MODEL_X86_64_V2", "CPU_MODEL_X86_64_V3", "CPU_MODEL_X86_64_V4", "CPU_MODEL_HOST"];
    match check.known("spec.cpu", value, &names)? {
        v1::CpuModel::Unspecified => None,
        v1::CpuModel::X8664V2 => Some(CpuModel::V2),
        v1::CpuModel::X8664V3 => Some(CpuModel::V3),
        v1::CpuModel::X8664V4 => Some(CpuModel::V4),
        v1::CpuModel::Host => Some(CpuModel::Host),
    }
}

fn firmware(check: &mut Checker, value: i32) -> Firmware {
    match check.known("spec.firmware", value, &["FIRMWARE_BIOS", "FIRMWARE_UEFI"]) {
        Some(v1::Firmware::Unspecified | v1::Firmware::Bios) | None => Firmware::Bios,
        Some(v1::Firmware::Uefi) => Firmware::Uefi,
    }
}

fn restart_policy(check: &mut Checker, value: i32) -> RestartPolicy {
    let names = ["RESTART_POLICY_ON_FAILURE", "RESTART_POLICY_ALWAYS", "RESTART_POLICY_NEVER"];
    match check.known("spec.restart", value, &names) {
        Some(v1::RestartPolicy::Unspecified | v1::RestartPolicy::OnFailure) | None => RestartPolicy::OnFailure,
        Some(v1::RestartPolicy::Always) => RestartPolicy::Always,
        Some(v1::RestartPolicy::Never) => RestartPolicy::Never,
    }
}

fn failover(check: &mut Checker, value: i32) -> Failover {
    let names = ["FAILOVER_POLICY_FAST", "FAILOVER_POLICY_PATIENT", "FAILOVER_POLICY_HOLD"];
    match check.known("spec.failover", value, &names) {
        Some(v1::FailoverPolicy::Unspecified | v1::FailoverPolicy::Fast) | None => Failover::Fast,
        Some(v1::FailoverPolicy::Patient) => Failover::Patient,
        Some(v1::FailoverPolicy::Hold) => Failover::Hold,
    }
}

fn on_disk_loss(check: &mut Checker, value: i32) -> OnDiskLoss {
    let names = ["DISK_LOSS_POLICY_WAIT", "DISK_LOSS_POLICY_RECREATE"];
    match check.known("spec.on_disk_loss", value, &names) {
        Some(v1::DiskLossPolicy::Unspecified | v1::DiskLossPolicy::Wait) | None => OnDiskLoss::Wait,
        Some(v1::DiskLossPolicy::Recreate) => OnDiskLoss::Recreate,
    }
}

fn check_kernel(check: &mut Checker, kernel: v1::KernelBoot, images: &mut Vec<(ImageUse, String)>) -> KernelBoot {
    check.text("spec.kernel.command_line", &kernel.command_line, MAX_COMMAND_LINE);
    let image = image(check, "spec.kernel.image", kernel.image, ImageUse::Kernel, images);
    // A name stands in `images`; the state puts its id here.
    KernelBoot { image: image.unwrap_or(ImageId::from_uuid(Uuid::nil())), command_line: kernel.command_line }
}

/// The image's id, if it was named by its id. Otherwise what was said goes into `images`.
fn image(
    check: &mut Checker,
    field: &str,
    text: String,
    place: ImageUse,
    images: &mut Vec<(ImageUse, String)>,
) -> Option<ImageId> {
    let text = check.reference(field, text);
    if let Ok(id) = text.parse() {
        return Some(id);
    }
    images.push((place, text));
    None
}

fn check_disks(check: &mut Checker, disks: Vec<v1::Disk>, images: &mut Vec<(ImageUse, String)>) -> Vec<Disk> {
    if disks.len() > MAX_DISKS {
        check.fail("spec.disks", format!("has {} entries; at most {MAX_DISKS} are allowed", disks.len()));
        return Vec::new();
    }
    let mut names = BTreeSet::new();
    let mut checked = Vec::with_capacity(disks.len());
    for (i, disk) in disks.into_iter().enumerate() {
        let at = |field: &str| format!("spec.disks[{i}].{field}");
        let name = check.name_or(&at("name"), disk.name, &format!("disk{i}"));
        if !names.insert(name.clone()) {
            check.fail(at("name"), format!("is `{}` like that of another disk; choose another", quoted(&name)));
        }
        let size = disk.size_bytes;
        check_disk_size(check, &at("size_bytes"), size);
        if size == 0 && disk.image.is_empty() {
            check.fail(at("size_bytes"), "is required for a disk without an image");
        }
        let image = (!disk.image.is_empty())
            .then(|| image(check, &at("image"), disk.image, ImageUse::Disk(i), images))
            .flatten();
        check_set_by_cluster(
            check,
            &at,
            &[
                ("state", disk.state != 0),
                ("unit", disk.unit != 0),
                ("id", !disk.id.is_empty()),
                ("order", disk.order != 0),
                ("kept_generation", disk.kept_generation.is_some()),
            ],
        );
        let bus = disk_bus(check, &at("bus"), disk.bus).unwrap_or_default();
        let cache = disk_cache(check, &at("cache"), disk.cache).unwrap_or_default();
        let unit = if bus == DiskBus::Scsi { u32::try_from(i).unwrap_or_default() } else { 0 };
        let pool = check.name_or(&at("pool"), disk.pool, DEFAULT_POOL);
        checked.push(Disk { name, pool, size_bytes: size, image, bus, cache, unit, ..Disk::default() });
    }
    let sata = checked.iter().filter(|d| d.bus == DiskBus::Sata).count();
    if sata > MAX_SATA_DISKS {
        check.fail(
            "spec.disks",
            format!("has {sata} disks on the bus DISK_BUS_SATA; at most {MAX_SATA_DISKS} are allowed"),
        );
    }
    checked
}

/// What of a disk a client must leave empty.
pub(super) fn check_set_by_cluster(check: &mut Checker, at: &dyn Fn(&str) -> String, fields: &[(&str, bool)]) {
    for (field, _) in fields.iter().filter(|(_, said)| *said) {
        check.fail(at(field), "is set by the cluster; leave it empty");
    }
}

/// `None`: nothing was said, or nonsense.
pub(super) fn disk_bus(check: &mut Checker, field: &str, value: i32) -> Option<DiskBus> {
    match check.known(field, value, &["DISK_BUS_VIRTIO", "DISK_BUS_SCSI", "DISK_BUS_SATA"])? {
        v1::DiskBus::Unspecified => None,
        v1::DiskBus::Virtio => Some(DiskBus::Virtio),
        v1::DiskBus::Scsi => Some(DiskBus::Scsi),
        v1::DiskBus::Sata => Some(DiskBus::Sata),
    }
}

/// Likewise.
pub(super) fn disk_cache(check: &mut Checker, field: &str, value: i32) -> Option<DiskCache> {
    match check.known(field, value, &["DISK_CACHE_NONE", "DISK_CACHE_WRITETHROUGH", "DISK_CACHE_WRITEBACK"])? {
        v1::DiskCache::Unspecified => None,
        v1::DiskCache::None => Some(DiskCache::None),
        v1::DiskCache::Writethrough => Some(DiskCache::Writethrough),
        v1::DiskCache::Writeback => Some(DiskCache::Writeback),
    }
}

fn disk_hotplug(check: &mut Checker, value: i32, disks: &[Disk]) -> DiskHotplug {
    match check.known("spec.disk_hotplug", value, &["DISK_HOTPLUG_DISABLED", "DISK_HOTPLUG_ENABLED"]) {
        Some(v1::DiskHotplug::Disabled) => {
            if disks.iter().any(|d| d.bus == DiskBus::Scsi) {
                check.fail("spec.disk_hotplug", "is DISK_HOTPLUG_DISABLED, and there are disks on the bus DISK_BUS_SCSI, which needs its controller: leave it empty");
            }
            DiskHotplug::Disabled
        }
        Some(v1::DiskHotplug::Unspecified | v1::DiskHotplug::Enabled) | None => DiskHotplug::Enabled,
    }
}

fn check_nics(check: &mut Checker, nics: &[v1::Nic]) -> Vec<Nic> {
    if nics.len() > MAX_NICS {
        check.fail("spec.nics", format!("has {} entries; at most {MAX_NICS} are allowed", nics.len()));
        return Vec::new();
    }
    let nic = |(i, nic): (usize, &v1::Nic)| {
        if !nic.mac.is_empty() {
            check.fail(format!("spec.nics[{i}].mac"), "is given by the cluster; leave it empty");
        }
        Nic { kind: check_nic_kind(check, i, nic), mac: String::new() }
    };
    nics.iter().enumerate().map(nic).collect()
}

fn check_nic_kind(check: &mut Checker, i: usize, nic: &v1::Nic) -> NicKind {
    let field = format!("spec.nics[{i}].bridge");
    match check.known(&format!("spec.nics[{i}].type"), nic.r#type, &["NIC_TYPE_USER", "NIC_TYPE_BRIDGE"]) {
        Some(v1::NicType::Bridge) => {
            if nic.bridge.is_empty() {
                check.fail(
                    field,
                    "is required for a NIC of type NIC_TYPE_BRIDGE: give the name of a bridge of the hosts",
                );
            } else if let Err(problem) = names::check_interface(&nic.bridge) {
                check.fail(field, format!("is `{}`, which {problem}", quoted(&nic.bridge)));
            }
            NicKind::Bridge { bridge: nic.bridge.clone() }
        }
        Some(v1::NicType::Unspecified | v1::NicType::User) => {
            if !nic.bridge.is_empty() {
                check.fail(field, "goes with type NIC_TYPE_BRIDGE; set that, or leave it empty");
            }
            NicKind::User
        }
        None => NicKind::User,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::testing::fields, *};

    fn good() -> v1::CreateVmRequest {
        v1::CreateVmRequest {
            name: "web-1".to_owned(),
            spec: Some(v1::VmSpec {
                memory_mib: 64,
                disks: vec![v1::Disk { image: "debian".to_owned(), ..Default::default() }],
                nics: vec![v1::Nic::default(), v1::Nic::default()],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn check(request: v1::CreateVmRequest) -> Result<NewVm, Violations> {
        let mut n = 0_u8;
        // Each value twice, as bad luck would have it.
        let mut random = || {
            n += 1;
            [0, 0, 0, 0xab, n / 2]
        };
        create_vm(request, VmId::from_uuid(Uuid::from_u128(1)), &mut random)
    }

    fn with(change: impl FnOnce(&mut v1::CreateVmRequest, &mut v1::VmSpec)) -> v1::CreateVmRequest {
        let mut request = good();
        let mut spec = request.spec.take().unwrap();
        change(&mut request, &mut spec);
        request.spec = Some(spec);
        request
    }

    #[test]
    fn defaults_are_filled_in() {
        let vm = check(good()).unwrap();
        assert_eq!((vm.owner.as_str(), vm.desired), ("default", Desired::Running));
        let spec = vm.spec;
        assert_eq!((spec.vcpus, spec.machine, spec.stop_grace_seconds), (1, Machine::Q35, 60));
        assert_eq!((spec.restart, spec.failover), (RestartPolicy::OnFailure, Failover::Fast));
        assert_eq!(spec.on_disk_loss, OnDiskLoss::Wait);
        let disk = Disk { name: "disk0".into(), pool: "default".into(), ..Disk::default() };
        assert_eq!(spec.disks, [disk]);
        assert_eq!(vm.image_names, [(ImageUse::Disk(0), "debian".to_owned())]);
        let macs: Vec<_> = spec.nics.iter().map(|n| n.mac.as_str()).collect();
        assert_eq!(macs, ["42:00:00:00:ab:00", "42:00:00:00:ab:01"]);
    }

    #[test]
    fn a_kernel_needs_no_disk_and_a_uuid_needs_no_lookup() {
        let id = Uuid::from_u128(0xabc).to_string();
        let kernel = v1::KernelBoot { image: id.clone(), command_line: "console=ttyS0".to_owned() };
        let vm = check(with(|_, s| {
            s.disks.clear();
            s.kernel = Some(kernel);
        }))
        .unwrap();
        assert_eq!(vm.spec.kernel.unwrap().image.to_string(), id);
        assert!(vm.image_names.is_empty());
    }

    #[test]
    fn each_bad_input_names_its_field() {
        let disk = |d: v1::Disk| with(|_, s| s.disks = vec![d]);
        let sized = |size_bytes| disk(v1::Disk { size_bytes, ..Default::default() });
        let kernel = |image: &str, command_line: &str| {
            with(|_, s| {
                s.kernel = Some(v1::KernelBoot { image: image.to_owned(), command_line: command_line.to_owned() });
            })
        };
        let label = |key: &str, value: &str| with(|r, _| drop(r.labels.insert(key.to_owned(), value.to_owned())));
        let bridged = |bridge: &str| {
            with(|_, s| {
                let nic =
                    v1::Nic { r#type: v1::NicType::Bridge.into(), bridge: bridge.to_owned(), ..Default::default() };
                s.nics[0] = nic;
            })
        };
        let table = [
            ("spec", v1::CreateVmRequest { spec: None, ..good() }),
            ("name", with(|r, _| r.name.clear())),
            ("name", with(|r, _| r.name = "a/b".to_owned())),
            ("name", with(|r, _| r.name = "../../etc".to_owned())),
            ("name", with(|r, _| r.name = "x\n".to_owned())),
            ("name", with(|r, _| r.name = "x".repeat(64))),
            ("name", with(|r, _| r.name = Uuid::nil().to_string())),
            ("owner", with(|r, _| r.owner = "a b".to_owned())),
            ("request_id", with(|r, _| r.request_id = "x".repeat(129))),
            ("request_id", with(|r, _| r.request_id = "a\0b".to_owned())),
            ("desired", with(|r, _| r.desired = 7)),
            ("desired", with(|r, _| r.desired = -1)),
            ("labels", with(|r, _| r.labels = (0..65).map(|i| (format!("k{i}"), String::new())).collect())),
            ("labels[a/b]", label("a/b", "x")),
            ("labels[]", label("", "x")),
            ("labels[k]", label("k", "x\u{7f}")),
            ("labels[k]", label("k", &"x".repeat(256))),
            ("spec.vcpus", with(|_, s| s.vcpus = 257)),
            ("spec.vcpus", with(|_, s| s.vcpus = u32::MAX)),
            ("spec.memory_mib", with(|_, s| s.memory_mib = 0)),
            ("spec.memory_mib", with(|_, s| s.memory_mib = 4_194_305)),
            ("spec.memory_mib", with(|_, s| s.memory_mib = u64::MAX)),
            ("spec.machine", with(|_, s| s.machine = "q35,accel=kvm".to_owned())),
            ("spec.disks", with(|_, s| s.disks.clear())),
            ("spec.disks", with(|_, s| s.disks = vec![s.disks[0].clone(); 17])),
            ("spec.disks[0].name", disk(v1::Disk { name: "../x".into(), size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].pool", disk(v1::Disk { pool: "a/..".into(), size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].image", disk(v1::Disk { image: "/etc/passwd".into(), ..Default::default() })),
            ("spec.disks[0].size_bytes", sized(0)),
            ("spec.disks[0].bus", disk(v1::Disk { bus: 9, size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].cache", disk(v1::Disk { cache: 9, size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].state", disk(v1::Disk { state: 1, size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].unit", disk(v1::Disk { unit: 1, size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].id", disk(v1::Disk { id: "x".into(), size_bytes: 512, ..Default::default() })),
            ("spec.disks[0].order", disk(v1::Disk { order: 1, size_bytes: 512, ..Default::default() })),
            ("spec.disk_hotplug", with(|_, s| s.disk_hotplug = 9)),
            (
                "spec.disk_hotplug",
                with(|_, s| {
                    s.disk_hotplug = v1::DiskHotplug::Disabled.into();
                    s.disks[0].bus = v1::DiskBus::Scsi.into();
                }),
            ),
            (
                "spec.disks",
                with(|_, s| {
                    let sata = |i| v1::Disk {
                        name: format!("d{i}"),
                        size_bytes: 512,
                        bus: v1::DiskBus::Sata.into(),
                        ..Default::default()
                    };
                    s.disks = (0..7).map(sata).collect();
                }),
            ),
            ("spec.disks[0].size_bytes", sized(511)),
            ("spec.disks[0].size_bytes", sized((64 << 40) + 512)),
            ("spec.disks[0].size_bytes", sized(u64::MAX)),
            (
                "spec.disks[1].name",
                with(|_, s| {
                    s.disks.push(v1::Disk { name: "disk0".into(), size_bytes: 512, ..Default::default() });
                }),
            ),
            ("spec.nics", with(|_, s| s.nics = vec![v1::Nic::default(); 9])),
            ("spec.nics[0].type", with(|_, s| s.nics[0].r#type = 3)),
            ("spec.nics[0].bridge", with(|_, s| s.nics[0].r#type = 2)),
            ("spec.nics[0].bridge", bridged("br0,script=/x")),
            ("spec.nics[0].bridge", bridged("a-bridge-too-long")),
            ("spec.nics[1].bridge", with(|_, s| s.nics[1].bridge = "br0".to_owned())),
            ("spec.nics[1].mac", with(|_, s| s.nics[1].mac = "42:00:00:00:00:01".to_owned())),
            ("spec.restart", with(|_, s| s.restart = 4)),
            ("spec.failover", with(|_, s| s.failover = i32::MIN)),
            ("spec.on_disk_loss", with(|_, s| s.on_disk_loss = 3)),
            ("spec.priority", with(|_, s| s.priority = 1001)),
            ("spec.cpu", with(|_, s| s.cpu = 9)),
            ("spec.firmware", with(|_, s| s.firmware = 3)),
            (
                "spec.firmware",
                with(|_, s| {
                    s.firmware = 2;
                    s.disks.clear();
                    s.kernel = Some(v1::KernelBoot { image: "k".into(), ..Default::default() });
                }),
            ),
            ("spec.stop_grace_seconds", with(|_, s| s.stop_grace_seconds = 3601)),
            ("spec.anti_affinity_group", with(|_, s| s.anti_affinity_group = "a\tb".to_owned())),
            ("spec.host_labels[k]", with(|_, s| drop(s.host_labels.insert("k".into(), "\r".into())))),
            ("spec.kernel.image", kernel("", "")),
            ("spec.kernel.image", kernel("a\u{0}b", "")),
            ("spec.kernel.command_line", kernel("k", "a\nb")),
            ("spec.kernel.command_line", kernel("k", &"x".repeat(2049))),
        ];
        for (field, request) in table {
            let found = check(request);
            let message = found.as_ref().unwrap_err().to_string();
            assert_eq!(fields(found), [field], "{message}");
            assert!(message.starts_with(field), "{message}");
        }
    }

    #[test]
    fn an_update_changes_what_its_mask_names_and_each_mistake_names_its_field() {
        let request = |paths: &[&str], spec: v1::VmSpec| v1::UpdateVmRequest {
            vm: "web".to_owned(),
            update_mask: Some(prost_types::FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() }),
            spec: Some(spec),
            ..Default::default()
        };
        let spec = v1::VmSpec { memory_mib: 64, priority: 5, ..Default::default() };
        let (vm, update) = update_vm(request(&["spec.memory_mib", "spec.vcpus"], spec)).unwrap();
        assert_eq!((vm.vm.as_str(), vm.owner.as_str()), ("web", "default"));
        assert_eq!(update, VmUpdate { memory_mib: Some(64), vcpus: Some(1), ..VmUpdate::default() });

        let none = v1::VmSpec::default;
        for (field, request) in [
            ("update_mask", request(&[], none())),
            ("update_mask.paths[1]", request(&["labels", "spec.disks"], none())),
            ("update_mask.paths[0]", request(&["\u{1b}[2J"], none())),
            ("spec.memory_mib", request(&["spec.memory_mib"], none())),
            ("spec.vcpus", request(&["spec.vcpus"], v1::VmSpec { vcpus: 257, ..none() })),
            ("spec.priority", request(&["spec.priority"], v1::VmSpec { priority: 1001, ..none() })),
            ("spec.failover", request(&["spec.failover"], v1::VmSpec { failover: 99, ..none() })),
            ("spec.display", request(&["spec.display"], none())),
            ("spec.guest_agent", request(&["spec.guest_agent"], none())),
            ("revision", v1::UpdateVmRequest { revision: -1, ..request(&["labels"], none()) }),
            ("vm", v1::UpdateVmRequest { vm: String::new(), ..request(&["labels"], none()) }),
        ] {
            let found = update_vm(request);
            let message = found.as_ref().unwrap_err().to_string();
            assert_eq!(fields(found), [field], "{message}");
            assert!(!message.contains('\u{1b}'));
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let request = with(|r, s| {
            r.name = "a/b".to_owned();
            s.memory_mib = 0;
            s.disks[0].size_bytes = 1;
            s.restart = 9;
        });
        assert_eq!(fields(check(request)), ["name", "spec.memory_mib", "spec.disks[0].size_bytes", "spec.restart"]);
    }

    proptest! {
        #[test]
        fn whatever_comes_in_what_comes_out_is_within_the_limits(
            name in ".{0,70}", owner in ".{0,70}", vcpus: u32, memory_mib: u64, machine in ".{0,5}", size: u64,
            restart: i32, desired: i32, disk in "[a-z./]{0,5}", image in ".{0,40}", line in ".{0,30}",
        ) {
            let mut request = good();
            request.name = name;
            request.owner = owner;
            request.desired = desired % 4;
            let spec = request.spec.as_mut().unwrap();
            spec.vcpus = vcpus % 300;
            spec.memory_mib = memory_mib >> 40;
            spec.machine = machine;
            spec.restart = restart % 5;
            spec.disks = vec![v1::Disk { name: disk, pool: String::new(), size_bytes: size & !511, image: image.clone(), ..Default::default() }];
            spec.kernel = (size % 2 == 0).then_some(v1::KernelBoot { image, command_line: line });
            if let Ok(vm) = check(request) {
                prop_assert!(uncloud_proto::names::check(&vm.name).is_ok());
                prop_assert!((1..=256).contains(&vm.spec.vcpus));
                prop_assert!((1..=4 << 20).contains(&vm.spec.memory_mib));
                for disk in &vm.spec.disks {
                    prop_assert!(uncloud_proto::names::check(&disk.name).is_ok());
                    prop_assert!(disk.size_bytes <= 64 << 40);
                }
            }
        }
    }
}
