//! A controller in this process with an etcd of its own, and agents that are scripts.

use std::{future::Future, sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Streaming, transport::Channel};
use uncloud_proto::{
    UNREACHED_METADATA_KEY,
    clock::Clock,
    ids::ControllerId,
    v1::{
        self, agent_service_client::AgentServiceClient, cluster_service_client::ClusterServiceClient,
        host_service_client::HostServiceClient, image_service_client::ImageServiceClient, session_request::Message,
        session_response, vm_service_client::VmServiceClient,
    },
};
use uuid::Uuid;

use crate::{
    api,
    health::Timings,
    leadership::{Campaign, Candidate, Follower, Leader, LeaderSlot, Settings, WarmCopy},
    reconcile,
    store::{Store, embedded::EmbeddedEtcd},
};

/// How long anything may take. Generous: the machine may be busy.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// Leases as an operator would have them: nothing lapses during a test.
pub(super) const LONG: Timings =
    Timings { fast: Duration::from_secs(6), patient: Duration::from_secs(60), kill_allowance: Duration::from_secs(1) };

/// Leases that a test can wait for.
pub(super) const SHORT: Timings = Timings {
    fast: Duration::from_millis(1000),
    patient: Duration::from_secs(60),
    kill_allowance: Duration::from_millis(100),
};

/// A controller that leads.
pub(super) struct Node {
    pub(super) slot: LeaderSlot,
    pub(super) leader: Arc<Leader>,
    pub(super) channel: Channel,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    _etcd: EmbeddedEtcd,
    _dir: TempDir,
}

impl Node {
    pub(super) async fn start(timings: Timings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let etcd = EmbeddedEtcd::start(dir.path(), None).unwrap();
        let endpoints = [etcd.endpoint().to_owned()];
        let store = eventually("etcd serves", || async { Store::connect(&endpoints).await.ok() }).await;

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (slot, copy) = (LeaderSlot::default(), WarmCopy::default());
        let (stop, clock) = (CancellationToken::new(), Clock::system());
        let server = tokio::spawn({
            let serving = api::Serving {
                slot: slot.clone(),
                copy: copy.clone(),
                store: watch::channel(Some(store.clone())).1,
                clock: clock.clone(),
                cpu_overcommit_percent: 400,
                disk_overcommit_percent: 200,
                address: address.clone(),
                dial: uncloud_proto::dial::Dial::tcp(),
                metrics: Default::default(),
            };
            let serving = api::serve(api::accept(listener), serving, stop.clone());
            async move { serving.await.unwrap() }
        });

        let id = ControllerId::from_uuid(Uuid::new_v4());
        let campaign =
            Campaign::new(store.clone(), clock.clone(), Candidate { id, address: address.clone(), predecessor: None });
        let elected = time::timeout(LIMIT, campaign.win(|_| {})).await.expect("an election is won");
        let keeper = elected.keeper();
        let keep = tokio::spawn(async move { campaign.keep(&keeper).await });
        let settings = Settings {
            timings,
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
            address: address.clone(),
            controllers: vec![address.clone()],
            metrics: Default::default(),
        };
        let mirror = Follower::load(&store).await.unwrap();
        let (leader, writer) =
            Leader::begin(store, clock, id, elected, settings, mirror).await.map_err(|e| e.0).unwrap();
        let writer = tokio::spawn(async move { drop(writer.await) });
        let reconciler = tokio::spawn(reconcile::driver::run(leader.clone()));
        slot.set(leader.clone());
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Self { slot, leader, channel, stop, tasks: vec![server, keep, writer, reconciler], _etcd: etcd, _dir: dir }
    }

    pub(super) fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    pub(super) fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }

    pub(super) fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    pub(super) fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
    }

    /// Another controller, which has no copy and passes on what it gets.
    pub(super) async fn another(&self) -> Another {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (slot, stop) = (LeaderSlot::default(), CancellationToken::new());
        slot.clear(Some(self.leader.settings.address.clone()));
        let serving = api::Serving {
            slot,
            copy: WarmCopy::default(),
            store: watch::channel(None).1,
            clock: Clock::system(),
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
            address: address.clone(),
            dial: uncloud_proto::dial::Dial::tcp(),
            metrics: Default::default(),
        };
        let serving = api::serve(api::accept(listener), serving, stop.clone());
        tokio::spawn(async move { serving.await.unwrap() });
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Another { channel, _stop: stop.drop_guard() }
    }

    /// Ends the term, as a lost leadership does.
    pub(super) fn depose(&self, hint: Option<&str>) {
        self.slot.clear(hint.map(ToOwned::to_owned));
        self.leader.cancel.cancel();
    }

    pub(super) async fn vm(&self, id: &str) -> v1::Vm {
        let request = v1::GetVmRequest { vm: id.to_owned(), owner: String::new() };
        self.vms().get_vm(request).await.unwrap().into_inner().vm.unwrap()
    }

    /// Creates a VM with an empty disk in the shared pool.
    pub(super) async fn create(&self, name: &str) -> v1::Vm {
        self.vms().create_vm(new_vm(name)).await.unwrap().into_inner().vm.unwrap()
    }
}

/// See [`Node::another`].
pub(super) struct Another {
    pub(super) channel: Channel,
    _stop: DropGuard,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.leader.cancel.cancel();
        self.stop.cancel();
        for task in &self.tasks {
            task.abort();
        }
    }
}

