//! Reads what agents send. Pure.
//!
//! An agent is checked like any client: what comes out is within limits, and nothing that comes in makes this panic. A
//! Hello that is not acceptable is refused as a whole, with the fields. Of a report, only the VMs that make no sense
//! are left out: a host must not lose its lease because of one of its VMs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use uncloud_proto::{
    AGENT_PROTOCOL,
    clock::WallTime,
    cpu::Level,
    ids::{HostId, Incarnation, Term, VmId},
    names, v1,
};
use uuid::Uuid;

use crate::{
    api::validate::{Checker, Violations, quoted},
    model::{
        host::{Accelerator, AcceleratorKind, Cpu, Pool, PoolAccess},
        migration::MigrationProgress,
        vm::{LastExit, SnapshotGuest},
    },
    state::{
        MAX_DISKS, MAX_SNAPSHOTS,
        command::{DisksObservation, HostFacts, MigrationObservation, ObservedState, VmObservation},
    },
};

/// VMs that one host may have a record of. Ten times as many as anybody ran on one.
pub(crate) const MAX_VMS: usize = 10_000;
/// Pools of one host.
const MAX_POOLS: usize = 64;
/// How many bridges a host may offer.
const MAX_BRIDGES: usize = 64;
const MAX_VCPUS: u64 = 65_536;
const MAX_MEMORY_MIB: u64 = 1 << 30;
const MAX_VERSION: usize = 64;
/// Characters of what a host says of its CPU that are kept.
const MAX_CPU_TEXT: usize = 128;
/// Bytes of a reason that are kept: enough for QEMU's last words.
const MAX_REASON: usize = 2048;
/// Addresses of one VM that are kept.
const MAX_ADDRESSES: usize = 16;

/// What a Hello says.
#[derive(Clone, Debug, PartialEq)]
pub struct Greeting {
    /// For the host's record.
    pub facts: HostFacts,
    /// Free space of each pool in bytes.
    pub free_bytes: BTreeMap<String, u64>,
    /// The VMs that the agent has a record of.
    pub vms: Vec<Reported>,
    /// The newest term that the agent has seen.
    pub newest_term: Term,
}

/// What a host says about one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Reported {
    /// Grows with each report of this VM from one agent process.
    pub sequence: u64,
    /// For the state.
    pub seen: VmObservation,
}

/// Reads a Hello.
///
/// # Errors
///
/// All that is wrong with it.
pub fn hello(hello: v1::Hello) -> Result<Greeting, Violations> {
    let mut check = Checker::default();
    if hello.protocol != AGENT_PROTOCOL {
        let problem =
            format!("is {}, and this controller speaks {AGENT_PROTOCOL}; install the matching agent", hello.protocol);
        return Err(Violations::one("protocol", problem));
    }
    let id = id(&mut check, "host_id", &hello.host_id).map(HostId::from_uuid);
    let boot_id = id_of(&mut check, "boot_id", &hello.boot_id);
    let name = check.name("name", hello.name);
    check.text("agent_version", &hello.agent_version, MAX_VERSION);
    let capacity = hello.capacity.unwrap_or_default();
    check.range("capacity.vcpus", u64::from(capacity.vcpus), 1, MAX_VCPUS, "");
    check.range("capacity.memory_mib", capacity.memory_mib, 1, MAX_MEMORY_MIB, " MiB");
    let labels = check.labels("labels", hello.labels);
    let (pools, free_bytes) = check_pools(&mut check, hello.pools);
    let accelerator = hello.accelerator.unwrap_or_default();
    let kinds = ["ACCELERATOR_KIND_KVM", "ACCELERATOR_KIND_TCG"];
    let kind = match check.known("accelerator.kind", accelerator.kind, &kinds) {
        Some(v1::AcceleratorKind::Kvm) => AcceleratorKind::Kvm,
        Some(v1::AcceleratorKind::Tcg) => AcceleratorKind::Tcg,
        Some(v1::AcceleratorKind::Unspecified) => {
            check.fail("accelerator.kind", "is required");
            AcceleratorKind::Tcg
        }
        None => AcceleratorKind::Tcg,
    };
    if !hello.migration_address.is_empty() && hello.migration_address.parse::<IpAddr>().is_err() {
        let found = quoted(&hello.migration_address);
        check.fail("migration_address", format!("is `{found}`; expected an IP address, or nothing"));
    }
    let cpu = cpu(hello.cpu.unwrap_or_default());
    let bridges = check_bridges(&mut check, hello.bridges);
    if hello.newest_term < 0 {
        check.fail("newest_term", "is negative");
    }
    let vms = check_vms(&mut check, hello.vms);
    let facts = HostFacts {
        id: id.unwrap_or(HostId::from_uuid(Uuid::nil())),
        name,
        labels,
        vcpus: capacity.vcpus,
        memory_mib: capacity.memory_mib,
        pools,
        accelerator: Accelerator { kind, why: clean(&accelerator.why) },
        migration_address: hello.migration_address,
        cpu,
        bridges,
        agent_version: hello.agent_version,
        boot_id: boot_id.unwrap_or_default(),
    };
    check.finish(Greeting { facts, free_bytes, vms, newest_term: Term(hello.newest_term) })
}

