//! The kernel interfaces of the lease and the keeper that std has no safe form of. All `unsafe` of both is here.

use std::{
    ffi::{CString, c_int, c_void},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr::{self, NonNull},
    sync::atomic::AtomicU64,
    time::Duration,
};

use uncloud_proto::clock::Tick;

/// Bytes of a lease file, and what is mapped of it.
const SHARED_BYTES: usize = 64;

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Loads only; a store would be a fault.
    Read,
    /// Loads and stores.
    Write,
}

/// The first 64 bytes of a file as eight words of memory that processes share.
#[derive(Debug)]
pub(crate) struct SharedWords {
    base: NonNull<AtomicU64>,
}

// SAFETY: the memory is only ever reached through atomics, and stays mapped as long as the value lives.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps `file`, which must have at least 64 bytes (the caller has looked). With [`Access::Read`] the caller must
    /// not store.
    pub(crate) fn map(file: &File, access: Access) -> io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address that the kernel picks; it aliases no Rust object.
        let base =
            unsafe { libc::mmap(ptr::null_mut(), SHARED_BYTES, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast()).map(|base| Self { base }).ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    /// The word at `index`, 0 to 7.
    pub(crate) fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < SHARED_BYTES / 8, "a lease file has eight words");
        // SAFETY: within the 64 mapped bytes, aligned (a mapping begins on a page), and any bits are a valid u64. Other
        // processes change it only by atomic stores of whole words.
        unsafe { self.base.add(index).as_ref() }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), SHARED_BYTES) };
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Closes every file descriptor from 3 on, but not those in `keep`.
pub(crate) fn close_inherited(keep: impl IntoIterator<Item = RawFd>) {
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: called first thing in `main`, before this program has opened any descriptor of its own.
            unsafe { libc::close_range(from, to, 0) };
        }
    };
    let mut keep: Vec<u32> = keep.into_iter().filter_map(|fd| u32::try_from(fd).ok()).filter(|fd| *fd >= 3).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        if fd >= from {
            close(from, fd - 1);
            from = fd + 1;
        }
    }
    close(from, u32::MAX);
}

/// Takes over a descriptor that the parent left open for this program.
pub(crate) fn inherited(fd: RawFd) -> io::Result<File> {
    // SAFETY: `fcntl` on any number is harmless; it fails when nothing is open there.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, it is not 0 to 2 (checked by the caller's argument parser), and nothing else here owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes `file` the standard error stream.
pub(crate) fn make_stderr(file: &File) -> io::Result<()> {
    // SAFETY: both are open descriptors; std does not own number 2.
    check(unsafe { libc::dup2(file.as_raw_fd(), libc::STDERR_FILENO) }).map(drop)
}

/// A kernel timer that kills this process with SIGKILL at a deadline on the boot-time clock, whether or not the process
/// can run then. It lives until the process ends: it has no `Drop`, so that no slip can disarm it.
pub(crate) struct KillTimer {
    id: libc::timer_t,
}

impl KillTimer {
    /// Makes the timer and arms it. A deadline that has passed kills at once.
    pub(crate) fn armed(deadline: Tick) -> io::Result<Self> {
        // SAFETY: an all-zero `sigevent` is a valid value of this plain C struct.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut id: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to live locals.
        check(unsafe { libc::timer_create(libc::CLOCK_BOOTTIME, &mut event, &mut id) })?;
        let timer = Self { id };
        timer.rearm(deadline)?;
        Ok(timer)
    }

    /// Moves the deadline.
    pub(crate) fn rearm(&self, deadline: Tick) -> io::Result<()> {
        let at = deadline.since_boot();
        let it_value = libc::timespec {
            tv_sec: libc::time_t::try_from(at.as_secs()).unwrap_or(libc::time_t::MAX),
            // A time of zero would disarm it.
            tv_nsec: libc::c_long::from(at.subsec_nanos().max(1)),
        };
        let spec = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // SAFETY: `id` is a timer of this process, `spec` a live local.
        check(unsafe { libc::timer_settime(self.id, libc::TIMER_ABSTIME, &spec, ptr::null_mut()) }).map(drop)
    }
}

/// Gives up root for good: groups, group and user, real, effective and saved.
pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: plain calls without memory; this process has one thread.
    unsafe {
        check(libc::setgroups(0, ptr::null()))?;
        check(libc::setresgid(gid, gid, gid))?;
        check(libc::setresuid(uid, uid, uid))?;
        if uid != 0 && libc::setresuid(0, 0, 0) == 0 {
            return Err(io::Error::other("could become root again"));
        }
    }
    Ok(())
}

