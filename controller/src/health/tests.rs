//! Tests of the leader's side of host leases. Each names the claim that it defends (`mod.rs`, `docs/fencing.md`).

mod random;

use std::{collections::BTreeSet, time::Duration};

use uncloud_proto::{clock::Tick, ids::HostId};
use uuid::Uuid;

use super::*;
use crate::{model::Liveness, state::command::Lapsed};

const TIMINGS: Timings =
    Timings { fast: Duration::from_secs(6), patient: Duration::from_secs(60), kill_allowance: Duration::from_secs(1) };

/// When the short lease of a host that was heard at 0 has surely run out: 6 s + 1 % + 1 s, and not before.
const FAST_OUT: u64 = 7_061;
const PATIENT_OUT: u64 = 61_601;

const fn host(n: u128) -> HostId {
    HostId::from_uuid(Uuid::from_u128(n))
}

const A: HostId = host(1);
const B: HostId = host(2);
const C: HostId = host(3);

fn at(ms: u64) -> Tick {
    Tick::ZERO.after(Duration::from_millis(ms))
}

fn table(hosts: &[(HostId, Liveness)]) -> HealthTable {
    HealthTable::new(TIMINGS, TIMINGS, hosts.iter().copied(), at(0))
}

fn granted(grant: Grant) -> bool {
    match grant {
        Grant::Renew { .. } => true,
        Grant::Refused(_) => false,
    }
}

fn fast(host: HostId) -> Verdict {
    Verdict { host, lapsed: Lapsed::Fast }
}

fn both(host: HostId) -> Verdict {
    Verdict { host, lapsed: Lapsed::Both }
}

#[test]
fn the_wait_is_the_lease_one_percent_and_the_kill_allowance() {
    let wait = TIMINGS.wait(TIMINGS.fast);
    assert!(wait >= Duration::from_millis(7_060) && wait < Duration::from_millis(7_061), "{wait:?}");
    let wait = TIMINGS.wait(TIMINGS.patient);
    assert!(wait >= Duration::from_millis(61_600) && wait < Duration::from_millis(61_601), "{wait:?}");
}

#[test]
fn l1_silence_ages_a_host_from_up_over_silent_to_lapsed_and_dead() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    for ms in (1..=70_000).step_by(500) {
        assert!(granted(t.heartbeat(B, at(ms))), "B is heard all the time, so the brake stays off");
        let verdicts = t.tick(at(ms));
        let expected = if ms < FAST_OUT {
            vec![]
        } else if ms < PATIENT_OUT {
            vec![fast(A)]
        } else {
            vec![both(A)]
        };
        assert_eq!(verdicts, expected, "at {ms} ms");
        let hearing = t.state(A, at(ms));
        match ms {
            0..=3_000 => assert_eq!(hearing, Hearing::Up),
            3_001..FAST_OUT => assert_eq!(hearing, Hearing::Silent { for_: Duration::from_millis(ms) }),
            FAST_OUT..PATIENT_OUT => assert_eq!(hearing, Hearing::FastLapsed),
            _ => assert_eq!(hearing, Hearing::Dead),
        }
        assert_eq!(*t.silent(at(ms)), BTreeSet::from_iter((3_001..FAST_OUT).contains(&ms).then_some(A)));
    }
}

#[test]
fn l1_not_a_moment_before_the_wait_is_over() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(A, at(1_000))));
    assert!(granted(t.heartbeat(B, at(8_000))));
    assert_eq!(t.tick(at(1_000 + FAST_OUT - 1)), []);
    assert_eq!(t.tick(at(1_000 + FAST_OUT)), [fast(A)]);
}

#[test]
fn l3_a_host_that_never_says_anything_counts_as_renewed_at_the_takeover() {
    let took_over = at(100_000);
    let longest = Timings { fast: Duration::from_secs(20), ..TIMINGS };
    let hosts = [(A, Liveness::Up), (B, Liveness::Up)];
    let mut t = HealthTable::new(TIMINGS, longest, hosts, took_over);
    // The predecessor granted 20 s; this leader's own lease of 6 s does not shorten that, even once it has granted it (L6).
    assert!(granted(t.heartbeat(A, at(101_000))));
    for ms in (101_000..100_000 + 21_200).step_by(100) {
        assert!(granted(t.heartbeat(B, at(ms))));
        assert_eq!(t.tick(at(ms)), [], "at {ms} ms");
    }
    assert_eq!(t.tick(at(100_000 + 21_201)), [fast(A)]);
}

