//! From what a person types to an id: a UUID, a unique prefix of one, or a name.

use std::{fmt::Display, ops::Bound, str::FromStr};

use uncloud_proto::ids::{HostId, ImageId, VmId};
use uuid::Uuid;

use super::{State, command::Refusal, full_name};

/// The shortest prefix of a UUID that is taken for one. A shorter one is a likely name and rarely unique.
const MIN_PREFIX: usize = 4;
/// How many candidates an ambiguous prefix lists.
const LISTED: usize = 5;

impl State {
    /// The VM that `text` means: its UUID, its name (among the VMs of `owner`), or a unique prefix of its UUID.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoVm`], or [`Refusal::Precondition`] that lists the candidates of an ambiguous prefix.
    pub fn resolve_vm(&self, text: &str, owner: &str) -> Result<VmId, Refusal> {
        if let Ok(id) = VmId::from_str(text) {
            return if self.vms.contains_key(&id) { Ok(id) } else { Err(Refusal::NoVm(text.to_owned())) };
        }
        if let Some(&id) = self.vm_names.get(full_name(owner, text).as_str()) {
            // The name stays claimed while the record itself cannot be read.
            return if self.vms.contains_key(&id) { Ok(id) } else { Err(Refusal::NoVm(text.to_owned())) };
        }
        let Some((low, high)) = prefix_range(text) else { return Err(Refusal::NoVm(text.to_owned())) };
        let range = (Bound::Included(VmId::from_uuid(low)), Bound::Included(VmId::from_uuid(high)));
        let found = self.vms.range(range).map(|(&id, entry)| (id, entry.record.name.as_str()));
        one("VM", text, found)?.ok_or_else(|| Refusal::NoVm(text.to_owned()))
    }

    /// The host that `text` means: its UUID, its name, or a unique prefix of its UUID.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoHost`], or [`Refusal::Precondition`] that lists the candidates.
    pub fn resolve_host(&self, text: &str) -> Result<HostId, Refusal> {
        let none = || Refusal::NoHost(text.to_owned());
        if let Ok(id) = HostId::from_str(text) {
            return if self.hosts.contains_key(&id) { Ok(id) } else { Err(none()) };
        }
        if let Some(ids) = self.host_names.get(text) {
            return one("host", text, ids.iter().map(|&id| (id, text)))?.ok_or_else(none);
        }
        let Some((low, high)) = prefix_range(text) else { return Err(none()) };
        let range = (Bound::Included(HostId::from_uuid(low)), Bound::Included(HostId::from_uuid(high)));
        let found = self.hosts.range(range).map(|(&id, entry)| (id, entry.record.name.as_str()));
        one("host", text, found)?.ok_or_else(none)
    }

    /// The image that `text` means: its UUID, its name, or a unique prefix of its UUID.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoImage`] (of the field `image`), or [`Refusal::Precondition`] that lists the candidates.
    pub fn resolve_image(&self, text: &str) -> Result<ImageId, Refusal> {
        let none = || Refusal::NoImage { field: "image".to_owned(), name: text.to_owned() };
        if let Ok(id) = ImageId::from_str(text) {
            return if self.images.contains_key(&id) { Ok(id) } else { Err(none()) };
        }
        if let Some(ids) = self.image_names.get(text) {
            return one("image", text, ids.iter().map(|&id| (id, text)))?.ok_or_else(none);
        }
        let Some((low, high)) = prefix_range(text) else { return Err(none()) };
        let range = (Bound::Included(ImageId::from_uuid(low)), Bound::Included(ImageId::from_uuid(high)));
        let found = self.images.range(range).map(|(&id, entry)| (id, entry.record.name.as_str()));
        one("image", text, found)?.ok_or_else(none)
    }
}

/// The only one of `found`; `None` if there is none.
fn one<'a, Id: Display>(
    noun: &str,
    text: &str,
    found: impl Iterator<Item = (Id, &'a str)>,
) -> Result<Option<Id>, Refusal> {
    let mut found = found.take(LISTED + 1).peekable();
    let Some(first) = found.next() else { return Ok(None) };
    if found.peek().is_none() {
        return Ok(Some(first.0));
    }
    let all: Vec<(Id, &str)> = std::iter::once(first).chain(found).collect();
    let more = if all.len() > LISTED { ", …" } else { "" };
    let listed: Vec<String> = all.iter().take(LISTED).map(|(id, name)| format!("{id} ({name})")).collect();
    Err(Refusal::Precondition(format!("`{text}` is more than one {noun}: {}{more}", listed.join(", "))))
}

/// The first and the last UUID that begin with `text`, if that is the beginning of a UUID in its usual spelling.
fn prefix_range(text: &str) -> Option<(Uuid, Uuid)> {
    const SHAPE: &str = "00000000-0000-0000-0000-000000000000";
    if text.len() < MIN_PREFIX || text.len() >= SHAPE.len() {
        return None;
    }
    let fits = |(c, shape): (u8, u8)| match shape {
        b'-' => c == b'-',
        _ => c.is_ascii_digit() || (b'a'..=b'f').contains(&c),
    };
    if !text.bytes().zip(SHAPE.bytes()).all(fits) {
        return None;
    }
    let rest = &SHAPE[text.len()..];
    let low = Uuid::try_parse(&format!("{text}{rest}")).ok()?;
    let high = Uuid::try_parse(&format!("{text}{}", rest.replace('0', "f"))).ok()?;
    Some((low, high))
}
