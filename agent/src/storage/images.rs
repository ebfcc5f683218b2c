//! Copies image files into pools: once per pool, checked by their sha256, never changed afterwards.
//!
//! A file appears under its name only when it is complete, checked and on disk. Two hosts that fetch into one shared
//! pool at the same time each write a temporary file of their own; whoever renames last replaces equal bytes.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File, Permissions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest, Sha256};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore};
use tracing::info;
use uncloud_proto::ids::HostId;

use super::{Error, blocking, format, is_full, plan::Fetch, source::Roots};

/// So many files are copied at once. More would only share the same disk.
const COPIES_AT_ONCE: usize = 2;
const BUFFER: usize = 256 * 1024;

/// The fetches of this agent. Those of the same file share one copy.
#[derive(Debug)]
pub struct Fetches {
    targets: Mutex<BTreeMap<PathBuf, Arc<AsyncMutex<()>>>>,
    copies: Arc<Semaphore>,
}

impl Default for Fetches {
    fn default() -> Self {
        Self { targets: Mutex::default(), copies: Arc::new(Semaphore::new(COPIES_AT_ONCE)) }
    }
}

impl Fetches {
    /// Makes sure that a file is in its pool. Who comes while it is being copied waits for that copy.
    ///
    /// # Errors
    ///
    /// It could not be copied, or is not what it should be. Nothing is left of it then.
    pub async fn fetch(&self, fetch: Fetch, roots: Arc<Roots>, host: HostId) -> Result<(), Error> {
        let lock = self.lock_of(&fetch.target);
        let guard: OwnedMutexGuard<()> = Arc::clone(&lock).lock_owned().await;
        let target = fetch.target.clone();
        let copies = Arc::clone(&self.copies);
        let present = {
            let fetch = fetch.clone();
            blocking(move || is_present(&fetch)).await?
        };
        let result = if present {
            drop(guard);
            Ok(())
        } else {
            let permit = copies.acquire_owned().await.expect("it is never closed");
            // Guard and permit go along: when this future is dropped, the copy goes on and nobody starts a second one.
            blocking(move || {
                let result = copy(&fetch, &roots, host);
                drop((guard, permit));
                result
            })
            .await
        };
        drop(lock);
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.get(&target).is_some_and(|l| Arc::strong_count(l) == 1) {
            targets.remove(&target);
        }
        result
    }

