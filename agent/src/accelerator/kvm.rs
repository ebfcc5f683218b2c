//! A guest of a few bytes under KVM, by the kernel's own interface. All `unsafe` of the probe is here.
//!
//! The guest runs in 64-bit mode with paging, as every guest does today, because emulators of KVM are fast in real
//! mode and slow there: it counts down from a million, writes a byte to a port, and halts.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::process::parent_id,
    },
    ptr::{self, NonNull},
};

/// How often the guest goes round. Hardware needs a millisecond for it, an emulator a second and more.
pub(super) const LOOPS: u32 = 1_000_000;

/// What the guest writes, and where.
const PORT: u16 = 0xe9;
const ANSWER: u8 = 42;

// linux/kvm.h, which libc does not have. All are plain numbers there, too.
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;
const KVM_CREATE_VM: libc::Ioctl = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::Ioctl = 0xae04;
const KVM_CREATE_VCPU: libc::Ioctl = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
const KVM_RUN: libc::Ioctl = 0xae80;
const KVM_SET_REGS: libc::Ioctl = 0x4090_ae82;
const KVM_GET_SREGS: libc::Ioctl = 0x8138_ae83;
const KVM_SET_SREGS: libc::Ioctl = 0x4138_ae84;
const API_VERSION: i32 = 12;
const EXIT_IO: u32 = 2;
const EXIT_HLT: u32 = 5;
/// Offsets in `struct kvm_run`.
const RUN_EXIT_REASON: usize = 8;
const RUN_IO: usize = 32;

const GUEST_MEMORY: usize = 0x10000;
// Where things are in it.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

/// `struct kvm_regs`: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags.
#[repr(C)]
#[derive(Default)]
struct Registers {
    general: [u64; 16],
    rip: u64,
    rflags: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

/// `struct kvm_sregs`.
#[repr(C)]
struct SpecialRegisters {
    cs: Segment,
    ds: Segment,
    es: Segment,
    fs: Segment,
    gs: Segment,
    ss: Segment,
    tr: Segment,
    ldt: Segment,
    gdt: [u64; 2],
    idt: [u64; 2],
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
    apic_base: u64,
    interrupt_bitmap: [u64; 4],
}

const _: () = assert!(size_of::<Registers>() == 0x90 && size_of::<SpecialRegisters>() == 0x138);

/// `mov ecx, LOOPS; again: dec ecx; jnz again; mov al, 42; out 0xe9, al; hlt`
fn code() -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend_from_slice(&LOOPS.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xb0, ANSWER, 0xe6, PORT as u8, 0xf4]);
    code
}

/// Lets this process end when its parent does, or after five seconds: nothing that hangs in the kernel's KVM is left behind.
pub(super) fn bind_to_parent() -> io::Result<()> {
    let parent = parent_id();
    // SAFETY: plain calls without memory. The alarm's default action ends the process.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong))?;
        libc::alarm(5);
    }
    if parent_id() == parent { Ok(()) } else { Err(io::Error::other("the parent is gone")) }
}

/// A guest that is ready to run.
pub(super) struct Guest {
    vcpu: OwnedFd,
    run: Mapping,
    _memory: Mapping,
    _vm: OwnedFd,
}

impl Guest {
    /// Makes it. The error says which step failed.
    pub(super) fn new() -> Result<Self, String> {
        let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let kvm: File =
            OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(failed("/dev/kvm cannot be opened"))?;
        let kvm = kvm.as_raw_fd();
        let version = ioctl(kvm, KVM_GET_API_VERSION, 0).map_err(failed("/dev/kvm is not KVM"))?;
        if version != API_VERSION {
            return Err(format!("/dev/kvm has version {version} instead of {API_VERSION}"));
        }
        let vm = owned(ioctl(kvm, KVM_CREATE_VM, 0).map_err(failed("no VM can be made"))?);

        let memory = Mapping::anonymous(GUEST_MEMORY).map_err(failed("no memory"))?;
        memory.write(PML4, &(PDPT | 3).to_le_bytes());
        memory.write(PDPT, &(PAGE_DIRECTORY | 3).to_le_bytes());
        // One page of 2 MiB: present, writable, large.
        memory.write(PAGE_DIRECTORY, &0x83u64.to_le_bytes());
        memory.write(CODE, &code());
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: GUEST_MEMORY as u64,
            userspace_addr: memory.base.as_ptr() as u64,
        };
        ioctl_with(&vm, KVM_SET_USER_MEMORY_REGION, &mut { region }).map_err(failed("the VM takes no memory"))?;

