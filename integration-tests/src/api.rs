//! The API as a client sees it, with the waiting that tests need. It uses the generated clients only.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use tonic::{
    Code, ConnectError, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use uncloud_proto::{
    LEADER_METADATA_KEY,
    v1::{
        self, CreateVmRequest, Host, HostState, Vm, VmPhase, cluster_service_client::ClusterServiceClient,
        host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
        vm_service_client::VmServiceClient,
    },
};

use crate::wait_for;

/// The longest that one call may take. A controller answers or refuses long before.
const CALL_LIMIT: Duration = Duration::from_secs(15);

/// The same with several controllers: one that hangs must not hold up the others.
const CALL_LIMIT_OF_MANY: Duration = Duration::from_secs(4);

/// Clients of all services. Connects when needed, and again after a loss. With several controllers, calls go to one of
/// them, and after a failure of a call in here to the one that it named as the leader, or else to the next one.
#[derive(Clone)]
pub struct Api {
    endpoint: String,
    controllers: Arc<Vec<(String, Channel)>>,
    current: Arc<AtomicUsize>,
}

impl Api {
    /// For `host:port`, or for several with commas between them.
    ///
    /// # Errors
    ///
    /// That is not an address.
    pub fn new(endpoints: &str) -> anyhow::Result<Self> {
        let addresses: Vec<&str> = endpoints.split(',').collect();
        let limit = if addresses.len() == 1 { CALL_LIMIT } else { CALL_LIMIT_OF_MANY };
        let channel = |address: &&str| {
            let endpoint = Endpoint::new(format!("http://{address}"))?
                .connect_timeout(Duration::from_secs(3))
                .http2_keep_alive_interval(Duration::from_secs(3))
                .keep_alive_timeout(Duration::from_secs(3))
                .timeout(limit);
            anyhow::Ok(((*address).to_owned(), endpoint.connect_lazy()))
        };
        let controllers = addresses.iter().map(channel).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { endpoint: endpoints.to_owned(), controllers: Arc::new(controllers), current: Arc::default() })
    }

    /// All addresses, with commas between them.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn at(&self) -> usize {
        self.current.load(Ordering::Relaxed) % self.controllers.len()
    }

    fn channel(&self) -> Channel {
        self.controllers[self.at()].1.clone()
    }

    /// Makes one call. With several controllers it is made again elsewhere if this one surely did not take it: it was not
    /// reached, or it said that it does not lead.
    async fn call<Q: Clone, A, F>(&self, request: Q, send: impl Fn(Channel, Q) -> F) -> Result<A, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut left = self.controllers.len();
        loop {
            let at = self.at();
            let status = match send(self.channel(), request.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let taken = self.turn(at, &status);
            left -= 1;
            if taken || left == 0 {
                return Err(status);
            }
        }
    }

    /// Lets the next call go elsewhere, if this failure is a reason. Whether the call may have been carried out.
    fn turn(&self, from: usize, status: &Status) -> bool {
        let leader = status.metadata().get(LEADER_METADATA_KEY);
        let named = leader.and_then(|l| l.to_str().ok());
        let named = named.and_then(|leader| self.controllers.iter().position(|(address, _)| address == leader));
        let no_answer = matches!(
            status.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
        );
        if named.is_some() || no_answer {
            let next = named.unwrap_or(from + 1) % self.controllers.len();
            // Not if somebody else has turned already.
            let _ = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        let mut cause = status.source();
        while let Some(error) = cause {
            if error.is::<ConnectError>() {
                return false;
            }
            cause = error.source();
        }
        leader.is_none()
    }

    /// The VM service.
    #[must_use]
    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel())
    }

    /// The host service.
    #[must_use]
    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel())
    }

    /// The image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel())
    }

    /// The cluster service.
    #[must_use]
    pub fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel())
    }

    /// GetStatus.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn status(&self) -> Result<v1::GetStatusResponse, Status> {
        self.call(v1::GetStatusRequest {}, |c, r| async move { ClusterServiceClient::new(c).get_status(r).await }).await
    }

    /// CreateVm.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn create(&self, request: CreateVmRequest) -> Result<Vm, Status> {
        let answer = self.call(request, |c, r| async move { VmServiceClient::new(c).create_vm(r).await }).await?;
        answer.vm.ok_or_else(|| Status::internal("CreateVm answered without a VM"))
    }

    /// GetVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn vm(&self, id: &str) -> Result<Vm, Status> {
        let request = v1::GetVmRequest { vm: id.to_owned(), owner: String::new() };
        let answer = self.call(request, |c, r| async move { VmServiceClient::new(c).get_vm(r).await }).await?;
        answer.vm.ok_or_else(|| Status::internal("GetVm answered without a VM"))
    }

    /// DeleteVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = v1::DeleteVmRequest { vm: id.to_owned(), owner: String::new() };
        self.call(request, |c, r| async move { VmServiceClient::new(c).delete_vm(r).await }).await.map(drop)
    }

    /// StartVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn start(&self, id: &str) -> Result<(), Status> {
        let request = v1::StartVmRequest { vm: id.to_owned(), owner: String::new() };
        self.call(request, |c, r| async move { VmServiceClient::new(c).start_vm(r).await }).await.map(drop)
    }

    /// StopVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn stop(&self, id: &str) -> Result<(), Status> {
        let request = v1::StopVmRequest { vm: id.to_owned(), ..Default::default() };
        self.call(request, |c, r| async move { VmServiceClient::new(c).stop_vm(r).await }).await.map(drop)
    }

    /// All events of a VM or host, oldest first.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn events(&self, subject: &str) -> Result<Vec<v1::Event>, Status> {
        let request = v1::ListEventsRequest { subject: subject.to_owned(), limit: 1000, ..Default::default() };
        let mut events =
            self.call(request, |c, r| async move { ClusterServiceClient::new(c).list_events(r).await }).await?.events;
        events.reverse();
        Ok(events)
    }

    /// All hosts.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn list_hosts(&self) -> Result<Vec<Host>, Status> {
        Ok(self
            .call(v1::ListHostsRequest {}, |c, r| async move { HostServiceClient::new(c).list_hosts(r).await })
            .await?
            .hosts)
    }

    /// Waits until `test` holds for the VM.
    ///
    /// # Errors
    ///
    /// It does not within the limit; the error has the VM as it was last.
    pub async fn wait_vm(
        &self,
        id: &str,
        what: &str,
        limit: Duration,
        test: impl Fn(&Vm) -> bool,
    ) -> anyhow::Result<Vm> {
        let what = format!("VM {id} {what}");
        let waited = wait_for(&what, limit, async || match self.vm(id).await {
            Ok(vm) if test(&vm) => Ok(vm),
            Ok(vm) => Err(summary(&vm)),
            Err(status) => Err(status.to_string()),
        });
        match waited.await {
            Ok(vm) => Ok(vm),
            Err(error) => {
                let events = self.events(id).await.unwrap_or_default();
                let told: Vec<String> = events.iter().map(|e| format!("{}: {}", e.r#type, e.message)).collect();
                Err(error).with_context(|| format!("its events:\n  {}", told.join("\n  ")))
            }
        }
    }

    /// Waits until the VM is in this phase.
    ///
    /// # Errors
    ///
    /// It is not within the limit.
    pub async fn wait_phase(&self, id: &str, phase: VmPhase, limit: Duration) -> anyhow::Result<Vm> {
        self.wait_vm(id, &format!("is {}", phase.as_str_name()), limit, |vm| phase_of(vm) == phase).await
    }

    /// Waits until the VM is Running.
    ///
    /// # Errors
    ///
    /// It is not within the limit.
    pub async fn wait_running(&self, id: &str, limit: Duration) -> anyhow::Result<Vm> {
        self.wait_phase(id, VmPhase::Running, limit).await
    }

    /// Waits until the VM is Running at a newer incarnation.
    ///
    /// # Errors
    ///
    /// It is not within the limit.
    pub async fn wait_moved(&self, before: &Vm, limit: Duration) -> anyhow::Result<Vm> {
        let old = incarnation_of(before);
        self.wait_vm(&before.id, &format!("runs at an incarnation above {old}"), limit, |vm| {
            phase_of(vm) == VmPhase::Running
                && incarnation_of(vm) > old
                && vm.status.as_ref().is_some_and(|s| s.incarnation > old)
        })
        .await
    }

    /// Waits until the VM is no more.
    ///
    /// # Errors
    ///
    /// It is still there when the limit is over.
    pub async fn wait_gone(&self, id: &str, limit: Duration) -> anyhow::Result<()> {
        wait_for(&format!("VM {id} is gone"), limit, async || match self.vm(id).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(status.to_string()),
            Ok(vm) => Err(summary(&vm)),
        })
        .await
    }

    /// Waits until the host is in this state.
    ///
    /// # Errors
    ///
    /// It is not within the limit.
    pub async fn wait_host(&self, name: &str, state: HostState, limit: Duration) -> anyhow::Result<Host> {
        wait_for(&format!("host {name} is {}", state.as_str_name()), limit, async || {
            let hosts = self.list_hosts().await.map_err(|s| s.to_string())?;
            let host = hosts.into_iter().find(|h| h.name == name);
            match host {
                Some(host) if host.state() == state => Ok(host),
                Some(host) => Err(format!("{} ({})", host.state().as_str_name(), host.reason)),
                None => Err("no such host".into()),
            }
        })
        .await
    }
}

/// The phase of a VM.
#[must_use]
pub fn phase_of(vm: &Vm) -> VmPhase {
    vm.status.as_ref().map_or(VmPhase::Unspecified, |s| s.phase())
}

/// Name of the host that a VM was given. Empty: none.
#[must_use]
pub fn host_of(vm: &Vm) -> &str {
    vm.placement.as_ref().map_or("", |p| p.host_name.as_str())
}

/// The incarnation of a VM; 0 before the first.
#[must_use]
pub fn incarnation_of(vm: &Vm) -> u64 {
    vm.placement.as_ref().map_or(0, |p| p.incarnation)
}

/// A VM in one line.
#[must_use]
pub fn summary(vm: &Vm) -> String {
    let reason = vm.status.as_ref().map_or("", |s| s.reason.as_str());
    format!(
        "{} `{}` on `{}`, incarnation {}, {} ({reason})",
        vm.id,
        vm.name,
        host_of(vm),
        incarnation_of(vm),
        phase_of(vm).as_str_name()
    )
}

/// The fields that a refusal names in its details.
#[must_use]
pub fn error_fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|b| b.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|v| v.field).collect()
}
