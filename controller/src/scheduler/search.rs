//! Finds the best host by the index. The scan over all hosts ([`super::place_by_scan`]) gives the same answer.

use uncloud_proto::ids::HostId;

use super::{
    ClusterView, Home, Limits, Request, filter,
    index::{Bucket, Class, First, Slot},
    kind::Signature,
    score::{Others, Score, score},
};

/// The best host, and whether others can take the VM, too. `None`: no host can.
pub(super) fn best(view: &ClusterView, request: &Request, limits: &Limits<'_>) -> Option<(Score, Others)> {
    let mut search =
        Search { view, request, limits, named: named(request), best: None, class: None, second: None, asked: 0 };
    search.ask_named();
    match request.home {
        Home::OnlyHost(_) => {}
        Home::Anywhere | Home::SharedPools { .. } => search.ask_classes(),
    }
    let best = search.best?;
    let alone = search.second.is_none() && search.asked < ENOUGH;
    Some((best, if alone { Others::None } else { Others::Some }))
}

/// So many hosts are asked whether they could take the VM, too. When most hosts are silent, every VM of every host that comes back
/// would ask them all, only to say whether it had a choice.
const ENOUGH: usize = 64;

/// Hosts whose place in the index says nothing about their score for this very VM. Few.
fn named(request: &Request) -> Vec<HostId> {
    match request.home {
        Home::OnlyHost(host) => vec![host],
        Home::Anywhere | Home::SharedPools { .. } => {
            let mut named: Vec<HostId> = request.prefer.into_iter().chain(request.holds.iter().copied()).collect();
            named.sort_unstable();
            named.dedup();
            named
        }
    }
}

/// No host of the class has a better score. `None`: none can take the VM.
fn bound(slot: &Slot, asked: Signature, request: &Request) -> Option<Score> {
    let first = slot.first.as_ref().filter(|_| slot.signature.has_all(asked))?;
    Some(Score::of_rank(first.size, first.rank, request))
}

struct Search<'a> {
    view: &'a ClusterView,
    request: &'a Request,
    limits: &'a Limits<'a>,
    named: Vec<HostId>,
    best: Option<Score>,
    /// The class that it was found in.
    class: Option<&'a Class>,
    /// Another host that can take it, too. It need not be the second best.
    second: Option<HostId>,
    /// How many were asked for that.
    asked: usize,
}

impl<'a> Search<'a> {
    fn ask_named(&mut self) {
        for host in std::mem::take(&mut self.named) {
            if let Some(found) = self.view.host(host)
                && filter::check(self.view, host, found, self.request, self.limits).is_ok()
            {
                self.found(score(host, found, self.request), None);
            }
            self.named.push(host);
        }
    }

    fn ask_classes(&mut self) {
        let asked = Signature::asked_for(self.request);
        // A host that is preferred and can take it is the best already.
        if self.best.is_none_or(|best| !best.is_preferred()) {
            self.ask_for_best(asked);
        }
        // It is said when a host is the only one.
        self.ask_for_second(asked);
    }

    fn ask_for_best(&mut self, asked: Signature) {
        let (view, request) = (self.view, self.request);
        // No host has a better score than the best of those that come first in their classes. Mostly it can take the VM.
        let mut least: Option<(Score, &Slot)> = None;
        for slot in view.index().slots() {
            if let Some(bound) = bound(slot, asked, request)
                && least.is_none_or(|(least, _)| bound < least)
            {
                least = Some((bound, slot));
            }
        }
        let Some((least, likely)) = least else { return };
        for slot in std::iter::once(likely).chain(view.index().slots()) {
            if self.best.is_some_and(|best| best <= least) {
                return;
            }
            if let (Some(bound), Some(first), Some(class)) = (bound(slot, asked, request), slot.first, slot.class())
                && self.best.is_none_or(|best| bound < best)
                && class.kind.admits(request)
            {
                self.ask_class(class, first);
            }
        }
    }

    fn ask_for_second(&mut self, asked: Signature) {
        let Some(best) = self.best else { return };
        // Mostly another host of that class will do, and it is known that such can take the VM.
        let found_in = self.class;
        if let Some(class) = found_in {
            self.ask_class_for_second(class, best.host);
        }
        for slot in self.view.index().slots() {
            if self.second.is_some() || self.asked == ENOUGH {
                return;
            }
            let Some(class) = slot.class().filter(|_| slot.signature.has_all(asked)) else { continue };
            if found_in.is_none_or(|found| !std::ptr::eq(found, class)) && class.kind.admits(self.request) {
                self.ask_class_for_second(class, best.host);
            }
        }
    }

    fn ask_class_for_second(&mut self, class: &Class, best: HostId) {
        for host in self.buckets(class).iter().flat_map(Bucket::ranks).map(|rank| rank.host) {
            if self.second.is_some() || self.asked == ENOUGH {
                return;
            }
            if host != best && !self.named.contains(&host) {
                self.asked += 1;
                self.second = Some(host).filter(|&host| self.can_take(host));
            }
        }
    }

    /// Those with enough vCPUs left.
    fn buckets<'c>(&self, class: &'c Class) -> &'c [Bucket] {
        let capacity = filter::vcpus(class.kind.vcpus, self.limits);
        match capacity.checked_sub(u64::from(self.request.vcpus)) {
            Some(at_most) => class.buckets_up_to(at_most),
            None => &[],
        }
    }

    /// `first` is the best host of the class, whether it can take the VM or not.
    fn ask_class(&mut self, class: &'a Class, first: First) {
        if !self.named.contains(&first.rank.host) && self.can_take(first.rank.host) {
            self.found(Score::of_rank(first.size, first.rank, self.request), Some(class));
            return;
        }
        let buckets = self.buckets(class);
        // The best first host comes first, so that the others are only looked at if it cannot take the VM.
        let Some(first) = buckets.iter().min_by_key(|b| b.first) else { return };
        self.ask_bucket(class, first);
        for bucket in buckets {
            self.ask_bucket(class, bucket);
        }
    }

    fn ask_bucket(&mut self, class: &'a Class, bucket: &Bucket) {
        for rank in bucket.ranks() {
            let score = Score::of_rank(class.kind.size(), *rank, self.request);
            if self.best.is_some_and(|best| best <= score) {
                return;
            }
            // More is promised on those that follow.
            if class.kind.memory_mib < rank.memory_mib.saturating_add(self.request.memory_mib) {
                return;
            }
            if !self.named.contains(&rank.host) && self.can_take(rank.host) {
                self.found(score, Some(class));
                return;
            }
        }
    }

    /// Of a host whose kind admits the VM.
    fn can_take(&self, host: HostId) -> bool {
        self.view.host(host).is_some_and(|found| {
            filter::check_this_host(host, found, self.request, self.limits)
                .and_then(|()| filter::check_now(self.view, host, found, self.request, self.limits))
                .is_ok()
        })
    }

    fn found(&mut self, score: Score, class: Option<&'a Class>) {
        let worse = match self.best {
            Some(best) if best <= score => Some(score.host),
            before => {
                (self.best, self.class) = (Some(score), class);
                before.map(|before| before.host)
            }
        };
        self.second = self.second.or(worse);
    }
}
