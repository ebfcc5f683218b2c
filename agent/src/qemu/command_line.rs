//! QEMU's command line (pure). What a machine looks like is decided here and nowhere else.
//!
//! Sockets and the serial log are relative paths: the keeper starts QEMU in the VM's `run` directory, so that their
//! length never matters (a socket's address has room for 108 bytes).
//!
//! A second QEMU with the same arguments must be able to take over a migration, so nothing here may depend on the host.

use std::{
    ffi::OsString,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use uncloud_proto::{
    cpu::Level,
    ids::{Incarnation, VmId},
};

use crate::{storage::place::Place, vm::desired::DiskCache};

/// What a guest under TCG has besides its memory, in KiB. Before 9.0, a QEMU that sends a guest's memory takes over which pages were
/// written to in two ways. The quick one, for memory of a multiple of 256 KiB, forgets to have TCG note the next write to
/// them, so what a migrated guest wrote last was lost now and then: one of eight busy guests hung (docs/migration.md). The other way is right.
const TCG_ODD_KIB: u64 = 8;

/// How many QMP sockets a QEMU has. A socket serves one client at a time, and an agent that hangs holds one: its
/// successor takes the next, and one is left for a person.
pub const QMP_SOCKETS: usize = 3;
/// The serial console's socket.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The VNC server's socket.
pub const VNC_SOCKET: &str = "vnc.sock";
/// The guest agent's socket.
pub const AGENT_SOCKET: &str = "agent.sock";
/// The guest agent's channel as QMP names its back end.
pub const AGENT_CHARDEV: &str = "agent0";
/// The guest agent's channel as QMP's events name it.
pub const AGENT_PORT: &str = "agentport0";
/// All that the guest ever wrote to its serial console.
pub const SERIAL_LOG: &str = "serial.log";
/// What QEMU may use for translated code, in MiB. Its own default is up to 1 GiB for each VM.
const TCG_CACHE_MIB: u32 = 32;

/// Name of a QMP socket in the VM's `run` directory.
#[must_use]
pub fn qmp_socket(index: usize) -> String {
    format!("qmp{index}.sock")
}

/// The board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// PCI Express, ICH9.
    Q35,
    /// i440FX: for guests that do not know the other.
    Pc,
}

impl Machine {
    /// The versioned name. It is one for the whole cluster, whatever newer QEMU a host has: the version is part of what
    /// the guest sees, and a migration needs the same on both sides.
    #[must_use]
    pub const fn versioned(self) -> &'static str {
        match self {
            Self::Q35 => "pc-q35-7.2",
            Self::Pc => "pc-i440fx-7.2",
        }
    }

    /// QEMU's name of what the guest powers down by.
    const fn power_management(self) -> &'static str {
        match self {
            Self::Q35 => "ICH9-LPC",
            Self::Pc => "PIIX4_PM",
        }
    }
}

/// What executes the guest. Chosen by the host's probe, never by QEMU's own fallback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceleratorChoice {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// The CPU that a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// One that has what this level has, and nothing else: the same wherever it runs.
    Level(Level),
    /// All that the host's has.
    Host,
}

/// A kernel that QEMU loads by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// UEFI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirmwareFiles {
    /// The firmware itself, shared by all.
    pub code: PathBuf,
    /// The machine's own variables.
    pub vars: Place,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// Its name in the VM's spec; the guest sees it as the serial number.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// How the guest sees it.
    pub bus: DiskBus,
    /// What the host's memory is used for.
    pub cache: DiskCache,
}

/// How the guest sees a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskBus {
    /// A device of its own.
    Virtio,
    /// On the virtio-scsi controller, with this target number.
    Scsi(u32),
    /// On the AHCI controller.
    Sata,
}

/// What comes and goes while a machine runs does so on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScsiController {
    /// There is none.
    None,
    /// virtio-scsi.
    Virtio,
}

/// A NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Its MAC address, as `42:…`.
    pub mac: String,
    /// What it is connected to. The guest does not see it, so it may differ between the two sides of a migration.
    pub backend: NetBackend,
}

/// What a NIC is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// QEMU's own user network.
    User,
    /// A tap, by the number that its descriptor has in QEMU.
    Tap(RawFd),
}

/// What the screen is shown with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    /// There is none.
    None,
    /// A VGA card, with a VNC server on a socket in the VM's directory.
    Vga,
}

/// Whether there is a channel to a guest agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentChannel {
    /// There is none.
    None,
    /// A virtio serial port with a socket in the VM's directory.
    VirtioSerial,
}

