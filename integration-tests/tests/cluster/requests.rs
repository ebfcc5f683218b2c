//! The same request twice is one VM and one answer. (P2)

use harness::prelude::*;
use uncloud_proto::v1::PowerState;

fn request(id: &str, name: &str) -> v1::CreateVmRequest {
    let mut request = specs::with(specs::micro(name), |s| s.nics = vec![v1::Nic::default()]);
    request.request_id = id.into();
    request.set_desired(PowerState::Stopped);
    request
}

async fn count(cluster: &Cluster) -> anyhow::Result<usize> {
    Ok(cluster.api.vms().list_vms(v1::ListVmsRequest::default()).await?.into_inner().vms.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_id_gives_one_vm_and_one_answer_also_after_a_restart() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let first = cluster.api.create(request("order-66/ü", "once")).await?;
    let second = cluster.api.create(request("order-66/ü", "once")).await?;
    assert_eq!(first, second, "the same answer");

    cluster.controller.kill();
    cluster.controller.start_again().await?;
    let third = cluster.api.create(request("order-66/ü", "once")).await?;
    assert_eq!(first, third, "the same answer from another process");
    assert_eq!(count(&cluster).await?, 1);

    // The same id for something else is a mistake of the caller.
    let other = cluster.api.create(request("order-66/ü", "twice")).await.err().context("it was taken")?;
    assert!(matches!(other.code(), Code::AlreadyExists | Code::InvalidArgument | Code::FailedPrecondition), "{other}");
    assert_eq!(harness::error_fields(&other), ["request_id"], "{other}");
    // Without an id, the name protects.
    let again = cluster.api.create(request("", "once")).await.err().context("it was taken")?;
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    assert_eq!(count(&cluster).await?, 1);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_at_once_with_ten_ids_make_ten_vms() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..100 {
        let (api, id) = (cluster.api.clone(), n % 10);
        calls.spawn(async move { (id, api.create(request(&format!("id-{id}"), &format!("vm-{id}"))).await) });
    }
    let mut answers = std::collections::BTreeMap::new();
    while let Some(call) = calls.join_next().await {
        let (id, answer) = call?;
        let vm = answer?;
        let known: &mut String = answers.entry(id).or_insert_with(|| vm.id.clone());
        assert_eq!(*known, vm.id, "one answer per id");
    }
    assert_eq!(count(&cluster).await?, 10);
    cluster.finish().await
}
