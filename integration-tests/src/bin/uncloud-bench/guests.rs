//! How long a guest takes to its first line, beside a bare QEMU with the same arguments; and what keeper and agent need.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use harness::{
    Cluster, Options, paths,
    proc_table::{self, Kind, Proc},
    slots::Share,
    specs,
};
use uncloud_proto::v1::{GetStatusRequest, cluster_service_client::ClusterServiceClient};

use super::{Measured, median, millis};

const TRIALS: usize = 11;
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(1).default_leases();
    options.share = Share::Whole;
    let mut cluster = options.start().await?;
    let idle = private_kib(cluster.hosts[0].process().pid().context("the agent runs")?)?;

    // The first VM brings the image into the pool, once; it is not part of what is measured.
    let first = cluster.run(specs::micro("first")).await?;
    let keeper = cluster.hosts[0].process_of(&first.id, Kind::Keeper)?;
    let qemu = cluster.hosts[0].process_of(&first.id, Kind::Qemu)?;
    let keeper_kib = private_kib(keeper.pid)?;

    let (mut ours, mut bare, mut disk) = (Vec::new(), Vec::new(), Vec::new());
    for trial in 0..TRIALS {
        let begin = Instant::now();
        let alone = Bare::new(&cluster, &qemu)?;
        disk.push(millis(begin.elapsed()));
        let begin = Instant::now();
        bare.push(millis(alone.spawn()?.first_line(begin, LIMIT)?));
        ours.push(millis(create_to_first_line(&cluster, trial).await?));
    }
    let empty = empty_process_kib()?;
    let client = idle_client_kib(cluster.api.endpoint()).await?;
    cluster.finish().await?;
    let (ours, bare, disk) = (median(ours), median(bare), median(disk));
    Ok(vec![
        Measured::new("create_to_first_line", ours, bare, "ms", "a bare QEMU with the same arguments"),
        Measured::new(
            "create_to_first_line_disk",
            ours,
            bare + disk,
            "ms",
            "the same, after qemu-img has made its disk",
        ),
        Measured::new("keeper_memory", keeper_kib, empty, "KiB", "private memory of `sleep`; the aim is 2048"),
        Measured::new("agent_memory", idle, client, "KiB", "private memory of an idle gRPC client"),
    ])
}

/// From the call to the first line in the serial log.
async fn create_to_first_line(cluster: &Cluster, trial: usize) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let vm = cluster.api.create(specs::micro(&format!("trial-{trial}"))).await?;
    let log = cluster.hosts[0].state_dir().join("vms").join(&vm.id).join("run/serial.log");
    let took = tokio::task::spawn_blocking(move || first_line(&log, start, LIMIT)).await??;
    cluster.api.delete(&vm.id).await?;
    cluster.api.wait_gone(&vm.id, LIMIT).await?;
    Ok(took)
}

/// A QEMU with the same arguments as another, but nobody around it: a fresh overlay, a fresh directory.
pub(crate) struct Bare {
    dir: tempfile::TempDir,
    program: String,
    args: Vec<String>,
}

impl Bare {
    /// Makes the disk.
    pub(crate) fn new(cluster: &Cluster, like: &Proc) -> anyhow::Result<Self> {
        // Not in the cluster's own directory: its checker would take this for a second copy of the VM.
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk.qcow2");
        let image = paths::guest("micro.img")?;
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(image)
            .arg(&disk)
            .status()?;
        ensure!(made.success(), "qemu-img: {made}");
        let own = disk_of(cluster, &like.vm)?.display().to_string();
        ensure!(like.argv.iter().any(|a| a.contains(&own)), "{own} is not in {:?}", like.argv);
        let args = like.argv[1..].iter().map(|a| a.replace(&own, &disk.display().to_string())).collect();
        Ok(Self { dir, program: like.argv[0].clone(), args })
    }

    /// Starts it. It ends when what is returned is dropped.
    pub(crate) fn spawn(&self) -> anyhow::Result<Running> {
        let dir = self.dir.path();
        let qemu = Command::new(&self.program)
            .args(&self.args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("stderr"))?)
            .spawn()?;
        Ok(Running { qemu, dir: dir.to_owned() })
    }
}

/// A QEMU with nobody around it.
pub(crate) struct Running {
    qemu: Child,
    dir: PathBuf,
}

impl Running {
    /// Waits for the guest's first line. How long after `start` it came.
    pub(crate) fn first_line(&self, start: Instant, limit: Duration) -> anyhow::Result<Duration> {
        let took = first_line(&self.dir.join("serial.log"), start, limit);
        took.with_context(|| fs::read_to_string(self.dir.join("stderr")).unwrap_or_default())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The file of a VM's only disk in the shared pool.
fn disk_of(cluster: &Cluster, vm: &str) -> anyhow::Result<PathBuf> {
    let dir = cluster.pool().join("disks").join(vm);
    let mut files = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
    Ok(files.next().context("a disk")??.path())
}

/// Waits for a whole line in a file that may not be there yet.
pub(crate) fn first_line(log: &Path, start: Instant, limit: Duration) -> anyhow::Result<Duration> {
    loop {
        if fs::read(log).is_ok_and(|bytes| bytes.contains(&b'\n')) {
            return Ok(start.elapsed());
        }
        if start.elapsed() > limit {
            bail!("no line in {} within {limit:?}", log.display());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn private_kib(pid: u32) -> anyhow::Result<f64> {
    let (_, private) = proc_table::memory_kib(pid).with_context(|| format!("memory of process {pid}"))?;
    Ok(private as f64)
}

/// What a process needs that does nothing.
fn empty_process_kib() -> anyhow::Result<f64> {
    let mut sleep = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn()?;
    std::thread::sleep(Duration::from_millis(200));
    let kib = private_kib(sleep.id());
    sleep.kill()?;
    sleep.wait()?;
    kib
}

/// What a program needs that has the same runtime and one open gRPC connection, and does nothing.
async fn idle_client_kib(endpoint: &str) -> anyhow::Result<f64> {
    let mut client = tokio::process::Command::new(std::env::current_exe()?)
        .args(["idle-client", endpoint])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    // It says so when it is connected.
    let mut ready = [0; 5];
    let mut stdout = client.stdout.take().context("its output")?;
    tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut ready).await?;
    let kib = private_kib(client.id().context("it runs")?);
    client.kill().await?;
    kib
}

/// The program of [`idle_client_kib`].
pub(crate) async fn idle_client(endpoint: &str) -> anyhow::Result<()> {
    let mut client = ClusterServiceClient::connect(format!("http://{endpoint}")).await?;
    client.get_status(GetStatusRequest {}).await?;
    println!("ready");
    std::future::pending().await
}
