//! `SimulateHostFailure`: what would become of VMs if their hosts died.
//!
//! Answered by every controller from its copy. What only the leader knows is which hosts are silent at the moment, on which
//! nothing would be placed; the answer of another controller takes them for heard.

use std::collections::BTreeSet;

use tokio::{sync::Semaphore, task::spawn_blocking};
use tonic::Status;
use uncloud_proto::{ids::HostId, v1};

use super::context::{Context, Freshness};
use crate::{
    model::Liveness,
    state::{Fate, Outcome, State, command},
};

/// VMs that one answer names.
const MOST_VMS: usize = 10_000;
/// Simulations at a time: each may keep a CPU busy for a second in the largest cluster, and has a copy of the state.
static TURNS: Semaphore = Semaphore::const_new(1);

/// Answers a request that has been checked.
pub(super) async fn simulate(
    context: &Context,
    freshness: Freshness,
    hosts: Vec<String>,
) -> Result<v1::SimulateHostFailureResponse, Status> {
    let turn = TURNS.acquire().await.map_err(|_| Status::internal("the turns of simulations were closed"))?;
    let readable = context.readable(freshness).await?;
    let silent = readable.leader().map(|leader| leader.silent_hosts()).unwrap_or_default();
    // The simulation takes long, and the writer must not wait for it. Records are shared, so a copy is cheap.
    let (state, dying) = context.read_in(&readable, |state| {
        let dying: BTreeSet<HostId> = hosts.iter().map(|h| state.resolve_host(h)).collect::<Result<_, _>>()?;
        Ok((state.clone(), dying))
    })?;
    let cx = command::Context {
        now: context.clock.wall(),
        silent,
        arrived: std::sync::Arc::default(),
        cpu_overcommit_percent: context.cpu_overcommit_percent,
        disk_overcommit_percent: context.disk_overcommit_percent,
    };
    let simulated = spawn_blocking(move || {
        // Also of one whose caller has gone.
        let _turn = turn;
        let fates = state.simulate_failure(&dying, &cx)?;
        Ok::<_, command::Refusal>(answer(&state, &dying, &cx, &fates))
    });
    Ok(simulated.await.map_err(|_| Status::internal("the simulation ended badly"))??)
}

fn answer(
    state: &State,
    dying: &BTreeSet<HostId>,
    cx: &command::Context,
    fates: &[Fate],
) -> v1::SimulateHostFailureResponse {
    v1::SimulateHostFailureResponse {
        summary: summary(fates),
        warnings: warnings(state, dying, cx),
        vms: fates.iter().take(MOST_VMS).filter_map(|fate| shown(state, fate)).collect(),
        more: u32::try_from(fates.len().saturating_sub(MOST_VMS)).unwrap_or(u32::MAX),
        revision: state.revision().0,
    }
}

fn shown(state: &State, fate: &Fate) -> Option<v1::SimulatedVm> {
    let record = &state.vm(fate.vm)?.record;
    let name = |host: HostId| state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone());
    let (outcome, to, reason) = match &fate.outcome {
        Outcome::Moves { to, why } => (v1::SimulatedOutcome::Moves, Some(*to), why),
        Outcome::MovesWithNewDisks { to, why } => (v1::SimulatedOutcome::MovesWithNewDisks, Some(*to), why),
        Outcome::Pending { why } => (v1::SimulatedOutcome::Pending, None, why),
        Outcome::Unreachable { why } => (v1::SimulatedOutcome::Unreachable, None, why),
    };
    let next = record.next_spec();
    Some(v1::SimulatedVm {
        vm_id: record.id.to_string(),
        name: record.name.clone(),
        owner: record.owner.clone(),
        from_host: name(fate.from),
        outcome: outcome.into(),
        to_host: to.map(name).unwrap_or_default(),
        reason: reason.clone(),
        vcpus: next.vcpus,
        memory_mib: next.memory_mib,
        priority: next.priority,
    })
}

/// Such as "2 of 3 VMs would move, 1 would wait for room".
fn summary(fates: &[Fate]) -> String {
    let (mut moved, mut pending, mut stay) = (0, 0, 0);
    for fate in fates {
        match fate.outcome {
            Outcome::Moves { .. } | Outcome::MovesWithNewDisks { .. } => moved += 1,
            Outcome::Pending { .. } => pending += 1,
            Outcome::Unreachable { .. } => stay += 1,
        }
    }
    let mut text = match fates.len() {
        0 => return "no VM that should run is there".to_owned(),
        1 => format!("{moved} of 1 VM would move"),
        all => format!("{moved} of {all} VMs would move"),
    };
    for (count, what) in [(pending, "would wait for room elsewhere"), (stay, "would wait for their hosts")] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

/// What stands in the way of a failover as such.
fn warnings(state: &State, dying: &BTreeSet<HostId>, cx: &command::Context) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(off) = state.cluster().and_then(|c| c.failover_off.as_ref()).filter(|off| off.until > cx.now) {
        let left = (off.until.0 - cx.now.0).div_ceil(1000);
        warnings.push(format!("failover is switched off: nothing would move for the next {left} s"));
    }
    let counted: Vec<HostId> =
        state.hosts().filter(|(_, host)| host.record.liveness == Liveness::Up).map(|(id, _)| *id).collect();
    let heard = counted.iter().filter(|id| !dying.contains(id) && !cx.silent.contains(id)).count();
    // As in health/brake.rs: of two hosts, one is enough.
    if heard * 2 < counted.len() {
        warnings.push(format!(
            "{heard} of {} hosts would still be heard, fewer than half: the brake would hold the failover until \
             `uncloud failover proceed`",
            counted.len()
        ));
    }
    warnings
}
