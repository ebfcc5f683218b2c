//! Where a disk is for QEMU. Pure.
//!
//! A kind of pool that QEMU reaches by another driver is one more variant here: what QEMU is told ([`Place::blockdev`]), and
//! in [`super::plan`] who makes the disk.

use std::{net::SocketAddr, path::PathBuf};

use serde_json::{Value, json};

use crate::vm::desired::DiskCache;

/// How long a guest's reads and writes wait for a storage host that is gone, in seconds: 30 days. Shorter, and the guest gets
/// an error for what a cable or a reboot would have mended, and many file systems go read-only.
const RECONNECT_SECONDS: u32 = 30 * 24 * 3600;

/// Where a disk is for QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file on this host: qcow2, or the variables of UEFI.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// Served over the network, to one incarnation of the VM.
    Export {
        /// Where.
        address: SocketAddr,
        /// Under which name. It carries the incarnation: who has an older one gets nothing.
        export: String,
    },
}

impl Place {
    /// What QEMU is told of it, as the block node `node`, if it is the variables of UEFI.
    #[must_use]
    pub fn flash(&self, node: &str) -> Value {
        match self {
            Self::File { path } => raw(node, &path.to_string_lossy()),
            Self::Export { .. } => self.blockdev(node, DiskCache::None),
        }
    }

    /// What QEMU is told of it, as the block node `node`, if it is a disk.
    #[must_use]
    pub fn blockdev(&self, node: &str, cache: DiskCache) -> Value {
        match self {
            Self::File { path } => {
                let mut qcow2 = qcow2(node, &path.to_string_lossy());
                match cache {
                    DiskCache::None => {}
                    // What the guest has flushed is flushed to the pool with each of them; never said to be without being so.
                    DiskCache::Writethrough | DiskCache::Writeback => qcow2["file"]["cache"]["direct"] = json!(false),
                }
                qcow2
            }
            Self::Export { address, export } => json!({
                "driver": "nbd",
                "node-name": node,
                "discard": "unmap",
                "server": { "type": "inet", "host": address.ip().to_string(), "port": address.port().to_string() },
                "export": export,
                "reconnect-delay": RECONNECT_SECONDS,
            }),
        }
    }
}

/// A qcow2 file as a block node, for QEMU and for the daemon that serves disks.
#[must_use]
pub fn qcow2(node: &str, path: &str) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": node,
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": path,
            // A second writer of the file is refused (the second line behind the lease).
            "locking": "on",
            // Past the host's page cache: what the guest has flushed lies in the pool, and a QEMU that was killed
            // leaves nothing on its way that is written later.
            "cache": { "direct": true },
            "discard": "unmap",
        },
    })
}

/// A file as it is as a block node, likewise.
#[must_use]
pub fn raw(node: &str, path: &str) -> Value {
    json!({
        "driver": "raw",
        "node-name": node,
        "file": { "driver": "file", "filename": path, "locking": "on", "cache": { "direct": true } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_opened_by_its_name_and_waited_for() {
        let place = Place::Export { address: "[fd00::1]:10809".parse().unwrap(), export: "vm-x.3.root".into() };
        let found = place.blockdev("disk0", DiskCache::None);
        assert_eq!(found["export"], "vm-x.3.root");
        assert_eq!((&found["server"]["host"], &found["server"]["port"]), (&json!("fd00::1"), &json!("10809")));
        assert!(found["reconnect-delay"].as_u64().unwrap() > 3600);
        assert_eq!(Place::File { path: "/p/x".into() }.blockdev("disk0", DiskCache::None)["file"]["filename"], "/p/x");
        let cached = Place::File { path: "/p/x".into() }.blockdev("disk0", DiskCache::Writeback);
        assert_eq!(cached["file"]["cache"]["direct"], false);
    }
}
