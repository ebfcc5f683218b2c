//! Which CPU the guests of this host can have. QEMU says it, for the way in which they execute here.

use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    time::timeout,
};
use tracing::warn;
use uncloud_proto::{cpu::Level, v1};

use super::AcceleratorChoice;

/// How long QEMU may take. It takes 50 ms; an agent that is started again has VMs whose lease runs.
const LIMIT: Duration = Duration::from_secs(2);
/// What QEMU may say at most, in bytes. It says some 10 KiB.
const MAX_ANSWER: u64 = 1 << 20;
/// What is asked. QEMU reads one line after the other.
const QUESTIONS: &str = r#"{"execute":"qmp_capabilities"}
{"execute":"query-cpu-model-expansion","arguments":{"type":"full","model":{"name":"max"}}}
{"execute":"quit"}
"#;

/// Asks QEMU, and the kernel. What cannot be found out is empty: then the host is given no guest that needs it.
pub async fn cpu(qemu: &Path, choice: AcceleratorChoice) -> v1::Cpu {
    let features = match timeout(LIMIT, ask(qemu, choice)).await {
        Ok(Ok(answer)) => features(&answer),
        Ok(Err(problem)) => Err(problem.to_string()),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    };
    let features = features.unwrap_or_else(|problem| {
        warn!("QEMU does not say which CPU features guests can have: {problem}");
        BTreeSet::new()
    });
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let (name, fingerprint) = match choice {
        AcceleratorChoice::Kvm => (field(&info, "model name").to_owned(), fingerprint(&info)),
        // It has nothing of the host's.
        AcceleratorChoice::Tcg => ("QEMU's translator".to_owned(), String::new()),
    };
    v1::Cpu { name, features: features.into_iter().collect(), fingerprint }
}

async fn ask(qemu: &Path, choice: AcceleratorChoice) -> std::io::Result<String> {
    let accelerator = match choice {
        AcceleratorChoice::Kvm => "kvm",
        AcceleratorChoice::Tcg => "tcg",
    };
    let mut child = Command::new(qemu)
        .args(["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio", "-accel"])
        .arg(accelerator)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut questions), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("no pipe"));
    };
    questions.write_all(QUESTIONS.as_bytes()).await?;
    let mut text = String::new();
    answers.take(MAX_ANSWER).read_to_string(&mut text).await?;
    child.wait().await?;
    Ok(text)
}

/// Which of the features that any CPU model needs are there.
fn features(answers: &str) -> Result<BTreeSet<String>, String> {
    let answers = answers.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut refusal = "QEMU said nothing about it".to_owned();
    for answer in answers {
        if let Some(features) = answer["return"]["model"]["props"].as_object() {
            let has = |feature: &&str| features.get(*feature).and_then(Value::as_bool) == Some(true);
            return Ok(Level::V4.features().filter(has).map(str::to_owned).collect());
        }
        if let Some(words) = answer["error"]["desc"].as_str() {
            refusal = words.chars().take(200).collect();
        }
    }
    Err(refusal)
}

/// The same for CPUs that are the same in everything that a guest can see.
fn fingerprint(cpuinfo: &str) -> String {
    let mut hasher = Sha256::new();
    for name in ["vendor_id", "cpu family", "model", "stepping", "flags"] {
        let value = field(cpuinfo, name);
        if value.is_empty() {
            return String::new();
        }
        hasher.update(value);
        hasher.update("\n");
    }
    hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// A field of the first processor.
fn field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim_end() == name).map_or("", |(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_is_taken() {
        let answers = r#"{"QMP": {}}
{"return": {}}
{"return": {"model": {"name": "max", "props": {"avx2": true, "avx512f": false, "3dnow": true, "aes": true, "fma": 7}}}}
{"return": {}}"#;
        assert_eq!(features(answers), Ok(["aes", "avx2"].map(String::from).into()));
        let refused = r#"{"error": {"class": "GenericError", "desc": "not for this target"}}"#;
        assert_eq!(features(refused), Err("not for this target".to_owned()));
        assert!(features("nonsense").is_err());
    }

    #[test]
    fn cpus_are_the_same_when_all_that_a_guest_sees_is() {
        let info = |flags: &str| {
            format!(
                "processor\t: 0\nvendor_id\t: V\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: A CPU\nstepping\t: 7\nflags\t\t: {flags}\n"
            )
        };
        assert_eq!((field(&info("a b"), "model"), field(&info("a b"), "model name")), ("85", "A CPU"));
        assert_eq!(fingerprint(&info("a b")), fingerprint(&info("a b")));
        assert_ne!(fingerprint(&info("a b")), fingerprint(&info("a")));
        assert_eq!(fingerprint("processor: 0"), "");
    }

    /// What every host must have, QEMU's translator has.
    #[tokio::test]
    async fn qemus_translator_has_the_baseline() {
        let cpu = cpu(Path::new("qemu-system-x86_64"), AcceleratorChoice::Tcg).await;
        let lacks: Vec<&str> = Level::V2.features().filter(|f| !cpu.features.iter().any(|has| has == f)).collect();
        assert!(lacks.is_empty(), "{lacks:?}");
    }
}
