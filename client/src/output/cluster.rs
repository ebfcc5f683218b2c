//! The cluster and its events for people.

use uncloud_proto::{clock::WallTime, v1};

use super::{
    clean, pairs, phase_word, table,
    text::{moment, moment_and_age, word},
};
use crate::units;

/// The cluster as a whole.
#[must_use]
pub fn status(s: &v1::GetStatusResponse, now: WallTime) -> String {
    let leader = s.leader.clone().unwrap_or_default();
    let millis = |ms| units::duration(std::time::Duration::from_millis(ms));
    let count = |n: u32, what: &str| format!("{n} {what}");
    let none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let mut out = pairs(&[
        (
            "Leader",
            if leader.address.is_empty() { "none".to_owned() } else { format!("{} ({})", leader.address, leader.id) },
        ),
        ("Term", leader.term.to_string()),
        ("Since", moment_and_age(leader.since.as_ref(), now)),
        ("Version", s.version.clone()),
        ("Hosts", none(s.hosts.iter().map(|h| count(h.count, &h.state)).collect::<Vec<_>>().join(", "))),
        ("VMs", none(s.vms.iter().map(|v| count(v.count, &phase_word(v.phase()))).collect::<Vec<_>>().join(", "))),
        ("Leases", format!("{} fast, {} patient", millis(s.fast_lease_ms), millis(s.patient_lease_ms))),
        (
            "Failover",
            s.failover_off_until.as_ref().map_or("on".to_owned(), |t| format!("OFF until {}", moment(Some(t)))),
        ),
        ("Brake", s.brake.as_ref().map(|b| brake(b, now)).unwrap_or_default()),
        ("Revision", s.revision.to_string()),
    ]);
    if s.unreadable_count > 0 {
        out.push_str(&format!("\n{} records in etcd cannot be read and are left alone:\n", s.unreadable_count));
        let rows: Vec<Vec<String>> = s.unreadable.iter().map(|u| vec![u.key.clone(), u.error.clone()]).collect();
        out.push_str(&format!("{}\n", table(&["KEY", "ERROR"], &rows)));
    }
    if !s.warnings.is_empty() {
        out.push('\n');
        for warning in &s.warnings {
            out.push_str(&format!("! {}\n", clean(warning)));
        }
    }
    out
}

fn brake(b: &v1::Brake, now: WallTime) -> String {
    if b.engaged {
        let since = moment_and_age(b.since.as_ref(), now);
        format!(
            "ON since {since}: {} of {} hosts are heard; nothing is failed over (`uncloud failover proceed` lets it go on)",
            b.heard, b.total
        )
    } else {
        format!("off ({} of {} hosts are heard)", b.heard, b.total)
    }
}

/// Events, one to a line, in the order in which they are given.
#[must_use]
pub fn events<'a>(events: impl IntoIterator<Item = &'a v1::Event>) -> String {
    events.into_iter().map(|e| event_line(e) + "\n").collect()
}

/// One event in a line.
#[must_use]
pub fn event_line(e: &v1::Event) -> String {
    let kind = word(e.subject_kind().as_str_name(), "SUBJECT_KIND_");
    // The cluster is its own name.
    let subject =
        if e.subject_name.is_empty() || e.subject_name == kind { kind } else { format!("{kind}/{}", e.subject_name) };
    clean(&format!("{:24}  {subject:24}  {:16}  {}", moment(e.time.as_ref()), e.r#type, e.message))
}
