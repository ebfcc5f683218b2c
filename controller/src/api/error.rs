//! From our errors to gRPC status codes, in one place. `docs/status-codes.md` says what each code means to whom.
//!
//! Nothing is logged here: a refusal is the client's to read. Every status carries `google.rpc` details, so that a
//! program finds the field, the resource or the time to wait without parsing text.

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};
use uncloud_proto::{LEADER_METADATA_KEY, READ_METADATA_KEY};

use super::validate::Violations;
use crate::{
    leadership::{Compacted, Lagged, NotLeader, Stale, WriteError},
    report,
    state::command::Refusal,
    store,
};

/// How soon a client may come again when the leader has too much to do.
const RETRY_OVERLOADED: Duration = Duration::from_millis(500);
/// How soon a client may come again when etcd is full: an operator must do something first.
const RETRY_FULL: Duration = Duration::from_secs(30);
/// How soon a client may come again when nobody leads. About as long as an election takes.
const RETRY_NO_LEADER: Duration = Duration::from_secs(1);

impl From<Violations> for Status {
    fn from(violations: Violations) -> Self {
        let message = violations.to_string();
        let listed: Vec<_> = violations.listed.into_iter().map(|v| FieldViolation::new(v.field, v.problem)).collect();
        Self::with_error_details(Code::InvalidArgument, message, ErrorDetails::with_bad_request(listed))
    }
}

/// The code that tells a client what to do next.
const fn code(refusal: &Refusal) -> Code {
    match refusal {
        Refusal::NoVm(_) | Refusal::NoHost(_) | Refusal::NoImage { .. } => Code::NotFound,
        Refusal::VmNameTaken { .. } | Refusal::ImageNameTaken(_) | Refusal::HostNameTaken { .. } => Code::AlreadyExists,
        Refusal::RequestIdReused(_) | Refusal::Invalid { .. } => Code::InvalidArgument,
        Refusal::MacTaken(_) | Refusal::Outdated(_) => Code::Aborted,
        Refusal::DuplicateHost(..) | Refusal::Precondition(_) => Code::FailedPrecondition,
        Refusal::Unreadable(_) => Code::DataLoss,
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = match &refusal {
            Refusal::NoImage { field, .. } if field != "image" => format!("{field}: {refusal}"),
            _ => refusal.to_string(),
        };
        Self::with_error_details(code(&refusal), message.clone(), details(&refusal, &message))
    }
}

fn details(refusal: &Refusal, message: &str) -> ErrorDetails {
    let resource = |kind: &str, name: &str| ErrorDetails::with_resource_info(kind, name, "", message);
    match refusal {
        Refusal::NoVm(name) => resource("uncloud.v1.Vm", name),
        Refusal::NoHost(name) => resource("uncloud.v1.Host", name),
        Refusal::NoImage { field, name } => {
            let mut details = resource("uncloud.v1.Image", name);
            details.add_bad_request_violation(field, format!("names no image: there is no `{name}`"));
            details
        }
        Refusal::VmNameTaken { owner, name } => ErrorDetails::with_resource_info("uncloud.v1.Vm", name, owner, message),
        Refusal::ImageNameTaken(name) => resource("uncloud.v1.Image", name),
        Refusal::HostNameTaken { name, .. } => resource("uncloud.v1.Host", name),
        Refusal::DuplicateHost(host, _) => {
            ErrorDetails::with_precondition_failure_violation("DUPLICATE_HOST", host.to_string(), message)
        }
        Refusal::MacTaken(mac) => {
            let mut details = resource("MAC address", mac);
            details.set_retry_info(Some(Duration::ZERO));
            details
        }
        Refusal::RequestIdReused(_) => ErrorDetails::with_bad_request_violation("request_id", message),
        Refusal::Invalid { field, problem } => ErrorDetails::with_bad_request_violation(field, problem),
        Refusal::Outdated(name) => resource("uncloud.v1.Vm", name),
        Refusal::Precondition(_) => ErrorDetails::with_precondition_failure_violation("STATE", "", message),
        Refusal::Unreadable(key) => resource("etcd key", key),
    }
}

