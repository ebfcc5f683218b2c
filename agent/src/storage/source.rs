//! Opens files that users name, and lets no path climb out of where images may come from.
//!
//! The check is on the file that was opened, not on its name: the kernel says where it lies
//! (`/proc/self/fd`), so neither `..` nor a symbolic link, nor one that changes meanwhile, leads anywhere else.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use uncloud_proto::{names, v1::FileProblemKind};

use super::pools::Pool;

/// Why a file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind.
    pub kind: FileProblemKind,
    /// In words.
    pub message: String,
}

/// A problem with a file.
pub(crate) fn problem(kind: FileProblemKind, message: impl Into<String>) -> Error {
    Error { kind, message: message.into() }
}

/// Where images may come from.
#[derive(Debug, Default)]
pub struct Roots {
    image_dirs: Vec<Root>,
    pools: Vec<(String, Root)>,
}

/// As it is configured. What that means is looked up each time: it may be mounted later.
#[derive(Debug)]
struct Root {
    named: PathBuf,
}

impl Root {
    fn new(path: &Path) -> Self {
        Self { named: path.to_owned() }
    }

    /// Without symbolic links, as the kernel shows it.
    fn real(&self) -> PathBuf {
        fs::canonicalize(&self.named).unwrap_or_else(|_| self.named.clone())
    }
}

/// A source, taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Absolute(&'a Path),
    InPool { pool: &'a str, path: &'a Path },
}

fn parse(source: &str) -> Result<Place<'_>, Error> {
    let forbidden = |message: &str| problem(FileProblemKind::Forbidden, message);
    if source.is_empty() || source.contains('\0') || source.len() > 4096 {
        return Err(problem(FileProblemKind::Invalid, "source must be an absolute path or pool:NAME/path"));
    }
    let plain = |path: &Path| path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if let Some(rest) = source.strip_prefix("pool:") {
        let (pool, path) = rest.split_once('/').unwrap_or((rest, ""));
        names::check(pool).map_err(|e| problem(FileProblemKind::Invalid, format!("the pool's name in source {e}")))?;
        let path = Path::new(path);
        if path.as_os_str().is_empty() || path.is_absolute() || !plain(path) {
            return Err(forbidden("the path in source leads out of the pool"));
        }
        return Ok(Place::InPool { pool, path });
    }
    let path = Path::new(source);
    if !path.is_absolute() {
        return Err(problem(FileProblemKind::Invalid, "source must be an absolute path or pool:NAME/path"));
    }
    if !plain(path) {
        return Err(forbidden("source must not contain `..`"));
    }
    Ok(Place::Absolute(path))
}

/// Whether a source is an address on the network.
#[must_use]
pub fn is_address(source: &str) -> bool {
    source.starts_with("https://") || source.starts_with("http://")
}

/// The pool that a client has sent the file to, if one has.
#[must_use]
pub fn uploaded_to(source: &str) -> Option<&str> {
    source.strip_prefix("upload:")
}

impl Roots {
    /// These directories and pools.
    #[must_use]
    pub fn new(image_dirs: &[PathBuf], pools: &[Pool]) -> Self {
        Self {
            image_dirs: image_dirs.iter().map(|d| Root::new(d)).collect(),
            pools: pools.iter().map(|p| (p.name.clone(), Root::new(&p.path))).collect(),
        }
    }

