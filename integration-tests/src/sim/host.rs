//! A host: its kernel, its disks, keepers and QEMUs. They go on when the agent is stopped or dead.
//!
//! Stands for `agent/src/keeper/`, `agent/src/qemu/process.rs` and `agent/src/storage/`. The keeper's rules are the real ones
//! (`LeaseWord::permits`, `keeper::{renewal, wake_in}`). A kernel timer kills keeper and QEMU at the deadline on the host's
//! own clock, whoever is stopped, and they die within the kill allowance (A2).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use uncloud_agent::{
    keeper::{renewal, wake_in},
    lease::{LeaseClass, LeaseWord},
    records::Record,
    vm::{
        desired::{Desired, DisksExpected},
        hypervisor::{Exit, ExitKind},
        mailbox::Generations,
        state::Event as VmEvent,
    },
};
use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, Term, VmId},
};
use uuid::Uuid;

use super::{
    agent::Agent,
    clock::{MS, NodeClock, SEC},
    core::Core,
    net::AGENT,
    queue::{Death, DiskWork, Event, GuestAct, Start, What, Whom},
};

/// A keeper and its QEMU.
#[derive(Debug)]
pub(crate) struct Qemu {
    /// This start.
    pub(crate) uid: u64,
    /// What it is.
    pub(crate) start: Start,
    /// When the kernel kills it. `None`: never (class hold), or not armed yet.
    pub(crate) armed: Option<Tick>,
    /// The guest executes.
    pub(crate) executing: bool,
    /// QEMU has answered on QMP.
    pub(crate) ready: bool,
    /// The kernel has been told to kill it.
    pub(crate) dying: bool,
    /// Faults that stop the keeper.
    pub(crate) paused: u32,
    /// The keeper has been stopped at some time.
    pub(crate) was_paused: bool,
    /// What waits for the keeper.
    pub(crate) backlog: Vec<Event>,
}

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its place in the world.
    pub(crate) index: usize,
    /// Its id.
    pub(crate) id: HostId,
    /// Its clock.
    pub(crate) clock: NodeClock,
    /// It has power.
    pub(crate) powered: bool,
    /// Which boot.
    pub(crate) boot: u64,
    /// The same for the leader.
    pub(crate) boot_id: Uuid,
    /// The lease file as processes see it: fast, patient.
    pub(crate) words: [LeaseWord; 2],
    /// The lease file as it survives a power cut.
    flushed: [LeaseWord; 2],
    words_boot: Uuid,
    /// When the deadlines moved, and to where.
    moves: [VecDeque<(Tick, Tick)>; 2],
    /// `record.json` of each VM.
    pub(crate) records: BTreeMap<VmId, Record>,
    /// `agent.json`
    pub(crate) term: Term,
    /// `keeper.json` of each VM.
    keepers: BTreeMap<VmId, Incarnation>,
    /// `exit.json` of each VM.
    exits: BTreeMap<VmId, Exit>,
    /// What has a process.
    pub(crate) qemus: BTreeMap<VmId, Qemu>,
    disks: BTreeSet<(VmId, u32)>,
    /// The agent's process.
    pub(crate) agent: Option<Box<Agent>>,
    /// Which of its lives.
    pub(crate) agent_epoch: u64,
    /// Faults that stop the agent.
    pub(crate) agent_paused: u32,
    /// Faults that fill the disk of the state directory and the local pool.
    pub(crate) disk_full: u32,
    /// Faults that make starts slow.
    pub(crate) slow: u32,
    /// Faults that make starts fail.
    pub(crate) failing: u32,
    /// The id of the shared pool that it has mounted.
    pub(crate) shared_pool: Uuid,
}

impl Host {
    /// A host without power.
    pub(crate) fn new(core: &mut Core, index: usize, shared_pool: Uuid) -> Self {
        let over = LeaseWord { generation: 0, deadline: Tick::ZERO };
        Self {
            index,
            id: HostId::from_uuid(core.rng.uuid()),
            clock: NodeClock::new(0, 0, super::clock::RIGHT),
            powered: false,
            boot: 0,
            boot_id: Uuid::nil(),
            words: [over; 2],
            flushed: [over; 2],
            words_boot: Uuid::nil(),
            moves: Default::default(),
            records: BTreeMap::new(),
            term: Term::default(),
            keepers: BTreeMap::new(),
            exits: BTreeMap::new(),
            qemus: BTreeMap::new(),
            disks: BTreeSet::new(),
            agent: None,
            agent_epoch: 0,
            agent_paused: 0,
            disk_full: 0,
            slow: 0,
            failing: 0,
            shared_pool,
        }
    }

    /// Its own clock.
    #[must_use]
    pub(crate) fn now(&self, core: &Core) -> Tick {
        self.clock.tick(core.now)
    }

