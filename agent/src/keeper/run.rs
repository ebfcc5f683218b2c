//! What the keeper does, in its order. The order is the safety argument of [`super`].

use std::{
    env, fs,
    io::{self, Write},
    os::fd::AsFd,
    process::ExitCode,
    time::Duration,
};

use uncloud_proto::clock::{Clock, Tick};

use super::{
    Arguments, EXIT_BUSY, EXIT_CANNOT_START, EXIT_DONE, EXIT_FENCED, EXIT_USAGE,
    records::{Files, KeeperRecord, Outcome, files},
    sys::{self, ChildSignal, Ended, KillTimer, Program, StartError},
};
use crate::lease::{LeaseClass, LeaseView, LeaseWord, boot_id};

/// The shortest sleep between two looks at the lease. Shorter burns CPU in the last moments of a lease for nothing.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
/// The longest. Longer leaves a keeper of a patient VM with an old deadline for no gain.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// When to look at the lease again: after half of what remains, so that a keeper that is late has several more tries.
#[must_use]
pub fn wake_in(now: Tick, armed: Tick) -> Duration {
    (armed.since(now) / 2).clamp(SHORTEST_WAIT, LONGEST_WAIT)
}

/// The deadline that the timer moves to, if it moves (K3): to a later one of the same lease, never to another lease's.
#[must_use]
pub fn renewal(armed: Tick, generation: u16, word: LeaseWord) -> Option<Tick> {
    (word.generation == generation && word.deadline > armed).then_some(word.deadline)
}

/// The keeper's `main`: gives the process's exit code, one of the `EXIT_` constants.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::parse(env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(e) => {
            say(&format!("{e}; this program is started by uncloud-agent"));
            return EXIT_USAGE.into();
        }
    };
    sys::close_inherited(arguments.lock_fd.into_iter().chain(arguments.pass_fds.iter().copied()));
    match keep(&arguments) {
        Ok(code) => code.into(),
        Err(e) => {
            say(&e.to_string());
            EXIT_CANNOT_START.into()
        }
    }
}

/// To standard error, which is QEMU's log once the lock is held. Nothing can be done if that fails.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "uncloud-keeper: {text}");
}

fn context(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

fn keep(arguments: &Arguments) -> io::Result<u8> {
    let lock = arguments.lock_fd.map(sys::inherited).transpose().map_err(context("the lock that was passed on"))?;
    let mut files = Files::open(&arguments.vm_dir, lock).map_err(context("the VM's directory"))?;
    // K4. Held already if the parent passed it on; until here nothing has been changed.
    match files.lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Ok(EXIT_BUSY),
        Err(fs::TryLockError::Error(e)) => return Err(context("the VM's lock")(e)),
    }
    files.clear().map_err(context("the VM's records"))?;
    sys::make_stderr(&files.log)?;

    let clock = Clock::system();
    match start(arguments, &mut files, &clock) {
        Ok(running) => {
            let ended = running.watch()?;
            let outcome = match ended {
                Ended::Exited(code) => Outcome::Exited { code },
                Ended::Signaled(signal) => Outcome::Signaled { signal },
            };
            files.write_exit(arguments, outcome, clock.wall().0)?;
            Ok(EXIT_DONE)
        }
        Err(not) => {
            let (text, outcome, code) = not.explained(arguments);
            say(&text);
            files.write_exit(arguments, outcome, clock.wall().0)?;
            Ok(code)
        }
    }
}

/// Why nothing was started.
enum NotStarted {
    /// The lease is over or another.
    Fenced(LeaseWord, Tick),
    /// Something that is needed cannot be had.
    Refused(io::Error),
    /// QEMU cannot be executed.
    Exec(io::Error),
}

impl NotStarted {
    fn explained(self, arguments: &Arguments) -> (String, Outcome, u8) {
        match self {
            Self::Fenced(word, now) => {
                let why = if word.generation == arguments.lease_generation {
                    format!("ended {} ms ago", now.since(word.deadline).as_millis())
                } else {
                    "lapsed since then".to_owned()
                };
                let text = format!("not started: the lease under which the start was decided {why}");
                (text, Outcome::Fenced, EXIT_FENCED)
            }
            Self::Refused(e) => (
                format!("not started: {e}"),
                Outcome::Refused { errno: e.raw_os_error().unwrap_or(0) },
                EXIT_CANNOT_START,
            ),
            Self::Exec(e) => (
                format!("cannot execute {}: {e}", arguments.command[0].to_string_lossy()),
                Outcome::ExecFailed { errno: e.raw_os_error().unwrap_or(0) },
                EXIT_CANNOT_START,
            ),
        }
    }
}

/// The lease that a VM lives under, and the timer that enforces it.
struct Fuse<'a> {
    lease: LeaseView,
    class: LeaseClass,
    generation: u16,
    timer: KillTimer,
    armed: Tick,
    clock: &'a Clock,
}

impl<'a> Fuse<'a> {
    /// K1: after this, the kernel ends this process at the deadline.
    fn light(arguments: &Arguments, boot: &str, clock: &'a Clock) -> Result<Self, NotStarted> {
        let lease =
            LeaseView::open(&arguments.lease_file).map_err(context("the lease file")).map_err(NotStarted::Refused)?;
        let word = lease.word(arguments.class);
        let now = clock.now();
        if !word.permits(arguments.lease_generation, now) || lease.boot_id().to_string() != boot {
            return Err(NotStarted::Fenced(word, now));
        }
        let timer = KillTimer::armed(word.deadline).map_err(context("the timer")).map_err(NotStarted::Refused)?;
        Ok(Self { lease, class: arguments.class, generation: word.generation, timer, armed: word.deadline, clock })
    }

