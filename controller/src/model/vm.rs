//! VMs as they are stored.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uncloud_proto::{
    clock::WallTime,
    cpu::Level,
    ids::{HostId, ImageId, Incarnation, VmId},
};
use uuid::Uuid;

use super::{
    Extra,
    migration::{Migration, MigrationEnd, MigrationProgress},
};

/// A VM: what its user wants, and where the leader put it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Random (version 4).
    pub id: VmId,
    /// Unique among the VMs of `owner`.
    pub name: String,
    /// Who it belongs to.
    pub owner: String,
    /// Free labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What its present incarnation is made of, with every default filled in.
    pub spec: VmSpec,
    /// What its next incarnation has otherwise. See [`VmRecord::begin_next`] for when that is (W4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingSpec>,
    /// What its user wants it to be.
    pub desired: Desired,
    /// Where it is.
    pub placement: Placement,
    /// The migration under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// The newest incarnation that was reserved for a migration, whatever came of it: it is given to nothing else.
    #[serde(default, skip_serializing_if = "Incarnation::is_none")]
    pub reserved: Incarnation,
    /// How many restarts users have asked for.
    #[serde(default)]
    pub restarts: u64,
    /// The newest restart is a reset.
    #[serde(default)]
    pub restart_force: bool,
    /// The newest stop is to kill at once.
    #[serde(default)]
    pub stop_force: bool,
    /// Its user wants the guest to stand still. Ends with a resume, a stop or a restart.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
    /// The incarnation that is being stopped so that the VM starts on another host (`state/drain.rs`). It says nothing about
    /// any other.
    #[serde(default, skip_serializing_if = "Incarnation::is_none")]
    pub moving_out: Incarnation,
    /// A host has said that all disks are made: they may hold data, and are never made again under this `disk_generation`.
    #[serde(default)]
    pub disks_exist: bool,
    /// Where its disks lie. Set together with `disks_exist`, by what the host that made them has said about its pools;
    /// the VM cannot run where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_home: Option<DiskHome>,
    /// Part of the disks' file names. Grows when lost disks are given up and made anew.
    #[serde(default)]
    pub disk_generation: u32,
    /// The newest generation that was reserved for copies of its disks on another host, whatever came of them (M7).
    #[serde(default, skip_serializing_if = "is_default")]
    pub disks_reserved: u32,
    /// From this generation on each was copied into the next, by migrations, up to `disk_generation` (M7).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks_copied_from: Option<u32>,
    /// Whose disks its own are copies of. Goes when `disks_exist` comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<CloneOf>,
    /// Snapshots of its disks, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Snapshot>,
    /// Its disks are to be put back. While this stands the VM is not to execute (P5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revert: Option<Revert>,
    /// How often users have asked for that.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reverts: u64,
    /// How often users have had a disk come or go.
    #[serde(default, skip_serializing_if = "is_default")]
    pub disk_orders: u64,
    /// When it was created, ms since 1970.
    pub created: WallTime,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What the disks of a VM are to be copies of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneOf {
    /// The VM that they belong to.
    pub vm: VmId,
    /// Its name when the clone was made.
    pub name: String,
    /// Its `disk_generation` then.
    pub disk_generation: u32,
    /// The `kept_generation` of those disks that had one, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kept_generations: BTreeMap<String, u32>,
    /// The snapshot that is copied. `null`: the disks as they are, and that VM does not run meanwhile.
    pub snapshot: Option<Uuid>,
    /// Where its disks lie. The copies lie there, too.
    pub home: DiskHome,
}

/// A snapshot of all disks of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Random (version 4). Its name in the disks' files.
    pub id: Uuid,
    /// Unique among the VM's.
    pub name: String,
    /// When it was asked for, ms since 1970.
    pub created: WallTime,
    /// What it is.
    pub state: SnapshotState,
    /// What the guest did when it was taken, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<SnapshotGuest>,
    /// In a network pool, whose storage host takes it: the hold of the guest's file systems under which it does, or the nil UUID if there is
    /// none. Absent: the VM's host has not said yet, and the storage host waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Uuid>,
}

