//! Which files a VM needs, and which of its files a deletion removes. Pure.
//!
//! # Invariants
//!
//! * **S1** Every path is a pool's directory followed by parts that are ids or checked names. A name is checked here
//!   again although the session has done so: these paths are created and deleted by root.
//! * **P5** A deletion names files one by one. There is no pattern and no recursion.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use uncloud_proto::{
    ids::{ImageId, VmId},
    names,
};
use uuid::Uuid;

use super::{
    exports::plan::Name,
    images::hex,
    place::Place,
    pools::{Kind, Pool},
};
use crate::vm::desired::{Desired, Disk, DiskCache, DiskState, DisksExpected, Firmware, Format, Image, Role, Spec};
use sha2::{Digest, Sha256};

/// What the variables of UEFI are called where disks have names. No disk is called so.
pub const VARS: &str = ".uefi-vars";

/// So many older generations of a disk are looked for when it is deleted. Each stands for one loss of all disks, or for one migration that
/// copied them.
const MOST_GENERATIONS: u32 = 1000;

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The pool is not there.
    #[error("this host has no pool {0}")]
    NoPool(String),
    /// The host has no pool at all, and the kernel must lie in one.
    #[error("this host has no pool to keep the kernel in")]
    NoPools,
    /// The leader named an image and did not send it.
    #[error("image {0} was not sent along")]
    NoImage(ImageId),
    /// The image lacks a file.
    #[error("image {image} has no {role:?} file")]
    NoFile {
        /// Its name.
        image: String,
        /// What is missing.
        role: Role,
    },
    /// A name cannot be part of a path.
    #[error("{field} {problem}")]
    Name {
        /// What it is the name of.
        field: &'static str,
        /// What is wrong with it.
        problem: names::BadName,
    },
    /// The variables of UEFI lie beside the first disk.
    #[error("the VM boots by UEFI and has no disk beside which its variables could lie")]
    NoDisk,
    /// The leader has not said where the pool is served.
    #[error(
        "pool {0} is one that this host exports, and the leader has not said that its disks are served; this is tried again"
    )]
    NotServed(String),
    /// D3
    #[error(
        "a disk in pool {0}, which other hosts have, too, cannot have the cache mode writeback; choose none or writethrough"
    )]
    Writeback(String),
    /// There is nothing to plan for.
    #[error("the VM has no spec")]
    NoSpec,
    /// What serves its disks has them open.
    #[error("the disks in pool {0} are served over the network, and changed by what serves them only")]
    Exported(String),
}

/// The files that a VM needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Image files that must be in a pool, each once.
    pub fetches: Vec<Fetch>,
    /// Disks that are made here.
    pub disks: Vec<DiskPlan>,
    /// Where the VM's disks are for QEMU, by name, in the guest's order.
    pub places: Vec<(String, Place)>,
    /// The kernel.
    pub kernel: Option<KernelPlan>,
    /// What UEFI keeps its variables in, if that is made here.
    pub firmware_vars: Option<VarsPlan>,
    /// Where that is for QEMU.
    pub vars_place: Option<Place>,
}

/// A variable store of UEFI that must be in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VarsPlan {
    /// Name of the pool.
    pub pool: String,
    /// Its file.
    pub path: PathBuf,
    /// What it is called while it is made.
    pub temporary: PathBuf,
}

/// An image file that must be in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Name of the pool.
    pub pool: String,
    /// The image.
    pub image_id: ImageId,
    /// Name of the image.
    pub image: String,
    /// What it is to the image.
    pub role: Role,
    /// Where it comes from.
    pub source: String,
    /// What its sha256 is. Empty: that is found out by this fetch.
    pub sha256: String,
    /// Its size in bytes. 0: likewise.
    pub size_bytes: u64,
    /// Format, for a disk. Absent: likewise.
    pub format: Option<Format>,
    /// Where it is to lie.
    pub target: PathBuf,
}

/// A disk that must be in a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// Its name.
    pub name: String,
    /// Name of the pool.
    pub pool: String,
    /// Its file.
    pub path: PathBuf,
    /// What it is called while it is made.
    pub temporary: PathBuf,
    /// The image below it.
    pub base: Option<Base>,
    /// Its virtual size; 0 means the base's.
    pub size_bytes: u64,
    /// Whether it is an error that it is missing.
    pub expected: DisksExpected,
    /// The disk that it is made a copy of.
    pub origin: Option<Origin>,
}

