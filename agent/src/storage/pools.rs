//! Pools: where they are, what is wrong with them, how full they are.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use uncloud_proto::{names, v1};
use uuid::Uuid;

use super::{blocking, exports::options::NetworkPool};

/// Marker of a shared pool.
const MARKER: &str = ".uncloud-pool";
/// How often the pools are looked at.
const PERIOD: Duration = Duration::from_secs(10);
/// A pool that takes longer to answer hangs, as a network mount whose server is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pool of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Its directory, absolute.
    pub path: PathBuf,
    /// Whether others have it, too.
    pub kind: Kind,
}

/// Whether a pool is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory of this host alone.
    Local,
    /// The same directory on several hosts, with a marker.
    Shared,
    /// A directory of this host, with a marker, whose disks are served at this address.
    Exported(SocketAddr),
}

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Its id.
    pub uid: u32,
    /// Its group's id.
    pub gid: u32,
}

/// Content of the marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Hosts that find the same id here share the pool.
    pub id: Uuid,
    /// For people.
    #[serde(default)]
    pub name: String,
}

/// Checks that a pool can be used. Returns the id in its marker, if it is shared.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn check(pool: &Pool, user: Option<User>) -> Result<Option<Uuid>, String> {
    let path = pool.path.display();
    match fs::metadata(&pool.path) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => return Err(format!("{path} is not a directory")),
        Err(e) => return Err(format!("{path}: {e}; make the directory, or mount what belongs there")),
    }
    if let Some(user) = user {
        reachable(&pool.path, user)?;
    }
    match pool.kind {
        Kind::Local => Ok(None),
        Kind::Shared | Kind::Exported(_) => marker(&pool.path).map(|m| Some(m.id)),
    }
}

fn marker(dir: &Path) -> Result<Marker, String> {
    let path = dir.join(MARKER);
    let init = format!("is it mounted? For a new pool, run: uncloud-agent init-pool {}", dir.display());
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{} cannot be read: {e}", path.display())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(format!("the marker {} of a shared pool is missing; {init}", path.display()))
        }
        Err(e) => Err(format!("{} cannot be read: {e}", path.display())),
    }
}

/// Makes a directory a shared pool with this id.
///
/// # Errors
///
/// It is one already, or the marker cannot be written.
pub fn init(dir: &Path, name: &str, id: Uuid) -> Result<Marker, String> {
    if !name.is_empty() {
        names::check(name).map_err(|e| format!("--name {e}"))?;
    }
    let failed = |e: io::Error| format!("{}: {e}", dir.display());
    fs::create_dir_all(dir).map_err(failed)?;
    let path = dir.join(MARKER);
    if path.exists() {
        return Err(format!("{} is a shared pool already: {} is there", dir.display(), path.display()));
    }
    let marker = Marker { id, name: name.to_owned() };
    let json = serde_json::to_vec(&marker).map_err(|e| e.to_string())?;
    let temporary = dir.join(format!("{MARKER}.{id}.tmp"));
    fs::write(&temporary, json).map_err(failed)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o644)).map_err(failed)?;
    // A link does not replace the marker that somebody else has just made.
    let linked = fs::hard_link(&temporary, &path);
    fs::remove_file(&temporary).map_err(failed)?;
    linked.map_err(failed)?;
    Ok(marker)
}