/// Keeps room for a page of content in an empty file, so that a full disk cannot keep it from being written later. Where
/// the file system cannot do that, it is left out.
pub(crate) fn reserve_page(file: &File) {
    // SAFETY: a plain call on an open descriptor.
    unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, 4096) };
}

/// What this program makes from now on is for its user alone.
pub(crate) fn restrict_new_files() {
    // SAFETY: cannot fail, touches no memory.
    unsafe { libc::umask(0o077) };
}

/// SIGCHLD, blocked so that it is waited for.
pub(crate) struct ChildSignal {
    set: libc::sigset_t,
}

impl ChildSignal {
    /// Blocks SIGCHLD, and ignores the signals by which people end a whole session: QEMU answers those itself, and the
    /// keeper then writes down how it ended.
    pub(crate) fn block() -> io::Result<Self> {
        // SAFETY: `set` is initialised by `sigemptyset`; the handlers are the constant SIG_IGN.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGCHLD);
            check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()))?;
            for signal in IGNORED {
                libc::signal(signal, libc::SIG_IGN);
            }
            Ok(Self { set })
        }
    }

    /// Waits for it, for `limit` at most.
    pub(crate) fn wait(&self, limit: Option<Duration>) {
        // SAFETY: `set` is initialised, the time is a live local, and the information about the signal is not asked for.
        unsafe {
            match limit {
                Some(limit) => {
                    let limit = libc::timespec {
                        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
                        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
                    };
                    libc::sigtimedwait(&self.set, ptr::null_mut(), &limit);
                }
                None => {
                    libc::sigwaitinfo(&self.set, ptr::null_mut());
                }
            }
        }
    }
}

/// What a keeper ignores and its child does not.
const IGNORED: [c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE];

/// A program to be started under the keeper.
pub(crate) struct Program<'a> {
    /// `argv`, the program itself first.
    pub(crate) argv: &'a [CString],
    /// Where its standard output and error go.
    pub(crate) output: BorrowedFd<'a>,
    /// Stays open in it: the lock that says that somebody of this VM lives.
    pub(crate) lock: BorrowedFd<'a>,
}

/// Why no program was started.
pub(crate) enum StartError {
    /// It could not be forked.
    Fork(io::Error),
    /// The child could not become the program.
    Exec(io::Error),
}

/// Starts `program` as a child that the kernel kills when this process ends, whatever ends it. Gives its process id.
///
/// The death signal is bound to the *thread* that forks, and a change of user clears it: so the caller must have one
/// thread and have given up its privileges before.
pub(crate) fn start_bound(program: &Program<'_>) -> Result<i32, StartError> {
    let mut argv: Vec<*const libc::c_char> = program.argv.iter().map(|a| a.as_ptr()).collect();
    argv.push(ptr::null());
    let null = File::open("/dev/null").map_err(StartError::Fork)?;
    let (said, say) = pipe().map_err(StartError::Fork)?;
    // SAFETY: `getpid` cannot fail. After `fork` the child, which is a copy of a process with one thread, calls only
    // functions that are safe there, and ends in `_exit` or another program. `argv` ends with a null pointer and its
    // strings live in `program`.
    let child = unsafe {
        let keeper = libc::getpid();
        let child = libc::fork();
        if child == 0 {
            let errno = become_program(keeper, program, &argv, &null);
            libc::write(say.as_raw_fd(), ptr::from_ref(&errno).cast(), size_of_val(&errno));
            libc::_exit(127);
        }
        child
    };
    drop(say);
    check(child).map_err(StartError::Fork)?;

    // Ends when the child has become the program (the pipe closes by itself then) or has said why not.
    let mut errno: c_int = 0;
    // SAFETY: reads at most the size of `errno` into it.
    let read = unsafe { libc::read(said.as_raw_fd(), ptr::from_mut(&mut errno).cast(), size_of::<c_int>()) };
    if read == size_of::<c_int>() as isize {
        // SAFETY: waits for the child of this process; the status is not asked for.
        unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
        return Err(StartError::Exec(io::Error::from_raw_os_error(errno)));
    }
    Ok(child)
}

