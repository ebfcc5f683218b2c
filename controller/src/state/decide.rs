//! A command goes in, a decision comes out.

use std::sync::Arc;

use uncloud_proto::ids::VmId;

use super::{
    REQUESTS_FORGOTTEN_MS, State, attach, clone,
    command::{Answer, Change, Command, Context, Decision, Refusal, RequestId},
    disks,
    draft::Draft,
    drain, exports, hosts, images, migration, placement, reports, snapshots, update, vms,
};
use crate::model::{
    DrainHow, Extra, HostMode, Key, OwnDisks, Record, RequestAnswer, RequestRecord, Subject, image::ImageState,
};

/// How many VMs one command places or moves. Most moves write a record, a status and an event: two such commands, and what is to be
/// said of two hosts, fill the 128 operations that etcd takes in one transaction.
pub const MAX_PLACEMENTS: usize = 20;

/// How many reports one command may have. The end of a VM removes up to eleven keys and writes an event; ten of them
/// stay under 128 operations.
pub const MAX_REPORTS: usize = 10;

/// How many operations a command that goes through many VMs may have before it takes up the next one, which adds twelve at the most.
const FULL_OPERATIONS: usize = 112;

/// The same in bytes of VM records. etcd takes 1.5 MiB in one transaction, and one VM may have 200 KiB of labels.
const FULL_BYTES: usize = 512 * 1024;

impl State {
    /// What a command changes, and what its caller is told once that is stored. A change with no mutations is not to
    /// be written.
    ///
    /// # Errors
    ///
    /// When the command is refused. Nothing changes.
    pub fn decide(&self, command: &Command, cx: &Context) -> Result<Decision, Refusal> {
        let mut draft = Draft::new(self, cx);
        let answer = match command {
            Command::CreateVm { request, vm } => {
                if let Some(replayed) = self.replay(request.as_ref(), cx)? {
                    return Ok(replayed);
                }
                vms::create(&mut draft, request.as_ref(), vm)?
            }
            Command::SetDesired { vm, desired } => vms::set_desired(&mut draft, *vm, *desired)?,
            Command::RestartVm { vm, force } => vms::restart(&mut draft, *vm, *force)?,
            Command::UpdateVm { vm, update } => update::update(&mut draft, *vm, update)?,
            Command::ResizeDisk { vm, disk, size_bytes } => disks::resize(&mut draft, *vm, disk, *size_bytes)?,
            Command::AttachDisk { vm, disk } => attach::attach(&mut draft, *vm, disk)?,
            Command::DetachDisk { vm, disk, how } => attach::detach(&mut draft, *vm, disk, *how)?,
            Command::CreateSnapshot { vm, id, name } => snapshots::create(&mut draft, *vm, *id, name)?,
            Command::DeleteSnapshot { vm, name } => snapshots::delete(&mut draft, *vm, name)?,
            Command::RevertToSnapshot { vm, name } => snapshots::revert(&mut draft, *vm, name)?,
            Command::CloneVm { request, source, snapshot, clone } => {
                if let Some(replayed) = self.replay(request.as_ref(), cx)? {
                    return Ok(replayed);
                }
                clone::create(&mut draft, request.as_ref(), *source, snapshot.as_deref(), clone)?
            }
            Command::DeleteVm { vm } => vms::delete(&mut draft, *vm)?,
            Command::MigrateVm { vm, to, secret, bytes_per_second } => {
                migration::begin(&mut draft, *vm, *to, secret, *bytes_per_second, OwnDisks::Copied)?
            }
            Command::CancelMigration { vm } => migration::cancel(&mut draft, *vm)?,
            Command::GiveUpMigration { vm, migration, why } => {
                migration::cannot_go_on(&mut draft, *vm, *migration, why)?
            }
            Command::SetHostMode { host, mode, reason } => {
                hosts::set_mode(&mut draft, *host, *mode, (DrainHow::LiveOnly, OwnDisks::Stay), reason)?
            }
            Command::DrainHost { host, how, disks, reason } => {
                hosts::set_mode(&mut draft, *host, HostMode::Draining, (*how, *disks), reason)?
            }
            Command::DrainVm { vm, from, step } => drain::step(&mut draft, *vm, *from, step)?,
            Command::RemoveHost { host } => hosts::remove(&mut draft, *host)?,
            Command::CreateImage { request, image } => {
                if let Some(replayed) = self.replay(request.as_ref(), cx)? {
                    return Ok(replayed);
                }
                images::create(&mut draft, request.as_ref(), image)?
            }
            Command::DeleteImage { image } => images::delete(&mut draft, *image)?,
            Command::ImageArrived { image, outcome } => images::arrived(&mut draft, *image, outcome)?,
            Command::ForgetImage { image } => images::forget(&mut draft, *image)?,
            Command::RegisterHost { host } => hosts::register(&mut draft, host)?,
            Command::UpdatePools { host, pools } => hosts::update_pools(&mut draft, *host, pools)?,
            Command::NoteServed { host, vm, said } => exports::note_served(&mut draft, *host, *vm, said)?,
            Command::Report { host, reports } => {
                if reports.len() > MAX_REPORTS {
                    let message = format!("at most {MAX_REPORTS} reports at once");
                    return Err(Refusal::Precondition(message));
                }
                for report in reports {
                    reports::take(&mut draft, *host, report)?;
                }
                Answer::Done
            }
            Command::NoteUnknownVm { host, vm } => hosts::note_unknown_vm(&mut draft, *host, *vm)?,
            Command::DeclareLapsed { host, lapsed, limit } => {
                hosts::declare_lapsed(&mut draft, *host, *lapsed, *limit)?
            }
            Command::Place { vms } => {
                for &vm in vms.iter().take(MAX_PLACEMENTS) {
                    if draft.is_full() {
                        break;
                    }
                    place_one(&mut draft, vm)?;
                }
                Answer::Done
            }
            Command::SetLeases { fast_lease_ms, patient_lease_ms } => {
                hosts::set_leases(&mut draft, *fast_lease_ms, *patient_lease_ms)?
            }
            Command::SetFailover { change } => hosts::set_failover(&mut draft, change)?,
            Command::Note { event, message } => {
                draft.event(Subject::Cluster, "cluster", *event, message.clone());
                Answer::Done
            }
        };
        Ok(draft.finish(answer))
    }

