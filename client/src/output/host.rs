//! Hosts for people.

use uncloud_proto::{clock::WallTime, cpu::Level, v1};

use super::{
    pairs, table,
    text::{age, dash, labels, mib, moment_and_age, or_dash, resources, short_id, word},
};
use crate::units;

fn state(host: &v1::Host) -> String {
    let state = word(host.state().as_str_name(), "HOST_STATE_");
    match host.mode() {
        v1::HostMode::Active | v1::HostMode::Unspecified => state,
        mode @ (v1::HostMode::Cordoned | v1::HostMode::Draining) => {
            format!("{state},{}", word(mode.as_str_name(), "HOST_MODE_"))
        }
    }
}

fn accelerator(host: &v1::Host) -> String {
    host.accelerator.as_ref().map_or_else(dash, |a| word(a.kind().as_str_name(), "ACCELERATOR_KIND_"))
}

/// A table of hosts.
#[must_use]
pub fn hosts(hosts: &[v1::Host], now: WallTime) -> String {
    let rows: Vec<Vec<String>> = hosts
        .iter()
        .map(|h| {
            let (capacity, promised) = (h.capacity.unwrap_or_default(), h.promised.unwrap_or_default());
            vec![
                h.name.clone(),
                short_id(&h.id),
                state(h),
                h.vms.to_string(),
                format!("{}/{}", promised.vcpus, capacity.vcpus),
                format!("{} / {}", mib(promised.memory_mib), mib(capacity.memory_mib)),
                accelerator(h),
                age(h.created.as_ref(), now),
                h.reason.clone(),
            ]
        })
        .collect();
    table(&["NAME", "ID", "STATE", "VMS", "VCPUS", "MEMORY", "ACCEL", "AGE", "REASON"], &rows)
}

/// One host in a line, for watches.
#[must_use]
pub fn host_line(h: &v1::Host) -> String {
    let mut line = format!("{}  {}  {} VM{}", h.name, state(h), h.vms, if h.vms == 1 { "" } else { "s" });
    if !h.reason.is_empty() {
        line.push_str(&format!("  {}", h.reason));
    }
    super::clean(&line)
}

/// Everything about one host.
#[must_use]
pub fn show_host(answer: &v1::GetHostResponse, now: WallTime) -> String {
    let h = answer.host.clone().unwrap_or_default();
    let mut out = pairs(&[
        ("Name", h.name.clone()),
        ("ID", h.id.clone()),
        ("State", state(&h)),
        ("Reason", h.reason.clone()),
        ("Labels", labels(&h.labels)),
        ("Capacity", h.capacity.as_ref().map(resources).unwrap_or_default()),
        ("Promised", h.promised.as_ref().map(resources).unwrap_or_default()),
        ("Accelerator", accelerator(&h)),
        ("CPU", cpu(&h)),
        ("Because", h.accelerator.as_ref().map(|a| a.why.clone()).unwrap_or_default()),
        ("Bridges", h.bridges.join(", ")),
        ("Agent", h.agent_version.clone()),
        ("Last heartbeat", heartbeat(&h)),
        ("Created", moment_and_age(h.created.as_ref(), now)),
        ("Unknown VMs", h.unknown_vms.join(", ")),
    ]);
    if !h.pools.is_empty() {
        let rows: Vec<Vec<String>> = h
            .pools
            .iter()
            .map(|p| {
                vec![
                    p.name.clone(),
                    word(p.kind().as_str_name(), "POOL_KIND_"),
                    units::bytes(p.free_bytes),
                    units::bytes(p.capacity_bytes),
                    or_dash(&short_id(&p.id)),
                    p.problem.clone(),
                ]
            })
            .collect();
        out.push_str(&format!("\n{}\n", table(&["POOL", "KIND", "FREE", "SIZE", "ID", "PROBLEM"], &rows)));
    }
    if !answer.vms.is_empty() {
        out.push_str(&format!("\n{}\n", super::vms(&answer.vms, super::Columns::AllOwners, now)));
    }
    out
}

/// What would become of VMs if their hosts died.
#[must_use]
pub fn what_if(answer: &v1::SimulateHostFailureResponse) -> String {
    let mut out = format!("{}\n", super::clean(&answer.summary));
    for warning in &answer.warnings {
        out.push_str(&format!("Warning: {}\n", super::clean(warning)));
    }
    if !answer.vms.is_empty() {
        let rows: Vec<Vec<String>> = answer
            .vms
            .iter()
            .map(|vm| {
                vec![
                    vm.owner.clone(),
                    vm.name.clone(),
                    vm.from_host.clone(),
                    word(vm.outcome().as_str_name(), "SIMULATED_OUTCOME_").replace('_', " "),
                    or_dash(&vm.to_host),
                    vm.vcpus.to_string(),
                    mib(vm.memory_mib),
                    vm.priority.to_string(),
                    vm.reason.clone(),
                ]
            })
            .collect();
        let header = ["OWNER", "VM", "HOST", "WOULD BE", "ON", "VCPUS", "MEMORY", "PRIORITY", "BECAUSE"];
        out.push_str(&format!("\n{}\n", table(&header, &rows)));
    }
    if answer.more > 0 {
        out.push_str(&format!("\nand {} more VMs\n", answer.more));
    }
    out
}

/// How far a drain is, in a line.
#[must_use]
pub fn drain_line(d: &v1::DrainHostResponse) -> String {
    let mut line = format!("{}  {} to go, {} moving, {} moved", d.host_name, d.to_go, d.moving, d.moved);
    if d.cannot > 0 {
        line.push_str(&format!(", {} cannot leave", d.cannot));
    }
    super::clean(&line)
}

/// How a drain stands, and what is left.
#[must_use]
pub fn drain(d: &v1::DrainHostResponse) -> String {
    let state = match d.state() {
        v1::DrainState::Empty => "nothing executes there any more",
        v1::DrainState::Stuck => "what is left cannot leave as things are",
        v1::DrainState::Ended => "the drain was ended",
        v1::DrainState::Draining | v1::DrainState::Unspecified => "is being drained",
    };
    let mut out = format!("{}: {state}\n", super::clean(&drain_line(d)));
    if !d.left.is_empty() {
        let row = |vm: &v1::DrainedVm| {
            let state = word(vm.state().as_str_name(), "DRAINED_VM_STATE_").replace('_', " ");
            vec![vm.owner.clone(), vm.name.clone(), state, vm.reason.clone()]
        };
        let rows: Vec<Vec<String>> = d.left.iter().map(row).collect();
        out.push_str(&format!("\n{}\n", table(&["OWNER", "VM", "STATE", "BECAUSE"], &rows)));
    }
    if d.more > 0 {
        out.push_str(&format!("\nand {} more VMs\n", d.more));
    }
    out
}

fn heartbeat(h: &v1::Host) -> String {
    match h.state() {
        v1::HostState::Up | v1::HostState::Silent => {
            format!("{} ago", units::duration(std::time::Duration::from_millis(h.last_heartbeat_ms)))
        }
        v1::HostState::Down | v1::HostState::Unspecified => String::new(),
    }
}
/// Its name, and the highest of the CPU models that guests can have there.
fn cpu(h: &v1::Host) -> String {
    let Some(cpu) = h.cpu.as_ref().filter(|cpu| !cpu.name.is_empty()) else { return String::new() };
    let has = |level: &Level| level.features().all(|f| cpu.features.iter().any(|has| has == f));
    match [Level::V4, Level::V3, Level::V2].into_iter().find(has) {
        Some(level) => format!("{} ({})", cpu.name, level.name()),
        None => cpu.name.clone(),
    }
}
