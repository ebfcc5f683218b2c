//! The disks of a VM that is there: when they are made as they should be. Pure.
//!
//! What does not execute has its disks grown before it starts, and its snapshots taken, removed and put back while it is stopped. What
//! executes is told when the desired state has changed, and
//! once after it was found again, because nobody knows what an agent before this one has done. Telling it twice does no harm.
//!
//! While a VM migrates its disks are left alone: the target has read them, and must find what it has read. They are put in order
//! where it goes on.
//!
//! # Invariants
//!
//! * **R1**, **R2** (controller/src/state/snapshots.rs) Disks are put back only while the leader says STOP with that very revert, nothing
//!   executes, and the lease that the word was accepted under is valid: so never after the guest has run again, here or elsewhere.
//! * What is done to disks that nobody has open ends with that lease, or with a word for a newer incarnation.

use std::time::Duration;

use uncloud_proto::clock::Tick;

use super::{Acceptance, Effect, Moment, Role, Settled, VmState, Work};
use crate::vm::{
    desired::{Desired, Disk},
    disks::{Done, Orders, Wanted as There},
};

/// How long to wait before QEMU is told again what it did not do.
const AGAIN: Duration = Duration::from_secs(10);

/// How the disks of what executes stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tended {
    /// What QEMU was last told, and did.
    done: Wanted,
    /// What it was last told.
    told: Wanted,
    /// When it is told again, if it did not do it.
    again_at: Option<Tick>,
    /// Why it did not. Empty: it did.
    pub(super) trouble: String,
}

/// What the disks should be like. Nothing, for a VM without disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    disks: Vec<Disk>,
    orders: Orders,
}

impl Wanted {
    fn of(desired: &Desired) -> Self {
        let disks = desired.spec.iter().flat_map(|s| &s.disks);
        Self { disks: disks.cloned().collect(), orders: desired.orders.clone() }
    }
}

impl Tended {
    /// When something is to be done again.
    pub(super) fn deadline(&self) -> Option<Tick> {
        self.again_at
    }
}

impl VmState {
    /// Has QEMU put the disks in order, if they may not be.
    pub(super) fn tend_disks(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let Some(x) = &mut self.execution else { return };
        let ours = x.incarnation == self.record.desired.incarnation && x.role == Role::Executes && x.ending.is_none();
        if !ours || self.frozen.is_some() {
            return;
        }
        let wanted = Wanted::of(&self.record.desired);
        if x.disks.done == wanted {
            x.disks.again_at = None;
            x.disks.trouble.clear();
            return;
        }
        let due = x.disks.again_at.is_none_or(|again| at.now >= again);
        if x.disks.told == wanted && !due {
            return;
        }
        x.disks.told = wanted;
        x.disks.again_at = Some(at.now.after(AGAIN));
        effects.push(Effect::TendDisks);
    }

    /// Has disks put in order that nobody has open.
    pub(super) fn tend_idle(&mut self, at: Moment, effects: &mut Vec<Effect>) {
        let orders = &self.record.desired.orders;
        let done = orders.ids(There::There).all(|id| self.idle.done.made.contains(&id))
            && orders.ids(There::Gone).all(|id| self.idle.done.removed.contains(&id))
            && orders.disks.iter().all(|order| self.idle.done.disks.contains(order))
            && orders.revert.is_none_or(|r| r.number == self.idle.done.reverted);
        if done || self.frozen.is_some() {
            self.idle.again_at = None;
            self.idle.trouble.clear();
            return;
        }
        let current = at.lease.generation;
        match self.acceptance {
            Acceptance::Firm(g) | Acceptance::Expected(g) if g == current && at.lease.valid => {}
            // The lease that the word was for is on its way.
            Acceptance::Expected(g) if current.wrapping_add(1) == g => return,
            // As for a start: no word would ever come for this incarnation, so the leader must know.
            Acceptance::Firm(g) | Acceptance::Expected(g) if g != current && orders.revert.is_some() => {
                return self.record.settled = Some(Settled::Fenced);
            }
            Acceptance::Void | Acceptance::Firm(_) | Acceptance::Expected(_) => return,
        }
        if self.idle.again_at.is_some_and(|again| at.now < again) {
            return;
        }
        self.idle.again_at = None;
        self.work = Work::Tending;
        effects.push(Effect::TendIdle { lease_generation: current });
    }

    /// What was last ordered is done.
    pub(super) fn disks_tended(&mut self, done: Done) {
        match &mut self.execution {
            Some(x) => x.disks.done = x.disks.told.clone(),
            None if self.work == Work::Tending => self.work = Work::None,
            // V4
            None => return,
        }
        self.idle.done = done;
    }