/// A disk of another VM, in the same pool, that is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The VM.
    pub vm: VmId,
    /// The disk's file.
    pub path: PathBuf,
    /// What of it. Absent: the disk as it is.
    pub snapshot: Option<Uuid>,
    /// What serves it over the network has it open.
    pub served: bool,
}

/// The image below a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its path, relative to the disk's directory: a shared pool may be mounted elsewhere on another host.
    pub path: String,
    /// Its format, which goes into the disk, so that QEMU never guesses.
    pub format: Format,
}

/// A kernel that QEMU loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPlan {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub command_line: String,
}

/// What a deletion removes in one pool: these files, and the directory if it is empty then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Name of the pool.
    pub pool: String,
    /// The files.
    pub files: Vec<PathBuf>,
    /// The VM's directory in the pool.
    pub dir: PathBuf,
}

impl Plan {
    /// Names of all pools that it touches, each once.
    #[must_use]
    pub fn pools(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.fetches.iter().map(|f| &f.pool).chain(self.disks.iter().map(|d| &d.pool)).cloned().collect();
        names.sort();
        names.dedup();
        names
    }
}

/// The directory of a VM's disks in a pool.
pub(super) fn disks_dir(pool: &Path, vm: VmId) -> PathBuf {
    pool.join("disks").join(vm.to_string())
}

fn checked<'a>(field: &'static str, name: &'a str) -> Result<&'a str, Problem> {
    names::check(name).map_err(|problem| Problem::Name { field, problem })?;
    Ok(name)
}

fn pool<'a>(name: &str, pools: &'a BTreeMap<String, Pool>) -> Result<&'a Pool, Problem> {
    pools.get(checked("the name of a pool", name)?).ok_or_else(|| Problem::NoPool(name.to_owned()))
}

/// Where a VM that runs here finds a pool.
enum Found<'a> {
    /// In a directory.
    Here(&'a Pool),
    /// Over the network, even if it is this host that serves it: then this VM, too, has access as one incarnation.
    Served(SocketAddr),
}

fn find<'a>(name: &str, desired: &Desired, pools: &'a BTreeMap<String, Pool>) -> Result<Found<'a>, Problem> {
    let served = desired.network_pools.get(name).copied().map(Found::Served);
    match pool(name, pools) {
        Ok(pool) => match pool.kind {
            Kind::Local | Kind::Shared => Ok(Found::Here(pool)),
            Kind::Exported(_) => served.ok_or_else(|| Problem::NotServed(name.to_owned())),
        },
        Err(problem) => served.ok_or(problem),
    }
}

