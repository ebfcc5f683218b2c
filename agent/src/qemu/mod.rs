//! QEMU: how it is called, started, found again, asked and watched.
//!
//! [`command_line`] is pure; [`process`] starts a VM under a keeper or finds it again and gives an
//! [`Instance`](process::Instance); [`qmp`] speaks with it; [`console`] is its serial
//! console; [`migration`] moves a VM to another host. What a VM *should* be is not known here.

pub mod command_line;
pub mod console;
pub mod disks;
mod files;
mod guest_agent;
pub mod hotplug;
mod instance;
pub mod migration;
mod pidfd;
pub mod process;
pub mod qmp;
pub mod screen;
pub mod seed;
