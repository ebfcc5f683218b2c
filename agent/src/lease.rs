//! The host's lease as it stands in memory that the agent shares with the keepers: one word per class.
//!
//! The agent maps the lease file for writing and is its only writer ([`LeaseFile`]); each keeper maps it for reading
//! ([`LeaseView`]). Who may extend the lease, and until when, is the session's business; what happens at the deadline
//! is the keeper's.
//!
//! # Layout of the file (64 bytes)
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | `UNCLEASE` |
//! | 8..24 | the kernel's boot id, 16 bytes |
//! | 24..32 | the word of the class `fast`, little-endian |
//! | 32..40 | the word of the class `patient` |
//! | 40..64 | zero |
//!
//! # Invariants
//!
//! * **L1** A deadline never moves back.
//! * **L2** A lease that lapsed never comes back to life: what is valid after a lapse has another generation. A start is
//!   bound to the generation under which it was decided, so a start that was held up over a lapse cannot happen.
//! * **L3** Generation and deadline are one atomic word, so nobody reads the one of before and the other of after.
//! * **L4** The file is never replaced while a keeper can have it mapped: it keeps its inode for ever.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::Ordering,
    time::Duration,
};

use uncloud_proto::clock::Tick;
use uuid::Uuid;

use crate::keeper::sys::{Access, SharedWords};

/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

const MAGIC: [u8; 8] = *b"UNCLEASE";
const SIZE: u64 = 64;
/// Bits of a word that hold the deadline: 48 bits of milliseconds are 8,900 years.
const DEADLINE_BITS: u32 = 48;
const DEADLINE_MAX: u64 = (1 << DEADLINE_BITS) - 1;

// Indexes of the file's eight words.
const WORD_MAGIC: usize = 0;
const WORD_BOOT: [usize; 2] = [1, 2];
const WORD_FAST: usize = 3;
const WORD_PATIENT: usize = 4;

/// How a VM is bound to its host's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseClass {
    /// The short lease: fails over fast.
    Fast,
    /// The long lease: outlives a longer loss of the network.
    Patient,
    /// No lease: the VM is pinned to its host and never moved.
    Hold,
}

impl fmt::Display for LeaseClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fast => "fast",
            Self::Patient => "patient",
            Self::Hold => "hold",
        })
    }
}

impl FromStr for LeaseClass {
    type Err = UnknownLeaseClass;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "fast" => Ok(Self::Fast),
            "patient" => Ok(Self::Patient),
            "hold" => Ok(Self::Hold),
            _ => Err(UnknownLeaseClass),
        }
    }
}

/// A string that names no lease class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected fast, patient or hold")]
pub struct UnknownLeaseClass;

/// One class's lease at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseWord {
    /// Grows by one (wrapping) each time a lapsed lease is granted anew.
    pub generation: u16,
    /// Until when the lease holds, on the boot-time clock. The lease is over *at* the deadline.
    pub deadline: Tick,
}

impl LeaseWord {
    /// What [`LeaseClass::Hold`] has instead of a lease.
    pub const FOREVER: Self = Self { generation: 0, deadline: Tick::from_boot(Duration::from_millis(DEADLINE_MAX)) };

    /// Whether the lease holds at `now`.
    #[must_use]
    pub fn valid_at(self, now: Tick) -> bool {
        now < self.deadline
    }

    /// Whether what was started under `generation` may (still) execute at `now`.
    #[must_use]
    pub fn permits(self, generation: u16, now: Tick) -> bool {
        self.generation == generation && self.valid_at(now)
    }

    /// The word after a renewal until `deadline`, that was received at `now` (L1, L2).
    ///
    /// A renewal that is over already, or that ends before what is held, changes nothing.
    #[must_use]
    pub fn renewed(self, deadline: Tick, now: Tick) -> Self {
        let deadline = Self::unpack(Self { generation: 0, deadline }.pack()).deadline;
        if deadline <= self.deadline || deadline <= now {
            self
        } else if self.valid_at(now) {
            Self { generation: self.generation, deadline }
        } else {
            Self { generation: self.generation.wrapping_add(1), deadline }
        }
    }

    /// After a reboot nothing that ran before can run, and nothing that was decided before may start.
    #[must_use]
    pub fn after_reboot(self) -> Self {
        Self { generation: self.generation.wrapping_add(1), deadline: Tick::ZERO }
    }

