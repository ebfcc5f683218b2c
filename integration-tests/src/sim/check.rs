//! Judges a run, after every step: P1, P2, P3, P5, and what only grows.
//!
//! It knows the truth: what etcd has stored, what executes at this moment of true time, what the user has asked for and been
//! answered. It sees nothing of what the parts believe.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use uncloud_controller::{
    model::{Desired, Key, Record, VmRecord, vm::OnDiskLoss},
    state::command::{NewVm, Refusal},
};
use uncloud_proto::ids::{HostId, Incarnation, Term, VmId};
use uuid::Uuid;

use super::{
    clock::Ns,
    contents::{self, Contents, Key as DiskKey, Place},
    core::Core,
    storage::Open,
};

/// What is true about a VM.
#[derive(Clone, Debug, Default)]
struct Truth {
    record: Option<Arc<VmRecord>>,
    name: String,
    /// Starts, with the host, incarnation and time.
    executing: BTreeMap<u64, (usize, HostId, Incarnation, Ns)>,
    placed: BTreeMap<Incarnation, HostId>,
    delete_asked: bool,
    stop_asked: bool,
    start_asked: bool,
    /// When the user last asked for anything that may end an execution.
    asked_at: Option<Ns>,
    /// When the guest last ended by itself.
    guest_ended: Option<Ns>,
    /// Power calls under way.
    in_flight: u32,
    /// Whether what it should be is known for sure.
    uncertain: bool,
    /// What it should be, as the API has acknowledged.
    expected: Option<Desired>,
    /// Where its data is: pool or host, and generation.
    data: Option<BTreeSet<Place>>,
    /// The disks that each of those that execute has open.
    open: BTreeMap<u64, Vec<Open>>,
}

/// The judge.
#[derive(Debug, Default)]
pub(crate) struct Check {
    vms: BTreeMap<VmId, Truth>,
    names: BTreeMap<String, VmId>,
    requests: BTreeMap<String, VmId>,
    term: Term,
    revision: i64,
    violation: Option<String>,
    /// What is on the disks.
    pub(crate) contents: Contents,
    /// Nothing disturbs the cluster: no VM may stop that nobody stopped.
    pub(crate) quiet: bool,
}

