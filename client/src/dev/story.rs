//! The demonstration: three VMs that count, one host that is cut from power, and what becomes of its VMs.
//!
//! Everything that is said was measured here: times run from the moment before the first SIGKILL, states come from the
//! API, numbers from the guests' own consoles, and a thread looks at the process table all the while.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::Status;
use uncloud_proto::{
    clock::Clock,
    v1::{self, VmPhase, watch_events_response, watch_vms_response},
};

use super::{
    cluster::Cluster,
    counter::{Book, Lines},
    looker::{Looker, Sight},
};
use crate::{
    client::{Client, Options as ClientOptions, Reads},
    output::{Columns, clean, say, vm_line, vms},
    units,
    wait::{Goal, Verdict, judge},
    watch::Step,
};

/// How many VMs.
const VMS: usize = 3;
/// What the guest needs (see its init.c).
const MEMORY_MIB: u64 = 96;
const DISK_BYTES: u64 = 16 << 20;
const COMMAND_LINE: &str = "console=ttyS0 quiet";
/// How many numbers each guest writes before anything happens, so that "from where it was" is not "from the start".
const BEATS_BEFORE: usize = 4;
/// How long a step may take before the story is given up: minutes, because a guest without KVM on a busy machine is slow.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// From the cut to Running, beside the lease: the margin for clock rates, the kill allowance, and the work (P4: 10 s with
/// a lease of 6 s).
const BESIDE_LEASE: Duration = Duration::from_secs(4);

/// Tells the story on a cluster that is up. Prints on stdout.
///
/// # Errors
///
/// Which step did not hold, and why.
pub async fn tell(cluster: &mut Cluster, kernel: &Path, initrd: &Path) -> Result<(), String> {
    let client = cluster.client().clone();
    let status = client.get_status(v1::GetStatusRequest {}).await.map_err(failed_to("ask for the status"))?;
    let limit = Duration::from_millis(status.fast_lease_ms) + BESIDE_LEASE;

    say("1. A kernel with a small init becomes an image; three VMs with an empty disk each are made from it.");
    add_image(&client, kernel, initrd).await?;
    let mut guests = Vec::new();
    for n in 1..=VMS {
        guests.push(Guest::create(cluster, &client, &format!("counter-{n}")).await?);
    }
    for guest in &mut guests {
        guest.wait_until_running(&client).await?;
    }
    let table =
        vms(&guests.iter().map(|g| g.vm.clone()).collect::<Vec<_>>(), Columns::OneOwner, Clock::system().wall());
    say(&format!("\n{table}\n\n2. Each counts, aloud on its console and on its disk.\n\n"));
    for guest in &mut guests {
        guest.listen(cluster)?;
    }
    for guest in &mut guests {
        guest.wait_until_counting(cluster).await?;
    }
    for guest in &guests {
        guest
            .book()
            .lines
            .iter()
            .rev()
            .take(3)
            .rev()
            .for_each(|l| say(&format!("   {} | {}", guest.vm.name, clean(l))));
    }

    let victim = busiest_host(&guests).ok_or("no VM has a host")?;
    let revision = client.get_status(v1::GetStatusRequest {}).await.map_err(failed_to("ask for the status"))?.revision;
    let looker = Looker::start(guests.iter().map(|g| g.vm.id.clone()).collect());
    say(&format!("\n3. {victim} is cut from power: its agent, keepers and QEMUs are killed at once.\n\n"));
    let mut cut = Cut::new(cluster, victim, &guests, revision);
    let outcome = cut.follow(cluster, &mut guests).await;
    let sight = looker.finish().ok_or("the thread that looks at the process table came to grief")?;
    outcome?;

    say("\n4. What was claimed, and what was measured:\n\n");
    cut.check(&guests, cluster, &sight, limit)
}

/// One VM of the story.
struct Guest {
    vm: v1::Vm,
    /// What it says is written down with times from here on.
    from: Instant,
    book: Arc<Mutex<Book>>,
    listener: Option<JoinHandle<()>>,
}

