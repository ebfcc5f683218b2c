//! The way out of a console: Ctrl-] and then `.` or `q`. Pure.
//!
//! ```text
//!  Plain ──Ctrl-]──▶ Escaped ──`.` or `q`──▶ detach
//!    ▲                  │
//!    └── Ctrl-] (sends one Ctrl-]), anything else (sends both) ──┘
//! ```

/// Ctrl-], as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Where the typing stands.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    pending: bool,
}

/// What becomes of what was typed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Typed {
    /// Goes to the guest.
    pub(crate) send: Vec<u8>,
    /// The user wants to leave, once that is sent.
    pub(crate) detach: bool,
}

impl Escape {
    pub(crate) fn feed(&mut self, input: &[u8]) -> Typed {
        let mut send = Vec::with_capacity(input.len() + 1);
        for &byte in input {
            match (self.pending, byte) {
                (false, ESCAPE) => self.pending = true,
                (false, byte) => send.push(byte),
                (true, b'.' | b'q') => return Typed { send, detach: true },
                (true, ESCAPE) => {
                    self.pending = false;
                    send.push(ESCAPE);
                }
                (true, byte) => {
                    self.pending = false;
                    send.extend([ESCAPE, byte]);
                }
            }
        }
        Typed { send, detach: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_out_also_when_the_keys_come_one_by_one() {
        for end in [b'.', b'q'] {
            let mut escape = Escape::default();
            assert_eq!(escape.feed(b"ls\r\x1d"), Typed { send: b"ls\r".to_vec(), detach: false });
            assert_eq!(escape.feed(&[end, b'x']), Typed { send: vec![], detach: true });
        }
    }

    #[test]
    fn every_other_key_still_reaches_the_guest() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"a\x1d\x1db\x1dc.q"), Typed { send: b"a\x1db\x1dc.q".to_vec(), detach: false });
        let all: Vec<u8> = (0..=255).filter(|b| *b != ESCAPE).collect();
        assert_eq!(escape.feed(&all).send, all);
    }
}
