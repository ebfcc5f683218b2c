//! Sessions of hosts, their leases, and what is shown of them.

use std::time::Duration;

use tokio::time;
use uncloud_proto::v1::{self, session_request::Message, session_response};

use super::harness::{Agent, LONG, Node, SHORT, eventually, hello, until};

#[tokio::test]
async fn a_host_joins_and_its_heartbeats_are_answered() {
    let node = Node::start(LONG).await;
    let (mut agent, welcome) = Agent::join(&node, hello(1, 10)).await;
    assert!(welcome.vms.is_empty());
    assert_eq!(welcome.heartbeat_interval_ms, 1000);
    assert_eq!(welcome.controllers, std::slice::from_ref(&node.leader.settings.address));
    for _ in 0..3 {
        let sequence = agent.heartbeat().await;
        let renewal = agent.renewal(sequence).await;
        assert_eq!((renewal.fast_lease_ms, renewal.patient_lease_ms), (6_000, 60_000));
    }
    let hosts = node.hosts().list_hosts(v1::ListHostsRequest {}).await.unwrap().into_inner().hosts;
    assert_eq!(hosts.len(), 1);
    assert_eq!((hosts[0].name.as_str(), hosts[0].state()), ("host-1", v1::HostState::Up));
    assert_eq!(hosts[0].pools[0].free_bytes, 1 << 39);

    // What it says about its pools is shown at once, and stored if it matters.
    let mut pools = hello(1, 10).pools;
    pools[0].free_bytes = 5;
    pools[0].problem = "the marker is missing".to_owned();
    agent.send(Message::Pools(v1::PoolsReport { pools })).await;
    eventually("the pool has a problem", || async {
        let request = v1::GetHostRequest { host: "host-1".to_owned() };
        let host = node.hosts().get_host(request).await.unwrap().into_inner().host.unwrap();
        (host.pools[0].free_bytes == 5 && host.pools[0].problem == "the marker is missing").then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_machine_has_one_session_and_bad_ones_are_told_why() {
    let node = Node::start(LONG).await;
    let (mut first, _) = Agent::join(&node, hello(1, 10)).await;

    let mut other_machine = Agent::dial(&node, hello(1, 11)).await;
    assert_eq!(other_machine.goodbye().await.reason(), v1::GoodbyeReason::DuplicateHost);
    let mut same_name = Agent::dial(&node, v1::Hello { name: "host-1".to_owned(), ..hello(2, 20) }).await;
    let goodbye = same_name.goodbye().await;
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::Invalid);
    assert!(goodbye.message.contains("host-1"), "{}", goodbye.message);
    let sequence = first.heartbeat().await;
    first.renewal(sequence).await;

    let (mut second, _) = Agent::join(&node, hello(1, 10)).await;
    assert_eq!(first.goodbye().await.reason(), v1::GoodbyeReason::Replaced);
    let sequence = second.heartbeat().await;
    second.renewal(sequence).await;

    let bad = v1::Hello { capacity: None, ..hello(3, 30) };
    let goodbye = Agent::dial(&node, bad).await.goodbye().await;
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::Invalid);
    assert!(goodbye.message.starts_with("capacity.vcpus is 0; "), "{}", goodbye.message);

    let newer = v1::Hello { newest_term: i64::MAX, ..hello(3, 30) };
    assert_eq!(Agent::dial(&node, newer).await.goodbye().await.reason(), v1::GoodbyeReason::NotLeader);

    second.send(Message::Hello(hello(1, 10))).await;
    assert_eq!(second.goodbye().await.reason(), v1::GoodbyeReason::Invalid);
}

#[tokio::test]
async fn a_host_that_comes_back_with_a_moved_vm_gets_no_lease_until_it_has_forgotten_it() {
    let node = Node::start(SHORT).await;
    let (mut a, _) = Agent::join(&node, hello(1, 10)).await;
    let vm = node.create("web").await;
    assert_eq!(vm.placement.unwrap().host_name, "host-1");
    let desired = a.desired(&vm.id).await;
    assert_eq!((desired.disposition(), desired.incarnation), (v1::Disposition::Run, 1));
    a.report(&vm.id, 1, 1, v1::AgentVmState::Running).await;

    // Host 1 falls silent; two others are heard, so that the brake lets it be declared lapsed.
    let (mut b, _) = Agent::join(&node, hello(2, 20)).await;
    let (mut c, _) = Agent::join(&node, hello(3, 30)).await;
    let moved = async {
        loop {
            let (sb, sc) = (b.heartbeat().await, c.heartbeat().await);
            b.renewal(sb).await;
            c.renewal(sc).await;
            let placement = node.vm(&vm.id).await.placement;
            if let Some(placement) = placement.filter(|p| p.host_name != "host-1") {
                return placement;
            }
            time::sleep(Duration::from_millis(100)).await;
        }
    };
    let placement = time::timeout(super::harness::LIMIT, moved).await.unwrap();
    assert_eq!(placement.incarnation, 2);

    // It returns and says that the old incarnation still executes.
    let running = v1::VmReport {
        vm_id: vm.id.clone(),
        incarnation: 1,
        sequence: 1,
        state: v1::AgentVmState::Running.into(),
        ..Default::default()
    };
    let (mut a, welcome) = Agent::join(&node, v1::Hello { vms: vec![running], ..hello(1, 10) }).await;
    assert_eq!(welcome.vms.len(), 1);
    assert_eq!((welcome.vms[0].disposition(), welcome.vms[0].incarnation), (v1::Disposition::Forget, 2));
    a.heartbeat().await;
    a.heartbeat().await;
    a.report(&vm.id, 1, 2, v1::AgentVmState::Forgotten).await;
    let sequence = a.heartbeat().await;
    let first = a.until("a renewal", |m| match m {
        session_response::Message::Renewal(r) => Some(r.sequence),
        _ => None,
    });
    assert_eq!(first.await, sequence, "nothing before was answered");
}

#[tokio::test]
async fn a_vm_that_nobody_knows_is_left_alone_and_shown() {
    let node = Node::start(LONG).await;
    let stranger = v1::VmReport {
        vm_id: uuid::Uuid::from_u128(0xabc).to_string(),
        incarnation: 4,
        sequence: 1,
        state: v1::AgentVmState::Running.into(),
        ..Default::default()
    };
    let gone = v1::VmReport {
        vm_id: uuid::Uuid::from_u128(0xdef).to_string(),
        state: v1::AgentVmState::Stopped.into(),
        ..stranger.clone()
    };
    let (mut agent, welcome) =
        Agent::join(&node, v1::Hello { vms: vec![stranger.clone(), gone.clone()], ..hello(1, 10) }).await;
    // The one that does not execute was deleted; of the other nothing is said.
    assert_eq!(welcome.vms.len(), 1);
    assert_eq!(
        (welcome.vms[0].vm_id.as_str(), welcome.vms[0].disposition()),
        (gone.vm_id.as_str(), v1::Disposition::Forget)
    );
    let sequence = agent.heartbeat().await;
    agent.renewal(sequence).await;
    let host = node.hosts().get_host(v1::GetHostRequest { host: "host-1".into() }).await.unwrap().into_inner();
    assert_eq!(host.host.unwrap().unknown_vms, std::slice::from_ref(&stranger.vm_id));
    let status = node.cluster().get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.warnings.iter().any(|w| w.contains("knows nothing about")), "{:?}", status.warnings);
}

