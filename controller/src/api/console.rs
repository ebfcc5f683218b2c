//! Consoles, logs and screens: a stream of bytes between a client and an agent, through this controller.
//!
//! The leader asks the agent over its session (`OpenStream`), the agent calls `AttachStream`, and the two streams are
//! joined. Nothing is stored here. Queues are bounded in both directions, and a side that does not read makes the other
//! wait: towards the guest the client's typing waits; from the guest the agent waits, whose console drops output that a
//! reader does not take. Each stream ends when either side ends, or with the term.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, Streaming};
use uncloud_proto::{
    ids::{HostId, VmId},
    v1,
};

use super::{
    context::Context,
    validate::{self, LogTarget, VmRef},
};
use crate::{
    leadership::Leader,
    sessions::{AskError, PIECES, Pipe},
    state::State,
};

/// How long a client may take to say whose console it wants, and an agent to attach.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens a console.
pub(super) async fn console(
    context: &Context,
    mut inbound: Streaming<v1::ConsoleRequest>,
) -> Result<impl Stream<Item = Result<v1::ConsoleResponse, Status>> + Send + use<>, Status> {
    let first = time::timeout(ATTACH_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("there was no first message; send `open` with the VM at once"))??;
    let target = validate::console_open(first)?;
    let request = v1::OpenStream {
        kind: v1::StreamKind::Console.into(),
        history_bytes: target.history_bytes,
        follow: true,
        ..Default::default()
    };
    let (joined, input, done) = join(context, &target.vm, request).await?;
    let typed = inbound.map(|message| Ok(validate::console_input(message?)?));
    tokio::spawn(type_in(typed, input, done, joined.sender.clone(), HalfClose::GoesOnReading));
    Ok(joined.map(|piece| piece.map(|output| v1::ConsoleResponse { output: output.into() })))
}

/// Opens a VNC connection.
pub(super) async fn vnc(
    context: &Context,
    mut inbound: Streaming<v1::VncRequest>,
) -> Result<impl Stream<Item = Result<v1::VncResponse, Status>> + Send + use<>, Status> {
    let first = time::timeout(ATTACH_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("there was no first message; send `open` with the VM at once"))??;
    let vm = validate::vnc_open(first)?;
    let request = v1::OpenStream { kind: v1::StreamKind::Vnc.into(), ..Default::default() };
    let (joined, input, done) = join(context, &vm, request).await?;
    let sent = inbound.map(|message| Ok(validate::vnc_data(message?)?));
    tokio::spawn(type_in(sent, input, done, joined.sender.clone(), HalfClose::Ends));
    Ok(joined.map(|piece| piece.map(|data| v1::VncResponse { data: data.into() })))
}

/// Takes a screenshot.
pub(super) async fn screenshot(
    context: &Context,
    vm: &VmRef,
) -> Result<impl Stream<Item = Result<v1::ScreenshotResponse, Status>> + Send + use<>, Status> {
    let request = v1::OpenStream { kind: v1::StreamKind::Screenshot.into(), ..Default::default() };
    let joined = listen(context, vm, request).await?;
    Ok(joined.map(|piece| piece.map(|data| v1::ScreenshotResponse { data: data.into() })))
}

/// Opens a log.
pub(super) async fn log(
    context: &Context,
    target: LogTarget,
) -> Result<impl Stream<Item = Result<v1::GetVmLogResponse, Status>> + Send + use<>, Status> {
    let request = v1::OpenStream {
        kind: v1::StreamKind::Log.into(),
        history_bytes: target.tail_bytes,
        follow: target.follow,
        ..Default::default()
    };
    let joined = listen(context, &target.vm, request).await?;
    Ok(joined.map(|piece| piece.map(|data| v1::GetVmLogResponse { data: data.into() })))
}

/// A stream into which nothing is ever typed. The agent's side stays open until it ends.
async fn listen(context: &Context, vm: &VmRef, request: v1::OpenStream) -> Result<Joined, Status> {
    let (joined, input, done) = join(context, vm, request).await?;
    tokio::spawn(async move {
        done.cancelled().await;
        drop(input);
    });
    Ok(joined)
}

/// What the client receives. Dropped with the client's stream, it ends the agent's.
struct Joined {
    output: ReceiverStream<Result<Bytes, Status>>,
    sender: mpsc::WeakSender<Result<Bytes, Status>>,
    _ends_with_it: DropGuard,
}

impl Stream for Joined {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.output).poll_next(cx)
    }
}

