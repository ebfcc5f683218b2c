//! `ClusterService`.

use std::{collections::BTreeMap, time::Duration};

use tonic::{Request, Response, Status};
use uncloud_proto::{
    clock::WallTime,
    v1::{self, cluster_service_server::ClusterService, watch_events_response::Step},
};
use uuid::Uuid;

use super::{
    context::{Context, Freshness, timely},
    convert, error,
    validate::{self, VmRef},
    watch::{self, End, Sink},
};
use crate::{
    health::Hearing,
    leadership::{FeedItem, Leader},
    model::{EventType, FailoverOff, HostMode, Key, Phase, Record},
    state::{
        State,
        command::{Command, FailoverChange, Refusal},
    },
};

/// Unreadable records that a status lists.
const UNREADABLE_LISTED: usize = 100;

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    pub(super) context: Context,
}

fn status(leader: &Leader, state: &State) -> v1::GetStatusResponse {
    let now = leader.clock.now();
    let (hearings, brake) = {
        let health = leader.health();
        (state.hosts().map(|(id, entry)| (health.state(*id, now), entry)).collect::<Vec<_>>(), health.brake())
    };
    let mut hosts: BTreeMap<&str, u32> = BTreeMap::new();
    for (hearing, entry) in &hearings {
        let heard = match hearing {
            Hearing::Up => "up",
            Hearing::Silent { .. } => "silent",
            Hearing::FastLapsed | Hearing::Dead => "down",
        };
        *hosts.entry(heard).or_default() += 1;
        let mode = match entry.record.mode {
            HostMode::Active => continue,
            HostMode::Cordoned => "cordoned",
            HostMode::Draining => "draining",
        };
        *hosts.entry(mode).or_default() += 1;
    }
    let mut phases: BTreeMap<Phase, u32> = BTreeMap::new();
    for (_, entry) in state.vms() {
        *phases.entry(entry.effective_status().phase).or_default() += 1;
    }
    let lease = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let since = brake.since.map(|tick| {
        let ago = u64::try_from(now.since(tick).as_millis()).unwrap_or(u64::MAX);
        WallTime(leader.clock.wall().0.saturating_sub(ago)).to_proto()
    });
    let unreadable = state.unreadable();
    v1::GetStatusResponse {
        leader: Some(v1::Leader {
            id: leader.id.to_string(),
            address: leader.settings.address.clone(),
            term: leader.term.0,
            since: Some(leader.since.to_proto()),
        }),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        warnings: failover_off(leader, state)
            .map(|off| format!("Failover is switched off{}; `uncloud failover on` ends that", reason(&off.reason)))
            .into_iter()
            .chain(warnings(leader, &hearings, &phases, brake, unreadable.len()))
            .collect(),
        hosts: hosts.into_iter().map(|(state, count)| v1::HostCount { state: state.to_owned(), count }).collect(),
        vms: phases.into_iter().map(|(p, count)| v1::VmCount { phase: convert::phase(p).into(), count }).collect(),
        brake: Some(v1::Brake { engaged: brake.engaged, heard: brake.heard, total: brake.total, since }),
        unreadable: unreadable
            .iter()
            .take(UNREADABLE_LISTED)
            .map(|(key, error)| v1::UnreadableRecord { key: key.clone(), error: error.clone() })
            .collect(),
        unreadable_count: u32::try_from(unreadable.len()).unwrap_or(u32::MAX),
        fast_lease_ms: lease(leader.settings.timings.fast),
        patient_lease_ms: lease(leader.settings.timings.patient),
        revision: state.revision().0,
        failover_off_until: failover_off(leader, state).map(|off| off.until.to_proto()),
    }
}

fn reason(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

/// Failover is switched off at the moment.
fn failover_off<'a>(leader: &Leader, state: &'a State) -> Option<&'a FailoverOff> {
    let off = state.cluster()?.failover_off.as_ref()?;
    (!off.left(leader.clock.wall()).is_zero()).then_some(off)
}

