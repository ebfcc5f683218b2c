//! A cluster in memory that checks itself after every change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uncloud_proto::{
    clock::WallTime,
    ids::{HostId, ImageId, Incarnation, Revision, VmId},
    v1,
};
use uuid::Uuid;

use crate::{
    model::{
        Desired, EventType, HostRecord, ImageRecord, Key, Liveness, Phase, Record, VmRecord,
        host::{Accelerator, AcceleratorKind, Pool, PoolAccess},
        image::{DiskFormat, FileRole, ImageFile, ImageKind, ImageState},
        migration::MigrationProgress,
        vm::{
            Disk, Display, Failover, GuestAgent, Machine, Nic, NicKind, OnDiskLoss, RestartPolicy, SnapshotState,
            VmSpec,
        },
    },
    scheduler::Resources,
    sessions::desired::{self, Wanted},
    state::{
        Concerned, MAX_PLACEMENTS, State, Stored, VmEntry,
        command::{
            Answer, Change, Command, Context, HostFacts, Lapsed, MigrationObservation, Mutation, NewVm, ObservedState,
            PowerChange, Refusal, VmObservation,
        },
        concerned,
    },
};

/// The id of the shared pool `shared`.
pub(super) const SHARED: Uuid = Uuid::from_u128(0x54a4ed);

pub(super) fn host_id(n: u128) -> HostId {
    HostId::from_uuid(Uuid::from_u128(0xa000 + n))
}

pub(super) fn vm_id(n: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128((0xbeef_0000 + n) << 96))
}

pub(super) fn image_id(n: u128) -> ImageId {
    ImageId::from_uuid(Uuid::from_u128(0xc000 + n))
}

pub(super) fn local(name: &str) -> Pool {
    Pool {
        name: name.into(),
        shared_id: None,
        capacity_bytes: 1 << 40,
        problem: String::new(),
        access: PoolAccess::Directory,
    }
}

pub(super) fn shared(name: &str) -> Pool {
    Pool { shared_id: Some(SHARED), ..local(name) }
}

pub(super) fn facts(n: u128) -> HostFacts {
    HostFacts {
        id: host_id(n),
        name: format!("host-{n}"),
        labels: BTreeMap::new(),
        vcpus: 4,
        memory_mib: 4096,
        pools: vec![local("local"), shared("shared")],
        accelerator: Accelerator { kind: AcceleratorKind::Kvm, why: "measured".into() },
        migration_address: "127.0.0.1".into(),
        cpu: Default::default(),
        bridges: BTreeSet::new(),
        agent_version: "0.1.0".into(),
        boot_id: Uuid::from_u128(n),
    }
}

pub(super) fn spec() -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib: 1024,
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
        extra: serde_json::Map::new(),
    }
}

pub(super) fn disk(pool: &str) -> Disk {
    Disk { name: "disk0".into(), pool: pool.into(), size_bytes: 1 << 30, ..Disk::default() }
}

pub(super) fn with_disk(pool: &str) -> VmSpec {
    VmSpec { disks: vec![disk(pool)], ..spec() }
}

pub(super) fn nic(mac: &str) -> Nic {
    Nic { kind: NicKind::User, mac: mac.into() }
}

pub(super) fn new_vm(n: u128, spec: VmSpec) -> NewVm {
    NewVm {
        id: vm_id(n),
        name: format!("vm-{n}"),
        owner: "default".into(),
        labels: BTreeMap::new(),
        spec,
        image_names: Vec::new(),
        desired: Desired::Running,
    }
}

pub(super) fn image(n: u128, kind: ImageKind) -> ImageRecord {
    let file = |role, format, size: Option<u64>| ImageFile {
        role,
        source: format!("/images/{n}"),
        sha256: "0".repeat(64),
        size_bytes: 1000,
        format,
        virtual_size_bytes: size,
    };
    ImageRecord {
        id: image_id(n),
        name: format!("image-{n}"),
        kind,
        files: match kind {
            ImageKind::Disk => vec![file(FileRole::Disk, Some(DiskFormat::Raw), Some(2 << 30))],
            ImageKind::Kernel => vec![file(FileRole::Kernel, None, None)],
        },
        command_line: if kind == ImageKind::Kernel { "console=ttyS0".into() } else { String::new() },
        created: WallTime(0),
        state: ImageState::Ready,
        reason: String::new(),
        extra: serde_json::Map::new(),
    }
}

