//! `uncloud image`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use uncloud_proto::v1::{self, ImageFileRole, ImageFormat, ImageKind};

use super::{Context, Error};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Registers an image: a disk, or a kernel with its initrd.
    ///
    /// The files are read by the hosts, so they must be there under the same path (or in a pool). They are copied into
    /// a pool when a VM first needs them there.
    Add(Add),
    /// Lists all images.
    List,
    /// Shows one image.
    Show(Named),
    /// Forgets an image that no VM uses.
    Delete(Named),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name, UUID or unique prefix of one.
    image: String,
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Name of the image.
    name: String,
    /// The disk: a path on the hosts, or `pool:NAME/PATH`. A relative path is taken from here.
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    path: Option<String>,
    /// Format of the disk; found out if it is not given.
    #[arg(long, value_enum, requires = "path")]
    format: Option<Format>,
    /// The sha256 that the disk (or the kernel) must have; computed if it is not given.
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// Registers a kernel instead of a disk.
    #[arg(long, value_name = "PATH")]
    kernel: Option<String>,
    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initrd: Option<String>,
    /// The sha256 that the initial RAM disk must have.
    #[arg(long, value_name = "HEX", requires = "initrd")]
    initrd_sha256: Option<String>,
    /// The kernel's command line, for VMs that name none.
    #[arg(long, value_name = "CMDLINE", requires = "kernel")]
    append: Option<String>,
    /// Makes it safe to run this command again when its answer was lost: the same id gives the same image.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<(), Error> {
    let client = &context.client;
    match command {
        Command::Add(add) => {
            let here = std::env::current_dir().map_err(|e| Error::Failed(format!("where are we? {e}")))?;
            let answer = client.create_image(request(add, &here)).await?;
            context.print(&answer, |a| output::images(a.image.as_slice(), context.now()))
        }
        Command::List => {
            let answer = client.list_images(v1::ListImagesRequest {}).await?;
            context.print(&answer, |a| output::images(&a.images, context.now()))
        }
        Command::Show(Named { image }) => {
            let answer = client.get_image(v1::GetImageRequest { image }).await?;
            context.print(&answer, |a| output::show_image(&a.image.clone().unwrap_or_default(), context.now()))
        }
        Command::Delete(Named { image }) => {
            let answer = client.delete_image(v1::DeleteImageRequest { image: image.clone() }).await?;
            context.print(&answer, |_| format!("{} is forgotten.", output::clean(&image)))
        }
    }
}

fn request(add: Add, here: &Path) -> v1::CreateImageRequest {
    let file = |role: ImageFileRole, path: &str, sha256: Option<String>| v1::ImageFile {
        role: role.into(),
        source: source(path, here),
        sha256: sha256.unwrap_or_default(),
        ..Default::default()
    };
    let (kind, files) = match (&add.kernel, &add.path) {
        (Some(kernel), _) => {
            let mut files = vec![file(ImageFileRole::Kernel, kernel, add.sha256)];
            files.extend(add.initrd.map(|initrd| file(ImageFileRole::Initrd, &initrd, add.initrd_sha256)));
            (ImageKind::Kernel, files)
        }
        (None, path) => {
            let mut disk = file(ImageFileRole::Disk, path.as_deref().unwrap_or_default(), add.sha256);
            disk.format = match add.format {
                None => ImageFormat::Unspecified,
                Some(Format::Raw) => ImageFormat::Raw,
                Some(Format::Qcow2) => ImageFormat::Qcow2,
            }
            .into();
            (ImageKind::Disk, vec![disk])
        }
    };
    v1::CreateImageRequest {
        request_id: add.request_id.unwrap_or_default(),
        name: add.name,
        kind: kind.into(),
        files,
        command_line: add.append.unwrap_or_default(),
    }
}

/// A path as the hosts understand it: absolute, or in a pool.
fn source(path: &str, here: &Path) -> String {
    if path.starts_with("pool:") || path.is_empty() {
        return path.to_owned();
    }
    // Only joined, not resolved: on a host the same path may lead through other links.
    let absolute: PathBuf = here.join(path).components().collect();
    absolute.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_taken_from_here() {
        let here = Path::new("/srv/images");
        assert_eq!(source("debian.qcow2", here), "/srv/images/debian.qcow2");
        assert_eq!(source("./x/./y.img", here), "/srv/images/x/y.img");
        assert_eq!(source("/a/b", here), "/a/b");
        assert_eq!(source("pool:default/a.img", here), "pool:default/a.img");
    }
}
