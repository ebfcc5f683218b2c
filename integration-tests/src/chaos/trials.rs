//! One fault, again and again, on one cluster, with what it costs measured.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;
use uncloud_proto::v1::{Disk, FailoverPolicy, PowerState};

use super::{kind::Kind, report::Times, stage::Stage};
use crate::{Api, Options, api::incarnation_of, specs, wait_for};

/// Nothing takes longer than this, or it never happens.
const LIMIT: Duration = Duration::from_secs(60);
/// How long one try of a write may take: a controller that hangs must not hold up the next try.
const TRY: Duration = Duration::from_secs(1);
/// Between two tries at one controller.
const TRY_EVERY: Duration = Duration::from_millis(20);
/// How often one controller is sent a write while a fault stays.
const WRITE_EVERY: Duration = Duration::from_millis(200);
/// A fault of the control plane stays for longer than the fast lease: a host that finds no leader has lost its guests by then.
const STAYS: Duration = Duration::from_secs(7);
/// Writes are acknowledged as ever when the last one is as young as this.
const FLOWING: Duration = Duration::from_millis(700);
/// What the checker's interval and a busy machine may add to the end of a lease.
const SLACK: Duration = Duration::from_secs(1);

/// What a series of trials gave.
#[derive(Debug, Default)]
pub struct Trials {
    /// From the fault until the API says that a guest of the lost host runs again.
    pub running: Times,
    /// From the fault until that guest says its first line.
    pub spoke: Times,
    /// The longest time without an acknowledged write while the fault stayed.
    pub written: Times,
    /// What was not as promised.
    pub violations: Vec<String>,
}

/// What is promised of a kind, if trials of it make sense.
#[derive(Clone, Copy, Debug)]
enum Promise {
    /// Guests of the lost host run elsewhere within this time.
    RunningWithin(Duration),
    /// No guest is touched, and a write is acknowledged within this time.
    WrittenWithin(Duration),
}

fn promise(kind: Kind) -> Option<Promise> {
    match kind {
        Kind::HostLost => Some(Promise::RunningWithin(Duration::from_secs(10))),
        Kind::LeaderAndHostLost => Some(Promise::RunningWithin(Duration::from_secs(15))),
        Kind::FollowerLost
        | Kind::LeaderLost
        | Kind::LeaderHung
        | Kind::MemberLost
        | Kind::MemberHung
        | Kind::EtcdLeaderLost
        | Kind::EtcdLeaderHung
        | Kind::BothLeadersLost => Some(Promise::WrittenWithin(Duration::from_secs(5))),
        _ => None,
    }
}

/// The cluster and the guests of trials: at the default settings, without anything in between; the members of etcd with these
/// further flags.
///
/// # Errors
///
/// It does not come up.
pub async fn stage(etcd_flags: &[String]) -> anyhow::Result<Stage> {
    let mut options = Options::hosts(4).default_leases().controllers(3).etcd_members(3);
    options.etcd = etcd_flags.to_vec();
    let fast = FailoverPolicy::Fast;
    let mut stage = Stage::start(options, &[("one", fast), ("two", fast), ("three", fast)]).await?;
    stage.settle(LIMIT).await?;
    Ok(stage)
}

/// Lets a fault happen `n` times; waits each time for what is promised of it, and until all is well again.
///
/// # Errors
///
/// There is no promise for this kind, or the cluster does not recover.
pub async fn series(stage: &mut Stage, kind: Kind, n: usize, seed: u64) -> anyhow::Result<Trials> {
    let promise = promise(kind).with_context(|| format!("nothing is promised of {kind} that trials could measure"))?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut trials = Trials::default();
    for trial in 1..=n {
        let begun = Instant::now();
        match promise {
            Promise::RunningWithin(limit) => run_again(stage, kind, limit, &mut rng, &mut trials).await,
            Promise::WrittenWithin(limit) => write_again(stage, kind, limit, &mut rng, &mut trials).await,
        }
        .with_context(|| format!("trial {trial} of {n}"))?;
        eprintln!("trial {trial} of {n}: {:.1} s in all", begun.elapsed().as_secs_f64());
    }
    if !trials.violations.is_empty() {
        stage.cluster.keep_directory();
    }
    Ok(trials)
}

