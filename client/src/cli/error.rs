//! What went wrong, as the command says it: a line that begins with `error:`, which fields are meant, and what to do.

use std::{fmt::Write as _, io};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    exit::Exit,
    output::{clean, clean_lines, note},
    units,
};

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server's answer, or that there was none.
    #[error("{}", .0.message())]
    Status(#[from] Status),
    /// The same, with what to do about it.
    #[error("{}", .status.message())]
    StatusWithHint {
        /// The server's answer.
        status: Status,
        /// What to do.
        hint: String,
    },
    /// Nobody takes the output.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
    /// The arguments make no sense together.
    #[error("{0}")]
    Usage(String),
    /// Something else, in words.
    #[error("{0}")]
    Failed(String),
    /// A wait took too long.
    #[error("{0}")]
    TimedOut(String),
}

impl Error {
    /// Says it on stderr, and gives the exit code.
    pub(crate) fn report(&self) -> Exit {
        let (text, exit) = self.describe();
        if !text.is_empty() {
            note(&text);
        }
        exit
    }

    fn describe(&self) -> (String, Exit) {
        match self {
            Self::Status(status) => (describe_status(status, None), Exit::of(status.code())),
            Self::StatusWithHint { status, hint } => (describe_status(status, Some(hint)), Exit::of(status.code())),
            // The reader has what it wanted.
            Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => (String::new(), Exit::Done),
            Self::Output(e) => (format!("error: cannot write the output: {e}"), Exit::Failed),
            Self::Usage(message) => (format!("error: {}", clean_lines(message)), Exit::Usage),
            Self::Failed(message) => (format!("error: {}", clean_lines(message)), Exit::Failed),
            Self::TimedOut(message) => (format!("error: {}", clean_lines(message)), Exit::Unavailable),
        }
    }
}

fn describe_status(status: &Status, hint: Option<&str>) -> String {
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    let mut text = format!("error: {}", clean(message));
    let details = status.get_error_details();
    // A violation that the message says already is not said twice.
    let mut violation = |field: &str, description: &str| {
        if !message.contains(description) || !message.contains(field) {
            let _ = write!(text, "\n  {}: {}", clean(field), clean(description));
        }
    };
    for v in details.bad_request().map(|d| d.field_violations.as_slice()).unwrap_or_default() {
        violation(&v.field, &v.description);
    }
    for v in details.precondition_failure().map(|d| d.violations.as_slice()).unwrap_or_default() {
        violation(&v.subject, &v.description);
    }
    for v in details.quota_failure().map(|d| d.violations.as_slice()).unwrap_or_default() {
        violation(&v.subject, &v.description);
    }
    for link in details.help().map(|d| d.links.as_slice()).unwrap_or_default() {
        let _ = write!(text, "\n  {}: {}", clean(&link.description), clean(&link.url));
    }
    let retry =
        details.retry_info().and_then(|r| r.retry_delay).map(|d| format!("try again in {}", units::duration(d)));
    if let Some(hint) = hint.map(ToOwned::to_owned).or(retry).or_else(|| usual_hint(status.code())) {
        let _ = write!(text, "\nhint: {}", clean(&hint));
    }
    text
}

fn usual_hint(code: Code) -> Option<String> {
    let hint = match code {
        Code::Unavailable => {
            "is a controller running and leading? --endpoint or UNCLOUD_ENDPOINTS say where to look; `uncloud dev` starts a cluster on this machine"
        }
        Code::DeadlineExceeded => "look whether it was carried out before trying again; --timeout allows more time",
        Code::Unimplemented => "the controller is older than this command; upgrade it",
        _ => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn fields_and_hints_are_named_and_nothing_is_said_twice() {
        let details = ErrorDetails::with_bad_request_violation("spec.memory_mib", "is required");
        let status = Status::with_error_details(Code::InvalidArgument, "the request is not valid", details);
        let (text, exit) = Error::Status(status).describe();
        assert_eq!(text, "error: the request is not valid\n  spec.memory_mib: is required");
        assert_eq!(exit, Exit::Refused);

        let details = ErrorDetails::with_bad_request_violation("name", "is required");
        let status = Status::with_error_details(Code::InvalidArgument, "name is required", details);
        assert_eq!(Error::Status(status).describe().0, "error: name is required");

        let retry = ErrorDetails::with_retry_info(Some(std::time::Duration::from_secs(2)));
        let status = Status::with_error_details(Code::Unavailable, "no leader", retry);
        let (text, exit) = Error::Status(status).describe();
        assert_eq!((text.as_str(), exit), ("error: no leader\nhint: try again in 2s", Exit::Unavailable));
    }

    #[test]
    fn a_message_cannot_move_the_cursor() {
        let (text, _) = Error::Status(Status::not_found("no VM \x1b[31mx\n")).describe();
        assert_eq!(text, r"error: no VM \u{1b}[31mx\n");
    }

    #[test]
    fn a_reader_that_has_gone_is_not_an_error() {
        let gone = Error::Output(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(gone.describe(), (String::new(), Exit::Done));
        let full = Error::Output(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.describe().1, Exit::Failed);
    }
}
