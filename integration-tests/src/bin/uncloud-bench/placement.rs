//! How fast the scheduler chooses, and how well it packs: pure code, one thread, a cluster of 10,000 hosts and a trace of VMs that
//! come and go, drawn from a fixed seed. What is measured is the thread's CPU time: nothing here waits, and others may use the machine.
//!
//! All filters are in use: hosts in eight pods with zones, three sizes, three levels of CPUs, bridges, a local pool each (no two of the same
//! size) and a shared one per pod; some are cordoned, drained or dead, 50 others
//! are silent at each moment, and some have only the translator. VMs want vCPUs (four per
//! thread may be promised), memory, new disks of some size, sometimes a zone, a bridge or a newer CPU, and a third of them are in
//! anti-affinity groups of five.
//!
//! | name | ours | limit |
//! |---|---|---|
//! | `place_per_second` | choosing by the index, while VMs come and go | choosing by the scan over all hosts, in the same states |
//! | `place_kept_per_second` | the same, and taking it into the view, and out of it again when the VM goes | the same with the scan |
//! | `place_packing` | share of the vCPUs promised when 400 VMs were refused, of 400 hosts | by the scan |
//! | `place_packing_best` | the same number of ours | by a full best fit: of all hosts that can take it, the one with the least memory left |

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rand::{
    Rng as _, SeedableRng as _,
    rngs::StdRng,
    seq::{IndexedRandom as _, SliceRandom as _},
};
use rustix::time::{ClockId, clock_gettime};
use uncloud_controller::{
    model::{
        Extra, HostMode, HostRecord, Liveness,
        host::{Accelerator, AcceleratorKind, Cpu, Pool, PoolAccess},
        vm::CpuModel,
    },
    scheduler::{Arrival, ClusterView, Home, Limits, Place, Request, explain, place, place_by_scan},
};
use uncloud_proto::{
    clock::WallTime,
    cpu::Level,
    ids::{HostId, VmId},
};
use uuid::Uuid;

use super::Measured;

const HOSTS: u32 = 10_000;
const VMS: usize = 100_000;
/// How many VMs come and as many go in the churn.
const CHURN: usize = 50_000;
/// As many go, and then as many come: long enough for a clock.
const BLOCK: usize = 1_000;
/// How many the scan places in the churn, for its rate: it takes milliseconds for each.
const SCANNED: usize = 100;
/// The packing is compared on fewer hosts, and for as many refusals.
const PACKED: u32 = 400;
const REFUSALS: usize = 400;
const SEED: u64 = 7;

pub(crate) fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut rows = speed()?;
    let ours = packing(|view, request, limits| place(view, request, limits).ok().map(|c| c.host))?;
    let scan = packing(|view, request, limits| place_by_scan(view, request, limits).ok().map(|c| c.host))?;
    let best = packing(best_fit)?;
    rows.push(Measured::new("place_packing", ours, scan, "%", "the scan over all hosts"));
    rows.push(Measured::new("place_packing_best", ours, best, "%", "a full best fit"));
    Ok(rows)
}

