//! What an operator tells a controller.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Parser;
use uncloud_proto::DEFAULT_PORT;

use crate::health::Timings;

/// The longest lease that may be set. Larger makes a dead host's VMs wait longer than anybody wants.
pub const MAX_LEASE: Duration = Duration::from_secs(3600);

/// Keeps the cluster's state in etcd, schedules VMs onto hosts and grants host leases.
#[derive(Clone, Debug, Parser)]
#[command(name = "uncloud-controller", version)]
pub struct Config {
    /// Directory for the controller's own files, and for its etcd when it starts one.
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Address to serve on.
    #[arg(long, value_name = "ADDR", default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)))]
    pub listen: SocketAddr,
    /// Address at which agents and clients reach this controller [default: the address to serve on].
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Addresses of all controllers, told to agents [default: this one].
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',')]
    pub controllers: Vec<String>,
    /// An etcd cluster that runs already. Without it the controller starts an etcd of its own.
    #[arg(long, value_name = "URL,…", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// The etcd to start [default: $UNCLOUD_ETCD, beside this program, or on $PATH].
    #[arg(long, value_name = "PATH", conflicts_with = "etcd")]
    pub etcd_binary: Option<PathBuf>,
    /// Lease of VMs of the class `fast`.
    #[arg(long, value_name = "TIME", default_value = "6s", value_parser = duration)]
    pub fast_lease: Duration,
    /// Lease of VMs of the class `patient`.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub patient_lease: Duration,
    /// What a host may need to kill a VM when its lease has run out.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub kill_allowance: Duration,
    /// vCPUs promised per CPU thread, such as 4 or 1.5.
    #[arg(long, value_name = "RATIO", default_value = "4", value_parser = ratio)]
    pub cpu_overcommit: u32,
    /// Bytes of disks promised per byte of a pool: a disk takes room only as its guest writes. A guest whose pool is full stops until
    /// there is room again.
    #[arg(long, value_name = "RATIO", default_value = "2", value_parser = ratio)]
    pub disk_overcommit: u32,
    /// Address to serve metrics on, for Prometheus: http://ADDR/metrics, without encryption [default: nowhere].
    #[arg(long, value_name = "ADDR")]
    pub metrics_listen: Option<SocketAddr>,
    /// Serve on other addresses than loopback although there is no encryption: everybody who reaches the port may do everything.
    #[arg(long)]
    pub insecure_no_tls: bool,
}

/// Why a configuration is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not on loopback.
    #[error(
        "--listen {0} can be reached by others, and there is no TLS yet: everybody who reaches it could do everything. \
         Listen on 127.0.0.1, or say --insecure-no-tls if the network is yours alone"
    )]
    Exposed(SocketAddr),
    /// A lease that cannot work.
    #[error("--{field} {problem}")]
    Lease {
        /// The flag.
        field: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// An address without a port, or empty.
    #[error("--{field}: `{value}` is not HOST:PORT")]
    Address {
        /// The flag.
        field: &'static str,
        /// What was said.
        value: String,
    },
}

impl Config {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// Names the flag and says what to do.
    pub fn validate(&self) -> Result<(), Error> {
        if !self.listen.ip().is_loopback() && !self.insecure_no_tls {
            return Err(Error::Exposed(self.listen));
        }
        let lease = |field, problem| Err(Error::Lease { field, problem });
        if self.fast_lease < Duration::from_secs(1) {
            return lease("fast-lease", "must be at least 1s: an agent sends a heartbeat that often");
        }
        if self.patient_lease < self.fast_lease {
            return lease("patient-lease", "must not be shorter than --fast-lease");
        }
        if self.patient_lease > MAX_LEASE {
            return lease("patient-lease", "must be at most 1h");
        }
        if self.kill_allowance < Duration::from_millis(100) {
            return lease("kill-allowance", "must be at least 100ms: a kernel needs some time to end a process");
        }
        let named = self.advertise.iter().map(|a| ("advertise", a));
        for (field, value) in named.chain(self.controllers.iter().map(|a| ("controllers", a))) {
            let valid =
                value.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            if !valid {
                return Err(Error::Address { field, value: value.clone() });
            }
        }
        Ok(())
    }

    /// Where others reach this controller.
    #[must_use]
    pub fn address(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// The lengths of the leases.
    #[must_use]
    pub const fn timings(&self) -> Timings {
        Timings { fast: self.fast_lease, patient: self.patient_lease, kill_allowance: self.kill_allowance }
    }
}

/// A duration with its unit: `500ms`, `6s`, `2m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let wrong = || format!("`{text}` is not a duration; write a whole number and a unit: 500ms, 6s, 2m, 1h");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(millis).map(Duration::from_millis).ok_or_else(wrong)
}

/// A ratio, in percent.
fn ratio(text: &str) -> Result<u32, String> {
    let wrong = || format!("`{text}` is not a ratio between 0.1 and 100, such as 4 or 1.5");
    let ratio: f64 = text.parse().map_err(|_| wrong())?;
    if !(0.1..=100.0).contains(&ratio) {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 10 and 10,000")]
    Ok((ratio * 100.0).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Config {
        Config::try_parse_from([&["uncloud-controller", "--data-dir", "/d"], args].concat()).unwrap()
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = parse(&[]);
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.fast_lease, Duration::from_secs(6));
        assert_eq!((config.cpu_overcommit, config.disk_overcommit), (400, 200));
        assert_eq!(config.address(), "127.0.0.1:7400");
    }

    #[test]
    fn an_exposed_port_wants_to_be_asked_for() {
        assert!(matches!(parse(&["--listen", "0.0.0.0:7400"]).validate(), Err(Error::Exposed(_))));
        assert_eq!(parse(&["--listen", "0.0.0.0:7400", "--insecure-no-tls"]).validate(), Ok(()));
    }

    #[test]
    fn impossible_settings_name_their_flag() {
        let wrong = |args: &[&str]| parse(args).validate().unwrap_err().to_string();
        assert!(wrong(&["--fast-lease", "500ms"]).starts_with("--fast-lease must"));
        assert!(wrong(&["--patient-lease", "2s"]).starts_with("--patient-lease must"));
        assert!(wrong(&["--kill-allowance", "1ms"]).starts_with("--kill-allowance must"));
        assert!(wrong(&["--controllers", "nope"]).starts_with("--controllers: `nope`"));
        for bad in ["6", "s", "-1s", "6 s", "99999999999999999999s", "1d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for bad in ["0", "-1", "x", "1000", "NaN"] {
            assert!(ratio(bad).is_err(), "{bad}");
        }
    }
}
