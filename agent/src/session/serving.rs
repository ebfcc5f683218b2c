//! What the leader wants served over the network, and what is: between the session and [`Exports`].

use std::collections::BTreeMap;

use tokio::sync::watch;
use tracing::{error, warn};
use uncloud_proto::{
    ids::{Incarnation, VmId},
    v1,
};

use crate::{
    storage::exports::{Exports, Served},
    vm::desired::{self, Desired},
};

/// VMs in one message.
const VMS: usize = 1000;

/// The exports of this host, if it has any.
#[derive(Debug)]
pub struct Serving(Option<Line>);

#[derive(Debug)]
struct Line {
    exports: Exports,
    now: watch::Receiver<BTreeMap<VmId, Served>>,
    /// What the leader of this session was told.
    told: BTreeMap<VmId, Served>,
}

impl Serving {
    /// Of a host that serves disks, or of one that serves none.
    #[must_use]
    pub fn new(exports: Option<Exports>) -> Self {
        Self(exports.map(|exports| Line { now: exports.served(), exports, told: BTreeMap::new() }))
    }

    /// A session begins: its leader has been told nothing.
    pub(super) fn begin(&mut self) {
        if let Some(line) = &mut self.0 {
            line.told.clear();
            line.now.mark_changed();
        }
    }

    /// Takes what the leader wants served. The gate has let it pass.
    pub(super) fn obey(&self, order: &v1::ServeDisks) {
        let Some(line) = &self.0 else { return warn!("the leader wants disks served, and this host exports no pool") };
        for message in &order.vms {
            let parsed = desired::identify(message).and_then(|(vm, i)| Ok((vm, Desired::from_proto(i, message)?)));
            match parsed {
                Ok((vm, desired)) => line.exports.want(vm, desired),
                Err(problem) => {
                    error!(vm = message.vm_id.escape_debug().to_string(), "disks that are to be served: {problem}");
                }
            }
        }
    }

    /// Waits until there may be something to tell. Takes a copy, so that it counts as seen only when it has been taken.
    pub(super) fn changed(&self) -> impl Future<Output = ()> + use<> {
        let now = self.0.as_ref().map(|line| line.now.clone());
        async move {
            let Some(mut now) = now else { return std::future::pending().await };
            if now.changed().await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// What is to be told now, as much as one message holds.
    pub(super) fn unsent(&mut self) -> v1::ServedDisks {
        let Some(line) = &mut self.0 else { return v1::ServedDisks::default() };
        let now = line.now.borrow_and_update().clone();
        line.told.retain(|vm, _| now.contains_key(vm));
        let news: Vec<_> = now.into_iter().filter(|(vm, served)| line.told.get(vm) != Some(served)).collect();
        if news.len() > VMS {
            line.now.mark_changed();
        }
        let said = |(vm, served): (VmId, Served)| {
            let message = v1::ServedVm {
                vm_id: vm.to_string(),
                incarnation: served.incarnation.0,
                next_incarnation: served.next.unwrap_or(Incarnation::NONE).0,
                problem: served.problem.clone(),
                snapshots_made: served.done.made.iter().map(ToString::to_string).collect(),
                snapshots_removed: served.done.removed.iter().map(ToString::to_string).collect(),
                reverted: served.done.reverted,
                disk_orders_done: served.done.disks.clone(),
                trouble: served.trouble.clone(),
            };
            line.told.insert(vm, served);
            message
        };
        v1::ServedDisks { vms: news.into_iter().take(VMS).map(said).collect() }
    }
}
