//! What kind of disk image a file is, from its first bytes. Pure.
//!
//! A raw image can hold anything, also the header of another format, so a format is looked at once, when an image is
//! registered, and never guessed again: from then on it is told to QEMU. QEMU itself never probes.
//!
//! A qcow2 header may name other files (a backing file, a data file) which QEMU would open. An image that does is refused.

use crate::vm::desired::Format;

/// So many bytes are needed.
pub const HEADER_BYTES: usize = 104;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bit of the incompatible features that says "external data file".
const DATA_FILE: u64 = 1 << 2;
/// Incompatible features that QEMU 7.2 knows: dirty, corrupt, data file, compression type, extended L2.
const KNOWN_FEATURES: u64 = 0x1f;

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The format.
    pub format: Format,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
}

/// Why an image cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// It ends within its header.
    #[error("it is a qcow2 image that ends within its header")]
    Truncated,
    /// A version that is not known.
    #[error("it is a qcow2 image of version {0}, not 2 or 3")]
    Version(u32),
    /// It needs a file besides itself.
    #[error("it is a qcow2 image with a backing file; make one without: qemu-img convert -O qcow2")]
    BackingFile,
    /// It needs a file besides itself.
    #[error("it is a qcow2 image with an external data file; make one without: qemu-img convert -O qcow2")]
    DataFile,
    /// It is encrypted.
    #[error("it is an encrypted qcow2 image")]
    Encrypted,
    /// It is larger than any disk may be.
    #[error("it is a qcow2 image with a virtual size of {0} bytes, more than any disk may have (64 TiB)")]
    TooLarge(u64),
    /// The header makes no sense.
    #[error("it is a qcow2 image with a broken header ({0})")]
    Broken(&'static str),
}

/// Looks at the first bytes of a file of `size` bytes.
///
/// # Errors
///
/// It cannot be used as a disk.
pub fn detect(header: &[u8], size: u64) -> Result<Facts, Refused> {
    if header.starts_with(MAGIC) {
        return qcow2(header).map(|virtual_size| Facts { format: Format::Qcow2, virtual_size });
    }
    if size == 0 {
        return Err(Refused::Empty);
    }
    Ok(raw(size))
}

/// A raw image of `size` bytes. A guest sees whole sectors.
#[must_use]
pub fn raw(size: u64) -> Facts {
    Facts { format: Format::Raw, virtual_size: size.div_ceil(512).saturating_mul(512) }
}

/// What is said of an image that is larger than this host's agent takes.
#[must_use]
pub fn too_large(virtual_size: u64, most: u64) -> String {
    format!("its guest would see a disk of {virtual_size} bytes; at most {most} are allowed (--max-image-gib)")
}

/// Why a file is refused that is larger than this host takes, in words.
pub fn file_too_large(size: u64, most: u64) -> String {
    format!("it has {size} bytes; at most {most} are allowed (--max-image-gib)")
}

/// Checks a file whose format is known already.
///
/// # Errors
///
/// It cannot be used as a disk of this format.
pub fn check(format: Format, header: &[u8]) -> Result<(), Refused> {
    match format {
        // Whatever is in there, QEMU is told that it is raw.
        Format::Raw => Ok(()),
        Format::Qcow2 if !header.starts_with(MAGIC) => Err(Refused::Broken("no magic")),
        Format::Qcow2 => qcow2(header).map(|_| ()),
    }
}

/// The size that a guest sees of a disk of ours, which may have a backing file. `None`: it is no qcow2 file.
#[must_use]
pub(super) fn qcow2_size(header: &[u8]) -> Option<u64> {
    let size = header.get(24..32).filter(|_| header.starts_with(MAGIC))?;
    Some(u64::from_be_bytes(size.try_into().ok()?))
}

fn qcow2(header: &[u8]) -> Result<u64, Refused> {
    let u32_at = |at: usize| header.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let u64_at = |at: usize| u32_at(at).zip(u32_at(at + 4)).map(|(high, low)| u64::from(high) << 32 | u64::from(low));
    let version = u32_at(4).ok_or(Refused::Truncated)?;
    if !(2..=3).contains(&version) {
        return Err(Refused::Version(version));
    }
    if u64_at(8).ok_or(Refused::Truncated)? != 0 {
        return Err(Refused::BackingFile);
    }
    if !(9..=21).contains(&u32_at(20).ok_or(Refused::Truncated)?) {
        return Err(Refused::Broken("cluster size"));
    }
    let virtual_size = u64_at(24).ok_or(Refused::Truncated)?;
    if virtual_size == 0 || virtual_size % 512 != 0 {
        return Err(Refused::Broken("virtual size"));
    }
    if virtual_size > 64 << 40 {
        return Err(Refused::TooLarge(virtual_size));
    }
    if u32_at(32).ok_or(Refused::Truncated)? != 0 {
        return Err(Refused::Encrypted);
    }
    if version == 3 {
        let features = u64_at(72).ok_or(Refused::Truncated)?;
        if features & DATA_FILE != 0 {
            return Err(Refused::DataFile);
        }
        if features & !KNOWN_FEATURES != 0 {
            return Err(Refused::Broken("unknown features"));
        }
    }
    Ok(virtual_size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Vec<u8> {
        let mut h = vec![0; HEADER_BYTES];
        h[..4].copy_from_slice(MAGIC);
        h[7] = 3;
        h[23] = 16;
        h[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        h
    }

    fn with(at: usize, byte: u8) -> Result<Facts, Refused> {
        let mut h = header();
        h[at] = byte;
        detect(&h, 1 << 20)
    }

    #[test]
    fn formats_are_told_apart_by_the_magic_alone() {
        assert_eq!(detect(&header(), 1 << 20), Ok(Facts { format: Format::Qcow2, virtual_size: 1 << 30 }));
        assert_eq!(detect(b"KDMV....", 1025), Ok(Facts { format: Format::Raw, virtual_size: 1536 }));
        assert_eq!(detect(b"", 0), Err(Refused::Empty));
    }

    #[test]
    fn an_image_that_names_other_files_is_refused() {
        assert_eq!(with(15, 1), Err(Refused::BackingFile));
        assert_eq!(with(79, 4), Err(Refused::DataFile));
        assert_eq!(with(35, 1), Err(Refused::Encrypted));
        assert_eq!(with(7, 1), Err(Refused::Version(1)));
        assert_eq!(with(23, 40), Err(Refused::Broken("cluster size")));
        assert_eq!(with(25, 1), Err(Refused::TooLarge((1 << 48) + (1 << 30))));
        assert_eq!(with(79, 0x20), Err(Refused::Broken("unknown features")));
        assert!(check(Format::Qcow2, b"plain").is_err());
        assert!(check(Format::Raw, &header()).is_ok(), "told to be raw, it is never taken for anything else");
    }

    proptest! {
        #[test]
        fn no_file_makes_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..120), magic in any::<bool>()) {
            if magic && bytes.len() >= 4 { bytes[..4].copy_from_slice(MAGIC); }
            if let Ok(facts) = detect(&bytes, bytes.len() as u64) {
                prop_assert_eq!(facts.virtual_size % 512, 0);
            }
        }
    }
}
