//! The index gives the answer of the scan over all hosts, whatever has happened to the cluster and whatever is asked.

use proptest::sample::{Index as Pick, select};

use super::*;

const OTHER_POOL: Uuid = Uuid::from_u128(0x701);
const HOSTS: u128 = 12;
const VMS: u128 = 40;

#[derive(Clone, Debug)]
enum Event {
    /// A host comes or changes.
    Host(Box<HostRecord>),
    Gone(HostId),
    /// A VM arrives where the scheduler puts it.
    Arrives(Box<Request>),
    /// A VM is promised something on this host, whatever the filters say: on a second one, if it migrates.
    Forced(HostId, VmId, Needs, Pick),
    Departs(VmId),
    Disks(VmId, BTreeMap<Place, u64>),
}

fn any_host_id() -> impl Strategy<Value = HostId> {
    (1..=HOSTS).prop_map(host_id)
}

fn any_vm_id() -> impl Strategy<Value = VmId> {
    (1..=VMS).prop_map(vm_id)
}

fn pool() -> impl Strategy<Value = Pool> {
    (
        select(vec!["default", "fast"]),
        select(vec![None, Some(POOL), Some(OTHER_POOL)]),
        select(vec![0u64, 10, 100]),
        prop_oneof![6 => Just(""), 1 => Just("no marker")],
        prop_oneof![
            4 => Just(PoolAccess::Directory),
            1 => Just(PoolAccess::Network),
            1 => Just(PoolAccess::Exported { address: "[::1]:1".into() }),
        ],
    )
        .prop_map(|(name, shared_id, capacity_bytes, problem, access)| Pool {
            name: name.into(),
            shared_id,
            capacity_bytes,
            problem: problem.into(),
            access,
        })
}

fn any_host() -> impl Strategy<Value = HostRecord> {
    let size = (1..=HOSTS, select(vec![0u32, 4, 8]), select(vec![0u64, 2048, 4096, 6144]));
    let state = (
        prop_oneof![8 => Just(HostMode::Active), 1 => Just(HostMode::Cordoned), 1 => Just(HostMode::Draining)],
        prop_oneof![8 => Just(Liveness::Up), 1 => Just(Liveness::FastLapsed), 1 => Just(Liveness::Dead)],
    );
    let kind = (
        select(vec![AcceleratorKind::Kvm, AcceleratorKind::Tcg]),
        select(vec![None, Some(Level::V2), Some(Level::V3), Some(Level::V4)]),
        select(vec!["", "a", "b"]),
        select(vec!["", "192.0.2.1"]),
    );
    let has = (select(vec!["", "a", "b"]), select(vec!["", "br0"]), prop::collection::vec(pool(), 0..3));
    (size, state, kind, has).prop_map(
        |((n, vcpus, memory), (mode, liveness), (accelerator, level, print, address), (zone, bridge, pools))| {
            let mut record = host(n, vcpus, memory);
            if let Some(level) = level {
                record = with_cpu(record, level, print);
            }
            let labels = [("zone".to_owned(), zone.to_owned())].into_iter().filter(|(_, zone)| !zone.is_empty());
            let bridges = [bridge.to_owned()].into_iter().filter(|b| !b.is_empty());
            let accelerator = Accelerator { kind: accelerator, why: String::new() };
            let (labels, bridges) = (labels.collect(), bridges.collect());
            HostRecord {
                mode,
                liveness,
                accelerator,
                labels,
                bridges,
                pools,
                migration_address: address.into(),
                ..record
            }
        },
    )
}

/// A host that takes nearly everything, so that many VMs find a place.
fn plain_host() -> impl Strategy<Value = HostRecord> {
    (1..=HOSTS, select(vec![4096u64, 6144])).prop_map(|(n, memory)| host(n, 8, memory))
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let migration = (
        any_host_id(),
        select(vec![AcceleratorKind::Kvm, AcceleratorKind::Tcg]),
        select(vec!["", "a", "b"]),
        prop::collection::btree_set(any_host_id(), 0..3),
    );
    prop_oneof![
        4 => Just(Arrival::Start),
        1 => Just(Arrival::Removal),
        2 => migration.prop_map(|(from, accelerator, fingerprint, busy)| Arrival::Migration {
            from,
            accelerator,
            fingerprint: fingerprint.into(),
            busy,
        }),
    ]
}

