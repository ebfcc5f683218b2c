//! What a session has stored: reports and notes, handed to the writer in pieces that fit its transactions.

use futures_util::future::{self, BoxFuture};
use tracing::warn;
use uncloud_proto::{ids::HostId, v1};

use super::parse::Reported;
use crate::{
    leadership::{Turn, WriteError, Writer},
    report,
    state::{MAX_REPORTS, command::Command},
};

/// What is to be stored.
#[derive(Debug)]
pub(crate) struct Job {
    /// The newest report of each VM.
    pub(crate) reports: Vec<Reported>,
    /// Anything else.
    pub(crate) commands: Vec<Command>,
}

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct JobResult {
    /// Reports that are stored.
    pub(crate) acks: Vec<v1::ReportAckEntry>,
    /// Reports that there was no room for.
    pub(crate) reports_again: Vec<Reported>,
    /// Commands that there was no room for.
    pub(crate) commands_again: Vec<Command>,
    /// Why not all is stored, unless it was refused.
    pub(crate) failed: Option<WriteError>,
}

/// Stores it. What the state refuses is logged and dropped: it would be refused again.
pub(crate) async fn run(writer: &Writer, host: HostId, job: Job) -> JobResult {
    let mut result = JobResult::default();
    let pieces: Vec<Vec<Reported>> = {
        let mut reports = job.reports.into_iter().peekable();
        std::iter::from_fn(|| reports.peek().is_some().then(|| reports.by_ref().take(MAX_REPORTS).collect())).collect()
    };
    // All at once: the writer puts as many into one transaction as fit.
    let reports = pieces.into_iter().map(|piece| async move {
        let reports = piece.iter().map(|r| r.seen.clone()).collect();
        (writer.submit_in_turn(Turn::Report, Command::Report { host, reports }).await.map(drop), piece)
    });
    let commands = job
        .commands
        .into_iter()
        .map(|command| async move { (writer.submit_in_turn(Turn::Report, command.clone()).await.map(drop), command) });
    let (reports, commands) = future::join(future::join_all(reports), future::join_all(commands)).await;
    for (outcome, piece) in reports {
        match outcome {
            Ok(()) => result.acks.extend(piece.iter().map(ack)),
            Err(WriteError::Refused(refusal)) => warn!("reports are not stored: {}", report(&refusal)),
            Err(error) => {
                result.failed = Some(worse(result.failed, error));
                result.reports_again.extend(piece);
            }
        }
    }
    for (outcome, command) in commands {
        match outcome {
            Ok(()) => {}
            Err(WriteError::Refused(refusal)) => warn!("not stored: {}", report(&refusal)),
            Err(error) => {
                result.failed = Some(worse(result.failed, error));
                result.commands_again.push(command);
            }
        }
    }
    result
}

/// Of two failures, the one that ends the session.
fn worse(a: Option<WriteError>, b: WriteError) -> WriteError {
    match a {
        Some(a) if !a.is_temporary() => a,
        Some(_) | None => b,
    }
}

fn ack(report: &Reported) -> v1::ReportAckEntry {
    v1::ReportAckEntry { vm_id: report.seen.vm.to_string(), sequence: report.sequence }
}

/// Waits for the job under way; for ever if there is none. Cancel safe.
pub(crate) async fn finished(job: &mut Option<BoxFuture<'_, JobResult>>) -> JobResult {
    match job {
        Some(running) => {
            let result = running.await;
            *job = None;
            result
        }
        None => future::pending().await,
    }
}