    /// As one word. The deadline is rounded down: a lease may end early, never late.
    fn pack(self) -> u64 {
        let ms = u64::try_from(self.deadline.since_boot().as_millis()).unwrap_or(u64::MAX).min(DEADLINE_MAX);
        u64::from(self.generation) << DEADLINE_BITS | ms
    }

    fn unpack(word: u64) -> Self {
        Self {
            generation: (word >> DEADLINE_BITS) as u16,
            deadline: Tick::from_boot(Duration::from_millis(word & DEADLINE_MAX)),
        }
    }
}

fn read_word(words: &SharedWords, class: LeaseClass) -> LeaseWord {
    match index(class) {
        Some(i) => LeaseWord::unpack(u64::from_le(words.at(i).load(Ordering::Acquire))),
        None => LeaseWord::FOREVER,
    }
}

const fn index(class: LeaseClass) -> Option<usize> {
    match class {
        LeaseClass::Fast => Some(WORD_FAST),
        LeaseClass::Patient => Some(WORD_PATIENT),
        LeaseClass::Hold => None,
    }
}

/// The lease file as the agent has it. One agent per state directory writes it.
#[derive(Debug)]
pub struct LeaseFile {
    path: PathBuf,
    words: SharedWords,
}

impl LeaseFile {
    /// Opens the lease file, or makes it. If it is from another boot, both leases are made to be over.
    ///
    /// A file that is no lease file is replaced, with a warning: no keeper maps such a file, so L4 holds.
    ///
    /// # Errors
    ///
    /// The file cannot be made, opened or mapped.
    pub fn open(path: &Path, boot_id: Uuid) -> io::Result<Self> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) if is_lease_file(&file)? => file,
            Ok(_) => {
                tracing::warn!(path = %path.display(), "not a lease file; making a new one");
                create(path, boot_id)?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => create(path, boot_id)?,
            Err(e) => return Err(e),
        };
        let lease = Self { path: path.to_owned(), words: SharedWords::map(&file, Access::Write)? };
        if boot_id_in(&lease.words) != boot_id {
            // The words first: if this is cut short, the next open does it again.
            for i in [WORD_FAST, WORD_PATIENT] {
                let old = LeaseWord::unpack(u64::from_le(lease.words.at(i).load(Ordering::Acquire)));
                lease.words.at(i).store(old.after_reboot().pack().to_le(), Ordering::Release);
            }
            for (i, half) in WORD_BOOT.into_iter().zip(halves(boot_id)) {
                lease.words.at(i).store(half, Ordering::Release);
            }
        }
        Ok(lease)
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The lease of `class` as it stands. [`LeaseClass::Hold`] has [`LeaseWord::FOREVER`].
    #[must_use]
    pub fn word(&self, class: LeaseClass) -> LeaseWord {
        read_word(&self.words, class)
    }

    /// Extends the lease of `class` until `deadline` by the rule of [`LeaseWord::renewed`], and gives what it is now.
    ///
    /// `deadline` is what the leader granted. If this process is held up between reading `now` and the write, a
    /// lapse in between can go unnoticed; that is harmless, because the leader counts this host as alive until the
    /// deadline that is written, and the keepers whose timers have fired are gone.
    pub fn renew(&self, class: LeaseClass, deadline: Tick, now: Tick) -> LeaseWord {
        let Some(i) = index(class) else { return LeaseWord::FOREVER };
        let word = self.words.at(i);
        let mut old = word.load(Ordering::Acquire);
        loop {
            let new = LeaseWord::unpack(u64::from_le(old)).renewed(deadline, now);
            match word.compare_exchange(old, new.pack().to_le(), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return new,
                Err(found) => old = found,
            }
        }
    }
}

/// The lease file as a keeper has it: for reading.
#[derive(Debug)]
pub struct LeaseView {
    words: SharedWords,
}

impl LeaseView {
    /// Maps a lease file.
    ///
    /// # Errors
    ///
    /// It cannot be opened or mapped, or is no lease file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !is_lease_file(&file)? {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a lease file"));
        }
        Ok(Self { words: SharedWords::map(&file, Access::Read)? })
    }

    /// The lease of `class` as it stands.
    #[must_use]
    pub fn word(&self, class: LeaseClass) -> LeaseWord {
        read_word(&self.words, class)
    }

    /// Of which boot the leases are.
    #[must_use]
    pub fn boot_id(&self) -> Uuid {
        boot_id_in(&self.words)
    }
}

