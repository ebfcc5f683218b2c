//! The session, the gate, the manager and the VMs' tasks together, against a leader that the test plays over
//! loopback, with a hypervisor that has no processes.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Server};
use uncloud_proto::{
    clock::{Clock, Tick},
    ids::{HostId, VmId},
    v1::{
        self, AgentVmState, AttachStreamRequest, AttachStreamResponse, DesiredVm, Disposition, Goodbye, GoodbyeReason,
        Renewal, SessionRequest, SessionResponse, Welcome,
        agent_service_server::{AgentService, AgentServiceServer},
        session_request::Message as Ours,
        session_response::Message as Theirs,
    },
};
use uuid::Uuid;

use super::{
    connect,
    gate::Gate,
    outbox::SharedOutbox,
    pump::{Identity, Session},
    serving::Serving,
    streams::Streams,
};
use crate::{
    lease::{LeaseClass, LeaseFile},
    records::{AgentFile, StateDir},
    storage::{images::Images, inspect::Inspector, source::Roots},
    vm::{
        fake::{FakeHypervisor, World},
        hypervisor::ExitKind,
        manager::Manager,
        runner::Host,
    },
};

const LIMIT: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(6);

fn vm(n: u128) -> VmId {
    VmId::from_uuid(Uuid::from_u128(n))
}

