//! An agent is killed, hangs or is cut off from the leader. Its guests live exactly as long as its lease. (P1, P3)

use harness::{
    api::{host_of, incarnation_of},
    checker::Instance,
    netns::{self, Cut},
    prelude::*,
};
use uncloud_proto::v1::{FailoverPolicy, HostState};

/// The lease that [`Options::hosts`] sets.
const LEASE: Duration = secs(2);
/// What a test's own clock, the checker's interval and a busy machine may add.
const SLACK: Duration = secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_back_within_the_lease_finds_its_vm_undisturbed() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    let vm = cluster.run(specs::micro("steady")).await?;
    let before = cluster.checker.running(&vm.id).context("it runs")?;
    let from = Instant::now();

    for _ in 0..2 {
        let host = cluster.host_of(&vm)?;
        host.kill();
        host.start_again()?;
        cluster.wait_hosts().await?;
        // Past the lease of before: it was renewed in time.
        cluster.checker.wait_beats(&vm.id, 8, secs(20)).await?;
    }
    let host = cluster.host_of(&vm)?;
    let status = host.process().terminate(secs(10)).await?;
    assert!(status.success(), "an agent that is told to stop does so: {status}");
    host.start_again()?;
    cluster.wait_hosts().await?;
    cluster.checker.wait_beats(&vm.id, 8, secs(20)).await?;

    let after = cluster.checker.running(&vm.id).context("it runs")?;
    assert_eq!((before.pid, before.start), (after.pid, after.start), "the same QEMU");
    let now = cluster.api.vm(&vm.id).await?;
    assert_eq!(incarnation_of(&now), incarnation_of(&vm));
    // No gap: the guest beats once a second.
    let beats: Vec<Instant> = cluster.checker.beats(&vm.id).iter().map(|b| b.at).filter(|at| *at >= from).collect();
    let longest = beats.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default();
    eprintln!("longest time between two beats over three restarts of the agent: {longest:.2?}");
    assert!(longest < Duration::from_millis(2500), "{longest:?}");
    // And the agent that adopted it can still stop it.
    cluster.api.stop(&vm.id).await?;
    cluster.api.wait_phase(&vm.id, v1::VmPhase::Stopped, secs(20)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_agent_a_vm_is_dead_within_lease_and_a_second_and_runs_elsewhere() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).start().await?;
    let vm = cluster.run(specs::micro("orphan")).await?;
    let held = specs::with(specs::micro("held"), |s| {
        s.set_failover(FailoverPolicy::Hold);
    });
    let held = cluster.run(held).await?;
    let held_qemu = cluster.checker.running(&held.id).context("it runs")?;

    let killed = Instant::now();
    cluster.host_of(&vm)?.kill();
    let gone = cluster.checker.wait_gone(&vm.id, LEASE + secs(5)).await?;
    let lived = gone - killed;
    eprintln!("QEMU outlived its agent by {lived:.2?}; the lease is {LEASE:?}");
    assert!(lived <= LEASE + SLACK, "P1: it lived for {lived:?}");
    let moved = cluster.api.wait_moved(&vm, secs(15)).await?;
    assert_ne!(host_of(&moved), host_of(&vm));
    cluster.checker.wait_beats(&vm.id, 2, secs(15)).await?;

    // The lease does not bind a VM that is pinned to its host: on a dead agent's host, too.
    if host_of(&held) == host_of(&vm) {
        cluster.checker.wait_beats(&held.id, 2, secs(10)).await?;
    } else {
        cluster.host_of(&held)?.kill();
        cluster.checker.wait_beats(&held.id, 5, secs(15)).await?;
        cluster.host_of(&held)?.start_again()?;
    }
    cluster.host_of(&vm)?.start_again()?;
    cluster.wait_hosts().await?;
    cluster.api.wait_running(&held.id, secs(15)).await?;
    let now = cluster.checker.running(&held.id).context("it runs")?;
    assert_eq!((now.pid, now.start), (held_qemu.pid, held_qemu.start), "the same QEMU");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_of_a_hung_agent_moves_and_the_agent_cleans_up_when_it_wakes() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).start().await?;
    let vm = cluster.run(specs::micro("hung")).await?;
    let stopped = Instant::now();
    cluster.host_of(&vm)?.signal(Signal::STOP)?;
    let gone = cluster.checker.wait_gone(&vm.id, LEASE + secs(5)).await?;
    assert!(gone - stopped <= LEASE + SLACK, "P1: it lived for {:?}", gone - stopped);
    let moved = cluster.api.wait_moved(&vm, secs(15)).await?;
    assert_ne!(host_of(&moved), host_of(&vm));
    let new = cluster.checker.running(&vm.id).context("it runs elsewhere")?;

    cluster.host_of(&vm)?.signal(Signal::CONT)?;
    is_used_again(&mut cluster, &vm, &new).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_of_a_host_without_network_moves_whichever_way_is_cut() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(3).namespaces().start().await?;
    let mut vm = cluster.run(specs::micro("cut-off")).await?;
    let patient = specs::with(specs::micro("patient"), |s| s.set_failover(FailoverPolicy::Patient));
    let patient = cluster.run(patient).await?;
    let patient_qemu = cluster.checker.running(&patient.id).context("it runs")?;

    for way in [Cut::Both, Cut::Outgoing, Cut::Incoming] {
        let name = host_of(&vm).to_owned();
        let netns = cluster.host(&name)?.netns()?.to_owned();
        let cut = Instant::now();
        netns::cut(&netns, way)?;
        let gone = cluster.checker.wait_gone(&vm.id, LEASE + secs(5)).await?;
        eprintln!("{way:?}: QEMU lived for {:.2?} after the cut", gone - cut);
        assert!(gone - cut <= LEASE + SLACK, "P1: {way:?}: it lived for {:?}", gone - cut);
        let moved = cluster.api.wait_moved(&vm, secs(20)).await?;
        assert_ne!(host_of(&moved), name);
        let new = cluster.checker.running(&vm.id).context("it runs elsewhere")?;

        netns::heal(&netns)?;
        is_used_again(&mut cluster, &vm, &new).await?;
        vm = moved;
    }
    // A minute of patience rides out all of that.
    let now = cluster.checker.running(&patient.id).context("it runs")?;
    assert_eq!((now.pid, now.start), (patient_qemu.pid, patient_qemu.start), "the patient VM was left alone");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_gone_for_less_than_the_lease_disturbs_nothing() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).namespaces().default_leases().start().await?;
    let vm = cluster.run(specs::micro("brief")).await?;
    let before = cluster.checker.running(&vm.id).context("it runs")?;
    let netns = cluster.host_of(&vm)?.netns()?.to_owned();
    for _ in 0..2 {
        netns::cut(&netns, Cut::Both)?;
        // Two beats of the guest: two seconds.
        cluster.checker.wait_beats(&vm.id, 2, secs(5)).await?;
        netns::heal(&netns)?;
        cluster.checker.wait_beats(&vm.id, 8, secs(20)).await?;
    }
    let after = cluster.checker.running(&vm.id).context("it runs")?;
    assert_eq!((before.pid, before.start), (after.pid, after.start), "the same QEMU");
    assert_eq!(incarnation_of(&cluster.api.vm(&vm.id).await?), incarnation_of(&vm));
    cluster.finish().await
}