/// What the scheduler knows nothing of is left out.
fn cpu(said: v1::Cpu) -> Cpu {
    let known = |feature: &&String| Level::V4.features().any(|f| f == feature.as_str());
    let clean = |text: &str| clean(text).chars().take(MAX_CPU_TEXT).collect();
    Cpu {
        name: clean(&said.name),
        features: said.features.iter().filter(known).cloned().collect(),
        fingerprint: clean(&said.fingerprint),
    }
}

/// Reads a report of pools.
///
/// # Errors
///
/// All that is wrong with it.
pub fn pools(report: v1::PoolsReport) -> Result<(Vec<Pool>, BTreeMap<String, u64>), Violations> {
    let mut check = Checker::default();
    let pools = check_pools(&mut check, report.pools);
    check.finish(pools)
}

/// Reads a report of VMs: those that make sense, and what is wrong with the others.
pub fn report(report: v1::Report) -> (Vec<Reported>, Option<Violations>) {
    let mut check = Checker::default();
    let vms = check_vms(&mut check, report.vms);
    (vms, check.finish(()).err())
}

fn check_vms(check: &mut Checker, vms: Vec<v1::VmReport>) -> Vec<Reported> {
    if vms.len() > MAX_VMS {
        check.fail("vms", format!("has {} entries; at most {MAX_VMS} are allowed", vms.len()));
        return Vec::new();
    }
    let mut known = BTreeSet::new();
    let mut checked = Vec::with_capacity(vms.len());
    for (i, vm) in vms.into_iter().enumerate() {
        let id = id(check, &format!("vms[{i}].vm_id"), &vm.vm_id).map(VmId::from_uuid);
        let state = state(check, &format!("vms[{i}].state"), vm.state);
        let (Some(id), Some(state)) = (id, state) else { continue };
        if !known.insert(id) {
            check.fail(format!("vms[{i}].vm_id"), "is that of another entry, too");
            continue;
        }
        let last_exit = vm.last_exit.map(|e| LastExit {
            code: e.code,
            signal: e.signal,
            reason: clean(&e.reason),
            at: e.at.as_ref().map(WallTime::from_proto).unwrap_or_default(),
        });
        let seen = VmObservation {
            vm: id,
            incarnation: Incarnation(vm.incarnation),
            state,
            reason: clean(&vm.reason),
            disks_ready: vm.disks_ready,
            last_exit,
            next_attempt: vm.next_attempt.as_ref().map(WallTime::from_proto),
            addresses: addresses(&vm.addresses),
            restarts_done: vm.restarts_done,
            paused: vm.paused,
            disks: DisksObservation {
                made: snapshot_ids(&vm.snapshots_made),
                guests: snapshot_guests(&vm.snapshots_made, &vm.snapshot_guests),
                removed: snapshot_ids(&vm.snapshots_removed),
                reverted: vm.reverted,
                orders: vm.disk_orders_done.into_iter().take(MAX_DISKS).collect(),
                ready: snapshot_ids(&vm.snapshots_ready),
                hold: Uuid::try_parse(&vm.hold).ok(),
                held: Uuid::try_parse(&vm.held).ok(),
            },
            migration: vm.migration.and_then(|m| migration(check, &format!("vms[{i}].migration"), m)),
        };
        checked.push(Reported { sequence: vm.sequence, seen });
    }
    checked
}

/// What a storage host has done to the disks of a VM. What the guest did then it cannot know.
pub fn served_disks(said: &v1::ServedVm) -> DisksObservation {
    DisksObservation {
        made: snapshot_ids(&said.snapshots_made),
        removed: snapshot_ids(&said.snapshots_removed),
        reverted: said.reverted,
        orders: said.disk_orders_done.iter().copied().take(MAX_DISKS).collect(),
        ..DisksObservation::default()
    }
}