#[tokio::test]
async fn a_watch_of_hosts_shows_when_one_falls_silent_and_when_it_is_cordoned() {
    let node = Node::start(SHORT).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    let sequence = agent.heartbeat().await;
    agent.renewal(sequence).await;
    let mut watch = node.hosts().watch_hosts(v1::WatchHostsRequest::default()).await.unwrap().into_inner();
    use v1::watch_hosts_response::Event;
    until("the bookmark", &mut watch, |m| matches!(m.event, Some(Event::Bookmark(_))).then_some(())).await;
    until("the host is silent", &mut watch, |m| match m.event {
        Some(Event::Host(h)) if h.state() == v1::HostState::Silent => Some(()),
        _ => None,
    })
    .await;
    let request = v1::CordonHostRequest { host: "host-1".into(), reason: "a new fan".into() };
    let cordoned = node.hosts().cordon_host(request).await.unwrap().into_inner().host.unwrap();
    assert_eq!(cordoned.mode(), v1::HostMode::Cordoned);
    until("the host is cordoned", &mut watch, |m| match m.event {
        Some(Event::Host(h)) if h.mode() == v1::HostMode::Cordoned && h.reason.contains("a new fan") => Some(()),
        _ => None,
    })
    .await;
}

#[tokio::test]
async fn s6_another_machine_with_a_hosts_id_waits_until_the_lease_of_before_has_run_out() {
    let node = Node::start(SHORT).await;
    let (mut before, _) = Agent::join(&node, hello(1, 10)).await;
    let vm = node.create("web").await;
    before.desired(&vm.id).await;
    before.report(&vm.id, 1, 1, v1::AgentVmState::Running).await;
    let granted = node.leader.clock.now();
    let sequence = before.heartbeat().await;
    before.renewal(sequence).await;
    drop(before);

    // The host has been restarted, or its state directory copied: nobody can tell. It calls again and again.
    let mut refused = 0;
    let welcomed = async {
        loop {
            let mut agent = Agent::dial(&node, hello(1, 11)).await;
            let answer = agent.until("an answer", |m| match m {
                session_response::Message::Welcome(w) => Some(Ok(w)),
                session_response::Message::Goodbye(g) => Some(Err(g)),
                _ => None,
            });
            match answer.await {
                Ok(welcome) => break welcome,
                Err(goodbye) => assert_eq!(goodbye.reason(), v1::GoodbyeReason::DuplicateHost),
            }
            refused += 1;
            time::sleep(Duration::from_millis(50)).await;
        }
    };
    let welcome = time::timeout(super::harness::LIMIT, welcomed).await.unwrap();
    let waited = node.leader.clock.now().since(granted);
    assert!(waited >= SHORT.wait(SHORT.fast), "welcomed after {waited:?}");
    assert!(refused > 0);
    assert_eq!(welcome.vms.len(), 1);
}
