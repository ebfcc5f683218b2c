//! What this controller measures of itself, for Prometheus: `GET /metrics` on the address of `--metrics-listen`.
//!
//! What happens is counted where it happens, in atomic counters. What is (VMs by phase, hosts, leases, queues) is looked up when
//! somebody asks, a piece at a time, so that nobody waits for it.

mod layer;
mod scrape;
mod serve;

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use uncloud_proto::clock::Clock;

pub(crate) use self::layer::MeasureLayer;
pub use self::serve::serve;
use crate::{
    leadership::{LeaderSlot, WarmCopy},
    model::{Key, Record},
    state::command::Mutation,
};

/// Labels with one name that is known beforehand.
type One = [(&'static str, &'static str); 1];
/// Labels with one name that is made when it is needed.
type Named = [(&'static str, String); 1];
/// Labels of a call.
type Call = [(&'static str, String); 2];

/// What became of a transaction, or of a call of the writer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Transaction {
    /// Carried out.
    Stored,
    /// etcd is full.
    Full,
    /// Refused, or nobody knows: the term ends.
    Lost,
}

/// What a heartbeat was answered with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Heartbeat {
    /// Leases.
    Renewed,
    /// No leases: something executes there that belongs elsewhere.
    Withheld,
    /// Nothing: this controller may not lead any more, or the host was declared lapsed.
    Refused,
}

/// The numbers of a process. Cheap to clone; all clones count into the same.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    /// The methods that calls are counted by; others are `other`.
    methods: BTreeSet<String>,
    calls: Family<Call, Counter>,
    call_seconds: Family<Named, Histogram, fn() -> Histogram>,
    transactions: Family<One, Counter>,
    transaction_seconds: Histogram,
    transaction_commands: Histogram,
    transaction_operations: Counter,
    refused: Counter,
    events: Family<Named, Counter>,
    renewed: Counter,
    withheld: Counter,
    unanswered: Counter,
    reports: Counter,
    session_ends: Family<One, Counter>,
    /// What is looked up when somebody asks.
    sources: OnceLock<Sources>,
}

/// Where the rest is looked up.
#[derive(Clone, Debug)]
struct Sources {
    slot: LeaderSlot,
    copy: WarmCopy,
    clock: Clock,
}

/// From 0.5 ms to 4 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 14))
}

impl Default for Inner {
    fn default() -> Self {
        let mut this = Self {
            registry: Registry::with_prefix("uncloud"),
            methods: layer::methods(),
            calls: Family::default(),
            call_seconds: Family::new_with_constructor(seconds),
            transactions: Family::default(),
            transaction_seconds: seconds(),
            transaction_commands: Histogram::new(exponential_buckets(1.0, 2.0, 10)),
            transaction_operations: Counter::default(),
            refused: Counter::default(),
            events: Family::default(),
            renewed: Counter::default(),
            withheld: Counter::default(),
            unanswered: Counter::default(),
            reports: Counter::default(),
            session_ends: Family::default(),
            sources: OnceLock::new(),
        };
        this.register();
        this
    }
}

impl Inner {
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("calls", "Calls of the API, by method and status code", self.calls.clone());
        let what = "Time until a call is answered, or its stream begins";
        r.register_with_unit("call", what, Unit::Seconds, self.call_seconds.clone());
        r.register("transactions", "Transactions of the writer, by what became of them", self.transactions.clone());
        let what = "Time that etcd takes for a transaction";
        r.register_with_unit("transaction", what, Unit::Seconds, self.transaction_seconds.clone());
        r.register("transaction_commands", "Commands in a transaction", self.transaction_commands.clone());
        r.register("transaction_operations", "Keys that were written or deleted", self.transaction_operations.clone());
        r.register("refused_commands", "Commands that the state did not allow", self.refused.clone());
        r.register("events", "Events that were stored, by type", self.events.clone());
        let heartbeats = Family::<One, Counter>::default();
        for (answer, counter) in
            [("renewed", &mut self.renewed), ("withheld", &mut self.withheld), ("refused", &mut self.unanswered)]
        {
            *counter = heartbeats.get_or_create(&[("answer", answer)]).clone();
        }
        r.register("heartbeats", "Heartbeats of hosts, by what they were answered with", heartbeats);
        r.register("reports", "VMs that hosts have reported on", self.reports.clone());
        r.register("session_ends", "Sessions of agents that ended, by why", self.session_ends.clone());
    }
}

