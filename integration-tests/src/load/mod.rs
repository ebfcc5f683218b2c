//! Load for the benchmarks: a control plane at full size without a single real host.
//!
//! [`site`] says which hosts and VMs there are, [`fill`] writes their records straight into etcd as the leader would have
//! written them, [`plane`] starts etcd and controllers, and [`fleet`] plays the agents: real sessions over real connections,
//! with leases that are counted. No guest executes anywhere.
//!
//! It measures nothing by itself; `uncloud-bench` does (`scale`), with [`usage`] for what a process uses.

pub mod fill;
pub mod fleet;
pub mod plane;
mod played;
pub mod site;
pub mod usage;

pub use fleet::Fleet;
pub use plane::Plane;
pub use site::Site;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Each played agent has a connection: so many file descriptors are wanted, here and in the controller, which inherits the limit.
const DESCRIPTORS: u64 = 65_536;

/// Raises this process's limit on file descriptors, as far as it may. Returns what it is now.
///
/// # Errors
///
/// The kernel refuses what it promised.
pub fn raise_descriptors() -> anyhow::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    // Root may raise what others may only use up.
    let both = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    if limit.maximum.is_some_and(|max| max < DESCRIPTORS) && setrlimit(Resource::Nofile, both).is_ok() {
        return Ok(DESCRIPTORS);
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        .context("raise the limit on file descriptors")?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}
