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
mod tests {
    use std::path::Component;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::{
        storage::pools::Kind,
        vm::{
            desired::{ImageFile, Kernel},
            disks::CloneFrom,
            fake,
        },
    };

    fn pools() -> BTreeMap<String, Pool> {
        ["a", "b"]
            .map(|n| {
                let path = PathBuf::from(format!("/pools/{n}"));
                (n.to_owned(), Pool { name: n.into(), path, kind: Kind::Local })
            })
            .into()
    }

    fn vm() -> VmId {
        VmId::from_uuid(Uuid::from_u128(1))
    }

    fn image_id(n: u128) -> ImageId {
        ImageId::from_uuid(Uuid::from_u128(n))
    }

    fn image_of(n: u128, roles: &[Role]) -> Image {
        let file = |role: &Role| ImageFile {
            role: *role,
            source: "/images/x".into(),
            sha256: "0".repeat(64),
            size_bytes: 4,
            format: (*role == Role::Disk).then_some(Format::Qcow2),
        };
        Image {
            id: image_id(n),
            name: format!("image{n}"),
            files: roles.iter().map(file).collect(),
            command_line: "console=ttyS0".into(),
        }
    }

    fn disk(name: &str, pool: &str, image: Option<u128>) -> Disk {
        Disk { name: name.into(), pool: pool.into(), size_bytes: 512, image: image.map(image_id), ..Disk::default() }
    }

    fn wanted(disks: Vec<Disk>, images: Vec<Image>) -> Desired {
        let mut desired = fake::desired(1);
        desired.spec.as_mut().unwrap().disks = disks;
        desired.images = images;
        desired.disk_generation = 1;
        desired
    }

    /// D2
    #[test]
    fn what_comes_later_has_a_file_of_its_own_and_what_is_detached_none_in_the_machine() {
        let id = Some(Uuid::from_u128(5));
        let data = |state| Disk { id, state, ..disk("data", "b", None) };
        let later = |state| wanted(vec![disk("root", "a", None), data(state)], vec![]);
        let made = |state| plan(vm(), &later(state), &pools()).unwrap().disks;
        let file = "data.00000000-0000-0000-0000-000000000005.1.qcow2";
        assert!(made(DiskState::Attaching)[1].path.ends_with(file));
        for (state, expected) in
            [(DiskState::Attaching, DisksExpected::New), (DiskState::Returning, DisksExpected::Exist)]
        {
            assert_eq!(made(state)[1].expected, expected, "{state:?}");
        }
        for state in [DiskState::Detaching, DiskState::Detached, DiskState::Deleting] {
            assert_eq!(made(state).len(), 1, "{state:?}");
            let desired = later(state);
            assert!(
                removals(vm(), &desired, &pools()).unwrap().iter().any(|r| r.files.iter().any(|f| f.ends_with(file)))
            );
        }
        // The file of one is not that of another with its name.
        let old = removal(vm(), &disk("data", "b", None), &later(DiskState::Deleting), &pools()).unwrap();
        assert!(!old.files.iter().any(|f| f.ends_with(file)) && old.files.iter().any(|f| f.ends_with("data.1.qcow2")));
    }

    #[test]
    fn m7_what_was_not_copied_keeps_its_name_and_is_never_made_anew() {
        let kept = Disk { kept_generation: Some(1), ..disk("data", "b", None) };
        let coming = Desired { disk_generation: 3, ..wanted(vec![disk("root", "a", None), kept], vec![]) };
        let made = plan(vm(), &coming, &pools()).unwrap().disks;
        let names: Vec<_> = made.iter().map(|d| d.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["root.3.qcow2", "data.1.qcow2"]);
        assert_eq!((made[0].expected, made[1].expected), (DisksExpected::New, DisksExpected::Exist));
        let gone = removals(vm(), &coming, &pools()).unwrap();
        assert!(gone.iter().any(|r| r.files.iter().any(|f| f.ends_with("data.1.qcow2"))), "{gone:?}");
        let long_after = Desired { disk_generation: 5000, ..coming.clone() };
        let gone = removals(vm(), &long_after, &pools()).unwrap();
        assert!(gone.iter().any(|r| r.files.iter().any(|f| f.ends_with("data.1.qcow2"))), "{gone:?}");
        // Copies are made of the very files.
        let clone_from = CloneFrom {
            vm: vm(),
            disk_generation: 3,
            kept_generations: [("data".to_owned(), 1)].into(),
            snapshot: None,
        };
        let disks = vec![disk("root", "a", None), disk("data", "b", None)];
        let clone = Desired { clone_from: Some(clone_from), ..wanted(disks, vec![]) };
        let copied = plan(VmId::from_uuid(Uuid::from_u128(2)), &clone, &pools()).unwrap().disks;
        let from = copied.iter().map(|d| d.origin.as_ref().unwrap().path.clone());
        assert!(from.eq(made.iter().map(|d| d.path.clone())));
    }