impl Metrics {
    /// From now on what is asked for is looked up here.
    pub(crate) fn look_at(&self, slot: LeaderSlot, copy: WarmCopy, clock: Clock) {
        // A process has one of each.
        let _ = self.0.sources.set(Sources { slot, copy, clock });
    }

    /// A call was answered. The path may be anything.
    pub(crate) fn call(&self, path: &str, code: &str, took: Duration) {
        let method = path.trim_start_matches('/');
        let method = if self.0.methods.contains(method) { method } else { "other" };
        self.0.calls.get_or_create(&[("method", method.to_owned()), ("code", code.to_owned())]).inc();
        self.0.call_seconds.get_or_create(&[("method", method.to_owned())]).observe(took.as_secs_f64());
    }

    /// A transaction has come to an end. `mutations` count if it was stored.
    pub(crate) fn transaction(&self, end: Transaction, commands: usize, mutations: &[Mutation], took: Duration) {
        let (name, mutations) = match end {
            Transaction::Stored => ("stored", mutations),
            Transaction::Full => ("full", &mutations[..0]),
            Transaction::Lost => ("lost", &mutations[..0]),
        };
        self.0.transactions.get_or_create(&[("result", name)]).inc();
        self.0.transaction_seconds.observe(took.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "hundreds")]
        self.0.transaction_commands.observe(commands as f64);
        self.0.transaction_operations.inc_by(mutations.len() as u64);
        for mutation in mutations {
            if let (Key::Event { .. }, Some(Record::Event(event))) = (&mutation.key, &mutation.value) {
                self.0.events.get_or_create(&[("type", event.kind.to_string())]).inc();
            }
        }
    }

    /// The state did not allow a command.
    pub(crate) fn refused(&self) {
        self.0.refused.inc();
    }

    /// A heartbeat came.
    pub(crate) fn heartbeat(&self, answer: Heartbeat) {
        match answer {
            Heartbeat::Renewed => self.0.renewed.inc(),
            Heartbeat::Withheld => self.0.withheld.inc(),
            Heartbeat::Refused => self.0.unanswered.inc(),
        };
    }

    /// A host reported on so many VMs.
    pub(crate) fn reports(&self, count: usize) {
        self.0.reports.inc_by(count as u64);
    }

    /// A session ended.
    pub(crate) fn session_ended(&self, why: &'static str) {
        self.0.session_ends.get_or_create(&[("reason", why)]).inc();
    }

    /// All of it, in the text format of OpenMetrics.
    pub async fn text(&self) -> String {
        let now = match self.0.sources.get() {
            Some(sources) => scrape::look(sources).await,
            None => Registry::default(),
        };
        let mut all = String::new();
        let written = text::encode_registry(&mut all, &self.0.registry)
            .and_then(|()| text::encode_registry(&mut all, &now))
            .and_then(|()| text::encode_eof(&mut all));
        // A string takes everything.
        debug_assert!(written.is_ok());
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_counted_is_told() {
        let metrics = Metrics::default();
        metrics.heartbeat(Heartbeat::Renewed);
        metrics.heartbeat(Heartbeat::Renewed);
        metrics.heartbeat(Heartbeat::Withheld);
        metrics.call("/uncloud.v1.VmService/CreateVm", "OK", Duration::from_millis(3));
        metrics.call("/whatever/a\"b", "UNIMPLEMENTED", Duration::ZERO);
        metrics.transaction(Transaction::Stored, 5, &[], Duration::from_millis(2));
        let text = metrics.text().await;
        for line in [
            "uncloud_heartbeats_total{answer=\"renewed\"} 2",
            "uncloud_heartbeats_total{answer=\"withheld\"} 1",
            "uncloud_heartbeats_total{answer=\"refused\"} 0",
            "uncloud_calls_total{method=\"uncloud.v1.VmService/CreateVm\",code=\"OK\"} 1",
            "uncloud_calls_total{method=\"other\",code=\"UNIMPLEMENTED\"} 1",
            "uncloud_transactions_total{result=\"stored\"} 1",
            "uncloud_transaction_commands_bucket{le=\"8.0\"} 1",
            "uncloud_transaction_commands_bucket{le=\"4.0\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "no `{line}` in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
