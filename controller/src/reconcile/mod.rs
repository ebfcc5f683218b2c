//! Brings the cluster towards what users asked for, as long as this controller leads.
//!
//! `drain.rs` says which VM leaves a host that is being emptied (pure), `migrations.rs` finds migrations that cannot go on (pure), `plan.rs` compares what should be with what is (pure), `driver.rs` has the plan carried out through the writer. It
//! declares hosts whose leases have surely run out, and gives hosts to VMs that have none or whose host is lost. It
//! talks to no agent: sessions see what was stored and tell theirs.

pub mod drain;
pub mod driver;
mod history;
pub(crate) mod images;
pub mod migrations;
pub mod plan;

#[cfg(test)]
mod tests;
