//! What hosts have in common: everything that a filter may ask of a host except who it is, how it is now, and how much room
//! is left on it. Hosts of one kind give one answer to it, so it is asked once per kind and not once per host (`index.rs`).
//!
//! The filters see these attributes of a host nowhere but here: an attribute that is not part of the kind cannot be asked for.

use std::collections::{BTreeMap, BTreeSet};

use uncloud_proto::cpu::Level;
use uuid::Uuid;

use super::{Arrival, Home, Rejection, Request};
use crate::model::{
    HostRecord,
    host::{AcceleratorKind, PoolAccess},
};

/// A kind of host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    /// MiB for VMs.
    pub(super) memory_mib: u64,
    /// CPU threads.
    pub(super) vcpus: u32,
    pub(super) accelerator: AcceleratorKind,
    migrations: Migrations,
    /// What guests can have of its CPU. Empty: not known.
    features: BTreeSet<String>,
    /// The same for CPUs that are the same in everything.
    fingerprint: String,
    labels: BTreeMap<String, String>,
    bridges: BTreeSet<String>,
    /// In the order of the record.
    pools: Vec<PoolKind>,
}

/// What the scores of its hosts depend on, besides what is promised on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// MiB for VMs.
    pub(super) memory_mib: u64,
    pub(super) accelerator: AcceleratorKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Migrations {
    /// It has an address for them.
    Come,
    DoNotCome,
}

/// A pool without its size: local pools seldom have the same, and room is not a matter of the kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PoolKind {
    name: String,
    shared_id: Option<Uuid>,
    health: Health,
    access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Good,
    Troubled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Access {
    Directory,
    Network,
    Exported,
}

impl Kind {
    pub(super) fn of(host: &HostRecord) -> Self {
        let pools = host.pools.iter().map(|pool| PoolKind {
            name: pool.name.clone(),
            shared_id: pool.shared_id,
            health: if pool.problem.is_empty() { Health::Good } else { Health::Troubled },
            access: match pool.access {
                PoolAccess::Directory => Access::Directory,
                PoolAccess::Network => Access::Network,
                PoolAccess::Exported { .. } => Access::Exported,
            },
        });
        Self {
            memory_mib: host.memory_mib,
            vcpus: host.vcpus,
            accelerator: host.accelerator.kind,
            migrations: if host.migration_address.is_empty() { Migrations::DoNotCome } else { Migrations::Come },
            features: host.cpu.features.clone(),
            fingerprint: host.cpu.fingerprint.clone(),
            labels: host.labels.clone(),
            bridges: host.bridges.clone(),
            pools: pools.collect(),
        }
    }

    pub(super) const fn size(&self) -> Size {
        Size { memory_mib: self.memory_mib, accelerator: self.accelerator }
    }

    /// Whether hosts of this kind can take the VM as far as that is a matter of their kind. Its signature has all that is asked for.
    pub(super) fn admits(&self, request: &Request) -> bool {
        // The signature knows of each level, and no two share a bit.
        let cpu = request.cpu.level().is_some() || self.check_cpu(request).is_ok();
        cpu && self.check_arrival(request).is_ok() && self.check_equipment(request).is_ok()
    }

    /// Whether a VM that comes like this can come at all.
    pub(super) fn check_arrival(&self, request: &Request) -> Result<(), Rejection> {
        match &request.arrival {
            Arrival::Start | Arrival::Removal => Ok(()),
            Arrival::Migration { .. } if self.migrations == Migrations::DoNotCome => Err(Rejection::NoMigrations),
            Arrival::Migration { accelerator, .. } if *accelerator != self.accelerator => {
                Err(Rejection::OtherAccelerator)
            }
            Arrival::Migration { .. } => Ok(()),
        }
    }

    /// Whether it has what the VM asks for.
    pub(super) fn check_fit(&self, request: &Request) -> Result<(), Rejection> {
        self.check_cpu(request)?;
        self.check_equipment(request)
    }

    fn check_equipment(&self, request: &Request) -> Result<(), Rejection> {
        for (key, value) in &request.host_labels {
            if self.labels.get(key) != Some(value) {
                return Err(Rejection::Label { key: key.clone(), value: value.clone() });
            }
        }
        if let Some(bridge) = request.bridges.iter().find(|b| !self.bridges.contains(*b)) {
            return Err(Rejection::NoBridge(bridge.clone()));
        }
        self.check_storage(request)
    }

    fn check_cpu(&self, request: &Request) -> Result<(), Rejection> {
        match request.cpu.level() {
            Some(level) => {
                let missing: Vec<&str> = level.features().filter(|f| !self.has_feature(f)).collect();
                if missing.is_empty() {
                    return Ok(());
                }
                Err(Rejection::Features { missing: missing.join(", "), model: level.name() })
            }
            None => match (&request.arrival, self.accelerator) {
                (_, AcceleratorKind::Tcg) => Err(Rejection::NoOwnCpu),
                (Arrival::Migration { fingerprint, .. }, AcceleratorKind::Kvm)
                    if fingerprint.is_empty() || *fingerprint != self.fingerprint =>
                {
                    Err(Rejection::OtherCpu)
                }
                (Arrival::Start | Arrival::Removal | Arrival::Migration { .. }, AcceleratorKind::Kvm) => Ok(()),
            },
        }
    }

    /// Of a host that has not said anything, only what every host has is taken for granted.
    fn has_feature(&self, feature: &str) -> bool {
        self.features.contains(feature) || self.features.is_empty() && Level::V2.features().any(|v2| v2 == feature)
    }

