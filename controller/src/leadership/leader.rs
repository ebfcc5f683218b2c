//! What a leader is made of, for the length of one term, and where the rest of the process finds it.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uncloud_proto::{
    clock::{Clock, WallTime},
    ids::{ControllerId, HostId, Term},
};

use super::{Elected, ImageBoard, LeaderToken, Mirror, Validity, Writer, writer::Work};
use crate::{
    config::MAX_LEASE,
    health::{HealthTable, Timings},
    metrics::Metrics,
    model::{ClusterRecord, EventType, Key},
    report,
    sessions::SessionRegistry,
    state::{State, command::Command},
    store::{Error, Store},
};

/// What an operator sets for the cluster.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Lengths of the leases.
    pub timings: Timings,
    /// vCPUs promised per CPU thread, in percent.
    pub cpu_overcommit_percent: u32,
    /// Bytes of disks promised per byte of a pool, in percent.
    pub disk_overcommit_percent: u32,
    /// Where this controller serves.
    pub address: String,
    /// Where all controllers serve.
    pub controllers: Vec<String>,
    /// Where things are counted.
    pub metrics: Metrics,
}

/// One term of leadership.
#[derive(Debug)]
pub struct Leader {
    /// The term.
    pub term: Term,
    /// This process.
    pub id: ControllerId,
    /// Since when it leads.
    pub since: WallTime,
    /// Until when it counts as the leader.
    pub validity: Validity,
    /// Where commands go.
    pub writer: Writer,
    /// The committed state.
    pub mirror: Mirror,
    /// The hosts' leases. Lock it for moments only.
    pub health: Mutex<HealthTable>,
    /// The agents' sessions.
    pub sessions: SessionRegistry,
    /// The images that are on their way.
    pub images: ImageBoard,
    /// Ends with the term.
    pub cancel: CancellationToken,
    /// What the operator set.
    pub settings: Settings,
    /// The clock.
    pub clock: Clock,
    /// For what is not in memory: older events.
    pub store: Store,
}

impl Leader {
    /// The hosts' leases.
    pub fn health(&self) -> MutexGuard<'_, HealthTable> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hosts on which nothing new is placed, because they are silent now.
    #[must_use]
    pub fn silent_hosts(&self) -> Arc<BTreeSet<HostId>> {
        self.health().silent(self.clock.now())
    }

    /// Whether this process may still act as the leader.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        !self.cancel.is_cancelled() && self.validity.holds(self.clock.now())
    }

    /// Begins the term with `mirror`, which has everything that was written before the leader key was created
    /// ([`super::Follower::catch_up`]) and is kept by nobody else from now on. The writer runs in the task that is returned,
    /// which ends with the term.
    ///
    /// # Errors
    ///
    /// When etcd does not answer: the election was for nothing.
    pub async fn begin(
        store: Store,
        clock: Clock,
        id: ControllerId,
        elected: Elected,
        settings: Settings,
        mirror: Mirror,
    ) -> Result<(Arc<Self>, JoinHandle<LeaderToken>), (Error, LeaderToken)> {
        let Elected { term, token, validity, cancel, lease: _ } = elected;
        let leases = match store.retention_leases(clock.now(), None).await {
            Ok(leases) => leases,
            Err(error) => return Err((error, token)),
        };
        let state = mirror.read(State::clone);
        // Read after the leader key was created, as the health table wants it (L3).
        let took_over = clock.now();
        let stored = Stored::of(&state);
        let longest = stored.longest(settings.timings);
        let hosts = state.hosts().map(|(&id, entry)| (id, entry.record.liveness));
        let health = HealthTable::new(settings.timings, longest, hosts, took_over);

        let (writer, parts) = Writer::queue();
        let leader = Arc::new(Self {
            term,
            id,
            since: clock.wall(),
            validity: validity.clone(),
            writer,
            mirror: mirror.clone(),
            health: Mutex::new(health),
            sessions: SessionRegistry::default(),
            images: ImageBoard::default(),
            cancel: cancel.clone(),
            settings,
            clock: clock.clone(),
            store: store.clone(),
        });
        let work = Work { token, validity, store, clock, state, mirror, leases, leader: leader.clone(), cancel };
        let task = tokio::spawn(work.run(parts));
        leader.announce(&stored).await;
        Ok((leader, task))
    }

    /// Stores what this leader grants, so that its successor waits long enough, and says that there is a new leader.
    async fn announce(&self, stored: &Stored) {
        // Never lowered here: a predecessor's longer leases may still run when this leader dies a moment after its election,
        // and then the next one must still count with them (L3). The reconciler lowers it once they have surely run out.
        let longest = stored.longest(self.settings.timings);
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let (fast_lease_ms, patient_lease_ms) = (millis(longest.fast), millis(longest.patient));
        let needed = match stored {
            Stored::Unreadable => {
                error!(key = %Key::Cluster, "cannot be read: every leader waits out leases of {MAX_LEASE:?} until it is mended");
                false
            }
            Stored::Absent => true,
            Stored::Known(c) => c.fast_lease_ms != fast_lease_ms || c.patient_lease_ms != patient_lease_ms,
        };
        // Stored before anything is granted: the process has no slot to grant from yet.
        if needed && let Err(error) = self.writer.submit(Command::SetLeases { fast_lease_ms, patient_lease_ms }).await {
            warn!("the lengths of the leases could not be stored: {}", report(&error));
            self.cancel.cancel();
            return;
        }
        let message = format!("controller {} at {} leads, term {}", self.id, self.settings.address, self.term);
        if let Err(error) = self.writer.submit(Command::Note { event: EventType::LeaderElected, message }).await {
            warn!("the election could not be noted: {}", report(&error));
        }
    }
}

