//! The protocol without I/O: bytes and file descriptors in, requests out; answers in, bytes and file descriptors out.
//!
//! | file | what |
//! | --- | --- |
//! | `wire/layout.rs` | the structures as they are on the wire |
//! | `wire/framing.rs` | where a message begins and ends, and what arrives with it |
//! | `wire/version.rs` | [`Limits`], negotiation |
//! | `wire/request.rs` | [`Request`]: a command that makes sense |
//! | `wire/info.rs` | what the server tells of its device |
//! | `wire/answer.rs` | [`Ticket`], and how answers are written |
//! | `wire/session.rs` | [`Session`], all of it |
//!
//! All numbers are in the byte order of the machine, as both ends are on one.

mod answer;
mod framing;
mod info;
mod layout;
mod request;
mod session;
mod version;

pub use answer::{Answer, ReadData, Ticket};
pub use info::{Area, DeviceInfo, IoEventFd, IoEventFds, IrqFlags, IrqInfo, Mapping, RegionFlags, RegionInfo, pci};
pub use request::{
    Access, DmaFile, DmaFlags, DmaMap, DmaRange, DmaUnmap, IrqAction, IrqChange, IrqRange, RegionWrite, Request,
    SetIrqs,
};
pub use session::{Outgoing, ProtocolError, Session};
pub(crate) use version::KERNEL_FDS;
pub use version::{Client, Limits};
