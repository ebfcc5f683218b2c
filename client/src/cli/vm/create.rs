//! `uncloud vm create`: from flags to a request.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use tonic::{Code, Status};
use uncloud_proto::{names, v1};

use super::{
    super::{Context, Error},
    cloud_init::CloudInitArguments,
    wait::{WaitArguments, wait_for},
};
use crate::{output, units, wait::Goal};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the VM.
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// Takes everything about the VM from a YAML file, as `uncloud apply` does; `-` for stdin.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "name", "cpus", "memory", "machine", "kernel", "append", "image", "disk_size", "disk", "nic", "restart", "failover",
        "priority", "host_label", "anti_affinity", "label", "stop_grace", "display", "guest_agent", "cpu", "stopped",
    ])]
    file: Option<PathBuf>,
    /// Virtual CPUs.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=256), value_name = "N")]
    cpus: u32,
    /// Memory, such as 512M or 2G.
    #[arg(long, default_value = "512M", value_parser = units::parse_mib, value_name = "SIZE")]
    memory: u64,
    /// Machine type of QEMU.
    #[arg(long, value_enum, default_value = "q35")]
    machine: Machine,
    /// Boots the kernel of this image directly, instead of the first disk.
    #[arg(long, value_name = "IMAGE")]
    kernel: Option<String>,
    /// Command line of the kernel; without it, the image's own.
    #[arg(long, value_name = "CMDLINE", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
    /// The first disk starts as an overlay of this image (short for a --disk).
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Size of the first disk (short for a --disk).
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    disk_size: Option<u64>,
    /// A disk: any of image=IMAGE, size=SIZE, pool=POOL, name=NAME, bus=virtio|scsi|sata,
    /// cache=none|writethrough|writeback, separated by commas. May be repeated.
    #[arg(long, value_name = "KEY=VALUE,…", value_parser = parse_disk)]
    disk: Vec<v1::Disk>,
    /// A network interface: `user` (QEMU's own network: out to the world, nothing in) or `bridge=NAME` (a port of that bridge of
    /// its host). May be repeated.
    #[arg(long, value_name = "user|bridge=NAME", value_parser = parse_nic)]
    nic: Vec<v1::Nic>,
    /// What happens when QEMU dies or the guest panics.
    #[arg(long, value_enum, default_value = "on-failure")]
    restart: Restart,
    /// What happens when the host dies.
    #[arg(long, value_enum, default_value = "fast")]
    failover: Failover,
    /// VMs with a higher priority start first; 0 to 1000.
    #[arg(long, default_value = "0", value_parser = clap::value_parser!(u32).range(0..=1000), value_name = "N")]
    priority: u32,
    /// A label that the host must have. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::parse_pair)]
    host_label: Vec<(String, String)>,
    /// VMs of the same group never share a host.
    #[arg(long, value_name = "GROUP")]
    anti_affinity: Option<String>,
    /// A label. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::parse_pair)]
    label: Vec<(String, String)>,
    /// How long the guest may take to power down before it is killed.
    #[arg(long, default_value = "60s", value_parser = units::parse_seconds, value_name = "DURATION")]
    stop_grace: u32,
    /// Its screen; without this, a VM that boots from a disk has one and one that boots a kernel has none.
    #[arg(long, value_enum)]
    display: Option<Display>,
    /// A channel to a guest agent, by which the guest tells its addresses; without this, as with --display.
    #[arg(long, value_enum)]
    guest_agent: Option<GuestAgent>,
    /// Creates it without starting it.
    #[arg(long)]
    stopped: bool,
    /// Makes it safe to run this command again when its answer was lost: the same id gives the same VM.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// The CPU that the guest sees.
    #[arg(long, value_enum, default_value = "x86-64-v2")]
    cpu: Cpu,
    /// What boots the machine.
    #[arg(long, value_enum, default_value = "bios")]
    firmware: Firmware,
    #[command(flatten)]
    cloud_init: CloudInitArguments,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Firmware {
    /// SeaBIOS, the default.
    Bios,
    /// UEFI, without secure boot.
    Uefi,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Cpu {
    /// What every host has.
    #[value(name = "x86-64-v2")]
    V2,
    /// AVX2 and what came with it.
    #[value(name = "x86-64-v3")]
    V3,
    /// AVX-512.
    #[value(name = "x86-64-v4")]
    V4,
    /// All that the host's CPU has. Needs KVM; migrates only to hosts with the very same CPU.
    Host,
}

impl Cpu {
    pub(crate) const fn to_proto(self) -> v1::CpuModel {
        match self {
            Self::V2 => v1::CpuModel::X8664V2,
            Self::V3 => v1::CpuModel::X8664V3,
            Self::V4 => v1::CpuModel::X8664V4,
            Self::Host => v1::CpuModel::Host,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Machine {
    /// PCI Express, the default.
    Q35,
    /// The older PC, for guests that need it.
    Pc,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Restart {
    /// Started again after a failure; a guest that powers itself off stays off.
    OnFailure,
    /// Started again whenever it ends.
    Always,
    /// Left as it is.
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Failover {
    /// Moved as soon as it is safe (about 7 s at the default settings).
    Fast,
    /// Rides out longer network faults, and comes back later (about a minute).
    Patient,
    /// Pinned to its host: never killed for a lost lease, never moved.
    Hold,
    /// Like fast; where its disks are lost with the host, it starts elsewhere from its images with new disks.
    Recreate,
}

impl Restart {
    pub(crate) const fn to_proto(self) -> v1::RestartPolicy {
        match self {
            Self::OnFailure => v1::RestartPolicy::OnFailure,
            Self::Always => v1::RestartPolicy::Always,
            Self::Never => v1::RestartPolicy::Never,
        }
    }
}

impl Failover {
    pub(crate) const fn to_proto(self) -> (v1::FailoverPolicy, v1::DiskLossPolicy) {
        match self {
            Self::Fast => (v1::FailoverPolicy::Fast, v1::DiskLossPolicy::Wait),
            Self::Patient => (v1::FailoverPolicy::Patient, v1::DiskLossPolicy::Wait),
            Self::Hold => (v1::FailoverPolicy::Hold, v1::DiskLossPolicy::Wait),
            Self::Recreate => (v1::FailoverPolicy::Fast, v1::DiskLossPolicy::Recreate),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Display {
    /// A VGA card.
    Standard,
    /// No screen.
    None,
}

impl Display {
    pub(crate) const fn to_proto(self) -> v1::DisplayType {
        match self {
            Self::Standard => v1::DisplayType::Standard,
            Self::None => v1::DisplayType::None,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum GuestAgent {
    /// It has the channel.
    Enabled,
    /// It has none.
    Disabled,
}

impl GuestAgent {
    pub(crate) const fn to_proto(self) -> v1::GuestAgentMode {
        match self {
            Self::Enabled => v1::GuestAgentMode::Enabled,
            Self::Disabled => v1::GuestAgentMode::Disabled,
        }
    }
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<(), Error> {
    let wait = arguments.wait;
    let request = match &arguments.file {
        Some(file) => from_file(file, &arguments.request_id, &context.owner)?,
        None => request(arguments, &context.owner),
    };
    let stopped = request.desired() == v1::PowerState::Stopped;
    let goal = if stopped { Goal::Stopped } else { Goal::Running };
    let request_id = request.request_id.clone();
    let mut answer = context.client.create_vm(request).await.map_err(|status| again(status, &request_id))?;
    if wait.wait
        && let Some(vm) = answer.vm.take()
    {
        answer.vm = wait_for(context, vm, &goal, wait).await?;
    }
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

/// Says how to repeat a command whose answer was lost.
pub(super) fn again(status: Status, request_id: &str) -> Error {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => Error::StatusWithHint {
            status,
            hint: format!(
                "if a controller should be there (--endpoint, UNCLOUD_ENDPOINTS), run the same command again with \
                 --request-id {request_id}: that cannot create two VMs"
            ),
        },
        _ => Error::Status(status),
    }
}

/// Makes the request from a file that describes one VM.
fn from_file(file: &Path, request_id: &Option<String>, owner: &str) -> Result<v1::CreateVmRequest, Error> {
    let documents = super::super::apply::read(file)?;
    let [document] = documents.as_slice() else {
        let (name, count) = (file.display(), documents.len());
        return Err(Error::Usage(format!("{name}: describes {count} VMs; `uncloud apply -f {name}` takes several")));
    };
    let request_id = request_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    Ok(v1::CreateVmRequest { request_id, ..document.create_request(owner) })
}

/// Makes the request. Gives it an id here, so that the hint after a lost answer can name it.
fn request(a: Arguments, owner: &str) -> v1::CreateVmRequest {
    let mut disks = a.disk;
    if a.image.is_some() || a.disk_size.is_some() {
        let (image, size_bytes) = (a.image.unwrap_or_default(), a.disk_size.unwrap_or(0));
        disks.insert(0, v1::Disk { image, size_bytes, ..Default::default() });
    }
    let (failover, on_disk_loss) = a.failover.to_proto();
    let machine = match a.machine {
        Machine::Q35 => "q35",
        Machine::Pc => "pc",
    };
    let spec = v1::VmSpec {
        vcpus: a.cpus,
        memory_mib: a.memory,
        machine: machine.to_owned(),
        kernel: a.kernel.map(|image| v1::KernelBoot { image, command_line: a.append.unwrap_or_default() }),
        disks,
        nics: a.nic,
        restart: a.restart.to_proto().into(),
        failover: failover.into(),
        on_disk_loss: on_disk_loss.into(),
        priority: a.priority,
        host_labels: map(a.host_label),
        anti_affinity_group: a.anti_affinity.unwrap_or_default(),
        stop_grace_seconds: a.stop_grace,
        display: a.display.map_or(v1::DisplayType::Unspecified, Display::to_proto).into(),
        guest_agent: a.guest_agent.map_or(v1::GuestAgentMode::Unspecified, GuestAgent::to_proto).into(),
        cpu: a.cpu.to_proto().into(),
        firmware: match a.firmware {
            Firmware::Bios => v1::Firmware::Bios,
            Firmware::Uefi => v1::Firmware::Uefi,
        }
        .into(),
        cloud_init: a.cloud_init.into_proto(),
        disk_hotplug: v1::DiskHotplug::Unspecified.into(),
    };
    v1::CreateVmRequest {
        request_id: a.request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        name: a.name.unwrap_or_default(),
        owner: owner.to_owned(),
        labels: map(a.label),
        spec: Some(spec),
        desired: if a.stopped { v1::PowerState::Stopped } else { v1::PowerState::Running }.into(),
    }
}

fn map(pairs: Vec<(String, String)>) -> HashMap<String, String> {
    pairs.into_iter().collect()
}

/// Parses `user` or `bridge=NAME`.
fn parse_nic(text: &str) -> Result<v1::Nic, String> {
    match text.split_once('=') {
        None if text == "user" => Ok(v1::Nic { r#type: v1::NicType::User.into(), ..Default::default() }),
        Some(("bridge", name)) => {
            names::check_interface(name).map_err(|e| format!("the bridge's name {e}"))?;
            Ok(v1::Nic { r#type: v1::NicType::Bridge.into(), bridge: name.to_owned(), ..Default::default() })
        }
        None | Some(_) => Err("is neither `user` nor `bridge=NAME`".to_owned()),
    }
}

/// Parses `image=IMG,size=10G,pool=P,name=N,bus=B,cache=C`.
fn parse_disk(text: &str) -> Result<v1::Disk, String> {
    let disk = parse_disk_words(text)?;
    if disk.image.is_empty() && disk.size_bytes == 0 {
        return Err("needs image=IMAGE or size=SIZE, or both".to_owned());
    }
    Ok(disk)
}

fn known<T: PartialEq>(found: Option<T>, nothing: T) -> Option<T> {
    found.filter(|f| *f != nothing)
}

/// The same; any of it.
pub(super) fn parse_disk_words(text: &str) -> Result<v1::Disk, String> {
    let mut disk = v1::Disk::default();
    let mut seen = Vec::new();
    for part in text.split(',') {
        let (key, value) = units::parse_pair(part)?;
        if value.is_empty() {
            return Err(format!("`{key}` has no value"));
        }
        match key.as_str() {
            "image" => disk.image = value,
            "size" => disk.size_bytes = units::parse_size(&value).map_err(|e| format!("size: {e}"))?,
            "pool" => disk.pool = value,
            "name" => disk.name = value,
            "bus" => {
                let bus = v1::DiskBus::from_str_name(&format!("DISK_BUS_{}", value.to_uppercase()));
                disk.bus = known(bus, v1::DiskBus::Unspecified).ok_or("bus: give virtio, scsi or sata")?.into();
            }
            "cache" => {
                let cache = v1::DiskCache::from_str_name(&format!("DISK_CACHE_{}", value.to_uppercase()));
                let cache = known(cache, v1::DiskCache::Unspecified);
                disk.cache = cache.ok_or("cache: give none, writethrough or writeback")?.into();
            }
            _ => {
                let known = "image, size, pool, name, bus, cache";
                return Err(format!("`{}` is not one of {known}", output::clean(&key)));
            }
        }
        if seen.contains(&key) {
            return Err(format!("`{key}` is given twice"));
        }
        seen.push(key);
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Harness {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &str) -> Result<v1::CreateVmRequest, String> {
        let words = std::iter::once("create").chain(line.split_whitespace());
        Harness::try_parse_from(words).map(|h| request(h.arguments, "me")).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_a_request() {
        let made = parse(
            "web --cpus 2 --memory 2G --machine pc --kernel k --append quiet --disk image=deb,size=10G,pool=fast \
             --disk size=1G,name=data,bus=scsi,cache=writethrough --nic user --nic bridge=br0 --restart always --failover recreate --priority 5 --host-label rack=1 \
             --anti-affinity web --label a=b=c --stop-grace 90s --display none --guest-agent enabled --stopped --request-id r1 \
             --cpu x86-64-v3 --firmware uefi --hostname w",
        )
        .unwrap();
        let spec = v1::VmSpec {
            vcpus: 2,
            memory_mib: 2048,
            machine: "pc".into(),
            kernel: Some(v1::KernelBoot { image: "k".into(), command_line: "quiet".into() }),
            disks: vec![
                v1::Disk { image: "deb".into(), size_bytes: 10 << 30, pool: "fast".into(), ..Default::default() },
                v1::Disk {
                    name: "data".into(),
                    size_bytes: 1 << 30,
                    bus: v1::DiskBus::Scsi.into(),
                    cache: v1::DiskCache::Writethrough.into(),
                    ..Default::default()
                },
            ],
            nics: vec![
                v1::Nic { r#type: v1::NicType::User.into(), ..Default::default() },
                v1::Nic { r#type: v1::NicType::Bridge.into(), bridge: "br0".into(), ..Default::default() },
            ],
            restart: v1::RestartPolicy::Always.into(),
            failover: v1::FailoverPolicy::Fast.into(),
            on_disk_loss: v1::DiskLossPolicy::Recreate.into(),
            priority: 5,
            host_labels: [("rack".into(), "1".into())].into(),
            anti_affinity_group: "web".into(),
            stop_grace_seconds: 90,
            display: v1::DisplayType::None.into(),
            guest_agent: v1::GuestAgentMode::Enabled.into(),
            cpu: v1::CpuModel::X8664V3.into(),
            firmware: v1::Firmware::Uefi.into(),
            cloud_init: Some(v1::CloudInit { hostname: "w".into(), ..Default::default() }),
            disk_hotplug: v1::DiskHotplug::Unspecified.into(),
        };
        let expected = v1::CreateVmRequest {
            request_id: "r1".into(),
            name: "web".into(),
            owner: "me".into(),
            labels: [("a".into(), "b=c".into())].into(),
            spec: Some(spec),
            desired: v1::PowerState::Stopped.into(),
        };
        assert_eq!(made, expected);
    }

    #[test]
    fn the_short_form_makes_the_first_disk_and_every_request_has_an_id() {
        let made = parse("web --disk size=1G --image deb --disk-size 10G").unwrap();
        let disks = made.spec.unwrap().disks;
        assert_eq!((disks[0].image.as_str(), disks[0].size_bytes, disks[1].size_bytes), ("deb", 10 << 30, 1 << 30));
        assert_eq!(made.request_id.len(), 36);
        assert_eq!(
            parse("web --disk size=1G").unwrap().spec.unwrap().cloud_init,
            None,
            "no seed without a flag for it"
        );
    }

    #[test]
    fn mistakes_name_the_flag() {
        for (line, flag, words) in [
            ("web --memory 512", "--memory", "has no unit"),
            ("web --memory 1K", "--memory", "whole number of MiB"),
            ("web --memory 2GB", "--memory", "powers of 1000"),
            ("web --cpus 0", "--cpus", "1..=256"),
            ("web --disk 10G", "--disk", "KEY=VALUE"),
            ("web --disk size=10", "--disk", "size: `10` has no unit"),
            ("web --disk pool=x", "--disk", "needs image=IMAGE or size=SIZE"),
            ("web --disk size=1G,size=2G", "--disk", "given twice"),
            ("web --disk size=1G,colour=red", "--disk", "not one of image"),
            ("web --disk size=1G,bus=ide", "--disk", "bus: give virtio, scsi or sata"),
            ("web --disk size=1G,cache=unsafe", "--disk", "cache: give none, writethrough or writeback"),
            ("web --nic bridge", "--nic", "neither `user` nor `bridge=NAME`"),
            ("web --nic bridge=", "--nic", "the bridge's name is required"),
            ("web --nic bridge=br0,fd=3", "--nic", "may have only letters"),
            ("web --nic tap=x", "--nic", "neither"),
            ("web --failover now", "--failover", "patient"),
            ("web --label x", "--label", "KEY=VALUE"),
            ("web --stop-grace 60", "--stop-grace", "has no unit"),
            ("web --user-data /none", "--user-data", "/none"),
            ("web --user-data /dev/zero", "--user-data", "at most 65536"),
            ("web --ssh-key /none.pub", "--ssh-key", "/none.pub"),
            ("web --append quiet", "--kernel", "required"),
            ("web --wait-timeout 5", "--wait-timeout", "has no unit"),
            ("", "NAME", "required"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(flag) && error.contains(words), "{line}: {error}");
        }
    }
}
