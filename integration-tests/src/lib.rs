//! The harness of the tests that use real etcd, real controllers and agents, and real QEMU.
//!
//! A test describes the [`cluster::Cluster`] that it wants and gets one of its own: an etcd on a picked port, a controller,
//! hosts with their own state directories. It then kills, stops, cuts off and starts parts of it. Meanwhile the
//! [`checker::Checker`] watches the process table and the guests' serial logs for two copies of a VM and for counters that
//! jump. A test ends with `cluster.finish()`, which judges; one that ends otherwise keeps its directory and says where it is.
//!
//! Nothing in here is used by uncloud itself.

pub mod agent;
pub mod api;
pub mod chaos;
pub mod checker;
pub mod cli;
pub mod cluster;
pub mod control_plane;
pub mod controller;
pub mod etcd;
pub mod guest;
pub mod listing;
pub mod load;
pub mod logs;
pub mod migration;
pub mod netns;
pub mod netsim;
pub mod paths;
pub mod ports;
pub mod proc_table;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod refusal;
pub mod sim;
pub mod site;
pub mod slots;
pub mod small_pool;
pub mod specs;
pub mod tour;
pub mod typed;
pub mod wait;

pub use api::{Api, error_fields};
pub use checker::Checker;
pub use cluster::{Cluster, Options};
pub use process::Signal;
pub use wait::wait_for;

/// What nearly every test needs.
pub mod prelude {
    pub use std::time::{Duration, Instant};

    pub use anyhow::{Context as _, bail, ensure};
    pub use tonic::Code;
    pub use uncloud_proto::v1;

    pub use crate::{Cluster, Options, Signal, specs, wait_for};

    /// So many seconds.
    #[must_use]
    pub const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }
}
