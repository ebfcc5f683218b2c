//! What runs were like, counted.

use std::{collections::BTreeMap, fmt};

use super::clock::{Ns, SEC};

/// Counts of one run, or of many.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Simulated time.
    pub simulated: Ns,
    /// Things that happened.
    pub events: u64,
    /// VMs that were created.
    pub created: u64,
    /// VMs that were given another host than they had.
    pub failovers: u64,
    /// Migrations that a QEMU began.
    pub migrations_begun: u64,
    /// Guests that were paused.
    pub paused: u64,
    /// Migrations by which VMs were to leave hosts that were being drained.
    pub drain_migrations: u64,
    /// VMs that were stopped to leave such hosts.
    pub drain_stops: u64,
    /// Disks that were put back to a snapshot.
    pub put_back: u64,
    /// VMs that were cloned.
    pub clones: u64,
    /// Disks that were made as copies of others.
    pub copies: u64,
    /// Disks that machines were given while they ran.
    pub attached: u64,
    /// Disks of VMs that stay that were deleted.
    pub dropped: u64,
    /// Migrations that ended with the VM on its target.
    pub migrations_done: u64,
    /// Leaders.
    pub elections: u64,
    /// Transactions.
    pub commits: u64,
    /// Verdicts on hosts.
    pub verdicts: u64,
    /// How often the brake engaged.
    pub brakes: u64,
    /// VMs that were killed at the deadline of their lease.
    pub fenced: u64,
    /// The longest time from the end of the faults until all was as it should be.
    pub slowest_recovery: Ns,
}

impl Stats {
    /// A fault happened.
    pub fn fault(&mut self, kind: &'static str) {
        *self.faults.entry(kind).or_default() += 1;
    }

    /// All faults.
    #[must_use]
    pub fn fault_events(&self) -> u64 {
        self.faults.values().sum()
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        for (kind, count) in &other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.simulated += other.simulated;
        self.events += other.events;
        self.created += other.created;
        self.failovers += other.failovers;
        self.migrations_begun += other.migrations_begun;
        self.paused += other.paused;
        self.drain_migrations += other.drain_migrations;
        self.drain_stops += other.drain_stops;
        self.put_back += other.put_back;
        self.clones += other.clones;
        self.copies += other.copies;
        self.attached += other.attached;
        self.dropped += other.dropped;
        self.migrations_done += other.migrations_done;
        self.elections += other.elections;
        self.commits += other.commits;
        self.verdicts += other.verdicts;
        self.brakes += other.brakes;
        self.fenced += other.fenced;
        self.slowest_recovery = self.slowest_recovery.max(other.slowest_recovery);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, count) in &self.faults {
            writeln!(f, "  {count:>10}  {kind}")?;
        }
        let hours = self.simulated / SEC / 36 * 10;
        writeln!(f, "  {:>10}  fault events in all", self.fault_events())?;
        writeln!(f, "simulated hours:   {}.{:02}", hours / 1000, hours % 1000 / 10)?;
        writeln!(f, "events:            {}", self.events)?;
        writeln!(f, "VMs created:       {}, cloned: {}", self.created, self.clones)?;
        writeln!(f, "failovers:         {}", self.failovers)?;
        writeln!(
            f,
            "migrations:        {} sent, {} done; pauses: {}",
            self.migrations_begun, self.migrations_done, self.paused
        )?;
        writeln!(f, "drains:            {} migrations, {} stops", self.drain_migrations, self.drain_stops)?;
        writeln!(
            f,
            "disks:             {} put back, {} copied, {} attached to what runs, {} deleted",
            self.put_back, self.copies, self.attached, self.dropped
        )?;
        writeln!(f, "killed by a lease: {}", self.fenced)?;
        writeln!(f, "verdicts on hosts: {}, the brake engaged {} times", self.verdicts, self.brakes)?;
        writeln!(f, "leaders elected:   {}", self.elections)?;
        writeln!(f, "transactions:      {}", self.commits)?;
        write!(f, "slowest recovery:  {} s after the last fault", self.slowest_recovery / SEC)
    }
}
