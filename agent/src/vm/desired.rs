//! What a VM should be, as the leader said it, checked and in our own types. Pure.
//!
//! The same types are what `record.json` holds, so their JSON form is a file format: fields are added with
//! `#[serde(default)]`, never renamed.
//!
//! Everything is checked again although the controller has checked it: names end up in paths and on QEMU's command
//! line, and a root process must not trust a peer that far.

mod parse;

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};
use uncloud_proto::ids::{ImageId, Incarnation};
use uuid::Uuid;

pub use self::parse::{Unusable, identify};
use super::{
    disks::{CloneFrom, Orders},
    migration::{MigrateTo, Nodes},
};
use crate::lease::LeaseClass;

/// What one VM should be on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// The incarnation.
    pub incarnation: Incarnation,
    /// What to do with it.
    pub disposition: Disposition,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub owner: String,
    /// What it is made of. Absent only when it is to be forgotten.
    #[serde(default)]
    pub spec: Option<Spec>,
    /// The images that the spec names.
    #[serde(default)]
    pub images: Vec<Image>,
    /// Grows by one with each restart that a user asked for.
    #[serde(default)]
    pub restarts: u64,
    /// How the newest restart is done.
    #[serde(default)]
    pub restart_mode: RestartMode,
    /// How it is stopped.
    #[serde(default)]
    pub stop_mode: StopMode,
    /// Whether a disk that is missing is an error.
    #[serde(default)]
    pub disks: DisksExpected,
    /// Part of the disks' file names.
    #[serde(default)]
    pub disk_generation: u32,
    /// For Run: where to send it.
    #[serde(default)]
    pub migrate_to: Option<MigrateTo>,
    /// For Forget: generations of its disks that are void here. They are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub void: Option<VoidDisks>,
    /// For Incoming: what the source knows, too.
    #[serde(default)]
    pub migration_secret: String,
    /// For Run: what its user wants of the guest.
    #[serde(default)]
    pub pause: Pause,
    /// What is to be done to its disks.
    #[serde(default)]
    pub orders: Orders,
    /// For Run, if its disks are not made yet: what they are copies of.
    #[serde(default)]
    pub clone_from: Option<CloneFrom>,
    /// Where the network pools of its disks are served, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub network_pools: BTreeMap<String, SocketAddr>,
    /// For a host that serves its disks, while it migrates: the incarnation on the target, which is served, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Incarnation>,
}

/// What to do with a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Disposition {
    /// It should run here.
    Run,
    /// It belongs here and should not run.
    Stop,
    /// It should not run, and its disks should go.
    Delete,
    /// It belongs elsewhere: no process, no record, and hands off its disks.
    Forget,
    /// It may come from another host: a process that waits for it.
    Incoming,
}

/// Whether the guest of a VM that runs should execute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pause {
    /// It should.
    #[default]
    GoOn,
    /// It should stand still.
    StandStill,
}

/// How a restart is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RestartMode {
    /// The guest is asked to power down, then started again.
    #[default]
    Graceful,
    /// The machine is reset.
    Reset,
}

/// How a VM is stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopMode {
    /// The guest is asked, and killed when the grace is over.
    #[default]
    Graceful,
    /// It is killed at once.
    Kill,
}

/// Generations of a VM's disks that are void on a host (docs/fencing.md, M7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoidDisks {
    /// From this one on, and before `current`, each was copied into the next.
    pub copied_from: u32,
    /// That of the VM's disks, which are on another host. Larger ones are copies that were given up.
    pub current: u32,
}

impl VoidDisks {
    /// Whether disks of this generation are void. Those of the VM's own generation never are.
    #[must_use]
    pub const fn has(self, generation: u32) -> bool {
        generation > self.current || (self.copied_from <= generation && generation < self.current)
    }
}

