//! Descriptions of VMs in YAML files: what `uncloud apply` and `uncloud vm create --file` read. Pure.
//!
//! A file has one or several documents, each a VM. Sizes and times carry units, as on the command line. An unknown field is an
//! error with its place, so that a misspelt one is not taken for nothing. What a document does not say is left to the
//! cluster when the VM is created, and left as it is when the VM is changed.

mod difference;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, de};
use uncloud_proto::v1;

pub use self::difference::{Change, Images, Plan, plan};
use crate::units;

/// The largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// A VM as a document describes it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Always `vm`.
    #[serde(default)]
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its owner; without it, the one on the command line.
    pub owner: Option<String>,
    /// All its labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// What it should be.
    pub desired: Option<Desired>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<Mib>,
    /// Machine type.
    pub machine: Option<Machine>,
    /// A kernel to boot.
    pub kernel: Option<Kernel>,
    /// All its disks.
    pub disks: Option<Vec<Disk>>,
    /// All its network interfaces.
    pub nics: Option<Vec<Nic>>,
    /// What happens when QEMU dies.
    pub restart: Option<Restart>,
    /// Under which lease it lives.
    pub failover: Option<Failover>,
    /// What happens when the host dies and takes the disks with it.
    pub on_disk_loss: Option<OnDiskLoss>,
    /// Higher starts first.
    pub priority: Option<u32>,
    /// Labels that a host must have.
    pub host_labels: Option<BTreeMap<String, String>>,
    /// VMs of one group never share a host.
    pub anti_affinity: Option<String>,
    /// How long the guest may take to power down.
    pub stop_grace: Option<Seconds>,
    /// Whether it has a screen.
    pub display: Option<Display>,
    /// Whether it has a channel to a guest agent.
    pub guest_agent: Option<GuestAgent>,
    /// What boots it.
    pub firmware: Option<Firmware>,
    /// The CPU that the guest sees.
    pub cpu: Option<Cpu>,
    /// What the guest's cloud-init is told.
    pub cloud_init: Option<CloudInit>,
}

/// What the guest's cloud-init is told.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudInit {
    /// Without it, made from the VM's name.
    pub hostname: Option<String>,
    /// Public keys as in `authorized_keys`.
    pub ssh_keys: Option<Vec<String>>,
    /// The user data itself.
    pub user_data: Option<String>,
    /// The network configuration itself.
    pub network_config: Option<String>,
}

impl CloudInit {
    pub(super) fn to_proto(&self) -> v1::CloudInit {
        v1::CloudInit {
            hostname: self.hostname.clone().unwrap_or_default(),
            ssh_authorized_keys: self.ssh_keys.clone().unwrap_or_default(),
            user_data: self.user_data.clone().unwrap_or_default(),
            network_config: self.network_config.clone().unwrap_or_default(),
        }
    }
}

/// A kernel to boot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Name or UUID of its image.
    pub image: String,
    /// Its command line; without it, the image's own.
    pub append: Option<String>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name; without it, `disk0`, `disk1`, ... by position.
    pub name: Option<String>,
    /// Its pool; without it, `default`.
    pub pool: Option<String>,
    /// Its size; without it, the image's.
    pub size: Option<Bytes>,
    /// Name or UUID of the image that it starts as.
    pub image: Option<String>,
    /// How the guest sees it.
    pub bus: Option<Bus>,
    /// What the host's memory is used for.
    pub cache: Option<Cache>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// How it is connected.
    #[serde(rename = "type")]
    pub kind: NicKind,
    /// With type `bridge`: the bridge's name.
    pub bridge: Option<String>,
}

