//! What can go wrong in a live migration does, on hosts in network namespaces: afterwards the VM executes on exactly one side (P1),
//! its counter goes on without loss, and a guest that was not lost has not been started anew (P3).
//!
//! A choice. All cases, and what came of them: docs/migration.md.

use harness::{
    migration::cases::{Case, Disk, Trials},
    prelude::*,
};

async fn ends_well(cases: &[&str]) -> anyhow::Result<()> {
    let mut trials = Trials::start(Disk::Shared).await?;
    for name in cases {
        let row = trials.run(Case::named(name).with_context(|| format!("no case {name}"))?).await?;
        eprintln!("{row}");
    }
    trials.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_hangs_or_is_cut_off_on_the_way_the_guest_goes_on_on_one_side() -> anyhow::Result<()> {
    ends_well(&[
        "none@preparing",
        "target-qemu-killed@sending",
        "source-agent-killed@handing-over",
        "target-agent-hung@handing-over",
        "leader-killed@handing-over",
        "target-host-dead@sending",
        "source-qemu-killed@sending",
    ])
    .await
}
