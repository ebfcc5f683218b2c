//! VMs for people.

use uncloud_proto::{clock::WallTime, v1};

use super::{
    pairs, table,
    text::{age, dash, labels, mib, moment_and_age, or_dash, short_id, word},
};
use crate::units::{self, bytes};

/// Which columns a list of VMs has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// All VMs belong to one owner.
    OneOwner,
    /// The owner is shown, too.
    AllOwners,
}

/// The phase of a VM in a word.
#[must_use]
pub fn phase_word(phase: v1::VmPhase) -> String {
    word(phase.as_str_name(), "VM_PHASE_")
}

fn phase(vm: &v1::Vm) -> String {
    vm.status.as_ref().map_or_else(dash, |s| phase_word(s.phase()))
}

fn host(vm: &v1::Vm) -> String {
    vm.placement.as_ref().map_or_else(dash, |p| p.host_name.clone())
}

fn reason(vm: &v1::Vm) -> String {
    vm.status.as_ref().map(|s| s.reason.clone()).unwrap_or_default()
}

/// A table of VMs.
#[must_use]
pub fn vms(vms: &[v1::Vm], columns: Columns, now: WallTime) -> String {
    let mut header = vec!["NAME", "ID", "PHASE", "HOST", "INCARNATION", "VCPUS", "MEMORY", "AGE", "REASON"];
    if columns == Columns::AllOwners {
        header.insert(0, "OWNER");
    }
    let rows: Vec<Vec<String>> = vms
        .iter()
        .map(|vm| {
            let spec = vm.spec.clone().unwrap_or_default();
            let mut row = vec![
                vm.name.clone(),
                short_id(&vm.id),
                phase(vm),
                host(vm),
                vm.placement.as_ref().map_or_else(dash, |p| p.incarnation.to_string()),
                spec.vcpus.to_string(),
                mib(spec.memory_mib),
                age(vm.created.as_ref(), now),
                reason(vm),
            ];
            if columns == Columns::AllOwners {
                row.insert(0, vm.owner.clone());
            }
            row
        })
        .collect();
    table(&header, &rows)
}

/// A table of a VM's snapshots.
#[must_use]
pub fn snapshots(vm: &v1::Vm, now: WallTime) -> String {
    let state = |s: &v1::Snapshot| match vm.reverting_to == s.name {
        true => "reverting".to_owned(),
        false => word(s.state().as_str_name(), "SNAPSHOT_STATE_"),
    };
    let guest = |s: &v1::Snapshot| match s.guest() {
        v1::SnapshotGuest::Unspecified => "-".to_owned(),
        known => word(known.as_str_name(), "SNAPSHOT_GUEST_"),
    };
    let row =
        |s: &v1::Snapshot| vec![s.name.clone(), short_id(&s.id), state(s), guest(s), age(s.created.as_ref(), now)];
    table(&["SNAPSHOT", "ID", "STATE", "GUEST", "AGE"], &vm.snapshots.iter().map(row).collect::<Vec<_>>())
}

/// One VM in a line, for watches and progress.
#[must_use]
pub fn vm_line(vm: &v1::Vm) -> String {
    let mut line = format!("{}  {}", vm.name, phase(vm));
    if let Some(placement) = &vm.placement {
        line.push_str(&format!("  on {} (incarnation {})", placement.host_name, placement.incarnation));
    }
    if let Some(migration) = vm.status.as_ref().and_then(|s| s.migration.as_ref()) {
        line.push_str(&format!("  {}", migration_words(migration)));
    }
    let reason = reason(vm);
    if !reason.is_empty() {
        line.push_str(&format!("  {reason}"));
    }
    super::clean(&line)
}

/// How a migration goes.
fn migration_words(m: &v1::VmMigration) -> String {
    let mut words = format!("to {}: {}", m.target_host_name, word(m.stage().as_str_name(), "MIGRATION_STAGE_"));
    if m.transferred_bytes > 0 {
        words.push_str(&format!(
            ", {} sent, {} left, {}/s, about {} ms of standstill",
            bytes(m.transferred_bytes),
            bytes(m.remaining_bytes),
            bytes(m.bytes_per_second),
            m.expected_downtime_ms
        ));
    }
    words
}

/// How the last migration ended.
fn last_migration(end: &v1::MigrationEnd, now: WallTime) -> String {
    let what = match end.result() {
        v1::MigrationResult::Done => "done".to_owned(),
        v1::MigrationResult::GivenUp | v1::MigrationResult::Unspecified => format!("given up: {}", end.reason),
    };
    format!("{what}, {}", moment_and_age(end.at.as_ref(), now))
}

