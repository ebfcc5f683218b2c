//! Orders, and the real daemon. That a guest's QEMU is cut off, and stays so, is shown in `integration-tests/`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{os::unix::process::ExitStatusExt, process::Command, sync::Arc};

use tokio::sync::Notify;
use uncloud_proto::ids::HostId;
use uuid::Uuid;

use super::{
    daemon::{Daemon, Error, Options},
    plan::{Disk, Have, Name},
    *,
};
use crate::{
    storage::pools::{Kind, Pool},
    vm::{
        desired::{Disk as Wanted, Format},
        disks::{Orders, Revert, SnapshotOrder, Wanted as There},
        fake,
        starts::Starts,
    },
};

fn vm() -> VmId {
    VmId::from_uuid(Uuid::from_u128(7))
}

#[test]
fn n2_an_older_order_is_not_obeyed() {
    let exports = Exports::default();
    exports.want(vm(), fake::desired(3));
    exports.want(vm(), fake::desired(2));
    assert_eq!(exports.wants()[&vm()].incarnation(), Incarnation(3));
    exports.want(vm(), fake::desired(4));
    assert_eq!(exports.wants()[&vm()].incarnation(), Incarnation(4));
    // It is to be deleted, as incarnation 5: nobody is served it any more.
    exports.wants().insert(vm(), Want::Nothing { incarnation: Incarnation(5), nodes: Vec::new() });
    exports.want(vm(), fake::desired(4));
    assert_eq!(goal(&exports.wants()[&vm()], None, false), Goal::Nothing);
}

/// N5: the disks that its source had are those that the target goes on with, and nothing is made anew meanwhile.
#[test]
fn what_was_made_counts_for_the_incarnation_that_it_migrates_to_and_for_no_other() {
    let order = |incarnation, next: Option<u64>| {
        let desired = Desired { next: next.map(Incarnation), ..fake::desired(incarnation) };
        (Order::of(&desired), desired)
    };
    let ((now, desired), disks) = (order(1, None), Ok(Vec::new()));
    let mut made = Made { desired: Box::new(desired), now, disks, at: Instant::now() };
    assert!(made.are_of(&order(1, Some(2)).1) && !made.are_of(&order(2, None).1), "nobody has said that it migrates");
    made.now = order(1, Some(2)).0;
    assert!(made.are_of(&order(2, None).1) && made.are_of(&order(1, None).1) && !made.are_of(&order(3, None).1));
    let other = Desired { disk_generation: 9, ..order(2, None).1 };
    assert!(!made.are_of(&other));
}

/// The daemon of one test, which ends with it.
struct Real {
    dir: tempfile::TempDir,
    port: u16,
}

