//! The simulation: the real decisions of controllers and agents, in a world that is made up, from a seed.
//!
//! One thread, one queue of events in the order of true time, one source of chance: the same seed gives the same run, byte for
//! byte. What decides is the product's own pure code (`State`, `HealthTable`, `Validity`, `Rules`, `desired::plan`,
//! `reconcile::plan`, the scheduler; `LeaseWord`, `Gate`, `Heartbeats`, `Outbox`, `Mailbox`, `VmState`, the keeper's rule).
//! What waits and sends in the product (tasks, streams, etcd's client, processes) is a little glue here that makes the same
//! calls in the same order; each file says what it mirrors.
//!
//! ```text
//!   user ─▶ controllers (controller, lead, session) ◀─ net ─▶ hosts (agent; host: kernel, keepers, QEMUs, disks)
//!                     │                                  faults ─▶ all of them
//!                    etcd ──────────▶ check ◀──────────────────────┘
//! ```
//!
//! A run: a cluster starts, the user works, faults come and go (`faults.rs`); then they end, and within a bound everything
//! that should run does (`world.rs`); then every process of the control plane is started again and no VM may notice.
//! `check.rs` judges after every step. docs/simulation.md says what is covered and what is not.

mod agent;
mod check;
mod clock;
mod contents;
mod controller;
mod core;
mod etcd;
mod faults;
mod host;
mod keepers;
mod lead;
mod migrate;
mod net;
mod queue;
mod reconciler;
mod report;
mod rng;
mod runner;
mod session;
mod storage;
mod tend;
mod trace;
mod user;
mod wishes;
mod world;

pub use core::Mode;
pub use report::Stats;
pub use rng::Rng;

use world::World;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Counts.
    pub stats: Stats,
    /// Hash of the whole trace.
    pub hash: u64,
    /// What was wrong, with the newest lines of the trace.
    pub violation: Option<String>,
}

/// Whether every line of the trace is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Print {
    /// Only the newest, and only when something is wrong.
    Violations,
    /// All.
    Everything,
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, mode: Mode, print: Print) -> Outcome {
    let mut world = World::new(seed, mode);
    if print == Print::Everything {
        world.be_verbose();
    }
    let result = world.run();
    let core = world.core();
    let violation = result.err().map(|what| {
        let at = std::time::Duration::from_nanos(core.now).as_secs_f64();
        let trace: Vec<&str> = core.trace.newest().collect();
        format!("seed {seed}, at {at:.6} s: {what}\n{}", trace.join("\n"))
    });
    Outcome { seed, stats: core.stats.clone(), hash: core.trace.hash(), violation }
}
