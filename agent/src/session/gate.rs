//! The one place where the leader's messages are checked for age, before anything handles them. Pure.
//!
//! # Invariants
//!
//! * **G1** Nothing of a term older than the newest that was seen is obeyed (P1: a leader that was replaced may not
//!   know it yet).
//! * **G2** No desired state with an incarnation older than the newest that was seen for its VM is obeyed.
//! * **G3** A newer term is on disk before anything of it is obeyed: [`Admission::Newer`] says so.

use std::collections::BTreeMap;

use uncloud_proto::ids::{Incarnation, Term, VmId};

/// What has been seen.
#[derive(Debug)]
pub struct Gate {
    newest_term: Term,
    incarnations: BTreeMap<VmId, Incarnation>,
}

/// A message of this term may be handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Go on.
    Same,
    /// Write this term to disk first, then call [`Gate::term_stored`] and go on.
    Newer(Term),
}

/// A message of a leader that has been replaced. The session is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the message is of term {found}, and a leader of term {newest} has been heard")]
pub struct StaleTerm {
    /// Its term.
    pub found: Term,
    /// The newest.
    pub newest: Term,
}

/// A desired state that is older than what is known. It is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("incarnation {found} is older than {newest}")]
pub struct StaleIncarnation {
    /// Its incarnation.
    pub found: Incarnation,
    /// The newest.
    pub newest: Incarnation,
}

impl Gate {
    /// With what the records say.
    #[must_use]
    pub fn new(newest_term: Term, incarnations: BTreeMap<VmId, Incarnation>) -> Self {
        Self { newest_term, incarnations }
    }

    /// The newest term that was seen.
    #[must_use]
    pub fn newest_term(&self) -> Term {
        self.newest_term
    }

    /// Checks the term of a message.
    ///
    /// # Errors
    ///
    /// It is older than the newest (G1).
    pub fn term(&self, found: Term) -> Result<Admission, StaleTerm> {
        match found.cmp(&self.newest_term) {
            std::cmp::Ordering::Less => Err(StaleTerm { found, newest: self.newest_term }),
            std::cmp::Ordering::Equal => Ok(Admission::Same),
            std::cmp::Ordering::Greater => Ok(Admission::Newer(found)),
        }
    }

    /// The term is on disk (G3).
    pub fn term_stored(&mut self, term: Term) {
        self.newest_term = self.newest_term.max(term);
    }

    /// Checks the incarnation of a desired state, and remembers it. The VM's task has it on disk before it acts.
    ///
    /// # Errors
    ///
    /// It is older than the newest (G2).
    pub fn incarnation(&mut self, vm: VmId, found: Incarnation) -> Result<(), StaleIncarnation> {
        let newest = self.incarnations.entry(vm).or_default();
        if found < *newest {
            return Err(StaleIncarnation { found, newest: *newest });
        }
        *newest = found;
        Ok(())
    }

    /// The VM is deleted or forgotten, and the leader knows it.
    pub fn over(&mut self, vm: VmId) {
        self.incarnations.remove(&vm);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    proptest! {
        /// G1, G3: what passes is never older than anything that was stored before.
        #[test]
        fn terms_that_pass_never_go_back(terms in prop::collection::vec(0i64..6, 0..64)) {
            let mut gate = Gate::new(Term(1), BTreeMap::new());
            let mut newest = Term(1);
            for term in terms.into_iter().map(Term) {
                match gate.term(term) {
                    Ok(Admission::Same) => prop_assert_eq!(term, newest),
                    Ok(Admission::Newer(t)) => {
                        prop_assert!(t == term && t > newest);
                        prop_assert_eq!(gate.newest_term(), newest, "not before it is stored");
                        gate.term_stored(t);
                        newest = t;
                    }
                    Err(stale) => prop_assert!(term < newest && stale.newest == newest),
                }
            }
        }

        /// G2: for each VM by itself.
        #[test]
        fn incarnations_that_pass_never_go_back(steps in prop::collection::vec((0u128..3, 0u64..6), 0..64)) {
            let vm = |n| VmId::from_uuid(Uuid::from_u128(n));
            let mut newest: BTreeMap<VmId, Incarnation> = [(vm(0), Incarnation(2))].into();
            let mut gate = Gate::new(Term(0), newest.clone());
            for (n, i) in steps {
                let known = newest.entry(vm(n)).or_default();
                let passed = gate.incarnation(vm(n), Incarnation(i)).is_ok();
                prop_assert_eq!(passed, Incarnation(i) >= *known);
                *known = (*known).max(Incarnation(i));
            }
        }
    }
}
