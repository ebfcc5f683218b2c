//! A change in the making: what a command has decided so far, laid over the state that it is decided on.
//!
//! Every write of a decision goes through [`Draft::put`] and [`Draft::delete`], so the two rules hold in one place: a key
//! stands in a change once, and a key whose record cannot be read is never written.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uncloud_proto::ids::{HostId, Revision, VmId};

use super::{
    State, VmEntry,
    absorb::needs,
    command::{Answer, Change, Context, Decision, Mutation, Refusal},
    placement,
};
use crate::{
    model::{EventRecord, EventType, Extra, HostRecord, Key, Record, Subject, VmRecord, VmStatusRecord},
    scheduler::{ClusterView, Limits},
};

pub(super) struct Draft<'a> {
    pub(super) state: &'a State,
    pub(super) cx: &'a Context,
    mutations: Vec<Mutation>,
    /// The size of the VM records among them.
    bytes: usize,
    places: BTreeMap<Key, usize>,
    events: u32,
    /// The state's own view until something that matters to it has changed.
    view: Cow<'a, ClusterView>,
    /// VMs and hosts that have changed since `view` was last used, with the hosts that `view` has these VMs on.
    stale_vms: BTreeMap<VmId, BTreeSet<HostId>>,
    stale_hosts: BTreeSet<HostId>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(state: &'a State, cx: &'a Context) -> Self {
        Self {
            state,
            cx,
            mutations: Vec::new(),
            bytes: 0,
            places: BTreeMap::new(),
            events: state.events,
            view: Cow::Borrowed(&state.view),
            stale_vms: BTreeMap::new(),
            stale_hosts: BTreeSet::new(),
        }
    }

    pub(super) fn finish(self, answer: Answer) -> Decision {
        Decision { change: Change { mutations: self.mutations }, answer, replayed: None }
    }

    /// How many operations there are so far.
    pub(super) fn operations(&self) -> usize {
        self.mutations.len()
    }

    /// How large the VM records among them are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// A VM as it is with what has been decided so far. A VM of which either record cannot be read is not to be touched.
    pub(super) fn vm(&self, id: VmId) -> Result<VmEntry, Refusal> {
        for key in [Key::Vm(id), Key::VmStatus(id)] {
            if self.state.is_unreadable(&key) {
                return Err(Refusal::Unreadable(key.to_string()));
            }
        }
        self.peek_vm(id).ok_or_else(|| Refusal::NoVm(id.to_string()))
    }

    fn peek_vm(&self, id: VmId) -> Option<VmEntry> {
        let stored = self.state.vms.get(&id);
        let record = match self.pending(&Key::Vm(id)) {
            Some(Some(Record::Vm(record))) => Arc::clone(record),
            Some(_) => return None,
            None => Arc::clone(&stored?.record),
        };
        let status = match self.pending(&Key::VmStatus(id)) {
            Some(Some(Record::VmStatus(status))) => Some(Arc::clone(status)),
            Some(_) => None,
            None => match stored {
                Some(entry) => entry.status.clone(),
                None => self.state.stray_statuses.get(&id).map(|(status, _)| Arc::clone(status)),
            },
        };
        let (record_revision, status_revision) =
            stored.map_or((Revision::default(), Revision::default()), |e| (e.record_revision, e.status_revision));
        Some(VmEntry { record, record_revision, status, status_revision })
    }

    /// A host as it is with what has been decided so far.
    pub(super) fn host(&self, id: HostId) -> Result<Arc<HostRecord>, Refusal> {
        let key = Key::Host(id);
        if self.state.is_unreadable(&key) {
            return Err(Refusal::Unreadable(key.to_string()));
        }
        self.peek_host(id).ok_or_else(|| Refusal::NoHost(id.to_string()))
    }

    pub(super) fn peek_host(&self, id: HostId) -> Option<Arc<HostRecord>> {
        match self.pending(&Key::Host(id)) {
            Some(Some(Record::Host(record))) => Some(Arc::clone(record)),
            Some(_) => None,
            None => self.state.hosts.get(&id).map(|entry| Arc::clone(&entry.record)),
        }
    }

    /// A host's name for people.
    pub(super) fn host_name(&self, id: HostId) -> String {
        self.peek_host(id).map_or_else(|| id.to_string(), |host| host.name.clone())
    }

    fn pending(&self, key: &Key) -> Option<Option<&Record>> {
        self.places.get(key).map(|&i| self.mutations[i].value.as_ref())
    }

    pub(super) fn put_vm(&mut self, record: VmRecord) -> Result<Arc<VmRecord>, Refusal> {
        let record = Arc::new(record);
        let value = Record::Vm(Arc::clone(&record));
        self.bytes += value.to_json().len();
        self.put(Key::Vm(record.id), value)?;
        Ok(record)
    }

    pub(super) fn put_status(&mut self, vm: VmId, status: VmStatusRecord) -> Result<(), Refusal> {
        self.put(Key::VmStatus(vm), Record::VmStatus(Arc::new(status)))
    }

    pub(super) fn put_host(&mut self, record: HostRecord) -> Result<(), Refusal> {
        self.put(Key::Host(record.id), Record::Host(Arc::new(record)))
    }

    pub(super) fn put(&mut self, key: Key, record: Record) -> Result<(), Refusal> {
        self.write(key, Some(record))
    }

    pub(super) fn delete(&mut self, key: Key) -> Result<(), Refusal> {
        self.write(key, None)
    }

    fn write(&mut self, key: Key, value: Option<Record>) -> Result<(), Refusal> {
        if self.state.is_unreadable(&key) {
            return Err(Refusal::Unreadable(key.to_string()));
        }
        match &key {
            Key::Vm(id) | Key::VmStatus(id) => {
                let before = self.peek_vm(*id).map(|entry| {
                    let target = entry.record.migration.as_ref().map(|m| m.target);
                    entry.record.placement.host.into_iter().chain(target).collect::<Vec<_>>()
                });
                self.stale_vms.entry(*id).or_default().extend(before.into_iter().flatten());
            }
            Key::Host(id) => {
                self.stale_hosts.insert(*id);
            }
            Key::VmName { .. }
            | Key::Mac(_)
            | Key::Image(_)
            | Key::Request(_)
            | Key::Event { .. }
            | Key::Leader
            | Key::Cluster => {}
        }
        match self.places.get(&key) {
            Some(&i) => self.mutations[i].value = value,
            None => {
                self.places.insert(key.clone(), self.mutations.len());
                self.mutations.push(Mutation { key, value });
            }
        }
        Ok(())
    }

    /// Something happened.
    pub(super) fn event(&mut self, subject: Subject, name: &str, kind: EventType, message: String) {
        let key = Key::Event { subject: subject.uuid(), base: self.state.revision, n: self.events };
        self.events += 1;
        let record = EventRecord {
            subject,
            subject_name: name.to_owned(),
            kind,
            message,
            time: self.cx.now,
            extra: Extra::new(),
        };
        // An event's key is new: nothing unreadable can be there.
        self.mutations.push(Mutation { key, value: Some(Record::Event(Arc::new(record))) });
    }

    /// Something happened to a VM.
    pub(super) fn vm_event(&mut self, vm: &VmRecord, kind: EventType, message: String) {
        self.event(Subject::Vm(vm.id), &vm.name, kind, message);
    }

    /// Something happened to a host.
    pub(super) fn host_event(&mut self, host: &HostRecord, kind: EventType, message: String) {
        self.event(Subject::Host(host.id), &host.name, kind, message);
    }

    /// What the scheduler may know, with what has been decided so far. Copied only when there is something to add.
    pub(super) fn view(&mut self) -> &ClusterView {
        for (vm, hosts) in std::mem::take(&mut self.stale_vms) {
            let now = self.peek_vm(vm);
            let view = self.view.to_mut();
            for host in hosts {
                view.release(host, vm);
            }
            view.set_disks(vm, now.as_ref().map(|e| placement::disk_places(&e.record)).unwrap_or_default());
            let Some(entry) = now else { continue };
            if let Some(host) = entry.record.placement.host
                && entry.holds_room()
            {
                view.assign(host, vm, needs(&entry.record));
            }
            if let Some(migration) = &entry.record.migration {
                view.assign(migration.target, vm, needs(&entry.record));
            }
        }
        for host in std::mem::take(&mut self.stale_hosts) {
            match self.peek_host(host) {
                Some(record) => self.view.to_mut().upsert_host(record),
                None => self.view.to_mut().remove_host(host),
            }
        }
        &self.view
    }

    /// What the scheduler must know besides.
    pub(super) fn limits(&self) -> Limits<'a> {
        Limits {
            cpu_overcommit_percent: self.cx.cpu_overcommit_percent,
            disk_overcommit_percent: self.cx.disk_overcommit_percent,
            silent: &self.cx.silent,
        }
    }
}
