//! Disks of a VM that is there: they grow, their snapshots are taken and put back, and nothing is lost when their pool is full.

use std::ops::RangeInclusive;

use harness::{api::host_of, prelude::*, small_pool::SmallPool, typed::Console};
use uncloud_proto::v1::{SnapshotState, VmPhase};

/// A guest that runs sees it, one that is stopped finds it when it starts, and one whose host dies finds it elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_while_it_runs_while_it_is_stopped_and_over_a_failover() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).linux().start().await?;
    let vm = cluster.run(specs::linux("grows")).await?;
    let id = vm.id.as_str();
    let mut console = Console::open(&cluster, id).await?;
    console.type_line("size").await?;
    console.expect("SIZE 1048576").await?;
    cluster.cli(&["vm", "resize-disk", "grows", "disk0", "2M"]).await?.success()?;
    console.says("size", "SIZE 2097152").await?;

    // The agent was away when it was asked for.
    let name = host_of(&vm).to_owned();
    let host = cluster.host(&name)?;
    host.kill();
    resize(&cluster, id, 3 << 20).await?;
    cluster.host(&name)?.start_again()?;
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("size", "SIZE 3145728").await?;

    cluster.api.stop(id).await?;
    let stopped = cluster.api.wait_phase(id, VmPhase::Stopped, secs(20)).await?;
    resize(&cluster, id, 4 << 20).await?;
    cluster.api.start(id).await?;
    let started = cluster.api.wait_moved(&stopped, secs(30)).await?;
    let mut console = Console::open(&cluster, id).await?;
    console.says("size", "SIZE 4194304").await?;

    // Stored, and the host dies before it can know.
    let name = host_of(&started).to_owned();
    let host = cluster.host(&name)?;
    host.signal(Signal::STOP)?;
    resize(&cluster, id, 5 << 20).await?;
    cluster.host(&name)?.cut_power();
    let moved = cluster.api.wait_moved(&started, secs(40)).await?;
    assert_ne!(host_of(&moved), host_of(&started));
    let mut console = Console::open(&cluster, id).await?;
    console.says("size", "SIZE 5242880").await?;

    let refused = cluster.cli(&["vm", "resize-disk", "grows", "disk0", "1M"]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("can only grow"), "{refused:?}");
    cluster.finish().await
}

async fn resize(cluster: &Cluster, vm: &str, size_bytes: u64) -> anyhow::Result<()> {
    let request = v1::ResizeDiskRequest { vm: vm.into(), disk: "disk0".into(), size_bytes, ..Default::default() };
    cluster.api.vms().resize_disk(request).await?;
    Ok(())
}

async fn snapshot_is(cluster: &Cluster, vm: &str, name: &str, state: SnapshotState) -> anyhow::Result<()> {
    let is = |vm: &v1::Vm| vm.snapshots.iter().any(|s| s.name == name && s.state() == state);
    cluster.api.wait_vm(vm, &format!("has snapshot {name} {}", state.as_str_name()), secs(30), is).await.map(drop)
}

/// Takes a snapshot, and says to which counters the guest goes back with it.
async fn snapshot(cluster: &Cluster, vm: &str, name: &str) -> anyhow::Result<RangeInclusive<u64>> {
    let before = cluster.checker.count(vm);
    cluster.cli(&["vm", "snapshot", "create", vm, name]).await?.success()?;
    snapshot_is(cluster, vm, name, SnapshotState::Ready).await?;
    Ok(before..=cluster.checker.count(vm) + 1)
}

/// Waits for the first line of a start of the guest, and says what it found on its disk.
async fn found_at_start(cluster: &Cluster, vm: &str, after: Instant) -> anyhow::Result<u64> {
    let line = cluster.checker.wait_line(vm, "READY ", after, secs(60)).await?;
    Ok(harness::guest::parse(&line.text).with_context(|| line.text.clone())?.n)
}

