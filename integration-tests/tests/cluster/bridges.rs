//! VMs on bridges of their hosts: reached from outside, also while they migrate; and nothing of them is left behind.

use std::process::{Child, Stdio};

use harness::{
    agent::HostOptions,
    api::{host_of, phase_of},
    netns::{self, GUEST_BRIDGE},
    prelude::*,
    proc_table::Kind,
    process,
};
use uncloud_proto::v1::{NicType, Vm, VmPhase};

fn on_bridge(name: &str, bridge: &str) -> v1::CreateVmRequest {
    specs::with(specs::linux(name), |s| {
        s.nics = vec![v1::Nic { r#type: NicType::Bridge.into(), bridge: bridge.into(), ..Default::default() }];
        s.restart = v1::RestartPolicy::Never.into();
        // What is tried here is not how fast a host is given up.
        s.failover = v1::FailoverPolicy::Patient.into();
    })
}

fn address(vm: &Vm) -> anyhow::Result<String> {
    netns::link_local(&vm.spec.as_ref().context("a spec")?.nics[0].mac)
}

async fn reached(cluster: &Cluster, vm: &Vm) -> anyhow::Result<()> {
    let (users, address) = (cluster.users()?, address(vm)?);
    wait_for("the guest answers", secs(60), async || {
        netns::output(&users, &["ping", "-6", "-q", "-c", "1", "-W", "1", &address]).map_err(|e| e.to_string())
    })
    .await
    .map(drop)
}

/// The taps on the bridge of a host, with their MTU.
fn taps(cluster: &mut Cluster, host: &str) -> anyhow::Result<Vec<(String, u32)>> {
    let netns = cluster.host(host)?.netns()?.to_owned();
    let text = netns::output(&netns, &["ip", "-o", "link", "show", "master", GUEST_BRIDGE])?;
    let mut taps = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = words.get(1).context("a name")?.trim_end_matches(':');
        let mtu = words.iter().skip_while(|w| **w != "mtu").nth(1).context("an MTU")?.parse()?;
        if !name.starts_with("uplink") {
            ensure!(words[2].contains("UP"), "{line}");
            taps.push((name.to_owned(), mtu));
        }
    }
    Ok(taps)
}

async fn no_taps(cluster: &mut Cluster, host: &str) -> anyhow::Result<()> {
    wait_for("no tap is left", secs(20), async || match taps(cluster, host) {
        Ok(taps) if taps.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
}

/// Ten pings a second until told to end.
struct Pings(Child);

impl Pings {
    fn start(cluster: &Cluster, vm: &Vm) -> anyhow::Result<Self> {
        let mut ping = netns::command(&cluster.users()?, "ping");
        ping.args(["-6", "-q", "-i", "0.1", &address(vm)?]);
        Ok(Self(ping.stdout(Stdio::piped()).spawn()?))
    }

    /// How many were sent, and how many of them were not answered.
    fn end(self) -> anyhow::Result<(u32, u32)> {
        process::signal_pid(self.0.id(), Signal::INT)?;
        let output = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let numbers = text.lines().find(|l| l.contains("packets transmitted")).context(text.clone())?;
        let mut numbers = numbers.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
        let (sent, answered) = (numbers.next().context("sent")?, numbers.next().context("answered")?);
        Ok((sent, sent - answered))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_a_bridge_is_reached_from_outside_and_while_it_migrates() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).linux().bridges().start().await?;
    for host in ["host-1", "host-2"] {
        let netns = cluster.host(host)?.netns()?.to_owned();
        netns::output(&netns, &["ip", "link", "set", GUEST_BRIDGE, "mtu", "1400"])?;
    }
    let vm = cluster.run(on_bridge("web", GUEST_BRIDGE)).await?;
    reached(&cluster, &vm).await?;
    let source = host_of(&vm).to_owned();
    let target = if source == "host-1" { "host-2" } else { "host-1" };
    let begin: String = vm.id.chars().filter(|c| *c != '-').take(11).collect();
    assert_eq!(
        taps(&mut cluster, &source)?,
        [(format!("u{begin}-10"), 1400)],
        "as long as packets may be on the bridge"
    );
    assert_eq!(taps(&mut cluster, target)?, []);

    let boot = cluster.checker.beats(&vm.id).last().context("a beat")?.said.boot.clone();
    let pings = Pings::start(&cluster, &vm)?;
    cluster.cli(&["vm", "migrate", "web", target, "--wait"]).await?.success()?;
    let beat = cluster.checker.wait_beats(&vm.id, 2, secs(20)).await?;
    assert_eq!((beat.host.as_str(), beat.said.boot.as_str()), (target, boot.as_str()), "the same guest goes on");
    reached(&cluster, &vm).await?;
    let (sent, lost) = pings.end()?;
    eprintln!("{lost} of {sent} pings were lost, at ten a second");
    // What the guest's pause takes, and no more than that: the switches must have learnt where the guest is.
    ensure!(lost <= 30, "{lost} of {sent} pings were lost");
    no_taps(&mut cluster, &source).await?;
    assert_eq!(taps(&mut cluster, target)?, [(format!("u{begin}-20"), 1400)]);

    // An agent that comes back finds its VM, and the tap is still the VM's.
    cluster.host(target)?.kill();
    cluster.host(target)?.start_again()?;
    cluster.checker.wait_beats(&vm.id, 3, secs(20)).await?;
    cluster.wait_hosts().await?;
    reached(&cluster, &vm).await?;
    assert_eq!(taps(&mut cluster, target)?.len(), 1);

    // Whatever ends QEMU, its tap goes with it; a start makes a new one.
    let qemu = cluster.host(target)?.process_of(&vm.id, Kind::Qemu)?;
    process::kill_pid(qemu.pid);
    no_taps(&mut cluster, target).await?;
    cluster.api.wait_vm(&vm.id, "does not run", secs(20), |vm| phase_of(vm) != VmPhase::Running).await?;
    cluster.api.stop(&vm.id).await?;
    cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(20)).await?;
    cluster.api.start(&vm.id).await?;
    let vm = cluster.api.wait_running(&vm.id, secs(60)).await?;
    reached(&cluster, &vm).await?;
    let host = host_of(&vm).to_owned();
    assert_eq!(taps(&mut cluster, &host)?.len(), 1);
    cluster.api.delete(&vm.id).await?;
    cluster.api.wait_gone(&vm.id, secs(30)).await?;
    no_taps(&mut cluster, &host).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_the_bridge_is_refused_in_words() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).linux().bridges().start().await?;
    // One that offers no bridge, and one that offers a bridge that it does not have.
    cluster.add_host(&HostOptions::default()).await?;
    let missing = HostOptions { args: vec!["--bridge".into(), "missing".into()], ..HostOptions::default() };
    cluster.add_host(&missing).await?;

    let vm = cluster.run(on_bridge("web", GUEST_BRIDGE)).await?;
    assert_eq!(host_of(&vm), "host-1");
    let refused = cluster.cli(&["vm", "migrate", "web", "host-2"]).await?;
    ensure!(refused.stderr.contains("`host-2` lacks bridge `br0` (the agent's --bridge)"), "{}", refused.stderr);
    let shown = cluster.cli(&["vm", "show", "web"]).await?.success()?;
    ensure!(shown.stdout.contains("bridge=br0  42:"), "{}", shown.stdout);
    let shown = cluster.cli(&["host", "show", "host-3"]).await?.success()?;
    ensure!(shown.stdout.contains("Bridges") && shown.stdout.contains("missing"), "{}", shown.stdout);

    let vm = cluster.api.create(on_bridge("nowhere", "br9")).await?;
    let explained = cluster.cli(&["vm", "explain", &vm.id]).await?.success()?;
    ensure!(explained.stdout.contains("3 lack bridge `br9`"), "{}", explained.stdout);

    let vm = cluster.api.create(on_bridge("broken", "missing")).await?;
    let vm = cluster.api.wait_phase(&vm.id, VmPhase::Failed, secs(30)).await?;
    let reason = vm.status.context("a status")?.reason;
    ensure!(reason.contains("no port of bridge missing can be made") && reason.contains("No such device"), "{reason}");
    cluster.finish().await
}
