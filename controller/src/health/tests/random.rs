//! Random schedules: heartbeats that are delayed, reordered and lost, clocks that differ by as much as they may, changes of
//! leader and of settings; and random orders of verdicts, registrations and the writer's answers.

use std::{collections::VecDeque, time::Duration};

use proptest::prelude::*;
use uncloud_proto::clock::Tick;

use super::*;

/// Something that happens to a cluster of one host under test and another one that is always heard.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Nothing, for so long.
    Wait { ms: u64 },
    /// The host sends a heartbeat, which arrives after `ms` (on this connection or, when the leader has changed, nowhere).
    Heartbeat { ms: u64 },
    /// The leader falls silent; another takes over after `ms`, with leases of this many seconds.
    Takeover { ms: u64, fast: u64, patient: u64 },
    /// The host says Hello.
    Hello,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2_000u64).prop_map(|ms| Step::Wait { ms }),
        1 => (5_000..70_000u64).prop_map(|ms| Step::Wait { ms }),
        6 => (0..5_000u64).prop_map(|ms| Step::Heartbeat { ms }),
        1 => (0..3_000u64, 2..12u64, 12..60u64)
            .prop_map(|(ms, fast, patient)| Step::Takeover { ms, fast, patient }),
        2 => Just(Step::Hello),
    ]
}

/// True time is in units of 10 µs, so that ratios of clocks come out even enough.
const MS: u64 = 100;
/// How often the leader looks.
const TICK_EVERY: u64 = 50 * MS;

/// A clock: `offset` and a rate in millionths.
#[derive(Clone, Copy, Debug)]
struct TestClock {
    offset_ms: u64,
    rate: u64,
}

impl TestClock {
    fn read(self, now: u64) -> Tick {
        // One unit of true time is 10,000 ns; times the rate in millionths, by 100.
        Tick::from_boot(Duration::from_nanos(self.offset_ms * 1_000_000 + now * self.rate / 100))
    }
}

struct Lease {
    /// On the host's clock: what it will have when the renewal arrives, whenever that is.
    fast: Tick,
    patient: Tick,
}

struct World {
    now: u64,
    host_clock: TestClock,
    leader_clock: TestClock,
    leader: HealthTable,
    recorded: Liveness,
    timings: Timings,
    longest: Timings,
    /// Heartbeats on their way: when sent (true time), when they arrive, to which leader.
    on_the_way: Vec<(u64, u64, u32)>,
    term: u32,
    /// The latest deadlines that were ever granted to the host, by anybody, delivered or not.
    granted: Lease,
}

impl World {
    /// Lets time pass, with everything that happens in it.
    fn run_until(&mut self, end: u64) -> Result<(), TestCaseError> {
        while self.now < end {
            self.now = (self.now + TICK_EVERY).min(end);
            let arrived: Vec<_> = self.on_the_way.iter().copied().filter(|m| m.1 <= self.now).collect();
            self.on_the_way.retain(|m| m.1 > self.now);
            for (sent, arrives, term) in arrived {
                // A connection ends with its leader. The leader reads its clock when it handles the message.
                if term == self.term {
                    self.receive(sent, arrives)?;
                }
            }
            self.look()?;
        }
        Ok(())
    }

    fn receive(&mut self, sent: u64, arrived: u64) -> Result<(), TestCaseError> {
        let counted = self.leader_clock.read(arrived);
        if let Grant::Renew { fast, patient } = self.leader.heartbeat(A, counted) {
            prop_assert_eq!(self.recorded, Liveness::Up, "L4: granted to a host that is recorded as lapsed");
            let sent = self.host_clock.read(sent);
            self.granted.fast = self.granted.fast.max(sent.after(fast));
            self.granted.patient = self.granted.patient.max(sent.after(patient));
        }
        Ok(())
    }

    fn look(&mut self) -> Result<(), TestCaseError> {
        let now = self.leader_clock.read(self.now);
        self.leader.heartbeat(B, now);
        let silent = self.leader.silent(now);
        for host in [A, B] {
            let hearing = self.leader.state(host, now);
            prop_assert_eq!(silent.contains(&host), matches!(hearing, Hearing::Silent { .. }), "at {}", self.now);
        }
        for verdict in self.leader.tick(now) {
            prop_assert_eq!(verdict.host, A);
            // The claim: on its own clock the host is past the deadline, and has been for the kill allowance as the
            // leader counts it.
            let allowance = self.timings.kill_allowance.as_nanos() as u64 / 10_000;
            let rate = self.leader_clock.rate;
            let killed = self.host_clock.read(self.now.saturating_sub(allowance * 1_000_000 / rate));
            match verdict.lapsed {
                Lapsed::Fast => prop_assert!(killed >= self.granted.fast, "L1: fast, at {}", self.now),
                Lapsed::Both => {
                    prop_assert!(killed >= self.granted.fast, "L1: fast, at {}", self.now);
                    prop_assert!(killed >= self.granted.patient, "L1, L5: patient, at {}", self.now);
                }
            }
            self.leader.declared(verdict);
            self.recorded = match verdict.lapsed {
                Lapsed::Fast => Liveness::FastLapsed,
                Lapsed::Both => Liveness::Dead,
            };
        }
        Ok(())
    }

