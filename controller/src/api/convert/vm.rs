//! VMs.

use uncloud_proto::{ids::Revision, v1};

use super::timestamp;
use crate::{
    model::{
        Desired, Phase, VmRecord, VmStatusRecord,
        migration::{Arrival, Migration, MigrationEnd, MigrationResult},
        vm::{
            CloudInit, CpuModel, Disk, DiskBus, DiskCache, DiskHotplug, DiskState, Display, Failover, Firmware,
            GuestAgent, LastExit, Machine, Nic, NicKind, OnDiskLoss, RestartPolicy, Snapshot, SnapshotGuest,
            SnapshotState, VmSpec,
        },
    },
    state::{State, VmEntry},
};

/// A VM as it is now.
pub(crate) fn vm(state: &State, entry: &VmEntry) -> v1::Vm {
    let record = &entry.record;
    let effective = entry.effective_status();
    let newest = entry.status.as_deref();
    let current = entry.current_status();
    let status = v1::VmStatus {
        phase: phase(effective.phase).into(),
        reason: effective.reason.to_owned(),
        since: timestamp(effective.since),
        incarnation: record.placement.incarnation.0,
        addresses: current.map(|s| s.addresses.clone()).unwrap_or_default(),
        // How it ended last is worth knowing after a failover, too.
        last_exit: newest.and_then(|s| s.last_exit.as_ref()).map(last_exit),
        next_attempt: current.and_then(|s| s.next_attempt).and_then(timestamp),
        migration: record.migration.as_ref().map(|m| migration(state, m, current)),
        last_migration: newest.and_then(|s| s.last_migration.as_ref()).map(migration_end),
    };
    from_record(record, host_name(state, record), status, entry.revision())
}

/// A VM as it was created. Depends on the record alone, so that a replayed request gets the same answer.
pub(crate) fn created_vm(state: &State, record: &VmRecord, revision: Revision) -> v1::Vm {
    let entry = VmEntry {
        record: record.clone().into(),
        record_revision: revision,
        status: None,
        status_revision: Revision::default(),
    };
    vm(state, &entry)
}

fn host_name(state: &State, record: &VmRecord) -> String {
    let host = record.placement.host.and_then(|id| state.host(id));
    host.map(|h| h.record.name.clone()).unwrap_or_default()
}

fn from_record(record: &VmRecord, host_name: String, status: v1::VmStatus, revision: Revision) -> v1::Vm {
    let placement = &record.placement;
    v1::Vm {
        id: record.id.to_string(),
        name: record.name.clone(),
        owner: record.owner.clone(),
        labels: record.labels.clone().into_iter().collect(),
        spec: Some(spec(&record.spec)),
        desired: match record.desired {
            Desired::Running => v1::PowerState::Running,
            Desired::Stopped | Desired::Deleted => v1::PowerState::Stopped,
        }
        .into(),
        deleting: record.desired == Desired::Deleted,
        placement: placement.host.map(|host| v1::Placement {
            host_id: host.to_string(),
            host_name,
            incarnation: placement.incarnation.0,
            why: placement.why.clone(),
            since: timestamp(placement.since),
        }),
        status: Some(status),
        created: timestamp(record.created),
        revision: revision.0,
        pending_restart: record.pending.iter().flat_map(|p| p.fields()).map(str::to_owned).collect(),
        paused: record.paused,
        next_spec: record.pending.as_ref().map(|_| self::spec(&record.next_spec())),
        snapshots: record.snapshots.iter().map(snapshot).collect(),
        reverting_to: record
            .revert
            .and_then(|r| record.snapshots.iter().find(|s| s.id == r.snapshot))
            .map(|s| s.name.clone())
            .unwrap_or_default(),
        cloning_from: record.clone_of.as_ref().map(|c| c.vm.to_string()).unwrap_or_default(),
    }
}

