//! Disks and images of this host's VMs: files in pools, which are directories.
//!
//! ```text
//! POOL/.uncloud-pool                                   marker of a shared pool
//! POOL/images/<image>/{disk,kernel,initrd}             copied once, checked, never changed
//! POOL/disks/<vm>/<disk>.<disk generation>.qcow2       owned by the user that QEMU runs as
//! ```
//!
//! [`plan`] says which files (pure), [`images`] and [`disks`] make them, [`source`] opens what users name without
//! letting a path climb out, [`inspect`] answers the leader's questions about files, [`pools`] watches the pools.

mod attached;
mod bring;
mod check;
mod claim;
mod copies;
mod copy;
pub mod disks;
pub mod exports;
pub mod format;
mod grow;
pub mod http;
pub mod images;
pub mod inspect;
mod outside;
pub mod place;
pub mod plan;
pub mod pools;
pub(crate) mod room;
mod snapshots;
pub mod source;
#[cfg(test)]
mod tests;
mod void;

pub use attached::Files;
pub(crate) mod writing;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tokio::sync::{Semaphore, watch};
use uncloud_proto::ids::{HostId, VmId};

use self::{
    exports::Exports,
    http::Http,
    images::{Env, Images},
    plan::Plan,
    pools::{Pool, User},
    room::Space,
    source::Roots,
};
use crate::vm::{
    desired::{Desired, DisksExpected, Disposition, Format},
    disks::{Done, Orders},
    runner::chain,
    starts::{Starts, Turn},
};

/// Files smaller than this come faster than anybody could read how far they are.
const WORTH_TELLING: u64 = 1 << 20;
/// So many qemu-img processes run at once.
const TOOLS_AT_ONCE: usize = 4;
/// So many disks are copied at once. A copy keeps the pool busy for minutes, so it takes neither a turn to start nor one of the above.
const COPIES_AT_ONCE: usize = 2;

/// Why storage could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(#[from] plan::Problem),
    /// The pool is not as it should be.
    #[error("pool {pool} cannot be used: {problem}")]
    Pool {
        /// Its name.
        pool: String,
        /// What is wrong with it.
        problem: String,
    },
    /// P5: a disk that should be there is not. It is not made anew.
    #[error("disk {disk} is missing in pool {pool}")]
    DiskMissing {
        /// Its name.
        disk: String,
        /// The pool.
        pool: String,
    },
    /// The pool is full.
    #[error("pool {pool} is full: {what} could not be written")]
    Full {
        /// The pool.
        pool: String,
        /// What did not fit.
        what: String,
    },
    /// The pool is nearly full.
    #[error(
        "pool {pool} has {free_mib} MiB left, of which {reserve_mib} MiB stay free for the disks that are there: disk {disk} is not \
         made; make room in the pool, or choose another"
    )]
    NoRoom {
        /// The pool.
        pool: String,
        /// The disk that was to be made.
        disk: String,
        /// What is free.
        free_mib: u64,
        /// What stays free.
        reserve_mib: u64,
    },
    /// The file is not the image.
    #[error("image {image}: {source_name} has the sha256 {found}, not {expected}")]
    WrongSha256 {
        /// Name of the image.
        image: String,
        /// Where it came from.
        source_name: String,
        /// What was found.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The file is not what it should be.
    #[error("image {image}: {problem}")]
    BadImage {
        /// Name of the image.
        image: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The source of an image cannot be opened.
    #[error("image {image} cannot be fetched into pool {pool}")]
    Source {
        /// Name of the image.
        image: String,
        /// The pool that does not have it yet.
        pool: String,
        /// Why not.
        source: source::Error,
    },
    /// A file of an image could not be brought; all who waited for it are told the same.
    #[error(transparent)]
    Fetch(source::Error),
    /// A file or directory.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The host has no UEFI firmware.
    #[error("this host has no UEFI firmware at {}; install it (on Debian: apt-get install ovmf)", path.display())]
    NoFirmware {
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// A disk that is to be deleted is still served to hosts.
    #[error("{0}")]
    StillServed(String),
    /// P5: it is not there, so nothing is put back.
    #[error("disk {disk} has no snapshot {snapshot}; no disk was changed")]
    NoSnapshot {
        /// The disk.
        disk: String,
        /// Id of the snapshot.
        snapshot: uuid::Uuid,
    },
    /// P5: what a clone is to be a copy of is not there.
    #[error("disk {disk} of VM {vm}, which is to be copied, is missing in pool {pool}; delete the clone")]
    OriginMissing {
        /// The disk.
        disk: String,
        /// Whose it is.
        vm: VmId,
        /// The pool.
        pool: String,
    },
    /// The pool has too little room for a copy.
    #[error(
        "pool {pool} has {free_mib} MiB left, of which {reserve_mib} MiB stay free for the disks that are there: the copy of disk \
         {disk} may need {needed_mib} MiB and is not made; make room in the pool"
    )]
    NoRoomToCopy {
        /// The pool.
        pool: String,
        /// The disk.
        disk: String,
        /// What the copied disk takes up, with its snapshots.
        needed_mib: u64,
        /// What is free.
        free_mib: u64,
        /// What stays free.
        reserve_mib: u64,
    },
    /// qemu-img failed.
    #[error("qemu-img: disk {disk}: {words}")]
    Tool {
        /// The disk.
        disk: String,
        /// What it said.
        words: String,
    },
}

