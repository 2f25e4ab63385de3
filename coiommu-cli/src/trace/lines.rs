//! Lines from bytes, in one buffer that never grows.

use std::io::{self, Read};
use std::ops::Range;

use memchr::memchr;

/// The longest line that is read, in bytes without its newline. The kernel prints at most 8 KiB an event; a longer line
/// is dropped whole, so that a file without newlines costs no memory.
pub const MAX_LINE: usize = 256 * 1024;

/// Bytes asked of the source at a time: enough to make a call cheap, few enough to stay in the cache.
const BLOCK: usize = 64 * 1024;

/// One step through the text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A line, without its newline: a range for [`Lines::text`].
    Line(Range<usize>),
    /// A line longer than [`MAX_LINE`] was dropped.
    TooLong,
}

/// Cuts a source into lines.
pub(super) struct Lines<R> {
    source: R,
    buf: Box<[u8]>,
    /// The unread bytes are `start..end`; those before `scanned` have no newline.
    start: usize,
    scanned: usize,
    end: usize,
    /// The line at `start` is too long and its beginning already gone.
    dropping: bool,
    eof: bool,
}

impl<R: Read> Lines<R> {
    pub(super) fn new(source: R) -> Self {
        let buf = vec![0; MAX_LINE + BLOCK].into_boxed_slice();
        Self { source, buf, start: 0, scanned: 0, end: 0, dropping: false, eof: false }
    }

    pub(super) fn source(&self) -> &R {
        &self.source
    }

    /// The bytes of a line that [`next`](Self::next) just returned.
    pub(super) fn text(&self, line: Range<usize>) -> &[u8] {
        &self.buf[line]
    }

    /// Reads until there are `want` bytes, or all there are; they stay unread. For the beginning of a file.
    pub(super) fn peek(&mut self, want: usize) -> io::Result<&[u8]> {
        while self.end - self.start < want && self.fill()? {}
        Ok(&self.buf[self.start..self.end])
    }

    /// The next line, or nothing at the end. A last line without a newline is a line.
    pub(super) fn next(&mut self) -> io::Result<Option<Step>> {
        loop {
            if let Some(len) = memchr(b'\n', &self.buf[self.scanned..self.end]) {
                let newline = self.scanned + len;
                return Ok(Some(self.take(newline, newline + 1)));
            }
            self.scanned = self.end;
            if self.end - self.start > MAX_LINE {
                self.dropping = true;
            }
            if self.dropping {
                self.start = self.end;
            }
            if !self.fill()? {
                let rest = self.dropping || self.start < self.end;
                return Ok(rest.then(|| self.take(self.end, self.end)));
            }
        }
    }

    fn take(&mut self, line_end: usize, next: usize) -> Step {
        let line = self.start..line_end;
        self.start = next;
        self.scanned = next;
        if std::mem::take(&mut self.dropping) || line.len() > MAX_LINE { Step::TooLong } else { Step::Line(line) }
    }

    /// One read behind what is unread; whether there was anything. Unread bytes move to the front, once a line at
    /// most, so that a source of tiny reads does not make this quadratic.
    fn fill(&mut self) -> io::Result<bool> {
        if self.eof {
            return Ok(false);
        }
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.scanned -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
        let stop = self.buf.len().min(self.end + BLOCK);
        let n = self.source.read(&mut self.buf[self.end..stop])?;
        self.end += n;
        self.eof = n == 0;
        Ok(n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives at most `step` bytes a read.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buf.len()).min(self.0.len());
            let (now, later) = self.0.split_at(n);
            buf[..n].copy_from_slice(now);
            self.0 = later;
            Ok(n)
        }
    }

    fn all(bytes: &[u8], step: usize) -> Vec<Option<Vec<u8>>> {
        let mut lines = Lines::new(Drip(bytes, step));
        let mut got = Vec::new();
        while let Some(step) = lines.next().unwrap() {
            got.push(match step {
                Step::Line(line) => Some(lines.text(line).to_vec()),
                Step::TooLong => None,
            });
        }
        assert_eq!(lines.next().unwrap(), None);
        got
    }

    #[test]
    fn a_line_of_the_limit_is_kept_and_one_byte_more_is_not() {
        for step in [1021, 65_536, usize::MAX] {
            for (len, kept) in [(MAX_LINE, true), (MAX_LINE + 1, false), (3 * MAX_LINE, false)] {
                let mut text = b"a\n".to_vec();
                text.extend(std::iter::repeat_n(b'x', len));
                assert_eq!(all(&text, step)[1].is_some(), kept, "{len} at the end");
                text.extend(b"\nb\n");
                let got = all(&text, step);
                assert_eq!((got.len(), got[1].is_some()), (3, kept), "{len} in the middle");
                assert_eq!(got[2].as_deref(), Some(&b"b"[..]));
            }
        }
    }

    #[test]
    fn sixty_megabytes_without_a_newline_are_one_line() {
        let mut lines = Lines::new(io::repeat(b'x').take(60_000_000).chain(&b"\nlast"[..]));
        assert_eq!(lines.next().unwrap(), Some(Step::TooLong));
        let Some(Step::Line(line)) = lines.next().unwrap() else { panic!("the line after it is lost") };
        assert_eq!(lines.text(line), b"last");
        assert_eq!(lines.buf.len(), MAX_LINE + BLOCK);
    }

    #[test]
    fn peeking_takes_nothing() {
        let mut lines = Lines::new(Drip(b"one\ntwo", 1));
        assert_eq!(lines.peek(5).unwrap(), b"one\nt");
        assert_eq!(lines.peek(99).unwrap(), b"one\ntwo");
        assert_eq!(lines.next().unwrap(), Some(Step::Line(0..3)));
        assert_eq!(Lines::new(io::empty()).peek(5).unwrap(), b"");
    }

    proptest! {
        #[test]
        fn cuts_as_split_does(text in "[ab\n]{0,200}", step in 1..9_usize) {
            let mut want: Vec<_> = text.split('\n').map(|line| Some(line.as_bytes().to_vec())).collect();
            if text.is_empty() || text.ends_with('\n') {
                want.pop();
            }
            prop_assert_eq!(all(text.as_bytes(), step), want);
        }
    }
}
