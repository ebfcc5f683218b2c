//! The agents' sessions: what each is told, what it reports, and when its heartbeats are answered.

pub mod registry;

pub use registry::SessionRegistry;
