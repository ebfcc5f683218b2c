//! Disks that are copied, with the real qemu-img.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    process::{Child, Stdio},
    time::Duration,
};

use super::*;
use crate::vm::disks::CloneFrom;

const SNAPSHOT: Uuid = Uuid::from_u128(77);

fn copy() -> VmId {
    VmId::from_uuid(Uuid::from_u128(5))
}

fn snapshot(path: &Path) {
    let taken = Command::new("qemu-img").args(["snapshot", "-c", &SNAPSHOT.to_string()]).arg(path).status().unwrap();
    assert!(taken.success());
}

impl Place {
    /// A clone of the VM of the other tests.
    fn clone_of(&self, snapshot: Option<Uuid>) -> Desired {
        Desired {
            clone_from: Some(CloneFrom { vm: vm(), disk_generation: 0, kept_generations: BTreeMap::new(), snapshot }),
            ..self.desired()
        }
    }

    async fn copy(&self, desired: &Desired) -> Result<(), String> {
        self.storage.prepare(copy(), desired).await.map(|_| ()).map_err(|e| e.reason())
    }

    fn file(&self, vm: VmId, disk: &str) -> PathBuf {
        self.dir.path().join("pool/disks").join(vm.to_string()).join(format!("{disk}.0.qcow2"))
    }

    fn names_of(&self, vm: VmId) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("pool/disks").join(vm.to_string())) else { return vec![] };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// A qemu-io that has a disk open, as QEMU has.
struct Open {
    process: Child,
}

