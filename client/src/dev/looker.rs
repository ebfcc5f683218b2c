//! Looks at the process table all the time and notes whether two QEMUs of one VM were ever there at once (P1).
//!
//! Only VMs that it is told of count: this machine may run others. In a thread of its own, so that nothing else delays a look. The longest pause between two looks is measured and
//! reported, because a claim about "at no moment" is only as good as that.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::power::{Seen, processes};

/// Short against the time that QEMU needs to start, so that an overlap is not missed.
const EVERY: Duration = Duration::from_millis(20);

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Sight {
    /// How often it looked.
    pub(super) looks: u64,
    /// The longest time between the ends of two looks.
    pub(super) longest_pause: Duration,
    /// VMs of which more than one QEMU was there, and how many.
    pub(super) doubles: BTreeMap<String, usize>,
}

/// A thread that looks.
pub(super) struct Looker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Sight>>,
}

impl Looker {
    /// Looks for QEMUs of these VMs from now on.
    pub(super) fn start(vms: BTreeSet<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || look(&vms, &stopped));
        Self { stop, thread: Some(thread) }
    }

    /// Ends it and gives what it saw; nothing if the thread came to grief.
    pub(super) fn finish(mut self) -> Option<Sight> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|t| t.join().ok())
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn look(vms: &BTreeSet<String>, stopped: &AtomicBool) -> Sight {
    let mut sight = Sight::default();
    let mut last = Instant::now();
    while !stopped.load(Ordering::Relaxed) {
        for (vm, n) in count(vms, &processes()) {
            if n > 1 {
                let most = sight.doubles.entry(vm).or_default();
                *most = n.max(*most);
            }
        }
        sight.looks += 1;
        sight.longest_pause = sight.longest_pause.max(last.elapsed());
        last = Instant::now();
        thread::sleep(EVERY);
    }
    sight
}

/// How many QEMUs there are of each of these VMs. A keeper names QEMU and the VM in its arguments, too, but is not one.
fn count(vms: &BTreeSet<String>, processes: &[Seen]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for process in processes {
        let program = process.arguments.first().map(|a| String::from_utf8_lossy(a)).unwrap_or_default();
        if !program.rsplit('/').next().unwrap_or_default().starts_with("qemu-system-") {
            continue;
        }
        let vm = process.arguments.windows(2).find(|w| w[0] == b"-uuid").map(|w| String::from_utf8_lossy(&w[1]));
        if let Some(vm) = vm.filter(|vm| vms.contains(vm.as_ref())) {
            *counts.entry(vm.into_owned()).or_default() += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use rustix::process::Pid;

    use super::{super::power::Identity, *};

    fn process(arguments: &[&str]) -> Seen {
        let identity = Identity { pid: Pid::INIT, start: 1, what: String::new() };
        Seen { identity, parent: 1, arguments: arguments.iter().map(|a| a.as_bytes().to_vec()).collect() }
    }

    #[test]
    fn only_qemus_count_and_two_of_one_vm_are_two() {
        let seen = [
            process(&["/usr/bin/qemu-system-x86_64", "-uuid", "a"]),
            process(&["qemu-system-x86_64", "-name", "x", "-uuid", "a"]),
            process(&["qemu-system-x86_64", "-uuid", "b"]),
            process(&["uncloud-keeper", "--", "qemu-system-x86_64", "-uuid", "b"]),
            process(&["grep", "-uuid", "b"]),
            process(&["qemu-system-x86_64", "-uuid", "of somebody else"]),
            process(&["qemu-system-x86_64", "-uuid", "of somebody else"]),
            process(&[]),
        ];
        let vms = ["a", "b", "c"].map(str::to_owned).into();
        assert_eq!(count(&vms, &seen), BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]));
    }

    #[test]
    fn it_looks_often() {
        let looker = Looker::start(BTreeSet::new());
        thread::sleep(Duration::from_millis(300));
        let sight = looker.finish().unwrap();
        assert!(sight.looks >= 2, "{sight:?}");
    }
}
