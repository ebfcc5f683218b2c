//! How long a guest stands still when it is migrated: by uncloud, and by plain QEMU with the same arguments, the same TLS and the same
//! safe protocol (stopped before the last of it is sent, and let go on only when all is there), but with nobody to ask in between.
//!
//! A guest's clocks stand still with it, so what is measured is what QEMU says: from the source's event STOP to the target's
//! RESUME, by the clock of the machine that both run on. Both kinds take turns; the guest whose turn it is not stands still meanwhile, so
//! that neither takes the other's CPU.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use harness::{
    Cluster, Options,
    api::{host_of, phase_of},
    etcd::Fsync,
    guest::{self, Continuity},
    migration::{Load, begin, ended, loaded},
    paths,
    proc_table::Kind,
    qmp::{Event, MONITOR, Monitor},
    slots::Share,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use uncloud_proto::v1::{self, MigrationResult, Vm, VmPhase};

use super::{Measured, median, millis};

const TRIALS: usize = 100;
const LIMIT: Duration = Duration::from_secs(60);
/// The guest beats ten times a second and writes to 4 MiB of its memory all the time.
const LOAD: Load = Load { beat_ms: 100, dirty_kib: 4 << 10, kib_per_second: 16 << 10 };

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(2).default_leases().linux();
    options.share = Share::Whole;
    // As in production: the hand-over is written before the guest goes on.
    options.fsync = Fsync::On;
    let mut cluster = options.start().await?;
    let mut vm = cluster.run(loaded("traveller", LOAD)).await?;
    let boot = cluster.checker.wait_beats(&vm.id, 1, LIMIT).await?.said.boot;
    let qemu = cluster.host_of(&vm)?.process_of(&vm.id, Kind::Qemu)?;
    let disk = disk_of(&cluster, &vm.id)?.display().to_string();
    let mut plain = blocking(move || Plain::boot(&qemu.argv, &disk)).await?;

    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for trial in 1..=TRIALS {
        plain = held(plain, "stop").await?;
        let (took, moved) = one(&mut cluster, &vm).await.with_context(|| format!("migration {trial}"))?;
        vm = moved;
        pause(&cluster, &vm, true).await?;
        plain = held(plain, "cont").await?;
        let (beside, back) = blocking(move || {
            let took = plain.migrate()?;
            Ok((took, plain))
        })
        .await
        .with_context(|| format!("plain migration {trial}"))?;
        plain = back;
        pause(&cluster, &vm, false).await?;
        eprintln!(
            "migration {trial} of {TRIALS}: {:.1} ms, plain QEMU {:.1} ms",
            millis(took.whole()),
            millis(beside.whole())
        );
        ours.push(took);
        bare.push(beside);
        cluster.checker.wait_beats(&vm.id, 3, LIMIT).await?;
    }
    let last = cluster.checker.wait_beats(&vm.id, 1, LIMIT).await?.said;
    ensure!(last.boot == boot, "the guest was started anew");
    cluster.finish().await?;
    let counted = blocking(move || plain.finish()).await?;
    eprintln!("{TRIALS} migrations each; no count lost or doubled: {} by uncloud, {counted} by plain QEMU", last.n);
    for (what, piece) in Still::PIECES {
        let piece_of = |all: &[Still]| median(all.iter().map(|s| millis(piece(s))).collect());
        eprintln!("{what}: p50 {:.1} ms, plain QEMU {:.1} ms", piece_of(&ours), piece_of(&bare));
    }
    let whole = |all: Vec<Still>| all.iter().map(|s| millis(s.whole())).collect::<Vec<_>>();
    let (ours, bare) = (whole(ours), whole(bare));
    let beside = format!("plain QEMU, same arguments; {TRIALS} each, by turns");
    Ok(vec![
        Measured::new("migration_downtime_p50", median(ours.clone()), median(bare.clone()), "ms", beside),
        Measured::new("migration_downtime_p99", p99(ours), p99(bare), "ms", "the same"),
    ])
}

fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * 99).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Holds plain QEMU's guest still, or lets it go on.
async fn held(mut plain: Plain, command: &'static str) -> anyhow::Result<Plain> {
    blocking(move || {
        plain.monitor.execute(command, json!({}))?;
        Ok(plain)
    })
    .await
}

