//! Waiting for a condition, with a limit and the last state in the error: never sleeping "long enough".

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// Waits until `check` gives a value. While it does not, it says what the state is instead.
///
/// # Errors
///
/// The limit has passed; the error has the last state.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut check: impl AsyncFnMut() -> Result<T, String>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match check().await {
            Ok(value) => return Ok(value),
            Err(state) if start.elapsed() >= limit => anyhow::bail!("{what}: not within {limit:?}; last seen: {state}"),
            Err(_) => tokio::time::sleep(INTERVAL).await,
        }
    }
}
