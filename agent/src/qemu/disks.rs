//! The disks of a QEMU that runs, in its words: how large they are, and how they are made larger.
//!
//! Every question and command is bounded in time. Called by the VM's task through [`Hypervisor`](crate::vm::hypervisor::Hypervisor).

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tokio::time::{self, Instant};
use uuid::Uuid;

use super::{
    process::{Instance, InstanceEvent},
    qmp,
};
use crate::vm::disks::{Done, Holds, Orders, SnapshotOrder, Wanted};

/// A busy guest has used a disk by then that has grown on its storage host. Longer, and the VM's task, which does nothing else meanwhile,
/// is late for a stop; guests that take longer are looked at again later.
const SEEN_LIMIT: Duration = Duration::from_millis(1500);
/// How often to look meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why a disk is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU did not say, or did not do it.
    #[error("disk {disk}: {source}")]
    Disk {
        /// Its name.
        disk: String,
        /// Why not.
        source: qmp::Error,
    },
    /// It has not been connected to its storage host anew since it grew there, or it has not grown there yet.
    #[error(
        "disk {0} grows on its storage host, and the guest sees that after it has used the disk the next time; this is looked at again"
    )]
    NotSeenYet(String),
    /// QEMU does not answer.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
}

/// Makes the disks (name, node) at least as large as this, in bytes. Those that are larger stay so: a disk never shrinks.
///
/// # Errors
///
/// See [`Error`]. The disks before the one that is named have been grown.
pub async fn grow(instance: &Instance, sizes: &[(&str, &str, u64)]) -> Result<(), Error> {
    if sizes.is_empty() {
        return Ok(());
    }
    let found = nodes(&instance.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?);
    for (disk, node, size) in sizes {
        // A QEMU that was started before its VM had this disk knows nothing of it.
        if found.get(*node).is_some_and(|now| now < size) {
            let give_up = Instant::now() + SEEN_LIMIT;
            loop {
                let arguments = json!({ "node-name": node, "size": size });
                match instance.execute("block_resize", Some(arguments)).await.map_err(|e| not_grown(disk, e)) {
                    Ok(_) => break,
                    Err(Error::NotSeenYet(_)) if Instant::now() < give_up => time::sleep(LOOK_EVERY).await,
                    Err(error) => return Err(error),
                }
            }
            tracing::info!(disk, size, "the disk has grown");
        }
    }
    Ok(())
}

/// QEMU 7.2 asks for the size of what is served to it when it connects, and what is served has one size: it is made anew to grow, and
/// QEMU connects again with the next request.
fn not_grown(disk: &str, source: qmp::Error) -> Error {
    match source {
        qmp::Error::Refused { description, .. } if description.contains("Cannot grow NBD") => {
            Error::NotSeenYet(disk.to_owned())
        }
        source => Error::Disk { disk: disk.to_owned(), source },
    }
}

/// Takes and removes snapshots of the disks that are these nodes: each of them on all disks at one moment.
///
/// A snapshot that only some of the disks have was never said to be there: it is taken anew.
///
/// # Errors
///
/// See [`Error`]. Those before the one that failed are done.
pub async fn snapshots(instance: &Instance, nodes: &[&str], orders: &Orders) -> Result<Done, Error> {
    let mut done = orders.done();
    if orders.snapshots.is_empty() || nodes.is_empty() {
        return Ok(done);
    }
    let answer = instance.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    for step in snapshot_steps(&answer, nodes, &orders.snapshots) {
        match step {
            SnapshotStep::Remove(arguments) => drop(instance.execute(REMOVE_SNAPSHOT, Some(arguments)).await?),
            SnapshotStep::Take(id, arguments) => {
                // Clean, where the guest has an agent; otherwise as after a power cut.
                let guest = instance.freeze().await;
                let taken = instance.execute(TAKE_SNAPSHOT, Some(arguments)).await;
                instance.thaw().await;
                taken?;
                done.guests.insert(id, guest);
                tracing::info!(snapshot = %id, ?guest, "a snapshot is taken");
            }
        }
    }
    Ok(done)
}

/// Whether the guest is to hold its file systems still for snapshots that another host takes.
#[must_use]
pub fn is_to_hold(orders: &Orders) -> bool {
    orders.ids(Wanted::There).next().is_some()
}

/// For snapshots that another host takes: the guest holds its file systems still, if it can, from before that host is told until nothing is
/// to be taken any more.
pub async fn hold_for_snapshots(instance: &Instance, orders: &Orders) -> Done {
    let holds = if is_to_hold(orders) {
        Holds { ready: orders.ids(Wanted::There).collect(), now: instance.hold().await, lasted: None }
    } else {
        Holds { lasted: instance.let_go().await, ..Holds::default() }
    };
    // None of them is taken here.
    Done { made: Vec::new(), holds, ..orders.done() }
}