impl Real {
    fn new() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(disk).arg("1M").status();
        assert!(made.unwrap().success());
        Self { dir, port }
    }

    fn agent_options(&self) -> Options {
        Options {
            program: "qemu-storage-daemon".into(),
            dir: self.dir.path().join("exports"),
            address: ([127, 0, 0, 1], self.port).into(),
            user: None,
        }
    }

    fn agent(&self) -> Daemon {
        Daemon::new(self.agent_options(), Arc::new(Notify::new()))
    }

    fn disk(&self) -> Disk {
        Disk {
            name: "root".into(),
            node: "d1".into(),
            path: self.dir.path().join("disk"),
            format: Format::Qcow2,
            size_bytes: 1 << 20,
        }
    }

    /// With a pool `p` that it exports.
    fn storage(&self) -> Arc<Storage> {
        self.storage_with("qemu-img".into())
    }

    fn storage_with(&self, qemu_img: std::path::PathBuf) -> Arc<Storage> {
        let path = self.dir.path().join("pool");
        std::fs::create_dir_all(&path).unwrap();
        crate::storage::pools::init(&path, "p", Uuid::from_u128(1)).unwrap();
        let address = ([127, 0, 0, 1], self.port).into();
        let options = crate::storage::Options {
            pools: vec![Pool { name: "p".into(), path, kind: Kind::Exported(address) }],
            image_dirs: Vec::new(),
            user: None,
            qemu_img,
            uefi_vars: self.dir.path().join("none"),
            host: HostId::from_uuid(Uuid::from_u128(2)),
            http: Err("no network here".into()),
            max_image_bytes: 1 << 30,
        };
        Arc::new(Storage::new(options, Starts::new(1)))
    }

    /// Whether a client of this export finds this byte at the beginning of the disk, or writes it there.
    fn io(&self, name: &Name, command: &str) -> bool {
        let uri = format!("nbd://127.0.0.1:{}/{name}", self.port);
        let output = Command::new("qemu-io").args(["-f", "raw", "-c", command, &uri]).output().unwrap();
        // It says that a pattern is another one, and ends well.
        output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
    }

    fn pid(&self) -> Option<u32> {
        let record = std::fs::read(self.dir.path().join("exports/daemon.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        u32::try_from(record["pid"].as_u64()?).ok()
    }

    fn kill(&self) {
        if let Some(pid) = self.pid() {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// What a client that asks for this export by name is told.
    fn reads(&self, name: &Name) -> bool {
        let uri = format!("nbd://127.0.0.1:{}/{name}", self.port);
        let status = Command::new("qemu-img").args(["info", "-f", "raw", &uri]).output().unwrap().status;
        assert_eq!(status.signal(), None);
        status.success()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.kill();
    }
}

fn name(incarnation: u64) -> Name {
    Name { vm: vm(), incarnation: Incarnation(incarnation), disk: "root".into() }
}

#[tokio::test]
async fn the_daemon_serves_what_it_was_told_outlives_its_agent_and_forgets_all_when_it_dies() {
    let real = Real::new();
    let mut agent = real.agent();
    assert_eq!(agent.have().await.unwrap(), Have::new());
    agent.add(&name(1), &real.disk()).await.unwrap();
    assert!(real.reads(&name(1)) && !real.reads(&name(2)));

    // The next agent finds it, and what it exports.
    drop(agent);
    let mut agent = real.agent();
    let have = agent.have().await.unwrap();
    assert_eq!(have, [(name(1).to_string(), "d1".to_owned())].into());
    let have = agent.revoke(&[name(1)]).await.unwrap();
    assert!(have.is_empty() && !real.reads(&name(1)));
    // Twice is the same as once.
    assert!(agent.revoke(&[name(1)]).await.unwrap().is_empty());
    agent.add(&name(2), &real.disk()).await.unwrap();
    assert!(real.reads(&name(2)) && !real.reads(&name(1)));

    // N5: while it migrates, another incarnation has the same disk beside it.
    agent.add(&name(3), &real.disk()).await.unwrap();
    assert!(real.reads(&name(2)) && real.reads(&name(3)));
    let have = agent.revoke(&[name(3)]).await.unwrap();
    assert_eq!(have.keys().collect::<Vec<_>>(), [&name(2).to_string()]);
    assert!(real.reads(&name(2)) && !real.reads(&name(3)));

    // It grows when nothing exports it.
    let larger = Disk { size_bytes: 2 << 20, ..real.disk() };
    assert_eq!(agent.sizes().await.unwrap()["d1"], 1 << 20);
    assert!(matches!(agent.grow(&larger).await.unwrap_err(), Error::Qmp(_)), "an export has one size");
    agent.revoke(&[name(2)]).await.unwrap();
    agent.grow(&larger).await.unwrap();
    agent.add(&name(2), &larger).await.unwrap();
    assert!(agent.sizes().await.unwrap()["d1"] == 2 << 20 && real.reads(&name(2)));

    // With another address it would serve nobody who knows the old one.
    let other = Options {
        program: "qemu-storage-daemon".into(),
        dir: real.dir.path().join("exports"),
        address: ([127, 0, 0, 2], real.port).into(),
        user: None,
    };
    let refused = Daemon::new(other, Arc::new(Notify::new())).have().await.unwrap_err();
    assert!(matches!(refused, Error::OtherAddress { .. }), "{refused}");

    let first = real.pid();
    real.kill();
    assert_eq!(agent.have().await.unwrap(), Have::new(), "a new one exports nothing by itself");
    assert_ne!(real.pid(), first);
    agent.add(&name(2), &real.disk()).await.unwrap();
    agent.revoke(&[name(2)]).await.unwrap();
    agent.close("d1").await.unwrap();
    agent.close("d1").await.unwrap();
    // Closed: its lock is gone, so others can open it.
    let open = Command::new("qemu-img").args(["info"]).arg(real.disk().path).output();
    assert!(open.unwrap().status.success());
}

#[tokio::test]
async fn a_daemon_that_cannot_serve_says_why() {
    let real = Real::new();
    let taken = std::net::TcpListener::bind(("127.0.0.1", real.port)).unwrap();
    let problem = real.agent().have().await.unwrap_err();
    let words = crate::vm::runner::chain(&problem);
    assert!(matches!(problem, Error::Ended { .. }) && words.contains("in use"), "{words}");
    drop(taken);
    assert!(real.agent().have().await.unwrap().is_empty());
}

/// One that cannot grow is served as it is, and whoever uses it is not cut off again and again.
#[tokio::test]
async fn a_disk_grows_before_it_is_said_to_be_served_and_one_that_cannot_is_served_and_says_why() {
    let (real, exports, desired) = (Real::new(), Exports::default(), fake::desired(1));
    let (mut daemon, mut stuck) = (real.agent(), Stuck::new());
    let (storage, mut chores) = (real.storage(), Chores::default());
    exports.want(vm(), desired.clone());
    let wants = exports.wants().clone();
    let made = |size_bytes| {
        let disks = Ok(vec![Disk { size_bytes, ..real.disk() }]);
        let now = Order::of(&desired);
        BTreeMap::from([(vm(), Made { desired: Box::new(desired.clone()), now, disks, at: Instant::now() })])
    };
    let problem = || exports.served().borrow()[&vm()].problem.clone();
    for size in [1 << 20, 2 << 20] {
        exports
            .pass(&mut daemon, &wants, (&made(size), &Making::default()), &mut stuck, (&mut chores, &storage))
            .await
            .unwrap();
        assert_eq!((problem(), daemon.sizes().await.unwrap()["d1"]), (String::new(), size));
        assert!(real.reads(&name(1)) && stuck.is_empty());
    }
    let too_large = made(1 << 62);
    for _ in 0..2 {
        exports
            .pass(&mut daemon, &wants, (&too_large, &Making::default()), &mut stuck, (&mut chores, &storage))
            .await
            .unwrap();
        assert!(problem().contains("disk root does not grow"), "{}", problem());
        assert!(real.reads(&name(1)));
    }
    let since = stuck["d1"].1;
    exports
        .pass(&mut daemon, &wants, (&too_large, &Making::default()), &mut stuck, (&mut chores, &storage))
        .await
        .unwrap();
    assert_eq!(stuck["d1"].1, since, "it is not tried each time");
}

/// What one host has exported, with all that it remembers.
struct Serving {
    real: Real,
    storage: Arc<Storage>,
    exports: Exports,
    daemon: Daemon,
    chores: Chores,
}

impl Serving {
    fn new() -> Self {
        let real = Real::new();
        let (storage, daemon) = (real.storage(), real.agent());
        Self { real, storage, exports: Exports::default(), daemon, chores: Chores::default() }
    }

    /// Does what is ordered, until there is nothing to wait for.
    async fn obey(&mut self, desired: &Desired) -> Served {
        self.exports.want(vm(), desired.clone());
        for _ in 0..2 {
            let wants = self.exports.wants().clone();
            let disks = self.storage.serve(vm(), desired).await.map_err(|e| e.reason());
            let made = Made { now: Order::of(desired), desired: Box::new(desired.clone()), disks, at: Instant::now() };
            let (made, tools) = (BTreeMap::from([(vm(), made)]), (&mut self.chores, &self.storage));
            self.exports
                .pass(&mut self.daemon, &wants, (&made, &Making::default()), &mut Stuck::new(), tools)
                .await
                .unwrap();
            self.chores.finished().await;
        }
        self.exports.served().borrow()[&vm()].clone()
    }
}

fn with_disks(incarnation: u64, disks: &[(&str, DiskState, u64)]) -> Desired {
    let mut desired = fake::desired(incarnation);
    let disk = |&(name, state, order): &(&str, DiskState, u64)| Wanted {
        name: name.into(),
        pool: "p".into(),
        size_bytes: 1 << 20,
        state,
        order,
        ..Wanted::default()
    };
    desired.spec.as_mut().unwrap().disks = disks.iter().map(disk).collect();
    desired
}

/// R4
#[tokio::test]
async fn disks_are_put_back_while_nobody_is_served_and_once() {
    let mut serving = Serving::new();
    let plain = with_disks(1, &[("root", DiskState::Attached, 0)]);
    assert_eq!(serving.obey(&plain).await.problem, "");
    assert!(serving.real.io(&name(1), "write -P 1 0 4k"));
    let snapshot = Uuid::from_u128(0x51);
    let snapshots = vec![SnapshotOrder { id: snapshot, wanted: There::There }];
    let take = Desired { orders: Orders { snapshots, ..Orders::default() }, ..plain.clone() };
    let served = serving.obey(&take).await;
    assert_eq!((served.done.made, served.problem.as_str(), served.trouble.as_str()), (vec![snapshot], "", ""));
    assert!(serving.real.io(&name(1), "write -P 2 0 4k"), "it is served all along");

    let revert = Some(Revert { snapshot, number: 1 });
    let put_back = Desired { orders: Orders { revert, ..Orders::default() }, ..plain.clone() };
    let served = serving.obey(&put_back).await;
    assert_eq!((served.done.reverted, served.problem.is_empty()), (1, false));
    assert!(!serving.real.reads(&name(1)), "until the leader says something else");
    // The guest runs again, as the next incarnation.
    let next = with_disks(2, &[("root", DiskState::Attached, 0)]);
    assert_eq!(serving.obey(&next).await.problem, "");
    assert!(serving.real.io(&name(2), "read -P 1 0 4k") && !serving.real.io(&name(2), "read -P 2 0 4k"));
    assert!(serving.real.io(&name(2), "write -P 3 0 4k"));
    // N2: an agent that knows nothing gets an order of before.
    let (exports, chores) = (Exports::default(), Chores::default());
    (serving.exports, serving.chores) = (exports, chores);
    assert_eq!(serving.obey(&put_back).await.done.reverted, 0);
    assert!(serving.real.io(&name(2), "read -P 3 0 4k"), "nothing is lost");

    // It cannot be done, and says so.
    let revert = Some(Revert { snapshot: Uuid::from_u128(0x52), number: 2 });
    let lost = Desired { orders: Orders { revert, ..Orders::default() }, ..next };
    let mut served = serving.obey(&lost).await;
    assert_eq!(served.done.reverted, 0);
    served = serving.obey(&lost).await;
    assert!(served.trouble.contains("has no snapshot"), "{served:?}");
}

/// D5
#[tokio::test]
async fn a_disk_comes_is_deleted_and_one_of_the_same_name_comes_again_while_the_others_are_served() {
    use DiskState::{Attached, Attaching, Deleting, Detached};
    let mut serving = Serving::new();
    let data = Name { disk: "data".into(), ..name(1) };
    let both = serving.obey(&with_disks(1, &[("root", Attached, 0), ("data", Attaching, 1)])).await;
    assert_eq!((both.done.disks, both.problem.as_str()), (vec![1], ""));
    assert!(serving.real.io(&data, "write -P 1 0 4k"));
    serving.obey(&with_disks(1, &[("root", Attached, 0), ("data", Detached, 0)])).await;
    assert!(serving.real.reads(&data), "N6");
    let files = |serving: &Serving| {
        std::fs::read_dir(serving.real.dir.path().join("pool/disks").join(vm().to_string())).unwrap().count()
    };
    assert_eq!(files(&serving), 2);
    let gone = serving.obey(&with_disks(1, &[("root", Attached, 0), ("data", Deleting, 2)])).await;
    assert_eq!((gone.done.disks, gone.problem.as_str(), files(&serving)), (vec![2], "", 1));
    assert!(!serving.real.reads(&data) && serving.real.reads(&name(1)));
    serving.obey(&with_disks(1, &[("root", Attached, 0), ("data", Attaching, 3)])).await;
    assert!(serving.real.io(&data, "read -P 0 0 4k"), "a new one");
}

/// Whoever deletes a VM whose disks are being made does not wait for that, and nothing is made after it.
#[tokio::test]
async fn what_nobody_waits_for_any_more_is_given_up() {
    use std::os::unix::fs::PermissionsExt as _;
    let real = Real::new();
    let never = real.dir.path().join("never");
    std::fs::write(&never, "#!/bin/sh\ntouch \"$0.begun\"\nexec sleep 600\n").unwrap();
    std::fs::set_permissions(&never, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (exports, storage, cancel) = (Exports::default(), real.storage_with(never.clone()), CancellationToken::new());
    let options = real.agent_options();
    let running = tokio::spawn(exports.clone().run(storage, options, cancel.clone()));
    exports.want(vm(), with_disks(1, &[("root", DiskState::Attached, 0)]));
    let begun = async {
        while !never.with_extension("begun").exists() {
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    time::timeout(Duration::from_secs(20), begun).await.expect("it is being made");
    exports.withdraw(vm(), Incarnation(1), Vec::new()).await.unwrap();
    cancel.cancel();
    running.await.unwrap();
}
