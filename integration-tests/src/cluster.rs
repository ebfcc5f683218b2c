//! A whole cluster for one test.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use tempfile::TempDir;
use uncloud_proto::v1::{HostState, Vm};

use crate::{
    Api, Checker,
    agent::{Agent, HostOptions},
    cli::{self, Finished},
    control_plane::{ControlPlane, Front, wait_led},
    controller::Controller,
    etcd::{Fsync, TestEtcd},
    logs,
    netns::{self, Guests, Network},
    paths,
    proc_table::{self, Kind},
    slots::{Share, Slot},
    specs, wait_for,
};

/// Hosts are there long before that.
const HOSTS_LIMIT: Duration = Duration::from_secs(30);

/// What cluster a test wants.
#[derive(Clone, Debug)]
pub struct Options {
    /// One entry per host. They are called `host-1`, `host-2`, ...
    pub hosts: Vec<HostOptions>,
    /// The controller's flags for the leases. Empty: its defaults.
    pub leases: Vec<String>,
    /// Further flags of the controller.
    pub controller: Vec<String>,
    /// How much of the machine it wants.
    pub share: Share,
    /// Each host in a network namespace of its own.
    pub namespaces: bool,
    /// Whether the guests have a network; only with `namespaces`.
    pub guests: Guests,
    /// With the image of the Linux guest.
    pub linux: bool,
    /// The controller supervises an etcd of its own.
    pub embedded_etcd: bool,
    /// Whether the external etcd waits for the disk.
    pub fsync: Fsync,
    /// How many controllers.
    pub controllers: usize,
    /// How many members the external etcd has.
    pub etcd_members: usize,
    /// Further flags of the members.
    pub etcd: Vec<String>,
    /// A [`Proxy`](crate::proxy::Proxy) in front of each controller, and between each controller and each member of etcd.
    pub proxies: bool,
}

impl Options {
    /// So many hosts, a lease of 2 s.
    #[must_use]
    pub fn hosts(n: usize) -> Self {
        Self {
            hosts: vec![HostOptions::default(); n],
            leases: ["--fast-lease", "2s", "--kill-allowance", "500ms"].map(str::to_owned).to_vec(),
            controller: Vec::new(),
            share: Share::One,
            namespaces: false,
            guests: Guests::Alone,
            linux: false,
            embedded_etcd: false,
            fsync: Fsync::Off,
            controllers: 1,
            etcd_members: 1,
            etcd: Vec::new(),
            proxies: false,
        }
    }

    /// So many controllers.
    #[must_use]
    pub fn controllers(mut self, n: usize) -> Self {
        self.controllers = n;
        self
    }

    /// An etcd of so many members.
    #[must_use]
    pub fn etcd_members(mut self, n: usize) -> Self {
        self.etcd_members = n;
        self
    }

    /// Everything that goes to a controller, and from there to etcd, goes through proxies.
    #[must_use]
    pub fn proxies(mut self) -> Self {
        self.proxies = true;
        self
    }

    /// The leases that the controller has when it is told nothing (6 s and 60 s); and most of the machine, because time is measured.
    #[must_use]
    pub fn default_leases(mut self) -> Self {
        self.leases.clear();
        self.share = Share::Most;
        self
    }

    /// With the image of the Linux guest.
    #[must_use]
    pub fn linux(mut self) -> Self {
        self.linux = true;
        self
    }

    /// Each host in a network namespace of its own.
    #[must_use]
    pub fn namespaces(mut self) -> Self {
        self.namespaces = true;
        self
    }

    /// Each host in a network namespace of its own, with a bridge for its VMs; all of these are joined.
    #[must_use]
    pub fn bridges(mut self) -> Self {
        self.guests = Guests::Joined;
        let bridge = ["--bridge", netns::GUEST_BRIDGE].map(str::to_owned);
        self.namespaces().each_host(|_, host| host.args.extend(bridge.clone()))
    }

    /// The controller supervises an etcd of its own.
    #[must_use]
    pub fn embedded_etcd(mut self) -> Self {
        self.embedded_etcd = true;
        self
    }

