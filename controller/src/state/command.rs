//! What can be asked of the state, what comes out, and why it may be refused.
//!
//! A command carries everything that is not in the state: ids and MAC addresses (minted at the edge), what a
//! session was told. [`State::decide`](super::State::decide) turns it into a [`Change`], which is what is written
//! to etcd and what [`State::absorb`](super::State::absorb) takes in, on the leader and on a follower alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, ImageId, Incarnation, Revision, VmId},
};
use uuid::Uuid;

use crate::model::{
    Desired, DrainHow, HostMode, ImageRecord, Key, OwnDisks, Record, VmRecord,
    host::{Accelerator, Cpu, Pool},
    image::ImageFile,
    migration::MigrationProgress,
    vm::{
        CpuModel, DiskBus, DiskCache, Display, Failover, GuestAgent, LastExit, OnDiskLoss, RestartPolicy,
        SnapshotGuest, VmSpec,
    },
};

/// What the state must know about this moment.
#[derive(Clone, Debug)]
pub struct Context {
    /// Now, for the records.
    pub now: WallTime,
    /// Hosts on which nothing new is placed because they are silent.
    pub silent: Arc<BTreeSet<HostId>>,
    /// VMs of which the target of a migration has said that it has the whole guest, with the incarnation there. Not stored, because a
    /// guest stands still meanwhile: a new leader is told again.
    pub arrived: Arc<BTreeMap<VmId, Incarnation>>,
    /// vCPUs promised per CPU thread, in percent (400 = four).
    pub cpu_overcommit_percent: u32,
    /// Bytes of disks promised per byte of a pool, in percent (200 = two).
    pub disk_overcommit_percent: u32,
}

/// A request that must not be carried out twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    /// The client's id.
    pub id: String,
    /// Digest of the request, in hexadecimal.
    pub fingerprint: String,
}

/// What can be asked.
#[derive(Clone, Debug)]
pub enum Command {
    /// A user creates a VM. It is given a host at once, if one has room.
    CreateVm { request: Option<RequestId>, vm: Box<NewVm> },
    /// A user starts or stops a VM. STOPPED → RUNNING always gets a new incarnation.
    SetDesired { vm: VmId, desired: PowerChange },
    /// A user restarts a VM.
    RestartVm { vm: VmId, force: bool },
    /// A user changes what a VM is made of.
    UpdateVm { vm: VmId, update: Box<VmUpdate> },
    /// A user makes a disk larger.
    ResizeDisk { vm: VmId, disk: String, size_bytes: u64 },
    /// A user wants a VM to have one more disk.
    AttachDisk { vm: VmId, disk: Box<DiskToAttach> },
    /// A user wants a disk to go.
    DetachDisk { vm: VmId, disk: String, how: DetachHow },
    /// A user wants a snapshot of a VM's disks.
    CreateSnapshot { vm: VmId, id: Uuid, name: String },
    /// A user deletes a snapshot.
    DeleteSnapshot { vm: VmId, name: String },
    /// A user wants a VM's disks put back to a snapshot.
    RevertToSnapshot { vm: VmId, name: String },
    /// A user wants another VM with copies of the disks of this one, as they are or as they were in a snapshot.
    CloneVm { request: Option<RequestId>, source: VmId, snapshot: Option<String>, clone: Box<NewClone> },
    /// A user deletes a VM.
    DeleteVm { vm: VmId },
    /// Somebody moves a running VM to another host, or to this one.
    MigrateVm { vm: VmId, to: Option<HostId>, secret: String, bytes_per_second: u64 },
    /// A user gives up the migration of a VM.
    CancelMigration { vm: VmId },
    /// This very migration cannot go on. Nothing happens if it is over by now.
    GiveUpMigration { vm: VmId, migration: Incarnation, why: String },
    /// A user cordons or uncordons a host.
    SetHostMode { host: HostId, mode: HostMode, reason: String },
    /// A user has a host emptied. [`Command::SetHostMode`] ends that.
    DrainHost { host: HostId, how: DrainHow, disks: OwnDisks, reason: String },
    /// The next step of emptying a host. Refused if the host is not being drained any more.
    DrainVm { vm: VmId, from: HostId, step: DrainStep },
    /// A user removes a host that is down and empty.
    RemoveHost { host: HostId },
    /// A user registers an image that a host has checked.
    CreateImage { request: Option<RequestId>, image: Box<ImageRecord> },
    /// A user deletes an image. It goes when its copies are gone.
    DeleteImage { image: ImageId },
    /// The files of an image have come, or never will.
    ImageArrived { image: ImageId, outcome: Arrival },
    /// No host has a copy of a deleted image any more.
    ForgetImage { image: ImageId },
    /// A host said Hello: its record is made or brought up to date, and it is Up.
    RegisterHost { host: Box<HostFacts> },
    /// A host's pools have changed.
    UpdatePools { host: HostId, pools: Vec<Pool> },
    /// A storage host has said how far it is with the disks of a VM.
    NoteServed { host: HostId, vm: VmId, said: Box<ServedObservation> },
    /// A host reported what VMs are.
    Report { host: HostId, reports: Vec<VmObservation> },
    /// A host runs a VM that the cluster knows nothing about.
    NoteUnknownVm { host: HostId, vm: VmId },
    /// A host's lease has surely run out (`health/` decided). Marks the host and moves up to `limit` of its VMs of
    /// the lapsed classes; those left over are found by the next pass.
    DeclareLapsed { host: HostId, lapsed: Lapsed, limit: usize },
    /// Gives hosts to VMs that should have one: pending ones, and those whose host's lease has lapsed. VMs that
    /// cannot be placed get their reason updated. At most as many as listed.
    Place { vms: Vec<VmId> },
    /// The leader grants leases of these lengths from now on (ms).
    SetLeases { fast_lease_ms: u64, patient_lease_ms: u64 },
    /// A user switches failover off for so long, or on again. While it is off leases last until its end, so the record says so
    /// before they are granted (W3).
    SetFailover { change: FailoverChange },
    /// Something about the cluster that people should know: brake, settings, leader.
    Note { event: crate::model::EventType, message: String },
}