/// Whether a VM's disks have been made before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DisksExpected {
    /// Not as far as the leader knows: those that are missing are made.
    #[default]
    New,
    /// They have: one that is missing is an error, and is never replaced by an empty one (P5).
    Exist,
}

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// QEMU's machine type.
    pub machine: Machine,
    /// The kernel that QEMU loads; absent, the firmware boots the first disk.
    #[serde(default)]
    pub kernel: Option<Kernel>,
    /// Disks in the guest's order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces in the guest's order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// What happens when it ends by itself.
    pub restart: RestartPolicy,
    /// Which of the host's leases it lives under.
    pub class: Class,
    /// Higher starts first.
    #[serde(default)]
    pub priority: u32,
    /// How long the guest may take to power down, in seconds.
    pub stop_grace_seconds: u32,
    /// Whether it has a screen.
    #[serde(default)]
    pub display: Display,
    /// Whether it has a channel to a guest agent.
    #[serde(default)]
    pub guest_agent: GuestAgent,
    /// What boots the machine.
    #[serde(default)]
    pub firmware: Firmware,
    /// The CPU that the guest sees.
    #[serde(default)]
    pub cpu: CpuModel,
    /// What the guest's cloud-init is told.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
    /// Whether disks can come and go while it runs.
    #[serde(default)]
    pub disk_hotplug: DiskHotplug,
}

/// What a VM shows its screen with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Display {
    /// It has none.
    #[default]
    None,
    /// A VGA card.
    Standard,
}

/// Whether a VM has a channel to a guest agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestAgent {
    /// It has none.
    #[default]
    Disabled,
    /// It has one.
    Enabled,
}

/// What boots a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF, with variables of its own.
    Uefi,
}

/// The CPU that a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum CpuModel {
    #[default]
    V2,
    V3,
    V4,
    Host,
}

/// What the guest's cloud-init is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInit {
    /// Empty: made from the VM's name.
    pub hostname: String,
    /// Public keys, a line each.
    pub ssh_authorized_keys: Vec<String>,
    /// As the user gave it.
    pub user_data: String,
    /// Likewise; empty: none.
    pub network_config: String,
}

/// QEMU's machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// PCI Express.
    Q35,
    /// The older one.
    Pc,
}

/// A kernel that QEMU loads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// The image that has it.
    pub image: ImageId,
    /// Its command line; empty means the image's.
    #[serde(default)]
    pub command_line: String,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Unique within the VM.
    pub name: String,
    /// The pool it lies in.
    pub pool: String,
    /// Virtual size in bytes; 0 means the image's.
    pub size_bytes: u64,
    /// The image that it starts as; absent, it starts empty.
    #[serde(default)]
    pub image: Option<ImageId>,
    /// How the guest sees it.
    #[serde(default)]
    pub bus: DiskBus,
    /// What the host's memory is used for.
    #[serde(default)]
    pub cache: DiskCache,
    /// On the bus SCSI: its target number there.
    #[serde(default)]
    pub unit: u32,
    /// Part of its file's name. Absent: it was there from the beginning.
    #[serde(default)]
    pub id: Option<Uuid>,
    /// Whether the machine should have it.
    #[serde(default)]
    pub state: DiskState,
    /// Number of what is to be done to it. 0: nothing.
    #[serde(default)]
    pub order: u64,
    /// Part of its file's name, instead of the VM's `disk_generation`. It has been made, and is not copied when the VM migrates: both
    /// hosts have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_generation: Option<u32>,
}

impl Disk {
    /// Whether a machine that is started now has it.
    #[must_use]
    pub const fn is_in_machine(&self) -> bool {
        match self.state {
            DiskState::Attached | DiskState::Attaching | DiskState::Returning => true,
            DiskState::Detaching | DiskState::Detached | DiskState::Deleting => false,
        }
    }
}

/// How a guest sees a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A device of its own.
    #[default]
    Virtio,
    /// On the virtio-scsi controller.
    Scsi,
    /// On an AHCI controller.
    Sata,
}

/// What the host's memory is used for between a guest and its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// For nothing.
    #[default]
    None,
    /// For reads.
    Writethrough,
    /// For reads and writes.
    Writeback,
}

/// Whether a machine should have a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// It should.
    #[default]
    Attached,
    /// It should, and the disk is a new one.
    Attaching,
    /// It should, and does not have it yet.
    Returning,
    /// It should not, and may have it still.
    Detaching,
    /// It should not. The disk is kept.
    Detached,
    /// It should not, and the disk is to be deleted.
    Deleting,
}