    /// The answer that was given to this request before.
    fn replay(&self, request: Option<&RequestId>, cx: &Context) -> Result<Option<Decision>, Refusal> {
        let Some(request) = request else { return Ok(None) };
        let key = Key::Request(request.id.clone());
        if self.is_unreadable(&key) {
            return Err(Refusal::Unreadable(key.to_string()));
        }
        let Some((record, revision)) = self.requests.get(&request.id) else { return Ok(None) };
        if record.at.0.saturating_add(REQUESTS_FORGOTTEN_MS) <= cx.now.0 {
            return Ok(None);
        }
        if record.fingerprint != request.fingerprint {
            return Err(Refusal::RequestIdReused(request.id.clone()));
        }
        let answer = match &record.answer {
            RequestAnswer::Vm { record, .. } => Answer::Vm(Arc::new((**record).clone())),
            RequestAnswer::Image { id } => match self.images.get(id) {
                Some(image) if image.record.state != ImageState::Deleting => Answer::Image(Arc::clone(&image.record)),
                Some(_) | None => {
                    let message = format!("image {id}, which this request created, has been deleted since");
                    return Err(Refusal::Precondition(message));
                }
            },
        };
        Ok(Some(Decision { change: Change::default(), answer, replayed: Some(*revision) }))
    }
}

/// One VM of a batch. One that cannot be touched does not keep the others waiting.
pub(super) fn place_one(draft: &mut Draft<'_>, vm: VmId) -> Result<(), Refusal> {
    match placement::place(draft, vm) {
        Ok(()) | Err(Refusal::NoVm(_) | Refusal::Unreadable(_)) => Ok(()),
        Err(other) => Err(other),
    }
}

impl Draft<'_> {
    /// Whether a command that goes through many VMs should leave the rest to the next one.
    pub(super) fn is_full(&self) -> bool {
        self.operations() >= FULL_OPERATIONS || self.bytes() >= FULL_BYTES
    }

    /// Remembers the answer to a request.
    pub(super) fn remember(&mut self, request: Option<&RequestId>, answer: RequestAnswer) -> Result<(), Refusal> {
        let Some(RequestId { id, fingerprint }) = request else { return Ok(()) };
        let record = RequestRecord { fingerprint: fingerprint.clone(), answer, at: self.cx.now, extra: Extra::new() };
        self.put(Key::Request(id.clone()), Record::Request(Arc::new(record)))
    }
}