/// BIOS is not worth a line.
fn firmware(spec: &v1::VmSpec) -> String {
    match spec.firmware() {
        v1::Firmware::Unspecified | v1::Firmware::Bios => String::new(),
        v1::Firmware::Uefi => "uefi".to_owned(),
    }
}

/// What cloud-init is told, but for the texts themselves.
pub(crate) fn cloud_init(c: &v1::CloudInit) -> String {
    let mut parts = Vec::new();
    if !c.hostname.is_empty() {
        parts.push(format!("host name {}", c.hostname));
    }
    match c.ssh_authorized_keys.len() {
        0 => {}
        1 => parts.push("1 key".to_owned()),
        n => parts.push(format!("{n} keys")),
    }
    if !c.user_data.is_empty() {
        parts.push(format!("user data ({} bytes)", c.user_data.len()));
    }
    if !c.network_config.is_empty() {
        parts.push(format!("network configuration ({} bytes)", c.network_config.len()));
    }
    if parts.is_empty() { "yes".to_owned() } else { parts.join(", ") }
}

/// Everything about one VM.
#[must_use]
pub fn show_vm(vm: &v1::Vm, now: WallTime) -> String {
    let spec = vm.spec.clone().unwrap_or_default();
    let status = vm.status.clone().unwrap_or_default();
    let mut out = pairs(&[
        ("Name", vm.name.clone()),
        ("ID", vm.id.clone()),
        ("Owner", vm.owner.clone()),
        ("Labels", labels(&vm.labels)),
        ("Phase", phase(vm)),
        ("Reason", status.reason.clone()),
        ("Since", moment_and_age(status.since.as_ref(), now)),
        ("Desired", desired(vm)),
        ("Next attempt", super::text::moment(status.next_attempt.as_ref())),
        ("Host", vm.placement.as_ref().map(|p| format!("{} ({})", p.host_name, p.host_id)).unwrap_or_default()),
        ("Placed", moment_and_age(vm.placement.as_ref().and_then(|p| p.since.as_ref()), now)),
        ("Because", vm.placement.as_ref().map(|p| p.why.clone()).unwrap_or_default()),
        ("Incarnation", vm.placement.as_ref().map(|p| p.incarnation.to_string()).unwrap_or_default()),
        ("Addresses", status.addresses.join(", ")),
        ("Migration", status.migration.as_ref().map(migration_words).unwrap_or_default()),
        ("Last migration", status.last_migration.as_ref().map(|e| last_migration(e, now)).unwrap_or_default()),
        ("Last exit", status.last_exit.as_ref().map(|e| last_exit(e, now)).unwrap_or_default()),
        ("vCPUs", spec.vcpus.to_string()),
        ("Memory", mib(spec.memory_mib)),
        ("Machine", spec.machine.clone()),
        ("CPU", word(spec.cpu().as_str_name(), "CPU_MODEL_")),
        ("Firmware", firmware(&spec)),
        ("Cloud-init", spec.cloud_init.as_ref().map(cloud_init).unwrap_or_default()),
        ("Kernel", spec.kernel.as_ref().map(|k| k.image.clone()).unwrap_or_default()),
        ("Command line", spec.kernel.as_ref().map(|k| k.command_line.clone()).unwrap_or_default()),
        ("Restart", word(spec.restart().as_str_name(), "RESTART_POLICY_")),
        ("Failover", failover(&spec)),
        ("Priority", spec.priority.to_string()),
        ("Host labels", labels(&spec.host_labels)),
        ("Anti-affinity", spec.anti_affinity_group.clone()),
        ("Stop grace", format!("{}s", spec.stop_grace_seconds)),
        ("Display", word(spec.display().as_str_name(), "DISPLAY_TYPE_")),
        ("Guest agent", word(spec.guest_agent().as_str_name(), "GUEST_AGENT_MODE_")),
        ("Next start", next_start(vm)),
        ("Created", moment_and_age(vm.created.as_ref(), now)),
        ("Revision", vm.revision.to_string()),
    ]);
    if !spec.disks.is_empty() {
        let rows: Vec<Vec<String>> = spec
            .disks
            .iter()
            .map(|d| {
                let bus = word(d.bus().as_str_name(), "DISK_BUS_");
                let cache = word(d.cache().as_str_name(), "DISK_CACHE_");
                vec![d.name.clone(), d.pool.clone(), size(d.size_bytes), bus, cache, disk_state(d), or_dash(&d.image)]
            })
            .collect();
        let head = ["DISK", "POOL", "SIZE", "BUS", "CACHE", "STATE", "IMAGE"];
        out.push_str(&format!("\n{}\n", table(&head, &rows)));
    }
    if !vm.snapshots.is_empty() {
        out.push_str(&format!("\n{}\n", snapshots(vm, now)));
    }
    if !spec.nics.is_empty() {
        let rows: Vec<Vec<String>> = spec.nics.iter().map(|n| vec![nic(n), or_dash(&n.mac)]).collect();
        out.push_str(&format!("\n{}\n", table(&["NIC", "MAC"], &rows)));
    }
    out
}

