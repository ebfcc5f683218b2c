//! Checks the requests that name something, list or watch.

use std::collections::BTreeMap;

use uncloud_proto::{
    ids::{Revision, VmId},
    v1,
};

use uuid::Uuid;

use super::{
    Checker, DEFAULT_OWNER, Violations,
    vm::{check_disk_size, check_set_by_cluster, disk_bus, disk_cache},
};
use crate::{
    model::{DrainHow, OwnDisks},
    state::command::{DetachHow, DiskToAttach, FailoverChange},
};

/// Entries of a page, if the request does not say.
const DEFAULT_PAGE: u32 = 100;
/// Entries of a page at the most.
const MAX_PAGE: u64 = 1000;
/// Bytes of a reason.
const MAX_REASON: usize = 255;
/// Bytes of history that a console may begin with.
const MAX_HISTORY: u64 = 1 << 20;
/// Bytes of console input in one message.
const MAX_INPUT: usize = 64 << 10;

/// Names a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmRef {
    /// UUID, beginning of one, or name.
    pub(crate) vm: String,
    /// Whose name.
    pub(crate) owner: String,
}

/// Fields `vm` and `owner`, which many requests have.
pub(crate) fn vm_ref(vm: String, owner: String) -> Result<VmRef, Violations> {
    let mut check = Checker::default();
    let r = check_vm_ref(&mut check, vm, owner);
    check.finish(r)
}

fn check_vm_ref(check: &mut Checker, vm: String, owner: String) -> VmRef {
    VmRef { vm: check.reference("vm", vm), owner: check.name_or("owner", owner, DEFAULT_OWNER) }
}

/// Field `host`.
pub(crate) fn host_ref(host: String) -> Result<String, Violations> {
    let mut check = Checker::default();
    let host = check.reference("host", host);
    check.finish(host)
}

/// Field `image`.
pub(crate) fn image_ref(image: String) -> Result<String, Violations> {
    let mut check = Checker::default();
    let image = check.reference("image", image);
    check.finish(image)
}

/// Hosts that one simulation may have.
const MAX_SIMULATED: usize = 100;

/// The hosts that are to die.
pub(crate) fn simulate_host_failure(request: v1::SimulateHostFailureRequest) -> Result<Vec<String>, Violations> {
    let mut check = Checker::default();
    let count = request.hosts.len();
    if count == 0 || count > MAX_SIMULATED {
        check.fail("hosts", format!("has {count} entries; give 1 to {MAX_SIMULATED} hosts"));
        return check.finish(Vec::new());
    }
    let hosts = request.hosts.into_iter().enumerate();
    let hosts = hosts.map(|(i, host)| check.reference(&format!("hosts[{i}]"), host)).collect();
    check.finish(hosts)
}

/// A host and why it is cordoned.
pub(crate) fn cordon_host(request: v1::CordonHostRequest) -> Result<(String, String), Violations> {
    let mut check = Checker::default();
    let host = check.reference("host", request.host);
    check.text("reason", &request.reason, MAX_REASON);
    check.finish((host, request.reason))
}

/// A host that is to be emptied, or whose drain is to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DrainHost {
    /// UUID, beginning of one, or name.
    pub(crate) host: String,
    /// What is to be done.
    pub(crate) what: Drain,
}

/// What a call of `DrainHost` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// The host is to be emptied in this way.
    Begin {
        /// What may be done.
        how: DrainHow,
        /// What becomes of disks that only it has.
        disks: OwnDisks,
        /// Why.
        reason: String,
    },
    /// Nothing; it is shown.
    Watch,
}

