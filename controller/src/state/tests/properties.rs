//! Random commands and reports: the invariants of the state hold after each.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use uncloud_proto::ids::{HostId, Incarnation, VmId};
use uuid::Uuid;

use super::fixtures::*;
use crate::{
    model::{
        Desired, DrainHow, HostMode, OwnDisks,
        vm::{Failover, OnDiskLoss, SnapshotState, VmSpec},
    },
    state::{
        VmEntry,
        command::{
            Command, DrainStep, HostFacts, Lapsed, NewClone, ObservedState, PowerChange, VmObservation, VmUpdate,
        },
        lease_lapsed,
    },
};

const HOSTS: u128 = 3;
const VMS: u128 = 5;

type VmNumber = u128;

/// One step. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Create { vm: u128, failover: u8, pool: u8, recreate: bool, stopped: bool, large: bool },
    Set { vm: u128, change: u8 },
    Restart { vm: u128 },
    Update { vm: u128, failover: u8, memory: u8, recreate: bool },
    Delete { vm: u128 },
    Mode { host: u128, cordoned: bool },
    Drain { host: u128, stop: bool },
    DrainVm { vm: u128, stop: bool },
    Remove { host: u128 },
    Register { host: u128 },
    Lapse { host: u128, both: bool, limit: usize },
    Silent { host: u128, silent: bool },
    Report { vm: u128, host: u128, back: u64, state: u8, disks: bool, old_restarts: bool },
    Migrate { vm: u128, to: u128 },
    CancelMigration { vm: u128 },
    TargetReports { vm: u128, state: u8 },
    Snapshot { vm: VmNumber, what: u8 },
    Clone { vm: VmNumber, of: VmNumber, snapshot: bool },
    Place,
}

fn step() -> impl Strategy<Value = Step> {
    let vm = 1..=VMS;
    let host = 1..=HOSTS;
    prop_oneof![
        3 => (vm.clone(), 0..3_u8, 0..3_u8, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(vm, failover, pool, recreate, stopped, large)| Step::Create {
                vm, failover, pool, recreate, stopped, large
            }
        ),
        3 => (vm.clone(), 0..3_u8).prop_map(|(vm, change)| Step::Set { vm, change }),
        1 => vm.clone().prop_map(|vm| Step::Restart { vm }),
        2 => (vm.clone(), 0..3_u8, 0..4_u8, any::<bool>())
            .prop_map(|(vm, failover, memory, recreate)| Step::Update { vm, failover, memory, recreate }),
        1 => vm.clone().prop_map(|vm| Step::Delete { vm }),
        1 => (host.clone(), any::<bool>()).prop_map(|(host, cordoned)| Step::Mode { host, cordoned }),
        1 => (host.clone(), any::<bool>()).prop_map(|(host, stop)| Step::Drain { host, stop }),
        4 => (vm.clone(), any::<bool>()).prop_map(|(vm, stop)| Step::DrainVm { vm, stop }),
        1 => host.clone().prop_map(|host| Step::Remove { host }),
        3 => host.clone().prop_map(|host| Step::Register { host }),
        2 => (host.clone(), any::<bool>(), 0..4_usize)
            .prop_map(|(host, both, limit)| Step::Lapse { host, both, limit }),
        1 => (host.clone(), any::<bool>()).prop_map(|(host, silent)| Step::Silent { host, silent }),
        // Mostly from where the VM is, about its present incarnation.
        8 => (vm, prop_oneof![3 => Just(0), 1 => host], prop_oneof![4 => Just(0_u64), 1 => 1..3_u64], prop_oneof![3 => 0..13_u8, 2 => Just(2), 1 => Just(10)], any::<bool>(), any::<bool>())
            .prop_map(|(vm, host, back, state, disks, old_restarts)| Step::Report {
                vm, host, back, state, disks, old_restarts
            }),
        3 => Just(Step::Place),
        4 => (1..=VMS, 0..4_u8).prop_map(|(vm, what)| Step::Snapshot { vm, what }),
        4 => (1..=VMS, 1..=VMS, any::<bool>()).prop_map(|(vm, of, snapshot)| Step::Clone { vm, of, snapshot }),
        6 => (1..=VMS, 0..=HOSTS).prop_map(|(vm, to)| Step::Migrate { vm, to }),
        1 => (1..=VMS).prop_map(|vm| Step::CancelMigration { vm }),
        6 => (1..=VMS, prop_oneof![Just(11_u8), Just(12), Just(12), 0..13_u8])
            .prop_map(|(vm, state)| Step::TargetReports { vm, state }),
    ]
}

