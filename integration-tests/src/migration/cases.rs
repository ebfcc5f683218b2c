//! One thing after the other goes wrong in migrations of one guest, and each time it must end well.

use std::{
    convert::Infallible,
    fmt, fs, io,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use uncloud_proto::v1::{MigrationResult, Vm, VmPhase};

use super::{
    Load, begin, ended,
    faults::{FAULTS, Fault, MOMENTS, Moment, Sides, mend},
    loaded,
};
use crate::{
    Cluster, Options, Signal,
    api::{host_of, incarnation_of, summary},
    checker::Instance,
    specs,
    typed::Console,
    wait_for,
};

/// A guest that does not get there at [`RATE`] when it may stand still for a millisecond only ([`Sides::hold`]).
const LOAD: Load = Load { beat_ms: 100, dirty_kib: 16 << 10, kib_per_second: 64 << 10 };
/// What is sent at most in a second.
const RATE: u64 = 24 << 20;
/// All is well again long before that, or it never will be.
const WELL_LIMIT: Duration = Duration::from_secs(60);
/// A guest that nobody killed stands still for less: the target has 3 s to acknowledge it, a new leader leads within 4 s, and the
/// machine may be busy.
const STILL_LIMIT: Duration = Duration::from_secs(9);
/// One that was killed runs again within this: 10 s, the guest boots, and the machine may be busy.
const AWAY_LIMIT: Duration = Duration::from_secs(30);

/// Who has the disk of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Both hosts.
    Shared,
    /// Only its host: it is copied.
    Own,
}

/// What the disk has besides the counter, in MiB, if it is to be copied.
const ON_DISK: u32 = 40;

/// Something that goes wrong, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// What.
    pub fault: Fault,
    /// When.
    pub moment: Moment,
}

/// A migration as it should be.
const UNDISTURBED: Case = Case { fault: Fault::None, moment: Moment::Preparing };

impl Case {
    /// Every fault at every moment, if somebody has such a disk. If there is no fault, there is no moment for it but the one that is held.
    pub fn all() -> impl Iterator<Item = Self> {
        let all = FAULTS.into_iter().flat_map(|fault| MOMENTS.map(|moment| Self { fault, moment }));
        all.filter(|case| case.fault != Fault::None || !matches!(case.moment, Moment::Copying | Moment::Sending))
    }

    /// Whether it can be with such a disk.
    #[must_use]
    pub fn fits(self, disk: Disk) -> bool {
        disk == Disk::Own || self.moment != Moment::Copying
    }

    /// The case that is called this, as `source-agent-hung@sending`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|case| case.to_string() == name)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.fault, self.moment)
    }
}

/// What came of a case.
#[derive(Clone, Debug)]
pub struct Row {
    /// The case.
    pub case: Case,
    /// How the migration ended.
    pub result: MigrationResult,
    /// Why.
    pub reason: String,
    /// Whether the VM is where it was before.
    pub stayed: bool,
    /// Whether the guest was started anew.
    pub anew: bool,
    /// The longest time between two counts, from the beginning of the migration until all was well.
    pub silent: Duration,
}

impl fmt::Display for Row {
    /// A row of a Markdown table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let result = match (self.result, self.reason.as_str()) {
            (MigrationResult::Done, _) => "done".to_owned(),
            // QEMU's own words may be several lines.
            (_, reason) => format!("given up: {}", reason.replace('\n', " / ")),
        };
        let place = if self.stayed { "source" } else { "target" };
        let guest = if self.anew { "started anew from its disk" } else { "went on" };
        let Case { fault, moment } = self.case;
        write!(f, "| {fault} | {moment} | {result} | {place} | {guest} | {:.1} s |", self.silent.as_secs_f64())
    }
}

/// The head of a table of [`Row`]s.
pub const HEAD: &str = "| what | when | the migration | the VM is on its | the guest | longest time between two counts |\n\
                        |---|---|---|---|---|---|";

/// Two hosts in namespaces, two controllers, and a guest.
pub struct Trials {
    /// The cluster.
    pub cluster: Cluster,
    disk: Disk,
    vm: Vm,
    /// How many guests there were before. One whose QEMU has died is not used again: the next time it would wait before it is
    /// started again.
    used: u32,
}

impl Trials {
    /// Starts them.
    ///
    /// # Errors
    ///
    /// Something does not come up.
    pub async fn start(disk: Disk) -> anyhow::Result<Self> {
        let mut cluster = Options::hosts(2).default_leases().controllers(2).namespaces().linux().start().await?;
        for part in ["etcd", "leader", "history"] {
            // That a part of the control plane was away is worth an ERROR.
            cluster.allow_error(part);
        }
        let vm = guest(&mut cluster, disk, 0).await?;
        Ok(Self { cluster, disk, vm, used: 0 })
    }