    /// D3
    #[test]
    fn writeback_is_refused_where_other_hosts_have_the_pool_too() {
        let cached = |cache| wanted(vec![Disk { cache, ..disk("root", "a", None) }], vec![]);
        let mut shared = pools();
        shared.get_mut("a").unwrap().kind = Kind::Shared;
        assert_eq!(plan(vm(), &cached(DiskCache::Writeback), &shared), Err(Problem::Writeback("a".into())));
        assert!(plan(vm(), &cached(DiskCache::Writethrough), &shared).is_ok());
        assert!(plan(vm(), &cached(DiskCache::Writeback), &pools()).is_ok());
    }

    #[test]
    fn a_plan_names_each_file_once() {
        let disks = vec![disk("root", "a", Some(9)), disk("data", "a", Some(9)), disk("more", "b", None)];
        let mut desired = wanted(disks, vec![image_of(9, &[Role::Disk]), image_of(8, &[Role::Kernel, Role::Initrd])]);
        desired.spec.as_mut().unwrap().kernel = Some(Kernel { image: image_id(8), command_line: String::new() });
        let plan = plan(vm(), &desired, &pools()).unwrap();
        let targets: Vec<_> = plan.fetches.iter().map(|f| f.target.to_str().unwrap()).collect();
        let image = |n: u128| image_id(n).to_string();
        assert_eq!(
            targets,
            [
                format!("/pools/a/images/{}/disk", image(9)),
                format!("/pools/a/images/{}/kernel", image(8)),
                format!("/pools/a/images/{}/initrd", image(8)),
            ]
        );
        assert_eq!(plan.disks[0].path, PathBuf::from(format!("/pools/a/disks/{}/root.1.qcow2", vm())));
        assert_eq!(plan.disks[0].base.as_ref().unwrap().path, format!("../../images/{}/disk", image(9)));
        assert_eq!(plan.disks[2].base, None);
        assert_eq!(plan.kernel.as_ref().unwrap().command_line, "console=ttyS0");
        assert_eq!(plan.pools(), ["a", "b"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let problem = |desired: &Desired| plan(vm(), desired, &pools()).unwrap_err().to_string();
        assert_eq!(problem(&wanted(vec![disk("d", "c", None)], vec![])), "this host has no pool c");
        let text = problem(&wanted(vec![disk("d", "a", Some(9))], vec![]));
        assert_eq!(text, format!("image {} was not sent along", image_id(9)));
        let text = problem(&wanted(vec![disk("d", "a", Some(9))], vec![image_of(9, &[Role::Kernel])]));
        assert_eq!(text, "image image9 has no Disk file");
    }

    #[test]
    fn a_disk_in_a_network_pool_is_opened_by_its_incarnation_and_made_by_the_host_that_exports_it() {
        let address: SocketAddr = "10.0.0.9:10809".parse().unwrap();
        let mut desired = wanted(vec![disk("root", "net", Some(9))], vec![image_of(9, &[Role::Disk])]);
        assert_eq!(plan(vm(), &desired, &pools()).unwrap_err(), Problem::NoPool("net".into()));
        desired.network_pools.insert("net".into(), address);
        let here = plan(vm(), &desired, &pools()).unwrap();
        let export = format!("vm-{}.1.root", vm());
        assert_eq!(here.places, [("root".to_owned(), Place::Export { address, export })]);
        assert!(here.disks.is_empty() && here.fetches.is_empty() && here.pools().is_empty());
        assert_eq!(removals(vm(), &desired, &pools()), Ok(Vec::new()), "its files are not here");

        let mut pools = pools();
        let kind = Kind::Exported(address);
        pools.insert("net".into(), Pool { name: "net".into(), path: "/pools/net".into(), kind });
        let made = exported(vm(), &desired, &pools).unwrap();
        assert_eq!((made.disks.len(), made.fetches.len()), (1, 1));
        assert_eq!(made.disks[0].path, PathBuf::from(format!("/pools/net/disks/{}/root.1.qcow2", vm())));
        // Also a VM on the storage host itself goes through the export.
        assert_eq!(plan(vm(), &desired, &pools).unwrap().places, here.places);
        desired.network_pools.clear();
        assert_eq!(plan(vm(), &desired, &pools).unwrap_err(), Problem::NotServed("net".into()));
        assert_eq!(
            disks(vm(), &desired, &pools),
            Err(Problem::Exported("net".into())),
            "what serves them has them open"
        );
        assert_eq!(removals(vm(), &desired, &pools).unwrap()[0].files.len(), 4);
        let nodes = exported_nodes(vm(), &desired, &pools);
        assert!(nodes.len() == 1 && nodes[0].len() == 31, "{nodes:?}");
    }

    /// P5: exact names, and only those of this VM.
    #[test]
    fn a_deletion_names_files_one_by_one() {
        let removals = removals(vm(), &wanted(vec![disk("root", "a", Some(9))], vec![]), &pools()).unwrap();
        let dir = PathBuf::from(format!("/pools/a/disks/{}", vm()));
        let files = [".root.0.qcow2.tmp", "root.0.qcow2", ".root.1.qcow2.tmp", "root.1.qcow2"].map(|f| dir.join(f));
        assert_eq!(removals, [Removal { pool: "a".into(), files: files.into(), dir }]);
    }

    #[test]
    fn the_variables_of_uefi_lie_beside_the_first_disk_and_go_with_it() {
        let mut desired = wanted(vec![disk("root", "b", None), disk("data", "a", None)], vec![]);
        desired.spec.as_mut().unwrap().firmware = Firmware::Uefi;
        let vars = plan(vm(), &desired, &pools()).unwrap().firmware_vars.unwrap();
        let dir = PathBuf::from(format!("/pools/b/disks/{}", vm()));
        assert_eq!((vars.path, vars.pool.as_str()), (dir.join("uefi-vars.1.fd"), "b"));
        let removals = removals(vm(), &desired, &pools()).unwrap();
        let in_pool = |name: &str| removals.iter().find(|r| r.pool == name).unwrap().files.clone();
        assert!(in_pool("b").contains(&dir.join("uefi-vars.0.fd")) && in_pool("b").contains(&vars.temporary));
        assert!(!in_pool("a").iter().any(|f| f.to_str().unwrap().contains("uefi")));
        // Where the first disk is served over the network, they are, too: made by the host that exports it, and by no other.
        let address: SocketAddr = "10.0.0.3:10809".parse().unwrap();
        let root = || vec![disk("root", "net", None)];
        let mut netted = Desired { network_pools: [("net".to_owned(), address)].into(), ..wanted(root(), vec![]) };
        netted.spec.as_mut().unwrap().firmware = Firmware::Uefi;
        let found = plan(vm(), &netted, &pools()).unwrap();
        let export = format!("vm-{}.1.{VARS}", vm());
        assert_eq!((found.firmware_vars, found.vars_place), (None, Some(Place::Export { address, export })));
        let exporter =
            [("net".to_owned(), Pool { name: "net".into(), path: "/net".into(), kind: Kind::Exported(address) })]
                .into();
        let made = exported(vm(), &netted, &exporter).unwrap().firmware_vars.unwrap();
        assert_eq!(made.path, PathBuf::from(format!("/net/disks/{}/uefi-vars.1.fd", vm())));
        assert_eq!(exported_nodes(vm(), &netted, &exporter).len(), 2);
        assert!(names::check(VARS).is_err(), "no disk can be called so");
        desired.spec.as_mut().unwrap().disks.clear();
        assert_eq!(plan(vm(), &desired, &pools()), Err(Problem::NoDisk));
    }

    proptest! {
        /// S1: whatever the names are, no path leaves the VM's own directory.
        #[test]
        fn no_path_climbs_out_of_its_pool(name in "[a./\\-_\0]{0,8}|\\.\\./.*|.{0,70}", pool_name in "a|b|\\.\\.|[a/.]{0,4}") {
            let desired = wanted(vec![disk(&name, &pool_name, None)], vec![]);
            let root = |pool: &str| PathBuf::from("/pools").join(pool).join("disks").join(vm().to_string());
            let mut paths = vec![];
            if let Ok(plan) = plan(vm(), &desired, &pools()) {
                paths.extend(plan.disks.into_iter().flat_map(|d| [(d.pool.clone(), d.path), (d.pool, d.temporary)]));
            }
            if let Ok(removals) = removals(vm(), &desired, &pools()) {
                paths.extend(removals.into_iter().flat_map(|r| r.files.into_iter().map(move |f| (r.pool.clone(), f))));
            }
            for (pool, path) in paths {
                prop_assert_eq!(path.parent().unwrap(), root(&pool));
                prop_assert!(path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_))));
            }
        }
    }
}
