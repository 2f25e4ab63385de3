//! Why a trace could not be read.

use std::io;

use super::source::Format;

/// Why a trace could not be read. Every message is one line and names the file.
///
/// The messages hold what the system said, so no `source()` repeats it.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be opened.
    #[error("cannot open {name}: {error}")]
    Open {
        /// The path as given.
        name: String,
        /// What the system said.
        error: io::Error,
    },
    /// The system failed to deliver bytes.
    #[error("cannot read {name}: {error}")]
    Read {
        /// The path as given.
        name: String,
        /// What the system said.
        error: io::Error,
    },
    /// A compressed stream ends before it says it does: a copy that was interrupted.
    #[error("{name}: the {format} stream ends in the middle: the file is cut short")]
    Cut {
        /// The path as given.
        name: String,
        /// How it is compressed.
        format: Format,
    },
    /// A compressed stream does not decode, or its checksum is wrong.
    #[error("{name}: the {format} stream is corrupt: {error}")]
    Corrupt {
        /// The path as given.
        name: String,
        /// How it is compressed.
        format: Format,
        /// What the decoder said.
        error: io::Error,
    },
    /// A recorder's own file, which only the recorder can print.
    #[error("{name} is a binary {file} file: run `{tool}` first and give its output")]
    Recording {
        /// The path as given.
        name: String,
        /// What such a file is usually called.
        file: &'static str,
        /// The command that prints it as text.
        tool: &'static str,
    },
    /// Some other binary file.
    #[error("{name} is binary, not a text trace")]
    Binary {
        /// The path as given.
        name: String,
    },
    /// There is nothing in it.
    #[error("{name} is empty")]
    Empty {
        /// The path as given.
        name: String,
    },
    /// Text, but not one `dma:*` event.
    #[error("no dma events in {name} (lines read: {lines}): record with the dma:* tracepoints enabled")]
    NoEvents {
        /// The path as given.
        name: String,
        /// Lines that were read.
        lines: u64,
    },
}