/// A cluster. Its state is compared with its records after every change.
pub(super) struct World {
    pub(super) state: State,
    pub(super) now: u64,
    pub(super) silent: BTreeSet<HostId>,
    /// As the sessions note it.
    pub(super) arrived: BTreeMap<VmId, Incarnation>,
    pub(super) stored: BTreeMap<Key, (Record, Revision)>,
    /// The newest change.
    pub(super) last: Change,
    /// All events, oldest first.
    pub(super) events: Vec<(EventType, String)>,
}

impl World {
    /// So many hosts, each with a pool of its own and the shared one.
    pub(super) fn with_hosts(hosts: u128) -> Self {
        let mut world = Self {
            state: State::default(),
            now: 1_000_000,
            silent: BTreeSet::new(),
            arrived: BTreeMap::new(),
            stored: BTreeMap::new(),
            last: Change::default(),
            events: Vec::new(),
        };
        world.state.advance(Revision(1));
        for n in 1..=hosts {
            world.ok(Command::RegisterHost { host: Box::new(facts(n)) });
        }
        world
    }

    pub(super) fn cx(&self) -> Context {
        Context {
            now: WallTime(self.now),
            silent: Arc::new(self.silent.clone()),
            arrived: Arc::new(self.arrived.clone()),
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
        }
    }

    pub(super) fn run(&mut self, command: Command) -> Result<Answer, Refusal> {
        self.now += 1;
        if let Command::Report { reports, .. } = &command {
            let received = reports.iter().filter(|r| r.state == ObservedState::Received);
            self.arrived.extend(received.map(|r| (r.vm, r.incarnation)));
        }
        let decision = self.state.decide(&command, &self.cx())?;
        self.commit(decision.change);
        Ok(decision.answer)
    }

    pub(super) fn ok(&mut self, command: Command) -> Answer {
        let shown = format!("{command:?}");
        self.run(command).unwrap_or_else(|refusal| panic!("{shown} refused: {refusal}"))
    }

    pub(super) fn refused(&mut self, command: Command) -> Refusal {
        let shown = format!("{command:?}");
        self.run(command).map(|answer| panic!("{shown} not refused: {answer:?}")).unwrap_err()
    }

    pub(super) fn commit(&mut self, change: Change) {
        let keys: BTreeSet<&Key> = change.mutations.iter().map(|m| &m.key).collect();
        assert_eq!(keys.len(), change.mutations.len(), "a key stands in a change once: {change:?}");
        assert!(change.mutations.len() <= 128, "{} operations", change.mutations.len());
        for key in keys {
            assert!(!self.state.is_unreadable(key), "an unreadable key is written: {key}");
        }
        if !change.mutations.is_empty() {
            // As the writer does it: first at the revision that it is based on, then at its own.
            let base = self.state.revision();
            let revision = Revision(base.0 + 1);
            let concerned = concerned(&self.state, &change);
            let plans = self.plans();
            self.state.absorb(&change, base);
            self.state.absorb(&change, revision);
            for (host, plan) in self.plans() {
                let told = match &concerned {
                    Concerned::Everybody => true,
                    Concerned::Hosts(hosts) => hosts.contains(&host),
                };
                assert!(told || plans.get(&host) == Some(&plan), "host {host} would not be woken for {change:?}");
            }
            for Mutation { key, value } in &change.mutations {
                match value {
                    Some(record) => {
                        // What is stored is JSON: it must read back the same.
                        let read = Record::from_json(key, &record.to_json()).unwrap();
                        assert_eq!(&read, record);
                        if let Record::Event(event) = record {
                            self.events.push((event.kind, event.message.clone()));
                        }
                        self.stored.insert(key.clone(), (record.clone(), revision));
                    }
                    None => {
                        self.stored.remove(key);
                    }
                }
            }
        }
        self.last = change;
        self.check();
    }

    /// What each host would be told.
    fn plans(&self) -> BTreeMap<HostId, desired::Plan> {
        let hosts = self.state.hosts().map(|(&host, _)| host);
        hosts.map(|host| (host, desired::plan(&self.state, host, &BTreeMap::new()))).collect()
    }

