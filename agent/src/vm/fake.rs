//! A hypervisor without processes, for tests. It watches P1 by itself: a second instance of one VM is a violation.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::{Notify, mpsc};
use uncloud_proto::{
    clock::{Clock, WallTime},
    ids::{Incarnation, VmId},
};

use super::migration::{Copies, Guest, Mirror, Progress, Standing, Step, Transfer};
use super::{
    desired::{
        Class, CpuModel, Desired, DisksExpected, Display, Disposition, Firmware, GuestAgent, Machine, Pause,
        RestartMode, RestartPolicy, Spec, StopMode,
    },
    hypervisor::{Adoption, Exit, ExitKind, Hypervisor, Instance, InstanceEvent, LaunchError},
};
use crate::lease::LeaseFile;

/// A VM without disks that should run.
pub(crate) fn desired(incarnation: u64) -> Desired {
    Desired {
        incarnation: Incarnation(incarnation),
        disposition: Disposition::Run,
        name: "web".into(),
        owner: "default".into(),
        spec: Some(Spec {
            vcpus: 1,
            memory_mib: 64,
            machine: Machine::Pc,
            kernel: None,
            disks: vec![],
            nics: vec![],
            restart: RestartPolicy::OnFailure,
            class: Class::Fast,
            priority: 0,
            stop_grace_seconds: 60,
            display: Display::None,
            guest_agent: GuestAgent::Disabled,
            firmware: Firmware::Bios,
            cpu: CpuModel::V2,
            cloud_init: None,
            disk_hotplug: Default::default(),
        }),
        images: vec![],
        restarts: 0,
        restart_mode: RestartMode::Graceful,
        stop_mode: StopMode::Graceful,
        disks: DisksExpected::New,
        disk_generation: 0,
        migrate_to: None,
        void: None,
        migration_secret: String::new(),
        pause: Pause::GoOn,
        network_pools: std::collections::BTreeMap::new(),
        next: None,
        orders: Default::default(),
        clone_from: None,
    }
}

/// A guest that is part of no migration.
fn executes() -> Standing {
    let (guest, transfer) = (Guest::Executes, Transfer::None);
    Standing {
        guest,
        transfer,
        address: None,
        disks_address: None,
        mirror: Mirror::None,
        progress: Progress::default(),
        problem: String::new(),
    }
}

/// What "executes" on the host. Outlives a [`FakeHypervisor`], as processes outlive an agent.
#[derive(Default)]
pub(crate) struct World {
    inner: Mutex<Inner>,
    /// Launches wait for [`FakeHypervisor::release`] when it is set.
    hold: AtomicBool,
    released: Notify,
}

#[derive(Default)]
struct Inner {
    executing: BTreeMap<VmId, (Incarnation, u16, mpsc::UnboundedSender<InstanceEvent>)>,
    exits: BTreeMap<VmId, Exit>,
    launched: Vec<(VmId, Incarnation)>,
    deleted: Vec<VmId>,
    commands: Vec<&'static str>,
    failures: VecDeque<LaunchError>,
    standings: BTreeMap<VmId, Standing>,
    violations: Vec<String>,
}

impl World {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
    pub(crate) fn executing(&self) -> Vec<(VmId, Incarnation)> {
        self.lock().executing.iter().map(|(vm, (i, ..))| (*vm, *i)).collect()
    }
    pub(crate) fn launched(&self) -> Vec<u64> {
        self.lock().launched.iter().map(|(_, i)| i.0).collect()
    }
    pub(crate) fn deleted(&self) -> Vec<VmId> {
        self.lock().deleted.clone()
    }
    pub(crate) fn commands(&self) -> Vec<&'static str> {
        self.lock().commands.clone()
    }
    pub(crate) fn fail_next(&self, error: LaunchError) {
        self.lock().failures.push_back(error);
    }
    /// The guest powers itself off, panics, or QEMU dies.
    pub(crate) fn guest(&self, vm: VmId, event: InstanceEvent) {
        let inner = self.lock();
        let _ = inner.executing[&vm].2.send(event);
    }
    pub(crate) fn end(&self, vm: VmId, kind: ExitKind) {
        let mut inner = self.lock();
        if let Some((incarnation, _, events)) = inner.executing.remove(&vm) {
            let exit = Exit { incarnation, kind, at: WallTime(1), last_words: String::new() };
            inner.exits.insert(vm, exit.clone());
            let _ = events.send(InstanceEvent::Ended(exit));
        }
    }
    pub(crate) fn assert_p1(&self) {
        assert_eq!(self.lock().violations, Vec::<String>::new());
    }
    /// From now on launches wait until they are released.
    pub(crate) fn hold_launches(&self) {
        self.hold.store(true, Ordering::SeqCst);
    }
    pub(crate) fn release_launches(&self) {
        self.hold.store(false, Ordering::SeqCst);
        self.released.notify_waiters();
    }
}

