//! QEMU's live migration, below the agents' real decisions: what a QEMU does when it is told a step, what it says of itself,
//! and the connection between two of them.
//!
//! Stands for `agent/src/qemu/migration.rs` and QEMU. Harder than the real one in what matters for P1: there is no image lock,
//! a step that was told to a QEMU that hangs takes effect later (though the agent was told that it did not), a guest that is
//! told to go on before it has arrived goes on when it arrives, and the acknowledgement of the last piece can be lost: then
//! the source stands still until it is told otherwise, or goes on by itself though the target has everything.

use std::net::SocketAddr;

use uncloud_agent::vm::{
    migration::{Guest, MigrateTo, Mirror, Progress, Standing, Step, Transfer},
    state::Event as VmEvent,
};
use uncloud_proto::ids::VmId;

use super::{
    clock::{MS, Ns},
    contents::Key,
    core::Core,
    host::{Host, Qemu},
    queue::{What, Whom},
};

/// What a QEMU has to do with migrations.
#[derive(Clone, Debug)]
pub(crate) struct Moving {
    /// What its guest does.
    pub(crate) guest: Guest,
    /// How far its newest migration is, as a source or as a target.
    pub(crate) transfer: Transfer,
    /// Which of its own migrations that is, as a source.
    pub(crate) attempt: u64,
    /// Where it is sent.
    pub(crate) to: Option<(usize, u16)>,
    /// As a target: it takes a connection.
    pub(crate) listens: bool,
    /// As a target: it takes disks, too.
    pub(crate) takes_disks: bool,
    /// It was told to go on before it had arrived.
    pub(crate) autostart: bool,
    /// How far the copying of its disks is, as a source.
    pub(crate) mirror: Mirror,
    /// It takes nothing and says nothing until then.
    pub(crate) hung_until: Ns,
}

impl Moving {
    /// Of a QEMU that has just been started.
    pub(crate) const fn new(guest: Guest) -> Self {
        Self {
            guest,
            transfer: Transfer::None,
            attempt: 0,
            to: None,
            listens: false,
            takes_disks: false,
            autostart: false,
            mirror: Mirror::None,
            hung_until: 0,
        }
    }
}

/// What goes from one QEMU to another, or from a QEMU to itself, later.
#[derive(Clone, Debug)]
pub(crate) enum Wire {
    /// A step takes effect.
    Step(Step),
    /// So many disks have been copied, or could not be.
    Copied(usize, bool),
    /// The source has sent everything but the last.
    Ready(u64),
    /// The target gets the last, from this host's VM with this uid and attempt, and what is on its disks.
    Last(u16, usize, u64, u64, Vec<(Key, u64)>),
    /// The source hears whether the target has everything.
    Acknowledged(u64, bool),
}

const fn port(uid: u64) -> u16 {
    (uid % 60_000) as u16 + 1000
}

