//! What there is in a cluster's pools and in its process table, so that a test can compare before and after.

use std::{fs, path::Path};

use anyhow::Context as _;

use crate::{Cluster, proc_table};

/// Every file and directory of the shared pool and of each host's own, with its size, and every keeper and QEMU.
///
/// # Errors
///
/// A directory cannot be read.
pub fn of(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    walk(&cluster.pool(), &mut found)?;
    for host in &cluster.hosts {
        walk(&host.dir().join("pool"), &mut found)?;
    }
    found.extend(proc_table::under(cluster.path()).iter().map(|p| format!("{:?} of {} as {}", p.kind, p.vm, p.pid)));
    found.sort();
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            found.push(format!("{}/", entry.path().display()));
            walk(&entry.path(), found)?;
        } else {
            found.push(format!("{} {}", entry.path().display(), metadata.len()));
        }
    }
    Ok(())
}