/// Checks that `user` may pass through every directory on the way to `path`, and through `path` itself.
///
/// # Errors
///
/// Names the first directory that is closed, and what to do.
pub fn reachable(path: &Path, user: User) -> Result<(), String> {
    let real = fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut dirs: Vec<&Path> = real.ancestors().collect();
    dirs.reverse();
    for dir in dirs {
        let metadata = fs::metadata(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        if !may_search(metadata.mode(), metadata.uid(), metadata.gid(), user) && !kernel_says_yes(dir, user) {
            return Err(format!(
                "{} is closed to the user that VMs run as (uid {}, gid {}), who must pass through it to {}: \
                 chmod o+x {}, or choose another user (--vm-user)",
                dir.display(),
                user.uid,
                user.gid,
                path.display(),
                dir.display()
            ));
        }
    }
    Ok(())
}

/// By the permission bits. VMs have no supplementary groups.
const fn may_search(mode: u32, owner: u32, group: u32, user: User) -> bool {
    let bit = match user {
        User { uid: 0, .. } => return true,
        User { uid, .. } if uid == owner => 0o100,
        User { gid, .. } if gid == group => 0o010,
        User { .. } => 0o001,
    };
    mode & bit != 0
}

/// The bits do not show access lists, so before a directory is called closed, the kernel is asked as that user.
fn kernel_says_yes(dir: &Path, user: User) -> bool {
    use std::os::unix::process::CommandExt;
    let mut test = Command::new("/usr/bin/test");
    test.arg("-x").arg(dir).uid(user.uid).gid(user.gid).stdin(Stdio::null()).stderr(Stdio::null());
    test.current_dir("/").status().is_ok_and(|s| s.success())
}

/// A pool as it is now.
#[must_use]
pub fn look(pool: &Pool, user: Option<User>) -> v1::Pool {
    let (id, problem) = match check(pool, user) {
        Ok(id) => (id.map(|id| id.to_string()).unwrap_or_default(), String::new()),
        Err(problem) => (String::new(), problem),
    };
    let space = rustix::fs::statvfs(&pool.path).ok();
    let bytes = |blocks: fn(&rustix::fs::StatVfs) -> u64| space.as_ref().map_or(0, |s| blocks(s) * s.f_frsize);
    v1::Pool {
        name: pool.name.clone(),
        kind: kind_to_proto(pool.kind).into(),
        id,
        capacity_bytes: bytes(|s| s.f_blocks),
        free_bytes: bytes(|s| s.f_bavail),
        problem,
        export_address: address_of(pool),
    }
}

const fn kind_to_proto(kind: Kind) -> v1::PoolKind {
    match kind {
        Kind::Local => v1::PoolKind::Local,
        Kind::Shared => v1::PoolKind::Shared,
        Kind::Exported(_) => v1::PoolKind::Exported,
    }
}

fn address_of(pool: &Pool) -> String {
    match pool.kind {
        Kind::Local | Kind::Shared => String::new(),
        Kind::Exported(address) => address.to_string(),
    }
}

/// A pool that another host serves, as the leader hears of it. Whether it can be reached is found out when a VM is started.
#[must_use]
pub fn network(pool: &NetworkPool) -> v1::Pool {
    v1::Pool {
        name: pool.name.clone(),
        kind: v1::PoolKind::Network.into(),
        id: pool.id.to_string(),
        ..v1::Pool::default()
    }
}

/// Whether the leader should hear about it.
fn is_news(old: &v1::Pool, new: &v1::Pool) -> bool {
    let moved = old.free_bytes.abs_diff(new.free_bytes) > old.capacity_bytes / 100;
    moved || old.problem != new.problem || old.id != new.id || old.capacity_bytes != new.capacity_bytes
}

/// How long the start of the agent waits for the first look. The lease does not wait for a pool.
const FIRST_PATIENCE: Duration = Duration::from_millis(300);

type Pending = Option<tokio::task::JoinHandle<v1::Pool>>;

/// Looks at one pool for a bounded time. When it does not answer, the look goes on in the background, and `pending`
/// keeps the next one from piling up on it.
async fn look_patiently(pool: Pool, user: Option<User>, patience: Duration, pending: &mut Pending) -> v1::Pool {
    let hung = v1::Pool {
        name: pool.name.clone(),
        kind: kind_to_proto(pool.kind).into(),
        problem: format!("{} has not answered for {patience:?}", pool.path.display()),
        export_address: address_of(&pool),
        ..v1::Pool::default()
    };
    let looking = pending.get_or_insert_with(|| tokio::spawn(blocking(move || look(&pool, user))));
    match time::timeout(patience, looking).await {
        Ok(found) => {
            *pending = None;
            found.unwrap_or(hung)
        }
        Err(_) => hung,
    }
}

/// Looks at all pools every ten seconds, and puts them into `sender` when there is news. The first look is done when
/// this returns.
pub async fn watch(
    pools: Vec<Pool>,
    user: Option<User>,
    cancel: CancellationToken,
) -> (watch::Receiver<Vec<v1::Pool>>, impl Future<Output = ()> + Send + 'static) {
    let mut pending: Vec<Pending> = pools.iter().map(|_| None).collect();
    let first = look_at_all(&pools, user, FIRST_PATIENCE, &mut pending).await;
    for pool in &first {
        if pool.problem.is_empty() {
            info!(pool = pool.name, free = pool.free_bytes, "pool");
        } else {
            error!(pool = pool.name, "the pool cannot be used: {}", pool.problem);
        }
    }
    let (sender, receiver) = watch::channel(first);
    let task = async move {
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = time::sleep(PERIOD) => {}
            }
            let now = look_at_all(&pools, user, PATIENCE, &mut pending).await;
            let before = sender.borrow().clone();
            for (old, new) in before.iter().zip(&now).filter(|(old, new)| old.problem != new.problem) {
                match new.problem.as_str() {
                    "" => info!(pool = new.name, was = old.problem, "the pool can be used again"),
                    problem => error!(pool = new.name, "the pool cannot be used: {problem}"),
                }
            }
            if before.iter().zip(&now).any(|(old, new)| is_news(old, new)) {
                sender.send_replace(now);
            }
        }
    };
    (receiver, task)
}