fn desired(n: u128, incarnation: u64, disposition: Disposition) -> DesiredVm {
    DesiredVm {
        vm_id: vm(n).to_string(),
        incarnation,
        disposition: disposition.into(),
        name: format!("vm{n}"),
        owner: "default".into(),
        spec: (disposition != Disposition::Forget).then(|| v1::VmSpec {
            vcpus: 1,
            memory_mib: 64,
            machine: "pc".into(),
            restart: v1::RestartPolicy::OnFailure.into(),
            failover: v1::FailoverPolicy::Fast.into(),
            stop_grace_seconds: 60,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn run(n: u128, incarnation: u64) -> DesiredVm {
    desired(n, incarnation, Disposition::Run)
}

/// The leader's end of one session.
struct Talk {
    hello: v1::Hello,
    requests: Streaming<SessionRequest>,
    responses: mpsc::Sender<Result<SessionResponse, Status>>,
    term: i64,
    reports: BTreeMap<String, v1::VmReport>,
    heartbeats: Vec<u64>,
    inspections: Vec<v1::FileInspection>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Renewals {
    Granted,
    Withheld,
}

impl Talk {
    async fn send(&self, message: Theirs) {
        let response = SessionResponse { term: self.term, message: Some(message) };
        self.responses.send(Ok(response)).await.expect("the session stands");
    }

    async fn welcome(&mut self, term: i64, vms: Vec<DesiredVm>) {
        self.term = term;
        self.send(Theirs::Welcome(Welcome { heartbeat_interval_ms: 50, vms, controllers: vec![] })).await;
    }

    async fn want(&self, vms: Vec<DesiredVm>) {
        self.send(Theirs::Desired(v1::DesiredVms { vms })).await;
    }

    async fn renew(&self, sequence: u64) {
        let lease = u64::try_from(LEASE.as_millis()).unwrap();
        self.send(Theirs::Renewal(Renewal { sequence, fast_lease_ms: lease, patient_lease_ms: lease * 10 })).await;
    }

    /// Takes one message of the agent. `None`: the agent ended the session.
    async fn step(&mut self, renewals: Renewals) -> Option<()> {
        let message = time::timeout(LIMIT, self.requests.message()).await.expect("the agent is silent");
        match message.ok()??.message? {
            Ours::Hello(_) => panic!("a second Hello"),
            Ours::Heartbeat(beat) => {
                self.heartbeats.push(beat.sequence);
                match renewals {
                    Renewals::Granted => self.renew(beat.sequence).await,
                    // As the leader does, so that it is not left for its silence. The agent may be leaving at this moment.
                    Renewals::Withheld => {
                        let message = Some(Theirs::Ack(v1::ReportAck::default()));
                        _ = self.responses.send(Ok(SessionResponse { term: self.term, message })).await;
                    }
                }
            }
            Ours::Served(_) => panic!("this host serves nothing"),
            Ours::Report(report) => {
                for report in report.vms {
                    self.reports.insert(report.vm_id.clone(), report);
                }
            }
            Ours::Inspection(inspection) => self.inspections.push(inspection),
            Ours::Pools(_) | Ours::FetchProgress(_) | Ours::ImageFetched(_) | Ours::ImageRemoved(_) => {}
        }
        Some(())
    }

    /// Serves until the VM is in this state with this incarnation.
    async fn until(&mut self, renewals: Renewals, n: u128, incarnation: u64, state: AgentVmState) -> v1::VmReport {
        let deadline = time::Instant::now() + LIMIT;
        loop {
            if let Some(report) = self.reports.get(&vm(n).to_string())
                && report.state() == state
                && report.incarnation == incarnation
            {
                return report.clone();
            }
            assert!(time::Instant::now() < deadline, "not {state:?}, but {:?}", self.reports);
            self.step(renewals).await.expect("the session stands");
        }
    }

    /// Serves so many more heartbeats.
    async fn beats(&mut self, renewals: Renewals, count: usize) {
        let target = self.heartbeats.len() + count;
        while self.heartbeats.len() < target {
            self.step(renewals).await.expect("the session stands");
        }
    }

    async fn beats_until(&mut self, condition: impl Fn() -> bool) {
        let deadline = time::Instant::now() + LIMIT;
        while !condition() {
            assert!(time::Instant::now() < deadline, "the condition does not come true");
            self.beats(Renewals::Granted, 1).await;
        }
    }

    async fn until_ended_by_agent(&mut self) {
        let ended = async { while self.step(Renewals::Withheld).await.is_some() {} };
        time::timeout(LIMIT, ended).await.expect("the agent does not end the session");
    }

    async fn ack(&self, n: u128) {
        let report = &self.reports[&vm(n).to_string()];
        let entry = v1::ReportAckEntry { vm_id: report.vm_id.clone(), sequence: report.sequence };
        self.send(Theirs::Ack(v1::ReportAck { entries: vec![entry] })).await;
    }
}

struct Service {
    sessions: mpsc::Sender<Talk>,
}

#[tonic::async_trait]
impl AgentService for Service {
    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;
    type AttachStreamStream = ReceiverStream<Result<AttachStreamResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut requests = request.into_inner();
        let (responses, stream) = mpsc::channel(64);
        let sessions = self.sessions.clone();
        tokio::spawn(async move {
            let Ok(Some(SessionRequest { message: Some(Ours::Hello(hello)) })) = requests.message().await else {
                panic!("the first message is no Hello");
            };
            let reports = hello.vms.iter().map(|r| (r.vm_id.clone(), r.clone())).collect();
            let talk = Talk { hello, requests, responses, term: 0, reports, heartbeats: vec![], inspections: vec![] };
            let _ = sessions.send(talk).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn attach_stream(
        &self,
        _: Request<Streaming<AttachStreamRequest>>,
    ) -> Result<Response<Self::AttachStreamStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

struct Leader {
    address: SocketAddr,
    sessions: mpsc::Receiver<Talk>,
    task: JoinHandle<()>,
}

impl Leader {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, sessions) = mpsc::channel(8);
        let service = AgentServiceServer::new(Service { sessions: sender });
        let task = tokio::spawn(async move {
            Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { address, sessions, task }
    }

    async fn session(&mut self) -> Talk {
        time::timeout(LIMIT, self.sessions.recv()).await.expect("no agent dials").expect("the server runs")
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A host: what survives a restart of its agent.
struct Machine {
    dir: tempfile::TempDir,
    world: Arc<World>,
    /// Seconds that the clock is ahead.
    ahead: Arc<AtomicU64>,
    images: tempfile::TempDir,
}

struct Agent {
    cancel: CancellationToken,
    task: JoinHandle<()>,
    lease: Arc<LeaseFile>,
    clock: Clock,
}

impl Machine {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            world: Arc::default(),
            ahead: Arc::default(),
            images: tempfile::tempdir().unwrap(),
        }
    }

    fn pass(&self, time: Duration) {
        self.ahead.fetch_add(time.as_secs(), Ordering::SeqCst);
    }

    async fn start(&self, controllers: &[SocketAddr]) -> Agent {
        let (real, ahead) = (Clock::system(), Arc::clone(&self.ahead));
        let wall = real.clone();
        let boot = move || -> Tick { real.now().after(Duration::from_secs(ahead.load(Ordering::SeqCst))) };
        let clock = Clock::custom(boot, move || wall.wall());
        let state = StateDir::open(self.dir.path()).unwrap();
        let dirs = state.vms();
        let boot_id = Uuid::from_u128(77);
        let lease = Arc::new(LeaseFile::open(&state.lease_path(), boot_id).unwrap());
        let agent = Arc::new(AgentFile::open(state, HostId::from_uuid(Uuid::new_v4())).unwrap());
        let hypervisor =
            FakeHypervisor { world: Arc::clone(&self.world), lease: Arc::clone(&lease), clock: clock.clone() };
        let host = Host {
            hypervisor: Arc::new(hypervisor),
            lease: Arc::clone(&lease),
            clock: clock.clone(),
            dirs: dirs.clone(),
            outbox: SharedOutbox::default(),
        };
        let cancel = CancellationToken::new();
        let manager = Arc::new(Manager::new(host, cancel.clone()));
        let incarnations = manager.adopt_all().unwrap();
        manager.adopted().await;
        let host_id = agent.get().host_id;
        let session = Session {
            identity: Identity {
                host: host_id,
                name: "h".into(),
                boot: boot_id,
                instance: Uuid::new_v4(),
                capacity: v1::Resources::default(),
                labels: BTreeMap::new(),
                accelerator: v1::Accelerator::default(),
                migration_address: None,
                cpu: v1::Cpu::default(),
                bridges: Vec::new(),
            },
            gate: Gate::new(agent.get().newest_term, incarnations),
            manager: Arc::clone(&manager),
            agent,
            lease: Arc::clone(&lease),
            clock: clock.clone(),
            pools: tokio::sync::watch::channel(vec![]).1,
            network_pools: Vec::new(),
            exports: Serving::new(None),
            inspector: Inspector::new(Arc::new(Roots::new(&[self.images.path().to_owned()], &[]))),
            streams: Streams::new(host_id, dirs),
            images: Images::without_pools(Arc::default(), host_id),
        };
        let controllers = controllers.iter().map(ToString::to_string).collect();
        let stop = cancel.clone();
        let task = tokio::spawn(async move {
            connect::run(session, controllers, uncloud_proto::dial::Dial::tcp(), || 0.0, stop).await;
            manager.stopped().await;
        });
        Agent { cancel, task, lease, clock }
    }
}

impl Agent {
    async fn stop(self) {
        self.cancel.cancel();
        time::timeout(LIMIT, self.task).await.expect("the agent stops").unwrap();
    }

    fn has_lease(&self) -> bool {
        self.lease.word(LeaseClass::Fast).valid_at(self.clock.now())
    }
}

/// A VM that runs with incarnation 1 in the first session of a fresh machine.
async fn running(machine: &Machine, leader: &mut Leader) -> (Agent, Talk) {
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    (agent, talk)
}

#[tokio::test]
async fn a_vm_starts_only_when_its_host_has_a_lease() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    assert!(talk.hello.vms.is_empty());
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Withheld, 1, 1, AgentVmState::Preparing).await;
    talk.beats(Renewals::Withheld, 10).await;
    assert!(machine.world.launched().is_empty() && !agent.has_lease());

    let report = talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    assert!(report.disks_ready && agent.has_lease());
    assert_eq!(machine.world.launched(), [1]);
    agent.stop().await;
    machine.world.assert_p1();
}

/// The lease of a VM's class decides, from its first word on: what is fast, patient or pinned is not known before.
#[tokio::test]
async fn a_vm_of_any_class_starts_under_its_first_incarnation() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![]).await;
    talk.beats(Renewals::Granted, 2).await;
    let classes = [v1::FailoverPolicy::Fast, v1::FailoverPolicy::Patient, v1::FailoverPolicy::Hold];
    for (n, class) in (1..).zip(classes) {
        let mut wanted = run(n, 1);
        wanted.spec.as_mut().unwrap().failover = class.into();
        talk.want(vec![wanted]).await;
        talk.until(Renewals::Granted, n, 1, AgentVmState::Running).await;
    }
    assert_eq!(machine.world.launched(), [1, 1, 1]);
    agent.stop().await;
    machine.world.assert_p1();
}

/// L2: what answers no heartbeat of this session grants nothing.
#[tokio::test]
async fn a_renewal_of_an_unknown_heartbeat_grants_nothing() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.renew(1_000_000).await;
    talk.beats(Renewals::Withheld, 5).await;
    assert!(!agent.has_lease() && machine.world.launched().is_empty());

    // Nor does an answer that comes when the lease that it grants is over.
    let beat = *talk.heartbeats.last().unwrap();
    machine.pass(LEASE);
    talk.renew(beat).await;
    talk.beats(Renewals::Withheld, 5).await;
    assert!(!agent.has_lease() && machine.world.launched().is_empty());
    agent.stop().await;
}

/// G1.
#[tokio::test]
async fn a_leader_that_was_replaced_is_not_obeyed() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(7, vec![]).await;
    talk.beats(Renewals::Granted, 2).await;
    // In the same session, and in the next one.
    talk.term = 6;
    talk.want(vec![run(1, 1)]).await;
    talk.until_ended_by_agent().await;
    let mut talk = leader.session().await;
    assert_eq!(talk.hello.newest_term, 7);
    talk.welcome(6, vec![run(1, 1)]).await;
    talk.until_ended_by_agent().await;
    agent.stop().await;
    // And after a restart of the agent: the term is on disk.
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    assert_eq!(talk.hello.newest_term, 7);
    talk.welcome(6, vec![run(1, 1)]).await;
    talk.until_ended_by_agent().await;
    let mut talk = leader.session().await;
    talk.welcome(8, vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    assert_eq!(machine.world.launched(), [1]);
    agent.stop().await;
}

/// G2.
#[tokio::test]
async fn an_older_incarnation_is_not_obeyed() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 5)]).await;
    talk.until(Renewals::Granted, 1, 5, AgentVmState::Running).await;
    talk.want(vec![desired(1, 4, Disposition::Stop), desired(1, 4, Disposition::Forget)]).await;
    talk.beats(Renewals::Granted, 5).await;
    assert_eq!(machine.world.executing(), [(vm(1), uncloud_proto::ids::Incarnation(5))]);
    agent.stop().await;
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![desired(1, 4, Disposition::Delete)]).await;
    talk.beats(Renewals::Granted, 5).await;
    assert_eq!(machine.world.executing().len(), 1, "the incarnation is on disk, too");
    assert!(machine.world.deleted().is_empty());
    agent.stop().await;
}

