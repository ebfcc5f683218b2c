//! A controller that says what a test tells it to say.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
};

use tokio::net::TcpListener;
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming};
use uncloud_proto::v1::{
    self,
    console_request::Message,
    vm_service_server::{VmService, VmServiceServer},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the next call gets.
pub(crate) enum Answer {
    /// A VM of this name.
    Vm(&'static str),
    /// This status.
    Refusal(Status),
    /// The steps of a watch, then the end of the stream, or a status.
    Steps(Vec<Result<v1::WatchVmsResponse, Status>>),
    /// No answer at all.
    Silence,
    /// A console that greets, repeats what is typed, and ends when that has a `$`.
    Echo,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asked {
    Create { request_id: String },
    Get,
    Restart,
    Stop,
    Watch { from_revision: i64 },
    Console,
}

#[derive(Clone, Default)]
pub(crate) struct Fake {
    script: Arc<Mutex<VecDeque<Answer>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Fake {
    pub(crate) async fn start(script: impl IntoIterator<Item = Answer>) -> (SocketAddr, Self) {
        let fake = Self { script: Arc::new(Mutex::new(script.into_iter().collect())), ..Self::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(VmServiceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (address, fake)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    async fn next(&self, asked: Asked) -> Result<Answer, Status> {
        self.asked.lock().unwrap().push(asked);
        let answer = self.script.lock().unwrap().pop_front();
        match answer {
            Some(Answer::Refusal(status)) => Err(status),
            Some(Answer::Silence) => std::future::pending().await,
            Some(answer) => Ok(answer),
            None => Err(Status::internal("the script is over")),
        }
    }

    async fn vm(&self, asked: Asked) -> Result<Option<v1::Vm>, Status> {
        match self.next(asked).await? {
            Answer::Vm(name) => Ok(Some(v1::Vm { id: VM_ID.to_owned(), name: name.to_owned(), ..Default::default() })),
            _ => Err(Status::internal("the script has no VM here")),
        }
    }
}

pub(crate) const VM_ID: &str = "6f9619ff-8b86-4d11-b42d-00c04fc964ff";

fn not_here<T>() -> Result<T, Status> {
    Err(Status::unimplemented("not in the fake"))
}

#[tonic::async_trait]
impl VmService for Fake {
    type WatchVmsStream = Answers<v1::WatchVmsResponse>;
    type ConsoleStream = Answers<v1::ConsoleResponse>;
    type GetVmLogStream = Answers<v1::GetVmLogResponse>;
    type ScreenshotStream = Answers<v1::ScreenshotResponse>;
    type VncStream = Answers<v1::VncResponse>;

    async fn create_vm(&self, r: Request<v1::CreateVmRequest>) -> Result<Response<v1::CreateVmResponse>, Status> {
        let request_id = r.into_inner().request_id;
        Ok(Response::new(v1::CreateVmResponse { vm: self.vm(Asked::Create { request_id }).await? }))
    }

    async fn get_vm(&self, _: Request<v1::GetVmRequest>) -> Result<Response<v1::GetVmResponse>, Status> {
        Ok(Response::new(v1::GetVmResponse { vm: self.vm(Asked::Get).await? }))
    }

    async fn stop_vm(&self, _: Request<v1::StopVmRequest>) -> Result<Response<v1::StopVmResponse>, Status> {
        Ok(Response::new(v1::StopVmResponse { vm: self.vm(Asked::Stop).await? }))
    }

    async fn restart_vm(&self, _: Request<v1::RestartVmRequest>) -> Result<Response<v1::RestartVmResponse>, Status> {
        Ok(Response::new(v1::RestartVmResponse { vm: self.vm(Asked::Restart).await? }))
    }

    async fn pause_vm(&self, _: Request<v1::PauseVmRequest>) -> Result<Response<v1::PauseVmResponse>, Status> {
        not_here()
    }

    async fn resume_vm(&self, _: Request<v1::ResumeVmRequest>) -> Result<Response<v1::ResumeVmResponse>, Status> {
        not_here()
    }

    async fn migrate_vm(&self, _: Request<v1::MigrateVmRequest>) -> Result<Response<v1::MigrateVmResponse>, Status> {
        not_here()
    }

    async fn resize_disk(&self, _: Request<v1::ResizeDiskRequest>) -> Result<Response<v1::ResizeDiskResponse>, Status> {
        not_here()
    }

    async fn attach_disk(&self, _: Request<v1::AttachDiskRequest>) -> Result<Response<v1::AttachDiskResponse>, Status> {
        not_here()
    }

    async fn detach_disk(&self, _: Request<v1::DetachDiskRequest>) -> Result<Response<v1::DetachDiskResponse>, Status> {
        not_here()
    }

    async fn create_snapshot(
        &self,
        _: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::CreateSnapshotResponse>, Status> {
        not_here()
    }

    async fn delete_snapshot(
        &self,
        _: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        not_here()
    }

    async fn revert_to_snapshot(
        &self,
        _: Request<v1::RevertToSnapshotRequest>,
    ) -> Result<Response<v1::RevertToSnapshotResponse>, Status> {
        not_here()
    }

    async fn clone_vm(&self, _: Request<v1::CloneVmRequest>) -> Result<Response<v1::CloneVmResponse>, Status> {
        not_here()
    }

    async fn cancel_migration(
        &self,
        _: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        not_here()
    }

    async fn watch_vms(&self, r: Request<v1::WatchVmsRequest>) -> Result<Response<Self::WatchVmsStream>, Status> {
        match self.next(Asked::Watch { from_revision: r.into_inner().from_revision }).await? {
            Answer::Steps(steps) => {
                let open_ended = !matches!(steps.last(), Some(Err(_)));
                let steps = tokio_stream::iter(steps);
                let rest = tokio_stream::pending().take(if open_ended { 1 } else { 0 });
                Ok(Response::new(Box::pin(steps.chain(rest))))
            }
            _ => Err(Status::internal("the script has no watch here")),
        }
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Result<Response<v1::ListVmsResponse>, Status> {
        not_here()
    }

    async fn update_vm(&self, _: Request<v1::UpdateVmRequest>) -> Result<Response<v1::UpdateVmResponse>, Status> {
        not_here()
    }

    async fn screenshot(&self, _: Request<v1::ScreenshotRequest>) -> Result<Response<Self::ScreenshotStream>, Status> {
        not_here()
    }

    async fn vnc(&self, _: Request<Streaming<v1::VncRequest>>) -> Result<Response<Self::VncStream>, Status> {
        not_here()
    }

    async fn delete_vm(&self, _: Request<v1::DeleteVmRequest>) -> Result<Response<v1::DeleteVmResponse>, Status> {
        not_here()
    }

    async fn start_vm(&self, _: Request<v1::StartVmRequest>) -> Result<Response<v1::StartVmResponse>, Status> {
        not_here()
    }

    async fn explain_vm(&self, _: Request<v1::ExplainVmRequest>) -> Result<Response<v1::ExplainVmResponse>, Status> {
        not_here()
    }

    async fn console(
        &self,
        r: Request<Streaming<v1::ConsoleRequest>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut typed = r.into_inner();
        let Some(v1::ConsoleRequest { message: Some(Message::Open(_)) }) = typed.message().await? else {
            return Err(Status::invalid_argument("the first message is not Open"));
        };
        let Answer::Echo = self.next(Asked::Console).await? else {
            return Err(Status::internal("the script has no console here"));
        };
        let (output, stream) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            output.send(Ok(v1::ConsoleResponse { output: b"login: ".to_vec() })).await.ok();
            while let Ok(Some(v1::ConsoleRequest { message: Some(Message::Input(input)) })) = typed.message().await {
                let is_last = input.contains(&b'$');
                if output.send(Ok(v1::ConsoleResponse { output: input })).await.is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_vm_log(&self, _: Request<v1::GetVmLogRequest>) -> Result<Response<Self::GetVmLogStream>, Status> {
        not_here()
    }
}
