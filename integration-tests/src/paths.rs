//! Where the programs and the guests are.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

/// The directory of the programs under test: the one in which the running test was built.
///
/// # Errors
///
/// The place of the running program is not known.
pub fn binary_dir() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("where is the running program?")?;
    let dir = exe.parent().context("the running program has no directory")?;
    // Tests are built into `deps`, one below the programs.
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_path_buf() } else { dir.to_path_buf() })
}

/// One of the programs under test.
///
/// # Errors
///
/// It has not been built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let path = binary_dir()?.join(name);
    ensure!(path.is_file(), "{} is not there: run `make build` (or `make test`)", path.display());
    Ok(path)
}

/// The root of the source tree.
#[must_use]
pub fn source_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace")
}

/// One of the guests' files: `micro.img`, `vmlinuz`, `initrd.img`.
///
/// # Errors
///
/// It has not been made.
pub fn guest(name: &str) -> anyhow::Result<PathBuf> {
    let path = guest_dir().join(name);
    ensure!(path.is_file(), "{} is not there: run `make guests` (or `make test`)", path.display());
    Ok(path)
}

/// The directory of the guests' files.
#[must_use]
pub fn guest_dir() -> PathBuf {
    source_root().join("target/guests")
}

/// The Python with grpcio that `make setup` has made.
///
/// # Errors
///
/// It is not there.
pub fn python() -> anyhow::Result<PathBuf> {
    let path = source_root().join("target/tools/python/bin/python");
    ensure!(path.exists(), "{} is not there: run `make setup` (or `make test`)", path.display());
    Ok(path)
}
