//! A vCPU and its device: counts pages, asks for those that are not pinned, does DMA to all it was granted, counts them
//! down.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::thread;

use coiommu_dtt::guest::write_batch;
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Gfn, RequestWord};
use coiommu_vfio::DmaFault;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use crate::machine::{GFNS, MOVING, Machine, PAGE, PRIVATE, STAYING, VCPUS, WORKERS, gfn, iova, stays};
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

/// One access: a piece of a page that is this vCPU's alone.
const ACCESS: usize = 16;

pub(crate) fn run(machine: &Machine, post: &Post, vcpu: usize) {
    let mut random = Random::new(machine.seed, vcpu as u64);
    while !machine.is_over() {
        machine.pause.enter(vcpu, post);
        let mut round = Round::begin(machine, post, vcpu, &mut random);
        if round.random.once_in(20) {
            round.lie();
        } else {
            round.map_and_use();
        }
        machine.pause.leave(vcpu);
        post.is(Doing::Resting);
        if random.once_in(3) {
            random.sleep(300);
        }
    }
}

/// From counting some pages until they are all counted down.
struct Round<'m> {
    machine: &'m Machine,
    post: &'m Post,
    vcpu: usize,
    random: &'m mut Random,
    /// How often RAM had moved, how many pages had been lost by that, and how many others had come, at the beginning.
    moves: u64,
    lost: u64,
    others: u64,
    ram: Arc<GuestRegionMmap>,
    /// Whether the RAM that moves was there all the time until every page was looked at. If so, what was granted of it holds
    /// whenever the RAM is there, unless the pinner says that pages were lost.
    settled: bool,
}

impl<'m> Round<'m> {
    fn begin(machine: &'m Machine, post: &'m Post, vcpu: usize, random: &'m mut Random) -> Self {
        let moves = machine.moving.moves.load(Acquire);
        let (ram, others) = machine.moving.now();
        let lost = machine.pinner.counters().pages_lost;
        Self { machine, post, vcpu, random, moves, lost, others, ram, settled: false }
    }

    fn map_and_use(&mut self) {
        let pages = self.choose();
        let granted = self.map(&pages);
        self.post.is(Doing::UsingPages);
        let mut once = granted.clone();
        once.sort_unstable();
        once.dedup();
        for _ in 0..self.random.within(1..4) {
            for &page in &once {
                self.use_page(page);
            }
            if self.random.once_in(8) {
                self.random.sleep(400);
            }
            self.post.is(Doing::UsingPages);
        }
        self.unmap(&granted);
    }

    /// Pages to map: mostly few and of those that others use too.
    fn choose(&mut self) -> Vec<u64> {
        let random = &mut *self.random;
        let ram = match random.within(0..8) {
            0 => 0..GFNS,
            1 | 2 => MOVING,
            3 => STAYING[2].clone(),
            4 => 250..350,
            _ => STAYING[usize::try_from(random.within(0..2)).unwrap()].clone(),
        };
        let hot = if random.once_in(2) { ram.start..ram.end.min(ram.start + 100) } else { ram };
        let run = |first: u64, pages: u64| (first..(first + pages).min(GFNS)).collect();
        let mut pages: Vec<u64> = match random.within(0..100) {
            0..30 => vec![random.within(hot)],
            30..65 => run(random.within(hot), random.within(1..60)),
            65..96 => (0..random.within(2..40)).map(|_| random.within(hot.clone())).collect(),
            96..99 => run(random.within(hot), random.within(200..700)),
            // More than a piece, most pages several times.
            _ => (0..5000).map(|_| random.within(hot.clone())).collect(),
        };
        pages.retain(|page| !PRIVATE.contains(page));
        pages
    }

    /// Counts pages and asks for those that are not pinned; those that are, each as often as it is counted.
    fn map(&mut self, pages: &[u64]) -> Vec<u64> {
        self.post.is(Doing::Counting);
        let machine = self.machine;
        let (dtt, arena) = machine.tables.now();
        let needs_pin = |&&page: &&u64| dtt.map(&*machine.memory, arena, gfn(page)).unwrap() == Mapped::NeedsPin;
        let missing: Vec<_> = pages.iter().filter(needs_pin).copied().collect();
        let served = missing.is_empty() || self.ask(&missing);
        self.post.is(Doing::Counting);
        let is_pinned = |page: &u64| dtt.is_pinned(&*machine.memory, gfn(*page)).unwrap();
        let (granted, denied): (Vec<_>, Vec<_>) = pages.iter().partition(|page| is_pinned(page));
        let bad = granted.iter().find(|&&page| !stays(page) && !MOVING.contains(&page));
        assert_eq!(bad, None, "granted, where there is no RAM");
        self.settled = self.moves.is_multiple_of(2) && machine.moving.moves.load(Acquire) == self.moves;
        for &page in &denied {
            assert!(!(served && stays(page)), "the request was served, but page {page:#x} is not PINNED");
            dtt.unmap(&*machine.memory, gfn(page)).unwrap();
        }
        machine.tally.add(Did::Grant, granted.len() as u64);
        machine.tally.add(Did::Denial, denied.len() as u64);
        granted
    }

