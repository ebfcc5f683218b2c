//! When a host's leases have surely run out.
//!
//! The leader answers an agent's heartbeats with renewals: "your leases run so long from when you sent this". When no
//! heartbeat comes any more, this module says when the host's VMs may be given to other hosts. It is pure: the time
//! comes in as an argument, grants and verdicts come out as values. It stores nothing and moves nothing; sessions
//! (`sessions/`) ask [`HealthTable::heartbeat`] before they answer, the reconciler (`reconcile/`) asks
//! [`HealthTable::tick`] and has the verdicts stored.
//!
//! ```text
//!              heartbeat                  fast lease out         patient lease out, too
//!   register ──▶ Up ⇄ Silent ──────────▶ FastLapsed ──────────▶ Dead
//!      ▲                                      │                   │
//!      └────────── registers again ───────────┴───────────────────┘
//! ```
//!
//! # Safety argument
//!
//! Promise P1 needs: when a verdict is given for a class of a host, no VM of that class executes there, and none will
//! until the host has registered again. The whole argument, with its assumptions, is in `docs/fencing.md`; these are
//! its claims about the leader's side. Tests cite them.
//!
//! * **L1** *The host's deadline comes first.* The host counts `L` from when it *sent* a heartbeat. The leader counts
//!   `L·(1+ε)` and the kill allowance from when it *received* it, which is not earlier, on a clock that is not more than ε
//!   faster ([`Timings::wait`]).
//! * **L2** *A leader grants only while its leadership is valid*, and this ends before another leader begins. So every
//!   heartbeat that a predecessor ever answered was sent before the takeover. (Who calls [`HealthTable::heartbeat`]
//!   asks `Validity` after it has received the heartbeat.)
//! * **L3** *A takeover counts as a renewal of every host*, with the longest lease that a predecessor may have granted.
//!   So with L2 the new leader waits out whatever was granted before it.
//! * **L4** *A verdict is final.* From the moment it is given the host gets no more grants until it has registered
//!   again, and a registration counts only if no verdict came between its beginning ([`HealthTable::enter`], before
//!   `RegisterHost` is handed to the writer) and its end ([`HealthTable::register`], after that is stored), and none was
//!   waiting to be stored when it began. So in the order of the writer a host that may be granted leases is recorded as
//!   up, and nothing that was decided before it registered moves its VMs afterwards.
//! * **L5** *Each class by itself.* The verdict on the short lease says nothing about the long one.
//! * **L6** *Waits only grow.* A shorter lease, or an answer that came out of order, never moves a host's time forward: an
//!   agent does not shorten a lease that it has, either.
//! * **L7** *The brake only withholds.* It delays verdicts, and releasing it gives none that the table would not give by
//!   itself.
//! * **L8** *Switching failover off only lengthens.* Leases that are granted meanwhile last until the end of it, verdicts are
//!   withheld; switched on again, every lease that was granted is waited out (L6).

mod brake;
mod policy;
mod table;

#[cfg(test)]
mod tests;

pub use brake::BrakeState;
pub use policy::Timings;
pub use table::{Entry, Grant, HealthTable, Hearing, Refused, Verdict, VerdictPending};