/// The host that `vm` came from is up again, has nothing of it left, and takes VMs; `new` was not disturbed.
async fn is_used_again(cluster: &mut Cluster, vm: &v1::Vm, new: &Instance) -> anyhow::Result<()> {
    let name = host_of(vm).to_owned();
    cluster.wait_hosts().await?;
    cluster.api.wait_host(&name, HostState::Up, secs(15)).await?;
    let host = cluster.host(&name)?;
    let own_dir = host.state_dir().join("vms").join(&vm.id);
    wait_for("the host forgets the VM", secs(15), async || {
        if own_dir.exists() { Err(format!("{} is there", own_dir.display())) } else { Ok(()) }
    })
    .await?;
    // It takes VMs again: this one can go nowhere else.
    for host in cluster.api.list_hosts().await?.iter().filter(|h| h.name != name) {
        let cordon = v1::CordonHostRequest { host: host.id.clone(), reason: "for the test".into() };
        cluster.api.hosts().cordon_host(cordon).await?;
    }
    let next = cluster.run(specs::micro("next")).await?;
    assert_eq!(host_of(&next), name);
    cluster.api.delete(&next.id).await?;
    cluster.api.wait_gone(&next.id, secs(20)).await?;
    for host in cluster.api.list_hosts().await? {
        if host.mode() == v1::HostMode::Cordoned {
            cluster.api.hosts().uncordon_host(v1::UncordonHostRequest { host: host.id }).await?;
        }
    }
    cluster.checker.wait_beats(&vm.id, 2, secs(10)).await?;
    let now = cluster.checker.running(&vm.id).context("it runs")?;
    ensure!((now.pid, now.start) == (new.pid, new.start), "the VM was disturbed: {new:?} became {now:?}");
    Ok(())
}
