//! Exit codes of the `uncloud` command.
//!
//! | code | meaning | what a script does |
//! |---|---|---|
//! | 0 | done | goes on |
//! | 1 | it failed: the VM, the demo, or something unexpected | looks at the message |
//! | 2 | wrong usage | is corrected |
//! | 3 | not found | creates it, or is content |
//! | 4 | refused: invalid, already there, or not possible in this state | changes the request or the state |
//! | 5 | no answer, or not in time | tries again later |

use tonic::Code;

/// The same table, as `--help` shows it.
pub const HELP: &str = "Exit codes:
  0  done
  1  it failed
  2  wrong usage
  3  not found
  4  refused: invalid, already there, or not possible in this state
  5  no answer, or not in time; try again later";

/// How the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// Not found.
    NotFound = 3,
    /// Refused.
    Refused = 4,
    /// No answer, or not in time.
    Unavailable = 5,
}

impl Exit {
    /// What an answer of the server means.
    #[must_use]
    pub const fn of(code: Code) -> Self {
        match code {
            Code::Ok => Self::Done,
            Code::NotFound => Self::NotFound,
            Code::InvalidArgument
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::ResourceExhausted => Self::Refused,
            Code::Unavailable | Code::DeadlineExceeded => Self::Unavailable,
            Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => Self::Failed,
        }
    }

    /// The number that the shell sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_the_table_says() {
        for (code, exit) in [
            (Code::Ok, 0),
            (Code::Internal, 1),
            (Code::NotFound, 3),
            (Code::InvalidArgument, 4),
            (Code::AlreadyExists, 4),
            (Code::FailedPrecondition, 4),
            (Code::Aborted, 4),
            (Code::Unavailable, 5),
            (Code::DeadlineExceeded, 5),
        ] {
            assert_eq!(Exit::of(code).code(), exit, "{code:?}");
        }
    }

    #[test]
    fn help_names_every_code() {
        for exit in
            [Exit::Done, Exit::Failed, Exit::Usage, Exit::NotFound, Exit::Refused, Exit::Unavailable].map(Exit::code)
        {
            assert!(HELP.contains(&format!("\n  {exit}  ")), "{exit}");
        }
    }
}