    /// The lease of a class.
    #[must_use]
    pub(crate) fn word(&self, class: LeaseClass) -> LeaseWord {
        match class {
            LeaseClass::Fast => self.words[0],
            LeaseClass::Patient => self.words[1],
            LeaseClass::Hold => LeaseWord::FOREVER,
        }
    }

    /// `LeaseFile::renew`
    pub(crate) fn renew(&mut self, core: &mut Core, class: LeaseClass, deadline: Tick, now: Tick) -> LeaseWord {
        let i = match class {
            LeaseClass::Fast => 0,
            LeaseClass::Patient => 1,
            LeaseClass::Hold => return LeaseWord::FOREVER,
        };
        let word = self.words[i].renewed(deadline, now);
        if word != self.words[i] {
            self.moves[i].push_back((now, word.deadline));
            if self.moves[i].len() > 128 {
                self.moves[i].pop_front();
            }
        }
        self.words[i] = word;
        // The kernel writes mapped pages back when it likes.
        if core.rng.permille(200) {
            self.flushed = self.words;
        }
        word
    }

    /// Whether the lease went beyond `armed` so long before that its keeper must have seen it: it looks for the last time
    /// some 50 ms before the deadline, and what comes after that comes too late.
    fn renewed_before(&self, class: LeaseClass, armed: Tick) -> bool {
        let moves = match class {
            LeaseClass::Fast => &self.moves[0],
            LeaseClass::Patient => &self.moves[1],
            LeaseClass::Hold => return false,
        };
        let first = moves.iter().find(|(_, deadline)| *deadline > armed);
        first.is_some_and(|(at, _)| armed.since(*at) > Duration::from_millis(250))
    }

    /// `Manager::generations`
    #[must_use]
    pub(crate) fn generations(&self) -> Generations {
        Generations { fast: self.words[0].generation, patient: self.words[1].generation }
    }

    pub(super) fn kernel(&self) -> Whom {
        Whom::Kernel(self.index)
    }

    /// The power comes back, and the agent is started.
    pub(crate) fn power_on(&mut self, core: &mut Core) {
        if self.powered {
            return;
        }
        self.powered = true;
        self.boot += 1;
        self.boot_id = core.rng.uuid();
        let rate = core.clock_rate();
        self.clock = NodeClock::new(core.now, 5 * SEC, rate);
        core.log(format_args!("host {} boots, its clock runs at {rate}", self.index));
        self.start_agent(core);
    }

    /// The power is cut.
    pub(crate) fn power_off(&mut self, core: &mut Core) {
        if !self.powered {
            return;
        }
        core.log(format_args!("host {} loses its power", self.index));
        self.powered = false;
        self.boot += 1;
        for (vm, qemu) in std::mem::take(&mut self.qemus) {
            if qemu.executing {
                core.check.stopped(vm, qemu.uid);
            }
        }
        self.agent = None;
        self.agent_epoch += 1;
        self.words = self.flushed;
        self.moves = Default::default();
        for stream in core.streams_of(AGENT, self.index) {
            core.vanish(stream);
        }
    }

    /// `LeaseFile::open`
    pub(super) fn open_lease(&mut self) {
        if self.words_boot != self.boot_id {
            self.words = self.words.map(LeaseWord::after_reboot);
            self.flushed = self.words;
            self.words_boot = self.boot_id;
        }
    }

    /// What happens in the kernel, to keepers and to QEMUs.
    pub(crate) fn on_kernel(&mut self, core: &mut Core, what: What) {
        match what {
            What::Disks(vm, epoch, work, DiskWork::Make(desired)) => {
                let event = match self.make_disks(core, vm, &desired) {
                    Ok(()) => VmEvent::Prepared,
                    Err(problem) => VmEvent::PrepareFailed(problem),
                };
                self.done(core, vm, (epoch, work), event, None);
            }
            What::Disks(vm, epoch, work, DiskWork::Delete(desired)) => {
                let event = self.delete_disks(core, vm, &desired);
                self.done(core, vm, (epoch, work), event, None);
            }
            What::Disks(vm, epoch, work, DiskWork::Adopt) => self.adopt(core, vm, epoch, work),
            What::Execute(start) => self.execute(core, *start),
            What::Ready(start) => self.ready(core, &start),
            What::Deadline(vm, uid, armed) => self.deadline(core, vm, uid, armed),
            What::Dead(vm, uid, death) => self.dead(core, vm, uid, death),
            What::Guest(vm, uid, act) => self.guest(core, vm, uid, act),
            _ => {}
        }
    }

    /// What happens to a keeper.
    pub(crate) fn on_keeper(&mut self, core: &mut Core, vm: VmId, what: What) {
        match what {
            What::Arm(start) => self.arm(core, *start),
            What::Follow => self.follow(core, vm),
            _ => {}
        }
    }

