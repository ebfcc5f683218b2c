//! A user who creates, stops, starts, migrates, deletes, cordons and drains all the time, and remembers what was acknowledged. (P2)
//!
//! What was acknowledged must be there ever after. What was refused is not. Where the outcome is not known, both are
//! allowed, also later: the request may still be on its way in a process that hangs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinHandle;
use tonic::{Code, Status};
use uncloud_client::{Client, Options, client::Reads};
use uncloud_proto::v1::{self, HostMode, PowerState, VmPhase};

use super::drains::{Drains, How};
use crate::{Cluster, api::phase_of, specs, wait_for};

/// VMs that exist at most; most of them are never started.
const MOST: usize = 25;
/// VMs that may run: guests are heavy.
const MOST_RUNNING: usize = 2;
/// How long a call may take, with everything that the client tries again.
const CALL: Duration = Duration::from_secs(5);
/// The longest pause between two calls.
const PAUSE_MS: u64 = 120;

/// What is known of a VM.
#[derive(Clone, Debug)]
struct Known {
    /// The desired states that it may have.
    power: BTreeSet<PowerState>,
    /// A deletion whose outcome is not known.
    may_be_gone: bool,
    /// It may run at all.
    runs: bool,
}

/// What the user was told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// How many calls were acknowledged.
    pub acknowledged: u64,
    /// When each acknowledged creation and deletion was sent, and when it was acknowledged. (What changes nothing, as the stop
    /// of a VM that is stopped, needs no etcd.)
    pub written: Vec<(Instant, Instant)>,
    /// Calls that were refused, by message.
    pub refused: BTreeMap<String, u64>,
    /// Calls whose outcome is not known, by message.
    pub unknown: BTreeMap<String, u64>,
    /// Migrations that were begun, and those that were called off.
    pub migrations: (u64, u64),
    /// Drains, of which some may stop guests.
    pub drains: Drains,
    /// Promises that were broken.
    pub violations: Vec<String>,
    vms: BTreeMap<String, Known>,
    deleted: BTreeSet<String>,
    modes: BTreeMap<String, BTreeSet<HostMode>>,
}

/// The user.
pub struct User {
    stop: Arc<AtomicBool>,
    told: Arc<Mutex<Told>>,
    task: JoinHandle<()>,
}

impl Told {
    /// When the first write was acknowledged that was sent after this moment.
    #[must_use]
    pub fn written_after(&self, moment: Instant) -> Option<Instant> {
        self.written.iter().find(|(sent, _)| *sent >= moment).map(|(_, acknowledged)| *acknowledged)
    }
}

/// Whether a call is a write to etcd.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Changes {
    Surely,
    /// Not if things are as desired already.
    Perhaps,
}

/// What became of a call.
enum Outcome<T> {
    Done(T),
    Refused,
    Unknown,
}

impl User {
    /// Begins with these hosts, which it may cordon or drain one at a time, and these VMs of others, which it may migrate.
    ///
    /// # Errors
    ///
    /// An endpoint is not an address.
    pub fn start(endpoints: &[String], hosts: Vec<String>, guests: Vec<String>, seed: u64) -> anyhow::Result<Self> {
        let client = Client::new(Options { endpoints: endpoints.to_vec(), timeout: CALL, reads: Reads::default() })?;
        let (stop, told) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Told>>::default());
        let mut work = Work {
            client,
            hosts,
            guests,
            rng: StdRng::seed_from_u64(seed),
            told: Arc::clone(&told),
            names: 0,
            cordoned: None,
        };
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Acquire) {
                work.act().await;
                let pause = work.rng.random_range(1..=PAUSE_MS);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            // Nothing is left cordoned, if it can be helped.
            work.uncordon().await;
        });
        Ok(Self { stop, told, task })
    }

    /// The drains so far.
    #[must_use]
    pub fn drains(&self) -> Drains {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).drains.clone()
    }

    /// Ends; checks that everything acknowledged is so. The cluster must be well.
    ///
    /// # Errors
    ///
    /// The user itself failed. What was broken is in [`Told::violations`].
    pub async fn finish(self, cluster: &Cluster) -> anyhow::Result<Told> {
        self.stop.store(true, Ordering::Release);
        self.task.await.context("the user")?;
        let mut told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        let mut broken = Vec::new();
        for (id, known) in &told.vms {
            if let Err(problem) = still_there(cluster, id, known).await {
                broken.push(problem);
            }
        }
        for id in &told.deleted {
            if let Err(error) = cluster.api.wait_gone(id, Duration::from_secs(30)).await {
                broken.push(format!("a deletion was acknowledged, and the VM is there: {error:#}"));
            }
            let key = format!("/uncloud/v1/vms/{id}");
            if cluster.etcd.as_ref().context("an etcd")?.get(&key).await?.is_some() {
                broken.push(format!("a deletion was acknowledged, and {key} is there"));
            }
        }
        for host in cluster.api.list_hosts().await? {
            if let Some(allowed) = told.modes.get(&host.name)
                && !allowed.contains(&host.mode())
            {
                broken.push(format!("{} is {:?}, and acknowledged was {allowed:?}", host.name, host.mode()));
            }
        }
        told.violations.extend(broken);
        Ok(told)
    }
}

