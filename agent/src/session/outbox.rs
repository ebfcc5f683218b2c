//! The newest report of each VM, kept until the leader has it. Pure, with a shared handle around it.
//!
//! Only the newest counts, so this is as large as the number of VMs, however long the leader is away. A report that
//! has been acknowledged stays, because the next `Hello` names every VM.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;
use uncloud_proto::{ids::VmId, v1};

use crate::vm::{
    disks::GuestThen,
    state::{Report, ReportState},
};

/// What there is to say about each VM.
#[derive(Debug, Default)]
pub struct Outbox {
    sequence: u64,
    entries: BTreeMap<VmId, Entry>,
}

#[derive(Debug)]
struct Entry {
    report: Report,
    sequence: u64,
    acknowledged: bool,
    /// The session in which it went out.
    sent: bool,
}

impl Outbox {
    /// Takes what a VM is now. Says whether that is news.
    pub fn put(&mut self, vm: VmId, report: Report) -> bool {
        if self.entries.get(&vm).is_some_and(|e| e.report == report) {
            return false;
        }
        self.sequence += 1;
        self.entries.insert(vm, Entry { report, sequence: self.sequence, acknowledged: false, sent: false });
        true
    }

    /// Everything, for the `Hello` of a new session.
    pub fn hello(&mut self) -> Vec<v1::VmReport> {
        let mut reports = Vec::with_capacity(self.entries.len());
        for (vm, entry) in &mut self.entries {
            entry.sent = true;
            reports.push(entry.to_proto(*vm));
        }
        reports
    }

    /// At most `limit` reports that this session has not sent.
    pub fn unsent(&mut self, limit: usize) -> Vec<v1::VmReport> {
        let mut reports = Vec::new();
        for (vm, entry) in self.entries.iter_mut().filter(|(_, e)| !e.sent && !e.acknowledged).take(limit) {
            entry.sent = true;
            reports.push(entry.to_proto(*vm));
        }
        reports
    }

    /// Whether [`Outbox::unsent`] would return anything.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.entries.values().any(|e| !e.sent && !e.acknowledged)
    }

    /// The leader has stored a report. Says whether the VM is over with that: deleted or forgotten.
    pub fn acknowledge(&mut self, vm: VmId, sequence: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&vm).filter(|e| e.sequence == sequence) else { return false };
        entry.acknowledged = true;
        let over = matches!(entry.report.state, ReportState::Deleted | ReportState::Forgotten);
        if over {
            self.entries.remove(&vm);
        }
        over
    }
}

impl Entry {
    fn to_proto(&self, vm: VmId) -> v1::VmReport {
        let r = &self.report;
        v1::VmReport {
            vm_id: vm.to_string(),
            incarnation: r.incarnation.0,
            sequence: self.sequence,
            state: state_to_proto(r.state).into(),
            reason: r.reason.clone(),
            since: Some(r.since.to_proto()),
            disks_ready: r.disks_ready,
            last_exit: r.last_exit.as_ref().map(|x| v1::LastExit {
                code: x.code,
                signal: x.signal,
                reason: x.reason.clone(),
                at: Some(x.at.to_proto()),
            }),
            next_attempt: r.next_attempt.map(|t| t.to_proto()),
            restarts_done: r.restarts_done,
            addresses: r.addresses.clone(),
            snapshots_made: r.disks.made.iter().map(ToString::to_string).collect(),
            snapshot_guests: r.disks.made.iter().map(|id| guest_then(r.disks.guests.get(id)).into()).collect(),
            snapshots_removed: r.disks.removed.iter().map(ToString::to_string).collect(),
            reverted: r.disks.reverted,
            disk_orders_done: r.disks.disks.clone(),
            snapshots_ready: r.disks.holds.ready.iter().map(ToString::to_string).collect(),
            hold: r.disks.holds.now.map(|id| id.to_string()).unwrap_or_default(),
            held: r.disks.holds.lasted.map(|id| id.to_string()).unwrap_or_default(),
            migration: r.migration.as_ref().map(|m| v1::MigrationReport {
                incarnation: m.incarnation.0,
                address: m.address.map(|a| a.to_string()).unwrap_or_default(),
                transferred_bytes: m.progress.transferred_bytes,
                remaining_bytes: m.progress.remaining_bytes,
                bytes_per_second: m.progress.bytes_per_second,
                expected_downtime_ms: m.progress.expected_downtime_ms,
                failure: m.failure.clone(),
                disks_address: m.disks_address.map(|a| a.to_string()).unwrap_or_default(),
                disks: u32::try_from(m.disks).unwrap_or(u32::MAX),
            }),
            paused: r.paused,
        }
    }
}

