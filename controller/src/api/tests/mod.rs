//! The services over gRPC on loopback, with a real etcd and scripted agents.

mod clusters;
mod harness;
mod hosts;
mod images;
mod streams;
mod vms;