impl Error {
    /// As it is told to a leader, and to everybody who waits for the same file.
    fn to_source(&self) -> source::Error {
        use uncloud_proto::v1::FileProblemKind::{Invalid, Io};
        let kind = match self {
            Self::Source { source, .. } | Self::Fetch(source) => source.kind,
            Self::WrongSha256 { .. } | Self::BadImage { .. } => Invalid,
            Self::Plan(_)
            | Self::Pool { .. }
            | Self::DiskMissing { .. }
            | Self::Full { .. }
            | Self::NoRoom { .. }
            | Self::NoSnapshot { .. }
            | Self::OriginMissing { .. }
            | Self::NoRoomToCopy { .. }
            | Self::Io { .. }
            | Self::NoFirmware { .. }
            | Self::StillServed(_)
            | Self::Tool { .. } => Io,
        };
        source::problem(kind, self.reason())
    }

    /// With what caused it, in words.
    #[must_use]
    pub fn reason(&self) -> String {
        chain(self)
    }
}

/// What storage is made with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The pools.
    pub pools: Vec<Pool>,
    /// Directories that images may come from besides the pools.
    pub image_dirs: Vec<PathBuf>,
    /// The user that QEMU runs as. Absent: the one that the agent runs as.
    pub user: Option<User>,
    /// qemu-img.
    pub qemu_img: PathBuf,
    /// What the variables of a UEFI machine start as.
    pub uefi_vars: PathBuf,
    /// This host; part of the names of temporary files, which lie beside those of other hosts in a shared pool.
    pub host: HostId,
    /// Web servers that images may come from; or why none may.
    pub http: Result<Http, String>,
    /// Neither an image's file nor what a guest would see may be larger than this, in bytes.
    pub max_image_bytes: u64,
}

/// The storage of this host.
pub struct Storage {
    pools: BTreeMap<String, Pool>,
    user: Option<User>,
    qemu_img: PathBuf,
    uefi_vars: PathBuf,
    images: Images,
    /// How far the images of the VMs are that wait for one, in words.
    progress: watch::Sender<BTreeMap<VmId, String>>,
    tools: Semaphore,
    copying: Semaphore,
    starts: Starts,
    exports: Exports,
}

/// What a start needs, and the turn that bounds how many are under way.
#[derive(Debug)]
pub struct Prepared {
    /// The files.
    pub plan: Plan,
    /// Kept until QEMU runs.
    pub turn: Turn,
}

impl Storage {
    /// Starts wait for their turn in `starts`.
    #[must_use]
    pub fn new(options: Options, starts: Starts) -> Self {
        let roots = Arc::new(Roots::new(&options.image_dirs, &options.pools));
        let pools: BTreeMap<String, Pool> = options.pools.into_iter().map(|p| (p.name.clone(), p)).collect();
        let env = Env {
            roots,
            pools: pools.clone(),
            user: options.user,
            qemu_img: options.qemu_img.clone(),
            host: options.host,
            http: options.http,
            most: options.max_image_bytes,
        };
        Self {
            pools,
            user: options.user,
            qemu_img: options.qemu_img,
            uefi_vars: options.uefi_vars,
            images: Images::new(env),
            progress: watch::Sender::default(),
            tools: Semaphore::new(TOOLS_AT_ONCE),
            copying: Semaphore::new(COPIES_AT_ONCE),
            starts,
            exports: Exports::default(),
        }
    }

    /// The images of this host's pools.
    #[must_use]
    pub fn images(&self) -> Images {
        self.images.clone()
    }

    /// What this host serves over the network.
    #[must_use]
    pub fn exports(&self) -> Exports {
        self.exports.clone()
    }

