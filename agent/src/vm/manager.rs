//! Knows all VMs of this host: has a task for each, and takes what the leader says to the right one.
//!
//! Called by the session's task, which never waits here: a VM's mailbox is never full.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, error, info, info_span, warn};
use uncloud_proto::ids::{Incarnation, VmId};

use super::{
    desired::Desired,
    hypervisor::Hypervisor,
    mailbox::{Generations, Mailbox},
    runner::{Directory, Host, Runner, chain},
    state::{Acceptance, VmState},
};
use crate::{
    lease::LeaseClass,
    records::{self, Loaded},
};

/// All VMs of this host.
pub struct Manager<H: Hypervisor> {
    host: Host<H>,
    directory: Directory,
    tasks: TaskTracker,
    looking: TaskTracker,
    cancel: CancellationToken,
}

impl<H: Hypervisor> Manager<H> {
    /// No VMs yet. When `cancel` fires, all tasks end and all VMs go on.
    #[must_use]
    pub fn new(host: Host<H>, cancel: CancellationToken) -> Self {
        let directory = Arc::new(Mutex::new(BTreeMap::new()));
        Self { host, directory, tasks: TaskTracker::new(), looking: TaskTracker::new(), cancel }
    }

    /// Takes up every VM that there is a record of; each looks for what executes. Returns the newest incarnation that
    /// was seen for each.
    ///
    /// # Errors
    ///
    /// The directory of the records cannot be read. A record that cannot is reported and stops nothing.
    pub fn adopt_all(&self) -> Result<BTreeMap<VmId, Incarnation>, records::Error> {
        let mut incarnations = BTreeMap::new();
        for (vm, loaded) in self.host.dirs.load()? {
            let state = match loaded {
                Loaded::Record(record) => {
                    incarnations.insert(vm, record.desired.incarnation);
                    VmState::from_record(record)
                }
                Loaded::Missing => {
                    warn!(%vm, "a VM has a directory but no record");
                    VmState::without_record(vm)
                }
                Loaded::Unreadable(problem) => {
                    let problem = chain(&problem);
                    error!(%vm, "the record of a VM is left alone: {problem}");
                    let reason = format!(
                        "its record on this host cannot be used: {problem}; remove that file and restart the agent"
                    );
                    VmState::unreadable(vm, reason)
                }
            };
            let mut directory = self.lock();
            let mailbox = directory.entry(vm).or_default().clone();
            self.spawn(vm, self.runner(vm, state, mailbox).looking(self.looking.token()));
        }
        Ok(incarnations)
    }

    /// Waits until it is known of every VM that was taken up whether it executes.
    pub async fn adopted(&self) {
        self.looking.close();
        self.looking.wait().await;
    }

    /// Takes what a VM should be. The gate has let it pass.
    pub fn desired(&self, vm: VmId, desired: Desired) {
        let acceptance = self.acceptance(desired.class());
        let mut directory = self.lock();
        if let Some(mailbox) = directory.get(&vm)
            && mailbox.desired(desired.clone(), acceptance).is_ok()
        {
            return;
        }
        let mailbox = Mailbox::default();
        mailbox.desired(desired, acceptance).expect("a new mailbox is open");
        directory.insert(vm, mailbox.clone());
        self.spawn(vm, self.runner(vm, VmState::new(vm), mailbox));
    }

    /// P1: to which lease generation a word that comes now is bound.
    fn acceptance(&self, class: LeaseClass) -> Acceptance {
        Acceptance::of(self.host.lease.word(class), self.host.clock.now())
    }

    /// The leases' generations as they are now.
    #[must_use]
    pub fn generations(&self) -> Generations {
        let generation = |class| self.host.lease.word(class).generation;
        Generations { fast: generation(LeaseClass::Fast), patient: generation(LeaseClass::Patient) }
    }

    /// The session ended. To be called before anything of the next one is taken.
    pub fn session_ended(&self) {
        let generations = self.generations();
        for mailbox in self.lock().values() {
            mailbox.session_ended(generations);
        }
    }

    /// The lease began a new generation.
    pub fn lease_changed(&self) {
        for mailbox in self.lock().values() {
            mailbox.lease_changed();
        }
    }

    /// The leader has the report that a VM is deleted or forgotten.
    pub fn over(&self, vm: VmId) {
        if let Some(mailbox) = self.lock().get(&vm) {
            mailbox.over();
        }
    }

    /// The VMs that there are.
    #[must_use]
    pub fn vms(&self) -> Vec<VmId> {
        self.lock().keys().copied().collect()
    }

    /// Whether there is such a VM.
    #[must_use]
    pub fn has(&self, vm: VmId) -> bool {
        self.lock().contains_key(&vm)
    }

    /// What the VMs share.
    #[must_use]
    pub fn host(&self) -> &Host<H> {
        &self.host
    }

    /// Waits until all tasks have ended, after the token has fired.
    pub async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        info!("the VMs' tasks have ended; the VMs go on");
    }

    fn runner(&self, vm: VmId, state: VmState, mailbox: Mailbox) -> Runner<H> {
        Runner::new(vm, state, self.host.clone(), mailbox, Arc::clone(&self.directory))
    }

    fn spawn(&self, vm: VmId, runner: Runner<H>) {
        let span = info_span!(parent: None, "vm", %vm);
        self.tasks.spawn(runner.run(self.cancel.child_token()).instrument(span));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Mailbox>> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
