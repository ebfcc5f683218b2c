//! What people ask of a large cluster.

use std::time::{Duration, Instant};

use harness::Api;
use tonic::Streaming;
use uncloud_proto::v1::{
    ExplainVmRequest, ListVmsRequest, SimulateHostFailureRequest, WatchVmsRequest, WatchVmsResponse,
};

use super::{HOSTS, Scale, VMS, quantile, raw, small};
use crate::{median, millis};

/// Calls of each kind.
const CALLS: usize = 100;
/// Times that everything is listed.
const LISTS: usize = 3;
/// VMs in a page: the most that the API gives.
const PAGE: u32 = 1000;
/// Watches that are open at once, and the connections that they share.
const WATCHERS: (usize, usize) = (500, 10);

pub(super) async fn measure(scale: &mut Scale) -> anyhow::Result<()> {
    explain(scale).await?;
    what_if(scale).await?;
    list(scale).await?;
    watchers(scale).await
}

async fn explain(scale: &mut Scale) -> anyhow::Result<()> {
    let mut times = Vec::new();
    for n in 0..CALLS {
        let host = &scale.site.hosts[n * 97 % scale.site.hosts.len()];
        let Some(vm) = host.vms.first() else { continue };
        let request = ExplainVmRequest { vm: vm.to_string(), owner: String::new() };
        let begin = Instant::now();
        scale.plane.api.vms().explain_vm(request).await?;
        times.push(millis(begin.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    scale.add("explain_p99", quantile(&times, 0.99), 50.0, "ms", "the aim");
    Ok(())
}

/// What if a host with twice as many VMs as the others died.
async fn what_if(scale: &mut Scale) -> anyhow::Result<()> {
    let mut times = Vec::new();
    for n in 0..CALLS {
        let host = &scale.site.hosts[1 + n * 97 % (HOSTS - 1)];
        let request = SimulateHostFailureRequest { hosts: vec![host.id.to_string()] };
        let begin = Instant::now();
        let answer = scale.plane.api.hosts().simulate_host_failure(request).await?.into_inner();
        times.push(millis(begin.elapsed()));
        anyhow::ensure!(answer.vms.len() == host.vms.len(), "{} of {} VMs", answer.vms.len(), host.vms.len());
    }
    times.sort_by(f64::total_cmp);
    scale.add("what_if_p99", quantile(&times, 0.99), 50.0, "ms", "the aim; one host of 10 to 20 VMs dies");
    Ok(())
}

async fn list(scale: &mut Scale) -> anyhow::Result<()> {
    let (mut ours, mut limit) = (Vec::new(), Vec::new());
    for _ in 0..LISTS {
        let begin = Instant::now();
        raw::range(&scale.plane, "/uncloud/v1/vm-status/", "/uncloud/v1/vm-status0").await?;
        raw::range(&scale.plane, "/uncloud/v1/vms/", "/uncloud/v1/vms0").await?;
        limit.push(begin.elapsed().as_secs_f64());

        let begin = Instant::now();
        let mut request = ListVmsRequest { page_size: PAGE, ..ListVmsRequest::default() };
        let mut count = 0;
        loop {
            let page = scale.plane.api.vms().list_vms(request.clone()).await?.into_inner();
            count += page.vms.len();
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        ours.push(begin.elapsed().as_secs_f64());
        anyhow::ensure!(count >= VMS, "{count} VMs are listed");
    }
    scale.add("list_100k", median(ours), median(limit), "s", "the same records from etcd, in large pages");
    Ok(())
}

async fn watchers(scale: &mut Scale) -> anyhow::Result<()> {
    let revision = scale.plane.api.status().await?.revision;
    let before = scale.resident_kib(0)?;
    let connections: Vec<Api> =
        (0..WATCHERS.1).map(|_| Api::new(&scale.plane.addresses()[0])).collect::<anyhow::Result<_>>()?;
    let mut watches: Vec<Streaming<WatchVmsResponse>> = Vec::new();
    for n in 0..WATCHERS.0 {
        let request = WatchVmsRequest { from_revision: revision, ..WatchVmsRequest::default() };
        let watch = connections[n % WATCHERS.1].vms().watch_vms(request).await?.into_inner();
        watches.push(watch);
    }
    // Each has begun when it tells of what is changed now.
    scale.plane.api.create(small("watched")).await?;
    for (n, watch) in watches.iter_mut().enumerate() {
        let first = tokio::time::timeout(Duration::from_secs(5), watch.message()).await;
        anyhow::ensure!(first.is_ok_and(|m| m.is_ok_and(|m| m.is_some())), "watch {n} says nothing");
    }
    let kib = scale.resident_kib(0)? - before;
    let bare = scale.bare.sessions_kib / HOSTS as f64;
    scale.add(
        "memory_per_watcher",
        kib / WATCHERS.0 as f64,
        bare,
        "KiB",
        "a bare session with a connection of its own",
    );
    Ok(())
}
