//! Snapshots inside the qcow2 files of disks that nobody has open, by qemu-img. Its image lock refuses what somebody has open.
//!
//! Each step is idempotent, so work that was broken off is simply done again.

use std::path::Path;

use serde::Deserialize;
use tokio::process::Command;
use tracing::info;
use uuid::Uuid;

use super::{
    Error,
    disks::{output_of, run},
    plan::DiskPlan,
    pools::User,
};
use crate::vm::disks::{Done, GuestThen, Orders, Wanted};

/// qemu-img, and who it runs as.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tool<'a> {
    pub(super) path: &'a Path,
    pub(super) user: Option<User>,
}

/// What `qemu-img info` says, as far as it matters.
#[derive(Debug, Deserialize)]
struct Info {
    #[serde(default)]
    snapshots: Vec<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

impl Tool<'_> {
    async fn names(self, disk: &DiskPlan) -> Result<Vec<String>, Error> {
        let mut command = Command::new(self.path);
        command.args(["info", "--output=json", "-f", "qcow2", "--"]).arg(&disk.path);
        let output = output_of(command, disk, self.user).await?;
        let failed = |e: serde_json::Error| Error::Tool { disk: disk.name.clone(), words: e.to_string() };
        let info: Info = serde_json::from_slice(&output).map_err(failed)?;
        Ok(info.snapshots.into_iter().map(|s| s.name).collect())
    }

    async fn snapshot(self, what: &str, id: Uuid, disk: &DiskPlan) -> Result<(), Error> {
        let mut command = Command::new(self.path);
        command.args(["snapshot", "-q", what]).arg(id.to_string()).arg("--").arg(&disk.path);
        run(command, disk, self.user).await
    }
}

/// Takes, removes and puts back what is ordered.
///
/// A snapshot that only some of the disks have was never said to be there: it is taken anew. Disks are put back only if all of
/// them have the snapshot.
pub(super) async fn tend(tool: Tool<'_>, disks: &[DiskPlan], orders: &Orders) -> Result<Done, Error> {
    let mut done = orders.done();
    let mut names = Vec::with_capacity(disks.len());
    for disk in disks {
        names.push(tool.names(disk).await?);
    }
    let having = |id: Uuid| {
        let id = id.to_string();
        disks.iter().zip(&names).filter(move |(_, names)| names.contains(&id)).map(|(disk, _)| disk)
    };
    for order in &orders.snapshots {
        if order.wanted == Wanted::There && having(order.id).count() == disks.len() {
            continue;
        }
        for disk in having(order.id) {
            tool.snapshot("-d", order.id, disk).await?;
        }
        if order.wanted == Wanted::There {
            for disk in disks {
                tool.snapshot("-c", order.id, disk).await?;
            }
            done.guests.insert(order.id, GuestThen::Off);
            info!(snapshot = %order.id, "a snapshot is taken");
        }
    }
    let Some(revert) = orders.revert else { return Ok(done) };
    let missing = disks.iter().zip(&names).find(|(_, names)| !names.contains(&revert.snapshot.to_string()));
    if let Some((disk, _)) = missing {
        return Err(Error::NoSnapshot { disk: disk.name.clone(), snapshot: revert.snapshot });
    }
    for disk in disks {
        tool.snapshot("-a", revert.snapshot, disk).await?;
    }
    info!(snapshot = %revert.snapshot, "the disks are put back");
    Ok(done)
}
