//! How one VM's task hears from the manager.
//!
//! A queue that is never full, because everything in it is level-triggered: a newer desired state replaces an older
//! one that has not been taken yet, and the rest are facts that are either so or not. So the session's task, which
//! also handles the lease, never waits for a VM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::{desired::Desired, state::Acceptance};
use crate::lease::LeaseClass;

/// The lease generations of both classes at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    /// Of the short lease.
    pub fast: u16,
    /// Of the long lease.
    pub patient: u16,
}

impl Generations {
    /// That of one class; a VM that is held has none, and always 0.
    #[must_use]
    pub const fn of(self, class: LeaseClass) -> u16 {
        match class {
            LeaseClass::Fast => self.fast,
            LeaseClass::Patient => self.patient,
            LeaseClass::Hold => 0,
        }
    }
}

/// What a VM's task has not heard yet. To be handled in the order of the fields.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// A session ended. If several did, what counts is the first after what the task knows.
    pub session_ended: Option<Generations>,
    /// The newest desired state.
    pub desired: Option<(Box<Desired>, Acceptance)>,
    /// The lease began a new generation.
    pub lease_changed: bool,
    /// The leader has the report that it is deleted or forgotten.
    pub over: bool,
}

impl Mail {
    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One VM's mailbox.
#[derive(Clone, Debug, Default)]
pub struct Mailbox {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    mail: Mail,
    closed: bool,
}

/// The task has ended. What was put in is lost; a new task is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

impl Mailbox {
    fn put(&self, change: impl FnOnce(&mut Mail)) -> Result<(), Closed> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Closed);
        }
        change(&mut inner.mail);
        drop(inner);
        self.shared.filled.notify_one();
        Ok(())
    }

    /// Tells what the VM should be.
    ///
    /// # Errors
    ///
    /// The task has ended.
    pub fn desired(&self, desired: Desired, acceptance: Acceptance) -> Result<(), Closed> {
        self.put(|mail| {
            mail.desired = Some((Box::new(desired), acceptance));
            // What the leader wants now is newer than what it has acknowledged.
            mail.over = false;
        })
    }

    /// Tells that the session ended while the lease had these generations.
    pub fn session_ended(&self, generations: Generations) {
        let _ = self.put(|mail| {
            // What has not been taken yet came in the session that ended.
            if let Some((desired, acceptance @ Acceptance::Expected(_))) = &mut mail.desired {
                let current = generations.of(desired.class());
                *acceptance = if *acceptance == Acceptance::Expected(current) {
                    Acceptance::Firm(current)
                } else {
                    Acceptance::Void
                };
            }
            mail.session_ended.get_or_insert(generations);
        });
    }

    /// Tells that the lease began a new generation.
    pub fn lease_changed(&self) {
        let _ = self.put(|mail| mail.lease_changed = true);
    }

    /// Tells that the leader has the report that the VM is deleted or forgotten.
    pub fn over(&self) {
        let _ = self.put(|mail| mail.over = true);
    }

    /// Waits for mail. Cancel safe. For the one task that owns the mailbox.
    pub async fn take(&self) -> Mail {
        loop {
            let mail = self.try_take();
            if !mail.is_empty() {
                return mail;
            }
            self.shared.filled.notified().await;
        }
    }

    /// Takes what is there, perhaps nothing.
    #[must_use]
    pub fn try_take(&self) -> Mail {
        std::mem::take(&mut self.lock().mail)
    }

    /// Takes only the end of a session, if there was one.
    #[must_use]
    pub fn take_session_ended(&self) -> Option<Generations> {
        self.lock().mail.session_ended.take()
    }

    /// Closes it, unless there is mail.
    #[must_use]
    pub fn close(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.mail.is_empty();
        inner.closed
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::fake::desired;

    const A: Generations = Generations { fast: 1, patient: 1 };
    const B: Generations = Generations { fast: 2, patient: 2 };

    #[tokio::test]
    async fn a_newer_desired_state_replaces_an_older_one() {
        let mailbox = Mailbox::default();
        mailbox.desired(desired(1), Acceptance::Firm(1)).unwrap();
        mailbox.desired(desired(2), Acceptance::Firm(1)).unwrap();
        let mail = mailbox.take().await;
        assert_eq!(mail.desired.unwrap().0.incarnation.0, 2);
    }

    /// P1: a word of a session that ended before the lease was granted is void, even if it was not taken in time.
    #[tokio::test]
    async fn the_end_of_a_session_voids_what_came_in_it() {
        let mailbox = Mailbox::default();
        mailbox.desired(desired(1), Acceptance::Expected(2)).unwrap();
        mailbox.session_ended(A);
        mailbox.session_ended(B);
        let mail = mailbox.take().await;
        assert_eq!(mail.desired.unwrap().1, Acceptance::Void);
        assert_eq!(mail.session_ended, Some(A));

        mailbox.desired(desired(1), Acceptance::Expected(2)).unwrap();
        mailbox.session_ended(B);
        assert_eq!(mailbox.take().await.desired.unwrap().1, Acceptance::Firm(2));
    }

    #[test]
    fn a_mailbox_closes_only_when_it_is_empty() {
        let mailbox = Mailbox::default();
        mailbox.lease_changed();
        assert!(!mailbox.close());
        mailbox.shared.inner.lock().unwrap().mail = Mail::default();
        assert!(mailbox.close());
        assert_eq!(mailbox.desired(desired(1), Acceptance::Void), Err(Closed));
    }
}
