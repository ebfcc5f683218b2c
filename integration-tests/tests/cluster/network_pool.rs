//! Disks that a storage host serves over the network, to one incarnation of each VM at a time. (P1, P5; N1 to N5)

use std::{
    fs,
    ops::RangeInclusive,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::Context as _;
use harness::{
    agent::HostOptions,
    api::{host_of, incarnation_of, phase_of},
    migration::{Load, begin, ended, loaded, migrate},
    netns::{self, Cut},
    prelude::*,
    proc_table::{self, Kind, Proc},
    process::{kill_pid, signal_pid},
    qmp::{MONITOR, Monitor},
    typed::Console,
};
use serde_json::json;
use uncloud_proto::v1::{DiskState, MigrationResult, Vm, VmPhase};

const POOL: &str = "net";
/// A guest whose migration does not get there at [`RATE`] when it may stand still for a millisecond only.
const LOAD: Load = Load { beat_ms: 100, dirty_kib: 16 << 10, kib_per_second: 64 << 10 };
/// Bytes that are sent at most in a second.
const RATE: u64 = 24 << 20;

/// A cluster in namespaces: `host-1` has nothing to do with it, `host-2` has the disks and is cordoned, the others run VMs.
struct Stage {
    cluster: Cluster,
    disks: PathBuf,
}

impl Stage {
    async fn set_up() -> anyhow::Result<Self> {
        Self::with(Options::hosts(1).namespaces()).await
    }

    async fn with(options: Options) -> anyhow::Result<Self> {
        let mut cluster = options.start().await?;
        let pool = cluster.path().join("net-pool");
        let agent = harness::paths::binary("uncloud-agent")?;
        let made = Command::new(agent).arg("init-pool").arg(&pool).args(["--name", POOL]).output()?;
        anyhow::ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let marker: serde_json::Value = serde_json::from_slice(&fs::read(pool.join(".uncloud-pool"))?)?;
        let id = marker["id"].as_str().expect("an id").to_owned();
        // The second host of the network.
        let controller = cluster.addresses()[0].rsplit_once('.').expect("an IPv4 address").0.to_owned();
        let exports = ["--export-pool".into(), format!("{POOL}={}", pool.display()), "--export-address".into()];
        let storage = [exports.as_slice(), &[format!("{controller}.3")]].concat();
        cluster.add_host(&HostOptions { args: storage, ..HostOptions::default() }).await?;
        for _ in 0..2 {
            let args = vec!["--network-pool".into(), format!("{POOL}={id}")];
            cluster.add_host(&HostOptions { args, ..HostOptions::default() }).await?;
        }
        let cordon = v1::CordonHostRequest { host: "host-2".into(), reason: "it has the disks".into() };
        cluster.api.hosts().cordon_host(cordon).await?;
        Ok(Self { cluster, disks: pool.join("disks") })
    }

    fn request(name: &str) -> v1::CreateVmRequest {
        specs::with(specs::micro(name), |s| s.disks[0].pool = POOL.into())
    }

    fn daemon(&mut self) -> anyhow::Result<u32> {
        self.cluster.host("host-2")?.storage_daemon().ok_or_else(|| anyhow::anyhow!("no daemon serves disks"))
    }

    fn qemu(&mut self, vm: &v1::Vm) -> anyhow::Result<Proc> {
        self.cluster.host_of(vm)?.process_of(&vm.id, Kind::Qemu)
    }

    /// The incarnations of a VM to which its disk is served, by what the daemon tells whoever asks it over the network.
    fn served(&mut self, vm: &Vm) -> anyhow::Result<Vec<u64>> {
        let address = self.cluster.address_of(Some("host-2"))?;
        let netns = self.cluster.host("host-2")?.netns()?.to_owned();
        let listed = netns::output(&netns, &["qemu-nbd", "--list", "--bind", &address, "--port", "10809"])?;
        let (prefix, names) = (format!("vm-{}.", vm.id), listed.split('\'').filter(|part| part.starts_with("vm-")));
        let of_vm = names.filter_map(|name| name.strip_prefix(&prefix)?.split_once('.')?.0.parse().ok());
        let mut served: Vec<u64> = of_vm.collect();
        served.sort_unstable();
        Ok(served)
    }

    async fn wait_served(&mut self, vm: &Vm, to: &[u64]) -> anyhow::Result<()> {
        wait_for("its disk is served as it should be", secs(20), async || match self.served(vm) {
            Ok(served) if served == to => Ok(()),
            other => Err(format!("{other:?}, not {to:?}")),
        })
        .await
    }

    /// A guest that migrates and does not get there; memory is on its way. Returns the incarnation that it has there.
    async fn sending(&mut self, vm: &Vm) -> anyhow::Result<u64> {
        // QEMU slows a guest that it cannot send fast enough, but not to a stand.
        let never = json!({ "downtime-limit": 1 });
        self.monitor(vm, host_of(vm))?.execute("migrate-set-parameters", never)?;
        let incarnation = begin(&self.cluster.api, &vm.id, other(vm), RATE).await?;
        let sent = |vm: &Vm| vm.status.as_ref()?.migration.as_ref().map(|m| m.transferred_bytes);
        self.cluster.api.wait_vm(&vm.id, "is being sent", secs(60), |vm| sent(vm).is_some_and(|n| n > 1 << 20)).await?;
        Ok(incarnation)
    }

    fn monitor(&mut self, vm: &Vm, host: &str) -> anyhow::Result<Monitor> {
        Monitor::connect(&self.cluster.host(host)?.state_dir().join("vms").join(&vm.id).join(MONITOR))
    }

    /// Lifts the limit under which it never gets there, until it is over.
    async fn hurry(&mut self, vm: &Vm, incarnation: u64) -> anyhow::Result<(Vm, v1::MigrationEnd)> {
        let fast = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 2000 });
        self.monitor(vm, host_of(vm))?.execute("migrate-set-parameters", fast)?;
        ended(&self.cluster.api, &vm.id, incarnation).await
    }
}

