//! What every part of the simulated world shares: true time, chance, the queue, the network, the trace, the checker.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use uncloud_controller::health::Timings;
use uncloud_proto::clock::WallTime;

use super::{
    check::Check,
    clock::{MS, Ns, SEC},
    net::Net,
    queue::{Event, Queue, What, Whom},
    report::Stats,
    rng::Rng,
    storage::Files,
    trace::Trace,
};

/// Which rules a run keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The assumptions of docs/fencing.md hold; any violation is a bug.
    Assumptions,
    /// Clocks differ by far more than assumed (A1 is broken): the checker must find that out.
    WildClocks,
}

/// What a run is made of, drawn from its seed.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Which rules it keeps.
    pub(crate) mode: Mode,
    /// Controllers.
    pub(crate) controllers: usize,
    /// Hosts.
    pub(crate) hosts: usize,
    /// VMs that the user keeps at the most.
    pub(crate) vms: usize,
    /// Lengths of the leases, as each controller is configured. They differ while an operator changes them.
    pub(crate) timings: Vec<Timings>,
    /// How long there are faults.
    pub(crate) faults_for: Ns,
    /// The mean time between two faults.
    pub(crate) fault_every: Ns,
    /// Of a thousand messages on a stream, how many are lost, and the stream with them.
    pub(crate) loss: u64,
    /// Of a thousand requests to etcd, how many come to nothing or lose their answer.
    pub(crate) rpc_loss: u64,
    /// How far the time of day of each controller's machine is ahead, in ms, up to 50 minutes. Nothing about safety may
    /// depend on it; that a create is repeated with the same answer does, beyond an hour.
    pub(crate) ahead_ms: Vec<u64>,
}

impl Config {
    fn draw(rng: &mut Rng, mode: Mode) -> Self {
        let lengths = |rng: &mut Rng| {
            let fast = rng.pick(&[6, 6, 6, 3]);
            let patient = rng.pick(&[60, 20, 20, 12]).max(fast);
            Timings {
                fast: Duration::from_secs(fast),
                patient: Duration::from_secs(patient),
                kill_allowance: Duration::from_secs(1),
            }
        };
        let controllers = rng.index(2) + 2;
        let mut timings = vec![lengths(rng); controllers];
        if rng.permille(250) {
            timings[0] = lengths(rng);
        }
        let ahead_ms = (0..controllers).map(|_| rng.pick(&[0, 0, 1000, 30_000, 3_000_000])).collect();
        Self {
            mode,
            controllers,
            hosts: rng.index(4) + 3,
            vms: rng.index(7) + 4,
            timings,
            faults_for: rng.range(60, 150) * SEC,
            fault_every: rng.range(500, 3000) * MS,
            loss: rng.pick(&[0, 0, 1, 3]),
            rpc_loss: rng.pick(&[0, 1, 3, 10]),
            ahead_ms,
        }
    }
}

/// What is shared.
#[derive(Debug)]
pub(crate) struct Core {
    /// True time.
    pub(crate) now: Ns,
    /// Chance.
    pub(crate) rng: Rng,
    /// What is still to happen.
    pub(crate) queue: Queue,
    /// Streams.
    pub(crate) net: Net,
    /// What happened.
    pub(crate) trace: Trace,
    /// Counts.
    pub(crate) stats: Stats,
    /// Judges.
    pub(crate) check: Check,
    /// What the run is made of.
    pub(crate) config: Config,
    /// Files in shared pools, by the pool's id.
    pub(crate) shared_files: BTreeMap<uuid::Uuid, Files>,
    /// Which work copies to which file, of which pool or host.
    pub(crate) copying: BTreeMap<(uuid::Uuid, PathBuf), u64>,
    /// The faults are over.
    pub(crate) healed: bool,
    uid: u64,
}

impl Core {
    /// A world that has not begun.
    #[must_use]
    pub(crate) fn new(seed: u64, mode: Mode) -> Self {
        let mut rng = Rng::new(seed);
        let config = Config::draw(&mut rng, mode);
        Self {
            now: 0,
            rng,
            queue: Queue::default(),
            net: Net::new(config.hosts, config.controllers),
            trace: Trace::default(),
            stats: Stats::default(),
            check: Check::default(),
            config,
            shared_files: BTreeMap::new(),
            copying: BTreeMap::new(),
            healed: false,
            uid: 0,
        }
    }

    /// Adds a line to the trace.
    pub(crate) fn log(&mut self, what: fmt::Arguments<'_>) {
        self.trace.line(self.now, what);
    }

    /// Something happens after `delay`.
    pub(crate) fn after(&mut self, delay: Ns, whom: Whom, epoch: u64, what: What) {
        self.queue.push(self.now.saturating_add(delay), Event { whom, epoch, what });
    }

    /// Something happens at `at`.
    pub(crate) fn at(&mut self, at: Ns, whom: Whom, epoch: u64, what: What) {
        self.queue.push(at.max(self.now), Event { whom, epoch, what });
    }

    /// A number that was not used in this run before.
    pub(crate) fn uid(&mut self) -> u64 {
        self.uid += 1;
        self.uid
    }

    /// Between `low` and `high` milliseconds.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> Ns {
        self.rng.range(low * MS, high * MS)
    }

    /// The time of day on a host, for records.
    #[must_use]
    pub(crate) fn wall(&self) -> WallTime {
        WallTime(1_700_000_000_000 + self.now / MS)
    }

    /// The time of day on a controller's machine.
    #[must_use]
    pub(crate) fn wall_of(&self, controller: usize) -> WallTime {
        WallTime(self.wall().0 + self.config.ahead_ms[controller])
    }

    /// A clock's rate: often at the ends of what A1 allows for two clocks, one against the other.
    pub(crate) fn clock_rate(&mut self) -> u64 {
        match self.config.mode {
            Mode::Assumptions => match self.rng.below(5) {
                0 | 1 => 995_060,
                2 | 3 => 1_004_940,
                _ => self.rng.range(995_060, 1_004_941),
            },
            Mode::WildClocks => self.rng.pick(&[600_000, 1_000_000, 1_500_000]),
        }
    }

    /// How long a process takes to notice what is ready for it.
    pub(crate) fn latency(&mut self) -> Ns {
        if self.rng.permille(20) { self.between(1, 60) } else { self.rng.range(MS / 100, 2 * MS) }
    }
}
