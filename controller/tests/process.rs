//! The controller as a process, with an etcd of its own: starts, stops, crashes.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use support::*;
use tonic::{Code, transport::Channel};
use uncloud_proto::v1::{self, vm_service_client::VmServiceClient};

struct Controller {
    child: Child,
    port: u16,
    log: Arc<Mutex<Vec<String>>>,
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uncloud-controller"));
    command.arg("--data-dir").arg(dir).args(args).stdin(Stdio::null());
    command
}

impl Controller {
    fn start(dir: &Path) -> Self {
        Self::start_with(dir, &[])
    }

    fn start_with(dir: &Path, args: &[&str]) -> Self {
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let mut child = command(dir, &["--listen", &listen]).args(args).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().unwrap();
        let lines = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        Self { child, port, log }
    }

    async fn vms(&self) -> VmServiceClient<Channel> {
        let endpoint = Channel::from_shared(format!("http://127.0.0.1:{}", self.port)).unwrap();
        let channel = eventually("it listens", || async { endpoint.connect().await.ok() }).await;
        VmServiceClient::new(channel)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    /// The process id of its etcd.
    fn etcd(&self) -> Pid {
        let parent = self.child.id().to_string();
        let children = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // pid (name) state ppid …
            let (name, rest) = stat.rsplit_once(')')?;
            (name.ends_with("(etcd") && rest.split_whitespace().nth(1)? == parent).then(|| Pid::from_raw(pid))?
        });
        let found: Vec<Pid> = children.collect();
        assert_eq!(found.len(), 1, "one etcd: {found:?}");
        found[0]
    }

    fn logged(&self, text: &str) -> bool {
        self.log.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// SIGTERM, and waits for the end.
    fn stop(mut self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}: {:#?}", self.log.lock().unwrap());
                return;
            }
            assert!(begin.elapsed() < LIMIT, "it does not stop: {:#?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill(); // its etcd goes with it
        let _ = self.child.wait();
    }
}

fn create(name: &str) -> v1::CreateVmRequest {
    v1::CreateVmRequest {
        request_id: format!("create {name}"),
        name: name.to_owned(),
        spec: Some(v1::VmSpec {
            memory_mib: 64,
            disks: vec![v1::Disk { size_bytes: 1 << 20, ..v1::Disk::default() }],
            ..v1::VmSpec::default()
        }),
        ..v1::CreateVmRequest::default()
    }
}

/// Creates a VM as soon as the controller leads; what it says until then must be UNAVAILABLE.
async fn create_when_serving(controller: &Controller, name: &str) -> v1::Vm {
    let vms = controller.vms().await;
    eventually("a VM is created", || {
        let mut vms = vms.clone();
        async move {
            match vms.create_vm(create(name)).await {
                Ok(answer) => answer.into_inner().vm,
                Err(status) => {
                    assert_eq!(status.code(), Code::Unavailable, "{status}");
                    None
                }
            }
        }
    })
    .await
}

async fn gone(pid: Pid) {
    eventually("the process is gone", || async move {
        // A zombie is gone, too: whoever inherits it may be slow to say so.
        let zombie = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
            .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')));
        (test_kill_process(pid).is_err() || zombie).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_clean_stop_and_after_a_crash() {
    // P2, and nothing is made twice.
    let dir = tempfile::tempdir().unwrap();
    let first = Controller::start(dir.path());
    let vm = create_when_serving(&first, "a").await;
    let ports = fs::read_to_string(dir.path().join("etcd.json")).unwrap();
    let etcd = first.etcd();
    assert!(first.logged("serving"));
    first.stop();
    gone(etcd).await;

    let second = Controller::start(dir.path());
    assert_eq!(create_when_serving(&second, "a").await, vm, "the same request gets the same answer");
    assert_eq!(fs::read_to_string(dir.path().join("etcd.json")).unwrap(), ports, "the ports are remembered");
    let other = create_when_serving(&second, "b").await;
    let etcd = second.etcd();
    drop(second); // SIGKILL
    gone(etcd).await;

    let third = Controller::start(dir.path());
    assert_eq!(create_when_serving(&third, "b").await, other);
    let list = third.vms().await.list_vms(v1::ListVmsRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.vms.len(), 2);
    third.stop();
}

#[tokio::test]
async fn an_etcd_that_dies_is_started_again_and_the_controller_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path());
    let vm = create_when_serving(&controller, "a").await;
    let etcd = controller.etcd();
    kill_process(etcd, Signal::KILL).unwrap();
    gone(etcd).await;
    // Until it is back: UNAVAILABLE and nothing else (`create_when_serving` checks that).
    create_when_serving(&controller, "b").await;
    assert_eq!(create_when_serving(&controller, "a").await, vm);
    assert_ne!(controller.etcd(), etcd);
    controller.stop();
}

#[tokio::test]
async fn an_etcd_that_hangs_makes_the_api_unavailable_until_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path());
    let vm = create_when_serving(&controller, "a").await;
    let etcd = controller.etcd();
    kill_process(etcd, Signal::STOP).unwrap();
    let mut vms = controller.vms().await;
    let begin = Instant::now();
    let refused = vms.create_vm(create("b")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    eventually("it says that it does not lead any more", || async {
        let said = controller.logged("leadership is no longer certain") || controller.logged("stepping down");
        said.then_some(())
    })
    .await;
    kill_process(etcd, Signal::CONT).unwrap();
    create_when_serving(&controller, "b").await;
    assert_eq!(create_when_serving(&controller, "a").await, vm);
    controller.stop();
}