/// P1: the start was decided under a lease that ran out before QEMU was there.
#[tokio::test]
async fn a_start_that_was_delayed_over_a_lapse_is_fenced() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    machine.world.hold_launches();
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Starting).await;
    machine.pass(LEASE);
    assert!(!agent.has_lease());
    talk.beats(Renewals::Granted, 3).await;
    assert!(agent.has_lease(), "again");
    machine.world.release_launches();
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Fenced).await;
    assert!(machine.world.launched().is_empty());
    // The same word again does not help; a new incarnation does.
    talk.want(vec![run(1, 1)]).await;
    talk.beats(Renewals::Granted, 3).await;
    assert!(machine.world.launched().is_empty());
    talk.want(vec![run(1, 2)]).await;
    talk.until(Renewals::Granted, 1, 2, AgentVmState::Running).await;
    agent.stop().await;
}

/// P1: a word that waits for its next attempt is as old as the lease that it came under.
#[tokio::test]
async fn a_vm_that_waits_for_its_next_attempt_is_fenced_by_a_lapse() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    for _ in 0..2 {
        machine.world.fail_next(crate::vm::hypervisor::LaunchError::Failed("no memory".into()));
    }
    talk.welcome(1, vec![run(1, 1)]).await;
    let report = talk.until(Renewals::Granted, 1, 1, AgentVmState::Failed).await;
    assert!(report.reason == "no memory" && report.next_attempt.is_some());
    machine.pass(Duration::from_secs(60));
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Fenced).await;
    assert!(machine.world.launched().is_empty());
    agent.stop().await;
}

