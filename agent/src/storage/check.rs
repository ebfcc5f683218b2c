//! Has qemu-img check a qcow2 file that came from somewhere.
//!
//! The file is hostile until it is checked: qemu-img runs as the user that QEMU runs as, with a limit on memory and time, and only
//! the beginning of what it says is read.

use std::{path::Path, process::Stdio, time::Duration};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::{io::AsyncReadExt, process::Command, time};

use super::pools::User;

/// It reads the metadata: some 200 KiB for each GiB.
const LIMIT: Duration = Duration::from_secs(600);
const MEMORY: u64 = 2 << 30;
const WORDS: u64 = 600;

/// Checks a qcow2 file. Clusters that nobody uses are no fault.
///
/// # Errors
///
/// What is wrong with it, in words.
pub(super) async fn check_qcow2(path: &Path, user: Option<User>, tool: &Path) -> Result<(), String> {
    let mut command = Command::new(tool);
    command.args(["check", "-q", "-f", "qcow2", "--"]).arg(path);
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid);
    }
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().map_err(|e| format!("{} cannot be run: {e}", tool.display()))?;
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        let limit = Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
        // If it is over already there is nothing to limit.
        let _ = prlimit(Some(pid), Resource::As, limit);
    }
    let work = async {
        let mut words = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // The rest is not read; who writes it fails.
            let _ = stderr.take(WORDS).read_to_end(&mut words).await;
        }
        (child.wait().await, words)
    };
    let (status, words) = time::timeout(LIMIT, work)
        .await
        .map_err(|_| format!("qemu-img check took longer than {} s", LIMIT.as_secs()))?;
    let status = status.map_err(|e| format!("{} cannot be run: {e}", tool.display()))?;
    match status.code() {
        Some(0 | 3) => Ok(()),
        _ => {
            let words: String =
                String::from_utf8_lossy(&words).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            let words = words.replace(&path.display().to_string(), "it");
            Err(format!("it is a corrupt qcow2 image ({}): {}", status, words.trim()))
        }
    }
}