/// A drain.
pub(crate) fn drain_host(request: v1::DrainHostRequest) -> Result<DrainHost, Violations> {
    let v1::DrainHostRequest { host, reason, stop_and_move, watch_only, copy_disks } = request;
    let mut check = Checker::default();
    let host = check.reference("host", host);
    check.text("reason", &reason, MAX_REASON);
    if watch_only {
        let others = [("reason", !reason.is_empty()), ("stop_and_move", stop_and_move), ("copy_disks", copy_disks)];
        for (field, is_set) in others {
            if is_set {
                check.fail(field, "does not go with watch_only, which changes nothing");
            }
        }
        return check.finish(DrainHost { host, what: Drain::Watch });
    }
    let how = if stop_and_move { DrainHow::StopAndMove } else { DrainHow::LiveOnly };
    let disks = if copy_disks { OwnDisks::Copied } else { OwnDisks::Stay };
    check.finish(DrainHost { host, what: Drain::Begin { how, disks, reason } })
}

/// How long failover may be off, in seconds. Longer, and it is forgotten.
const MAX_FAILOVER_OFF: u32 = 3600;

/// Failover on or off.
pub(crate) fn set_failover(request: v1::SetFailoverRequest) -> Result<FailoverChange, Violations> {
    let mut check = Checker::default();
    let mode = check.known("mode", request.mode, &["FAILOVER_MODE_ON", "FAILOVER_MODE_OFF"]);
    check.text("reason", &request.reason, MAX_REASON);
    let change = match mode {
        Some(v1::FailoverMode::On) => {
            if request.for_seconds != 0 {
                check.fail("for_seconds", "goes with FAILOVER_MODE_OFF");
            }
            FailoverChange::On
        }
        Some(v1::FailoverMode::Off) => {
            let seconds = if request.for_seconds == 0 { MAX_FAILOVER_OFF } else { request.for_seconds };
            check.range("for_seconds", u64::from(seconds), 1, u64::from(MAX_FAILOVER_OFF), " seconds");
            FailoverChange::Off { for_ms: u64::from(seconds) * 1000, reason: request.reason }
        }
        Some(v1::FailoverMode::Unspecified) => {
            check.fail("mode", "must be FAILOVER_MODE_ON or FAILOVER_MODE_OFF");
            FailoverChange::On
        }
        // `known` has said what is wrong.
        None => FailoverChange::On,
    };
    check.finish(change)
}

/// A migration that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MigrateVm {
    /// Of what.
    pub(crate) vm: VmRef,
    /// Where to. `None`: the scheduler chooses.
    pub(crate) host: Option<String>,
    /// 0: no limit.
    pub(crate) bytes_per_second: u64,
}

/// A disk that is to grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResizeDisk {
    /// Of what.
    pub(crate) vm: VmRef,
    /// Name of the disk.
    pub(crate) disk: String,
    /// Its new size.
    pub(crate) size_bytes: u64,
}

/// Checks a request to make a disk larger.
pub(crate) fn resize_disk(request: v1::ResizeDiskRequest) -> Result<ResizeDisk, Violations> {
    let mut check = Checker::default();
    let vm = check_vm_ref(&mut check, request.vm, request.owner);
    let disk = check.name("disk", request.disk);
    let size_bytes = request.size_bytes;
    if size_bytes == 0 {
        check.fail("size_bytes", "is required");
    } else {
        check_disk_size(&mut check, "size_bytes", size_bytes);
    }
    check.finish(ResizeDisk { vm, disk, size_bytes })
}

