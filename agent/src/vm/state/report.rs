//! What a VM's state looks like to the leader. Pure.

use uncloud_proto::{clock::WallTime, ids::Incarnation};

use super::{Acceptance, Disposition, Ending, VmState, Work};
use crate::records::{LastExit, Settled};

/// What one VM is on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The incarnation that this is about.
    pub incarnation: Incarnation,
    /// What it is.
    pub state: ReportState,
    /// Why, in words.
    pub reason: String,
    /// Since when.
    pub since: WallTime,
    /// All its disks have been made.
    pub disks_ready: bool,
    /// How QEMU last ended.
    pub last_exit: Option<LastExit>,
    /// When a start is tried again.
    pub next_attempt: Option<WallTime>,
    /// The newest restart counter that has been carried out.
    pub restarts_done: u64,
}

/// What a VM is on a host. The same as in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportState {
    /// Images and disks are being made ready.
    Preparing,
    /// QEMU is being started, or looked for.
    Starting,
    /// The guest executes.
    Running,
    /// It executes and is being ended.
    Stopping,
    /// It does not execute, as desired.
    Stopped,
    /// The guest powered itself off.
    PoweredOff,
    /// It does not execute because of an error.
    Failed,
    /// It does not execute, and needs a new incarnation to do so.
    Fenced,
    /// It does not execute and its disks are gone.
    Deleted,
    /// It does not execute and its record goes.
    Forgotten,
}

impl VmState {
    /// What it is now.
    #[must_use]
    pub fn report(&self) -> Report {
        let incarnation = self.execution.as_ref().map_or(self.record.desired.incarnation, |x| x.incarnation);
        let mut report = Report {
            incarnation,
            state: ReportState::Preparing,
            reason: String::new(),
            since: self.shown.2,
            disks_ready: self.record.disks_ready,
            last_exit: self.record.last_exit.clone(),
            next_attempt: None,
            restarts_done: self.record.restarts_done,
        };
        if let Some(x) = &self.execution {
            (report.state, report.reason) = match x.ending {
                None => (ReportState::Running, self.frozen.clone().unwrap_or_default()),
                Some(ending) => (ReportState::Stopping, ending_words(ending)),
            };
            return report;
        }
        self.report_idle(&mut report);
        report
    }

    /// Remembers since when it is what it is now. Called after every event.
    pub(super) fn note_since(&mut self, now: WallTime) {
        let report = self.report();
        let since = match (report.state, &self.record.launched) {
            // These survive a restart of the agent: the record has them.
            (ReportState::Running, Some(launched)) => launched.at,
            _ if self.execution.is_none() && self.record.settled.is_some() => self.record.settled_at,
            _ if (report.state, report.incarnation) == (self.shown.0, self.shown.1) => self.shown.2,
            _ => now,
        };
        self.shown = (report.state, report.incarnation, since);
    }

    fn report_idle(&self, report: &mut Report) {
        match (self.work, &self.record.launched) {
            (Work::Launching, _) => return report.state = ReportState::Starting,
            // Until it has been looked at, it counts as executing: the leader must not give it away meanwhile.
            (Work::Looking, launched) if self.frozen.is_some() || launched.is_some() => {
                report.incarnation = launched.map_or(report.incarnation, |l| l.incarnation);
                report.state = ReportState::Starting;
                "the agent was started and looks whether it still executes".clone_into(&mut report.reason);
                return;
            }
            (Work::Preparing, _) => return report.reason.clone_from(&self.progress),
            (Work::None | Work::Looking | Work::Deleting, _) => {}
        }
        let disposition = self.record.desired.disposition;
        let settled = match disposition {
            // On the way to its end it does not matter how it came to rest before.
            Disposition::Delete => self.record.settled.as_ref().filter(|s| **s == Settled::Deleted),
            Disposition::Run | Disposition::Stop | Disposition::Forget => self.record.settled.as_ref(),
        };
        if let Some(settled) = settled {
            (report.state, report.reason) = match settled {
                Settled::Stopped => (ReportState::Stopped, String::new()),
                Settled::Fenced if disposition == Disposition::Stop => (ReportState::Stopped, String::new()),
                Settled::PoweredOff => (ReportState::PoweredOff, "the guest powered itself off".to_owned()),
                Settled::Failed { reason } => (ReportState::Failed, reason.clone()),
                Settled::Fenced => {
                    (ReportState::Fenced, "the host's lease ran out; it may have been given to another host".to_owned())
                }
                Settled::Deleted => (ReportState::Deleted, String::new()),
                Settled::Forgotten => (ReportState::Forgotten, String::new()),
            };
        } else if let Some(problem) = &self.frozen {
            (report.state, report.reason) = (ReportState::Failed, problem.clone());
        } else if let Some(retry) = &self.retry {
            (report.state, report.reason) = (ReportState::Failed, retry.reason.clone());
            report.next_attempt = Some(retry.wall);
        } else if disposition == Disposition::Delete {
            (report.state, report.reason) = (ReportState::Stopped, "its disks are being deleted".to_owned());
        } else {
            report.reason = match self.acceptance {
                Acceptance::Void => "waits for the leader's word".to_owned(),
                Acceptance::Expected(_) | Acceptance::Firm(_) => "waits for the host's lease".to_owned(),
            };
        }
    }
}

fn ending_words(ending: Ending) -> String {
    match ending {
        Ending::Stop => String::new(),
        Ending::Restart => "it is being restarted".to_owned(),
        Ending::PoweredOff => "the guest powered itself off".to_owned(),
        Ending::Panicked => "the guest panicked".to_owned(),
        Ending::Killed => "it is being killed".to_owned(),
    }
}
