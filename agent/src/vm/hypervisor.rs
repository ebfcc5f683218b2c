//! What a VM needs of its host: disks, and a process that executes it.
//!
//! The one real implementation is in [`super::qemu`]. Tests, and a simulation, put their own below this trait; the
//! runner and everything above it do not know the difference.

use std::{fmt, future::Future};

use uncloud_proto::{
    clock::WallTime,
    ids::{Incarnation, VmId},
};

use super::{
    desired::Desired,
    disks::Done,
    migration::{Copies, Standing, Step},
};

/// What VMs need of their host.
pub trait Hypervisor: Send + Sync + 'static {
    /// A VM that executes.
    type Instance: Instance;
    /// What a start needs besides the desired state: paths, and the turn in the queue of starts.
    type Prepared: Send + 'static;

    /// Fetches images, waits for a turn and makes the disks that are missing. Idempotent; may be dropped at any time.
    /// The error is a reason for people.
    fn prepare(&self, vm: VmId, desired: &Desired) -> impl Future<Output = Result<Self::Prepared, String>> + Send;

    /// Waits until there is something else than `last` to say of how far a preparation is. Cancel safe.
    fn progress(&self, vm: VmId, last: &str) -> impl Future<Output = String> + Send {
        let _ = (vm, last);
        std::future::pending()
    }

    /// Starts QEMU under a keeper that is bound to `lease_generation`. If the VM is to come from another host, its guest does
    /// not execute.
    fn launch(
        &self,
        vm: VmId,
        desired: &Desired,
        prepared: Self::Prepared,
        lease_generation: u16,
    ) -> impl Future<Output = Result<Self::Instance, LaunchError>> + Send;

    /// Looks for what executes. Bounded in time.
    fn adopt(&self, vm: VmId) -> impl Future<Output = Adoption<Self::Instance>> + Send;

    /// Has QEMU take a step of a migration. Bounded in time; what came of it is seen by [`Instance::standing`].
    fn step(&self, vm: VmId, instance: &Self::Instance, step: Step) -> impl Future<Output = Result<(), String>> + Send;

    /// Makes the disks of a VM that executes as its desired state says: which it has, their sizes, their snapshots. Bounded in time; idempotent.
    /// The error is a reason for people.
    fn tend_disks(
        &self,
        vm: VmId,
        instance: &Self::Instance,
        desired: &Desired,
    ) -> impl Future<Output = Result<Done, String>> + Send {
        let _ = (vm, instance);
        std::future::ready(Ok(desired.orders.done()))
    }

    /// The same for a VM that does not execute: takes, removes and puts back snapshots. May be dropped at any time, and then does
    /// nothing more.
    fn tend_idle(&self, vm: VmId, desired: &Desired) -> impl Future<Output = Result<Done, String>> + Send {
        let _ = vm;
        std::future::ready(Ok(desired.orders.done()))
    }

    /// Lets a guest go on that QEMU holds still because a pool is full, if there is room by now. Bounded in time. The error is a
    /// reason for people.
    fn go_on(&self, instance: &Self::Instance, desired: &Desired) -> impl Future<Output = Result<Hold, String>> + Send {
        let _ = (instance, desired);
        std::future::ready(Ok(Hold::Over))
    }

    /// Deletes the disks of this VM that its spec names, and nothing else. Idempotent. The error is a reason for people.
    fn delete_disks(&self, vm: VmId, desired: &Desired) -> impl Future<Output = Result<(), String>> + Send;
}

/// A VM that executes. Dropping it leaves it executing.
pub trait Instance: Send + Sync + 'static {
    /// Its incarnation.
    fn incarnation(&self) -> Incarnation;
    /// The lease generation that its keeper watches.
    fn lease_generation(&self) -> u16;
    /// Process id of QEMU, for people.
    fn pid(&self) -> u32;
    /// Asks the guest to power down.
    fn power_down(&self) -> impl Future<Output = Result<(), String>> + Send;
    /// Resets the machine.
    fn reset(&self) -> impl Future<Output = Result<(), String>> + Send;
    /// Tells QEMU to end.
    fn quit(&self) -> impl Future<Output = Result<(), String>> + Send;
    /// How it stands with its guest and its migration.
    fn standing(&self, copies: Copies) -> impl Future<Output = Result<Standing, String>> + Send;
    /// SIGKILL.
    fn kill(&self);
    /// The next thing that happens to it. Cancel safe. After `Ended` it pends for ever.
    fn next_event(&mut self) -> impl Future<Output = InstanceEvent> + Send;
}

/// Whether a guest is still held still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It is not.
    Over,
    /// It is: this pool is full.
    Full(String),
}

/// What happens to a VM that executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceEvent {
    /// The guest powered itself off; QEMU waits.
    GuestShutdown,
    /// The guest panicked; QEMU waits.
    GuestPanicked,
    /// The machine was reset.
    GuestReset,
    /// The guest has said which addresses it has.
    GuestAddresses(Vec<String>),
    /// Its migration is further, or over.
    MigrationMoved,
    /// A disk's pool is full, and QEMU holds the guest still.
    Stalled,
    /// A disk could not be read or written, and the guest was told so. What and why, in words.
    DiskFailed(String),
    /// QEMU and its keeper are gone.
    Ended(Exit),
}

/// What was found when looking for a VM that executes.
#[derive(Debug)]
pub enum Adoption<I> {
    /// It executes.
    Running(I),
    /// It does not; this is how it ended.
    Ended(Exit),
    /// It does not, and nothing says that it ever did.
    Never,
}

/// How QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The incarnation that ended.
    pub incarnation: Incarnation,
    /// How.
    pub kind: ExitKind,
    /// When it was noticed.
    pub at: WallTime,
    /// The end of what QEMU wrote.
    pub last_words: String,
}

/// How QEMU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// The keeper refused to start it because of the lease.
    Fenced,
    /// The keeper or QEMU could not be started.
    NotStarted,
    /// The keeper was killed, and took QEMU with it.
    KeeperKilled,
}

impl fmt::Display for ExitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "QEMU ended with exit status {code}"),
            Self::Signaled(signal) => write!(f, "QEMU was killed by signal {signal}"),
            Self::Fenced => f.write_str("the start was refused because the host's lease had run out"),
            Self::NotStarted => f.write_str("QEMU could not be started"),
            Self::KeeperKilled => f.write_str("QEMU's keeper was killed, and QEMU with it"),
        }
    }
}

/// Why a start did not come about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchError {
    /// The keeper refused because of the lease.
    Fenced,
    /// Another keeper holds this VM.
    Busy,
    /// Anything else, in words.
    Failed(String),
}
