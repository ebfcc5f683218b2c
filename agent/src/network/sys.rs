//! The kernel's interfaces for taps and bridge ports. All `unsafe` of the network is here.
//!
//! The old ioctls do everything that is needed in five calls, so no netlink library is.

use std::{
    ffi::c_int,
    fs::{File, OpenOptions},
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// A request about the interface `name`, whose name must fit.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeros is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // One byte for the zero at its end.
    if name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of the interface is too long"));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Ok(request)
}

/// Makes a tap that is gone when the descriptor, and all its copies, are closed.
pub(super) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name)?;
    // Frames without a header of the tun driver, but with the one of virtio: the guest and the host leave checksums to each other.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | IFF_TUN_EXCL;
    // The flags are 16 bits, and the highest of them is the sign.
    request.ifr_ifru.ifru_flags = (flags as u16).cast_signed();
    call(&file, libc::TUNSETIFF, &mut request)?;
    Ok(file.into())
}

/// Makes an interface a port of a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
/// Never takes over a tap that is there.
const IFF_TUN_EXCL: c_int = 0x8000;

/// A socket by which interfaces are asked and changed, in the network namespace of this process.
pub(super) struct Control(OwnedFd);

impl Control {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: a plain call; the descriptor is ours.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just opened, and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn mtu(&self, name: &str) -> io::Result<c_int> {
        let mut request = request(name)?;
        call(&self.0, libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel has filled in this field.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: c_int) -> io::Result<()> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_mtu = mtu;
        call(&self.0, libc::SIOCSIFMTU, &mut request)
    }

    pub(super) fn set_address(&self, name: &str, address: [u8; 6]) -> io::Result<()> {
        let mut request = request(name)?;
        // SAFETY: all zeros is a valid value of this plain C struct.
        let mut value: libc::sockaddr = unsafe { mem::zeroed() };
        value.sa_family = libc::ARPHRD_ETHER;
        for (place, byte) in value.sa_data.iter_mut().zip(address) {
            *place = byte.cast_signed();
        }
        request.ifr_ifru.ifru_hwaddr = value;
        call(&self.0, libc::SIOCSIFHWADDR, &mut request)
    }

    pub(super) fn add_port(&self, bridge: &str, port: &str) -> io::Result<()> {
        let mut asked = request(port)?;
        call(&self.0, libc::SIOCGIFINDEX, &mut asked)?;
        let mut request = request(bridge)?;
        // SAFETY: the kernel has filled in this field.
        request.ifr_ifru.ifru_ifindex = unsafe { asked.ifr_ifru.ifru_ifindex };
        call(&self.0, SIOCBRADDIF, &mut request)
    }

    pub(super) fn up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name)?;
        call(&self.0, libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has filled in this field.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags }) | libc::IFF_UP;
        request.ifr_ifru.ifru_flags = (flags as u16).cast_signed();
        call(&self.0, libc::SIOCSIFFLAGS, &mut request)
    }
}

fn call(on: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each of the calls above reads and writes one `ifreq`, which this is.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), what, ptr::from_mut(request)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