/// Guests of a lost host run elsewhere.
async fn run_again(
    stage: &mut Stage,
    kind: Kind,
    limit: Duration,
    rng: &mut StdRng,
    trials: &mut Trials,
) -> anyhow::Result<()> {
    let mut before = Vec::new();
    for guest in &stage.guests {
        before.push(stage.vm(&guest.id).await?);
    }
    let untouched = stage.instances();
    let mut fault = stage.break_it(kind, rng).await?;
    ensure!(!fault.may_kill.is_empty(), "no guest was on the host");
    for vm in before.iter().filter(|vm| fault.may_kill.contains(&vm.id)) {
        stage.cluster.api.wait_moved(vm, LIMIT).await?;
        let running = fault.began.elapsed();
        let spoke = wait_for("the guest's first line", LIMIT, async || {
            stage.spoke_after(&vm.id, fault.began).ok_or_else(|| format!("{} is silent", vm.name))
        });
        let spoke = spoke.await? - fault.began;
        eprintln!("  {}: {} Running after {running:.2?}, its first line after {spoke:.2?}", fault.what, vm.name);
        if running.max(spoke) > limit {
            trials.violations.push(format!("{kind}: {} ran again after {:.2?}", vm.name, running.max(spoke)));
        }
        trials.running.add(running);
        trials.spoke.add(spoke);
    }
    stage.mend(&mut fault).await?;
    stage.settle(LIMIT).await?;
    let after = stage.instances();
    for (id, old) in untouched.iter().filter(|(id, _)| !fault.may_kill.contains(*id)) {
        if after.get(id).is_none_or(|new| (new.pid, new.start) != (old.pid, old.start)) {
            trials.violations.push(format!("{}: {id} on {} was killed, too", fault.what, old.host));
        }
    }
    Ok(())
}

/// A part of the control plane is lost: writes go on, and no guest is touched.
async fn write_again(
    stage: &mut Stage,
    kind: Kind,
    limit: Duration,
    rng: &mut StdRng,
    trials: &mut Trials,
) -> anyhow::Result<()> {
    let before = stage.instances();
    let mut incarnations = Vec::new();
    for guest in &stage.guests {
        incarnations.push(incarnation_of(&stage.vm(&guest.id).await?));
    }
    let mut fault = stage.break_it(kind, rng).await?;
    let writes = Writes::start(stage);
    wait_for("writes are acknowledged", LIMIT, async || match writes.silence() {
        _ if fault.began.elapsed() < STAYS => Err("the fault has just begun".to_owned()),
        silence if silence < FLOWING => Ok(()),
        silence => Err(format!("none for {silence:.2?}")),
    })
    .await
    .with_context(|| fault.what.clone())?;
    let gap = writes.longest_gap(fault.began);
    eprintln!("  {}: {gap:.2?} without an acknowledged write", fault.what);
    trials.written.add(gap);
    if gap > limit {
        trials.violations.push(format!("{}: {gap:.2?} without an acknowledged write", fault.what));
    }
    stage.mend(&mut fault).await?;
    stage.settle(LIMIT).await?;
    let after = stage.instances();
    for (guest, incarnation) in stage.guests.iter().zip(incarnations) {
        let (old, new) = (before.get(&guest.id), after.get(&guest.id));
        if old.map(|i| (i.pid, i.start)) != new.map(|i| (i.pid, i.start)) {
            trials.violations.push(format!("{}: {} was touched: {old:?} became {new:?}", fault.what, guest.name));
        }
        let now = incarnation_of(&stage.vm(&guest.id).await?);
        if now != incarnation {
            trials.violations.push(format!("{}: {} is at incarnation {now} now", fault.what, guest.name));
        }
    }
    for vm in writes.finish().await {
        if let Err(error) = stage.vm(&vm).await {
            trials.violations.push(format!("{}: acknowledged, and then {error:#}", fault.what));
        }
        // If it is not deleted, it is in nobody's way.
        let _ = stage.cluster.api.delete(&vm).await;
    }
    Ok(())
}

/// Writes at each controller, all the time. Who does not lead refuses them, or passes them on.
struct Writes {
    written: Arc<Mutex<Vec<Written>>>,
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    began: Instant,
}

impl Writes {
    fn start(stage: &mut Stage) -> Self {
        let mut this =
            Self { written: Arc::default(), stop: Arc::default(), tasks: JoinSet::new(), began: Instant::now() };
        for controller in stage.cluster.all_controllers() {
            let (api, written, stop) = (controller.api().clone(), Arc::clone(&this.written), Arc::clone(&this.stop));
            this.tasks.spawn(async move {
                while !stop.load(Ordering::Acquire) {
                    if let Some(new) = try_write(&api).await {
                        written.lock().unwrap_or_else(PoisonError::into_inner).push(new);
                    }
                    tokio::time::sleep(WRITE_EVERY).await;
                }
            });
        }
        this
    }

