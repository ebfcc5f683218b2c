//! A controller process under test.

use std::{ffi::OsString, path::Path, time::Duration};

use uncloud_proto::v1::GetStatusRequest;

use crate::{
    Api, logs, paths,
    process::{Process, Signal, Spec},
    wait_for,
};

/// A controller leads long before that.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A controller process.
pub struct Controller {
    process: Process,
    api: Api,
}

impl Controller {
    /// Starts one that listens on `listen` (`host:port`) and keeps its data in `dir`; waits until it leads.
    ///
    /// # Errors
    ///
    /// It does not lead within the limit.
    pub async fn start(dir: &Path, listen: &str, args: Vec<OsString>) -> anyhow::Result<Self> {
        let mut controller = Self::spawn(dir, listen, args)?;
        controller.wait_serving().await?;
        Ok(controller)
    }

    /// The same without waiting.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn(dir: &Path, listen: &str, args: Vec<OsString>) -> anyhow::Result<Self> {
        Self::spawn_logging(dir, listen, args, "info,uncloud_controller=debug")
    }

    /// The same, and it logs what `log` says (`UNCLOUD_LOG`).
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn_logging(dir: &Path, listen: &str, args: Vec<OsString>, log: &str) -> anyhow::Result<Self> {
        let mut all: Vec<OsString> =
            vec!["--data-dir".into(), dir.join("data").into(), "--listen".into(), listen.into()];
        all.extend(args);
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let process = Process::start(Spec {
            name,
            program: paths::binary("uncloud-controller")?,
            args: all,
            env: vec![("UNCLOUD_LOG".into(), log.into())],
            log: dir.join("controller.log"),
            netns: None,
        })?;
        Ok(Self { process, api: Api::new(listen)? })
    }

    /// Clients of this controller.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// SIGSTOP; returns when it stands still.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.process.freeze().await
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends a signal, such as SIGSTOP.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Starts it again with the same arguments; waits until it leads.
    ///
    /// # Errors
    ///
    /// It does not lead within the limit.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.start_again()?;
        self.wait_serving().await
    }

    /// Starts it again with the same arguments. It may stand by.
    ///
    /// # Errors
    ///
    /// It still runs.
    pub fn spawn_again(&mut self) -> anyhow::Result<()> {
        self.process.start_again()
    }

    /// Waits until it leads and answers.
    ///
    /// # Errors
    ///
    /// It does not within the limit, or has ended.
    pub async fn wait_serving(&mut self) -> anyhow::Result<()> {
        let api = self.api.clone();
        let process = &mut self.process;
        wait_for("the controller leads", START_LIMIT, async || {
            if !process.is_running() {
                return Ok(Err(anyhow::anyhow!("the controller ended:\n{}", logs::tail(process.log(), 15))));
            }
            match api.cluster().get_status(GetStatusRequest {}).await {
                Ok(answer) if answer.get_ref().leader.is_some() => Ok(Ok(())),
                Ok(answer) => Err(format!("{:?}", answer.into_inner().warnings)),
                Err(status) => Err(status.to_string()),
            }
        })
        .await?
    }
}
