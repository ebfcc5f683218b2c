//! Acts for one VM: takes events to its [`VmState`] and carries out the effects.
//!
//! One task per VM, and nobody else changes its state. What takes long (fetching an image, starting QEMU) runs as the
//! task's one piece of work beside the loop, so that a desired state, or the end of QEMU, is always heard.
//!
//! When the agent stops, the task just ends: QEMU and its keeper go on, and the next agent adopts them.

use std::{
    collections::{BTreeMap, VecDeque},
    future::{Future, pending},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time;
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};
use tracing::{debug, error, info, warn};
use uncloud_proto::{
    clock::{Clock, Tick},
    ids::VmId,
};

use super::{
    desired::Desired,
    disks::Done as DisksDone,
    hypervisor::{Adoption, Hypervisor, Instance, InstanceEvent, LaunchError},
    mailbox::{Generations, Mail, Mailbox},
    migration::{Copies, Step},
    state::{Effect, Event, Lease, Moment, ReportState, Skipped, VmState},
};
use crate::{
    lease::{LeaseClass, LeaseFile},
    records::{Record, VmDirs},
    session::outbox::SharedOutbox,
};

/// How often the lease is looked at while disks are worked on that nobody has open. The leader allows more for a kill.
const LEASE_LOOK: Duration = Duration::from_millis(50);

/// The mailboxes of the VMs that have a task.
pub(super) type Directory = Arc<Mutex<BTreeMap<VmId, Mailbox>>>;

/// What all VMs of a host share.
#[derive(Debug)]
pub struct Host<H> {
    /// Disks and processes.
    pub hypervisor: Arc<H>,
    /// The host's lease.
    pub lease: Arc<LeaseFile>,
    /// The time.
    pub clock: Clock,
    /// Where records are.
    pub dirs: VmDirs,
    /// Where reports go.
    pub outbox: SharedOutbox,
}

impl<H> Clone for Host<H> {
    fn clone(&self) -> Self {
        Self {
            hypervisor: Arc::clone(&self.hypervisor),
            lease: Arc::clone(&self.lease),
            clock: self.clock.clone(),
            dirs: self.dirs.clone(),
            outbox: self.outbox.clone(),
        }
    }
}

/// What a piece of work came to.
enum Done<H: Hypervisor> {
    Prepared(Result<H::Prepared, String>),
    Launched(Result<H::Instance, LaunchError>),
    Adopted(Adoption<H::Instance>),
    Deleted(Result<(), String>),
    Tended(Result<DisksDone, String>),
}

type Work<H> = Pin<Box<dyn Future<Output = Done<H>> + Send>>;

/// One VM's task.
pub(super) struct Runner<H: Hypervisor> {
    vm: VmId,
    host: Host<H>,
    state: VmState,
    mailbox: Mailbox,
    directory: Directory,
    work: Option<Work<H>>,
    prepared: Option<H::Prepared>,
    instance: Option<H::Instance>,
    /// The moment of the newest event.
    now: Tick,
    shown: Option<ReportState>,
    /// What was last said of how far a preparation is.
    said: String,
    /// Kept until it is known what executes.
    looking: Option<TaskTrackerToken>,
}

impl<H: Hypervisor> Runner<H> {
    /// A task for a VM that nobody has seen before.
    pub(super) fn new(vm: VmId, state: VmState, host: Host<H>, mailbox: Mailbox, directory: Directory) -> Self {
        let now = host.clock.now();
        Self {
            vm,
            host,
            state,
            mailbox,
            directory,
            work: None,
            prepared: None,
            instance: None,
            now,
            shown: None,
            said: String::new(),
            looking: None,
        }
    }

    /// Says that the VM may be executing: looks for it first, and keeps `token` until that is known.
    pub(super) fn looking(mut self, token: TaskTrackerToken) -> Self {
        self.looking = Some(token);
        self.perform_one(Effect::Adopt);
        self.publish();
        self
    }