/// Whether a VM is what was acknowledged, by the API, by etcd and by the process table.
async fn still_there(cluster: &Cluster, id: &str, known: &Known) -> Result<(), String> {
    let key = format!("/uncloud/v1/vms/{id}");
    let stored = cluster.etcd.as_ref().ok_or("no etcd")?.get(&key).await.map_err(|e| format!("{e:#}"))?;
    let vm = match cluster.api.vm(id).await {
        Ok(vm) => vm,
        Err(status) if status.code() == Code::NotFound && known.may_be_gone => return Ok(()),
        Err(status) => return Err(format!("acknowledged and lost: VM {id}: {status}; in etcd: {stored:?}")),
    };
    if stored.is_none() && !known.may_be_gone {
        return Err(format!("acknowledged and lost: {key} is not in etcd"));
    }
    if phase_of(&vm) == VmPhase::Deleting && known.may_be_gone {
        return Ok(());
    }
    if !known.power.contains(&vm.desired()) {
        return Err(format!("VM {id} should be {:?}, and acknowledged was {:?}", vm.desired(), known.power));
    }
    let should = vm.desired() == PowerState::Running;
    let limit = Duration::from_secs(45);
    wait_for(&format!("VM {id} is as desired, {:?}", vm.desired()), limit, async || {
        let runs = cluster.checker.running(id).is_some();
        if runs == should { Ok(()) } else { Err(format!("QEMU {:?}", cluster.checker.running(id))) }
    })
    .await
    .map_err(|e| format!("{e:#}"))
}

struct Work {
    client: Client,
    hosts: Vec<String>,
    guests: Vec<String>,
    rng: StdRng,
    told: Arc<Mutex<Told>>,
    names: u64,
    cordoned: Option<String>,
}

