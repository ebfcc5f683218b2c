//! The model of etcd behaves as etcd does: each case runs against both, over TCP, and asserts the same.
//!
//! What is not asked here, the simulation must not rely on.

#![allow(clippy::unwrap_used, reason = "an answer without a header or a key that was just put is a failed test")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, EventType, GetOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp,
    WatchOptions, WatchResponse, WatchStream,
};
use harness::{
    etcd::{Fsync, TestEtcd},
    netsim::etcd::Etcd,
    wait_for,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use uncloud_proto::clock::Clock;

/// Whatever takes longer than this has gone wrong.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs one case against the real etcd and against the model.
async fn both(case: impl AsyncFn(Client) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let etcd = TestEtcd::start(dir.path(), Fsync::Off).await?;
    tokio::time::timeout(LIMIT, case(etcd.client().await?)).await?.context("the real etcd")?;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let model = Etcd::new(Clock::system());
    let server = tokio::spawn(async move { model.serve(TcpListenerStream::new(listener)).await });
    let client = Client::connect([address], None).await?;
    tokio::time::timeout(LIMIT, case(client)).await?.context("the model")?;
    server.abort();
    Ok(())
}

async fn put(client: &Client, key: &str, value: &str) -> anyhow::Result<i64> {
    Ok(client.kv_client().put(key, value, None).await?.header().unwrap().revision())
}

async fn revision(client: &Client) -> anyhow::Result<i64> {
    Ok(client.kv_client().get("nothing", None).await?.header().unwrap().revision())
}

async fn keys(client: &Client, from: &str, options: GetOptions) -> anyhow::Result<Vec<String>> {
    let answer = client.kv_client().get(from, Some(options)).await?;
    Ok(answer.kvs().iter().map(|kv| kv.key_str().unwrap().to_owned()).collect())
}

fn code<T: std::fmt::Debug>(result: Result<T, etcd_client::Error>) -> anyhow::Result<(Code, String)> {
    match result {
        Err(etcd_client::Error::GRpcStatus(status)) => Ok((status.code(), status.message().to_owned())),
        other => bail!("expected a status, got {other:?}"),
    }
}

/// The next events of a watch, at least so many: kind, key, revision.
async fn events(stream: &mut WatchStream, count: usize) -> anyhow::Result<Vec<(EventType, String, i64)>> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let message = next(stream).await?;
        ensure!(!message.canceled(), "cancelled: {message:?}");
        let revisions: Vec<i64> = message.events().iter().map(|e| e.kv().unwrap().mod_revision()).collect();
        ensure!(revisions.is_sorted(), "out of order: {revisions:?}");
        for event in message.events() {
            let kv = event.kv().unwrap();
            seen.push((event.event_type(), kv.key_str()?.to_owned(), kv.mod_revision()));
        }
    }
    Ok(seen)
}

async fn next(stream: &mut WatchStream) -> anyhow::Result<WatchResponse> {
    stream.message().await?.context("the watch ended")
}

