//! Every call about a VM or a host, with input that makes no sense: a status with the right code that names the field, and nothing
//! has changed.

use harness::{prelude::*, refusal::check};
use tonic::{Response, Status};
use uncloud_proto::v1::{FailoverMode, VmPhase};

/// A VM or a host is named by a reference; each of these is wrong in its own way.
const BAD_REFERENCES: [(&str, &str, Code); 6] = [
    ("nothing", "", Code::InvalidArgument),
    ("a path", "../../etc/passwd", Code::InvalidArgument),
    ("control characters", "a\0b", Code::InvalidArgument),
    ("a huge one", LONG, Code::InvalidArgument),
    ("a UUID that nobody has", "6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a11", Code::NotFound),
    ("half a UUID", "6f3c0f0a-24a5-4d3c", Code::NotFound),
];
const LONG: &str = match std::str::from_utf8(&[b'x'; 70_000]) {
    Ok(text) => text,
    Err(_) => "",
};
/// What is no name of a snapshot, or of a VM.
const BAD_NAMES: [&str; 4] = ["", "../x", "a\n\u{1b}[31mb", LONG];

/// The first thing that a call says, if that is no answer.
trait Refused {
    async fn refused(self) -> Option<Status>;
}

impl<T> Refused for Result<Response<T>, Status> {
    async fn refused(self) -> Option<Status> {
        self.err()
    }
}

/// A call that answers with a stream may refuse in it.
struct Stream<T>(Result<Response<tonic::Streaming<T>>, Status>);

impl<T> Refused for Stream<T> {
    async fn refused(self) -> Option<Status> {
        match self.0 {
            Ok(stream) => tokio::time::timeout(secs(10), stream.into_inner().message()).await.ok()?.err(),
            Err(status) => Some(status),
        }
    }
}

async fn expect(what: &str, call: impl Refused, code: Code, field: &str) -> anyhow::Result<()> {
    let status = call.refused().await.with_context(|| format!("{what} was taken"))?;
    check(what, &status, code, field);
    Ok(())
}

fn only<T>(message: T) -> tokio_stream::Once<T> {
    tokio_stream::once(message)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_names_no_vm_or_host_is_told_so_by_every_call() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let (api, owner) = (&cluster.api, String::new);
    for (what, reference, code) in BAD_REFERENCES {
        let vm = || reference.to_owned();
        let name = |call: &str| format!("{call}: {what}");
        let field = if code == Code::InvalidArgument { "vm" } else { "" };
        macro_rules! call {
            ($method:ident, $request:ident { $($field:ident: $value:expr),* }) => {{
                let request = v1::$request { vm: vm(), owner: owner(), $($field: $value),* };
                expect(&name(stringify!($method)), api.vms().$method(request).await, code, field).await?;
            }};
        }
        call!(
            update_vm,
            UpdateVmRequest { revision: 0, update_mask: mask(&["labels"]), labels: Default::default(), spec: None }
        );
        call!(restart_vm, RestartVmRequest { force: false });
        call!(pause_vm, PauseVmRequest {});
        call!(resume_vm, ResumeVmRequest {});
        call!(migrate_vm, MigrateVmRequest { host: String::new(), bytes_per_second: 0 });
        call!(cancel_migration, CancelMigrationRequest {});
        call!(resize_disk, ResizeDiskRequest { disk: "disk0".into(), size_bytes: 1 << 30 });
        call!(create_snapshot, CreateSnapshotRequest { snapshot: "s".into() });
        call!(delete_snapshot, DeleteSnapshotRequest { snapshot: "s".into() });
        call!(revert_to_snapshot, RevertToSnapshotRequest { snapshot: "s".into() });
        call!(clone_vm, CloneVmRequest { request_id: String::new(), name: "copy".into(), snapshot: String::new() });
        let open_field = if code == Code::InvalidArgument { "open.vm" } else { "" };
        let log = v1::GetVmLogRequest { vm: vm(), ..Default::default() };
        expect(&name("get_vm_log"), Stream(api.vms().get_vm_log(log).await), code, field).await?;
        let shot = v1::ScreenshotRequest { vm: vm(), owner: owner() };
        expect(&name("screenshot"), Stream(api.vms().screenshot(shot).await), code, field).await?;
        let open = v1::ConsoleOpen { vm: vm(), ..Default::default() };
        let console = v1::ConsoleRequest { message: Some(v1::console_request::Message::Open(open)) };
        expect(&name("console"), Stream(api.vms().console(only(console)).await), code, open_field).await?;
        let open = v1::VncOpen { vm: vm(), ..Default::default() };
        let vnc = v1::VncRequest { message: Some(v1::vnc_request::Message::Open(open)) };
        expect(&name("vnc"), Stream(api.vms().vnc(only(vnc)).await), code, open_field).await?;

        let host = vm;
        let field = if code == Code::InvalidArgument { "host" } else { "" };
        let drain = v1::DrainHostRequest { host: host(), ..Default::default() };
        expect(&name("drain_host"), Stream(api.hosts().drain_host(drain).await), code, field).await?;
        let get = v1::GetHostRequest { host: host() };
        expect(&name("get_host"), api.hosts().get_host(get).await, code, field).await?;
        let uncordon = v1::UncordonHostRequest { host: host() };
        expect(&name("uncordon_host"), api.hosts().uncordon_host(uncordon).await, code, field).await?;
        let remove = v1::RemoveHostRequest { host: host() };
        expect(&name("remove_host"), api.hosts().remove_host(remove).await, code, field).await?;
        let field = if code == Code::InvalidArgument { "hosts[0]" } else { "" };
        let simulate = v1::SimulateHostFailureRequest { hosts: vec![host()] };
        expect(&name("simulate"), api.hosts().simulate_host_failure(simulate).await, code, field).await?;
    }
    cluster.finish().await
}

