//! Uploads: the files of an image on their way from a client, through this controller, to an agent that has the pool.
//!
//! The image is stored as UPLOADING before the first byte goes anywhere. So there is no moment at which files lie in a pool and no
//! record speaks of them: whatever dies, the reconciler finds an upload that nobody carries on, and has its files removed. Memory
//! is bounded by the queues; a side that does not read makes the other wait.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use tokio::{sync::mpsc, time};
use tonic::{Status, Streaming};
use uncloud_proto::{
    ids::{HostId, ImageId},
    v1,
};
use uuid::Uuid;

use super::{
    context::Context,
    convert,
    validate::{self, NewImage, NewUpload, Violations},
};
use crate::{
    leadership::{Committed, Leader, Live},
    model::{
        Extra, ImageRecord,
        host::{Pool, PoolAccess},
        image::{ImageFile, ImageState},
    },
    reconcile::images::checked_file,
    sessions::{PIECES, Pipe},
    state::{
        ImageEntry,
        command::{Answer, Arrival, Command, Refusal},
    },
};

/// How long a client may take to say what it sends, and an agent to attach.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may send nothing, or an agent take nothing.
const IDLE: Duration = Duration::from_secs(60);
/// How long an agent may take to check a file that is there: it reads all of it once more.
const CHECK: Duration = Duration::from_mins(30);
/// Bytes that a client may send at once.
const MOST_AT_ONCE: usize = 256 * 1024;
/// Bytes that go to the agent at once, as in a console.
const PIECE: usize = 64 * 1024;

/// Takes an upload.
pub(super) async fn upload(
    context: &Context,
    mut inbound: Streaming<v1::UploadImageRequest>,
) -> Result<v1::Image, Status> {
    let first = time::timeout(ATTACH_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("there was no first message; send `start` at once"))??;
    let new = validate::upload_start(first)?;
    let leader = context.leader()?;
    let context = context.clone();
    // In a task of its own: when the client breaks off, the call is dropped, and somebody must still clean up.
    let task = tokio::spawn(async move { receive(&context, leader, new, inbound).await });
    task.await.map_err(|_| Status::internal("the upload failed in the controller; see its log"))?
}

async fn receive(
    context: &Context,
    leader: Arc<Leader>,
    new: NewUpload,
    inbound: Streaming<v1::UploadImageRequest>,
) -> Result<v1::Image, Status> {
    let NewUpload { image: NewImage { name, kind, files, command_line }, sizes, pool } = new;
    let total = sizes.iter().sum();
    let host = choose(&leader, &pool, total)?;
    let id = ImageId::from_uuid(Uuid::new_v4());
    let files = files.into_iter().zip(&sizes).map(|(file, size)| ImageFile {
        role: file.role,
        source: format!("upload:{pool}"),
        sha256: file.sha256.unwrap_or_default(),
        size_bytes: *size,
        format: file.format,
        virtual_size_bytes: None,
    });
    let record = ImageRecord {
        id,
        name,
        kind,
        files: files.collect(),
        command_line,
        created: leader.clock.wall(),
        state: ImageState::Uploading,
        reason: String::new(),
        extra: Extra::default(),
    };
    // First, so that the reconciler never takes it for one that nobody carries on.
    let _under_way = leader.images.begin_upload(id);
    let command = Command::CreateImage { request: None, image: Box::new(record.clone()) };
    context.submit(&leader, command).await?;
    let mut carrier = Carrier { leader: &leader, id, host, pool, inbound, rest: Bytes::new(), done: 0, total };
    let carried = tokio::select! {
        biased;
        () = leader.cancel.cancelled() => Err(context.term_ended()),
        carried = carrier.carry(&record) => carried,
    };
    match carried {
        Ok(files) => {
            let outcome = Arrival::Complete(files);
            match context.submit(&leader, Command::ImageArrived { image: id, outcome }).await? {
                Committed { answer: Answer::Image(record), revision, .. } => {
                    Ok(convert::image(&ImageEntry { record, revision }))
                }
                Committed { answer: Answer::Done | Answer::Vm(_), .. } => Err(super::vm_service::wrong_answer()),
            }
        }
        Err(status) => {
            let outcome = Arrival::BrokenOff(format!("its upload broke off: {}", convert::line(status.message())));
            // If this is not stored, the reconciler does the same a moment later.
            let _ = leader.writer.submit(Command::ImageArrived { image: id, outcome }).await;
            Err(status)
        }
    }
}

/// A connected host that has the pool, with the most room in it.
fn choose(leader: &Leader, pool: &str, bytes: u64) -> Result<HostId, Status> {
    let with_pool = leader.sessions.connected().into_iter().filter(|&host| {
        let usable = |p: &Pool| {
            // Who has it over the network has no place for a file in it.
            p.name == pool && p.problem.is_empty() && p.access != PoolAccess::Network
        };
        leader.mirror.read(|s| s.host(host).is_some_and(|h| h.record.pools.iter().any(usable)))
    });
    let room = with_pool.filter_map(|host| {
        let facts = leader.sessions.facts(host)?;
        Some((facts.free_bytes.get(pool).copied().unwrap_or(0), host))
    });
    match room.max() {
        None => {
            let message =
                format!("pool: no connected host has a pool `{pool}` that can be used; see `uncloud host list`");
            Err(Refusal::Precondition(message).into())
        }
        Some((free, _)) if free < bytes => {
            let message = format!("pool: `{pool}` has {free} bytes free, and the files have {bytes}; make room");
            Err(Refusal::Precondition(message).into())
        }
        Some((_, host)) => Ok(host),
    }
}

