//! Bounds how many VMs of this host are being started at once, and lets those with the higher priority go first.
//!
//! After the death of another host, dozens of VMs may be given to this one in the same second. Started all at once,
//! they would take each other's disk and CPU, and the first would be up as late as the last.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// The queue of starts. Cheap to clone.
#[derive(Clone)]
pub struct Starts {
    queue: Arc<Mutex<Queue>>,
}

struct Queue {
    free: usize,
    arrivals: u64,
    /// Highest priority first, then by arrival.
    waiting: BTreeMap<(Reverse<u32>, u64), oneshot::Sender<Turn>>,
}

/// The right to start one VM. The next in the queue has its turn when this is dropped.
pub struct Turn {
    /// Absent: it has been passed on.
    queue: Option<Arc<Mutex<Queue>>>,
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turn")
    }
}

impl Starts {
    /// At most `at_once` turns are out at the same time.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self { queue: Arc::new(Mutex::new(Queue { free: at_once, arrivals: 0, waiting: BTreeMap::new() })) }
    }

    /// Waits for a turn. Dropping the future gives up the place in the queue.
    pub async fn turn(&self, priority: u32) -> Turn {
        let receiver = {
            let mut queue = lock(&self.queue);
            if queue.free > 0 {
                queue.free -= 1;
                return Turn { queue: Some(Arc::clone(&self.queue)) };
            }
            let (sender, receiver) = oneshot::channel();
            queue.arrivals += 1;
            let place = (Reverse(priority), queue.arrivals);
            queue.waiting.insert(place, sender);
            receiver
        };
        receiver.await.expect("a place in the queue is removed only to give it its turn")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(shared) = self.queue.take() else { return };
        loop {
            let next = {
                let mut queue = lock(&shared);
                match queue.waiting.pop_first() {
                    Some((_, next)) => next,
                    None => {
                        queue.free += 1;
                        return;
                    }
                }
            };
            match next.send(Turn { queue: Some(Arc::clone(&shared)) }) {
                Ok(()) => return,
                // It has given up. Its turn goes to the next one here; passed on by its own drop, it would recurse.
                Err(mut turn) => turn.queue = None,
            }
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
    use tokio::time;

    use super::*;

    #[tokio::test]
    async fn higher_priorities_go_first_and_then_who_came_first() {
        let starts = Starts::new(1);
        let first = starts.turn(0).await;
        let waiting = FuturesUnordered::new();
        for (name, priority) in [("low", 1), ("high", 9), ("low too", 1)] {
            let starts = starts.clone();
            waiting.push(async move { (starts.turn(priority).await, name) }.boxed_local());
        }
        let names = waiting.map(|(_turn, name)| name).collect::<Vec<_>>();
        tokio::pin!(names);
        assert!(time::timeout(Duration::from_millis(20), &mut names).await.is_err(), "one at a time");
        drop(first);
        assert_eq!(names.await, ["high", "low", "low too"]);
        assert_eq!(lock(&starts.queue).free, 1);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_holds_nobody_up() {
        let starts = Starts::new(1);
        let first = starts.turn(0).await;
        for _ in 0..10_000 {
            assert!(starts.turn(5).now_or_never().is_none());
        }
        drop(first);
        starts.turn(0).now_or_never().expect("the turn came back");
    }
}
