//! The guest's agent (the protocol of `qemu-ga`), asked for two things: which addresses the guest has, and to hold its file systems
//! still for the moment in which a snapshot is taken.
//!
//! Everything that comes back is the guest's to choose, and is shown to people: it is bounded in size and time, and what is
//! not an address is left out. Nothing is ever carried out because the guest said so. It is asked only while somebody in the guest
//! has the channel open: QEMU tells. Called by the task behind an [`Instance`](super::instance::Instance).

use std::{io, net::IpAddr, path::Path, time::Duration};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::timeout,
};

use super::{
    command_line::{AGENT_CHARDEV, AGENT_PORT, AGENT_SOCKET},
    files::KeeperRecord,
    instance,
    qmp::Event,
};

/// How often a guest that answers is asked. Addresses rarely change, and each change is a write to etcd.
pub(super) const EVERY: Duration = Duration::from_secs(60);
/// How often one is asked that does not answer.
pub(super) const AGAIN: Duration = Duration::from_secs(10);
/// However often a guest opens and closes the channel, it is not asked more often than this.
pub(super) const AT_LEAST: Duration = Duration::from_secs(2);
/// How long the guest may take for all of it.
const LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to hold its file systems still, or to let them go on. Its VM's task waits meanwhile.
const STILL_LIMIT: Duration = Duration::from_secs(2);
/// How much a guest may say in all. A hundred interfaces take 30 KiB.
const MAX_BYTES: u64 = 256 << 10;
/// Addresses that are kept.
const MAX_ADDRESSES: usize = 16;

/// Whether somebody in the guest has the channel open, by the answer to `query-chardev`.
pub(super) fn is_open(chardevs: &Value) -> bool {
    let mut all = chardevs.as_array().into_iter().flatten();
    all.any(|c| c["label"] == AGENT_CHARDEV && c["frontend-open"] == true)
}

/// What an event says about that. Nothing, if it is about something else.
pub(super) fn opened(event: &Event) -> Option<bool> {
    let ours = event.name == "VSERPORT_CHANGE" && event.data["id"] == AGENT_PORT;
    event.data["open"].as_bool().filter(|_| ours)
}

/// Which addresses the guest has, as it says.
pub(super) async fn addresses(vm_dir: &Path, record: &KeeperRecord) -> io::Result<Vec<IpAddr>> {
    Ok(parse(&ask(vm_dir, record, "guest-network-get-interfaces", LIMIT).await?))
}

/// Has the guest write out its file systems and hold them still.
///
/// # Errors
///
/// It does not say that it has. It may have, or be about to.
pub(super) async fn freeze(vm_dir: &Path, record: &KeeperRecord) -> io::Result<()> {
    obeyed(&ask(vm_dir, record, "guest-fsfreeze-freeze", STILL_LIMIT).await?).map(drop)
}

/// Lets the guest's file systems go on. Of those that go on already: nothing. Returns how many stood still until now.
///
/// # Errors
///
/// It does not say that they do.
pub(super) async fn thaw(vm_dir: &Path, record: &KeeperRecord) -> io::Result<u64> {
    obeyed(&ask(vm_dir, record, "guest-fsfreeze-thaw", STILL_LIMIT).await?)
}

fn obeyed(answer: &Value) -> io::Result<u64> {
    match answer["return"].as_u64() {
        Some(file_systems) => Ok(file_systems),
        None => {
            let words: String = answer["error"]["desc"].as_str().unwrap_or("no answer").chars().take(200).collect();
            Err(io::Error::other(words))
        }
    }
}

