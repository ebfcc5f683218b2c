//! `--wait`: watches a VM until it is what was asked for, and says how it goes.

use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, timeout_at};
use tonic::Code;
use uncloud_proto::v1::{self, watch_vms_response::Event};

use super::super::{Context, Error, progress::Progress};
use crate::{
    output, units,
    wait::{Goal, Verdict, judge},
    watch::{Step, Watch},
};

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WaitArguments {
    /// Waits until it is done, and fails if that cannot be.
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "5m", value_parser = units::parse_duration, value_name = "DURATION")]
    pub(crate) wait_timeout: Duration,
}

/// Waits for a goal. `vm` is the VM as the call that began this left it; what is older than that does not count.
/// Gives the VM as it was last seen, or nothing if it is gone as it should be.
pub(crate) async fn wait_for(
    context: &Context,
    vm: v1::Vm,
    goal: &Goal,
    arguments: WaitArguments,
) -> Result<Option<v1::Vm>, Error> {
    let mut progress = Progress::start();
    progress.say(output::vm_line(&vm));
    let request = v1::WatchVmsRequest { vm: vm.id.clone(), ..Default::default() };
    let mut waiting = Waiting { watch: context.client.watch_vms(request), goal, last: vm, was_seen: false };
    let deadline = Instant::now() + arguments.wait_timeout;
    match timeout_at(deadline, waiting.run(&mut progress)).await {
        Ok(result) => result,
        Err(_) => Err(Error::TimedOut(format!(
            "not done within {}: {}\nIt goes on; `uncloud vm explain {}` says more.",
            units::duration(arguments.wait_timeout),
            output::vm_line(&waiting.last),
            output::clean(&waiting.last.name),
        ))),
    }
}

struct Waiting<'a> {
    watch: Watch<v1::WatchVmsRequest>,
    goal: &'a Goal,
    last: v1::Vm,
    was_seen: bool,
}

impl Waiting<'_> {
    async fn run(&mut self, progress: &mut Progress) -> Result<Option<v1::Vm>, Error> {
        let oldest = self.last.revision;
        loop {
            let answer = match self.watch.next().await {
                Ok(Step::Answer(answer)) => answer,
                Ok(Step::Restarted) => {
                    self.was_seen = false;
                    continue;
                }
                Err(status) if status.code() == Code::NotFound => return self.gone(),
                Err(status) => return Err(status.into()),
            };
            match answer.event {
                Some(Event::Vm(vm)) if vm.id == self.last.id => {
                    self.was_seen = true;
                    if vm.revision < oldest {
                        continue;
                    }
                    progress.say(output::vm_line(&vm));
                    self.last = vm;
                    match judge(self.goal, &self.last) {
                        Verdict::Wait => {}
                        Verdict::Reached => return Ok(Some(self.last.clone())),
                        Verdict::Hopeless(why) => {
                            return Err(Error::Failed(format!("{}: {why}", output::vm_line(&self.last))));
                        }
                    }
                }
                Some(Event::Deleted(deleted)) if deleted.id == self.last.id => return self.gone(),
                Some(Event::Bookmark(_)) if !self.was_seen => return self.gone(),
                Some(Event::Vm(_) | Event::Deleted(_) | Event::Bookmark(_)) | None => {}
            }
        }
    }

    fn gone(&self) -> Result<Option<v1::Vm>, Error> {
        match self.goal {
            Goal::Gone => Ok(None),
            Goal::Running | Goal::RunningSince(_) | Goal::Paused | Goal::Stopped | Goal::Migrated(_) => {
                Err(Error::Failed(format!("{} was deleted", output::clean(&self.last.name))))
            }
        }
    }
}