/// Whether disks can come and go while a VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskHotplug {
    /// They cannot.
    #[default]
    Disabled,
    /// They can.
    Enabled,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its MAC address.
    pub mac: String,
    /// What it is connected to.
    #[serde(default)]
    pub link: Link,
}

/// What a network interface is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// QEMU's user network.
    #[default]
    User,
    /// A bridge of this host, by its name.
    Bridge(String),
}

/// What happens when a VM ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Started again after a failure, not when the guest powered itself off.
    OnFailure,
    /// Started again whenever it ends.
    Always,
    /// Left as it is.
    Never,
}

/// [`LeaseClass`] as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// The short lease.
    Fast,
    /// The long lease.
    Patient,
    /// No lease: pinned to this host.
    Hold,
}

impl Class {
    /// As the lease has it.
    #[must_use]
    pub const fn lease(self) -> LeaseClass {
        match self {
            Self::Fast => LeaseClass::Fast,
            Self::Patient => LeaseClass::Patient,
            Self::Hold => LeaseClass::Hold,
        }
    }
}

/// An image that a spec names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: String,
    /// Its files.
    pub files: Vec<ImageFile>,
    /// For a kernel, the command line of VMs that name none.
    #[serde(default)]
    pub command_line: String,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// What it is to the image.
    pub role: Role,
    /// An absolute path, or `pool:NAME/path`.
    pub source: String,
    /// sha256, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Format, for a disk.
    #[serde(default)]
    pub format: Option<Format>,
}

/// What a file is to its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The disk.
    Disk,
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl Role {
    /// Name of the file in the pool.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        }
    }
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The plain bytes.
    Raw,
    /// QEMU's.
    Qcow2,
}

impl Format {
    /// As qemu-img calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl Desired {
    /// The lease class that the VM lives under. A VM to be forgotten is started by nobody, so its class says nothing.
    #[must_use]
    pub fn class(&self) -> LeaseClass {
        self.spec.as_ref().map_or(LeaseClass::Fast, |s| s.class.lease())
    }

    /// Whether another host, or this one as that, serves its disks. All of them lie in a network pool, or none.
    #[must_use]
    pub fn has_served_disks(&self) -> bool {
        let mut disks = self.spec.iter().flat_map(|s| &s.disks);
        disks.any(|d| self.network_pools.contains_key(&d.pool))
    }

    /// The disks that are copied here before the guest comes from another host.
    #[must_use]
    pub fn disks_to_copy(&self) -> Nodes {
        match (self.disposition, self.disks) {
            (Disposition::Incoming, DisksExpected::New) => {
                self.spec.as_ref().map(Spec::nodes_to_copy).unwrap_or_default()
            }
            (Disposition::Incoming, DisksExpected::Exist)
            | (Disposition::Run | Disposition::Stop | Disposition::Delete | Disposition::Forget, _) => Nodes::default(),
        }
    }
}

impl Spec {
    /// The machine's disks, each with the name of its block node, which both sides of a migration have. SCSI disks have theirs by their
    /// target numbers, whatever else comes and goes while the machine runs; the others, which do not change while it runs, by their
    /// order.
    pub fn nodes(&self) -> impl Iterator<Item = (&Disk, String)> {
        let mut others = 0_u32..;
        self.disks.iter().filter(|d| d.is_in_machine()).map(move |disk| {
            let node = match disk.bus {
                DiskBus::Scsi => format!("scsi{}", disk.unit),
                DiskBus::Virtio | DiskBus::Sata => format!("disk{}", others.next().unwrap_or_default()),
            };
            (disk, node)
        })
    }

    /// M5: which disks are copied when it migrates with its disks.
    fn nodes_to_copy(&self) -> Nodes {
        let mut nodes = Nodes::default();
        for (disk, node) in self.nodes() {
            match disk.kept_generation {
                None => nodes.copied.push(node),
                Some(_) => nodes.shared.push(node),
            }
        }
        nodes
    }
}

#[cfg(test)]
mod tests;