/// The other of the two hosts that run VMs.
fn other(vm: &Vm) -> &'static str {
    if host_of(vm) == "host-3" { "host-4" } else { "host-3" }
}

/// A QEMU with the arguments of one that runs, which no keeper watches and no lease ends: what a host that was frozen as a whole,
/// clocks and all, has when it is thawed.
struct Twin {
    child: Child,
    dir: tempfile::TempDir,
}

impl Twin {
    /// Its disk is open and its guest stands still.
    async fn frozen(of: &Proc, netns: &str) -> anyhow::Result<Self> {
        let twin = Self::spawn(of, netns)?;
        let socket = twin.dir.path().join("qmp0.sock");
        wait_for("the twin answers", secs(20), async || {
            UnixStream::connect(&socket).map(drop).map_err(|e| e.to_string())
        })
        .await?;
        Ok(twin)
    }

    fn spawn(of: &Proc, netns: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let log = fs::File::create(dir.path().join("log"))?;
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{netns}"))
            .arg("--")
            .args(&of.argv)
            .arg("-S")
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        Ok(Self { child, dir })
    }

    fn thaw(&self) -> anyhow::Result<()> {
        use std::io::{BufRead as _, BufReader, Write as _};
        let mut socket = BufReader::new(UnixStream::connect(self.dir.path().join("qmp0.sock"))?);
        let mut line = String::new();
        socket.read_line(&mut line)?;
        for command in ["qmp_capabilities", "cont"] {
            writeln!(socket.get_mut(), "{{\"execute\":\"{command}\"}}")?;
            loop {
                line.clear();
                socket.read_line(&mut line)?;
                if line.contains("\"return\"") {
                    break;
                }
                anyhow::ensure!(line.contains("\"event\""), "{command}: {line}");
            }
        }
        Ok(())
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.path().join("serial.log")).unwrap_or_default()
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] }).collect()
}

/// N1, N2: the disk goes to the new incarnation with all that was acknowledged, and whoever still has the old one open, or opens
/// it, gets nothing. The leases have no part in that: the old one is a QEMU that none of them binds.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_host_that_is_thawed_never_writes_to_a_disk_that_was_given_on() -> anyhow::Result<()> {
    let mut stage = Stage::set_up().await?;
    let vm = stage.cluster.run(Stage::request("moves")).await?;
    assert_eq!(files(&stage.disks).len(), 1, "the storage host has made the disk");
    stage.cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    let old = stage.qemu(&vm)?;
    assert!(old.argv.iter().any(|a| a.contains("\"nbd\"") && a.contains(&format!("vm-{}.1.disk0", vm.id))));

    let host = host_of(&vm).to_owned();
    let netns = stage.cluster.host(&host)?.netns()?.to_owned();
    let twin = Twin::frozen(&old, &netns).await?;
    stage.cluster.host(&host)?.signal(Signal::STOP)?;
    for process in stage.cluster.host(&host)?.processes() {
        signal_pid(process.pid, Signal::STOP)?;
    }
    let count = stage.cluster.checker.count(&vm.id);
    let moved = stage.cluster.api.wait_moved(&vm, secs(30)).await?;
    assert_ne!(host_of(&moved), host);
    assert_eq!(incarnation_of(&moved), incarnation_of(&vm) + 1);
    stage.cluster.checker.wait_beats(&vm.id, 1, secs(20)).await?;
    let now = stage.cluster.checker.count(&vm.id);
    assert!(now > count, "no count that was written is lost: {count}, {now}");

    twin.thaw()?;
    stage.cluster.checker.wait_beats(&vm.id, 6, secs(30)).await?;
    assert_eq!(twin.said(), "", "the old one cannot even read its boot sector");
    // Nor can one that is only started now.
    let mut late = Twin::spawn(&old, &netns)?;
    let status = wait_for("it has ended", secs(20), async || {
        late.child.try_wait().map_err(|e| e.to_string())?.ok_or_else(|| "it runs".to_owned())
    })
    .await?;
    let words = fs::read_to_string(late.dir.path().join("log"))?;
    assert!(!status.success() && words.contains("export"), "{status}: {words}");
    drop((twin, late));

    stage.cluster.host(&host)?.cut_power();
    stage.cluster.api.delete(&vm.id).await?;
    stage.cluster.api.wait_gone(&vm.id, secs(30)).await?;
    assert_eq!(files(&stage.disks), Vec::<PathBuf>::new(), "the storage host has deleted the disk");
    stage.cluster.finish().await
}

