//! Live migration in QEMU's words: what it is told for each step, and what it says of itself.
//!
//! The connection is QEMU's own, over TCP, and TLS with a key that both sides know and nobody else (`tls-creds-psk`): whoever
//! else connects does not get past the handshake. The key is good for one migration. It goes to QEMU in a file that only
//! root and QEMU's group can read, because on QMP or on the command line it would end up in logs.

use std::{
    fs, io,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, lchown},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    mirror,
    process::{Instance, VmUser},
    qmp,
};
use crate::vm::migration::{Copies, Guest, MigrateTo, Mirror, Progress, Standing, Step, Transfer};

/// Name of the key's object in QEMU, and of its directory in the VM's.
pub(super) const CREDENTIALS: &str = "migration";
/// Who the source says that it is. The key is what counts.
const USER: &str = "uncloud";
/// A group for the key exchange (RFC 7919, ffdhe2048). Without it the target's QEMU makes one of its own each time, which takes
/// seconds.
const GROUP: &str = include_str!("ffdhe2048.pem");
/// What QEMU takes for "no limit", in bytes per second. Its own default is 128 MiB.
const NO_LIMIT: u64 = 1 << 40;

/// Where QEMUs of this host listen for guests from other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The address.
    pub address: IpAddr,
    /// The first and the last port. `None`: the kernel picks one.
    pub ports: Option<(u16, u16)>,
}

impl Listen {
    fn uri(self) -> String {
        match self.ports {
            None => format!("tcp:{}", SocketAddr::new(self.address, 0)),
            Some((first, last)) => format!("tcp:{},to={last}", SocketAddr::new(self.address, first)),
        }
    }
}

/// Why a step was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU was not told, or did not do it.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// The key could not be put where QEMU finds it.
    #[error("the key of the migration cannot be written into {}: {source}", path.display())]
    Key {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// This host takes nobody.
    #[error("this host's agent has no --migration-address")]
    NoAddress,
    /// There is no port for the disks.
    #[error("no port of --migration-ports is free to take the disks on")]
    NoPort,
    /// The target does not take connections.
    #[error("the target cannot be reached at {address}: {why}; do the hosts reach each other?")]
    Unreachable {
        /// Where it takes disks.
        address: SocketAddr,
        /// Why not.
        why: String,
    },
    /// A disk is not the same on both sides.
    #[error("copying its disks failed: {0}")]
    NotCopied(String),
}

/// Has QEMU take a step. A step that it has taken before does no harm.
///
/// # Errors
///
/// See [`Error`]. What QEMU has done then, [`standing`] tells.
pub async fn step(
    instance: &Instance,
    vm_dir: &Path,
    user: Option<VmUser>,
    listen: Option<Listen>,
    step: &Step,
) -> Result<(), Error> {
    match step {
        Step::Listen { secret, disks } => {
            let listen = listen.ok_or(Error::NoAddress)?;
            capabilities(instance).await?;
            credentials(instance, vm_dir, user, secret, "server").await?;
            instance.execute("migrate-set-parameters", Some(json!({ "tls-creds": CREDENTIALS }))).await?;
            // First, so that who sees where memory is taken sees where disks are.
            mirror::serve(instance, listen, disks).await?;
            instance.execute("migrate-incoming", Some(json!({ "uri": listen.uri() }))).await?;
        }
        Step::Send(to) => {
            credentials(instance, vm_dir, user, &to.secret, "client").await?;
            match &to.disks {
                Some(disks) => mirror::begin(instance, disks, to.bytes_per_second).await?,
                None => send(instance, to).await?,
            }
        }
        Step::SendMemory(to) => send(instance, to).await?,
        Step::Continue(copies) => {
            match copies {
                Copies::None => {}
                Copies::Possible => mirror::impatiently(instance, mirror::finish(instance)).await?,
            }
            instance.execute("migrate-continue", Some(json!({ "state": "pre-switchover" }))).await?;
        }
        Step::Cancel => {
            // First: QEMU waits for what the disks' connections have under way, with its guest, when its migration ends.
            mirror::cut(instance).await?;
            cancel(instance).await?;
            mirror::cancel(instance).await?;
        }
        Step::Pause => {
            instance.execute("stop", None).await?;
        }
        Step::Resume => {
            mirror::close(instance).await?;
            instance.cont().await?;
            // Nobody needs it any more. What is left is overwritten by the next, and goes with the VM's directory.
            let _ = fs::remove_dir_all(vm_dir.join(CREDENTIALS));
        }
    }
    Ok(())
}

