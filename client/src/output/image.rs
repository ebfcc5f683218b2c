//! Images for people.

use uncloud_proto::{clock::WallTime, v1};

use super::{
    pairs, table,
    text::{age, dash, moment_and_age, short_id, word},
};
use crate::units;

fn kind(image: &v1::Image) -> String {
    word(image.kind().as_str_name(), "IMAGE_KIND_")
}

fn state(image: &v1::Image) -> String {
    match image.state() {
        v1::ImageState::Unspecified => dash(),
        state @ (v1::ImageState::Ready
        | v1::ImageState::Fetching
        | v1::ImageState::Uploading
        | v1::ImageState::Failed
        | v1::ImageState::Deleting) => word(state.as_str_name(), "IMAGE_STATE_"),
    }
}

/// How an image is, in one line, such as `debian: fetching, 1.2 GiB of 2 GiB (60 %), by host-1`.
#[must_use]
pub fn image_line(image: &v1::Image, progress: Option<&v1::ImageProgress>) -> String {
    let mut line = format!("{}: {}", image.name, state(image));
    if let Some(progress) = progress {
        line.push_str(&progress_words(progress));
    }
    if !image.reason.is_empty() {
        line.push_str(&format!(": {}", image.reason));
    }
    super::clean(&line)
}

fn progress_words(p: &v1::ImageProgress) -> String {
    let mut words = String::new();
    if p.total_bytes > 0 {
        let percent = u128::from(p.done_bytes) * 100 / u128::from(p.total_bytes);
        let (done, total) = (units::bytes(p.done_bytes), units::bytes(p.total_bytes));
        words.push_str(&format!(", {done} of {total} ({percent} %)"));
    } else if p.done_bytes > 0 {
        words.push_str(&format!(", {}", units::bytes(p.done_bytes)));
    }
    if !p.host_name.is_empty() {
        words.push_str(&format!(", by {}", p.host_name));
    }
    if !p.note.is_empty() {
        words.push_str(&format!(": {}", p.note));
    }
    words
}

fn format(file: &v1::ImageFile) -> String {
    match file.format() {
        v1::ImageFormat::Unspecified => dash(),
        format @ (v1::ImageFormat::Raw | v1::ImageFormat::Qcow2) => word(format.as_str_name(), "IMAGE_FORMAT_"),
    }
}

/// A table of images.
#[must_use]
pub fn images(images: &[v1::Image], now: WallTime) -> String {
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|i| {
            vec![
                i.name.clone(),
                short_id(&i.id),
                kind(i),
                state(i),
                units::bytes(i.files.iter().map(|f| f.size_bytes).sum()),
                age(i.created.as_ref(), now),
                i.files.iter().map(|f| f.source.as_str()).collect::<Vec<_>>().join(", "),
            ]
        })
        .collect();
    table(&["NAME", "ID", "KIND", "STATE", "SIZE", "AGE", "SOURCE"], &rows)
}

/// Everything about one image.
#[must_use]
pub fn show_image(image: &v1::Image, progress: Option<&v1::ImageProgress>, now: WallTime) -> String {
    let mut out = pairs(&[
        ("Name", image.name.clone()),
        ("ID", image.id.clone()),
        ("Kind", kind(image)),
        ("State", format!("{}{}", state(image), progress.map(progress_words).unwrap_or_default())),
        ("Reason", image.reason.clone()),
        ("Command line", image.command_line.clone()),
        ("Created", moment_and_age(image.created.as_ref(), now)),
    ]);
    let rows: Vec<Vec<String>> = image
        .files
        .iter()
        .map(|f| {
            let guest_sees = if f.virtual_size_bytes == 0 { dash() } else { units::bytes(f.virtual_size_bytes) };
            let role = word(f.role().as_str_name(), "IMAGE_FILE_ROLE_");
            vec![role, format(f), units::bytes(f.size_bytes), guest_sees, f.sha256.clone(), f.source.clone()]
        })
        .collect();
    out.push_str(&format!("\n{}\n", table(&["FILE", "FORMAT", "SIZE", "GUEST SEES", "SHA256", "SOURCE"], &rows)));
    out
}
