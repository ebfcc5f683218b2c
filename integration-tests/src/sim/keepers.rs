//! Keepers and QEMUs on a host, and the kernel's timers that end them.
//!
//! Stands for `agent/src/keeper/` and `agent/src/qemu/process.rs`. The keeper's rules are the real ones (`LeaseWord::permits`,
//! `keeper::{renewal, wake_in}`). A kernel timer kills keeper and QEMU at the deadline on the host's own clock, whoever is stopped, and
//! they die within the kill allowance (A2).

use std::collections::BTreeSet;

use uncloud_agent::{
    keeper::{renewal, wake_in},
    lease::LeaseClass,
    records::Role,
    vm::{
        hypervisor::{Exit, ExitKind},
        migration::Guest,
        state::Event as VmEvent,
    },
};
use uncloud_proto::{
    clock::Tick,
    ids::{Incarnation, VmId},
};

use super::{
    clock::MS,
    core::Core,
    host::{Host, Qemu},
    migrate::Moving,
    queue::{Death, DiskWork, GuestAct, Start, What, Whom},
};

impl Host {
    /// `qemu::process::adopt`
    pub(super) fn adopt(&mut self, core: &mut Core, vm: VmId, epoch: u64, work: u64) {
        match self.qemus.get_mut(&vm) {
            Some(qemu) if qemu.executing => {
                qemu.ready = true; // its end is told to whoever watches it now
                let event = VmEvent::Started(qemu.start.incarnation, qemu.start.generation);
                let uid = Some(qemu.uid);
                self.done(core, vm, (epoch, work), event, uid);
            }
            // Its lock is held by somebody who does not say who he is: asked again.
            Some(_) => {
                let again = What::Disks(vm, epoch, work, DiskWork::Adopt);
                core.after(50 * MS, self.kernel(), self.boot, again);
            }
            None => {
                let killed = |incarnation: &Incarnation| Exit {
                    incarnation: *incarnation,
                    kind: ExitKind::KeeperKilled,
                    at: core.wall(),
                    last_words: String::new(),
                };
                let exit = self.exits.get(&vm).cloned().or_else(|| self.keepers.get(&vm).map(killed));
                self.done(core, vm, (epoch, work), VmEvent::NotFound(exit), None);
            }
        }
    }

    /// The directory of a VM that is over.
    pub(super) fn remove_dir(&mut self, vm: VmId) {
        self.records.remove(&vm);
        self.keepers.remove(&vm);
        self.exits.remove(&vm);
    }

    /// Every VM that has a directory (`VmDirs::load`).
    pub(super) fn dirs(&self) -> BTreeSet<VmId> {
        self.records.keys().chain(self.keepers.keys()).copied().collect()
    }

    /// The keeper begins. From here on it holds the VM's lock, whatever becomes of the agent.
    pub(super) fn spawn(&mut self, core: &mut Core, start: Start) {
        let (vm, uid) = (start.vm, start.uid);
        if self.qemus.contains_key(&vm) {
            // K4
            core.log(format_args!("host {}: a second keeper of {vm} is refused", self.index));
            return self.done(core, vm, start.agent, VmEvent::StartBusy, None);
        }
        self.exits.remove(&vm);
        self.keepers.remove(&vm);
        let qemu = Qemu {
            uid,
            start: start.clone(),
            armed: None,
            executing: false,
            ready: false,
            dying: false,
            paused: 0,
            was_paused: false,
            backlog: Vec::new(),
            disks: start.disks.clone(),
            moving: Moving::new(match start.role {
                Role::Executes => Guest::Executes,
                Role::Incoming => Guest::Awaited,
            }),
        };
        self.qemus.insert(vm, qemu);
        // Now and then it takes so long that the lease is over, or another one, when it looks.
        let delay = if !core.healed && core.rng.permille(30) { core.between(500, 9000) } else { core.latency() };
        core.after(delay, Whom::Keeper(self.index, vm, uid), self.boot, What::Arm(Box::new(start)));
    }

    fn leave_word(&mut self, core: &Core, start: &Start, kind: ExitKind) -> Exit {
        let exit = Exit { incarnation: start.incarnation, kind, at: core.wall(), last_words: String::new() };
        self.exits.insert(start.vm, exit.clone());
        exit
    }