/// N3: whatever becomes of the storage host, its agent, its daemon and the leader, the guest waits and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_waits_for_its_storage_host_and_goes_on() -> anyhow::Result<()> {
    let mut stage = Stage::set_up().await?;
    // Its lease outlives the restart of the only controller.
    let patient = |s: &mut v1::VmSpec| s.set_failover(v1::FailoverPolicy::Patient);
    let vm = stage.cluster.run(specs::with(Stage::request("waits"), patient)).await?;
    let qemu = stage.qemu(&vm)?;
    let daemon = stage.daemon()?;
    let alive = |qemu: &Proc| proc_table::is_alive(qemu.pid, qemu.start);

    // The agent alone: nothing notices.
    stage.cluster.host("host-2")?.kill();
    stage.cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    stage.cluster.host("host-2")?.start_again()?;
    stage.cluster.wait_hosts().await?;
    stage.cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    assert_eq!(stage.daemon()?, daemon, "the daemon outlives the agent");

    // The daemon.
    kill_pid(daemon);
    stage.cluster.checker.wait_beats(&vm.id, 4, secs(30)).await?;
    assert_ne!(stage.daemon()?, daemon);

    // The network.
    let netns = stage.cluster.host("host-2")?.netns()?.to_owned();
    netns::cut(&netns, Cut::Both)?;
    stage.cluster.api.wait_host("host-2", v1::HostState::Down, secs(20)).await?;
    let stalled = stage.cluster.checker.count(&vm.id);
    netns::heal(&netns)?;
    stage.cluster.checker.wait_beats(&vm.id, 4, secs(60)).await?;
    assert!(stage.cluster.checker.count(&vm.id) >= stalled + 4);

    // The leader: a new one knows of no grant, and asks.
    stage.cluster.controller.kill();
    stage.cluster.controller.start_again().await?;
    stage.cluster.wait_hosts().await?;
    stage.cluster.checker.wait_beats(&vm.id, 3, secs(30)).await?;
    assert!(alive(&qemu), "it is the same QEMU all along");
    let same = stage.cluster.api.vm(&vm.id).await?;
    assert_eq!(incarnation_of(&same), incarnation_of(&vm));

    // Agent and daemon at once, and then a new incarnation.
    let daemon = stage.daemon()?;
    stage.cluster.host("host-2")?.kill();
    kill_pid(daemon);
    stage.cluster.api.stop(&vm.id).await?;
    stage.cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(40)).await?;
    let count = stage.cluster.checker.count(&vm.id);
    stage.cluster.api.start(&vm.id).await?;
    let explain = v1::ExplainVmRequest { vm: vm.id.clone(), owner: String::new() };
    let why = stage.cluster.api.vms().explain_vm(explain).await?.into_inner().summary;
    assert!(why.contains("storage host `host-2`"), "{why}");
    assert!(!stage.cluster.executes(&vm.id), "nobody has given it access");
    stage.cluster.host("host-2")?.start_again()?;
    stage.cluster.api.wait_running(&vm.id, secs(40)).await?;
    stage.cluster.checker.wait_beats(&vm.id, 2, secs(30)).await?;
    assert!(stage.cluster.checker.count(&vm.id) > count);
    stage.cluster.finish().await
}

