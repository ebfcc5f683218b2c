//! One VM that executes: commands to its QEMU, and what happens to it.
//!
//! A task per instance watches the two processes and keeps a QMP connection, making a new one when it breaks. What it
//! learns is kept as facts (*the guest has shut down*), not as a queue: nothing can overflow, and what happened while there
//! was no connection is asked for. So an event may come twice.

use std::{
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tokio::{
    net::UnixStream,
    sync::{Mutex as AsyncMutex, Notify, watch},
    task::AbortHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use uncloud_proto::ids::{Incarnation, VmId};
use uuid::Uuid;

use super::{
    command_line::{QMP_SOCKETS, qmp_socket},
    disks,
    files::{self, Exit, KeeperRecord},
    guest_agent,
    pidfd::Process,
    qmp::{self, Client, Event, Events},
};
use crate::vm::disks::GuestThen;

/// How long a command waits for a connection when there is none.
const LINK_LIMIT: Duration = Duration::from_secs(2);
/// How long to wait before a broken connection is tried again.
const LINK_PAUSE: Duration = Duration::from_millis(200);
/// In the VM's directory: its guest's file systems may be held still.
const FROZEN: &str = "frozen";
/// How long a guest holds its file systems still at the most for a snapshot that another host takes. Its programs wait when they write.
const HOLD_LIMIT: Duration = Duration::from_secs(10);
/// How often a guest is told at once to let its file systems go on. Then every few seconds, while its agent has the channel open.
const THAW_TRIES: usize = 2;
/// How long QEMU may outlive its keeper before it is killed once more and that is worth a line in the log. It takes
/// a few milliseconds.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// What happens to a VM that executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceEvent {
    /// The guest powered itself off. QEMU waits, stopped; `quit` ends it.
    GuestShutdown,
    /// The guest's kernel panicked. QEMU waits, stopped.
    GuestPanicked,
    /// The guest reset the machine; it goes on.
    GuestReset,
    /// The guest's agent has said which addresses the guest has.
    GuestAddresses(Vec<IpAddr>),
    /// Its migration is further, or over.
    MigrationMoved,
    /// A disk's pool is full, and QEMU holds the guest still.
    Stalled,
    /// A disk could not be read or written, and the guest was told so. What and why, in words.
    DiskFailed(String),
    /// QEMU and its keeper are gone.
    Ended(Exit),
}

/// A connection to QEMU.
pub(super) type Link = (Client, Events);

/// A VM that executes. Dropping it changes nothing for the VM; [`adopt`](super::process::adopt) finds it again.
///
/// Every command is bounded in time. One that found no connection waits a moment for the next.
#[derive(Debug)]
pub struct Instance {
    incarnation: Incarnation,
    lease_generation: u16,
    qemu_pid: u32,
    qemu: Option<Process>,
    link: watch::Receiver<Option<Arc<Client>>>,
    facts: Arc<Facts>,
    vm_dir: PathBuf,
    record: KeeperRecord,
    agent_open: watch::Receiver<bool>,
    watcher: AbortHandle,
    held: AsyncMutex<Option<Held>>,
}

/// A guest that holds its file systems still.
#[derive(Debug)]
struct Held {
    id: Uuid,
    /// It is let go then, whatever becomes of what it is held for.
    until: Instant,
    timer: AbortHandle,
}

impl Instance {
    /// Takes up the watch.
    pub(super) fn watch(vm_dir: &Path, record: KeeperRecord, processes: Processes, link: Option<Link>) -> Self {
        let facts = Arc::new(Facts::default());
        let (connected, receiver) = watch::channel(None);
        let qemu = processes.qemu.clone();
        let (agent, agent_open) = watch::channel(false);
        facts.thaw_due.store(vm_dir.join(FROZEN).exists(), Ordering::SeqCst);
        let watcher = Watcher {
            vm_dir: vm_dir.to_owned(),
            record: record.clone(),
            facts: facts.clone(),
            connected,
            agent_open: agent,
        };
        let watcher = tokio::spawn(watcher.run(processes, link)).abort_handle();
        Self {
            incarnation: record.incarnation,
            lease_generation: record.lease_generation,
            qemu_pid: record.qemu_pid,
            qemu,
            link: receiver,
            facts,
            vm_dir: vm_dir.to_owned(),
            record,
            agent_open,
            watcher,
            held: AsyncMutex::new(None),
        }
    }

    /// Which incarnation of the VM it is.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Under which generation of its lease it was started.
    #[must_use]
    pub fn lease_generation(&self) -> u16 {
        self.lease_generation
    }

    /// QEMU's process id. For people: signals go through a pidfd.
    #[must_use]
    pub fn qemu_pid(&self) -> u32 {
        self.qemu_pid
    }

    /// Presses the power button. What the guest makes of it is up to the guest.
    ///
    /// # Errors
    ///
    /// See [`qmp::Error`]; this holds for all commands.
    pub async fn power_down(&self) -> Result<(), qmp::Error> {
        self.execute("system_powerdown", None).await.map(drop)
    }

    /// Presses the reset button. A machine that is stopped stays stopped until [`Instance::cont`].
    ///
    /// # Errors
    ///
    /// See [`qmp::Error`].
    pub async fn reset(&self) -> Result<(), qmp::Error> {
        self.execute("system_reset", None).await.map(drop)
    }

    /// Lets a machine that is stopped run.
    ///
    /// # Errors
    ///
    /// See [`qmp::Error`].
    pub async fn cont(&self) -> Result<(), qmp::Error> {
        self.execute("cont", None).await.map(drop)
    }

    /// Lets QEMU end by itself, after it has flushed its disks. [`InstanceEvent::Ended`] says when it is gone.
    ///
    /// # Errors
    ///
    /// See [`qmp::Error`].
    pub async fn quit(&self) -> Result<(), qmp::Error> {
        match self.execute("quit", None).await {
            // It may be gone before its answer is.
            Ok(_) | Err(qmp::Error::Closed) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// QEMU's word for what the machine is doing, as `running`.
    ///
    /// # Errors
    ///
    /// See [`qmp::Error`].
    pub async fn status(&self) -> Result<String, qmp::Error> {
        let answer = self.execute("query-status", None).await?;
        answer["status"].as_str().map(str::to_owned).ok_or_else(|| qmp::Error::Protocol(answer.to_string()))
    }

    /// Kills QEMU. The keeper then writes down how it ended.
    pub fn kill(&self) {
        if let Some(qemu) = &self.qemu {
            qemu.kill();
        }
    }

    /// Has the guest hold its file systems still, if it has an agent that can. Follow with [`Instance::thaw`], whatever comes.
    ///
    /// Says what it does: nothing of it can be relied on but that an agent in it has said so.
    pub(super) async fn freeze(&self) -> GuestThen {
        if !*self.agent_open.borrow() {
            return GuestThen::Ran;
        }
        // What was due of an earlier time is not due of this one.
        self.facts.thaw_due.store(false, Ordering::SeqCst);
        // An agent that is started again lets them go on (`ask_guest`).
        if let Err(e) = std::fs::write(self.vm_dir.join(FROZEN), "") {
            tracing::warn!(vm = %self.record.vm, "the guest's file systems are not held still: {e}");
            return GuestThen::Ran;
        }
        match guest_agent::freeze(&self.vm_dir, &self.record).await {
            Ok(()) => GuestThen::Frozen,
            Err(e) => {
                tracing::warn!(vm = %self.record.vm, "the guest does not say that it holds its file systems still: {e}");
                GuestThen::Ran
            }
        }
    }

    /// Lets the guest's file systems go on, if they may be held still. Returns whether the guest says that they were until now.
    pub(super) async fn thaw(&self) -> bool {
        if !self.vm_dir.join(FROZEN).exists() {
            return false;
        }
        match thawed(&self.vm_dir, &self.record).await {
            Some(file_systems) => file_systems > 0,
            None => {
                self.facts.thaw_due.store(true, Ordering::SeqCst);
                self.facts.thaw.notify_one();
                false
            }
        }
    }

    /// Has the guest hold its file systems still until [`Instance::let_go`], or for [`HOLD_LIMIT`]. Returns which hold stands; none, if the
    /// guest cannot, or the one that stood has been over for that long.
    pub(super) async fn hold(&self) -> Option<Uuid> {
        let mut held = self.held.lock().await;
        if let Some(held) = &*held {
            return (Instant::now() < held.until).then_some(held.id);
        }
        let until = Instant::now() + HOLD_LIMIT;
        match self.freeze().await {
            GuestThen::Frozen => {
                let facts = Arc::clone(&self.facts);
                let timer = tokio::spawn(async move {
                    sleep_until(until).await;
                    facts.thaw_due.store(true, Ordering::SeqCst);
                    facts.thaw.notify_one();
                });
                let id = Uuid::new_v4();
                *held = Some(Held { id, until, timer: timer.abort_handle() });
                Some(id)
            }
            GuestThen::Ran | GuestThen::Off => {
                self.thaw().await;
                None
            }
        }
    }

    /// Lets the guest's file systems go on. Returns the hold that stood until now: a guest that was started again meanwhile, or that gave up
    /// by itself, says that nothing stood still.
    pub async fn let_go(&self) -> Option<Uuid> {
        let Held { id, until, timer } = self.held.lock().await.take()?;
        timer.abort();
        let in_time = Instant::now() < until;
        let stood = self.thaw().await;
        (in_time && stood).then_some(id)
    }

    /// The next thing that happens. Cancel safe. After [`InstanceEvent::Ended`] it pends for ever.
    pub async fn next_event(&mut self) -> InstanceEvent {
        loop {
            if let Some(event) = self.facts.take() {
                return event;
            }
            self.facts.changed.notified().await;
        }
    }

    pub(super) async fn execute(&self, command: &str, arguments: Option<Value>) -> Result<Value, qmp::Error> {
        self.client().await?.execute(command, arguments).await
    }

    /// [`qmp::Client::execute_at_once`]
    pub(super) async fn execute_at_once(&self, command: &str, arguments: Option<Value>) -> Result<Value, qmp::Error> {
        self.client().await?.execute_at_once(command, arguments).await
    }

    async fn client(&self) -> Result<Arc<Client>, qmp::Error> {
        let mut link = self.link.clone();
        match timeout(LINK_LIMIT, link.wait_for(Option::is_some)).await {
            Ok(Ok(client)) => client.clone().ok_or(qmp::Error::NotConnected),
            Ok(Err(_)) | Err(_) => Err(qmp::Error::NotConnected),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(held) = self.held.get_mut() {
            held.timer.abort();
        }
        self.watcher.abort();
    }
}

/// What happened and has not been told yet.
#[derive(Debug, Default)]
struct Facts {
    now: Mutex<Untold>,
    changed: Notify,
    /// The guest's file systems may be held still, and nobody wants that any more.
    thaw_due: AtomicBool,
    /// That has just become so.
    thaw: Notify,
}

#[derive(Debug, Default)]
struct Untold {
    reset: bool,
    moved: bool,
    panicked: bool,
    shutdown: bool,
    stalled: bool,
    disk_failed: Option<String>,
    addresses: Option<Vec<IpAddr>>,
    ended: Option<Exit>,
}

impl Facts {
    fn untold(&self) -> MutexGuard<'_, Untold> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, event: InstanceEvent) {
        let mut untold = self.untold();
        match event {
            InstanceEvent::GuestReset => untold.reset = true,
            InstanceEvent::MigrationMoved => untold.moved = true,
            InstanceEvent::GuestPanicked => untold.panicked = true,
            InstanceEvent::GuestShutdown => untold.shutdown = true,
            InstanceEvent::Stalled => untold.stalled = true,
            InstanceEvent::DiskFailed(words) => untold.disk_failed = Some(words),
            InstanceEvent::GuestAddresses(addresses) => untold.addresses = Some(addresses),
            InstanceEvent::Ended(exit) => untold.ended = Some(exit),
        }
        drop(untold);
        self.changed.notify_one();
    }

    /// In an order that makes sense whenever several have come together: the end comes last.
    fn take(&self) -> Option<InstanceEvent> {
        let mut untold = self.untold();
        if std::mem::take(&mut untold.reset) {
            Some(InstanceEvent::GuestReset)
        } else if std::mem::take(&mut untold.moved) {
            Some(InstanceEvent::MigrationMoved)
        } else if std::mem::take(&mut untold.panicked) {
            Some(InstanceEvent::GuestPanicked)
        } else if std::mem::take(&mut untold.shutdown) {
            Some(InstanceEvent::GuestShutdown)
        } else if std::mem::take(&mut untold.stalled) {
            Some(InstanceEvent::Stalled)
        } else if let Some(words) = untold.disk_failed.take() {
            Some(InstanceEvent::DiskFailed(words))
        } else if let Some(addresses) = untold.addresses.take() {
            Some(InstanceEvent::GuestAddresses(addresses))
        } else {
            untold.ended.take().map(InstanceEvent::Ended)
        }
    }
}

/// The task behind an [`Instance`].
struct Watcher {
    vm_dir: PathBuf,
    record: KeeperRecord,
    facts: Arc<Facts>,
    connected: watch::Sender<Option<Arc<Client>>>,
    /// Whether somebody in the guest has the agent's channel open.
    agent_open: watch::Sender<bool>,
}

impl Watcher {
    async fn run(self, processes: Processes, link: Option<Link>) {
        let exit = tokio::select! {
            exit = self.end(&processes) => exit,
            never = self.listen(link) => match never {},
            never = self.ask_guest() => match never {},
        };
        self.connected.send_replace(None);
        self.facts.add(InstanceEvent::Ended(exit));
    }

    /// Until keeper and QEMU are gone.
    async fn end(&self, processes: &Processes) -> Exit {
        if let Some(process) = &processes.keeper {
            process.gone().await;
        }
        if let Some(qemu) = &processes.qemu {
            // Dead already if the keeper has seen its end; otherwise the kernel kills it now.
            while timeout(DEATH_LIMIT, qemu.gone()).await.is_err() {
                tracing::warn!(vm = %self.record.vm, pid = qemu.pid(), "QEMU has outlived its keeper; killing it");
                qemu.kill();
            }
        }
        files::read_exit(&self.vm_dir, self.record.vm)
            .unwrap_or_else(|| files::keeper_killed(&self.vm_dir, self.record.incarnation))
    }

    /// Keeps a connection and hears what happens.
    async fn listen(&self, mut link: Option<Link>) -> std::convert::Infallible {
        loop {
            if let Some((client, mut events)) = link.take() {
                self.hear(Arc::new(client), &mut events).await;
                self.connected.send_replace(None);
            }
            sleep(LINK_PAUSE).await;
            link = connect_any(&self.vm_dir, &self.record).await;
        }
    }

    async fn hear(&self, client: Arc<Client>, events: &mut Events) {
        self.connected.send_replace(Some(client.clone()));
        // What happened while nobody listened.
        match client.execute("query-status", None).await {
            Ok(answer) => match answer["status"].as_str() {
                Some("shutdown") => self.facts.add(InstanceEvent::GuestShutdown),
                Some("guest-panicked") => self.facts.add(InstanceEvent::GuestPanicked),
                Some("io-error") => self.facts.add(InstanceEvent::Stalled),
                Some(_) | None => {}
            },
            Err(e) => {
                tracing::debug!(vm = %self.record.vm, error = %e, "QEMU's state cannot be asked for");
                return;
            }
        }
        match client.execute("query-chardev", None).await {
            Ok(answer) => self.note_agent(guest_agent::is_open(&answer)),
            Err(e) => {
                tracing::debug!(vm = %self.record.vm, error = %e, "the guest agent's channel cannot be asked for")
            }
        }
        drop(client);
        while let Some(event) = events.next().await {
            if let Some(open) = guest_agent::opened(&event) {
                self.note_agent(open);
            }
            if let Some(event) = meaning(&event) {
                self.facts.add(event);
            }
        }
    }
}

impl Watcher {
    fn note_agent(&self, open: bool) {
        self.agent_open.send_if_modified(|was| std::mem::replace(was, open) != open);
    }

    /// Asks the guest's agent for its addresses now and then, while there is one. The guest decides what comes back, so it is
    /// bounded in size and time, and how often a guest makes itself be asked is, too.
    async fn ask_guest(&self) -> std::convert::Infallible {
        let mut open = self.agent_open.subscribe();
        loop {
            if open.wait_for(|open| *open).await.is_err() {
                return std::future::pending().await; // cannot be: the sender lives as long as this
            }
            // First of all: a guest that was held still by an agent that died.
            let due = self.facts.thaw_due.load(Ordering::SeqCst);
            let thawed = !due || thawed(&self.vm_dir, &self.record).await.is_some();
            if due && thawed {
                self.facts.thaw_due.store(false, Ordering::SeqCst);
            }
            let pause = match guest_agent::addresses(&self.vm_dir, &self.record).await {
                Ok(addresses) => {
                    self.facts.add(InstanceEvent::GuestAddresses(addresses));
                    if thawed { guest_agent::EVERY } else { guest_agent::AGAIN }
                }
                Err(e) => {
                    tracing::debug!(vm = %self.record.vm, error = %e, "the guest's agent did not answer");
                    guest_agent::AGAIN
                }
            };
            sleep(guest_agent::AT_LEAST).await;
            tokio::select! {
                () = sleep(pause) => {}
                _ = open.changed() => {}
                () = self.facts.thaw.notified() => {}
            }
        }
    }
}

/// Lets the guest's file systems go on. If it says that they do: how many stood still until now.
async fn thawed(vm_dir: &Path, record: &KeeperRecord) -> Option<u64> {
    for _ in 0..THAW_TRIES {
        match guest_agent::thaw(vm_dir, record).await {
            Ok(file_systems) => {
                let _ = std::fs::remove_file(vm_dir.join(FROZEN));
                return Some(file_systems);
            }
            Err(e) => tracing::warn!(vm = %record.vm, "the guest does not say that its file systems go on: {e}"),
        }
    }
    None
}

/// What one of QEMU's events means for the VM. Those that the agent caused itself mean nothing new.
fn meaning(event: &Event) -> Option<InstanceEvent> {
    let by_guest = event.data["guest"].as_bool() == Some(true);
    match event.name.as_str() {
        "SHUTDOWN" if by_guest && event.data["reason"] == "guest-shutdown" => Some(InstanceEvent::GuestShutdown),
        "RESET" if by_guest => Some(InstanceEvent::GuestReset),
        "MIGRATION" => Some(InstanceEvent::MigrationMoved),
        "GUEST_PANICKED" => Some(InstanceEvent::GuestPanicked),
        "BLOCK_IO_ERROR" => Some(disks::failure(&event.data)),
        _ => None,
    }
}

/// Connects to one of QEMU's QMP sockets. The error is for the log.
pub(super) async fn connect(vm_dir: &Path, record: &KeeperRecord, index: usize) -> Result<Link, qmp::Error> {
    let stream = connect_socket(vm_dir, record, &qmp_socket(index)).await?;
    let (client, events) = Client::connect(stream).await?;
    let answer = client.execute("query-uuid", None).await?;
    match answer["UUID"].as_str().map(str::parse::<VmId>) {
        Some(Ok(vm)) if vm == record.vm => Ok((client, events)),
        _ => Err(qmp::Error::Protocol(format!("it is another VM: {answer}"))),
    }
}

/// Connects to the first QMP socket that is free. Takes a few seconds if none answers.
pub(super) async fn connect_any(vm_dir: &Path, record: &KeeperRecord) -> Option<Link> {
    for index in 0..QMP_SOCKETS {
        match connect(vm_dir, record, index).await {
            Ok(link) => return Some(link),
            Err(e) => tracing::debug!(vm = %record.vm, index, error = %e, "no QMP connection"),
        }
    }
    None
}

/// Connects to a socket in the `run` directory, and makes sure that it is this VM's QEMU that serves it: the directory
/// belongs to the VM's user.
pub(super) async fn connect_socket(vm_dir: &Path, record: &KeeperRecord, name: &str) -> io::Result<UnixStream> {
    let dir = files::run_dir(vm_dir)?;
    // Through the descriptor the address is short, however long the directory's path.
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())).await?;
    match stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok()) {
        Some(pid) if pid == record.qemu_pid => Ok(stream),
        other => {
            Err(io::Error::other(format!("{name} is served by process {other:?}, not by QEMU {}", record.qemu_pid)))
        }
    }
}