impl From<NotLeader> for Status {
    fn from(NotLeader { hint }: NotLeader) -> Self {
        let message = match &hint {
            Some(leader) => format!("this controller does not lead; ask {leader}"),
            None => "no controller leads at the moment; try again in a second".to_owned(),
        };
        let details = ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER));
        Self::with_error_details_and_metadata(Code::Unavailable, message, details, leader_metadata(hint))
    }
}

/// Says that nothing has been done, and who leads as far as is known.
fn leader_metadata(hint: Option<String>) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    // An address that no header can carry is no hint; the key alone says that the request was not taken.
    let value = hint.and_then(|h| h.parse().ok()).unwrap_or_else(|| tonic::metadata::MetadataValue::from_static(""));
    metadata.insert(LEADER_METADATA_KEY, value);
    metadata
}

impl From<WriteError> for Status {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Refused(refusal) => refusal.into(),
            WriteError::NotLeader => not_taken(None),
            WriteError::Unknown => Self::with_error_details(
                Code::Unavailable,
                "etcd did not say whether the change was stored; look before you repeat it, or repeat a create with the same request_id",
                ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER)),
            ),
            WriteError::StoreFull => Self::with_error_details(
                Code::ResourceExhausted,
                "etcd is full (its quota, --quota-backend-bytes, is reached); nothing was changed; the operator must raise it, or compact and defragment etcd",
                ErrorDetails::with_retry_info(Some(RETRY_FULL)),
            ),
            WriteError::Overloaded => Self::with_error_details(
                Code::ResourceExhausted,
                "too many changes are waiting to be stored; nothing was changed; try again in half a second",
                ErrorDetails::with_retry_info(Some(RETRY_OVERLOADED)),
            ),
        }
    }
}

/// etcd could not be asked; nothing has been changed.
pub(crate) fn store_failed(error: &store::Error) -> Status {
    match error {
        store::Error::Compacted(_) => list_again(),
        store::Error::Unavailable(_) | store::Error::Timeout(_) | store::Error::Protocol(_) => {
            Status::with_error_details(
                Code::Unavailable,
                format!("etcd could not be asked: {}; try again", report(error)),
                ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER)),
            )
        }
    }
}

/// This controller cannot say what is newest. Another may.
pub(crate) fn stale(error: &Stale) -> Status {
    Status::with_error_details(
        Code::Unavailable,
        format!(
            "{}; ask another controller, or accept an older answer (metadata {READ_METADATA_KEY}: stale)",
            report(error)
        ),
        ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER)),
    )
}

/// This controller has not read the state yet.
pub(crate) fn no_copy() -> Status {
    Status::with_error_details(
        Code::Unavailable,
        "this controller has not read the state from etcd yet; ask another one, or try again in a second",
        ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER)),
    )
}

/// The copy that a stream was about is no longer kept.
pub(crate) fn copy_retired() -> Status {
    Status::unavailable(
        "this controller reads its copy of the state anew; resume from the newest revision you saw, here or elsewhere",
    )
}

/// A watch cannot begin where it should.
pub(crate) fn cannot_resume(error: Compacted) -> Status {
    match error {
        Compacted::Gone(_) => list_again(),
        Compacted::Future(_) => {
            Status::out_of_range(format!("{error}; list again, and watch from the list's revision"))
        }
        Compacted::Store(error) => store_failed(&error),
    }
}

fn list_again() -> Status {
    Status::out_of_range("the history since that revision is gone; list again, and watch from the list's revision")
}

/// A watch has missed changes.
pub(crate) fn missed_changes(lagged: Lagged) -> Status {
    match lagged {
        Lagged::TooSlow => Status::unavailable(
            "this watch was not read fast enough and was cut off; resume from the newest revision you saw",
        ),
        Lagged::Ended => copy_retired(),
    }
}

/// This controller stopped leading before it did anything.
pub(crate) fn not_taken(hint: Option<String>) -> Status {
    NotLeader { hint }.into()
}

/// The leader could not be reached, so nothing has been done.
pub(crate) fn leader_not_reached(leader: &str) -> Status {
    let message =
        format!("the leader at {leader} cannot be reached from here; nothing was done; try again in a second");
    let details = ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER));
    Status::with_error_details_and_metadata(Code::Unavailable, message, details, leader_metadata(None))
}

