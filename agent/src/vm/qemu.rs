//! The real [`Hypervisor`]: QEMU under a keeper, disks in pools.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::time;
use tracing::warn;
use uncloud_proto::{
    cpu::Level,
    ids::{Incarnation, VmId},
};

use super::{
    desired::{
        CpuModel, Desired, Disk, DiskBus, DiskHotplug, DiskState, Display, Disposition, GuestAgent, Machine, Spec,
    },
    disks::Done,
    hypervisor::{Adoption, Exit, ExitKind, Hold, Hypervisor, Instance, InstanceEvent, LaunchError},
    migration::{Copies, Standing, Step},
};
use crate::{
    network,
    qemu::{
        command_line::{
            self, AcceleratorChoice, AgentChannel, Begin, Boot, Cpu, DiskFile, FirmwareFiles, KernelFiles, MachineSpec,
            NetBackend, Nic, Screen, ScsiController,
        },
        disks, hotplug,
        migration::{self, Listen},
        process::{self, ExitOutcome, Launch, VmUser},
        seed,
    },
    records::VmDirs,
    storage::{Files, Prepared, Storage, blocking, place::Place, plan},
};

/// How long to wait before looking again for what holds a VM's lock and does not say what it is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long disks may take to come and go while the VM's task waits. Each takes milliseconds, where its pool does not hang.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);

/// QEMU on this host.
pub struct Qemu {
    /// Disks and images.
    pub storage: Arc<Storage>,
    /// Where the VMs' directories are.
    pub dirs: VmDirs,
    /// How guests execute.
    pub accelerator: AcceleratorChoice,
    /// QEMU.
    pub qemu: PathBuf,
    /// The firmware of UEFI machines.
    pub uefi_code: PathBuf,
    /// The keeper.
    pub keeper: PathBuf,
    /// The lease file.
    pub lease_file: PathBuf,
    /// Who QEMU runs as, if not the agent's own user.
    pub user: Option<VmUser>,
    /// Where QEMU listens for guests from other hosts. `None`: nowhere.
    pub migration: Option<Listen>,
}

impl Hypervisor for Qemu {
    type Instance = process::Instance;
    type Prepared = Prepared;

    async fn prepare(&self, vm: VmId, desired: &Desired) -> Result<Prepared, String> {
        self.storage.prepare(vm, desired).await.map_err(|e| e.reason())
    }

    async fn progress(&self, vm: VmId, last: &str) -> String {
        self.storage.progress(vm, last).await
    }

    async fn launch(
        &self,
        vm: VmId,
        desired: &Desired,
        prepared: Prepared,
        lease_generation: u16,
    ) -> Result<process::Instance, LaunchError> {
        let mut spec = machine(vm, desired, &prepared, self.accelerator)?;
        let vars = prepared.plan.vars_place.clone();
        spec.firmware = vars.map(|vars| FirmwareFiles { code: self.uefi_code.clone(), vars });
        spec.seed = self.seed(vm, desired).await.map_err(LaunchError::Failed)?;
        let pass = connect(vm, desired, &mut spec).map_err(LaunchError::Failed)?;
        let launch = Launch {
            vm,
            incarnation: desired.incarnation,
            class: desired.class(),
            lease_generation,
            lease_file: self.lease_file.clone(),
            vm_dir: self.dirs.dir(vm),
            user: self.user,
            keeper: self.keeper.clone(),
            argv: command_line::command_line(&self.qemu, &spec),
            pass,
        };
        // `prepared` holds the turn until QEMU runs.
        process::launch(&launch).await.map_err(|e| match e {
            process::LaunchError::Fenced => LaunchError::Fenced,
            process::LaunchError::Busy => LaunchError::Busy,
            process::LaunchError::Failed { reason } => LaunchError::Failed(reason),
        })
    }

