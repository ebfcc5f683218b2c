//! Guests that have arrived on the targets of their migrations, as these have said in this term. Not stored for itself: the guest stands
//! still, and the hand-over, which is one write, is waited for by it. A target says it again to each new leader.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uncloud_proto::ids::{HostId, Incarnation, VmId};

use super::parse::Reported;
use crate::state::{State, command::ObservedState};

/// Which incarnation of a VM has arrived. Has no more entries than there are migrations under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Arrivals(Arc<Mutex<Arc<BTreeMap<VmId, Incarnation>>>>);

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, Arc<BTreeMap<VmId, Incarnation>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `host` reports. To be called before the report is handed to the writer: whoever decides on it, or on anything later, then
    /// knows.
    pub fn note(&self, state: &State, host: HostId, reports: &[Reported]) {
        let is_target = |vm: VmId, incarnation: Incarnation| {
            let migration = state.vm(vm).and_then(|entry| entry.record.migration.as_ref());
            migration.is_some_and(|m| (m.target, m.incarnation) == (host, incarnation))
        };
        let under_way = |vm: VmId, incarnation: Incarnation| {
            let migration = state.vm(vm).and_then(|entry| entry.record.migration.as_ref());
            migration.is_some_and(|m| m.incarnation == incarnation)
        };
        for Reported { seen, .. } in reports.iter().filter(|r| r.seen.state == ObservedState::Received) {
            if is_target(seen.vm, seen.incarnation) {
                let mut arrived = self.lock();
                let arrived = Arc::make_mut(&mut arrived);
                arrived.retain(|&vm, &mut incarnation| under_way(vm, incarnation));
                arrived.insert(seen.vm, seen.incarnation);
            }
        }
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Arc<BTreeMap<VmId, Incarnation>> {
        Arc::clone(&self.lock())
    }
}
