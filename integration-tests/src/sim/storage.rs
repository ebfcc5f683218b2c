//! A host's disks: in its own pool, and in the pool that it shares with others.
//!
//! Stands for `agent/src/storage/`: makes and copies what is missing unless it should be there, deletes what it is told to. Which files
//! these are is said by the real `storage::plan`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use uncloud_agent::{
    storage::{
        place,
        plan::{self, DiskPlan, Origin},
        pools::{Kind, Pool},
    },
    vm::{
        desired::{self, Desired, DiskCache, DisksExpected, Disposition},
        state::Event as VmEvent,
    },
};
use uncloud_proto::ids::VmId;
use uuid::Uuid;

use super::{
    agent::Agent,
    clock::MS,
    contents::{Key, Place},
    core::Core,
    host::Host,
    queue::{DiskWork, What, Whom},
};

/// Where the pool is that hosts share.
const SHARED: &str = "/shared";

/// M7: the number in the name of a disk's file.
fn generation(path: &Path) -> u32 {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.rsplit('.').nth(1).and_then(|digits| digits.parse().ok()).unwrap_or_default()
}
/// What is on a disk of which a part was copied before, and another part after it has changed.
const TORN: u64 = u64::MAX;

/// The file of a disk.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// Whose it was made.
    pub(crate) vm: VmId,
    /// Which of its disks.
    pub(crate) key: Key,
    /// In which generation.
    pub(crate) generation: u32,
    /// What its guest has written last. 0: nothing.
    pub(crate) count: u64,
    /// What it was at each snapshot that is there.
    pub(crate) snapshots: BTreeMap<Uuid, u64>,
}

/// The files of a pool.
pub(crate) type Files = BTreeMap<PathBuf, File>;

/// A disk that a QEMU has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    /// Which.
    pub(crate) key: Key,
    /// Where it is.
    pub(crate) place: Place,
    /// Its file.
    pub(crate) path: PathBuf,
}

/// A copy under way.
#[derive(Clone, Debug)]
pub(crate) struct Copying {
    disk: DiskPlan,
    origin: Origin,
    key: Key,
    /// What was on the origin when it began.
    count: u64,
}

/// The pools that each host has.
pub(super) fn pools() -> BTreeMap<String, Pool> {
    let pool = |name: &str, path: &str, kind| (name.to_owned(), Pool { name: name.into(), path: path.into(), kind });
    [pool("local", "/local", Kind::Local), pool("shared", SHARED, Kind::Shared)].into()
}

/// What a disk of the spec is called by the judge.
pub(super) fn key_of(desired: &Desired, name: &str) -> Key {
    let disk = desired.spec.iter().flat_map(|s| &s.disks).find(|d| d.name == name);
    (name.to_owned(), disk.and_then(|d| d.id))
}

pub(super) fn words(problem: &plan::Problem) -> String {
    problem.to_string()
}

impl Host {
    /// A file, if it is there.
    pub(super) fn file<'a>(&'a mut self, core: &'a mut Core, path: &Path) -> Option<&'a mut File> {
        if path.starts_with(SHARED) {
            core.shared_files.get_mut(&self.shared_pool)?.get_mut(path)
        } else {
            self.files.get_mut(path)
        }
    }

    fn add_file(&mut self, core: &mut Core, path: PathBuf, file: File) {
        core.check.contents.made(file.vm, &file.key);
        if path.starts_with(SHARED) {
            core.shared_files.entry(self.shared_pool).or_default().insert(path, file);
        } else {
            self.files.insert(path, file);
        }
    }

    /// What a file's place is to the judge.
    pub(super) fn place(&self, path: &Path) -> Place {
        if path.starts_with(SHARED) { (self.shared_pool, generation(path)) } else { (self.id.uuid(), generation(path)) }
    }

    /// The disks that a machine that is started now has.
    pub(super) fn open_disks(&self, core: &mut Core, vm: VmId, desired: &Desired) -> Vec<Open> {
        let plan = match plan::plan(vm, desired, &self.pools) {
            Ok(plan) => plan,
            Err(problem) => {
                core.check.violation(format!("{vm} is launched, and its disks cannot be planned: {problem}"));
                return Vec::new();
            }
        };
        let open = |(name, found): (String, place::Place)| match found {
            place::Place::File { path } => {
                let place = self.place(&path);
                Some(Open { key: key_of(desired, &name), place, path })
            }
            place::Place::Export { .. } => None,
        };
        let open: Vec<Open> = plan.places.into_iter().filter_map(open).collect();
        let disks = desired.spec.iter().flat_map(|s| &s.disks).filter(|d| d.is_in_machine());
        disks.for_each(|disk| self.judge_cache(core, vm, disk));
        open
    }

