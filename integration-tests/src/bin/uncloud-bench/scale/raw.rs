//! What etcd itself takes for the same: the limits.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use etcd_client::{Client, GetOptions, PutOptions, Txn, TxnOp};
use harness::load::Plane;
use uncloud_controller::{model::keys, store::MAX_OPERATIONS};

/// Keys per page. What is left of a large range is asked for in pieces, because etcd goes through all of it for each page.
const PAGE: i64 = 25_000;

/// Reads everything that is stored, in pages.
pub(super) async fn read_all(plane: &Plane) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    range(plane, "/uncloud/v1/", "/uncloud/v10").await?;
    Ok(begin.elapsed())
}

/// Bytes of all keys with this prefix, and of their values.
pub(super) async fn bytes(plane: &Plane, prefix: &str) -> anyhow::Result<u64> {
    range(plane, prefix, &format!("{prefix}\u{7f}")).await
}

/// Reads keys from `start` to before `end`. Their bytes.
pub(super) async fn range(plane: &Plane, start: &str, end: &str) -> anyhow::Result<u64> {
    let mut client = plane.etcd.client().await?.kv_client().max_decoding_message_size(usize::MAX);
    let (mut ranges, mut bytes) = (vec![(start.as_bytes().to_vec(), end.as_bytes().to_vec())], 0);
    while let Some((from, end)) = ranges.pop() {
        let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
        let page = client.get(from, Some(options)).await?;
        bytes += page.kvs().iter().map(|kv| (kv.key().len() + kv.value().len()) as u64).sum::<u64>();
        if page.more() {
            let mut from = page.kvs().last().context("a page has keys")?.key().to_vec();
            from.push(0);
            ranges.extend(keys::cut(from, end).into_iter().rev());
        }
    }
    Ok(bytes)
}

/// Something that was written.
pub(super) struct Put {
    pub(super) key: Vec<u8>,
    pub(super) bytes: usize,
    /// The etcd lease, or 0.
    pub(super) lease: i64,
}

impl Put {
    fn again(&self) -> TxnOp {
        let key = [b"/raw", self.key.as_slice()].concat();
        let options = (self.lease != 0).then(|| PutOptions::new().with_lease(self.lease));
        TxnOp::put(key, vec![b'x'; self.bytes], options)
    }
}

/// Writes as many bytes under keys of the same form, in full transactions, one after the other. What is not an event was there
/// before.
pub(super) async fn write(client: &mut Client, puts: &[Put]) -> anyhow::Result<Duration> {
    let events = keys::EVENTS.as_bytes();
    let before: Vec<&Put> = puts.iter().filter(|put| !put.key.starts_with(events)).collect();
    in_transactions(client, &before).await?;
    in_transactions(client, &puts.iter().collect::<Vec<_>>()).await
}

async fn in_transactions(client: &mut Client, puts: &[&Put]) -> anyhow::Result<Duration> {
    let mut batches: Vec<(BTreeSet<&[u8]>, Vec<TxnOp>)> = Vec::new();
    for put in puts {
        // A transaction may have a key once.
        let fits = |(keys, _): &&mut (BTreeSet<&[u8]>, _)| keys.len() < MAX_OPERATIONS && !keys.contains(&*put.key);
        match batches.last_mut().filter(fits) {
            Some((keys, batch)) => {
                keys.insert(&put.key);
                batch.push(put.again());
            }
            None => batches.push((BTreeSet::from([put.key.as_slice()]), vec![put.again()])),
        }
    }
    let begin = Instant::now();
    for (_, batch) in batches {
        ensure!(client.txn(Txn::new().and_then(batch)).await?.succeeded(), "a write was refused");
    }
    Ok(begin.elapsed())
}
