//! Tests of the plan against the real state: what the plan asks for is decided and absorbed, as the writer would do it.
//! `driver.rs` has the driver run with a real writer and etcd.

mod driver;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use uncloud_proto::{
    clock::{Tick, WallTime},
    ids::{HostId, Incarnation, Revision, VmId},
};
use uuid::Uuid;

use super::plan::*;
use crate::{
    health::Timings,
    model::{
        ClusterRecord, Desired, Extra, HostMode, HostRecord, Key, Liveness, Record, VmRecord,
        host::{Accelerator, AcceleratorKind},
        vm::{Display, Failover, GuestAgent, Machine, OnDiskLoss, Placement, RestartPolicy, VmSpec},
    },
    state::{
        State,
        command::{Change, Command, Context, Lapsed, Mutation},
    },
};

fn host_id(n: u128) -> HostId {
    HostId::from_uuid(Uuid::from_u128(n))
}

fn vm_id(n: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(n))
}

fn host(n: u128, memory_mib: u64, liveness: Liveness) -> HostRecord {
    HostRecord {
        id: host_id(n),
        name: format!("h{n}"),
        labels: BTreeMap::new(),
        vcpus: 64,
        memory_mib,
        pools: Vec::new(),
        accelerator: Accelerator { kind: AcceleratorKind::Kvm, why: String::new() },
        mode: HostMode::Active,
        mode_reason: String::new(),
        drain_how: Default::default(),
        drain_disks: Default::default(),
        liveness,
        liveness_since: WallTime(0),
        migration_address: "127.0.0.1".into(),
        cpu: Default::default(),
        bridges: BTreeSet::new(),
        agent_version: "1".into(),
        boot_id: Uuid::nil(),
        created: WallTime(0),
        extra: Extra::new(),
    }
}

fn vm(n: u128, memory_mib: u64, host: Option<u128>) -> VmRecord {
    VmRecord {
        id: vm_id(n),
        name: format!("v{n}"),
        owner: "default".into(),
        labels: BTreeMap::new(),
        spec: VmSpec {
            vcpus: 1,
            memory_mib,
            machine: Machine::Q35,
            kernel: None,
            disks: Vec::new(),
            nics: Vec::new(),
            restart: RestartPolicy::OnFailure,
            failover: Failover::Fast,
            on_disk_loss: OnDiskLoss::Wait,
            priority: 0,
            host_labels: BTreeMap::new(),
            anti_affinity_group: None,
            stop_grace_seconds: 60,
            display: Display::None,
            guest_agent: GuestAgent::Disabled,
            firmware: Default::default(),
            cpu: Default::default(),
            cloud_init: None,
            disk_hotplug: Default::default(),
            extra: Extra::new(),
        },
        pending: None,
        desired: Desired::Running,
        migration: None,
        reserved: Incarnation::NONE,
        placement: Placement {
            host: host.map(host_id),
            incarnation: Incarnation(u64::from(host.is_some())),
            why: String::new(),
            since: WallTime(0),
        },
        restarts: 0,
        restart_force: false,
        stop_force: false,
        paused: false,
        moving_out: Incarnation::NONE,
        disks_exist: false,
        disk_home: None,
        disk_generation: 0,
        disks_reserved: 0,
        disks_copied_from: None,
        clone_of: None,
        snapshots: Vec::new(),
        revert: None,
        reverts: 0,
        disk_orders: 0,
        created: WallTime(0),
        extra: Extra::new(),
    }
}

struct World {
    state: State,
    attempts: Attempts,
    silent: BTreeSet<HostId>,
    now: Tick,
    /// Commands that changed something.
    writes: usize,
}

impl World {
    fn new(hosts: impl IntoIterator<Item = HostRecord>, vms: impl IntoIterator<Item = VmRecord>) -> Self {
        let mut world = Self {
            state: State::default(),
            attempts: Attempts::default(),
            silent: BTreeSet::new(),
            now: Tick::ZERO,
            writes: 0,
        };
        for host in hosts {
            world.put(Key::Host(host.id), Record::Host(Arc::new(host)));
        }
        for vm in vms {
            world.put(Key::Vm(vm.id), Record::Vm(Arc::new(vm)));
        }
        world
    }

    fn put(&mut self, key: Key, record: Record) {
        self.absorb(&Change { mutations: vec![Mutation { key, value: Some(record) }] });
    }

    fn absorb(&mut self, change: &Change) {
        let revision = Revision(self.state.revision().0 + 1);
        self.state.absorb(change, revision);
    }

    fn submit(&mut self, command: &Command) {
        let cx = Context {
            now: WallTime(1),
            silent: Arc::new(self.silent.clone()),
            arrived: Arc::default(),
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
        };
        let decision = self.state.decide(command, &cx).unwrap();
        if !decision.change.mutations.is_empty() {
            self.writes += 1;
            self.absorb(&decision.change);
        }
    }

    fn situation(&self) -> Arc<Situation> {
        Arc::new(Situation { openings: self.state.view().openings(), silent: self.silent.clone().into() })
    }