impl Nic {
    /// As the API has it.
    #[must_use]
    pub fn to_proto(&self) -> v1::Nic {
        let bridge = self.bridge.clone().unwrap_or_default();
        v1::Nic { r#type: self.kind.to_proto().into(), mac: String::new(), bridge }
    }
}

/// Declares words of a document and what they are in the API.
macro_rules! words {
    ($($(#[$doc:meta])* $name:ident => $proto:ident { $($word:ident = $text:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
            #[expect(missing_docs, reason = "the words say it")]
            pub enum $name { $(#[serde(rename = $text)] $word,)* }

            impl $name {
                /// As the API has it.
                #[must_use]
                pub const fn to_proto(self) -> v1::$proto {
                    match self { $(Self::$word => v1::$proto::$word,)* }
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(match self { $(Self::$word => $text,)* })
                }
            }
        )*
    };
}

words! {
    /// What a VM should be.
    Desired => PowerState { Running = "running", Stopped = "stopped", }
    /// What happens when QEMU dies.
    Restart => RestartPolicy { OnFailure = "on-failure", Always = "always", Never = "never", }
    /// Under which lease a VM lives.
    Failover => FailoverPolicy { Fast = "fast", Patient = "patient", Hold = "hold", }
    /// What happens when a host takes the disks with it.
    OnDiskLoss => DiskLossPolicy { Wait = "wait", Recreate = "recreate", }
    /// How a network interface is connected.
    NicKind => NicType { User = "user", Bridge = "bridge", }
    /// How a guest sees a disk.
    Bus => DiskBus { Virtio = "virtio", Scsi = "scsi", Sata = "sata", }
    /// What the host's memory is used for between a guest and its disk.
    Cache => DiskCache { None = "none", Writethrough = "writethrough", Writeback = "writeback", }
    /// A screen.
    Display => DisplayType { None = "none", Standard = "standard", }
    /// What boots a machine.
    Firmware => Firmware { Bios = "bios", Uefi = "uefi", }
    /// The CPU that a guest sees.
    Cpu => CpuModel { X8664V2 = "x86-64-v2", X8664V3 = "x86-64-v3", X8664V4 = "x86-64-v4", Host = "host", }
    /// A channel to a guest agent.
    GuestAgent => GuestAgentMode { Disabled = "disabled", Enabled = "enabled", }
}

/// What a document describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Kind {
    /// A VM.
    #[default]
    #[serde(rename = "vm")]
    Vm,
}

/// Machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "QEMU's own names")]
pub enum Machine {
    Q35,
    Pc,
}

impl Machine {
    /// As the API has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// Declares a number that is written with a unit.
macro_rules! with_unit {
    ($($(#[$doc:meta])* $name:ident($number:ty) = $parse:path;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub struct $name(pub $number);

            impl<'de> Deserialize<'de> for $name {
                fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                    let text = String::deserialize(from)?;
                    $parse(&text).map(Self).map_err(de::Error::custom)
                }
            }
        )*
    };
}

with_unit! {
    /// Memory in MiB, such as `2G`.
    Mib(u64) = units::parse_mib;
    /// A size in bytes, such as `10G`.
    Bytes(u64) = units::parse_size;
    /// A time in seconds, such as `90s`.
    Seconds(u32) = units::parse_seconds;
}

/// Reads the documents of a file.
///
/// # Errors
///
/// What is wrong, and in which line.
pub fn parse(text: &str) -> Result<Vec<Document>, String> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(text).map_err(|e| e.to_string())?;
    if documents.is_empty() {
        return Err("describes no VM".to_owned());
    }
    Ok(documents)
}

impl Document {
    /// Its owner, `default` being who is meant when it says nothing.
    #[must_use]
    pub fn owner_or(&self, default: &str) -> String {
        self.owner.clone().unwrap_or_else(|| default.to_owned())
    }

    /// The request that creates it.
    #[must_use]
    pub fn create_request(&self, default_owner: &str) -> v1::CreateVmRequest {
        let disks = self.disks.iter().flatten().map(|d| v1::Disk {
            name: d.name.clone().unwrap_or_default(),
            pool: d.pool.clone().unwrap_or_default(),
            size_bytes: d.size.map_or(0, |s| s.0),
            image: d.image.clone().unwrap_or_default(),
            bus: d.bus.map_or(v1::DiskBus::Unspecified, Bus::to_proto).into(),
            cache: d.cache.map_or(v1::DiskCache::Unspecified, Cache::to_proto).into(),
            ..Default::default()
        });
        let map = |labels: &Option<BTreeMap<String, String>>| labels.clone().unwrap_or_default().into_iter().collect();
        v1::CreateVmRequest {
            request_id: String::new(),
            name: self.name.clone(),
            owner: self.owner_or(default_owner),
            labels: map(&self.labels),
            desired: self.desired.map_or(v1::PowerState::Unspecified, Desired::to_proto).into(),
            spec: Some(v1::VmSpec {
                vcpus: self.cpus.unwrap_or(0),
                memory_mib: self.memory.map_or(0, |m| m.0),
                machine: self.machine.map(|m| m.name().to_owned()).unwrap_or_default(),
                kernel: self.kernel.as_ref().map(|k| v1::KernelBoot {
                    image: k.image.clone(),
                    command_line: k.append.clone().unwrap_or_default(),
                }),
                disks: disks.collect(),
                nics: self.nics.iter().flatten().map(Nic::to_proto).collect(),
                restart: self.restart.map_or(v1::RestartPolicy::Unspecified, Restart::to_proto).into(),
                failover: self.failover.map_or(v1::FailoverPolicy::Unspecified, Failover::to_proto).into(),
                on_disk_loss: self.on_disk_loss.map_or(v1::DiskLossPolicy::Unspecified, OnDiskLoss::to_proto).into(),
                priority: self.priority.unwrap_or(0),
                host_labels: map(&self.host_labels),
                anti_affinity_group: self.anti_affinity.clone().unwrap_or_default(),
                stop_grace_seconds: self.stop_grace.map_or(0, |s| s.0),
                display: self.display.map_or(v1::DisplayType::Unspecified, Display::to_proto).into(),
                guest_agent: self.guest_agent.map_or(v1::GuestAgentMode::Unspecified, GuestAgent::to_proto).into(),
                cpu: self.cpu.map_or(v1::CpuModel::Unspecified, Cpu::to_proto).into(),
                disk_hotplug: v1::DiskHotplug::Unspecified.into(),
                firmware: self.firmware.map_or(v1::Firmware::Unspecified, Firmware::to_proto).into(),
                cloud_init: self.cloud_init.as_ref().map(CloudInit::to_proto),
            }),
        }
    }

    /// The images that it names.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        let kernel = self.kernel.iter().map(|k| k.image.as_str());
        kernel.chain(self.disks.iter().flatten().filter_map(|d| d.image.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "
kind: vm
name: web
owner: alice
labels: {tier: front}
desired: stopped
cpus: 2
memory: 2G
machine: pc
kernel: {image: k, append: quiet}
disks:
  - {image: debian, size: 10G, pool: fast}
  - {name: data, size: 1G}
nics: [{type: user}, {type: bridge, bridge: br0}]
restart: always
failover: patient
on_disk_loss: recreate
priority: 5
host_labels: {rack: \"1\"}
anti_affinity: web
stop_grace: 90s
display: none
guest_agent: enabled
firmware: uefi
cpu: x86-64-v3
cloud_init: {hostname: w, ssh_keys: [ssh-ed25519 AAAA me]}
";

    #[test]
    fn a_document_becomes_a_request() {
        let documents = parse(ALL).unwrap();
        let request = documents[0].create_request("me");
        let spec = v1::VmSpec {
            vcpus: 2,
            memory_mib: 2048,
            machine: "pc".into(),
            kernel: Some(v1::KernelBoot { image: "k".into(), command_line: "quiet".into() }),
            disks: vec![
                v1::Disk { image: "debian".into(), size_bytes: 10 << 30, pool: "fast".into(), ..Default::default() },
                v1::Disk { name: "data".into(), size_bytes: 1 << 30, ..Default::default() },
            ],
            nics: vec![
                v1::Nic { r#type: v1::NicType::User.into(), ..Default::default() },
                v1::Nic { r#type: v1::NicType::Bridge.into(), bridge: "br0".into(), ..Default::default() },
            ],
            restart: v1::RestartPolicy::Always.into(),
            failover: v1::FailoverPolicy::Patient.into(),
            on_disk_loss: v1::DiskLossPolicy::Recreate.into(),
            priority: 5,
            host_labels: [("rack".into(), "1".into())].into(),
            anti_affinity_group: "web".into(),
            stop_grace_seconds: 90,
            display: v1::DisplayType::None.into(),
            guest_agent: v1::GuestAgentMode::Enabled.into(),
            firmware: v1::Firmware::Uefi.into(),
            cpu: v1::CpuModel::X8664V3.into(),
            cloud_init: Some(v1::CloudInit {
                hostname: "w".into(),
                ssh_authorized_keys: vec!["ssh-ed25519 AAAA me".into()],
                ..Default::default()
            }),
            disk_hotplug: v1::DiskHotplug::Unspecified.into(),
        };
        let expected = v1::CreateVmRequest {
            request_id: String::new(),
            name: "web".into(),
            owner: "alice".into(),
            labels: [("tier".into(), "front".into())].into(),
            spec: Some(spec),
            desired: v1::PowerState::Stopped.into(),
        };
        assert_eq!(request, expected);
        assert_eq!(documents[0].images().collect::<Vec<_>>(), ["k", "debian"]);
    }

    #[test]
    fn a_file_has_any_number_of_documents() {
        let documents = parse("name: a\nmemory: 1G\n---\nname: b\n").unwrap();
        assert_eq!(documents.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(documents[1].create_request("me").owner, "me");
        assert!(parse("").is_err() && parse("---\n---\n").is_err());
    }

    #[test]
    fn mistakes_have_a_place() {
        for (text, line, words) in [
            ("name: a\nmemroy: 1G\n", "2", "memroy"),
            ("name: a\nmemory: 512\n", "2", "has no unit"),
            ("name: a\ndisks:\n  - size: 1G\n    colour: red\n", "4", "colour"),
            ("name: a\nfailover: now\n", "2", "now"),
            ("name: a\nname: b\n", "2", "name"),
            ("name: a\n---\nname: b\ncpus: many\n", "4", "many"),
            ("name: [a\n", "", ""),
            ("cpus: 1\n", "1", "name"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(line) && error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_that_grows_when_it_is_read_is_refused() {
        let mut bomb = String::from("name: a\nlabels: &l0 {x: y}\n");
        for i in 1..40 {
            bomb.push_str(&format!("labels{i}: &l{i} [*l{0}, *l{0}, *l{0}]\n", i - 1));
        }
        assert!(parse(&bomb).is_err());
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
