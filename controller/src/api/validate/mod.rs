//! Checks requests at the edge. Pure.
//!
//! Everything that can be checked without the cluster's state is checked here, with the limits that the comments in
//! `proto/uncloud/v1/*.proto` give, and defaults are filled in. A request's violations are all collected, so that a
//! user mends them in one go. Each names its field as a path (`spec.disks[0].size_bytes`) and says what to do.
//! What comes out has our own types; nothing behind this module looks at a request again.

mod cloud_init;
mod image;
mod requests;
mod vm;

pub(crate) use image::{NewFile, NewImage, NewUpload, create_image, upload_start};
pub(crate) use requests::{
    CloneVm, Drain, DrainHost, LogTarget, ResizeDisk, VmRef, WatchVms, attach_disk, clone_vm, console_input,
    console_open, cordon_host, detach_disk, drain_host, get_vm_log, has_labels, host_ref, image_ref, list_events,
    list_vms, migrate_vm, resize_disk, resume_point, set_failover, simulate_host_failure, snapshot, vm_ref, vnc_data,
    vnc_open, watch_events, watch_vms,
};
pub(crate) use vm::{MAX_NICS, create_vm, macs, mint_macs, update_vm};

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use uncloud_proto::names;
use uuid::Uuid;

/// Who owns what nobody was named for.
pub(crate) const DEFAULT_OWNER: &str = "default";

/// Labels that one object may have.
const MAX_LABELS: usize = 64;
/// Bytes of a label's value.
const MAX_LABEL_VALUE: usize = 255;
/// Characters of a request id.
const MAX_REQUEST_ID: usize = 128;
/// Bytes of a kernel command line. QEMU and the kernel take no more than 2048.
const MAX_COMMAND_LINE: usize = 2048;
/// Bytes of a source, as of a path in Linux.
const MAX_SOURCE: usize = 4096;
/// Violations that one answer carries. They travel in HTTP/2 trailers, of which some clients take only 8 KiB.
const MAX_VIOLATIONS: usize = 16;
/// Violations that the message spells out; it says the same again, for people.
const MAX_IN_MESSAGE: usize = 4;
/// Characters of what the user sent that an answer repeats.
const MAX_QUOTED: usize = 40;

/// One field that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// The field's path in the request.
    pub(crate) field: String,
    /// What is wrong and what to do, to be read behind the field's path.
    pub(crate) problem: String,
}

/// Everything that is wrong with a request. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violations {
    /// The first ones.
    pub(crate) listed: Vec<Violation>,
    /// How many more there were.
    pub(crate) more: usize,
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, v) in self.listed.iter().take(MAX_IN_MESSAGE).enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{} {}", v.field, v.problem)?;
        }
        match self.listed.len().saturating_sub(MAX_IN_MESSAGE) + self.more {
            0 => Ok(()),
            n => write!(f, "; and {n} more"),
        }
    }
}

impl std::error::Error for Violations {}

impl Violations {
    /// One violation.
    pub(crate) fn one(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { listed: vec![Violation { field: field.into(), problem: problem.into() }], more: 0 }
    }
}

/// Collects violations.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    listed: Vec<Violation>,
    more: usize,
}

impl Checker {
    /// Notes that a field is not as it should be.
    pub(crate) fn fail(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        if self.listed.len() < MAX_VIOLATIONS {
            self.listed.push(Violation { field: field.into(), problem: problem.into() });
        } else {
            self.more += 1;
        }
    }

    /// `value`, if nothing was wrong.
    pub(crate) fn finish<T>(self, value: T) -> Result<T, Violations> {
        if self.listed.is_empty() { Ok(value) } else { Err(Violations { listed: self.listed, more: self.more }) }
    }

    /// A name that must be there.
    pub(crate) fn name(&mut self, field: &str, text: String) -> String {
        if let Err(problem) = names::check(&text) {
            self.fail(field, problem.to_string());
        }
        text
    }

    /// A name, or what it is when it is empty.
    pub(crate) fn name_or(&mut self, field: &str, text: String, default: &str) -> String {
        if text.is_empty() { default.to_owned() } else { self.name(field, text) }
    }

