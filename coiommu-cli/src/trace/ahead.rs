//! Decoding ahead, in a thread of its own, so that it costs no time of the one that uses the text.

use std::io::{self, Cursor, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

/// Bytes that are decoded at once.
const BLOCK: usize = 128 << 10;
const PANICKED: &str = "the decoder panicked, which is a bug of coiommu: please report it";
/// Blocks that wait for the reader at most.
const BLOCKS: usize = 4;

/// Reads what a thread decodes. The thread ends when the input does, or when this is dropped, after its read at hand.
pub(super) struct Ahead {
    blocks: Receiver<io::Result<Vec<u8>>>,
    block: Cursor<Vec<u8>>,
    ended: bool,
}

impl Ahead {
    /// Begins to read.
    pub(super) fn new(input: impl Read + Send + 'static) -> io::Result<Self> {
        let (sender, blocks) = sync_channel(BLOCKS);
        thread::Builder::new().name("decode".to_owned()).spawn(move || decode(input, &sender))?;
        Ok(Self { blocks, block: Cursor::default(), ended: false })
    }
}

/// Sends block after block; an empty one is the end.
fn decode(mut input: impl Read, blocks: &SyncSender<io::Result<Vec<u8>>>) {
    loop {
        let mut block = vec![0; BLOCK];
        let read = input.read(&mut block).map(|len| {
            block.truncate(len);
            block
        });
        let is_last = !matches!(&read, Ok(block) if !block.is_empty());
        if blocks.send(read).is_err() || is_last {
            return;
        }
    }
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.block.read(buf)?;
            if len > 0 || self.ended || buf.is_empty() {
                return Ok(len);
            }
            // Without its end, the thread has panicked: that must not look like the end of the trace.
            let block = self.blocks.recv().unwrap_or_else(|_| Err(io::Error::other(PANICKED)));
            let block = block.inspect_err(|_| self.ended = true)?;
            self.ended = block.is_empty();
            self.block = Cursor::new(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn gives_all_bytes_then_the_end_or_the_error() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * BLOCK * BLOCKS).collect();
        let mut read = Vec::new();
        Ahead::new(Cursor::new(bytes.clone())).unwrap().read_to_end(&mut read).unwrap();
        assert!(read == bytes);

        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(ErrorKind::UnexpectedEof.into())
            }
        }
        let mut ahead = Ahead::new(Cursor::new(bytes.clone()).chain(Fails)).unwrap();
        let mut read = Vec::new();
        assert_eq!(ahead.read_to_end(&mut read).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(read == bytes, "what came before the error is read");
    }

    #[test]
    fn a_decoder_that_panics_is_an_error() {
        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("this panic is part of a test");
            }
        }
        let mut ahead = Ahead::new(Panics).unwrap();
        assert_eq!(ahead.read(&mut [0]).unwrap_err().to_string(), PANICKED);
    }
}
