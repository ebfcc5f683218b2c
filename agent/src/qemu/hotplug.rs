//! Disks that come to a machine while it runs, and go.
//!
//! Each step looks first at what QEMU has and is taken only if it is needed, so it may be taken again at any time: after an agent was
//! started again, and when an event was lost. Called by the VM's task through [`Hypervisor`](crate::vm::hypervisor::Hypervisor).
//!
//! # Safety argument (P5)
//!
//! * **D4** A disk counts as gone from a machine only when QEMU has neither its device nor any node that has one of its files open.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    command_line::{DiskBus, DiskPlace},
    process::Instance,
    qmp,
};

/// How long is waited for a device to leave. Without a guest's help it takes milliseconds; a machine that needs that help is asked again
/// later.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// How often QEMU is asked meanwhile whether it has.
const LEAVE_LOOK: Duration = Duration::from_millis(50);

/// Why a disk did not come or go.
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
    /// The machine still has it.
    #[error("the machine does not let go of disk {0}; it is told again")]
    Held(String),
    /// It is on a bus on which nothing comes or goes while the machine runs.
    #[error("disk {0} comes or goes only when the VM is stopped and started again")]
    NextStart(String),
}

/// Gives the machine a disk whose file, or export, `path` is, unless it has it.
///
/// # Errors
///
/// See [`Error`].
pub async fn plug(instance: &Instance, place: &DiskPlace<'_>, path: &Path) -> Result<(), Error> {
    let name = &place.disk.name;
    let failed = |source| Error::Disk { disk: name.clone(), source };
    let nodes = block_nodes(instance).await.map_err(failed)?;
    match place.disk.bus {
        DiskBus::Scsi(_) => {}
        // The machine was started with it, or it is too late.
        DiskBus::Virtio | DiskBus::Sata if is_open(&nodes, path) => return Ok(()),
        DiskBus::Virtio | DiskBus::Sata => return Err(Error::NextStart(name.clone())),
    }
    if !has_node(&nodes, &place.node) {
        instance.execute("blockdev-add", Some(place.blockdev())).await.map_err(failed)?;
    }
    if !devices(instance).await.map_err(failed)?.contains(&place.id) {
        instance.execute("device_add", Some(place.device())).await.map_err(failed)?;
        tracing::info!(disk = name, "the machine has one more disk");
    }
    Ok(())
}

/// Takes a disk from the machine, if it has it. `files` are all that the disk may have, or its export.
///
/// # Errors
///
/// See [`Error`]. The machine may have it still.
pub async fn unplug(instance: &Instance, place: &DiskPlace<'_>, files: &[PathBuf]) -> Result<(), Error> {
    let name = &place.disk.name;
    let failed = |source| Error::Disk { disk: name.clone(), source };
    match place.disk.bus {
        DiskBus::Scsi(_) => {
            leave(instance, place).await?;
            if has_node(&block_nodes(instance).await.map_err(failed)?, &place.node) {
                let node = json!({ "node-name": place.node });
                instance.execute("blockdev-del", Some(node)).await.map_err(failed)?;
                tracing::info!(disk = name, "the machine has one disk less");
            }
        }
        DiskBus::Virtio | DiskBus::Sata => {}
    }
    // D4
    let nodes = block_nodes(instance).await.map_err(failed)?;
    match (files.iter().any(|file| is_open(&nodes, file)), place.disk.bus) {
        (false, _) => Ok(()),
        (true, DiskBus::Scsi(_)) => Err(Error::Held(name.clone())),
        (true, DiskBus::Virtio | DiskBus::Sata) => Err(Error::NextStart(name.clone())),
    }
}

async fn leave(instance: &Instance, place: &DiskPlace<'_>) -> Result<(), Error> {
    let name = &place.disk.name;
    let failed = |source| Error::Disk { disk: name.clone(), source };
    if !devices(instance).await.map_err(failed)?.contains(&place.id) {
        return Ok(());
    }
    // Who was asked before may be leaving already, which is an error to QEMU. Whether it is gone is seen.
    let asked = instance.execute("device_del", Some(json!({ "id": place.id }))).await;
    let until = Instant::now() + LEAVE_LIMIT;
    while devices(instance).await.map_err(failed)?.contains(&place.id) {
        if Instant::now() >= until {
            return Err(asked.err().map_or_else(|| Error::Held(name.clone()), failed));
        }
        sleep(LEAVE_LOOK).await;
    }
    Ok(())
}

async fn block_nodes(instance: &Instance) -> Result<Value, qmp::Error> {
    instance.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await
}

fn has_node(nodes: &Value, node: &str) -> bool {
    nodes.as_array().into_iter().flatten().any(|n| n["node-name"] == node)
}

/// Whether a node has this file or export open, by whatever way QEMU writes its name. Not one whose name only begins so.
fn is_open(nodes: &Value, file: &Path) -> bool {
    let file = file.to_string_lossy();
    let goes_on = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let names =
        |name: &str| name.match_indices(&*file).any(|(at, found)| !name[at + found.len()..].starts_with(goes_on));
    let has = |n: &Value| n["file"].as_str().is_some_and(names);
    nodes.as_array().into_iter().flatten().any(has)
}

/// The ids of the machine's devices.
async fn devices(instance: &Instance) -> Result<Vec<String>, qmp::Error> {
    let answer = instance.execute("qom-list", Some(json!({ "path": "/machine/peripheral" }))).await?;
    let devices = answer.as_array().into_iter().flatten();
    Ok(devices.filter_map(|d| d["name"].as_str().map(str::to_owned)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D4
    #[test]
    fn a_file_that_a_node_has_is_open_however_it_is_named() {
        let nodes = json!([
            { "node-name": "scsi1", "file": "/p/vm/data.0.qcow2" },
            { "node-name": "#block1", "file": "json:{\"driver\": \"file\", \"filename\": \"/p/vm/more.0.qcow2\"}" },
            { "node-name": "scsi2", "file": "nbd://10.0.0.3:10809/vm-7.1.data2" },
            { "node-name": "#block2", "file": "json:{\"driver\": \"nbd\", \"export\": \"vm-7.1.more\"}" },
            { "node-name": "odd" },
            5,
        ]);
        assert!(is_open(&nodes, Path::new("/p/vm/data.0.qcow2")) && is_open(&nodes, Path::new("/p/vm/more.0.qcow2")));
        assert!(!is_open(&nodes, Path::new("/p/vm/other.0.qcow2")) && !is_open(&Value::Null, Path::new("/p/x")));
        assert!(is_open(&nodes, Path::new("vm-7.1.data2")) && is_open(&nodes, Path::new("vm-7.1.more")));
        assert!(!is_open(&nodes, Path::new("vm-7.1.data")), "another export whose name begins so");
        assert!(has_node(&nodes, "scsi1") && !has_node(&nodes, "scsi3"));
    }
}
