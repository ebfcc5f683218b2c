//! What the tests here share: an etcd of their own, and terms of leadership in this process.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    future::Future,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time};
use uncloud_controller::{
    health::Timings,
    leadership::{Campaign, Candidate, Elected, Follower, Leader, LeaderToken, Settings},
    model::{
        Desired,
        host::{Accelerator, AcceleratorKind, Pool, PoolAccess},
        vm::{Display, Failover, GuestAgent, Machine, OnDiskLoss, RestartPolicy, VmSpec},
    },
    state::command::{self, HostFacts, NewVm, RequestId},
    store::Store,
};
use uncloud_proto::{
    clock::Clock,
    ids::{ControllerId, HostId, VmId},
};
use uuid::Uuid;

/// How long anything may take. Generous: the machine may be busy.
/// Room in the etcd of a test, in bytes: enough for all but one that fills it.
pub(crate) const QUOTA: usize = 32 << 20;
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        time::sleep(Duration::from_millis(20)).await;
    }
}

/// A private etcd that a test may stop, freeze and kill.
pub(crate) struct Etcd {
    client_port: u16,
    peer_port: u16,
    child: Child,
    dir: TempDir,
}

impl Etcd {
    pub(crate) async fn start() -> Self {
        // etcd cannot be told to take any free port; somebody else may take one that was found.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let (client_port, peer_port) = (free_port(), free_port());
            let child = spawn(dir.path(), client_port, peer_port);
            let mut etcd = Self { client_port, peer_port, child, dir };
            if etcd.serves().await {
                return etcd;
            }
        }
        panic!("no etcd could be started");
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub(crate) async fn store(&self) -> Store {
        Store::connect(&[self.endpoint()]).await.unwrap()
    }