    /// Changes the options of the hosts, which are counted from 0.
    #[must_use]
    pub fn each_host(mut self, mut change: impl FnMut(usize, &mut HostOptions)) -> Self {
        for (i, host) in self.hosts.iter_mut().enumerate() {
            change(i, host);
        }
        self
    }

    /// Starts it; waits until every host is up.
    ///
    /// # Errors
    ///
    /// Something does not come up.
    pub async fn start(self) -> anyhow::Result<Cluster> {
        Cluster::start(self).await
    }
}

/// A running cluster. The parts are public: a test breaks them as it likes.
pub struct Cluster {
    // Dropped in this order: who starts things first, then what they have started, then what they stand on.
    /// The controller; the first of several.
    pub controller: Controller,
    /// The other controllers.
    pub others: Vec<Controller>,
    /// The hosts.
    pub hosts: Vec<Agent>,
    /// The etcd, unless it is the controller's own.
    pub etcd: Option<TestEtcd>,
    /// The checker.
    pub checker: Checker,
    /// Clients.
    pub api: Api,
    /// What the controllers' traffic goes through. One entry per controller, or none.
    pub fronts: Vec<Front>,
    /// The network, if the hosts have namespaces.
    network: Option<Network>,
    root: Root,
    options: Options,
    /// Where each controller is reached.
    addresses: Vec<String>,
    allowed_errors: Vec<String>,
    _slot: Slot,
}

/// The directory of a cluster. Kept, and its place printed, unless the test held.
struct Root {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take() {
            eprintln!("the cluster of the failed test is kept in {}", dir.keep().display());
        }
    }
}

/// Gives a host its namespace, if hosts have them, and the address where VMs arrive there.
fn place(
    network: Option<&mut Network>,
    at: usize,
    options: &HostOptions,
) -> anyhow::Result<(Option<String>, HostOptions)> {
    let Some(network) = network else { return Ok((None, options.clone())) };
    let netns = network.add_host()?;
    let migration_address = network.address_of(u32::try_from(at)? + 1);
    Ok((Some(netns), HostOptions { migration_address, ..options.clone() }))
}

impl Cluster {
    async fn start(options: Options) -> anyhow::Result<Self> {
        let slot = Slot::take(options.share).await?;
        let dir = tempfile::Builder::new().prefix("uncloud-test-").tempdir()?;
        // QEMU runs as somebody else, who must be able to get to its disk.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let path = dir.path().to_path_buf();
        let root = Root { dir: Some(dir), path: path.clone() };
        for name in ["pool", "images", "etcd"] {
            fs::create_dir(path.join(name))?;
        }
        let agent = paths::binary("uncloud-agent")?;
        let marker =
            Command::new(agent).arg("init-pool").arg(path.join("pool")).args(["--name", specs::SHARED]).output()?;
        ensure!(marker.status.success(), "init-pool: {}", String::from_utf8_lossy(&marker.stderr));

        let mut network = if options.namespaces { Some(Network::new(options.guests)?) } else { None };
        let etcd = if options.embedded_etcd {
            None
        } else {
            let members = options.etcd_members;
            Some(TestEtcd::start_members(&path.join("etcd"), options.fsync, members, &options.etcd).await?)
        };
        let host = network.as_ref().map_or("127.0.0.1".to_owned(), Network::address);
        let plan = ControlPlane::plan(&options, &host, etcd.as_ref()).await?;
        let mut controllers = plan.spawn(&path, &options)?;
        let addresses = plan.addresses;
        let api = Api::new(&addresses.join(","))?;
        wait_led(&mut controllers, &api).await?;
        let (controller, others) = (controllers.remove(0), controllers);
        let checker = Checker::start(&path);

        let mut hosts = Vec::new();
        for (i, host) in options.hosts.iter().enumerate() {
            let (netns, host) = place(network.as_mut(), i, host)?;
            hosts.push(Agent::start(&path, &format!("host-{}", i + 1), &addresses.join(","), netns, &host)?);
        }
        let mut cluster = Self {
            controller,
            others,
            hosts,
            etcd,
            checker,
            api,
            fronts: plan.fronts,
            network,
            root,
            options,
            addresses,
            allowed_errors: Vec::new(),
            _slot: slot,
        };
        cluster.wait_hosts().await?;
        if !cluster.hosts.is_empty() {
            cluster.api.images().create_image(specs::micro_image()?).await?;
            if cluster.options.linux {
                cluster.api.images().create_image(specs::linux_image()?).await?;
            }
        }
        Ok(cluster)
    }

