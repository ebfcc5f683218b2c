//! Configuration: flags, and a TOML file with the same fields. A flag wins over the file.
//!
//! Everything is checked in [`Options::validate`], and each message names the field and says what to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use serde::Deserialize;
use uncloud_proto::names;

use crate::{
    host,
    qemu::migration::Listen,
    storage::{
        exports::options::{self, NetworkPool},
        http::Allowed,
        pools::{Kind, Pool, User},
    },
};

/// Runs on each host: keeps the lease, makes this host's VMs what they should be, and reports what they are.
#[derive(Debug, Parser)]
#[command(name = "uncloud-agent", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub options: Options,
    /// TOML file with the same fields as the flags, such as `state-dir = "/var/lib/uncloud/agent"`.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What to do instead of running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a directory a pool that several hosts share: writes its marker.
    InitPool {
        /// The directory.
        path: PathBuf,
        /// A name for people.
        #[arg(long, default_value = "")]
        name: String,
    },
    /// Prints how guests would execute on this host, and why.
    Probe,
    /// The process that the probe measures.
    #[command(hide = true)]
    ProbeKvmChild,
}

/// The fields, as flags and as TOML.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// Addresses of the controllers, HOST:PORT. Repeat it, or separate them by commas.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub controller: Vec<String>,
    /// Directory of what must survive a restart. Each agent needs its own.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Name of this host. The machine's, if not given.
    #[arg(long)]
    pub name: Option<String>,
    /// A pool: NAME=DIRECTORY, or NAME=DIRECTORY,shared if other hosts have it, too.
    #[arg(long, value_name = "NAME=PATH[,shared]")]
    pub pool: Vec<String>,
    /// A pool that this host serves to others over the network: NAME=DIRECTORY, made by `init-pool`.
    #[arg(long, value_name = "NAME=PATH")]
    pub export_pool: Vec<String>,
    /// Where its disks are served: an address of this host, and a port (10809, if not given).
    #[arg(long, value_name = "IP[:PORT]")]
    pub export_address: Option<String>,
    /// A pool that another host serves: NAME=ID, with the id that `init-pool` printed there.
    #[arg(long, value_name = "NAME=ID")]
    pub network_pool: Vec<String>,
    /// A directory that images may come from, besides the pools.
    #[arg(long, value_name = "DIR")]
    pub image_dir: Vec<PathBuf>,
    /// Beginning of the addresses that images may be fetched from; `none` for no address. May be repeated. Any but
    /// those of this host and its link, if not given.
    #[arg(long, value_name = "URL|none")]
    pub image_url: Vec<String>,
    /// How long an image server may say nothing before it is asked again, in seconds. 30, if not given.
    #[arg(long, value_name = "SECONDS")]
    pub image_timeout: Option<u64>,
    /// How large an image, and the disk that its guest sees, may be, in GiB. 2048, if not given.
    #[arg(long, value_name = "GIB")]
    pub max_image_gib: Option<u64>,
    /// A label: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// CPU threads for VMs. All of the machine's, if not given.
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory for VMs in MiB. All of the machine's but 512, if not given.
    #[arg(long, value_name = "MIB")]
    pub memory_mib: Option<u64>,
    /// A bridge of this host that VMs may be connected to. May be repeated. None, if not given.
    #[arg(long, value_name = "NAME")]
    pub bridge: Vec<String>,
    /// How guests execute: auto (measured, the default), kvm or tcg.
    #[arg(long)]
    pub accelerator: Option<String>,
    /// User that QEMU runs as, by name or as UID:GID. As root: nobody, if not given.
    #[arg(long, value_name = "NAME|UID:GID")]
    pub vm_user: Option<String>,
    /// The keeper. Beside this program or in PATH, if not given.
    #[arg(long, value_name = "PATH")]
    pub keeper: Option<PathBuf>,
    /// QEMU. qemu-system-x86_64 in PATH, if not given.
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// qemu-img. In PATH, if not given.
    #[arg(long, value_name = "PATH")]
    pub qemu_img: Option<PathBuf>,
    /// qemu-storage-daemon. In PATH, if not given. Needed with --export-pool.
    #[arg(long, value_name = "PATH")]
    pub qemu_storage_daemon: Option<PathBuf>,
    /// UEFI firmware. That of Debian's package ovmf, if not given.
    #[arg(long, value_name = "PATH")]
    pub uefi_code: Option<PathBuf>,
    /// What the variables of a UEFI machine start as. Those of Debian's package ovmf, if not given.
    #[arg(long, value_name = "PATH")]
    pub uefi_vars: Option<PathBuf>,
    /// How many VMs are started at once. 4, if not given.
    #[arg(long, value_name = "N")]
    pub parallel_starts: Option<usize>,
    /// Address of this host at which VMs that migrate to it arrive. None can come, if not given.
    #[arg(long, value_name = "IP")]
    pub migration_address: Option<String>,
    /// Ports for that, FIRST-LAST. The kernel picks them, if not given.
    #[arg(long, value_name = "FIRST-LAST")]
    pub migration_ports: Option<String>,
}

