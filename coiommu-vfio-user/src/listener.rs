//! The path where a client finds the server.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

/// How many clients may wait; one is served, so it only has to be enough to tell the others.
const BACKLOG: u8 = 4;

/// Why there is no listening at a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// A server listens there.
    #[error("{path} is another server's: end that, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something is there that is no socket, and stays.
    #[error("{path} is there and is no socket: remove it, or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot listen at {path}")]
    System {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A socket at a path, which only its owner (and root) can connect to.
///
/// It is removed when this is dropped, unless something else is at the path by then.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// The file at the path, as device and inode.
    file: (u64, u64),
}

impl Listener {
    /// Listens at a path. A socket that a server has left there is replaced.
    ///
    /// # Errors
    ///
    /// [`ListenError`]: there is a server, or something that is no socket, or the path cannot be used.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, ListenError> {
        let path = path.into();
        match bound(&path) {
            Err(Errno::ADDRINUSE) => remove_stale(&path)?,
            other => return Self::new(path, other),
        }
        let again = bound(&path);
        if matches!(again, Err(Errno::ADDRINUSE)) {
            // Another server was quicker.
            return Err(ListenError::InUse { path });
        }
        Self::new(path, again)
    }

    fn new(path: PathBuf, socket: Result<OwnedFd, Errno>) -> Result<Self, ListenError> {
        let listening = || -> io::Result<_> {
            let socket = socket?;
            let file = identity(&path)?;
            listen(&socket, BACKLOG.into())?;
            Ok((socket, file))
        };
        match listening() {
            Ok((socket, file)) => Ok(Self { socket, path, file }),
            Err(source) => Err(ListenError::System { path, source }),
        }
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A client that waits, if one does; never blocks. The listener is readable when one does.
    ///
    /// # Errors
    ///
    /// Of the system call: too many open files, for one. The client still waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(socket.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Closes the connections of clients that wait, so that they see at once that there is nothing for them; and says how many
    /// there were. For while one is served: the protocol has one client a device.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    pub fn turn_away(&self) -> io::Result<usize> {
        // Not more than wait now: others may come as fast as they go.
        let waiting = iter::repeat_with(|| self.accept()).take(usize::from(BACKLOG) + 1);
        waiting.map_while(Result::transpose).try_fold(0, |count, client| client.map(|_closed| count + 1))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            // What is left behind is stale to the next server.
            let _left = fs::remove_file(&self.path);
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// A socket at a path. Its mode is set before it is there: it is never anybody else's to connect to.
fn bound(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let system = |source| ListenError::System { path: path.to_owned(), source };
    // Not of what a link leads to.
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let connected = socket().and_then(|socket| connect(&socket, &SocketAddrUnix::new(path)?));
    match connected {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(system),
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(error) => Err(system(error.into())),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
