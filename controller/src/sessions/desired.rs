//! What a host should have, from the state and what the host says it has. Pure.
//!
//! | the VM's record | reported | what the host is told |
//! |---|---|---|
//! | names this host | or not | RUN, STOP or DELETE, as its user wants it |
//! | names another host or none | yes | FORGET. If it executes, renewals are withheld until it is gone (P1) |
//! | is not there | and executes | nothing: it is left alone, and people are told |
//! | is not there | and does not execute | FORGET: it was deleted |
//! | cannot be read | or not | nothing (P5) |

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::{
    ids::{HostId, Incarnation, Revision, VmId},
    v1,
};

use crate::{
    api::convert,
    model::{Desired, Key, vm::VmSpec},
    state::{State, VmEntry, command::ObservedState},
};

/// What a host last said about a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The incarnation that it has.
    pub(crate) incarnation: Incarnation,
    /// What it is.
    pub(crate) state: ObservedState,
    /// Number of the report.
    pub(crate) sequence: u64,
}

/// What a host should do with a VM. The same value means the same message: nothing need be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// As the VM's record says, which was last written at this revision.
    AsRecorded(Revision),
    /// It belongs elsewhere, or was deleted.
    Forget(Incarnation),
}

/// What a host should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Everything that the host is told.
    pub(crate) vms: BTreeMap<VmId, Wanted>,
    /// VMs that execute here and belong elsewhere.
    pub(crate) misplaced: BTreeSet<VmId>,
    /// VMs that execute here and that the cluster knows nothing about.
    pub(crate) unknown: BTreeSet<VmId>,
}

/// Says what a host should have, given what it has.
pub(crate) fn plan(state: &State, host: HostId, seen: &BTreeMap<VmId, Seen>) -> Plan {
    let mut plan = Plan::default();
    for id in state.vms_on(host) {
        if let Some(entry) = state.vm(id) {
            plan.vms.insert(id, Wanted::AsRecorded(entry.record_revision));
        }
    }
    for (&id, seen) in seen {
        if plan.vms.contains_key(&id) {
            continue;
        }
        match state.vm(id) {
            Some(entry) => {
                // Not older than what the host has seen, or it would not obey.
                let incarnation = entry.record.placement.incarnation.max(seen.incarnation);
                plan.vms.insert(id, Wanted::Forget(incarnation));
                if seen.state.executes() {
                    plan.misplaced.insert(id);
                }
            }
            None if is_unreadable(state, id) => {}
            None if seen.state.executes() => {
                plan.unknown.insert(id);
            }
            None => {
                plan.vms.insert(id, Wanted::Forget(seen.incarnation));
            }
        }
    }
    plan
}

fn is_unreadable(state: &State, id: VmId) -> bool {
    !state.unreadable().is_empty() && state.unreadable().contains_key(&Key::Vm(id).to_string())
}

/// The message that tells `host` what to do with a VM. `None`: the VM has changed since, and will be planned anew.
pub(crate) fn message(state: &State, host: HostId, vm: VmId, wanted: Wanted) -> Option<v1::DesiredVm> {
    match wanted {
        Wanted::Forget(incarnation) => Some(v1::DesiredVm {
            vm_id: vm.to_string(),
            incarnation: incarnation.0,
            disposition: v1::Disposition::Forget.into(),
            ..Default::default()
        }),
        // It may have been given to another host since the plan was made: then this one must not be told to run it.
        Wanted::AsRecorded(_) => state
            .vm(vm)
            .filter(|entry| entry.record.placement.host == Some(host))
            .map(|entry| as_recorded(state, entry)),
    }
}

fn as_recorded(state: &State, entry: &VmEntry) -> v1::DesiredVm {
    let record = &entry.record;
    let disposition = match record.desired {
        Desired::Running => v1::Disposition::Run,
        Desired::Stopped => v1::Disposition::Stop,
        Desired::Deleted => v1::Disposition::Delete,
    };
    v1::DesiredVm {
        vm_id: record.id.to_string(),
        incarnation: record.placement.incarnation.0,
        disposition: disposition.into(),
        name: record.name.clone(),
        owner: record.owner.clone(),
        spec: Some(convert::spec(&record.spec)),
        images: images(state, &record.spec),
        restarts: record.restarts,
        restart_force: record.restart_force,
        stop_force: record.stop_force,
        disks_exist: record.disks_exist,
        disk_generation: record.disk_generation,
    }
}

/// The images that a spec names. One that is gone is left out; the agent says so if it needs it.
fn images(state: &State, spec: &VmSpec) -> Vec<v1::Image> {
    let kernel = spec.kernel.iter().map(|k| k.image);
    let ids: BTreeSet<_> = kernel.chain(spec.disks.iter().filter_map(|d| d.image)).collect();
    ids.into_iter().filter_map(|id| state.image(id)).map(convert::image).collect()
}
