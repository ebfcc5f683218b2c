//! What executes on all machines: a hypervisor below the agents' real code, and keepers that end VMs at the deadline.
//!
//! # Invariants
//!
//! * **P1** No two executions of a VM overlap in true time. Checked at each launch, over all machines.
//! * Incarnations only grow; on another machine a VM has a larger one.
//!
//! A keeper looks at its lease each time the simulation is stepped, with its machine's clock, and then the VM is gone at
//! once: that a kill takes time is not simulated.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::mpsc, time};
use uncloud_agent::{
    lease::{LeaseClass, LeaseView},
    vm::{
        desired::Desired,
        hypervisor::{Adoption, Exit, ExitKind, Hypervisor, Instance, InstanceEvent, LaunchError},
        migration::{Copies, Standing, Step},
    },
};
use uncloud_proto::{
    clock::{Clock, WallTime},
    ids::{Incarnation, VmId},
};

use super::time::TrueTime;

/// How long a start takes.
const START: Duration = Duration::from_millis(40);

/// Everything that executes anywhere. Cheap to clone.
#[derive(Clone, Default)]
pub struct Guests {
    inner: Arc<Mutex<Inner>>,
    time: TrueTime,
    keepers: Keepers,
}

/// Whether keepers do what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keepers {
    /// They end a VM at the deadline.
    #[default]
    Watch,
    /// They do not: to see that what is wrong then is found.
    Sleep,
}

#[derive(Default)]
struct Inner {
    executing: Vec<Execution>,
    exits: BTreeMap<(usize, VmId), Exit>,
    newest: BTreeMap<VmId, (Incarnation, usize)>,
    violations: Vec<String>,
    starts: u64,
    expired: u64,
    trace: DefaultHasher,
}

struct Execution {
    vm: VmId,
    name: String,
    machine: usize,
    incarnation: Incarnation,
    generation: u16,
    class: LeaseClass,
    lease: Arc<LeaseView>,
    clock: Clock,
    events: mpsc::UnboundedSender<InstanceEvent>,
}

/// What happened, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// VMs that were started.
    pub starts: u64,
    /// VMs that a keeper ended at the deadline.
    pub expired: u64,
    /// A hash over every start and end, by name and time.
    pub trace: u64,
}

impl Guests {
    /// Nothing executes.
    #[must_use]
    pub fn new(time: TrueTime, keepers: Keepers) -> Self {
        Self { inner: Arc::default(), time, keepers }
    }

    /// Lets the keepers look at their leases.
    pub fn tick(&self) {
        if self.keepers == Keepers::Sleep {
            return;
        }
        let now = self.time.now();
        let mut inner = self.lock();
        let over = |e: &Execution| !e.lease.word(e.class).permits(e.generation, e.clock.now());
        while let Some(i) = inner.executing.iter().position(over) {
            inner.expired += 1;
            inner.end(i, ExitKind::Signaled(9), now);
        }
    }

    /// A machine loses its power: what executed there is gone, and nothing is left that knows of it.
    pub fn power_off(&self, machine: usize) {
        let mut inner = self.lock();
        inner.executing.retain(|e| e.machine != machine);
        inner.exits.retain(|(m, _), _| *m != machine);
    }

    /// What executes, and where.
    #[must_use]
    pub fn executing(&self) -> Vec<(VmId, usize)> {
        let mut list: Vec<_> = self.lock().executing.iter().map(|e| (e.vm, e.machine)).collect();
        list.sort_unstable();
        list
    }

    /// What must not be and was.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// What happened.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts { starts: inner.starts, expired: inner.expired, trace: inner.trace.finish() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_of(&self, vm: VmId, machine: usize, kind: ExitKind) {
        let now = self.time.now();
        let mut inner = self.lock();
        if let Some(i) = inner.executing.iter().position(|e| e.vm == vm && e.machine == machine) {
            inner.end(i, kind, now);
        }
    }
}

impl Inner {
    fn end(&mut self, index: usize, kind: ExitKind, now: Duration) {
        let gone = self.executing.remove(index);
        (now, &gone.name, gone.machine, "end").hash(&mut self.trace);
        let at = WallTime(u64::try_from(now.as_millis()).unwrap_or(0));
        let exit = Exit { incarnation: gone.incarnation, kind, at, last_words: String::new() };
        self.exits.insert((gone.machine, gone.vm), exit.clone());
        // The agent may be away; it will find the exit.
        let _ = gone.events.send(InstanceEvent::Ended(exit));
    }

