//! Copying the disks of a guest that migrates, in QEMU's words.
//!
//! The target makes disks of the same size and lets its QEMU serve them (NBD, in TLS with the migration's key). The source's QEMU
//! copies each to there by a job, which goes on to copy what the guest writes meanwhile. Before the last of the guest is sent, when
//! it stands still, the jobs are ended; that copies what is left, and flushes the target's disks.
//!
//! A guest never waits for the target: its writes are copied behind its back, and where QEMU itself would wait, with its guest
//! (while it connects), it is let only when the target can be reached.
//!
//! A job that has ended well is dismissed by [`finish`] and by nothing else, and one that has not is left for [`cancel`]. So what
//! QEMU says of its jobs is all that there is to know, whatever became of the agent meanwhile.

use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    pin::pin,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{net::TcpStream, time};
use tracing::warn;

use super::{
    migration::{CREDENTIALS, Error, Listen},
    process::Instance,
    qmp,
};
use crate::vm::migration::{DisksTo, Mirror, Nodes, Progress};

/// Jobs and nodes of the source begin with this.
const NAME: &str = "mirror-";
/// No machine has more.
const MOST_DISKS: usize = 64;
/// So many ports are tried before the disks are not served: each may be taken between our look and QEMU's.
const PORTS_TRIED: usize = 8;
/// How long the target may take to be reached at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long QEMU may take to connect, in seconds. Its guest waits for that (QEMU 7.2), so it is tried only after we could.
const OPEN_TIMEOUT: u64 = 1;
/// How long QEMU may take to answer while disks may be copied. It takes milliseconds; after 5 s its connection is given up, which is the
/// only one that it would be told on.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long jobs may take to end. It is the guest's downtime, and takes milliseconds.
const END_LIMIT: Duration = Duration::from_secs(3);
/// How often they are looked at meanwhile.
const END_LOOK: Duration = Duration::from_millis(5);

/// Whether the machine has these disks and no others, by QEMU's own word. They have the same names on both sides
/// ([`nodes`](crate::vm::desired::Spec::nodes)), also where the source was given one while it ran.
async fn check_nodes(instance: &Instance, nodes: &Nodes) -> Result<(), Error> {
    let mut found = named(instance, is_disk).await?;
    let mut expected: Vec<_> = nodes.copied.iter().chain(&nodes.shared).cloned().collect();
    found.sort();
    expected.sort();
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (found.join(", "), expected.join(", "));
    Err(Error::NotCopied(format!("the machine has these disks: {found}; there should be {expected}")))
}

