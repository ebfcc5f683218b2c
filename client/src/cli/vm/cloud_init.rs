//! The flags of `uncloud vm create` that say what the guest's cloud-init is told. Files are read here, and only so much of them
//! as a controller takes.

use std::{fs::File, io::Read as _, path::Path};

use clap::Args;
use uncloud_proto::v1;

/// What a controller takes (`CloudInit` in vm.proto).
const MAX_USER_DATA: u64 = 64 * 1024;
const MAX_NETWORK_CONFIG: u64 = 16 * 1024;
const MAX_KEYS_FILE: u64 = 256 * 1024;

#[derive(Debug, Args)]
pub(crate) struct CloudInitArguments {
    /// A public key that may log in: a file as ~/.ssh/id_ed25519.pub, or the key itself. May be repeated.
    #[arg(long, value_name = "FILE|KEY", value_parser = parse_keys, help_heading = "cloud-init")]
    ssh_key: Vec<Keys>,
    /// User data for cloud-init, at most 64 KiB.
    #[arg(long, value_name = "FILE", value_parser = |p: &str| read(p, MAX_USER_DATA), help_heading = "cloud-init")]
    user_data: Option<String>,
    /// Network configuration for cloud-init (version 1 or 2), at most 16 KiB.
    #[arg(long, value_name = "FILE", value_parser = |p: &str| read(p, MAX_NETWORK_CONFIG), help_heading = "cloud-init")]
    network_config: Option<String>,
    /// The guest's host name; without it, the VM's name.
    #[arg(long, value_name = "NAME", help_heading = "cloud-init")]
    hostname: Option<String>,
}

/// The keys of one flag.
#[derive(Clone, Debug)]
pub(crate) struct Keys(Vec<String>);

impl CloudInitArguments {
    /// `None`: nothing was given, so the guest gets no such disk.
    pub(crate) fn into_proto(self) -> Option<v1::CloudInit> {
        let Self { ssh_key, user_data, network_config, hostname } = self;
        if ssh_key.is_empty() && user_data.is_none() && network_config.is_none() && hostname.is_none() {
            return None;
        }
        Some(v1::CloudInit {
            hostname: hostname.unwrap_or_default(),
            ssh_authorized_keys: ssh_key.into_iter().flat_map(|k| k.0).collect(),
            user_data: user_data.unwrap_or_default(),
            network_config: network_config.unwrap_or_default(),
        })
    }
}

/// Reads a text file of at most `limit` bytes.
fn read(path: &str, limit: u64) -> Result<String, String> {
    let failed = |e: std::io::Error| format!("{path}: {e}");
    let mut bytes = Vec::new();
    File::open(Path::new(path)).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(format!("{path} has more than the limit: at most {limit} bytes are allowed"));
    }
    String::from_utf8(bytes).map_err(|_| format!("{path} is not plain text"))
}

/// What begins like a key is one; all else is a file with one key per line.
fn parse_keys(text: &str) -> Result<Keys, String> {
    if ["ssh-", "ecdsa-", "sk-"].iter().any(|p| text.starts_with(p)) {
        return Ok(Keys(vec![text.trim().to_owned()]));
    }
    let content = read(text, MAX_KEYS_FILE)?;
    if content.contains("PRIVATE KEY") {
        return Err(format!("{text} is a private key; give the public one, {text}.pub"));
    }
    let keys = content.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let keys: Vec<String> = keys.map(str::to_owned).collect();
    if keys.is_empty() { Err(format!("there is no key in {text}")) } else { Ok(Keys(keys)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_from_files_or_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, "# mine\n\nssh-ed25519 AAAA a\nssh-rsa BBBB b\n").unwrap();
        assert_eq!(parse_keys(path.to_str().unwrap()).unwrap().0, ["ssh-ed25519 AAAA a", "ssh-rsa BBBB b"]);
        assert_eq!(parse_keys("ssh-ed25519 AAAA me").unwrap().0, ["ssh-ed25519 AAAA me"]);
        std::fs::write(&path, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        assert!(parse_keys(path.to_str().unwrap()).unwrap_err().contains(".pub"));
    }

    #[test]
    fn a_file_that_is_too_large_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed");
        std::fs::write(&path, "x".repeat(16 << 20)).unwrap();
        assert!(read(path.to_str().unwrap(), MAX_USER_DATA).unwrap_err().contains("at most 65536"));
        std::fs::write(&path, "x".repeat(64 << 10)).unwrap();
        assert!(read(path.to_str().unwrap(), MAX_USER_DATA).is_ok());
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read(path.to_str().unwrap(), MAX_USER_DATA).is_err());
    }
}
