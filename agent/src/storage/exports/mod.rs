//! Serves the disks of a pool over the network: for each VM to the one incarnation that the leader has named, and to the next one
//! while it migrates.
//!
//! ```text
//!  ServeDisks ──▶ want ──┐                    ┌── disks are made (storage), beside everything else
//!  DELETE ──▶ withdraw ──┴▶ goals ──▶ pass ───┤
//!                                             └── revoke, look, add, look (daemon) ──▶ served ──▶ ServedDisks
//! ```
//!
//! What is done to files that nobody is served (a disk is put back, or deleted) is done beside that by [`chores`].
//!
//! One task tells the daemon everything, one step after the other; [`plan`] decides the steps. What is served is in no file:
//! after a restart of the agent the daemon knows it, after one of the daemon the leader's newest word in memory, and after both
//! nothing is served before the leader speaks again. So an incarnation that is over never comes back from an old record (N2).
//!
//! # Safety argument (docs/fencing.md)
//!
//! * **N2** Of each VM only the newest incarnation that was asked for is wanted ([`Exports::want`]); the session's gate lets no
//!   message of an older term through, and a leader's messages come in their order.
//! * **N3** What is told as served was seen in the daemon after the newest order was taken in.

mod chores;
pub mod daemon;
pub mod options;
pub mod plan;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::{self, JoinSet},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uncloud_proto::ids::{Incarnation, VmId};

use self::{
    chores::Chores,
    daemon::Daemon,
    plan::{Disk, Goal, Have},
};
use super::Storage;
use crate::vm::{
    desired::{Desired, DiskState, Format},
    disks::Done,
    runner::chain,
};

/// The daemon is looked at so often, also when nothing has been heard of its end.
const PERIOD: Duration = Duration::from_secs(5);
/// What failed is tried again after this.
const AGAIN: Duration = Duration::from_secs(3);
/// What did not grow is tried again after this: each time whoever uses the disk is cut off for a moment.
const GROW_AGAIN: Duration = Duration::from_secs(60);
/// So many VMs' disks are made at once; each may wait for an image.
const MAKES_AT_ONCE: usize = 16;
/// How long a withdrawal may take until the deletion that waits for it is tried again later.
const WITHDRAW_LIMIT: Duration = Duration::from_secs(10);

/// How far a VM's disks are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// To which incarnation.
    pub incarnation: Incarnation,
    /// To the one on the target of its migration, too.
    pub next: Option<Incarnation>,
    /// Why they are not. Empty: they are, and to no other.
    pub problem: String,
    /// What was done to them of what is ordered.
    pub done: Done,
    /// Why something was not. Empty: nothing is known to be wrong.
    pub trouble: String,
}

/// What is wanted for one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Want {
    Serve(Box<Desired>),
    /// Its disks are about to be deleted.
    Nothing {
        incarnation: Incarnation,
        /// The block nodes that the daemon has for them.
        nodes: Vec<String>,
    },
}

impl Want {
    const fn incarnation(&self) -> Incarnation {
        match self {
            Self::Serve(desired) => desired.incarnation,
            Self::Nothing { incarnation, .. } => *incarnation,
        }
    }
}

/// What this host serves. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exports {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    wants: Mutex<BTreeMap<VmId, Want>>,
    wake: Arc<Notify>,
    served: watch::Sender<BTreeMap<VmId, Served>>,
    /// VMs of which nothing is exported, as wanted.
    withdrawn: watch::Sender<BTreeMap<VmId, Incarnation>>,
}

impl Default for Exports {
    fn default() -> Self {
        let shared = Shared {
            wants: Mutex::default(),
            wake: Arc::default(),
            served: watch::Sender::default(),
            withdrawn: watch::Sender::default(),
        };
        Self { shared: Arc::new(shared) }
    }
}

/// To whom disks are to be served.
#[derive(Clone, Copy, Debug)]
struct Order {
    incarnation: Incarnation,
    next: Option<Incarnation>,
}

impl Order {
    const fn of(desired: &Desired) -> Self {
        Self { incarnation: desired.incarnation, next: desired.next }
    }
}

/// The disks of a VM, as far as they have been made.
#[derive(Debug)]
struct Made {
    /// What they were made for.
    desired: Box<Desired>,
    /// The newest order for which they count.
    now: Order,
    disks: Result<Vec<Disk>, String>,
    at: Instant,
}

