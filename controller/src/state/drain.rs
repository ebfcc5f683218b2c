//! Emptying a host: what stands in the way of each of its VMs, and the single steps. Which step is next, and when, is the
//! reconciler's (`reconcile/drain.rs`).
//!
//! ```text
//!             migrates                                        (migration.rs: M1 to M4)
//!   on the host ─────────────────────────────────▶ on another host
//!       └─ is told to stop ─▶ says that it has ─▶ new incarnation elsewhere
//! ```
//!
//! # Safety argument (P1)
//!
//! A step moves nothing by itself. [`DrainStep::Migrate`] begins a migration as a user could. [`DrainStep::Stop`] notes the
//! present incarnation as the one that is moving out: its host is told STOP for it. Only when that host says that this
//! incarnation has stopped, does the VM get another (W2, as of any VM that should run and has stopped); until then nothing else
//! has changed, and if the host is lost meanwhile, what counts is its lease, as ever. There is no way back from the STOP under
//! the same incarnation, so that a drain that is ended meanwhile changes nothing about it: the VM then starts where it is best,
//! which may be where it was.

use std::{borrow::Cow, collections::BTreeSet};

use uncloud_proto::ids::{HostId, VmId};

use super::{
    State, VmEntry, absorb,
    command::{Answer, Context, DrainStep, Refusal},
    draft::Draft,
    migration::{self, MIGRATIONS_PER_HOST},
    placement,
};
use crate::{
    model::{Desired, DrainHow, EventType, HostMode, HostRecord, Liveness, OwnDisks, Phase, VmRecord},
    scheduler::{self, ClusterView, Home, Limits},
};

/// What can become of a VM whose host is being emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prospect {
    /// It does not execute and does not keep the host from being switched off.
    AtRest,
    /// It is on its way, and how.
    Moving(String),
    /// It can migrate now.
    CanMigrate,
    /// It cannot leave at the moment, and why; that passes.
    Waits(String),
    /// It cannot migrate, and why; but stopped, it could be started on another host.
    CanStop(String),
    /// It cannot leave as things are, and why.
    Stuck(String),
}

impl State {
    /// What can become of a VM whose host is being emptied. Looks at every host where the VM could leave; otherwise it is cheap.
    #[must_use]
    pub fn prospect(&self, vm: VmId, cx: &Context) -> Prospect {
        prospect(&mut Draft::new(self, cx), vm)
    }
}

fn prospect(draft: &mut Draft<'_>, vm: VmId) -> Prospect {
    let entry = match draft.vm(vm) {
        Ok(entry) => entry,
        Err(refusal) => return Prospect::Stuck(refusal.to_string()),
    };
    let record = &*entry.record;
    let Some(host) = record.placement.host else { return Prospect::AtRest };
    let phase = entry.current_status().map(|s| s.phase);
    match record.desired {
        Desired::Deleted if matches!(phase, Some(Phase::Stopped | Phase::Deleting)) => return Prospect::AtRest,
        Desired::Deleted => return Prospect::Waits("is being deleted".into()),
        Desired::Stopped if entry.ended_for_good() => return Prospect::AtRest,
        Desired::Stopped if phase == Some(Phase::Stopped) => {
            return Prospect::Waits("has stopped, and its disks are still worked on".into());
        }
        Desired::Stopped => return Prospect::Waits("is being stopped".into()),
        Desired::Running => {}
    }
    if let Some(migration) = &record.migration {
        return Prospect::Moving(format!("migrates to host `{}`", draft.host_name(migration.target)));
    }
    if record.is_moving_out() {
        return Prospect::Moving("is being stopped, to start on another host".into());
    }
    let host = match draft.host(host) {
        Ok(host) => host,
        Err(refusal) => return Prospect::Stuck(refusal.to_string()),
    };
    if host.liveness != Liveness::Up {
        // If it may leave a host that is down, that is a failover, and soon done.
        return Prospect::Stuck(match entry.effective_status().reason {
            "" => "its host is down".to_owned(),
            reason => reason.to_owned(),
        });
    }
    match phase {
        Some(Phase::Running) if record.paused => Prospect::Stuck("is paused; resume it, or stop it".into()),
        Some(Phase::Running) => of_running(draft, &entry, &host),
        Some(Phase::Failed) => {
            let status = entry.effective_status();
            if entry.current_status().is_none_or(|s| s.next_attempt.is_none()) {
                return Prospect::AtRest; // only its user starts it again
            }
            let why = format!("does not run, and is tried again here: {}", status.reason);
            of_unmovable(draft, record, why)
        }
        Some(Phase::Stopping) => Prospect::Waits("is stopping".into()),
        Some(Phase::Migrating) => Prospect::Waits("its last migration is being ended".into()),
        None
        | Some(
            Phase::Pending
            | Phase::Scheduled
            | Phase::Preparing
            | Phase::Starting
            | Phase::Stopped
            | Phase::Unreachable
            | Phase::Deleting
            | Phase::Paused,
        ) => Prospect::Waits("does not run yet".into()),
    }
}