impl Host {
    /// `Hypervisor::step`
    pub(super) fn step(&mut self, core: &mut Core, vm: VmId, uid: u64, step: Step) -> Option<VmEvent> {
        core.log(format_args!("host {}: {vm}: {step:?}", self.index));
        let (hangs, fails) = (!core.healed && core.rng.permille(30), !core.healed && core.rng.permille(15));
        let qemu = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && q.executing && !q.dying)?;
        if hangs {
            core.stats.fault("QEMU hangs");
            qemu.moving.hung_until = qemu.moving.hung_until.max(core.now + core.rng.range(MS, 9000 * MS));
        }
        let until = qemu.moving.hung_until;
        if core.now < until {
            // A `stop` that takes effect late is not modelled: no agent hears of it.
            if step == Step::Pause {
                return Some(VmEvent::StepFailed("QEMU does not answer".into()));
            }
            let wire = What::Wire(vm, uid, Wire::Step(step));
            core.at(until, self.kernel(), self.boot, wire);
            return Some(VmEvent::StepFailed("QEMU does not answer".into()));
        }
        if fails {
            core.stats.fault("QEMU refuses a step");
            return Some(VmEvent::StepFailed("QEMU refuses".into()));
        }
        self.take_step(core, vm, uid, step);
        None
    }

    /// `Instance::standing`
    pub(super) fn standing(&self, core: &Core, vm: VmId, uid: u64) -> VmEvent {
        let qemu = self.qemus.get(&vm).filter(|q| q.uid == uid && q.executing && core.now >= q.moving.hung_until);
        VmEvent::Stands(qemu.map(|q| {
            let address = SocketAddr::from(([10, 0, 0, self.index as u8], port(q.uid)));
            Box::new(Standing {
                guest: q.moving.guest,
                transfer: q.moving.transfer,
                address: (q.moving.listens && q.moving.guest == Guest::Awaited).then_some(address),
                disks_address: (q.moving.listens && q.moving.guest == Guest::Awaited && q.moving.takes_disks)
                    .then_some(address),
                mirror: q.moving.mirror.clone(),
                progress: Progress::default(),
                problem: String::new(),
            })
        }))
    }

    fn take_step(&mut self, core: &mut Core, vm: VmId, uid: u64, step: Step) {
        let (kernel, boot) = (self.kernel(), self.boot);
        let Some(qemu) = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && q.executing && !q.dying) else { return };
        let moving = &mut qemu.moving;
        match step {
            Step::Listen { disks, .. } => (moving.listens, moving.takes_disks) = (true, !disks.copied.is_empty()),
            Step::Send(MigrateTo { disks: Some(disks), .. }) => {
                moving.mirror = Mirror::Copying;
                let fails = !core.healed && core.rng.permille(50);
                let delay = core.between(20, 3000);
                core.after(delay, kernel, boot, What::Wire(vm, uid, Wire::Copied(disks.nodes.copied.len(), !fails)));
            }
            Step::Send(MigrateTo { address, disks: None, .. }) | Step::SendMemory(MigrateTo { address, .. }) => {
                if moving.guest != Guest::Executes
                    || matches!(moving.transfer, Transfer::Active | Transfer::Ready | Transfer::Last)
                {
                    return;
                }
                let std::net::IpAddr::V4(ip) = address.ip() else { return };
                moving.attempt += 1;
                moving.transfer = Transfer::Active;
                moving.to = Some((usize::from(ip.octets()[3]), address.port()));
                let wire = What::Wire(vm, uid, Wire::Ready(moving.attempt));
                core.stats.migrations_begun += 1;
                let delay = core.between(20, 3000);
                core.after(delay, kernel, boot, wire);
            }
            Step::Continue(_) => {
                let (Transfer::Ready, Some((host, port))) = (moving.transfer, moving.to) else { return };
                // `qemu::mirror::finish`
                match moving.mirror {
                    Mirror::None | Mirror::Ready(_) => moving.mirror = Mirror::None,
                    Mirror::Copying | Mirror::Failed(_) => return,
                }
                moving.transfer = Transfer::Last;
                let attempt = moving.attempt;
                let last = Wire::Last(port, self.index, uid, attempt, self.on_disks(core, vm));
                let wire = What::Wire(vm, 0, last);
                if core.healed || !core.rng.permille(50) {
                    let delay = core.between(1, 40);
                    core.after(delay, Whom::Kernel(host), u64::MAX, wire);
                } else {
                    core.stats.fault("the last of a migration is lost");
                }
            }
            Step::Cancel => {
                moving.mirror = Mirror::None;
                if matches!(moving.transfer, Transfer::Active | Transfer::Ready | Transfer::Last) {
                    moving.transfer = Transfer::Cancelled;
                    self.goes_on(core, vm);
                }
            }
            Step::Resume => match moving.guest {
                Guest::Awaited => moving.autostart = true,
                Guest::Sent | Guest::Still => self.goes_on(core, vm),
                Guest::Executes | Guest::Off | Guest::Panicked => {}
            },
            Step::Pause => {
                if moving.guest == Guest::Executes {
                    core.stats.paused += 1;
                    self.stands_still(core, vm, Guest::Still);
                }
            }
        }
    }

    /// Something comes to a QEMU.
    pub(super) fn wire(&mut self, core: &mut Core, vm: VmId, uid: u64, wire: Wire) {
        match wire {
            Wire::Step(step) => {
                core.log(format_args!("host {}: {vm}: {step:?} takes effect late", self.index));
                self.take_step(core, vm, uid, step);
                self.moved(core, vm);
            }
            Wire::Copied(count, well) => {
                let Some(qemu) = self.qemus.get_mut(&vm).filter(|q| q.uid == uid && !q.dying) else { return };
                if qemu.moving.mirror == Mirror::Copying {
                    qemu.moving.mirror =
                        if well { Mirror::Ready(count) } else { Mirror::Failed("the connection broke".into()) };
                }
            }
            Wire::Ready(attempt) => {
                let failed = !core.healed && core.rng.permille(50);
                let Some(qemu) = self.sending(vm, uid, attempt, Transfer::Active) else { return };
                if failed {
                    core.stats.fault("sending fails");
                    qemu.moving.transfer = Transfer::Failed;
                } else {
                    qemu.moving.transfer = Transfer::Ready;
                    self.stands_still(core, vm, Guest::Still);
                }
                self.moved(core, vm);
            }
            Wire::Last(to, host, source, attempt, disks) => {
                let found = self.qemus.get(&vm).is_some_and(|q| {
                    port(q.uid) == to && q.moving.listens && q.moving.guest == Guest::Awaited && q.executing && !q.dying
                });
                if found {
                    self.take_disks(core, vm, &disks);
                }
                if found && let Some(qemu) = self.qemus.get_mut(&vm) {
                    qemu.moving.guest = Guest::Still;
                    qemu.moving.transfer = Transfer::Completed;
                    core.log(format_args!("host {}: {vm} has arrived", self.index));
                    if qemu.moving.autostart {
                        self.goes_on(core, vm);
                    }
                    self.moved(core, vm);
                }
                // A connection that breaks here lets the source go on by itself, though the target has everything.
                let lost = !core.healed && core.rng.permille(100);
                let breaks = lost && core.rng.permille(500);
                if lost {
                    core.stats.fault("the acknowledgement of a migration is lost");
                }
                if !lost || breaks {
                    let delay = if breaks { core.between(1, 1000) } else { core.between(1, 40) };
                    let wire = What::Wire(vm, source, Wire::Acknowledged(attempt, found && !breaks));
                    core.after(delay, Whom::Kernel(host), u64::MAX, wire);
                }
            }
            Wire::Acknowledged(attempt, has_it) => {
                let Some(qemu) = self.sending(vm, uid, attempt, Transfer::Last) else { return };
                if has_it {
                    qemu.moving.transfer = Transfer::Completed;
                    qemu.moving.guest = Guest::Sent;
                } else {
                    qemu.moving.transfer = Transfer::Failed;
                    self.goes_on(core, vm);
                }
                self.moved(core, vm);
            }
        }
    }

    /// What is on the disks of a VM.
    fn on_disks(&mut self, core: &mut Core, vm: VmId) -> Vec<(Key, u64)> {
        let disks = self.qemus.get(&vm).map(|q| q.disks.clone()).unwrap_or_default();
        disks.into_iter().filter_map(|open| Some((open.key, self.file(core, &open.path)?.count))).collect()
    }

    /// The target of a VM that takes its disks along has what the source had.
    fn take_disks(&mut self, core: &mut Core, vm: VmId, sent: &[(Key, u64)]) {
        let Some(qemu) = self.qemus.get(&vm).filter(|q| q.moving.takes_disks) else { return };
        for open in qemu.disks.clone() {
            let count = sent.iter().find(|(key, _)| *key == open.key).map(|(_, count)| *count);
            if let (Some(count), Some(file)) = (count, self.file(core, &open.path)) {
                file.count = count;
            }
        }
    }

    fn sending(&mut self, vm: VmId, uid: u64, attempt: u64, transfer: Transfer) -> Option<&mut Qemu> {
        let is = |q: &&mut Qemu| {
            q.uid == uid && q.executing && !q.dying && (q.moving.attempt, q.moving.transfer) == (attempt, transfer)
        };
        self.qemus.get_mut(&vm).filter(is)
    }

    fn stands_still(&mut self, core: &mut Core, vm: VmId, how: Guest) {
        let Some(qemu) = self.qemus.get_mut(&vm) else { return };
        qemu.moving.guest = how;
        core.check.stands_still(vm, qemu.uid);
    }

    /// The guest executes from here on.
    fn goes_on(&mut self, core: &mut Core, vm: VmId) {
        let Some(qemu) = self.qemus.get_mut(&vm) else { return };
        if qemu.moving.guest != Guest::Executes {
            qemu.moving.guest = Guest::Executes;
            core.log(format_args!("host {}: {vm} goes on", self.index));
            self.begins(core, vm);
        }
    }

    /// QEMU's event. Some get lost, as when no connection stands.
    fn moved(&self, core: &mut Core, vm: VmId) {
        let Some(uid) = self.qemus.get(&vm).map(|q| q.uid) else { return };
        if core.rng.permille(800) {
            let delay = core.latency();
            let what = What::Instance(vm, uid, Box::new(VmEvent::MigrationMoved));
            core.after(delay, Whom::Agent(self.index), self.agent_epoch, what);
        }
    }
}