/// P1: the session that brought the word ended before it granted a lease; meanwhile the VM may have been moved.
#[tokio::test]
async fn the_word_of_a_session_that_granted_no_lease_is_void() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Withheld, 1, 1, AgentVmState::Preparing).await;
    drop(talk);
    let mut talk = leader.session().await;
    talk.welcome(1, vec![]).await;
    talk.beats(Renewals::Granted, 5).await;
    assert!(agent.has_lease() && machine.world.launched().is_empty());
    talk.want(vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    agent.stop().await;
}

/// P3.
#[tokio::test]
async fn an_agent_that_is_restarted_adopts_its_vms_and_says_so_at_once() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, talk) = running(&machine, &mut leader).await;
    let before = talk.reports[&vm(1).to_string()].clone();
    agent.stop().await;
    drop(talk);
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    let report = &talk.hello.vms[0];
    assert_eq!((report.state(), report.incarnation, report.since), (AgentVmState::Running, 1, before.since));
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.beats(Renewals::Granted, 5).await;
    assert_eq!((machine.world.launched(), machine.world.commands()), (vec![1], vec![]));
    // Its end is seen, too.
    machine.world.end(vm(1), ExitKind::Signaled(11));
    let report = talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    assert_eq!(report.last_exit.map(|x| x.signal), None, "it still ran when this was said");
    talk.beats_until(|| machine.world.launched().len() == 2).await;
    agent.stop().await;
    machine.world.assert_p1();
}

