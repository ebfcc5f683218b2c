//! Emptying hosts: each step, which is next (`reconcile/drain.rs`), and that a drain ends.

use std::time::Duration;

use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, VmId},
};

use super::fixtures::*;
use crate::{
    model::{DrainHow, EventType, HostMode, OwnDisks, Phase, vm::VmSpec},
    reconcile::drain::{Drains, How, LeftState, Progress, Stage, Step, Watch},
    state::{
        MIGRATIONS_PER_HOST, Prospect,
        command::{Command, DrainStep, HostFacts, Lapsed, ObservedState, PowerChange, VmObservation},
    },
};

fn at(secs: u64) -> Tick {
    Tick::from_boot(Duration::from_secs(secs))
}

fn small(pool: &str, memory_mib: u64) -> VmSpec {
    VmSpec { memory_mib, ..with_disk(pool) }
}

impl World {
    /// So many hosts, of which only the first has room now.
    fn one_open(hosts: u128) -> Self {
        let mut world = Self::with_hosts(hosts);
        for n in 2..=hosts {
            world.mode(n, HostMode::Cordoned);
        }
        world
    }

    fn mode(&mut self, n: u128, mode: HostMode) {
        self.ok(Command::SetHostMode { host: host_id(n), mode, reason: String::new() });
    }

    /// The first host is to be emptied, and the others take VMs.
    fn drain(&mut self, hosts: u128, how: DrainHow) {
        for n in 2..=hosts {
            self.mode(n, HostMode::Active);
        }
        self.ok(Command::DrainHost { host: host_id(1), how, disks: OwnDisks::Stay, reason: "a new fan".into() });
    }

    fn next(&mut self, drains: &mut Drains, secs: u64) -> Option<Step> {
        drains.next(&self.state, &self.cx(), at(secs))
    }

    fn step(&mut self, step: Step) {
        let Step { vm, from, how } = step;
        let step = match how {
            How::Migrate => DrainStep::Migrate { secret: "ab".repeat(32) },
            How::Stop => DrainStep::Stop,
        };
        self.ok(Command::DrainVm { vm, from, step });
    }

    fn steps(&mut self, drains: &mut Drains, secs: u64) -> Vec<VmId> {
        let mut vms = Vec::new();
        while let Some(step) = self.next(drains, secs) {
            assert!(vms.len() < 20, "it does not end");
            vms.push(step.vm);
            self.step(step);
        }
        vms
    }

    /// Both sides of a migration say that they are done.
    fn arrive(&mut self, vm: VmId) {
        let migration = self.record(vm).migration.clone().expect("it migrates");
        let n = migration.incarnation.0;
        let of = |world: &Self, state, incarnation, address| VmObservation {
            incarnation,
            migration: Some(seen(n, address)),
            ..world.observation(vm, state)
        };
        for state in [ObservedState::Incoming, ObservedState::Received] {
            let report = of(self, state, Incarnation(n), "127.0.0.1:1");
            self.ok(Command::Report { host: migration.target, reports: vec![report] });
        }
        let source = self.host_of(vm).unwrap();
        let report = of(self, ObservedState::HandedOver, Incarnation(self.incarnation(vm)), "");
        self.ok(Command::Report { host: source, reports: vec![report] });
        assert_eq!(self.host_of(vm), Some(migration.target));
        self.report(vm, ObservedState::Running);
    }

    fn on(&self, host: HostId) -> usize {
        self.state.vms_on(host).count()
    }

    fn prospect(&self, vm: VmId) -> Prospect {
        self.state.prospect(vm, &self.cx())
    }

    fn look(&self, watch: &mut Watch, secs: u64) -> Progress {
        watch.look(&self.state, &self.cx(), at(secs))
    }
}

