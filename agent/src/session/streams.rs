//! Consoles, logs and screens: streams of bytes that the leader asks for, each an RPC of its own on the session's connection.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Semaphore, mpsc},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use tracing::debug;
use uncloud_proto::{
    ids::{HostId, VmId},
    v1::{
        self, AttachStreamRequest, AttachStreamResponse, FileProblemKind, OpenStream, StreamKind,
        agent_service_client::AgentServiceClient, attach_stream_request::Message,
    },
};

use crate::{
    qemu::{
        console::{self, Console},
        screen,
    },
    records::VmDirs,
    storage::{
        blocking,
        http::Sink,
        images::{Images, to_fetch},
        pools,
        source::problem,
        writing::Feed,
    },
    vm::runner::chain,
};

/// So many streams are open at once.
const MOST: usize = 64;
/// Messages that wait for the network. When it is slow, a console loses output and a log waits.
const QUEUE: usize = 16;
/// Bytes of one message.
const CHUNK: usize = 32 * 1024;
/// How long an upload may bring nothing. Longer than the controller waits for its client.
const UPLOAD_IDLE: Duration = Duration::from_secs(90);
/// Over this time an upload must bring so many bytes, or it only holds up others.
const UPLOAD_WINDOW: Duration = Duration::from_secs(60);
const UPLOAD_LEAST: u64 = 256 * 1024;
/// How long the leader may take to accept a stream that it asked for itself.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens streams. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Streams {
    host: HostId,
    dirs: VmDirs,
    images: Option<Images>,
    consoles: Arc<Mutex<BTreeMap<VmId, Console>>>,
    open: Arc<Semaphore>,
    /// One picture at a time: each is up to 32 MiB in memory, and takes a file.
    pictures: Arc<tokio::sync::Mutex<()>>,
}

/// How long the leader may take to read the end of a stream, of which this host keeps a megabyte or two.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);

type Sender = mpsc::Sender<AttachStreamRequest>;

impl Streams {
    /// For the VMs that have their directories here.
    #[must_use]
    pub fn new(host: HostId, dirs: VmDirs) -> Self {
        Self {
            host,
            dirs,
            images: None,
            consoles: Arc::default(),
            open: Arc::new(Semaphore::new(MOST)),
            pictures: Arc::default(),
        }
    }

    /// Which also takes uploads.
    #[must_use]
    pub fn with_images(self, images: Images) -> Self {
        Self { images: Some(images), ..self }
    }

