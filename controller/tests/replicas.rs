//! Three controllers on one etcd: each serves the whole API, whoever leads. The names are claims of
//! `leadership/copy.rs` and `leadership/mod.rs`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser as _;
use support::*;
use tokio::{runtime::Handle, task::JoinHandle, time};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use uncloud_controller::{app, config::Config};
use uncloud_proto::{
    READ_METADATA_KEY,
    clock::Clock,
    v1::{
        self, cluster_service_client::ClusterServiceClient, host_service_client::HostServiceClient,
        vm_service_client::VmServiceClient, watch_vms_response::Event,
    },
};

/// A controller as it is started by `main`, in this process.
struct Replica {
    address: String,
    channel: Channel,
    stop: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
    dir: tempfile::TempDir,
}

impl Replica {
    fn start(etcd: &str) -> Self {
        Self::on(tempfile::tempdir().unwrap(), &format!("127.0.0.1:{}", free_port()), etcd)
    }

    fn on(dir: tempfile::TempDir, address: &str, etcd: &str) -> Self {
        let data = dir.path().display().to_string();
        let args = ["uncloud-controller", "--data-dir", &data, "--listen", address, "--etcd", etcd];
        let config = Config::try_parse_from(args).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(app::run(config, Clock::system(), Handle::current(), stop.clone()));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { address: address.to_owned(), channel, stop, task: Some(task), dir }
    }

    fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    async fn status(&self) -> Result<v1::GetStatusResponse, Status> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        Ok(client.get_status(v1::GetStatusRequest {}).await?.into_inner())
    }

    async fn stop(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            time::timeout(LIMIT, task).await.expect("it stops").unwrap().unwrap();
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Trio {
    etcd: Etcd,
    replicas: Vec<Replica>,
}

impl Trio {
    async fn start() -> Self {
        let etcd = Etcd::start().await;
        let replicas: Vec<_> = (0..3).map(|_| Replica::start(&etcd.endpoint())).collect();
        let trio = Self { etcd, replicas };
        trio.all_serve().await;
        trio
    }

    /// Every controller answers, and names the same leader.
    async fn all_serve(&self) {
        eventually("all controllers serve", || async {
            let mut leaders = BTreeSet::new();
            for replica in &self.replicas {
                leaders.insert(replica.status().await.ok()?.leader?.address);
                replica.vms().list_vms(v1::ListVmsRequest::default()).await.ok()?;
            }
            (leaders.len() == 1).then_some(())
        })
        .await;
    }

    async fn leader(&self) -> usize {
        let status = eventually("somebody leads", || async {
            for replica in &self.replicas {
                if let Ok(status) = replica.status().await {
                    return status.leader;
                }
            }
            None
        })
        .await;
        self.replicas.iter().position(|r| r.address == status.address).expect("the leader is one of them")
    }

    /// Ends a controller cleanly and starts it again.
    async fn restart(&mut self, n: usize) {
        self.replicas[n].stop().await;
        let endpoint = self.etcd.endpoint();
        let old = &mut self.replicas[n];
        let dir = std::mem::replace(&mut old.dir, tempfile::tempdir().unwrap());
        let address = old.address.clone();
        self.replicas[n] = Replica::on(dir, &address, &endpoint);
    }
}

fn stopped(name: &str) -> v1::CreateVmRequest {
    let mut request = v1::CreateVmRequest {
        name: name.to_owned(),
        request_id: format!("request-{name}"),
        spec: Some(v1::VmSpec {
            memory_mib: 64,
            disks: vec![v1::Disk { size_bytes: 1 << 20, ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    };
    request.set_desired(v1::PowerState::Stopped);
    request
}

fn find(name: &str) -> v1::GetVmRequest {
    v1::GetVmRequest { vm: name.to_owned(), owner: String::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_controller_serves_the_whole_api() {
    // C1: what one acknowledged, the others show at once.
    let trio = Trio::start().await;
    let mut leaders = BTreeSet::new();
    for (n, replica) in trio.replicas.iter().enumerate() {
        leaders.insert(replica.status().await.unwrap().leader.unwrap().address);
        let name = format!("vm-{n}");
        let made = replica.vms().create_vm(stopped(&name)).await.unwrap().into_inner().vm.unwrap();
        for other in &trio.replicas {
            let found = other.vms().get_vm(find(&name)).await.unwrap().into_inner().vm.unwrap();
            assert_eq!((found.id.as_str(), found.revision), (made.id.as_str(), made.revision));
        }
        // What only the leader knows comes from the leader.
        HostServiceClient::new(replica.channel.clone()).list_hosts(v1::ListHostsRequest::default()).await.unwrap();
        // A refusal comes back as it is, with its details.
        let again = replica.vms().create_vm(v1::CreateVmRequest { request_id: String::new(), ..stopped(&name) }).await;
        assert_eq!(again.unwrap_err().code(), Code::AlreadyExists);
        // The same request at another controller: the same answer.
        let same = trio.replicas[(n + 1) % 3].vms().create_vm(stopped(&name)).await.unwrap().into_inner().vm.unwrap();
        assert_eq!(same.id, made.id);
    }
    assert_eq!(leaders.len(), 1, "one leads");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_answer_is_given_to_whoever_accepts_it_also_without_etcd() {
    let trio = Trio::start().await;
    let leader = trio.leader().await;
    trio.replicas[leader].vms().create_vm(stopped("web")).await.unwrap();
    let follower = &trio.replicas[(leader + 1) % 3];
    follower.vms().get_vm(find("web")).await.unwrap();

    trio.etcd.freeze();
    let begin = Instant::now();
    let refused = follower.vms().get_vm(find("web")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let mut request = Request::new(find("web"));
    request.metadata_mut().insert(READ_METADATA_KEY, "stale".parse().unwrap());
    let answer = follower.vms().get_vm(request).await;
    trio.etcd.thaw();
    assert_eq!(answer.unwrap().into_inner().vm.unwrap().name, "web");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_hands_over_without_waiting_for_anything() {
    let mut trio = Trio::start().await;
    trio.replicas[0].vms().create_vm(stopped("before")).await.unwrap();
    let mut times = Vec::new();
    for round in 0..3 {
        let leader = trio.leader().await;
        let other = (leader + 1) % 3;
        let begin = Instant::now();
        let stopping = trio.replicas[leader].stop.clone();
        stopping.cancel();
        // The others take writes again as soon as one of them leads.
        let name = format!("after-{round}");
        eventually("a write is accepted", || async { trio.replicas[other].vms().create_vm(stopped(&name)).await.ok() })
            .await;
        times.push(begin.elapsed());
        trio.restart(leader).await;
        trio.all_serve().await;
    }
    eprintln!("from a clean stop of the leader to the next write: {times:?}");
    // The leader key would have stood for two seconds more.
    assert!(times.iter().all(|t| *t < Duration::from_secs(1)), "{times:?}");
    let all = trio.replicas[0].vms().list_vms(v1::ListVmsRequest::default()).await.unwrap().into_inner().vms;
    assert_eq!(all.len(), 4);
}

/// One read of the set of names, or one addition to it, in the order of a clock that all share.
#[derive(Clone, Debug)]
struct Read {
    began: u64,
    ended: u64,
    names: BTreeSet<String>,
}

#[derive(Default)]
struct Observed {
    clock: AtomicU64,
    /// When an addition was asked for, and when it was acknowledged.
    added: Mutex<BTreeMap<String, (u64, Option<u64>)>>,
    reads: Mutex<Vec<Read>>,
}

impl Observed {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// A set that only grows is linearizable if and only if: reads can be ordered by what they saw, no read misses what was
    /// acknowledged before it began or what an earlier read saw, and none sees what was not yet asked for.
    fn check(&self) {
        let added = self.added.lock().unwrap();
        let mut reads = self.reads.lock().unwrap().clone();
        for read in &reads {
            for (name, (asked, acknowledged)) in added.iter() {
                if acknowledged.is_some_and(|at| at < read.began) {
                    assert!(read.names.contains(name), "a read missed {name}, which was acknowledged before it began");
                }
                if *asked > read.ended {
                    assert!(!read.names.contains(name), "a read saw {name} before anybody asked for it");
                }
            }
        }
        reads.sort_by_key(|r| r.names.len());
        for pair in reads.windows(2) {
            assert!(pair[0].names.is_subset(&pair[1].names), "two reads saw what cannot be put in one order");
        }
        for (i, later) in reads.iter().enumerate() {
            for earlier in &reads[i + 1..] {
                // `earlier` saw at least as much; had it ended first, `later` must have seen as much.
                assert!(earlier.ended > later.began || earlier.names == later.names, "a read went back in time");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_on_any_controller_are_linearizable_while_the_leader_changes() {
    // C1, C2
    let mut trio = Trio::start().await;
    let observed = Arc::new(Observed::default());
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<VmServiceClient<Channel>> = trio.replicas.iter().map(Replica::vms).collect();
    // What is written in a round is bounded, so that one page of a list has all.
    let may_write = Arc::new(tokio::sync::Semaphore::new(0));
    let mut tasks = Vec::new();
    for writer in 0..2 {
        let (observed, may_write, clients) = (observed.clone(), may_write.clone(), clients.clone());
        tasks.push(tokio::spawn(async move {
            for n in 0.. {
                let Ok(permit) = may_write.acquire().await else { return };
                permit.forget();
                let name = format!("vm-{writer}-{n}");
                observed.added.lock().unwrap().insert(name.clone(), (observed.tick(), None));
                // The same request again until it is answered, each time elsewhere: it makes one VM (`request_id`).
                for at in n.. {
                    let mut client = clients[at % clients.len()].clone();
                    match client.create_vm(stopped(&name)).await {
                        Ok(_) => break,
                        Err(status) => assert_ne!(status.code(), Code::AlreadyExists, "{name} was made twice"),
                    }
                }
                let at = observed.tick();
                observed.added.lock().unwrap().get_mut(&name).unwrap().1 = Some(at);
            }
        }));
    }
    for reader in 0..3_usize {
        let (observed, over, clients) = (observed.clone(), over.clone(), clients.clone());
        tasks.push(tokio::spawn(async move {
            for n in reader.. {
                if over.load(Ordering::Acquire) {
                    return;
                }
                let began = observed.tick();
                let mut client = clients[n % clients.len()].clone();
                let request = v1::ListVmsRequest { page_size: 1000, ..Default::default() };
                if let Ok(list) = client.list_vms(request).await {
                    let list = list.into_inner();
                    assert!(list.next_page_token.is_empty(), "one page is one read");
                    let names = list.vms.into_iter().map(|vm| vm.name).collect();
                    let read = Read { began, ended: observed.tick(), names };
                    observed.reads.lock().unwrap().push(read);
                }
            }
        }));
    }
    let acknowledged = || observed.added.lock().unwrap().values().filter(|(_, at)| at.is_some()).count();
    for _ in 0..3 {
        let before = acknowledged();
        may_write.add_permits(150);
        eventually("writes go on", || async { (acknowledged() > before + 40).then_some(()) }).await;
        let leader = trio.leader().await;
        trio.restart(leader).await;
    }
    let before = acknowledged();
    may_write.add_permits(150);
    eventually("writes go on", || async { (acknowledged() > before + 40).then_some(()) }).await;
    may_write.close();
    over.store(true, Ordering::Release);
    for task in tasks {
        time::timeout(LIMIT, task).await.unwrap().unwrap();
    }
    let reads = observed.reads.lock().unwrap().len();
    eprintln!("{} writes acknowledged, {reads} reads on three controllers, three changes of leader", acknowledged());
    assert!(reads > 100, "{reads}");
    observed.check();
}

/// Takes messages until `last` was deleted or the watch ends. Returns the newest revision that is complete.
async fn collect(
    stream: &mut Streaming<v1::WatchVmsResponse>,
    seen: &mut Vec<(i64, String)>,
    until: usize,
) -> Option<i64> {
    let mut complete = None;
    while seen.len() < until {
        let message = time::timeout(LIMIT, stream.message()).await.expect("the watch goes on").ok()??;
        if message.revision > 0 {
            complete = Some(message.revision);
        }
        match message.event {
            Some(Event::Vm(vm)) if message.revision > 0 => seen.push((message.revision, vm.name)),
            Some(Event::Deleted(vm)) => seen.push((message.revision, format!("deleted {}", vm.name))),
            Some(Event::Vm(_) | Event::Bookmark(_)) | None => {}
        }
    }
    complete
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_at_another_controller_without_a_gap_or_a_double() {
    let trio = Trio::start().await;
    let leader = trio.leader().await;
    let watch = async |n: usize, from: Option<i64>| {
        let request = v1::WatchVmsRequest { from_revision: from.unwrap_or_default(), ..Default::default() };
        trio.replicas[n].vms().watch_vms(request).await.unwrap().into_inner()
    };
    let mut whole = watch(leader, None).await;
    let mut part = watch((leader + 1) % 3, None).await;
    let mut resumed = (leader + 1) % 3;

    let maker = trio.replicas[leader].vms();
    let making = tokio::spawn(async move {
        let mut maker = maker;
        for n in 0..60 {
            maker.create_vm(stopped(&format!("vm-{n}"))).await.unwrap();
        }
    });
    // Every few changes the watch is dropped and goes on at the next controller, from where it was.
    let (mut seen, mut from) = (Vec::new(), None);
    for stop_at in (5..=60).step_by(5) {
        from = collect(&mut part, &mut seen, stop_at).await.or(from);
        resumed = (resumed + 1) % 3;
        part = watch(resumed, from).await;
    }
    making.await.unwrap();
    let mut all = Vec::new();
    collect(&mut whole, &mut all, 60).await;
    assert_eq!(seen, all);

    // The future is refused everywhere; etcd itself says what is the future.
    for replica in &trio.replicas {
        let request = v1::WatchVmsRequest { from_revision: i64::MAX / 2, ..Default::default() };
        assert_eq!(replica.vms().watch_vms(request).await.unwrap_err().code(), Code::OutOfRange);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_that_only_a_follower_has_seen_can_be_resumed_at_the_leader() {
    // Keys that are not uncloud's, and those that go by themselves, raise etcd's revision; a leader hears of neither.
    let trio = Trio::start().await;
    let leader = trio.leader().await;
    let follower = (leader + 1) % 3;
    trio.replicas[leader].vms().create_vm(stopped("one")).await.unwrap();
    trio.etcd.client().await.put("/somebody/elses", "1", None).await.unwrap();
    let list = trio.replicas[follower].vms().list_vms(v1::ListVmsRequest::default()).await.unwrap().into_inner();
    let request = v1::WatchVmsRequest { from_revision: list.revision, ..Default::default() };
    let mut stream = trio.replicas[leader].vms().watch_vms(request).await.unwrap().into_inner();
    trio.replicas[leader].vms().create_vm(stopped("two")).await.unwrap();
    let mut seen = Vec::new();
    collect(&mut stream, &mut seen, 1).await;
    assert_eq!(seen[0].1, "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_that_somebody_writes_is_seen_by_followers_and_stops_nothing() {
    let mut trio = Trio::start().await;
    let leader = trio.leader().await;
    trio.replicas[leader].vms().create_vm(stopped("one")).await.unwrap();
    trio.etcd.client().await.put("/uncloud/v1/vms/nonsense", "{", None).await.unwrap();
    for replica in &trio.replicas {
        assert_eq!(replica.vms().get_vm(find("one")).await.unwrap().into_inner().vm.unwrap().name, "one");
    }
    // Whoever leads next took it in while it followed.
    trio.restart(leader).await;
    let status = eventually("a leader that knows of it", || async {
        let status = trio.replicas[(leader + 1) % 3].status().await.ok()?;
        (status.unreadable_count == 1).then_some(status)
    })
    .await;
    assert_eq!(status.unreadable[0].key, "/uncloud/v1/vms/nonsense");
}
