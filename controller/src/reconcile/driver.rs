//! Carries out what health and the plan say, for one term: a task that ends with it.
//!
//! Woken by every change and every [`PERIOD`]; what woke it makes no difference to what it does. A pass first has due
//! verdicts stored (`health/`), then hands VMs that need a host to the writer, a batch at a time. Nothing is retried
//! within a pass. Cancel safe: whatever was not stored is found again, by this leader or the next.

use std::{sync::Arc, time::Duration};

use tokio::time::{self, MissedTickBehavior};
use tracing::{Instrument, info, info_span, warn};
use uncloud_proto::clock::Tick;

use super::{
    drain::{self, Drains, How},
    history, images,
    migrations::Migrations,
    plan::{self, Attempts, BATCH, Situation},
};
use crate::{
    api::migration_secret,
    health::{BrakeState, Verdict},
    leadership::{Leader, WriteError},
    model::EventType,
    state::command::{Command, Context, DrainStep, Lapsed},
};

/// How often health is looked at. A failover takes up to this much longer; a shorter one costs CPU in a large cluster.
const PERIOD: Duration = Duration::from_millis(100);

/// How long to let the writer, or a full etcd, alone.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

/// So many batches of VMs are handed to the writer at once: those of a host with 1000 VMs before the reports of the first of them that
/// run. What users ask for meanwhile, and hosts that come back, waits for these, two to a transaction of some two milliseconds.
const AT_ONCE: usize = 1000_usize.div_ceil(BATCH);

/// Runs passes until the term ends.
pub async fn run(leader: Arc<Leader>) {
    let span = info_span!(parent: None, "reconcile", term = %leader.term);
    let work = async {
        tokio::select! {
            () = leader.cancel.cancelled() => {}
            () = passes(&leader) => {}
            () = images::run(&leader) => {}
            () = history::run(&leader) => {}
        }
    };
    work.instrument(span).await;
}

async fn passes(leader: &Leader) {
    let mut changed = leader.mirror.changed();
    let mut ticker = time::interval(PERIOD);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut driver = Driver {
        leader,
        attempts: Attempts::default(),
        migrations: Migrations::default(),
        drains: Drains::default(),
        announced: false,
    };
    loop {
        let result = tokio::select! {
            biased; // a busy cluster must not keep health from being looked at
            _ = ticker.tick() => driver.look_and_place().await,
            alive = changed.changed() => {
                if alive.is_err() {
                    return;
                }
                driver.place().await
            }
        };
        match result {
            Ok(()) => {}
            Err(Stop::Busy) => {
                warn!("the writer takes nothing at the moment; a later pass tries again");
                time::sleep(BUSY_PAUSE).await;
            }
            Err(Stop::TermOver) => return,
        }
    }
}

struct Driver<'a> {
    leader: &'a Leader,
    attempts: Attempts,
    migrations: Migrations,
    drains: Drains,
    /// What was last said about the brake.
    announced: bool,
}

/// Why a pass ends early.
enum Stop {
    /// The writer's queue is full.
    Busy,
    /// Whoever leads next finds the same to do.
    TermOver,
}

