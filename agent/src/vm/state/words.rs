//! What a VM's state machine hears, and what it has done. Data only.

use uncloud_proto::ids::Incarnation;

use super::Acceptance;
use crate::vm::{
    desired::Desired,
    disks::Done,
    hypervisor::{Exit, Hold},
    migration::Standing,
};

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// What it should be, by the leader. The gate has let it pass.
    Desired(Box<Desired>, Acceptance),
    /// The session ended; the lease of this VM's class had this generation then.
    SessionEnded(u16),
    /// The lease began a new generation, or some time passed.
    Wake,
    /// How far its image is, in words.
    Progress(String),
    /// Its image and disks are there.
    Prepared,
    /// They are not. In words.
    PrepareFailed(String),
    /// QEMU runs. Its incarnation and the lease generation that its keeper watches.
    Started(Incarnation, u16),
    /// QEMU could not be started. In words.
    StartFailed(String),
    /// The keeper refused the start, because the lease had run out or had a new generation.
    StartFenced,
    /// Another keeper holds this VM: look at what executes.
    StartBusy,
    /// Nothing executes; what is known about how it ended.
    NotFound(Option<Exit>),
    /// The guest powered itself off; QEMU waits.
    GuestShutdown,
    /// The guest panicked; QEMU waits.
    GuestPanicked,
    /// The guest has said which addresses it has.
    GuestAddresses(Vec<String>),
    /// Its migration is further, or over.
    MigrationMoved,
    /// How QEMU stands with its migration. `None`: it does not say.
    Stands(Option<Box<Standing>>),
    /// QEMU did not take a step of a migration. In words.
    StepFailed(String),
    /// Its disks are as they should be.
    DisksTended(Done),
    /// They are not. In words.
    TendFailed(String),
    /// A disk's pool is full, and QEMU holds the guest still.
    Stalled,
    /// What came of letting it go on.
    Held(Result<Hold, String>),
    /// A disk could not be read or written. In words.
    DiskFailed(String),
    /// QEMU and its keeper are gone.
    Ended(Exit),
    /// Its disks are gone.
    DisksDeleted,
    /// They could not be deleted. In words.
    DeleteFailed(String),
    /// The record could not be written, in words, and what was not done because of that.
    PersistFailed(String, Skipped),
}

/// What was to follow a record that could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// Nothing that needs it. What was under way before goes on, and will be answered.
    Nothing,
    /// The work that was to begin has not been begun.
    Work,
}

impl Skipped {
    /// What is left out of these effects.
    #[must_use]
    pub fn of(effects: &[Effect]) -> Self {
        if effects.iter().any(|e| e.needs_record()) { Self::Work } else { Self::Nothing }
    }
}

/// What the runner must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write the record to disk.
    Persist,
    /// Fetch images, wait for a turn, make disks. Answer: `Prepared` or `PrepareFailed`.
    Prepare,
    /// Give up preparing. No answer.
    CancelPrepare,
    /// Start QEMU, bound to this lease generation. Answer: `Started`, `StartFailed`, `StartFenced` or `StartBusy`.
    Launch {
        /// The incarnation.
        incarnation: Incarnation,
        /// The lease generation.
        lease_generation: u16,
    },
    /// Look for what executes. Answer: `Started` or `NotFound`.
    Adopt,
    /// Ask the guest to power down.
    PowerDown,
    /// Reset the machine.
    Reset,
    /// Ask QEMU how it stands with its migration. Answer: `Stands`.
    Look,
    /// The target of a migration: let QEMU take a connection.
    Listen,
    /// The source: let QEMU send the guest to where the desired state says.
    Send,
    /// The source, whose disks have been copied: let QEMU send the guest.
    SendMemory,
    /// The source: send the last of it.
    Continue,
    /// The source: give the migration up. The guest goes on.
    Cancel,
    /// Let a guest go on that stands still.
    Resume,
    /// Let a guest stand still.
    Pause,
    /// Make the disks of what executes as the desired state says. Answer: `DisksTended` or `TendFailed`.
    TendDisks,
    /// The same for disks that nobody has open, as long as the lease has this generation. Answer: likewise.
    TendIdle {
        /// The lease generation.
        lease_generation: u16,
    },
    /// Give that up, at once. No answer.
    CancelTend,
    /// Let a guest go on that is held still because its pool is full, if there is room. Answer: `Held`.
    GoOn,
    /// Tell QEMU to end.
    Quit,
    /// SIGKILL.
    Kill,
    /// Delete this VM's disks, or those that are void here (M7). Answer: `DisksDeleted` or `DeleteFailed`.
    DeleteDisks,
}

impl Effect {
    /// Whether it may be carried out only when the record is on disk. The others end something or ask, which is always safe.
    #[must_use]
    pub const fn needs_record(self) -> bool {
        match self {
            Self::Prepare | Self::Launch { .. } | Self::DeleteDisks => true,
            Self::Listen
            | Self::Send
            | Self::SendMemory
            | Self::Continue
            | Self::Cancel
            | Self::Resume
            | Self::Pause => true,
            Self::TendDisks | Self::TendIdle { .. } => true,
            Self::CancelTend => false,
            // Nothing of it is remembered: QEMU says whether it is held still.
            Self::GoOn => false,
            Self::Look => false,
            Self::Persist | Self::CancelPrepare | Self::Adopt => false,
            Self::PowerDown | Self::Reset | Self::Quit | Self::Kill => false,
        }
    }
}
