//! The other CPU of a guest: a thread that writes into guest memory while the target works on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A word that is written, atomically, as a guest's CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Half a directory's entry, or a leaf.
    U32(u64, u32),
    /// A directory's entry.
    U64(u64, u64),
}

impl Write {
    /// Where it goes.
    #[must_use]
    pub const fn at(self) -> u64 {
        match self {
            Self::U32(at, _) | Self::U64(at, _) => at,
        }
    }

    /// Writes the word, if there is memory for it and it is aligned.
    pub fn to(self, memory: &GuestMemoryMmap) {
        // A guest that writes where nothing is does no harm.
        let _ = match self {
            Self::U32(at, word) => memory.store(word, GuestAddress(at), Relaxed),
            Self::U64(at, word) => memory.store(word, GuestAddress(at), Relaxed),
        };
    }
}

/// A thread for all inputs: to start one for each would take most of the time.
#[derive(Debug)]
pub struct Scribbler {
    jobs: Sender<Job>,
}

#[derive(Debug)]
struct Job {
    memory: Arc<GuestMemoryMmap>,
    writes: Vec<Write>,
    started: SyncSender<()>,
    stop: Arc<AtomicBool>,
    /// Hung up when the job is done.
    _done: SyncSender<()>,
}

/// While it lives, the scribbler writes.
#[derive(Debug)]
pub struct Scribbling {
    stop: Arc<AtomicBool>,
    done: Receiver<()>,
}

impl Default for Scribbler {
    fn default() -> Self {
        let (jobs, todo) = channel();
        thread::spawn(move || todo.into_iter().for_each(scribble));
        Self { jobs }
    }
}

impl Scribbler {
    /// Writes these words, over and over, from now until what is returned is dropped.
    ///
    /// # Panics
    ///
    /// If the thread has panicked.
    #[must_use]
    pub fn start(&self, memory: &Arc<GuestMemoryMmap>, writes: Vec<Write>) -> Scribbling {
        let (started, has_started) = sync_channel(1);
        let (_done, done) = sync_channel(0);
        let stop = Arc::new(AtomicBool::new(false));
        let job = Job { memory: Arc::clone(memory), writes, started, stop: Arc::clone(&stop), _done };
        self.jobs.send(job).expect("the thread lives");
        has_started.recv().expect("the thread lives");
        Scribbling { stop, done }
    }
}

#[allow(clippy::needless_pass_by_value, reason = "that it is dropped at the end is the message")]
fn scribble(job: Job) {
    let mut has_started = false;
    while !job.stop.load(Relaxed) {
        job.writes.iter().for_each(|write| write.to(&job.memory));
        if !has_started {
            has_started = job.started.send(()).is_ok();
        }
    }
}

impl Drop for Scribbling {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // The end of the job is the end of its channel.
        let _ = self.done.recv();
    }
}