/// P5: a disk grows on its storage host, and the guest sees it: at once, at its next start, and when the storage host was away.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_grows_on_its_storage_host_while_the_guest_goes_on() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let vm = stage.cluster.run(specs::with(specs::linux("grows"), |s| s.disks[0].pool = POOL.into())).await?;
    let id = vm.id.as_str();
    let boot = stage.cluster.checker.wait_beats(id, 2, secs(60)).await?.said.boot;
    Console::open(&stage.cluster, id).await?.says("size", "SIZE 1048576").await?;
    stage.cluster.cli(&["vm", "resize-disk", "grows", "disk0", "2M"]).await?.success()?;
    Console::open(&stage.cluster, id).await?.says("size", "SIZE 2097152").await?;

    // Its agent does not answer when it is asked for, its daemon dies, and the VM migrates.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    stage.cluster.cli(&["vm", "resize-disk", "grows", "disk0", "3M"]).await?.success()?;
    kill_pid(stage.daemon()?);
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    stage.cluster.wait_hosts().await?;
    Console::open(&stage.cluster, id).await?.says("size", "SIZE 3145728").await?;
    let moved = migrate(&stage.cluster.api, id, other(&vm)).await?;
    stage.cluster.cli(&["vm", "resize-disk", "grows", "disk0", "4M"]).await?.success()?;
    Console::open(&stage.cluster, id).await?.says("size", "SIZE 4194304").await?;
    let beat = stage.cluster.checker.wait_beats(id, 3, secs(30)).await?;
    assert_eq!((&beat.said.boot, beat.host.as_str()), (&boot, host_of(&moved)), "the same guest goes on");

    stage.cluster.api.stop(id).await?;
    let stopped = stage.cluster.api.wait_phase(id, VmPhase::Stopped, secs(40)).await?;
    stage.cluster.cli(&["vm", "resize-disk", "grows", "disk0", "5M"]).await?.success()?;
    stage.cluster.api.start(id).await?;
    stage.cluster.api.wait_moved(&stopped, secs(60)).await?;
    Console::open(&stage.cluster, id).await?.says("size", "SIZE 5242880").await?;
    stage.cluster.finish().await
}

/// N6: a disk comes to a guest that runs and goes, with what the guest wrote to it, also while the storage host is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_and_goes_on_its_storage_host_and_its_data_stays() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let vm = stage.cluster.run(specs::with(specs::linux("plug"), |s| s.disks[0].pool = POOL.into())).await?;
    let id = vm.id.as_str();
    let becomes = async |stage: &Stage, disk: &str, state: DiskState| {
        let of = |vm: &Vm| vm.spec.iter().flat_map(|s| &s.disks).find(|d| d.name == disk).map(v1::Disk::state);
        stage.cluster.api.wait_vm(id, "has its disk as it should be", secs(40), |vm| of(vm) == Some(state)).await
    };
    let mut console = Console::open(&stage.cluster, id).await?;
    console.says("scsi", "SCSI loaded").await?;
    stage.cluster.cli(&["vm", "attach-disk", "plug", "size=1M,name=data,pool=net"]).await?.success()?;
    becomes(&stage, "data", DiskState::Unspecified).await?;
    console.says("disks one", "DISKS one: data.").await?;
    console.says("word data hello", "WORD data hello is <hello>").await?;
    assert_eq!(files(&stage.disks).len(), 2, "the storage host has made it");

    // The storage host does not answer when the next one is asked for, and the VM is stopped and started meanwhile.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    stage.cluster.cli(&["vm", "attach-disk", "plug", "size=2M,name=data2,pool=net"]).await?.success()?;
    stage.cluster.api.stop(id).await?;
    stage.cluster.api.wait_phase(id, VmPhase::Stopped, secs(40)).await?;
    stage.cluster.api.start(id).await?;
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    stage.cluster.api.wait_running(id, secs(60)).await?;
    becomes(&stage, "data2", DiskState::Unspecified).await?;
    stage.cluster.checker.wait_beats(id, 2, secs(60)).await?;
    let mut console = Console::open_when_there(&stage.cluster, id).await?;
    // The console shows what the guest of before said, too.
    console.type_line("scsi").await?;
    console.says("disks two", "DISKS two: data data2.").await?;
    console.says("word data ?two", "WORD data ?two is <hello>").await?;

    // It goes, also from a machine that has one whose name begins as its own; a new incarnation has no access to it; it comes back.
    stage.cluster.cli(&["vm", "detach-disk", "plug", "data"]).await?.success()?;
    becomes(&stage, "data", DiskState::Detached).await?;
    console.says("disks three", "DISKS three: data2.").await?;
    let now = stage.cluster.api.vm(id).await?;
    let moved = migrate(&stage.cluster.api, id, other(&now)).await?;
    let incarnation = incarnation_of(&moved);
    stage.wait_served(&vm, &[incarnation, incarnation]).await?;
    stage.cluster.cli(&["vm", "attach-disk", "plug", "name=data"]).await?.success()?;
    becomes(&stage, "data", DiskState::Unspecified).await?;
    let mut console = Console::open_when_there(&stage.cluster, id).await?;
    console.says("word data ?four", "WORD data ?four is <hello>").await?;

    stage.cluster.api.delete(id).await?;
    stage.cluster.api.wait_gone(id, secs(30)).await?;
    assert_eq!(files(&stage.disks), Vec::<PathBuf>::new(), "the storage host has deleted all of them");
    stage.cluster.finish().await
}

