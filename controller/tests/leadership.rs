//! Elections, terms and their ends, with a real etcd. The names T1 to T3 are claims of `leadership/mod.rs`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use support::*;
use uncloud_controller::{
    leadership::WriteError,
    model::Key,
    state::command::{Answer, Command, PowerChange},
};
use uncloud_proto::clock::Clock;

#[tokio::test]
async fn the_second_waits_says_for_whom_and_takes_over_at_once_after_a_resignation() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;

    let hints = Arc::new(Mutex::new(Vec::new()));
    let second = tokio::spawn({
        let (campaign, hints) = (campaign(&store, "127.0.0.1:2"), hints.clone());
        async move { campaign.win(|hint| hints.lock().unwrap().push(hint)).await }
    });
    eventually("the second knows who leads", || async {
        hints.lock().unwrap().contains(&Some("127.0.0.1:1".to_owned())).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await; // longer than the leader key's TTL
    assert!(!second.is_finished() && first.leader.is_valid());

    let term = first.leader.term;
    let begin = Instant::now();
    first.resign().await;
    let elected = tokio::time::timeout(LIMIT, second).await.unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
    assert!(elected.term > term);
}

#[tokio::test]
async fn a_killed_leader_is_succeeded_only_after_it_has_stopped_counting_itself() {
    // T1
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    first.submit(register(1)).await.unwrap();
    let (validity, term) = (first.leader.validity.clone(), first.leader.term);
    first.crash();
    let crashed = Instant::now();
    let second = win(&campaign(&store, "127.0.0.1:2")).await;
    assert!(!validity.holds(Clock::system().now()), "two count themselves as leaders");
    assert!(second.term > term);
    assert!(crashed.elapsed() < Duration::from_secs(10), "{:?}", crashed.elapsed());
}

#[tokio::test]
async fn a_process_whose_term_ended_without_a_resignation_does_not_wait_for_its_own_key() {
    // etcd was killed and is back with the leader key and a new TTL: here the key stays for ever, because nobody ends its lease.
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let campaign = campaign(&store, "127.0.0.1:1");
    let first = win(&campaign).await;
    let (value, _) = etcd.get(&Key::Leader.to_string()).await.unwrap();
    etcd.client().await.put(Key::Leader.to_string(), value, None).await.unwrap();
    assert_eq!(etcd.keys(&Key::Leader.to_string()).await[0].1, 0, "the key stays");

    let second = win(&campaign).await;
    assert!(second.term > first.term);
    // Somebody else's key is nobody else's to take.
    let (value, _) = etcd.get(&Key::Leader.to_string()).await.unwrap();
    etcd.client().await.put(Key::Leader.to_string(), value, None).await.unwrap();
    let other = support::campaign(&store, "127.0.0.1:2");
    let mut hints = Vec::new();
    let waits = tokio::time::timeout(Duration::from_secs(1), other.win(|hint| hints.push(hint))).await;
    assert!(waits.is_err(), "it took a living leader's key");
    assert_eq!(hints.first(), Some(&Some("127.0.0.1:1".to_owned())));
}

#[tokio::test]
async fn a_leader_that_hears_nothing_from_etcd_stops_in_time() {
    // T1
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    assert!(reign.leader.is_valid());
    etcd.freeze();
    let frozen = Instant::now();
    reign.ended().await;
    assert!(frozen.elapsed() < Duration::from_millis(2500), "{:?}", frozen.elapsed());
    assert_eq!(reign.submit(register(1)).await, Err(WriteError::NotLeader));
    etcd.thaw();
}

#[tokio::test]
async fn a_write_of_a_deposed_leader_is_refused_by_etcd() {
    // T2. The first still counts itself as the leader and its etcd lease lives: only the comparison in its transactions
    // keeps it from writing.
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    first.submit(register(1)).await.unwrap();
    etcd.client().await.delete(Key::Leader.to_string(), None).await.unwrap();
    let second = Reign::begin(&store).await;
    assert!(first.leader.validity.holds(Clock::system().now()));

    assert_eq!(first.submit(create(1, None)).await, Err(WriteError::NotLeader));
    first.ended().await;
    assert_eq!(etcd.get(&Key::Vm(vm_id(1)).to_string()).await, None);
    second.submit(create(2, None)).await.unwrap();
    // Nor does its resignation harm its successor.
    first.resign().await;
    second.submit(create(3, None)).await.unwrap();
}

#[tokio::test]
async fn an_unknown_outcome_ends_the_term_and_the_next_one_sees_the_truth() {
    // T3
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    first.submit(register(1)).await.unwrap();

    etcd.freeze();
    let (one, other) = tokio::join!(first.submit(create(1, Some("r1"))), first.submit(create(2, Some("r2"))));
    for outcome in [one, other] {
        assert!(matches!(outcome, Err(WriteError::Unknown | WriteError::NotLeader)), "{outcome:?}");
    }
    first.ended().await;
    assert!(first.leader.mirror.read(|state| state.vm(vm_id(1)).is_none()), "nothing unproven is shown");
    etcd.thaw();

    let second = Reign::begin(&store).await;
    for (n, request) in [(1, "r1"), (2, "r2")] {
        let stored = etcd.get(&Key::Vm(vm_id(n)).to_string()).await.is_some();
        assert_eq!(second.leader.mirror.read(|state| state.vm(vm_id(n)).is_some()), stored);
        // The user asks again with the same request id: the same VM, or now one, never two.
        let again = Command::CreateVm {
            request: match create(n, Some(request)) {
                Command::CreateVm { request, .. } => request,
                _ => unreachable!(),
            },
            vm: match create(n + 100, None) {
                Command::CreateVm { mut vm, .. } => {
                    vm.name = format!("vm-{n}");
                    vm
                }
                _ => unreachable!(),
            },
        };
        let Answer::Vm(vm) = second.submit(again).await.unwrap().answer else { panic!("no VM is answered") };
        assert_eq!(vm.id, if stored { vm_id(n) } else { vm_id(n + 100) });
    }
    assert_eq!(etcd.keys("/uncloud/v1/vms/").await.len(), 2);
    assert_eq!(etcd.keys("/uncloud/v1/vm-names/").await.len(), 2);
}

#[tokio::test]
async fn an_unknown_outcome_ends_the_term_though_etcd_is_back_before_the_leadership_is_over() {
    // T3 alone: the connection breaks under the transaction, and the keep-alives go on.
    let mut etcd = Etcd::start().await;
    let first = Reign::begin(&etcd.store().await).await;
    first.submit(register(1)).await.unwrap();
    etcd.freeze();
    let crash = async {
        let under_way = || async { first.leader.writer.settled().now_or_never().is_none().then_some(()) };
        eventually("the transaction to be under way", under_way).await;
        etcd.crash_and_restart().await;
    };
    let (outcome, ()) = tokio::join!(first.submit(create(1, None)), crash);
    assert_eq!(outcome, Err(WriteError::Unknown));
    first.ended().await;
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_when_etcd_and_the_leader_are_killed() {
    // P2
    let mut etcd = Etcd::start().await;
    let first = Reign::begin(&etcd.store().await).await;
    first.submit(register(1)).await.unwrap();
    for n in 1..=20 {
        first.submit(create(n, None)).await.unwrap();
    }
    first.submit(Command::SetDesired { vm: vm_id(3), desired: PowerChange::Stop }).await.unwrap();
    let before = first.leader.mirror.read(|state| state.vms().map(|(id, vm)| (*id, vm.clone())).collect::<Vec<_>>());
    etcd.crash_and_restart().await;
    first.crash();

    let second = Reign::begin(&etcd.store().await).await;
    let after = second.leader.mirror.read(|state| state.vms().map(|(id, vm)| (*id, vm.clone())).collect::<Vec<_>>());
    assert_eq!(before, after, "also the revisions");
    // And it goes on: the host is as it was, and capacity is counted.
    let promised = second.leader.mirror.read(|state| state.hosts().next().unwrap().1.promised);
    assert_eq!(promised.memory_mib, 20 * 64);
}

#[tokio::test]
async fn a_full_etcd_ends_no_term_and_is_told_to_who_writes() {
    // P3: a leader that stepped down could not be elected again, and every host would lose its leases.
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let reign = Reign::begin(&store).await;
    reign.submit(register(1)).await.unwrap();
    let mut client = etcd.client().await;
    let mut filled = 0;
    let full = loop {
        match client.put(format!("/somebody/elses/{filled}"), vec![b'x'; 1 << 20], None).await {
            Ok(_) => filled += 1,
            Err(error) => break error.to_string(),
        }
        assert!(filled < (2 * QUOTA) >> 20, "it does not fill");
    };
    assert!(full.contains("space exceeded"), "{full}");

    assert_eq!(reign.submit(create(1, Some("r"))).await, Err(WriteError::StoreFull));
    assert!(reign.leader.mirror.read(|state| state.vm(vm_id(1)).is_none()));
    // Longer than a leadership lasts without keep-alives: those still work.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(reign.leader.is_valid());
    assert_eq!(reign.submit(create(1, Some("r"))).await, Err(WriteError::StoreFull));

    // An operator makes room.
    client.delete("/somebody/", Some(etcd_client::DeleteOptions::new().with_prefix())).await.unwrap();
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, Some(etcd_client::CompactionOptions::new().with_physical())).await.unwrap();
    client.defragment().await.unwrap();
    let nospace = etcd_client::AlarmType::Nospace;
    for alarm in client.alarm(etcd_client::AlarmAction::Get, nospace, None).await.unwrap().alarms() {
        let mut member = etcd_client::AlarmOptions::new();
        member.with_member(alarm.member_id());
        client.alarm(etcd_client::AlarmAction::Deactivate, nospace, Some(member)).await.unwrap();
    }
    reign.submit(create(1, Some("r"))).await.unwrap();
    assert!(reign.leader.mirror.read(|state| state.vm(vm_id(1)).is_some()));
    assert!(etcd.get(&Key::Vm(vm_id(1)).to_string()).await.is_some());
}
