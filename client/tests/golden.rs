//! What people read, compared with the files in `tests/golden`. `UPDATE_GOLDEN=1 cargo test` writes them anew; say in
//! the commit why they changed.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::{fs, path::PathBuf};

use uncloud_client::{
    cli,
    output::{self, Columns, json},
};
use uncloud_proto::{clock::WallTime, timestamp_from_millis, v1};

fn check(name: &str, text: &str) {
    let text = &format!("{}\n", text.trim_end_matches('\n'));
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(*text, golden, "{} differs; UPDATE_GOLDEN=1 writes it anew", path.display());
}

/// 2026-11-24T12:00:00Z.
const NOW: u64 = 1_795_521_600_000;

fn ago(seconds: u64) -> Option<prost_types::Timestamp> {
    Some(timestamp_from_millis(NOW - seconds * 1000))
}

fn id(n: u32) -> String {
    format!("{n:08x}-8b86-4d11-b42d-00c04fc964ff")
}

fn running() -> v1::Vm {
    let spec = v1::VmSpec {
        vcpus: 2,
        memory_mib: 1536,
        machine: "q35".to_owned(),
        kernel: Some(v1::KernelBoot { image: id(7), command_line: "console=ttyS0 quiet".to_owned() }),
        disks: vec![
            v1::Disk {
                name: "disk0".into(),
                pool: "default".into(),
                size_bytes: 10 << 30,
                image: id(8),
                bus: v1::DiskBus::Virtio.into(),
                cache: v1::DiskCache::None.into(),
                ..Default::default()
            },
            v1::Disk {
                name: "data".into(),
                pool: "fast".into(),
                size_bytes: 16 << 20,
                bus: v1::DiskBus::Scsi.into(),
                cache: v1::DiskCache::Writeback.into(),
                state: v1::DiskState::Detached.into(),
                id: id(6),
                ..Default::default()
            },
        ],
        nics: vec![
            v1::Nic { r#type: v1::NicType::User.into(), mac: "42:00:00:00:00:01".into(), bridge: String::new() },
            v1::Nic { r#type: v1::NicType::Bridge.into(), mac: "42:00:00:00:00:02".into(), bridge: "br0".into() },
        ],
        restart: v1::RestartPolicy::OnFailure.into(),
        failover: v1::FailoverPolicy::Fast.into(),
        on_disk_loss: v1::DiskLossPolicy::Recreate.into(),
        priority: 5,
        host_labels: [("rack".to_owned(), "1".to_owned())].into(),
        anti_affinity_group: "web".to_owned(),
        stop_grace_seconds: 60,
        display: v1::DisplayType::Standard.into(),
        guest_agent: v1::GuestAgentMode::Enabled.into(),
        firmware: v1::Firmware::Uefi.into(),
        cpu: v1::CpuModel::X8664V2.into(),
        cloud_init: Some(v1::CloudInit {
            hostname: "web-1".to_owned(),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA me".to_owned()],
            user_data: "#cloud-config\n".to_owned(),
            network_config: String::new(),
        }),
        disk_hotplug: v1::DiskHotplug::Enabled.into(),
    };
    let next_spec = v1::VmSpec { memory_mib: 2048, failover: v1::FailoverPolicy::Hold.into(), ..spec.clone() };
    v1::Vm {
        id: id(1),
        name: "web-1".to_owned(),
        owner: "default".to_owned(),
        labels: [("tier".to_owned(), "front".to_owned()), ("app".to_owned(), "web".to_owned())].into(),
        spec: Some(spec),
        desired: v1::PowerState::Running.into(),
        placement: Some(v1::Placement {
            host_id: id(0x10),
            host_name: "host-1".to_owned(),
            incarnation: 3,
            why: "most free memory of 3 hosts".to_owned(),
            since: ago(125),
        }),
        status: Some(v1::VmStatus {
            phase: v1::VmPhase::Running.into(),
            since: ago(120),
            incarnation: 3,
            addresses: vec!["10.0.2.15".to_owned(), "2001:db8::5".to_owned()],
            last_exit: Some(v1::LastExit {
                code: -1,
                signal: 9,
                reason: "killed: the lease ran out".into(),
                at: ago(131),
            }),
            ..Default::default()
        }),
        created: ago(90_000),
        revision: 4711,
        pending_restart: vec!["spec.memory_mib".to_owned(), "spec.failover".to_owned()],
        next_spec: Some(next_spec),
        snapshots: vec![v1::Snapshot {
            id: id(9),
            name: "before-upgrade".into(),
            created: ago(600),
            state: v1::SnapshotState::Ready.into(),
            guest: v1::SnapshotGuest::Frozen.into(),
        }],
        ..Default::default()
    }
}

/// With everything that somebody could try to write to a terminal.
fn pending() -> v1::Vm {
    v1::Vm {
        id: id(2),
        name: "db".to_owned(),
        owner: "alice".to_owned(),
        spec: Some(v1::VmSpec { vcpus: 1, memory_mib: 4096, ..Default::default() }),
        desired: v1::PowerState::Running.into(),
        status: Some(v1::VmStatus {
            phase: v1::VmPhase::Pending.into(),
            reason: "3 hosts: 2 lack 4096 MiB\x1b[2J of memory\r\n, 1 is \u{202e}cordoned\x07".to_owned(),
            ..Default::default()
        }),
        created: ago(5),
        ..Default::default()
    }
}

fn host() -> v1::Host {
    v1::Host {
        id: id(0x10),
        name: "host-1".to_owned(),
        labels: [("rack".to_owned(), "1".to_owned())].into(),
        capacity: Some(v1::Resources { vcpus: 8, memory_mib: 16384 }),
        promised: Some(v1::Resources { vcpus: 2, memory_mib: 1536 }),
        pools: vec![v1::Pool {
            name: "default".to_owned(),
            kind: v1::PoolKind::Shared.into(),
            id: id(0x20),
            capacity_bytes: 100 << 30,
            free_bytes: 42 << 30,
            problem: String::new(),
            export_address: String::new(),
        }],
        accelerator: Some(v1::Accelerator {
            kind: v1::AcceleratorKind::Kvm.into(),
            why: "1000000 loops in 3 ms".into(),
        }),
        mode: v1::HostMode::Cordoned.into(),
        state: v1::HostState::Up.into(),
        reason: "new memory on Tuesday".to_owned(),
        agent_version: "0.1.0".to_owned(),
        vms: 1,
        last_heartbeat_ms: 350,
        created: ago(7200),
        ..Default::default()
    }
}

fn event() -> v1::Event {
    v1::Event {
        revision: 4700,
        subject_kind: v1::SubjectKind::Host.into(),
        subject_id: id(0x11),
        subject_name: "host-2".to_owned(),
        r#type: "HostDead".to_owned(),
        message: "no heartbeat for 7.06 s".to_owned(),
        time: ago(126),
    }
}

#[test]
fn help_of_every_command() {
    fn walk(command: &clap::Command, path: &str) {
        let mut command = command.clone().bin_name(path.replace('_', " ")).term_width(100);
        check(&format!("help/{path}.txt"), &command.render_long_help().to_string());
        for sub in command.get_subcommands().filter(|c| c.get_name() != "help") {
            walk(sub, &format!("{path}_{}", sub.get_name()));
        }
    }
    let mut definition = cli::definition();
    definition.build();
    walk(&definition, "uncloud");
}

#[test]
fn tables_of_vms() {
    let now = WallTime(NOW);
    let both = [running(), pending()];
    check("vm-list.txt", &output::vms(&both, Columns::OneOwner, now));
    check("vm-list-all-owners.txt", &output::vms(&both, Columns::AllOwners, now));
    check("vm-list-empty.txt", &output::vms(&[], Columns::OneOwner, now));
    check("vm-show.txt", &output::show_vm(&running(), now));
    check("vm-show-pending.txt", &output::show_vm(&pending(), now));
    check("vm-lines.txt", &both.iter().map(|vm| output::vm_line(vm) + "\n").collect::<String>());
    let refusal = |reason: &str, count, hosts: &[&str]| v1::HostRefusal {
        reason: reason.to_owned(),
        count,
        hosts: hosts.iter().map(|h| (*h).to_owned()).collect(),
    };
    let answer = v1::ExplainVmResponse {
        vm: Some(pending()),
        summary: "Pending: 23 hosts: 22 lack 4096 MiB of memory, 1 is cordoned".to_owned(),
        refusals: vec![refusal("lacks memory", 22, &["host-1", "host-2"]), refusal("is cordoned", 1, &["host-3"])],
        candidates: vec!["host-4".to_owned()],
    };
    check("vm-explain.txt", &output::explain(&answer));
}

#[test]
fn tables_of_hosts_images_and_the_cluster() {
    let now = WallTime(NOW);
    let down = v1::Host {
        id: id(0x11),
        name: "host-2".to_owned(),
        mode: v1::HostMode::Active.into(),
        state: v1::HostState::Down.into(),
        reason: "no heartbeat for 7.06 s".to_owned(),
        ..Default::default()
    };
    check("host-list.txt", &output::hosts(&[host(), down.clone()], now));
    check("host-lines.txt", &[host(), down].iter().map(|h| output::host_line(h) + "\n").collect::<String>());
    let answer = v1::GetHostResponse { host: Some(host()), vms: vec![running()] };
    check("host-show.txt", &output::show_host(&answer, now));

    let vm = |name: &str, outcome: v1::SimulatedOutcome, to: &str, reason: &str| v1::SimulatedVm {
        vm_id: id(1),
        name: name.to_owned(),
        owner: "default".to_owned(),
        from_host: "host-1".to_owned(),
        outcome: outcome.into(),
        to_host: to.to_owned(),
        reason: reason.to_owned(),
        vcpus: 2,
        memory_mib: 1536,
        priority: 5,
    };
    let answer = v1::SimulateHostFailureResponse {
        summary: "1 of 3 VMs would move, 1 would wait for room elsewhere, 1 would wait for their hosts".to_owned(),
        warnings: vec!["failover is switched off: nothing would move for the next 60 s".to_owned()],
        vms: vec![
            vm("web-1", v1::SimulatedOutcome::MovesWithNewDisks, "host-2", "the only host that can take it"),
            vm("db", v1::SimulatedOutcome::Pending, "", "1 host: 1 lacks 1536 MiB of memory"),
            vm("dns", v1::SimulatedOutcome::Unreachable, "", "`failover: hold` keeps it on its host"),
        ],
        more: 0,
        revision: 12,
    };
    check("host-what-if.txt", &output::what_if(&answer));

    let file = |role: v1::ImageFileRole, source: &str, size_bytes| v1::ImageFile {
        role: role.into(),
        source: source.to_owned(),
        sha256: "ab".repeat(32),
        size_bytes,
        ..Default::default()
    };
    let kernel = v1::Image {
        id: id(7),
        name: "debian-kernel".to_owned(),
        kind: v1::ImageKind::Kernel.into(),
        files: vec![
            file(v1::ImageFileRole::Kernel, "/srv/vmlinuz", 8 << 20),
            file(v1::ImageFileRole::Initrd, "/srv/initrd.img", 3 << 19),
        ],
        command_line: "console=ttyS0".to_owned(),
        created: ago(3600),
        revision: 12,
        state: v1::ImageState::Ready.into(),
        reason: String::new(),
    };
    let mut disk = file(v1::ImageFileRole::Disk, "pool:default/debian.qcow2", 300 << 20);
    disk.format = v1::ImageFormat::Qcow2.into();
    disk.virtual_size_bytes = 2 << 30;
    let disk = v1::Image {
        id: id(8),
        name: "debian".to_owned(),
        kind: v1::ImageKind::Disk.into(),
        files: vec![disk],
        created: ago(30),
        state: v1::ImageState::Fetching.into(),
        ..Default::default()
    };
    let progress = v1::ImageProgress {
        done_bytes: 150 << 20,
        total_bytes: 300 << 20,
        host_name: "host-1".into(),
        note: String::new(),
    };
    check("image-list.txt", &output::images(&[disk.clone(), kernel.clone()], now));
    check("image-show-kernel.txt", &output::show_image(&kernel, None, now));
    check("image-show-disk.txt", &output::show_image(&disk, Some(&progress), now));

    let mut status = v1::GetStatusResponse {
        leader: Some(v1::Leader { id: id(0x30), address: "127.0.0.1:7400".to_owned(), term: 3, since: ago(600) }),
        version: "0.1.0".to_owned(),
        hosts: vec![
            v1::HostCount { state: "up".to_owned(), count: 2 },
            v1::HostCount { state: "down".to_owned(), count: 1 },
        ],
        vms: vec![v1::VmCount { phase: v1::VmPhase::Running.into(), count: 12 }],
        brake: Some(v1::Brake { engaged: false, heard: 2, total: 3, since: None }),
        fast_lease_ms: 6000,
        patient_lease_ms: 60_000,
        revision: 4711,
        ..Default::default()
    };
    check("status.txt", &output::status(&status, now));
    status.brake = Some(v1::Brake { engaged: true, heard: 1, total: 3, since: ago(20) });
    status.unreadable_count = 2;
    let key = "/uncloud/v1/vms/x".to_owned();
    status.unreadable = vec![v1::UnreadableRecord { key, error: "expected value at line 1 column 1".to_owned() }];
    status.warnings = vec!["The brake is on: 2 of 3 hosts are silent.".to_owned()];
    check("status-trouble.txt", &output::status(&status, now));
    check("events.txt", &output::events([&event(), &event()]));
}

#[test]
fn json_of_answers() {
    let list = v1::ListVmsResponse { vms: vec![running()], next_page_token: String::new(), revision: 4711 };
    check("vm-list.json", &json::pretty(&list));
    check("vm-list-empty.json", &json::pretty(&v1::ListVmsResponse::default()));
    let step = v1::WatchEventsResponse { revision: 4700, step: Some(v1::watch_events_response::Step::Event(event())) };
    check("event-watch.json", &json::line(&step));
}
