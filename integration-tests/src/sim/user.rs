//! The user: creates, stops, starts, restarts, pauses, changes, migrates and deletes VMs, cordons and drains hosts, and repeats
//! creates whose outcome is unknown with the same request id. What it wants of disks is in `wishes.rs`.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_controller::{
    leadership::WriteError,
    model::{
        Desired, DrainHow, HostMode, OwnDisks,
        vm::{
            Disk, DiskHotplug, Display, Failover, GuestAgent, Machine, Nic, NicKind, OnDiskLoss, RestartPolicy, VmSpec,
        },
    },
    state::command::{Answer, Command, FailoverChange, NewVm, PowerChange, Refusal, RequestId, VmUpdate},
};
use uncloud_proto::ids::{HostId, VmId};

use super::{
    clock::MS,
    controller::index_of,
    core::Core,
    queue::{What, Whom, Written},
};

const TIMEOUT_MS: u64 = 5000;

/// A call of the API.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Which.
    pub(crate) op: u64,
    /// What is asked.
    pub(crate) command: Command,
}

/// The answer to a call.
#[derive(Clone, Debug)]
pub(crate) enum Answered {
    /// What the writer said.
    Written(Written),
    /// This controller does not lead; perhaps it knows who does.
    NotLeader(Option<String>),
}

/// Sends an answer, if it does not get lost.
pub(crate) fn answer(core: &mut Core, op: u64, answered: Answered) {
    if !core.healed && core.rng.permille(10) {
        core.stats.fault("API answer lost");
        return;
    }
    let delay = core.rng.range(MS / 10, 5 * MS);
    core.after(delay, Whom::User, 0, What::Answer(op, Box::new(answered)));
}

/// A create, and all tries of it.
#[derive(Clone, Debug)]
struct Create {
    request: RequestId,
    new: NewVm,
    tries: u32,
}

#[derive(Clone, Debug)]
enum Doing {
    Create(Create),
    Power(VmId, PowerChange),
    Restart(VmId),
    Update,
    Delete(VmId),
    Migrate,
    Mode,
    Failover,
    Disks,
}

/// Whether the cluster moves VMs of lost hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failovers {
    /// It does.
    On,
    /// A person has switched it off.
    Off,
}

/// The user.
#[derive(Debug, Default)]
pub(crate) struct User {
    leader: usize,
    waiting: BTreeMap<u64, (Doing, Command, u32)>,
    /// VMs that exist as far as the user knows.
    pub(crate) vms: BTreeSet<VmId>,
    /// No more calls, but for deletes that must be tried again.
    pub(crate) idle: bool,
    cordoned: BTreeSet<HostId>,
    paused: BTreeSet<VmId>,
    /// Snapshots that the API has acknowledged.
    pub(super) snapshots: Vec<(VmId, String)>,
    /// Disks that it has attached and not deleted.
    pub(super) attached: Vec<(VmId, String)>,
    /// VMs that have had disks from the beginning.
    pub(super) with_disks: BTreeSet<VmId>,
    /// VMs that it has stopped.
    pub(super) stopped: BTreeSet<VmId>,
    /// Deletes that the API has not taken yet.
    to_delete: BTreeSet<VmId>,
    pub(super) names: u64,
}

impl User {
    fn call(&mut self, core: &mut Core, doing: Doing, command: Command, tries: u32) {
        let op = core.uid();
        let delay = core.rng.range(MS / 10, 5 * MS);
        let lost = !core.healed && core.rng.permille(10);
        if lost {
            core.stats.fault("API call lost");
        } else {
            let call = Call { op, command: command.clone() };
            core.after(delay, Whom::Controller(self.leader), u64::MAX, What::Call(Box::new(call)));
        }
        core.after(TIMEOUT_MS * MS, Whom::User, 0, What::UserTimeout(op));
        self.waiting.insert(op, (doing, command, tries));
    }

    /// How many calls wait for an answer, or have to be made again.
    #[must_use]
    pub(crate) fn busy(&self) -> bool {
        !self.waiting.is_empty() || !self.to_delete.is_empty() || !self.cordoned.is_empty() || !self.paused.is_empty()
    }

