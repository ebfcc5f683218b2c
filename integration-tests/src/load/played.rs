//! What a played agent knows and answers. Pure: the time comes in as an argument, messages come out.
//!
//! It obeys at once: what should run runs, what should be stopped is, and so on. Nothing executes.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use uncloud_proto::v1::{self, AgentVmState, Disposition};
use uuid::Uuid;

use super::site::PlayedHost;

/// Heartbeats whose answer is still waited for. More mean that none is answered.
const UNANSWERED: usize = 64;

/// One agent.
pub(super) struct Played {
    host: PlayedHost,
    pool: Uuid,
    vms: BTreeMap<String, PlayedVm>,
    newest_term: i64,
    /// When the short lease runs out. `None`: it holds none.
    lease: Option<Instant>,
    heartbeats: u64,
    /// Heartbeats that have not been answered, and when they were sent.
    waiting: VecDeque<(u64, Instant)>,
}

struct PlayedVm {
    incarnation: u64,
    state: AgentVmState,
    sequence: u64,
}

/// The lease had run out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lapsed;

impl Played {
    pub(super) fn new(host: PlayedHost, pool: Uuid) -> Self {
        let running = || PlayedVm { incarnation: 1, state: AgentVmState::Running, sequence: 1 };
        let vms = host.vms.iter().map(|id| (id.to_string(), running())).collect();
        Self { host, pool, vms, newest_term: 0, lease: None, heartbeats: 0, waiting: VecDeque::new() }
    }

    /// What it says first in a session.
    pub(super) fn hello(&mut self) -> v1::Hello {
        self.heartbeats = 0;
        self.waiting.clear();
        let vms = self.vms.iter().map(|(id, vm)| vm.report(id)).collect();
        self.host.hello(self.pool, vms, self.newest_term)
    }

    /// Looks whether the lease has run out. If so, all that ran was killed.
    pub(super) fn look(&mut self, now: Instant) -> Result<(), Lapsed> {
        if self.lease.is_none_or(|until| now < until) {
            return Ok(());
        }
        self.lease = None;
        for vm in self.vms.values_mut().filter(|vm| vm.state == AgentVmState::Running) {
            vm.state = AgentVmState::Fenced;
            vm.sequence += 1;
        }
        Err(Lapsed)
    }

    /// The next heartbeat, which is sent at `now`.
    pub(super) fn heartbeat(&mut self, now: Instant) -> v1::Heartbeat {
        self.heartbeats += 1;
        if self.waiting.len() == UNANSWERED {
            self.waiting.pop_front();
        }
        self.waiting.push_back((self.heartbeats, now));
        v1::Heartbeat { sequence: self.heartbeats }
    }

    /// How long the oldest heartbeat has waited for its answer.
    pub(super) fn unanswered_for(&self, now: Instant) -> Duration {
        self.waiting.front().map_or(Duration::ZERO, |(_, sent)| now.saturating_duration_since(*sent))
    }

    /// A renewal came. How long its heartbeat has waited for it.
    pub(super) fn renewed(&mut self, renewal: &v1::Renewal, now: Instant) -> Option<Duration> {
        let mut answered = None;
        while let Some(&(sequence, sent)) = self.waiting.front()
            && sequence <= renewal.sequence
        {
            self.waiting.pop_front();
            if sequence == renewal.sequence {
                answered = Some(sent);
            }
        }
        let sent = answered?;
        self.lease = Some(sent + Duration::from_millis(renewal.fast_lease_ms));
        Some(now.saturating_duration_since(sent))
    }

    /// A message of this term came.
    pub(super) fn saw_term(&mut self, term: i64) {
        self.newest_term = self.newest_term.max(term);
    }

    /// Obeys. The reports of those VMs that are now otherwise than before.
    pub(super) fn obey(&mut self, desired: Vec<v1::DesiredVm>) -> Vec<v1::VmReport> {
        let mut reports = Vec::new();
        for wanted in desired {
            let state = match wanted.disposition() {
                Disposition::Run => AgentVmState::Running,
                Disposition::Stop => AgentVmState::Stopped,
                Disposition::Delete => AgentVmState::Deleted,
                Disposition::Forget => AgentVmState::Forgotten,
                Disposition::Incoming | Disposition::Unspecified => continue,
            };
            let known = self.vms.get(&wanted.vm_id);
            if known.is_some_and(|vm| (vm.incarnation, vm.state) == (wanted.incarnation, state)) {
                continue;
            }
            let sequence = known.map_or(0, |vm| vm.sequence) + 1;
            let vm = PlayedVm { incarnation: wanted.incarnation, state, sequence };
            reports.push(vm.report(&wanted.vm_id));
            match state {
                AgentVmState::Deleted | AgentVmState::Forgotten => drop(self.vms.remove(&wanted.vm_id)),
                _ => drop(self.vms.insert(wanted.vm_id, vm)),
            }
        }
        reports
    }
}

impl PlayedVm {
    fn report(&self, id: &str) -> v1::VmReport {
        v1::VmReport {
            vm_id: id.to_owned(),
            incarnation: self.incarnation,
            sequence: self.sequence,
            state: self.state.into(),
            disks_ready: true,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Site;

    fn played() -> (Played, String) {
        let site = Site::new(1, 1, 1, (0, 0));
        let id = site.hosts[0].vms[0].to_string();
        (Played::new(site.hosts[0].clone(), site.pool), id)
    }

    fn wanted(id: &str, incarnation: u64, disposition: Disposition) -> v1::DesiredVm {
        v1::DesiredVm { vm_id: id.to_owned(), incarnation, disposition: disposition.into(), ..Default::default() }
    }

    #[test]
    fn the_lease_runs_from_when_the_answered_heartbeat_was_sent() {
        let (mut agent, _) = played();
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let first = agent.heartbeat(at(0)).sequence;
        let second = agent.heartbeat(at(1000)).sequence;
        assert_eq!(agent.unanswered_for(at(1500)), Duration::from_millis(1500));
        let renewal = |sequence| v1::Renewal { sequence, fast_lease_ms: 6000, patient_lease_ms: 60_000 };
        assert_eq!(agent.renewed(&renewal(second), at(1010)), Some(Duration::from_millis(10)));
        assert_eq!(agent.renewed(&renewal(first), at(1020)), None, "overtaken");
        assert_eq!(agent.look(at(6999)), Ok(()));
        assert_eq!(agent.look(at(7000)), Err(Lapsed));
        assert_eq!(agent.look(at(7001)), Ok(()), "once");
        assert_eq!(agent.hello().vms[0].state(), AgentVmState::Fenced);
    }

    #[test]
    fn it_obeys_and_reports_only_what_changes() {
        let (mut agent, id) = played();
        assert!(agent.obey(vec![wanted(&id, 1, Disposition::Run)]).is_empty());
        assert_eq!(agent.obey(vec![wanted(&id, 1, Disposition::Stop)])[0].state(), AgentVmState::Stopped);
        let again = agent.obey(vec![wanted(&id, 2, Disposition::Run)]);
        assert_eq!((again[0].incarnation, again[0].state(), again[0].sequence), (2, AgentVmState::Running, 3));
        assert_eq!(agent.obey(vec![wanted(&id, 2, Disposition::Delete)])[0].state(), AgentVmState::Deleted);
        assert!(agent.hello().vms.is_empty());
    }
}
