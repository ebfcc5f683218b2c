//! Migrations: how they begin, how they end, and that they end once.

use std::time::Duration;

use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, VmId},
};

use super::fixtures::*;
use crate::{
    model::{
        Desired, EventType, HostMode, Phase,
        migration::{Arrival, MigrationResult},
        vm::VmSpec,
    },
    reconcile::migrations::Migrations,
    sessions::{arrivals::Arrivals, parse::Reported},
    state::{
        MIGRATIONS_PER_HOST,
        command::{Command, HostFacts, Lapsed, ObservedState, PowerChange, Refusal, VmObservation},
    },
};

const ADDRESS: &str = "127.0.0.1:4444";

fn begin(vm: VmId, to: Option<HostId>) -> Command {
    Command::MigrateVm { vm, to, secret: "ab".repeat(32), bytes_per_second: 0 }
}

impl World {
    /// A running VM that goes from host 1 to host 2.
    fn migrating(&mut self, n: u128) -> VmId {
        let vm = self.running(n, with_disk("shared"));
        let target = other(self.host_of(vm).unwrap());
        self.ok(begin(vm, Some(target)));
        vm
    }

    fn target_says(&mut self, vm: VmId, state: ObservedState) {
        let migration = self.record(vm).migration.clone().expect("it migrates");
        self.target_of(migration.target, vm, migration.incarnation.0, state);
    }

    fn target_of(&mut self, host: HostId, vm: VmId, incarnation: u64, state: ObservedState) {
        let report = VmObservation {
            incarnation: Incarnation(incarnation),
            migration: Some(seen(incarnation, ADDRESS)),
            ..self.observation(vm, state)
        };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn source_sends(&mut self, vm: VmId, migration: u64, bytes: u64) {
        let host = self.host_of(vm).unwrap();
        let mut seen = seen(migration, "");
        seen.progress.transferred_bytes = bytes;
        let report = VmObservation { migration: Some(seen), ..self.observation(vm, ObservedState::Running) };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn source_says(&mut self, vm: VmId, state: ObservedState, migration: u64, failure: &str) {
        let host = self.host_of(vm).unwrap();
        let mut seen = seen(migration, "");
        seen.failure = failure.to_owned();
        let report = VmObservation { migration: Some(seen), ..self.observation(vm, state) };
        self.ok(Command::Report { host, reports: vec![report] });
    }

    fn result(&self, vm: VmId) -> (u64, MigrationResult, String) {
        let end = self.vm(vm).status.as_ref().unwrap().last_migration.clone().expect("one has ended");
        (end.incarnation.0, end.result, end.reason)
    }
}

#[test]
fn m1_when_both_sides_are_done_the_vm_changes_hosts_in_one_write() {
    for target_first in [true, false] {
        let mut world = World::with_hosts(2);
        let vm = world.migrating(1);
        let (source, target) = (world.host_of(vm).unwrap(), other(world.host_of(vm).unwrap()));
        assert_eq!(world.phase(vm), Phase::Migrating);
        assert_eq!(world.state.incoming(target).collect::<Vec<_>>(), [vm]);
        for host in [source, target] {
            assert_eq!(world.state.host(host).unwrap().promised.memory_mib, 1024, "promised on both");
        }
        world.target_says(vm, ObservedState::Incoming);
        assert_eq!(world.record(vm).migration.as_ref().unwrap().address, ADDRESS);
        world.source_says(vm, ObservedState::Running, 2, "");
        let progress = world.vm(vm).status.as_ref().unwrap().migration.clone().unwrap();
        assert_eq!(progress.transferred_bytes, 100);

        if target_first {
            world.target_says(vm, ObservedState::Received);
            assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(source), 1), "the source has not said so yet");
            assert!(world.last.mutations.is_empty(), "the hand-over need not wait for a write");
            world.source_says(vm, ObservedState::HandedOver, 2, "");
        } else {
            world.source_says(vm, ObservedState::HandedOver, 2, "");
            assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(source), 1), "the target may not have it");
            world.target_says(vm, ObservedState::Received);
        }
        assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(target), 2));
        assert_eq!(world.record(vm).migration, None);
        assert_eq!(world.last_events(), [EventType::Migrated]);
        assert_eq!(world.result(vm), (2, MigrationResult::Done, String::new()));
        assert_eq!(world.state.host(source).unwrap().promised.memory_mib, 0);
        assert_eq!(world.state.incoming(target).count(), 0);
        // What the source says now is about the past.
        let late = VmObservation { incarnation: Incarnation(1), ..world.observation(vm, ObservedState::Running) };
        world.ok(Command::Report { host: source, reports: vec![late] });
        assert!(world.last.mutations.is_empty());
        world.report(vm, ObservedState::Running);
        assert_eq!(world.phase(vm), Phase::Running);
    }
}

