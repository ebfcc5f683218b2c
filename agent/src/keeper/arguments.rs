//! The keeper's command line (pure).

use std::{
    ffi::{CString, OsString},
    os::unix::ffi::OsStringExt,
    path::PathBuf,
    str::FromStr,
};

use uncloud_proto::ids::{Incarnation, VmId};

use crate::lease::LeaseClass;

/// Who QEMU runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Its user id.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
}

/// What a keeper is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// Which VM this is.
    pub vm: VmId,
    /// Which incarnation of it.
    pub incarnation: Incarnation,
    /// The VM's directory.
    pub vm_dir: PathBuf,
    /// Which of the host's leases it lives under.
    pub class: LeaseClass,
    /// Where the leases are.
    pub lease_file: PathBuf,
    /// Under which lease the start was decided.
    pub lease_generation: u16,
    /// Who to become; the caller itself when there is none.
    pub user: Option<User>,
    /// A descriptor of the VM's lock file that the parent has locked already, so that the VM is never without a lock
    /// between the parent's decision and the keeper's first step.
    pub lock_fd: Option<i32>,
    /// Further descriptors that the parent has opened for QEMU, under the numbers that QEMU's arguments name.
    pub pass_fds: Vec<i32>,
    /// QEMU and its arguments.
    pub command: Vec<CString>,
}

/// How many descriptors may be passed on: one for each network interface.
const MAX_PASSED: usize = 8;

/// Why a command line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadArguments {
    /// A flag that does not exist, or that was given twice.
    #[error("unexpected argument `{0}`")]
    Unexpected(String),
    /// A flag without its value, or a value that does not parse.
    #[error("{0} needs a valid value")]
    Value(&'static str),
    /// A flag that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
}

impl Arguments {
    /// Reads a command line, without the program's own name.
    ///
    /// # Errors
    ///
    /// Says which argument is wrong.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, BadArguments> {
        const VM: &str = "--vm";
        const INCARNATION: &str = "--incarnation";
        const VM_DIR: &str = "--vm-dir";
        const CLASS: &str = "--class";
        const LEASE_FILE: &str = "--lease-file";
        const LEASE_GENERATION: &str = "--lease-generation";
        const UID: &str = "--uid";
        const GID: &str = "--gid";
        const LOCK_FD: &str = "--lock-fd";
        const PASS_FDS: &str = "--pass-fds";
        const FLAGS: [&str; 10] =
            [VM, INCARNATION, VM_DIR, CLASS, LEASE_FILE, LEASE_GENERATION, UID, GID, LOCK_FD, PASS_FDS];

        let mut rest = arguments.into_iter();
        let mut given: Vec<(&'static str, OsString)> = Vec::with_capacity(FLAGS.len());
        while let Some(argument) = rest.next() {
            if argument == "--" {
                break;
            }
            let Some(flag) = FLAGS.into_iter().find(|f| argument == *f && given.iter().all(|(g, _)| g != f)) else {
                return Err(BadArguments::Unexpected(argument.to_string_lossy().into_owned()));
            };
            given.push((flag, rest.next().ok_or(BadArguments::Value(flag))?));
        }
        let command = rest
            .map(|a| CString::new(a.into_vec()).map_err(|_| BadArguments::Value("the command")))
            .collect::<Result<Vec<_>, _>>()?;
        if command.is_empty() {
            return Err(BadArguments::Missing("the command after `--`"));
        }

        let mut take = |flag: &'static str| given.iter().position(|(g, _)| *g == flag).map(|i| given.swap_remove(i).1);
        let user = match (optional(UID, take(UID))?, optional(GID, take(GID))?) {
            (Some(uid), Some(gid)) => Some(User { uid, gid }),
            (None, None) => None,
            (Some(_), None) => return Err(BadArguments::Missing(GID)),
            (None, Some(_)) => return Err(BadArguments::Missing(UID)),
        };
        let lock_fd = optional(LOCK_FD, take(LOCK_FD))?;
        if lock_fd.is_some_and(|fd| fd < 3) {
            return Err(BadArguments::Value(LOCK_FD));
        }
        let pass_fds: Vec<i32> = take(PASS_FDS)
            .map(|list| list.to_str()?.split(',').map(|fd| fd.parse().ok()).collect::<Option<_>>())
            .map_or(Some(Vec::new()), |list| list)
            .ok_or(BadArguments::Value(PASS_FDS))?;
        if pass_fds.len() > MAX_PASSED || pass_fds.iter().any(|&fd| fd < 3 || Some(fd) == lock_fd) {
            return Err(BadArguments::Value(PASS_FDS));
        }
        Ok(Self {
            vm: required(VM, take(VM))?,
            incarnation: Incarnation(required(INCARNATION, take(INCARNATION))?),
            vm_dir: take(VM_DIR).ok_or(BadArguments::Missing(VM_DIR))?.into(),
            class: required(CLASS, take(CLASS))?,
            lease_file: take(LEASE_FILE).ok_or(BadArguments::Missing(LEASE_FILE))?.into(),
            lease_generation: required(LEASE_GENERATION, take(LEASE_GENERATION))?,
            user,
            lock_fd,
            pass_fds,
            command,
        })
    }
}