/// R4, CL1: snapshots are taken, put back and copied on the storage host, whether the guest runs or not, and also when its agent was away.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_put_back_and_copied_on_its_storage_host() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let vm = stage.cluster.run(specs::with(specs::linux("keeps"), |s| s.disks[0].pool = POOL.into())).await?;
    let id = vm.id.as_str();
    let attached = |vm: &Vm| vm.spec.iter().flat_map(|s| &s.disks).all(|d| d.state() == DiskState::Unspecified);
    // Says to which counters the guest goes back with it.
    let snapshot = async |stage: &Stage, name: &str| -> anyhow::Result<RangeInclusive<u64>> {
        let before = stage.cluster.checker.count(id);
        stage.cluster.cli(&["vm", "snapshot", "create", "keeps", name]).await?.success()?;
        let ready = |vm: &Vm| vm.snapshots.iter().any(|s| s.name == name && s.state() == v1::SnapshotState::Ready);
        stage.cluster.api.wait_vm(id, "has its snapshot", secs(30), ready).await?;
        Ok(before..=stage.cluster.checker.count(id) + 1)
    };
    // A guest that has just started, with its SCSI disks.
    let started = async |stage: &Stage, id: &str, since: Instant| -> anyhow::Result<Console> {
        stage.cluster.checker.wait_line(id, "READY ", since, secs(60)).await?;
        let mut console = Console::open_when_there(&stage.cluster, id).await?;
        console.type_line("scsi").await?;
        console.says("word data ?0", "WORD data ?0 is <").await?;
        Ok(console)
    };
    let mut console = Console::open(&stage.cluster, id).await?;
    console.says("scsi", "SCSI loaded").await?;
    stage.cluster.cli(&["vm", "attach-disk", "keeps", "size=1M,name=data,pool=net"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "has its disk", secs(40), attached).await?;
    console.says("word data before", "WORD data before is <before>").await?;
    let qemu = stage.qemu(&vm)?;
    let first = snapshot(&stage, "first").await?;
    console.says("word data after", "WORD data after is <after>").await?;

    // A copy, while it runs.
    let since = Instant::now();
    stage.cluster.cli(&["vm", "clone", "keeps", "copy", "--snapshot", "first", "--wait"]).await?.success()?;
    let copy = stage.cluster.api.vm("copy").await?;
    let mut console = started(&stage, &copy.id, since).await?;
    console.says("word data ?copy", "WORD data ?copy is <before>").await?;
    stage.cluster.api.delete(&copy.id).await?;
    assert!(proc_table::is_alive(qemu.pid, qemu.start), "it ran all along");

    // Put back, while the agent that has to do it does not answer.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    stage.cluster.checker.expect_return(id, first.clone());
    let since = Instant::now();
    stage.cluster.cli(&["vm", "snapshot", "revert", "keeps", "first"]).await?.success()?;
    wait_for("what ran is killed", secs(20), async || match proc_table::is_alive(qemu.pid, qemu.start) {
        true => Err("it executes".to_owned()),
        false => Ok(()),
    })
    .await?;
    assert_eq!(stage.served(&vm)?, [1, 1], "nobody has put anything back");
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    let back = stage.cluster.api.wait_moved(&vm, secs(60)).await?;
    assert_eq!((incarnation_of(&back), back.reverting_to.as_str()), (2, ""));
    let found = stage.cluster.checker.wait_line(id, "READY ", since, secs(60)).await?;
    let found = harness::guest::parse(&found.text).context("a count")?.n;
    ensure!(first.contains(&found), "it found {found}, and not one of {first:?}");
    let mut console = started(&stage, id, since).await?;
    console.says("word data ?back", "WORD data ?back is <before>").await?;
    stage.cluster.cli(&["vm", "snapshot", "delete", "keeps", "first"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "has no snapshot", secs(30), |vm| vm.snapshots.is_empty()).await?;
    console.says("word data last", "WORD data last is <last>").await?;

    // While it is stopped: a snapshot, and a copy of what is there.
    stage.cluster.api.stop(id).await?;
    stage.cluster.api.wait_phase(id, VmPhase::Stopped, secs(40)).await?;
    snapshot(&stage, "second").await?;
    let since = Instant::now();
    stage.cluster.cli(&["vm", "clone", "keeps", "copy2", "--wait"]).await?.success()?;
    let copy = stage.cluster.api.vm("copy2").await?;
    let mut console = started(&stage, &copy.id, since).await?;
    console.says("word data ?copy2", "WORD data ?copy2 is <last>").await?;
    console.says("word data none", "WORD data none is <none>").await?;
    stage.cluster.api.delete(&copy.id).await?;
    stage.cluster.cli(&["vm", "snapshot", "revert", "keeps", "second"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "is put back", secs(30), |vm| vm.reverting_to.is_empty()).await?;
    stage.cluster.cli(&["vm", "snapshot", "delete", "keeps", "second"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "has no snapshot", secs(30), |vm| vm.snapshots.is_empty()).await?;

    // Disks come and go.
    stage.cluster.cli(&["vm", "attach-disk", "keeps", "size=1M,name=more,pool=net,bus=scsi"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "has its disk", secs(40), attached).await?;
    stage.cluster.cli(&["vm", "detach-disk", "keeps", "data", "--delete"]).await?.success()?;
    let has = |names: &'static [&str]| {
        move |vm: &Vm| vm.spec.iter().flat_map(|s| &s.disks).map(|d| d.name.as_str()).eq(names.iter().copied())
    };
    stage.cluster.api.wait_vm(id, "has one disk less", secs(40), has(&["disk0", "more"])).await?;
    stage.cluster.api.wait_gone(&copy.id, secs(30)).await?;
    assert_eq!(files(&stage.disks).len(), 2, "{:?}", files(&stage.disks));
    let since = Instant::now();
    stage.cluster.api.start(id).await?;
    stage.cluster.checker.wait_line(id, "READY ", since, secs(60)).await?;
    let mut console = Console::open_when_there(&stage.cluster, id).await?;
    console.type_line("scsi").await?;
    console.says("disks then", "DISKS then: more.").await?;
    stage.cluster.cli(&["vm", "detach-disk", "keeps", "more", "--delete"]).await?.success()?;
    stage.cluster.api.wait_vm(id, "has one disk less", secs(40), has(&["disk0"])).await?;
    console.says("disks now", "DISKS now:.").await?;
    assert_eq!(files(&stage.disks).len(), 1, "{:?}", files(&stage.disks));
    stage.cluster.api.delete(id).await?;
    stage.cluster.api.wait_gone(id, secs(30)).await?;
    assert_eq!(files(&stage.disks), Vec::<PathBuf>::new());
    stage.cluster.finish().await
}

/// The guest is on another host than what takes its snapshots: it holds its file systems still from before until after that, and no longer
/// than some seconds, and the snapshot says what it is worth.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_holds_still_for_a_snapshot_on_its_storage_host_but_not_for_long() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let in_pool = |s: &mut v1::VmSpec| {
        s.disks[0].pool = POOL.into();
        s.guest_agent = v1::GuestAgentMode::Enabled.into();
    };
    let vm = stage.cluster.run(specs::with(specs::linux("still"), in_pool)).await?;
    let id = vm.id.as_str();
    let answers = |vm: &Vm| vm.status.as_ref().is_some_and(|s| !s.addresses.is_empty());
    stage.cluster.api.wait_vm(id, "has addresses", secs(40), answers).await?;
    let worth = |vm: &Vm, name: &str| vm.snapshots.iter().find(|s| s.name == name).map(v1::Snapshot::guest);
    let known = |vm: &Vm, name: &str| {
        let ready = vm.snapshots.iter().any(|s| s.name == name && s.state() == v1::SnapshotState::Ready);
        ready && worth(vm, name) != Some(v1::SnapshotGuest::Unspecified)
    };

    let since = Instant::now();
    stage.cluster.cli(&["vm", "snapshot", "create", "still", "clean"]).await?.success()?;
    let vm = stage.cluster.api.wait_vm(id, "has its snapshot", secs(30), |vm| known(vm, "clean")).await?;
    assert_eq!(worth(&vm, "clean"), Some(v1::SnapshotGuest::Frozen));
    stage.cluster.checker.wait_line(id, "FROZEN", since, secs(10)).await?;
    stage.cluster.checker.wait_line(id, "THAWED", since, secs(10)).await?;

    // Whoever is to take it does not answer.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    let since = Instant::now();
    stage.cluster.cli(&["vm", "snapshot", "create", "still", "late"]).await?.success()?;
    stage.cluster.checker.wait_line(id, "FROZEN", since, secs(20)).await?;
    stage.cluster.checker.wait_line(id, "THAWED", since, secs(40)).await?;
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    let vm = stage.cluster.api.wait_vm(id, "has its snapshot", secs(40), |vm| known(vm, "late")).await?;
    assert_eq!(worth(&vm, "late"), Some(v1::SnapshotGuest::Running), "as after a power cut");

    // It starts again while it stands still, and when it is let go nothing of it did.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    let since = Instant::now();
    stage.cluster.cli(&["vm", "snapshot", "create", "still", "reset"]).await?.success()?;
    stage.cluster.checker.wait_line(id, "FROZEN", since, secs(20)).await?;
    let console = Console::open_when_there(&stage.cluster, id).await?;
    console.type_line("reboot").await?;
    stage.cluster.checker.wait_line(id, "READY", since, secs(20)).await?;
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    let vm = stage.cluster.api.wait_vm(id, "has its snapshot", secs(40), |vm| known(vm, "reset")).await?;
    assert_eq!(worth(&vm, "reset"), Some(v1::SnapshotGuest::Running), "it was another that stood still");

    // What does not run need not hold still.
    stage.cluster.api.stop(id).await?;
    stage.cluster.api.wait_phase(id, VmPhase::Stopped, secs(40)).await?;
    stage.cluster.cli(&["vm", "snapshot", "create", "still", "off"]).await?.success()?;
    let vm = stage.cluster.api.wait_vm(id, "has its snapshot", secs(30), |vm| known(vm, "off")).await?;
    assert_eq!(worth(&vm, "off"), Some(v1::SnapshotGuest::Off));
    stage.cluster.finish().await
}

/// What UEFI remembers lies on the storage host, too, goes along when the VM migrates, and goes when it is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_boots_by_uefi_has_its_variables_on_its_storage_host() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let since = Instant::now();
    let by_uefi = |s: &mut v1::VmSpec| {
        s.disks[0].pool = POOL.into();
        s.firmware = v1::Firmware::Uefi.into();
        s.memory_mib = 192;
    };
    let vm = stage.cluster.api.create(specs::with(specs::linux("efi"), by_uefi)).await?;
    let id = vm.id.as_str();
    let vm = stage.cluster.api.wait_running(id, secs(60)).await?;
    stage.cluster.checker.wait_line(id, "FIRMWARE uefi", since, secs(180)).await?;
    let boot = stage.cluster.checker.wait_beats(id, 1, secs(60)).await?.said.boot;
    let template = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd")?;
    let kept = fs::read(stage.disks.join(id).join("uefi-vars.0.fd"))?;
    assert_eq!(kept.len(), template.len());
    ensure!(kept != template, "the firmware has written nothing into its variables");

    let moved = migrate(&stage.cluster.api, id, other(&vm)).await?;
    let beat = stage.cluster.checker.wait_beats(id, 2, secs(60)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&moved), &boot), "the same guest goes on");
    stage.wait_served(&moved, &[2, 2]).await?;
    stage.cluster.api.delete(id).await?;
    stage.cluster.api.wait_gone(id, secs(60)).await?;
    assert!(!stage.disks.join(id).exists());
    stage.cluster.finish().await
}

