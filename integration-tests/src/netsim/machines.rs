//! What runs on the simulated machines: the product's own code, with the simulation at its edges.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use etcd_client::{Channel, Client, ConnectOptions};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use uncloud_agent::{
    lease::{LeaseFile, LeaseView},
    records::{AgentFile, StateDir},
    session::{
        connect,
        gate::Gate,
        outbox::SharedOutbox,
        pump::{Identity, Session},
        serving::Serving,
        streams::Streams,
    },
    storage::{images::Images, inspect::Inspector, source::Roots},
    vm::{manager::Manager, runner::Host},
};
use uncloud_controller::{
    app::{self, Edge},
    config::Config,
    store::Store,
};
use uncloud_proto::{clock::Clock, ids::HostId, v1};
use uuid::Uuid;

use super::{
    etcd::Etcd,
    guests::{Guests, SimHypervisor},
    net,
};

/// Where etcd serves.
const ETCD_PORT: u16 = 2379;
/// Where controllers serve.
const PORT: u16 = 7400;
/// The same pool on all machines.
const POOL: &str = "5f0c1c8e-0000-4000-8000-000000000001";

/// Runs the model of etcd on this machine.
pub(super) async fn etcd(etcd: Etcd) -> turmoil::Result {
    etcd.serve(net::incoming(ETCD_PORT).await?).await?;
    Ok(())
}

/// The address of a controller.
pub(super) fn address(name: &str) -> String {
    format!("{name}:{PORT}")
}

/// Runs a controller on this machine.
pub(super) async fn controller(config: Config, clock: Clock) -> turmoil::Result {
    // As the controller's own connections to etcd, but simulated.
    let endpoint = Endpoint::from_shared(format!("http://etcd:{ETCD_PORT}"))?
        .connect_timeout(Duration::from_secs(2))
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2))
        .keep_alive_while_idle(true);
    let channel = Channel::Tonic(net::dial().lazily(endpoint));
    let client = Client::from_channel(channel, Some(ConnectOptions::new().with_require_leader(true))).await?;
    let store = Store::from_clients(vec![client])?;
    let edge = Edge {
        serving: Handle::current(),
        incoming: net::incoming(PORT).await?,
        store: std::future::ready(store),
        dial: net::dial(),
        metrics: Default::default(),
    };
    app::control(&config, &clock, edge, CancellationToken::new()).await;
    Ok(())
}

/// One machine with an agent.
#[derive(Clone)]
pub(super) struct Machine {
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) dir: PathBuf,
    /// Changes when the machine loses its power.
    pub(super) boot: Uuid,
    pub(super) controllers: Vec<String>,
    pub(super) clock: Clock,
    pub(super) guests: Guests,
}

/// Runs an agent on this machine. Its VMs outlive it.
pub(super) async fn agent(machine: Machine) -> turmoil::Result {
    let Machine { index, name, dir, boot, controllers, clock, guests } = machine;
    let state = StateDir::open(&dir)?;
    let dirs = state.vms();
    let lease = Arc::new(LeaseFile::open(&state.lease_path(), boot)?);
    let fresh = HostId::from_uuid(Uuid::from_u128(0x4000_8000_0000_0000_0000 + index as u128));
    let agent = Arc::new(AgentFile::open(state, fresh)?);
    let host_id = agent.get().host_id;
    let view = Arc::new(LeaseView::open(lease.path())?);
    let hypervisor = SimHypervisor { guests, machine: index, lease: view, clock: clock.clone() };
    let host = Host {
        hypervisor: Arc::new(hypervisor),
        lease: Arc::clone(&lease),
        clock: clock.clone(),
        dirs: dirs.clone(),
        outbox: SharedOutbox::default(),
    };
    let manager = Arc::new(Manager::new(host, CancellationToken::new()));
    let incarnations = manager.adopt_all()?;
    manager.adopted().await;
    let pool = v1::Pool {
        name: "default".to_owned(),
        kind: v1::PoolKind::Shared.into(),
        id: POOL.to_owned(),
        capacity_bytes: 1 << 40,
        free_bytes: 1 << 39,
        problem: String::new(),
        export_address: String::new(),
    };
    // Held for as long as the session: a pool that is not watched any more would count as unchanged.
    let (_pools, pools) = watch::channel(vec![pool]);
    let session = Session {
        identity: Identity {
            host: host_id,
            name,
            boot,
            instance: Uuid::new_v4(),
            capacity: v1::Resources { vcpus: 16, memory_mib: 64 * 1024 },
            labels: BTreeMap::new(),
            accelerator: v1::Accelerator { kind: v1::AcceleratorKind::Tcg.into(), why: "simulated".to_owned() },
            migration_address: None,
            cpu: v1::Cpu::default(),
            bridges: Vec::new(),
        },
        gate: Gate::new(agent.get().newest_term, incarnations),
        manager,
        agent,
        lease,
        clock,
        pools,
        network_pools: Vec::new(),
        exports: Serving::new(None),
        inspector: Inspector::new(Arc::new(Roots::new(&[], &[]))),
        streams: Streams::new(host_id, dirs),
        images: Images::without_pools(Arc::default(), host_id),
    };
    // In step, all of them: harder on the leader than at random.
    connect::run(session, controllers, net::dial(), || 0.5, CancellationToken::new()).await;
    Ok(())
}
