//! Brings one file of an image into its pool: from its source into a temporary file, checked, synced, and under its name.
//! Called by [`super::images`], which knows who waits for it.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinHandle,
    time,
};
use tokio_util::sync::CancellationToken;
use tracing::info;
use uncloud_proto::{ids::HostId, v1::FileProblemKind};

use super::{
    Error, blocking,
    check::check_qcow2,
    claim::Claim,
    format,
    http::{Sink, Wanted},
    images::{Env, Facts, Progress, hex, io_error, make_dirs, sync_dir},
    is_full,
    plan::Fetch,
    source::{self, problem},
    writing::{self, Feed, Written},
};
use crate::vm::desired::{Format, Role};

pub(super) const BUFFER: usize = 256 * 1024;
/// How often to look whether another host has brought a file.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A name that no fetch has used before: of one that was dropped, the last step may still be under way on a thread of its own, and
/// must not give the next one's half a file its name.
pub(super) fn temporary(target: &Path, host: HostId) -> PathBuf {
    let name = target.file_name().and_then(|n| n.to_str()).expect("its name is that of a role");
    target.with_file_name(format!(".{name}.{host}.{:016x}.tmp", rand::random::<u64>()))
}

/// Removes what a fetch of this host may have left, and the image's directory if nothing else is in it.
pub(super) fn clean_up(target: &Path, host: HostId) {
    let name = target.file_name().and_then(|n| n.to_str()).expect("its name is that of a role");
    remove_temporary(target, &format!(".{name}.{host}."));
    // Fails if there is something in it, and then it stays.
    let _ = fs::remove_dir(target.parent().expect("a target lies in its image's directory"));
}

/// Removes what hosts have left that were killed while they brought this file. Only who has the claim may.
fn remove_leftovers(target: &Path) {
    let name = target.file_name().and_then(|n| n.to_str()).expect("its name is that of a role");
    remove_temporary(target, &format!(".{name}."));
}

fn remove_temporary(target: &Path, prefix: &str) {
    let dir = target.parent().expect("a target lies in its image's directory");
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let left = entry.file_name().into_string().unwrap_or_default();
        if left.starts_with(prefix) && left.ends_with(".tmp") {
            info!(file = %entry.path().display(), "removing what is left of a fetch");
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What is known of a file that is there. It was checked when it came, and is trusted from then on; only what is not known of it is
/// read again.
fn look(fetch: &Fetch) -> Result<Option<Facts>, Error> {
    let bad = |problem: String| Error::BadImage { image: fetch.image.clone(), problem };
    let metadata = match fs::symlink_metadata(&fetch.target) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("look at", &fetch.target)(e)),
    };
    let size = metadata.len();
    if !metadata.is_file() || (fetch.size_bytes > 0 && size != fetch.size_bytes) {
        let path = fetch.target.display();
        return Err(bad(format!(
            "{path} is not a file of {} bytes; remove it, and it is fetched again",
            fetch.size_bytes
        )));
    }
    let reading = || io_error("read", &fetch.target);
    let mut file = File::open(&fetch.target).map_err(reading())?;
    let mut header = Vec::with_capacity(format::HEADER_BYTES);
    file.by_ref().take(format::HEADER_BYTES as u64).read_to_end(&mut header).map_err(reading())?;
    let sha256 = match fetch.sha256.as_str() {
        "" => {
            let mut hasher = Sha256::new();
            hasher.update(&header);
            io::copy(&mut file, &mut hasher).map_err(reading())?;
            hex(&hasher.finalize())
        }
        known => known.to_owned(),
    };
    let (format, virtual_size) = judge(fetch, &header, size, u64::MAX)?;
    Ok(Some(Facts { sha256, size_bytes: size, format, virtual_size }))
}

/// What a file is, by its beginning.
fn judge(fetch: &Fetch, header: &[u8], size: u64, most: u64) -> Result<(Option<Format>, u64), Error> {
    let bad = |problem: String| Error::BadImage { image: fetch.image.clone(), problem };
    if size == 0 {
        return Err(bad("it is empty".to_owned()));
    }
    if size > most {
        return Err(bad(format::file_too_large(size, most)));
    }
    if fetch.role != Role::Disk {
        return Ok((None, 0));
    }
    let facts = match fetch.format {
        // Whatever is in there, QEMU is told that it is raw.
        Some(Format::Raw) => format::raw(size),
        Some(Format::Qcow2) => {
            format::check(Format::Qcow2, header).map_err(|e| bad(e.to_string()))?;
            format::detect(header, size).map_err(|e| bad(e.to_string()))?
        }
        None => format::detect(header, size).map_err(|e| bad(e.to_string()))?,
    };
    if facts.virtual_size > most {
        return Err(bad(format::too_large(facts.virtual_size, most)));
    }
    Ok((Some(facts.format), facts.virtual_size))
}

