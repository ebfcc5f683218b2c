//! A cluster to break, the guests on it, and the question whether all is well again.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use tonic::Code;
use uncloud_proto::v1::{self, FailoverPolicy, HostState, VmPhase};

use crate::{
    Cluster, Options,
    api::{host_of, incarnation_of, phase_of, summary},
    checker::Instance,
    guest, specs, wait_for,
};

/// A guest beats once a second; on a busy machine it may be late.
const BEATS_WITHIN: Duration = Duration::from_millis(3500);

/// A cluster that was well a moment ago answers within this.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// A VM that runs from the beginning to the end and that no user touches.
#[derive(Clone, Debug)]
pub struct Guest {
    /// UUID.
    pub id: String,
    /// Name.
    pub name: String,
    /// What becomes of it when its host is lost.
    pub failover: FailoverPolicy,
}

/// A cluster with guests.
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// The guests.
    pub guests: Vec<Guest>,
}

impl Stage {
    /// Starts a cluster and the guests.
    ///
    /// # Errors
    ///
    /// Something does not come up.
    pub async fn start(options: Options, guests: &[(&str, FailoverPolicy)]) -> anyhow::Result<Self> {
        let mut cluster = options.start().await?;
        for part in ["etcd", "leader", "history"] {
            // That a part of the control plane was away is worth an ERROR.
            cluster.allow_error(part);
        }
        let mut stage = Self { cluster, guests: Vec::new() };
        for (name, failover) in guests {
            let request = specs::with(specs::micro(name), |s| s.set_failover(*failover));
            let vm = stage.cluster.run(request).await?;
            stage.guests.push(Guest { id: vm.id, name: vm.name, failover: *failover });
        }
        Ok(stage)
    }

    /// The QEMU of each guest that has one now.
    #[must_use]
    pub fn instances(&self) -> BTreeMap<String, Instance> {
        let running = self.guests.iter().filter_map(|g| Some((g.id.clone(), self.cluster.checker.running(&g.id)?)));
        running.collect()
    }

