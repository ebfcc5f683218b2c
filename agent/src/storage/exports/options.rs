//! The pools that go over the network, as they are configured. Pure.

use std::{net::SocketAddr, path::PathBuf};

use uncloud_proto::names;
use uuid::Uuid;

/// The port that is registered for NBD.
const PORT: u16 = 10809;

/// A pool that another host serves, or this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPool {
    /// Its name, the same on all hosts.
    pub name: String,
    /// The id in its marker.
    pub id: Uuid,
}

/// `NAME=ID`.
///
/// # Errors
///
/// What is wrong with it.
pub fn network_pool(text: &str) -> Result<NetworkPool, String> {
    let shape =
        || format!("`{}` is not of the form NAME=ID; `uncloud-agent init-pool` printed the id", text.escape_debug());
    let (name, id) = text.split_once('=').ok_or_else(shape)?;
    names::check(name).map_err(|problem| format!("the name `{}` {problem}", name.escape_debug()))?;
    let id = id.parse::<Uuid>().map_err(|_| shape())?;
    Ok(NetworkPool { name: name.to_owned(), id })
}

/// `NAME=DIRECTORY`.
///
/// # Errors
///
/// What is wrong with it.
pub fn export_pool(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text
        .split_once('=')
        .filter(|(_, path)| !path.is_empty())
        .ok_or_else(|| format!("`{}` is not of the form NAME=DIRECTORY", text.escape_debug()))?;
    names::check(name).map_err(|problem| format!("the name `{}` {problem}", name.escape_debug()))?;
    Ok((name.to_owned(), path.into()))
}

/// `IP` or `IP:PORT`.
///
/// # Errors
///
/// What is wrong with it.
pub fn export_address(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<SocketAddr>().ok().or_else(|| Some(SocketAddr::new(text.parse().ok()?, PORT)));
    match address {
        Some(address) if address.ip().is_unspecified() || address.ip().is_multicast() => {
            Err(format!("{} is not an address of one host: others must reach it by it", address.ip()))
        }
        Some(address) if address.port() == 0 => Err("the port is 0".to_owned()),
        Some(address) => Ok(address),
        None => Err(format!("`{}` is not of the form IP or IP:PORT", text.escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(export_address("10.0.0.1").unwrap().port(), PORT);
        assert_eq!(export_address("[fd00::1]:7").unwrap().to_string(), "[fd00::1]:7");
        for bad in ["", "x", "0.0.0.0", "10.0.0.1:0", "10.0.0.1:x", "[::]:7"] {
            assert!(export_address(bad).is_err(), "{bad}");
        }
        let id = Uuid::from_u128(7);
        assert_eq!(network_pool(&format!("net={id}")), Ok(NetworkPool { name: "net".into(), id }));
        for bad in ["net", "net=", "net=x", "../n=00000000-0000-0000-0000-000000000007"] {
            assert!(network_pool(bad).is_err(), "{bad}");
        }
        assert!(export_pool("net=/srv").is_ok() && export_pool("net=").is_err() && export_pool("/srv").is_err());
    }
}
