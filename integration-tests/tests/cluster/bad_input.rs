//! Bad input of every kind gets its status code and a message that names the field, and the system goes on.

use std::{fs, path::PathBuf, process::Command};

use harness::{api::host_of, paths, prelude::*, refusal::check, specs::with};
use uncloud_proto::v1::{Disk, ImageFileRole, KernelBoot, Nic, PowerState, VmPhase, VmSpec};

/// One row: what is wrong, the code, the field that must be named, the request.
type Row<T> = (&'static str, Code, &'static str, T);

fn vm(change: impl FnOnce(&mut VmSpec)) -> v1::CreateVmRequest {
    with(specs::micro("good"), change)
}

fn request(change: impl FnOnce(&mut v1::CreateVmRequest)) -> v1::CreateVmRequest {
    let mut request = specs::micro("good");
    change(&mut request);
    request
}

fn bad_vms() -> Vec<Row<v1::CreateVmRequest>> {
    use Code::{InvalidArgument as Invalid, NotFound};
    let disk = |d: Disk| vm(|s| s.disks = vec![d]);
    vec![
        ("no name", Invalid, "name", request(|r| r.name.clear())),
        ("a huge name", Invalid, "name", request(|r| r.name = "x".repeat(100_000))),
        ("a name with slashes", Invalid, "name", request(|r| r.name = "../../etc".into())),
        ("a name with control characters", Invalid, "name", request(|r| r.name = "a\n\u{1b}[31mb".into())),
        ("a name like a UUID", Invalid, "name", request(|r| r.name = "6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a11".into())),
        ("an owner with a slash", Invalid, "owner", request(|r| r.owner = "a/b".into())),
        ("a huge request id", Invalid, "request_id", request(|r| r.request_id = "x".repeat(129))),
        ("no spec", Invalid, "spec", request(|r| r.spec = None)),
        ("an unknown power state", Invalid, "desired", request(|r| r.desired = 77)),
        ("a label with a bad key", Invalid, "labels[a/b]", request(|r| r.labels.extend([("a/b".into(), "x".into())]))),
        ("no memory", Invalid, "spec.memory_mib", vm(|s| s.memory_mib = 0)),
        ("memory without bounds", Invalid, "spec.memory_mib", vm(|s| s.memory_mib = u64::MAX)),
        ("CPUs without bounds", Invalid, "spec.vcpus", vm(|s| s.vcpus = u32::MAX)),
        ("an unknown machine", Invalid, "spec.machine", vm(|s| s.machine = "isapc,dump-guest-core=on".into())),
        ("a negative restart policy", Invalid, "spec.restart", vm(|s| s.restart = -1)),
        ("an unknown failover policy", Invalid, "spec.failover", vm(|s| s.failover = 9)),
        ("priority over the top", Invalid, "spec.priority", vm(|s| s.priority = 1001)),
        ("endless grace", Invalid, "spec.stop_grace_seconds", vm(|s| s.stop_grace_seconds = 3601)),
        ("too many disks", Invalid, "spec.disks", vm(|s| s.disks = vec![Disk::default(); 17])),
        ("a disk of nothing", Invalid, "spec.disks[0].size_bytes", disk(Disk::default())),
        ("an odd disk", Invalid, "spec.disks[0].size_bytes", disk(Disk { size_bytes: 1000, ..Disk::default() })),
        (
            "a huge disk",
            Invalid,
            "spec.disks[0].size_bytes",
            disk(Disk { size_bytes: u64::MAX - 511, ..Disk::default() }),
        ),
        ("an unknown bus", Invalid, "spec.disks[0].bus", disk(Disk { bus: 77, size_bytes: 512, ..Disk::default() })),
        (
            "an unknown cache mode",
            Invalid,
            "spec.disks[0].cache",
            disk(Disk { cache: -1, size_bytes: 512, ..Disk::default() }),
        ),
        (
            "writeback in a shared pool",
            Invalid,
            "spec.disks[0].cache",
            disk(Disk { cache: v1::DiskCache::Writeback.into(), size_bytes: 512, ..Disk::default() }),
        ),
        (
            "a disk that is detached from the beginning",
            Invalid,
            "spec.disks[0].state",
            disk(Disk { state: v1::DiskState::Detached.into(), size_bytes: 512, ..Disk::default() }),
        ),
        (
            "a pool that climbs",
            Invalid,
            "spec.disks[0].pool",
            disk(Disk { pool: "../x".into(), size_bytes: 512, ..Disk::default() }),
        ),
        (
            "a disk name that climbs",
            Invalid,
            "spec.disks[0].name",
            disk(Disk { name: "../x".into(), size_bytes: 512, ..Disk::default() }),
        ),
        ("an image that is not there", NotFound, "nowhere", disk(Disk { image: "nowhere".into(), ..Disk::default() })),
        (
            "a kernel that is not there",
            NotFound,
            "nowhere",
            vm(|s| s.kernel = Some(KernelBoot { image: "nowhere".into(), command_line: String::new() })),
        ),
        (
            "a disk used as a kernel",
            Invalid,
            "spec.kernel.image",
            vm(|s| s.kernel = Some(KernelBoot { image: specs::MICRO.into(), command_line: String::new() })),
        ),
        (
            "a kernel command line with a line break",
            Invalid,
            "spec.kernel.command_line",
            vm(|s| s.kernel = Some(KernelBoot { image: specs::MICRO.into(), command_line: "a\nb".into() })),
        ),
        ("too many NICs", Invalid, "spec.nics", vm(|s| s.nics = vec![Nic::default(); 9])),
        (
            "a MAC of the user's",
            Invalid,
            "spec.nics[0].mac",
            vm(|s| s.nics = vec![Nic { mac: "52:54:00:12:34:56".into(), ..Nic::default() }]),
        ),
    ]
}

