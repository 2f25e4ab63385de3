//! Who speaks which version, and what each end can take.

use rustix::io::Errno;
use serde_json::{Map, Value, json};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::Version;
use super::session::ProtocolError;

/// The version of the protocol that is spoken here. No minor version is known to add anything.
const MAJOR: u16 = 0;
const MINOR: u16 = 0;

/// The most file descriptors that the kernel passes in a message.
pub(crate) const KERNEL_FDS: usize = 253;

/// What a server takes from its client, and says so.
///
/// The defaults are those of the protocol, but for file descriptors. A value that clients refuse, or that could not work,
/// becomes the nearest that does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    max_msg_fds: usize,
    max_data_xfer_size: u32,
    max_dma_maps: u32,
    pgsizes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_msg_fds: 16, max_data_xfer_size: 1 << 20, max_dma_maps: 65_535, pgsizes: 4096 }
    }
}

impl Limits {
    /// How many file descriptors come in a message at most: 1 to 253, and 16 unless this is called, as that is the most that
    /// QEMU lets a server say. Clients pass eventfds of interrupts in pieces of so many.
    #[must_use]
    pub fn max_msg_fds(self, fds: usize) -> Self {
        Self { max_msg_fds: fds.clamp(1, KERNEL_FDS), ..self }
    }

    /// How many bytes a region read or write has at most: 4 KiB, which QEMU needs to read config space, to 64 MiB, which is
    /// the most that QEMU lets a server say. So much is held of one message.
    #[must_use]
    pub fn max_data_xfer_size(self, bytes: u32) -> Self {
        Self { max_data_xfer_size: bytes.clamp(4 << 10, 64 << 20), ..self }
    }

    /// How many mappings of memory there may be at once: 1 to 65,535. A client may not know it, or not keep it: to count is
    /// for who holds the mappings.
    #[must_use]
    pub fn max_dma_maps(self, maps: u32) -> Self {
        Self { max_dma_maps: maps.clamp(1, 65_535), ..self }
    }

    /// The sizes of pages that memory can be mapped in, or'ed together; those below 4 KiB do not count, and if no others are
    /// named it is 4 KiB.
    #[must_use]
    pub fn pgsizes(self, sizes: u64) -> Self {
        let sizes = sizes & !0xfff;
        Self { pgsizes: if sizes == 0 { 4096 } else { sizes }, ..self }
    }

    pub(super) const fn fds(&self) -> usize {
        self.max_msg_fds
    }

    pub(super) const fn data(&self) -> u32 {
        self.max_data_xfer_size
    }
}

/// What a client has said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Client {
    /// The newest minor version that it speaks.
    pub minor: u16,
    /// How many file descriptors it takes in a message.
    pub max_msg_fds: u64,
    /// How many bytes of data it takes in a message.
    pub max_data_xfer_size: u64,
}

/// What both ends say of themselves, by the names that it has in JSON. What else a client says is not for us.
const MAX_MSG_FDS: &str = "max_msg_fds";
const MAX_DATA_XFER_SIZE: &str = "max_data_xfer_size";
const MAX_DMA_MAPS: &str = "max_dma_maps";
const PGSIZES: &str = "pgsizes";

/// Reads a client's VERSION, and writes the body of the reply.
///
/// Capabilities are answered where the client named them, as the specification says: a client that knows none of a
/// capability is not told of it, and QEMU's buffer for the reply is only as long as what it sent.
pub(super) fn negotiate(body: &[u8], limits: &Limits) -> Result<(Client, Vec<u8>), ProtocolError> {
    let (version, data) = Version::read_from_prefix(body).map_err(|_| ProtocolError::VersionData)?;
    if version.major != MAJOR {
        return Err(ProtocolError::Version { major: version.major, minor: version.minor });
    }
    let asked = capabilities(data).ok_or(ProtocolError::VersionData)?;
    let number = |name| number(&asked, name);
    let client = Client {
        minor: version.minor,
        max_msg_fds: number(MAX_MSG_FDS)?.unwrap_or(1),
        max_data_xfer_size: number(MAX_DATA_XFER_SIZE)?.unwrap_or(1 << 20),
    };
    let mut told = Map::new();
    for (name, limit) in [
        (MAX_MSG_FDS, limits.max_msg_fds as u64),
        (MAX_DATA_XFER_SIZE, limits.max_data_xfer_size.into()),
        (MAX_DMA_MAPS, limits.max_dma_maps.into()),
        (PGSIZES, limits.pgsizes),
    ] {
        if number(name)?.is_some() {
            told.insert(name.to_owned(), limit.into());
        }
    }
    let told = json!({ "capabilities": told }).to_string();
    Ok((client, [Version { major: MAJOR, minor: MINOR }.as_bytes(), told.as_bytes(), &[0]].concat()))
}

