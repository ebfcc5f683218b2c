//! Bringing files into a pool, from paths; the web is in the integration tests.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::*;
use crate::storage::{
    bring::{BUFFER, temporary},
    claim::Claim,
    http::Sink,
    pools::Kind,
};

struct Place {
    dir: tempfile::TempDir,
    images: Images,
}

fn image() -> ImageId {
    ImageId::from_uuid(Uuid::from_u128(9))
}

impl Place {
    fn new(content: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("pool")).unwrap();
        fs::write(dir.path().join("source"), content).unwrap();
        let images = Images::new(Self::env(dir.path(), 1));
        Self { dir, images }
    }

    fn env(dir: &Path, host: u128) -> Env {
        let pool = Pool { name: "p".into(), path: dir.join("pool"), kind: Kind::Local };
        let root = rustix::process::geteuid().is_root();
        Env {
            roots: Arc::new(Roots::new(&[dir.to_owned()], &[])),
            pools: [("p".to_owned(), pool)].into(),
            user: root.then_some(User { uid: 65534, gid: 65534 }),
            qemu_img: "qemu-img".into(),
            host: HostId::from_uuid(Uuid::from_u128(host)),
            http: Err("no network here".into()),
            most: 1 << 30,
        }
    }

    fn request(&self, content: &[u8]) -> Fetch {
        Fetch {
            pool: "p".into(),
            image_id: image(),
            image: "debian".into(),
            role: Role::Disk,
            source: self.dir.path().join("source").to_str().unwrap().into(),
            sha256: hex(&Sha256::digest(content)),
            size_bytes: content.len() as u64,
            format: Some(Format::Raw),
            target: self.dir.path().join("pool/images").join(image().to_string()).join("disk"),
        }
    }

    async fn fetch(&self, fetch: Fetch) -> Result<Facts, String> {
        self.images.fetch(fetch, |_| {}).await.map_err(|e| e.message)
    }

    /// What is in the pool's directory of images.
    fn files(&self) -> Vec<String> {
        let Ok(dirs) = fs::read_dir(self.dir.path().join("pool/images")) else { return vec![] };
        let inside = dirs.flat_map(|d| {
            let dir = d.unwrap().path();
            let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
            // An empty directory counts as well.
            if files.is_empty() { vec![dir.into_os_string()] } else { files }
        });
        inside.map(|f| f.into_string().unwrap()).collect()
    }
}

#[tokio::test]
async fn an_image_is_copied_once_and_stays_when_its_source_goes() {
    let mut content = vec![0; 3 * BUFFER + 5];
    content[BUFFER + 1] = 7;
    let place = Place::new(&content);
    let request = place.request(&content);
    let (a, b) = tokio::join!(place.fetch(request.clone()), place.fetch(request.clone()));
    assert_eq!((a.unwrap().size_bytes, b.unwrap().virtual_size), (content.len() as u64, 786_944));
    assert_eq!(place.files(), ["disk"]);
    assert_eq!(fs::read(&request.target).unwrap(), content);
    assert_eq!(fs::metadata(&request.target).unwrap().permissions().mode() & 0o777, 0o644);
    fs::remove_file(place.dir.path().join("source")).unwrap();
    assert!(place.fetch(request).await.is_ok());
    assert!(place.images.lock().running.is_empty());
}

#[tokio::test]
async fn what_is_not_the_image_is_refused_and_leaves_nothing() {
    let place = Place::new(b"evil");
    let error = place.fetch(place.request(b"good")).await.unwrap_err();
    assert!(error.starts_with("image debian: ") && error.contains("sha256"), "{error}");
    assert_eq!(place.files(), [""; 0]);
    let error = place.fetch(place.request(b"longer")).await.unwrap_err();
    assert!(error.contains("has 4 bytes, not 6"), "{error}");
    let qcow2 = Fetch { format: Some(Format::Qcow2), ..place.request(b"evil") };
    assert!(place.fetch(qcow2).await.unwrap_err().contains("qcow2"));
    let absent = Fetch { source: format!("{}/none", place.dir.path().display()), ..place.request(b"evil") };
    assert!(place.fetch(absent).await.unwrap_err().contains("this host has no file"));
    assert_eq!(place.files(), [""; 0]);
}

