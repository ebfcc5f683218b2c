//! Keeps the number of events bounded, for one term: a busy cluster writes more of them in a week than etcd should hold.

use std::{sync::Arc, time::Duration};

use tokio::time::{self, Instant, MissedTickBehavior};
use tracing::{info, warn};

use crate::{leadership::Leader, report};

/// How often they are counted.
const PERIOD: Duration = Duration::from_secs(20);
/// So many events are kept: about 100 MB in etcd.
const KEEP: usize = 200_000;
/// So many more may be there: to find the oldest etcd looks at all of them.
const SLACK: usize = 5_000;
/// So many go in one period at the most: fewer than two hundred transactions. A thousand a second is more than VMs can come and go.
const AT_ONCE: usize = 20_000;

/// Runs until it is dropped, at the end of the term.
pub(super) async fn run(leader: &Arc<Leader>) {
    // Not while all hosts come back to a new leader.
    let mut ticker = time::interval_at(Instant::now() + PERIOD, PERIOD);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticker.tick().await;
        match leader.store.trim_events(leader.term, KEEP, SLACK, AT_ONCE).await {
            Ok(0) => {}
            Ok(gone) => info!(gone, "more than {KEEP} events: the oldest are deleted"),
            // The next time will do.
            Err(error) => warn!("old events could not be deleted: {}", report(&error)),
        }
    }
}