fn snapshot(snapshot: &Snapshot) -> v1::Snapshot {
    let state = match snapshot.state {
        SnapshotState::Creating => v1::SnapshotState::Creating,
        SnapshotState::Ready => v1::SnapshotState::Ready,
        SnapshotState::Deleting => v1::SnapshotState::Deleting,
    };
    let guest = match snapshot.guest {
        None => v1::SnapshotGuest::Unspecified,
        Some(SnapshotGuest::Frozen) => v1::SnapshotGuest::Frozen,
        Some(SnapshotGuest::Running) => v1::SnapshotGuest::Running,
        Some(SnapshotGuest::Off) => v1::SnapshotGuest::Off,
    };
    v1::Snapshot {
        guest: guest.into(),
        id: snapshot.id.to_string(),
        name: snapshot.name.clone(),
        created: timestamp(snapshot.created),
        state: state.into(),
    }
}

/// What a VM is made of.
pub(crate) fn spec(spec: &VmSpec) -> v1::VmSpec {
    v1::VmSpec {
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        machine: match spec.machine {
            Machine::Q35 => "q35",
            Machine::Pc => "pc",
        }
        .to_owned(),
        kernel: spec
            .kernel
            .as_ref()
            .map(|k| v1::KernelBoot { image: k.image.to_string(), command_line: k.command_line.clone() }),
        disks: spec.disks.iter().map(disk).collect(),
        nics: spec.nics.iter().map(nic).collect(),
        restart: match spec.restart {
            RestartPolicy::OnFailure => v1::RestartPolicy::OnFailure,
            RestartPolicy::Always => v1::RestartPolicy::Always,
            RestartPolicy::Never => v1::RestartPolicy::Never,
        }
        .into(),
        failover: match spec.failover {
            Failover::Fast => v1::FailoverPolicy::Fast,
            Failover::Patient => v1::FailoverPolicy::Patient,
            Failover::Hold => v1::FailoverPolicy::Hold,
        }
        .into(),
        on_disk_loss: match spec.on_disk_loss {
            OnDiskLoss::Wait => v1::DiskLossPolicy::Wait,
            OnDiskLoss::Recreate => v1::DiskLossPolicy::Recreate,
        }
        .into(),
        priority: spec.priority,
        host_labels: spec.host_labels.clone().into_iter().collect(),
        anti_affinity_group: spec.anti_affinity_group.clone().unwrap_or_default(),
        stop_grace_seconds: spec.stop_grace_seconds,
        display: match spec.display {
            Display::None => v1::DisplayType::None,
            Display::Standard => v1::DisplayType::Standard,
        }
        .into(),
        guest_agent: match spec.guest_agent {
            GuestAgent::Disabled => v1::GuestAgentMode::Disabled,
            GuestAgent::Enabled => v1::GuestAgentMode::Enabled,
        }
        .into(),
        firmware: match spec.firmware {
            Firmware::Bios => v1::Firmware::Bios,
            Firmware::Uefi => v1::Firmware::Uefi,
        }
        .into(),
        cpu: match spec.cpu {
            CpuModel::V2 => v1::CpuModel::X8664V2,
            CpuModel::V3 => v1::CpuModel::X8664V3,
            CpuModel::V4 => v1::CpuModel::X8664V4,
            CpuModel::Host => v1::CpuModel::Host,
        }
        .into(),
        cloud_init: spec.cloud_init.as_ref().map(cloud_init),
        disk_hotplug: match spec.disk_hotplug {
            DiskHotplug::Disabled => v1::DiskHotplug::Disabled,
            DiskHotplug::Enabled => v1::DiskHotplug::Enabled,
        }
        .into(),
    }
}

fn cloud_init(c: &CloudInit) -> v1::CloudInit {
    v1::CloudInit {
        hostname: c.hostname.clone(),
        ssh_authorized_keys: c.ssh_authorized_keys.clone(),
        user_data: c.user_data.clone(),
        network_config: c.network_config.clone(),
    }
}

