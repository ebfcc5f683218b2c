//! Which VM leaves a host that is being drained next, and what is left there. Pure.
//!
//! What is done is decided from the state alone, so a new leader goes on where the last one was. [`Drains`] only remembers what
//! was tried, so that what cannot be done is not tried all the time: without it, it would be tried once more, at once.
//!
//! The largest VM leaves first: it is the hardest to fit, and what takes longest should not be last.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, Revision, VmId},
};

use crate::{
    model::{Desired, DrainHow, HostMode, Liveness, VmRecord, migration::MigrationResult},
    state::{Prospect, State, VmEntry, command::Context},
};

/// How many steps a pass takes. What is left is found by the next one, which follows at once.
pub const STEPS: usize = 8;

/// What waits for something that passes is looked at again after this. Each look may look at every host.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// What cannot leave as things are is looked at again after this.
const STUCK_PAUSE: Duration = Duration::from_secs(2);
/// What was refused by the state, though it looked possible.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How long a VM is left alone after a migration that was given up. Twice as long after each further one.
const BACKOFF: Duration = Duration::from_secs(5);
/// The longest such pause.
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);

/// How a VM leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It migrates.
    Migrate,
    /// It is stopped, and starts elsewhere.
    Stop,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The VM.
    pub vm: VmId,
    /// The host that it leaves.
    pub from: HostId,
    /// How.
    pub how: How,
}

/// Remembers what was tried. Lives as long as the term.
#[derive(Debug, Default)]
pub struct Drains {
    tried: BTreeMap<VmId, Tried>,
}

#[derive(Clone, Copy, Debug)]
struct Tried {
    /// It is left alone until then.
    not_before: Tick,
    /// Its newest migration that is over.
    ended: Incarnation,
    /// How many were given up since the drain, or the term, began.
    given_up: u32,
}

impl Drains {
    /// The next step, if there is one to take now. The same step again, until the state has changed.
    pub fn next(&mut self, state: &State, cx: &Context, now: Tick) -> Option<Step> {
        self.note_ends(state, now);
        for (from, how) in draining(state) {
            if cx.silent.contains(&from) || state.has_enough_on_the_way(from) {
                continue;
            }
            for vm in leaving_order(state, from) {
                let Some(tried) = self.tried.get_mut(&vm).filter(|tried| tried.not_before <= now) else { continue };
                match state.prospect(vm, cx) {
                    Prospect::CanMigrate => return Some(Step { vm, from, how: How::Migrate }),
                    Prospect::CanStop(_) if how == DrainHow::StopAndMove => {
                        return Some(Step { vm, from, how: How::Stop });
                    }
                    Prospect::CanStop(_) | Prospect::Stuck(_) => tried.not_before = now.after(STUCK_PAUSE),
                    Prospect::Waits(_) => tried.not_before = now.after(LOOK_AGAIN),
                    Prospect::AtRest | Prospect::Moving(_) => {}
                }
            }
        }
        None
    }

    /// The state has refused a step.
    pub fn refused(&mut self, vm: VmId, now: Tick) {
        if let Some(tried) = self.tried.get_mut(&vm) {
            tried.not_before = now.after(REFUSED_PAUSE);
        }
    }

    /// Sees which migrations have been given up, and forgets VMs that have left.
    fn note_ends(&mut self, state: &State, now: Tick) {
        let mut all = BTreeMap::new();
        for (from, _) in draining(state) {
            for entry in state.vms_on(from).filter_map(|vm| state.vm(vm)) {
                let (ended, result) = last_end(entry);
                let mut tried =
                    self.tried.get(&entry.record.id).copied().unwrap_or(Tried { not_before: now, ended, given_up: 0 });
                if ended > tried.ended {
                    tried.ended = ended;
                    if result == Some(MigrationResult::GivenUp) {
                        tried.given_up = tried.given_up.saturating_add(1);
                        tried.not_before = now.after(backoff(tried.given_up));
                    }
                }
                all.insert(entry.record.id, tried);
            }
        }
        self.tried = all;
    }
}