/// Disks that are being made.
#[derive(Debug, Default)]
struct Making {
    tasks: JoinSet<(VmId, Made)>,
    vms: BTreeMap<VmId, Task>,
}

#[derive(Debug)]
struct Task {
    id: task::Id,
    desired: Box<Desired>,
    /// Gives it up.
    cancel: CancellationToken,
}

impl Making {
    /// Gives up what nobody waits for any more: a copy may take long.
    fn give_up(&self, wants: &BTreeMap<VmId, Want>) {
        let unwanted = self.vms.iter().filter(|(vm, _)| !matches!(wants.get(vm), Some(Want::Serve(_))));
        unwanted.for_each(|(_, task)| task.cancel.cancel());
    }

    /// Waits for the next to end. Cancel safe. `None`: there are none.
    async fn ended(&mut self) -> Option<(VmId, Made)> {
        match self.tasks.join_next().await? {
            Ok((vm, made)) => {
                self.vms.remove(&vm);
                Some((vm, made))
            }
            Err(problem) => {
                error!("a task that makes disks failed: {problem}");
                let vm = self.vms.iter().find_map(|(&vm, task)| (task.id == problem.id()).then_some(vm))?;
                let desired = self.vms.remove(&vm)?.desired;
                let disks = Err("the task that makes them failed; its host's log says why".to_owned());
                Some((vm, Made { now: Order::of(&desired), desired, disks, at: Instant::now() }))
            }
        }
    }
}

impl Exports {
    fn wants(&self) -> MutexGuard<'_, BTreeMap<VmId, Want>> {
        self.shared.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The leader wants a VM's disks served to this incarnation. An older one than the newest is not obeyed (N2).
    pub fn want(&self, vm: VmId, desired: Desired) {
        let mut wants = self.wants();
        if let Some(newest) = wants.get(&vm).map(Want::incarnation)
            && desired.incarnation < newest
        {
            return warn!(%vm, incarnation = %desired.incarnation, %newest, "an order to serve disks is ignored: it is old");
        }
        wants.insert(vm, Want::Serve(Box::new(desired)));
        drop(wants);
        self.shared.wake.notify_one();
    }

    /// What is served.
    #[must_use]
    pub fn served(&self) -> watch::Receiver<BTreeMap<VmId, Served>> {
        self.shared.served.subscribe()
    }