/// Checks a request to attach a disk. `id` is made by the caller.
pub(crate) fn attach_disk(request: v1::AttachDiskRequest, id: Uuid) -> Result<(VmRef, DiskToAttach), Violations> {
    let mut check = Checker::default();
    let vm = check_vm_ref(&mut check, request.vm, request.owner);
    let Some(disk) = request.disk else {
        check.fail("disk", "is required: say at least how large the new disk is, or which one that was detached");
        return Err(check.finish(()).expect_err("a violation was noted"));
    };
    let at = |field: &str| format!("disk.{field}");
    check_set_by_cluster(
        &mut check,
        &at,
        &[
            ("state", disk.state != 0),
            ("unit", disk.unit != 0),
            ("id", !disk.id.is_empty()),
            ("order", disk.order != 0),
            ("kept_generation", disk.kept_generation.is_some()),
        ],
    );
    if !disk.image.is_empty() {
        check.fail("disk.image", "is given; a disk that is attached begins empty: leave it out");
    }
    if disk.size_bytes == 0 && disk.name.is_empty() {
        check.fail("disk.size_bytes", "is required for a new disk; to attach one that was detached give `disk.name`");
    }
    check_disk_size(&mut check, "disk.size_bytes", disk.size_bytes);
    let name = (!disk.name.is_empty()).then(|| check.name("disk.name", disk.name));
    let pool = (!disk.pool.is_empty()).then(|| check.name("disk.pool", disk.pool));
    let bus = disk_bus(&mut check, "disk.bus", disk.bus);
    let cache = disk_cache(&mut check, "disk.cache", disk.cache);
    check.finish((vm, DiskToAttach { id, name, pool, size_bytes: disk.size_bytes, bus, cache }))
}

/// Checks a request to detach a disk.
pub(crate) fn detach_disk(request: v1::DetachDiskRequest) -> Result<(VmRef, String, DetachHow), Violations> {
    let mut check = Checker::default();
    let vm = check_vm_ref(&mut check, request.vm, request.owner);
    let disk = check.name("disk", request.disk);
    check.finish((vm, disk, if request.delete { DetachHow::Delete } else { DetachHow::Keep }))
}

/// A VM and the name of one of its snapshots.
pub(crate) fn snapshot(vm: String, owner: String, snapshot: String) -> Result<(VmRef, String), Violations> {
    let mut check = Checker::default();
    let vm = check_vm_ref(&mut check, vm, owner);
    let name = check.name("snapshot", snapshot);
    check.finish((vm, name))
}

/// A VM to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CloneVm {
    pub(crate) vm: VmRef,
    pub(crate) snapshot: Option<String>,
    pub(crate) name: String,
}

/// Checks a request to copy a VM.
pub(crate) fn clone_vm(request: v1::CloneVmRequest) -> Result<CloneVm, Violations> {
    let mut check = Checker::default();
    check.request_id(&request.request_id);
    let vm = check_vm_ref(&mut check, request.vm, request.owner);
    let name = check.name("name", request.name);
    let snapshot = (!request.snapshot.is_empty()).then(|| check.name("snapshot", request.snapshot));
    check.finish(CloneVm { vm, snapshot, name })
}

/// The least that a migration may be limited to, in bytes per second. With less, no guest gets there within an hour.
const MIN_MIGRATION_RATE: u64 = 1 << 20;

/// Checks a request to migrate a VM.
pub(crate) fn migrate_vm(request: v1::MigrateVmRequest) -> Result<MigrateVm, Violations> {
    let mut check = Checker::default();
    let vm = check_vm_ref(&mut check, request.vm, request.owner);
    let host = (!request.host.is_empty()).then(|| check.reference("host", request.host));
    let bytes_per_second = request.bytes_per_second;
    if bytes_per_second != 0 && bytes_per_second < MIN_MIGRATION_RATE {
        check.fail(
            "bytes_per_second",
            format!("is {bytes_per_second}; give at least {MIN_MIGRATION_RATE}, or 0 for no limit"),
        );
    }
    check.finish(MigrateVm { vm, host, bytes_per_second })
}

/// Which VMs to list. `None` and empty match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListVms {
    pub(crate) owner: Option<String>,
    pub(crate) host: Option<String>,
    pub(crate) phase: Option<v1::VmPhase>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) page_size: usize,
    /// The last VM of the page before.
    pub(crate) after: Option<VmId>,
}

