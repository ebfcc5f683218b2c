//! Hosts that take VMs, by kind and in the order of their scores, so that placing one VM looks at few of them.
//!
//! ```text
//!  class = all hosts of one kind (`kind.rs`) that are up and active
//!    └─ bucket = those of them with the same number of vCPUs promised
//!         └─ hosts in the order of their scores: memory promised, then VMs, then id
//! ```
//!
//! Hosts of a kind have the same size, so whatever the VM, their order is that of the memory promised on them: the first of a bucket
//! that can take the VM is the best of the bucket, and a class whose first host is not better than the best that was found
//! needs no look. `search.rs` does that. Whoever changes what is known of a host moves it ([`Index::moved`]): one host out of one
//! bucket and into another.
//!
//! What decides is kept once: the filters and scores are those of the scan over all hosts, and the index only says whom to
//! ask first. Copies share classes until one changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uncloud_proto::ids::HostId;

use super::kind::{Kind, Signature, Size};

/// Where a host is, in the order of the scores of hosts of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// MiB promised on it.
    pub(super) memory_mib: u64,
    /// How many VMs it has.
    pub(super) vms: u32,
    pub(super) host: HostId,
}

/// A class of an [`Index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClassId(usize);

/// Where a host is in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) class: ClassId,
    /// Promised on it.
    pub(super) vcpus: u32,
    pub(super) rank: Rank,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// One after the other, because each search goes through all of them. Those without a class are in `free`.
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_kind: Arc<BTreeMap<Arc<Kind>, usize>>,
}

/// What a search must know of a class to see that it needs no look.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    pub(super) signature: Signature,
    /// The best host of the class. `None`: it has none that takes VMs.
    pub(super) first: Option<First>,
    class: Option<Arc<Class>>,
}

/// All that its score is made of, so that the class itself is not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct First {
    pub(super) rank: Rank,
    pub(super) size: Size,
}

#[derive(Clone, Debug)]
pub(super) struct Class {
    pub(super) kind: Arc<Kind>,
    /// How many hosts are of this kind, whether they take VMs or not.
    hosts: usize,
    /// By the vCPUs that are promised; none is empty.
    buckets: Vec<Bucket>,
}

#[derive(Clone, Debug)]
pub(super) struct Bucket {
    vcpus: u32,
    /// The first of `hosts`.
    pub(super) first: Rank,
    pub(super) hosts: BTreeSet<Rank>,
}

impl Index {
    /// One more host is of this kind. Gives the kind back as all of its hosts share it.
    pub(super) fn join(&mut self, kind: Kind) -> (ClassId, Arc<Kind>) {
        if let Some(&n) = self.by_kind.get(&kind)
            && let Some(class) = self.slots.get_mut(n).and_then(|s| s.class.as_mut())
        {
            let class = Arc::make_mut(class);
            class.hosts += 1;
            return (ClassId(n), Arc::clone(&class.kind));
        }
        let kind = Arc::new(kind);
        let class = Class { kind: Arc::clone(&kind), hosts: 1, buckets: Vec::new() };
        let slot = Slot { signature: kind.signature(), first: None, class: Some(Arc::new(class)) };
        let n = match self.free.pop() {
            Some(n) => {
                self.slots[n] = slot;
                n
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        Arc::make_mut(&mut self.by_kind).insert(Arc::clone(&kind), n);
        (ClassId(n), kind)
    }

    /// One host less is of this kind. It has been moved out before.
    pub(super) fn leave(&mut self, ClassId(n): ClassId) {
        let Some(slot) = self.slots.get_mut(n) else { return };
        let Some(shared) = &mut slot.class else { return };
        let class = Arc::make_mut(shared);
        class.hosts -= 1;
        if class.hosts == 0 {
            Arc::make_mut(&mut self.by_kind).remove(&class.kind);
            *slot = Slot::default();
            self.free.push(n);
        }
    }

    /// A host that was here is there now. `None`: it takes no VMs.
    pub(super) fn moved(&mut self, from: Option<Position>, to: Option<Position>) {
        if from == to {
            return;
        }
        if let Some(from) = from {
            self.change(from.class, |class| class.remove(&from));
        }
        if let Some(to) = to {
            self.change(to.class, |class| class.insert(&to));
        }
    }

    fn change(&mut self, ClassId(n): ClassId, change: impl FnOnce(&mut Class)) {
        if let Some(slot) = self.slots.get_mut(n)
            && let Some(class) = &mut slot.class
        {
            let class = Arc::make_mut(class);
            change(class);
            let size = class.kind.size();
            slot.first = class.buckets.iter().map(|b| b.first).min().map(|rank| First { rank, size });
        }
    }

    /// The classes, in no order that means anything.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    /// The same for indexes that say the same, however they came about.
    #[cfg(test)]
    pub(super) fn content(&self) -> Vec<ClassContent> {
        let mut all = Vec::new();
        for (kind, &n) in self.by_kind.iter() {
            let slot = &self.slots[n];
            let class = slot.class.as_ref().expect("what is found by its kind is there");
            assert_eq!((&class.kind, slot.signature), (kind, kind.signature()));
            assert_eq!(slot.first.map(|f| f.rank), class.buckets.iter().filter_map(|b| b.hosts.first().copied()).min());
            assert!(class.buckets.iter().all(|b| b.hosts.first() == Some(&b.first)));
            assert!(class.buckets.is_sorted_by(|a, b| a.vcpus < b.vcpus));
            let hosts = class.buckets.iter().flat_map(|b| b.hosts.iter().map(|&rank| (b.vcpus, rank)));
            all.push(ClassContent { kind: (**kind).clone(), hosts: class.hosts, taking: hosts.collect() });
        }
        assert_eq!(self.slots.len(), all.len() + self.free.len(), "no class is left behind");
        all
    }
}

/// What a class says, for comparing.
#[cfg(test)]
#[derive(Debug, PartialEq)]
pub(super) struct ClassContent {
    kind: Kind,
    hosts: usize,
    /// Those that take VMs, with the vCPUs promised.
    taking: Vec<(u32, Rank)>,
}

impl Slot {
    pub(super) fn class(&self) -> Option<&Class> {
        self.class.as_deref()
    }
}

impl Bucket {
    /// Its hosts, the best first. The first needs no look into the set.
    pub(super) fn ranks(&self) -> impl Iterator<Item = &Rank> {
        std::iter::once(&self.first).chain(self.hosts.iter().skip(1))
    }
}

impl Class {
    /// The hosts on which no more than this is promised.
    pub(super) fn buckets_up_to(&self, vcpus: u64) -> &[Bucket] {
        let end = self.buckets.partition_point(|b| u64::from(b.vcpus) <= vcpus);
        &self.buckets[..end]
    }

    fn insert(&mut self, at: &Position) {
        match self.buckets.binary_search_by_key(&at.vcpus, |b| b.vcpus) {
            Ok(n) => {
                let bucket = &mut self.buckets[n];
                bucket.hosts.insert(at.rank);
                bucket.first = bucket.first.min(at.rank);
            }
            Err(n) => {
                let bucket = Bucket { vcpus: at.vcpus, first: at.rank, hosts: BTreeSet::from([at.rank]) };
                self.buckets.insert(n, bucket);
            }
        }
    }

    fn remove(&mut self, at: &Position) {
        let Ok(n) = self.buckets.binary_search_by_key(&at.vcpus, |b| b.vcpus) else { return };
        let bucket = &mut self.buckets[n];
        bucket.hosts.remove(&at.rank);
        match bucket.hosts.first() {
            Some(&first) => bucket.first = first,
            None => drop(self.buckets.remove(n)),
        }
    }
}
