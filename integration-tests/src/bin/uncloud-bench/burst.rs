//! A hundred VMs that are created at once, on several hosts: how long until every guest has said its first line, beside as many
//! bare QEMUs with the same arguments that are started at once. Both need all processors.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::future::try_join_all;
use harness::{Cluster, Options, api::host_of, proc_table::Kind, slots::Share, specs};
use uncloud_proto::v1::{HostState, VmPhase};

use super::{
    Measured,
    guests::{Bare, first_line},
};

const HOSTS: usize = 4;
const VMS: usize = 100;
/// For all of them.
const LIMIT: Duration = Duration::from_secs(300);

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(HOSTS).default_leases().each_host(|_, host| {
        (host.vcpus, host.memory_mib) = (16, 4096);
    });
    options.share = Share::Whole;
    let mut cluster = options.start().await?;
    // It brings the image into the pool.
    let first = cluster.run(specs::micro("first")).await?;
    let like = cluster.host_of(&first)?.process_of(&first.id, Kind::Qemu)?;

    let bare = (0..VMS).map(|_| Bare::new(&cluster, &like)).collect::<anyhow::Result<Vec<_>>>()?;
    let begin = Instant::now();
    let running = bare.iter().map(Bare::spawn).collect::<anyhow::Result<Vec<_>>>()?;
    let took = tokio::task::spawn_blocking(move || {
        running.iter().map(|qemu| qemu.first_line(begin, LIMIT)).collect::<anyhow::Result<Vec<_>>>()
    });
    let bare_took = took.await??.into_iter().max().context("a QEMU")?;
    drop(bare);

    let (created, began, all) = create(&cluster).await?;
    let hosts = cluster.api.list_hosts().await?;
    let up = hosts.iter().filter(|h| h.state() == HostState::Up).count();
    ensure!(up == HOSTS, "{up} of {HOSTS} hosts have their leases");
    cluster.finish().await?;
    let seconds = |d: Duration| d.as_secs_f64();
    Ok(vec![
        Measured::new("burst_100_created", seconds(created), 1.0, "s", "all are acknowledged"),
        Measured::new(
            "burst_100_first_lines",
            seconds(all),
            seconds(bare_took),
            "s",
            format!("{VMS} bare QEMUs at once; the first of ours after {:.2} s", seconds(began)),
        ),
    ])
}

/// From the first call until all are acknowledged, until the first guest has said a line, and until every guest has. None of them may
/// have been started twice.
async fn create(cluster: &Cluster) -> anyhow::Result<(Duration, Duration, Duration)> {
    let begin = Instant::now();
    let vms = try_join_all((0..VMS).map(|n| cluster.api.create(specs::micro(&format!("burst-{n}"))))).await?;
    let created = begin.elapsed();
    let mut lines = Vec::new();
    for vm in &vms {
        let vm = cluster.api.wait_phase(&vm.id, VmPhase::Running, LIMIT).await?;
        let host = host_of(&vm);
        let host = cluster.hosts.iter().find(|h| h.name() == host).with_context(|| format!("no host `{host}`"))?;
        let log = host.state_dir().join("vms").join(&vm.id).join("run/serial.log");
        lines.push(tokio::task::spawn_blocking(move || first_line(&log, begin, LIMIT)));
    }
    let mut took = Vec::new();
    for line in lines {
        took.push(line.await??);
    }
    for vm in &vms {
        let instances = cluster.checker.instances(&vm.id).len();
        ensure!(instances == 1, "VM {} was started {instances} times", vm.name);
    }
    let (first, last) = (took.iter().min(), took.iter().max());
    Ok((created, *first.context("a VM")?, *last.context("a VM")?))
}
