//! Why interrupts cannot be used as was asked.

use std::io;

use rustix::io::Errno;

use super::{ERR, INTX, MSI, MSIX, REQ};

/// Why a message about interrupts was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InterruptError {
    /// There is no such kind of interrupt.
    #[error("{index} is no kind of interrupt: INTx, MSI, MSI-X, error and request are 0 to 4")]
    NoKind {
        /// Its index.
        index: u32,
    },
    /// The device has fewer.
    #[error("{number} from {start} on are not among the device's {count} interrupts of the kind {}", name(*index))]
    OutOfRange {
        /// The kind.
        index: u32,
        /// The first that was meant.
        start: u32,
        /// How many were meant.
        number: usize,
        /// How many there are.
        count: u32,
    },
    /// It names no interrupt, or does not say of each what to do.
    #[error("a message for {} names {number} interrupts, and says something of {said}", name(*index))]
    Malformed {
        /// The kind.
        index: u32,
        /// How many it names.
        number: usize,
        /// Of how many it says something.
        said: usize,
    },
    /// The kind was enabled with fewer, and the kernel does not add any.
    #[error("{} was enabled with {enabled} interrupts, and has to be disabled before {needed} can be used", name(*index))]
    Fixed {
        /// The kind.
        index: u32,
        /// How many there would have to be.
        needed: usize,
        /// How many it was enabled with.
        enabled: usize,
    },
    /// The host has not so many to give.
    #[error("the host has {available} interrupts for {}, of {wanted} that it takes: use fewer", name(*index))]
    TooFew {
        /// The kind.
        index: u32,
        /// How many were asked for.
        wanted: usize,
        /// How many can be had.
        available: u32,
    },
    /// What the kernel says.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl InterruptError {
    /// What the kernel would say, or has said: to be told to a client.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::TooFew { .. } => Errno::NOSPC,
            Self::Kernel(error) => return error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
            _ => Errno::INVAL,
        };
        errno.raw_os_error()
    }
}

/// With its [`errno`](InterruptError::errno).
impl From<InterruptError> for io::Error {
    fn from(error: InterruptError) -> Self {
        Self::from_raw_os_error(error.errno())
    }
}

/// What a kind is called.
pub(super) fn name(index: u32) -> &'static str {
    match index {
        INTX => "INTx",
        MSI => "MSI",
        MSIX => "MSI-X",
        ERR => "error",
        REQ => "request",
        _ => "unknown",
    }
}
