//! Tests of the state machine: stories, and properties over random histories.

use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::vm::{
    desired::Class,
    fake::{self, desired},
};

fn vm() -> VmId {
    VmId::from_uuid(Uuid::from_u128(7))
}

fn moment(secs: u64, generation: u16, valid: bool) -> Moment {
    Moment {
        now: Tick::from_boot(Duration::from_secs(secs)),
        wall: WallTime(secs * 1000),
        lease: Lease { generation, valid },
    }
}

fn word(desired: Desired, acceptance: Acceptance) -> Event {
    Event::Desired(Box::new(desired), acceptance)
}

fn exit(incarnation: u64, kind: ExitKind) -> Exit {
    Exit { incarnation: Incarnation(incarnation), kind, at: WallTime(5), last_words: "qemu: oops\n".into() }
}

const LAUNCH: Effect = Effect::Launch { incarnation: Incarnation(1), lease_generation: 1 };

/// A VM of incarnation 1 that runs under lease generation 1 since second 10.
fn running() -> VmState {
    let mut state = VmState::new(vm());
    let at = moment(10, 1, true);
    assert_eq!(state.on(word(desired(1), Acceptance::Firm(1)), at), [Effect::Persist, Effect::Prepare]);
    assert_eq!(state.report().state, ReportState::Preparing);
    assert_eq!(state.on(Event::Prepared, at), [Effect::Persist, LAUNCH]);
    assert_eq!(state.report().state, ReportState::Starting);
    assert_eq!(state.on(Event::Started(Incarnation(1), 1), at), []);
    assert_eq!(state.report().state, ReportState::Running);
    assert!(state.report().disks_ready);
    state
}

fn shown(state: &VmState) -> ReportState {
    state.report().state
}

#[test]
fn without_a_valid_lease_nothing_is_even_prepared() {
    let mut state = VmState::new(vm());
    assert_eq!(state.on(word(desired(1), Acceptance::Firm(1)), moment(10, 1, false)), [Effect::Persist]);
    assert_eq!(state.report().reason, "waits for the host's lease");
    assert_eq!(state.on(Event::Wake, moment(11, 1, false)), []);
}

/// P1: the word was accepted, preparing took longer than the lease, and the lease was granted again.
#[test]
fn a_start_that_was_delayed_over_a_lapse_is_fenced() {
    let mut state = VmState::new(vm());
    state.on(word(desired(1), Acceptance::Firm(1)), moment(10, 1, true));
    assert_eq!(state.on(Event::Prepared, moment(20, 2, true)), [Effect::Persist]);
    assert_eq!(shown(&state), ReportState::Fenced);
    // The same incarnation again is not enough, and neither is a restart; a new one is.
    let again = Desired { restarts: 1, ..desired(1) };
    assert!(!state.on(word(again, Acceptance::Firm(2)), moment(21, 2, true)).contains(&Effect::Prepare));
    assert!(state.on(word(desired(2), Acceptance::Firm(2)), moment(22, 2, true)).contains(&Effect::Prepare));
}

/// P1: a word that came while there was no lease counts for the lease that the same session grants, and no other.
#[test]
fn a_word_waits_for_the_lease_of_its_own_session() {
    let mut state = VmState::new(vm());
    state.on(word(desired(1), Acceptance::Expected(1)), moment(10, 0, false));
    let mut granted = state.clone();
    assert_eq!(granted.on(Event::Wake, moment(11, 1, true)), [Effect::Prepare]);
    granted.on(Event::SessionEnded(1), moment(12, 1, true));
    assert_eq!(granted.on(Event::Prepared, moment(13, 1, true)), [Effect::Persist, LAUNCH]);

    state.on(Event::SessionEnded(0), moment(12, 0, false));
    assert_eq!(state.on(Event::Wake, moment(13, 1, true)), [], "void");
    assert_eq!(state.report().reason, "waits for the leader's word");
    assert!(state.on(word(desired(1), Acceptance::Firm(1)), moment(14, 1, true)).contains(&Effect::Prepare));
}

