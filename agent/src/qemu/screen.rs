//! A VM's screen: a connection to QEMU's VNC server, and a picture of what it shows.
//!
//! The VNC server listens on a socket in the VM's directory and on nothing else. It never waits for its clients: what a slow one
//! does not take is painted over before it is sent, so nobody who looks on can stall the guest. It has no password: whoever may
//! open that socket (the agent, the VM's own user) may do anything to the VM anyway, and users come through the
//! controller.

use std::{
    io::{self, Read},
    path::Path,
};

use rustix::fs::{AtFlags, OFlags};
use serde_json::json;
use tokio::{net::UnixStream, task::spawn_blocking, time::timeout};

use super::{
    command_line::{QMP_SOCKETS, VNC_SOCKET},
    files::{self, KeeperRecord},
    instance::{self, Link},
    qmp,
};

/// How long QEMU may take to accept a connection.
const CONNECT_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);
/// The file that QEMU makes in the `run` directory.
const PICTURE: &str = "screen.png";
/// The largest picture that is taken, in bytes. The card has 16 MiB of memory, and a PNG of noise is a little larger than that.
pub const MAX_PICTURE: u64 = 32 << 20;
/// What every PNG file begins with.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// Why there is no screen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No QEMU of this VM runs here, or it does not answer.
    #[error("the VM does not run here at the moment")]
    NotRunning,
    /// It was started without one.
    #[error("the VM has no screen; give it one with `display: standard`, which counts from its next start on")]
    NoScreen,
    /// QEMU did not take the picture.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// The picture is not what QEMU makes.
    #[error("the picture of the screen is no PNG file of at most {MAX_PICTURE} bytes")]
    NoPicture,
    /// Something could not be opened or read.
    #[error("the screen cannot be reached")]
    Io(#[from] io::Error),
}

/// Connects to the VNC server of the VM whose directory this is.
///
/// # Errors
///
/// It does not run here, or has no screen.
pub async fn connect_vnc(vm_dir: &Path) -> Result<UnixStream, Error> {
    let record = record(vm_dir)?;
    match timeout(CONNECT_LIMIT, instance::connect_socket(vm_dir, &record, VNC_SOCKET)).await {
        Ok(Ok(socket)) => Ok(socket),
        Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => Err(Error::NoScreen),
        // The socket of a QEMU that has ended.
        Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => Err(Error::NotRunning),
        Ok(Err(e)) => Err(e.into()),
        Err(_) => Err(Error::NotRunning),
    }
}

/// Takes a picture of what the screen shows now: a PNG file of at most [`MAX_PICTURE`] bytes. One at a time per VM.
///
/// # Errors
///
/// It does not run here, or has no screen.
pub async fn picture(vm_dir: &Path) -> Result<Vec<u8>, Error> {
    // Says whether there is a screen before QEMU has to.
    drop(connect_vnc(vm_dir).await?);
    let record = record(vm_dir)?;
    let (client, _events) = connect_spare(vm_dir, &record).await.ok_or(Error::NotRunning)?;
    client.execute("screendump", Some(json!({ "filename": PICTURE, "format": "png" }))).await?;
    let vm_dir = vm_dir.to_owned();
    spawn_blocking(move || take(&vm_dir)).await.map_err(io::Error::other)?
}

fn record(vm_dir: &Path) -> Result<KeeperRecord, Error> {
    files::read_any_keeper(vm_dir).ok_or(Error::NotRunning)
}

/// Connects to a QMP socket, from the last one on: the first is that of the agent's own connection, and would be waited for.
async fn connect_spare(vm_dir: &Path, record: &KeeperRecord) -> Option<Link> {
    for index in (0..QMP_SOCKETS).rev() {
        match instance::connect(vm_dir, record, index).await {
            Ok(link) => return Some(link),
            Err(e) => tracing::debug!(vm = %record.vm, index, error = %e, "no QMP connection for a picture"),
        }
    }
    None
}

/// Reads the picture and removes it. A guest that broke out of its QEMU may have put anything in its place.
fn take(vm_dir: &Path) -> Result<Vec<u8>, Error> {
    let file = files::open_in_run(vm_dir, PICTURE, OFlags::RDONLY);
    rustix::fs::unlinkat(files::run_dir(vm_dir)?, PICTURE, AtFlags::empty()).map_err(io::Error::from)?;
    let mut bytes = Vec::new();
    file?.take(MAX_PICTURE + 1).read_to_end(&mut bytes)?;
    if bytes.starts_with(PNG) && bytes.len() as u64 <= MAX_PICTURE { Ok(bytes) } else { Err(Error::NoPicture) }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[tokio::test]
    async fn a_vm_that_does_not_run_has_no_screen() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(connect_vnc(dir.path()).await, Err(Error::NotRunning)));
        assert!(matches!(picture(dir.path()).await, Err(Error::NotRunning)));
    }

    #[test]
    fn a_picture_is_taken_once_and_only_if_it_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join(PICTURE);
        fs::create_dir(dir.path().join("run")).unwrap();
        assert!(take(dir.path()).is_err());
        fs::write(&path, [PNG, b"rest"].concat()).unwrap();
        assert_eq!(take(dir.path()).unwrap(), [PNG, b"rest"].concat());
        assert!(!path.exists());

        fs::write(dir.path().join("secret"), [PNG, b"secret"].concat()).unwrap();
        symlink("../secret", &path).unwrap();
        assert!(take(dir.path()).is_err());
        assert!(dir.path().join("secret").exists());
        fs::write(&path, "no picture").unwrap();
        assert!(matches!(take(dir.path()), Err(Error::NoPicture)));
        fs::File::create(&path).unwrap().set_len(MAX_PICTURE + 1).unwrap();
        assert!(matches!(take(dir.path()), Err(Error::NoPicture)));
        assert!(!path.exists());
    }
}