fn of_running(draft: &mut Draft<'_>, entry: &VmEntry, host: &HostRecord) -> Prospect {
    let record = &*entry.record;
    if migration::busy(draft).contains(&host.id) {
        return Prospect::Waits("waits for its turn".into());
    }
    // Nothing of this is written.
    let refusal =
        match migration::begin(&mut Draft::new(draft.state, draft.cx), record.id, None, "", 0, host.drain_disks) {
            Ok(_) => return Prospect::CanMigrate,
            Err(refusal) => refusal.to_string(),
        };
    if !record.disks_exist && !record.spec.disks.is_empty() {
        return Prospect::Waits("its disks are not known to be made yet".into());
    }
    let may_be_moved = match placement::home(record) {
        Home::OnlyHost(_) => {
            host.drain_disks == OwnDisks::Copied && migration::may_be_copied(draft, record, host.id).is_ok()
        }
        Home::Anywhere | Home::SharedPools { .. } => true,
    };
    if may_be_moved && migration::could_later(draft, record, host) {
        return Prospect::Waits(refusal);
    }
    of_unmovable(draft, record, refusal)
}

/// Of a VM that cannot migrate, because of `why`.
fn of_unmovable(draft: &mut Draft<'_>, record: &VmRecord, why: String) -> Prospect {
    match placement::home(record) {
        Home::OnlyHost(_) => return Prospect::Stuck(why),
        Home::Anywhere | Home::SharedPools { .. } => {}
    }
    let request = placement::request(record);
    let silent = BTreeSet::new();
    let limits = draft.limits();
    let all_heard = Limits { silent: &silent, ..limits };
    let view = with_leavers(draft);
    if scheduler::place(&view, &request, &limits).is_ok() {
        return Prospect::CanStop(why);
    }
    match scheduler::place(&view, &request, &all_heard) {
        Ok(_) => Prospect::Waits(why), // for a host that is only silent
        Err(_) => Prospect::Stuck(why),
    }
}

/// The cluster as it is when those that are being stopped to leave their host have a place: each where it would start now. Otherwise
/// two might be stopped for the same room.
fn with_leavers<'v>(draft: &'v mut Draft<'_>) -> Cow<'v, ClusterView> {
    let (state, limits) = (draft.state, draft.limits());
    let on_draining = state.draining_hosts().flat_map(|(host, _)| state.vms_on(host));
    let leavers: Vec<&VmRecord> =
        on_draining.filter_map(|vm| Some(&*state.vm(vm)?.record)).filter(|vm| vm.is_moving_out()).collect();
    let mut view = Cow::Borrowed(draft.view());
    for vm in leavers {
        if let Ok(choice) = scheduler::place(&view, &placement::request(vm), &limits) {
            view.to_mut().assign(choice.host, vm.id, absorb::needs(vm));
        }
    }
    view
}

/// Has one VM leave a host that is being drained.
pub(super) fn step(draft: &mut Draft<'_>, vm: VmId, from: HostId, step: &DrainStep) -> Result<Answer, Refusal> {
    let host = draft.host(from)?;
    let entry = draft.vm(vm)?;
    let name = &entry.record.name;
    if host.mode != HostMode::Draining {
        return Err(Refusal::Precondition(format!("host `{}` is not being drained any more", host.name)));
    }
    if entry.record.placement.host != Some(from) {
        return Err(Refusal::Precondition(format!("VM `{name}` is not on host `{}` any more", host.name)));
    }
    match step {
        DrainStep::Migrate { secret } => migration::begin(draft, vm, None, secret, 0, host.drain_disks),
        DrainStep::Stop => {
            if host.drain_how != DrainHow::StopAndMove {
                let message = format!("the VMs of host `{}` may not be stopped to empty it", host.name);
                return Err(Refusal::Precondition(message));
            }
            match prospect(draft, vm) {
                Prospect::CanStop(why) => move_out(draft, &entry, &host, &why),
                Prospect::AtRest
                | Prospect::Moving(_)
                | Prospect::CanMigrate
                | Prospect::Waits(_)
                | Prospect::Stuck(_) => Err(Refusal::Precondition(format!(
                    "VM `{name}` need not be stopped to leave its host, or cannot leave it"
                ))),
            }
        }
    }
}

fn move_out(draft: &mut Draft<'_>, entry: &VmEntry, host: &HostRecord, why: &str) -> Result<Answer, Refusal> {
    let mut record = (*entry.record).clone();
    record.moving_out = record.placement.incarnation;
    record.stop_force = false;
    let message =
        format!("host `{}` is being drained; it starts on another host when it has stopped ({why})", host.name);
    draft.vm_event(&record, EventType::StopRequested, message);
    Ok(Answer::Vm(draft.put_vm(record)?))
}

/// How many VMs of a host are on their way from or to it.
pub(super) fn under_way(state: &State, host: HostId) -> usize {
    let leaving = state.vms_on(host).filter(|&vm| {
        state.vm(vm).is_some_and(|entry| entry.record.migration.is_some() || entry.record.is_moving_out())
    });
    leaving.count() + state.incoming(host).count()
}

impl State {
    /// Whether so many VMs are on their way from or to this host that no other should be.
    #[must_use]
    pub fn has_enough_on_the_way(&self, host: HostId) -> bool {
        under_way(self, host) >= MIGRATIONS_PER_HOST
    }
}
