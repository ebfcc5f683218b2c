//! What a host should have, from the state and what the host says it has. Pure.
//!
//! | the VM's record | reported | what the host is told |
//! |---|---|---|
//! | names this host | or not | RUN, STOP or DELETE, as its user wants it; RUN with where to send it, if it migrates; STOP if it is to start elsewhere |
//! | has a migration to this host | or not | INCOMING, with the incarnation that it gets here |
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
    model::{
        Desired, Key,
        migration::Migration,
        vm::{Snapshot, SnapshotState, VmRecord, VmSpec},
    },
    state::{State, VmEntry, command::ObservedState},
};

/// What a host last said about a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The incarnation that it has.
    pub incarnation: Incarnation,
    /// What it is.
    pub state: ObservedState,
    /// Number of the report.
    pub sequence: u64,
}

/// What a host should do with a VM. The same value means the same message: nothing need be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// As the VM's record says, which was last written at this revision.
    AsRecorded(Revision),
    /// It belongs elsewhere, or was deleted.
    Forget(Incarnation),
}

/// What a host should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Everything that the host is told.
    pub vms: BTreeMap<VmId, Wanted>,
    /// VMs that execute here and belong elsewhere.
    pub misplaced: BTreeSet<VmId>,
    /// VMs that execute here and that the cluster knows nothing about.
    pub unknown: BTreeSet<VmId>,
}

