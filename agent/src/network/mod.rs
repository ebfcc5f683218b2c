//! The host's side of a VM's network interfaces: which taps it needs (pure), and making them.
//!
//! The agent does not make bridges: they are the operator's. A tap lives as long as somebody has its descriptor open. The agent
//! gives it to the keeper, which gives it to QEMU, and then forgets it: so the tap goes with QEMU, however that ends, and an agent that
//! is killed or started again changes nothing.

mod sys;

use std::{io, os::fd::OwnedFd};

use uncloud_proto::ids::{Incarnation, VmId};

use crate::vm::desired::{Link, Nic};

/// How many hexadecimal digits of the VM's id are in the name of its taps: what fits, and enough that no two VMs of a host share them.
const ID_DIGITS: usize = 11;

/// A tap that a VM needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// The bridge that it is a port of.
    pub bridge: String,
    /// Its own hardware address, which no guest has.
    pub address: [u8; 6],
}

/// Why a tap could not be made.
#[derive(Debug, thiserror::Error)]
#[error("no port of bridge {bridge} can be made: {step}")]
pub struct Error {
    bridge: String,
    step: &'static str,
    #[source]
    source: io::Error,
}

impl Error {
    /// The whole chain, as one line for people.
    #[must_use]
    pub fn reason(&self) -> String {
        let cure = match self.source.raw_os_error() {
            Some(libc::ENODEV) => ". Make the bridge, or start the agent without this --bridge",
            Some(libc::EPERM | libc::EACCES) => ". The agent needs to be root, or to have CAP_NET_ADMIN",
            Some(_) | None => "",
        };
        format!("{self}: {}{cure}", self.source)
    }
}

/// The tap of each network interface, in their order; none for those that need none.
///
/// The name tells the VM (the beginning of its id), the incarnation (its last hexadecimal digit) and the interface (its place). With
/// the incarnation in it, what is still there of an earlier one, or of the side that a VM migrates from, is not in the way.
#[must_use]
pub fn plan(vm: VmId, incarnation: Incarnation, nics: &[Nic]) -> Vec<Option<Plan>> {
    let id: String = vm.to_string().chars().filter(|c| *c != '-').take(ID_DIGITS).collect();
    let tap = |(index, nic): (usize, &Nic)| match &nic.link {
        Link::User => None,
        Link::Bridge(bridge) => Some(Plan {
            name: format!("u{id}-{:x}{index:x}", incarnation.0 % 16),
            bridge: bridge.clone(),
            address: tap_address(&nic.mac),
        }),
    };
    nics.iter().enumerate().map(tap).collect()
}

/// The guest's address with `fe` in front. A bridge without an address of its own takes the lowest of its ports': with this one,
/// a VM that comes or goes never changes it.
fn tap_address(mac: &str) -> [u8; 6] {
    let mut address = [0xfe, 0, 0, 0, 0, 0];
    for (byte, text) in address.iter_mut().zip(mac.split(':')).skip(1) {
        *byte = u8::from_str_radix(text, 16).unwrap_or(0);
    }
    address
}

/// Makes a tap and a port of its bridge of it. It is up, and has the MTU of the bridge.
///
/// # Errors
///
/// There is no such bridge, or this process may not. Nothing is left then.
pub fn open(plan: &Plan) -> Result<OwnedFd, Error> {
    let failed = |step| move |source| Error { bridge: plan.bridge.clone(), step, source };
    let control = sys::Control::open().map_err(failed("no socket"))?;
    let mtu = control.mtu(&plan.bridge).map_err(failed("it cannot be asked for its MTU"))?;
    let tap = sys::open_tap(&plan.name).map_err(failed("the tap cannot be made"))?;
    control.set_address(&plan.name, plan.address).map_err(failed("the tap's address cannot be set"))?;
    // Before it is a port: a bridge takes the lowest MTU of its ports.
    control.set_mtu(&plan.name, mtu).map_err(failed("the tap's MTU cannot be set"))?;
    control.add_port(&plan.bridge, &plan.name).map_err(failed("the tap cannot be made a port of it"))?;
    control.up(&plan.name).map_err(failed("the tap cannot be brought up"))?;
    Ok(tap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taps_name_fits_and_tells_vm_incarnation_and_place() {
        let vm: VmId = "1a2b3c4d-5e6f-4000-8000-000000000abc".parse().unwrap();
        let nic = |link| Nic { mac: "42:01:02:03:0a:ff".into(), link };
        let mut nics = vec![nic(Link::User)];
        nics.extend((1..8).map(|_| nic(Link::Bridge("br-guests".into()))));
        let plans = plan(vm, Incarnation(0x1f), &nics);
        assert_eq!(plans[0], None);
        let first = plans[1].clone().unwrap();
        assert_eq!((first.name.as_str(), first.bridge.as_str()), ("u1a2b3c4d5e6-f1", "br-guests"));
        assert_eq!(first.address, [0xfe, 1, 2, 3, 0x0a, 0xff]);
        assert!(plans.iter().flatten().all(|p| p.name.len() <= uncloud_proto::names::MAX_INTERFACE));
        assert_eq!(plans[7].clone().unwrap().name, "u1a2b3c4d5e6-f7");
    }

    #[test]
    fn a_bridge_that_is_not_there_is_named_and_leaves_nothing() {
        let plan =
            Plan { name: "uncloud-test-t".into(), bridge: "no-such-bridge".into(), address: [0xfe, 0, 0, 0, 0, 1] };
        let reason = open(&plan).unwrap_err().reason();
        assert!(reason.starts_with("no port of bridge no-such-bridge can be made: "), "{reason}");
        assert!(reason.contains("No such device"), "{reason}");
        assert!(!std::path::Path::new("/sys/class/net/uncloud-test-t").exists());
    }
}
