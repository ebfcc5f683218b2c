//! The command as a process: exit codes, streams, closed pipes.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

#[allow(dead_code, reason = "each test program uses a part of the fake")]
mod fake;

use std::{
    io::Read as _,
    process::{Command, Output, Stdio},
};

use fake::{Answer, Fake, VM_ID};
use tonic::Status;
use uncloud_proto::v1::{self, PowerState, VmPhase, watch_vms_response::Event};

fn uncloud(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uncloud"));
    command.args(arguments).env_remove("UNCLOUD_ENDPOINTS").env_remove("UNCLOUD_OWNER").stdin(Stdio::null());
    command
}

/// Runs it against a controller with this script.
async fn against(script: Vec<Answer>, arguments: &[&str]) -> Output {
    let (address, _) = Fake::start(script).await;
    let mut command = uncloud(arguments);
    command.env("UNCLOUD_ENDPOINTS", address.to_string());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[tokio::test]
async fn exit_codes_say_what_happened() {
    for (status, code) in [
        (Status::not_found("no VM `web`"), 3),
        (Status::invalid_argument("vm is required"), 4),
        (Status::failed_precondition("VM `web` does not run"), 4),
        (Status::internal("a bug"), 1),
    ] {
        let message = status.message().to_owned();
        let output = against(vec![Answer::Refusal(status)], &["vm", "restart", "web"]).await;
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(output.stdout.is_empty() && stderr(&output).starts_with(&format!("error: {message}")));
    }
    let output = against(vec![Answer::Vm("web")], &["vm", "show", "web", "-o", "json"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["vm"]["name"], "web");
    assert!(output.stderr.is_empty());
}

#[test]
fn nobody_there_is_code_5_with_a_hint_and_wrong_usage_is_code_2() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = uncloud(&["status", "--timeout", "300ms", "--endpoint", &free.to_string()]).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains(&free.to_string()) && stderr(&output).contains("hint:"), "{}", stderr(&output));
    for wrong in [
        &["vm"][..],
        &["vm", "create"],
        &["vm", "create", "x", "--memory", "lots"],
        &["status", "--endpoint", "https://a:1"],
        &["status", "--timeout", "10"],
        &["image", "add", "x"],
        &["dev", "--demo", "--demo-kernel", "/does/not/exist"],
    ] {
        let output = uncloud(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_closed_pipe_is_no_accident() {
    for arguments in [&["completions", "bash"][..], &["--help"], &["vm", "create", "--help"]] {
        let mut child = uncloud(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut words = String::new();
        child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        let status = child.wait().unwrap();
        assert!(!words.contains("panicked") && status.code().is_some(), "{arguments:?}: {status} {words}");
    }
    // And a closed stderr.
    let mut child = uncloud(&["status", "--timeout", "100ms"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = uncloud(&["completions", shell]).output().unwrap();
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("uncloud"), "{shell}");
    }
}

#[tokio::test]
async fn a_lost_create_says_how_to_try_again_safely() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = free.to_string();
    let output =
        uncloud(&["vm", "create", "x", "--request-id", "r-1", "--timeout", "200ms", "--endpoint", &address]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert!(stderr(&output).contains("--request-id r-1"), "{}", stderr(&output));
}

/// A step of a watch in which the VM is like this.
fn seen(revision: i64, desired: PowerState, phase: VmPhase, reason: &str) -> Result<v1::WatchVmsResponse, Status> {
    let status = v1::VmStatus { phase: phase.into(), reason: reason.to_owned(), ..Default::default() };
    let vm = v1::Vm {
        id: VM_ID.to_owned(),
        name: "web".to_owned(),
        desired: desired.into(),
        status: Some(status),
        revision,
        ..Default::default()
    };
    Ok(v1::WatchVmsResponse { revision, event: Some(Event::Vm(vm)) })
}

#[tokio::test]
async fn waiting_says_how_it_goes_and_ends_with_the_vm() {
    let steps = vec![
        seen(1, PowerState::Running, VmPhase::Pending, "3 hosts: 3 lack 512 MiB of memory"),
        seen(2, PowerState::Running, VmPhase::Starting, ""),
        seen(3, PowerState::Running, VmPhase::Starting, ""),
        seen(4, PowerState::Running, VmPhase::Running, ""),
    ];
    let script = vec![Answer::Vm("web"), Answer::Steps(steps)];
    let output = against(script, &["vm", "create", "web", "--wait"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    // One line for each change, because stderr is not a terminal.
    let progress = "web  -\nweb  pending  3 hosts: 3 lack 512 MiB of memory\nweb  starting\nweb  running\n";
    assert_eq!(stderr(&output), progress);
    assert!(String::from_utf8_lossy(&output.stdout).contains("running"));
}

#[tokio::test]
async fn waiting_for_what_cannot_be_fails_with_the_reason() {
    let steps = vec![seen(1, PowerState::Running, VmPhase::Failed, "QEMU: no such \x1b machine")];
    let output = against(vec![Answer::Vm("web"), Answer::Steps(steps)], &["vm", "create", "web", "--wait"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains(r"QEMU: no such \u{1b} machine"), "{}", stderr(&output));

    let steps = vec![seen(1, PowerState::Running, VmPhase::Pending, "no host is up")];
    let arguments = ["vm", "create", "web", "--wait", "--wait-timeout", "300ms"];
    let output = against(vec![Answer::Vm("web"), Answer::Steps(steps)], &arguments).await;
    assert_eq!(output.status.code(), Some(5));
    assert!(stderr(&output).contains("no host is up"), "{}", stderr(&output));

    let steps = vec![Ok(v1::WatchVmsResponse { revision: 9, event: Some(Event::Bookmark(v1::Bookmark {})) })];
    let output = against(vec![Answer::Vm("web"), Answer::Steps(steps)], &["vm", "stop", "web", "--wait"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("was deleted"), "{}", stderr(&output));
}