    /// Sends a request and waits for its answer; whether all of it was served.
    fn ask(&self, pages: &[u64]) -> bool {
        let (machine, vcpu) = (self.machine, self.vcpu);
        let word = match *pages {
            [page] => RequestWord::page(gfn(page), machine.bdf).unwrap(),
            _ => {
                let gfns: Vec<Gfn> = pages.iter().map(|&page| gfn(page)).collect();
                write_batch(&*machine.memory, Machine::batch_place(vcpu), machine.bdf, &gfns).unwrap()
            }
        };
        self.post.is(Doing::WaitingForAnswer);
        machine.slots().post(vcpu, word).unwrap();
        machine.bells[vcpu % WORKERS].send(vcpu).unwrap();
        while !machine.slots().is_answered(vcpu).unwrap() {
            thread::yield_now();
        }
        machine.served[vcpu].load(Relaxed) == 1
    }

    /// A guest may write into its table what it likes: that must not keep the host from mapping what it asks for.
    fn lie(&mut self) {
        let machine = self.machine;
        let page = PRIVATE.start + self.vcpu as u64;
        let (dtt, arena) = machine.tables.now();
        if dtt.map(&*machine.memory, arena, gfn(page)).unwrap() == Mapped::NeedsPin {
            let leaf = dtt.leaf_table(&*machine.memory, arena, gfn(page)).unwrap().leaf(gfn(page));
            leaf.set_pinned();
            let served = self.ask(&[page]);
            let mapped = machine.iommu.is_mapped(iova(page), PAGE);
            assert!(mapped || !served, "PINNED, set by the guest, passed for a mapping");
            if mapped {
                machine.tally.add(Did::Lie, 1);
                self.use_page(page);
            } else {
                leaf.clear_pinned();
            }
        } else {
            self.use_page(page);
        }
        self.unmap(&[page]);
    }

    fn unmap(&self, pages: &[u64]) {
        self.post.is(Doing::CountingDown);
        let (dtt, _) = self.machine.tables.now();
        for &page in pages {
            dtt.unmap(&*self.machine.memory, gfn(page)).unwrap();
        }
    }

    /// The CPU writes and the device reads, the device writes and the CPU reads.
    fn use_page(&mut self, page: u64) {
        let machine = self.machine;
        let per_vcpu = PAGE / VCPUS as u64;
        let place = iova(page) + per_vcpu * self.vcpu as u64 + self.random.within(0..per_vcpu - ACCESS as u64);
        let [for_device, for_cpu] = [(); 2].map(|()| self.pattern(page));
        let mut seen = [0; ACCESS];
        self.cpu_write(page, place, &for_device);
        if !self.dma(page, || machine.iommu.read(place, &mut seen)) {
            return;
        }
        self.check(page, "device", &seen, &for_device);
        if !self.dma(page, || machine.iommu.write(place, &for_cpu)) {
            return;
        }
        self.cpu_read(page, place, &mut seen);
        self.check(page, "CPU", &seen, &for_cpu);
    }

    /// Bytes that nobody else writes.
    fn pattern(&mut self, page: u64) -> [u8; ACCESS] {
        let mut bytes = [0; ACCESS];
        bytes[..8].copy_from_slice(&(page << 8 | self.vcpu as u64).to_le_bytes());
        bytes[8..].copy_from_slice(&self.random.next().to_le_bytes());
        bytes
    }

    fn cpu_write(&self, page: u64, place: u64, bytes: &[u8]) {
        if MOVING.contains(&page) {
            self.ram.write_slice(bytes, MemoryRegionAddress(place - iova(MOVING.start))).unwrap();
        } else {
            self.machine.memory.write_slice(bytes, GuestAddress(place)).unwrap();
        }
    }

    fn cpu_read(&self, page: u64, place: u64, bytes: &mut [u8]) {
        if MOVING.contains(&page) {
            self.ram.read_slice(bytes, MemoryRegionAddress(place - iova(MOVING.start))).unwrap();
        } else {
            self.machine.memory.read_slice(bytes, GuestAddress(place)).unwrap();
        }
    }

    /// An access that must not fault: the page is granted. Its RAM may have gone, though, which no count prevents; that is
    /// an excuse while it is away, and for good if the pinner says that pages did not come back.
    fn dma(&self, page: u64, access: impl FnOnce() -> Result<(), DmaFault>) -> bool {
        let (machine, moving) = (self.machine, &self.machine.moving);
        let before = moving.moves.load(Acquire);
        let Err(fault) = access() else {
            let did = if MOVING.contains(&page) { Did::DmaInMoving } else { Did::Dma };
            machine.tally.add(did, 1);
            return true;
        };
        let there = before.is_multiple_of(2) && moving.moves.load(Acquire) == before;
        let holds = self.settled && machine.pinner.counters().pages_lost == self.lost;
        assert!(MOVING.contains(&page) && !(there && holds), "vcpu {}, granted page {page:#x}: {fault}", self.vcpu);
        machine.tally.add(Did::ExcusedFault, 1);
        false
    }

    fn check(&self, page: u64, who: &str, seen: &[u8], written: &[u8]) {
        let other_memory = MOVING.contains(&page) && self.machine.moving.others.load(Acquire) != self.others;
        assert!(seen == written || other_memory, "page {page:#x}: the {who} sees {seen:x?}, not {written:x?}");
    }
}
