//! Watches, from outside, that no VM ever executes twice (P1) and that no guest loses a write (P5).
//!
//! One thread looks at the process table and reads the guests' serial logs every few milliseconds for as long as the
//! cluster lives. It trusts nothing that uncloud says: a VM is a `qemu-system-…` process with that UUID on its command
//! line; its history is what the guest wrote to its console and its disk. Two processes of one VM are allowed while it
//! migrates, as long as QEMU itself says that not both execute.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    ops::RangeInclusive,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::bail;

use crate::{
    guest::{self, Continuity, Said},
    proc_table::{self, Kind, Look, Proc},
    qmp, wait_for,
};

/// How often it looks. Two copies that live together for less than this can be missed; a failover takes seconds.
const INTERVAL: Duration = Duration::from_millis(15);
/// For how long a process may still turn into a QEMU by `exec`. After that it is not looked at again.
const SETTLES: Duration = Duration::from_secs(3);

/// One QEMU process that was seen.
#[derive(Clone, Debug)]
pub struct Instance {
    /// UUID of the VM.
    pub vm: String,
    /// Name of the host: the directory that it runs in.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// Its start time, in the kernel's ticks.
    pub start: u64,
    /// When it was first seen.
    pub first_seen: Instant,
    /// When it was last seen.
    pub last_seen: Instant,
    /// Whether the newest look found it.
    pub alive: bool,
}

/// One line of a guest's console.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was read.
    pub at: Instant,
    /// UUID of the VM.
    pub vm: String,
    /// Name of the host.
    pub host: String,
    /// The line, without its end.
    pub text: String,
}

/// One beat of a guest.
#[derive(Clone, Debug)]
pub struct Beat {
    /// When it was read.
    pub at: Instant,
    /// Name of the host.
    pub host: String,
    /// What it said.
    pub said: Said,
}

#[derive(Default)]
struct Seen {
    instances: Vec<Instance>,
    lines: Vec<Line>,
    problems: Vec<String>,
    /// Counters that a VM may go back to, because its disks were put back.
    returns: Vec<(String, RangeInclusive<u64>)>,
    longest_gap: Duration,
}