/// The kernel's id of this boot.
///
/// # Errors
///
/// `/proc` is not mounted, or has something else there.
pub fn boot_id() -> io::Result<Uuid> {
    let text = fs::read_to_string(BOOT_ID)?;
    Uuid::try_parse(text.trim())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("no UUID in {BOOT_ID}")))
}

fn is_lease_file(file: &File) -> io::Result<bool> {
    let about = file.metadata()?;
    if !about.is_file() || about.len() != SIZE {
        return Ok(false);
    }
    let mut magic = [0; MAGIC.len()];
    file.read_exact_at(&mut magic, 0)?;
    Ok(magic == MAGIC)
}

/// Makes a lease file with both leases over. It appears whole or not at all.
fn create(path: &Path, boot_id: Uuid) -> io::Result<File> {
    let mut content = [0; SIZE as usize];
    content[..8].copy_from_slice(&MAGIC);
    content[8..24].copy_from_slice(boot_id.as_bytes());
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&name)?;
    file.write_all(&content)?;
    file.sync_all()?;
    fs::rename(&name, path)?;
    Ok(file)
}

/// The two words, as they lie in memory, that hold a boot id.
fn halves(boot_id: Uuid) -> [u64; 2] {
    let bytes = boot_id.as_bytes();
    [0, 8].map(|at| {
        let mut half = [0; 8];
        half.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(half)
    })
}