#[tokio::test]
async fn what_is_not_known_is_found_out() {
    let place = Place::new(&[7; 1000]);
    let unknown = Fetch { sha256: String::new(), size_bytes: 0, format: None, ..place.request(&[]) };
    let expected = Facts {
        sha256: hex(&Sha256::digest([7; 1000])),
        size_bytes: 1000,
        format: Some(Format::Raw),
        virtual_size: 1024,
    };
    assert_eq!(place.fetch(unknown.clone()).await, Ok(expected.clone()));
    // Also when it is there, as after a change of the leader.
    assert_eq!(place.fetch(unknown).await, Ok(expected));
}

#[tokio::test]
async fn of_two_hosts_that_share_a_pool_one_brings_the_file() {
    let content = vec![7; 3 * BUFFER];
    let place = Place::new(&content);
    let other = Images::new(Place::env(place.dir.path(), 2));
    let request = place.request(&content);
    // The other host has the claim, and has left half a file.
    let dir = request.target.parent().unwrap();
    make_dirs(dir).unwrap();
    let claim = Claim::take(dir, "disk").unwrap().unwrap();
    fs::write(temporary(&request.target, other.env.host), "half").unwrap();
    let waiting = place.fetch(request.clone());
    let dies = async {
        // Long enough to have gone wrong, if it did not wait; that it goes on afterwards depends on no time.
        time::sleep(Duration::from_millis(50)).await;
        assert!(!request.target.exists(), "it waits");
        drop(claim);
    };
    let (fetched, ()) = tokio::join!(waiting, dies);
    assert!(fetched.is_ok());
    assert_eq!(place.files(), ["disk"], "what the dead host has left is gone");
    fs::remove_file(place.dir.path().join("source")).unwrap();
    assert!(other.fetch(request, |_| {}).await.is_ok(), "it is there for both");
}

#[tokio::test]
async fn corrupt_and_huge_images_are_refused_and_leave_nothing() {
    let place = Place::new(b"");
    let source = place.dir.path().join("source");
    let make = |size: &str| {
        let mut tool = std::process::Command::new("qemu-img");
        assert!(tool.args(["create", "-q", "-f", "qcow2"]).arg(&source).arg(size).status().unwrap().success());
        fs::read(&source).unwrap()
    };
    let any = |content: &[u8]| Fetch { format: None, sha256: String::new(), ..place.request(content) };
    let good = make("64M");
    assert_eq!(place.fetch(any(&good)).await.unwrap().format, Some(Format::Qcow2));
    fs::remove_dir_all(place.dir.path().join("pool/images")).unwrap();

    let bomb = make("2T");
    let error = place.fetch(any(&bomb)).await.unwrap_err();
    assert!(error.contains("2199023255552 bytes; at most 1073741824"), "{error}");
    // A refcount table that leads nowhere.
    let mut corrupt = good.clone();
    corrupt[48..56].copy_from_slice(&0xffff_ffff_0000_u64.to_be_bytes());
    fs::write(&source, &corrupt).unwrap();
    let error = place.fetch(any(&corrupt)).await.unwrap_err();
    assert!(error.contains("corrupt qcow2"), "{error}");
    assert_eq!(place.files(), [""; 0]);
}

#[tokio::test]
async fn a_removal_stops_what_is_on_its_way() {
    let place = Place::new(b"");
    let request = Fetch { sha256: String::new(), size_bytes: 0, format: None, ..place.request(b"") };
    let (started, begun) = tokio::sync::oneshot::channel();
    let endless = async move |mut feed: Feed| {
        feed.take(Bytes::from_static(b"some")).await?;
        let _ = started.send(());
        std::future::pending().await
    };
    let receiving = place.images.receive(request, endless);
    let removing = async {
        begun.await.unwrap();
        place.images.remove(image()).await
    };
    let (received, removed) = tokio::join!(receiving, removing);
    assert_eq!(received.unwrap_err().kind, FileProblemKind::Io, "it says nothing about the image");
    removed.unwrap();
    // What was asked for before the removal, and comes late.
    let error = place.fetch(place.request(b"")).await.unwrap_err();
    assert!(error.contains("image debian has been removed"), "{error}");
    assert_eq!(place.files(), [""; 0]);
}

