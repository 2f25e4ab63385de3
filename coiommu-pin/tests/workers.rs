//! Workers: whose turn it is, that everything is answered, and how they end.

mod rig;

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::guest::{GuestDtt, write_batch};
use coiommu_dtt::{Bdf, Gpa, RequestWord};
use coiommu_pin::pinner::{Clock, Drain, Hold, UnpinReport};
use coiommu_pin::worker::{
    PinWorker, Polled, ReclaimWorker, Service, SlotServer, Team, TeamConfig, UnpinError, Unpinned,
};
use coiommu_pin::{MapError, NotifyMap};
use coiommu_vfio::{Call, SoftIommu};
use rig::{PAGE, RAM, Rig, Space, TestClock, gfn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const VCPUS: usize = 4;
/// No test waits for longer; none is that slow.
const FOR_EVER: Duration = Duration::from_secs(60);

type Slots = Vec<AtomicU64>;

/// A guest whose requests are served by workers.
struct Guest {
    service: Arc<Service<Space, Slots>>,
    iommu: Arc<SoftIommu>,
    memory: Space,
    dtt: GuestDtt,
    bdf: Bdf,
    clock: TestClock,
}

impl Guest {
    fn new(policy: &str) -> Self {
        let Rig { pinner, iommu, memory, guest: dtt, bdf, clock, .. } = Rig::new(policy);
        let slots = (0..VCPUS).map(|_| AtomicU64::new(0)).collect();
        Self { service: Arc::new(Service::new(pinner, slots).unwrap()), iommu, memory, dtt, bdf, clock }
    }

    fn server(&self, vcpus: impl IntoIterator<Item = usize>) -> SlotServer<Space, Slots> {
        SlotServer::new(Arc::clone(&self.service), vcpus).unwrap()
    }

    fn page(&self, page: u64) -> RequestWord {
        RequestWord::page(gfn(page), self.bdf).unwrap()
    }

    /// A batch of so many pages: some pages, over and over, but each piece of it a piece.
    fn batch(&self, pages: u64) -> RequestWord {
        let gfns: Vec<_> = (0..pages).map(|n| gfn(n % 300)).collect();
        write_batch(&*self.memory, Gpa::new(RAM[1].start * PAGE), self.bdf, &gfns).unwrap()
    }

    fn post(&self, vcpu: usize, word: RequestWord) {
        self.service.notify().slots().post(vcpu, word).unwrap();
    }

    fn is_answered(&self, vcpu: usize) -> bool {
        self.service.notify().slots().is_answered(vcpu).unwrap()
    }

    fn are_answered(&self) -> [bool; VCPUS] {
        [0, 1, 2, 3].map(|vcpu| self.is_answered(vcpu))
    }

    /// Asks for a page, and waits until there is an answer.
    fn ask(&self, team: &Team<Space, Slots>, vcpu: usize, page: u64) {
        self.post(vcpu, self.page(page));
        team.doorbell(vcpu).unwrap().write(1).unwrap();
        let start = Instant::now();
        while !self.is_answered(vcpu) {
            assert!(start.elapsed() < FOR_EVER, "vcpu {vcpu} is never answered");
            thread::yield_now();
        }
    }

    fn is_pinned(&self, page: u64) -> bool {
        self.dtt.is_pinned(&*self.memory, gfn(page)).unwrap()
    }

    /// The next map call ends in a panic.
    fn break_mapper(&self) {
        self.iommu.inject(|call| match call {
            Call::Map { .. } => panic!("the mapper is broken"),
            Call::Unmap { .. } => None,
        });
    }
}

#[test]
fn a_long_batch_keeps_the_others_waiting_for_a_piece() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    assert_eq!(server.poll_once(&guest.clock), Polled::Idle);
    guest.post(0, guest.batch(5 * 4096));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    for vcpu in 1..VCPUS {
        guest.post(vcpu, guest.page(vcpu as u64));
        assert_eq!(server.poll_once(&guest.clock), Polled::More);
        assert!(guest.is_answered(vcpu) && guest.is_pinned(vcpu as u64));
        assert!(!guest.is_answered(0));
    }
    while server.poll_once(&guest.clock) == Polled::More {}
    assert!(guest.is_answered(0) && guest.is_pinned(299));
    assert_eq!(server.poll_once(&guest.clock), Polled::Idle);
}