    async fn adopt(&self, vm: VmId) -> Adoption<process::Instance> {
        loop {
            match process::adopt(&self.dirs.dir(vm), vm).await {
                process::Adoption::Running(instance) => return Adoption::Running(instance),
                process::Adoption::Ended(exit) => return Adoption::Ended(from_exit(exit)),
                process::Adoption::Never => return Adoption::Never,
                // Unknown is asked about again. Nothing is started meanwhile.
                process::Adoption::Unclear { reason } => {
                    warn!("it is not known whether the VM executes: {reason}");
                    time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    async fn step(&self, vm: VmId, instance: &process::Instance, step: Step) -> Result<(), String> {
        let vm_dir = self.dirs.dir(vm);
        // The target does not know that the guest stands still for a snapshot, and would never let it go on.
        if let Step::Send(_) = step {
            instance.let_go().await;
        }
        migration::step(instance, &vm_dir, self.user, self.migration, &step).await.map_err(|e| e.to_string())
    }

    async fn tend_disks(&self, vm: VmId, instance: &process::Instance, desired: &Desired) -> Result<Done, String> {
        if !desired.orders.disks.is_empty() {
            let changed = time::timeout(CHANGE_LIMIT, self.change_disks(vm, instance, desired));
            changed.await.map_err(|_| "the disks take too long to come or go; it is tried again".to_owned())??;
        }
        let Some(spec) = &desired.spec else { return Ok(desired.orders.done()) };
        // Where they are says nothing of what QEMU calls them.
        let nowhere = || Place::File { path: PathBuf::new() };
        let here: Vec<&Disk> = spec.disks.iter().filter(|d| d.is_in_machine()).collect();
        let files: Vec<DiskFile> = here.iter().map(|d| disk_file(d, nowhere())).collect();
        let places = command_line::places(&files, boot(spec));
        let sizes: Vec<_> =
            here.iter().zip(&places).map(|(d, p)| (d.name.as_str(), p.node.as_str(), d.size_bytes)).collect();
        let holds = desired.has_served_disks();
        // What has to be used by the guest before it grows must not keep a snapshot waiting.
        if holds && disks::is_to_hold(&desired.orders) {
            return Ok(disks::hold_for_snapshots(instance, &desired.orders).await);
        }
        disks::grow(instance, &sizes).await.map_err(|e| e.to_string())?;
        if holds {
            return Ok(disks::hold_for_snapshots(instance, &desired.orders).await);
        }
        let nodes: Vec<&str> = places.iter().map(|p| p.node.as_str()).collect();
        disks::snapshots(instance, &nodes, &desired.orders).await.map_err(|e| e.to_string())
    }

    async fn tend_idle(&self, vm: VmId, desired: &Desired) -> Result<Done, String> {
        self.storage.tend(vm, desired).await.map_err(|e| e.reason())
    }

    async fn go_on(&self, instance: &process::Instance, desired: &Desired) -> Result<Hold, String> {
        if !disks::is_stalled(instance).await.map_err(|e| e.to_string())? {
            return Ok(Hold::Over);
        }
        if let Some(pool) = self.storage.full_pool(desired).await {
            return Ok(Hold::Full(pool));
        }
        disks::go_on(instance).await.map(|()| Hold::Over).map_err(|e| e.to_string())
    }

    async fn delete_disks(&self, vm: VmId, desired: &Desired) -> Result<(), String> {
        self.storage.delete(vm, desired).await.map_err(|e| e.reason())
    }
}

impl Qemu {
    /// Has disks come and go.
    async fn change_disks(&self, vm: VmId, instance: &process::Instance, desired: &Desired) -> Result<(), String> {
        let Some(spec) = &desired.spec else { return Ok(()) };
        if !desired.has_served_disks() {
            self.storage.make_attached(vm, desired).await.map_err(|e| e.reason())?;
        }
        let files = |disk: &Disk| self.storage.files_of(vm, disk, desired).map_err(|e| e.reason());
        let pending = |disk: &&Disk| match disk.state {
            DiskState::Attached | DiskState::Detached => false,
            DiskState::Attaching | DiskState::Returning | DiskState::Detaching | DiskState::Deleting => true,
        };
        for disk in spec.disks.iter().filter(pending) {
            let place = plan::served(vm, disk, desired).map_err(|e| e.to_string())?;
            let (found, place) = match place {
                // Its storage host makes it. Until that serves it, it cannot be opened, and this is tried again.
                Some(Place::Export { address, export }) => {
                    let file = PathBuf::from(&export);
                    (Files { all: vec![file.clone()], file }, Place::Export { address, export })
                }
                Some(Place::File { .. }) | None => {
                    let found = files(disk)?;
                    let path = found.file.clone();
                    (found, Place::File { path })
                }
            };
            // A disk that changes while the machine runs has its place by its target number, and none of them is booted from.
            let file = [disk_file(disk, place)];
            for place in command_line::places(&file, Boot::Kernel) {
                match disk.is_in_machine() {
                    true => hotplug::plug(instance, &place, &found.file).await,
                    false => hotplug::unplug(instance, &place, &found.all).await,
                }
                .map_err(|e| e.to_string())?;
            }
        }
        self.storage.delete_detached(vm, desired).await.map_err(|e| e.reason())
    }

    /// Makes the disk that cloud-init reads, anew for each start. Its path is relative to where QEMU runs, so that it is the
    /// same on every host.
    async fn seed(&self, vm: VmId, desired: &Desired) -> Result<Option<PathBuf>, String> {
        let Some(cloud_init) = desired.spec.as_ref().and_then(|s| s.cloud_init.clone()) else { return Ok(None) };
        let (dir, name, group) = (self.dirs.dir(vm), desired.name.clone(), self.user.map(|u| u.gid));
        blocking(move || seed::write(&dir, vm, &name, &cloud_init, group))
            .await
            .map_err(|e| format!("the disk for cloud-init cannot be made: {e}"))?;
        Ok(Some(PathBuf::from("..").join(seed::FILE)))
    }
}

/// Makes the taps of the VM's network interfaces, and says in `machine` which has which. They last as long as the descriptors that
/// this gives.
fn connect(vm: VmId, desired: &Desired, machine: &mut MachineSpec) -> Result<Vec<Arc<OwnedFd>>, String> {
    let Some(spec) = &desired.spec else { return Ok(Vec::new()) };
    let mut taps = Vec::new();
    for (plan, nic) in network::plan(vm, desired.incarnation, &spec.nics).iter().zip(&mut machine.nics) {
        let Some(plan) = plan else { continue };
        let tap = network::open(plan).map_err(|e| e.reason())?;
        nic.backend = NetBackend::Tap(tap.as_raw_fd());
        taps.push(Arc::new(tap));
    }
    Ok(taps)
}

fn disk_file(disk: &Disk, place: Place) -> DiskFile {
    let bus = match disk.bus {
        DiskBus::Virtio => command_line::DiskBus::Virtio,
        DiskBus::Scsi => command_line::DiskBus::Scsi(disk.unit),
        DiskBus::Sata => command_line::DiskBus::Sata,
    };
    DiskFile { name: disk.name.clone(), place, bus, cache: disk.cache }
}

fn boot(spec: &Spec) -> Boot {
    if spec.kernel.is_some() { Boot::Kernel } else { Boot::FirstDisk }
}

fn machine(
    vm: VmId,
    desired: &Desired,
    prepared: &Prepared,
    accelerator: AcceleratorChoice,
) -> Result<MachineSpec, LaunchError> {
    let spec = desired.spec.as_ref().ok_or_else(|| LaunchError::Failed("the VM has no spec".to_owned()))?;
    let plan = &prepared.plan;
    Ok(MachineSpec {
        vm,
        incarnation: desired.incarnation,
        name: desired.name.clone(),
        machine: match spec.machine {
            Machine::Q35 => command_line::Machine::Q35,
            Machine::Pc => command_line::Machine::Pc,
        },
        accelerator,
        cpu: match spec.cpu {
            CpuModel::V2 => Cpu::Level(Level::V2),
            CpuModel::V3 => Cpu::Level(Level::V3),
            CpuModel::V4 => Cpu::Level(Level::V4),
            CpuModel::Host => Cpu::Host,
        },
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel: plan.kernel.as_ref().map(|k| KernelFiles {
            kernel: k.kernel.clone(),
            initrd: k.initrd.clone(),
            command_line: k.command_line.clone(),
        }),
        firmware: None,
        seed: None,
        // The plan has a place for each disk that the machine has.
        disks: spec
            .disks
            .iter()
            .filter(|d| d.is_in_machine())
            .zip(&plan.places)
            .map(|(disk, (_, place))| disk_file(disk, place.clone()))
            .collect(),
        scsi: match spec.disk_hotplug {
            DiskHotplug::Disabled => ScsiController::None,
            DiskHotplug::Enabled => ScsiController::Virtio,
        },
        nics: spec.nics.iter().map(|n| Nic { mac: n.mac.clone(), backend: NetBackend::User }).collect(),
        screen: match spec.display {
            Display::None => Screen::None,
            Display::Standard => Screen::Vga,
        },
        agent: match spec.guest_agent {
            GuestAgent::Disabled => AgentChannel::None,
            GuestAgent::Enabled => AgentChannel::VirtioSerial,
        },
        begin: match desired.disposition {
            Disposition::Incoming => Begin::Incoming,
            Disposition::Run | Disposition::Stop | Disposition::Delete | Disposition::Forget => Begin::Boot,
        },
    })
}

fn from_exit(exit: process::Exit) -> Exit {
    let mut last_words = exit.last_words;
    let kind = match exit.outcome {
        ExitOutcome::Exited { code } => ExitKind::Exited(code),
        ExitOutcome::Signaled { signal } => ExitKind::Signaled(signal),
        ExitOutcome::Fenced => ExitKind::Fenced,
        ExitOutcome::Refused => ExitKind::NotStarted,
        ExitOutcome::NotStarted { reason } => {
            last_words = reason;
            ExitKind::NotStarted
        }
        ExitOutcome::KeeperKilled => ExitKind::KeeperKilled,
    };
    Exit { incarnation: exit.incarnation, kind, at: exit.at, last_words }
}

impl Instance for process::Instance {
    fn incarnation(&self) -> Incarnation {
        self.incarnation()
    }

    fn lease_generation(&self) -> u16 {
        self.lease_generation()
    }

    fn pid(&self) -> u32 {
        self.qemu_pid()
    }

    async fn power_down(&self) -> Result<(), String> {
        // What stands still could not write what it has to.
        self.let_go().await;
        self.power_down().await.map_err(|e| e.to_string())
    }

    async fn reset(&self) -> Result<(), String> {
        self.reset().await.map_err(|e| e.to_string())
    }

    async fn quit(&self) -> Result<(), String> {
        self.quit().await.map_err(|e| e.to_string())
    }

    async fn standing(&self, copies: Copies) -> Result<Standing, String> {
        migration::standing(self, copies).await.map_err(|e| e.to_string())
    }

    fn kill(&self) {
        self.kill();
    }

    async fn next_event(&mut self) -> InstanceEvent {
        match self.next_event().await {
            process::InstanceEvent::GuestShutdown => InstanceEvent::GuestShutdown,
            process::InstanceEvent::GuestPanicked => InstanceEvent::GuestPanicked,
            process::InstanceEvent::GuestReset => InstanceEvent::GuestReset,
            process::InstanceEvent::GuestAddresses(addresses) => {
                InstanceEvent::GuestAddresses(addresses.iter().map(ToString::to_string).collect())
            }
            process::InstanceEvent::MigrationMoved => InstanceEvent::MigrationMoved,
            process::InstanceEvent::Stalled => InstanceEvent::Stalled,
            process::InstanceEvent::DiskFailed(words) => InstanceEvent::DiskFailed(words),
            process::InstanceEvent::Ended(exit) => InstanceEvent::Ended(from_exit(exit)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{desired::DiskState, fake};

    /// Disks are copied by the names that their nodes have.
    #[test]
    fn the_nodes_of_a_spec_are_those_of_its_machine() {
        let mut spec = fake::desired(1).spec.unwrap();
        let on = |name: &str, bus, unit| Disk { name: name.into(), bus, unit, ..Disk::default() };
        let away = Disk { state: DiskState::Detached, ..on("away", DiskBus::Virtio, 0) };
        let (root, sata) = (on("root", DiskBus::Virtio, 0), on("sata", DiskBus::Sata, 0));
        spec.disks = vec![root, on("a", DiskBus::Scsi, 3), away, sata, on("b", DiskBus::Scsi, 0)];
        let place = Place::File { path: "/p".into() };
        let files: Vec<_> = spec.nodes().map(|(disk, _)| disk_file(disk, place.clone())).collect();
        let places = command_line::places(&files, Boot::FirstDisk);
        let nodes: Vec<_> = spec.nodes().map(|(_, node)| node).collect();
        assert_eq!(nodes, ["disk0", "scsi3", "disk1", "scsi0"]);
        assert!(nodes.iter().eq(places.iter().map(|p| &p.node)), "{nodes:?}");
    }
}