/// The checker of one cluster.
pub struct Checker {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Checker {
    /// Watches all hosts whose directories are `root/<host>/state`.
    #[must_use]
    pub fn start(root: &Path) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut watcher = Watcher {
            root: root.to_path_buf(),
            seen: Arc::clone(&seen),
            others: HashMap::new(),
            reported: HashSet::new(),
            logs: BTreeMap::new(),
            cut_lines: HashMap::new(),
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                let done = stopped.load(Ordering::Acquire);
                watcher.look();
                let now = Instant::now();
                lock(&watcher.seen, |s| s.longest_gap = s.longest_gap.max(now - last));
                last = now;
                // One more look after the stop: what was written before it counts.
                if done {
                    return;
                }
                std::thread::sleep(INTERVAL);
            }
        });
        Self { seen, stop, thread: Some(thread) }
    }

    /// All QEMU processes of a VM so far, in the order in which they were seen.
    #[must_use]
    pub fn instances(&self, vm: &str) -> Vec<Instance> {
        lock(&self.seen, |s| s.instances.iter().filter(|i| i.vm == vm).cloned().collect())
    }

    /// The QEMU process of a VM that was there at the newest look.
    #[must_use]
    pub fn running(&self, vm: &str) -> Option<Instance> {
        self.instances(vm).into_iter().rev().find(|i| i.alive)
    }

    /// All lines of a VM's console so far.
    #[must_use]
    pub fn lines(&self, vm: &str) -> Vec<Line> {
        lock(&self.seen, |s| s.lines.iter().filter(|l| l.vm == vm).cloned().collect())
    }

    /// All counters that a VM has said so far.
    #[must_use]
    pub fn beats(&self, vm: &str) -> Vec<Beat> {
        let lines = self.lines(vm).into_iter();
        lines.filter_map(|l| Some(Beat { at: l.at, said: guest::parse(&l.text)?, host: l.host })).collect()
    }

    /// The newest counter, 0 before the first.
    #[must_use]
    pub fn count(&self, vm: &str) -> u64 {
        self.beats(vm).last().map_or(0, |b| b.said.n)
    }

    /// Waits for `more` beats from now on.
    ///
    /// # Errors
    ///
    /// They do not come within the limit.
    pub async fn wait_beats(&self, vm: &str, more: u64, limit: Duration) -> anyhow::Result<Beat> {
        let target = self.count(vm) + more;
        wait_for(&format!("counter {target} of VM {vm}"), limit, async || {
            let beats = self.beats(vm);
            let last = beats.into_iter().last();
            match last {
                Some(beat) if beat.said.n >= target => Ok(beat),
                other => Err(format!("{other:?}; QEMU {:?}", self.running(vm))),
            }
        })
        .await
    }

    /// Waits for a line that was read after `after` and has `text` in it.
    ///
    /// # Errors
    ///
    /// It does not come within the limit.
    pub async fn wait_line(&self, vm: &str, text: &str, after: Instant, limit: Duration) -> anyhow::Result<Line> {
        wait_for(&format!("a line with `{text}` from VM {vm}"), limit, async || {
            let lines = self.lines(vm);
            let found = lines.iter().find(|l| l.at > after && l.text.contains(text));
            found.cloned().ok_or_else(|| format!("{:?}", lines.last()))
        })
        .await
    }

    /// Waits until no QEMU of this VM is there; says when the last one was seen.
    ///
    /// # Errors
    ///
    /// One is still there when the limit is over.
    pub async fn wait_gone(&self, vm: &str, limit: Duration) -> anyhow::Result<Instant> {
        wait_for(&format!("the end of VM {vm}"), limit, async || match self.running(vm) {
            Some(instance) => Err(format!("{instance:?}")),
            None => Ok(self.instances(vm).last().map_or_else(Instant::now, |i| i.last_seen)),
        })
        .await
    }

    /// The VM's disks are about to be put back: once, its counter may go back to one of these.
    pub fn expect_return(&self, vm: &str, to: RangeInclusive<u64>) {
        lock(&self.seen, |s| s.returns.push((vm.to_owned(), to)));
    }

    /// Ends the watch and judges what was seen.
    ///
    /// # Errors
    ///
    /// Everything that was wrong.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.halt();
        let seen = guard(&self.seen);
        let mut problems = seen.problems.clone();
        let mut counters: BTreeMap<&str, Continuity> = BTreeMap::new();
        let mut returns = seen.returns.clone();
        for line in &seen.lines {
            if guest::is_alarm(&line.text) {
                problems.push(format!("guest {} on {}: {}", line.vm, line.host, line.text));
            }
            if let Some(said) = guest::parse(&line.text)
                && let Err(problem) = counters.entry(&line.vm).or_default().next(said.clone())
            {
                let fits = |(vm, to): &(String, RangeInclusive<u64>)| *vm == line.vm && to.contains(&said.n);
                if said.kind == guest::Kind::Started
                    && let Some(at) = returns.iter().position(fits)
                {
                    returns.remove(at);
                    continue;
                }
                problems.push(format!("guest {} on {}: {problem}", line.vm, line.host));
            }
        }
        eprintln!(
            "checker: {} QEMU processes, {} lines, longest time between two looks {:?}",
            seen.instances.len(),
            seen.lines.len(),
            seen.longest_gap
        );
        if !problems.is_empty() {
            bail!("the checker saw:\n  {}", problems.join("\n  "));
        }
        Ok(())
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        // Not judged, so the test has failed already: what was seen may say why.
        if self.thread.is_some()
            && let Err(problem) = self.finish()
        {
            eprintln!("{problem:#}");
        }
    }
}

