//! A VM's life, with nothing broken: created, run, typed at, stopped, started, restarted, deleted.

use harness::{
    api::{host_of, incarnation_of, phase_of},
    prelude::*,
    proc_table::{self, Kind},
};
use tokio_stream::StreamExt as _;
use uncloud_proto::v1::{PowerState, VmPhase, console_request, watch_vms_response};

/// A console, as a client has it.
struct Console {
    input: tokio::sync::mpsc::Sender<v1::ConsoleRequest>,
    output: tonic::Streaming<v1::ConsoleResponse>,
    text: String,
}

impl Console {
    async fn open(cluster: &Cluster, vm: &str) -> anyhow::Result<Self> {
        let (input, requests) = tokio::sync::mpsc::channel(8);
        let open = v1::ConsoleOpen { vm: vm.into(), history_bytes: 4096, ..Default::default() };
        input.send(request(console_request::Message::Open(open))).await?;
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let output = cluster.api.vms().console(requests).await?.into_inner();
        Ok(Self { input, output, text: String::new() })
    }

    async fn type_line(&self, line: &str) -> anyhow::Result<()> {
        let bytes = format!("{line}\n").into_bytes();
        Ok(self.input.send(request(console_request::Message::Input(bytes))).await?)
    }

    /// Reads until `text` has come.
    async fn expect(&mut self, text: &str) -> anyhow::Result<()> {
        let end = tokio::time::Instant::now() + secs(20);
        while !self.text.contains(text) {
            let next = tokio::time::timeout_at(end, self.output.next()).await;
            let next = next.with_context(|| format!("no `{text}` on the console, only: {}", self.text))?;
            let piece = next.context("the console ended")??;
            self.text.push_str(&String::from_utf8_lossy(&piece.output));
        }
        Ok(())
    }
}