/// Everything that the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// Which VM.
    pub vm: VmId,
    /// Which incarnation of it.
    pub incarnation: Incarnation,
    /// Its name.
    pub name: String,
    /// The board.
    pub machine: Machine,
    /// What executes it.
    pub accelerator: AcceleratorChoice,
    /// The CPU that the guest sees.
    pub cpu: Cpu,
    /// Number of CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// A kernel to boot; otherwise the first disk boots.
    pub kernel: Option<KernelFiles>,
    /// UEFI; otherwise SeaBIOS.
    pub firmware: Option<FirmwareFiles>,
    /// The disks, in the order in which the guest finds them.
    pub disks: Vec<DiskFile>,
    /// What cloud-init reads: a raw image, read-only, behind the disks.
    pub seed: Option<PathBuf>,
    /// The NICs, likewise.
    pub nics: Vec<Nic>,
    /// The controller of SCSI disks.
    pub scsi: ScsiController,
    /// The screen.
    pub screen: Screen,
    /// The channel to a guest agent.
    pub agent: AgentChannel,
    /// How it begins.
    pub begin: Begin,
}

/// How a machine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It boots.
    Boot,
    /// It waits for a guest from another host, and for being told to let it go on.
    Incoming,
}

/// The command line, the program first.
///
/// A person finds a VM in the process table by its name and id, and its incarnation as the machine's serial number.
#[must_use]
pub fn command_line(qemu: &Path, spec: &MachineSpec) -> Vec<OsString> {
    let mut argv = Argv(vec![qemu.into()]);
    argv.identity(spec);
    argv.machine(spec);
    argv.control();
    argv.console();
    argv.boot(spec);
    let places = places(&spec.disks, if spec.kernel.is_none() { Boot::FirstDisk } else { Boot::Kernel });
    for place in places.iter().filter(|p| p.disk.bus == DiskBus::Virtio) {
        argv.virtio_disk(place);
    }
    if let Some(seed) = &spec.seed {
        argv.seed(seed);
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        argv.nic(index, nic);
    }
    argv.option("-device", "virtio-rng-pci,id=rng0");
    // Lets the guest say that its kernel panicked.
    argv.option("-device", "pvpanic-pci,id=pvpanic0");
    // Last, so that the other devices have the same places with and without them.
    match spec.agent {
        AgentChannel::None => {}
        AgentChannel::VirtioSerial => argv.agent_channel(),
    }
    match spec.screen {
        Screen::None => {}
        Screen::Vga => argv.screen(),
    }
    // Likewise.
    match spec.scsi {
        ScsiController::None => {}
        ScsiController::Virtio => argv.option("-device", format!("virtio-scsi-pci,id={SCSI_CONTROLLER}")),
    }
    if spec.disks.iter().any(|d| d.bus == DiskBus::Sata) {
        argv.option("-device", format!("ahci,id={SATA_CONTROLLER}"));
    }
    for place in places.iter().filter(|p| p.disk.bus != DiskBus::Virtio) {
        argv.other_disk(place);
    }
    // Last: everything before it is the same on both sides of a migration.
    match spec.begin {
        Begin::Boot => {}
        Begin::Incoming => {
            // Without `-S` it would go on by itself as soon as it has everything (docs/fencing.md, M2).
            argv.flag("-S");
            argv.option("-incoming", "defer");
        }
    }
    argv.0
}

/// `enforce`: on a host that lacks something QEMU ends with an error, where it would otherwise give the guest a CPU without it.
fn cpu(cpu: Cpu) -> String {
    match cpu {
        Cpu::Level(level) => {
            let features: String = level.features().map(|f| format!(",+{f}")).collect();
            // AMD's virtualisation is part of QEMU's oldest 64-bit model, and most hosts cannot give it.
            format!("qemu64,-svm{features},enforce")
        }
        Cpu::Host => "host".to_owned(),
    }
}

struct Argv(Vec<OsString>);

impl Argv {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn identity(&mut self, spec: &MachineSpec) {
        let id = spec.vm.to_string();
        // `process` is what `ps` and `top` show as the command; it has room for 15 characters.
        self.option("-name", format!("guest={},process=uncloud-{}", escaped(&spec.name), &id[..7]));
        self.option("-uuid", id);
        self.option("-smbios", format!("type=1,serial={}", spec.incarnation));
        self.flag("-no-user-config");
        self.flag("-nodefaults");
        // Works because the keeper has dropped privileges already; `-runas` and `-daemonize` would be killed by it.
        self.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        // A guest that powered off or panicked leaves a QEMU that can be asked, so that an agent that was away can
        // tell it from a crash.
        self.option("-action", "shutdown=pause,panic=pause");
    }

