//! A pinner, its guest and its IOMMU, and what must hold whatever they do.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use coiommu_dtt::{Bdf, Gpa, PAGE_SIZE, RequestWord};
use coiommu_dtt_fuzz::Write;
use coiommu_pin::pinner::{Drain, ForcedUnpin, Hold, PinResult, UnpinStep};
use coiommu_pin::request::Scratch;
use coiommu_pin::worker::{Polled, ReclaimWorker, Service, SlotServer, Unpinned};
use coiommu_pin::{Clock, DmaMapper, MapError, NotifyMap, PinRequest, Pinner, PinnerConfig, RamRegion, pinner};
use coiommu_vfio::SoftIommu;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::script::{BDF, Script, Step, post};
use crate::space::{Places, RAM, Slots, Space, VCPUS, place};

/// The root of the table that is there from the start, then its directories, then two leaf tables.
const ROOT: u64 = 0x1000;
pub(crate) const LEAVES: u64 = 0x4000;

/// A request of 600 gfns or less ends within so many steps, however it is cut, and whatever waits.
const MOST_STEPS: u32 = 20_000;
const MOST_OPEN: usize = 4;
/// Three blocks have RAM: what the books may take has nothing to do with what the guest asks for.
const MOST_OVERHEAD: u64 = 64 << 10;

/// Time: stands still, or passes at each look.
struct TestClock {
    now: Cell<Duration>,
    haste: Duration,
}

impl TestClock {
    fn pass(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        self.pass(self.haste);
        self.now.get()
    }
}

pub(crate) struct World<'p> {
    places: &'p Places,
    /// All memory that is there at first: what the guest writes to.
    memory: Arc<GuestMemoryMmap>,
    space: Space,
    iommu: Arc<SoftIommu>,
    service: Arc<Service<Space, Slots>>,
    server: SlotServer<Space, Slots>,
    reclaim: ReclaimWorker<Space, Slots>,
    /// How often the reclaim worker was asked, and its replies.
    asked: u64,
    replied: u64,
    replies: (Sender<Unpinned>, Receiver<Unpinned>),
    /// Whether anything is ever put into a slot.
    has_posts: bool,
    scratch: Scratch,
    clock: TestClock,
    /// Which memory is at each place: the first, the other, or none.
    there: [Option<bool>; RAM.len()],
    requests: VecDeque<PinRequest>,
    begun: u64,
    unpins: VecDeque<ForcedUnpin>,
    holds: VecDeque<Hold>,
}

impl<'p> World<'p> {
    pub(crate) fn new(places: &'p Places, script: &Script) -> Self {
        places.wipe();
        let there = [Some(false); RAM.len()];
        let memory = Arc::new(places.all());
        if script.has_table {
            write_table(&memory);
        }
        let iommu = Arc::new(SoftIommu::new());
        let space = Space::new(Arc::new(places.show(&there)));
        let endpoint = Bdf::new(BDF).expect("not 0");
        let config = PinnerConfig::new(script.policy.parse().expect("a policy"), vec![endpoint]);
        let pinner = Pinner::new(space.clone(), Arc::clone(&iommu) as Arc<dyn DmaMapper>, config).expect("4 KiB pages");
        for n in 0..RAM.len() {
            let region = RamRegion::from_vm_memory(Arc::clone(places.region(n, false))).expect("pages");
            pinner.add_region(region).expect("nothing is there");
        }
        if script.has_table {
            pinner.activate(Gpa::new(ROOT), 4).expect("a table");
        }
        let service = Arc::new(Service::new(pinner, Slots(Arc::clone(&memory))).expect("an eventfd"));
        let server = SlotServer::new(Arc::clone(&service), 0..VCPUS).expect("so many slots");
        let reclaim = ReclaimWorker::new(Arc::clone(&service)).expect("a few file descriptors");
        Self {
            places,
            memory,
            space,
            iommu,
            service,
            server,
            reclaim,
            asked: 0,
            replied: 0,
            replies: channel(),
            has_posts: script.has_posts(),
            scratch: Scratch::default(),
            clock: TestClock { now: Cell::default(), haste: script.haste },
            there,
            requests: VecDeque::new(),
            begun: 0,
            unpins: VecDeque::new(),
            holds: VecDeque::new(),
        }
    }

    fn pinner(&self) -> &Pinner<Space> {
        self.service.pinner()
    }

