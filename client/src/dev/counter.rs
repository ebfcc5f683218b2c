//! Reads what the demonstration's guest says (integration-tests/guests/linux/init.c). Pure.
//!
//! `READY <n> boot <id>` when it has started, with the number that it found on its disk; `COUNT <n> boot <id>` when it
//! has written the next number; `SPLITBRAIN …` when its disk says something that it did not write.

use std::time::Duration;

/// The longest line that is kept. A guest that never ends its line must not fill the memory.
const LONGEST_LINE: usize = 4096;

/// What a guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// It has started, and found this number on its disk.
    Ready,
    /// It has written this number to its disk.
    Count,
}

/// One number that a guest said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Count {
    /// In which line.
    pub(super) said: Said,
    /// The number.
    pub(super) number: u64,
    /// An id that the guest makes when it boots.
    pub(super) boot: String,
}

/// Reads one line.
pub(super) fn parse(line: &str) -> Option<Count> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|w| matches!(*w, "COUNT" | "READY"))?;
    let said = if words[at] == "COUNT" { Said::Count } else { Said::Ready };
    match words.get(at + 1..)? {
        [number, "boot", boot, ..] => Some(Count { said, number: number.parse().ok()?, boot: (*boot).to_owned() }),
        _ => None,
    }
}

/// Puts pieces of a stream together into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that are complete with this piece, without their ends.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in piece {
            if byte == b'\n' || self.rest.len() >= LONGEST_LINE {
                lines.push(String::from_utf8_lossy(&self.rest).trim_end_matches('\r').to_owned());
                self.rest.clear();
            }
            if byte != b'\n' {
                self.rest.push(byte);
            }
        }
        lines
    }
}

/// What one guest said, and when (from any one moment).
#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) lines: Vec<String>,
    counts: Vec<(Duration, Count)>,
    /// The first line in which the guest said that somebody else wrote to its disk.
    pub(super) split_brain: Option<String>,
}

impl Book {
    /// Writes down a line.
    pub(super) fn note(&mut self, at: Duration, line: String) {
        if let Some(count) = parse(&line) {
            self.counts.push((at, count));
        } else if line.contains("SPLITBRAIN") {
            self.split_brain.get_or_insert_with(|| line.clone());
        }
        self.lines.push(line);
    }

    /// The newest number that it wrote.
    pub(super) fn last(&self) -> Option<&Count> {
        self.counts.iter().rev().map(|(_, c)| c).find(|c| c.said == Said::Count)
    }

    /// The largest number of a boot.
    pub(super) fn largest_of(&self, boot: &str) -> Option<u64> {
        self.counts.iter().filter(|(_, c)| c.boot == boot).map(|(_, c)| c.number).max()
    }

    /// How many numbers it wrote in this boot.
    pub(super) fn beats_of(&self, boot: &str) -> usize {
        self.counts.iter().filter(|(_, c)| c.said == Said::Count && c.boot == boot).count()
    }

    /// When it first said something in a boot after this one.
    pub(super) fn first_word_after(&self, boot: &str) -> Option<Duration> {
        self.after(boot).next().map(|(at, _)| *at)
    }

    /// The first number that it wrote in a boot after this one.
    pub(super) fn first_count_after(&self, boot: &str) -> Option<u64> {
        self.after(boot).find(|(_, c)| c.said == Said::Count).map(|(_, c)| c.number)
    }

    /// What it said in boots after this one. The log is read from its beginning again and again, so lines of an earlier boot may
    /// stand behind those of this one.
    fn after<'a>(&'a self, boot: &'a str) -> impl Iterator<Item = &'a (Duration, Count)> {
        let before: Vec<&str> =
            self.counts.iter().map(|(_, c)| c.boot.as_str()).take_while(|said| *said != boot).collect();
        self.counts.iter().filter(move |(_, c)| c.boot != boot && !before.contains(&c.boot.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_in_whatever_pieces_they_come() {
        let mut lines = Lines::default();
        assert!(lines.feed(b"COUNT 1 bo").is_empty());
        assert_eq!(lines.feed(b"ot x\r\nCOUNT 2 boot x\n\nrest"), ["COUNT 1 boot x", "COUNT 2 boot x", ""]);
        let long = lines.feed(&vec![b'a'; 3 * LONGEST_LINE]);
        assert!(long.len() == 3 && long.iter().all(|l| l.len() <= LONGEST_LINE));
    }

    #[test]
    fn only_whole_counts_are_read() {
        let line = |said, number, boot: &str| Some(Count { said, number, boot: boot.to_owned() });
        assert_eq!(parse("COUNT 17 boot 3f2a"), line(Said::Count, 17, "3f2a"));
        assert_eq!(parse("READY 0 boot 3f2a"), line(Said::Ready, 0, "3f2a"));
        assert_eq!(parse("[ 1.0] COUNT 17 boot 3f2a x"), line(Said::Count, 17, "3f2a"));
        for bad in ["", "COUNT", "COUNT 17", "COUNT x boot y", "COUNT 17 boot", "ACCOUNT 1 boot 2"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_book_tells_boots_apart() {
        let mut book = Book::default();
        let said =
            [(1, "COUNT 1 boot a"), (2, "COUNT 2 boot a"), (3, "hello"), (9, "READY 2 boot b"), (10, "COUNT 3 boot b")];
        for (at, line) in said {
            book.note(Duration::from_secs(at), line.to_owned());
        }
        assert_eq!((book.largest_of("a"), book.beats_of("a")), (Some(2), 2));
        assert_eq!(book.first_word_after("a"), Some(Duration::from_secs(9)));
        assert_eq!(book.first_count_after("a"), Some(3));
        assert_eq!(book.last().unwrap().number, 3);
        assert_eq!((book.lines.len(), book.split_brain.as_ref()), (5, None));
        // Read once more from the beginning: nothing of it is new.
        for (at, line) in said {
            book.note(Duration::from_secs(10 + at), line.to_owned());
        }
        assert_eq!((book.first_word_after("b"), book.first_count_after("b")), (None, None));
        book.note(Duration::from_secs(21), "COUNT 4 boot c".to_owned());
        assert_eq!(book.first_count_after("b"), Some(4));
        book.note(Duration::from_secs(22), "SPLITBRAIN 9 boot b".to_owned());
        assert!(book.split_brain.is_some());
    }
}
