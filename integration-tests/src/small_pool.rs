//! A small file system of its own, for pools that fill up.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::ensure;

/// It, until it is dropped.
#[derive(Debug)]
pub struct SmallPool {
    dir: tempfile::TempDir,
}

impl SmallPool {
    /// Makes one of this size, as `48m`.
    ///
    /// # Errors
    ///
    /// It cannot be mounted; that needs root.
    pub fn mount(size: &str) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("uncloud-pool-").tempdir()?;
        let options = format!("size={size},mode=755");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "uncloud-test"]).arg(dir.path()).output()?;
        ensure!(mounted.status.success(), "mount: {}", String::from_utf8_lossy(&mounted.stderr));
        Ok(Self { dir })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn free(&self) -> anyhow::Result<u64> {
        let output = Command::new("stat").args(["-f", "-c", "%a %S"]).arg(self.path()).output()?;
        let text = String::from_utf8(output.stdout)?;
        let numbers = text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        Ok(numbers.iter().product())
    }

    /// A file that leaves so many bytes free.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn fill(&self, left: u64) -> anyhow::Result<PathBuf> {
        let path = self.path().join("something-else");
        let size = self.free()?.saturating_sub(left);
        let made = Command::new("fallocate").args(["-l", &size.to_string()]).arg(&path).status()?;
        ensure!(made.success(), "fallocate");
        Ok(path)
    }

    /// Its files.
    ///
    /// # Errors
    ///
    /// They cannot be listed.
    pub fn files(&self) -> anyhow::Result<Vec<String>> {
        let output = Command::new("find").arg(self.path()).args(["-type", "f"]).output()?;
        let mut files: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
        files.sort();
        Ok(files)
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
