//! Messages as JSON, in protobuf's canonical mapping with the field names of the .proto files.

use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;
use uncloud_proto::{FILE_DESCRIPTOR_SET, v1};

/// A message that knows its name in the .proto files.
pub trait Named: prost::Message {
    /// Its full name.
    const NAME: &'static str;
}

macro_rules! named {
    ($($message:ident),* $(,)?) => {
        $(impl Named for v1::$message { const NAME: &'static str = concat!("uncloud.v1.", stringify!($message)); })*

        #[cfg(test)]
        const NAMES: &[&str] = &[$(v1::$message::NAME),*];
    };
}

named!(
    CancelMigrationResponse,
    CordonHostResponse,
    CreateImageResponse,
    CreateVmResponse,
    DeleteImageResponse,
    DeleteVmResponse,
    DrainHostResponse,
    ExplainVmResponse,
    GetHostResponse,
    GetImageResponse,
    GetStatusResponse,
    GetVmResponse,
    ListEventsResponse,
    ListHostsResponse,
    ListImagesResponse,
    ListVmsResponse,
    ReleaseBrakeResponse,
    SetFailoverResponse,
    MigrateVmResponse,
    PauseVmResponse,
    ResizeDiskResponse,
    AttachDiskResponse,
    DetachDiskResponse,
    CreateSnapshotResponse,
    DeleteSnapshotResponse,
    RevertToSnapshotResponse,
    CloneVmResponse,
    RemoveHostResponse,
    RestartVmResponse,
    ResumeVmResponse,
    SimulateHostFailureResponse,
    StartVmResponse,
    StopVmResponse,
    UncordonHostResponse,
    UpdateVmResponse,
    WatchEventsResponse,
    WatchHostsResponse,
    WatchVmsResponse,
);

/// Several lines, for one answer.
#[must_use]
pub fn pretty<M: Named>(message: &M) -> String {
    format!("{:#}", value(message))
}

/// One line, for a step of a watch.
#[must_use]
pub fn line<M: Named>(message: &M) -> String {
    value(message).to_string()
}

/// Fields without presence are written even when they have their default, so that a program finds `"vms": []` and
/// not nothing. 64-bit numbers are strings, as the canonical mapping has it. Keys are sorted: a map would come out in
/// another order each time.
fn value<M: Named>(message: &M) -> Value {
    let descriptor = pool().get_message_by_name(M::NAME).expect("every message that is listed above is in the files");
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .expect("what prost wrote, prost reads by the same description");
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    dynamic.serialize_with_options(serde_json::value::Serializer, &options).expect("no message holds an `Any`")
}

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the descriptors were made at build time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_in_the_proto_files() {
        for name in NAMES {
            assert!(pool().get_message_by_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn enums_go_by_name_and_fields_as_in_the_files() {
        let vm = v1::Vm {
            spec: Some(v1::VmSpec { memory_mib: 512, ..Default::default() }),
            status: Some(v1::VmStatus { phase: v1::VmPhase::Running.into(), ..Default::default() }),
            ..Default::default()
        };
        let text = line(&v1::GetVmResponse { vm: Some(vm) });
        assert!(!text.contains('\n'));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["vm"]["status"]["phase"], "VM_PHASE_RUNNING");
        assert_eq!(json["vm"]["spec"]["memory_mib"], "512");
        assert_eq!(json["vm"]["spec"]["disks"], serde_json::json!([]));
        assert!(json["vm"].get("placement").is_none());
    }
}