/// How many bridges a host may offer. The controller takes no more.
const MAX_BRIDGES: usize = 64;
/// Where Debian's package ovmf puts them.
const UEFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const UEFI_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// How the accelerator is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceleratorMode {
    /// By measuring.
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// A configuration that has been checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Addresses of the controllers, at least one.
    pub controllers: Vec<String>,
    /// Directory of what must survive a restart.
    pub state_dir: PathBuf,
    /// Name of this host.
    pub name: String,
    /// The pools that are directories, those that this host exports among them.
    pub pools: Vec<Pool>,
    /// The pools that other hosts serve.
    pub network_pools: Vec<NetworkPool>,
    /// What serves the pools that this host exports, and where. Absent: it exports none.
    pub exports: Option<ExportServer>,
    /// Directories that images may come from.
    pub image_dirs: Vec<PathBuf>,
    /// The addresses that images may be fetched from. An empty list: from nowhere.
    pub image_urls: Allowed,
    /// How long an image server may say nothing.
    pub image_timeout: Duration,
    /// How large an image, and the disk that its guest sees, may be, in bytes.
    pub max_image_bytes: u64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// CPU threads for VMs.
    pub vcpus: u32,
    /// Memory for VMs in MiB.
    pub memory_mib: u64,
    /// How guests execute.
    pub accelerator: AcceleratorMode,
    /// User that QEMU runs as, if it is not the agent's own.
    pub user: Option<User>,
    /// The keeper.
    pub keeper: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// qemu-img.
    pub qemu_img: PathBuf,
    /// UEFI firmware. Looked for only when a VM needs it.
    pub uefi_code: PathBuf,
    /// What the variables of a UEFI machine start as.
    pub uefi_vars: PathBuf,
    /// How many VMs are started at once.
    pub parallel_starts: usize,
    /// Where VMs that migrate to this host arrive.
    pub migration: Option<Listen>,
    /// Bridges that VMs may be connected to.
    pub bridges: Vec<String>,
}

/// What serves the pools that this host exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportServer {
    /// qemu-storage-daemon.
    pub program: PathBuf,
    /// Where it serves.
    pub address: SocketAddr,
}

/// What is wrong with the configuration: the field, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

fn wrong<T>(field: &str, problem: impl std::fmt::Display) -> Result<T, Error> {
    Err(Error(format!("{field}: {problem}")))
}

impl Cli {
    /// Puts the flags over the file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or has a field that there is not.
    pub fn merged(self) -> Result<Options, Error> {
        let Some(path) = self.config else { return Ok(self.options) };
        let text = fs::read_to_string(&path).map_err(|e| Error(format!("--config: {}: {e}", path.display())))?;
        let file: Options = toml::from_str(&text).map_err(|e| Error(format!("--config: {}: {e}", path.display())))?;
        Ok(self.options.over(file))
    }
}

