//! Tests of what the leader says, checked.

use uncloud_proto::{ids::VmId, v1};

use super::*;
use crate::vm::disks::Revert;

fn good() -> v1::DesiredVm {
    v1::DesiredVm {
        vm_id: "00000000-0000-4000-8000-000000000001".into(),
        incarnation: 1,
        disposition: v1::Disposition::Run.into(),
        name: "web".into(),
        owner: "default".into(),
        spec: Some(v1::VmSpec {
            vcpus: 1,
            memory_mib: 64,
            machine: "q35".into(),
            disks: vec![v1::Disk { name: "disk0".into(), pool: "p".into(), size_bytes: 512, ..Default::default() }],
            nics: vec![v1::Nic {
                r#type: v1::NicType::User.into(),
                mac: "42:00:00:00:00:0a".into(),
                bridge: String::new(),
            }],
            restart: v1::RestartPolicy::OnFailure.into(),
            failover: v1::FailoverPolicy::Fast.into(),
            stop_grace_seconds: 60,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn field_of(m: &v1::DesiredVm) -> String {
    Desired::from_proto(Incarnation(1), m).unwrap_err().field
}

#[test]
fn a_good_message_round_trips_through_json() {
    let desired = Desired::from_proto(Incarnation(1), &good()).unwrap();
    let json = serde_json::to_string(&desired).unwrap();
    assert_eq!(serde_json::from_str::<Desired>(&json).unwrap(), desired);
}

#[test]
fn what_could_climb_or_inject_is_refused_and_the_field_is_named() {
    let change = |f: &dyn Fn(&mut v1::VmSpec)| {
        let mut m = good();
        f(m.spec.as_mut().unwrap());
        field_of(&m)
    };
    assert_eq!(change(&|s| s.disks[0].name = "../../etc/passwd".into()), "spec.disks[0].name");
    assert_eq!(change(&|s| s.disks[0].pool = "a/b".into()), "spec.disks[0].pool");
    assert_eq!(change(&|s| s.disks[0].image = "x".into()), "spec.disks[0].image");
    assert_eq!(change(&|s| s.disks[0].size_bytes = 513), "spec.disks[0].size_bytes");
    assert_eq!(change(&|s| s.disks.push(s.disks[0].clone())), "spec.disks[1].name");
    assert_eq!(change(&|s| s.nics[0].mac = "42:00:00:00:00:0a,netdev=x".into()), "spec.nics[0].mac");
    assert_eq!(change(&|s| s.machine = "q35,accel=kvm".into()), "spec.machine");
    assert_eq!(change(&|s| s.vcpus = 0), "spec.vcpus");
    assert_eq!(change(&|s| s.memory_mib = u64::MAX), "spec.memory_mib");
    assert_eq!(change(&|s| s.restart = 99), "spec.restart");
    assert_eq!(change(&|s| s.firmware = 99), "spec.firmware");
    assert_eq!(change(&|s| s.cpu = 99), "spec.cpu");
    let large = v1::CloudInit { user_data: "x".repeat(600_000), ..Default::default() };
    assert_eq!(change(&|s| s.cloud_init = Some(large.clone())), "spec.cloud_init");
    let kernel = v1::KernelBoot { image: "00000000-0000-4000-8000-000000000001".into(), command_line: "a\nb".into() };
    assert_eq!(change(&|s| s.kernel = Some(kernel.clone())), "spec.kernel.command_line");
    assert_eq!(field_of(&v1::DesiredVm { disposition: 77, ..good() }), "disposition");
    assert_eq!(field_of(&v1::DesiredVm { name: "a\u{7}".into(), ..good() }), "name");
    assert_eq!(field_of(&v1::DesiredVm { spec: None, ..good() }), "spec");
    let next = |next_incarnation| v1::DesiredVm { next_incarnation, ..good() };
    let read = |m: &v1::DesiredVm| Desired::from_proto(Incarnation(m.incarnation), m).unwrap().next;
    assert_eq!((read(&next(0)), read(&next(9))), (None, Some(Incarnation(9))));
    assert_eq!(field_of(&next(good().incarnation)), "next_incarnation");
}

#[test]
fn only_disks_that_are_not_made_are_copied() {
    let id = "00000000-0000-4000-8000-000000000005";
    let from = v1::CloneFrom {
        vm_id: id.into(),
        disk_generation: 2,
        kept_generations: [("data".to_owned(), 1)].into(),
        snapshot_id: id.into(),
    };
    let with = |clone_from: &v1::CloneFrom| v1::DesiredVm { clone_from: Some(clone_from.clone()), ..good() };
    let read = |m: &v1::DesiredVm| Desired::from_proto(Incarnation(1), m).unwrap().clone_from;
    let uuid = Uuid::try_parse(id).unwrap();
    let expected = CloneFrom {
        vm: VmId::from_uuid(uuid),
        disk_generation: 2,
        kept_generations: [("data".to_owned(), 1)].into(),
        snapshot: Some(uuid),
    };
    assert_eq!(read(&with(&from)), Some(expected.clone()));
    let as_it_is = v1::CloneFrom { snapshot_id: String::new(), ..from.clone() };
    assert_eq!(read(&with(&as_it_is)), Some(CloneFrom { snapshot: None, ..expected }));
    assert_eq!(read(&v1::DesiredVm { disks_exist: true, ..with(&from) }), None);
    assert_eq!(read(&v1::DesiredVm { disposition: v1::Disposition::Stop.into(), ..with(&from) }), None);
    assert_eq!(field_of(&with(&v1::CloneFrom { vm_id: "../x".into(), ..from.clone() })), "clone_from.vm_id");
    let bad = v1::CloneFrom { snapshot_id: "s,snapshot.id=1".into(), ..from };
    assert_eq!(field_of(&with(&bad)), "clone_from.snapshot_id");
}

/// P5: what runs is never put back.
#[test]
fn disks_are_put_back_only_of_what_is_to_be_stopped() {
    let id = "00000000-0000-4000-8000-000000000005";
    let with = |disposition: v1::Disposition| v1::DesiredVm {
        disposition: disposition.into(),
        revert: Some(v1::RevertOrder { snapshot_id: id.into(), number: 3 }),
        ..good()
    };
    assert_eq!(field_of(&with(v1::Disposition::Run)), "revert");
    let stop = Desired::from_proto(Incarnation(1), &with(v1::Disposition::Stop)).unwrap();
    assert_eq!(stop.orders.revert, Some(Revert { snapshot: id.parse().unwrap(), number: 3 }));
    let order = |id: &str| v1::SnapshotOrder { id: id.into(), remove: false };
    assert_eq!(field_of(&v1::DesiredVm { snapshots: vec![order("../x")], ..good() }), "snapshots[0].id");
    assert_eq!(field_of(&v1::DesiredVm { snapshots: vec![order(id); 33], ..good() }), "snapshots");
}

#[test]
fn a_message_that_names_no_vm_is_refused() {
    assert!(identify(&v1::DesiredVm { vm_id: "../x".into(), ..good() }).is_err());
    assert!(identify(&v1::DesiredVm { incarnation: 0, ..good() }).is_err());
    assert!(identify(&good()).is_ok());
}