const CLASSES: [Failover; 3] = [Failover::Fast, Failover::Patient, Failover::Hold];

const STATES: [ObservedState; 13] = [
    ObservedState::Preparing,
    ObservedState::Starting,
    ObservedState::Running,
    ObservedState::Stopping,
    ObservedState::Stopped,
    ObservedState::PoweredOff,
    ObservedState::Failed,
    ObservedState::Fenced,
    ObservedState::Deleted,
    ObservedState::Forgotten,
    ObservedState::HandedOver,
    ObservedState::Incoming,
    ObservedState::Received,
];

impl Step {
    fn command(&self, world: &mut World) -> Option<Command> {
        let vm = |n: &u128| vm_id(*n);
        let host = |n: &u128| host_id(*n);
        Some(match self {
            Self::Create { vm, failover, pool, recreate, stopped, large } => {
                let base = match pool {
                    0 => spec(),
                    1 => with_disk("local"),
                    _ => with_disk("shared"),
                };
                let spec = VmSpec {
                    failover: CLASSES[usize::from(*failover)],
                    on_disk_loss: if *recreate { OnDiskLoss::Recreate } else { OnDiskLoss::Wait },
                    memory_mib: if *large { 2048 } else { 1024 },
                    nics: vec![nic(&format!("42:00:00:00:00:{vm:02}"))],
                    ..base
                };
                let mut new = new_vm(*vm, spec);
                if *stopped {
                    new.desired = Desired::Stopped;
                }
                Command::CreateVm { request: None, vm: Box::new(new) }
            }
            Self::Set { vm: n, change } => {
                let desired = [PowerChange::Start, PowerChange::Stop, PowerChange::ForceStop][usize::from(*change)];
                Command::SetDesired { vm: vm(n), desired }
            }
            Self::Restart { vm: n } => Command::RestartVm { vm: vm(n), force: false },
            Self::Update { vm: n, failover, memory, recreate } => {
                let update = VmUpdate {
                    failover: Some(CLASSES[usize::from(*failover)]),
                    memory_mib: (*memory > 0).then(|| u64::from(*memory) * 1024),
                    on_disk_loss: Some(if *recreate { OnDiskLoss::Recreate } else { OnDiskLoss::Wait }),
                    ..VmUpdate::default()
                };
                Command::UpdateVm { vm: vm(n), update: Box::new(update) }
            }
            Self::Delete { vm: n } => Command::DeleteVm { vm: vm(n) },
            Self::Mode { host: n, cordoned } => {
                let mode = if *cordoned { HostMode::Cordoned } else { HostMode::Active };
                Command::SetHostMode { host: host(n), mode, reason: String::new() }
            }
            Self::Drain { host: n, stop } => {
                let how = if *stop { DrainHow::StopAndMove } else { DrainHow::LiveOnly };
                Command::DrainHost { host: host(n), how, disks: OwnDisks::Copied, reason: String::new() }
            }
            Self::DrainVm { vm: n, stop } => {
                let from = world.state.vm(vm(n))?.record.placement.host?;
                let step = if *stop { DrainStep::Stop } else { DrainStep::Migrate { secret: "0".repeat(64) } };
                Command::DrainVm { vm: vm(n), from, step }
            }
            Self::Remove { host: n } => Command::RemoveHost { host: host(n) },
            Self::Register { host: n } => {
                Command::RegisterHost { host: Box::new(HostFacts { memory_mib: 3072, ..facts(*n) }) }
            }
            Self::Lapse { host: n, both, limit } => {
                let lapsed = if *both { Lapsed::Both } else { Lapsed::Fast };
                Command::DeclareLapsed { host: host(n), lapsed, limit: *limit }
            }
            Self::Silent { host: n, silent } => {
                if *silent {
                    world.silent.insert(host(n));
                } else {
                    world.silent.remove(&host(n));
                }
                return None;
            }
            Self::Report { vm: n, host: from, back, state, disks, old_restarts } => {
                let entry = world.state.vm(vm(n))?;
                let state = STATES[usize::from(*state)];
                let alive = matches!(state, ObservedState::Preparing | ObservedState::Failed)
                    || state.executes()
                    || matches!(state, ObservedState::HandedOver | ObservedState::Received)
                    || (state == ObservedState::PoweredOff && *old_restarts);
                if alive && entry.ended_for_good() {
                    return None; // an agent does not take back that an incarnation is over
                }
                let from = if *from == 0 { entry.record.placement.host? } else { host(from) };
                let mut report = world.observation(vm(n), state);
                report.incarnation = Incarnation(report.incarnation.0.saturating_sub(*back));
                report.disks_ready = *disks;
                report.restarts_done = report.restarts_done.saturating_sub(u64::from(*old_restarts));
                report.migration = entry.record.migration.as_ref().map(|m| seen(m.incarnation.0, ""));
                // What it was told to do, it may have done; to put disks back only when nothing executes.
                if *old_restarts {
                    let ids = |state| entry.record.snapshots.iter().filter(move |s| s.state == state).map(|s| s.id);
                    report.disks.made = ids(SnapshotState::Creating).collect();
                    report.disks.removed = ids(SnapshotState::Deleting).collect();
                    let stopped = report.state == ObservedState::Stopped;
                    report.disks.reverted = entry.record.revert.filter(|_| stopped).map_or(0, |r| r.number);
                }
                Command::Report { host: from, reports: vec![report] }
            }
            Self::Migrate { vm: n, to } => {
                let to = (*to > 0).then(|| host(to));
                Command::MigrateVm { vm: vm(n), to, secret: "0".repeat(64), bytes_per_second: 0 }
            }
            Self::CancelMigration { vm: n } => Command::CancelMigration { vm: vm(n) },
            Self::TargetReports { vm: n, state } => {
                let migration = world.state.vm(vm(n))?.record.migration.clone()?;
                let mut report = world.observation(vm(n), STATES[usize::from(*state)]);
                report.incarnation = migration.incarnation;
                report.migration = Some(seen(migration.incarnation.0, "127.0.0.1:4444"));
                Command::Report { host: migration.target, reports: vec![report] }
            }
            Self::Snapshot { vm: n, what } => {
                let name = "s".to_owned();
                match what {
                    0 => Command::CreateSnapshot { vm: vm(n), id: Uuid::from_u128(u128::from(world.now)), name },
                    1 => Command::DeleteSnapshot { vm: vm(n), name },
                    _ => Command::RevertToSnapshot { vm: vm(n), name },
                }
            }
            Self::Clone { vm: n, of, snapshot } => {
                let clone =
                    NewClone { id: vm(n), name: format!("vm-{n}"), macs: vec![format!("42:00:00:00:00:{n:02}")] };
                let snapshot = snapshot.then(|| "s".to_owned());
                Command::CloneVm { request: None, source: vm(of), snapshot, clone: Box::new(clone) }
            }
            Self::Place => {
                let vms = world.state.vms().map(|(&vm, _)| vm).collect();
                Command::Place { vms }
            }
        })
    }
}

