//! What goes over a QMP socket: one JSON object a line (pure).

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// The first line: QEMU serves this connection now.
    Greeting,
    /// The answer to the command with this id.
    Reply { id: u64, result: Result<Value, CommandError> },
    /// Something happened.
    Event(Event),
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, as `SHUTDOWN`.
    pub name: String,
    /// What it says; null if nothing.
    pub data: Value,
}

/// Why QEMU did not carry out a command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct CommandError {
    pub(super) class: String,
    pub(super) desc: String,
}

/// Reads a line. The error says what is wrong with it.
pub(super) fn parse(line: &str) -> Result<Message, String> {
    let mut line: Map<String, Value> = serde_json::from_str(line).map_err(|e| e.to_string())?;
    if line.contains_key("QMP") {
        return Ok(Message::Greeting);
    }
    if let Some(name) = line.get("event") {
        let name = name.as_str().ok_or("an event's name is no string")?.to_owned();
        return Ok(Message::Event(Event { name, data: line.remove("data").unwrap_or(Value::Null) }));
    }
    let error =
        line.remove("error").map(serde_json::from_value::<CommandError>).transpose().map_err(|e| e.to_string())?;
    let result = match (line.remove("return"), error) {
        (Some(value), None) => Ok(value),
        // Without an id when QEMU could not even parse the command: nobody would be told, so it is an error here.
        (None, Some(error)) => Err(error),
        (Some(_), Some(_)) | (None, None) => return Err("neither an answer nor an event".to_owned()),
    };
    let id = line.get("id").and_then(Value::as_u64).ok_or("an answer to no command of ours")?;
    Ok(Message::Reply { id, result })
}

/// When QEMU carries a command out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// After those before it, by the thread that does everything else.
    InOrder,
    /// At once, by another thread (out-of-band, a few commands only).
    AtOnce,
}

/// A command as a line.
pub(super) fn command(name: &str, arguments: Option<Value>, turn: Turn, id: u64) -> String {
    let key = match turn {
        Turn::InOrder => "execute",
        Turn::AtOnce => "exec-oob",
    };
    let mut line = json!({ key: name, "id": id });
    if let Some(arguments) = arguments {
        line["arguments"] = arguments;
    }
    line.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_qemu_says_is_understood() {
        let greeting =
            r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
        assert_eq!(parse(greeting), Ok(Message::Greeting));
        assert_eq!(parse(r#"{"return": {}, "id": 3}"#), Ok(Message::Reply { id: 3, result: Ok(json!({})) }));
        let refused = r#"{"id": 4, "error": {"class": "GenericError", "desc": "no"}}"#;
        let error = CommandError { class: "GenericError".into(), desc: "no".into() };
        assert_eq!(parse(refused), Ok(Message::Reply { id: 4, result: Err(error) }));
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}"#;
        assert_eq!(parse(event), Ok(Message::Event(Event { name: "SHUTDOWN".into(), data: json!({"guest": true}) })));
        assert_eq!(parse(r#"{"event": "STOP"}"#), Ok(Message::Event(Event { name: "STOP".into(), data: Value::Null })));
    }

    #[test]
    fn commands_are_lines() {
        assert_eq!(command("quit", None, Turn::InOrder, 1), r#"{"execute":"quit","id":1}"#);
        assert_eq!(command("yank", None, Turn::AtOnce, 1), r#"{"exec-oob":"yank","id":1}"#);
        assert_eq!(
            command("a", Some(json!({"b": "\n"})), Turn::InOrder, 2),
            r#"{"arguments":{"b":"\n"},"execute":"a","id":2}"#
        );
    }

    proptest! {
        #[test]
        fn nonsense_is_an_error_and_never_a_panic(line in r#"(\{"(QMP|event|return|error|id)": ?(1|"x"|\{\}|\[|null)[,}]){0,3}.{0,40}"#) {
            let _ = parse(&line);
        }
    }
}
