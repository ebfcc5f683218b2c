//! What the leader knows of each host's leases.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use uncloud_proto::{clock::Tick, ids::HostId};

use super::{BrakeState, Timings, brake::Brake};
use crate::{model::Liveness, state::command::Lapsed};

/// The leases of all hosts, for one term of one leader.
#[derive(Debug)]
pub struct HealthTable {
    timings: Timings,
    /// Until then a lease of a predecessor may run, whatever is known about a host (L3).
    floor: Leases,
    hosts: BTreeMap<HostId, Host>,
    brake: Brake,
    /// Until then failover is off: leases that are granted last until then, and no verdicts are given.
    off_until: Option<Tick>,
    /// When the last lease that any leader has granted to anybody has surely run out.
    last: Leases,
    /// Counts verdicts: tells whether one came between two moments (L4).
    verdicts: u64,
    /// Hosts that were silent when that was last asked and have not been heard since. Shared with who asked.
    silent: Arc<BTreeSet<HostId>>,
    /// When it is to be looked whether a host that is not among `silent` has fallen silent. Every host that counts as up is in one
    /// of the two, so that nobody has to go through all hosts.
    looks: BTreeSet<(Tick, HostId)>,
}

/// When each lease has surely run out.
#[derive(Clone, Copy, Debug)]
struct Leases {
    fast: Tick,
    patient: Tick,
}

impl Leases {
    /// Of leases that were granted for a heartbeat that was received at `received`.
    fn granted(timings: &Timings, received: Tick) -> Self {
        Self::of(timings, timings.fast, timings.patient, received)
    }

    /// The same of leases of these lengths.
    fn of(timings: &Timings, fast: Duration, patient: Duration, received: Tick) -> Self {
        Self { fast: received.after(timings.wait(fast)), patient: received.after(timings.wait(patient)) }
    }

    /// The later of each (L6).
    fn extend(&mut self, other: Self) {
        self.fast = self.fast.max(other.fast);
        self.patient = self.patient.max(other.patient);
    }

    fn liveness(&self, now: Tick) -> Liveness {
        if now < self.fast {
            Liveness::Up
        } else if now < self.patient {
            Liveness::FastLapsed
        } else {
            Liveness::Dead
        }
    }
}

#[derive(Debug)]
struct Host {
    out: Leases,
    /// The newest heartbeat, registration, or the takeover.
    counted: Tick,
    /// The newest heartbeat of this term.
    heartbeat: Option<Tick>,
    /// The newest verdict; `Up` since it registered.
    decided: Liveness,
    /// What of it is stored. Differs from `decided` while a verdict waits to be stored.
    recorded: Liveness,
    /// [`HealthTable::verdicts`] when the newest verdict was given.
    verdict: u64,
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The leases run so long from when the agent sent the heartbeat.
    Renew {
        /// Of VMs of the class `fast`.
        fast: Duration,
        /// Of VMs of the class `patient`.
        patient: Duration,
    },
    /// No renewal, and the session should end.
    Refused(Refused),
}

/// Why a heartbeat is not answered with a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The host must register first.
    #[error("the host is not registered")]
    Unregistered,
    /// A verdict was given.
    #[error("the host was declared lapsed; it must register again")]
    Lapsed,
}

/// A lease of a host has surely run out. Given again at every tick until [`HealthTable::declared`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The host.
    pub host: HostId,
    /// Which of its leases.
    pub lapsed: Lapsed,
}

/// Whether a host is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// Its heartbeats come.
    Up,
    /// They do not, but no lease has surely run out; or a verdict is withheld by the brake.
    Silent {
        /// For how long.
        for_: Duration,
    },
    /// Its short lease has surely run out.
    FastLapsed,
    /// Both leases have surely run out.
    Dead,
}

/// A registration that has begun (L4).
#[derive(Debug)]
#[must_use = "to be handed to `register` once the registration is stored"]
pub struct Entry {
    host: HostId,
    verdicts: u64,
}

/// A verdict on the host was given and perhaps not stored: it must say Hello again a moment later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host was just declared lapsed; try again")]
pub struct VerdictPending;

