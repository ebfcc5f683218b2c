//! What is still to happen, in the order of true time. Of two things at one moment, the one that was put in first comes
//! first.

use std::{collections::BTreeMap, path::PathBuf};

use uncloud_agent::{lease::LeaseClass, records::Role, vm::state::Event as VmEvent};
use uncloud_controller::leadership::WriteError;
use uncloud_proto::{
    clock::Tick,
    ids::{Incarnation, VmId},
    v1,
};

use super::{
    clock::Ns,
    etcd::{Request, Response},
    faults::Healing,
    migrate::Wire,
    storage::{Copying, Open},
    user::{Answered, Call},
};

/// Who something happens to. A process that is stopped gets it when it goes on; one that has died since (`epoch`), never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whom {
    /// A controller.
    Controller(usize),
    /// The agent of a host.
    Agent(usize),
    /// The keeper of a QEMU on a host.
    Keeper(usize, VmId, u64),
    /// The kernel of a host: never stopped, ends when its power is cut.
    Kernel(usize),
    /// etcd.
    Etcd,
    /// The user's client.
    User,
    /// The world itself: faults and the network.
    World,
}

/// What is sent on an agent's stream, up.
#[derive(Clone, Debug)]
pub(crate) struct Up(pub(crate) v1::session_request::Message);

/// What is sent on an agent's stream, down.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    /// A message of the session.
    Response(Box<v1::SessionResponse>),
    /// The call fails: this controller does not lead.
    NotLeader(Option<String>),
}

/// What happens.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A controller stands for election.
    Look,
    /// It keeps its leader key alive.
    KeepAlive(u64),
    /// It looks whether its leadership still holds.
    Watch(u64),
    /// The reconciler looks at health.
    DriverTick(u64),
    /// Something was committed.
    DriverWake(u64),
    /// The writer has work.
    WriterWake(u64),
    /// Something was committed that a session may want to know.
    SessionWake(u64),
    /// A session tries again to store what there was no room for.
    SessionAgain(u64),
    /// etcd answers.
    Rpc(u64, Response),
    /// etcd has not answered in time.
    RpcTimeout(u64),
    /// An agent has waited at a controller until somebody leads.
    Waited(u64),
    /// A user's call arrives.
    Call(Box<Call>),
    /// A message of an agent arrives.
    Up(u64, Box<Up>),
    /// A stream is found to be broken, at this end.
    Broken(u64),

    /// A request of a controller arrives at etcd: which controller, in which life, which request.
    Request(usize, u64, u64, Box<Request>),
    /// etcd looks for leases that have run out.
    Expire,

    /// The agent dials.
    Dial,
    /// A heartbeat is due in this session.
    Beat(u64),
    /// The controller has not answered Hello in time.
    WelcomeTimeout(u64),
    /// The leader has been silent for too long.
    Silent(u64),
    /// A message of a controller arrives.
    Down(u64, Box<Down>),
    /// There may be reports to send.
    Flush(u64),
    /// A renewal is written that was held up after the clock had been read.
    Renew(LeaseClass, Tick, Tick),
    /// A VM's task has mail.
    Mail(VmId),
    /// A VM's task has waited long enough.
    Timer(VmId),
    /// A VM's work is done.
    Done(VmId, u64, Box<VmEvent>, Option<u64>),
    /// Something happened to a QEMU that the agent watches.
    Instance(VmId, u64, Box<VmEvent>),
    /// The session waits no longer for VMs that have not been found.
    Patience,

    /// Disks have been made, or deleted.
    Disks(VmId, u64, u64, DiskWork),
    /// A keeper process begins.
    Spawn(Box<Start>),
    /// A keeper checks the lease and arms its timer.
    Arm(Box<Start>),
    /// QEMU begins to execute.
    Execute(Box<Start>),
    /// QEMU answers on QMP.
    Ready(Box<Start>),
    /// A keeper looks at the lease.
    Follow,
    /// A kernel timer is due.
    Deadline(VmId, u64, Tick),
    /// Keeper and QEMU are dead.
    Dead(VmId, u64, Death),
    /// Something comes to a QEMU that has to do with a migration.
    Wire(VmId, u64, Wire),
    /// A guest does something by itself.
    Guest(VmId, u64, GuestAct),

    /// The user does the next thing.
    UserNext,
    /// An answer to the user.
    Answer(u64, Box<Answered>),
    /// The user gives a call up.
    UserTimeout(u64),

    /// The next fault.
    Fault,
    /// A fault ends.
    Heal(Healing),
    /// An end of a stream has heard nothing for a while: the agent's (0), the controller's (1).
    Silence(u64, usize),
}

