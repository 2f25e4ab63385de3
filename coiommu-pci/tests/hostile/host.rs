//! A device, and what a guest can do to it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::guest::{GuestDtt, TablePages};
use coiommu_dtt::{Gfn, Gpa, Levels, PAGE_SIZE, RequestWord};
use coiommu_pci::Bar;
use coiommu_pin::RamRegion;
use coiommu_pin::pinner::{Hold, UnpinReport};
use fastrand::Rng;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

use crate::vmm::{Memory, Vmm};

pub(crate) const VCPUS: usize = 4;
const RAM: u64 = 64 << 20;
/// RAM that comes and goes, behind the other, in gfns.
pub(crate) const MOVING: Range<u64> = 0x4000..0x4400;
/// Where honest tables are.
const TABLES: u64 = 1 << 20;
const TABLE_PAGES: u64 = 32;

pub(crate) struct Host {
    pub(crate) vmm: Arc<Vmm>,
    memory: Memory,
    ram: Arc<GuestRegionMmap>,
    moving: Arc<GuestRegionMmap>,
    is_there: Mutex<bool>,
    bar2: Arc<GuestMemoryMmap>,
    dtt: GuestDtt,
    pages: Pages,
    /// Memory and log lines are counted for the whole process.
    _one_test_at_a_time: MutexGuard<'static, ()>,
}

static TESTS: Mutex<()> = Mutex::new(());

struct Pages(AtomicU64);

impl TablePages for Pages {
    fn alloc(&self) -> Option<Gpa> {
        let page = self.0.fetch_add(PAGE_SIZE, Relaxed);
        (page < TABLES + TABLE_PAGES * PAGE_SIZE).then(|| Gpa::new(page))
    }

    fn free(&self, _page: Gpa) {}
}

fn region(at: u64, bytes: u64) -> Arc<GuestRegionMmap> {
    Arc::new(GuestRegionMmap::from_range(GuestAddress(at), usize::try_from(bytes).unwrap(), None).unwrap())
}

