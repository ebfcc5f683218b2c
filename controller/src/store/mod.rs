//! The store: etcd, through its real client. Reads, transactions that prove leadership, leases, history.
//!
//! It decides nothing: what is written comes from `state/` by way of `leadership/writer.rs`. Every call has a time
//! limit, because the client alone would wait for ever on an etcd that hangs.

pub mod embedded;
mod events;
mod history;
mod leases;
mod load;
mod members;
mod txn;

use std::{fmt, time::Duration};

use etcd_client::{Client, KvClient};
use members::Members;

pub use history::{LeaderChange, Logged};
pub use leases::{Retention, RetentionLeases};
pub use load::{Loaded, StoredEvent};
pub(crate) use txn::{Claim, Write};
pub use txn::{CommitError, MAX_OPERATIONS};

/// How long one request to etcd may take. Longer than etcd's own election (about 1 s), shorter than a host's lease.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// How long making a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long reading one page of the state may take.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer that is taken from etcd: a page of the state.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// etcd did not answer, or with an error.
    #[error("etcd did not answer")]
    Unavailable(#[source] Box<etcd_client::Error>),
    /// It took too long.
    #[error("etcd did not answer within {0:?}")]
    Timeout(Duration),
    /// The answer makes no sense.
    #[error("etcd's answer cannot be used: {0}")]
    Protocol(String),
    /// The history that was asked for has been compacted.
    #[error("the history before revision {0} has been compacted")]
    Compacted(i64),
}

impl From<etcd_client::Error> for Error {
    fn from(error: etcd_client::Error) -> Self {
        Self::Unavailable(Box::new(error))
    }
}

/// A connection to the etcd cluster. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    members: Members,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Prepares connections: an etcd that is down now is tried again at each request.
    ///
    /// # Errors
    ///
    /// When an endpoint is not a URL, or there is none.
    pub async fn connect(endpoints: &[String]) -> Result<Self, Error> {
        Ok(Self { members: Members::connect(endpoints, rand::random::<u16>().into()).await? })
    }

    /// With connections that were made elsewhere, one client for each member; the first is asked first.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn from_clients(clients: Vec<Client>) -> Result<Self, Error> {
        Ok(Self { members: Members::new(clients, 0)? })
    }

    /// The client itself, for what only tests need.
    #[must_use]
    pub fn client(&self) -> Client {
        self.members.current().client
    }
}

fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES)
}
