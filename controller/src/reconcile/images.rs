//! Brings images to where they should be, for one term: has a host fetch those that are FETCHING, has all hosts remove the
//! copies of those that are DELETING, and gives up uploads that nobody carries on.
//!
//! Everything is asked for again by the next leader, and asking twice is the same as asking once: what is stored is only the
//! image's state. What an agent answers is judged in [`checked`] (pure).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::{AbortHandle, JoinSet},
    time::{self, Instant, MissedTickBehavior},
};
use tracing::{info, warn};
use uncloud_proto::{
    ids::{HostId, ImageId},
    v1,
};

use crate::{
    api::convert,
    leadership::{Leader, Live, WriteError},
    model::{
        ImageRecord,
        image::{DiskFormat, FileRole, ImageFile, ImageState},
    },
    sessions::Fetching,
    state::command::{Arrival, Command},
};

/// How often the images are looked at.
const PERIOD: Duration = Duration::from_millis(500);
/// So many images are on their way at once. The rest waits; hosts copy two at a time anyhow.
const AT_ONCE: usize = 16;
/// So many images are being removed at once. Apart from the others, which may take hours.
const REMOVALS_AT_ONCE: usize = 16;
/// A host that says nothing about a fetch for so long hangs. It should say something every second.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a host may take to remove its copies.
const REMOVAL: Duration = Duration::from_secs(60);
/// How long to wait before trying again what did not come about.
const PAUSE: Duration = Duration::from_secs(2);
/// What is said of hosts, at the most.
const NOTES: usize = 3;

struct Job {
    state: ImageState,
    handle: AbortHandle,
}

/// Runs until it is dropped, at the end of the term.
pub(super) async fn run(leader: &Arc<Leader>) {
    let mut ticker = time::interval(PERIOD);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tasks: JoinSet<ImageId> = JoinSet::new();
    let mut jobs: BTreeMap<ImageId, Job> = BTreeMap::new();
    let mut not_before: BTreeMap<ImageId, Instant> = BTreeMap::new();
    loop {
        tokio::select! {
            _ = ticker.tick() => {}
            Some(ended) = tasks.join_next() => {
                // One that was aborted has been taken off already.
                if let Ok(image) = ended {
                    jobs.remove(&image);
                    not_before.insert(image, Instant::now() + PAUSE);
                }
                continue;
            }
        }
        if !leader.validity.holds(leader.clock.now()) {
            continue;
        }
        let open: BTreeMap<ImageId, ImageState> = leader.mirror.read(|state| {
            let open =
                state.images().filter(|(_, e)| !matches!(e.record.state, ImageState::Ready | ImageState::Failed));
            open.map(|(id, e)| (*id, e.record.state)).collect()
        });
        jobs.retain(|id, job| {
            let goes_on = open.get(id) == Some(&job.state);
            if !goes_on {
                job.handle.abort();
            }
            goes_on
        });
        not_before.retain(|id, _| open.contains_key(id));
        leader.images.retain(|id| open.contains_key(&id));
        for (id, state) in open {
            let wait = not_before.get(&id).is_some_and(|at| *at > Instant::now());
            if jobs.contains_key(&id) || wait || !has_room(jobs.values().map(|job| job.state), state) {
                continue;
            }
            let leader = Arc::clone(leader);
            let handle = match state {
                ImageState::Fetching => tasks.spawn(fetch(leader, id)),
                ImageState::Deleting => tasks.spawn(remove(leader, id)),
                ImageState::Uploading if !leader.images.is_uploading(id) => tasks.spawn(give_up(leader, id)),
                ImageState::Uploading | ImageState::Ready | ImageState::Failed => continue,
            };
            jobs.insert(id, Job { state, handle });
        }
    }
}

/// Whether beside these jobs there is room for one of an image in this state.
fn has_room(jobs: impl Iterator<Item = ImageState>, state: ImageState) -> bool {
    let (removals, others): (Vec<_>, Vec<_>) = jobs.partition(|job| *job == ImageState::Deleting);
    match state {
        ImageState::Deleting => removals.len() < REMOVALS_AT_ONCE,
        ImageState::Fetching | ImageState::Uploading | ImageState::Ready | ImageState::Failed => others.len() < AT_ONCE,
    }
}

async fn submit(leader: &Leader, command: Command) {
    match leader.writer.submit(command).await {
        Ok(_) => {}
        Err(WriteError::Refused(refusal)) => info!("refused: {refusal}"),
        // It is found again, by this leader or the next.
        Err(WriteError::Overloaded | WriteError::StoreFull | WriteError::NotLeader | WriteError::Unknown) => {}
    }
}

