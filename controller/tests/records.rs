//! What is stored, byte for byte: people read these records, and other versions of this program do.
//!
//! A golden file changes only with a reason that its commit gives; `UNCLOUD_UPDATE_GOLDEN=1` rewrites them. A field may
//! be added with a default; nothing may be renamed or removed.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use serde::Serialize;
use uncloud_controller::model::{
    ClusterRecord, Desired, EventRecord, EventType, Extra, HostMode, HostRecord, ImageRecord, Key, LeaderRecord,
    Liveness, Phase, Record, RequestAnswer, RequestRecord, Subject, VmRecord, VmStatusRecord,
    host::{Accelerator, AcceleratorKind, Cpu, Pool, PoolAccess},
    image::{DiskFormat, FileRole, ImageFile, ImageKind, ImageState},
    migration::{Arrival, Migration, MigrationEnd, MigrationProgress, MigrationResult},
    vm::{
        CloneOf, CloudInit, CpuModel, Disk, DiskHome, Display, Failover, Firmware, GuestAgent, KernelBoot, LastExit,
        Machine, Nic, NicKind, OnDiskLoss, PendingSpec, Placement, RestartPolicy, VmSpec,
    },
};
use uncloud_proto::{
    clock::WallTime,
    ids::{ControllerId, HostId, ImageId, Incarnation, Revision, VmId},
};
use uuid::Uuid;

fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(0x1111_0000_0000_4000_8000_0000_0000_0000 + n)
}

fn vm_id() -> VmId {
    VmId::from_uuid(uuid(1))
}

fn host_id() -> HostId {
    HostId::from_uuid(uuid(2))
}

fn image_id() -> ImageId {
    ImageId::from_uuid(uuid(3))
}

const AT: WallTime = WallTime(1_700_000_000_123);

/// A VM with every field set.
fn vm() -> VmRecord {
    VmRecord {
        id: vm_id(),
        name: "web-1".into(),
        owner: "shop".into(),
        labels: [("tier".to_owned(), "front".to_owned())].into(),
        spec: VmSpec {
            vcpus: 2,
            memory_mib: 2048,
            machine: Machine::Q35,
            kernel: Some(KernelBoot { image: image_id(), command_line: "console=ttyS0".into() }),
            disks: vec![
                Disk {
                    name: "root".into(),
                    pool: "shared".into(),
                    size_bytes: 10 << 30,
                    image: Some(image_id()),
                    ..Default::default()
                },
                Disk {
                    name: "data".into(),
                    pool: "shared".into(),
                    size_bytes: 1 << 30,
                    kept_generation: Some(0),
                    ..Default::default()
                },
            ],
            nics: vec![Nic { kind: NicKind::User, mac: "42:00:00:00:00:01".into() }],
            restart: RestartPolicy::OnFailure,
            failover: Failover::Fast,
            on_disk_loss: OnDiskLoss::Recreate,
            priority: 10,
            host_labels: [("zone".to_owned(), "a".to_owned())].into(),
            anti_affinity_group: Some("web".into()),
            stop_grace_seconds: 60,
            display: Display::Standard,
            guest_agent: GuestAgent::Enabled,
            firmware: Firmware::Uefi,
            cpu: CpuModel::V3,
            disk_hotplug: Default::default(),
            cloud_init: Some(CloudInit {
                hostname: "web-1.example.org".into(),
                ssh_authorized_keys: vec!["ssh-ed25519 AAAA me".into()],
                user_data: "#cloud-config\n{}\n".into(),
                network_config: "version: 2\n".into(),
                extra: Extra::new(),
            }),
            extra: Extra::new(),
        },
        pending: Some(PendingSpec {
            memory_mib: Some(1024),
            failover: Some(Failover::Patient),
            ..PendingSpec::default()
        }),
        desired: Desired::Running,
        migration: Some(Migration {
            target: HostId::from_uuid(uuid(7)),
            incarnation: Incarnation(9),
            since: AT,
            why: "the only host that can take it".into(),
            secret: "ab".repeat(32),
            bytes_per_second: 100 << 20,
            arrival: Arrival::Listening,
            address: "10.0.0.2:49152".into(),
            disk_generation: Some(2),
            disks_address: "10.0.0.2:49153".into(),
            handed_over: Some(AT),
            extra: Extra::new(),
        }),
        reserved: Incarnation(9),
        placement: Placement {
            host: Some(host_id()),
            incarnation: Incarnation(3),
            why: "the most free memory of 2 hosts".into(),
            since: AT,
        },
        restarts: 1,
        restart_force: true,
        stop_force: false,
        paused: false,
        moving_out: Incarnation::NONE,
        disks_exist: true,
        disk_home: Some(DiskHome { host: host_id(), pools: [("shared".to_owned(), Some(uuid(4)))].into() }),
        disk_generation: 1,
        disks_reserved: 2,
        disks_copied_from: Some(0),
        clone_of: None,
        snapshots: Vec::new(),
        revert: None,
        reverts: 0,
        disk_orders: 0,
        created: AT,
        extra: Extra::new(),
    }
}

