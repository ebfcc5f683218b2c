//! What is done to the disk of the tour's VM: it grows, is kept in a snapshot, is spoilt, is put back, and is copied.

use anyhow::{Context as _, ensure};

use super::{
    shell::Shell,
    steps::{BOOT_LIMIT, MOMENT, SSH, file_system_mib, vm, web},
};
use crate::{Cluster, api::incarnation_of, netns, proc_table, wait_for};

/// The disk in sectors of 512 bytes, as the guest tells it.
const GROWN: u64 = (4 << 30) / 512;

pub(super) async fn grow(shell: &mut Shell) -> anyhow::Result<()> {
    shell.say("## A larger disk\n\nThe guest sees its new size, in sectors, while it runs. What is on the disk is the guest's to grow.");
    shell.run("uncloud vm resize-disk web disk0 4G").await?;
    shell.run_until(&format!("{SSH} cat /sys/block/vda/size"), &GROWN.to_string(), MOMENT).await?;
    shell.run(&format!("{SSH} 'sudo growpart /dev/vda 1 && sudo resize2fs /dev/vda1'")).await?;
    let size = file_system_mib(shell).await?;
    ensure!(size > 3700, "the file system has {size} MiB of a disk of 4 GiB");
    Ok(())
}

pub(super) async fn snapshot(shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## A snapshot\n\nIt is of all that is on the disks at one moment, while the guest runs; so the guest writes there first what it \
         has in memory.",
    );
    shell.run(&format!("{SSH} 'echo buy milk >notes; sync'")).await?;
    shell.run("uncloud vm snapshot create web before").await?;
    shell.run_until("uncloud vm snapshot list web", "ready", MOMENT).await?;
    Ok(())
}

pub(super) async fn destroy(shell: &mut Shell) -> anyhow::Result<()> {
    shell.say("Then somebody makes a mistake. The notes are gone, and with the list of keys nobody can log in any more to look.");
    let out = shell.run(&format!("{SSH} 'rm -r notes .ssh; sync; ls -A'")).await?;
    let left: Vec<&str> = out.lines().collect();
    ensure!(!left.contains(&"notes") && !left.contains(&".ssh"), "what is left: {out}");
    let out = shell.run(&format!("{SSH} cat notes 2>&1 || true")).await?;
    ensure!(out.contains("Permission denied (publickey"), "nobody gets in: {out}");
    Ok(())
}

pub(super) async fn revert(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "The disks are put back as they were, and the guest is started again, as after a power cut. All is there, in a file system of the \
         size that it had.",
    );
    let before = web(cluster).await?;
    shell.run("uncloud vm snapshot revert web before").await?;
    let out = shell.run_until(&format!("{SSH} cat notes"), "", BOOT_LIMIT).await?;
    ensure!(out == "buy milk\n", "the notes: {out}");
    let size = file_system_mib(shell).await?;
    ensure!(size > 3700, "the file system has {size} MiB of a disk of 4 GiB");
    let after = web(cluster).await?;
    ensure!(incarnation_of(&after) > incarnation_of(&before), "it was started again: {after:?}");
    ensure!(after.reverting_to.is_empty(), "it is over: {after:?}");
    Ok(())
}

pub(super) async fn clone(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## A copy\n\nA second VM with the disks of the snapshot, while the first one runs. cloud-init sees that it is another one and gives \
         it a name of its own. Its network configuration is a copy, too, and so is its address; `$COPY` is the one that IPv6 makes from \
         its MAC address, which is its own.",
    );
    shell.run("uncloud vm clone web copy --snapshot before --wait").await?;
    let copy = vm(cluster, "copy").await?;
    let nics = &copy.spec.as_ref().context("a spec")?.nics;
    shell.set("COPY", &netns::link_local(&nics.first().context("a NIC")?.mac)?);
    let out = shell.run("uncloud vm list").await?;
    ensure!(out.contains("web") && out.contains("copy"), "both are there: {out}");
    let out = shell.run_until("ssh -F ssh.conf $COPY hostname", "copy", BOOT_LIMIT).await?;
    ensure!(out == "copy\n", "its host name: {out}");
    let out = shell.run("ssh -F ssh.conf $COPY cat notes").await?;
    ensure!(out == "buy milk\n", "the notes: {out}");
    shell.say("It needs neither the snapshot nor the first VM, nor they it.");
    shell.run("uncloud vm delete copy --wait").await?;
    ensure!(!proc_table::under(cluster.path()).iter().any(|p| p.vm == copy.id), "no process of it is left");
    shell.run("uncloud vm snapshot delete web before").await?;
    wait_for("the snapshot is gone", MOMENT, async || {
        let snapshots = web(cluster).await.map_err(|e| e.to_string())?.snapshots;
        if snapshots.is_empty() { Ok(()) } else { Err(format!("{snapshots:?}")) }
    })
    .await
}
