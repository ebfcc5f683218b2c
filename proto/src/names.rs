//! What a name may look like: VMs, owners, hosts, images, pools, disks, labels.
//!
//! Names end up in etcd keys, file names and tables, so the rule is narrow: a letter or digit, then
//! letters, digits, `-`, `_` and `.`. A name must not look like a UUID, because wherever a name will do, a UUID does, too.
//!
//! Names of network interfaces are the operating system's: the same characters, but shorter.

/// The longest name, in bytes.
pub const MAX_NAME: usize = 63;
/// The longest name of a network interface on Linux, in bytes.
pub const MAX_INTERFACE: usize = 15;

/// Why a string is not a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// It is empty.
    #[error("is required")]
    Empty,
    /// It is longer than [`MAX_NAME`].
    #[error("is longer than {MAX_NAME} characters")]
    TooLong,
    /// It is longer than [`MAX_INTERFACE`], as the name of a network interface.
    #[error("is longer than {MAX_INTERFACE} characters, as no network interface's name is")]
    TooLongForInterface,
    /// It has a character that is not allowed.
    #[error("may have only letters, digits, `-`, `_` and `.`, and begins with a letter or digit")]
    Characters,
    /// It would be taken for a UUID.
    #[error("looks like a UUID; choose another")]
    LooksLikeUuid,
}

/// Checks a name.
///
/// # Errors
///
/// Says what is wrong, to be put behind the field's name: `name is longer than 63 characters`.
pub fn check(name: &str) -> Result<(), BadName> {
    if name.is_empty() {
        return Err(BadName::Empty);
    }
    if name.len() > MAX_NAME {
        return Err(BadName::TooLong);
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !name.bytes().all(allowed) || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(BadName::Characters);
    }
    if uuid::Uuid::try_parse(name).is_ok() {
        return Err(BadName::LooksLikeUuid);
    }
    Ok(())
}

/// Checks the name of a network interface of a host, such as a bridge.
///
/// # Errors
///
/// Says what is wrong, as [`check`] does.
pub fn check_interface(name: &str) -> Result<(), BadName> {
    check(name)?;
    if name.len() > MAX_INTERFACE { Err(BadName::TooLongForInterface) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_climb_or_hide() {
        for good in ["a", "web-1", "Debian_12.img", "0"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        assert_eq!(check(""), Err(BadName::Empty));
        assert_eq!(check(&"x".repeat(64)), Err(BadName::TooLong));
        for bad in ["../x", "a/b", ".hidden", "-flag", "a b", "a\n", "ü", "a\0"] {
            assert_eq!(check(bad), Err(BadName::Characters), "{bad:?}");
        }
        assert_eq!(check("00000000-0000-0000-0000-000000000abc"), Err(BadName::LooksLikeUuid));
        assert_eq!(check("00000000000000000000000000000abc"), Err(BadName::LooksLikeUuid));
        assert_eq!(check_interface("br-0.12"), Ok(()));
        assert_eq!(check_interface(&"x".repeat(15)), Ok(()));
        assert_eq!(check_interface(&"x".repeat(16)), Err(BadName::TooLongForInterface));
        assert_eq!(check_interface("br0,fd=3"), Err(BadName::Characters));
    }
}