    /// D3
    pub(super) fn judge_cache(&self, core: &mut Core, vm: VmId, disk: &desired::Disk) {
        let shared = self.pools.get(&disk.pool).is_none_or(|p| p.kind != Kind::Local);
        if shared && disk.cache == DiskCache::Writeback {
            core.check.violation(format!("D3: disk {} of {vm} is shared, and its writes are done late", disk.name));
        }
    }

    fn check_expected(&mut self, core: &mut Core, disks: &[DiskPlan]) -> Result<(), String> {
        for disk in disks {
            if disk.expected == DisksExpected::Exist && self.file(core, &disk.path).is_none() {
                return Err(format!("disk {} is missing in pool {}", disk.name, disk.pool));
            }
        }
        Ok(())
    }

    /// `storage::disks::make`
    fn make(&mut self, core: &mut Core, vm: VmId, desired: &Desired, disk: &DiskPlan) -> Result<(), String> {
        self.check_expected(core, std::slice::from_ref(disk))?;
        if self.file(core, &disk.path).is_some() {
            return Ok(());
        }
        if disk.origin.is_some() {
            return Err(format!("disk {} is missing in pool {}", disk.name, disk.pool));
        }
        if self.disk_full > 0 {
            return Err("no space left on device".into());
        }
        let (key, generation) = (key_of(desired, &disk.name), generation(&disk.path));
        self.add_file(core, disk.path.clone(), File { vm, key, generation, count: 0, snapshots: BTreeMap::new() });
        Ok(())
    }

    /// `Storage::prepare`. What is to be copied takes a while.
    pub(super) fn prepare(&mut self, core: &mut Core, vm: VmId, (epoch, work): (u64, u64), desired: &Desired) {
        let prepared = match self.begin_copies(core, vm, work, desired) {
            Ok(copies) if copies.is_empty() => self.finish_prepare(core, vm, desired),
            Ok(copies) => {
                let delay = core.between(20, 3000);
                let copied = DiskWork::Copied(Box::new(desired.clone()), copies);
                // The agent gives the copy its name: one that is stopped does so when it goes on.
                return core.after(delay, Whom::Agent(self.index), epoch, What::Disks(vm, epoch, work, copied));
            }
            Err(problem) => VmEvent::PrepareFailed(problem),
        };
        self.done(core, vm, (epoch, work), prepared, None);
    }

    fn begin_copies(
        &mut self,
        core: &mut Core,
        vm: VmId,
        work: u64,
        desired: &Desired,
    ) -> Result<Vec<Copying>, String> {
        let plan = plan::plan(vm, desired, &self.pools).map_err(|p| words(&p))?;
        self.check_expected(core, &plan.disks)?;
        let mut copies = Vec::new();
        for disk in plan.disks {
            let Some(origin) = disk.origin.clone().filter(|_| self.file(core, &disk.path).is_none()) else { continue };
            if self.disk_full > 0 || (!core.healed && core.rng.permille(30)) {
                return Err("qemu-img failed".into());
            }
            let count = self.read(core, &origin).ok_or("the disk to be copied, or its snapshot, is missing")?;
            let key = key_of(desired, &disk.name);
            // Whoever began before has its file taken away.
            core.copying.insert((self.place(&disk.path).0, disk.path.clone()), work);
            copies.push(Copying { disk, origin, key, count });
        }
        Ok(copies)
    }

    fn read(&mut self, core: &mut Core, origin: &Origin) -> Option<u64> {
        let file = self.file(core, &origin.path)?;
        match origin.snapshot {
            Some(id) => file.snapshots.get(&id).copied(),
            None => Some(file.count),
        }
    }

    fn finish_prepare(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        let made = plan::plan(vm, desired, &self.pools)
            .map_err(|p| words(&p))
            .and_then(|plan| plan.disks.iter().try_for_each(|disk| self.make(core, vm, desired, disk)));
        match made {
            Ok(()) => VmEvent::Prepared,
            Err(problem) => VmEvent::PrepareFailed(problem),
        }
    }

