//! Reading what real drivers did with DMA.
//!
//! Replay answers "what would passing this device through really pin?" from a recording of the kernel's `dma:*`
//! tracepoints. Recordings come from other machines and by mail, so a trace is hostile input: whatever the bytes are,
//! memory stays bounded, nothing panics, and what is not understood is counted, not guessed.
//!
//! Two texts are read, of kernels 6.12 to 7.3:
//! * tracefs (`/sys/kernel/tracing/trace`, or `trace_pipe`),
//! * `trace-cmd report`, and `perf script`, whose lines have the same shape.
//!
//! Both may be compressed with gzip or zstd, in several members or frames.
//!
//! # Rooms
//!
//! * `source`: bytes in, decompressed; knows how far it is
//! * `ahead`: the decompression, in a thread of its own
//! * `lines`: bytes to lines, in one buffer
//! * `parse`: a line to an event; pure
//! * `event`: what an event is
//! * `reader`: the three put together, and the counts
//!
//! # Rules
//!
//! 1. A line is an event, an announcement of lost events, a header, or *skipped*: no line is in two of these.
//! 2. A cut or corrupt compressed stream is an error, even after good events: the end of a trace matters.
//! 3. What a task calls itself cannot make an event: the kernel's own columns are found first (see `parse`).

mod ahead;
mod error;
mod event;
mod lines;
mod parse;
mod reader;
mod source;

pub use error::TraceError;
pub use event::{Event, Family, Record, Segment};
pub use lines::MAX_LINE;
pub use reader::{ReadCounts, TraceReader};
pub use source::{Format, Progress};