fn disk(disk: &Disk) -> v1::Disk {
    v1::Disk {
        name: disk.name.clone(),
        pool: disk.pool.clone(),
        size_bytes: disk.size_bytes,
        image: disk.image.map(|id| id.to_string()).unwrap_or_default(),
        bus: match disk.bus {
            DiskBus::Virtio => v1::DiskBus::Virtio,
            DiskBus::Scsi => v1::DiskBus::Scsi,
            DiskBus::Sata => v1::DiskBus::Sata,
        }
        .into(),
        cache: match disk.cache {
            DiskCache::None => v1::DiskCache::None,
            DiskCache::Writethrough => v1::DiskCache::Writethrough,
            DiskCache::Writeback => v1::DiskCache::Writeback,
        }
        .into(),
        state: match disk.state {
            DiskState::Attached => v1::DiskState::Unspecified,
            DiskState::Attaching => v1::DiskState::Attaching,
            DiskState::Returning => v1::DiskState::Returning,
            DiskState::Detaching => v1::DiskState::Detaching,
            DiskState::Detached => v1::DiskState::Detached,
            DiskState::Deleting => v1::DiskState::Deleting,
        }
        .into(),
        unit: disk.unit,
        id: disk.id.map(|id| id.to_string()).unwrap_or_default(),
        order: disk.order,
        kept_generation: disk.kept_generation,
    }
}

fn nic(nic: &Nic) -> v1::Nic {
    let (kind, bridge) = match &nic.kind {
        NicKind::User => (v1::NicType::User, String::new()),
        NicKind::Bridge { bridge } => (v1::NicType::Bridge, bridge.clone()),
    };
    v1::Nic { r#type: kind.into(), mac: nic.mac.clone(), bridge }
}

fn migration(state: &State, migration: &Migration, status: Option<&VmStatusRecord>) -> v1::VmMigration {
    let stage = match (migration.handed_over, migration.arrival) {
        (Some(_), _) => v1::MigrationStage::HandingOver,
        (None, Arrival::Listening) => v1::MigrationStage::Sending,
        (None, Arrival::Preparing) => v1::MigrationStage::Preparing,
    };
    let progress = status.and_then(|s| s.migration.as_ref()).filter(|p| p.incarnation == migration.incarnation);
    v1::VmMigration {
        target_host_id: migration.target.to_string(),
        target_host_name: state.host(migration.target).map(|h| h.record.name.clone()).unwrap_or_default(),
        incarnation: migration.incarnation.0,
        since: timestamp(migration.since),
        stage: stage.into(),
        transferred_bytes: progress.map_or(0, |p| p.transferred_bytes),
        remaining_bytes: progress.map_or(0, |p| p.remaining_bytes),
        bytes_per_second: progress.map_or(0, |p| p.bytes_per_second),
        expected_downtime_ms: progress.map_or(0, |p| p.expected_downtime_ms),
    }
}

fn migration_end(end: &MigrationEnd) -> v1::MigrationEnd {
    let result = match end.result {
        MigrationResult::Done => v1::MigrationResult::Done,
        MigrationResult::GivenUp => v1::MigrationResult::GivenUp,
    };
    v1::MigrationEnd {
        incarnation: end.incarnation.0,
        target_host_id: end.target.to_string(),
        result: result.into(),
        reason: end.reason.clone(),
        at: timestamp(end.at),
    }
}

fn last_exit(exit: &LastExit) -> v1::LastExit {
    v1::LastExit { code: exit.code, signal: exit.signal, reason: exit.reason.clone(), at: timestamp(exit.at) }
}

/// A phase.
pub(crate) const fn phase(phase: Phase) -> v1::VmPhase {
    match phase {
        Phase::Pending => v1::VmPhase::Pending,
        Phase::Scheduled => v1::VmPhase::Scheduled,
        Phase::Preparing => v1::VmPhase::Preparing,
        Phase::Starting => v1::VmPhase::Starting,
        Phase::Running => v1::VmPhase::Running,
        Phase::Stopping => v1::VmPhase::Stopping,
        Phase::Stopped => v1::VmPhase::Stopped,
        Phase::Failed => v1::VmPhase::Failed,
        Phase::Unreachable => v1::VmPhase::Unreachable,
        Phase::Deleting => v1::VmPhase::Deleting,
        Phase::Migrating => v1::VmPhase::Migrating,
        Phase::Paused => v1::VmPhase::Paused,
    }
}
