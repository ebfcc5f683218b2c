//! The agents' sessions: what each is told, what it reports, and when its heartbeats are answered.
//!
//! ```text
//!   agent ══ one stream ══ stream.rs ── rules.rs, desired.rs, parse.rs (pure)
//!                             │  └───── health/ (leases), leadership/ (writer, mirror)
//!                          registry.rs ── api/ asks hosts about files and for byte streams
//! ```
//!
//! It decides nothing about where VMs go or when a host is dead: that is `scheduler/`, `health/` and `reconcile/`.

pub mod arrivals;
pub mod desired;
mod job;
mod outgoing;
pub mod parse;
pub mod registry;
pub mod rules;
pub mod serving;
mod stream;

pub(crate) use outgoing::{Item, QUEUE};
pub use registry::{AskError, Fetched, Fetching, LiveFacts, PIECES, Pipe, SessionRegistry};
pub(crate) use stream::{Waiting, run};