    /// It is not. It is tried again.
    pub(super) fn tend_failed(&mut self, reason: String, at: Moment) {
        let again = at.now.after(AGAIN);
        match &mut self.execution {
            Some(x) => {
                x.disks.again_at = Some(again);
                x.disks.trouble = reason;
            }
            None if self.work == Work::Tending => {
                self.work = Work::None;
                self.idle.again_at = Some(again);
                self.idle.trouble = reason;
            }
            None => {}
        }
    }

    /// What was done, of what is ordered now.
    pub(super) fn disks_done(&self) -> Done {
        let (orders, done) = (&self.record.desired.orders, &self.idle.done);
        Done {
            made: orders.ids(There::There).filter(|id| done.made.contains(id)).collect(),
            guests: orders.ids(There::There).filter_map(|id| Some((id, *done.guests.get(&id)?))).collect(),
            removed: orders.ids(There::Gone).filter(|id| done.removed.contains(id)).collect(),
            disks: orders.disks.iter().filter(|order| done.disks.contains(order)).copied().collect(),
            reverted: orders.revert.filter(|r| r.number == done.reverted).map_or(0, |r| r.number),
            holds: done.holds.clone(),
        }
    }

    /// Why a stopped VM is not at rest yet. Empty: it is.
    pub(super) fn disk_words(&self) -> String {
        match (&self.idle.trouble, self.work) {
            (trouble, _) if !trouble.is_empty() => trouble.clone(),
            (_, Work::Tending) if self.record.desired.orders.revert.is_some() => {
                "its disks are being put back".to_owned()
            }
            (_, Work::None | Work::Looking | Work::Preparing | Work::Launching) => String::new(),
            (_, Work::Deleting | Work::Sweeping | Work::Tending) => String::new(),
        }
    }
}

/// What was done to the disks of a VM, whether it executed or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Idle {
    done: Done,
    /// When it is tried again.
    again_at: Option<Tick>,
    /// Why it was not done. Empty: it was.
    trouble: String,
}

impl Idle {
    /// When something is to be done again.
    pub(super) fn deadline(&self) -> Option<Tick> {
        self.again_at
    }
}

#[cfg(test)]
mod tests {
    use uncloud_proto::{
        clock::WallTime,
        ids::{Incarnation, VmId},
    };
    use uuid::Uuid;

    use super::*;
    use crate::vm::{
        desired::{DiskState, Disposition, StopMode},
        disks::{Revert, SnapshotOrder},
        fake,
        hypervisor::{Exit, ExitKind},
        state::{Event, Lease, ReportState, Skipped},
    };

    fn at(secs: u64) -> Moment {
        let lease = Lease { generation: 1, valid: true };
        Moment { now: Tick::from_boot(Duration::from_secs(secs)), wall: WallTime(secs * 1000), lease }
    }

    fn with_disk(size_bytes: u64) -> Desired {
        let mut desired = fake::desired(1);
        desired.spec.as_mut().unwrap().disks =
            vec![Disk { name: "disk0".into(), pool: "p".into(), size_bytes, ..Disk::default() }];
        desired
    }

    fn word(desired: Desired) -> Event {
        Event::Desired(Box::new(desired), Acceptance::Firm(1))
    }

    fn running() -> VmState {
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        state.on(word(with_disk(512)), at(10));
        state.on(Event::Prepared, at(10));
        assert_eq!(state.on(Event::Started(Incarnation(1), 1), at(10)), [Effect::TendDisks], "nobody knows");
        state.on(Event::DisksTended(Done::default()), at(10));
        assert_eq!(state.on(Event::Wake, at(11)), []);
        state
    }

    #[test]
    fn a_disk_that_should_be_larger_is_made_so_at_once_and_once() {
        let mut state = running();
        assert_eq!(state.on(word(with_disk(1024)), at(20)), [Effect::Persist, Effect::TendDisks]);
        assert_eq!(state.on(Event::DisksTended(Done::default()), at(20)), []);
        assert_eq!(state.on(word(with_disk(1024)), at(21)), []);
        assert_eq!(state.deadline(at(21).now), None);
    }

    #[test]
    fn what_qemu_did_not_do_is_shown_and_tried_again() {
        let mut state = running();
        state.on(word(with_disk(1024)), at(20));
        assert_eq!(state.on(Event::TendFailed("no room".into()), at(20)), []);
        let report = state.report();
        assert_eq!((report.state, report.reason.as_str()), (ReportState::Running, "no room"));
        assert_eq!(state.deadline(at(20).now), Some(at(30).now));
        assert_eq!(state.on(Event::Wake, at(29)), []);
        assert_eq!(state.on(Event::Wake, at(30)), [Effect::TendDisks]);
        state.on(Event::DisksTended(Done::default()), at(30));
        assert_eq!(state.report().reason, "");
        assert_eq!(state.deadline(at(30).now), None);
    }

