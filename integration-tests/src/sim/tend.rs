//! What is done to the disks of a VM that is there: snapshots taken, removed and put back, and disks that come and go, of what executes
//! and of what does not.
//!
//! Stands for `agent/src/storage/{snapshots,attached}.rs` (`qemu-img`), `agent/src/qemu/{disks,hotplug}.rs` (QEMU itself), and
//! `Qemu::change_disks`. There is no image lock.

use uncloud_agent::{
    storage::plan,
    vm::{
        desired::{Desired, Disk, DiskBus, DiskState},
        disks::{Revert, Wanted},
        migration::Guest,
        state::Event as VmEvent,
    },
};
use uncloud_proto::ids::VmId;

use super::{
    clock::MS,
    contents::Contents,
    core::Core,
    faults::Healing,
    host::{Host, Qemu},
    queue::{DiskWork, What, Whom},
    storage::{Open, key_of, words},
};

impl Host {
    /// The guest finds what is on a disk, and writes to it.
    pub(super) fn finds(&mut self, core: &mut Core, vm: VmId, open: &Open) {
        let wrote = core.uid();
        let Some(file) = self.file(core, &open.path) else { return };
        let found = std::mem::replace(&mut file.count, wrote);
        core.check.began(vm, (&open.key, open.place), (found, wrote));
    }

    /// The guest writes to all disks that its machine has.
    pub(super) fn writes(&mut self, core: &mut Core, vm: VmId) {
        let Some(qemu) = self.qemus.get(&vm).filter(|q| q.executing && q.moving.guest == Guest::Executes) else {
            return;
        };
        let (incarnation, disks) = (qemu.start.incarnation, qemu.disks.clone());
        for open in disks {
            let count = core.uid();
            if let Some(file) = self.file(core, &open.path) {
                file.count = count;
                core.check.note(|c| c.contents.wrote(vm, &open.key, open.place, incarnation, count));
            }
        }
    }

    /// `Hypervisor::tend_disks`
    pub(super) fn tend_running(&mut self, core: &mut Core, vm: VmId, uid: u64, desired: &Desired) -> VmEvent {
        let hangs = |q: &Qemu| core.now < q.moving.hung_until;
        if self.qemus.get(&vm).is_none_or(|q| q.uid != uid || !q.executing || q.dying || hangs(q)) {
            return VmEvent::TendFailed("QEMU does not answer".into());
        }
        self.writes(core, vm);
        if !desired.orders.disks.is_empty()
            && let Err(problem) = self.change_disks(core, vm, desired)
        {
            return VmEvent::TendFailed(problem);
        }
        let event = self.snapshots(core, vm, desired);
        self.writes(core, vm);
        event
    }

    /// `Qemu::change_disks`
    fn change_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> Result<(), String> {
        self.make_attached(core, vm, desired)?;
        for disk in desired.spec.iter().flat_map(|s| &s.disks) {
            match disk.state {
                DiskState::Attached | DiskState::Detached => {}
                DiskState::Attaching | DiskState::Returning => self.plug(core, vm, desired, disk)?,
                DiskState::Detaching | DiskState::Deleting => self.unplug(core, vm, desired, disk)?,
            }
        }
        let paths = self.files_to_drop(vm, desired)?;
        if !paths.is_empty() && !core.healed && core.rng.permille(150) {
            // The agent is stopped right here, and takes this last step when it goes on, whatever has become of the VM by then.
            core.stats.fault("agent stopped in the middle of an order");
            core.log(format_args!(
                "fault: the agent of host {} is stopped before it deletes files of {vm}",
                self.index
            ));
            self.agent_paused += 1;
            let delay = core.between(500, 25_000);
            core.after(delay, Whom::World, 0, What::Heal(Healing::AgentThaw(self.index)));
            let work = What::Disks(vm, self.agent_epoch, 0, DiskWork::Drop(paths));
            core.after(0, Whom::Agent(self.index), self.agent_epoch, work);
            return Err("it was interrupted".into());
        }
        self.drop_files(core, vm, &paths);
        Ok(())
    }

    /// `qemu::hotplug::plug`
    fn plug(&mut self, core: &mut Core, vm: VmId, desired: &Desired, disk: &Disk) -> Result<(), String> {
        let key = key_of(desired, &disk.name);
        let path = plan::disks(vm, desired, &self.pools).map_err(|p| words(&p))?;
        let path = path.into_iter().find(|d| d.name == disk.name).ok_or("it is not in the machine")?.path;
        let open = Open { key, place: self.place(&path), path };
        let Some(qemu) = self.qemus.get_mut(&vm) else { return Err("QEMU is gone".into()) };
        if qemu.disks.contains(&open) {
            return Ok(());
        }
        if disk.bus != DiskBus::Scsi {
            return Err("it comes only when the VM is stopped and started again".into());
        }
        core.log(format_args!("host {}: {vm} has disk {}", self.index, disk.name));
        core.stats.attached += 1;
        qemu.disks.push(open.clone());
        let (uid, executes) = (qemu.uid, qemu.moving.guest == Guest::Executes);
        self.judge_cache(core, vm, disk);
        core.check.opened(vm, uid, &self.qemus[&vm].disks);
        if executes {
            self.finds(core, vm, &open);
        }
        Ok(())
    }

