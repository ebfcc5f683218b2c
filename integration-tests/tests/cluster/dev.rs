//! `uncloud dev`: a whole cluster by one command, and nothing of it left afterwards.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use harness::{Api, paths, prelude::*, proc_table, process, slots};

/// Processes of a cluster in `dir`: its programs have the directory on their command line, QEMU has it as its place.
fn left_in(dir: &Path) -> Vec<String> {
    let text = dir.display().to_string();
    let found = proc_table::pids().into_iter().filter_map(|pid| {
        let line = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).ok()?).replace('\0', " ");
        let place = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        (pid != std::process::id() && (line.contains(&text) || place.starts_with(dir)))
            .then(|| format!("{pid}: {line}"))
    });
    found.collect()
}

fn directory() -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new().prefix("uncloud-test-dev-").tempdir()?;
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_up_runs_a_vm_and_leaves_no_process_behind_on_ctrl_c() -> anyhow::Result<()> {
    let _slot = slots::Slot::take(slots::Share::One).await?;
    let dir = directory()?;
    let listen = format!("127.0.0.1:{}", harness::ports::free_port()?);
    let mut dev = tokio::process::Command::new(paths::binary("uncloud")?)
        .args(["dev", "--hosts", "2", "--memory-mib", "512", "--listen", &listen, "--dir"])
        .arg(dir.path().join("dev"))
        .stdin(Stdio::null())
        .stdout(fs::File::create(dir.path().join("out"))?)
        .stderr(fs::File::create(dir.path().join("err"))?)
        .kill_on_drop(true)
        .spawn()?;
    let api = Api::new(&listen)?;
    wait_for("two hosts", secs(60), async || match api.list_hosts().await {
        Ok(hosts) if hosts.iter().filter(|h| h.state() == v1::HostState::Up).count() == 2 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    wait_for("it says how to talk to it", secs(5), async || {
        let told = fs::read_to_string(dir.path().join("out")).map_err(|e| e.to_string())?;
        if told.contains(&listen) { Ok(()) } else { Err(told) }
    })
    .await?;

    // An empty disk: the firmware finds nothing to boot, and QEMU runs.
    let disk = v1::Disk { size_bytes: 1 << 20, ..Default::default() };
    let spec = v1::VmSpec { memory_mib: 32, disks: vec![disk], ..Default::default() };
    let vm = v1::CreateVmRequest { name: "here".into(), spec: Some(spec), ..Default::default() };
    let vm = api.create(vm).await?;
    api.wait_running(&vm.id, secs(30)).await?;
    assert!(!left_in(dir.path()).is_empty(), "this test would see a process that is left");

    let pid = dev.id().context("it runs")?;
    process::signal_pid(pid, Signal::INT)?;
    let status = tokio::time::timeout(secs(40), dev.wait()).await.context("it does not end on Ctrl-C")??;
    let err = fs::read_to_string(dir.path().join("err"))?;
    assert!(status.success(), "{status}: {err}");
    wait_for("no process is left", secs(5), async || {
        let left = left_in(dir.path());
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await?;
    Ok(())
}

/// Not on a terminal: it takes everything down by itself, and its exit status says whether the story held.
#[tokio::test(flavor = "multi_thread")]
async fn the_demonstration_holds_and_leaves_nothing_behind() -> anyhow::Result<()> {
    let _slot = slots::Slot::take(slots::Share::Most).await?;
    let dir = directory()?;
    let mut command = Command::new(paths::binary("uncloud")?);
    command
        .args(["dev", "--demo", "--listen", "127.0.0.1:0", "--demo-kernel"])
        .arg(paths::guest("vmlinuz")?)
        .arg("--demo-initrd")
        .arg(paths::guest("initrd.img")?)
        .arg("--dir")
        .arg(dir.path().join("dev"))
        .stdin(Stdio::null());
    // SAFETY: one system call, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?));
    }
    let output = tokio::process::Command::from(command).kill_on_drop(true).output();
    let output = tokio::time::timeout(secs(240), output).await.context("the story does not end")??;
    let told = String::from_utf8_lossy(&output.stdout);
    eprintln!("{told}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "the story did not hold: {}", output.status);
    wait_for("no process is left", secs(5), async || {
        let left = left_in(dir.path());
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await
}