/// What the bringing of a file waits for once nobody else brings it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Turn<'a> {
    /// For nothing.
    Now,
    /// For one of these.
    Of(&'a Semaphore),
}

/// Brings one file. Must be followed by [`clean_up`], also when it is dropped.
pub(super) async fn bring<F>(
    env: &Env,
    fetch: &Fetch,
    progress: &watch::Sender<Progress>,
    turn: Turn<'_>,
    from: F,
) -> Result<Facts, Error>
where
    F: AsyncFnOnce(Feed) -> Result<(), source::Error>,
{
    let dir = fetch.target.parent().expect("a target lies in its image's directory").to_owned();
    let claim = loop {
        let (wanted, dir) = (fetch.clone(), dir.clone());
        let found = blocking(move || -> Result<Result<Facts, Option<Claim>>, Error> {
            if let Some(facts) = look(&wanted)? {
                return Ok(Ok(facts));
            }
            make_dirs(&dir)?;
            match Claim::take(&dir, wanted.role.file_name()).map_err(io_error("lock", &dir)) {
                Ok(claim) => Ok(Err(claim)),
                // Removed by somebody who has just given up.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Err(None)),
                Err(e) => Err(e),
            }
        });
        match found.await? {
            Ok(facts) => return Ok(facts),
            Err(Some(claim)) => break claim,
            Err(None) => time::sleep(LOOK_EVERY).await,
        }
    };
    let brought = bring_claimed(env, fetch, progress, turn, from).await;
    blocking(move || drop(claim)).await;
    brought
}

async fn bring_claimed<F>(
    env: &Env,
    fetch: &Fetch,
    progress: &watch::Sender<Progress>,
    turn: Turn<'_>,
    from: F,
) -> Result<Facts, Error>
where
    F: AsyncFnOnce(Feed) -> Result<(), source::Error>,
{
    // Whoever had the claim before may have brought it while this host was waiting for it.
    let wanted = fetch.clone();
    let there = blocking(move || {
        let there = look(&wanted)?;
        if there.is_none() {
            remove_leftovers(&wanted.target);
        }
        Ok::<_, Error>(there)
    });
    if let Some(facts) = there.await? {
        return Ok(facts);
    }
    if fetch.size_bytes > env.most {
        let problem = format::file_too_large(fetch.size_bytes, env.most);
        return Err(Error::BadImage { image: fetch.image.clone(), problem });
    }
    // Not before: who waits for another host must not keep others from their turn.
    let _turn = match turn {
        Turn::Now => None,
        Turn::Of(turns) => Some(turns.acquire().await.expect("it is never closed")),
    };
    let temporary = temporary(&fetch.target, env.host);
    let (feed, writer) = writing::start(temporary.clone(), progress.clone());
    let sent = from(feed).await;
    let written = written(fetch, writer, &temporary).await?;
    sent.map_err(|source| Error::Source { image: fetch.image.clone(), pool: fetch.pool.clone(), source })?;
    let facts = check(env, fetch, &written, &temporary).await?;
    let (target, file) = (fetch.target.clone(), written.file);
    blocking(move || {
        file.sync_all().map_err(io_error("sync", &temporary))?;
        fs::rename(&temporary, &target).map_err(io_error("rename", &temporary))?;
        sync_dir(target.parent().expect("a target lies in its image's directory"))
    })
    .await?;
    Ok(facts)
}

/// Waits until all is written. A full pool is told from other errors.
async fn written(fetch: &Fetch, writer: JoinHandle<io::Result<Written>>, temporary: &Path) -> Result<Written, Error> {
    let written = writer.await.expect("it does not panic, and the runtime ends after the tasks");
    written.map_err(|source| {
        if is_full(&source) {
            Error::Full { pool: fetch.pool.clone(), what: format!("image {}", fetch.image) }
        } else {
            Error::Io { what: "write", path: temporary.to_owned(), source }
        }
    })
}