    fn lock_of(&self, target: &Path) -> Arc<AsyncMutex<()>> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(targets.entry(target.to_owned()).or_default())
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// Whether it is there already. It was checked when it came, and is trusted from then on.
fn is_present(fetch: &Fetch) -> Result<bool, Error> {
    match fs::symlink_metadata(&fetch.target) {
        Ok(m) if m.is_file() && m.len() == fetch.size_bytes => Ok(true),
        Ok(_) => Err(Error::BadImage {
            image: fetch.image.clone(),
            problem: format!(
                "{} is not a file of {} bytes; remove it, and it is fetched again",
                fetch.target.display(),
                fetch.size_bytes
            ),
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("look at", &fetch.target)(e)),
    }
}

fn copy(fetch: &Fetch, roots: &Roots, host: HostId) -> Result<(), Error> {
    let (mut source, size) = roots.open(&fetch.source).map_err(|source| Error::Source {
        image: fetch.image.clone(),
        pool: fetch.pool.clone(),
        source,
    })?;
    let bad = |problem: String| Error::BadImage { image: fetch.image.clone(), problem };
    if size != fetch.size_bytes {
        return Err(bad(format!("{} has {size} bytes, not {}", fetch.source, fetch.size_bytes)));
    }
    let dir = fetch.target.parent().expect("a target lies in its image's directory");
    make_dirs(dir)?;
    let name = fetch.target.file_name().and_then(|n| n.to_str()).expect("its name is that of a role");
    let temporary = dir.join(format!(".{name}.{host}.tmp"));
    let result = copy_checked(fetch, &mut source, &temporary).and_then(|()| {
        fs::rename(&temporary, &fetch.target).map_err(io_error("rename", &temporary))?;
        sync_dir(dir)
    });
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    } else {
        info!(image = fetch.image, pool = fetch.pool, bytes = size, "image fetched");
    }
    result
}

fn copy_checked(fetch: &Fetch, source: &mut File, temporary: &Path) -> Result<(), Error> {
    let writing = |source: io::Error| {
        if is_full(&source) {
            Error::Full { pool: fetch.pool.clone(), what: format!("image {}", fetch.image) }
        } else {
            Error::Io { what: "write", path: temporary.to_owned(), source }
        }
    };
    let _ = fs::remove_file(temporary);
    let mut file = File::options().write(true).create_new(true).open(temporary).map_err(writing)?;
    let mut hasher = Sha256::new();
    let mut header = Vec::with_capacity(format::HEADER_BYTES);
    let mut buffer = vec![0; BUFFER];
    let mut length = 0;
    loop {
        let n = source.read(&mut buffer).map_err(io_error("read", Path::new(&fetch.source)))?;
        if n == 0 {
            break;
        }
        let bytes = &buffer[..n];
        hasher.update(bytes);
        header.extend(bytes.iter().take(format::HEADER_BYTES - header.len()));
        length += n as u64;
        // Holes stay holes.
        if bytes.iter().all(|b| *b == 0) {
            file.seek(SeekFrom::Current(i64::try_from(n).expect("a buffer is small"))).map_err(writing)?;
        } else {
            file.write_all(bytes).map_err(writing)?;
        }
    }
    file.set_len(length).map_err(writing)?;
    let found = hex(&hasher.finalize());
    if found != fetch.sha256 {
        return Err(Error::WrongSha256 {
            image: fetch.image.clone(),
            source_name: fetch.source.clone(),
            found,
            expected: fetch.sha256.clone(),
        });
    }
    if let Some(format) = fetch.format {
        format::check(format, &header)
            .map_err(|e| Error::BadImage { image: fetch.image.clone(), problem: e.to_string() })?;
    }
    file.set_permissions(Permissions::from_mode(0o644)).map_err(writing)?;
    file.sync_all().map_err(writing)
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
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::vm::desired::Format;

    struct Place {
        dir: tempfile::TempDir,
        roots: Arc<Roots>,
        fetches: Fetches,
    }

    impl Place {
        fn new(content: &[u8]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("pool")).unwrap();
            fs::write(dir.path().join("source"), content).unwrap();
            let roots = Arc::new(Roots::new(&[dir.path().to_owned()], &[]));
            Self { dir, roots, fetches: Fetches::default() }
        }

        fn request(&self, content: &[u8]) -> Fetch {
            Fetch {
                pool: "p".into(),
                image: "debian".into(),
                source: self.dir.path().join("source").to_str().unwrap().into(),
                sha256: hex(&Sha256::digest(content)),
                size_bytes: content.len() as u64,
                format: Some(Format::Raw),
                target: self.dir.path().join("pool/images/id/disk"),
            }
        }

        async fn fetch(&self, fetch: Fetch) -> Result<(), String> {
            let host = HostId::from_uuid(Uuid::from_u128(1));
            self.fetches.fetch(fetch, Arc::clone(&self.roots), host).await.map_err(|e| e.reason())
        }

        fn files(&self) -> Vec<String> {
            let Ok(entries) = fs::read_dir(self.dir.path().join("pool/images/id")) else { return vec![] };
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    #[tokio::test]
    async fn an_image_is_copied_once_and_stays_when_its_source_goes() {
        let mut content = vec![0; 3 * BUFFER + 5];
        content[BUFFER + 1] = 7;
        let place = Place::new(&content);
        let request = place.request(&content);
        let (a, b) = tokio::join!(place.fetch(request.clone()), place.fetch(request.clone()));
        assert_eq!((a, b), (Ok(()), Ok(())));
        assert_eq!(place.files(), ["disk"]);
        assert_eq!(fs::read(&request.target).unwrap(), content);
        assert_eq!(fs::metadata(&request.target).unwrap().permissions().mode() & 0o777, 0o644);
        fs::remove_file(place.dir.path().join("source")).unwrap();
        assert_eq!(place.fetch(request).await, Ok(()));
        assert!(place.fetches.targets.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_is_not_the_image_is_refused_and_leaves_nothing() {
        let place = Place::new(b"evil");
        let error = place.fetch(place.request(b"good")).await.unwrap_err();
        assert!(error.starts_with("image debian: ") && error.contains("sha256"), "{error}");
        assert_eq!(place.files(), [""; 0]);
        let error = place.fetch(place.request(b"longer")).await.unwrap_err();
        assert!(error.contains("has 4 bytes, not 6"), "{error}");
        let qcow2 = Fetch { format: Some(Format::Qcow2), ..place.request(b"evil") };
        assert!(place.fetch(qcow2).await.unwrap_err().contains("qcow2"));
        let absent = Fetch { source: format!("{}/none", place.dir.path().display()), ..place.request(b"evil") };
        assert!(place.fetch(absent).await.unwrap_err().contains("this host has no file"));
        assert_eq!(place.files(), [""; 0]);
    }
}
