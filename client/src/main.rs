//! The `uncloud` command. Everything is in the library, where tests reach it.

fn main() -> std::process::ExitCode {
    uncloud_client::cli::main()
}
