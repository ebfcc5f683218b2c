//! The cluster in memory.

pub mod command;
