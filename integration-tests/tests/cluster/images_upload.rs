//! Images that clients send, and images that go.

use std::{fs, process::Command};

use harness::{listing, prelude::*};
use uncloud_proto::v1::{ImageState, upload_image_request::Message};

type Sender = tokio::sync::mpsc::Sender<v1::UploadImageRequest>;

fn start(name: &str, size: u64) -> v1::UploadImageRequest {
    let file = v1::ImageFile { role: v1::ImageFileRole::Disk.into(), size_bytes: size, ..Default::default() };
    let start = v1::UploadStart {
        name: name.into(),
        kind: v1::ImageKind::Disk.into(),
        files: vec![file],
        ..Default::default()
    };
    v1::UploadImageRequest { message: Some(Message::Start(start)) }
}

fn data(bytes: Vec<u8>) -> v1::UploadImageRequest {
    v1::UploadImageRequest { message: Some(Message::Data(bytes)) }
}

/// Begins an upload. What is sent goes on until the sender is dropped.
async fn begin(
    cluster: &Cluster,
    first: v1::UploadImageRequest,
) -> anyhow::Result<(Sender, tokio::task::JoinHandle<Result<v1::Image, tonic::Status>>)> {
    let (sender, queue) = tokio::sync::mpsc::channel(4);
    sender.send(first).await?;
    let endpoint = cluster.api.endpoint().split(',').next().unwrap_or_default().to_owned();
    let channel = tonic::transport::Endpoint::new(format!("http://{endpoint}"))?.connect().await?;
    let mut client = v1::image_service_client::ImageServiceClient::new(channel);
    let call = tokio::spawn(async move {
        let answer = client.upload_image(tokio_stream::wrappers::ReceiverStream::new(queue)).await?;
        Ok(answer.into_inner().image.unwrap_or_default())
    });
    Ok((sender, call))
}

async fn images(cluster: &Cluster) -> Result<Vec<v1::Image>, String> {
    let answer = cluster.api.images().list_images(v1::ListImagesRequest {}).await;
    Ok(answer.map_err(|s| s.to_string())?.into_inner().images)
}

