//! The rules of one session, after its Welcome. Pure: messages and plans come in, what to do comes out.
//!
//! ```text
//!  reports ──▶ seen ──▶ desired::plan ──▶ differences to what was sent ──▶ DesiredVms
//!     └──▶ waiting ──▶ a batch at a time to the writer ──▶ ReportAck
//!  heartbeat ──▶ withheld while a VM executes here that belongs elsewhere, otherwise up to `health/`
//! ```
//!
//! # Invariants
//!
//! * **S3** While the host may execute a VM that belongs elsewhere, its heartbeats are not answered: from the report that
//!   shows it executing until the host says that the VM is FORGOTTEN or DELETED, or the VM belongs here again (P1).
//! * **S4** One batch of reports is stored at a time (and acknowledged after that, `job.rs`), so of each VM the newest is
//!   stored last.
//! * **S5** What the host should have is sent once per change, and nothing that did not change is sent.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::ids::VmId;

use super::{
    desired::{Plan, Seen, Wanted},
    parse::Reported,
};
use crate::{
    model::{Liveness, vm::Failover},
    state::{
        State,
        command::{HostFacts, ObservedState},
    },
};

/// S6: a VM that may still execute on the machine that had this host's id before, if the one that registers now is another
/// one (or the same after a reboot). `proven` is what silence has proven about the leases of before.
#[must_use]
pub fn other_machine(state: &State, facts: &HostFacts, proven: Liveness) -> Option<String> {
    let known = state.host(facts.id)?;
    if known.record.boot_id == facts.boot_id {
        return None;
    }
    known.vms.iter().filter_map(|&vm| state.vm(vm)).find_map(|vm| {
        let waits = match vm.record.spec.failover {
            Failover::Fast => proven == Liveness::Up,
            Failover::Patient => proven != Liveness::Dead,
            // No lease binds it, and no time proves anything: an operator who copies a state directory is on his own.
            Failover::Hold => false,
        };
        waits.then(|| vm.record.name.clone())
    })
}

/// The state of one session.
#[derive(Debug, Default)]
pub struct Rules {
    /// What the host has, by its newest reports.
    seen: BTreeMap<VmId, Seen>,
    /// Reports that are to be stored, the newest of each VM.
    waiting: BTreeMap<VmId, Reported>,
    /// A batch is being stored.
    storing: bool,
    /// What the host was last told.
    sent: BTreeMap<VmId, Wanted>,
    /// VMs that may execute here and belong elsewhere (S3).
    unclean: BTreeSet<VmId>,
    /// VMs that execute here and that nobody knows.
    unknown: BTreeSet<VmId>,
    /// How many of them people have been told of.
    noted: usize,
    last_heartbeat: Option<u64>,
}

/// Of how many unknown VMs people are told in one session. Each is an event in etcd, and what a host claims to have is not to fill that.
const MAX_NOTED: usize = 100;

/// What to do after a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What the host is told.
    pub send: Vec<(VmId, Wanted)>,
    /// VMs that are now known to execute here and that nobody knows.
    pub newly_unknown: Vec<VmId>,
}

/// What to do about a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnHeartbeat {
    /// Up to `health/`.
    Ask,
    /// Not answered: these VMs execute here and belong elsewhere.
    Withhold(Vec<VmId>),
    /// Its number is not newer than the last: ignored.
    Stale,
}

impl Rules {
    /// The rules of a session whose Hello showed these VMs, which is still to be stored.
    pub fn new(vms: Vec<Reported>) -> Self {
        let mut rules = Self::default();
        rules.reported(vms);
        rules
    }

    fn see(&mut self, report: &Reported) {
        let vm = report.seen.vm;
        match report.seen.state {
            ObservedState::Forgotten | ObservedState::Deleted => {
                self.seen.remove(&vm);
                self.unclean.remove(&vm);
            }
            ObservedState::Preparing
            | ObservedState::Starting
            | ObservedState::Running
            | ObservedState::Stopping
            | ObservedState::Stopped
            | ObservedState::PoweredOff
            | ObservedState::Failed
            | ObservedState::Fenced
            | ObservedState::Incoming
            | ObservedState::Received
            | ObservedState::HandedOver => {
                let Reported { sequence, ref seen } = *report;
                self.seen.insert(vm, Seen { incarnation: seen.incarnation, state: seen.state, sequence });
            }
        }
    }

    /// The host reported VMs. A plan is due.
    pub fn reported(&mut self, reports: Vec<Reported>) {
        for report in reports {
            let vm = report.seen.vm;
            let newest = self.seen.get(&vm).map(|s| s.sequence).max(self.waiting.get(&vm).map(|w| w.sequence));
            if newest.is_some_and(|newest| report.sequence < newest) {
                continue; // overtaken
            }
            self.see(&report);
            self.waiting.insert(vm, report);
        }
    }

    /// What the host has.
    pub fn seen(&self) -> &BTreeMap<VmId, Seen> {
        &self.seen
    }