/// What an operator should look at, a sentence each.
fn warnings(
    leader: &Leader,
    hearings: &[(Hearing, &crate::state::HostEntry)],
    phases: &BTreeMap<Phase, u32>,
    brake: crate::health::BrakeState,
    unreadable: usize,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |count: usize, one: &str, many: &str| match count {
        0 => {}
        1 => warnings.push(format!("1 {one}")),
        n => warnings.push(format!("{n} {many}")),
    };
    let count = |wanted: fn(&Hearing) -> bool| hearings.iter().filter(|(h, _)| wanted(h)).count();
    let vms = |phase| phases.get(&phase).copied().unwrap_or(0) as usize;
    warn(count(|h| matches!(h, Hearing::Silent { .. })), "host is silent", "hosts are silent");
    warn(count(|h| matches!(h, Hearing::FastLapsed | Hearing::Dead)), "host is down", "hosts are down");
    let unknown = hearings.iter().filter_map(|(_, e)| leader.sessions.facts(e.record.id));
    let unknown: usize = unknown.map(|facts| facts.unknown_vms.len()).sum();
    warn(
        unknown,
        "VM runs that the cluster knows nothing about; `host show` names it",
        "VMs run that the cluster knows nothing about; `host show` names them",
    );
    let problems = hearings.iter().flat_map(|(_, e)| &e.record.pools).filter(|p| !p.problem.is_empty()).count();
    warn(problems, "pool has a problem; `host show` says which", "pools have a problem; `host show` says which");
    warn(
        vms(Phase::Pending),
        "VM waits for a host; `vm explain` says why",
        "VMs wait for a host; `vm explain` says why",
    );
    warn(vms(Phase::Failed), "VM has failed; `vm show` says why", "VMs have failed; `vm show` says why");
    warn(
        vms(Phase::Unreachable),
        "VM is unreachable: its host is down and has its disks",
        "VMs are unreachable: their hosts are down and have their disks",
    );
    warn(
        unreadable,
        "record in etcd cannot be read and is left alone; mend or remove it by hand",
        "records in etcd cannot be read and are left alone; mend or remove them by hand",
    );
    if brake.engaged {
        warnings.insert(
            0,
            format!(
                "the brake is on: only {} of {} hosts are heard, so no host is declared dead; if the silent ones are \
                 really dead, release it",
                brake.heard, brake.total
            ),
        );
    }
    warnings
}

/// The subject that is meant. A full UUID is taken as it is, because its subject may be gone.
fn subject(state: &State, wanted: &VmRef) -> Result<Uuid, Status> {
    let VmRef { vm: text, owner } = wanted;
    if let Ok(id) = Uuid::try_parse(text) {
        return Ok(id);
    }
    // What is ambiguous among VMs is not looked for among hosts.
    match state.resolve_vm(text, owner) {
        Err(Refusal::NoVm(_)) => {}
        other => return Ok(other?.uuid()),
    }
    match state.resolve_host(text) {
        Err(Refusal::NoHost(_)) => {}
        other => return Ok(other?.uuid()),
    }
    match state.resolve_image(text) {
        Err(Refusal::NoImage { .. }) => {
            let message = format!(
                "no VM (of owner `{owner}`), host or image `{text}`; events of one that is gone are found by its UUID"
            );
            Err(Status::not_found(message))
        }
        other => Ok(other?.uuid()),
    }
}

/// The events of a change, in order.
fn events(item: &FeedItem, subject: Option<Uuid>) -> Vec<v1::Event> {
    let mut found: Vec<(u32, v1::Event)> = item
        .change
        .mutations
        .iter()
        .filter_map(|m| match (&m.key, &m.value) {
            (Key::Event { subject: s, n, .. }, Some(Record::Event(e))) if subject.is_none_or(|wanted| wanted == *s) => {
                Some((*n, convert::event(e, item.revision)))
            }
            (_, _) => None,
        })
        .collect();
    found.sort_by_key(|(n, _)| *n);
    found.into_iter().map(|(_, event)| event).collect()
}