fn boot_id_in(words: &SharedWords) -> Uuid {
    let mut bytes = [0; 16];
    for (i, at) in WORD_BOOT.into_iter().zip([0, 8]) {
        bytes[at..at + 8].copy_from_slice(&words.at(i).load(Ordering::Acquire).to_ne_bytes());
    }
    debug_assert_eq!(words.at(WORD_MAGIC).load(Ordering::Acquire).to_ne_bytes(), MAGIC);
    Uuid::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Tick {
        Tick::from_boot(Duration::from_millis(ms))
    }

    fn word(generation: u16, deadline: u64) -> LeaseWord {
        LeaseWord { generation, deadline: ms(deadline) }
    }

    #[test]
    fn a_lease_is_over_at_its_deadline() {
        assert!(word(0, 10).valid_at(ms(9)));
        assert!(!word(0, 10).valid_at(ms(10)));
        assert!(word(3, 10).permits(3, ms(9)));
        assert!(!word(4, 10).permits(3, ms(9)));
        assert!(!word(3, 10).permits(3, ms(10)));
    }

    #[test]
    fn a_renewal_in_time_keeps_the_generation_and_a_late_one_does_not() {
        assert_eq!(word(7, 100).renewed(ms(200), ms(99)), word(7, 200));
        assert_eq!(word(7, 100).renewed(ms(200), ms(100)), word(8, 200));
        assert_eq!(word(u16::MAX, 100).renewed(ms(200), ms(100)), word(0, 200));
    }

    #[test]
    fn a_renewal_that_is_over_or_shorter_changes_nothing() {
        assert_eq!(word(7, 100).renewed(ms(90), ms(50)), word(7, 100));
        assert_eq!(word(7, 100).renewed(ms(150), ms(150)), word(7, 100));
    }

    #[test]
    fn deadlines_are_rounded_down() {
        let late = Tick::from_boot(Duration::from_micros(200_999));
        assert_eq!(word(0, 100).renewed(late, ms(50)), word(0, 200));
        assert_eq!(LeaseWord::unpack(LeaseWord { generation: 1, deadline: late }.pack()), word(1, 200));
    }

    #[test]
    fn classes_have_one_spelling() {
        for class in [LeaseClass::Fast, LeaseClass::Patient, LeaseClass::Hold] {
            assert_eq!(class.to_string().parse(), Ok(class));
        }
        assert_eq!("Fast".parse::<LeaseClass>(), Err(UnknownLeaseClass));
    }

    proptest! {
        /// L3: nothing is lost or mixed up in a word.
        #[test]
        fn packing_keeps_both(generation: u16, deadline in 0..=DEADLINE_MAX) {
            prop_assert_eq!(LeaseWord::unpack(word(generation, deadline).pack()), word(generation, deadline));
        }

        /// L1 and L2 over every history of renewals, in time, late, reordered or absurd.
        #[test]
        fn the_deadline_never_moves_back_and_the_generation_grows_exactly_on_lapse(
            steps in prop::collection::vec((0u64..3000, 0u64..8000), 1..50),
        ) {
            let (mut now, mut lease) = (1000u64, word(u16::MAX - 2, 0));
            for (passed, granted) in steps {
                now += passed;
                let held = lease.valid_at(ms(now));
                // Grants lie up to two seconds in the past and six in the future.
                let new = lease.renewed(ms((now + granted).saturating_sub(2000)), ms(now));
                prop_assert!(new.deadline >= lease.deadline);
                let revived = !held && new.valid_at(ms(now));
                let grown = u16::from(revived);
                prop_assert_eq!(new.generation, lease.generation.wrapping_add(grown));
                if !held && !revived {
                    prop_assert_eq!(new, lease);
                }
                lease = new;
            }
        }
    }

    #[test]
    fn keepers_see_what_the_agent_writes_and_the_file_keeps_its_inode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        let boot = Uuid::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        let lease = LeaseFile::open(&path, boot).unwrap();
        assert!(!lease.word(LeaseClass::Fast).valid_at(ms(0)));
        let view = LeaseView::open(&path).unwrap();
        assert_eq!(view.boot_id(), boot);

        let first = lease.renew(LeaseClass::Fast, ms(6000), ms(10));
        assert_eq!(first, word(1, 6000));
        assert_eq!(view.word(LeaseClass::Fast), first);
        assert_eq!(view.word(LeaseClass::Patient), word(0, 0));
        assert_eq!(lease.renew(LeaseClass::Patient, ms(60_000), ms(10)), word(1, 60_000));
        assert_eq!(lease.renew(LeaseClass::Hold, ms(1), ms(10)), LeaseWord::FOREVER);

        // The agent starts again: nothing changes.
        let inode = fs::metadata(&path).unwrap().ino();
        let again = LeaseFile::open(&path, boot).unwrap();
        assert_eq!(again.word(LeaseClass::Fast), first);
        again.renew(LeaseClass::Fast, ms(7000), ms(20));
        assert_eq!(view.word(LeaseClass::Fast), word(1, 7000));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);

        // The layout is a format that keepers of older versions read.
        let bytes = fs::read(&path).unwrap();
        assert_eq!(&bytes[..8], b"UNCLEASE");
        assert_eq!(&bytes[8..24], boot.as_bytes());
        assert_eq!(&bytes[24..32], &(1u64 << 48 | 7000).to_le_bytes());
        assert_eq!(&bytes[32..40], &(1u64 << 48 | 60_000).to_le_bytes());
        assert_eq!(&bytes[40..], [0; 24]);
    }

    #[test]
    fn after_a_reboot_both_leases_are_over_and_have_a_new_generation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        let lease = LeaseFile::open(&path, Uuid::from_u128(1)).unwrap();
        lease.renew(LeaseClass::Fast, ms(6000), ms(10));
        let inode = fs::metadata(&path).unwrap().ino();
        let lease = LeaseFile::open(&path, Uuid::from_u128(2)).unwrap();
        assert_eq!(lease.word(LeaseClass::Fast), word(2, 0));
        assert_eq!(lease.word(LeaseClass::Patient), word(1, 0));
        assert_eq!(LeaseView::open(&path).unwrap().boot_id(), Uuid::from_u128(2));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    }

    #[test]
    fn what_is_no_lease_file_is_refused_by_keepers_and_replaced_by_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        for garbage in [&b""[..], b"UNCLEASE", &[b'x'; 64], &[0; 4096]] {
            fs::write(&path, garbage).unwrap();
            assert!(LeaseView::open(&path).is_err());
            let lease = LeaseFile::open(&path, Uuid::from_u128(1)).unwrap();
            assert!(!lease.word(LeaseClass::Fast).valid_at(ms(0)));
            assert_eq!(fs::read(&path).unwrap().len(), 64);
        }
    }

    #[test]
    fn this_kernel_has_a_boot_id() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
