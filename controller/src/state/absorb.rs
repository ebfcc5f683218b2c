//! Takes changes into the state and keeps the indexes in step with the records.
//!
//! Whatever the order in which records come (a load from etcd goes key by key), the result is that of the records
//! themselves: every index is a function of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uncloud_proto::ids::{HostId, ImageId, Revision, VmId};

use super::{
    HostEntry, ImageEntry, REQUESTS_FORGOTTEN_MS, State, VmEntry,
    command::{Change, Mutation},
    full_name, placement,
};
use crate::{
    model::{
        Desired, HostRecord, ImageRecord, Key, Record, RequestRecord, VmRecord, VmStatusRecord, image::ImageState,
    },
    scheduler::{Needs, Resources},
};

impl State {
    /// Takes in a change that is stored at `revision`: one of our own, one read from etcd, or one that a leader made.
    ///
    /// The writer also takes in what it has decided and not stored yet, at the revision that it is based on, and says the
    /// revision once it knows it ([`State::stored`]). If it turns out that it was not stored, that state is worth nothing any more.
    pub fn absorb(&mut self, change: &Change, revision: Revision) {
        for mutation in &change.mutations {
            self.absorb_mutation(mutation, revision);
        }
        self.advance(revision);
    }

    /// What was taken in before is stored at `revision`. A key that `changed_since` names has been changed on top of that, and this is not
    /// stored yet: its revision is not known.
    pub fn stored(&mut self, change: &Change, revision: Revision, changed_since: impl Fn(&Key) -> bool) {
        for Mutation { key, .. } in change.mutations.iter().filter(|m| !changed_since(&m.key)) {
            let known = match key {
                Key::Vm(id) => self.vms.get_mut(id).map(|e| &mut e.record_revision),
                Key::VmStatus(id) => match self.vms.get_mut(id) {
                    // One that was deleted has none.
                    Some(entry) => entry.status.is_some().then_some(&mut entry.status_revision),
                    None => self.stray_statuses.get_mut(id).map(|(_, stored)| stored),
                },
                Key::Host(id) => self.hosts.get_mut(id).map(|e| &mut e.revision),
                Key::Image(id) => self.images.get_mut(id).map(|e| &mut e.revision),
                Key::Request(id) => self.requests.get_mut(id).map(|(_, stored)| stored),
                Key::VmName { .. } | Key::Mac(_) | Key::Event { .. } | Key::Leader | Key::Cluster => None,
            };
            if let Some(known) = known {
                *known = revision;
            }
        }
        self.advance(revision);
    }