impl Guest {
    async fn create(cluster: &mut Cluster, client: &Client, name: &str) -> Result<Self, String> {
        let spec = v1::VmSpec {
            memory_mib: MEMORY_MIB,
            kernel: Some(v1::KernelBoot { image: "counter".to_owned(), command_line: COMMAND_LINE.to_owned() }),
            disks: vec![v1::Disk { size_bytes: DISK_BYTES, ..Default::default() }],
            ..Default::default()
        };
        let request = v1::CreateVmRequest { name: name.to_owned(), spec: Some(spec), ..Default::default() };
        let answer = client.create_vm(request).await.map_err(failed_to(&format!("create {name}")))?;
        check_children(cluster)?;
        let vm = answer.vm.ok_or("the controller answered without a VM")?;
        Ok(Self { vm, from: Instant::now(), book: Arc::default(), listener: None })
    }

    async fn wait_until_running(&mut self, client: &Client) -> Result<(), String> {
        let request = v1::WatchVmsRequest { vm: self.vm.id.clone(), ..Default::default() };
        let mut watch = client.watch_vms(request);
        let vm = &mut self.vm;
        let running = async {
            loop {
                let step = watch.next().await.map_err(failed_to("watch a VM"))?;
                let Step::Answer(v1::WatchVmsResponse { event: Some(watch_vms_response::Event::Vm(now)), .. }) = step
                else {
                    continue;
                };
                *vm = now;
                match judge(&Goal::Running, vm) {
                    Verdict::Reached => return Ok(()),
                    Verdict::Hopeless(why) => return Err(format!("{}: {why}", vm_line(vm))),
                    Verdict::Wait => {}
                }
            }
        };
        let outcome = timeout(STEP_LIMIT, running).await;
        outcome.map_err(|_| format!("it does not run after {}: {}", units::duration(STEP_LIMIT), vm_line(&self.vm)))?
    }

    /// Begins to write down what it says, on the host where it is now.
    fn listen(&mut self, cluster: &Cluster) -> Result<(), String> {
        // Short, so that a try that goes to a host that is gone does not delay what is measured.
        let timeout = Duration::from_millis(500);
        let options =
            ClientOptions { endpoints: vec![cluster.address().to_string()], timeout, reads: Reads::default() };
        let client = Client::new(options).map_err(|e| e.to_string())?;
        if let Some(old) = self.listener.take() {
            old.abort();
        }
        self.listener = Some(tokio::spawn(listen(client, self.vm.id.clone(), self.from, Arc::clone(&self.book))));
        Ok(())
    }