#[test]
fn l3_takes_over_what_was_recorded_and_waits_for_the_rest() {
    let mut t = table(&[(A, Liveness::FastLapsed), (B, Liveness::Up), (C, Liveness::Dead)]);
    assert_eq!(t.state(A, at(0)), Hearing::FastLapsed);
    assert_eq!(t.state(C, at(0)), Hearing::Dead);
    for ms in (0..PATIENT_OUT).step_by(1_000) {
        assert!(granted(t.heartbeat(B, at(ms))));
        assert_eq!(
            t.tick(at(ms)),
            [],
            "neither is declared again; the long lease of A is waited out from the takeover"
        );
        assert!(!granted(t.heartbeat(A, at(ms))) && !granted(t.heartbeat(C, at(ms))), "not before they register");
    }
    assert_eq!(t.tick(at(PATIENT_OUT)), [both(A)]);
}

#[test]
fn l4_a_verdict_stands_until_the_host_registers_again() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(B, at(7_000))));
    assert_eq!(t.tick(at(FAST_OUT)), [fast(A)]);
    assert_eq!(t.heartbeat(A, at(FAST_OUT)), Grant::Refused(Refused::Lapsed));
    assert_eq!(t.tick(at(FAST_OUT + 1)), [fast(A)], "given again until it is stored");

    // Not stored yet: a registration could overtake it in the writer's queue.
    assert_eq!(t.enter(A).unwrap_err(), VerdictPending);
    t.declared(fast(A));
    assert_eq!(t.tick(at(FAST_OUT + 2)), []);
    assert_eq!(t.heartbeat(A, at(FAST_OUT + 2)), Grant::Refused(Refused::Lapsed));

    let entry = t.enter(A).unwrap();
    t.register(entry, at(FAST_OUT + 3)).unwrap();
    assert!(granted(t.heartbeat(A, at(FAST_OUT + 4))));
    assert_eq!(t.state(A, at(FAST_OUT + 4)), Hearing::Up);
}

#[test]
fn l4_a_registration_that_a_verdict_overtook_does_not_count() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(B, at(7_000))));
    let entry = t.enter(A).unwrap();
    assert_eq!(t.tick(at(FAST_OUT)), [fast(A)]);
    t.declared(fast(A));
    // RegisterHost and DeclareLapsed are both stored, in an order that nobody here knows.
    assert_eq!(t.register(entry, at(FAST_OUT + 1)), Err(VerdictPending));
    assert_eq!(t.heartbeat(A, at(FAST_OUT + 1)), Grant::Refused(Refused::Lapsed));
}

#[test]
fn l5_the_short_lease_says_nothing_about_the_long_one() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(A, at(10_000))));
    for ms in (10_000..10_000 + PATIENT_OUT).step_by(100) {
        assert!(granted(t.heartbeat(B, at(ms))));
        let expected = if ms < 10_000 + FAST_OUT { vec![] } else { vec![fast(A)] };
        assert_eq!(t.tick(at(ms)), expected, "at {ms} ms");
    }
    assert_eq!(t.tick(at(10_000 + PATIENT_OUT)), [both(A)]);
}

#[test]
fn l6_a_heartbeat_that_is_counted_late_does_not_shorten_the_wait() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(A, at(5_000))));
    assert!(granted(t.heartbeat(A, at(1_000))));
    assert!(granted(t.heartbeat(B, at(5_000 + FAST_OUT - 1))));
    assert_eq!(t.tick(at(5_000 + FAST_OUT - 1)), []);
    assert_eq!(t.last_heartbeat(A), Some(at(5_000)));
}

#[test]
fn l7_the_brake_holds_when_fewer_than_half_are_heard_and_of_two_one_is_enough() {
    let three = [(A, Liveness::Up), (B, Liveness::Up), (C, Liveness::Up)];
    let mut t = table(&three);
    assert!(granted(t.heartbeat(C, at(FAST_OUT))));
    assert_eq!(t.tick(at(FAST_OUT)), [], "one of three is heard");
    assert_eq!(t.brake(), BrakeState { engaged: true, heard: 1, total: 3, since: Some(at(FAST_OUT)) });
    // The host's lease has lapsed, and its heartbeat is answered: nothing was given away.
    assert!(granted(t.heartbeat(A, at(8_000))));
    assert_eq!(t.tick(at(8_000)), [], "two of three, but only just");
    for ms in (8_000..11_000).step_by(500) {
        assert!(granted(t.heartbeat(A, at(ms))) && granted(t.heartbeat(C, at(ms))));
        assert_eq!(t.tick(at(ms)), []);
    }
    assert_eq!(t.tick(at(11_000)), [fast(B)], "enough have been heard for three seconds");
    assert!(!t.brake().engaged);

    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    assert!(granted(t.heartbeat(A, at(FAST_OUT))));
    assert_eq!(t.tick(at(FAST_OUT)), [fast(B)]);
}

