//! How many creates are acknowledged in a second, beside raw etcd transactions of the same size on the same etcd.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use harness::{Api, Cluster, Options, etcd::Fsync, slots::Share};
use tokio::task::JoinSet;
use uncloud_proto::v1::{CreateVmRequest, Disk, PowerState, VmSpec};

use super::{Measured, median};

const CLIENTS: [usize; 3] = [1, 16, 128];
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(2);
/// Connections that the clients share: what one connection can carry is not what is measured.
const CONNECTIONS: usize = 4;

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(0);
    options.share = Share::Whole;
    options.fsync = Fsync::On;
    let cluster = options.start().await?;
    let sizes = sizes_of_a_create(&cluster).await?;
    let beside = format!("raw etcd transactions of {} puts, {} bytes", sizes.len(), sizes.iter().sum::<usize>());

    let mut all = Vec::new();
    for clients in CLIENTS {
        let (mut ours, mut raw) = (Vec::new(), Vec::new());
        // In turns, so that a noisy moment of the machine hits both.
        for round in 0..ROUNDS {
            raw.push(raw_per_second(&cluster, &sizes, clients, round).await?);
            ours.push(creates_per_second(&cluster, clients, round).await?);
        }
        all.push(Measured::new(format!("create_{clients}"), median(ours), median(raw), "1/s", beside.clone()));
    }
    cluster.finish().await?;
    Ok(all)
}

fn request(name: String) -> CreateVmRequest {
    let spec =
        VmSpec { memory_mib: 16, disks: vec![Disk { size_bytes: 1 << 20, ..Disk::default() }], ..VmSpec::default() };
    CreateVmRequest { name, spec: Some(spec), desired: PowerState::Stopped.into(), ..CreateVmRequest::default() }
}

/// The values that the transaction of one create writes: everything of its revision.
async fn sizes_of_a_create(cluster: &Cluster) -> anyhow::Result<Vec<usize>> {
    let vm = cluster.api.create(request("sample".into())).await?;
    let mut etcd = cluster.etcd.as_ref().context("an etcd")?.client().await?;
    let all = etcd.get("/uncloud/", Some(GetOptions::new().with_prefix())).await?;
    let record = all.kvs().iter().find(|kv| kv.key().ends_with(vm.id.as_bytes())).context("the record of the VM")?;
    let revision = record.mod_revision();
    Ok(all.kvs().iter().filter(|kv| kv.mod_revision() == revision).map(|kv| kv.value().len()).collect())
}

async fn creates_per_second(cluster: &Cluster, clients: usize, round: usize) -> anyhow::Result<f64> {
    let connections: Vec<Api> =
        (0..CONNECTIONS).map(|_| Api::new(cluster.api.endpoint())).collect::<anyhow::Result<_>>()?;
    per_second(clients, |client, n| {
        let api = connections[client % CONNECTIONS].clone();
        async move {
            api.create(request(format!("bench-{clients}-{round}-{client}-{n}"))).await?;
            Ok(())
        }
    })
    .await
}

async fn raw_per_second(cluster: &Cluster, sizes: &[usize], clients: usize, round: usize) -> anyhow::Result<f64> {
    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    let mut connections: Vec<Client> = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(etcd.client().await?);
    }
    let values: Arc<Vec<Vec<u8>>> = Arc::new(sizes.iter().map(|n| vec![b'x'; *n]).collect());
    per_second(clients, |client, n| {
        let (mut etcd, values) = (connections[client % CONNECTIONS].clone(), Arc::clone(&values));
        async move {
            let key = |i: usize| format!("/raw/{clients}/{round}/{client:08}-{n:012}/{i}");
            let puts: Vec<TxnOp> =
                values.iter().enumerate().map(|(i, v)| TxnOp::put(key(i), v.clone(), None)).collect();
            // As the leader does: a condition on a key that is there.
            let leads = Compare::version("/uncloud/v1/leader", CompareOp::Greater, 0);
            let answer = etcd.txn(Txn::new().when([leads]).and_then(puts)).await?;
            anyhow::ensure!(answer.succeeded(), "the leader key is gone");
            Ok(())
        }
    })
    .await
}

/// Runs `clients` loops for one round; counts what was done in it.
async fn per_second<F>(clients: usize, work: impl Fn(usize, u64) -> F) -> anyhow::Result<f64>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let done = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    // `work` stays here; each client's next call is started when its last one is answered.
    let mut count = vec![0_u64; clients];
    let spawn = |tasks: &mut JoinSet<anyhow::Result<usize>>, client: usize, n: u64| {
        let (call, done) = (work(client, n), Arc::clone(&done));
        tasks.spawn(async move {
            call.await?;
            done.fetch_add(1, Ordering::Relaxed);
            Ok(client)
        });
    };
    for client in 0..clients {
        spawn(&mut tasks, client, 0);
    }
    while let Some(answer) = tasks.join_next().await {
        let client = answer??;
        if start.elapsed() < ROUND {
            count[client] += 1;
            spawn(&mut tasks, client, count[client]);
        }
    }
    Ok(done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}
