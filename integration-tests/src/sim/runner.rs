//! The tasks of an agent's VMs: mail and events in, effects out.
//!
//! Mirrors `agent/src/vm/runner.rs`: what is handled in which order, the lease looked at before the end of a session, the
//! record written before anything else. What is decided is decided by the real `VmState` and `Mailbox`.

use std::collections::VecDeque;

use uncloud_agent::{
    lease::LeaseClass,
    records::Role,
    vm::{
        mailbox::{Generations, Mail, Mailbox},
        state::{Effect, Event as VmEvent, Lease, Moment, Skipped, VmState},
    },
};
use uncloud_proto::{clock::Tick, ids::VmId};

use super::{
    agent::Agent,
    clock::MS,
    core::Core,
    host::Host,
    queue::{Death, DiskWork, GuestAct, Start, What, Whom},
};

/// One VM's task.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(super) state: VmState,
    pub(super) mailbox: Mailbox,
    pub(super) work: Option<u64>,
    prepared: bool,
    pub(super) instance: Option<u64>,
    pub(super) now: Tick,
}

impl Host {
    /// `Runner::mail`
    pub(super) fn mail(&mut self, core: &mut Core, agent: &mut Agent, vm: VmId) {
        let Some(runner) = agent.runners.get(&vm) else { return };
        let Mail { session_ended, desired, lease_changed, over } = runner.mailbox.try_take();
        if let Some(generations) = session_ended {
            let event = ended(runner, generations);
            self.handle(core, agent, vm, event);
        }
        if let Some((desired, acceptance)) = desired {
            self.handle(core, agent, vm, VmEvent::Desired(desired, acceptance));
        }
        if lease_changed {
            self.handle(core, agent, vm, VmEvent::Wake);
        }
        if over && agent.runners.get(&vm).is_some_and(|r| r.state.is_over() && !r.state.is_frozen()) {
            self.remove_dir(vm);
            if agent.runners.get(&vm).is_some_and(|r| r.mailbox.close()) {
                agent.runners.remove(&vm);
            }
        }
    }

    pub(super) fn work_done(
        &mut self,
        core: &mut Core,
        agent: &mut Agent,
        vm: VmId,
        work: u64,
        event: VmEvent,
        uid: Option<u64>,
    ) {
        let Some(runner) = agent.runners.get_mut(&vm).filter(|r| r.work == Some(work)) else { return };
        runner.work = None;
        match &event {
            VmEvent::Prepared => runner.prepared = true,
            VmEvent::Started(..) => {
                // It may be gone by now: the instance's first event says so.
                let lives = self.qemus.get(&vm).is_some_and(|q| Some(q.uid) == uid);
                let VmEvent::Started(incarnation, _) = event else { return };
                runner.instance = uid;
                if let (false, Some(uid)) = (lives, uid) {
                    let exit = self.exit_of(core, vm, incarnation);
                    self.agent_later(core, MS, What::Instance(vm, uid, Box::new(VmEvent::Ended(exit))));
                }
            }
            _ => {}
        }
        self.handle(core, agent, vm, event);
        agent.looking.remove(&vm);
        if agent.looking.is_empty() {
            self.dial_first(core, agent);
        }
    }

