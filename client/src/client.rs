//! Calls to a cluster: finds a controller that can answer, and tries again what `retry.rs` allows.
//!
//! One method for each call of the API (except the agents' own). Answers and refusals are those of the server;
//! where no controller could be reached, the status is `UNAVAILABLE` and says which addresses were tried.

use std::{
    collections::HashMap,
    error::Error as _,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, ConnectError, Request, Response, Status, Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use uncloud_proto::{
    LEADER_METADATA_KEY, MAX_MESSAGE_BYTES, READ_METADATA_KEY,
    v1::{
        self, cluster_service_client::ClusterServiceClient, host_service_client::HostServiceClient,
        image_service_client::ImageServiceClient, vm_service_client::VmServiceClient,
    },
};

use crate::{
    endpoints::{BadEndpoint, Endpoints},
    retry::{self, Decision, Fate, Safety, Target},
    watch::Watch,
};

/// How long a call may take in all when the caller says nothing. Longer than a controller's takeover (DESIGN, section 4).
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one attempt to connect may take. Longer means that a host that is off holds up the next endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a connection with an open call is probed, and how long the answer may take: a controller that hangs or is cut
/// off is left within 3 s, so that another one can still be asked. An answer needs no more than the controller's network task; an
/// agent leaves a controller that is silent for as long. Shorter, and a controller whose machine is busy loses its clients.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(1);
const KEEP_ALIVE_ANSWER: Duration = Duration::from_secs(2);
/// Bytes typed into a console that may wait to be sent, in messages.
const CONSOLE_INPUT_QUEUE: usize = 64;

/// How to reach a cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// Addresses of controllers, `HOST:PORT`.
    pub endpoints: Vec<String>,
    /// How long a call may take in all, with everything that is tried again.
    pub timeout: Duration,
    /// How new the answers to reads must be.
    pub reads: Reads,
}

/// How new the answer to a read must be, where a controller answers from its own copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// It shows everything that was acknowledged before it was asked for.
    #[default]
    Linearizable,
    /// It may be old.
    Stale,
}

impl Reads {
    /// The request, with this said.
    fn mark<T>(self, request: T) -> Request<T> {
        let mut request = Request::new(request);
        if self == Self::Stale {
            request.metadata_mut().insert(READ_METADATA_KEY, MetadataValue::from_static("stale"));
        }
        request
    }
}

/// A handle on a cluster. Cheap to clone; clones share connections.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoints: Mutex<Endpoints>,
    channels: Mutex<HashMap<String, Channel>>,
    timeout: Duration,
    reads: Reads,
}

/// A viewer's side of an open screen.
#[derive(Debug)]
pub struct Vnc {
    /// What to send. The screen is closed when it is dropped.
    pub input: mpsc::Sender<v1::VncRequest>,
    /// What the VNC server says.
    pub output: Streaming<v1::VncResponse>,
}

/// The user's side of an open console.
#[derive(Debug)]
pub struct Console {
    /// What to send. Ends with [`Console::output`].
    pub input: mpsc::Sender<v1::ConsoleRequest>,
    /// What the guest writes.
    pub output: Streaming<v1::ConsoleResponse>,
}

/// Declares one method for each unary call.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $answer:ident, $service:ident, $safety:ident;)*) => {
        impl Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                ///
                /// The server's refusal, or that nobody could be reached.
                pub async fn $name(&self, request: v1::$request) -> Result<v1::$answer, Status> {
                    let reads = self.shared.reads;
                    self.call(Safety::$safety, request, |channel, request| async move {
                        $service(channel).$name(reads.mark(request)).await
                    })
                    .await
                }
            )*
        }
    };
}

