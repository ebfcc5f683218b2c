//! Orders, and the real daemon. That a guest's QEMU is cut off, and stays so, is shown in `integration-tests/`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{os::unix::process::ExitStatusExt, process::Command, sync::Arc};

use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    daemon::{Daemon, Error, Options},
    plan::{Disk, Have, Name},
    *,
};
use crate::vm::fake;

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
    assert_eq!(goal(&exports.wants()[&vm()], None), Goal::Nothing);
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

    fn agent(&self) -> Daemon {
        let options = Options {
            program: "qemu-storage-daemon".into(),
            dir: self.dir.path().join("exports"),
            address: ([127, 0, 0, 1], self.port).into(),
            user: None,
        };
        Daemon::new(options, Arc::new(Notify::new()))
    }

    fn disk(&self) -> Disk {
        Disk { name: "root".into(), node: "d1".into(), path: self.dir.path().join("disk"), size_bytes: 1 << 20 }
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
    exports.want(vm(), desired.clone());
    let wants = exports.wants().clone();
    let made = |size_bytes| {
        let disks = Ok(vec![Disk { size_bytes, ..real.disk() }]);
        let now = Order::of(&desired);
        BTreeMap::from([(vm(), Made { desired: Box::new(desired.clone()), now, disks, at: Instant::now() })])
    };
    let problem = || exports.served().borrow()[&vm()].problem.clone();
    for size in [1 << 20, 2 << 20] {
        exports.pass(&mut daemon, &wants, &made(size), &mut stuck).await.unwrap();
        assert_eq!((problem(), daemon.sizes().await.unwrap()["d1"]), (String::new(), size));
        assert!(real.reads(&name(1)) && stuck.is_empty());
    }
    let too_large = made(1 << 62);
    for _ in 0..2 {
        exports.pass(&mut daemon, &wants, &too_large, &mut stuck).await.unwrap();
        assert!(problem().contains("disk root does not grow"), "{}", problem());
        assert!(real.reads(&name(1)));
    }
    let since = stuck["d1"].1;
    exports.pass(&mut daemon, &wants, &too_large, &mut stuck).await.unwrap();
    assert_eq!(stuck["d1"].1, since, "it is not tried each time");
}