fn speed() -> anyhow::Result<Vec<Measured>> {
    let mut site = Site::new(HOSTS);
    let mut filling = Duration::ZERO;
    while site.vms.len() < VMS {
        let request = site.wanted();
        let begin = cpu_time();
        let kept = site.place(&request);
        filling += cpu_time().saturating_sub(begin);
        kept.with_context(|| format!("no room after {} VMs", site.vms.len()))?;
    }
    eprintln!("filled with {VMS} VMs: {:.0} per second", rate(VMS, filling));

    let (mut choosing, mut keeping, mut scanning, mut scanned) = (Duration::ZERO, Duration::ZERO, Duration::ZERO, 0);
    for _ in 0..CHURN / BLOCK {
        site.fall_silent();
        site.vms.shuffle(&mut site.random);
        let gone = site.vms.split_off(site.vms.len() - BLOCK);
        let requests: Vec<Request> = (0..BLOCK).map(|_| site.wanted()).collect();
        let begin = cpu_time();
        for (host, vm) in gone {
            site.view.release(host, vm);
            site.view.set_disks(vm, BTreeMap::new());
        }
        for request in &requests {
            site.place(request).context("the churn found no room")?;
        }
        keeping += cpu_time().saturating_sub(begin);

        // Only choosing, for others, among what is there now. The answers are looked at, so that they are really made.
        let requests: Vec<Request> = (0..BLOCK).map(|_| site.wanted()).collect();
        let limits = site.limits();
        let begin = cpu_time();
        let chosen = requests.iter().filter(|r| place(&site.view, r, &limits).is_ok()).count();
        choosing += cpu_time().saturating_sub(begin);
        ensure!(chosen == BLOCK, "{chosen} of {BLOCK} found room");
        if scanned < SCANNED {
            let some = &requests[..SCANNED * BLOCK / CHURN + 1];
            let begin = cpu_time();
            let answers: Vec<_> = some.iter().map(|r| place_by_scan(&site.view, r, &limits)).collect();
            scanning += cpu_time().saturating_sub(begin);
            scanned += some.len();
            for (request, answer) in some.iter().zip(answers) {
                ensure!(answer == place(&site.view, request, &limits), "the index chose another host than the scan");
            }
        }
    }
    let (ours, scan) = (rate(CHURN, choosing), rate(scanned, scanning));
    let kept = rate(CHURN, keeping);
    // What keeping costs is the same for both.
    let scan_kept = 1.0 / (1.0 / scan + (1.0 / kept - 1.0 / ours).max(0.0));
    Ok(vec![
        Measured::new("place_per_second", ours, scan, "/s", format!("the scan over {HOSTS} hosts")),
        Measured::new("place_kept_per_second", kept, scan_kept, "/s", "the same with the scan"),
    ])
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

fn rate(n: usize, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let n = n as f64;
    n / took.as_secs_f64()
}

/// Lets VMs come and, more seldom, go until so many were refused; gives the share of the vCPUs that is promised then, in percent.
fn packing(choose: impl Fn(&ClusterView, &Request, &Limits<'_>) -> Option<HostId>) -> anyhow::Result<f64> {
    let mut site = Site::new(PACKED);
    let mut refused = 0;
    while refused < REFUSALS {
        let request = site.wanted();
        let chosen = choose(&site.view, &request, &site.limits());
        match chosen {
            Some(host) => site.keep(host, &request),
            None => refused += 1,
        }
        // One goes for each three that come, drawn from the same numbers whoever chooses.
        if site.random.random_bool(1.0 / 3.0) {
            let n = site.random.random_range(0..site.vms.len().max(1));
            if n < site.vms.len() {
                let (host, vm) = site.vms.swap_remove(n);
                site.view.release(host, vm);
                site.view.set_disks(vm, BTreeMap::new());
            }
        }
    }
    let (mut promised, mut all) = (0_u64, 0_u64);
    for (id, host) in site.view.hosts() {
        promised += u64::from(site.view.promised(id).vcpus);
        all += u64::from(host.record.vcpus) * u64::from(CPU_OVERCOMMIT) / 100;
    }
    ensure!(all > 0, "there are no hosts");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(promised as f64 * 100.0 / all as f64)
}

fn best_fit(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Option<HostId> {
    let left = |host: &HostId| {
        let memory = view.host(*host).map_or(0, |h| h.record.memory_mib);
        (memory.saturating_sub(view.promised(*host).memory_mib), *host)
    };
    explain(view, request, limits).candidates.into_iter().min_by_key(left)
}

const CPU_OVERCOMMIT: u32 = 400;
const BRIDGES: [&str; 2] = ["br0", "br1"];
const ZONES: u32 = 4;

struct Site {
    view: ClusterView,
    silent: BTreeSet<HostId>,
    vms: Vec<(HostId, VmId)>,
    random: StdRng,
    made: u32,
}

impl Site {
    fn new(hosts: u32) -> Self {
        let mut random = StdRng::seed_from_u64(SEED);
        let mut view = ClusterView::default();
        for n in 0..hosts {
            let record = host(n, n * 8 / hosts, &mut random);
            view.upsert_host(Arc::new(record));
        }
        Self { view, silent: BTreeSet::new(), vms: Vec::new(), random, made: 0 }
    }

    /// Others are silent now.
    fn fall_silent(&mut self) {
        let hosts: Vec<HostId> = self.view.hosts().map(|(id, _)| id).collect();
        self.silent = hosts.choose_multiple(&mut self.random, hosts.len() / 200).copied().collect();
    }

    fn limits(&self) -> Limits<'_> {
        Limits { cpu_overcommit_percent: CPU_OVERCOMMIT, disk_overcommit_percent: 200, silent: &self.silent }
    }

    fn place(&mut self, request: &Request) -> Option<()> {
        let choice = place(&self.view, request, &self.limits()).ok()?;
        self.keep(choice.host, request);
        Some(())
    }

    fn keep(&mut self, host: HostId, request: &Request) {
        self.view.assign(host, request.vm, request.needs());
        let places = request.pools.iter().map(|(pool, &bytes)| {
            let shared = self.view.host(host).and_then(|h| h.record.pools.iter().find(|p| p.name == *pool)?.shared_id);
            (shared.map_or_else(|| Place::OnHost(host, pool.clone()), Place::Shared), bytes)
        });
        let places = places.collect();
        self.view.set_disks(request.vm, places);
        self.vms.push((host, request.vm));
    }

    /// A VM that has not been there before.
    fn wanted(&mut self) -> Request {
        self.made += 1;
        let random = &mut self.random;
        let vcpus = *[1, 1, 2, 2, 2, 4, 4, 8, 16].choose(random).unwrap_or(&1);
        let memory_per_vcpu = *[1024, 2048, 2048, 4096].choose(random).unwrap_or(&1024);
        let pool = if random.random_bool(0.7) { "local" } else { "shared" };
        let bridge = BRIDGES[usize::from(random.random_bool(0.2))];
        let zone = random.random_bool(0.3).then(|| random.random_range(0..ZONES));
        let group = random.random_bool(0.33).then(|| format!("group-{}", self.made / 15));
        Request {
            vm: VmId::from_uuid(uuid::Builder::from_random_bytes(random.random()).into_uuid()),
            vcpus,
            memory_mib: u64::from(vcpus) * memory_per_vcpu,
            pools: BTreeMap::from([(pool.to_owned(), random.random_range(10..100) << 30)]),
            writeback_pools: BTreeSet::new(),
            bridges: BTreeSet::from([bridge.to_owned()]),
            host_labels: zone.map(|zone| ("zone".to_owned(), format!("z{zone}"))).into_iter().collect(),
            group,
            home: Home::Anywhere,
            prefer: None,
            cpu: *[CpuModel::V2, CpuModel::V2, CpuModel::V2, CpuModel::V3, CpuModel::V4]
                .choose(random)
                .unwrap_or(&CpuModel::V2),
            arrival: Arrival::Start,
            holds: Vec::new(),
        }
    }
}

fn host(n: u32, pod: u32, random: &mut StdRng) -> HostRecord {
    let (vcpus, memory_gib) = *[(32, 128), (64, 256), (96, 512)].choose(random).unwrap_or(&(32, 128));
    let level = [Level::V4, Level::V3, Level::V4, Level::V2][(pod % 4) as usize];
    let two_bridges = random.random_bool(0.5);
    let pool = |name: &str, shared_id, capacity_bytes| Pool {
        name: name.to_owned(),
        shared_id,
        capacity_bytes,
        problem: String::new(),
        access: PoolAccess::Directory,
    };
    let local = random.random_range(1 << 42..1 << 43);
    HostRecord {
        id: HostId::from_uuid(uuid::Builder::from_random_bytes(random.random()).into_uuid()),
        name: format!("host-{n}"),
        labels: BTreeMap::from([("zone".to_owned(), format!("z{}", pod / 2)), ("pod".to_owned(), format!("p{pod}"))]),
        vcpus,
        memory_mib: memory_gib << 10,
        pools: vec![pool("local", None, local), pool("shared", Some(Uuid::from_u128(u128::from(pod) + 1)), 1 << 50)],
        accelerator: Accelerator {
            kind: if random.random_bool(0.95) { AcceleratorKind::Kvm } else { AcceleratorKind::Tcg },
            why: String::new(),
        },
        mode: match random.random_range(0..100) {
            0 => HostMode::Cordoned,
            1 => HostMode::Draining,
            _ => HostMode::Active,
        },
        mode_reason: String::new(),
        drain_how: Default::default(),
        drain_disks: Default::default(),
        liveness: if random.random_bool(0.995) { Liveness::Up } else { Liveness::Dead },
        liveness_since: WallTime(0),
        agent_version: "1".into(),
        migration_address: "192.0.2.1".into(),
        cpu: Cpu {
            name: "a CPU".into(),
            features: level.features().map(str::to_owned).collect(),
            fingerprint: format!("{level:?}"),
        },
        bridges: BRIDGES[..1 + usize::from(two_bridges)].iter().map(|&b| b.to_owned()).collect(),
        boot_id: Uuid::nil(),
        created: WallTime(0),
        extra: Extra::new(),
    }
}
