//! One controller process: it stands for election, keeps the leader key alive, and resigns.
//!
//! Mirrors `controller/src/leadership/campaign.rs`, `leadership/leader.rs` (`begin`, `read`, `announce`) and the election loop
//! of `controller/src/app.rs`: the same calls in the same order, with events where those wait. What a leader does is in
//! `lead.rs` and `session.rs`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use uncloud_controller::{
    leadership::Validity,
    model::{Extra, Key, LeaderRecord, Record},
    state::{State, Stored},
};
use uncloud_proto::{
    clock::Tick,
    ids::{ControllerId, Revision, Term},
    v1::session_request,
};

use super::{
    clock::{MS, NodeClock},
    core::Core,
    etcd::{Etcd, Request, Response},
    lead::Lead,
    net::CONTROLLER,
    queue::{Down, What, Whom},
    user::{Answered, Call},
};

// `leadership/campaign.rs`
const TTL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_EVERY: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// `sessions/stream.rs`
const ELECTION_PATIENCE: Duration = Duration::from_secs(1);
const RETRY_AFTER: Duration = Duration::from_millis(500);
// `store/mod.rs`
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// What a request to etcd was for.
#[derive(Clone, Debug)]
enum Tag {
    Look,
    Grant { sent: Tick },
    Claim { sent: Tick, lease: i64, ttl: Duration },
    Load { elected: Elected },
    KeepAlive { serial: u64, sent: Tick },
    Commit { serial: u64, put: Option<Key>, based_on: Revision },
    Landed { serial: u64, based_on: Revision },
    Resign,
    RemoveOwn,
    Nothing,
}

#[derive(Clone, Debug)]
struct Elected {
    serial: u64,
    term: Term,
    lease: i64,
    validity: Validity,
}

/// A controller process, from its start to its end, and the machine that it is on.
#[derive(Debug)]
pub(crate) struct Controller {
    index: usize,
    /// It runs.
    pub(crate) alive: bool,
    /// Faults that stop it.
    pub(crate) paused: u32,
    /// Which of its lives.
    pub(crate) epoch: u64,
    /// Its machine's clock.
    pub(crate) clock: NodeClock,
    id: ControllerId,
    hint: Option<String>,
    rpcs: BTreeMap<u64, Tag>,
    standing: bool,
    /// What agents said that wait until somebody leads.
    waiting: BTreeMap<u64, session_request::Message>,
    lead: Option<Box<Lead>>,
}

/// Where a controller serves.
#[must_use]
pub(crate) fn address(index: usize) -> String {
    format!("controller-{index}:1")
}

/// The controller that serves there.
#[must_use]
pub(crate) fn index_of(address: &str) -> Option<usize> {
    address.strip_prefix("controller-")?.strip_suffix(":1")?.parse().ok()
}

impl Controller {
    /// A controller that is about to be started.
    pub(crate) fn new(core: &mut Core, index: usize) -> Self {
        let rate = core.clock_rate();
        let clock = NodeClock::new(0, core.rng.below(1 << 40), rate);
        Self {
            index,
            alive: false,
            paused: 0,
            epoch: 0,
            clock,
            id: ControllerId::from_uuid(core.rng.uuid()),
            hint: None,
            rpcs: BTreeMap::new(),
            standing: false,
            waiting: BTreeMap::new(),
            lead: None,
        }
    }

    /// Starts the process.
    pub(crate) fn start(&mut self, core: &mut Core) {
        if self.alive {
            return;
        }
        self.alive = true;
        self.epoch += 1;
        self.id = ControllerId::from_uuid(core.rng.uuid());
        (self.hint, self.lead) = (None, None);
        self.rpcs.clear();
        core.log(format_args!("controller {} starts", self.index));
        self.stand(core, 10 * MS);
    }

    /// Kills the process. Its streams break.
    pub(crate) fn kill(&mut self, core: &mut Core) {
        if !self.alive {
            return;
        }
        core.log(format_args!("controller {} dies", self.index));
        self.alive = false;
        self.epoch += 1;
        self.lead = None;
        self.rpcs.clear();
        self.waiting.clear();
        for stream in core.streams_of(CONTROLLER, self.index) {
            core.close(stream, CONTROLLER);
        }
    }

    /// The term that it leads, as far as it knows.
    #[must_use]
    pub(crate) fn lead(&self) -> Option<&Lead> {
        self.lead.as_deref()
    }

    fn me(&self) -> Whom {
        Whom::Controller(self.index)
    }

    fn later(&self, core: &mut Core, delay: Duration, what: What) {
        let at = core.now + self.clock.spans(delay);
        core.at(at, self.me(), self.epoch, what);
    }

    fn stand(&mut self, core: &mut Core, delay: u64) {
        self.standing = true;
        core.after(delay, self.me(), self.epoch, What::Look);
    }

    fn ask(&mut self, core: &mut Core, tag: Tag, timeout: Duration, request: Request) {
        let rpc = core.uid();
        self.rpcs.insert(rpc, tag);
        self.later(core, timeout, What::RpcTimeout(rpc));
        Etcd::send(core, self.index, self.epoch, rpc, request);
    }

