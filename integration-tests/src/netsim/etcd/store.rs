//! What etcd stores, as a value: keys with all their versions since the last compaction, the log of changes, leases.
//!
//! Pure: no clock, no network. Time comes in as a [`Tick`]; who serves it is `services.rs`. Requests that the model does
//! not know are refused, never half done. That it behaves as etcd does is shown by `tests/etcd_model.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use etcd_client::proto::{
    PbCompare, PbDeleteRequest, PbDeleteResponse, PbEvent, PbKeyValue, PbLeaseGrantRequest, PbPutRequest,
    PbPutResponse, PbRangeRequest, PbRangeResponse, PbResponseHeader, PbResponseOp, PbTargetUnion, PbTxnOpRequest,
    PbTxnOpResponse, PbTxnRequest, PbTxnRequestOp, PbTxnResponse,
};
use tonic::Status;
use uncloud_proto::clock::Tick;

/// etcd's default `max-txn-ops`.
const MAX_OPERATIONS: usize = 128;
/// etcd grants no lease shorter than one and a half of its election timeout, in whole seconds.
const SHORTEST_LEASE_SECONDS: i64 = 2;

// The values of the protocol's enums, whose types etcd-client does not export.
const PUT: i32 = 0;
const DELETE: i32 = 1;
const DESCEND: i32 = 2;

/// Everything that is stored.
#[derive(Debug)]
pub(super) struct Store {
    revision: i64,
    compacted: i64,
    /// By key its versions, oldest first.
    history: BTreeMap<Vec<u8>, Vec<Version>>,
    /// What was changed since the compaction, oldest first.
    log: Vec<PbEvent>,
    leases: BTreeMap<i64, Lease>,
    next_lease: i64,
    /// The quota is reached: nothing that needs room is taken.
    pub(super) full: bool,
}

#[derive(Clone, Debug)]
struct Version {
    revision: i64,
    /// `None`: it was deleted.
    value: Option<PbKeyValue>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    /// Not before this it ends. When it does end is the server's affair.
    deadline: Tick,
    keys: BTreeSet<Vec<u8>>,
}

/// What a watch gets.
#[derive(Debug, PartialEq)]
pub(super) enum Since {
    Events(Vec<PbEvent>),
    Compacted(i64),
}

impl Default for Store {
    fn default() -> Self {
        // As etcd: the first write has revision 2.
        Self {
            revision: 1,
            compacted: 0,
            history: BTreeMap::new(),
            log: Vec::new(),
            leases: BTreeMap::new(),
            next_lease: 7_000,
            full: false,
        }
    }
}

fn matches(key: &[u8], from: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == from,
        [0] => key >= from,
        end => (from..end).contains(&key),
    }
}

impl Store {
    pub(super) fn header(&self) -> PbResponseHeader {
        PbResponseHeader { cluster_id: 1, member_id: 1, revision: self.revision, raft_term: 1 }
    }

    pub(super) const fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn create_revision(&self, key: &[u8]) -> Option<i64> {
        self.current(key).map(|kv| kv.create_revision)
    }

    fn current(&self, key: &[u8]) -> Option<&PbKeyValue> {
        self.history.get(key)?.last()?.value.as_ref()
    }