    /// As a controller reads it that has just begun, from bytes.
    fn built_at_once(&self) -> State {
        let readable = self
            .stored
            .iter()
            .map(|(key, (record, revision))| Stored::read(key.to_string().as_bytes(), &record.to_json(), *revision));
        let unreadable = self.state.unreadable().iter();
        let unreadable = unreadable.map(|(key, error)| Stored::Unreadable { key: key.clone(), error: error.clone() });
        State::of(unreadable.chain(readable), self.state.revision())
    }

    /// The state is what its records say.
    pub(super) fn check(&self) {
        let mut rebuilt = State::default();
        for (key, (record, revision)) in &self.stored {
            let mutation = Mutation { key: key.clone(), value: Some(record.clone()) };
            rebuilt.absorb(&Change { mutations: vec![mutation] }, *revision);
        }
        for (key, error) in self.state.unreadable() {
            rebuilt.absorb_unreadable(key.clone(), error.clone(), Revision(1));
        }
        rebuilt.advance(self.state.revision());
        assert_same(&self.state, &rebuilt);
        assert_same(&self.state, &self.built_at_once());
        assert!(self.state.host_index_is_right());

        // R1
        for (id, entry) in self.state.vms().filter(|(_, e)| e.record.revert.is_some()) {
            let Some(host) = entry.record.placement.host else { continue };
            let told = desired::message(&self.state, host, *id, Wanted::AsRecorded(Revision(0))).unwrap();
            assert_ne!(told.disposition(), v1::Disposition::Run, "{id} may run, and its disks are to be put back");
        }
        // CL1
        for (id, entry) in self.state.vms().filter(|(_, e)| e.record.desired != Desired::Deleted) {
            let Some(clone) = &entry.record.clone_of else { continue };
            assert!(!entry.record.disks_exist, "{id} has its disks, and holds those of another VM still");
            let source = self.record(clone.vm);
            assert_ne!(source.desired, Desired::Deleted, "{id} is to be copied from it");
            match clone.snapshot {
                None => assert!(source.desired == Desired::Stopped && source.revert.is_none(), "copied to {id}"),
                Some(snapshot) => assert!(
                    // Disks of an older generation are lost to that VM: nobody touches them any more.
                    source.disk_generation > clone.disk_generation
                        || source.snapshots.iter().any(|s| s.id == snapshot && s.state == SnapshotState::Ready),
                    "{id} is to be copied from a snapshot that goes"
                ),
            }
        }
        for (id, host) in self.state.hosts() {
            let tenants: BTreeSet<VmId> =
                self.state.vms().filter(|(_, vm)| vm.record.placement.host == Some(*id)).map(|(&vm, _)| vm).collect();
            assert_eq!(host.vms, tenants);
            let mut sum = Resources::default();
            for vm in self.state.vms().map(|(_, vm)| vm) {
                let arrives = vm.record.migration.as_ref().is_some_and(|m| m.target == *id);
                if arrives || (vm.record.placement.host == Some(*id) && vm.holds_room()) {
                    // Room for both what it has and what it will have.
                    let (now, next) = (&vm.record.spec, vm.record.next_spec());
                    sum.vcpus += now.vcpus.max(next.vcpus);
                    sum.memory_mib += now.memory_mib.max(next.memory_mib);
                }
            }
            assert_eq!(host.promised, sum, "what host {id} has promised is the sum");
        }
    }

    // What tests say often.

    pub(super) fn create(&mut self, n: u128, spec: VmSpec) -> VmId {
        self.ok(Command::CreateVm { request: None, vm: Box::new(new_vm(n, spec)) });
        vm_id(n)
    }

    pub(super) fn vm(&self, vm: VmId) -> &VmEntry {
        self.state.vm(vm).unwrap_or_else(|| panic!("VM {vm} is gone"))
    }

    pub(super) fn record(&self, vm: VmId) -> &VmRecord {
        &self.vm(vm).record
    }

    pub(super) fn phase(&self, vm: VmId) -> Phase {
        self.vm(vm).effective_status().phase
    }

    pub(super) fn reason(&self, vm: VmId) -> String {
        self.vm(vm).effective_status().reason.to_owned()
    }