    fn check_launch(&mut self, vm: VmId, incarnation: Incarnation, machine: usize, now: Duration) {
        for other in self.executing.iter().filter(|e| e.vm == vm) {
            self.violations.push(format!(
                "P1: at {now:?} {vm} ({incarnation}) was started on machine {machine} while {} executed on machine {}",
                other.incarnation, other.machine
            ));
        }
        if let Some((newest, on)) = self.newest.get(&vm)
            && (incarnation < *newest || incarnation == *newest && machine != *on)
        {
            let problem = format!("at {now:?} {vm} was started as {incarnation} on {machine} after {newest} on {on}");
            self.violations.push(problem);
        }
        self.newest.insert(vm, (incarnation, machine));
    }
}

/// The hypervisor of one machine.
pub struct SimHypervisor {
    /// Everything that executes anywhere.
    pub guests: Guests,
    /// Which machine this is.
    pub machine: usize,
    /// Its lease, as keepers see it.
    pub lease: Arc<LeaseView>,
    /// Its clock.
    pub clock: Clock,
}

/// One VM that executes.
pub struct SimInstance {
    vm: VmId,
    machine: usize,
    incarnation: Incarnation,
    generation: u16,
    guests: Guests,
    tell: mpsc::UnboundedSender<InstanceEvent>,
    events: mpsc::UnboundedReceiver<InstanceEvent>,
}

impl std::fmt::Debug for SimInstance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} on {}", self.vm, self.incarnation, self.machine)
    }
}

impl SimHypervisor {
    fn instance(
        &self,
        vm: VmId,
        incarnation: Incarnation,
        generation: u16,
    ) -> (SimInstance, mpsc::UnboundedSender<InstanceEvent>) {
        let (tell, events) = mpsc::unbounded_channel();
        let (machine, guests) = (self.machine, self.guests.clone());
        (SimInstance { vm, machine, incarnation, generation, guests, tell: tell.clone(), events }, tell)
    }
}

impl Hypervisor for SimHypervisor {
    type Instance = SimInstance;
    type Prepared = ();

    async fn prepare(&self, _: VmId, _: &Desired) -> Result<(), String> {
        Ok(())
    }

    async fn launch(&self, vm: VmId, desired: &Desired, (): (), generation: u16) -> Result<SimInstance, LaunchError> {
        time::sleep(START).await;
        // As the keeper does, just before it lets the guest execute.
        let class = desired.class();
        if !self.lease.word(class).permits(generation, self.clock.now()) {
            return Err(LaunchError::Fenced);
        }
        let now = self.guests.time.now();
        let incarnation = desired.incarnation;
        let (instance, events) = self.instance(vm, incarnation, generation);
        let mut inner = self.guests.lock();
        inner.check_launch(vm, incarnation, self.machine, now);
        inner.starts += 1;
        (now, &desired.name, self.machine, "start").hash(&mut inner.trace);
        inner.exits.remove(&(self.machine, vm));
        inner.executing.push(Execution {
            vm,
            name: desired.name.clone(),
            machine: self.machine,
            incarnation,
            generation,
            class,
            lease: Arc::clone(&self.lease),
            clock: self.clock.clone(),
            events,
        });
        Ok(instance)
    }

    async fn adopt(&self, vm: VmId) -> Adoption<SimInstance> {
        let mut inner = self.guests.lock();
        if let Some(execution) = inner.executing.iter_mut().find(|e| e.vm == vm && e.machine == self.machine) {
            let (instance, events) = self.instance(vm, execution.incarnation, execution.generation);
            execution.events = events;
            return Adoption::Running(instance);
        }
        inner.exits.get(&(self.machine, vm)).map_or(Adoption::Never, |exit| Adoption::Ended(exit.clone()))
    }

    async fn step(&self, _: VmId, _: &SimInstance, _: Step) -> Result<(), String> {
        Err("machines here have no migration address".to_owned())
    }

    async fn delete_disks(&self, vm: VmId, _: &Desired) -> Result<(), String> {
        let mut inner = self.guests.lock();
        if inner.executing.iter().any(|e| e.vm == vm) {
            inner.violations.push(format!("the disks of {vm} were deleted while it executes"));
        }
        Ok(())
    }
}

impl Instance for SimInstance {
    fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn lease_generation(&self) -> u16 {
        self.generation
    }

    fn pid(&self) -> u32 {
        1
    }

    async fn power_down(&self) -> Result<(), String> {
        // A guest that obeys at once.
        let _ = self.tell.send(InstanceEvent::GuestShutdown);
        Ok(())
    }

    async fn reset(&self) -> Result<(), String> {
        Ok(())
    }

    async fn quit(&self) -> Result<(), String> {
        self.guests.end_of(self.vm, self.machine, ExitKind::Exited(0));
        Ok(())
    }

    async fn standing(&self, _: Copies) -> Result<Standing, String> {
        Err("nothing migrates here".to_owned())
    }

    fn kill(&self) {
        self.guests.end_of(self.vm, self.machine, ExitKind::Signaled(9));
    }

    async fn next_event(&mut self) -> InstanceEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