fn disk_state(disk: &v1::Disk) -> String {
    match disk.state() {
        v1::DiskState::Unspecified => "attached".to_owned(),
        state => word(state.as_str_name(), "DISK_STATE_"),
    }
}

/// Whether the VM's machine should have a disk.
pub(crate) fn is_in_machine(disk: &v1::Disk) -> bool {
    match disk.state() {
        v1::DiskState::Unspecified | v1::DiskState::Attaching | v1::DiskState::Returning => true,
        v1::DiskState::Detaching | v1::DiskState::Detached | v1::DiskState::Deleting => false,
    }
}

/// A network interface, as `vm create --nic` takes it.
#[must_use]
pub fn nic(nic: &v1::Nic) -> String {
    let kind = word(nic.r#type().as_str_name(), "NIC_TYPE_");
    if nic.bridge.is_empty() { kind } else { format!("{kind}={}", super::clean(&nic.bridge)) }
}

/// Why a VM is where it is.
#[must_use]
pub fn explain(answer: &v1::ExplainVmResponse) -> String {
    let mut out = format!("{}\n", super::clean(&answer.summary));
    if !answer.refusals.is_empty() {
        let rows: Vec<Vec<String>> = answer
            .refusals
            .iter()
            .map(|r| {
                let more = (r.count as usize).saturating_sub(r.hosts.len());
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                vec![r.count.to_string(), r.reason.clone(), format!("{}{more}", r.hosts.join(", "))]
            })
            .collect();
        out.push_str(&format!("\n{}\n", table(&["HOSTS", "CANNOT TAKE IT BECAUSE", "WHICH"], &rows)));
    }
    if !answer.candidates.is_empty() {
        out.push_str(&format!("\nCould take it now: {}\n", super::clean(&answer.candidates.join(", "))));
    }
    out
}

fn desired(vm: &v1::Vm) -> String {
    if vm.deleting { "deleted".to_owned() } else { word(vm.desired().as_str_name(), "POWER_STATE_") }
}

fn failover(spec: &v1::VmSpec) -> String {
    let policy = word(spec.failover().as_str_name(), "FAILOVER_POLICY_");
    match spec.on_disk_loss() {
        v1::DiskLossPolicy::Recreate => format!("{policy}, with new disks if they are lost"),
        v1::DiskLossPolicy::Wait | v1::DiskLossPolicy::Unspecified => policy,
    }
}

/// What is different from the next start on.
fn next_start(vm: &v1::Vm) -> String {
    let Some(next) = &vm.next_spec else { return String::new() };
    let value = |field: &str| match field {
        "spec.vcpus" => format!("vCPUs {}", next.vcpus),
        "spec.memory_mib" => format!("memory {}", mib(next.memory_mib)),
        "spec.failover" => format!("failover {}", word(next.failover().as_str_name(), "FAILOVER_POLICY_")),
        "spec.display" => format!("display {}", word(next.display().as_str_name(), "DISPLAY_TYPE_")),
        "spec.guest_agent" => format!("guest agent {}", word(next.guest_agent().as_str_name(), "GUEST_AGENT_MODE_")),
        other => other.to_owned(),
    };
    vm.pending_restart.iter().map(|f| value(f)).collect::<Vec<_>>().join(", ")
}

fn last_exit(exit: &v1::LastExit, now: WallTime) -> String {
    let how = match (exit.signal, exit.code) {
        (0, code) => format!("status {code}"),
        (signal, _) => format!("signal {signal}"),
    };
    format!("{how}, {} ago: {}", age(exit.at.as_ref(), now), exit.reason)
}

fn size(bytes: u64) -> String {
    if bytes == 0 { dash() } else { units::bytes(bytes) }
}
