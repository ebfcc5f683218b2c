//! The keeper: a small process of one thread that is the parent of one VM's QEMU, and what makes the host's lease bite
//! when the agent is dead, stopped or hung and when the keeper itself cannot run.
//!
//! The binary `uncloud-keeper` calls [`main`]. It must stay tiny, because each VM has one: nothing here may pull in an
//! async runtime, a serializer or an argument parser.
//!
//! # Safety argument
//!
//! * **K1** Before QEMU is started, a kernel timer is armed *on the keeper itself*: at the deadline of the host's lease the
//!   kernel kills the keeper with SIGKILL. No process needs to run for that; a stopped or frozen keeper dies, too.
//! * **K2** QEMU has a death signal of SIGKILL: when its keeper ends, for whatever reason, the kernel kills QEMU. The signal
//!   is bound to the thread that forked (there is one thread), a change of user clears it (privileges are dropped before),
//!   and a keeper that died before the signal was set is noticed by the child (`getppid`).
//! * **K3** The timer is moved only to a later deadline of *the lease under which this VM was started* (its generation). A lease
//!   that lapsed and was granted anew has another generation, so a delayed start under the old one is refused.
//! * **K4** The keeper and QEMU hold one lock on the VM's directory. As long as either lives, a second keeper of the same VM
//!   on this host is refused.

mod arguments;
mod records;
mod run;
pub(crate) mod sys;

pub use arguments::{Arguments, BadArguments, User};
pub use records::files;
#[cfg(test)]
pub(crate) use records::record_samples;
pub(crate) use run::start_of;
pub use run::{main, renewal, wake_in};

/// QEMU ran and has ended; `exit.json` says how.
pub const EXIT_DONE: u8 = 0;
/// The command line is wrong.
pub const EXIT_USAGE: u8 = 64;
/// Something that is needed cannot be had; `exit.json` and `qemu.log` say what.
pub const EXIT_CANNOT_START: u8 = 71;
/// Another keeper, or its QEMU, has this VM.
pub const EXIT_BUSY: u8 = 73;
/// The host's lease is over, or is not the one under which the start was decided.
pub const EXIT_FENCED: u8 = 75;
