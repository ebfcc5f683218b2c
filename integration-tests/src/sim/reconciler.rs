//! The reconciler's task of a term.
//!
//! Mirrors `controller/src/reconcile/driver.rs`: a pass has due verdicts stored, and then hands VMs that need a host to the
//! writer, one batch after the other. What is decided is decided by the real `HealthTable` and `reconcile::plan`.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use uncloud_controller::{
    health::Verdict,
    model::EventType,
    reconcile::drain::{self, Drains, How, Step},
    reconcile::migrations::Migrations,
    reconcile::plan::{self, Attempts, BATCH, Situation},
    state::command::{Command, Context, DrainStep},
};
use uncloud_proto::{clock::Tick, ids::VmId};

use super::{
    clock::{NodeClock, Ns},
    core::Core,
    lead::{Lead, Reply},
    queue::What,
};

/// Where a pass is.
#[derive(Debug)]
pub(crate) enum Pass {
    Idle,
    Announcing,
    Declaring(usize),
    Shortening,
    /// So many steps of drains may follow in this pass.
    Draining(usize),
    Placing {
        left: VecDeque<Vec<VmId>>,
        current: Vec<VmId>,
        situation: Arc<Situation>,
        now: Tick,
    },
}

/// The task.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(super) attempts: Attempts,
    pub(super) migrations: Migrations,
    pub(super) drains: Drains,
    pub(super) announced: bool,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) pass: Pass,
    pub(super) again: bool,
    /// It leaves the writer alone until then.
    pub(super) busy_until: Ns,
}

impl Driver {
    /// Something was committed since it last looked, and it is not at work.
    pub(super) fn is_wanted(&self, now: Ns) -> bool {
        self.may_begin(now) && self.again
    }

    /// It is not at work.
    pub(super) fn may_begin(&self, now: Ns) -> bool {
        matches!(self.pass, Pass::Idle) && !self.is_busy(now)
    }

    pub(super) const fn is_busy(&self, now: Ns) -> bool {
        now < self.busy_until
    }

    /// The writer, or a full etcd, takes nothing.
    pub(super) fn busy(&mut self, until: Ns) {
        self.busy_until = self.busy_until.max(until);
    }
}

impl Lead {
    /// `Driver::off_until`
    fn off_until(&self, core: &Core, now: Tick) -> Option<Tick> {
        let stored = self.mirror.cluster()?;
        let off = stored.failover_off.as_ref()?;
        let on_record = stored.fast_lease_ms.min(stored.patient_lease_ms);
        let left = off.left(core.wall_of(self.process.0)).min(Duration::from_millis(on_record));
        (!left.is_zero()).then(|| now.after(left))
    }

    pub(super) fn look(&mut self, core: &mut Core, clock: &NodeClock) {
        let now = clock.tick(core.now);
        // L2
        if !self.validity.holds(now) {
            return;
        }
        let off_until = self.off_until(core, now);
        self.health.switch_off(off_until);
        self.driver.verdicts = self.health.tick(now);
        let engaged = self.health.brake().engaged;
        if engaged != self.driver.announced {
            self.driver.pass = Pass::Announcing;
            core.log(format_args!("term {}: brake {engaged}", self.term));
            core.stats.brakes += u64::from(engaged);
            let event = if engaged { EventType::BrakeEngaged } else { EventType::BrakeReleased };
            return self.submit(core, Command::Note { event, message: String::new() }, Reply::Brake(engaged));
        }
        self.declare(core, clock);
    }

    pub(super) fn declare(&mut self, core: &mut Core, clock: &NodeClock) {
        let verdicts = std::mem::take(&mut self.driver.verdicts);
        if verdicts.is_empty() {
            return self.shorten(core, clock);
        }
        self.driver.pass = Pass::Declaring(verdicts.len());
        for verdict in verdicts {
            let Verdict { host, lapsed } = verdict;
            core.stats.verdicts += 1;
            core.log(format_args!("term {}: host {host} declared lapsed: {lapsed:?}", self.term));
            self.submit(core, Command::DeclareLapsed { host, lapsed, limit: BATCH }, Reply::Verdict(verdict));
        }
    }

    pub(super) fn shorten(&mut self, core: &mut Core, clock: &NodeClock) {
        let now = clock.tick(core.now);
        let running = self.health.running(now);
        let off = self.off_until(core, now).map_or(Duration::ZERO, |until| until.since(now));
        let stored = self.mirror.cluster().cloned();
        if let Some(command) = stored.and_then(|c| plan::shorter_leases(&c, &self.timings, running, off)) {
            self.driver.pass = Pass::Shortening;
            return self.submit(core, command, Reply::Leases);
        }
        self.place(core, clock);
    }

    pub(super) fn place(&mut self, core: &mut Core, clock: &NodeClock) {
        self.driver.again = false;
        let now = clock.tick(core.now);
        let silent = self.health.silent(now);
        for command in self.driver.migrations.hopeless(&self.mirror, &silent, now) {
            self.submit(core, command, Reply::GaveUp);
        }
        let situation = Arc::new(Situation { openings: self.mirror.view().openings(), silent });
        let left = plan::plan(&self.mirror, &self.driver.attempts, &situation, now).into();
        self.driver.pass = Pass::Placing { left, current: Vec::new(), situation, now };
        self.next_batch(core, clock);
    }

    pub(super) fn next_batch(&mut self, core: &mut Core, clock: &NodeClock) {
        let valid = self.validity.holds(clock.tick(core.now));
        if let Pass::Placing { left, current, .. } = &mut self.driver.pass
            && valid
            && let Some(vms) = left.pop_front()
        {
            current.clone_from(&vms);
            return self.submit(core, Command::Place { vms }, Reply::Placed);
        }
        self.driver.pass = Pass::Draining(drain::STEPS);
        self.drain(core, clock);
    }

    /// `Driver::drain`
    pub(super) fn drain(&mut self, core: &mut Core, clock: &NodeClock) {
        let now = clock.tick(core.now);
        if let Pass::Draining(left) = &mut self.driver.pass
            && *left > 0
            && self.validity.holds(now)
        {
            let silent = self.health.silent(now);
            let cx = Context {
                now: core.wall_of(self.process.0),
                silent,
                arrived: self.arrivals.all(),
                cpu_overcommit_percent: 400,
                disk_overcommit_percent: 200,
            };
            if let Some(Step { vm, from, how }) = self.driver.drains.next(&self.mirror, &cx, now) {
                *left -= 1;
                core.log(format_args!("term {}: {vm} leaves {from}: {how:?}", self.term));
                let step = match how {
                    How::Migrate => {
                        core.stats.drain_migrations += 1;
                        DrainStep::Migrate { secret: format!("{:064x}", core.uid()) }
                    }
                    How::Stop => {
                        core.stats.drain_stops += 1;
                        DrainStep::Stop
                    }
                };
                return self.submit(core, Command::DrainVm { vm, from, step }, Reply::Drained(vm));
            }
        }
        self.driver.pass = Pass::Idle;
        if self.driver.again {
            self.later(core, 1, What::DriverWake(self.serial));
        }
    }
}
