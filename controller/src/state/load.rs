//! Builds the state from everything that etcd has, at once.
//!
//! It is what taking in one record after the other gives ([`State::absorb`]), whatever their order, in a tenth of the time: maps are
//! built from sorted lists, and hosts come last, so that each goes into the scheduler's index once and not once per VM.

use std::sync::Arc;

use uncloud_proto::ids::{Revision, VmId};

use super::{State, VmEntry, command::Mutation, full_name};
use crate::{
    model::{Key, Record, VmRecord},
    pieces::Pieces,
    report,
};

/// One key as it was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// A record.
    Record {
        /// Its key.
        key: Key,
        /// What is there.
        record: Record,
        /// When it was last written.
        revision: Revision,
    },
    /// Something that this program cannot read.
    Unreadable {
        /// The key, as text.
        key: String,
        /// Why.
        error: String,
    },
}

impl Stored {
    /// Reads what is stored under a key, whatever it is.
    #[must_use]
    pub fn read(key: &[u8], value: &[u8], revision: Revision) -> Self {
        let unreadable = |error: String| Self::Unreadable { key: String::from_utf8_lossy(key).into_owned(), error };
        let Some(parsed) = Key::parse(key) else {
            return unreadable("not a key that this program knows".into());
        };
        match Record::from_json(&parsed, value) {
            Ok(record) => Self::Record { key: parsed, record, revision },
            Err(error) => unreadable(report(&error)),
        }
    }
}

impl State {
    /// The state that all these say, as it is at `revision`. A key stands there once, and none is newer than `revision`.
    #[must_use]
    pub fn of(all: impl IntoIterator<Item = Stored>, revision: Revision) -> Self {
        let mut state = Self::default();
        let (mut vms, mut statuses, mut macs) = (Vec::new(), Vec::new(), Vec::new());
        let mut names = Vec::new();
        let mut others = Vec::new();
        for stored in all {
            match stored {
                Stored::Record { key: Key::Vm(id), record: Record::Vm(record), revision } => {
                    vms.push((id, record, revision));
                }
                Stored::Record { key: Key::VmStatus(id), record: Record::VmStatus(status), revision } => {
                    statuses.push((id, (status, revision)));
                }
                Stored::Record { key: Key::VmName { owner, name }, record: Record::VmName(vm), .. } => {
                    names.push((full_name(&owner, &name), vm));
                }
                Stored::Record { key: Key::Mac(mac), record: Record::Mac(vm), .. } => macs.push((mac, vm)),
                Stored::Record { key, record, revision } => {
                    others.push((Mutation { key, value: Some(record) }, revision));
                }
                Stored::Unreadable { key, error } => drop(state.unreadable.insert(key, error)),
            }
        }
        // Of sorted lists, as etcd gives them, these are built without a search.
        state.stray_statuses = statuses.into_iter().collect();
        state.macs = macs.into_iter().collect();
        state.vm_names = names.into_iter().collect();
        state.put_all_vms(vms);
        for (mutation, revision) in &others {
            state.absorb_mutation(mutation, *revision);
        }
        state.events = 0;
        state.advance(revision);
        state
    }

    fn put_all_vms(&mut self, vms: Vec<(VmId, Arc<VmRecord>, Revision)>) {
        let entries = vms.into_iter().map(|(id, record, record_revision)| {
            let (status, status_revision) = self
                .stray_statuses
                .remove(&id)
                .map_or((None, Revision::default()), |(status, revision)| (Some(status), revision));
            (id, VmEntry { record, record_revision, status, status_revision })
        });
        let entries: Pieces<VmId, VmEntry> = entries.collect();
        for entry in entries.values() {
            self.index_vm(entry);
        }
        self.vms = entries;
    }
}