/// The two processes of a VM, as far as they live.
#[derive(Debug)]
pub(super) struct Processes {
    keeper: Option<Process>,
    qemu: Option<Process>,
}

impl Processes {
    /// Finds the processes of a record of this boot.
    pub(super) fn find(record: &KeeperRecord) -> io::Result<Self> {
        Ok(Self {
            keeper: Process::find(record.keeper_pid, record.keeper_start)?,
            qemu: Process::find(record.qemu_pid, record.qemu_start)?,
        })
    }

    /// Whether QEMU was there.
    pub(super) fn qemu_lives(&self) -> bool {
        self.qemu.is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_the_guest_did_is_news() {
        let event = |name: &str, data: Value| meaning(&Event { name: name.into(), data });
        let by = |guest: bool, reason: &str| json!({ "guest": guest, "reason": reason });
        assert_eq!(event("SHUTDOWN", by(true, "guest-shutdown")), Some(InstanceEvent::GuestShutdown));
        assert_eq!(event("SHUTDOWN", by(false, "host-qmp-quit")), None);
        assert_eq!(event("SHUTDOWN", by(true, "guest-panic")), None);
        assert_eq!(event("RESET", by(true, "guest-reset")), Some(InstanceEvent::GuestReset));
        assert_eq!(event("RESET", by(false, "host-qmp-system-reset")), None);
        assert_eq!(event("GUEST_PANICKED", json!({ "action": "pause" })), Some(InstanceEvent::GuestPanicked));
        assert_eq!(event("SHUTDOWN", Value::Null), None);
    }

    #[test]
    fn the_end_is_told_last_and_once() {
        let facts = Facts::default();
        let exit = files::keeper_killed(Path::new("/nonexistent"), Incarnation(1));
        facts.add(InstanceEvent::Ended(exit.clone()));
        facts.add(InstanceEvent::GuestShutdown);
        facts.add(InstanceEvent::GuestShutdown);
        assert_eq!(facts.take(), Some(InstanceEvent::GuestShutdown));
        assert_eq!(facts.take(), Some(InstanceEvent::Ended(exit)));
        assert_eq!(facts.take(), None);
    }
}
