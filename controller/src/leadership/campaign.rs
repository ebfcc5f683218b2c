//! Becoming the leader, and staying it.
//!
//! It knows nothing of what a leader does: `app.rs` is handed an [`Elected`] and gives it back when the term is over.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uncloud_proto::{
    clock::Clock,
    ids::{ControllerId, Term},
};

use super::{LeaderToken, Validity};
use crate::{
    model::{Extra, Key, LeaderRecord, Record},
    report,
    store::{Error, Store},
};

/// TTL of the leader key: how long the cluster is without a leader after one has died. etcd grants no less than this.
const TTL: Duration = Duration::from_secs(2);
/// How often it is kept alive: three may be lost.
const KEEP_ALIVE_EVERY: Duration = Duration::from_millis(500);
/// How soon the next member of etcd is asked to keep it alive when one has not.
const NEXT_MEMBER_AFTER: Duration = Duration::from_millis(20);
/// How often a candidate looks whether the key is free.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a candidate waits after etcd gave no answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Who stands for election.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// This process.
    pub id: ControllerId,
    /// Where it serves.
    pub address: String,
    /// The process that had this one's data directory before. It is surely dead, because the directory is locked; so
    /// its leader key need not run out by itself, which after a restart of etcd would take a whole TTL and more. `None` with
    /// an etcd that others use, too.
    pub predecessor: Option<ControllerId>,
}

/// Stands for election again and again.
#[derive(Debug)]
pub struct Campaign {
    store: Store,
    clock: Clock,
    candidate: Candidate,
    /// Told when the leader key is gone, so that a clean hand-over takes no longer than a look.
    leader_gone: Arc<Notify>,
}

/// An election that was won.
#[derive(Debug)]
pub struct Elected {
    /// The term.
    pub term: Term,
    /// For the writer.
    pub token: LeaderToken,
    /// Until when it counts.
    pub validity: Validity,
    /// Fires when the leadership is over.
    pub cancel: CancellationToken,
    /// The leader key's etcd lease.
    pub(super) lease: i64,
}

impl Campaign {
    /// Prepares to stand.
    #[must_use]
    pub fn new(store: Store, clock: Clock, candidate: Candidate) -> Self {
        Self { store, clock, candidate, leader_gone: Arc::default() }
    }

    /// Looks at once whenever this is told that nobody leads.
    #[must_use]
    pub fn woken_by(self, leader_gone: Arc<Notify>) -> Self {
        Self { leader_gone, ..self }
    }