    /// Runs until `cancel` fires or the VM is over.
    pub(super) async fn run(mut self, cancel: CancellationToken) {
        loop {
            let deadline = self.state.deadline(self.now);
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                done = do_work(&mut self.work) => {
                    self.work = None;
                    let event = self.done(done);
                    self.handle(event).await;
                    self.looking = None;
                }
                event = next_event(&mut self.instance) => self.instance_event(event).await,
                words = self.host.hypervisor.progress(self.vm, &self.said), if self.state.is_preparing() => {
                    self.said.clone_from(&words);
                    self.handle(Event::Progress(words)).await;
                }
                mail = self.mailbox.take() => {
                    if self.mail(mail).await {
                        return;
                    }
                }
                () = sleep_until(&self.host.clock, deadline) => self.handle(Event::Wake).await,
            }
        }
    }

    fn done(&mut self, done: Done<H>) -> Event {
        match done {
            Done::Prepared(Ok(prepared)) => {
                self.prepared = Some(prepared);
                Event::Prepared
            }
            Done::Prepared(Err(reason)) => Event::PrepareFailed(reason),
            Done::Launched(Ok(instance)) | Done::Adopted(Adoption::Running(instance)) => {
                let event = Event::Started(instance.incarnation(), instance.lease_generation());
                info!(incarnation = %instance.incarnation(), pid = instance.pid(), "QEMU runs");
                self.instance = Some(instance);
                event
            }
            Done::Launched(Err(LaunchError::Fenced)) => Event::StartFenced,
            Done::Launched(Err(LaunchError::Busy)) => Event::StartBusy,
            Done::Launched(Err(LaunchError::Failed(reason))) => Event::StartFailed(reason),
            Done::Adopted(Adoption::Ended(exit)) => Event::NotFound(Some(exit)),
            Done::Adopted(Adoption::Never) => Event::NotFound(None),
            Done::Tended(Ok(done)) => Event::DisksTended(done),
            Done::Tended(Err(reason)) => {
                warn!("the disks are not as they should be: {reason}");
                Event::TendFailed(reason)
            }
            Done::Deleted(Ok(())) => Event::DisksDeleted,
            Done::Deleted(Err(reason)) => Event::DeleteFailed(reason),
        }
    }

    async fn instance_event(&mut self, event: InstanceEvent) {
        match event {
            InstanceEvent::GuestShutdown => self.handle(Event::GuestShutdown).await,
            InstanceEvent::GuestPanicked => self.handle(Event::GuestPanicked).await,
            InstanceEvent::GuestReset => debug!("the machine was reset"),
            InstanceEvent::GuestAddresses(addresses) => self.handle(Event::GuestAddresses(addresses)).await,
            InstanceEvent::MigrationMoved => self.handle(Event::MigrationMoved).await,
            InstanceEvent::Stalled => self.handle(Event::Stalled).await,
            InstanceEvent::DiskFailed(words) => {
                warn!("{words}");
                self.handle(Event::DiskFailed(words)).await;
            }
            InstanceEvent::Ended(exit) => {
                info!(incarnation = %exit.incarnation, "{}", exit.kind);
                self.instance = None;
                self.handle(Event::Ended(exit)).await;
            }
        }
    }

    /// Returns whether the VM is over.
    async fn mail(&mut self, mail: Mail) -> bool {
        if let Some(generations) = mail.session_ended {
            self.handle(self.session_ended(generations)).await;
        }
        if let Some((desired, acceptance)) = mail.desired {
            info!(incarnation = %desired.incarnation, disposition = ?desired.disposition, ?acceptance, "desired");
            self.handle(Event::Desired(desired, acceptance)).await;
        }
        if mail.lease_changed {
            self.handle(Event::Wake).await;
        }
        mail.over && self.leave().await
    }

    fn session_ended(&self, generations: Generations) -> Event {
        Event::SessionEnded(generations.of(self.state.record().desired.class()))
    }

    /// Drops the record. Returns whether the task may end: not when the leader has named the VM again meanwhile.
    async fn leave(&mut self) -> bool {
        if !self.state.is_over() || self.state.is_frozen() {
            return false;
        }
        let (dirs, vm) = (self.host.dirs.clone(), self.vm);
        if let Err(error) = blocking(move || dirs.remove(vm)).await {
            error!("the record of a VM that is over cannot be removed: {}", chain(&error));
        }
        let mut directory = self.directory.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = self.mailbox.close();
        if closed {
            directory.remove(&self.vm);
            info!("over");
        }
        closed
    }

    async fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            // The lease that counts is the one of the class that the VM has once the event has been taken in. Both are looked
            // at now, before the session's end.
            let before = self.moment(self.state.record().desired.class());
            let at = match &event {
                Event::Desired(desired, _) => self.moment(desired.class()),
                _ => before,
            };
            self.now = at.now;
            // P1: looked at after the lease. A generation that a later session was granted must not be taken for the
            // one that the word of an ended session waits for; that session's end was put here before.
            if let Some(generations) = self.mailbox.take_session_ended() {
                let effects = self.state.on(self.session_ended(generations), before);
                events.extend(self.perform(&effects).await);
            }
            let effects = self.state.on(event, at);
            events.extend(self.perform(&effects).await);
        }
        // What was prepared and not used is of no use: the next start prepares anew.
        self.prepared = None;
    }

    fn moment(&self, class: LeaseClass) -> Moment {
        let now = self.host.clock.now();
        let word = self.host.lease.word(class);
        let lease = Lease { generation: word.generation, valid: word.valid_at(now) };
        Moment { now, wall: self.host.clock.wall(), lease }
    }

    /// Carries out effects in their order: the record first, then the report, then the rest.
    async fn perform(&mut self, effects: &[Effect]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut failed = false;
        if effects.contains(&Effect::Persist) {
            let (dirs, record) = (self.host.dirs.clone(), self.state.record().clone());
            if let Err(error) = blocking(move || write(&dirs, &record)).await {
                let reason = chain(&error);
                error!("the record of a VM cannot be written: {reason}");
                failed = true;
                events.push(Event::PersistFailed(reason, Skipped::of(effects)));
            }
        }
        self.publish();
        for effect in effects {
            if failed && effect.needs_record() {
                continue;
            }
            match effect {
                Effect::Persist => {}
                Effect::PowerDown | Effect::Reset | Effect::Quit => {
                    if let Some(instance) = &self.instance {
                        command(instance, *effect).await;
                    }
                }
                Effect::Look => {
                    if let Some(instance) = &self.instance {
                        events.push(look(instance, self.state.copies()).await);
                    }
                }
                Effect::Listen
                | Effect::Send
                | Effect::SendMemory
                | Effect::Continue
                | Effect::Cancel
                | Effect::Resume
                | Effect::Pause => {
                    if let (Some(instance), Some(step)) = (&self.instance, self.state.step(*effect)) {
                        events.extend(take_step(&*self.host.hypervisor, self.vm, instance, *effect, step).await);
                    }
                }
                Effect::TendDisks => {
                    if let Some(instance) = &self.instance {
                        let desired = &self.state.record().desired;
                        events.push(tend_disks(&*self.host.hypervisor, self.vm, instance, desired).await);
                    }
                }
                Effect::GoOn => {
                    if let Some(instance) = &self.instance {
                        let held = self.host.hypervisor.go_on(instance, &self.state.record().desired).await;
                        events.push(Event::Held(held));
                    }
                }
                Effect::Prepare
                | Effect::CancelPrepare
                | Effect::Launch { .. }
                | Effect::Adopt
                | Effect::Kill
                | Effect::TendIdle { .. }
                | Effect::CancelTend
                | Effect::DeleteDisks => self.perform_one(*effect),
            }
        }
        events
    }

    /// Those that take no time here.
    fn perform_one(&mut self, effect: Effect) {
        let (hypervisor, vm) = (Arc::clone(&self.host.hypervisor), self.vm);
        let desired = self.state.record().desired.clone();
        match effect {
            Effect::Prepare => {
                self.said.clear();
                self.work = Some(Box::pin(async move { Done::Prepared(hypervisor.prepare(vm, &desired).await) }));
            }
            Effect::CancelPrepare | Effect::CancelTend => self.work = None,
            Effect::TendIdle { lease_generation } => {
                let over = self.lease_over(desired.class(), lease_generation);
                self.work = Some(Box::pin(async move {
                    tokio::select! {
                        done = hypervisor.tend_idle(vm, &desired) => Done::Tended(done),
                        // P1: from then on the disks may be another host's.
                        () = over => Done::Tended(Err("the host's lease ran out".to_owned())),
                    }
                }));
            }
            Effect::Launch { incarnation, lease_generation } => {
                let Some(prepared) = self.prepared.take() else {
                    unreachable!("the state machine launches only when it hears that all is prepared")
                };
                info!(%incarnation, lease_generation, "starting");
                self.work = Some(Box::pin(async move {
                    Done::Launched(hypervisor.launch(vm, &desired, prepared, lease_generation).await)
                }));
            }
            Effect::Adopt => self.work = Some(Box::pin(async move { Done::Adopted(hypervisor.adopt(vm).await) })),
            Effect::DeleteDisks => {
                self.work = Some(Box::pin(async move { Done::Deleted(hypervisor.delete_disks(vm, &desired).await) }));
            }
            Effect::Kill => {
                if let Some(instance) = &self.instance {
                    info!(incarnation = %instance.incarnation(), "killing");
                    instance.kill();
                }
            }
            Effect::Persist | Effect::PowerDown | Effect::Reset | Effect::Quit | Effect::TendDisks | Effect::GoOn => {}
            Effect::Look | Effect::Listen | Effect::Send | Effect::SendMemory | Effect::Continue | Effect::Cancel => {}
            Effect::Resume | Effect::Pause => {}
        }
    }

    /// Waits until the lease is over, or another one.
    fn lease_over(&self, class: LeaseClass, generation: u16) -> impl Future<Output = ()> + Send + 'static {
        let (lease, clock) = (Arc::clone(&self.host.lease), self.host.clock.clone());
        async move {
            while lease.word(class).permits(generation, clock.now()) {
                time::sleep(LEASE_LOOK).await;
            }
        }
    }

    fn publish(&mut self) {
        let report = self.state.report();
        let (state, incarnation, reason) = (report.state, report.incarnation, report.reason.clone());
        if self.host.outbox.put(self.vm, report) && self.shown != Some(state) {
            info!(%incarnation, ?state, "{reason}");
        }
        self.shown = Some(state);
    }
}

