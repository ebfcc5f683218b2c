//! Which hosts the user had drained, when, and how: with `--stop-and-move` a guest there may be stopped and started elsewhere,
//! with anything else it may not. Pure; kept by the [`user`](super::user), asked by the [`run`](super::run).

use std::time::{Duration, Instant};

/// For how long after the end of a drain a guest may be killed for it: it was told to stop just before, and has 10 s for that
/// (`specs::micro`); what is started then may wait for a leader.
const AFTERWARDS: Duration = Duration::from_secs(20);

/// How a host is drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Guests migrate, or stay.
    LiveOnly,
    /// Guests that cannot migrate are stopped and started elsewhere.
    StopAndMove,
}

/// A drain that may have begun.
#[derive(Clone, Debug)]
struct Drain {
    host: String,
    how: How,
    asked: Instant,
    /// When its end was acknowledged. Never, where its own outcome is unknown: the call may still be on its way.
    ended: Option<Instant>,
    is_sure: bool,
}

/// All drains of a run.
#[derive(Clone, Debug, Default)]
pub struct Drains {
    all: Vec<Drain>,
    called_off: u64,
}

impl Drains {
    /// The user is about to ask for one.
    pub fn asked(&mut self, host: &str, how: How, now: Instant) {
        self.all.push(Drain { host: host.to_owned(), how, asked: now, ended: None, is_sure: true });
    }

    /// The newest one was refused: there is none.
    pub fn refused(&mut self) {
        self.all.pop();
    }

    /// What became of the newest one is not known.
    pub fn unknown(&mut self) {
        if let Some(drain) = self.all.last_mut() {
            drain.is_sure = false;
        }
    }

    /// That a host takes VMs again was acknowledged.
    pub fn uncordoned(&mut self, host: &str, now: Instant) {
        for drain in self.all.iter_mut().filter(|d| d.host == host && d.is_sure && d.ended.is_none()) {
            drain.ended = Some(now);
            self.called_off += 1;
        }
    }

    /// Whether a guest that had a QEMU on this host until `last_seen` may have been stopped for a drain at some time since `since`.
    #[must_use]
    pub fn may_stop(&self, host: &str, last_seen: Instant, since: Instant) -> bool {
        self.all.iter().any(|d| {
            d.how == How::StopAndMove
                && d.host == host
                && last_seen >= d.asked.max(since)
                && d.ended.is_none_or(|ended| ended + AFTERWARDS >= since && last_seen <= ended + AFTERWARDS)
        })
    }

    /// How many were begun without and with `--stop-and-move`, and how many were ended by uncordoning.
    #[must_use]
    pub fn counts(&self) -> (u64, u64, u64) {
        let of = |how| self.all.iter().filter(|d| d.how == how).count() as u64;
        (of(How::LiveOnly), of(How::StopAndMove), self.called_off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn only_a_drain_that_may_stop_guests_excuses_one_that_was_there() {
        let t = Instant::now();
        let mut drains = Drains::default();
        drains.asked("host-1", How::LiveOnly, at(t, 1));
        drains.asked("host-2", How::StopAndMove, at(t, 10));
        assert!(!drains.may_stop("host-1", at(t, 12), at(t, 5)), "it may not stop anything");
        assert!(drains.may_stop("host-2", at(t, 12), at(t, 5)));
        assert!(!drains.may_stop("host-2", at(t, 9), at(t, 5)), "the guest was gone before");
        assert!(!drains.may_stop("host-3", at(t, 12), at(t, 5)), "another host");
        drains.uncordoned("host-2", at(t, 14));
        assert!(drains.may_stop("host-2", at(t, 20), at(t, 15)), "it was told to stop before");
        assert!(!drains.may_stop("host-2", at(t, 35), at(t, 15)), "long after");
        assert!(!drains.may_stop("host-2", at(t, 60), at(t, 50)), "long after");
        assert_eq!(drains.counts(), (1, 1, 1));
    }

    #[test]
    fn one_that_may_still_be_on_its_way_is_never_over_and_one_that_was_refused_never_was() {
        let t = Instant::now();
        let mut drains = Drains::default();
        drains.asked("host-1", How::StopAndMove, t);
        drains.unknown();
        drains.uncordoned("host-1", at(t, 5));
        assert!(drains.may_stop("host-1", at(t, 90), at(t, 80)));
        drains.asked("host-2", How::StopAndMove, t);
        drains.refused();
        assert!(!drains.may_stop("host-2", at(t, 2), at(t, 1)));
        assert_eq!(drains.counts(), (0, 1, 0));
    }
}
