//! The driver of a real term: a real writer, a real etcd of its own, and leases of a second or two.

use std::{future::Future, path::Path};

use uncloud_proto::{clock::Clock, ids::ControllerId};

use super::*;
use crate::{
    health::Grant,
    leadership::{Campaign, Candidate, Follower, Leader, Settings},
    model::{EventType, vm::VmSpec},
    reconcile,
    state::command::{HostFacts, NewVm},
    store::{Store, embedded::EmbeddedEtcd},
};

const TIMINGS: Timings = Timings {
    fast: Duration::from_millis(1_000),
    patient: Duration::from_millis(2_500),
    kill_allowance: Duration::from_millis(100),
};

struct Term {
    leader: Arc<Leader>,
    _etcd: EmbeddedEtcd,
}

async fn term(data_dir: &Path) -> Term {
    let etcd = EmbeddedEtcd::start(data_dir, None).unwrap();
    let clock = Clock::system();
    let store = eventually("etcd serves", async || Store::connect(&[etcd.endpoint().to_owned()]).await.ok()).await;
    let id = ControllerId::from_uuid(Uuid::from_u128(0xc));
    let candidate = Candidate { id, address: "127.0.0.1:1".into(), predecessor: None };
    let campaign = Campaign::new(store.clone(), clock.clone(), candidate);
    let elected = campaign.win(|_| {}).await;
    let keeping = elected.keeper();
    tokio::spawn(async move { campaign.keep(&keeping).await });
    let settings = Settings {
        timings: TIMINGS,
        cpu_overcommit_percent: 400,
        disk_overcommit_percent: 200,
        address: "127.0.0.1:1".into(),
        controllers: Vec::new(),
        metrics: Default::default(),
    };
    let mirror = Follower::load(&store).await.unwrap();
    let (leader, _writer) =
        Leader::begin(store, clock, id, elected, settings, mirror).await.map_err(|(e, _)| e).unwrap();
    tokio::spawn(reconcile::driver::run(Arc::clone(&leader)));
    Term { leader, _etcd: etcd }
}

/// Waits until `look` finds something, with a limit.
async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    for _ in 0..600 {
        if let Some(found) = look().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not within 15 s: {what}");
}

impl Term {
    async fn join(&self, n: u128) {
        let HostRecord {
            id,
            name,
            labels,
            vcpus,
            memory_mib,
            pools,
            accelerator,
            agent_version,
            boot_id,
            migration_address,
            cpu,
            bridges,
            ..
        } = host(n, 1024, Liveness::Up);
        let host = HostFacts {
            id,
            name,
            labels,
            vcpus,
            memory_mib,
            pools,
            accelerator,
            agent_version,
            boot_id,
            migration_address,
            cpu,
            bridges,
        };
        let entry = self.leader.health().enter(id).unwrap();
        self.leader.writer.submit(Command::RegisterHost { host: Box::new(host) }).await.unwrap();
        self.leader.health().register(entry, self.leader.clock.now()).unwrap();
    }

    async fn create(&self, n: u128, spec: VmSpec) {
        let vm = NewVm {
            id: vm_id(n),
            name: format!("v{n}"),
            owner: "default".into(),
            labels: BTreeMap::new(),
            spec,
            image_names: Vec::new(),
            desired: Desired::Running,
        };
        self.leader.writer.submit(Command::CreateVm { request: None, vm: Box::new(vm) }).await.unwrap();
    }

    /// Heartbeats of a host, until the task is aborted.
    fn beats(&self, n: u128) -> tokio::task::JoinHandle<()> {
        let leader = Arc::clone(&self.leader);
        tokio::spawn(async move {
            loop {
                let now = leader.clock.now();
                match leader.health().heartbeat(host_id(n), now) {
                    Grant::Renew { .. } | Grant::Refused(_) => {}
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    }

    async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) {
        eventually(what, async || self.leader.mirror.read(&holds).then_some(())).await;
    }

    async fn has_event(&self, kind: EventType) -> Option<()> {
        let events = self.leader.store.list_events(None, 1_000).await.unwrap();
        events.iter().any(|stored| stored.event.kind == kind).then_some(())
    }
}

fn on(state: &State, n: u128) -> Option<HostId> {
    state.vm(vm_id(n)).unwrap().record.placement.host
}

fn liveness(state: &State, n: u128) -> Liveness {
    state.host(host_id(n)).unwrap().record.liveness
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_moves_vms_class_by_class_and_the_last_host_is_kept_by_the_brake() {
    let dir = tempfile::tempdir().unwrap();
    let term = term(dir.path()).await;
    let patient = VmSpec { failover: Failover::Patient, ..vm(2, 64, None).spec };

    // Nobody is there: it waits, and starts by itself when there is room.
    term.create(1, vm(1, 64, None).spec).await;
    assert_eq!(term.leader.mirror.read(|s| on(s, 1)), None);
    term.join(1).await;
    let first = term.beats(1);
    term.until("the pending VM is placed", |s| on(s, 1) == Some(host_id(1))).await;
    term.create(2, patient).await;
    term.join(2).await;
    let second = term.beats(2);

    first.abort();
    term.until("the fast lease lapses and its VM moves", |s| on(s, 1) == Some(host_id(2))).await;
    term.leader.mirror.read(|s| {
        assert_eq!(liveness(s, 1), Liveness::FastLapsed);
        assert_eq!(on(s, 2), Some(host_id(1)), "L5: the patient one stays");
        assert_eq!(s.vm(vm_id(1)).unwrap().record.placement.incarnation, Incarnation(2));
    });
    term.until("the patient lease lapses and its VM moves", |s| on(s, 2) == Some(host_id(2))).await;
    assert_eq!(term.leader.mirror.read(|s| liveness(s, 1)), Liveness::Dead);

    // Now nobody is heard: that looks like a fault of our own.
    second.abort();
    eventually("the brake engages", async || term.has_event(EventType::BrakeEngaged).await).await;
    tokio::time::sleep(TIMINGS.wait(TIMINGS.patient)).await;
    assert_eq!(term.leader.mirror.read(|s| liveness(s, 2)), Liveness::Up, "L7");
    assert_eq!(term.leader.health().release_brake(term.leader.clock.now()), 1);
    term.until("a person says that it is dead", |s| liveness(s, 2) == Liveness::Dead).await;

    eventually("the brake lets go", async || term.has_event(EventType::BrakeReleased).await).await;

    // One is back; the VMs run again without anybody's help.
    term.join(1).await;
    let _first = term.beats(1);
    term.until("the VMs are placed again", |s| on(s, 1) == Some(host_id(1)) && on(s, 2) == Some(host_id(1))).await;
    let revision = term.leader.mirror.read(State::revision);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(term.leader.mirror.read(State::revision), revision, "nothing to do: nothing is written");
    term.leader.cancel.cancel();
}
