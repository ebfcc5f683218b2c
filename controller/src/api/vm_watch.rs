//! `WatchVms`: the VMs that there are, a bookmark, and every change.
//!
//! What a change shows is encoded once, by the first watch that shows it ([`Feed::shown`](crate::leadership::Feed::shown)); each watch puts only its revision before
//! it. A watch knows nothing about the VMs itself.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message as _;
use tonic::Status;
use uncloud_proto::{
    ids::{Revision, VmId},
    v1::{self, watch_vms_response::Event},
};

use super::{
    context::{Context, Freshness},
    convert, error,
    validate::WatchVms,
    watch::{self, End, Sink},
};
use crate::{
    leadership::{FeedItem, FeedStream, Mirror, ShownVm},
    model::{EventType, Key, Record, Subject},
};

/// A message as it is sent.
#[derive(Debug)]
pub(crate) struct Shown {
    /// The revision that is complete with it; 0: none is.
    revision: Revision,
    /// All else of it, encoded.
    event: Bytes,
}

impl Shown {
    /// Field by field one after the other, which is what a message is.
    pub(crate) fn parts(&self) -> [Bytes; 2] {
        let revision = v1::WatchVmsResponse { revision: self.revision.0, event: None };
        [revision.encode_to_vec().into(), self.event.clone()]
    }
}

/// Encodes all of a message but its revision.
fn encode(event: Event) -> Bytes {
    v1::WatchVmsResponse { revision: 0, event: Some(event) }.encode_to_vec().into()
}

/// Which VMs a watch shows.
struct Filter {
    owner: Option<String>,
    vm: Option<VmId>,
}

impl Filter {
    fn matches(&self, id: VmId, owner: &str) -> bool {
        self.vm.is_none_or(|vm| vm == id) && self.owner.as_ref().is_none_or(|o| o == owner)
    }
}

/// Opens a watch. Whether it can begin where it should is known before the stream is.
pub(crate) async fn open(
    context: &Context,
    freshness: Freshness,
    request: WatchVms,
) -> Result<watch::Stream<Shown>, Status> {
    let readable = context.readable(freshness).await?;
    let initial = request.from.is_none();
    let (filter, now, ids) = context.read_in(&readable, |state| {
        let vm = match &request.vm {
            None => None,
            // A watch that resumes may be about a VM that is gone by now.
            Some(vm) if request.from.is_some() && vm.vm.parse::<VmId>().is_ok() => vm.vm.parse().ok(),
            Some(vm) => Some(state.resolve_vm(&vm.vm, &vm.owner)?),
        };
        let filter = Filter { owner: request.owner, vm };
        let ids: Vec<VmId> = match filter.vm {
            _ if !initial => Vec::new(),
            Some(id) => vec![id],
            None => state.vms().filter(|(id, e)| filter.matches(**id, &e.record.owner)).map(|(id, _)| *id).collect(),
        };
        Ok((filter, state.revision(), ids))
    })?;
    let from = request.from.unwrap_or(now);
    let mirror = readable.mirror().clone();
    let feed = mirror.feed().subscribe(from).await.map_err(error::cannot_resume)?;
    let retired = mirror.retired().clone();
    let over = async move {
        retired.cancelled().await;
        error::copy_retired()
    };
    Ok(watch::spawn(over, move |sink| async move {
        let mut watch = Watch { mirror, filter, complete: from, sink };
        watch.run(feed, initial.then_some(ids)).await
    }))
}

struct Watch {
    mirror: Mirror,
    filter: Filter,
    /// Everything up to here has been sent.
    complete: Revision,
    sink: Sink<Shown>,
}

impl Watch {
    /// `initial`: the VMs that are shown first.
    async fn run(&mut self, mut feed: FeedStream, initial: Option<Vec<VmId>>) -> End {
        if let Some(ids) = initial
            && let Err(end) = self.initial(ids).await
        {
            return end;
        }
        loop {
            let item = match feed.next().await {
                Ok(item) => item,
                Err(lagged) => return End::Because(error::missed_changes(lagged)),
            };
            if let Err(end) = self.change(&item).await {
                return end;
            }
        }
    }

    async fn initial(&mut self, ids: Vec<VmId>) -> Result<(), End> {
        for id in ids {
            // As it is now. If it is gone by now, a change will say so.
            let vm = self.mirror.read(|state| state.vm(id).map(|entry| convert::vm(state, entry)));
            if let Some(vm) = vm {
                // Nothing is complete before the bookmark.
                self.sink.send(Shown { revision: Revision(0), event: encode(Event::Vm(vm)) }).await?;
            }
        }
        let event = encode(Event::Bookmark(v1::Bookmark {}));
        Ok(self.sink.send(Shown { revision: self.complete, event }).await?)
    }

    async fn change(&mut self, item: &FeedItem) -> Result<(), End> {
        let shown = self.mirror.feed().shown(item, || shown(&self.mirror, item));
        let mut events = shown.iter().filter(|s| self.filter.matches(s.vm, &s.owner)).map(|s| s.event.clone());
        let mut next = events.next();
        let before = std::mem::replace(&mut self.complete, item.revision);
        while let Some(event) = next {
            next = events.next();
            // Only with its last message is a revision complete.
            let revision = if next.is_some() { before } else { item.revision };
            self.sink.send(Shown { revision, event }).await?;
        }
        Ok(())
    }
}

