//! The notify slots: what a request and its answer carry along. Explored in full.

use std::sync::Arc;

use coiommu_dtt::notify::{Answered, NotifySlots, RequestWord};
use loom::thread;

use crate::check::check;
use crate::slot::Word;
use crate::watched::Watched;

/// One slot, the batch that it points to, and what the host does for it.
#[derive(Debug)]
struct Slot {
    word: [Word; 1],
    batch: Watched,
    work: Watched,
}

impl Slot {
    fn new() -> Arc<Self> {
        Arc::new(Self { word: [Word::default()], batch: Watched::default(), work: Watched::default() })
    }

    fn slots(&self) -> NotifySlots<'_, Word> {
        NotifySlots::new(&self.word)
    }
}

fn request(n: u64) -> RequestWord {
    RequestWord::from_raw(n << 16 | 1).unwrap()
}

/// The batch is written before the request is seen; the work is done before the answer is; and when the answer is seen the
/// host is done with the batch, so the guest may write the next one there.
#[test]
fn a_request_carries_its_batch_and_an_answer_its_pins() {
    check(None, || {
        let slot = Slot::new();
        let host = thread::spawn({
            let slot = Arc::clone(&slot);
            move || {
                for _ in 0..2 {
                    let taken = loop {
                        match slot.slots().take(0).unwrap() {
                            Some(request) => break request,
                            None => thread::yield_now(),
                        }
                    };
                    slot.batch.used();
                    slot.work.taken();
                    assert_eq!(slot.slots().answer(0, taken), Ok(Answered::Yes));
                }
            }
        });
        for n in 1..=2 {
            slot.batch.taken();
            slot.slots().post(0, request(n)).unwrap();
            while !slot.slots().is_answered(0).unwrap() {
                thread::yield_now();
            }
            slot.work.used();
        }
        host.join().unwrap();
    });
}
