//! The single writer and what it leaves in etcd.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use support::*;
use tokio::time;
use uncloud_controller::{
    leadership::{Compacted, Follower, WriteError},
    model::{EventType, Key, Record},
    state::{
        State,
        command::{Answer, Command, ObservedState, PowerChange, Refusal, VmObservation, VmUpdate},
    },
    store::CommitError,
};
use uncloud_proto::ids::{Incarnation, Revision, Term};

#[tokio::test]
async fn concurrent_creates_share_transactions_and_each_gets_its_own_answer_once() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let start = reign.submit(register(1)).await.unwrap().revision;
    // Every VM is asked for twice with one request id, at the same time.
    let creates = (1..=64).flat_map(|n| {
        let request = format!("r{n}");
        [create(n, Some(&request)), create(n, Some(&request))]
    });
    let writer = &reign.leader.writer;
    let answers = futures_util::future::join_all(creates.map(|command| writer.submit(command))).await;
    for (i, pair) in answers.chunks(2).enumerate() {
        for answer in pair {
            let Ok(committed) = answer else { panic!("{answer:?}") };
            let Answer::Vm(vm) = &committed.answer else { panic!("{committed:?}") };
            assert_eq!(vm.id, vm_id(i as u128 + 1));
            assert!(committed.revision > start);
        }
        assert_eq!(pair.iter().filter(|a| a.as_ref().unwrap().replayed.is_some()).count(), 1);
    }
    let keys = etcd.keys("/uncloud/v1/vms/").await;
    assert_eq!(keys.len(), 64);
    let end = answers.iter().map(|a| a.as_ref().unwrap().revision).max().unwrap();
    assert!(end.0 - start.0 < 32, "64 VMs took {} transactions", end.0 - start.0);
    let events: BTreeSet<String> = etcd.keys("/uncloud/v1/events/").await.into_iter().map(|(key, _)| key).collect();
    assert!(events.len() >= 128, "no event has overwritten another one: {}", events.len());
}

#[tokio::test]
async fn of_creates_at_the_same_time_the_more_urgent_and_the_larger_find_room_first() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let mut host = host_facts(1);
    host.memory_mib = 4096;
    reign.submit(Command::RegisterHost { host: Box::new(host) }).await.unwrap();
    let sized = |n: u128, memory: u64, urgency: u32| {
        let mut command = create(n, None);
        if let Command::CreateVm { vm, .. } = &mut command {
            (vm.spec.memory_mib, vm.spec.priority) = (memory, urgency);
        }
        command
    };
    // They come with the smallest first. There is room for the urgent one, and then for the largest, and no more.
    let creates = (1..=20).map(|n| sized(n, 512, 0)).chain([sized(21, 3584, 0), sized(22, 512, 9)]);
    let writer = &reign.leader.writer;
    let answers = futures_util::future::join_all(creates.map(|command| writer.submit(command))).await;
    let placed: Vec<usize> = answers
        .iter()
        .enumerate()
        .filter_map(|(i, answer)| match &answer.as_ref().unwrap().answer {
            Answer::Vm(vm) => vm.placement.host.map(|_| i + 1),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(placed, [21, 22]);
}

/// So many at once that the next transaction is decided while one is under way: who has read something is refused if it was changed
/// after that, whether or not this is stored when the refusal is decided, and nobody else is.
#[tokio::test]
async fn what_is_decided_before_the_last_transaction_is_stored_knows_what_was_read() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let writer = &reign.leader.writer;
    let update = |n: u128, urgency: u32, read: Revision| {
        let update = VmUpdate { read: Some(read), priority: Some(urgency), ..VmUpdate::default() };
        writer.submit(Command::UpdateVm { vm: vm_id(n), update: Box::new(update) })
    };
    let clients = (1..=400).map(|n| async move {
        let created = writer.submit(create(n, None)).await.unwrap().revision;
        let (first, second) = tokio::join!(update(n, 1, created), update(n, 2, created));
        let first = first.unwrap().revision;
        assert!(first > created);
        assert!(matches!(second, Err(WriteError::Refused(Refusal::Outdated(_)))), "{second:?}");
        let third = update(n, 3, created).await;
        assert!(matches!(third, Err(WriteError::Refused(Refusal::Outdated(_)))), "{third:?}");
        update(n, 4, first).await.unwrap().revision
    });
    let last = futures_util::future::join_all(clients).await;
    // What the leader has in memory is what somebody reads who reads it anew.
    let stored = reign.leader.mirror.read(State::clone);
    let anew = Follower::load(&etcd.store().await).await.unwrap().read(State::clone);
    for (n, revision) in (1..=400).zip(last) {
        let (ours, theirs) = (stored.vm(vm_id(n)).unwrap(), anew.vm(vm_id(n)).unwrap());
        assert_eq!(ours.record.spec.priority, 4);
        assert_eq!((ours.record_revision, &ours.record), (revision, &theirs.record));
        assert_eq!(theirs.record_revision, revision);
    }
}