#[test]
fn l7_hosts_that_were_declared_lapsed_no_longer_count() {
    let mut t = table(&[(A, Liveness::Dead), (B, Liveness::Dead), (C, Liveness::Up), (host(4), Liveness::Up)]);
    assert!(granted(t.heartbeat(C, at(FAST_OUT))));
    assert_eq!(t.tick(at(FAST_OUT)), [fast(host(4))]);
    assert_eq!(t.brake().total, 2, "counted before the verdict");
}

#[test]
fn l7_releasing_the_brake_gives_no_verdict_before_its_time_and_none_on_a_host_that_is_heard_again() {
    let hosts = [(A, Liveness::Up), (B, Liveness::Up), (C, Liveness::Up), (host(4), Liveness::Up)];
    let mut t = table(&hosts);
    assert!(granted(t.heartbeat(C, at(4_000))));
    assert_eq!(t.tick(at(4_000)), []);
    assert!(t.brake().engaged);
    assert_eq!(t.release_brake(at(4_000)), 3);
    assert_eq!(t.release_brake(at(4_000)), 0, "they are released already");
    assert!(granted(t.heartbeat(B, at(4_500))));
    assert_eq!(t.tick(at(FAST_OUT - 1)), [], "the leases are waited out all the same");
    assert_eq!(t.tick(at(FAST_OUT)), [fast(A), fast(host(4))]);
    assert_eq!(t.tick(at(4_500 + FAST_OUT)).len(), 2, "B was heard after the person spoke");
}

#[test]
fn a_host_that_is_not_known_must_register_and_one_that_was_removed_again() {
    let mut t = table(&[]);
    assert_eq!(t.heartbeat(A, at(1)), Grant::Refused(Refused::Unregistered));
    assert_eq!(t.state(A, at(1)), Hearing::Silent { for_: Duration::ZERO });
    let entry = t.enter(A).unwrap();
    t.register(entry, at(2)).unwrap();
    assert!(granted(t.heartbeat(A, at(3))));
    t.remove(A);
    assert_eq!(t.heartbeat(A, at(4)), Grant::Refused(Refused::Unregistered));
    assert_eq!(t.tick(at(100_000)), []);
}

#[test]
fn nothing_to_do_stays_nothing_to_do() {
    let mut t = table(&[]);
    assert_eq!(t.tick(at(1_000_000)), []);
    assert!(!t.brake().engaged);
}

#[test]
fn l8_while_failover_is_off_leases_last_until_its_end_and_no_verdict_is_given() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up), (C, Liveness::Up), (host(4), Liveness::Up)]);
    // Half of the hosts are heard all the time: no brake.
    let heard = |t: &mut HealthTable, ms| [C, host(4)].map(|h| granted(t.heartbeat(h, at(ms))));
    t.switch_off(Some(at(100_000)));
    let Grant::Renew { fast, patient } = t.heartbeat(A, at(1_000)) else { panic!() };
    assert_eq!((fast, patient), (Duration::from_secs(99), Duration::from_secs(99)));
    // Both are silent; of B it was so before anything was granted.
    heard(&mut t, 90_000);
    assert!(t.tick(at(90_000)).is_empty());
    heard(&mut t, 100_000);
    // Over: B's lease has run out long ago, A's has not, for clocks may differ.
    assert_eq!(t.tick(at(100_000)), [both(B)]);
    t.declared(both(B));
    heard(&mut t, 101_900);
    let out = 1_000 + 99_000 + 990 + 1_000;
    assert!(t.tick(at(out)).is_empty());
    assert_eq!(t.tick(at(out + 1)), [both(A)]);
}

#[test]
fn l8_switched_on_again_every_lease_that_was_granted_is_waited_out() {
    let mut t = table(&[(A, Liveness::Up), (B, Liveness::Up)]);
    t.switch_off(Some(at(100_000)));
    t.heartbeat(A, at(1_000));
    t.switch_off(None);
    let Grant::Renew { fast, .. } = t.heartbeat(A, at(2_000)) else { panic!() };
    assert_eq!(fast, TIMINGS.fast, "as usual");
    let (running, _) = t.running(at(95_000));
    assert_eq!(running, Duration::from_millis(6_990) + Duration::from_nanos(1), "a successor must wait for that");
    t.heartbeat(B, at(95_000));
    assert!(t.tick(at(95_000)).is_empty(), "A may run until 100 s and more");
    t.heartbeat(B, at(101_900));
    assert_eq!(t.tick(at(101_991)), [both(A)]);
}
