//! P1 on one host: nothing outlives its lease, nothing starts without one, and nothing runs twice.

use std::{collections::BTreeSet, ffi::OsString, fs, time::Duration};

use rustix::process::Signal;
use uncloud_agent::{
    lease::{LeaseClass, LeaseFile},
    qemu::process::{Adoption, ExitOutcome, InstanceEvent, LaunchError, adopt},
};
use uuid::Uuid;

use crate::support::{Host, dead, death_of, next_event, now, off_by, signal, wait_for, within};

/// How far from its deadline a death may be seen. The kernel needs a few milliseconds; seeing it takes its time, too.
const SLACK: Duration = Duration::from_millis(100);

const EXIT_BUSY: Option<i32> = Some(73);
const EXIT_FENCED: Option<i32> = Some(75);

#[tokio::test]
async fn a_killed_keeper_takes_its_qemu_with_it() {
    let host = Host::new();
    let mut instance = host.start().await;
    host.wait_for_beats(1).await;
    let (keeper, qemu) = (host.keeper_pid(), host.qemu_pid());
    let killed = now();
    signal(keeper, Signal::KILL);
    let died = death_of(&[keeper, qemu]).await;
    println!("QEMU was dead {:?} after its keeper", died.since(killed));
    assert!(died.since(killed) < Duration::from_millis(50));
    let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has ended") };
    assert_eq!(exit.outcome, ExitOutcome::KeeperKilled);
    assert_eq!(exit.incarnation, host.launch.incarnation);
    let Adoption::Ended(exit) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it has ended") };
    assert_eq!(exit.outcome, ExitOutcome::KeeperKilled);
}

/// K1: with agent, keeper and QEMU all unable to run, the kernel alone ends them.
#[tokio::test]
async fn stopped_processes_die_at_the_deadline_though_nobody_acts() {
    let mut host = Host::new();
    let word = host.short_lease(Duration::from_millis(2500));
    drop(host.start().await);
    let (keeper, qemu) = (host.keeper_pid(), host.qemu_pid());
    signal(keeper, Signal::STOP);
    signal(qemu, Signal::STOP);
    assert!(!dead(keeper) && !dead(qemu) && now() < word.deadline, "this machine is too slow for this test");
    let died = death_of(&[keeper, qemu]).await;
    println!("dead {:?} from the deadline", off_by(died, word.deadline));
    assert!(died >= word.deadline && off_by(died, word.deadline) < SLACK, "{died:?} {word:?}");
}

/// A stopped keeper cannot see that the lease goes on. It dies at the deadline that it knew: early, never late.
#[tokio::test]
async fn a_stopped_keeper_dies_although_the_lease_goes_on() {
    let mut host = Host::new();
    let word = host.short_lease(Duration::from_secs(2));
    let _instance = host.start().await;
    let keeper = host.keeper_pid();
    signal(keeper, Signal::STOP);
    host.renew(Duration::from_secs(60));
    let died = death_of(&[keeper, host.qemu_pid()]).await;
    assert!(died >= word.deadline && off_by(died, word.deadline) < SLACK, "{died:?} {word:?}");
}

/// K5. A process dies when it has closed its files, and its child's death signal comes after that. What a file system writes at the last close of a
/// file can wait for a disk.
#[tokio::test]
async fn a_keeper_has_no_file_open_whose_end_could_wait_for_a_disk() {
    let mut host = Host::new();
    host.short_lease(Duration::from_secs(60));
    let _instance = host.start().await;
    let keeper = host.keeper_pid();
    let mut written = BTreeSet::new();
    for open in fs::read_dir(format!("/proc/{keeper}/fd")).unwrap() {
        let open = open.unwrap();
        let info = fs::read_to_string(format!("/proc/{keeper}/fdinfo/{}", open.file_name().display())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let writes = u32::from_str_radix(flags.trim(), 8).unwrap() & 0o3 != 0;
        if writes && fs::metadata(open.path()).unwrap().is_file() {
            written.insert(fs::read_link(open.path()).unwrap().file_name().unwrap().to_owned());
        }
    }
    // The lock and how it ended have nothing to be written; QEMU has the log open, too, so its last close is QEMU's.
    assert_eq!(written, ["exit.json", "lock", "qemu.log"].map(OsString::from).into());
    let same = fs::read_link(format!("/proc/{}/fd/2", host.qemu_pid())).unwrap();
    assert_eq!(same.file_name().unwrap(), "qemu.log");
}

#[tokio::test]
async fn a_lease_that_is_renewed_lets_the_vm_live_and_no_longer() {
    let mut host = Host::new();
    let first = host.short_lease(Duration::from_millis(1500));
    let mut instance = host.start().await;
    let pids = [host.keeper_pid(), host.qemu_pid()];
    let mut last = first;
    while now() < first.deadline.after(Duration::from_secs(3)) {
        last = host.renew(Duration::from_millis(1500));
        assert_eq!(last.generation, first.generation, "this machine is too slow for this test");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(pids.iter().all(|p| !dead(*p)), "dead before {last:?}");
    }
    let died = death_of(&pids).await;
    assert!(died >= last.deadline && off_by(died, last.deadline) < SLACK, "{died:?} {last:?}");
    let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has ended") };
    assert_eq!(exit.outcome, ExitOutcome::KeeperKilled);
    let beats = host.beats();
    assert!(beats.len() >= 3 && beats.windows(2).all(|w| w[1] == w[0] + 1), "{beats:?}");
}

/// L2, K3: a start that was decided before a lapse does not happen after it, although there is a lease again.
#[tokio::test]
async fn a_start_that_was_held_up_over_a_lapse_is_refused() {
    let mut host = Host::new();
    let before = host.short_lease(Duration::from_millis(50));
    wait_for("the lapse", || now() >= before.deadline).await;
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Fenced, "the lease is over");
    assert_eq!(host.keeper_alone().await.code(), EXIT_FENCED);

    let after = host.renew(Duration::from_secs(60));
    assert_eq!(after.generation, before.generation + 1);
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Fenced, "it is another lease");
    assert_eq!(host.keeper_alone().await.code(), EXIT_FENCED);
    assert_eq!(host.read("keeper.json"), "");
    assert!(!host.path("run/serial.log").exists(), "QEMU was never started");
    let Adoption::Ended(exit) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it does not run") };
    assert_eq!(exit.outcome, ExitOutcome::Fenced);
    assert!(exit.last_words.contains("lapsed"), "{}", exit.last_words);

    host.launch.lease_generation = after.generation;
    drop(host.start().await);
}

