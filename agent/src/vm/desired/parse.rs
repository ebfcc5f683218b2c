//! Checks what the leader said. Pure.

use std::{collections::BTreeSet, net::SocketAddr};

use uncloud_proto::{
    ids::{ImageId, Incarnation, VmId},
    names, v1,
};
use uuid::Uuid;

use super::{
    Class, CloudInit, CpuModel, Desired, Disk, DiskBus, DiskCache, DiskHotplug, DiskState, DisksExpected, Display,
    Disposition, Firmware, Format, GuestAgent, Image, ImageFile, Kernel, Link, Machine, Nic, Pause, RestartMode,
    RestartPolicy, Role, Spec, StopMode, VoidDisks,
};
use crate::vm::{
    disks::{CloneFrom, Orders, Revert, SnapshotOrder, Wanted},
    migration::{DisksTo, MigrateTo, Nodes},
};

/// Why a desired state cannot be used: which field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Unusable {
    /// Name of the field.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

fn unusable(field: impl Into<String>, problem: impl Into<String>) -> Unusable {
    Unusable { field: field.into(), problem: problem.into() }
}

/// Most bytes of a kernel command line.
const MAX_COMMAND_LINE: usize = 2048;
/// Most disks, and most network interfaces.
const MAX_DISKS: usize = 16;
/// Snapshots of one VM that are to be taken or removed.
const MAX_SNAPSHOTS: usize = 32;
/// The highest target number on a SCSI controller.
const MAX_UNIT: u32 = 255;
const MAX_NICS: usize = 8;
/// Most bytes of all that cloud-init is told. The disk that carries it has a fixed size ([`crate::qemu::seed`]).
const MAX_CLOUD_INIT: usize = 512 * 1024;

impl Desired {
    /// Checks a message of the leader.
    ///
    /// # Errors
    ///
    /// Names the field. The id and the incarnation are checked by the caller, who needs them to report the rest.
    pub fn from_proto(incarnation: Incarnation, m: &v1::DesiredVm) -> Result<Self, Unusable> {
        let disposition = match m.disposition() {
            v1::Disposition::Run => Disposition::Run,
            v1::Disposition::Stop => Disposition::Stop,
            v1::Disposition::Delete => Disposition::Delete,
            v1::Disposition::Forget => Disposition::Forget,
            v1::Disposition::Incoming => Disposition::Incoming,
            v1::Disposition::Unspecified => return Err(unusable("disposition", "is not one that this agent knows")),
        };
        let spec = match (disposition, &m.spec) {
            (Disposition::Forget, _) => None,
            (_, Some(spec)) => Some(parse_spec(spec)?),
            (_, None) => return Err(unusable("spec", "is missing")),
        };
        let images = match disposition {
            Disposition::Run | Disposition::Incoming => {
                m.images.iter().map(parse_image).collect::<Result<Vec<_>, _>>()?
            }
            Disposition::Stop | Disposition::Delete | Disposition::Forget => Vec::new(),
        };
        if matches!(disposition, Disposition::Run | Disposition::Incoming) {
            names::check(&m.name).map_err(|e| unusable("name", e.to_string()))?;
        }
        let migrate_to = match disposition {
            Disposition::Run => {
                let disks = spec.as_ref().map(Spec::nodes_to_copy).unwrap_or_default();
                m.migrate_to.as_ref().map(|m| parse_migrate_to(incarnation, disks, m)).transpose()?
            }
            Disposition::Stop | Disposition::Delete | Disposition::Forget | Disposition::Incoming => None,
        };
        let migration_secret = match disposition {
            Disposition::Incoming => secret("migration_secret", &m.migration_secret)?,
            Disposition::Run | Disposition::Stop | Disposition::Delete | Disposition::Forget => String::new(),
        };
        Ok(Self {
            incarnation,
            disposition,
            name: m.name.clone(),
            owner: m.owner.clone(),
            spec,
            images,
            restarts: m.restarts,
            restart_mode: if m.restart_force { RestartMode::Reset } else { RestartMode::Graceful },
            stop_mode: if m.stop_force { StopMode::Kill } else { StopMode::Graceful },
            disks: if m.disks_exist { DisksExpected::Exist } else { DisksExpected::New },
            disk_generation: m.disk_generation,
            migrate_to,
            void: match (disposition, &m.void_disks) {
                (Disposition::Forget, Some(v)) => Some(VoidDisks { copied_from: v.copied_from, current: v.current }),
                (Disposition::Forget, None)
                | (Disposition::Run | Disposition::Stop | Disposition::Delete | Disposition::Incoming, _) => None,
            },
            migration_secret,
            pause: if m.paused { Pause::StandStill } else { Pause::GoOn },
            orders: parse_orders(disposition, m)?,
            clone_from: match (disposition, &m.clone_from) {
                (Disposition::Run, Some(c)) if !m.disks_exist => Some(parse_clone_from(c)?),
                // Disks that exist are copied from nothing, and what does not start makes none.
                (Disposition::Run, _) => None,
                (Disposition::Stop | Disposition::Delete | Disposition::Forget | Disposition::Incoming, _) => None,
            },
            network_pools: m.network_pools.iter().map(parse_network_pool).collect::<Result<_, _>>()?,
            next: match Incarnation(m.next_incarnation) {
                Incarnation::NONE => None,
                next if next > incarnation => Some(next),
                _ => return Err(unusable("next_incarnation", "is not larger than the incarnation")),
            },
        })
    }
}

