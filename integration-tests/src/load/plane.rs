//! An etcd and controllers, and nothing else. Controllers are started one after the other, when the benchmark wants them.

use std::{fs, path::Path};

use tempfile::TempDir;

use super::{Fleet, Site, fill};
use crate::{
    Api,
    controller::Controller,
    etcd::{Fsync, TestEtcd},
    ports::free_port,
    slots::{Share, Slot},
};

/// Controllers that there are addresses for.
const CONTROLLERS: usize = 2;

/// The control plane. All of it, and its directory, goes when it is dropped.
pub struct Plane {
    // Dropped in this order.
    /// The controllers that were started, in the order of their addresses.
    pub controllers: Vec<Controller>,
    /// The etcd, which waits for the disk as in production.
    pub etcd: TestEtcd,
    /// Clients of all controllers.
    pub api: Api,
    addresses: Vec<String>,
    dir: TempDir,
    _slot: Slot,
}

impl Plane {
    /// An etcd, and no controller yet. Waits for its turn: nothing else of this project's tests runs at the same time.
    ///
    /// # Errors
    ///
    /// etcd does not start.
    pub async fn start() -> anyhow::Result<Self> {
        super::raise_descriptors()?;
        let slot = Slot::take(Share::Whole).await?;
        let dir = tempfile::Builder::new().prefix("uncloud-load-").tempdir()?;
        let data = dir.path().join("etcd");
        fs::create_dir(&data)?;
        let etcd = TestEtcd::start(&data, Fsync::On).await?;
        let port = |_| anyhow::Ok(format!("127.0.0.1:{}", free_port()?));
        let addresses: Vec<String> = (0..CONTROLLERS).map(port).collect::<anyhow::Result<_>>()?;
        let api = Api::new(&addresses.join(","))?;
        Ok(Self { controllers: Vec::new(), etcd, api, addresses, dir, _slot: slot })
    }

    /// Writes a whole site into etcd. Returns how many bytes that are.
    ///
    /// # Errors
    ///
    /// etcd does not take it.
    pub async fn fill(&self, site: &Site) -> anyhow::Result<u64> {
        fill::site(&self.etcd.client().await?, site).await
    }

    /// Starts the next controller. Does not wait for anything.
    ///
    /// # Errors
    ///
    /// It cannot be started, or there is no address for it.
    pub fn spawn(&mut self) -> anyhow::Result<&mut Controller> {
        let n = self.controllers.len();
        anyhow::ensure!(n < CONTROLLERS, "there are {CONTROLLERS} controllers already");
        let dir = self.dir.path().join(format!("controller-{}", n + 1));
        fs::create_dir(&dir)?;
        let flags = ["--etcd", self.etcd.endpoint(), "--controllers", &self.addresses.join(",")];
        let flags = flags.iter().map(Into::into).collect();
        // As in production: what each session does is not logged.
        self.controllers.push(Controller::spawn_logging(&dir, &self.addresses[n], flags, "info")?);
        Ok(&mut self.controllers[n])
    }

    /// A fleet that dials these controllers. Nobody is in it yet.
    ///
    /// # Errors
    ///
    /// There can be no more threads.
    pub fn fleet(&self) -> anyhow::Result<Fleet> {
        Fleet::new(self.addresses.clone())
    }

    /// Where the controllers are reached.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}