/// QEMU's command for [`SnapshotStep::Remove`].
pub(crate) const REMOVE_SNAPSHOT: &str = "blockdev-snapshot-delete-internal-sync";
/// QEMU's command for [`SnapshotStep::Take`].
pub(crate) const TAKE_SNAPSHOT: &str = "transaction";

/// What is to be done for snapshots, with what QEMU's command is given.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SnapshotStep {
    /// Of one disk.
    Remove(Value),
    /// Of all disks at one moment.
    Take(Uuid, Value),
}

/// What is to be done that nodes have the snapshots that they should have, by what QEMU says of its nodes. One that only some of them
/// have was never said to be there: it is taken anew.
pub(crate) fn snapshot_steps(answer: &Value, nodes: &[&str], orders: &[SnapshotOrder]) -> Vec<SnapshotStep> {
    let mut steps = Vec::new();
    for order in orders {
        let id = order.id.to_string();
        let has: Vec<&&str> = nodes.iter().filter(|node| has_snapshot(answer, node, &id)).collect();
        if order.wanted == Wanted::There && has.len() == nodes.len() {
            continue;
        }
        steps.extend(has.into_iter().map(|node| SnapshotStep::Remove(json!({ "device": node, "name": id }))));
        if order.wanted == Wanted::There {
            let one = |node: &&str| json!({ "type": "blockdev-snapshot-internal-sync", "data": { "device": node, "name": id } });
            let actions: Vec<Value> = nodes.iter().map(one).collect();
            steps.push(SnapshotStep::Take(order.id, json!({ "actions": actions })));
        }
    }
    steps
}

/// Whether a node has a snapshot of this name.
fn has_snapshot(nodes: &Value, node: &str, name: &str) -> bool {
    let nodes = nodes.as_array().into_iter().flatten().filter(|n| n["node-name"] == node);
    nodes.flat_map(|n| n["image"]["snapshots"].as_array().into_iter().flatten()).any(|s| s["name"] == name)
}

/// What it means that QEMU could not read or write a disk.
pub(super) fn failure(data: &Value) -> InstanceEvent {
    // `stop` comes for a full pool only (`werror=enospc`, QEMU's default): the request is tried again when the guest goes on.
    if data["action"] == "stop" {
        return InstanceEvent::Stalled;
    }
    let text = |field: &str| data[field].as_str().unwrap_or("?").chars().take(100).collect::<String>();
    let what = if data["operation"] == "read" { "read" } else { "written" };
    InstanceEvent::DiskFailed(format!("{} cannot be {what}: {}", text("node-name"), text("reason")))
}

/// Lets a guest go on that QEMU holds still because of a full pool.
///
/// # Errors
///
/// QEMU does not say, or does not obey.
pub async fn go_on(instance: &Instance) -> Result<(), qmp::Error> {
    // Whoever stands still for another reason (sent to another host, paused by a person) is not to go on.
    if is_stalled(instance).await? {
        instance.cont().await?;
    }
    Ok(())
}

/// Whether QEMU holds the guest still because a pool is full.
///
/// # Errors
///
/// QEMU does not say.
pub async fn is_stalled(instance: &Instance) -> Result<bool, qmp::Error> {
    Ok(instance.status().await? == "io-error")
}

/// The virtual size of each node that has a name.
pub(crate) fn nodes(answer: &Value) -> BTreeMap<String, u64> {
    let nodes = answer.as_array().into_iter().flatten();
    nodes.filter_map(|n| Some((n["node-name"].as_str()?.to_owned(), n["image"]["virtual-size"].as_u64()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pool_is_told_from_a_disk_that_fails() {
        let full = json!({ "node-name": "disk0", "operation": "write", "action": "stop", "nospace": true });
        assert_eq!(failure(&full), InstanceEvent::Stalled);
        let broken =
            json!({ "node-name": "disk1", "operation": "read", "action": "report", "reason": "Input/output error" });
        let words = "disk1 cannot be read: Input/output error".to_owned();
        assert_eq!(failure(&broken), InstanceEvent::DiskFailed(words));
        assert_eq!(failure(&Value::Null), InstanceEvent::DiskFailed("? cannot be written: ?".into()));
    }

    #[test]
    fn sizes_are_read_and_nonsense_is_left_out() {
        let answer = json!([
            { "node-name": "disk0", "image": { "virtual-size": 1024 } },
            { "node-name": "odd", "image": {} },
            5,
        ]);
        assert_eq!(nodes(&answer), [("disk0".to_owned(), 1024)].into());
        assert!(nodes(&Value::Null).is_empty());
    }
}
