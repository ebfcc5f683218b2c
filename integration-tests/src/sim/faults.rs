//! What goes wrong, and how it ends.

use uncloud_proto::ids::VmId;

use super::{
    clock::{MS, SEC},
    net::{AGENT, CONTROLLER},
    queue::{Death, What, Whom},
    world::World,
};

/// How a fault ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Healing {
    /// A direction of a link is whole again.
    Link(usize, usize, usize),
    /// A controller reaches etcd again: requests, answers.
    EtcdLink(usize, bool, bool),
    /// etcd is started again.
    EtcdUp,
    /// etcd goes on.
    EtcdThaw,
    /// etcd is as fast as before.
    EtcdFast,
    /// etcd has room again.
    EtcdRoom,
    /// A controller is started again.
    ControllerStart(usize),
    /// A controller goes on.
    ControllerThaw(usize),
    /// An agent is started again.
    AgentStart(usize),
    /// An agent goes on.
    AgentThaw(usize),
    /// A host gets its power back.
    PowerOn(usize),
    /// A keeper goes on.
    KeeperThaw(usize, VmId, u64),
    /// There is room on the disk.
    Room(usize),
    /// Starts are fast again.
    Fast(usize),
    /// Starts succeed again.
    Works(usize),
    /// The network is fast again.
    Network,
}

impl World {
    fn heal_later(&mut self, healing: Healing, low: u64, high: u64) {
        let delay = self.core.between(low, high);
        self.core.after(delay, Whom::World, 0, What::Heal(healing));
    }

    /// How long a fault lasts: mostly about a fast lease, sometimes longer than a patient one.
    fn span(&mut self) -> (u64, u64) {
        match self.core.rng.below(20) {
            0..=6 => (200, 3000),
            7..=13 => (3000, 9000),
            14..=16 => (9000, 25_000),
            _ => (20_000, 80_000),
        }
    }

    /// Something goes wrong.
    pub(super) fn fault(&mut self) {
        let host = self.core.rng.index(self.hosts.len());
        let controller = self.core.rng.index(self.controllers.len());
        let leader = self.controllers.iter().position(|c| c.lead().is_some()).unwrap_or(controller);
        // The leader is the more interesting one.
        let controller = if self.core.rng.permille(500) { leader } else { controller };
        let (low, high) = self.span();
        match self.core.rng.below(24) {
            0..=2 => {
                let all = self.core.rng.permille(600);
                let directions = self.core.rng.pick(&[&[AGENT][..], &[CONTROLLER], &[AGENT, CONTROLLER]]);
                self.note(if directions.len() == 2 { "link cut" } else { "link cut one way" });
                self.core.log(format_args!("fault: host {host} cut from {controller} (all: {all}), {directions:?}"));
                for c in 0..self.controllers.len() {
                    if all || c == controller {
                        for &direction in directions {
                            self.core.cut(host, c, direction, true);
                            self.heal_later(Healing::Link(host, c, direction), low, high);
                        }
                    }
                }
            }
            3 => {
                self.note("controller cut from all hosts");
                self.core.log(format_args!("fault: controller {controller} cut from all hosts"));
                for h in 0..self.hosts.len() {
                    for direction in [AGENT, CONTROLLER] {
                        self.core.cut(h, controller, direction, true);
                        self.heal_later(Healing::Link(h, controller, direction), low, high.min(9000).max(low + 1));
                    }
                }
            }
            4 | 5 => {
                let (up, down) = self.core.rng.pick(&[(true, false), (false, true), (true, true)]);
                self.note("controller cut from etcd");
                self.core.log(format_args!("fault: controller {controller} cut from etcd, up {up}, down {down}"));
                self.etcd.links[controller].cut_up += u32::from(up);
                self.etcd.links[controller].cut_down += u32::from(down);
                // Long enough, now and then, for another leader to give away what this one would still grant.
                let (low, high) = self.core.rng.pick(&[(200, 3000), (200, 6000), (6000, 15_000), (10_000, 40_000)]);
                self.heal_later(Healing::EtcdLink(controller, up, down), low, high);
            }
            6 => self.etcd_fault(),
            7 | 8 => {
                self.note("controller killed");
                self.kill_controller(controller);
                self.heal_later(Healing::ControllerStart(controller), 100, 8000);
            }
            9 | 10 => {
                self.note("controller stopped");
                self.core.log(format_args!("fault: controller {controller} is stopped"));
                self.controllers[controller].paused += 1;
                self.suspect_all(CONTROLLER, controller);
                self.heal_later(Healing::ControllerThaw(controller), 200, 9000);
            }
            11 | 12 => {
                self.note("agent killed");
                self.kill_agent(host);
                self.heal_later(Healing::AgentStart(host), low, high);
            }
            13 | 14 => {
                self.note("agent stopped");
                self.core.log(format_args!("fault: the agent of host {host} is stopped"));
                self.hosts[host].agent_paused += 1;
                self.suspect_all(AGENT, host);
                self.heal_later(Healing::AgentThaw(host), low, high);
            }
            15 => {
                self.note("host without power");
                self.power_off(host);
                self.heal_later(Healing::PowerOn(host), low.max(2000), high.max(5000));
            }
            16 | 17 => self.keeper_fault(host),
            18 => {
                self.note("clock runs at another rate");
                let rate = self.core.clock_rate();
                self.core.log(format_args!("fault: clock of host {host} or controller {controller} runs at {rate}"));
                match self.core.rng.below(3) {
                    0 => self.controllers[controller].clock.set_rate(self.core.now, rate),
                    1 => self.etcd.clock.set_rate(self.core.now, rate),
                    _ => self.hosts[host].set_rate(&mut self.core, rate),
                }
            }
            19 => {
                self.note("disk full");
                self.hosts[host].disk_full += 1;
                self.heal_later(Healing::Room(host), low, high);
            }
            20 => {
                self.note("starts are slow");
                self.hosts[host].slow += 1;
                self.heal_later(Healing::Fast(host), low, high);
            }
            21 => {
                self.note("starts fail");
                self.hosts[host].failing += 1;
                self.heal_later(Healing::Works(host), low, high);
            }
            22 => {
                self.note("network slow");
                self.core.net.slow = self.core.rng.range(50, 3000) * MS;
                self.heal_later(Healing::Network, low, high.min(9000).max(low + 1));
            }
            _ => {
                self.note("brake released by a person");
                let World { controllers, core, .. } = self;
                controllers[leader].release_brake(core);
            }
        }
    }