/// The word came before the lease that it was for, the start was put off, and the lease ran out and was granted once more
/// by the same session: no word will come again by itself.
#[test]
fn a_start_that_waits_while_its_lease_goes_and_another_comes_is_fenced() {
    let mut state = VmState::new(vm());
    state.on(word(desired(1), Acceptance::Expected(1)), moment(10, 0, false));
    assert!(state.on(Event::Wake, moment(11, 1, true)).contains(&Effect::Prepare));
    // The second try is made at once, the third after a while.
    for _ in 0..2 {
        state.on(Event::PrepareFailed("no room".into()), moment(11, 1, true));
    }
    assert_eq!(shown(&state), ReportState::Failed);
    state.on(Event::Wake, moment(12, 2, true));
    assert_eq!(shown(&state), ReportState::Fenced);
}

/// V1: a stop in between does not make an incarnation good that may run elsewhere.
#[test]
fn what_was_fenced_and_then_stopped_is_still_fenced() {
    let mut state = VmState::new(vm());
    state.on(word(desired(1), Acceptance::Firm(1)), moment(10, 1, true));
    state.on(Event::Prepared, moment(20, 2, true));
    let at = moment(21, 2, true);
    for disposition in [Disposition::Stop, Disposition::Delete] {
        state.on(word(Desired { disposition, ..desired(1) }, Acceptance::Firm(2)), at);
        assert_eq!(shown(&state), ReportState::Stopped, "{disposition:?}");
        state.on(Event::DeleteFailed("no".into()), at);
        let again = Desired { restarts: 1, ..desired(1) };
        assert!(!state.on(word(again, Acceptance::Firm(2)), at).contains(&Effect::Prepare), "{disposition:?}");
        assert_eq!(shown(&state), ReportState::Fenced, "{disposition:?}");
    }
}

#[test]
fn a_keeper_that_refuses_a_start_makes_it_fenced() {
    let mut state = VmState::new(vm());
    state.on(word(desired(1), Acceptance::Firm(1)), moment(10, 1, true));
    state.on(Event::Prepared, moment(10, 1, true));
    state.on(Event::StartFenced, moment(11, 1, true));
    assert_eq!(shown(&state), ReportState::Fenced);
}

#[test]
fn what_ends_because_the_lease_ran_out_is_fenced_and_what_is_killed_under_it_is_started_again() {
    for (at, fenced) in [(moment(20, 1, false), true), (moment(20, 2, true), true), (moment(20, 1, true), false)] {
        let mut state = running();
        let effects = state.on(Event::Ended(exit(1, ExitKind::KeeperKilled)), at);
        assert_eq!(effects.contains(&Effect::Prepare), !fenced, "{at:?}");
        assert_eq!(shown(&state) == ReportState::Fenced, fenced, "{at:?}");
    }
}

#[test]
fn a_lease_that_is_gone_is_not_left_to_the_keeper_alone() {
    let mut state = running();
    assert_eq!(state.on(Event::Wake, moment(20, 2, true)), [Effect::Kill]);
    assert_eq!(state.on(Event::Wake, moment(21, 2, true)), [], "once is enough");
    assert_eq!(state.on(Event::Wake, moment(26, 2, true)), [Effect::Kill], "for a while");
    assert_eq!(shown(&state), ReportState::Stopping);
}

#[test]
fn failures_are_retried_with_back_off_which_starts_again_after_a_long_run() {
    let mut state = running();
    let mut at = 20;
    for wait in [0, 10, 30, 60, 300, 300] {
        let ended = Event::Ended(exit(1, ExitKind::Exited(1)));
        let mut effects = state.on(ended, moment(at, 1, true));
        if wait > 0 {
            let report = state.report();
            assert_eq!((report.state, report.next_attempt), (ReportState::Failed, Some(WallTime((at + wait) * 1000))));
            assert_eq!(report.reason, "QEMU ended with exit status 1: qemu: oops");
            let now = moment(at, 1, true).now;
            assert_eq!(state.deadline(now), Some(now.after(Duration::from_secs(wait))));
            assert_eq!(state.on(Event::Wake, moment(at + wait - 1, 1, true)), []);
            effects = state.on(Event::Wake, moment(at + wait, 1, true));
        }
        assert!(effects.contains(&Effect::Prepare));
        at += wait;
        state.on(Event::Prepared, moment(at, 1, true));
        state.on(Event::Started(Incarnation(1), 1), moment(at, 1, true));
    }
    let effects = state.on(Event::Ended(exit(1, ExitKind::Signaled(11))), moment(at + 600, 1, true));
    assert!(effects.contains(&Effect::Prepare), "at once, as after the first failure");
}

