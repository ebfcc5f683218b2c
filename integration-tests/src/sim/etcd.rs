//! etcd: one order of transactions, leases that are minimum times, answers that get lost.
//!
//! A request is carried out when it arrives, whole or not at all. Whether it arrives, and whether its answer does, is the
//! network's business ([`Link`]). It loses nothing: that etcd keeps what it has acknowledged is assumed (A4).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use uncloud_controller::{
    model::{Key, LeaderRecord, Record},
    state::command::Mutation,
};
use uncloud_proto::ids::{Revision, Term};

use super::{
    clock::{MS, NodeClock, Ns},
    core::Core,
    queue::{What, Whom},
};

/// What a controller asks.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// Who leads?
    Leader,
    /// A lease.
    Grant(Duration),
    /// Creates the leader key, if nobody has it.
    Claim(Arc<LeaderRecord>, i64),
    /// Deletes the leader key, if it was created at this revision.
    Remove(Term),
    /// Ends a lease.
    Revoke(i64),
    /// Keeps a lease alive.
    KeepAlive(i64),
    /// Everything.
    Load,
    /// Writes, if the leader key was created at this revision.
    Commit(Term, Vec<Mutation>, Basis),
    /// When a key was last put.
    ModRevision(Key),
}

/// What a leader took a VM's record to be when it decided: for the checker only.
pub(crate) type Basis = Vec<(Key, Option<Record>)>;

/// What etcd answers.
#[derive(Clone, Debug)]
pub(crate) enum Response {
    /// The leader key, and when it was created.
    Leader(Option<(Arc<LeaderRecord>, Term)>),
    /// A lease, with its TTL.
    Granted(i64, Duration),
    /// The leader key was created at this revision.
    Won(Revision),
    /// Somebody has it.
    Taken,
    /// Done, or nothing to do.
    Done,
    /// The lease has this long; zero: it is gone.
    Alive(Duration),
    /// All records.
    Loaded(Vec<(Key, Record, Revision)>, Revision),
    /// Written at this revision.
    Written(Revision),
    /// Another leads.
    Deposed,
    /// It has reached its quota.
    Full,
    /// When a key was last put, if it is there.
    ModRevision(Option<Revision>),
}

#[derive(Clone, Debug)]
struct Lease {
    ttl: Duration,
    /// On etcd's clock, when it may go.
    until: uncloud_proto::clock::Tick,
}

/// How a controller reaches it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    /// Requests are lost.
    pub(crate) cut_up: u32,
    /// Answers are lost.
    pub(crate) cut_down: u32,
}

/// The store.
#[derive(Debug)]
pub(crate) struct Etcd {
    /// Its clock.
    pub(crate) clock: NodeClock,
    /// Faults that keep it down.
    pub(crate) down: u32,
    /// Faults that stop it.
    pub(crate) paused: u32,
    /// Faults that keep it full.
    pub(crate) full: u32,
    /// Each answer may take this much longer.
    pub(crate) slow: Ns,
    /// To each controller.
    pub(crate) links: Vec<Link>,
    revision: i64,
    /// Value, create revision, mod revision.
    kv: BTreeMap<Key, (Record, i64, i64)>,
    /// Events, of which only the revision is of interest.
    events: BTreeMap<Key, i64>,
    leader_lease: i64,
    leases: BTreeMap<i64, Lease>,
    last_lease: i64,
}

impl Etcd {
    /// Empty.
    pub(crate) fn new(core: &mut Core) -> Self {
        let rate = core.clock_rate();
        let clock = NodeClock::new(0, core.rng.below(1 << 40), rate);
        core.after(100 * MS, Whom::Etcd, 0, What::Expire);
        Self {
            clock,
            down: 0,
            paused: 0,
            full: 0,
            slow: 0,
            links: vec![Link::default(); core.config.controllers],
            revision: 1,
            kv: BTreeMap::new(),
            events: BTreeMap::new(),
            leader_lease: 0,
            leases: BTreeMap::new(),
            last_lease: 0,
        }
    }

    /// What is stored under a key.
    #[must_use]
    pub(crate) fn get(&self, key: &Key) -> Option<&Record> {
        self.kv.get(key).map(|(record, ..)| record)
    }

    /// All keys.
    pub(crate) fn records(&self) -> impl Iterator<Item = (&Key, &Record)> {
        self.kv.iter().map(|(key, (record, ..))| (key, record))
    }

    /// A controller sends a request. It arrives, or not.
    pub(crate) fn send(core: &mut Core, from: usize, epoch: u64, rpc: u64, request: Request) {
        let delay = core.rng.range(MS / 5, 4 * MS);
        core.after(delay, Whom::Etcd, 0, What::Request(from, epoch, rpc, Box::new(request)));
    }

    /// A request arrives.
    pub(crate) fn request(&mut self, core: &mut Core, from: usize, epoch: u64, rpc: u64, request: Request) {
        let loss = if core.healed { 0 } else { core.config.rpc_loss };
        if self.down > 0 || self.links[from].cut_up > 0 {
            return;
        }
        if core.rng.permille(loss) {
            core.stats.fault("etcd request lost");
            core.log(format_args!("etcd: a request of controller {from} is lost"));
            return;
        }
        if core.rng.permille(loss / 2) {
            // Held up on its way, perhaps for longer than anybody waits, and carried out then.
            core.stats.fault("etcd request late");
            let delay = core.between(500, 6000);
            core.log(format_args!("etcd: a request of controller {from} is held up for {} ms", delay / MS));
            core.after(delay, Whom::Etcd, 0, What::Request(from, epoch, rpc, Box::new(request)));
            return;
        }
        let response = self.carry_out(core, from, request);
        if core.rng.permille(loss) || self.links[from].cut_down > 0 {
            core.stats.fault("etcd answer lost");
            core.log(format_args!("etcd: an answer to controller {from} is lost"));
            return;
        }
        let mut delay = core.rng.range(MS / 5, 6 * MS);
        if self.slow > 0 {
            delay += core.rng.below(self.slow);
        }
        core.after(delay, Whom::Controller(from), epoch, What::Rpc(rpc, response));
    }

