//! Where VMs go, why they go nowhere, and that they start by themselves once there is room. (P6)

use std::collections::BTreeSet;

use harness::{agent::HostOptions, api::host_of, prelude::*};
use uncloud_proto::v1::VmPhase;

async fn explain(cluster: &Cluster, vm: &str) -> anyhow::Result<v1::ExplainVmResponse> {
    let request = v1::ExplainVmRequest { vm: vm.into(), owner: String::new() };
    Ok(cluster.api.vms().explain_vm(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_without_room_waits_explains_itself_and_starts_when_room_appears() -> anyhow::Result<()> {
    let small = |_: usize, host: &mut HostOptions| host.memory_mib = 64;
    let mut cluster = Options::hosts(3).each_host(small).start().await?;
    let cordon = v1::CordonHostRequest { host: "host-3".into(), reason: "new fans".into() };
    cluster.api.hosts().cordon_host(cordon).await?;

    let big = specs::with(specs::micro("big"), |s| s.memory_mib = 128);
    let vm = cluster.api.create(big).await?;
    let vm = cluster.api.wait_phase(&vm.id, VmPhase::Pending, secs(5)).await?;
    let reason = vm.status.as_ref().map(|s| s.reason.clone()).unwrap_or_default();
    assert!(reason.contains("memory"), "{reason}");
    let explained = explain(&cluster, &vm.id).await?;
    eprintln!("{}", explained.summary);
    assert!(explained.summary.contains("3 hosts"), "{}", explained.summary);
    assert!(explained.candidates.is_empty());
    let groups: Vec<(u32, BTreeSet<String>)> =
        explained.refusals.iter().map(|r| (r.count, r.hosts.iter().cloned().collect())).collect();
    // Largest group first: two lack memory, one is cordoned (or lacks memory, too: it is small as well).
    assert_eq!(groups.iter().map(|g| g.0).sum::<u32>(), 3, "{:?}", explained.refusals);
    assert!(groups[0].1.contains("host-1") && groups[0].1.contains("host-2"), "{:?}", explained.refusals);
    let shown = cluster.cli(&["vm", "explain", "big"]).await?.success()?.stdout;
    assert!(shown.contains("memory"), "{shown}");

    // Room appears: nobody has to ask again.
    cluster.add_host(&HostOptions { memory_mib: 256, ..HostOptions::default() }).await?;
    let vm = cluster.api.wait_running(&vm.id, secs(15)).await?;
    assert_eq!(host_of(&vm), "host-4");
    cluster.checker.wait_beats(&vm.id, 1, secs(10)).await?;

    // Room that is promised counts at once, and room that is given back counts at once, too.
    let next = cluster.api.create(specs::with(specs::micro("next"), |s| s.memory_mib = 140)).await?;
    cluster.api.wait_phase(&next.id, VmPhase::Pending, secs(5)).await?;
    cluster.api.delete(&vm.id).await?;
    let next = cluster.api.wait_running(&next.id, secs(15)).await?;
    assert_eq!(host_of(&next), "host-4");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_groups_pools_and_cordons_decide_where_a_vm_may_go() -> anyhow::Result<()> {
    let label = |i: usize, host: &mut HostOptions| {
        host.labels = vec![format!("rack=r{}", i + 1)];
        host.vcpus = 2;
    };
    let cluster = Options::hosts(3).each_host(label).start().await?;

    let labelled = specs::with(specs::micro("labelled"), |s| {
        s.host_labels.insert("rack".into(), "r2".into());
    });
    assert_eq!(host_of(&cluster.run(labelled).await?), "host-2");
    let nowhere = specs::with(specs::micro("nowhere"), |s| {
        s.host_labels.insert("rack".into(), "r9".into());
    });
    let nowhere = cluster.api.create(nowhere).await?;
    cluster.api.wait_phase(&nowhere.id, VmPhase::Pending, secs(5)).await?;
    let why = explain(&cluster, &nowhere.id).await?;
    assert_eq!((why.refusals.len(), why.refusals[0].count), (1, 3), "{why:?}");
    assert!(why.refusals[0].reason.contains("rack"), "{why:?}");

    // Never two of a group on one host: the fourth waits.
    let member = |n: usize| specs::with(specs::micro(&format!("member-{n}")), |s| s.anti_affinity_group = "g".into());
    let mut used = BTreeSet::new();
    for n in 1..=3 {
        used.insert(host_of(&cluster.run(member(n)).await?).to_owned());
    }
    assert_eq!(used.len(), 3, "{used:?}");
    let fourth = cluster.api.create(member(4)).await?;
    cluster.api.wait_phase(&fourth.id, VmPhase::Pending, secs(5)).await?;

    // CPUs may be promised several times over (4 by default), memory never.
    let wide = |name: &str| specs::with(specs::micro(name), |s| s.vcpus = 5);
    let vm = cluster.api.create(wide("wide")).await?;
    cluster.api.wait_running(&vm.id, secs(20)).await?;
    let wider = cluster.api.create(specs::with(specs::micro("wider"), |s| s.vcpus = 9)).await?;
    cluster.api.wait_phase(&wider.id, VmPhase::Pending, secs(5)).await?;
    let why = explain(&cluster, &wider.id).await?;
    assert!(why.summary.to_lowercase().contains("cpu"), "{}", why.summary);

    // A pool that nobody has.
    let strange = specs::with(specs::micro("strange"), |s| s.disks[0].pool = "nvme".into());
    match cluster.api.create(strange).await {
        Ok(vm) => {
            cluster.api.wait_phase(&vm.id, VmPhase::Pending, secs(5)).await?;
            let why = explain(&cluster, &vm.id).await?;
            assert!(why.summary.contains("nvme"), "{}", why.summary);
        }
        Err(status) => assert!(status.message().contains("nvme"), "{status}"),
    }
    cluster.finish().await
}

/// Guests here execute by QEMU's translator, which has AVX2 and no AVX-512. QEMU is told to end if it cannot give all of the model.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_goes_only_where_its_cpu_model_is() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).start().await?;
    let model = |name: &str, cpu: v1::CpuModel| specs::with(specs::micro(name), |s| s.cpu = cpu.into());
    let vm = cluster.run(model("modern", v1::CpuModel::X8664V3)).await?;
    cluster.checker.wait_beats(&vm.id, 1, secs(20)).await?;
    let shown = cluster.cli(&["vm", "show", "modern"]).await?.success()?.stdout;
    assert!(shown.contains("x86-64-v3"), "{shown}");
    let shown = cluster.cli(&["host", "show", host_of(&vm)]).await?.success()?.stdout;
    assert!(shown.contains("QEMU's translator (x86-64-v3)"), "{shown}");
    for (name, cpu, words) in
        [("vector", v1::CpuModel::X8664V4, "lack the CPU features avx512f"), ("own", v1::CpuModel::Host, "have no KVM")]
    {
        let vm = cluster.api.create(model(name, cpu)).await?;
        cluster.api.wait_phase(&vm.id, VmPhase::Pending, secs(5)).await?;
        let summary = explain(&cluster, &vm.id).await?.summary;
        assert!(summary.contains(words), "{summary}");
    }
    // A model that no host has is refused for a migration, too, once it is what the guest sees: here it only waits.
    let update = cluster.cli(&["vm", "update", "modern", "--cpu", "x86-64-v4"]).await?.success()?;
    assert!(update.stderr.contains("spec.cpu"), "{}", update.stderr);
    cluster.cli(&["vm", "migrate", "modern", "--wait"]).await?.success()?;
    cluster.finish().await
}
