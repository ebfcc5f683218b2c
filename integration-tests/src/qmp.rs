//! Talks with a QEMU past uncloud, on the QMP sockets that the agent does not use while it can use its first.
//!
//! Blocking, and short: a QEMU that does not answer within [`LIMIT`] is one that does not execute at this moment.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
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

/// The socket for a [`Monitor`]: neither the agent's first nor the checker's.
pub const MONITOR: &str = "run/qmp1.sock";
/// How long a command of a [`Monitor`] may take on a busy machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// An event of QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// What it says.
    pub data: Value,
    /// When it happened, by QEMU's own clock, which is the machine's: since 1970.
    pub at: Duration,
}

/// A connection to a QEMU that lasts, and keeps its events.
pub struct Monitor {
    reader: BufReader<UnixStream>,
    line: Vec<u8>,
    events: Vec<Event>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    ///
    /// QEMU is not there (yet), or somebody else is connected.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_write_timeout(Some(COMMAND_LIMIT))?;
        let mut monitor = Self { reader: BufReader::new(stream), line: Vec::new(), events: Vec::new() };
        ensure!(monitor.next(Instant::now() + COMMAND_LIMIT)?.is_some(), "QEMU does not greet");
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Has a command carried out; returns its answer.
    ///
    /// # Errors
    ///
    /// QEMU refuses it, is gone, or takes too long.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes())?;
        let until = Instant::now() + COMMAND_LIMIT;
        while let Some(answer) = self.next(until)? {
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
        bail!("{command}: no answer")
    }

    /// Forgets the events so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// The first event so far, or within the limit, that `test` holds for.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn wait_event(&mut self, what: &str, limit: Duration, test: impl Fn(&Event) -> bool) -> anyhow::Result<Event> {
        let until = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.iter().find(|e| test(e)) {
                return Ok(event.clone());
            }
            ensure!(self.next(until)?.is_some(), "no {what} within {limit:?}: {:?}", self.events);
        }
    }

    /// The next message. Events are kept, too. `None`: none came in time, or QEMU has ended.
    fn next(&mut self, until: Instant) -> anyhow::Result<Option<Value>> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        self.reader.get_mut().set_read_timeout(Some(left))?;
        match self.reader.read_until(b'\n', &mut self.line) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let message: Value = serde_json::from_slice(&std::mem::take(&mut self.line))?;
        if let Some(name) = message["event"].as_str() {
            let number = |field: &str| message["timestamp"][field].as_u64().unwrap_or(0);
            let at = Duration::from_secs(number("seconds")) + Duration::from_micros(number("microseconds"));
            self.events.push(Event { name: name.to_owned(), data: message["data"].clone(), at });
        }
        Ok(Some(message))
    }
}
