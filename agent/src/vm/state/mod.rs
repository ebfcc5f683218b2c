//! The life of one VM, as the agent sees it. Pure: events and the time come in, effects go out.
//!
//! ```text
//!              desired, lease, retry                     launched
//!   (waits) ─────────────────────────▶ Preparing ─▶ Launching ─▶ executes ──▶ ended
//!      ▲                                   │            │            │          │
//!      └───────────── failed, tried again ─┴────────────┴────────────┴──────────┤
//!                                                                               ▼
//!                 settled for this incarnation: stopped, powered off, failed, fenced, deleted, forgotten
//! ```
//!
//! After every event [`VmState::on`] compares what should be (the record's desired state) with what is, and takes
//! the one next step. So it does not matter which events were lost or came twice.
//!
//! # Invariants
//!
//! * **P1** [`Effect::Launch`] comes only while the lease of the VM's class is valid, under the generation that the
//!   leader's word for this incarnation was accepted under, and only while nothing executes and no launch is under way.
//! * **V1** A settled incarnation is never launched again, unless a user asked for a restart after it stopped or failed
//!   by itself. *Fenced* is left by a new incarnation only.
//! * **P5** [`Effect::DeleteDisks`] comes only while the leader says *delete*, or *forget* with what is void (M7), and nothing executes.
//! * **M2**, **M3**, **M4** Who goes on after a migration: `migrate.rs`.
//! * **V2** Whatever changes the record puts [`Effect::Persist`] before every other effect.
//! * **V3** A record that could not be read freezes its VM: nothing is started, deleted or written. What executes can
//!   still be stopped, because a VM that belongs elsewhere must not go on.
//! * **V4** An event that makes no sense is ignored: QEMU's events race with ours.

mod disks;
mod migrate;
#[cfg(test)]
mod migrate_tests;
#[cfg(test)]
mod mirror_tests;
mod pause;
#[cfg(test)]
mod pause_tests;
mod report;
mod settle;
mod stall;
#[cfg(test)]
mod tests;
mod words;

use std::time::Duration;

use uncloud_proto::{
    clock::{Tick, WallTime},
    ids::{Incarnation, VmId},
};

pub use self::{
    report::{MigrationReport, Report, ReportState},
    words::{Effect, Event, Skipped},
};
use super::{
    backoff,
    desired::{Desired, DisksExpected, Disposition, Pause, RestartMode, RestartPolicy, StopMode},
    hypervisor::{Exit, ExitKind, Hold},
    migration::Standing,
};
use crate::{
    lease::LeaseWord,
    records::{LastExit, Launched, Record, Role, Settled},
};

/// How long QEMU may take to end after it was told to, before it is killed (again).
const QUIT_GRACE: Duration = Duration::from_secs(5);

/// What the machine may know about the moment at which something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For everything that waits.
    pub now: Tick,
    /// For people.
    pub wall: WallTime,
    /// The host's lease of this VM's class.
    pub lease: Lease,
}

/// A host's lease of one class, as it is at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Grows each time that a lease ran out and was granted again.
    pub generation: u16,
    /// It has not run out.
    pub valid: bool,
}

/// Under which generation of the lease the leader's newest word was accepted. A start is bound to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// Under none that may be used: the session ended before the lease was granted, or the agent was restarted.
    Void,
    /// The lease had run out when the word came. It counts for the generation that the next renewal *of the same
    /// session* begins: the leader sends both in order, so by renewing it stands by its word.
    Expected(u16),
    /// The lease was valid, with this generation.
    Firm(u16),
}

impl Acceptance {
    /// P1: to which lease generation a word is bound that comes at `now`, while the lease stands like this.
    #[must_use]
    pub fn of(word: LeaseWord, now: Tick) -> Self {
        if word.valid_at(now) { Self::Firm(word.generation) } else { Self::Expected(word.generation.wrapping_add(1)) }
    }
}