    fn at<'a>(&'a self, from: &'a [u8], end: &'a [u8], revision: i64) -> impl Iterator<Item = &'a PbKeyValue> {
        self.history
            .range(from.to_vec()..)
            .take_while(move |(key, _)| matches(key, from, end))
            .filter_map(move |(_, versions)| versions.iter().rev().find(|v| v.revision <= revision)?.value.as_ref())
    }

    pub(super) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Status> {
        if request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0
        {
            return Err(Status::unimplemented("the model of etcd filters by no revision"));
        }
        let revision = match request.revision {
            // Within a transaction that includes what it has written so far.
            r if r <= 0 => i64::MAX,
            r if r > self.revision => return Err(future()),
            r if r < self.compacted => return Err(compacted()),
            r => r,
        };
        let mut kvs: Vec<PbKeyValue> = self.at(&request.key, &request.range_end, revision).cloned().collect();
        match request.sort_target {
            0 => {}
            1 => kvs.sort_by_key(|kv| kv.version),
            2 => kvs.sort_by_key(|kv| kv.create_revision),
            3 => kvs.sort_by_key(|kv| kv.mod_revision),
            _ => kvs.sort_by(|a, b| a.value.cmp(&b.value)),
        }
        if request.sort_order == DESCEND {
            kvs.reverse();
        }
        let count = i64::try_from(kvs.len()).unwrap_or(i64::MAX);
        let more = request.limit > 0 && count > request.limit;
        if more {
            kvs.truncate(usize::try_from(request.limit).unwrap_or(usize::MAX));
        }
        if request.count_only {
            kvs.clear();
        }
        if request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value.clear());
        }
        Ok(PbRangeResponse { header: Some(self.header()), kvs, more, count })
    }

    pub(super) fn put(&mut self, request: &PbPutRequest) -> Result<PbPutResponse, Status> {
        self.check_put(request)?;
        let mut answer = self.apply_put(request, self.revision + 1);
        self.revision += 1;
        answer.header = Some(self.header());
        Ok(answer)
    }

    pub(super) fn delete(&mut self, request: &PbDeleteRequest) -> PbDeleteResponse {
        let mut answer = self.apply_delete(request, self.revision + 1);
        if answer.deleted > 0 {
            self.revision += 1;
        }
        answer.header = Some(self.header());
        answer
    }

    /// All of it or nothing.
    pub(super) fn txn(&mut self, request: &PbTxnRequest) -> Result<PbTxnResponse, Status> {
        if request.compare.len() > MAX_OPERATIONS {
            return Err(too_many());
        }
        for branch in [&request.success, &request.failure] {
            check_branch(branch)?;
        }
        let succeeded = request.compare.iter().map(|c| self.holds(c)).collect::<Result<Vec<_>, _>>()?;
        let succeeded = succeeded.into_iter().all(|holds| holds);
        let branch = if succeeded { &request.success } else { &request.failure };
        if request.success.iter().chain(&request.failure).any(is_put) && self.full {
            return Err(full());
        }
        for operation in branch {
            match &operation.request {
                Some(PbTxnOpRequest::RequestPut(put)) => self.check_put(put)?,
                // Only what cannot be answered fails, and then before anything is written.
                Some(PbTxnOpRequest::RequestRange(range)) => drop(self.range(range)?),
                _ => {}
            }
        }
        let revision = self.revision + 1;
        let logged = self.log.len();
        let mut responses = Vec::with_capacity(branch.len());
        for operation in branch {
            let response = match &operation.request {
                Some(PbTxnOpRequest::RequestPut(put)) => PbTxnOpResponse::ResponsePut(self.apply_put(put, revision)),
                Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                    PbTxnOpResponse::ResponseDeleteRange(self.apply_delete(delete, revision))
                }
                Some(PbTxnOpRequest::RequestRange(range)) => PbTxnOpResponse::ResponseRange(self.range(range)?),
                Some(PbTxnOpRequest::RequestTxn(_)) | None => return Err(no_nesting()),
            };
            responses.push(PbResponseOp { response: Some(response) });
        }
        if self.log.len() > logged {
            self.revision = revision;
        }
        Ok(PbTxnResponse { header: Some(self.header()), succeeded, responses })
    }

    fn holds(&self, compare: &PbCompare) -> Result<bool, Status> {
        if !compare.range_end.is_empty() {
            return Err(Status::unimplemented("the model of etcd compares single keys only"));
        }
        let kv = self.current(&compare.key);
        let ordering = match &compare.target_union {
            Some(PbTargetUnion::Version(v)) => kv.map_or(0, |kv| kv.version).cmp(v),
            Some(PbTargetUnion::CreateRevision(v)) => kv.map_or(0, |kv| kv.create_revision).cmp(v),
            Some(PbTargetUnion::ModRevision(v)) => kv.map_or(0, |kv| kv.mod_revision).cmp(v),
            Some(PbTargetUnion::Lease(v)) => kv.map_or(0, |kv| kv.lease).cmp(v),
            // A key that is not there has no value, not even an empty one.
            Some(PbTargetUnion::Value(v)) => match kv {
                Some(kv) => kv.value.cmp(v),
                None => return Ok(false),
            },
            None => return Err(Status::unimplemented("a comparison with nothing")),
        };
        Ok(match compare.result {
            0 => ordering.is_eq(),
            1 => ordering.is_gt(),
            2 => ordering.is_lt(),
            _ => ordering.is_ne(),
        })
    }

    fn check_put(&self, request: &PbPutRequest) -> Result<(), Status> {
        if request.ignore_value || request.ignore_lease {
            return Err(Status::unimplemented("the model of etcd puts whole values only"));
        }
        if request.key.is_empty() {
            return Err(Status::invalid_argument("etcdserver: key is not provided"));
        }
        if self.full {
            return Err(full());
        }
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(no_lease());
        }
        Ok(())
    }

    fn apply_put(&mut self, request: &PbPutRequest, revision: i64) -> PbPutResponse {
        let before = self.current(&request.key).cloned();
        self.detach(before.as_ref());
        if let Some(lease) = self.leases.get_mut(&request.lease) {
            lease.keys.insert(request.key.clone());
        }
        let value = PbKeyValue {
            key: request.key.clone(),
            value: request.value.clone(),
            lease: request.lease,
            create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: before.as_ref().map_or(1, |kv| kv.version + 1),
        };
        self.log.push(PbEvent { r#type: PUT, kv: Some(value.clone()), prev_kv: before.clone() });
        self.history.entry(request.key.clone()).or_default().push(Version { revision, value: Some(value) });
        PbPutResponse { header: None, prev_kv: before.filter(|_| request.prev_kv) }
    }

    fn apply_delete(&mut self, request: &PbDeleteRequest, revision: i64) -> PbDeleteResponse {
        let gone: Vec<PbKeyValue> = self.at(&request.key, &request.range_end, revision).cloned().collect();
        for kv in &gone {
            self.detach(Some(kv));
            let tombstone = PbKeyValue { key: kv.key.clone(), mod_revision: revision, ..PbKeyValue::default() };
            self.log.push(PbEvent { r#type: DELETE, kv: Some(tombstone), prev_kv: Some(kv.clone()) });
            self.history.entry(kv.key.clone()).or_default().push(Version { revision, value: None });
        }
        let deleted = i64::try_from(gone.len()).unwrap_or(i64::MAX);
        PbDeleteResponse { header: None, deleted, prev_kvs: if request.prev_kv { gone } else { Vec::new() } }
    }

    fn detach(&mut self, kv: Option<&PbKeyValue>) {
        if let Some(kv) = kv
            && let Some(lease) = self.leases.get_mut(&kv.lease)
        {
            lease.keys.remove(&kv.key);
        }
    }

    /// Forgets what was before `revision`.
    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Status> {
        if revision <= self.compacted {
            return Err(compacted());
        }
        if revision > self.revision {
            return Err(future());
        }
        self.compacted = revision;
        self.log.retain(|event| event.kv.as_ref().is_some_and(|kv| kv.mod_revision >= revision));
        self.history.retain(|_, versions| {
            let keep = versions.iter().rposition(|v| v.revision <= revision).unwrap_or(0);
            versions.drain(..keep);
            versions.len() > 1 || versions.iter().any(|v| v.value.is_some() || v.revision > revision)
        });
        Ok(())
    }

    /// What a watch from `next` on has missed.
    pub(super) fn since(&self, next: i64, from: &[u8], end: &[u8]) -> Since {
        if next < self.compacted {
            return Since::Compacted(self.compacted);
        }
        let start = self.log.partition_point(|e| e.kv.as_ref().is_some_and(|kv| kv.mod_revision < next));
        let events = self.log[start..].iter();
        Since::Events(events.filter(|e| e.kv.as_ref().is_some_and(|kv| matches(&kv.key, from, end))).cloned().collect())
    }

    /// Returns the lease's id and its TTL in seconds.
    pub(super) fn grant(&mut self, request: &PbLeaseGrantRequest, now: Tick) -> Result<(i64, i64), Status> {
        if self.full {
            return Err(full());
        }
        let id = if request.id == 0 {
            self.next_lease += 1;
            self.next_lease
        } else {
            request.id
        };
        if self.leases.contains_key(&id) {
            return Err(Status::failed_precondition("etcdserver: lease already exists"));
        }
        let seconds = request.ttl.max(SHORTEST_LEASE_SECONDS);
        let ttl = Duration::from_secs(seconds.unsigned_abs());
        self.leases.insert(id, Lease { ttl, deadline: now.after(ttl), keys: BTreeSet::new() });
        Ok((id, seconds))
    }

    /// Returns the TTL in seconds that the lease has again; zero: there is no such lease.
    pub(super) fn keep_alive(&mut self, id: i64, now: Tick) -> i64 {
        self.leases.get_mut(&id).map_or(0, |lease| {
            lease.deadline = now.after(lease.ttl);
            i64::try_from(lease.ttl.as_secs()).unwrap_or(i64::MAX)
        })
    }

    /// The lease's remaining TTL, its granted TTL and its keys.
    pub(super) fn lease(&self, id: i64, now: Tick) -> Option<(Duration, Duration, Vec<Vec<u8>>)> {
        let lease = self.leases.get(&id)?;
        Some((lease.deadline.since(now), lease.ttl, lease.keys.iter().cloned().collect()))
    }

    /// Ends a lease; its keys go, all at one revision.
    pub(super) fn revoke(&mut self, id: i64) -> Result<(), Status> {
        let lease = self.leases.remove(&id).ok_or_else(no_lease)?;
        let revision = self.revision + 1;
        let logged = self.log.len();
        for key in lease.keys {
            self.apply_delete(&PbDeleteRequest { key, ..PbDeleteRequest::default() }, revision);
        }
        if self.log.len() > logged {
            self.revision = revision;
        }
        Ok(())
    }

    /// Those that may end.
    pub(super) fn overdue(&self, now: Tick) -> Vec<i64> {
        self.leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect()
    }

    /// What a new leader of etcd does: every lease has its whole TTL again.
    pub(super) fn restart_leases(&mut self, now: Tick) {
        for lease in self.leases.values_mut() {
            lease.deadline = now.after(lease.ttl);
        }
    }
}

fn is_put(operation: &PbTxnRequestOp) -> bool {
    matches!(operation.request, Some(PbTxnOpRequest::RequestPut(_)))
}

/// etcd takes no transaction that writes one key twice.
fn check_branch(branch: &[PbTxnRequestOp]) -> Result<(), Status> {
    if branch.len() > MAX_OPERATIONS {
        return Err(too_many());
    }
    let mut written: BTreeSet<&[u8]> = BTreeSet::new();
    for operation in branch {
        let fresh = match &operation.request {
            Some(PbTxnOpRequest::RequestPut(put)) => written.insert(&put.key),
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) if delete.range_end.is_empty() => {
                // Deleting twice is allowed, putting and deleting is not.
                !branch.iter().any(|o| matches!(&o.request, Some(PbTxnOpRequest::RequestPut(p)) if p.key == delete.key))
            }
            Some(PbTxnOpRequest::RequestDeleteRange(_)) => {
                return Err(Status::unimplemented("the model of etcd deletes no range in a transaction"));
            }
            Some(PbTxnOpRequest::RequestRange(_)) => true,
            Some(PbTxnOpRequest::RequestTxn(_)) | None => return Err(no_nesting()),
        };
        if !fresh {
            return Err(Status::invalid_argument("etcdserver: duplicate key given in txn request"));
        }
    }
    Ok(())
}

fn no_nesting() -> Status {
    Status::unimplemented("the model of etcd nests no transactions")
}

fn too_many() -> Status {
    Status::invalid_argument("etcdserver: too many operations in txn request")
}

fn no_lease() -> Status {
    Status::not_found("etcdserver: requested lease not found")
}

fn full() -> Status {
    Status::resource_exhausted("etcdserver: mvcc: database space exceeded")
}

fn compacted() -> Status {
    Status::out_of_range("etcdserver: mvcc: required revision has been compacted")
}

fn future() -> Status {
    Status::out_of_range("etcdserver: mvcc: required revision is a future revision")
}
