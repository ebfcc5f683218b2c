//! A VM's life on one host: start, stop, crash, and the agent that comes back.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    time::Duration,
};

use rustix::process::Signal;
use uncloud_agent::{
    accelerator::{self, AcceleratorChoice},
    qemu::{
        command_line::Machine,
        process::{Adoption, ExitOutcome, InstanceEvent, LaunchError, adopt},
    },
    storage::place::Place,
};

use crate::support::{Host, dead, death_of, next_event, now, signal, wait_for, within};

#[tokio::test]
async fn a_guest_runs_and_shuts_down_when_it_is_asked_to_on_both_boards() {
    for machine in [Machine::Pc, Machine::Q35] {
        let mut host = Host::new();
        host.spec.machine = machine;
        host.describe();
        let mut instance = host.start().await;
        assert_eq!(instance.incarnation(), host.launch.incarnation);
        assert_eq!(instance.lease_generation(), host.launch.lease_generation);
        assert_eq!(instance.qemu_pid(), host.qemu_pid());
        host.wait_for_beats(2).await;
        assert_eq!(instance.status().await.unwrap(), "running");

        instance.power_down().await.unwrap();
        assert_eq!(next_event(&mut instance).await, InstanceEvent::GuestShutdown);
        assert_eq!(instance.status().await.unwrap(), "shutdown");
        assert!(!dead(host.qemu_pid()), "QEMU waits to be asked");

        // Off and on again, with the same QEMU.
        let beats = host.beats().len();
        instance.reset().await.unwrap();
        instance.cont().await.unwrap();
        host.wait_for_beats(beats + 1).await;

        instance.quit().await.unwrap();
        let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has not ended") };
        assert_eq!(exit.outcome, ExitOutcome::Exited { code: 0 });
        assert_eq!(exit.incarnation, host.launch.incarnation);
        assert!(exit.at.0 > 1_700_000_000_000, "{:?}", exit.at);
        assert!(
            tokio::time::timeout(Duration::from_millis(50), instance.next_event()).await.is_err(),
            "nothing after the end"
        );
        let Adoption::Ended(again) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it does not run") };
        assert_eq!(again, exit);
        wait_for("the keeper to be reaped", || host.processes().is_empty()).await;
    }
}

#[tokio::test]
async fn a_killed_qemu_is_told_from_one_that_ended() {
    let host = Host::new();
    let mut instance = host.start().await;
    instance.kill();
    let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has not ended") };
    assert_eq!(exit.outcome, ExitOutcome::Signaled { signal: 9 });
    instance.kill();
    let again = host.start().await;
    assert_ne!(again.qemu_pid(), instance.qemu_pid());
}

/// An agent that comes back finds the same QEMU, and the guest has noticed nothing.
#[tokio::test]
async fn adoption_finds_the_same_qemu_and_leaves_no_gap() {
    let host = Host::new();
    let instance = host.start().await;
    let pid = instance.qemu_pid();
    host.wait_for_beats(1).await;
    drop(instance);
    let Adoption::Running(mut instance) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it runs") };
    assert_eq!(instance.qemu_pid(), pid);
    assert_eq!(instance.incarnation(), host.launch.incarnation);
    assert_eq!(instance.lease_generation(), host.launch.lease_generation);
    host.wait_for_beats(4).await;
    let beats = host.beats();
    assert!(beats.windows(2).all(|w| w[1] == w[0] + 1), "{beats:?}");

    // What happens while no agent is there is found out by the next.
    instance.power_down().await.unwrap();
    drop(instance);
    wait_for("the guest's farewell", || host.read("run/serial.log").contains("POWEROFF")).await;
    let Adoption::Running(adopted) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("QEMU waits") };
    instance = adopted;
    assert_eq!(next_event(&mut instance).await, InstanceEvent::GuestShutdown);
    instance.kill();
    let InstanceEvent::Ended(exit) = next_event(&mut instance).await else { panic!("it has not ended") };
    assert_eq!(exit.outcome, ExitOutcome::Signaled { signal: 9 });
}