/// Checks a request to list VMs.
pub(crate) fn list_vms(request: v1::ListVmsRequest) -> Result<ListVms, Violations> {
    let mut check = Checker::default();
    let owner = (!request.owner.is_empty()).then(|| check.name("owner", request.owner));
    let host = (!request.host.is_empty()).then(|| check.reference("host", request.host));
    let phase = check
        .known("phase", request.phase, &["one of VM_PHASE_PENDING", "VM_PHASE_RUNNING", "the others in vm.proto"])
        .filter(|p| *p != v1::VmPhase::Unspecified);
    let labels = check.labels("labels", request.labels);
    let page_size = page(&mut check, "page_size", request.page_size);
    let after = (!request.page_token.is_empty()).then(|| request.page_token.parse().ok());
    if after == Some(None) {
        check.fail("page_token", "is not one that this method gave; leave it empty for the first page");
    }
    check.finish(ListVms { owner, host, phase, labels, page_size, after: after.flatten() })
}

fn page(check: &mut Checker, field: &str, size: u32) -> usize {
    let size = if size == 0 { DEFAULT_PAGE } else { size };
    check.range(field, u64::from(size), 1, MAX_PAGE, "");
    // Fits: it has been checked.
    usize::try_from(size).unwrap_or(usize::MAX)
}

/// The revision to go on from. `None`: from the initial state.
pub(crate) fn resume_point(from_revision: i64) -> Result<Option<Revision>, Violations> {
    let mut check = Checker::default();
    let from = check_revision(&mut check, from_revision);
    check.finish(from)
}

fn check_revision(check: &mut Checker, from_revision: i64) -> Option<Revision> {
    if from_revision < 0 {
        check.fail("from_revision", "is negative; give a revision that an answer had, or 0 for the initial state");
    }
    (from_revision > 0).then_some(Revision(from_revision))
}

/// Which VMs to watch, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WatchVms {
    /// Only VMs of this owner.
    pub(crate) owner: Option<String>,
    /// Only this VM.
    pub(crate) vm: Option<VmRef>,
    pub(crate) from: Option<Revision>,
}

/// Checks a request to watch VMs. With `vm`, `owner` says whose name that is, as everywhere.
pub(crate) fn watch_vms(request: v1::WatchVmsRequest) -> Result<WatchVms, Violations> {
    let mut check = Checker::default();
    let from = check_revision(&mut check, request.from_revision);
    let (owner, vm) = if request.vm.is_empty() {
        ((!request.owner.is_empty()).then(|| check.name("owner", request.owner)), None)
    } else {
        (None, Some(check_vm_ref(&mut check, request.vm, request.owner)))
    };
    check.finish(WatchVms { owner, vm, from })
}

/// Which events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EventFilter {
    /// Only those of this VM, host or image; `vm` may name any of them.
    pub(crate) subject: Option<VmRef>,
    /// How many.
    pub(crate) limit: usize,
}

/// Checks a request to list events.
pub(crate) fn list_events(request: v1::ListEventsRequest) -> Result<EventFilter, Violations> {
    let mut check = Checker::default();
    let subject = subject(&mut check, request.subject, request.owner);
    let limit = page(&mut check, "limit", request.limit);
    check.finish(EventFilter { subject, limit })
}

/// Checks a request to watch events. The limit is that of the initial ones.
pub(crate) fn watch_events(request: v1::WatchEventsRequest) -> Result<(EventFilter, Option<Revision>), Violations> {
    let mut check = Checker::default();
    let subject = subject(&mut check, request.subject, request.owner);
    let limit = page(&mut check, "limit", 0);
    let from = check_revision(&mut check, request.from_revision);
    check.finish((EventFilter { subject, limit }, from))
}

fn subject(check: &mut Checker, subject: String, owner: String) -> Option<VmRef> {
    let owner = check.name_or("owner", owner, DEFAULT_OWNER);
    (!subject.is_empty()).then(|| VmRef { vm: check.reference("subject", subject), owner })
}