    /// `qemu::hotplug::unplug`
    fn unplug(&mut self, core: &mut Core, vm: VmId, desired: &Desired, disk: &Disk) -> Result<(), String> {
        let key = key_of(desired, &disk.name);
        let Some(qemu) = self.qemus.get_mut(&vm) else { return Err("QEMU is gone".into()) };
        let Some(index) = qemu.disks.iter().position(|d| d.key == key) else { return Ok(()) };
        if disk.bus != DiskBus::Scsi {
            return Err("it goes only when the VM is stopped and started again".into());
        }
        if !core.healed && core.rng.permille(100) {
            core.stats.fault("a machine does not let go of a disk");
            return Err("the machine does not let go of it".into());
        }
        core.log(format_args!("host {}: {vm} has no disk {} any more", self.index, disk.name));
        qemu.disks.remove(index);
        core.check.opened(vm, qemu.uid, &qemu.disks);
        Ok(())
    }

    /// `Storage::tend`
    pub(super) fn tend(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        let changed = self.make_attached(core, vm, desired).and_then(|()| self.files_to_drop(vm, desired));
        match changed {
            Ok(paths) => self.drop_files(core, vm, &paths),
            Err(problem) => return VmEvent::TendFailed(problem),
        }
        self.snapshots(core, vm, desired)
    }

    /// Takes and removes snapshots, and puts disks back, as ordered.
    fn snapshots(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        let orders = &desired.orders;
        if !core.healed && core.rng.permille(30) && !orders.is_empty() {
            core.stats.fault("qemu-img fails");
            return VmEvent::TendFailed("qemu-img failed".into());
        }
        if orders.snapshots.is_empty() && orders.revert.is_none() {
            return VmEvent::DisksTended(orders.done());
        }
        let disks = match plan::disks(vm, desired, &self.pools) {
            Ok(disks) => disks,
            Err(problem) => return VmEvent::TendFailed(problem.to_string()),
        };
        if let Some(disk) = disks.iter().find(|d| self.file(core, &d.path).is_none()) {
            return VmEvent::TendFailed(format!("disk {} is missing in pool {}", disk.name, disk.pool));
        }
        for disk in disks {
            let key = key_of(desired, &disk.name);
            for order in &orders.snapshots {
                let Some(file) = self.file(core, &disk.path) else { continue };
                match order.wanted {
                    Wanted::There => {
                        let count = *file.snapshots.entry(order.id).or_insert(file.count);
                        core.check.note(|c| c.contents.taken(vm, &key, order.id, count));
                    }
                    Wanted::Gone => {
                        if file.snapshots.remove(&order.id).is_some() {
                            core.check.removed_snapshot(vm, order.id);
                        }
                    }
                }
            }
            if let Some(Revert { snapshot, number }) = orders.revert {
                let Some(file) = self.file(core, &disk.path) else { continue };
                let Some(count) = file.snapshots.get(&snapshot).copied() else {
                    return VmEvent::TendFailed("there is no such snapshot".into());
                };
                file.count = count;
                core.stats.put_back += 1;
                core.log(format_args!("host {}: the disks of {vm} are put back, order {number}", self.index));
                let place = self.place(&disk.path);
                core.check.put_back(vm, (&key, place), number, snapshot, count);
            }
        }
        VmEvent::DisksTended(orders.done())
    }

    /// A guest that has begun here writes now and then.
    pub(super) fn writes_later(&self, core: &mut Core, vm: VmId, uid: u64) {
        let delay = core.rng.range(2000 * MS, 15_000 * MS);
        core.after(delay, self.kernel(), self.boot, What::Guest(vm, uid, super::queue::GuestAct::Write));
    }

    /// Whether somebody has ended this work of the agent. One that died has not: what it had begun goes on.
    pub(super) fn is_ended(&self, vm: VmId, epoch: u64, work: u64) -> bool {
        let agent = self.agent.as_ref().filter(|_| self.agent_epoch == epoch);
        agent.is_some_and(|a| a.runners.get(&vm).is_none_or(|r| r.work != Some(work)))
    }
}

impl super::check::Check {
    /// Something is looked at; what is wrong with it counts.
    pub(crate) fn note(&mut self, look: impl FnOnce(&mut Self) -> Option<String>) {
        if let Some(wrong) = look(self) {
            self.violation(wrong);
        }
    }

    fn removed_snapshot(&mut self, vm: VmId, id: uuid::Uuid) {
        let record = self.record(vm);
        self.note(|_| Contents::removed(vm, id, record.as_deref()));
    }
}
