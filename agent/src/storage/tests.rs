//! Storage as a whole, with the real qemu-img.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};
use uncloud_proto::ids::{HostId, ImageId, VmId};
use uuid::Uuid;

use super::{
    Options, Storage,
    images::hex,
    pools::{Kind, Pool, User},
};
use crate::vm::{
    desired::{Desired, Disk, DisksExpected, Disposition, Firmware, Format, Image, ImageFile, Role},
    disks::{Done, GuestThen, Orders, Revert, SnapshotOrder, Wanted},
    fake,
    starts::Starts,
};

#[path = "copy_tests.rs"]
mod copy_tests;

struct Place {
    dir: tempfile::TempDir,
    storage: Storage,
    user: Option<User>,
}

fn vm() -> VmId {
    VmId::from_uuid(Uuid::from_u128(1))
}

fn image() -> ImageId {
    ImageId::from_uuid(Uuid::from_u128(9))
}

impl Place {
    fn new() -> Self {
        Self::with("qemu-img".into())
    }

    fn with(qemu_img: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("pool")).unwrap();
        fs::write(dir.path().join("image"), vec![7; 4096]).unwrap();
        let root = rustix::process::geteuid().is_root();
        let user = root.then_some(User { uid: 65534, gid: 65534 });
        let pools = vec![Pool { name: "p".into(), path: dir.path().join("pool"), kind: Kind::Local }];
        let image_dirs = vec![dir.path().to_owned()];
        let host = HostId::from_uuid(Uuid::from_u128(2));
        let uefi_vars = dir.path().join("OVMF_VARS.fd");
        fs::write(&uefi_vars, "variables").unwrap();
        let (http, max_image_bytes) = (Err("no network here".to_owned()), 1 << 40);
        let options = Options { pools, image_dirs, user, qemu_img, uefi_vars, host, http, max_image_bytes };
        let storage = Storage::new(options, Starts::new(1));
        Self { dir, storage, user }
    }

    fn desired(&self) -> Desired {
        let disk = |name: &str, size_bytes, image| Disk {
            name: name.into(),
            pool: "p".into(),
            size_bytes,
            image,
            ..Disk::default()
        };
        let mut desired = fake::desired(1);
        desired.spec.as_mut().unwrap().disks = vec![disk("root", 0, Some(image())), disk("data", 1 << 20, None)];
        desired.images = vec![Image {
            id: image(),
            name: "debian".into(),
            files: vec![ImageFile {
                role: Role::Disk,
                source: self.dir.path().join("image").to_str().unwrap().into(),
                sha256: hex(&Sha256::digest(vec![7; 4096])),
                size_bytes: 4096,
                format: Some(Format::Raw),
            }],
            command_line: String::new(),
        }];
        desired
    }

    fn disks(&self) -> PathBuf {
        self.dir.path().join("pool/disks").join(vm().to_string())
    }

    fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.disks()) else { return vec![] };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    async fn prepare(&self, desired: &Desired) -> Result<(), String> {
        self.storage.prepare(vm(), desired).await.map(|_| ()).map_err(|e| e.reason())
    }

    async fn delete(&self, desired: &Desired) -> Result<(), String> {
        self.storage.delete(vm(), desired).await.map_err(|e| e.reason())
    }
}

fn info(path: &Path) -> serde_json::Value {
    let output = Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2"]).arg(path).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn disks_are_made_once_as_overlays_that_belong_to_the_vms_user() {
    let place = Place::new();
    place.prepare(&place.desired()).await.unwrap();
    assert_eq!(place.names(), ["data.0.qcow2", "root.0.qcow2"]);
    let root = place.disks().join("root.0.qcow2");
    let facts = info(&root);
    assert_eq!(facts["virtual-size"], 4096);
    assert_eq!(facts["backing-filename-format"], "raw");
    assert_eq!(facts["backing-filename"], format!("../../images/{}/disk", image()));
    assert_eq!(info(&place.disks().join("data.0.qcow2"))["virtual-size"], 1 << 20);
    if let Some(user) = place.user {
        for path in [root.clone(), place.disks()] {
            let metadata = fs::metadata(path).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (user.uid, user.gid));
        }
    }
    let before = fs::metadata(&root).unwrap().ino();
    place.prepare(&place.desired()).await.unwrap();
    assert_eq!(fs::metadata(&root).unwrap().ino(), before, "what is there is used");
}

