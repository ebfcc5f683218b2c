//! Compiles the protocol files, without needing `protoc`.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 5] = [
    "uncloud/v1/vm.proto",
    "uncloud/v1/host.proto",
    "uncloud/v1/image.proto",
    "uncloud/v1/cluster.proto",
    "uncloud/v1/agent.proto",
];

fn main() {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."]).expect("the protocol files compile");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("uncloud.v1.binpb"), descriptors.encode_to_vec()).expect("the descriptor set can be written");
    tonic_prost_build::configure().compile_fds(descriptors).expect("Rust code can be generated");
}