    fn times(&self) -> Vec<Instant> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.iter().map(|w| w.at).collect()
    }

    /// For how long none has been acknowledged.
    fn silence(&self) -> Duration {
        self.times().into_iter().max().unwrap_or(self.began).elapsed()
    }

    /// The longest time without one between `from` and now.
    fn longest_gap(&self, from: Instant) -> Duration {
        let mut times = self.times();
        times.extend([from, Instant::now()]);
        times.sort();
        times.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default()
    }

    /// Ends; what was acknowledged.
    async fn finish(mut self) -> Vec<String> {
        self.stop.store(true, Ordering::Release);
        while self.tasks.join_next().await.is_some() {}
        let written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        written.into_iter().map(|w| w.vm).collect()
    }
}

/// Creates a VM that is not started.
async fn try_write(api: &Api) -> Option<Written> {
    let mut request = specs::micro(&format!("probe-{}", uuid::Uuid::new_v4()));
    specs::spec_mut(&mut request).disks = vec![Disk { size_bytes: 512, ..Disk::default() }];
    request.set_desired(PowerState::Stopped);
    match tokio::time::timeout(TRY, api.create(request)).await {
        Ok(Ok(vm)) => Some(Written { at: Instant::now(), vm: vm.id }),
        Ok(Err(_)) | Err(_) => None,
    }
}

/// A write that was acknowledged.
#[derive(Debug)]
pub struct Written {
    /// When.
    pub at: Instant,
    /// UUID of the VM that was created.
    pub vm: String,
}

/// Tries to create a VM, which is not started, at each of the controllers until one acknowledges it.
///
/// # Errors
///
/// None does within a minute.
pub async fn first_write(apis: &[Api]) -> anyhow::Result<Written> {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(apis.len());
    let mut tasks = JoinSet::new();
    for api in apis {
        let (api, sender) = (api.clone(), sender.clone());
        tasks.spawn(async move {
            loop {
                if let Some(written) = try_write(&api).await {
                    let _ = sender.send(written).await;
                    return;
                }
                tokio::time::sleep(TRY_EVERY).await;
            }
        });
    }
    let written = tokio::time::timeout(LIMIT, receiver.recv()).await.context("no write was acknowledged")?;
    written.context("a sender is left")
}

/// What happened when all controllers were away for longer than the short lease.
#[derive(Debug)]
pub struct AllDown {
    /// When the last QEMU under the short lease was gone.
    pub died: Duration,
    /// From the start of the controllers until a write was acknowledged.
    pub written: Duration,
    /// From the start of the controllers until all was well.
    pub settled: Duration,
}

/// Kills all controllers for longer than the short lease, `lease`: what lives under it is killed, and runs again when they
/// are back. Everything else is not touched.
///
/// # Errors
///
/// It is otherwise.
pub async fn all_controllers_down(stage: &mut Stage, lease: Duration) -> anyhow::Result<AllDown> {
    let before = stage.instances();
    ensure!(before.len() == stage.guests.len(), "every guest runs: {before:?}");
    let (fast, others): (Vec<_>, Vec<_>) =
        stage.guests.clone().into_iter().partition(|g| g.failover == FailoverPolicy::Fast);
    ensure!(!fast.is_empty() && !others.is_empty(), "guests of both kinds: {:?}", stage.guests);
    let began = Instant::now();
    stage.cluster.all_controllers().for_each(crate::controller::Controller::kill);
    let mut died = Duration::ZERO;
    for guest in &fast {
        let gone = stage.cluster.checker.wait_gone(&guest.id, lease + LIMIT).await?;
        died = died.max(gone.saturating_duration_since(began));
    }
    ensure!(died <= lease + SLACK, "P1: a guest lived for {died:?} without a leader; the lease is {lease:?}");
    // Long after the short lease they still count.
    let same = |stage: &Stage| -> anyhow::Result<()> {
        for guest in &others {
            let (old, new) = (&before[&guest.id], stage.cluster.checker.running(&guest.id));
            let new = new.with_context(|| format!("{} was killed, too", guest.name))?;
            ensure!((old.pid, old.start) == (new.pid, new.start), "{}: {old:?} became {new:?}", guest.name);
        }
        Ok(())
    };
    for guest in &others {
        stage.cluster.checker.wait_beats(&guest.id, 3, LIMIT).await?;
    }
    same(stage)?;
    let back = Instant::now();
    for controller in stage.cluster.all_controllers() {
        controller.spawn_again()?;
    }
    let apis: Vec<Api> = stage.cluster.all_controllers().map(|c| c.api().clone()).collect();
    let written = first_write(&apis).await?;
    stage.settle(LIMIT).await?;
    let settled = back.elapsed();
    same(stage)?;
    stage.vm(&written.vm).await.context("acknowledged and lost")?;
    let _ = stage.cluster.api.delete(&written.vm).await;
    Ok(AllDown { died, written: written.at - back, settled })
}