/// The leader was lost while it had a call that was passed on to it.
pub(crate) fn leader_lost(leader: &str) -> Status {
    Status::with_error_details(
        Code::Unavailable,
        format!(
            "the leader at {leader} was lost before it answered; look before you repeat it, or repeat a create with the same request_id"
        ),
        ErrorDetails::with_retry_info(Some(RETRY_NO_LEADER)),
    )
}

/// The term has ended, and with it every stream.
pub(crate) fn term_ended(hint: Option<String>) -> Status {
    let message = "this controller has stopped leading; ask again, and resume a watch from the newest revision you saw";
    Status::with_metadata(Code::Unavailable, message, leader_metadata(hint))
}

/// A request was not answered in time.
pub(crate) fn took_too_long(limit: Duration) -> Status {
    Status::deadline_exceeded(format!(
        "there was no answer within {} s; whether the request was carried out is not known: look before you repeat it, or repeat a create with the same request_id",
        limit.as_secs()
    ))
}

#[cfg(test)]
mod tests {
    use uncloud_proto::ids::HostId;
    use uuid::Uuid;

    use super::*;

    fn all_refusals() -> Vec<(Refusal, Code)> {
        let host = HostId::from_uuid(Uuid::from_u128(1));
        vec![
            (Refusal::NoVm("a".into()), Code::NotFound),
            (Refusal::NoHost("a".into()), Code::NotFound),
            (Refusal::NoImage { field: "spec.kernel.image".into(), name: "a".into() }, Code::NotFound),
            (Refusal::VmNameTaken { owner: "o".into(), name: "a".into() }, Code::AlreadyExists),
            (Refusal::ImageNameTaken("a".into()), Code::AlreadyExists),
            (Refusal::HostNameTaken { name: "a".into(), other: host }, Code::AlreadyExists),
            (Refusal::DuplicateHost(host, Uuid::nil()), Code::FailedPrecondition),
            (Refusal::MacTaken("42:00:00:00:00:01".into()), Code::Aborted),
            (Refusal::RequestIdReused("r".into()), Code::InvalidArgument),
            (Refusal::Invalid { field: "spec.vcpus".into(), problem: "is odd".into() }, Code::InvalidArgument),
            (Refusal::Precondition("stop it first".into()), Code::FailedPrecondition),
            (Refusal::Unreadable("/uncloud/v1/vms/x".into()), Code::DataLoss),
        ]
    }

    #[test]
    fn each_refusal_has_its_code_and_details_that_a_program_can_read() {
        for (refusal, code) in all_refusals() {
            let status = Status::from(refusal.clone());
            assert_eq!(status.code(), code, "{refusal}");
            assert!(!status.get_error_details_vec().is_empty(), "{refusal}");
        }
    }

    #[test]
    fn a_missing_image_names_the_field() {
        let refusal = Refusal::NoImage { field: "spec.disks[1].image".into(), name: "debian".into() };
        let status = Status::from(refusal);
        assert_eq!(status.message(), "spec.disks[1].image: no image `debian`");
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "spec.disks[1].image");
    }

    #[test]
    fn a_bad_request_lists_its_fields() {
        let status = Status::from(Violations::one("spec.disks[0].size_bytes", "is 511"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "spec.disks[0].size_bytes is 511");
        let found = status.get_details_bad_request().unwrap();
        let FieldViolation { field, description, .. } = &found.field_violations[0];
        assert_eq!((field.as_str(), description.as_str()), ("spec.disks[0].size_bytes", "is 511"));
    }

    #[test]
    fn who_does_not_lead_says_who_does_and_that_nothing_was_done() {
        let status = Status::from(NotLeader { hint: Some("10.0.0.2:7400".into()) });
        assert_eq!(status.metadata().get(LEADER_METADATA_KEY).unwrap(), "10.0.0.2:7400");
        for status in [NotLeader { hint: None }.into(), NotLeader { hint: Some("\n".into()) }.into()] {
            let status: Status = status;
            assert_eq!(status.code(), Code::Unavailable);
            assert_eq!(status.metadata().get(LEADER_METADATA_KEY).unwrap(), "");
        }
        // Nobody knows what became of it: no such promise.
        assert!(Status::from(WriteError::Unknown).metadata().get(LEADER_METADATA_KEY).is_none());
    }
}
