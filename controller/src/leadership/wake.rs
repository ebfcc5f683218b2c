//! Which hosts' sessions are woken by a change. Ten thousand sessions must not look at every write.
//!
//! This decides about haste only, never about safety: a session plans anew before it answers a heartbeat if anything at all was
//! committed since it last did (S3), so a host that is not woken here hears of a change with its next heartbeat.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;
use uncloud_proto::ids::HostId;

use crate::state::Concerned;

/// The sessions that can be woken. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Sleepers {
    sessions: Arc<Mutex<BTreeMap<HostId, Arc<Notify>>>>,
}

/// A session's place among those that can be woken. Leaves when it is dropped.
#[derive(Debug)]
pub struct Sleeper {
    sleepers: Sleepers,
    host: HostId,
    bell: Arc<Notify>,
}

impl Sleepers {
    /// The session of this host is to be woken from now on. An older one of the same host is not, any more.
    pub(super) fn add(&self, host: HostId) -> Sleeper {
        let bell = Arc::new(Notify::new());
        self.lock().insert(host, Arc::clone(&bell));
        Sleeper { sleepers: self.clone(), host, bell }
    }

    pub(super) fn wake(&self, concerned: Concerned) {
        let sessions = self.lock();
        match concerned {
            Concerned::Everybody => sessions.values().for_each(|bell| bell.notify_one()),
            Concerned::Hosts(hosts) => {
                hosts.iter().filter_map(|host| sessions.get(host)).for_each(|bell| bell.notify_one());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostId, Arc<Notify>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sleeper {
    /// Returns when the session was woken since this last returned. Cancel safe.
    pub async fn woken(&self) {
        self.bell.notified().await;
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let mut sessions = self.sleepers.lock();
        if sessions.get(&self.host).is_some_and(|bell| Arc::ptr_eq(bell, &self.bell)) {
            sessions.remove(&self.host);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use futures_util::FutureExt as _;
    use uuid::Uuid;

    use super::*;

    fn host(n: u128) -> HostId {
        HostId::from_uuid(Uuid::from_u128(n))
    }

    #[test]
    fn only_the_concerned_are_woken_and_only_the_newest_session_of_a_host() {
        let sleepers = Sleepers::default();
        let old = sleepers.add(host(1));
        let (one, two) = (sleepers.add(host(1)), sleepers.add(host(2)));
        sleepers.wake(Concerned::Hosts(BTreeSet::from([host(1), host(3)])));
        assert!(old.woken().now_or_never().is_none());
        assert!(two.woken().now_or_never().is_none());
        assert!(one.woken().now_or_never().is_some());
        assert!(one.woken().now_or_never().is_none(), "once");
        drop(old);
        sleepers.wake(Concerned::Everybody);
        assert!(one.woken().now_or_never().is_some(), "the old one has not taken the place of the new one along");
        assert!(two.woken().now_or_never().is_some());
        drop((one, two));
        assert!(sleepers.lock().is_empty());
    }
}
