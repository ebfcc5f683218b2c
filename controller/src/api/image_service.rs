//! `ImageService`.

use std::{pin::Pin, sync::Arc, time::Duration};

use prost::Message as _;
use tokio::time;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};
use uncloud_proto::{
    ids::{HostId, ImageId},
    v1::{self, file_inspection, image_service_server::ImageService},
};
use uuid::Uuid;

use super::{
    context::{Context, Freshness, timely, within},
    convert, image_watch, upload,
    validate::{self, NewFile, NewImage, Violations, quoted},
    vm_service::{fingerprint, wrong_answer},
};
use crate::{
    leadership::{Committed, Leader},
    model::{
        Extra, ImageRecord,
        image::{DiskFormat, FileRole, ImageFile, ImageState},
    },
    state::{
        self, ImageEntry,
        command::{Answer, Command, Decision, Refusal, RequestId},
    },
};

/// How long a host may take over the files of an image: it reads every byte for the sha256.
const INSPECTION_TIMEOUT: Duration = Duration::from_mins(10);

/// How long one host may take over a file on a web server, of which it looks at the beginning. Longer than its own patience.
const WEB_PATIENCE: Duration = Duration::from_secs(90);

/// The service.
#[derive(Clone, Debug)]
pub(super) struct Images {
    pub(super) context: Context,
}

impl Images {
    async fn create(&self, request: v1::CreateImageRequest) -> Result<v1::Image, Status> {
        let request_id = request_id(&request);
        let NewImage { name, kind, files, command_line } = validate::create_image(request)?;
        let leader = self.context.leader()?;
        let record = |files: Vec<ImageFile>| ImageRecord {
            id: ImageId::from_uuid(Uuid::new_v4()),
            name: name.clone(),
            kind,
            // What lies at an address has not been read yet.
            state: match files.iter().any(|f| is_address(&f.source)) {
                true => ImageState::Fetching,
                false => ImageState::Ready,
            },
            reason: String::new(),
            files,
            command_line: command_line.clone(),
            created: leader.clock.wall(),
            extra: Extra::default(),
        };
        let command = |files| Command::CreateImage { request: request_id.clone(), image: Box::new(record(files)) };
        // A repeated request has its answer, and a taken name is taken, whatever the files are now. (What is decided
        // here is not written; the writer decides again.)
        if let Some(image) = answered(&leader, &command(Vec::new()))? {
            return Ok(image);
        }
        let mut checked = Vec::with_capacity(files.len());
        for (i, file) in files.into_iter().enumerate() {
            checked.push(inspect(&leader, i, file).await?);
        }
        match self.context.submit(&leader, command(checked)).await? {
            Committed { answer: Answer::Image(record), revision, replayed } => {
                Ok(convert::image(&ImageEntry { record, revision: replayed.unwrap_or(revision) }))
            }
            Committed { answer: Answer::Done | Answer::Vm(_), .. } => Err(wrong_answer()),
        }
    }
}

fn request_id(request: &v1::CreateImageRequest) -> Option<RequestId> {
    if request.request_id.is_empty() {
        return None;
    }
    let mut rest = request.clone();
    let id = std::mem::take(&mut rest.request_id);
    Some(RequestId { id, fingerprint: fingerprint(&rest.encode_to_vec(), []) })
}

/// The answer that was given to this request before.
fn answered(leader: &Leader, command: &Command) -> Result<Option<v1::Image>, Status> {
    let cx = state::command::Context {
        now: leader.clock.wall(),
        silent: Arc::default(),
        arrived: Arc::default(),
        cpu_overcommit_percent: leader.settings.cpu_overcommit_percent,
        disk_overcommit_percent: leader.settings.disk_overcommit_percent,
    };
    match leader.mirror.read(|state| state.decide(command, &cx))? {
        Decision { replayed: Some(revision), answer: Answer::Image(record), .. } => {
            Ok(Some(convert::image(&ImageEntry { record, revision })))
        }
        Decision { .. } => Ok(None),
    }
}