    /// Serves a VM's disks to nobody any more, and closes them, because they are to be deleted.
    ///
    /// # Errors
    ///
    /// That could not be done in time, in words.
    pub async fn withdraw(&self, vm: VmId, incarnation: Incarnation, nodes: Vec<String>) -> Result<(), String> {
        let mut withdrawn = self.shared.withdrawn.subscribe();
        self.wants().insert(vm, Want::Nothing { incarnation, nodes });
        self.shared.wake.notify_one();
        let done = withdrawn.wait_for(|all| all.get(&vm) == Some(&incarnation));
        match time::timeout(WITHDRAW_LIMIT, done).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err("its disks are still served over the network; this is tried again".to_owned()),
        }
    }

    /// A VM's disks are deleted: nothing is known of it any more.
    pub fn forget(&self, vm: VmId) {
        self.wants().remove(&vm);
        self.shared.withdrawn.send_if_modified(|all| all.remove(&vm).is_some());
        self.shared.served.send_if_modified(|all| all.remove(&vm).is_some());
    }

    /// Does it until `cancel` fires. The daemon goes on.
    pub async fn run(self, storage: Arc<Storage>, options: daemon::Options, cancel: CancellationToken) {
        let mut daemon = Daemon::new(options, Arc::clone(&self.shared.wake));
        let mut made: BTreeMap<VmId, Made> = BTreeMap::new();
        let mut making = Making::default();
        let mut chores = Chores::default();
        let mut trouble = String::new();
        let mut stuck = BTreeMap::new();
        loop {
            let wants = self.wants().clone();
            made.retain(|vm, _| wants.contains_key(vm));
            chores.retain(|vm| wants.contains_key(&vm));
            making.give_up(&wants);
            self.make(&wants, &mut made, &mut making, &storage);
            match self.pass(&mut daemon, &wants, (&made, &making), &mut stuck, (&mut chores, &storage)).await {
                Ok(()) if trouble.is_empty() => {}
                Ok(()) => {
                    info!("disks are served again");
                    trouble.clear();
                }
                Err(problem) => {
                    let words = chain(&problem);
                    self.tell(&wants, |_, _| Err(words.clone()), |_, _| (Done::default(), String::new()));
                    if words != trouble {
                        error!("disks are not served: {words}");
                        trouble = words;
                    }
                }
            }
            let pause = if trouble.is_empty() { PERIOD } else { AGAIN };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some((vm, done)) = making.ended() => drop(made.insert(vm, done)),
                Some(()) = chores.finished() => {}
                () = self.shared.wake.notified() => {}
                () = time::sleep(pause) => {}
            }
        }
    }

    /// Begins to make the disks of VMs that are to be served to a new incarnation, or that failed a while ago.
    fn make(
        &self,
        wants: &BTreeMap<VmId, Want>,
        made: &mut BTreeMap<VmId, Made>,
        making: &mut Making,
        storage: &Arc<Storage>,
    ) {
        for (&vm, want) in wants {
            let Want::Serve(desired) = want else { continue };
            let due = match made.get_mut(&vm) {
                Some(made) if made.are_of(desired) => {
                    made.now = Order::of(desired);
                    made.disks.is_err() && made.at.elapsed() >= AGAIN
                }
                Some(_) | None => true,
            };
            if !due || making.vms.len() >= MAKES_AT_ONCE || making.vms.contains_key(&vm) {
                continue;
            }
            let cancel = CancellationToken::new();
            let (given_up, order, storage) = (cancel.clone(), desired.clone(), Arc::clone(storage));
            let handle = making.tasks.spawn(async move {
                let disks = tokio::select! {
                    biased;
                    () = given_up.cancelled() => Err("it is not wanted any more".to_owned()),
                    made = storage.serve(vm, &order) => made.map_err(|e| e.reason()),
                };
                if let Err(problem) = &disks {
                    warn!(%vm, "its disks cannot be served: {problem}");
                }
                (vm, Made { now: Order::of(&order), desired: order, disks, at: Instant::now() })
            });
            making.vms.insert(vm, Task { id: handle.id(), desired: desired.clone(), cancel });
        }
    }

    /// Brings the daemon to what is wanted, as far as that can be done now, and says what is served.
    async fn pass(
        &self,
        daemon: &mut Daemon,
        wants: &BTreeMap<VmId, Want>,
        (made, making): (&BTreeMap<VmId, Made>, &Making),
        stuck: &mut Stuck,
        (chores, storage): (&mut Chores, &Arc<Storage>),
    ) -> Result<(), daemon::Error> {
        let goal = |(&vm, want): (&VmId, &Want)| (vm, goal(want, made.get(&vm), chores.is_putting_back(vm)));
        let goals: BTreeMap<VmId, Goal> = wants.iter().map(goal).collect();
        let mut have = daemon.have().await?;
        let revoked = plan::revocations(&have, &goals);
        if !revoked.is_empty() {
            for name in &revoked {
                info!(vm = %name.vm, incarnation = %name.incarnation, disk = name.disk, "no longer served");
            }
            have = daemon.revoke(&revoked).await?;
        }
        let mut problems: BTreeMap<VmId, String> = BTreeMap::new();
        // N5: those of a migration's target when those of its source are there. What is open only now may be too small, and is made anew.
        for _ in 0..3 {
            if grow(daemon, &have, &goals, stuck, &mut problems).await? {
                have = daemon.have().await?;
            }
            let additions = plan::additions(&have, &goals);
            if additions.is_empty() {
                break;
            }
            for (name, disk) in additions {
                match daemon.add(&name, &disk).await {
                    Ok(()) => info!(vm = %name.vm, incarnation = %name.incarnation, disk = name.disk, "served"),
                    Err(error @ daemon::Error::Qmp(_)) => drop(problems.insert(name.vm, chain(&error))),
                    Err(error) => return Err(error),
                }
            }
            have = daemon.have().await?;
        }
        for (&vm, want) in wants {
            let Want::Nothing { nodes, .. } = want else { continue };
            for node in nodes {
                match daemon.close(node).await {
                    Ok(()) => {}
                    Err(error @ daemon::Error::Qmp(_)) => drop(problems.insert(vm, chain(&error))),
                    Err(error) => return Err(error),
                }
            }
        }
        let mut with_snapshots = BTreeSet::new();
        for (&vm, want) in wants {
            let (Want::Serve(desired), Some(goal)) = (want, goals.get(&vm)) else { continue };
            if !plan::reached(&have, vm, goal) {
                continue;
            }
            let done = match goal {
                Goal::Serve { next: None, disks, .. } if chores.may_try(vm) => {
                    snapshots(daemon, desired, disks).await.map(|taken| taken.then_some(vm))
                }
                Goal::Serve { .. } | Goal::Rest { .. } | Goal::Nothing => Ok(None),
            };
            match done {
                Ok(None) => {}
                Ok(Some(vm)) => {
                    chores.note_well(vm);
                    with_snapshots.insert(vm);
                }
                Err(error @ daemon::Error::Qmp(_)) => {
                    chores.note_failed(vm, format!("its snapshots: {}", chain(&error)));
                    continue;
                }
                Err(error) => return Err(error),
            }
            // R4, D5: what is done now, nobody is served.
            let Some(chore) = chores.due(vm, desired) else { continue };
            match close(daemon, closed(vm, desired, goal, storage)).await {
                Ok(()) => chores.begin(vm, chore, desired, storage),
                Err(error @ daemon::Error::Qmp(_)) => chores.note_failed(vm, chain(&error)),
                Err(error) => return Err(error),
            }
        }
        // N3: what counts is what the daemon says now.
        let have = daemon.have().await?;
        let state = |vm, want: &Want| match want {
            // What is being done could leave a file behind that is deleted now.
            Want::Nothing { .. } if making.vms.contains_key(&vm) || chores.is_busy(vm) => {
                Err("its disks are still being made or changed".to_owned())
            }
            Want::Nothing { .. } | Want::Serve(_) => said(vm, want, made.get(&vm), &goals, &have, &problems),
        };
        self.tell(wants, state, |vm, desired| {
            let served = goals.get(&vm).is_some_and(|goal| plan::reached(&have, vm, goal));
            (chores.done(vm, desired, served, with_snapshots.contains(&vm)), chores.trouble(vm))
        });
        Ok(())
    }

    /// Tells what is served, of the orders that were taken in before.
    fn tell(
        &self,
        wants: &BTreeMap<VmId, Want>,
        state: impl Fn(VmId, &Want) -> Result<(), String>,
        done: impl Fn(VmId, &Desired) -> (Done, String),
    ) {
        let mut served = BTreeMap::new();
        let mut withdrawn = BTreeMap::new();
        for (&vm, want) in wants {
            let state = state(vm, want);
            match want {
                Want::Serve(desired) => {
                    let problem = state.err().unwrap_or_default();
                    let Order { incarnation, next } = Order::of(desired);
                    let (done, trouble) = done(vm, desired);
                    served.insert(vm, Served { incarnation, next, problem, done, trouble });
                }
                Want::Nothing { incarnation, .. } if state.is_ok() => drop(withdrawn.insert(vm, *incarnation)),
                Want::Nothing { .. } => {}
            }
        }
        let news = |old: &mut BTreeMap<VmId, Served>| {
            let changed = *old != served;
            *old = served;
            changed
        };
        self.shared.served.send_if_modified(news);
        self.shared.withdrawn.send_replace(withdrawn);
    }
}