/// N5: the guest goes on with all that it wrote, and what it came from has no disk any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_migrates_and_from_the_handover_on_only_its_new_host_has_the_disk() -> anyhow::Result<()> {
    let mut stage = Stage::set_up().await?;
    let vm = stage.cluster.run(Stage::request("wanders")).await?;
    let boot = stage.cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?.said.boot;
    let (source, target) = (host_of(&vm).to_owned(), other(&vm));
    let netns = stage.cluster.host(&source)?.netns()?.to_owned();
    let twin = Twin::frozen(&stage.qemu(&vm)?, &netns).await?;

    let moved = migrate(&stage.cluster.api, &vm.id, target).await?;
    let beat = stage.cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (target, &boot), "the same guest goes on");
    assert_eq!(stage.served(&vm)?, [incarnation_of(&moved)]);
    twin.thaw()?;
    stage.cluster.checker.wait_beats(&vm.id, 5, secs(20)).await?;
    assert_eq!(twin.said(), "", "what was left behind has no disk");
    drop(twin);

    // Its host is emptied.
    let what_if = stage.cluster.cli(&["host", "what-if", target, "-o", "json"]).await?.success()?.json()?;
    assert_eq!(what_if["vms"][0]["outcome"], "SIMULATED_OUTCOME_MOVES", "{what_if}");
    stage.cluster.cli(&["host", "drain", target]).await?.success()?;
    let back = stage.cluster.api.wait_running(&vm.id, secs(30)).await?;
    let beat = stage.cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    assert_eq!((host_of(&back), beat.host.as_str(), &beat.said.boot), (source.as_str(), source.as_str(), &boot));
    assert_eq!(stage.served(&vm)?, [incarnation_of(&back)]);
    stage.cluster.finish().await
}