/// Ids of snapshots. Those that make no sense are none of ours.
/// What an agent says that it does not know, or that this controller does not, is left out.
fn snapshot_guests(made: &[String], said: &[i32]) -> BTreeMap<Uuid, SnapshotGuest> {
    let guest = |said: i32| match v1::SnapshotGuest::try_from(said) {
        Ok(v1::SnapshotGuest::Frozen) => Some(SnapshotGuest::Frozen),
        Ok(v1::SnapshotGuest::Running) => Some(SnapshotGuest::Running),
        Ok(v1::SnapshotGuest::Off) => Some(SnapshotGuest::Off),
        Ok(v1::SnapshotGuest::Unspecified) | Err(_) => None,
    };
    let all = made.iter().zip(said).take(MAX_SNAPSHOTS);
    all.filter_map(|(id, &said)| Some((Uuid::try_parse(id).ok()?, guest(said)?))).collect()
}

fn snapshot_ids(said: &[String]) -> Vec<Uuid> {
    said.iter().take(MAX_SNAPSHOTS).filter_map(|id| Uuid::try_parse(id).ok()).collect()
}

/// What a guest says of itself, by its host: whatever is not an address is left out, and so is what is too much.
fn addresses(said: &[String]) -> Vec<String> {
    let parsed = said.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    parsed.take(MAX_ADDRESSES).map(|address| address.to_string()).collect()
}

fn state(check: &mut Checker, field: &str, value: i32) -> Option<ObservedState> {
    Some(match check.known(field, value, &["one that agent.proto lists"])? {
        v1::AgentVmState::Unspecified => {
            check.fail(field, "is required");
            return None;
        }
        v1::AgentVmState::Preparing => ObservedState::Preparing,
        v1::AgentVmState::Starting => ObservedState::Starting,
        v1::AgentVmState::Running => ObservedState::Running,
        v1::AgentVmState::Stopping => ObservedState::Stopping,
        v1::AgentVmState::Stopped => ObservedState::Stopped,
        v1::AgentVmState::PoweredOff => ObservedState::PoweredOff,
        v1::AgentVmState::Failed => ObservedState::Failed,
        v1::AgentVmState::Fenced => ObservedState::Fenced,
        v1::AgentVmState::Deleted => ObservedState::Deleted,
        v1::AgentVmState::Forgotten => ObservedState::Forgotten,
        v1::AgentVmState::Incoming => ObservedState::Incoming,
        v1::AgentVmState::Received => ObservedState::Received,
        v1::AgentVmState::HandedOver => ObservedState::HandedOver,
    })
}

/// How a migration goes. An address goes to another host's agent, so it must be one.
fn migration(check: &mut Checker, field: &str, m: v1::MigrationReport) -> Option<MigrationObservation> {
    if !m.address.is_empty() && m.address.parse::<SocketAddr>().is_err() {
        check.fail(format!("{field}.address"), format!("is `{}`; expected IP:PORT", quoted(&m.address)));
        return None;
    }
    if !m.disks_address.is_empty() && m.disks_address.parse::<SocketAddr>().is_err() {
        check.fail(format!("{field}.disks_address"), format!("is `{}`; expected IP:PORT", quoted(&m.disks_address)));
        return None;
    }
    let progress = MigrationProgress {
        incarnation: Incarnation(m.incarnation),
        transferred_bytes: m.transferred_bytes,
        remaining_bytes: m.remaining_bytes,
        bytes_per_second: m.bytes_per_second,
        expected_downtime_ms: m.expected_downtime_ms,
    };
    Some(MigrationObservation {
        progress,
        address: m.address,
        failure: clean(&m.failure),
        disks_address: m.disks_address,
        disks: m.disks,
    })
}

fn check_bridges(check: &mut Checker, bridges: Vec<String>) -> BTreeSet<String> {
    if bridges.len() > MAX_BRIDGES {
        check.fail("bridges", format!("has {} entries; at most {MAX_BRIDGES} are allowed", bridges.len()));
        return BTreeSet::new();
    }
    for (i, bridge) in bridges.iter().enumerate() {
        if let Err(problem) = names::check_interface(bridge) {
            check.fail(format!("bridges[{i}]"), format!("is `{}`, which {problem}", quoted(bridge)));
        }
    }
    bridges.into_iter().collect()
}