    /// Opens a regular file by its source.
    ///
    /// # Errors
    ///
    /// Says why not, and whether another host may do better.
    pub fn open(&self, source: &str) -> Result<(File, u64), Error> {
        let (path, allowed) = self.locate(source)?;
        // NONBLOCK: a FIFO must not hold us up.
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path);
        let file = opened.map_err(|e| io_problem(source, &e))?;
        let metadata = file.metadata().map_err(|e| io_problem(source, &e))?;
        let real = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|e| io_problem(source, &e))?;
        if !allowed.iter().any(|root| real.starts_with(root.real())) {
            let message = format!("{source} leads out of the directories that images may come from");
            return Err(problem(FileProblemKind::Forbidden, message));
        }
        // Other people's disks are no images.
        if self.pools.iter().any(|(_, root)| real.starts_with(root.real().join("disks"))) {
            let message = format!("{source} is among the disks of VMs, and those are no images");
            return Err(problem(FileProblemKind::Forbidden, message));
        }
        if !metadata.is_file() {
            return Err(problem(FileProblemKind::Invalid, format!("{source} is not a regular file")));
        }
        Ok((file, metadata.len()))
    }

    /// Where the source is, as named, and where it may turn out to lie.
    fn locate(&self, source: &str) -> Result<(PathBuf, Vec<&Root>), Error> {
        match parse(source)? {
            Place::InPool { pool, path } => {
                let Some((_, root)) = self.pools.iter().find(|(name, _)| name == pool) else {
                    return Err(problem(FileProblemKind::NotFound, format!("this host has no pool {pool}")));
                };
                Ok((root.named.join(path), vec![root]))
            }
            Place::Absolute(path) => {
                let all: Vec<&Root> = self.image_dirs.iter().chain(self.pools.iter().map(|(_, r)| r)).collect();
                // By its name first, so that nobody can find out by the answer which other files exist.
                if !all.iter().any(|r| path.starts_with(&r.named) || path.starts_with(r.real())) {
                    let message = format!(
                        "{source} is not in a directory that this host's agent takes images from (--image-dir)"
                    );
                    return Err(problem(FileProblemKind::Forbidden, message));
                }
                Ok((path.to_owned(), all))
            }
        }
    }
}

fn io_problem(source: &str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            problem(FileProblemKind::NotFound, format!("this host has no file {source}"))
        }
        io::ErrorKind::InvalidFilename => problem(FileProblemKind::Invalid, format!("{source}: {error}")),
        _ => problem(FileProblemKind::Io, format!("{source} cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::storage::pools::Kind;

    #[test]
    fn no_source_climbs_out() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        for d in ["images", "pool/disks/x", "secret", "real"] {
            fs::create_dir_all(at(d)).unwrap();
        }
        for f in ["images/good", "pool/good", "pool/disks/x/root.0.qcow2", "secret/key", "real/good"] {
            fs::write(at(f), f).unwrap();
        }
        symlink(at("secret/key"), at("images/link")).unwrap();
        symlink(at("secret"), at("pool/dir")).unwrap();
        symlink(at("real"), at("linked")).unwrap();
        let fifo = std::ffi::CString::new(at("images/fifo").to_str().unwrap()).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &*fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let pools = [Pool { name: "p".into(), path: at("pool"), kind: Kind::Local }];
        let roots = Roots::new(&[at("images"), at("linked")], &pools);
        let kind = |source: &str| roots.open(source).map_err(|e| e.kind).map(|(_, size)| size);
        let abs = |p: &str| at(p).to_str().unwrap().to_owned();

        assert_eq!(kind(&abs("images/good")), Ok(11));
        assert_eq!(kind(&abs("linked/good")), Ok(9));
        assert_eq!(kind(&abs("real/good")), Ok(9));
        assert_eq!(kind("pool:p/good"), Ok(9));
        use FileProblemKind::{Forbidden, Invalid, NotFound};
        for (source, expected) in [
            (abs("images/link"), Forbidden),
            (abs("images/../secret/key"), Forbidden),
            (abs("secret/key"), Forbidden),
            (abs("secret/none"), Forbidden),
            (abs("images/none"), NotFound),
            (abs("images"), Invalid),
            (abs("images/fifo"), Invalid),
            ("pool:p/../secret/key".into(), Forbidden),
            ("pool:p//etc/passwd".into(), Forbidden),
            ("pool:p/dir/key".into(), Forbidden),
            ("pool:p/disks/x/root.0.qcow2".into(), Forbidden),
            ("pool:p/".into(), Forbidden),
            ("pool:q/good".into(), NotFound),
            ("pool:../good".into(), Invalid),
            ("good".into(), Invalid),
            (String::new(), Invalid),
        ] {
            assert_eq!(kind(&source), Err(expected), "{source}");
        }
    }
}