/// An upload whose client, or whose leader, is gone.
async fn give_up(leader: Arc<Leader>, image: ImageId) -> ImageId {
    let why = "its upload broke off; what had come of it is being removed".to_owned();
    submit(&leader, Command::ImageArrived { image, outcome: Arrival::BrokenOff(why) }).await;
    image
}

/// Has the connected hosts fetch an image, one after the other, until one has it. What is wrong with the image itself is final.
async fn fetch(leader: Arc<Leader>, image: ImageId) -> ImageId {
    let mut problem: Option<(HostId, v1::FileProblem)> = None;
    let mut unanswered = 0_usize;
    for host in leader.sessions.connected() {
        let Some(record) = leader.mirror.read(|state| state.image(image).map(|e| Arc::clone(&e.record))) else {
            return image;
        };
        let Some(message) = leader.mirror.read(|state| state.image(image).map(convert::image)) else { return image };
        let Ok(fetching) = leader.sessions.fetch_image(host, message) else {
            unanswered += 1;
            continue;
        };
        let Some(fetched) = follow(&leader, image, host, fetching).await else {
            unanswered += 1;
            continue;
        };
        let outcome = match fetched.problem {
            None => match checked(&record, fetched.files) {
                Ok(files) => Arrival::Complete(files),
                Err(why) => Arrival::Failed(format!("host {}: {why}", name(&leader, host))),
            },
            Some(found) if found.kind() == v1::FileProblemKind::Invalid => {
                Arrival::Failed(format!("host {}: {}", name(&leader, host), convert::line(&found.message)))
            }
            Some(found) => {
                problem = Some((host, found));
                continue;
            }
        };
        submit(&leader, Command::ImageArrived { image, outcome }).await;
        return image;
    }
    match problem {
        Some((host, found)) if unanswered == 0 => {
            let why = format!("no host can fetch it; host {}: {}", name(&leader, host), convert::line(&found.message));
            submit(&leader, Command::ImageArrived { image, outcome: Arrival::Failed(why) }).await;
        }
        Some(_) | None => {
            let note = "no host is connected that could fetch it".to_owned();
            leader.images.show(image, Live { note, ..Live::default() });
        }
    }
    image
}

/// Waits for a fetch and shows how far it is. `None`: the host has gone, or says nothing any more.
async fn follow(leader: &Leader, image: ImageId, host: HostId, fetching: Fetching) -> Option<v1::ImageFetched> {
    let Fetching { mut answer, mut progress } = fetching;
    loop {
        let now = *progress.borrow_and_update();
        leader.images.show(image, Live { host: Some(host), done: now.done, total: now.total, note: String::new() });
        tokio::select! {
            biased;
            fetched = &mut answer => return fetched.ok(),
            heard = time::timeout(SILENCE, progress.changed()) => match heard {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return None,
                Err(_) => {
                    warn!(%image, %host, "the host says nothing about the fetch of an image any more");
                    return None;
                }
            },
        }
    }
}

/// The files of an image with what a host has found out about them.
///
/// # Errors
///
/// The host contradicts what is known, or itself. In words.
pub(crate) fn checked(record: &ImageRecord, facts: Vec<v1::FileFacts>) -> Result<Vec<ImageFile>, String> {
    if record.files.len() != facts.len() {
        return Err(format!("it has {} files, and the host speaks of {}", record.files.len(), facts.len()));
    }
    record.files.iter().zip(facts).map(|(file, facts)| checked_file(file, &facts)).collect()
}

/// One file.
///
/// # Errors
///
/// As of [`checked`].
pub(crate) fn checked_file(file: &ImageFile, facts: &v1::FileFacts) -> Result<ImageFile, String> {
    let sha256 = facts.sha256.to_ascii_lowercase();
    if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("the host gave no sha256 of {}", file.source));
    }
    if !file.sha256.is_empty() && file.sha256 != sha256 {
        return Err(format!("{} has the sha256 {sha256}, not {}", file.source, file.sha256));
    }
    let (format, virtual_size_bytes) = match file.role {
        FileRole::Kernel | FileRole::Initrd => (None, None),
        FileRole::Disk => {
            let found = match facts.format() {
                v1::ImageFormat::Raw => DiskFormat::Raw,
                v1::ImageFormat::Qcow2 => DiskFormat::Qcow2,
                v1::ImageFormat::Unspecified => return Err(format!("the host gave no format of {}", file.source)),
            };
            if file.format.is_some_and(|said| said != found) {
                return Err(format!("{} is {found:?}, not {:?}", file.source, file.format.unwrap_or(found)));
            }
            (Some(found), Some(facts.virtual_size_bytes))
        }
    };
    Ok(ImageFile { sha256, size_bytes: facts.size_bytes, format, virtual_size_bytes, ..file.clone() })
}