/// How a VM leaves a host that is being drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainStep {
    /// It migrates, with this secret.
    Migrate {
        /// As in [`Command::MigrateVm`].
        secret: String,
    },
    /// It is stopped, and starts elsewhere when it has.
    Stop,
}

/// How the first fetch of an image, or its upload, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// With these files, which a host has checked.
    Complete(Vec<ImageFile>),
    /// Its files cannot be had, or are no image.
    Failed(String),
    /// The upload broke off: it is deleted.
    BrokenOff(String),
}

/// Failover for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailoverChange {
    /// Off, for so long from now.
    Off {
        /// How long, in ms.
        for_ms: u64,
        /// Why.
        reason: String,
    },
    /// On.
    On,
}

/// A start or a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerChange {
    /// It should run.
    Start,
    /// It should stop: the guest is asked.
    Stop,
    /// It should stop: it is killed.
    ForceStop,
    /// The guest should stand still.
    Pause,
    /// It should go on.
    Resume,
}

impl PowerChange {
    /// The desired state that this asks for.
    #[must_use]
    pub const fn desired(self) -> Desired {
        match self {
            Self::Start | Self::Pause | Self::Resume => Desired::Running,
            Self::Stop | Self::ForceStop => Desired::Stopped,
        }
    }
}

/// Which lease of a host has surely run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lapsed {
    /// The short one.
    Fast,
    /// Both.
    Both,
}

/// A VM to be created. Everything has been checked that can be checked without the state.
#[derive(Clone, Debug, PartialEq)]
pub struct NewVm {
    /// Minted at the edge.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub owner: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its spec, with defaults filled in and MAC addresses minted; images by name or UUID are resolved by the state.
    pub spec: VmSpec,
    /// Images that the spec names by something else than their id: where, and what was said.
    pub image_names: Vec<(ImageUse, String)>,
    /// Running or Stopped.
    pub desired: Desired,
}

/// A VM to be created like another one. Everything has been checked that can be checked without the state.
#[derive(Clone, Debug, PartialEq)]
pub struct NewClone {
    /// Minted at the edge.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Likewise minted, all different; as many as a VM may have network interfaces. Those that are not needed are nobody's.
    pub macs: Vec<String>,
}

