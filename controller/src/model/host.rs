//! Hosts as they are stored. How a host's heartbeats come is never stored (`health/`).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uncloud_proto::{clock::WallTime, ids::HostId};
use uuid::Uuid;

use super::Extra;

/// A host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Made by its agent.
    pub id: HostId,
    /// Unique in the cluster.
    pub name: String,
    /// From its agent's configuration.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// CPU threads.
    pub vcpus: u32,
    /// Memory for VMs in MiB.
    pub memory_mib: u64,
    /// Its pools.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// How its guests execute.
    pub accelerator: Accelerator,
    /// Whether it takes new VMs.
    pub mode: HostMode,
    /// Why it is in this mode.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mode_reason: String,
    /// How it is being emptied, while it is.
    #[serde(default, skip_serializing_if = "DrainHow::is_live_only")]
    pub drain_how: DrainHow,
    /// What becomes of disks that only it has, while it is being emptied.
    #[serde(default, skip_serializing_if = "OwnDisks::stay")]
    pub drain_disks: OwnDisks,
    /// What the leader has declared about it.
    pub liveness: Liveness,
    /// Since when, ms since 1970.
    pub liveness_since: WallTime,
    /// Version of its agent.
    pub agent_version: String,
    /// Where VMs that migrate to it may be sent, an IP address. Empty: none can come.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub migration_address: String,
    /// The CPU that its guests can have.
    #[serde(default, skip_serializing_if = "Cpu::is_unknown")]
    pub cpu: Cpu,
    /// Its bridges that VMs may be connected to.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub bridges: BTreeSet<String>,
    /// The kernel's boot id: tells one machine from another that uses the same host id.
    pub boot_id: Uuid,
    /// When it first appeared, ms since 1970.
    pub created: WallTime,
    /// Fields of a newer program.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A pool of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// The id in the marker of a shared pool. `null`: local.
    pub shared_id: Option<Uuid>,
    /// Size in bytes.
    pub capacity_bytes: u64,
    /// What is wrong with it. Empty: nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub problem: String,
    /// How this host gets to its disks.
    #[serde(default, skip_serializing_if = "PoolAccess::is_directory")]
    pub access: PoolAccess,
}

/// How a host gets to the disks in a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolAccess {
    /// They are files of its own.
    #[default]
    Directory,
    /// Another host serves them to it.
    Network,
    /// It has the files and serves them, to itself, too.
    Exported {
        /// Where, IP:PORT.
        address: String,
    },
}

impl PoolAccess {
    /// What a record need not say.
    const fn is_directory(&self) -> bool {
        matches!(self, Self::Directory)
    }
}

/// The CPU that the guests of a host can have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// What it calls itself.
    pub name: String,
    /// Which of the features of the CPU models guests can have. Empty: not known.
    #[serde(default)]
    pub features: BTreeSet<String>,
    /// The same for CPUs that are the same in everything. Empty: not known.
    #[serde(default)]
    pub fingerprint: String,
}

impl Cpu {
    fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// How guests execute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accelerator {
    /// The kind.
    pub kind: AcceleratorKind,
    /// What the probe measured.
    pub why: String,
}

/// How guests execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceleratorKind {
    /// By the CPU.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

/// Whether a host takes new VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostMode {
    /// It does.
    Active,
    /// It does not.
    Cordoned,
    /// It does not, and is being emptied.
    Draining,
}

/// What becomes of the VMs of a host that is being emptied, where they cannot migrate live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainHow {
    /// They stay.
    #[default]
    LiveOnly,
    /// They are stopped, and started on another host.
    StopAndMove,
}

impl DrainHow {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
    const fn is_live_only(&self) -> bool {
        matches!(self, Self::LiveOnly)
    }
}

/// What becomes of disks that only a VM's host has, if somebody moves the VM while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnDisks {
    /// They stay, so the VM does.
    #[default]
    Stay,
    /// They are copied.
    Copied,
}

impl OwnDisks {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
    const fn stay(&self) -> bool {
        matches!(self, Self::Stay)
    }
}

/// What the leader has declared about a host's leases (docs/fencing.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Liveness {
    /// It may hold leases.
    Up,
    /// Its fast lease has surely run out; its patient lease may not have.
    FastLapsed,
    /// Both leases have surely run out.
    Dead,
}