    fn take_over(&mut self, fast: u64, patient: u64) {
        self.term += 1;
        self.leader_clock.offset_ms += 12_345; // another machine
        self.timings =
            Timings { fast: Duration::from_secs(fast), patient: Duration::from_secs(patient), ..self.timings };
        let hosts = [(A, self.recorded), (B, Liveness::Up)];
        self.leader = HealthTable::new(self.timings, self.longest, hosts, self.leader_clock.read(self.now));
        self.longest = self.longest.longest(self.timings);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// L1, L3, L4, L5, L6: whatever is delayed or lost and whoever leads, when a verdict is given every lease that was
    /// ever granted has run out on the host's own clock.
    #[test]
    fn no_verdict_before_the_hosts_own_deadline(
        steps in prop::collection::vec(step(), 1..60),
        // The two clocks together differ by up to the 1 % that is assumed: 990,099 is 1/1.01.
        host_rate in prop_oneof![Just(990_100u64), Just(1_000_000), Just(1_009_900), 990_100..=1_009_900u64],
        offsets in (0..1_000_000u64, 0..1_000_000u64),
    ) {
        let leader_clock = TestClock { offset_ms: offsets.0, rate: 1_000_000 };
        let host_clock = TestClock { offset_ms: offsets.1, rate: host_rate };
        let hosts = [(A, Liveness::Up), (B, Liveness::Up)];
        let mut world = World {
            now: 0,
            host_clock,
            leader_clock,
            leader: HealthTable::new(TIMINGS, TIMINGS, hosts, leader_clock.read(0)),
            recorded: Liveness::Up,
            timings: TIMINGS,
            longest: TIMINGS,
            on_the_way: Vec::new(),
            term: 0,
            granted: Lease { fast: Tick::ZERO, patient: Tick::ZERO },
        };
        for step in steps {
            match step {
                Step::Wait { ms } => world.run_until(world.now + ms * MS)?,
                Step::Heartbeat { ms } => {
                    world.on_the_way.push((world.now, world.now + ms * MS, world.term));
                    world.run_until(world.now + 20 * MS)?;
                }
                Step::Takeover { ms, fast, patient } => {
                    // L2: the old leader grants until its leadership ends, then there is a gap.
                    world.run_until(world.now + 20 * MS)?;
                    world.now += ms * MS;
                    world.take_over(fast, patient);
                }
                Step::Hello => {
                    let entry = world.leader.enter(A).expect("each verdict is stored at once here");
                    world.recorded = Liveness::Up;
                    let now = world.leader_clock.read(world.now);
                    world.leader.register(entry, now).expect("nothing came in between");
                }
            }
        }
        world.run_until(world.now + 80_000 * MS)?;
        prop_assert_eq!(world.recorded, Liveness::Dead, "silence ends in a verdict");
    }
}

/// What the writer has been asked to store, in its order.
#[derive(Debug)]
enum Write {
    Declare(Verdict),
    Register(Entry),
}

#[derive(Clone, Copy, Debug)]
enum Move {
    /// Time passes and the leader looks.
    Tick {
        ms: u64,
    },
    /// The driver hands a verdict to the writer, if one is due and none is under way.
    Declare,
    /// A session begins to register the host.
    Enter,
    /// The writer stores the first thing in its queue.
    Store,
    /// The driver, or a session, learns what was stored.
    Answer {
        declare: bool,
    },
    Heartbeat,
}

fn a_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        3 => (1..4_000u64).prop_map(|ms| Move::Tick { ms }),
        3 => Just(Move::Declare),
        3 => Just(Move::Enter),
        5 => Just(Move::Store),
        5 => any::<bool>().prop_map(|declare| Move::Answer { declare }),
        3 => Just(Move::Heartbeat),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// L4: in whatever order the writer stores and its answers come, a host is granted leases only while it is recorded
    /// as up and nothing is on its way to the store that says otherwise.
    #[test]
    fn a_host_with_leases_is_recorded_as_up(moves in prop::collection::vec(a_move(), 1..80)) {
        let mut t = HealthTable::new(TIMINGS, TIMINGS, [(A, Liveness::Up), (B, Liveness::Up)], at(0));
        let mut now = 0;
        let mut recorded = Liveness::Up;
        let mut queue: VecDeque<Write> = VecDeque::new();
        let (mut declares, mut registers) = (VecDeque::new(), VecDeque::new());
        let mut declaring = false;
        for m in moves {
            match m {
                Move::Tick { ms } => {
                    now += ms;
                    t.heartbeat(B, at(now));
                    t.tick(at(now));
                }
                Move::Declare => {
                    t.heartbeat(B, at(now));
                    if !declaring && let Some(&verdict) = t.tick(at(now)).first() {
                        queue.push_back(Write::Declare(verdict));
                        declaring = true;
                    }
                }
                Move::Enter => {
                    if let Ok(entry) = t.enter(A) {
                        queue.push_back(Write::Register(entry));
                    }
                }
                Move::Store => match queue.pop_front() {
                    Some(Write::Declare(verdict)) => {
                        recorded = match verdict.lapsed {
                            Lapsed::Fast => Liveness::FastLapsed,
                            Lapsed::Both => Liveness::Dead,
                        };
                        declares.push_back(verdict);
                    }
                    Some(Write::Register(entry)) => {
                        recorded = Liveness::Up;
                        registers.push_back(entry);
                    }
                    None => {}
                },
                Move::Answer { declare: true } => {
                    if let Some(verdict) = declares.pop_front() {
                        t.declared(verdict);
                        declaring = false;
                    }
                }
                Move::Answer { declare: false } => {
                    if let Some(entry) = registers.pop_front() {
                        let _ = t.register(entry, at(now));
                    }
                }
                Move::Heartbeat => {
                    if granted(t.heartbeat(A, at(now))) {
                        prop_assert_eq!(recorded, Liveness::Up, "at {} ms", now);
                        let declared = queue.iter().any(|w| matches!(w, Write::Declare(_)));
                        prop_assert!(!declared, "a declaration is on its way, at {} ms", now);
                    }
                }
            }
        }
    }
}