/// What executes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Execution {
    incarnation: Incarnation,
    lease_generation: u16,
    since: Tick,
    ending: Option<Ending>,
    push: Push,
    /// What the guest has said. For people.
    addresses: Vec<String>,
    role: Role,
    /// How it stands with its migration, as far as that is known.
    standing: Option<Standing>,
    /// When to ask for that next, if it matters.
    look_at: Tick,
    /// Since when the last of its guest has been on its way.
    last_since: Option<Tick>,
    /// That is too long.
    overdue: bool,
    /// It is to end, and a migration must be put right first: by when at the latest.
    end_by: Option<Tick>,
    /// The target: it was told to listen.
    listens: bool,
    /// Why it did not take the newest step. Empty: it did.
    trouble: String,
    /// How its disks stand.
    disks: disks::Tended,
    /// What its pools and disks make it suffer.
    stall: stall::Trouble,
}

/// Why it is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It should not run.
    Stop,
    /// It is restarted.
    Restart,
    /// The guest powered itself off.
    PoweredOff,
    /// The guest panicked.
    Panicked,
    /// It must not run: it belongs elsewhere, or the lease is gone.
    Killed,
}

/// What has been done to end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Push {
    None,
    Asked { kill_at: Tick },
    Killed { again_at: Tick },
}

/// What the runner is doing for this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    None,
    Looking,
    Preparing,
    Launching,
    Deleting,
    /// Files that are not its disks are being removed (M7).
    Sweeping,
    /// Its disks, which nobody has open, are put in order.
    Tending,
}

/// When it is tried again, and why it is not running.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Retry {
    at: Tick,
    wall: WallTime,
    reason: String,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    record: Record,
    /// Why the record may not be touched.
    frozen: Option<String>,
    acceptance: Acceptance,
    execution: Option<Execution>,
    work: Work,
    failures: u32,
    retry: Option<Retry>,
    /// The record on disk is older than this one, because writing it failed.
    unsaved: bool,
    /// What was done to its disks, and what was not.
    idle: disks::Idle,
    /// How far its image is, in words. Only while that is being made ready.
    progress: String,
    /// What it was reported to be, and since when.
    shown: (ReportState, Incarnation, WallTime),
}

impl VmState {
    /// A VM that the leader has just named for the first time. Follow with [`Event::Desired`].
    #[must_use]
    pub fn new(vm: VmId) -> Self {
        Self::with(Record::new(vm, Desired::unknown()), None, Work::None)
    }

    /// A VM from its record. The runner looks for what executes and tells by `Started` or `NotFound`.
    #[must_use]
    pub fn from_record(record: Record) -> Self {
        Self::with(record, None, Work::Looking)
    }

    /// A VM that has a directory and no record. It is not started before the leader has named it.
    #[must_use]
    pub fn without_record(vm: VmId) -> Self {
        Self::with(Record::new(vm, Desired::unknown()), None, Work::Looking)
    }

    /// A VM whose record cannot be read: `problem` says why and what an operator can do.
    #[must_use]
    pub fn unreadable(vm: VmId, problem: String) -> Self {
        Self::with(Record::new(vm, Desired::unknown()), Some(problem), Work::Looking)
    }

    fn with(record: Record, frozen: Option<String>, work: Work) -> Self {
        let shown = (ReportState::Preparing, Incarnation::NONE, WallTime::default());
        Self {
            record,
            frozen,
            acceptance: Acceptance::Void,
            execution: None,
            work,
            failures: 0,
            retry: None,
            unsaved: false,
            idle: disks::Idle::default(),
            progress: String::new(),
            shown,
        }
    }

    /// Whether its image and disks are being made ready.
    #[must_use]
    pub fn is_preparing(&self) -> bool {
        self.work == Work::Preparing
    }

