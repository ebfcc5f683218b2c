//! The streams between agents and controllers.
//!
//! A stream keeps the order of its messages in each direction; different streams overtake each other. A lost message breaks its
//! stream: nothing that was sent after it arrives, and both ends learn of it some time later, each for itself. While a
//! direction of a link is cut, messages wait (TCP sends them again); if an end has heard nothing for the time of its
//! keep-alive, it gives the stream up.

use std::collections::BTreeMap;

use super::{
    clock::{MS, Ns, SEC},
    core::Core,
    queue::{Down, Up, What, Whom},
};

/// The agent's end, and messages up.
pub(crate) const AGENT: usize = 0;
/// The controller's end, and messages down.
pub(crate) const CONTROLLER: usize = 1;

/// What is sent.
#[derive(Clone, Debug)]
enum Message {
    Up(Box<Up>),
    Down(Box<Down>),
}

#[derive(Debug)]
struct Stream {
    ends: [usize; 2],
    epochs: [u64; 2],
    open: [bool; 2],
    /// By direction: nothing more arrives.
    lost: [bool; 2],
    last: [Ns; 2],
    held: [Vec<Message>; 2],
}

/// All streams, and the links between hosts and controllers.
#[derive(Debug)]
pub(crate) struct Net {
    streams: BTreeMap<u64, Stream>,
    /// By host, controller, direction: how many faults cut it.
    cut: Vec<Vec<[u32; 2]>>,
    /// Extra delay.
    pub(crate) slow: Ns,
}

impl Net {
    /// All links whole.
    #[must_use]
    pub(crate) fn new(hosts: usize, controllers: usize) -> Self {
        Self { streams: BTreeMap::new(), cut: vec![vec![[0; 2]; controllers]; hosts], slow: 0 }
    }

    /// Whether a direction is cut.
    #[must_use]
    pub(crate) fn is_cut(&self, host: usize, controller: usize, direction: usize) -> bool {
        self.cut[host][controller][direction] > 0
    }

    /// The peer of a host's stream, and the host.
    #[must_use]
    pub(crate) fn ends(&self, stream: u64) -> Option<[usize; 2]> {
        self.streams.get(&stream).map(|s| s.ends)
    }

    /// Whether an end still has the stream open.
    #[must_use]
    pub(crate) fn is_open(&self, stream: u64, end: usize) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.open[end])
    }
}

impl Core {
    /// An agent opens a stream.
    pub(crate) fn open_stream(&mut self, host: usize, controller: usize, epochs: [u64; 2]) -> u64 {
        let id = self.uid();
        let stream = Stream {
            ends: [host, controller],
            epochs,
            open: [true; 2],
            lost: [false; 2],
            last: [self.now; 2],
            held: [Vec::new(), Vec::new()],
        };
        self.net.streams.insert(id, stream);
        id
    }

    /// The agent sends.
    pub(crate) fn send_up(&mut self, stream: u64, message: Up) {
        self.send(stream, AGENT, Message::Up(Box::new(message)));
    }

    /// The controller sends.
    pub(crate) fn send_down(&mut self, stream: u64, message: Down) {
        self.send(stream, CONTROLLER, Message::Down(Box::new(message)));
    }

    fn send(&mut self, id: u64, direction: usize, message: Message) {
        let loss = if self.healed { 0 } else { self.config.loss };
        let lost = self.rng.permille(loss);
        let Some(stream) = self.net.streams.get_mut(&id) else { return };
        if stream.lost[direction] || !stream.open[direction] {
            return;
        }
        if lost {
            stream.lost = [true; 2];
            self.stats.fault("message lost");
            self.log(format_args!("stream {id}: a message is lost, the stream breaks"));
            for end in [AGENT, CONTROLLER] {
                let delay = self.between(1, 3000);
                self.broken(id, end, delay);
            }
            return;
        }
        let [host, controller] = stream.ends;
        if self.net.cut[host][controller][direction] > 0 || !stream.held[direction].is_empty() {
            stream.held[direction].push(message);
            return;
        }
        self.deliver(id, direction, message);
    }

