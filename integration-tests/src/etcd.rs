//! A private etcd for one test, on picked ports. It can be killed and started again with its data, each member by itself.
//!
//! etcd does not come up when told to take any free port (it dials its own port 0), so free ports are picked
//! first, and the start is tried again in case somebody else took one.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use etcd_client::{Client, ConnectOptions};

use crate::{
    logs,
    ports::free_port,
    process::{Process, Signal, Spec},
    wait_for,
};

/// Far longer than a start takes: to hit it means that something is wrong.
const START_LIMIT: Duration = Duration::from_secs(30);
const ATTEMPTS: u32 = 5;
/// How long a member that answers at all may take for it.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Whether etcd waits for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// As in production.
    On,
    /// Faster; survives the death of the process, not of the machine.
    Off,
}

/// A private etcd: one member, or a cluster of several.
pub struct TestEtcd {
    endpoint: String,
    members: Vec<Member>,
}

/// One member of a [`TestEtcd`].
pub struct Member {
    process: Process,
    endpoint: String,
}

impl TestEtcd {
    /// Starts one of one member that keeps its data and its log in `dir`.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub async fn start(dir: &Path, fsync: Fsync) -> anyhow::Result<Self> {
        Self::start_members(dir, fsync, 1, &[]).await
    }

    /// Starts one of `n` members with further flags.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub async fn start_members(dir: &Path, fsync: Fsync, n: usize, flags: &[String]) -> anyhow::Result<Self> {
        let mut last = anyhow::anyhow!("no attempt");
        for attempt in 0..ATTEMPTS {
            match Self::try_start(dir, fsync, attempt, n, flags).await {
                Ok(etcd) => return Ok(etcd),
                Err(error) => last = error,
            }
        }
        Err(last.context("start etcd"))
    }

    /// The addresses of all members: `http://127.0.0.1:port`, with commas between them.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The members.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// One member, counted from 0.
    pub fn member(&mut self, n: usize) -> &mut Member {
        &mut self.members[n]
    }

    /// A client of its own, of the first member, with a limit on every request.
    ///
    /// # Errors
    ///
    /// It cannot connect.
    pub async fn client(&self) -> anyhow::Result<Client> {
        self.members[0].client().await
    }

    /// SIGKILL to all members.
    pub fn kill(&mut self) {
        self.members.iter_mut().for_each(Member::kill);
    }

    /// Sends all members a signal, such as SIGSTOP.
    ///
    /// # Errors
    ///
    /// One does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.members.iter().try_for_each(|m| m.signal(signal))
    }

    /// Starts all members again on the same ports with the same data.
    ///
    /// # Errors
    ///
    /// One does not serve.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        for member in &mut self.members {
            member.process.start_again()?;
        }
        self.wait_serving().await
    }

    /// Which member leads, counted from 0, as a majority of them says at this moment.
    ///
    /// # Errors
    ///
    /// None does, or no majority answers.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let asked = futures_util::future::join_all(self.members.iter().map(Member::status)).await;
        let answers: Vec<(usize, Status)> =
            asked.into_iter().enumerate().filter_map(|(i, status)| Some((i, status.ok()?))).collect();
        ensure!(answers.len() * 2 > self.members.len(), "{} of {} members answer", answers.len(), self.members.len());
        let leads = |(_, status): &&(usize, Status)| {
            let votes = answers.iter().filter(|(_, s)| s.leader == status.id && s.term == status.term).count();
            votes * 2 > self.members.len()
        };
        answers.iter().find(leads).map(|(i, _)| *i).with_context(|| format!("nobody leads: {answers:?}"))
    }

    /// The value of a key, asked of the first member that answers. Linearizable.
    ///
    /// # Errors
    ///
    /// No member answers.
    pub async fn get(&self, key: &str) -> anyhow::Result<Option<String>> {
        let mut last = anyhow::anyhow!("no member");
        for member in &self.members {
            let asked = async {
                let answer = member.client().await?.get(key, None).await?;
                anyhow::Ok(answer.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
            };
            match tokio::time::timeout(ANSWER_LIMIT, asked).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => last = error,
                Err(_) => last = anyhow::anyhow!("{} does not answer", member.endpoint),
            }
        }
        Err(last.context(format!("read {key}")))
    }

    async fn try_start(dir: &Path, fsync: Fsync, attempt: u32, n: usize, flags: &[String]) -> anyhow::Result<Self> {
        let ports = || -> anyhow::Result<(String, String)> {
            Ok((format!("http://127.0.0.1:{}", free_port()?), format!("http://127.0.0.1:{}", free_port()?)))
        };
        let urls = (0..n).map(|_| ports()).collect::<anyhow::Result<Vec<_>>>()?;
        let cluster: Vec<String> = urls.iter().enumerate().map(|(i, (_, peer))| format!("m{i}={peer}")).collect();
        let cluster = cluster.join(",");
        let mut members = Vec::new();
        for (i, (endpoint, peer)) in urls.into_iter().enumerate() {
            let name = format!("m{i}");
            let data = dir.join(format!("data-{attempt}-{i}"));
            let mut args: Vec<_> = ["--data-dir".into(), data.into_os_string()].into();
            args.extend(["--name", &name, "--initial-cluster", &cluster, "--log-level", "warn"].map(Into::into));
            args.extend(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint].map(Into::into));
            args.extend(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer].map(Into::into));
            args.extend(flags.iter().map(Into::into));
            if fsync == Fsync::Off {
                args.push("--unsafe-no-fsync".into());
            }
            let process = Process::start(Spec {
                name: format!("etcd {name}"),
                program: "etcd".into(),
                args,
                env: Vec::new(),
                log: dir.join(format!("etcd-{i}.log")),
                netns: None,
            })
            .context("is etcd installed? `make setup` installs it")?;
            members.push(Member { process, endpoint });
        }
        let all: Vec<&str> = members.iter().map(Member::endpoint).collect();
        let mut etcd = Self { endpoint: all.join(","), members };
        etcd.wait_serving().await?;
        Ok(etcd)
    }

    async fn wait_serving(&mut self) -> anyhow::Result<()> {
        for member in &mut self.members {
            member.wait_serving().await?;
        }
        Ok(())
    }
}

