//! From a host's power cut to its VM Running elsewhere, at the default settings, beside the lease that must run out first.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use harness::{Options, slots::Share, specs};
use uncloud_proto::v1::GetStatusRequest;

use super::{Measured, median};

const TRIALS: usize = 7;
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) async fn measure() -> anyhow::Result<Vec<Measured>> {
    let mut options = Options::hosts(3).default_leases();
    options.share = Share::Whole;
    let mut cluster = options.start().await?;
    let status = cluster.api.cluster().get_status(GetStatusRequest {}).await?.into_inner();
    let lease = status.fast_lease_ms as f64 / 1000.0;

    let mut vm = cluster.run(specs::micro("traveller")).await?;
    let mut times = Vec::new();
    for _ in 0..TRIALS {
        cluster.checker.wait_beats(&vm.id, 2, LIMIT).await?;
        let cut = Instant::now();
        cluster.host_of(&vm)?.cut_power();
        let moved = cluster.api.wait_moved(&vm, LIMIT).await?;
        times.push(cut.elapsed().as_secs_f64());
        cluster.host_of(&vm).context("the host of before")?.start_again()?;
        cluster.wait_hosts().await?;
        vm = moved;
    }
    cluster.finish().await?;
    let max = times.iter().copied().fold(f64::MIN, f64::max);
    Ok(vec![
        Measured::new("failover_p50", median(times), lease, "s", format!("the lease; {TRIALS} trials")),
        Measured::new("failover_max", max, lease, "s", "the lease"),
    ])
}