    fn deliver(&mut self, id: u64, direction: usize, message: Message) {
        let mut delay = self.rng.range(MS / 10, 3 * MS);
        if !self.healed && self.rng.permille(10) {
            delay += self.between(10, 500);
            self.stats.fault("message late");
        }
        if self.net.slow > 0 {
            delay += self.rng.below(self.net.slow);
        }
        let Some(stream) = self.net.streams.get_mut(&id) else { return };
        let at = (self.now + delay).max(stream.last[direction] + 1);
        stream.last[direction] = at;
        let receiver = 1 - direction;
        let (whom, epoch) = (whom(stream.ends, receiver), stream.epochs[receiver]);
        let what = match message {
            Message::Up(up) => What::Up(id, up),
            Message::Down(down) => What::Down(id, down),
        };
        self.at(at, whom, epoch, what);
    }

    /// An end learns that the stream is broken.
    fn broken(&mut self, id: u64, end: usize, delay: Ns) {
        let Some(stream) = self.net.streams.get(&id) else { return };
        let (whom, epoch) = (whom(stream.ends, end), stream.epochs[end]);
        self.after(delay, whom, epoch, What::Broken(id));
    }

    /// A process closes its end. The other learns of it when the network lets it.
    pub(crate) fn close(&mut self, id: u64, end: usize) {
        let Some(stream) = self.net.streams.get_mut(&id) else { return };
        if !stream.open[end] {
            return;
        }
        stream.open[end] = false;
        if !stream.open[1 - end] {
            self.net.streams.remove(&id);
            return;
        }
        let [host, controller] = stream.ends;
        // What was sent before the end arrives first.
        let after = stream.last[end].saturating_sub(self.now) + MS;
        if self.net.is_cut(host, controller, end) {
            self.suspect(id, 1 - end);
        } else {
            self.broken(id, 1 - end, after);
        }
    }

    /// An end may hear nothing any more: it gives up when its keep-alive is not answered.
    pub(crate) fn suspect(&mut self, id: u64, end: usize) {
        let delay = self.between(2000, 4200);
        self.after(delay, Whom::World, 0, What::Silence(id, end));
    }

    /// A keep-alive was not answered in time, if the other end really cannot answer. `dead` says of the two processes
    /// whether they are stopped or gone.
    pub(crate) fn silence(&mut self, id: u64, end: usize, dead: [bool; 2]) {
        let Some(stream) = self.net.streams.get(&id) else { return };
        let [host, controller] = stream.ends;
        let cut = self.net.is_cut(host, controller, AGENT) || self.net.is_cut(host, controller, CONTROLLER);
        if stream.open[end] && (cut || dead[1 - end] || !stream.open[1 - end]) {
            self.broken(id, end, 0);
        }
    }

    /// All streams that a process has open.
    #[must_use]
    pub(crate) fn streams_of(&self, end: usize, index: usize) -> Vec<u64> {
        self.net.streams.iter().filter(|(_, s)| s.ends[end] == index && s.open[end]).map(|(id, _)| *id).collect()
    }

    /// Cuts a direction of a link, or makes it whole again.
    pub(crate) fn cut(&mut self, host: usize, controller: usize, direction: usize, cut: bool) {
        let count = &mut self.net.cut[host][controller][direction];
        *count = if cut { *count + 1 } else { count.saturating_sub(1) };
        let whole = *count == 0;
        let on_link: Vec<u64> =
            self.net.streams.iter().filter(|(_, s)| s.ends == [host, controller]).map(|(id, _)| *id).collect();
        for id in on_link {
            if cut {
                self.suspect(id, AGENT);
                self.suspect(id, CONTROLLER);
            } else if whole {
                let held = match self.net.streams.get_mut(&id) {
                    Some(stream) => std::mem::take(&mut stream.held[direction]),
                    None => continue,
                };
                for message in held {
                    self.deliver(id, direction, message);
                }
            }
        }
    }
}

fn whom(ends: [usize; 2], end: usize) -> Whom {
    if end == AGENT { Whom::Agent(ends[AGENT]) } else { Whom::Controller(ends[CONTROLLER]) }
}

/// How long an agent waits until it gives up a controller that it cannot reach.
pub(crate) const WELCOME_TIMEOUT: Ns = 3 * SEC;

impl Core {
    /// The agent's machine has lost its power: nobody says anything.
    pub(crate) fn vanish(&mut self, id: u64) {
        if let Some(stream) = self.net.streams.get_mut(&id) {
            stream.open[AGENT] = false;
            self.suspect(id, CONTROLLER);
        }
    }
}
