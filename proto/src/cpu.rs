//! CPU models that a VM may have, and the features that each needs of a host.
//!
//! The levels are those of the x86-64 psABI (<https://gitlab.com/x86-psABIs/x86-64-ABI>), which distributions build for: what is
//! compiled for a level runs on every host that has it, and a guest that was started with it goes on there after a migration.
//! Level 2 has AES and PCLMULQDQ, too, which every CPU with level 2 since 2011 has. No CPU has AES alone: Linux asks only for that,
//! uses both, and its kernel then says that it is broken.

/// A level of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// x86-64-v2 with AES. Every host must have it.
    V2,
    /// x86-64-v3: AVX2 and what came with it.
    V3,
    /// x86-64-v4: AVX-512.
    V4,
}

/// Beyond the oldest 64-bit CPUs, in QEMU's words.
const V2: [&str; 9] = ["pni", "cx16", "lahf-lm", "ssse3", "sse4.1", "sse4.2", "popcnt", "aes", "pclmulqdq"];
/// Beyond level 2.
const V3: [&str; 9] = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];
/// Beyond level 3.
const V4: [&str; 5] = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

impl Level {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The features that it has, by QEMU's names for them.
    pub fn features(self) -> impl Iterator<Item = &'static str> {
        let v3 = V3.iter().filter(move |_| self >= Self::V3);
        let v4 = V4.iter().filter(move |_| self >= Self::V4);
        V2.iter().chain(v3).chain(v4).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_has_those_below_it() {
        let count = |level: Level| level.features().count();
        assert_eq!((count(Level::V2), count(Level::V3), count(Level::V4)), (9, 18, 23));
        assert!(Level::V4.features().any(|f| f == "ssse3") && !Level::V3.features().any(|f| f == "avx512f"));
    }
}
