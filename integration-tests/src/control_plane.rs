//! How controllers, etcd and the proxies between them are wired up for one cluster.

use std::{ffi::OsString, fs, path::Path, time::Duration};

use crate::{
    Api, Options,
    controller::Controller,
    etcd::{Member, TestEtcd},
    logs,
    ports::free_port,
    proxy::Proxy,
    wait_for,
};

/// Somebody leads long before that.
const LED_LIMIT: Duration = Duration::from_secs(30);

/// What the traffic of one controller goes through.
pub struct Front {
    /// From agents and clients.
    pub api: Proxy,
    /// To each member of etcd.
    pub etcd: Vec<Proxy>,
}

/// Addresses of a control plane that is about to be started.
pub(crate) struct ControlPlane {
    /// What each controller listens on.
    listens: Vec<String>,
    /// Where each controller is reached.
    pub(crate) addresses: Vec<String>,
    /// The members of etcd as each controller dials them. Empty: it starts one of its own.
    stores: Vec<String>,
    /// One entry per controller, or none.
    pub(crate) fronts: Vec<Front>,
    exposed: bool,
}

impl ControlPlane {
    /// Picks ports and starts the proxies. Hosts reach this machine at `host`.
    pub(crate) async fn plan(options: &Options, host: &str, etcd: Option<&TestEtcd>) -> anyhow::Result<Self> {
        let behind = if options.proxies { "127.0.0.1" } else { host };
        let ports = (0..options.controllers).map(|_| free_port()).collect::<anyhow::Result<Vec<_>>>()?;
        let listens: Vec<String> = ports.iter().map(|port| format!("{behind}:{port}")).collect();
        let members: Vec<&str> = etcd.map(|e| e.members().iter().map(Member::endpoint).collect()).unwrap_or_default();
        let mut plan = Self {
            addresses: listens.clone(),
            stores: vec![members.join(","); listens.len()],
            fronts: Vec::new(),
            exposed: behind != "127.0.0.1",
            listens,
        };
        if options.proxies {
            for (n, listen) in plan.listens.iter().enumerate() {
                let api = Proxy::start(host, listen).await?;
                let mut proxies = Vec::new();
                for member in &members {
                    proxies.push(Proxy::start("127.0.0.1", member.trim_start_matches("http://")).await?);
                }
                let stores: Vec<String> = proxies.iter().map(|p| format!("http://{}", p.address())).collect();
                plan.addresses[n] = api.address();
                plan.stores[n] = stores.join(",");
                plan.fronts.push(Front { api, etcd: proxies });
            }
        }
        Ok(plan)
    }

    /// Starts the controllers. The first one's directory is `root/controller`, the others have a number.
    pub(crate) fn spawn(&self, root: &Path, options: &Options) -> anyhow::Result<Vec<Controller>> {
        let mut controllers = Vec::new();
        for (n, listen) in self.listens.iter().enumerate() {
            let dir = root.join(if n == 0 { "controller".to_owned() } else { format!("controller-{}", n + 1) });
            fs::create_dir(&dir)?;
            let mut flags: Vec<OsString> = Vec::new();
            if !self.stores[n].is_empty() {
                flags.extend(["--etcd".into(), self.stores[n].clone().into()]);
            }
            if self.addresses.len() > 1 || self.addresses[n] != *listen {
                flags.extend(["--advertise".into(), self.addresses[n].clone().into()]);
                flags.extend(["--controllers".into(), self.addresses.join(",").into()]);
            }
            if self.exposed {
                flags.push("--insecure-no-tls".into());
            }
            flags.extend(options.leases.iter().chain(&options.controller).map(Into::into));
            controllers.push(Controller::spawn(&dir, listen, flags)?);
        }
        Ok(controllers)
    }
}

/// Waits until one of the controllers leads and answers.
pub(crate) async fn wait_led(controllers: &mut [Controller], api: &Api) -> anyhow::Result<()> {
    wait_for("a controller leads", LED_LIMIT, async || {
        for controller in controllers.iter_mut() {
            if !controller.process().is_running() {
                let log = logs::tail(controller.process().log(), 15);
                return Ok(Err(anyhow::anyhow!("{} ended:\n{log}", controller.process().spec().name)));
            }
        }
        match api.status().await {
            Ok(answer) if answer.leader.is_some() => Ok(Ok(())),
            Ok(answer) => Err(format!("{:?}", answer.warnings)),
            Err(status) => Err(status.to_string()),
        }
    })
    .await?
}