#[tokio::test]
async fn a_second_controller_on_the_same_etcd_passes_on_what_it_cannot_do_and_takes_over() {
    let etcd = Etcd::start().await;
    let start = || {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let mut child = command(dir.path(), &["--listen", &listen, "--etcd", &etcd.endpoint()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, lines) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        (Controller { child, port, log }, dir)
    };
    let (first, _first_dir) = start();
    let vm = create_when_serving(&first, "a").await;
    let (second, _second_dir) = start();
    eventually("the second stands by", || async { second.logged("standing by").then_some(()) }).await;
    let other = create_when_serving(&second, "b").await;
    assert_eq!(create_when_serving(&first, "b").await, other, "it was made by the leader");
    first.stop();
    assert_eq!(create_when_serving(&second, "a").await, vm);
    second.stop();
}

/// What a command says that must end by itself with an error.
fn fails(mut command: Command) -> String {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("it should have refused to start: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let exposed = fails(command(dir.path(), &["--listen", "0.0.0.0:0"]));
    assert!(exposed.contains("--insecure-no-tls"), "{exposed}");

    let mut without = command(dir.path(), &["--listen", "127.0.0.1:0"]);
    without.env("PATH", "/nowhere").env_remove("UNCLOUD_ETCD");
    let missing = fails(without);
    assert!(missing.contains("apt-get install etcd-server"), "{missing}");

    let first = Controller::start(dir.path());
    eventually("it listens", || async { first.logged("serving").then_some(()) }).await;
    let taken = fails(command(dir.path(), &["--listen", "127.0.0.1:0"]));
    assert!(taken.contains("in use by another controller"), "{taken}");
    let port = first.port.to_string();
    let other = tempfile::tempdir().unwrap();
    let taken = fails(command(other.path(), &["--listen", &format!("127.0.0.1:{port}")]));
    assert!(taken.contains("cannot listen on"), "{taken}");
    first.stop();
}

/// Asks over HTTP/1, and gives the whole answer.
fn http(address: &str, request: &str) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_is_told_what_happens_and_what_is() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", free_port());
    let controller = Controller::start_with(dir.path(), &["--metrics-listen", &address]);
    create_when_serving(&controller, "counted").await;
    let mut vms = controller.vms().await;
    let status = vms.create_vm(create("bad/name")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    let answer = http(&address, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("application/openmetrics-text"), "{answer}");
    for line in [
        "uncloud_leader 1",
        "uncloud_vms{phase=\"pending\"} 1",
        "uncloud_events_total{type=\"Created\"} 1",
        "uncloud_calls_total{method=\"uncloud.v1.VmService/CreateVm\",code=\"INVALID_ARGUMENT\"} 1",
        "uncloud_failover_brake 0",
        "uncloud_writer_queue 0",
        "uncloud_sessions 0",
        "# EOF",
    ] {
        assert!(answer.lines().any(|l| l == line), "no `{line}` in:\n{answer}");
    }
    let value = |name: &str| -> f64 {
        let line = answer.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{name}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert!(value("uncloud_leadership_valid_seconds") > 0.0);
    assert!(value("uncloud_transaction_seconds_count") >= 2.0);

    let missing = http(&address, "GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
    let posted = http(&address, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert!(posted.starts_with("HTTP/1.1 405 "), "{posted}");
    assert!(http(&address, "no http\r\n\r\n").starts_with("HTTP/1.1 400 "));
    controller.stop();
}