calls! {
    /// Shows one VM.
    get_vm(GetVmRequest) -> GetVmResponse, vms, Repeatable;
    /// Lists one page of VMs.
    list_vms(ListVmsRequest) -> ListVmsResponse, vms, Repeatable;
    /// Changes a VM. The same call again changes nothing more.
    update_vm(UpdateVmRequest) -> UpdateVmResponse, vms, Repeatable;
    /// Deletes a VM. Not tried again when the answer was lost: the name could belong to another VM by then.
    delete_vm(DeleteVmRequest) -> DeleteVmResponse, vms, Once;
    /// Makes running the desired state.
    start_vm(StartVmRequest) -> StartVmResponse, vms, Repeatable;
    /// Makes stopped the desired state.
    stop_vm(StopVmRequest) -> StopVmResponse, vms, Repeatable;
    /// Restarts a VM. Not tried again when the answer was lost: that could restart it twice.
    restart_vm(RestartVmRequest) -> RestartVmResponse, vms, Once;
    /// Lets a running guest stand still.
    pause_vm(PauseVmRequest) -> PauseVmResponse, vms, Repeatable;
    /// Lets a paused guest go on.
    resume_vm(ResumeVmRequest) -> ResumeVmResponse, vms, Repeatable;
    /// Moves a running VM to another host. Not tried again when the answer was lost: it would be refused.
    migrate_vm(MigrateVmRequest) -> MigrateVmResponse, vms, Once;
    /// Gives up a migration. Not tried again when the answer was lost: it would be refused.
    cancel_migration(CancelMigrationRequest) -> CancelMigrationResponse, vms, Once;
    /// Makes a disk larger. The same call again finds it done.
    resize_disk(ResizeDiskRequest) -> ResizeDiskResponse, vms, Repeatable;
    /// Gives a VM one more disk. Not tried again when the answer was lost: it might be a second one.
    attach_disk(AttachDiskRequest) -> AttachDiskResponse, vms, Once;
    /// Takes a disk from a VM. Not tried again when the answer was lost: another may have its name by then.
    detach_disk(DetachDiskRequest) -> DetachDiskResponse, vms, Once;
    /// Takes a snapshot. Not tried again when the answer was lost: its name would be taken.
    create_snapshot(CreateSnapshotRequest) -> CreateSnapshotResponse, vms, Once;
    /// Deletes a snapshot. Not tried again when the answer was lost: another may have its name by then.
    delete_snapshot(DeleteSnapshotRequest) -> DeleteSnapshotResponse, vms, Once;
    /// Puts disks back. Never tried again by itself: what the guest has written since would be lost.
    revert_to_snapshot(RevertToSnapshotRequest) -> RevertToSnapshotResponse, vms, Once;
    /// Says why a VM is where it is.
    explain_vm(ExplainVmRequest) -> ExplainVmResponse, vms, Repeatable;
    /// Lists hosts.
    list_hosts(ListHostsRequest) -> ListHostsResponse, hosts, Repeatable;
    /// Shows one host.
    get_host(GetHostRequest) -> GetHostResponse, hosts, Repeatable;
    /// Lets a host take no new VMs.
    cordon_host(CordonHostRequest) -> CordonHostResponse, hosts, Repeatable;
    /// Lets a host take VMs again.
    uncordon_host(UncordonHostRequest) -> UncordonHostResponse, hosts, Repeatable;
    /// Says what would become of VMs if their hosts died.
    simulate_host_failure(SimulateHostFailureRequest) -> SimulateHostFailureResponse, hosts, Repeatable;
    /// Forgets a host.
    remove_host(RemoveHostRequest) -> RemoveHostResponse, hosts, Once;
    /// Shows one image.
    get_image(GetImageRequest) -> GetImageResponse, images, Repeatable;
    /// Lists images.
    list_images(ListImagesRequest) -> ListImagesResponse, images, Repeatable;
    /// Forgets an image.
    delete_image(DeleteImageRequest) -> DeleteImageResponse, images, Once;
    /// Shows the cluster as a whole.
    get_status(GetStatusRequest) -> GetStatusResponse, cluster, Repeatable;
    /// Lists events, newest first.
    list_events(ListEventsRequest) -> ListEventsResponse, cluster, Repeatable;
    /// Lets failover go on although the brake is on.
    release_brake(ReleaseBrakeRequest) -> ReleaseBrakeResponse, cluster, Once;
    /// Switches failover off for a while, or on again.
    set_failover(SetFailoverRequest) -> SetFailoverResponse, cluster, Repeatable;
}

impl Client {
    /// Makes a client. Nothing is sent before the first call.
    ///
    /// # Errors
    ///
    /// An endpoint is not an address.
    pub fn new(options: Options) -> Result<Self, BadEndpoint> {
        let shared = Shared {
            endpoints: Mutex::new(Endpoints::new(&options.endpoints)?),
            channels: Mutex::default(),
            timeout: options.timeout,
            reads: options.reads,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Creates a VM. Gives the request an id if it has none, so that it may be tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn create_vm(&self, mut request: v1::CreateVmRequest) -> Result<v1::CreateVmResponse, Status> {
        identify(&mut request.request_id);
        self.call(Safety::Repeatable, request, |c, r| async move { vms(c).create_vm(r).await }).await
    }

    /// Creates a VM like another one, with copies of its disks. Gives the request an id if it has none, so that it may be tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn clone_vm(&self, mut request: v1::CloneVmRequest) -> Result<v1::CloneVmResponse, Status> {
        identify(&mut request.request_id);
        self.call(Safety::Repeatable, request, |c, r| async move { vms(c).clone_vm(r).await }).await
    }

    /// Registers an image. Gives the request an id if it has none, so that it may be tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn create_image(&self, mut request: v1::CreateImageRequest) -> Result<v1::CreateImageResponse, Status> {
        identify(&mut request.request_id);
        self.call(Safety::Repeatable, request, |c, r| async move { images(c).create_image(r).await }).await
    }

