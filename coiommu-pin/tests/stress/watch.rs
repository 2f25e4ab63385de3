//! What each thread is doing, and the end of a run in which one fails or is stuck.

use std::fmt::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::machine::Machine;

/// A thread that does nothing new for so long is stuck. Far more than any step takes, be the machine ever so loaded.
pub(crate) const STUCK: Duration = Duration::from_secs(60);

macro_rules! doing {
    ($($name:ident,)*) => {
        /// What a thread is at.
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum Doing { $($name,)* }

        impl Doing {
            const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

doing! {
    Starting,
    Resting,
    Counting,
    WaitingForAnswer,
    UsingPages,
    CountingDown,
    Pausing,
    WaitingForDoorbell,
    Serving,
    WaitingForRam,
    Ticking,
    Unpinning,
    WaitingForUnpark,
    Holding,
    Parking,
    Parked,
    Unparking,
    RemovingRam,
    RamAway,
    ReturningRam,
    WaitingForGuests,
    Resetting,
    Failed,
    Ended,
}

/// Where a thread says what it is doing. Relaxed atomics, which order nothing.
#[derive(Debug, Default)]
pub(crate) struct Post {
    doing: AtomicU8,
    steps: AtomicU64,
}

impl Post {
    pub(crate) fn is(&self, doing: Doing) {
        self.doing.store(doing as u8, Relaxed);
        self.steps.fetch_add(1, Relaxed);
    }

    fn doing(&self) -> Doing {
        Doing::ALL[usize::from(self.doing.load(Relaxed))]
    }
}

struct Member {
    name: String,
    post: Arc<Post>,
    thread: JoinHandle<()>,
}

/// Some threads.
pub(crate) struct Crew<'m> {
    machine: &'m Arc<Machine>,
    members: Vec<Member>,
}

impl<'m> Crew<'m> {
    pub(crate) fn new(machine: &'m Arc<Machine>) -> Self {
        Self { machine, members: Vec::new() }
    }

    pub(crate) fn spawn(&mut self, name: &str, work: impl FnOnce(&Machine, &Post) + Send + 'static) {
        let name = format!("{name} {}", self.members.len());
        let post = Arc::new(Post::default());
        let (machine, its_post) = (Arc::clone(self.machine), Arc::clone(&post));
        // Not scoped: when one fails, the others may never end, and the test ends without them.
        let work = move || {
            let result = panic::catch_unwind(AssertUnwindSafe(|| work(&machine, &its_post)));
            its_post.is(if result.is_ok() { Doing::Ended } else { Doing::Failed });
        };
        let thread = thread::Builder::new().name(name.clone()).spawn(work).unwrap();
        self.members.push(Member { name, post, thread });
    }

    pub(crate) fn all_ended(&self) -> bool {
        self.members.iter().all(|member| matches!(member.post.doing(), Doing::Ended))
    }

    pub(crate) fn join(self) {
        for member in self.members {
            member.thread.join().unwrap();
        }
    }
}

/// Waits until `done`, and fails the test if a thread fails or is stuck, or if it takes for ever.
pub(crate) fn until(crews: &[&Crew<'_>], for_ever: Duration, done: impl Fn() -> bool) {
    let members = || crews.iter().flat_map(|crew| &crew.members);
    let start = Instant::now();
    let mut seen: Vec<_> = members().map(|_| (u64::MAX, start)).collect();
    while !done() {
        assert!(start.elapsed() < for_ever, "this does not end; {}", report(crews));
        thread::sleep(Duration::from_millis(5));
        for (member, (steps, since)) in members().zip(&mut seen) {
            let now = member.post.steps.load(Relaxed);
            if *steps != now {
                (*steps, *since) = (now, Instant::now());
            }
            let ended = match member.post.doing() {
                Doing::Failed => panic!("{} failed after {:?}; {}", member.name, start.elapsed(), report(crews)),
                Doing::Ended => true,
                _ => false,
            };
            assert!(ended || since.elapsed() < STUCK, "{} is stuck; {}", member.name, report(crews));
        }
    }
}

/// What everybody is doing, and has done.
fn report(crews: &[&Crew<'_>]) -> String {
    let mut text = String::from("meanwhile:\n");
    for member in crews.iter().flat_map(|crew| &crew.members) {
        let _ =
            writeln!(text, "  {:11} {:?}, step {}", member.name, member.post.doing(), member.post.steps.load(Relaxed));
    }
    let machine = crews[0].machine;
    let _ = writeln!(text, "  slots {:x?}", machine.slots);
    let _ = writeln!(text, "  {}\n  never: {:?}", machine.tally, machine.tally.never());
    text
}