async fn command(instance: &impl Instance, effect: Effect) {
    info!(incarnation = %instance.incarnation(), "telling QEMU: {effect:?}");
    let answer = match effect {
        Effect::PowerDown => instance.power_down().await,
        Effect::Reset => instance.reset().await,
        Effect::Quit => instance.quit().await,
        Effect::Persist
        | Effect::Prepare
        | Effect::CancelPrepare
        | Effect::Launch { .. }
        | Effect::Adopt
        | Effect::Kill
        | Effect::Look
        | Effect::Listen
        | Effect::Send
        | Effect::SendMemory
        | Effect::Continue
        | Effect::Cancel
        | Effect::Resume
        | Effect::Pause
        | Effect::TendDisks
        | Effect::TendIdle { .. }
        | Effect::CancelTend
        | Effect::GoOn
        | Effect::DeleteDisks => Ok(()),
    };
    // What does not obey is killed when its grace is over.
    if let Err(reason) = answer {
        warn!("QEMU does not obey {effect:?}: {reason}");
    }
}

/// How it stands with its migration.
async fn look(instance: &impl Instance, copies: Copies) -> Event {
    match instance.standing(copies).await {
        Ok(standing) => Event::Stands(Some(Box::new(standing))),
        Err(reason) => {
            debug!("QEMU does not say how it stands: {reason}");
            Event::Stands(None)
        }
    }
}

