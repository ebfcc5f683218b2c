//! The copying of a guest's disk to another host, which is gone all of a sudden: the guest must not notice.

use std::{net::SocketAddr, path::Path, process::Command, time::Duration};

use rustix::process::Signal;
use tokio::{net::TcpListener, time};
use uncloud_agent::{
    qemu::{command_line::Begin, process::Instance},
    storage::place::Place,
    vm::migration::{DisksTo, Guest, MigrateTo, Mirror, Nodes, Step},
};
use uncloud_proto::ids::Incarnation;

use crate::{
    migration::{HERE, SECRET, take, try_step, until},
    support::{Host, signal, within},
};

/// So slowly that it lasts.
const RATE: u64 = 2 << 20;

/// A host whose guest has a disk with something on it.
fn host() -> Host {
    let host = Host::new();
    let Place::File { path } = &host.spec.disks[0].place else { panic!("a file") };
    run("qemu-img", &["resize", "-q"], path, &["32M"]);
    run("qemu-io", &["-c", "write -q -P 7 4M 24M"], path, &[]);
    host
}

fn run(program: &str, before: &[&str], path: &Path, after: &[&str]) {
    let done = Command::new(program).args(before).arg(path).args(after).status().unwrap();
    assert!(done.success(), "{program}: {done}");
}

fn nodes() -> Nodes {
    Nodes { copied: vec!["disk0".into()], shared: Vec::new() }
}

fn send_to(address: SocketAddr) -> Step {
    let disks = Some(DisksTo { address, nodes: nodes() });
    Step::Send(MigrateTo { incarnation: Incarnation(4), address, secret: SECRET.into(), bytes_per_second: RATE, disks })
}

/// A target that takes disks, and where.
async fn target() -> (Host, Instance, SocketAddr) {
    let mut target = host();
    target.spec.begin = Begin::Incoming;
    target.describe();
    let waiting = target.start().await;
    take(&target, &waiting, Step::Listen { secret: SECRET.into(), disks: nodes() }).await;
    let listens = until(&waiting, "the target to take disks", |s| s.disks_address.is_some()).await;
    (target, waiting, listens.disks_address.unwrap())
}

#[tokio::test]
async fn a_guest_does_not_wait_for_a_target_that_is_gone_and_the_copying_can_be_called_off() {
    let source = host();
    let running = source.start().await;
    source.wait_for_beats(1).await;
    let (target, _waiting, address) = target().await;
    take(&source, &running, send_to(address)).await;
    until(&running, "some of it to be copied", |s| s.progress.transferred_bytes > 1 << 20).await;
    // As a host without power: no answer, and no end of the connection either.
    signal(target.qemu_pid(), Signal::STOP);
    source.wait_for_more_beats(3).await;
    // Within seconds, while TCP has patience for minutes.
    let over = time::timeout(Duration::from_secs(10), async {
        take(&source, &running, Step::Cancel).await;
        until(&running, "nothing to be left of it", |s| s.mirror == Mirror::None && s.guest == Guest::Executes).await
    });
    over.await.expect("it is called off although the target does not answer");
    source.wait_for_more_beats(2).await;
    signal(target.qemu_pid(), Signal::CONT);
}

#[tokio::test]
async fn a_target_that_cannot_be_reached_costs_the_guest_nothing() {
    let source = host();
    let running = source.start().await;
    source.wait_for_beats(1).await;
    let free = TcpListener::bind((HERE.address, 0)).await.unwrap();
    let address = free.local_addr().unwrap();
    // It takes the connection, and says nothing.
    let error = within("a step", try_step(&source, &running, send_to(address))).await.unwrap_err();
    assert!(error.to_string().contains("timeout"), "{error}");
    drop(free);
    let error = within("a step", try_step(&source, &running, send_to(address))).await.unwrap_err();
    assert!(error.to_string().contains("do the hosts reach each other?"), "{error}");
    until(&running, "nothing to be left of it", |s| s.mirror == Mirror::None && s.guest == Guest::Executes).await;
    source.wait_for_more_beats(2).await;
}
