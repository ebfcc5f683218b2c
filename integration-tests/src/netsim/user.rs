//! A user who creates, stops, starts and deletes VMs, repeats each call until it is answered, and keeps book.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use uncloud_proto::v1::{self, Disk, VmSpec, vm_service_client::VmServiceClient};

use super::net;

/// A call that takes longer than this is asked again elsewhere.
const CALL: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(300);

/// What was acknowledged of a VM last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Running,
    Stopped,
    Deleted,
}

/// One VM as the user knows it.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: String,
    pub(super) wanted: Wanted,
}

/// What the user knows. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Book {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    vms: BTreeMap<String, Known>,
    /// Everything that was planned has been acknowledged.
    worked: bool,
    /// What the API said at last agrees with the book.
    agreed: bool,
    last: String,
    violations: Vec<String>,
}

impl Book {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn vms(&self) -> Vec<Known> {
        self.lock().vms.values().cloned().collect()
    }

    pub(super) fn worked(&self) -> bool {
        self.lock().worked
    }

    pub(super) fn agreed(&self) -> bool {
        self.lock().agreed
    }

    fn saw(&self, seen: Result<(), String>) {
        let mut inner = self.lock();
        inner.agreed = seen.is_ok();
        inner.last = seen.err().unwrap_or_else(|| "the API agrees".to_owned());
    }

    /// From now on only what is seen from now on counts.
    pub(super) fn look_again(&self) {
        self.lock().agreed = false;
    }

    /// What was seen last, for people.
    pub(super) fn last(&self) -> String {
        self.lock().last.clone()
    }

    pub(super) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }
}

/// Works until `vms` were created, and then looks until the API agrees with the book.
pub(super) async fn user(book: Book, controllers: Vec<String>, seed: u64, vms: usize) -> turmoil::Result {
    let mut user = User { book, channels: Vec::new(), next: 0, random: StdRng::seed_from_u64(seed) };
    for address in controllers {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(Duration::from_secs(1))
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(2));
        user.channels.push(net::dial().lazily(endpoint));
    }
    for n in 0..vms {
        user.create(n).await;
        user.change_one().await;
        time::sleep(Duration::from_millis(user.random.random_range(200..6000))).await;
    }
    user.book.lock().worked = true;
    loop {
        let seen = user.compare().await;
        user.book.saw(seen);
        time::sleep(AGAIN).await;
    }
}

struct User {
    book: Book,
    channels: Vec<Channel>,
    next: usize,
    random: StdRng,
}

impl User {
    /// Asks one controller after the other until one answers, also with a refusal.
    async fn ask<T>(
        &mut self,
        what: &str,
        call: impl AsyncFn(VmServiceClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> (Result<T, Status>, u32) {
        let mut attempts = 0;
        loop {
            attempts += 1;
            self.next += 1;
            let client = VmServiceClient::new(self.channels[self.next % self.channels.len()].clone());
            let answer = match time::timeout(CALL, call(client)).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded("the user's own limit")),
            };
            match answer {
                Err(status) if is_transient(&status) => {
                    self.book.lock().last = format!("{what}: {status}");
                    time::sleep(AGAIN).await;
                }
                answer => return (answer, attempts),
            }
        }
    }

    async fn create(&mut self, n: usize) {
        let name = format!("vm-{n}");
        let spec = VmSpec {
            vcpus: 1,
            memory_mib: 64,
            disks: vec![Disk { size_bytes: 1 << 20, ..Disk::default() }],
            stop_grace_seconds: 5,
            ..VmSpec::default()
        };
        let request = v1::CreateVmRequest {
            request_id: format!("request-{n}"),
            name: name.clone(),
            spec: Some(spec),
            ..v1::CreateVmRequest::default()
        };
        let mut ids = Vec::new();
        // The second time the same id must give the same VM.
        for _ in 0..2 {
            let (answer, _) = self.ask("create", async |mut c| c.create_vm(request.clone()).await).await;
            match answer {
                Ok(answer) => ids.push(answer.vm.map(|vm| vm.id).unwrap_or_default()),
                Err(status) => return self.violation(format!("{name} was refused: {status}")),
            }
        }
        if ids[0] != ids[1] || ids[0].is_empty() {
            self.violation(format!("one request made two VMs: {ids:?}"));
        }
        self.book.lock().vms.insert(name, Known { id: ids.swap_remove(0), wanted: Wanted::Running });
    }

