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
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    bring::{bring, clean_up, read_source},
    copies,
    http::Http,
    plan::Fetch,
    pools::{self, Pool, User},
    source::{self, Roots, problem},
    writing::Feed,
};
use crate::vm::desired::{Format, Role};

/// So many files are on their way at once. More would only share the same disk.
const COPIES_AT_ONCE: usize = 2;
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
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
    image: ImageId,
}

/// The images of this host's pools. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    env: Arc<Env>,
    running: Arc<Mutex<BTreeMap<PathBuf, Running>>>,
    copies: Arc<Semaphore>,
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

impl Images {
    /// With what this host has.
    #[must_use]
    pub fn new(env: Env) -> Self {
        Self { env: Arc::new(env), running: Arc::default(), copies: Arc::new(Semaphore::new(COPIES_AT_ONCE)) }
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that a file is in its pool. `said` hears how far it is, now and then. Who comes while it is on its way waits for it.
    ///
    /// # Errors
    ///
    /// It could not be had, or is not what it should be. Nothing is left of it then.
    pub async fn fetch(&self, fetch: Fetch, mut said: impl FnMut(&Progress)) -> Result<Facts, source::Error> {
        let mut progress = self.join(&fetch);
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
    fn join(&self, fetch: &Fetch) -> watch::Receiver<Progress> {
        let mut running = self.lock();
        if let Some(running) = running.get(&fetch.target) {
            return running.progress.clone();
        }
        let (sender, progress, cancel) = self.register(&mut running, fetch);
        let (images, fetch) = (self.clone(), fetch.clone());
        tokio::spawn(async move {
            let env = Arc::clone(&images.env);
            let wanted = sender.clone();
            let from = async |feed: Feed| read_source(&env, &fetch, feed, &cancel).await;
            let work = async {
                let _permit = images.copies.acquire().await.expect("it is never closed");
                bring(&env, &fetch, &sender, from).await
            };
            let ended = tokio::select! {
                biased;
                () = cancel.cancelled() => Err(given_up(&fetch)),
                () = unwanted(&wanted) => Err(given_up(&fetch)),
                ended = work => ended,
            };
            images.end(&fetch, &sender, ended).await;
        });
        progress
    }

    fn register(
        &self,
        running: &mut BTreeMap<PathBuf, Running>,
        fetch: &Fetch,
    ) -> (watch::Sender<Progress>, watch::Receiver<Progress>, CancellationToken) {
        let (sender, progress) = watch::channel(Progress { total: fetch.size_bytes, ..Progress::default() });
        let cancel = CancellationToken::new();
        let entry = Running { progress: progress.clone(), cancel: cancel.clone(), image: fetch.image_id };
        running.insert(fetch.target.clone(), entry);
        (sender, progress, cancel)
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
        self.lock().remove(&fetch.target);
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
        let (sender, progress, cancel) = {
            let mut running = self.lock();
            if running.contains_key(&fetch.target) {
                return Err(problem(FileProblemKind::Io, "this file is on its way already"));
            }
            self.register(&mut running, &fetch)
        };
        let ended = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(given_up(&fetch)),
            ended = bring(&self.env, &fetch, &sender, from) => ended,
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
            let running = self.lock();
            let of_image = running.values().filter(|r| r.image == image);
            of_image.inspect(|r| r.cancel.cancel()).map(|r| r.progress.clone()).collect()
        };
        for mut progress in under_way {
            // What goes on until it is cleaned up.
            let _ = progress.wait_for(|p| p.ended.is_some()).await;
        }
        let (pools, user) = (self.env.pools.clone(), self.env.user);
        blocking(move || {
            for pool in pools.values() {
                pools::check(pool, user).map_err(|e| format!("pool {} cannot be used: {e}", pool.name))?;
                copies::remove(&pool.path, image)?;
            }
            Ok(())
        })
        .await
    }
}

/// When nobody has wanted it for a while.
async fn unwanted(sender: &watch::Sender<Progress>) {
    loop {
        sender.closed().await;
        time::sleep(UNWANTED).await;
        if sender.is_closed() {
            return;
        }
    }
}

fn given_up(fetch: &Fetch) -> Error {
    Error::BadImage {
        image: fetch.image.clone(),
        problem: "its fetch was given up, because nobody wants it".to_owned(),
    }
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
            Ok(()) => fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(io_error("open up", dir))?,
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