impl Open {
    fn new(path: &Path) -> Self {
        // It writes its lines when they are complete, as to a terminal.
        let mut command = Command::new("stdbuf");
        command
            .args(["-oL", "qemu-io", "-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        Self { process: command.spawn().unwrap() }
    }

    /// Runs a command that reads or writes, and returns when it is done.
    fn run(&mut self, command: &str) {
        let input = self.process.stdin.as_mut().unwrap();
        writeln!(input, "{command}").unwrap();
        let mut output = BufReader::new(self.process.stdout.as_mut().unwrap());
        let mut line = String::new();
        while !line.contains(" ops; ") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "qemu-io has ended");
            assert!(!line.contains("failed"), "{line}");
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// CL1: the disk is written without a break while its snapshot is copied.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_copied_while_the_disk_is_in_use() {
    let place = Place::new();
    let mut source = place.desired();
    source.spec.as_mut().unwrap().disks[1].size_bytes = 256 << 20;
    place.prepare(&source).await.unwrap();
    let (root, data) = (place.file(vm(), "root"), place.file(vm(), "data"));
    io(&root, "write -P 3 512 512");
    io(&data, "write -P 1 0 64M");
    snapshot(&root);
    snapshot(&data);

    let mut clone = place.clone_of(Some(SNAPSHOT));
    clone.spec.as_mut().unwrap().disks[1].size_bytes = 256 << 20;
    let mut open = Open::new(&data);
    open.run("write -P 2 0 1M");
    let writer = std::thread::spawn(move || {
        // All of it, cluster by cluster and out of order, each flushed: the tables are rewritten, too.
        for i in 0..1024 {
            open.run(&format!("write -f -P 2 {}k 64k", (i * 37 % 1024) * 64));
        }
        open
    });
    place.copy(&clone).await.unwrap();
    let open = writer.join().unwrap();
    assert_eq!(place.names_of(copy()), ["data.0.qcow2", "root.0.qcow2"]);
    let (root2, data2) = (place.file(copy(), "root"), place.file(copy(), "data"));
    io(&data2, "read -P 1 0 64M");
    io(&data2, "read -P 0 64M 192M");
    io(&root2, "read -P 3 512 512");
    io(&root2, "read -P 7 1024 512");
    assert_eq!(info(&root2)["backing-filename"], format!("../../images/{}/disk", image()), "of the same image");
    assert!(info(&data2)["backing-filename"].is_null());
    for file in [&root2, &data2] {
        assert!(snapshots_of(file).is_empty());
        if let Some(user) = place.user {
            assert_eq!(fs::metadata(file).unwrap().uid(), user.uid);
        }
    }
    drop(open);
    io(&data, "read -P 2 0 64M");

    // They are independent, and what is there is used.
    io(&data2, "write -P 9 0 512");
    place.copy(&clone).await.unwrap();
    place.delete(&source).await.unwrap();
    io(&data2, "read -P 9 0 512");
    io(&data2, "read -P 1 512 512");
    place.storage.delete(copy(), &clone).await.unwrap();
    assert!(place.names_of(copy()).is_empty());
}

/// CL1
#[tokio::test]
async fn a_disk_that_is_in_use_is_not_copied_as_it_is() {
    let place = Place::new();
    place.prepare(&place.desired()).await.unwrap();
    let data = place.file(vm(), "data");
    io(&data, "write -P 4 0 64k");
    let mut open = Open::new(&data);
    open.run("read 0 512");
    let error = place.copy(&place.clone_of(None)).await.unwrap_err();
    assert!(error.contains("lock"), "{error}");
    assert_eq!(place.names_of(copy()), ["root.0.qcow2"], "nothing half-made");
    drop(open);
    // What an agent that died has left is in nobody's way. The spec's size counts.
    fs::write(place.file(copy(), "data").with_file_name(".data.0.qcow2.tmp"), "half").unwrap();
    let mut clone = place.clone_of(None);
    clone.spec.as_mut().unwrap().disks[1].size_bytes = 2 << 20;
    place.copy(&clone).await.unwrap();
    let copied = place.file(copy(), "data");
    assert_eq!(info(&copied)["virtual-size"], 2 << 20);
    io(&copied, "read -P 4 0 64k");
    io(&copied, "read -P 0 64k 1984k");
    assert_eq!(place.names_of(copy()), ["data.0.qcow2", "root.0.qcow2"]);
    // P5: made before, and not there any more.
    fs::remove_file(&copied).unwrap();
    let made = Desired { disks: DisksExpected::Exist, ..place.clone_of(None) };
    assert_eq!(place.copy(&made).await.unwrap_err(), "disk data is missing in pool p");
}

#[tokio::test]
async fn what_is_to_be_copied_must_be_there() {
    let place = Place::new();
    let error = place.copy(&place.clone_of(None)).await.unwrap_err();
    assert!(error.contains(&format!("disk root of VM {}", vm())) && error.contains("delete the clone"), "{error}");
    place.prepare(&place.desired()).await.unwrap();
    let error = place.copy(&place.clone_of(Some(SNAPSHOT))).await.unwrap_err();
    assert!(error.contains("qemu-img: disk root") && error.contains("snapshot"), "{error}");
    assert!(place.names_of(copy()).is_empty(), "nothing half-made, and no empty disk");
}

/// A qemu-img that never ends stands for a large disk.
#[tokio::test]
async fn a_copy_that_is_not_wanted_any_more_ends_and_goes_with_its_vm() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let slow = dir.path().join("slow");
    let script = "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nif [ \"$1\" = convert ]; then\nprintf '    (42.17/100%%)\\r'\nexec sleep 1000\nfi\nexec qemu-img \"$@\"\n";
    fs::write(&slow, script).unwrap();
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).unwrap();
    let place = Place::with(slow);
    place.prepare(&place.desired()).await.unwrap();
    let clone = place.clone_of(None);
    {
        let preparing = place.copy(&clone);
        tokio::pin!(preparing);
        let mut said = String::new();
        while !said.contains("40 %") {
            tokio::select! {
                done = &mut preparing => panic!("{done:?}"),
                words = place.storage.progress(copy(), &said) => said = words,
                () = tokio::time::sleep(Duration::from_secs(60)) => panic!("{said}"),
            }
        }
        assert_eq!(said, "copying disk root: 40 %");
        assert_eq!(place.names_of(copy()), [".root.0.qcow2.tmp"]);
    }
    place.storage.delete(copy(), &clone).await.unwrap();
    assert!(place.names_of(copy()).is_empty());
}