/// P3: nothing that is slow holds up a heartbeat or the lease.
#[tokio::test]
async fn a_start_that_hangs_holds_up_nothing() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, mut talk) = running(&machine, &mut leader).await;
    machine.world.hold_launches();
    talk.want((2..50).map(|n| run(n, 1)).collect()).await;
    talk.until(Renewals::Granted, 49, 1, AgentVmState::Starting).await;
    talk.beats(Renewals::Granted, 10).await;
    assert!(agent.has_lease());
    agent.stop().await;
}

#[tokio::test]
async fn a_vm_that_belongs_elsewhere_is_killed_and_its_record_goes_when_the_leader_knows() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, mut talk) = running(&machine, &mut leader).await;
    talk.want(vec![desired(1, 2, Disposition::Forget), desired(2, 0, Disposition::Forget)]).await;
    talk.until(Renewals::Granted, 1, 2, AgentVmState::Forgotten).await;
    talk.until(Renewals::Granted, 2, 0, AgentVmState::Forgotten).await;
    assert!(machine.world.executing().is_empty() && machine.world.deleted().is_empty());
    let dir = machine.dir.path().join("vms");
    assert!(dir.join(vm(1).to_string()).exists());
    talk.ack(1).await;
    talk.ack(2).await;
    talk.beats_until(|| fs::read_dir(&dir).unwrap().count() == 0).await;
    // It may come back.
    talk.want(vec![run(1, 3)]).await;
    talk.until(Renewals::Granted, 1, 3, AgentVmState::Running).await;
    agent.stop().await;
    machine.world.assert_p1();
}

/// P5.
#[tokio::test]
async fn disks_are_deleted_only_when_the_leader_says_so_and_after_the_vm() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, mut talk) = running(&machine, &mut leader).await;
    talk.want(vec![desired(1, 1, Disposition::Stop)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Stopping).await;
    assert_eq!(machine.world.commands(), ["power-down"]);
    machine.world.guest(vm(1), crate::vm::hypervisor::InstanceEvent::GuestShutdown);
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Stopped).await;
    assert!(machine.world.deleted().is_empty());
    talk.want(vec![desired(1, 1, Disposition::Delete)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Deleted).await;
    assert_eq!(machine.world.deleted(), [vm(1)]);
    agent.stop().await;
    machine.world.assert_p1();
}

