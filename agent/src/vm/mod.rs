//! The VMs of this host: what they should be, what they are, and what is done about the difference.
//!
//! [`state`] decides (pure), [`runner`] acts for one VM, [`manager`] knows them all, [`hypervisor`] is what they
//! need of the host.

pub mod backoff;
pub mod desired;
pub mod disks;
pub mod hypervisor;
pub mod mailbox;
pub mod manager;
pub mod migration;
pub mod qemu;
pub mod runner;
pub mod starts;
pub mod state;

#[cfg(test)]
pub(crate) mod fake;