/// A VM whose disks are being copied.
fn clone_vm() -> VmRecord {
    let clone_of = Some(CloneOf {
        vm: VmId::from_uuid(uuid(9)),
        name: "web-0".into(),
        disk_generation: 1,
        kept_generations: [("data".to_owned(), 0)].into(),
        snapshot: Some(uuid(10)),
        home: DiskHome { host: host_id(), pools: [("shared".to_owned(), Some(uuid(4)))].into() },
    });
    VmRecord { clone_of, ..small_vm() }
}

/// A VM with nothing that can be left out.
fn small_vm() -> VmRecord {
    VmRecord {
        labels: BTreeMap::new(),
        spec: VmSpec {
            machine: Machine::Pc,
            kernel: None,
            disks: Vec::new(),
            nics: Vec::new(),
            restart: RestartPolicy::Never,
            failover: Failover::Hold,
            on_disk_loss: OnDiskLoss::Wait,
            priority: 0,
            host_labels: BTreeMap::new(),
            anti_affinity_group: None,
            display: Display::None,
            guest_agent: GuestAgent::Disabled,
            firmware: Firmware::Bios,
            cpu: CpuModel::V2,
            cloud_init: None,
            disk_hotplug: Default::default(),
            ..vm().spec
        },
        pending: None,
        desired: Desired::Stopped,
        migration: None,
        reserved: Incarnation::NONE,
        placement: Placement { host: None, incarnation: Incarnation::NONE, why: "created stopped".into(), since: AT },
        restarts: 0,
        restart_force: false,
        moving_out: Incarnation::NONE,
        disks_exist: false,
        disk_home: None,
        disk_generation: 0,
        disks_reserved: 0,
        disks_copied_from: None,
        ..vm()
    }
}

fn status() -> VmStatusRecord {
    VmStatusRecord {
        phase: Phase::Failed,
        reason: "QEMU ended: no such file".into(),
        since: AT,
        incarnation: Incarnation(3),
        addresses: vec!["10.0.2.15".into()],
        last_exit: Some(LastExit { code: -1, signal: 9, reason: "killed".into(), at: AT }),
        next_attempt: Some(WallTime(AT.0 + 10_000)),
        paused: false,
        restarts_done: 2,
        migration: Some(MigrationProgress {
            incarnation: Incarnation(9),
            transferred_bytes: 91 << 20,
            remaining_bytes: 1 << 20,
            bytes_per_second: 100 << 20,
            expected_downtime_ms: 300,
        }),
        last_migration: Some(MigrationEnd {
            incarnation: Incarnation(8),
            target: HostId::from_uuid(uuid(7)),
            result: MigrationResult::GivenUp,
            reason: "a user cancelled it".into(),
            at: AT,
        }),
        extra: Extra::new(),
    }
}

fn host() -> HostRecord {
    HostRecord {
        id: host_id(),
        name: "host-1".into(),
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        vcpus: 16,
        memory_mib: 65_536,
        pools: vec![
            Pool {
                name: "default".into(),
                shared_id: None,
                capacity_bytes: 1 << 40,
                problem: "read-only".into(),
                access: PoolAccess::Directory,
            },
            Pool {
                name: "shared".into(),
                shared_id: Some(uuid(4)),
                capacity_bytes: 1 << 42,
                problem: String::new(),
                access: PoolAccess::Directory,
            },
        ],
        accelerator: Accelerator { kind: AcceleratorKind::Kvm, why: "a million loops took 1 ms".into() },
        mode: HostMode::Cordoned,
        mode_reason: "new memory".into(),
        drain_how: Default::default(),
        drain_disks: Default::default(),
        liveness: Liveness::FastLapsed,
        liveness_since: AT,
        migration_address: "10.0.0.1".into(),
        cpu: Cpu { name: "A CPU".into(), features: ["avx2".to_owned()].into(), fingerprint: "00ff".into() },
        bridges: ["br0".into()].into(),
        agent_version: "0.1.0".into(),
        boot_id: uuid(5),
        created: AT,
        extra: Extra::new(),
    }
}

fn image(kind: ImageKind) -> ImageRecord {
    let file = |role, source: &str, format, virtual_size_bytes| ImageFile {
        role,
        source: source.into(),
        sha256: "0123456789abcdef".repeat(4),
        size_bytes: 5_000_000,
        format,
        virtual_size_bytes,
    };
    let (files, command_line) = match kind {
        ImageKind::Disk => {
            (vec![file(FileRole::Disk, "/images/debian.qcow2", Some(DiskFormat::Qcow2), Some(2 << 30))], "")
        }
        ImageKind::Kernel => (
            vec![
                file(FileRole::Kernel, "pool:shared/vmlinuz", None, None),
                file(FileRole::Initrd, "pool:shared/initrd", None, None),
            ],
            "console=ttyS0",
        ),
    };
    ImageRecord {
        id: image_id(),
        name: "debian".into(),
        kind,
        files,
        command_line: command_line.into(),
        created: AT,
        state: ImageState::Ready,
        reason: String::new(),
        extra: Extra::new(),
    }
}