impl HealthTable {
    /// The table of a leader that took over at `took_over` (read after the leader key was created), with the hosts as
    /// they are recorded. `longest` is what a predecessor may have granted.
    ///
    /// A host that is recorded as up counts as renewed at the takeover (L3), whether or not it ever says anything. Of one
    /// whose short lease has run out, this holds for the long one.
    #[must_use]
    pub fn new(
        timings: Timings,
        longest: Timings,
        hosts: impl IntoIterator<Item = (HostId, Liveness)>,
        took_over: Tick,
    ) -> Self {
        let floor = Leases::granted(&timings.longest(longest), took_over);
        let hosts: BTreeMap<HostId, Host> = hosts
            .into_iter()
            .map(|(id, liveness)| {
                let host = Host {
                    out: floor,
                    counted: took_over,
                    heartbeat: None,
                    decided: liveness,
                    recorded: liveness,
                    verdict: 0,
                };
                (id, host)
            })
            .collect();
        let looks = hosts.keys().map(|&id| (took_over, id)).collect();
        Self {
            timings,
            floor,
            hosts,
            brake: Brake::default(),
            off_until: None,
            last: floor,
            verdicts: 0,
            silent: Arc::default(),
            looks,
        }
    }

    /// Failover is off until then; `None`: it is on. That leases may last so long must be on record before (W3).
    pub fn switch_off(&mut self, until: Option<Tick>) {
        self.off_until = until;
    }

    /// Whether failover is off.
    fn is_off(&self, now: Tick) -> bool {
        self.off_until.is_some_and(|until| now < until)
    }

    /// How long from `now` on, at the most, anything runs under a lease that was granted by this leader or before it: short
    /// lease, long lease.
    #[must_use]
    pub fn running(&self, now: Tick) -> (Duration, Duration) {
        (self.last.fast.since(now), self.last.patient.since(now))
    }

    /// A registration begins: to be called before `RegisterHost` is handed to the writer.
    ///
    /// # Errors
    ///
    /// While a verdict on the host waits to be stored, because the registration could be stored before it.
    pub fn enter(&self, host: HostId) -> Result<Entry, VerdictPending> {
        match self.hosts.get(&host) {
            Some(h) if h.decided != h.recorded => Err(VerdictPending),
            Some(_) | None => Ok(Entry { host, verdicts: self.verdicts }),
        }
    }

    /// A registration is stored: the host counts as renewed at `now` and is granted leases again.
    ///
    /// # Errors
    ///
    /// When a verdict was given since the registration began: it may be stored after the registration (L4).
    pub fn register(&mut self, entry: Entry, now: Tick) -> Result<(), VerdictPending> {
        let leases = Leases::granted(&self.timings, now);
        let floor = self.floor;
        let host = self.hosts.entry(entry.host).or_insert_with(|| Host {
            out: floor,
            counted: now,
            heartbeat: None,
            decided: Liveness::Up,
            recorded: Liveness::Up,
            verdict: 0,
        });
        if host.verdict > entry.verdicts {
            return Err(VerdictPending);
        }
        host.out.extend(leases);
        host.counted = host.counted.max(now);
        host.decided = Liveness::Up;
        host.recorded = Liveness::Up;
        self.looks.insert((host.counted, entry.host));
        self.heard(entry.host);
        self.brake.forget(entry.host);
        Ok(())
    }

    /// A heartbeat was received; `now` was read after that. Only to be called while the leadership is valid (L2).
    pub fn heartbeat(&mut self, host: HostId, now: Tick) -> Grant {
        let Some(h) = self.hosts.get_mut(&host) else { return Grant::Refused(Refused::Unregistered) };
        match h.decided {
            Liveness::Up => {}
            Liveness::FastLapsed | Liveness::Dead => return Grant::Refused(Refused::Lapsed),
        }
        let off_for = self.off_until.map_or(Duration::ZERO, |until| until.since(now));
        let (fast, patient) = (self.timings.fast.max(off_for), self.timings.patient.max(off_for));
        let leases = Leases::of(&self.timings, fast, patient, now);
        h.out.extend(leases);
        self.last.extend(leases);
        h.counted = h.counted.max(now);
        h.heartbeat = h.heartbeat.max(Some(now));
        self.heard(host);
        self.brake.forget(host);
        Grant::Renew { fast, patient }
    }

    /// Gives the verdicts that are due and not stored yet. Only to be called while the leadership is valid: after a pause
    /// of this process every host would look silent.
    pub fn tick(&mut self, now: Tick) -> Vec<Verdict> {
        let silence = self.timings.silence();
        let up = self.hosts.values().filter(|h| h.decided == Liveness::Up);
        let (heard, total) = up
            .fold((0_u32, 0_u32), |(heard, total), h| (heard + u32::from(now.since(h.counted) <= silence), total + 1));
        self.brake.observe(heard, total, now, silence);

        let off = self.is_off(now);
        let mut verdicts = Vec::new();
        for (&id, host) in &mut self.hosts {
            let due = host.out.liveness(now);
            if worse(due, host.decided) && !off && !self.brake.holds(id) {
                host.decided = due;
                if self.silent.contains(&id) {
                    Arc::make_mut(&mut self.silent).remove(&id);
                }
                self.verdicts += 1;
                host.verdict = self.verdicts;
            }
            if host.decided != host.recorded {
                let lapsed = match host.decided {
                    Liveness::Up => continue,
                    Liveness::FastLapsed => Lapsed::Fast,
                    Liveness::Dead => Lapsed::Both,
                };
                verdicts.push(Verdict { host: id, lapsed });
            }
        }
        verdicts
    }

