//! Checks `CreateImage`.

use uncloud_proto::{names, v1};

use super::{Checker, MAX_COMMAND_LINE, MAX_SOURCE, Violations};
use crate::model::image::{DiskFormat, FileRole, ImageKind};

/// An image to be registered, before a host has looked at its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewImage {
    pub(crate) name: String,
    pub(crate) kind: ImageKind,
    pub(crate) files: Vec<NewFile>,
    pub(crate) command_line: String,
}

/// An image whose files a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewUpload {
    /// With empty sources.
    pub(crate) image: NewImage,
    /// Size of each file in bytes.
    pub(crate) sizes: Vec<u64>,
    /// The pool that they go to.
    pub(crate) pool: String,
}

/// Files that are sent: more than any image has.
const MAX_UPLOAD: u64 = 16 << 40;

/// Checks the first message of an upload.
///
/// # Errors
///
/// All that is wrong with it.
pub(crate) fn upload_start(first: Option<v1::UploadImageRequest>) -> Result<NewUpload, Violations> {
    let Some(v1::upload_image_request::Message::Start(start)) = first.and_then(|m| m.message) else {
        return Err(Violations::one("start", "is required in the first message"));
    };
    let mut check = Checker::default();
    let v1::UploadStart { name, kind, mut files, command_line, pool } = start;
    let pool = check.name_or("pool", pool, "default");
    let sizes: Vec<u64> = files.iter().map(|f| f.size_bytes).collect();
    for (i, file) in files.iter_mut().enumerate() {
        if !file.source.is_empty() {
            check.fail(format!("files[{i}].source"), "is for files that hosts read; leave it empty");
        }
        if !(1..=MAX_UPLOAD).contains(&file.size_bytes) {
            check.fail(format!("files[{i}].size_bytes"), format!("is {}; give 1 to {MAX_UPLOAD}", file.size_bytes));
        }
        file.size_bytes = 0;
        // Any source will do: it is not used.
        file.source = "/upload".to_owned();
    }
    check.finish(())?;
    let request = v1::CreateImageRequest { name, kind, files, command_line, ..Default::default() };
    Ok(NewUpload { image: create_image(request)?, sizes, pool })
}

/// One file of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewFile {
    pub(crate) role: FileRole,
    pub(crate) source: String,
    /// What the user says that it is. `None`: what the host finds is right.
    pub(crate) sha256: Option<String>,
    /// Likewise.
    pub(crate) format: Option<DiskFormat>,
}

/// Checks a request to register an image.
///
/// # Errors
///
/// All that is wrong with it.
pub(crate) fn create_image(request: v1::CreateImageRequest) -> Result<NewImage, Violations> {
    let mut check = Checker::default();
    check.request_id(&request.request_id);
    let name = check.name("name", request.name);
    let kinds = ["IMAGE_KIND_DISK", "IMAGE_KIND_KERNEL"];
    let kind = match check.known("kind", request.kind, &kinds) {
        Some(v1::ImageKind::Disk) => Some(ImageKind::Disk),
        Some(v1::ImageKind::Kernel) => Some(ImageKind::Kernel),
        Some(v1::ImageKind::Unspecified) => {
            check.fail("kind", format!("is required: give {}", kinds.join(" or ")));
            None
        }
        None => None,
    };
    check.text("command_line", &request.command_line, MAX_COMMAND_LINE);
    if kind == Some(ImageKind::Disk) && !request.command_line.is_empty() {
        check.fail("command_line", "is for kernels; leave it empty for a disk");
    }
    // No image has more; what a request with thousands says about each of them is of no use.
    if request.files.len() > 2 {
        check.fail("files", format!("has {} entries; an image has at most 2", request.files.len()));
        return Err(check.finish(()).expect_err("a violation was noted"));
    }
    let files: Vec<_> = request.files.into_iter().enumerate().map(|(i, f)| check_file(&mut check, i, f)).collect();
    if let Some(kind) = kind {
        check_roles(&mut check, kind, &files);
    }
    let files = files.into_iter().flatten().collect();
    // Without a kind there is a violation.
    let kind = kind.unwrap_or(ImageKind::Disk);
    check.finish(NewImage { name, kind, files, command_line: request.command_line })
}

