//! The gRPC API: one file per service. Each parses a request, calls, and maps the answer.
//!
//! Every controller serves all of it: reads and watches from its own copy, and what needs the leader is passed on to it
//! (`forward.rs`); when there is none, it answers UNAVAILABLE. Server reflection (v1 and v1alpha)
//! and `grpc.health.v1` are always there, so that `grpcurl` works with nothing else.
//!
//! `context.rs` finds the leadership, `validate/` checks requests (pure), `convert/` makes answers (pure), `error.rs` makes
//! statuses. What a request means is decided in `state/`, `scheduler/` and `sessions/`, never here.

mod agent_service;
mod cluster_service;
mod console;
mod context;
pub(crate) mod convert;
mod drain;
mod error;
mod forward;
mod host_service;
mod host_watch;
mod image_service;
mod image_watch;
mod server;
mod shared_watch;
#[cfg(test)]
mod tests;
mod upload;
pub(crate) mod validate;
mod vm_service;
mod vm_watch;
mod watch;
mod what_if;

pub(crate) use vm_service::migration_secret;

pub use server::{Error, Serving, accept, serve};
