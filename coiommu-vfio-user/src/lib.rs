//! The server half of [vfio-user]: a device in a process of its own, for a VMM that speaks the protocol, as stock QEMU does.
//!
//! The protocol is VFIO's ioctls as messages over a Unix socket. This crate knows its bytes and nothing of any device: bytes
//! and file descriptors of a client come in, a typed [`Request`] comes out, and whoever embeds this answers it. Three rooms:
//!
//! | module | what is there |
//! | --- | --- |
//! | [`wire`] | [`Session`]: the protocol without I/O; requests, answers, negotiation |
//! | [`connection`] | [`Connection`]: a session on a Unix socket, to be polled |
//! | [`listener`] | [`Listener`]: the path where a client finds the server |
//!
//! # A server
//!
//! ```
//! use coiommu_vfio_user::{Connection, DeviceInfo, Errno, Event, Limits, Request};
//! use std::os::unix::net::UnixStream;
//!
//! /// Serves a client until it goes.
//! fn serve(mut connection: Connection) -> Result<(), Box<dyn std::error::Error>> {
//!     loop {
//!         match connection.receive()? {
//!             Event::Request(Request::DeviceInfo(ticket)) => connection.answer(ticket, Ok(DeviceInfo::pci(true))),
//!             Event::Request(Request::RegionRead(read, ticket)) => {
//!                 let mut data = ticket.buffer();
//!                 data.fill(0xff); // what the device has at `read.offset` of `read.region`
//!                 connection.answer(ticket, Ok(data));
//!             }
//!             Event::Request(Request::DmaMap(_, ticket)) => connection.answer(ticket, Err(Errno::NOSPC)),
//!             Event::Request(_) => {} // dropped: answered with an error
//!             Event::More => {}
//!             Event::Idle => connection.wait(None, None).map(drop)?,
//!             Event::Closed => return Ok(()),
//!         }
//!     }
//! }
//!
//! let (client, server) = UnixStream::pair()?;
//! drop(client);
//! serve(Connection::new(server, Limits::default()))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/server` is a whole device.
//!
//! # Answers
//!
//! A request comes with a [`Ticket`], and the only way to answer is to give the ticket away: nothing is answered twice, or
//! with what belongs to another command. A ticket that is dropped is answered with `EIO`, so that a client never waits for
//! what was forgotten. Tickets can be kept, sent to other threads, and answered in any order.
//!
//! **When to answer** is the embedder's to know. QEMU holds its big lock until a region write is answered, so one that only
//! says "look there" is answered first and done afterwards. Everything else is answered when it has taken effect: a client
//! that got its answer to an unmap takes the memory away.
//!
//! # What a client can do to the server
//!
//! It is not trusted. Any bytes, in any pieces, give requests, error replies or a [`ProtocolError`], which ends the
//! connection; nothing panics. A message that is too long or not known is skipped, not kept: what a session holds is bounded
//! by its [`Limits`], and by what is answered and not taken by the client (then no more is read). File descriptors that
//! nothing wants are closed. What is *not* known here is the device: whether a region or an interrupt exists, how long it is,
//! and how many mappings of memory there may be ([`Limits::max_dma_maps`] is only said to the client). Nor is it known how
//! many tickets are kept: whoever answers later stops receiving when there are enough.
//!
//! [vfio-user]: https://www.qemu.org/docs/master/interop/vfio-user.html
#![forbid(unsafe_code)]

pub mod connection;
pub mod listener;
pub mod wire;

pub use connection::{Connection, ConnectionError, Event, Interest, Wake};
pub use listener::{ListenError, Listener};
pub use rustix::io::Errno;
pub use wire::{
    Access, Answer, Area, Client, DeviceInfo, DmaFile, DmaFlags, DmaMap, DmaRange, DmaUnmap, IoEventFd, IoEventFds,
    IrqAction, IrqChange, IrqFlags, IrqInfo, IrqRange, Limits, Mapping, ProtocolError, ReadData, RegionFlags,
    RegionInfo, RegionWrite, Request, Session, SetIrqs, Ticket, pci,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
