//! The `uncloud.v1` API: generated messages, clients and servers, and the ids, names and units that
//! controller, agent and client share.
//!
//! Nothing in here does I/O, except that [`clock`] reads the clock.

pub mod clock;
pub mod cpu;
pub mod dial;
pub mod ids;
pub mod names;

/// Messages, clients and servers of the package `uncloud.v1`, generated from `proto/uncloud/v1/*.proto`.
#[allow(clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("uncloud.v1");
}

/// The descriptors of the package, for server reflection and for JSON output.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/uncloud.v1.binpb"));

/// The port on which a controller serves when it is told nothing else.
pub const DEFAULT_PORT: u16 = 7400;

/// Version of the protocol between agent and leader.
pub const AGENT_PROTOCOL: u32 = 1;

/// The largest gRPC message that anybody takes, in bytes. A Welcome to a host with 1,000 VMs is about 2 MiB.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Metadata key in which a controller that does not lead names the address of the one that does.
pub const LEADER_METADATA_KEY: &str = "uncloud-leader";

/// Metadata key in which an agent that opens a session names the controllers, with commas, that it has lost or not reached since it was
/// last welcomed. One that knows of no other leader than these lets it wait for a moment, instead of sending it there again.
pub const UNREACHED_METADATA_KEY: &str = "uncloud-unreached";

/// Metadata key by which a read says how new its answer must be: `linearizable` (the default: it shows everything that was
/// acknowledged before it was asked for, on whichever controller) or `stale` (whatever this controller has at hand).
pub const READ_METADATA_KEY: &str = "uncloud-read";

/// Metadata key of a call that one controller passes on to another. It is passed on once.
pub const FORWARDED_METADATA_KEY: &str = "uncloud-forwarded";

/// Wall-clock time on the wire.
#[must_use]
pub fn timestamp_from_millis(ms: u64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0),
    }
}

/// Milliseconds since 1970 of a time on the wire; 0 for anything earlier.
#[must_use]
pub fn millis_from_timestamp(t: &prost_types::Timestamp) -> u64 {
    let seconds = u64::try_from(t.seconds).unwrap_or(0);
    let millis = u64::try_from(t.nanos / 1_000_000).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(millis)
}
