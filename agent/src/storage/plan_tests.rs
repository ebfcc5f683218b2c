//! Which files a VM needs, and that no name leads elsewhere.

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
    for (state, expected) in [(DiskState::Attaching, DisksExpected::New), (DiskState::Returning, DisksExpected::Exist)]
    {
        assert_eq!(made(state)[1].expected, expected, "{state:?}");
    }
    for state in [DiskState::Detaching, DiskState::Detached, DiskState::Deleting] {
        assert_eq!(made(state).len(), 1, "{state:?}");
        let desired = later(state);
        assert!(removals(vm(), &desired, &pools()).unwrap().iter().any(|r| r.files.iter().any(|f| f.ends_with(file))));
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
    let clone_from =
        CloneFrom { vm: vm(), disk_generation: 3, kept_generations: [("data".to_owned(), 1)].into(), snapshot: None };
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
    assert_eq!(disks(vm(), &desired, &pools), Err(Problem::Exported("net".into())), "what serves them has them open");
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
        [("net".to_owned(), Pool { name: "net".into(), path: "/net".into(), kind: Kind::Exported(address) })].into();
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
