//! A guest's console, typed at as a client does.

use std::time::Duration;

use anyhow::Context as _;
use tokio::{sync::mpsc, time};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use uncloud_proto::v1::{self, console_request::Message};

use crate::{Cluster, wait_for};

/// A guest answers within this.
const LIMIT: Duration = Duration::from_secs(20);

/// An open console.
pub struct Console {
    input: mpsc::Sender<v1::ConsoleRequest>,
    output: tonic::Streaming<v1::ConsoleResponse>,
    text: String,
}

impl Console {
    /// Opens it, with some of what was said before.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub async fn open(cluster: &Cluster, vm: &str) -> anyhow::Result<Self> {
        let (input, requests) = mpsc::channel(8);
        let open = v1::ConsoleOpen { vm: vm.into(), history_bytes: 4096, ..Default::default() };
        input.send(request(Message::Open(open))).await?;
        let output = cluster.api.vms().console(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { input, output, text: String::new() })
    }

    /// Opens it as soon as the VM's host can be reached.
    ///
    /// # Errors
    ///
    /// It cannot be opened within the limit.
    pub async fn open_when_there(cluster: &Cluster, vm: &str) -> anyhow::Result<Self> {
        wait_for("the console opens", LIMIT, async || Self::open(cluster, vm).await.map_err(|e| format!("{e:#}"))).await
    }

    /// Types a line.
    ///
    /// # Errors
    ///
    /// The console has ended.
    pub async fn type_line(&self, line: &str) -> anyhow::Result<()> {
        Ok(self.input.send(request(Message::Input(format!("{line}\n").into_bytes()))).await?)
    }

    /// Reads until `text` has come.
    ///
    /// # Errors
    ///
    /// It does not come within the limit.
    pub async fn expect(&mut self, text: &str) -> anyhow::Result<()> {
        let end = time::Instant::now() + LIMIT;
        while !self.text.contains(text) {
            self.read(end).await.with_context(|| format!("no `{text}` on the console, only: {}", self.text))?;
        }
        Ok(())
    }

    /// Types a line again and again, until the guest has said `text`.
    ///
    /// # Errors
    ///
    /// It does not come within the limit.
    pub async fn says(&mut self, line: &str, text: &str) -> anyhow::Result<()> {
        let end = time::Instant::now() + LIMIT;
        while !self.text.contains(text) {
            self.type_line(line).await?;
            let next = end.min(time::Instant::now() + Duration::from_millis(500));
            while !self.text.contains(text) && self.read(next).await.is_ok() {}
            anyhow::ensure!(time::Instant::now() < end, "no `{text}` on the console, only: {}", self.text);
        }
        Ok(())
    }

    async fn read(&mut self, until: time::Instant) -> anyhow::Result<()> {
        let piece = time::timeout_at(until, self.output.next()).await?.context("the console ended")??;
        self.text.push_str(&String::from_utf8_lossy(&piece.output));
        Ok(())
    }
}

fn request(message: Message) -> v1::ConsoleRequest {
    v1::ConsoleRequest { message: Some(message) }
}