#[test]
fn a_start_that_fails_is_retried_whatever_the_policy_says() {
    let mut never = desired(1);
    never.spec.as_mut().unwrap().restart = RestartPolicy::Never;
    let mut state = VmState::new(vm());
    let at = moment(10, 1, true);
    state.on(word(never, Acceptance::Firm(1)), at);
    state.on(Event::PrepareFailed("the pool is full".into()), at);
    state.on(Event::Prepared, at);
    state.on(Event::StartFailed("no such machine".into()), at);
    assert_eq!((shown(&state), state.report().reason.as_str()), (ReportState::Failed, "no such machine"));
    state.on(Event::Wake, moment(20, 1, true));
    state.on(Event::Prepared, moment(20, 1, true));
    state.on(Event::Started(Incarnation(1), 1), moment(20, 1, true));
    state.on(Event::Ended(exit(1, ExitKind::Signaled(6))), moment(21, 1, true));
    assert_eq!((shown(&state), state.report().next_attempt), (ReportState::Failed, None));
}

#[test]
fn a_guest_that_powers_off_stays_off_until_a_restart_or_a_new_incarnation() {
    let mut state = running();
    assert_eq!(state.on(Event::GuestShutdown, moment(20, 1, true)), [Effect::Quit]);
    state.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(20, 1, true));
    assert_eq!(shown(&state), ReportState::PoweredOff);
    assert!(!state.on(word(desired(1), Acceptance::Firm(1)), moment(21, 1, true)).contains(&Effect::Prepare));
    let mut restarted = state.clone();
    let again = Desired { restarts: 1, ..desired(1) };
    assert!(restarted.on(word(again, Acceptance::Firm(1)), moment(22, 1, true)).contains(&Effect::Prepare));
    assert_eq!(restarted.report().restarts_done, 1);
    assert!(state.on(word(desired(2), Acceptance::Firm(1)), moment(22, 1, true)).contains(&Effect::Prepare));
}

#[test]
fn a_guest_that_powers_off_under_the_policy_always_comes_back_and_a_panic_is_a_failure() {
    let mut always = desired(1);
    always.spec.as_mut().unwrap().restart = RestartPolicy::Always;
    let mut state = running();
    state.on(word(always, Acceptance::Firm(1)), moment(15, 1, true));
    state.on(Event::GuestShutdown, moment(20, 1, true));
    assert!(state.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(20, 1, true)).contains(&Effect::Prepare));

    let mut state = running();
    assert_eq!(state.on(Event::GuestPanicked, moment(20, 1, true)), [Effect::Quit]);
    assert!(state.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(20, 1, true)).contains(&Effect::Prepare));
    assert_eq!(state.report().last_exit.unwrap().reason, "the guest panicked");
}

#[test]
fn stop_asks_first_and_kills_when_the_grace_is_over() {
    let mut state = running();
    let stop = Desired { disposition: Disposition::Stop, ..desired(1) };
    let effects = state.on(word(stop.clone(), Acceptance::Firm(1)), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::PowerDown]);
    assert_eq!(shown(&state), ReportState::Stopping);
    assert_eq!(state.on(Event::Wake, moment(79, 1, true)), []);
    let mut obedient = state.clone();
    assert_eq!(state.deadline(moment(79, 1, true).now), Some(moment(80, 1, true).now));
    assert_eq!(state.on(Event::Wake, moment(80, 1, true)), [Effect::Kill]);
    state.on(Event::Ended(exit(1, ExitKind::Signaled(9))), moment(80, 1, true));
    assert_eq!(shown(&state), ReportState::Stopped);

    assert_eq!(obedient.on(Event::GuestShutdown, moment(79, 1, true)), [Effect::Quit]);
    obedient.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(79, 1, true));
    assert_eq!(shown(&obedient), ReportState::Stopped);

    let mut state = running();
    let force = Desired { stop_mode: StopMode::Kill, ..stop };
    assert_eq!(state.on(word(force, Acceptance::Firm(1)), moment(20, 1, true)), [Effect::Persist, Effect::Kill]);
}