impl Options {
    fn over(self, file: Self) -> Self {
        fn list<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
            if flags.is_empty() { file } else { flags }
        }
        Self {
            controller: list(self.controller, file.controller),
            state_dir: self.state_dir.or(file.state_dir),
            name: self.name.or(file.name),
            pool: list(self.pool, file.pool),
            export_pool: list(self.export_pool, file.export_pool),
            export_address: self.export_address.or(file.export_address),
            network_pool: list(self.network_pool, file.network_pool),
            image_dir: list(self.image_dir, file.image_dir),
            image_url: list(self.image_url, file.image_url),
            image_timeout: self.image_timeout.or(file.image_timeout),
            max_image_gib: self.max_image_gib.or(file.max_image_gib),
            label: list(self.label, file.label),
            vcpus: self.vcpus.or(file.vcpus),
            memory_mib: self.memory_mib.or(file.memory_mib),
            bridge: list(self.bridge, file.bridge),
            accelerator: self.accelerator.or(file.accelerator),
            vm_user: self.vm_user.or(file.vm_user),
            keeper: self.keeper.or(file.keeper),
            qemu: self.qemu.or(file.qemu),
            qemu_img: self.qemu_img.or(file.qemu_img),
            qemu_storage_daemon: self.qemu_storage_daemon.or(file.qemu_storage_daemon),
            uefi_code: self.uefi_code.or(file.uefi_code),
            uefi_vars: self.uefi_vars.or(file.uefi_vars),
            parallel_starts: self.parallel_starts.or(file.parallel_starts),
            migration_address: self.migration_address.or(file.migration_address),
            migration_ports: self.migration_ports.or(file.migration_ports),
        }
    }

    /// Checks every field, and the fields against each other.
    ///
    /// # Errors
    ///
    /// Names the field and says what to do.
    pub fn validate(self) -> Result<Config, Error> {
        if self.controller.is_empty() {
            return wrong("--controller", "is required: give the controllers' addresses, HOST:PORT,...");
        }
        for address in &self.controller {
            check_address(address)?;
        }
        let Some(state_dir) = self.state_dir else {
            return wrong("--state-dir", "is required: give a directory that this agent alone uses");
        };
        let name = self.name.unwrap_or_else(host::name);
        if let Err(problem) = names::check(&name) {
            return wrong("--name", format!("`{}` {problem}", name.escape_debug()));
        }
        let vcpus = self.vcpus.unwrap_or_else(host::vcpus);
        if vcpus == 0 {
            return wrong("--vcpus", "is 0: give the number of CPU threads for VMs");
        }
        let memory_mib = self.memory_mib.unwrap_or_else(host::memory_mib);
        if memory_mib == 0 {
            return wrong("--memory-mib", "is 0: give the memory for VMs in MiB");
        }
        let parallel_starts = self.parallel_starts.unwrap_or(4);
        if !(1..=1000).contains(&parallel_starts) {
            return wrong("--parallel-starts", "must be 1 to 1000");
        }
        let mut pools = parse_pools(&self.pool)?;
        let exports =
            parse_exports(&self.export_pool, self.export_address.as_deref(), self.qemu_storage_daemon, &mut pools)?;
        let network_pools = parse_network_pools(&self.network_pool, &pools)?;
        Ok(Config {
            controllers: self.controller,
            state_dir: absolute("--state-dir", &state_dir)?,
            name,
            pools,
            network_pools,
            exports,
            image_dirs: self.image_dir.iter().map(|d| absolute("--image-dir", d)).collect::<Result<_, _>>()?,
            image_urls: parse_image_urls(self.image_url)?,
            image_timeout: match self.image_timeout.unwrap_or(30) {
                seconds @ 1..=3600 => Duration::from_secs(seconds),
                other => return wrong("--image-timeout", format!("is {other}; give 1 to 3600 seconds")),
            },
            max_image_bytes: match self.max_image_gib.unwrap_or(2048) {
                gib @ 1..=65_536 => gib << 30,
                other => return wrong("--max-image-gib", format!("is {other}; give 1 to 65536 GiB")),
            },
            labels: parse_labels(&self.label)?,
            vcpus,
            memory_mib,
            accelerator: match self.accelerator.as_deref() {
                None | Some("auto") => AcceleratorMode::Auto,
                Some("kvm") => AcceleratorMode::Kvm,
                Some("tcg") => AcceleratorMode::Tcg,
                Some(other) => return wrong("--accelerator", format!("`{other}` is not auto, kvm or tcg")),
            },
            user: parse_user(self.vm_user.as_deref(), rustix::process::geteuid().as_raw())?,
            keeper: find("--keeper", self.keeper, "uncloud-keeper", "it is a part of uncloud")?,
            qemu: find("--qemu", self.qemu, "qemu-system-x86_64", "apt-get install qemu-system-x86")?,
            qemu_img: find("--qemu-img", self.qemu_img, "qemu-img", "apt-get install qemu-utils")?,
            uefi_code: self.uefi_code.unwrap_or_else(|| UEFI_CODE.into()),
            uefi_vars: self.uefi_vars.unwrap_or_else(|| UEFI_VARS.into()),
            parallel_starts,
            bridges: parse_bridges(self.bridge)?,
            migration: parse_migration(self.migration_address.as_deref(), self.migration_ports.as_deref())?,
        })
    }
}