/// V3: and the other VMs go on.
#[tokio::test]
async fn a_truncated_record_is_left_alone_and_stops_nothing() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, mut talk) = running(&machine, &mut leader).await;
    talk.want(vec![run(2, 1)]).await;
    talk.until(Renewals::Granted, 2, 1, AgentVmState::Running).await;
    agent.stop().await;
    machine.world.end(vm(2), ExitKind::KeeperKilled);
    for n in [1, 2] {
        let path = machine.dir.path().join("vms").join(vm(n).to_string()).join("record.json");
        fs::write(path, "{\"vm\":").unwrap();
    }
    let agent = machine.start(&[leader.address]).await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1), run(2, 1), run(3, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    let report = talk.until(Renewals::Granted, 2, 1, AgentVmState::Failed).await;
    assert!(report.reason.contains("record.json") && report.reason.contains("remove"), "{}", report.reason);
    talk.until(Renewals::Granted, 3, 1, AgentVmState::Running).await;
    talk.want(vec![desired(2, 1, Disposition::Delete)]).await;
    talk.beats(Renewals::Granted, 5).await;
    assert!(machine.world.deleted().is_empty());
    agent.stop().await;
}

#[tokio::test]
async fn a_hint_leads_to_the_leader_and_reports_wait_for_it() {
    let (machine, mut follower, mut leader) = (Machine::new(), Leader::start().await, Leader::start().await);
    let agent = machine.start(&[follower.address]).await;
    let talk = follower.session().await;
    talk.send(Theirs::Goodbye(Goodbye {
        reason: GoodbyeReason::NotLeader.into(),
        message: String::new(),
        leader_address: leader.address.to_string(),
    }))
    .await;
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::Running).await;
    drop(talk);
    machine.world.guest(vm(1), crate::vm::hypervisor::InstanceEvent::GuestShutdown);
    // Neither the end of the session nor the leader's absence loses what happened meanwhile.
    let mut talk = leader.session().await;
    talk.welcome(1, vec![run(1, 1)]).await;
    talk.until(Renewals::Granted, 1, 1, AgentVmState::PoweredOff).await;
    agent.stop().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_reported_and_does_no_harm() {
    let (machine, mut leader) = (Machine::new(), Leader::start().await);
    let (agent, mut talk) = running(&machine, &mut leader).await;
    let mut climbing = run(2, 1);
    climbing.spec.as_mut().unwrap().disks =
        vec![v1::Disk { name: "../../x".into(), pool: "p".into(), size_bytes: 512, ..Default::default() }];
    let nameless = DesiredVm { vm_id: "../x".into(), ..run(3, 1) };
    let mut broken = run(1, 1);
    broken.spec = None;
    talk.want(vec![climbing, nameless, broken]).await;
    let report = talk.until(Renewals::Granted, 2, 1, AgentVmState::Failed).await;
    assert!(report.reason.contains("spec.disks[0].name"), "{}", report.reason);
    assert_eq!(machine.world.executing().len(), 1);

    fs::write(machine.images.path().join("x"), "hello").unwrap();
    let source = machine.images.path().join("x").to_str().unwrap().to_owned();
    for (query_id, source) in [(1, source), (2, "/etc/shadow".to_owned())] {
        let role = v1::ImageFileRole::Kernel.into();
        talk.send(Theirs::InspectFile(v1::InspectFile { query_id, source, role })).await;
    }
    while talk.inspections.len() < 2 {
        talk.step(Renewals::Granted).await.unwrap();
    }
    talk.inspections.sort_by_key(|i| i.query_id);
    assert!(matches!(&talk.inspections[0].result, Some(v1::file_inspection::Result::Facts(f)) if f.size_bytes == 5));
    let Some(v1::file_inspection::Result::Problem(problem)) = &talk.inspections[1].result else { panic!() };
    assert_eq!(problem.kind(), v1::FileProblemKind::Forbidden);
    agent.stop().await;
}
