//! `uncloud host drain`: has a host emptied, and says how that goes until it is.

use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status, Streaming};
use uncloud_proto::v1;

use super::{Context, Error, progress::Progress};
use crate::{
    client::fate_of,
    output,
    retry::{self, Fate, Target},
};

/// How long a stream that broke is opened again, from the last message on. Longer than a takeover.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name, UUID or unique prefix of one.
    host: String,
    /// Stops VMs that cannot migrate live, and starts them on other hosts. Without this they stay.
    #[arg(long)]
    stop_and_move: bool,
    /// Migrates VMs with disks that only this host has, too, by copying the disks. Without this they stay.
    #[arg(long)]
    copy_disks: bool,
    /// Why, for those who wonder.
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Only begins it.
    #[arg(long)]
    no_wait: bool,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<(), Error> {
    let Arguments { host, stop_and_move, copy_disks, reason, no_wait } = arguments;
    let request = v1::DrainHostRequest { host, reason, stop_and_move, watch_only: false, copy_disks };
    let mut drain = Drain { context, moved_before: 0, last: None, stream: None, request };
    if no_wait {
        let first = drain.next().await?;
        return first.map_or(Ok(()), |first| context.print(&first, output::drain));
    }
    // The line on a terminal goes before what follows it.
    let result = {
        let mut progress = Progress::start();
        loop {
            match drain.next().await {
                Ok(Some(message)) => progress.say(output::drain_line(&message)),
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            }
        }
    };
    if let Some(last) = &drain.last {
        context.print(last, output::drain)?;
    }
    Ok(result?)
}

struct Drain<'a> {
    context: &'a Context,
    request: v1::DrainHostRequest,
    stream: Option<Streaming<v1::DrainHostResponse>>,
    /// VMs that had left when the stream before this one broke.
    moved_before: u32,
    last: Option<v1::DrainHostResponse>,
}

impl Drain<'_> {
    /// The next message; nothing when it is done. Opens the stream again when it breaks.
    async fn next(&mut self) -> Result<Option<v1::DrainHostResponse>, Status> {
        let mut failures = 0;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let result = match &mut self.stream {
                Some(stream) => stream.message().await,
                None => {
                    self.stream = Some(self.context.client.drain_host(self.request.clone()).await?);
                    continue;
                }
            };
            match result {
                Ok(Some(mut message)) => {
                    message.moved = message.moved.saturating_add(self.moved_before);
                    // It was begun; somebody may end it while this stream is broken.
                    self.request = v1::DrainHostRequest {
                        host: self.request.host.clone(),
                        watch_only: true,
                        ..Default::default()
                    };
                    self.last = Some(message.clone());
                    return Ok(Some(message));
                }
                Ok(None) => return Ok(None),
                Err(status) => {
                    failures += 1;
                    self.recover(status, failures, deadline).await?;
                }
            }
        }
    }

    async fn recover(&mut self, status: Status, failures: u32, deadline: Instant) -> Result<(), Status> {
        let target = match fate_of(&status) {
            Fate::NotTaken { leader: Some(leader) } => Target::Leader(leader),
            Fate::NotTaken { leader: None } | Fate::Lost => Target::Next,
            Fate::Refused if status.code() == Code::DeadlineExceeded => Target::Next,
            Fate::Refused => return Err(status),
        };
        if Instant::now() >= deadline {
            return Err(status);
        }
        self.stream = None;
        self.moved_before = self.last.as_ref().map_or(0, |last| last.moved);
        let client = &self.context.client;
        client.turn_to(&target, &client.endpoint());
        sleep(retry::pause(failures, rand::random())).await;
        Ok(())
    }
}
