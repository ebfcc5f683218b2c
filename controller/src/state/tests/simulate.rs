//! What-if against what happens.

use uncloud_proto::ids::{HostId, VmId};

use super::fixtures::*;
use crate::{
    model::vm::{Failover, OnDiskLoss, VmSpec},
    reconcile::plan::{Attempts, Situation, plan},
    state::{
        Fate, Outcome,
        command::{Command, Lapsed, Refusal},
    },
};

fn simulate(world: &World, hosts: &[HostId]) -> Vec<Fate> {
    let before = world.state.view().clone();
    let fates = world.state.simulate_failure(&hosts.iter().copied().collect(), &world.cx()).unwrap();
    assert!(*world.state.view() == before, "nothing changes");
    fates
}

fn outcome(fates: &[Fate], vm: VmId) -> &Outcome {
    &fates.iter().find(|f| f.vm == vm).unwrap().outcome
}

fn with(memory_mib: u64, priority: u32, failover: Failover, pool: &str) -> VmSpec {
    VmSpec { memory_mib, priority, failover, ..with_disk(pool) }
}

/// Puts all of them on host 1.
fn cluster(specs: &[VmSpec]) -> World {
    let mut world = World::with_hosts(1);
    for (n, spec) in (1..).zip(specs) {
        world.running(n, spec.clone());
    }
    for n in 2..=3 {
        world.ok(Command::RegisterHost { host: Box::new(facts(n)) });
    }
    world
}

#[test]
fn each_vm_has_the_fate_that_it_would_have() {
    let world = cluster(&[
        with(512, 0, Failover::Fast, "shared"),
        with(512, 0, Failover::Hold, "shared"),
        with(512, 0, Failover::Fast, "local"),
        VmSpec { on_disk_loss: OnDiskLoss::Recreate, ..with(512, 0, Failover::Fast, "local") },
        with(512, 0, Failover::Patient, "shared"),
    ]);
    let fates = simulate(&world, &[host_id(1)]);
    assert_eq!(fates.len(), 5);
    assert!(matches!(outcome(&fates, vm_id(1)), Outcome::Moves { to, .. } if *to != host_id(1)));
    assert!(matches!(outcome(&fates, vm_id(2)), Outcome::Unreachable { why } if why.contains("hold")));
    assert!(matches!(outcome(&fates, vm_id(3)), Outcome::Unreachable { why } if why.contains("only copy")));
    assert!(matches!(outcome(&fates, vm_id(4)), Outcome::MovesWithNewDisks { .. }));
    assert!(matches!(outcome(&fates, vm_id(5)), Outcome::Moves { .. }));
    // Those of the short lease go first.
    let order: Vec<_> = fates.iter().map(|f| f.vm).collect();
    assert!(order.iter().position(|v| *v == vm_id(4)) < order.iter().position(|v| *v == vm_id(5)));
}

#[test]
fn when_there_is_no_room_for_all_the_important_and_then_the_large_go_first() {
    let world = cluster(&[
        with(1024, 0, Failover::Fast, "shared"),
        with(2048, 0, Failover::Fast, "shared"),
        with(512, 9, Failover::Fast, "shared"),
    ]);
    // Host 2 dies, too: 4096 MiB are left on host 3, of which one VM needs none and 3072 are taken.
    let mut world = world;
    world.ok(Command::SetHostMode { host: host_id(1), mode: crate::model::HostMode::Cordoned, reason: String::new() });
    world.ok(Command::SetHostMode { host: host_id(2), mode: crate::model::HostMode::Cordoned, reason: String::new() });
    world.running(9, with(1024, 0, Failover::Fast, "shared"));
    assert_eq!(world.host_of(vm_id(9)), Some(host_id(3)));
    let fates = simulate(&world, &[host_id(1)]);
    let order: Vec<_> = fates.iter().map(|f| f.vm).collect();
    assert_eq!(order, [vm_id(3), vm_id(2), vm_id(1)]);
    assert!(matches!(outcome(&fates, vm_id(2)), Outcome::Moves { to, .. } if *to == host_id(3)));
    assert!(matches!(outcome(&fates, vm_id(1)), Outcome::Pending { why } if why.contains("1 lacks 1024 MiB")));
}

#[test]
fn it_is_what_a_real_failover_does() {
    let specs: Vec<VmSpec> = (0..12_u32)
        .map(|i| {
            let class = [Failover::Fast, Failover::Patient, Failover::Hold][i as usize % 3];
            with(96 * u64::from(1 + i % 5), i % 3, class, if i % 4 == 0 { "local" } else { "shared" })
        })
        .collect();
    let mut world = cluster(&specs);
    world.ok(Command::UpdateVm {
        vm: vm_id(2),
        update: Box::new(crate::state::command::VmUpdate {
            failover: Some(Failover::Fast),
            memory_mib: Some(700),
            ..Default::default()
        }),
    });
    let hosts = [host_id(1), host_id(2)];
    let fates = simulate(&world, &hosts);
    for lapsed in [Lapsed::Fast, Lapsed::Both] {
        for host in hosts {
            world.ok(Command::DeclareLapsed { host, lapsed, limit: 0 });
        }
        let situation = Situation { openings: world.state.view().openings(), silent: Default::default() };
        let now = uncloud_proto::clock::Tick::from_boot(std::time::Duration::from_secs(1));
        for vms in plan(&world.state, &Attempts::default(), &situation, now) {
            world.ok(Command::Place { vms });
        }
    }
    for Fate { vm, outcome, .. } in &fates {
        let host = world.host_of(*vm);
        match outcome {
            Outcome::Moves { to, .. } | Outcome::MovesWithNewDisks { to, .. } => assert_eq!(host, Some(*to), "{vm}"),
            Outcome::Pending { .. } => assert_eq!(host, None, "{vm}"),
            Outcome::Unreachable { .. } => assert_eq!(host, Some(host_id(1)), "{vm}"),
        }
    }
    assert_eq!(fates.len(), 12);
}

#[test]
fn a_host_that_is_not_there_is_refused() {
    let world = World::with_hosts(1);
    let none = world.state.simulate_failure(&[host_id(9)].into(), &world.cx());
    assert!(matches!(none, Err(Refusal::NoHost(_))));
}