    /// Carries one stream until either side ends it.
    pub async fn serve(&self, channel: Channel, request: OpenStream) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let attach = v1::Attach { host_id: self.host.to_string(), stream_id: request.stream_id.clone() };
        let first = AttachStreamRequest { message: Some(Message::Attach(attach)) };
        sender.try_send(first).expect("the queue is new");
        let mut client = AgentServiceClient::new(channel);
        let answer = time::timeout(ACCEPT_TIMEOUT, client.attach_stream(ReceiverStream::new(receiver))).await;
        let mut incoming = match answer {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return debug!(stream = request.stream_id, "the stream was not taken: {status}"),
            Err(_) => return debug!(stream = request.stream_id, "the stream was not taken in time"),
        };
        if let Err(problem) = self.carry(&request, &sender, &mut incoming).await {
            let _ = sender.send(AttachStreamRequest { message: Some(Message::Error(problem)) }).await;
        }
        // To drop the answers now would break off the stream, and what is still on its way would be lost. So: say that
        // this was all, and wait until the leader has it and ends its side.
        drop(sender);
        let rest = async { while let Ok(Some(_)) = incoming.message().await {} };
        if time::timeout(FLUSH_TIMEOUT, rest).await.is_err() {
            debug!(stream = request.stream_id, "the leader did not take the end of the stream");
        }
    }

    async fn carry(
        &self,
        request: &OpenStream,
        sender: &Sender,
        incoming: &mut Streaming<AttachStreamResponse>,
    ) -> Result<(), String> {
        let Ok(_open) = self.open.try_acquire() else {
            return Err(format!("this host has {MOST} consoles, logs and screens open already; close some"));
        };
        if request.kind() == StreamKind::Upload {
            let facts = self.upload(request.upload.as_ref(), incoming).await?;
            send(sender, &facts.encode_to_vec()).await;
            return Ok(());
        }
        let vm: VmId = request.vm_id.parse().map_err(|e| format!("vm_id: {e}"))?;
        if !self.dirs.dir(vm).exists() {
            return Err("this host knows no such VM".to_owned());
        }
        match request.kind() {
            StreamKind::Console => self.console(vm, request.history_bytes, sender, incoming).await,
            StreamKind::Log => self.log(vm, request, sender).await,
            StreamKind::Vnc => self.vnc(vm, sender, incoming).await,
            StreamKind::Screenshot => self.screenshot(vm, sender).await,
            StreamKind::Upload | StreamKind::Unspecified => {
                Err("this agent does not know that kind of stream".to_owned())
            }
        }
    }

    async fn console(
        &self,
        vm: VmId,
        history_bytes: u32,
        sender: &Sender,
        incoming: &mut Streaming<AttachStreamResponse>,
    ) -> Result<(), String> {
        let console = {
            let mut consoles = self.consoles.lock().unwrap_or_else(PoisonError::into_inner);
            // Everybody who looks at one VM shares its console. Those of VMs that are gone are of no use.
            consoles.retain(|vm, _| self.dirs.dir(*vm).exists());
            consoles.entry(vm).or_insert_with(|| Console::new(self.dirs.dir(vm))).clone()
        };
        let handle = console.attach(history_bytes).await.map_err(|e| format!("the console cannot be read: {e}"))?;
        let mut output = handle.output;
        let out = async {
            while let Some(bytes) = output.recv().await {
                if !send(sender, &bytes).await {
                    return;
                }
            }
        };
        let input = async {
            while let Ok(Some(message)) = incoming.message().await {
                if handle.input.send(Bytes::from(message.data)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = out => {}
            () = input => {}
        }
        Ok(())
    }

    /// Joins a viewer and QEMU's VNC server. QEMU does not wait for a viewer that is slow, and a QEMU that does not read makes the
    /// viewer wait.
    async fn vnc(
        &self,
        vm: VmId,
        sender: &Sender,
        incoming: &mut Streaming<AttachStreamResponse>,
    ) -> Result<(), String> {
        let socket = screen::connect_vnc(&self.dirs.dir(vm)).await.map_err(|e| chain(&e))?;
        let (mut read, mut write) = socket.into_split();
        let out = async {
            let mut bytes = vec![0; CHUNK];
            while let Ok(n @ 1..) = read.read(&mut bytes).await {
                if !send(sender, &bytes[..n]).await {
                    return;
                }
            }
        };
        let input = async {
            while let Ok(Some(message)) = incoming.message().await {
                if write.write_all(&message.data).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = out => {}
            () = input => {}
            () = sender.closed() => {}
        }
        Ok(())
    }

    async fn screenshot(&self, vm: VmId, sender: &Sender) -> Result<(), String> {
        let picture = {
            let _turn = self.pictures.lock().await;
            screen::picture(&self.dirs.dir(vm)).await.map_err(|e| chain(&e))?
        };
        send(sender, &picture).await;
        Ok(())
    }

    /// Takes a file of an image that a client sends.
    async fn upload(
        &self,
        target: Option<&v1::UploadTarget>,
        incoming: &mut Streaming<AttachStreamResponse>,
    ) -> Result<v1::FileFacts, String> {
        let images = self.images.as_ref().ok_or("this agent takes no uploads")?;
        let target = target.ok_or("upload: is missing")?;
        let pool = images.env().pools.get(&target.pool);
        let pool = pool.ok_or_else(|| format!("this host has no pool {}", target.pool.escape_debug()))?.clone();
        let file = target.file.clone().unwrap_or_default();
        let fetch = to_fetch(&target.image_id, &target.image_name, &file, &pool).map_err(|e| e.message)?;
        let (checked, user) = (pool.clone(), images.env().user);
        blocking(move || pools::check(&checked, user)).await.map_err(|e| format!("pool {}: {e}", pool.name))?;
        let size = fetch.size_bytes;
        let take = async move |mut feed: Feed| {
            feed.expect(size);
            let mut left = size;
            let mut rate = (Instant::now(), 0_u64);
            while left > 0 {
                let next = time::timeout(UPLOAD_IDLE, incoming.message()).await;
                let broke = |why: &str| problem(FileProblemKind::Io, format!("the upload broke off: {why}"));
                let message = next.map_err(|_| broke("nothing came any more"))?;
                let message = message.map_err(|e| broke(e.message()))?;
                let data = message.ok_or_else(|| broke("its client has gone"))?.data;
                let length = data.len() as u64;
                if length == 0 {
                    return Err(broke("a message without data came"));
                }
                if length > left {
                    return Err(broke("more came than was said"));
                }
                left -= length;
                feed.take(data.into()).await?;
                rate.1 += length;
                if rate.0.elapsed() >= UPLOAD_WINDOW {
                    if rate.1 < UPLOAD_LEAST {
                        return Err(broke("fewer than 256 KiB came in a minute"));
                    }
                    rate = (Instant::now(), 0);
                }
            }
            Ok(())
        };
        images.receive(fetch, take).await.map(|facts| facts.to_proto()).map_err(|e| e.message)
    }

    async fn log(&self, vm: VmId, request: &OpenStream, sender: &Sender) -> Result<(), String> {
        let dir = self.dirs.dir(vm);
        let unreadable = |e: std::io::Error| format!("the log cannot be read: {e}");
        let tail = if request.history_bytes == 0 { u32::MAX } else { request.history_bytes };
        if !request.follow {
            let bytes = console::read_log(&dir, tail).await.map_err(unreadable)?;
            send(sender, &bytes).await;
            return Ok(());
        }
        let mut lines = console::follow_log(&dir, tail).await.map_err(unreadable)?;
        loop {
            let bytes = tokio::select! {
                () = sender.closed() => return Ok(()),
                bytes = lines.recv() => bytes,
            };
            match bytes {
                Some(bytes) if send(sender, &bytes).await => {}
                Some(_) | None => return Ok(()),
            }
        }
    }
}

/// Returns whether the stream is still there.
async fn send(sender: &Sender, bytes: &[u8]) -> bool {
    for chunk in bytes.chunks(CHUNK) {
        let message = AttachStreamRequest { message: Some(Message::Data(chunk.to_vec())) };
        if sender.send(message).await.is_err() {
            return false;
        }
    }
    true
}
