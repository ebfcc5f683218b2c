//! Which migrations cannot go on: a host of theirs is not heard, or they take too long. Pure.
//!
//! Time counts from when this leader has first seen a migration, or a stage of it, on its own clock: a new leader begins anew,
//! and no two clocks are compared. That a migration is given up late costs time and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use uncloud_proto::{
    clock::Tick,
    ids::{HostId, Incarnation, VmId},
};

use crate::{
    model::{
        Liveness,
        migration::{Arrival, Migration},
    },
    state::{State, command::Command},
};

/// How long a target may take until it listens: it may have to fetch a kernel's image first.
pub const READY_LIMIT: Duration = Duration::from_secs(120);
/// The same if it has to make disks, too: it may have to fetch their images.
pub const DISKS_READY_LIMIT: Duration = Duration::from_secs(1800);
/// How long the guest may stand still on the source, which has sent everything, before the target has it. QEMU needs some
/// milliseconds.
pub const HANDED_OVER_LIMIT: Duration = Duration::from_secs(5);
/// How long nothing may be sent, as far as the source says, which speaks every second. Only if the hosts do not reach each other:
/// TCP alone would try for a quarter of an hour, and the guest could be moved nowhere meanwhile.
pub const STALLED_LIMIT: Duration = Duration::from_secs(15);
/// How long a migration may take in all. A guest that writes faster than the network carries never gets there.
pub const MIGRATION_LIMIT: Duration = Duration::from_secs(3600);
/// The same if its disks are copied, too.
pub const DISKS_MIGRATION_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Watches the migrations under way. Lives as long as the term.
#[derive(Debug, Default)]
pub struct Migrations {
    seen: BTreeMap<VmId, Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    incarnation: Incarnation,
    since: Tick,
    stage: Stage,
    stage_since: Tick,
    /// Bytes that have been sent, by the newest report.
    sent: u64,
    sent_since: Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preparing,
    Sending,
    HandedOver,
}

impl Stage {
    fn of(migration: &Migration) -> Self {
        match (migration.handed_over, migration.arrival) {
            (Some(_), _) => Self::HandedOver,
            (None, Arrival::Preparing) => Self::Preparing,
            (None, Arrival::Listening) => Self::Sending,
        }
    }
}

impl Migrations {
    /// Looks at all migrations. Returns what gives those up that cannot go on.
    pub fn hopeless(&mut self, state: &State, silent: &BTreeSet<HostId>, now: Tick) -> Vec<Command> {
        let mut seen = BTreeMap::new();
        let mut commands = Vec::new();
        for vm in state.migrating() {
            let Some(entry) = state.vm(vm) else { continue };
            let Some(migration) = &entry.record.migration else { continue };
            let (incarnation, stage) = (migration.incarnation, Stage::of(migration));
            let progress =
                entry.status.as_ref().and_then(|s| s.migration.as_ref()).filter(|p| p.incarnation == incarnation);
            let sent = progress.map_or(0, |p| p.transferred_bytes);
            let fresh = Seen { incarnation, since: now, stage, stage_since: now, sent, sent_since: now };
            let source = entry.record.placement.host;
            let mut known = match self.seen.get(&vm) {
                Some(known) if known.incarnation == incarnation && known.stage == stage => *known,
                Some(known) if known.incarnation == incarnation => Seen { since: known.since, ..fresh },
                Some(_) | None => fresh,
            };
            // A source that is not heard may be sending all the same.
            if known.sent != sent || source.is_some_and(|host| silent.contains(&host)) {
                known = Seen { sent, sent_since: now, ..known };
            }
            seen.insert(vm, known);
            if let Some(why) = why_hopeless(state, silent, now, source, migration, known) {
                commands.push(Command::GiveUpMigration { vm, migration: incarnation, why });
            }
        }
        self.seen = seen;
        commands
    }
}

fn why_hopeless(
    state: &State,
    silent: &BTreeSet<HostId>,
    now: Tick,
    source: Option<HostId>,
    migration: &Migration,
    seen: Seen,
) -> Option<String> {
    let is_up = |host: HostId| state.host(host).is_some_and(|h| h.record.liveness == Liveness::Up);
    let name = |host: HostId| state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone());
    let target = migration.target;
    if !is_up(target) || silent.contains(&target) {
        return Some(format!("host `{}` is not heard", name(target)));
    }
    // One that is only late may be back soon, and the guest executes meanwhile.
    if let Some(source) = source.filter(|&source| !is_up(source)) {
        return Some(format!("host `{}` is down", name(source)));
    }
    let (ready_limit, limit) = match migration.disk_generation {
        None => (READY_LIMIT, MIGRATION_LIMIT),
        Some(_) => (DISKS_READY_LIMIT, DISKS_MIGRATION_LIMIT),
    };
    let in_stage = now.since(seen.stage_since);
    match seen.stage {
        Stage::HandedOver if in_stage > HANDED_OVER_LIMIT => {
            Some(format!("host `{}` has not got the guest in time", name(target)))
        }
        Stage::Preparing if in_stage > ready_limit => Some(format!("host `{}` was not ready in time", name(target))),
        Stage::Sending if now.since(seen.sent_since) > STALLED_LIMIT => {
            let secs = STALLED_LIMIT.as_secs();
            Some(format!("nothing has got to host `{}` for {secs} s; do the hosts reach each other?", name(target)))
        }
        Stage::Preparing | Stage::Sending | Stage::HandedOver if now.since(seen.since) > limit => {
            Some(format!("it took longer than {} minutes", limit.as_secs() / 60))
        }
        Stage::Preparing | Stage::Sending | Stage::HandedOver => None,
    }
}