/// What to change of a VM; what is absent stays as it is. Everything has been checked that can be checked without the state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmUpdate {
    /// The revision that the user has read. Refused if the VM's record is newer.
    pub read: Option<Revision>,
    /// All its labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// What happens when QEMU dies.
    pub restart: Option<RestartPolicy>,
    /// What happens when the host dies and takes the disks with it.
    pub on_disk_loss: Option<OnDiskLoss>,
    /// Higher starts first.
    pub priority: Option<u32>,
    /// How long the guest may take to power down, in seconds.
    pub stop_grace_seconds: Option<u32>,
    /// Virtual CPUs, from the next incarnation on, like all that follow.
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
    /// Under which lease it lives.
    pub failover: Option<Failover>,
    /// Whether it has a screen.
    pub display: Option<Display>,
    /// Whether it has a channel to a guest agent.
    pub guest_agent: Option<GuestAgent>,
    /// The CPU that the guest sees.
    pub cpu: Option<CpuModel>,
}

/// Where a spec names an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageUse {
    /// `spec.kernel.image`
    Kernel,
    /// `spec.disks[i].image`
    Disk(usize),
}

/// What a host says about itself in Hello.
#[derive(Clone, Debug, PartialEq)]
pub struct HostFacts {
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// CPU threads.
    pub vcpus: u32,
    /// Memory for VMs in MiB.
    pub memory_mib: u64,
    /// Its pools.
    pub pools: Vec<Pool>,
    /// How its guests execute.
    pub accelerator: Accelerator,
    /// Where VMs that migrate to it may be sent. Empty: none can come.
    pub migration_address: String,
    /// The CPU that its guests can have.
    pub cpu: Cpu,
    /// Its bridges that VMs may be connected to.
    pub bridges: BTreeSet<String>,
    /// Version of its agent.
    pub agent_version: String,
    /// The kernel's boot id.
    pub boot_id: Uuid,
}

/// What a host reported about one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmObservation {
    /// The VM.
    pub vm: VmId,
    /// The incarnation that this is about.
    pub incarnation: Incarnation,
    /// What it is.
    pub state: ObservedState,
    /// Why, in words.
    pub reason: String,
    /// All its disks have been made.
    pub disks_ready: bool,
    /// How QEMU last ended.
    pub last_exit: Option<LastExit>,
    /// When the agent tries again.
    pub next_attempt: Option<WallTime>,
    /// Addresses of the guest, as its guest agent says.
    pub addresses: Vec<String>,
    /// The newest restart counter that the agent has carried out. A guest that powered itself off while a restart was
    /// on its way is not off for good: the agent starts it again when the counter arrives.
    pub restarts_done: u64,
    /// How a migration goes, by this side of it.
    pub migration: Option<MigrationObservation>,
    /// The guest stands still, as it should.
    pub paused: bool,
    /// What was done to its disks.
    pub disks: DisksObservation,
}

/// A disk that a VM is to have: a new one, or one of its own that was detached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskToAttach {
    /// Of a new disk. Random (version 4).
    pub id: Uuid,
    /// Its name. `None`: one that is free.
    pub name: Option<String>,
    /// The pool that a new one lies in. `None`: the default one.
    pub pool: Option<String>,
    /// The size of a new one. 0: it is not a new one.
    pub size_bytes: u64,
    /// How the guest sees it. `None`: on the bus SCSI, or as before.
    pub bus: Option<DiskBus>,
    /// What the host's memory is used for. `None`: for nothing, or as before.
    pub cache: Option<DiskCache>,
}

/// What becomes of a disk that is detached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetachHow {
    /// It is kept.
    Keep,
    /// It is deleted.
    Delete,
}

/// What a host has done to a VM's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DisksObservation {
    /// Snapshots that are there, as they should be.
    pub made: Vec<Uuid>,
    /// What the guest did when they were taken, where that is known.
    pub guests: BTreeMap<Uuid, SnapshotGuest>,
    /// Snapshots that are gone, as they should be.
    pub removed: Vec<Uuid>,
    /// The newest revert that was carried out. 0: none.
    pub reverted: u64,
    /// Numbers of what was done to single disks.
    pub orders: Vec<u64>,
    /// Snapshots that a storage host may take now.
    pub ready: Vec<Uuid>,
    /// The hold under which the guest's file systems stand still.
    pub hold: Option<Uuid>,
    /// The newest such hold, if it lasted until nothing was to be taken any more.
    pub held: Option<Uuid>,
}