#[test]
fn two_long_batches_take_turns() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    let word = guest.batch(5 * 4096);
    [0, 2].into_iter().for_each(|vcpu| guest.post(vcpu, word));
    let mut polls = 0;
    let answered = || [0, 2].into_iter().filter(|&vcpu| guest.is_answered(vcpu)).count();
    while answered() == 0 {
        assert_eq!(server.poll_once(&guest.clock), Polled::More);
        polls += 1;
    }
    assert_eq!((polls, answered()), (8, 1), "five pieces each, of which both had one in the first round");
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    assert_eq!(answered(), 2, "they end together");
}

#[test]
fn a_request_put_in_the_place_of_another_is_served_next() {
    let guest = Guest::new("");
    let mut server = guest.server([1]);
    guest.post(1, guest.batch(2 * 4096));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    guest.post(1, guest.page(310));
    guest.post(0, guest.page(311));
    while server.poll_once(&guest.clock) == Polled::More {}
    assert!(guest.is_answered(1) && guest.is_pinned(310));
    assert_eq!(guest.service.pinner().counters().requests_pinned, 2);
    assert!(!guest.is_answered(0), "that is another server's");
}

#[test]
fn who_waits_for_ram_keeps_nobody_else_waiting() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    let bytes = (RAM[2].end - RAM[2].start) * PAGE;
    guest.service.pinner().remove_region(Gpa::new(RAM[2].start * PAGE), bytes).unwrap();
    guest.post(0, guest.page(1600));
    assert_eq!(server.poll_once(&guest.clock), Polled::Wait);
    guest.post(1, guest.page(1));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    assert!(guest.is_answered(1));
    assert_eq!(server.poll_once(&guest.clock), Polled::Wait);
    guest.clock.pass(Duration::from_secs(1));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    assert!(guest.is_answered(0) && !guest.is_pinned(1600));
}

#[test]
fn what_makes_no_sense_is_answered() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    let unknown = RequestWord::page(gfn(1), Bdf::new(0x99).unwrap()).unwrap();
    let words = [unknown, RequestWord::from_raw(1 << 63).unwrap(), RequestWord::from_raw(u64::MAX).unwrap()];
    words.into_iter().enumerate().for_each(|(vcpu, word)| guest.post(vcpu, word));
    while server.poll_once(&guest.clock) == Polled::More {}
    assert_eq!(guest.are_answered(), [true; VCPUS]);
    guest.service.pinner().deactivate(Drain::Deactivate).unwrap();
    guest.post(0, guest.page(1));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    assert!(guest.is_answered(0), "also by a device that is not active");
}

#[test]
fn a_request_that_outlives_its_activation_does_not_answer_the_next() {
    let guest = Guest::new("");
    let mut server = guest.server([0]);
    let bytes = (RAM[2].end - RAM[2].start) * PAGE;
    guest.service.pinner().remove_region(Gpa::new(RAM[2].start * PAGE), bytes).unwrap();
    guest.post(0, guest.page(1600));
    assert_eq!(server.poll_once(&guest.clock), Polled::Wait);
    // A crash kernel, which asks for the same page.
    guest.service.pinner().activate(guest.dtt.dtt().root(), 4).unwrap();
    let polled = server.poll_once(&guest.clock);
    assert!(!guest.is_answered(0), "it waits for the RAM as the first one did: {polled:?}");
    guest.clock.pass(Duration::from_secs(1));
    while server.poll_once(&guest.clock) != Polled::Idle {}
    assert!(guest.is_answered(0));
}

#[test]
fn many_long_batches_at_once_do_not_keep_a_close_waiting() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    let word = guest.batch(3 * 4096);
    (0..VCPUS).for_each(|vcpu| guest.post(vcpu, word));
    let hasty = Hasty(Cell::new(Duration::ZERO));
    assert_eq!(server.poll_once(&hasty), Polled::More);
    assert_eq!(server.in_service(), 1, "not the first piece of each");
    guest.service.close();
    assert_eq!(server.poll_once(&hasty), Polled::Closed);
    assert_eq!(guest.are_answered(), [true; VCPUS]);
}