fn check_address(address: &str) -> Result<(), Error> {
    let parts = address.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let plain = address.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'@' | b'?' | b'#'));
    if parts.is_none() || !plain {
        return wrong("--controller", format!("`{}` is not of the form HOST:PORT", address.escape_debug()));
    }
    Ok(())
}

fn absolute(field: &str, path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error(format!("{field}: {}: {e}", path.display())))
}

fn parse_pools(texts: &[String]) -> Result<Vec<Pool>, Error> {
    let mut pools: Vec<Pool> = Vec::new();
    for text in texts {
        let Some((name, path)) = text.split_once('=') else {
            return wrong("--pool", format!("`{text}` is not of the form NAME=PATH or NAME=PATH,shared"));
        };
        if let Err(problem) = names::check(name) {
            return wrong("--pool", format!("the name `{}` {problem}", name.escape_debug()));
        }
        let (path, kind) = match path.strip_suffix(",shared") {
            Some(path) => (path, Kind::Shared),
            None => (path, Kind::Local),
        };
        if path.is_empty() {
            return wrong("--pool", format!("pool {name} has no path"));
        }
        let path = absolute("--pool", Path::new(path))?;
        if let Some(other) = pools.iter().find(|p| p.name == name || p.path == path) {
            return wrong(
                "--pool",
                format!("{name} and {} are the same; give each name and directory once", other.name),
            );
        }
        pools.push(Pool { name: name.to_owned(), path, kind });
    }
    Ok(pools)
}

/// Adds the pools that this host exports to `pools`.
fn parse_exports(
    texts: &[String],
    address: Option<&str>,
    program: Option<PathBuf>,
    pools: &mut Vec<Pool>,
) -> Result<Option<ExportServer>, Error> {
    let address = match (texts, address) {
        ([], None) => return Ok(None),
        ([], Some(_)) => return wrong("--export-address", "goes with --export-pool"),
        (_, None) => return wrong("--export-address", "is required with --export-pool: give an address of this host"),
        (_, Some(address)) => options::export_address(address).or_else(|e| wrong("--export-address", e))?,
    };
    for text in texts {
        let (name, path) = options::export_pool(text).or_else(|e| wrong("--export-pool", e))?;
        let path = absolute("--export-pool", &path)?;
        if let Some(other) = pools.iter().find(|p| p.name == name || p.path == path) {
            return wrong(
                "--export-pool",
                format!("{name} and {} are the same; give each name and directory once", other.name),
            );
        }
        pools.push(Pool { name, path, kind: Kind::Exported(address) });
    }
    let install = "apt-get install qemu-system-common";
    let program = find("--qemu-storage-daemon", program, "qemu-storage-daemon", install)?;
    Ok(Some(ExportServer { program, address }))
}

fn parse_network_pools(texts: &[String], pools: &[Pool]) -> Result<Vec<NetworkPool>, Error> {
    let mut found: Vec<NetworkPool> = Vec::new();
    for text in texts {
        let pool = options::network_pool(text).or_else(|e| wrong("--network-pool", e))?;
        if pools.iter().any(|p| p.name == pool.name) || found.iter().any(|p| p.name == pool.name) {
            return wrong("--network-pool", format!("{} is the name of another pool, too", pool.name));
        }
        found.push(pool);
    }
    Ok(found)
}

fn parse_bridges(names: Vec<String>) -> Result<Vec<String>, Error> {
    for (i, name) in names.iter().enumerate() {
        if let Err(problem) = names::check_interface(name) {
            return wrong("--bridge", format!("`{}` {problem}", name.escape_debug()));
        }
        if names[..i].contains(name) {
            return wrong("--bridge", format!("{name} is given twice"));
        }
    }
    if names.len() > MAX_BRIDGES {
        return wrong("--bridge", format!("is given {} times; at most {MAX_BRIDGES} are possible", names.len()));
    }
    Ok(names)
}