    pub(crate) const fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    pub(crate) fn play(&mut self, step: Step) {
        match step {
            Step::Write(write) => write.to(&self.memory),
            Step::Batch { at, bdf, claims, first, gfns } => write_batch(&self.memory, at, bdf, claims, first, gfns),
            Step::Request(word) => {
                if let Some(request) = self.begin(word) {
                    self.serve_to_end(request);
                }
            }
            Step::Begin(word) if self.requests.len() < MOST_OPEN => {
                let request = self.begin(word);
                self.requests.extend(request);
            }
            Step::Begin(_) => {}
            Step::Serve(which) => self.serve(which),
            Step::Post { vcpu, word } => post(vcpu, word).to(&self.memory),
            Step::Poll => _ = self.server.poll_once(&self.clock),
            Step::Ask { gpa, bytes } => self.ask(gpa, bytes),
            Step::Reclaim => _ = self.reclaim(),
            Step::Tick(budget) => {
                let before = self.pinner().pinned_pages();
                let report = self.pinner().tick(budget);
                assert_eq!(before - self.pinner().pinned_pages(), report.unpinned_pages);
            }
            Step::Park => self.pinner().park(),
            Step::Unpark => self.pinner().unpark(),
            Step::Force { gpa, bytes } if self.unpins.len() < MOST_OPEN => {
                self.unpins.push_back(self.pinner().begin_unpin(Gpa::new(gpa), bytes, &self.clock));
            }
            Step::Force { .. } => {}
            Step::GoOn => self.step_unpin(),
            Step::LetGo => drop((self.holds.pop_front(), self.unpins.pop_back())),
            Step::Remove(n) => self.remove(n),
            Step::Add { place, other } => self.add(place, other),
            Step::Activate { root, levels } => drop(self.pinner().activate(Gpa::new(root), levels)),
            Step::Deactivate(drain) => {
                let left = self.pinner().deactivate(drain).map_or_else(|error| error.pages, |()| 0);
                assert_eq!(left, self.pinner().pinned_pages());
            }
            Step::Calls { fail, error, meanwhile } => self.disturb(fail, error, meanwhile),
            Step::Room { mappings, pages } => {
                self.iommu.set_entry_limit((mappings != 0).then_some(mappings.into()));
                self.iommu.set_pinned_limit((pages != 0).then_some(u64::from(pages) * PAGE_SIZE));
            }
            Step::Pass(time) => self.clock.pass(time),
        }
    }

    fn begin(&mut self, word: u64) -> Option<PinRequest> {
        let word = RequestWord::from_raw(word)?;
        self.begun += 1;
        self.pinner().begin(word, self.clock.now.get()).ok()
    }

    fn serve(&mut self, which: u8) {
        let Some(mut request) = self.requests.remove(usize::from(which) % MOST_OPEN) else { return };
        if !matches!(self.service.pinner().step(&mut request, &mut self.scratch, &self.clock), pinner::Step::Done(_)) {
            self.requests.push_back(request);
        }
    }

    fn serve_to_end(&mut self, mut request: PinRequest) -> PinResult {
        for _ in 0..MOST_STEPS {
            match self.service.pinner().step(&mut request, &mut self.scratch, &self.clock) {
                pinner::Step::Done(result) => return result,
                pinner::Step::More => {}
                pinner::Step::Wait => self.clock.pass(Duration::from_millis(100)),
            }
        }
        panic!("{request:?} is never answered");
    }

    /// Serves the slots until there is nothing left in them.
    fn poll_to_end(&mut self) {
        for _ in 0..MOST_STEPS {
            match self.server.poll_once(&self.clock) {
                Polled::Idle => {
                    let is_answered = |vcpu| self.service.notify().slots().is_answered(vcpu).expect("a slot");
                    assert!((0..VCPUS).all(is_answered));
                    return;
                }
                Polled::Wait => self.clock.pass(Duration::from_millis(100)),
                Polled::More => {}
                Polled::Closed => panic!("nobody closed the service"),
            }
        }
        panic!("a slot is never answered: {:?}", self.server);
    }

    fn ask(&mut self, gpa: u64, bytes: u64) {
        self.asked += 1;
        let replies = self.replies.0.clone();
        // Nobody listens any more at the end of a target that failed.
        self.reclaim.reclaimer().unpin(Gpa::new(gpa), bytes, move |unpinned| _ = replies.send(unpinned));
    }

    fn reclaim(&mut self) -> Polled {
        let polled = self.reclaim.poll_once();
        for unpinned in self.replies.1.try_iter() {
            self.replied += 1;
            // Too many ask, sometimes.
            if let Ok((report, hold)) = unpinned {
                assert_eq!(hold.is_some(), report.may_be_taken());
                self.holds.extend(hold);
            }
        }
        polled
    }

    /// Whoever asked the reclaim worker has a reply. The guest has not parked any more.
    fn reclaim_to_end(&mut self) {
        for _ in 0..MOST_STEPS {
            match self.reclaim() {
                Polled::Idle => return assert_eq!(self.replied, self.asked),
                // Its clock is the system's.
                Polled::Wait => thread::sleep(Duration::from_millis(1)),
                Polled::More => {}
                Polled::Closed => panic!("nobody closed the service"),
            }
        }
        panic!("{:?} does not end", self.reclaim);
    }