    fn carry_out(&mut self, core: &mut Core, from: usize, request: Request) -> Response {
        let now = self.clock.tick(core.now);
        match request {
            Request::Leader => Response::Leader(self.leader()),
            // As etcd does: nothing new is put, and no lease is granted. What stands is kept alive.
            Request::Grant(_) | Request::Claim(..) if self.full > 0 => Response::Full,
            Request::Grant(ttl) => {
                self.last_lease += 1;
                self.leases.insert(self.last_lease, Lease { ttl, until: now.after(ttl) });
                Response::Granted(self.last_lease, ttl)
            }
            Request::Claim(record, lease) => {
                if self.kv.contains_key(&Key::Leader) || !self.leases.contains_key(&lease) {
                    return Response::Taken;
                }
                self.revision += 1;
                let revision = self.revision;
                self.leader_lease = lease;
                self.kv.insert(Key::Leader, (Record::Leader(record), revision, revision));
                core.log(format_args!("etcd: controller {from} leads, term {revision}"));
                core.check.elected(Term(revision));
                core.stats.elections += 1;
                Response::Won(Revision(revision))
            }
            Request::Remove(term) => {
                if self.leader().is_some_and(|(_, t)| t == term) {
                    self.remove_leader(core, "given up");
                }
                Response::Done
            }
            Request::Revoke(lease) => {
                self.end_lease(core, lease);
                Response::Done
            }
            Request::KeepAlive(lease) => match self.leases.get_mut(&lease) {
                Some(lease) => {
                    lease.until = lease.until.max(now.after(lease.ttl));
                    Response::Alive(lease.ttl)
                }
                None => Response::Alive(Duration::ZERO),
            },
            Request::Load => {
                let all = self.kv.iter().map(|(k, (r, _, m))| (k.clone(), r.clone(), Revision(*m))).collect();
                Response::Loaded(all, Revision(self.revision))
            }
            Request::Commit(term, mutations, basis) if self.full > 0 && mutations.iter().any(|m| m.value.is_some()) => {
                // It also says so when it has carried out the transaction with which the quota was reached.
                if core.rng.permille(250) {
                    self.commit(core, from, term, mutations, &basis);
                }
                Response::Full
            }
            Request::Commit(term, mutations, basis) => self.commit(core, from, term, mutations, &basis),
            Request::ModRevision(key) => {
                let found =
                    self.events.get(&key).copied().or_else(|| self.kv.get(&key).map(|(_, _, modified)| *modified));
                Response::ModRevision(found.map(Revision))
            }
        }
    }

    fn commit(
        &mut self,
        core: &mut Core,
        from: usize,
        term: Term,
        mutations: Vec<Mutation>,
        basis: &Basis,
    ) -> Response {
        if self.leader().is_none_or(|(_, t)| t != term) {
            core.log(format_args!("etcd: a write of term {term} is refused"));
            return Response::Deposed;
        }
        self.revision += 1;
        let revision = self.revision;
        core.stats.commits += 1;
        for (key, believed) in basis {
            if self.get(key) != believed.as_ref() {
                core.check.violation(format!(
                    "P2: controller {from} (term {term}) writes {key} on the basis of a record that is not etcd's"
                ));
            }
        }
        for mutation in mutations {
            let Mutation { key, value } = mutation;
            if matches!(key, Key::Event { .. }) {
                self.events.insert(key, revision);
                continue; // nobody reads them here
            }
            core.stored(from, &key, self.get(&key), value.as_ref(), revision);
            match value {
                Some(record) => {
                    let created = self.kv.get(&key).map_or(revision, |(_, created, _)| *created);
                    self.kv.insert(key, (record, created, revision));
                }
                None => {
                    self.kv.remove(&key);
                }
            }
        }
        Response::Written(Revision(revision))
    }

    fn leader(&self) -> Option<(Arc<LeaderRecord>, Term)> {
        match self.kv.get(&Key::Leader) {
            Some((Record::Leader(record), created, _)) => Some((record.clone(), Term(*created))),
            Some(_) | None => None,
        }
    }

    fn remove_leader(&mut self, core: &mut Core, why: &str) {
        self.revision += 1;
        self.kv.remove(&Key::Leader);
        core.log(format_args!("etcd: the leader key is gone: {why}"));
    }

    fn end_lease(&mut self, core: &mut Core, id: i64) {
        if self.leases.remove(&id).is_some() && id == self.leader_lease && self.kv.contains_key(&Key::Leader) {
            self.remove_leader(core, "its lease ended");
        }
    }

    /// Looks for leases that have run out. etcd may take its time, but no lease ends early (A4).
    pub(crate) fn expire(&mut self, core: &mut Core) {
        if self.down == 0 {
            let now = self.clock.tick(core.now);
            let over: Vec<i64> = self.leases.iter().filter(|(_, l)| now >= l.until).map(|(id, _)| *id).collect();
            for id in over {
                self.end_lease(core, id);
            }
        }
        let delay = core.between(1, 200);
        core.after(delay, Whom::Etcd, 0, What::Expire);
    }

    /// etcd has a new leader, or was started again: every lease begins anew.
    pub(crate) fn restart_leases(&mut self, now: Ns) {
        let now = self.clock.tick(now);
        for lease in self.leases.values_mut() {
            lease.until = lease.until.max(now.after(lease.ttl));
        }
    }
}
