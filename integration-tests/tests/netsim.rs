//! Real controllers and real agents over a simulated network, with simulated time.

use std::time::Duration;

use harness::netsim::{Outcome, Plan, guests::Keepers, run};

fn simulate(plan: Plan) -> anyhow::Result<Outcome> {
    let dir = tempfile::tempdir()?;
    // Set RUST_LOG to see what the controllers and agents say.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    let begin = std::time::Instant::now();
    let outcome = run(plan, dir.path())?;
    println!(
        "seed {}: {:?} simulated in {:?}: {} faults, {} terms, {} starts, {} ended by their keeper, trace {:016x}",
        plan.seed,
        outcome.simulated,
        begin.elapsed(),
        outcome.faults.len(),
        outcome.terms,
        outcome.counts.starts,
        outcome.counts.expired,
        outcome.counts.trace
    );
    Ok(outcome)
}

#[test]
fn one_controller_and_one_host_run_what_the_user_wants() -> anyhow::Result<()> {
    let plan = Plan { seed: 1, controllers: 1, hosts: 1, vms: 4, faults: Duration::ZERO, keepers: Keepers::Watch };
    let outcome = simulate(plan)?;
    assert_eq!(outcome.terms, 1);
    assert!(outcome.counts.starts >= 4);
    assert_eq!(outcome.counts.expired, 0);
    Ok(())
}

fn stormy(seed: u64) -> Plan {
    Plan { seed, controllers: 3, hosts: 3, vms: 12, faults: Duration::from_secs(60), keepers: Keepers::Watch }
}

fn faulty(seed: u64) -> anyhow::Result<()> {
    let outcome = simulate(stormy(seed))?;
    // Some VMs are stopped or deleted before they start.
    assert!(outcome.counts.starts >= 6, "{:?}", outcome.counts);
    assert!(outcome.faults.len() >= 5, "{:?}", outcome.faults);
    Ok(())
}

#[test]
fn without_keepers_two_copies_of_a_vm_are_found() {
    let found = (1..=4).find_map(|seed| simulate(Plan { keepers: Keepers::Sleep, ..stormy(seed) }).err());
    let found = found.map(|error| format!("{error:#}")).unwrap_or_default();
    assert!(found.contains("P1: "), "{found}");
}

#[test]
fn faults_of_fixed_seeds_break_no_promise() -> anyhow::Result<()> {
    (1..=4).try_for_each(faulty)
}

/// One seed at random, or as many as one likes to wait for: `NETSIM_SEEDS=100..200 cargo test --workspace --test netsim many`.
#[test]
fn faults_of_many_seeds_break_no_promise() -> anyhow::Result<()> {
    let (from, to) = match std::env::var("NETSIM_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").ok_or_else(|| anyhow::anyhow!("NETSIM_SEEDS is not FROM..TO"))?;
            (from.parse::<u64>()?, to.parse()?)
        }
        Err(_) => {
            let seed = rand::random_range(1000..1_000_000);
            (seed, seed + 1)
        }
    };
    println!("seeds {from}..{to}");
    anyhow::ensure!(from < to, "NETSIM_SEEDS is empty");
    let mut failed = Vec::new();
    for seed in from..to {
        if let Err(error) = faulty(seed) {
            println!("seed {seed} FAILED: {error:#}");
            failed.push(seed);
        }
    }
    anyhow::ensure!(failed.is_empty(), "failed: {failed:?}");
    Ok(())
}

#[test]
fn a_seed_makes_the_same_faults_again() -> anyhow::Result<()> {
    let (first, second) = (simulate(stormy(7))?, simulate(stormy(7))?);
    assert_eq!(first.faults, second.faults);
    // What follows from them is not quite the same each time (see `netsim`): so the traces are not compared.
    Ok(())
}
