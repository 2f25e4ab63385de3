//! A host that takes back what is idle is never behind the devices' view; it falls to what drivers keep mapped, and gives
//! memory away by force.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use coiommu_dtt::{LeafEntry, PAGE_SIZE};

use super::bed::{Bed, Counters, Guest, NO_END, compare, of_server};
use super::files::E1000E;
use super::server::Server;
use super::view::{View, is_in};
use crate::vm::{Answer, Monitor};

/// The root of the table and its levels are the driver's to tell.
const JOB: &str = r#"
everything_up
load
table=$(sed -n 's/^root //p; s/^levels //p' "$stats" | tr '\n' ' ')
ask "table $table"
rest
sync
ask idle
dd if=/dev/nvme0n1 of=/dev/null bs=1M count=16 iflag=direct 2>/dev/null
ask used
dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null
ask waited
load
sleep 5
rest
everything_down
counters
ask compare
"#;

const MEMORY: u32 = 1024;
const VCPUS: usize = 2;
/// How often the guest is stopped under load.
const STOPS: usize = 200;
/// The pages of the longest transfer that the nvme takes, 512 KiB that begin within a page: no map here is longer.
const MOST: usize = 129;
/// How long the guest is idle before what is pinned is looked at.
const IDLE: Duration = Duration::from_secs(5);
/// How many pages more than twice those that drivers keep mapped may stay pinned: neighbours in a mapping.
const SHARED: u64 = 128;
/// How long a guest that waits for a hold is left waiting.
const HELD: Duration = Duration::from_millis(300);

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&["--policy", "unpin_policy=lru,unpin_interval=1"])?;
    let host =
        Host { server: &server, view: RefCell::default(), holder: RefCell::default(), complaints: RefCell::default() };
    let guest = Guest {
        job: JOB,
        memory: MEMORY,
        devices: vec![server.device(), E1000E.to_owned(), Monitor::option()],
        ..Guest::default()
    };
    let (ended, stats) = bed.boot_and_compare(guest, &server, &|line, process| {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("table", table) => host.stop_often(process, table)?,
            ("idle", _) => host.wait_until_idle()?,
            ("used", _) => {
                host.refuse_and_grant()?;
                host.hold()?;
            }
            ("waited", _) => host.check_it_waited()?,
            _ => return Ok(Answer::Nothing),
        }
        Ok(Answer::Say("go on".to_owned()))
    })?;
    let mut complaints = host.complaints.take();
    match stats {
        None => complaints.push(NO_END.to_owned()),
        Some(stats) => {
            complaints.extend(compare(&Counters::of(&ended.lines), &stats)?);
            println!("unpinned {} idle pages in all", of_server(&stats, "pages_unpinned_idle")?);
        }
    }
    bed.judge(&ended, &complaints, "the devices' view is never ahead, idle pages go, holds hold")
}

struct Host<'a> {
    server: &'a Server,
    view: RefCell<Option<View>>,
    /// Ends a hold once it has seen the guest wait for it.
    holder: RefCell<Option<JoinHandle<anyhow::Result<()>>>>,
    complaints: RefCell<Vec<String>>,
}