#[test]
fn slots_that_never_rest_are_served_in_turn() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    let hasty = Hasty(Cell::new(Duration::ZERO));
    (0..VCPUS).for_each(|vcpu| guest.post(vcpu, guest.page(vcpu as u64)));
    for vcpu in (0..VCPUS).cycle().take(3 * VCPUS) {
        assert_eq!(server.poll_once(&hasty), Polled::More);
        assert_eq!(guest.are_answered(), [0, 1, 2, 3].map(|other| other == vcpu), "one in the time that there is");
        guest.post(vcpu, guest.page(vcpu as u64));
    }
    while guest.are_answered() != [true; VCPUS] {
        assert_eq!(server.poll_once(&hasty), Polled::More);
    }
    guest.post(3, guest.page(3));
    assert_eq!(server.poll_once(&hasty), Polled::More);
    assert!(guest.is_answered(3), "empty slots take no time");
}

#[test]
fn a_request_is_new_until_it_is_in_service() {
    let guest = Guest::new("");
    let mut server = guest.server([1]);
    let state = |server: &SlotServer<_, _>| (server.has_new_request(), server.in_service());
    guest.post(0, guest.page(0));
    assert_eq!(state(&server), (false, 0), "that is another server's");
    guest.post(1, guest.batch(2 * 4096));
    assert_eq!(state(&server), (true, 0));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    assert_eq!(state(&server), (false, 1));
    while server.poll_once(&guest.clock) == Polled::More {}
    assert_eq!(state(&server), (false, 0));
}

/// A clock by which each look takes 15 ms.
struct Hasty(Cell<Duration>);

impl Clock for Hasty {
    fn now(&self) -> Duration {
        self.0.set(self.0.get() + Duration::from_millis(15));
        self.0.get()
    }
}

#[test]
fn a_panic_closes_the_service_and_answers_everything() {
    let guest = Guest::new("");
    let mut servers = [guest.server([0, 1]), guest.server([2, 3])];
    guest.post(0, guest.page(5));
    assert_eq!(servers[0].poll_once(&guest.clock), Polled::More);
    guest.break_mapper();
    guest.post(0, guest.page(6));
    guest.post(1, guest.page(7));
    assert_eq!(servers[0].poll_once(&guest.clock), Polled::Idle);
    assert_eq!(guest.service.failure(), Some("a pin worker: the mapper is broken"));
    guest.iommu.inject_nothing();
    (2..4).for_each(|vcpu| guest.post(vcpu, guest.page(8)));
    assert_eq!(servers[1].poll_once(&guest.clock), Polled::Idle);
    assert_eq!(guest.are_answered(), [true; VCPUS]);
    assert!(![6, 7, 8].into_iter().any(|page| guest.is_pinned(page)));
    assert!(guest.is_pinned(5), "what is pinned stays until it is drained");
    guest.service.pinner().deactivate(Drain::Deactivate).unwrap();
    assert_eq!(guest.iommu.mappings(), 0);
}

#[test]
fn a_closed_service_answers_what_is_there_and_its_workers_end() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    guest.post(0, guest.batch(3 * 4096));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    guest.post(1, guest.page(310));
    guest.service.close();
    assert_eq!(server.poll_once(&guest.clock), Polled::Closed);
    assert_eq!(guest.are_answered(), [true; VCPUS]);
    assert!(!guest.is_pinned(310));
}

#[test]
fn a_server_that_goes_leaves_nobody_waiting() {
    let guest = Guest::new("");
    let mut server = guest.server(0..VCPUS);
    guest.post(0, guest.batch(3 * 4096));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    guest.post(3, guest.page(1));
    drop(server);
    assert_eq!(guest.are_answered(), [true; VCPUS]);
}

#[test]
fn a_vcpu_without_a_slot_has_no_worker() {
    let guest = Guest::new("");
    let error = SlotServer::new(Arc::clone(&guest.service), [1, VCPUS]).unwrap_err();
    assert_eq!(error.to_string(), "vcpu 4 has no slot: there are 4");
    let error = PinWorker::new(Arc::clone(&guest.service), [VCPUS]).unwrap_err();
    assert_eq!(error.to_string(), "vcpu 4 has no slot: there are 4");
}

