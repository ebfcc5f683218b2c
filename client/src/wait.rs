//! When a VM has become what somebody waits for, and when it never will. Pure.

use uncloud_proto::v1::{MigrationResult, PowerState, Vm, VmPhase, VmStatus};

/// What is waited for.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// It runs.
    Running,
    /// It runs, and has been started anew after this moment.
    RunningSince(Option<prost_types::Timestamp>),
    /// It is paused.
    Paused,
    /// It does not run.
    Stopped,
    /// It is gone.
    Gone,
    /// The migration that gives it this incarnation is over.
    Migrated(u64),
}

/// What a VM's state means for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not yet.
    Wait,
    /// That is it.
    Reached,
    /// It will not come to that, and why.
    Hopeless(String),
}

/// Judges a VM as it is now.
#[must_use]
pub fn judge(goal: &Goal, vm: &Vm) -> Verdict {
    match goal {
        Goal::Running => judge_running(vm, |_| true),
        Goal::RunningSince(before) => judge_running(vm, |status| later(status.since.as_ref(), before.as_ref())),
        Goal::Paused if vm.deleting => hopeless("it is being deleted"),
        Goal::Paused if !vm.paused => hopeless("somebody resumed, stopped or restarted it"),
        Goal::Paused => match phase(vm) {
            VmPhase::Paused => Verdict::Reached,
            _ => Verdict::Wait,
        },
        Goal::Stopped if vm.deleting => hopeless("it is being deleted"),
        Goal::Stopped if vm.desired() == PowerState::Running => hopeless("somebody started it"),
        Goal::Stopped => match phase(vm) {
            VmPhase::Stopped => Verdict::Reached,
            // Nothing executes for a VM that has no host.
            VmPhase::Pending if vm.placement.is_none() => Verdict::Reached,
            _ => Verdict::Wait,
        },
        // The watch says when it is gone.
        Goal::Gone => Verdict::Wait,
        Goal::Migrated(incarnation) => judge_migrated(vm, *incarnation),
    }
}

fn judge_running(vm: &Vm, new_enough: impl Fn(&VmStatus) -> bool) -> Verdict {
    if vm.deleting {
        return hopeless("it is being deleted");
    }
    if vm.paused {
        return hopeless("it is paused");
    }
    let Some(status) = &vm.status else { return Verdict::Wait };
    if vm.desired() == PowerState::Stopped {
        return hopeless(if status.reason.is_empty() { "it was stopped" } else { &status.reason });
    }
    // A status of an earlier incarnation says nothing about this one.
    if vm.placement.as_ref().is_some_and(|p| p.incarnation != status.incarnation) {
        return Verdict::Wait;
    }
    match status.phase() {
        VmPhase::Running if new_enough(status) => Verdict::Reached,
        VmPhase::Failed if status.next_attempt.is_none() => {
            hopeless(if status.reason.is_empty() { "it failed" } else { &status.reason })
        }
        _ => Verdict::Wait,
    }
}

/// The VM runs on the target, or is not going there any more.
fn judge_migrated(vm: &Vm, incarnation: u64) -> Verdict {
    let Some(status) = &vm.status else { return Verdict::Wait };
    if status.migration.as_ref().is_some_and(|m| m.incarnation == incarnation) {
        return Verdict::Wait;
    }
    match status.last_migration.as_ref().filter(|end| end.incarnation == incarnation) {
        Some(end) if end.result() == MigrationResult::Done => judge_running(vm, |_| true),
        Some(end) => hopeless(&format!("the migration was given up: {}", end.reason)),
        None => hopeless("the migration is over"),
    }
}

fn later(since: Option<&prost_types::Timestamp>, before: Option<&prost_types::Timestamp>) -> bool {
    let key = |t: &prost_types::Timestamp| (t.seconds, t.nanos);
    match (since, before) {
        (Some(since), Some(before)) => key(since) > key(before),
        (_, None) => true,
        (None, Some(_)) => false,
    }
}