    /// A UUID, the beginning of one, or a name. UUIDs come out in their one spelling.
    pub(crate) fn reference(&mut self, field: &str, text: String) -> String {
        if let Ok(id) = Uuid::try_parse(&text) {
            return id.hyphenated().to_string();
        }
        if text.is_empty() {
            self.fail(field, "is required: give a UUID, the beginning of one, or a name");
        } else if let Err(problem) = names::check(&text) {
            self.fail(field, problem.to_string());
        }
        text
    }

    /// Labels: keys like names, short values without control characters.
    pub(crate) fn labels(&mut self, field: &str, labels: HashMap<String, String>) -> BTreeMap<String, String> {
        if labels.len() > MAX_LABELS {
            self.fail(field, format!("has {} entries; at most {MAX_LABELS} are allowed", labels.len()));
            return BTreeMap::new();
        }
        // Sorted first, so that the violations come in a fixed order.
        let labels: BTreeMap<_, _> = labels.into_iter().collect();
        for (key, value) in &labels {
            let at = format!("{field}[{}]", quoted(key));
            if let Err(problem) = names::check(key) {
                self.fail(&at, format!("has a key that {problem}"));
            }
            self.text(&at, value, MAX_LABEL_VALUE);
        }
        labels
    }

    /// Text of one line.
    pub(crate) fn text(&mut self, field: &str, text: &str, max_bytes: usize) {
        if text.len() > max_bytes {
            self.fail(field, format!("has {} bytes; at most {max_bytes} are allowed", text.len()));
        } else if let Some(bad) = text.chars().find(|c| c.is_control()) {
            self.fail(field, format!("has the control character {}; remove it", bad.escape_debug()));
        }
    }

    /// A number within limits.
    pub(crate) fn range(&mut self, field: &str, value: u64, min: u64, max: u64, unit: &str) {
        if value < min || value > max {
            self.fail(field, format!("is {value}; give {min} to {max}{unit}"));
        }
    }

    /// The value of an enum that this program knows.
    pub(crate) fn known<E: TryFrom<i32>>(&mut self, field: &str, value: i32, names: &[&str]) -> Option<E> {
        let known = E::try_from(value).ok();
        if known.is_none() {
            self.fail(field, format!("has the unknown value {value}; give {}", names.join(" or ")));
        }
        known
    }

    /// The id that makes a create request safe to repeat.
    pub(crate) fn request_id(&mut self, text: &str) {
        let count = text.chars().count();
        if count > MAX_REQUEST_ID {
            self.fail("request_id", format!("has {count} characters; at most {MAX_REQUEST_ID} are allowed"));
        } else if text.chars().any(char::is_control) {
            self.fail("request_id", "has a control character; use printable ones, such as those of a UUID");
        }
    }
}

/// What the user sent, fit for an answer: shortened, with nothing that a terminal would obey.
pub(crate) fn quoted(text: &str) -> String {
    let mut out: String = text.chars().take(MAX_QUOTED).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_QUOTED).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
pub(crate) mod testing {
    use super::Violations;

    /// The fields that were found fault with, in order.
    pub(crate) fn fields<T: std::fmt::Debug>(result: Result<T, Violations>) -> Vec<String> {
        result.expect_err("the request is refused").listed.into_iter().map(|v| v.field).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_stays_small_however_much_is_wrong() {
        let mut checker = Checker::default();
        for i in 0..1000 {
            checker.fail(format!("labels[{i}]"), quoted(&"\u{1b}".repeat(10_000)));
        }
        let violations = checker.finish(()).unwrap_err();
        assert_eq!((violations.listed.len(), violations.more), (MAX_VIOLATIONS, 1000 - MAX_VIOLATIONS));
        assert!(violations.to_string().len() < 2000);
        assert!(violations.to_string().ends_with("; and 996 more"));
        assert!(!violations.to_string().contains('\u{1b}'));
    }

    #[test]
    fn a_uuid_is_taken_in_any_spelling() {
        let mut checker = Checker::default();
        let id = "0a0B0c0d-0000-4000-8000-00000000000F";
        assert_eq!(checker.reference("vm", id.to_owned()), id.to_lowercase());
        assert_eq!(checker.reference("vm", id.replace('-', "")), id.to_lowercase());
        assert_eq!(checker.reference("vm", "0a0b".to_owned()), "0a0b");
        assert!(checker.finish(()).is_ok());
    }
}
