//! Failover is switched off for work on the network: nothing is killed and nothing moves; then it goes on by itself. (L8, P3)

use harness::{
    api::{host_of, incarnation_of},
    netns::{self, Cut},
    prelude::*,
};

/// Much longer than the lease of these clusters (2 s).
const OFF: u32 = 14;

#[tokio::test(flavor = "multi_thread")]
async fn while_failover_is_off_a_host_without_network_keeps_its_vms_and_afterwards_it_does_not() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).namespaces().start().await?;
    let vm = cluster.run(specs::micro("calm")).await?;
    let before = cluster.checker.running(&vm.id).context("it runs")?;
    let netns = cluster.host_of(&vm)?.netns()?.to_owned();

    let mut off = v1::SetFailoverRequest { for_seconds: OFF, reason: "a new switch".into(), ..Default::default() };
    off.set_mode(v1::FailoverMode::Off);
    cluster.api.cluster().set_failover(off).await?;
    let begun = Instant::now();
    let status = cluster.api.cluster().get_status(v1::GetStatusRequest {}).await?.into_inner();
    assert!(status.failover_off_until.is_some());
    assert!(status.warnings.iter().any(|w| w.contains("a new switch")), "{:?}", status.warnings);

    // The guest beats once a second: by then every host has had heartbeats answered.
    cluster.checker.wait_beats(&vm.id, 2, secs(10)).await?;
    netns::cut(&netns, Cut::Both)?;
    // More than twice the lease, and still switched off.
    cluster.checker.wait_beats(&vm.id, 5, secs(20)).await?;
    ensure!(begun.elapsed() < secs(OFF.into()), "this machine is too slow for the test: {:?}", begun.elapsed());
    netns::heal(&netns)?;
    cluster.wait_hosts().await?;
    let after = cluster.checker.running(&vm.id).context("it runs")?;
    assert_eq!((before.pid, before.start), (after.pid, after.start), "the same QEMU");
    assert_eq!(incarnation_of(&cluster.api.vm(&vm.id).await?), incarnation_of(&vm));

    // Cut off again, and for good: when it is over, the VM moves, and not before its lease, which was long, has run out.
    netns::cut(&netns, Cut::Both)?;
    let gone = cluster.checker.wait_gone(&vm.id, secs(u64::from(OFF) + 10)).await?;
    assert!(gone - begun >= secs(OFF.into()) - secs(1), "it was killed too early: {:?}", gone - begun);
    let moved = cluster.api.wait_moved(&vm, secs(20)).await?;
    assert_ne!(host_of(&moved), host_of(&vm));
    netns::heal(&netns)?;
    cluster.wait_hosts().await?;
    let status = cluster.api.cluster().get_status(v1::GetStatusRequest {}).await?.into_inner();
    assert!(status.failover_off_until.is_none(), "it is on again");
    cluster.finish().await
}