fn guard(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn lock<T>(seen: &Mutex<Seen>, f: impl FnOnce(&mut Seen) -> T) -> T {
    f(&mut guard(seen))
}

/// A serial log that is being followed. The open file stays readable after its host has deleted it.
struct Log {
    vm: String,
    host: String,
    file: File,
    offset: u64,
}

/// The part that runs in the thread.
struct Watcher {
    root: PathBuf,
    seen: Arc<Mutex<Seen>>,
    /// Processes that are something else, and neither keeper nor QEMU: when they were first seen, and when they started.
    others: HashMap<u32, (Instant, u64)>,
    /// Pairs of QEMU processes that have been reported.
    reported: HashSet<(u32, u32)>,
    /// By device and inode, so that a log which was made anew is a new one.
    logs: BTreeMap<(u64, u64), Log>,
    /// By VM: what it has said of a line. A guest may be moved in the middle of one, and ends it on the other host.
    cut_lines: HashMap<String, Vec<u8>>,
}

impl Watcher {
    fn look(&mut self) {
        let found = self.processes();
        let now = Instant::now();
        let mut by_vm: BTreeMap<&str, Vec<&Proc>> = BTreeMap::new();
        for p in &found {
            by_vm.entry(&p.vm).or_default().push(p);
        }
        let mut problems = Vec::new();
        for (vm, copies) in by_vm {
            for pair in copies.windows(2) {
                if both_execute(pair[0], pair[1]) && self.reported.insert((pair[0].pid, pair[1].pid)) {
                    problems.push(format!(
                        "P1 broken: two QEMU processes of VM {vm}: {} in {} and {} in {}",
                        pair[0].pid,
                        pair[0].vm_dir.display(),
                        pair[1].pid,
                        pair[1].vm_dir.display()
                    ));
                }
            }
        }
        let lines = self.read_logs();
        lock(&self.seen, |seen| {
            seen.problems.extend(problems);
            for instance in &mut seen.instances {
                instance.alive = found.iter().any(|p| p.pid == instance.pid && p.start == instance.start);
                if instance.alive {
                    instance.last_seen = now;
                }
            }
            for p in &found {
                if !seen.instances.iter().any(|i| i.pid == p.pid && i.start == p.start) {
                    let host = host_of(&self.root, &p.vm_dir);
                    let (vm, pid, start) = (p.vm.clone(), p.pid, p.start);
                    seen.instances.push(Instance {
                        vm,
                        host,
                        pid,
                        start,
                        first_seen: now,
                        last_seen: now,
                        alive: true,
                    });
                }
            }
            seen.lines.extend(lines);
        });
    }

    /// The QEMUs of this cluster.
    fn processes(&mut self) -> Vec<Proc> {
        let now = Instant::now();
        let pids = proc_table::pids();
        self.others.retain(|pid, _| pids.contains(pid));
        let mut found = Vec::new();
        for pid in pids {
            if let Some((since, start)) = self.others.get(&pid)
                && now - *since > SETTLES
                && proc_table::is_alive(pid, *start)
            {
                continue;
            }
            match proc_table::look(pid) {
                // A keeper's child is a keeper until its `exec`: it is looked at each time.
                Look::Ours(p) => {
                    self.others.remove(&pid);
                    if p.kind == Kind::Qemu && p.vm_dir.starts_with(&self.root) {
                        found.push(p);
                    }
                }
                Look::Other => {
                    if let Some((_, start)) = proc_table::stat(pid) {
                        let entry = self.others.entry(pid).or_insert((now, start));
                        if entry.1 != start {
                            *entry = (now, start);
                        }
                    }
                }
                Look::Gone => {
                    self.others.remove(&pid);
                }
            }
        }
        found
    }

    fn read_logs(&mut self) -> Vec<Line> {
        for host in directories(&self.root) {
            for vm in directories(&host.join("state/vms")) {
                let path = vm.join("run/serial.log");
                let Ok(meta) = fs::metadata(&path) else { continue };
                let key = (meta.dev(), meta.ino());
                if !self.logs.contains_key(&key)
                    && let Ok(file) = File::open(&path)
                {
                    let log = Log { vm: name_of(&vm), host: name_of(&host), file, offset: 0 };
                    self.logs.insert(key, log);
                }
            }
        }
        // The one that was written last is read last: of a VM that changed hosts since the newest look, the old host's lines
        // come first.
        let written = |log: &Log| log.file.metadata().and_then(|m| m.modified()).ok();
        let mut logs: Vec<_> = self.logs.values_mut().map(|log| (written(log), log)).collect();
        logs.sort_by_key(|(written, _)| *written);
        let mut lines = Vec::new();
        for (_, log) in logs {
            log.read(&mut lines, &mut self.cut_lines);
        }
        lines
    }
}

impl Log {
    fn read(&mut self, lines: &mut Vec<Line>, cut_lines: &mut HashMap<String, Vec<u8>>) {
        let length = self.file.metadata().map_or(0, |m| m.len());
        if length < self.offset {
            // It was trimmed.
            self.offset = 0;
        }
        if length == self.offset || self.file.seek(SeekFrom::Start(self.offset)).is_err() {
            return;
        }
        let mut bytes = Vec::new();
        let Ok(n) = (&mut self.file).take(length - self.offset).read_to_end(&mut bytes) else { return };
        self.offset += n as u64;
        let partial = cut_lines.entry(self.vm.clone()).or_default();
        partial.extend_from_slice(&bytes);
        let at = Instant::now();
        while let Some(end) = partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            // A guest that was killed in the middle of a line is followed by the next one on the same line.
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            let text =
                ["MICRO ", "READY "].iter().find_map(|w| text.rfind(w).map(|i| text[i..].to_owned())).unwrap_or(text);
            lines.push(Line { at, vm: self.vm.clone(), host: self.host.clone(), text });
        }
    }
}

/// Whether two QEMUs of one VM both execute it. While it migrates there are two processes, and one of them at the most may
/// execute: that is not believed but asked, of both of them. QEMUs of which neither waits for a migration execute, however
/// they stand.
fn both_execute(a: &Proc, b: &Proc) -> bool {
    let is_target = |p: &Proc| p.argv.iter().any(|arg| arg == "-incoming");
    if !is_target(a) && !is_target(b) {
        return true;
    }
    let executes = |p: &Proc| qmp::status(&p.vm_dir).as_deref() == Some("running");
    // The questions are not asked at one moment. One that executed before and after the other did, executed beside it: none
    // goes on again after it has been moved away.
    executes(a) && executes(b) && executes(a)
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_dir()).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn host_of(root: &Path, vm_dir: &Path) -> String {
    let inside = vm_dir.strip_prefix(root).ok().and_then(|p| p.components().next());
    inside.map(|c| c.as_os_str().to_string_lossy().into_owned()).unwrap_or_default()
}

