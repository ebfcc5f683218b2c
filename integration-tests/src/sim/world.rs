//! The world: everything that there is, one thing after the other in the order of true time.

use std::collections::BTreeMap;

use uncloud_controller::model::{Desired, HostMode, Key, Phase, Record, VmRecord, VmStatusRecord, vm::RestartPolicy};
use uncloud_proto::ids::{HostId, VmId};
use uuid::Uuid;

use super::{
    clock::{MS, Ns, SEC},
    controller::Controller,
    core::{Core, Mode},
    etcd::Etcd,
    host::Host,
    net::{AGENT, CONTROLLER},
    queue::{Event, What, Whom},
    user::{Failovers, User},
};

/// Within this time of the last fault everything that should run does. The longest wait between two starts is 5 minutes.
const RECOVERY: Ns = 700 * SEC;
/// The id of the shared pool.
const SHARED: Uuid = Uuid::from_u128(0x54a4ed);

/// Everything.
#[derive(Debug)]
pub(crate) struct World {
    pub(super) core: Core,
    pub(super) etcd: Etcd,
    pub(super) controllers: Vec<Controller>,
    pub(super) hosts: Vec<Host>,
    user: User,
    backlogs: [BTreeMap<usize, Vec<Event>>; 2],
    etcd_backlog: Vec<Event>,
}

impl World {
    /// A world from a seed.
    #[must_use]
    pub(crate) fn new(seed: u64, mode: Mode) -> Self {
        let mut core = Core::new(seed, mode);
        let etcd = Etcd::new(&mut core);
        let controllers = (0..core.config.controllers).map(|i| Controller::new(&mut core, i)).collect();
        // Now and then one host has something else mounted there.
        let odd = core.rng.permille(100);
        let pool = |i: usize| if odd && i == 0 { Uuid::from_u128(0xbad) } else { SHARED };
        let hosts = (0..core.config.hosts).map(|i| Host::new(&mut core, i, pool(i))).collect();
        let user = User::default();
        Self { core, etcd, controllers, hosts, user, backlogs: Default::default(), etcd_backlog: Vec::new() }
    }

    /// What is shared, for reports.
    #[must_use]
    pub(crate) const fn core(&self) -> &Core {
        &self.core
    }

    /// Prints every line of the trace.
    pub(crate) fn be_verbose(&mut self) {
        self.core.trace.verbose = true;
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        let result = self.acts();
        self.core.stats.simulated = self.core.now;
        result
    }

    fn acts(&mut self) -> Result<(), String> {
        self.core.log(format_args!("{:?}", self.core.config.clone()));
        for controller in &mut self.controllers {
            controller.start(&mut self.core);
        }
        for host in &mut self.hosts {
            host.power_on(&mut self.core);
        }
        self.core.after(5 * SEC, Whom::User, 0, What::UserNext);
        self.run_until(10 * SEC)?;
        self.next_fault();
        let end = self.core.now + self.core.config.faults_for;
        self.run_until(end)?;
        if self.core.config.mode == Mode::WildClocks {
            return Ok(());
        }
        self.heal_all();
        self.recover()?;
        self.disturb_nobody()
    }

    fn heal_all(&mut self) {
        self.core.healed = true;
        self.core.log(format_args!("the faults are over"));
        for healing in self.core.queue.healings() {
            self.heal(healing);
        }
        self.user.idle = true;
    }

    fn recover(&mut self) -> Result<(), String> {
        let healed = self.core.now;
        loop {
            let next = self.core.now + SEC;
            self.run_until(next)?;
            match self.settled() {
                Ok(()) => break,
                Err(what) if self.core.now > healed + RECOVERY => {
                    return Err(format!("{} s after the last fault: {what}", RECOVERY / SEC));
                }
                Err(_) => {}
            }
        }
        self.core.stats.slowest_recovery = self.core.now - healed;
        let vms: Vec<VmId> = self.records().map(|(vm, _)| vm.id).collect();
        vms.into_iter().for_each(|vm| self.core.check.compare(vm));
        self.violated()
    }

    /// P3: with all well, every process of the control plane is started again, one after the other, and no VM notices.
    fn disturb_nobody(&mut self) -> Result<(), String> {
        if self.core.config.timings.iter().any(|t| t.fast.as_secs() < 6) {
            return Ok(()); // an election takes too much of such a short lease
        }
        // What is still on its way arrives.
        let mut good = 0;
        let end = self.core.now + RECOVERY;
        while good < 5 && self.core.now < end {
            let next = self.core.now + SEC;
            self.run_until(next)?;
            good = if self.settled().is_ok() { good + 1 } else { 0 };
        }
        self.core.check.quiet = true;
        self.core.log(format_args!("all is well: from here on nothing may stop"));
        for i in 0..self.controllers.len() {
            self.kill_controller(i);
            let back = self.core.now + 500 * MS;
            self.run_until(back)?;
            self.controllers[i].start(&mut self.core);
            let next = self.core.now + 9 * SEC;
            self.run_until(next)?;
        }
        for h in 0..self.hosts.len() {
            self.kill_agent(h);
            let back = self.core.now + 1500 * MS;
            self.run_until(back)?;
            self.hosts[h].start_agent(&mut self.core);
        }
        let end = self.core.now + 10 * SEC;
        self.run_until(end)?;
        self.settled()
    }