#[test]
fn m1_what_was_given_up_is_never_handed_over() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let (source, target) = (world.host_of(vm).unwrap(), other(world.host_of(vm).unwrap()));
    world.target_says(vm, ObservedState::Incoming);
    world.target_says(vm, ObservedState::Received);
    world.ok(Command::CancelMigration { vm });
    assert_eq!(world.result(vm), (2, MigrationResult::GivenUp, "a user cancelled it".into()));
    // The last words of both were on their way.
    world.source_says(vm, ObservedState::HandedOver, 2, "");
    world.target_of(target, vm, 2, ObservedState::Received);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(source), 1));
    assert!(matches!(world.refused(Command::CancelMigration { vm }), Refusal::Precondition(_)));

    // The next one has another number, and what is said of the first does not count for it.
    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, None));
    assert_eq!(world.record(vm).migration.as_ref().unwrap().incarnation, Incarnation(3));
    world.target_says(vm, ObservedState::Received);
    world.source_says(vm, ObservedState::HandedOver, 2, "");
    assert_eq!(world.host_of(vm), Some(source), "that was the first migration");
    world.ok(Command::GiveUpMigration { vm, migration: Incarnation(2), why: "late".into() });
    assert!(world.record(vm).migration.is_some(), "that was the first migration");
    world.source_says(vm, ObservedState::HandedOver, 3, "");
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(target), 3));
}

#[test]
fn m1_what_arrived_in_an_earlier_migration_or_term_has_not_arrived_now() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let (source, target) = (world.host_of(vm).unwrap(), other(world.host_of(vm).unwrap()));
    world.target_says(vm, ObservedState::Incoming);
    world.target_says(vm, ObservedState::Received);
    world.ok(Command::CancelMigration { vm });
    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, Some(target)));
    world.target_says(vm, ObservedState::Incoming);
    world.source_says(vm, ObservedState::HandedOver, 3, "");
    assert_eq!(world.host_of(vm), Some(source), "the target has nothing yet");
    world.target_says(vm, ObservedState::Received);
    assert_eq!(world.host_of(vm), Some(target));

    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, Some(source)));
    world.target_says(vm, ObservedState::Received);
    // A new leader.
    world.arrived.clear();
    world.source_says(vm, ObservedState::HandedOver, 4, "");
    assert_eq!(world.host_of(vm), Some(target), "it has not been told");
    world.target_says(vm, ObservedState::Received);
    assert_eq!(world.host_of(vm), Some(source));
}

