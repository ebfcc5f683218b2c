//! Puts the agent together and runs it.
//!
//! The order matters: an agent that is restarted has less than a lease to get its first heartbeat answered, so nothing
//! before that waits for a slow disk, a pool that hangs, or a measurement that was made before.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};
use uncloud_proto::{
    clock::Clock,
    dial::Dial,
    ids::HostId,
    v1::{self, AcceleratorKind},
};
use uuid::Uuid;

use crate::{
    accelerator::{self, AcceleratorChoice, Finding},
    config::{AcceleratorMode, Config},
    host, lease,
    lease::LeaseFile,
    qemu::{console, process::VmUser},
    records::{AcceleratorRecord, AgentFile, StateDir},
    session::{
        connect,
        gate::Gate,
        outbox::SharedOutbox,
        pump::{Identity, Session},
        serving::Serving,
        streams::Streams,
    },
    storage::{
        self, Storage,
        exports::daemon,
        http::{Allowed, Http, Patience},
        inspect::Inspector,
        pools::{self, User},
    },
    vm::{
        hypervisor::Hypervisor,
        manager::Manager,
        qemu::Qemu,
        runner::{Host, chain},
        starts::Starts,
    },
};

/// How long the first `Hello` waits for all VMs to be found. One whose QEMU hangs is reported as starting until then.
const ADOPTION_PATIENCE: Duration = Duration::from_millis(500);
/// The serial logs are looked at so often, and cut when they are longer than this.
const TRIM_PERIOD: Duration = Duration::from_secs(5);
const LOG_LIMIT: u64 = 1 << 20;
/// How long the tasks may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Runs the agent until `cancel` fires. The VMs go on.
///
/// # Errors
///
/// It cannot start; the message says what to do.
pub async fn run(config: Config, cancel: CancellationToken) -> anyhow::Result<()> {
    let clock = Clock::system();
    let boot = lease::boot_id().context("the kernel's boot id")?;
    let state = StateDir::open(&config.state_dir)?;
    let dirs = state.vms();
    let lease = LeaseFile::open(&state.lease_path(), boot)
        .with_context(|| format!("the lease file {}", state.lease_path().display()))?;
    let lease = Arc::new(lease);
    let agent = Arc::new(AgentFile::open(state, HostId::from_uuid(Uuid::new_v4()))?);
    let host_id = agent.get().host_id;

    let setup = if dirs.is_empty()? { Setup::NoVms } else { Setup::HasVms };
    check_surroundings(&config, setup)?;
    let finding = find_accelerator(&config, boot, &agent).await?;
    info!(accelerator = ?finding.choice, "{}", finding.why);

    let starts = Starts::new(config.parallel_starts);
    let storage = Storage::new(
        storage::Options {
            pools: config.pools.clone(),
            image_dirs: config.image_dirs.clone(),
            user: config.user,
            qemu_img: config.qemu_img.clone(),
            uefi_vars: config.uefi_vars.clone(),
            host: host_id,
            http: web(&config),
            max_image_bytes: config.max_image_bytes,
        },
        starts,
    );
    let images = storage.images();
    let storage = Arc::new(storage);
    let exports = storage.exports();
    let hypervisor = Qemu {
        storage: Arc::clone(&storage),
        dirs: dirs.clone(),
        accelerator: finding.choice,
        qemu: config.qemu.clone(),
        uefi_code: config.uefi_code.clone(),
        keeper: config.keeper.clone(),
        lease_file: lease.path().to_owned(),
        user: config.user.map(|u| VmUser { uid: u.uid, gid: u.gid }),
        migration: config.migration,
    };
    let vms_cancel = CancellationToken::new();
    let host = Host {
        hypervisor: Arc::new(hypervisor),
        lease: Arc::clone(&lease),
        clock: clock.clone(),
        dirs: dirs.clone(),
        outbox: SharedOutbox::default(),
    };
    let manager = Arc::new(Manager::new(host, vms_cancel.clone()));
    let incarnations = manager.adopt_all()?;
    let (adopted, cpu, (pools, watch_pools)) = tokio::join!(
        time::timeout(ADOPTION_PATIENCE, manager.adopted()),
        accelerator::cpu(&config.qemu, finding.choice),
        pools::watch(config.pools.clone(), config.user, cancel.clone()),
    );
    if adopted.is_err() {
        warn!("not all VMs have been found yet; the session does not wait for them");
    }

    tokio::spawn(watch_pools.instrument(info_span!(parent: None, "pools")));
    if let Some(server) = &config.exports {
        let options = daemon::Options {
            program: server.program.clone(),
            dir: config.state_dir.join("exports"),
            address: server.address,
            user: config.user,
        };
        let serving = exports.clone().run(storage, options, cancel.clone());
        tokio::spawn(serving.instrument(info_span!(parent: None, "exports")));
    }
    tokio::spawn(trim_logs(Arc::clone(&manager), cancel.clone()));
    let session = Session {
        identity: identity(&config, host_id, boot, &finding, cpu),
        gate: Gate::new(agent.get().newest_term, incarnations),
        manager: Arc::clone(&manager),
        agent,
        lease,
        clock,
        pools,
        network_pools: config.network_pools.iter().map(pools::network).collect(),
        exports: Serving::new(config.exports.is_some().then_some(exports)),
        inspector: Inspector::of(&images),
        streams: Streams::new(host_id, dirs).with_images(images.clone()),
        images,
    };
    info!(host = %host_id, name = config.name, vms = manager.vms().len(), "the agent runs");
    connect::run(session, config.controllers, Dial::tcp(), rand::random, cancel)
        .instrument(info_span!(parent: None, "session", host = %host_id))
        .await;

    vms_cancel.cancel();
    if time::timeout(STOP_PATIENCE, manager.stopped()).await.is_err() {
        warn!("gave up waiting for the VMs' tasks to end");
    }
    info!("the agent stops; the VMs go on for as long as their lease does");
    Ok(())
}

