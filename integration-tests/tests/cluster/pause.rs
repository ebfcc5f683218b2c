//! A guest is paused and resumed; its agent and its host die meanwhile.

use harness::{
    api::{host_of, phase_of},
    prelude::*,
};
use uncloud_proto::v1::VmPhase;

/// A guest that executes beats every 0.99 s.
const SEVERAL_BEATS: Duration = Duration::from_millis(2500);

/// That the guest does nothing for the time of several beats.
async fn stands_still(cluster: &Cluster, vm: &str) -> u64 {
    let count = cluster.checker.count(vm);
    tokio::time::sleep(SEVERAL_BEATS).await;
    assert_eq!(cluster.checker.count(vm), count, "it stands still");
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_stands_still_until_it_is_resumed() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    let vm = cluster.run(specs::micro("sleeper")).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?.said.boot;
    let done = cluster.cli(&["vm", "pause", "sleeper", "--wait"]).await?.success()?;
    assert!(done.stdout.contains("paused"), "{}", done.stdout);
    let count = stands_still(&cluster, &vm.id).await;

    // What makes no sense now is refused, with what to do instead.
    for (args, words) in [(["vm", "start", "sleeper"], "resume"), (["vm", "migrate", "sleeper"], "resume")] {
        let refused = cluster.cli(&args).await?;
        assert!(refused.stderr.contains(words) && refused.stdout.is_empty(), "{args:?}: {}", refused.stderr);
    }

    // Resumed while the agent is away: the next one sees to it.
    cluster.host_of(&vm)?.kill();
    let resume = v1::ResumeVmRequest { vm: vm.id.clone(), ..Default::default() };
    cluster.api.vms().resume_vm(resume).await?;
    assert_eq!(cluster.checker.count(&vm.id), count, "nobody has told it");
    cluster.host_of(&vm)?.start_again()?;
    let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    assert_eq!(beat.said.boot, boot, "the same guest goes on");
    cluster.api.wait_vm(&vm.id, "runs", secs(10), |vm| phase_of(vm) == VmPhase::Running && !vm.paused).await?;

    // A guest that stands still can be stopped by asking it.
    cluster.cli(&["vm", "pause", "sleeper", "--wait"]).await?.success()?;
    cluster.api.stop(&vm.id).await?;
    cluster.checker.wait_line(&vm.id, "POWEROFF", Instant::now() - secs(60), secs(20)).await?;
    cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(20)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_whose_host_dies_is_paused_elsewhere() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).start().await?;
    let vm = cluster.run(specs::micro("dreamer")).await?;
    cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    cluster.cli(&["vm", "pause", "dreamer", "--wait"]).await?.success()?;
    let count = cluster.checker.count(&vm.id);
    let before = host_of(&vm).to_owned();
    cluster.host(&before)?.cut_power();
    let elsewhere = |vm: &v1::Vm| phase_of(vm) == VmPhase::Paused && host_of(vm) != before;
    cluster.api.wait_vm(&vm.id, "is paused elsewhere", secs(30), elsewhere).await?;
    stands_still(&cluster, &vm.id).await;
    cluster.cli(&["vm", "resume", "dreamer", "--wait"]).await?.success()?;
    cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    assert!(cluster.checker.count(&vm.id) > count, "from its disk");
    cluster.finish().await
}
