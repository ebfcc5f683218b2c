//! `uncloud image`.

mod sources;

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use tokio::{io::AsyncReadExt as _, sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use uncloud_proto::v1::{self, ImageState, upload_image_request::Message};

use self::sources::{Plan, Upload};
use super::{Context, Error, progress::Progress};
use crate::{output, units};

/// Bytes that are sent at once, and how many such pieces may wait.
const PIECE: usize = 128 * 1024;
const PIECES: usize = 4;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Adds an image: a disk, or a kernel with its initrd.
    ///
    /// From an address (https://…) a host fetches it; each pool that needs it later fetches it once and checks that it is still the
    /// same. A relative path, such as ./debian.qcow2, is a file here: it is uploaded. An absolute path, or pool:NAME/PATH, is a file
    /// that the hosts have; with --upload it is a file here, too.
    Add(Add),
    /// Lists all images.
    List,
    /// Shows one image, and how far it has come.
    Show(Named),
    /// Deletes an image that no VM uses, and its copies in all pools.
    Delete(Delete),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name, UUID or unique prefix of one.
    image: String,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Name, UUID or unique prefix of one.
    image: String,
    /// Waits until its copies are gone.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "1h", value_parser = units::parse_duration, value_name = "DURATION")]
    wait_timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Name of the image.
    name: String,
    /// The disk: https://…, a file here (a relative path), a path on the hosts (absolute), or pool:NAME/PATH.
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    path: Option<String>,
    /// Format of the disk; found out if it is not given.
    #[arg(long, value_enum, requires = "path")]
    format: Option<Format>,
    /// The sha256 that the disk (or the kernel) must have; computed if it is not given.
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// Adds a kernel instead of a disk.
    #[arg(long, value_name = "PATH")]
    kernel: Option<String>,
    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initrd: Option<String>,
    /// The sha256 that the initial RAM disk must have.
    #[arg(long, value_name = "HEX", requires = "initrd")]
    initrd_sha256: Option<String>,
    /// The kernel's command line, for VMs that name none.
    #[arg(long, value_name = "CMDLINE", requires = "kernel")]
    append: Option<String>,
    /// Uploads the files, also if their paths are absolute.
    #[arg(long)]
    upload: bool,
    /// The pool that files are uploaded to.
    #[arg(long, value_name = "POOL", default_value = "default")]
    pool: String,
    /// Makes it safe to run this command again when its answer was lost: the same id gives the same image.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Waits until the image can be used, and fails if it cannot.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "1h", value_parser = units::parse_duration, value_name = "DURATION")]
    wait_timeout: Duration,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    let client = &context.client;
    match command {
        Command::Add(add) => run_add(context, add).await,
        Command::List => {
            let answer = client.list_images(v1::ListImagesRequest {}).await?;
            context.print(&answer, |a| output::images(&a.images, context.now()))
        }
        Command::Show(Named { image }) => {
            let answer = client.get_image(v1::GetImageRequest { image }).await?;
            let found = answer.image.clone().unwrap_or_default();
            let progress = if is_settled(&found) { None } else { progress_of(context, &found.id).await? };
            context.print(&answer, |_| output::show_image(&found, progress.as_ref(), context.now()))
        }
        Command::Delete(Delete { image, wait, wait_timeout }) => {
            let found = client.get_image(v1::GetImageRequest { image: image.clone() }).await?.image.unwrap_or_default();
            let answer = client.delete_image(v1::DeleteImageRequest { image: found.id.clone() }).await?;
            if wait {
                follow(context, &found.id, wait_timeout, |_| Verdict::Wait).await?;
            }
            context.print(&answer, |_| format!("{} is deleted.", output::clean(&image)))
        }
    }
}

async fn run_add(context: &Context, add: Add) -> Result<(), Error> {
    let here = std::env::current_dir().map_err(|e| Error::Failed(format!("where are we? {e}")))?;
    let (wait, wait_timeout) = (add.wait, add.wait_timeout);
    let mut answer = match sources::plan(add, &here)? {
        Plan::Register(request) => context.client.create_image(request).await?,
        Plan::Upload(upload) => v1::CreateImageResponse { image: send(context, upload).await?.image },
    };
    let image = answer.image.clone().unwrap_or_default();
    if wait && image.state() != ImageState::Ready {
        let seen = follow(context, &image.id, wait_timeout, |image| match image.state() {
            ImageState::Ready => Verdict::Done,
            ImageState::Failed | ImageState::Deleting => Verdict::Hopeless,
            ImageState::Unspecified | ImageState::Fetching | ImageState::Uploading => Verdict::Wait,
        });
        answer.image = seen.await?;
        if answer.image.is_none() {
            return Err(Error::Failed(format!("{} was deleted", output::clean(&image.name))));
        }
    }
    context.print(&answer, |a| output::images(a.image.as_slice(), context.now()))
}

