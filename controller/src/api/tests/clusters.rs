//! The cluster as a whole: leadership, status, events, reflection and health.

use std::time::{Duration, Instant};

use tokio::{net::TcpListener, sync::watch, time};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use uncloud_proto::{
    FORWARDED_METADATA_KEY, LEADER_METADATA_KEY, READ_METADATA_KEY,
    v1::{
        self, agent_service_client::AgentServiceClient, vm_service_client::VmServiceClient, watch_events_response::Step,
    },
};

use super::harness::{Agent, LIMIT, LONG, Node, eventually, hello, new_vm, until};
use crate::{
    api,
    leadership::{LeaderSlot, WarmCopy},
};

#[tokio::test]
async fn who_has_neither_leader_nor_copy_says_so_and_is_not_serving() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // A leader that cannot be reached: nothing listens there any more.
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let (slot, stop) = (LeaderSlot::default(), CancellationToken::new());
    slot.clear(Some(dead.clone()));
    let serving = api::Serving {
        slot,
        copy: WarmCopy::default(),
        store: watch::channel(None).1,
        clock: uncloud_proto::clock::Clock::system(),
        cpu_overcommit_percent: 400,
        disk_overcommit_percent: 200,
        address: address.to_string(),
        dial: uncloud_proto::dial::Dial::tcp(),
        metrics: Default::default(),
    };
    let server = tokio::spawn(api::serve(api::accept(listener), serving, stop.clone()));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();

    // A read wants a copy, or at least etcd.
    let status = VmServiceClient::new(channel.clone()).list_vms(v1::ListVmsRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    // A write wants the leader. It was surely not carried out: that is what the key says.
    let status = VmServiceClient::new(channel.clone()).create_vm(new_vm("web")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.metadata().get(LEADER_METADATA_KEY).unwrap(), "");
    assert!(status.message().contains(&dead), "{status}");
    // One that was passed on once is not passed on again.
    let mut passed_on = tonic::Request::new(new_vm("web"));
    passed_on.metadata_mut().insert(FORWARDED_METADATA_KEY, "1".parse().unwrap());
    let status = VmServiceClient::new(channel.clone()).create_vm(passed_on).await.unwrap_err();
    assert_eq!(status.metadata().get(LEADER_METADATA_KEY).unwrap(), dead.as_str());
    let session = AgentServiceClient::new(channel.clone()).session(tokio_stream::pending()).await.unwrap_err();
    assert_eq!(session.metadata().get(LEADER_METADATA_KEY).unwrap(), dead.as_str());
    // What is wrong with a request is said by any controller.
    let bad = v1::ListVmsRequest { page_size: 5000, ..Default::default() };
    let status = VmServiceClient::new(channel.clone()).list_vms(bad).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut odd = tonic::Request::new(v1::ListVmsRequest::default());
    odd.metadata_mut().insert(READ_METADATA_KEY, "fresh".parse().unwrap());
    let status = VmServiceClient::new(channel.clone()).list_vms(odd).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("`stale`"), "{status}");

    let check = HealthCheckRequest { service: "uncloud.v1.VmService".to_owned() };
    let health = HealthClient::new(channel).check(check).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::NotServing);
    stop.cancel();
    time::timeout(LIMIT, server).await.unwrap().unwrap().unwrap();
}

/// When a leader dies, its agents are here before the next one is elected.
#[tokio::test]
async fn an_agent_that_has_lost_the_leader_is_welcomed_by_the_next_on_the_stream_that_it_has() {
    let node = Node::start(LONG).await;
    node.slot.clear(Some("10.0.0.9:7400".to_owned()));
    let begin = Instant::now();
    let mut waiting = Agent::dial_after(&node, "10.0.0.9:7400", hello(1, 10)).await;
    node.slot.set(node.leader.clone());
    if begin.elapsed() < Duration::from_millis(900) {
        waiting.welcome().await;
    } else {
        // This machine stood still.
        Agent::join(&node, hello(1, 10)).await;
    }
}

