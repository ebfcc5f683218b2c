//! VMs are moved to other hosts while they run. Whatever fails on the way, each executes on exactly one side (P1), its counter
//! goes on (P5), and a guest that was not lost has not been started anew (P3).

use harness::{
    agent::HostOptions,
    api::{host_of, incarnation_of, phase_of},
    checker::Instance,
    migration::{Load, loaded},
    prelude::*,
    proc_table::Kind,
};
use uncloud_proto::v1::{MigrationResult, Vm, VmPhase};

fn to(vm: &Vm, host: &str) -> v1::MigrateVmRequest {
    v1::MigrateVmRequest { vm: vm.id.clone(), host: host.to_owned(), ..Default::default() }
}

/// Waits until the migration that gives the VM this incarnation is over; says how it ended.
async fn ended(cluster: &Cluster, vm: &Vm, incarnation: u64) -> anyhow::Result<(Vm, v1::MigrationEnd)> {
    let end = |vm: &Vm| {
        let end = vm.status.as_ref()?.last_migration.clone()?;
        (end.incarnation == incarnation).then_some(end)
    };
    let vm = cluster.api.wait_vm(&vm.id, "has migrated, or not", secs(60), |vm| end(vm).is_some()).await?;
    let end = end(&vm).context("it has ended")?;
    Ok((vm, end))
}

/// Begins a migration; returns the incarnation that the VM has on the target.
async fn begin(cluster: &Cluster, request: v1::MigrateVmRequest) -> anyhow::Result<u64> {
    let answer = cluster.api.vms().migrate_vm(request).await?.into_inner();
    let vm = answer.vm.context("a VM")?;
    let migration = vm.status.and_then(|s| s.migration).context("a migration")?;
    Ok(migration.incarnation)
}

async fn migrate(cluster: &Cluster, vm: &Vm, host: &str) -> anyhow::Result<Vm> {
    let incarnation = begin(cluster, to(vm, host)).await?;
    let (_, end) = ended(cluster, vm, incarnation).await?;
    ensure!(end.result() == MigrationResult::Done, "{end:?}");
    cluster
        .api
        .wait_vm(&vm.id, "runs on the target", secs(30), |vm| {
            phase_of(vm) == VmPhase::Running && host_of(vm) == host && incarnation_of(vm) == incarnation
        })
        .await
}

fn other(vm: &Vm) -> &'static str {
    if host_of(vm) == "host-1" { "host-2" } else { "host-1" }
}

/// The only QEMU that is left.
async fn only(cluster: &Cluster, vm: &Vm) -> anyhow::Result<Instance> {
    wait_for("one QEMU is left", secs(20), async || {
        let alive: Vec<Instance> = cluster.checker.instances(&vm.id).into_iter().filter(|i| i.alive).collect();
        match &alive[..] {
            [one] => Ok(one.clone()),
            more => Err(format!("{more:?}")),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_to_and_fro_while_it_counts() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).start().await?;
    let mut vm = cluster.run(specs::micro("wanderer")).await?;
    let boot = cluster.checker.beats(&vm.id).last().context("a beat")?.said.boot.clone();
    for _ in 0..4 {
        let target = other(&vm);
        let began = Instant::now();
        vm = migrate(&cluster, &vm, target).await?;
        eprintln!("migrated to {target} in {:.2?}", began.elapsed());
        let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
        assert_eq!((beat.host.as_str(), beat.said.boot.as_str()), (target, boot.as_str()), "the same guest goes on");
        assert_eq!(only(&cluster, &vm).await?.host, target);
    }
    // Once by hand, and to wherever the cluster likes.
    let done = cluster.cli(&["vm", "migrate", "wanderer", "--wait"]).await?.success()?;
    eprintln!("{}", done.stderr);
    assert!(done.stdout.contains("running") && done.stdout.contains(other(&vm)), "{}", done.stdout);
    let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    assert_eq!(beat.said.boot, boot);
    let gaps: Vec<Instant> = cluster.checker.beats(&vm.id).iter().map(|b| b.at).collect();
    let longest = gaps.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default();
    eprintln!("longest time between two beats over five migrations: {longest:.2?}; the guest beats every 0.99 s");
    // It still obeys, and its record says where it is.
    cluster.api.stop(&vm.id).await?;
    cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(30)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_migrate_is_refused_with_a_reason() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).start().await?;
    let vm = cluster.run(specs::micro("picky")).await?;
    // Its disk would be copied without the snapshot.
    let local = specs::with(specs::micro("local"), |s| s.disks[0].pool = specs::LOCAL.into());
    let local = cluster.run(local).await?;
    cluster.cli(&["vm", "snapshot", "create", "local", "before"]).await?.success()?;
    cluster.add_host(&HostOptions { memory_mib: 8, ..HostOptions::default() }).await?;
    let cases = [
        (to(&vm, host_of(&vm)), Code::FailedPrecondition, "has the VM already"),
        (to(&vm, "host-3"), Code::FailedPrecondition, "lacks 16 MiB of memory"),
        (to(&vm, "nowhere"), Code::NotFound, "nowhere"),
        (to(&local, ""), Code::FailedPrecondition, "has snapshots"),
        (v1::MigrateVmRequest { bytes_per_second: 5, ..to(&vm, "") }, Code::InvalidArgument, "bytes_per_second"),
    ];
    for (request, code, words) in cases {
        let status = cluster.api.vms().migrate_vm(request.clone()).await.expect_err("refused");
        assert_eq!(status.code(), code, "{request:?}: {status}");
        assert!(status.message().contains(words), "{request:?}: {status}");
    }
    let cancel = v1::CancelMigrationRequest { vm: vm.id.clone(), ..Default::default() };
    let status = cluster.api.vms().cancel_migration(cancel).await.expect_err("there is none");
    assert!(status.message().contains("is not being migrated"), "{status}");
    cluster.finish().await
}

/// M2, M3: with the source's agent stopped nothing is sent, and the target waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_or_is_called_off_changes_nothing_for_the_vm() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    // Its agent is stopped for a moment, which is not to be what ends it.
    let patient = specs::with(specs::micro("stayer"), |s| s.set_failover(v1::FailoverPolicy::Patient));
    let vm = cluster.run(patient).await?;
    let before = cluster.checker.running(&vm.id).context("it runs")?;
    let target = other(&vm);

    cluster.host_of(&vm)?.signal(Signal::STOP)?;
    let incarnation = begin(&cluster, to(&vm, target)).await?;
    let qemu = wait_for("the target's QEMU", secs(20), async || {
        cluster.host(target).and_then(|h| h.process_of(&vm.id, Kind::Qemu)).map_err(|e| e.to_string())
    })
    .await?;
    harness::process::kill_pid(qemu.pid);
    cluster.host_of(&vm)?.signal(Signal::CONT)?;
    let (_, end) = ended(&cluster, &vm, incarnation).await?;
    assert_eq!(end.result(), MigrationResult::GivenUp);
    assert!(end.reason.contains(target), "{}", end.reason);

    // Called off by a user, while the target waits.
    cluster.host_of(&vm)?.signal(Signal::STOP)?;
    let incarnation = begin(&cluster, to(&vm, target)).await?;
    let cancel = v1::CancelMigrationRequest { vm: vm.id.clone(), ..Default::default() };
    cluster.api.vms().cancel_migration(cancel).await?;
    cluster.host_of(&vm)?.signal(Signal::CONT)?;
    let (_, end) = ended(&cluster, &vm, incarnation).await?;
    assert_eq!((end.result(), end.reason.as_str()), (MigrationResult::GivenUp, "a user cancelled it"));

    cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    let after = only(&cluster, &vm).await?;
    assert_eq!((after.pid, after.start), (before.pid, before.start), "P3: the same QEMU");
    let now = cluster.api.wait_running(&vm.id, secs(20)).await?;
    assert_eq!(incarnation_of(&now), incarnation_of(&vm));
    // And it can still go, with a number that was never used.
    let moved = migrate(&cluster, &now, target).await?;
    assert!(incarnation_of(&moved) > incarnation, "{} after {incarnation}", incarnation_of(&moved));
    cluster.finish().await
}

