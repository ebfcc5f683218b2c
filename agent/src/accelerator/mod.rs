//! Finds out whether this host's KVM executes guests *at speed*.
//!
//! `/dev/kvm` that exists, and even a guest that gives the right answer, prove nothing: inside some virtual machines KVM
//! emulates every instruction, hundreds of times slower than QEMU's own translator. So a guest is run that hardware
//! finishes in a millisecond, in a child process that can be killed when it does not.
//!
//! QEMU's own fallback (`-accel kvm -accel tcg`) would take such a KVM, and is never used.

mod cpu;
mod kvm;

use std::{
    io,
    path::Path,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{ChildStdout, Command},
    time::timeout,
};

pub use self::cpu::cpu;
pub use crate::qemu::command_line::AcceleratorChoice;

/// The hidden subcommand of the agent that runs [`child_main`].
pub const CHILD_COMMAND: &str = "probe-kvm-child";

/// How long the guest may take. Hardware needs about 1 ms, so even a busy host has time to spare; an emulator needs 1 s.
const RUN_LIMIT: Duration = Duration::from_millis(300);
/// How long the child may take to begin.
const SETUP_LIMIT: Duration = Duration::from_secs(3);

/// What the child says when the guest is about to run, and when it has run. Otherwise it says why not.
const READY: &str = "ready";
const DONE: &str = "done ";

/// What this host should use, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What to use.
    pub choice: AcceleratorChoice,
    /// What was measured, for people.
    pub why: String,
}

/// Measures. Takes less than four seconds, and a few milliseconds where KVM works or is not there.
pub async fn probe() -> Finding {
    match std::env::current_exe() {
        Ok(program) => probe_with(&program).await,
        Err(e) => Finding { choice: AcceleratorChoice::Tcg, why: format!("KVM cannot be probed: {e}") },
    }
}

/// Measures, with `program probe-kvm-child` as the child.
pub async fn probe_with(program: &Path) -> Finding {
    match measure(program).await {
        Ok(took) => Finding {
            choice: AcceleratorChoice::Kvm,
            why: format!("KVM runs {} loops of a 64-bit guest in {:.1} ms", kvm::LOOPS, took.as_secs_f64() * 1000.0),
        },
        Err(why) => Finding { choice: AcceleratorChoice::Tcg, why },
    }
}

async fn measure(program: &Path) -> Result<Duration, String> {
    let failed = |e: io::Error| format!("KVM cannot be probed: {e}");
    let mut child = Command::new(program)
        .arg(CHILD_COMMAND)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("KVM cannot be probed: no pipe")?).lines();
    let result = converse(&mut lines).await;
    // Ends a guest that still runs. Killed or ended, it is reaped; a kernel that cannot do that is left behind.
    let _ = timeout(SETUP_LIMIT, child.kill()).await;
    result
}

async fn converse(lines: &mut Lines<BufReader<ChildStdout>>) -> Result<Duration, String> {
    let silent = || "KVM cannot be probed: the child said nothing".to_owned();
    match timeout(SETUP_LIMIT, lines.next_line()).await {
        Ok(Ok(Some(line))) if line == READY => {}
        Ok(Ok(Some(why))) => return Err(format!("KVM does not work: {why}")),
        Ok(_) => return Err(silent()),
        Err(_) => return Err(format!("KVM cannot make a guest within {SETUP_LIMIT:?}")),
    }
    let began = Instant::now();
    match timeout(RUN_LIMIT, lines.next_line()).await {
        Ok(Ok(Some(line))) => match line.strip_prefix(DONE).and_then(|us| us.parse().ok()).map(Duration::from_micros) {
            Some(took) if took < RUN_LIMIT => Ok(took),
            Some(took) => Err(too_slow(took)),
            None => Err(format!("KVM does not work: {line}")),
        },
        Ok(_) => Err(silent()),
        Err(_) => Err(too_slow(began.elapsed())),
    }
}

fn too_slow(took: Duration) -> String {
    format!(
        "KVM is there but emulates: {} loops of a 64-bit guest were not done after {} ms (hardware needs about 1 ms)",
        kvm::LOOPS,
        took.as_millis()
    )
}

/// The child's `main`.
#[must_use]
pub fn child_main() -> ExitCode {
    let run = || -> Result<Duration, String> {
        kvm::bind_to_parent().map_err(|e| e.to_string())?;
        let guest = kvm::Guest::new()?;
        println!("{READY}");
        let began = Instant::now();
        guest.run()?;
        Ok(began.elapsed())
    };
    match run() {
        Ok(took) => println!("{DONE}{}", took.as_micros()),
        Err(why) => println!("{why}"),
    }
    ExitCode::SUCCESS
}