/// Disks that did not grow, by their nodes: why, and when that was.
type Stuck = BTreeMap<String, (String, Instant)>;

/// Makes disks larger that are too small. Whoever uses one is cut off for that moment, and connects again. Returns whether exports have
/// been taken away for that; they are to be made anew.
async fn grow(
    daemon: &mut Daemon,
    have: &Have,
    goals: &BTreeMap<VmId, Goal>,
    stuck: &mut Stuck,
    problems: &mut BTreeMap<VmId, String>,
) -> Result<bool, daemon::Error> {
    stuck.retain(|_, (_, since)| since.elapsed() < GROW_AGAIN);
    let mut taken = false;
    for (name, disk) in plan::outgrown(have, &daemon.sizes().await?, goals) {
        if let Some((why, _)) = stuck.get(&disk.node) {
            problems.insert(name.vm, why.clone());
            continue;
        }
        taken = true;
        daemon.revoke(std::slice::from_ref(&name)).await?;
        match daemon.grow(&disk).await {
            Ok(()) => info!(vm = %name.vm, disk = name.disk, size = disk.size_bytes, "the disk has grown"),
            Err(error @ daemon::Error::Qmp(_)) => {
                let why = format!("disk {} does not grow: {}", name.disk, chain(&error));
                warn!(vm = %name.vm, "{why}");
                problems.insert(name.vm, why.clone());
                stuck.insert(disk.node, (why, Instant::now()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

/// Has a VM's disks have the snapshots that are ordered. Returns whether there are any.
async fn snapshots(daemon: &mut Daemon, desired: &Desired, disks: &[Disk]) -> Result<bool, daemon::Error> {
    let orders = &desired.orders.snapshots;
    if orders.is_empty() {
        return Ok(false);
    }
    // The variables of UEFI are not part of a snapshot.
    let disks = disks.iter().filter(|d| d.format == Format::Qcow2);
    let nodes: Vec<&str> = disks.map(|d| d.node.as_str()).collect();
    daemon.snapshots(&nodes, orders).await.map(|()| true)
}

/// The nodes that must be closed for what is to be done to a VM whose goal is reached: all, or those of disks that go.
fn closed(vm: VmId, desired: &Desired, goal: &Goal, storage: &Storage) -> Vec<String> {
    match goal {
        Goal::Rest { .. } | Goal::Nothing => storage.exported_nodes(vm, desired),
        Goal::Serve { gone, .. } => {
            gone.iter().map(|disk| super::plan::node_of(vm, disk, desired.disk_generation)).collect()
        }
    }
}

async fn close(daemon: &mut Daemon, nodes: Vec<String>) -> Result<(), daemon::Error> {
    for node in nodes {
        daemon.close(&node).await?;
    }
    Ok(())
}

/// What the daemon should have of one VM.
fn goal(want: &Want, made: Option<&Made>, putting_back: bool) -> Goal {
    match want {
        Want::Nothing { .. } => Goal::Nothing,
        // R4
        Want::Serve(desired) if putting_back || desired.orders.revert.is_some() => {
            Goal::Rest { incarnation: desired.incarnation }
        }
        Want::Serve(desired) => {
            let disks = made.filter(|m| m.are_of(desired)).and_then(|m| m.disks.as_ref().ok());
            let Order { incarnation, next } = Order::of(desired);
            let gone = desired.spec.iter().flat_map(|s| &s.disks).filter(|d| d.state == DiskState::Deleting);
            let gone = gone.map(|d| d.name.clone()).collect();
            Goal::Serve { incarnation, next, disks: disks.cloned().unwrap_or_default(), gone }
        }
    }
}

fn said(
    vm: VmId,
    want: &Want,
    made: Option<&Made>,
    goals: &BTreeMap<VmId, Goal>,
    have: &Have,
    problems: &BTreeMap<VmId, String>,
) -> Result<(), String> {
    if let Some(problem) = problems.get(&vm) {
        return Err(problem.clone());
    }
    let goal = goals.get(&vm);
    if let Some(Goal::Rest { .. }) = goal {
        return Err("its disks are being put back to a snapshot".to_owned());
    }
    if goal.is_some_and(|goal| plan::reached(have, vm, goal)) {
        return Ok(());
    }
    match (want, made) {
        (Want::Serve(desired), Some(made @ Made { disks: Err(problem), .. })) if made.are_of(desired) => {
            Err(problem.clone())
        }
        (Want::Serve(_), _) => Err("its disks are being made ready".to_owned()),
        (Want::Nothing { .. }, _) => Err("its disks are still served".to_owned()),
    }
}

impl Made {
    /// Whether these disks are to be served now, to the same incarnation or to the one that it has migrated to.
    fn are_of(&self, desired: &Desired) -> bool {
        let disks = |d: &Desired| d.spec.as_ref().map(|s| s.disks.clone()).unwrap_or_default();
        let goes_on = self.now.incarnation == desired.incarnation || self.now.next == Some(desired.incarnation);
        goes_on && self.desired.disk_generation == desired.disk_generation && disks(&self.desired) == disks(desired)
    }
}