    fn step_unpin(&mut self) {
        let Some(unpin) = self.unpins.pop_front() else { return };
        match self.pinner().step_unpin(unpin, &self.clock) {
            UnpinStep::More(unpin) => self.unpins.push_front(unpin),
            UnpinStep::Wait(unpin) => {
                self.clock.pass(Duration::from_millis(100));
                self.unpins.push_front(unpin);
            }
            UnpinStep::Done(report, hold) => {
                assert_eq!(hold.is_some(), report.may_be_taken());
                self.holds.extend(hold);
            }
        }
    }

    fn remove(&mut self, n: usize) {
        let (gpa, bytes) = place(n);
        let removed = self.pinner().remove_region(gpa, bytes);
        if self.there[n].take().is_none() {
            removed.expect_err("nothing was there");
        }
        self.space.set(self.places.show(&self.there));
    }

    fn add(&mut self, n: usize, other: bool) {
        let was = self.there[n];
        if was.is_none() {
            self.there[n] = Some(other);
            self.space.set(self.places.show(&self.there));
        }
        let region = RamRegion::from_vm_memory(Arc::clone(self.places.region(n, other))).expect("pages");
        let added = self.pinner().add_region(region);
        if was.is_some() {
            added.expect_err("something was there");
        } else if added.is_err() {
            // What went from here is still mapped.
            assert!(self.pinner().counters().unmap_failures > 0, "{added:?}");
            self.there[n] = None;
            self.space.set(self.places.show(&self.there));
        }
    }

    /// The next eight calls of the mapper fail as the bits say, and in each the guest writes once.
    fn disturb(&self, fail: u8, error: MapError, meanwhile: Write) {
        let (memory, mut calls) = (Arc::clone(&self.memory), 0..8);
        self.iommu.inject(move |_| {
            let call = calls.next()?;
            meanwhile.to(&memory);
            (fail >> call & 1 == 1).then_some(error)
        });
    }

    /// What holds at any time.
    pub(crate) fn check(&self) {
        let extents: Vec<_> = (self.pinner().extents().iter())
            .map(|extent| (extent.first.raw() * PAGE_SIZE, extent.pages * PAGE_SIZE))
            .collect();
        assert_eq!(extents, self.iommu.snapshot(), "the IOMMU's mappings are exactly the pin map's");
        assert_eq!(self.pinner().mappings(), extents.len() as u64);
        let bytes: u64 = extents.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(self.pinner().pinned_pages() * PAGE_SIZE, bytes);
        let counters = self.pinner().counters();
        assert_eq!(counters.pages_pinned - counters.pages_unpinned, self.pinner().pinned_pages());
        assert_eq!(counters.anomalies, 0, "nobody maps behind the pinner's back");
        assert!(self.pinner().policy().quota.is_none_or(|quota| bytes <= quota));
        for (iova, bytes) in extents {
            let is_ram = |n| {
                let (start, len) = place(n);
                self.there[n].is_some() && start.raw() <= iova && iova + bytes <= start.raw() + len
            };
            let stuck = counters.unmap_failures > 0;
            assert!(stuck || (0..RAM.len()).any(is_ram), "{bytes:#x} bytes at {iova:#x} are mapped, but no RAM");
        }
        for hold in &self.holds {
            assert_eq!(self.iommu.mapped_bytes_in(hold.gpa().raw(), hold.bytes()), 0, "{hold:?} is mapped");
        }
        let ended = counters.requests_pinned
            + counters.requests_failed
            + counters.requests_refused
            + counters.requests_timed_out;
        assert!(self.has_posts || ended + self.requests.len() as u64 == self.begun, "each request is counted once");
        assert_eq!(self.service.failure(), None);
        assert!(self.pinner().overhead_bytes() <= MOST_OVERHEAD);
    }

    /// What holds at the end: every request is answered, and nothing stays mapped.
    pub(crate) fn end(mut self) {
        while let Some(request) = self.requests.pop_front() {
            self.serve_to_end(request);
            self.check();
        }
        self.poll_to_end();
        self.iommu.inject_nothing();
        self.pinner().deactivate(Drain::Reset).expect("nothing fails any more");
        self.reclaim_to_end();
        assert_eq!(self.iommu.mappings(), 0);
        self.check();
    }
}

/// Four levels, with leaves for the gfns below 2048.
fn write_table(memory: &GuestMemoryMmap) {
    let entries = [(ROOT, 0x2000), (0x2000, 0x3000), (0x3000, LEAVES), (0x3008, LEAVES + PAGE_SIZE)];
    for (at, table) in entries {
        Write::U64(at, table | 1).to(memory);
    }
}

/// Header and list, as far as there is memory for them.
fn write_batch(memory: &GuestMemoryMmap, at: u64, bdf: u16, claims: u64, first: u64, gfns: u16) {
    let header = [u64::from(bdf), claims];
    let list = (first..).take(gfns.into());
    let bytes: Vec<u8> = header.into_iter().chain(list).flat_map(u64::to_le_bytes).collect();
    // As much as fits.
    let _ = memory.write(&bytes, GuestAddress(at));
}
