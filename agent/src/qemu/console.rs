//! A VM's serial console: its log, and a line into it.
//!
//! QEMU writes all that the guest says to `run/serial.log`, whether or not anybody looks. So *output* is read from that
//! file: every reader has its own place in it, a slow one slows nobody and loses nothing, and looking on can never stall
//! the guest. Only *input* needs QEMU's socket, which has room for one client and stalls the guest when that client does not
//! read: it is connected when somebody first types, always drained, and left when the last one who attached has gone.
//!
//! The log is bounded by [`trim_log`], which the agent calls now and then. A reader goes on across that, and across a
//! restart of QEMU; what it had not read when the log was cut is lost to it.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use rustix::fs::OFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{Notify, mpsc},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::{
    command_line::{CONSOLE_SOCKET, SERIAL_LOG},
    files, instance,
};
use crate::keeper;

/// Chunks that wait for a reader or for QEMU.
const QUEUE: usize = 16;
/// How much is read at once.
const CHUNK: usize = 16 << 10;
/// How often a reader that somebody watches looks for new output.
const LOOK_ATTACHED: Duration = Duration::from_millis(50);
/// How often a reader that follows the log does.
const LOOK_FOLLOWING: Duration = Duration::from_millis(200);
/// How long QEMU may take to accept input. A guest that does not read its serial port accepts none.
const INPUT_LIMIT: Duration = Duration::from_secs(1);
/// After a failed connection, how long until it is tried again. What is typed meanwhile is lost.
const CONNECT_PAUSE: Duration = Duration::from_millis(500);
/// The log as it was before it was trimmed the last time. In the VM's own directory, not in `run`, which belongs to the
/// VM's user.
pub const OLD_LOG: &str = "serial.log.1";

/// A VM's console. Clones are the same console.
#[derive(Clone, Debug)]
pub struct Console {
    vm_dir: Arc<Path>,
    line: Arc<Mutex<Weak<Line>>>,
}

/// Somebody who looks at a console. The other end stops when both are dropped.
#[derive(Debug)]
pub struct ConsoleHandle {
    /// What the guest says.
    pub output: mpsc::Receiver<Bytes>,
    /// What is typed. Lost while the VM does not run or does not read.
    pub input: mpsc::Sender<Bytes>,
}

/// The way in, shared by all who are attached. It ends with the last of them.
#[derive(Debug)]
struct Line {
    typed: mpsc::Sender<Bytes>,
    /// QEMU has just said something, so the log is about to grow.
    heard: Arc<Notify>,
}

impl Console {
    /// The console of the VM whose directory this is.
    #[must_use]
    pub fn new(vm_dir: PathBuf) -> Self {
        Self { vm_dir: vm_dir.into(), line: Arc::default() }
    }

    /// Begins to look: first at the last `history_bytes` of the log, then at what comes. The VM need not run (yet).
    ///
    /// # Errors
    ///
    /// The log is there and cannot be read.
    pub async fn attach(&self, history_bytes: u32) -> io::Result<ConsoleHandle> {
        let reader = LogReader::open(&self.vm_dir, history_bytes).await?;
        let line = self.line();
        let (output, out) = mpsc::channel(QUEUE);
        let (input, mut typed) = mpsc::channel::<Bytes>(QUEUE);
        tokio::spawn(async move {
            let read = reader.run(output, LOOK_ATTACHED, Some(line.heard.clone()));
            let write = async {
                while let Some(bytes) = typed.recv().await {
                    // Waits when the guest does not read; then whoever types waits, too.
                    if line.typed.send(bytes).await.is_err() {
                        break;
                    }
                }
                // Only looking from now on.
                std::future::pending::<()>().await;
            };
            tokio::select! { () = read => {}, () = write => {} }
        });
        Ok(ConsoleHandle { output: out, input })
    }

    fn line(&self) -> Arc<Line> {
        let mut current = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = current.upgrade() {
            return line;
        }
        let (typed, to_type) = mpsc::channel(QUEUE);
        let heard = Arc::new(Notify::new());
        tokio::spawn(carry(self.vm_dir.clone(), to_type, heard.clone()));
        let line = Arc::new(Line { typed, heard });
        *current = Arc::downgrade(&line);
        line
    }
}