fn check_pools(check: &mut Checker, pools: Vec<v1::Pool>) -> (Vec<Pool>, BTreeMap<String, u64>) {
    if pools.len() > MAX_POOLS {
        check.fail("pools", format!("has {} entries; at most {MAX_POOLS} are allowed", pools.len()));
        return Default::default();
    }
    let mut free = BTreeMap::new();
    let mut checked = Vec::with_capacity(pools.len());
    for (i, pool) in pools.into_iter().enumerate() {
        let at = |field: &str| format!("pools[{i}].{field}");
        let name = check.name(&at("name"), pool.name);
        if free.insert(name.clone(), pool.free_bytes).is_some() {
            check.fail(at("name"), format!("is `{}` like that of another pool", quoted(&name)));
        }
        let kinds = ["POOL_KIND_LOCAL", "POOL_KIND_SHARED", "POOL_KIND_NETWORK", "POOL_KIND_EXPORTED"];
        let kind = check.known(&at("kind"), pool.kind, &kinds);
        let access = match kind {
            Some(v1::PoolKind::Network) => PoolAccess::Network,
            // It goes to other hosts' agents, so it must be one.
            Some(v1::PoolKind::Exported) => {
                if pool.export_address.parse::<SocketAddr>().is_err() {
                    let found = quoted(&pool.export_address);
                    check.fail(at("export_address"), format!("is `{found}`; expected IP:PORT"));
                }
                PoolAccess::Exported { address: pool.export_address.clone() }
            }
            Some(v1::PoolKind::Local | v1::PoolKind::Shared | v1::PoolKind::Unspecified) | None => {
                PoolAccess::Directory
            }
        };
        let shared_id = match kind {
            // A shared pool without its marker has a problem, and is not used.
            Some(v1::PoolKind::Shared | v1::PoolKind::Exported) if pool.id.is_empty() && !pool.problem.is_empty() => {
                None
            }
            Some(v1::PoolKind::Shared | v1::PoolKind::Network | v1::PoolKind::Exported) => {
                id_of(check, &at("id"), &pool.id)
            }
            Some(v1::PoolKind::Local) => None,
            Some(v1::PoolKind::Unspecified) => {
                check.fail(at("kind"), "is required");
                None
            }
            None => None,
        };
        let problem = clean(&pool.problem);
        checked.push(Pool { name, shared_id, capacity_bytes: pool.capacity_bytes, problem, access });
    }
    (checked, free)
}

/// A UUID in the one spelling that ids have.
fn id(check: &mut Checker, field: &str, text: &str) -> Option<Uuid> {
    match text.parse::<HostId>() {
        Ok(id) if !id.uuid().is_nil() => Some(id.uuid()),
        Ok(_) => {
            check.fail(field, "is the nil UUID");
            None
        }
        Err(problem) => {
            check.fail(field, problem.to_string());
            None
        }
    }
}

/// A UUID in any spelling, of something that is not ours.
fn id_of(check: &mut Checker, field: &str, text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok();
    if id.is_none() {
        check.fail(field, format!("is `{}`; expected a UUID", quoted(text)));
    }
    id
}