    /// What is to be written to disk.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Whether the leader has only to acknowledge the report, and the record can go.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let over = matches!(self.record.settled, Some(Settled::Deleted | Settled::Forgotten));
        over && self.execution.is_none() && self.work == Work::None
    }

    /// Whether the record may be written and removed.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    /// When [`Event::Wake`] is needed, seen from `now`: the moment of the newest event.
    #[must_use]
    pub fn deadline(&self, now: Tick) -> Option<Tick> {
        // What was due and has not been done waits for something else: the lease, or the leader's word. It hides nothing that is due later.
        let ahead = |at: &Tick| *at > now;
        match &self.execution {
            Some(x) => {
                let push = match x.push {
                    Push::None => None,
                    Push::Asked { kill_at: at } | Push::Killed { again_at: at } => Some(at),
                };
                let open = x.role == Role::Incoming || self.record.moving.is_some() || self.pause_is_open();
                let look = open.then_some(x.look_at);
                let all = [push, look, x.end_by, x.disks.deadline(), x.stall.deadline()];
                all.into_iter().flatten().filter(ahead).min()
            }
            None if self.work != Work::None => None,
            None => {
                let all = [self.retry.as_ref().map(|r| r.at), self.idle.deadline()];
                all.into_iter().flatten().filter(ahead).min()
            }
        }
    }

    /// Applies `event`. Returns what to do about it, in order.
    pub fn on(&mut self, event: Event, at: Moment) -> Vec<Effect> {
        let before = self.record.clone();
        let mut effects = Vec::new();
        self.unsaved |= matches!(event, Event::PersistFailed(..));
        self.apply(event, at, &mut effects);
        self.settle(at, &mut effects);
        if self.record.settled != before.settled {
            self.record.settled_at = at.wall;
        }
        self.note_since(at.wall);
        let overdue = self.unsaved && effects.iter().any(|e| e.needs_record());
        if (self.record != before || overdue) && self.frozen.is_none() {
            effects.insert(0, Effect::Persist);
            self.unsaved = false;
        }
        effects
    }

    fn apply(&mut self, event: Event, at: Moment, effects: &mut Vec<Effect>) {
        match event {
            Event::Desired(desired, acceptance) => self.desired(*desired, acceptance, effects),
            Event::SessionEnded(generation) => {
                if let Acceptance::Expected(g) = self.acceptance {
                    self.acceptance = if g == generation { Acceptance::Firm(g) } else { Acceptance::Void };
                }
            }
            Event::Wake => {}
            Event::Progress(words) if self.work == Work::Preparing => self.progress = words,
            Event::Prepared if self.work == Work::Preparing => {
                self.work = Work::None;
                self.record.disks_ready = true;
                self.launch(at, effects);
            }
            Event::PrepareFailed(reason) if self.work == Work::Preparing => {
                self.work = Work::None;
                self.failed(reason, at);
            }
            Event::Started(incarnation, lease_generation) => self.started(incarnation, lease_generation, at),
            Event::StartFailed(reason) if self.work == Work::Launching => {
                self.work = Work::None;
                self.not_launched(|s| s.failed(reason, at));
            }
            Event::StartFenced if self.work == Work::Launching => {
                self.work = Work::None;
                self.not_launched(|s| s.record.settled = Some(Settled::Fenced));
            }
            Event::StartBusy if self.work == Work::Launching => {
                self.work = Work::Looking;
                effects.push(Effect::Adopt);
            }
            Event::NotFound(exit) if self.work == Work::Looking => {
                self.work = Work::None;
                self.not_found(exit, at);
            }
            Event::GuestShutdown => self.guest_down(Ending::PoweredOff, at, effects),
            Event::GuestPanicked => self.guest_down(Ending::Panicked, at, effects),
            Event::GuestAddresses(addresses) => {
                if let Some(x) = &mut self.execution {
                    x.addresses = addresses;
                }
            }
            Event::MigrationMoved => {
                if let Some(x) = &mut self.execution {
                    x.look_at = at.now;
                }
            }
            Event::Stands(Some(standing)) => self.stands(*standing, at),
            // Asked again when it is due.
            Event::Stands(None) => {}
            Event::StepFailed(reason) => self.step_failed(reason, at, effects),
            Event::DisksTended(done) => self.disks_tended(done),
            Event::TendFailed(reason) => self.tend_failed(reason, at),
            Event::Stalled => self.stalled(at),
            Event::Held(held) => self.held(held, at),
            Event::DiskFailed(words) => self.disk_failed(words, at),
            Event::Ended(exit) => self.ended(&exit, at),
            Event::DisksDeleted if self.work == Work::Deleting => {
                self.work = Work::None;
                self.record.disks_ready = false;
                if self.record.desired.disposition == Disposition::Delete {
                    self.record.settled = Some(Settled::Deleted);
                }
            }
            Event::DisksDeleted if self.work == Work::Sweeping => {
                self.work = Work::None;
                if self.record.desired.disposition == Disposition::Forget {
                    self.record.settled = Some(Settled::Forgotten);
                }
            }
            Event::DeleteFailed(reason) if matches!(self.work, Work::Deleting | Work::Sweeping) => {
                self.work = Work::None;
                self.failed(reason, at);
            }
            // P1: a launch that was under way before is not over because something else could not be written.
            Event::PersistFailed(_, Skipped::Nothing) => {}
            // Tried again later: at once it would come to the same, for ever.
            Event::PersistFailed(reason, Skipped::Work) if self.work == Work::Tending => self.tend_failed(reason, at),
            Event::PersistFailed(reason, Skipped::Work) => {
                if matches!(self.work, Work::Preparing | Work::Launching | Work::Deleting | Work::Sweeping) {
                    self.work = Work::None;
                    self.not_launched(|s| s.failed(reason, at));
                }
            }
            // V4: late answers to what is no longer under way.
            Event::Progress(_)
            | Event::Prepared
            | Event::PrepareFailed(_)
            | Event::StartFailed(_)
            | Event::StartFenced
            | Event::StartBusy
            | Event::NotFound(_)
            | Event::DisksDeleted
            | Event::DeleteFailed(_) => {}
        }
    }

    fn desired(&mut self, desired: Desired, acceptance: Acceptance, effects: &mut Vec<Effect>) {
        if desired.incarnation < self.record.desired.incarnation {
            return; // The gate lets none of these through; here it costs nothing to be sure.
        }
        // P3: of a VM whose record is lost nobody knows which restarts were carried out. What executes is not restarted for them, and
        // what does not has nothing to restart.
        if self.record.desired.incarnation == Incarnation::NONE {
            self.record.restarts_done = self.record.restarts_done.max(desired.restarts);
        }
        let fresh = desired.incarnation > self.record.desired.incarnation;
        if fresh {
            // Another host may have begun on the disks meanwhile.
            self.idle = disks::Idle::default();
            self.record.settled = None;
            self.retry = None;
            self.failures = 0;
        }
        // The leader gave the VM to this host while what waited for it had just failed: it is started from its disks.
        if !fresh
            && (self.record.desired.disposition, desired.disposition) == (Disposition::Incoming, Disposition::Run)
            && matches!(self.record.settled, Some(Settled::Failed { .. }))
        {
            self.record.settled = None;
        }
        if desired.disk_generation != self.record.desired.disk_generation {
            self.record.disks_ready = false;
        }
        // What is being prepared may no longer be what is wanted. Doing it again costs milliseconds.
        let starts = matches!(desired.disposition, Disposition::Run | Disposition::Incoming);
        if self.work == Work::Preparing && (fresh || !starts) {
            self.work = Work::None;
            effects.push(Effect::CancelPrepare);
        }
        // R3: what was told for another incarnation is not done any more.
        if self.work == Work::Tending && (fresh || desired.disposition != Disposition::Stop) {
            self.work = Work::None;
            effects.push(Effect::CancelTend);
        }
        if desired.disposition != self.record.desired.disposition {
            self.retry = None;
        }
        self.record.desired = desired;
        self.acceptance = acceptance;
    }

    fn started(&mut self, incarnation: Incarnation, lease_generation: u16, at: Moment) {
        if !matches!(self.work, Work::Launching | Work::Looking) || self.execution.is_some() {
            return;
        }
        self.work = Work::None;
        self.retry = None;
        // A launch that is in the record stays as it is, so that a restart of the agent changes nothing.
        let known = self.record.launched.filter(|l| l.incarnation == incarnation);
        let role = known.map_or(Role::Executes, |l| l.role);
        if self.frozen.is_none() && (known.is_none() || role == Role::Incoming) {
            // It may stand still: of one that nobody remembers, nobody knows what it was launched for.
            self.record.moving = Some(incarnation);
        }
        let wall = known.map_or(at.wall, |l| l.at);
        self.record.launched = Some(Launched { incarnation, lease_generation, at: wall, role });
        self.execution = Some(Execution {
            incarnation,
            lease_generation,
            since: at.now,
            ending: None,
            push: Push::None,
            addresses: Vec::new(),
            role,
            standing: None,
            look_at: at.now,
            last_since: None,
            overdue: false,
            end_by: None,
            listens: false,
            trouble: String::new(),
            disks: disks::Tended::default(),
            stall: stall::Trouble::default(),
        });
    }

    /// A launch came to nothing. What follows counts only for the incarnation that it was for.
    fn not_launched(&mut self, then: impl FnOnce(&mut Self)) {
        let launched = self.record.launched.take();
        if launched.is_none_or(|l| l.incarnation == self.record.desired.incarnation) {
            then(self);
        }
    }

    /// Nothing executes, and a keeper may have left word how that came about.
    fn not_found(&mut self, exit: Option<Exit>, at: Moment) {
        if self.record.desired.incarnation == Incarnation::NONE && self.frozen.is_none() {
            self.record.settled = Some(Settled::Forgotten);
        }
        let Some(launched) = self.record.launched else { return };
        // No word about this incarnation: the agent, or the whole host, went down while it was being started.
        let unseen = || Exit {
            incarnation: launched.incarnation,
            kind: ExitKind::NotStarted,
            at: at.wall,
            last_words: String::new(),
        };
        let exit = exit.filter(|e| e.incarnation == launched.incarnation).unwrap_or_else(unseen);
        self.gone(launched, None, &exit, at);
    }

    fn ended(&mut self, exit: &Exit, at: Moment) {
        let Some(x) = self.execution.take() else { return };
        if at.now.since(x.since) >= backoff::HEALTHY_AFTER {
            self.failures = 0;
        }
        let (incarnation, lease_generation, role) = (x.incarnation, x.lease_generation, x.role);
        let launched = Launched { incarnation, lease_generation, at: at.wall, role };
        self.gone(launched, x.ending, exit, at);
    }

    /// QEMU is gone. Decides what that means for the incarnation that it was.
    fn gone(&mut self, was: Launched, ending: Option<Ending>, exit: &Exit, at: Moment) {
        self.record.launched = None;
        self.record.moving = None;
        self.record.sending = None;
        self.record.stands_still = false;
        let lost = !at.lease.valid || at.lease.generation != was.lease_generation || exit.kind == ExitKind::Fenced;
        let desired = &self.record.desired;
        self.record.last_exit = Some(LastExit::new(exit, describe(ending, exit, lost)));
        let current = was.incarnation == desired.incarnation && self.record.settled.is_none();
        let starts = matches!(desired.disposition, Disposition::Run | Disposition::Incoming);
        if !current || !starts || self.frozen.is_some() {
            return; // What follows from not executing, `settle` sees for itself.
        }
        if desired.disposition == Disposition::Incoming {
            let reason = describe(ending, exit, lost);
            self.record.settled = Some(if lost { Settled::Fenced } else { Settled::Failed { reason } });
            return;
        }
        let policy = desired.spec.as_ref().map_or(RestartPolicy::Never, |s| s.restart);
        match ending {
            Some(Ending::PoweredOff) if policy != RestartPolicy::Always => {
                self.record.settled = Some(Settled::PoweredOff);
            }
            Some(Ending::Stop) => self.record.settled = Some(Settled::Stopped),
            // The leader may have given it to another host: it is no longer ours to start.
            _ if lost => self.record.settled = Some(Settled::Fenced),
            Some(Ending::Killed) => self.record.settled = Some(Settled::Stopped),
            Some(Ending::Restart) => self.record.restarts_done = self.record.desired.restarts,
            Some(Ending::PoweredOff | Ending::Panicked) | None => {
                let reason = describe(ending, exit, lost);
                match policy {
                    // The policy is about what ran. A start that failed is always tried again.
                    _ if exit.kind == ExitKind::NotStarted => self.failed(reason, at),
                    RestartPolicy::OnFailure | RestartPolicy::Always => self.failed(reason, at),
                    RestartPolicy::Never => self.record.settled = Some(Settled::Failed { reason }),
                }
            }
        }
    }

    fn failed(&mut self, reason: String, at: Moment) {
        // What waits for a guest is not tried again: the guest executes where it is.
        if self.record.desired.disposition == Disposition::Incoming {
            self.record.settled = Some(Settled::Failed { reason });
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let wait = backoff::wait_after(self.failures);
        let wall = WallTime(at.wall.0.saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)));
        self.retry = Some(Retry { at: at.now.after(wait), wall, reason });
    }

    fn guest_down(&mut self, ending: Ending, at: Moment, effects: &mut Vec<Effect>) {
        // A guest that has never executed here ends nothing; whoever goes on with it finds out.
        let Some(x) = self.execution.as_mut().filter(|x| x.role == Role::Executes) else { return };
        x.ending.get_or_insert(ending);
        if !matches!(x.push, Push::Killed { .. }) {
            x.push = Push::Asked { kill_at: at.now.after(QUIT_GRACE) };
            effects.push(Effect::Quit);
        }
    }
}

