//! What the guest's cloud-init is told reaches the guest, and machines that boot by UEFI.

use std::{fs, os::unix::fs::MetadataExt as _, process::Command};

use harness::{error_fields, prelude::*};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZpY3RpdGlvdXM me@example.org";
const USER_DATA: &str = "#cloud-config\nruncmd:\n  - echo proof\n";
const NETWORK: &str = "version: 2\nethernets: {}\n";

fn with_seed(name: &str) -> v1::CreateVmRequest {
    specs::with(specs::linux(name), |s| {
        s.kernel.get_or_insert_default().command_line = "console=ttyS0 quiet seed".into();
        s.cloud_init = Some(v1::CloudInit {
            hostname: "web-1.example.org".into(),
            ssh_authorized_keys: vec![KEY.into()],
            user_data: USER_DATA.into(),
            network_config: NETWORK.into(),
        });
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reads_what_its_cloud_init_is_told_on_every_host() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).linux().start().await?;
    let begin = Instant::now();
    let vm = cluster.run(with_seed("web")).await?;
    let id = vm.id.clone();
    for line in [
        format!("SEED meta-data:   \"instance-id\": \"{id}\""),
        "SEED meta-data:   \"local-hostname\": \"web-1.example.org\"".into(),
        format!("SEED meta-data:     \"{KEY}\""),
        "SEED user-data: #cloud-config".into(),
        "SEED user-data:   - echo proof".into(),
        "SEED network-config: version: 2".into(),
    ] {
        cluster.checker.wait_line(&id, &line, begin, secs(20)).await?;
    }

    // Another program reads the same from the file, which only QEMU's group may read.
    let host = cluster.host_of(&vm)?;
    let seed = host.state_dir().join("vms").join(&id).join("seed.img");
    let metadata = fs::metadata(&seed)?;
    assert_eq!((metadata.mode() & 0o777, metadata.uid()), (0o640, 0));
    let output = Command::new("mcopy").args(["-i", &seed.display().to_string(), "::user-data", "-"]).output()?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), USER_DATA, "{}", String::from_utf8_lossy(&output.stderr));

    // On another host it is the same instance, so cloud-init does not begin anew.
    host.cut_power();
    let moved = Instant::now();
    let line = format!("SEED meta-data:   \"instance-id\": \"{id}\"");
    cluster.checker.wait_line(&id, &line, moved, secs(30)).await?;

    let vm = cluster.api.wait_moved(&vm, secs(30)).await?;

    // With the VM the seed goes, too.
    let left = cluster.host_of(&vm)?.state_dir().join("vms").join(&id);
    assert!(left.join("seed.img").exists());
    cluster.api.delete(&id).await?;
    cluster.api.wait_gone(&id, secs(30)).await?;
    wait_for("the VM's directory is gone", secs(10), async || match left.exists() {
        true => Err(format!("{} is there", left.display())),
        false => Ok(()),
    })
    .await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_boots_by_uefi_and_keeps_its_variables() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).linux().start().await?;
    let begin = Instant::now();
    let request = specs::with(specs::linux("efi"), |s| {
        s.firmware = v1::Firmware::Uefi.into();
        s.memory_mib = 192;
    });
    let vm = cluster.api.create(request).await?;
    let vm = cluster.api.wait_running(&vm.id, secs(60)).await?;
    cluster.checker.wait_line(&vm.id, "FIRMWARE uefi", begin, secs(180)).await?;
    cluster.checker.wait_beats(&vm.id, 1, secs(60)).await?;
    let disks = cluster.pool().join("disks").join(&vm.id);
    let vars = disks.join("uefi-vars.0.fd");
    let template = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd")?;
    let kept = fs::read(&vars)?;
    assert_eq!(kept.len(), template.len());
    ensure!(kept != template, "the firmware has written nothing into its variables");
    cluster.api.delete(&vm.id).await?;
    cluster.api.wait_gone(&vm.id, secs(30)).await?;
    assert!(!disks.exists());
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_that_is_too_large_is_refused_and_nothing_is_left_of_it() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).linux().start().await?;
    let before = listing(&cluster)?;
    let with_data = |bytes: usize| {
        specs::with(with_seed("large"), |s| s.cloud_init.get_or_insert_default().user_data = "x".repeat(bytes))
    };
    let status = cluster.api.create(with_data(64 * 1024 + 1)).await.unwrap_err();
    assert_eq!(
        (status.code(), error_fields(&status)),
        (Code::InvalidArgument, vec!["spec.cloud_init.user_data".into()])
    );
    // 16 MiB is more than a message may have; the command says so without sending it.
    let status = cluster.api.create(with_data(16 << 20)).await.unwrap_err();
    ensure!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
    let file = cluster.path().join("seed-16M");
    fs::write(&file, "x".repeat(16 << 20))?;
    let path = file.display().to_string();
    let refused = cluster.cli(&["vm", "create", "large", "--disk-size", "1M", "--user-data", &path]).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("at most 65536 bytes"), "{}", refused.stderr);
    fs::remove_file(&file)?;
    assert!(list(&cluster).await?.is_empty());
    assert_eq!(listing(&cluster)?, before);
    // The largest that is taken runs, and another like it is listed with it.
    for name in ["a", "b"] {
        let request = specs::with(with_data(64 * 1024), |s| s.memory_mib = 96);
        cluster.run(v1::CreateVmRequest { name: name.into(), ..request }).await?;
    }
    assert_eq!(list(&cluster).await?.len(), 2);
    cluster.finish().await
}

async fn list(cluster: &Cluster) -> anyhow::Result<Vec<v1::Vm>> {
    Ok(cluster.api.vms().list_vms(v1::ListVmsRequest::default()).await?.into_inner().vms)
}

/// All files of the pool, and all processes of VMs.
fn listing(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    harness::listing::of(cluster)
}
