//! VMs come and go for minutes: is memory flat?
//!
//! `CHURN_MINUTES` says how many minutes (5). Each second 100 VMs are created, and 100 older ones deleted. The agents obey at
//! once, so each VM is placed, runs and is removed. A call that fails is counted, and what it was to delete is deleted later.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures_util::future::join_all;
use tokio::time::MissedTickBehavior;
use tonic::Code;
use uncloud_proto::v1::{CreateVmRequest, Disk, VmSpec};

use super::Scale;

const PER_SECOND: usize = 100;
/// VMs that are there at once, besides those that stay.
const AT_ONCE: usize = 1000;

pub(super) async fn measure(scale: &mut Scale) -> anyhow::Result<()> {
    let minutes: u64 = match std::env::var("CHURN_MINUTES") {
        Ok(text) => text.parse().context("CHURN_MINUTES must be a number of minutes")?,
        Err(_) => 5,
    };
    let mut vms: VecDeque<String> = VecDeque::new();
    let mut sizes = vec![];
    let mut etcd = scale.plane.etcd.client().await?;
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (begin, mut n) = (Instant::now(), 0_u64);
    let (mut failed, mut why) = (0_u64, String::new());
    for minute in 0..=minutes {
        while begin.elapsed() < Duration::from_secs(60 * minute) {
            second.tick().await;
            let api = &scale.plane.api;
            let requests = (0..PER_SECOND as u64).map(|i| api.create(request(n + i)));
            for created in join_all(requests).await {
                match created {
                    Ok(vm) => vms.push_back(vm.id),
                    Err(status) => {
                        failed += 1;
                        why = status.to_string();
                    }
                }
            }
            n += PER_SECOND as u64;
            let old: Vec<String> = vms.drain(..vms.len().saturating_sub(AT_ONCE)).collect();
            let deleted = join_all(old.iter().map(|vm| api.delete(vm))).await;
            for (vm, deleted) in old.into_iter().zip(deleted) {
                match deleted {
                    Ok(()) => {}
                    // An earlier call that was given up has deleted it.
                    Err(status) if status.code() == Code::NotFound => {}
                    Err(status) => {
                        failed += 1;
                        why = status.to_string();
                        vms.push_front(vm);
                    }
                }
            }
        }
        let kib = scale.resident_kib(0)?;
        let stored = etcd.status().await?.db_size() >> 20;
        let mib = kib / 1024.0;
        println!("churn: after {minute} min, {n} VMs: {mib:.0} MiB resident, etcd {stored} MiB, {failed} calls failed");
        sizes.push(kib);
    }
    // The first minute fills what is kept on purpose: the history of changes, the answers to requests.
    let (first, last) = (sizes.get(1).context("a minute at least")?, sizes.last().context("a minute at least")?);
    let rate = format!("{minutes} min, {PER_SECOND} creates and deletes per second");
    let beside = format!("the size after a minute; {rate}; {failed} calls failed {why}");
    scale.add("churn_memory_growth", last / 1024.0, first / 1024.0, "MiB", beside);
    Ok(())
}

fn request(n: u64) -> CreateVmRequest {
    let disks = vec![Disk { size_bytes: 1 << 20, ..Disk::default() }];
    let spec = VmSpec { memory_mib: 16, disks, ..VmSpec::default() };
    CreateVmRequest { name: format!("churn-{n}"), spec: Some(spec), ..CreateVmRequest::default() }
}