/// What a change shows to whoever may see all of it.
fn shown(mirror: &Mirror, item: &FeedItem) -> Vec<ShownVm> {
    let show = |(vm, fate)| match fate {
        Fate::Changed => mirror.read(|state| {
            // As it is now: of what has been deleted since, a later change tells.
            let entry = state.vm(vm)?;
            let event = encode(Event::Vm(convert::vm(state, entry)));
            Some(ShownVm { vm, owner: entry.record.owner.clone(), event })
        }),
        Fate::Deleted => {
            let (name, owner) = match item.deleted.get(&vm) {
                Some(record) => (record.name.clone(), record.owner.clone()),
                None => last_name(item, vm),
            };
            let deleted = v1::DeletedVm { id: vm.to_string(), name, owner: owner.clone() };
            Some(ShownVm { vm, owner, event: encode(Event::Deleted(deleted)) })
        }
    };
    touched(item).into_iter().filter_map(show).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Changed,
    Deleted,
}

/// The VMs that a change is about.
fn touched(item: &FeedItem) -> BTreeMap<VmId, Fate> {
    let mut touched = BTreeMap::new();
    for mutation in &item.change.mutations {
        match (&mutation.key, &mutation.value) {
            (Key::Vm(id), None) => drop(touched.insert(*id, Fate::Deleted)),
            (Key::Vm(id) | Key::VmStatus(id), _) => drop(touched.entry(*id).or_insert(Fate::Changed)),
            (
                Key::VmName { .. }
                | Key::Mac(_)
                | Key::Host(_)
                | Key::Image(_)
                | Key::Request(_)
                | Key::Event { .. }
                | Key::Leader
                | Key::Cluster,
                _,
            ) => {}
        }
    }
    touched
}

/// Name and owner of a VM that was deleted before the watch could see it: from what else was written with its deletion.
fn last_name(item: &FeedItem, id: VmId) -> (String, String) {
    let name = item.change.mutations.iter().find_map(|m| match &m.value {
        Some(Record::Event(e)) if e.subject == Subject::Vm(id) && e.kind == EventType::Deleted => {
            Some(e.subject_name.clone())
        }
        Some(_) | None => None,
    });
    let Some(name) = name else { return Default::default() };
    let mut owners = item.change.mutations.iter().filter_map(|m| match (&m.key, &m.value) {
        (Key::VmName { owner, name: n }, None) if *n == name => Some(owner.clone()),
        (_, _) => None,
    });
    let owner = match (owners.next(), owners.next()) {
        (Some(owner), None) => owner,
        // Two owners deleted VMs of one name at once: better none than the wrong one.
        (Some(_), Some(_)) | (None, _) => String::new(),
    };
    (name, owner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uncloud_proto::clock::WallTime;
    use uuid::Uuid;

    use super::*;
    use crate::{
        model::EventRecord,
        state::command::{Change, Mutation},
    };

    fn vm(n: u128) -> VmId {
        VmId::from_uuid(Uuid::from_u128(n))
    }

    fn item(mutations: Vec<Mutation>) -> FeedItem {
        FeedItem::new(Revision(9), Change { mutations })
    }

    fn gone(key: Key) -> Mutation {
        Mutation { key, value: None }
    }

    fn deleted_event(n: u128, name: &str) -> Mutation {
        let event = EventRecord {
            subject: Subject::Vm(vm(n)),
            subject_name: name.to_owned(),
            kind: EventType::Deleted,
            message: String::new(),
            time: WallTime(1),
            extra: Default::default(),
        };
        let key = Key::Event { subject: vm(n).uuid(), base: Revision(8), n: 0 };
        Mutation { key, value: Some(Record::Event(Arc::new(event))) }
    }

    #[test]
    fn a_vm_whose_record_goes_is_deleted_whatever_else_is_written_of_it() {
        let both = [gone(Key::VmStatus(vm(1))), gone(Key::Vm(vm(1)))];
        for order in [both.to_vec(), both.iter().rev().cloned().collect()] {
            assert_eq!(touched(&item(order)), [(vm(1), Fate::Deleted)].into());
        }
        assert_eq!(touched(&item(vec![gone(Key::VmStatus(vm(1)))])), [(vm(1), Fate::Changed)].into());
    }

    #[test]
    fn name_and_owner_of_a_vm_that_nobody_saw_come_from_its_deletion() {
        let name = |owner: &str, name: &str| gone(Key::VmName { owner: owner.into(), name: name.into() });
        let change = item(vec![gone(Key::Vm(vm(1))), name("ann", "web"), name("bob", "db"), deleted_event(1, "web")]);
        assert_eq!(last_name(&change, vm(1)), ("web".to_owned(), "ann".to_owned()));
        let twice = item(vec![name("ann", "web"), name("bob", "web"), deleted_event(1, "web")]);
        assert_eq!(last_name(&twice, vm(1)), ("web".to_owned(), String::new()));
        assert_eq!(last_name(&item(Vec::new()), vm(1)), Default::default());
    }
}