    /// Follows the lease, and says when to do that again.
    fn follow(&mut self) -> io::Result<Duration> {
        if let Some(deadline) = renewal(self.armed, self.generation, self.lease.word(self.class)) {
            self.timer.rearm(deadline)?;
            self.armed = deadline;
        }
        Ok(wake_in(self.clock.now(), self.armed))
    }
}

/// QEMU, as the child of this process.
struct Running<'a> {
    pid: i32,
    fuse: Option<Fuse<'a>>,
    signal: ChildSignal,
}

fn start<'a>(arguments: &Arguments, files: &mut Files, clock: &'a Clock) -> Result<Running<'a>, NotStarted> {
    let refused = |what: &'static str| move |e| NotStarted::Refused(context(what)(e));
    let boot = boot_id().map_err(refused("this boot's id"))?.to_string();
    let fuse = match arguments.class {
        LeaseClass::Fast | LeaseClass::Patient => Some(Fuse::light(arguments, &boot, clock)?),
        LeaseClass::Hold => None,
    };
    env::set_current_dir(arguments.vm_dir.join(files::RUN)).map_err(refused("the VM's run directory"))?;
    sys::restrict_new_files();
    // Before the fork: a change of user clears the death signal (K2).
    if let Some(user) = arguments.user {
        sys::become_user(user.uid, user.gid).map_err(refused("the VM's user"))?;
    }
    let signal = ChildSignal::block().map_err(refused("signals"))?;
    let program = Program { argv: &arguments.command, output: files.log.as_fd(), lock: files.lock.as_fd() };
    let pid = sys::start_bound(&program).map_err(|e| match e {
        StartError::Fork(e) => NotStarted::Refused(e),
        StartError::Exec(e) => NotStarted::Exec(e),
    })?;
    // From here on QEMU lives. If its record cannot be written, this process must end, and QEMU with it.
    record(arguments, files, &boot, pid).map_err(refused("keeper.json"))?;
    Ok(Running { pid, fuse, signal })
}

fn record(arguments: &Arguments, files: &mut Files, boot_id: &str, child: i32) -> io::Result<()> {
    let keeper_pid = std::process::id();
    let qemu_pid = u32::try_from(child).map_err(io::Error::other)?;
    let record = KeeperRecord {
        boot_id,
        keeper_pid,
        keeper_start: start_of(keeper_pid)?,
        qemu_pid,
        qemu_start: start_of(qemu_pid)?,
    };
    files.write_keeper(arguments, &record)
}

impl Running<'_> {
    /// Until QEMU has ended.
    fn watch(mut self) -> io::Result<Ended> {
        loop {
            if let Some(ended) = sys::reap(self.pid)? {
                return Ok(ended);
            }
            let wait = self.fuse.as_mut().map(Fuse::follow).transpose()?;
            self.signal.wait(wait);
        }
    }
}

/// When a process started, in clock ticks since boot: field 22 of its `stat`. With the pid it names a process for good.
///
/// # Errors
///
/// There is no such process, or its `stat` reads otherwise.
pub(crate) fn start_of(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_in(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in /proc/PID/stat"))
}

/// The program's name is in parentheses and may have spaces and parentheses in it: the fields count from the last one.
fn start_in(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Tick {
        Tick::from_boot(Duration::from_millis(ms))
    }

    #[test]
    fn it_wakes_at_half_of_what_remains_within_bounds() {
        assert_eq!(wake_in(ms(0), ms(4000)), Duration::from_secs(2));
        assert_eq!(wake_in(ms(0), ms(60_000)), LONGEST_WAIT);
        assert_eq!(wake_in(ms(0), ms(20)), SHORTEST_WAIT);
        assert_eq!(wake_in(ms(9), ms(5)), SHORTEST_WAIT);
    }

    #[test]
    fn the_timer_follows_only_its_own_lease_and_only_forward() {
        let word = |generation, deadline| LeaseWord { generation, deadline: ms(deadline) };
        assert_eq!(renewal(ms(100), 5, word(5, 200)), Some(ms(200)));
        assert_eq!(renewal(ms(100), 5, word(5, 100)), None);
        assert_eq!(renewal(ms(100), 5, word(5, 50)), None);
        assert_eq!(renewal(ms(100), 5, word(6, 200)), None);
    }

    proptest! {
        /// With a renewal each second, a keeper that wakes by the rule always finds a later deadline before its own.
        #[test]
        fn a_renewed_lease_never_runs_out(lease in 2_000u64..120_000, offset in 0u64..1000) {
            let (mut now, mut armed) = (0, lease);
            for _ in 0..200 {
                now += u64::try_from(wake_in(ms(now), ms(armed)).as_millis()).unwrap();
                prop_assert!(now < armed);
                // The newest heartbeat was sent at most a second ago.
                let sent = (now.saturating_sub(offset)) / 1000 * 1000;
                armed = armed.max(sent + lease);
            }
        }
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_in(&format!("7 (a) b (c)) {rest}")), Some(4242));
        assert_eq!(start_in("7 (short) S 1"), None);
        assert!(start_of(std::process::id()).unwrap() > 0);
    }
}
