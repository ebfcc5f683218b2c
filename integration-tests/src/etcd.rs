//! A private etcd for one test, on picked ports. It can be killed and started again with its data.
//!
//! etcd does not come up when told to take any free port (it dials its own port 0), so free ports are picked
//! first, and the start is tried again in case somebody else took one.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use etcd_client::{Client, ConnectOptions};

use crate::{
    logs,
    process::{Process, Signal, Spec, free_port},
    wait_for,
};

/// Far longer than a start takes: to hit it means that something is wrong.
const START_LIMIT: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 5;

/// Whether etcd waits for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// As in production.
    On,
    /// Faster; survives the death of the process, not of the machine.
    Off,
}

/// A private etcd.
pub struct TestEtcd {
    process: Process,
    endpoint: String,
}

impl TestEtcd {
    /// Starts one that keeps its data and its log in `dir`.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub async fn start(dir: &Path, fsync: Fsync) -> anyhow::Result<Self> {
        let mut last = anyhow::anyhow!("no attempt");
        for attempt in 0..ATTEMPTS {
            match Self::try_start(dir, fsync, attempt).await {
                Ok(etcd) => return Ok(etcd),
                Err(error) => last = error,
            }
        }
        Err(last.context("start etcd"))
    }

    /// Its address: `http://127.0.0.1:port`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A client of its own, with a limit on every request.
    ///
    /// # Errors
    ///
    /// It cannot connect.
    pub async fn client(&self) -> anyhow::Result<Client> {
        connect(&self.endpoint).await
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

    /// Starts it again on the same ports with the same data.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.start_again()?;
        self.wait_serving().await
    }

    async fn try_start(dir: &Path, fsync: Fsync, attempt: u32) -> anyhow::Result<Self> {
        let endpoint = format!("http://127.0.0.1:{}", free_port()?);
        let peer = format!("http://127.0.0.1:{}", free_port()?);
        let data = dir.join(format!("data-{attempt}"));
        let cluster = format!("default={peer}");
        let mut args: Vec<_> = ["--data-dir".into(), data.into_os_string()].into();
        args.extend(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint].map(Into::into));
        args.extend(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer].map(Into::into));
        args.extend(["--initial-cluster", &cluster, "--log-level", "warn"].map(Into::into));
        if fsync == Fsync::Off {
            args.push("--unsafe-no-fsync".into());
        }
        let process = Process::start(Spec {
            name: "etcd".into(),
            program: "etcd".into(),
            args,
            env: Vec::new(),
            log: dir.join("etcd.log"),
            netns: None,
        })
        .context("is etcd installed? `make setup` installs it")?;
        let mut etcd = Self { process, endpoint };
        etcd.wait_serving().await?;
        Ok(etcd)
    }

    async fn wait_serving(&mut self) -> anyhow::Result<()> {
        let endpoint = self.endpoint.clone();
        let process = &mut self.process;
        wait_for("etcd serves", START_LIMIT, async || {
            if !process.is_running() {
                return Ok(Err(anyhow::anyhow!("etcd ended: {}", logs::tail(process.log(), 5))));
            }
            let status = async { connect(&endpoint).await?.status().await.map_err(anyhow::Error::from) };
            match tokio::time::timeout(Duration::from_secs(1), status).await {
                Ok(Ok(_)) => Ok(Ok(())),
                Ok(Err(error)) => Err(format!("{error:#}")),
                Err(_) => Err("no answer within a second".into()),
            }
        })
        .await?
    }
}

async fn connect(endpoint: &str) -> anyhow::Result<Client> {
    let options =
        ConnectOptions::new().with_connect_timeout(Duration::from_secs(2)).with_timeout(Duration::from_secs(5));
    Client::connect([endpoint], Some(options)).await.context("connect to etcd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_etcds_share_nothing_and_a_killed_one_keeps_its_data() -> anyhow::Result<()> {
        let (a, b) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let mut a = TestEtcd::start(a.path(), Fsync::Off).await.map(|e| (e, a))?;
        let b = TestEtcd::start(b.path(), Fsync::Off).await.map(|e| (e, b))?;
        a.0.client().await?.put("/k", "from a", None).await?;
        assert_eq!(b.0.client().await?.get("/k", None).await?.count(), 0);

        a.0.kill();
        a.0.start_again().await?;
        assert_eq!(a.0.client().await?.get("/k", None).await?.count(), 1);
        Ok(())
    }
}
