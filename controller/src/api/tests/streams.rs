//! Consoles and logs, between a client and a scripted agent.

use std::time::Duration;

use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};
use uncloud_proto::v1::{
    self, attach_stream_request::Message, console_request, host_service_client::HostServiceClient, session_response,
    vm_service_client::VmServiceClient, watch_hosts_response::Event,
};

use super::harness::{Agent, LIMIT, LONG, Node, hello, new_vm, until};

async fn order(agent: &mut Agent) -> v1::OpenStream {
    agent
        .until("an order for a stream", |m| match m {
            session_response::Message::OpenStream(o) => Some(o),
            _ => None,
        })
        .await
}

/// The agent's end of a stream.
async fn attach(
    agent: &Agent,
    stream_id: &str,
) -> (mpsc::Sender<v1::AttachStreamRequest>, Streaming<v1::AttachStreamResponse>) {
    let (to_leader, requests) = mpsc::channel(16);
    let attach = v1::Attach { host_id: agent.host_id.clone(), stream_id: stream_id.to_owned() };
    to_leader.send(v1::AttachStreamRequest { message: Some(Message::Attach(attach)) }).await.unwrap();
    let answer = agent.client.clone().attach_stream(ReceiverStream::new(requests)).await.unwrap().into_inner();
    (to_leader, answer)
}

fn data(bytes: &[u8]) -> v1::AttachStreamRequest {
    v1::AttachStreamRequest { message: Some(Message::Data(bytes.to_vec())) }
}

fn open(vm: &str) -> v1::ConsoleRequest {
    let open = v1::ConsoleOpen { vm: vm.to_owned(), owner: String::new(), history_bytes: 100 };
    v1::ConsoleRequest { message: Some(console_request::Message::Open(open)) }
}

fn input(bytes: &[u8]) -> v1::ConsoleRequest {
    v1::ConsoleRequest { message: Some(console_request::Message::Input(bytes.to_vec())) }
}

#[tokio::test]
async fn a_console_goes_both_ways_and_ends_on_both_sides() {
    let node = Node::start(LONG).await;
    goes_both_ways(&node, node.vms()).await;
}

#[tokio::test]
async fn a_console_goes_through_a_controller_that_does_not_lead() {
    let node = Node::start(LONG).await;
    let another = node.another().await;
    goes_both_ways(&node, VmServiceClient::new(another.channel.clone())).await;
}

