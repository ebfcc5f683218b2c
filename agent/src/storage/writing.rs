//! Writes a file that comes in pieces, and finds out its sha256 and how it begins on the way.
//!
//! A thread of its own does the writing, because a disk may make it wait; between it and who brings the pieces is a short queue, so
//! memory is bounded and the faster of the two waits for the other.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use uncloud_proto::v1::FileProblemKind;

use super::{
    format,
    http::Sink,
    images::{Progress, hex},
    room::Space,
    source::{Error, problem},
};

/// Pieces that may wait to be written.
const PIECES: usize = 8;
/// After so many bytes the room in the pool is looked at again: others write into it, too.
const LOOK_EVERY: u64 = 64 << 20;

enum Piece {
    Bytes(Bytes),
    Restart,
}

/// What has been written.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) file: File,
    pub(crate) length: u64,
    pub(crate) sha256: String,
    pub(crate) header: Vec<u8>,
}

/// Where pieces go.
#[derive(Debug)]
pub(crate) struct Feed {
    pieces: mpsc::Sender<Piece>,
    progress: watch::Sender<Progress>,
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Restart => f.write_str("restart"),
        }
    }
}

/// Begins to write a new file. It is complete when `Feed` is dropped; whether it is all that there should be, the caller knows.
pub(crate) fn start(path: PathBuf, progress: watch::Sender<Progress>) -> (Feed, JoinHandle<io::Result<Written>>) {
    let (pieces, receiver) = mpsc::channel(PIECES);
    let task = tokio::task::spawn_blocking(move || write(&path, receiver));
    (Feed { pieces, progress }, task)
}

/// When this is the error of a fetch, the writer has a better one.
fn writer_gone() -> Error {
    problem(FileProblemKind::Io, "it cannot be written")
}

impl Sink for Feed {
    async fn take(&mut self, bytes: Bytes) -> Result<(), Error> {
        let length = bytes.len() as u64;
        self.pieces.send(Piece::Bytes(bytes)).await.map_err(|_| writer_gone())?;
        self.progress.send_modify(|p| p.done += length);
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), Error> {
        self.pieces.send(Piece::Restart).await.map_err(|_| writer_gone())?;
        self.progress.send_modify(|p| p.done = 0);
        Ok(())
    }

    fn expect(&mut self, total: u64) {
        self.progress.send_modify(|p| p.total = total);
    }
}

fn write(path: &Path, mut pieces: mpsc::Receiver<Piece>) -> io::Result<Written> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    let mut file = File::options().write(true).create_new(true).open(path)?;
    let mut hasher = Sha256::new();
    let mut header = Vec::with_capacity(format::HEADER_BYTES);
    let mut length = 0;
    // Bytes that may be written before the room is looked at again.
    let mut left = 0_u64;
    while let Some(piece) = pieces.blocking_recv() {
        let bytes = match piece {
            Piece::Bytes(bytes) => bytes,
            Piece::Restart => {
                file.set_len(0)?;
                file.rewind()?;
                (hasher, length) = (Sha256::new(), 0);
                header.clear();
                continue;
            }
        };
        hasher.update(&bytes);
        header.extend(bytes.iter().take(format::HEADER_BYTES - header.len()));
        length += bytes.len() as u64;
        // Holes stay holes.
        if bytes.iter().all(|b| *b == 0) {
            file.seek(SeekFrom::Current(i64::try_from(bytes.len()).expect("a piece is small")))?;
        } else {
            let size = bytes.len() as u64;
            if left < size {
                let room = Space::of_file(&file)?.beside_reserve();
                if room < size {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                left = room.min(LOOK_EVERY.max(size));
            }
            left -= size;
            file.write_all(&bytes)?;
        }
    }
    file.set_len(length)?;
    Ok(Written { file, length, sha256: hex(&hasher.finalize()), header })
}
