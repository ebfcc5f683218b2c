//! The serial console of a real guest.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use uncloud_agent::qemu::console::{Console, ConsoleHandle, OLD_LOG, follow_log, read_log, trim_log};

use crate::support::{Host, wait_for, within};

async fn read_until(output: &mut mpsc::Receiver<Bytes>, text: &str) -> String {
    let mut all = String::new();
    within(text, async {
        while !all.contains(text) {
            all += &String::from_utf8_lossy(&output.recv().await.expect("the console stays open"));
        }
    })
    .await;
    all
}

async fn type_until(console: &mut ConsoleHandle, text: &str) -> String {
    console.input.send(Bytes::copy_from_slice(text.as_bytes())).await.unwrap();
    read_until(&mut console.output, text).await
}

#[tokio::test]
async fn several_people_type_and_all_see_it() {
    let host = Host::with_echo();
    let console = Console::new(host.launch.vm_dir.clone());
    // Attached before there is anything.
    let mut first = console.attach(1000).await.unwrap();
    let _instance = host.start().await;
    wait_for("the guest", || host.read("run/serial.log").contains('!')).await;
    type_until(&mut first, "one").await;
    let mut second = console.attach(0).await.unwrap();
    type_until(&mut second, "two").await;
    assert_eq!(read_until(&mut first.output, "two").await, "two");
    // Everybody leaves; the next one finds the socket free.
    drop((first, second));
    let mut third = console.attach(6).await.unwrap();
    assert_eq!(read_until(&mut third.output, "two").await, "onetwo");
    type_until(&mut third, "three").await;
}

/// Whoever looks, types and then reads nothing must not stop the guest: a QEMU whose console is not drained does.
#[tokio::test]
async fn a_reader_that_does_not_read_stalls_nobody() {
    let host = Host::with_echo();
    let _instance = host.start().await;
    let console = Console::new(host.launch.vm_dir.clone());
    let lazy = console.attach(0).await.unwrap();
    let mut busy = console.attach(0).await.unwrap();
    wait_for("the guest", || host.read("run/serial.log").contains('!')).await;
    // Much more than the sockets' buffers hold, with an answer to each before the next: the port has a small buffer.
    type_until(&mut busy, "begin").await;
    let line = "y".repeat(8) + "\n";
    for n in 0..200 {
        type_until(&mut busy, &format!("{n:04}{line}")).await;
    }
    drop(lazy);
}

#[tokio::test]
async fn the_log_goes_on_while_it_is_trimmed_and_nobody_looks() {
    let host = Host::new();
    let _instance = host.start().await;
    host.wait_for_beats(2).await;
    let dir = &host.launch.vm_dir;
    let mut follower = follow_log(dir, 10_000).await.unwrap();
    read_until(&mut follower, "HB ").await;
    trim_log(dir, 10).await.unwrap();
    assert_eq!(host.read(OLD_LOG).len(), 10);
    host.wait_for_beats(1).await;
    read_until(&mut follower, "HB ").await;
    let log = host.read("run/serial.log");
    assert!(!log.contains('\0') && log.len() < 200, "QEMU goes on at the beginning: {log:?}");
    assert!(read_log(dir, 5000).await.unwrap().len() > log.len(), "with the end of the old one");
    tokio::time::timeout(Duration::from_secs(1), trim_log(dir, 1 << 20)).await.unwrap().unwrap();
}