/// Waits until the image is listed as the test wants it. `None`: not at all.
async fn wait_image(
    cluster: &Cluster,
    name: &str,
    what: &str,
    test: impl Fn(Option<&v1::Image>) -> bool,
) -> anyhow::Result<()> {
    wait_for(&format!("image {name} {what}"), secs(30), async || {
        let images = images(cluster).await?;
        let found = images.iter().find(|i| i.name == name);
        if test(found) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await
}

/// The directory of images is made with the first and stays.
fn files(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    Ok(listing::of(cluster)?.into_iter().filter(|l| !l.ends_with("/images/")).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_from_here_become_images_and_guests_run_from_them() -> anyhow::Result<()> {
    // Through a controller that does not lead, too: it passes the stream on.
    let cluster = Options::hosts(2).controllers(2).start().await?;
    let leader = cluster.leader().await?;
    let follower = cluster.addresses()[1 - leader].clone();
    let before = files(&cluster)?;
    let disk = harness::paths::guest("micro.img")?.display().to_string();
    let added = harness::cli::run(&follower, &["image", "add", "sent", "--upload", &disk]).await?.success()?;
    ensure!(added.stdout.contains("ready") && added.stderr.contains("100 %"), "{added:?}");
    let vm = cluster.run(specs::with(specs::micro("from-sent"), |s| s.disks[0].image = "sent".into())).await?;

    let (kernel, initrd) = (harness::paths::guest("vmlinuz")?, harness::paths::guest("initrd.img")?);
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let args = ["image", "add", "kernel", "--upload", "--kernel", &kernel, "--initrd", &initrd];
    let args = args.into_iter().chain(["--append", "console=ttyS0 quiet"]).collect::<Vec<_>>();
    cluster.cli(&args).await?.success()?;
    let booted = cluster
        .run(specs::with(specs::linux("from-kernel"), |s| s.kernel.get_or_insert_default().image = "kernel".into()))
        .await?;

    // A name that is taken is refused before anything is sent.
    let (_sender, call) = begin(&cluster, start("sent", 5)).await?;
    assert_eq!(call.await?.unwrap_err().code(), Code::AlreadyExists);

    for vm in [&vm, &booted] {
        cluster.api.delete(&vm.id).await?;
        cluster.api.wait_gone(&vm.id, secs(30)).await?;
    }
    for name in ["sent", "kernel"] {
        harness::cli::run(&follower, &["image", "delete", name, "--wait"]).await?.success()?;
    }
    let left: Vec<_> =
        files(&cluster)?.into_iter().filter(|l| !before.contains(l) && !l.ends_with("/disks/")).collect();
    let micro_copy = images(&cluster).await.map_err(anyhow::Error::msg)?;
    let of_others = |l: &String| micro_copy.iter().any(|i| l.contains(&i.id));
    assert_eq!(left.into_iter().filter(|l| !of_others(l)).collect::<Vec<_>>(), [""; 0]);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_leaves_nothing() -> anyhow::Result<()> {
    let mut cluster = Options::hosts(1).start().await?;
    let before = files(&cluster)?;
    let half = || data(vec![7; 100_000]);

    // The client goes away.
    let (sender, call) = begin(&cluster, start("gone", 1_000_000)).await?;
    sender.send(half()).await?;
    wait_image(&cluster, "gone", "is uploading", |i| i.is_some_and(|i| i.state() == ImageState::Uploading)).await?;
    call.abort();
    drop(sender);
    wait_image(&cluster, "gone", "is gone", |i| i.is_none()).await?;
    assert_eq!(files(&cluster)?, before);

    // It ends too early, sends too much, sends something corrupt.
    let (sender, call) = begin(&cluster, start("short", 1_000_000)).await?;
    sender.send(half()).await?;
    drop(sender);
    let status = call.await?.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    ensure!(status.message().contains("ends after 100000 of 1000000 bytes"), "{status}");
    let (sender, call) = begin(&cluster, start("long", 1000)).await?;
    sender.send(half()).await?;
    drop(sender);
    let status = call.await?.unwrap_err();
    ensure!(status.message().contains("more bytes than the files"), "{status}");
    let mut corrupt = vec![0; 100_000];
    corrupt[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    let (sender, call) = begin(&cluster, start("corrupt", 100_000)).await?;
    sender.send(data(corrupt)).await?;
    drop(sender);
    let status = call.await?.unwrap_err();
    ensure!(status.message().contains("qcow2"), "{status}");
    for name in ["short", "long", "corrupt"] {
        wait_image(&cluster, name, "is gone", |i| i.is_none()).await?;
    }
    assert_eq!(files(&cluster)?, before);

    // The host dies, and comes back: what it had is removed.
    let (sender, call) = begin(&cluster, start("dies", 1_000_000)).await?;
    sender.send(half()).await?;
    wait_for("something has come", secs(10), async || match files(&cluster) {
        Ok(now) if now.len() > before.len() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    cluster.hosts[0].kill();
    let status = call.await?.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    wait_image(&cluster, "dies", "waits for the host", |i| i.is_some_and(|i| i.state() == ImageState::Deleting))
        .await?;
    cluster.hosts[0].start_again()?;
    wait_image(&cluster, "dies", "is gone", |i| i.is_none()).await?;
    assert_eq!(files(&cluster)?, before);

    // The controller dies: the next leader finds an upload that nobody carries on.
    let (sender, call) = begin(&cluster, start("led", 1_000_000)).await?;
    sender.send(half()).await?;
    wait_image(&cluster, "led", "is uploading", |i| i.is_some_and(|i| i.state() == ImageState::Uploading)).await?;
    cluster.controller.process().kill();
    assert!(call.await?.is_err());
    cluster.controller.process().start_again()?;
    wait_image(&cluster, "led", "is gone", |i| i.is_none()).await?;
    assert_eq!(files(&cluster)?, before);
    cluster.finish().await
}

/// P5: a disk that no record speaks of keeps the image that it is an overlay of.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_an_unknown_disk_needs_stays() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let path = harness::paths::guest("micro.img")?.display().to_string();
    cluster.cli(&["image", "add", "base", "--upload", &path]).await?.success()?;
    let all = images(&cluster).await.map_err(anyhow::Error::msg)?;
    let image = all.iter().find(|i| i.name == "base").context("no image")?.id.clone();
    let dir = cluster.pool().join("disks").join("11111111-2222-4333-8444-555555555555");
    fs::create_dir_all(&dir)?;
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &format!("../../images/{image}/disk")])
        .arg(dir.join("root.0.qcow2"))
        .status()?;
    ensure!(made.success(), "qemu-img create");
    cluster.cli(&["image", "delete", "base"]).await?.success()?;
    // It says what it waits for, for as long as the disk is there.
    wait_for("the reason is shown", secs(20), async || {
        let shown = cluster.cli(&["image", "show", &image]).await.map_err(|e| e.to_string())?;
        if shown.stdout.contains("is needed by the disk") { Ok(()) } else { Err(format!("{shown:?}")) }
    })
    .await?;
    assert!(cluster.pool().join("images").join(&image).join("disk").exists());
    fs::remove_dir_all(dir)?;
    wait_image(&cluster, "base", "is gone", |i| i.is_none()).await?;
    assert!(!cluster.pool().join("images").join(&image).exists());
    cluster.finish().await
}

/// However creations and the deletion race, either a VM has its image or it is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_and_creations_at_the_same_time_never_take_an_image_from_a_vm() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let path = harness::paths::guest("micro.img")?.display().to_string();
    for round in 0..5 {
        let name = format!("race-{round}");
        cluster.cli(&["image", "add", &name, "--upload", &path]).await?.success()?;
        let vm =
            |n: usize| specs::with(specs::micro(&format!("vm-{round}-{n}")), |s| s.disks[0].image.clone_from(&name));
        let delete = v1::DeleteImageRequest { image: name.clone() };
        let mut client = cluster.api.images();
        let (deleted, a, b, c) = tokio::join!(
            async {
                tokio::time::sleep(Duration::from_millis(round * 2)).await;
                client.delete_image(delete).await
            },
            cluster.api.create(vm(1)),
            cluster.api.create(vm(2)),
            cluster.api.create(vm(3)),
        );
        let created: Vec<_> = [a, b, c].into_iter().flatten().collect();
        ensure!(deleted.is_err() || created.is_empty(), "the image was deleted although VMs use it: {created:?}");
        for vm in created {
            cluster.api.wait_running(&vm.id, secs(60)).await?;
        }
    }
    cluster.finish().await
}
