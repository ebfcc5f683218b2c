//! What a refusal must say.

use tonic::{Code, Status};

use crate::error_fields;

/// What every refusal must have. An empty `field`: only the code counts.
///
/// # Panics
///
/// It has not.
pub fn check(what: &str, status: &Status, code: Code, field: &str) {
    assert_eq!(status.code(), code, "{what}: {status}");
    assert!(!status.message().trim().is_empty(), "{what}: no message");
    assert!(status.message().len() < 4096, "{what}: a message of {} bytes", status.message().len());
    let control = status.message().chars().any(char::is_control);
    assert!(!control, "{what}: the message has control characters: {:?}", status.message());
    if !field.is_empty() {
        assert!(status.message().contains(field), "{what}: the message does not name `{field}`: {status}");
        if code == Code::InvalidArgument {
            let fields = error_fields(status);
            assert!(fields.iter().any(|f| f == field), "{what}: the details name {fields:?}, not `{field}`");
        }
    }
}