    /// Something happens to the process.
    pub(crate) fn on(&mut self, core: &mut Core, what: What) {
        match what {
            What::Look if self.standing => {
                self.standing = false;
                self.ask(core, Tag::Look, REQUEST_TIMEOUT, Request::Leader);
            }
            What::Rpc(rpc, response) => {
                if let Some(tag) = self.rpcs.remove(&rpc) {
                    self.answered(core, tag, Some(response));
                }
            }
            What::RpcTimeout(rpc) => {
                if let Some(tag) = self.rpcs.remove(&rpc) {
                    self.answered(core, tag, None);
                }
            }
            What::KeepAlive(serial) => self.keep_alive(core, serial),
            What::Call(call) => self.call(core, *call),
            What::Up(stream, up) => match &mut self.lead {
                Some(lead) => lead.received(core, &self.clock, stream, up.0),
                // An agent that has lost the only leader that this controller knows of.
                None if core.rng.permille(500) => {
                    self.waiting.insert(stream, up.0);
                    self.later(core, ELECTION_PATIENCE, What::Waited(stream));
                }
                None => self.send_away(core, stream),
            },
            What::Waited(stream) => {
                if self.waiting.remove(&stream).is_some() {
                    self.send_away(core, stream);
                }
            }
            What::Broken(stream) => {
                self.waiting.remove(&stream);
                core.close(stream, CONTROLLER);
                if let Some(lead) = &mut self.lead {
                    lead.gone(core, stream);
                }
            }
            what => {
                if let Some(lead) = &mut self.lead {
                    lead.on(core, &self.clock, what);
                }
            }
        }
        self.check_term(core);
    }

    /// `AgentService::session`: the call fails, or waits in vain.
    fn send_away(&self, core: &mut Core, stream: u64) {
        core.send_down(stream, Down::NotLeader(self.hint.clone()));
        core.close(stream, CONTROLLER);
    }

    /// What the term wants of the process: a transaction, or its end.
    fn check_term(&mut self, core: &mut Core) {
        let Some(lead) = &mut self.lead else { return };
        let serial = lead.serial;
        if let Some((mutations, basis)) = lead.to_commit.take() {
            let put = mutations.iter().find(|m| m.value.is_some()).map(|m| m.key.clone());
            let based_on = lead.based_on();
            let request = Request::Commit(lead.term, mutations, basis);
            self.ask(core, Tag::Commit { serial, put, based_on }, REQUEST_TIMEOUT, request);
            return;
        }
        // `leadership/writer.rs`: a transaction that is under way is waited for, then the key is given up.
        if lead.is_over() && !lead.is_writing() {
            let (term, lease) = (lead.term, lead.lease);
            lead.finish(core);
            self.lead = None;
            core.log(format_args!("controller {} ends term {term}", self.index));
            self.ask(core, Tag::Resign, REQUEST_TIMEOUT, Request::Remove(term));
            self.ask(core, Tag::Nothing, REQUEST_TIMEOUT, Request::Revoke(lease));
        }
    }

    fn answered(&mut self, core: &mut Core, tag: Tag, response: Option<Response>) {
        match (tag, response) {
            (Tag::Look, Some(Response::Leader(Some((record, term))))) => {
                if record.id == self.id {
                    // A term of this very process, which has ended.
                    return self.ask(core, Tag::RemoveOwn, REQUEST_TIMEOUT, Request::Remove(term));
                }
                self.hint = Some(record.address.clone());
                let delay = self.clock.spans(LOOK_EVERY);
                self.stand(core, delay);
            }
            (Tag::Look | Tag::RemoveOwn, Some(Response::Leader(None) | Response::Done)) => {
                let sent = self.clock.tick(core.now);
                self.ask(core, Tag::Grant { sent }, REQUEST_TIMEOUT, Request::Grant(TTL));
            }
            (Tag::Grant { sent }, Some(Response::Granted(lease, ttl))) => {
                let record = LeaderRecord {
                    id: self.id,
                    address: address(self.index),
                    since: core.wall_of(self.index),
                    extra: Extra::new(),
                };
                let request = Request::Claim(Arc::new(record), lease);
                self.ask(core, Tag::Claim { sent, lease, ttl }, REQUEST_TIMEOUT, request);
            }
            (Tag::Claim { sent, lease, ttl }, Some(Response::Won(revision))) => {
                let elected =
                    Elected { serial: core.uid(), term: Term(revision.0), lease, validity: Validity::new(sent, ttl) };
                self.keep_alive_later(core, elected.serial, Duration::ZERO);
                self.ask(core, Tag::Load { elected }, REQUEST_TIMEOUT * 5, Request::Load);
            }
            (Tag::Claim { lease, .. }, Some(Response::Taken)) => {
                self.ask(core, Tag::Nothing, REQUEST_TIMEOUT, Request::Revoke(lease));
                let delay = self.clock.spans(LOOK_EVERY);
                self.stand(core, delay);
            }
            (Tag::Load { elected }, Some(Response::Loaded(entries, revision))) => {
                self.begin(core, elected, entries, revision);
            }
            (Tag::Load { elected }, _) => {
                self.ask(core, Tag::Resign, REQUEST_TIMEOUT, Request::Remove(elected.term));
            }
            (Tag::KeepAlive { serial, sent }, response) => self.kept_alive(core, serial, sent, response.as_ref()),
            // `Store::landed`
            (Tag::Commit { serial, put: Some(key), based_on }, Some(Response::Full)) => {
                self.ask(core, Tag::Landed { serial, based_on }, REQUEST_TIMEOUT, Request::ModRevision(key));
            }
            (Tag::Landed { serial, based_on }, response) => {
                let response = match response {
                    Some(Response::ModRevision(Some(revision))) if revision > based_on => {
                        Some(Response::Written(revision))
                    }
                    Some(Response::ModRevision(_)) => Some(Response::Full),
                    Some(_) | None => None,
                };
                if let Some(lead) = self.lead.as_deref_mut().filter(|l| l.serial == serial) {
                    lead.committed(core, &self.clock, response);
                }
            }
            (Tag::Commit { serial, .. }, response) => {
                if let Some(lead) = self.lead.as_deref_mut().filter(|l| l.serial == serial) {
                    lead.committed(core, &self.clock, response);
                }
            }
            (Tag::Resign, _) => self.stand(core, MS),
            (Tag::Nothing, _) => {}
            // No answer: it stands again after a while.
            (Tag::Look | Tag::RemoveOwn | Tag::Grant { .. } | Tag::Claim { .. }, _) => {
                self.hint = None;
                let delay = self.clock.spans(RETRY_AFTER);
                self.stand(core, delay);
            }
        }
    }