fn optional<T: FromStr>(flag: &'static str, value: Option<OsString>) -> Result<Option<T>, BadArguments> {
    value.map(|v| v.to_str().and_then(|v| v.parse().ok()).ok_or(BadArguments::Value(flag))).transpose()
}

fn required<T: FromStr>(flag: &'static str, value: Option<OsString>) -> Result<T, BadArguments> {
    optional(flag, value)?.ok_or(BadArguments::Missing(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: &str = "00000000-0000-4000-8000-000000000abc";
    const GOOD: &str = "--vm VM --incarnation 3 --vm-dir /d --class fast --lease-file /l --lease-generation 65535";

    fn parse(line: &str) -> Result<Arguments, BadArguments> {
        Arguments::parse(line.replace("VM", VM).split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_whole_command_line_is_understood() {
        let a = parse(&format!("{GOOD} --uid 65534 --gid 100 --lock-fd 7 --pass-fds 12,5 -- /bin/qemu --vm x -- y"))
            .unwrap();
        assert_eq!(a.vm.to_string(), VM);
        assert_eq!(a.incarnation, Incarnation(3));
        assert_eq!(a.vm_dir, PathBuf::from("/d"));
        assert_eq!(a.class, LeaseClass::Fast);
        assert_eq!(a.lease_file, PathBuf::from("/l"));
        assert_eq!(a.lease_generation, u16::MAX);
        assert_eq!(a.user, Some(User { uid: 65534, gid: 100 }));
        assert_eq!((a.lock_fd, a.pass_fds), (Some(7), vec![12, 5]));
        let command: Vec<_> = a.command.iter().map(|c| c.to_str().unwrap()).collect();
        assert_eq!(command, ["/bin/qemu", "--vm", "x", "--", "y"]);
        assert_eq!(parse(&format!("{GOOD} -- q")).unwrap().user, None);
    }

    #[test]
    fn every_mistake_is_named() {
        use BadArguments::{Missing, Unexpected, Value};
        assert_eq!(parse(GOOD), Err(Missing("the command after `--`")));
        assert_eq!(parse(&format!("{GOOD} --")), Err(Missing("the command after `--`")));
        assert_eq!(parse("-- q"), Err(Missing("--vm")));
        assert_eq!(parse(&format!("{GOOD} --uid 1 -- q")), Err(Missing("--gid")));
        assert_eq!(parse(&format!("{GOOD} --gid 1 -- q")), Err(Missing("--uid")));
        assert_eq!(parse(&format!("{GOOD} --class slow -- q")), Err(Unexpected("--class".into())), "given twice");
        assert_eq!(parse(&format!("{GOOD} --lock-fd 2 -- q")), Err(Value("--lock-fd")));
        assert_eq!(parse(&format!("{GOOD} --lock-fd")), Err(Value("--lock-fd")));
        for wrong in [",", "1", "5,", "5,x", "5,6,7,8,9,10,11,12,13", "4,7"] {
            let line = format!("{GOOD} --lock-fd 7 --pass-fds {wrong} -- q");
            assert_eq!(parse(&line), Err(Value("--pass-fds")), "{wrong}");
        }
        assert_eq!(parse("--what -- q"), Err(Unexpected("--what".into())));
        assert_eq!(parse(&GOOD.replace("65535", "65536")), Err(Missing("the command after `--`")));
        assert_eq!(parse(&format!("{} -- q", GOOD.replace("65535", "65536"))), Err(Value("--lease-generation")));
        assert_eq!(parse(&format!("{} -- q", GOOD.replace("fast", "slow"))), Err(Value("--class")));
    }
}