    /// Takes in a new plan.
    pub fn planned(&mut self, plan: Plan) -> Changes {
        // Only one that belongs here again is no longer misplaced: one that was deleted elsewhere still executes here.
        self.unclean.retain(|vm| !matches!(plan.vms.get(vm), Some(Wanted::AsRecorded(_))));
        self.unclean.extend(&plan.misplaced);
        let left = MAX_NOTED.saturating_sub(self.noted);
        let newly_unknown: Vec<VmId> = plan.unknown.difference(&self.unknown).take(left).copied().collect();
        self.noted += newly_unknown.len();
        self.unknown = plan.unknown;
        let send =
            plan.vms.iter().filter(|(vm, wanted)| self.sent.get(vm) != Some(wanted)).map(|(vm, w)| (*vm, *w)).collect();
        self.sent = plan.vms;
        Changes { send, newly_unknown }
    }

    /// VMs that execute here and that the cluster knows nothing about.
    pub fn unknown(&self) -> &BTreeSet<VmId> {
        &self.unknown
    }

    /// A heartbeat came.
    pub fn heartbeat(&mut self, sequence: u64) -> OnHeartbeat {
        if self.last_heartbeat.is_some_and(|last| sequence <= last) {
            return OnHeartbeat::Stale;
        }
        self.last_heartbeat = Some(sequence);
        if self.unclean.is_empty() {
            OnHeartbeat::Ask
        } else {
            OnHeartbeat::Withhold(self.unclean.iter().copied().collect())
        }
    }