#[tokio::test]
async fn each_vm_that_boots_by_uefi_has_variables_of_its_own() {
    let place = Place::new();
    let mut desired = place.desired();
    desired.spec.as_mut().unwrap().firmware = Firmware::Uefi;
    place.prepare(&desired).await.unwrap();
    assert_eq!(place.names(), ["data.0.qcow2", "root.0.qcow2", "uefi-vars.0.fd"]);
    let vars = place.disks().join("uefi-vars.0.fd");
    if let Some(user) = place.user {
        assert_eq!(fs::metadata(&vars).unwrap().uid(), user.uid);
    }
    fs::write(&vars, "changed by the guest").unwrap();
    place.prepare(&desired).await.unwrap();
    assert_eq!(fs::read_to_string(&vars).unwrap(), "changed by the guest");
    place.delete(&desired).await.unwrap();
    assert!(!place.disks().exists());
    // A host without the firmware says what to install, and leaves nothing.
    fs::remove_file(place.dir.path().join("OVMF_VARS.fd")).unwrap();
    let error = place.prepare(&desired).await.unwrap_err();
    assert!(error.contains("ovmf"), "{error}");
    assert_eq!(place.names(), ["data.0.qcow2", "root.0.qcow2"]);
}

/// P5.
#[tokio::test]
async fn a_disk_that_should_be_there_is_never_made_anew() {
    let place = Place::new();
    let exist = Desired { disks: DisksExpected::Exist, ..place.desired() };
    assert_eq!(place.prepare(&exist).await.unwrap_err(), "disk root is missing in pool p");
    assert_eq!(place.names(), [""; 0]);
    place.prepare(&place.desired()).await.unwrap();
    place.prepare(&exist).await.unwrap();
    fs::remove_file(place.disks().join("data.0.qcow2")).unwrap();
    assert_eq!(place.prepare(&exist).await.unwrap_err(), "disk data is missing in pool p");
    assert_eq!(place.names(), ["root.0.qcow2"]);
    // Made anew only under another generation.
    let anew = Desired { disk_generation: 1, ..place.desired() };
    place.prepare(&anew).await.unwrap();
    assert_eq!(place.names(), ["data.1.qcow2", "root.0.qcow2", "root.1.qcow2"]);
}

/// P5.
#[tokio::test]
async fn a_deletion_removes_this_vms_disks_and_nothing_else() {
    let place = Place::new();
    place.prepare(&place.desired()).await.unwrap();
    place.delete(&place.desired()).await.unwrap();
    assert!(!place.disks().exists());
    place.delete(&place.desired()).await.unwrap();

    place.prepare(&place.desired()).await.unwrap();
    fs::write(place.disks().join("precious"), "x").unwrap();
    place.delete(&place.desired()).await.unwrap();
    assert_eq!(place.names(), ["precious"]);
    assert!(place.dir.path().join("pool/images").join(image().to_string()).join("disk").exists());

    // Without the pool nobody can say what is in it.
    fs::rename(place.dir.path().join("pool"), place.dir.path().join("away")).unwrap();
    let error = place.delete(&place.desired()).await.unwrap_err();
    assert!(error.starts_with("pool p cannot be used"), "{error}");
}

#[tokio::test]
async fn what_stands_in_a_disks_place_is_not_touched() {
    let place = Place::new();
    fs::create_dir_all(place.disks()).unwrap();
    let secret = place.dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    symlink(&secret, place.disks().join("root.0.qcow2")).unwrap();
    let error = place.prepare(&place.desired()).await.unwrap_err();
    assert!(error.contains("not a regular file"), "{error}");
    place.delete(&place.desired()).await.unwrap();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret", "the link went, not what it leads to");
}

