//! A host: its kernel, its disks, keepers and QEMUs. They go on when the agent is stopped or dead.
//!
//! Stands for `agent/src/keeper/`, `agent/src/qemu/process.rs` and `agent/src/storage/`. The keeper's rules are the real ones
//! (`LeaseWord::permits`, `keeper::{renewal, wake_in}`). A kernel timer kills keeper and QEMU at the deadline on the host's
//! own clock, whoever is stopped, and they die within the kill allowance (A2).

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use uncloud_agent::{
    lease::{LeaseClass, LeaseWord},
    records::Record,
    storage::pools::Pool,
    vm::{hypervisor::Exit, mailbox::Generations, migration::Guest, state::Event as VmEvent},
};
use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, Term, VmId},
};
use uuid::Uuid;

use super::{
    agent::Agent,
    clock::{NodeClock, SEC},
    core::Core,
    migrate::Moving,
    net::AGENT,
    queue::{DiskWork, Event, Start, What, Whom},
    storage::{self, Files, Open},
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
    /// QEMU is there. Its guest executes, unless it is or was part of a migration.
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
    /// What it has to do with migrations.
    pub(crate) moving: Moving,
    /// The disks that it has.
    pub(crate) disks: Vec<Open>,
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
    pub(super) keepers: BTreeMap<VmId, Incarnation>,
    /// `exit.json` of each VM.
    pub(super) exits: BTreeMap<VmId, Exit>,
    /// What has a process.
    pub(crate) qemus: BTreeMap<VmId, Qemu>,
    /// The files in its own pool.
    pub(super) files: Files,
    /// The pools that its agent is configured with.
    pub(super) pools: BTreeMap<String, Pool>,
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
            files: Files::new(),
            pools: storage::pools(),
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
            let written = self.clock.tick(core.now); // `now` was perhaps read long before
            self.moves[i].push_back((written, word.deadline));
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
    pub(super) fn renewed_before(&self, class: LeaseClass, armed: Tick) -> bool {
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
            if qemu.executing && qemu.moving.guest == Guest::Executes {
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
            What::Disks(vm, epoch, work, DiskWork::Make(desired)) => self.prepare(core, vm, (epoch, work), &desired),
            What::Disks(vm, epoch, work, DiskWork::Delete(desired)) => {
                let event = self.delete_disks(core, vm, &desired);
                self.done(core, vm, (epoch, work), event, None);
            }
            What::Disks(vm, epoch, work, DiskWork::Tend(_)) if self.is_ended(vm, epoch, work) => {}
            What::Disks(vm, epoch, work, DiskWork::Tend(desired)) => {
                let event = self.tend(core, vm, &desired);
                self.done(core, vm, (epoch, work), event, None);
            }
            What::Disks(vm, epoch, work, DiskWork::Adopt) => self.adopt(core, vm, epoch, work),
            What::Execute(start) => self.execute(core, *start),
            What::Ready(start) => self.ready(core, &start),
            What::Deadline(vm, uid, armed) => self.deadline(core, vm, uid, armed),
            What::Dead(vm, uid, death) => self.dead(core, vm, uid, death),
            What::Guest(vm, uid, act) => self.guest(core, vm, uid, act),
            What::Wire(vm, uid, wire) => self.wire(core, vm, uid, wire),
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
    pub(super) fn done(&self, core: &mut Core, vm: VmId, (epoch, work): (u64, u64), event: VmEvent, uid: Option<u64>) {
        let delay = core.latency();
        core.after(delay, Whom::Agent(self.index), epoch, What::Done(vm, work, Box::new(event), uid));
    }
}