fn home() -> impl Strategy<Value = Home> {
    prop_oneof![
        6 => Just(Home::Anywhere),
        1 => any_host_id().prop_map(Home::OnlyHost),
        2 => select(vec![POOL, OTHER_POOL])
            .prop_map(|id| Home::SharedPools { ids: BTreeMap::from([("default".to_owned(), id)]) }),
    ]
}

fn any_request() -> impl Strategy<Value = Request> {
    let size = (any_vm_id(), 0..5u32, select(vec![0u64, 1, 512, 513, 2048]));
    let asks = (
        (
            prop::collection::btree_map(select(vec!["default".to_owned(), "fast".to_owned()]), 0..20u64, 0..3),
            prop::option::weighted(0.2, select(vec!["default".to_owned(), "fast".to_owned()])),
        ),
        prop_oneof![3 => Just(None), 1 => Just(Some("br0")), 1 => Just(Some("br9"))],
        prop_oneof![3 => Just(None), 2 => Just(Some("a")), 1 => Just(Some("c"))],
        prop_oneof![2 => Just(None), 1 => Just(Some("db")), 1 => Just(Some("web"))],
        prop_oneof![4 => Just(CpuModel::V2), 1 => Just(CpuModel::V3), 1 => Just(CpuModel::V4), 1 => Just(CpuModel::Host)],
    );
    (size, asks, home(), prop::option::weighted(0.2, any_host_id()), arrival()).prop_map(
        |((vm, vcpus, memory_mib), ((pools, writeback), bridge, zone, group, cpu), home, prefer, arrival)| Request {
            vm,
            vcpus,
            memory_mib,
            pools,
            writeback_pools: writeback.into_iter().collect(),
            bridges: bridge.into_iter().map(str::to_owned).collect(),
            host_labels: zone.into_iter().map(|zone| ("zone".to_owned(), zone.to_owned())).collect(),
            group: group.map(str::to_owned),
            home,
            prefer,
            cpu,
            arrival,
            holds: Vec::new(),
        },
    )
}

fn event() -> impl Strategy<Value = Event> {
    let needs = (0..5u32, 0..1024u64, select(vec![None, Some("db"), Some("web")])).prop_map(|(v, m, g)| needs(v, m, g));
    let place = prop_oneof![
        select(vec![POOL, OTHER_POOL]).prop_map(Place::Shared),
        (any_host_id(), select(vec!["default", "fast"])).prop_map(|(host, pool)| Place::OnHost(host, pool.into())),
    ];
    prop_oneof![
        3 => any_host().prop_map(|host| Event::Host(Box::new(host))),
        2 => plain_host().prop_map(|host| Event::Host(Box::new(host))),
        1 => any_host_id().prop_map(Event::Gone),
        6 => any_request().prop_map(|request| Event::Arrives(Box::new(request))),
        3 => (any_host_id(), any_vm_id(), needs, any::<Pick>())
            .prop_map(|(host, vm, needs, pick)| Event::Forced(host, vm, needs, pick)),
        2 => any_vm_id().prop_map(Event::Departs),
        1 => (any_vm_id(), prop::collection::btree_map(place, 1..30u64, 0..3))
            .prop_map(|(vm, disks)| Event::Disks(vm, disks)),
    ]
}

/// The cluster as it is kept, and what it is made anew from.
#[derive(Default)]
struct Both {
    view: ClusterView,
    hosts: BTreeMap<HostId, HostRecord>,
    promises: BTreeMap<VmId, BTreeMap<HostId, Needs>>,
    disks: BTreeMap<VmId, BTreeMap<Place, u64>>,
}

impl Both {
    fn anew(&self) -> ClusterView {
        let mut anew = view(self.hosts.values().cloned());
        for (&vm, on) in &self.promises {
            for (&host, needs) in on {
                anew.assign(host, vm, needs.clone());
            }
        }
        for (&vm, disks) in &self.disks {
            anew.set_disks(vm, disks.clone());
        }
        anew
    }

    fn holds(&self, request: &Request) -> Request {
        let holds = self.promises.get(&request.vm).into_iter().flat_map(BTreeMap::keys).copied().collect();
        Request { holds, ..request.clone() }
    }

    fn promise(&mut self, host: HostId, vm: VmId, needs: Needs) {
        self.view.assign(host, vm, needs.clone());
        self.promises.entry(vm).or_default().insert(host, needs);
    }

    fn depart(&mut self, vm: VmId) {
        for host in self.promises.remove(&vm).into_iter().flat_map(BTreeMap::into_keys) {
            self.view.release(host, vm);
        }
    }

