//! A host is cut from power: agent, keepers and guests are gone at once, and nothing says good-bye. (P1, P4, P5)

use harness::{
    api::{host_of, incarnation_of, phase_of, summary},
    prelude::*,
};
use uncloud_proto::v1::{FailoverPolicy, HostState, VmPhase};

/// The promise P4, at the default settings.
const BACK_WITHIN: Duration = secs(10);
/// The same when the leader dies at the same moment.
const BOTH_WITHIN: Duration = secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn vms_of_a_host_without_power_run_elsewhere_within_ten_seconds() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).default_leases().start().await?;
    // All on one host, so that all must go.
    for other in ["host-2", "host-3"] {
        let cordon = v1::CordonHostRequest { host: other.into(), reason: "for the test".into() };
        cluster.api.hosts().cordon_host(cordon).await?;
    }
    let mut vms = Vec::new();
    for name in ["one", "two", "three"] {
        vms.push(cluster.run(specs::micro(name)).await?);
    }
    for other in ["host-2", "host-3"] {
        cluster.api.hosts().uncordon_host(v1::UncordonHostRequest { host: other.into() }).await?;
    }
    for vm in &vms {
        assert_eq!(host_of(vm), "host-1");
        cluster.checker.wait_beats(&vm.id, 3, secs(10)).await?;
    }

    let cut = Instant::now();
    cluster.host("host-1")?.cut_power();
    let counts: Vec<u64> = vms.iter().map(|vm| cluster.checker.count(&vm.id)).collect();
    for (vm, count) in vms.iter().zip(counts) {
        let moved = cluster.api.wait_moved(vm, secs(20)).await?;
        let running = cut.elapsed();
        assert_ne!(host_of(&moved), "host-1");
        let line = cluster.checker.wait_line(&vm.id, "MICRO", cut, secs(20)).await?;
        cluster.checker.wait_beats(&vm.id, 1, secs(10)).await?;
        assert!(cluster.checker.count(&vm.id) > count, "the counter went on");
        eprintln!(
            "{}: from the cut to Running on {} {running:.2?}, to the guest's first line {:.2?}",
            vm.name,
            host_of(&moved),
            line.at - cut
        );
        assert!(running <= BACK_WITHIN, "P4: {} ran again only after {running:?}", vm.name);
        assert_eq!(incarnation_of(&moved), incarnation_of(vm) + 1);
        let events = cluster.api.events(&vm.id).await?;
        assert!(events.iter().any(|e| e.r#type == "FailedOver"), "{events:?}");
    }
    cluster.api.wait_host("host-1", HostState::Down, secs(5)).await?;

    // Power is back: the host is used again, and nothing is disturbed.
    cluster.host("host-1")?.start_again()?;
    cluster.wait_hosts().await?;
    for vm in &vms {
        cluster.checker.wait_beats(&vm.id, 3, secs(10)).await?;
        assert_eq!(cluster.checker.instances(&vm.id).len(), 2, "{:?}", cluster.checker.instances(&vm.id));
    }
    cluster.finish().await
}

/// The wait starts at the takeover: the new leader counts every host as alive until then.
#[tokio::test(flavor = "multi_thread")]
async fn when_leader_and_host_die_together_the_vm_is_back_within_fifteen_seconds() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).default_leases().start().await?;
    let vm = cluster.run(specs::micro("unlucky")).await?;
    let cut = Instant::now();
    cluster.controller.kill();
    cluster.host_of(&vm)?.cut_power();
    cluster.controller.start_again().await?;
    let moved = cluster.api.wait_moved(&vm, secs(30)).await?;
    let took = cut.elapsed();
    eprintln!("leader and host died together: Running on {} after {took:.2?}", host_of(&moved));
    assert!(took <= BOTH_WITHIN, "{took:?}");
    cluster.checker.wait_beats(&vm.id, 1, secs(10)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_its_disk_on_the_dead_host_waits_says_why_and_comes_back_with_it() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).start().await?;
    let local = |r| specs::with(r, |s| s.disks[0].pool = specs::LOCAL.into());
    let waits = cluster.run(local(specs::micro("waits"))).await?;
    let host = host_of(&waits).to_owned();
    let held = specs::with(specs::micro("held"), |s| s.set_failover(FailoverPolicy::Hold));
    let held = cluster.run(held).await?;
    let held_host = host_of(&held).to_owned();

    cluster.host(&host)?.cut_power();
    let unreachable = cluster.api.wait_phase(&waits.id, VmPhase::Unreachable, secs(15)).await?;
    let reason = unreachable.status.as_ref().map(|s| s.reason.clone()).unwrap_or_default();
    assert!(reason.contains(&host) && reason.contains("disks"), "the reason names host and cause: {reason}");
    let explain = v1::ExplainVmRequest { vm: waits.id.clone(), owner: String::new() };
    let explained = cluster.api.vms().explain_vm(explain).await?.into_inner();
    assert!(!explained.summary.is_empty());
    assert!(!cluster.executes(&waits.id));

    cluster.host(&host)?.start_again()?;
    cluster.wait_hosts().await?;
    let back = cluster.api.wait_running(&waits.id, secs(20)).await?;
    assert_eq!(host_of(&back), host);
    cluster.checker.wait_beats(&waits.id, 2, secs(20)).await?;

    // A VM that is pinned is not moved, however long its host is dead; with its host it comes back.
    cluster.host(&held_host)?.cut_power();
    cluster.api.wait_host(&held_host, HostState::Down, secs(15)).await?;
    let still = cluster.api.wait_phase(&held.id, VmPhase::Unreachable, secs(10)).await?;
    assert_eq!(host_of(&still), held_host);
    cluster.host(&held_host)?.start_again()?;
    cluster.wait_hosts().await?;
    cluster.api.wait_running(&held.id, secs(20)).await?;
    cluster.checker.wait_beats(&held.id, 2, secs(20)).await?;
    assert!(cluster.checker.instances(&held.id).iter().all(|i| i.host == held_host));
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn when_most_hosts_fall_silent_the_brake_holds_until_a_person_says_so() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).start().await?;
    let spread = |n: usize| specs::with(specs::micro(&format!("spread-{n}")), |s| s.anti_affinity_group = "g".into());
    let mut vms = Vec::new();
    for n in 1..=3 {
        vms.push(cluster.run(spread(n)).await?);
    }
    // Room for all of them on the last host, once they no longer have to be apart.
    let survivor = vms[0].clone();
    let lost: Vec<v1::Vm> = vms[1..].to_vec();
    let free = cluster.run(specs::micro("free")).await?;

    for vm in &lost {
        cluster.host_of(vm)?.cut_power();
    }
    let status = wait_for("the brake", secs(15), async || {
        let status = cluster.api.cluster().get_status(v1::GetStatusRequest {}).await.map_err(|s| s.to_string())?;
        let status = status.into_inner();
        match &status.brake {
            Some(brake) if brake.engaged => Ok(status),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    assert!(status.warnings.iter().any(|w| w.to_lowercase().contains("brake")), "{:?}", status.warnings);

    // Longer than any lease: nothing is moved. The one thing that a sleep can show is that something does not happen.
    tokio::time::sleep(secs(6)).await;
    for vm in lost.iter().chain([&free, &survivor]) {
        let now = cluster.api.vm(&vm.id).await?;
        assert_eq!(incarnation_of(&now), incarnation_of(vm), "{}", summary(&now));
    }

    cluster.api.cluster().release_brake(v1::ReleaseBrakeRequest {}).await?;
    for vm in &lost {
        // They must stay apart and there is one host: they wait, and say so.
        let waiting = cluster.api.wait_vm(&vm.id, "has lost its host", secs(15), |vm| {
            matches!(phase_of(vm), VmPhase::Pending | VmPhase::Unreachable)
        });
        let waiting = waiting.await?;
        assert!(!waiting.status.unwrap_or_default().reason.is_empty());
    }
    if host_of(&free) != host_of(&survivor) {
        let moved = cluster.api.wait_moved(&free, secs(15)).await?;
        assert_eq!(host_of(&moved), host_of(&survivor));
    }
    for host in &mut cluster.hosts {
        if !host.process().is_running() {
            host.start_again()?;
        }
    }
    cluster.wait_hosts().await?;
    for vm in &lost {
        cluster.api.wait_running(&vm.id, secs(20)).await?;
    }
    cluster.finish().await
}