fn request(message: console_request::Message) -> v1::ConsoleRequest {
    v1::ConsoleRequest { message: Some(message) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_created_talks_stops_starts_and_goes_without_a_trace() -> anyhow::Result<()> {
    // The host finds out by itself how guests execute on it.
    let mut cluster = Options::hosts(1).linux().each_host(|_, h| h.accelerator = "auto".into()).start().await?;
    let host = &cluster.api.list_hosts().await?[0];
    let accelerator = host.accelerator.clone().context("the host says nothing about its accelerator")?;
    ensure!(!accelerator.why.is_empty(), "the host does not say why its guests execute as they do");
    eprintln!("accelerator: {} ({})", accelerator.kind().as_str_name(), accelerator.why);

    let request = specs::with(specs::linux("life"), |s| s.nics = vec![v1::Nic::default()]);
    let vm = cluster.run(request).await?;
    let id = vm.id.as_str();
    let spec = vm.spec.as_ref().context("a spec")?;
    assert!(spec.nics[0].mac.starts_with("42:"), "MAC {}", spec.nics[0].mac);
    assert_eq!(
        (spec.machine.as_str(), spec.disks[0].name.as_str(), spec.disks[0].pool.as_str()),
        ("q35", "disk0", "default")
    );

    // The console, both ways, for two at once.
    let mut first = Console::open(&cluster, id).await?;
    let mut second = Console::open(&cluster, id).await?;
    first.expect("READY 0").await?;
    first.type_line("hello from the first").await?;
    first.expect("ECHO hello from the first").await?;
    second.expect("ECHO hello from the first").await?;
    second.type_line("and from the second").await?;
    first.expect("ECHO and from the second").await?;
    drop((first, second));

    // The log has it all; a guest is not stalled by nobody looking.
    let log = v1::GetVmLogRequest { vm: id.into(), ..Default::default() };
    let mut pieces = cluster.api.vms().get_vm_log(log).await?.into_inner();
    let mut text = Vec::new();
    while let Some(piece) = pieces.next().await {
        text.extend(piece?.data);
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("READY 0") && text.contains("ECHO and from the second"), "{text}");

    // Stop: the guest is asked, and says good-bye.
    let before = Instant::now();
    cluster.api.stop(id).await?;
    let stopped = cluster.api.wait_phase(id, VmPhase::Stopped, secs(20)).await?;
    assert_eq!(stopped.desired(), PowerState::Stopped);
    cluster.checker.wait_line(id, "BYE", before, secs(1)).await?;
    assert!(!cluster.executes(id), "QEMU still runs");
    let counted = cluster.checker.count(id);

    // Start: a new incarnation, the same disk.
    let before = Instant::now();
    cluster.api.start(id).await?;
    let started = cluster.api.wait_moved(&stopped, secs(30)).await?;
    assert_eq!(incarnation_of(&started), incarnation_of(&stopped) + 1);
    cluster.checker.wait_line(id, &format!("READY {counted} "), before, secs(30)).await?;

    // Delete: no process, no file, no record.
    cluster.api.delete(id).await?;
    cluster.api.wait_gone(id, secs(30)).await?;
    assert!(cluster.hosts[0].processes().is_empty(), "{:?}", cluster.hosts[0].processes());
    // The disks are gone by now; the agent's own directory goes right after it has said so.
    let disks = files_with(&cluster.path().join("pool"), id);
    assert!(disks.is_empty(), "left behind: {disks:?}");
    wait_for("nothing is left behind", secs(5), async || match files_with(cluster.path(), id) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .await?;
    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    let options = etcd_client::GetOptions::new().with_prefix();
    for prefix in ["vms/", "vm-status/", "vm-names/", "macs/"] {
        let found = etcd.client().await?.get(format!("/uncloud/v1/{prefix}"), Some(options.clone())).await?;
        assert_eq!(found.count(), 0, "{prefix} {:?}", found.kvs());
    }
    cluster.hosts[0].kill();
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_stays_off_and_one_that_panics_comes_back() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).linux().start().await?;
    let vm = cluster.run(specs::linux("moody")).await?;
    let id = vm.id.as_str();

    let mut console = Console::open(&cluster, id).await?;
    console.expect("COUNT").await?;
    let before = Instant::now();
    console.type_line("panic").await?;
    // Started again by the policy, with its disk, under the same incarnation: its host never lost it.
    cluster.checker.wait_line(id, "READY", before, secs(60)).await?;
    let again = cluster.api.wait_running(id, secs(20)).await?;
    assert_eq!(incarnation_of(&again), incarnation_of(&vm));
    assert_eq!(cluster.checker.instances(id).len(), 2, "one QEMU panicked, one was started");

    let console = Console::open(&cluster, id).await?;
    console.type_line("poweroff").await?;
    let off = cluster.api.wait_phase(id, VmPhase::Stopped, secs(20)).await?;
    assert_eq!(off.desired(), PowerState::Stopped, "who powered itself off is stopped");
    assert!(!cluster.executes(id));

    cluster.api.start(id).await?;
    cluster.api.wait_moved(&off, secs(30)).await?;
    cluster.checker.wait_beats(id, 1, secs(30)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_the_host_and_a_reset_keeps_the_process() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).start().await?;
    let vm = cluster.run(specs::micro("again")).await?;
    let id = vm.id.as_str();
    let restart = |force| v1::RestartVmRequest { vm: id.into(), force, ..Default::default() };

    let before = Instant::now();
    cluster.api.vms().restart_vm(restart(false)).await?;
    cluster.checker.wait_line(id, "POWEROFF", before, secs(20)).await?;
    cluster.checker.wait_line(id, "MICRO", before, secs(20)).await?;
    let restarted = cluster.api.wait_running(id, secs(10)).await?;
    assert_eq!((host_of(&restarted), incarnation_of(&restarted)), (host_of(&vm), incarnation_of(&vm)));
    assert_eq!(cluster.checker.instances(id).len(), 2);
    cluster.checker.wait_beats(id, 1, secs(10)).await?;

    let before = Instant::now();
    cluster.api.vms().restart_vm(restart(true)).await?;
    cluster.checker.wait_line(id, "MICRO", before, secs(20)).await?;
    assert_eq!(cluster.checker.instances(id).len(), 2, "a reset starts no process");
    cluster.checker.wait_beats(id, 1, secs(10)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_shows_what_is_there_then_a_bookmark_then_every_change_and_resumes() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let old = cluster.run(specs::micro("old")).await?;

    let mut watch = cluster.api.vms().watch_vms(v1::WatchVmsRequest::default()).await?.into_inner();
    let mut initial = Vec::new();
    let bookmark = loop {
        let step = tokio::time::timeout(secs(5), watch.next()).await?.context("the watch ended")??;
        match step.event {
            Some(watch_vms_response::Event::Vm(vm)) => initial.push(vm.id),
            Some(watch_vms_response::Event::Bookmark(_)) => break step.revision,
            other => bail!("{other:?} before the bookmark"),
        }
    };
    assert_eq!(initial, [old.id.as_str()]);

    let new = cluster.run(specs::micro("new")).await?;
    cluster.api.delete(&new.id).await?;
    cluster.api.wait_gone(&new.id, secs(20)).await?;

    // The open watch has shown every change. One that resumes at the bookmark ends at the same state, and may skip what
    // was in between.
    let resume = v1::WatchVmsRequest { from_revision: bookmark, ..Default::default() };
    let resumed = cluster.api.vms().watch_vms(resume).await?.into_inner();
    for (is_open, mut watch) in [(true, watch), (false, resumed)] {
        let mut phases = Vec::new();
        loop {
            let step = tokio::time::timeout(secs(5), watch.next()).await?.context("the watch ended")??;
            assert!(step.revision > bookmark, "{} after {bookmark}", step.revision);
            match step.event {
                Some(watch_vms_response::Event::Vm(vm)) if vm.id == new.id => phases.push(phase_of(&vm)),
                Some(watch_vms_response::Event::Deleted(gone)) if gone.id == new.id => break,
                _ => {}
            }
        }
        if is_open {
            assert!(phases.contains(&VmPhase::Running), "{phases:?}");
            assert_eq!(phases.last(), Some(&VmPhase::Deleting), "{phases:?}");
        }
    }

    // What is gone from the history is said to be gone: etcd has compacted it, and no process remembers it.
    cluster.controller.kill();
    let mut etcd = cluster.etcd.as_ref().context("an etcd")?.client().await?;
    let newest = etcd.get("x", None).await?.header().context("a header")?.revision();
    etcd.compact(newest, None).await?;
    cluster.controller.start_again().await?;
    let ancient = v1::WatchVmsRequest { from_revision: bookmark, ..Default::default() };
    let refused = match cluster.api.vms().watch_vms(ancient).await {
        Err(status) => Some(status),
        Ok(mut stream) => tokio::time::timeout(secs(5), stream.get_mut().next()).await?.and_then(Result::err),
    };
    assert_eq!(refused.context("a watch that misses something was given")?.code(), Code::OutOfRange);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_runs_without_privileges_in_a_sandbox_under_a_small_keeper() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let vm = cluster.run(specs::micro("caged")).await?;
    let qemu = cluster.hosts[0].process_of(&vm.id, Kind::Qemu)?;
    let keeper = cluster.hosts[0].process_of(&vm.id, Kind::Keeper)?;

    let status = std::fs::read_to_string(format!("/proc/{}/status", qemu.pid))?;
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    assert_eq!(field("Seccomp:"), "2", "the sandbox is on");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("PPid:"), keeper.pid.to_string(), "its parent is the keeper");
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("CapEff:"), "0000000000000000");
        assert!(!field("Uid:").split_whitespace().any(|uid| uid == "0"), "Uid: {}", field("Uid:"));
    }
    let threads = std::fs::read_dir(format!("/proc/{}/task", keeper.pid))?.count();
    assert_eq!(threads, 1, "the keeper has one thread");
    let (_, private) = proc_table::memory_kib(keeper.pid).context("memory of the keeper")?;
    eprintln!("the keeper has {private} KiB of its own");
    assert!(private < 2048, "the keeper has {private} KiB of its own");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_creates_shows_and_deletes_a_vm() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let create = ["vm", "create", "web-1", "--memory", "16M", "--machine", "pc", "--image", specs::MICRO, "--wait"];
    cluster.cli(&create).await?.success()?;

    let shown = cluster.cli(&["vm", "show", "web-1", "-o", "json"]).await?.success()?.json()?;
    let id = shown["vm"]["id"].as_str().or(shown["id"].as_str()).context("an id")?.to_owned();
    cluster.checker.wait_beats(&id, 2, secs(20)).await?;

    for args in [vec!["vm", "list"], vec!["host", "list"], vec!["image", "list"], vec!["status"], vec!["events"]] {
        let table = cluster.cli(&args).await?.success()?;
        assert!(!table.stdout.trim().is_empty(), "{args:?} prints nothing");
    }
    let list = cluster.cli(&["vm", "list"]).await?.success()?.stdout;
    assert!(list.contains("web-1") && list.to_lowercase().contains("running"), "{list}");
    // A unique prefix of the UUID will do.
    let log = cluster.cli(&["vm", "logs", &id[..8]]).await?.success()?.stdout;
    assert!(log.contains("HB 00000001"), "{log}");
    let explained = cluster.cli(&["vm", "explain", "web-1"]).await?.success()?.stdout;
    assert!(explained.contains("host-1"), "{explained}");

    assert_eq!(cluster.cli(&["vm", "show", "nobody"]).await?.code, 3, "not found has a code of its own");
    cluster.cli(&["vm", "delete", "web-1", "--wait"]).await?.success()?;
    assert_eq!(cluster.cli(&["vm", "show", "web-1"]).await?.code, 3);
    cluster.finish().await
}

/// Paths under `dir` that have `text` in their name.
fn files_with(dir: &std::path::Path, text: &str) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.filter_map(|e| Some(e.ok()?.path())) {
        if path.file_name().is_some_and(|n| n.to_string_lossy().contains(text)) {
            found.push(path.clone());
        }
        if path.is_dir() && !path.is_symlink() {
            found.extend(files_with(&path, text));
        }
    }
    found
}