    fn check_storage(&self, request: &Request) -> Result<(), Rejection> {
        for name in request.pools.keys() {
            let Some(pool) = self.pools.iter().find(|p| p.name == *name) else {
                return Err(Rejection::NoPool(name.clone()));
            };
            match pool.health {
                Health::Good => {}
                Health::Troubled => return Err(Rejection::PoolProblem(name.clone())),
            }
            let networked = match pool.access {
                Access::Directory => false,
                Access::Network | Access::Exported => true,
            };
            match request.arrival {
                Arrival::Removal if pool.access == Access::Network => {
                    return Err(Rejection::NotItsFiles(name.clone()));
                }
                Arrival::Start | Arrival::Migration { .. } if networked && request.pools.len() > 1 => {
                    return Err(Rejection::MixedPools(name.clone()));
                }
                Arrival::Start | Arrival::Removal | Arrival::Migration { .. } => {}
            }
            let alone = !networked && pool.shared_id.is_none();
            match request.arrival {
                // D3
                Arrival::Start | Arrival::Migration { .. } if !alone && request.writeback_pools.contains(name) => {
                    return Err(Rejection::Writeback(name.clone()));
                }
                Arrival::Start | Arrival::Removal | Arrival::Migration { .. } => {}
            }
            let shared = match &request.home {
                Home::Anywhere | Home::OnlyHost(_) => None,
                Home::SharedPools { ids } => ids.get(name),
            };
            match (shared, &request.arrival) {
                // The same name does not make it the same directory: the id in the marker does.
                (Some(_), _) if pool.shared_id.as_ref() != shared => return Err(Rejection::OtherPool(name.clone())),
                // Disks that only one host has are copied into a pool of the same kind: what is void in it can be removed.
                (None, Arrival::Migration { .. }) if pool.shared_id.is_some() => {
                    return Err(Rejection::OtherPool(name.clone()));
                }
                (Some(_), _) | (None, Arrival::Migration { .. } | Arrival::Start | Arrival::Removal) => {}
            }
        }
        Ok(())
    }

    /// What it has, as bits.
    pub(super) fn signature(&self) -> Signature {
        let mut has = Signature::default();
        for level in [Level::V2, Level::V3, Level::V4] {
            if level.features().all(|f| self.has_feature(f)) {
                has.level(level);
            }
        }
        has.accelerator(self.accelerator);
        match self.migrations {
            Migrations::Come => has.set(Signature::MIGRATIONS),
            Migrations::DoNotCome => {}
        }
        for (key, value) in &self.labels {
            has.word(b'l', key.as_bytes(), value.as_bytes());
        }
        for bridge in &self.bridges {
            has.word(b'b', bridge.as_bytes(), &[]);
        }
        for pool in &self.pools {
            has.word(b'p', pool.name.as_bytes(), &[]);
            if let Some(id) = &pool.shared_id {
                has.word(b'i', pool.name.as_bytes(), id.as_bytes());
            }
        }
        has
    }
}

/// What a host has, or what a VM asks for, as a few bits: a host that lacks one of the bits asked for lacks something. One that
/// has them all may still lack something, because different things may share a bit ([`Kind::admits`] knows).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signature(u128);

impl Signature {
    const MIGRATIONS: u32 = 0;
    const KVM: u32 = 1;
    const TCG: u32 = 2;
    const V2: u32 = 3;
    const V3: u32 = 4;
    const V4: u32 = 5;
    /// The first of those that words share.
    const WORDS: u32 = 6;

    /// What the VM asks for of a kind of host.
    pub(super) fn asked_for(request: &Request) -> Self {
        let mut asked = Self::default();
        match request.cpu.level() {
            Some(level) => asked.level(level),
            None => asked.set(Self::KVM),
        }
        match &request.arrival {
            Arrival::Start | Arrival::Removal => {}
            Arrival::Migration { accelerator, .. } => {
                asked.set(Self::MIGRATIONS);
                asked.accelerator(*accelerator);
            }
        }
        for (key, value) in &request.host_labels {
            asked.word(b'l', key.as_bytes(), value.as_bytes());
        }
        for bridge in &request.bridges {
            asked.word(b'b', bridge.as_bytes(), &[]);
        }
        for pool in request.pools.keys() {
            asked.word(b'p', pool.as_bytes(), &[]);
            match &request.home {
                Home::Anywhere | Home::OnlyHost(_) => {}
                Home::SharedPools { ids } => {
                    if let Some(id) = ids.get(pool) {
                        asked.word(b'i', pool.as_bytes(), id.as_bytes());
                    }
                }
            }
        }
        asked
    }

    pub(super) const fn has_all(self, asked: Self) -> bool {
        self.0 & asked.0 == asked.0
    }

    const fn set(&mut self, bit: u32) {
        self.0 |= 1 << bit;
    }

    const fn level(&mut self, level: Level) {
        self.set(match level {
            Level::V2 => Self::V2,
            Level::V3 => Self::V3,
            Level::V4 => Self::V4,
        });
    }

    const fn accelerator(&mut self, kind: AcceleratorKind) {
        self.set(match kind {
            AcceleratorKind::Kvm => Self::KVM,
            AcceleratorKind::Tcg => Self::TCG,
        });
    }

    /// FNV-1a over the word: the same on every controller, and a few nanoseconds.
    fn word(&mut self, what: u8, first: &[u8], second: &[u8]) {
        let bytes = [what].into_iter().chain(first.iter().copied()).chain([0]).chain(second.iter().copied());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        // The upper half is the better mixed one; less than 122 fits.
        let free = u64::from(u128::BITS - Self::WORDS);
        self.set(Self::WORDS + u32::try_from((hash >> 32) % free).unwrap_or(0));
    }
}
