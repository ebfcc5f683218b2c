//! Which controller to talk to. Pure.
//!
//! The configured controllers are taken in turn; a leader that a controller named is preferred until it fails.

use std::fmt;

/// Addresses of controllers, and which one is next.
#[derive(Clone, Debug)]
pub struct Endpoints {
    configured: Vec<String>,
    at: usize,
    leader: Option<String>,
}

/// An address that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEndpoint {
    /// There is none.
    #[error("no endpoint is given")]
    None,
    /// It is not `HOST:PORT`.
    #[error("`{}` is not an address of the form HOST:PORT", .0.escape_debug())]
    Malformed(String),
    /// TLS is asked for.
    #[error("`{}` asks for TLS, which this version does not speak yet", .0.escape_debug())]
    Tls(String),
}

impl Endpoints {
    /// Takes addresses of the form `HOST:PORT` (or `http://HOST:PORT`).
    ///
    /// # Errors
    ///
    /// Names the address that cannot be used.
    pub fn new(addresses: &[String]) -> Result<Self, BadEndpoint> {
        let configured = addresses.iter().map(|a| normalise(a)).collect::<Result<Vec<_>, _>>()?;
        if configured.is_empty() {
            return Err(BadEndpoint::None);
        }
        Ok(Self { configured, at: 0, leader: None })
    }

    /// Where to send the next call.
    #[must_use]
    pub fn current(&self) -> &str {
        self.leader.as_deref().unwrap_or(&self.configured[self.at])
    }

    /// Notes that `address` failed. Ignored if the choice has changed since, so that many calls that fail together
    /// do not skip a good one.
    pub fn failed(&mut self, address: &str) {
        if self.current() != address {
            return;
        }
        let was_leader_only = self.leader.take().is_some() && self.configured[self.at] != address;
        if !was_leader_only {
            self.at = (self.at + 1) % self.configured.len();
        }
    }

    /// Notes that a controller named `address` as the leader. An address that makes no sense counts as a failure of
    /// `from`, the one that said so.
    pub fn follow(&mut self, address: &str, from: &str) {
        match normalise(address) {
            Ok(address) => self.leader = Some(address),
            Err(_) => self.failed(from),
        }
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.configured.join(", "))
    }
}

/// Brings an address into the one form `HOST:PORT`.
///
/// # Errors
///
/// It cannot be used.
pub fn normalise(address: &str) -> Result<String, BadEndpoint> {
    let address = address.trim();
    if address.starts_with("https://") {
        return Err(BadEndpoint::Tls(address.to_owned()));
    }
    let bare = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
    let malformed = || BadEndpoint::Malformed(address.to_owned());
    let (host, port) = bare.rsplit_once(':').ok_or_else(malformed)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']' | b'%');
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let host_fits = !host.is_empty() && host.bytes().all(allowed) && (bracketed || !host.contains([':', '[', ']']));
    if !host_fits || port.parse::<u16>().is_ok_and(|p| p == 0) || port.parse::<u16>().is_err() {
        return Err(malformed());
    }
    Ok(bare.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(list: &[&str]) -> Endpoints {
        Endpoints::new(&list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn they_are_taken_in_turn() {
        let mut e = endpoints(&["a:1", "b:1", "http://c:1/"]);
        for expected in ["a:1", "b:1", "c:1", "a:1"] {
            let current = e.current().to_owned();
            assert_eq!(current, expected);
            e.failed(&current);
        }
    }

    #[test]
    fn calls_that_fail_together_skip_nobody() {
        let mut e = endpoints(&["a:1", "b:1", "c:1"]);
        e.failed("a:1");
        e.failed("a:1");
        assert_eq!(e.current(), "b:1");
    }

    #[test]
    fn a_leader_is_preferred_until_it_fails() {
        let mut e = endpoints(&["a:1", "b:1"]);
        e.follow("x:9", "a:1");
        assert_eq!(e.current(), "x:9");
        e.failed("x:9");
        assert_eq!(e.current(), "a:1");
        e.follow("a:1", "b:1");
        e.failed("a:1");
        assert_eq!(e.current(), "b:1");
        e.follow("not an address", "b:1");
        assert_eq!(e.current(), "a:1");
    }

    #[test]
    fn addresses_have_one_form() {
        for good in ["127.0.0.1:7400", "[::1]:7400", "controller-1.example:7400"] {
            assert_eq!(normalise(good).as_deref(), Ok(good));
            assert_eq!(normalise(&format!("http://{good}/")).as_deref(), Ok(good));
        }
        for bad in ["", "host", "host:", ":1", "host:0", "host:70000", "::1:7400", "a b:1", "a/b:1", "a\n:1"] {
            assert!(matches!(normalise(bad), Err(BadEndpoint::Malformed(_))), "{bad:?}");
        }
        assert!(matches!(normalise("https://a:1"), Err(BadEndpoint::Tls(_))));
        assert!(Endpoints::new(&[]).is_err());
    }
}
