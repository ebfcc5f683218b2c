//! A network for hosts that can be cut: each in a namespace of its own, on one bridge with the controller.
//!
//! The cut drops packets (nftables in the namespace), as a dead switch does: nobody gets a reset.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, ensure};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Which packets of a host are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All.
    Both,
    /// What the host sends; it still hears.
    Outgoing,
    /// What the host should hear; it still sends.
    Incoming,
}

/// The bridge of each host that its VMs may be connected to, if there is a network for guests.
pub const GUEST_BRIDGE: &str = "br0";
/// The interface of the guests' network on the side of their users.
pub const USERS_INTERFACE: &str = "guests";
/// What the users' side has as its address there: the guests' network may have this subnet in every test, as it is its own.
pub const USERS_ADDRESS: &str = "10.77.0.1/24";

/// Whether guests have a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guests {
    /// They have none.
    Alone,
    /// Each host has a bridge, and all are joined, with the users of the guests in a namespace of their own.
    Joined,
}

/// A bridge and the namespaces on it. All of it goes when dropped.
pub struct Network {
    id: String,
    subnet: String,
    hosts: u32,
    guests: Guests,
}

impl Network {
    /// Makes the bridge.
    ///
    /// # Errors
    ///
    /// Needs root.
    pub fn new(guests: Guests) -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "network namespaces need root: run the tests as root");
        let pid = std::process::id();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // 14 characters at the most, with the `h9` of a host behind it. Process id and count make it unique on the machine.
        let id = format!("uc{:x}{n:x}", pid & 0xff_ffff);
        let subnet = format!("10.{}.{}", 64 + pid % 128, (pid / 128 + n * 31) % 256);
        let network = Self { id, subnet, hosts: 0, guests };
        run(&["ip", "link", "add", &network.id, "type", "bridge"])?;
        run(&["ip", "address", "add", &format!("{}.1/24", network.subnet), "dev", &network.id])?;
        run(&["ip", "link", "set", &network.id, "up"])?;
        match guests {
            Guests::Alone => {}
            Guests::Joined => network.make_users()?,
        }
        Ok(network)
    }

    /// The namespace from which guests are reached, if they have a network.
    #[must_use]
    pub fn users(&self) -> String {
        format!("{}g", self.id)
    }

    fn make_users(&self) -> anyhow::Result<()> {
        let (users, port) = (self.users(), format!("{}pg", self.id));
        run(&["ip", "netns", "add", &users])?;
        // They reach the controllers, too.
        run(&["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &users])?;
        run(&["ip", "link", "set", &port, "master", &self.id, "up"])?;
        inside(&users, &["ip", "address", "add", &format!("{}.254/24", self.subnet), "dev", "eth0"])?;
        inside(&users, &["ip", "link", "set", "eth0", "up"])?;
        // Without snooping of multicasts: nobody asks here who listens to what, so what was learnt would be forgotten.
        let bridge = ["ip", "link", "add", USERS_INTERFACE, "type", "bridge", "mcast_snooping", "0"];
        inside(&users, &bridge)?;
        inside(&users, &["ip", "address", "add", USERS_ADDRESS, "dev", USERS_INTERFACE])?;
        inside(&users, &["ip", "link", "set", "lo", "up"])?;
        inside(&users, &["ip", "link", "set", USERS_INTERFACE, "up"])
    }

    /// Gives a host a bridge for its VMs, and joins it to the others.
    fn join_guests(&self, host: &str) -> anyhow::Result<()> {
        let (users, port) = (self.users(), format!("h{}", self.hosts));
        inside(host, &["ip", "link", "add", GUEST_BRIDGE, "type", "bridge", "mcast_snooping", "0"])?;
        inside(&users, &["ip", "link", "add", &port, "type", "veth", "peer", "name", "uplink", "netns", host])?;
        inside(&users, &["ip", "link", "set", &port, "master", USERS_INTERFACE, "up"])?;
        inside(host, &["ip", "link", "set", "uplink", "master", GUEST_BRIDGE, "up"])?;
        inside(host, &["ip", "link", "set", GUEST_BRIDGE, "up"])
    }

    /// The address of the side that has the controller.
    #[must_use]
    pub fn address(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// The address of a host, counted from 1 in the order in which they were added.
    #[must_use]
    pub fn address_of(&self, host: u32) -> String {
        format!("{}.{}", self.subnet, host + 1)
    }

    /// Adds a host; gives the name of its namespace.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn add_host(&mut self) -> anyhow::Result<String> {
        self.hosts += 1;
        let (name, port) = (self.namespace(self.hosts), format!("{}p{}", self.id, self.hosts));
        let address = format!("{}/24", self.address_of(self.hosts));
        run(&["ip", "netns", "add", &name])?;
        run(&["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
        run(&["ip", "link", "set", &port, "master", &self.id, "up"])?;
        inside(&name, &["ip", "address", "add", &address, "dev", "eth0"])?;
        inside(&name, &["ip", "link", "set", "lo", "up"])?;
        inside(&name, &["ip", "link", "set", "eth0", "up"])?;
        match self.guests {
            Guests::Alone => {}
            Guests::Joined => self.join_guests(&name)?,
        }
        Ok(name)
    }

    fn namespace(&self, host: u32) -> String {
        format!("{}h{host}", self.id)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 1..=self.hosts {
            let _ = run(&["ip", "netns", "delete", &self.namespace(host)]);
        }
        match self.guests {
            Guests::Alone => {}
            Guests::Joined => drop(run(&["ip", "netns", "delete", &self.users()])),
        }
        let _ = run(&["ip", "link", "delete", &self.id]);
    }
}

/// Cuts a namespace off.
///
/// # Errors
///
/// What nft says.
pub fn cut(namespace: &str, cut: Cut) -> anyhow::Result<()> {
    drop_what(namespace, cut, "iifname != \"lo\"", "oifname != \"lo\"")
}

/// Cuts a namespace off from one address; it reaches all others.
///
/// # Errors
///
/// What nft says.
pub fn cut_from(namespace: &str, address: &str, cut: Cut) -> anyhow::Result<()> {
    drop_what(namespace, cut, &format!("ip saddr {address}"), &format!("ip daddr {address}"))
}

fn drop_what(namespace: &str, cut: Cut, incoming: &str, outgoing: &str) -> anyhow::Result<()> {
    let chain = |hook: &str, which: &str| {
        format!("chain {hook}_cut {{\ntype filter hook {hook} priority 0\n{which} drop\n}}\n")
    };
    let incoming = chain("input", incoming);
    let outgoing = chain("output", outgoing);
    let chains = match cut {
        Cut::Both => incoming + &outgoing,
        Cut::Outgoing => outgoing,
        Cut::Incoming => incoming,
    };
    nft(namespace, &format!("table inet cut {{\n{chains}}}\n"))
}

/// Loses so many percent of a namespace's packets, each way, at random.
///
/// # Errors
///
/// What nft says.
pub fn lose(namespace: &str, percent: u32) -> anyhow::Result<()> {
    // `numgen ... < 100` of a hundred is refused.
    let which = if percent < 100 { format!("numgen random mod 100 < {percent} ") } else { String::new() };
    let chain = |hook: &str, interface: &str| {
        format!("chain {hook}_cut {{\ntype filter hook {hook} priority 0\n{interface} != \"lo\" {which}drop\n}}\n")
    };
    nft(namespace, &format!("table inet cut {{\n{}{}}}\n", chain("input", "iifname"), chain("output", "oifname")))
}

/// Makes it whole again.
///
/// # Errors
///
/// What nft says.
pub fn heal(namespace: &str) -> anyhow::Result<()> {
    nft(namespace, "delete table inet cut\n")
}

fn nft(namespace: &str, rules: &str) -> anyhow::Result<()> {
    let mut child = Command::new("nsenter")
        .args([&format!("--net=/run/netns/{namespace}"), "--", "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run nft (`make setup` installs it)")?;
    child.stdin.take().context("stdin of nft")?.write_all(rules.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The link-local address that a guest makes from its MAC address (RFC 4291, appendix A), with the interface of its users.
///
/// # Errors
///
/// It is no MAC address.
pub fn link_local(mac: &str) -> anyhow::Result<String> {
    let b = mac.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<Vec<u8>, _>>()?;
    ensure!(b.len() == 6, "MAC {mac}");
    let (first, last) = (u16::from(b[0] ^ 2) << 8 | u16::from(b[1]), u16::from(b[4]) << 8 | u16::from(b[5]));
    Ok(format!("fe80::{first:x}:{:x}ff:fe{:02x}:{last:x}%{USERS_INTERFACE}", b[2], b[3]))
}

/// A command in a namespace.
#[must_use]
pub fn command(namespace: &str, program: &str) -> Command {
    // Not `ip netns exec` or `ip -n`, which make mounts and so do not work where `/` is no mount point, as in a chroot.
    let mut command = Command::new("nsenter");
    command.args([&format!("--net=/run/netns/{namespace}"), "--", program]);
    command
}

/// What a command in a namespace prints.
///
/// # Errors
///
/// It fails.
pub fn output(namespace: &str, argv: &[&str]) -> anyhow::Result<String> {
    let output = command(namespace, argv[0]).args(&argv[1..]).output().with_context(|| format!("run {}", argv[0]))?;
    ensure!(output.status.success(), "{}: {}", argv.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn inside(namespace: &str, argv: &[&str]) -> anyhow::Result<()> {
    output(namespace, argv).map(drop)
}

fn run(argv: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(argv[0]).args(&argv[1..]).output().with_context(|| format!("run {}", argv[0]))?;
    ensure!(output.status.success(), "{}: {}", argv.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the host can connect to the controller's side.
    fn reaches(network: &Network, namespace: &str, port: u16) -> bool {
        let connect = format!("exec 3<>/dev/tcp/{}/{port}", network.address());
        let status = Command::new("nsenter")
            .args([&format!("--net=/run/netns/{namespace}"), "--", "timeout", "1", "bash", "-c", &connect])
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|s| s.success())
    }

    /// Whether it can within some seconds: a busy machine takes its time, and that is not what is tested.
    fn comes_to_reach(network: &Network, namespace: &str, port: u16) -> bool {
        let begin = std::time::Instant::now();
        while begin.elapsed() < std::time::Duration::from_secs(10) {
            if reaches(network, namespace, port) {
                return true;
            }
        }
        false
    }

    #[test]
    fn a_host_can_be_cut_off_and_healed() -> anyhow::Result<()> {
        let mut network = Network::new(Guests::Alone)?;
        let host = network.add_host()?;
        let listener = std::net::TcpListener::bind((network.address(), 0))?;
        let port = listener.local_addr()?.port();
        assert!(comes_to_reach(&network, &host, port));
        for way in [Cut::Both, Cut::Outgoing, Cut::Incoming] {
            cut(&host, way)?;
            assert!(!reaches(&network, &host, port), "{way:?}");
            heal(&host)?;
            assert!(comes_to_reach(&network, &host, port), "{way:?}");
        }
        lose(&host, 100)?;
        assert!(!reaches(&network, &host, port));
        heal(&host)?;
        lose(&host, 1)?;
        heal(&host)?;
        Ok(())
    }
}