    /// K1: `keeper::run::Fuse::light`
    pub(super) fn arm(&mut self, core: &mut Core, start: Start) {
        let (vm, class) = (start.vm, start.class);
        let (word, now) = (self.word(class), self.now(core));
        if !word.permits(start.generation, now) {
            core.log(format_args!("host {}: the keeper of {vm} refuses: its lease is over", self.index));
            self.leave_word(core, &start, ExitKind::Fenced);
            self.qemus.remove(&vm);
            return self.done(core, vm, start.agent, VmEvent::StartFenced, None);
        }
        if self.failing > 0 || (!core.healed && core.rng.permille(20)) {
            core.stats.fault("QEMU does not start");
            self.leave_word(core, &start, ExitKind::Exited(1));
            self.qemus.remove(&vm);
            return self.done(core, vm, start.agent, VmEvent::StartFailed("QEMU ended at once".into()), None);
        }
        self.keepers.insert(vm, start.incarnation);
        if class != LeaseClass::Hold {
            self.set_timer(core, vm, word.deadline);
            self.follow_later(core, vm);
        }
        let mut delay = core.between(5, 100);
        if self.slow > 0 {
            delay += core.between(100, 5000);
        }
        core.after(delay, self.kernel(), self.boot, What::Execute(Box::new(start)));
    }

    fn set_timer(&mut self, core: &mut Core, vm: VmId, deadline: Tick) {
        let Some(qemu) = self.qemus.get_mut(&vm) else { return };
        qemu.armed = Some(deadline);
        let (uid, at) = (qemu.uid, self.clock.when(deadline, core.now));
        core.at(at, self.kernel(), self.boot, What::Deadline(vm, uid, deadline));
    }

    fn follow_later(&self, core: &mut Core, vm: VmId) {
        let Some(Qemu { uid, armed: Some(armed), .. }) = self.qemus.get(&vm) else { return };
        let wait = self.clock.spans(wake_in(self.now(core), *armed));
        let delay = wait + core.latency();
        core.after(delay, Whom::Keeper(self.index, vm, *uid), self.boot, What::Follow);
    }

    /// K3: `keeper::run::Fuse::follow`
    pub(super) fn follow(&mut self, core: &mut Core, vm: VmId) {
        let Some(Qemu { armed: Some(armed), start, dying: false, .. }) = self.qemus.get(&vm) else { return };
        if let Some(deadline) = renewal(*armed, start.generation, self.word(start.class)) {
            self.set_timer(core, vm, deadline);
        }
        self.follow_later(core, vm);
    }

    /// The clock runs differently now: timers are due at other moments.
    pub(crate) fn set_rate(&mut self, core: &mut Core, rate: u64) {
        self.clock.set_rate(core.now, rate);
        let armed: Vec<(VmId, Tick)> = self.qemus.iter().filter_map(|(vm, q)| Some((*vm, q.armed?))).collect();
        for (vm, deadline) in armed {
            self.set_timer(core, vm, deadline);
        }
    }