    /// The next thing.
    pub(crate) fn next(
        &mut self,
        core: &mut Core,
        hosts: &[HostId],
        cordoned: &[HostId],
        paused: &[VmId],
        failover: Failovers,
    ) {
        // Now and then the user has other things to do.
        let delay = if core.rng.permille(30) { core.between(5000, 30_000) } else { core.between(300, 2500) };
        core.after(delay, Whom::User, 0, What::UserNext);
        if self.idle {
            // Looks, and mends what an unknown call has left behind.
            for &host in cordoned {
                self.mode(core, host, HostMode::Active);
            }
            self.cordoned.clear();
            for &vm in paused {
                self.pause(core, vm, PowerChange::Resume);
            }
            self.paused.clear();
            if failover == Failovers::Off {
                self.failover(core, FailoverChange::On);
            }
        }
        // One whose disks are still being copied can be deleted only when a host may make the copy.
        if let Some(vm) = self.to_delete.pop_first() {
            return self.delete(core, vm);
        }
        if self.idle {
            return;
        }
        let vms: Vec<VmId> = self.vms.iter().copied().collect();
        if vms.len() < 2 || (vms.len() < core.config.vms && core.rng.permille(600)) {
            return self.create(core);
        }
        let vm = core.rng.pick(&vms);
        match core.rng.below(44) {
            0 | 1 => self.delete(core, vm),
            2 => self.power(core, vm, PowerChange::Stop),
            3 => self.power(core, vm, PowerChange::ForceStop),
            4..=6 => self.power(core, vm, PowerChange::Start),
            7 | 8 => {
                core.check.asked_restart(vm, core.now);
                let force = core.rng.permille(500);
                core.log(format_args!("user: restart {vm}, force {force}"));
                self.call(core, Doing::Restart(vm), Command::RestartVm { vm, force }, 0);
            }
            9 | 29 => {
                let host = core.rng.pick(hosts);
                if !self.cordoned.insert(host) {
                    self.cordoned.remove(&host);
                    self.mode(core, host, HostMode::Active);
                } else if core.rng.permille(300) {
                    self.mode(core, host, HostMode::Cordoned);
                } else {
                    let how = core.rng.pick(&[DrainHow::LiveOnly, DrainHow::StopAndMove]);
                    let disks = core.rng.pick(&[OwnDisks::Stay, OwnDisks::Copied]);
                    core.log(format_args!("user: drain {host} {how:?}, own disks: {disks:?}"));
                    self.call(core, Doing::Mode, Command::DrainHost { host, how, disks, reason: String::new() }, 0);
                }
            }
            10 if core.rng.permille(300) => match failover {
                Failovers::On => {
                    let for_ms = core.rng.range(1000, 90_000);
                    self.failover(core, FailoverChange::Off { for_ms, reason: String::new() });
                }
                Failovers::Off => self.failover(core, FailoverChange::On),
            },
            11 | 12 => self.update(core, vm),
            13..=26 => {
                let to = if core.rng.permille(500) { Some(core.rng.pick(hosts)) } else { None };
                core.log(format_args!("user: migrate {vm} to {to:?}"));
                let secret = format!("{:064x}", core.uid());
                let command = Command::MigrateVm { vm, to, secret, bytes_per_second: 0 };
                self.call(core, Doing::Migrate, command, 0);
            }
            27 => {
                core.log(format_args!("user: cancel the migration of {vm}"));
                self.call(core, Doing::Migrate, Command::CancelMigration { vm }, 0);
            }
            28 => {
                let change = if self.paused.insert(vm) { PowerChange::Pause } else { PowerChange::Resume };
                if change == PowerChange::Resume {
                    self.paused.remove(&vm);
                }
                self.pause(core, vm, change);
            }
            30..=43 => {
                let command = self.wish_for_disks(core, vm);
                core.log(format_args!("user: {command:?}"));
                self.call(core, Doing::Disks, command, 0);
            }
            _ => {}
        }
    }

    fn pause(&mut self, core: &mut Core, vm: VmId, desired: PowerChange) {
        core.log(format_args!("user: {desired:?} {vm}"));
        self.call(core, Doing::Update, Command::SetDesired { vm, desired }, 0);
    }

    fn failover(&mut self, core: &mut Core, change: FailoverChange) {
        core.log(format_args!("user: failover {change:?}"));
        self.call(core, Doing::Failover, Command::SetFailover { change }, 0);
    }

