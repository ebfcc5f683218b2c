//! The simulated network: real controllers and real agents in one process, over simulated TCP and with simulated time.
//!
//! What is real: the controller from its server to its etcd client, and the agent from its dialer to the runners of its
//! VMs, with its records and its lease in files. What is simulated: the network (turmoil), etcd ([`etcd`]), QEMU and its
//! keeper ([`guests`]), the clocks ([`time`]).
//!
//! # What is checked
//!
//! * **P1**, and that incarnations grow, at every launch ([`guests`]).
//! * What the user was told stays true: acknowledged VMs are there, deleted ones are not, one request makes one VM.
//! * When everything is whole again, everything is as the user wants it within [`CONVERGE`].
//!
//! # What it cannot do
//!
//! The faults of a seed are the same each time, but not all that follows: ids are random, `select!` and hash maps are not
//! ordered, and the agents' files are written by real threads. A seed that fails is a good lead, not a recording.

pub mod etcd;
mod faults;
pub mod guests;
mod machines;
mod net;
pub mod time;
mod user;

use std::{cell::Cell, collections::BTreeMap, path::Path, rc::Rc, time::Duration};

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use etcd::Etcd;
use faults::{Faults, Power};
use guests::{Counts, Guests, Keepers};
use machines::Machine;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use time::TrueTime;
use uncloud_controller::config::Config;
use user::{Book, Wanted};
use uuid::Uuid;

/// One step of the simulation.
const TICK: Duration = Duration::from_millis(5);
/// How wrong a machine's clock may be, in millionths: as `docs/fencing.md` allows.
const CLOCK_PPM: i32 = 10_000;
/// Faults begin when the cluster has come up.
const FAULTS_FROM: Duration = Duration::from_secs(5);
/// When all is whole and the user has nothing more to do, everything is as it should be within this: a lost host is
/// declared dead, its VMs are placed and started elsewhere, and back-offs have run out.
pub const CONVERGE: Duration = Duration::from_secs(60);
/// A user who is not answered for so long after everything is whole is never answered.
const ANSWERED: Duration = Duration::from_secs(60);

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where everything random comes from that the simulation decides.
    pub seed: u64,
    /// Controllers.
    pub controllers: usize,
    /// Hosts.
    pub hosts: usize,
    /// VMs that the user creates.
    pub vms: usize,
    /// How long things go wrong. Zero: never.
    pub faults: Duration,
    /// Whether the hosts' keepers do what they are for.
    pub keepers: Keepers,
}

/// What happened.
#[derive(Debug)]
pub struct Outcome {
    /// The faults.
    pub faults: Vec<String>,
    /// Starts and ends of VMs.
    pub counts: Counts,
    /// Terms that began.
    pub terms: usize,
    /// How much time was simulated.
    pub simulated: Duration,
}