    /// The guest with this id.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn guest(&self, id: &str) -> anyhow::Result<&Guest> {
        self.guests.iter().find(|g| g.id == id).with_context(|| format!("{id} is none of the guests"))
    }

    /// The guests whose QEMU is on this host now.
    #[must_use]
    pub fn on(&self, host: &str) -> Vec<Guest> {
        let here = |g: &&Guest| self.cluster.checker.running(&g.id).is_some_and(|i| i.host == host);
        self.guests.iter().filter(here).cloned().collect()
    }

    /// Waits until somebody leads, has a session with each host, and every guest runs where the API says, and has beaten since this was asked.
    /// Returns how long that took.
    ///
    /// # Errors
    ///
    /// What is not as it should be when the limit is over.
    pub async fn settle(&mut self, limit: Duration) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let (cluster, guests) = (&mut self.cluster, &self.guests);
        wait_for("all is well again", limit, async || {
            let leader = cluster.leader().await.map_err(|e| format!("{e:#}"))?;
            let api = cluster.controller_at(leader).api().clone();
            let hosts = api.list_hosts().await.map_err(|s| s.to_string())?;
            for host in &hosts {
                // The field is set while the leader has a session with the host.
                if host.state() != HostState::Up || host.last_heartbeat_ms == 0 {
                    return Err(format!("{} is {:?} ({})", host.name, host.state(), host.reason));
                }
            }
            for guest in guests {
                let vm = api.vm(&guest.id).await.map_err(|s| s.to_string())?;
                is_well(cluster, &vm, start)?;
            }
            Ok(())
        })
        .await?;
        Ok(start.elapsed())
    }

    /// When the guest said its first line after `after`, if it did.
    #[must_use]
    pub fn spoke_after(&self, id: &str, after: Instant) -> Option<Instant> {
        let started = |l: &crate::checker::Line| {
            l.at > after && guest::parse(&l.text).is_some_and(|s| s.kind == guest::Kind::Started)
        };
        self.cluster.checker.lines(id).into_iter().find(started).map(|l| l.at)
    }

    /// Reads a VM, as soon as somebody leads.
    ///
    /// # Errors
    ///
    /// There is none, or nobody has led for half a minute.
    pub async fn vm(&self, id: &str) -> anyhow::Result<v1::Vm> {
        wait_for(&format!("somebody answers for VM {id}"), READ_LIMIT, async || match self.cluster.api.vm(id).await {
            Ok(vm) => Ok(Ok(vm)),
            Err(status) if status.code() == Code::NotFound => Ok(Err(status)),
            Err(status) => Err(status.to_string()),
        })
        .await?
        .map_err(Into::into)
    }

    /// Cuts the power of every host, compares the counters on the disks with what the guests said last, and ends the
    /// cluster, which judges the rest.
    ///
    /// # Errors
    ///
    /// Everything that was wrong.
    pub async fn finish(mut self) -> anyhow::Result<()> {
        for host in &mut self.cluster.hosts {
            host.cut_power();
        }
        // What a guest said in its last moment is read at the checker's next look.
        let mut problems = Vec::new();
        for guest in &self.guests {
            let limit = Duration::from_secs(5);
            self.cluster.checker.wait_gone(&guest.id, limit).await?;
            let said = self.cluster.checker.count(&guest.id);
            // The kernel closes the files of a process, and with them QEMU's lock, a moment after its end begins.
            let read = wait_for("its disk is free", limit, async || {
                disk_counter(&self.cluster.pool(), self.cluster.path(), &guest.id).map_err(|e| format!("{e:#}"))
            });
            match read.await {
                Ok(on_disk) if on_disk == said || on_disk == said + 1 => {}
                Ok(on_disk) => problems.push(format!("{}: said {said}, and its disk has {on_disk}", guest.name)),
                Err(error) => problems.push(format!("{}: {error:#}", guest.name)),
            }
        }
        let ended = self.cluster.finish().await;
        if let Err(error) = ended {
            problems.push(format!("{error:#}"));
        }
        ensure!(problems.is_empty(), "{}", problems.join("\n"));
        Ok(())
    }
}

/// Whether a VM that should run does, on the host that the API names, and has beaten since.
fn is_well(cluster: &Cluster, vm: &v1::Vm, since: Instant) -> Result<(), String> {
    let told = vm.status.as_ref().map_or(0, |s| s.incarnation);
    if phase_of(vm) != VmPhase::Running || told != incarnation_of(vm) {
        return Err(summary(vm));
    }
    let instance = cluster.checker.running(&vm.id).ok_or_else(|| format!("no QEMU of {}", summary(vm)))?;
    if instance.host != host_of(vm) {
        return Err(format!("{instance:?} of {}", summary(vm)));
    }
    let last = cluster.checker.beats(&vm.id).into_iter().last();
    match last {
        Some(beat) if beat.at >= instance.first_seen.max(since) && beat.at.elapsed() < BEATS_WITHIN => Ok(()),
        last => Err(format!("{} does not beat: {last:?}", summary(vm))),
    }
}

/// The counter on the disk of a micro guest, which must not run.
fn disk_counter(pool: &Path, scratch: &Path, vm: &str) -> anyhow::Result<u64> {
    let dir = pool.join("disks").join(vm);
    let mut disks: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "qcow2"))
        .collect();
    ensure!(disks.len() == 1, "one disk, not {disks:?}");
    let (disk, raw) = (disks.remove(0), scratch.join(format!("{vm}.raw")));
    let output = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&disk).arg(&raw).output()?;
    ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(&raw)?;
    let counter = bytes.get(512..516).context("a disk of less than two sectors")?;
    Ok(u64::from(u32::from_le_bytes(counter.try_into()?)))
}