async fn ask(vm_dir: &Path, record: &KeeperRecord, command: &str, limit: Duration) -> io::Result<Value> {
    let ask = async {
        let socket = instance::connect_socket(vm_dir, record, AGENT_SOCKET).await?;
        converse(socket, rand::random::<u32>(), command).await
    };
    timeout(limit, ask).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Asks over one connection. `id` tells the answer from what an earlier conversation has left behind.
async fn converse(socket: impl AsyncRead + AsyncWrite, id: u32, command: &str) -> io::Result<Value> {
    let (read, mut write) = tokio::io::split(socket);
    let mut read = BufReader::new(read.take(MAX_BYTES));
    // The byte 0xff ends whatever the agent has heard of before.
    let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    write.write_all(&[&[0xff], format!("{sync}\n").as_bytes()].concat()).await?;
    loop {
        let mut skipped = Vec::new();
        read.read_until(0xff, &mut skipped).await?;
        if skipped.last() != Some(&0xff) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line(&mut read).await?["return"] == id {
            break;
        }
    }
    write.write_all(format!("{}\n", json!({ "execute": command })).as_bytes()).await?;
    line(&mut read).await
}

async fn line(read: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Value> {
    let mut line = Vec::new();
    read.read_until(b'\n', &mut line).await?;
    serde_json::from_slice(&line).map_err(io::Error::from)
}

/// One network interface.
#[derive(Deserialize)]
struct Interface {
    #[serde(default, rename = "ip-addresses")]
    addresses: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    #[serde(rename = "ip-address")]
    text: String,
}

/// The addresses by which others reach the guest: not those of its loopback or of its links. What makes no sense is left out.
fn parse(answer: &Value) -> Vec<IpAddr> {
    let interfaces = answer["return"].as_array().into_iter().flatten();
    let interfaces = interfaces.filter_map(|i| Interface::deserialize(i).ok());
    let all = interfaces.flat_map(|i| i.addresses).filter_map(|a| a.text.parse::<IpAddr>().ok());
    let mut found: Vec<IpAddr> = all.filter(is_reachable).collect();
    // In one order, so that the same addresses are the same report.
    found.sort_unstable();
    found.dedup();
    found.truncate(MAX_ADDRESSES);
    found
}

fn is_reachable(address: &IpAddr) -> bool {
    let on_the_link = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(on_the_link || address.is_loopback() || address.is_unspecified() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    /// A guest that answers the synchronisation with `sync` (`ID` stands for the id) and then `answer`.
    async fn guest(socket: DuplexStream, sync: &str, answer: &[u8]) {
        let mut socket = BufReader::new(socket);
        let mut heard = Vec::new();
        socket.read_until(b'\n', &mut heard).await.unwrap();
        assert_eq!(heard[0], 0xff);
        let asked: Value = serde_json::from_slice(&heard[1..]).unwrap();
        let mut said = Vec::new();
        for part in sync.replace("ID", &asked["arguments"]["id"].to_string()).split('|') {
            said.push(0xff);
            said.extend_from_slice(part.as_bytes());
        }
        let _ = socket.write_all(&said).await;
        heard.clear();
        socket.read_until(b'\n', &mut heard).await.unwrap();
        let _ = socket.write_all(answer).await;
    }

    async fn ask(sync: &str, answer: &[u8]) -> io::Result<Vec<IpAddr>> {
        let (ours, theirs) = tokio::io::duplex(1024);
        let asked = converse(ours, 42, "guest-network-get-interfaces");
        let (found, ()) = tokio::join!(asked, guest(theirs, sync, answer));
        Ok(parse(&found?))
    }

    const SYNC: &str = "{\"return\": ID}\n";

    #[tokio::test]
    async fn addresses_that_others_can_use_are_found() {
        let answer = br#"{"return": [
            {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8}, {"ip-address": "::1"}]},
            {"name": "eth0", "hardware-address": "42:00:00:00:00:01", "ip-addresses": [
              {"ip-address": "fe80::1"}, {"ip-address": "2001:db8::5"}, {"ip-address": "10.0.2.15", "prefix": 24}]},
            {"name": "eth1"}]}"#;
        let answer: Vec<u8> = answer.iter().copied().filter(|b| *b != b'\n').chain(*b"\n").collect();
        let found = ask(SYNC, &answer).await.unwrap();
        assert_eq!(found, ["10.0.2.15".parse::<IpAddr>().unwrap(), "2001:db8::5".parse().unwrap()]);
    }

    #[tokio::test]
    async fn what_an_earlier_conversation_has_left_behind_is_skipped() {
        let found = ask("{\"return\": 7}\n|{\"return\": ID}\n", b"{\"return\": []}\n").await.unwrap();
        assert_eq!(found, [] as [IpAddr; 0]);
    }

    #[tokio::test]
    async fn whatever_a_guest_says_what_comes_out_is_few_addresses() {
        let hostile: [&[u8]; 9] = [
            b"",
            b"\n",
            b"nonsense\n",
            b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"x\"}}\n",
            b"{\"return\": 5}\n",
            b"{\"return\": [5, null, {\"ip-addresses\": 5}, {\"ip-addresses\": [{\"ip-address\": 5}]}]}\n",
            b"{\"return\": [{\"ip-addresses\": [{\"ip-address\": \"1.2.3.4; rm -rf /\"}]}]}\n",
            b"{\"return\": [{\"ip-addresses\": [{\"ip-address\": \"\\u001b[2J\"}, {\"ip-address\": \"0.0.0.0\"}]}]}\n",
            &[0xff, 0xfe, b'\n'],
        ];
        for answer in hostile {
            let found = ask(SYNC, answer).await.unwrap_or_default();
            assert_eq!(found, [] as [IpAddr; 0], "{}", String::from_utf8_lossy(answer));
        }
        // As deep as it likes.
        let deep = [b"[".repeat(100_000), b"\n".to_vec()].concat();
        assert!(ask(SYNC, &deep).await.is_err());
        let many: Vec<Value> =
            (0..5000).map(|i| json!({ "ip-address": format!("10.1.{}.{}", i / 250, i % 250) })).collect();
        let many = format!("{}\n", json!({ "return": [{ "ip-addresses": many }] }));
        assert_eq!(ask(SYNC, many.as_bytes()).await.unwrap().len(), MAX_ADDRESSES);
    }

    #[tokio::test]
    async fn a_guest_that_talks_without_end_is_not_listened_to_for_ever() {
        let endless = "x".repeat(2 * usize::try_from(MAX_BYTES).unwrap());
        assert!(ask(SYNC, endless.as_bytes()).await.is_err());
        assert!(ask(&endless, b"").await.is_err());
    }

    #[test]
    fn only_a_number_says_that_the_guest_has_obeyed() {
        assert!(obeyed(&json!({ "return": 2 })).is_ok() && obeyed(&json!({ "return": 0 })).is_ok());
        for answer in [json!({}), json!({ "return": "2" }), json!({ "return": {} }), json!(5), Value::Null] {
            assert!(obeyed(&answer).is_err(), "{answer}");
        }
        let error = json!({ "error": { "class": "CommandNotFound", "desc": "x".repeat(1000) } });
        assert_eq!(obeyed(&error).unwrap_err().to_string().len(), 200);
    }

    #[test]
    fn who_has_the_channel_open_is_told_by_qemu() {
        let chardevs = |open: bool| json!([{ "label": "qmp0" }, { "label": "agent0", "frontend-open": open }]);
        assert!(is_open(&chardevs(true)));
        assert!(!is_open(&chardevs(false)) && !is_open(&json!([])) && !is_open(&Value::Null));
        let event = |name: &str, id: &str| Event { name: name.into(), data: json!({ "id": id, "open": true }) };
        assert_eq!(opened(&event("VSERPORT_CHANGE", "agentport0")), Some(true));
        assert_eq!(opened(&event("VSERPORT_CHANGE", "other")), None);
        assert_eq!(opened(&event("RESET", "agentport0")), None);
    }
}