impl Host<'_> {
    fn complain(&self, complaint: String) {
        self.complaints.borrow_mut().push(complaint);
    }

    /// Stops the guest under load, again and again: each page that it has mapped is PINNED, and pinned, but for those of maps
    /// that are just being made, which are done the next time.
    fn stop_often(&self, process: u32, table: &str) -> anyhow::Result<()> {
        let mut numbers = table.split(' ');
        let mut number = || numbers.next().context("no root and levels");
        // In the order in which the driver prints them.
        let (levels, root) = (number()?.parse()?, u64::from_str_radix(number()?.trim_start_matches("0x"), 16)?);
        let view = View::of(process, MEMORY, root, levels)?;
        let mut monitor = Monitor::connect()?;
        let (mut before, mut in_flight, mut most, mut mapped) = (BTreeSet::new(), 0, 0, 0);
        let asked_before = of_server(&self.server.stats()?, "pages_asked")?;
        for stop in 0..STOPS {
            thread::sleep(Duration::from_millis(20 + (stop as u64 * 37) % 80));
            monitor.execute("stop")?;
            // The table first: what it says is pinned may not go while the guest, which stands still, has it mapped.
            let entries = view.entries();
            let pins = self.server.pins()?;
            let busy = entries.iter().filter(|(_, entry)| entry.count() > 0);
            mapped = mapped.max(busy.clone().count());
            let (pinned, waiting): (Vec<_>, Vec<_>) = busy.partition(|(_, entry)| entry.contains(LeafEntry::PINNED));
            let behind = pinned.iter().filter(|(page, _)| !is_in(&pins, *page)).count();
            let waiting: BTreeSet<_> = waiting.iter().map(|(page, _)| *page).collect();
            if behind > 0 {
                self.complain(format!("stop {stop}: {behind} pages are PINNED and mapped, and not pinned"));
            }
            if waiting.len() > VCPUS * MOST {
                self.complain(format!("stop {stop}: {} mapped pages are not PINNED", waiting.len()));
            }
            let still = waiting.intersection(&before).count();
            if still > 0 {
                self.complain(format!("stop {stop}: {still} mapped pages are not PINNED since the stop before"));
            }
            in_flight += usize::from(!waiting.is_empty());
            most = most.max(waiting.len());
            before = waiting;
            monitor.execute("cont")?;
        }
        let asked = of_server(&self.server.stats()?, "pages_asked")? - asked_before;
        if asked < STOPS as u64 {
            self.complain(format!("there was no load: {asked} pages were asked for in {STOPS} stops"));
        }
        println!(
            "{STOPS} stops, {asked} pages asked for: up to {mapped} pages mapped, all PINNED and pinned, but for maps in flight in {in_flight} stops, of \
             {most} pages at most"
        );
        self.view.replace(Some(view));
        Ok(())
    }

    /// The pages that the guest has mapped, and what is pinned.
    fn busy_and_pins(&self) -> anyhow::Result<(Vec<u64>, Vec<Range<u64>>)> {
        let view = self.view.borrow();
        let entries = view.as_ref().context("the guest was not stopped before")?.entries();
        let busy = entries.into_iter().filter(|(_, entry)| entry.count() > 0).map(|(page, _)| page).collect();
        Ok((busy, self.server.pins()?))
    }

    /// After a while, no more is pinned than drivers keep mapped, and what shares a mapping with that.
    fn wait_until_idle(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        let first = pages(&self.server.pins()?);
        let (busy, pinned) = loop {
            thread::sleep(IDLE);
            let (busy, pins) = self.busy_and_pins()?;
            let (busy, pinned) = (busy.len() as u64, pages(&pins));
            // Ticks, too, are late on a busy machine.
            if pinned <= 2 * busy + SHARED || start.elapsed() > IDLE * 6 {
                break (busy, pinned);
            }
        };
        println!(
            "idle for {:.1} s: pinned pages fell from {first} to {pinned}, of which drivers keep {busy} mapped",
            start.elapsed().as_secs_f64()
        );
        if pinned > 2 * busy + SHARED {
            self.complain(format!("{pinned} pages stay pinned where {busy} are mapped"));
        }
        Ok(())
    }

    /// A range in use is refused, one that is pinned and idle is granted.
    fn refuse_and_grant(&self) -> anyhow::Result<()> {
        let mut control = self.server.control()?;
        let (busy, pins) = self.busy_and_pins()?;
        let page = busy.first().context("the drivers have nothing mapped")? * PAGE_SIZE;
        let refused = control.unpin(&[page..page + PAGE_SIZE])?;
        if refused.hold.is_some() || refused.busy == 0 {
            self.complain(format!("a page that is mapped, at {page:#x}: {refused:?}"));
        }
        // The last tick may have taken one of them.
        let idle = pins.iter().filter(|pin| !has_one_of(pin, &busy));
        let granted = idle
            .map(|pin| control.unpin(std::slice::from_ref(pin)))
            .find(|granted| granted.as_ref().map_or(true, |granted| granted.released > 0));
        match granted.transpose()? {
            Some(granted) => match granted.hold {
                Some(hold) => {
                    control.resume(hold)?;
                    println!("by force: a mapped page is refused, {} idle ones are released", granted.released);
                }
                None => self.complain(format!("an idle range is not granted: {granted:?}")),
            },
            None => self.complain("no idle range was pinned".to_owned()),
        }
        Ok(())
    }

    /// Holds all that drivers do not keep mapped, until the guest, which is about to want some of it, has waited for a while.
    fn hold(&self) -> anyhow::Result<()> {
        let mut control = self.server.control()?;
        let (busy, pins) = self.busy_and_pins()?;
        let kept: Vec<_> = pins.iter().filter(|pin| has_one_of(pin, &busy)).collect();
        let ends = std::iter::once(0).chain(kept.iter().map(|pin| pin.end));
        let starts = kept.iter().map(|pin| pin.start).chain([u64::from(MEMORY) << 20]);
        let free: Vec<_> = ends.zip(starts).map(|(end, start)| end..start).filter(|range| !range.is_empty()).collect();
        let held = control.unpin(&free)?;
        let hold = held.hold.with_context(|| format!("{} ranges that nobody has mapped: {held:?}", free.len()))?;
        let slots = self.server.slots()?;
        self.holder.replace(Some(thread::spawn(move || {
            let start = Instant::now();
            // A request that is there, and still there after a while.
            loop {
                let before = slots.words()?;
                thread::sleep(HELD);
                if before.iter().zip(slots.words()?).any(|(before, after)| *before != 0 && *before == after) {
                    break;
                }
                ensure!(start.elapsed() < Duration::from_secs(30), "the guest does not wait for what is held");
            }
            control.resume(hold)
        })));
        Ok(())
    }

    /// The guest has read what it wanted into what was held.
    fn check_it_waited(&self) -> anyhow::Result<()> {
        let holder = self.holder.take().context("nothing was held")?;
        match holder.join().map_err(|_panic| anyhow!("the holder's thread ended in a panic"))? {
            Ok(()) => println!("what is held was waited for"),
            Err(error) => self.complain(format!("{error:#}")),
        }
        Ok(())
    }
}

fn pages(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| (range.end - range.start) / PAGE_SIZE).sum()
}

/// Whether one of some pages, in ascending order, is in a range of bytes.
fn has_one_of(range: &Range<u64>, pages: &[u64]) -> bool {
    let after = pages.partition_point(|page| page * PAGE_SIZE < range.start);
    pages.get(after).is_some_and(|page| page * PAGE_SIZE < range.end)
}