/// Text from a host, fit to be stored and shown: bounded, with nothing that a terminal would obey.
pub(super) fn clean(text: &str) -> String {
    let fit = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    let mut out = String::new();
    for c in text.trim_end().chars().map(fit) {
        if out.len() + c.len_utf8() > MAX_REASON {
            out.push('…');
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A Hello that is acceptable.
    pub(crate) fn good_hello(host: u128, boot: u128) -> v1::Hello {
        v1::Hello {
            host_id: Uuid::from_u128(host).to_string(),
            name: format!("host-{host}"),
            boot_id: Uuid::from_u128(boot).to_string(),
            agent_version: "0.1.0".to_owned(),
            protocol: AGENT_PROTOCOL,
            capacity: Some(v1::Resources { vcpus: 4, memory_mib: 4096 }),
            pools: vec![v1::Pool {
                name: "default".to_owned(),
                kind: v1::PoolKind::Local.into(),
                capacity_bytes: 1 << 40,
                free_bytes: 1 << 39,
                ..Default::default()
            }],
            accelerator: Some(v1::Accelerator { kind: v1::AcceleratorKind::Tcg.into(), why: "no /dev/kvm".to_owned() }),
            agent_instance: Uuid::from_u128(99).to_string(),
            ..Default::default()
        }
    }

    /// A report of one VM.
    pub(crate) fn vm_report(vm: u128, incarnation: u64, sequence: u64, state: v1::AgentVmState) -> v1::VmReport {
        v1::VmReport {
            vm_id: Uuid::from_u128(vm).to_string(),
            incarnation,
            sequence,
            state: state.into(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        testing::{good_hello, vm_report},
        *,
    };
    use crate::api::validate::testing::fields;

    fn with(change: impl FnOnce(&mut v1::Hello)) -> v1::Hello {
        let mut hello = good_hello(1, 2);
        change(&mut hello);
        hello
    }

    #[test]
    fn a_hello_is_read() {
        let greeting = hello(with(|h| h.vms = vec![vm_report(7, 3, 1, v1::AgentVmState::Running)])).unwrap();
        assert_eq!(greeting.facts.id.uuid(), Uuid::from_u128(1));
        assert_eq!(greeting.free_bytes["default"], 1 << 39);
        assert_eq!(greeting.vms[0].seen.state, ObservedState::Running);
        assert_eq!(greeting.vms[0].seen.incarnation, Incarnation(3));
    }

    #[test]
    fn each_bad_hello_names_its_field() {
        let running = || vm_report(7, 3, 1, v1::AgentVmState::Running);
        let table = [
            ("protocol", with(|h| h.protocol = 2)),
            ("host_id", with(|h| h.host_id = "x".into())),
            ("host_id", with(|h| h.host_id = Uuid::nil().to_string())),
            ("host_id", with(|h| h.host_id = Uuid::from_u128(0xabc).to_string().to_uppercase())),
            ("boot_id", with(|h| h.boot_id.clear())),
            ("name", with(|h| h.name = "a/b".into())),
            ("agent_version", with(|h| h.agent_version = "x".repeat(65))),
            ("capacity.vcpus", with(|h| h.capacity.as_mut().unwrap().vcpus = 0)),
            ("capacity.memory_mib", with(|h| h.capacity.as_mut().unwrap().memory_mib = u64::MAX)),
            ("labels[/]", with(|h| drop(h.labels.insert("/".into(), String::new())))),
            ("pools", with(|h| h.pools = vec![h.pools[0].clone(); 65])),
            ("pools[1].name", with(|h| h.pools.push(h.pools[0].clone()))),
            ("pools[0].name", with(|h| h.pools[0].name = "..".into())),
            ("pools[0].kind", with(|h| h.pools[0].kind = 0)),
            ("pools[0].kind", with(|h| h.pools[0].kind = 77)),
            ("pools[0].id", with(|h| h.pools[0].kind = 2)),
            ("accelerator.kind", with(|h| h.accelerator = None)),
            ("newest_term", with(|h| h.newest_term = -1)),
            ("vms", with(|h| h.vms = vec![running(); 10_001])),
            ("vms[1].vm_id", with(|h| h.vms = vec![running(), running()])),
            ("vms[0].vm_id", with(|h| h.vms = vec![v1::VmReport { vm_id: "../x".into(), ..running() }])),
            ("vms[0].state", with(|h| h.vms = vec![v1::VmReport { state: 0, ..running() }])),
            ("vms[0].state", with(|h| h.vms = vec![v1::VmReport { state: -4, ..running() }])),
        ];
        for (field, bad) in table {
            assert_eq!(fields(hello(bad)), [field]);
        }
    }

    #[test]
    fn one_bad_entry_of_a_report_does_not_hide_the_others() {
        let bad = v1::VmReport { state: 99, ..vm_report(2, 1, 1, v1::AgentVmState::Running) };
        let (good, problems) = report(v1::Report { vms: vec![bad, vm_report(3, 1, 1, v1::AgentVmState::Failed)] });
        assert_eq!(good.len(), 1);
        assert_eq!(problems.unwrap().listed[0].field, "vms[0].state");
    }

    #[test]
    fn a_shared_pool_without_its_marker_has_a_problem() {
        let pool = v1::Pool { kind: 2, problem: "no marker".into(), name: "p".into(), ..Default::default() };
        let (pools, _) = pools(v1::PoolsReport { pools: vec![pool] }).unwrap();
        assert_eq!((pools[0].shared_id, pools[0].problem.as_str()), (None, "no marker"));
    }

    proptest! {
        #[test]
        fn text_from_a_host_is_bounded_and_harmless(text in "\\PC{0,10}[\\x00-\\x9f]{0,20}", times in 0_usize..300) {
            let out = clean(&text.repeat(times));
            prop_assert!(out.len() <= MAX_REASON + 3);
            prop_assert!(!out.chars().any(|c| c.is_control() && c != '\n' && c != '\t'));
        }
    }
}