fn check_roles(check: &mut Checker, kind: ImageKind, files: &[Option<NewFile>]) {
    // A file whose role is not known has had its say.
    if files.iter().any(Option::is_none) {
        return;
    }
    let count = |role| files.iter().flatten().filter(|f| f.role == role).count();
    let (disks, kernels, initrds) = (count(FileRole::Disk), count(FileRole::Kernel), count(FileRole::Initrd));
    match kind {
        ImageKind::Disk if (disks, kernels, initrds) != (1, 0, 0) => {
            check.fail("files", "must be one file with the role IMAGE_FILE_ROLE_DISK for a disk");
        }
        ImageKind::Kernel if disks != 0 || kernels != 1 || initrds > 1 => {
            check.fail(
                "files",
                "must be one file with the role IMAGE_FILE_ROLE_KERNEL, and perhaps one IMAGE_FILE_ROLE_INITRD",
            );
        }
        ImageKind::Disk | ImageKind::Kernel => {}
    }
}

fn check_file(check: &mut Checker, i: usize, file: v1::ImageFile) -> Option<NewFile> {
    let at = |field: &str| format!("files[{i}].{field}");
    let roles = ["IMAGE_FILE_ROLE_DISK", "IMAGE_FILE_ROLE_KERNEL", "IMAGE_FILE_ROLE_INITRD"];
    let role = match check.known(&at("role"), file.role, &roles) {
        Some(v1::ImageFileRole::Disk) => Some(FileRole::Disk),
        Some(v1::ImageFileRole::Kernel) => Some(FileRole::Kernel),
        Some(v1::ImageFileRole::Initrd) => Some(FileRole::Initrd),
        Some(v1::ImageFileRole::Unspecified) => {
            check.fail(at("role"), format!("is required: give {}", roles.join(" or ")));
            None
        }
        None => None,
    };
    if let Err(problem) = check_source(&file.source) {
        check.fail(at("source"), problem);
    }
    let sha256 = (!file.sha256.is_empty()).then(|| file.sha256.to_ascii_lowercase());
    if sha256.as_ref().is_some_and(|s| s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit())) {
        check.fail(at("sha256"), "must be 64 hexadecimal digits, or empty to have it computed");
    }
    let formats = ["IMAGE_FORMAT_RAW", "IMAGE_FORMAT_QCOW2"];
    let format = match check.known(&at("format"), file.format, &formats) {
        Some(v1::ImageFormat::Raw) => Some(DiskFormat::Raw),
        Some(v1::ImageFormat::Qcow2) => Some(DiskFormat::Qcow2),
        Some(v1::ImageFormat::Unspecified) | None => None,
    };
    if format.is_some() && role.is_some_and(|r| r != FileRole::Disk) {
        check.fail(at("format"), "is for disks; leave it unspecified for a kernel or initrd");
    }
    for (field, value) in [("size_bytes", file.size_bytes), ("virtual_size_bytes", file.virtual_size_bytes)] {
        if value != 0 {
            check.fail(at(field), "is measured by the cluster; leave it 0");
        }
    }
    Some(NewFile { role: role?, source: file.source, sha256, format })
}

/// An address on the network, without anything that would have to be kept secret.
fn check_address(rest: &str) -> Result<(), String> {
    const FORM: &str = "give an address such as `https://example.org/debian.qcow2`";
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err("has a user name or password, which everybody could read; give the address without".to_owned());
    }
    if rest.contains('#') {
        return Err("has a `#`; give the address without what comes after it".to_owned());
    }
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    if host.is_empty() || !rest.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("is no address: {FORM}"));
    }
    Ok(())
}