    fn run_until(&mut self, end: Ns) -> Result<(), String> {
        while let Some((at, event)) = self.core.queue.pop(end) {
            self.core.now = at;
            self.core.stats.events += 1;
            self.step(event);
            self.violated()?;
        }
        self.core.now = end;
        Ok(())
    }

    fn violated(&self) -> Result<(), String> {
        self.core.check.violated().map_or(Ok(()), |what| Err(what.to_owned()))
    }

    fn step(&mut self, event: Event) {
        let Event { whom, epoch, what } = event.clone();
        let core = &mut self.core;
        match whom {
            Whom::Controller(i) => {
                let controller = &mut self.controllers[i];
                if !controller.alive {
                    if let What::Up(stream, _) = what {
                        core.close(stream, CONTROLLER); // connection refused
                    }
                } else if epoch != u64::MAX && epoch != controller.epoch {
                } else if controller.paused > 0 {
                    self.backlogs[CONTROLLER].entry(i).or_default().push(event);
                } else {
                    controller.on(core, what);
                }
            }
            Whom::Agent(h) => {
                let host = &mut self.hosts[h];
                if host.agent.is_none() || epoch != host.agent_epoch {
                } else if host.agent_paused > 0 {
                    self.backlogs[AGENT].entry(h).or_default().push(event);
                } else {
                    host.on_agent(core, what);
                }
            }
            Whom::Keeper(h, vm, uid) => {
                let host = &mut self.hosts[h];
                if host.boot != epoch {
                    return;
                }
                if let Some(qemu) = host.qemus.get_mut(&vm).filter(|q| q.uid == uid) {
                    if qemu.paused > 0 {
                        qemu.backlog.push(event);
                    } else {
                        host.on_keeper(core, vm, what);
                    }
                }
            }
            Whom::Kernel(h) => {
                if self.hosts[h].powered && (self.hosts[h].boot == epoch || epoch == u64::MAX) {
                    self.hosts[h].on_kernel(core, what);
                }
            }
            Whom::Etcd if self.etcd.paused > 0 => self.etcd_backlog.push(event),
            Whom::Etcd => match what {
                What::Request(from, epoch, rpc, request) => self.etcd.request(core, from, epoch, rpc, *request),
                What::Expire => self.etcd.expire(core),
                _ => {}
            },
            Whom::User => match what {
                What::UserNext => {
                    let hosts: Vec<HostId> = self.hosts.iter().map(|h| h.id).collect();
                    let cordoned: Vec<HostId> = self.etcd.records().filter_map(|(_, r)| cordoned(r)).collect();
                    let paused: Vec<VmId> = self.etcd.records().filter_map(|(_, r)| paused(r)).collect();
                    let failover = failover(&self.etcd);
                    self.user.next(core, &hosts, &cordoned, &paused, failover);
                }
                What::Answer(op, answered) => self.user.answered(core, op, *answered),
                What::UserTimeout(op) => self.user.timeout(core, op),
                _ => {}
            },
            Whom::World => match what {
                What::Fault if !core.healed => {
                    self.fault();
                    self.next_fault();
                }
                What::Heal(healing) => self.heal(healing),
                What::Silence(stream, end) => {
                    let Some([host, controller]) = core.net.ends(stream) else { return };
                    let (h, c) = (&self.hosts[host], &self.controllers[controller]);
                    let dead = [h.agent.is_none() || h.agent_paused > 0, !c.alive || c.paused > 0];
                    core.silence(stream, end, dead);
                }
                _ => {}
            },
        }
    }

    // --- faults that need more than one part ---

    pub(super) fn kill_controller(&mut self, i: usize) {
        self.controllers[i].kill(&mut self.core);
        self.controllers[i].paused = 0;
        self.backlogs[CONTROLLER].remove(&i);
    }

    pub(super) fn kill_agent(&mut self, h: usize) {
        self.hosts[h].kill_agent(&mut self.core);
        self.hosts[h].agent_paused = 0;
        self.backlogs[AGENT].remove(&h);
    }

    pub(super) fn power_off(&mut self, h: usize) {
        self.hosts[h].power_off(&mut self.core);
        self.hosts[h].agent_paused = 0;
        self.backlogs[AGENT].remove(&h);
    }

    /// The other ends of a stopped process's streams will miss it.
    pub(super) fn suspect_all(&mut self, end: usize, index: usize) {
        for stream in self.core.streams_of(end, index) {
            self.core.suspect(stream, 1 - end);
        }
    }