    /// The records of these VMs have been changed by what was decided and is not stored yet.
    pub fn touch<'a>(&mut self, keys: impl Iterator<Item = &'a Key>) {
        self.touched.extend(keys.filter_map(|key| if let Key::Vm(id) = key { Some(*id) } else { None }));
    }

    /// Something under `key` cannot be read. It is reported, and nothing is ever written there.
    pub fn absorb_unreadable(&mut self, key: String, error: String, revision: Revision) {
        if let Some(key) = Key::parse(key.as_bytes()) {
            // What was readable once and was spoilt by hand is no longer what it was.
            self.absorb_mutation(&Mutation { key, value: None }, revision);
        }
        self.unreadable.insert(key, error);
        self.advance(revision);
    }

    /// The state is now that of this revision.
    pub fn advance(&mut self, revision: Revision) {
        if revision > self.revision {
            self.revision = revision;
            self.events = 0;
            self.touched.clear();
        }
    }

    pub(super) fn absorb_mutation(&mut self, mutation: &Mutation, revision: Revision) {
        if !self.unreadable.is_empty() {
            self.unreadable.remove(&mutation.key.to_string());
        }
        match (&mutation.key, &mutation.value) {
            (Key::Vm(id), Some(Record::Vm(record))) => {
                if revision == self.revision {
                    self.touched.insert(*id);
                }
                self.put_vm(*id, Some(record), revision);
            }
            (Key::Vm(id), None) => self.put_vm(*id, None, revision),
            (Key::VmStatus(id), Some(Record::VmStatus(status))) => self.put_status(*id, Some(status), revision),
            (Key::VmStatus(id), None) => self.put_status(*id, None, revision),
            (Key::VmName { owner, name }, Some(Record::VmName(vm))) => {
                self.vm_names.insert(full_name(owner, name), *vm);
            }
            (Key::VmName { owner, name }, None) => {
                self.vm_names.remove(full_name(owner, name).as_str());
            }
            (Key::Mac(mac), Some(Record::Mac(vm))) => {
                self.macs.insert(mac.clone(), *vm);
            }
            (Key::Mac(mac), None) => {
                self.macs.remove(mac.as_str());
            }
            (Key::Host(id), Some(Record::Host(record))) => self.put_host(*id, Some(record), revision),
            (Key::Host(id), None) => self.put_host(*id, None, revision),
            (Key::Image(id), Some(Record::Image(record))) => self.put_image(*id, Some(record), revision),
            (Key::Image(id), None) => self.put_image(*id, None, revision),
            (Key::Request(id), Some(Record::Request(record))) => self.put_request(id, Some(record), revision),
            (Key::Request(id), None) => self.put_request(id, None, revision),
            (Key::Cluster, Some(Record::Cluster(record))) => self.cluster = Some(Arc::clone(record)),
            (Key::Cluster, None) => self.cluster = None,
            (Key::Event { base, n, .. }, Some(Record::Event(_))) => {
                if *base == self.revision {
                    self.events = self.events.max(n + 1);
                }
            }
            (Key::Event { .. }, None) | (Key::Leader, _) => {}
            // A record of another kind than its key calls for cannot be made (`Record::from_json`, `Draft`).
            (
                Key::Vm(_)
                | Key::VmStatus(_)
                | Key::VmName { .. }
                | Key::Mac(_)
                | Key::Host(_)
                | Key::Image(_)
                | Key::Request(_)
                | Key::Event { .. }
                | Key::Cluster,
                Some(_),
            ) => debug_assert!(false, "record and key of different kinds: {mutation:?}"),
        }
    }

    fn put_vm(&mut self, id: VmId, record: Option<&Arc<VmRecord>>, revision: Revision) {
        let before = self.take_vm(id);
        let status = match before {
            Some(VmEntry { status: Some(status), status_revision, .. }) => Some((status, status_revision)),
            Some(VmEntry { status: None, .. }) | None => self.stray_statuses.remove(&id),
        };
        match record {
            Some(record) => {
                let (status, status_revision) =
                    status.map_or((None, Revision::default()), |(s, revision)| (Some(s), revision));
                let record = Arc::clone(record);
                self.insert_vm(VmEntry { record, record_revision: revision, status, status_revision });
            }
            None => {
                self.view.set_disks(id, BTreeMap::new());
                if let Some(status) = status {
                    self.stray_statuses.insert(id, status);
                }
            }
        }
    }

    fn put_status(&mut self, id: VmId, status: Option<&Arc<VmStatusRecord>>, revision: Revision) {
        // Mostly it is only a word about what a VM does.
        if let (Some(entry), Some(status)) = (self.vms.get_mut(&id), status) {
            let held = entry.holds_room();
            let before = entry.status.replace(Arc::clone(status));
            if entry.holds_room() == held {
                entry.status_revision = revision;
                return;
            }
            // Taken out as it was.
            entry.status = before;
        }
        match (self.take_vm(id), status) {
            (Some(mut entry), Some(status)) => {
                entry.status = Some(Arc::clone(status));
                entry.status_revision = revision;
                self.insert_vm(entry);
            }
            (Some(mut entry), None) => {
                entry.status = None;
                entry.status_revision = Revision::default();
                self.insert_vm(entry);
            }
            (None, Some(status)) => {
                self.stray_statuses.insert(id, (Arc::clone(status), revision));
            }
            (None, None) => {
                self.stray_statuses.remove(&id);
            }
        }
    }

    /// Takes a VM out, with everything that the indexes say of it but its disks: mostly it comes back with the same.
    fn take_vm(&mut self, id: VmId) -> Option<VmEntry> {
        let entry = self.vms.remove(&id)?;
        self.pending.remove(&id);
        if let Some(host) = entry.record.placement.host {
            let vms = self.tenants_mut(host);
            vms.remove(&id);
            let empty = vms.is_empty();
            if empty {
                self.orphans.remove(&host);
            }
            self.view.release(host, id);
            self.recount(host);
        }
        if let Some(clone) = &entry.record.clone_of {
            unindex(&mut self.clones, &clone.vm, id);
        }
        if let Some(migration) = &entry.record.migration {
            let target = migration.target;
            if let Some(vms) = self.incoming.get_mut(&target) {
                vms.remove(&id);
                if vms.is_empty() {
                    self.incoming.remove(&target);
                }
            }
            self.view.release(target, id);
            self.recount(target);
        }
        Some(entry)
    }

    fn insert_vm(&mut self, entry: VmEntry) {
        self.index_vm(&entry);
        self.vms.insert(entry.record.id, entry);
    }

    /// Says of a VM what the indexes are to say.
    pub(super) fn index_vm(&mut self, entry: &VmEntry) {
        let id = entry.record.id;
        self.view.set_disks(id, placement::disk_places(&entry.record));
        match entry.record.placement.host {
            Some(host) => {
                self.tenants_mut(host).insert(id);
                if entry.holds_room() {
                    self.view.assign(host, id, needs(&entry.record));
                }
                self.recount(host);
            }
            None if entry.record.desired == Desired::Running => {
                self.pending.insert(id);
            }
            None => {}
        }
        if let Some(clone) = &entry.record.clone_of {
            self.clones.entry(clone.vm).or_default().insert(id);
        }
        // Promised on both, until it is known which has it.
        if let Some(migration) = &entry.record.migration {
            let target = migration.target;
            self.incoming.entry(target).or_default().insert(id);
            self.view.assign(target, id, needs(&entry.record));
            self.recount(target);
        }
    }

    fn tenants_mut(&mut self, host: HostId) -> &mut BTreeSet<VmId> {
        match self.hosts.get_mut(&host) {
            Some(entry) => &mut entry.vms,
            None => self.orphans.entry(host).or_default(),
        }
    }

    fn recount(&mut self, host: HostId) {
        if let Some(entry) = self.hosts.get_mut(&host) {
            entry.promised = self.view.promised(host);
        }
    }

    fn put_host(&mut self, id: HostId, record: Option<&Arc<HostRecord>>, revision: Revision) {
        let before = self.hosts.remove(&id);
        if let Some(before) = &before {
            unindex(&mut self.host_names, &before.record.name, id);
            self.host_index.remove(&before.record);
        }
        match record {
            Some(record) => {
                self.view.upsert_host(Arc::clone(record));
                self.host_index.add(record);
                self.host_names.entry(record.name.clone()).or_default().insert(id);
                let vms = before.map(|b| b.vms).or_else(|| self.orphans.remove(&id)).unwrap_or_default();
                let promised = self.view.promised(id);
                self.hosts.insert(id, HostEntry { record: Arc::clone(record), revision, promised, vms });
            }
            None => {
                self.view.remove_host(id);
                if let Some(before) = before
                    && !before.vms.is_empty()
                {
                    self.orphans.insert(id, before.vms);
                }
            }
        }
    }

    fn put_image(&mut self, id: ImageId, record: Option<&Arc<ImageRecord>>, revision: Revision) {
        if let Some(before) = self.images.remove(&id) {
            unindex(&mut self.image_names, &before.record.name, id);
        }
        if let Some(record) = record {
            // Who deletes an image may use its name again at once.
            if record.state != ImageState::Deleting {
                self.image_names.entry(record.name.clone()).or_default().insert(id);
            }
            self.images.insert(id, ImageEntry { record: Arc::clone(record), revision });
        }
    }

    fn put_request(&mut self, id: &str, record: Option<&Arc<RequestRecord>>, revision: Revision) {
        if let Some((before, _)) = self.requests.remove(id) {
            self.requests_by_age.remove(&(before.at, id.to_owned()));
        }
        if let Some(record) = record {
            self.requests_by_age.insert((record.at, id.to_owned()));
            self.requests.insert(id.to_owned(), (Arc::clone(record), revision));
            self.forget_old_requests();
        }
    }
}

