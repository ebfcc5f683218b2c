//! The controller or etcd dies and comes back: no VM notices, and nothing that was acknowledged is lost. (P2, P3)

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use harness::{Api, api::incarnation_of, checker::Instance, prelude::*};
use uncloud_proto::v1::PowerState;

/// What a [`Writer`] was told.
#[derive(Default)]
struct Told {
    acknowledged: Vec<String>,
    refusals: Vec<tonic::Status>,
}

/// Creates VMs that are not started, one after the other, and remembers what it was told.
struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
    told: Arc<Mutex<Told>>,
}

impl Writer {
    fn start(api: Api) -> Self {
        let (stop, told) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Told>>::default());
        let (stopped, tell) = (Arc::clone(&stop), Arc::clone(&told));
        let task = tokio::spawn(async move {
            for n in 0.. {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let mut request = specs::micro(&format!("written-{n}"));
                request.set_desired(PowerState::Stopped);
                let answer = api.create(request).await;
                {
                    let mut told = tell.lock().expect("nobody panics with it");
                    match answer {
                        Ok(vm) => told.acknowledged.push(vm.id),
                        Err(status) => told.refusals.push(status),
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { stop, task, told }
    }

    fn look<T>(&self, at: impl FnOnce(&Told) -> T) -> T {
        at(&self.told.lock().expect("nobody panics with it"))
    }

    /// Waits for so many more that are acknowledged.
    async fn wait_written(&self, more: usize) -> anyhow::Result<()> {
        let before = self.look(|t| t.acknowledged.len());
        wait_for("writes go on", secs(20), async || {
            self.look(|t| match t.acknowledged.len() {
                n if n < before + more => Err(format!("{n} are written; {:?}", t.refusals.last())),
                _ => Ok(()),
            })
        })
        .await
    }

    async fn finish(self) -> anyhow::Result<Told> {
        self.stop.store(true, Ordering::Release);
        self.task.await?;
        Ok(std::mem::take(&mut *self.told.lock().expect("nobody panics with it")))
    }
}

async fn running_vms(cluster: &Cluster, n: usize) -> anyhow::Result<Vec<(v1::Vm, Instance)>> {
    let mut vms = Vec::new();
    for i in 0..n {
        let vm = cluster.run(specs::micro(&format!("calm-{i}"))).await?;
        let instance = cluster.checker.running(&vm.id).context("it runs")?;
        vms.push((vm, instance));
    }
    Ok(vms)
}

/// The same QEMU, the same incarnation, and still counting, longer than the lease after all that happened.
async fn assert_untouched(cluster: &Cluster, vms: &[(v1::Vm, Instance)]) -> anyhow::Result<()> {
    for (vm, instance) in vms {
        cluster.checker.wait_beats(&vm.id, 9, secs(20)).await?;
        let now = cluster.checker.running(&vm.id).context("it runs")?;
        assert_eq!((now.pid, now.start), (instance.pid, instance.start), "the same QEMU");
        assert_eq!(incarnation_of(&cluster.api.vm(&vm.id).await?), incarnation_of(vm));
    }
    Ok(())
}

async fn assert_all_there(cluster: &Cluster, ids: &[String]) -> anyhow::Result<()> {
    for id in ids {
        cluster.api.vm(id).await.with_context(|| format!("acknowledged and lost: {id}"))?;
    }
    Ok(())
}

/// Everybody who asked while it was down was told UNAVAILABLE. The one call that was on its way when it died is broken off:
/// nobody was left to answer it.
fn assert_refusals_are_clear(refusals: &[tonic::Status]) {
    assert!(!refusals.is_empty(), "somebody must have been refused while it was down");
    let (clear, other): (Vec<_>, Vec<_>) = refusals.iter().partition(|s| s.code() == Code::Unavailable);
    assert!(clear.iter().all(|s| !s.message().is_empty()));
    assert!(other.len() <= 1, "{other:?}");
    assert!(other.iter().all(|s| matches!(s.code(), Code::Cancelled | Code::Unknown)), "{other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_killed_and_started_again_touches_no_vm_and_loses_nothing() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    let vms = running_vms(&cluster, 2).await?;
    let writer = Writer::start(cluster.api.clone());
    writer.wait_written(20).await?;

    let down = Instant::now();
    cluster.controller.kill();
    // A call on the connection that is just breaking may be told that instead.
    wait_for("UNAVAILABLE", secs(2), async || match cluster.api.vm(&vms[0].0.id).await {
        Err(status) if status.code() == Code::Unavailable => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    // Down until somebody who wrote has been told so, too.
    wait_for("a refusal", secs(20), async || {
        writer.look(|t| if t.refusals.is_empty() { Err("none yet".into()) } else { Ok(()) })
    })
    .await?;
    cluster.controller.start_again().await?;
    eprintln!("the controller leads again {:.2?} after it was killed", down.elapsed());
    cluster.wait_hosts().await?;
    writer.wait_written(5).await?;
    let told = writer.finish().await?;
    assert_refusals_are_clear(&told.refusals);
    assert_all_there(&cluster, &told.acknowledged).await?;
    assert_untouched(&cluster, &vms).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_killed_and_started_again_touches_no_vm_and_loses_nothing() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    // That its store was gone is worth an ERROR of the controller.
    cluster.allow_error("etcd");
    let vms = running_vms(&cluster, 2).await?;
    let writer = Writer::start(cluster.api.clone());
    writer.wait_written(20).await?;

    let etcd = cluster.etcd.as_mut().context("an etcd")?;
    etcd.kill();
    // Down until somebody has been told so.
    wait_for("a refusal", secs(20), async || {
        writer.look(|t| if t.refusals.is_empty() { Err("none yet".into()) } else { Ok(()) })
    })
    .await?;
    etcd.start_again().await?;
    cluster.controller.wait_serving().await?;
    cluster.wait_hosts().await?;
    writer.wait_written(5).await?;
    let told = writer.finish().await?;
    assert_refusals_are_clear(&told.refusals);
    assert_all_there(&cluster, &told.acknowledged).await?;
    assert_untouched(&cluster, &vms).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_keeps_its_own_etcd_and_its_data_over_a_kill_and_a_clean_stop() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).default_leases().embedded_etcd().start().await?;
    let vms = running_vms(&cluster, 1).await?;
    cluster.controller.kill();
    cluster.controller.start_again().await?;
    cluster.wait_hosts().await?;
    assert_untouched(&cluster, &vms).await?;

    let status = cluster.controller.process().terminate(secs(15)).await?;
    assert!(status.success(), "{status}");
    let data = cluster.path().join("controller").display().to_string();
    let left: Vec<String> = processes_with(&data);
    assert!(left.is_empty(), "a clean stop leaves no etcd behind: {left:?}");
    cluster.controller.start_again().await?;
    cluster.wait_hosts().await?;
    assert_untouched(&cluster, &vms).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_controller_serves_and_takes_over_when_the_first_is_gone() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).default_leases().start().await?;
    let vms = running_vms(&cluster, 1).await?;
    let etcd = cluster.etcd.as_ref().context("an etcd")?.endpoint().to_owned();
    let dir = cluster.path().join("second");
    std::fs::create_dir(&dir)?;
    let listen = format!("127.0.0.1:{}", harness::ports::free_port()?);
    let mut second = harness::controller::Controller::spawn(&dir, &listen, vec!["--etcd".into(), etcd.into()])?;

    // It does not lead, and serves all the same: what the leader must do it passes on.
    second.wait_serving().await?;
    let leader = |status: v1::GetStatusResponse| status.leader.map(|l| l.address).unwrap_or_default();
    let status = second.api().cluster().get_status(v1::GetStatusRequest {}).await?.into_inner();
    let first = cluster.controller.api().cluster().get_status(v1::GetStatusRequest {}).await?.into_inner();
    assert_eq!(leader(status), leader(first));
    let mut stopped = specs::micro("through-the-second");
    stopped.set_desired(PowerState::Stopped);
    let made = second.api().create(stopped).await?;
    assert_eq!(cluster.api.vm(&made.id).await?.id, made.id);

    cluster.controller.kill();
    wait_for("the second leads", secs(20), async || {
        match second.api().cluster().get_status(v1::GetStatusRequest {}).await {
            Ok(status) if leader(status.get_ref().clone()) == listen => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    assert_eq!(second.api().vm(&vms[0].0.id).await?.id, vms[0].0.id, "it has the same records");
    second.process().terminate(secs(15)).await?;
    cluster.controller.start_again().await?;
    cluster.wait_hosts().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_hangs_for_a_while_touches_no_vm() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(2).default_leases().start().await?;
    cluster.allow_error("etcd");
    let vms = running_vms(&cluster, 1).await?;
    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    etcd.signal(Signal::STOP)?;
    // While etcd hangs nobody leads for long: a write is refused, in bounded time.
    let asked = Instant::now();
    let refused = cluster.api.create(specs::micro("in-vain")).await.err().context("nothing can be stored")?;
    eprintln!("refused after {:.2?}: {refused}", asked.elapsed());
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(asked.elapsed() < secs(5), "{:?}", asked.elapsed());
    etcd.signal(Signal::CONT)?;
    cluster.controller.wait_serving().await?;
    cluster.wait_hosts().await?;
    assert_untouched(&cluster, &vms).await?;
    // What was refused as unknown may have been stored; it is there once or not at all.
    let list = cluster.api.vms().list_vms(v1::ListVmsRequest::default()).await?.into_inner().vms;
    assert!(list.iter().filter(|vm| vm.name == "in-vain").count() <= 1);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_wakes_up_too_late_writes_nothing() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(0).start().await?;
    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    let (endpoint, mut store) = (etcd.endpoint().to_owned(), etcd.client().await?);
    let dir = cluster.path().join("second");
    std::fs::create_dir(&dir)?;
    let listen = format!("127.0.0.1:{}", harness::ports::free_port()?);
    let mut second = harness::controller::Controller::spawn(&dir, &listen, vec!["--etcd".into(), endpoint.into()])?;
    let stopped = |name: &str| {
        let mut request =
            specs::with(specs::micro(name), |s| s.disks = vec![v1::Disk { size_bytes: 512, ..Default::default() }]);
        request.set_desired(PowerState::Stopped);
        request
    };
    cluster.api.create(stopped("before")).await?;

    for round in 0..3 {
        // Calls wait in the sockets of the one that is stopped. It wakes up with them, and with an old term.
        let (asleep, awake) =
            if round % 2 == 0 { (&cluster.controller, &mut second) } else { (&second, &mut cluster.controller) };
        let api = asleep.api().clone();
        api.vm("before").await.ok();
        asleep.freeze().await?;
        let late: Vec<_> = (0..10)
            .map(|n| {
                let (api, request) = (api.clone(), stopped(&format!("late-{round}-{n}")));
                tokio::spawn(async move { api.create(request).await })
            })
            .collect();
        awake.wait_serving().await?;
        wait_for("the other one leads", secs(15), async || {
            let made = awake.api().create(stopped(&format!("new-{round}"))).await;
            made.map(drop).map_err(|s| s.to_string())
        })
        .await?;
        let newest = store.get("/uncloud/v1/leader", None).await?;
        let term = newest.kvs()[0].create_revision();
        asleep.signal(Signal::CONT)?;
        for call in late {
            let answer = call.await?;
            let status = answer.err().context("one that no longer leads has acknowledged a write")?;
            assert!(matches!(status.code(), Code::Unavailable | Code::FailedPrecondition), "{status}");
        }
        let now = store.get("/uncloud/v1/leader", None).await?;
        assert_eq!(now.kvs()[0].create_revision(), term, "the new leader leads on");
        let list = v1::ListVmsRequest { page_size: 1000, ..Default::default() };
        let vms = awake.api().vms().list_vms(list).await?.into_inner().vms;
        assert!(!vms.iter().any(|vm| vm.name.starts_with("late")), "{vms:?}");
        assert_eq!(vms.len(), 2 + round);
    }
    second.process().terminate(secs(15)).await?;
    cluster.finish().await
}

/// Command lines with `text` in them.
fn processes_with(text: &str) -> Vec<String> {
    let lines = harness::proc_table::pids().into_iter().filter_map(|pid| {
        let raw = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(String::from_utf8_lossy(&raw).replace('\0', " "))
    });
    lines.filter(|line| line.contains(text) && line.contains("etcd")).collect()
}