impl Check {
    /// Something is as it must never be. The first one counts.
    pub(crate) fn violation(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// The first violation.
    #[must_use]
    pub(crate) fn violated(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    fn vm(&mut self, vm: VmId) -> &mut Truth {
        self.vms.entry(vm).or_default()
    }

    /// What executes: VM, host, incarnation.
    pub(crate) fn executing(&self) -> impl Iterator<Item = (VmId, HostId, Incarnation)> {
        self.vms.iter().flat_map(|(vm, t)| t.executing.values().map(|(_, host, i, _)| (*vm, *host, *i)))
    }

    /// What is stored.
    pub(crate) fn record(&self, vm: VmId) -> Option<Arc<VmRecord>> {
        self.vms.get(&vm)?.record.clone()
    }

    /// A guest begins to execute with a disk, or gets one, finds this on it, and writes.
    pub(crate) fn began(&mut self, vm: VmId, disk: (&DiskKey, Place), found_and_wrote: (u64, u64)) {
        let record = self.record(vm);
        self.note(|c| c.contents.began(vm, disk, found_and_wrote, record.as_deref()));
    }

    /// What executes has these disks from now on.
    pub(crate) fn opened(&mut self, vm: VmId, uid: u64, disks: &[Open]) {
        let truth = self.vm(vm);
        if truth.executing.contains_key(&uid) {
            truth.open.insert(uid, disks.to_vec());
        }
    }

    /// Whether something that executes has a file of this pool or host open.
    pub(crate) fn is_open(&mut self, vm: VmId, (pool, path): (Uuid, &Path)) -> bool {
        let mut open = self.vm(vm).open.values().flatten();
        open.any(|o| o.place.0 == pool && o.path == path)
    }

    /// Disks are put back.
    pub(crate) fn put_back(&mut self, vm: VmId, disk: (&DiskKey, Place), number: u64, id: Uuid, count: u64) {
        if !self.vm(vm).executing.is_empty() {
            self.violation(format!("R1: the disks of {vm} are put back while it executes"));
        }
        self.note(|c| c.contents.put_back(vm, disk, number, id, count));
    }

    // --- what the user does ---

    /// The user asks for a copy of a VM.
    pub(crate) fn asked_clone(&mut self, vm: VmId, name: &str) {
        let truth = self.vm(vm);
        name.clone_into(&mut truth.name);
        truth.expected = Some(Desired::Running);
    }

    /// The user asks for a VM.
    pub(crate) fn asked_create(&mut self, new: &NewVm) {
        let (name, expected) = (new.name.clone(), new.desired);
        let truth = self.vm(new.id);
        truth.name = name;
        truth.expected = Some(expected);
    }

    /// The user was told that a VM is there.
    pub(crate) fn acked_create(&mut self, request: &str, vm: VmId, name: &str) {
        let known = *self.requests.entry(request.to_owned()).or_insert(vm);
        if known != vm || self.names.get(name) != Some(&vm) {
            self.violation(format!("P2: request {request} was answered with {known} and with {vm}"));
        }
        let truth = self.vm(vm);
        if truth.record.is_none() && !truth.delete_asked {
            self.violation(format!("P2: {vm} was acknowledged and is not stored"));
        }
    }

    /// The user's create was refused.
    pub(crate) fn refused_create(&mut self, name: &str, tries: u32, refusal: &Refusal) {
        if tries > 1 || !matches!(refusal, Refusal::MacTaken(_)) {
            self.violation(format!("P2: try {tries} to create {name} was refused: {refusal}"));
        }
    }

    /// The user asks for a start or a stop.
    pub(crate) fn asked_power(&mut self, vm: VmId, desired: Desired, now: Ns) {
        let truth = self.vm(vm);
        truth.uncertain |= truth.in_flight > 0;
        truth.in_flight += 1;
        truth.asked_at = Some(now);
        match desired {
            Desired::Running => truth.start_asked = true,
            Desired::Stopped => truth.stop_asked = true,
            Desired::Deleted => truth.delete_asked = true,
        }
    }

    /// A start or a stop was acknowledged.
    pub(crate) fn acked_power(&mut self, vm: VmId, desired: Desired) {
        let truth = self.vm(vm);
        truth.in_flight = truth.in_flight.saturating_sub(1);
        truth.expected = Some(desired);
        self.compare(vm);
    }

    /// It is not known what became of a start or a stop.
    pub(crate) fn unknown_power(&mut self, vm: VmId) {
        let truth = self.vm(vm);
        truth.in_flight = truth.in_flight.saturating_sub(1);
        truth.uncertain = true;
    }

    /// The user asks for a restart.
    pub(crate) fn asked_restart(&mut self, vm: VmId, now: Ns) {
        self.vm(vm).asked_at = Some(now);
    }

    /// The user asks for a deletion.
    pub(crate) fn asked_delete(&mut self, vm: VmId) {
        self.vm(vm).delete_asked = true;
    }

    /// A deletion was acknowledged.
    pub(crate) fn acked_delete(&mut self, vm: VmId) {
        let truth = self.vm(vm);
        if truth.record.as_ref().is_some_and(|r| r.desired != Desired::Deleted) {
            self.violation(format!("P2: the deletion of {vm} was acknowledged and is not stored"));
        }
    }

    /// What is stored against what was acknowledged, where that says it all.
    pub(crate) fn compare(&mut self, vm: VmId) {
        let truth = self.vm(vm);
        let sure = !truth.uncertain && truth.in_flight == 0 && !truth.delete_asked && truth.guest_ended.is_none();
        if let (true, Some(expected), Some(record)) = (sure, truth.expected, &truth.record)
            && record.desired != expected
        {
            let found = record.desired;
            self.violation(format!("P2: {vm} should be {expected:?} as acknowledged, and is {found:?}"));
        }
    }

    // --- what executes ---

    /// A guest begins to execute.
    pub(crate) fn started(
        &mut self,
        vm: VmId,
        uid: u64,
        (index, host): (usize, HostId),
        incarnation: Incarnation,
        disks: &[Open],
        now: Ns,
    ) {
        let truth = self.vm(vm);
        let others: Vec<_> =
            truth.executing.values().map(|(h, _, i, _)| format!("host {h}, incarnation {i}")).collect();
        let stored = truth.placed.get(&incarnation).copied();
        let has = |data: &BTreeSet<Place>| disks.iter().all(|open| data.contains(&open.place));
        let lost = truth.data.as_ref().filter(|data| !has(data)).cloned();
        let keys = disks.iter().map(|d| d.key.clone()).collect();
        let misfit = truth.record.as_ref().filter(|r| r.disks_exist).and_then(|r| contents::misfit(r, &keys));
        truth.executing.insert(uid, (index, host, incarnation, now));
        truth.open.insert(uid, disks.to_vec());
        self.contents.executes(vm, incarnation);
        if let Some(misfit) = misfit {
            self.violation(misfit);
        }
        if !others.is_empty() {
            self.violation(format!(
                "P1: {vm} executes on host {index}, incarnation {incarnation}, and also on {}",
                others.join(" and ")
            ));
        }
        if stored != Some(host) {
            self.violation(format!(
                "W1: {vm} executes on host {index}, which was never given incarnation {incarnation}"
            ));
        }
        if let Some(data) = lost {
            self.violation(format!("P5: {vm} has its data in {data:?} and executes with disks in {disks:?}"));
        }
    }

    /// A guest no longer executes.
    pub(crate) fn stopped(&mut self, vm: VmId, uid: u64) {
        self.vm(vm).open.remove(&uid);
        self.vm(vm).executing.remove(&uid);
        if self.quiet {
            self.violation(format!("P3: {vm} stopped though nothing was wrong"));
        }
    }

    /// A guest stands still because it is sent to another host.
    pub(crate) fn stands_still(&mut self, vm: VmId, uid: u64) {
        self.vm(vm).open.remove(&uid);
        self.vm(vm).executing.remove(&uid);
    }

    /// A guest ends by itself.
    pub(crate) fn guest_ended(&mut self, vm: VmId, now: Ns) {
        self.vm(vm).guest_ended = Some(now);
    }

    /// The agent ends a guest, or asks it to end.
    pub(crate) fn ends(&mut self, vm: VmId, uid: u64, host: HostId, how: &str, lease_over: bool) {
        let truth = self.vm(vm);
        let Some((_, _, incarnation, since)) = truth.executing.get(&uid).copied() else { return };
        let later = |at: Option<Ns>| at.is_some_and(|at| at >= since);
        let elsewhere = |r: &VmRecord| {
            r.placement.host != Some(host)
                || r.placement.incarnation != incarnation
                || r.desired != Desired::Running
                // The user has its host drained and allows that.
                || r.is_moving_out()
                // The user wants its disks put back.
                || r.revert.is_some()
        };
        // A call that was made before this start may be carried out after it.
        let asked = later(truth.asked_at) || truth.uncertain || truth.in_flight > 0 || truth.delete_asked;
        let restarted = truth.record.as_ref().is_some_and(|r| r.restarts > 0);
        if !(lease_over
            || asked
            || restarted
            || later(truth.guest_ended)
            || truth.record.as_deref().is_none_or(elsewhere))
        {
            self.violation(format!("P3: {vm}, incarnation {incarnation}, is {how} and nobody asked for it"));
        }
    }

    /// Disks are deleted.
    pub(crate) fn disks_deleted(&mut self, vm: VmId) {
        if !self.vm(vm).delete_asked {
            self.violation(format!("P5: the disks of {vm} are deleted, and nobody deleted it"));
        }
    }

    /// M7: a disk that was called void is removed.
    pub(crate) fn void_removed(&mut self, vm: VmId, disk: (Uuid, u32)) {
        if self.vm(vm).data.as_ref().is_some_and(|data| data.contains(&disk)) {
            self.violation(format!("P5: {vm} has its data in {disk:?}, which is removed"));
        }
    }

    // --- what is stored ---

    /// A leader was elected.
    pub(crate) fn elected(&mut self, term: Term) {
        if term <= self.term {
            self.violation(format!("term {term} comes after term {}", self.term));
        }
        self.term = term;
    }

    fn stored_vm(&mut self, vm: VmId, before: Option<&VmRecord>, after: Option<&Arc<VmRecord>>) {
        let truth = self.vm(vm);
        truth.record = after.cloned();
        let mut wrong = Vec::new();
        match (before, after) {
            (None, Some(after)) => {
                if truth.name != after.name {
                    wrong.push("P2: it was stored though nobody asked for it");
                }
                if let Some(host) = after.placement.host {
                    truth.placed.insert(after.placement.incarnation, host);
                }
                self.contents.created(after);
                let name = after.name.clone();
                if self.names.insert(name, vm).is_some_and(|other| other != vm) {
                    wrong.push("P2: a VM of this name was created twice");
                }
            }
            (Some(_), None) => {
                if !truth.delete_asked {
                    wrong.push("P2: it is gone and nobody deleted it");
                }
                if !truth.executing.is_empty() {
                    wrong.push("P1: its record goes while it executes");
                }
            }
            (Some(before), Some(after)) => {
                truth.changed(before, after, &mut wrong);
                let open = truth.open.values().next().map(|open| open.iter().map(|o| o.key.clone()).collect());
                self.note(|c| c.contents.changed(before, after, open.as_ref()));
            }
            (None, None) => {}
        }
        for what in wrong {
            self.violation(format!("{what}: VM {vm}"));
        }
    }
}

impl Truth {
    fn changed(&mut self, before: &VmRecord, after: &VmRecord, wrong: &mut Vec<&'static str>) {
        let (was, is) = (&before.placement, &after.placement);
        if is.incarnation < was.incarnation {
            wrong.push("its incarnation goes back");
        }
        if let Some(host) = is.host {
            if *self.placed.entry(is.incarnation).or_insert(host) != host {
                wrong.push("P1: two hosts have one incarnation");
            }
            if self.executing.values().any(|(_, h, ..)| *h != host) {
                wrong.push("P1: it is given to a host while it executes on another");
            }
        }
        if before.spec.failover != after.spec.failover {
            if is.host.is_some() && is.incarnation == was.incarnation {
                wrong.push("W4: its class changes and its incarnation does not");
            }
            // Under which lease could what executes be judged, if not under its own?
            if !self.executing.is_empty() {
                wrong.push("W4: its class changes while it executes");
            }
        }
        match (before.desired, after.desired) {
            (Desired::Deleted, Desired::Running | Desired::Stopped) => wrong.push("P2: its deletion is taken back"),
            (Desired::Running | Desired::Stopped, Desired::Deleted) if !self.delete_asked => {
                wrong.push("P2: nobody deleted it");
            }
            (Desired::Stopped, Desired::Running) if !self.start_asked => wrong.push("P2: nobody started it"),
            (Desired::Running, Desired::Stopped) if !self.stop_asked && self.guest_ended.is_none() => {
                wrong.push("P2: nobody stopped it");
            }
            _ => {}
        }
        if before.disks_exist && after.disk_generation != before.disk_generation {
            let copied = before.migration.as_ref().is_some_and(|m| m.disk_generation == Some(after.disk_generation));
            if after.spec.on_disk_loss == OnDiskLoss::Wait && !copied {
                wrong.push("P5: its disks are given up");
            }
            self.data = None;
        }
        if let (true, Some(home)) = (after.disks_exist, &after.disk_home) {
            let disks = after.spec.disks.iter().map(|d| {
                let pool = home.pools.get(&d.pool).copied().flatten();
                (pool.unwrap_or(home.host.uuid()), d.kept_generation.unwrap_or(after.disk_generation))
            });
            self.data = Some(disks.collect());
        }
    }
}

impl Core {
    /// A key is about to be changed.
    pub(crate) fn stored(
        &mut self,
        from: usize,
        key: &Key,
        before: Option<&Record>,
        after: Option<&Record>,
        revision: i64,
    ) {
        if revision < self.check.revision {
            self.check.violation(format!("revision {revision} comes after {}", self.check.revision));
        }
        self.check.revision = revision;
        if let Key::Vm(vm) = key {
            let record = |r: Option<&Record>| match r {
                Some(Record::Vm(record)) => Some(record.clone()),
                Some(_) | None => None,
            };
            let (before, after) = (record(before), record(after));
            if let (Some(before), Some(after)) = (&before, &after)
                && before.placement.incarnation != after.placement.incarnation
            {
                let host = |r: &VmRecord| r.placement.host.map_or("no host".to_owned(), |h| h.to_string());
                let arrived = before.migration.as_ref().is_some_and(|m| m.incarnation == after.placement.incarnation);
                if arrived {
                    self.stats.migrations_done += 1;
                } else if before.placement.host.is_some() && before.placement.host != after.placement.host {
                    self.stats.failovers += 1;
                }
                self.log(format_args!(
                    "etcd: controller {from} gives {vm}, incarnation {}, to {} (was {})",
                    after.placement.incarnation,
                    host(after),
                    host(before)
                ));
            }
            self.check.stored_vm(*vm, before.as_deref(), after.as_ref());
        }
    }
}