/// The hypervisor of one agent.
pub(crate) struct FakeHypervisor {
    pub(crate) world: Arc<World>,
    pub(crate) lease: Arc<LeaseFile>,
    pub(crate) clock: Clock,
}

/// One VM that "executes".
#[derive(Debug)]
pub(crate) struct FakeInstance {
    vm: VmId,
    incarnation: Incarnation,
    generation: u16,
    world: Arc<World>,
    events: mpsc::UnboundedReceiver<InstanceEvent>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl Hypervisor for FakeHypervisor {
    type Instance = FakeInstance;
    type Prepared = ();

    async fn prepare(&self, _: VmId, _: &Desired) -> Result<(), String> {
        Ok(())
    }

    async fn launch(&self, vm: VmId, desired: &Desired, (): (), generation: u16) -> Result<FakeInstance, LaunchError> {
        loop {
            let released = self.world.released.notified();
            if !self.world.hold.load(Ordering::SeqCst) {
                break;
            }
            released.await;
        }
        let mut inner = self.world.lock();
        if let Some(error) = inner.failures.pop_front() {
            return Err(error);
        }
        // As the keeper does.
        if !self.lease.word(desired.class()).permits(generation, self.clock.now()) {
            return Err(LaunchError::Fenced);
        }
        if inner.executing.contains_key(&vm) {
            inner.violations.push(format!("{vm} was launched while it executes"));
            return Err(LaunchError::Busy);
        }
        let (sender, events) = mpsc::unbounded_channel();
        inner.executing.insert(vm, (desired.incarnation, generation, sender));
        inner.launched.push((vm, desired.incarnation));
        inner.exits.remove(&vm);
        Ok(FakeInstance { vm, incarnation: desired.incarnation, generation, world: Arc::clone(&self.world), events })
    }

    async fn adopt(&self, vm: VmId) -> Adoption<FakeInstance> {
        let mut inner = self.world.lock();
        if let Some((incarnation, generation, sender)) = inner.executing.get_mut(&vm) {
            let (new, events) = mpsc::unbounded_channel();
            *sender = new;
            let (incarnation, generation) = (*incarnation, *generation);
            let world = Arc::clone(&self.world);
            return Adoption::Running(FakeInstance { vm, incarnation, generation, world, events });
        }
        inner.exits.get(&vm).map_or(Adoption::Never, |exit| Adoption::Ended(exit.clone()))
    }

    async fn step(&self, _: VmId, instance: &FakeInstance, step: Step) -> Result<(), String> {
        let mut inner = self.world.lock();
        let standing = inner.standings.entry(instance.vm).or_insert_with(executes);
        match step {
            Step::Listen { .. } => standing.address = Some("127.0.0.1:1".parse().unwrap()),
            Step::Send(_) | Step::SendMemory(_) => standing.transfer = Transfer::Active,
            Step::Continue(_) => (standing.transfer, standing.guest) = (Transfer::Completed, Guest::Sent),
            Step::Cancel => (standing.transfer, standing.guest) = (Transfer::Cancelled, Guest::Executes),
            Step::Resume => standing.guest = Guest::Executes,
            Step::Pause => standing.guest = Guest::Still,
        }
        Ok(())
    }

    async fn delete_disks(&self, vm: VmId, _: &Desired) -> Result<(), String> {
        let mut inner = self.world.lock();
        if inner.executing.contains_key(&vm) {
            inner.violations.push(format!("the disks of {vm} were deleted while it executes"));
        }
        inner.deleted.push(vm);
        Ok(())
    }
}

impl Instance for FakeInstance {
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
        self.world.lock().commands.push("power-down");
        Ok(())
    }
    async fn reset(&self) -> Result<(), String> {
        self.world.lock().commands.push("reset");
        Ok(())
    }
    async fn quit(&self) -> Result<(), String> {
        self.world.lock().commands.push("quit");
        self.world.end(self.vm, ExitKind::Exited(0));
        Ok(())
    }
    async fn standing(&self, _: Copies) -> Result<Standing, String> {
        Ok(self.world.lock().standings.entry(self.vm).or_insert_with(executes).clone())
    }
    fn kill(&self) {
        self.world.lock().commands.push("kill");
        self.world.end(self.vm, ExitKind::Signaled(9));
    }
    async fn next_event(&mut self) -> InstanceEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