#[tokio::test]
async fn events_of_one_transaction_do_not_overwrite_each_other() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let note = |n: u32| Command::Note { event: EventType::SettingsChanged, message: format!("note {n}") };
    let writer = &reign.leader.writer;
    let noted = futures_util::future::join_all((0..40).map(|n| writer.submit(note(n)))).await;
    let revisions: BTreeSet<Revision> = noted.into_iter().map(|n| n.unwrap().revision).collect();
    assert!(revisions.len() < 40, "some share a transaction");
    let events = reign.leader.store.list_events(None, 100).await.unwrap();
    let notes: Vec<String> = events.into_iter().map(|e| e.event.message).filter(|m| m.starts_with("note")).collect();
    let expected: Vec<String> = (0..40).rev().map(|n| format!("note {n}")).collect();
    assert_eq!(notes, expected, "newest first");
}

#[tokio::test]
async fn a_refusal_changes_nothing_and_names_the_reason() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let refused = reign.submit(Command::DeleteVm { vm: vm_id(1) }).await;
    assert_eq!(refused, Err(WriteError::Refused(Refusal::NoVm(vm_id(1).to_string()))));
    let begin = reign.leader.mirror.read(|state| state.revision());
    let empty = reign.submit(Command::Place { vms: vec![] }).await.unwrap();
    assert_eq!(empty.revision, begin);
}

#[tokio::test]
async fn garbage_is_reported_and_left_alone_byte_for_byte() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    first.submit(register(1)).await.unwrap();
    for n in 1..=2 {
        first.submit(create(n, None)).await.unwrap();
    }
    first.resign().await;

    let garbage: BTreeMap<String, &[u8]> = [
        (Key::Vm(vm_id(1)).to_string(), b"{\"id\": \"no".as_slice()),
        (Key::VmStatus(vm_id(9)).to_string(), b"\xff\xfe\x00"),
        (Key::Image(uncloud_proto::ids::ImageId::from_uuid(uuid::Uuid::nil())).to_string(), b""),
        (Key::Mac("42:00:00:00:00:99".into()).to_string(), b"{}"),
        ("/uncloud/v1/vms/not-a-uuid".to_owned(), b"{}"),
        ("/uncloud/v1/networks/from-tomorrow".to_owned(), b"{\"a\":1}"),
    ]
    .into();
    let mut client = etcd.client().await;
    for (key, value) in &garbage {
        client.put(key.as_str(), *value, None).await.unwrap();
    }

    let second = Reign::begin(&store).await;
    let unreadable: BTreeSet<String> = second.leader.mirror.read(|state| state.unreadable().keys().cloned().collect());
    assert_eq!(unreadable, garbage.keys().cloned().collect());
    let key = Key::Vm(vm_id(1));
    let touched = second.submit(Command::DeleteVm { vm: vm_id(1) }).await;
    assert_eq!(touched, Err(WriteError::Refused(Refusal::Unreadable(key.to_string()))));
    let Command::CreateVm { vm, .. } = create(1, None) else { unreachable!() };
    let again = second.submit(Command::CreateVm { request: None, vm }).await;
    assert!(again.is_err(), "neither its id nor its name is free");
    // The rest goes on.
    second.submit(Command::SetDesired { vm: vm_id(2), desired: PowerChange::Stop }).await.unwrap();
    second.submit(create(3, None)).await.unwrap();
    second.resign().await;
    for (key, value) in &garbage {
        assert_eq!(etcd.get(key).await.unwrap().0, *value, "{key}");
    }
}

#[tokio::test]
async fn an_unreadable_record_of_the_leases_keeps_nobody_from_leading_and_is_left_alone() {
    let etcd = Etcd::start().await;
    let garbage = b"{\"fast_lease_ms\": ".as_slice();
    etcd.client().await.put(Key::Cluster.to_string(), garbage, None).await.unwrap();
    let reign = Reign::begin(&etcd.store().await).await;
    reign.submit(register(1)).await.unwrap();
    reign.submit(create(1, None)).await.unwrap();
    assert!(reign.leader.is_valid());
    // A predecessor may have granted anything: nothing is declared lapsed for as long as the longest lease there is.
    reign.resign().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let begin = reign.leader.clock.now();
    let verdicts = |seconds| {
        let now = begin.after(Duration::from_secs(seconds));
        let mut health = reign.leader.health();
        health.tick(now);
        health.release_brake(now);
        health.tick(now).len()
    };
    assert_eq!((verdicts(3590), verdicts(3700)), (0, 1));
    assert_eq!(etcd.get(&Key::Cluster.to_string()).await.unwrap().0, garbage);
}

