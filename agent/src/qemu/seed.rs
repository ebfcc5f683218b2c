//! The disk that a guest's cloud-init reads (datasource NoCloud): a FAT file system with the label CIDATA.
//!
//! [`image`] is pure: the same input gives the same bytes, so the seed is the same on whichever host the VM starts. The instance
//! id is the VM's, and stays for its whole life: cloud-init does what it does once per instance, once.

use std::{
    fs,
    io::{self, Cursor, Write},
    os::unix::fs::{OpenOptionsExt, fchown},
    path::Path,
};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::json;
use uncloud_proto::ids::VmId;

use crate::vm::desired::CloudInit;

/// Name of the file in the VM's directory.
pub const FILE: &str = "seed.img";
/// What cloud-init looks for.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Size of the file system. All that may be in it is less than half of this, as the session checks.
const SIZE: usize = 2 << 20;

/// Writes the seed of a VM into its directory, which belongs to root. `group` may read it, and nobody else: user data often has
/// secrets in it.
///
/// # Errors
///
/// It cannot be written.
pub fn write(vm_dir: &Path, vm: VmId, name: &str, cloud_init: &CloudInit, group: Option<u32>) -> io::Result<()> {
    let bytes = image(vm, name, cloud_init)?;
    fs::create_dir_all(vm_dir)?;
    let temporary = vm_dir.join(format!(".{FILE}.tmp"));
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    let mut file = fs::File::options().write(true).create_new(true).mode(0o640).open(&temporary)?;
    file.write_all(&bytes)?;
    if group.is_some() {
        fchown(&file, None, group)?;
    }
    fs::rename(&temporary, vm_dir.join(FILE))
}

/// The file system.
///
/// # Errors
///
/// What is to be in it does not fit.
pub fn image(vm: VmId, name: &str, cloud_init: &CloudInit) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE];
    let id = u32::from_be_bytes(vm.uuid().as_bytes()[..4].try_into().expect("a UUID has 16 bytes"));
    let options = FormatVolumeOptions::new().volume_label(LABEL).volume_id(id);
    fatfs::format_volume(Cursor::new(&mut bytes), options)?;
    let system = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new())?;
    for (file, content) in files(vm, name, cloud_init) {
        let mut file = system.root_dir().create_file(file)?;
        file.write_all(content.as_bytes())?;
        file.flush()?;
    }
    system.unmount()?;
    Ok(bytes)
}

/// Names and contents. Both `meta-data` and `user-data` must be there for cloud-init to take it.
fn files(vm: VmId, name: &str, cloud_init: &CloudInit) -> Vec<(&'static str, String)> {
    let hostname = match cloud_init.hostname.as_str() {
        "" => from_name(name),
        hostname => hostname.to_owned(),
    };
    // JSON is YAML, and nothing in it can be taken for anything else.
    let meta = json!({
        "instance-id": vm.to_string(),
        "local-hostname": hostname,
        "public-keys": cloud_init.ssh_authorized_keys,
    });
    let user_data = match cloud_init.user_data.as_str() {
        "" => "#cloud-config\n{}\n",
        given => given,
    };
    let mut files = vec![("meta-data", format!("{meta:#}\n")), ("user-data", user_data.to_owned())];
    if !cloud_init.network_config.is_empty() {
        files.push(("network-config", cloud_init.network_config.clone()));
    }
    files
}

/// A VM's name as a host name: what may not be in one becomes `-`.
fn from_name(name: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    name.chars().map(fit).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn vm() -> VmId {
        "1a2b3c4d-0000-4000-8000-000000000abc".parse().unwrap()
    }

    fn read(bytes: &[u8], name: &str) -> Option<String> {
        let mut bytes = bytes.to_vec();
        let system = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).unwrap();
        assert_eq!(system.volume_label(), "CIDATA");
        let mut text = String::new();
        system.root_dir().open_file(name).ok()?.read_to_string(&mut text).unwrap();
        Some(text)
    }

    #[test]
    fn a_seed_is_read_back_and_is_the_same_each_time() {
        let cloud_init = CloudInit {
            hostname: String::new(),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA \"me\": {x}".into()],
            user_data: "#!/bin/sh\necho hi\n".into(),
            network_config: "version: 2\n".into(),
        };
        let bytes = image(vm(), "web_1", &cloud_init).unwrap();
        assert_eq!(bytes, image(vm(), "web_1", &cloud_init).unwrap());
        let meta: serde_json::Value = serde_json::from_str(&read(&bytes, "meta-data").unwrap()).unwrap();
        assert_eq!(meta["instance-id"], vm().to_string());
        assert_eq!(meta["local-hostname"], "web-1");
        assert_eq!(meta["public-keys"][0], cloud_init.ssh_authorized_keys[0]);
        assert_eq!(read(&bytes, "user-data").unwrap(), cloud_init.user_data);
        assert_eq!(read(&bytes, "network-config").unwrap(), cloud_init.network_config);
    }

    #[test]
    fn an_empty_one_has_what_cloud_init_insists_on() {
        let bytes = image(vm(), "web", &CloudInit::default()).unwrap();
        assert!(read(&bytes, "user-data").unwrap().starts_with("#cloud-config"));
        assert_eq!(read(&bytes, "network-config"), None);
    }

    #[test]
    fn the_largest_that_a_session_takes_fits() {
        let cloud_init = CloudInit { user_data: "\u{1}".repeat(512 * 1024), ..CloudInit::default() };
        let bytes = image(vm(), "web", &cloud_init).unwrap();
        assert_eq!(read(&bytes, "user-data").unwrap().len(), 512 * 1024);
        let keys = CloudInit { ssh_authorized_keys: vec!["\\".repeat(512 * 1024)], ..CloudInit::default() };
        assert!(image(vm(), "web", &keys).is_ok());
        let too_much = CloudInit { user_data: "x".repeat(16 << 20), ..CloudInit::default() };
        assert!(image(vm(), "web", &too_much).is_err());
    }
}