const fn state_to_proto(state: ReportState) -> v1::AgentVmState {
    match state {
        ReportState::Preparing => v1::AgentVmState::Preparing,
        ReportState::Starting => v1::AgentVmState::Starting,
        ReportState::Running => v1::AgentVmState::Running,
        ReportState::Stopping => v1::AgentVmState::Stopping,
        ReportState::Stopped => v1::AgentVmState::Stopped,
        ReportState::PoweredOff => v1::AgentVmState::PoweredOff,
        ReportState::Failed => v1::AgentVmState::Failed,
        ReportState::Fenced => v1::AgentVmState::Fenced,
        ReportState::Deleted => v1::AgentVmState::Deleted,
        ReportState::Forgotten => v1::AgentVmState::Forgotten,
        ReportState::Incoming => v1::AgentVmState::Incoming,
        ReportState::Received => v1::AgentVmState::Received,
        ReportState::HandedOver => v1::AgentVmState::HandedOver,
    }
}

/// The outbox that the VMs' tasks fill and the session empties. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct SharedOutbox {
    shared: Arc<(Mutex<Outbox>, Notify)>,
}

impl SharedOutbox {
    /// Takes what a VM is now. Says whether that is news.
    pub fn put(&self, vm: VmId, report: Report) -> bool {
        let news = self.lock().put(vm, report);
        if news {
            self.shared.1.notify_one();
        }
        news
    }

    /// Waits until there is something that this session has not sent. Cancel safe. For one waiter.
    pub async fn wait(&self) {
        loop {
            if self.lock().has_unsent() {
                return;
            }
            self.shared.1.notified().await;
        }
    }

    /// The outbox itself. Hold it for a moment only.
    pub fn lock(&self) -> MutexGuard<'_, Outbox> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn guest_then(guest: Option<&GuestThen>) -> v1::SnapshotGuest {
    match guest {
        None => v1::SnapshotGuest::Unspecified,
        Some(GuestThen::Frozen) => v1::SnapshotGuest::Frozen,
        Some(GuestThen::Ran) => v1::SnapshotGuest::Running,
        Some(GuestThen::Off) => v1::SnapshotGuest::Off,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uncloud_proto::{clock::WallTime, ids::Incarnation};
    use uuid::Uuid;

    use super::*;

    fn vm(n: u8) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n.into()))
    }

    fn report(state: ReportState, incarnation: u64) -> Report {
        Report {
            incarnation: Incarnation(incarnation),
            state,
            reason: String::new(),
            since: WallTime(0),
            disks_ready: false,
            last_exit: None,
            next_attempt: None,
            restarts_done: 0,
            addresses: Vec::new(),
            migration: None,
            paused: false,
            disks: Default::default(),
        }
    }

    #[test]
    fn only_news_is_sent_and_only_once_in_a_session() {
        let mut outbox = Outbox::default();
        assert!(outbox.put(vm(1), report(ReportState::Running, 1)));
        assert!(!outbox.put(vm(1), report(ReportState::Running, 1)));
        assert_eq!(outbox.unsent(10).len(), 1);
        assert!(outbox.unsent(10).is_empty());
        assert_eq!(outbox.hello().len(), 1, "not acknowledged, so the next session says it again");
        assert!(!outbox.acknowledge(vm(1), 1));
        assert_eq!(outbox.hello().len(), 1, "Hello names every VM");
    }

    #[test]
    fn an_acknowledgement_of_an_older_report_means_nothing() {
        let mut outbox = Outbox::default();
        outbox.put(vm(1), report(ReportState::Forgotten, 1));
        outbox.put(vm(1), report(ReportState::Running, 2));
        assert!(!outbox.acknowledge(vm(1), 1));
        assert_eq!(outbox.unsent(10).len(), 1);
        outbox.put(vm(1), report(ReportState::Deleted, 2));
        assert!(outbox.acknowledge(vm(1), 3));
        assert!(outbox.hello().is_empty());
    }

    proptest! {
        /// Whatever happens in whatever order, the leader ends up with the newest report of each VM.
        #[test]
        fn the_leader_gets_the_newest(steps in prop::collection::vec((0u8..4, 0u8..3, 1u64..5), 1..200)) {
            let mut outbox = Outbox::default();
            let mut newest = BTreeMap::new();
            let mut leader: BTreeMap<String, (u64, u64)> = BTreeMap::new();
            let mut store = |reports: Vec<v1::VmReport>| for r in reports {
                let known = leader.entry(r.vm_id).or_default();
                if r.sequence >= known.0 { *known = (r.sequence, r.incarnation); }
            };
            for (step, n, incarnation) in steps {
                match step {
                    0 | 1 => {
                        outbox.put(vm(n), report(ReportState::Running, incarnation));
                        newest.insert(vm(n).to_string(), incarnation);
                    }
                    2 => store(outbox.unsent(1)),
                    // The connection breaks: what was on its way is lost, and a new Hello says it all.
                    _ => { outbox.unsent(1); store(outbox.hello()); }
                }
            }
            store(outbox.unsent(usize::MAX));
            let got: BTreeMap<String, u64> = leader.into_iter().map(|(vm, (_, i))| (vm, i)).collect();
            prop_assert_eq!(got, newest);
        }
    }
}