impl Host {
    pub(crate) fn new() -> Self {
        let _one_test_at_a_time = TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        count_logs();
        let ram = region(0, RAM);
        let (start, bytes) = (MOVING.start * PAGE_SIZE, (MOVING.end - MOVING.start) * PAGE_SIZE);
        // With a file, so that what was pinned there is pinned again when it returns.
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let (place, bytes) = (Some(FileOffset::new(file, 0)), usize::try_from(bytes).unwrap());
        let moving = Arc::new(GuestRegionMmap::from_range(GuestAddress(start), bytes, place).unwrap());
        let memory = Memory::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram)]).unwrap());
        let bar2 = Arc::new(GuestMemoryMmap::from_arc_regions(vec![region(0, Bar::SIZE)]).unwrap());
        let vmm = Arc::new(Vmm::new(&ram, &memory, &bar2, "00:05.0".parse().unwrap(), VCPUS).unwrap());
        let pages = Pages(AtomicU64::new(TABLES));
        let dtt = GuestDtt::new(&*memory.memory(), &pages, Levels::new(4).unwrap(), 4).unwrap();
        Self { vmm, memory, ram, moving, is_there: Mutex::new(false), bar2, dtt, pages, _one_test_at_a_time }
    }

    pub(crate) fn command(&self, command: u64) {
        self.vmm.write_bar0(0x08, &command.to_le_bytes());
    }

    pub(crate) fn activate(&self, root: u64, levels: u64) {
        self.vmm.write_bar0(0x00, &root.to_le_bytes());
        self.vmm.write_bar0(0x10, &levels.to_le_bytes());
        self.command(1);
    }

    pub(crate) fn activate_honestly(&self) {
        self.activate(self.dtt.dtt().root().raw(), 4);
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a word into a slot, rings, and waits for the answer.
    pub(crate) fn ask(&self, vcpu: usize, word: u64) {
        self.post(vcpu, word);
        let start = Instant::now();
        while self.slot(vcpu) != 0 {
            assert!(start.elapsed() < crate::ANSWER, "{word:#x} is not answered");
            thread::yield_now();
        }
    }

    fn post(&self, vcpu: usize, word: u64) {
        self.bar2.store(word, GuestAddress(8 * vcpu as u64), std::sync::atomic::Ordering::Release).unwrap();
        self.vmm.write_bar0(0x18 + vcpu as u64, &[1]);
    }

    fn slot(&self, vcpu: usize) -> u64 {
        self.bar2.load(GuestAddress(8 * vcpu as u64), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// An honest map of a page; whether it is pinned. The count stays.
    pub(crate) fn map(&self, vcpu: usize, page: u64) -> bool {
        let gfn = Gfn::new(page).unwrap();
        let _asked_anyway = self.dtt.map(&*self.memory.memory(), &self.pages, gfn).unwrap();
        self.ask(vcpu, RequestWord::page(gfn, "00:05.0".parse().unwrap()).unwrap().raw());
        self.dtt.is_pinned(&*self.memory.memory(), gfn).unwrap()
    }

    pub(crate) fn unmap(&self, page: u64) {
        self.dtt.unmap(&*self.memory.memory(), Gfn::new(page).unwrap()).unwrap();
    }

    /// Writes over a page's leaf.
    pub(crate) fn set_leaf(&self, page: u64, word: u32) {
        let (memory, gfn) = (self.memory.memory(), Gfn::new(page).unwrap());
        let leaves = self.dtt.leaf_table(&*memory, &self.pages, gfn).unwrap();
        let leaf = &leaves.words()[gfn.leaf_index()];
        leaf.fetch_and(0, Relaxed);
        leaf.fetch_or(word, Relaxed);
    }

    pub(crate) fn unpin(&self, page: u64, pages: u64) -> (UnpinReport, Option<Hold>) {
        let start = Instant::now();
        let reclaimer = self.vmm.team.reclaimer();
        let (report, hold) = reclaimer.unpin_and_wait(Gpa::new(page * PAGE_SIZE), pages * PAGE_SIZE).unwrap();
        assert!(start.elapsed() < crate::ANSWER, "a forced unpin is never done");
        if hold.is_some() {
            assert_eq!(self.vmm.endpoint.iommu.mapped_bytes_in(page * PAGE_SIZE, pages * PAGE_SIZE), 0);
        }
        (report, hold)
    }

    /// One thing that a guest should not do, or does at the wrong time.
    pub(crate) fn harm(&self, vcpu: usize, rng: &mut Rng) {
        match rng.u8(0..100) {
            // Requests, honest and not, one in the place of another.
            0..30 => self.post(vcpu, rng.u64(0..0x4400) << 16 | 0x28),
            30..34 => self.post(rng.usize(0..VCPUS), rng.u64(..)),
            34..44 => {
                let away = rng.u8(0..8) == 0;
                let at = if away { MOVING.start * PAGE_SIZE } else { 0x80_0000 } + 0x1_0000 * vcpu as u64;
                let pages = if rng.bool() { rng.u64(0..9000) } else { rng.u64(..) };
                let gfns = rng.u64(0..0x4000)..0x4400;
                let list = gfns.take(8000).flat_map(u64::to_le_bytes);
                let batch: Vec<_> = [0x28, pages].into_iter().flat_map(u64::to_le_bytes).chain(list).collect();
                // Where RAM went, there is nothing to write.
                let _there = self.memory.memory().write_slice(&batch, GuestAddress(at));
                self.post(vcpu, 1 << 63 | at);
            }
            // Leaves and directories.
            44..74 => {
                let at = TABLES + rng.u64(0..TABLE_PAGES * PAGE_SIZE / 4) * 4;
                let word = [0, 1 << 31, 3 << 30 | 1, rng.u32(..)][rng.usize(0..4)];
                self.memory.memory().store(word, GuestAddress(at), Relaxed).unwrap();
            }
            74..80 => {
                let at = TABLES + rng.u64(0..4 * PAGE_SIZE / 8) * 8;
                let table = TABLES + rng.u64(0..TABLE_PAGES) * PAGE_SIZE;
                let away = (MOVING.start + rng.u64(0..16)) * PAGE_SIZE;
                let entry = [0, table | 1, away | 1, rng.u64(..)][rng.usize(0..4)];
                self.memory.memory().store(entry, GuestAddress(at), Relaxed).unwrap();
            }
            // Registers: any access, and commands.
            80..83 => {
                let data: Vec<_> = (0..rng.usize(0..12)).map(|_| rng.u8(..)).collect();
                self.vmm.write_bar0(rng.u64(0..0x40), &data);
            }
            // Most parks end, or nothing would ever be unpinned.
            83..85 => self.command([2, 3, 3, 3, 4][rng.usize(0..5)]),
            // Now and then only, or there would hardly be time to pin anything in between.
            85 if rng.u8(0..64) == 0 => self.command(rng.u64(0..2)),
            85..90 => self.repair(rng.u8(0..64) == 0),
            90..92 => self.vmm.write_config(rng.usize(0..0x40), &[rng.u8(..), rng.u8(..)]),
            _ => {
                let mut data = [0; 8];
                self.vmm.read_bar(Bar::ALL[rng.usize(0..3)], rng.u64(0..0x2010), &mut data);
            }
        }
    }

    /// Writes a table that leads somewhere, so that the storm has something to destroy; and activates it, if wanted.
    fn repair(&self, activate: bool) {
        let root = self.dtt.dtt().root().raw();
        let tables = [(root, root + 0x1000), (root + 0x1000, root + 0x2000)];
        let leaves = (0..17).map(|n| (root + 0x2000 + 8 * n, root + 0x3000 + n * PAGE_SIZE));
        for (at, table) in tables.into_iter().chain(leaves) {
            self.memory.memory().store(table | 1, GuestAddress(at), Relaxed).unwrap();
        }
        if activate {
            self.activate_honestly();
        }
    }

    /// RAM goes or returns.
    pub(crate) fn move_ram(&self, rng: &mut Rng) {
        let mut is_there = self.is_there.lock().unwrap();
        let pinner = self.vmm.team.service().pinner();
        if *is_there {
            let (gpa, bytes) = (Gpa::new(MOVING.start * PAGE_SIZE), (MOVING.end - MOVING.start) * PAGE_SIZE);
            pinner.remove_region(gpa, bytes).unwrap();
            self.show(vec![Arc::clone(&self.ram)]);
            assert_eq!(self.vmm.endpoint.iommu.mapped_bytes_in(gpa.raw(), bytes), 0);
        } else {
            self.show(vec![Arc::clone(&self.ram), Arc::clone(&self.moving)]);
            pinner.add_region(RamRegion::from_vm_memory(Arc::clone(&self.moving)).unwrap()).unwrap();
        }
        *is_there = !*is_there;
        thread::sleep(Duration::from_micros(rng.u64(0..2000)));
    }

    /// Guest memory is this from now on.
    fn show(&self, regions: Vec<Arc<GuestRegionMmap>>) {
        self.memory.lock().unwrap().replace(GuestMemoryMmap::from_arc_regions(regions).unwrap());
    }

    /// The guest does nothing more: every slot comes to 0.
    pub(crate) fn wait_for_silence(&self, at_most: Duration) {
        let start = Instant::now();
        while (0..VCPUS).any(|vcpu| self.slot(vcpu) != 0) {
            assert!(start.elapsed() < at_most, "a slot is never answered");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Bytes of memory that this process has.
pub(crate) fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

struct Lines(AtomicU64);

static LINES: Lines = Lines(AtomicU64::new(0));

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{}", record.args());
        self.0.fetch_add(1, Relaxed);
    }

    fn flush(&self) {}
}

fn count_logs() {
    // It is set already, if another test came first.
    let _ = log::set_logger(&LINES);
    log::set_max_level(log::LevelFilter::Debug);
}

/// How many lines were logged, in all tests.
pub(crate) fn logged() -> u64 {
    LINES.0.load(Relaxed)
}