/// What a storage host said of the disks of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServedObservation {
    /// For which incarnation.
    pub incarnation: Incarnation,
    /// They are made, and served to it.
    pub served: bool,
    /// What was done to them.
    pub disks: DisksObservation,
    /// Why something was not, in words. Empty: nothing is known to be wrong.
    pub trouble: String,
}

/// What a host reported about a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationObservation {
    /// Which one, and how far it is.
    pub progress: MigrationProgress,
    /// Where the target listens. Empty for a source.
    pub address: String,
    /// Why it failed. Empty: it has not.
    pub failure: String,
    /// Where the target takes disks. Empty: nowhere.
    pub disks_address: String,
    /// The target: how many disks are copied to it. The source: how many were, up to the guest's last write (M6).
    pub disks: u32,
}

/// What a VM is on a host. Documented in `agent.proto` (`AgentVmState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "documented in agent.proto")]
pub enum ObservedState {
    Preparing,
    Starting,
    Running,
    Stopping,
    Stopped,
    PoweredOff,
    Failed,
    Fenced,
    Deleted,
    Forgotten,
    Incoming,
    Received,
    HandedOver,
}

impl ObservedState {
    /// Whether a guest may be executing.
    #[must_use]
    pub const fn executes(self) -> bool {
        match self {
            Self::Starting | Self::Running | Self::Stopping => true,
            Self::Preparing
            | Self::Stopped
            | Self::PoweredOff
            | Self::Failed
            | Self::Fenced
            | Self::Deleted
            | Self::Forgotten
            // M2, M3: neither side of a migration executes before the leader says so.
            | Self::Incoming
            | Self::Received
            | Self::HandedOver => false,
        }
    }
}

/// One key and what it becomes. `None`: it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Mutation {
    /// The key.
    pub key: Key,
    /// The record, of the kind that the key calls for.
    pub value: Option<Record>,
}

/// What a command changes. Empty: nothing, and nothing is written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// In the order in which they were decided; a key at most once.
    pub mutations: Vec<Mutation>,
}

/// What the caller is told once the change is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Done.
    Done,
    /// The VM as it is now. A replayed create gives the record as it was then.
    Vm(Arc<VmRecord>),
    /// The image.
    Image(Arc<ImageRecord>),
}

/// A decision: what to write and what to answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to write.
    pub change: Change,
    /// What to answer.
    pub answer: Answer,
    /// For an answer that was given before: the revision at which it was stored.
    pub replayed: Option<Revision>,
}

/// Why a command is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such VM.
    #[error("no VM `{0}`")]
    NoVm(String),
    /// No such host.
    #[error("no host `{0}`")]
    NoHost(String),
    /// No such image, named by this field.
    #[error("no image `{name}`")]
    NoImage {
        /// The request's field.
        field: String,
        /// What was said.
        name: String,
    },
    /// The name is taken.
    #[error("owner `{owner}` already has a VM named `{name}`; choose another name or delete that one")]
    VmNameTaken {
        /// The owner.
        owner: String,
        /// The name.
        name: String,
    },
    /// The name is taken.
    #[error("there is already an image named `{0}`")]
    ImageNameTaken(String),
    /// The name is taken by a host with another id.
    #[error("another host ({other}) is already named `{name}`; give this one another name, or remove that one")]
    HostNameTaken {
        /// The name.
        name: String,
        /// Who has it.
        other: HostId,
    },
    /// Another machine uses this host id and may be alive.
    #[error("host id {0} is in use by another machine (boot id {1}); each host needs a state directory of its own")]
    DuplicateHost(HostId, Uuid),
    /// A MAC address is taken; mint others and try again.
    #[error("MAC address {0} is taken")]
    MacTaken(String),
    /// The same request id came with another request.
    #[error("request id `{0}` was used for a different request; use a new one")]
    RequestIdReused(String),
    /// A field has a value that the state makes impossible.
    #[error("{field} {problem}")]
    Invalid {
        /// The request's field.
        field: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Somebody has changed it since the user read it.
    #[error("VM `{0}` has been changed since it was read; read it again and decide anew")]
    Outdated(String),
    /// The subject is not in a state for this; says what to do.
    #[error("{0}")]
    Precondition(String),
    /// The record in etcd cannot be read, and is left alone until a person mends it.
    #[error("the record `{0}` in etcd cannot be read; mend or remove it by hand")]
    Unreadable(String),
}
