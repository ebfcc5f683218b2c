//! Answers the leader's questions about files: is it there, what is its sha256, what kind of disk is it.

use std::{
    fs::File,
    io::{Read, Seek},
    sync::Arc,
};

use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use uncloud_proto::v1::{FileFacts, FileProblemKind, ImageFileRole, ImageFormat};

use super::{
    blocking, format,
    images::hex,
    source::{Error, Roots, problem},
};
use crate::vm::desired::Format;

/// So many files are read at once, and so many more may wait.
const AT_ONCE: usize = 2;
const MOST_WAITING: usize = 64;

/// Looks at files for the leader.
#[derive(Debug, Clone)]
pub struct Inspector {
    roots: Arc<Roots>,
    reading: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Inspector {
    /// Files may lie below these roots.
    #[must_use]
    pub fn new(roots: Arc<Roots>) -> Self {
        let (reading, waiting) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(Semaphore::new(MOST_WAITING)));
        Self { roots, reading, waiting }
    }

    /// Reads a whole file. Takes as long as its disk takes.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub async fn inspect(&self, source: String, role: ImageFileRole) -> Result<FileFacts, Error> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(problem(FileProblemKind::Io, "this host is busy reading other files; try again"));
        };
        let permit = Arc::clone(&self.reading).acquire_owned().await.expect("it is never closed");
        let roots = Arc::clone(&self.roots);
        blocking(move || {
            let facts = look(&roots, &source, role);
            drop(permit);
            facts
        })
        .await
    }
}

fn look(roots: &Roots, source: &str, role: ImageFileRole) -> Result<FileFacts, Error> {
    let (mut file, size) = roots.open(source)?;
    let unreadable = |e: std::io::Error| problem(FileProblemKind::Io, format!("{source} cannot be read: {e}"));
    let mut facts = FileFacts { size_bytes: size, ..FileFacts::default() };
    if role == ImageFileRole::Disk {
        let header = header(&mut file).map_err(unreadable)?;
        let disk = format::detect(&header, size)
            .map_err(|e| problem(FileProblemKind::Invalid, format!("{source} cannot be used as a disk: {e}")))?;
        facts.virtual_size_bytes = disk.virtual_size;
        facts.set_format(match disk.format {
            Format::Raw => ImageFormat::Raw,
            Format::Qcow2 => ImageFormat::Qcow2,
        });
    } else if size == 0 {
        return Err(problem(FileProblemKind::Invalid, format!("{source} is empty")));
    }
    let mut hasher = Sha256::new();
    let read = std::io::copy(&mut file, &mut hasher).map_err(unreadable)?;
    if read != size {
        return Err(problem(FileProblemKind::Invalid, format!("{source} changed while it was read")));
    }
    facts.sha256 = hex(&hasher.finalize());
    Ok(facts)
}

fn header(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut header = Vec::with_capacity(format::HEADER_BYTES);
    let limit = u64::try_from(format::HEADER_BYTES).expect("it is small");
    file.by_ref().take(limit).read_to_end(&mut header)?;
    file.rewind()?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn facts_are_about_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        fs::write(&path, vec![1; 1000]).unwrap();
        let inspector = Inspector::new(Arc::new(Roots::new(&[dir.path().to_owned()], &[])));
        let source = path.to_str().unwrap().to_owned();
        let facts = inspector.inspect(source.clone(), ImageFileRole::Disk).await.unwrap();
        assert_eq!((facts.size_bytes, facts.virtual_size_bytes, facts.format()), (1000, 1024, ImageFormat::Raw));
        assert_eq!(facts.sha256, hex(&Sha256::digest(vec![1; 1000])));
        let facts = inspector.inspect(source, ImageFileRole::Kernel).await.unwrap();
        assert_eq!(facts.format(), ImageFormat::Unspecified);
        fs::write(&path, "").unwrap();
        for role in [ImageFileRole::Disk, ImageFileRole::Initrd] {
            let error = inspector.inspect(path.to_str().unwrap().into(), role).await.unwrap_err();
            assert_eq!(error.kind, FileProblemKind::Invalid);
        }
    }
}