/// Work on disks.
#[derive(Clone, Debug)]
pub(crate) enum DiskWork {
    /// Makes those that are missing.
    Make(Box<uncloud_agent::vm::desired::Desired>),
    /// These have been copied, and get their names.
    Copied(Box<uncloud_agent::vm::desired::Desired>, Vec<Copying>),
    /// Deletes files of disks that are to go.
    Drop(Vec<PathBuf>),
    /// Deletes all.
    Delete(Box<uncloud_agent::vm::desired::Desired>),
    /// Takes and removes snapshots, and puts them back.
    Tend(Box<uncloud_agent::vm::desired::Desired>),
    /// None: looks for what executes.
    Adopt,
}

/// A start of QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    /// Which VM.
    pub(crate) vm: VmId,
    /// This start, unique in the run.
    pub(crate) uid: u64,
    /// For which life of the agent, and which work of it.
    pub(crate) agent: (u64, u64),
    /// The incarnation.
    pub(crate) incarnation: Incarnation,
    /// The lease generation.
    pub(crate) generation: u16,
    /// The class.
    pub(crate) class: LeaseClass,
    /// The disks that the machine has.
    pub(crate) disks: Vec<Open>,
    /// It waits for a guest from another host.
    pub(crate) role: Role,
}

/// How keeper and QEMU died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// At the lease's deadline.
    Deadline,
    /// The agent killed QEMU.
    Killed,
    /// QEMU ended with this status.
    Exited(i32),
    /// Somebody killed the keeper.
    KeeperKilled,
}

/// What a guest does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestAct {
    /// It powers itself off.
    PowerOff,
    /// It was asked to power down and does.
    Obey,
    /// It panics.
    Panic,
    /// QEMU dies.
    Crash,
    /// It writes to its disks, and goes on.
    Write,
}

/// What a command of a user, or of anybody, came to.
pub(crate) type Written = Result<uncloud_controller::leadership::Committed, WriteError>;

/// One entry.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// To whom.
    pub(crate) whom: Whom,
    /// In which of its lives.
    pub(crate) epoch: u64,
    /// What.
    pub(crate) what: What,
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    entries: BTreeMap<(Ns, u64), Event>,
    last: u64,
}

impl Queue {
    /// Adds an entry.
    pub(crate) fn push(&mut self, at: Ns, event: Event) {
        self.last += 1;
        self.entries.insert((at, self.last), event);
    }

    /// The next entry, not after `limit`.
    pub(crate) fn pop(&mut self, limit: Ns) -> Option<(Ns, Event)> {
        let entry = self.entries.first_entry()?;
        if entry.key().0 > limit {
            return None;
        }
        let ((at, _), event) = entry.remove_entry();
        Some((at, event))
    }
}

impl Queue {
    /// Takes out everything that ends a fault.
    pub(crate) fn healings(&mut self) -> Vec<Healing> {
        let due: Vec<((Ns, u64), Healing)> = self
            .entries
            .iter()
            .filter_map(|(at, event)| match event.what {
                What::Heal(healing) => Some((*at, healing)),
                _ => None,
            })
            .collect();
        due.into_iter()
            .map(|(at, healing)| {
                self.entries.remove(&at);
                healing
            })
            .collect()
    }
}