/// What must hold from one state to the next.
#[derive(Default)]
struct Watcher {
    /// The largest incarnation of each VM, also of those that are gone.
    incarnations: BTreeMap<VmId, u64>,
    /// Incarnations that their host has said to be over for good.
    ended: BTreeSet<(VmId, Incarnation)>,
    /// The classes of the incarnations of each VM that may execute on its present host.
    classes: BTreeMap<VmId, BTreeSet<u8>>,
    /// Migrations whose source has said that it has sent everything.
    sent: BTreeSet<(VmId, Incarnation)>,
}

impl Watcher {
    /// To be called before the command is carried out: what a report says counts in the change that it makes.
    fn hear(&mut self, world: &World, command: &Command) {
        let Command::Report { host, reports } = command else { return };
        for VmObservation { vm, incarnation, state, restarts_done, .. } in reports {
            let Some(entry) = world.state.vm(*vm) else { continue };
            let placement = &entry.record.placement;
            let over = match state {
                ObservedState::Stopped | ObservedState::Fenced => true,
                ObservedState::PoweredOff => *restarts_done >= entry.record.restarts,
                _ => false,
            };
            if *state == ObservedState::HandedOver
                && placement.host == Some(*host)
                && placement.incarnation == *incarnation
                && let Some(migration) = &entry.record.migration
            {
                self.sent.insert((*vm, migration.incarnation));
            }
            if over && placement.host == Some(*host) && placement.incarnation == *incarnation {
                self.ended.insert((*vm, *incarnation));
            }
        }
    }

