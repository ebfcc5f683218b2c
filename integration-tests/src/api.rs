//! The API as a client sees it, with the waiting that tests need. It uses the generated clients only.

use std::time::Duration;

use anyhow::Context as _;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use uncloud_proto::v1::{
    self, CreateVmRequest, Host, HostState, Vm, VmPhase, cluster_service_client::ClusterServiceClient,
    host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
    vm_service_client::VmServiceClient,
};

use crate::wait_for;

/// The longest that one call may take. A controller answers or refuses long before.
const CALL_LIMIT: Duration = Duration::from_secs(15);

/// Clients of all services at one address. Connects when needed, and again after a loss.
#[derive(Clone)]
pub struct Api {
    endpoint: String,
    channel: Channel,
}

impl Api {
    /// For `host:port`.
    ///
    /// # Errors
    ///
    /// That is not an address.
    pub fn new(endpoint: &str) -> anyhow::Result<Self> {
        let channel = Endpoint::new(format!("http://{endpoint}"))?
            .connect_timeout(Duration::from_secs(3))
            .http2_keep_alive_interval(Duration::from_secs(3))
            .keep_alive_timeout(Duration::from_secs(3))
            .timeout(CALL_LIMIT)
            .connect_lazy();
        Ok(Self { endpoint: endpoint.to_owned(), channel })
    }

    /// `host:port`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The VM service.
    #[must_use]
    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    /// The host service.
    #[must_use]
    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }

    /// The image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// The cluster service.
    #[must_use]
    pub fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
    }

    /// CreateVm.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn create(&self, request: CreateVmRequest) -> Result<Vm, Status> {
        let answer = self.vms().create_vm(request).await?.into_inner();
        answer.vm.ok_or_else(|| Status::internal("CreateVm answered without a VM"))
    }

    /// GetVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn vm(&self, id: &str) -> Result<Vm, Status> {
        let request = v1::GetVmRequest { vm: id.to_owned(), owner: String::new() };
        let answer = self.vms().get_vm(request).await?.into_inner();
        answer.vm.ok_or_else(|| Status::internal("GetVm answered without a VM"))
    }

    /// DeleteVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        self.vms().delete_vm(v1::DeleteVmRequest { vm: id.to_owned(), owner: String::new() }).await.map(drop)
    }

    /// StartVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn start(&self, id: &str) -> Result<(), Status> {
        self.vms().start_vm(v1::StartVmRequest { vm: id.to_owned(), owner: String::new() }).await.map(drop)
    }

    /// StopVm, by UUID.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn stop(&self, id: &str) -> Result<(), Status> {
        self.vms().stop_vm(v1::StopVmRequest { vm: id.to_owned(), ..Default::default() }).await.map(drop)
    }

    /// All events of a VM or host, oldest first.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn events(&self, subject: &str) -> Result<Vec<v1::Event>, Status> {
        let request = v1::ListEventsRequest { subject: subject.to_owned(), limit: 1000, ..Default::default() };
        let mut events = self.cluster().list_events(request).await?.into_inner().events;
        events.reverse();
        Ok(events)
    }

    /// All hosts.
    ///
    /// # Errors
    ///
    /// The status of the refusal.
    pub async fn list_hosts(&self) -> Result<Vec<Host>, Status> {
        Ok(self.hosts().list_hosts(v1::ListHostsRequest {}).await?.into_inner().hosts)
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
            Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
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