    pub(super) fn deadline(&mut self, core: &mut Core, vm: VmId, uid: u64, armed: Tick) {
        let now = self.now(core);
        let Some(qemu) = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && q.armed == Some(armed) && !q.dying) else {
            return;
        };
        if now < armed {
            return self.set_timer(core, vm, armed);
        }
        qemu.dying = true;
        let (was_paused, start) = (qemu.was_paused, qemu.start.clone());
        core.log(format_args!("host {}: the lease of {vm} is over", self.index));
        core.stats.fenced += 1;
        let word = self.word(start.class);
        if word.generation == start.generation && self.renewed_before(start.class, armed) && !was_paused {
            core.check.violation(format!("P3: {vm} is killed though its lease was renewed"));
        }
        // A2: dead within the kill allowance.
        let latency =
            if core.rng.permille(300) { core.rng.range(900 * MS, 990 * MS) } else { core.rng.range(1, 12 * MS) };
        core.after(latency, self.kernel(), self.boot, What::Dead(vm, uid, Death::Deadline));
    }

    pub(super) fn execute(&mut self, core: &mut Core, start: Start) {
        let (vm, uid) = (start.vm, start.uid);
        let Some(qemu) = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && !q.dying) else { return };
        qemu.executing = true;
        core.log(format_args!("host {}: {vm} {:?}, incarnation {}", self.index, start.role, start.incarnation));
        if start.role == Role::Executes {
            self.begins(core, vm);
        }
        self.later_ready(core, start, vm, uid);
    }

    /// The guest begins to execute here.
    pub(super) fn begins(&mut self, core: &mut Core, vm: VmId) {
        let Some(Qemu { uid, start, disks, .. }) = self.qemus.get(&vm) else { return };
        let (uid, start) = (*uid, start.clone());
        let (disks, now) = (disks.clone(), core.now);
        core.check.started(vm, uid, (self.index, self.id), start.incarnation, &disks, now);
        disks.iter().for_each(|open| self.finds(core, vm, open));
        self.writes_later(core, vm, uid);
    }

    fn later_ready(&self, core: &mut Core, start: Start, vm: VmId, uid: u64) {
        let mut delay = core.between(20, 300);
        if self.slow > 0 {
            delay += core.between(100, 8000);
        }
        core.after(delay, self.kernel(), self.boot, What::Ready(Box::new(start)));
        if !core.healed && core.rng.permille(120) {
            let act = core.rng.pick(&[GuestAct::PowerOff, GuestAct::Panic, GuestAct::Crash]);
            let delay = core.between(200, 60_000);
            core.after(delay, self.kernel(), self.boot, What::Guest(vm, uid, act));
        }
    }

    pub(super) fn ready(&mut self, core: &mut Core, start: &Start) {
        if let Some(qemu) = self.qemus.get_mut(&start.vm).filter(|q| q.uid == start.uid && q.executing) {
            qemu.ready = true;
            let event = VmEvent::Started(start.incarnation, start.generation);
            self.done(core, start.vm, start.agent, event, Some(start.uid));
        }
    }

    /// Ends a QEMU after a moment.
    pub(super) fn end(&mut self, core: &mut Core, vm: VmId, uid: u64, death: Death, low: u64, high: u64) {
        let delay = core.between(low, high);
        core.after(delay, self.kernel(), self.boot, What::Dead(vm, uid, death));
    }

    pub(super) fn dead(&mut self, core: &mut Core, vm: VmId, uid: u64, death: Death) {
        if self.qemus.get(&vm).is_none_or(|q| q.uid != uid) {
            return;
        }
        let Some(qemu) = self.qemus.remove(&vm) else { return };
        core.log(format_args!("host {}: {vm} is dead: {death:?}", self.index));
        let kind = match death {
            Death::Deadline | Death::KeeperKilled => ExitKind::KeeperKilled,
            Death::Killed => ExitKind::Signaled(9),
            Death::Exited(code) => ExitKind::Exited(code),
        };
        let exit = match kind {
            // The keeper had no time to leave word.
            ExitKind::KeeperKilled => {
                Exit { incarnation: qemu.start.incarnation, kind, at: core.wall(), last_words: String::new() }
            }
            _ => self.leave_word(core, &qemu.start, kind),
        };
        if qemu.executing && qemu.moving.guest == Guest::Executes {
            core.check.stopped(vm, uid);
        }
        if !qemu.ready {
            // `qemu::process::not_started`
            let over = !self.word(qemu.start.class).permits(qemu.start.generation, self.now(core));
            let event = match death {
                Death::Deadline | Death::KeeperKilled if over => VmEvent::StartFenced,
                _ => VmEvent::StartFailed("the keeper was killed".into()),
            };
            return self.done(core, vm, qemu.start.agent, event, None);
        }
        let delay = core.latency();
        let whom = Whom::Agent(self.index);
        core.after(delay, whom, self.agent_epoch, What::Instance(vm, uid, Box::new(VmEvent::Ended(exit))));
    }

    pub(super) fn guest(&mut self, core: &mut Core, vm: VmId, uid: u64, act: GuestAct) {
        if self.qemus.get(&vm).is_none_or(|q| q.uid != uid || q.dying || !q.executing) {
            return;
        }
        // What stands still does nothing.
        if act != GuestAct::Crash && self.qemus.get(&vm).is_some_and(|q| q.moving.guest != Guest::Executes) {
            return;
        }
        if act == GuestAct::Write {
            self.writes(core, vm);
            return self.writes_later(core, vm, uid);
        }
        if act != GuestAct::Obey && core.healed {
            return;
        }
        core.log(format_args!("host {}: guest of {vm}: {act:?}", self.index));
        if act != GuestAct::Obey {
            core.stats.fault("guest ends by itself");
            core.check.guest_ended(vm, core.now);
        }
        let event = match act {
            GuestAct::PowerOff | GuestAct::Obey => VmEvent::GuestShutdown,
            GuestAct::Panic => VmEvent::GuestPanicked,
            GuestAct::Crash => return self.end(core, vm, uid, Death::Exited(1), 1, 5),
            GuestAct::Write => return,
        };
        core.after(MS, Whom::Agent(self.index), self.agent_epoch, What::Instance(vm, uid, Box::new(event)));
    }

    /// How an incarnation ended that is gone by now.
    pub(super) fn exit_of(&self, core: &Core, vm: VmId, incarnation: Incarnation) -> Exit {
        let killed = || Exit { incarnation, kind: ExitKind::KeeperKilled, at: core.wall(), last_words: String::new() };
        self.exits.get(&vm).filter(|e| e.incarnation == incarnation).cloned().unwrap_or_else(killed)
    }
}
