//! Runs the `uncloud` command.

use std::{
    ffi::OsStr,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use crate::paths;

/// The longest that a command may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What a command printed, and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; -1 if a signal ended it.
    pub code: i32,
    /// What it printed as its result.
    pub stdout: String,
    /// What else it had to say.
    pub stderr: String,
}

impl Finished {
    /// Itself, if it succeeded.
    ///
    /// # Errors
    ///
    /// It did not; the error has what it said.
    pub fn success(self) -> anyhow::Result<Self> {
        ensure!(self.code == 0, "exit status {}\nstdout: {}\nstderr: {}", self.code, self.stdout, self.stderr);
        Ok(self)
    }

    /// Standard output as JSON.
    ///
    /// # Errors
    ///
    /// It is not JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {}", self.stdout))
    }
}

/// Runs `uncloud --endpoint … args`.
///
/// # Errors
///
/// It cannot be started or does not end.
pub async fn run(endpoint: &str, args: &[impl AsRef<OsStr>]) -> anyhow::Result<Finished> {
    let mut command = tokio::process::Command::new(paths::binary("uncloud")?);
    command.env("UNCLOUD_ENDPOINTS", endpoint).args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output: Output = tokio::time::timeout(LIMIT, command.output()).await.context("uncloud did not end")??;
    Ok(Finished {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
