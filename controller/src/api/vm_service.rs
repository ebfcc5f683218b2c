//! `VmService`.

use std::pin::Pin;

use futures_util::StreamExt as _;
use prost::Message as _;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status, Streaming};
use uncloud_proto::{
    ids::{HostId, VmId},
    v1::{self, vm_service_server::VmService},
};
use uuid::Uuid;

use super::{
    console,
    context::{Context, Freshness, timely},
    convert,
    validate::{self, VmRef},
    vm_watch::{self, Shown},
    watch::Stream,
};
use crate::{
    leadership::{Committed, Leader, WriteError},
    model::{Desired, Liveness, Phase},
    scheduler::{self, Limits},
    sessions::serving,
    state::{
        self, State, VmEntry,
        command::{Answer, Command, NewClone, PowerChange, Refusal, RequestId},
        exports::network_pools,
    },
};

/// How often MAC addresses are minted anew when one is taken. With 40 random bits, two in a row are a fault.
const MINTS: usize = 3;
/// Hosts that an explanation names for one reason.
const NAMED_HOSTS: usize = 20;

/// Bytes after which a page is full, whatever its size in VMs: clients take 4 MiB at once, and one VM may have 200 KiB.
const FULL_PAGE: usize = 2 << 20;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Vms {
    pub(super) context: Context,
}

impl Vms {
    async fn resolve(&self, vm: &VmRef) -> Result<VmId, Status> {
        self.context.read(|_, state| Ok(state.resolve_vm(&vm.vm, &vm.owner)?)).await
    }

    /// Has a command about a VM carried out and shows the VM as it is then.
    async fn change(&self, vm: &VmRef, command: impl FnOnce(VmId) -> Command) -> Result<Option<v1::Vm>, Status> {
        timely(async {
            let id = self.resolve(vm).await?;
            let leader = self.context.leader()?;
            let committed = self.context.submit(&leader, command(id)).await?;
            Ok(Some(shown(&leader, id, committed)?))
        })
        .await
    }

    async fn create(&self, request: v1::CreateVmRequest) -> Result<v1::Vm, Status> {
        let request_id = request_id(&request);
        let mut vm = validate::create_vm(request, VmId::from_uuid(Uuid::new_v4()), &mut rand::random)?;
        let leader = self.context.leader()?;
        for attempt in 1.. {
            let command = Command::CreateVm { request: request_id.clone(), vm: Box::new(vm.clone()) };
            match leader.writer.submit(command).await {
                Ok(Committed { answer: Answer::Vm(record), revision, replayed }) => {
                    let revision = replayed.unwrap_or(revision);
                    return Ok(leader.mirror.read(|state| convert::created_vm(state, &record, revision)));
                }
                Ok(Committed { answer: Answer::Done | Answer::Image(_), .. }) => return Err(wrong_answer()),
                Err(WriteError::Refused(Refusal::MacTaken(_))) if attempt < MINTS => {
                    validate::mint_macs(&mut vm.spec, &mut rand::random);
                }
                Err(error) => return Err(self.context.write_failed(error)),
            }
        }
        unreachable!("the last attempt returns")
    }

    async fn copy(&self, request: v1::CloneVmRequest) -> Result<v1::Vm, Status> {
        let request_id = clone_request_id(&request);
        let validate::CloneVm { vm, snapshot, name } = validate::clone_vm(request)?;
        let source = self.resolve(&vm).await?;
        let leader = self.context.leader()?;
        let id = VmId::from_uuid(Uuid::new_v4());
        for attempt in 1.. {
            let clone =
                NewClone { id, name: name.clone(), macs: validate::macs(validate::MAX_NICS, &mut rand::random) };
            let (request, snapshot, clone) = (request_id.clone(), snapshot.clone(), Box::new(clone));
            match leader.writer.submit(Command::CloneVm { request, source, snapshot, clone }).await {
                Ok(Committed { answer: Answer::Vm(record), revision, replayed }) => {
                    let revision = replayed.unwrap_or(revision);
                    return Ok(leader.mirror.read(|state| convert::created_vm(state, &record, revision)));
                }
                Ok(Committed { answer: Answer::Done | Answer::Image(_), .. }) => return Err(wrong_answer()),
                Err(WriteError::Refused(Refusal::MacTaken(_))) if attempt < MINTS => {}
                Err(error) => return Err(self.context.write_failed(error)),
            }
        }
        unreachable!("the last attempt returns")
    }
}