fn mask(paths: &[&str]) -> Option<prost_types::FieldMask> {
    Some(prost_types::FieldMask { paths: paths.iter().map(ToString::to_string).collect() })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_of_a_vm_is_refused_by_name_and_changes_nothing() -> anyhow::Result<()> {
    use Code::{AlreadyExists, FailedPrecondition as Precondition, InvalidArgument as Invalid, NotFound};
    let cluster = Options::hosts(1).start().await?;
    let api = &cluster.api;
    let still = cluster.run(specs::micro("still")).await?;
    api.stop(&still.id).await?;
    api.wait_phase(&still.id, VmPhase::Stopped, secs(30)).await?;
    let runs = cluster.run(specs::micro("runs")).await?;
    let before = [api.vm(&still.id).await?, api.vm(&runs.id).await?];
    let (vm, owner) = (|| still.id.clone(), String::new);

    for bad in BAD_NAMES {
        let what = format!("a name like {:?}", bad.chars().take(20).collect::<String>());
        let snapshot = || bad.to_owned();
        let create = v1::CreateSnapshotRequest { vm: vm(), owner: owner(), snapshot: snapshot() };
        expect(&what, api.vms().create_snapshot(create).await, Invalid, "snapshot").await?;
        let delete = v1::DeleteSnapshotRequest { vm: vm(), owner: owner(), snapshot: snapshot() };
        expect(&what, api.vms().delete_snapshot(delete).await, Invalid, "snapshot").await?;
        let revert = v1::RevertToSnapshotRequest { vm: vm(), owner: owner(), snapshot: snapshot() };
        expect(&what, api.vms().revert_to_snapshot(revert).await, Invalid, "snapshot").await?;
        let clone = v1::CloneVmRequest { vm: vm(), name: snapshot(), ..Default::default() };
        expect(&what, api.vms().clone_vm(clone).await, Invalid, "name").await?;
    }
    let clone = |name: &str, snapshot: &str| v1::CloneVmRequest {
        vm: vm(),
        name: name.into(),
        snapshot: snapshot.into(),
        ..Default::default()
    };
    expect("a taken name", api.vms().clone_vm(clone("runs", "")).await, AlreadyExists, "runs").await?;
    expect("no such snapshot", api.vms().clone_vm(clone("copy", "none")).await, Invalid, "snapshot").await?;
    let huge = v1::CloneVmRequest { request_id: "x".repeat(129), ..clone("copy", "") };
    expect("a huge request id", api.vms().clone_vm(huge).await, Invalid, "request_id").await?;
    let none = v1::RevertToSnapshotRequest { vm: vm(), owner: owner(), snapshot: "none".into() };
    expect("no such snapshot", api.vms().revert_to_snapshot(none).await, Invalid, "snapshot").await?;

    // The last one is smaller than the disk.
    for size_bytes in [0, 1000, u64::MAX, 512] {
        let resize = v1::ResizeDiskRequest { vm: vm(), owner: owner(), disk: "disk0".into(), size_bytes };
        expect(&format!("{size_bytes} bytes"), api.vms().resize_disk(resize).await, Invalid, "size_bytes").await?;
    }
    for disk in ["../x", "", "disk9"] {
        let resize = v1::ResizeDiskRequest { vm: vm(), owner: owner(), disk: disk.into(), size_bytes: 1 << 30 };
        expect(&format!("disk {disk:?}"), api.vms().resize_disk(resize).await, Invalid, "disk").await?;
    }

    let update = |paths: &[&str], spec: Option<v1::VmSpec>| v1::UpdateVmRequest {
        vm: vm(),
        update_mask: mask(paths),
        spec,
        ..Default::default()
    };
    expect("no mask", api.vms().update_vm(update(&[], None)).await, Invalid, "update_mask").await?;
    let odd = update(&["spec.nothing"], None);
    expect("an unknown path", api.vms().update_vm(odd).await, Invalid, "update_mask.paths[0]").await?;
    let many = update(&["spec.vcpus"], Some(v1::VmSpec { vcpus: u32::MAX, ..Default::default() }));
    expect("CPUs without bounds", api.vms().update_vm(many).await, Invalid, "spec.vcpus").await?;
    let old =
        v1::UpdateVmRequest { revision: 1, labels: [("a".into(), "b".into())].into(), ..update(&["labels"], None) };
    expect("an old revision", api.vms().update_vm(old).await, Code::Aborted, "").await?;

    let migrate =
        |vm: &str, host: &str| v1::MigrateVmRequest { vm: vm.into(), host: host.into(), ..Default::default() };
    expect("it does not run", api.vms().migrate_vm(migrate("still", "")).await, Precondition, "").await?;
    expect("no other host", api.vms().migrate_vm(migrate("runs", "")).await, Precondition, "").await?;
    expect("to where it is", api.vms().migrate_vm(migrate("runs", "host-1")).await, Precondition, "host-1").await?;
    expect("to nowhere", api.vms().migrate_vm(migrate("runs", "host-9")).await, NotFound, "host-9").await?;
    expect("a bad host", api.vms().migrate_vm(migrate("runs", "../x")).await, Invalid, "host").await?;
    let cancel = v1::CancelMigrationRequest { vm: runs.id.clone(), owner: owner() };
    expect("no migration", api.vms().cancel_migration(cancel).await, Precondition, "").await?;
    let pause = v1::PauseVmRequest { vm: vm(), owner: owner() };
    expect("a stopped guest", api.vms().pause_vm(pause).await, Precondition, "").await?;

    // The first message must say which VM, and nothing else.
    let input = v1::ConsoleRequest { message: Some(v1::console_request::Message::Input(vec![0; 10])) };
    expect("input first", Stream(api.vms().console(only(input)).await), Invalid, "").await?;
    let data = v1::VncRequest { message: Some(v1::vnc_request::Message::Data(vec![0; 10])) };
    expect("data first", Stream(api.vms().vnc(only(data)).await), Invalid, "").await?;

    let drain = v1::DrainHostRequest { host: "host-1".into(), reason: "x".repeat(100_000), ..Default::default() };
    expect("a huge reason", Stream(api.hosts().drain_host(drain).await), Invalid, "reason").await?;
    let hosts = v1::SimulateHostFailureRequest { hosts: Vec::new() };
    expect("no hosts", api.hosts().simulate_host_failure(hosts).await, Invalid, "hosts").await?;
    let hosts = v1::SimulateHostFailureRequest { hosts: vec!["host-1".into(); 100_000] };
    expect("many hosts", api.hosts().simulate_host_failure(hosts).await, Invalid, "hosts").await?;
    let mode = v1::SetFailoverRequest { mode: 77, ..Default::default() };
    expect("an unknown mode", api.cluster().set_failover(mode).await, Invalid, "mode").await?;
    let long = v1::SetFailoverRequest { mode: FailoverMode::Off.into(), for_seconds: u32::MAX, reason: "x".into() };
    expect("off for ever", api.cluster().set_failover(long).await, Invalid, "for_seconds").await?;

    let after = [api.vm(&still.id).await?, api.vm(&runs.id).await?];
    for (before, after) in before.iter().zip(&after) {
        assert_eq!((before.revision, &before.spec, &before.snapshots), (after.revision, &after.spec, &after.snapshots));
    }
    let hosts = api.list_hosts().await?;
    assert!(hosts.iter().all(|h| h.mode() == v1::HostMode::Active), "{hosts:?}");
    cluster.finish().await
}