    /// Tries one case.
    ///
    /// # Errors
    ///
    /// It did not end well.
    pub async fn run(&mut self, case: Case) -> anyhow::Result<Row> {
        self.one(case).await.with_context(|| case.to_string())
    }

    async fn one(&mut self, case: Case) -> anyhow::Result<Row> {
        let (cluster, id) = (&mut self.cluster, self.vm.id.clone());
        let source = host_of(&self.vm).to_owned();
        let target = if source == "host-1" { "host-2" } else { "host-1" }.to_owned();
        let last = cluster.checker.wait_beats(&id, 3, WELL_LIMIT).await?;
        let (boot, began) = (last.said.boot, last.at);
        let rate = if case == UNDISTURBED { 0 } else { RATE };
        let sides = Sides { vm: id.clone(), source: source.clone(), target };
        if case != UNDISTURBED {
            sides.hold(cluster).await?;
        }
        let incarnation = begin(&cluster.api, &id, &sides.target, rate).await?;

        let stopped = sides.wait(cluster, case.moment).await?;
        let repairs = sides.strike(cluster, case.fault).await?;
        if let Some(leader) = stopped
            && cluster.controller_at(leader).process().is_running()
        {
            cluster.controller_at(leader).signal(Signal::CONT)?;
        }
        let struck = Instant::now();
        let api = cluster.api.clone();
        let over = async || {
            let end = api.vm(&id).await.ok().and_then(|vm| vm.status?.last_migration);
            if end.is_some_and(|end| end.incarnation == incarnation) { Ok(()) } else { Err(String::new()) }
        };
        tokio::time::sleep(case.fault.stays()).await;
        if case.fault.stays_until_the_end() {
            // That it is mended before the end is no failure: then it goes on.
            drop(wait_for("it is over", Fault::MOST.saturating_sub(struck.elapsed()), over).await);
        }
        mend(cluster, repairs)?;

        let end = tokio::select! {
            over = ended(&api, &id, incarnation) => over?.1,
            never = hurry(&sides, cluster) => match never {},
        };
        cluster.wait_hosts().await?;
        let vm = well(cluster, &id).await?;
        wait_for("one disk is left", WELL_LIMIT, async || {
            only_disk(cluster, &id).map(drop).map_err(|e| format!("{e:#}"))
        })
        .await?;
        let beats = cluster.checker.beats(&id);
        let times: Vec<Instant> = beats.iter().map(|b| b.at).filter(|at| *at >= began).collect();
        let row = Row {
            case,
            result: end.result(),
            reason: end.reason,
            stayed: host_of(&vm) == source,
            anew: beats.last().is_none_or(|b| b.said.boot != boot),
            silent: times.windows(2).map(|w| w[1] - w[0]).max().context("it counts")?,
        };
        judge(&row)?;
        self.vm = vm;
        if row.anew {
            self.replace().await?;
        }
        Ok(row)
    }

    /// Another guest in place of this one, whose disk is looked at first.
    async fn replace(&mut self) -> anyhow::Result<()> {
        let (cluster, id) = (&self.cluster, self.vm.id.clone());
        cluster.api.stop(&id).await?;
        cluster.api.wait_phase(&id, VmPhase::Stopped, WELL_LIMIT).await?;
        disk_has_what_was_said(cluster, &id).await?;
        cluster.api.delete(&id).await?;
        cluster.api.wait_gone(&id, WELL_LIMIT).await?;
        self.used += 1;
        self.vm = guest(&mut self.cluster, self.disk, self.used).await?;
        Ok(())
    }

    /// Ends all; compares what is on the guest's disk with what it said, and lets the cluster judge the rest.
    ///
    /// # Errors
    ///
    /// Everything that was wrong.
    pub async fn finish(mut self) -> anyhow::Result<()> {
        for host in &mut self.cluster.hosts {
            host.cut_power();
        }
        let limit = Duration::from_secs(5);
        self.cluster.checker.wait_gone(&self.vm.id, limit).await?;
        disk_has_what_was_said(&self.cluster, &self.vm.id).await?;
        self.cluster.finish().await
    }
}

/// A guest that counts; what is to be copied is on its disk.
async fn guest(cluster: &mut Cluster, disk: Disk, number: u32) -> anyhow::Result<Vm> {
    let spec = loaded(&format!("traveller-{number}"), LOAD);
    match disk {
        Disk::Shared => cluster.run(spec).await,
        Disk::Own => {
            let spec = specs::with(spec, |s| {
                s.disks[0].pool = specs::LOCAL.into();
                s.disks[0].size_bytes = u64::from(ON_DISK + 8) << 20;
            });
            let vm = cluster.run(spec).await?;
            cluster.checker.wait_beats(&vm.id, 1, WELL_LIMIT).await?;
            let mut console = Console::open(cluster, &vm.id).await?;
            console.type_line(&format!("fill 1 {ON_DISK}")).await?;
            console.expect("FILLED").await?;
            Ok(vm)
        }
    }
}