    fn plan(&self) -> Vec<Vec<VmId>> {
        plan(&self.state, &self.attempts, &self.situation(), self.now)
    }

    /// One pass, as the driver makes it. Returns how many VMs were tried.
    fn pass(&mut self) -> usize {
        let (batches, situation) = (self.plan(), self.situation());
        for vms in &batches {
            self.submit(&Command::Place { vms: vms.clone() });
            self.attempts.note(vms, &situation, &self.state, self.now);
        }
        batches.iter().map(Vec::len).sum()
    }

    fn wait(&mut self, ms: u64) {
        self.now = self.now.after(Duration::from_millis(ms));
    }

    fn host_of(&self, n: u128) -> Option<HostId> {
        self.state.vm(vm_id(n)).unwrap().record.placement.host
    }
}

#[test]
fn a_pending_vm_gets_a_host_and_then_there_is_nothing_to_do() {
    let mut w = World::new([host(1, 1024, Liveness::Up)], [vm(1, 512, None)]);
    assert_eq!(w.pass(), 1);
    assert_eq!(w.host_of(1), Some(host_id(1)));
    assert_eq!(w.state.vm(vm_id(1)).unwrap().record.placement.incarnation, Incarnation(1));
    assert_eq!(w.plan(), Vec::<Vec<VmId>>::new());
}

#[test]
fn a_vm_that_fits_nowhere_is_tried_again_when_room_appears_and_rarely_otherwise_and_writes_nothing_new() {
    let mut w = World::new([host(1, 256, Liveness::Up)], [vm(1, 512, None)]);
    assert_eq!(w.pass(), 1);
    let writes = w.writes;
    for _ in 0..49 {
        w.wait(100);
        assert_eq!(w.pass(), 0, "nothing has changed");
    }
    w.wait(100);
    assert_eq!(w.pass(), 1, "after five seconds it is tried all the same");
    assert_eq!(w.writes, writes, "the reason is the same");

    w.put(Key::Host(host_id(2)), Record::Host(Arc::new(host(2, 1024, Liveness::Up))));
    w.wait(100);
    assert_eq!(w.pass(), 0, "not at every change");
    w.wait(150);
    assert_eq!(w.pass(), 1);
    assert_eq!(w.host_of(1), Some(host_id(2)));
    assert_eq!(w.plan(), Vec::<Vec<VmId>>::new());
}

#[test]
fn a_host_that_is_heard_again_is_room_too() {
    let mut w = World::new([host(1, 1024, Liveness::Up)], [vm(1, 512, None)]);
    w.silent.insert(host_id(1));
    assert_eq!(w.pass(), 1);
    assert_eq!(w.host_of(1), None);
    w.silent.clear();
    w.wait(250);
    assert_eq!(w.pass(), 1);
    assert_eq!(w.host_of(1), Some(host_id(1)));
}

#[test]
fn higher_priority_goes_first_and_then_the_largest_and_batches_are_bounded() {
    let mut important = vm(60, 1, None);
    important.spec.priority = 1;
    let others = (1..=2 * BATCH as u128).map(|n| vm(n, 100 + u64::try_from(n).unwrap(), None));
    let w = World::new([host(1, 65536, Liveness::Up)], others.chain([important]));

    let batches = w.plan();
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [BATCH, BATCH, 1]);
    let largest = 2 * BATCH as u128;
    assert_eq!(batches[0][..3], [vm_id(60), vm_id(largest), vm_id(largest - 1)]);
    assert_eq!(batches[2], [vm_id(1)]);
}

#[test]
fn l5_only_the_lapsed_classes_are_moved_and_hold_never() {
    let class = |n, failover| {
        let mut vm = vm(n, 64, Some(1));
        vm.spec.failover = failover;
        vm
    };
    let vms = || [class(1, Failover::Fast), class(2, Failover::Patient), class(3, Failover::Hold)];
    let moved = |liveness| {
        let w = World::new([host(1, 1024, liveness), host(2, 1024, Liveness::Up)], vms());
        w.plan().concat()
    };
    assert_eq!(moved(Liveness::Up), []);
    assert_eq!(moved(Liveness::FastLapsed), [vm_id(1)]);
    assert_eq!(moved(Liveness::Dead), [vm_id(1), vm_id(2)]);
}

#[test]
fn stopped_vms_stay_and_deleted_ones_on_a_lapsed_host_are_handed_on() {
    let mut stopped = vm(1, 64, Some(1));
    stopped.desired = Desired::Stopped;
    let mut deleted = vm(2, 64, Some(1));
    deleted.desired = Desired::Deleted;
    let w = World::new([host(1, 1024, Liveness::Dead), host(2, 1024, Liveness::Up)], [stopped, deleted]);
    assert_eq!(w.plan().concat(), [vm_id(2)]);
}

#[test]
fn a_host_without_a_readable_record_is_not_known_to_be_lost() {
    let w = World::new([host(2, 1024, Liveness::Up)], [vm(1, 64, Some(1))]);
    assert_eq!(w.plan(), Vec::<Vec<VmId>>::new());
}