/// N5: a migration that is called off, a storage host whose agent and daemon die, a new leader, and a storage host that does not
/// answer when the VM is handed over.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_becomes_of_the_storage_host_while_a_vm_migrates_it_goes_on_on_one_side() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    // Its lease outlives the restart of the only controller.
    let request = specs::with(loaded("busy", LOAD), |s| {
        s.disks[0].pool = POOL.into();
        s.set_failover(v1::FailoverPolicy::Patient);
    });
    let vm = stage.cluster.run(request).await?;
    let boot = stage.cluster.checker.wait_beats(&vm.id, 3, secs(60)).await?.said.boot;
    let goes_on = async |stage: &Stage, host: &str| -> anyhow::Result<()> {
        let beat = stage.cluster.checker.wait_beats(&vm.id, 10, secs(60)).await?;
        ensure!((beat.host.as_str(), &beat.said.boot) == (host, &boot), "{beat:?}");
        Ok(())
    };

    // Called off.
    let (first, target) = (incarnation_of(&vm), other(&vm));
    let next = stage.sending(&vm).await?;
    assert_eq!(stage.served(&vm)?, [first, next]);
    let cancel = v1::CancelMigrationRequest { vm: vm.id.clone(), ..Default::default() };
    stage.cluster.api.vms().cancel_migration(cancel).await?;
    stage.wait_served(&vm, &[first]).await?;
    goes_on(&stage, host_of(&vm)).await?;

    // Agent and daemon of the storage host, and the controller.
    let next = stage.sending(&vm).await?;
    let daemon = stage.daemon()?;
    stage.cluster.host("host-2")?.kill();
    kill_pid(daemon);
    stage.cluster.controller.kill();
    stage.cluster.controller.start_again().await?;
    stage.cluster.host("host-2")?.start_again()?;
    stage.cluster.wait_hosts().await?;
    stage.wait_served(&vm, &[first, next]).await?;
    goes_on(&stage, host_of(&vm)).await?;

    // Handed over, while the storage host does not answer: nobody executes before it has taken the disk from the source.
    stage.cluster.host("host-2")?.signal(Signal::STOP)?;
    let (moved, end) = stage.hurry(&vm, next).await?;
    assert_eq!((end.result(), host_of(&moved)), (MigrationResult::Done, target), "{end:?}");
    assert_eq!(stage.served(&vm)?, [first, next]);
    assert_ne!(stage.monitor(&vm, target)?.execute("query-status", json!({}))?["running"], true);
    assert_ne!(phase_of(&moved), VmPhase::Running);
    let explain = v1::ExplainVmRequest { vm: vm.id.clone(), owner: String::new() };
    let why = stage.cluster.api.vms().explain_vm(explain).await?.into_inner().summary;
    assert!(why.contains("storage host `host-2`"), "{why}");
    stage.cluster.host("host-2")?.signal(Signal::CONT)?;
    goes_on(&stage, target).await?;
    assert_eq!(stage.served(&vm)?, [next]);
    stage.cluster.finish().await
}