/// Whose console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConsoleTarget {
    pub(crate) vm: VmRef,
    pub(crate) history_bytes: u32,
}

/// Checks the first message of a console.
pub(crate) fn console_open(first: Option<v1::ConsoleRequest>) -> Result<ConsoleTarget, Violations> {
    let Some(v1::console_request::Message::Open(open)) = first.and_then(|m| m.message) else {
        return Err(Violations::one("open", "is required in the first message: it names the VM"));
    };
    let mut check = Checker::default();
    let vm = check_nested_ref(&mut check, open.vm, open.owner);
    check.range("open.history_bytes", u64::from(open.history_bytes), 0, MAX_HISTORY, " bytes");
    check.finish(ConsoleTarget { vm, history_bytes: open.history_bytes })
}

fn check_nested_ref(check: &mut Checker, vm: String, owner: String) -> VmRef {
    VmRef { vm: check.reference("open.vm", vm), owner: check.name_or("open.owner", owner, DEFAULT_OWNER) }
}

/// Checks the first message of a VNC connection.
pub(crate) fn vnc_open(first: Option<v1::VncRequest>) -> Result<VmRef, Violations> {
    let Some(v1::vnc_request::Message::Open(open)) = first.and_then(|m| m.message) else {
        return Err(Violations::one("open", "is required in the first message: it names the VM"));
    };
    let mut check = Checker::default();
    let vm = check_nested_ref(&mut check, open.vm, open.owner);
    check.finish(vm)
}

/// Checks a later message of a VNC connection.
pub(crate) fn vnc_data(message: v1::VncRequest) -> Result<Vec<u8>, Violations> {
    match message.message {
        Some(v1::vnc_request::Message::Data(data)) if data.len() <= MAX_INPUT => Ok(data),
        Some(v1::vnc_request::Message::Data(data)) => {
            let problem = format!("has {} bytes; send at most {MAX_INPUT} in one message", data.len());
            Err(Violations::one("data", problem))
        }
        Some(v1::vnc_request::Message::Open(_)) => {
            Err(Violations::one("open", "belongs in the first message only; send `data`"))
        }
        None => Err(Violations::one("message", "is empty; send `data`")),
    }
}

/// Checks a later message of a console.
pub(crate) fn console_input(message: v1::ConsoleRequest) -> Result<Vec<u8>, Violations> {
    match message.message {
        Some(v1::console_request::Message::Input(input)) if input.len() <= MAX_INPUT => Ok(input),
        Some(v1::console_request::Message::Input(input)) => {
            let problem = format!("has {} bytes; send at most {MAX_INPUT} in one message", input.len());
            Err(Violations::one("input", problem))
        }
        Some(v1::console_request::Message::Open(_)) => {
            Err(Violations::one("open", "belongs in the first message only; send `input`"))
        }
        None => Err(Violations::one("message", "is required: send `input`")),
    }
}

/// Whose log, and how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogTarget {
    pub(crate) vm: VmRef,
    pub(crate) tail_bytes: u32,
    pub(crate) follow: bool,
}

/// Checks a request for a log.
pub(crate) fn get_vm_log(request: v1::GetVmLogRequest) -> Result<LogTarget, Violations> {
    let vm = vm_ref(request.vm, request.owner)?;
    Ok(LogTarget { vm, tail_bytes: request.tail_bytes, follow: request.follow })
}

/// Whether `labels` has all of `wanted`.
pub(crate) fn has_labels(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(k, v)| labels.get(k) == Some(v))
}

#[cfg(test)]
mod tests {
    use super::{super::testing::fields, *};
    use crate::model::vm::DiskBus;

