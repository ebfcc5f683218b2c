//! The controller: keeps the cluster's state in etcd, schedules VMs onto hosts, grants host leases and talks to
//! agents. One replica leads (`leadership/`); only it writes (`store/`).

pub mod api;
pub mod app;
pub mod config;
pub mod health;
pub mod leadership;
pub mod model;
pub mod reconcile;
pub mod scheduler;
pub mod sessions;
pub mod state;
pub mod store;
