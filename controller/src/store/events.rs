//! How many events are kept. Each goes by an etcd lease after a week; of a busy cluster's the oldest go before.

use etcd_client::{GetOptions, SortOrder, SortTarget, Txn, TxnOp};
use uncloud_proto::ids::Term;

use super::{CommitError, LOAD_TIMEOUT, MAX_OPERATIONS, REQUEST_TIMEOUT, Store, kv, txn::leads};
use crate::model::keys::EVENTS;

impl Store {
    /// Deletes the oldest events when there are more than `keep` and `slack`, until `keep` are left, and `at_once` at the most. Returns how
    /// many went. They are no part of the state, so what the writer decides meanwhile does not rest on them.
    ///
    /// # Errors
    ///
    /// When etcd does not answer, or `term` is over. Some may have gone.
    pub async fn trim_events(
        &self,
        term: Term,
        keep: usize,
        slack: usize,
        at_once: usize,
    ) -> Result<usize, CommitError> {
        let count = GetOptions::new().with_prefix().with_count_only();
        let too_many = |count: i64| usize::try_from(count).unwrap_or(0).saturating_sub(keep);
        let counted = too_many(self.events(count).await?.count());
        if counted <= slack {
            return Ok(0);
        }
        let oldest = GetOptions::new()
            .with_prefix()
            .with_keys_only()
            .with_sort(SortTarget::Mod, SortOrder::Ascend)
            .with_limit(i64::try_from(counted.min(at_once)).unwrap_or(i64::MAX));
        let found = self.events(oldest).await?;
        // Others may have gone meanwhile, by their lease.
        let oldest = found.kvs().iter().take(too_many(found.count()));
        let keys: Vec<Vec<u8>> = oldest.map(|event| event.key().to_vec()).collect();
        for some in keys.chunks(MAX_OPERATIONS) {
            let deletions: Vec<TxnOp> = some.iter().map(|key| TxnOp::delete(key.as_slice(), None)).collect();
            let txn = Txn::new().when([leads(term)]).and_then(deletions);
            let delete = |client| {
                let txn = txn.clone();
                async move { kv(&client).txn(txn).await }
            };
            // Asked twice, it is done once.
            if !self.members.ask(REQUEST_TIMEOUT, delete).await.map_err(CommitError::Unknown)?.succeeded() {
                return Err(CommitError::Deposed);
            }
        }
        Ok(keys.len())
    }

    async fn events(&self, options: GetOptions) -> Result<etcd_client::GetResponse, CommitError> {
        let get = |client| {
            let options = options.clone();
            async move { kv(&client).get(EVENTS, Some(options)).await }
        };
        self.members.ask(LOAD_TIMEOUT, get).await.map_err(CommitError::Unknown)
    }
}
