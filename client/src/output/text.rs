//! Words, times and ages for tables; and the guard between text from elsewhere and the terminal.

use std::fmt::Write as _;

use uncloud_proto::{clock::WallTime, v1};

use crate::units;

/// Makes text harmless for a terminal: control characters, and the marks that turn the direction of writing, are
/// shown as escapes. Names and reasons come from users, guests and QEMU.
#[must_use]
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let is_directional = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || is_directional || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// The same for text of several lines: line ends stay, tabs become spaces.
#[must_use]
pub fn clean_lines(text: &str) -> String {
    let lines = text.split('\n').map(|line| clean(&line.trim_end_matches('\r').replace('\t', "    ")));
    lines.collect::<Vec<_>>().join("\n")
}

/// A name for a value of an enum: `VM_PHASE_RUNNING` without its prefix, in small letters.
#[must_use]
pub fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase().replace('_', "-")
}

/// How long ago something was; `-` if it never was.
#[must_use]
pub fn age(since: Option<&prost_types::Timestamp>, now: WallTime) -> String {
    since.map_or_else(dash, |since| {
        let ms = now.0.saturating_sub(WallTime::from_proto(since).0);
        let rounded = if ms < 1000 { 0 } else { ms / 1000 };
        if rounded == 0 { "0s".to_owned() } else { units::duration(std::time::Duration::from_secs(rounded)) }
    })
}

/// A moment, in UTC; empty if there is none.
#[must_use]
pub fn moment(time: Option<&prost_types::Timestamp>) -> String {
    time.map(|t| {
        let millis = prost_types::Timestamp { seconds: t.seconds, nanos: t.nanos / 1_000_000 * 1_000_000 };
        millis.to_string()
    })
    .unwrap_or_default()
}

/// A moment and how long ago that was; empty if there is none.
#[must_use]
pub fn moment_and_age(time: Option<&prost_types::Timestamp>, now: WallTime) -> String {
    if time.is_none() { String::new() } else { format!("{} ({} ago)", moment(time), age(time, now)) }
}

/// What a table shows where there is nothing.
#[must_use]
pub fn dash() -> String {
    "-".to_owned()
}

/// The text, or a dash if it is empty.
#[must_use]
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { dash() } else { text.to_owned() }
}

/// The first part of a UUID, which does as a name in commands.
#[must_use]
pub fn short_id(id: &str) -> String {
    id.chars().take(8).collect()
}

/// Labels in the order of their keys: `a=1,b=2`.
#[must_use]
pub fn labels(labels: &std::collections::HashMap<String, String>) -> String {
    let mut pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.sort();
    pairs.join(",")
}

/// CPU and memory: `2 vCPUs, 512 MiB`.
#[must_use]
pub fn resources(r: &v1::Resources) -> String {
    format!("{} vCPU{}, {}", r.vcpus, if r.vcpus == 1 { "" } else { "s" }, mib(r.memory_mib))
}

/// MiB for people.
#[must_use]
pub fn mib(n: u64) -> String {
    units::bytes(n.saturating_mul(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_guest_or_user_wrote_reaches_the_terminal_as_a_command() {
        assert_eq!(clean("a\x1b[2Jb\r\n\u{9b}31m\u{202e}c\0"), r"a\u{1b}[2Jb\r\n\u{9b}31m\u{202e}c\u{0}");
        assert_eq!(clean("grün 日本"), "grün 日本");
        assert_eq!(clean_lines("a\tb\r\nc\x07"), "a    b\nc\\u{7}");
    }

    #[test]
    fn enum_values_read_as_words() {
        assert_eq!(word(v1::VmPhase::Running.as_str_name(), "VM_PHASE_"), "running");
        assert_eq!(word(v1::RestartPolicy::OnFailure.as_str_name(), "RESTART_POLICY_"), "on-failure");
    }

    #[test]
    fn ages_are_whole_seconds_and_never_negative() {
        let at = prost_types::Timestamp { seconds: 100, nanos: 0 };
        assert_eq!(age(Some(&at), WallTime(100_900)), "0s");
        assert_eq!(age(Some(&at), WallTime(108_900)), "8s");
        assert_eq!(age(Some(&at), WallTime(0)), "0s");
        assert_eq!(age(None, WallTime(0)), "-");
        assert_eq!(moment(Some(&at)), "1970-01-01T00:01:40Z");
    }
}
