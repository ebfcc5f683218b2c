//! A host is emptied while its guests run: nothing stops (P3), nothing is lost or doubled (P1, P5), and what cannot leave is
//! named. A drain that is ended begins nothing more, and one that may stop guests starts them elsewhere.

use std::collections::BTreeMap;

use harness::{
    agent::HostOptions,
    api::{host_of, incarnation_of, phase_of},
    prelude::*,
};
use uncloud_proto::v1::{DrainState, HostMode, MigrationResult, Vm, VmPhase};

const GUESTS: usize = 10;
const EXIT_REFUSED: i32 = 4;

/// The boot of each guest, by VM.
type Boots = BTreeMap<String, String>;

fn boots(cluster: &Cluster, vms: &[Vm]) -> anyhow::Result<Boots> {
    let boot = |vm: &Vm| Ok((vm.id.clone(), cluster.checker.beats(&vm.id).last().context("a beat")?.said.boot.clone()));
    vms.iter().map(boot).collect()
}

async fn mode(cluster: &Cluster, host: &str, mode: HostMode) -> anyhow::Result<()> {
    let host = host.to_owned();
    match mode {
        HostMode::Cordoned => {
            cluster.api.hosts().cordon_host(v1::CordonHostRequest { host, reason: String::new() }).await?;
        }
        HostMode::Active | HostMode::Draining | HostMode::Unspecified => {
            cluster.api.hosts().uncordon_host(v1::UncordonHostRequest { host }).await?;
        }
    }
    Ok(())
}

/// Moves a VM and waits until it has gone, as a person would who does one after the other.
async fn by_hand(cluster: &Cluster, vm: &Vm, host: &str) -> anyhow::Result<()> {
    let request = v1::MigrateVmRequest { vm: vm.id.clone(), host: host.to_owned(), ..Default::default() };
    let answer = cluster.api.vms().migrate_vm(request).await?.into_inner();
    let migration = answer.vm.and_then(|vm| vm.status?.migration).context("a migration")?;
    let is_over = |vm: &Vm| {
        let end = vm.status.as_ref().and_then(|s| s.last_migration.as_ref());
        end.is_some_and(|end| end.incarnation == migration.incarnation)
    };
    let vm = cluster.api.wait_vm(&vm.id, "has migrated", secs(60), is_over).await?;
    let end = vm.status.and_then(|s| s.last_migration).context("an end")?;
    ensure!(end.result() == MigrationResult::Done, "{end:?}");
    Ok(())
}

