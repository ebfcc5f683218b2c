//! A random run of faults, one after the other, from a seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uncloud_proto::v1::FailoverPolicy;

use super::{
    drains::Drains,
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
    let guests = stage.guests.iter().map(|g| g.id.clone()).collect();
    let user = User::start(stage.cluster.addresses(), hosts, guests, plan.seed ^ 0x0075_5e72)?;

    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut deck = Deck::new(&plan.kinds);
    let began = Instant::now();
    let (mut faults, mut well) = (Vec::new(), true);
    while well && began.elapsed() < plan.time {
        let kind = deck.draw(&mut rng);
        let (fault, is_well) = one(&mut stage, kind, &mut rng, &mut report, (began, &user)).await?;
        faults.push((kind, fault.began));
        well = is_well;
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..=PAUSE_MS))).await;
    }

    let told = user.finish(&stage.cluster).await?;
    for (kind, at) in faults {
        if let Some(written) = told.written_after(at) {
            report.kinds.entry(kind).or_default().written.add(written - at);
        }
    }
    report.asked = told.migrations;
    report.drains = told.drains.counts();
    report.calls = (told.acknowledged, told.refused.values().sum(), told.unknown.values().sum());
    for (message, n) in told.refused.iter().chain(&told.unknown) {
        eprintln!("the user was told {n} times: {message}");
    }
    report.violations.extend(told.violations);
    if well && let Err(error) = stage.settle(SETTLE_LIMIT).await {
        report.violations.push(format!("in the end: {error:#}"));
    }
    if !report.is_good() {
        stage.cluster.keep_directory();
    }
    if let Err(error) = stage.finish().await {
        report.violations.push(format!("{error:#}"));
    }
    Ok(report)
}

/// One fault, from its beginning until all is well; or until it should be.
async fn one(
    stage: &mut Stage,
    kind: Kind,
    rng: &mut StdRng,
    report: &mut Report,
    (start, user): (Instant, &User),
) -> anyhow::Result<(Fault, bool)> {
    let seen = Instant::now();
    let before = executing(stage);
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
    tell(stage, &fault, (seen, &before), &user.drains(), report);
    Ok((fault, settled.is_ok()))
}

/// Puts into the report what the fault did to the guests.
fn tell(
    stage: &Stage,
    fault: &Fault,
    (seen, before): (Instant, &BTreeMap<String, Executing>),
    drains: &Drains,
    report: &mut Report,
) {
    let mut may_kill = fault.may_kill.clone();
    // One that was on its way to a host that was hit may have arrived there first.
    may_kill.extend(before.keys().filter(|id| was_on(stage, id, fault)).cloned());
    // So may one whose host is emptied, if the user allows that.
    may_kill.extend(before.keys().filter(|id| was_drained(stage, id, seen, drains)).cloned());
    let after = executing(stage);
    let moved = |(id, old): &(&String, &Executing)| {
        after.get(*id).is_some_and(|new| new.boot == old.boot && new.qemu.host != old.qemu.host)
    };
    report.migrated += u32::try_from(before.iter().filter(moved).count()).unwrap_or(u32::MAX);
    for Lost { id, old, new, fate } in judge(before, &after, &may_kill) {
        let guest = stage.guest(&id).ok();
        let name = guest.map_or(id.as_str(), |g| g.name.as_str());
        if fate == Fate::FalseAlarm {
            let all = stage.cluster.checker.instances(&id);
            let gone = all.into_iter().find(|i| (i.pid, i.start) == (old.pid, old.start));
            let after = gone.map(|i| i.last_seen.saturating_duration_since(fault.began)).unwrap_or_default();
            let (kind, what, host) = (fault.kind, &fault.what, &old.host);
            report.false_alarms.push(format!("{kind}, {what}: {name} on {host} was killed {after:.1?} after it began"));
        }
        match new {
            Some(new) if new.host == old.host => report.restarts += 1,
            Some(_) => report.failovers += 1,
            None => {}
        }
        if let Some(spoke) = stage.spoke_after(&id, fault.began) {
            let of = report.kinds.entry(fault.kind).or_default();
            let fast = guest.is_some_and(|g| g.failover == FailoverPolicy::Fast);
            if fast { &mut of.running } else { &mut of.waited }.add(spoke - fault.began);
        }
    }
}

/// Whether a guest may have been killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Expected,
    FalseAlarm,
}

/// A guest whose QEMU is not the one of before.
struct Lost {
    id: String,
    old: Instance,
    new: Option<Instance>,
    fate: Fate,
}

/// What executes a guest: a QEMU, and which start of the guest.
#[derive(Clone, Debug)]
struct Executing {
    qemu: Instance,
    boot: String,
}

/// All guests that execute and have said something.
fn executing(stage: &Stage) -> BTreeMap<String, Executing> {
    let all = stage.instances().into_iter().filter_map(|(id, qemu)| {
        let boot = stage.cluster.checker.beats(&id).last()?.said.boot.clone();
        Some((id, Executing { qemu, boot }))
    });
    all.collect()
}

/// Whether a guest had a QEMU on a host that was hit, since it was.
fn was_on(stage: &Stage, id: &str, fault: &Fault) -> bool {
    let all = stage.cluster.checker.instances(id);
    all.iter().any(|i| i.last_seen >= fault.began && fault.hosts.contains(&i.host))
}

/// Whether a guest had a QEMU on a host that the user had drained so that guests may be stopped, since then.
fn was_drained(stage: &Stage, id: &str, since: Instant, drains: &Drains) -> bool {
    stage.cluster.checker.instances(id).iter().any(|i| drains.may_stop(&i.host, i.last_seen, since))
}

/// Which guests were started anew, or are gone, and whether they may be. One that was migrated is in another QEMU, and is the same.
fn judge(
    before: &BTreeMap<String, Executing>,
    after: &BTreeMap<String, Executing>,
    may_kill: &BTreeSet<String>,
) -> Vec<Lost> {
    let mut all = Vec::new();
    for (id, old) in before {
        let new = after.get(id);
        if new.is_none_or(|new| new.boot != old.boot) {
            let fate = if may_kill.contains(id) { Fate::Expected } else { Fate::FalseAlarm };
            all.push(Lost { id: id.clone(), old: old.qemu.clone(), new: new.map(|n| n.qemu.clone()), fate });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executing(vm: &str, host: &str, boot: &str) -> (String, Executing) {
        let (now, vm, host) = (Instant::now(), vm.to_owned(), host.to_owned());
        let qemu = Instance { vm: vm.clone(), host, pid: 7, start: 70, first_seen: now, last_seen: now, alive: true };
        (vm, Executing { qemu, boot: boot.to_owned() })
    }

    #[test]
    fn whoever_was_started_anew_without_a_reason_is_a_false_alarm() {
        let before = ["same", "migrated", "moved", "gone", "alarm"].map(|id| executing(id, "host-1", "one")).into();
        let after = [
            executing("same", "host-1", "one"),
            executing("migrated", "host-2", "one"),
            executing("moved", "host-2", "two"),
            executing("alarm", "host-1", "two"),
        ];
        let lost = judge(&before, &after.into(), &["moved".to_owned(), "same".to_owned()].into());
        let fates: Vec<(&str, Fate)> = lost.iter().map(|l| (l.id.as_str(), l.fate)).collect();
        let alarm = Fate::FalseAlarm;
        assert_eq!(fates, [("alarm", alarm), ("gone", alarm), ("moved", Fate::Expected)]);
    }
}