/// What predecessors said about the leases that they grant.
enum Stored {
    /// Nobody has led yet.
    Absent,
    /// The record is there and says nothing: they may have granted anything that is allowed.
    Unreadable,
    Known(Arc<ClusterRecord>),
}

impl Stored {
    fn of(state: &State) -> Self {
        match state.cluster() {
            Some(record) => Self::Known(record.clone()),
            None if state.unreadable().contains_key(&Key::Cluster.to_string()) => Self::Unreadable,
            None => Self::Absent,
        }
    }

    /// The longest leases that may run, if this leader grants `own`.
    fn longest(&self, own: Timings) -> Timings {
        match self {
            Self::Absent => own,
            Self::Unreadable => Timings { fast: MAX_LEASE, patient: MAX_LEASE, ..own },
            Self::Known(c) => own.longest(Timings {
                fast: Duration::from_millis(c.fast_lease_ms),
                patient: Duration::from_millis(c.patient_lease_ms),
                ..own
            }),
        }
    }
}

/// This controller does not lead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this controller does not lead{}", hint.as_ref().map(|h| format!("; {h} does")).unwrap_or_default())]
pub struct NotLeader {
    /// Where the leader serves, as far as known.
    pub hint: Option<String>,
}

/// Where the process finds its present leadership, if it has one. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LeaderSlot {
    slot: watch::Sender<Result<Arc<Leader>, NotLeader>>,
}

impl Default for LeaderSlot {
    fn default() -> Self {
        Self { slot: watch::Sender::new(Err(NotLeader { hint: None })) }
    }
}

impl LeaderSlot {
    /// The present leadership.
    ///
    /// # Errors
    ///
    /// When another controller leads, or none, or it is no longer certain that this one does.
    pub fn get(&self) -> Result<Arc<Leader>, NotLeader> {
        let leader = self.slot.borrow().clone()?;
        if leader.is_valid() { Ok(leader) } else { Err(NotLeader { hint: None }) }
    }

    /// Tells when it changes.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<Result<Arc<Leader>, NotLeader>> {
        self.slot.subscribe()
    }

    /// This process leads.
    pub fn set(&self, leader: Arc<Leader>) {
        info!(term = %leader.term, "leading");
        drop(self.slot.send_replace(Ok(leader)));
    }

    /// It does not; `hint` says who does.
    pub fn clear(&self, hint: Option<String>) {
        self.slot.send_if_modified(|slot| {
            let new = Err(NotLeader { hint });
            let changed = match (&*slot, &new) {
                (Err(old), Err(new)) => old != new,
                (Ok(_), _) | (_, Ok(_)) => true,
            };
            if changed {
                *slot = new;
            }
            changed
        });
    }
}