/// From the beginning of the drain of host-1 until the last of these VMs had left, by the events.
async fn drain_time(cluster: &Cluster, vms: &[Vm]) -> anyhow::Result<Duration> {
    let newest = async |subject: &str, kind: &str| -> anyhow::Result<Duration> {
        let events = cluster.api.events(subject).await?;
        let times = events.iter().filter(|e| e.r#type == kind).filter_map(|e| e.time.as_ref());
        let newest = times.map(|t| (t.seconds, t.nanos)).max().with_context(|| format!("no {kind} of {subject}"))?;
        Ok(Duration::new(newest.0.try_into()?, newest.1.try_into()?))
    };
    let mut last = Duration::ZERO;
    for vm in vms {
        last = last.max(newest(&vm.id, "Migrated").await?);
    }
    let host = cluster.api.wait_host("host-1", v1::HostState::Up, secs(10)).await?;
    Ok(last.saturating_sub(newest(&host.id, "HostDraining").await?))
}

/// Every guest goes on on this host, and is the one that it was.
async fn go_on(cluster: &Cluster, vms: &[Vm], before: &Boots, host: &str) -> anyhow::Result<()> {
    for vm in vms {
        let now = cluster.api.wait_running(&vm.id, secs(60)).await?;
        ensure!(host_of(&now) == host, "{} is on {}", now.name, host_of(&now));
        let beat = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
        ensure!(beat.host == host && before.get(&vm.id) == Some(&beat.said.boot), "{}: {beat:?}", now.name);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_emptied_and_no_guest_notices() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).default_leases().controllers(2).start().await?;
    mode(&cluster, "host-2", HostMode::Cordoned).await?;
    let mut vms = Vec::new();
    for n in 0..GUESTS {
        vms.push(cluster.run(specs::micro(&format!("guest-{n}"))).await?);
    }
    let local = specs::with(specs::micro("local"), |s| s.disks[0].pool = specs::LOCAL.into());
    let local = cluster.run(local).await?;
    mode(&cluster, "host-2", HostMode::Active).await?;
    let before = boots(&cluster, &vms)?;

    let drained = cluster.cli(&["host", "drain", "host-1", "--reason", "a new fan", "-o", "json"]).await?;
    eprintln!("{}", drained.stderr);
    assert_eq!(drained.code, EXIT_REFUSED, "the local one is left: {}", drained.stderr);
    assert!(drained.stderr.contains("1 VM cannot leave host `host-1`"), "{}", drained.stderr);
    assert!(drained.stderr.contains("`local`") && drained.stderr.contains("a pool that only host `host-1` has"));
    let last = drained.json()?;
    assert_eq!((&last["state"], &last["moved"], &last["cannot"]), (&"DRAIN_STATE_STUCK".into(), &10.into(), &1.into()));
    assert_eq!(last["left"][0]["name"], "local");
    go_on(&cluster, &vms, &before, "host-2").await?;
    let still = cluster.api.wait_running(&local.id, secs(20)).await?;
    assert_eq!((host_of(&still), incarnation_of(&still)), ("host-1", incarnation_of(&local)));
    let host = cluster.cli(&["host", "list"]).await?.success()?;
    assert!(host.stdout.contains("up,draining") && host.stdout.contains("a new fan"), "{}", host.stdout);

    let took = drain_time(&cluster, &vms).await?;

    // It takes nothing, though it has room; and when the last one stops it is empty.
    let late = cluster.run(specs::micro("late")).await?;
    assert_eq!(host_of(&late), "host-2");
    cluster.api.stop(&local.id).await?;
    cluster.api.wait_phase(&local.id, VmPhase::Stopped, secs(30)).await?;
    let empty = cluster.cli(&["host", "drain", "host-1"]).await?.success()?;
    assert!(empty.stdout.contains("nothing executes there any more"), "{}", empty.stdout);
    cluster.cli(&["host", "uncordon", "host-1"]).await?.success()?;

    // The same by hand.
    let began = Instant::now();
    for vm in &vms {
        by_hand(&cluster, vm, "host-1").await?;
    }
    let by_hand = began.elapsed();
    go_on(&cluster, &vms, &before, "host-1").await?;
    eprintln!("{GUESTS} guests left their host within {took:.2?}; one by one, by hand, that took {by_hand:.2?}");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_ended_begins_nothing_more() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().controllers(2).start().await?;
    mode(&cluster, "host-2", HostMode::Cordoned).await?;
    let mut vms = Vec::new();
    for n in 0..6 {
        vms.push(cluster.run(specs::micro(&format!("guest-{n}"))).await?);
    }
    mode(&cluster, "host-2", HostMode::Active).await?;
    let before = boots(&cluster, &vms)?;
    // Nothing can arrive at a host whose agent is stopped, so what is begun stays under way until it is ended.
    cluster.host("host-2")?.signal(Signal::STOP)?;
    let begun = cluster.cli(&["host", "drain", "host-1", "--no-wait"]).await?.success()?;
    assert!(begun.stdout.contains("is being drained"), "{}", begun.stdout);
    let request = v1::DrainHostRequest { host: "host-1".into(), watch_only: true, ..Default::default() };
    let mut stream = cluster.api.hosts().drain_host(request.clone()).await?.into_inner();
    cluster.api.hosts().uncordon_host(v1::UncordonHostRequest { host: "host-1".into() }).await?;
    cluster.host("host-2")?.signal(Signal::CONT)?;
    let mut last = None;
    let status = loop {
        match stream.message().await {
            Ok(Some(message)) => last = Some(message),
            Ok(None) => bail!("it does not say that it was ended"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("ended by somebody"), "{status}");
    assert_eq!(last.context("a message")?.state(), DrainState::Ended);
    let again = cluster.api.hosts().drain_host(request).await.expect_err("there is none to watch");
    assert!(again.message().contains("is not being drained"), "{again}");

    // Those two that were under way arrive or are given up; the others stay.
    let mut on = BTreeMap::new();
    for vm in &vms {
        let now = cluster
            .api
            .wait_vm(&vm.id, "does not migrate any more", secs(60), |vm| {
                phase_of(vm) == VmPhase::Running && vm.status.as_ref().is_some_and(|s| s.migration.is_none())
            })
            .await?;
        *on.entry(host_of(&now).to_owned()).or_insert(0) += 1;
        let beat = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
        assert_eq!(Some(&beat.said.boot), before.get(&vm.id));
    }
    assert!(on.get("host-1").is_some_and(|n| *n >= 4), "{on:?}");
    cluster.finish().await
}

/// W2: what cannot migrate is stopped, and starts elsewhere when it has stopped.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_cannot_migrate_are_started_elsewhere_if_that_is_allowed() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let vm = cluster.run(specs::micro("settled")).await?;
    let counted = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?.said.n;
    // Nothing can migrate there.
    cluster.add_host(&HostOptions { migration_address: String::new(), ..HostOptions::default() }).await?;
    let refused = cluster.cli(&["host", "drain", "host-1"]).await?;
    assert_eq!(refused.code, EXIT_REFUSED);
    assert!(refused.stdout.contains("it could be stopped and started elsewhere"), "{}", refused.stdout);
    assert_eq!(incarnation_of(&cluster.api.vm(&vm.id).await?), incarnation_of(&vm));

    let done = cluster.cli(&["host", "drain", "host-1", "--stop-and-move"]).await?.success()?;
    assert!(done.stdout.contains("nothing executes there any more"), "{}", done.stdout);
    let now = cluster.api.wait_running(&vm.id, secs(60)).await?;
    assert_eq!(host_of(&now), "host-2");
    assert!(incarnation_of(&now) > incarnation_of(&vm));
    let beat = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
    assert!(beat.host == "host-2" && beat.said.n > counted, "P5: it goes on from its disk: {beat:?}");
    cluster.finish().await
}

/// Told to, a drain copies the disks that only its host has.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_copies_disks_if_it_is_told_to() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).start().await?;
    let vm = cluster.run(specs::with(specs::micro("rooted"), |s| s.disks[0].pool = specs::LOCAL.into())).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?.said.boot;
    let from = host_of(&vm).to_owned();
    let stuck = cluster.cli(&["host", "drain", &from]).await?;
    ensure!(stuck.code == 4 && stuck.stderr.contains("--copy-disks"), "{stuck:?}");
    cluster.cli(&["host", "drain", &from, "--copy-disks"]).await?.success()?;
    let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    assert_ne!(beat.host, from);
    assert_eq!(beat.said.boot, boot, "the same guest goes on");
    cluster.finish().await
}
