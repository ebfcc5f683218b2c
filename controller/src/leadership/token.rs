//! Proof that this process created the leader key.

use uncloud_proto::ids::Term;

/// Every write to the store asks for one, so code that forgot about leadership does not compile. The store compares
/// the leader key's create revision with the term in each transaction (T2).
///
/// Deliberately not `Clone`: the writer of the term owns it.
#[derive(Debug)]
pub struct LeaderToken {
    term: Term,
}

impl LeaderToken {
    /// Only `campaign.rs` makes one, when etcd says that the key was created.
    pub(super) const fn new(term: Term) -> Self {
        Self { term }
    }

    /// The term.
    #[must_use]
    pub const fn term(&self) -> Term {
        self.term
    }
}