async fn send(instance: &Instance, to: &MigrateTo) -> Result<(), Error> {
    capabilities(instance).await?;
    let bandwidth = if to.bytes_per_second == 0 { NO_LIMIT } else { to.bytes_per_second };
    let parameters = json!({ "tls-creds": CREDENTIALS, "max-bandwidth": bandwidth });
    instance.execute("migrate-set-parameters", Some(parameters)).await?;
    instance.execute("migrate", Some(json!({ "uri": format!("tcp:{}", to.address) }))).await?;
    Ok(())
}

/// A migration that is cancelled in the moment in which QEMU stops the guest before the last of it waits for ever to be told to
/// send that, with the guest standing still (QEMU 7.2, one of 60 cancellations of a small guest). That word does no harm: a
/// migration that is being cancelled sends nothing any more, and one that has not got there yet does not wait.
async fn cancel(instance: &Instance) -> Result<(), qmp::Error> {
    instance.execute("migrate_cancel", None).await?;
    match instance.execute("migrate-continue", Some(json!({ "state": "cancelling" }))).await {
        // It is over already.
        Ok(_) | Err(qmp::Error::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}

/// The same on both sides, or QEMU refuses.
async fn capabilities(instance: &Instance) -> Result<(), qmp::Error> {
    // return-path: the source is done only when the target has said so. pause-before-switchover: it can be given up without
    // harm until the last moment. late-block-activate: the target takes the disks' locks when it goes on, not before. auto-converge:
    // a guest that writes faster than it can be sent is slowed until it can.
    let names = ["return-path", "pause-before-switchover", "late-block-activate", "auto-converge", "events"];
    let list: Vec<Value> = names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    instance.execute("migrate-set-capabilities", Some(json!({ "capabilities": list }))).await.map(drop)
}

async fn credentials(
    instance: &Instance,
    vm_dir: &Path,
    user: Option<VmUser>,
    secret: &str,
    endpoint: &str,
) -> Result<(), Error> {
    let dir = vm_dir.join(CREDENTIALS);
    write_key(&dir, user, secret).map_err(|source| Error::Key { path: dir.clone(), source })?;
    // There is one from an earlier migration, or there is none.
    match instance.execute("object-del", Some(json!({ "id": CREDENTIALS }))).await {
        Ok(_) | Err(qmp::Error::Refused { .. }) => {}
        Err(other) => return Err(other.into()),
    }
    let mut object = json!({
        "qom-type": "tls-creds-psk",
        "id": CREDENTIALS,
        "endpoint": endpoint,
        "dir": dir.to_string_lossy(),
    });
    if endpoint == "client" {
        object["username"] = USER.into();
    }
    instance.execute("object-add", Some(object)).await?;
    Ok(())
}

/// `keys.psk` and `dh-params.pem`, as QEMU wants them, readable by root and by QEMU's group. The VM's directory belongs to root.
fn write_key(dir: &Path, user: Option<VmUser>, secret: &str) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    fs::DirBuilder::new().mode(0o750).create(dir)?;
    for (name, text) in [("keys.psk", format!("{USER}:{secret}\n")), ("dh-params.pem", GROUP.to_owned())] {
        let path = dir.join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path)?;
        file.write_all(text.as_bytes())?;
        if let Some(user) = user {
            lchown(&path, None, Some(user.gid))?;
        }
    }
    if let Some(user) = user {
        lchown(dir, None, Some(user.gid))?;
    }
    Ok(())
}

/// What QEMU says of itself.
///
/// # Errors
///
/// It does not.
pub async fn standing(instance: &Instance, copies: Copies) -> Result<Standing, qmp::Error> {
    let asked = instance.execute("query-migrate", None);
    let migration = match copies {
        Copies::None => asked.await?,
        Copies::Possible => mirror::impatiently(instance, asked).await?,
    };
    // Second, so that a guest that stands still because all was sent is never taken for one that still executes.
    let status = instance.execute("query-status", None).await?;
    let mut standing = parse(&migration, &status);
    match copies {
        Copies::None => {}
        Copies::Possible => {
            (standing.mirror, standing.disks_address) =
                mirror::standing(instance, &mut standing.progress, standing.address).await?;
        }
    }
    Ok(standing)
}