    pub(super) fn thaw_controller(&mut self, i: usize) {
        self.controllers[i].paused = self.controllers[i].paused.saturating_sub(1);
        if self.controllers[i].paused == 0 {
            let waiting = self.backlogs[CONTROLLER].remove(&i).unwrap_or_default();
            self.again(waiting);
        }
    }

    pub(super) fn thaw_agent(&mut self, h: usize) {
        self.hosts[h].agent_paused = self.hosts[h].agent_paused.saturating_sub(1);
        if self.hosts[h].agent_paused == 0 {
            let waiting = self.backlogs[AGENT].remove(&h).unwrap_or_default();
            self.again(waiting);
        }
    }

    pub(super) fn thaw_keeper(&mut self, h: usize, vm: VmId, uid: u64) {
        let Some(qemu) = self.hosts[h].qemus.get_mut(&vm).filter(|q| q.uid == uid) else { return };
        qemu.paused = qemu.paused.saturating_sub(1);
        if qemu.paused == 0 {
            let waiting = std::mem::take(&mut qemu.backlog);
            self.again(waiting);
        }
    }

    pub(super) fn thaw_etcd(&mut self) {
        if self.etcd.paused == 0 {
            let waiting = std::mem::take(&mut self.etcd_backlog);
            self.again(waiting);
        }
    }

    /// A process goes on with what has waited for it. What its own timers owe it may come before or after what others sent.
    fn again(&mut self, waiting: Vec<Event>) {
        let timers_first = self.core.rng.permille(500);
        let sent = |e: &Event| matches!(e.what, What::Up(..) | What::Down(..) | What::Rpc(..));
        let (first, second): (Vec<Event>, Vec<Event>) = waiting.into_iter().partition(|e| sent(e) != timers_first);
        for Event { whom, epoch, what } in first.into_iter().chain(second) {
            self.core.after(0, whom, epoch, what);
        }
    }

    // --- whether all is as it should be ---

    fn records(&self) -> impl Iterator<Item = (&VmRecord, Option<&VmStatusRecord>)> {
        self.etcd.records().filter_map(|(_, record)| match record {
            Record::Vm(vm) => {
                let status = match self.etcd.get(&Key::VmStatus(vm.id)) {
                    Some(Record::VmStatus(status)) => Some(&**status),
                    Some(_) | None => None,
                };
                Some((&**vm, status))
            }
            _ => None,
        })
    }

    fn settled(&self) -> Result<(), String> {
        if self.user.busy() {
            return Err("the user's calls are not carried out".into());
        }
        if self.etcd.records().any(|(_, record)| cordoned(record).is_some()) {
            return Err("a host is cordoned".into());
        }
        if failover(&self.etcd) == Failovers::Off {
            return Err("failover is off".into());
        }
        for (vm, status) in self.records() {
            let current = status.filter(|s| s.incarnation == vm.placement.incarnation);
            let phase = current.map(|s| s.phase);
            let executing: Vec<_> = self.core.check.executing().filter(|(id, ..)| *id == vm.id).collect();
            let runs = vm.placement.host.is_some_and(|h| executing == [(vm.id, h, vm.placement.incarnation)]);
            let ok = match vm.desired {
                Desired::Deleted => false,
                // It may be on its way still: being started when it was to stop.
                Desired::Stopped => {
                    let ended = vm.placement.host.is_none() || phase == Some(Phase::Stopped);
                    executing.is_empty() && ended
                }
                Desired::Running => {
                    let given_up = vm.spec.restart == RestartPolicy::Never && phase == Some(Phase::Failed);
                    (runs && phase == Some(Phase::Running)) || (given_up && executing.is_empty())
                }
            };
            if !ok {
                let (id, desired, host) = (vm.id, vm.desired, vm.placement.host);
                let (incarnation, why) = (vm.placement.incarnation, &vm.placement.why);
                let reason = current.map(|s| s.reason.clone()).unwrap_or_default();
                return Err(format!(
                    "VM {id} should be {desired:?} on {host:?} ({incarnation}: {why}) and is {phase:?} ({reason}); \
                     executing: {executing:?}"
                ));
            }
        }
        let stray = self.core.check.executing().find(|(vm, ..)| self.etcd.get(&Key::Vm(*vm)).is_none());
        stray.map_or(Ok(()), |(vm, ..)| Err(format!("VM {vm} executes and has no record")))
    }
}

fn failover(etcd: &Etcd) -> Failovers {
    match etcd.get(&Key::Cluster) {
        Some(Record::Cluster(cluster)) if cluster.failover_off.is_some() => Failovers::Off,
        Some(_) | None => Failovers::On,
    }
}

fn paused(record: &Record) -> Option<VmId> {
    match record {
        Record::Vm(vm) if vm.paused => Some(vm.id),
        _ => None,
    }
}

fn cordoned(record: &Record) -> Option<HostId> {
    match record {
        Record::Host(host) if host.mode != HostMode::Active => Some(host.id),
        _ => None,
    }
}