#[test]
fn a_slot_has_one_server_at_a_time() {
    let guest = Guest::new("");
    let server = guest.server([1, 2]);
    let again = || SlotServer::new(Arc::clone(&guest.service), [0, 2]);
    assert_eq!(again().unwrap_err().to_string(), "the slot of vcpu 2 is served by another worker");
    let _other = guest.server([0, 3]);
    drop(server);
    assert_eq!(again().unwrap_err().to_string(), "the slot of vcpu 0 is served by another worker");
    drop(guest.server([1, 2]));
}

/// Somebody's own event loop: doorbells, workers and whatever else there is, level-triggered, one piece at a time.
#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn workers_are_driven_by_somebody_elses_event_loop() {
    let guest = Guest::new("unpin_policy=lru,unpin_interval=1");
    let mut pins = [0, 1].map(|first| PinWorker::new(Arc::clone(&guest.service), [first, first + 2]).unwrap());
    assert_eq!(pins.each_ref().map(|pin| pin.vcpus().collect::<Vec<_>>()), [[0, 2], [1, 3]]);
    let mut reclaim = ReclaimWorker::new(Arc::clone(&guest.service)).unwrap();
    let epoll = Epoll::new().unwrap();
    let add = |fd, id| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id)).unwrap();
    add(pins[0].as_raw_fd(), 0);
    add(pins[1].as_raw_fd(), 1);
    add(reclaim.as_raw_fd(), 2);
    // What happens until nothing does for a while; whose event it was.
    let go_on = |pins: &mut [PinWorker<_, _>; 2], reclaim: &mut ReclaimWorker<_, _>| {
        let mut closed = 0;
        let mut whose = Vec::new();
        let mut events = [EpollEvent::default(); 3];
        while closed < 3 {
            let count = epoll.wait(20, &mut events).unwrap();
            if count == 0 {
                break;
            }
            for event in &events[..count] {
                let id = event.data();
                let polled = match id {
                    2 => reclaim.handle_event().unwrap(),
                    pin => pins[usize::try_from(pin).unwrap()].handle_event().unwrap(),
                };
                whose.push(id);
                if polled == Polled::Closed {
                    closed += 1;
                    let fd = if id == 2 { reclaim.as_raw_fd() } else { pins[usize::try_from(id).unwrap()].as_raw_fd() };
                    epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).unwrap();
                }
            }
        }
        whose
    };
    assert!(go_on(&mut pins, &mut reclaim).is_empty(), "nobody rang");

    guest.post(2, guest.batch(5 * 4096));
    pins[0].doorbell(2).unwrap().write(1).unwrap();
    guest.post(3, guest.page(310));
    assert!(pins[0].doorbell(3).is_none());
    pins[1].doorbell(3).unwrap().write(1).unwrap();
    let whose = go_on(&mut pins, &mut reclaim);
    assert!(guest.is_answered(2) && guest.is_answered(3));
    assert!(whose.iter().filter(|&&id| id == 0).count() >= 4, "a piece at a time: {whose:?}");
    assert!(guest.is_pinned(299) && guest.is_pinned(310));

    let (to, from) = mpsc::channel();
    reclaim.reclaimer().unpin(Gpa::new(0), 10 * PAGE, move |unpinned| to.send(unpinned).unwrap());
    assert!(go_on(&mut pins, &mut reclaim).contains(&2));
    let (report, hold) = from.try_recv().unwrap().unwrap();
    assert_eq!((report.released, hold.is_some()), (10, true));

    let start = Instant::now();
    while guest.service.pinner().pinned_pages() > 0 {
        assert!(start.elapsed() < FOR_EVER, "nothing ticks");
        go_on(&mut pins, &mut reclaim);
    }
    guest.service.close();
    go_on(&mut pins, &mut reclaim);
    assert!(go_on(&mut pins, &mut reclaim).is_empty());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn a_team_serves_until_it_is_stopped() {
    for pin_workers in [1, 3, 9] {
        let guest = Guest::new("");
        let mut config = TeamConfig::default();
        config.pin_workers = pin_workers.try_into().unwrap();
        let team = Team::spawn(&guest.service, &config).unwrap();
        assert!(team.doorbell(VCPUS).is_none());
        for page in 0..20 {
            let vcpu = usize::try_from(page).unwrap() % VCPUS;
            guest.ask(&team, vcpu, page);
            assert!(guest.is_pinned(page));
        }
        let (report, hold) = team.reclaimer().unpin_and_wait(Gpa::new(0), 4 * PAGE).unwrap();
        assert_eq!((report.released, hold.is_some()), (4, true));
        let reclaimer = team.reclaimer().clone();
        team.stop(Drain::Deactivate).unwrap();
        assert_eq!(guest.iommu.mappings(), 0);
        assert_eq!(reclaimer.unpin_and_wait(Gpa::new(0), PAGE).unwrap_err(), UnpinError::Ended);
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn a_reply_that_panics_is_nobody_elses_trouble() {
    let guest = Guest::new("");
    let mut reclaim = ReclaimWorker::new(Arc::clone(&guest.service)).unwrap();
    let (to, from) = mpsc::channel();
    for _ in 0..2 {
        reclaim.reclaimer().unpin(Gpa::new(0), PAGE, |_| panic!("who asked has gone"));
    }
    reclaim.reclaimer().unpin(Gpa::new(0), PAGE, reply_to(&to));
    while reclaim.poll_once() == Polled::More {}
    let _hold = released(from.try_recv().unwrap());
    assert_eq!(guest.service.failure(), None);
    reclaim.reclaimer().unpin(Gpa::new(0), PAGE, |_| panic!("who asked has gone"));
    reclaim.reclaimer().unpin(Gpa::new(0), PAGE, |_| panic!("so has the next"));
    drop(reclaim);
}

fn reply_to(replies: &mpsc::Sender<Unpinned>) -> impl FnOnce(Unpinned) + Send + 'static {
    let replies = replies.clone();
    move |unpinned| _ = replies.send(unpinned)
}

fn released(unpinned: Unpinned) -> (UnpinReport, Hold) {
    let (report, hold) = unpinned.unwrap();
    (report, hold.expect("nothing is busy"))
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn every_request_to_unpin_gets_its_reply() {
    let guest = Guest::new("");
    let mut reclaim = ReclaimWorker::new(Arc::clone(&guest.service)).unwrap();
    let reclaimer = reclaim.reclaimer();
    let (to, from) = mpsc::channel();
    // More than may wait.
    for page in 0..70 {
        reclaimer.unpin(Gpa::new(page * PAGE), PAGE, reply_to(&to));
    }
    let refused: Vec<_> = from.try_iter().map(Result::unwrap_err).collect();
    assert_eq!(refused, [UnpinError::TooMany; 6]);
    while reclaim.poll_once() == Polled::More {}
    let holds: Vec<_> = from.try_iter().map(released).collect();
    assert_eq!(holds.len(), 64);
    // One that waits, one that was not taken yet, one after the end.
    guest.service.pinner().park();
    reclaimer.unpin(Gpa::new(0), PAGE, reply_to(&to));
    assert_eq!(reclaim.poll_once(), Polled::Wait);
    reclaimer.unpin(Gpa::new(0), PAGE, reply_to(&to));
    drop(reclaim);
    reclaimer.unpin(Gpa::new(0), PAGE, reply_to(&to));
    let ended: Vec<_> = from.try_iter().map(Result::unwrap_err).collect();
    assert_eq!(ended, [UnpinError::Ended; 3]);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn who_waits_for_an_unpark_keeps_no_other_waiting_and_a_panic_is_replied_to() {
    let guest = Guest::new("");
    let mut reclaim = ReclaimWorker::new(Arc::clone(&guest.service)).unwrap();
    let mut server = guest.server([0]);
    guest.post(0, guest.page(5));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    let (to, from) = mpsc::channel();
    guest.service.pinner().park();
    reclaim.reclaimer().unpin(Gpa::new(5 * PAGE), PAGE, reply_to(&to));
    assert_eq!(reclaim.poll_once(), Polled::Wait);
    guest.service.pinner().unpark();
    assert_eq!(reclaim.poll_once(), Polled::More);
    assert_eq!(from.try_recv().unwrap().unwrap().0.released, 1);

    guest.post(0, guest.page(5));
    assert_eq!(server.poll_once(&guest.clock), Polled::More);
    guest.iommu.inject(|call| match call {
        Call::Map { .. } => None,
        Call::Unmap { .. } => panic!("no unmapping today"),
    });
    reclaim.reclaimer().unpin(Gpa::new(5 * PAGE), PAGE, reply_to(&to));
    assert_eq!(reclaim.poll_once(), Polled::Idle);
    assert_eq!(from.try_recv().unwrap().unwrap_err(), UnpinError::Ended);
    assert_eq!(guest.service.failure(), Some("the reclaim worker: no unmapping today"));
    guest.iommu.inject(|_| Some(MapError::Other(5)));
    guest.iommu.inject_nothing();
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn a_request_that_waits_for_an_unpark_is_replied_to_without_one() {
    let guest = Guest::new("");
    let team = Team::spawn(&guest.service, &TeamConfig::default()).unwrap();
    guest.ask(&team, 0, 5);
    let (to, from) = mpsc::channel();
    guest.service.pinner().park();
    team.reclaimer().unpin(Gpa::new(5 * PAGE), PAGE, reply_to(&to));
    let (report, hold) = from.recv_timeout(FOR_EVER).unwrap().unwrap();
    assert_eq!((report.released, report.parked, hold.is_none()), (0, 1, true));
}

/// Processor time of this process, in ticks of the clock, of which there are a hundred a second.
fn processor_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
#[ignore = "measures its process: the test below runs it, alone"]
fn idle_workers_alone() {
    let guest = Guest::new("unpin_policy=lru,unpin_interval=1");
    let team = Team::spawn(&guest.service, &TeamConfig::default()).unwrap();
    let used = || {
        let before = processor_time();
        thread::sleep(Duration::from_secs(2));
        processor_time() - before
    };
    (0..100).for_each(|page| guest.ask(&team, 0, page));
    let idle = used();
    assert!(idle < 20, "idle workers took {idle} of 200 ticks");
    guest.break_mapper();
    guest.ask(&team, 0, 100);
    assert!(guest.service.failure().is_some());
    let failed = used();
    assert!(failed < 20, "workers of a service that failed took {failed} of 200 ticks");
    team.stop(Drain::Deactivate).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "Miri runs no programs")]
fn idle_workers_do_not_poll() {
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    let status = alone.args(["--exact", "idle_workers_alone", "--ignored"]).status().unwrap();
    assert!(status.success());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn workers_that_sleep_answer_after_anothers_panic() {
    let guest = Guest::new("");
    let mut config = TeamConfig::default();
    config.pin_workers = 2.try_into().unwrap();
    let team = Team::spawn(&guest.service, &config).unwrap();
    guest.break_mapper();
    for vcpu in [0, 1, 2, 3, 0, 1] {
        guest.ask(&team, vcpu, 5);
        assert!(guest.service.failure().is_some() && !guest.is_pinned(5));
    }
    guest.iommu.inject_nothing();
    team.stop(Drain::Deactivate).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no timers as file descriptors")]
fn ticks_come_as_often_as_the_policy_says() {
    let guest = Guest::new("unpin_policy=lru,unpin_interval=1,extent=page");
    let mut server = guest.server([0]);
    let mut pin = || {
        guest.post(0, guest.batch(300));
        while server.poll_once(&guest.clock) == Polled::More {}
        assert_eq!(guest.service.pinner().pinned_pages(), 300);
    };
    pin();
    let mut reclaim = ReclaimWorker::new(Arc::clone(&guest.service)).unwrap();
    assert_eq!(reclaim.poll_once(), Polled::Idle);
    assert_eq!(guest.service.pinner().pinned_pages(), 300, "not yet");
    let service = Arc::clone(&guest.service);
    let worker = thread::spawn(move || reclaim.run());
    for _ in 0..2 {
        let start = Instant::now();
        while guest.service.pinner().pinned_pages() > 0 {
            assert!(start.elapsed() < FOR_EVER);
            thread::sleep(Duration::from_millis(10));
        }
        pin();
    }
    service.close();
    worker.join().unwrap().unwrap();
}