#[test]
fn what_a_declaration_leaves_over_is_moved_by_the_next_passes_until_nothing_is_left() {
    let vms = (1..=80).map(|n| vm(n, 64, Some(1)));
    let mut w = World::new([host(1, 8192, Liveness::Up), host(2, 8192, Liveness::Up)], vms);
    assert_eq!(w.plan(), Vec::<Vec<VmId>>::new());

    w.submit(&Command::DeclareLapsed { host: host_id(1), lapsed: Lapsed::Fast, limit: BATCH });
    assert_eq!(w.state.host(host_id(1)).unwrap().record.liveness, Liveness::FastLapsed);
    assert_eq!(w.state.vms_on(host_id(2)).count(), BATCH);

    assert_eq!(w.pass(), 80 - BATCH);
    assert_eq!(w.state.vms_on(host_id(2)).count(), 80);
    assert_eq!(w.state.vms_on(host_id(1)).count(), 0);
    for n in 1..=80 {
        assert_eq!(w.state.vm(vm_id(n)).unwrap().record.placement.incarnation, Incarnation(2));
    }
    assert_eq!(w.plan(), Vec::<Vec<VmId>>::new());
}

#[test]
fn vms_of_a_lapsed_host_that_fit_nowhere_do_not_keep_the_reconciler_busy() {
    let mut w =
        World::new([host(1, 8192, Liveness::Dead), host(2, 100, Liveness::Up)], (1..=3).map(|n| vm(n, 64, Some(1))));
    assert_eq!(w.pass(), 3);
    assert_eq!(w.state.vms_on(host_id(2)).count(), 1);
    // What was released on the lapsed host is an opening: one more try, then quiet.
    w.wait(250);
    w.pass();
    let writes = w.writes;
    for _ in 0..40 {
        w.wait(100);
        assert_eq!(w.pass(), 0);
    }
    assert_eq!(w.writes, writes);
}

#[test]
fn w2_a_plan_that_comes_after_its_host_is_back_moves_nothing() {
    let mut patient = vm(2, 64, Some(1));
    patient.spec.failover = Failover::Patient;
    let hosts = [host(1, 1024, Liveness::Dead), host(2, 1024, Liveness::Up)];
    let mut w = World::new(hosts, [vm(1, 64, Some(1)), patient]);
    let stale = w.plan();
    assert_eq!(stale.concat(), [vm_id(1), vm_id(2)]);

    // The host has registered before the plan is carried out.
    w.put(Key::Host(host_id(1)), Record::Host(Arc::new(host(1, 1024, Liveness::Up))));
    w.submit(&Command::Place { vms: stale.concat() });
    assert_eq!((w.host_of(1), w.host_of(2)), (Some(host_id(1)), Some(host_id(1))));
    assert_eq!(w.writes, 0);

    // And is lost again, for the short lease only.
    w.put(Key::Host(host_id(1)), Record::Host(Arc::new(host(1, 1024, Liveness::FastLapsed))));
    w.submit(&Command::Place { vms: stale.concat() });
    assert_eq!((w.host_of(1), w.host_of(2)), (Some(host_id(2)), Some(host_id(1))));
}

#[test]
fn w3_longer_leases_stay_on_record_until_they_have_surely_run_out() {
    let secs = Duration::from_secs;
    let own = Timings { fast: secs(6), patient: secs(30), kill_allowance: secs(1) };
    let record = |fast_lease_ms, patient_lease_ms| ClusterRecord {
        fast_lease_ms,
        patient_lease_ms,
        failover_off: None,
        extra: Extra::new(),
    };
    let millis = Duration::from_millis;
    let stored = record(20_000, 60_000);

    // A predecessor's leases run.
    assert!(shorter_leases(&stored, &own, (millis(7_061), millis(31_302)), Duration::ZERO).is_none());
    let command = shorter_leases(&stored, &own, (millis(7_060), millis(31_300)), Duration::ZERO);
    assert!(matches!(command, Some(Command::SetLeases { fast_lease_ms: 6_000, patient_lease_ms: 30_000 })));
    assert!(
        shorter_leases(&record(6_000, 30_000), &own, (secs(7), secs(31)), Duration::ZERO).is_none(),
        "nothing to do"
    );

    // What is left of a long one is put on record in steps, so that a successor waits no longer than it must.
    let stored = record(3_600_000, 3_600_000);
    assert!(shorter_leases(&stored, &own, (secs(3_550), secs(3_550)), Duration::ZERO).is_none());
    let command = shorter_leases(&stored, &own, (secs(3_500), secs(3_500)), Duration::ZERO);
    assert!(matches!(command, Some(Command::SetLeases { fast_lease_ms: 3_500_000, patient_lease_ms: 3_500_000 })));

    // Failover is off, and no host has asked for a lease yet: what is left of that stays on record, in steps.
    assert!(shorter_leases(&stored, &own, (secs(7), secs(31)), secs(3_599)).is_none());
    let command = shorter_leases(&stored, &own, (secs(7), secs(31)), secs(3_500));
    assert!(matches!(command, Some(Command::SetLeases { fast_lease_ms: 3_500_000, patient_lease_ms: 3_500_000 })));
}