/// Has the connected hosts look at a file, one after the other, until one can use it.
async fn inspect(leader: &Leader, i: usize, file: NewFile) -> Result<ImageFile, Status> {
    let hosts = leader.sessions.connected();
    if hosts.is_empty() {
        let message = "no host is connected that could look at the files; start an agent and try again";
        return Err(Refusal::Precondition(message.to_owned()).into());
    }
    let role = match file.role {
        FileRole::Disk => v1::ImageFileRole::Disk,
        FileRole::Kernel => v1::ImageFileRole::Kernel,
        FileRole::Initrd => v1::ImageFileRole::Initrd,
    };
    // The most telling of what the hosts said.
    let mut problem: Option<(HostId, v1::FileProblem)> = None;
    let mut silent = 0_usize;
    for host in hosts {
        let Ok(answer) = leader.sessions.inspect(host, &file.source, role) else {
            silent += 1;
            continue;
        };
        let patience = if is_address(&file.source) { WEB_PATIENCE } else { INSPECTION_TIMEOUT };
        match time::timeout(patience, answer).await {
            Ok(Ok(file_inspection::Result::Facts(facts))) => return accept(leader, i, file, host, facts),
            Ok(Ok(file_inspection::Result::Problem(found))) => {
                if problem.as_ref().is_none_or(|(_, p)| telling(found.kind()) > telling(p.kind())) {
                    problem = Some((host, found));
                }
            }
            // Its session has ended, or it hangs.
            Ok(Err(_)) | Err(_) => silent += 1,
        }
    }
    Err(match problem {
        Some((host, problem)) => unusable(leader, i, &file.source, host, &problem),
        None => Status::unavailable(format!("none of the {silent} hosts answered; try again")),
    })
}

/// How much a problem says. That one host has no such file says less than that another has one and cannot read it.
fn telling(kind: v1::FileProblemKind) -> u8 {
    match kind {
        v1::FileProblemKind::Unspecified => 0,
        v1::FileProblemKind::NotFound => 1,
        v1::FileProblemKind::Forbidden => 2,
        v1::FileProblemKind::Io => 3,
        v1::FileProblemKind::Invalid => 4,
    }
}

fn unusable(leader: &Leader, i: usize, source: &str, host: HostId, problem: &v1::FileProblem) -> Status {
    let name = host_name(leader, host);
    let words = convert::line(&problem.message);
    let (code, text) = match problem.kind() {
        v1::FileProblemKind::NotFound => (Code::NotFound, format!("is on no connected host (host {name}: {words})")),
        v1::FileProblemKind::Forbidden if is_address(source) => {
            (Code::InvalidArgument, format!("may not be fetched (host {name}: {words})"))
        }
        v1::FileProblemKind::Forbidden => (
            Code::InvalidArgument,
            format!("leads out of the directories that images may come from (host {name}: {words})"),
        ),
        v1::FileProblemKind::Io => (Code::FailedPrecondition, format!("cannot be read (host {name}: {words})")),
        v1::FileProblemKind::Invalid | v1::FileProblemKind::Unspecified => {
            (Code::InvalidArgument, format!("cannot be used (host {name}: {words})"))
        }
    };
    refuse(code, format!("files[{i}].source"), text)
}

fn refuse(code: Code, field: String, problem: String) -> Status {
    let message = format!("{field} {problem}");
    Status::with_error_details(code, message, ErrorDetails::with_bad_request_violation(field, problem))
}

fn host_name(leader: &Leader, host: HostId) -> String {
    leader.mirror.read(|state| state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone()))
}

/// Whether a source is an address on the network.
fn is_address(source: &str) -> bool {
    source.starts_with("https://") || source.starts_with("http://")
}

