//! `WatchHosts`: the hosts that there are, a bookmark, and every change.
//!
//! Much of what is shown about a host is not stored with it: whether it is heard, what is promised. So besides the
//! stored changes the watch looks at all hosts twice a second and sends those that look different.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{self, MissedTickBehavior};
use tonic::Status;
use uncloud_proto::{
    ids::{HostId, Revision},
    v1::{self, watch_hosts_response::Event},
};

use super::{
    context::Context,
    convert, error, host_service,
    watch::{self, End, Sink},
};
use crate::{
    leadership::{FeedItem, FeedStream, Leader},
    model::Key,
    scheduler::Resources,
    state::State,
};

/// How often a watch looks for what is not stored. A person does not notice more.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What is shown about a host and not stored with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    state: v1::HostState,
    connected: bool,
    unknown_vms: usize,
    promised: Resources,
    vms: usize,
}

/// Opens a watch. Whether it can begin where it should is known before the stream is.
pub(super) async fn open(
    context: &Context,
    from: Option<Revision>,
) -> Result<watch::Stream<v1::WatchHostsResponse>, Status> {
    let leader = context.leader()?;
    let now = context.read(|_, state| Ok(state.revision())).await?;
    let initial = from.is_none();
    let from = from.unwrap_or(now);
    let feed = leader.mirror.feed().subscribe(from).await.map_err(error::cannot_resume)?;
    Ok(watch::spawn(context.clone().term_over(leader.clone()), move |sink| async move {
        let mut watch = Watch { leader, seen: BTreeMap::new(), complete: from, sink };
        watch.run(feed, initial).await
    }))
}

struct Watch {
    leader: Arc<Leader>,
    seen: BTreeMap<HostId, Look>,
    /// Everything up to here has been sent.
    complete: Revision,
    sink: Sink<v1::WatchHostsResponse>,
}

impl Watch {
    async fn run(&mut self, mut feed: FeedStream, initial: bool) -> End {
        if let Err(end) = self.begin(initial).await {
            return end;
        }
        let mut ticker = time::interval(LOOK_EVERY);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let result = tokio::select! {
                item = feed.next() => match item {
                    Ok(item) => self.change(&item).await,
                    Err(lagged) => return End::Because(error::missed_changes(lagged)),
                },
                _ = ticker.tick() => self.look_again().await,
            };
            if let Err(end) = result {
                return end;
            }
        }
    }

    async fn begin(&mut self, initial: bool) -> Result<(), End> {
        self.seen = self.looks();
        if !initial {
            return Ok(());
        }
        let ids: Vec<HostId> = self.seen.keys().copied().collect();
        for id in ids {
            // Nothing is complete before the bookmark.
            self.send_host(id, Revision(0)).await?;
        }
        let event = Some(Event::Bookmark(v1::Bookmark {}));
        Ok(self.sink.send(v1::WatchHostsResponse { revision: self.complete.0, event }).await?)
    }

    fn looks(&self) -> BTreeMap<HostId, Look> {
        self.leader.mirror.read(|state| looks(&self.leader, state))
    }

    async fn send_host(&self, id: HostId, revision: Revision) -> Result<(), End> {
        let host = self.leader.mirror.read(|state| state.host(id).map(|e| host_service::shown(&self.leader, e)));
        match host {
            Some(host) => {
                let event = Some(Event::Host(host));
                Ok(self.sink.send(v1::WatchHostsResponse { revision: revision.0, event }).await?)
            }
            // It has just gone; the change that says so comes.
            None => Ok(()),
        }
    }

    async fn change(&mut self, item: &FeedItem) -> Result<(), End> {
        let mut touched: Vec<(HostId, bool)> = Vec::new();
        for mutation in &item.change.mutations {
            if let Key::Host(id) = mutation.key {
                touched.push((id, mutation.value.is_some()));
            }
        }
        let count = touched.len();
        for (i, (id, exists)) in touched.into_iter().enumerate() {
            // Only with its last message is a revision complete.
            let revision = if i + 1 == count { item.revision } else { self.complete };
            if exists {
                self.send_host(id, revision).await?;
            } else {
                let event = Some(Event::DeletedId(id.to_string()));
                self.sink.send(v1::WatchHostsResponse { revision: revision.0, event }).await?;
            }
        }
        self.complete = item.revision;
        Ok(())
    }

    async fn look_again(&mut self) -> Result<(), End> {
        let now = self.looks();
        let changed: Vec<HostId> =
            now.iter().filter(|(id, look)| self.seen.get(id) != Some(look)).map(|(id, _)| *id).collect();
        self.seen = now;
        for id in changed {
            self.send_host(id, self.complete).await?;
        }
        Ok(())
    }
}

fn looks(leader: &Leader, state: &State) -> BTreeMap<HostId, Look> {
    let now = leader.clock.now();
    let health = leader.health();
    let look = |(&id, entry): (&HostId, &crate::state::HostEntry)| {
        let facts = leader.sessions.facts(id);
        let look = Look {
            state: convert::host_state(health.state(id, now)),
            connected: facts.is_some(),
            unknown_vms: facts.map_or(0, |f| f.unknown_vms.len()),
            promised: entry.promised,
            vms: entry.vms.len(),
        };
        (id, look)
    };
    state.hosts().map(look).collect()
}