fn parse_network_pool(m: &v1::PoolAddress) -> Result<(String, SocketAddr), Unusable> {
    names::check(&m.pool).map_err(|e| unusable("network_pools.pool", e.to_string()))?;
    let address = m.address.parse();
    let address = address.map_err(|_| unusable("network_pools.address", "is not of the form IP:PORT"))?;
    Ok((m.pool.clone(), address))
}

/// Which VM and which incarnation a message is about.
///
/// # Errors
///
/// The id is not a UUID, or the incarnation is 0.
pub fn identify(m: &v1::DesiredVm) -> Result<(VmId, Incarnation), Unusable> {
    let vm = m.vm_id.parse().map_err(|e| unusable("vm_id", format!("{e}")))?;
    if m.incarnation == 0 && m.disposition() != v1::Disposition::Forget {
        return Err(unusable("incarnation", "is 0"));
    }
    Ok((vm, Incarnation(m.incarnation)))
}

fn parse_spec(s: &v1::VmSpec) -> Result<Spec, Unusable> {
    if !(1..=256).contains(&s.vcpus) {
        return Err(unusable("spec.vcpus", format!("is {}, not 1 to 256", s.vcpus)));
    }
    if !(1..=4_194_304).contains(&s.memory_mib) {
        return Err(unusable("spec.memory_mib", format!("is {}, not 1 to 4194304", s.memory_mib)));
    }
    let machine = match s.machine.as_str() {
        "q35" => Machine::Q35,
        "pc" => Machine::Pc,
        other => return Err(unusable("spec.machine", format!("is `{}`, not q35 or pc", other.escape_debug()))),
    };
    let restart = match s.restart() {
        v1::RestartPolicy::OnFailure => RestartPolicy::OnFailure,
        v1::RestartPolicy::Always => RestartPolicy::Always,
        v1::RestartPolicy::Never => RestartPolicy::Never,
        v1::RestartPolicy::Unspecified => return Err(unusable("spec.restart", "is not one that this agent knows")),
    };
    let class = match s.failover() {
        v1::FailoverPolicy::Fast => Class::Fast,
        v1::FailoverPolicy::Patient => Class::Patient,
        v1::FailoverPolicy::Hold => Class::Hold,
        v1::FailoverPolicy::Unspecified => return Err(unusable("spec.failover", "is not one that this agent knows")),
    };
    if v1::Firmware::try_from(s.firmware).is_err() {
        return Err(unusable("spec.firmware", "is not one that this agent knows"));
    }
    let cpu = match v1::CpuModel::try_from(s.cpu) {
        // A controller that knows no models says nothing.
        Ok(v1::CpuModel::Unspecified | v1::CpuModel::X8664V2) => CpuModel::V2,
        Ok(v1::CpuModel::X8664V3) => CpuModel::V3,
        Ok(v1::CpuModel::X8664V4) => CpuModel::V4,
        Ok(v1::CpuModel::Host) => CpuModel::Host,
        Err(_) => return Err(unusable("spec.cpu", "is not one that this agent knows")),
    };
    if !(1..=3600).contains(&s.stop_grace_seconds) {
        return Err(unusable("spec.stop_grace_seconds", format!("is {}, not 1 to 3600", s.stop_grace_seconds)));
    }
    let kernel = s.kernel.as_ref().map(parse_kernel).transpose()?;
    if s.disks.len() > MAX_DISKS {
        return Err(unusable("spec.disks", format!("has more than {MAX_DISKS} entries")));
    }
    let disks = s.disks.iter().enumerate().map(|(i, d)| parse_disk(i, d)).collect::<Result<Vec<_>, _>>()?;
    let (mut seen, mut units) = (BTreeSet::new(), BTreeSet::new());
    for (i, disk) in disks.iter().enumerate() {
        if !seen.insert(disk.name.as_str()) {
            return Err(unusable(format!("spec.disks[{i}].name"), "is there twice"));
        }
        if disk.bus == DiskBus::Scsi && !units.insert(disk.unit) {
            return Err(unusable(format!("spec.disks[{i}].unit"), "is there twice"));
        }
    }
    if s.nics.len() > MAX_NICS {
        return Err(unusable("spec.nics", format!("has more than {MAX_NICS} entries")));
    }
    let nics = s.nics.iter().enumerate().map(|(i, n)| parse_nic(i, n)).collect::<Result<Vec<_>, _>>()?;
    Ok(Spec {
        vcpus: s.vcpus,
        memory_mib: s.memory_mib,
        machine,
        kernel,
        disks,
        nics,
        restart,
        class,
        priority: s.priority,
        stop_grace_seconds: s.stop_grace_seconds,
        display: match s.display() {
            // A controller that knows no screens says nothing.
            v1::DisplayType::Unspecified | v1::DisplayType::None => Display::None,
            v1::DisplayType::Standard => Display::Standard,
        },
        guest_agent: match s.guest_agent() {
            v1::GuestAgentMode::Unspecified | v1::GuestAgentMode::Disabled => GuestAgent::Disabled,
            v1::GuestAgentMode::Enabled => GuestAgent::Enabled,
        },
        firmware: match s.firmware() {
            v1::Firmware::Unspecified | v1::Firmware::Bios => Firmware::Bios,
            v1::Firmware::Uefi => Firmware::Uefi,
        },
        cpu,
        cloud_init: s.cloud_init.as_ref().map(parse_cloud_init).transpose()?,
        disk_hotplug: match v1::DiskHotplug::try_from(s.disk_hotplug) {
            // A controller that knows nothing of it says nothing.
            Ok(v1::DiskHotplug::Unspecified | v1::DiskHotplug::Disabled) => DiskHotplug::Disabled,
            Ok(v1::DiskHotplug::Enabled) => DiskHotplug::Enabled,
            Err(_) => return Err(unusable("spec.disk_hotplug", "is not one that this agent knows")),
        },
    })
}