/// Carries what is typed to QEMU, until nobody is attached any more.
async fn carry(vm_dir: Arc<Path>, mut typed: mpsc::Receiver<Bytes>, heard: Arc<Notify>) {
    let mut socket: Option<UnixStream> = None;
    let mut not_before = Instant::now();
    let mut drained = vec![0; CHUNK];
    loop {
        let next = match &mut socket {
            Some(socket) => tokio::select! {
                bytes = typed.recv() => Next::Typed(bytes),
                read = socket.read(&mut drained) => Next::Heard(read),
            },
            None => Next::Typed(typed.recv().await),
        };
        match next {
            Next::Typed(None) => return,
            Next::Typed(Some(bytes)) => {
                if socket.is_none() && Instant::now() >= not_before {
                    socket = connect(&vm_dir).await;
                    not_before = Instant::now() + CONNECT_PAUSE;
                }
                if let Some(open) = &mut socket
                    && !deliver(open, &bytes, &mut drained, &heard).await
                {
                    socket = None;
                }
            }
            Next::Heard(Ok(1..)) => heard.notify_waiters(),
            Next::Heard(Ok(0) | Err(_)) => socket = None,
        }
    }
}

enum Next {
    Typed(Option<Bytes>),
    Heard(io::Result<usize>),
}

/// Writes to QEMU while draining what it says: a QEMU that waits for us to read does not read either. Gives whether the
/// connection is still good.
async fn deliver(socket: &mut UnixStream, bytes: &[u8], drained: &mut [u8], heard: &Notify) -> bool {
    let (mut read, mut write) = socket.split();
    let drain = async {
        while let Ok(1..) = read.read(drained).await {
            heard.notify_waiters();
        }
    };
    let written = tokio::select! {
        written = timeout(INPUT_LIMIT, write.write_all(bytes)) => written,
        () = drain => return false,
    };
    match written {
        Ok(result) => result.is_ok(),
        // The guest does not read. What it has not taken by now is lost, and nothing else is wrong.
        Err(_) => true,
    }
}

async fn connect(vm_dir: &Path) -> Option<UnixStream> {
    let record = files::read_any_keeper(vm_dir)?;
    match timeout(INPUT_LIMIT, instance::connect_socket(vm_dir, &record, CONSOLE_SOCKET)).await {
        Ok(Ok(socket)) => Some(socket),
        Ok(Err(e)) => {
            tracing::debug!(vm = %record.vm, error = %e, "no connection to the console");
            None
        }
        Err(_) => None,
    }
}

/// The end of a VM's log: at most `tail_bytes`. Empty if there is none.
///
/// # Errors
///
/// It is there and cannot be read.
pub async fn read_log(vm_dir: &Path, tail_bytes: u32) -> io::Result<Vec<u8>> {
    let vm_dir = vm_dir.to_owned();
    blocking(move || {
        let tail = u64::from(tail_bytes);
        let mut end = match open_log(&vm_dir) {
            Ok(mut log) => tail_of(&mut log, tail)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e),
        };
        // The log has just been trimmed, perhaps: then the rest is in the old one.
        let missing = tail - end.len() as u64;
        if missing > 0
            && let Ok(mut old) = File::open(vm_dir.join(OLD_LOG))
        {
            let mut all = tail_of(&mut old, missing)?;
            all.append(&mut end);
            end = all;
        }
        Ok(end)
    })
    .await
}

fn tail_of(file: &mut File, bytes: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut tail = Vec::new();
    file.take(bytes).read_to_end(&mut tail)?;
    Ok(tail)
}

/// Follows a VM's log, from its last `tail_bytes` on, for as long as the receiver lives. A slow receiver is waited for.
///
/// # Errors
///
/// The log is there and cannot be read.
pub async fn follow_log(vm_dir: &Path, tail_bytes: u32) -> io::Result<mpsc::Receiver<Bytes>> {
    let reader = LogReader::open(vm_dir, tail_bytes).await?;
    let (output, out) = mpsc::channel(QUEUE);
    tokio::spawn(reader.run(output, LOOK_FOLLOWING, None));
    Ok(out)
}