/// Whether nothing more is going to happen to it.
fn is_settled(image: &v1::Image) -> bool {
    matches!(image.state(), ImageState::Unspecified | ImageState::Ready | ImageState::Failed)
}

async fn progress_of(context: &Context, id: &str) -> Result<Option<v1::ImageProgress>, Error> {
    let mut watch = context.client.watch_image(v1::WatchImageRequest { image: id.to_owned() }).await?;
    Ok(watch.message().await?.and_then(|m| m.progress))
}

enum Verdict {
    Wait,
    Done,
    Hopeless,
}

/// Watches an image until `judge` is content. `None`: it is gone. A watch that breaks off is opened again.
async fn follow(
    context: &Context,
    id: &str,
    limit: Duration,
    judge: impl Fn(&v1::Image) -> Verdict,
) -> Result<Option<v1::Image>, Error> {
    let mut progress = Progress::start();
    let mut last = String::new();
    let work = async {
        loop {
            let opened = context.client.watch_image(v1::WatchImageRequest { image: id.to_owned() }).await;
            let mut watch = match opened {
                Ok(watch) => watch,
                Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
                Err(status) => return Err(Error::from(status)),
            };
            while let Ok(Some(answer)) = watch.message().await {
                let image = answer.image.unwrap_or_default();
                last = output::image_line(&image, answer.progress.as_ref());
                progress.say(last.clone());
                match judge(&image) {
                    Verdict::Wait => {}
                    Verdict::Done => return Ok(Some(image)),
                    Verdict::Hopeless => return Err(Error::Failed(last.clone())),
                }
            }
            // The watch has ended before the image has: its controller does not lead any more. The next one is asked.
            time::sleep(Duration::from_millis(200)).await;
        }
    };
    match time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::TimedOut(format!("not done within {}: {last}\nIt goes on.", units::duration(limit)))),
    }
}

/// Sends files, and says how far it is.
async fn send(context: &Context, upload: Upload) -> Result<v1::UploadImageResponse, Error> {
    let total: u64 = upload.start.files.iter().map(|f| f.size_bytes).sum();
    let name = upload.start.name.clone();
    let (messages, queue) = mpsc::channel(PIECES);
    let (sent, mut watched) = tokio::sync::watch::channel(0_u64);
    let reading = async move {
        let message = |message| v1::UploadImageRequest { message: Some(message) };
        if messages.send(message(Message::Start(upload.start))).await.is_err() {
            return Ok(());
        }
        for path in upload.paths {
            let failed = |e: std::io::Error| format!("{}: {e}", path.display());
            let mut file = tokio::fs::File::open(&path).await.map_err(failed)?;
            loop {
                let mut piece = vec![0; PIECE];
                let n = file.read(&mut piece).await.map_err(failed)?;
                if n == 0 {
                    break;
                }
                piece.truncate(n);
                // Nobody takes it any more: the answer says why.
                if messages.send(message(Message::Data(piece))).await.is_err() {
                    return Ok(());
                }
                sent.send_modify(|s| *s += n as u64);
            }
        }
        Ok::<(), String>(())
    };
    let mut progress = Progress::start();
    let telling = async {
        let mut shown = u64::MAX;
        loop {
            let percent = *watched.borrow_and_update() * 100 / total.max(1);
            if percent / 10 != shown {
                shown = percent / 10;
                progress.say(format!("{}: {percent} % of {} sent", output::clean(&name), units::bytes(total)));
            }
            if watched.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let calling = async {
        let (read, answer) = tokio::join!(reading, context.client.upload_image(ReceiverStream::new(queue)));
        read.map_err(Error::Failed)?;
        Ok(answer?)
    };
    tokio::select! {
        answer = calling => answer,
        () = telling => unreachable!("it tells for ever"),
    }
}
