//! Fuzzing the pinner: requests, tables and batches that are anything, from a guest that goes on writing.
//!
//! [`request`] is the target, a plain function from bytes; `script` turns the bytes into steps, `space` is the memory they
//! play in, `world` plays them and looks after each whether the host's books are right. [`play`] is for a target above,
//! which has steps of its own besides.

mod script;
mod space;
mod world;

use std::sync::{LazyLock, Mutex, PoisonError};

use arbitrary::Unstructured;
use coiommu_dtt_fuzz::Scribbler;

use crate::script::Script;
use crate::space::Places;
use crate::world::World;

pub use crate::script::Step;

/// What is made once, for all inputs.
#[derive(Default)]
struct Bench {
    places: Places,
    scribbler: Scribbler,
}

static BENCH: LazyLock<Mutex<Bench>> = LazyLock::new(Mutex::default);

/// Plays what an input describes through a pinner of its own.
///
/// # Panics
///
/// If something is wrong with the host's books, or a request does not end.
pub fn request(input: &[u8]) {
    play(input, Step::read);
}

/// The same, with steps that `read` makes of the input.
///
/// # Panics
///
/// As [`request`].
pub fn play(input: &[u8], read: impl FnMut(&mut Unstructured<'_>) -> Step) {
    let bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Script::read(input, read);
    let mut world = World::new(&bench.places, &script);
    let writes = script.has_second_cpu.then(|| script.writes());
    let scribbling = writes.map(|writes| bench.scribbler.start(world.memory(), writes));
    for step in script.steps {
        world.play(step);
        world.check();
    }
    drop(scribbling);
    world.end();
}
