//! `uncloud vm console`, through pipes and on a terminal (which `script` makes).

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

#[allow(dead_code, reason = "each test program uses a part of the fake")]
mod fake;

use std::{
    fs,
    io::{Read as _, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fake::{Answer, Fake};
use rustix::process::{Pid, Signal, kill_process};

const UNCLOUD: &str = env!("CARGO_BIN_EXE_uncloud");

async fn fake() -> String {
    Fake::start([Answer::Echo]).await.0.to_string()
}

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A shell on a terminal of its own, which notes the terminal's settings before and after the console.
fn on_a_terminal(dir: &Path, endpoint: &str) -> Child {
    let line = format!(
        "stty -g > before; sh -c 'echo $$ > pid; exec {UNCLOUD} vm console web'; echo $? > code; stty -g > after"
    );
    let mut command = Command::new("script");
    command.args(["-qefc", &line, "/dev/null"]).current_dir(dir).env("UNCLOUD_ENDPOINTS", endpoint);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Reads what the terminal shows until these words come.
fn read_until(child: &mut Child, words: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(words) {
        let n = child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
        assert!(n > 0, "the end before `{words}`: {}", String::from_utf8_lossy(&seen));
        seen.extend(byte);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn settings(dir: &Path) -> (String, String) {
    let read = |name| wait_for(name, || fs::read_to_string(dir.join(name)).ok().filter(|s| s.ends_with('\n')));
    assert_eq!(read("code"), "0\n");
    (read("before"), read("after"))
}

#[tokio::test]
async fn it_works_through_pipes_and_keeps_every_byte() {
    let endpoint = fake().await;
    let work = move || {
        let mut command = Command::new(UNCLOUD);
        command.args(["vm", "console", "web", "--endpoint", &endpoint]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Ctrl-] is a byte like any other here.
        child.stdin.take().unwrap().write_all(b"\x1d.\x00\xff$").unwrap();
        child.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(work).await.unwrap();
    assert_eq!(output.stdout, b"login: \x1d.\x00\xff$");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("was closed"));
}

#[tokio::test]
async fn the_escape_leaves_it_and_the_terminal_is_as_before() {
    let endpoint = fake().await;
    let work = move || {
        let dir = tempfile::tempdir().unwrap();
        let mut child = on_a_terminal(dir.path(), &endpoint);
        let greeting = read_until(&mut child, "login: ");
        assert!(greeting.contains("Ctrl-]"), "{greeting}");
        // Raw: the terminal itself repeats nothing and Ctrl-C goes to the guest.
        child.stdin.as_mut().unwrap().write_all(b"ab\x03c").unwrap();
        assert_eq!(read_until(&mut child, "c"), "ab\x03c");
        child.stdin.as_mut().unwrap().write_all(b"\x1dq").unwrap();
        read_until(&mut child, "Detached");
        let (before, after) = settings(dir.path());
        assert_eq!(before, after);
        child.wait().unwrap();
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

#[tokio::test]
async fn a_signal_leaves_the_terminal_as_before_too() {
    let endpoint = fake().await;
    let work = move || {
        let dir = tempfile::tempdir().unwrap();
        let mut child = on_a_terminal(dir.path(), &endpoint);
        read_until(&mut child, "login: ");
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
        kill_process(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), Signal::TERM).unwrap();
        read_until(&mut child, "Detached by SIGTERM");
        let (before, after) = settings(dir.path());
        assert_eq!(before, after);
        child.wait().unwrap();
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}