#[test]
fn a_start_during_a_graceful_stop_lets_the_guest_finish() {
    let mut state = running();
    let stop = Desired { disposition: Disposition::Stop, ..desired(1) };
    state.on(word(stop, Acceptance::Firm(1)), moment(20, 1, true));
    assert_eq!(state.on(word(desired(2), Acceptance::Firm(1)), moment(21, 1, true)), [Effect::Persist]);
    let effects = state.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(25, 1, true));
    assert!(effects.contains(&Effect::Prepare));
}

#[test]
fn an_older_incarnation_is_killed_before_the_new_one_starts() {
    let mut state = running();
    let effects = state.on(word(desired(2), Acceptance::Firm(1)), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::Kill]);
    assert_eq!(state.report().incarnation, Incarnation(1), "what still executes is what is reported");
    let effects = state.on(Event::Ended(exit(1, ExitKind::Signaled(9))), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::Prepare]);
}

#[test]
fn restarts_are_carried_out_once() {
    let mut state = running();
    let reset = Desired { restarts: 1, restart_mode: RestartMode::Reset, ..desired(1) };
    let effects = state.on(word(reset.clone(), Acceptance::Firm(1)), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::Reset]);
    assert_eq!(state.report().restarts_done, 1);
    assert_eq!(state.on(word(reset, Acceptance::Firm(1)), moment(21, 1, true)), []);

    let graceful = Desired { restarts: 2, ..desired(1) };
    let effects = state.on(word(graceful.clone(), Acceptance::Firm(1)), moment(22, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::PowerDown]);
    assert_eq!(state.on(word(graceful, Acceptance::Firm(1)), moment(23, 1, true)), []);
    assert_eq!(state.on(Event::GuestShutdown, moment(24, 1, true)), [Effect::Quit]);
    assert!(state.on(Event::Ended(exit(1, ExitKind::Exited(0))), moment(24, 1, true)).contains(&Effect::Prepare));
    assert_eq!(state.report().restarts_done, 2);
}

/// P5.
#[test]
fn disks_go_only_after_the_vm_and_only_when_the_leader_says_delete() {
    let mut state = running();
    let delete = Desired { disposition: Disposition::Delete, ..desired(1) };
    let effects = state.on(word(delete, Acceptance::Firm(1)), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::Kill]);
    let effects = state.on(Event::Ended(exit(1, ExitKind::Signaled(9))), moment(20, 1, true));
    assert_eq!(effects, [Effect::Persist, Effect::DeleteDisks]);
    state.on(Event::DeleteFailed("busy".into()), moment(21, 1, true));
    assert_eq!(state.on(Event::DisksDeleted, moment(22, 1, true)), [Effect::Persist]);
    assert_eq!(shown(&state), ReportState::Deleted);
    assert!(state.is_over());

    let mut state = running();
    let forget = Desired { disposition: Disposition::Forget, spec: None, ..desired(2) };
    assert_eq!(state.on(word(forget, Acceptance::Firm(1)), moment(20, 1, true)), [Effect::Persist, Effect::Kill]);
    assert_eq!(state.on(Event::Ended(exit(1, ExitKind::Signaled(9))), moment(20, 1, true)), [Effect::Persist]);
    assert!(shown(&state) == ReportState::Forgotten && state.is_over());
}