    /// Makes those disks of a VM that lie in pools that this host exports, for whoever runs it. Idempotent, and may be dropped.
    ///
    /// # Errors
    ///
    /// As [`Storage::prepare`].
    pub async fn serve(&self, vm: VmId, desired: &Desired) -> Result<Vec<exports::plan::Disk>, Error> {
        let plan = plan::exported(vm, desired, &self.pools)?;
        self.check_pools(plan.pools()).await?;
        disks::check_expected(&plan.disks).await?;
        for fetch in &plan.fetches {
            self.images.fetch(fetch.clone(), |_| ()).await.map_err(Error::Fetch)?;
        }
        for disk in &plan.disks {
            if let Some(origin) = &disk.origin {
                let _copy = self.copying.acquire().await.expect("it is never closed");
                let tool = snapshots::Tool { path: &self.qemu_img, user: self.user };
                copy::copy(disk, origin, tool, &|_| ()).await?;
            }
        }
        self.make(&plan).await?;
        let node = |name: &str| plan::node_of(vm, name, desired.disk_generation);
        let served = |d: &plan::DiskPlan| exports::plan::Disk {
            name: d.name.clone(),
            node: node(&d.name),
            path: d.path.clone(),
            format: Format::Qcow2,
            size_bytes: d.size_bytes,
        };
        let mut served: Vec<_> = plan.disks.iter().map(served).collect();
        if let Some(vars) = &plan.firmware_vars {
            disks::make_vars(vars, self.user, &self.uefi_vars).await?;
            let (name, path) = (plan::VARS.to_owned(), vars.path.clone());
            served.push(exports::plan::Disk { node: node(&name), name, path, format: Format::Raw, size_bytes: 0 });
        }
        Ok(served)
    }

    /// Puts those disks of a VM back that lie in pools that this host exports. Nobody has them open. Idempotent, and may be dropped.
    ///
    /// # Errors
    ///
    /// A disk or the snapshot is not there, somebody has a disk open, or qemu-img failed.
    pub async fn put_back(&self, vm: VmId, desired: &Desired) -> Result<(), Error> {
        let mut disks = plan::exported(vm, desired, &self.pools)?.disks;
        self.check_pools(disks.iter().map(|d| d.pool.clone()).collect()).await?;
        disks.iter_mut().for_each(|disk| disk.expected = DisksExpected::Exist);
        disks::check_expected(&disks).await?;
        let _tool = self.tools.acquire().await.expect("it is never closed");
        let tool = snapshots::Tool { path: &self.qemu_img, user: self.user };
        let orders = Orders { revert: desired.orders.revert, ..Orders::default() };
        snapshots::tend(tool, &disks, &orders).await.map(drop)
    }

    /// The block nodes that the daemon has for the disks of a VM that lie in pools that this host exports.
    #[must_use]
    pub fn exported_nodes(&self, vm: VmId, desired: &Desired) -> Vec<String> {
        plan::exported_nodes(vm, desired, &self.pools)
    }

    async fn make(&self, plan: &Plan) -> Result<(), Error> {
        for disk in &plan.disks {
            let _tool = self.tools.acquire().await.expect("it is never closed");
            disks::make(disk, self.user, &self.qemu_img).await?;
        }
        Ok(())
    }

    /// Fetches images, copies what a clone is made of, waits for a turn, and makes the disks that are missing. Idempotent, and may be dropped.
    ///
    /// # Errors
    ///
    /// Says what is missing or failed; nothing half-made is left under its final name.
    pub async fn prepare(&self, vm: VmId, desired: &Desired) -> Result<Prepared, Error> {
        let plan = plan::plan(vm, desired, &self.pools)?;
        self.check_pools(plan.pools()).await?;
        // A disk that is missing is noticed before an image of many gigabytes is copied for nothing.
        disks::check_expected(&plan.disks).await?;
        let telling = Telling { storage: self, vm };
        for fetch in &plan.fetches {
            let said = |p: &images::Progress| telling.say(&fetch.image, p);
            self.images.fetch(fetch.clone(), said).await.map_err(Error::Fetch)?;
        }
        let tool = snapshots::Tool { path: &self.qemu_img, user: self.user };
        for disk in &plan.disks {
            if let Some(origin) = &disk.origin {
                let _copy = self.copying.acquire().await.expect("it is never closed");
                copy::copy(disk, origin, tool, &|percent| telling.copying(disk, percent)).await?;
            }
        }
        drop(telling);
        let priority = desired.spec.as_ref().map_or(0, |s| s.priority);
        let turn = self.starts.turn(priority).await;
        self.make(&plan).await?;
        // A guest that comes from another host has them open there; what is to grow grows when it goes on here.
        if desired.disposition != Disposition::Incoming {
            for disk in &plan.disks {
                let _tool = self.tools.acquire().await.expect("it is never closed");
                grow::grow(disk, self.user, &self.qemu_img).await?;
            }
        }
        if let Some(vars) = &plan.firmware_vars {
            disks::make_vars(vars, self.user, &self.uefi_vars).await?;
        }
        Ok(Prepared { plan, turn })
    }