#[tokio::test]
async fn a_put_is_read_with_its_revisions_and_returns_what_was_before() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        ensure!(revision(&client).await? == 1, "an empty etcd is at revision 1");
        let first = put(&client, "k", "a").await?;
        ensure!(first == 2, "{first}");
        let answer = kv.put("k", "b", Some(PutOptions::new().with_prev_key())).await?;
        let second = answer.header().unwrap().revision();
        ensure!(second == first + 1);
        ensure!(answer.prev_key().unwrap().value() == b"a");
        ensure!(kv.put("k", "b", None).await?.prev_key().is_none());
        let read = kv.get("k", None).await?;
        ensure!(read.header().unwrap().revision() == second + 1 && read.count() == 1 && !read.more());
        let found = &read.kvs()[0];
        ensure!(found.value() == b"b");
        ensure!(found.create_revision() == first && found.mod_revision() == second + 1 && found.version() == 3);
        let absent = kv.get("other", None).await?;
        ensure!(absent.count() == 0 && absent.kvs().is_empty());
        let bare = kv.get("k", Some(GetOptions::new().with_keys_only())).await?;
        ensure!(bare.kvs()[0].value().is_empty() && bare.kvs()[0].key() == b"k");
        let (code, _) = code(kv.put("", "v", None).await)?;
        ensure!(code == Code::InvalidArgument);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_delete_costs_a_revision_only_if_there_was_something() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        let before = put(&client, "k", "a").await?;
        let none = kv.delete("other", None).await?;
        ensure!(none.deleted() == 0 && none.header().unwrap().revision() == before);
        let one = kv.delete("k", Some(DeleteOptions::new().with_prev_key())).await?;
        ensure!(one.deleted() == 1 && one.header().unwrap().revision() == before + 1);
        ensure!(one.prev_kvs()[0].value() == b"a");
        ensure!(kv.delete("k", None).await?.deleted() == 0);
        // Made again it is a new key.
        let again = put(&client, "k", "b").await?;
        ensure!(again == before + 2);
        let found = kv.get("k", None).await?;
        ensure!(found.kvs()[0].create_revision() == again && found.kvs()[0].version() == 1);
        for key in ["p/1", "p/2", "q"] {
            put(&client, key, "v").await?;
        }
        let many = kv.delete("p/", Some(DeleteOptions::new().with_prefix())).await?;
        ensure!(many.deleted() == 2 && many.header().unwrap().revision() == again + 4);
        ensure!(kv.get("q", None).await?.count() == 1);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_range_has_pages_and_can_be_pinned_to_a_revision() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        for key in ["a/2", "a/1", "a/3", "b/1"] {
            put(&client, key, "v").await?;
        }
        let pinned = revision(&client).await?;
        kv.delete("a/1", None).await?;
        put(&client, "a/3", "changed").await?;
        put(&client, "a/4", "v").await?;
        let prefix = || GetOptions::new().with_prefix();
        ensure!(keys(&client, "a/", prefix()).await? == ["a/2", "a/3", "a/4"]);
        ensure!(keys(&client, "a/", prefix().with_revision(pinned)).await? == ["a/1", "a/2", "a/3"]);
        let page = kv.get("a/", Some(prefix().with_limit(2).with_revision(pinned))).await?;
        ensure!(page.more() && page.count() == 3 && page.kvs().len() == 2);
        ensure!(page.header().unwrap().revision() == revision(&client).await?, "the header is of now");
        let rest =
            kv.get("a/2\0", Some(GetOptions::new().with_range("a0").with_limit(2).with_revision(pinned))).await?;
        ensure!(!rest.more() && rest.count() == 1 && rest.kvs()[0].value() == b"v");
        let whole = kv.get("a/", Some(prefix().with_limit(3))).await?;
        ensure!(!whole.more() && whole.kvs().len() == 3);
        let counted = kv.get("a/", Some(prefix().with_count_only())).await?;
        ensure!(counted.count() == 3 && counted.kvs().is_empty());
        let all = keys(&client, "", GetOptions::new().with_all_keys()).await?;
        ensure!(all == ["a/2", "a/3", "a/4", "b/1"]);
        let from = keys(&client, "a/4", GetOptions::new().with_from_key()).await?;
        ensure!(from == ["a/4", "b/1"]);
        let (code, _) = code(kv.get("a", Some(GetOptions::new().with_revision(pinned + 100))).await)?;
        ensure!(code == Code::OutOfRange);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_range_is_sorted_before_it_is_cut() -> anyhow::Result<()> {
    both(async |client| {
        for key in ["a/3", "a/1", "a/4", "a/2"] {
            put(&client, key, "v").await?;
        }
        put(&client, "a/1", "newest").await?;
        let sorted = |target, order| GetOptions::new().with_prefix().with_sort(target, order);
        let newest = keys(&client, "a/", sorted(SortTarget::Mod, SortOrder::Descend).with_limit(2)).await?;
        ensure!(newest == ["a/1", "a/2"], "{newest:?}");
        let oldest = keys(&client, "a/", sorted(SortTarget::Create, SortOrder::Ascend)).await?;
        ensure!(oldest == ["a/3", "a/1", "a/4", "a/2"], "{oldest:?}");
        let last = keys(&client, "a/", sorted(SortTarget::Key, SortOrder::Descend).with_limit(1)).await?;
        ensure!(last == ["a/4"], "{last:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_transaction_writes_all_at_one_revision_or_goes_the_other_way() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        let old = put(&client, "old", "v").await?;
        let claim = || {
            Txn::new()
                .when([
                    Compare::create_revision("k", CompareOp::Equal, 0),
                    Compare::mod_revision("old", CompareOp::Equal, old),
                    Compare::version("old", CompareOp::Greater, 0),
                    Compare::value("old", CompareOp::Equal, "v"),
                    Compare::lease("old", CompareOp::Equal, 0),
                ])
                .and_then([
                    TxnOp::put("k", "1", None),
                    TxnOp::put("l", "2", None),
                    TxnOp::delete("nothing", None),
                    TxnOp::get("k", None),
                ])
                .or_else([TxnOp::get("k", None)])
        };
        let won = kv.txn(claim()).await?;
        ensure!(won.succeeded() && won.header().unwrap().revision() == old + 1);
        ensure!(won.op_responses().len() == 4);
        let etcd_client::TxnOpResponse::Get(seen) = &won.op_responses()[3] else { bail!("{won:?}") };
        ensure!(seen.kvs()[0].value() == b"1", "a transaction sees what it has written");
        let written = kv.get("k", Some(GetOptions::new().with_range("m"))).await?;
        ensure!(written.kvs().iter().all(|kv| kv.mod_revision() == old + 1) && written.count() == 2);
        let lost = kv.txn(claim()).await?;
        ensure!(!lost.succeeded() && lost.header().unwrap().revision() == old + 1);
        let etcd_client::TxnOpResponse::Get(holder) = &lost.op_responses()[0] else { bail!("{lost:?}") };
        ensure!(holder.kvs()[0].value() == b"1");
        let same = Txn::new()
            .when([Compare::create_revision("k", CompareOp::Equal, old + 1)])
            .and_then([TxnOp::delete("k", None), TxnOp::delete("l", None)]);
        ensure!(kv.txn(same.clone()).await?.succeeded());
        ensure!(!kv.txn(same).await?.succeeded());
        ensure!(revision(&client).await? == old + 2);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn comparisons_with_a_key_that_is_not_there_and_inequalities() -> anyhow::Result<()> {
    both(async |client| {
        let k = put(&client, "k", "b").await?;
        for (compare, holds) in [
            (Compare::value("none", CompareOp::Equal, ""), false),
            (Compare::value("none", CompareOp::NotEqual, "x"), false),
            (Compare::version("none", CompareOp::Equal, 0), true),
            (Compare::mod_revision("none", CompareOp::Less, 1), true),
            (Compare::create_revision("k", CompareOp::NotEqual, 0), true),
            (Compare::mod_revision("k", CompareOp::Less, k), false),
            (Compare::mod_revision("k", CompareOp::Greater, k - 1), true),
            (Compare::value("k", CompareOp::Greater, "a"), true),
            (Compare::value("k", CompareOp::Less, "a"), false),
        ] {
            let txn = Txn::new().when([compare.clone()]);
            ensure!(client.kv_client().txn(txn).await?.succeeded() == holds, "{compare:?}");
        }
        ensure!(revision(&client).await? == k);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_transaction_that_cannot_be_carried_out_changes_nothing() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        let before = revision(&client).await?;
        let twice = Txn::new().and_then([TxnOp::put("a", "1", None), TxnOp::put("a", "2", None)]);
        ensure!(code(kv.txn(twice).await)?.0 == Code::InvalidArgument);
        let both = Txn::new().and_then([TxnOp::put("a", "1", None), TxnOp::delete("a", None)]);
        ensure!(code(kv.txn(both).await)?.0 == Code::InvalidArgument);
        let many: Vec<TxnOp> = (0..129).map(|n| TxnOp::put(format!("a/{n}"), "v", None)).collect();
        ensure!(code(kv.txn(Txn::new().and_then(many)).await)?.0 == Code::InvalidArgument);
        let dead = PutOptions::new().with_lease(4711);
        let leased = Txn::new().and_then([TxnOp::put("a", "1", None), TxnOp::put("b", "1", Some(dead))]);
        let (code, message) = code(kv.txn(leased).await)?;
        ensure!(code == Code::NotFound && message.contains("lease not found"), "{code} {message}");
        ensure!(revision(&client).await? == before);
        let most: Vec<TxnOp> = (0..128).map(|n| TxnOp::put(format!("a/{n}"), "v", None)).collect();
        ensure!(kv.txn(Txn::new().and_then(most)).await?.succeeded());
        ensure!(revision(&client).await? == before + 1);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_watch_tells_each_change_in_order_and_each_revision_whole() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        let start = revision(&client).await?;
        let options = WatchOptions::new().with_all_keys().with_start_revision(start + 1);
        let mut all = client.watch_client().watch("", Some(options)).await?;
        let mut some = client
            .watch_client()
            .watch("a/", Some(WatchOptions::new().with_prefix().with_start_revision(start + 1).with_prev_key()))
            .await?;
        put(&client, "b", "1").await?;
        put(&client, "a/1", "1").await?;
        kv.txn(Txn::new().and_then([
            TxnOp::put("a/2", "2", None),
            TxnOp::put("c", "2", None),
            TxnOp::delete("a/1", None),
        ]))
        .await?;
        kv.delete("a/2", None).await?;
        use EventType::{Delete, Put};
        let expected = [
            (Put, "b", start + 1),
            (Put, "a/1", start + 2),
            (Put, "a/2", start + 3),
            (Put, "c", start + 3),
            (Delete, "a/1", start + 3),
            (Delete, "a/2", start + 4),
        ]
        .map(|(kind, key, revision)| (kind, key.to_owned(), revision));
        let seen = events(&mut all, 6).await?;
        ensure!(seen == expected, "{seen:?}");
        let seen = events(&mut some, 4).await?;
        let ours: Vec<_> = expected.iter().filter(|e| e.1.starts_with("a/")).cloned().collect();
        ensure!(seen == ours, "{seen:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_revision_is_not_split_over_messages() -> anyhow::Result<()> {
    both(async |client| {
        let mut watch = client.watch_client().watch("a/", Some(WatchOptions::new().with_prefix())).await?;
        // Without a start the watch begins when it is made: so wait until it is.
        ensure!(next(&mut watch).await?.created());
        let many: Vec<TxnOp> = (0..100).map(|n| TxnOp::put(format!("a/{n:03}"), "v", None)).collect();
        client.kv_client().txn(Txn::new().and_then(many)).await?;
        let message = next(&mut watch).await?;
        ensure!(message.events().len() == 100, "{}", message.events().len());
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_watch_begins_in_the_past_or_in_the_future() -> anyhow::Result<()> {
    both(async |client| {
        let first = put(&client, "k", "1").await?;
        put(&client, "k", "2").await?;
        client.kv_client().delete("k", None).await?;
        let watch = async |from: i64| {
            let options = WatchOptions::new().with_all_keys().with_start_revision(from).with_prev_key();
            client.watch_client().watch("", Some(options)).await
        };
        let mut past = watch(first).await?;
        let seen: Vec<i64> = events(&mut past, 3).await?.into_iter().map(|e| e.2).collect();
        ensure!(seen == [first, first + 1, first + 2], "{seen:?}");
        let mut future = watch(first + 4).await?;
        put(&client, "k", "not told").await?;
        put(&client, "k", "told").await?;
        let message = loop {
            let message = next(&mut future).await?;
            if !message.events().is_empty() {
                break message;
            }
        };
        let event = &message.events()[0];
        ensure!(event.kv().unwrap().mod_revision() == first + 4, "{event:?}");
        ensure!(event.prev_kv().unwrap().value() == b"not told");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn what_is_compacted_is_neither_read_nor_watched() -> anyhow::Result<()> {
    both(async |client| {
        let mut kv = client.kv_client();
        let first = put(&client, "k", "1").await?;
        put(&client, "k", "2").await?;
        put(&client, "gone", "1").await?;
        kv.delete("gone", None).await?;
        let newest = put(&client, "k", "3").await?;
        kv.compact(newest, None).await?;
        let (code_, message) = code(kv.get("k", Some(GetOptions::new().with_revision(first))).await)?;
        ensure!(code_ == Code::OutOfRange && message.contains("compacted"), "{message}");
        let now = kv.get("k", Some(GetOptions::new().with_revision(newest))).await?;
        ensure!(now.kvs()[0].value() == b"3" && now.kvs()[0].create_revision() == first);
        ensure!(code(kv.compact(first, None).await)?.0 == Code::OutOfRange);
        ensure!(code(kv.compact(newest + 100, None).await)?.0 == Code::OutOfRange);
        let options = WatchOptions::new().with_all_keys().with_start_revision(first);
        let mut old = client.watch_client().watch("", Some(options)).await?;
        let cancelled = loop {
            let message = next(&mut old).await?;
            if message.canceled() {
                break message;
            }
            ensure!(message.events().is_empty(), "{message:?}");
        };
        ensure!(cancelled.compact_revision() == newest, "{cancelled:?}");
        let options = WatchOptions::new().with_all_keys().with_start_revision(newest + 1);
        let mut live = client.watch_client().watch("", Some(options)).await?;
        let after = put(&client, "k", "4").await?;
        ensure!(events(&mut live, 1).await? == [(EventType::Put, "k".to_owned(), after)]);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_lease_that_is_kept_alive_stays_and_one_that_is_not_takes_its_keys_along() -> anyhow::Result<()> {
    both(async |client| {
        let mut leases = client.lease_client();
        let ttl = Duration::from_secs(2);
        let (kept, left) = (leases.grant(2, None).await?, leases.grant(2, None).await?);
        ensure!(kept.id() != left.id() && kept.ttl() == 2);
        let under = |lease: i64| Some(PutOptions::new().with_lease(lease));
        let mut kv = client.kv_client();
        kv.put("kept", "v", under(kept.id())).await?;
        kv.put("left/1", "v", under(left.id())).await?;
        kv.put("left/2", "v", under(left.id())).await?;
        // A key that is put again without the lease stays.
        kv.put("freed", "v", under(left.id())).await?;
        let before = put(&client, "freed", "v").await?;
        ensure!(kv.get("kept", None).await?.kvs()[0].lease() == kept.id());
        let begin = Instant::now();
        let (mut keeper, mut answers) = leases.keep_alive(kept.id()).await?;
        wait_for("the lease that nobody keeps ends", ttl * 4, async || {
            keeper.keep_alive().await.map_err(|e| e.to_string())?;
            match answers.message().await {
                Ok(Some(answer)) if answer.ttl() == 2 => {}
                other => return Err(format!("the other lease: {other:?}")),
            }
            let found = client.kv_client().get("left/", Some(GetOptions::new().with_prefix())).await;
            match found.map_err(|e| e.to_string())?.count() {
                0 => Ok(()),
                n => Err(format!("{n} keys")),
            }
        })
        .await?;
        // It was granted a little before `begin`.
        ensure!(begin.elapsed() > ttl - Duration::from_millis(300), "{:?}", begin.elapsed());
        ensure!(revision(&client).await? == before + 1, "its keys go at one revision");
        ensure!(kv.get("kept", None).await?.count() == 1 && kv.get("freed", None).await?.count() == 1);
        ensure!(leases.keep_alive(left.id()).await.is_err());
        ensure!(leases.time_to_live(left.id(), None).await?.ttl() == -1);
        ensure!(leases.time_to_live(kept.id(), None).await?.granted_ttl() == 2);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_lease_that_is_gone_keeps_nothing() -> anyhow::Result<()> {
    both(async |client| {
        let mut leases = client.lease_client();
        let mut kv = client.kv_client();
        ensure!(leases.grant(1, None).await?.ttl() == 2, "etcd grants no less than this");
        let lease = leases.grant(60, None).await?.id();
        let options = || Some(PutOptions::new().with_lease(lease));
        kv.put("a", "v", options()).await?;
        kv.put("b", "v", options()).await?;
        let before = revision(&client).await?;
        let start = WatchOptions::new().with_all_keys().with_start_revision(before + 1);
        let mut watch = client.watch_client().watch("", Some(start)).await?;
        leases.revoke(lease).await?;
        let mut gone = events(&mut watch, 2).await?;
        gone.sort_by(|a, b| a.1.cmp(&b.1));
        let expected = ["a", "b"].map(|key| (EventType::Delete, key.to_owned(), before + 1));
        ensure!(gone == expected, "{gone:?}");
        let (code_, message) = code(kv.put("a", "v", options()).await)?;
        ensure!(code_ == Code::NotFound && message.contains("lease not found"), "{message}");
        ensure!(code(leases.revoke(lease).await)?.0 == Code::NotFound);
        ensure!(revision(&client).await? == before + 1);
        Ok(())
    })
    .await
}