/// Runs one simulation. Files go below `dir`.
///
/// # Errors
///
/// What must not be was; the error says what, and lists the faults.
pub fn run(plan: Plan, dir: &Path) -> anyhow::Result<Outcome> {
    let mut random = StdRng::seed_from_u64(plan.seed);
    let time = TrueTime::default();
    let guests = Guests::new(time.clone(), plan.keepers);
    let etcd = Etcd::new(time.clock(0));
    let mut sim = turmoil::Builder::new()
        .tick_duration(TICK)
        .rng_seed(random.random())
        .simulation_duration(Duration::from_secs(24 * 3600))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(4096)
        .build();
    let mut names = vec!["etcd".to_owned()];
    {
        let etcd = etcd.clone();
        sim.host("etcd", move || machines::etcd(etcd.clone()));
    }
    let controllers: Vec<String> = (0..plan.controllers).map(|n| format!("controller-{n}")).collect();
    let addresses: Vec<String> = controllers.iter().map(|name| machines::address(name)).collect();
    for name in &controllers {
        let config = Config::try_parse_from([
            "uncloud-controller",
            "--data-dir=unused",
            "--etcd=http://etcd:2379",
            &format!("--advertise={}", machines::address(name)),
            &format!("--controllers={}", addresses.join(",")),
        ])?;
        let clock = time.clock(random.random_range(-CLOCK_PPM..=CLOCK_PPM));
        sim.host(name.as_str(), move || machines::controller(config.clone(), clock.clone()));
        names.push(name.clone());
    }
    let mut boots: BTreeMap<String, (usize, Rc<Cell<u128>>)> = BTreeMap::new();
    for index in 0..plan.hosts {
        let name = format!("host-{index}");
        let boot = Rc::new(Cell::new(1 + ((index as u128) << 64)));
        let machine = Machine {
            index,
            name: name.clone(),
            dir: dir.join(&name),
            boot: Uuid::nil(),
            controllers: addresses.clone(),
            clock: time.clock(random.random_range(-CLOCK_PPM..=CLOCK_PPM)),
            guests: guests.clone(),
        };
        boots.insert(name.clone(), (index, boot.clone()));
        names.push(name.clone());
        sim.host(name, move || machines::agent(Machine { boot: Uuid::from_u128(boot.get()), ..machine.clone() }));
    }
    let book = Book::default();
    sim.client("user", user::user(book.clone(), addresses, random.random(), plan.vms));

    let mut faults = Faults::new(random, names, FAULTS_FROM);
    let mut whole = plan.faults.is_zero();
    let (mut whole_since, mut worked_since) = (Duration::ZERO, None);
    let mut terms = Vec::new();
    let end = loop {
        let now = sim.elapsed();
        time.set(now);
        guests.tick();
        if !whole && now >= FAULTS_FROM + plan.faults {
            faults.heal(&mut sim, &etcd);
            (whole, whole_since) = (true, now);
            book.look_again();
        } else if !whole
            && let Power::Off(name) = faults.step(&mut sim, &etcd, now)
            && let Some((index, boot)) = boots.get(&name)
        {
            guests.power_off(*index);
            boot.set(boot.get() + 1);
        }
        if let Err(error) = sim.step() {
            break Err(anyhow::anyhow!("a machine ended: {error}"));
        }
        if let Some(term) = etcd.leader_term()
            && terms.last() != Some(&term)
        {
            if terms.last().is_some_and(|last| *last > term) {
                break Err(anyhow::anyhow!("term {term} came after {terms:?}"));
            }
            terms.push(term);
        }
        let violations: Vec<String> = guests.violations().into_iter().chain(book.violations()).collect();
        if !violations.is_empty() {
            break Err(anyhow::anyhow!("{}", violations.join("; ")));
        }
        if book.worked() && worked_since.is_none() {
            worked_since = Some(now);
        }
        if whole {
            match worked_since {
                Some(_) if book.agreed() && executes_what_should(&guests, &book) => break Ok(()),
                Some(since) if now > whole_since.max(since) + CONVERGE => {
                    let executing = guests.executing();
                    break Err(anyhow::anyhow!("not as wanted after {CONVERGE:?}: {}; {executing:?}", book.last()));
                }
                None if now > whole_since + ANSWERED + Duration::from_secs(5) * u32::try_from(plan.vms)? => {
                    break Err(anyhow::anyhow!("the user is not answered: {}", book.last()));
                }
                Some(_) | None => {}
            }
        }
    };
    let simulated = sim.elapsed();
    end.with_context(|| format!("{plan:?} at {simulated:?}, after:\n  {}", faults.log.join("\n  ")))?;
    ensure!(!terms.is_empty(), "nobody ever led");
    Ok(Outcome { faults: faults.log, counts: guests.counts(), terms: terms.len(), simulated })
}

/// Each VM that should run executes once, and no other does.
fn executes_what_should(guests: &Guests, book: &Book) -> bool {
    let mut executing: Vec<String> = guests.executing().into_iter().map(|(vm, _)| vm.to_string()).collect();
    let mut wanted: Vec<String> =
        book.vms().into_iter().filter(|known| known.wanted == Wanted::Running).map(|known| known.id).collect();
    executing.sort_unstable();
    wanted.sort_unstable();
    executing == wanted
}