fn parse_cloud_init(c: &v1::CloudInit) -> Result<CloudInit, Unusable> {
    let keys: usize = c.ssh_authorized_keys.iter().map(String::len).sum();
    if keys + c.hostname.len() + c.user_data.len() + c.network_config.len() > MAX_CLOUD_INIT {
        return Err(unusable("spec.cloud_init", format!("has more than {MAX_CLOUD_INIT} bytes")));
    }
    Ok(CloudInit {
        hostname: c.hostname.clone(),
        ssh_authorized_keys: c.ssh_authorized_keys.clone(),
        user_data: c.user_data.clone(),
        network_config: c.network_config.clone(),
    })
}

fn parse_migrate_to(own: Incarnation, nodes: Nodes, m: &v1::MigrateTo) -> Result<MigrateTo, Unusable> {
    let address = m
        .address
        .parse()
        .map_err(|_| unusable("migrate_to.address", format!("is `{}`, not IP:PORT", m.address.escape_debug())))?;
    let incarnation = Incarnation(m.incarnation);
    if incarnation <= own {
        return Err(unusable("migrate_to.incarnation", format!("is {incarnation}, not larger than {own}")));
    }
    let secret = secret("migrate_to.secret", &m.secret)?;
    let disks = match m.disks_address.as_str() {
        "" => None,
        text => {
            let address = text.parse();
            let address = address.map_err(|_| {
                unusable("migrate_to.disks_address", format!("is `{}`, not IP:PORT", text.escape_debug()))
            })?;
            Some(DisksTo { address, nodes })
        }
    };
    Ok(MigrateTo { incarnation, address, secret, bytes_per_second: m.bytes_per_second, disks })
}