fn phase(vm: &Vm) -> VmPhase {
    vm.status.as_ref().map_or(VmPhase::Unspecified, VmStatus::phase)
}

fn hopeless(why: &str) -> Verdict {
    Verdict::Hopeless(why.to_owned())
}

#[cfg(test)]
mod tests {
    use uncloud_proto::v1::Placement;

    use super::*;

    fn vm(desired: PowerState, phase: VmPhase, status_of: u64) -> Vm {
        Vm {
            desired: desired.into(),
            placement: Some(Placement { incarnation: 2, ..Default::default() }),
            status: Some(VmStatus { phase: phase.into(), incarnation: status_of, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn running_counts_only_for_the_incarnation_that_was_given() {
        assert_eq!(judge(&Goal::Running, &vm(PowerState::Running, VmPhase::Running, 2)), Verdict::Reached);
        assert_eq!(judge(&Goal::Running, &vm(PowerState::Running, VmPhase::Running, 1)), Verdict::Wait);
        assert_eq!(judge(&Goal::Running, &vm(PowerState::Running, VmPhase::Pending, 2)), Verdict::Wait);
    }

    #[test]
    fn a_failure_is_final_only_when_nothing_is_tried_again() {
        let mut failed = vm(PowerState::Running, VmPhase::Failed, 2);
        assert!(matches!(judge(&Goal::Running, &failed), Verdict::Hopeless(_)));
        let status = failed.status.as_mut().unwrap();
        status.next_attempt = Some(prost_types::Timestamp::default());
        assert_eq!(judge(&Goal::Running, &failed), Verdict::Wait);
        // That of an earlier incarnation says nothing.
        assert_eq!(judge(&Goal::Running, &vm(PowerState::Running, VmPhase::Failed, 1)), Verdict::Wait);
    }

    #[test]
    fn what_somebody_else_did_ends_the_wait() {
        let stopped = vm(PowerState::Stopped, VmPhase::Stopped, 2);
        assert!(matches!(judge(&Goal::Running, &stopped), Verdict::Hopeless(_)));
        assert_eq!(judge(&Goal::Stopped, &stopped), Verdict::Reached);
        let started = vm(PowerState::Running, VmPhase::Running, 2);
        assert!(matches!(judge(&Goal::Stopped, &started), Verdict::Hopeless(_)));
        let mut deleted = stopped;
        deleted.deleting = true;
        assert!(matches!(judge(&Goal::Running, &deleted), Verdict::Hopeless(_)));
        assert_eq!(judge(&Goal::Gone, &deleted), Verdict::Wait);
    }

    #[test]
    fn a_pause_is_over_when_the_guest_stands_still() {
        let mut paused = vm(PowerState::Running, VmPhase::Running, 2);
        paused.paused = true;
        assert_eq!(judge(&Goal::Paused, &paused), Verdict::Wait);
        assert!(matches!(judge(&Goal::Running, &paused), Verdict::Hopeless(_)));
        paused.status.as_mut().unwrap().phase = VmPhase::Paused.into();
        assert_eq!(judge(&Goal::Paused, &paused), Verdict::Reached);
        paused.paused = false;
        assert!(matches!(judge(&Goal::Paused, &paused), Verdict::Hopeless(_)), "somebody was faster");
        assert_eq!(judge(&Goal::Running, &paused), Verdict::Wait);
    }

    #[test]
    fn a_restart_is_over_when_it_runs_since_later_than_before() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let mut running = vm(PowerState::Running, VmPhase::Running, 2);
        running.status.as_mut().unwrap().since = at(10);
        assert_eq!(judge(&Goal::RunningSince(at(10)), &running), Verdict::Wait);
        assert_eq!(judge(&Goal::RunningSince(at(9)), &running), Verdict::Reached);
        assert_eq!(judge(&Goal::RunningSince(None), &running), Verdict::Reached);
    }
}
