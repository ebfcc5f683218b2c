//! Asks a QEMU what its guest does, past uncloud: on the QMP socket that is left for a person.
//!
//! Blocking, and short: a QEMU that does not answer within [`LIMIT`] is one that does not execute at this moment.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

/// How long QEMU may take. It takes a millisecond.
const LIMIT: Duration = Duration::from_millis(300);
/// The socket that the agent takes last.
const SOCKET: &str = "run/qmp2.sock";

/// QEMU's word for what its guest does, as `running`. `None`: it does not say.
#[must_use]
pub fn status(vm_dir: &Path) -> Option<String> {
    let stream = UnixStream::connect(vm_dir.join(SOCKET)).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    stream.set_write_timeout(Some(LIMIT)).ok()?;
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    lines.next()?.ok()?; // the greeting
    for command in ["qmp_capabilities", "query-status"] {
        let mut line = json!({ "execute": command }).to_string();
        line.push('\n');
        (&stream).write_all(line.as_bytes()).ok()?;
        let answer = loop {
            let message: Value = serde_json::from_str(&lines.next()?.ok()?).ok()?;
            if message.get("event").is_none() {
                break message;
            }
        };
        if let Some(status) = answer["return"]["status"].as_str() {
            return Some(status.to_owned());
        }
    }
    None
}