#[tokio::test]
async fn an_upload_that_ends_early_leaves_nothing() {
    let place = Place::new(b"");
    let request = Fetch { format: None, ..place.request(&[7; 1000]) };
    let part = async |mut feed: Feed| feed.take(Bytes::from_static(&[7; 999])).await;
    let error = place.images.receive(request.clone(), part).await.unwrap_err();
    assert!(error.message.contains("has 999 bytes, not 1000"), "{error}");
    assert_eq!(place.files(), [""; 0]);
    let whole = async |mut feed: Feed| feed.take(Bytes::from_static(&[7; 1000])).await;
    assert!(place.images.receive(request, whole).await.is_ok());
    assert_eq!(place.files(), ["disk"]);
}

#[tokio::test]
async fn what_is_larger_than_allowed_is_refused_before_it_is_written() {
    let place = Place::new(&[7; 1000]);
    let images = Images::new(Env { most: 999, ..Place::env(place.dir.path(), 1) });
    for role in [Role::Disk, Role::Kernel, Role::Initrd] {
        let known = Fetch { role, ..place.request(&[7; 1000]) };
        let unknown = Fetch { size_bytes: 0, ..known.clone() };
        for fetch in [known.clone(), unknown.clone()] {
            let error = images.fetch(fetch, |_| {}).await.unwrap_err();
            assert_eq!(error.kind, FileProblemKind::Invalid);
            assert!(error.message.contains("1000 bytes; at most 999 are allowed (--max-image-gib)"), "{error}");
        }
        let never = async |_: Feed| -> Result<(), source::Error> { panic!("nothing is taken") };
        let error = images.receive(known, never).await.unwrap_err();
        assert!(error.message.contains("at most 999"), "{error}");
        // Whose size was not said.
        let some = async |mut feed: Feed| feed.take(Bytes::from_static(&[7; 1000])).await;
        let error = images.receive(unknown, some).await.unwrap_err();
        assert!(error.message.contains("at most 999"), "{error}");
    }
    assert_eq!(place.files(), [""; 0]);
}

#[tokio::test]
async fn what_nobody_wants_any_more_is_given_up() {
    let place = Place::new(b"some");
    let images = Images { unwanted_for: Duration::from_millis(20), ..place.images.clone() };
    let request = place.request(b"some");
    // Another host has the claim, so it does not end by itself.
    let dir = request.target.parent().unwrap();
    make_dirs(dir).unwrap();
    let claim = Claim::take(dir, "disk").unwrap().unwrap();
    let begun = time::timeout(Duration::from_millis(50), images.fetch(request.clone(), |_| {})).await;
    assert!(begun.is_err(), "it waits");
    let gone = async {
        while !images.lock().running.is_empty() {
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(Duration::from_secs(10), gone).await.expect("it is given up");
    drop(claim);
    assert!(images.fetch(request, |_| {}).await.is_ok(), "who comes later has it");
}

#[tokio::test]
async fn who_waits_for_another_host_keeps_nobody_from_his_turn() {
    let place = Place::new(b"some");
    let request = place.request(b"some");
    let of = |i: u128| {
        let image_id = ImageId::from_uuid(Uuid::from_u128(i));
        let target = place.dir.path().join("pool/images").join(image_id.to_string()).join("disk");
        Fetch { image_id, target, ..request.clone() }
    };
    let waiting: Vec<_> = (100..100 + COPIES_AT_ONCE as u128).map(of).collect();
    let mut claims = Vec::new();
    for fetch in &waiting {
        let dir = fetch.target.parent().unwrap();
        make_dirs(dir).unwrap();
        claims.push(Claim::take(dir, "disk").unwrap().unwrap());
        let (images, fetch) = (place.images.clone(), fetch.clone());
        tokio::spawn(async move { images.fetch(fetch, |_| {}).await });
    }
    while place.images.lock().running.len() < waiting.len() {
        tokio::task::yield_now().await;
    }
    let other = time::timeout(Duration::from_secs(10), place.fetch(of(1))).await;
    assert!(other.expect("it does not wait for them").is_ok());
}