/// What a member says of itself.
#[derive(Clone, Copy, Debug)]
struct Status {
    id: u64,
    leader: u64,
    term: u64,
}

impl Member {
    /// Its address: `http://127.0.0.1:port`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A client of this member alone, with a limit on every request.
    ///
    /// # Errors
    ///
    /// It cannot connect.
    pub async fn client(&self) -> anyhow::Result<Client> {
        connect(&self.endpoint).await
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends a signal, such as SIGSTOP.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Starts it again on the same ports with the same data; waits until it serves.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.start_again()?;
        self.wait_serving().await
    }

    async fn status(&self) -> anyhow::Result<Status> {
        let asked = async {
            let status = self.client().await?.status().await?;
            let id = status.header().map_or(0, etcd_client::ResponseHeader::member_id);
            anyhow::Ok(Status { id, leader: status.leader(), term: status.raft_term() })
        };
        tokio::time::timeout(ANSWER_LIMIT, asked).await.with_context(|| format!("{} is silent", self.endpoint))?
    }

    async fn wait_serving(&mut self) -> anyhow::Result<()> {
        let endpoint = self.endpoint.clone();
        let process = &mut self.process;
        wait_for("etcd serves", START_LIMIT, async || {
            if !process.is_running() {
                return Ok(Err(anyhow::anyhow!("etcd ended: {}", logs::tail(process.log(), 5))));
            }
            // A linearizable read: it is part of a cluster that has a leader.
            let read = async { connect(&endpoint).await?.get("/", None).await.map_err(anyhow::Error::from) };
            match tokio::time::timeout(ANSWER_LIMIT, read).await {
                Ok(Ok(_)) => Ok(Ok(())),
                Ok(Err(error)) => Err(format!("{error:#}")),
                Err(_) => Err("no answer within a second".into()),
            }
        })
        .await?
    }
}

async fn connect(endpoint: &str) -> anyhow::Result<Client> {
    let options =
        ConnectOptions::new().with_connect_timeout(Duration::from_secs(2)).with_timeout(Duration::from_secs(5));
    Client::connect([endpoint], Some(options)).await.context("connect to etcd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_etcds_share_nothing_and_a_killed_one_keeps_its_data() -> anyhow::Result<()> {
        let (a, b) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let mut a = TestEtcd::start(a.path(), Fsync::Off).await.map(|e| (e, a))?;
        let b = TestEtcd::start(b.path(), Fsync::Off).await.map(|e| (e, b))?;
        a.0.client().await?.put("/k", "from a", None).await?;
        assert_eq!(b.0.client().await?.get("/k", None).await?.count(), 0);

        a.0.kill();
        a.0.start_again().await?;
        assert_eq!(a.0.client().await?.get("/k", None).await?.count(), 1);
        Ok(())
    }
    #[tokio::test]
    async fn three_members_do_with_two_and_say_who_leads() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let mut etcd = TestEtcd::start_members(dir.path(), Fsync::Off, 3, &[]).await?;
        let first = etcd.leader().await?;
        etcd.client().await?.put("/k", "v", None).await?;
        etcd.member(first).kill();
        let limit = Duration::from_secs(15);
        let second =
            wait_for("another leads", limit, async || etcd.leader().await.map_err(|e| format!("{e:#}"))).await?;
        assert_ne!(first, second);
        assert_eq!(etcd.get("/k").await?.as_deref(), Some("v"));
        etcd.member(first).start_again().await?;
        assert_eq!(etcd.members()[first].client().await?.get("/k", None).await?.count(), 1);
        Ok(())
    }
}
