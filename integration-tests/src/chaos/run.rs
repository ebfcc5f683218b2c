//! A random run of faults, one after the other, from a seed.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uncloud_proto::v1::FailoverPolicy;

use super::{
    faults::{Fault, QUOTA},
    kind::{Deck, Kind},
    report::Report,
    stage::Stage,
    user::User,
};
use crate::{Options, checker::Instance};

/// After this long without a fault all is well again, or it never will be.
const SETTLE_LIMIT: Duration = Duration::from_secs(90);
/// The longest pause between two faults, from when all is well.
const PAUSE_MS: u64 = 1500;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the random numbers come from.
    pub seed: u64,
    /// No fault begins after this time.
    pub time: Duration,
    /// The kinds of faults.
    pub kinds: Vec<Kind>,
}

/// The guests of a run: six with those of the user.
const GUESTS: [(&str, FailoverPolicy); 4] = [
    ("fast-1", FailoverPolicy::Fast),
    ("fast-2", FailoverPolicy::Fast),
    ("patient", FailoverPolicy::Patient),
    ("hold", FailoverPolicy::Hold),
];

/// The cluster of a run.
#[must_use]
pub fn options(hosts: usize) -> Options {
    let mut options = Options::hosts(hosts).default_leases().controllers(3).etcd_members(3).namespaces().proxies();
    options.etcd = ["--quota-backend-bytes", QUOTA].map(str::to_owned).to_vec();
    options
}

/// Does it.
///
/// # Errors
///
/// The harness itself failed. What uncloud did wrong is in the report.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let mut stage = Stage::start(options(4), &GUESTS).await?;
    let mut report = Report::default();
    stage.settle(SETTLE_LIMIT).await?;
    let hosts = stage.cluster.hosts.iter().map(|h| h.name().to_owned()).collect();
    let user = User::start(stage.cluster.addresses(), hosts, plan.seed ^ 0x0075_5e72)?;

    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut deck = Deck::new(&plan.kinds);
    let began = Instant::now();
    let mut well = true;
    while well && began.elapsed() < plan.time {
        let kind = deck.draw(&mut rng);
        well = one(&mut stage, kind, &mut rng, &user, &mut report, began).await?;
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..=PAUSE_MS))).await;
    }

    let told = user.finish(&stage.cluster).await?;
    report.calls = (told.written.len() as u64, told.refused.values().sum(), told.unknown.values().sum());
    for (message, n) in told.refused.iter().chain(&told.unknown) {
        eprintln!("the user was told {n} times: {message}");
    }
    report.violations.extend(told.violations);
    if well && let Err(error) = stage.settle(SETTLE_LIMIT).await {
        report.violations.push(format!("in the end: {error:#}"));
    }
    if let Err(error) = stage.finish().await {
        report.violations.push(format!("{error:#}"));
    }
    Ok(report)
}

/// One fault, from its beginning until all is well. `false`: it is not.
async fn one(
    stage: &mut Stage,
    kind: Kind,
    rng: &mut StdRng,
    user: &User,
    report: &mut Report,
    start: Instant,
) -> anyhow::Result<bool> {
    let before: Vec<(String, Instance)> = stage.instances().into_iter().collect();
    let mut fault = stage.break_it(kind, rng).await?;
    let lasts = kind.lasts(rng);
    let at = start.elapsed().as_secs_f64();
    eprintln!("{at:7.1} s  {kind:<22} {} for {lasts:.1?}", fault.what);
    tokio::time::sleep(lasts).await;
    stage.mend(&mut fault).await?;
    let settled = stage.settle(SETTLE_LIMIT).await;
    let of = report.kinds.entry(kind).or_default();
    of.faults += 1;
    match &settled {
        Ok(time) => of.settled.add(*time),
        Err(error) => report.violations.push(format!("after {kind} ({}): {error:#}", fault.what)),
    }
    judge(stage, &fault, &before, report);
    if let Some(written) = user.written_after(fault.began) {
        report.kinds.entry(kind).or_default().written.add(written - fault.began);
    }
    Ok(settled.is_ok())
}

/// What the fault did to the guests.
fn judge(stage: &Stage, fault: &Fault, before: &[(String, Instance)], report: &mut Report) {
    let after = stage.instances();
    for (id, old) in before {
        let new = after.get(id);
        if new.is_some_and(|new| (new.pid, new.start) == (old.pid, old.start)) {
            continue;
        }
        let name = stage.guest(id).map_or(id.as_str(), |g| g.name.as_str());
        if !fault.may_kill.contains(id) {
            let gone =
                stage.cluster.checker.instances(id).into_iter().find(|i| (i.pid, i.start) == (old.pid, old.start));
            let after = gone.map(|i| i.last_seen.saturating_duration_since(fault.began));
            report.false_alarms.push(format!(
                "{}, {}: {name} on {} was killed {:.1?} after the fault began",
                fault.kind,
                fault.what,
                old.host,
                after.unwrap_or_default()
            ));
        }
        match new {
            Some(new) if new.host == old.host => report.restarts += 1,
            Some(_) => report.failovers += 1,
            None => {}
        }
        if let Some(spoke) = stage.spoke_after(id, fault.began) {
            let of = report.kinds.entry(fault.kind).or_default();
            let fast = stage.guest(id).is_ok_and(|g| g.failover == FailoverPolicy::Fast);
            if fast { &mut of.running } else { &mut of.waited }.add(spoke - fault.began);
        }
    }
}