/// What fetches images from web servers. Without certificates, or where the operator wants none, the agent goes on without.
fn web(config: &Config) -> Result<Http, String> {
    if matches!(&config.image_urls, Allowed::Listed(urls) if urls.is_empty()) {
        return Err("this host's agent fetches nothing from the network (--image-url none)".to_owned());
    }
    let patience = Patience { connect: Duration::from_secs(10), silence: config.image_timeout };
    Http::new(config.image_urls.clone(), patience).map_err(|e| {
        warn!("images cannot be fetched from the network: {}", chain(&e));
        format!("this host's agent cannot fetch from the network: {}", chain(&e))
    })
}

/// Whether the agent is being set up, or has VMs to care for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Setup {
    /// What is wrong stops it, so that a mistake is noticed.
    NoVms,
    /// It goes on without what it cannot use: to stop would kill the VMs that run well.
    HasVms,
}

fn check_surroundings(config: &Config, setup: Setup) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    if let Some(user) = config.user
        && let Err(problem) = pools::reachable(&config.state_dir, user)
    {
        problems.push(format!("--state-dir: {problem}"));
    }
    // A pool that hangs must not hold up the lease; the pools of an agent that has VMs are looked at later.
    if setup == Setup::NoVms {
        for pool in &config.pools {
            if let Err(problem) = pools::check(pool, config.user) {
                problems.push(format!("--pool {}: {problem}", pool.name));
            }
        }
    }
    match setup {
        Setup::NoVms if problems.is_empty() => Ok(()),
        Setup::NoVms => anyhow::bail!("{}", problems.join("; ")),
        Setup::HasVms => {
            problems.iter().for_each(|problem| error!("{problem}"));
            Ok(())
        }
    }
}

/// Measures how guests execute, unless that was done before in this boot.
async fn find_accelerator(config: &Config, boot: Uuid, agent: &AgentFile) -> anyhow::Result<Finding> {
    match config.accelerator {
        AcceleratorMode::Tcg => {
            Ok(Finding { choice: AcceleratorChoice::Tcg, why: "TCG, as configured (--accelerator tcg)".to_owned() })
        }
        AcceleratorMode::Kvm => {
            if let Some(closed) = kvm_closed(config.user) {
                anyhow::bail!("--accelerator kvm: {closed}");
            }
            Ok(Finding { choice: AcceleratorChoice::Kvm, why: "KVM, as configured (--accelerator kvm)".to_owned() })
        }
        AcceleratorMode::Auto => {
            let good_for = format!("boot {boot}, {}", kvm_device());
            let finding = match agent.get().accelerator.filter(|known| known.good_for == good_for) {
                Some(known) => from_record(known),
                None => {
                    let finding = accelerator::probe().await;
                    let record = to_record(&finding, good_for);
                    if let Err(problem) = agent.change(|a| a.accelerator = Some(record)) {
                        warn!("the finding of the accelerator probe is not kept: {problem}");
                    }
                    finding
                }
            };
            match (finding.choice, kvm_closed(config.user)) {
                (AcceleratorChoice::Kvm, Some(closed)) => {
                    Ok(Finding { choice: AcceleratorChoice::Tcg, why: format!("KVM works, but {closed}") })
                }
                (AcceleratorChoice::Kvm | AcceleratorChoice::Tcg, _) => Ok(finding),
            }
        }
    }
}