    async fn wait_until_counting(&mut self, cluster: &mut Cluster) -> Result<(), String> {
        let deadline = Instant::now() + STEP_LIMIT;
        loop {
            check_children(cluster)?;
            {
                let book = self.book();
                if book.last().is_some_and(|c| book.beats_of(&c.boot) >= BEATS_BEFORE) {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    let last = book.lines.last().map_or_else(|| "nothing at all".to_owned(), |l| clean(l));
                    return Err(format!("{} does not count; the last that it said: {last}", self.vm.name));
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self) -> &str {
        self.vm.placement.as_ref().map_or("", |p| p.host_name.as_str())
    }

    fn incarnation(&self) -> u64 {
        self.vm.placement.as_ref().map_or(0, |p| p.incarnation)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            listener.abort();
        }
    }
}

/// Writes down what a guest says, for ever: opens its log again when it breaks off. What is kept of a log is sent from
/// its beginning each time, so a line may be written down twice; no question that is asked of a [`Book`] minds.
async fn listen(client: Client, vm: String, from: Instant, book: Arc<Mutex<Book>>) {
    loop {
        let request = v1::GetVmLogRequest { vm: vm.clone(), follow: true, ..Default::default() };
        if let Ok(mut log) = client.get_vm_log(request).await {
            let mut lines = Lines::default();
            while let Ok(Some(piece)) = log.message().await {
                let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
                lines.feed(&piece.data).into_iter().for_each(|line| book.note(from.elapsed(), line));
            }
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// What is remembered of a VM at the cut, and what becomes of it.
struct Moved {
    name: String,
    incarnation: u64,
    boot: String,
    /// Largest number that it wrote before the cut.
    number: u64,
    went_to: Option<(Duration, String)>,
    running: Option<Duration>,
}

/// A host without power, and what follows.
struct Cut {
    victim: String,
    /// VMs of that host, by id.
    moved: BTreeMap<String, Moved>,
    /// VMs of other hosts, by id: their boot and largest number at the cut.
    others: BTreeMap<String, (String, u64)>,
    declared_dead: Option<Duration>,
    revision: i64,
    client: Client,
    /// The moment of the cut, and the same on the guests' clocks.
    at: Instant,
}

impl Cut {
    fn new(cluster: &Cluster, victim: String, guests: &[Guest], revision: i64) -> Self {
        let (mut moved, mut others) = (BTreeMap::new(), BTreeMap::new());
        for guest in guests {
            let Some((boot, number)) = guest.book().last().map(|c| (c.boot.clone(), c.number)) else { continue };
            if guest.host() == victim {
                let (name, incarnation) = (guest.vm.name.clone(), guest.incarnation());
                moved.insert(
                    guest.vm.id.clone(),
                    Moved { name, incarnation, boot, number, went_to: None, running: None },
                );
            } else {
                others.insert(guest.vm.id.clone(), (boot, number));
            }
        }
        let client = cluster.client().clone();
        Self { victim, moved, others, declared_dead: None, revision, client, at: Instant::now() }
    }

    /// Cuts the power and watches until every VM of the host counts again elsewhere.
    async fn follow(&mut self, cluster: &mut Cluster, guests: &mut [Guest]) -> Result<(), String> {
        let mut events =
            self.client.watch_events(v1::WatchEventsRequest { from_revision: self.revision, ..Default::default() });
        let mut changes =
            self.client.watch_vms(v1::WatchVmsRequest { from_revision: self.revision, ..Default::default() });
        self.at = Instant::now();
        let killed = cluster.cut_power(&self.victim).await.map_err(|e| format!("cut {}: {e}", self.victim))?;
        say(&format!("   {:>8}  {killed} processes of {} are dead", stamp(self.at.elapsed()), self.victim));
        self.read_last_words(cluster, guests);

        let deadline = Instant::now() + STEP_LIMIT;
        while !self.is_over(guests) {
            if Instant::now() >= deadline {
                return Err(self.unfinished(guests));
            }
            check_children(cluster)?;
            tokio::select! {
                biased;
                step = events.next() => self.note_event(step.map_err(failed_to("watch events"))?),
                step = changes.next() => {
                    let step = step.map_err(failed_to("watch VMs"))?;
                    if let Some(vm) = self.note_change(step) {
                        for guest in guests.iter_mut().filter(|g| g.vm.id == vm.id) {
                            let moved = vm.placement.as_ref().map_or(0, |p| p.incarnation) != guest.incarnation();
                            guest.vm = vm.clone();
                            if moved {
                                guest.listen(cluster)?;
                            }
                        }
                    }
                }
                () = sleep(Duration::from_millis(20)) => {}
            }
        }
        Ok(())
    }

    /// What the guests wrote to their consoles right up to the cut may not all have come to us over the API. The dead
    /// host's disk has it: the directory of its agent is on this machine.
    fn read_last_words(&mut self, cluster: &Cluster, guests: &[Guest]) {
        let Some(host) = cluster.hosts().iter().find(|h| h.name == self.victim) else { return };
        for guest in guests {
            let Some(moved) = self.moved.get_mut(&guest.vm.id) else { continue };
            let log = host.state_dir.join("vms").join(&guest.vm.id).join("run/serial.log");
            let mut book = Book::default();
            let bytes = fs::read(log).unwrap_or_default();
            Lines::default().feed(&bytes).into_iter().for_each(|line| book.note(Duration::ZERO, line));
            moved.number = moved.number.max(book.largest_of(&moved.boot).unwrap_or(0));
            let words = format!("the last number of {} was {}", moved.name, moved.number);
            say(&format!("   {:>8}  {words}", stamp(self.at.elapsed())));
        }
    }

    fn note_event(&mut self, step: Step<v1::WatchEventsResponse>) {
        let Step::Answer(v1::WatchEventsResponse { step: Some(watch_events_response::Step::Event(event)), .. }) = step
        else {
            return;
        };
        // `HostLapsed` frees its VMs that live under the short lease, as these do; `HostDead` frees all.
        let is_death = matches!(event.r#type.as_str(), "HostLapsed" | "HostDead");
        if is_death && event.subject_name == self.victim && self.declared_dead.is_none() {
            let at = self.at.elapsed();
            self.declared_dead = Some(at);
            let words = format!("{} is declared dead: {}", self.victim, event.message);
            say(&format!("   {:>8}  {}", stamp(at), clean(&words)));
        }
    }

    fn note_change(&mut self, step: Step<v1::WatchVmsResponse>) -> Option<v1::Vm> {
        let Step::Answer(v1::WatchVmsResponse { event: Some(watch_vms_response::Event::Vm(vm)), .. }) = step else {
            return None;
        };
        let moved = self.moved.get_mut(&vm.id)?;
        let placement = vm.placement.as_ref().filter(|p| p.incarnation > moved.incarnation)?;
        let at = self.at.elapsed();
        if moved.went_to.is_none() {
            moved.went_to = Some((at, placement.host_name.clone()));
            let words =
                format!("{} goes to {} (incarnation {})", moved.name, placement.host_name, placement.incarnation);
            say(&format!("   {:>8}  {}", stamp(at), clean(&words)));
        }
        let status = vm.status.as_ref()?;
        let is_running = status.phase() == VmPhase::Running && status.incarnation == placement.incarnation;
        if is_running && moved.running.is_none() {
            moved.running = Some(at);
            let words = format!("{} is Running on {}", moved.name, placement.host_name);
            say(&format!("   {:>8}  {}", stamp(at), clean(&words)));
        }
        Some(vm)
    }

    fn is_over(&self, guests: &[Guest]) -> bool {
        let counts_again = |id: &String, m: &Moved| {
            let guest = guests.iter().find(|g| g.vm.id == *id);
            guest.is_some_and(|g| g.book().first_count_after(&m.boot).is_some())
        };
        self.declared_dead.is_some()
            && self.moved.iter().all(|(id, m)| m.went_to.is_some() && m.running.is_some() && counts_again(id, m))
    }

    fn unfinished(&self, guests: &[Guest]) -> String {
        let dead = if self.declared_dead.is_some() { "" } else { "; its death was not declared" };
        let vms: Vec<String> = guests.iter().map(|g| vm_line(&g.vm)).collect();
        format!("{} after {} was cut{dead}: {}", units::duration(STEP_LIMIT), self.victim, vms.join("; "))
    }

    /// Compares what was claimed with what was measured, and prints each.
    fn check(&self, guests: &[Guest], cluster: &mut Cluster, sight: &Sight, limit: Duration) -> Result<(), String> {
        let mut claims = Claims::default();
        let dead = self.declared_dead.unwrap_or_default();
        claims.add(true, format!("{} was declared dead {} after the cut", self.victim, seconds(dead)));
        let cut_on_guests_clock = |g: &Guest| self.at.saturating_duration_since(g.from);
        for (id, moved) in &self.moved {
            let Some(guest) = guests.iter().find(|g| g.vm.id == *id) else { continue };
            let book = guest.book();
            let (name, number) = (&moved.name, moved.number);
            let running = moved.running.unwrap_or_default();
            claims.add(
                running <= limit,
                format!("{name} was Running again {} after the cut (limit {})", seconds(running), seconds(limit)),
            );
            let word = book.first_word_after(&moved.boot).map(|at| at.saturating_sub(cut_on_guests_clock(guest)));
            claims.add(
                word.is_some(),
                format!("{name} said its first new line {} after the cut", seconds(word.unwrap_or_default())),
            );
            let first = book.first_count_after(&moved.boot).unwrap_or(0);
            claims.add(
                first >= number && first > 1,
                format!("{name} went on counting at {first}; its last number before the cut was {number}"),
            );
        }
        for (id, (boot, number)) in &self.others {
            let Some(guest) = guests.iter().find(|g| g.vm.id == *id) else { continue };
            let book = guest.book();
            let last = book.largest_of(boot).unwrap_or(0);
            let undisturbed = book.first_word_after(boot).is_none() && last > *number;
            let name = &guest.vm.name;
            claims.add(undisturbed, format!("{name}, on another host, was not disturbed: from {number} to {last}"));
        }
        let split = guests.iter().find_map(|g| g.book().split_brain.clone());
        let words =
            split.map_or_else(|| "no guest found anything on its disk that it had not written".into(), |l| clean(&l));
        claims.add(!words.contains("SPLITBRAIN"), words);
        let looks = format!("{} looks, never more than {} apart", sight.looks, units::duration(sight.longest_pause));
        let doubles: Vec<String> = sight.doubles.iter().map(|(vm, n)| format!("{n} of {vm}")).collect();
        if doubles.is_empty() {
            claims.add(true, format!("no two QEMU processes of one VM at any moment ({looks})"));
        } else {
            claims.add(false, format!("QEMU processes at the same time: {} ({looks})", doubles.join(", ")));
        }
        check_children(cluster)?;
        claims.verdict()
    }
}

/// What is claimed at the end.
#[derive(Default)]
struct Claims {
    broken: Vec<String>,
}

impl Claims {
    fn add(&mut self, holds: bool, words: String) {
        say(&format!("   {} {words}", if holds { "ok  " } else { "NOT " }));
        if !holds {
            self.broken.push(words);
        }
    }

    fn verdict(self) -> Result<(), String> {
        if self.broken.is_empty() { Ok(()) } else { Err(self.broken.join("; ")) }
    }
}

async fn add_image(client: &Client, kernel: &Path, initrd: &Path) -> Result<(), String> {
    let file = |role: v1::ImageFileRole, path: &Path| {
        let path = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let source = path.to_str().ok_or_else(|| format!("{} is not valid UTF-8", path.display()))?.to_owned();
        Ok::<_, String>(v1::ImageFile { role: role.into(), source, ..Default::default() })
    };
    let request = v1::CreateImageRequest {
        name: "counter".to_owned(),
        kind: v1::ImageKind::Kernel.into(),
        files: vec![file(v1::ImageFileRole::Kernel, kernel)?, file(v1::ImageFileRole::Initrd, initrd)?],
        command_line: COMMAND_LINE.to_owned(),
        ..Default::default()
    };
    client.create_image(request).await.map(|_| ()).map_err(failed_to("add the image"))
}

/// The host with the most VMs; of several, the first by name.
fn busiest_host(guests: &[Guest]) -> Option<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    guests.iter().map(Guest::host).filter(|h| !h.is_empty()).for_each(|h| *counts.entry(h).or_default() += 1);
    let most = counts.values().max().copied()?;
    counts.into_iter().find(|(_, n)| *n == most).map(|(name, _)| name.to_owned())
}

/// A process of the cluster that has ended by itself ends the story, too.
fn check_children(cluster: &mut Cluster) -> Result<(), String> {
    match cluster.deaths().into_iter().next() {
        Some(death) => Err(death.to_string()),
        None => Ok(()),
    }
}

/// Says which step a refusal stopped.
fn failed_to(what: &str) -> impl FnOnce(Status) -> String {
    let what = what.to_owned();
    move |status| format!("cannot {what}: {}", status.message())
}

/// A time from the cut on.
fn stamp(d: Duration) -> String {
    format!("+{}", seconds(d))
}

fn seconds(d: Duration) -> String {
    format!("{:.2} s", d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(name: &str, host: &str) -> Guest {
        let placement = v1::Placement { host_name: host.to_owned(), ..Default::default() };
        let vm = v1::Vm { name: name.to_owned(), placement: Some(placement), ..Default::default() };
        Guest { vm, from: Instant::now(), book: Arc::default(), listener: None }
    }

    #[test]
    fn the_host_with_the_most_vms_is_cut_and_the_choice_is_always_the_same() {
        assert_eq!(busiest_host(&[guest("a", "h2"), guest("b", "h1"), guest("c", "h2")]).as_deref(), Some("h2"));
        assert_eq!(busiest_host(&[guest("a", "h3"), guest("b", "h1"), guest("c", "h2")]).as_deref(), Some("h1"));
        assert_eq!(busiest_host(&[guest("a", "")]), None);
    }

    #[test]
    fn one_claim_that_does_not_hold_breaks_the_story() {
        let mut claims = Claims::default();
        claims.add(true, "a".to_owned());
        claims.add(false, "b".to_owned());
        assert_eq!(claims.verdict(), Err("b".to_owned()));
        assert_eq!(Claims::default().verdict(), Ok(()));
    }
}
