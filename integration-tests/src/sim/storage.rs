//! A host's disks: in its own pool, and in the pool that it shares with others.
//!
//! Stands for `agent/src/storage/`: makes what is missing unless it should be there, deletes this VM's disks up to a generation.

use std::collections::BTreeMap;

use uncloud_agent::vm::{
    desired::{Desired, DisksExpected, Disposition},
    state::Event as VmEvent,
};
use uncloud_proto::ids::VmId;

use super::{contents::Disk, core::Core, host::Host};

/// Disks in one pool, by VM and generation.
pub(crate) type Disks = BTreeMap<(VmId, u32), Disk>;

impl Host {
    /// `storage::disks::{check_expected, make}`
    pub(super) fn make_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> Result<(), String> {
        let pools = pools(desired);
        for pool in &pools {
            if self.disk(core, pool, vm, desired.disk_generation).is_some() {
                continue;
            }
            if desired.disks == DisksExpected::Exist {
                return Err(format!("a disk is missing in pool {pool}"));
            }
            if self.disk_full > 0 {
                return Err("no space left on device".into());
            }
            let disk = Disk::default();
            match pool.as_str() {
                "shared" => {
                    core.shared_disks.entry(self.shared_pool).or_default().insert((vm, desired.disk_generation), disk);
                }
                _ => {
                    self.disks.insert((vm, desired.disk_generation), disk);
                }
            }
        }
        Ok(())
    }

    pub(super) fn delete_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        if self.failing > 0 {
            return VmEvent::DeleteFailed("the pool hangs".into());
        }
        core.log(format_args!("host {}: the disks of {vm} are deleted", self.index));
        if self.qemus.get(&vm).is_some_and(|q| q.executing) {
            core.check.violation(format!("P5: the disks of {vm} are deleted while it executes"));
        }
        if desired.disposition == Disposition::Forget {
            // `storage::void`
            let Some(void) = desired.void else { return VmEvent::DisksDeleted };
            let gone: Vec<u32> =
                self.disks.keys().filter(|(id, g)| *id == vm && void.has(*g)).map(|(_, g)| *g).collect();
            for generation in gone {
                core.check.void_removed(vm, (self.id.uuid(), generation));
                self.disks.remove(&(vm, generation));
            }
            return VmEvent::DisksDeleted;
        }
        core.check.disks_deleted(vm);
        for pool in pools(desired) {
            match pool.as_str() {
                "shared" => {
                    if let Some(disks) = core.shared_disks.get_mut(&self.shared_pool) {
                        disks.retain(|(id, generation), _| *id != vm || *generation > desired.disk_generation);
                    }
                }
                _ => self.disks.retain(|(id, generation), _| *id != vm || *generation > desired.disk_generation),
            }
        }
        VmEvent::DisksDeleted
    }
}

/// The pools of a VM's disks.
#[must_use]
pub(crate) fn pools(desired: &Desired) -> Vec<String> {
    desired.spec.iter().flat_map(|s| s.disks.iter().map(|d| d.pool.clone())).collect()
}