/// The VM after a change. One that went with it is shown as it was at the end.
fn shown(leader: &Leader, id: VmId, committed: Committed) -> Result<v1::Vm, Status> {
    let Committed { answer, revision, replayed: _ } = committed;
    leader.mirror.read(|state| match (state.vm(id), answer) {
        (Some(entry), _) => Ok(convert::vm(state, entry)),
        (None, Answer::Vm(record)) => Ok(convert::created_vm(state, &record, revision)),
        (None, Answer::Done | Answer::Image(_)) => Err(Refusal::NoVm(id.to_string()).into()),
    })
}

/// What both QEMUs of a migration know, and nobody else: 256 random bits.
pub(crate) fn migration_secret() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The state answered something that does not fit the command.
pub(super) fn wrong_answer() -> Status {
    Status::internal("the change was made, but its answer is of the wrong kind; this is a fault of the controller")
}

/// The request's id with a digest of everything else in it.
fn request_id(request: &v1::CreateVmRequest) -> Option<RequestId> {
    if request.request_id.is_empty() {
        return None;
    }
    // Maps have no order on the wire, so they are taken out and added sorted.
    let mut rest = request.clone();
    let id = std::mem::take(&mut rest.request_id);
    let labels = std::mem::take(&mut rest.labels);
    let host_labels = rest.spec.as_mut().map(|s| std::mem::take(&mut s.host_labels)).unwrap_or_default();
    Some(RequestId { id, fingerprint: fingerprint(&rest.encode_to_vec(), [labels, host_labels]) })
}

/// The same. That it is not a request to create a VM is part of the digest.
fn clone_request_id(request: &v1::CloneVmRequest) -> Option<RequestId> {
    if request.request_id.is_empty() {
        return None;
    }
    let mut rest = request.clone();
    let id = std::mem::take(&mut rest.request_id);
    let message = [b"clone".as_slice(), &rest.encode_to_vec()].concat();
    Some(RequestId { id, fingerprint: fingerprint(&message, []) })
}

/// A digest that says whether two requests are the same.
pub(super) fn fingerprint<const N: usize>(
    message: &[u8],
    maps: [std::collections::HashMap<String, String>; N],
) -> String {
    let mut digest = Sha256::new();
    let mut add = |bytes: &[u8]| {
        // With its length, so that no two sequences of parts give the same bytes.
        digest.update((bytes.len() as u64).to_be_bytes());
        digest.update(bytes);
    };
    add(message);
    for map in maps {
        let map: std::collections::BTreeMap<_, _> = map.into_iter().collect();
        add(&(map.len() as u64).to_be_bytes());
        for (key, value) in map {
            add(key.as_bytes());
            add(value.as_bytes());
        }
    }
    digest.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn explain(leader: &Leader, state: &State, entry: &VmEntry) -> v1::ExplainVmResponse {
    let silent = leader.silent_hosts();
    let limits = Limits {
        cpu_overcommit_percent: leader.settings.cpu_overcommit_percent,
        disk_overcommit_percent: leader.settings.disk_overcommit_percent,
        silent: &silent,
    };
    let explanation = scheduler::explain(state.view(), &state::request(&entry.record), &limits);
    let name =
        |id: &uncloud_proto::ids::HostId| state.host(*id).map_or_else(|| id.to_string(), |h| h.record.name.clone());
    let refusals = explanation
        .groups
        .iter()
        .map(|group| v1::HostRefusal {
            reason: group.rejection.to_string(),
            count: u32::try_from(group.hosts.len()).unwrap_or(u32::MAX),
            hosts: group.hosts.iter().take(NAMED_HOSTS).map(name).collect(),
        })
        .collect();
    let host = entry.record.placement.host;
    let waits = host.and_then(|host| serving::waits(state, leader.sessions.grants(), host, &entry.record));
    let waits = waits.map(|why| format!("; {why}")).unwrap_or_default();
    v1::ExplainVmResponse {
        vm: Some(convert::vm(state, entry)),
        summary: summary(state, entry, &explanation.summary()) + &waits,
        refusals,
        candidates: explanation.candidates.iter().map(name).collect(),
    }
}

/// The whole story in one sentence.
fn summary(state: &State, entry: &VmEntry, capacity: &str) -> String {
    let placement = &entry.record.placement;
    let status = entry.effective_status();
    let phase = status.phase;
    let Some(host) = placement.host else {
        return match entry.record.desired {
            Desired::Running => format!("{phase:?}: {capacity}"),
            Desired::Stopped | Desired::Deleted => format!("{phase:?}: it should not run, and has no host"),
        };
    };
    let waits = if phase == Phase::Stopped && waits_with_disks(state, entry, host) {
        "; what is still to be done to its disks waits for that host, which is not heard"
    } else {
        ""
    };
    let host = state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone());
    let why = &placement.why;
    let reason = match status.reason {
        "" => String::new(),
        reason if reason == why => String::new(),
        reason => format!(": {reason}"),
    };
    match phase {
        Phase::Unreachable => format!("{phase:?} on {host}{reason}; elsewhere: {capacity}"),
        Phase::Pending
        | Phase::Scheduled
        | Phase::Preparing
        | Phase::Starting
        | Phase::Running
        | Phase::Stopping
        | Phase::Stopped
        | Phase::Failed
        | Phase::Deleting
        | Phase::Migrating
        | Phase::Paused => format!("{phase:?} on {host}{reason} (placed there: {why}){waits}"),
    }
}

