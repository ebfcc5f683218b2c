//! Checks what a VM's cloud-init is told.
//!
//! It is stored with the VM in etcd, which takes 1.5 MiB at once, and it goes to the host with every desired state; so the
//! limits are those of other clouds (64 KiB of user data), far below what a disk could hold.

use uncloud_proto::v1;

use super::Checker;
use crate::model::vm::CloudInit;

const MAX_HOSTNAME: usize = 253;
const MAX_LABEL: usize = 63;
const MAX_KEYS: usize = 32;
const MAX_KEY: usize = 8 * 1024;
/// All keys together: what a host has of all its VMs is sent at once when its session begins.
const MAX_ALL_KEYS: usize = 64 * 1024;
const MAX_USER_DATA: usize = 64 * 1024;
const MAX_NETWORK_CONFIG: usize = 16 * 1024;

pub(super) fn check(check: &mut Checker, c: v1::CloudInit) -> CloudInit {
    if let Err(problem) = hostname(&c.hostname) {
        check.fail("spec.cloud_init.hostname", problem);
    }
    let keys = c.ssh_authorized_keys;
    if keys.len() > MAX_KEYS {
        let problem = format!("has {} entries; at most {MAX_KEYS} are allowed", keys.len());
        check.fail("spec.cloud_init.ssh_authorized_keys", problem);
    }
    let all: usize = keys.iter().map(String::len).sum();
    if all > MAX_ALL_KEYS {
        let problem = format!("has {all} bytes in all; at most {MAX_ALL_KEYS} are allowed");
        check.fail("spec.cloud_init.ssh_authorized_keys", problem);
    }
    for (i, key) in keys.iter().enumerate().take(MAX_KEYS) {
        if let Err(problem) = ssh_key(key) {
            check.fail(format!("spec.cloud_init.ssh_authorized_keys[{i}]"), problem);
        }
    }
    for (field, text, limit) in [
        ("spec.cloud_init.user_data", &c.user_data, MAX_USER_DATA),
        ("spec.cloud_init.network_config", &c.network_config, MAX_NETWORK_CONFIG),
    ] {
        if let Err(problem) = document(text, limit) {
            check.fail(field, problem);
        }
    }
    CloudInit {
        hostname: c.hostname,
        ssh_authorized_keys: keys,
        user_data: c.user_data,
        network_config: c.network_config,
        extra: Default::default(),
    }
}

/// Empty, or a name as RFC 1123 has it.
fn hostname(text: &str) -> Result<(), String> {
    let label = |l: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !l.is_empty() && l.len() <= MAX_LABEL && l.bytes().all(inner) && !l.starts_with('-') && !l.ends_with('-')
    };
    if text.is_empty() || (text.len() <= MAX_HOSTNAME && text.split('.').all(label)) {
        return Ok(());
    }
    Err(format!("must be at most {MAX_HOSTNAME} letters, digits, `-` and `.`, such as `web-1.example.org`"))
}

fn ssh_key(key: &str) -> Result<(), String> {
    if key.len() > MAX_KEY {
        return Err(format!("has {} bytes; at most {MAX_KEY} are allowed", key.len()));
    }
    if key.contains("PRIVATE KEY") {
        return Err("is a private key; give the public one (the file that ends with .pub)".to_owned());
    }
    if key.chars().any(char::is_control) {
        return Err("must be one line; give each key as an entry of its own".to_owned());
    }
    // Options may come first, so only the shape is looked at.
    if key.split_whitespace().count() < 2 {
        return Err("is no public key; give a line such as `ssh-ed25519 AAAA… name`".to_owned());
    }
    Ok(())
}

fn document(text: &str, limit: usize) -> Result<(), String> {
    if text.len() > limit {
        return Err(format!(
            "has {} bytes; at most {limit} are allowed: let it fetch the rest from where the guest can reach it",
            text.len()
        ));
    }
    match text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        Some(bad) => Err(format!("has the control character {}; give it as plain text", bad.escape_debug())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::fields, *};

    fn wrong(change: impl FnOnce(&mut v1::CloudInit)) -> Vec<String> {
        let mut c = v1::CloudInit {
            hostname: "web-1.example.org".into(),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA me".into()],
            user_data: "#cloud-config\n{}\n".into(),
            network_config: "version: 2\n".into(),
        };
        change(&mut c);
        let mut checker = Checker::default();
        let checked = check(&mut checker, c);
        let found = checker.finish(checked);
        if found.is_ok() { Vec::new() } else { fields(found) }
    }

    #[test]
    fn each_bad_input_names_its_field() {
        assert_eq!(wrong(|_| {}), [""; 0]);
        assert_eq!(wrong(|c| *c = v1::CloudInit::default()), [""; 0]);
        let key = "spec.cloud_init.ssh_authorized_keys[0]";
        for bad in ["a_b", "-a", "a-", "a..b", "a b", "ü", &"a".repeat(64), &"a.".repeat(127)] {
            assert_eq!(wrong(|c| c.hostname = bad.to_owned()), ["spec.cloud_init.hostname"], "{bad}");
        }
        for bad in ["", "ssh-rsa", "ssh-rsa AAAA\nssh-rsa BBBB", "-----BEGIN OPENSSH PRIVATE KEY----- x"] {
            assert_eq!(wrong(|c| c.ssh_authorized_keys = vec![bad.to_owned()]), [key], "{bad}");
        }
        assert_eq!(wrong(|c| c.ssh_authorized_keys[0] = format!("ssh-rsa {}", "A".repeat(8192))), [key]);
        let many = wrong(|c| c.ssh_authorized_keys = vec!["ssh-rsa A".into(); 33]);
        assert_eq!(many, ["spec.cloud_init.ssh_authorized_keys"]);
        assert_eq!(wrong(|c| c.user_data = "x".repeat(65_537)), ["spec.cloud_init.user_data"]);
        assert_eq!(wrong(|c| c.user_data = "x".repeat(65_536)), [""; 0]);
        assert_eq!(wrong(|c| c.user_data = "a\0b".into()), ["spec.cloud_init.user_data"]);
        assert_eq!(wrong(|c| c.network_config = "x".repeat(16_385)), ["spec.cloud_init.network_config"]);
    }
}