    /// The reports to store now, if none are being stored. To be followed by [`Rules::settled`].
    pub fn batch(&mut self) -> Vec<Reported> {
        if self.storing || self.waiting.is_empty() {
            return Vec::new();
        }
        self.storing = true;
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    /// The batch is settled: stored, refused, or there was no room for `again`, which waits again unless a newer report does.
    pub fn settled(&mut self, again: Vec<Reported>) {
        self.storing = false;
        for report in again {
            self.waiting.entry(report.seen.vm).or_insert(report);
        }
    }

    /// Whether reports wait to be stored and none are being stored.
    pub fn has_batch(&self) -> bool {
        !self.storing && !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uncloud_proto::ids::{Incarnation, Revision};
    use uuid::Uuid;

    use super::*;
    use crate::state::command::VmObservation;

    fn vm(n: u128) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n))
    }

    fn report(n: u128, sequence: u64, state: ObservedState) -> Reported {
        let seen = VmObservation {
            vm: vm(n),
            incarnation: Incarnation(1),
            state,
            reason: String::new(),
            disks_ready: false,
            last_exit: None,
            next_attempt: None,
            addresses: Vec::new(),
            restarts_done: 0,
            paused: false,
            migration: None,
            disks: Default::default(),
        };
        Reported { sequence, seen }
    }

    /// A plan in which VM 1 belongs here (at `revision`, if it does) and all others that were seen belong elsewhere.
    fn plan(rules: &Rules, revision: Option<i64>) -> Plan {
        let mut plan = Plan::default();
        if let Some(revision) = revision {
            plan.vms.insert(vm(1), Wanted::AsRecorded(Revision(revision)));
        }
        for (&id, seen) in rules.seen() {
            if plan.vms.contains_key(&id) {
                continue;
            }
            plan.vms.insert(id, Wanted::Forget(Incarnation(2)));
            if seen.state.executes() {
                plan.misplaced.insert(id);
            }
        }
        plan
    }

    #[test]
    fn s3_a_misplaced_vm_withholds_renewals_until_it_is_forgotten() {
        let mut rules = Rules::new(vec![report(2, 1, ObservedState::Running)]);
        let changes = rules.planned(plan(&rules, None));
        assert_eq!(changes.send, [(vm(2), Wanted::Forget(Incarnation(2)))]);
        assert_eq!(rules.heartbeat(1), OnHeartbeat::Withhold(vec![vm(2)]));
        // It fails and might be started again: not enough.
        rules.reported(vec![report(2, 2, ObservedState::Failed)]);
        rules.planned(plan(&rules, None));
        assert_eq!(rules.heartbeat(2), OnHeartbeat::Withhold(vec![vm(2)]));
        rules.reported(vec![report(2, 3, ObservedState::Forgotten)]);
        assert_eq!(rules.planned(plan(&rules, None)), Changes::default());
        assert_eq!(rules.heartbeat(3), OnHeartbeat::Ask);
    }

    #[test]
    fn s3_a_vm_that_belongs_here_again_withholds_nothing() {
        let mut rules = Rules::new(vec![report(1, 1, ObservedState::Running)]);
        rules.planned(plan(&rules, None));
        assert_eq!(rules.heartbeat(1), OnHeartbeat::Withhold(vec![vm(1)]));
        let changes = rules.planned(plan(&rules, Some(9)));
        assert_eq!(changes.send, [(vm(1), Wanted::AsRecorded(Revision(9)))]);
        assert_eq!(rules.heartbeat(2), OnHeartbeat::Ask);
    }

    #[test]
    fn what_a_hello_shows_is_stored_like_any_report() {
        let mut rules = Rules::new(vec![report(1, 1, ObservedState::Running)]);
        assert_eq!(rules.seen().len(), 1);
        assert_eq!(rules.batch().len(), 1);
        assert!(rules.batch().is_empty());
    }

    #[test]
    fn s4_reports_are_stored_one_batch_at_a_time_and_the_newest_last() {
        let mut rules = Rules::default();
        rules.reported(vec![report(1, 1, ObservedState::Preparing), report(2, 1, ObservedState::Running)]);
        let batch = rules.batch();
        assert_eq!(batch.len(), 2);
        rules.reported(vec![report(1, 3, ObservedState::Running)]);
        rules.reported(vec![report(1, 2, ObservedState::Starting)]);
        assert!(rules.batch().is_empty(), "one batch at a time");
        rules.settled(Vec::new());
        let batch = rules.batch();
        assert_eq!((batch.len(), batch[0].sequence), (1, 3), "the overtaken report is ignored");
        // The store was busy, and meanwhile something newer came.
        rules.reported(vec![report(1, 4, ObservedState::Stopping)]);
        rules.settled(batch);
        assert_eq!(rules.batch()[0].sequence, 4);
    }

    #[test]
    fn s5_nothing_is_sent_twice() {
        let mut rules = Rules::new(vec![report(1, 1, ObservedState::Running)]);
        assert_eq!(rules.planned(plan(&rules, Some(5))).send.len(), 1);
        assert_eq!(rules.planned(plan(&rules, Some(5))), Changes::default());
        assert_eq!(rules.planned(plan(&rules, Some(6))).send.len(), 1);
        // It goes away and comes back: that is a change, too.
        assert_eq!(rules.planned(Plan::default()), Changes::default());
        assert_eq!(rules.planned(plan(&rules, Some(6))).send.len(), 1);
    }

    #[test]
    fn an_unknown_vm_is_noted_once_and_left_alone() {
        let mut rules = Rules::new(vec![report(1, 1, ObservedState::Running)]);
        let unknown = || Plan { unknown: [vm(1)].into(), ..Plan::default() };
        assert_eq!(rules.planned(unknown()), Changes { newly_unknown: vec![vm(1)], send: Vec::new() });
        assert_eq!(rules.planned(unknown()), Changes::default());
        assert_eq!(rules.heartbeat(1), OnHeartbeat::Ask);
        assert_eq!(rules.unknown().len(), 1);
    }

    #[test]
    fn a_host_that_makes_up_vms_makes_few_events() {
        let mut rules = Rules::default();
        let told = |rules: &mut Rules, vms: std::ops::Range<u128>| {
            rules.planned(Plan { unknown: vms.map(vm).collect(), ..Plan::default() }).newly_unknown.len()
        };
        assert_eq!((told(&mut rules, 1..91), told(&mut rules, 91..201), told(&mut rules, 201..211)), (90, 10, 0));
        assert_eq!(rules.unknown().len(), 10, "all are shown");
    }

    #[test]
    fn a_heartbeat_counts_once() {
        let mut rules = Rules::default();
        assert_eq!(rules.heartbeat(1), OnHeartbeat::Ask);
        assert_eq!(rules.heartbeat(1), OnHeartbeat::Stale);
        assert_eq!(rules.heartbeat(0), OnHeartbeat::Stale);
        assert_eq!(rules.heartbeat(u64::MAX), OnHeartbeat::Ask);
    }

    proptest! {
        /// S3 against a model that only looks at what was reported.
        #[test]
        fn s3_no_heartbeat_is_answered_while_a_misplaced_vm_may_execute(
            steps in prop::collection::vec((1_u128..4, 0_usize..13, any::<bool>()), 1..60)
        ) {
            const STATES: [ObservedState; 13] = [
                ObservedState::Preparing, ObservedState::Starting, ObservedState::Running, ObservedState::Stopping,
                ObservedState::Stopped, ObservedState::PoweredOff, ObservedState::Failed, ObservedState::Fenced,
                ObservedState::Deleted, ObservedState::Forgotten,
                ObservedState::Incoming, ObservedState::Received, ObservedState::HandedOver,
            ];
            let mut rules = Rules::default();
            let mut executing: BTreeMap<VmId, bool> = BTreeMap::new();
            for (i, (n, state, one_is_ours)) in steps.into_iter().enumerate() {
                let sequence = i as u64 + 1;
                rules.reported(vec![report(n, sequence, STATES[state])]);
                executing.insert(vm(n), STATES[state].executes());
                rules.planned(plan(&rules, one_is_ours.then_some(1)));
                let misplaced = executing.iter().any(|(id, e)| *e && !(one_is_ours && *id == vm(1)));
                if misplaced {
                    prop_assert!(matches!(rules.heartbeat(sequence), OnHeartbeat::Withhold(_)));
                }
            }
        }
    }
}
