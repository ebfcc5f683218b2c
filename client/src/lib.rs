//! The client of uncloud: a library for programs, and everything behind the `uncloud` command.
//!
//! [`Client`] talks to a cluster through any of its controllers: it finds the leader, tries again what may be
//! tried again, and resumes watches. `cli` is the command line on top of it, `dev` a whole cluster on one machine.
//! Nothing in here decides anything about a VM; that is the leader's.

pub mod cli;
pub mod client;
pub mod dev;
pub mod endpoints;
pub mod exit;
pub mod manifest;
pub mod output;
pub mod retry;
pub mod units;
pub mod wait;
pub mod watch;

pub use client::{Client, Options};
