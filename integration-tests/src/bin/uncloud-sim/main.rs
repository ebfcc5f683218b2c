//! Runs the simulation over many seeds: `make sim SEEDS=10000 FROM=1`.
//!
//! Ends with 1 if any seed violates anything, and prints the newest lines of its trace.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use harness::sim::{self, Mode, Print, Stats};

/// The simulation of uncloud.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Prints the whole trace (of one seed).
    #[arg(long)]
    trace: bool,
    /// Clocks that differ by more than docs/fencing.md assumes: violations are to be found.
    #[arg(long)]
    wild_clocks: bool,
    /// Goes on after a violation.
    #[arg(long)]
    keep_going: bool,
    /// Threads; all cores by default.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mode = if arguments.wild_clocks { Mode::WildClocks } else { Mode::Assumptions };
    let print = if arguments.trace { Print::Everything } else { Print::Violations };
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let begun = Instant::now();
    let next = AtomicU64::new(arguments.from);
    let end = arguments.from.saturating_add(arguments.seeds);
    let found = Mutex::new((Stats::default(), 0_u64, Vec::<u64>::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = sim::run(seed, mode, print);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.0.add(&outcome.stats);
                    found.1 += 1;
                    if let Some(violation) = outcome.violation {
                        println!("VIOLATION {violation}\n");
                        found.2.push(seed);
                        if !arguments.keep_going {
                            next.store(end, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let (stats, seeds, violations) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let took = begun.elapsed().as_secs_f64();
    println!("{stats}");
    let per_second = f64::from(u32::try_from(seeds).unwrap_or(u32::MAX)) / took;
    println!("{seeds} seeds in {took:.1} s on {threads} threads: {per_second:.1} seeds per second");
    println!("violations:        {} {violations:?}", violations.len());
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