/// V3.
#[test]
fn an_unreadable_record_forbids_everything_but_stopping() {
    let mut state = VmState::unreadable(vm(), "garbage".into());
    let at = moment(10, 1, true);
    assert_eq!(shown(&state), ReportState::Starting, "it may be executing");
    let mut idle = state.clone();
    idle.on(Event::NotFound(None), at);
    for disposition in [Disposition::Run, Disposition::Delete] {
        assert_eq!(idle.on(word(Desired { disposition, ..desired(3) }, Acceptance::Firm(1)), at), []);
        assert_eq!((shown(&idle), idle.report().reason), (ReportState::Failed, "garbage".to_owned()));
    }
    assert_eq!(
        state.on(Event::Started(Incarnation(2), 9), at),
        [],
        "its class is not known, so it is left to its keeper"
    );
    assert_eq!((shown(&state), state.report().incarnation), (ReportState::Running, Incarnation(2)));
    let forget = Desired { disposition: Disposition::Forget, spec: None, ..desired(3) };
    assert_eq!(state.on(word(forget, Acceptance::Firm(1)), at), [Effect::Kill]);
    assert_eq!(state.on(Event::Ended(exit(2, ExitKind::Signaled(9))), at), []);
    assert_eq!(shown(&state), ReportState::Forgotten);
}

#[test]
fn after_a_restart_of_the_agent_what_executes_goes_on_and_nothing_starts_without_the_leader() {
    let record = running().record().clone();
    let at = moment(100, 1, true);
    let mut found = VmState::from_record(record.clone());
    assert_eq!((shown(&found), found.report().incarnation), (ReportState::Starting, Incarnation(1)));
    assert_eq!(found.on(Event::Started(Incarnation(1), 1), at), [], "not even the record changes");
    assert_eq!((shown(&found), found.report().since), (ReportState::Running, WallTime(10_000)));

    let mut crashed = VmState::from_record(record.clone());
    crashed.on(Event::NotFound(Some(exit(1, ExitKind::Signaled(11)))), at);
    assert_eq!(shown(&crashed), ReportState::Failed);
    assert_eq!(crashed.on(Event::Wake, moment(200, 1, true)), []);
    assert!(crashed.on(word(desired(1), Acceptance::Firm(1)), moment(201, 1, true)).contains(&Effect::Prepare));

    // After a reboot: the lease has another generation.
    let mut rebooted = VmState::from_record(record);
    rebooted.on(Event::NotFound(None), moment(5, 2, false));
    assert_eq!(shown(&rebooted), ReportState::Fenced);
}

#[test]
fn a_held_vm_knows_no_lease() {
    let mut held = desired(1);
    held.spec.as_mut().unwrap().class = Class::Hold;
    let mut state = VmState::new(vm());
    assert!(state.on(word(held, Acceptance::Firm(0)), moment(10, 0, true)).contains(&Effect::Prepare));
}

#[test]
fn what_could_not_be_written_is_not_done() {
    let mut state = VmState::new(vm());
    let at = moment(10, 1, true);
    assert_eq!(state.on(word(desired(1), Acceptance::Firm(1)), at), [Effect::Persist, Effect::Prepare]);
    let full = || Event::PersistFailed("disk full".into(), Skipped::Work);
    assert_eq!(state.on(full(), at), [Effect::Persist, Effect::Prepare]);
    assert_eq!(state.on(full(), at), []);
    assert_eq!((shown(&state), state.report().reason.as_str()), (ReportState::Failed, "disk full"));
    assert_eq!(state.on(Event::Wake, moment(20, 1, true)), [Effect::Persist, Effect::Prepare]);
}

/// P1: found by the simulation (seed 139). The stop could not be written while QEMU was being started; the start was taken for
/// one that had not been begun, so the VM was reported stopped and ran.
#[test]
fn a_launch_goes_on_although_what_came_after_it_could_not_be_written() {
    let mut state = VmState::new(vm());
    let at = moment(10, 1, true);
    state.on(word(desired(1), Acceptance::Firm(1)), at);
    assert!(
        state.on(Event::Prepared, at).contains(&Effect::Launch { incarnation: Incarnation(1), lease_generation: 1 })
    );
    let stop = Desired { disposition: Disposition::Stop, ..desired(1) };
    let effects = state.on(word(stop, Acceptance::Firm(1)), at);
    assert_eq!(effects, [Effect::Persist]);
    assert_eq!(state.on(Event::PersistFailed("disk full".into(), Skipped::of(&effects)), at), []);
    assert_eq!(shown(&state), ReportState::Starting);
    assert!(state.on(Event::Started(Incarnation(1), 1), at).contains(&Effect::PowerDown));
    assert_eq!(shown(&state), ReportState::Stopping);
}