    /// Lists the VMs of all pages as one answer. Its revision is that of the first page: a watch from there misses
    /// nothing, though it may repeat something.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn list_all_vms(&self, mut request: v1::ListVmsRequest) -> Result<v1::ListVmsResponse, Status> {
        let mut all = self.list_vms(request.clone()).await?;
        while !all.next_page_token.is_empty() {
            request.page_token = std::mem::take(&mut all.next_page_token);
            let page = self.list_vms(request.clone()).await?;
            all.vms.extend(page.vms);
            all.next_page_token = page.next_page_token;
        }
        Ok(all)
    }

    /// Has a host emptied, or shows how that goes. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn drain_host(&self, request: v1::DrainHostRequest) -> Result<Streaming<v1::DrainHostResponse>, Status> {
        self.call(Safety::Repeatable, request, |c, r| async move { hosts(c).drain_host(r).await }).await
    }

    /// Opens the serial log. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn get_vm_log(&self, request: v1::GetVmLogRequest) -> Result<Streaming<v1::GetVmLogResponse>, Status> {
        self.call(Safety::Repeatable, request, |c, r| async move { vms(c).get_vm_log(r).await }).await
    }

    /// Opens a console. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn console(&self, open: v1::ConsoleOpen) -> Result<Console, Status> {
        self.call(Safety::Repeatable, open, |channel, open| async move {
            let (input, queue) = mpsc::channel(CONSOLE_INPUT_QUEUE);
            let first = v1::ConsoleRequest { message: Some(v1::console_request::Message::Open(open)) };
            input.try_send(first).expect("the queue is empty and its receiver is alive");
            let output = vms(channel).console(ReceiverStream::new(queue)).await?.into_inner();
            Ok(Response::new(Console { input, output }))
        })
        .await
    }

    /// Takes a screenshot: a PNG file in pieces. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn screenshot(
        &self,
        request: v1::ScreenshotRequest,
    ) -> Result<Streaming<v1::ScreenshotResponse>, Status> {
        self.call(Safety::Repeatable, request, |c, r| async move { vms(c).screenshot(r).await }).await
    }

    /// Opens a VNC connection. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn vnc(&self, open: v1::VncOpen) -> Result<Vnc, Status> {
        self.call(Safety::Repeatable, open, |channel, open| async move {
            let (input, queue) = mpsc::channel(CONSOLE_INPUT_QUEUE);
            let first = v1::VncRequest { message: Some(v1::vnc_request::Message::Open(open)) };
            input.try_send(first).expect("the queue is empty and its receiver is alive");
            let output = vms(channel).vnc(ReceiverStream::new(queue)).await?.into_inner();
            Ok(Response::new(Vnc { input, output }))
        })
        .await
    }

    /// Shows an image until nothing more is going to happen to it. Only the opening is tried again.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn watch_image(
        &self,
        request: v1::WatchImageRequest,
    ) -> Result<Streaming<v1::WatchImageResponse>, Status> {
        self.call(Safety::Repeatable, request, |c, r| async move { images(c).watch_image(r).await }).await
    }

    /// Sends the files of an image. Takes as long as that takes. Not tried again: what was sent is gone.
    ///
    /// # Errors
    ///
    /// The server's refusal, or that nobody could be reached.
    pub async fn upload_image(
        &self,
        messages: impl tokio_stream::Stream<Item = v1::UploadImageRequest> + Send + 'static,
    ) -> Result<v1::UploadImageResponse, Status> {
        // So that this goes to a controller that works.
        self.get_status(v1::GetStatusRequest {}).await?;
        let address = self.endpoint();
        let answer = images(self.channel(&address)?).upload_image(messages).await;
        answer.map(Response::into_inner).map_err(|status| {
            let fate = fate_of(&status);
            self.explained(status, &fate)
        })
    }

    /// Watches VMs; resumes by itself.
    #[must_use]
    pub fn watch_vms(&self, request: v1::WatchVmsRequest) -> Watch<v1::WatchVmsRequest> {
        Watch::new(self.clone(), request)
    }

    /// Watches hosts; resumes by itself.
    #[must_use]
    pub fn watch_hosts(&self, request: v1::WatchHostsRequest) -> Watch<v1::WatchHostsRequest> {
        Watch::new(self.clone(), request)
    }

    /// Watches events; resumes by itself.
    #[must_use]
    pub fn watch_events(&self, request: v1::WatchEventsRequest) -> Watch<v1::WatchEventsRequest> {
        Watch::new(self.clone(), request)
    }

    /// Whether a controller that can be reached now says that it leads and serves. One try, for a second at the most.
    pub async fn is_serving(&self) -> bool {
        let Ok(channel) = self.channel(&self.endpoint()) else { return false };
        let request = HealthCheckRequest { service: String::new() };
        match timeout(Duration::from_secs(1), HealthClient::new(channel).check(request)).await {
            Ok(Ok(answer)) => answer.into_inner().status() == ServingStatus::Serving,
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// The address that the next call goes to.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.shared.endpoints.lock().unwrap_or_else(PoisonError::into_inner).current().to_owned()
    }

    /// Makes one call, again and again as far as that is safe and time is left.
    pub(crate) async fn call<Q, A, F, Fut>(&self, safety: Safety, request: Q, send: F) -> Result<A, Status>
    where
        Q: Clone,
        F: Fn(Channel, Q) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let deadline = Instant::now() + self.shared.timeout;
        let mut failures = 0;
        loop {
            let address = self.endpoint();
            let status = match timeout_at(deadline, send(self.channel(&address)?, request.clone())).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => return Err(self.no_answer(&address)),
            };
            failures += 1;
            let fate = fate_of(&status);
            let left = deadline.saturating_duration_since(Instant::now());
            match retry::decide(safety, &fate, failures, left, rand::random()) {
                Decision::GiveUp => return Err(self.explained(status, &fate)),
                Decision::Retry { after, at } => {
                    self.turn_to(&at, &address);
                    sleep(after).await;
                }
            }
        }
    }

    /// Lets the next call go elsewhere than to `from`.
    pub(crate) fn turn_to(&self, at: &Target, from: &str) {
        let mut endpoints = self.shared.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        match at {
            Target::Leader(leader) => endpoints.follow(leader, from),
            Target::Next => endpoints.failed(from),
        }
    }

    /// The connection to an address; made when it is first used, made again by itself when it broke.
    fn channel(&self, address: &str) -> Result<Channel, Status> {
        let mut channels = self.shared.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| Status::invalid_argument(format!("`{address}` is not an address: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
            .keep_alive_timeout(KEEP_ALIVE_ANSWER)
            .tcp_nodelay(true)
            .connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    fn no_answer(&self, address: &str) -> Status {
        Status::deadline_exceeded(format!(
            "no answer from {address} within {:?}; whether the request was carried out is not known",
            self.shared.timeout
        ))
    }

    /// Puts what the transport said into words. What the server said stays as it is.
    fn explained(&self, status: Status, fate: &Fate) -> Status {
        let Some(cause) = root_cause(&status) else { return status };
        let tried = self.shared.endpoints.lock().unwrap_or_else(PoisonError::into_inner).to_string();
        match fate {
            Fate::NotTaken { .. } => Status::unavailable(format!("no controller can be reached at {tried}: {cause}")),
            Fate::Lost => Status::unavailable(format!(
                "the connection was lost ({cause}); whether the request was carried out is not known"
            )),
            Fate::Refused => status,
        }
    }
}

/// What is known about a call that ended with this status.
pub(crate) fn fate_of(status: &Status) -> Fate {
    if let Some(leader) = status.metadata().get(LEADER_METADATA_KEY) {
        let leader = leader.to_str().ok().filter(|l| !l.is_empty()).map(ToOwned::to_owned);
        return Fate::NotTaken { leader };
    }
    let mut source = status.source();
    // Only a status that was made on this side has a source.
    let is_ours = source.is_some();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return Fate::NotTaken { leader: None };
        }
        source = error.source();
    }
    if is_ours || status.code() == Code::Unavailable { Fate::Lost } else { Fate::Refused }
}

fn root_cause(status: &Status) -> Option<String> {
    let mut cause = status.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

fn identify(request_id: &mut String) {
    if request_id.is_empty() {
        *request_id = uuid::Uuid::new_v4().to_string();
    }
}

pub(crate) fn vms(channel: Channel) -> VmServiceClient<Channel> {
    VmServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

pub(crate) fn hosts(channel: Channel) -> HostServiceClient<Channel> {
    HostServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

fn images(channel: Channel) -> ImageServiceClient<Channel> {
    ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

pub(crate) fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}
