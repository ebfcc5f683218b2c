//! VMs whose disks only their host has are moved while they run: the disks are copied. The counter on the disk goes on (P5), wherever
//! something dies on the way, and no copy is left that is not the VM's disk (M5 to M7).

use std::{fs, path::PathBuf, process::Command};

use harness::{
    api::host_of,
    checker::Instance,
    migration::{Load, begin, ended, loaded, migrate},
    prelude::*,
    proc_table::Kind,
    small_pool::SmallPool,
    typed::Console,
};
use uncloud_proto::v1::{CreateVmRequest, MigrationResult, Vm};

/// The guest's boot sector, on an overlay of its image in a pool that only the host has.
fn micro(name: &str) -> CreateVmRequest {
    specs::with(specs::micro(name), |s| s.disks[0].pool = specs::LOCAL.into())
}

fn other(vm: &Vm) -> &'static str {
    if host_of(vm) == "host-1" { "host-2" } else { "host-1" }
}

/// The files of a VM's disks on a host, by name.
fn files(cluster: &mut Cluster, vm: &Vm, host: &str) -> anyhow::Result<Vec<PathBuf>> {
    let dir = cluster.host(host)?.dir().join("pool/disks").join(&vm.id);
    let mut files: Vec<PathBuf> = match fs::read_dir(&dir) {
        Ok(entries) => entries.map(|e| Ok(e?.path())).collect::<anyhow::Result<_>>()?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e).context("the VM's directory"),
    };
    files.sort();
    Ok(files)
}

/// Waits until exactly one QEMU is left, on the VM's host, and one disk, there, too.
async fn only(cluster: &mut Cluster, vm: &Vm) -> anyhow::Result<Instance> {
    wait_for("one QEMU and one disk are left", secs(30), async || {
        let alive: Vec<Instance> = cluster.checker.instances(&vm.id).into_iter().filter(|i| i.alive).collect();
        let here = files(cluster, vm, host_of(vm)).map_err(|e| e.to_string())?;
        let there = files(cluster, vm, other(vm)).map_err(|e| e.to_string())?;
        match (&alive[..], here.len(), there.len()) {
            ([one], 1, 0) if one.host == host_of(vm) => Ok(one.clone()),
            more => Err(format!("{more:?}: {here:?} {there:?}")),
        }
    })
    .await
}

