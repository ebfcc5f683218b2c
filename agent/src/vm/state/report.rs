//! What a VM's state looks like to the leader. Pure.

use std::net::SocketAddr;

use uncloud_proto::{clock::WallTime, ids::Incarnation};

use super::{Acceptance, Disposition, Ending, Execution, VmState, Work, migrate::Phase};
use crate::{
    records::{LastExit, Role, Settled},
    vm::{
        disks::Done,
        migration::{Guest, Progress},
    },
};

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
    /// Addresses of the guest, as it has said.
    pub addresses: Vec<String>,
    /// How the migration goes that it is part of.
    pub migration: Option<MigrationReport>,
    /// The guest stands still, as its user wants.
    pub paused: bool,
    /// What was done to its disks.
    pub disks: Done,
}

/// How a migration goes, by one of its sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationReport {
    /// Which one: the incarnation on its target.
    pub incarnation: Incarnation,
    /// Where the target listens.
    pub address: Option<SocketAddr>,
    /// How much the source has sent.
    pub progress: Progress,
    /// Why it failed. Empty: it has not.
    pub failure: String,
    /// Where the target takes disks.
    pub disks_address: Option<SocketAddr>,
    /// The target: how many disks are copied to it. The source: how many were, up to the guest's last write, when it was sent.
    pub disks: usize,
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
    /// QEMU waits for a guest from another host.
    Incoming,
    /// QEMU has a guest from another host and holds it still.
    Received,
    /// The guest was sent to another host and stands still here.
    HandedOver,
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
            addresses: self.execution.as_ref().map(|x| x.addresses.clone()).unwrap_or_default(),
            migration: None,
            paused: self.is_paused(),
            disks: self.disks_done(),
        };
        if let Some(x) = &self.execution {
            if x.role == Role::Incoming {
                report_incoming(x, self.record.desired.disks_to_copy().copied.len(), &mut report);
                return report;
            }
            let order = self.record.desired.migrate_to.as_ref().map(|m| m.incarnation);
            // S3: what has been sent stands still, also while it is being killed.
            let moving = self.record.moving.filter(|m| match x.ending {
                None => order == Some(*m) || x.is_sent(),
                Some(Ending::Killed) => x.is_sent(),
                Some(Ending::Stop | Ending::Restart | Ending::PoweredOff | Ending::Panicked) => false,
            });
            if let Some(incarnation) = moving {
                let progress = x.standing.as_ref().map(|s| s.progress).unwrap_or_default();
                let phase = self.phase();
                let failure = x.send_failure(phase);
                let disks = match phase {
                    // M6
                    Phase::Memory { disks } if x.is_sent() => disks,
                    Phase::Disks { .. } | Phase::Memory { .. } => 0,
                };
                let (address, disks_address) = (None, None);
                report.migration =
                    Some(MigrationReport { incarnation, address, progress, failure, disks_address, disks });
                // M3: what is told to go on has no standing until it has been asked again.
                if x.is_sent() {
                    report.state = ReportState::HandedOver;
                    return report;
                }
            }
            (report.state, report.reason) = match x.ending {
                None => (ReportState::Running, self.frozen.clone().unwrap_or_else(|| x.suffers())),
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
        let disposition = self.record.desired.disposition;
        match (self.work, &self.record.launched) {
            // Nothing that executes.
            (Work::Launching, Some(launched)) if launched.role == Role::Incoming => return,
            (Work::Looking, Some(launched)) if launched.role == Role::Incoming && self.frozen.is_none() => return,
            (Work::Launching, _) => return report.state = ReportState::Starting,
            // Until it has been looked at, it counts as executing: the leader must not give it away meanwhile.
            (Work::Looking, launched) if self.frozen.is_some() || launched.is_some() => {
                report.incarnation = launched.map_or(report.incarnation, |l| l.incarnation);
                report.state = ReportState::Starting;
                "the agent was started and looks whether it still executes".clone_into(&mut report.reason);
                return;
            }
            (Work::Preparing, _) => return report.reason.clone_from(&self.progress),
            (Work::None | Work::Looking | Work::Deleting | Work::Sweeping | Work::Tending, _) => {}
        }
        let settled = match disposition {
            // On the way to its end it does not matter how it came to rest before.
            Disposition::Delete => self.record.settled.as_ref().filter(|s| **s == Settled::Deleted),
            Disposition::Run | Disposition::Stop | Disposition::Forget | Disposition::Incoming => {
                self.record.settled.as_ref()
            }
        };
        if let Some(settled) = settled {
            (report.state, report.reason) = match settled {
                Settled::Stopped => (ReportState::Stopped, self.disk_words()),
                // While its disks are to be put back the leader waits for a word, and there will be none.
                Settled::Fenced if disposition == Disposition::Stop && self.record.desired.orders.revert.is_none() => {
                    (ReportState::Stopped, String::new())
                }
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

/// The target of a migration. Nothing of it has ever executed, so nothing that says so is reported.
fn report_incoming(x: &Execution, copied: usize, report: &mut Report) {
    let Some(standing) = x.standing.as_ref().filter(|_| x.ending.is_none()) else { return };
    let migration = MigrationReport {
        incarnation: x.incarnation,
        address: standing.address,
        progress: Progress::default(),
        failure: String::new(),
        disks_address: standing.disks_address,
        disks: standing.disks_address.map_or(0, |_| copied),
    };
    report.state = match standing.guest {
        Guest::Awaited if standing.address.is_some() => ReportState::Incoming,
        Guest::Awaited => return,
        Guest::Executes | Guest::Sent | Guest::Still | Guest::Off | Guest::Panicked => ReportState::Received,
    };
    report.migration = Some(migration);
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