#[tokio::test]
async fn a_tool_that_fails_leaves_nothing_and_its_words_are_passed_on() {
    let tools = tempfile::tempdir().unwrap();
    fs::set_permissions(tools.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let tool = |name: &str, words: &str| {
        let path = tools.path().join(name);
        // Writes a part of its file first, whatever its name is: the argument after `--`.
        let script = format!(
            "#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done\necho part > \"$2\"\necho '{words}' >&2\nexit 1\n"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let place = Place::with(tool("full", "qemu-img: x: No space left on device"));
    assert_eq!(place.prepare(&place.desired()).await.unwrap_err(), "pool p is full: disk root could not be written");
    assert_eq!(place.names(), [""; 0]);
    let place = Place::with(tool("broken", "qemu-img: it is Monday"));
    let error = place.prepare(&place.desired()).await.unwrap_err();
    assert_eq!(error, "qemu-img: disk root: qemu-img: it is Monday");
    assert_eq!(place.names(), [""; 0]);
}

fn io(path: &Path, command: &str) {
    let done = Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && !text.contains("failed"), "{command}: {text}");
}

fn snapshots_of(path: &Path) -> Vec<String> {
    let list = info(path)["snapshots"].as_array().cloned().unwrap_or_default();
    list.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

/// P5: an old size is never enforced.
#[tokio::test]
async fn a_disk_grows_before_it_is_used_and_never_shrinks() {
    let place = Place::new();
    place.prepare(&place.desired()).await.unwrap();
    let data = place.disks().join("data.0.qcow2");
    let mut desired = place.desired();
    desired.disks = DisksExpected::Exist;
    for (wanted, found) in [(2 << 20, 2 << 20), (1 << 20, 2 << 20)] {
        desired.spec.as_mut().unwrap().disks[1].size_bytes = wanted;
        place.prepare(&desired).await.unwrap();
        assert_eq!(info(&data)["virtual-size"], found);
    }
    // What another host has open is as large as that host made it.
    desired.spec.as_mut().unwrap().disks[1].size_bytes = 4 << 20;
    desired.disposition = Disposition::Incoming;
    place.prepare(&desired).await.unwrap();
    assert_eq!(info(&data)["virtual-size"], 2 << 20);
}

#[tokio::test]
async fn snapshots_are_taken_put_back_and_removed_on_all_disks() {
    let place = Place::new();
    let mut desired = place.desired();
    place.prepare(&desired).await.unwrap();
    let files = ["root.0.qcow2", "data.0.qcow2"].map(|f| place.disks().join(f));
    let id = Uuid::from_u128(77);
    let order = |wanted| Orders { snapshots: vec![SnapshotOrder { id, wanted }], ..Orders::default() };
    let tend = async |desired: &Desired| place.storage.tend(vm(), desired).await.map_err(|e| e.reason());
    io(&files[1], "write -P 1 0 512");
    // Half of one, of an agent that died: it is taken anew.
    let half = Command::new("qemu-img").args(["snapshot", "-c", &id.to_string()]).arg(&files[1]).status().unwrap();
    assert!(half.success());
    io(&files[1], "write -P 2 0 512");
    desired.orders = order(Wanted::There);
    // Who finds one does not know what the guest did then.
    for guests in [[(id, GuestThen::Off)].into(), BTreeMap::new()] {
        assert_eq!(tend(&desired).await, Ok(Done { guests, ..desired.orders.done() }));
        assert!(files.iter().all(|f| snapshots_of(f) == [id.to_string()]), "once, on each");
    }
    io(&files[1], "write -P 3 0 512");
    let revert = |snapshot| Orders { revert: Some(Revert { snapshot, number: 1 }), ..Orders::default() };
    desired.orders = revert(Uuid::from_u128(78));
    assert!(tend(&desired).await.unwrap_err().contains("no disk was changed"));
    desired.orders = revert(id);
    tend(&desired).await.unwrap();
    io(&files[1], "read -P 2 0 512");
    desired.orders = order(Wanted::Gone);
    for _ in 0..2 {
        tend(&desired).await.unwrap();
        assert!(files.iter().all(|f| snapshots_of(f).is_empty()));
    }
    fs::remove_file(&files[0]).unwrap();
    assert!(tend(&desired).await.unwrap_err().contains("missing"));
}