/// What a guest did when a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotGuest {
    /// It held its file systems still.
    Frozen,
    /// It ran: the disks are as after a power cut.
    Running,
    /// It did not run.
    Off,
}

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// To be taken.
    Creating,
    /// A host has said that it is there.
    Ready,
    /// To be removed.
    Deleting,
}

/// Disks that are to be put back to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// The snapshot's id.
    pub snapshot: Uuid,
    /// Tells it from those before.
    pub number: u64,
    /// Of disks in a network pool: the VM's host has said that nothing executes under the present incarnation, nor will.
    #[serde(default, skip_serializing_if = "is_default")]
    pub at_rest: bool,
}

impl VmRecord {
    /// Whether a host has been told to do something to the disks and has not said yet that it has. Until then the VM belongs to that
    /// host as if it executed there.
    #[must_use]
    pub fn has_disk_orders(&self) -> bool {
        self.revert.is_some()
            || self.snapshots.iter().any(|s| s.state != SnapshotState::Ready)
            || self.spec.disks.iter().any(Disk::is_pending)
    }

    /// What its next incarnation is made of.
    #[must_use]
    pub fn next_spec(&self) -> VmSpec {
        let mut spec = self.spec.clone();
        if let Some(pending) = &self.pending {
            pending.apply(&mut spec);
        }
        spec
    }

    /// Whether its present incarnation should run, and is being stopped so that the next one starts on another host.
    #[must_use]
    pub fn is_moving_out(&self) -> bool {
        self.desired == Desired::Running && !self.moving_out.is_none() && self.moving_out == self.placement.incarnation
    }

    /// What was pending becomes what the VM is made of.
    ///
    /// # Safety argument (W4)
    ///
    /// The record's class says under which lease the VM may execute, and the leader judges by it. So this may be called only
    /// where it is known that the VM does not execute, and for the same write that gives it a new incarnation or leaves it
    /// without a host.
    pub fn begin_next(&mut self) {
        self.spec = self.next_spec();
        self.pending = None;
    }
}

/// Changes of a VM's spec that wait for its next incarnation. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PendingSpec {
    /// Virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Under which lease it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Failover>,
    /// Whether it has a screen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display: Option<Display>,
    /// Whether it has a channel to a guest agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_agent: Option<GuestAgent>,
    /// The CPU that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuModel>,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

impl PendingSpec {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Changes a spec accordingly.
    pub fn apply(&self, spec: &mut VmSpec) {
        let Self { vcpus, memory_mib, failover, display, guest_agent, cpu, extra: _ } = self;
        spec.vcpus = vcpus.unwrap_or(spec.vcpus);
        spec.memory_mib = memory_mib.unwrap_or(spec.memory_mib);
        spec.failover = failover.unwrap_or(spec.failover);
        spec.display = display.unwrap_or(spec.display);
        spec.guest_agent = guest_agent.unwrap_or(spec.guest_agent);
        spec.cpu = cpu.unwrap_or(spec.cpu);
    }

    /// The fields of the spec that wait, as paths of the API.
    #[must_use]
    pub fn fields(&self) -> Vec<&'static str> {
        let Self { vcpus, memory_mib, failover, display, guest_agent, cpu, extra: _ } = self;
        let all = [
            ("spec.vcpus", vcpus.is_some()),
            ("spec.memory_mib", memory_mib.is_some()),
            ("spec.failover", failover.is_some()),
            ("spec.display", display.is_some()),
            ("spec.guest_agent", guest_agent.is_some()),
            ("spec.cpu", cpu.is_some()),
        ];
        all.into_iter().filter(|(_, waits)| *waits).map(|(field, _)| field).collect()
    }
}

/// Where the disks of a VM lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskHome {
    /// The host that made them.
    pub host: HostId,
    /// For each pool that has one of the disks: the id in the marker of the shared pool, or `null` if only `host` has it.
    pub pools: BTreeMap<String, Option<Uuid>>,
}

/// Where a VM is, or why it is nowhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// The host that it was given. `null`: none.
    pub host: Option<HostId>,
    /// Grows by one each time the VM is given a host. Kept when it loses its host.
    pub incarnation: Incarnation,
    /// Why there, or why nowhere, in words.
    pub why: String,
    /// Since when, ms since 1970.
    pub since: WallTime,
}

