//! The agent: one on each host. It keeps the host's lease, makes this host's VMs what the leader wants them to
//! be, and reports what they are. Each VM is a QEMU process whose parent is a keeper (see [`keeper`]).

pub mod accelerator;
pub mod app;
pub mod config;
pub mod host;
pub mod keeper;
pub mod lease;
pub mod network;
pub mod qemu;
pub mod records;
pub mod session;
pub mod storage;
pub mod vm;