/// What the sessions remember of it: no more than there are migrations, and only what their targets say.
#[test]
fn only_targets_say_what_has_arrived() {
    let mut world = World::with_hosts(2);
    let (first, second) = (world.migrating(1), world.migrating(2));
    let target = other(world.host_of(first).unwrap());
    let arrivals = Arrivals::default();
    let says = |world: &World, host, vm, incarnation, state| {
        let seen = VmObservation { incarnation: Incarnation(incarnation), ..world.observation(vm, state) };
        arrivals.note(&world.state, host, &[Reported { sequence: 1, seen }]);
        arrivals.all().iter().map(|(vm, incarnation)| (*vm, incarnation.0)).collect::<Vec<_>>()
    };
    assert_eq!(says(&world, other(target), first, 2, ObservedState::Received), []);
    assert_eq!(says(&world, target, first, 1, ObservedState::Received), []);
    assert_eq!(says(&world, target, first, 2, ObservedState::Incoming), []);
    assert_eq!(says(&world, target, first, 2, ObservedState::Received), [(first, 2)]);
    world.ok(Command::CancelMigration { vm: first });
    let target = world.record(second).migration.as_ref().unwrap().target;
    assert_eq!(says(&world, target, second, 2, ObservedState::Received), [(second, 2)]);
}

/// M2: no other way to a host uses a number that a target may have.
#[test]
fn m3_a_source_that_does_not_know_of_it_any_more_keeps_the_vm() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let source = world.host_of(vm).unwrap();
    world.target_says(vm, ObservedState::Incoming);
    world.source_says(vm, ObservedState::HandedOver, 2, "");
    // Its agent has lost its record, and may have let the guest go on.
    world.report(vm, ObservedState::Running);
    assert_eq!(world.record(vm).migration, None);
    world.target_of(other(source), vm, 2, ObservedState::Received);
    assert_eq!((world.host_of(vm), world.incarnation(vm)), (Some(source), 1));
}

#[test]
fn m2_a_reserved_incarnation_is_given_to_nothing_else() {
    let mut world = World::with_hosts(3);
    let vm = world.migrating(1);
    let source = world.host_of(vm).unwrap();
    world.lapse(source, Lapsed::Both);
    assert_eq!(world.incarnation(vm), 3);
    assert_eq!(world.record(vm).migration, None);
    assert_eq!(world.result(vm).1, MigrationResult::GivenUp);
}

#[test]
fn a_failure_on_either_side_leaves_the_vm_where_it_is() {
    type Story = fn(&mut World, VmId);
    let stories: [(&str, Story); 6] = [
        ("the target fails", |w, vm| w.target_says(vm, ObservedState::Failed)),
        ("the target is fenced", |w, vm| w.target_says(vm, ObservedState::Fenced)),
        ("the target has forgotten it", |w, vm| w.target_says(vm, ObservedState::Forgotten)),
        ("sending fails", |w, vm| w.source_says(vm, ObservedState::Running, 2, "no route")),
        ("the source's QEMU dies", |w, vm| w.report(vm, ObservedState::Failed)),
        ("it is started again", |w, vm| w.report(vm, ObservedState::Preparing)),
    ];
    for (what, story) in stories {
        let mut world = World::with_hosts(2);
        let vm = world.migrating(1);
        let source = world.host_of(vm);
        story(&mut world, vm);
        assert_eq!(world.record(vm).migration, None, "{what}");
        assert_eq!((world.host_of(vm), world.incarnation(vm)), (source, 1), "{what}");
        assert!(world.last_events().contains(&EventType::MigrationGivenUp), "{what}");
        assert_eq!(world.record(vm).desired, Desired::Running, "{what}");
    }
}

/// The source has sent everything: whether its remains live does not matter any more.
#[test]
fn a_source_that_dies_after_it_has_sent_everything_does_not_stop_the_hand_over() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let target = other(world.host_of(vm).unwrap());
    world.source_says(vm, ObservedState::HandedOver, 2, "");
    world.report(vm, ObservedState::Failed);
    world.target_says(vm, ObservedState::Received);
    assert_eq!(world.host_of(vm), Some(target));
}