#[test]
fn a_vm_that_another_keeper_holds_is_looked_for() {
    let mut state = VmState::new(vm());
    let at = moment(10, 1, true);
    state.on(word(desired(1), Acceptance::Firm(1)), at);
    state.on(Event::Prepared, at);
    assert_eq!(state.on(Event::StartBusy, at), [Effect::Adopt]);
    state.on(Event::Started(Incarnation(1), 1), at);
    assert_eq!(shown(&state), ReportState::Running);
}

/// P3: the record was moved away, as docs/operations.md says, and the VM was restarted by its user some day.
#[test]
fn a_vm_whose_record_is_lost_is_not_restarted_for_that() {
    let restarted = |n| Desired { restarts: n, ..fake::desired(1) };
    let word = |n| Event::Desired(Box::new(restarted(n)), Acceptance::Firm(1));
    let mut state = VmState::without_record(VmId::from_uuid(Uuid::from_u128(7)));
    state.on(Event::Started(Incarnation(1), 1), moment(0, 1, true));
    let effects = state.on(word(3), moment(1, 1, true));
    assert!(!effects.contains(&Effect::PowerDown) && !effects.contains(&Effect::Reset), "{effects:?}");
    assert_eq!(state.report().restarts_done, 3);
    // One that is asked for now is carried out.
    let executes = Standing {
        guest: crate::vm::migration::Guest::Executes,
        transfer: crate::vm::migration::Transfer::None,
        address: None,
        disks_address: None,
        mirror: crate::vm::migration::Mirror::None,
        progress: crate::vm::migration::Progress::default(),
        problem: String::new(),
    };
    let effects = state.on(Event::Stands(Some(Box::new(executes))), moment(2, 1, true));
    assert!(!effects.contains(&Effect::PowerDown), "{effects:?}");
    assert!(state.on(word(4), moment(3, 1, true)).contains(&Effect::PowerDown));
}

/// V1: found by the histories below.
#[test]
fn what_was_fenced_is_not_started_by_a_stop_and_a_restart_after_it_was_deleted() {
    let said = |disposition, restarts| word(Desired { disposition, restarts, ..desired(1) }, Acceptance::Firm(1));
    let at = moment(10, 1, true);
    for gone in [Disposition::Delete, Disposition::Forget] {
        let mut state = VmState::new(vm());
        state.on(said(Disposition::Run, 0), at);
        assert_eq!(state.on(Event::Prepared, at), [Effect::Persist, LAUNCH]);
        state.on(Event::StartFenced, at);
        assert_eq!(shown(&state), ReportState::Fenced);
        state.on(said(gone, 0), at);
        state.on(Event::DisksDeleted, at);
        state.on(said(Disposition::Stop, 0), at);
        let effects = state.on(said(Disposition::Run, 1), at);
        assert!(!effects.contains(&Effect::Prepare), "{gone:?}: {effects:?}");
    }
}

/// What the environment is asked to do, and has not answered.
#[derive(Default, Debug)]
struct Environment {
    preparing: bool,
    launching: Option<(Incarnation, u16)>,
    deleting: bool,
    looking: bool,
    executing: Option<(Incarnation, u16)>,
}

#[derive(Clone, Debug)]
enum Step {
    Desire { bump: u64, disposition: Disposition, restarts: u64, reset: bool, force: bool },
    Lapse,
    Renew,
    SessionEnd,
    Pass(u64),
    Answer(bool),
    GuestDown,
    Die,
    Unwritable,
    Restart,
}