#[test]
fn a_host_is_emptied_the_largest_first_and_so_many_at_once() {
    let mut world = World::one_open(3);
    let vms: Vec<VmId> = (1..=5).map(|n| world.running(n, small("shared", 64 * n as u64))).collect();
    let fixed = world.running(6, small("local", 640));
    let mut drains = Drains::default();
    assert_eq!(world.next(&mut drains, 1), None, "nobody has asked for it");
    world.drain(3, DrainHow::LiveOnly);
    assert_eq!(world.last_events(), [EventType::HostDraining]);
    assert!(world.message(EventType::HostDraining).ends_with("a new fan"));

    let mut watch = Watch::new(host_id(1));
    let progress = world.look(&mut watch, 1);
    assert_eq!((progress.stage, progress.moved, progress.left.len()), (Stage::GoesOn, 0, 6));
    assert_eq!(world.steps(&mut drains, 1), [vms[4], vms[3]]);
    assert_eq!(MIGRATIONS_PER_HOST, 2);
    let progress = world.look(&mut watch, 1);
    let count = |p: &Progress, state| p.left.iter().filter(|vm| vm.state == state).count();
    assert_eq!(count(&progress, LeftState::Moving), 2);

    // A new leader knows no more than the state says.
    let mut drains = Drains::default();
    for (arrives, follows) in [(4, vec![vms[2]]), (3, vec![vms[1]]), (2, vec![vms[0]]), (1, vec![]), (0, vec![])] {
        world.arrive(vms[arrives]);
        assert_eq!(world.steps(&mut drains, 2 + 5 * (4 - arrives as u64)), follows);
        assert_eq!(world.next(&mut drains, 2), None, "plan again: nothing to do");
    }
    assert_eq!(world.on(host_id(1)), 1);
    assert_eq!(world.host_of(fixed), Some(host_id(1)));

    assert_eq!(world.look(&mut watch, 100).stage, Stage::GoesOn, "the next moment a host may be back");
    let progress = world.look(&mut watch, 104);
    assert_eq!((progress.stage, progress.moved), (Stage::Stuck, 5));
    assert_eq!((progress.left[0].vm, progress.left[0].state), (fixed, LeftState::Cannot));
    assert!(progress.left[0].why.contains("a pool that only host `host-1` has"), "{}", progress.left[0].why);

    world.set(fixed, PowerChange::Stop);
    assert_eq!(world.look(&mut watch, 105).left[0].why, "is being stopped");
    world.report(fixed, ObservedState::Stopped);
    assert_eq!(world.look(&mut watch, 106).stage, Stage::Empty);
    world.mode(1, HostMode::Active);
    assert_eq!(world.look(&mut watch, 107).stage, Stage::Ended);
}

#[test]
fn a_drain_that_is_ended_begins_nothing_more_and_stops_nothing_that_it_began() {
    let mut world = World::one_open(2);
    let vms: Vec<VmId> = (1..=3).map(|n| world.running(n, small("shared", 64))).collect();
    world.drain(2, DrainHow::LiveOnly);
    let mut drains = Drains::default();
    let begun = world.steps(&mut drains, 1);
    assert_eq!(begun.len(), 2);
    let left = *vms.iter().find(|vm| !begun.contains(vm)).unwrap();
    world.mode(1, HostMode::Cordoned);
    assert_eq!(world.host(host_id(1)).mode, HostMode::Cordoned);
    for vm in begun {
        world.arrive(vm);
    }
    assert_eq!(world.next(&mut drains, 50), None);
    // One that was on its way from the reconciler when it was ended.
    let step = DrainStep::Migrate { secret: "ab".repeat(32) };
    let refusal = world.refused(Command::DrainVm { vm: left, from: host_id(1), step });
    assert!(refusal.to_string().contains("not being drained any more"), "{refusal}");
    assert_eq!(world.host_of(left), Some(host_id(1)));
}

#[test]
fn what_was_given_up_is_tried_again_later_and_later() {
    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.drain(2, DrainHow::LiveOnly);
    let mut drains = Drains::default();
    let mut now = 100;
    for pause in [5, 10, 20, 40, 80, 160, 300, 300] {
        assert_eq!(world.steps(&mut drains, now), [vm]);
        world.ok(Command::CancelMigration { vm });
        world.report(vm, ObservedState::Running);
        assert_eq!(world.next(&mut drains, now), None);
        assert_eq!(world.next(&mut drains, now + pause - 1), None);
        now += pause;
    }
    let progress = world.look(&mut Watch::new(host_id(1)), now);
    assert_eq!(progress.left[0].why, "is tried again; its last migration was given up: a user cancelled it");
    world.steps(&mut drains, now);
    world.arrive(vm);
    assert_eq!(world.next(&mut drains, now), None, "plan again: nothing to do");
}

