//! A client that knows nothing of uncloud but what server reflection tells it, and tools that only know etcd.

use std::process::{Command, Stdio};

use harness::{api::incarnation_of, paths, prelude::*};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_made_from_reflection_creates_watches_and_deletes_a_vm() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let script = paths::source_root().join("integration-tests/third_party/client.py");
    let mut command = tokio::process::Command::new(paths::python()?);
    command.arg(script).args([cluster.api.endpoint(), specs::MICRO]).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(secs(90), command.output()).await.context("the client did not end")??;
    let (told, complaints) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("{told}");
    ensure!(output.status.success(), "{complaints}");
    for step in ["health SERVING", "created", "running", "refused", "gone"] {
        assert!(told.lines().any(|l| l.starts_with(step)), "no `{step}` in:\n{told}");
    }
    cluster.finish().await
}

/// What a person sees with etcd's own tool. (DESIGN: "a person with `etcdctl get --prefix` must understand the cluster")
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_shows_owner_host_and_incarnation_as_json() -> anyhow::Result<()> {
    let cluster = Options::hosts(1).start().await?;
    let mut request = specs::micro("plain");
    request.owner = "alice".into();
    let vm = cluster.run(request).await?;
    let hosts = cluster.api.list_hosts().await?;

    let etcd = cluster.etcd.as_ref().context("an etcd")?;
    let get = |prefix: &str| -> anyhow::Result<Vec<(String, serde_json::Value)>> {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", etcd.endpoint(), "get", "--prefix", prefix])
            .output()
            .context("run etcdctl (`make setup` installs it)")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).context("what is stored is text")?;
        let lines: Vec<&str> = text.lines().collect();
        let pairs = lines.chunks(2).map(|pair| match pair {
            [key, value] => Ok(((*key).to_owned(), serde_json::from_str(value).context("JSON")?)),
            other => bail!("not a key and a value: {other:?}"),
        });
        pairs.collect()
    };
    let vms = get("/uncloud/v1/vms/")?;
    assert_eq!(vms.len(), 1);
    let (key, record) = &vms[0];
    assert_eq!(key, &format!("/uncloud/v1/vms/{}", vm.id));
    assert_eq!(record["owner"], "alice");
    assert_eq!(record["name"], "plain");
    assert_eq!(record["desired"], "running");
    assert_eq!(record["placement"]["host"], hosts[0].id.as_str());
    assert_eq!(record["placement"]["incarnation"], incarnation_of(&vm));
    assert!(record["placement"]["why"].as_str().is_some_and(|w| !w.is_empty()), "{record}");
    assert_eq!(record["spec"]["memory_mib"], 16);

    let status = get(&format!("/uncloud/v1/vm-status/{}", vm.id))?;
    assert_eq!(status[0].1["phase"], "running", "{status:?}");
    let host = get("/uncloud/v1/hosts/")?;
    assert_eq!(host[0].1["name"], "host-1", "{host:?}");
    assert!(!get("/uncloud/v1/leader")?.is_empty() && !get("/uncloud/v1/events/")?.is_empty());
    cluster.finish().await
}