    /// Waits until this process is the leader. `hint` is called with the address of whoever else is.
    ///
    /// Not cancel safe in the sense that an etcd lease may be left behind; it ends by itself within seconds.
    pub async fn win(&self, mut hint: impl FnMut(Option<String>)) -> Elected {
        let mut standing_by_for = None;
        let mut complained = false;
        loop {
            match self.look_and_claim().await {
                Ok(Look::Won(elected)) => {
                    info!(term = %elected.term, "elected");
                    return elected;
                }
                Ok(Look::Led(leader)) => {
                    let address = leader.map(|l| l.address);
                    if standing_by_for.as_ref() != Some(&address) {
                        info!(
                            leader = address.as_deref().unwrap_or("an unreadable record"),
                            "standing by: another controller leads"
                        );
                        standing_by_for = Some(address.clone());
                    }
                    hint(address);
                    complained = false;
                    // Its end is told, or found by looking.
                    let _ = time::timeout(LOOK_EVERY, self.leader_gone.notified()).await;
                }
                Err(error) => {
                    hint(None);
                    if !complained {
                        warn!("cannot stand for election: {}", report(&error));
                        complained = true;
                    }
                    time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    async fn look_and_claim(&self) -> Result<Look, Error> {
        if let Some((value, term)) = self.store.leader().await? {
            let leader = match Record::from_json(&Key::Leader, &value) {
                Ok(Record::Leader(leader)) => Some((*leader).clone()),
                Ok(_) | Err(_) => None,
            };
            match leader {
                Some(leader) if Some(leader.id) == self.candidate.predecessor => {
                    info!(%term, "the leader of before was this controller's own predecessor, which is dead: its key goes");
                    self.store.remove_leader(term).await?;
                }
                // A term of this very process, which has ended, or else it would not stand again: etcd was away when it
                // resigned, or a claim was answered too late. Waiting for the TTL, which etcd starts anew when it is
                // back, would cost the hosts their leases. What is left of the old term cannot write (T2).
                Some(leader) if leader.id == self.candidate.id => {
                    info!(%term, "the leader key is of an earlier term of this process: it goes");
                    self.store.remove_leader(term).await?;
                }
                leader => return Ok(Look::Led(leader)),
            }
        }
        // Read before the grant is sent: the validity runs from here (T1).
        let sent = self.clock.now();
        let granted = self.store.grant(TTL).await?;
        let record = Record::Leader(Arc::new(LeaderRecord {
            id: self.candidate.id,
            address: self.candidate.address.clone(),
            since: self.clock.wall(),
            extra: Extra::new(),
        }));
        match self.store.claim_leader(&record, granted.id).await {
            Ok(crate::store::Claim::Won(revision)) => {
                let term = Term(revision.0);
                Ok(Look::Won(Elected {
                    term,
                    token: LeaderToken::new(term),
                    validity: Validity::new(sent, granted.ttl),
                    cancel: CancellationToken::new(),
                    lease: granted.id,
                }))
            }
            Ok(crate::store::Claim::Taken) => {
                if let Err(error) = self.store.revoke(granted.id).await {
                    debug!("an unused lease is left to run out: {}", report(&error));
                }
                Ok(Look::Led(None))
            }
            // The key may have been created: then it is seen at the next look, and goes with its lease.
            Err(error) => Err(error),
        }
    }

    /// Keeps a leadership alive until it is over: then its `cancel` fires and this returns.
    pub async fn keep(&self, elected: &Keeping) {
        let validity = elected.validity.clone();
        let cancel = elected.cancel.clone();
        let renewals = self.renew(elected.lease, validity.clone());
        // Watches over the validity by itself: when renewals hang, nothing else would notice.
        let watch = async {
            loop {
                let now = self.clock.now();
                if !validity.holds(now) {
                    return;
                }
                time::sleep(validity.until().since(now)).await;
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = watch => warn!(term = %elected.term, "leadership is no longer certain: etcd did not answer in time"),
            () = renewals => warn!(term = %elected.term, "leadership is over: the leader key's lease is gone"),
        }
        cancel.cancel();
        validity.end();
    }

    /// Returns when etcd says that the lease is gone.
    async fn renew(&self, lease: i64, validity: Validity) {
        let mut stream = None;
        let mut ticker = time::interval(KEEP_ALIVE_EVERY);
        ticker.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            ticker.tick().await;
            // Each answer must belong to the keep-alive that was sent at `sent`. So a stream on which an answer was
            // late is thrown away: the late answer would be taken for the next one's.
            let mut open = match stream.take() {
                Some(open) => open,
                None => match self.store.keep_alive(lease).await {
                    Ok(open) => open,
                    Err(error) => {
                        debug!("the leader key's lease could not be kept alive: {}", report(&error));
                        ticker.reset_after(NEXT_MEMBER_AFTER);
                        continue;
                    }
                },
            };
            let sent = self.clock.now();
            match open.renew().await {
                Ok(ttl) if ttl.is_zero() => return,
                Ok(ttl) => {
                    validity.extend(sent, ttl);
                    stream = Some(open);
                }
                Err(error) => {
                    debug!("the leader key's lease could not be kept alive: {}", report(&error));
                    // At once, at the next member of etcd.
                    ticker.reset_after(NEXT_MEMBER_AFTER);
                }
            }
        }
    }

    /// Gives the leadership up, so that nobody has to wait for the lease. What fails is left to run out.
    pub async fn resign(&self, token: &LeaderToken, lease: i64) {
        if let Err(error) = self.store.remove_leader(token.term()).await {
            debug!("could not resign: {}", report(&error));
            return;
        }
        if let Err(error) = self.store.revoke(lease).await {
            debug!("could not give the leader key's lease back: {}", report(&error));
        }
    }
}

/// What keeping a leadership alive needs.
#[derive(Clone, Debug)]
pub struct Keeping {
    term: Term,
    validity: Validity,
    cancel: CancellationToken,
    lease: i64,
}

impl Elected {
    /// For [`Campaign::keep`].
    #[must_use]
    pub fn keeper(&self) -> Keeping {
        Keeping { term: self.term, validity: self.validity.clone(), cancel: self.cancel.clone(), lease: self.lease }
    }

    /// The leader key's etcd lease, for [`Campaign::resign`].
    #[must_use]
    pub const fn lease(&self) -> i64 {
        self.lease
    }
}

enum Look {
    Won(Elected),
    /// Somebody else leads; `None` if the record cannot be read.
    Led(Option<LeaderRecord>),
}