    fn begin(&mut self, core: &mut Core, elected: Elected, entries: Vec<(Key, Record, Revision)>, revision: Revision) {
        // What is stored are bytes.
        let stored = entries
            .into_iter()
            .map(|(key, record, revision)| Stored::read(key.to_string().as_bytes(), &record.to_json(), revision));
        let state = State::of(stored, revision);
        for (key, error) in state.unreadable() {
            core.check.violation(format!("a record cannot be read: {key}: {error}"));
        }
        let Elected { serial, term, lease, validity } = elected;
        let lead = Lead::begin(core, &self.clock, (self.index, self.epoch), (serial, term, lease), validity, state);
        let lead = self.lead.insert(Box::new(lead));
        for (stream, hello) in std::mem::take(&mut self.waiting) {
            lead.received(core, &self.clock, stream, hello);
        }
    }

    fn validity(&self, serial: u64) -> Option<&Validity> {
        let loading = self.rpcs.values().find_map(|tag| match tag {
            Tag::Load { elected } if elected.serial == serial => Some(&elected.validity),
            _ => None,
        });
        loading.or_else(|| self.lead.as_deref().filter(|l| l.serial == serial).map(|l| &l.validity))
    }

    fn keep_alive_later(&self, core: &mut Core, serial: u64, delay: Duration) {
        self.later(core, delay, What::KeepAlive(serial));
    }

    fn lease_of(&self, serial: u64) -> Option<i64> {
        let loading = self.rpcs.values().find_map(|tag| match tag {
            Tag::Load { elected } if elected.serial == serial => Some(elected.lease),
            _ => None,
        });
        loading.or_else(|| self.lead.as_deref().filter(|l| l.serial == serial).map(|l| l.lease))
    }

    fn keep_alive(&mut self, core: &mut Core, serial: u64) {
        let Some(lease) = self.lease_of(serial) else { return };
        let sent = self.clock.tick(core.now);
        self.ask(core, Tag::KeepAlive { serial, sent }, TTL, Request::KeepAlive(lease));
    }

    /// `Campaign::renew`: an answer counts for the keep-alive that it answers, from when that was sent (T1).
    fn kept_alive(&mut self, core: &mut Core, serial: u64, sent: Tick, response: Option<&Response>) {
        let Some(validity) = self.validity(serial) else { return };
        match response {
            Some(Response::Alive(ttl)) if ttl.is_zero() => {
                if let Some(lead) = &mut self.lead {
                    lead.cancel();
                }
                return;
            }
            Some(Response::Alive(ttl)) => validity.extend(sent, *ttl),
            Some(_) | None => {}
        }
        let passed = self.clock.tick(core.now).since(sent);
        self.keep_alive_later(core, serial, KEEP_ALIVE_EVERY.saturating_sub(passed));
    }

    fn call(&mut self, core: &mut Core, call: Call) {
        if let Some(lead) = &mut self.lead
            && lead.serves(core, &self.clock)
        {
            return lead.call(core, call);
        }
        let hint = if self.lead.is_some() { None } else { self.hint.clone() };
        super::user::answer(core, call.op, Answered::NotLeader(hint));
    }
}

impl Controller {
    /// A person says that the silent hosts are really dead.
    pub(crate) fn release_brake(&mut self, core: &mut Core) {
        let now = self.clock.tick(core.now);
        if self.paused == 0
            && let Some(lead) = &mut self.lead
            && lead.serves(core, &self.clock)
        {
            let released = lead.health.release_brake(now);
            core.log(format_args!("user: the brake is released for {released} hosts"));
        }
    }
}
