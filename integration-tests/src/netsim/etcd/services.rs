//! The model's gRPC services. What etcd can do and uncloud never asks for is refused.

use std::{collections::BTreeMap, pin::Pin};

use etcd_client::proto::{
    PbAlarmRequest, PbAlarmResponse, PbCompactionRequest, PbCompactionResponse, PbDefragmentRequest,
    PbDefragmentResponse, PbDeleteRequest, PbDeleteResponse, PbDowngradeRequest, PbDowngradeResponse, PbHashKvRequest,
    PbHashKvResponse, PbHashRequest, PbHashResponse, PbKvService, PbLeaseGrantRequest, PbLeaseGrantResponse,
    PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest, PbLeaseLeasesResponse,
    PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseService, PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
    PbMaintenanceService, PbMoveLeaderRequest, PbMoveLeaderResponse, PbPutRequest, PbPutResponse, PbRangeRequest,
    PbRangeResponse, PbRangeStreamResponse, PbSnapshotRequest, PbSnapshotResponse, PbStatusRequest, PbStatusResponse,
    PbTxnRequest, PbTxnResponse, PbWatchRequest, PbWatchRequestUnion, PbWatchResponse, PbWatchService,
};
use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Etcd, Outcome,
    store::{Since, Store},
};

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers that a watch may be behind.
const WATCH_BACKLOG: usize = 64;

fn unknown<T>(what: &str) -> Result<T, Status> {
    Err(Status::unimplemented(format!("the model of etcd has no {what}")))
}

impl Etcd {
    /// A write, with whatever is to become of it.
    async fn write<T>(&self, change: impl FnOnce(&mut Store) -> Result<T, Status>) -> Result<Response<T>, Status> {
        let outcome = self.faults().outcomes.pop_front().unwrap_or(Outcome::Answered);
        let result = match outcome {
            Outcome::LostAnswerLost => return std::future::pending().await,
            Outcome::Answered | Outcome::AppliedAnswerLost => change(&mut self.store()),
        };
        self.wake();
        match outcome {
            Outcome::Answered => Ok(Response::new(result?)),
            // The client's own time limit ends this.
            Outcome::AppliedAnswerLost | Outcome::LostAnswerLost => std::future::pending().await,
        }
    }
}

#[tonic::async_trait]
impl PbKvService for Etcd {
    async fn range(&self, request: Request<PbRangeRequest>) -> Result<Response<PbRangeResponse>, Status> {
        Ok(Response::new(self.store().range(request.get_ref())?))
    }

    type RangeStreamStream = Out<PbRangeStreamResponse>;

    async fn range_stream(&self, _: Request<PbRangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        unknown("streamed ranges")
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        self.write(|store| store.put(request.get_ref())).await
    }

    async fn delete_range(&self, request: Request<PbDeleteRequest>) -> Result<Response<PbDeleteResponse>, Status> {
        self.write(|store| Ok(store.delete(request.get_ref()))).await
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        self.write(|store| store.txn(request.get_ref())).await
    }

    async fn compact(&self, request: Request<PbCompactionRequest>) -> Result<Response<PbCompactionResponse>, Status> {
        let mut store = self.store();
        store.compact(request.get_ref().revision)?;
        let header = Some(store.header());
        drop(store);
        self.wake();
        Ok(Response::new(PbCompactionResponse { header }))
    }
}

#[tonic::async_trait]
impl PbLeaseService for Etcd {
    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        let now = self.shared.clock.now();
        self.write(|store| {
            let (id, ttl) = store.grant(request.get_ref(), now)?;
            Ok(PbLeaseGrantResponse { header: Some(store.header()), id, ttl, error: String::new() })
        })
        .await
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        self.write(|store| {
            store.revoke(request.get_ref().id)?;
            Ok(PbLeaseRevokeResponse { header: Some(store.header()) })
        })
        .await
    }

    type LeaseKeepAliveStream = Out<PbLeaseKeepAliveResponse>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let etcd = self.clone();
        let answers = request.into_inner().map(move |request| {
            let id = request?.id;
            let now = etcd.shared.clock.now();
            let mut store = etcd.store();
            let ttl = store.keep_alive(id, now);
            Ok(PbLeaseKeepAliveResponse { header: Some(store.header()), id, ttl })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        let PbLeaseTimeToLiveRequest { id, keys: with_keys } = request.into_inner();
        let now = self.shared.clock.now();
        let store = self.store();
        let header = Some(store.header());
        let seconds = |d: std::time::Duration| i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
        Ok(Response::new(match store.lease(id, now) {
            Some((left, granted, keys)) => PbLeaseTimeToLiveResponse {
                header,
                id,
                ttl: seconds(left),
                granted_ttl: seconds(granted),
                keys: if with_keys { keys } else { Vec::new() },
            },
            None => PbLeaseTimeToLiveResponse { header, id, ttl: -1, granted_ttl: 0, keys: Vec::new() },
        }))
    }

    async fn lease_leases(&self, _: Request<PbLeaseLeasesRequest>) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        unknown("list of leases")
    }
}

/// One watch of a stream.
struct Watcher {
    from: Vec<u8>,
    end: Vec<u8>,
    next: i64,
    with_previous: bool,
}