fn is_disk(node: &str) -> bool {
    let number = node.strip_prefix("disk").or_else(|| node.strip_prefix("scsi"));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The target: serves those of its disks that are copied. What was served before is not any more.
///
/// # Errors
///
/// QEMU refuses, or no port is free.
pub(super) async fn serve(instance: &Instance, listen: Listen, nodes: &Nodes) -> Result<(), Error> {
    close(instance).await?;
    if nodes.copied.is_empty() {
        return Ok(());
    }
    check_nodes(instance, nodes).await?;
    let address = start(instance, listen, nodes.copied.len()).await?;
    for node in &nodes.copied {
        // The port is part of the id, because QEMU does not tell it otherwise.
        let id = format!("{NAME}{}-{node}", address.port());
        let export = json!({ "type": "nbd", "id": id, "node-name": node, "name": node, "writable": true });
        instance.execute("block-export-add", Some(export)).await?;
    }
    Ok(())
}

async fn start(instance: &Instance, listen: Listen, count: usize) -> Result<SocketAddr, Error> {
    let ports: Vec<u16> = match listen.ports {
        None => vec![0; PORTS_TRIED],
        Some((first, last)) => (first..=last).collect(),
    };
    let mut refused = None;
    for port in ports {
        // Whether it is free. QEMU would take another one than it is told, or not say which.
        let Ok(free) = TcpListener::bind((listen.address, port)).and_then(|l| l.local_addr()) else { continue };
        let data = json!({ "host": free.ip().to_string(), "port": free.port().to_string() });
        let server = json!({
            "addr": { "type": "inet", "data": data },
            "tls-creds": CREDENTIALS,
            // One connection for each disk.
            "max-connections": count,
        });
        match instance.execute("nbd-server-start", Some(server)).await {
            Ok(_) => return Ok(free),
            Err(error @ qmp::Error::Refused { .. }) => refused = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(refused.map_or(Error::NoPort, Error::Qmp))
}

/// The target: disks are not served any more. From then on nobody but the guest writes to them.
///
/// # Errors
///
/// QEMU does not answer.
pub(super) async fn close(instance: &Instance) -> Result<(), qmp::Error> {
    ignore_refusal(instance.execute("nbd-server-stop", None).await)
}

/// The source: begins to copy. The key is in place.
///
/// # Errors
///
/// QEMU refuses. Nothing is left of it, unless QEMU does not answer.
pub(super) async fn begin(instance: &Instance, to: &DisksTo, bytes_per_second: u64) -> Result<(), Error> {
    cancel(instance).await?;
    let begun = begin_all(instance, to, bytes_per_second).await;
    if begun.is_err() {
        cancel(instance).await?;
    }
    begun
}

async fn begin_all(instance: &Instance, to: &DisksTo, bytes_per_second: u64) -> Result<(), Error> {
    reach(to.address).await?;
    let server = json!({ "type": "inet", "host": to.address.ip().to_string(), "port": to.address.port().to_string() });
    let count = u64::try_from(to.nodes.copied.len()).unwrap_or(u64::MAX).max(1);
    // 0 stays "no limit".
    let speed = if bytes_per_second == 0 { 0 } else { (bytes_per_second / count).max(1) };
    check_nodes(instance, &to.nodes).await?;
    for (index, disk) in to.nodes.copied.iter().enumerate() {
        let node = format!("{NAME}{index}");
        let target = json!({
            "driver": "nbd",
            "node-name": node,
            "server": server,
            "export": disk,
            "tls-creds": CREDENTIALS,
            "discard": "unmap",
            "open-timeout": OPEN_TIMEOUT,
        });
        instance.execute("blockdev-add", Some(target)).await?;
    }
    for (index, disk) in to.nodes.copied.iter().enumerate() {
        let node = format!("{NAME}{index}");
        let job = json!({
            "job-id": node,
            "device": disk,
            "target": node,
            // What lies in the image the target has, too.
            "sync": "top",
            // No write of the guest waits for the target, which may be gone. A guest that always writes faster than that can be
            // copied does not get there.
            "copy-mode": "background",
            "speed": speed,
            // The guest must not suffer.
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-dismiss": false,
        });
        instance.execute("blockdev-mirror", Some(job)).await?;
    }
    Ok(())
}

/// Whether the target can be reached.
async fn reach(address: SocketAddr) -> Result<(), Error> {
    let unreachable = |why: String| Error::Unreachable { address, why };
    match time::timeout(CONNECT_LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(unreachable(error.to_string())),
        Err(_) => Err(unreachable(format!("no answer within {} s", CONNECT_LIMIT.as_secs()))),
    }
}

/// The source, whose guest stands still before the last of it: ends the copying. Then both sides are the same (M5).
///
/// # Errors
///
/// A disk is not the same on both sides. The rest is left as it is.
pub(super) async fn finish(instance: &Instance) -> Result<(), Error> {
    for job in jobs(instance).await? {
        match job.state {
            JobState::Ready => {
                // The guest stands still, so there is nobody to spare.
                let unlimited = json!({ "device": job.id, "speed": 0 });
                instance.execute("block-job-set-speed", Some(unlimited)).await?;
                // Of one that is ready this is the good end: it ends with both sides the same, and stays with this one.
                instance.execute("block-job-cancel", Some(json!({ "device": job.id }))).await?;
            }
            JobState::Ended => {}
            JobState::Copying => return Err(Error::NotCopied(format!("{} is not copied yet", job.id))),
            JobState::Failed(problem) => return Err(Error::NotCopied(problem)),
        }
    }
    for job in ended(instance).await? {
        if let JobState::Failed(problem) = job.state {
            return Err(Error::NotCopied(problem));
        }
        instance.execute("job-dismiss", Some(json!({ "id": job.id }))).await?;
    }
    remove_nodes(instance).await
}

/// The source: gives the copying up. Nothing is left of it.
///
/// # Errors
///
/// QEMU does not answer, or not in time.
pub(super) async fn cancel(instance: &Instance) -> Result<(), Error> {
    cut(instance).await?;
    for job in jobs(instance).await? {
        match job.state {
            JobState::Copying | JobState::Ready => {
                let arguments = json!({ "device": job.id, "force": true });
                ignore_refusal(instance.execute("block-job-cancel", Some(arguments)).await)?;
            }
            JobState::Ended | JobState::Failed(_) => {}
        }
    }
    for job in ended(instance).await? {
        ignore_refusal(instance.execute("job-dismiss", Some(json!({ "id": job.id }))).await)?;
    }
    remove_nodes(instance).await
}

/// The source: cuts the connections to the target. A job ends only when what it has begun has ended, and so does much else in QEMU;
/// a target that is gone would keep it from that for as long as TCP has patience.
///
/// # Errors
///
/// QEMU does not answer.
pub(super) async fn cut(instance: &Instance) -> Result<(), qmp::Error> {
    // At once, because QEMU's main thread may be what waits for them; so it cannot be asked which there are.
    for index in 0..MOST_DISKS {
        let connection = json!([{ "type": "block-node", "node-name": format!("{NAME}{index}") }]);
        match instance.execute_at_once("yank", Some(json!({ "instances": connection }))).await {
            Ok(_) => {}
            Err(qmp::Error::Refused { .. }) => return Ok(()),
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

/// Asks QEMU for something, and cuts when it does not answer soon: when a migration ends, or stops the guest, its main thread waits, with
/// the guest, until all that its disks have under way has ended, also what is on its way to a target that is gone (QEMU 7.2).
pub(super) async fn impatiently<T>(instance: &Instance, asked: impl Future<Output = T>) -> T {
    let mut asked = pin!(asked);
    if let Ok(answer) = time::timeout(PATIENCE, &mut asked).await {
        return answer;
    }
    warn!("QEMU does not answer; the copying of its disks is cut off");
    if let Err(error) = cut(instance).await {
        warn!("it cannot be cut off: {error}");
    }
    asked.await
}

/// Waits until no job goes on. Returns how they ended.
async fn ended(instance: &Instance) -> Result<Vec<Job>, Error> {
    let wait = async {
        loop {
            let jobs = jobs(instance).await?;
            if jobs.iter().all(|job| job.concluded) {
                return Ok(jobs);
            }
            time::sleep(END_LOOK).await;
        }
    };
    time::timeout(END_LIMIT, wait).await.map_err(|_| Error::NotCopied("QEMU does not end it".to_owned()))?
}

async fn remove_nodes(instance: &Instance) -> Result<(), Error> {
    for node in nodes(instance).await? {
        instance.execute("blockdev-del", Some(json!({ "node-name": node }))).await?;
    }
    Ok(())
}

async fn nodes(instance: &Instance) -> Result<Vec<String>, qmp::Error> {
    named(instance, |node| node.starts_with(NAME)).await
}

/// The block nodes whose names are such.
async fn named(instance: &Instance, such: impl Fn(&str) -> bool) -> Result<Vec<String>, qmp::Error> {
    let nodes = instance.execute("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let names = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
    Ok(names.filter(|n| such(n)).map(str::to_owned).collect())
}

fn ignore_refusal(answer: Result<Value, qmp::Error>) -> Result<(), qmp::Error> {
    match answer {
        Ok(_) | Err(qmp::Error::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Job {
    id: String,
    state: JobState,
    /// It waits to be dismissed.
    concluded: bool,
    done: u64,
    total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum JobState {
    Copying,
    Ready,
    /// Well.
    Ended,
    Failed(String),
}

async fn jobs(instance: &Instance) -> Result<Vec<Job>, qmp::Error> {
    Ok(parse_jobs(&instance.execute("query-jobs", None).await?))
}

fn parse_jobs(answer: &Value) -> Vec<Job> {
    let ours = |job: &&Value| job["id"].as_str().is_some_and(|id| id.starts_with(NAME));
    answer.as_array().into_iter().flatten().filter(ours).map(parse_job).collect()
}

fn parse_job(job: &Value) -> Job {
    let status = job["status"].as_str().unwrap_or_default();
    let concluded = status == "concluded";
    let state = match (job["error"].as_str(), status) {
        (Some(problem), _) => JobState::Failed(problem.chars().take(500).collect()),
        (None, "ready") => JobState::Ready,
        (None, "aborting") => JobState::Failed("it was cancelled".to_owned()),
        (None, "concluded") => JobState::Ended,
        (None, _) => JobState::Copying,
    };
    let number = |field: &str| job[field].as_u64().unwrap_or(0);
    let id = job["id"].as_str().unwrap_or_default().to_owned();
    Job { id, state, concluded, done: number("current-progress"), total: number("total-progress") }
}

/// How far the copying is; what it adds to `progress`; and where disks are taken.
///
/// # Errors
///
/// QEMU does not say.
pub(super) async fn standing(
    instance: &Instance,
    progress: &mut Progress,
    address: Option<SocketAddr>,
) -> Result<(Mirror, Option<SocketAddr>), qmp::Error> {
    let jobs = jobs(instance).await?;
    for job in &jobs {
        progress.transferred_bytes = progress.transferred_bytes.saturating_add(job.done);
        progress.remaining_bytes = progress.remaining_bytes.saturating_add(job.total.saturating_sub(job.done));
    }
    let mirror = match jobs.is_empty() {
        // Half-made: whoever made them has not come back to it.
        true if !nodes(instance).await?.is_empty() => Mirror::Failed("it was interrupted".to_owned()),
        true => Mirror::None,
        false => all(&jobs),
    };
    let Some(address) = address else { return Ok((mirror, None)) };
    let exports = instance.execute("query-block-exports", None).await?;
    Ok((mirror, served_at(&exports).map(|port| SocketAddr::new(address.ip(), port))))
}

fn all(jobs: &[Job]) -> Mirror {
    let mut ready = 0;
    for job in jobs {
        match &job.state {
            JobState::Failed(problem) => return Mirror::Failed(problem.clone()),
            JobState::Ready => ready += 1,
            JobState::Copying | JobState::Ended => {}
        }
    }
    if ready == jobs.len() { Mirror::Ready(ready) } else { Mirror::Copying }
}

fn served_at(exports: &Value) -> Option<u16> {
    let ids = exports.as_array()?.iter().filter_map(|e| e["id"].as_str());
    ids.filter_map(|id| id.strip_prefix(NAME)?.split_once('-')?.0.parse().ok()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says_of_its_jobs_is_understood() {
        let job = |id: &str, status: &str, error: Option<&str>| json!({ "id": id, "type": "mirror", "status": status, "error": error, "current-progress": 3, "total-progress": 5 });
        let of = |list: &[Value]| all(&parse_jobs(&Value::from(list.to_vec())));
        assert_eq!(of(&[job("mirror-0", "running", None), job("mirror-1", "ready", None)]), Mirror::Copying);
        // Other jobs are not looked at.
        let others = [job("mirror-0", "ready", None), job("backup", "running", None), job("mirror-1", "ready", None)];
        assert_eq!(of(&others), Mirror::Ready(2));
        let failed = [job("mirror-0", "ready", None), job("mirror-1", "concluded", Some("No space left on device"))];
        assert_eq!(of(&failed), Mirror::Failed("No space left on device".into()));
        // One that has ended is not the same on both sides any more, if the guest goes on.
        assert_eq!(of(&[job("mirror-0", "concluded", None), job("mirror-1", "ready", None)]), Mirror::Copying);
        assert_eq!(of(&[job("mirror-0", "aborting", None)]), Mirror::Failed("it was cancelled".into()));
    }

    #[test]
    fn the_disks_of_a_machine_are_told_from_its_other_nodes() {
        let all =
            ["disk0", "disk12", "scsi3", "disk", "scsi", "disk0x", "seed", "firmware-vars", "mirror-0", "#block12", ""];
        let disks: Vec<&str> = all.into_iter().filter(|node| is_disk(node)).collect();
        assert_eq!(disks, ["disk0", "disk12", "scsi3"]);
    }

    #[test]
    fn where_disks_are_taken_is_in_the_name_of_what_takes_them() {
        let exports = json!([{ "id": "other", "type": "nbd" }, { "id": "mirror-49153-disk0", "type": "nbd" }]);
        assert_eq!(served_at(&exports), Some(49_153));
        assert_eq!(served_at(&json!([])), None);
    }
}