    /// Puts disks in order that nobody has open: those that are to come are made, snapshots are taken, removed and put back, and those
    /// that are to go are deleted. Idempotent, and may be dropped.
    ///
    /// # Errors
    ///
    /// A disk is missing or in use, a snapshot to go back to is not there, or qemu-img failed.
    pub async fn tend(&self, vm: VmId, desired: &Desired) -> Result<Done, Error> {
        self.make_attached(vm, desired).await?;
        self.delete_detached(vm, desired).await?;
        let orders = &desired.orders;
        if orders.snapshots.is_empty() && orders.revert.is_none() {
            return Ok(orders.done());
        }
        let mut plan = plan::disks(vm, desired, &self.pools)?;
        self.check_pools(plan.iter().map(|d| d.pool.clone()).collect()).await?;
        plan.iter_mut().for_each(|disk| disk.expected = DisksExpected::Exist);
        disks::check_expected(&plan).await?;
        let _tool = self.tools.acquire().await.expect("it is never closed");
        let tool = snapshots::Tool { path: &self.qemu_img, user: self.user };
        snapshots::tend(tool, &plan, orders).await
    }

    /// Names a pool of this VM's that is full. `None`: all have room, as far as can be said.
    pub async fn full_pool(&self, desired: &Desired) -> Option<String> {
        for disk in desired.spec.iter().flat_map(|s| &s.disks) {
            let Some(pool) = self.pools.get(&disk.pool) else { continue };
            let path = pool.path.clone();
            if blocking(move || Space::of(&path)).await.is_ok_and(|space| !space.lets_go_on()) {
                return Some(pool.name.clone());
            }
        }
        None
    }

    /// Waits until there is something else than `last` to say of how far a VM's image is. Cancel safe.
    pub async fn progress(&self, vm: VmId, last: &str) -> String {
        let mut words = self.progress.subscribe();
        loop {
            let now = words.borrow_and_update().get(&vm).cloned();
            if let Some(now) = now.filter(|now| now != last) {
                return now;
            }
            if words.changed().await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// Deletes the files of this VM's disks, and nothing else; of one that is to be forgotten only those that are void (M7). Idempotent.
    ///
    /// # Errors
    ///
    /// A pool cannot be used, so that nobody can say what is in it; or a file cannot be removed.
    pub async fn delete(&self, vm: VmId, desired: &Desired) -> Result<(), Error> {
        if desired.disposition == Disposition::Forget {
            let Some(void) = desired.void else { return Ok(()) };
            return void::remove(vm, void, self.pools.values().cloned().collect()).await;
        }
        let removals = plan::removals(vm, desired, &self.pools)?;
        self.check_pools(removals.iter().map(|r| r.pool.clone()).collect()).await?;
        let exported = plan::exported_nodes(vm, desired, &self.pools);
        if exported.is_empty() {
            return disks::remove(removals).await;
        }
        // P5, and a guest that is still to be killed elsewhere: nobody has a file open that is not there any more.
        self.exports.withdraw(vm, desired.incarnation, exported).await.map_err(Error::StillServed)?;
        disks::remove(removals).await?;
        self.exports.forget(vm);
        Ok(())
    }

    async fn check_pools(&self, names: Vec<String>) -> Result<(), Error> {
        for name in names {
            let Some(pool) = self.pools.get(&name).cloned() else { continue };
            let user = self.user;
            let checked = blocking(move || pools::check(&pool, user)).await;
            checked.map_err(|problem| Error::Pool { pool: name, problem })?;
        }
        Ok(())
    }
}

/// Tells how far a VM's image is, until it is dropped.
struct Telling<'a> {
    storage: &'a Storage,
    vm: VmId,
}

impl Telling<'_> {
    /// In steps of five percent: each change is stored, and people need no more.
    fn say(&self, image: &str, p: &images::Progress) {
        let words = match p.total {
            // A file that is there already, or one of a kernel: nothing to tell.
            total if p.done == 0 || total < WORTH_TELLING => return,
            total => {
                let percent = u128::from(p.done) * 20 / u128::from(total) * 5;
                format!("fetching image {image}: {percent} % of {} MiB", total >> 20)
            }
        };
        self.tell(words);
    }

    /// Likewise.
    fn copying(&self, disk: &plan::DiskPlan, percent: u8) {
        self.tell(format!("copying disk {}: {} %", disk.name, percent / 5 * 5));
    }

    fn tell(&self, words: String) {
        self.storage.progress.send_if_modified(|all| all.insert(self.vm, words.clone()).as_ref() != Some(&words));
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.storage.progress.send_if_modified(|all| all.remove(&self.vm).is_some());
    }
}

/// Runs what may wait for a disk beside the tasks.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("it does not panic, and the runtime ends after the tasks")
}

/// Whether an error says that there is no room.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
