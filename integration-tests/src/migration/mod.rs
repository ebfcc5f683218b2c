//! Live migrations under test: guests that are not easy to move, what goes wrong on the way, and how long they stand still.
//!
//! [`faults`] lets something die, hang or be cut off at a chosen moment of a migration; [`cases`] does that, waits until all is well
//! again, and judges. Both the tests and `uncloud-chaos migration-faults` use them.

pub mod cases;
pub mod faults;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use uncloud_proto::v1::{self, CreateVmRequest, KernelBoot, MigrationEnd, MigrationResult, Vm, VmPhase};

use crate::{
    Api,
    api::{host_of, incarnation_of, phase_of},
    specs,
};

/// A migration that is not over by then never will be.
pub const END_LIMIT: Duration = Duration::from_secs(90);

/// How busy a guest is.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// From one count to the next, in milliseconds.
    pub beat_ms: u32,
    /// Memory that it writes to again and again, in KiB.
    pub dirty_kib: u32,
    /// How much of it in a second, in KiB.
    pub kib_per_second: u32,
}

/// The Linux guest with a load.
#[must_use]
pub fn loaded(name: &str, load: Load) -> CreateVmRequest {
    let Load { beat_ms, dirty_kib, kib_per_second } = load;
    let command_line = format!("console=ttyS0 quiet beat={beat_ms} dirty={dirty_kib} rate={kib_per_second}");
    specs::with(specs::linux(name), |s| {
        s.kernel = Some(KernelBoot { image: specs::LINUX.into(), command_line });
        // With the usual 96 MiB the kernel would have nothing left for a disk's buffers.
        s.memory_mib = 128;
    })
}

/// Begins a migration to a host; returns the incarnation that the VM has there.
///
/// # Errors
///
/// It is refused.
pub async fn begin(api: &Api, vm: &str, host: &str, bytes_per_second: u64) -> anyhow::Result<u64> {
    let request = v1::MigrateVmRequest {
        vm: vm.to_owned(),
        host: host.to_owned(),
        bytes_per_second,
        ..v1::MigrateVmRequest::default()
    };
    let answer = api.vms().migrate_vm(request).await?.into_inner();
    let migration = answer.vm.and_then(|vm| vm.status?.migration).context("a migration")?;
    Ok(migration.incarnation)
}

/// Waits until the migration that gives the VM this incarnation is over; says how it ended.
///
/// # Errors
///
/// It is not over within [`END_LIMIT`].
pub async fn ended(api: &Api, vm: &str, incarnation: u64) -> anyhow::Result<(Vm, MigrationEnd)> {
    let end = |vm: &Vm| {
        let end = vm.status.as_ref()?.last_migration.clone()?;
        (end.incarnation == incarnation).then_some(end)
    };
    let vm = api.wait_vm(vm, "has migrated, or not", END_LIMIT, |vm| end(vm).is_some()).await?;
    let end = end(&vm).context("it has ended")?;
    Ok((vm, end))
}

/// Migrates a VM and waits until it runs there.
///
/// # Errors
///
/// It does not get there.
pub async fn migrate(api: &Api, vm: &str, host: &str) -> anyhow::Result<Vm> {
    let incarnation = begin(api, vm, host, 0).await?;
    let (_, end) = ended(api, vm, incarnation).await?;
    ensure!(end.result() == MigrationResult::Done, "{end:?}");
    api.wait_vm(vm, "runs on the target", Duration::from_secs(30), |vm| {
        phase_of(vm) == VmPhase::Running && host_of(vm) == host && incarnation_of(vm) == incarnation
    })
    .await
}
