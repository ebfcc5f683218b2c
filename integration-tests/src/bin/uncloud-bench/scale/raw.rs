//! What etcd itself takes for the same: the limits.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use etcd_client::{Client, GetOptions, Txn, TxnOp};
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

/// Writes values of these sizes under keys of their own, in full transactions, one after the other.
pub(super) async fn write(client: &mut Client, sizes: &[usize]) -> anyhow::Result<Duration> {
    let batches: Vec<Vec<TxnOp>> = sizes
        .chunks(MAX_OPERATIONS)
        .enumerate()
        .map(|(n, batch)| {
            let put = |(i, size): (usize, &usize)| {
                TxnOp::put(format!("/raw/{n:06}/{i:06}/{:036}", 0), vec![b'x'; *size], None)
            };
            batch.iter().enumerate().map(put).collect()
        })
        .collect();
    let begin = Instant::now();
    for batch in batches {
        ensure!(client.txn(Txn::new().and_then(batch)).await?.succeeded(), "a write was refused");
    }
    Ok(begin.elapsed())
}
