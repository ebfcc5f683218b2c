//! Brings image files into pools: once per pool, checked by their sha256, never changed afterwards.
//!
//! ```text
//!  path on this host ─┐
//!  web server         ├─▶ pieces ─▶ temporary file ─▶ checked ─▶ synced ─▶ its name
//!  a client's upload ─┘
//! ```
//!
//! A file appears under its name only when it is complete, checked and on disk. On one host, all who want the same file wait for one
//! task; of several hosts that share a pool one brings the file and the others wait for it ([`super::claim`]). The task belongs to
//! nobody: who asked may go and come again. When nobody has wanted the file for [`UNWANTED`], it is given up.
//!
//! Whatever fails or is given up leaves nothing: no temporary file, no lock, no empty directory.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    time,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uncloud_proto::{
    ids::{HostId, ImageId},
    v1::{self, FileProblemKind},
};

use super::{
    Error, blocking,
    bring::{Turn, bring, clean_up, read_source},
    copies,
    http::Http,
    plan::Fetch,
    pools::{self, Pool, User},
    source::{self, Roots, problem},
    writing::Feed,
};
use crate::vm::desired::{Format, Role};

/// So many files are copied at once from paths. More would only share the same disk.
const COPIES_AT_ONCE: usize = 2;
/// So many files come at once from web servers, which may be slow without this host having anything to do.
const DOWNLOADS_AT_ONCE: usize = 4;
/// So many files come at once from clients.
const UPLOADS_AT_ONCE: usize = 4;
/// So many images are remembered that have been removed: those whose fetch could still be about to begin.
const REMOVED: usize = 1024;
/// How long a file goes on coming that nobody waits for. A leader that has just been elected needs some seconds to ask again.
const UNWANTED: Duration = Duration::from_secs(60);

/// What this host has to bring images with.
#[derive(Debug)]
pub struct Env {
    /// Where files may come from.
    pub roots: Arc<Roots>,
    /// The pools.
    pub pools: BTreeMap<String, Pool>,
    /// The user that QEMU, and what reads images, runs as.
    pub user: Option<User>,
    /// qemu-img.
    pub qemu_img: PathBuf,
    /// This host; part of the names of temporary files.
    pub host: HostId,
    /// Web servers. Absent: this host fetches nothing from the network, for this reason.
    pub http: Result<Http, String>,
    /// Neither a file nor what a guest would see may be larger than this, in bytes.
    pub most: u64,
}

/// What was found out about a file that is in its pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its sha256.
    pub sha256: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Format, for a disk.
    pub format: Option<Format>,
    /// What a guest would see, for a disk.
    pub virtual_size: u64,
}

impl Facts {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> v1::FileFacts {
        let format = match self.format {
            None => v1::ImageFormat::Unspecified,
            Some(Format::Raw) => v1::ImageFormat::Raw,
            Some(Format::Qcow2) => v1::ImageFormat::Qcow2,
        };
        v1::FileFacts {
            sha256: self.sha256.clone(),
            size_bytes: self.size_bytes,
            format: format.into(),
            virtual_size_bytes: self.virtual_size,
        }
    }
}

/// How far a file has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are there.
    pub done: u64,
    /// Bytes that there will be; 0: not known.
    pub total: u64,
    /// How it ended.
    pub ended: Option<Result<Facts, source::Error>>,
}

#[derive(Debug)]
struct Running {
    /// Neither keeps the task's end from those who wait, nor counts as one of them.
    progress: Weak<watch::Sender<Progress>>,
    cancel: CancellationToken,
    image: ImageId,
}

#[derive(Debug, Default)]
struct Known {
    running: BTreeMap<PathBuf, Running>,
    /// Images are never made again under the same id. The oldest first.
    removed: VecDeque<ImageId>,
}

/// The images of this host's pools. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    env: Arc<Env>,
    known: Arc<Mutex<Known>>,
    copies: Arc<Semaphore>,
    downloads: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    unwanted_for: Duration,
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