/// What a user wants a VM to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// It should run.
    Running,
    /// It should not run.
    Stopped,
    /// It should be gone, with its disks.
    Deleted,
}

/// What a VM is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// `q35` or `pc`.
    pub machine: Machine,
    /// Boots this kernel directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelBoot>,
    /// Disks, in the guest's order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces, in the guest's order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// What happens when QEMU dies.
    pub restart: RestartPolicy,
    /// What happens when the host dies.
    pub failover: Failover,
    /// What happens when the host dies and takes the disks with it.
    pub on_disk_loss: OnDiskLoss,
    /// Higher starts first.
    #[serde(default)]
    pub priority: u32,
    /// Labels that a host must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_labels: BTreeMap<String, String>,
    /// VMs of one group never share a host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anti_affinity_group: Option<String>,
    /// How long the guest may take to power down, in seconds.
    pub stop_grace_seconds: u32,
    /// Whether it has a screen. VMs of a program that knew no screens have none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub display: Display,
    /// Whether it has a channel to a guest agent. VMs of a program that knew none have none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guest_agent: GuestAgent,
    /// What boots the machine.
    #[serde(default, skip_serializing_if = "Firmware::is_bios")]
    pub firmware: Firmware,
    /// The CPU that the guest sees.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cpu: CpuModel,
    /// What the guest's cloud-init is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Whether disks can come and go while it runs. VMs of a program that knew nothing of it have no controller for that.
    #[serde(default, skip_serializing_if = "is_default")]
    pub disk_hotplug: DiskHotplug,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

impl VmSpec {
    /// The bridges that its host must have.
    #[must_use]
    pub fn bridges(&self) -> BTreeSet<String> {
        let bridge = |nic: &Nic| match &nic.kind {
            NicKind::User => None,
            NicKind::Bridge { bridge } => Some(bridge.clone()),
        };
        self.nics.iter().filter_map(bridge).collect()
    }
}

/// What says nothing is not written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a VM shows its screen with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Display {
    /// It has none.
    #[default]
    None,
    /// A VGA card that every guest knows.
    Standard,
}

/// Whether a VM has a channel to a guest agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestAgent {
    /// It has none.
    #[default]
    Disabled,
    /// It has one.
    Enabled,
}

/// QEMU's machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "QEMU's own names")]
pub enum Machine {
    Q35,
    Pc,
}

/// The CPU that a guest sees. Documented in `vm.proto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum CpuModel {
    #[default]
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
    #[serde(rename = "x86-64-v4")]
    V4,
    #[serde(rename = "host")]
    Host,
}

impl CpuModel {
    /// The level whose features a host must have. `None`: whatever it has will do.
    #[must_use]
    pub const fn level(self) -> Option<Level> {
        match self {
            Self::V2 => Some(Level::V2),
            Self::V3 => Some(Level::V3),
            Self::V4 => Some(Level::V4),
            Self::Host => None,
        }
    }
}

/// What boots a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

impl Firmware {
    /// What a record need not say.
    const fn is_bios(&self) -> bool {
        matches!(self, Self::Bios)
    }
}

/// What the guest's cloud-init is told. Documented in `vm.proto`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub struct CloudInit {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_authorized_keys: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user_data: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub network_config: String,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A kernel that QEMU loads itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelBoot {
    /// An image of kind kernel.
    pub image: ImageId,
    /// Kernel command line.
    pub command_line: String,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Unique within the VM.
    pub name: String,
    /// The pool it lies in.
    pub pool: String,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// The image that it is an overlay of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// How the guest sees it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bus: DiskBus,
    /// What the host's memory is used for.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache: DiskCache,
    /// On the bus SCSI: its target number there, which no other disk of the VM has.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unit: u32,
    /// Part of its file's name. Absent: it was there from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// Whether the machine has it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub state: DiskState,
    /// While something is to be done to it: number of that, unique within the VM.
    #[serde(default, skip_serializing_if = "is_default")]
    pub order: u64,
    /// In a network pool, where two hosts have something to do for an order: the first one has done it. The storage host has made a disk
    /// that comes; no machine has one that is to be deleted.
    #[serde(default, skip_serializing_if = "is_default")]
    pub half_done: bool,
    /// Part of its file's name, instead of the VM's `disk_generation`: it is in a pool that hosts share, and stays there when a migration
    /// copies the others (M7).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_generation: Option<u32>,
}