    fn note(&mut self, kind: &'static str) {
        self.core.stats.fault(kind);
    }

    fn etcd_fault(&mut self) {
        match self.core.rng.below(5) {
            0 => {
                self.note("etcd killed");
                self.core.log(format_args!("fault: etcd dies"));
                self.etcd.down += 1;
                self.heal_later(Healing::EtcdUp, 200, 6000);
            }
            1 => {
                self.note("etcd stopped");
                self.core.log(format_args!("fault: etcd is stopped"));
                self.etcd.paused += 1;
                self.heal_later(Healing::EtcdThaw, 200, 6000);
            }
            2 => {
                self.note("etcd full");
                self.core.log(format_args!("fault: etcd is full"));
                self.etcd.full += 1;
                self.heal_later(Healing::EtcdRoom, 200, 20_000);
            }
            3 => {
                self.note("etcd changes its leader");
                self.core.log(format_args!("fault: etcd changes its leader"));
                self.etcd.restart_leases(self.core.now);
            }
            _ => {
                self.note("etcd slow");
                self.etcd.slow = self.core.rng.range(100, 3000) * MS;
                self.heal_later(Healing::EtcdFast, 500, 8000);
            }
        }
    }

    fn keeper_fault(&mut self, host: usize) {
        let running: Vec<(VmId, u64)> = self.hosts[host].qemus.iter().map(|(vm, q)| (*vm, q.uid)).collect();
        if running.is_empty() {
            return;
        }
        let (vm, uid) = running[self.core.rng.index(running.len())];
        if self.core.rng.permille(400) {
            self.note("keeper killed");
            self.core.log(format_args!("fault: the keeper of {vm} on host {host} is killed"));
            self.core.check.guest_ended(vm, self.core.now);
            let epoch = self.hosts[host].boot;
            self.core.after(MS, Whom::Kernel(host), epoch, What::Dead(vm, uid, Death::KeeperKilled));
            return;
        }
        self.note("keeper stopped");
        self.core.log(format_args!("fault: the keeper of {vm} on host {host} is stopped"));
        let (low, high) = self.span();
        if let Some(qemu) = self.hosts[host].qemus.get_mut(&vm) {
            qemu.paused += 1;
            qemu.was_paused = true;
        }
        self.heal_later(Healing::KeeperThaw(host, vm, uid), low, high);
    }

    /// A fault ends.
    pub(super) fn heal(&mut self, healing: Healing) {
        self.core.log(format_args!("heal: {healing:?}"));
        match healing {
            Healing::Link(host, controller, direction) => self.core.cut(host, controller, direction, false),
            Healing::EtcdLink(controller, up, down) => {
                let link = &mut self.etcd.links[controller];
                link.cut_up = link.cut_up.saturating_sub(u32::from(up));
                link.cut_down = link.cut_down.saturating_sub(u32::from(down));
            }
            Healing::EtcdUp => {
                self.etcd.down = self.etcd.down.saturating_sub(1);
                self.etcd.restart_leases(self.core.now);
            }
            Healing::EtcdThaw => {
                self.etcd.paused = self.etcd.paused.saturating_sub(1);
                self.thaw_etcd();
            }
            Healing::EtcdFast => self.etcd.slow = 0,
            Healing::EtcdRoom => self.etcd.full = self.etcd.full.saturating_sub(1),
            Healing::ControllerStart(i) => self.controllers[i].start(&mut self.core),
            Healing::ControllerThaw(i) => self.thaw_controller(i),
            Healing::AgentStart(h) => self.hosts[h].start_agent(&mut self.core),
            Healing::AgentThaw(h) => self.thaw_agent(h),
            Healing::PowerOn(h) => self.hosts[h].power_on(&mut self.core),
            Healing::KeeperThaw(h, vm, uid) => self.thaw_keeper(h, vm, uid),
            Healing::Room(h) => self.hosts[h].disk_full = self.hosts[h].disk_full.saturating_sub(1),
            Healing::Fast(h) => self.hosts[h].slow = self.hosts[h].slow.saturating_sub(1),
            Healing::Works(h) => self.hosts[h].failing = self.hosts[h].failing.saturating_sub(1),
            Healing::Network => self.core.net.slow = 0,
        }
    }

    /// The next fault comes after a while; some come in bursts.
    pub(super) fn next_fault(&mut self) {
        let mean = self.core.config.fault_every;
        let delay =
            if self.core.rng.permille(300) { self.core.rng.below(mean / 4) } else { self.core.rng.below(2 * mean) };
        self.core.after(delay.min(20 * SEC), Whom::World, 0, What::Fault);
    }
}
