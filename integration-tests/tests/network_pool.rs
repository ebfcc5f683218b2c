//! Disks that a storage host serves over the network, to one incarnation of each VM at a time. (P1, P5; N1 to N5)

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use harness::{
    agent::HostOptions,
    api::{host_of, incarnation_of},
    netns::{self, Cut},
    prelude::*,
    proc_table::{self, Kind, Proc},
    process::{kill_pid, signal_pid},
};
use uncloud_proto::v1::VmPhase;

const POOL: &str = "net";

/// A cluster in namespaces: `host-1` has nothing to do with it, `host-2` has the disks and is cordoned, the others run VMs.
struct Stage {
    cluster: Cluster,
    disks: PathBuf,
}

impl Stage {
    async fn set_up() -> anyhow::Result<Self> {
        let mut cluster = Options::hosts(1).namespaces().start().await?;
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

    // What does not work says so.
    let migrate = v1::MigrateVmRequest { vm: vm.id.clone(), ..Default::default() };
    let refused = stage.cluster.api.vms().migrate_vm(migrate).await.expect_err("it is refused");
    assert!(refused.message().contains("over the network"), "{refused:?}");
    stage.cluster.finish().await
}