    fn mode(&mut self, core: &mut Core, host: HostId, mode: HostMode) {
        core.log(format_args!("user: host {host} {mode:?}"));
        self.call(core, Doing::Mode, Command::SetHostMode { host, mode, reason: String::new() }, 0);
    }

    /// Another class, mostly: the one change that P1 depends on (W4).
    fn update(&mut self, core: &mut Core, vm: VmId) {
        let failover = core.rng.pick(&[Failover::Fast, Failover::Patient, Failover::Hold]);
        let memory_mib = core.rng.permille(300).then(|| core.rng.pick(&[256, 512, 1024]));
        core.log(format_args!("user: update {vm} to {failover:?}, memory {memory_mib:?}"));
        let update = VmUpdate { failover: Some(failover), memory_mib, ..VmUpdate::default() };
        self.call(core, Doing::Update, Command::UpdateVm { vm, update: Box::new(update) }, 0);
    }

    fn delete(&mut self, core: &mut Core, vm: VmId) {
        core.check.asked_delete(vm);
        self.vms.remove(&vm);
        core.log(format_args!("user: delete {vm}"));
        self.call(core, Doing::Delete(vm), Command::DeleteVm { vm }, 0);
    }

    fn power(&mut self, core: &mut Core, vm: VmId, desired: PowerChange) {
        core.check.asked_power(vm, desired.desired(), core.now);
        core.log(format_args!("user: {desired:?} {vm}"));
        self.call(core, Doing::Power(vm, desired), Command::SetDesired { vm, desired }, 0);
    }

    fn create(&mut self, core: &mut Core) {
        self.names += 1;
        let name = format!("vm-{}", self.names);
        let new = NewVm {
            id: VmId::from_uuid(core.rng.uuid()),
            name: name.clone(),
            owner: "default".into(),
            labels: BTreeMap::new(),
            spec: spec(core),
            image_names: Vec::new(),
            desired: if core.rng.permille(100) { Desired::Stopped } else { Desired::Running },
        };
        let request = RequestId { id: format!("request-{name}"), fingerprint: name };
        self.try_create(core, Create { request, new, tries: 0 });
    }

    /// Each try has an id and MAC addresses of its own, as at the API's edge.
    fn try_create(&mut self, core: &mut Core, mut create: Create) {
        create.tries += 1;
        create.new.id = VmId::from_uuid(core.rng.uuid());
        for nic in &mut create.new.spec.nics {
            nic.mac = format!("42:00:00:00:00:{:02x}", core.rng.below(256));
        }
        core.check.asked_create(&create.new);
        core.log(format_args!("user: create {} as {}, try {}", create.new.name, create.new.id, create.tries));
        let command = Command::CreateVm { request: Some(create.request.clone()), vm: Box::new(create.new.clone()) };
        self.call(core, Doing::Create(create), command, 0);
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, core: &mut Core, op: u64, answered: Answered) {
        let Some((doing, command, tries)) = self.waiting.remove(&op) else { return };
        let written = match answered {
            Answered::NotLeader(hint) => {
                self.leader = match hint.as_deref().and_then(index_of) {
                    Some(index) => index,
                    None => core.rng.index(core.config.controllers),
                };
                // Nothing was changed: once more, elsewhere.
                if tries < 5 {
                    self.call(core, doing, command, tries + 1);
                } else {
                    self.unknown(core, doing);
                }
                return;
            }
            Answered::Written(written) => written,
        };
        match (doing, written) {
            (
                doing,
                Err(WriteError::Unknown | WriteError::NotLeader | WriteError::Overloaded | WriteError::StoreFull),
            ) => {
                self.leader = core.rng.index(core.config.controllers);
                self.unknown(core, doing);
            }
            (Doing::Create(create), Ok(committed)) => {
                let Answer::Vm(record) = committed.answer else { return };
                core.stats.created += 1;
                core.log(format_args!("user: {} is {}", record.name, record.id));
                core.check.acked_create(&create.request.id, record.id, &record.name);
                self.vms.insert(record.id);
                if !record.spec.disks.is_empty() {
                    self.with_disks.insert(record.id);
                }
            }
            (Doing::Create(create), Err(WriteError::Refused(Refusal::MacTaken(_)))) => self.try_create(core, create),
            (Doing::Create(create), Err(WriteError::Refused(refusal))) => {
                core.check.refused_create(&create.new.name, create.tries, &refusal);
            }
            (Doing::Power(vm, change), Ok(_)) => {
                match change.desired() {
                    Desired::Stopped => self.stopped.insert(vm),
                    Desired::Running | Desired::Deleted => self.stopped.remove(&vm),
                };
                core.check.acked_power(vm, change.desired());
            }
            (Doing::Delete(vm), Ok(_)) => core.check.acked_delete(vm),
            // A copy of it waits for somebody who starts that VM, or deletes it.
            (Doing::Delete(vm), Err(WriteError::Refused(Refusal::Precondition(why))))
                if self.idle && why.contains("being copied") =>
            {
                core.log(format_args!("user: {vm} is not deleted: {why}"));
            }
            // "try again when a host is up"
            (Doing::Delete(vm), Err(WriteError::Refused(Refusal::Precondition(_)))) => {
                self.to_delete.insert(vm);
            }
            (Doing::Delete(vm), Err(WriteError::Refused(Refusal::NoVm(_)))) => core.check.acked_delete(vm),
            (Doing::Disks, Err(WriteError::Refused(refusal))) => core.log(format_args!("user: refused: {refusal}")),
            (Doing::Disks, Ok(committed)) => self.disks_answered(core, command, committed.answer),
            (Doing::Power(vm, _), Err(_)) => core.check.unknown_power(vm),
            (
                Doing::Restart(_) | Doing::Update | Doing::Migrate | Doing::Mode | Doing::Failover | Doing::Delete(_),
                _,
            ) => {}
        }
    }

