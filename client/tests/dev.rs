//! `uncloud dev` with stand-ins for the other programs: what happens when they die, and that nothing stays behind.
//! With the real programs it is tested in `integration-tests`.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

/// Says where it is and waits, as a controller does that cannot be reached, until it is asked to end.
const WAITS: &str = "#!/bin/sh\necho $$ > \"$0.$$.pid\"\nexec sleep 600\n";
const POOL_ONLY: &str = "#!/bin/sh\n[ \"$1\" = init-pool ] && exit 0\necho $$ > \"$0.$$.pid\"\nexec sleep 600\n";

struct Stage {
    dir: TempDir,
}

impl Stage {
    /// The real `uncloud` beside these stand-ins.
    fn new(controller: &str, agent: &str) -> Self {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let uncloud = dir.path().join("uncloud");
        fs::hard_link(env!("CARGO_BIN_EXE_uncloud"), &uncloud).unwrap();
        let programs = [("uncloud-controller", controller), ("uncloud-agent", agent), ("uncloud-keeper", WAITS)];
        for (name, script) in programs.into_iter().filter(|(_, script)| !script.is_empty()) {
            let path = dir.path().join(name);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { dir }
    }

    fn dev(&self) -> Command {
        let mut command = Command::new(self.dir.path().join("uncloud"));
        command.args(["dev", "--hosts", "2", "--listen", "127.0.0.1:0", "--dir"]).arg(self.state());
        command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The process ids that the stand-ins have written down, once there are so many.
    fn pids(&self, n: usize) -> Vec<Pid> {
        wait_for("the stand-ins to start", || {
            let files = fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().path());
            let pids: Vec<Pid> =
                files.filter(|p| p.extension().is_some_and(|e| e == "pid")).filter_map(pid_in).collect();
            (pids.len() == n).then_some(pids)
        })
    }
}

fn pid_in(file: impl AsRef<Path>) -> Option<Pid> {
    fs::read_to_string(file).ok()?.trim().parse().ok().and_then(Pid::from_raw)
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

fn is_gone(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_err() || stat.contains(") Z ")
}

fn gone(pids: &[Pid]) {
    wait_for("the stand-ins to be gone", || pids.iter().all(|p| is_gone(*p)).then_some(()));
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_program_that_is_missing_is_named() {
    let stage = Stage::new(WAITS, "");
    let output = stage.dev().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(words(&output).contains("cannot find `uncloud-agent`"), "{}", words(&output));
}

#[test]
fn a_child_that_dies_is_shown_with_its_last_words_and_the_rest_is_taken_down() {
    let dies = "#!/bin/sh\necho starting\necho 'address 127.0.0.1:7400 is in use' >&2\nexit 7\n";
    let stage = Stage::new(dies, POOL_ONLY);
    let output = stage.dev().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let words = words(&output);
    for part in ["controller ended by itself", "7", "| address 127.0.0.1:7400 is in use", "no process is left"] {
        assert!(words.contains(part), "{part}: {words}");
    }
    let left = fs::read_dir(stage.dir.path()).unwrap().filter_map(|e| pid_in(e.unwrap().path()));
    assert!(left.into_iter().all(is_gone));
}

#[test]
fn being_asked_to_end_takes_everything_down() {
    for how in [Signal::TERM, Signal::INT] {
        let stage = Stage::new(WAITS, POOL_ONLY);
        let child = stage.dev().spawn().unwrap();
        let pids = stage.pids(3);
        signal(&child, how);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", words(&output));
        assert!(words(&output).contains("no process is left"));
        assert!(pids.into_iter().all(is_gone));
        // It was named by the user, so it stays.
        assert!(stage.state().join("logs/controller.log").exists());
    }
}

#[test]
fn children_die_when_the_parent_is_killed() {
    let stage = Stage::new(WAITS, POOL_ONLY);
    let mut child = stage.dev().spawn().unwrap();
    let pids = stage.pids(3);
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    gone(&pids);
}