    async fn change_one(&mut self) {
        let candidates: Vec<(String, Known)> = {
            let inner = self.book.lock();
            inner.vms.iter().filter(|(_, k)| k.wanted != Wanted::Deleted).map(|(n, k)| (n.clone(), k.clone())).collect()
        };
        if candidates.is_empty() || self.random.random_bool(0.4) {
            return;
        }
        let (name, known) = candidates[self.random.random_range(0..candidates.len())].clone();
        let (vm, owner) = (known.id.clone(), String::new());
        let wanted = match known.wanted {
            _ if self.random.random_bool(0.3) => Wanted::Deleted,
            Wanted::Running => Wanted::Stopped,
            Wanted::Stopped | Wanted::Deleted => Wanted::Running,
        };
        let (answer, attempts) = match wanted {
            Wanted::Running => {
                let request = v1::StartVmRequest { vm, owner };
                let call = async |mut c: VmServiceClient<Channel>| c.start_vm(request.clone()).await;
                let (answer, attempts) = self.ask("start", call).await;
                (answer.map(drop), attempts)
            }
            Wanted::Stopped => {
                let request = v1::StopVmRequest { vm, owner, ..v1::StopVmRequest::default() };
                let call = async |mut c: VmServiceClient<Channel>| c.stop_vm(request.clone()).await;
                let (answer, attempts) = self.ask("stop", call).await;
                (answer.map(drop), attempts)
            }
            Wanted::Deleted => {
                let request = v1::DeleteVmRequest { vm, owner };
                let call = async |mut c: VmServiceClient<Channel>| c.delete_vm(request.clone()).await;
                let (answer, attempts) = self.ask("delete", call).await;
                (answer.map(drop), attempts)
            }
        };
        match answer {
            Ok(()) => {}
            // An earlier attempt was carried out, and nobody said so.
            Err(status) if wanted == Wanted::Deleted && attempts > 1 && status.code() == Code::NotFound => {}
            Err(status) => return self.violation(format!("{name} could not be made {wanted:?}: {status}")),
        }
        if let Some(known) = self.book.lock().vms.get_mut(&name) {
            known.wanted = wanted;
        }
    }

    /// Whether the API says what the book says.
    async fn compare(&mut self) -> Result<(), String> {
        let request = v1::ListVmsRequest::default();
        let (answer, _) = self.ask("list", async |mut c| c.list_vms(request.clone()).await).await;
        let found = answer.map_err(|status| format!("list: {status}"))?.vms;
        let found: BTreeMap<&str, &v1::Vm> = found.iter().map(|vm| (vm.id.as_str(), vm)).collect();
        let mut expected = 0;
        let mut problems = Vec::new();
        for (name, known) in &self.book.lock().vms {
            match (found.get(known.id.as_str()), known.wanted) {
                (None, Wanted::Deleted) => {}
                (Some(_), Wanted::Deleted) => problems.push(format!("{name} is still there")),
                (None, Wanted::Running | Wanted::Stopped) => problems.push(format!("LOST: {name} was acknowledged")),
                (Some(vm), wanted) => {
                    expected += 1;
                    let phase = if wanted == Wanted::Running { v1::VmPhase::Running } else { v1::VmPhase::Stopped };
                    if vm.name != *name || vm.status.as_ref().map(v1::VmStatus::phase) != Some(phase) {
                        problems.push(format!(
                            "{name} is {} {:?}, wanted {wanted:?}",
                            vm.name,
                            vm.status.as_ref().map(v1::VmStatus::phase)
                        ));
                    }
                }
            }
        }
        if found.len() > expected {
            problems.push(format!("{} VMs, expected {expected}", found.len()));
        }
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }

    fn violation(&self, text: String) {
        self.book.lock().violations.push(text);
    }
}

fn is_transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled | Code::Aborted | Code::Internal
    )
}