fn parse_orders(disposition: Disposition, m: &v1::DesiredVm) -> Result<Orders, Unusable> {
    if m.snapshots.len() > MAX_SNAPSHOTS {
        return Err(unusable("snapshots", format!("has more than {MAX_SNAPSHOTS} entries")));
    }
    let id = |field: String, text: &str| Uuid::try_parse(text).map_err(|e| unusable(field, format!("{e}")));
    let order = |(i, s): (usize, &v1::SnapshotOrder)| {
        let wanted = if s.remove { Wanted::Gone } else { Wanted::There };
        Ok(SnapshotOrder { id: id(format!("snapshots[{i}].id"), &s.id)?, wanted })
    };
    let snapshots = m.snapshots.iter().enumerate().map(order).collect::<Result<Vec<_>, Unusable>>()?;
    let revert = match (&m.revert, disposition) {
        (None, _) | (Some(_), Disposition::Forget) => None,
        (Some(r), Disposition::Stop) => {
            Some(Revert { snapshot: id("revert.snapshot_id".to_owned(), &r.snapshot_id)?, number: r.number })
        }
        // P5: what the guest has written since would be lost.
        (Some(_), Disposition::Run | Disposition::Incoming | Disposition::Delete) => {
            return Err(unusable("revert", "comes for a VM that is not to be stopped"));
        }
    };
    let disks = m.spec.iter().flat_map(|s| &s.disks).take(MAX_DISKS);
    let disks = disks.filter(|d| d.order != 0).map(|d| d.order).collect();
    Ok(Orders { snapshots, revert, disks })
}

fn parse_clone_from(c: &v1::CloneFrom) -> Result<CloneFrom, Unusable> {
    let vm = c.vm_id.parse().map_err(|e| unusable("clone_from.vm_id", format!("{e}")))?;
    let snapshot = match c.snapshot_id.as_str() {
        "" => None,
        id => Some(Uuid::try_parse(id).map_err(|e| unusable("clone_from.snapshot_id", format!("{e}")))?),
    };
    if c.kept_generations.len() > MAX_DISKS {
        return Err(unusable("clone_from.kept_generations", format!("has more than {MAX_DISKS} entries")));
    }
    let kept_generations = c.kept_generations.iter().map(|(name, &generation)| (name.clone(), generation)).collect();
    Ok(CloneFrom { vm, disk_generation: c.disk_generation, kept_generations, snapshot })
}

/// It ends up in a file that QEMU reads line by line.
fn secret(field: &str, text: &str) -> Result<String, Unusable> {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != 64 || !text.bytes().all(hex) {
        return Err(unusable(field, "is not 64 lower-case hexadecimal digits"));
    }
    Ok(text.to_owned())
}

fn parse_kernel(k: &v1::KernelBoot) -> Result<Kernel, Unusable> {
    let image = k.image.parse().map_err(|e| unusable("spec.kernel.image", format!("{e}")))?;
    Ok(Kernel { image, command_line: command_line("spec.kernel.command_line", &k.command_line)? })
}

fn command_line(field: &str, text: &str) -> Result<String, Unusable> {
    if text.len() > MAX_COMMAND_LINE {
        return Err(unusable(field, format!("is longer than {MAX_COMMAND_LINE} bytes")));
    }
    if text.chars().any(char::is_control) {
        return Err(unusable(field, "has control characters"));
    }
    Ok(text.to_owned())
}

