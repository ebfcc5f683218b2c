//! TCP ports for servers under test, which keep them when they are started again.
//!
//! They are below those that the kernel gives to clients, which would take the port of a server that is just down, and each is marked
//! by a locked file, so that tests in other processes take others.

use std::{
    fs::{self, File},
    net::TcpListener,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, bail};

use crate::paths;

/// Below the ephemeral ports (`net.ipv4.ip_local_port_range`), above those of services.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// The marks of this process's ports, held to its end, and how many ports were looked at.
static TAKEN: Mutex<(Vec<File>, u16)> = Mutex::new((Vec::new(), 0));

/// A TCP port of the loopback that nobody uses, and no other test will while this process lives.
///
/// # Errors
///
/// There is none left, or it cannot be marked.
pub fn free_port() -> anyhow::Result<u16> {
    let dir = paths::binary_dir()?.join(".ports");
    fs::create_dir_all(&dir).context("make a directory for the marks of ports")?;
    let count = PORTS.end - PORTS.start;
    // Not all from the first: tests of another working copy have their marks elsewhere.
    let first = u16::try_from(std::process::id().wrapping_mul(97) % u32::from(count)).unwrap_or(0);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    while taken.1 < count {
        let port = PORTS.start + (first + taken.1) % count;
        taken.1 += 1;
        let mark = File::create(dir.join(port.to_string())).context("mark a port")?;
        if mark.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            taken.0.push(mark);
            return Ok(port);
        }
    }
    bail!("no port of {PORTS:?} is free")
}