/// What qemu-img finds in a VM's disk, which may be in use.
fn check(cluster: &mut Cluster, vm: &Vm) -> anyhow::Result<()> {
    for file in files(cluster, vm, host_of(vm))? {
        let out = Command::new("qemu-img").args(["check", "-q"]).arg(&file).output()?;
        ensure!(out.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_takes_its_disks_along_to_and_fro() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).start().await?;
    let mut vm = cluster.run(micro("mover")).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?.said.boot;
    for generation in 1..=4 {
        let (source, target) = (host_of(&vm).to_owned(), other(&vm));
        let began = Instant::now();
        vm = migrate(&cluster.api, &vm.id, target).await?;
        eprintln!("migrated with its disk to {target} in {:.2?}", began.elapsed());
        let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
        assert_eq!((beat.host.as_str(), &beat.said.boot), (target, &boot), "the same guest goes on");
        only(&mut cluster, &vm).await?;
        let name = files(&mut cluster, &vm, target)?[0].file_name().context("a name")?.to_owned();
        assert!(name.to_string_lossy().ends_with(&format!(".{generation}.qcow2")), "{name:?}, from {source}");
    }
    // What it counts is on the disk that came with it.
    let before = cluster.checker.count(&vm.id);
    cluster.api.stop(&vm.id).await?;
    cluster.api.wait_phase(&vm.id, v1::VmPhase::Stopped, secs(30)).await?;
    check(&mut cluster, &vm)?;
    cluster.api.start(&vm.id).await?;
    cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
    assert!(cluster.checker.count(&vm.id) > before);
    cluster.finish().await
}

/// Disks that came while it ran go along with what is on them, on whatever bus. One in a pool that both hosts have stays where it is.
#[tokio::test(flavor = "multi_thread")]
async fn disks_that_were_attached_go_along() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).linux().start().await?;
    let vm = cluster.run(specs::with(specs::linux("loaded"), |s| s.disks[0].pool = specs::LOCAL.into())).await?;
    let id = vm.id.as_str();
    let boot = cluster.checker.wait_beats(id, 1, secs(60)).await?.said.boot;
    let mut console = Console::open(&cluster, id).await?;
    console.says("scsi", "SCSI loaded").await?;
    for (name, pool) in [("a", specs::LOCAL), ("b", specs::LOCAL), ("c", specs::SHARED)] {
        let disk = format!("size=1M,name={name},pool={pool}");
        cluster.cli(&["vm", "attach-disk", "loaded", &disk]).await?.success()?;
    }
    let attached = |vm: &Vm| vm.spec.iter().flat_map(|s| &s.disks).all(|d| d.state() == v1::DiskState::Unspecified);
    cluster.api.wait_vm(id, "has its disks", secs(40), attached).await?;
    console.says("word b hello", "WORD b hello is <hello>").await?;
    console.says("word c stay", "WORD c stay is <stay>").await?;
    let shared = |cluster: &Cluster| -> anyhow::Result<Vec<_>> {
        let dir = cluster.pool().join("disks").join(id);
        fs::read_dir(&dir)?.map(|e| Ok(e?.file_name())).collect()
    };
    let stays = shared(&cluster)?;
    assert_eq!(stays.len(), 1, "{stays:?}");

    // What the machine does not have would stay behind.
    cluster.cli(&["vm", "detach-disk", "loaded", "a"]).await?.success()?;
    let one = |vm: &Vm| vm.spec.iter().flat_map(|s| &s.disks).any(|d| d.state() == v1::DiskState::Detached);
    cluster.api.wait_vm(id, "has one disk less", secs(40), one).await?;
    let refused = cluster.cli(&["vm", "migrate", "loaded", other(&vm)]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("disk `a` is detached"), "{refused:?}");
    cluster.cli(&["vm", "detach-disk", "loaded", "a", "--delete"]).await?.success()?;
    let gone = |vm: &Vm| vm.spec.as_ref().is_some_and(|s| s.disks.len() == 3);
    cluster.api.wait_vm(id, "has one disk less", secs(40), gone).await?;

    let vm = migrate(&cluster.api, id, other(&vm)).await?;
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("word b ?there", "WORD b ?there is <hello>").await?;
    console.says("word b again", "WORD b again is <again>").await?;
    console.says("word c ?there", "WORD c ?there is <stay>").await?;
    console.says("word c still", "WORD c still is <still>").await?;
    let vm = migrate(&cluster.api, id, other(&vm)).await?;
    let mut console = Console::open_when_there(&cluster, id).await?;
    console.says("word b ?back", "WORD b ?back is <again>").await?;
    console.says("word c ?back", "WORD c ?back is <still>").await?;
    let beat = cluster.checker.wait_beats(id, 1, secs(30)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&vm), &boot), "the same guest goes on");
    wait_for("the copies that are void are removed", secs(30), async || {
        let here = files(&mut cluster, &vm, host_of(&vm)).map_err(|e| e.to_string())?;
        let there = files(&mut cluster, &vm, other(&vm)).map_err(|e| e.to_string())?;
        if (here.len(), there.len()) == (2, 0) { Ok(()) } else { Err(format!("{here:?} {there:?}")) }
    })
    .await?;
    cluster.api.stop(id).await?;
    cluster.api.wait_phase(id, v1::VmPhase::Stopped, secs(40)).await?;
    check(&mut cluster, &vm)?;
    assert_eq!(shared(&cluster)?, stays, "the same file");

    // A copy has what each of them has, wherever it lies, and takes the rest with it when it goes.
    cluster.cli(&["vm", "clone", "loaded", "copy", "--wait"]).await?.success()?;
    let copy = cluster.api.vm("copy").await?;
    let mut console = Console::open_when_there(&cluster, &copy.id).await?;
    console.says("scsi", "SCSI loaded").await?;
    console.says("word b ?copy", "WORD b ?copy is <again>").await?;
    console.says("word c ?copy", "WORD c ?copy is <still>").await?;
    for vm in [&vm, &copy] {
        cluster.api.delete(&vm.id).await?;
        cluster.api.wait_gone(&vm.id, secs(60)).await?;
        assert!(files(&mut cluster, vm, host_of(vm))?.is_empty());
    }
    for vm in [&vm, &copy] {
        assert!(!cluster.pool().join("disks").join(&vm.id).exists(), "{} has left a disk in the shared pool", vm.name);
    }
    cluster.finish().await
}

/// What is killed while the disk of a Linux guest is copied.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// Nobody: a user calls it off.
    Cancelled,
    SourceQemu,
    TargetQemu,
    SourceAgent,
    TargetAgent,
}