/// Asks the VM's host for a stream, and waits until it is there.
async fn join(
    context: &Context,
    vm: &VmRef,
    mut request: v1::OpenStream,
) -> Result<(Joined, mpsc::Sender<Bytes>, CancellationToken), Status> {
    let leader = context.leader()?;
    let host = find(context, vm, &mut request).await?;
    let (to_user, output) = mpsc::channel(PIECES);
    let (input, from_user) = mpsc::channel(PIECES);
    let done = leader.cancel.child_token();
    let joined = Joined {
        output: ReceiverStream::new(output),
        sender: to_user.downgrade(),
        _ends_with_it: done.clone().drop_guard(),
    };
    let pipe = Pipe { to_user, from_user, done: done.clone() };
    let mut waiting = leader.sessions.open_stream(host.id, request, pipe).map_err(|e| unreachable_host(&host, e))?;
    match time::timeout(ATTACH_TIMEOUT, waiting.attached()).await {
        Ok(Ok(())) => Ok((joined, input, done)),
        Ok(Err(error)) => Err(unreachable_host(&host, error)),
        Err(_) => {
            let limit = ATTACH_TIMEOUT.as_secs();
            let message = format!("host {} did not open the stream within {limit} s; try again", host.name);
            Err(Status::unavailable(message))
        }
    }
}

struct Where {
    id: HostId,
    name: String,
}

/// Which host has the VM.
async fn find(context: &Context, vm: &VmRef, request: &mut v1::OpenStream) -> Result<Where, Status> {
    let read = |_: &Leader, state: &State| {
        let id: VmId = state.resolve_vm(&vm.vm, &vm.owner)?;
        request.vm_id = id.to_string();
        let host = state.vm(id).and_then(|entry| entry.record.placement.host);
        let Some(host) = host else {
            let message = "the VM has no host, so there is nothing to look at; `explain` says why";
            return Err(crate::state::command::Refusal::Precondition(message.to_owned()).into());
        };
        let name = state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone());
        Ok(Where { id: host, name })
    };
    context.read(read).await
}

fn unreachable_host(host: &Where, error: AskError) -> Status {
    let name = &host.name;
    match error {
        AskError::NotConnected => Status::unavailable(format!(
            "host {name}, which has the VM, is not connected; try again when it is back or the VM has been moved"
        )),
        AskError::Busy => Status::unavailable(format!("host {name} does not take requests fast enough; try again")),
    }
}

/// What a client means that closes its side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HalfClose {
    /// It has typed all that it wants to type, and looks on.
    GoesOnReading,
    /// It has gone.
    Ends,
}

/// Passes on what the client sends. An error of `inbound` is what is wrong with it, or that the client has gone.
async fn type_in(
    mut inbound: impl Stream<Item = Result<Vec<u8>, Status>> + Unpin,
    input: mpsc::Sender<Bytes>,
    done: CancellationToken,
    output: mpsc::WeakSender<Result<Bytes, Status>>,
    half_close: HalfClose,
) {
    let typing = async {
        loop {
            match inbound.next().await {
                Some(Ok(bytes)) => {
                    if input.send(bytes.into()).await.is_err() {
                        return; // the agent has gone, and `done` says so
                    }
                }
                Some(Err(status)) => {
                    if let Some(output) = output.upgrade() {
                        // If it is full the stream just ends.
                        let _ = output.try_send(Err(status));
                    }
                    done.cancel();
                    return;
                }
                None => {
                    if half_close == HalfClose::Ends {
                        done.cancel();
                    }
                    return;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = done.cancelled() => return,
        () = typing => {}
    }
    // The agent's side stays open: its end would close the console.
    done.cancelled().await;
    drop(input);
}

/// The agent's side, in `AttachStream`: passes on what the guest writes. Returns what the agent receives.
pub(super) fn attach(
    context: Context,
    leader: Arc<Leader>,
    pipe: Pipe,
    inbound: Streaming<v1::AttachStreamRequest>,
) -> impl Stream<Item = Result<v1::AttachStreamResponse, Status>> + Send + use<> {
    let Pipe { to_user, from_user, done } = pipe;
    tokio::spawn(async move {
        let last = tokio::select! {
            biased;
            () = done.cancelled() => leader.cancel.is_cancelled().then(|| context.term_ended()),
            last = pass_on(inbound, &to_user) => last,
        };
        if let Some(status) = last {
            // If the client takes nothing any more, it sees the end and not the reason.
            drop(time::timeout(Duration::from_secs(5), to_user.send(Err(status))).await);
        }
        done.cancel();
    });
    ReceiverStream::new(from_user).map(|data: Bytes| Ok(v1::AttachStreamResponse { data: data.into() }))
}

/// Passes output on until it ends. Returns what went wrong.
async fn pass_on(
    mut inbound: Streaming<v1::AttachStreamRequest>,
    to_user: &mpsc::Sender<Result<Bytes, Status>>,
) -> Option<Status> {
    use v1::attach_stream_request::Message;
    loop {
        match inbound.message().await {
            Ok(Some(v1::AttachStreamRequest { message: Some(Message::Data(data)) })) => {
                if to_user.send(Ok(data.into())).await.is_err() {
                    return None;
                }
            }
            Ok(Some(v1::AttachStreamRequest { message: Some(Message::Error(words)) })) => {
                return Some(Status::failed_precondition(words));
            }
            // A second Attach means nothing, and neither does what a newer agent says.
            Ok(Some(v1::AttachStreamRequest { message: Some(Message::Attach(_)) | None })) => {}
            Ok(None) => return None,
            Err(_) => return Some(Status::unavailable("the host's connection was lost; try again")),
        }
    }
}
