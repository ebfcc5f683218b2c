//! `DrainHost`: has a host emptied, and shows how that goes. The reconciler does it (`reconcile/drain.rs`), whoever watches.

use std::time::Duration;

use tokio::time::{self, MissedTickBehavior};
use tonic::Status;
use uncloud_proto::{ids::HostId, v1};

use super::{
    context::Context,
    error,
    validate::{Drain, DrainHost},
    watch::{self, End, Sink},
};
use crate::{
    leadership::Leader,
    model::HostMode,
    reconcile::drain::{LeftState, Progress, Stage, Watch},
    state::{
        State,
        command::{self, Command, Refusal},
    },
};

/// How often it is looked at. Nobody reads faster.
const PERIOD: Duration = Duration::from_millis(250);
/// VMs that a message names.
const NAMED: usize = 1000;
/// VMs that the status at the end names.
const NAMED_IN_STATUS: usize = 5;

/// Opens the stream. The drain has begun by then.
pub(super) async fn open(context: &Context, wanted: DrainHost) -> Result<watch::Stream<v1::DrainHostResponse>, Status> {
    let leader = context.leader()?;
    let host = context.read(|_, state| Ok(state.resolve_host(&wanted.host)?)).await?;
    match wanted.what {
        Drain::Begin { how, disks, reason } => {
            context.submit(&leader, Command::DrainHost { host, how, disks, reason }).await?;
        }
        Drain::Watch => {
            let is_draining =
                leader.mirror.read(|state| state.host(host).is_some_and(|h| h.record.mode == HostMode::Draining));
            if !is_draining {
                let message = format!("host `{}` is not being drained", wanted.host);
                return Err(Refusal::Precondition(message).into());
            }
        }
    }
    let hint = context.clone();
    Ok(watch::spawn(context.clone().term_over(leader.clone()), move |sink| async move {
        show(&hint, &leader, host, &sink).await
    }))
}

/// Sends whatever is new, until it is over.
async fn show(context: &Context, leader: &Leader, host: HostId, sink: &Sink<v1::DrainHostResponse>) -> End {
    let mut watch = Watch::new(host);
    let mut last = None;
    let mut ticker = time::interval(PERIOD);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticker.tick().await;
        let now = leader.clock.now();
        let cx = command::Context {
            now: leader.clock.wall(),
            silent: leader.silent_hosts(),
            arrived: std::sync::Arc::default(),
            cpu_overcommit_percent: leader.settings.cpu_overcommit_percent,
            disk_overcommit_percent: leader.settings.disk_overcommit_percent,
        };
        let (stage, message) = leader.mirror.read(|state| {
            let progress = watch.look(state, &cx, now);
            (progress.stage, shown(state, host, &progress))
        });
        // This process may have been stopped for a while.
        if !leader.is_valid() {
            return End::Because(error::term_ended(context.hint()));
        }
        if last.as_ref() != Some(&message) {
            last = Some(message.clone());
            if sink.send(message.clone()).await.is_err() {
                return End::ClientGone;
            }
        }
        match stage {
            Stage::GoesOn => {}
            Stage::Empty => return End::Done,
            Stage::Stuck => return End::Because(Refusal::Precondition(left_words(&message)).into()),
            Stage::Ended => {
                let message = format!("the drain of host `{}` was ended by somebody", message.host_name);
                return End::Because(Refusal::Precondition(message).into());
            }
        }
    }
}

fn shown(state: &State, host: HostId, progress: &Progress) -> v1::DrainHostResponse {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let count = |of| number(progress.left.iter().filter(|vm| vm.state == of).count());
    let left = progress.left.iter().take(NAMED).filter_map(|left| {
        let record = &state.vm(left.vm)?.record;
        let state = match left.state {
            LeftState::ToGo => v1::DrainedVmState::ToGo,
            LeftState::Moving => v1::DrainedVmState::Moving,
            LeftState::Cannot => v1::DrainedVmState::Cannot,
        };
        Some(v1::DrainedVm {
            vm_id: record.id.to_string(),
            name: record.name.clone(),
            owner: record.owner.clone(),
            state: state.into(),
            reason: left.why.clone(),
        })
    });
    let stage = match progress.stage {
        Stage::GoesOn => v1::DrainState::Draining,
        Stage::Empty => v1::DrainState::Empty,
        Stage::Stuck => v1::DrainState::Stuck,
        Stage::Ended => v1::DrainState::Ended,
    };
    v1::DrainHostResponse {
        host_name: state.host(host).map_or_else(|| host.to_string(), |h| h.record.name.clone()),
        state: stage.into(),
        to_go: count(LeftState::ToGo),
        moving: count(LeftState::Moving),
        moved: number(progress.moved),
        cannot: count(LeftState::Cannot),
        left: left.collect(),
        more: number(progress.left.len().saturating_sub(NAMED)),
    }
}

/// What is left, in a sentence.
fn left_words(message: &v1::DrainHostResponse) -> String {
    let named: Vec<String> =
        message.left.iter().take(NAMED_IN_STATUS).map(|vm| format!("`{}`: {}", vm.name, vm.reason)).collect();
    let more = if message.left.len() > NAMED_IN_STATUS { "; …" } else { "" };
    let vms = if message.cannot == 1 { "1 VM cannot" } else { &format!("{} VMs cannot", message.cannot) };
    format!(
        "{vms} leave host `{}` as things are: {}{more}. It is still being drained; uncordon it to end that",
        message.host_name,
        named.join("; ")
    )
}