/// In the child: gives the errno that kept it from becoming the program.
///
/// # Safety
///
/// Only in a freshly forked child of a process with one thread; `argv` ends with null.
unsafe fn become_program(
    keeper: libc::pid_t,
    program: &Program<'_>,
    argv: &[*const libc::c_char],
    null: &File,
) -> c_int {
    const ONE: libc::c_ulong = 1;
    const ZERO: libc::c_ulong = 0;
    // SAFETY: system calls on numbers and on memory that the caller vouches for.
    unsafe {
        let ok = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) == 0
            // The keeper may have died before the line above: then nobody would send the signal.
            && libc::getppid() == keeper
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, ONE, ZERO, ZERO, ZERO) == 0
            && libc::dup2(null.as_raw_fd(), 0) == 0
            && libc::dup2(program.output.as_raw_fd(), 1) == 1
            && libc::dup2(program.output.as_raw_fd(), 2) == 2
            && libc::fcntl(program.lock.as_raw_fd(), libc::F_SETFD, 0) == 0;
        if ok {
            for signal in IGNORED {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
            libc::execvp(argv[0], argv.as_ptr());
        }
        *libc::__errno_location()
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors, which are ours from then on.
    unsafe {
        check(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Lets a child do `work` and waits for it. A process that waits for a child dies of SIGKILL at once; one that waits for a
/// file system (a write to a journal that is busy) dies when that has answered, and its own child after it.
///
/// Files that `work` owns are closed here before it begins, so that their last close, at which some file systems write,
/// is the child's too. Only for a process with one thread.
pub(crate) fn in_child(work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let (begun, begin) = pipe()?;
    // SAFETY: the child is a copy of a process with one thread, and ends in `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(begin);
        let mut byte = 0u8;
        // SAFETY: reads at most one byte into a live local. It ends when the parent has closed its end.
        unsafe { libc::read(begun.as_raw_fd(), ptr::from_mut(&mut byte).cast(), 1) };
        let errno = work().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
        // SAFETY: does not return. An errno is below 256.
        unsafe { libc::_exit(errno) }
    }
    check(child)?;
    drop(work);
    drop(begin);
    let mut status = 0;
    // SAFETY: `status` is a live local.
    while check(unsafe { libc::waitpid(child, &mut status, 0) }).is_err_and(|e| e.kind() == io::ErrorKind::Interrupted)
    {
    }
    match libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::other("the process that writes was killed")),
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// Whether the child has ended, and how.
pub(crate) fn reap(child: i32) -> io::Result<Option<Ended>> {
    let mut status = 0;
    // SAFETY: `status` is a live local.
    let found = check(unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) })?;
    if found == 0 {
        Ok(None)
    } else if libc::WIFSIGNALED(status) {
        Ok(Some(Ended::Signaled(libc::WTERMSIG(status))))
    } else {
        Ok(Some(Ended::Exited(libc::WEXITSTATUS(status))))
    }
}

/// Lets `command` begin a session of its own, with `keep` still open in it under the same numbers.
pub(crate) fn detach(command: &mut Command, keep: Vec<RawFd>) {
    // SAFETY: between fork and exec only system calls on numbers; `keep` is open in the caller until the command has been spawned.
    unsafe {
        command.pre_exec(move || {
            check(libc::setsid())?;
            for fd in &keep {
                check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
            Ok(())
        });
    }
}