fn any_step() -> impl Strategy<Value = Step> {
    let disposition = prop_oneof![
        6 => Just(Disposition::Run),
        2 => Just(Disposition::Stop),
        1 => Just(Disposition::Delete),
        1 => Just(Disposition::Forget),
    ];
    prop_oneof![
        6 => (0u64..2, disposition, 0u64..3, any::<bool>(), any::<bool>())
            .prop_map(|(bump, disposition, restarts, reset, force)| Step::Desire { bump, disposition, restarts, reset, force }),
        1 => Just(Step::Lapse),
        2 => Just(Step::Renew),
        1 => Just(Step::SessionEnd),
        3 => (0u64..90).prop_map(Step::Pass),
        8 => any::<bool>().prop_map(Step::Answer),
        1 => Just(Step::GuestDown),
        1 => Just(Step::Die),
        1 => Just(Step::Unwritable),
        1 => Just(Step::Restart),
    ]
}

/// Drives a machine in an environment that may do anything, and checks the invariants after every step.
struct Driver {
    state: VmState,
    env: Environment,
    lease: Lease,
    secs: u64,
    /// Generation under which the newest word came, if it was valid then; or the one that its session would grant.
    word_generation: Option<u16>,
    fenced: Option<Incarnation>,
    /// Of the newest event.
    newest: Vec<Effect>,
}

impl Driver {
    fn at(&self) -> Moment {
        moment(self.secs, self.lease.generation, self.lease.valid)
    }

    fn event(&mut self, event: Event) -> Result<(), TestCaseError> {
        let before = self.state.record().clone();
        let effects = self.state.on(event, self.at());
        self.newest.clone_from(&effects);
        let now = self.state.record().clone();
        // V2
        prop_assert_eq!(effects.iter().skip(1).filter(|e| **e == Effect::Persist).count(), 0);
        prop_assert!(before == now || effects.first() == Some(&Effect::Persist));
        for effect in &effects {
            match *effect {
                Effect::Prepare => {
                    prop_assert!(self.env.executing.is_none() && self.lease.valid);
                    self.env.preparing = true;
                }
                Effect::CancelPrepare => self.env.preparing = false,
                Effect::Launch { incarnation, lease_generation } => {
                    // P1
                    prop_assert!(self.env.executing.is_none() && self.env.launching.is_none() && !self.env.looking);
                    prop_assert!(self.lease.valid && lease_generation == self.lease.generation);
                    prop_assert_eq!(Some(lease_generation), self.word_generation);
                    prop_assert_eq!(now.desired.disposition, Disposition::Run);
                    prop_assert_eq!(incarnation, now.desired.incarnation);
                    // V1
                    prop_assert!(self.fenced != Some(incarnation));
                    self.env.launching = Some((incarnation, lease_generation));
                }
                Effect::DeleteDisks => {
                    // P5
                    prop_assert!(self.env.executing.is_none() && self.env.launching.is_none());
                    prop_assert_eq!(now.desired.disposition, Disposition::Delete);
                    self.env.deleting = true;
                }
                Effect::Adopt => self.env.looking = true,
                Effect::Persist | Effect::PowerDown | Effect::Reset | Effect::Quit | Effect::Kill => {}
                Effect::TendIdle { .. } | Effect::CancelTend => prop_assert!(false, "nothing is ordered"),
                Effect::TendDisks | Effect::GoOn => prop_assert!(self.env.executing.is_some()),
                // Of migrations, none of which is begun here: `migrate_tests.rs`.
                Effect::Look => {}
                Effect::Listen
                | Effect::Send
                | Effect::SendMemory
                | Effect::Continue
                | Effect::Cancel
                | Effect::Resume
                | Effect::Pause => {
                    prop_assert!(false, "nothing migrates, and yet {effect:?}");
                }
            }
        }
        if now.settled == Some(Settled::Fenced) {
            self.fenced = Some(now.desired.incarnation);
        }
        let again = self.state.clone().on(Event::Wake, self.at());
        prop_assert!(again.is_empty(), "plan again: nothing to do, but {:?}", again);
        // Whatever executes is reported as executing.
        let states = [ReportState::Starting, ReportState::Running, ReportState::Stopping];
        let reported = states.contains(&self.state.report().state);
        prop_assert!(reported || (self.env.executing.is_none() && self.env.launching.is_none()));
        Ok(())
    }

