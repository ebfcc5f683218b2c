//! Why hosts cannot take a VM, for people.

use std::{cmp::Reverse, collections::BTreeMap};

use uncloud_proto::ids::HostId;

use super::Rejection;

/// What each host says to a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Hosts that could take it now, the best first.
    pub candidates: Vec<HostId>,
    /// The others, by reason, the largest group first.
    pub groups: Vec<Group>,
}

/// Hosts that cannot take a VM for the same reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The reason.
    pub rejection: Rejection,
    /// The hosts, in the order of their ids.
    pub hosts: Vec<HostId>,
}

/// No host can take the VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.summary())]
pub struct Unplaceable {
    /// All hosts, by reason, the largest group first.
    pub groups: Vec<Group>,
}

impl Unplaceable {
    /// All of it in one line: "3 hosts: 2 lack 4096 MiB of memory, 1 is cordoned".
    #[must_use]
    pub fn summary(&self) -> String {
        summary(&self.groups)
    }
}

impl Explanation {
    /// All of it in one line: "1 of 3 hosts can take it, 2 lack 4096 MiB of memory", or why none can.
    #[must_use]
    pub fn summary(&self) -> String {
        if self.candidates.is_empty() {
            return summary(&self.groups);
        }
        let refused: usize = self.groups.iter().map(|g| g.hosts.len()).sum();
        let (can, all) = (self.candidates.len(), self.candidates.len() + refused);
        let hosts = if all == 1 { "host" } else { "hosts" };
        let mut text = format!("{can} of {all} {hosts} can take it");
        for group in &self.groups {
            text.push_str(", ");
            text.push_str(&group.rejection.of(group.hosts.len()));
        }
        text
    }
}

fn summary(groups: &[Group]) -> String {
    let count: usize = groups.iter().map(|g| g.hosts.len()).sum();
    let reasons: Vec<String> = groups.iter().map(|g| g.rejection.of(g.hosts.len())).collect();
    match count {
        0 => "no hosts have joined yet".to_owned(),
        1 => format!("1 host: {}", reasons.join(", ")),
        _ => format!("{count} hosts: {}", reasons.join(", ")),
    }
}

/// The largest group first; among equals, in the order of the filters.
pub(super) fn grouped(refused: BTreeMap<Rejection, Vec<HostId>>) -> Vec<Group> {
    let mut groups: Vec<Group> = refused.into_iter().map(|(rejection, hosts)| Group { rejection, hosts }).collect();
    groups.sort_by_key(|g| Reverse(g.hosts.len()));
    groups
}