/// Compares a record with its golden file, and its stored form with both.
fn golden<T: Serialize>(name: &str, key: &Key, value: &T, record: &Record) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/records/{name}.json"));
    let pretty = format!("{}\n", serde_json::to_string_pretty(value).unwrap());
    if std::env::var_os("UNCLOUD_UPDATE_GOLDEN").is_some() {
        fs::write(&path, &pretty).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(pretty, expected, "{} has changed", path.display());

    assert_eq!(record.to_json(), serde_json::to_vec(value).unwrap(), "{name} is stored as it is shown here");
    let read = Record::from_json(key, expected.as_bytes()).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(&read, record, "{name} reads back");
}

#[test]
fn every_record_is_stored_as_it_was_when_it_was_released() {
    for (name, record) in [("vm", vm()), ("vm-small", small_vm()), ("vm-clone", clone_vm())] {
        golden(name, &Key::Vm(vm_id()), &record, &Record::Vm(Arc::new(record.clone())));
    }
    golden("vm-status", &Key::VmStatus(vm_id()), &status(), &Record::VmStatus(Arc::new(status())));
    let name = Key::VmName { owner: "shop".into(), name: "web-1".into() };
    golden("vm-name", &name, &vm_id(), &Record::VmName(vm_id()));
    golden("mac", &Key::Mac("42:00:00:00:00:01".into()), &vm_id(), &Record::Mac(vm_id()));
    golden("host", &Key::Host(host_id()), &host(), &Record::Host(Arc::new(host())));
    for (name, kind) in [("image-disk", ImageKind::Disk), ("image-kernel", ImageKind::Kernel)] {
        golden(name, &Key::Image(image_id()), &image(kind), &Record::Image(Arc::new(image(kind))));
    }
    for (name, answer) in [
        ("request-vm", RequestAnswer::Vm { id: vm_id(), record: Box::new(small_vm()) }),
        ("request-image", RequestAnswer::Image { id: image_id() }),
    ] {
        let record = RequestRecord { fingerprint: "ab".repeat(32), answer, at: AT, extra: Extra::new() };
        golden(name, &Key::Request("r".into()), &record, &Record::Request(Arc::new(record.clone())));
    }
    for (name, subject) in [("event-vm", Subject::Vm(vm_id())), ("event-cluster", Subject::Cluster)] {
        let event = EventRecord {
            subject,
            subject_name: "web-1".into(),
            kind: EventType::FailedOver,
            message: "host `host-1` is down (its fast lease ran out); moved to host `host-2`".into(),
            time: AT,
            extra: Extra::new(),
        };
        let key = Key::Event { subject: subject.uuid(), base: Revision(7), n: 0 };
        golden(name, &key, &event, &Record::Event(Arc::new(event.clone())));
    }
    let id = ControllerId::from_uuid(uuid(6));
    let leader = LeaderRecord { id, address: "127.0.0.1:7400".into(), since: AT, extra: Extra::new() };
    golden("leader", &Key::Leader, &leader, &Record::Leader(Arc::new(leader.clone())));
    let cluster =
        ClusterRecord { fast_lease_ms: 6000, patient_lease_ms: 60_000, failover_off: None, extra: Extra::new() };
    golden("cluster", &Key::Cluster, &cluster, &Record::Cluster(Arc::new(cluster.clone())));
}

#[test]
fn fields_of_a_newer_program_survive() {
    let read = |key: &Key, name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/records/{name}.json"));
        let mut value: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        change(&mut value);
        let record = Record::from_json(key, &serde_json::to_vec(&value).unwrap()).unwrap();
        let again: serde_json::Value = serde_json::from_slice(&record.to_json()).unwrap();
        assert_eq!(again, value, "{name}");
    };
    let add = |value: &mut serde_json::Value| value["from_tomorrow"] = serde_json::json!({"a": [1, null]});
    for (key, name) in [
        (Key::VmStatus(vm_id()), "vm-status"),
        (Key::Host(host_id()), "host"),
        (Key::Image(image_id()), "image-disk"),
        (Key::Request("r".into()), "request-vm"),
        (Key::Event { subject: vm_id().uuid(), base: Revision(7), n: 0 }, "event-vm"),
        (Key::Leader, "leader"),
        (Key::Cluster, "cluster"),
    ] {
        read(&key, name, &add);
    }
    read(&Key::Vm(vm_id()), "vm", &|value| {
        add(value);
        add(&mut value["spec"]);
    });
}

#[test]
fn a_record_under_the_wrong_key_is_not_taken() {
    let other = VmId::from_uuid(uuid(9));
    let json = Record::Vm(Arc::new(vm())).to_json();
    assert!(Record::from_json(&Key::Vm(other), &json).is_err());
    for garbage in ["", "{}", "null", "[1,2", "\u{0}", "{\"id\":7}"] {
        assert!(Record::from_json(&Key::Vm(vm_id()), garbage.as_bytes()).is_err(), "{garbage}");
        assert!(Record::from_json(&Key::Host(host_id()), garbage.as_bytes()).is_err(), "{garbage}");
        assert!(Record::from_json(&Key::Mac("m".into()), garbage.as_bytes()).is_err(), "{garbage}");
    }
}
