//! What a person has for a guest that does not answer, and for changing it: screen, guest agent, updates, files, what-if.

use harness::{
    api::{host_of, incarnation_of},
    prelude::*,
};
use uncloud_proto::v1::{DisplayType, FailoverPolicy, GuestAgentMode, VmPhase, vnc_request::Message};

/// The Linux guest as a whole machine: with a screen and the channel to its agent.
fn whole(name: &str) -> v1::CreateVmRequest {
    specs::with(specs::linux(name), |s| {
        s.display = DisplayType::Standard.into();
        s.guest_agent = GuestAgentMode::Enabled.into();
    })
}

/// Width and height of a PNG file.
fn dimensions(png: &[u8]) -> anyhow::Result<(u32, u32)> {
    ensure!(png.len() > 33 && png.starts_with(b"\x89PNG\r\n\x1a\n"), "{} bytes that are no PNG file", png.len());
    let number = |at: usize| u32::from_be_bytes([png[at], png[at + 1], png[at + 2], png[at + 3]]);
    Ok((number(16), number(20)))
}

fn message(message: Message) -> v1::VncRequest {
    v1::VncRequest { message: Some(message) }
}

/// Opens a VNC connection at a controller. What is sent is kept open by the sender.
async fn vnc(
    api: &harness::api::Api,
    vm: &str,
) -> anyhow::Result<(tokio::sync::mpsc::Sender<v1::VncRequest>, tonic::Streaming<v1::VncResponse>)> {
    let (input, requests) = tokio::sync::mpsc::channel(8);
    input.send(message(Message::Open(v1::VncOpen { vm: vm.into(), owner: String::new() }))).await?;
    let output = api.vms().vnc(tokio_stream::wrappers::ReceiverStream::new(requests)).await?.into_inner();
    Ok((input, output))
}