    pub(crate) async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.endpoint()], None).await.unwrap()
    }

    /// The value under a key, and the id of its etcd lease.
    pub(crate) async fn get(&self, key: &str) -> Option<(Vec<u8>, i64)> {
        let answer = self.client().await.get(key, None).await.unwrap();
        answer.kvs().first().map(|kv| (kv.value().to_vec(), kv.lease()))
    }

    /// All keys that begin so, with their leases.
    pub(crate) async fn keys(&self, prefix: &str) -> Vec<(String, i64)> {
        let options = etcd_client::GetOptions::new().with_prefix().with_keys_only();
        let answer = self.client().await.get(prefix, Some(options)).await.unwrap();
        answer.kvs().iter().map(|kv| (kv.key_str().unwrap().to_owned(), kv.lease())).collect()
    }

    /// SIGSTOP: it hangs, and its connections stay open. Returns when it does: on a busy machine a thread of it may go on for longer than
    /// a transaction takes.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        let stopped = |stat: &str| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
        let begin = Instant::now();
        loop {
            let mut threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
            if threads.all(|t| std::fs::read_to_string(t.unwrap().path().join("stat")).is_ok_and(|s| stopped(&s))) {
                return;
            }
            assert!(begin.elapsed() < LIMIT, "etcd does not stop");
            std::thread::yield_now();
        }
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGKILL, and a new start with the same data.
    pub(crate) async fn crash_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), self.client_port, self.peer_port);
        assert!(self.serves().await, "etcd does not come back");
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    async fn serves(&mut self) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if let Ok(mut client) = etcd_client::Client::connect([self.endpoint()], None).await
                && client.status().await.is_ok()
            {
                return true;
            }
            time::sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill(); // a frozen one, too
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, client_port: u16, peer_port: u16) -> Child {
    let client = format!("http://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let log = File::options().create(true).append(true).open(dir.join("etcd.log")).unwrap();
    Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--quota-backend-bytes", &QUOTA.to_string()])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("etcd is installed (apt-get install etcd-server)")
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Somebody who stands for election.
pub(crate) fn campaign(store: &Store, address: &str) -> Arc<Campaign> {
    let candidate =
        Candidate { id: ControllerId::from_uuid(Uuid::new_v4()), address: address.to_owned(), predecessor: None };
    Arc::new(Campaign::new(store.clone(), Clock::system(), candidate))
}

pub(crate) async fn win(campaign: &Campaign) -> Elected {
    time::timeout(LIMIT, campaign.win(|_| {})).await.expect("an election is won")
}

pub(crate) fn settings() -> Settings {
    Settings {
        timings: Timings {
            fast: Duration::from_secs(6),
            patient: Duration::from_secs(60),
            kill_allowance: Duration::from_secs(1),
        },
        cpu_overcommit_percent: 400,
        disk_overcommit_percent: 200,
        address: "127.0.0.1:1".into(),
        controllers: vec!["127.0.0.1:1".into()],
        metrics: Default::default(),
    }
}

/// A term of leadership in this process, without reconciler and server.
pub(crate) struct Reign {
    pub(crate) leader: Arc<Leader>,
    campaign: Arc<Campaign>,
    lease: i64,
    keep: JoinHandle<()>,
    writer: JoinHandle<LeaderToken>,
}

impl Reign {
    /// Stands for election, wins it and begins the term.
    pub(crate) async fn begin(store: &Store) -> Self {
        let campaign = campaign(store, "127.0.0.1:1");
        let elected = win(&campaign).await;
        let (lease, keeping) = (elected.lease(), elected.keeper());
        let keep = tokio::spawn({
            let campaign = campaign.clone();
            async move { campaign.keep(&keeping).await }
        });
        let id = ControllerId::from_uuid(Uuid::new_v4());
        let mirror = Follower::load(store).await.unwrap();
        let (leader, writer) = Leader::begin(store.clone(), Clock::system(), id, elected, settings(), mirror)
            .await
            .map_err(|e| e.0)
            .unwrap();
        Self { leader, campaign, lease, keep, writer }
    }

    /// Everything stops at once, and nothing is given back: as if the process had been killed.
    pub(crate) fn crash(self) {
        self.keep.abort();
        self.writer.abort();
        self.leader.cancel.cancel();
    }

    /// A clean end.
    pub(crate) async fn resign(self) {
        self.leader.cancel.cancel();
        let token = time::timeout(LIMIT, self.writer).await.expect("the writer ends").unwrap();
        self.campaign.resign(&token, self.lease).await;
        time::timeout(LIMIT, self.keep).await.expect("the keep-alive ends").unwrap();
    }

    /// Waits until the term has ended by itself.
    pub(crate) async fn ended(&self) {
        time::timeout(LIMIT, self.leader.cancel.cancelled()).await.expect("the term ends");
        assert!(!self.leader.is_valid());
    }

    pub(crate) async fn submit(
        &self,
        command: command::Command,
    ) -> Result<uncloud_controller::leadership::Committed, uncloud_controller::leadership::WriteError> {
        time::timeout(LIMIT, self.leader.writer.submit(command)).await.expect("the writer answers")
    }
}

pub(crate) fn vm_id(n: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(0xbeef_0000_0000 + n))
}

pub(crate) fn host_facts(n: u128) -> HostFacts {
    HostFacts {
        id: HostId::from_uuid(Uuid::from_u128(0xa000 + n)),
        name: format!("host-{n}"),
        labels: BTreeMap::new(),
        vcpus: 64,
        memory_mib: 1 << 20,
        pools: vec![Pool {
            name: "default".into(),
            shared_id: None,
            capacity_bytes: 1 << 40,
            problem: String::new(),
            access: PoolAccess::Directory,
        }],
        accelerator: Accelerator { kind: AcceleratorKind::Tcg, why: "no /dev/kvm".into() },
        migration_address: "127.0.0.1".into(),
        cpu: Default::default(),
        bridges: BTreeSet::new(),
        agent_version: "0.1.0".into(),
        boot_id: Uuid::from_u128(n),
    }
}

pub(crate) fn register(n: u128) -> command::Command {
    command::Command::RegisterHost { host: Box::new(host_facts(n)) }
}

pub(crate) fn spec() -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib: 64,
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

pub(crate) fn create(n: u128, request: Option<&str>) -> command::Command {
    let vm = NewVm {
        id: vm_id(n),
        name: format!("vm-{n}"),
        owner: "default".into(),
        labels: BTreeMap::new(),
        spec: spec(),
        image_names: Vec::new(),
        desired: Desired::Running,
    };
    let request = request.map(|id| RequestId { id: id.to_owned(), fingerprint: "f".into() });
    command::Command::CreateVm { request, vm: Box::new(vm) }
}