fn parse_disk(i: usize, d: &v1::Disk) -> Result<Disk, Unusable> {
    let field = |name: &str| format!("spec.disks[{i}].{name}");
    names::check(&d.name).map_err(|e| unusable(field("name"), e.to_string()))?;
    names::check(&d.pool).map_err(|e| unusable(field("pool"), e.to_string()))?;
    let image = match d.image.as_str() {
        "" => None,
        id => Some(id.parse().map_err(|e| unusable(field("image"), format!("{e}")))?),
    };
    if !d.size_bytes.is_multiple_of(512) || d.size_bytes > 64 << 40 {
        return Err(unusable(field("size_bytes"), "is not a multiple of 512 up to 64 TiB"));
    }
    if d.size_bytes == 0 && image.is_none() {
        return Err(unusable(field("size_bytes"), "is 0, and there is no image to take it from"));
    }
    let bus = match v1::DiskBus::try_from(d.bus) {
        // A controller that knows one only says nothing.
        Ok(v1::DiskBus::Unspecified | v1::DiskBus::Virtio) => DiskBus::Virtio,
        Ok(v1::DiskBus::Scsi) => DiskBus::Scsi,
        Ok(v1::DiskBus::Sata) => DiskBus::Sata,
        Err(_) => return Err(unusable(field("bus"), "is not one that this agent knows")),
    };
    if d.unit > MAX_UNIT {
        return Err(unusable(field("unit"), format!("is {}, not 0 to {MAX_UNIT}", d.unit)));
    }
    let cache = match v1::DiskCache::try_from(d.cache) {
        Ok(v1::DiskCache::Unspecified | v1::DiskCache::None) => DiskCache::None,
        Ok(v1::DiskCache::Writethrough) => DiskCache::Writethrough,
        Ok(v1::DiskCache::Writeback) => DiskCache::Writeback,
        Err(_) => return Err(unusable(field("cache"), "is not one that this agent knows")),
    };
    // P5: what is not known here is neither made nor deleted.
    let state = match v1::DiskState::try_from(d.state) {
        Ok(v1::DiskState::Unspecified) => DiskState::Attached,
        Ok(v1::DiskState::Attaching) => DiskState::Attaching,
        Ok(v1::DiskState::Returning) => DiskState::Returning,
        Ok(v1::DiskState::Detaching) => DiskState::Detaching,
        Ok(v1::DiskState::Detached) => DiskState::Detached,
        Ok(v1::DiskState::Deleting) => DiskState::Deleting,
        Err(_) => return Err(unusable(field("state"), "is not one that this agent knows")),
    };
    let id = match d.id.as_str() {
        "" => None,
        id => Some(Uuid::try_parse(id).map_err(|e| unusable(field("id"), format!("{e}")))?),
    };
    Ok(Disk {
        name: d.name.clone(),
        pool: d.pool.clone(),
        size_bytes: d.size_bytes,
        image,
        bus,
        cache,
        unit: d.unit,
        id,
        state,
        order: d.order,
        kept_generation: d.kept_generation,
    })
}

fn parse_nic(i: usize, n: &v1::Nic) -> Result<Nic, Unusable> {
    let link = match v1::NicType::try_from(n.r#type) {
        Ok(v1::NicType::User) => Link::User,
        Ok(v1::NicType::Bridge) => {
            names::check_interface(&n.bridge).map_err(|e| unusable(format!("spec.nics[{i}].bridge"), e.to_string()))?;
            Link::Bridge(n.bridge.clone())
        }
        Ok(v1::NicType::Unspecified) | Err(_) => {
            return Err(unusable(format!("spec.nics[{i}].type"), "is not one that this agent knows"));
        }
    };
    let bytes: Vec<&str> = n.mac.split(':').collect();
    let hex = |b: &&str| b.len() == 2 && b.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
    if bytes.len() != 6 || !bytes.iter().all(hex) {
        return Err(unusable(format!("spec.nics[{i}].mac"), "is not of the form 42:00:00:00:00:01 in lower case"));
    }
    Ok(Nic { mac: n.mac.clone(), link })
}

fn parse_image(m: &v1::Image) -> Result<Image, Unusable> {
    let id: ImageId = m.id.parse().map_err(|e| unusable("images.id", format!("{e}")))?;
    let files = m.files.iter().map(parse_image_file).collect::<Result<Vec<_>, _>>()?;
    Ok(Image { id, name: m.name.clone(), files, command_line: command_line("images.command_line", &m.command_line)? })
}

fn parse_image_file(f: &v1::ImageFile) -> Result<ImageFile, Unusable> {
    let role = match f.role() {
        v1::ImageFileRole::Disk => Role::Disk,
        v1::ImageFileRole::Kernel => Role::Kernel,
        v1::ImageFileRole::Initrd => Role::Initrd,
        v1::ImageFileRole::Unspecified => {
            return Err(unusable("images.files.role", "is not one that this agent knows"));
        }
    };
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if f.sha256.len() != 64 || !f.sha256.bytes().all(hex) {
        return Err(unusable("images.files.sha256", "is not 64 lower-case hexadecimal digits"));
    }
    let format = match (role, f.format()) {
        (Role::Disk, v1::ImageFormat::Raw) => Some(Format::Raw),
        (Role::Disk, v1::ImageFormat::Qcow2) => Some(Format::Qcow2),
        (Role::Disk, v1::ImageFormat::Unspecified) => return Err(unusable("images.files.format", "is missing")),
        (Role::Kernel | Role::Initrd, _) => None,
    };
    Ok(ImageFile { role, source: f.source.clone(), sha256: f.sha256.clone(), size_bytes: f.size_bytes, format })
}
