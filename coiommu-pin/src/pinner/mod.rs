//! [`Pinner`]: pins what a guest asks for, and takes back what is idle.
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod.rs` | what a pinner is made of; activate, deactivate, park |
//! | `pin.rs` | serving a request, step by step, a piece of its pages at a time |
//! | `share.rs` | pinning a piece: the pages in one block after those in the other |
//! | `unpin.rs` | taking extents of one block back; ticks; making room |
//! | `leaves.rs` | the leaves of a block |
//! | `forced.rs` | unpinning a range on demand, and holding it |
//! | `pin_all.rs` | pinning all RAM, for devices whose DMA nobody counts |
//! | `ram.rs` | RAM that comes and goes |
//! | `mapping.rs` | the calls of the mapper, and what to do when it disagrees with the pin map |
//!
//! Locks, in the order in which they are taken. Nobody waits for the guest, or for a park to end, with any of them held.
//!
//! 1. `changing_regions`: while RAM comes or goes, and while draining, so that these come one after the other.
//! 2. `stale`, then `activation` (read): while the table is used; written to activate and deactivate. A forced unpin with
//!    no table in use *tries* the first with this one held.
//! 3. `regions` (read): for one step of a request, so that whether a page may be mapped does not change under it, and
//!    while PINNED is cleared on what is lost; else for one look. Written with nothing but the first held: a pin that
//!    looked before is over by then, a pin that looks later sees the change. Then the blocks are cleared, each under its
//!    lock.
//! 4. `park` (read): while one block is unpinned. Blocks are only *tried* under it, so that whoever parks waits for one
//!    block's unmap at most.
//! 5. a block: while its mappings and PINNED bits change. One at a time.
//! 6. the holds, the mapper's own: looked at under a block's lock. Who adds a hold adds it first, and then locks the
//!    blocks.
//!
//! The two hands are held for one look or change each, and nothing is taken with them.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use coiommu_dtt::walk::DttError;
use coiommu_dtt::{Bdf, Dtt, Gpa, PAGE_SIZE};
use hdrhistogram::Histogram;

use crate::mapper::DmaMapper;
use crate::pin_map::{self, Books, Extent, Spot, Totals};
use crate::policy::Policy;
use crate::region_table::Regions;
use crate::space::{GuestMemoryNotShown, TableSpace};
use crate::stats::{Counters, Counts, Latency};
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{Mutex, RwLock};

mod forced;
mod leaves;
mod mapping;
mod pin;
mod pin_all;
mod ram;
mod share;
mod unpin;

pub use crate::clock::{Clock, SystemClock};
pub use forced::{ForcedUnpin, Hold, UnpinReport, UnpinStep};
pub use pin::{PinResult, Step};
pub use pin_all::{PinAll, PinAllError, Released};
pub use unpin::TickReport;

/// What a pinner is to do, and for whom.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PinnerConfig {
    /// How to pin and unpin.
    pub policy: Policy,
    /// The endpoints that may be pinned for.
    pub endpoints: Vec<Bdf>,
    /// How long a request may take before it is cut off; guests give up after 5 s.
    pub request_time: Duration,
    /// How long one step of a request may take before the worker looks at its other slots; one block's map calls are
    /// waited for.
    pub step_time: Duration,
    /// How long a request waits for RAM that went to come back, and for pages that are held.
    pub wait_time: Duration,
    /// How long a forced unpin waits for a park to end.
    pub park_time: Duration,
}

impl PinnerConfig {
    /// A policy and endpoints, with the times that guests are used to: 4 s, steps of 20 ms, 1 s, 1 s.
    #[must_use]
    pub fn new(policy: Policy, endpoints: Vec<Bdf>) -> Self {
        Self {
            policy,
            endpoints,
            request_time: Duration::from_secs(4),
            step_time: Duration::from_millis(20),
            wait_time: Duration::from_secs(1),
            park_time: Duration::from_secs(1),
        }
    }
}

/// Why a pinner cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinnerError {
    /// The IOMMU's smallest page is not 4 KiB.
    #[error("the IOMMU has no 4 KiB pages (page sizes {0:#x}), so single pages cannot be pinned")]
    PageSize(u64),
}

/// Some pages could not be taken out of the IOMMU; they are still in the pin map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages are still mapped for the devices: the IOMMU refused to unmap them")]
pub struct DrainError {
    /// How many.
    pub pages: u64,
}

/// Whether draining may still write the guest's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// The guest asked for it (DEACTIVATE): its table is still its table, and PINNED is cleared in it.
    Deactivate,
    /// Reset, or the guest is gone: the table may be anybody's memory, and is not written.
    Reset,
}

/// The table in use, and a number that tells one activation from the next.
#[derive(Debug, Default)]
struct Activation {
    dtt: Option<Dtt>,
    number: u64,
}

/// Pins guest memory for devices, page by page, as the guest asks for it.
///
/// A pinner is for one guest and one mapper. All methods take `&self` and may be called from many threads.
/// Life goes like this: [`add_region`](Self::add_region) for the RAM there is; [`activate`](Self::activate) when the
/// guest says where its table is; then [`begin`](Self::begin) and [`step`](Self::step) for each request and
/// [`tick`](Self::tick) every so often; [`deactivate`](Self::deactivate) at the end, with the endpoints' bus mastering
/// switched off before.
pub struct Pinner<S: TableSpace> {
    space: S,
    mapper: Arc<dyn DmaMapper>,
    config: PinnerConfig,
    regions: RwLock<Regions>,
    /// Written while regions come and go, one at a time, and while draining; before all other locks. Read, for a moment, by
    /// forced unpins, which must not see half of it and hold other locks: they only try.
    changing_regions: RwLock<()>,
    /// How many regions ever came and went. Release, once a change is over, and acquire: a forced unpin that begins with
    /// this number sees all that was mapped again until then.
    region_changes: AtomicU64,
    totals: Totals,
    activation: RwLock<Activation>,
    /// Nothing is unpinned. Relaxed, and looked at under the lock of a block before it loses anything; `pin_all.rs` says why
    /// that is enough.
    keeps_all: AtomicBool,
    /// Of each endpoint, in the order of the configuration: whether it has asked for a page since the activation. Written
    /// with that locked for reading, cleared with it locked for writing; relaxed, as it speaks of nothing else.
    asked: Box<[std::sync::atomic::AtomicBool]>,
    /// How many PARKs without their UNPARK.
    park: RwLock<u64>,
    holds: Arc<forced::Holds>,
    /// The gfn where the clock hand of the ticks is. Held for one read or write.
    hand: Mutex<u64>,
    /// Where room was made last. Held for one read or write.
    room_hand: Mutex<u64>,
    /// What is to be cleared once its table is back. Held with `activation` and a block inside; only while regions change.
    stale: Mutex<ram::Stale>,
    /// Full turns of the hand. A block remembers in which one it changed; off by one does not matter.
    round: AtomicU32,
    counts: Counts,
    latency: Latency,
}

impl<S: TableSpace> Pinner<S> {
    /// A pinner with nothing pinned and no RAM yet.
    ///
    /// # Errors
    ///
    /// [`PinnerError`] says what the mapper lacks.
    pub fn new(space: S, mapper: Arc<dyn DmaMapper>, mut config: PinnerConfig) -> Result<Self, PinnerError> {
        let page_sizes = mapper.limits().page_sizes;
        if page_sizes & PAGE_SIZE == 0 || page_sizes & (PAGE_SIZE - 1) != 0 {
            return Err(PinnerError::PageSize(page_sizes));
        }
        config.endpoints.sort_unstable();
        let asked = config.endpoints.iter().map(|_| false.into()).collect();
        Ok(Self {
            space,
            mapper,
            config,
            regions: RwLock::default(),
            changing_regions: RwLock::default(),
            region_changes: AtomicU64::new(0),
            totals: Totals::default(),
            activation: RwLock::default(),
            keeps_all: AtomicBool::new(false),
            asked,
            park: RwLock::default(),
            holds: Arc::default(),
            hand: Mutex::default(),
            room_hand: Mutex::default(),
            stale: Mutex::default(),
            round: AtomicU32::new(0),
            counts: Counts::default(),
            latency: Latency::new(),
        })
    }

    /// Starts serving the table at `root`. If another is in use, that is deactivated first. What is mapped goes, unless [all is
    /// kept](Self::keep_all) and no table was in use.
    ///
    /// # Errors
    ///
    /// [`DttError`]: there is no table; nothing is in use then. It is counted, and told of ever more rarely.
    pub fn activate(&self, root: Gpa, levels: u64) -> Result<(), DttError> {
        let _one_at_a_time = self.changing_regions.write();
        if self.keeps_all() && !self.is_active() {
            *self.park.write() = 0;
        } else {
            // What would not go stays in the pin map, which the new table is served from.
            let _counted_and_told = self.drain(Drain::Deactivate);
        }
        let dtt = Dtt::new(&*self.space.view(), root, levels).inspect_err(|error| {
            if let Some(all) = self.counts.activations_refused.add_and_tell(1) {
                log::warn!("not activated: {error} ({all} such so far)");
            }
        })?;
        let mut activation = self.activation.write();
        self.asked.iter().for_each(|asked| asked.store(false, Relaxed));
        activation.dtt = Some(dtt);
        activation.number += 1;
        Ok(())
    }

    /// Stops serving, takes everything out of the IOMMU and ends all parking. Requests that are being served end at
    /// their next step. The caller has switched off the endpoints' bus mastering.
    ///
    /// # Errors
    ///
    /// [`DrainError`] if the mapper refused to unmap something.
    pub fn deactivate(&self, drain: Drain) -> Result<(), DrainError> {
        let _one_at_a_time = self.changing_regions.write();
        self.drain(drain)
    }

    fn drain(&self, drain: Drain) -> Result<(), DrainError> {
        let dtt = self.activation.write().dtt.take();
        self.let_all_age();
        *self.park.write() = 0;
        let view = self.space.view();
        let table = dtt.filter(|_| drain == Drain::Deactivate).map(|dtt| (dtt, &*view));
        self.forget_absent(table);
        let mut pages = 0;
        self.each_block(|spot| pages += self.drain_block(spot.no, &mut spot.block.lock(), table));
        if pages > 0 {
            let error = DrainError { pages };
            if let Some(all) = self.counts.drain_failures.add_and_tell(1) {
                log::warn!("{error} ({all} such so far)");
            }
            return Err(error);
        }
        let gone = self.regions.write().let_all_go();
        drop(gone);
        Ok(())
    }

    /// Whether there is a table in use.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.activation.read().dtt.is_some()
    }

    /// Whether an endpoint has asked for a page of the table in use: its driver in the guest then says what it uses.
    #[must_use]
    pub fn has_asked(&self, endpoint: Bdf) -> bool {
        self.is_active() && self.asked_of(endpoint).is_some_and(|asked| asked.load(Relaxed))
    }

    fn asked_of(&self, endpoint: Bdf) -> Option<&std::sync::atomic::AtomicBool> {
        self.config.endpoints.binary_search(&endpoint).ok().and_then(|at| self.asked.get(at))
    }

    /// No unpinning until the matching [`unpark`](Self::unpark). When this returns, none is under way. Nests.
    pub fn park(&self) {
        let mut parked = self.park.write();
        *parked = parked.saturating_add(1);
    }

    /// Ends one [`park`](Self::park); without one, nothing.
    pub fn unpark(&self) {
        let mut parked = self.park.write();
        *parked = parked.saturating_sub(1);
    }

    /// How this pinner pins.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.config.policy
    }

    /// How long a step may take.
    pub(crate) const fn step_time(&self) -> Duration {
        self.config.step_time
    }

    /// Pages mapped for the devices now, but for those of a step of a request that is under way.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        self.totals.pages()
    }

    /// Mappings (extents) now, but for those of a step of a request that is under way.
    #[must_use]
    pub fn mappings(&self) -> u64 {
        self.totals.mappings()
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counts.read()
    }

    /// How long requests took, in microseconds.
    #[must_use]
    pub fn latency(&self) -> Histogram<u64> {
        self.latency.read()
    }

    /// The extents that are mapped, in ascending order. Each block is right; two blocks may be of different moments.
    #[must_use]
    pub fn extents(&self) -> Vec<Extent> {
        let mut extents = Vec::new();
        self.each_block(|spot| {
            let here = spot.block.lock().extents();
            extents.extend(here.map(|pages| Extent { first: spot.no.gfn(pages.start), pages: pages.len() as u64 }));
        });
        extents
    }

    /// Visits the blocks from a gfn on that were made, holding no lock but those the visitor takes.
    fn visit<B>(&self, from: u64, mut visit: impl FnMut(Spot<'_>) -> ControlFlow<B>) -> ControlFlow<B> {
        pin_map::visit(from, |gfn| self.next_books(gfn), |books, from| books.visit(from, &mut visit))
    }

    fn next_books(&self, from: u64) -> Option<Arc<Books>> {
        self.regions.read().next_books(from)
    }

    fn each_block(&self, mut visit: impl FnMut(Spot<'_>)) {
        let _: ControlFlow<()> = self.visit(0, |spot| {
            visit(spot);
            ControlFlow::Continue(())
        });
    }

    /// Bytes that the books of what is pinned take.
    #[must_use]
    pub fn overhead_bytes(&self) -> u64 {
        self.regions.read().banks().map(|bank| bank.books.overhead()).sum()
    }

    fn round(&self) -> u32 {
        self.round.load(Relaxed)
    }
}

/// Nothing stays mapped: the regions' memory is freed next.
impl<S: TableSpace> Drop for Pinner<S> {
    fn drop(&mut self) {
        if let Err(error) = self.deactivate(Drain::Reset) {
            log::error!("{error}; the guest's memory is never freed");
            self.regions.read().banks().for_each(|bank| bank.region.leak());
        }
    }
}

impl<S: TableSpace> fmt::Debug for Pinner<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinner")
            .field("space", &GuestMemoryNotShown)
            .field("mapper", &self.mapper)
            .field("config", &self.config)
            .field("pinned_pages", &self.pinned_pages())
            .field("mappings", &self.mappings())
            .finish_non_exhaustive()
    }
}