/// Has QEMU take a step of a migration. Returns what is to be known of it; the rest is seen by looking.
async fn take_step<H: Hypervisor>(
    hypervisor: &H,
    vm: VmId,
    instance: &H::Instance,
    effect: Effect,
    step: Step,
) -> Option<Event> {
    info!(incarnation = %instance.incarnation(), "telling QEMU: {effect:?}");
    let taken = hypervisor.step(vm, instance, step).await;
    taken.err().map(|reason| {
        warn!("QEMU does not obey {effect:?}: {reason}");
        Event::StepFailed(reason)
    })
}

/// Has QEMU put the disks in order.
async fn tend_disks<H: Hypervisor>(hypervisor: &H, vm: VmId, instance: &H::Instance, desired: &Desired) -> Event {
    match hypervisor.tend_disks(vm, instance, desired).await {
        Ok(done) => Event::DisksTended(done),
        Err(reason) => {
            warn!("the disks are not as they should be: {reason}");
            Event::TendFailed(reason)
        }
    }
}

async fn do_work<H: Hypervisor>(work: &mut Option<Work<H>>) -> Done<H> {
    match work {
        Some(work) => work.await,
        None => pending().await,
    }
}

async fn next_event<I: Instance>(instance: &mut Option<I>) -> InstanceEvent {
    match instance {
        Some(instance) => instance.next_event().await,
        None => pending().await,
    }
}