#[tokio::test]
async fn a_lease_of_another_boot_is_none() {
    let mut host = Host::new();
    let path = host.beside("rebooted");
    let lease = LeaseFile::open(&path, Uuid::new_v4()).unwrap();
    let word = lease.renew(LeaseClass::Fast, now().after(Duration::from_secs(60)), now());
    (host.launch.lease_file, host.launch.lease_generation) = (path, word.generation);
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Fenced);
}

/// The lease runs out while QEMU is still on its way.
#[tokio::test]
async fn a_start_that_outlasts_its_lease_ends_with_it() {
    let mut host = Host::new();
    host.pretend("exec -a \"$0\" sleep 60");
    let word = host.short_lease(Duration::from_secs(1));
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Fenced);
    assert!(now() >= word.deadline && off_by(now(), word.deadline) < Duration::from_millis(500));
    assert!(host.processes().is_empty());
}

#[tokio::test]
async fn each_class_has_its_own_deadline() {
    let mut host = Host::new();
    host.launch.class = LeaseClass::Patient;
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Fenced, "only the fast lease was granted");
    let patient = host.lease.renew(LeaseClass::Patient, now().after(Duration::from_secs(60)), now());
    host.launch.lease_generation = patient.generation;
    drop(host.start().await);
}

/// `hold` has no lease: it is pinned to its host, and nothing moves it.
#[tokio::test]
async fn a_vm_that_is_held_ignores_the_lease() {
    let mut host = Host::new();
    let word = host.short_lease(Duration::from_millis(500));
    host.launch.class = LeaseClass::Hold;
    let mut instance = host.start().await;
    wait_for("the lapse", || now() >= word.deadline).await;
    let beats = host.beats().len();
    host.wait_for_beats(beats + 2).await;
    assert_eq!(instance.status().await.unwrap(), "running");
    drop(instance);
    let Adoption::Running(adopted) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it runs") };
    instance = adopted;
    // It is still its keeper's child.
    signal(host.keeper_pid(), Signal::KILL);
    assert!(matches!(next_event(&mut instance).await, InstanceEvent::Ended(_)));
}

/// K4, while the first keeper lives.
#[tokio::test]
async fn a_second_keeper_of_one_vm_is_refused() {
    let host = Host::new();
    let instance = host.start().await;
    let record = host.read("keeper.json");
    assert_eq!(host.keeper_alone().await.code(), EXIT_BUSY);
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Busy);
    assert_eq!(host.read("keeper.json"), record, "the first one's records are untouched");
    assert_eq!(instance.status().await.unwrap(), "running");
}

/// K4, while only QEMU lives: the lock is QEMU's, too.
#[tokio::test]
async fn a_second_keeper_is_refused_while_something_of_the_first_ones_qemu_lives() {
    let mut host = Host::new();
    // A QEMU that, unlike the real one, leaves something behind that has no death signal.
    host.pretend("(exec -a \"$0 orphan\" sleep 60) & exec -a \"$0 qemu\" sleep 60");
    let launching = host.launch.clone();
    let start = tokio::spawn(async move { uncloud_agent::qemu::process::launch(&launching).await });
    wait_for("both", || host.read("keeper.json").ends_with('\n') && host.processes().len() == 3).await;
    let pids = [host.keeper_pid(), host.qemu_pid()];
    signal(pids[0], Signal::KILL);
    death_of(&pids).await;
    assert_eq!(host.keeper_alone().await.code(), EXIT_BUSY);
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Busy);
    assert!(matches!(adopt(&host.launch.vm_dir, host.vm).await, Adoption::Unclear { .. }));
    wait_for("only the orphan to be left", || host.processes().len() == 1).await;
    signal(host.processes()[0], Signal::KILL);
    assert!(matches!(within("the failed start", start).await.unwrap(), Err(LaunchError::Failed { .. })));
    assert!(matches!(adopt(&host.launch.vm_dir, host.vm).await, Adoption::Ended(_)));
    host.describe();
    drop(host.start().await);
}

/// What people send to a whole session must not make the keeper leave before its QEMU.
#[tokio::test]
async fn a_polite_signal_to_the_keeper_disturbs_nothing() {
    let host = Host::new();
    let instance = host.start().await;
    for polite in [Signal::TERM, Signal::INT, Signal::HUP] {
        signal(host.keeper_pid(), polite);
    }
    host.wait_for_beats(2).await;
    assert_eq!(instance.status().await.unwrap(), "running");
    // QEMU itself ends when it is asked, and the keeper says how.
    signal(host.qemu_pid(), Signal::TERM);
    let mut instance = instance;
    let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has ended") };
    assert_eq!(exit.outcome, ExitOutcome::Exited { code: 0 });
}