/// Holds the other one still, or lets it go on.
async fn pause(cluster: &Cluster, vm: &Vm, paused: bool) -> anyhow::Result<()> {
    let (mut vms, id, owner) = (cluster.api.vms(), vm.id.clone(), String::new());
    match paused {
        true => drop(vms.pause_vm(v1::PauseVmRequest { vm: id, owner }).await?),
        false => drop(vms.resume_vm(v1::ResumeVmRequest { vm: id, owner }).await?),
    }
    let done = |vm: &Vm| phase_of(vm) == if paused { VmPhase::Paused } else { VmPhase::Running };
    cluster.api.wait_vm(&vm.id, "stands still or goes on", LIMIT, done).await.map(drop)
}

/// One by uncloud.
async fn one(cluster: &mut Cluster, vm: &Vm) -> anyhow::Result<(Still, Vm)> {
    let target = if host_of(vm) == "host-1" { "host-2" } else { "host-1" };
    let socket = |cluster: &mut Cluster, host: &str| -> anyhow::Result<PathBuf> {
        Ok(cluster.host(host)?.state_dir().join("vms").join(&vm.id).join(MONITOR))
    };
    let (from, to) = (socket(cluster, host_of(vm))?, socket(cluster, target)?);
    let mut source = blocking(move || Monitor::connect(&from)).await?;
    let incarnation = begin(&cluster.api, &vm.id, target, 0).await?;
    let mut listener = blocking(move || connect(&to)).await?;
    let (_, end) = ended(&cluster.api, &vm.id, incarnation).await?;
    ensure!(end.result() == MigrationResult::Done, "{end:?}");
    let vm = cluster.api.wait_running(&vm.id, LIMIT).await?;
    let took = blocking(move || still(&mut source, &mut listener)).await?;
    Ok((took, vm))
}

/// How long a guest stood still.
struct Still {
    /// From its stop until the source was told to send the last of it.
    told: Duration,
    /// From then until the source had sent it, and the target had said so.
    sent: Duration,
    /// From then until the target went on.
    went_on: Duration,
}

type Piece = fn(&Still) -> Duration;

impl Still {
    const PIECES: [(&str, Piece); 3] = [
        ("until told to send the last", |s| s.told),
        ("sending the last", |s| s.sent),
        ("until it goes on", |s| s.went_on),
    ];

    fn whole(&self) -> Duration {
        self.told + self.sent + self.went_on
    }
}

/// From the source's stop to when the target went on.
fn still(source: &mut Monitor, target: &mut Monitor) -> anyhow::Result<Still> {
    let named = |name: &'static str| move |e: &Event| e.name == name;
    let stop = source.wait_event("STOP", LIMIT, named("STOP"))?;
    let last = source.wait_event("device", LIMIT, migration_is("device"))?;
    let sent = source.wait_event("completed", LIMIT, migration_is("completed"))?;
    let resume = target.wait_event("RESUME", LIMIT, named("RESUME"))?;
    let between = |from: &Event, to: &Event| to.at.checked_sub(from.at).context("it went on before it was stopped");
    Ok(Still { told: between(&stop, &last)?, sent: between(&last, &sent)?, went_on: between(&sent, &resume)? })
}

fn migration_is(status: &'static str) -> impl Fn(&Event) -> bool {
    move |e: &Event| e.name == "MIGRATION" && e.data["status"] == status
}

