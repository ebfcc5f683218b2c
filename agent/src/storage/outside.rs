//! Tells which addresses users must not reach by an image's address, unless the operator says otherwise: the host's own, and those of its
//! link, where a cloud has its metadata service. Private networks are where the image servers of people with hardware of their own are.

use std::{
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

/// An address of the host's own or of its link.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0} is an address of the host itself or of its link; if images may come from there, say so by --image-url on each host"
)]
pub(super) struct Inside(pub(super) IpAddr);

/// Looks up names, and refuses those that lead anywhere else.
#[derive(Debug)]
pub(super) struct OutsideNames;

impl Resolve for OutsideNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if let Some(address) = found.iter().map(SocketAddr::ip).find(|address| !is_outside(*address)) {
                return Err(Box::new(Inside(address)) as Box<dyn Error + Send + Sync>);
            }
            if found.is_empty() {
                return Err(Box::new(io::Error::from(io::ErrorKind::NotFound)) as Box<dyn Error + Send + Sync>);
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The address that stands in the place of a name.
pub(super) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether a request failed because of [`Inside`].
pub(super) fn is_refusal(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<Inside>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Whether an address leads away from this host and its link.
pub(super) fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_outside_v4(address),
        IpAddr::V6(address) => is_outside_v6(address),
    }
}

fn is_outside_v4(address: Ipv4Addr) -> bool {
    let [first, second, ..] = address.octets();
    // Shared between a provider and its customers: clouds have metadata services there, too.
    let shared = first == 100 && (64..128).contains(&second);
    // The first and the last are “this network” and what is reserved, with the broadcast address.
    !(first == 0
        || first >= 240
        || shared
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast())
}

fn is_outside_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let [.., c, d] = segments;
    let embedded = |high: u16, low: u16| is_outside_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match segments {
        // Mapped, compatible (with unspecified and loopback), and translated addresses of version 4.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => embedded(c, d),
        [0x2002, high, low, ..] => embedded(high, low),
        // A network's own translation, and a cloud's metadata service.
        [0x64, 0xff9b, 1, ..] | [0xfd00, 0xec2, ..] => false,
        [..] => !(address.is_unicast_link_local() || address.is_multicast()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inside_is_known_in_every_disguise() {
        for inside in [
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:a9fe:a9fe::1",
            "fd00:ec2::254",
            "64:ff9b:1::1",
        ] {
            assert!(!is_outside(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "1.1.1.1",
            "10.0.0.1",
            "192.168.1.1",
            "fd00::1",
            "172.32.0.1",
            "192.169.0.1",
            "100.128.0.1",
            "198.20.0.1",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::1",
        ] {
            assert!(is_outside(outside.parse().unwrap()), "{outside}");
        }
    }
}
