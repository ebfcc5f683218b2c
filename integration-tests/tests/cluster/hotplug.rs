//! Disks that come to a VM and go, while it runs and while it does not: what the guest sees, and what becomes of the files.

use std::path::{Path, PathBuf};

use harness::{api::host_of, prelude::*, typed::Console};
use uncloud_proto::v1::{DiskState, VmPhase};

/// The names of the files of a VM's disks.
fn files(pool: &Path, vm: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pool.join("disks").join(vm)).into_iter().flatten();
    entries.filter_map(|e| Some(e.ok()?.path())).collect()
}

fn state_of(vm: &v1::Vm, disk: &str) -> Option<DiskState> {
    vm.spec.iter().flat_map(|s| &s.disks).find(|d| d.name == disk).map(v1::Disk::state)
}

/// `None`: it is gone. UNSPECIFIED: the machine has it.
async fn disk_is(cluster: &Cluster, vm: &str, disk: &str, state: Option<DiskState>) -> anyhow::Result<v1::Vm> {
    let is = |vm: &v1::Vm| state_of(vm, disk) == state;
    cluster.api.wait_vm(vm, &format!("has disk {disk} {state:?}"), secs(30), is).await
}

async fn attach(cluster: &Cluster, vm: &str, disk: &str) -> anyhow::Result<()> {
    cluster.cli(&["vm", "attach-disk", vm, disk]).await?.success().map(drop)
}

/// A guest sees a disk come, writes to it, takes it with it to another host, loses it, and finds it again as it was. Agents die meanwhile,
/// and at last the host.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_and_goes_while_the_guest_runs_and_its_data_stays() -> anyhow::Result<()> {
    const HERE: Option<DiskState> = Some(DiskState::Unspecified);
    let mut cluster = Options::hosts(2).linux().start().await?;
    let vm = cluster.run(specs::linux("plug")).await?;
    let id = vm.id.as_str();
    let mut console = Console::open(&cluster, id).await?;
    console.type_line("scsi").await?;
    console.expect("SCSI loaded").await?;
    console.says("disks one", "DISKS one:.").await?;

    attach(&cluster, "plug", "size=1M,name=data").await?;
    disk_is(&cluster, id, "data", HERE).await?;
    console.says("disks two", "DISKS two: data.").await?;
    console.says("word data hello", "WORD data hello is <hello>").await?;

    // The agent is away when it is asked for, and whoever comes after it does it.
    let host = cluster.host_of(&vm)?;
    host.kill();
    attach(&cluster, "plug", "size=2M,name=more,cache=writethrough").await?;
    assert_eq!(state_of(&cluster.api.vm(id).await?, "more"), Some(DiskState::Attaching));
    cluster.host_of(&vm)?.start_again()?;
    disk_is(&cluster, id, "more", HERE).await?;
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("disks three", "DISKS three: data more.").await?;

    // The target has the same machine.
    cluster.cli(&["vm", "migrate", "plug"]).await?.success()?;
    let moved = cluster.api.wait_moved(&vm, secs(60)).await?;
    cluster.api.wait_running(id, secs(30)).await?;
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("disks four", "DISKS four: data more.").await?;
    console.says("word data ?one", "WORD data ?one is <hello>").await?;
    console.says("word more moved", "WORD more moved is <moved>").await?;

    // It goes, is kept, and comes back as it was.
    cluster.cli(&["vm", "detach-disk", "plug", "data"]).await?.success()?;
    disk_is(&cluster, id, "data", Some(DiskState::Detached)).await?;
    console.says("disks five", "DISKS five: more.").await?;
    let shown = cluster.cli(&["vm", "show", "plug"]).await?.success()?;
    ensure!(shown.stdout.contains("detached"), "{}", shown.stdout);
    assert_eq!(files(&cluster.pool(), id).len(), 3);
    attach(&cluster, "plug", "name=data").await?;
    disk_is(&cluster, id, "data", HERE).await?;
    console.says("word data ?two", "WORD data ?two is <hello>").await?;

    // One is deleted; another one of its name is not it.
    cluster.cli(&["vm", "detach-disk", "plug", "more", "--delete"]).await?.success()?;
    disk_is(&cluster, id, "more", None).await?;
    assert_eq!(files(&cluster.pool(), id).len(), 2);
    attach(&cluster, "plug", "size=2M,name=more").await?;
    disk_is(&cluster, id, "more", HERE).await?;
    console.says("word more ?three", "WORD more ?three is <>").await?;

    // The host dies, and the next one has the disks that the record has.
    let name = host_of(&moved).to_owned();
    cluster.host(&name)?.cut_power();
    let moved = cluster.api.wait_moved(&moved, secs(40)).await?;
    assert_ne!(host_of(&moved), name);
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("scsi", "SCSI loaded").await?;
    console.says("disks six", "DISKS six: data more.").await?;
    console.says("word data ?four", "WORD data ?four is <hello>").await?;

    cluster.api.delete(id).await?;
    cluster.api.wait_gone(id, secs(30)).await?;
    assert_eq!(files(&cluster.pool(), id), [] as [PathBuf; 0]);
    cluster.finish().await
}

/// What is stopped has its disks changed at once, on any bus, and is started with them.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_stopped_takes_disks_on_any_bus() -> anyhow::Result<()> {
    const HERE: Option<DiskState> = Some(DiskState::Unspecified);
    let cluster = Options::hosts(1).linux().start().await?;
    let vm = cluster.run(specs::linux("still")).await?;
    let id = vm.id.as_str();
    let refused = cluster.cli(&["vm", "attach-disk", "still", "size=1M,bus=sata"]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("stop the VM first"), "{refused:?}");
    let refused = cluster.cli(&["vm", "detach-disk", "still", "disk0"]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("stop the VM first"), "{refused:?}");

    cluster.api.stop(id).await?;
    let stopped = cluster.api.wait_phase(id, VmPhase::Stopped, secs(30)).await?;
    for (name, bus) in [("a", "sata"), ("b", "virtio"), ("c", "scsi"), ("d", "sata")] {
        attach(&cluster, "still", &format!("size=1M,name={name},bus={bus}")).await?;
        disk_is(&cluster, id, name, HERE).await?;
    }
    cluster.cli(&["vm", "detach-disk", "still", "d", "--delete"]).await?.success()?;
    disk_is(&cluster, id, "d", None).await?;
    cluster.api.start(id).await?;
    cluster.api.wait_moved(&stopped, secs(60)).await?;
    cluster.checker.wait_beats(id, 2, secs(30)).await?;
    assert_eq!(files(&cluster.pool(), id).len(), 4);
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("scsi", "SCSI loaded").await?;
    console.says("disks one", "DISKS one: c.").await?;
    cluster.finish().await
}