/// A VM is named by a reference; each of these is wrong in its own way.
const BAD_REFERENCES: [(&str, &str, Code); 5] = [
    ("nothing", "", Code::InvalidArgument),
    ("a path", "../../etc/passwd", Code::InvalidArgument),
    ("control characters", "a\0b", Code::InvalidArgument),
    ("a UUID that nobody has", "6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a11", Code::NotFound),
    ("half a UUID", "6f3c0f0a-24a5-4d3c", Code::NotFound),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_request_is_refused_by_name_and_nothing_is_made() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let api = &cluster.api;
    for (what, code, field, request) in bad_vms() {
        let status = api.create(request).await.err().with_context(|| format!("{what} was taken"))?;
        check(what, &status, code, field);
    }
    for (what, reference, code) in BAD_REFERENCES {
        let field = if code == Code::InvalidArgument { "vm" } else { "" };
        let name = reference.to_owned();
        let get = v1::GetVmRequest { vm: name.clone(), ..Default::default() };
        let start = v1::StartVmRequest { vm: name.clone(), ..Default::default() };
        let stop = v1::StopVmRequest { vm: name.clone(), ..Default::default() };
        let delete = v1::DeleteVmRequest { vm: name.clone(), ..Default::default() };
        let explain = v1::ExplainVmRequest { vm: name.clone(), ..Default::default() };
        let attached = Disk { size_bytes: 512, ..Disk::default() };
        let attach = v1::AttachDiskRequest { vm: name.clone(), disk: Some(attached), ..Default::default() };
        let detach = v1::DetachDiskRequest { vm: name.clone(), disk: "disk0".into(), ..Default::default() };
        let refused = [
            api.vms().attach_disk(attach).await.err(),
            api.vms().detach_disk(detach).await.err(),
            api.vms().get_vm(get).await.err(),
            api.vms().start_vm(start).await.err(),
            api.vms().stop_vm(stop).await.err(),
            api.vms().delete_vm(delete).await.err(),
            api.vms().explain_vm(explain).await.err(),
        ];
        for status in refused {
            check(what, &status.with_context(|| format!("{what} was taken"))?, code, field);
        }
        let field = if code == Code::InvalidArgument { "host" } else { "" };
        let cordon = v1::CordonHostRequest { host: name, ..Default::default() };
        let status = api.hosts().cordon_host(cordon).await.err();
        check(what, &status.with_context(|| format!("{what} was taken"))?, code, field);
    }
    let pages = [("page_size", 5000, ""), ("page_token", 10, "no such token")];
    for (field, page_size, token) in pages {
        let list = v1::ListVmsRequest { page_size, page_token: token.into(), ..Default::default() };
        match api.vms().list_vms(list).await {
            // A page that is too large may also be made smaller.
            Ok(answer) => assert!(field == "page_size" && answer.get_ref().vms.len() <= 1000, "{field}"),
            Err(status) => check(field, &status, Code::InvalidArgument, field),
        }
    }
    // Bytes that are no protobuf, a method that there is not, a message without end: an answer, no crash.
    raw_requests(&cluster).await?;

    let left = api.vms().list_vms(v1::ListVmsRequest::default()).await?.into_inner().vms;
    assert!(left.is_empty(), "a refused request left {left:?}");
    let vm = cluster.run(specs::micro("good")).await?;
    for (what, field, disk) in bad_disks_to_attach() {
        let request = v1::AttachDiskRequest { vm: vm.id.clone(), disk, ..Default::default() };
        let status = api.vms().attach_disk(request).await.err().with_context(|| format!("{what} was taken"))?;
        check(what, &status, Code::InvalidArgument, field);
    }
    for (what, disk) in [
        ("no disk", ""),
        ("a disk that climbs", "../x"),
        ("a disk that it has not", "disk7"),
        ("the boot disk", "disk0"),
    ] {
        let request = v1::DetachDiskRequest { vm: vm.id.clone(), disk: disk.into(), ..Default::default() };
        let status = api.vms().detach_disk(request).await.err().with_context(|| format!("{what} was taken"))?;
        check(what, &status, Code::InvalidArgument, "disk");
    }
    assert_eq!(api.vm(&vm.id).await?.spec, vm.spec, "what was refused has changed nothing");
    cluster.finish().await
}

