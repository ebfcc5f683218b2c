//! Finds the leader, and begins a new session whenever one has ended.
//!
//! A connection to each controller that was dialled is kept, so that after a takeover a stream can be opened without a
//! new handshake. HTTP/2 keep-alive notices a silent partition: TCP alone would wait for minutes.

use std::{collections::BTreeMap, time::Duration};

use tokio::time;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tracing::{error, info, warn};
use uncloud_proto::dial::Dial;

use super::{
    dialer::{Dialer, Outcome},
    pump::{End, Opening, Session},
};
use crate::vm::hypervisor::Hypervisor;

/// A controller that cannot be reached costs this much of the lease.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Together less than the short lease: a connection that is cut off is noticed while there is time to dial again.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Keeps a session with the leader until `cancel` fires. `random` gives numbers in 0..1.
pub async fn run<H: Hypervisor>(
    mut session: Session<H>,
    controllers: Vec<String>,
    dial: Dial,
    mut random: impl FnMut() -> f64,
    cancel: CancellationToken,
) {
    let mut dialer = Dialer::new(controllers);
    let mut channels: BTreeMap<String, Channel> = BTreeMap::new();
    loop {
        let address = dialer.address().to_owned();
        let end = match channel(&mut channels, &dial, &address) {
            Ok(channel) => {
                let opening = Opening { unreached: dialer.unreached(), patience: dialer.patience() };
                session.run(channel, opening, &cancel, |controllers| dialer.welcomed(controllers)).await
            }
            Err(problem) => End::Unreachable(problem),
        };
        let outcome = match end {
            End::Cancelled => return,
            End::Served(reason) => {
                warn!(controller = address, "the session ended: {reason}");
                Outcome::Served
            }
            End::Silent => {
                warn!(controller = address, "the session ended: the leader was not heard any more");
                Outcome::Silent
            }
            End::NotLeader(hint) => {
                info!(controller = address, leader = hint.as_deref().unwrap_or("unknown"), "not the leader");
                Outcome::NotLeader(hint)
            }
            End::Unreachable(reason) => {
                warn!(controller = address, "no session: {reason}");
                Outcome::Unreachable
            }
            End::Deferred(reason) => {
                warn!(controller = address, "no session yet: {reason}");
                Outcome::Deferred
            }
            End::Unanswered => {
                warn!(controller = address, "no session: the controller does not answer Hello");
                Outcome::Unanswered
            }
            End::Refused(reason) => {
                error!(controller = address, "the controller does not take this host: {reason}");
                Outcome::Refused
            }
        };
        dialer.ended(outcome);
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = time::sleep(dialer.wait(random())) => {}
        }
    }
}

/// The connection to a controller. It is made when it is first used, and again when it breaks.
fn channel(channels: &mut BTreeMap<String, Channel>, dial: &Dial, address: &str) -> Result<Channel, String> {
    if let Some(channel) = channels.get(address) {
        return Ok(channel.clone());
    }
    let channel = dial.lazily(endpoint(address)?);
    channels.insert(address.to_owned(), channel.clone());
    Ok(channel)
}

/// How an agent connects to a controller.
///
/// # Errors
///
/// In words: it is no address.
pub fn endpoint(address: &str) -> Result<Endpoint, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| format!("{} is no address: {e}", address.escape_debug()))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}
