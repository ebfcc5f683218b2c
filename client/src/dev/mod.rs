//! A whole cluster on this machine: for trying uncloud out, for the demonstration and for tests.
//!
//! `cluster.rs` starts and stops it, `power.rs` finds and kills the processes of a host, `story.rs` tells the story of
//! a host that is cut from power. Nothing of this is used in production.

pub mod cluster;
mod counter;
mod looker;
pub mod power;
mod process;
mod spawner;
pub mod story;