/// Compares what a host found with what the user said.
fn accept(leader: &Leader, i: usize, file: NewFile, host: HostId, facts: v1::FileFacts) -> Result<ImageFile, Status> {
    let at = |field: &str| format!("files[{i}].{field}");
    let name = || host_name(leader, host);
    let sha256 = match is_address(&file.source) {
        // Only its beginning was looked at: what the user says is checked when it is fetched.
        true => file.sha256.clone().unwrap_or_default(),
        false => facts.sha256.to_ascii_lowercase(),
    };
    if (!is_address(&file.source) && sha256.len() != 64) || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Status::internal(format!("host {} did not give a sha256 of {}", name(), quoted(&file.source))));
    }
    if let Some(expected) = &file.sha256
        && *expected != sha256
    {
        let problem = format!("is {expected}, but that of the file on host {} is {sha256}", name());
        return Err(Violations::one(at("sha256"), problem).into());
    }
    let found = match facts.format() {
        v1::ImageFormat::Unspecified => None,
        v1::ImageFormat::Raw => Some(DiskFormat::Raw),
        v1::ImageFormat::Qcow2 => Some(DiskFormat::Qcow2),
    };
    let is_disk = file.role == FileRole::Disk;
    let format = match (is_disk, file.format, found) {
        (false, _, _) => None,
        (true, Some(expected), Some(found)) if expected != found => {
            let problem = format!("is {expected:?}, but the file on host {} is {found:?}", name());
            return Err(Violations::one(at("format"), problem).into());
        }
        (true, _, Some(found)) => Some(found),
        (true, _, None) => {
            return Err(Status::internal(format!(
                "host {} did not give the format of {}",
                name(),
                quoted(&file.source)
            )));
        }
    };
    Ok(ImageFile {
        role: file.role,
        source: file.source,
        sha256,
        size_bytes: facts.size_bytes,
        format,
        virtual_size_bytes: is_disk.then_some(facts.virtual_size_bytes),
    })
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn create_image(
        &self,
        request: Request<v1::CreateImageRequest>,
    ) -> Result<Response<v1::CreateImageResponse>, Status> {
        let image = within(INSPECTION_TIMEOUT, self.create(request.into_inner())).await?;
        Ok(Response::new(v1::CreateImageResponse { image: Some(image) }))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::GetImageResponse>, Status> {
        let freshness = Freshness::of(request.metadata())?;
        let image = validate::image_ref(request.into_inner().image)?;
        let readable = self.context.readable(freshness).await?;
        let image = self.context.read_in(&readable, |state| {
            let id = state.resolve_image(&image)?;
            Ok(state.image(id).map(convert::image))
        })?;
        Ok(Response::new(v1::GetImageResponse { image }))
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let readable = self.context.readable(Freshness::of(request.metadata())?).await?;
        let answer = self.context.read_in(&readable, |state| {
            let mut images: Vec<_> = state.images().map(|(_, entry)| entry).collect();
            images.sort_by(|a, b| (&a.record.name, a.record.id).cmp(&(&b.record.name, b.record.id)));
            let images = images.into_iter().map(convert::image).collect();
            Ok(v1::ListImagesResponse { images, revision: state.revision().0 })
        })?;
        Ok(Response::new(answer))
    }

    type WatchImageStream = Pin<Box<dyn Stream<Item = Result<v1::WatchImageResponse, Status>> + Send>>;

    async fn watch_image(
        &self,
        request: Request<v1::WatchImageRequest>,
    ) -> Result<Response<Self::WatchImageStream>, Status> {
        let image = validate::image_ref(request.into_inner().image)?;
        let id = self.context.read(|_, state| Ok(state.resolve_image(&image)?)).await?;
        let leader = self.context.leader()?;
        Ok(Response::new(Box::pin(image_watch::watch(self.context.clone(), leader, id))))
    }

    async fn upload_image(
        &self,
        request: Request<Streaming<v1::UploadImageRequest>>,
    ) -> Result<Response<v1::UploadImageResponse>, Status> {
        let image = upload::upload(&self.context, request.into_inner()).await?;
        Ok(Response::new(v1::UploadImageResponse { image: Some(image) }))
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        let image = validate::image_ref(request.into_inner().image)?;
        timely(async {
            let id = self.context.read(|_, state| Ok(state.resolve_image(&image)?)).await?;
            let leader = self.context.leader()?;
            self.context.submit(&leader, Command::DeleteImage { image: id }).await?;
            Ok(Response::new(v1::DeleteImageResponse {}))
        })
        .await
    }
}