/// How it ended, in words.
fn describe(ending: Option<Ending>, exit: &Exit, lost: bool) -> String {
    let what = match ending {
        Some(Ending::Stop) => "stopped".to_owned(),
        Some(Ending::Restart) => "stopped for a restart".to_owned(),
        Some(Ending::PoweredOff) => "the guest powered itself off".to_owned(),
        Some(Ending::Panicked) => "the guest panicked".to_owned(),
        Some(Ending::Killed) if lost => "killed because the host's lease ran out".to_owned(),
        Some(Ending::Killed) => "killed because it does not belong here".to_owned(),
        None if lost => "killed because the host's lease ran out".to_owned(),
        None => exit.kind.to_string(),
    };
    match (ending, exit.last_words.trim()) {
        (None, words) if !words.is_empty() => format!("{what}: {words}"),
        (None | Some(_), _) => what,
    }
}

impl Desired {
    /// Stands in for what a missing or unreadable record said. Starts nothing, because the leader's word is not there.
    fn unknown() -> Self {
        Self {
            incarnation: Incarnation::NONE,
            disposition: Disposition::Run,
            name: String::new(),
            owner: String::new(),
            spec: None,
            images: Vec::new(),
            restarts: 0,
            restart_mode: RestartMode::Graceful,
            stop_mode: StopMode::Graceful,
            disks: DisksExpected::Exist,
            disk_generation: 0,
            migrate_to: None,
            void: None,
            migration_secret: String::new(),
            pause: Pause::GoOn,
            network_pools: Default::default(),
            next: None,
            orders: Default::default(),
            clone_from: None,
        }
    }
}