/// The guest goes back to what it had written, with a disk that has grown since, and goes on from there for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_what_runs_is_put_back_once_and_the_guest_goes_on_from_there() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).linux().start().await?;
    let two = |s: &mut v1::VmSpec| {
        s.disks.push(v1::Disk { size_bytes: 1 << 20, ..Default::default() });
        s.guest_agent = v1::GuestAgentMode::Enabled.into();
    };
    let vm = cluster.run(specs::with(specs::linux("back"), two)).await?;
    let id = vm.id.as_str();
    // Its agent has answered: then it is asked to hold its file systems still, too.
    let answers = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| !s.addresses.is_empty());
    cluster.api.wait_vm(id, "has addresses", secs(30), answers).await?;
    let before = Instant::now();
    let first = snapshot(&cluster, id, "first").await?;
    cluster.checker.wait_line(id, "FROZEN", before, secs(20)).await?;
    cluster.checker.wait_line(id, "THAWED", before, secs(20)).await?;
    let taken = cluster.api.vm(id).await?.snapshots.iter().map(v1::Snapshot::guest).collect::<Vec<_>>();
    assert_eq!(taken, [v1::SnapshotGuest::Frozen]);
    resize(&cluster, id, 2 << 20).await?;
    cluster.checker.wait_beats(id, 4, secs(30)).await?;
    let listed = cluster.cli(&["vm", "snapshot", "list", "back"]).await?.success()?;
    ensure!(listed.stdout.contains("first") && listed.stdout.contains("frozen"), "{}", listed.stdout);

    cluster.checker.expect_return(id, first.clone());
    let before = Instant::now();
    cluster.cli(&["vm", "snapshot", "revert", "back", "first"]).await?.success()?;
    let found = found_at_start(&cluster, id, before).await?;
    ensure!(first.contains(&found), "it found {found}, and not one of {first:?}");
    let back = cluster.api.wait_moved(&vm, secs(30)).await?;
    assert_eq!(back.reverting_to, "");
    // The record has the size that the disk had grown to.
    Console::open(&cluster, id).await?.says("size", "SIZE 2097152").await?;

    // P5: an agent that is started again does not put them back once more: the checker would see the counter return.
    cluster.checker.wait_beats(id, 3, secs(30)).await?;
    let host = cluster.host_of(&back)?;
    host.kill();
    host.start_again()?;
    cluster.checker.wait_beats(id, 3, secs(30)).await?;

    // Of what is stopped; put back while the host dies that was to do it.
    cluster.api.stop(id).await?;
    let stopped = cluster.api.wait_phase(id, VmPhase::Stopped, secs(30)).await?;
    let count = cluster.checker.count(id);
    snapshot(&cluster, id, "second").await?;
    cluster.api.start(id).await?;
    let started = cluster.api.wait_moved(&stopped, secs(60)).await?;
    cluster.checker.wait_beats(id, 3, secs(30)).await?;
    cluster.checker.expect_return(id, count..=count);
    let name = host_of(&started).to_owned();
    cluster.host(&name)?.signal(Signal::STOP)?;
    let before = Instant::now();
    let request = v1::RevertToSnapshotRequest { vm: id.into(), snapshot: "second".into(), ..Default::default() };
    cluster.api.vms().revert_to_snapshot(request).await?;
    cluster.host(&name)?.cut_power();
    let found = found_at_start(&cluster, id, before).await?;
    assert_eq!(found, count, "as it was when it was stopped");
    let moved = cluster.api.wait_running(id, secs(30)).await?;
    assert_ne!(host_of(&moved), name);
    cluster.checker.wait_beats(id, 2, secs(30)).await?;

    cluster.cli(&["vm", "snapshot", "delete", "back", "first"]).await?.success()?;
    let gone = |vm: &v1::Vm| vm.snapshots.iter().all(|s| s.name != "first");
    cluster.api.wait_vm(id, "has no snapshot first", secs(30), gone).await?;
    let refused = cluster.cli(&["vm", "snapshot", "revert", "back", "first"]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("it has second"), "{refused:?}");
    cluster.finish().await
}

/// A guest is not held still for long, whatever becomes of its agent or of ours, and a snapshot says what it is worth.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_answer_gets_its_snapshot_and_is_told_to_go_on_until_it_says_so() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).linux().start().await?;
    let with_agent = |s: &mut v1::VmSpec| s.guest_agent = v1::GuestAgentMode::Enabled.into();
    let vm = cluster.run(specs::with(specs::linux("deaf"), with_agent)).await?;
    let id = vm.id.as_str();
    let answers = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| !s.addresses.is_empty());
    cluster.api.wait_vm(id, "has addresses", secs(30), answers).await?;
    let guest = async |cluster: &Cluster, name: &str| {
        let vm = cluster.api.vm(id).await?;
        let found = vm.snapshots.iter().find(|s| s.name == name).map(v1::Snapshot::guest);
        found.with_context(|| format!("no snapshot {name}"))
    };
    let mut console = Console::open(&cluster, id).await?;
    console.type_line("deaf").await?;
    console.expect("ECHO deaf").await?;
    snapshot(&cluster, id, "unasked").await?;
    assert_eq!(guest(&cluster, "unasked").await?, v1::SnapshotGuest::Running);
    // It may have held still all the same.
    let before = Instant::now();
    console.type_line("hear").await?;
    cluster.checker.wait_line(id, "THAWED", before, secs(30)).await?;

    // The agent dies after it has had the guest hold still.
    let host = cluster.host_of(&vm)?;
    host.kill();
    std::fs::write(host.state_dir().join("vms").join(id).join("frozen"), "")?;
    let before = Instant::now();
    host.start_again()?;
    cluster.checker.wait_line(id, "THAWED", before, secs(30)).await?;
    snapshot(&cluster, id, "clean").await?;
    assert_eq!(guest(&cluster, "clean").await?, v1::SnapshotGuest::Frozen);

    cluster.api.stop(id).await?;
    cluster.api.wait_phase(id, VmPhase::Stopped, secs(30)).await?;
    snapshot(&cluster, id, "off").await?;
    assert_eq!(guest(&cluster, "off").await?, v1::SnapshotGuest::Off);
    cluster.finish().await
}