#[tonic::async_trait]
impl PbWatchService for Etcd {
    type WatchStream = Out<PbWatchResponse>;

    async fn watch(&self, request: Request<Streaming<PbWatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (answers, receiver) = mpsc::channel(WATCH_BACKLOG);
        tokio::spawn(watch(self.clone(), request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// One stream of watches. Ends when its client goes.
async fn watch(
    etcd: Etcd,
    mut requests: Streaming<PbWatchRequest>,
    answers: mpsc::Sender<Result<PbWatchResponse, Status>>,
) {
    let mut changed = etcd.shared.changed.subscribe();
    let mut watchers: BTreeMap<i64, Watcher> = BTreeMap::new();
    let mut next_id = 0;
    loop {
        let mut out = Vec::new();
        tokio::select! {
            biased;
            request = requests.next() => {
                let Some(Ok(request)) = request else { return };
                match take(&etcd, request, &mut watchers, &mut next_id) {
                    Ok(answer) => out.extend(answer),
                    Err(status) => {
                        let _ = answers.send(Err(status)).await;
                        return;
                    }
                }
            }
            changed = changed.changed() => {
                if changed.is_err() {
                    return;
                }
                let delay = etcd.faults().watch_delay;
                if !delay.is_zero() {
                    time::sleep(delay).await;
                }
            }
            () = answers.closed() => return,
        }
        tell(&etcd, &mut watchers, &mut out);
        for answer in out {
            if answers.send(Ok(answer)).await.is_err() {
                return;
            }
        }
    }
}

fn take(
    etcd: &Etcd,
    request: PbWatchRequest,
    watchers: &mut BTreeMap<i64, Watcher>,
    next_id: &mut i64,
) -> Result<Option<PbWatchResponse>, Status> {
    let store = etcd.store();
    let header = Some(store.header());
    match request.request_union {
        Some(PbWatchRequestUnion::CreateRequest(create)) => {
            if !create.filters.is_empty() || create.fragment || create.progress_notify || create.watch_id != 0 {
                return unknown("such watches");
            }
            let id = *next_id;
            *next_id += 1;
            let next = if create.start_revision > 0 { create.start_revision } else { store.revision() + 1 };
            let watcher = Watcher { from: create.key, end: create.range_end, next, with_previous: create.prev_kv };
            watchers.insert(id, watcher);
            Ok(Some(PbWatchResponse { header, watch_id: id, created: true, ..PbWatchResponse::default() }))
        }
        Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
            let known = watchers.remove(&cancel.watch_id).is_some();
            Ok(known.then(|| PbWatchResponse {
                header,
                watch_id: cancel.watch_id,
                canceled: true,
                ..PbWatchResponse::default()
            }))
        }
        Some(PbWatchRequestUnion::ProgressRequest(_)) | None => unknown("progress of watches"),
    }
}

/// What has happened since each watch was last told, whole revisions only.
fn tell(etcd: &Etcd, watchers: &mut BTreeMap<i64, Watcher>, out: &mut Vec<PbWatchResponse>) {
    let store = etcd.store();
    let header = Some(store.header());
    watchers.retain(|id, watcher| match store.since(watcher.next, &watcher.from, &watcher.end) {
        Since::Compacted(compact_revision) => {
            let answer = PbWatchResponse {
                header,
                watch_id: *id,
                canceled: true,
                compact_revision,
                ..PbWatchResponse::default()
            };
            out.push(answer);
            false
        }
        Since::Events(mut events) => {
            watcher.next = watcher.next.max(store.revision() + 1);
            if !watcher.with_previous {
                events.iter_mut().for_each(|event| event.prev_kv = None);
            }
            if !events.is_empty() {
                out.push(PbWatchResponse { header, watch_id: *id, events, ..PbWatchResponse::default() });
            }
            true
        }
    });
}

#[tonic::async_trait]
impl PbMaintenanceService for Etcd {
    async fn status(&self, _: Request<PbStatusRequest>) -> Result<Response<PbStatusResponse>, Status> {
        let header = Some(self.store().header());
        Ok(Response::new(PbStatusResponse {
            header,
            version: "3.5.0-model".to_owned(),
            leader: 1,
            ..PbStatusResponse::default()
        }))
    }

    async fn alarm(&self, _: Request<PbAlarmRequest>) -> Result<Response<PbAlarmResponse>, Status> {
        unknown("alarms")
    }

    async fn defragment(&self, _: Request<PbDefragmentRequest>) -> Result<Response<PbDefragmentResponse>, Status> {
        unknown("files")
    }

    async fn hash(&self, _: Request<PbHashRequest>) -> Result<Response<PbHashResponse>, Status> {
        unknown("files")
    }

    async fn hash_kv(&self, _: Request<PbHashKvRequest>) -> Result<Response<PbHashKvResponse>, Status> {
        unknown("files")
    }

    type SnapshotStream = Out<PbSnapshotResponse>;

    async fn snapshot(&self, _: Request<PbSnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        unknown("files")
    }

    async fn move_leader(&self, _: Request<PbMoveLeaderRequest>) -> Result<Response<PbMoveLeaderResponse>, Status> {
        unknown("other members")
    }

    async fn downgrade(&self, _: Request<PbDowngradeRequest>) -> Result<Response<PbDowngradeResponse>, Status> {
        unknown("other versions")
    }
}