    /// `Runner::handle`
    pub(super) fn handle(&mut self, core: &mut Core, agent: &mut Agent, vm: VmId, event: VmEvent) {
        let Some(mut runner) = agent.runners.remove(&vm) else { return };
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let before = self.moment(core, runner.state.record().desired.class());
            let at = match &event {
                VmEvent::Desired(desired, _) => self.moment(core, desired.class()),
                _ => before,
            };
            runner.now = at.now;
            // P1: looked at after the lease.
            if let Some(generations) = runner.mailbox.take_session_ended() {
                let event = ended(&runner, generations);
                let effects = runner.state.on(event, before);
                events.extend(self.perform(core, agent, vm, &mut runner, &effects));
            }
            let effects = runner.state.on(event, at);
            events.extend(self.perform(core, agent, vm, &mut runner, &effects));
        }
        runner.prepared = false;
        if let Some(at) = runner.state.deadline(runner.now) {
            let at = self.clock.when(at, core.now);
            core.at(at, Whom::Agent(self.index), self.agent_epoch, What::Timer(vm));
        }
        agent.runners.insert(vm, runner);
    }

    fn moment(&self, core: &Core, class: LeaseClass) -> Moment {
        let now = self.now(core);
        let word = self.word(class);
        let lease = Lease { generation: word.generation, valid: word.valid_at(now) };
        Moment { now, wall: core.wall(), lease }
    }

    /// `Runner::perform`
    fn perform(
        &mut self,
        core: &mut Core,
        agent: &mut Agent,
        vm: VmId,
        runner: &mut Runner,
        effects: &[Effect],
    ) -> Vec<VmEvent> {
        let mut events = Vec::new();
        let mut failed = false;
        if effects.contains(&Effect::Persist) {
            if self.disk_full > 0 {
                failed = true;
                events.push(VmEvent::PersistFailed("no space left on device".into(), Skipped::of(effects)));
            } else {
                self.records.insert(vm, runner.state.record().clone());
            }
        }
        let report = runner.state.report();
        if agent.outbox.put(vm, report)
            && let Some(session) = &agent.session
        {
            let (stream, delay) = (session.stream, core.latency());
            self.agent_later(core, delay, What::Flush(stream));
        }
        for effect in effects {
            if failed && effect.needs_record() {
                continue;
            }
            match (effect, runner.instance) {
                (Effect::TendDisks, Some(uid)) => {
                    let desired = runner.state.record().desired.clone();
                    events.push(self.tend_running(core, vm, uid, &desired));
                }
                (Effect::Look, Some(uid)) => events.push(self.standing(core, vm, uid)),
                (
                    Effect::Listen
                    | Effect::Send
                    | Effect::SendMemory
                    | Effect::Continue
                    | Effect::Cancel
                    | Effect::Resume
                    | Effect::Pause,
                    Some(uid),
                ) => {
                    if let Some(step) = runner.state.step(*effect) {
                        events.extend(self.step(core, vm, uid, step));
                    }
                }
                _ => self.perform_one(core, vm, runner, *effect),
            }
        }
        events
    }

    pub(super) fn perform_one(&mut self, core: &mut Core, vm: VmId, runner: &mut Runner, effect: Effect) {
        let desired = runner.state.record().desired.clone();
        let work = core.uid();
        let disks = |disk_work| What::Disks(vm, self.agent_epoch, work, disk_work);
        let delay = core.between(1, 60);
        match effect {
            Effect::Persist | Effect::Reset | Effect::TendDisks | Effect::GoOn => {}
            Effect::Look
            | Effect::Listen
            | Effect::Send
            | Effect::SendMemory
            | Effect::Continue
            | Effect::Cancel
            | Effect::Resume
            | Effect::Pause => {}
            Effect::CancelPrepare | Effect::CancelTend => runner.work = None,
            Effect::TendIdle { .. } => {
                runner.work = Some(work);
                core.after(delay, self.kernel(), self.boot, disks(DiskWork::Tend(Box::new(desired))));
            }
            Effect::Prepare => {
                runner.work = Some(work);
                let delay = if self.slow > 0 { delay + core.between(100, 9000) } else { delay };
                core.after(delay, self.kernel(), self.boot, disks(DiskWork::Make(Box::new(desired))));
            }
            Effect::DeleteDisks => {
                runner.work = Some(work);
                core.after(delay, self.kernel(), self.boot, disks(DiskWork::Delete(Box::new(desired))));
            }
            Effect::Adopt => {
                runner.work = Some(work);
                core.after(delay, self.kernel(), self.boot, disks(DiskWork::Adopt));
            }
            Effect::Launch { incarnation: _, lease_generation } => {
                if !std::mem::take(&mut runner.prepared) {
                    core.check.violation(format!("{vm} is launched and not prepared"));
                }
                runner.work = Some(work);
                let start = Start {
                    vm,
                    uid: core.uid(),
                    agent: (self.agent_epoch, work),
                    incarnation: desired.incarnation,
                    generation: lease_generation,
                    class: desired.class(),
                    disks: self.open_disks(core, vm, &desired),
                    role: runner.state.record().launched.map_or(Role::Executes, |l| l.role),
                };
                // The agent forks, or it does not: a dead one starts nothing.
                self.agent_later(core, delay, What::Spawn(Box::new(start)));
            }
            Effect::PowerDown => {
                if let Some(uid) = runner.instance {
                    core.check.ends(vm, uid, self.id, "asked to power down", self.lease_over(core, vm));
                    // Some guests do not listen.
                    if core.rng.permille(800) {
                        let delay = core.between(100, 4000);
                        core.after(delay, self.kernel(), self.boot, What::Guest(vm, uid, GuestAct::Obey));
                    }
                }
            }
            Effect::Quit => {
                // Now and then QEMU hangs, and is killed later.
                if let (Some(uid), false) = (runner.instance, core.rng.permille(50)) {
                    self.end(core, vm, uid, Death::Exited(0), 2, 100);
                }
            }
            Effect::Kill => {
                if let Some(uid) = runner.instance {
                    core.check.ends(vm, uid, self.id, "killed", self.lease_over(core, vm));
                    self.end(core, vm, uid, Death::Killed, 1, 20);
                }
            }
        }
    }

    fn lease_over(&self, core: &Core, vm: VmId) -> bool {
        self.qemus.get(&vm).is_none_or(|q| !self.word(q.start.class).permits(q.start.generation, self.now(core)))
    }
}

fn ended(runner: &Runner, generations: Generations) -> VmEvent {
    VmEvent::SessionEnded(generations.of(runner.state.record().desired.class()))
}

impl Runner {
    pub(super) fn new(state: VmState, now: Tick) -> Self {
        Self { state, mailbox: Mailbox::default(), work: None, prepared: false, instance: None, now }
    }
}