#[tokio::test]
async fn fields_of_a_newer_program_survive_a_rewrite() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    first.submit(register(1)).await.unwrap();
    first.submit(create(1, None)).await.unwrap();
    let report = |incarnation, state| VmObservation {
        vm: vm_id(1),
        incarnation: Incarnation(incarnation),
        state,
        reason: String::new(),
        disks_ready: true,
        last_exit: None,
        next_attempt: None,
        addresses: Vec::new(),
        restarts_done: 0,
        paused: false,
        migration: None,
        disks: Default::default(),
    };
    let host = host_facts(1).id;
    let running = Command::Report { host, reports: vec![report(1, ObservedState::Running)] };
    first.submit(running).await.unwrap();
    first.resign().await;

    let keys = [Key::Vm(vm_id(1)), Key::VmStatus(vm_id(1)), Key::Host(host), Key::Cluster];
    let mut client = etcd.client().await;
    for key in &keys {
        let (bytes, _) = etcd.get(&key.to_string()).await.unwrap();
        let mut value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        value["from_tomorrow"] = "kept".into();
        if value["spec"].is_object() {
            value["spec"]["from_tomorrow"] = "kept".into();
        }
        client.put(key.to_string(), serde_json::to_vec(&value).unwrap(), None).await.unwrap();
    }

    let second = Reign::begin(&store).await;
    second.submit(Command::SetDesired { vm: vm_id(1), desired: PowerChange::Stop }).await.unwrap();
    let stopped = Command::Report { host, reports: vec![report(1, ObservedState::Stopped)] };
    second.submit(stopped).await.unwrap();
    second.submit(Command::UpdatePools { host, pools: Vec::new() }).await.unwrap();
    second.submit(Command::SetLeases { fast_lease_ms: 9000, patient_lease_ms: 90_000 }).await.unwrap();
    for key in &keys {
        let (bytes, _) = etcd.get(&key.to_string()).await.unwrap();
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["from_tomorrow"], "kept", "{key}");
        if value["spec"].is_object() {
            assert_eq!(value["spec"]["from_tomorrow"], "kept");
            assert_eq!(value["desired"], "stopped");
        }
    }
}

#[tokio::test]
async fn answers_and_events_go_by_themselves_and_nothing_else_does() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    reign.submit(register(1)).await.unwrap();
    for n in 1..=20 {
        reign.submit(create(n, Some(&format!("r{n}")))).await.unwrap();
    }
    let mut client = etcd.client().await;
    let mut leases = BTreeSet::new();
    for (key, lease) in etcd.keys("/uncloud/v1/").await {
        let kind = Key::parse(key.as_bytes()).unwrap();
        let kept = match kind {
            Key::Request(_) => Duration::from_secs(3600),
            Key::Event { .. } => Duration::from_secs(7 * 24 * 3600),
            Key::Leader => continue,
            _ => {
                assert_eq!(lease, 0, "{key} would go by itself");
                continue;
            }
        };
        assert_ne!(lease, 0, "{key} would stay for ever");
        if leases.insert(lease) {
            let left = client.lease_time_to_live(lease, None).await.unwrap().ttl();
            let left = Duration::from_secs(u64::try_from(left).unwrap());
            assert!(left + Duration::from_secs(60) >= kept, "{key} goes in {left:?}");
        }
    }
    assert_eq!(leases.len(), 2, "leases are few");
}

#[tokio::test]
async fn what_is_stored_can_be_read_by_people() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    reign.submit(register(1)).await.unwrap();
    reign.submit(create(1, None)).await.unwrap();
    let (bytes, _) = etcd.get(&Key::Vm(vm_id(1)).to_string()).await.unwrap();
    let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(value["owner"], "default");
    assert_eq!(value["placement"]["host"], host_facts(1).id.to_string());
    assert_eq!(value["placement"]["incarnation"], 1);
    let (bytes, _) = etcd.get("/uncloud/v1/vm-names/default/vm-1").await.unwrap();
    assert_eq!(bytes, format!("\"{}\"", vm_id(1)).into_bytes());
}

