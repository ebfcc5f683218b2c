//! `WatchVms`: the VMs that there are, a bookmark, and every change.

use std::{collections::BTreeMap, sync::Arc};

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
    leadership::{FeedItem, FeedStream, Mirror},
    model::{EventType, Key, Record, Subject, VmRecord},
    state::VmEntry,
};

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
) -> Result<watch::Stream<v1::WatchVmsResponse>, Status> {
    let readable = context.readable(freshness).await?;
    let (filter, now, known) = context.read_in(&readable, |state| {
        let vm = match &request.vm {
            None => None,
            // A watch that resumes may be about a VM that is gone by now.
            Some(vm) if request.from.is_some() && vm.vm.parse::<VmId>().is_ok() => vm.vm.parse().ok(),
            Some(vm) => Some(state.resolve_vm(&vm.vm, &vm.owner)?),
        };
        let filter = Filter { owner: request.owner, vm };
        let known: BTreeMap<VmId, Arc<VmRecord>> = match filter.vm {
            Some(id) => state.vm(id).map(|e| (id, e.record.clone())).into_iter().collect(),
            None => state
                .vms()
                .filter(|(id, e)| filter.matches(**id, &e.record.owner))
                .map(|(id, e)| (*id, e.record.clone()))
                .collect(),
        };
        Ok((filter, state.revision(), known))
    })?;
    let from = request.from.unwrap_or(now);
    let mirror = readable.mirror().clone();
    let feed = mirror.feed().subscribe(from).await.map_err(error::cannot_resume)?;
    let initial = request.from.is_none();
    let retired = mirror.retired().clone();
    let over = async move {
        retired.cancelled().await;
        error::copy_retired()
    };
    Ok(watch::spawn(over, move |sink| async move {
        let mut watch = Watch { mirror, filter, known, complete: from, sink };
        watch.run(feed, initial).await
    }))
}

struct Watch {
    mirror: Mirror,
    filter: Filter,
    /// What the client may be shown as deleted: the records that VMs had. They are shared with the state.
    known: BTreeMap<VmId, Arc<VmRecord>>,
    /// Everything up to here has been sent.
    complete: Revision,
    sink: Sink<v1::WatchVmsResponse>,
}

impl Watch {
    async fn run(&mut self, mut feed: FeedStream, initial: bool) -> End {
        if initial && let Err(end) = self.initial().await {
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

    async fn initial(&mut self) -> Result<(), End> {
        let ids: Vec<VmId> = self.known.keys().copied().collect();
        for id in ids {
            // As it is now. If it is gone by now, a change will say so.
            if let Some(vm) = self.look(id) {
                // Nothing is complete before the bookmark.
                self.sink.send(v1::WatchVmsResponse { revision: 0, event: Some(Event::Vm(vm)) }).await?;
            }
        }
        let bookmark = Event::Bookmark(v1::Bookmark {});
        let message = v1::WatchVmsResponse { revision: self.complete.0, event: Some(bookmark) };
        Ok(self.sink.send(message).await?)
    }

    fn look(&self, id: VmId) -> Option<v1::Vm> {
        self.mirror.read(|state| state.vm(id).map(|entry| convert::vm(state, entry)))
    }

    async fn change(&mut self, item: &FeedItem) -> Result<(), End> {
        let mut events: Vec<Event> =
            touched(item).into_iter().filter_map(|(id, fate)| self.event(item, id, fate)).collect();
        let last = events.pop();
        for event in events {
            self.sink.send(v1::WatchVmsResponse { revision: self.complete.0, event: Some(event) }).await?;
        }
        self.complete = item.revision;
        if let Some(event) = last {
            // Only with its last message is a revision complete.
            self.sink.send(v1::WatchVmsResponse { revision: item.revision.0, event: Some(event) }).await?;
        }
        Ok(())
    }

    fn event(&mut self, item: &FeedItem, id: VmId, fate: Fate) -> Option<Event> {
        match fate {
            Fate::Changed => {
                let entry: VmEntry = self.mirror.read(|state| state.vm(id).cloned())?;
                if !self.filter.matches(id, &entry.record.owner) {
                    return None;
                }
                self.known.insert(id, entry.record.clone());
                Some(Event::Vm(self.mirror.read(|state| convert::vm(state, &entry))))
            }
            Fate::Deleted => {
                let (name, owner) = match self.known.remove(&id) {
                    Some(record) => (record.name.clone(), record.owner.clone()),
                    None => last_name(item, id),
                };
                let deleted = v1::DeletedVm { id: id.to_string(), name, owner };
                self.filter.matches(id, &deleted.owner).then_some(Event::Deleted(deleted))
            }
        }
    }
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
        FeedItem { revision: Revision(9), change: Change { mutations } }
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