/// Nothing is done about hosts that are not heard: what is on a lost one is moved as ever.
#[test]
fn silent_and_lost_hosts_are_left_alone() {
    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.drain(2, DrainHow::StopAndMove);
    let mut drains = Drains::default();
    world.silent.insert(host_id(1));
    assert_eq!(world.next(&mut drains, 1), None);
    world.silent = [host_id(2)].into();
    assert_eq!(world.next(&mut drains, 2), None);
    assert!(matches!(world.prospect(vm), Prospect::Waits(_)), "a silent host may be back: {:?}", world.prospect(vm));
    world.silent.clear();
    world.lapse(host_id(1), Lapsed::Both);
    assert_eq!(world.host_of(vm), Some(host_id(2)));
    assert_eq!(world.next(&mut drains, 3), None);
    assert_eq!(world.host(host_id(1)).mode, HostMode::Draining, "it stays so when it is back");
    world.return_of(1);
    assert_eq!(world.next(&mut drains, 4), None);
}

/// A VM that cannot migrate, and could start elsewhere: the other host executes guests in another way.
fn unmigratable(how: DrainHow) -> (World, VmId, HostId) {
    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.ok(Command::RegisterHost { host: Box::new(HostFacts { migration_address: String::new(), ..facts(2) }) });
    world.drain(2, how);
    (world, vm, host_id(1))
}

#[test]
fn w2_what_cannot_migrate_is_stopped_if_that_is_allowed_and_starts_elsewhere_when_it_has_stopped() {
    let (mut world, vm, host) = unmigratable(DrainHow::LiveOnly);
    let mut drains = Drains::default();
    assert_eq!(world.next(&mut drains, 1), None);
    let stop = Command::DrainVm { vm, from: host, step: DrainStep::Stop };
    assert!(world.refused(stop).to_string().contains("may not be stopped"));
    let mut watch = Watch::new(host);
    world.look(&mut watch, 1);
    let progress = world.look(&mut watch, 10);
    assert_eq!(progress.stage, Stage::Stuck);
    assert!(progress.left[0].why.ends_with("it could be stopped and started elsewhere"), "{}", progress.left[0].why);

    world.drain(2, DrainHow::StopAndMove);
    assert_eq!(world.next(&mut drains, 20), Some(Step { vm, from: host, how: How::Stop }));
    assert_eq!(world.steps(&mut drains, 20), [vm]);
    assert!(world.record(vm).is_moving_out());
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 1), "it still executes there");
    assert_eq!(world.look(&mut watch, 21).left[0].state, LeftState::Moving);
    for state in [ObservedState::Running, ObservedState::Stopping] {
        world.report(vm, state);
        assert_eq!(world.host_of(vm), Some(host));
        assert_eq!(world.next(&mut drains, 30), None);
    }
    world.report(vm, ObservedState::Stopped);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host_id(2)), 2));
    assert!(!world.record(vm).is_moving_out());
    assert_eq!(world.message(EventType::Stopped), "has stopped on host `host-1`, to start elsewhere");
    assert_eq!(world.next(&mut drains, 40), None, "plan again: nothing to do");
    assert_eq!(world.look(&mut watch, 41).stage, Stage::Empty);
}

#[test]
fn a_stop_on_the_way_ends_as_its_user_or_a_failure_would_have_it() {
    let begun = || {
        let (mut world, vm, host) = unmigratable(DrainHow::StopAndMove);
        assert_eq!(world.steps(&mut Drains::default(), 1), [vm]);
        (world, vm, host)
    };
    // The drain is ended: it has stopped, and starts where it was.
    let (mut world, vm, host) = begun();
    world.mode(1, HostMode::Active);
    world.report(vm, ObservedState::Stopped);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 2));
    assert!(!world.record(vm).is_moving_out());

    // Its host is lost: what counts is its lease.
    let (mut world, vm, host) = begun();
    world.lapse(host, Lapsed::Both);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host_id(2)), 2));
    assert!(!world.record(vm).is_moving_out());

    // Its user stops it.
    let (mut world, vm, host) = begun();
    world.set(vm, PowerChange::Stop);
    world.report(vm, ObservedState::Stopped);
    assert_eq!((world.host_of(vm), world.phase(vm)), (Some(host), Phase::Stopped));
    // And starts it: not on the host that is being emptied.
    world.set(vm, PowerChange::Start);
    assert_eq!(world.host_of(vm), Some(host_id(2)));

    // Its user stops and starts it before it has stopped: a new incarnation, which may have to be stopped, too.
    let (mut world, vm, host) = begun();
    world.set(vm, PowerChange::Stop);
    world.set(vm, PowerChange::Start);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(host), 2));
    assert!(!world.record(vm).is_moving_out());

    // Nothing else moves it meanwhile.
    let (mut world, vm, _) = begun();
    let migrate = Command::MigrateVm { vm, to: None, secret: "ab".repeat(32), bytes_per_second: 0 };
    assert!(world.refused(migrate).to_string().contains("is being stopped"));
}