/// A hung predecessor holds a socket; a guest that broke out has put one of its own in the place of another.
#[tokio::test]
async fn adoption_needs_one_free_socket_of_the_real_qemu() {
    let host = Host::new();
    let instance = host.start().await;
    let pid = instance.qemu_pid();
    drop(instance);
    let run = host.path("run");
    wait_for("the first connection to be closed", || {
        // The predecessor: it is greeted and then does nothing.
        std::os::unix::net::UnixStream::connect(run.join("qmp1.sock")).is_ok()
    })
    .await;
    let _held = std::os::unix::net::UnixStream::connect(run.join("qmp1.sock")).unwrap();
    fs::remove_file(run.join("qmp0.sock")).unwrap();
    let impostor = UnixListener::bind(run.join("qmp0.sock")).unwrap();
    let vm = host.vm;
    // It speaks QMP as well as QEMU does, and says whatever is wanted of it.
    std::thread::spawn(move || {
        for connection in impostor.incoming() {
            let mut connection = BufReader::new(connection.unwrap());
            if connection.get_mut().write_all(b"{\"QMP\": {}}\n").is_err() {
                continue;
            }
            for id in 0.. {
                let answer = format!("{{\"id\": {id}, \"return\": {{\"UUID\": \"{vm}\", \"status\": \"stolen\"}}}}\n");
                match connection.read_line(&mut String::new()) {
                    Ok(1..) if connection.get_mut().write_all(answer.as_bytes()).is_ok() => {}
                    Ok(_) | Err(_) => break,
                }
            }
        }
    });

    let Adoption::Running(instance) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it runs") };
    assert_eq!(instance.qemu_pid(), pid);
    assert_eq!(instance.status().await.unwrap(), "running");
}

/// A QEMU that hangs is alive: it must not be taken for gone, and can be killed.
#[tokio::test]
async fn a_hung_qemu_is_adopted_and_answers_again_when_it_can() {
    let host = Host::new();
    let instance = host.start().await;
    let pid = instance.qemu_pid();
    signal(pid, Signal::STOP);
    assert!(instance.status().await.is_err());
    drop(instance);
    let Adoption::Running(mut instance) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it lives") };
    assert!(instance.status().await.is_err());
    signal(pid, Signal::CONT);
    wait_for_answer(&instance).await;
    signal(pid, Signal::STOP);
    instance.kill();
    assert!(matches!(next_event(&mut instance).await, InstanceEvent::Ended(_)));
}

async fn wait_for_answer(instance: &uncloud_agent::qemu::process::Instance) {
    within("an answer", async { while instance.status().await.is_err() {} }).await;
}

#[tokio::test]
async fn a_qemu_that_fails_to_start_says_why_in_its_own_words() {
    let mut host = Host::new();
    host.spec.disks[0].place = Place::File { path: "/nonexistent/disk.qcow2".into() };
    host.describe();
    let Err(LaunchError::Failed { reason }) = host.try_start().await else { panic!("it cannot start") };
    assert!(reason.contains("Could not open '/nonexistent/disk.qcow2': No such file"), "{reason}");
    let Adoption::Ended(exit) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it does not run") };
    assert_eq!(exit.outcome, ExitOutcome::Exited { code: 1 });
    assert_eq!(exit.last_words, reason);

    host.launch.argv[0] = "/nonexistent/qemu".into();
    let Err(LaunchError::Failed { reason }) = host.try_start().await else { panic!("it cannot start") };
    assert!(reason.contains("cannot execute /nonexistent/qemu: No such file"), "{reason}");
    let Adoption::Ended(exit) = adopt(&host.launch.vm_dir, host.vm).await else { panic!("it does not run") };
    assert!(matches!(exit.outcome, ExitOutcome::NotStarted { .. }), "{exit:?}");

    host.launch.keeper = "/nonexistent/keeper".into();
    let Err(LaunchError::Failed { reason }) = host.try_start().await else { panic!("it cannot start") };
    assert!(reason.contains("/nonexistent/keeper"), "{reason}");
    assert!(host.processes().is_empty());
}