    /// All controllers.
    pub fn all_controllers(&mut self) -> impl Iterator<Item = &mut Controller> {
        std::iter::once(&mut self.controller).chain(&mut self.others)
    }

    /// One controller, counted from 0.
    pub fn controller_at(&mut self, n: usize) -> &mut Controller {
        if n == 0 { &mut self.controller } else { &mut self.others[n - 1] }
    }

    /// Where each controller is reached.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Which controller holds the leader key, counted from 0, as etcd says.
    ///
    /// # Errors
    ///
    /// None does, or etcd does not answer.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let etcd = self.etcd.as_ref().context("the etcd is the controller's own")?;
        let record = etcd.get("/uncloud/v1/leader").await?.context("nobody holds the leader key")?;
        let record: serde_json::Value = serde_json::from_str(&record)?;
        let address = record["address"].as_str().unwrap_or_default();
        self.addresses.iter().position(|a| a == address).with_context(|| format!("`{address}` is no controller"))
    }

    /// Adds a host; waits until it is up.
    ///
    /// # Errors
    ///
    /// It does not come up.
    pub async fn add_host(&mut self, options: &HostOptions) -> anyhow::Result<()> {
        let name = format!("host-{}", self.hosts.len() + 1);
        let (netns, options) = place(self.network.as_mut(), self.hosts.len(), options)?;
        self.hosts.push(Agent::start(&self.root.path, &name, &self.addresses.join(","), netns, &options)?);
        self.wait_hosts().await
    }

    /// Waits until every host is up and its pools are usable.
    ///
    /// # Errors
    ///
    /// One is not within the limit.
    pub async fn wait_hosts(&mut self) -> anyhow::Result<()> {
        let (hosts, api) = (&mut self.hosts, &self.api);
        wait_for("all hosts are up", HOSTS_LIMIT, async || {
            for host in hosts.iter_mut() {
                if !host.process().is_running() {
                    let log = logs::tail(host.process().log(), 15);
                    return Ok(Err(anyhow::anyhow!("the agent of {} ended:\n{log}", host.name())));
                }
            }
            let seen = api.list_hosts().await.map_err(|s| s.to_string())?;
            for host in hosts.iter() {
                let up = seen.iter().find(|h| h.name == host.name() && h.state() == HostState::Up);
                let up = up.ok_or_else(|| format!("{} of {seen:?}", host.name()))?;
                if let Some(pool) = up.pools.iter().find(|p| !p.problem.is_empty()) {
                    return Err(format!("pool {} of {}: {}", pool.name, host.name(), pool.problem));
                }
            }
            Ok(Ok(()))
        })
        .await?
    }

    /// The directory of everything.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root.path
    }

    /// The namespace from which guests are reached.
    ///
    /// # Errors
    ///
    /// The cluster was made without a network for guests.
    pub fn users(&self) -> anyhow::Result<String> {
        let network = self.network.as_ref().filter(|_| self.options.guests == Guests::Joined);
        Ok(network.context("this cluster was made without `bridges`")?.users())
    }

    /// The address at which hosts and users reach this machine, if they have namespaces; the loopback otherwise.
    #[must_use]
    pub fn address(&self) -> String {
        self.network.as_ref().map_or("127.0.0.1".to_owned(), Network::address)
    }

    /// The directory of the shared pool.
    #[must_use]
    pub fn pool(&self) -> PathBuf {
        self.root.path.join("pool")
    }

    /// A directory that images may come from.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.path.join("images")
    }

    /// The host with this name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn host(&mut self, name: &str) -> anyhow::Result<&mut Agent> {
        let names: Vec<String> = self.hosts.iter().map(|h| h.name().to_owned()).collect();
        let found = self.hosts.iter_mut().find(|h| h.name() == name);
        found.with_context(|| format!("no host `{name}`; there are {names:?}"))
    }

    /// The address of a host in the network of the namespaces; `None` for that of the controllers.
    ///
    /// # Errors
    ///
    /// There is no such host, or the cluster was made without namespaces.
    pub fn address_of(&self, host: Option<&str>) -> anyhow::Result<String> {
        let network = self.network.as_ref().context("this cluster was made without namespaces")?;
        let Some(name) = host else { return Ok(network.address()) };
        let at = self.hosts.iter().position(|h| h.name() == name).with_context(|| format!("no host `{name}`"))?;
        Ok(network.address_of(u32::try_from(at)? + 1))
    }

    /// The host that a VM was given.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn host_of(&mut self, vm: &Vm) -> anyhow::Result<&mut Agent> {
        let name = crate::api::host_of(vm).to_owned();
        self.host(&name).with_context(|| crate::api::summary(vm))
    }

    /// Creates a VM and waits until it is Running and its guest has counted.
    ///
    /// # Errors
    ///
    /// It does not run within a minute.
    pub async fn run(&self, request: uncloud_proto::v1::CreateVmRequest) -> anyhow::Result<Vm> {
        let vm = self.api.create(request).await?;
        let vm = self.api.wait_running(&vm.id, Duration::from_secs(60)).await?;
        self.checker.wait_beats(&vm.id, 1, Duration::from_secs(60)).await?;
        Ok(vm)
    }

    /// Whether a QEMU of this VM is in the process table at this moment. (The checker's newest look is a little older.)
    #[must_use]
    pub fn executes(&self, vm: &str) -> bool {
        proc_table::under(self.path()).iter().any(|p| p.vm == vm && p.kind == Kind::Qemu)
    }

    /// Runs the `uncloud` command.
    ///
    /// # Errors
    ///
    /// It cannot be started or does not end.
    pub async fn cli(&self, args: &[impl AsRef<OsStr>]) -> anyhow::Result<Finished> {
        cli::run(self.api.endpoint(), args).await
    }

    /// Keeps its directory whatever comes, and says where it is.
    pub fn keep_directory(&mut self) {
        drop(Root { dir: self.root.dir.take(), path: self.root.path.clone() });
    }

    /// A line at level ERROR with this in it is part of the test.
    pub fn allow_error(&mut self, part: &str) {
        self.allowed_errors.push(part.to_owned());
    }

    /// Takes everything down and judges: no VM twice, no counter that jumps, no ERROR in a log.
    ///
    /// # Errors
    ///
    /// What was wrong. The directory is then kept.
    pub async fn finish(mut self) -> anyhow::Result<()> {
        let mut logs: Vec<PathBuf> = self.all_controllers().map(|c| c.process().log().to_path_buf()).collect();
        logs.extend(self.hosts.iter_mut().map(|h| h.process().log().to_path_buf()));
        let mut problems = Vec::new();
        for log in logs {
            for line in logs::unexpected_errors(&log, &self.allowed_errors) {
                problems.push(format!("{}: {line}", log.display()));
            }
        }
        for host in &mut self.hosts {
            host.cut_power();
        }
        if let Err(problem) = self.checker.finish() {
            problems.push(format!("{problem:#}"));
        }
        if !problems.is_empty() {
            bail!("{}", problems.join("\n"));
        }
        // A controller that is told to stop does so, and leaves with success.
        for controller in self.all_controllers() {
            if controller.process().is_running() {
                controller.signal(crate::Signal::CONT)?;
                let status = controller.process().terminate(Duration::from_secs(15)).await?;
                ensure!(status.success(), "the controller ended with {status}");
            }
        }
        self.root.dir.take().map(TempDir::close).transpose()?;
        Ok(())
    }
}
