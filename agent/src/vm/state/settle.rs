//! What should be, against what is: the one next step of a VM. Pure.

use std::time::Duration;

use uncloud_proto::clock::Tick;

use super::{
    Acceptance, Disposition, Effect, Ending, Execution, Launched, Moment, Push, QUIT_GRACE, RestartMode, Role, Settled,
    StopMode, VmState, Work, migrate::Migrating,
};

/// Whether it may be started now.
enum Verdict {
    Start { lease_generation: u16 },
    Wait,
    Fenced,
}

impl VmState {
    /// Compares what should be with what is, and takes the next step.
    pub(super) fn settle(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        if self.execution.is_some() {
            self.settle_executing(at, effects);
        } else if self.work == Work::None {
            self.settle_idle(at, effects);
        }
    }

    fn settle_executing(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        let desired = &self.record.desired;
        let grace = desired.spec.as_ref().map_or(60, |s| s.stop_grace_seconds);
        let kill_at = at.now.after(Duration::from_secs(grace.into()));
        // The keeper has done this already, or is about to. The second line costs nothing. Without a spec the VM's
        // class is not known, and only the keeper can tell.
        let fenced = !at.lease.valid || at.lease.generation != x.lease_generation;
        if fenced && desired.spec.is_some() {
            return x.kill(at.now, effects);
        }
        if x.role == Role::Incoming {
            return self.settle_incoming(at, effects);
        }
        match self.settle_outgoing(at, effects) {
            Migrating::Yes => return self.end_in_time(kill_at, at, effects),
            Migrating::No => {}
        }
        self.settle_pause(at, effects);
        let Some(x) = &mut self.execution else { return };
        let desired = &self.record.desired;
        match (desired.disposition, desired.stop_mode) {
            (Disposition::Forget | Disposition::Delete | Disposition::Incoming, _) => x.kill(at.now, effects),
            (Disposition::Stop, StopMode::Kill) => {
                x.ending.get_or_insert(Ending::Stop);
                x.kill(at.now, effects);
            }
            (Disposition::Stop, StopMode::Graceful) => {
                x.ask(Ending::Stop, kill_at, effects);
                x.press_on(at.now, effects);
            }
            (Disposition::Run, _) => {
                let being_stopped = matches!(x.push, Push::Asked { .. });
                if x.incarnation < desired.incarnation && !being_stopped {
                    return x.kill(at.now, effects);
                }
                if x.incarnation == desired.incarnation && desired.restarts > self.record.restarts_done {
                    match desired.restart_mode {
                        RestartMode::Graceful => x.ask(Ending::Restart, kill_at, effects),
                        RestartMode::Reset => {
                            // A guest that is on its way out is not saved by a reset; it is started anew.
                            if x.ending.is_none() {
                                effects.push(Effect::Reset);
                                self.record.restarts_done = desired.restarts;
                            }
                        }
                    }
                }
                x.press_on(at.now, effects);
                self.tend_disks(at, effects);
                self.mind_stall(at, effects);
            }
        }
    }

    /// It is to end, and cannot be asked to while a migration is put right. A QEMU that does not answer must not keep it from ending.
    fn end_in_time(&mut self, kill_at: Tick, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        let desired = &self.record.desired;
        let ending = match desired.disposition {
            Disposition::Stop => Ending::Stop,
            Disposition::Run if desired.migrate_to.is_none() && desired.restarts > self.record.restarts_done => {
                Ending::Restart
            }
            Disposition::Run | Disposition::Incoming | Disposition::Delete | Disposition::Forget => {
                x.end_by = None;
                return;
            }
        };
        if at.now >= *x.end_by.get_or_insert(kill_at) {
            x.ending.get_or_insert(ending);
            x.kill(at.now, effects);
        }
    }

    fn settle_idle(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let desired = &self.record.desired;
        match desired.disposition {
            Disposition::Forget => {
                let due = self.retry.as_ref().is_none_or(|r| at.now >= r.at);
                match desired.void {
                    // M7
                    Some(_) if self.frozen.is_none() && self.record.settled != Some(Settled::Forgotten) => {
                        if due {
                            self.work = Work::Sweeping;
                            effects.push(Effect::DeleteDisks);
                        }
                    }
                    Some(_) | None => self.record.settled = Some(Settled::Forgotten),
                }
            }
            Disposition::Stop => {
                self.record.restarts_done = self.record.restarts_done.max(desired.restarts);
                // V1: what was fenced stays so until it has a new incarnation, also when it was deleted or forgotten after that.
                match self.record.settled {
                    Some(Settled::Fenced | Settled::Deleted | Settled::Forgotten) => {}
                    Some(Settled::Stopped | Settled::PoweredOff | Settled::Failed { .. }) | None => {
                        self.record.settled = Some(Settled::Stopped);
                        self.tend_idle(at, effects);
                    }
                }
            }
            Disposition::Delete => {
                let due = self.retry.as_ref().is_none_or(|r| at.now >= r.at);
                if self.frozen.is_none() && self.record.settled != Some(Settled::Deleted) && due {
                    self.work = Work::Deleting;
                    effects.push(Effect::DeleteDisks);
                }
            }
            Disposition::Run => self.settle_idle_run(at, effects),
            Disposition::Incoming => {
                // They were carried out where the guest comes from.
                self.record.restarts_done = self.record.restarts_done.max(desired.restarts);
                self.settle_idle_run(at, effects);
            }
        }
    }

