//! Which controller to dial next, after what wait, and how long to wait for its Welcome. Pure.

use std::{collections::BTreeSet, time::Duration};

/// Shortest and longest wait between two dials. The longest is a small part of the short lease, because what a host that
/// lost its leader has left of it after the election of the next one is little.
const SHORTEST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_millis(700);
/// So many hints are followed at once. Two controllers that name each other must not keep an agent spinning.
const HINTS_AT_ONCE: u32 = 2;
/// After a controller refused this host for good, so long until it is asked again.
const AFTER_REFUSAL: Duration = Duration::from_secs(5);
/// How long a controller may take to answer `Hello`. The leader stores the host first, after a takeover it has many of them, and one that
/// comes again has waited for nothing.
const WELCOME: Duration = Duration::from_secs(4);
/// So often that is doubled, once for each `Hello` that was not answered in time: a leader that cannot keep up is not asked more.
const DOUBLED: u32 = 2;
/// So many controllers are named as not reached.
const UNREACHED: usize = 8;

/// How a session ended, as far as the next dial is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The leader took the session, and it ended later.
    Served,
    /// The leader took the session, and then it hung or was cut off: another one leads soon.
    Silent,
    /// This controller does not lead; perhaps it knows who does.
    NotLeader(Option<String>),
    /// It could not be reached.
    Unreachable,
    /// It took the Hello, and did not answer it in time.
    Unanswered,
    /// The leader is there, and does not take the session now.
    Deferred,
    /// It wants nothing to do with this host as it is.
    Refused,
}

/// What is known about controllers.
#[derive(Debug)]
pub struct Dialer {
    known: Vec<String>,
    current: usize,
    hint: Option<String>,
    hints_followed: u32,
    failures: u32,
    refused: bool,
    unanswered: u32,
    /// The session of now has had its Welcome.
    served: bool,
    /// The controller that led until now.
    lost: Option<String>,
    /// Controllers that were not reached since the last Welcome, and have said nothing since.
    unreached: BTreeSet<String>,
}

impl Dialer {
    /// With the configured addresses, at least one.
    #[must_use]
    pub fn new(addresses: Vec<String>) -> Self {
        Self {
            known: addresses,
            current: 0,
            hint: None,
            hints_followed: 0,
            failures: 0,
            refused: false,
            unanswered: 0,
            served: false,
            lost: None,
            unreached: BTreeSet::new(),
        }
    }

    /// The address to dial now.
    #[must_use]
    pub fn address(&self) -> &str {
        self.hint.as_deref().unwrap_or_else(|| &self.known[self.current % self.known.len()])
    }

    /// Controllers where no leader was found: [`uncloud_proto::UNREACHED_METADATA_KEY`]. Empty: none.
    #[must_use]
    pub fn unreached(&self) -> String {
        let lost = self.lost.iter().filter(|lost| !self.unreached.contains(*lost));
        lost.chain(&self.unreached).map(String::as_str).collect::<Vec<_>>().join(",")
    }

    /// How long the next controller may take to answer `Hello`.
    #[must_use]
    pub fn patience(&self) -> Duration {
        WELCOME * (1 << self.unanswered.min(DOUBLED))
    }

    /// The leader took the session; these are all controllers, as it says.
    pub fn welcomed(&mut self, controllers: &[String]) {
        let address = self.address().to_owned();
        for controller in controllers.iter().chain([&address]) {
            if !controller.is_empty() && !self.known.contains(controller) {
                self.known.push(controller.clone());
            }
        }
        self.current = self.known.iter().position(|a| *a == address).unwrap_or(0);
        (self.hint, self.hints_followed, self.failures, self.refused) = (None, 0, 0, false);
        (self.unanswered, self.served, self.lost) = (0, true, None);
        self.unreached.clear();
    }

    /// A session, or the attempt at one, ended.
    pub fn ended(&mut self, outcome: Outcome) {
        let address = self.address().to_owned();
        self.hint = None;
        self.refused = outcome == Outcome::Refused;
        if std::mem::take(&mut self.served) {
            self.lost = Some(address.clone());
        }
        match outcome {
            Outcome::Served | Outcome::Silent | Outcome::Unreachable => {
                if self.unreached.len() < UNREACHED {
                    self.unreached.insert(address);
                }
            }
            // It may lead, or be elected.
            Outcome::NotLeader(_) | Outcome::Unanswered => drop(self.unreached.remove(&address)),
            // It leads.
            Outcome::Deferred | Outcome::Refused => {
                self.unreached.remove(&address);
                self.lost.take_if(|lost| *lost == address);
            }
        }
        match outcome {
            // Perhaps it is back in a moment; if not, the next failure goes on to the others.
            Outcome::Served => self.failures = 1,
            Outcome::NotLeader(Some(leader)) if !leader.is_empty() && self.hints_followed < HINTS_AT_ONCE => {
                self.hints_followed += 1;
                self.hint = Some(leader);
            }
            Outcome::NotLeader(_)
            | Outcome::Silent
            | Outcome::Unreachable
            | Outcome::Unanswered
            | Outcome::Deferred
            | Outcome::Refused => {
                self.unanswered += u32::from(outcome == Outcome::Unanswered && self.unanswered < DOUBLED);
                self.failures = self.failures.saturating_add(1);
                self.hints_followed = 0;
                // Also after a hint that led nowhere: who gave it would give it again, and the others would never be asked.
                self.current = (self.current + 1) % self.known.len();
            }
        }
    }

