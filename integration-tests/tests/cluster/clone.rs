//! A VM is copied: while it runs, from a snapshot; and when it is stopped, as it is.

use std::path::{Path, PathBuf};

use harness::{api::error_fields, prelude::*};
use tonic::Code;
use uncloud_proto::v1::{SnapshotState, VmPhase};

async fn clone(cluster: &Cluster, vm: &str, name: &str, snapshot: &str) -> Result<v1::Vm, tonic::Status> {
    let (vm, name, snapshot) = (vm.to_owned(), name.to_owned(), snapshot.to_owned());
    let request = v1::CloneVmRequest { vm, name, snapshot, ..Default::default() };
    Ok(cluster.api.vms().clone_vm(request).await?.into_inner().vm.unwrap_or_default())
}

/// What the guest found on its disk when it first started.
async fn found(cluster: &Cluster, vm: &str, since: Instant) -> anyhow::Result<u64> {
    let line = cluster.checker.wait_line(vm, "READY ", since, secs(60)).await?;
    Ok(harness::guest::parse(&line.text).with_context(|| line.text.clone())?.n)
}

/// The files below the directory of a VM's disks.
fn files(pool: &Path, vm: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pool.join("disks").join(vm)).into_iter().flatten();
    entries.filter_map(|e| Some(e.ok()?.path())).collect()
}

/// The clone goes on from the snapshot, the VM that it is a copy of counts on undisturbed, and neither needs the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_goes_on_from_the_snapshot_while_its_source_runs() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).linux().start().await?;
    let nic = |s: &mut v1::VmSpec| s.nics = vec![v1::Nic::default()];
    let source = cluster.run(specs::with(specs::linux("source"), nic)).await?;
    let id = source.id.as_str();
    cluster.checker.wait_beats(id, 3, secs(30)).await?;
    let before = cluster.checker.count(id);
    cluster.cli(&["vm", "snapshot", "create", "source", "first"]).await?.success()?;
    let ready = |vm: &v1::Vm| vm.snapshots.iter().any(|s| s.state() == SnapshotState::Ready);
    cluster.api.wait_vm(id, "has its snapshot", secs(30), ready).await?;
    let after = cluster.checker.count(id) + 1;
    cluster.checker.wait_beats(id, 4, secs(30)).await?;

    let refused = cluster.cli(&["vm", "clone", "source", "copy"]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("take a snapshot first"), "{refused:?}");
    let since = Instant::now();
    cluster.cli(&["vm", "clone", "source", "copy", "--snapshot", "first", "--wait"]).await?.success()?;
    let copy = cluster.api.vm("copy").await?;
    let found_there = found(&cluster, &copy.id, since).await?;
    ensure!((before..=after).contains(&found_there), "it found {found_there}, not {before} to {after}");
    assert_ne!(copy.id, source.id);
    assert!(copy.snapshots.is_empty() && copy.cloning_from.is_empty());
    let macs = |vm: &v1::Vm| vm.spec.iter().flat_map(|s| s.nics.iter().map(|n| n.mac.clone())).collect::<Vec<_>>();
    assert_eq!((macs(&copy).len(), macs(&source).len()), (1, 1));
    assert_ne!(macs(&copy), macs(&source));

    // Both count; of the source the checker sees that it is the same process, and that no count is lost.
    cluster.checker.wait_beats(&copy.id, 3, secs(30)).await?;
    cluster.checker.wait_beats(id, 3, secs(30)).await?;
    assert_eq!(cluster.checker.instances(id).len(), 1);

    // The clone does not need the snapshot, nor the VM.
    cluster.cli(&["vm", "snapshot", "delete", "source", "first"]).await?.success()?;
    cluster.api.delete(id).await?;
    cluster.api.wait_gone(id, secs(60)).await?;
    cluster.checker.wait_beats(&copy.id, 3, secs(30)).await?;

    // As it is, when it is stopped: from there on each is on its own.
    cluster.api.stop(&copy.id).await?;
    let stopped = cluster.api.wait_phase(&copy.id, VmPhase::Stopped, secs(30)).await?;
    let count = cluster.checker.count(&copy.id);
    let since = Instant::now();
    let third = clone(&cluster, &copy.id, "third", "").await?;
    assert_eq!(third.cloning_from, copy.id);
    assert_eq!(found(&cluster, &third.id, since).await?, count);
    cluster.api.start(&copy.id).await?;
    cluster.api.wait_moved(&stopped, secs(30)).await?;
    cluster.checker.wait_beats(&copy.id, 2, secs(30)).await?;
    cluster.api.delete(&third.id).await?;
    cluster.api.wait_gone(&third.id, secs(60)).await?;
    cluster.checker.wait_beats(&copy.id, 2, secs(30)).await?;
    cluster.finish().await
}

/// CL1: what is being copied stays as it is, and who deletes the clone meanwhile leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_copied_is_left_alone_until_the_clone_is_made_or_deleted() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).linux().start().await?;
    let source = cluster.run(specs::linux("source")).await?;
    let id = source.id.as_str();
    cluster.checker.wait_beats(id, 2, secs(30)).await?;
    cluster.api.stop(id).await?;
    let stopped = cluster.api.wait_phase(id, VmPhase::Stopped, secs(30)).await?;
    let count = cluster.checker.count(id);

    // The agent is away, so nothing is copied.
    cluster.hosts[0].kill();
    let copy = clone(&cluster, id, "copy", "").await?;
    let refused = cluster.api.start(id).await.expect_err("it is held");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    ensure!(refused.message().contains("being copied to VM `copy`"), "{refused:?}");
    let refused = cluster.api.delete(id).await.expect_err("it is held");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let refused = clone(&cluster, id, "copy", "none").await.expect_err("there is no such snapshot");
    assert_eq!(error_fields(&refused), ["snapshot"]);

    cluster.api.delete(&copy.id).await?;
    cluster.api.start(id).await?;
    let since = Instant::now();
    cluster.hosts[0].start_again()?;
    cluster.api.wait_gone(&copy.id, secs(60)).await?;
    cluster.api.wait_moved(&stopped, secs(60)).await?;
    ensure!(found(&cluster, id, since).await? >= count, "nothing of the source is lost");
    let left = files(&cluster.pool(), &copy.id);
    assert!(left.is_empty(), "{left:?}");
    cluster.finish().await
}
