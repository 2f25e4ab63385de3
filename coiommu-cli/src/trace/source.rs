//! Where the bytes come from: a file or standard input, decompressed on the way.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Chain, Cursor, ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use super::ahead::Ahead;
use super::error::TraceError;

/// Compressed bytes read at a time.
const BLOCK: usize = 64 * 1024;

/// How a trace is stored. Found by its first bytes: names lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As it is.
    Plain,
    /// gzip, one member or several.
    Gzip,
    /// zstd, one frame or several.
    Zstd,
}

impl Format {
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // The second is a skippable frame, with which pzstd and others begin.
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// How far the reading is, in bytes of the file (compressed, if it is). Clones watch the same reading.
#[derive(Clone, Debug)]
pub struct Progress {
    read: Arc<AtomicU64>,
    total: Option<u64>,
}

impl Progress {
    /// Bytes taken from the file until now.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The file's length; unknown for a pipe.
    pub fn total(&self) -> Option<u64> {
        self.total
    }
}

/// Counts what is read, and hides interruptions by signals from the decoders.
struct Metered {
    input: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Read for Metered {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.input.read(buf) {
                Ok(n) => {
                    self.read.fetch_add(u64::try_from(n).unwrap_or(u64::MAX), Ordering::Relaxed);
                    return Ok(n);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The bytes that told the format, then the rest.
type Input = Chain<Cursor<Vec<u8>>, Metered>;

/// An open trace: reads as text, whatever it is stored as.
pub(super) struct Source {
    name: String,
    format: Format,
    text: Box<dyn Read + Send>,
    progress: Progress,
}

impl Source {
    /// Opens a file, or standard input for `-`.
    pub(super) fn open(path: &Path) -> Result<Self, TraceError> {
        let (name, file) = if path == Path::new("-") {
            // Not `io::stdin()`: its own buffer would only be one copy more.
            ("standard input".to_owned(), io::stdin().as_fd().try_clone_to_owned().map(File::from))
        } else {
            (path.display().to_string(), File::open(path))
        };
        let opened = file.and_then(|file| Ok((file.metadata()?, file)));
        let (about, file) = opened.map_err(|error| TraceError::Open { name: name.clone(), error })?;
        let total = about.is_file().then_some(about.len());
        Self::new(name, Box::new(file), total)
    }

    /// Reads from anything; `name` is for messages, `total` the length if it is known.
    pub(super) fn new(name: String, input: Box<dyn Read + Send>, total: Option<u64>) -> Result<Self, TraceError> {
        let progress = Progress { read: Arc::default(), total };
        let mut input = Metered { input, read: Arc::clone(&progress.read) };
        let mut head = Vec::new();
        if let Err(error) = (&mut input).take(4).read_to_end(&mut head) {
            return Err(TraceError::Read { name, error });
        }
        let format = Format::of(&head);
        let input = Cursor::new(head).chain(input);
        let text = match open_text(format, input) {
            Ok(text) => text,
            Err(error) => return Err(TraceError::Corrupt { name, format, error }),
        };
        Ok(Self { name, format, text, progress })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// What an error of [`read`](Read::read) means.
    pub(super) fn explain(&self, error: io::Error) -> TraceError {
        let (name, format) = (self.name.clone(), self.format);
        // An error with a number is the system's, which the decoder only passes on.
        if format == Format::Plain || error.raw_os_error().is_some() {
            TraceError::Read { name, error }
        } else if error.kind() == ErrorKind::UnexpectedEof {
            TraceError::Cut { name, format }
        } else {
            TraceError::Corrupt { name, format, error }
        }
    }
}

/// The text of an input.
fn open_text(format: Format, input: Input) -> io::Result<Box<dyn Read + Send>> {
    Ok(match format {
        Format::Plain => Box::new(input),
        Format::Gzip => Box::new(Ahead::new(MultiGzDecoder::new(BufReader::with_capacity(BLOCK, input)))?),
        Format::Zstd => {
            // libzstd refuses windows over 128 MiB unless told otherwise: that bounds a hostile frame.
            let decoder = zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(BLOCK, input))?;
            Box::new(Ahead::new(decoder)?)
        }
    })
}

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.text.read(buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(text: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_checksum(true).unwrap();
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn read(stored: Vec<u8>) -> Result<Vec<u8>, TraceError> {
        let mut source = Source::new("t".to_owned(), Box::new(Cursor::new(stored)), None)?;
        let mut text = Vec::new();
        match source.read_to_end(&mut text) {
            Ok(_) => Ok(text),
            Err(error) => Err(source.explain(error)),
        }
    }

    fn text() -> Vec<u8> {
        (0..30_000_u32).flat_map(|n| format!("line {}\n", n.wrapping_mul(2_654_435_761)).into_bytes()).collect()
    }

    #[test]
    fn reads_every_format_in_one_part_and_in_two() {
        let text = text();
        let two = [&text[..], &text[..]].concat();
        assert_eq!(read(text.clone()).unwrap(), text);
        for pack in [gzip, zstd] {
            assert_eq!(read(pack(&text)).unwrap(), text);
            assert_eq!(read([pack(&text), pack(&text)].concat()).unwrap(), two);
            assert_eq!(read(pack(b"")).unwrap(), b"");
        }
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd(&text)].concat();
        assert_eq!(read(skippable).unwrap(), text);
    }

    #[test]
    fn short_files_are_plain() {
        for short in [&b""[..], b"\x1f", b"(", b"\x28\xb5\x2f", b"\n"] {
            assert_eq!(read(short.to_vec()).unwrap(), short);
        }
    }

    #[test]
    fn a_cut_anywhere_is_an_error() {
        for (pack, magic) in [(gzip as fn(&[u8]) -> Vec<u8>, 2), (zstd, 4)] {
            let one = pack(&text()[..5000]);
            let two = [&one[..], &one[..]].concat();
            for len in (magic..one.len()).chain(one.len() + 1..two.len()) {
                let error = read(two[..len].to_vec()).unwrap_err();
                assert!(matches!(error, TraceError::Cut { .. }), "cut at {len} of {}: {error}", two.len());
            }
        }
    }

    #[test]
    fn rot_is_an_error() {
        for pack in [gzip, zstd] {
            let mut stored = pack(&text());
            let middle = stored.len() / 2;
            stored[middle] ^= 0x10;
            stored[middle + 1] ^= 0x11;
            assert!(matches!(read(stored).unwrap_err(), TraceError::Corrupt { .. } | TraceError::Cut { .. }));
            let trailing = [&pack(b"x")[..], b"garbage"].concat();
            assert!(matches!(read(trailing).unwrap_err(), TraceError::Corrupt { .. } | TraceError::Cut { .. }));
        }
    }

    #[test]
    fn counts_stored_bytes() {
        let stored = gzip(&text());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &stored).unwrap();
        let mut source = Source::open(file.path()).unwrap();
        let progress = source.progress().clone();
        assert_eq!(progress.total(), u64::try_from(stored.len()).ok());
        io::copy(&mut source, &mut io::sink()).unwrap();
        assert_eq!(Some(progress.read()), progress.total());
    }

    #[test]
    fn what_the_system_refuses_names_the_file() {
        let Err(error) = Source::open(Path::new("/nowhere/a.trace")) else { panic!("it cannot exist") };
        assert!(error.to_string().starts_with("cannot open /nowhere/a.trace: "), "{error}");
        let Err(error) = Source::open(Path::new("/")) else { panic!("a directory cannot be read") };
        assert!(error.to_string().starts_with("cannot read /: "), "{error}");
    }

    #[test]
    fn a_signal_is_not_an_error() {
        struct Signals(Cursor<Vec<u8>>, bool);
        impl Read for Signals {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.1 = !self.1;
                if self.1 { Err(ErrorKind::Interrupted.into()) } else { self.0.read(&mut buf[..1]) }
            }
        }
        for pack in [gzip, zstd, <[u8]>::to_vec] {
            let input = Signals(Cursor::new(pack(b"text")), false);
            let mut source = Source::new("t".to_owned(), Box::new(input), None).unwrap();
            assert_eq!(source.read(&mut [0; 1]).unwrap(), 1);
        }
    }
}
