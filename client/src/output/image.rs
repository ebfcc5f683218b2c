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
                units::bytes(i.files.iter().map(|f| f.size_bytes).sum()),
                age(i.created.as_ref(), now),
                i.files.iter().map(|f| f.source.as_str()).collect::<Vec<_>>().join(", "),
            ]
        })
        .collect();
    table(&["NAME", "ID", "KIND", "SIZE", "AGE", "SOURCE"], &rows)
}

/// Everything about one image.
#[must_use]
pub fn show_image(image: &v1::Image, now: WallTime) -> String {
    let mut out = pairs(&[
        ("Name", image.name.clone()),
        ("ID", image.id.clone()),
        ("Kind", kind(image)),
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
