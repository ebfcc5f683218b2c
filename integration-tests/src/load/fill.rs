//! Writes the records of a whole site into etcd, before there is a controller.
//!
//! They are of the controller's own types and go through its own encoding, so what it reads is what it would have written.

use std::sync::Arc;

use anyhow::Context as _;
use etcd_client::{Client, Txn, TxnOp};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;
use uncloud_controller::{
    model::{HostRecord, Key, Record, VmRecord, VmStatusRecord},
    store::MAX_OPERATIONS,
};
use uncloud_proto::ids::VmId;

use super::site::{AGENT_VERSION, CPU_LEVEL, CPU_NAME, POOL_BYTES, PlayedHost, Site, VM_MEMORY_MIB};
use crate::specs;

/// Transactions under way at once. More makes etcd slower, not faster.
const AT_ONCE: usize = 4;
/// Bytes of each VM's disk.
const DISK_BYTES: u64 = 10 << 30;
/// When everything was created, ms since 1970. Any time will do.
const CREATED: u64 = 1_700_000_000_000;

/// Writes all hosts of a site and their VMs. Returns how many bytes of keys and values that are.
///
/// # Errors
///
/// etcd does not take them, or a record is not one.
pub async fn site(etcd: &Client, site: &Site) -> anyhow::Result<u64> {
    let records = records(site)?;
    let bytes = records.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
    let mut records = records.into_iter();
    let batches = std::iter::from_fn(|| {
        let batch: Vec<_> = records.by_ref().take(MAX_OPERATIONS).collect();
        (!batch.is_empty()).then_some(batch)
    });
    stream::iter(batches.map(|batch| {
        let mut etcd = etcd.clone();
        async move {
            let puts: Vec<TxnOp> = batch.into_iter().map(|(key, value)| TxnOp::put(key, value, None)).collect();
            etcd.txn(Txn::new().and_then(puts)).await.context("fill etcd").map(drop)
        }
    }))
    .buffer_unordered(AT_ONCE)
    .try_collect::<Vec<()>>()
    .await?;
    Ok(bytes)
}

fn records(site: &Site) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let (vm_template, status_template) = templates()?;
    let mut all = Vec::new();
    let mut put = |key: Key, record: Record| all.push((key.to_string(), record.to_json()));
    let mut n = 0_u64;
    for host in &site.hosts {
        put(Key::Host(host.id), Record::Host(Arc::new(host_record(host, site)?)));
        for &vm in &host.vms {
            n += 1;
            let mac = format!("42:00:{:02x}:{:02x}:{:02x}:{:02x}", n >> 24 & 255, n >> 16 & 255, n >> 8 & 255, n & 255);
            let record = vm_record(&vm_template, host, site, vm, &mac);
            put(Key::VmName { owner: record.owner.clone(), name: record.name.clone() }, Record::VmName(vm));
            put(Key::Mac(mac), Record::Mac(vm));
            put(Key::Vm(vm), Record::Vm(Arc::new(record)));
            put(Key::VmStatus(vm), Record::VmStatus(Arc::new(status_template.clone())));
        }
    }
    Ok(all)
}

/// Read from JSON, so that fields that are added to the records have their defaults here, too.
fn templates() -> anyhow::Result<(VmRecord, VmStatusRecord)> {
    let nil = uuid::Uuid::nil();
    let vm = json!({
        "id": nil,
        "name": "",
        "owner": "default",
        "spec": {
            "vcpus": 1, "memory_mib": VM_MEMORY_MIB, "machine": "q35",
            "disks": [{"name": "disk0", "pool": specs::SHARED, "size_bytes": DISK_BYTES}],
            "nics": [{"type": "user", "mac": ""}],
            "restart": "on-failure", "failover": "fast", "on_disk_loss": "wait", "stop_grace_seconds": 60,
        },
        "desired": "running",
        "placement": {
            "host": nil, "incarnation": 1, "since": CREATED,
            "why": "the best of 10000 hosts that can take it: most room left",
        },
        "disks_exist": true,
        "disk_home": {"host": nil, "pools": {specs::SHARED: nil}},
        "created": CREATED,
    });
    let status = json!({"phase": "running", "since": CREATED, "incarnation": 1});
    let vm = serde_json::from_value(vm).context("the record of a VM")?;
    Ok((vm, serde_json::from_value(status).context("the status of a VM")?))
}

fn vm_record(template: &VmRecord, host: &PlayedHost, site: &Site, vm: VmId, mac: &str) -> VmRecord {
    let mut record = template.clone();
    record.id = vm;
    record.name = format!("vm-{vm}");
    record.placement.host = Some(host.id);
    for nic in &mut record.spec.nics {
        mac.clone_into(&mut nic.mac);
    }
    if let Some(home) = &mut record.disk_home {
        home.host = host.id;
        home.pools.values_mut().for_each(|id| *id = Some(site.pool));
    }
    record
}

fn host_record(host: &PlayedHost, site: &Site) -> anyhow::Result<HostRecord> {
    let features: Vec<&str> = CPU_LEVEL.features().collect();
    let record = json!({
        "id": host.id, "name": host.name, "vcpus": host.vcpus, "memory_mib": host.memory_mib,
        "pools": [{"name": specs::SHARED, "shared_id": site.pool, "capacity_bytes": POOL_BYTES}],
        "accelerator": {"kind": "kvm", "why": CPU_NAME},
        "mode": "active", "liveness": "up", "liveness_since": CREATED,
        "agent_version": AGENT_VERSION,
        "cpu": {"name": CPU_NAME, "features": features, "fingerprint": ""},
        "boot_id": host.boot, "created": CREATED,
    });
    serde_json::from_value(record).context("the record of a host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_reads_back() {
        let all = records(&Site::new(3, 7, 1, (1, 2))).unwrap();
        assert_eq!(all.len(), 3 + 4 * 7);
        for (key, value) in all {
            let key = Key::parse(key.as_bytes()).unwrap();
            Record::from_json(&key, &value).unwrap();
        }
    }
}