fn parse_migration(address: Option<&str>, ports: Option<&str>) -> Result<Option<Listen>, Error> {
    let Some(address) = address else {
        return match ports {
            None => Ok(None),
            Some(_) => wrong("--migration-ports", "goes with --migration-address"),
        };
    };
    let Ok(ip) = address.parse::<IpAddr>() else {
        return wrong("--migration-address", format!("`{}` is not an IP address", address.escape_debug()));
    };
    if ip.is_unspecified() || ip.is_multicast() {
        return wrong("--migration-address", format!("{ip} is not an address of one host: others must reach it by it"));
    }
    let Some(text) = ports else { return Ok(Some(Listen { address: ip, ports: None })) };
    let range = text.split_once('-').and_then(|(a, b)| Some((a.parse::<u16>().ok()?, b.parse::<u16>().ok()?)));
    match range {
        Some((first, last)) if first > 0 && first <= last => {
            Ok(Some(Listen { address: ip, ports: Some((first, last)) }))
        }
        Some(_) | None => {
            wrong("--migration-ports", format!("`{}` is not of the form 49152-49215", text.escape_debug()))
        }
    }
}

fn parse_labels(texts: &[String]) -> Result<BTreeMap<String, String>, Error> {
    let mut labels = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for text in texts {
        let Some((key, value)) = text.split_once('=') else {
            return wrong("--label", format!("`{text}` is not of the form KEY=VALUE"));
        };
        if let Err(problem) = names::check(key) {
            return wrong("--label", format!("the key `{}` {problem}", key.escape_debug()));
        }
        if value.len() > 255 || value.chars().any(char::is_control) {
            return wrong(
                "--label",
                format!("the value of {key} must be at most 255 bytes without control characters"),
            );
        }
        if !seen.insert(key) {
            return wrong("--label", format!("{key} is there twice"));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    if labels.len() > 64 {
        return wrong("--label", "there may be 64 at the most");
    }
    Ok(labels)
}

/// An empty list in the answer: nothing is fetched from the network.
fn parse_image_urls(urls: Vec<String>) -> Result<Allowed, Error> {
    if urls.is_empty() {
        return Ok(Allowed::Outside);
    }
    if urls.iter().any(|u| u == "none") {
        return if urls.len() == 1 {
            Ok(Allowed::Listed(Vec::new()))
        } else {
            wrong("--image-url", "is `none` and also an address")
        };
    }
    // Without the slash `https://example.org` would allow `https://example.org.evil.org`.
    let plain = |url: &&String| {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        rest.is_some_and(|r| r.is_empty() || r.find('/').is_some_and(|at| at > 0))
    };
    match urls.iter().find(|url| !plain(url)) {
        Some(bad) => wrong("--image-url", format!("`{}`: give it as https://HOST/ or longer", bad.escape_debug())),
        None => Ok(Allowed::Listed(urls)),
    }
}

/// Absent in the answer: QEMU runs as the agent does, because the agent cannot change the user.
fn parse_user(text: Option<&str>, euid: u32) -> Result<Option<User>, Error> {
    let user = match text {
        None if euid != 0 => return Ok(None),
        None => User { uid: 65534, gid: 65534 },
        Some(text) => match text.split_once(':') {
            Some((uid, gid)) => match (uid.parse(), gid.parse()) {
                (Ok(uid), Ok(gid)) => User { uid, gid },
                _ => return wrong("--vm-user", format!("`{text}` is not of the form UID:GID")),
            },
            None => {
                let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
                let Some(user) = user_by_name(&passwd, text) else {
                    return wrong("--vm-user", format!("there is no user `{text}` in /etc/passwd; give UID:GID"));
                };
                user
            }
        },
    };
    if user.uid == 0 {
        return wrong("--vm-user", "must not be root: a guest that breaks out of QEMU would own the host");
    }
    if euid != 0 {
        return match user.uid == euid {
            true => Ok(None),
            false => wrong("--vm-user", "only root can run VMs as another user; leave it out"),
        };
    }
    Ok(Some(user))
}

fn user_by_name(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let (_, uid, gid) = (fields.next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(User { uid, gid })
    })
}

/// Beside this program, then in PATH.
fn find(field: &str, given: Option<PathBuf>, program: &str, cure: &str) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        let path = absolute(field, &path)?;
        return if path.is_file() { Ok(path) } else { wrong(field, format!("there is no file {}", path.display())) };
    }
    let beside = env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs = beside.into_iter().chain(env::split_paths(&path));
    let found = dirs.find_map(|dir| Some(dir.join(program)).filter(|path| path.is_file()));
    found.map_or_else(|| wrong(field, format!("{program} is neither beside this program nor in PATH ({cure})")), Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            controller: vec!["127.0.0.1:7400".into()],
            state_dir: Some("/state".into()),
            name: Some("h1".into()),
            keeper: Some("/bin/sh".into()),
            ..Options::default()
        }
    }

    fn problem(change: impl FnOnce(&mut Options)) -> String {
        let mut options = options();
        change(&mut options);
        options.validate().unwrap_err().to_string()
    }

    #[test]
    fn a_wrong_field_is_named() {
        let config = options().validate().unwrap();
        assert_eq!((config.parallel_starts, config.accelerator), (4, AcceleratorMode::Auto));
        for (text, field) in [
            (problem(|o| o.controller.clear()), "--controller: "),
            (problem(|o| o.controller = vec!["host".into()]), "--controller: "),
            (problem(|o| o.controller = vec!["http://h:1/x".into()]), "--controller: "),
            (problem(|o| o.state_dir = None), "--state-dir: "),
            (problem(|o| o.name = Some("a/b".into())), "--name: "),
            (problem(|o| o.pool = vec!["a".into()]), "--pool: "),
            (problem(|o| o.pool = vec!["../a=/x".into()]), "--pool: "),
            (problem(|o| o.pool = vec!["a=/x".into(), "a=/y".into()]), "--pool: "),
            (problem(|o| o.pool = vec!["a=/x".into(), "b=/x,shared".into()]), "--pool: "),
            (problem(|o| o.bridge = vec!["br0,fd=3".into()]), "--bridge: "),
            (problem(|o| o.bridge = vec!["a-bridge-too-long".into()]), "--bridge: "),
            (problem(|o| o.bridge = vec!["br0".into(), "br0".into()]), "--bridge: "),
            (problem(|o| o.label = vec!["k".into()]), "--label: "),
            (problem(|o| o.label = vec!["k=1".into(), "k=2".into()]), "--label: "),
            (problem(|o| o.vcpus = Some(0)), "--vcpus: "),
            (problem(|o| o.memory_mib = Some(0)), "--memory-mib: "),
            (problem(|o| o.accelerator = Some("fast".into())), "--accelerator: "),
            (problem(|o| o.keeper = Some("/none".into())), "--keeper: "),
            (problem(|o| o.parallel_starts = Some(0)), "--parallel-starts: "),
            (problem(|o| o.vm_user = Some("no-such-user".into())), "--vm-user: "),
        ] {
            assert!(text.starts_with(field), "{text}");
        }
    }

    #[test]
    fn pools_and_users_are_taken_apart() {
        let pools = parse_pools(&["a=/x".into(), "b=/y=z,shared".into()]).unwrap();
        assert_eq!(pools[0], Pool { name: "a".into(), path: "/x".into(), kind: Kind::Local });
        assert_eq!(pools[1], Pool { name: "b".into(), path: "/y=z".into(), kind: Kind::Shared });
        assert_eq!(parse_user(None, 0), Ok(Some(User { uid: 65534, gid: 65534 })));
        assert_eq!(parse_user(None, 1000), Ok(None));
        assert_eq!(parse_user(Some("5:6"), 0), Ok(Some(User { uid: 5, gid: 6 })));
        assert!(parse_user(Some("5:6"), 1000).is_err());
        assert!(parse_user(Some("0:0"), 0).is_err());
        assert_eq!(user_by_name("a:x:1:2::/:\nvm:x:64055:108::/:", "vm"), Some(User { uid: 64055, gid: 108 }));
    }

    #[test]
    fn a_flag_wins_over_the_file_and_unknown_fields_are_refused() {
        let file = "name = \"file\"\npool = [\"a=/x,shared\"]\nmemory-mib = 5\n";
        let file: Options = toml::from_str(file).unwrap();
        let merged = options().over(file);
        assert_eq!((merged.name.as_deref(), merged.memory_mib), (Some("h1"), Some(5)));
        assert_eq!(merged.pool, ["a=/x,shared"]);
        let error = toml::from_str::<Options>("colour = \"blue\"\n").unwrap_err().to_string();
        assert!(error.contains("colour"), "{error}");
    }

    #[test]
    fn the_command_line_is_as_documented() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["uncloud-agent", "init-pool", "/p", "--name", "x"]);
        assert!(matches!(cli.command, Some(Command::InitPool { .. })));
        let cli = Cli::parse_from(["uncloud-agent", "--controller", "a:1,b:2", "--state-dir", "s", "--label", "k=v"]);
        assert_eq!(cli.options.controller, ["a:1", "b:2"]);
    }
}