    #[test]
    fn references_are_checked() {
        assert_eq!(fields(vm_ref(String::new(), String::new())), ["vm"]);
        assert_eq!(fields(vm_ref("../x".into(), "a b".into())), ["vm", "owner"]);
        assert_eq!(fields(host_ref("a/b".into())), ["host"]);
        assert_eq!(fields(image_ref("\0".into())), ["image"]);
        assert_eq!(vm_ref("web".into(), String::new()).unwrap().owner, "default");
        let long = v1::CordonHostRequest { host: "a".into(), reason: "x".repeat(256) };
        assert_eq!(fields(cordon_host(long)), ["reason"]);
    }

    #[test]
    fn a_drain_that_is_only_shown_changes_nothing() {
        let request = v1::DrainHostRequest { host: "h".into(), reason: "fan".into(), ..Default::default() };
        let begin = |disks| Drain::Begin { how: DrainHow::LiveOnly, disks, reason: "fan".into() };
        assert_eq!(drain_host(request.clone()).unwrap().what, begin(OwnDisks::Stay));
        let copies = v1::DrainHostRequest { copy_disks: true, ..request.clone() };
        assert_eq!(drain_host(copies).unwrap().what, begin(OwnDisks::Copied));
        let all = v1::DrainHostRequest { watch_only: true, stop_and_move: true, copy_disks: true, ..request };
        assert_eq!(fields(drain_host(all)), ["reason", "stop_and_move", "copy_disks"]);
        let show = v1::DrainHostRequest { host: "h".into(), watch_only: true, ..Default::default() };
        assert_eq!(drain_host(show).unwrap().what, Drain::Watch);
        assert_eq!(fields(drain_host(v1::DrainHostRequest::default())), ["host"]);
    }

    #[test]
    fn lists_are_checked() {
        let bad = v1::ListVmsRequest {
            owner: "/".into(),
            host: "/".into(),
            phase: 99,
            labels: [("/".to_owned(), String::new())].into(),
            page_size: 1001,
            page_token: "x".into(),
        };
        assert_eq!(fields(list_vms(bad)), ["owner", "host", "phase", "labels[/]", "page_size", "page_token"]);
        let good = list_vms(v1::ListVmsRequest::default()).unwrap();
        assert_eq!(good, ListVms { page_size: 100, ..ListVms::default() });
    }

    #[test]
    fn watches_are_checked() {
        assert_eq!(fields(resume_point(-1)), ["from_revision"]);
        assert_eq!(resume_point(0), Ok(None));
        assert_eq!(resume_point(7), Ok(Some(Revision(7))));
        let bad = v1::WatchVmsRequest { owner: "/".into(), vm: "/".into(), from_revision: i64::MIN };
        assert_eq!(fields(watch_vms(bad)), ["from_revision", "vm", "owner"]);
        let bad = v1::WatchEventsRequest { subject: "/".into(), owner: "/".into(), from_revision: -1 };
        assert_eq!(fields(watch_events(bad)), ["owner", "subject", "from_revision"]);
        let bad = v1::ListEventsRequest { subject: "\n".into(), owner: String::new(), limit: u32::MAX };
        assert_eq!(fields(list_events(bad)), ["subject", "limit"]);
    }

    #[test]
    fn consoles_are_checked() {
        let input = |n| v1::ConsoleRequest { message: Some(v1::console_request::Message::Input(vec![0; n])) };
        let open = |vm: &str, history_bytes| v1::ConsoleRequest {
            message: Some(v1::console_request::Message::Open(v1::ConsoleOpen {
                vm: vm.to_owned(),
                owner: String::new(),
                history_bytes,
            })),
        };
        assert_eq!(fields(console_open(None)), ["open"]);
        assert_eq!(fields(console_open(Some(input(1)))), ["open"]);
        assert_eq!(fields(console_open(Some(open("", 1 << 21)))), ["open.vm", "open.history_bytes"]);
        assert!(console_open(Some(open("web", 1 << 20))).is_ok());
        assert!(console_input(input(64 << 10)).is_ok());
        assert_eq!(fields(console_input(input((64 << 10) + 1))), ["input"]);
        assert_eq!(fields(console_input(open("web", 0))), ["open"]);
        assert_eq!(fields(console_input(v1::ConsoleRequest::default())), ["message"]);
    }