#[test]
fn nothing_is_stopped_that_could_migrate_a_little_later_or_start_nowhere() {
    // Host 2 is the target of as many migrations as it may be.
    let mut world = World::one_open(3);
    let busy: Vec<VmId> = (1..=2).map(|n| world.running(n, small("shared", 64))).collect();
    world.mode(1, HostMode::Cordoned);
    world.mode(3, HostMode::Active);
    let vm = world.running(3, small("shared", 64));
    world.mode(3, HostMode::Cordoned);
    world.mode(2, HostMode::Active);
    for vm in busy {
        let secret = "ab".repeat(32);
        world.ok(Command::MigrateVm { vm, to: Some(host_id(2)), secret, bytes_per_second: 0 });
    }
    world.ok(Command::DrainHost {
        host: host_id(3),
        how: DrainHow::StopAndMove,
        disks: OwnDisks::Stay,
        reason: String::new(),
    });
    let Prospect::Waits(why) = world.prospect(vm) else { panic!("{:?}", world.prospect(vm)) };
    assert!(why.contains("try again later"), "{why}");
    assert_eq!(world.next(&mut Drains::default(), 1), None);

    // No other host has room.
    let (mut world, vm, host) = unmigratable(DrainHow::StopAndMove);
    world.mode(2, HostMode::Cordoned);
    assert!(matches!(world.prospect(vm), Prospect::Stuck(_)));
    assert_eq!(world.next(&mut Drains::default(), 1), None);
    assert_eq!(world.host_of(vm), Some(host));
}

#[test]
fn a_stopped_vm_is_at_rest_once_nothing_is_to_be_done_to_its_disks() {
    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.set(vm, PowerChange::Stop);
    assert_eq!(world.prospect(vm), Prospect::Waits("is being stopped".into()));
    world.report(vm, ObservedState::Stopped);
    assert_eq!(world.prospect(vm), Prospect::AtRest);
    world.ok(Command::CreateSnapshot { vm, id: uuid::Uuid::from_u128(7), name: "before".into() });
    assert_eq!(world.prospect(vm), Prospect::Waits("has stopped, and its disks are still worked on".into()));
}

#[test]
fn paused_and_failed_vms_are_explained() {
    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.drain(2, DrainHow::StopAndMove);
    world.set(vm, PowerChange::Pause);
    assert_eq!(world.prospect(vm), Prospect::Stuck("is paused; resume it, or stop it".into()));

    let mut world = World::one_open(2);
    let vm = world.running(1, small("shared", 64));
    world.drain(2, DrainHow::StopAndMove);
    world.report(vm, ObservedState::Failed);
    assert_eq!(world.prospect(vm), Prospect::AtRest, "nobody starts it again");
    let report = VmObservation {
        next_attempt: Some(uncloud_proto::clock::WallTime(9)),
        ..world.observation(vm, ObservedState::Failed)
    };
    world.ok(Command::Report { host: host_id(1), reports: vec![report] });
    assert!(matches!(world.prospect(vm), Prospect::CanStop(_)), "{:?}", world.prospect(vm));
    assert_eq!(world.steps(&mut Drains::default(), 1), [vm]);
}

/// Whoever is stopped first has the room, though it has no place yet.
#[test]
fn two_vms_are_not_stopped_for_the_same_room() {
    let mut world = World::one_open(2);
    let failing = |world: &mut World, n| {
        // Two do not fit beside each other on the second host, which has 4 GiB.
        let vm = world.running(n, small("shared", 1500));
        let next_attempt = Some(uncloud_proto::clock::WallTime(9));
        let report = VmObservation { next_attempt, ..world.observation(vm, ObservedState::Failed) };
        world.ok(Command::Report { host: host_id(1), reports: vec![report] });
        vm
    };
    let vms: Vec<VmId> = (1..=2).map(|n| failing(&mut world, n)).collect();
    world.mode(2, HostMode::Active);
    let _there = world.running(3, small("shared", 1500));
    assert_eq!(world.on(host_id(2)), 1);
    world.drain(2, DrainHow::StopAndMove);
    assert!(vms.iter().all(|vm| matches!(world.prospect(*vm), Prospect::CanStop(_))));
    assert_eq!(world.steps(&mut Drains::default(), 1).len(), 1);
    let left = vms.iter().filter(|vm| matches!(world.prospect(**vm), Prospect::Stuck(_))).count();
    assert_eq!(left, 1, "the other one has no room there and stays");
}
