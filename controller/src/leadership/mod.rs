//! Who leads, and what a leader is made of.
//!
//! ```text
//!   campaign ──won──▶ catch up ──▶ lead: writer, sessions, reconciler ──validity over / write lost──▶ read the state, campaign
//!      ▲ follows while another leads                                                                  │
//!      └──────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! # Safety argument
//!
//! * **T1** A leader counts its leadership as valid only until the moment at which it *sent* the last keep-alive that was
//!   answered, plus the TTL, minus a margin ([`Validity`]). etcd lets the key go no earlier than the TTL after it
//!   *received* that keep-alive, so another leader begins only after this one has stopped counting.
//! * **T2** Every transaction compares the leader key's create revision with the term ([`LeaderToken`]): a write of a
//!   deposed leader is refused by etcd, however late it comes.
//! * **T3** When a comparison fails or an outcome is not known, the term ends and the state is read again
//!   (`writer.rs`): nothing is decided on a guess.

mod campaign;
mod copy;
mod feed;
mod follow;
mod images;
mod leader;
mod mirror;
mod token;
mod validity;
mod wake;
mod writer;

pub use campaign::{Campaign, Candidate, Elected, Keeping};
pub use copy::{CopyWatch, Stale, WarmCopy};
pub use feed::{Compacted, Feed, FeedItem, FeedStream, Lagged, ShownVm};
pub use follow::{Follower, NotCaughtUp};
pub use images::{ImageBoard, Live, Upload};
pub use leader::{Leader, LeaderSlot, NotLeader, Settings};
pub use mirror::Mirror;
pub use token::LeaderToken;
pub use validity::Validity;
pub use wake::Sleeper;
pub use writer::{Committed, NotSettled, Turn, WriteError, Writer, WriterParts};
