//! `uncloud-keeper`: the parent of one VM's QEMU. All of it is in `uncloud_agent::keeper`.

use std::process::ExitCode;

fn main() -> ExitCode {
    uncloud_agent::keeper::main()
}
