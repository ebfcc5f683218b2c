//! Tests of the scheduler: examples that a person can follow, then properties over random clusters.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proptest::prelude::*;
use uncloud_proto::{
    clock::WallTime,
    cpu::Level,
    ids::{HostId, VmId},
};
use uuid::Uuid;

use super::*;
use crate::model::{
    Extra, HostMode, HostRecord, Liveness,
    host::{Accelerator, AcceleratorKind, Cpu, Pool, PoolAccess},
};

mod by_index;

const POOL: Uuid = Uuid::from_u128(0x700);

fn host_id(n: u128) -> HostId {
    HostId::from_uuid(Uuid::from_u128(n))
}

fn vm_id(n: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(n))
}

fn host(n: u128, vcpus: u32, memory_mib: u64) -> HostRecord {
    HostRecord {
        id: host_id(n),
        name: format!("h{n}"),
        labels: BTreeMap::new(),
        vcpus,
        memory_mib,
        pools: vec![Pool {
            name: "default".into(),
            shared_id: Some(POOL),
            capacity_bytes: 1 << 40,
            problem: String::new(),
            access: PoolAccess::Directory,
        }],
        accelerator: Accelerator { kind: AcceleratorKind::Kvm, why: String::new() },
        mode: HostMode::Active,
        drain_how: Default::default(),
        drain_disks: Default::default(),
        mode_reason: String::new(),
        liveness: Liveness::Up,
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

fn view(hosts: impl IntoIterator<Item = HostRecord>) -> ClusterView {
    let mut view = ClusterView::default();
    for host in hosts {
        view.upsert_host(Arc::new(host));
    }
    view
}

fn request(vcpus: u32, memory_mib: u64) -> Request {
    Request {
        vm: vm_id(1),
        vcpus,
        memory_mib,
        pools: BTreeMap::from([("default".to_owned(), 0)]),
        writeback_pools: BTreeSet::new(),
        bridges: BTreeSet::new(),
        host_labels: BTreeMap::new(),
        group: None,
        home: Home::Anywhere,
        prefer: None,
        cpu: CpuModel::V2,
        arrival: Arrival::Start,
        holds: Vec::new(),
    }
}

fn needs(vcpus: u32, memory_mib: u64, group: Option<&str>) -> Needs {
    Needs { resources: Resources { vcpus, memory_mib }, group: group.map(str::to_owned) }
}

static NOBODY: BTreeSet<HostId> = BTreeSet::new();

fn limits(cpu_overcommit_percent: u32) -> Limits<'static> {
    Limits { cpu_overcommit_percent, disk_overcommit_percent: 200, silent: &NOBODY }
}

#[test]
fn says_why_each_host_lost_with_the_largest_group_first() {
    let mut cordoned = host(1, 8, 8192);
    cordoned.mode = HostMode::Cordoned;
    let view = view([cordoned, host(2, 8, 512), host(3, 8, 1024)]);

    let err = place(&view, &request(2, 4096), &limits(100)).unwrap_err();

    assert_eq!(err.summary(), "3 hosts: 2 lack 4096 MiB of memory, 1 is cordoned");
    assert_eq!(err.groups[0].hosts, [host_id(2), host_id(3)]);
    assert_eq!(err.groups[0].rejection.to_string(), "lacks 4096 MiB of memory");
}

#[test]
fn says_it_in_the_singular_for_one_host_and_in_other_words_for_none() {
    let alone = view([host(1, 0, 8192)]);
    assert_eq!(place(&alone, &request(1, 1), &limits(400)).unwrap_err().summary(), "1 host: 1 lacks 1 vCPU");
    let none = ClusterView::default();
    assert_eq!(place(&none, &request(1, 1), &limits(400)).unwrap_err().summary(), "no hosts have joined yet");
}

#[test]
fn explains_a_mixed_cluster_in_one_line() {
    let view = view([host(1, 1, 64), host(2, 1, 64), host(3, 1, 8192)]);
    let explanation = explain(&view, &request(1, 512), &limits(100));
    assert_eq!(explanation.candidates, [host_id(3)]);
    assert_eq!(explanation.summary(), "1 of 3 hosts can take it, 2 lack 512 MiB of memory");
}

#[test]
fn every_filter_refuses_with_its_own_reason() {
    let silent = BTreeSet::from([host_id(1)]);
    let quiet = Limits { cpu_overcommit_percent: 100, disk_overcommit_percent: 200, silent: &silent };
    let mut taken = ClusterView::default();
    taken.assign(host_id(1), vm_id(9), needs(1, 1, Some("db")));

    type Case = (fn(&mut HostRecord), fn(&mut Request), &'static str);
    let cases: [Case; 13] = [
        (|h| h.liveness = Liveness::Dead, |_| {}, "is down"),
        (|h| h.liveness = Liveness::FastLapsed, |_| {}, "is down"),
        (|h| h.mode = HostMode::Draining, |_| {}, "is being drained"),
        (|_| {}, |r| drop(r.host_labels.insert("zone".into(), "a".into())), "lacks label zone=a"),
        (
            |h| h.bridges = ["br1".into()].into(),
            |r| r.bridges = ["br0".into(), "br1".into()].into(),
            "lacks bridge `br0` (the agent's --bridge)",
        ),
        (|h| h.pools.clear(), |_| {}, "lacks pool `default`"),
        (
            |h| h.pools[0].capacity_bytes = 1 << 30,
            |r| r.pools = BTreeMap::from([("default".into(), 3 << 30)]),
            "lacks 3072 MiB in pool `default`",
        ),
        (|h| h.pools[0].problem = "no marker".into(), |_| {}, "has a problem with pool `default`"),
        (
            |h| h.pools[0].shared_id = Some(Uuid::from_u128(1)),
            |r| r.home = Home::SharedPools { ids: BTreeMap::from([("default".into(), POOL)]) },
            "has another pool `default` than the one with its disks",
        ),
        (
            |h| h.pools[0].shared_id = None,
            |r| r.home = Home::SharedPools { ids: BTreeMap::from([("default".into(), POOL)]) },
            "has another pool `default` than the one with its disks",
        ),
        (|_| {}, |r| r.home = Home::OnlyHost(host_id(2)), "does not have its disks"),
        (|_| {}, |r| r.group = Some("db".into()), "has a VM of group `db`"),
        (|_| {}, |r| r.vcpus = 8, "lacks 8 vCPUs"),
    ];
    for (break_host, break_request, expected) in cases {
        let (mut view, mut record, mut request) = (taken.clone(), host(1, 8, 8192), request(1, 1));
        break_host(&mut record);
        break_request(&mut request);
        view.upsert_host(Arc::new(record));
        let err = place(&view, &request, &limits(100)).unwrap_err();
        assert_eq!(err.groups[0].rejection.to_string(), expected);
    }

    let err = place(&view([host(1, 8, 8192)]), &request(1, 1), &quiet).unwrap_err();
    assert_eq!(err.groups[0].rejection, Rejection::Silent);
}

#[test]
fn disks_in_a_shared_pool_follow_its_id_and_disks_elsewhere_stay() {
    let mut other = host(1, 8, 8192);
    other.pools[0].shared_id = Some(Uuid::from_u128(1));
    let view = view([other, host(2, 8, 8192)]);
    let mut request = request(1, 1);

    request.home = Home::SharedPools { ids: BTreeMap::from([("default".into(), POOL)]) };
    assert_eq!(place(&view, &request, &limits(100)).unwrap().host, host_id(2));
    request.home = Home::OnlyHost(host_id(1));
    assert_eq!(place(&view, &request, &limits(100)).unwrap().host, host_id(1));
}

#[test]
fn cpus_are_overcommitted_and_memory_is_not() {
    let mut view = view([host(1, 2, 1024)]);
    view.assign(host_id(1), vm_id(9), needs(6, 512, None));

    assert!(place(&view, &request(2, 512), &limits(400)).is_ok());
    assert!(place(&view, &request(3, 512), &limits(400)).is_err());
    assert!(place(&view, &request(2, 513), &limits(400)).is_err());
}

#[test]
fn spreads_over_hosts_and_prefers_the_one_that_is_named() {
    let mut view = view([host(1, 8, 8192), host(2, 8, 8192), host(3, 8, 4096)]);
    // Empty hosts: the largest has the lowest share afterwards, and of equal ones the first id wins.
    assert_eq!(place(&view, &request(1, 512), &limits(100)).unwrap().host, host_id(1));
    view.assign(host_id(1), vm_id(9), needs(1, 512, None));
    assert_eq!(place(&view, &request(1, 512), &limits(100)).unwrap().host, host_id(2));

    let preferring = Request { prefer: Some(host_id(3)), ..request(1, 512) };
    let choice = place(&view, &preferring, &limits(100)).unwrap();
    assert_eq!((choice.host, choice.why.as_str()), (host_id(3), "preferred among the hosts that can take it"));
}

#[test]
fn a_host_that_executes_guests_by_its_cpu_comes_before_a_translator() {
    let mut slow = host(1, 8, 65536);
    slow.accelerator.kind = AcceleratorKind::Tcg;
    let view = view([slow, host(2, 8, 1024)]);
    assert_eq!(place(&view, &request(1, 512), &limits(100)).unwrap().host, host_id(2));
}

#[test]
fn what_a_vm_holds_itself_does_not_count_against_it() {
    let mut view = view([host(1, 2, 1024)]);
    view.assign(host_id(1), vm_id(1), needs(2, 1024, Some("db")));
    let again = Request { group: Some("db".into()), holds: vec![host_id(1)], ..request(2, 1024) };
    assert_eq!(place(&view, &again, &limits(100)).unwrap().host, host_id(1));
}

#[test]
fn openings_grow_when_room_may_have_appeared_and_only_then() {
    let mut view = view([host(1, 8, 8192)]);
    let mut last = view.openings();
    let mut grew = |view: &ClusterView| std::mem::replace(&mut last, view.openings()) < view.openings();

    view.upsert_host(Arc::new(host(1, 8, 8192)));
    view.assign(host_id(1), vm_id(1), needs(1, 512, None));
    view.assign(host_id(1), vm_id(1), needs(1, 512, None));
    view.release(host_id(1), vm_id(2));
    assert!(!grew(&view));
    view.upsert_host(Arc::new(host(1, 8, 16384)));
    assert!(grew(&view));
    view.assign(host_id(1), vm_id(1), needs(1, 256, None));
    assert!(grew(&view));
    view.release(host_id(1), vm_id(1));
    assert!(grew(&view));
}

/// A change of the view, as `state/` would make it.
#[derive(Clone, Debug)]
enum Step {
    Host { host: u8, vcpus: u8, memory: u16 },
    Gone { host: u8 },
    Assign { host: u8, vm: u8, vcpus: u8, memory: u16, group: u8 },
    Release { vm: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..5u8, 0..9u8, 0..4096u16).prop_map(|(host, vcpus, memory)| Step::Host { host, vcpus, memory }),
        (0..5u8).prop_map(|host| Step::Gone { host }),
        (0..5u8, 0..12u8, 1..4u8, 1..1024u16, 0..3u8)
            .prop_map(|(host, vm, vcpus, memory, group)| { Step::Assign { host, vm, vcpus, memory, group } }),
        (0..12u8).prop_map(|vm| Step::Release { vm }),
    ]
}

#[derive(Default)]
struct Model {
    hosts: BTreeMap<HostId, HostRecord>,
    vms: BTreeMap<VmId, (HostId, Needs)>,
}

impl Model {
    fn rebuilt(&self) -> ClusterView {
        let mut view = view(self.hosts.values().cloned());
        for (&vm, (host, needs)) in &self.vms {
            view.assign(*host, vm, needs.clone());
        }
        view
    }
}

fn run(steps: &[Step]) -> (ClusterView, Model) {
    let (mut view, mut model) = (ClusterView::default(), Model::default());
    for step in steps {
        match *step {
            Step::Host { host: n, vcpus, memory } => {
                let record = host(u128::from(n), u32::from(vcpus), u64::from(memory));
                view.upsert_host(Arc::new(record.clone()));
                model.hosts.insert(record.id, record);
            }
            Step::Gone { host } => {
                view.remove_host(host_id(u128::from(host)));
                model.hosts.remove(&host_id(u128::from(host)));
            }
            Step::Assign { host, vm, vcpus, memory, group } => {
                let (host, vm) = (host_id(u128::from(host)), vm_id(u128::from(vm)));
                let needs = needs(u32::from(vcpus), u64::from(memory), ["a", "b"].get(usize::from(group)).copied());
                if let Some((old, _)) = model.vms.insert(vm, (host, needs.clone()))
                    && old != host
                {
                    view.release(old, vm);
                }
                view.assign(host, vm, needs);
            }
            Step::Release { vm } => {
                let vm = vm_id(u128::from(vm));
                if let Some((host, _)) = model.vms.remove(&vm) {
                    view.release(host, vm);
                }
            }
        }
    }
    (view, model)
}

fn with_cpu(mut host: HostRecord, level: Level, fingerprint: &str) -> HostRecord {
    host.cpu = Cpu {
        name: "a CPU".into(),
        features: level.features().map(str::to_owned).collect(),
        fingerprint: fingerprint.into(),
    };
    host
}

#[test]
fn a_guest_finds_the_cpu_that_it_is_to_see() {
    // The first has said nothing of its CPU.
    let view =
        view([host(1, 4, 4096), with_cpu(host(2, 4, 4096), Level::V3, ""), with_cpu(host(3, 4, 4096), Level::V4, "")]);
    let takers = |cpu| explain(&view, &Request { cpu, ..request(1, 1) }, &limits(100)).candidates.len();
    assert_eq!((takers(CpuModel::V2), takers(CpuModel::V3), takers(CpuModel::V4)), (3, 2, 1));
    let v4 = Request { cpu: CpuModel::V4, ..request(1, 1) };
    let why = check(&view, host_id(2), &v4, &limits(100)).unwrap_err();
    assert_eq!(why.to_string(), "lacks the CPU features avx512f, avx512bw, avx512cd, avx512dq, avx512vl of x86-64-v4");
    assert_eq!(takers(CpuModel::Host), 3, "any host can show its own");
    let mut translates = host(4, 4, 4096);
    translates.accelerator.kind = AcceleratorKind::Tcg;
    let own = Request { cpu: CpuModel::Host, ..request(1, 1) };
    let why = check(&self::view([translates]), host_id(4), &own, &limits(100)).unwrap_err();
    assert_eq!(why, Rejection::NoOwnCpu);
}

#[test]
fn a_guest_that_sees_its_hosts_cpu_goes_on_only_where_there_is_the_same() {
    let kvm = |n, fingerprint| {
        let mut host = with_cpu(host(n, 4, 4096), Level::V3, fingerprint);
        host.accelerator.kind = AcceleratorKind::Kvm;
        host
    };
    let view = view([kvm(1, "a"), kvm(2, "a"), kvm(3, "b"), kvm(4, "")]);
    let go = |cpu, fingerprint: &str| {
        let arrival = Arrival::Migration {
            from: host_id(1),
            accelerator: AcceleratorKind::Kvm,
            fingerprint: fingerprint.into(),
            busy: BTreeSet::new(),
        };
        // Its disks lie where both hosts have them.
        let home = Home::SharedPools { ids: BTreeMap::from([("default".into(), POOL)]) };
        explain(&view, &Request { cpu, arrival, home, ..request(1, 1) }, &limits(100)).candidates
    };
    assert_eq!(go(CpuModel::Host, "a"), [host_id(2)]);
    assert_eq!(go(CpuModel::Host, ""), [], "what is not known is not the same");
    assert_eq!(go(CpuModel::V3, "a").len(), 3);
}

proptest! {
    #[test]
    fn the_view_kept_up_to_date_is_the_one_built_anew(steps in prop::collection::vec(step(), 0..80)) {
        let (view, model) = run(&steps);
        let anew = model.rebuilt();
        prop_assert_eq!(view.index().content(), anew.index().content());
        prop_assert_eq!(view, anew);
    }

    #[test]
    fn placing_never_overcommits_and_never_joins_a_group(
        steps in prop::collection::vec(step(), 0..60),
        wanted in prop::collection::vec((1..4u32, 1..1024u64, prop::option::of(prop::sample::select(vec!["a", "b"]))), 1..30),
        percent in prop::sample::select(vec![100u32, 150, 400]),
    ) {
        let (mut view, _) = run(&steps);
        for (n, (vcpus, memory, group)) in wanted.into_iter().enumerate() {
            let request = Request {
                vm: vm_id(1000 + n as u128),
                group: group.map(str::to_owned),
                ..request(vcpus, memory)
            };
            let Ok(choice) = place(&view, &request, &limits(percent)) else { continue };
            if let Some(group) = group {
                prop_assert_eq!(view.host(choice.host).unwrap().others_in_group(request.vm, group), 0);
            }
            view.assign(choice.host, request.vm, request.needs());
            let (promised, record) = (view.promised(choice.host), view.host(choice.host).unwrap().record);
            prop_assert!(promised.memory_mib <= record.memory_mib);
            prop_assert!(promised.vcpus <= record.vcpus * percent / 100);
        }
    }

    #[test]
    fn every_host_is_explained_once_and_the_best_candidate_is_the_choice(
        steps in prop::collection::vec(step(), 0..60),
        vcpus in 1..4u32,
        memory in 1..2048u64,
    ) {
        let (view, model) = run(&steps);
        let holds = model.vms.get(&vm_id(1)).map(|&(host, _)| host).into_iter().collect();
        let request = Request { holds, ..request(vcpus, memory) };
        let explanation = explain(&view, &request, &limits(100));

        let mut seen = explanation.candidates.clone();
        seen.extend(explanation.groups.iter().flat_map(|g| g.hosts.iter().copied()));
        seen.sort_unstable();
        prop_assert_eq!(seen, model.hosts.keys().copied().collect::<Vec<_>>());
        let sizes: Vec<usize> = explanation.groups.iter().map(|g| g.hosts.len()).collect();
        prop_assert!(sizes.is_sorted_by(|a, b| a >= b));

        // The same view, however it came about, gives the same answer.
        let placed = place(&view, &request, &limits(100));
        prop_assert_eq!(&placed, &place(&model.rebuilt(), &request, &limits(100)));
        prop_assert_eq!(placed.ok().map(|c| c.host), explanation.candidates.first().copied());
    }
}

/// The sizes of all disks count, wherever their VMs are: twice the pool may be promised.
#[test]
fn what_is_promised_in_a_pool_is_the_sum_over_all_its_disks() {
    let mut view = view([host(1, 4, 8192), host(2, 4, 8192)]);
    let pool = Pool {
        name: "default".into(),
        shared_id: Some(POOL),
        capacity_bytes: 10,
        problem: String::new(),
        access: PoolAccess::Directory,
    };
    let room = |view: &ClusterView, host, vm, bytes| {
        let mut view = view.clone();
        let record = HostRecord { pools: vec![pool.clone()], ..view.host(host).unwrap().record.clone() };
        view.upsert_host(Arc::new(record));
        disk_room(&view, host, "default", vm, bytes, &limits(100)).is_ok()
    };
    // A disk that is there, and one that host 1 is about to make.
    view.set_disks(vm_id(7), BTreeMap::from([(Place::Shared(POOL), 12)]));
    view.set_disks(vm_id(8), BTreeMap::from([(Place::OnHost(host_id(1), "default".into()), 4)]));
    assert!(room(&view, host_id(1), vm_id(9), 4) && !room(&view, host_id(1), vm_id(9), 5));
    assert!(room(&view, host_id(2), vm_id(9), 8) && !room(&view, host_id(2), vm_id(9), 9));
    // What it has already does not count against a VM itself.
    assert!(room(&view, host_id(1), vm_id(7), 16) && !room(&view, host_id(1), vm_id(7), 17));
    let before = view.openings();
    view.set_disks(vm_id(7), BTreeMap::new());
    assert!(view.openings() > before, "somebody who waits may find room now");
    assert!(room(&view, host_id(1), vm_id(9), 16));
    view.set_disks(vm_id(8), BTreeMap::new());
    let fresh: ClusterView = super::tests::view([host(1, 4, 8192), host(2, 4, 8192)]);
    assert!(view == fresh, "nothing is left behind");
}