/// What is killed, at a moment that nobody chose.
#[derive(Clone, Copy, Debug)]
enum Victim {
    SourceQemu,
    TargetQemu,
    SourceAgent,
    TargetAgent,
    Leader,
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_on_the_way_the_vm_ends_on_exactly_one_side() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().controllers(2).start().await?;
    let mut vm = cluster.run(specs::micro("survivor")).await?;
    let victims = [Victim::SourceQemu, Victim::TargetQemu, Victim::SourceAgent, Victim::TargetAgent, Victim::Leader];
    for (round, victim) in victims.into_iter().cycle().take(10).enumerate() {
        let (source, target) = (host_of(&vm).to_owned(), other(&vm));
        let incarnation = begin(&cluster, to(&vm, target)).await?;
        // A little later in each round: a migration takes some hundred milliseconds.
        tokio::time::sleep(Duration::from_millis(60 * round as u64)).await;
        match victim {
            Victim::SourceQemu | Victim::TargetQemu => {
                let host = if matches!(victim, Victim::SourceQemu) { source.as_str() } else { target };
                if let Ok(qemu) = cluster.host(host)?.process_of(&vm.id, Kind::Qemu) {
                    harness::process::kill_pid(qemu.pid);
                }
            }
            Victim::SourceAgent | Victim::TargetAgent => {
                let host = if matches!(victim, Victim::SourceAgent) { source.as_str() } else { target };
                cluster.host(host)?.kill();
                cluster.host(host)?.start_again()?;
            }
            Victim::Leader => {
                let leader = cluster.leader().await?;
                cluster.controller_at(leader).process().kill();
                cluster.controller_at(leader).process().start_again()?;
            }
        }
        let (_, end) = ended(&cluster, &vm, incarnation).await?;
        vm = cluster.api.wait_running(&vm.id, secs(60)).await?;
        let beat = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
        let left = only(&cluster, &vm).await?;
        eprintln!("{victim:?} after {} ms: {:?} {}; on {}", 60 * round, end.result(), end.reason, host_of(&vm));
        assert_eq!((left.host.as_str(), beat.host.as_str()), (host_of(&vm), host_of(&vm)));
        cluster.wait_hosts().await?;
    }
    cluster.finish().await
}

/// A guest that writes to 16 MiB of its memory, 64 MiB a second, is sent with 24 MiB a second: QEMU slows it until it gets there.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_faster_than_it_can_be_sent_gets_there() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).linux().start().await?;
    let load = Load { beat_ms: 100, dirty_kib: 16 << 10, kib_per_second: 64 << 10 };
    let vm = cluster.run(loaded("busy", load)).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?.said.boot;
    let began = Instant::now();
    let request = v1::MigrateVmRequest { bytes_per_second: 24 << 20, ..to(&vm, other(&vm)) };
    let incarnation = begin(&cluster, request).await?;
    let (moved, end) = ended(&cluster, &vm, incarnation).await?;
    assert_eq!(end.result(), MigrationResult::Done, "{}", end.reason);
    eprintln!("it got there in {:.1?}", began.elapsed());
    let beat = cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&moved), &boot), "the same guest goes on");
    cluster.finish().await
}