/// The capabilities in a VERSION's data, which is a JSON object with a NUL behind it, or nothing.
fn capabilities(data: &[u8]) -> Option<Map<String, Value>> {
    let mut data: Map<String, Value> = match data.strip_suffix(&[0]).unwrap_or(data) {
        [] => Map::new(),
        json => serde_json::from_slice(json).ok()?,
    };
    match data.remove("capabilities") {
        None => Some(Map::new()),
        Some(Value::Object(capabilities)) => Some(capabilities),
        Some(_) => None,
    }
}

/// A capability that is a number, if it is there.
fn number(capabilities: &Map<String, Value>, name: &str) -> Result<Option<u64>, ProtocolError> {
    capabilities.get(name).map(|value| value.as_u64().ok_or(ProtocolError::VersionData)).transpose()
}

/// What a client is told that cannot be served.
pub(super) const REFUSED: Errno = Errno::INVAL;

#[cfg(test)]
mod tests {
    use super::*;

    fn body(major: u16, minor: u16, data: &str) -> Vec<u8> {
        [&major.to_ne_bytes()[..], &minor.to_ne_bytes(), data.as_bytes()].concat()
    }

    fn negotiated(data: &str) -> Option<(Client, String)> {
        let (client, reply) = negotiate(&body(0, 1, data), &Limits::default()).ok()?;
        assert_eq!(reply[..4], [0; 4], "version 0.0 is of every client's");
        assert_eq!(reply.last(), Some(&0));
        Some((client, String::from_utf8(reply[4..reply.len() - 1].to_vec()).unwrap()))
    }

    #[test]
    fn qemu_is_told_what_it_asked_for() {
        // QEMU 10.1 and later.
        let asked = r#"{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "max_msg_fds": 16,
            "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;
        let (client, reply) = negotiated(&format!("{asked}\0")).unwrap();
        assert_eq!(client, Client { minor: 1, max_msg_fds: 16, max_data_xfer_size: 1 << 20 });
        let told =
            r#"{"capabilities":{"max_data_xfer_size":1048576,"max_dma_maps":65535,"max_msg_fds":16,"pgsizes":4096}}"#;
        assert_eq!(reply, told);
        assert!(reply.len() <= asked.len(), "it has no more room");
    }

    #[test]
    fn nothing_is_told_that_was_not_asked_for() {
        let defaults = Client { minor: 1, max_msg_fds: 1, max_data_xfer_size: 1 << 20 };
        for nothing in ["", "\0", "{}\0", "{}", r#"{"capabilities":{}}"#, "{\"later\":[1]}\0"] {
            assert_eq!(negotiated(nothing), Some((defaults, r#"{"capabilities":{}}"#.to_owned())), "{nothing:?}");
        }
        let (client, reply) = negotiated("{\"capabilities\":{\"max_msg_fds\":300,\"later\":{}}}\0").unwrap();
        assert_eq!((client.max_msg_fds, &*reply), (300, r#"{"capabilities":{"max_msg_fds":16}}"#));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for nonsense in [
            "[]",
            "0",
            "{",
            "{}\0\0",
            "{}x\0",
            "null",
            r#"{"capabilities":1}"#,
            "[{}]",
            r#"{"capabilities":[]}"#,
            r#"{"capabilities":null}"#,
            r#"{"capabilities":{"max_msg_fds":-1}}"#,
            r#"{"capabilities":{"max_dma_maps":null}}"#,
            r#"{"capabilities":{"max_msg_fds":"1"}}"#,
            r#"{"capabilities":{"pgsizes":1e99}}"#,
        ] {
            assert_eq!(negotiated(nonsense), None, "{nonsense}");
        }
        let deep = "[".repeat(4000);
        assert_eq!(negotiated(&format!(r#"{{"x":{deep}"#)), None);
        let refusal = |body: &[u8]| negotiate(body, &Limits::default()).unwrap_err();
        assert_eq!(refusal(&body(1, 0, "{}\0")), ProtocolError::Version { major: 1, minor: 0 });
        for short in 0..4 {
            assert_eq!(refusal(&[0; 4][..short]), ProtocolError::VersionData);
        }
    }

    #[test]
    fn limits_are_such_as_clients_take() {
        let least = Limits::default().max_msg_fds(0).max_data_xfer_size(0).max_dma_maps(0).pgsizes(0xfff);
        let most = Limits::default().max_msg_fds(999).max_data_xfer_size(!0).max_dma_maps(!0).pgsizes(!0);
        let limits = |max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes| Limits {
            max_msg_fds,
            max_data_xfer_size,
            max_dma_maps,
            pgsizes,
        };
        assert_eq!(least, limits(1, 4096, 1, 4096));
        assert_eq!(most, limits(253, 64 << 20, 65_535, !0xfff));
    }
}
