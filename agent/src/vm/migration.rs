//! What a live migration is to the VM's task: where to send a VM, the steps that QEMU is told to take, and what QEMU says
//! of itself. Data only; `state/migrate.rs` decides, `qemu/migration.rs` acts.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use uncloud_proto::ids::Incarnation;

/// Where to send a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateTo {
    /// The incarnation that it has there: no two migrations have the same.
    pub incarnation: Incarnation,
    /// Where the target listens.
    pub address: SocketAddr,
    /// What the target knows, too: 64 hexadecimal digits.
    pub secret: String,
    /// The most that may be sent. 0: no limit.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Where its disks are to be copied to first. `None`: both hosts share them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DisksTo>,
}

/// Where the disks of a VM are to be copied to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisksTo {
    /// Where the target takes them.
    pub address: SocketAddr,
    /// Which.
    #[serde(default)]
    pub nodes: Nodes,
}

/// The block nodes of a machine's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// Of those that are copied when it migrates.
    pub copied: Vec<String>,
    /// Of the others: both hosts have them.
    pub shared: Vec<String>,
}

/// How far the copying of a guest's disks is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Mirror {
    /// None is copied, and nothing is left of a copying.
    #[default]
    None,
    /// They are being copied.
    Copying,
    /// This many disks, all that are being copied, have been copied, and what is written since is copied behind it.
    Ready(usize),
    /// Copying one failed, in QEMU's words.
    Failed(String),
}

/// Whether disks of a guest may be on their way to another host. QEMU is asked about that while the guest stands still, so where there are
/// none it is not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// None are.
    None,
    /// Some may be.
    Possible,
}

/// A step of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The target: take a connection from whoever knows this secret.
    Listen {
        /// 64 hexadecimal digits.
        secret: String,
        /// The disks that are copied to it before the guest comes.
        disks: Nodes,
    },
    /// The source: send the guest, and stop before the last of it; or begin to copy its disks, if they are to be copied.
    Send(MigrateTo),
    /// The source, whose disks have been copied: send the guest, and stop before the last of it.
    SendMemory(MigrateTo),
    /// The source, which stands still before the last of it: end the copying of its disks, and send that, too.
    Continue(Copies),
    /// The source: give it up. The guest goes on here.
    Cancel,
    /// A guest that stands still goes on.
    Resume,
    /// A guest stands still.
    Pause,
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It executes.
    Executes,
    /// QEMU waits for it (`inmigrate`).
    Awaited,
    /// It stands still, because it was sent (`postmigrate`).
    Sent,
    /// It stands still.
    Still,
    /// It powered itself off.
    Off,
    /// It panicked.
    Panicked,
}

/// How far QEMU's newest migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// There never was one.
    None,
    /// Memory is being sent.
    Active,
    /// Everything but the last is sent, and the guest stands still (`pre-switchover`).
    Ready,
    /// The last is being sent, or waits to be acknowledged (`device`).
    Last,
    /// All was sent, and the target has acknowledged it.
    Completed,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// It is being cancelled.
    Cancelling,
}

/// What QEMU says of itself and its migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What the guest does.
    pub guest: Guest,
    /// How far the migration is.
    pub transfer: Transfer,
    /// Where it listens, if it does.
    pub address: Option<SocketAddr>,
    /// Where it takes disks, if it does.
    pub disks_address: Option<SocketAddr>,
    /// How far the copying of its disks is.
    pub mirror: Mirror,
    /// How much was sent.
    pub progress: Progress,
    /// What went wrong, in QEMU's words. Empty: nothing.
    pub problem: String,
}

/// How much of a guest was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were sent.
    pub transferred_bytes: u64,
    /// Bytes that are left.
    pub remaining_bytes: u64,
    /// How fast.
    pub bytes_per_second: u64,
    /// How long the guest would stand still now, as QEMU expects.
    pub expected_downtime_ms: u32,
}