    fn machine(&mut self, spec: &MachineSpec) {
        // A core dump of QEMU must not hold the guest's memory.
        let flash = if spec.firmware.is_some() { ",pflash0=firmware-code,pflash1=firmware-vars" } else { "" };
        self.option("-machine", format!("{},dump-guest-core=off{flash}", spec.machine.versioned()));
        if let Some(firmware) = &spec.firmware {
            self.firmware(firmware);
        }
        match spec.accelerator {
            AcceleratorChoice::Kvm => {
                self.option("-accel", "kvm");
            }
            AcceleratorChoice::Tcg => {
                self.option("-accel", format!("tcg,tb-size={TCG_CACHE_MIB}"));
            }
        }
        self.option("-cpu", cpu(spec.cpu));
        self.option("-smp", spec.vcpus.to_string());
        self.option(
            "-m",
            match spec.accelerator {
                AcceleratorChoice::Kvm => format!("{}M", spec.memory_mib),
                AcceleratorChoice::Tcg => format!("{}K", spec.memory_mib * 1024 + TCG_ODD_KIB),
            },
        );
        // A guest that sleeps stands still and keeps its room, and nobody can tell why.
        for sleep in ["disable_s3", "disable_s4"] {
            self.option("-global", format!("{}.{sleep}=1", spec.machine.power_management()));
        }
        self.option("-rtc", "base=utc");
        self.option("-display", "none");
        self.option("-vga", "none");
    }

    fn firmware(&mut self, firmware: &FirmwareFiles) {
        let code = json!({
            "driver": "raw",
            "node-name": "firmware-code",
            "read-only": true,
            "file": { "driver": "file", "filename": firmware.code.to_string_lossy(), "read-only": true },
        });
        let vars = firmware.vars.flash("firmware-vars");
        self.option("-blockdev", code.to_string());
        self.option("-blockdev", vars.to_string());
    }

    fn seed(&mut self, seed: &Path) {
        let blockdev = json!({
            "driver": "raw",
            "node-name": "seed",
            "read-only": true,
            "file": { "driver": "file", "filename": seed.to_string_lossy(), "read-only": true },
        });
        self.option("-blockdev", blockdev.to_string());
        self.option("-device", "virtio-blk-pci,id=seed,drive=seed,serial=seed");
    }

    fn control(&mut self) {
        for index in 0..QMP_SOCKETS {
            self.option("-chardev", format!("socket,id=qmp{index},path={},server=on,wait=off", qmp_socket(index)));
            self.option("-mon", format!("chardev=qmp{index},mode=control"));
        }
    }

    fn console(&mut self) {
        let log = format!("logfile={SERIAL_LOG},logappend=on");
        self.option("-chardev", format!("socket,id=console0,path={CONSOLE_SOCKET},server=on,wait=off,{log}"));
        self.option("-serial", "chardev:console0");
    }

    fn agent_channel(&mut self) {
        self.option("-device", "virtio-serial-pci,id=serial0");
        self.option("-chardev", format!("socket,id={AGENT_CHARDEV},path={AGENT_SOCKET},server=on,wait=off"));
        let port = format!("chardev={AGENT_CHARDEV},id={AGENT_PORT},name=org.qemu.guest_agent.0");
        self.option("-device", format!("virtserialport,bus=serial0.0,nr=1,{port}"));
    }

    fn screen(&mut self) {
        self.option("-device", "VGA,id=vga0");
        // Points where the viewer points. A guest without a driver for it has the board's PS/2 mouse.
        self.option("-device", "virtio-tablet-pci,id=tablet0");
        // Several may look; none waits for another, and none is waited for.
        self.option("-vnc", format!("unix:{VNC_SOCKET},share=force-shared"));
    }

    fn boot(&mut self, spec: &MachineSpec) {
        if let Some(kernel) = &spec.kernel {
            self.option("-kernel", &kernel.kernel);
            if let Some(initrd) = &kernel.initrd {
                self.option("-initrd", initrd);
            }
            self.option("-append", &kernel.command_line);
        } else {
            // Only the disk that is meant to; never the network.
            self.option("-boot", "strict=on");
        }
    }

    fn virtio_disk(&mut self, place: &DiskPlace<'_>) {
        self.option("-blockdev", place.blockdev().to_string());
        let (id, node, serial) = (&place.id, &place.node, serial(place.disk));
        let boot = if place.boots { ",bootindex=0" } else { "" };
        let cache = if place.disk.cache == DiskCache::Writethrough { ",write-cache=off" } else { "" };
        let device = format!("virtio-blk-pci,id={id},drive={node},serial={}{boot}{cache}", escaped(&serial));
        self.option("-device", device);
    }