/// Says what a host should have, given what it has.
pub fn plan(state: &State, host: HostId, seen: &BTreeMap<VmId, Seen>) -> Plan {
    let mut plan = Plan::default();
    for id in state.vms_on(host) {
        if let Some(entry) = state.vm(id) {
            plan.vms.insert(id, Wanted::AsRecorded(entry.record_revision));
        }
    }
    for id in state.incoming(host) {
        if let Some(entry) = state.vm(id) {
            plan.vms.insert(id, Wanted::AsRecorded(entry.record_revision));
            // S3: it comes here, and an old copy of it executes here.
            let comes = entry.record.migration.as_ref().map(|m| m.incarnation);
            if seen.get(&id).is_some_and(|s| s.state.executes() && Some(s.incarnation) != comes) {
                plan.misplaced.insert(id);
            }
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
            None if state.is_unreadable(&Key::Vm(id)) => {}
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

/// The message that tells `host` what to do with a VM. `None`: the VM has changed since, and will be planned anew.
pub fn message(state: &State, host: HostId, vm: VmId, wanted: Wanted) -> Option<v1::DesiredVm> {
    match wanted {
        Wanted::Forget(incarnation) => Some(v1::DesiredVm {
            vm_id: vm.to_string(),
            incarnation: incarnation.0,
            disposition: v1::Disposition::Forget.into(),
            void_disks: state.vm(vm).and_then(|entry| void_disks(&entry.record, host)),
            ..Default::default()
        }),
        // It may have been given to another host since the plan was made: then this one must not be told to run it.
        Wanted::AsRecorded(_) => {
            let entry = state.vm(vm)?;
            if entry.record.placement.host == Some(host) {
                return Some(as_recorded(state, entry));
            }
            let migration = entry.record.migration.as_ref().filter(|m| m.target == host)?;
            Some(arriving(state, entry, migration))
        }
    }
}

pub(super) fn as_recorded(state: &State, entry: &VmEntry) -> v1::DesiredVm {
    let record = &entry.record;
    let disposition = match record.desired {
        Desired::Running if record.is_moving_out() => v1::Disposition::Stop,
        // R1: not before its disks are put back.
        Desired::Running if record.revert.is_some() => v1::Disposition::Stop,
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
        // What is written before its disks are put back is lost anyway.
        stop_force: record.stop_force || record.revert.is_some(),
        disks_exist: record.disks_exist,
        disk_generation: record.disk_generation,
        migrate_to: record.migration.as_ref().filter(|m| !m.address.is_empty()).map(|m| v1::MigrateTo {
            incarnation: m.incarnation.0,
            address: m.address.clone(),
            secret: m.secret.clone(),
            bytes_per_second: m.bytes_per_second,
            disks_address: m.disks_address.clone(),
        }),
        migration_secret: String::new(),
        void_disks: None,
        paused: record.paused,
        network_pools: Vec::new(),
        next_incarnation: 0,
        snapshots: record.snapshots.iter().filter_map(snapshot_order).collect(),
        revert: record
            .revert
            .filter(|_| record.desired != Desired::Deleted)
            .map(|r| v1::RevertOrder { snapshot_id: r.snapshot.to_string(), number: r.number }),
        clone_from: record.clone_of.as_ref().filter(|_| !record.disks_exist).map(|c| v1::CloneFrom {
            vm_id: c.vm.to_string(),
            disk_generation: c.disk_generation,
            kept_generations: c.kept_generations.iter().map(|(name, &generation)| (name.clone(), generation)).collect(),
            snapshot_id: c.snapshot.map(|s| s.to_string()).unwrap_or_default(),
        }),
    }
}

fn snapshot_order(snapshot: &Snapshot) -> Option<v1::SnapshotOrder> {
    let remove = match snapshot.state {
        SnapshotState::Ready => return None,
        SnapshotState::Creating => false,
        SnapshotState::Deleting => true,
    };
    Some(v1::SnapshotOrder { id: snapshot.id.to_string(), remove })
}

/// M7: which disks of a VM are void on a host that does not have it.
fn void_disks(record: &VmRecord, host: HostId) -> Option<v1::VoidDisks> {
    let home = record.disk_home.as_ref().filter(|_| record.disks_exist)?;
    let copied = record.disks_reserved > 0 && home.host != host;
    let current = record.disk_generation;
    copied.then(|| v1::VoidDisks { copied_from: record.disks_copied_from.unwrap_or(current), current })
}

/// M2: what the target of a migration is told before the hand-over.
fn arriving(state: &State, entry: &VmEntry, migration: &Migration) -> v1::DesiredVm {
    v1::DesiredVm {
        incarnation: migration.incarnation.0,
        disposition: v1::Disposition::Incoming.into(),
        // The guest has them open; or they are to be made, and copied to.
        disks_exist: migration.disk_generation.is_none(),
        disk_generation: migration.disk_generation.unwrap_or(entry.record.disk_generation),
        migrate_to: None,
        clone_from: None,
        migration_secret: migration.secret.clone(),
        ..as_recorded(state, entry)
    }
}

/// The images that a spec names. One that is gone is left out; the agent says so if it needs it.
fn images(state: &State, spec: &VmSpec) -> Vec<v1::Image> {
    let kernel = spec.kernel.iter().map(|k| k.image);
    let ids: BTreeSet<_> = kernel.chain(spec.disks.iter().filter_map(|d| d.image)).collect();
    ids.into_iter().filter_map(|id| state.image(id)).map(convert::image).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uncloud_proto::clock::WallTime;
    use uuid::Uuid;

    use super::*;
    use crate::{
        model::{
            host::{Accelerator, AcceleratorKind},
            vm::{Display, Failover, GuestAgent, Machine, OnDiskLoss, RestartPolicy},
        },
        state::command::{Command, Context, HostFacts, NewVm, PowerChange},
    };

    fn host(n: u128) -> HostId {
        HostId::from_uuid(Uuid::from_u128(n))
    }

    fn vm(n: u128) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n))
    }

    fn carry_out(state: &mut State, command: &Command) {
        let cx = Context {
            now: WallTime(1),
            silent: Arc::default(),
            arrived: Arc::default(),
            cpu_overcommit_percent: 400,
            disk_overcommit_percent: 200,
        };
        let decision = state.decide(command, &cx).unwrap();
        state.absorb(&decision.change, Revision(state.revision().0 + 1));
    }

    /// Host 1 with VM 1 on it.
    fn cluster() -> State {
        let mut state = State::default();
        let facts = HostFacts {
            id: host(1),
            name: "host-1".into(),
            labels: BTreeMap::new(),
            vcpus: 4,
            memory_mib: 4096,
            pools: Vec::new(),
            accelerator: Accelerator { kind: AcceleratorKind::Tcg, why: String::new() },
            migration_address: String::new(),
            cpu: Default::default(),
            bridges: BTreeSet::new(),
            agent_version: "0".into(),
            boot_id: Uuid::from_u128(9),
        };
        carry_out(&mut state, &Command::RegisterHost { host: Box::new(facts) });
        let new = NewVm {
            id: vm(1),
            name: "web".into(),
            owner: "default".into(),
            labels: BTreeMap::new(),
            spec: VmSpec {
                vcpus: 1,
                memory_mib: 64,
                machine: Machine::Q35,
                kernel: None,
                disks: Vec::new(),
                nics: Vec::new(),
                restart: RestartPolicy::OnFailure,
                failover: Failover::Fast,
                on_disk_loss: OnDiskLoss::Wait,
                priority: 0,
                host_labels: BTreeMap::new(),
                anti_affinity_group: None,
                stop_grace_seconds: 60,
                display: Display::None,
                guest_agent: GuestAgent::Disabled,
                firmware: Default::default(),
                cpu: Default::default(),
                cloud_init: None,
                disk_hotplug: Default::default(),
                extra: Default::default(),
            },
            image_names: Vec::new(),
            desired: Desired::Running,
        };
        carry_out(&mut state, &Command::CreateVm { request: None, vm: Box::new(new) });
        state
    }

    fn seen(n: u128, incarnation: u64, state: ObservedState) -> BTreeMap<VmId, Seen> {
        [(vm(n), Seen { incarnation: Incarnation(incarnation), state, sequence: 1 })].into()
    }

    #[test]
    fn what_belongs_here_is_told_whether_it_was_reported_or_not() {
        let mut state = cluster();
        for seen in [BTreeMap::new(), seen(1, 1, ObservedState::Running)] {
            let plan = plan(&state, host(1), &seen);
            let wanted = plan.vms[&vm(1)];
            assert_eq!((plan.vms.len(), plan.misplaced.len(), plan.unknown.len()), (1, 0, 0));
            let message = message(&state, host(1), vm(1), wanted).unwrap();
            assert_eq!((message.disposition(), message.incarnation), (v1::Disposition::Run, 1));
            assert_eq!(message.spec.unwrap().memory_mib, 64);
        }
        let before = plan(&state, host(1), &BTreeMap::new());
        carry_out(&mut state, &Command::SetDesired { vm: vm(1), desired: PowerChange::ForceStop });
        let after = plan(&state, host(1), &BTreeMap::new());
        assert_ne!(before, after, "a change is sent");
        let stop = message(&state, host(1), vm(1), after.vms[&vm(1)]).unwrap();
        assert!(stop.disposition() == v1::Disposition::Stop && stop.stop_force);
        carry_out(&mut state, &Command::DeleteVm { vm: vm(1) });
        let plan = plan(&state, host(1), &BTreeMap::new());
        let delete = message(&state, host(1), vm(1), plan.vms[&vm(1)]).unwrap();
        assert_eq!(delete.disposition(), v1::Disposition::Delete);
    }

    #[test]
    fn what_belongs_elsewhere_is_to_be_forgotten_and_counts_while_it_executes() {
        let state = cluster();
        for (observed, misplaced) in [(ObservedState::Running, true), (ObservedState::Stopped, false)] {
            let plan = plan(&state, host(2), &seen(1, 1, observed));
            assert_eq!(plan.vms[&vm(1)], Wanted::Forget(Incarnation(1)));
            assert_eq!(plan.misplaced.contains(&vm(1)), misplaced);
            let message = message(&state, host(2), vm(1), plan.vms[&vm(1)]).unwrap();
            assert_eq!((message.disposition(), message.spec), (v1::Disposition::Forget, None));
        }
        // An agent obeys nothing that is older than what it has.
        let plan = plan(&state, host(2), &seen(1, 7, ObservedState::Running));
        assert_eq!(plan.vms[&vm(1)], Wanted::Forget(Incarnation(7)));
        // A plan that is overtaken never makes another host run it.
        assert_eq!(message(&state, host(2), vm(1), Wanted::AsRecorded(Revision(1))), None);
    }

    #[test]
    fn what_nobody_knows_is_left_alone_while_it_executes() {
        let state = cluster();
        let executing = plan(&state, host(1), &seen(5, 3, ObservedState::Running));
        assert!(executing.unknown.contains(&vm(5)) && !executing.vms.contains_key(&vm(5)));
        let stopped = plan(&state, host(1), &seen(5, 3, ObservedState::Stopped));
        assert_eq!(stopped.vms[&vm(5)], Wanted::Forget(Incarnation(3)));
    }

    #[test]
    fn of_a_vm_whose_record_cannot_be_read_nothing_is_said() {
        let mut state = cluster();
        state.absorb_unreadable(Key::Vm(vm(5)).to_string(), "bad JSON".into(), Revision(9));
        for observed in [ObservedState::Running, ObservedState::Stopped] {
            let plan = plan(&state, host(1), &seen(5, 3, observed));
            assert!(!plan.vms.contains_key(&vm(5)) && plan.misplaced.is_empty() && plan.unknown.is_empty());
        }
        // Nor if it was read before, and belongs here.
        state.absorb_unreadable(Key::Vm(vm(1)).to_string(), "bad JSON".into(), Revision(10));
        let plan = plan(&state, host(1), &seen(1, 1, ObservedState::Running));
        assert!(plan.vms.is_empty(), "{plan:?}");
    }
}
