//! How many creates are acknowledged in a second, beside raw etcd transactions of the same bytes on the same etcd: as long values
//! under keys of the same form, with the same etcd leases.
//!
//! One client's create is put beside one transaction of one VM (`create_1_p50`), many clients' beside transactions that are as
//! full as etcd takes them: one at a time, as the leader's are (`create_128`), and four at a time (`create_128_of_4`). Keys with random
//! ids cost etcd more than keys in their order and without leases, which `create_128_in_order` has beside it. A client's call
//! to the controller costs something, too, whatever it asks for: `create_1_p50_call` and `create_128_call` have in their limit
//! as many calls that the controller refuses at once.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use harness::{Api, Cluster, Options, etcd::Fsync, slots::Share};
use tokio::task::JoinSet;
use tonic::Code;
use uncloud_controller::store::MAX_OPERATIONS;
use uncloud_proto::v1::{CreateVmRequest, Disk, PowerState, VmSpec};
use uuid::Uuid;

use super::{Measured, median, millis};

const CLIENTS: [usize; 3] = [1, 16, 128];
/// Of these the limit is full transactions.
const MANY: usize = 128;
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(2);
/// Connections that the clients share: what one connection can carry is not what is measured.
const CONNECTIONS: usize = 4;

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(0);
    options.share = Share::Whole;
    options.fsync = Fsync::On;
    let cluster = options.start().await?;
    let puts = puts_of_a_create(&cluster).await?;
    let bytes: usize = puts.iter().map(|put| put.bytes).sum();
    let beside = format!("raw etcd transactions of {} puts, {bytes} bytes", puts.len());
    let in_order: Vec<Written> = puts.iter().map(Written::in_order).collect();

    let mut all = Vec::new();
    for clients in CLIENTS {
        let (mut ours, mut raw, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        let (mut raw_of_4, mut raw_in_order) = (Vec::new(), Vec::new());
        // In turns, so that a noisy moment of the machine hits both.
        for round in 0..ROUNDS {
            let (vms, at_once) = if clients == MANY { (MAX_OPERATIONS / puts.len(), 1) } else { (1, clients) };
            raw.push(raw_per_second(&cluster, &puts, vms, at_once, round).await?);
            if clients == MANY {
                raw_of_4.push(raw_per_second(&cluster, &puts, vms, 4, round).await?);
                raw_in_order.push(raw_per_second(&cluster, &in_order, vms, 1, round).await?);
            }
            calls.push(calls_per_second(&cluster, clients).await?);
            ours.push(creates_per_second(&cluster, clients, round).await?);
        }
        if clients == 1 {
            let p50 = |per_second: &[Measure]| median(per_second.iter().map(|m| m.p50).collect());
            let (ours, raw, call) = (p50(&ours), p50(&raw), p50(&calls));
            all.push(Measured::new("create_1_p50", ours, raw, "ms", beside.clone()));
            all.push(Measured::new("create_1_p50_call", ours, raw + call, "ms", format!("the same and {CALL}")));
        }
        let rate = |rounds: Vec<Measure>| median(rounds.into_iter().map(|m| m.per_second).collect());
        let (ours, raw) = (rate(ours), rate(raw));
        let full = if clients == MANY { ", as many VMs in each as fit, one at a time" } else { "" };
        all.push(Measured::new(format!("create_{clients}"), ours, raw, "1/s", format!("{beside}{full}")));
        if clients == MANY {
            let both = 1.0 / (1.0 / raw + 1.0 / rate(calls));
            all.push(Measured::new("create_128_call", ours, both, "1/s", format!("the same and {CALL} for each VM")));
            all.push(Measured::new("create_128_of_4", ours, rate(raw_of_4), "1/s", "the same, four at a time"));
            let beside = "as long values under keys in order, without etcd leases";
            all.push(Measured::new("create_128_in_order", ours, rate(raw_in_order), "1/s", beside));
        }
    }
    cluster.finish().await?;
    Ok(all)
}

const CALL: &str = "a call that is refused at once";

/// Calls that nothing is done for but to read them and to answer.
async fn calls_per_second(cluster: &Cluster, clients: usize) -> anyhow::Result<Measure> {
    let connections: Vec<Api> =
        (0..CONNECTIONS).map(|_| Api::new(cluster.api.endpoint())).collect::<anyhow::Result<_>>()?;
    per_second(clients, 1, |client, _| {
        let api = connections[client % CONNECTIONS].clone();
        async move {
            let refused = api.create(request("No Name".into())).await;
            let status = refused.err().context("a VM with such a name")?;
            anyhow::ensure!(status.code() == Code::InvalidArgument, "{status}");
            Ok(())
        }
    })
    .await
}

fn request(name: String) -> CreateVmRequest {
    let spec =
        VmSpec { memory_mib: 16, disks: vec![Disk { size_bytes: 1 << 20, ..Disk::default() }], ..VmSpec::default() };
    CreateVmRequest { name, spec: Some(spec), desired: PowerState::Stopped.into(), ..CreateVmRequest::default() }
}

/// One put of the transaction of a create.
#[derive(Clone)]
struct Written {
    /// [`ID`] and [`NAME`] stand where the VM's id and name were; [`ORDER`] where something is that comes after all before it.
    key: String,
    bytes: usize,
    /// The etcd lease, or 0.
    lease: i64,
}

const ID: &str = "{id}";
const NAME: &str = "{name}";
const ORDER: &str = "{order}";
/// As long as the names of the VMs that are created.
const SAMPLE: &str = "bench-128-0-127-1234";