impl Disk {
    /// Whether a host has been told to attach, detach or delete it and has not said yet that it has.
    #[must_use]
    pub const fn is_pending(&self) -> bool {
        match self.state {
            DiskState::Attached | DiskState::Detached => false,
            DiskState::Attaching | DiskState::Returning | DiskState::Detaching | DiskState::Deleting => true,
        }
    }

    /// Whether a machine that is started now has it.
    #[must_use]
    pub const fn is_in_machine(&self) -> bool {
        match self.state {
            DiskState::Attached | DiskState::Attaching | DiskState::Returning => true,
            DiskState::Detaching | DiskState::Detached | DiskState::Deleting => false,
        }
    }
}

/// How a guest sees a disk. Documented in `vm.proto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum DiskBus {
    #[default]
    Virtio,
    Scsi,
    Sata,
}

impl DiskBus {
    /// As people write it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Scsi => "scsi",
            Self::Sata => "sata",
        }
    }
}

/// What the host's memory is used for between a guest and its disk. Documented in `vm.proto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum DiskCache {
    #[default]
    None,
    Writethrough,
    Writeback,
}

/// Whether a VM's machine has a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// It has.
    #[default]
    Attached,
    /// A new disk, to be made and given to the machine.
    Attaching,
    /// One that was detached, to be given to the machine again.
    Returning,
    /// To be taken from the machine.
    Detaching,
    /// The machine does not have it, and it is kept.
    Detached,
    /// To be taken from the machine, and deleted.
    Deleting,
}

/// Whether disks can come and go while a VM runs. Documented in `vm.proto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum DiskHotplug {
    #[default]
    Disabled,
    Enabled,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nic {
    /// How it is connected: `type`, and what belongs to that.
    #[serde(flatten)]
    pub kind: NicKind,
    /// Its MAC address.
    pub mac: String,
}

/// How a network interface is connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum NicKind {
    /// QEMU's user-mode network.
    User,
    /// A port of a bridge of the host.
    Bridge {
        /// The bridge's name.
        bridge: String,
    },
}

/// What happens when QEMU dies or the guest panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Started again after a failure.
    OnFailure,
    /// Started again whenever it ends.
    Always,
    /// Left as it is.
    Never,
}

/// Under which lease a VM lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failover {
    /// The short one.
    Fast,
    /// The long one.
    Patient,
    /// None: pinned to its host.
    Hold,
}

/// What happens when a host dies and takes the disks of a VM with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDiskLoss {
    /// The VM waits for its host.
    Wait,
    /// It starts elsewhere with new disks.
    Recreate,
}

/// What a VM was last seen to be. A VM without this record has been created or placed, and no host has said anything yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatusRecord {
    /// The phase.
    pub phase: Phase,
    /// Why, in words.
    #[serde(default)]
    pub reason: String,
    /// Since when, ms since 1970.
    pub since: WallTime,
    /// The incarnation that this is about.
    pub incarnation: Incarnation,
    /// Addresses of the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// How QEMU last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<LastExit>,
    /// When a failed start is tried again, ms since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt: Option<WallTime>,
    /// The newest restart that the host has carried out.
    #[serde(default)]
    pub restarts_done: u64,
    /// The guest stands still, as its user wants. The phase is Running then.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
    /// How far the migration is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationProgress>,
    /// How the last migration ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_migration: Option<MigrationEnd>,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// How a QEMU process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastExit {
    /// Exit status, -1 if a signal ended it or nobody saw it.
    pub code: i32,
    /// The signal that ended it, 0 if none.
    pub signal: i32,
    /// What that means.
    pub reason: String,
    /// When, ms since 1970.
    pub at: WallTime,
}

/// Where a VM is in its life. Documented in `vm.proto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented in vm.proto")]
pub enum Phase {
    Pending,
    Scheduled,
    Preparing,
    Starting,
    Running,
    Stopping,
    Stopped,
    Failed,
    Unreachable,
    Deleting,
    Migrating,
    Paused,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_false(value: &bool) -> bool {
    !value
}