    fn other_disk(&mut self, place: &DiskPlace<'_>) {
        self.option("-blockdev", place.blockdev().to_string());
        self.option("-device", place.device().to_string());
    }

    fn nic(&mut self, index: usize, nic: &Nic) {
        let netdev = match nic.backend {
            NetBackend::User => format!("user,id=net{index}"),
            NetBackend::Tap(fd) => format!("tap,id=net{index},fd={fd}"),
        };
        self.option("-netdev", netdev);
        // Without its boot ROM: nothing boots from the network, and not every host has the file.
        self.option(
            "-device",
            format!("virtio-net-pci,id=nic{index},netdev=net{index},mac={},romfile=", escaped(&nic.mac)),
        );
    }
}

/// The controller of SCSI disks.
const SCSI_CONTROLLER: &str = "scsi0";
/// The controller of SATA disks.
const SATA_CONTROLLER: &str = "sata0";

/// What a machine boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// Its first disk.
    FirstDisk,
    /// A kernel that QEMU loads.
    Kernel,
}

/// A disk of a machine, by QEMU's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlace<'a> {
    /// The disk.
    pub disk: &'a DiskFile,
    /// Its block node.
    pub node: String,
    /// Its device.
    pub id: String,
    /// The machine boots from it.
    boots: bool,
    /// SATA: its port.
    port: usize,
}

/// Where the disks of a machine are in it, in the guest's order.
///
/// SCSI disks have their places by their target numbers, whatever else comes and goes while the machine runs. The others, which do not
/// change while it runs, have theirs by their order.
#[must_use]
pub fn places(disks: &[DiskFile], boot: Boot) -> Vec<DiskPlace<'_>> {
    let (mut others, mut port) = (0, 0);
    let mut places = Vec::with_capacity(disks.len());
    for (index, disk) in disks.iter().enumerate() {
        let (node, id) = match disk.bus {
            DiskBus::Scsi(unit) => (format!("scsi{unit}"), format!("sd{unit}")),
            DiskBus::Virtio | DiskBus::Sata => (format!("disk{others}"), format!("vd{others}")),
        };
        places.push(DiskPlace { disk, node, id, boots: index == 0 && boot == Boot::FirstDisk, port });
        match disk.bus {
            DiskBus::Scsi(_) => {}
            DiskBus::Virtio => others += 1,
            DiskBus::Sata => (others, port) = (others + 1, port + 1),
        }
    }
    places
}

impl DiskPlace<'_> {
    /// What QEMU is told of its block node.
    #[must_use]
    pub fn blockdev(&self) -> Value {
        self.disk.place.blockdev(&self.node, self.disk.cache)
    }

    /// What QEMU is told of its device, when the machine starts and while it runs.
    #[must_use]
    pub fn device(&self) -> Value {
        let mut device = match self.disk.bus {
            DiskBus::Scsi(unit) => json!({
                "driver": "scsi-hd", "bus": format!("{SCSI_CONTROLLER}.0"), "channel": 0, "scsi-id": unit, "lun": 0,
            }),
            DiskBus::Sata => json!({ "driver": "ide-hd", "bus": format!("{SATA_CONTROLLER}.{}", self.port) }),
            DiskBus::Virtio => json!({ "driver": "virtio-blk-pci" }),
        };
        device["id"] = json!(self.id);
        device["drive"] = json!(self.node);
        device["serial"] = json!(serial(self.disk));
        if self.boots {
            device["bootindex"] = json!(0);
        }
        if self.disk.cache == DiskCache::Writethrough {
            device["write-cache"] = json!("off");
        }
        device
    }
}

/// A virtio disk's serial number has room for 20 bytes.
fn serial(disk: &DiskFile) -> String {
    disk.name.chars().take(20).collect()
}