    /// How long to wait before the next dial. `random` is in 0..1: agents must not come back in step.
    #[must_use]
    pub fn wait(&self, random: f64) -> Duration {
        if self.hint.is_some() || self.failures == 0 {
            return Duration::ZERO;
        }
        let longest =
            if self.refused { AFTER_REFUSAL } else { SHORTEST.saturating_mul(1 << self.failures.min(8)).min(LONGEST) };
        SHORTEST + (longest - SHORTEST).mul_f64(random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dialer() -> Dialer {
        Dialer::new(vec!["a:1".into(), "b:1".into()])
    }

    #[test]
    fn a_hint_is_followed_at_once_but_not_for_ever() {
        let mut dialer = dialer();
        assert_eq!((dialer.address(), dialer.wait(0.5)), ("a:1", Duration::ZERO));
        dialer.ended(Outcome::NotLeader(Some("c:1".into())));
        assert_eq!((dialer.address(), dialer.wait(0.5)), ("c:1", Duration::ZERO));
        dialer.ended(Outcome::NotLeader(Some("d:1".into())));
        assert_eq!((dialer.address(), dialer.wait(0.5)), ("d:1", Duration::ZERO));
        dialer.ended(Outcome::NotLeader(Some("c:1".into())));
        assert_eq!(dialer.address(), "b:1");
        assert!(dialer.wait(0.0) >= SHORTEST);
    }

    #[test]
    fn a_controller_that_names_a_leader_that_is_gone_does_not_keep_an_agent_from_the_others() {
        let mut dialer = dialer();
        dialer.ended(Outcome::NotLeader(Some("gone:1".into())));
        assert_eq!(dialer.address(), "gone:1");
        dialer.ended(Outcome::Unreachable);
        assert_eq!(dialer.address(), "b:1");
    }

    #[test]
    fn the_leader_is_dialled_again_before_the_others() {
        let mut dialer = dialer();
        dialer.ended(Outcome::Unreachable);
        assert_eq!(dialer.address(), "b:1");
        dialer.welcomed(&["b:1".into(), "c:1".into()]);
        dialer.ended(Outcome::Served);
        assert_eq!(dialer.address(), "b:1");
        dialer.ended(Outcome::Unreachable);
        assert_eq!(dialer.address(), "c:1", "which the leader named");
        dialer.ended(Outcome::Unreachable);
        assert_eq!(dialer.address(), "a:1");
    }

    #[test]
    fn a_leader_that_fell_silent_is_dialled_after_the_others() {
        let mut dialer = dialer();
        dialer.welcomed(&["a:1".into(), "b:1".into()]);
        dialer.ended(Outcome::Silent);
        assert_eq!(dialer.address(), "b:1");
        dialer.ended(Outcome::Unreachable);
        assert_eq!(dialer.address(), "a:1");
    }

    #[test]
    fn controllers_are_told_which_of_them_were_lost_until_one_leads() {
        let mut dialer = dialer();
        assert_eq!(dialer.unreached(), "");
        dialer.ended(Outcome::NotLeader(Some("c:1".into())));
        assert_eq!(dialer.unreached(), "", "it was reached");
        dialer.welcomed(&["a:1".into(), "b:1".into(), "c:1".into()]);
        dialer.ended(Outcome::Served);
        dialer.ended(Outcome::Unreachable);
        assert_eq!((dialer.address(), dialer.unreached().as_str()), ("a:1", "c:1"));
        dialer.ended(Outcome::Unreachable);
        assert_eq!((dialer.address(), dialer.unreached().as_str()), ("b:1", "a:1,c:1"));
        dialer.ended(Outcome::NotLeader(None));
        assert_eq!(dialer.unreached(), "a:1,c:1", "b:1 is there");
        dialer.ended(Outcome::Deferred);
        assert_eq!((dialer.address(), dialer.unreached().as_str()), ("a:1", "a:1"), "c:1 leads again");
        dialer.ended(Outcome::NotLeader(None));
        assert_eq!((dialer.address(), dialer.unreached().as_str()), ("b:1", ""), "a:1 is there, too");
        dialer.welcomed(&[]);
        dialer.ended(Outcome::NotLeader(None));
        assert_eq!(dialer.unreached(), "b:1", "it led until now, and says itself that it does not any more");
        dialer.ended(Outcome::NotLeader(None));
        dialer.ended(Outcome::NotLeader(None));
        dialer.ended(Outcome::NotLeader(None));
        assert_eq!(dialer.unreached(), "b:1", "until somebody does");
        dialer.welcomed(&[]);
        assert_eq!(dialer.unreached(), "");
        for n in 0..100 {
            dialer.ended(Outcome::NotLeader(Some(format!("{n}:1"))));
            dialer.ended(Outcome::Unreachable);
        }
        assert_eq!(dialer.unreached().split(',').count(), UNREACHED + 1);
    }

    #[test]
    fn a_leader_that_does_not_keep_up_is_given_more_time_each_time() {
        let mut dialer = dialer();
        let mut patience = Vec::new();
        for _ in 0..5 {
            patience.push(dialer.patience().as_secs());
            dialer.ended(Outcome::Unanswered);
        }
        assert_eq!(patience, [4, 8, 16, 16, 16]);
        dialer.welcomed(&[]);
        assert_eq!(dialer.patience(), WELCOME);
    }

    proptest! {
        #[test]
        fn waits_stay_within_their_bounds_and_everybody_is_tried(random in 0.0f64..1.0, hints in prop::collection::vec(any::<bool>(), 40)) {
            let mut dialer = dialer();
            let mut tried = std::collections::BTreeSet::new();
            for hint in hints {
                tried.insert(dialer.address().to_owned());
                dialer.ended(if hint { Outcome::NotLeader(Some("z:1".into())) } else { Outcome::Unreachable });
                let wait = dialer.wait(random);
                prop_assert!(wait.is_zero() == dialer.hint.is_some());
                prop_assert!(wait <= LONGEST);
            }
            prop_assert!(tried.contains("a:1") && tried.contains("b:1"));
        }
    }
}
