//! Every key that the controllers keep in etcd, in one place.
//!
//! | key | value | written by | lifetime |
//! |---|---|---|---|
//! | `/uncloud/v1/vms/<vm>` | [`VmRecord`](super::VmRecord) | leader | until deleted |
//! | `/uncloud/v1/vm-status/<vm>` | [`VmStatusRecord`](super::VmStatusRecord) | leader, from reports | as its VM |
//! | `/uncloud/v1/vm-names/<owner>/<name>` | UUID of the VM | leader | as its VM |
//! | `/uncloud/v1/macs/<mac>` | UUID of the VM that has it | leader | as its VM |
//! | `/uncloud/v1/hosts/<host>` | [`HostRecord`](super::HostRecord) | leader | until removed |
//! | `/uncloud/v1/images/<image>` | [`ImageRecord`](super::ImageRecord) | leader | until deleted |
//! | `/uncloud/v1/requests/<id>` | [`RequestRecord`](super::RequestRecord) | leader | an hour, by an etcd lease |
//! | `/uncloud/v1/events/<subject>/<revision>.<n>` | [`EventRecord`](super::EventRecord) | leader | a week, by an etcd lease; the newest 200,000 |
//! | `/uncloud/v1/cluster` | [`ClusterRecord`](super::ClusterRecord) | leader | for ever |
//! | `/uncloud/v1/leader` | [`LeaderRecord`](super::LeaderRecord) | the leader | an etcd lease of 2 s |
//!
//! A field may be added with a default; renaming or removing one needs a new `/v2/` prefix.

use std::fmt;

use uncloud_proto::ids::{HostId, ImageId, Revision, VmId};
use uuid::Uuid;

/// What all keys begin with.
pub const ROOT: &str = "/uncloud/v1/";
/// The first string that no longer begins with [`ROOT`].
pub const ROOT_END: &str = "/uncloud/v10";
/// What the keys of all events begin with.
pub const EVENTS: &str = "/uncloud/v1/events/";
/// The first string after those.
pub const EVENTS_END: &str = "/uncloud/v1/events0";

/// One key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A VM.
    Vm(VmId),
    /// What a VM was last seen to be.
    VmStatus(VmId),
    /// Claims a name for a VM.
    VmName {
        /// Owner of the VM.
        owner: String,
        /// Its name.
        name: String,
    },
    /// Claims a MAC address for a VM.
    Mac(String),
    /// A host.
    Host(HostId),
    /// An image.
    Image(ImageId),
    /// The answer that was given to a request. The id is stored percent-encoded.
    Request(String),
    /// Something that happened.
    Event {
        /// UUID of what it happened to; the nil UUID for the cluster.
        subject: Uuid,
        /// The revision that the decision was based on.
        base: Revision,
        /// Tells the events of one transaction apart.
        n: u32,
    },
    /// Who leads.
    Leader,
    /// What all leaders must agree on.
    Cluster,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(id) => write!(f, "{ROOT}vms/{id}"),
            Self::VmStatus(id) => write!(f, "{ROOT}vm-status/{id}"),
            Self::VmName { owner, name } => write!(f, "{ROOT}vm-names/{owner}/{name}"),
            Self::Mac(mac) => write!(f, "{ROOT}macs/{mac}"),
            Self::Host(id) => write!(f, "{ROOT}hosts/{id}"),
            Self::Image(id) => write!(f, "{ROOT}images/{id}"),
            Self::Request(id) => {
                write!(f, "{ROOT}requests/")?;
                for b in id.bytes() {
                    if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.') {
                        write!(f, "{}", char::from(b))?;
                    } else {
                        write!(f, "%{b:02x}")?;
                    }
                }
                Ok(())
            }
            // Padded, so that the order of the keys is the order of the events.
            Self::Event { subject, base, n } => write!(f, "{ROOT}events/{subject}/{:020}.{n:04}", base.0),
            Self::Leader => write!(f, "{ROOT}leader"),
            Self::Cluster => write!(f, "{ROOT}cluster"),
        }
    }
}