pub(super) fn new_vm(name: &str) -> v1::CreateVmRequest {
    v1::CreateVmRequest {
        name: name.to_owned(),
        spec: Some(v1::VmSpec {
            memory_mib: 64,
            disks: vec![v1::Disk { size_bytes: 1 << 20, ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Waits for a condition.
pub(super) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

/// Takes from a stream until something fits.
pub(super) async fn until<T, R>(what: &str, stream: &mut Streaming<T>, mut fits: impl FnMut(T) -> Option<R>) -> R {
    let work = async {
        loop {
            match stream.message().await {
                Ok(Some(message)) => {
                    if let Some(found) = fits(message) {
                        return found;
                    }
                }
                Ok(None) => panic!("the stream ended before: {what}"),
                Err(status) => panic!("the stream failed before: {what}: {status}"),
            }
        }
    };
    time::timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"))
}

/// An agent that does what the test says.
pub(super) struct Agent {
    pub(super) client: AgentServiceClient<Channel>,
    pub(super) host_id: String,
    outbound: mpsc::Sender<v1::SessionRequest>,
    inbound: Streaming<v1::SessionResponse>,
    heartbeats: u64,
}

/// A Hello of a host with a pool that all hosts share.
pub(super) fn hello(host: u128, boot: u128) -> v1::Hello {
    v1::Hello {
        host_id: Uuid::from_u128(host).to_string(),
        name: format!("host-{host}"),
        boot_id: Uuid::from_u128(boot).to_string(),
        agent_version: "0.1.0".to_owned(),
        protocol: uncloud_proto::AGENT_PROTOCOL,
        capacity: Some(v1::Resources { vcpus: 4, memory_mib: 4096 }),
        pools: vec![v1::Pool {
            name: "default".to_owned(),
            kind: v1::PoolKind::Shared.into(),
            id: Uuid::from_u128(77).to_string(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            ..Default::default()
        }],
        accelerator: Some(v1::Accelerator { kind: v1::AcceleratorKind::Tcg.into(), why: "a test".to_owned() }),
        agent_instance: Uuid::from_u128(99).to_string(),
        ..Default::default()
    }
}

impl Agent {
    /// Opens a session and says Hello.
    pub(super) async fn dial(node: &Node, hello: v1::Hello) -> Self {
        Self::dial_after(node, "", hello).await
    }

    /// The same, of an agent that has not reached these controllers.
    pub(super) async fn dial_after(node: &Node, unreached: &str, hello: v1::Hello) -> Self {
        let mut client = AgentServiceClient::new(node.channel.clone());
        let (outbound, requests) = mpsc::channel(16);
        let host_id = hello.host_id.clone();
        let first = v1::SessionRequest { message: Some(Message::Hello(hello)) };
        outbound.send(first).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(requests));
        request.metadata_mut().insert(UNREACHED_METADATA_KEY, unreached.parse().unwrap());
        let inbound = client.session(request).await.unwrap().into_inner();
        Self { client, host_id, outbound, inbound, heartbeats: 0 }
    }

    /// Opens a session that is welcomed.
    pub(super) async fn join(node: &Node, hello: v1::Hello) -> (Self, v1::Welcome) {
        let mut agent = Self::dial(node, hello).await;
        let welcome = agent.welcome().await;
        (agent, welcome)
    }

    pub(super) async fn send(&self, message: Message) {
        self.outbound.send(v1::SessionRequest { message: Some(message) }).await.unwrap();
    }

    pub(super) async fn heartbeat(&mut self) -> u64 {
        self.heartbeats += 1;
        self.send(Message::Heartbeat(v1::Heartbeat { sequence: self.heartbeats })).await;
        self.heartbeats
    }

    /// The next message that fits. Every message must be of the term.
    pub(super) async fn until<R>(
        &mut self,
        what: &str,
        mut fits: impl FnMut(session_response::Message) -> Option<R>,
    ) -> R {
        until(what, &mut self.inbound, |response| {
            assert!(response.term > 0, "{response:?}");
            fits(response.message.unwrap())
        })
        .await
    }

    pub(super) async fn welcome(&mut self) -> v1::Welcome {
        self.until("a welcome", |m| match m {
            session_response::Message::Welcome(w) => Some(w),
            other => panic!("expected a welcome, got {other:?}"),
        })
        .await
    }

    pub(super) async fn goodbye(&mut self) -> v1::Goodbye {
        let goodbye = self
            .until("a goodbye", |m| match m {
                session_response::Message::Goodbye(g) => Some(g),
                _ => None,
            })
            .await;
        // It is the last message.
        let end = time::timeout(LIMIT, self.inbound.message()).await.unwrap();
        assert!(end.unwrap().is_none());
        goodbye
    }

    pub(super) async fn renewal(&mut self, sequence: u64) -> v1::Renewal {
        self.until("a renewal", |m| match m {
            session_response::Message::Renewal(r) if r.sequence == sequence => Some(r),
            _ => None,
        })
        .await
    }

    /// What the leader next says about a VM.
    pub(super) async fn desired(&mut self, vm: &str) -> v1::DesiredVm {
        self.until("a desired state", |m| match m {
            session_response::Message::Desired(d) => d.vms.into_iter().find(|d| d.vm_id == vm),
            _ => None,
        })
        .await
    }

    /// Reports a VM and waits until that is stored.
    pub(super) async fn report(&mut self, vm: &str, incarnation: u64, sequence: u64, state: v1::AgentVmState) {
        let report = v1::VmReport {
            vm_id: vm.to_owned(),
            incarnation,
            sequence,
            state: state.into(),
            disks_ready: true,
            ..Default::default()
        };
        self.send(Message::Report(v1::Report { vms: vec![report] })).await;
        self.until("an acknowledgement", |m| match m {
            session_response::Message::Ack(a) => {
                a.entries.iter().any(|e| e.vm_id == vm && e.sequence == sequence).then_some(())
            }
            _ => None,
        })
        .await;
    }
}