/// Compares the counter on the disk of a guest that does not run with what it said last.
async fn disk_has_what_was_said(cluster: &Cluster, vm: &str) -> anyhow::Result<()> {
    // The kernel closes the files of a process, and with them QEMU's lock, a moment after its end begins.
    let on_disk = wait_for("its disk is free", Duration::from_secs(5), async || {
        counter_on_disk(cluster, vm).map_err(|e| format!("{e:#}"))
    })
    .await?;
    let said = cluster.checker.count(vm);
    ensure!(on_disk == said || on_disk == said + 1, "the guest said {said}, and its disk has {on_disk}");
    Ok(())
}

/// Lifts the source's limit, again and again: an agent that was away sets it when it begins to send.
async fn hurry(sides: &Sides, cluster: &mut Cluster) -> Infallible {
    loop {
        // There may be no QEMU at the source any more.
        drop(sides.hurry(cluster).await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What must hold however it ended.
fn judge(row: &Row) -> anyhow::Result<()> {
    let Case { fault, moment } = row.case;
    if row.anew && !fault.may_cost_the_guest(moment) {
        bail!("the guest was started anew: {row}");
    }
    let limit = if row.anew { AWAY_LIMIT } else { STILL_LIMIT };
    ensure!(row.silent <= limit, "it was silent for too long: {row}");
    ensure!(row.anew || row.stayed == (row.result != MigrationResult::Done), "it is on the wrong side: {row}");
    ensure!(fault != Fault::None || row.result == MigrationResult::Done, "nothing was wrong: {row}");
    Ok(())
}

/// Waits until the VM runs where the API says, in one QEMU, and counts.
async fn well(cluster: &Cluster, id: &str) -> anyhow::Result<Vm> {
    let runs = |vm: &Vm| vm.status.as_ref().is_some_and(|s| s.incarnation == incarnation_of(vm));
    wait_for("all is well", WELL_LIMIT, async || {
        let vm = cluster.api.wait_running(id, WELL_LIMIT).await.map_err(|e| format!("{e:#}"))?;
        let alive: Vec<Instance> = cluster.checker.instances(id).into_iter().filter(|i| i.alive).collect();
        let beat = cluster.checker.wait_beats(id, 3, Duration::from_secs(5)).await.map_err(|e| format!("{e:#}"))?;
        match &alive[..] {
            [one] if runs(&vm) && one.host == host_of(&vm) && beat.host == host_of(&vm) => Ok(vm),
            other => Err(format!("{other:?}, {beat:?}, {}", summary(&vm))),
        }
    })
    .await
}

/// The only disk of the VM, wherever it is.
fn only_disk(cluster: &Cluster, vm: &str) -> anyhow::Result<PathBuf> {
    let own = cluster.hosts.iter().map(|h| h.dir().join("pool"));
    let mut disks = Vec::new();
    for pool in own.chain([cluster.pool()]) {
        let dir = pool.join("disks").join(vm);
        match fs::read_dir(&dir) {
            Ok(files) => disks.extend(files.filter_map(|e| Some(e.ok()?.path()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("read {}", dir.display())),
        }
    }
    disks.retain(|p| p.extension().is_some_and(|e| e == "qcow2"));
    ensure!(disks.len() == 1, "one disk, not {disks:?}");
    Ok(disks.remove(0))
}

/// The counter on the disk of a Linux guest that does not run; the disk must be whole.
fn counter_on_disk(cluster: &Cluster, vm: &str) -> anyhow::Result<u64> {
    let (disk, raw) = (only_disk(cluster, vm)?, cluster.path().join("disk.raw"));
    let run = |command: &mut Command| -> anyhow::Result<()> {
        let output = command.output()?;
        ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    run(Command::new("qemu-img").arg("check").arg(&disk))?;
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&disk).arg(&raw))?;
    let bytes = fs::read(&raw)?;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]).into_owned();
    let count = text.split_whitespace().nth(1).context("a counter on the disk")?;
    count.parse().with_context(|| text.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_have_names_and_what_may_not_be_is_noticed() {
        for case in Case::all() {
            assert_eq!(Case::named(&case.to_string()), Some(case));
        }
        let case = Case::named("source-agent-hung@sending").unwrap();
        let row = Row {
            case,
            result: MigrationResult::GivenUp,
            reason: "x".into(),
            stayed: true,
            anew: false,
            silent: Duration::from_millis(300),
        };
        judge(&row).unwrap();
        assert!(judge(&Row { anew: true, ..row.clone() }).is_err());
        assert!(judge(&Row { stayed: false, ..row.clone() }).is_err());
        assert!(judge(&Row { silent: WELL_LIMIT, ..row.clone() }).is_err());
        let killed = Case { fault: Fault::SourceQemuKilled, ..case };
        judge(&Row { anew: true, stayed: false, case: killed, ..row }).unwrap();
    }
}
