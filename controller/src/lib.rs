//! The controller: keeps the cluster's state in etcd, schedules VMs onto hosts, grants host leases and talks to
//! agents. One replica leads (`leadership/`); only it writes (`store/`).

pub mod api;
pub mod app;
pub mod config;
pub mod health;
pub mod leadership;
pub mod metrics;
pub mod model;
mod pieces;
pub mod reconcile;
pub mod scheduler;
pub mod sessions;
pub mod state;
pub mod store;

/// An error with the whole chain of its causes, on one line: `etcd did not answer: connection refused`.
#[must_use]
pub fn report(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