impl State {
    /// Forgets answers that are so much older than the newest that they are not repeated any more; etcd drops them by
    /// itself.
    fn forget_old_requests(&mut self) {
        let newest = self.requests_by_age.last().map_or(0, |(at, _)| at.0);
        while let Some((at, _)) = self.requests_by_age.first()
            && at.0.saturating_add(REQUESTS_FORGOTTEN_MS) < newest
            && let Some((_, id)) = self.requests_by_age.pop_first()
        {
            self.requests.remove(&id);
        }
    }
}

fn unindex<K: Ord, Id: Ord>(index: &mut BTreeMap<K, BTreeSet<Id>>, key: &K, id: Id) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}

/// What a VM is promised on its host: room for what it has and for what it has from its next incarnation on.
pub(super) fn needs(record: &VmRecord) -> Needs {
    let pending = record.pending.as_ref();
    let next_vcpus = pending.and_then(|p| p.vcpus).unwrap_or(0);
    let next_memory = pending.and_then(|p| p.memory_mib).unwrap_or(0);
    Needs {
        resources: Resources {
            vcpus: record.spec.vcpus.max(next_vcpus),
            memory_mib: record.spec.memory_mib.max(next_memory),
        },
        group: record.spec.anti_affinity_group.clone(),
    }
}