        let vcpu = owned(ioctl(vm.as_raw_fd(), KVM_CREATE_VCPU, 0).map_err(failed("no CPU can be made"))?);
        let size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0).map_err(failed("the CPU has no size"))?;
        let size = usize::try_from(size).ok().filter(|s| *s > RUN_IO + 16).ok_or("the CPU has a wrong size")?;
        let run = Mapping::of(&vcpu, size).map_err(failed("the CPU cannot be mapped"))?;
        long_mode(&vcpu).map_err(failed("the CPU does not take 64-bit mode"))?;
        Ok(Self { vcpu, run, _memory: memory, _vm: vm })
    }

    /// Runs it to its end. Can hang for ever.
    pub(super) fn run(&self) -> Result<(), String> {
        let mut answer = None;
        loop {
            ioctl(self.vcpu.as_raw_fd(), KVM_RUN, 0).map_err(|e| format!("the guest does not run: {e}"))?;
            match self.run.read::<u32>(RUN_EXIT_REASON) {
                EXIT_IO if self.run.read::<u16>(RUN_IO + 2) == PORT => {
                    let at = self.run.read::<u64>(RUN_IO + 8);
                    answer = usize::try_from(at).ok().map(|at| self.run.read::<u8>(at));
                }
                EXIT_HLT if answer == Some(ANSWER) => return Ok(()),
                EXIT_HLT => return Err(format!("the guest gave {answer:?} instead of {ANSWER}")),
                other => return Err(format!("the guest ended with KVM's exit reason {other}")),
            }
        }
    }
}

fn long_mode(vcpu: &OwnedFd) -> io::Result<()> {
    // SAFETY: all zeros is a valid value of this struct of numbers.
    let mut special: SpecialRegisters = unsafe { std::mem::zeroed() };
    ioctl_with(vcpu, KVM_GET_SREGS, &mut special)?;
    let flat = |selector, kind, l, db| Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        kind,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    special.cs = flat(8, 11, 1, 0);
    let data = flat(16, 3, 0, 1);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.cr0 = 0x8000_0011; // paging, protected mode
    special.cr3 = PML4;
    special.cr4 = 0x20; // physical address extension
    special.efer = 0x500; // long mode enabled and active
    ioctl_with(vcpu, KVM_SET_SREGS, &mut special)?;
    ioctl_with(vcpu, KVM_SET_REGS, &mut Registers { rip: CODE, rflags: 2, ..Registers::default() })
}

fn check(result: i32) -> io::Result<i32> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: KVM has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A request whose argument is a number.
fn ioctl(fd: RawFd, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests that are called like this take no memory; KVM_RUN changes only what `Guest` has mapped.
    check(unsafe { libc::ioctl(fd, request, argument) })
}

/// A request whose argument is the struct that it is defined for.
fn ioctl_with<T>(fd: &OwnedFd, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is used with its own struct, whose size is in the request and checked above.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(argument)) }).map(drop)
}

/// Memory that the kernel, or the guest, changes behind the compiler's back: only copied from and to.
struct Mapping {
    base: NonNull<u8>,
    size: usize,
}

impl Mapping {
    fn anonymous(size: usize) -> io::Result<Self> {
        Self::new(size, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    fn of(fd: &OwnedFd, size: usize) -> io::Result<Self> {
        Self::new(size, libc::MAP_SHARED, fd.as_raw_fd())
    }

    fn new(size: usize, flags: i32, fd: RawFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel picks; it aliases no Rust object.
        let base = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast()).map(|base| Self { base, size }).ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.size), "the guest's layout fits its memory");
        // SAFETY: within the mapping, which overlaps no slice of ours.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) };
    }

    fn read<T: Copy + Default>(&self, at: usize) -> T {
        if at.checked_add(size_of::<T>()).is_none_or(|end| end > self.size) {
            return T::default();
        }
        // SAFETY: within the mapping; only used for plain numbers, for which any bits are valid.
        unsafe { self.base.as_ptr().add(at).cast::<T>().read_unaligned() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nothing refers into it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}