async fn check(env: &Env, fetch: &Fetch, written: &Written, temporary: &Path) -> Result<Facts, Error> {
    let bad = |problem: String| Error::BadImage { image: fetch.image.clone(), problem };
    let (length, sha256) = (written.length, written.sha256.clone());
    if fetch.size_bytes > 0 && length != fetch.size_bytes {
        return Err(bad(format!("{} has {length} bytes, not {}", fetch.source, fetch.size_bytes)));
    }
    if !fetch.sha256.is_empty() && sha256 != fetch.sha256 {
        return Err(Error::WrongSha256 {
            image: fetch.image.clone(),
            source_name: fetch.source.clone(),
            found: sha256,
            expected: fetch.sha256.clone(),
        });
    }
    let (format, virtual_size) = judge(fetch, &written.header, length, env.most)?;
    written.file.set_permissions(Permissions::from_mode(0o644)).map_err(io_error("open up", temporary))?;
    if format == Some(Format::Qcow2) {
        check_qcow2(temporary, env.user, &env.qemu_img).await.map_err(bad)?;
    }
    Ok(Facts { sha256, size_bytes: length, format, virtual_size })
}

/// Reads a file from where its image says that it is.
pub(super) async fn read_source(
    env: &Arc<Env>,
    fetch: &Fetch,
    mut feed: Feed,
    cancel: &CancellationToken,
) -> Result<(), source::Error> {
    if source::is_address(&fetch.source) {
        let http = env.http.as_ref().map_err(|words| problem(FileProblemKind::Forbidden, words.clone()))?;
        let size = (fetch.size_bytes > 0).then_some(fetch.size_bytes);
        let wanted = Wanted { url: fetch.source.clone(), size, most: env.most };
        return http.fetch(&wanted, &mut feed).await;
    }
    let (env, wanted, cancel) = (Arc::clone(env), fetch.clone(), cancel.clone());
    let (sender, mut pieces) = tokio::sync::mpsc::channel::<Bytes>(1);
    let reading = tokio::task::spawn_blocking(move || read_file(&env, &wanted, &sender, &cancel));
    while let Some(bytes) = pieces.recv().await {
        feed.take(bytes).await?;
    }
    drop(feed);
    reading.await.expect("it does not panic, and the runtime ends after the tasks")
}

fn read_file(
    env: &Env,
    fetch: &Fetch,
    sender: &tokio::sync::mpsc::Sender<Bytes>,
    cancel: &CancellationToken,
) -> Result<(), source::Error> {
    let (mut file, size) = match source::uploaded_to(&fetch.source) {
        // Uploaded into another pool of this host.
        Some(pool) => open_upload(env, fetch, pool)?,
        None => env.roots.open(&fetch.source)?,
    };
    let wrong = |words: String| problem(FileProblemKind::Invalid, words);
    if fetch.size_bytes > 0 && size != fetch.size_bytes {
        return Err(wrong(format!("{} has {size} bytes, not {}", fetch.source, fetch.size_bytes)));
    }
    if size > env.most {
        return Err(wrong(format!("{}: {}", fetch.source, format::file_too_large(size, env.most))));
    }
    let mut left = size;
    while left > 0 && !cancel.is_cancelled() {
        let mut buffer = vec![0; BUFFER];
        let read = file.read(&mut buffer);
        let n = read.map_err(|e| problem(FileProblemKind::Io, format!("{} cannot be read: {e}", fetch.source)))?;
        if n == 0 {
            return Err(wrong(format!("{} became shorter while it was read", fetch.source)));
        }
        buffer.truncate(n.min(usize::try_from(left).unwrap_or(n)));
        left -= buffer.len() as u64;
        if sender.blocking_send(buffer.into()).is_err() {
            // Who writes has an error to tell.
            return Ok(());
        }
    }
    Ok(())
}

fn open_upload(env: &Env, fetch: &Fetch, pool: &str) -> Result<(File, u64), source::Error> {
    let elsewhere = || {
        let words = format!("image {} was uploaded to pool {pool}, and this host has no copy of it", fetch.image);
        problem(FileProblemKind::NotFound, words)
    };
    let pool = env.pools.get(pool).ok_or_else(elsewhere)?;
    let path = pool.path.join("images").join(fetch.image_id.to_string()).join(fetch.role.file_name());
    let file = File::open(path).map_err(|_| elsewhere())?;
    let size = file.metadata().map_err(|_| elsewhere())?.len();
    Ok((file, size))
}
