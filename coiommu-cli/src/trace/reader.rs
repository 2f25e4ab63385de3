//! The reader: source, lines and parser put together.

use std::fmt;
use std::io::Read;
use std::path::Path;

use memchr::memchr;

use super::error::TraceError;
use super::event::{Event, Record};
use super::lines::{Lines, Step};
use super::parse::{self, Line, Scratch, What};
use super::source::{Format, Progress, Source};

/// Magic numbers of recordings that are no text: file, tool that prints it.
const RECORDINGS: [(&[u8], &str, &str); 3] = [
    (b"\x17\x08\x44tracing", "trace.dat", "trace-cmd report"),
    (b"PERFILE2", "perf.data", "perf script"),
    (b"2ELIFREP", "perf.data", "perf script"),
];

/// What was seen besides events. Every number only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// Lines of any kind.
    pub lines: u64,
    /// Events that the recorder says it lost (`[LOST 12 EVENTS]`, overwritten ones): the trace has a hole there.
    pub lost_events: u64,
    /// Lines that should mean something and were not understood: other events, missing or impossible fields, over
    /// [`MAX_LINE`](super::MAX_LINE).
    pub skipped_lines: u64,
    /// Scatter lists of which the kernel showed the beginning only: their mappings are larger than they look.
    pub truncated_lists: u64,
}

/// Reads a trace event by event, in one pass and bounded memory.
pub struct TraceReader {
    lines: Lines<Source>,
    scratch: Scratch,
    counts: ReadCounts,
    events: u64,
}

impl TraceReader {
    /// Opens a trace, or standard input for `-`, and looks at its beginning.
    ///
    /// # Errors
    ///
    /// The file cannot be opened or read, its compression is broken from the start, or it is no text.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        Self::new(Source::open(path)?)
    }

    /// Reads a trace from anywhere; `name` stands for it in messages.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_reader(name: &str, input: impl Read + Send + 'static) -> Result<Self, TraceError> {
        Self::new(Source::new(name.to_owned(), Box::new(input), None)?)
    }

    fn new(source: Source) -> Result<Self, TraceError> {
        let mut lines = Lines::new(source);
        // A first read that is short (a pipe) is enough for telling text from binary; a magic number must be whole.
        let head = lines.peek(16).map(|head| {
            let recording = RECORDINGS.iter().find(|(magic, ..)| head.starts_with(magic));
            (recording, memchr(0, head).is_some())
        });
        let name = || lines.source().name().to_owned();
        match head {
            Err(error) => Err(lines.source().explain(error)),
            Ok((Some(&(_, file, tool)), _)) => Err(TraceError::Recording { name: name(), file, tool }),
            Ok((None, true)) => Err(TraceError::Binary { name: name() }),
            Ok((None, false)) => {
                Ok(Self { lines, scratch: Scratch::default(), counts: ReadCounts::default(), events: 0 })
            }
        }
    }

    /// The next event, or nothing at the end.
    ///
    /// # Errors
    ///
    /// Reading failed, or the compressed stream is cut or corrupt; earlier events were true as far as they went.
    #[allow(clippy::should_implement_trait, reason = "the record borrows from the reader, so it cannot be an iterator")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>, TraceError> {
        let (time, what) = loop {
            let step = match self.lines.next() {
                Ok(Some(step)) => step,
                Ok(None) => return Ok(None),
                Err(error) => return Err(self.lines.source().explain(error)),
            };
            self.counts.lines += 1;
            let line = match step {
                Step::Line(line) => parse::line(self.lines.text(line), &mut self.scratch),
                Step::TooLong => Line::Skip,
            };
            match line {
                Line::Event { time, what, truncated } => {
                    self.counts.truncated_lists += u64::from(truncated);
                    break (time, what);
                }
                Line::Lost(events) => self.counts.lost_events = self.counts.lost_events.saturating_add(events),
                Line::Quiet => {}
                Line::Skip => self.counts.skipped_lines += 1,
            }
        };
        self.events += 1;
        let event = match what {
            What::Map { family, key } => Event::Map { family, key, segments: self.scratch.segments() },
            What::Unmap { family, key, size } => Event::Unmap { family, key, size },
            What::MapResource => Event::MapResource,
            What::UnmapResource => Event::UnmapResource,
            What::Sync => Event::Sync,
            What::Failed => Event::Failed,
        };
        Ok(Some(Record { time, device: self.scratch.device(), event }))
    }

    /// What was counted until now.
    pub fn counts(&self) -> ReadCounts {
        self.counts
    }

    /// To be called at the end: the counts, if there was any event at all.
    ///
    /// # Errors
    ///
    /// [`TraceError::Empty`] and [`TraceError::NoEvents`].
    pub fn finish(&self) -> Result<ReadCounts, TraceError> {
        let name = || self.lines.source().name().to_owned();
        match (self.events, self.counts.lines) {
            (0, 0) => Err(TraceError::Empty { name: name() }),
            (0, lines) => Err(TraceError::NoEvents { name: name(), lines }),
            _ => Ok(self.counts),
        }
    }

    /// How far the reading is; may be kept and asked from another thread.
    pub fn progress(&self) -> Progress {
        self.lines.source().progress().clone()
    }

    /// How the trace is stored.
    pub fn format(&self) -> Format {
        self.lines.source().format()
    }
}