    /// `storage::copy`: what has been copied gets its name, if this is still wanted and nobody has taken the file away (CL2).
    pub(super) fn copied(
        &mut self,
        core: &mut Core,
        agent: &Agent,
        vm: VmId,
        (epoch, work): (u64, u64),
        desired: &Desired,
        copies: Vec<Copying>,
    ) {
        if agent.runners.get(&vm).is_none_or(|r| r.work != Some(work)) {
            return; // dropped
        }
        for Copying { disk, origin, key, count } in copies {
            let ours = core.copying.get(&(self.place(&disk.path).0, disk.path.clone())) == Some(&work);
            if !ours || self.file(core, &disk.path).is_some() {
                let problem = VmEvent::PrepareFailed("the file was taken away, or is there".into());
                return self.done(core, vm, (epoch, work), problem, None);
            }
            let count = if self.read(core, &origin) == Some(count) { count } else { TORN };
            core.stats.copies += 1;
            core.log(format_args!("host {}: disk {} of {vm} is a copy: {count}", self.index, disk.name));
            let generation = generation(&disk.path);
            self.add_file(core, disk.path, File { vm, key, generation, count, snapshots: BTreeMap::new() });
        }
        let prepared = self.finish_prepare(core, vm, desired);
        core.after(MS, Whom::Agent(self.index), epoch, What::Done(vm, work, Box::new(prepared), None));
    }

    /// Removes a file, as far as it is there. The judge hears whose it was.
    pub(super) fn remove_file(&mut self, core: &mut Core, path: &Path) -> Option<File> {
        let pool = self.place(path).0;
        let file = if path.starts_with(SHARED) {
            core.shared_files.get_mut(&self.shared_pool)?.remove(path)?
        } else {
            self.files.remove(path)?
        };
        if core.check.is_open(file.vm, (pool, path)) {
            core.check
                .violation(format!("D4: the file of disk {} is removed while {} has it open", file.key.0, file.vm));
        }
        Some(file)
    }

    /// `Storage::delete`
    pub(super) fn delete_disks(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> VmEvent {
        if self.failing > 0 {
            return VmEvent::DeleteFailed("the pool hangs".into());
        }
        core.log(format_args!("host {}: the disks of {vm} are deleted", self.index));
        if self.qemus.get(&vm).is_some_and(|q| q.executing) {
            core.check.violation(format!("P5: the disks of {vm} are deleted while it executes"));
        }
        if desired.disposition == Disposition::Forget {
            // `storage::void`
            let Some(void) = desired.void else { return VmEvent::DisksDeleted };
            let is_void = |f: &File| f.vm == vm && void.has(f.generation);
            let gone: Vec<PathBuf> =
                self.files.iter().filter(|(_, f)| is_void(f)).map(|(path, _)| path.clone()).collect();
            for path in gone {
                if let Some(file) = self.remove_file(core, &path) {
                    core.check.void_removed(vm, (self.id.uuid(), file.generation));
                }
            }
            return VmEvent::DisksDeleted;
        }
        core.check.disks_deleted(vm);
        let removals = match plan::removals(vm, desired, &self.pools) {
            Ok(removals) => removals,
            Err(problem) => return VmEvent::DeleteFailed(problem.to_string()),
        };
        for path in removals.iter().flat_map(|r| &r.files) {
            if let Some(file) = self.remove_file(core, path)
                && file.vm != vm
            {
                core.check.violation(format!("P5: the disks of {vm} are deleted, and one of {} with them", file.vm));
            }
        }
        VmEvent::DisksDeleted
    }

    /// `Storage::make_attached`
    pub(super) fn make_attached(&mut self, core: &mut Core, vm: VmId, desired: &Desired) -> Result<(), String> {
        let comes =
            |d: &desired::Disk| matches!(d.state, desired::DiskState::Attaching | desired::DiskState::Returning);
        if !desired.spec.iter().flat_map(|s| &s.disks).any(comes) {
            return Ok(());
        }
        let plan = plan::disks(vm, desired, &self.pools).map_err(|p| words(&p))?;
        self.check_expected(core, &plan)?;
        let mut new = plan.iter().filter(|d| d.expected == DisksExpected::New);
        new.try_for_each(|disk| self.make(core, vm, desired, disk))
    }

    /// The files that `Storage::delete_detached` removes.
    pub(super) fn files_to_drop(&self, vm: VmId, desired: &Desired) -> Result<Vec<PathBuf>, String> {
        let mut files = Vec::new();
        for disk in desired.spec.iter().flat_map(|s| &s.disks) {
            if disk.state == desired::DiskState::Deleting {
                files.extend(plan::removal(vm, disk, desired, &self.pools).map_err(|p| words(&p))?.files);
            }
        }
        Ok(files)
    }

    /// `Storage::delete_detached`: these files go, whatever they are by now.
    pub(super) fn drop_files(&mut self, core: &mut Core, vm: VmId, paths: &[PathBuf]) {
        for path in paths {
            if let Some(file) = self.remove_file(core, path) {
                core.stats.dropped += 1;
                core.log(format_args!("host {}: disk {} of {vm} is deleted", self.index, file.key.0));
                core.check.note(|c| c.contents.file_removed(file.vm, &file.key));
            }
        }
    }
}
