//! The keeper, the lease and QEMU as real processes: what `docs/fencing.md` promises of one host.
//!
//! Every test has a directory and a VM of its own, so they run side by side. Times that are asserted are from one clock,
//! the one that the kernel's timer uses.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod console;
mod fencing;
mod life;
mod migration;
mod mirror;
mod support;