/// In QEMU's option lists a comma ends the value, two stand for one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, path: &str) -> DiskFile {
        let place = Place::File { path: path.into() };
        DiskFile { name: name.into(), place, bus: DiskBus::Virtio, cache: DiskCache::None }
    }

    fn spec() -> MachineSpec {
        MachineSpec {
            vm: "1a2b3c4d-0000-4000-8000-000000000abc".parse().unwrap(),
            incarnation: Incarnation(7),
            name: "web-1".into(),
            machine: Machine::Q35,
            accelerator: AcceleratorChoice::Kvm,
            cpu: Cpu::Host,
            vcpus: 2,
            memory_mib: 2048,
            kernel: None,
            firmware: None,
            seed: None,
            disks: vec![
                disk("root", "/pool/disks/vm/root.1.qcow2"),
                disk("a-name-that-is-longer-than-20", "/pool/a\"b,c/d.qcow2"),
            ],
            nics: vec![
                Nic { mac: "42:00:00:00:00:01".into(), backend: NetBackend::User },
                Nic { mac: "42:00:00:00:00:02".into(), backend: NetBackend::Tap(12) },
            ],
            scsi: ScsiController::None,
            screen: Screen::Vga,
            agent: AgentChannel::VirtioSerial,
            begin: Begin::Boot,
        }
    }

    /// One argument a line. To take over a change that is meant: `UPDATE_GOLDEN=1 cargo test`.
    fn golden(name: &str, spec: &MachineSpec) {
        let found: String = command_line(Path::new("/usr/bin/qemu-system-x86_64"), spec)
            .iter()
            .map(|a| format!("{}\n", a.to_str().unwrap()))
            .collect();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/qemu/golden").join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        assert_eq!(found, std::fs::read_to_string(&path).unwrap(), "{}", path.display());
    }

    #[test]
    fn a_disk_boots_on_q35_with_kvm() {
        golden("disk-q35-kvm.txt", &spec());
    }

    #[test]
    fn a_kernel_boots_on_pc_with_tcg() {
        let kernel = KernelFiles {
            kernel: "/pool/images/k/kernel".into(),
            initrd: Some("/pool/images/k/initrd".into()),
            command_line: "console=ttyS0 panic=-1, \"quoted\"".into(),
        };
        golden(
            "kernel-pc-tcg.txt",
            &MachineSpec {
                machine: Machine::Pc,
                accelerator: AcceleratorChoice::Tcg,
                cpu: Cpu::Level(Level::V3),
                kernel: Some(kernel),
                disks: spec().disks[..1].to_vec(),
                nics: vec![],
                screen: Screen::None,
                agent: AgentChannel::None,
                ..spec()
            },
        );
    }

    /// What comes from another host finds the machine that it left, and is held still.
    #[test]
    fn a_target_has_the_arguments_of_its_source_and_waits() {
        let qemu = Path::new("q");
        let source = command_line(qemu, &spec());
        let target = command_line(qemu, &MachineSpec { begin: Begin::Incoming, ..spec() });
        assert_eq!(target[..source.len()], source[..]);
        assert_eq!(target[source.len()..], ["-S", "-incoming", "defer"]);
    }

    #[test]
    fn uefi_has_variables_and_cloud_init_a_seed() {
        let vars = Place::File { path: "/pool/disks/vm/uefi-vars.0.fd".into() };
        let firmware = FirmwareFiles { code: "/usr/share/OVMF/CODE.fd".into(), vars };
        let seed = Some("../seed.img".into());
        golden("uefi-seed.txt", &MachineSpec { firmware: Some(firmware), seed, nics: vec![], ..spec() });
    }

    /// What came while it ran has the place that it has when the machine starts with it, whatever came before it.
    #[test]
    fn disks_have_buses_caches_and_places_that_stay() {
        let on = |name: &str, bus, cache| DiskFile { bus, cache, ..disk(name, &format!("/p/{name}")) };
        let all = [
            on("root", DiskBus::Virtio, DiskCache::Writethrough),
            on("a", DiskBus::Scsi(3), DiskCache::None),
            on("b", DiskBus::Sata, DiskCache::Writeback),
            on("c", DiskBus::Virtio, DiskCache::None),
            on("d", DiskBus::Scsi(0), DiskCache::Writethrough),
            on("e", DiskBus::Sata, DiskCache::None),
        ];
        let spec = MachineSpec { disks: all.to_vec(), scsi: ScsiController::Virtio, nics: vec![], ..spec() };
        golden("disks-buses.txt", &spec);
        let names = |disks: &[DiskFile]| -> Vec<String> {
            places(disks, Boot::FirstDisk).iter().map(|p| format!("{} {}", p.disk.name, p.node)).collect()
        };
        let without_a: Vec<DiskFile> = all.iter().filter(|d| d.name != "a").cloned().collect();
        let mut still: Vec<String> = names(&all);
        still.retain(|n| !n.starts_with("a "));
        assert_eq!(names(&without_a), still);
    }

    #[test]
    fn nothing_that_a_person_chose_can_add_an_option() {
        let name = "x,process=y";
        let line = command_line(Path::new("q"), &MachineSpec { name: name.into(), ..spec() });
        assert_eq!(line[2].to_str().unwrap(), "guest=x,,process=y,process=uncloud-1a2b3c4");
    }
}
