//! A keeper or a QEMU dies: neither lives without the other, and the agent does what the VM's policy says. (P1)

use harness::{
    api::{host_of, incarnation_of},
    prelude::*,
    proc_table::Kind,
    process,
};
use uncloud_proto::v1::{RestartPolicy, VmPhase};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_keeper_takes_its_qemu_along_and_the_vm_is_started_again() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).start().await?;
    let vm = cluster.run(specs::micro("kept")).await?;
    let keeper = cluster.host_of(&vm)?.process_of(&vm.id, Kind::Keeper)?;
    let old = cluster.checker.running(&vm.id).context("it runs")?;

    let killed = Instant::now();
    process::kill_pid(keeper.pid);
    wait_for("another QEMU", secs(15), async || match cluster.checker.instances(&vm.id).len() {
        1 => Err("only the first one".into()),
        _ => Ok(()),
    })
    .await?;
    let ended = cluster.checker.instances(&vm.id)[0].last_seen;
    let lived = ended.saturating_duration_since(killed);
    eprintln!("QEMU was seen for {lived:.2?} after the end of its keeper");
    assert!(lived < Duration::from_millis(500), "{lived:?}");
    cluster.checker.wait_line(&vm.id, "MICRO", killed, secs(10)).await?;
    cluster.checker.wait_beats(&vm.id, 1, secs(10)).await?;

    let after = cluster
        .api
        .wait_vm(&vm.id, "runs and says how its QEMU ended", secs(10), |vm| {
            let status = vm.status.clone().unwrap_or_default();
            status.phase() == VmPhase::Running && status.last_exit.is_some()
        })
        .await?;
    assert_eq!((host_of(&after), incarnation_of(&after)), (host_of(&vm), incarnation_of(&vm)), "its host kept it");
    let reason = after.status.and_then(|s| s.last_exit).map(|e| e.reason).unwrap_or_default();
    assert!(!reason.is_empty());
    eprintln!("last exit: {reason}");
    let new = cluster.checker.running(&vm.id).context("it runs")?;
    assert_ne!(old.pid, new.pid);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_is_started_again_unless_its_policy_says_never() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let again = cluster.run(specs::micro("again")).await?;
    let never = specs::with(specs::micro("never"), |s| s.set_restart(RestartPolicy::Never));
    let never = cluster.run(never).await?;

    for vm in [&again, &never] {
        let qemu = cluster.host_of(vm)?.process_of(&vm.id, Kind::Qemu)?;
        process::kill_pid(qemu.pid);
    }
    let failed = cluster.api.wait_phase(&never.id, VmPhase::Failed, secs(15)).await?;
    let status = failed.status.unwrap_or_default();
    assert_eq!(status.last_exit.clone().unwrap_or_default().signal, 9, "{status:?}");
    assert!(!status.reason.is_empty() && status.next_attempt.is_none(), "{status:?}");

    wait_for("another QEMU", secs(15), async || match cluster.checker.instances(&again.id).len() {
        1 => Err("only the first one".into()),
        _ => Ok(()),
    })
    .await?;
    cluster.checker.wait_beats(&again.id, 2, secs(10)).await?;
    assert_eq!(cluster.checker.instances(&never.id).len(), 1, "its policy says never");
    // No keeper is left without a QEMU.
    let left = cluster.hosts[0].processes();
    assert!(left.iter().all(|p| p.vm == again.id), "{left:?}");

    // A person may start it, and the policy is not asked.
    cluster.api.start(&never.id).await?;
    cluster.api.wait_running(&never.id, secs(15)).await?;
    cluster.checker.wait_beats(&never.id, 2, secs(10)).await?;
    cluster.finish().await
}