    fn with_revert(incarnation: u64, number: u64) -> Desired {
        let revert = Some(Revert { snapshot: Uuid::from_u128(1), number });
        Desired {
            disposition: Disposition::Stop,
            stop_mode: StopMode::Kill,
            orders: Orders { revert, ..Orders::default() },
            incarnation: Incarnation(incarnation),
            ..with_disk(512)
        }
    }

    fn exit() -> Event {
        let (kind, at) = (ExitKind::Signaled(9), WallTime(1));
        Event::Ended(Exit { incarnation: Incarnation(1), kind, at, last_words: String::new() })
    }

    /// R1, R2
    #[test]
    fn disks_are_put_back_once_when_the_guest_is_dead_and_not_after_it_ran_again() {
        let mut state = running();
        assert_eq!(state.on(word(with_revert(1, 1)), at(20)), [Effect::Persist, Effect::Kill]);
        assert_eq!(state.report().disks, Done::default());
        let put_back = Effect::TendIdle { lease_generation: 1 };
        assert_eq!(state.on(exit(), at(21)), [Effect::Persist, put_back]);
        assert_eq!(state.report().reason, "its disks are being put back");
        let done = state.record().desired.orders.done();
        state.on(Event::DisksTended(done), at(22));
        assert_eq!((state.report().state, state.report().disks.reverted), (ReportState::Stopped, 1));
        assert!(!state.on(word(with_revert(1, 1)), at(23)).contains(&put_back), "not again");
        // The leader takes it out, and it starts.
        let run = Desired { incarnation: Incarnation(2), ..with_disk(512) };
        assert!(state.on(word(run), at(24)).contains(&Effect::Prepare));
        assert_eq!(state.report().disks.reverted, 0);
    }

    /// R2, R3
    #[test]
    fn disks_are_put_back_only_under_the_lease_that_the_word_came_with() {
        let later = |generation| Moment { lease: Lease { generation, valid: true }, ..at(30) };
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let tends = |effects: Vec<Effect>| effects.iter().any(|e| matches!(e, Effect::TendIdle { .. }));
        // An agent that was started again waits for the leader's word.
        assert!(!tends(state.on(Event::Desired(Box::new(with_revert(1, 1)), Acceptance::Void), at(20))));
        assert!(!tends(state.on(Event::Wake, at(21))));
        assert!(tends(state.on(word(with_revert(1, 1)), at(22))));
        // Given up with the word for another incarnation.
        assert!(state.on(word(with_revert(2, 1)), at(23)).contains(&Effect::CancelTend));
        state.on(Event::TendFailed("no".into()), at(24));
        assert!(!tends(state.on(Event::Wake, later(2))), "the lease of another time");
        assert_eq!(state.report().state, ReportState::Fenced);

        // A word that waits for a lease, which ran out before this was looked at.
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let lapsed = Moment { lease: Lease { generation: 1, valid: false }, ..at(20) };
        assert!(!tends(state.on(Event::Desired(Box::new(with_revert(1, 1)), Acceptance::Expected(2)), lapsed)));
        assert_ne!(state.report().state, ReportState::Fenced, "it is on its way");
        assert!(!tends(state.on(Event::Wake, later(3))));
        assert_eq!(state.report().state, ReportState::Fenced, "the leader must say it anew");
    }

    #[test]
    fn snapshots_of_what_is_stopped_are_taken_and_tried_again() {
        let id = Uuid::from_u128(5);
        let snapshots = vec![SnapshotOrder { id, wanted: There::There }];
        let stop = Desired {
            disposition: Disposition::Stop,
            orders: Orders { snapshots, ..Orders::default() },
            ..with_disk(512)
        };
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let take = Effect::TendIdle { lease_generation: 1 };
        assert_eq!(state.on(word(stop.clone()), at(20)), [Effect::Persist, take]);
        assert_eq!(state.on(Event::TendFailed("no room".into()), at(20)), []);
        assert_eq!((state.report().reason.as_str(), state.deadline(at(20).now)), ("no room", Some(at(30).now)));
        assert_eq!(state.on(Event::Wake, at(30)), [take]);
        state.on(Event::DisksTended(stop.orders.done()), at(30));
        assert_eq!(state.report().disks.made, [id]);
        assert_eq!(state.on(Event::Wake, at(60)), []);
    }