#[tokio::test]
async fn a_stream_that_was_passed_on_ends_with_a_status_when_the_leader_is_lost() {
    let node = Node::start(LONG).await;
    let another = node.another().await;
    let mut hosts = HostServiceClient::new(another.channel.clone());
    let mut watch = hosts.watch_hosts(v1::WatchHostsRequest::default()).await.unwrap().into_inner();
    until("the bookmark", &mut watch, |m| matches!(m.event, Some(Event::Bookmark(_))).then_some(())).await;
    // Its server ends with it, in the middle of the stream.
    drop(node);
    let status = loop {
        match time::timeout(LIMIT, watch.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended as if all were well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    // And what comes next is refused as not carried out: nobody was reached.
    let refused = hosts.list_hosts(v1::ListHostsRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

async fn goes_both_ways(node: &Node, mut client: VmServiceClient<Channel>) {
    let (mut agent, _) = Agent::join(node, hello(1, 10)).await;
    let vm = node.create("web").await;

    let (to_guest, typed) = mpsc::channel(16);
    to_guest.send(open("web")).await.unwrap();
    let opening = tokio::spawn(async move { client.console(ReceiverStream::new(typed)).await.unwrap().into_inner() });
    let ordered = order(&mut agent).await;
    assert_eq!(
        (ordered.vm_id.as_str(), ordered.kind(), ordered.history_bytes),
        (vm.id.as_str(), v1::StreamKind::Console, 100)
    );
    let (to_leader, mut from_leader) = attach(&agent, &ordered.stream_id).await;
    let mut console = opening.await.unwrap();

    to_leader.send(data(b"login: ")).await.unwrap();
    assert_eq!(until("output", &mut console, |m| Some(m.output)).await, b"login: ");
    to_guest.send(input(b"root\n")).await.unwrap();
    assert_eq!(until("input", &mut from_leader, |m| Some(m.data)).await, b"root\n");

    // The client has nothing more to type, and goes on reading.
    drop(to_guest);
    to_leader.send(data(b"# ")).await.unwrap();
    assert_eq!(until("output", &mut console, |m| Some(m.output)).await, b"# ");

    // The client goes: the agent's side ends.
    drop(console);
    let end = time::timeout(LIMIT, from_leader.message()).await.unwrap();
    assert!(matches!(end, Ok(None)), "{end:?}");
    // A stream cannot be attached twice.
    let attach = v1::Attach { host_id: agent.host_id.clone(), stream_id: ordered.stream_id };
    let again = tokio_stream::once(v1::AttachStreamRequest { message: Some(Message::Attach(attach)) });
    assert_eq!(agent.client.attach_stream(again).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_log_ends_when_the_agent_ends_it_and_says_what_went_wrong() {
    let node = Node::start(LONG).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    node.create("web").await;
    let request = v1::GetVmLogRequest { vm: "web".into(), tail_bytes: 7, ..Default::default() };

    let mut client = node.vms();
    let again = request.clone();
    let opening = tokio::spawn(async move { client.get_vm_log(again).await.unwrap().into_inner() });
    let ordered = order(&mut agent).await;
    assert_eq!((ordered.kind(), ordered.history_bytes, ordered.follow), (v1::StreamKind::Log, 7, false));
    let (to_leader, mut from_leader) = attach(&agent, &ordered.stream_id).await;
    let mut log = opening.await.unwrap();
    to_leader.send(data(b"one\n")).await.unwrap();
    drop(to_leader);
    assert_eq!(until("a line", &mut log, |m| Some(m.data)).await, b"one\n");
    assert!(time::timeout(LIMIT, log.message()).await.unwrap().unwrap().is_none());
    assert!(time::timeout(LIMIT, from_leader.message()).await.unwrap().unwrap().is_none());

    let mut client = node.vms();
    let opening = tokio::spawn(async move { client.get_vm_log(request).await.unwrap().into_inner() });
    let ordered = order(&mut agent).await;
    let (to_leader, _from_leader) = attach(&agent, &ordered.stream_id).await;
    let error = Message::Error("it has never been started".to_owned());
    to_leader.send(v1::AttachStreamRequest { message: Some(error) }).await.unwrap();
    let mut log = opening.await.unwrap();
    let status = time::timeout(LIMIT, log.message()).await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "it has never been started"));
}

#[tokio::test]
async fn a_side_that_does_not_read_makes_the_other_wait_and_holds_no_more_than_the_bound() {
    let node = Node::start(LONG).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    node.create("web").await;
    let (to_guest, typed) = mpsc::channel(16);
    to_guest.send(open("web")).await.unwrap();
    let mut client = node.vms();
    let opening = tokio::spawn(async move { client.console(ReceiverStream::new(typed)).await.unwrap().into_inner() });
    let ordered = order(&mut agent).await;
    let (to_leader, _from_leader) = attach(&agent, &ordered.stream_id).await;
    let mut console = opening.await.unwrap();
    let piece = data(&[b'x'; 64 << 10]);
    let mut accepted = 0;
    while time::timeout(Duration::from_millis(500), to_leader.send(piece.clone())).await.is_ok() {
        accepted += 1;
        assert!(accepted < 1000, "the agent is never made to wait");
    }
    // Nothing is lost when the client reads again.
    drop(to_leader);
    let mut bytes = 0;
    while let Some(message) = time::timeout(LIMIT, console.message()).await.unwrap().unwrap() {
        bytes += message.output.len();
    }
    assert_eq!(bytes, accepted * (64 << 10));
}

#[tokio::test]
async fn who_has_no_console_is_told_why() {
    let node = Node::start(LONG).await;
    let first = async |message| {
        let answer = node.vms().console(tokio_stream::once(message)).await;
        answer.unwrap_err()
    };
    assert_eq!(first(open("web")).await.code(), Code::NotFound);
    assert_eq!(first(open("")).await.code(), Code::InvalidArgument);
    assert_eq!(first(input(b"x")).await.code(), Code::InvalidArgument);
    node.vms().create_vm(new_vm("web")).await.unwrap();
    let homeless = first(open("web")).await;
    assert_eq!(homeless.code(), Code::FailedPrecondition, "{homeless}");

    let (agent, _) = Agent::join(&node, hello(1, 10)).await;
    super::harness::eventually("it has a host", || async { node.vm("web").await.placement.map(drop) }).await;
    drop(agent);
    let status = super::harness::eventually("the session has ended", || async {
        let status = time::timeout(Duration::from_secs(1), first(open("web"))).await.ok()?;
        (status.code() == Code::Unavailable && status.message().contains("is not connected")).then_some(status)
    })
    .await;
    assert!(status.message().contains("host-1"), "{status}");
}