#[tokio::test]
async fn the_end_of_a_term_ends_sessions_and_watches() {
    let node = Node::start(LONG).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    let mut vms = node.vms().watch_vms(v1::WatchVmsRequest::default()).await.unwrap().into_inner();
    let mut events = node.cluster().watch_events(v1::WatchEventsRequest::default()).await.unwrap().into_inner();
    let mut hosts = node.hosts().watch_hosts(v1::WatchHostsRequest::default()).await.unwrap().into_inner();
    node.depose(Some("10.0.0.9:7400"));
    let goodbye = agent.goodbye().await;
    assert_eq!(goodbye.reason(), v1::GoodbyeReason::NotLeader);
    assert_eq!(goodbye.leader_address, "10.0.0.9:7400");
    // What follows reads its copy anew after a term.
    node.leader.mirror.retired().cancel();
    macro_rules! ends {
        ($stream:ident, $leader:expr) => {
            loop {
                match time::timeout(LIMIT, $stream.message()).await.unwrap() {
                    Ok(message) => assert!(message.is_some(), "a watch says why it ends"),
                    Err(status) => {
                        assert_eq!(status.code(), Code::Unavailable);
                        let named: Option<&str> =
                            status.metadata().get(LEADER_METADATA_KEY).map(|l| l.to_str().unwrap());
                        assert_eq!(named, $leader);
                        break;
                    }
                }
            }
        };
    }
    // These can be resumed here, too.
    ends!(vms, None);
    ends!(events, None);
    ends!(hosts, Some("10.0.0.9:7400"));
    let status = node.vms().list_vms(v1::ListVmsRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn the_status_counts_and_events_are_watched() {
    let node = Node::start(LONG).await;
    let health = HealthClient::new(node.channel.clone());
    eventually("it is serving", || {
        let mut health = health.clone();
        async move {
            let check = health.check(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
            (check.status() == ServingStatus::Serving).then_some(())
        }
    })
    .await;
    let mut events = node.cluster().watch_events(v1::WatchEventsRequest::default()).await.unwrap().into_inner();
    let mut early = Vec::new();
    let mark = until("the bookmark", &mut events, |m| match m.step {
        Some(Step::Event(e)) => {
            early.push(e.r#type);
            None
        }
        Some(Step::Bookmark(_)) => Some(m.revision),
        None => None,
    })
    .await;
    assert!(early.iter().any(|kind| kind == "LeaderElected"), "{early:?}");

    let (_agent, _) = Agent::join(&node, hello(1, 10)).await;
    let joined = until("a host joined", &mut events, |m| match m.step {
        Some(Step::Event(e)) if e.r#type == "HostJoined" => Some(e),
        _ => None,
    })
    .await;
    assert_eq!((joined.subject_kind(), joined.subject_name.as_str()), (v1::SubjectKind::Host, "host-1"));
    assert!(joined.revision > mark);
    let subject = v1::ListEventsRequest { subject: "host-1".into(), ..Default::default() };
    let listed = node.cluster().list_events(subject).await.unwrap().into_inner().events;
    assert_eq!(listed, [joined]);
    let nobody = v1::ListEventsRequest { subject: "nobody".into(), ..Default::default() };
    assert_eq!(node.cluster().list_events(nobody).await.unwrap_err().code(), Code::NotFound);

    node.create("web").await;
    let status = node.cluster().get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.leader.unwrap().term, node.leader.term.0);
    assert_eq!(status.hosts, [v1::HostCount { state: "up".into(), count: 1 }]);
    assert_eq!(status.vms, [v1::VmCount { phase: v1::VmPhase::Scheduled.into(), count: 1 }]);
    assert_eq!((status.fast_lease_ms, status.patient_lease_ms), (6_000, 60_000));
    assert_eq!(status.warnings, Vec::<String>::new());
    let released = node.cluster().release_brake(v1::ReleaseBrakeRequest {}).await.unwrap().into_inner();
    assert_eq!(released.silent_hosts, 0);

    // Off and on.
    let set = |mode: v1::FailoverMode, for_seconds| v1::SetFailoverRequest {
        mode: mode.into(),
        for_seconds,
        reason: "r".into(),
    };
    node.cluster().set_failover(set(v1::FailoverMode::Off, 600)).await.unwrap();
    let status = node.cluster().get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.failover_off_until.is_some());
    assert!(status.warnings.iter().any(|w| w.contains("Failover is switched off (r)")), "{:?}", status.warnings);
    node.cluster().set_failover(set(v1::FailoverMode::On, 0)).await.unwrap();
    let status = node.cluster().get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.failover_off_until.is_none());
    for (mode, seconds, field) in [
        (v1::FailoverMode::Off, 3601, "for_seconds"),
        (v1::FailoverMode::On, 1, "for_seconds"),
        (v1::FailoverMode::Unspecified, 0, "mode"),
    ] {
        let refused = node.cluster().set_failover(set(mode, seconds)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(field), "{refused}");
    }
}

#[tokio::test]
async fn reflection_knows_the_services_and_the_details_of_errors() {
    let node = Node::start(LONG).await;
    let mut client = ServerReflectionClient::new(node.channel.clone());
    let ask = |message_request| {
        tokio_stream::once(ServerReflectionRequest { host: String::new(), message_request: Some(message_request) })
    };
    let mut answer =
        client.server_reflection_info(ask(MessageRequest::ListServices(String::new()))).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message().await.unwrap().unwrap().message_response
    else {
        panic!()
    };
    let names: Vec<_> = list.service.into_iter().map(|s| s.name).collect();
    for name in ["uncloud.v1.VmService", "uncloud.v1.AgentService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|n| n == name), "{names:?}");
    }
    let symbol = MessageRequest::FileContainingSymbol("google.rpc.BadRequest".to_owned());
    let mut answer = client.server_reflection_info(ask(symbol)).await.unwrap().into_inner();
    let found = answer.message().await.unwrap().unwrap().message_response;
    assert!(matches!(found, Some(MessageResponse::FileDescriptorResponse(_))), "{found:?}");
}
