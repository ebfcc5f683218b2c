//! What to do when a call failed: try again, where and when, or give up. Pure: no clock, no randomness, no gRPC.
//!
//! A call that changes something must not be carried out twice because an answer was lost. So a failure has a
//! [`Fate`]: a controller that was never reached, or that said "I do not lead", has done nothing, and every call may
//! be tried again. Where the answer was lost nobody knows, and only a call that is [`Safety::Repeatable`] may.
//!
//! # Invariants
//!
//! * **R1** A call with [`Safety::Once`] is never sent again after [`Fate::Lost`].
//! * **R2** A definite answer ([`Fate::Refused`]) is never argued with.
//! * **R3** No retry begins after the time that the caller allowed.

use std::time::Duration;

/// First pause. Short, because the usual cause is a leader that changes, and the next controller may know it already.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause. Larger means that a cluster that is back is noticed late; smaller loads one that struggles.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Hints that are followed at once. More in a row than this means that controllers point at each other.
const HINTS_AT_ONCE: u32 = 2;

/// Whether a call may be made twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Safety {
    /// It reads, or it carries a `request_id`, or it names a state that is to be reached.
    Repeatable,
    /// Twice is not the same as once.
    Once,
}

/// What is known about a call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A definite answer. The same call would get the same one.
    Refused,
    /// Surely not carried out: nobody was reached, or the one reached does not lead.
    NotTaken {
        /// Who leads, if the answer said so.
        leader: Option<String>,
    },
    /// Nobody knows whether it was carried out.
    Lost,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Report the failure.
    GiveUp,
    /// Try again.
    Retry {
        /// After this long.
        after: Duration,
        /// Where.
        at: Target,
    },
}

/// Where to try again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// At the controller that was named as the leader.
    Leader(String),
    /// At the next controller that is configured.
    Next,
}

/// Decides about one failure.
///
/// `failures` counts the failures of this call, this one included. `left` is what is left of the caller's time.
/// `roll` is a random number from 0 to 1, which keeps many clients from coming back at the same moment.
#[must_use]
pub fn decide(safety: Safety, fate: &Fate, failures: u32, left: Duration, roll: f64) -> Decision {
    let leader = match (fate, safety) {
        (Fate::Refused, _) | (Fate::Lost, Safety::Once) => return Decision::GiveUp,
        (Fate::NotTaken { leader }, _) => leader.as_ref(),
        (Fate::Lost, Safety::Repeatable) => None,
    };
    let after = if leader.is_some() && failures <= HINTS_AT_ONCE { Duration::ZERO } else { pause(failures, roll) };
    if after >= left {
        return Decision::GiveUp;
    }
    let at = leader.map_or(Target::Next, |leader| Target::Leader(leader.clone()));
    Decision::Retry { after, at }
}

/// The pause after so many failures in a row: doubling up to a limit, between half and all of it at random.
#[must_use]
pub fn pause(failures: u32, roll: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let full = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
    full.mul_f64(0.5 + 0.5 * roll.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn hint(to: &str) -> Fate {
        Fate::NotTaken { leader: Some(to.to_owned()) }
    }

    #[test]
    fn r1_what_must_happen_once_is_not_repeated_when_its_answer_was_lost() {
        for failures in 1..20 {
            assert_eq!(decide(Safety::Once, &Fate::Lost, failures, LONG, 0.5), Decision::GiveUp);
        }
        assert!(matches!(
            decide(Safety::Repeatable, &Fate::Lost, 1, LONG, 0.5),
            Decision::Retry { at: Target::Next, .. }
        ));
    }

    #[test]
    fn what_was_surely_not_taken_may_always_be_tried_again() {
        for safety in [Safety::Once, Safety::Repeatable] {
            let decision = decide(safety, &Fate::NotTaken { leader: None }, 1, LONG, 0.5);
            assert!(matches!(decision, Decision::Retry { at: Target::Next, .. }), "{decision:?}");
        }
    }

    #[test]
    fn r2_a_definite_answer_is_final() {
        for safety in [Safety::Once, Safety::Repeatable] {
            assert_eq!(decide(safety, &Fate::Refused, 1, LONG, 0.5), Decision::GiveUp);
        }
    }

    #[test]
    fn r3_no_retry_begins_after_the_time_that_was_allowed() {
        for failures in 1..40 {
            for left in [0, 1, 10, 100, 1000, 5000].map(Duration::from_millis) {
                for fate in [Fate::Lost, hint("a:1")] {
                    match decide(Safety::Repeatable, &fate, failures, left, 1.0) {
                        Decision::GiveUp => {}
                        Decision::Retry { after, .. } => assert!(after < left),
                    }
                }
            }
        }
    }

    #[test]
    fn a_hint_is_followed_at_once_but_not_in_circles() {
        let at = Target::Leader("b:1".to_owned());
        for failures in [1, 2] {
            let now = Decision::Retry { after: Duration::ZERO, at: at.clone() };
            assert_eq!(decide(Safety::Once, &hint("b:1"), failures, LONG, 0.0), now);
        }
        let Decision::Retry { after, .. } = decide(Safety::Once, &hint("b:1"), 3, LONG, 0.0) else { panic!() };
        assert!(after > Duration::ZERO);
    }

    #[test]
    fn pauses_grow_to_a_limit_and_are_spread() {
        let mut last = Duration::ZERO;
        for failures in 1..100 {
            let (low, high) = (pause(failures, 0.0), pause(failures, 1.0));
            assert!(low <= high && high <= LONGEST_PAUSE && high >= last);
            assert_eq!(low, high / 2);
            last = high;
        }
        assert_eq!(last, LONGEST_PAUSE);
    }
}