#[tokio::test]
async fn a_watch_resumes_from_before_the_restart_and_misses_nothing() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let first = Reign::begin(&store).await;
    let begin = first.submit(register(1)).await.unwrap().revision;
    let mut expected = Vec::new();
    for n in 1..=5 {
        expected.push((first.submit(create(n, None)).await.unwrap().revision, vm_id(n)));
    }
    first.resign().await;
    let second = Reign::begin(&store).await;
    expected.push((second.submit(create(6, None)).await.unwrap().revision, vm_id(6)));

    let mut stream = second.leader.mirror.feed().subscribe(begin).await.unwrap();
    expected.push((second.submit(create(7, None)).await.unwrap().revision, vm_id(7)));
    let mut seen = Vec::new();
    let mut last = begin;
    while seen.len() < expected.len() {
        let item = time::timeout(LIMIT, stream.next()).await.expect("a change comes").unwrap();
        assert!(item.revision > last, "revisions grow");
        last = item.revision;
        for mutation in &item.change.mutations {
            if let (Key::Vm(id), Some(Record::Vm(_))) = (&mutation.key, &mutation.value) {
                seen.push((item.revision, *id));
            }
        }
    }
    assert_eq!(seen, expected);

    // From the middle, from now, from the future.
    let mut stream = second.leader.mirror.feed().subscribe(expected[2].0).await.unwrap();
    assert_eq!(stream.next().await.unwrap().revision, expected[3].0);
    let newest = second.leader.mirror.read(|state| state.revision());
    second.leader.mirror.feed().subscribe(newest).await.unwrap();
    let future = second.leader.mirror.feed().subscribe(Revision(newest.0 + 1000)).await;
    assert!(matches!(future, Err(Compacted::Future(_))));

    // Compacted.
    store.compact(expected[4].0).await.unwrap();
    let gone = second.leader.mirror.feed().subscribe(begin).await;
    assert!(matches!(gone, Err(Compacted::Gone(_))), "{gone:?}");
    assert!(second.leader.mirror.feed().subscribe(expected[5].0).await.is_ok(), "what is in memory is still there");
}

#[tokio::test]
async fn a_slow_subscriber_is_cut_off_and_nobody_waits_for_it() {
    let etcd = Etcd::start().await;
    let reign = Reign::begin(&etcd.store().await).await;
    let from = reign.submit(register(1)).await.unwrap().revision;
    let mut stream = reign.leader.mirror.feed().subscribe(from).await.unwrap();
    for round in 0..1100_u32 {
        let labels = BTreeMap::from([("round".to_owned(), round.to_string())]);
        let host = uncloud_controller::state::command::HostFacts { labels, ..host_facts(1) };
        reign.submit(Command::RegisterHost { host: Box::new(host) }).await.unwrap();
    }
    assert_eq!(stream.next().await.unwrap_err(), uncloud_controller::leadership::Lagged::TooSlow);
}

/// A busy cluster writes more events in a week than etcd should hold.
#[tokio::test]
async fn of_too_many_events_the_oldest_go_and_only_the_leader_deletes_them() {
    let etcd = Etcd::start().await;
    let store = etcd.store().await;
    let reign = Reign::begin(&store).await;
    for n in 1..=200 {
        reign.submit(create(n, None)).await.unwrap();
    }
    let events = async || {
        let mut keys = etcd.keys("/uncloud/v1/events/").await;
        keys.sort_by_key(|(_, revision)| *revision);
        keys
    };
    let all = events().await;
    assert!(all.len() > 200, "{}", all.len());
    let others = async || etcd.keys("/uncloud/v1/").await.len() - events().await.len();
    let before = others().await;

    let term = reign.leader.term;
    let stale = store.trim_events(Term(term.0 - 1), 5, 0, 1000).await;
    assert!(matches!(stale, Err(CommitError::Deposed)), "{stale:?}");
    assert_eq!(store.trim_events(term, all.len() - 10, 10, 1000).await.unwrap(), 0);
    assert_eq!(events().await, all);

    // More than one transaction, and not all that there are too many.
    assert_eq!(store.trim_events(term, 5, 10, 150).await.unwrap(), 150);
    assert_eq!(events().await, all[150..]);
    assert_eq!(store.trim_events(term, 5, 10, 1000).await.unwrap(), all.len() - 155);
    assert_eq!(events().await, all[all.len() - 5..]);
    assert_eq!(others().await, before, "nothing else");
    // The leader goes on.
    reign.submit(create(201, None)).await.unwrap();
}