async fn look_at_all(pools: &[Pool], user: Option<User>, patience: Duration, pending: &mut [Pending]) -> Vec<v1::Pool> {
    let looks = pools.iter().cloned().zip(pending).map(|(pool, p)| look_patiently(pool, user, patience, p));
    futures_util::future::join_all(looks).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: User = User { uid: 65534, gid: 65534 };

    #[test]
    fn permission_bits_are_read_as_the_kernel_does() {
        assert!(may_search(0o755, 0, 0, NOBODY));
        assert!(!may_search(0o754, 0, 0, NOBODY));
        assert!(may_search(0o100, 65534, 0, NOBODY));
        assert!(!may_search(0o011, 65534, 65534, NOBODY), "the owner's bit alone counts for the owner");
        assert!(may_search(0o010, 0, 65534, NOBODY));
        assert!(may_search(0, 1, 1, User { uid: 0, gid: 0 }));
    }

    #[test]
    fn the_closed_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let closed = dir.path().join("closed");
        fs::create_dir_all(closed.join("pool")).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        let error = reachable(&closed.join("pool"), NOBODY).unwrap_err();
        assert!(error.starts_with(&format!("{} is closed", closed.display())), "{error}");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(reachable(&closed.join("pool"), NOBODY), Ok(()));
    }

    #[test]
    fn a_shared_pool_without_its_marker_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        let pool = Pool { name: "p".into(), path: path.clone(), kind: Kind::Shared };
        assert!(check(&pool, None).is_err());
        let id = Uuid::from_u128(5);
        init(&path, "p", id).unwrap();
        assert_eq!(check(&pool, None), Ok(Some(id)));
        assert_eq!(look(&pool, None).id, id.to_string());
        assert!(init(&path, "p", Uuid::from_u128(6)).unwrap_err().contains("already"));
        fs::write(path.join(MARKER), "{").unwrap();
        assert!(look(&pool, None).problem.contains("cannot be read"));
        fs::remove_file(path.join(MARKER)).unwrap();
        assert!(look(&pool, None).problem.contains("init-pool"));
    }

    #[test]
    fn a_percent_is_news_and_a_byte_is_not() {
        let pool = v1::Pool { capacity_bytes: 1000, free_bytes: 500, ..v1::Pool::default() };
        assert!(!is_news(&pool, &v1::Pool { free_bytes: 491, ..pool.clone() }));
        assert!(is_news(&pool, &v1::Pool { free_bytes: 489, ..pool.clone() }));
        assert!(is_news(&pool, &v1::Pool { problem: "x".into(), ..pool.clone() }));
    }
}
