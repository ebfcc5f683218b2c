//! What the test guests say (guests/micro/micro.S, guests/linux/init.c), and what it proves.

/// A counter that a guest said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// What kind of line it was.
    pub kind: Kind,
    /// The counter.
    pub n: u64,
    /// Which start of the guest's machine said it.
    pub boot: String,
}

/// What kind of line it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest has started; the counter is what it found on its disk.
    Started,
    /// One beat; the counter is on the disk.
    Beat,
}

/// A counter in a line of a guest's console, if there is one.
#[must_use]
pub fn parse(line: &str) -> Option<Said> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (kind, n, boot) = match words[..] {
        ["MICRO", n, boot] => (Kind::Started, u64::from_str_radix(n, 16).ok()?, boot),
        ["HB", n, boot] => (Kind::Beat, u64::from_str_radix(n, 16).ok()?, boot),
        ["READY", n, "boot", boot] => (Kind::Started, n.parse().ok()?, boot),
        ["COUNT", n, "boot", boot] => (Kind::Beat, n.parse().ok()?, boot),
        _ => return None,
    };
    // A guest that was killed in the middle of a line leaves half of it.
    let whole = matches!(boot.len(), 8 | 36);
    whole.then(|| Said { kind, n, boot: boot.to_owned() })
}

/// A line that must never appear.
#[must_use]
pub fn is_alarm(line: &str) -> bool {
    ["SPLITBRAIN", "DISKERROR", "MEMORYLOST"].iter().any(|alarm| line.contains(alarm))
}

/// Follows the counters of one VM through all its starts and hosts.
#[derive(Debug, Default)]
pub struct Continuity {
    last: Option<Said>,
}

impl Continuity {
    /// Takes the next counter. Within one start it grows by one; a start goes on from what was said last, or from one more
    /// (written to the disk and not yet said when the guest was killed).
    ///
    /// # Errors
    ///
    /// What is wrong: a write is lost, or somebody else wrote.
    pub fn next(&mut self, said: Said) -> Result<(), String> {
        let fits = match &self.last {
            None => true,
            Some(last) => match said.kind {
                Kind::Started => said.boot != last.boot && (said.n == last.n || said.n == last.n + 1),
                Kind::Beat => said.boot == last.boot && said.n == last.n + 1,
            },
        };
        let problem = (!fits).then(|| format!("the counter does not go on: {said:?} after {:?}", self.last));
        self.last = Some(said);
        problem.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &[&str]) -> Result<(), String> {
        let mut continuity = Continuity::default();
        lines.iter().filter_map(|l| parse(l)).try_for_each(|s| continuity.next(s))
    }

    #[test]
    fn counters_go_on_over_starts() {
        check(&["MICRO 00000000 aaaaaaaa", "HB 00000001 aaaaaaaa", "MICRO 00000001 bbbbbbbb", "HB 00000002 bbbbbbbb"])
            .unwrap();
        check(&["MICRO 00000009 aaaaaaaa", "HB 0000000a aaaaaaaa", "HB 0000", "MICRO 0000000b bbbbbbbb"]).unwrap();
    }

    #[test]
    fn lost_and_foreign_writes_are_noticed() {
        let first = "MICRO 00000007 aaaaaaaa";
        for second in
            ["MICRO 00000006 bbbbbbbb", "MICRO 00000009 bbbbbbbb", "HB 00000009 aaaaaaaa", "HB 00000008 bbbbbbbb"]
        {
            assert!(check(&[first, second]).is_err(), "{second}");
        }
        assert!(is_alarm("SPLITBRAIN 00000003 aaaaaaaa"));
    }
}