/// The files on their way to one host.
struct Carrier<'a> {
    leader: &'a Leader,
    id: ImageId,
    host: HostId,
    pool: String,
    inbound: Streaming<v1::UploadImageRequest>,
    /// What has come and not gone on yet.
    rest: Bytes,
    done: u64,
    total: u64,
}

impl Carrier<'_> {
    async fn carry(&mut self, record: &ImageRecord) -> Result<Vec<ImageFile>, Status> {
        let mut files = Vec::with_capacity(record.files.len());
        let message = convert::image(&ImageEntry { record: Arc::new(record.clone()), revision: Default::default() });
        for (file, target) in record.files.iter().zip(message.files) {
            let target = v1::UploadTarget {
                image_id: self.id.to_string(),
                image_name: record.name.clone(),
                pool: self.pool.clone(),
                file: Some(target),
            };
            let facts = self.carry_file(file.size_bytes, target).await?;
            files.push(checked_file(file, &facts).map_err(|why| Violations::one("start.files", why))?);
        }
        if !self.rest.is_empty() || self.next().await?.is_some() {
            let problem = "has more bytes than the files in `start`; give each its `size_bytes`";
            return Err(Violations::one("data", problem).into());
        }
        Ok(files)
    }

    async fn carry_file(&mut self, size: u64, target: v1::UploadTarget) -> Result<v1::FileFacts, Status> {
        let (to_user, mut output) = mpsc::channel(PIECES);
        let (input, from_user) = mpsc::channel(PIECES);
        let done = self.leader.cancel.child_token();
        // Whatever ends this, ends the agent's side.
        let _guard = done.clone().drop_guard();
        let order = v1::OpenStream { kind: v1::StreamKind::Upload.into(), upload: Some(target), ..Default::default() };
        let pipe = Pipe { to_user, from_user, done };
        let lost = |e: crate::sessions::AskError| {
            Status::unavailable(format!("the host that takes the files: {e}; try again"))
        };
        let mut waiting = self.leader.sessions.open_stream(self.host, order, pipe).map_err(lost)?;
        time::timeout(ATTACH_TIMEOUT, waiting.attached())
            .await
            .map_err(|_| Status::unavailable("the host did not open the stream in time; try again"))?
            .map_err(lost)?;
        let mut left = size;
        while left > 0 {
            self.show();
            tokio::select! {
                biased;
                // The agent speaks before it has all: it has failed.
                early = output.recv() => return Err(failed_early(early)),
                more = self.fill() => more?,
            }
            let length = PIECE.min(self.rest.len()).min(usize::try_from(left).unwrap_or(PIECE));
            let piece = self.rest.split_to(length);
            left -= length as u64;
            self.done += length as u64;
            tokio::select! {
                biased;
                early = output.recv() => return Err(failed_early(early)),
                sent = time::timeout(IDLE, input.send(piece)) => match sent {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Err(failed_early(output.recv().await)),
                    Err(_) => return Err(Status::unavailable("the host takes nothing any more; try again")),
                },
            }
        }
        self.show();
        match time::timeout(CHECK, output.recv()).await {
            Ok(Some(Ok(facts))) => v1::FileFacts::decode(facts)
                .map_err(|_| Status::internal("the host has answered something that makes no sense")),
            Ok(Some(Err(status))) => Err(status),
            Ok(None) => Err(failed_early(None)),
            Err(_) => Err(Status::deadline_exceeded("the host did not check the file in time")),
        }
    }

    fn show(&self) {
        let live = Live { host: Some(self.host), done: self.done, total: self.total, note: String::new() };
        self.leader.images.show(self.id, live);
    }

    /// Waits until there is something to pass on.
    async fn fill(&mut self) -> Result<(), Status> {
        while self.rest.is_empty() {
            match self.next().await? {
                Some(data) => self.rest = data,
                None => {
                    let problem = format!("ends after {} of {} bytes; send the files whole", self.done, self.total);
                    return Err(Violations::one("data", problem).into());
                }
            }
        }
        Ok(())
    }

    /// The next bytes of the client. `None`: that was all.
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let message = time::timeout(IDLE, self.inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("nothing came for {} s", IDLE.as_secs())))??;
        match message.map(|m| m.message) {
            None => Ok(None),
            Some(Some(v1::upload_image_request::Message::Data(data))) if data.len() > MOST_AT_ONCE => {
                let problem = format!("has {} bytes; send at most {MOST_AT_ONCE} at once", data.len());
                Err(Violations::one("data", problem).into())
            }
            Some(Some(v1::upload_image_request::Message::Data(data))) => Ok(Some(data.into())),
            Some(Some(v1::upload_image_request::Message::Start(_)) | None) => {
                Err(Violations::one("start", "comes once, as the first message; send `data`").into())
            }
        }
    }
}

/// What the agent's end of the stream means when its answer was not due yet.
fn failed_early(early: Option<Result<Bytes, Status>>) -> Status {
    match early {
        Some(Err(status)) => status,
        Some(Ok(_)) => Status::internal("the host has answered before it had all"),
        None => Status::unavailable("the host that takes the files was lost; try again"),
    }
}