    /// Work of this life of the agent is done.
    fn done(&self, core: &mut Core, vm: VmId, (epoch, work): (u64, u64), event: VmEvent, uid: Option<u64>) {
        let delay = core.latency();
        core.after(delay, Whom::Agent(self.index), epoch, What::Done(vm, work, Box::new(event), uid));
    }

    // --- disks ---

    fn has_disk(&self, core: &Core, pool: &str, vm: VmId, generation: u32) -> bool {
        match pool {
            "shared" => core.shared_disks.get(&self.shared_pool).is_some_and(|d| d.contains(&(vm, generation))),
            _ => self.disks.contains(&(vm, generation)),
        }
    }

    /// `storage::disks::{check_expected, make}`
    fn make_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> Result<(), String> {
        let pools = pools(desired);
        for pool in &pools {
            if self.has_disk(core, pool, vm, desired.disk_generation) {
                continue;
            }
            if desired.disks == DisksExpected::Exist {
                return Err(format!("a disk is missing in pool {pool}"));
            }
            if self.disk_full > 0 {
                return Err("no space left on device".into());
            }
            match pool.as_str() {
                "shared" => {
                    core.shared_disks.entry(self.shared_pool).or_default().insert((vm, desired.disk_generation));
                }
                _ => {
                    self.disks.insert((vm, desired.disk_generation));
                }
            }
        }
        Ok(())
    }

    fn delete_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        if self.failing > 0 {
            return VmEvent::DeleteFailed("the pool hangs".into());
        }
        core.log(format_args!("host {}: the disks of {vm} are deleted", self.index));
        if self.qemus.get(&vm).is_some_and(|q| q.executing) {
            core.check.violation(format!("P5: the disks of {vm} are deleted while it executes"));
        }
        core.check.disks_deleted(vm);
        for pool in pools(desired) {
            match pool.as_str() {
                "shared" => {
                    if let Some(disks) = core.shared_disks.get_mut(&self.shared_pool) {
                        disks.retain(|(id, generation)| *id != vm || *generation > desired.disk_generation);
                    }
                }
                _ => self.disks.retain(|(id, generation)| *id != vm || *generation > desired.disk_generation),
            }
        }
        VmEvent::DisksDeleted
    }

    // --- keepers and QEMUs ---

    /// `qemu::process::adopt`
    fn adopt(&mut self, core: &mut Core, vm: VmId, epoch: u64, work: u64) {
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
    fn arm(&mut self, core: &mut Core, start: Start) {
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
    fn follow(&mut self, core: &mut Core, vm: VmId) {
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

    fn deadline(&mut self, core: &mut Core, vm: VmId, uid: u64, armed: Tick) {
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

    fn execute(&mut self, core: &mut Core, start: Start) {
        let (vm, uid) = (start.vm, start.uid);
        let Some(qemu) = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && !q.dying) else { return };
        qemu.executing = true;
        core.log(format_args!("host {}: {vm} executes, incarnation {}", self.index, start.incarnation));
        let disks = start.pools.iter().map(|pool| match pool.as_str() {
            "shared" => (self.shared_pool, start.disk_generation),
            _ => (self.id.uuid(), start.disk_generation),
        });
        let (disks, now) = (disks.collect(), core.now);
        core.check.started(vm, uid, self.index, self.id, start.incarnation, disks, now);
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

    fn ready(&mut self, core: &mut Core, start: &Start) {
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

    fn dead(&mut self, core: &mut Core, vm: VmId, uid: u64, death: Death) {
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
        if qemu.executing {
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

    fn guest(&mut self, core: &mut Core, vm: VmId, uid: u64, act: GuestAct) {
        if self.qemus.get(&vm).is_none_or(|q| q.uid != uid || q.dying || !q.executing) {
            return;
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
        };
        core.after(MS, Whom::Agent(self.index), self.agent_epoch, What::Instance(vm, uid, Box::new(event)));
    }
}

/// The pools of a VM's disks.
#[must_use]
pub(crate) fn pools(desired: &Desired) -> Vec<String> {
    desired.spec.iter().flat_map(|s| s.disks.iter().map(|d| d.pool.clone())).collect()
}

impl Host {
    /// How an incarnation ended that is gone by now.
    pub(super) fn exit_of(&self, core: &Core, vm: VmId, incarnation: Incarnation) -> Exit {
        let killed = || Exit { incarnation, kind: ExitKind::KeeperKilled, at: core.wall(), last_words: String::new() };
        self.exits.get(&vm).filter(|e| e.incarnation == incarnation).cloned().unwrap_or_else(killed)
    }
}