fn bad_disks_to_attach() -> Vec<(&'static str, &'static str, Option<Disk>)> {
    let new = || Disk { size_bytes: 512, ..Disk::default() };
    vec![
        ("no disk", "disk", None),
        ("a disk of nothing", "disk.size_bytes", Some(Disk::default())),
        ("an odd disk", "disk.size_bytes", Some(Disk { size_bytes: 511, ..Disk::default() })),
        ("a disk without bounds", "disk.size_bytes", Some(Disk { size_bytes: u64::MAX, ..Disk::default() })),
        ("more than the pool may promise", "disk.size_bytes", Some(Disk { size_bytes: 60 << 40, ..Disk::default() })),
        ("a name that climbs", "disk.name", Some(Disk { name: "../x".into(), ..new() })),
        ("a name that is taken", "disk.name", Some(Disk { name: "disk0".into(), ..new() })),
        ("a pool that climbs", "disk.pool", Some(Disk { pool: "../x".into(), ..new() })),
        ("a pool that is not there", "disk.pool", Some(Disk { pool: "nowhere".into(), ..new() })),
        ("an image", "disk.image", Some(Disk { image: specs::MICRO.into(), ..new() })),
        ("an unknown bus", "disk.bus", Some(Disk { bus: 77, ..new() })),
        ("a bus of what is stopped", "disk.bus", Some(Disk { bus: v1::DiskBus::Virtio.into(), ..new() })),
        ("an unknown cache mode", "disk.cache", Some(Disk { cache: -1, ..new() })),
        ("writeback in a shared pool", "disk.cache", Some(Disk { cache: v1::DiskCache::Writeback.into(), ..new() })),
        ("a state", "disk.state", Some(Disk { state: v1::DiskState::Detached.into(), ..new() })),
        ("a target number", "disk.unit", Some(Disk { unit: 7, ..new() })),
        ("an id", "disk.id", Some(Disk { id: "../x".into(), ..new() })),
        ("a number of an order", "disk.order", Some(Disk { order: u64::MAX, ..new() })),
    ]
}

