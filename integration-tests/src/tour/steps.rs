//! The steps of the tour, and what each must have done. Those on disks and on hosts have files of their own.

use std::{fs, time::Duration};

use anyhow::{Context as _, ensure};

use super::{disks, hosts, shell::Shell};
use crate::{Cluster, api::phase_of, listing, proc_table, wait_for};
use uncloud_proto::v1::{self, VmPhase};

/// A guest without KVM is there long before that: 80 CPU-seconds.
pub(super) const BOOT_LIMIT: Duration = Duration::from_secs(400);
/// What the cluster does by itself takes seconds, also on a busy machine.
pub(super) const MOMENT: Duration = Duration::from_secs(60);
/// How a person logs in.
pub(super) const SSH: &str = "ssh -F ssh.conf 10.77.0.10";

/// Takes all steps.
pub(super) async fn all(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    let before = listing::of(cluster)?;
    image(shell).await?;
    create(cluster, shell).await?;
    log_in(cluster, shell).await?;
    disks::grow(shell).await?;
    disks::snapshot(shell).await?;
    disks::destroy(shell).await?;
    disks::revert(cluster, shell).await?;
    disks::clone(cluster, shell).await?;
    hosts::migrate(cluster, shell).await?;
    hosts::drain(cluster, shell).await?;
    screenshot(shell).await?;
    delete(cluster, shell).await?;
    // The directories of images and disks stay; nothing is in them.
    let new = |line: &String| !before.contains(line) && !line.ends_with("/images/") && !line.ends_with("/disks/");
    let left: Vec<String> = listing::of(cluster)?.into_iter().filter(new).collect();
    ensure!(left.is_empty(), "left behind: {left:#?}");
    Ok(())
}

async fn image(shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## An image\n\nTwo hosts have joined. An image is added by its address; a host fetches and checks it once.",
    );
    let out = shell.run("uncloud host list").await?;
    ensure!(out.contains("host-1") && out.contains("host-2"), "two hosts: {out}");
    shell.run("uncloud image add debian $IMAGES/debian.qcow2 --wait").await?;
    let out = shell.run("uncloud image show debian").await?;
    ensure!(out.contains("ready"), "the image is ready: {out}");
    Ok(())
}

async fn create(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## A VM\n\nIt gets a disk that is larger than the image, a place in the network of its host, and a key that may log in.",
    );
    let create = "uncloud vm create web --image debian --disk-size 3G --memory 384M --nic bridge=br0 \
                  --ssh-key key.pub --network-config web.yaml --wait";
    shell.run(create).await?;
    let vm = web(cluster).await?;
    ensure!(phase_of(&vm) == VmPhase::Running, "it runs: {vm:?}");
    Ok(())
}

async fn log_in(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "It boots. cloud-init has given it its name and its address, and its file system has grown to fill the disk.",
    );
    let out = shell.run_until(&format!("{SSH} hostname"), "web", BOOT_LIMIT).await?;
    ensure!(out.trim() == "web", "its host name: {out}");
    let size = file_system_mib(shell).await?;
    ensure!(size > 2700, "the file system has {size} MiB of a disk of 3 GiB");
    wait_for("the guest agent has told the address", BOOT_LIMIT, async || {
        let vm = web(cluster).await.map_err(|e| e.to_string())?;
        let addresses = vm.status.map(|s| s.addresses).unwrap_or_default();
        if addresses.iter().any(|a| a == "10.77.0.10") { Ok(()) } else { Err(format!("{addresses:?}")) }
    })
    .await?;
    let out = shell.run("uncloud vm show web").await?;
    ensure!(out.contains("10.77.0.10"), "its address: {out}");
    Ok(())
}

async fn screenshot(shell: &mut Shell) -> anyhow::Result<()> {
    shell.say("## The screen\n\nFor a guest that does not answer any more.");
    shell.run("uncloud vm screenshot web --file web.png").await?;
    let picture = fs::read(shell.file("web.png"))?;
    ensure!(picture.starts_with(b"\x89PNG\r\n\x1a\n") && picture.len() > 1000, "a picture of {} bytes", picture.len());
    Ok(())
}

async fn delete(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## Its end\n\nWith the VM its disks go, and the image, which nothing uses any more, goes from every pool.",
    );
    let vm = web(cluster).await?;
    shell.run("uncloud vm delete web --wait").await?;
    shell.run("uncloud image delete debian --wait").await?;
    shell.run("uncloud vm list").await?;
    ensure!(!proc_table::under(cluster.path()).iter().any(|p| p.vm == vm.id), "no process of it is left");
    Ok(())
}

/// The VM of the tour, as the controller knows it.
pub(super) async fn web(cluster: &Cluster) -> anyhow::Result<v1::Vm> {
    vm(cluster, "web").await
}

/// Any VM.
pub(super) async fn vm(cluster: &Cluster, name: &str) -> anyhow::Result<v1::Vm> {
    let listed = cluster.api.vms().list_vms(v1::ListVmsRequest::default()).await?.into_inner().vms;
    listed.into_iter().find(|vm| vm.name == name).with_context(|| format!("there is no VM `{name}`"))
}

/// Asks the guest how large its file system is.
pub(super) async fn file_system_mib(shell: &mut Shell) -> anyhow::Result<u64> {
    let out = shell.run(&format!("{SSH} df --output=size -BM /")).await?;
    out.split_whitespace().last().and_then(|s| s.strip_suffix('M')?.parse().ok()).context(out)
}

/// Asks the guest which of its starts this is.
pub(super) async fn boot_id(shell: &mut Shell) -> anyhow::Result<String> {
    shell.run(&format!("{SSH} cat /proc/sys/kernel/random/boot_id")).await
}