impl fmt::Debug for TraceReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceReader")
            .field("name", &self.lines.source().name())
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Family, MAX_LINE, Segment};
    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;
    use std::io::{Cursor, Write};

    const MAP: &str =
        "  dd-1  [000] .....     1.000001: dma_map_page: dev0 dir=NONE dma_addr=1000 size=16 phys_addr=1000 attrs=\n";

    fn open(bytes: impl Into<Vec<u8>>) -> Result<TraceReader, TraceError> {
        TraceReader::from_reader("t.trace", Cursor::new(bytes.into()))
    }

    /// All events' number, and the counts.
    fn drain(reader: &mut TraceReader) -> Result<u64, TraceError> {
        let mut events = 0;
        while reader.next()?.is_some() {
            events += 1;
        }
        Ok(events)
    }

    #[test]
    fn gives_events_and_counts_the_rest() {
        let text = format!(
            "# entries-in-buffer/entries-written: 90/100   #P:2\n\n{MAP}CPU:0 [LOST 12 EVENTS]\nnoise\n{}\n{MAP}",
            "x".repeat(MAX_LINE + 1)
        );
        let mut reader = open(text).unwrap();
        let first = reader.next().unwrap().unwrap();
        let segment = Segment::new(0x1000, 16).unwrap();
        let event = Event::Map { family: Family::Single, key: 0x1000, segments: &[segment] };
        assert_eq!(first, Record { time: 1_000_001_000, device: "dev0", event });
        assert_eq!(drain(&mut reader).unwrap(), 1);
        let counts = ReadCounts { lines: 7, lost_events: 22, skipped_lines: 2, truncated_lists: 0 };
        assert_eq!(reader.finish().unwrap(), counts);
    }

    #[test]
    fn names_what_is_no_trace() {
        let message = |bytes: &[u8]| match open(bytes) {
            Err(error) => error.to_string(),
            Ok(mut reader) => {
                drain(&mut reader).unwrap();
                reader.finish().unwrap_err().to_string()
            }
        };
        assert_eq!(message(b""), "t.trace is empty");
        assert_eq!(message(b"\x7fELF\0"), "t.trace is binary, not a text trace");
        assert!(message(b"hello\n").starts_with("no dma events in t.trace (lines read: 1)"));
        assert!(message(b"\x17\x08\x44tracing6\0").contains("run `trace-cmd report` first"));
        assert!(message(b"PERFILE2\x68\0\0\0").contains("run `perf script` first"));
    }

    #[test]
    fn a_cut_stream_is_an_error_after_its_events() {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
        encoder.write_all(MAP.repeat(5000).as_bytes()).unwrap();
        let whole = encoder.finish().unwrap();
        let mut reader = open(&whole[..whole.len() - 3]).unwrap();
        let mut events = 0;
        let error = loop {
            match reader.next() {
                Ok(Some(_)) => events += 1,
                Ok(None) => panic!("taken for whole"),
                Err(error) => break error,
            }
        };
        assert!(events > 0);
        assert_eq!(error.to_string(), "t.trace: the gzip stream ends in the middle: the file is cut short");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_the_end(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            if let Ok(mut reader) = open(bytes) {
                let _ = drain(&mut reader);
                let counts = reader.counts();
                prop_assert!(counts.skipped_lines <= counts.lines);
            }
        }
    }
}