impl Images {
    /// With what this host has.
    #[must_use]
    pub fn new(env: Env) -> Self {
        Self {
            env: Arc::new(env),
            known: Arc::default(),
            copies: Arc::new(Semaphore::new(COPIES_AT_ONCE)),
            downloads: Arc::new(Semaphore::new(DOWNLOADS_AT_ONCE)),
            uploads: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)),
            unwanted_for: UNWANTED,
        }
    }

    /// Of a host without pools: it brings nothing.
    #[must_use]
    pub fn without_pools(roots: Arc<Roots>, host: HostId) -> Self {
        Self::new(Env {
            roots,
            pools: BTreeMap::new(),
            user: None,
            qemu_img: PathBuf::from("qemu-img"),
            host,
            http: Err("this host fetches nothing from the network".to_owned()),
            most: u64::MAX,
        })
    }

    /// What this host has.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that a file is in its pool. `said` hears how far it is, now and then. Who comes while it is on its way waits for it.
    ///
    /// # Errors
    ///
    /// It could not be had, or is not what it should be. Nothing is left of it then.
    pub async fn fetch(&self, fetch: Fetch, mut said: impl FnMut(&Progress)) -> Result<Facts, source::Error> {
        let mut progress = self.join(&fetch)?;
        loop {
            {
                let now = progress.borrow_and_update();
                said(&now);
                if let Some(ended) = &now.ended {
                    return ended.clone();
                }
            }
            if progress.changed().await.is_err() {
                return Err(problem(FileProblemKind::Io, "the fetch has ended unexpectedly"));
            }
        }
    }

    /// Joins the task that brings this file, or begins one.
    fn join(&self, fetch: &Fetch) -> Result<watch::Receiver<Progress>, source::Error> {
        let mut known = self.lock();
        if let Some(sender) = known.running.get(&fetch.target).and_then(|r| r.progress.upgrade()) {
            return Ok(sender.subscribe());
        }
        let (sender, progress, cancel) = register(&mut known, fetch)?;
        let (images, fetch) = (self.clone(), fetch.clone());
        tokio::spawn(async move {
            let env = Arc::clone(&images.env);
            let from = async |feed: Feed| read_source(&env, &fetch, feed, &cancel).await;
            let turns = if source::is_address(&fetch.source) { &images.downloads } else { &images.copies };
            let work = bring(&env, &fetch, &sender, Turn::Of(turns), from);
            let ended = tokio::select! {
                biased;
                () = cancel.cancelled() => Err(given_up(&fetch)),
                () = unwanted(&sender, images.unwanted_for) => Err(given_up(&fetch)),
                ended = work => ended,
            };
            images.end(&fetch, &sender, ended).await;
        });
        Ok(progress)
    }

    /// Cleans up, and only then says how it ended: who has heard it may begin anew.
    async fn end(&self, fetch: &Fetch, sender: &watch::Sender<Progress>, ended: Result<Facts, Error>) {
        let (target, host) = (fetch.target.clone(), self.env.host);
        blocking(move || clean_up(&target, host)).await;
        let ended = ended.map_err(|e| e.to_source());
        match &ended {
            Ok(facts) => info!(image = fetch.image, pool = fetch.pool, bytes = facts.size_bytes, "image file is there"),
            Err(error) => warn!(image = fetch.image, pool = fetch.pool, "no image file: {error}"),
        }
        self.lock().running.remove(&fetch.target);
        sender.send_modify(|p| p.ended = Some(ended));
    }

    /// Takes a file that comes in pieces.
    ///
    /// # Errors
    ///
    /// As of [`Images::fetch`]; or it is on its way already.
    pub(crate) async fn receive<F>(&self, fetch: Fetch, from: F) -> Result<Facts, source::Error>
    where
        F: AsyncFnOnce(Feed) -> Result<(), source::Error>,
    {
        let Ok(_turn) = self.uploads.try_acquire() else {
            let words = format!("this host takes {UPLOADS_AT_ONCE} uploads already; try again when one has ended");
            return Err(problem(FileProblemKind::Io, words));
        };
        let (sender, progress, cancel) = {
            let mut known = self.lock();
            if known.running.contains_key(&fetch.target) {
                return Err(problem(FileProblemKind::Io, "this file is on its way already"));
            }
            register(&mut known, &fetch)?
        };
        let ended = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(given_up(&fetch)),
            ended = bring(&self.env, &fetch, &sender, Turn::Now, from) => ended,
        };
        self.end(&fetch, &sender, ended).await;
        let ended = progress.borrow().ended.clone();
        ended.unwrap_or_else(|| Err(problem(FileProblemKind::Io, "the upload has ended unexpectedly")))
    }

    /// Fetches all files of an image into the pool that VMs take by default, or else into any, and says what they are.
    ///
    /// # Errors
    ///
    /// Why not, and whether another host may do better.
    pub async fn first_fetch(
        &self,
        image: &v1::Image,
        mut said: impl FnMut(u64, u64),
    ) -> Result<Vec<v1::FileFacts>, source::Error> {
        let pool = self.first_pool().await?;
        let fetches = image.files.iter().map(|f| to_fetch(&image.id, &image.name, f, &pool));
        let fetches = fetches.collect::<Result<Vec<_>, _>>()?;
        let total: u64 = fetches.iter().map(|f| f.size_bytes).sum();
        let (mut before, mut files) = (0, Vec::new());
        for fetch in fetches {
            let facts = self.fetch(fetch, |p| said(before + p.done, total.max(before + p.total))).await?;
            before += facts.size_bytes;
            files.push(facts.to_proto());
        }
        Ok(files)
    }

    async fn first_pool(&self) -> Result<Pool, source::Error> {
        let all = &self.env.pools;
        let mut why = "this host has no pool to keep images in".to_owned();
        for pool in all.get("default").into_iter().chain(all.values().filter(|p| p.name != "default")) {
            let (candidate, user) = (pool.clone(), self.env.user);
            match blocking(move || pools::check(&candidate, user)).await {
                Ok(_) => return Ok(pool.clone()),
                Err(found) => why = format!("pool {} cannot be used: {found}", pool.name),
            }
        }
        Err(problem(FileProblemKind::Io, why))
    }

    /// Removes the copies of an image from all pools, and stops bringing it.
    ///
    /// # Errors
    ///
    /// Why a copy stays, in words.
    pub async fn remove(&self, image: ImageId) -> Result<(), String> {
        let under_way: Vec<watch::Receiver<Progress>> = {
            let mut known = self.lock();
            // A fetch that was asked for before, and begins only now, would bring back what is being removed.
            if !known.removed.contains(&image) {
                known.removed.push_back(image);
            }
            if known.removed.len() > REMOVED {
                known.removed.pop_front();
            }
            let of_image = known.running.values().filter(|r| r.image == image);
            let senders = of_image.inspect(|r| r.cancel.cancel()).filter_map(|r| r.progress.upgrade());
            senders.map(|sender| sender.subscribe()).collect()
        };
        for mut progress in under_way {
            // What goes on until it is cleaned up.
            let _ = progress.wait_for(|p| p.ended.is_some()).await;
        }
        let (pools, user) = (self.env.pools.clone(), self.env.user);
        let removed = blocking(move || {
            for pool in pools.values() {
                pools::check(pool, user).map_err(|e| format!("pool {} cannot be used: {e}", pool.name))?;
                copies::remove(&pool.path, image)?;
            }
            Ok(())
        })
        .await;
        if removed.is_err() {
            // A VM may still have a disk on top of it, and needs to find it.
            self.lock().removed.retain(|id| *id != image);
        }
        removed
    }
}