    /// D1: what is done is said by its number, whether the VM runs or not, and never of another one.
    #[test]
    fn a_disk_comes_and_goes_while_it_runs_and_while_it_does_not() {
        let with_order = |state, order: u64| {
            let mut desired = with_disk(512);
            desired.spec.as_mut().unwrap().disks[0].state = state;
            desired.orders.disks = vec![order];
            desired
        };
        let mut state = running();
        let attach = with_order(DiskState::Attaching, 1);
        assert_eq!(state.on(word(attach.clone()), at(20)), [Effect::Persist, Effect::TendDisks]);
        assert_eq!(state.report().disks, Done::default());
        state.on(Event::TendFailed("the pool is full".into()), at(20));
        assert_eq!(state.on(Event::Wake, at(30)), [Effect::TendDisks]);
        state.on(Event::DisksTended(attach.orders.done()), at(30));
        assert_eq!(state.report().disks.disks, [1]);
        let detach = with_order(DiskState::Detaching, 2);
        assert_eq!(state.on(word(detach.clone()), at(31)), [Effect::Persist, Effect::TendDisks]);
        assert_eq!(state.report().disks.disks, [] as [u64; 0], "the first is not the second");

        let stop = Desired { disposition: Disposition::Stop, ..detach };
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let tend = Effect::TendIdle { lease_generation: 1 };
        assert_eq!(state.on(word(stop.clone()), at(40)), [Effect::Persist, tend]);
        state.on(Event::DisksTended(stop.orders.done()), at(41));
        assert_eq!(state.report().disks.disks, [2]);
        assert_eq!(state.on(Event::Wake, at(60)), [], "nothing is left to do");
    }

    /// Without a wait the task would come back to it at once, for as long as the state directory is full.
    #[test]
    fn what_could_not_be_written_down_is_not_tried_again_at_once() {
        let snapshots = vec![SnapshotOrder { id: Uuid::from_u128(5), wanted: There::There }];
        let stop = Desired {
            disposition: Disposition::Stop,
            orders: Orders { snapshots, ..Orders::default() },
            ..with_disk(512)
        };
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        let take = Effect::TendIdle { lease_generation: 1 };
        let effects = state.on(word(stop), at(20));
        assert!(effects.contains(&take), "{effects:?}");
        let failed = Event::PersistFailed("no space left on device".into(), Skipped::of(&effects));
        assert!(!state.on(failed, at(20)).contains(&take));
        assert_eq!(state.deadline(at(20).now), Some(at(30).now));
        assert!(state.on(Event::Wake, at(30)).contains(&take));
    }

    /// Found by the simulation: what was due long ago, and is not wanted any more, hid what was due later.
    #[test]
    fn a_deletion_that_failed_is_tried_again_though_something_else_had_failed_before() {
        let snapshots = vec![SnapshotOrder { id: Uuid::from_u128(5), wanted: There::There }];
        let orders = Orders { snapshots, ..Orders::default() };
        let stop = Desired { disposition: Disposition::Stop, orders, ..with_disk(512) };
        let mut state = VmState::new(VmId::from_uuid(Uuid::from_u128(7)));
        state.on(word(stop.clone()), at(20));
        state.on(Event::TendFailed("no space left on device".into()), at(20));
        let delete = Desired { disposition: Disposition::Delete, ..stop };
        assert!(state.on(word(delete), at(40)).contains(&Effect::DeleteDisks));
        let failed = || Event::DeleteFailed("no space left on device".into());
        assert!(state.on(failed(), at(40)).contains(&Effect::DeleteDisks), "the first time at once");
        for now in [41, 80, 400] {
            state.on(failed(), at(now));
            let due = state.deadline(at(now).now).expect("it is tried again");
            let due = Moment { now: due, ..at(now) };
            assert!(state.on(Event::Wake, due).contains(&Effect::DeleteDisks));
        }
    }

    /// The target has read the disk: it must not change below it.
    #[test]
    fn a_disk_grows_only_when_the_migration_is_over() {
        let mut state = running();
        let to = crate::vm::migration::MigrateTo {
            incarnation: Incarnation(2),
            address: "127.0.0.1:1".parse().unwrap(),
            secret: "0".repeat(64),
            bytes_per_second: 0,
            disks: None,
        };
        let moving = Desired { migrate_to: Some(to), ..with_disk(1024) };
        assert!(!state.on(word(moving), at(20)).contains(&Effect::TendDisks));
        assert!(!state.on(Event::Wake, at(21)).contains(&Effect::TendDisks));
    }
}