#[tokio::test]
async fn qemu_and_keeper_run_without_privileges_in_little_memory() {
    let mut host = Host::new();
    host.spec.machine = Machine::Q35;
    host.describe();
    let _instance = host.start().await;
    host.wait_for_beats(1).await;
    let field = |pid: u32, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let (keeper, qemu) = (host.keeper_pid(), host.qemu_pid());
    if let Some(user) = host.launch.user {
        for pid in [keeper, qemu] {
            assert_eq!(field(pid, "Uid"), [user.uid.to_string().as_str(); 4].join(" "));
            assert_eq!(field(pid, "Gid"), [user.gid.to_string().as_str(); 4].join(" "));
            assert_eq!(field(pid, "Groups"), "");
            assert_eq!(field(pid, "CapEff"), "0000000000000000");
        }
    }
    assert_eq!(field(qemu, "NoNewPrivs"), "1");
    assert_eq!(field(qemu, "Seccomp"), "2");
    assert_eq!(field(keeper, "Threads"), "1");
    let environment = fs::read_to_string(format!("/proc/{qemu}/environ")).unwrap();
    assert!(environment.split_terminator('\0').all(|v| v.starts_with("PATH=")), "{environment:?}");

    let rollup = fs::read_to_string(format!("/proc/{keeper}/smaps_rollup")).unwrap();
    let own: u64 = rollup
        .lines()
        .filter(|l| l.starts_with("Private_Clean") || l.starts_with("Private_Dirty"))
        .map(|l| l.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
        .sum();
    println!("the keeper has {own} KiB of its own");
    assert!(own < 2048, "{rollup}");
}

/// What QEMU inherits does not depend on its own precautions, nor on the agent's.
#[tokio::test]
async fn what_the_keeper_starts_has_nothing_that_it_does_not_need() {
    let mut host = Host::new();
    let leak = fs::File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    host.pretend("umask; pwd; ls -l /proc/$BASHPID/fd; exec grep -E 'NoNewPrivs|SigIgn' /proc/self/status");
    let Err(LaunchError::Failed { reason }) = host.try_start().await else { panic!("it is no QEMU") };
    for line in ["NoNewPrivs:1", "0077"] {
        assert!(reason.lines().any(|l| l == line), "{line}: {reason}");
    }
    let ignored = reason.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?, 16).ok()).unwrap();
    for signal in [Signal::HUP, Signal::INT, Signal::PIPE, Signal::TERM] {
        assert_eq!(ignored >> (signal.as_raw() - 1) & 1, 0, "{signal:?}: {reason}");
    }
    assert!(reason.lines().any(|l| l == host.path("run").to_str().unwrap()), "{reason}");
    assert!(reason.contains("-> /dev/null") && reason.contains(host.path("lock").to_str().unwrap()), "{reason}");
    assert!(!reason.contains("/dev/zero") && !reason.contains("lease") && !reason.contains(".json"), "{reason}");

    // A shell would change this.
    host.launch.argv = ["grep", "SigBlk", "/proc/self/status"].map(Into::into).into();
    let Err(LaunchError::Failed { reason }) = host.try_start().await else { panic!("it is no QEMU") };
    assert_eq!(reason, "SigBlk:0000000000000000");
}

/// Whatever it finds, it says what it measured, soon, and leaves nothing behind.
#[tokio::test]
async fn the_accelerator_is_found_by_measuring() {
    let began = now();
    let finding = accelerator::probe_with(env!("CARGO_BIN_EXE_uncloud-agent").as_ref()).await;
    assert!(now().since(began) < Duration::from_secs(5));
    println!("{finding:?}");
    match finding.choice {
        AcceleratorChoice::Kvm => assert!(finding.why.contains("loops"), "{finding:?}"),
        AcceleratorChoice::Tcg => assert!(!finding.why.is_empty() && !finding.why.contains("probed"), "{finding:?}"),
    }
    let nothing = accelerator::probe_with("/nonexistent".as_ref()).await;
    assert_eq!(nothing.choice, AcceleratorChoice::Tcg);
}

/// Starts that are given up midway leave nothing that cannot be found.
#[tokio::test]
async fn a_keeper_on_its_way_is_not_taken_for_gone() {
    let mut host = Host::new();
    // Instead of a keeper: somebody who never gets to it.
    let slow = host.beside("slow-keeper");
    fs::write(&slow, "#!/bin/bash\nread -t 60 < <(exec -a \"$2\" sleep 60)\n").unwrap();
    fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    host.launch.keeper = slow;
    assert!(
        tokio::time::timeout(Duration::from_millis(300), uncloud_agent::qemu::process::launch(&host.launch))
            .await
            .is_err()
    );
    assert!(matches!(adopt(&host.launch.vm_dir, host.vm).await, Adoption::Unclear { .. }));
    assert_eq!(host.try_start().await.unwrap_err(), LaunchError::Busy);
    let pids = host.processes();
    pids.iter().for_each(|p| signal(*p, Signal::KILL));
    death_of(&pids).await;
    assert!(matches!(adopt(&host.launch.vm_dir, host.vm).await, Adoption::Never));
}