    fn answer(&mut self, good: bool) -> Result<(), TestCaseError> {
        if std::mem::take(&mut self.env.preparing) {
            self.event(if good { Event::Prepared } else { Event::PrepareFailed("no".into()) })?;
        } else if let Some((incarnation, generation)) = self.env.launching.take() {
            if good {
                self.env.executing = Some((incarnation, generation));
                self.event(Event::Started(incarnation, generation))?;
            } else {
                self.event(if self.secs.is_multiple_of(2) {
                    Event::StartFailed("no".into())
                } else {
                    Event::StartFenced
                })?;
            }
        } else if std::mem::take(&mut self.env.deleting) {
            self.event(if good { Event::DisksDeleted } else { Event::DeleteFailed("no".into()) })?;
        } else if std::mem::take(&mut self.env.looking) {
            match self.env.executing {
                Some((incarnation, generation)) => self.event(Event::Started(incarnation, generation))?,
                None => self.event(Event::NotFound(None))?,
            }
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Desire { bump, disposition, restarts, reset, force } => {
                let newest = self.state.record().desired.incarnation.0.max(1);
                let word_ = Desired {
                    disposition,
                    restarts,
                    restart_mode: if reset { RestartMode::Reset } else { RestartMode::Graceful },
                    stop_mode: if force { StopMode::Kill } else { StopMode::Graceful },
                    ..fake::desired(newest + bump)
                };
                let acceptance = if self.lease.valid {
                    Acceptance::Firm(self.lease.generation)
                } else {
                    Acceptance::Expected(self.lease.generation + 1)
                };
                self.word_generation =
                    Some(if self.lease.valid { self.lease.generation } else { self.lease.generation + 1 });
                self.event(word(word_, acceptance))
            }
            Step::Lapse => {
                self.lease.valid = false;
                // The keeper does its work.
                if let Some((incarnation, _)) = self.env.executing.take_if(|_| !self.env.looking) {
                    self.event(Event::Ended(exit(incarnation.0, ExitKind::KeeperKilled)))?;
                }
                Ok(())
            }
            Step::Renew => {
                if !self.lease.valid {
                    self.lease = Lease { generation: self.lease.generation + 1, valid: true };
                    self.event(Event::Wake)?;
                }
                Ok(())
            }
            Step::SessionEnd => {
                if self.word_generation.is_some_and(|g| g > self.lease.generation) {
                    self.word_generation = None;
                }
                self.event(Event::SessionEnded(self.lease.generation))
            }
            Step::Pass(secs) => {
                self.secs += secs;
                self.event(Event::Wake)
            }
            Step::Answer(good) => self.answer(good),
            Step::GuestDown => self.event(Event::GuestShutdown),
            Step::Die => match self.env.executing.take_if(|_| !self.env.looking) {
                Some((incarnation, _)) => self.event(Event::Ended(exit(incarnation.0, ExitKind::Signaled(11)))),
                None => Ok(()),
            },
            Step::Unwritable => {
                // Of the newest effects, which are what could not be written for.
                if self.newest.first() != Some(&Effect::Persist) {
                    return Ok(());
                }
                let skipped = Skipped::of(&self.newest);
                if skipped == Skipped::Work {
                    self.env.launching = None;
                    (self.env.preparing, self.env.deleting) = (false, false);
                }
                self.event(Event::PersistFailed("no".into(), skipped))
            }
            Step::Restart => {
                // A launch that was under way may have come about.
                let record = self.state.record().clone();
                if let Some(launch) = self.env.launching.take()
                    && self.secs.is_multiple_of(2)
                {
                    self.env.executing = Some(launch);
                }
                self.env = Environment { looking: true, executing: self.env.executing, ..Environment::default() };
                self.state = VmState::from_record(record);
                self.word_generation = None;
                Ok(())
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn the_invariants_hold_over_every_history(steps in prop::collection::vec(any_step(), 1..80)) {
        let lease = Lease { generation: 1, valid: true };
        let state = VmState::new(vm());
        let mut driver =
            Driver { state, env: Environment::default(), lease, secs: 10, word_generation: None, fenced: None, newest: vec![] };
        for step in steps {
            driver.step(step)?;
        }
    }
}