/// Has every host of the cluster remove its copies. The image is forgotten when all have said that they have none: one that is
/// down is waited for, unless it is removed from the cluster. This is one pass; there is another one after a pause.
async fn remove(leader: Arc<Leader>, image: ImageId) -> ImageId {
    let hosts: BTreeSet<HostId> = leader.mirror.read(|state| state.hosts().map(|(id, _)| *id).collect());
    let asked = hosts.difference(&leader.images.without(image)).copied().collect::<Vec<_>>();
    let asked = asked.into_iter().map(|host| {
        let leader = &leader;
        async move { (host, remove_at(leader, host, image).await) }
    });
    let mut notes = Vec::new();
    for (host, problem) in futures_util::future::join_all(asked).await {
        match problem {
            None => leader.images.note_without(image, host),
            Some(problem) => notes.push(format!("host {}: {problem}", name(&leader, host))),
        }
    }
    if notes.is_empty() {
        submit(&leader, Command::ForgetImage { image }).await;
        info!(%image, "no copy of the deleted image is left");
        return image;
    }
    let more = if notes.len() > NOTES { format!("; and {} more", notes.len() - NOTES) } else { String::new() };
    let note = format!("{}{more}", notes[..notes.len().min(NOTES)].join("; "));
    leader.images.show(image, Live { note, ..Live::default() });
    image
}

async fn remove_at(leader: &Leader, host: HostId, image: ImageId) -> Option<String> {
    let Ok(answer) = leader.sessions.remove_image(host, image) else { return Some("it is not connected".to_owned()) };
    match time::timeout(REMOVAL, answer).await {
        Ok(Ok(removed)) if removed.problem.is_empty() => None,
        Ok(Ok(removed)) => Some(convert::line(&removed.problem)),
        Ok(Err(_)) => Some("it has gone".to_owned()),
        Err(_) => Some("it does not answer".to_owned()),
    }
}

fn name(leader: &Leader, host: HostId) -> String {
    leader.mirror.read(|state| state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_do_not_come_keep_none_from_being_removed() {
        let jobs = |fetching, deleting| {
            let fetching = std::iter::repeat_n(ImageState::Fetching, fetching);
            fetching.chain(std::iter::repeat_n(ImageState::Deleting, deleting))
        };
        assert!(has_room(jobs(AT_ONCE, 0), ImageState::Deleting));
        assert!(!has_room(jobs(AT_ONCE, 0), ImageState::Fetching));
        assert!(has_room(jobs(0, REMOVALS_AT_ONCE), ImageState::Fetching));
        assert!(!has_room(jobs(0, REMOVALS_AT_ONCE), ImageState::Deleting));
    }

    #[test]
    fn what_a_host_says_must_fit_what_is_known() {
        let file = ImageFile {
            role: FileRole::Disk,
            source: "https://example.org/x".into(),
            sha256: String::new(),
            size_bytes: 0,
            format: None,
            virtual_size_bytes: None,
        };
        let facts = v1::FileFacts {
            sha256: "AB".repeat(32),
            size_bytes: 7,
            format: v1::ImageFormat::Qcow2.into(),
            virtual_size_bytes: 1024,
        };
        let found = checked_file(&file, &facts).unwrap();
        assert_eq!((found.sha256.as_str(), found.size_bytes), ("ab".repeat(32).as_str(), 7));
        assert_eq!((found.format, found.virtual_size_bytes), (Some(DiskFormat::Qcow2), Some(1024)));
        let said = ImageFile { sha256: "cd".repeat(32), ..file.clone() };
        assert!(checked_file(&said, &facts).unwrap_err().contains("has the sha256 abab"));
        let said = ImageFile { format: Some(DiskFormat::Raw), ..file.clone() };
        assert!(checked_file(&said, &facts).unwrap_err().contains("is Qcow2, not Raw"));
        assert!(checked_file(&file, &v1::FileFacts { sha256: "x".into(), ..facts.clone() }).is_err());
        assert!(checked_file(&file, &v1::FileFacts { format: 0, ..facts }).is_err());
    }
}