    #[test]
    fn what_is_wrong_with_a_disk_or_a_snapshot_is_named() {
        let good =
            v1::ResizeDiskRequest { vm: "web".into(), owner: String::new(), disk: "disk0".into(), size_bytes: 1024 };
        assert!(resize_disk(good.clone()).is_ok());
        assert_eq!(fields(resize_disk(v1::ResizeDiskRequest::default())), ["vm", "disk", "size_bytes"]);
        for size_bytes in [513, u64::MAX - 511] {
            assert_eq!(fields(resize_disk(v1::ResizeDiskRequest { size_bytes, ..good.clone() })), ["size_bytes"]);
        }
        assert_eq!(fields(resize_disk(v1::ResizeDiskRequest { disk: "../x".into(), ..good })), ["disk"]);
        assert!(snapshot("web".into(), String::new(), "before-upgrade".into()).is_ok());
        let clone = |name: &str, snapshot: &str| {
            let (name, snapshot) = (name.to_owned(), snapshot.to_owned());
            clone_vm(v1::CloneVmRequest { vm: "web".into(), name, snapshot, ..Default::default() })
        };
        assert!(clone("copy", "before-upgrade").is_ok() && clone("copy", "").is_ok());
        for name in ["", "a/b", "a\u{1b}[31m", &"x".repeat(100)] {
            assert_eq!(fields(snapshot("web".into(), String::new(), name.into())), ["snapshot"]);
            assert_eq!(fields(clone(name, "")), ["name"]);
        }
        assert_eq!(fields(clone("", "a/b")), ["name", "snapshot"]);
        let long = v1::CloneVmRequest { request_id: "x".repeat(129), ..Default::default() };
        assert_eq!(fields(clone_vm(long)), ["request_id", "vm", "name"]);
    }

    #[test]
    fn a_disk_to_attach_is_a_new_one_or_has_a_name() {
        let attach = |disk: v1::Disk| {
            let request = v1::AttachDiskRequest { vm: "web".into(), owner: String::new(), disk: Some(disk) };
            attach_disk(request, Uuid::from_u128(1))
        };
        let disk = |change: fn(&mut v1::Disk)| {
            let mut disk = v1::Disk { size_bytes: 512, ..Default::default() };
            change(&mut disk);
            attach(disk)
        };
        let (_, new) = disk(|d| d.bus = v1::DiskBus::Sata.into()).unwrap();
        assert_eq!((new.size_bytes, new.name, new.bus, new.cache), (512, None, Some(DiskBus::Sata), None));
        let (_, again) = attach(v1::Disk { name: "data".into(), ..Default::default() }).unwrap();
        assert_eq!((again.size_bytes, again.name.as_deref()), (0, Some("data")));
        assert_eq!(fields(attach_disk(v1::AttachDiskRequest::default(), Uuid::nil())), ["vm", "disk"]);
        assert_eq!(fields(attach(v1::Disk::default())), ["disk.size_bytes"]);
        assert_eq!(fields(disk(|d| d.size_bytes = 511)), ["disk.size_bytes"]);
        assert_eq!(fields(disk(|d| d.name = "../x".into())), ["disk.name"]);
        assert_eq!(fields(disk(|d| d.pool = "../x".into())), ["disk.pool"]);
        assert_eq!(fields(disk(|d| d.image = "debian".into())), ["disk.image"]);
        assert_eq!(fields(disk(|d| (d.bus, d.cache) = (9, -1))), ["disk.bus", "disk.cache"]);
        assert_eq!(fields(disk(|d| (d.state, d.unit, d.order) = (1, 1, 1))), ["disk.state", "disk.unit", "disk.order"]);
        assert_eq!(fields(detach_disk(v1::DetachDiskRequest::default())), ["vm", "disk"]);
    }
}
