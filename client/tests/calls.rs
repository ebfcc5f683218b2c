//! Calls and watches against a controller that fails in the ways in which controllers fail.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

#[allow(dead_code, reason = "each test program uses a part of the fake")]
mod fake;

use std::{net::TcpListener, time::Duration};

use fake::{Answer, Asked, Fake, VM_ID};
use tokio::time::Instant;
use tonic::{Code, Status};
use uncloud_client::{Client, Options, client::Reads, watch::Step};
use uncloud_proto::{
    LEADER_METADATA_KEY,
    v1::{self, watch_vms_response::Event},
};

fn client(endpoints: &[String], timeout: Duration) -> Client {
    Client::new(Options { endpoints: endpoints.to_vec(), timeout, reads: Reads::default() }).unwrap()
}

fn get() -> v1::GetVmRequest {
    v1::GetVmRequest { vm: "web".to_owned(), ..Default::default() }
}

fn restart() -> v1::RestartVmRequest {
    v1::RestartVmRequest { vm: "web".to_owned(), ..Default::default() }
}

fn unavailable() -> Answer {
    Answer::Refusal(Status::unavailable("etcd does not answer"))
}

fn not_leader(leader: &str) -> Answer {
    let mut status = Status::unavailable("this controller does not lead");
    status.metadata_mut().insert(LEADER_METADATA_KEY, leader.parse().unwrap());
    Answer::Refusal(status)
}

/// An address where nobody listens.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

const TEN: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_read_is_tried_again_until_it_is_answered() {
    let (address, fake) = Fake::start([unavailable(), unavailable(), Answer::Vm("web")]).await;
    let answer = client(&[address.to_string()], TEN).get_vm(get()).await.unwrap();
    assert_eq!(answer.vm.unwrap().name, "web");
    assert_eq!(fake.asked(), [Asked::Get, Asked::Get, Asked::Get]);
}

#[tokio::test]
async fn a_create_is_tried_again_with_the_same_id() {
    let (address, fake) = Fake::start([unavailable(), Answer::Vm("web")]).await;
    client(&[address.to_string()], TEN).create_vm(v1::CreateVmRequest::default()).await.unwrap();
    let [Asked::Create { request_id: first }, Asked::Create { request_id: second }] = &fake.asked()[..] else {
        panic!("{:?}", fake.asked())
    };
    assert!(first == second && first.len() == 36);
}

#[tokio::test]
async fn a_restart_whose_answer_was_lost_is_not_repeated() {
    let (address, fake) = Fake::start([unavailable(), Answer::Vm("web")]).await;
    let status = client(&[address.to_string()], TEN).restart_vm(restart()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(fake.asked(), [Asked::Restart]);
}

#[tokio::test]
async fn a_restart_goes_to_the_leader_that_a_follower_names() {
    let (leader, asked_leader) = Fake::start([Answer::Vm("web"), Answer::Vm("web")]).await;
    let (follower, asked_follower) = Fake::start([not_leader(&leader.to_string())]).await;
    let client = client(&[follower.to_string()], TEN);
    let begun = Instant::now();
    client.restart_vm(restart()).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1));
    // And stays there.
    client.get_vm(get()).await.unwrap();
    assert_eq!(asked_follower.asked(), [Asked::Restart]);
    assert_eq!(asked_leader.asked(), [Asked::Restart, Asked::Get]);
}

#[tokio::test]
async fn an_endpoint_where_nobody_listens_is_passed_over_for_every_call() {
    let (address, fake) = Fake::start([Answer::Vm("web")]).await;
    client(&[nobody(), address.to_string()], TEN).restart_vm(restart()).await.unwrap();
    assert_eq!(fake.asked(), [Asked::Restart]);
}

#[tokio::test]
async fn controllers_that_name_each_other_do_not_catch_a_call_for_ever() {
    let dead = nobody();
    let (address, _) = Fake::start((0..1000).map(|_| not_leader(&dead))).await;
    let begun = Instant::now();
    let status = client(&[address.to_string()], Duration::from_millis(500)).get_vm(get()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_refusal_is_final_and_comes_as_it_is() {
    let (address, fake) = Fake::start([Answer::Refusal(Status::not_found("no VM `web`"))]).await;
    let status = client(&[address.to_string()], TEN).get_vm(get()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "no VM `web`"));
    assert_eq!(fake.asked().len(), 1);
}

#[tokio::test]
async fn a_call_ends_in_time_when_nobody_answers() {
    let limit = Duration::from_millis(600);
    let (silent, _) = Fake::start([Answer::Silence]).await;
    let begun = Instant::now();
    let status = client(&[silent.to_string()], limit).get_vm(get()).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("not known"), "{status}");
    let status = client(&[nobody()], limit).get_vm(get()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("refused"), "{status}");
    assert!(begun.elapsed() < 4 * limit);
}