/// Bounds what a VM's guest can write to this host's disk: once `serial.log` has more than `limit` bytes it begins anew, and
/// its last `limit` bytes are kept in [`OLD_LOG`]. QEMU's own log is cut likewise.
///
/// QEMU keeps its file open and appends, so the file is copied and emptied, not renamed; what the guest says between
/// the two is lost.
///
/// # Errors
///
/// The log is there and cannot be read, copied or cut.
pub async fn trim_log(vm_dir: &Path, limit: u64) -> io::Result<()> {
    let vm_dir = vm_dir.to_owned();
    blocking(move || {
        match files::open_in_run(&vm_dir, SERIAL_LOG, OFlags::RDWR) {
            Ok(mut log) if log.metadata()?.len() > limit => {
                let tail = tail_of(&mut log, limit)?;
                let new = vm_dir.join("serial.log.new");
                let mut copy = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
                io::Write::write_all(&mut copy, &tail)?;
                fs::rename(new, vm_dir.join(OLD_LOG))?;
                log.set_len(0)?;
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        match fs::OpenOptions::new().write(true).open(vm_dir.join(keeper::files::LOG)) {
            Ok(log) if log.metadata()?.len() > limit => log.set_len(0),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    })
    .await
}

fn open_log(vm_dir: &Path) -> io::Result<File> {
    files::open_in_run(vm_dir, SERIAL_LOG, OFlags::RDONLY)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A place in a log.
struct LogReader {
    vm_dir: PathBuf,
    /// From the old log, to be given first.
    history: Bytes,
    /// Which file `offset` is in; nothing if there is no log yet.
    inode: Option<u64>,
    offset: u64,
}

impl LogReader {
    async fn open(vm_dir: &Path, tail_bytes: u32) -> io::Result<Self> {
        let vm_dir = vm_dir.to_owned();
        blocking(move || {
            let about = match open_log(&vm_dir) {
                Ok(log) => log.metadata()?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Ok(Self { vm_dir, history: Bytes::new(), inode: None, offset: 0 });
                }
                Err(e) => return Err(e),
            };
            let tail = u64::from(tail_bytes);
            let history = match File::open(vm_dir.join(OLD_LOG)) {
                Ok(mut old) if tail > about.len() => tail_of(&mut old, tail - about.len())?.into(),
                Ok(_) | Err(_) => Bytes::new(),
            };
            Ok(Self { vm_dir, history, inode: Some(about.ino()), offset: about.len().saturating_sub(tail) })
        })
        .await
    }

    /// Gives what is there and what comes, until nobody takes it any more.
    async fn run(mut self, output: mpsc::Sender<Bytes>, look_every: Duration, heard: Option<Arc<Notify>>) {
        let mut chunk = std::mem::take(&mut self.history);
        loop {
            if !chunk.is_empty() {
                tokio::select! {
                    sent = output.send(chunk) => if sent.is_err() { return },
                    () = output.closed() => return,
                }
            }
            let (reader, read) =
                match spawn_blocking(move || self.read().map_or_else(|e| (None, Err(e)), |(r, b)| (Some(r), Ok(b))))
                    .await
                {
                    Ok((Some(reader), Ok(bytes))) => (reader, bytes),
                    Ok((_, Err(e))) => {
                        tracing::warn!(error = %e, "a serial log cannot be read any more");
                        return;
                    }
                    Ok((None, Ok(_))) | Err(_) => return,
                };
            self = reader;
            chunk = read;
            if chunk.is_empty() {
                let wake = async {
                    match &heard {
                        // The log is written right after the socket.
                        Some(heard) => {
                            heard.notified().await;
                            sleep(Duration::from_millis(1)).await;
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = output.closed() => return,
                    () = wake => {}
                    () = sleep(look_every) => {}
                }
            }
        }
    }

    /// The next piece; empty if there is none now.
    fn read(mut self) -> io::Result<(Self, Bytes)> {
        let log = match open_log(&self.vm_dir) {
            Ok(log) => log,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((self, Bytes::new())),
            Err(e) => return Err(e),
        };
        let about = log.metadata()?;
        if self.inode != Some(about.ino()) || about.len() < self.offset {
            // Another file, or it was cut: from its beginning.
            (self.inode, self.offset) = (Some(about.ino()), 0);
        }
        let mut bytes = vec![0; CHUNK];
        let read = log.read_at(&mut bytes, self.offset)?;
        bytes.truncate(read);
        self.offset += read as u64;
        Ok((self, bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn vm_dir() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        let log = fs::OpenOptions::new().append(true).create(true).open(dir.path().join("run/serial.log")).unwrap();
        (dir, log)
    }

    async fn collect(output: &mut mpsc::Receiver<Bytes>, bytes: usize) -> String {
        let mut all = Vec::new();
        while all.len() < bytes {
            let chunk = timeout(Duration::from_secs(5), output.recv()).await;
            all.extend_from_slice(&chunk.unwrap_or_else(|_| panic!("only {}", String::from_utf8_lossy(&all))).unwrap());
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn a_vm_without_a_log_has_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_log(dir.path(), 100).await.unwrap(), b"");
        fs::create_dir(dir.path().join("run")).unwrap();
        assert_eq!(read_log(dir.path(), 100).await.unwrap(), b"");
        trim_log(dir.path(), 10).await.unwrap();
        // Whoever looks before the first start sees the first line.
        let mut console = Console::new(dir.path().to_owned()).attach(100).await.unwrap();
        fs::write(dir.path().join("run/serial.log"), "first\n").unwrap();
        assert_eq!(collect(&mut console.output, 6).await, "first\n");
    }

    #[tokio::test]
    async fn every_reader_gets_everything_once_however_slow() {
        let (dir, mut log) = vm_dir();
        log.write_all(b"old\n").unwrap();
        let console = Console::new(dir.path().to_owned());
        let mut all = console.attach(1000).await.unwrap();
        let mut new = console.clone().attach(0).await.unwrap();
        let mut some = follow_log(dir.path(), 2).await.unwrap();
        // Far more than the queues hold, and nobody reads yet.
        let line = "x".repeat(999) + "\n";
        for _ in 0..1000 {
            log.write_all(line.as_bytes()).unwrap();
        }
        let text = line.repeat(1000);
        assert_eq!(collect(&mut new.output, text.len()).await, text);
        assert_eq!(collect(&mut all.output, text.len() + 4).await, format!("old\n{text}"));
        assert_eq!(collect(&mut some, text.len() + 2).await, format!("d\n{text}"));
    }

    #[tokio::test]
    async fn trimming_bounds_the_log_and_readers_go_on() {
        let (dir, mut log) = vm_dir();
        let mut follower = follow_log(dir.path(), 0).await.unwrap();
        log.write_all(b"0123456789").unwrap();
        assert_eq!(collect(&mut follower, 10).await, "0123456789");
        trim_log(dir.path(), 10).await.unwrap();
        assert_eq!(read_log(dir.path(), 100).await.unwrap(), b"0123456789", "not longer than the limit");
        log.write_all(b"ab").unwrap();
        assert_eq!(collect(&mut follower, 2).await, "ab");
        trim_log(dir.path(), 10).await.unwrap();
        assert_eq!(fs::metadata(dir.path().join("run/serial.log")).unwrap().len(), 0);
        log.write_all(b"cd").unwrap();
        assert_eq!(collect(&mut follower, 2).await, "cd");
        assert_eq!(read_log(dir.path(), 5).await.unwrap(), b"9abcd", "across the cut");
        let mut late = follow_log(dir.path(), 5).await.unwrap();
        assert_eq!(collect(&mut late, 5).await, "9abcd");
    }

    #[tokio::test]
    async fn a_trap_in_place_of_the_log_is_neither_read_nor_cut() {
        let (dir, _log) = vm_dir();
        let path = dir.path().join("run/serial.log");
        fs::remove_file(&path).unwrap();
        fs::write(dir.path().join("secret"), "s".repeat(100)).unwrap();
        std::os::unix::fs::symlink("../secret", &path).unwrap();
        assert!(read_log(dir.path(), 10).await.is_err());
        assert!(trim_log(dir.path(), 10).await.is_err());
        assert!(Console::new(dir.path().to_owned()).attach(10).await.is_err());
        assert_eq!(fs::read(dir.path().join("secret")).unwrap().len(), 100);
    }
}
