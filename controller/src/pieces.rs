//! A map in pieces that copies share until they change: a copy of a hundred thousand costs as much as one of a few hundred, and the
//! first change of a piece in a copy as much as that piece.
//!
//! Whoever decides about a batch of VMs changes a copy of the scheduler's view, a term begins with a copy of the state, and so does
//! a simulation. Pure.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    ops::{Bound, RangeBounds},
    sync::Arc,
};

use uncloud_proto::ids::{HostId, VmId};

/// As many as a byte has values.
const PIECES: usize = 256;

/// In which piece a key is.
pub(crate) trait Piece {
    fn piece(&self) -> u8;
}

/// Whose order is that of their pieces. Random ids are spread over all of them.
pub(crate) trait Sorted: Piece {}

impl Piece for HostId {
    fn piece(&self) -> u8 {
        self.uuid().as_bytes()[0]
    }
}

impl Piece for VmId {
    fn piece(&self) -> u8 {
        self.uuid().as_bytes()[0]
    }
}

impl Sorted for HostId {}
impl Sorted for VmId {}

impl Piece for str {
    /// FNV-1a: a few nanoseconds. Who chooses names so that all are in one piece has a slower copy, and nothing else.
    fn piece(&self) -> u8 {
        let hash = self.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        hash.to_be_bytes()[0]
    }
}

impl Piece for String {
    fn piece(&self) -> u8 {
        self.as_str().piece()
    }
}

/// The map.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pieces<K, V> {
    pieces: Vec<Arc<BTreeMap<K, V>>>,
}

impl<K, V> Default for Pieces<K, V> {
    fn default() -> Self {
        Self { pieces: vec![Arc::default(); PIECES] }
    }
}

impl<K: Ord + Piece, V> Pieces<K, V> {
    pub(crate) fn get<Q: Ord + Piece + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.pieces[usize::from(key.piece())].get(key)
    }

    pub(crate) fn contains_key<Q: Ord + Piece + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// All, in no order that means anything.
    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.pieces.iter().flat_map(|piece| piece.values())
    }
}

impl<K: Ord + Sorted, V> Pieces<K, V> {
    /// All, in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.pieces.iter().flat_map(|piece| piece.iter())
    }

    /// Those in a range, in their order.
    pub(crate) fn range(&self, range: impl RangeBounds<K>) -> impl Iterator<Item = (&K, &V)>
    where
        K: Copy,
    {
        let (start, end) = (range.start_bound().cloned(), range.end_bound().cloned());
        let piece = |bound: &Bound<K>, otherwise: usize| match bound {
            Bound::Included(key) | Bound::Excluded(key) => usize::from(key.piece()),
            Bound::Unbounded => otherwise,
        };
        let (first, last) = (piece(&start, 0), piece(&end, PIECES - 1));
        // A range that ends before it begins is empty.
        let pieces = self.pieces.get(first..=last).unwrap_or_default();
        pieces.iter().flat_map(move |piece| piece.range((start, end)))
    }
}

impl<K: Ord + Piece + Clone, V: Clone> Pieces<K, V> {
    /// The piece in which this key is, if it is there.
    pub(crate) fn piece_mut<Q: Piece + ?Sized>(&mut self, key: &Q) -> &mut BTreeMap<K, V> {
        Arc::make_mut(&mut self.pieces[usize::from(key.piece())])
    }

    pub(crate) fn get_mut<Q: Ord + Piece + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        // A piece is not copied for what is not there.
        self.get(key)?;
        self.piece_mut(key).get_mut(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.piece_mut(&key).insert(key, value)
    }

    pub(crate) fn remove<Q: Ord + Piece + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.get(key)?;
        self.piece_mut(key).remove(key)
    }
}

impl<K: Ord + Piece, V> FromIterator<(K, V)> for Pieces<K, V> {
    /// Of a list that is sorted within each piece it is built without a search.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(all: I) -> Self {
        let mut pieces: Vec<Vec<(K, V)>> = std::iter::repeat_with(Vec::new).take(PIECES).collect();
        for (key, value) in all {
            pieces[usize::from(key.piece())].push((key, value));
        }
        let pieces = pieces.into_iter().map(|piece| Arc::new(piece.into_iter().collect()));
        Self { pieces: pieces.collect() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn host(n: u128) -> HostId {
        HostId::from_uuid(Uuid::from_u128(n))
    }

    fn any_host() -> impl Strategy<Value = HostId> {
        (0..4_u128, 0..4_u128).prop_map(|(high, low)| host(high << 120 | low))
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_copy_keeps_what_it_has(
            puts in prop::collection::vec((any_host(), any::<u8>()), 0..30),
            changes in prop::collection::vec((any_host(), any::<Option<u8>>()), 0..30),
            low in any_host(),
            high in any_host(),
        ) {
            let mut model: BTreeMap<HostId, u8> = puts.iter().copied().collect();
            let mut all: Pieces<HostId, u8> = puts.into_iter().collect();
            let (copy, before) = (all.clone(), model.clone());
            for (id, value) in changes {
                match value {
                    Some(value) => prop_assert_eq!(all.insert(id, value), model.insert(id, value)),
                    None => prop_assert_eq!(all.remove(&id), model.remove(&id)),
                }
                prop_assert_eq!(all.get_mut(&id), model.get_mut(&id));
            }
            prop_assert!(all.iter().eq(model.iter()));
            prop_assert!(copy.iter().eq(before.iter()));
            prop_assert_eq!(&all, &model.clone().into_iter().collect::<Pieces<_, _>>());
            let after = (Bound::Excluded(low), Bound::Unbounded);
            prop_assert!(all.range(after).eq(model.range(after)));
            if low <= high {
                prop_assert!(all.range(low..=high).eq(model.range(low..=high)));
            }
        }
    }

    #[test]
    fn names_are_found_by_what_they_are() {
        let mut names = Pieces::<String, u32>::default();
        for n in 0..1000 {
            names.insert(format!("vm-{n}"), n);
        }
        assert_eq!((names.get("vm-7"), names.get("vm-1000")), (Some(&7), None));
        assert!(names.pieces.iter().filter(|piece| piece.is_empty()).count() < 50, "they are spread");
    }
}