    fn take(&mut self, event: &Event, limits: &Limits<'_>) {
        match event {
            Event::Host(record) => {
                self.view.upsert_host(Arc::new((**record).clone()));
                self.hosts.insert(record.id, (**record).clone());
            }
            Event::Gone(host) => {
                self.view.remove_host(*host);
                self.hosts.remove(host);
            }
            Event::Arrives(request) => {
                if let Ok(choice) = place(&self.view, &self.holds(request), limits) {
                    self.depart(request.vm);
                    self.promise(choice.host, request.vm, request.needs());
                }
            }
            Event::Forced(host, vm, needs, pick) => {
                // On two hosts at most, as in a migration.
                let on: Vec<HostId> = self.promises.get(vm).into_iter().flat_map(BTreeMap::keys).copied().collect();
                if on.len() > 1 {
                    let left = on[pick.index(on.len())];
                    self.view.release(left, *vm);
                    self.promises.entry(*vm).or_default().remove(&left);
                }
                self.promise(*host, *vm, needs.clone());
            }
            Event::Departs(vm) => self.depart(*vm),
            Event::Disks(vm, disks) => {
                self.view.set_disks(*vm, disks.clone());
                self.disks.insert(*vm, disks.clone());
            }
        }
    }
}

/// What the index alone answers.
fn by_index(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Option<Choice> {
    search::best(view, request, limits).map(|(best, others)| Choice { host: best.host, why: best.why(others) })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_index_gives_the_answer_of_the_scan(
        events in prop::collection::vec((event(), prop::collection::vec(any_request(), 1..4)), 1..100),
        silent in prop::collection::btree_set(any_host_id(), 0..3),
        percent in select(vec![100u32, 150, 400]),
    ) {
        let limits = Limits { cpu_overcommit_percent: percent, disk_overcommit_percent: 150, silent: &silent };
        let mut both = Both::default();
        for (event, requests) in &events {
            both.take(event, &limits);
            for request in requests {
                let request = both.holds(request);
                let (ours, scan) = (by_index(&both.view, &request, &limits), place_by_scan(&both.view, &request, &limits));
                prop_assert_eq!(&ours, &scan.clone().ok());
                prop_assert_eq!(place(&both.view, &request, &limits), scan);
            }
        }
        let anew = both.anew();
        prop_assert_eq!(both.view.index().content(), anew.index().content());
        prop_assert_eq!(both.view, anew);
    }

    /// A draft lays what it has decided over a copy, and drops the copy.
    #[test]
    fn what_is_done_to_a_copy_is_not_done_to_the_original(
        events in prop::collection::vec(event(), 1..60),
        more in prop::collection::vec(event(), 1..20),
    ) {
        let limits = limits(150);
        let mut both = Both::default();
        events.iter().for_each(|event| both.take(event, &limits));
        let before = both.anew();
        let mut copy = Both { view: both.view.clone(), hosts: both.hosts.clone(), promises: both.promises.clone(), disks: both.disks.clone() };
        more.iter().for_each(|event| copy.take(event, &limits));
        prop_assert_eq!(both.view.index().content(), before.index().content());
        prop_assert_eq!(copy.view.index().content(), copy.anew().index().content());
    }
}

/// The order is that of the shares, exactly: large hosts do not tie for a part in 100,000.
#[test]
fn of_two_large_hosts_the_one_with_a_mebibyte_more_free_is_taken() {
    let mut view = view([host(1, 64, 1 << 22), host(2, 64, 1 << 22)]);
    view.assign(host_id(1), vm_id(8), needs(1, 1025, None));
    view.assign(host_id(2), vm_id(9), needs(1, 1024, None));
    assert_eq!(place(&view, &request(1, 512), &limits(100)).unwrap().host, host_id(2));
}

/// Kinds without a host are forgotten: a host whose record changes again and again leaves nothing behind.
#[test]
fn kinds_without_hosts_are_forgotten() {
    let mut view = ClusterView::default();
    for n in 0..100 {
        let mut record = host(1, 4, 4096);
        record.labels.insert("n".into(), n.to_string());
        view.upsert_host(Arc::new(record));
    }
    assert_eq!(view.index().content().len(), 1);
    assert!(view.index().slots().count() <= 2, "the slots of old kinds are used again");
    view.remove_host(host_id(1));
    assert_eq!(view.index().content(), []);
}