    /// A call is given up.
    pub(crate) fn timeout(&mut self, core: &mut Core, op: u64) {
        if let Some((doing, ..)) = self.waiting.remove(&op) {
            self.leader = core.rng.index(core.config.controllers);
            self.unknown(core, doing);
        }
    }

    fn unknown(&mut self, core: &mut Core, doing: Doing) {
        match doing {
            Doing::Create(create) if create.tries < 8 => self.try_create(core, create),
            Doing::Create(_) => {}
            Doing::Delete(vm) => {
                self.to_delete.insert(vm);
            }
            Doing::Power(vm, _) | Doing::Restart(vm) => core.check.unknown_power(vm),
            Doing::Mode | Doing::Update | Doing::Migrate | Doing::Failover | Doing::Disks => {}
        }
    }
}

fn spec(core: &mut Core) -> VmSpec {
    let rng = &mut core.rng;
    let pool = rng.pick(&["local", "shared", "shared", ""]);
    let disk =
        |name: &str, pool: &str| Disk { name: name.into(), pool: pool.into(), size_bytes: 1 << 30, ..Disk::default() };
    let disks = match pool {
        "" => Vec::new(),
        // Those of a migrating VM that hosts share stay, and the others are copied (M7).
        "local" if rng.permille(400) => vec![disk("disk0", "local"), disk("disk1", "shared")],
        pool => vec![disk("disk0", pool)],
    };
    let nics = if rng.permille(500) { vec![Nic { kind: NicKind::User, mac: String::new() }] } else { Vec::new() };
    VmSpec {
        vcpus: 1,
        memory_mib: 512,
        machine: Machine::Q35,
        kernel: None,
        disks,
        nics,
        restart: rng.pick(&[RestartPolicy::OnFailure, RestartPolicy::Always, RestartPolicy::Never]),
        failover: rng.pick(&[Failover::Fast, Failover::Fast, Failover::Patient, Failover::Patient, Failover::Hold]),
        on_disk_loss: rng.pick(&[OnDiskLoss::Wait, OnDiskLoss::Wait, OnDiskLoss::Recreate]),
        priority: u32::try_from(rng.below(3)).unwrap_or(0),
        host_labels: BTreeMap::new(),
        anti_affinity_group: None,
        stop_grace_seconds: u32::try_from(rng.range(2, 15)).unwrap_or(5),
        display: Display::None,
        guest_agent: GuestAgent::Disabled,
        firmware: Default::default(),
        cpu: Default::default(),
        cloud_init: None,
        disk_hotplug: rng.pick(&[DiskHotplug::Enabled, DiskHotplug::Enabled, DiskHotplug::Disabled]),
        extra: serde_json::Map::new(),
    }
}
