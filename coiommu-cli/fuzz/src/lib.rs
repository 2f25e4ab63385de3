//! Fuzzing the trace reader: recordings come from other machines and by mail, so a trace is any bytes.
//!
//! That memory stays bounded is for the fuzzer's limits to find (`cargo xtask fuzz trace` sets them).

use std::io::Cursor;

use coiommu_cli::trace::{Event, Format, MAX_LINE, Record, Segment, TraceError, TraceReader};

/// A compressed input of some KiB may be text of a GiB, of which this many events and bytes are enough.
const MOST_EVENTS: u64 = 1 << 16;
/// What the kernel's limit for names in sysfs allows, and more than it prints of a list.
const MOST_DEVICE_BYTES: usize = 256;

/// Reads a trace to its end.
///
/// # Panics
///
/// If what is read is not what the reader promises.
pub fn trace(input: &[u8]) {
    let mut reader = match TraceReader::from_reader("input", Cursor::new(input.to_vec())) {
        Ok(reader) => reader,
        Err(error) => return check_error(&error),
    };
    assert_eq!(reader.format(), format(input));
    let mut events = 0;
    let ended = loop {
        match reader.next() {
            Ok(Some(record)) => check(&record),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
        events += 1;
        if events == MOST_EVENTS {
            return;
        }
    };
    let counts = reader.counts();
    assert!(events + counts.skipped_lines <= counts.lines, "no line is an event and skipped: {counts:?}");
    assert!(counts.truncated_lists <= events);
    let read = reader.progress().read();
    assert!(read <= input.len() as u64);
    match ended {
        Err(error) => {
            assert_ne!(reader.format(), Format::Plain, "plain bytes end where they end: {error}");
            check_error(&error);
        }
        Ok(()) => {
            assert_eq!(read, input.len() as u64, "all of it was read");
            match reader.finish() {
                Ok(finished) => assert!(finished == counts && events > 0),
                Err(error) => {
                    assert_eq!(events, 0);
                    check_error(&error);
                }
            }
        }
    }
}

/// Formats are told by their first bytes.
fn format(input: &[u8]) -> Format {
    match input {
        [0x1f, 0x8b, ..] => Format::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Format::Zstd,
        _ => Format::Plain,
    }
}

/// Messages are one line, and name the trace.
fn check_error(error: &TraceError) {
    let message = error.to_string();
    assert!(message.contains("input") && !message.contains(char::is_control), "{message:?}");
}

fn check(record: &Record<'_>) {
    let Record { device, event, .. } = record;
    assert!(!device.is_empty() && device.len() <= MOST_DEVICE_BYTES, "{record:?}");
    assert!(!device.contains(char::is_control), "{record:?}");
    if let Event::Map { segments, .. } = event {
        // Each takes a character of the line at least.
        assert!(!segments.is_empty() && segments.len() <= MAX_LINE, "{record:?}");
        for segment in *segments {
            assert_eq!(Segment::new(segment.addr(), segment.size()), Some(*segment));
            assert_eq!(segment.last() - segment.addr(), segment.size() - 1);
        }
    }
}
