//! Images, with a scripted agent that looks at files.

use tonic::Code;
use tonic_types::StatusExt;
use uncloud_proto::v1::{self, file_inspection::Result as Found, session_request, session_response};

use super::harness::{Agent, LONG, Node, hello, new_vm};

fn request(name: &str) -> v1::CreateImageRequest {
    v1::CreateImageRequest {
        name: name.to_owned(),
        kind: v1::ImageKind::Disk.into(),
        files: vec![v1::ImageFile {
            role: v1::ImageFileRole::Disk.into(),
            source: "/images/debian.qcow2".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// Answers every question in the same way.
fn looks_at_files(mut agent: Agent, found: Found) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let query_id = agent
                .until("a question", |m| match m {
                    session_response::Message::InspectFile(q) => Some(q.query_id),
                    _ => None,
                })
                .await;
            let inspection = v1::FileInspection { query_id, result: Some(found.clone()) };
            agent.send(session_request::Message::Inspection(inspection)).await;
        }
    })
}

fn facts() -> v1::FileFacts {
    v1::FileFacts {
        sha256: "ab".repeat(32),
        size_bytes: 1000,
        format: v1::ImageFormat::Qcow2.into(),
        virtual_size_bytes: 1 << 30,
    }
}

fn problem(kind: v1::FileProblemKind) -> Found {
    Found::Problem(v1::FileProblem { kind: kind.into(), message: "no such file".to_owned() })
}

fn field(status: &tonic::Status) -> String {
    status.get_details_bad_request().unwrap().field_violations[0].field.clone()
}

#[tokio::test]
async fn an_image_is_checked_by_a_host_that_has_its_files() {
    let node = Node::start(LONG).await;
    let nobody = node.images().create_image(request("debian")).await.unwrap_err();
    assert_eq!(nobody.code(), Code::FailedPrecondition, "{nobody}");

    // The first host does not have the file.
    let (without, _) = Agent::join(&node, hello(1, 10)).await;
    let one = looks_at_files(without, problem(v1::FileProblemKind::NotFound));
    let missing = node.images().create_image(request("debian")).await.unwrap_err();
    assert_eq!((missing.code(), field(&missing).as_str()), (Code::NotFound, "files[0].source"), "{missing}");

    let (with, _) = Agent::join(&node, hello(2, 20)).await;
    let two = looks_at_files(with, Found::Facts(facts()));
    let once = v1::CreateImageRequest { request_id: "r".into(), ..request("debian") };
    let image = node.images().create_image(once.clone()).await.unwrap().into_inner().image.unwrap();
    assert_eq!(image.files[0].sha256, facts().sha256);
    assert_eq!(image.files[0].virtual_size_bytes, 1 << 30);
    assert_eq!(node.images().create_image(once.clone()).await.unwrap().into_inner().image.unwrap(), image);
    let taken = node.images().create_image(request("debian")).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);

    let mut wrong = request("other");
    wrong.files[0].sha256 = "cd".repeat(32);
    let status = node.images().create_image(wrong).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, "files[0].sha256"));
    let mut wrong = request("other");
    wrong.files[0].format = v1::ImageFormat::Raw.into();
    let status = node.images().create_image(wrong).await.unwrap_err();
    assert_eq!((status.code(), field(&status).as_str()), (Code::InvalidArgument, "files[0].format"));

    // A VM is made from it, and then it cannot be forgotten.
    let mut vm = new_vm("web");
    let disk = &mut vm.spec.as_mut().unwrap().disks[0];
    (disk.image, disk.size_bytes) = ("debian".to_owned(), 0);
    let vm = node.vms().create_vm(vm).await.unwrap().into_inner().vm.unwrap();
    let disk = &vm.spec.unwrap().disks[0];
    assert_eq!((disk.image.as_str(), disk.size_bytes), (image.id.as_str(), 1 << 30));
    let used = node.images().delete_image(v1::DeleteImageRequest { image: "debian".into() }).await.unwrap_err();
    assert_eq!(used.code(), Code::FailedPrecondition);
    let listed = node.images().list_images(v1::ListImagesRequest {}).await.unwrap().into_inner().images;
    assert_eq!(listed, [image]);

    // The answer to a request that is repeated needs no host.
    one.abort();
    two.abort();
    super::harness::eventually("the hosts have gone", || async {
        node.leader.sessions.connected().is_empty().then_some(())
    })
    .await;
    assert_eq!(node.images().create_image(once).await.unwrap().into_inner().image.unwrap(), listed[0]);
}

#[tokio::test]
async fn what_is_wrong_with_a_file_is_said_of_its_field() {
    for (kind, code) in [
        (v1::FileProblemKind::Forbidden, Code::InvalidArgument),
        (v1::FileProblemKind::Invalid, Code::InvalidArgument),
        (v1::FileProblemKind::Io, Code::FailedPrecondition),
    ] {
        let node = Node::start(LONG).await;
        let (agent, _) = Agent::join(&node, hello(1, 10)).await;
        let task = looks_at_files(agent, problem(kind));
        let status = node.images().create_image(request("debian")).await.unwrap_err();
        assert_eq!((status.code(), field(&status).as_str()), (code, "files[0].source"), "{status}");
        task.abort();
    }
}

#[tokio::test]
async fn a_host_that_goes_away_while_it_looks_does_not_hang_anybody() {
    let node = Node::start(LONG).await;
    let (mut agent, _) = Agent::join(&node, hello(1, 10)).await;
    let mut client = node.images();
    let asking = tokio::spawn(async move { client.create_image(request("debian")).await });
    agent.until("a question", |m| matches!(m, session_response::Message::InspectFile(_)).then_some(())).await;
    drop(agent);
    let status = asking.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}
