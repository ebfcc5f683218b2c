//! Faults of all kinds on real processes, and what they did to the guests.
//!
//! A [`stage::Stage`] is a cluster of three controllers and three members of etcd with a few guests on it. [`faults`] breaks
//! and mends it. A [`user::User`] creates, stops, starts, migrates, deletes and drains all the time, and remembers
//! what was acknowledged. [`run`](run::run) does this from a seed and ends with a [`report::Report`]; [`trials`] repeats one fault and
//! measures. What became of a guest is told by the process table, its console and its disk, never by uncloud.

pub mod drains;
pub mod faults;
pub mod kind;
pub mod report;
pub mod run;
pub mod stage;
pub mod trials;
pub mod user;
