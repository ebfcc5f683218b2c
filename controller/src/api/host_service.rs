//! `HostService`.

use tonic::{Request, Response, Status};
use uncloud_proto::{
    ids::HostId,
    v1::{self, host_service_server::HostService},
};

use super::{
    context::{Context, Freshness, timely},
    convert::{self, HostExtras},
    drain, host_watch, validate, watch, what_if,
};
use crate::{
    leadership::Leader,
    model::HostMode,
    state::{
        HostEntry, State,
        command::{Command, Refusal},
    },
};

/// VMs that `GetHost` shows.
const VMS_SHOWN: usize = 1000;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    pub(super) context: Context,
}

impl Hosts {
    async fn set_mode(&self, host: String, mode: HostMode, reason: String) -> Result<Option<v1::Host>, Status> {
        timely(async {
            let id = self.context.read(|_, state| Ok(state.resolve_host(&host)?)).await?;
            let leader = self.context.leader()?;
            self.context.submit(&leader, Command::SetHostMode { host: id, mode, reason }).await?;
            let shown = leader.mirror.read(|state| state.host(id).map(|entry| shown(&leader, entry)));
            Ok(Some(shown.ok_or(Refusal::NoHost(host))?))
        })
        .await
    }
}

/// A host with what is known and not stored.
pub(super) fn shown(leader: &Leader, entry: &HostEntry) -> v1::Host {
    convert::host(entry, &extras(leader, entry.record.id))
}

fn extras(leader: &Leader, host: HostId) -> HostExtras {
    let now = leader.clock.now();
    let (hearing, heartbeat) = {
        let health = leader.health();
        (health.state(host, now), health.last_heartbeat(host))
    };
    HostExtras { hearing, heartbeat_age: heartbeat.map(|t| now.since(t)), live: leader.sessions.facts(host) }
}

fn sorted<'a>(leader: &Leader, state: &'a State) -> Vec<v1::Host> {
    let mut hosts: Vec<&'a HostEntry> = state.hosts().map(|(_, entry)| entry).collect();
    hosts.sort_by(|a, b| (&a.record.name, a.record.id).cmp(&(&b.record.name, b.record.id)));
    hosts.into_iter().map(|entry| shown(leader, entry)).collect()
}

#[tonic::async_trait]
impl HostService for Hosts {
    async fn list_hosts(&self, _: Request<v1::ListHostsRequest>) -> Result<Response<v1::ListHostsResponse>, Status> {
        let answer = self
            .context
            .read(|leader, state| {
                Ok(v1::ListHostsResponse { hosts: sorted(leader, state), revision: state.revision().0 })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn get_host(&self, request: Request<v1::GetHostRequest>) -> Result<Response<v1::GetHostResponse>, Status> {
        let host = validate::host_ref(request.into_inner().host)?;
        let answer = self
            .context
            .read(|leader, state| {
                let id = state.resolve_host(&host)?;
                let entry = state.host(id).ok_or(Refusal::NoHost(host))?;
                let vms = state.vms_on(id).filter_map(|vm| state.vm(vm)).take(VMS_SHOWN);
                Ok(v1::GetHostResponse {
                    host: Some(shown(leader, entry)),
                    vms: vms.map(|vm| convert::vm(state, vm)).collect(),
                })
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn cordon_host(
        &self,
        request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::CordonHostResponse>, Status> {
        let (host, reason) = validate::cordon_host(request.into_inner())?;
        let host = self.set_mode(host, HostMode::Cordoned, reason).await?;
        Ok(Response::new(v1::CordonHostResponse { host }))
    }

    type DrainHostStream = watch::Stream<v1::DrainHostResponse>;

    async fn drain_host(
        &self,
        request: Request<v1::DrainHostRequest>,
    ) -> Result<Response<Self::DrainHostStream>, Status> {
        let wanted = validate::drain_host(request.into_inner())?;
        Ok(Response::new(timely(drain::open(&self.context, wanted)).await?))
    }

    async fn uncordon_host(
        &self,
        request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::UncordonHostResponse>, Status> {
        let host = validate::host_ref(request.into_inner().host)?;
        let host = self.set_mode(host, HostMode::Active, String::new()).await?;
        Ok(Response::new(v1::UncordonHostResponse { host }))
    }

    async fn remove_host(
        &self,
        request: Request<v1::RemoveHostRequest>,
    ) -> Result<Response<v1::RemoveHostResponse>, Status> {
        let host = validate::host_ref(request.into_inner().host)?;
        timely(async {
            let id = self.context.read(|_, state| Ok(state.resolve_host(&host)?)).await?;
            let leader = self.context.leader()?;
            self.context.submit(&leader, Command::RemoveHost { host: id }).await?;
            // Its session, if it has one, sees that the record is gone and ends; should the host have registered again
            // since, its table entry must stay.
            if leader.mirror.read(|state| state.host(id).is_none()) {
                leader.health().remove(id);
            }
            Ok(Response::new(v1::RemoveHostResponse {}))
        })
        .await
    }

    async fn simulate_host_failure(
        &self,
        request: Request<v1::SimulateHostFailureRequest>,
    ) -> Result<Response<v1::SimulateHostFailureResponse>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let hosts = validate::simulate_host_failure(request.into_inner())?;
        Ok(Response::new(timely(what_if::simulate(&self.context, freshness, hosts)).await?))
    }

    type WatchHostsStream = watch::Stream<v1::WatchHostsResponse>;

    async fn watch_hosts(
        &self,
        request: Request<v1::WatchHostsRequest>,
    ) -> Result<Response<Self::WatchHostsStream>, Status> {
        let from = validate::resume_point(request.into_inner().from_revision)?;
        Ok(Response::new(timely(host_watch::open(&self.context, from)).await?))
    }
}