/// A check that cannot fail is worth nothing.
#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::CommandExt as _,
        process::{Child, Command, Stdio},
    };

    use super::*;

    const VM: &str = "6f3c0f0a-24a5-4d3c-a0e0-2b3b8a7f0a11";
    const SOON: Duration = Duration::from_secs(10);

    /// Something that looks like a QEMU of [`VM`] on this host until it is killed.
    fn qemu(root: &Path, host: &str) -> Child {
        let run = root.join(host).join("state/vms").join(VM).join("run");
        fs::create_dir_all(&run).unwrap();
        let mut command = Command::new("sh");
        command.arg0("/usr/bin/qemu-system-x86_64").args(["-c", "read nothing", "-uuid", VM]).current_dir(run);
        command.stdin(Stdio::piped()).spawn().unwrap()
    }

    async fn wait_instances(checker: &Checker, n: usize) {
        wait_for("instances", SOON, async || match checker.instances(VM) {
            found if found.len() == n => Ok(()),
            found => Err(format!("{found:?}")),
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn one_after_the_other_is_fine_and_two_at_once_are_not() {
        let root = tempfile::tempdir().unwrap();
        let mut checker = Checker::start(root.path());
        let mut first = qemu(root.path(), "host-1");
        wait_instances(&checker, 1).await;
        assert_eq!(checker.running(VM).unwrap().pid, first.id());
        first.kill().unwrap();
        // Not reaped: a zombie executes nothing.
        checker.wait_gone(VM, SOON).await.unwrap();
        let mut second = qemu(root.path(), "host-2");
        wait_instances(&checker, 2).await;
        assert_eq!(checker.running(VM).unwrap().host, "host-2");
        checker.finish().unwrap();

        let mut checker = Checker::start(root.path());
        let mut third = qemu(root.path(), "host-1");
        wait_instances(&checker, 2).await;
        for child in [&mut first, &mut second, &mut third] {
            let _ = child.kill();
            let _ = child.wait();
        }
        let problem = checker.finish().unwrap_err().to_string();
        assert!(problem.contains("P1 broken") && problem.contains(VM), "{problem}");
    }

    #[tokio::test]
    async fn a_counter_that_jumps_back_and_an_alarm_of_the_guest_are_noticed() {
        let root = tempfile::tempdir().unwrap();
        let log = |host: &str, text: &str| {
            let run = root.path().join(host).join("state/vms").join(VM).join("run");
            fs::create_dir_all(&run).unwrap();
            fs::write(run.join("serial.log"), text).unwrap();
        };
        let mut checker = Checker::start(root.path());
        log("host-1", "MICRO 00000000 aaaaaaaa\r\nHB 00000001 aaaaaaaa\r\n");
        checker.wait_line(VM, "HB 00000001", Instant::now() - SOON, SOON).await.unwrap();
        assert_eq!(checker.count(VM), 1);
        log("host-2", "MICRO 00000000 bbbbbbbb\r\nSPLITBRAIN 00000009 bbbbbbbb\r\n");
        checker.wait_line(VM, "SPLITBRAIN", Instant::now() - SOON, SOON).await.unwrap();
        let problem = checker.finish().unwrap_err().to_string();
        assert!(problem.contains("does not go on") && problem.contains("SPLITBRAIN"), "{problem}");
    }

    #[tokio::test]
    async fn a_line_that_is_begun_on_one_host_and_ended_on_another_is_one() {
        let root = tempfile::tempdir().unwrap();
        let mut checker = Checker::start(root.path());
        for (host, text) in
            [("host-1", "MICRO 00000000 aaaaaaaa\r\nHB 000000"), ("host-2", "01 aaaaaaaa\r\nHB 00000002 aaaaaaaa\r\n")]
        {
            let run = root.path().join(host).join("state/vms").join(VM).join("run");
            fs::create_dir_all(&run).unwrap();
            fs::write(run.join("serial.log"), text).unwrap();
            checker.wait_line(VM, "MICRO", Instant::now() - SOON, SOON).await.unwrap();
        }
        checker.wait_line(VM, "HB 00000002", Instant::now() - SOON, SOON).await.unwrap();
        assert_eq!(checker.beats(VM).iter().map(|b| b.said.n).collect::<Vec<_>>(), [0, 1, 2]);
        checker.finish().unwrap();
    }
}