async fn heard(output: &mut tonic::Streaming<v1::VncResponse>, bytes: usize) -> anyhow::Result<Vec<u8>> {
    let mut all = Vec::new();
    while all.len() < bytes {
        let next = tokio::time::timeout(secs(10), output.message()).await.context("the screen says nothing")??;
        all.extend(next.context("the screen was closed")?.data);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_screen_can_be_looked_at_and_nobody_who_looks_stalls_the_guest() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).linux().start().await?;
    let vm = cluster.run(whole("seen")).await?;
    let id = vm.id.as_str();

    // A picture, by the command.
    let file = cluster.path().join("seen.png");
    cluster.cli(&["vm", "screenshot", "seen", "--file", file.to_str().context("a path")?]).await?.success()?;
    let (width, height) = dimensions(&std::fs::read(&file)?)?;
    eprintln!("the screen has {width} x {height} points");
    assert!((320..=1920).contains(&width) && (200..=1200).contains(&height));

    // VNC: the server greets, and answers.
    let (input, mut output) = vnc(&cluster.api, id).await?;
    assert_eq!(heard(&mut output, 12).await?, b"RFB 003.008\n");
    input.send(message(Message::Data(b"RFB 003.008\n".to_vec()))).await?;
    assert_eq!(heard(&mut output, 2).await?, [1, 1], "one kind of security: none");
    input.send(message(Message::Data(vec![1]))).await?;
    assert_eq!(heard(&mut output, 4).await?, [0, 0, 0, 0], "accepted");
    input.send(message(Message::Data(vec![1]))).await?;
    let init = heard(&mut output, 24).await?;
    assert_eq!(u32::from(u16::from_be_bytes([init[0], init[1]])), width);

    // Asks for the whole picture again and again, and takes nothing: the guest counts on, and others see it.
    let update = [&[3, 0, 0, 0, 0, 0][..], &(width as u16).to_be_bytes(), &(height as u16).to_be_bytes()].concat();
    for _ in 0..500 {
        if tokio::time::timeout(
            std::time::Duration::from_millis(20),
            input.send(message(Message::Data(update.clone()))),
        )
        .await
        .is_err()
        {
            break; // all that is between us and QEMU is full
        }
    }
    let (_second, mut other) = vnc(&cluster.api, id).await?;
    assert_eq!(heard(&mut other, 12).await?, b"RFB 003.008\n");
    cluster.checker.wait_beats(id, 3, secs(10)).await?;
    drop((input, output));

    // What has no screen says so.
    let blind = cluster.run(specs::linux("blind")).await?;
    let answer = cluster.cli(&["vm", "screenshot", "blind"]).await?;
    assert!(answer.code == 4 && answer.stderr.contains("has no screen"), "{answer:?}");
    let (_input, mut output) = vnc(&cluster.api, &blind.id).await?;
    let status = output.message().await.err().context("it has a screen")?;
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vnc_viewer_gets_at_the_screen_through_a_local_port() -> anyhow::Result<()> {
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    let cluster = Options::hosts(1).linux().start().await?;
    cluster.run(whole("seen")).await?;
    let refused = cluster.cli(&["vm", "vnc", "seen", "--listen", "0.0.0.0:0"]).await?;
    assert!(refused.code == 2 && refused.stderr.contains("127.0.0.1"), "{refused:?}");

    let mut command = tokio::process::Command::new(harness::paths::binary("uncloud")?);
    command.env("UNCLOUD_ENDPOINTS", cluster.api.endpoint()).args(["vm", "vnc", "seen"]).kill_on_drop(true);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
    let mut address = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut address).await?;
    for _ in 0..2 {
        let mut viewer = tokio::net::TcpStream::connect(address.trim()).await?;
        let mut version = [0; 12];
        tokio::time::timeout(secs(10), viewer.read_exact(&mut version)).await??;
        assert_eq!(&version, b"RFB 003.008\n");
        viewer.write_all(&version).await?;
        let mut security = [0; 2];
        tokio::time::timeout(secs(10), viewer.read_exact(&mut security)).await??;
        assert_eq!(security, [1, 1]);
    }
    child.kill().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_an_agent_tells_its_addresses() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).linux().start().await?;
    let vm = cluster.run(whole("talks")).await?;
    let has = |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| s.addresses == ["10.0.2.15", "fd00::15"]);
    cluster.api.wait_vm(&vm.id, "addresses", secs(30), has).await?;
    let shown = cluster.cli(&["vm", "show", "talks"]).await?.success()?.stdout;
    assert!(shown.contains("10.0.2.15, fd00::15"), "{shown}");
    // They are those of a guest that runs.
    cluster.api.stop(&vm.id).await?;
    let stopped = cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(20)).await?;
    assert_eq!(stopped.status.context("a status")?.addresses, [] as [String; 0]);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_changed_now_and_from_its_next_start_on() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).linux().start().await?;
    let vm = cluster.run(specs::linux("changes")).await?;
    let update =
        ["vm", "update", "changes", "--memory", "128M", "--failover", "hold", "--label", "a=b", "--priority", "7"];
    let said = cluster.cli(&update).await?.success()?;
    assert!(said.stderr.contains("spec.memory_mib, spec.failover"), "{said:?}");
    let changed = cluster.api.vm(&vm.id).await?;
    let spec = changed.spec.clone().context("a spec")?;
    assert_eq!((spec.priority, spec.memory_mib, spec.failover()), (7, 96, FailoverPolicy::Fast));
    assert_eq!(changed.labels.get("a").map(String::as_str), Some("b"));
    assert_eq!(incarnation_of(&changed), incarnation_of(&vm), "it goes on");
    let next = changed.next_spec.clone().context("a next spec")?;
    assert_eq!((next.memory_mib, next.failover()), (128, FailoverPolicy::Hold));

    // Somebody who has read an older one is refused, and what does not fit is.
    let outdated = ["vm", "update", "changes", "--priority", "1", "--if-revision", &vm.revision.to_string()];
    let refused = cluster.cli(&outdated).await?;
    assert!(refused.code == 4 && refused.stderr.contains("has been changed since"), "{refused:?}");
    let refused = cluster.cli(&["vm", "update", "changes", "--memory", "1000G"]).await?;
    assert!(refused.code == 4 && refused.stderr.contains("lacks 1024000 MiB"), "{refused:?}");

    // The next start has it all, and the guest sees it.
    cluster.api.stop(&vm.id).await?;
    let stopped = cluster.api.wait_phase(&vm.id, VmPhase::Stopped, secs(20)).await?;
    cluster.api.start(&vm.id).await?;
    let started = cluster.api.wait_moved(&stopped, secs(30)).await?;
    let spec = started.spec.clone().context("a spec")?;
    assert_eq!((spec.memory_mib, spec.failover(), started.next_spec.clone()), (128, FailoverPolicy::Hold, None));
    assert!(started.pending_restart.is_empty());

    // What if its host died now? It is held there.
    let what_if = cluster.cli(&["host", "what-if", host_of(&started), "-o", "json"]).await?.success()?.json()?;
    assert_eq!(what_if["vms"][0]["outcome"], "SIMULATED_OUTCOME_UNREACHABLE", "{what_if}");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_describe_vms_and_every_controller_says_what_if() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).controllers(2).start().await?;
    let file = cluster.path().join("vms.yaml");
    let path = file.to_str().context("a path")?;
    let describe = |priority: u32| {
        let vm = |name: &str| {
            format!(
                "name: {name}\nmemory: 16M\nmachine: pc\ndisks: [{{image: micro}}]\ndisplay: none\nguest_agent: disabled\n\
                 priority: {priority}\nstop_grace: 10s\n"
            )
        };
        std::fs::write(&file, format!("{}---\n{}", vm("one"), vm("two")))
    };
    describe(1)?;
    let dry = cluster.cli(&["apply", "-f", path, "--dry-run"]).await?.success()?;
    assert_eq!(dry.stdout, "one  create\ntwo  create\n");
    assert!(cluster.api.vm("one").await.is_err(), "a dry run changes nothing");
    cluster.cli(&["apply", "-f", path, "--wait"]).await?.success()?;
    let again = cluster.cli(&["apply", "-f", path]).await?.success()?;
    assert_eq!(again.stdout, "one  none\ntwo  none\n");
    describe(5)?;
    let changed = cluster.cli(&["apply", "-f", path]).await?.success()?;
    assert_eq!(changed.stdout, "one  change  priority (1 to 5)\ntwo  change  priority (1 to 5)\n");
    let one = cluster.api.vm("one").await?;
    assert_eq!(one.spec.as_ref().map(|s| s.priority), Some(5));

    std::fs::write(&file, "name: three\nmemroy: 16M\n")?;
    let wrong = cluster.cli(&["vm", "create", "--file", path]).await?;
    assert!(wrong.code == 2 && wrong.stderr.contains("memroy") && wrong.stderr.contains("2"), "{wrong:?}");
    std::fs::write(&file, "name: one\nmachine: q35\n")?;
    let fixed = cluster.cli(&["apply", "-f", path]).await?;
    assert!(fixed.code == 2 && fixed.stderr.contains("machine (pc to q35)"), "{fixed:?}");

    // Each controller by itself, also where an older answer will do.
    for address in cluster.addresses() {
        for stale in [&[][..], &["--stale"][..]] {
            let args = [&["host", "what-if", host_of(&one), "-o", "json"][..], stale].concat();
            let answer = harness::cli::run(address, &args).await?.success()?.json()?;
            let vms = answer["vms"].as_array().context("VMs")?;
            assert!(vms.iter().all(|vm| vm["outcome"] == "SIMULATED_OUTCOME_MOVES"), "{answer}");
            assert!(vms.iter().any(|vm| vm["name"] == "one"), "{answer}");
        }
    }
    cluster.finish().await
}