    fn settle_idle_run(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        if self.frozen.is_some() {
            return;
        }
        if self.record.desired.restarts > self.record.restarts_done {
            self.record.restarts_done = self.record.desired.restarts;
            self.retry = None;
            self.failures = 0;
            // Spelled out, so that a new way to settle makes the compiler ask.
            match self.record.settled {
                Some(Settled::Stopped | Settled::PoweredOff | Settled::Failed { .. }) => self.record.settled = None,
                Some(Settled::Fenced | Settled::Deleted | Settled::Forgotten) | None => {}
            }
        }
        match self.verdict(at) {
            Verdict::Start { .. } => {
                self.work = Work::Preparing;
                self.progress.clear();
                effects.push(Effect::Prepare);
            }
            Verdict::Fenced => self.record.settled = Some(Settled::Fenced),
            Verdict::Wait => {}
        }
    }

    /// P1: whether the leader's word, the lease and what is known here allow a start.
    fn verdict(&self, at: Moment) -> Verdict {
        let current = at.lease.generation;
        if self.execution.is_some() || self.work != Work::None || self.record.settled.is_some() {
            return Verdict::Wait;
        }
        // M4
        if self.record.desired.migrate_to.is_some() {
            return Verdict::Wait;
        }
        match self.acceptance {
            Acceptance::Void => return Verdict::Wait,
            Acceptance::Expected(g) if current.wrapping_add(1) == g => return Verdict::Wait,
            // The lease that the word was for is over. Nothing else would ever come for this incarnation while the
            // session lives, so the leader must know.
            Acceptance::Expected(g) | Acceptance::Firm(g) if g != current => return Verdict::Fenced,
            Acceptance::Expected(_) | Acceptance::Firm(_) => {}
        }
        let due = self.retry.as_ref().is_none_or(|r| at.now >= r.at);
        if !at.lease.valid || !due {
            return Verdict::Wait;
        }
        Verdict::Start { lease_generation: current }
    }

    pub(super) fn launch(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        // Preparing may have taken minutes: everything is looked at again. What else the verdict may be, `settle` sees.
        self.retry = None;
        let role = match self.record.desired.disposition {
            Disposition::Run => Role::Executes,
            Disposition::Incoming => Role::Incoming,
            Disposition::Stop | Disposition::Delete | Disposition::Forget => return,
        };
        if let Verdict::Start { lease_generation } = self.verdict(at) {
            let incarnation = self.record.desired.incarnation;
            // From here on the acceptance is known to be good, and bound to this generation.
            self.acceptance = Acceptance::Firm(lease_generation);
            self.record.launched = Some(Launched { incarnation, lease_generation, at: at.wall, role });
            self.work = Work::Launching;
            effects.push(Effect::Launch { incarnation, lease_generation });
        }
    }
}

impl Execution {
    pub(super) fn kill(&mut self, now: Tick, effects: &mut Vec<Effect>) {
        self.ending.get_or_insert(Ending::Killed);
        let due = match self.push {
            Push::None | Push::Asked { .. } => true,
            Push::Killed { again_at } => now >= again_at,
        };
        if due {
            self.push = Push::Killed { again_at: now.after(QUIT_GRACE) };
            effects.push(Effect::Kill);
        }
    }

    fn ask(&mut self, ending: Ending, kill_at: Tick, effects: &mut Vec<Effect>) {
        // A guest that is already on its way out is not asked again, and gets no more time.
        if self.push == Push::None {
            self.push = Push::Asked { kill_at };
            effects.push(Effect::PowerDown);
        }
        self.ending.get_or_insert(ending);
    }

    /// Kills what was asked in vain.
    fn press_on(&mut self, now: Tick, effects: &mut Vec<Effect>) {
        match self.push {
            Push::Asked { kill_at } if now >= kill_at => self.kill(now, effects),
            Push::Killed { .. } => self.kill(now, effects),
            Push::None | Push::Asked { .. } => {}
        }
    }
}
