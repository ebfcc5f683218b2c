//! Tests of the state, rule by rule, and a random one over all rules. After every change the copy in memory is compared
//! with one that is rebuilt from the records.

mod attach;
mod clone;
mod disks;
mod drain;
mod exports;
mod failover;
mod fixtures;
mod hosts;
mod images;
mod migration;
mod properties;
mod reports;
mod simulate;
mod snapshots;
mod unreadable;
mod update;
mod vms;