/// Connects to a QEMU that is about to start.
fn connect(socket: &std::path::Path) -> anyhow::Result<Monitor> {
    let began = Instant::now();
    loop {
        match Monitor::connect(socket) {
            Ok(monitor) => return Ok(monitor),
            Err(error) if began.elapsed() > LIMIT => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The file of a VM's only disk in the shared pool.
fn disk_of(cluster: &Cluster, vm: &str) -> anyhow::Result<PathBuf> {
    let dir = cluster.pool().join("disks").join(vm);
    let mut files = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
    Ok(files.next().context("a disk")??.path())
}

/// A guest that plain QEMUs pass on to each other.
struct Plain {
    // Not in the cluster's own directory: its checker would take this for a second copy of the VM.
    dir: TempDir,
    argv: Vec<String>,
    started: u32,
    process: Child,
    monitor: Monitor,
}

impl Plain {
    /// Boots it with these arguments, but with a disk of its own in place of `disk`.
    fn boot(argv: &[String], disk: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let own = dir.path().join("disk.qcow2").display().to_string();
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &own, "1M"]).status()?;
        ensure!(made.success(), "qemu-img: {made}");
        ensure!(argv.iter().any(|a| a.contains(disk)), "{disk} is not in {argv:?}");
        let argv: Vec<String> = argv.iter().map(|a| a.replace(disk, &own)).collect();
        let keys = dir.path().join("keys");
        fs::create_dir(&keys)?;
        fs::write(keys.join("keys.psk"), format!("uncloud:{}\n", "5a".repeat(32)))?;
        fs::copy(paths::source_root().join("agent/src/qemu/ffdhe2048.pem"), keys.join("dh-params.pem"))?;
        let (process, monitor) = start(&dir, 0, &argv, &[])?;
        let plain = Self { dir, argv, started: 0, process, monitor };
        let began = Instant::now();
        while !plain.said()?.contains("COUNT") {
            ensure!(began.elapsed() < LIMIT, "it does not count: {}", plain.said()?);
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(plain)
    }

    /// Passes it on. Says how long it stood still.
    fn migrate(&mut self) -> anyhow::Result<Still> {
        self.started += 1;
        let (process, mut target) = start(&self.dir, self.started, &self.argv, &["-S", "-incoming", "defer"])?;
        let source = &mut self.monitor;
        source.forget_events();
        let names = ["return-path", "pause-before-switchover", "late-block-activate", "events"];
        let list: Vec<Value> = names.iter().map(|n| json!({ "capability": n, "state": true })).collect();
        let keys = self.dir.path().join("keys");
        for (monitor, endpoint) in [(&mut target, "server"), (&mut *source, "client")] {
            monitor.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
            let id = format!("{endpoint}-keys");
            let mut object = json!({ "qom-type": "tls-creds-psk", "id": id, "endpoint": endpoint, "dir": keys });
            if endpoint == "client" {
                object["username"] = "uncloud".into();
            }
            monitor.execute("object-add", object)?;
            monitor.execute("migrate-set-parameters", json!({ "tls-creds": id, "max-bandwidth": 1_u64 << 40 }))?;
        }
        target.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listens = target.execute("query-migrate", json!({}))?;
        let port = listens["socket-address"][0]["port"].as_str().context("a port")?.to_owned();
        source.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        source.wait_event("pre-switchover", LIMIT, migration_is("pre-switchover"))?;
        source.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        source.wait_event("completed", LIMIT, migration_is("completed"))?;
        target.execute("cont", json!({}))?;
        let took = still(source, &mut target)?;
        self.process.kill()?;
        self.process.wait()?;
        (self.process, self.monitor) = (process, target);
        Ok(took)
    }

    /// What the guest has said so far, on all its consoles. A line may begin on one and end on the next.
    fn said(&self) -> anyhow::Result<String> {
        let mut all = Vec::new();
        for n in 0..=self.started {
            all.extend(fs::read(self.dir.path().join(n.to_string()).join("serial.log"))?);
        }
        Ok(String::from_utf8_lossy(&all).into_owned())
    }

    /// Ends it; judges what it said. Returns its last count.
    fn finish(mut self) -> anyhow::Result<u64> {
        self.process.kill()?;
        self.process.wait()?;
        let (mut continuity, mut last) = (Continuity::default(), 0);
        for line in self.said()?.lines() {
            ensure!(!guest::is_alarm(line), "plain QEMU: {line}");
            if let Some(said) = guest::parse(line) {
                last = said.n;
                if let Err(problem) = continuity.next(said) {
                    bail!("plain QEMU: {problem}");
                }
            }
        }
        Ok(last)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts one in a directory of its own.
fn start(dir: &TempDir, n: u32, argv: &[String], more: &[&str]) -> anyhow::Result<(Child, Monitor)> {
    let run = dir.path().join(n.to_string());
    fs::create_dir(&run)?;
    let mut process = Command::new(&argv[0])
        .args(&argv[1..])
        .args(more)
        .current_dir(&run)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(run.join("stderr"))?)
        .spawn()?;
    match connect(&run.join("qmp1.sock")) {
        Ok(monitor) => Ok((process, monitor)),
        Err(error) => {
            let _ = process.kill();
            let _ = process.wait();
            Err(error).with_context(|| fs::read_to_string(run.join("stderr")).unwrap_or_default())
        }
    }
}