fn last_end(entry: &VmEntry) -> (Incarnation, Option<MigrationResult>) {
    let end = entry.status.as_ref().and_then(|status| status.last_migration.as_ref());
    end.map_or((Incarnation::NONE, None), |end| (end.incarnation, Some(end.result)))
}

fn backoff(given_up: u32) -> Duration {
    let doublings = given_up.saturating_sub(1).min(16);
    BACKOFF.saturating_mul(1 << doublings).min(LONGEST_BACKOFF)
}

/// Hosts from which VMs are to leave, and can: those of a lost host are moved as those of any lost host.
fn draining(state: &State) -> impl Iterator<Item = (HostId, DrainHow)> {
    let draining = state.draining_hosts().filter(|(_, host)| host.record.liveness == Liveness::Up);
    draining.map(|(id, host)| (id, host.record.drain_how))
}

/// The VMs of a host that should run, in the order in which they leave it.
fn leaving_order(state: &State, host: HostId) -> Vec<VmId> {
    let records = state.vms_on(host).filter_map(|vm| Some(&*state.vm(vm)?.record));
    let mut leaving: Vec<&VmRecord> = records.filter(|vm| vm.desired == Desired::Running).collect();
    leaving.sort_by_cached_key(|vm| (Reverse(vm.spec.memory_mib), vm.id));
    leaving.into_iter().map(|vm| vm.id).collect()
}

/// How many VMs a look examines. Each may have to look at every host, under the state's lock.
const EXAMINED: usize = 16;
/// For how long what was found about a VM that stays where it is, is taken to be so.
const FOUND_FOR: Duration = Duration::from_secs(2);
/// How long nothing must be able to leave before that is said: the next moment a host may be back, or have room.
const SETTLED: Duration = Duration::from_secs(3);

/// Watches one drain, for people.
#[derive(Debug)]
pub struct Watch {
    host: HostId,
    found: BTreeMap<VmId, Found>,
    /// VMs that were seen to have to leave.
    seen: BTreeSet<VmId>,
    /// Since when nothing could leave.
    stuck_since: Option<Tick>,
}

/// What was found about a VM.
#[derive(Debug)]
struct Found {
    at: Tick,
    /// When the VM had last changed by then.
    revision: Revision,
    prospect: Prospect,
}

impl Found {
    const fn holds_for(&self) -> Duration {
        match self.prospect {
            Prospect::Waits(_) => LOOK_AGAIN,
            Prospect::AtRest
            | Prospect::Moving(_)
            | Prospect::CanMigrate
            | Prospect::CanStop(_)
            | Prospect::Stuck(_) => FOUND_FOR,
        }
    }
}

/// How far a drain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How it stands.
    pub stage: Stage,
    /// VMs that have left since it is watched.
    pub moved: usize,
    /// VMs that are there, and that somebody must do something about or that will leave. In the order in which they leave.
    pub left: Vec<Left>,
}

/// A VM that is to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Which.
    pub vm: VmId,
    /// What it does.
    pub state: LeftState,
    /// How or why, in words.
    pub why: String,
}

/// What a VM does that is to leave a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftState {
    /// It will leave.
    ToGo,
    /// It is on its way.
    Moving,
    /// It cannot leave as things are.
    Cannot,
}

/// How a drain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It goes on.
    GoesOn,
    /// Nothing executes there any more.
    Empty,
    /// What is left cannot leave as things are. The drain goes on as soon as they change.
    Stuck,
    /// Somebody has ended it, or the host is gone.
    Ended,
}

impl Watch {
    /// Watches the drain of a host.
    #[must_use]
    pub const fn new(host: HostId) -> Self {
        Self { host, found: BTreeMap::new(), seen: BTreeSet::new(), stuck_since: None }
    }