impl Driver<'_> {
    async fn look_and_place(&mut self) -> Result<(), Stop> {
        let now = self.leader.clock.now();
        // After a pause of this process every host looks silent; and whoever does not lead decides nothing (L2).
        if !self.leader.validity.holds(now) {
            return Ok(());
        }
        let (verdicts, brake) = {
            let off_until = self.off_until(now);
            let mut health = self.leader.health();
            health.switch_off(off_until);
            (health.tick(now), health.brake())
        };
        self.announce(brake).await?;
        // All at once: the writer puts them into as few transactions as it can.
        let declared = futures_util::future::join_all(verdicts.into_iter().map(|v| self.declare(v))).await;
        declared.into_iter().collect::<Result<(), Stop>>()?;
        self.shorten_leases(now).await?;
        self.end_migrations(now).await?;
        self.place().await
    }

    /// At the beginning of a term the longest lease that may be held is on record (W3). When what an earlier leader granted
    /// has surely run out, the record becomes what this one grants: its successor need not wait longer than that.
    async fn shorten_leases(&self, now: Tick) -> Result<(), Stop> {
        let Some(stored) = self.leader.mirror.read(|state| state.cluster().cloned()) else { return Ok(()) };
        let running = self.leader.health().running(now);
        let off = self.off_until(now).map_or(Duration::ZERO, |until| until.since(now));
        if let Some(command) = plan::shorter_leases(&stored, &self.leader.settings.timings, running, off) {
            self.submit(command).await?;
        }
        Ok(())
    }

    /// Gives up migrations that cannot go on.
    async fn end_migrations(&mut self, now: Tick) -> Result<(), Stop> {
        let silent = self.leader.health().silent(now);
        let hopeless = self.leader.mirror.read(|state| self.migrations.hopeless(state, &silent, now));
        for command in hopeless {
            self.submit(command).await?;
        }
        Ok(())
    }

    /// Until when failover is off. Wall-clock time only says how long people want it; what is granted is never longer than what
    /// is on record for a successor (W3).
    fn off_until(&self, now: Tick) -> Option<Tick> {
        let stored = self.leader.mirror.read(|state| state.cluster().cloned())?;
        let off = stored.failover_off.as_ref()?;
        let on_record = stored.fast_lease_ms.min(stored.patient_lease_ms);
        let left = off.left(self.leader.clock.wall()).min(Duration::from_millis(on_record));
        (!left.is_zero()).then(|| now.after(left))
    }

    /// Says what the brake does, once per change.
    async fn announce(&mut self, brake: BrakeState) -> Result<(), Stop> {
        if brake.engaged == self.announced {
            return Ok(());
        }
        let BrakeState { heard, total, .. } = brake;
        let (event, message) = if brake.engaged {
            warn!(heard, total, "fewer than half of the hosts are heard: no more are declared lapsed");
            let message = format!(
                "{heard} of {total} hosts are heard; the fault may be on the controller's side, so no more hosts are \
                 declared lapsed until half of them are heard again, or a person says so"
            );
            (EventType::BrakeEngaged, message)
        } else {
            info!(heard, total, "the brake is released");
            (EventType::BrakeReleased, format!("{heard} of {total} hosts are heard; failover goes on"))
        };
        self.submit(Command::Note { event, message }).await?;
        self.announced = brake.engaged;
        Ok(())
    }

    /// Has a verdict stored, which also moves the first VMs.
    async fn declare(&self, verdict: Verdict) -> Result<(), Stop> {
        let Verdict { host, lapsed } = verdict;
        let lease = match lapsed {
            Lapsed::Fast => "its fast lease has surely run out",
            Lapsed::Both => "both its leases have surely run out",
        };
        warn!(%host, "host declared lapsed: {lease}");
        match self.submit(Command::DeclareLapsed { host, lapsed, limit: BATCH }).await? {
            Submitted::Stored => self.leader.health().declared(verdict),
            // Nothing of it is stored, so nothing of it moves. It gets no grants until it registers.
            Submitted::Refused => self.leader.health().remove(host),
        }
        Ok(())
    }

    /// Hands VMs that need a host to the writer.
    async fn place(&mut self) -> Result<(), Stop> {
        let now = self.leader.clock.now();
        let silent = self.leader.health().silent(now);
        let (batches, situation) = self.leader.mirror.read(|state| {
            let situation = Arc::new(Situation { openings: state.view().openings(), silent });
            (plan::plan(state, &self.attempts, &situation, now), situation)
        });
        // Some at once, in their order: while one is being stored the next one waits already.
        for some in batches.chunks(AT_ONCE) {
            if !self.leader.validity.holds(self.leader.clock.now()) {
                return Ok(());
            }
            let placed = some.iter().map(|vms| self.submit(Command::Place { vms: vms.clone() }));
            let placed = futures_util::future::join_all(placed).await;
            placed.into_iter().collect::<Result<Vec<_>, Stop>>()?;
            let tried = some.concat();
            self.leader.mirror.read(|state| self.attempts.note(&tried, &situation, state, now));
        }
        self.drain().await
    }

    /// Has VMs leave hosts that are being drained.
    async fn drain(&mut self) -> Result<(), Stop> {
        for _ in 0..drain::STEPS {
            let now = self.leader.clock.now();
            if !self.leader.validity.holds(now) {
                return Ok(());
            }
            let cx = Context {
                now: self.leader.clock.wall(),
                silent: self.leader.health().silent(now),
                arrived: Arc::default(),
                cpu_overcommit_percent: self.leader.settings.cpu_overcommit_percent,
                disk_overcommit_percent: self.leader.settings.disk_overcommit_percent,
            };
            let Some(drain::Step { vm, from, how }) =
                self.leader.mirror.read(|state| self.drains.next(state, &cx, now))
            else {
                return Ok(());
            };
            let step = match how {
                How::Migrate => DrainStep::Migrate { secret: migration_secret() },
                How::Stop => DrainStep::Stop,
            };
            match self.submit(Command::DrainVm { vm, from, step }).await? {
                Submitted::Stored => {}
                Submitted::Refused => self.drains.refused(vm, now),
            }
        }
        Ok(())
    }

    async fn submit(&self, command: Command) -> Result<Submitted, Stop> {
        match self.leader.writer.submit(command).await {
            Ok(_) => Ok(Submitted::Stored),
            Err(WriteError::Refused(refusal)) => {
                warn!("refused: {refusal}");
                Ok(Submitted::Refused)
            }
            Err(WriteError::Overloaded | WriteError::StoreFull) => Err(Stop::Busy),
            Err(WriteError::NotLeader | WriteError::Unknown) => Err(Stop::TermOver),
        }
    }
}

/// What became of a command.
enum Submitted {
    Stored,
    Refused,
}
