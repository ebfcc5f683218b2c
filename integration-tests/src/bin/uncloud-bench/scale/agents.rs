//! The start of a cold controller, its sessions, and how many it can have.

use std::time::{Duration, Instant};

use super::{CONNECT_LIMIT, HOSTS, Scale, VMS, bare, quantile, raw};

/// How long heartbeats are counted.
const MEASURE: Duration = Duration::from_secs(15);
/// Agents are added in steps.
const STEP: usize = 3000;
/// How long a step is watched: every lease could run out in that time.
const WATCH: Duration = Duration::from_secs(10);
/// More do not fit: all connect from one address to one port, and the kernel has 28,000 ports for that.
const MOST: usize = 25_000;

/// From the start of the process to the first answer of a leader.
pub(super) async fn cold_start(scale: &mut Scale) -> anyhow::Result<()> {
    let raw = raw::read_all(&scale.plane).await?.as_secs_f64();
    let begin = Instant::now();
    scale.plane.spawn()?;
    scale.plane.controllers[0].wait_serving().await?;
    let took = begin.elapsed().as_secs_f64();
    scale.add("cold_start_100k", took, raw, "s", "reading the same keys from etcd; the aim is 2 s");
    let kib = scale.resident_kib(0)? - scale.empty_kib;
    let stored = raw::bytes(&scale.plane, "/uncloud/v1/vm").await? as f64 / 1024.0;
    scale.add("memory_per_vm", kib / VMS as f64, stored / VMS as f64, "KiB", "a VM's keys and values in etcd");
    Ok(())
}

/// Connects all agents, at once.
pub(super) async fn connect(scale: &mut Scale) -> anyhow::Result<()> {
    let before = scale.resident_kib(0)?;
    let begin = Instant::now();
    scale.fleet.start(&scale.site);
    scale.fleet.wait_sessions(HOSTS, CONNECT_LIMIT).await?;
    let took = scale.fleet.welcomed_at().duration_since(begin).as_secs_f64();
    scale.add("agents_10k_connected", took, scale.bare.connected_after, "s", "all at once, to a bare server");
    let kib = scale.resident_kib(0)? - before;
    scale.add("memory_per_agent", kib / HOSTS as f64, scale.bare.sessions_kib / HOSTS as f64, "KiB", "a bare server's");
    Ok(())
}

/// Heartbeats, and nothing else.
pub(super) async fn steady(scale: &mut Scale) -> anyhow::Result<()> {
    let lost = scale.fleet.counted().lost;
    let pid = scale.pid(0)?;
    let (cores, answers) = bare::beat(&scale.fleet, pid, MEASURE).await?;
    anyhow::ensure!(scale.fleet.counted().lost == lost, "leases were lost: {:?}", scale.fleet.counted());
    let bare = scale.bare;
    scale.add("agents_10k_cores", cores, bare.cores, "cores", "a bare server that answers heartbeats; the aim is 0.35");
    let sessions = scale.all.iter().find(|m| m.name == "memory_per_agent").map_or(f64::NAN, |m| m.ours);
    let (mib, bare_mib) = (sessions * HOSTS as f64 / 1024.0, bare.sessions_kib / 1024.0);
    scale.add("agents_10k_memory", mib, bare_mib, "MiB", "a bare server's sessions; the aim is 600");
    let p99 = quantile(&answers, 0.99);
    scale.add("agents_10k_answer_p99", p99, bare.answer_p99, "ms", "a bare server's; the aim is 20");
    Ok(())
}

/// Adds agents until a lease is lost.
pub(super) async fn most(scale: &mut Scale) -> anyhow::Result<()> {
    let lost = scale.fleet.counted().lost;
    let mut most = scale.fleet.counted().sessions;
    while scale.site.hosts.len() < MOST {
        let step = STEP.min(MOST - scale.site.hosts.len());
        scale.site.add(step);
        let before = scale.fleet.counted().sessions;
        scale.fleet.start(&scale.site);
        let all = usize::try_from(before)? + step;
        if let Err(error) = scale.fleet.wait_sessions(all, CONNECT_LIMIT).await {
            eprintln!("{error:#}");
            break;
        }
        tokio::time::sleep(WATCH).await;
        let counted = scale.fleet.counted();
        if counted.lost > lost {
            eprintln!("with {all} agents {} leases were lost", counted.lost - lost);
            break;
        }
        most = counted.sessions;
    }
    scale.add("agents_max", most as f64, MOST as f64, "agents", "so many can connect from one address; no lease lost");
    Ok(())
}