/// A source is an absolute path, `pool:NAME/path`, or an address, and never climbs. The agent checks again, with links followed.
fn check_source(source: &str) -> Result<(), String> {
    const FORM: &str = "give an absolute path on a host, `pool:NAME/path/in/the/pool`, or an https:// address";
    if source.is_empty() {
        return Err(format!("is required: {FORM}"));
    }
    if source.len() > MAX_SOURCE {
        return Err(format!("has {} bytes; at most {MAX_SOURCE} are allowed", source.len()));
    }
    if let Some(bad) = source.chars().find(|c| c.is_control()) {
        return Err(format!("has the control character {}; remove it", bad.escape_debug()));
    }
    if let Some(rest) = source.strip_prefix("https://").or_else(|| source.strip_prefix("http://")) {
        return check_address(rest);
    }
    let path = match source.strip_prefix("pool:") {
        Some(rest) => {
            let (pool, path) = rest.split_once('/').ok_or(format!("names no file in the pool: {FORM}"))?;
            names::check(pool).map_err(|problem| format!("has a pool name that {problem}"))?;
            path
        }
        None => source.strip_prefix('/').ok_or(format!("is neither: {FORM}"))?,
    };
    if path.is_empty() || path.ends_with('/') {
        return Err(format!("names no file: {FORM}"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err("has a `..` component; give the path without it".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::testing::fields, *};

    fn file(role: v1::ImageFileRole, source: &str) -> v1::ImageFile {
        v1::ImageFile { role: role.into(), source: source.to_owned(), ..Default::default() }
    }

    fn good() -> v1::CreateImageRequest {
        v1::CreateImageRequest {
            name: "debian".to_owned(),
            kind: v1::ImageKind::Disk.into(),
            files: vec![file(v1::ImageFileRole::Disk, "/images/debian.qcow2")],
            ..Default::default()
        }
    }

    fn with(change: impl FnOnce(&mut v1::CreateImageRequest)) -> v1::CreateImageRequest {
        let mut request = good();
        change(&mut request);
        request
    }

    #[test]
    fn a_sha256_is_kept_in_one_spelling() {
        let image = create_image(with(|r| r.files[0].sha256 = "AB".repeat(32))).unwrap();
        assert_eq!(image.files[0].sha256.as_deref(), Some("ab".repeat(32).as_str()));
    }

    #[test]
    fn sources_that_stay_where_they_are() {
        for source in [
            "https://example.org/x.qcow2?a=b",
            "http://[::1]:8080/../x",
            "http://10.0.0.1",
            "/a",
            "/a/b.img",
            "/a/..b/c",
            "pool:default/x",
            "pool:p-1/a/b c.img",
        ] {
            assert_eq!(check_source(source), Ok(()), "{source}");
        }
    }

    #[test]
    fn each_bad_input_names_its_field() {
        let source = |s: &str| with(|r| r.files[0].source = s.to_owned());
        let long = format!("/{}", "x".repeat(4096));
        let mut table = vec![
            ("name", with(|r| r.name = "a/b".to_owned())),
            ("request_id", with(|r| r.request_id = "\n".to_owned())),
            ("kind", with(|r| r.kind = 0)),
            ("kind", with(|r| r.kind = 3)),
            ("kind", with(|r| r.kind = -3)),
            ("command_line", with(|r| r.command_line = "console=ttyS0".to_owned())),
            ("files", with(|r| r.files.clear())),
            ("files", with(|r| r.files = vec![r.files[0].clone(); 2])),
            ("files", with(|r| r.files = vec![r.files[0].clone(); 10_000])),
            ("files", with(|r| r.kind = v1::ImageKind::Kernel.into())),
            ("files[0].role", with(|r| r.files[0].role = 0)),
            ("files[0].role", with(|r| r.files[0].role = 9)),
            ("files[0].sha256", with(|r| r.files[0].sha256 = "ab".to_owned())),
            ("files[0].sha256", with(|r| r.files[0].sha256 = "zz".repeat(32))),
            ("files[0].format", with(|r| r.files[0].format = 3)),
            ("files[0].size_bytes", with(|r| r.files[0].size_bytes = 1)),
            ("files[0].virtual_size_bytes", with(|r| r.files[0].virtual_size_bytes = u64::MAX)),
            (
                "files[0].format",
                with(|r| {
                    r.kind = v1::ImageKind::Kernel.into();
                    r.files[0].role = v1::ImageFileRole::Kernel.into();
                    r.files[0].format = v1::ImageFormat::Raw.into();
                }),
            ),
            (
                "command_line",
                with(|r| {
                    r.kind = v1::ImageKind::Kernel.into();
                    r.files[0].role = v1::ImageFileRole::Kernel.into();
                    r.command_line = "a\nb".to_owned();
                }),
            ),
        ];
        for bad in [
            "",
            "x",
            "a/b",
            "/",
            "/a/",
            "/a/../etc/shadow",
            "/..",
            "pool:",
            "pool:x",
            "pool:x/",
            "pool:/x",
            "pool:../x",
            "pool:x/../y",
            "pool:x/a/..",
            "/a\0b",
            "/a\nb",
            "https://",
            "https:///x",
            "https://user:secret@example.org/x",
            "http://a b/",
            "http://a/#b",
            "ftp://example.org/x",
            "upload:default",
            &long,
        ] {
            table.push(("files[0].source", source(bad)));
        }
        for (field, request) in table {
            let found = create_image(request.clone());
            assert!(found.is_err(), "{field}: {request:?}");
            let message = found.as_ref().unwrap_err().to_string();
            assert_eq!(fields(found), [field], "{message}");
        }
    }
}