type Registered = (Arc<watch::Sender<Progress>>, watch::Receiver<Progress>, CancellationToken);

fn register(known: &mut Known, fetch: &Fetch) -> Result<Registered, source::Error> {
    if known.removed.contains(&fetch.image_id) {
        return Err(problem(FileProblemKind::Io, format!("image {} has been removed", fetch.image)));
    }
    let (sender, progress) = watch::channel(Progress { total: fetch.size_bytes, ..Progress::default() });
    let (sender, cancel) = (Arc::new(sender), CancellationToken::new());
    let entry = Running { progress: Arc::downgrade(&sender), cancel: cancel.clone(), image: fetch.image_id };
    known.running.insert(fetch.target.clone(), entry);
    Ok((sender, progress, cancel))
}

/// When nobody has wanted it for so long.
async fn unwanted(sender: &watch::Sender<Progress>, so_long: Duration) {
    loop {
        sender.closed().await;
        time::sleep(so_long).await;
        if sender.is_closed() {
            return;
        }
    }
}

fn given_up(fetch: &Fetch) -> Error {
    // It says nothing about the image: who comes next may have it.
    let source = problem(FileProblemKind::Io, "its fetch was given up, because nobody wants it");
    Error::Source { image: fetch.image.clone(), pool: fetch.pool.clone(), source }
}

/// A file of an image that is to come into `pool`. What is not known about it may be empty.
///
/// # Errors
///
/// The leader has sent nonsense.
pub fn to_fetch(id: &str, name: &str, file: &v1::ImageFile, pool: &Pool) -> Result<Fetch, source::Error> {
    let invalid = |words: String| problem(FileProblemKind::Invalid, words);
    let image_id: ImageId = id.parse().map_err(|e| invalid(format!("image.id: {e}")))?;
    let role = match file.role() {
        v1::ImageFileRole::Disk => Role::Disk,
        v1::ImageFileRole::Kernel => Role::Kernel,
        v1::ImageFileRole::Initrd => Role::Initrd,
        v1::ImageFileRole::Unspecified => {
            return Err(invalid("image.files.role is not one that this agent knows".into()));
        }
    };
    let hex = |s: &str| s.len() == 64 && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if !file.sha256.is_empty() && !hex(&file.sha256) {
        return Err(invalid("image.files.sha256 is not 64 hexadecimal digits".into()));
    }
    let format = match file.format() {
        v1::ImageFormat::Unspecified => None,
        v1::ImageFormat::Raw => Some(Format::Raw),
        v1::ImageFormat::Qcow2 => Some(Format::Qcow2),
    };
    Ok(Fetch {
        pool: pool.name.clone(),
        image_id,
        image: name.to_owned(),
        role,
        source: file.source.clone(),
        sha256: file.sha256.clone(),
        size_bytes: file.size_bytes,
        format,
        target: pool.path.join("images").join(image_id.to_string()).join(role.file_name()),
    })
}

/// Makes a directory below a pool, and its parent, which others may search.
pub(super) fn make_dirs(dir: &Path) -> Result<(), Error> {
    for dir in [dir.parent().expect("it lies below a pool"), dir] {
        match fs::create_dir(dir) {
            Ok(()) => {
                fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(io_error("open up", dir))?;
                // Or a power cut takes the directory with all that was synced inside.
                sync_dir(dir.parent().expect("it lies below a pool"))?;
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error("make", dir)(e)),
        }
    }
    Ok(())
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("sync", dir))
}

/// As hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

#[cfg(test)]
#[path = "images_tests.rs"]
mod tests;
