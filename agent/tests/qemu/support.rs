//! A host's directory for one test, its guests, and the certainty that nothing of it is left behind.

use std::{
    fs,
    future::Future,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use tempfile::TempDir;
use uncloud_agent::{
    lease::{LeaseClass, LeaseFile, LeaseWord, boot_id},
    qemu::{
        command_line::{
            AcceleratorChoice, AgentChannel, Begin, Cpu, DiskBus, DiskFile, Machine, MachineSpec, Screen,
            ScsiController, command_line,
        },
        process::{Instance, InstanceEvent, Launch, LaunchError, VmUser, launch},
    },
    storage::place::Place,
    vm::desired::DiskCache,
};
use uncloud_proto::{
    clock::{Clock, Tick},
    cpu::Level,
    ids::{Incarnation, VmId},
};
use uuid::Uuid;

/// How long anything may take that should take a moment. Long, because all of a machine's tests may run at once.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// One VM on one host. When it is dropped, also by a panic, every process of the VM is killed.
pub(crate) struct Host {
    dir: TempDir,
    pub(crate) vm: VmId,
    pub(crate) lease: LeaseFile,
    pub(crate) launch: Launch,
    pub(crate) spec: MachineSpec,
}

impl Host {
    /// With a fast lease of a minute, and the micro guest on the VM's disk.
    pub(crate) fn new() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/guests/micro/build");
        Self::with_disk(|dir| {
            run(Command::new(&script).arg(dir));
            dir.join("micro.img")
        })
    }

    /// With a guest that says `!` and then writes back what it reads from its serial port.
    pub(crate) fn with_echo() -> Self {
        Self::with_disk(|dir| {
            let source = ".code16\n.globl start\nstart: cli; mov $'!',%al; mov $0x3f8,%dx; out %al,%dx\n1: mov $0x3fd,%dx; in %dx,%al; test $1,%al; jz 1b\n\
                          mov $0x3f8,%dx; in %dx,%al; out %al,%dx; jmp 1b\n.org 510\n.word 0xaa55\n";
            let (text, object, image) = (dir.join("echo.S"), dir.join("echo.o"), dir.join("echo.img"));
            fs::write(&text, source).unwrap();
            run(Command::new("as").args(["--32", "-o"]).args([&object, &text]));
            run(Command::new("ld")
                .args(["-m", "elf_i386", "-Ttext", "0x7c00", "-e", "start", "--oformat", "binary", "-o"])
                .args([&image, &object]));
            fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(1 << 20).unwrap();
            image
        })
    }

    fn with_disk(raw: impl FnOnce(&Path) -> PathBuf) -> Self {
        let dir = tempfile::Builder::new().prefix("uncloud-agent-test-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let user = rustix::process::getuid().is_root().then_some(VmUser { uid: 65534, gid: 65534 });
        let disk = dir.path().join("disk.qcow2");
        run(Command::new("qemu-img").args(["convert", "-q", "-O", "qcow2"]).args([&raw(dir.path()), &disk]));
        if let Some(user) = user {
            chown(&disk, Some(user.uid), Some(user.gid)).unwrap();
        }

        let vm = VmId::from_uuid(Uuid::new_v4());
        let spec = MachineSpec {
            vm,
            incarnation: Incarnation(3),
            name: "test".into(),
            machine: Machine::Pc,
            accelerator: AcceleratorChoice::Tcg,
            cpu: Cpu::Level(Level::V2),
            vcpus: 1,
            memory_mib: 2,
            kernel: None,
            firmware: None,
            seed: None,
            scsi: ScsiController::Virtio,
            disks: vec![DiskFile {
                name: "root".into(),
                place: Place::File { path: disk },
                bus: DiskBus::Virtio,
                cache: DiskCache::None,
            }],
            nics: vec![],
            screen: Screen::None,
            agent: AgentChannel::None,
            begin: Begin::Boot,
        };
        let lease_file = dir.path().join("lease");
        let lease = LeaseFile::open(&lease_file, boot_id().unwrap()).unwrap();
        let launch = Launch {
            vm,
            incarnation: spec.incarnation,
            class: LeaseClass::Fast,
            lease_generation: 0,
            lease_file,
            vm_dir: dir.path().join("vm"),
            user,
            keeper: env!("CARGO_BIN_EXE_uncloud-keeper").into(),
            argv: vec![],
            pass: vec![],
        };
        let mut host = Self { dir, vm, lease, launch, spec };
        host.launch.lease_generation = host.renew(Duration::from_secs(60)).generation;
        host.describe();
        host
    }

    /// Puts `spec` into `launch`.
    pub(crate) fn describe(&mut self) {
        self.launch.argv = command_line(Path::new("qemu-system-x86_64"), &self.spec);
    }

    /// Renews the fast lease from now on.
    pub(crate) fn renew(&self, length: Duration) -> LeaseWord {
        let now = now();
        self.lease.renew(LeaseClass::Fast, now.after(length), now)
    }

    /// A lease that ends soon instead of the long one, under a generation of its own.
    pub(crate) fn short_lease(&mut self, length: Duration) -> LeaseWord {
        // Another file: a deadline never moves back.
        self.launch.lease_file = self.dir.path().join("short-lease");
        self.lease = LeaseFile::open(&self.launch.lease_file, boot_id().unwrap()).unwrap();
        let word = self.renew(length);
        self.launch.lease_generation = word.generation;
        word
    }

    /// Instead of QEMU: a shell script.
    pub(crate) fn pretend(&mut self, script: &str) {
        self.launch.argv = ["/bin/bash", "-c", script, &self.vm.to_string()].map(Into::into).into();
    }

    pub(crate) async fn start(&self) -> Instance {
        self.try_start().await.unwrap_or_else(|e| panic!("not started: {e}"))
    }

    pub(crate) async fn try_start(&self) -> Result<Instance, LaunchError> {
        tokio::time::timeout(LIMIT, launch(&self.launch)).await.expect("a start is bounded in time")
    }

    /// Runs a keeper by hand, without the agent's lock, until it ends.
    pub(crate) async fn keeper_alone(&self) -> ExitStatus {
        let l = &self.launch;
        let mut keeper = tokio::process::Command::new(&l.keeper);
        keeper
            .args(["--vm", &l.vm.to_string(), "--incarnation", &l.incarnation.to_string(), "--vm-dir"])
            .arg(&l.vm_dir)
            .args(["--class", &l.class.to_string(), "--lease-file"])
            .arg(&l.lease_file)
            .args(["--lease-generation", &l.lease_generation.to_string(), "--"])
            .args(&l.argv)
            .kill_on_drop(true);
        let status = tokio::time::timeout(LIMIT, keeper.status()).await;
        status.expect("a keeper that starts nothing ends").unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.launch.vm_dir.join(name)
    }

    /// A file of this test that is not the VM's.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The processes by the keeper's record.
    pub(crate) fn keeper_pid(&self) -> u32 {
        self.pid("keeper_pid")
    }

    pub(crate) fn qemu_pid(&self) -> u32 {
        self.pid("qemu_pid")
    }

    fn pid(&self, field: &str) -> u32 {
        let record: serde_json::Value = serde_json::from_str(&self.read("keeper.json")).unwrap();
        u32::try_from(record[field].as_u64().unwrap()).unwrap()
    }

    /// The guest's beats so far.
    pub(crate) fn beats(&self) -> Vec<u32> {
        let log = self.read("run/serial.log");
        assert!(!log.contains("SPLITBRAIN") && !log.contains("DISKERROR"), "{log}");
        // The last line may not be whole yet.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .filter_map(|l| l.trim().strip_prefix("HB ")?.split(' ').next())
            .map(|n| u32::from_str_radix(n, 16).unwrap())
            .collect()
    }

    pub(crate) async fn wait_for_beats(&self, count: usize) {
        wait_for("beats", || self.beats().len() >= count).await;
    }

    pub(crate) async fn wait_for_more_beats(&self, count: usize) {
        self.wait_for_beats(self.beats().len() + count).await;
    }

    /// Every process whose command line names this VM.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let id = self.vm.to_string();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&id)
        })
        .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Until there are none: one may be about to start another.
        for _ in 0..100 {
            let pids = self.processes();
            if pids.is_empty() {
                return;
            }
            for pid in pids {
                signal(pid, rustix::process::Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn now() -> Tick {
    Clock::system().now()
}

pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // It may be gone already.
    let _ = rustix::process::kill_process(pid, signal);
}

/// Whether a process executes no more: it is gone, or only waits to be reaped.
pub(crate) fn dead(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

/// Waits until all are dead, and gives when that was seen.
pub(crate) async fn death_of(pids: &[u32]) -> Tick {
    wait_for("death", || pids.iter().all(|p| dead(*p))).await;
    now()
}

pub(crate) async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let began = now();
    while !condition() {
        assert!(now().since(began) < LIMIT, "waited {LIMIT:?} for {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("waited {LIMIT:?} for {what}"))
}

/// The next event that is no reset: the firmware makes those by itself.
pub(crate) async fn next_event(instance: &mut Instance) -> InstanceEvent {
    loop {
        match within("an event", instance.next_event()).await {
            InstanceEvent::GuestReset => {}
            event => return event,
        }
    }
}

/// How far a moment lies from where it should be.
pub(crate) fn off_by(a: Tick, b: Tick) -> Duration {
    a.since(b).max(b.since(a))
}
