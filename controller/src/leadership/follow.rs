//! Keeps this process's copy of the state as etcd has it, while another controller leads.
//!
//! ```text
//!   read everything ──▶ take in every change ──watch broken──▶ watch again from the newest revision
//!          ▲                                  ──history compacted, broken for long, a term of our own is over──┐
//!          └───────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! It decides nothing. Whoever wins an election has the state by then and reads nothing ([`Follower::catch_up`]).

use std::{convert::Infallible, time::Duration};

use tokio::{
    task,
    time::{self, Instant},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};
use uncloud_proto::ids::{Revision, Term};

use super::{Feed, Mirror, WarmCopy};
use crate::{
    model::{Key, Record},
    report,
    state::{State, Stored},
    store::{Error, LeaderChange, Loaded, Store},
};

/// How long to wait before etcd is asked again.
const AGAIN: Duration = Duration::from_millis(100);
/// A copy that was not kept up to date for so long is given up, and with it the watches on it: whoever watches is better off
/// with another controller. Longer than a change of etcd's leader takes.
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);
/// How long a new leader may take until it has what its predecessors wrote. It has it within milliseconds, unless this process
/// has just been started.
const CATCH_UP: Duration = Duration::from_secs(30);

/// A state of so many records is built in the task that keeps a leadership alive; a larger one takes long enough for a thread.
const AT_ONCE: usize = 1000;

/// Follows etcd.
#[derive(Debug)]
pub struct Follower {
    store: Store,
    copy: WarmCopy,
    /// What is being followed; `None`: everything is to be read.
    following: Option<Mirror>,
}

/// A new leader does not get the state.
#[derive(Debug, thiserror::Error)]
#[error("the state was not complete within {CATCH_UP:?} of the election")]
pub struct NotCaughtUp;

impl Follower {
    /// A follower that keeps `copy`.
    #[must_use]
    pub fn new(store: Store, copy: WarmCopy) -> Self {
        Self { store, copy, following: None }
    }

    /// Reads the state as it is now.
    ///
    /// # Errors
    ///
    /// When etcd does not answer.
    pub async fn load(store: &Store) -> Result<Mirror, Error> {
        Ok(Self::read(store).await?.0)
    }

    async fn read(store: &Store) -> Result<(Mirror, LeaderChange), Error> {
        let Loaded { revision, entries } = store.load().await?;
        let leader = entries.iter().find_map(leader_in).unwrap_or(LeaderChange::Gone);
        let state = if entries.len() <= AT_ONCE {
            State::of(entries, revision)
        } else {
            let building = AbortOnDropHandle::new(task::spawn_blocking(move || State::of(entries, revision)));
            building.await.map_err(|error| Error::Protocol(format!("the state could not be built: {error}")))?
        };
        for (key, error) in state.unreadable() {
            warn!(key, "a record in etcd cannot be read and is left alone: {error}");
        }
        let feed = Feed::new(store.clone(), state.revision());
        Ok((Mirror::new(state, feed), leader))
    }

    /// Follows until it is dropped. Cancel safe: another call goes on where this one was.
    pub async fn run(&mut self) -> Infallible {
        let mut broken_since: Option<Instant> = None;
        loop {
            let mirror = match self.following.clone() {
                Some(mirror) => mirror,
                None => match Self::read(&self.store).await {
                    Ok((mirror, leader)) => {
                        self.copy.put(Some(mirror.clone()));
                        self.copy.leader_changed(leader);
                        self.following = Some(mirror.clone());
                        mirror
                    }
                    Err(error) => {
                        let since = *broken_since.get_or_insert_with(Instant::now);
                        debug!("the state cannot be read: {}", report(&error));
                        // What is left of before would be answered from for ever.
                        self.give_up(since);
                        time::sleep(AGAIN).await;
                        continue;
                    }
                },
            };
            let Err(error) = self.follow(&mirror, &mut broken_since).await;
            match error {
                Error::Compacted(_) => {
                    info!("etcd has compacted what this controller has not seen yet: everything is read anew");
                    self.following = None;
                }
                Error::Unavailable(_) | Error::Timeout(_) | Error::Protocol(_) => {
                    let since = *broken_since.get_or_insert_with(Instant::now);
                    debug!("the changes in etcd cannot be followed: {}", report(&error));
                    self.give_up(since);
                    time::sleep(AGAIN).await;
                }
            }
        }
    }

    fn give_up(&mut self, broken_since: Instant) {
        if broken_since.elapsed() > GIVE_UP_AFTER && self.copy.put(None) {
            warn!("etcd could not be followed for {GIVE_UP_AFTER:?}: reads are refused until it can");
            self.following = None;
        }
    }

    async fn follow(&self, mirror: &Mirror, broken_since: &mut Option<Instant>) -> Result<Infallible, Error> {
        let newest = mirror.read(State::revision);
        let mut changes = self.store.changes(newest).await?;
        *broken_since = None;
        loop {
            let next = tokio::select! {
                biased;
                next = changes.next() => next?,
                () = self.copy.behind() => {
                    changes.give_up();
                    return Err(Error::Protocol("an etcd member tells less than the others know".into()));
                }
            };
            for logged in next {
                let leader = logged.leader.clone();
                mirror.follow(logged);
                if let Some(leader) = leader {
                    self.copy.leader_changed(leader);
                }
            }
        }
    }

    /// Goes on until everything that was written before `term` began is in the copy, and then no longer: from now on the
    /// writer of that term keeps it. Nobody else writes after that (T2), so it is the whole truth.
    ///
    /// # Errors
    ///
    /// When that takes too long.
    pub async fn catch_up(&mut self, term: Term) -> Result<Mirror, NotCaughtUp> {
        let copy = self.copy.clone();
        let caught_up = async {
            tokio::select! {
                biased;
                mirror = copy.reached(Revision(term.0)) => mirror,
                never = self.run() => match never {},
            }
        };
        let mirror = time::timeout(CATCH_UP, caught_up).await.map_err(|_| NotCaughtUp)?;
        // After the term nobody knows whether its last transaction was carried out: everything is read anew (T3).
        self.following = None;
        Ok(mirror)
    }
}

/// What this says of the leader key, if it is about that.
fn leader_in(stored: &Stored) -> Option<LeaderChange> {
    match stored {
        Stored::Record { key: Key::Leader, record: Record::Leader(leader), .. } => {
            Some(LeaderChange::Leads(Some((**leader).clone())))
        }
        Stored::Unreadable { key, .. } if *key == Key::Leader.to_string() => Some(LeaderChange::Leads(None)),
        Stored::Record { .. } | Stored::Unreadable { .. } => None,
    }
}
