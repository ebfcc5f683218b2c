//! VMs: their life as users see it, lists and watches.

use tonic::Code;
use tonic_types::StatusExt;
use uncloud_proto::v1::{self, watch_vms_response::Event};

use super::harness::{Agent, LONG, Node, eventually, hello, new_vm, until};
use crate::state::command::{Command, Lapsed};

#[tokio::test]
async fn a_vm_from_its_creation_to_its_end() {
    let node = Node::start(LONG).await;
    let mut watch = node.vms().watch_vms(v1::WatchVmsRequest::default()).await.unwrap().into_inner();
    let begin =
        until("the bookmark", &mut watch, |m| matches!(m.event, Some(Event::Bookmark(_))).then_some(m.revision)).await;

    // No host yet.
    let vm = node.create("web").await;
    assert_eq!(vm.status.unwrap().phase(), v1::VmPhase::Pending);
    let why = node.vms().explain_vm(v1::ExplainVmRequest { vm: "web".into(), owner: String::new() }).await.unwrap();
    assert_eq!(why.into_inner().summary, "Pending: no hosts have joined yet");

    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    let desired = agent.desired(&vm.id).await;
    assert_eq!(desired.disposition(), v1::Disposition::Run);
    assert_eq!(desired.spec.as_ref().unwrap().disks[0].name, "disk0");
    agent.report(&vm.id, desired.incarnation, 1, v1::AgentVmState::Starting).await;
    agent.report(&vm.id, desired.incarnation, 2, v1::AgentVmState::Running).await;
    // Acknowledged means seen.
    assert_eq!(node.vm("web").await.status.unwrap().phase(), v1::VmPhase::Running);
    let running = until("it runs", &mut watch, |m| match m.event {
        Some(Event::Vm(v)) if v.status.as_ref().unwrap().phase() == v1::VmPhase::Running => Some(m.revision),
        _ => None,
    })
    .await;
    assert!(running > begin);

    let stopped = v1::StopVmRequest { vm: "web".into(), ..Default::default() };
    node.vms().stop_vm(stopped).await.unwrap();
    agent
        .until("it should stop", |m| match m {
            v1::session_response::Message::Desired(d) => {
                d.vms.iter().any(|d| d.disposition() == v1::Disposition::Stop).then_some(())
            }
            _ => None,
        })
        .await;
    agent.report(&vm.id, desired.incarnation, 3, v1::AgentVmState::Stopped).await;
    assert_eq!(node.vm("web").await.status.unwrap().phase(), v1::VmPhase::Stopped);

    let request = v1::DeleteVmRequest { vm: vm.id.clone(), owner: String::new() };
    let deleting = node.vms().delete_vm(request).await.unwrap().into_inner().vm.unwrap();
    assert!(deleting.deleting);
    agent
        .until("it should go", |m| match m {
            v1::session_response::Message::Desired(d) => {
                d.vms.iter().any(|d| d.disposition() == v1::Disposition::Delete).then_some(())
            }
            _ => None,
        })
        .await;
    agent.report(&vm.id, desired.incarnation, 4, v1::AgentVmState::Deleted).await;
    let missing = node.vms().get_vm(v1::GetVmRequest { vm: vm.id.clone(), owner: String::new() }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    assert_eq!(missing.get_details_resource_info().unwrap().resource_name, vm.id);
    let gone = until("it is gone", &mut watch, |m| match m.event {
        Some(Event::Deleted(d)) => Some(d),
        _ => None,
    })
    .await;
    assert_eq!((gone.id, gone.name.as_str(), gone.owner.as_str()), (vm.id.clone(), "web", "default"));

    // A watch that resumes at the beginning sees the end, although the VM is gone.
    let resume = v1::WatchVmsRequest { from_revision: begin, ..Default::default() };
    let mut resumed = node.vms().watch_vms(resume).await.unwrap().into_inner();
    let gone = until("it is gone", &mut resumed, |m| match m.event {
        Some(Event::Deleted(d)) => Some(d),
        Some(Event::Bookmark(_)) => panic!("a watch that resumes has no bookmark"),
        _ => None,
    })
    .await;
    assert_eq!((gone.name.as_str(), gone.owner.as_str()), ("web", "default"));

    // Everything that happened was told.
    let request = v1::ListEventsRequest { subject: vm.id, ..Default::default() };
    let events = node.cluster().list_events(request).await.unwrap().into_inner().events;
    let kinds: Vec<_> = events.iter().rev().map(|e| e.r#type.as_str()).collect();
    assert_eq!((kinds.first(), kinds.last()), (Some(&"Created"), Some(&"Deleted")), "{kinds:?}");
}

#[tokio::test]
async fn the_same_request_gets_the_same_answer() {
    let node = Node::start(LONG).await;
    let (_agent, _) = Agent::join(&node, hello(1, 10)).await;
    let request = v1::CreateVmRequest { request_id: "r-1".into(), ..new_vm("web") };
    let first = node.vms().create_vm(request.clone()).await.unwrap().into_inner();
    let again = node.vms().create_vm(request.clone()).await.unwrap().into_inner();
    assert_eq!(first, again);
    assert_eq!(first.vm.as_ref().unwrap().spec.as_ref().unwrap().vcpus, 1);

    let other = v1::CreateVmRequest { name: "db".into(), ..request };
    let reused = node.vms().create_vm(other).await.unwrap_err();
    assert_eq!(reused.code(), Code::InvalidArgument);
    assert_eq!(reused.get_details_bad_request().unwrap().field_violations[0].field, "request_id");
    let taken = node.vms().create_vm(new_vm("web")).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    let mut with_image = new_vm("db");
    with_image.spec.as_mut().unwrap().disks[0].image = "nowhere".into();
    let missing = node.vms().create_vm(with_image).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound, "{missing}");
    assert_eq!(missing.get_details_bad_request().unwrap().field_violations[0].field, "spec.disks[0].image");
    let bad = node.vms().create_vm(v1::CreateVmRequest::default()).await.unwrap_err();
    let fields: Vec<_> = bad.get_details_bad_request().unwrap().field_violations.into_iter().map(|v| v.field).collect();
    assert_eq!((bad.code(), fields), (Code::InvalidArgument, vec!["name".to_owned(), "spec".to_owned()]));
}

#[tokio::test]
async fn lists_come_in_pages_and_a_watch_from_the_list_misses_nothing() {
    let node = Node::start(LONG).await;
    for i in 0..7 {
        let mut request = new_vm(&format!("vm-{i}"));
        request.owner = if i % 2 == 0 { "ann" } else { "bob" }.to_owned();
        request.labels = [("parity".to_owned(), (i % 2).to_string())].into();
        node.vms().create_vm(request).await.unwrap();
    }
    let mut seen = Vec::new();
    let mut page_token = String::new();
    let revision = loop {
        let request = v1::ListVmsRequest { page_size: 3, page_token, ..Default::default() };
        let page = node.vms().list_vms(request).await.unwrap().into_inner();
        assert!(page.vms.len() <= 3);
        seen.extend(page.vms.into_iter().map(|vm| vm.id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break page.revision;
        }
    };
    assert_eq!(seen.len(), 7);
    assert!(seen.is_sorted());
    let count = async |request: v1::ListVmsRequest| node.vms().list_vms(request).await.unwrap().into_inner().vms.len();
    assert_eq!(count(v1::ListVmsRequest { owner: "ann".into(), ..Default::default() }).await, 4);
    let odd = [("parity".to_owned(), "1".to_owned())].into();
    assert_eq!(count(v1::ListVmsRequest { labels: odd, ..Default::default() }).await, 3);
    let pending = v1::ListVmsRequest { phase: v1::VmPhase::Pending.into(), ..Default::default() };
    assert_eq!(count(pending).await, 7);
    let running = v1::ListVmsRequest { phase: v1::VmPhase::Running.into(), ..Default::default() };
    assert_eq!(count(running).await, 0);

    node.create("late").await;
    let request = v1::WatchVmsRequest { from_revision: revision, ..Default::default() };
    let mut watch = node.vms().watch_vms(request).await.unwrap().into_inner();
    let name = until("the late one", &mut watch, |m| match m.event {
        Some(Event::Vm(v)) => Some(v.name),
        _ => None,
    });
    assert_eq!(name.await, "late");
    // A watch of one owner sees only his.
    let request = v1::WatchVmsRequest { owner: "bob".into(), ..Default::default() };
    let mut watch = node.vms().watch_vms(request).await.unwrap().into_inner();
    let mut owners = Vec::new();
    until("the bookmark", &mut watch, |m| match m.event {
        Some(Event::Vm(v)) => {
            owners.push(v.owner);
            None
        }
        Some(Event::Bookmark(_)) => Some(()),
        _ => None,
    })
    .await;
    assert_eq!(owners, ["bob"; 3]);

    let future = v1::WatchVmsRequest { from_revision: i64::MAX, ..Default::default() };
    assert_eq!(node.vms().watch_vms(future).await.unwrap_err().code(), Code::OutOfRange);
    let negative = v1::WatchVmsRequest { from_revision: -1, ..Default::default() };
    assert_eq!(node.vms().watch_vms(negative).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_vm_that_does_not_fit_starts_when_room_appears() {
    let node = Node::start(LONG).await;
    let (_small, _) = Agent::join(&node, hello(1, 10)).await;
    let mut big = new_vm("big");
    big.spec.as_mut().unwrap().memory_mib = 8192;
    let vm = node.vms().create_vm(big).await.unwrap().into_inner().vm.unwrap();
    let why = node.vms().explain_vm(v1::ExplainVmRequest { vm: "big".into(), owner: String::new() }).await.unwrap();
    let why = why.into_inner();
    assert_eq!(why.summary, "Pending: 1 host: 1 lacks 8192 MiB of memory");
    assert_eq!((why.refusals[0].count, why.refusals[0].hosts.as_slice()), (1, ["host-1".to_owned()].as_slice()));

    let capacity = Some(v1::Resources { vcpus: 4, memory_mib: 16384 });
    let (mut large, _) = Agent::join(&node, v1::Hello { capacity, ..hello(2, 20) }).await;
    assert_eq!(large.desired(&vm.id).await.disposition(), v1::Disposition::Run);
    eventually("it has a host", || async { node.vm(&vm.id).await.placement.map(drop) }).await;
}

#[tokio::test]
async fn why_a_snapshot_of_a_stopped_vm_is_not_taken_is_explained() {
    let node = Node::start(LONG).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    let vm = node.create("web").await;
    let desired = agent.desired(&vm.id).await;
    agent.report(&vm.id, desired.incarnation, 1, v1::AgentVmState::Running).await;
    node.vms().stop_vm(v1::StopVmRequest { vm: "web".into(), ..Default::default() }).await.unwrap();
    agent.report(&vm.id, desired.incarnation, 2, v1::AgentVmState::Stopped).await;
    let snapshot = v1::CreateSnapshotRequest { vm: "web".into(), snapshot: "before".into(), ..Default::default() };
    node.vms().create_snapshot(snapshot).await.unwrap();
    let explain = async || {
        let request = v1::ExplainVmRequest { vm: "web".into(), owner: String::new() };
        node.vms().explain_vm(request).await.unwrap().into_inner().summary
    };
    let before = explain().await;
    let host = agent.host_id.parse().unwrap();
    let lapse = Command::DeclareLapsed { host, lapsed: Lapsed::Both, limit: 1 };
    node.leader.writer.submit(lapse).await.unwrap();
    assert_eq!(node.vm("web").await.status.unwrap().phase(), v1::VmPhase::Stopped);
    let more = "; what is still to be done to its disks waits for that host, which is not heard";
    assert_eq!(explain().await, before + more);
}