/// A target that is not heard may be lost with all that it has; the source is still there.
#[test]
fn nothing_is_handed_over_to_a_host_that_is_not_heard() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let source = world.host_of(vm).unwrap();
    world.target_says(vm, ObservedState::Received);
    world.silent.insert(other(source));
    world.source_says(vm, ObservedState::HandedOver, 2, "");
    assert_eq!(world.host_of(vm), Some(source));
    assert!(world.record(vm).migration.as_ref().unwrap().handed_over.is_some(), "it is remembered");
}

#[test]
fn whatever_a_user_asks_for_ends_the_migration_first() {
    let commands: [fn(VmId) -> Command; 4] = [
        |vm| Command::SetDesired { vm, desired: PowerChange::Stop },
        |vm| Command::SetDesired { vm, desired: PowerChange::ForceStop },
        |vm| Command::RestartVm { vm, force: false },
        |vm| Command::DeleteVm { vm },
    ];
    for command in commands {
        let mut world = World::with_hosts(2);
        let vm = world.migrating(1);
        let source = world.host_of(vm);
        world.ok(command(vm));
        assert_eq!((world.record(vm).migration.clone(), world.host_of(vm)), (None, source), "{:?}", command(vm));
        assert_eq!(world.result(vm).1, MigrationResult::GivenUp);
    }
    // To start what runs is nothing.
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    world.set(vm, PowerChange::Start);
    assert!(world.record(vm).migration.is_some());
    // A guest that switches itself off is off.
    world.report(vm, ObservedState::PoweredOff);
    assert_eq!((world.record(vm).migration.clone(), world.record(vm).desired), (None, Desired::Stopped));
}

#[test]
fn what_cannot_migrate_is_refused_and_the_reason_says_why() {
    let mut world = World::with_hosts(2);
    let why = |world: &mut World, command| world.refused(command).to_string();
    let vm = world.running(1, with_disk("shared"));
    let source = world.host_of(vm).unwrap();
    assert!(why(&mut world, begin(vm, Some(source))).contains("has the VM already"));
    let local = world.running(2, with_disk("local"));
    let snapshot = Command::CreateSnapshot { vm: local, id: uuid::Uuid::from_u128(5), name: "before".into() };
    world.ok(snapshot);
    assert!(why(&mut world, begin(local, None)).contains("has snapshots"));
    let starting = world.create(3, spec());
    assert!(why(&mut world, begin(starting, None)).contains("does not run"));
    world.ok(Command::SetHostMode { host: other(source), mode: HostMode::Cordoned, reason: String::new() });
    assert!(why(&mut world, begin(vm, Some(other(source)))).contains("is cordoned"));
    assert!(why(&mut world, begin(vm, None)).contains("1 is cordoned"));
    world.ok(Command::SetHostMode { host: other(source), mode: HostMode::Active, reason: String::new() });
    let n = if source == host_id(1) { 2 } else { 1 };
    world.ok(Command::RegisterHost { host: Box::new(HostFacts { migration_address: String::new(), ..facts(n) }) });
    assert!(why(&mut world, begin(vm, None)).contains("has no migration address"));
    world.ok(Command::RegisterHost { host: Box::new(facts(n)) });
    world.ok(begin(vm, None));
    assert!(why(&mut world, begin(vm, None)).contains("is being migrated"));
}

#[test]
fn a_host_is_part_of_so_many_migrations_and_no_more() {
    let mut world = World::with_hosts(2);
    let small = || VmSpec { memory_mib: 64, ..with_disk("shared") };
    let vms: Vec<VmId> = (1..=6).map(|n| world.running(n, small())).collect();
    for &vm in vms.iter().take(MIGRATIONS_PER_HOST) {
        let target = other(world.host_of(vm).unwrap());
        world.ok(begin(vm, Some(target)));
    }
    let last = *vms.last().unwrap();
    assert!(world.refused(begin(last, None)).to_string().contains("migrations under way"));
    world.ok(Command::CancelMigration { vm: vms[0] });
    world.ok(begin(last, None));
}