    pub(super) fn host_of(&self, vm: VmId) -> Option<HostId> {
        self.record(vm).placement.host
    }

    pub(super) fn incarnation(&self, vm: VmId) -> u64 {
        self.record(vm).placement.incarnation.0
    }

    pub(super) fn host(&self, host: HostId) -> &HostRecord {
        &self.state.host(host).unwrap().record
    }

    /// The host on which it is says this about its present incarnation.
    pub(super) fn report(&mut self, vm: VmId, state: ObservedState) {
        let host = self.host_of(vm).expect("it has a host");
        let report = self.observation(vm, state);
        self.ok(Command::Report { host, reports: vec![report] });
    }

    pub(super) fn observation(&self, vm: VmId, state: ObservedState) -> VmObservation {
        VmObservation {
            vm,
            incarnation: Incarnation(self.incarnation(vm)),
            state,
            reason: if state == ObservedState::Running { String::new() } else { format!("{state:?}") },
            disks_ready: !matches!(state, ObservedState::Preparing),
            last_exit: None,
            next_attempt: None,
            addresses: Vec::new(),
            restarts_done: self.record(vm).restarts,
            paused: false,
            migration: None,
            disks: Default::default(),
        }
    }

    pub(super) fn running(&mut self, n: u128, spec: VmSpec) -> VmId {
        let vm = self.create(n, spec);
        self.report(vm, ObservedState::Running);
        vm
    }

    pub(super) fn lapse(&mut self, host: HostId, lapsed: Lapsed) {
        self.ok(Command::DeclareLapsed { host, lapsed, limit: MAX_PLACEMENTS });
    }

    pub(super) fn set(&mut self, vm: VmId, desired: PowerChange) {
        self.ok(Command::SetDesired { vm, desired });
    }

    pub(super) fn return_of(&mut self, n: u128) {
        self.ok(Command::RegisterHost { host: Box::new(facts(n)) });
        assert_eq!(self.host(host_id(n)).liveness, Liveness::Up);
    }

    /// Kinds of the events of the newest change.
    pub(super) fn last_events(&self) -> Vec<EventType> {
        self.last
            .mutations
            .iter()
            .filter_map(|m| match &m.value {
                Some(Record::Event(event)) => Some(event.kind),
                _ => None,
            })
            .collect()
    }

    /// The message of the newest event of this kind.
    pub(super) fn message(&self, kind: EventType) -> &str {
        let found = self.events.iter().rev().find(|(k, _)| *k == kind);
        &found.unwrap_or_else(|| panic!("no event {kind}")).1
    }
}

/// What a side of a migration says of it.
pub(super) fn seen(incarnation: u64, address: &str) -> MigrationObservation {
    let progress = MigrationProgress {
        incarnation: Incarnation(incarnation),
        transferred_bytes: 100,
        remaining_bytes: 200,
        bytes_per_second: 300,
        expected_downtime_ms: 400,
    };
    MigrationObservation {
        progress,
        address: address.to_owned(),
        failure: String::new(),
        disks_address: String::new(),
        disks: 0,
    }
}

/// A host other than this one, of two.
pub(super) fn other(host: HostId) -> HostId {
    if host == host_id(1) { host_id(2) } else { host_id(1) }
}

fn assert_same(a: &State, b: &State) {
    assert_eq!(a.revision, b.revision);
    assert_eq!(a.vms, b.vms);
    assert_eq!(a.stray_statuses, b.stray_statuses);
    assert_eq!(a.vm_names, b.vm_names);
    assert_eq!(a.macs, b.macs);
    assert_eq!(a.hosts, b.hosts);
    assert_eq!(a.host_names, b.host_names);
    assert_eq!(a.orphans, b.orphans);
    assert_eq!(a.incoming, b.incoming);
    assert_eq!(a.clones, b.clones);
    assert_eq!(a.images, b.images);
    assert_eq!(a.image_names, b.image_names);
    assert_eq!(a.requests, b.requests);
    assert_eq!(a.requests_by_age, b.requests_by_age);
    assert_eq!(a.cluster, b.cluster);
    assert_eq!(a.pending, b.pending);
    assert_eq!(a.unreadable, b.unreadable);
    for (&id, _) in a.hosts() {
        assert_eq!(a.view.promised(id), b.view.promised(id));
    }
}
