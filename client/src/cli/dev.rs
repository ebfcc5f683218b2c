//! `uncloud dev`.

use std::{
    fs,
    io::{IsTerminal as _, stdin, stdout},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use tokio::time::sleep;

use super::{Error, Signals};
use crate::{
    dev::{
        cluster::{Cluster, Down, Options},
        story,
    },
    exit::Exit,
    output::{clean_lines, note, say},
    units,
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How many hosts.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=64), value_name = "N")]
    hosts: u32,
    /// Where everything goes; kept at the end. Without it, a new directory that is removed at the end.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where the controller listens; port 0 takes any free one.
    #[arg(long, default_value = "127.0.0.1:7400", value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Virtual CPUs of each host; without it, the threads of this machine.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    vcpus: Option<u32>,
    /// Memory of each host for VMs, in MiB.
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..), value_name = "MIB")]
    memory_mib: u64,
    /// The short lease: how soon a silent host is given up. Without it, the controller's default of 6s.
    #[arg(long, value_parser = units::parse_duration, value_name = "DURATION")]
    fast_lease: Option<Duration>,
    /// Tells a story: three VMs, one host is cut from power, its VMs come back elsewhere. Each claim is measured.
    #[arg(long)]
    demo: bool,
    /// Kernel of the demonstration's guest; `make guests` makes one.
    #[arg(long, value_name = "PATH", default_value = "target/guests/vmlinuz")]
    demo_kernel: PathBuf,
    /// Initial RAM disk of the demonstration's guest.
    #[arg(long, value_name = "PATH", default_value = "target/guests/initrd.img")]
    demo_initrd: PathBuf,
    /// Takes everything down as soon as it is up, or when the story has been told. So it is anyway when the story is
    /// told to something else than a terminal.
    #[arg(long)]
    exit: bool,
}

pub(crate) async fn run(a: Arguments) -> Result<Exit, Error> {
    if a.demo {
        for (flag, path) in [("--demo-kernel", &a.demo_kernel), ("--demo-initrd", &a.demo_initrd)] {
            if !path.is_file() {
                return Err(Error::Usage(format!(
                    "{flag}: there is no file {}; `make guests` makes it",
                    path.display()
                )));
            }
        }
        if a.hosts < 2 {
            return Err(Error::Usage("--hosts: the demonstration needs at least 2".to_owned()));
        }
    }
    let mut signals = Signals::take()?;
    let (dir, is_ours) = match &a.dir {
        Some(dir) => (dir.clone(), false),
        None => (PathBuf::from(format!("/var/tmp/uncloud-dev-{}", std::process::id())), true),
    };
    let options = Options {
        hosts: a.hosts,
        dir: dir.clone(),
        listen: a.listen,
        vcpus: a.vcpus,
        memory_mib: a.memory_mib,
        fast_lease: a.fast_lease,
    };
    let mut cluster = Cluster::new(options).map_err(|e| Error::Failed(e.to_string()))?;
    let outcome = tokio::select! {
        biased;
        name = signals.next() => {
            note(&format!("\n{name}: taking everything down"));
            Ok(Exit::Done)
        }
        outcome = session(&mut cluster, &a) => outcome,
    };
    if let Err(error) = &outcome {
        error.report();
    }
    // A second Ctrl-C changes nothing: what is half taken down would be left behind.
    let down = cluster.down().await;
    drop(cluster);
    let failed = !matches!(outcome, Ok(Exit::Done));
    if is_ours {
        remove(&dir, failed);
    }
    if !report(&down) {
        return Ok(Exit::Failed);
    }
    // An error was reported above, before the cluster was taken down.
    Ok(outcome.unwrap_or(Exit::Failed))
}

/// From the start to the end of the story, or for ever.
async fn session(cluster: &mut Cluster, a: &Arguments) -> Result<Exit, Error> {
    note(&format!("Starting a controller with its etcd and {} hosts …", a.hosts));
    cluster.start().await.map_err(|e| Error::Failed(e.to_string()))?;
    say(&how_to_talk(cluster, a.hosts));
    let mut stay = !a.exit;
    let mut exit = Exit::Done;
    if a.demo {
        let held = story::tell(cluster, &a.demo_kernel, &a.demo_initrd).await;
        if let Err(error) = held {
            note(&format!("error: the story does not hold: {}", clean_lines(&error)));
            note(&clean_lines(&cluster.logs()));
            exit = Exit::Failed;
        }
        stay &= exit == Exit::Done && stdin().is_terminal() && stdout().is_terminal();
        if stay {
            say("\nThe cluster stays up; Ctrl-C takes it down.");
        }
    }
    if !stay {
        return Ok(exit);
    }
    loop {
        for death in cluster.deaths() {
            note(&clean_lines(&format!("warning: {death}")));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn how_to_talk(cluster: &Cluster, hosts: u32) -> String {
    let address = cluster.address();
    let me = std::env::args().next().unwrap_or_else(|| "uncloud".to_owned());
    format!(
        "A cluster of {hosts} hosts runs on this machine, at {address}, in {dir}.

  export UNCLOUD_ENDPOINTS={address}
  {me} status
  {me} host list
  {me} image add debian /path/to/disk.qcow2
  {me} vm create web --image debian --memory 512M --nic user --wait
  {me} vm console web

Logs are in {dir}/logs. Ctrl-C takes everything down.
",
        dir = cluster.dir().display(),
    )
}

/// Says how the taking down went. False if something is left.
fn report(down: &Down) -> bool {
    for name in &down.forced {
        note(&format!("warning: {name} did not end when asked and was killed"));
    }
    if down.left.is_empty() {
        note(&format!("Everything is down ({} keepers and QEMUs ended); no process is left.", down.guests));
        return true;
    }
    for name in &down.left {
        note(&format!("error: still there: {name}"));
    }
    false
}

/// Removes the directory; after a failure the logs stay, for those who want to know more.
fn remove(dir: &Path, keep_logs: bool) {
    let removed = if keep_logs {
        note(&format!("The logs are kept in {}/logs.", dir.display()));
        let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
        let mut others = entries.filter(|e| e.file_name() != "logs" && e.path().is_dir());
        others.try_for_each(|e| fs::remove_dir_all(e.path()))
    } else {
        fs::remove_dir_all(dir)
    };
    if let Err(e) = removed
        && e.kind() != std::io::ErrorKind::NotFound
    {
        note(&format!("warning: cannot remove {}: {e}", dir.display()));
    }
}
