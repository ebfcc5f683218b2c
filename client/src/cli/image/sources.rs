//! Where the files of an image are: on the network, on the hosts, or here.

use std::path::{Path, PathBuf};

use uncloud_proto::v1::{self, ImageFileRole, ImageFormat, ImageKind};

use super::{
    super::Error,
    {Add, Format},
};
use crate::output;

/// What is to be done.
#[derive(Debug)]
pub(super) enum Plan {
    /// The hosts have the files, or can get them.
    Register(v1::CreateImageRequest),
    /// The files are here.
    Upload(Upload),
}

/// Files that are sent.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) start: v1::UploadStart,
    /// In the order of `start.files`.
    pub(super) paths: Vec<PathBuf>,
}

/// Where one file is.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Here(PathBuf),
    Elsewhere(String),
}

fn source(text: &str, here: &Path, upload: bool) -> Source {
    let named = ["https://", "http://", "pool:"].iter().any(|p| text.starts_with(p));
    if named || text.is_empty() || (Path::new(text).is_absolute() && !upload) {
        return Source::Elsewhere(text.to_owned());
    }
    Source::Here(here.join(text).components().collect())
}

pub(super) fn plan(add: Add, here: &Path) -> Result<Plan, Error> {
    let format = match add.format {
        None => ImageFormat::Unspecified,
        Some(Format::Raw) => ImageFormat::Raw,
        Some(Format::Qcow2) => ImageFormat::Qcow2,
    };
    let file = |role: ImageFileRole, sha256: Option<String>, format: ImageFormat| v1::ImageFile {
        role: role.into(),
        sha256: sha256.unwrap_or_default(),
        format: format.into(),
        ..Default::default()
    };
    let (kind, mut files, texts) = match (add.kernel, add.path) {
        (Some(kernel), _) => {
            let mut files = vec![file(ImageFileRole::Kernel, add.sha256, ImageFormat::Unspecified)];
            let mut texts = vec![kernel];
            if let Some(initrd) = add.initrd {
                files.push(file(ImageFileRole::Initrd, add.initrd_sha256, ImageFormat::Unspecified));
                texts.push(initrd);
            }
            (ImageKind::Kernel, files, texts)
        }
        (None, path) => {
            (ImageKind::Disk, vec![file(ImageFileRole::Disk, add.sha256, format)], vec![path.unwrap_or_default()])
        }
    };
    let sources: Vec<Source> = texts.iter().map(|t| source(t, here, add.upload)).collect();
    let command_line = add.append.unwrap_or_default();
    if sources.iter().all(|s| matches!(s, Source::Elsewhere(_))) {
        for (file, source) in files.iter_mut().zip(texts) {
            file.source = source;
        }
        return Ok(Plan::Register(v1::CreateImageRequest {
            request_id: add.request_id.unwrap_or_default(),
            name: add.name,
            kind: kind.into(),
            files,
            command_line,
        }));
    }
    let mut paths = Vec::new();
    for (file, source) in files.iter_mut().zip(sources) {
        let Source::Here(path) = source else {
            let words = "one file is here and the other is not: give both as relative paths, or with --upload";
            return Err(Error::Usage(words.to_owned()));
        };
        file.size_bytes = size(&path).map_err(Error::Failed)?;
        paths.push(path);
    }
    let start = v1::UploadStart { name: add.name, kind: kind.into(), files, command_line, pool: add.pool };
    Ok(Plan::Upload(Upload { start, paths }))
}

fn size(path: &Path) -> Result<u64, String> {
    let shown = output::clean(&path.display().to_string());
    let metadata = std::fs::metadata(path).map_err(|e| format!("{shown}: {e}"))?;
    match metadata.len() {
        _ if !metadata.is_file() => Err(format!("{shown} is not a file")),
        0 => Err(format!("{shown} is empty")),
        size => Ok(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_here_and_absolute_ones_on_the_hosts() {
        let here = Path::new("/srv/images");
        let is_here = |text: &str, upload| match source(text, here, upload) {
            Source::Here(path) => path.to_str().unwrap().to_owned(),
            Source::Elsewhere(text) => format!("elsewhere {text}"),
        };
        assert_eq!(is_here("debian.qcow2", false), "/srv/images/debian.qcow2");
        assert_eq!(is_here("./x/./y.img", false), "/srv/images/x/y.img");
        assert_eq!(is_here("/a/b", false), "elsewhere /a/b");
        assert_eq!(is_here("/a/b", true), "/a/b");
        assert_eq!(is_here("pool:default/a.img", true), "elsewhere pool:default/a.img");
        assert_eq!(is_here("https://example.org/a", true), "elsewhere https://example.org/a");
    }
}