/// It must show 4: the guest stands still, nothing is lost, and it goes on when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_pool_fills_up_stands_still_and_goes_on_when_there_is_room() -> anyhow::Result<()> {
    let pool = SmallPool::mount("48m")?;
    let flag = format!("small={}", pool.path().display());
    let options = Options::hosts(1).linux().each_host(|_, h| h.args.extend(["--pool".into(), flag.clone()]));
    let mut cluster = options.start().await?;
    let in_small = |size_bytes| {
        move |s: &mut v1::VmSpec| s.disks = vec![v1::Disk { pool: "small".into(), size_bytes, ..Default::default() }]
    };
    let vm = cluster.run(specs::with(specs::linux("tight"), in_small(24 << 20))).await?;
    let id = vm.id.as_str();
    let (files, processes) = (pool.files()?, cluster.hosts[0].processes());
    eprintln!("before: {files:#?} {processes:?}");

    let filler = pool.fill(1 << 20)?;
    let console = Console::open(&cluster, id).await?;
    console.type_line("fill 1 9").await?;
    let told = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| s.reason.contains("pool small is full"));
    let held = cluster.api.wait_vm(id, "says that its pool is full", secs(60), told).await?;
    assert_eq!(held.status.as_ref().map(|s| s.phase()), Some(VmPhase::Running));
    let shown = cluster.cli(&["vm", "show", "tight"]).await?.success()?;
    ensure!(shown.stdout.contains("it goes on by itself when there is room again"), "{}", shown.stdout);
    let dir = cluster.hosts[0].state_dir().join("vms").join(id);
    assert_eq!(harness::qmp::status(&dir).as_deref(), Some("io-error"));
    let stood_at = cluster.checker.count(id);

    // What is new is refused, with the reason, and harms nobody.
    let other = cluster.api.create(specs::with(specs::linux("late"), in_small(1 << 20))).await?;
    let failed = cluster.api.wait_phase(&other.id, VmPhase::Failed, secs(30)).await?;
    let reason = failed.status.map(|s| s.reason).unwrap_or_default();
    ensure!(reason.contains("pool small has") && reason.contains("disk disk0 is not made"), "{reason}");
    // ... as is what would be more than may be promised.
    let huge = cluster.api.create(specs::with(specs::linux("huge"), in_small(1 << 30))).await?;
    let reason = cluster.api.vm(&huge.id).await?.status.map(|s| s.reason).unwrap_or_default();
    assert_eq!(reason, "1 host: 1 lacks 1024 MiB in pool `small`");
    for vm in [&other.id, &huge.id] {
        cluster.api.delete(vm).await?;
        cluster.api.wait_gone(vm, secs(30)).await?;
    }

    // An agent that was away finds it as it is.
    cluster.hosts[0].kill();
    cluster.hosts[0].start_again()?;
    cluster.wait_hosts().await?;
    assert_eq!(cluster.checker.count(id), stood_at, "it stands still");
    cluster.api.wait_vm(id, "says that its pool is full", secs(30), told).await?;

    let before = Instant::now();
    std::fs::remove_file(filler)?;
    cluster.checker.wait_line(id, "FILLED 1 9", before, secs(60)).await?;
    cluster.checker.wait_beats(id, 3, secs(30)).await?;
    let fine = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| s.reason.is_empty());
    cluster.api.wait_vm(id, "has no more to say", secs(30), fine).await?;
    let events: Vec<String> = cluster.api.events(id).await?.into_iter().map(|e| e.r#type).collect();
    ensure!(events.iter().any(|e| e == "Troubled") && events.iter().any(|e| e == "Recovered"), "{events:?}");

    // The same process, the same files; no boot, no count lost (the checker looks).
    eprintln!("after: {:#?} {:?}", pool.files()?, cluster.hosts[0].processes());
    assert_eq!(pool.files()?, files);
    assert_eq!(format!("{:?}", cluster.hosts[0].processes()), format!("{processes:?}"));
    assert_eq!(cluster.checker.instances(id).len(), 1);
    cluster.api.delete(id).await?;
    cluster.api.wait_gone(id, secs(30)).await?;
    let left: Vec<String> = pool.files()?.into_iter().filter(|f| f.contains("/disks/")).collect();
    assert!(left.is_empty(), "{left:?}");
    cluster.finish().await
}