impl Written {
    /// As many bytes under a key that comes after all before it.
    fn in_order(&self) -> Self {
        let key = self.key.replace(ID, "00000000-0000-0000-0000-000000000000").replace(NAME, "name");
        Self { key: format!("/{ORDER}{key}"), lease: 0, ..*self }
    }

    fn put(&self, id: &str, name: &str, order: &str, value: &[u8]) -> TxnOp {
        let key = self.key.replace(ID, id).replace(NAME, name).replace(ORDER, order);
        let options = (self.lease != 0).then(|| PutOptions::new().with_lease(self.lease));
        TxnOp::put(format!("/raw{key}"), &value[..self.bytes], options)
    }
}

/// What the transaction of one create writes: everything of its revision.
async fn puts_of_a_create(cluster: &Cluster) -> anyhow::Result<Vec<Written>> {
    let vm = cluster.api.create(request(SAMPLE.into())).await?;
    let mut etcd = cluster.etcd.as_ref().context("an etcd")?.client().await?;
    let all = etcd.get("/uncloud/", Some(GetOptions::new().with_prefix())).await?;
    let record = all.kvs().iter().find(|kv| kv.key().ends_with(vm.id.as_bytes())).context("the record of the VM")?;
    let revision = record.mod_revision();
    let written = all.kvs().iter().filter(|kv| kv.mod_revision() == revision);
    let put = |kv: &KeyValue| {
        let key = String::from_utf8(kv.key().to_vec())?.replace(&vm.id, ID).replace(SAMPLE, NAME);
        anyhow::Ok(Written { key, bytes: kv.value().len(), lease: kv.lease() })
    };
    written.map(put).collect()
}

async fn creates_per_second(cluster: &Cluster, clients: usize, round: usize) -> anyhow::Result<Measure> {
    let connections: Vec<Api> =
        (0..CONNECTIONS).map(|_| Api::new(cluster.api.endpoint())).collect::<anyhow::Result<_>>()?;
    per_second(clients, 1, |client, n| {
        let api = connections[client % CONNECTIONS].clone();
        async move {
            api.create(request(format!("bench-{clients}-{round}-{client}-{n}"))).await?;
            Ok(())
        }
    })
    .await
}

/// Transactions with what `vms` creates write, `clients` at a time.
async fn raw_per_second(
    cluster: &Cluster,
    puts: &[Written],
    vms: usize,
    clients: usize,
    round: usize,
) -> anyhow::Result<Measure> {
    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    let mut connections: Vec<Client> = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(etcd.client().await?);
    }
    let puts: Arc<[Written]> = puts.into();
    let value: Arc<[u8]> = vec![b'x'; puts.iter().map(|put| put.bytes).max().unwrap_or(0)].into();
    let transaction = move |client: usize, n: u64| {
        let puts = (0..vms).flat_map(|vm| {
            let id = Uuid::new_v4().to_string();
            // Like those of clients that create at once: each has names that follow each other.
            let name = format!("{vm:03}-{vms}-{clients}-{round}-{client}-{n}");
            let order = format!("{vms}-{clients}-{round}-{client:08}-{n:012}-{vm:03}");
            puts.iter().map(|put| put.put(&id, &name, &order, &value)).collect::<Vec<_>>()
        });
        // As the leader does: a condition on a key that is there.
        let leads = Compare::version("/uncloud/v1/leader", CompareOp::Greater, 0);
        Txn::new().when([leads]).and_then(puts.collect::<Vec<TxnOp>>())
    };
    let transaction = Arc::new(transaction);
    let prepared: Arc<[_]> = (0..clients).map(|client| Mutex::new(Some(transaction(client, 0)))).collect();
    per_second(clients, vms as u64, |client, n| {
        let mut etcd = connections[client % CONNECTIONS].clone();
        let (transaction, prepared) = (Arc::clone(&transaction), Arc::clone(&prepared));
        async move {
            let slot = || prepared[client].lock().unwrap_or_else(PoisonError::into_inner);
            let now = slot().take().context("one is prepared")?;
            // While etcd works, the next one is made: the leader does that, too.
            let (answer, ()) = tokio::join!(etcd.txn(now), async { *slot() = Some(transaction(client, n + 1)) });
            anyhow::ensure!(answer?.succeeded(), "the leader key is gone");
            Ok(())
        }
    })
    .await
}

/// What one round has shown.
struct Measure {
    per_second: f64,
    /// ms of one call.
    p50: f64,
}

/// Runs `clients` loops for one round, each call of which makes `vms` VMs.
async fn per_second<F>(clients: usize, vms: u64, work: impl Fn(usize, u64) -> F) -> anyhow::Result<Measure>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    // `work` stays here; each client's next call is started when its last one is answered.
    let mut count = vec![0_u64; clients];
    let spawn = |tasks: &mut JoinSet<anyhow::Result<(usize, Duration)>>, client: usize, n: u64| {
        let call = work(client, n);
        tasks.spawn(async move {
            let begin = Instant::now();
            call.await?;
            Ok((client, begin.elapsed()))
        });
    };
    for client in 0..clients {
        spawn(&mut tasks, client, 0);
    }
    let mut times = Vec::new();
    while let Some(answer) = tasks.join_next().await {
        let (client, took) = answer??;
        times.push(millis(took));
        if start.elapsed() < ROUND {
            count[client] += 1;
            spawn(&mut tasks, client, count[client]);
        }
    }
    let per_second = times.len() as f64 * vms as f64 / start.elapsed().as_secs_f64();
    Ok(Measure { per_second, p50: median(times) })
}
