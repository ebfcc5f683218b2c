//! Hosts die: from the moment at which the leader declares a host lapsed to the moment at which the last VM of that host has a new
//! place in etcd; of many hosts, the longest. They are silent at the same moment, but their last heartbeats, and so the ends of
//! their leases, lie up to a second apart.
//!
//! The beginning is the time in the leader's log, the end is when etcd tells this process of the write: both by this
//! machine's clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    time::Duration,
};

use anyhow::{Context as _, bail};
use etcd_client::{EventType, WatchOptions};
use harness::load::site::PlayedHost;
use uncloud_controller::model::{Key, Record};
use uncloud_proto::{
    clock::Clock,
    ids::{HostId, VmId},
};

use super::{CROWDED, FULLER, Scale, raw};

/// The lease, what the leader adds to it, and much more.
const LIMIT: Duration = Duration::from_secs(60);
const DAY_MS: u64 = 24 * 3600 * 1000;

pub(super) async fn measure(scale: &mut Scale) -> anyhow::Result<()> {
    die(scale, "dead_host_1000_vms", 0..1, CROWDED, "100").await?;
    die(scale, "dead_50_hosts", 1..1 + FULLER.0, FULLER.0 * FULLER.1, "150").await
}

async fn die(scale: &mut Scale, name: &str, hosts: Range<usize>, vms: usize, aim: &str) -> anyhow::Result<()> {
    let dead: BTreeSet<_> = scale.site.hosts[hosts.clone()].iter().map(|h| h.id).collect();
    let vms_of = |host: &PlayedHost| host.vms.iter().map(|&vm| (vm, host.id)).collect::<Vec<_>>();
    let mut homeless: BTreeMap<VmId, HostId> = scale.site.hosts[hosts.clone()].iter().flat_map(vms_of).collect();
    anyhow::ensure!(homeless.len() == vms, "{} VMs", homeless.len());
    let log = scale.plane.controllers[0].process().log().to_path_buf();
    let already = fs::metadata(&log)?.len();

    let mut etcd = scale.plane.etcd.client().await?;
    let mut changes = etcd.watch("/uncloud/v1/", Some(WatchOptions::new().with_prefix())).await?;
    let clock = Clock::system();
    scale.fleet.kill(hosts.clone());
    let mut puts = Vec::new();
    let mut placed: BTreeMap<HostId, u64> = BTreeMap::new();
    let (mut first, mut transactions) = (None, BTreeSet::new());
    while !homeless.is_empty() {
        let next = tokio::time::timeout(LIMIT, changes.message()).await;
        let Ok(Ok(Some(next))) = next else { bail!("{} VMs have no new place", homeless.len()) };
        let now = clock.wall().0;
        for event in next.events() {
            let Some(kv) = event.kv().filter(|_| event.event_type() == EventType::Put) else { continue };
            puts.push(raw::Put { key: kv.key().to_vec(), bytes: kv.value().len(), lease: kv.lease() });
            let Some(key @ Key::Vm(vm)) = Key::parse(kv.key()) else { continue };
            let Record::Vm(record) = Record::from_json(&key, kv.value())? else { continue };
            if record.placement.host.is_some_and(|host| !dead.contains(&host))
                && let Some(host) = homeless.remove(&vm)
            {
                placed.insert(host, now);
                first.get_or_insert(now);
                transactions.insert(kv.mod_revision());
            }
        }
    }
    let text = fs::read(&log)?;
    let text = String::from_utf8_lossy(&text[usize::try_from(already)?..]).into_owned();
    let (mut took, mut until_first) = (0, u64::MAX);
    let after = |declared: u64, then: u64| (then % DAY_MS + DAY_MS - declared) % DAY_MS;
    for (host, last) in placed {
        let about = format!("host={host} ");
        let declared =
            text.lines().find(|line| line.contains("declared lapsed") && format!("{line} ").contains(&about));
        let declared = declared.and_then(time_of_day).context("the leader's log says when")?;
        took = took.max(after(declared, last));
        until_first = until_first.min(after(declared, first.context("one was placed")?));
    }
    let limit = raw::write(&mut etcd, &puts).await?;
    let (writes, transactions) = (puts.len(), transactions.len());
    let profile = format!("ours: in {transactions} transactions, the first after {until_first} ms");
    let beside = format!("the same {writes} writes in full etcd transactions; {profile}; the aim is {aim}");
    scale.add(name, took as f64, limit.as_secs_f64() * 1000.0, "ms", beside);
    Ok(())
}

/// Milliseconds since midnight at the beginning of a line of a log, such as `2026-11-24T01:02:03.456789Z`.
fn time_of_day(line: &str) -> Option<u64> {
    let time = line.get(11..23)?;
    let mut parts = time.split([':', '.']).map(|part| part.parse::<u64>().ok());
    let (h, m, s, ms) = (parts.next()??, parts.next()??, parts.next()??, parts.next()??);
    Some(((h * 60 + m) * 60 + s) * 1000 + ms)
}
