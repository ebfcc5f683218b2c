//! Which hosts and VMs there are. The same seed gives the same.
//!
//! All hosts share one pool, so that every VM can be started anywhere. One host is crowded and a few have twice as many VMs as
//! the others: they are there to die.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uncloud_proto::{
    AGENT_PROTOCOL,
    cpu::Level,
    ids::{HostId, VmId},
    v1,
};
use uuid::Uuid;

use crate::specs;

/// Bytes of the shared pool: more than all disks may become.
pub(super) const POOL_BYTES: u64 = 1 << 60;
/// MiB of each VM.
pub(super) const VM_MEMORY_MIB: u64 = 256;
/// What the hosts say that they run.
pub(super) const AGENT_VERSION: &str = "0.1.0";
/// CPU features that every host has.
pub(super) const CPU_LEVEL: Level = Level::V2;
/// What every host says of its CPU and its accelerator.
pub(super) const CPU_NAME: &str = "played";

/// A host that is played.
#[derive(Clone, Debug)]
pub struct PlayedHost {
    /// Its id.
    pub id: HostId,
    /// Its boot id.
    pub boot: Uuid,
    /// Its name.
    pub name: String,
    /// CPU threads.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The VMs that it has from the beginning, running at incarnation 1.
    pub vms: Vec<VmId>,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Site {
    /// The hosts: the crowded one, the fuller ones, the others.
    pub hosts: Vec<PlayedHost>,
    /// The id of the pool that they share.
    pub pool: Uuid,
    random: StdRng,
}

impl Site {
    /// `hosts` hosts: the first with `crowded` VMs, each of the next `fuller.0` with `fuller.1`, and the others with what is left
    /// of `vms`, evenly.
    #[must_use]
    pub fn new(hosts: usize, vms: usize, crowded: usize, fuller: (usize, usize)) -> Self {
        let mut site = Self { hosts: Vec::new(), pool: Uuid::nil(), random: StdRng::seed_from_u64(5) };
        site.pool = site.uuid();
        site.add(hosts);
        let rest = vms.saturating_sub(crowded + fuller.0 * fuller.1);
        let others = hosts.saturating_sub(1 + fuller.0).max(1);
        for n in 0..hosts {
            let count = match n {
                0 => crowded,
                n if n <= fuller.0 => fuller.1,
                n => rest / others + usize::from((n - 1 - fuller.0) < rest % others),
            };
            let ids = (0..count).map(|_| VmId::from_uuid(site.uuid())).collect();
            site.hosts[n].vms = ids;
        }
        if let Some(first) = site.hosts.first_mut() {
            // Room for so many.
            first.vcpus = 1024;
            first.memory_mib = (crowded as u64 + 64) * VM_MEMORY_MIB;
        }
        site
    }

    /// Adds hosts without VMs.
    pub fn add(&mut self, hosts: usize) {
        for _ in 0..hosts {
            let (id, boot) = (HostId::from_uuid(self.uuid()), self.uuid());
            let name = format!("host-{:05}", self.hosts.len());
            self.hosts.push(PlayedHost { id, boot, name, vcpus: 64, memory_mib: 65_536, vms: Vec::new() });
        }
    }

    /// How many VMs there are.
    #[must_use]
    pub fn vms(&self) -> usize {
        self.hosts.iter().map(|h| h.vms.len()).sum()
    }

    fn uuid(&mut self) -> Uuid {
        uuid::Builder::from_random_bytes(self.random.random()).into_uuid()
    }
}

impl PlayedHost {
    /// What its agent says first. `vms` is what it has, `newest_term` what it has seen. Fits the record that
    /// [`super::fill`] writes: a controller that reads it has nothing to change.
    #[must_use]
    pub fn hello(&self, pool: Uuid, vms: Vec<v1::VmReport>, newest_term: i64) -> v1::Hello {
        let pool = v1::Pool {
            name: specs::SHARED.to_owned(),
            kind: v1::PoolKind::Shared.into(),
            id: pool.to_string(),
            capacity_bytes: POOL_BYTES,
            free_bytes: POOL_BYTES / 2,
            ..Default::default()
        };
        v1::Hello {
            host_id: self.id.to_string(),
            name: self.name.clone(),
            boot_id: self.boot.to_string(),
            agent_version: AGENT_VERSION.to_owned(),
            protocol: AGENT_PROTOCOL,
            capacity: Some(v1::Resources { vcpus: self.vcpus, memory_mib: self.memory_mib }),
            pools: vec![pool],
            accelerator: Some(v1::Accelerator { kind: v1::AcceleratorKind::Kvm.into(), why: CPU_NAME.to_owned() }),
            vms,
            newest_term,
            agent_instance: self.boot.to_string(),
            cpu: Some(v1::Cpu {
                name: CPU_NAME.to_owned(),
                features: CPU_LEVEL.features().map(str::to_owned).collect(),
                fingerprint: String::new(),
            }),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_vms_as_were_asked_for_and_where() {
        let site = Site::new(100, 1000, 200, (5, 20));
        assert_eq!((site.hosts.len(), site.vms()), (100, 1000));
        assert_eq!((site.hosts[0].vms.len(), site.hosts[5].vms.len()), (200, 20));
        assert!(site.hosts[6..].iter().all(|h| [7, 8].contains(&h.vms.len())));
        assert_eq!(Site::new(3, 9, 1, (0, 0)).hosts[2].vms, Site::new(3, 9, 1, (0, 0)).hosts[2].vms);
    }
}