/// What no generated client would send.
async fn raw_requests(cluster: &Cluster) -> anyhow::Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let endpoint = cluster.api.endpoint();
    for garbage in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\xff\xff\xff"]
    {
        let mut stream = tokio::net::TcpStream::connect(endpoint).await?;
        stream.write_all(garbage).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        // It may answer or hang up; it must not keep the connection for ever.
        let read = tokio::time::timeout(secs(10), stream.read_to_end(&mut answer)).await;
        read.context("the controller keeps a connection that says nothing").map(drop)?;
    }
    let huge = request(|r| r.labels.extend((0..200_000).map(|n| (format!("label-{n}"), "x".repeat(100)))));
    let status = cluster.api.create(huge).await.err().context("a request of 20 MB was taken")?;
    assert!(!matches!(status.code(), Code::Internal | Code::Ok), "{status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_is_refused_with_its_file_named() -> anyhow::Result<()> {
    let cluster = Options::hosts(2).start().await?;
    let dir = cluster.images();
    let good = paths::guest("micro.img")?;
    fs::copy(&good, dir.join("good.img"))?;
    fs::create_dir(dir.join("directory"))?;
    std::os::unix::fs::symlink("/etc/passwd", dir.join("link.img"))?;
    let backed = dir.join("backed.qcow2");
    let overlay = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    ensure!(Command::new("qemu-img").args(overlay).arg(&good).arg(&backed).status()?.success());
    fs::write(dir.join("broken.qcow2"), b"QFI\xfb and then nothing of the kind")?;

    let image = |file: &str| specs::disk_image("bad", &PathBuf::from(file));
    let inside = |file: &str| image(&dir.join(file).display().to_string());
    let change = |mut r: v1::CreateImageRequest, f: &dyn Fn(&mut v1::CreateImageRequest)| {
        f(&mut r);
        r
    };
    use Code::{AlreadyExists, FailedPrecondition as Precondition, InvalidArgument as Invalid, NotFound};
    let table: Vec<(&str, &[Code], &str, v1::CreateImageRequest)> = vec![
        ("no name", &[Invalid], "name", change(inside("good.img"), &|r| r.name.clear())),
        ("no kind", &[Invalid], "kind", change(inside("good.img"), &|r| r.kind = 0)),
        ("no files", &[Invalid], "files", change(inside("good.img"), &|r| r.files.clear())),
        ("no role", &[Invalid], "files[0].role", change(inside("good.img"), &|r| r.files[0].role = 0)),
        ("a path that climbs", &[Invalid], "files[0].source", inside("../pool/../../x")),
        ("a pool path that climbs", &[Invalid], "files[0].source", image("pool:default/../../etc/passwd")),
        ("a relative path", &[Invalid], "files[0].source", image("good.img")),
        ("an address of another kind", &[Invalid], "files[0].source", image("ftp://example.org/x.img")),
        ("a path with a zero byte", &[Invalid], "files[0].source", image("/x\0y")),
        (
            "a short sha256",
            &[Invalid],
            "files[0].sha256",
            change(inside("good.img"), &|r| r.files[0].sha256 = "abc".into()),
        ),
        (
            "a wrong sha256",
            &[Invalid, Precondition],
            "files[0].sha256",
            change(inside("good.img"), &|r| r.files[0].sha256 = "0".repeat(64)),
        ),
        ("a file that is not there", &[NotFound, Invalid, Precondition], "files[0].source", inside("missing.img")),
        ("a pool that is not there", &[NotFound, Invalid, Precondition], "files[0].source", image("pool:nvme/x.img")),
        (
            "a file from elsewhere",
            &[Invalid, Precondition, Code::PermissionDenied],
            "files[0].source",
            image("/etc/passwd"),
        ),
        (
            "a link to elsewhere",
            &[Invalid, Precondition, Code::PermissionDenied],
            "files[0].source",
            inside("link.img"),
        ),
        ("a directory", &[Invalid, Precondition], "files[0].source", inside("directory")),
        ("an image with a backing file", &[Invalid, Precondition], "files[0].source", inside("backed.qcow2")),
        (
            "a broken qcow2",
            &[Invalid, Precondition],
            "files[0].source",
            change(inside("broken.qcow2"), &|r| {
                r.files[0].set_format(v1::ImageFormat::Qcow2);
            }),
        ),
        (
            "a name that is taken",
            &[AlreadyExists],
            specs::MICRO,
            change(inside("good.img"), &|r| r.name = specs::MICRO.into()),
        ),
        (
            "two disks",
            &[Invalid],
            "files",
            change(inside("good.img"), &|r| {
                let mut second = r.files[0].clone();
                second.set_role(ImageFileRole::Disk);
                r.files.push(second);
            }),
        ),
    ];
    for (what, codes, field, request) in table {
        let status = match cluster.api.images().create_image(request).await {
            Ok(answer) => bail!("{what} was taken: {:?}", answer.into_inner()),
            Err(status) => status,
        };
        assert!(codes.contains(&status.code()), "{what}: {status}");
        check(what, &status, status.code(), field);
    }
    // Missing image, and one that is in use.
    let delete = |image: &str| v1::DeleteImageRequest { image: image.into() };
    let status = cluster.api.images().delete_image(delete("nowhere")).await.err().context("deleted")?;
    check("delete an image that is not there", &status, NotFound, "nowhere");
    let vm = cluster.run(specs::micro("user")).await?;
    let status = cluster.api.images().delete_image(delete(specs::MICRO)).await.err().context("deleted")?;
    check("delete an image in use", &status, Precondition, "");
    cluster.api.delete(&vm.id).await?;
    cluster.api.wait_gone(&vm.id, secs(20)).await?;
    cluster.api.images().delete_image(delete(specs::MICRO)).await?;

    // The same file by its path in the pool, with the right sum, in capitals.
    fs::copy(&good, cluster.pool().join("good.img"))?;
    let sum = Command::new("sha256sum").arg(&good).output()?;
    let sum = String::from_utf8(sum.stdout)?.split_whitespace().next().context("a sum")?.to_uppercase();
    let request = change(specs::disk_image(specs::MICRO, &PathBuf::from("pool:default/good.img")), &|r| {
        r.files[0].sha256.clone_from(&sum);
    });
    cluster.api.images().create_image(request).await?;
    cluster.run(specs::micro("from-the-pool")).await?;
    cluster.finish().await
}