/// Whether something is to be done to a VM's disks by its host, which is down. Those in network pools are another host's.
fn waits_with_disks(state: &State, entry: &VmEntry, host: HostId) -> bool {
    let is_up = state.host(host).is_some_and(|h| h.record.liveness == Liveness::Up);
    !is_up && entry.record.has_disk_orders() && network_pools(state, &entry.record, host).is_empty()
}

type BoxStream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Opens a watch.
pub(super) async fn watch(context: &Context, request: Request<v1::WatchVmsRequest>) -> Result<Stream<Shown>, Status> {
    let freshness = Freshness::of(request.metadata())?;
    let request = validate::watch_vms(request.into_inner())?;
    timely(vm_watch::open(context, freshness, request)).await
}

#[tonic::async_trait]
impl VmService for Vms {
    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Result<Response<v1::CreateVmResponse>, Status> {
        let vm = timely(self.create(request.into_inner())).await?;
        Ok(Response::new(v1::CreateVmResponse { vm: Some(vm) }))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::GetVmResponse>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let v1::GetVmRequest { vm, owner } = request.into_inner();
        let vm = validate::vm_ref(vm, owner)?;
        let readable = self.context.readable(freshness).await?;
        let vm = self.context.read_in(&readable, |state| {
            let id = state.resolve_vm(&vm.vm, &vm.owner)?;
            Ok(state.vm(id).map(|entry| convert::vm(state, entry)))
        })?;
        Ok(Response::new(v1::GetVmResponse { vm }))
    }