    fn check(&mut self, before: &World, world: &World, command: &Command) -> Result<(), TestCaseError> {
        for (&id, now) in world.state.vms() {
            let (host, incarnation) = (now.record.placement.host, now.record.placement.incarnation);
            let newest = self.incarnations.entry(id).or_default();
            if before.state.vm(id).is_none() {
                *newest = 0; // deleted, and another one created with its id: only a test does that
            }
            prop_assert!(incarnation.0 >= *newest, "the incarnation of {id} went back");
            *newest = incarnation.0;
            let class = CLASSES.iter().position(|c| *c == now.record.spec.failover).unwrap() as u8;
            let classes = self.classes.entry(id).or_default();
            let Some(was) = before.state.vm(id) else {
                *classes = [class].into();
                continue;
            };
            let (old_host, old_incarnation) = (was.record.placement.host, was.record.placement.incarnation);
            if host.is_some() && incarnation == old_incarnation {
                prop_assert_eq!(was.record.spec.failover, now.record.spec.failover, "W4: {}", id);
            }
            let old_classes = classes.clone();
            if host != old_host || self.ended.contains(&(id, old_incarnation)) {
                classes.clear();
            }
            classes.insert(class);

            if host.is_some() && host != old_host {
                prop_assert!(incarnation > old_incarnation, "a new host without a new incarnation");
            }
            // M2: a number that was reserved for a migration is given to nothing else.
            prop_assert!(now.record.reserved >= was.record.reserved);
            let reserved = |i: Incarnation| i <= was.record.reserved && i > old_incarnation;
            let by_hand_over = was.record.migration.as_ref().is_some_and(|m| m.incarnation == incarnation);
            prop_assert!(!reserved(incarnation) || by_hand_over, "{incarnation} was reserved");
            prop_assert!(now.record.migration.is_none() || now.record.desired == Desired::Running);
            if (was.record.desired, now.record.desired) == (Desired::Stopped, Desired::Running) && host.is_some() {
                prop_assert!(incarnation > old_incarnation, "started without a new incarnation");
            }
            prop_assert!(
                was.record.desired != Desired::Deleted || now.record.desired == Desired::Deleted,
                "a deleted VM came back"
            );
            prop_assert!(now.record.disk_generation >= was.record.disk_generation);
            // R2: it is over only when the host of the VM has said so of this very revert, or with the disks.
            if let Some(revert) = was.record.revert
                && now.record.revert.is_none_or(|r| r.number != revert.number)
                && now.record.disk_generation == was.record.disk_generation
            {
                let said = match command {
                    Command::Report { host, reports } => reports.iter().any(|r| {
                        r.vm == id
                            && Some(*host) == old_host
                            && r.incarnation == old_incarnation
                            && r.disks.reverted == revert.number
                    }),
                    Command::RevertToSnapshot { .. } => now.record.revert.is_some(),
                    _ => false,
                };
                prop_assert!(said, "the disks of {id} were not put back");
                prop_assert!(now.record.desired != Desired::Running || incarnation > old_incarnation);
            }
            // P5: disks that a host has made are given up only if that is what the user chose.
            if was.record.disks_exist && !now.record.disks_exist {
                prop_assert_eq!(was.record.spec.on_disk_loss, OnDiskLoss::Recreate);
                // M7: never the number of copies that were given up.
                prop_assert_eq!(now.record.disk_generation, was.record.next_disk_generation());
            }
            // M7: disks that are there become others by the hand-over to those that were copied, and by nothing else.
            if was.record.disks_exist
                && now.record.disks_exist
                && now.record.disk_generation != was.record.disk_generation
            {
                let copies = was.record.migration.as_ref().and_then(|m| m.disk_generation);
                prop_assert_eq!(copies, Some(now.record.disk_generation));
                prop_assert!(incarnation > old_incarnation);
            }
            if let Some(old_host) = old_host
                && host != Some(old_host)
            {
                // M1, M3: to the target of the migration that was on record, once the source has sent everything.
                let migrated = was.record.migration.as_ref().is_some_and(|m| {
                    host == Some(m.target) && incarnation == m.incarnation && self.sent.contains(&(id, m.incarnation))
                });
                if !migrated {
                    // R3: what has stopped there may still be worked on, until its host says that this is over.
                    let by_fencing = matches!(command, Command::Report { reports, .. }
                        if reports.iter().any(|r| r.vm == id && r.state == ObservedState::Fenced));
                    let by_end = matches!(command, Command::Report { .. }) && !now.record.has_disk_orders();
                    let at_rest = !was.record.has_disk_orders() || by_fencing || by_end;
                    self.may_leave(world, id, old_host, old_incarnation, &old_classes, at_rest)?;
                }
            }
        }
        for (&id, was) in before.state.vms() {
            if world.state.vm(id).is_none() {
                Self::may_go(world, command, id, was)?;
            }
        }
        for (&id, host) in world.state.hosts() {
            prop_assert!(host.promised.memory_mib <= host.record.memory_mib, "{id} has promised too much");
        }
        Ok(())
    }