impl Work {
    fn told<T>(&self, change: impl FnOnce(&mut Told) -> T) -> T {
        change(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn act(&mut self) {
        let (all, running): (Vec<String>, usize) =
            self.told(|t| (t.vms.keys().cloned().collect(), t.vms.values().filter(|k| k.runs).count()));
        let some = (!all.is_empty()).then(|| all[self.rng.random_range(0..all.len())].clone());
        match (self.rng.random_range(0..100), some) {
            (0..35, _) if all.len() < MOST => self.create(running < MOST_RUNNING).await,
            (35..40, _) => self.migrate().await,
            (0..50, Some(vm)) => self.look(&vm).await,
            (50..70, Some(vm)) => self.turn(&vm).await,
            (70..90, Some(vm)) => self.delete(&vm).await,
            // A drain has some seconds: some are called off with VMs on their way, some are done by then.
            (90..92, _) if self.cordoned.is_some() => self.uncordon().await,
            (90..100, _) if self.cordoned.is_some() => {}
            (90..93, _) => self.cordon().await,
            (93..97, _) => self.drain(How::LiveOnly).await,
            (97..100, _) => self.drain(How::StopAndMove).await,
            _ => self.create(false).await,
        }
    }

    /// Sends one write and notes what became of it.
    async fn write<T>(&self, changes: Changes, call: impl Future<Output = Result<T, Status>>) -> Outcome<T> {
        let sent = Instant::now();
        match call.await {
            Ok(answer) => {
                self.told(|t| {
                    t.acknowledged += 1;
                    if changes == Changes::Surely {
                        t.written.push((sent, Instant::now()));
                    }
                });
                Outcome::Done(answer)
            }
            Err(status) => match status.code() {
                Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::FailedPrecondition
                | Code::ResourceExhausted => {
                    self.told(|t| *t.refused.entry(kind_of(&status)).or_default() += 1);
                    if status.code() == Code::NotFound {
                        self.told(|t| t.violations.push(format!("acknowledged and lost: {status}")));
                    }
                    Outcome::Refused
                }
                _ => {
                    self.told(|t| *t.unknown.entry(kind_of(&status)).or_default() += 1);
                    Outcome::Unknown
                }
            },
        }
    }

    async fn create(&mut self, may_run: bool) {
        self.names += 1;
        let runs = may_run && self.rng.random_bool(0.5);
        let mut request = specs::micro(&format!("user-{}", self.names));
        specs::spec_mut(&mut request).stop_grace_seconds = 2;
        let power = if runs { PowerState::Running } else { PowerState::Stopped };
        request.set_desired(power);
        // Unknown: nobody knows its id, so nothing can be said about it. The client has tried again for long.
        if let Outcome::Done(answer) = self.write(Changes::Surely, self.client.create_vm(request)).await
            && let Some(vm) = answer.vm
        {
            let known = Known { power: [power].into(), may_be_gone: false, runs };
            self.told(|t| t.vms.insert(vm.id, known));
        }
    }

    /// Reads a VM: what was acknowledged before is seen.
    async fn look(&self, id: &str) {
        let request = v1::GetVmRequest { vm: id.to_owned(), owner: String::new() };
        let Some(known) = self.told(|t| t.vms.get(id).cloned()) else { return };
        let problem = match self.client.get_vm(request).await {
            Ok(answer) => match answer.vm {
                Some(vm) if known.power.contains(&vm.desired()) => None,
                // A deletion that was on its way.
                Some(vm) if known.may_be_gone && phase_of(&vm) == VmPhase::Deleting => None,
                Some(vm) => Some(format!("read {id}: {:?}, and acknowledged was {:?}", vm.desired(), known.power)),
                None => Some(format!("read {id}: an answer without a VM")),
            },
            Err(status) if status.code() == Code::NotFound && !known.may_be_gone => {
                Some(format!("acknowledged and lost: read {id}: {status}"))
            }
            Err(_) => None,
        };
        self.told(|t| t.violations.extend(problem));
    }

    /// Starts or stops a VM.
    async fn turn(&mut self, id: &str) {
        let Some(known) = self.told(|t| t.vms.get(id).cloned()) else { return };
        // Only those that may run are started.
        let power = if known.runs && self.rng.random_bool(0.6) { PowerState::Running } else { PowerState::Stopped };
        let (vm, owner) = (id.to_owned(), String::new());
        let call = async {
            match power {
                PowerState::Running => self.client.start_vm(v1::StartVmRequest { vm, owner }).await.map(drop),
                PowerState::Stopped | PowerState::Unspecified => {
                    self.client.stop_vm(v1::StopVmRequest { vm, ..Default::default() }).await.map(drop)
                }
            }
        };
        if known.may_be_gone {
            return;
        }
        let outcome = self.write(Changes::Perhaps, call).await;
        self.told(|t| {
            let Some(known) = t.vms.get_mut(id) else { return };
            match outcome {
                // An earlier call whose outcome is not known may still arrive.
                Outcome::Done(()) if known.power.len() == 1 => known.power = [power].into(),
                Outcome::Done(()) | Outcome::Unknown => {
                    known.power.insert(power);
                }
                Outcome::Refused => {}
            }
        });
    }

    /// Migrates a VM to wherever it likes to go, and calls that off now and then.
    async fn migrate(&mut self) {
        let own: Vec<String> =
            self.told(|t| t.vms.iter().filter(|(_, k)| k.runs && !k.may_be_gone).map(|(id, _)| id.clone()).collect());
        let all: Vec<String> = self.guests.iter().cloned().chain(own).collect();
        if all.is_empty() {
            return;
        }
        let vm = all[self.rng.random_range(0..all.len())].clone();
        // As slowly as it can be said, so that it takes most of a second.
        let bytes_per_second = if self.rng.random_bool(0.5) { 1 << 20 } else { 0 };
        let request = v1::MigrateVmRequest { vm: vm.clone(), bytes_per_second, ..Default::default() };
        if !matches!(self.write(Changes::Surely, self.client.migrate_vm(request)).await, Outcome::Done(_)) {
            return;
        }
        self.told(|t| t.migrations.0 += 1);
        if self.rng.random_bool(0.3) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..600))).await;
            let call = self.client.cancel_migration(v1::CancelMigrationRequest { vm, ..Default::default() });
            if let Outcome::Done(_) = self.write(Changes::Surely, call).await {
                self.told(|t| t.migrations.1 += 1);
            }
        }
    }

    async fn delete(&mut self, id: &str) {
        let call = self.client.delete_vm(v1::DeleteVmRequest { vm: id.to_owned(), owner: String::new() });
        if self.told(|t| t.vms.get(id).is_none_or(|k| k.may_be_gone)) {
            return;
        }
        let outcome = self.write(Changes::Surely, call).await;
        self.told(|t| match outcome {
            Outcome::Done(_) => {
                t.vms.remove(id);
                t.deleted.insert(id.to_owned());
            }
            Outcome::Unknown => {
                if let Some(known) = t.vms.get_mut(id) {
                    known.may_be_gone = true;
                }
            }
            Outcome::Refused => {}
        });
    }

    async fn cordon(&mut self) {
        let host = self.hosts[self.rng.random_range(0..self.hosts.len())].clone();
        let request = v1::CordonHostRequest { host: host.clone(), reason: "the user said so".into() };
        let outcome = self.write(Changes::Perhaps, self.client.cordon_host(request)).await;
        self.mode(&host, HostMode::Cordoned, &outcome);
        self.cordoned = Some(host);
    }

    /// Empties a host. That goes on after the stream with its progress is closed.
    async fn drain(&mut self, how: How) {
        let host = self.hosts[self.rng.random_range(0..self.hosts.len())].clone();
        let request = v1::DrainHostRequest {
            host: host.clone(),
            reason: "the user said so".into(),
            stop_and_move: how == How::StopAndMove,
            watch_only: false,
            copy_disks: self.rng.random_bool(0.5),
        };
        self.told(|t| t.drains.asked(&host, how, Instant::now()));
        let outcome = self.write(Changes::Perhaps, self.client.drain_host(request)).await;
        self.told(|t| match outcome {
            Outcome::Done(_) => {}
            Outcome::Refused => t.drains.refused(),
            Outcome::Unknown => t.drains.unknown(),
        });
        self.mode(&host, HostMode::Draining, &outcome);
        self.cordoned = Some(host);
    }

    async fn uncordon(&mut self) {
        let Some(host) = self.cordoned.clone() else { return };
        let outcome = self
            .write(Changes::Perhaps, self.client.uncordon_host(v1::UncordonHostRequest { host: host.clone() }))
            .await;
        self.mode(&host, HostMode::Active, &outcome);
        if matches!(outcome, Outcome::Done(_)) {
            self.told(|t| t.drains.uncordoned(&host, Instant::now()));
            self.cordoned = None;
        }
    }

    fn mode<T>(&self, host: &str, mode: HostMode, outcome: &Outcome<T>) {
        self.told(|t| {
            let known = t.modes.entry(host.to_owned()).or_insert_with(|| [HostMode::Active].into());
            match outcome {
                Outcome::Done(_) if known.len() == 1 => *known = [mode].into(),
                Outcome::Done(_) | Outcome::Unknown => {
                    known.insert(mode);
                }
                Outcome::Refused => {}
            }
        });
    }
}

/// A status without what differs each time, to be counted.
fn kind_of(status: &Status) -> String {
    let words = status.message().split_whitespace().filter(|w| !w.contains(|c: char| c.is_ascii_digit()));
    format!("{:?}: {}", status.code(), words.take(14).collect::<Vec<_>>().join(" "))
}