/// Plans the files of a VM.
///
/// # Errors
///
/// Something that it names is not there.
pub fn plan(vm: VmId, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Result<Plan, Problem> {
    let spec = desired.spec.as_ref().ok_or(Problem::NoSpec)?;
    let mut plan = Plan::default();
    for disk in spec.disks.iter().filter(|d| d.is_in_machine()) {
        let place = match find(&disk.pool, desired, pools)? {
            Found::Here(pool) => {
                check_cache(disk, pool)?;
                let origin = origin(pool, disk, desired)?;
                let made = DiskPlan { origin, ..disk_in(pool, vm, disk, desired, &mut plan)? };
                let path = made.path.clone();
                plan.disks.push(made);
                Place::File { path }
            }
            Found::Served(address) => {
                if disk.cache == DiskCache::Writeback {
                    return Err(Problem::Writeback(disk.pool.clone()));
                }
                export(vm, disk, desired, address)?
            }
        };
        plan.places.push((disk.name.clone(), place));
    }
    plan.kernel = kernel(spec, desired, pools, &mut plan)?;
    if spec.firmware == Firmware::Uefi {
        let first = spec.disks.first().ok_or(Problem::NoDisk)?;
        plan.vars_place = Some(match find(&first.pool, desired, pools)? {
            Found::Here(pool) => {
                let vars = plan.firmware_vars.insert(vars_plan(vm, first, desired, pool));
                Place::File { path: vars.path.clone() }
            }
            Found::Served(address) => served_as(vm, VARS.to_owned(), desired, address),
        });
    }
    Ok(plan)
}

fn vars_plan(vm: VmId, first: &Disk, desired: &Desired, pool: &Pool) -> VarsPlan {
    let (dir, file) = (disks_dir(&pool.path, vm), vars_name(generation(first, desired)));
    let temporary = dir.join(format!(".{file}.tmp"));
    VarsPlan { pool: pool.name.clone(), path: dir.join(file), temporary }
}

fn export(vm: VmId, disk: &Disk, desired: &Desired, address: SocketAddr) -> Result<Place, Problem> {
    let disk = checked("the name of a disk", &disk.name)?.to_owned();
    Ok(served_as(vm, disk, desired, address))
}

fn served_as(vm: VmId, disk: String, desired: &Desired, address: SocketAddr) -> Place {
    let name = Name { vm, incarnation: desired.incarnation, disk };
    Place::Export { address, export: name.to_string() }
}

/// Where QEMU finds a disk that a storage host serves. Absent: it lies in files of this host.
///
/// # Errors
///
/// Its name is none.
pub fn served(vm: VmId, disk: &Disk, desired: &Desired) -> Result<Option<Place>, Problem> {
    desired.network_pools.get(&disk.pool).map(|&address| export(vm, disk, desired, address)).transpose()
}

/// D3: what a killed QEMU has left in this host's memory is written later, when the VM may run on another host that has the pool.
fn check_cache(disk: &Disk, pool: &Pool) -> Result<(), Problem> {
    match (disk.cache, &pool.kind) {
        (DiskCache::None | DiskCache::Writethrough, _) | (DiskCache::Writeback, Kind::Local) => Ok(()),
        (DiskCache::Writeback, Kind::Shared | Kind::Exported(_)) => Err(Problem::Writeback(pool.name.clone())),
    }
}

/// Where the disks of a VM's machine are that lie in files of this host, in the guest's order, whatever they are overlays of.
///
/// # Errors
///
/// A pool is not there, or is reached over the network.
pub fn disks(vm: VmId, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Result<Vec<DiskPlan>, Problem> {
    let spec = desired.spec.as_ref().ok_or(Problem::NoSpec)?;
    let one = |d: &Disk| {
        let pool = pool(&d.pool, pools)?;
        match pool.kind {
            Kind::Local | Kind::Shared => disk_plan(vm, d, desired, pool, None),
            Kind::Exported(_) => Err(Problem::Exported(pool.name.clone())),
        }
    };
    spec.disks.iter().filter(|d| d.is_in_machine()).map(one).collect()
}

/// Plans what this host has to make of a VM that may run elsewhere: the disks of its machine in pools that this host exports. One that
/// is detached is nothing that the machine has to wait for.
///
/// # Errors
///
/// Something that it names is not there.
pub fn exported(vm: VmId, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Result<Plan, Problem> {
    let spec = desired.spec.as_ref().ok_or(Problem::NoSpec)?;
    let mut plan = Plan::default();
    for disk in spec.disks.iter().filter(|d| d.is_in_machine()) {
        if let Ok(pool) = pool(&disk.pool, pools)
            && let Kind::Exported(_) = pool.kind
        {
            let origin = origin(pool, disk, desired)?;
            let made = DiskPlan { origin, ..disk_in(pool, vm, disk, desired, &mut plan)? };
            plan.disks.push(made);
        }
    }
    plan.firmware_vars = exported_vars(spec, pools).map(|(first, pool)| vars_plan(vm, first, desired, pool));
    Ok(plan)
}

/// The first disk of a VM that boots by UEFI, beside which its variables lie, and its pool, if this host exports that.
fn exported_vars<'a>(spec: &'a Spec, pools: &'a BTreeMap<String, Pool>) -> Option<(&'a Disk, &'a Pool)> {
    let first = spec.disks.first().filter(|_| spec.firmware == Firmware::Uefi)?;
    let pool = pools.get(&first.pool).filter(|p| matches!(p.kind, Kind::Exported(_)))?;
    Some((first, pool))
}

/// The block node by which the daemon that serves disks knows a disk: no two have the same. QEMU allows 31 characters.
#[must_use]
pub fn node_of(vm: VmId, disk: &str, generation: u32) -> String {
    let digest = Sha256::digest(format!("{vm}/{disk}/{generation}"));
    format!("d{}", &hex(&digest)[..30])
}

/// The nodes of all disks of a VM that lie in pools that this host exports.
#[must_use]
pub fn exported_nodes(vm: VmId, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Vec<String> {
    let disks = desired.spec.iter().flat_map(|s| &s.disks);
    let ours = |disk: &&Disk| pools.get(&disk.pool).is_some_and(|p| matches!(p.kind, Kind::Exported(_)));
    let vars = desired.spec.as_ref().and_then(|spec| exported_vars(spec, pools)).map(|_| VARS);
    let names = disks.filter(ours).map(|disk| disk.name.as_str()).chain(vars);
    names.map(|name| node_of(vm, name, desired.disk_generation)).collect()
}

fn disk_in(pool: &Pool, vm: VmId, disk: &Disk, desired: &Desired, plan: &mut Plan) -> Result<DiskPlan, Problem> {
    let base = match disk.image {
        None => None,
        Some(id) => {
            let image = image(id, desired)?;
            let file = require(image, Role::Disk, pool, plan)?;
            let format = file.format.unwrap_or(Format::Raw);
            Some(Base { path: format!("../../images/{id}/{}", Role::Disk.file_name()), format })
        }
    };
    disk_plan(vm, disk, desired, pool, base)
}

/// What a disk that is yet to be made is a copy of.
fn origin(pool: &Pool, disk: &Disk, desired: &Desired) -> Result<Option<Origin>, Problem> {
    Ok(match (desired.disks, &desired.clone_from) {
        (DisksExpected::New, Some(from)) => {
            let generation = from.kept_generations.get(&disk.name).copied().unwrap_or(from.disk_generation);
            Some(Origin {
                vm: from.vm,
                path: disks_dir(&pool.path, from.vm).join(file_name(disk, generation)?),
                snapshot: from.snapshot,
                served: matches!(pool.kind, Kind::Exported(_)),
            })
        }
        (DisksExpected::New | DisksExpected::Exist, _) => None,
    })
}

/// A disk's file ends otherwise, so no disk can have this name.
fn vars_name(generation: u32) -> String {
    format!("uefi-vars.{generation}.fd")
}

fn disk_plan(vm: VmId, disk: &Disk, desired: &Desired, pool: &Pool, base: Option<Base>) -> Result<DiskPlan, Problem> {
    let dir = disks_dir(&pool.path, vm);
    let file = file_name(disk, generation(disk, desired))?;
    Ok(DiskPlan {
        name: disk.name.clone(),
        pool: pool.name.clone(),
        temporary: dir.join(format!(".{file}.tmp")),
        path: dir.join(file),
        base,
        size_bytes: disk.size_bytes,
        expected: expected(disk, desired),
        origin: None,
    })
}

/// M7: the number in its file's name.
fn generation(disk: &Disk, desired: &Desired) -> u32 {
    disk.kept_generation.unwrap_or(desired.disk_generation)
}

/// The generations that a disk may have files of here.
fn generations(disk: &Disk, desired: &Desired) -> impl Iterator<Item = u32> + use<> {
    let newest = desired.disk_generation;
    let oldest = newest.saturating_sub(MOST_GENERATIONS);
    disk.kept_generation.filter(|&kept| kept < oldest).into_iter().chain(oldest..=newest)
}

/// P5: one that is new is made; one that comes back, or stayed where it was when others were copied, is not made anew if it is gone.
fn expected(disk: &Disk, desired: &Desired) -> DisksExpected {
    if disk.kept_generation.is_some() {
        return DisksExpected::Exist;
    }
    match disk.state {
        DiskState::Attaching => DisksExpected::New,
        DiskState::Attached => desired.disks,
        DiskState::Returning | DiskState::Detaching | DiskState::Detached | DiskState::Deleting => DisksExpected::Exist,
    }
}

/// D2: the file of a disk that came later has a random id in its name. Whoever deletes a disk of long ago never finds a newer one.
fn file_name(disk: &Disk, generation: u32) -> Result<String, Problem> {
    let name = checked("the name of a disk", &disk.name)?;
    Ok(match disk.id {
        None => format!("{name}.{generation}.qcow2"),
        Some(id) => format!("{name}.{id}.{generation}.qcow2"),
    })
}

/// Plans the deletion of one disk of a VM that stays, with its older generations.
///
/// # Errors
///
/// Its pool is not there: nobody can say whether the disk is.
pub fn removal(vm: VmId, disk: &Disk, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Result<Removal, Problem> {
    let pool = pool(&disk.pool, pools)?;
    let dir = disks_dir(&pool.path, vm);
    let mut files = Vec::new();
    for generation in generations(disk, desired) {
        let file = file_name(disk, generation)?;
        files.push(dir.join(format!(".{file}.tmp")));
        files.push(dir.join(file));
    }
    Ok(Removal { pool: pool.name.clone(), files, dir })
}

fn image(id: ImageId, desired: &Desired) -> Result<&Image, Problem> {
    desired.images.iter().find(|i| i.id == id).ok_or(Problem::NoImage(id))
}

fn target(pool: &Pool, image: &Image, role: Role) -> PathBuf {
    pool.path.join("images").join(image.id.to_string()).join(role.file_name())
}

/// Puts a file of an image on the list of those that must be in the pool.
fn require<'a>(
    image: &'a Image,
    role: Role,
    pool: &Pool,
    plan: &mut Plan,
) -> Result<&'a crate::vm::desired::ImageFile, Problem> {
    let file = image.files.iter().find(|f| f.role == role);
    let file = file.ok_or_else(|| Problem::NoFile { image: image.name.clone(), role })?;
    let fetch = Fetch {
        pool: pool.name.clone(),
        image_id: image.id,
        image: image.name.clone(),
        role,
        source: file.source.clone(),
        sha256: file.sha256.clone(),
        size_bytes: file.size_bytes,
        format: file.format,
        target: target(pool, image, role),
    };
    if !plan.fetches.contains(&fetch) {
        plan.fetches.push(fetch);
    }
    Ok(file)
}

fn kernel(
    spec: &Spec,
    desired: &Desired,
    pools: &BTreeMap<String, Pool>,
    plan: &mut Plan,
) -> Result<Option<KernelPlan>, Problem> {
    let Some(boot) = &spec.kernel else { return Ok(None) };
    let image = image(boot.image, desired)?;
    // Beside the first disk; a VM without disks takes the pool that VMs take by default.
    let anywhere = || pools.get("default").or_else(|| pools.values().next()).ok_or(Problem::NoPools);
    let pool = match spec.disks.first().map(|disk| find(&disk.pool, desired, pools)).transpose()? {
        Some(Found::Here(pool)) => pool,
        // QEMU reads it itself, so it must be a file on this host.
        Some(Found::Served(_)) | None => anywhere()?,
    };
    require(image, Role::Kernel, pool, plan)?;
    let initrd = match image.files.iter().any(|f| f.role == Role::Initrd) {
        true => {
            require(image, Role::Initrd, pool, plan)?;
            Some(target(pool, image, Role::Initrd))
        }
        false => None,
    };
    let command_line = if boot.command_line.is_empty() { &image.command_line } else { &boot.command_line };
    Ok(Some(KernelPlan { kernel: target(pool, image, Role::Kernel), initrd, command_line: command_line.clone() }))
}

/// Plans the deletion of a VM's disks, those of older generations included.
///
/// # Errors
///
/// A pool is not there: nobody can say whether the disk is.
pub fn removals(vm: VmId, desired: &Desired, pools: &BTreeMap<String, Pool>) -> Result<Vec<Removal>, Problem> {
    let spec = desired.spec.as_ref().ok_or(Problem::NoSpec)?;
    let mut removals: BTreeMap<&str, Removal> = BTreeMap::new();
    for (i, disk) in spec.disks.iter().enumerate() {
        let pool = match pool(&disk.pool, pools) {
            Ok(pool) => pool,
            // Whoever serves it deletes it, when this host has said that the VM is gone.
            Err(Problem::NoPool(_)) if desired.network_pools.contains_key(&disk.pool) => continue,
            Err(problem) => return Err(problem),
        };
        let dir = disks_dir(&pool.path, vm);
        let removal = removals.entry(&pool.name).or_insert_with(|| Removal {
            pool: pool.name.clone(),
            files: Vec::new(),
            dir: dir.clone(),
        });
        for generation in generations(disk, desired) {
            let file = file_name(disk, generation)?;
            let vars = (i == 0 && spec.firmware == Firmware::Uefi).then(|| vars_name(generation));
            for file in [Some(file), vars].into_iter().flatten() {
                removal.files.push(dir.join(format!(".{file}.tmp")));
                removal.files.push(dir.join(file));
            }
        }
    }
    Ok(removals.into_values().collect())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
