//! The steps of a migration, taken by real QEMUs.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uncloud_agent::{
    qemu::{
        command_line::Begin,
        migration::{Error, Listen, standing, step},
        process::Instance,
    },
    vm::migration::{Copies, Guest, MigrateTo, Nodes, Standing, Step, Transfer},
};
use uncloud_proto::ids::Incarnation;

use crate::support::{Host, within};

pub(crate) const SECRET: &str = "00000000000000000000000000000000000000000000000000000000000000aa";
pub(crate) const HERE: Listen = Listen { address: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), ports: None };
/// How long migrations are called off, one after the other. One in 60 or so hits the moment that QEMU 7.2 handles badly.
const LASTS: Duration = Duration::from_secs(12);

/// A host that takes the guest of `source`, whose disk both have.
fn target(source: &Host) -> Host {
    let mut target = Host::new();
    target.spec.begin = Begin::Incoming;
    target.spec.disks.clone_from(&source.spec.disks);
    target.describe();
    target
}

pub(crate) async fn try_step(host: &Host, instance: &Instance, what: Step) -> Result<(), Error> {
    step(instance, &host.launch.vm_dir, host.launch.user, Some(HERE), &what).await
}

pub(crate) async fn take(host: &Host, instance: &Instance, what: Step) {
    let named = format!("{what:?}");
    within("a step", try_step(host, instance, what)).await.unwrap_or_else(|e| panic!("{named}: {e}"));
}

/// Waits until QEMU stands so.
pub(crate) async fn until(instance: &Instance, what: &str, is: impl Fn(&Standing) -> bool) -> Standing {
    let stands = async {
        loop {
            let now = standing(instance, Copies::Possible).await.unwrap();
            if is(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    within(what, stands).await
}

/// Lets the source send its guest to a new target, which is there until it is dropped. Returns when that began, too.
async fn send(source: &Host, running: &Instance) -> (Instant, Host, Instance) {
    let target = target(source);
    let waiting = target.start().await;
    take(&target, &waiting, Step::Listen { secret: SECRET.into(), disks: Nodes::default() }).await;
    let listens = until(&waiting, "the target to listen", |s| s.address.is_some()).await;
    let (address, secret) = (listens.address.unwrap(), SECRET.into());
    let began = Instant::now();
    let to = MigrateTo { incarnation: Incarnation(4), address, secret, bytes_per_second: 0, disks: None };
    take(source, running, Step::Send(to)).await;
    (began, target, waiting)
}

/// Calls it off, and waits until the guest goes on.
async fn cancel(source: &Host, running: &Instance) -> Standing {
    take(source, running, Step::Cancel).await;
    let over = |s: &Standing| match s.transfer {
        Transfer::None | Transfer::Failed | Transfer::Cancelled => s.guest == Guest::Executes,
        // It stands before the last of it until it is told to send that.
        Transfer::Active | Transfer::Ready | Transfer::Last | Transfer::Cancelling | Transfer::Completed => false,
    };
    until(running, "the guest to go on", over).await
}

/// Whenever a migration is called off, the guest goes on.
#[tokio::test]
async fn a_guest_goes_on_whenever_its_migration_is_cancelled() {
    let source = Host::new();
    let running = source.start().await;
    source.wait_for_beats(1).await;
    // How long it takes until the guest stands still: around that is where it goes wrong.
    let (mut soonest, mut latest) = (Duration::MAX, Duration::ZERO);
    for _ in 0..5 {
        let (began, _target, _waiting) = send(&source, &running).await;
        until(&running, "the last of it", |s| s.transfer == Transfer::Ready).await;
        let took = began.elapsed();
        (soonest, latest) = (soonest.min(took), latest.max(took));
        cancel(&source, &running).await;
    }
    let mut rng = StdRng::seed_from_u64(1);
    let (began, mut cancelled) = (Instant::now(), 0);
    while began.elapsed() < LASTS {
        let (sent, _target, _waiting) = send(&source, &running).await;
        let at = sent + rng.random_range(soonest / 2..=latest);
        tokio::time::sleep(at.saturating_duration_since(Instant::now())).await;
        let stands = cancel(&source, &running).await;
        cancelled += u32::from(stands.transfer == Transfer::Cancelled);
    }
    assert!(cancelled > 10, "only {cancelled} were hit while they were under way");
}
