//! Images from web servers, good and bad.

use std::{collections::BTreeSet, fs, process::Command};

use harness::{
    error_fields, listing,
    prelude::*,
    site::{Page, Site},
};
use tokio_stream::StreamExt as _;
use uncloud_proto::v1::ImageState;

/// The boot-sector guest.
fn micro() -> anyhow::Result<Vec<u8>> {
    Ok(fs::read(harness::paths::guest("micro.img")?)?)
}

/// Random-looking bytes that are no known format.
fn content(length: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 56) as u8
    };
    std::iter::repeat_with(&mut next).take(length).collect()
}

fn request(name: &str, source: &str) -> v1::CreateImageRequest {
    let file = v1::ImageFile { role: v1::ImageFileRole::Disk.into(), source: source.into(), ..Default::default() };
    v1::CreateImageRequest {
        name: name.into(),
        kind: v1::ImageKind::Disk.into(),
        files: vec![file],
        ..Default::default()
    }
}

async fn add(cluster: &Cluster, request: v1::CreateImageRequest) -> Result<v1::Image, tonic::Status> {
    Ok(cluster.api.images().create_image(request).await?.into_inner().image.unwrap_or_default())
}

/// Watches an image until nothing more happens to it. All that was seen; the last is how it ended.
async fn watch(cluster: &Cluster, image: &str) -> anyhow::Result<Vec<v1::WatchImageResponse>> {
    let request = v1::WatchImageRequest { image: image.into() };
    // Not the client of the harness, which gives up after some seconds.
    let channel = tonic::transport::Endpoint::new(format!("http://{}", cluster.api.endpoint()))?.connect().await?;
    let mut client = v1::image_service_client::ImageServiceClient::new(channel);
    let stream = client.watch_image(request).await?.into_inner();
    let all =
        tokio::time::timeout(secs(90), stream.collect::<Vec<_>>()).await.context("the image is on its way for ever")?;
    Ok(all.into_iter().collect::<Result<Vec<_>, _>>()?)
}

async fn settled(cluster: &Cluster, image: &str) -> anyhow::Result<v1::Image> {
    let last = watch(cluster, image).await?.pop().and_then(|m| m.image);
    last.context("the watch said nothing")
}

async fn ready(cluster: &Cluster, name: &str, source: &str) -> anyhow::Result<v1::Image> {
    let image = add(cluster, request(name, source)).await?;
    let image = settled(cluster, &image.id).await?;
    ensure!(image.state() == ImageState::Ready, "{:?}: {}", image.state(), image.reason);
    Ok(image)
}

/// Deletes an image and waits until its record, and so every copy, is gone.
async fn delete(cluster: &Cluster, id: &str) -> anyhow::Result<()> {
    cluster.api.images().delete_image(v1::DeleteImageRequest { image: id.into() }).await?;
    wait_for("the image is gone", secs(30), async || {
        let images = cluster.api.images().list_images(v1::ListImagesRequest {}).await.map_err(|s| s.to_string())?;
        match images.into_inner().images.into_iter().find(|i| i.id == id) {
            None => Ok(()),
            Some(image) => Err(format!("{:?} {}", image.state(), image.reason)),
        }
    })
    .await
}