/// A file system of one MiB.
struct TinyDisk(tempfile::TempDir);

impl TinyDisk {
    fn mount() -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "a mount needs root: run the tests as root");
        let dir = tempfile::Builder::new().prefix("uncloud-test-tiny-").tempdir()?;
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m,mode=0755", "tiny"]).arg(dir.path()).status()?;
        ensure!(status.success(), "mount: {status}");
        Ok(Self(dir))
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_the_reason_that_is_given_and_the_vm_starts_when_there_is_room() -> anyhow::Result<()> {
    let tiny = TinyDisk::mount()?;
    let pool = format!("tiny={}", tiny.0.path().display());
    let add = |_: usize, h: &mut harness::agent::HostOptions| h.args = vec!["--pool".into(), pool.clone()];
    let cluster = Options::hosts(1).each_host(add).start().await?;
    let ballast = tiny.0.path().join("ballast");
    fs::write(&ballast, vec![0; 900 << 10])?;

    let full = with(specs::micro("full"), |s| s.disks[0].pool = "tiny".into());
    let vm = cluster.api.create(full).await?;
    let failed = cluster
        .api
        .wait_vm(&vm.id, "says that the disk is full", secs(20), |vm| {
            let status = vm.status.clone().unwrap_or_default();
            status.phase() == VmPhase::Failed && status.next_attempt.is_some()
        })
        .await?;
    let reason = failed.status.unwrap_or_default().reason;
    eprintln!("{reason}");
    assert!(reason.contains("full") && reason.contains("tiny"), "{reason}");
    // It does not stand in the way of others, and half an image is not taken for a whole one.
    cluster.run(specs::micro("beside")).await?;
    fs::remove_file(&ballast)?;
    cluster.api.wait_running(&vm.id, secs(60)).await?;
    cluster.checker.wait_beats(&vm.id, 1, secs(20)).await?;
    cluster.finish().await?;
    drop(tiny);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_etcd_is_reported_and_left_alone() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    // A person must look at a record that cannot be read.
    cluster.allow_error("record");
    let vm = cluster.run(specs::micro("healthy")).await?;
    let mut etcd = cluster.etcd.as_ref().context("an etcd")?.client().await?;
    let garbage = [
        ("/uncloud/v1/vms/6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a11", &b"{ not json"[..]),
        ("/uncloud/v1/vms/not-a-uuid", b"{}"),
        ("/uncloud/v1/hosts/6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a12", b"[1,2,3]"),
        ("/uncloud/v1/images/6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a13", &[0xff, 0xfe, 0x00]),
    ];
    cluster.controller.kill();
    for (key, value) in garbage {
        etcd.put(key, value, None).await?;
    }
    cluster.controller.start_again().await?;
    cluster.wait_hosts().await?;
    let status = cluster.api.cluster().get_status(v1::GetStatusRequest {}).await?.into_inner();
    assert_eq!(status.unreadable_count, 4, "{:?}", status.unreadable);
    for (key, value) in garbage {
        assert!(
            status.unreadable.iter().any(|u| u.key == key && !u.error.is_empty()),
            "{key} in {:?}",
            status.unreadable
        );
        let kept = etcd.get(key, None).await?;
        assert_eq!(kept.kvs()[0].value(), value, "{key} was changed");
    }
    assert!(!status.warnings.is_empty(), "an operator should be told");
    cluster.api.wait_running(&vm.id, secs(10)).await?;
    cluster.run(specs::micro("another")).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_local_record_costs_neither_the_host_nor_the_data() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).default_leases().start().await?;
    cluster.allow_error("record");
    let broken = cluster.run(specs::micro("broken")).await?;
    let healthy = cluster.run(specs::micro("healthy")).await?;
    cluster.checker.wait_beats(&broken.id, 2, secs(10)).await?;
    let calm = cluster.checker.running(&healthy.id).context("it runs")?;

    let host = cluster.host_of(&broken)?;
    host.kill();
    let record = host.state_dir().join("vms").join(&broken.id).join("record.json");
    let whole = fs::read(&record)?;
    fs::write(&record, &whole[..whole.len() / 2])?;
    host.start_again()?;
    cluster.wait_hosts().await?;

    // The healthy one is not touched; the other one runs, once, on its disk (the checker judges at the end).
    cluster.checker.wait_beats(&healthy.id, 8, secs(20)).await?;
    let now = cluster.checker.running(&healthy.id).context("it runs")?;
    assert_eq!((now.pid, now.start), (calm.pid, calm.start));
    let back = cluster.api.wait_running(&broken.id, secs(60)).await?;
    assert_eq!(host_of(&back), "host-1");
    cluster.checker.wait_beats(&broken.id, 2, secs(60)).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_stopped_first_and_deleted_never_touches_a_host() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let mut request = specs::micro("never-started");
    request.set_desired(PowerState::Stopped);
    let vm = cluster.api.create(request).await?;
    // Deleted twice at once, and again afterwards.
    let (first, second) = tokio::join!(cluster.api.delete(&vm.id), cluster.api.delete(&vm.id));
    for answer in [first, second] {
        if let Err(status) = answer {
            assert_eq!(status.code(), Code::NotFound, "{status}");
        }
    }
    cluster.api.wait_gone(&vm.id, secs(10)).await?;
    let status = cluster.api.delete(&vm.id).await.err().context("deleted again")?;
    assert_eq!(status.code(), Code::NotFound, "{status}");
    assert!(cluster.checker.instances(&vm.id).is_empty());
    cluster.finish().await
}
