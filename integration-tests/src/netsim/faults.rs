//! What goes wrong, from a seed: each fault has its end, and at last everything is made whole.

use std::time::Duration;

use rand::{Rng as _, rngs::StdRng};
use turmoil::Sim;

use super::etcd::{Etcd, Outcome};

/// What was done and is to be undone.
#[derive(Debug)]
enum Undo {
    Repair(String, String),
    Release(String, String),
    Bounce(String),
    PromptWatches,
}

/// Makes faults, and ends them.
pub(super) struct Faults {
    random: StdRng,
    /// Machines: etcd, controllers, hosts.
    names: Vec<String>,
    next: Duration,
    open: Vec<(Duration, Undo)>,
    /// What was done, for people.
    pub(super) log: Vec<String>,
}

/// What becomes of a machine at a fault, besides what the network does.
pub(super) enum Power {
    /// Nothing, or its process dies and is started again.
    Stays,
    /// The machine goes off, with all that executes there.
    Off(String),
}

impl Faults {
    pub(super) fn new(random: StdRng, names: Vec<String>, begin: Duration) -> Self {
        Self { random, names, next: begin, open: Vec::new(), log: Vec::new() }
    }

    fn between(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.random.random_range(from..to))
    }

    /// Ends what is over, and begins something when it is time.
    pub(super) fn step(&mut self, sim: &mut Sim<'_>, etcd: &Etcd, now: Duration) -> Power {
        while let Some(i) = self.open.iter().position(|(until, _)| *until <= now) {
            let (_, undo) = self.open.swap_remove(i);
            self.undo(sim, etcd, undo);
        }
        if now < self.next {
            return Power::Stays;
        }
        self.next = now + self.between(500, 3_500);
        self.begin(sim, etcd, now)
    }

    /// Ends everything.
    pub(super) fn heal(&mut self, sim: &mut Sim<'_>, etcd: &Etcd) {
        for (_, undo) in std::mem::take(&mut self.open) {
            self.undo(sim, etcd, undo);
        }
    }

    fn undo(&mut self, sim: &mut Sim<'_>, etcd: &Etcd, undo: Undo) {
        match undo {
            Undo::Repair(a, b) => sim.repair(a, b),
            Undo::Release(a, b) => sim.release(a, b),
            Undo::Bounce(name) => sim.bounce(name),
            Undo::PromptWatches => etcd.delay_watches(Duration::ZERO),
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, etcd: &Etcd, now: Duration) -> Power {
        let a = self.names[self.random.random_range(0..self.names.len())].clone();
        let b = loop {
            let b = self.names[self.random.random_range(0..self.names.len())].clone();
            if a != b {
                break b;
            }
        };
        // Up to about two fast leases.
        let until = now + self.between(300, 14_000);
        let free = |open: &[(Duration, Undo)]| {
            !open.iter().any(|(_, undo)| match undo {
                // One fault for each link at a time: ending one would end the other, too.
                Undo::Repair(c, d) | Undo::Release(c, d) => (*c == a && *d == b) || (*c == b && *d == a),
                Undo::Bounce(c) => *c == a || *c == b,
                Undo::PromptWatches => false,
            })
        };
        let mut power = Power::Stays;
        let kind = self.random.random_range(0..10);
        if kind < 7 && !free(&self.open) {
            return power;
        }
        let what = match kind {
            0 | 1 => {
                sim.partition(a.clone(), b.clone());
                self.open.push((until, Undo::Repair(a.clone(), b.clone())));
                format!("{a} and {b} are cut off from each other")
            }
            2 => {
                sim.partition_oneway(a.clone(), b.clone());
                self.open.push((until, Undo::Repair(a.clone(), b.clone())));
                format!("nothing goes from {a} to {b}")
            }
            3 => {
                sim.hold(a.clone(), b.clone());
                self.open.push((until, Undo::Release(a.clone(), b.clone())));
                format!("what goes between {a} and {b} is held up")
            }
            4 | 5 => {
                sim.crash(a.clone());
                self.open.push((until, Undo::Bounce(a.clone())));
                format!("{a} dies")
            }
            6 => {
                sim.crash(a.clone());
                self.open.push((until, Undo::Bounce(a.clone())));
                power = Power::Off(a.clone());
                format!("{a} loses its power")
            }
            7 => {
                let outcome =
                    if self.random.random_bool(0.5) { Outcome::AppliedAnswerLost } else { Outcome::LostAnswerLost };
                etcd.next_outcomes([outcome]);
                format!("the next write of etcd ends as {outcome:?}")
            }
            8 => {
                etcd.leader_changed();
                "etcd has another leader".to_owned()
            }
            _ => {
                etcd.delay_watches(Duration::from_millis(800));
                etcd.compact();
                self.open.push((until, Undo::PromptWatches));
                "etcd's watches are late, and its history is compacted".to_owned()
            }
        };
        self.log.push(format!("{:.3}s: {what}", now.as_secs_f64()));
        power
    }
}