/// The reconciler gives up what cannot go on, and nothing else.
#[test]
fn hopeless_migrations_are_found() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let target = other(world.host_of(vm).unwrap());
    let mut watch = Migrations::default();
    let mut hopeless = |world: &World, secs: u64| {
        watch.hopeless(&world.state, &world.silent, Tick::from_boot(Duration::from_secs(secs)))
    };
    assert!(hopeless(&world, 1000).is_empty());
    assert!(hopeless(&world, 1100).is_empty());
    assert_eq!(hopeless(&world, 1130).len(), 1, "the target is not ready");
    world.target_says(vm, ObservedState::Incoming);
    assert_eq!(world.record(vm).migration.as_ref().unwrap().arrival, Arrival::Listening);
    let incarnation = world.record(vm).migration.as_ref().unwrap().incarnation.0;
    for secs in (1131..4600).step_by(15) {
        world.source_sends(vm, incarnation, secs);
        assert!(hopeless(&world, secs).is_empty());
    }
    world.source_sends(vm, incarnation, 1);
    assert_eq!(hopeless(&world, 4700).len(), 1, "it takes too long");
    world.silent.insert(target);
    let [command] = &hopeless(&world, 1200)[..] else { panic!("the target is silent") };
    world.ok(command.clone());
    assert_eq!(world.record(vm).migration, None);
    assert!(hopeless(&world, 4700).is_empty(), "plan again: nothing to do");

    world.silent.clear();
    world.ok(begin(vm, None));
    assert!(hopeless(&world, 4800).is_empty());
    world.source_says(vm, ObservedState::HandedOver, 3, "");
    assert!(hopeless(&world, 4801).is_empty());
    assert!(hopeless(&world, 4806).is_empty());
    assert_eq!(hopeless(&world, 4807).len(), 1, "the guest stands still for too long");
}

/// Hosts that do not reach each other: what the source sends gets nowhere, and it says so.
#[test]
fn a_migration_that_does_not_get_on_is_given_up_unless_its_source_is_not_heard() {
    let mut world = World::with_hosts(2);
    let vm = world.migrating(1);
    let source = world.host_of(vm).unwrap();
    let migration = world.record(vm).migration.clone().unwrap();
    let mut watch = Migrations::default();
    let mut hopeless = |world: &World, secs: u64| {
        watch.hopeless(&world.state, &world.silent, Tick::from_boot(Duration::from_secs(secs)))
    };
    world.target_says(vm, ObservedState::Incoming);
    assert!(hopeless(&world, 100).is_empty());
    world.source_sends(vm, migration.incarnation.0, 1000);
    assert!(hopeless(&world, 110).is_empty());
    assert!(hopeless(&world, 125).is_empty());
    world.silent.insert(source);
    assert!(hopeless(&world, 126).is_empty(), "nobody knows what it sends");
    world.silent.clear();
    assert!(hopeless(&world, 141).is_empty());
    let [command] = &hopeless(&world, 142)[..] else { panic!("it does not get on") };
    world.ok(command.clone());
    assert_eq!(world.record(vm).migration, None);
    assert!(hopeless(&world, 143).is_empty(), "plan again: nothing to do");
}

/// The target takes restarts for done, so one that is under way would be lost.
#[test]
fn a_vm_that_is_being_restarted_does_not_leave() {
    let mut world = World::with_hosts(2);
    let vm = world.running(1, with_disk("shared"));
    let host = world.host_of(vm).unwrap();
    world.ok(Command::RestartVm { vm, force: false });
    assert!(world.refused(begin(vm, None)).to_string().contains("is being restarted"));
    let before = VmObservation { restarts_done: 0, ..world.observation(vm, ObservedState::Running) };
    world.ok(Command::Report { host, reports: vec![before] });
    assert!(world.refused(begin(vm, None)).to_string().contains("is being restarted"));
    world.report(vm, ObservedState::Running);
    world.ok(begin(vm, None));
}