/// N1, N5: the target dies, then the source.
#[tokio::test(flavor = "multi_thread")]
async fn when_a_side_of_a_migration_dies_the_disk_is_the_others() -> anyhow::Result<()> {
    let mut stage = Stage::with(Options::hosts(1).namespaces().linux()).await?;
    let vm = stage.cluster.run(specs::with(loaded("busy", LOAD), |s| s.disks[0].pool = POOL.into())).await?;
    let boot = stage.cluster.checker.wait_beats(&vm.id, 3, secs(60)).await?.said.boot;
    let (first, target) = (incarnation_of(&vm), other(&vm));
    let next = stage.sending(&vm).await?;
    kill_pid(stage.cluster.host(target)?.process_of(&vm.id, Kind::Qemu)?.pid);
    let (_, end) = ended(&stage.cluster.api, &vm.id, next).await?;
    assert_eq!(end.result(), MigrationResult::GivenUp, "{end:?}");
    stage.wait_served(&vm, &[first]).await?;
    let beat = stage.cluster.checker.wait_beats(&vm.id, 10, secs(60)).await?;
    assert_eq!((beat.host.as_str(), &beat.said.boot), (host_of(&vm), &boot));

    stage.sending(&vm).await?;
    stage.cluster.host(host_of(&vm))?.cut_power();
    let count = stage.cluster.checker.count(&vm.id);
    let moved = stage.cluster.api.wait_moved(&vm, secs(60)).await?;
    assert_eq!(host_of(&moved), target);
    stage.cluster.checker.wait_beats(&vm.id, 3, secs(60)).await?;
    assert!(stage.cluster.checker.count(&vm.id) > count);
    assert_eq!(stage.served(&vm)?, [incarnation_of(&moved)]);
    stage.cluster.finish().await
}
