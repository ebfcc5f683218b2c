//! Answers the leader's questions about files: is it there, what is its sha256, what kind of disk is it. Of a file on a web server
//! only the beginning is looked at: a user who adds an image must not wait for gigabytes.

use std::{
    fs::File,
    io::{Read, Seek},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, time};
use uncloud_proto::v1::{FileFacts, FileProblemKind, ImageFileRole, ImageFormat};

use super::{
    blocking, format,
    http::Http,
    images::{Images, hex},
    source::{self, Error, Roots, problem},
};
use crate::vm::desired::Format;

/// So many files are read at once, and so many more may wait.
const AT_ONCE: usize = 2;
/// So many web servers are asked at once. Apart from the files, because they may be slow.
const SERVERS_AT_ONCE: usize = 8;
/// How long a web server may take for the beginning of a file, in all.
const PEEK: Duration = Duration::from_secs(60);
const MOST_WAITING: usize = 64;

/// Looks at files for the leader.
#[derive(Debug, Clone)]
pub struct Inspector {
    roots: Arc<Roots>,
    http: Result<Http, String>,
    most: u64,
    reading: Arc<Semaphore>,
    asking: Arc<Semaphore>,
    patience: Duration,
    waiting: Arc<Semaphore>,
}

impl Inspector {
    /// Files may lie below these roots.
    #[must_use]
    pub fn new(roots: Arc<Roots>) -> Self {
        let (reading, waiting) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(Semaphore::new(MOST_WAITING)));
        Self {
            roots,
            http: Err("this host fetches nothing from the network".into()),
            most: u64::MAX,
            reading,
            asking: Arc::new(Semaphore::new(SERVERS_AT_ONCE)),
            patience: PEEK,
            waiting,
        }
    }

    /// With what this host has to bring images with.
    #[must_use]
    pub fn of(images: &Images) -> Self {
        let env = images.env();
        Self { http: env.http.clone(), most: env.most, ..Self::new(Arc::clone(&env.roots)) }
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
        let facts = if source::is_address(&source) {
            let peek = async {
                let _asking = self.asking.acquire().await.expect("it is never closed");
                self.peek(&source, role).await
            };
            let slow = |_| problem(FileProblemKind::Io, format!("{source}: nothing came of it in {:?}", self.patience));
            time::timeout(self.patience, peek).await.map_err(slow)??
        } else {
            let permit = Arc::clone(&self.reading).acquire_owned().await.expect("it is never closed");
            let roots = Arc::clone(&self.roots);
            blocking(move || {
                let facts = look(&roots, &source, role);
                drop(permit);
                facts
            })
            .await?
        };
        if facts.size_bytes.max(facts.virtual_size_bytes) > self.most {
            let words = format::too_large(facts.size_bytes.max(facts.virtual_size_bytes), self.most);
            return Err(problem(FileProblemKind::Invalid, words));
        }
        Ok(facts)
    }

    /// Looks at the beginning of a file on a web server.
    async fn peek(&self, url: &str, role: ImageFileRole) -> Result<FileFacts, Error> {
        let http = self.http.as_ref().map_err(|words| problem(FileProblemKind::Forbidden, words.clone()))?;
        let (header, size) = http.peek(url, format::HEADER_BYTES).await?;
        let mut facts = FileFacts { size_bytes: size.unwrap_or(0), ..FileFacts::default() };
        if header.is_empty() {
            return Err(problem(FileProblemKind::Invalid, format!("{url} is empty")));
        }
        if role == ImageFileRole::Disk {
            // A server that does not say the size: what a guest sees of a raw image is known when all is there.
            let disk = format::detect(&header, size.unwrap_or(0).max(1)).map_err(|e| unusable(url, &e))?;
            describe(&mut facts, disk);
        }
        Ok(facts)
    }
}

fn look(roots: &Roots, source: &str, role: ImageFileRole) -> Result<FileFacts, Error> {
    let (mut file, size) = roots.open(source)?;
    let unreadable = |e: std::io::Error| problem(FileProblemKind::Io, format!("{source} cannot be read: {e}"));
    let mut facts = FileFacts { size_bytes: size, ..FileFacts::default() };
    if role == ImageFileRole::Disk {
        let header = header(&mut file).map_err(unreadable)?;
        let disk = format::detect(&header, size).map_err(|e| unusable(source, &e))?;
        describe(&mut facts, disk);
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

fn unusable(source: &str, refused: &format::Refused) -> Error {
    problem(FileProblemKind::Invalid, format!("{source} cannot be used as a disk: {refused}"))
}

fn describe(facts: &mut FileFacts, disk: format::Facts) {
    facts.virtual_size_bytes = disk.virtual_size;
    facts.set_format(match disk.format {
        Format::Raw => ImageFormat::Raw,
        Format::Qcow2 => ImageFormat::Qcow2,
    });
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
    use crate::storage::http::{Allowed, Patience};

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

    #[tokio::test]
    async fn web_servers_that_say_nothing_keep_no_file_from_being_read_and_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        fs::write(&path, "some").unwrap();
        // Takes connections, as the kernel does, and never says anything.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", silent.local_addr().unwrap());
        let hour = Duration::from_secs(3600);
        let http = Http::new(Allowed::Listed(vec![url.clone()]), Patience { connect: hour, silence: hour }).unwrap();
        let roots = Arc::new(Roots::new(&[dir.path().to_owned()], &[]));
        let inspector = Inspector { http: Ok(http), ..Inspector::new(roots) };
        let asking: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let (inspector, url) = (inspector.clone(), url.clone());
                tokio::spawn(async move { inspector.inspect(url, ImageFileRole::Kernel).await })
            })
            .collect();
        for _ in 0..AT_ONCE {
            silent.accept().await.unwrap();
        }
        let read = inspector.inspect(path.to_str().unwrap().into(), ImageFileRole::Kernel);
        assert!(time::timeout(Duration::from_secs(10), read).await.expect("it does not wait for them").is_ok());
        asking.iter().for_each(tokio::task::JoinHandle::abort);
        let hasty = Inspector { patience: Duration::from_millis(50), ..inspector };
        let error = hasty.inspect(url, ImageFileRole::Kernel).await.unwrap_err();
        assert!(error.kind == FileProblemKind::Io && error.message.contains("nothing came of it"), "{error}");
    }
}
