//! etcd leases: the one under which a leader holds its key, and those under which answers and events go away.
//!
//! An etcd lease decides nothing about a VM: its TTL is a minimum that starts again when etcd's leader changes.

use std::time::Duration;

use uncloud_proto::clock::Tick;

use super::{
    Error, REQUEST_TIMEOUT, Store,
    members::{Member, Members, limited},
};

/// How long one member may take to keep a lease alive. A leadership is valid for 1.5 s from the last keep-alive that was
/// answered, and one is sent every 0.5 s: so two more members can be asked in time.
const KEEP_ALIVE_WITHIN: Duration = Duration::from_millis(450);

/// What goes away by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Answers to requests: an hour.
    Requests,
    /// Events: a week.
    Events,
}

impl Retention {
    /// For how long it is kept at least.
    const fn kept(self) -> Duration {
        match self {
            Self::Requests => Duration::from_secs(3600),
            Self::Events => Duration::from_secs(7 * 24 * 3600),
        }
    }

    /// For how long one etcd lease takes new keys: so leases are few, and a key is kept at most this much longer.
    const fn bucket(self) -> Duration {
        match self {
            Self::Requests => Duration::from_secs(600),
            Self::Events => Duration::from_secs(6 * 3600),
        }
    }
}

/// The leases that new keys are put under.
#[derive(Clone, Copy, Debug)]
pub struct RetentionLeases {
    requests: (i64, Tick),
    events: (i64, Tick),
}

impl RetentionLeases {
    /// Id of the etcd lease for keys of this kind.
    #[must_use]
    pub const fn id(&self, retention: Retention) -> i64 {
        match retention {
            Retention::Requests => self.requests.0,
            Retention::Events => self.events.0,
        }
    }

    /// Whether a lease has taken keys for long enough.
    #[must_use]
    pub fn stale(&self, now: Tick) -> bool {
        now.since(self.requests.1) >= Retention::Requests.bucket()
            || now.since(self.events.1) >= Retention::Events.bucket()
    }
}

impl Store {
    /// Gets leases for new keys; those of `before` that still take keys are kept.
    ///
    /// # Errors
    ///
    /// When etcd does not answer.
    pub async fn retention_leases(&self, now: Tick, before: Option<RetentionLeases>) -> Result<RetentionLeases, Error> {
        let requests = self.retention_lease(Retention::Requests, now, before.map(|b| b.requests)).await?;
        let events = self.retention_lease(Retention::Events, now, before.map(|b| b.events)).await?;
        Ok(RetentionLeases { requests, events })
    }

    async fn retention_lease(
        &self,
        retention: Retention,
        now: Tick,
        before: Option<(i64, Tick)>,
    ) -> Result<(i64, Tick), Error> {
        match before {
            Some(lease) if now.since(lease.1) < retention.bucket() => Ok(lease),
            Some(_) | None => Ok((self.grant(retention.kept() + retention.bucket()).await?.id, now)),
        }
    }

    /// Grants an etcd lease.
    pub(crate) async fn grant(&self, ttl: Duration) -> Result<Granted, Error> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        // One that was granted and whose answer was lost runs out by itself.
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        let lease =
            self.members.ask(limit, |client| async move { client.lease_client().grant(seconds, None).await }).await?;
        Ok(Granted { id: lease.id(), ttl: Duration::from_secs(u64::try_from(lease.ttl()).unwrap_or(0)) })
    }

    /// Gives an etcd lease back; its keys go.
    pub(crate) async fn revoke(&self, lease: i64) -> Result<(), Error> {
        let limit = self.members.attempt(REQUEST_TIMEOUT);
        self.members.ask(limit, |client| async move { client.lease_client().revoke(lease).await }).await?;
        Ok(())
    }

    /// Opens a stream on which an etcd lease is kept alive.
    pub(crate) async fn keep_alive(&self, lease: i64) -> Result<KeepAlive, Error> {
        let member = self.members.current();
        let mut client = member.client.lease_client();
        // Opening the stream sends a first keep-alive whose answer the client takes for itself.
        match limited(KEEP_ALIVE_WITHIN, client.keep_alive(lease)).await {
            Ok((keeper, stream)) => Ok(KeepAlive { keeper, stream, member, members: self.members.clone() }),
            Err(error) => {
                self.members.failed(&member);
                Err(error)
            }
        }
    }
}

/// An etcd lease that was granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted {
    pub(crate) id: i64,
    pub(crate) ttl: Duration,
}

/// A stream on which an etcd lease is kept alive.
pub(crate) struct KeepAlive {
    keeper: etcd_client::LeaseKeeper,
    stream: etcd_client::LeaseKeepAliveStream,
    member: Member,
    members: Members,
}

impl KeepAlive {
    /// Keeps it alive once more. Returns the TTL that it has again; zero: it is gone.
    /// After an error this stream is of no use any more: a late answer would be taken for the next one's.
    pub(crate) async fn renew(&mut self) -> Result<Duration, Error> {
        let answer = async {
            self.keeper.keep_alive().await?;
            self.stream.message().await
        };
        let answer = match limited(KEEP_ALIVE_WITHIN, answer).await {
            Ok(Some(answer)) => Ok(Duration::from_secs(u64::try_from(answer.ttl()).unwrap_or(0))),
            Ok(None) => Err(Error::Protocol("the keep-alive stream ended".into())),
            Err(error) => Err(error),
        };
        if answer.is_err() {
            self.members.failed(&self.member);
        }
        answer
    }
}