/// The disk is copied so slowly that there is time for it. Whatever happens, the counter on the disk goes on, on the host that the record
/// names, and no copy is left.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_while_disks_are_copied_one_disk_is_left() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().linux().start().await?;
    let load = Load { beat_ms: 100, dirty_kib: 1 << 10, kib_per_second: 1 << 10 };
    let guest = specs::with(loaded("copied", load), |s| {
        s.disks[0].pool = specs::LOCAL.into();
        s.disks[0].size_bytes = 64 << 20;
    });
    let mut vm = cluster.run(guest).await?;
    cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?;
    let victims = [Victim::Cancelled, Victim::TargetQemu, Victim::TargetAgent, Victim::SourceAgent, Victim::SourceQemu];
    for victim in victims {
        let (source, target) = (host_of(&vm).to_owned(), other(&vm));
        let incarnation = begin(&cluster.api, &vm.id, target, 4 << 20).await?;
        let copies = |vm: &Vm| {
            let migration = vm.status.as_ref().and_then(|s| s.migration.as_ref());
            migration.is_none_or(|m| m.transferred_bytes > 0)
        };
        cluster.api.wait_vm(&vm.id, "is being copied", secs(30), copies).await?;
        match victim {
            Victim::Cancelled => {
                let cancel = v1::CancelMigrationRequest { vm: vm.id.clone(), ..Default::default() };
                cluster.api.vms().cancel_migration(cancel).await?;
            }
            Victim::SourceQemu | Victim::TargetQemu => {
                let host = if matches!(victim, Victim::SourceQemu) { source.as_str() } else { target };
                let qemu = cluster.host(host)?.process_of(&vm.id, Kind::Qemu)?;
                harness::process::kill_pid(qemu.pid);
            }
            Victim::SourceAgent | Victim::TargetAgent => {
                let host = if matches!(victim, Victim::SourceAgent) { source.as_str() } else { target };
                cluster.host(host)?.kill();
                cluster.host(host)?.start_again()?;
            }
        }
        let (_, end) = ended(&cluster.api, &vm.id, incarnation).await?;
        vm = cluster.api.wait_running(&vm.id, secs(60)).await?;
        eprintln!("{victim:?}: {:?} {}; on {}", end.result(), end.reason, host_of(&vm));
        let is_killed = match victim {
            Victim::Cancelled | Victim::SourceQemu | Victim::TargetQemu => true,
            Victim::SourceAgent | Victim::TargetAgent => false,
        };
        assert_eq!(end.result() == MigrationResult::GivenUp, is_killed, "{victim:?}: {}", end.reason);
        let beat = cluster.checker.wait_beats(&vm.id, 3, secs(60)).await?;
        assert_eq!(beat.host, host_of(&vm), "{victim:?}");
        only(&mut cluster, &vm).await?;
        cluster.wait_hosts().await?;
    }
    cluster.api.stop(&vm.id).await?;
    cluster.api.wait_phase(&vm.id, v1::VmPhase::Stopped, secs(60)).await?;
    check(&mut cluster, &vm)?;
    cluster.finish().await
}

/// The disk does not fit into what is left of the target's pool: the guest stays, and nothing is left of the copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_pool_fills_up_meanwhile_gets_nothing() -> anyhow::Result<()> {
    let pools = [SmallPool::mount("100m")?, SmallPool::mount("100m")?];
    let flag = |i: usize| format!("small={}", pools[i].path().display());
    let options = Options::hosts(2).linux().each_host(|i, h| h.args.extend(["--pool".into(), flag(i)]));
    let cluster = options.start().await?;
    let load = Load { beat_ms: 100, dirty_kib: 1 << 10, kib_per_second: 1 << 10 };
    let guest = specs::with(loaded("fat", load), |s| {
        s.disks[0].pool = "small".into();
        s.disks[0].size_bytes = 64 << 20;
    });
    let vm = cluster.run(guest).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 2, secs(60)).await?.said.boot;
    let mut console = Console::open(&cluster, &vm.id).await?;
    console.type_line("fill 1 40").await?;
    console.expect("FILLED").await?;
    let (source, target) = if host_of(&vm) == "host-1" { (0, 1) } else { (1, 0) };
    // Its image comes to the target's pool, and stays.
    let disks = |pool: &SmallPool| -> anyhow::Result<Vec<String>> {
        Ok(pool.files()?.into_iter().filter(|f| f.contains("/disks/")).collect())
    };
    let (there, here) = (disks(&pools[target])?, disks(&pools[source])?);

    let incarnation = begin(&cluster.api, &vm.id, other(&vm), 8 << 20).await?;
    let copies = |vm: &Vm| {
        let migration = vm.status.as_ref().and_then(|s| s.migration.as_ref());
        migration.is_none_or(|m| m.transferred_bytes > 4 << 20)
    };
    cluster.api.wait_vm(&vm.id, "is being copied", secs(30), copies).await?;
    let filler = pools[target].fill(8 << 20)?;
    let (_, end) = ended(&cluster.api, &vm.id, incarnation).await?;
    assert_eq!(end.result(), MigrationResult::GivenUp, "{}", end.reason);
    ensure!(end.reason.contains("No space left on device"), "{}", end.reason);
    std::fs::remove_file(filler)?;

    let beat = cluster.checker.wait_beats(&vm.id, 3, secs(30)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&vm), &boot), "the guest goes on where it was");
    wait_for("nothing is left of the copy", secs(30), async || {
        let now = (disks(&pools[target]), disks(&pools[source]));
        match &now {
            (Ok(t), Ok(s)) if (t, s) == (&there, &here) => Ok(()),
            other => Err(format!("{other:?}, not {there:?} and {here:?}")),
        }
    })
    .await?;
    // With room it goes.
    let moved = migrate(&cluster.api, &vm.id, other(&vm)).await?;
    let beat = cluster.checker.wait_beats(&vm.id, 3, secs(30)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&moved), &boot));
    cluster.finish().await
}
