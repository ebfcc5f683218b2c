//! Snapshots on a host: taken, removed and put back, of what executes and of what does not.
//!
//! Stands for `agent/src/storage/snapshots.rs` (`qemu-img`) and `agent/src/qemu/disks.rs` (QEMU itself). There is no image lock.

use uncloud_agent::vm::{
    desired::Desired,
    disks::{Revert, Wanted},
    migration::Guest,
    state::Event as VmEvent,
};
use uncloud_proto::ids::VmId;

use super::{
    contents::{Contents, Disk, Place},
    core::Core,
    host::Host,
    storage::pools,
};

impl Host {
    /// A disk, if it is there.
    pub(super) fn disk<'a>(
        &'a mut self,
        core: &'a mut Core,
        pool: &str,
        vm: VmId,
        generation: u32,
    ) -> Option<&'a mut Disk> {
        match pool {
            "shared" => core.shared_disks.get_mut(&self.shared_pool)?.get_mut(&(vm, generation)),
            _ => self.disks.get_mut(&(vm, generation)),
        }
    }

    fn place(&self, pool: &str, generation: u32) -> Place {
        match pool {
            "shared" => (self.shared_pool, generation),
            _ => (self.id.uuid(), generation),
        }
    }

    /// The guest finds what is on its disks, and writes to them.
    pub(super) fn finds(&mut self, core: &mut Core, vm: VmId, pools: &[String], generation: u32) {
        for pool in pools {
            let wrote = core.uid();
            let Some(disk) = self.disk(core, pool, vm, generation) else { continue };
            let found = std::mem::replace(&mut disk.count, wrote);
            core.check.began(vm, self.place(pool, generation), (found, wrote));
        }
    }

    fn writes(&mut self, core: &mut Core, vm: VmId, pool: &str, generation: u32) {
        let (count, place) = (core.uid(), self.place(pool, generation));
        if let Some(disk) = self.disk(core, pool, vm, generation) {
            disk.count = count;
            core.check.contents.wrote(vm, place, count);
        }
    }

    /// `Hypervisor::tend_disks`
    pub(super) fn tend_running(&mut self, core: &mut Core, vm: VmId, uid: u64, desired: &Desired) -> VmEvent {
        let hangs = |q: &super::host::Qemu| core.now < q.moving.hung_until;
        let Some(qemu) = self.qemus.get(&vm).filter(|q| q.uid == uid && q.executing && !q.dying && !hangs(q)) else {
            return VmEvent::TendFailed("QEMU does not answer".into());
        };
        let executes = qemu.moving.guest == Guest::Executes;
        let write = |host: &mut Self, core: &mut Core| {
            if executes {
                for pool in pools(desired) {
                    host.writes(core, vm, &pool, desired.disk_generation);
                }
            }
        };
        write(self, core);
        let event = self.tend(core, vm, desired);
        write(self, core);
        event
    }

    /// Takes and removes snapshots, and puts disks back, as ordered.
    pub(super) fn tend(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        if !core.healed && core.rng.permille(30) && !desired.orders.is_empty() {
            core.stats.fault("qemu-img fails");
            return VmEvent::TendFailed("qemu-img failed".into());
        }
        let generation = desired.disk_generation;
        for pool in pools(desired) {
            for order in &desired.orders.snapshots {
                let Some(disk) = self.disk(core, &pool, vm, generation) else {
                    return VmEvent::TendFailed(format!("a disk is missing in pool {pool}"));
                };
                match order.wanted {
                    Wanted::There => {
                        let count = *disk.snapshots.entry(order.id).or_insert(disk.count);
                        core.check.note(|c| c.contents.taken(vm, order.id, count));
                    }
                    Wanted::Gone => {
                        if disk.snapshots.remove(&order.id).is_some() {
                            core.check.removed_snapshot(vm, order.id);
                        }
                    }
                }
            }
            if let Some(Revert { snapshot, number }) = desired.orders.revert {
                let Some(disk) = self.disk(core, &pool, vm, generation) else {
                    return VmEvent::TendFailed(format!("a disk is missing in pool {pool}"));
                };
                let Some(count) = disk.snapshots.get(&snapshot).copied() else {
                    return VmEvent::TendFailed("there is no such snapshot".into());
                };
                disk.count = count;
                core.stats.put_back += 1;
                core.log(format_args!("host {}: the disks of {vm} are put back, order {number}", self.index));
                core.check.put_back(vm, self.place(&pool, generation), number, snapshot, count);
            }
        }
        VmEvent::DisksTended(desired.orders.done())
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