    async fn list_vms(&self, request: Request<v1::ListVmsRequest>) -> Result<Response<v1::ListVmsResponse>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let wanted = validate::list_vms(request.into_inner())?;
        let readable = self.context.readable(freshness).await?;
        let answer = self.context.read_in(&readable, |state| {
            let host = wanted.host.as_ref().map(|h| state.resolve_host(h)).transpose()?;
            let matches = |entry: &VmEntry| {
                let record = &entry.record;
                wanted.owner.as_ref().is_none_or(|o| *o == record.owner)
                    && host.is_none_or(|h| record.placement.host == Some(h))
                    && wanted.phase.is_none_or(|p| convert::phase(entry.effective_status().phase) == p)
                    && validate::has_labels(&record.labels, &wanted.labels)
            };
            let mut vms = Vec::new();
            let (mut bytes, mut next_page_token) = (0, String::new());
            for (_, entry) in state.vms_from(wanted.after).filter(|(_, entry)| matches(entry)) {
                if vms.len() >= wanted.page_size || bytes >= FULL_PAGE {
                    next_page_token = vms.last().map(|vm: &v1::Vm| vm.id.clone()).unwrap_or_default();
                    break;
                }
                let vm = convert::vm(state, entry);
                bytes += vm.encoded_len();
                vms.push(vm);
            }
            Ok(v1::ListVmsResponse { vms, next_page_token, revision: state.revision().0 })
        })?;
        Ok(Response::new(answer))
    }

    async fn update_vm(&self, request: Request<v1::UpdateVmRequest>) -> Result<Response<v1::UpdateVmResponse>, Status> {
        let (vm, update) = validate::update_vm(request.into_inner())?;
        let vm = self.change(&vm, |vm| Command::UpdateVm { vm, update: Box::new(update) }).await?;
        Ok(Response::new(v1::UpdateVmResponse { vm }))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Result<Response<v1::DeleteVmResponse>, Status> {
        let v1::DeleteVmRequest { vm, owner } = request.into_inner();
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::DeleteVm { vm }).await?;
        Ok(Response::new(v1::DeleteVmResponse { vm }))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Result<Response<v1::StartVmResponse>, Status> {
        let v1::StartVmRequest { vm, owner } = request.into_inner();
        let vm = self
            .change(&validate::vm_ref(vm, owner)?, |vm| Command::SetDesired { vm, desired: PowerChange::Start })
            .await?;
        Ok(Response::new(v1::StartVmResponse { vm }))
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Result<Response<v1::StopVmResponse>, Status> {
        let v1::StopVmRequest { vm, owner, force } = request.into_inner();
        let desired = if force { PowerChange::ForceStop } else { PowerChange::Stop };
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::SetDesired { vm, desired }).await?;
        Ok(Response::new(v1::StopVmResponse { vm }))
    }

    async fn restart_vm(
        &self,
        request: Request<v1::RestartVmRequest>,
    ) -> Result<Response<v1::RestartVmResponse>, Status> {
        let v1::RestartVmRequest { vm, owner, force } = request.into_inner();
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::RestartVm { vm, force }).await?;
        Ok(Response::new(v1::RestartVmResponse { vm }))
    }

    async fn pause_vm(&self, request: Request<v1::PauseVmRequest>) -> Result<Response<v1::PauseVmResponse>, Status> {
        let v1::PauseVmRequest { vm, owner } = request.into_inner();
        let desired = PowerChange::Pause;
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::SetDesired { vm, desired }).await?;
        Ok(Response::new(v1::PauseVmResponse { vm }))
    }

    async fn resume_vm(&self, request: Request<v1::ResumeVmRequest>) -> Result<Response<v1::ResumeVmResponse>, Status> {
        let v1::ResumeVmRequest { vm, owner } = request.into_inner();
        let desired = PowerChange::Resume;
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::SetDesired { vm, desired }).await?;
        Ok(Response::new(v1::ResumeVmResponse { vm }))
    }

    async fn migrate_vm(
        &self,
        request: Request<v1::MigrateVmRequest>,
    ) -> Result<Response<v1::MigrateVmResponse>, Status> {
        let wanted = validate::migrate_vm(request.into_inner())?;
        let to = match &wanted.host {
            Some(host) => Some(self.context.read(|_, state| Ok(state.resolve_host(host)?)).await?),
            None => None,
        };
        let (secret, bytes_per_second) = (migration_secret(), wanted.bytes_per_second);
        let command = |vm| Command::MigrateVm { vm, to, secret, bytes_per_second };
        let vm = self.change(&wanted.vm, command).await?;
        Ok(Response::new(v1::MigrateVmResponse { vm }))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        let v1::CancelMigrationRequest { vm, owner } = request.into_inner();
        let vm = self.change(&validate::vm_ref(vm, owner)?, |vm| Command::CancelMigration { vm }).await?;
        Ok(Response::new(v1::CancelMigrationResponse { vm }))
    }

    async fn resize_disk(
        &self,
        request: Request<v1::ResizeDiskRequest>,
    ) -> Result<Response<v1::ResizeDiskResponse>, Status> {
        let validate::ResizeDisk { vm, disk, size_bytes } = validate::resize_disk(request.into_inner())?;
        let vm = self.change(&vm, |vm| Command::ResizeDisk { vm, disk, size_bytes }).await?;
        Ok(Response::new(v1::ResizeDiskResponse { vm }))
    }

    async fn attach_disk(
        &self,
        request: Request<v1::AttachDiskRequest>,
    ) -> Result<Response<v1::AttachDiskResponse>, Status> {
        let (vm, disk) = validate::attach_disk(request.into_inner(), Uuid::new_v4())?;
        let disk = Box::new(disk);
        let vm = self.change(&vm, |vm| Command::AttachDisk { vm, disk }).await?;
        Ok(Response::new(v1::AttachDiskResponse { vm }))
    }

    async fn detach_disk(
        &self,
        request: Request<v1::DetachDiskRequest>,
    ) -> Result<Response<v1::DetachDiskResponse>, Status> {
        let (vm, disk, how) = validate::detach_disk(request.into_inner())?;
        let vm = self.change(&vm, |vm| Command::DetachDisk { vm, disk, how }).await?;
        Ok(Response::new(v1::DetachDiskResponse { vm }))
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::CreateSnapshotResponse>, Status> {
        let v1::CreateSnapshotRequest { vm, owner, snapshot } = request.into_inner();
        let (vm, name) = validate::snapshot(vm, owner, snapshot)?;
        let vm = self.change(&vm, |vm| Command::CreateSnapshot { vm, id: Uuid::new_v4(), name }).await?;
        Ok(Response::new(v1::CreateSnapshotResponse { vm }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        let v1::DeleteSnapshotRequest { vm, owner, snapshot } = request.into_inner();
        let (vm, name) = validate::snapshot(vm, owner, snapshot)?;
        let vm = self.change(&vm, |vm| Command::DeleteSnapshot { vm, name }).await?;
        Ok(Response::new(v1::DeleteSnapshotResponse { vm }))
    }

    async fn revert_to_snapshot(
        &self,
        request: Request<v1::RevertToSnapshotRequest>,
    ) -> Result<Response<v1::RevertToSnapshotResponse>, Status> {
        let v1::RevertToSnapshotRequest { vm, owner, snapshot } = request.into_inner();
        let (vm, name) = validate::snapshot(vm, owner, snapshot)?;
        let vm = self.change(&vm, |vm| Command::RevertToSnapshot { vm, name }).await?;
        Ok(Response::new(v1::RevertToSnapshotResponse { vm }))
    }

    async fn clone_vm(&self, request: Request<v1::CloneVmRequest>) -> Result<Response<v1::CloneVmResponse>, Status> {
        let vm = timely(self.copy(request.into_inner())).await?;
        Ok(Response::new(v1::CloneVmResponse { vm: Some(vm) }))
    }

    type WatchVmsStream = BoxStream<v1::WatchVmsResponse>;

    /// Who calls from another process is served by `shared_watch.rs`.
    async fn watch_vms(&self, request: Request<v1::WatchVmsRequest>) -> Result<Response<Self::WatchVmsStream>, Status> {
        let decode = |shown: Shown| {
            let bytes = shown.parts().concat();
            v1::WatchVmsResponse::decode(bytes.as_slice()).map_err(|error| Status::internal(error.to_string()))
        };
        Ok(Response::new(watch(&self.context, request).await?.map(move |shown| decode(shown?)).boxed()))
    }

    async fn explain_vm(
        &self,
        request: Request<v1::ExplainVmRequest>,
    ) -> Result<Response<v1::ExplainVmResponse>, Status> {
        let v1::ExplainVmRequest { vm, owner } = request.into_inner();
        let vm = validate::vm_ref(vm, owner)?;
        let answer = self
            .context
            .read(|leader, state| {
                let id = state.resolve_vm(&vm.vm, &vm.owner)?;
                let entry = state.vm(id).ok_or(Refusal::NoVm(vm.vm))?;
                Ok(explain(leader, state, entry))
            })
            .await?;
        Ok(Response::new(answer))
    }

    type ConsoleStream = BoxStream<v1::ConsoleResponse>;

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleRequest>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let stream = console::console(&self.context, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    type GetVmLogStream = BoxStream<v1::GetVmLogResponse>;

    async fn get_vm_log(
        &self,
        request: Request<v1::GetVmLogRequest>,
    ) -> Result<Response<Self::GetVmLogStream>, Status> {
        let target = validate::get_vm_log(request.into_inner())?;
        let stream = console::log(&self.context, target).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    type ScreenshotStream = BoxStream<v1::ScreenshotResponse>;

    async fn screenshot(
        &self,
        request: Request<v1::ScreenshotRequest>,
    ) -> Result<Response<Self::ScreenshotStream>, Status> {
        let v1::ScreenshotRequest { vm, owner } = request.into_inner();
        let stream = console::screenshot(&self.context, &validate::vm_ref(vm, owner)?).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    type VncStream = BoxStream<v1::VncResponse>;

    async fn vnc(&self, request: Request<Streaming<v1::VncRequest>>) -> Result<Response<Self::VncStream>, Status> {
        let stream = console::vnc(&self.context, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_depends_on_everything_but_the_id_and_the_order_of_maps() {
        let request = |n: usize, name: &str| {
            let mut labels: Vec<_> = (0..20).map(|i| (format!("k{i}"), "v".to_owned())).collect();
            labels.rotate_left(n);
            v1::CreateVmRequest {
                request_id: "r".to_owned(),
                name: name.to_owned(),
                labels: labels.into_iter().collect(),
                spec: Some(v1::VmSpec::default()),
                ..Default::default()
            }
        };
        let print = |r: &v1::CreateVmRequest| request_id(r).unwrap().fingerprint;
        let first = print(&request(0, "a"));
        assert_eq!(first.len(), 64);
        for n in 1..20 {
            assert_eq!(print(&request(n, "a")), first);
        }
        assert_ne!(print(&request(0, "b")), first);
        let mut moved = request(0, "a");
        let labels = std::mem::take(&mut moved.labels);
        moved.spec.as_mut().unwrap().host_labels = labels;
        assert_ne!(print(&moved), first, "labels of the host are other labels");
        let other_id = v1::CreateVmRequest { request_id: "s".to_owned(), ..request(0, "a") };
        assert_eq!(print(&other_id), first);
        assert_eq!(request_id(&v1::CreateVmRequest::default()), None);
    }
}