const KVM: &str = "/dev/kvm";

/// Something that changes when KVM appears, disappears or is replaced.
fn kvm_device() -> String {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(KVM) {
        Ok(m) => format!("{KVM} since {}.{}", m.ctime(), m.ctime_nsec()),
        Err(_) => format!("no {KVM}"),
    }
}

/// Why the user that VMs run as cannot use KVM.
fn kvm_closed(user: Option<User>) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let user = user?;
    let device = match std::fs::metadata(KVM) {
        Ok(device) => device,
        Err(e) => return Some(format!("{KVM}: {e}")),
    };
    let wanted = match () {
        () if device.uid() == user.uid => 0o600,
        () if device.gid() == user.gid => 0o060,
        () => 0o006,
    };
    (device.mode() & wanted != wanted).then(|| {
        format!(
            "{KVM} is closed to the user that VMs run as (uid {}, gid {}); give --vm-user the group of {KVM}: {}:{}",
            user.uid,
            user.gid,
            user.uid,
            device.gid()
        )
    })
}

fn from_record(record: AcceleratorRecord) -> Finding {
    let choice = if record.kind == "kvm" { AcceleratorChoice::Kvm } else { AcceleratorChoice::Tcg };
    Finding { choice, why: record.why }
}

fn to_record(finding: &Finding, good_for: String) -> AcceleratorRecord {
    let kind = match finding.choice {
        AcceleratorChoice::Kvm => "kvm",
        AcceleratorChoice::Tcg => "tcg",
    };
    AcceleratorRecord { good_for, kind: kind.to_owned(), why: finding.why.clone() }
}

fn identity(config: &Config, host: HostId, boot: Uuid, finding: &Finding, cpu: v1::Cpu) -> Identity {
    let kind = match finding.choice {
        AcceleratorChoice::Kvm => AcceleratorKind::Kvm,
        AcceleratorChoice::Tcg => AcceleratorKind::Tcg,
    };
    Identity {
        host,
        name: config.name.clone(),
        boot,
        instance: Uuid::new_v4(),
        capacity: v1::Resources { vcpus: config.vcpus, memory_mib: config.memory_mib },
        labels: config.labels.clone(),
        accelerator: v1::Accelerator { kind: kind.into(), why: finding.why.clone() },
        migration_address: config.migration.map(|m| m.address),
        cpu,
        bridges: config.bridges.clone(),
    }
}

/// Keeps the serial logs short: a guest writes into them as much as it likes.
async fn trim_logs<H: Hypervisor>(manager: Arc<Manager<H>>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = time::sleep(TRIM_PERIOD) => {}
        }
        for vm in manager.vms() {
            let dir = manager.host().dirs.dir(vm);
            if let Err(error) = console::trim_log(&dir, LOG_LIMIT).await {
                warn!(%vm, "the serial log cannot be cut: {error}");
            }
        }
    }
}

/// Makes a directory a shared pool, and prints its id.
///
/// # Errors
///
/// It is one already, or the marker cannot be written.
pub fn init_pool(path: &Path, name: &str) -> anyhow::Result<()> {
    let marker = pools::init(path, name, Uuid::new_v4()).map_err(anyhow::Error::msg)?;
    println!("{} is a shared pool with the id {}", path.display(), marker.id);
    Ok(())
}

/// Prints how guests would execute.
pub async fn probe() {
    let finding = accelerator::probe().await;
    println!("{:?}: {}", finding.choice, finding.why);
    println!("{} CPU threads, {} MiB for VMs", host::vcpus(), host::memory_mib());
}
