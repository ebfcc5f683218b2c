//! The session with the leader: it keeps the lease, brings what VMs should be, and takes what they are.
//!
//! [`gate`], [`heartbeat`] and [`outbox`] decide (pure); [`connect`] finds the leader, [`pump`] moves messages,
//! [`streams`] carries consoles and logs.

pub mod connect;
pub mod dialer;
pub mod gate;
pub mod heartbeat;
mod orders;
pub mod outbox;
pub mod pump;
pub mod serving;
pub mod streams;

#[cfg(test)]
mod tests;