    /// P5: a VM goes only when a person has deleted it, and its disks with it or with their host.
    fn may_go(world: &World, command: &Command, id: VmId, was: &VmEntry) -> Result<(), TestCaseError> {
        let deletes = matches!(command, Command::DeleteVm { vm } if *vm == id);
        prop_assert!(was.record.desired == Desired::Deleted || deletes, "{id} went without having been deleted");
        let Some(host) = was.record.placement.host else {
            let none = !was.record.disks_exist || was.record.spec.disks.is_empty();
            prop_assert!(none, "{id} went and left its disks");
            return Ok(());
        };
        let removed = match command {
            Command::Report { host: from, reports } => {
                let told = |r: &VmObservation| r.vm == id && r.state == ObservedState::Deleted;
                *from == host && reports.iter().any(told)
            }
            _ => was.record.spec.disks.is_empty() || world.state.host(host).is_none(),
        };
        prop_assert!(removed, "{id} went and left its disks");
        Ok(())
    }

    /// P1: a VM leaves a host only if it surely does not execute there.
    fn may_leave(
        &self,
        world: &World,
        vm: VmId,
        host: HostId,
        incarnation: Incarnation,
        classes: &BTreeSet<u8>,
        at_rest: bool,
    ) -> Result<(), TestCaseError> {
        let gone = |liveness| classes.iter().all(|&class| lease_lapsed(CLASSES[usize::from(class)], liveness));
        let lapsed = world.state.host(host).is_some_and(|h| gone(h.record.liveness));
        prop_assert!(
            lapsed || (at_rest && self.ended.contains(&(vm, incarnation))),
            "{vm} left {host} under incarnation {incarnation}, where it may execute"
        );
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_after_any_commands(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::with_hosts(0);
        for n in 1..=HOSTS {
            world.ok(Step::Register { host: n }.command(&mut World::with_hosts(0)).unwrap());
        }
        let mut watcher = Watcher::default();
        for step in steps {
            let Some(command) = step.command(&mut world) else { continue };
            let before = World {
                state: world.state.clone(),
                now: world.now,
                silent: world.silent.clone(),
                arrived: world.arrived.clone(),
                stored: BTreeMap::new(),
                last: world.last.clone(),
                events: Vec::new(),
            };
            watcher.hear(&world, &command);
            // `run` compares the state with one that is rebuilt from the records.
            if world.run(command.clone()).is_ok() {
                watcher.check(&before, &world, &command)?;
            }
        }
    }
}
