//! A tour of what an operator does with a VM: the real commands against a real cluster and an ordinary Debian guest, each with a check
//! that it did what it says. What was typed and what came out becomes `docs/tour.md`.
//!
//! The steps are in [`steps`], [`disks`] and [`hosts`]; how a command is run and written down is in [`shell`]. The cluster is the tests'
//! own: two hosts in network namespaces, their bridges joined, and a third namespace for the person who types.

mod disks;
mod hosts;
mod shell;
mod steps;

use std::fs;

use anyhow::Context as _;

use crate::{
    Cluster, Options,
    agent::HostOptions,
    netns, paths,
    site::{Page, Site},
};
pub use shell::{Transcript, commands};

/// How the cluster, and so what the tour needs beside the commands, is described to readers.
const PREFACE: &str = "\
# A tour

Written by `make tour`, which types these commands into a cluster of two hosts and checks what each of them does. The guest is an
ordinary Debian with cloud-init (`integration-tests/guests/debian`), executed without KVM. Addresses, ids and times are those of one run.
Where a command appears once that is to be tried until it succeeds, such as a login to a guest that boots, that was done.

`$IMAGES` is the address of a local web server; `web.yaml` says which address cloud-init gives the guest, and `ssh.conf` has the private
key of `key.pub`:

";

/// Runs the whole tour.
///
/// # Errors
///
/// A command fails, or has not done what it says. The transcript so far is printed then.
pub async fn run() -> anyhow::Result<Transcript> {
    let image = paths::guest("debian.qcow2")?;
    // One host has more room, so that it is known where the VM goes first.
    let larger = |at: usize, host: &mut HostOptions| host.memory_mib = if at == 0 { 3072 } else { 2048 };
    let cluster = Options::hosts(2).each_host(larger).default_leases().bridges().start().await?;
    let site = Site::start_at(&cluster.address()).await?;
    let source = site.put("/debian.qcow2", Page::Disk(image));
    let images = source.trim_end_matches("/debian.qcow2").to_owned();

    let home = cluster.path().join("home");
    fs::create_dir(&home)?;
    prepare(&home)?;
    let mut shell = shell::Shell::new(&cluster, &home, &images)?;
    let outcome = steps::all(&cluster, &mut shell).await;
    let transcript = shell.finish(PREFACE);
    if let Err(error) = outcome {
        eprintln!("{}", transcript.text());
        return Err(error);
    }
    cluster.finish().await?;
    Ok(transcript)
}

/// What is there before the first command.
fn prepare(home: &std::path::Path) -> anyhow::Result<()> {
    let network = "version: 2\nethernets:\n  eth0:\n    addresses: [10.77.0.10/24]\n";
    fs::write(home.join("web.yaml"), network)?;
    // The keys are those that a guest without KVM is quickest with.
    let ssh = "Host *\n  User debian\n  IdentityFile key\n  IdentitiesOnly yes\n  PasswordAuthentication no\n  \
               UserKnownHostsFile known_hosts\n  StrictHostKeyChecking accept-new\n  ConnectTimeout 10\n  \
               ServerAliveInterval 5\n  LogLevel ERROR\n  \
               KexAlgorithms curve25519-sha256\n  HostKeyAlgorithms ssh-ed25519\n";
    fs::write(home.join("ssh.conf"), ssh)?;
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "me@example.org", "-f"])
        .arg(home.join("key"))
        .output()
        .context("run ssh-keygen (`make setup` installs it)")?;
    anyhow::ensure!(made.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// The namespace in which the person sits.
fn seat(cluster: &Cluster) -> anyhow::Result<String> {
    let users = cluster.users()?;
    netns::output(&users, &["true"])?;
    Ok(users)
}