fn seen(revision: i64, name: &str) -> Result<v1::WatchVmsResponse, Status> {
    let vm = v1::Vm { id: VM_ID.to_owned(), name: name.to_owned(), ..Default::default() };
    Ok(v1::WatchVmsResponse { revision, event: Some(Event::Vm(vm)) })
}

fn bookmark(revision: i64) -> Result<v1::WatchVmsResponse, Status> {
    Ok(v1::WatchVmsResponse { revision, event: Some(Event::Bookmark(v1::Bookmark {})) })
}

/// Reads steps until one is a VM of this name; gives them in words.
async fn read_until(name: &str, client: &Client, request: v1::WatchVmsRequest) -> Vec<String> {
    let mut watch = client.watch_vms(request);
    let mut steps = Vec::new();
    loop {
        let step = tokio::time::timeout(TEN, watch.next()).await.unwrap().unwrap();
        let words = match step {
            Step::Restarted => "restarted".to_owned(),
            Step::Answer(a) => match a.event {
                Some(Event::Vm(vm)) => vm.name,
                Some(Event::Bookmark(_)) => "bookmark".to_owned(),
                Some(Event::Deleted(_)) | None => "?".to_owned(),
            },
        };
        steps.push(words);
        if steps.last().is_some_and(|s| s == name) {
            return steps;
        }
    }
}

fn lost() -> Result<v1::WatchVmsResponse, Status> {
    Err(Status::unavailable("the controller stops"))
}

#[tokio::test]
async fn a_watch_resumes_where_it_was() {
    let (address, fake) = Fake::start([
        Answer::Steps(vec![seen(5, "a"), bookmark(5), seen(9, "b"), lost()]),
        unavailable(),
        Answer::Steps(vec![seen(10, "c")]),
    ])
    .await;
    let steps = read_until("c", &client(&[address.to_string()], TEN), v1::WatchVmsRequest::default()).await;
    assert_eq!(steps, ["a", "bookmark", "b", "c"]);
    let watch = |from_revision| Asked::Watch { from_revision };
    assert_eq!(fake.asked(), [watch(0), watch(9), watch(9)]);
}

#[tokio::test]
async fn a_watch_that_breaks_off_before_the_bookmark_says_that_it_begins_anew() {
    let (address, fake) = Fake::start([
        Answer::Steps(vec![seen(5, "a"), lost()]),
        Answer::Steps(vec![seen(6, "a"), bookmark(6), seen(7, "b")]),
    ])
    .await;
    let steps = read_until("b", &client(&[address.to_string()], TEN), v1::WatchVmsRequest::default()).await;
    assert_eq!(steps, ["a", "restarted", "a", "bookmark", "b"]);
    assert_eq!(fake.asked(), [Asked::Watch { from_revision: 0 }, Asked::Watch { from_revision: 0 }]);
}

#[tokio::test]
async fn a_watch_whose_revision_was_compacted_begins_anew() {
    let (address, fake) = Fake::start([
        Answer::Steps(vec![bookmark(5), lost()]),
        Answer::Refusal(Status::out_of_range("compacted; list again")),
        Answer::Steps(vec![seen(90, "b")]),
    ])
    .await;
    let steps = read_until("b", &client(&[address.to_string()], TEN), v1::WatchVmsRequest::default()).await;
    assert_eq!(steps, ["bookmark", "restarted", "b"]);
    assert_eq!(fake.asked().last(), Some(&Asked::Watch { from_revision: 0 }));
}

#[tokio::test]
async fn a_watch_that_is_refused_ends() {
    for status in [Status::not_found("no VM"), Status::out_of_range("compacted; list again")] {
        let code = status.code();
        let (address, fake) = Fake::start([Answer::Refusal(status)]).await;
        let request = v1::WatchVmsRequest { from_revision: 3, ..Default::default() };
        let error = client(&[address.to_string()], TEN).watch_vms(request).next().await.unwrap_err();
        assert_eq!((error.code(), fake.asked().len()), (code, 1));
    }
}

#[tokio::test]
async fn a_stop_is_repeated_because_it_names_a_state() {
    let (address, fake) = Fake::start([unavailable(), Answer::Vm("web")]).await;
    client(&[address.to_string()], TEN).stop_vm(v1::StopVmRequest::default()).await.unwrap();
    assert_eq!(fake.asked(), [Asked::Stop, Asked::Stop]);
}
