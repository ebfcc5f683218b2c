//! The leader is killed. A second controller follows; its copy is warm.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use etcd_client::EventType;
use harness::{Api, wait_for};
use uncloud_proto::v1::ListVmsRequest;

use super::{CONNECT_LIMIT, HOSTS, Scale, small};

/// The lease of the leader key, and more.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) async fn measure(scale: &mut Scale) -> anyhow::Result<()> {
    scale.plane.spawn()?;
    let next = Api::new(&scale.plane.addresses()[1])?;
    // A list is what each controller answers from its own copy.
    wait_for("the second controller has a copy", LIMIT, async || {
        let request = ListVmsRequest { page_size: 1, ..ListVmsRequest::default() };
        next.vms().list_vms(request).await.map(drop).map_err(|status| status.to_string())
    })
    .await?;
    let before = scale.fleet.counted();
    let mut etcd = scale.plane.etcd.client().await?;
    let mut leader = etcd.watch("/uncloud/v1/leader", None).await?;

    scale.plane.controllers[0].kill();
    let gone = tokio::time::timeout(LIMIT, async {
        while let Some(message) = leader.message().await? {
            if message.events().iter().any(|e| e.event_type() == EventType::Delete) {
                return anyhow::Ok(Instant::now());
            }
        }
        bail!("etcd says nothing")
    });
    let gone = gone.await.context("the leader key does not go")??;

    let written = wait_for("the next leader takes a write", LIMIT, async || {
        next.create(small("first-write")).await.map(|_| Instant::now()).map_err(|status| status.to_string())
    })
    .await?;
    scale.add("takeover_first_write", written.duration_since(gone).as_secs_f64(), 1.0, "s", "the aim");

    let all = usize::try_from(before.sessions)?;
    wait_for("all have said Hello again", CONNECT_LIMIT, async || {
        let counted = scale.fleet.counted();
        let back = counted.welcomes - before.welcomes >= before.sessions && counted.sessions >= before.sessions;
        if back { Ok(()) } else { Err(format!("{counted:?}")) }
    })
    .await?;
    let back = scale.fleet.welcomed_at().duration_since(gone).as_secs_f64();
    let beside = format!("{HOSTS} connections to a bare server; the aim is 4 s");
    scale.add("takeover_agents_back", back, scale.bare.connected_after, "s", beside);
    let lost = scale.fleet.counted().lost - before.lost;
    scale.add("takeover_leases_lost", lost as f64, 1.0, "leases", format!("the aim is none, of {all}"));
    // What is measured next is measured on the only controller that is left.
    scale.plane.controllers.swap(0, 1);
    Ok(())
}