impl Key {
    /// Reads a key. `None` for anything that is not exactly what [`Display`](fmt::Display) writes.
    #[must_use]
    pub fn parse(key: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(key).ok()?;
        let rest = text.strip_prefix(ROOT)?;
        let key = match rest.split_once('/') {
            None if rest == "leader" => Self::Leader,
            None if rest == "cluster" => Self::Cluster,
            None => return None,
            Some(("vms", id)) => Self::Vm(id.parse().ok()?),
            Some(("vm-status", id)) => Self::VmStatus(id.parse().ok()?),
            Some(("vm-names", rest)) => {
                let (owner, name) = rest.split_once('/')?;
                Self::VmName { owner: owner.to_owned(), name: name.to_owned() }
            }
            Some(("macs", mac)) => Self::Mac(mac.to_owned()),
            Some(("hosts", id)) => Self::Host(id.parse().ok()?),
            Some(("images", id)) => Self::Image(id.parse().ok()?),
            Some(("requests", id)) => {
                let key = Self::Request(percent_decode(id)?);
                // What is encoded can be written in many ways.
                return (key.to_string() == text).then_some(key);
            }
            Some(("events", rest)) => {
                let (subject, place) = rest.split_once('/')?;
                let (base, n) = place.split_once('.')?;
                let key = Self::Event {
                    subject: Uuid::try_parse(subject).ok()?,
                    base: Revision(base.parse().ok()?),
                    n: n.parse().ok()?,
                };
                return (key.to_string() == text).then_some(key);
            }
            Some(_) => return None,
        };
        // An id has one spelling (`ids.rs`), and a name and a MAC address stand there as they are.
        Some(key)
    }
}

/// Cuts a range of keys, from `from` to before `end`, into one for each kind of key, and kinds of which there may be many into
/// sixteen. Together they are the range.
#[must_use]
pub fn cut(from: Vec<u8>, end: Vec<u8>) -> Vec<(Vec<u8>, Vec<u8>)> {
    // Under all of these there are random digits, but for the names.
    let many = ["hosts/", "macs/42:", "vm-status/", "vms/"];
    let kinds = ["hosts/", "images/", "macs/", "requests/", "vm-names/", "vm-status/", "vms/"];
    let digits = many.iter().flat_map(|many| (1..16).map(move |digit| format!("{ROOT}{many}{digit:x}")));
    let mut cuts: Vec<Vec<u8>> =
        kinds.iter().map(|kind| format!("{ROOT}{kind}")).chain(digits).map(String::into_bytes).collect();
    cuts.retain(|cut| (&from..&end).contains(&cut) && *cut != from);
    cuts.sort_unstable();
    cuts.push(end);
    let starts: Vec<Vec<u8>> = std::iter::once(from).chain(cuts.iter().cloned()).collect();
    starts.into_iter().zip(cuts).collect()
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        if b == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(b);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_reads_back() {
        let id = Uuid::from_u128(7);
        for key in [
            Key::Vm(VmId::from_uuid(id)),
            Key::VmStatus(VmId::from_uuid(id)),
            Key::VmName { owner: "default".into(), name: "web-1".into() },
            Key::Mac("42:00:00:00:00:01".into()),
            Key::Host(HostId::from_uuid(id)),
            Key::Image(ImageId::from_uuid(id)),
            Key::Request("a/b c%\u{e9}".into()),
            Key::Event { subject: id, base: Revision(12), n: 3 },
            Key::Leader,
            Key::Cluster,
        ] {
            assert_eq!(Key::parse(key.to_string().as_bytes()), Some(key.clone()), "{key}");
        }
    }

    #[test]
    fn the_pieces_of_a_range_are_the_range() {
        for (from, end) in
            [(ROOT, ROOT_END), (EVENTS_END, ROOT_END), ("/uncloud/v1/vms/3", "/uncloud/v1/vms/5"), ("a", "b")]
        {
            let pieces = cut(from.into(), end.into());
            assert_eq!((&*pieces[0].0, &*pieces[pieces.len() - 1].1), (from.as_bytes(), end.as_bytes()));
            assert!(pieces.windows(2).all(|w| w[0].1 == w[1].0), "nothing is left out and nothing comes twice");
            assert!(pieces.iter().all(|(from, end)| from < end), "none is empty");
        }
        let pieces = cut("/uncloud/v1/vms/1".into(), ROOT_END.into());
        assert_eq!(pieces.len(), 15, "what begins at a cut is not cut there");
    }

    #[test]
    fn anything_else_is_not_a_key() {
        for bad in
            ["", "/uncloud/v1/", "/uncloud/v1/vms/x", "/uncloud/v1/nope/x", "/uncloud/v2/leader", "/uncloud/v1/leaderx"]
        {
            assert_eq!(Key::parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(Key::parse(b"/uncloud/v1/vms/\xff"), None);
        let id = Uuid::from_u128(0xabc);
        for other in [
            format!("{ROOT}vms/{}", id.simple()),
            format!("{ROOT}vms/{}", id.braced()),
            format!("{ROOT}vms/{}", id.to_string().to_uppercase()),
            format!("{ROOT}vms/{id}/"),
            format!("{ROOT}hosts/{}", id.urn()),
            format!("{ROOT}requests/%41"),
            format!("{ROOT}events/{id}/12.3"),
            format!("{ROOT}events/{}/{:020}.{:04}", id.simple(), 12, 3),
        ] {
            assert_eq!(Key::parse(other.as_bytes()), None, "{other}");
        }
    }
}