    /// How far it is now.
    pub fn look(&mut self, state: &State, cx: &Context, now: Tick) -> Progress {
        let Some(host) = state.host(self.host).filter(|host| host.record.mode == HostMode::Draining) else {
            return Progress { stage: Stage::Ended, moved: self.moved(state), left: Vec::new() };
        };
        let how = host.record.drain_how;
        let mut budget = EXAMINED;
        let mut found = BTreeMap::new();
        let mut left = Vec::new();
        for vm in everything(state, self.host) {
            let Some(entry) = state.vm(vm) else { continue };
            let known = self.found.remove(&vm).filter(|known| known.revision == entry.revision());
            // What is on its way is cheap to say.
            let is_cheap = entry.record.migration.is_some() || entry.record.is_moving_out();
            let now_found = match known {
                Some(known) if budget == 0 || now.since(known.at) < known.holds_for() => known,
                None if budget == 0 && !is_cheap => Found {
                    at: Tick::ZERO,
                    revision: entry.revision(),
                    prospect: Prospect::Waits("waits for its turn".into()),
                },
                Some(_) | None => {
                    budget = budget.saturating_sub(usize::from(!is_cheap));
                    Found { at: now, revision: entry.revision(), prospect: state.prospect(vm, cx) }
                }
            };
            if let Some((state, why)) = shown(entry, &now_found.prospect, how) {
                left.push(Left { vm, state, why });
                self.seen.insert(vm);
            }
            found.insert(vm, now_found);
        }
        self.found = found;
        for vm in state.incoming(self.host) {
            let why = "is on its way here, and leaves again".to_owned();
            left.push(Left { vm, state: LeftState::Moving, why });
        }
        let stage = self.stage(&left, now);
        Progress { stage, moved: self.moved(state), left }
    }

    fn stage(&mut self, left: &[Left], now: Tick) -> Stage {
        if left.is_empty() {
            return Stage::Empty;
        }
        if left.iter().any(|vm| vm.state != LeftState::Cannot) {
            self.stuck_since = None;
            return Stage::GoesOn;
        }
        let since = *self.stuck_since.get_or_insert(now);
        if now.since(since) >= SETTLED { Stage::Stuck } else { Stage::GoesOn }
    }

    fn moved(&self, state: &State) -> usize {
        let is_elsewhere = |vm: &&VmId| {
            let host = state.vm(**vm).and_then(|entry| entry.record.placement.host);
            host.is_some_and(|host| host != self.host)
        };
        self.seen.iter().filter(is_elsewhere).count()
    }
}

/// All VMs of a host, those that should run first, in the order in which they leave.
fn everything(state: &State, host: HostId) -> Vec<VmId> {
    let mut all = leaving_order(state, host);
    let first: BTreeSet<VmId> = all.iter().copied().collect();
    all.extend(state.vms_on(host).filter(|vm| !first.contains(vm)));
    all
}

/// `None`: it does not stand in the way.
fn shown(entry: &VmEntry, prospect: &Prospect, how: DrainHow) -> Option<(LeftState, String)> {
    Some(match prospect {
        Prospect::AtRest => return None,
        Prospect::Moving(why) => (LeftState::Moving, why.clone()),
        Prospect::CanMigrate => {
            let end = entry.status.as_ref().and_then(|status| status.last_migration.as_ref());
            let why = match end.filter(|end| end.result == MigrationResult::GivenUp) {
                Some(end) => format!("is tried again; its last migration was given up: {}", end.reason),
                None => "waits for its turn".to_owned(),
            };
            (LeftState::ToGo, why)
        }
        Prospect::Waits(why) => (LeftState::ToGo, why.clone()),
        Prospect::CanStop(why) => match how {
            DrainHow::StopAndMove => (LeftState::ToGo, format!("is to be stopped and started elsewhere: {why}")),
            DrainHow::LiveOnly => (LeftState::Cannot, format!("{why}; it could be stopped and started elsewhere")),
        },
        Prospect::Stuck(why) => (LeftState::Cannot, why.clone()),
    })
}