async fn send_events(
    sink: &Sink<v1::WatchEventsResponse>,
    before: i64,
    item: &FeedItem,
    subject: Option<Uuid>,
) -> Result<(), End> {
    let events = events(item, subject);
    let count = events.len();
    for (i, event) in events.into_iter().enumerate() {
        // Only with its last message is a revision complete.
        let revision = if i + 1 == count { item.revision.0 } else { before };
        sink.send(v1::WatchEventsResponse { revision, step: Some(Step::Event(event)) }).await?;
    }
    Ok(())
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(self.context.read(|leader, state| Ok(status(leader, state))).await?))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let filter = validate::list_events(request.into_inner())?;
        let store = self.context.store()?;
        let readable = self.context.readable(freshness).await?;
        let (subject, revision) = self.context.read_in(&readable, |state| {
            Ok((filter.subject.as_ref().map(|s| subject(state, s)).transpose()?, state.revision()))
        })?;
        let stored =
            timely(async { store.list_events(subject, filter.limit).await.map_err(|e| error::store_failed(&e)) })
                .await?;
        // What was stored since belongs to no revision that this answer could name.
        let events = stored.iter().filter(|e| e.revision <= revision).map(|e| convert::event(&e.event, e.revision));
        Ok(Response::new(v1::ListEventsResponse { events: events.collect(), revision: revision.0 }))
    }

    type WatchEventsStream = watch::Stream<v1::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let (filter, resume) = validate::watch_events(request.into_inner())?;
        let store = self.context.store()?;
        let readable = self.context.readable(freshness).await?;
        let (subject, now) = self.context.read_in(&readable, |state| {
            Ok((filter.subject.as_ref().map(|s| subject(state, s)).transpose()?, state.revision()))
        })?;
        let from = resume.unwrap_or(now);
        let mirror = readable.mirror().clone();
        let (mut feed, initial) = timely(async {
            let feed = mirror.feed().subscribe(from).await.map_err(error::cannot_resume)?;
            if resume.is_some() {
                return Ok((feed, Vec::new()));
            }
            let mut initial = store.list_events(subject, filter.limit).await.map_err(|e| error::store_failed(&e))?;
            initial.retain(|e| e.revision <= from);
            // Oldest first, so that a reader sees them in the order in which they happened.
            initial.reverse();
            Ok((feed, initial))
        })
        .await?;
        let over = async move {
            // The feed has its end with the copy.
            mirror.retired().cancelled().await;
            error::copy_retired()
        };
        let stream = watch::spawn(over, move |sink| async move {
            let work = async {
                if resume.is_none() {
                    for stored in initial {
                        let event = Some(Step::Event(convert::event(&stored.event, stored.revision)));
                        sink.send(v1::WatchEventsResponse { revision: 0, step: event }).await?;
                    }
                    let step = Some(Step::Bookmark(v1::Bookmark {}));
                    sink.send(v1::WatchEventsResponse { revision: from.0, step }).await?;
                }
                let mut complete = from.0;
                loop {
                    let item = feed.next().await.map_err(|lagged| End::Because(error::missed_changes(lagged)))?;
                    send_events(&sink, complete, &item, subject).await?;
                    complete = item.revision.0;
                }
            };
            let result: Result<std::convert::Infallible, End> = work.await;
            match result {
                Ok(never) => match never {},
                Err(end) => end,
            }
        });
        Ok(Response::new(stream))
    }

    async fn release_brake(
        &self,
        _: Request<v1::ReleaseBrakeRequest>,
    ) -> Result<Response<v1::ReleaseBrakeResponse>, Status> {
        let leader = self.context.leader()?;
        timely(async {
            let silent_hosts = {
                let now = leader.clock.now();
                leader.health().release_brake(now)
            };
            let message = format!("a person says that {silent_hosts} silent hosts are really dead");
            let note = Command::Note { event: EventType::BrakeReleased, message };
            self.context.submit(&leader, note).await?;
            Ok(Response::new(v1::ReleaseBrakeResponse { silent_hosts }))
        })
        .await
    }

    async fn set_failover(
        &self,
        request: Request<v1::SetFailoverRequest>,
    ) -> Result<Response<v1::SetFailoverResponse>, Status> {
        let change = validate::set_failover(request.into_inner())?;
        timely(async {
            let leader = self.context.leader()?;
            self.context.submit(&leader, Command::SetFailover { change: change.clone() }).await?;
            let ahead = match change {
                FailoverChange::Off { for_ms, .. } => Duration::from_millis(for_ms),
                // Beyond a lease as usual: what was granted while it was off.
                FailoverChange::On => {
                    let now = leader.clock.now();
                    let (fast, _) = leader.health().running(now);
                    fast.saturating_sub(leader.settings.timings.wait(leader.settings.timings.fast))
                }
            };
            let ahead = u64::try_from(ahead.as_millis()).unwrap_or(u64::MAX);
            let effective = WallTime(leader.clock.wall().0.saturating_add(ahead)).to_proto();
            Ok(Response::new(v1::SetFailoverResponse { effective: Some(effective) }))
        })
        .await
    }
}
