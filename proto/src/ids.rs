//! Identifiers and counters that must not be mixed up.

use std::{cmp::Ordering, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Declares an identifier whose text form, on the wire and in etcd, is a plain UUID.
macro_rules! typed_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        /// That of the bytes, and of the text. Most time in large maps goes into comparing: two numbers are faster than 16 bytes.
        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                self.0.as_u128().cmp(&other.0.as_u128())
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// Wraps an id made by the caller. Ids are minted at the edge, never inside pure code.
            #[must_use]
            pub const fn from_uuid(id: Uuid) -> Self {
                Self(id)
            }

            /// The bare UUID.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = MalformedId;

            /// Takes the hyphenated form only, so that an id has one spelling.
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                match Uuid::try_parse(s) {
                    Ok(id) if s.len() == 36 && s.bytes().all(|b| !b.is_ascii_uppercase()) => Ok(Self(id)),
                    _ => Err(MalformedId { found: s.chars().take(64).collect() }),
                }
            }
        }
    };
}

typed_id!(
    /// A VM. Survives restarts and moves between hosts.
    VmId
);
typed_id!(
    /// A machine that runs an agent.
    HostId
);
typed_id!(
    /// An image.
    ImageId
);
typed_id!(
    /// A controller process, from its start to its end.
    ControllerId
);

/// A string that should have been a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a UUID in its lower-case hyphenated form, found `{}`", found.escape_debug())]
pub struct MalformedId {
    /// What was there, shortened.
    pub found: String,
}

/// Counts how many times a VM has been given a host (docs/fencing.md). 0: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Incarnation(pub u64);

/// The largest incarnation that a record may have: there are always larger ones, and every JSON parser keeps it exactly.
const MAX_INCARNATION: u64 = (1 << 53) - 1;

impl TryFrom<u64> for Incarnation {
    type Error = String;

    fn try_from(value: u64) -> Result<Self, String> {
        if value > MAX_INCARNATION {
            return Err(format!("{value} is not an incarnation: it is larger than {MAX_INCARNATION}"));
        }
        Ok(Self(value))
    }
}

impl From<Incarnation> for u64 {
    fn from(incarnation: Incarnation) -> Self {
        incarnation.0
    }
}

impl Incarnation {
    /// No host yet.
    pub const NONE: Self = Self(0);

    /// Whether it is [`Incarnation::NONE`].
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.0 == 0
    }

    /// The next one.
    #[must_use = "an incarnation only fences once it has been stored"]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A leader's term: the etcd revision at which its leader key was created. Grows with each leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub i64);

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A revision of etcd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub i64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys in etcd are sorted like the maps that they are read into.
    #[test]
    fn the_order_of_ids_is_that_of_their_text() {
        let bytes = [[0; 16], [1; 16], [0x7f; 16], [0x80; 16], [0xff; 16]];
        let mixed = (0..16).map(|n| std::array::from_fn(|i| if i < n { 0x80 } else { 0xff }));
        let ids: Vec<VmId> = bytes.into_iter().chain(mixed).map(|b| VmId::from_uuid(Uuid::from_bytes(b))).collect();
        for (a, b) in ids.iter().flat_map(|a| ids.iter().map(move |b| (a, b))) {
            assert_eq!(a.cmp(b), a.to_string().cmp(&b.to_string()), "{a} {b}");
        }
    }

    /// Whatever is in a record, there is a next one.
    #[test]
    fn an_incarnation_that_leaves_no_room_for_more_is_not_read() {
        let largest: Incarnation = serde_json::from_str("9007199254740991").unwrap();
        assert_eq!(
            (largest.next().0, serde_json::to_string(&largest).unwrap().as_str()),
            (1 << 53, "9007199254740991")
        );
        assert!(serde_json::from_str::<Incarnation>("18446744073709551615").is_err());
    }

    #[test]
    fn an_id_has_one_spelling() {
        let id = VmId::from_uuid(Uuid::from_u128(0xabc));
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(serde_json_like(&id), id.to_string());
        for bad in ["", "x", "{00000000-0000-0000-0000-000000000abc}", "00000000000000000000000000000abc"] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
        assert!(id.to_string().to_uppercase().parse::<VmId>().is_err());
    }

    fn serde_json_like(id: &VmId) -> String {
        id.uuid().hyphenated().to_string()
    }
}