fn from_image(name: &str, image: &str, pool: &str) -> v1::CreateVmRequest {
    specs::with(specs::micro(name), |s| {
        s.disks = vec![v1::Disk { image: image.into(), pool: pool.into(), ..Default::default() }];
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_from_the_web_is_fetched_once_for_each_pool() -> anyhow::Result<()> {
    let cluster = Options::hosts(3).start().await?;
    let site = Site::start().await?;
    let url = site.put("/micro.img", Page::File(micro()?));
    let before = listing::of(&cluster)?;
    let image = ready(&cluster, "web", &url).await?;
    let file = &image.files[0];
    assert_eq!((file.size_bytes, file.format()), (micro()?.len() as u64, v1::ImageFormat::Raw));
    assert_eq!(file.sha256.len(), 64);
    assert_eq!(site.hits("/micro.img").len(), 2, "one looks at its beginning, one fetches it");

    // Three hosts at once that share the pool need nothing more.
    let mut vms = Vec::new();
    for n in 1..=3 {
        let request = specs::with(from_image(&format!("shared-{n}"), "web", specs::SHARED), |s| {
            s.anti_affinity_group = "each-on-its-own".into();
        });
        vms.push(cluster.run(request).await?);
    }
    let hosts: BTreeSet<&str> = vms.iter().map(harness::api::host_of).collect();
    assert_eq!((hosts.len(), site.hits("/micro.img").len()), (3, 2));

    // Pools of their own fetch it once each; two VMs at once on one host share that.
    let names = ["local-1", "local-2"];
    let local = names.map(|n| from_image(n, "web", specs::LOCAL));
    let local = local.map(|r| specs::with(r, |s| s.host_labels = Default::default()));
    for request in local {
        vms.push(cluster.run(request).await?);
    }
    let own: BTreeSet<&str> = vms[3..].iter().map(harness::api::host_of).collect();
    assert_eq!(site.hits("/micro.img").len(), 2 + own.len());

    // It cannot go while a VM uses it; then it goes from every pool.
    let refused = cluster.api.images().delete_image(v1::DeleteImageRequest { image: "web".into() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    for vm in &vms {
        cluster.api.delete(&vm.id).await?;
    }
    for vm in &vms {
        cluster.api.wait_gone(&vm.id, secs(30)).await?;
    }
    delete(&cluster, &image.id).await?;
    let left: Vec<_> =
        listing::of(&cluster)?.into_iter().filter(|l| !before.contains(l) && !l.ends_with("s/")).collect();
    assert_eq!(left, [""; 0]);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_where_it_broke_off() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let site = Site::start().await?;
    let whole = content(3_000_000);
    let url = site.put("/parts", Page::Breaks { content: whole.clone(), after: 1_000_000, times: 2 });
    let image = ready(&cluster, "parts", &url).await?;
    let hits = site.hits("/parts");
    let ranges: Vec<_> = hits.iter().map(|h| h.range.as_deref()).collect();
    assert_eq!(ranges, [None, None, Some("bytes=1000000-"), Some("bytes=2000000-")]);
    ensure!(hits[2].if_range.is_some(), "the server is not asked whether it is the same file still");
    let copy = cluster.pool().join("images").join(&image.id).join("disk");
    ensure!(fs::read(&copy)? == whole, "the copy is another file");

    // A server that knows nothing of parts begins anew.
    let url = site.put("/whole", Page::BreaksWithoutParts { content: whole.clone(), after: 1_000_000, times: 2 });
    let image = ready(&cluster, "whole", &url).await?;
    assert!(site.hits("/whole").iter().all(|h| h.range.is_none()));
    ensure!(fs::read(cluster.pool().join("images").join(&image.id).join("disk"))? == whole, "the copy is another file");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn how_far_it_is_can_be_seen_and_no_vm_comes_before_it_is_there() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let site = Site::start().await?;
    let slow = Page::Slow { content: content(400_000), piece: 10_000, pause: Duration::from_millis(100) };
    let url = site.put("/slow", slow);
    let begin = Instant::now();
    let image = add(&cluster, request("slow", &url)).await?;
    ensure!(begin.elapsed() < secs(2), "the answer came only after {:?}", begin.elapsed());
    assert_eq!((image.state(), image.files[0].size_bytes), (ImageState::Fetching, 400_000));
    let early = cluster.api.create(from_image("early", "slow", specs::SHARED)).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition, "{early}");
    ensure!(early.message().contains("still on their way"), "{early}");
    let shown = cluster.cli(&["image", "show", "slow"]).await?.success()?;
    ensure!(shown.stdout.contains("fetching"), "{}", shown.stdout);

    let seen = watch(&cluster, &image.id).await?;
    let steps: BTreeSet<u64> = seen.iter().filter_map(|m| m.progress.as_ref()).map(|p| p.done_bytes).collect();
    ensure!(steps.iter().any(|s| (1..400_000).contains(s)), "no progress was shown: {steps:?}");
    let last = seen.last().and_then(|m| m.image.clone()).unwrap_or_default();
    assert_eq!(last.state(), ImageState::Ready);

    // A VM whose pool does not have it says how far it is.
    let slow = Page::Slow { content: content(2 << 20), piece: 1 << 16, pause: Duration::from_millis(150) };
    let url = site.put("/slower", slow);
    ready(&cluster, "slower", &url).await?;
    let vm = cluster.api.create(from_image("waits", "slower", specs::LOCAL)).await?;
    let told =
        |vm: &v1::Vm| vm.status.as_ref().is_some_and(|s| s.reason.contains("fetching image slower: 50 % of 2 MiB"));
    cluster.api.wait_vm(&vm.id, "says how far its image is", secs(20), told).await?;

    // The command does the same with --wait, and says how it goes.
    let added = cluster.cli(&["image", "add", "again", &url, "--wait"]).await?.success()?;
    ensure!(added.stdout.contains("ready") && added.stderr.contains("%"), "{added:?}");
    cluster.finish().await
}

/// What is tried, what the server does, and what must be in the answer.
struct Case {
    name: &'static str,
    page: Page,
    words: &'static [&'static str],
    /// Whether the answer to CreateImage itself refuses it.
    at_once: bool,
}

fn qcow2(cluster: &Cluster, name: &str, args: &[&str]) -> anyhow::Result<Vec<u8>> {
    let path = cluster.images().join(name);
    let output = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).args(args).arg(&path).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(&path)?;
    fs::remove_file(path)?;
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_servers_and_bad_images_are_refused_and_nothing_is_left() -> anyhow::Result<()> {
    let args = ["--image-timeout", "1", "--max-image-gib", "1"].map(str::to_owned).to_vec();
    let cluster = Options::hosts(1).each_host(|_, h| h.args = args.clone()).start().await?;
    let site = Site::start().await?;
    fs::write(cluster.images().join("base"), [7; 512])?;
    let base = cluster.images().join("base").display().to_string();
    let good = {
        // With data in it, so that there is something to be corrupt.
        let raw = cluster.images().join("raw");
        fs::write(&raw, content(1 << 20))?;
        let out = cluster.images().join("good.qcow2");
        let status = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(&raw).arg(&out).status()?;
        ensure!(status.success(), "qemu-img convert");
        fs::read(out)?
    };
    let mut corrupt = good.clone();
    // The L1 table's first entry leads far beyond the end.
    let l1 = usize::try_from(u64::from_be_bytes(corrupt[40..48].try_into()?))?;
    corrupt[l1..l1 + 8].copy_from_slice(&0x8000_00ff_ffff_0000_u64.to_be_bytes());
    let data_file = {
        let mut bytes = good.clone();
        bytes[79] |= 4;
        bytes
    };
    let cases = [
        Case {
            name: "stops half-way, again and again",
            page: Page::Breaks { content: content(300_000), after: 0, times: 99 },
            words: &["after 5 attempts"],
            at_once: false,
        },
        Case {
            name: "falls silent",
            page: Page::Stalls { content: content(300_000), after: 0 },
            words: &["nothing came for 1s"],
            at_once: false,
        },
        Case {
            name: "sends more than it said",
            page: Page::GrowsWithoutEnd { content: content(100_000) },
            words: &["sends more than 100000 bytes", "cut off"],
            at_once: false,
        },
        Case { name: "has no such file", page: Page::Status(404), words: &["404"], at_once: true },
        Case { name: "is broken", page: Page::Status(503), words: &["503"], at_once: true },
        Case {
            name: "leads away",
            page: Page::Redirect("file:///etc/passwd".into()),
            words: &["may not be fetched", "302"],
            at_once: true,
        },
        Case { name: "is empty", page: Page::File(Vec::new()), words: &["empty"], at_once: true },
        Case { name: "is corrupt", page: Page::File(corrupt), words: &["corrupt qcow2"], at_once: false },
        Case {
            name: "is a bomb",
            page: Page::File(qcow2(&cluster, "bomb", &["-o", "size=32T"])?),
            words: &["35184372088832 bytes", "--max-image-gib"],
            at_once: true,
        },
        Case {
            name: "has a backing file",
            page: Page::File(qcow2(&cluster, "overlay", &["-F", "raw", "-b", &base])?),
            words: &["backing file"],
            at_once: true,
        },
        Case { name: "has a data file", page: Page::File(data_file), words: &["data file"], at_once: true },
    ];
    let before = listing::of(&cluster)?;
    for (n, case) in cases.into_iter().enumerate() {
        let url = site.put(&format!("/{n}"), case.page);
        let said = match add(&cluster, request(&format!("bad-{n}"), &url)).await {
            Err(status) => {
                ensure!(case.at_once, "{}: refused at once: {status}", case.name);
                ensure!(error_fields(&status) == ["files[0].source"], "{}: {status:?}", case.name);
                status.message().to_owned()
            }
            Ok(image) => {
                ensure!(!case.at_once, "{}: it was not refused at once", case.name);
                let image = settled(&cluster, &image.id).await?;
                ensure!(image.state() == ImageState::Failed, "{}: {:?}", case.name, image.state());
                let refused = cluster.api.create(from_image("bad", &image.name, specs::SHARED)).await.unwrap_err();
                ensure!(refused.message().contains(&image.reason), "{}: {refused}", case.name);
                delete(&cluster, &image.id).await?;
                image.reason
            }
        };
        eprintln!("{}: {said}", case.name);
        ensure!(case.words.iter().all(|w| said.contains(w)), "{}: {said}", case.name);
        assert_eq!(without_images_dir(listing::of(&cluster)?), without_images_dir(before.clone()), "{}", case.name);
    }

    // What the user says is right.
    let url = site.put("/good", Page::File(good));
    let mut wrong = request("wrong", &url);
    wrong.files[0].sha256 = "0".repeat(64);
    let image = add(&cluster, wrong).await?;
    let image = settled(&cluster, &image.id).await?;
    ensure!(image.state() == ImageState::Failed && image.reason.contains("has the sha256"), "{}", image.reason);
    // Failed is final; its name is free when it is deleted.
    delete(&cluster, &image.id).await?;
    ready(&cluster, "wrong", &url).await?;
    for bad in ["pool:default/../../etc/passwd", "/etc/../etc/passwd", "https://user:pw@example.org/x", "ftp://x/y"] {
        let status = add(&cluster, request("climbs", bad)).await.unwrap_err();
        assert_eq!((status.code(), error_fields(&status)), (Code::InvalidArgument, vec!["files[0].source".into()]));
    }
    cluster.finish().await
}

/// The directory of images is made with the first and stays.
fn without_images_dir(listing: Vec<String>) -> Vec<String> {
    listing.into_iter().filter(|l| !l.ends_with("/images/")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_between_two_pools_is_noticed() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let site = Site::start().await?;
    let first = micro()?;
    let url = site.put("/changes", Page::File(first.clone()));
    ready(&cluster, "changes", &url).await?;
    cluster.run(from_image("before", "changes", specs::SHARED)).await?;
    let mut second = first.clone();
    *second.last_mut().context("it is empty")? ^= 1;
    site.put("/changes", Page::File(second));
    let before = listing::of(&cluster)?;
    let vm = cluster.api.create(from_image("after", "changes", specs::LOCAL)).await?;
    let failed = cluster.api.wait_phase(&vm.id, v1::VmPhase::Failed, secs(20)).await?;
    let reason = failed.status.map(|s| s.reason).unwrap_or_default();
    ensure!(reason.contains("has the sha256") && reason.contains("changes"), "{reason}");
    assert_eq!(without_images_dir(listing::of(&cluster)?), without_images_dir(before));
    // When the server is in its senses again, the VM starts by itself.
    site.put("/changes", Page::File(first));
    cluster.api.wait_running(&vm.id, secs(60)).await?;
    cluster.finish().await
}

/// A small file system over a directory, until it is dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn over(dir: std::path::PathBuf) -> anyhow::Result<Self> {
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=4M,mode=0755", "tmpfs"]).arg(&dir).status()?;
        ensure!(mount.success(), "a tmpfs cannot be mounted; the tests run as root");
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_full_or_not_there_refuses_and_harms_nobody() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let site = Site::start().await?;
    let mut large = micro()?;
    large.extend(content(8 << 20));
    let url = site.put("/large", Page::File(large));
    let image = ready(&cluster, "large", &url).await?;
    let runs = cluster.run(from_image("runs", "large", specs::SHARED)).await?;

    let small = SmallDisk::over(cluster.hosts[0].dir().join("pool"))?;
    let before = listing::of(&cluster)?;
    let vm = cluster.api.create(from_image("full", "large", specs::LOCAL)).await?;
    let failed = cluster.api.wait_phase(&vm.id, v1::VmPhase::Failed, secs(30)).await?;
    let reason = failed.status.map(|s| s.reason).unwrap_or_default();
    ensure!(reason.contains("pool local is full: image large could not be written"), "{reason}");
    assert_eq!(without_images_dir(listing::of(&cluster)?), without_images_dir(before));
    cluster.checker.wait_beats(&runs.id, 2, secs(30)).await?;
    drop(small);
    cluster.api.wait_running(&vm.id, secs(90)).await?;
    cluster.api.delete(&vm.id).await?;
    cluster.api.wait_gone(&vm.id, secs(30)).await?;

    // The shared pool is not mounted: its marker is missing.
    cluster.allow_error("the pool cannot be used");
    let (marker, away) = (cluster.pool().join(".uncloud-pool"), cluster.path().join("marker"));
    fs::rename(&marker, &away)?;
    let before = listing::of(&cluster)?;
    let vm = cluster.api.create(from_image("unmounted", "large", specs::SHARED)).await?;
    let waits = |vm: &v1::Vm| {
        let phase = harness::api::phase_of(vm);
        matches!(phase, v1::VmPhase::Failed | v1::VmPhase::Pending)
    };
    cluster.api.wait_vm(&vm.id, "is not run", secs(30), waits).await?;
    assert_eq!(listing::of(&cluster)?, before, "nothing is written into what is not the pool");
    cluster.checker.wait_beats(&runs.id, 2, secs(30)).await?;
    fs::rename(&away, &marker)?;
    cluster.api.wait_running(&vm.id, secs(90)).await?;
    for vm in [&vm, &runs] {
        cluster.api.delete(&vm.id).await?;
        cluster.api.wait_gone(&vm.id, secs(30)).await?;
    }
    delete(&cluster, &image.id).await?;
    cluster.finish().await
}

/// Makes a certificate for 127.0.0.1 by an authority of its own. The files are NAME-ca.pem, NAME.pem and NAME.key.
fn certificate(dir: &std::path::Path, name: &str) -> anyhow::Result<()> {
    fs::write(dir.join("san"), "subjectAltName=IP:127.0.0.1\n")?;
    let script = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=ca -days 2 -keyout $1-ca.key -out $1-ca.pem && \
         openssl req -newkey rsa:2048 -nodes -subj /CN=site -keyout $1.key -out $1.csr && \
         openssl x509 -req -in $1.csr -CA $1-ca.pem -CAkey $1-ca.key -CAcreateserial -days 2 -extfile san -out $1.pem";
    let output = Command::new("sh").args(["-ec", script, "sh", name]).current_dir(dir).output()?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A web server with TLS, by another program: it serves what is in `dir`, and says its port.
async fn https(dir: &std::path::Path, name: &str) -> anyhow::Result<(tokio::process::Child, u16)> {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    const SERVER: &str = "import http.server, ssl, sys\n\
        s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n\
        c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
        c.load_cert_chain(sys.argv[1] + '.pem', sys.argv[1] + '.key')\n\
        s.socket = c.wrap_socket(s.socket, server_side=True)\n\
        print(s.server_port, flush=True)\n\
        s.serve_forever()\n";
    let mut child = tokio::process::Command::new("python3")
        .args(["-c", SERVER, name])
        .current_dir(dir)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let port = lines.next_line().await?.context("the server said no port")?.parse()?;
    Ok((child, port))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_must_be_who_it_says_and_be_among_those_that_are_allowed() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    for name in ["known", "stranger"] {
        certificate(dir.path(), name)?;
    }
    fs::write(dir.path().join("disk.img"), micro()?)?;
    let (_known, known) = https(dir.path(), "known").await?;
    let (_stranger, stranger) = https(dir.path(), "stranger").await?;
    let authority = dir.path().join("known-ca.pem").display().to_string();
    let start = Options::hosts(1).each_host(|_, h| {
        h.env = vec![("SSL_CERT_FILE".into(), authority.clone())];
        h.args = vec!["--image-url".into(), "https://127.0.0.1:".to_owned() + &known.to_string() + "/"];
        h.args.extend(["--image-url".to_owned(), format!("https://127.0.0.1:{stranger}/")]);
    });
    let mut cluster = start.start().await?;
    // The library that checks certificates says so itself.
    cluster.allow_error("failed to verify TLS certificate");
    ready(&cluster, "known", &format!("https://127.0.0.1:{known}/disk.img")).await?;
    let status =
        add(&cluster, request("stranger", &format!("https://127.0.0.1:{stranger}/disk.img"))).await.unwrap_err();
    ensure!(status.message().contains("certificate"), "{status}");
    let site = Site::start().await?;
    let url = site.put("/disk", Page::File(micro()?));
    let status = add(&cluster, request("elsewhere", &url)).await.unwrap_err();
    ensure!(status.message().contains("--image-url"), "{status}");
    assert!(site.hits("/disk").is_empty(), "it was asked although it is not allowed");
    cluster.finish().await
}
