//! How connections to other processes are made. The only thing that stands between a process and the network it dials.

use std::{fmt, pin::Pin, sync::Arc};

use tonic::transport::{Channel, Endpoint, Error};

type Connecting = Pin<Box<dyn Future<Output = Result<Channel, Error>> + Send>>;

/// Makes connections. Cheap to clone; a simulation gives one that stays within it.
#[derive(Clone)]
pub struct Dial {
    lazily: Arc<dyn Fn(Endpoint) -> Channel + Send + Sync>,
    now: Arc<dyn Fn(Endpoint) -> Connecting + Send + Sync>,
}

impl Dial {
    /// Over TCP, as the endpoint says.
    #[must_use]
    pub fn tcp() -> Self {
        Self::custom(|endpoint| endpoint.connect_lazy(), |endpoint| Box::pin(async move { endpoint.connect().await }))
    }

    /// Over something else: a connection that is made when it is needed, and one that stands.
    #[must_use]
    pub fn custom(
        lazily: impl Fn(Endpoint) -> Channel + Send + Sync + 'static,
        now: impl Fn(Endpoint) -> Connecting + Send + Sync + 'static,
    ) -> Self {
        Self { lazily: Arc::new(lazily), now: Arc::new(now) }
    }

    /// A connection that is made when it is first used, and again when it breaks.
    #[must_use]
    pub fn lazily(&self, endpoint: Endpoint) -> Channel {
        (self.lazily)(endpoint)
    }

    /// A connection that stands. One that breaks later is made again by itself.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub async fn now(&self, endpoint: Endpoint) -> Result<Channel, Error> {
        (self.now)(endpoint).await
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dial")
    }
}