    /// A verdict is stored.
    pub fn declared(&mut self, verdict: Verdict) {
        if let Some(host) = self.hosts.get_mut(&verdict.host) {
            host.recorded = match verdict.lapsed {
                Lapsed::Fast => Liveness::FastLapsed,
                Lapsed::Both => Liveness::Dead,
            };
        }
    }

    /// A host's record is gone.
    pub fn remove(&mut self, host: HostId) {
        self.hosts.remove(&host);
        if self.silent.contains(&host) {
            Arc::make_mut(&mut self.silent).remove(&host);
        }
        self.brake.forget(host);
    }

    /// It is not silent at this moment.
    fn heard(&mut self, host: HostId) {
        if self.silent.contains(&host) {
            Arc::make_mut(&mut self.silent).remove(&host);
            let counted = self.hosts.get(&host).map_or(self.floor.fast, |h| h.counted);
            self.looks.insert((counted, host));
        }
    }

    /// Whether a host is heard. One that has not registered yet is silent.
    #[must_use]
    pub fn state(&self, host: HostId, now: Tick) -> Hearing {
        let Some(host) = self.hosts.get(&host) else { return Hearing::Silent { for_: Duration::ZERO } };
        match host.decided {
            Liveness::Dead => Hearing::Dead,
            Liveness::FastLapsed => Hearing::FastLapsed,
            Liveness::Up if self.is_silent(host, now) => Hearing::Silent { for_: now.since(host.counted) },
            Liveness::Up => Hearing::Up,
        }
    }

    /// Hosts on which nothing should be placed although no verdict was given. Asked for each transaction, so it looks only at those
    /// that may have fallen silent since it was last asked.
    #[must_use]
    pub fn silent(&mut self, now: Tick) -> Arc<BTreeSet<HostId>> {
        let silence = self.timings.silence();
        while let Some(&(counted, id)) = self.looks.first()
            && now.since(counted) > silence
        {
            self.looks.pop_first();
            // One that is gone or was declared lapsed is looked at again when it registers.
            let Some(host) = self.hosts.get(&id).filter(|h| h.decided == Liveness::Up) else { continue };
            if self.is_silent(host, now) {
                Arc::make_mut(&mut self.silent).insert(id);
            } else {
                self.looks.insert((host.counted, id));
            }
        }
        Arc::clone(&self.silent)
    }

    fn is_silent(&self, host: &Host, now: Tick) -> bool {
        now.since(host.counted) > self.timings.silence()
    }

    /// What silence until `now` proves, whether or not a verdict was given: the brake withholds verdicts, and time passes
    /// all the same.
    #[must_use]
    pub fn proven(&self, host: HostId, now: Tick) -> Liveness {
        self.hosts.get(&host).map_or(self.floor, |h| h.out).liveness(now)
    }

    /// When the newest heartbeat of this term came.
    #[must_use]
    pub fn last_heartbeat(&self, host: HostId) -> Option<Tick> {
        self.hosts.get(&host).and_then(|h| h.heartbeat)
    }

    /// The brake, as of the newest tick.
    #[must_use]
    pub fn brake(&self) -> BrakeState {
        self.brake.state()
    }

    /// A person says that the hosts that are silent now are really dead: the brake withholds no verdict on them. Their
    /// leases are waited out all the same. Returns how many they are.
    pub fn release_brake(&mut self, now: Tick) -> u32 {
        let silence = self.timings.silence();
        let silent: Vec<HostId> = self
            .hosts
            .iter()
            .filter(|(_, h)| h.decided != Liveness::Dead && now.since(h.counted) > silence)
            .map(|(&id, _)| id)
            .collect();
        self.brake.release(silent)
    }
}

/// Whether `a` says more than `b` about which leases have run out.
const fn worse(a: Liveness, b: Liveness) -> bool {
    const fn rank(l: Liveness) -> u8 {
        match l {
            Liveness::Up => 0,
            Liveness::FastLapsed => 1,
            Liveness::Dead => 2,
        }
    }
    rank(a) > rank(b)
}
