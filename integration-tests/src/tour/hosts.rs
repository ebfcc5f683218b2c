//! The VM of the tour changes hosts: because somebody wants it to, and because its host is emptied.

use std::fs;

use anyhow::{Context as _, ensure};

use super::{
    shell::Shell,
    steps::{BOOT_LIMIT, SSH, boot_id, web},
};
use crate::{Cluster, api::host_of, wait_for};

pub(super) async fn migrate(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## To another host while it runs\n\nThe guest counts, each number goes over one TCP connection, and the VM moves meanwhile. No \
         number is lost and none comes twice; and it is still the same start of the guest.",
    );
    let boot = boot_id(shell).await?;
    ensure!(host_of(&web(cluster).await?) == "host-1", "it is on the larger host");
    while_it_counts(shell, "count-1.txt", "uncloud vm migrate web --wait").await?;
    let after = web(cluster).await?;
    ensure!(host_of(&after) == "host-2", "it is on the other host: {after:?}");
    ensure!(boot_id(shell).await? == boot, "the guest has not been started anew");
    Ok(())
}

pub(super) async fn drain(cluster: &Cluster, shell: &mut Shell) -> anyhow::Result<()> {
    shell.say(
        "## A host is emptied\n\nBefore somebody opens its case. All VMs leave it without stopping, and it takes no new ones before it is told \
         to.",
    );
    let boot = boot_id(shell).await?;
    let line = "uncloud host drain host-2 --reason 'a new fan'";
    let out = while_it_counts(shell, "count-2.txt", line).await?;
    ensure!(out.contains("1 moved") && out.contains("nothing executes there any more"), "how it went: {out}");
    let after = web(cluster).await?;
    ensure!(host_of(&after) == "host-1", "it has left: {after:?}");
    ensure!(boot_id(shell).await? == boot, "the guest has not been started anew");
    let host = cluster.hosts.iter().find(|host| host.name() == "host-2").context("no host-2")?;
    let left = host.processes();
    ensure!(left.is_empty(), "nothing executes there: {left:?}");
    let out = shell.run("uncloud host show host-2").await?;
    ensure!(out.contains("draining") && out.contains("a new fan") && !out.contains("web"), "nothing is on it: {out}");
    shell.run("uncloud host uncordon host-2").await?;
    let out = shell.run("uncloud host list").await?;
    ensure!(!out.contains("draining") && !out.contains("cordoned"), "it takes VMs again: {out}");
    Ok(())
}

/// Types a line while the guest counts over one connection, until it is told that it is enough; gives what the line printed. Every
/// number must have arrived, once.
async fn while_it_counts(shell: &mut Shell, file: &str, line: &str) -> anyhow::Result<String> {
    let count = "rm -f enough; i=0; until [ -e enough ]; do echo $((++i)); sleep 1; done";
    shell.behind(&format!("{SSH} '{count}' >{file} &"))?;
    counted_beyond(shell, file, 2).await?;
    let out = shell.run(line).await?;
    let so_far = counted(shell, file).len();
    counted_beyond(shell, file, so_far).await?;
    shell.run(&format!("{SSH} touch enough")).await?;
    shell.wait().await?;
    let last = shell.run(&format!("tail -n 1 {file}")).await?;
    let last: usize = last.trim().parse().context(last)?;
    let (numbers, expected) = (counted(shell, file), (1..=last).map(|n| n.to_string()).collect::<Vec<_>>());
    ensure!(numbers == expected, "each number once: {numbers:?}");
    Ok(out)
}

async fn counted_beyond(shell: &Shell, file: &str, n: usize) -> anyhow::Result<()> {
    wait_for("the guest counts", BOOT_LIMIT, async || {
        let numbers = counted(shell, file);
        if numbers.len() > n { Ok(()) } else { Err(format!("{numbers:?}")) }
    })
    .await
}

/// What has arrived so far.
fn counted(shell: &Shell, file: &str) -> Vec<String> {
    let text = fs::read_to_string(shell.file(file)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}