fn parse(migration: &Value, status: &Value) -> Standing {
    let transfer = match migration["status"].as_str() {
        Some("setup" | "active" | "wait-unplug") => Transfer::Active,
        Some("pre-switchover") => Transfer::Ready,
        // `colo` and the postcopy states never come: nobody asks for them.
        Some("device" | "postcopy-active" | "postcopy-paused" | "postcopy-recover" | "colo") => Transfer::Last,
        Some("completed") => Transfer::Completed,
        Some("failed") => Transfer::Failed,
        Some("cancelling") => Transfer::Cancelling,
        Some("cancelled") => Transfer::Cancelled,
        Some("none") | None => Transfer::None,
        // Something of a newer QEMU. What is not known is not over.
        Some(_) => Transfer::Last,
    };
    let guest = match status["status"].as_str() {
        Some("running") => Guest::Executes,
        Some("inmigrate") => Guest::Awaited,
        Some("postmigrate") => Guest::Sent,
        Some("shutdown") => Guest::Off,
        Some("guest-panicked") => Guest::Panicked,
        Some(_) | None => Guest::Still,
    };
    let ram = &migration["ram"];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let megabits = ram["mbps"].as_f64().unwrap_or(0.0).clamp(0.0, 1e9);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
    let bytes_per_second = (megabits * 125_000.0) as u64;
    let downtime = number(&migration["downtime"]).max(number(&migration["expected-downtime"]));
    Standing {
        guest,
        transfer,
        address: listens(&migration["socket-address"]),
        disks_address: None,
        mirror: Mirror::None,
        progress: Progress {
            transferred_bytes: number(&ram["transferred"]),
            remaining_bytes: number(&ram["remaining"]),
            bytes_per_second,
            expected_downtime_ms: u32::try_from(downtime).unwrap_or(u32::MAX),
        },
        problem: migration["error-desc"].as_str().unwrap_or_default().chars().take(500).collect(),
    }
}

fn listens(addresses: &Value) -> Option<SocketAddr> {
    let first = addresses.as_array()?.first()?;
    let address: IpAddr = first["host"].as_str()?.parse().ok()?;
    Some(SocketAddr::new(address, first["port"].as_str()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says_is_understood() {
        let waiting =
            json!({ "socket-address": [{ "port": "33321", "ipv4": true, "host": "127.0.0.1", "type": "inet" }] });
        let standing = parse(&waiting, &json!({ "status": "inmigrate", "running": false }));
        assert_eq!((standing.guest, standing.transfer), (Guest::Awaited, Transfer::None));
        assert_eq!(standing.address, Some("127.0.0.1:33321".parse().unwrap()));

        let active = json!({
            "status": "active", "expected-downtime": 300,
            "ram": { "transferred": 1000, "remaining": 2000, "mbps": 8.0 },
        });
        let standing = parse(&active, &json!({ "status": "running" }));
        assert_eq!((standing.guest, standing.transfer), (Guest::Executes, Transfer::Active));
        assert_eq!(
            standing.progress,
            Progress {
                transferred_bytes: 1000,
                remaining_bytes: 2000,
                bytes_per_second: 1_000_000,
                expected_downtime_ms: 300
            }
        );

        let failed = json!({ "status": "failed", "error-desc": "TLS handshake failed" });
        assert_eq!(parse(&failed, &json!({ "status": "running" })).problem, "TLS handshake failed");
        // Unknown is never taken for an end, nor for a guest that executes.
        let odd = parse(&json!({ "status": "new-word" }), &json!({ "status": "new-word" }));
        assert_eq!((odd.guest, odd.transfer), (Guest::Still, Transfer::Last));
    }

    #[test]
    fn a_target_listens_where_it_was_told_to() {
        let v6 = Listen { address: "::1".parse().unwrap(), ports: None };
        assert_eq!(v6.uri(), "tcp:[::1]:0");
        let range = Listen { address: "10.0.0.7".parse().unwrap(), ports: Some((49_152, 49_215)) };
        assert_eq!(range.uri(), "tcp:10.0.0.7:49152,to=49215");
    }

    #[test]
    fn only_the_newest_key_is_kept_and_not_everybody_reads_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let vm_dir = tempfile::tempdir().unwrap();
        let dir = vm_dir.path().join(CREDENTIALS);
        for secret in ["ab", "cd"] {
            write_key(&dir, None, secret).unwrap();
        }
        assert_eq!(fs::read_to_string(dir.join("keys.psk")).unwrap(), "uncloud:cd\n");
        assert_eq!(fs::metadata(dir.join("keys.psk")).unwrap().permissions().mode() & 0o7, 0);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7, 0);
    }
}