async fn sleep_until(clock: &Clock, deadline: Option<Tick>) {
    match deadline {
        Some(deadline) => time::sleep(deadline.since(clock.now())).await,
        None => pending().await,
    }
}

fn write(dirs: &VmDirs, record: &Record) -> Result<(), crate::records::Error> {
    dirs.write(record)
}

/// Runs what may wait for a disk beside the tasks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("it does not panic, and the runtime ends after the tasks")
}

/// An error with what caused it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use uncloud_proto::clock::WallTime;
    use uuid::Uuid;

    use super::*;
    use crate::vm::{
        fake::{FakeHypervisor, World, desired},
        state::Acceptance,
    };

    /// P1: the runner hears of a new lease generation by itself, whatever else makes it look, and that may be before it
    /// has taken the mail which says that the session of its word is over.
    #[tokio::test]
    async fn a_new_lease_is_never_seen_before_the_end_of_the_session() {
        let dir = tempfile::tempdir().unwrap();
        let now = Tick::from_boot(Duration::from_secs(100));
        let clock = Clock::custom(move || now, || WallTime(0));
        let lease = Arc::new(LeaseFile::open(&dir.path().join("lease"), Uuid::from_u128(1)).unwrap());
        let world = Arc::new(World::default());
        let hypervisor = FakeHypervisor { world, lease: Arc::clone(&lease), clock: clock.clone() };
        let host = Host {
            hypervisor: Arc::new(hypervisor),
            lease: Arc::clone(&lease),
            clock,
            dirs: VmDirs::at(dir.path().to_owned()),
            outbox: SharedOutbox::default(),
        };
        let (vm, mailbox) = (VmId::from_uuid(Uuid::from_u128(1)), Mailbox::default());
        let mut runner = Runner::new(vm, VmState::new(vm), host, mailbox.clone(), Directory::default());

        let waits_for = lease.word(LeaseClass::Fast).generation.wrapping_add(1);
        runner.handle(Event::Desired(Box::new(desired(1)), Acceptance::Expected(waits_for))).await;
        mailbox.session_ended(Generations { fast: waits_for.wrapping_sub(1), patient: 0 });
        let word = lease.renew(LeaseClass::Fast, now.after(Duration::from_secs(6)), now);
        assert_eq!(word.generation, waits_for);
        runner.handle(Event::Wake).await;
        assert!(runner.work.is_none(), "nothing is prepared");
    }
}
