//! Three controllers, three members of etcd: parts of it are lost, alone and at random, and the guests go on. (P1 to P5)
//!
//! More of it, and for longer: `make chaos`.

use harness::{
    chaos::{
        kind::Kind,
        run::{self, Plan},
        stage::Stage,
        trials,
    },
    prelude::*,
};
use uncloud_proto::v1::FailoverPolicy;

/// `CHAOS_SEED` gives another.
const SEED: u64 = 20_261_128;
/// The kinds of a short run: all parts, and no fault stays for long.
const SHORT: [Kind; 10] = [
    Kind::HostLost,
    Kind::AgentUpgraded,
    Kind::KeeperKilled,
    Kind::CutBoth,
    Kind::CutBriefly,
    Kind::PacketLoss,
    Kind::LeaderLost,
    Kind::LeaderWithoutEtcd,
    Kind::MemberLost,
    Kind::BothLeadersLost,
];

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_of_faults_breaks_no_promise() -> anyhow::Result<()> {
    let seed = std::env::var("CHAOS_SEED").map_or(Ok(SEED), |s| s.parse()).context("CHAOS_SEED")?;
    eprintln!("seed {seed}");
    let report = run::run(Plan { seed, time: secs(60), kinds: SHORT.to_vec() }).await?;
    eprintln!("{report}");
    ensure!(report.is_good(), "seed {seed}\n{report}");
    Ok(())
}

/// The fault is let happen more than once, so that it hits more than the first leader.
async fn nobody_notices_the_loss_of(kind: Kind) -> anyhow::Result<()> {
    let mut stage = trials::stage(&[]).await?;
    let trials = trials::series(&mut stage, kind, 2, SEED).await?;
    eprintln!("{kind}: the longest time without an acknowledged write: {}", trials.written);
    ensure!(trials.violations.is_empty(), "{}", trials.violations.join("\n"));
    stage.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loss_of_the_leader_touches_no_vm_and_writes_go_on_within_five_seconds() -> anyhow::Result<()> {
    nobody_notices_the_loss_of(Kind::LeaderLost).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loss_of_etcds_leader_touches_no_vm_and_writes_go_on_within_five_seconds() -> anyhow::Result<()> {
    nobody_notices_the_loss_of(Kind::EtcdLeaderLost).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_etcd_that_hangs_touches_no_vm_and_writes_go_on_within_five_seconds() -> anyhow::Result<()> {
    nobody_notices_the_loss_of(Kind::MemberHung).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_controller_fast_vms_die_and_the_others_go_on_and_all_run_when_they_are_back() -> anyhow::Result<()>
{
    let mut options = Options::hosts(2).controllers(3).etcd_members(3);
    options.leases = ["--fast-lease", "3s", "--kill-allowance", "500ms"].map(str::to_owned).to_vec();
    let guests = [("fast", FailoverPolicy::Fast), ("patient", FailoverPolicy::Patient), ("hold", FailoverPolicy::Hold)];
    let mut stage = Stage::start(options, &guests).await?;
    stage.settle(secs(60)).await?;
    let down = trials::all_controllers_down(&mut stage, secs(3)).await?;
    eprintln!("{down:.2?}");
    stage.finish().await
}
