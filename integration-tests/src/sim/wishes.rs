//! What the user wants of disks: snapshots, and the way back to them; copies of VMs; disks that come and go.

use uncloud_controller::{
    model::vm::DiskCache,
    state::command::{Answer, Command, DetachHow, DiskToAttach, NewClone},
};
use uncloud_proto::ids::VmId;

use super::{core::Core, user::User};

/// Clones beside the VMs that it creates.
const MOST_CLONES: usize = 3;
/// Names of disks that come and go: few, so that they come again.
const NAMES: [&str; 2] = ["data", "logs"];

impl User {
    /// Of some VMs disks come and go, of the others it takes snapshots: a VM has either.
    pub(super) fn wish_for_disks(&mut self, core: &mut Core, vm: VmId) -> Command {
        let has_room = self.vms.len() < core.config.vms + MOST_CLONES;
        if has_room && core.rng.permille(200) {
            let stopped: Vec<VmId> = self.stopped.intersection(&self.vms).copied().collect();
            let snapshots = self.known_snapshots();
            if !stopped.is_empty() && core.rng.permille(400) {
                let source = core.rng.pick(&stopped);
                return self.clone_of(core, source, None);
            }
            if !snapshots.is_empty() {
                let (source, name) = snapshots[core.rng.index(snapshots.len())].clone();
                return self.clone_of(core, source, Some(name));
            }
        }
        // What has no disk can only be given one.
        let comes_and_goes = |vm: &VmId| vm.uuid().as_bytes()[0] % 5 < 2;
        if comes_and_goes(&vm) || !self.with_disks.contains(&vm) {
            return self.attach_or_detach(core, vm);
        }
        self.snapshot(core, vm)
    }

    fn known_snapshots(&mut self) -> &[(VmId, String)] {
        self.snapshots.retain(|(vm, _)| self.vms.contains(vm));
        &self.snapshots
    }

    /// Mostly of what has one.
    fn snapshot(&mut self, core: &mut Core, vm: VmId) -> Command {
        let known = self.known_snapshots();
        let some = (!known.is_empty()).then(|| known[core.rng.index(known.len())].clone());
        match (core.rng.below(8), some) {
            (0..=3, Some((vm, name))) => {
                core.check.asked_restart(vm, core.now);
                Command::RevertToSnapshot { vm, name }
            }
            (4, Some((vm, name))) => Command::DeleteSnapshot { vm, name },
            _ => Command::CreateSnapshot { vm, id: core.rng.uuid(), name: core.rng.pick(&["a", "b", "c"]).to_owned() },
        }
    }

    fn clone_of(&mut self, core: &mut Core, source: VmId, snapshot: Option<String>) -> Command {
        self.names += 1;
        let (id, name) = (VmId::from_uuid(core.rng.uuid()), format!("vm-{}", self.names));
        core.check.asked_clone(id, &name);
        let macs = vec![format!("42:00:00:00:01:{:02x}", core.rng.below(256))];
        Command::CloneVm { request: None, source, snapshot, clone: Box::new(NewClone { id, name, macs }) }
    }

    /// What it asked for is carried out.
    pub(super) fn disks_answered(&mut self, core: &mut Core, command: Command, answer: Answer) {
        match (command, answer) {
            (Command::CloneVm { .. }, Answer::Vm(record)) => {
                core.stats.clones += 1;
                core.log(format_args!("user: clone {} is {}", record.name, record.id));
                self.vms.insert(record.id);
            }
            (Command::AttachDisk { vm, disk }, _) => {
                let disk = (vm, disk.name.unwrap_or_default());
                if !self.attached.contains(&disk) {
                    self.attached.push(disk);
                }
            }
            (Command::DetachDisk { vm, disk, how: DetachHow::Delete }, _) => {
                self.attached.retain(|a| *a != (vm, disk.clone()));
            }
            (Command::CreateSnapshot { vm, name, .. }, _) => self.snapshots.push((vm, name)),
            (Command::DeleteSnapshot { vm, name }, _) => self.snapshots.retain(|s| *s != (vm, name.clone())),
            _ => {}
        }
    }

    fn attach_or_detach(&mut self, core: &mut Core, vm: VmId) -> Command {
        self.attached.retain(|(vm, _)| self.vms.contains(vm));
        let some = (!self.attached.is_empty()).then(|| self.attached[core.rng.index(self.attached.len())].clone());
        match (core.rng.below(10), some) {
            (4 | 5, Some((vm, disk))) => Command::DetachDisk { vm, disk, how: DetachHow::Keep },
            (6..=9, Some((vm, disk))) => Command::DetachDisk { vm, disk, how: DetachHow::Delete },
            (n, some) => {
                // One that is there comes back, if it is detached.
                let again = some.filter(|_| n == 0);
                let is_new = again.is_none();
                let (vm, name) = again.unwrap_or_else(|| (vm, core.rng.pick(&NAMES).to_owned()));
                let disk = DiskToAttach {
                    id: core.rng.uuid(),
                    name: Some(name),
                    pool: is_new.then(|| core.rng.pick(&["local", "shared", "shared"]).to_owned()),
                    size_bytes: if is_new { 1 << 30 } else { 0 },
                    bus: None,
                    cache: core.rng.pick(&[
                        None,
                        None,
                        None,
                        Some(DiskCache::Writethrough),
                        Some(DiskCache::Writeback),
                    ]),
                };
                Command::AttachDisk { vm, disk: Box::new(disk) }
            }
        }
    }
}
