//! One line of a trace to what it says. Pure: no reading, no state but the buffers it fills.
//!
//! The shapes, from `include/trace/events/dma.h` of Linux 6.12 to 7.3 and libtraceevent 1.7 to 1.8:
//!
//! ```text
//!     kworker/u8:1-31      [000] .....     4.108737: dma_map_page: 0000:00:03.0 dir=… dma_addr=5d78b000 size=512 …
//!           mke2fs-172     [001]     7.081461: dma_unmap_sg:         0000:00:03.0 dir=… phys_addrs={0x5e2e9000,…} …
//!           mke2fs-172     [001]     7.081461: dma_map_sg:           [FAILED TO PARSE] device=0000:00:03.0 …
//! ```
//!
//! The first is tracefs, the others are `trace-cmd report`. It cannot evaluate the print formats of some events, all
//! `dma_map_sg` of newer kernels among them, and shows the raw fields, lists as bytes: `ARRAY[00, 90, 2e, 5e, …]`.
//!
//! Fields come in any order and unknown ones are passed over; a field that is there twice or does not parse spoils the
//! line.

use memchr::{memchr, memrchr};

use super::event::{Family, Segment};

/// What the DMA API returns for a mapping that failed.
const DMA_MAPPING_ERROR: u64 = u64::MAX;

/// Longer device names are none: the kernel's own limit for names in sysfs is 255.
const MAX_DEVICE: usize = 256;

/// What a line says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// An event; its device, and the segments of a map, are in the scratch.
    Event {
        time: u64,
        what: What,
        /// The kernel did not show the whole scatter list.
        truncated: bool,
    },
    /// The recorder lost this many events.
    Lost(u64),
    /// Means nothing and should not: blank, comment, header.
    Quiet,
    /// Not understood.
    Skip,
}

/// An [`Event`](super::Event) without what it borrows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Map { family: Family, key: u64 },
    Unmap { family: Family, key: u64, size: Option<u64> },
    MapResource,
    UnmapResource,
    Sync,
    Failed,
}

/// Buffers that lines are parsed into, reused from line to line.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    device: String,
    segments: Vec<Segment>,
}

impl Scratch {
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    fn set_device(&mut self, name: &[u8]) -> Option<()> {
        // Nearly always the device of the line before, which was found good then.
        if name == self.device.as_bytes() && !name.is_empty() {
            return Some(());
        }
        let name = std::str::from_utf8(name).ok()?;
        // With a `=` it is the first field: the device is missing. Control characters would end up on a terminal.
        if name.is_empty() || name.len() > MAX_DEVICE || name.contains(|c: char| c == '=' || c.is_control()) {
            return None;
        }
        self.device.clear();
        self.device.push_str(name);
        Some(())
    }
}

/// Reads one line, without its newline.
pub(super) fn line(line: &[u8], scratch: &mut Scratch) -> Line {
    if line.first() == Some(&b'#') {
        return comment(line);
    }
    match head(line) {
        Some(head) => event(head, scratch).unwrap_or(Line::Skip),
        None => remark(line.trim_ascii()),
    }
}

/// The columns before an event's own text.
struct Head<'a> {
    time: u64,
    name: &'a [u8],
    text: &'a [u8],
}

/// Finds `PID [CPU] FLAGS? TIME: NAME: `, the first in the line.
///
/// A task may call itself anything, so the shape is strict where a name could imitate it: names have 15 bytes at most,
/// and the shortest thing accepted here has 16.
fn head(line: &[u8]) -> Option<Head<'_>> {
    let mut from = 0;
    loop {
        let open = from + memchr(b'[', line.get(from..)?)?;
        from = open + 1;
        let Some(after) = cpu(&line[from..]) else { continue };
        if !ends_with_pid(&line[..open]) {
            continue;
        }
        let (first, rest) = word(after);
        let (time, rest) = match timestamp(first) {
            Some(time) => (time, rest),
            None => {
                // Flags, such as `d.h1.`.
                let (second, rest) = word(rest);
                let Some(time) = timestamp(second) else { continue };
                (time, rest)
            }
        };
        let (name, text) = word(rest);
        if let Some((b':', name @ [_, ..])) = name.split_last() {
            return Some(Head { time, name, text });
        }
    }
}

/// What follows `CPU] `: at least three digits, as every printer pads to that.
fn cpu(text: &[u8]) -> Option<&[u8]> {
    let digits = text.iter().take(6).take_while(|b| b.is_ascii_digit()).count();
    match &text[digits..] {
        [b']', after @ ..] if digits >= 3 && after.first().is_some_and(|&b| is_space(b)) => Some(after),
        _ => None,
    }
}

/// Whether the text before the CPU ends as `task-PID `, `task-PID (TGID) ` or perf's `task PID `.
fn ends_with_pid(text: &[u8]) -> bool {
    let mut before = text.trim_ascii_end();
    if before.len() == text.len() {
        return false;
    }
    if before.last() == Some(&b')') {
        let Some(open) = memrchr(b'(', &before[before.len().saturating_sub(16)..]) else {
            return false;
        };
        before = before[..before.len().saturating_sub(16) + open].trim_ascii_end();
    }
    let digits = before.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let name = &before[..before.len() - digits];
    digits > 0 && name.last().is_some_and(|&b| b == b'-' || is_space(b))
}

/// `4.108737:` or `4.108737123:`, or ns without a point (`trace-cmd report -t` and clocks that are not time).
fn timestamp(word: &[u8]) -> Option<u64> {
    let (b':', word) = word.split_last()? else { return None };
    let Some(point) = memchr(b'.', word) else {
        return if word.len() >= 3 { decimal(word) } else { None };
    };
    let (seconds, fraction) = (&word[..point], &word[point + 1..]);
    let unit = 10_u64.pow(9_u32.checked_sub(u32::try_from(fraction.len()).ok()?)?);
    let ns = decimal(fraction)?.checked_mul(unit)?;
    decimal(seconds)?.checked_mul(1_000_000_000)?.checked_add(ns)
}

/// The tracepoints that are understood.
#[derive(Clone, Copy)]
enum Name {
    MapSingle,
    UnmapSingle,
    MapSg,
    UnmapSg,
    Alloc(Family),
    Free(Family),
    AllocSgt,
    FreeSgt,
    MapResource,
    UnmapResource,
    Sync,
    Failed,
}

impl Name {
    fn of(name: &[u8]) -> Option<Self> {
        // `dma:dma_map_page` where the printer shows the system.
        let name = name.strip_prefix(b"dma:").unwrap_or(name);
        Some(match name {
            b"dma_map_page" | b"dma_map_phys" => Self::MapSingle,
            b"dma_unmap_page" | b"dma_unmap_phys" => Self::UnmapSingle,
            b"dma_map_sg" => Self::MapSg,
            b"dma_unmap_sg" => Self::UnmapSg,
            b"dma_alloc" => Self::Alloc(Family::Coherent),
            b"dma_free" => Self::Free(Family::Coherent),
            b"dma_alloc_pages" => Self::Alloc(Family::Pages),
            b"dma_free_pages" => Self::Free(Family::Pages),
            b"dma_alloc_sgt" => Self::AllocSgt,
            b"dma_free_sgt" => Self::FreeSgt,
            b"dma_map_resource" => Self::MapResource,
            b"dma_unmap_resource" => Self::UnmapResource,
            _ if name.starts_with(b"dma_sync_") => Self::Sync,
            _ if name.starts_with(b"dma_") && name.ends_with(b"_err") => Self::Failed,
            _ => return None,
        })
    }
}

/// An event's text to an event; nothing if it is not one of ours or not whole.
fn event(head: Head<'_>, scratch: &mut Scratch) -> Option<Line> {
    let name = Name::of(head.name)?;
    let fields = match head.text.trim_ascii_start().strip_prefix(b"[FAILED TO PARSE]") {
        Some(raw) => Fields::read(raw, Radix::Decimal)?,
        None => {
            let (device, text) = word(head.text);
            let known = Fields { device: Some(device), ..Fields::default() };
            match name {
                // Nothing more is asked of these.
                Name::Sync | Name::Failed => known,
                _ => Fields { device: Some(device), ..Fields::read(text, Radix::Hex)? },
            }
        }
    };
    scratch.set_device(fields.device?)?;
    let mut truncated = false;
    let what = match name {
        Name::MapSingle => fields.map(Family::Single, fields.dma_addr?, scratch)?,
        Name::Alloc(family) => fields.map(family, fields.dma_addr?, scratch)?,
        Name::AllocSgt => fields.map(Family::ScatterTable, fields.table_key()?, scratch)?,
        Name::MapSg => fields.map_list(scratch, &mut truncated)?,
        Name::MapResource => match fields.map(Family::Single, 0, scratch)? {
            What::Failed => What::Failed,
            _ => What::MapResource,
        },
        Name::UnmapSingle => fields.unmap(Family::Single)?,
        Name::Free(family) => fields.unmap(family)?,
        Name::FreeSgt => What::Unmap { family: Family::ScatterTable, key: fields.table_key()?, size: fields.size },
        Name::UnmapSg => What::Unmap { family: Family::ScatterList, key: first(fields.phys_addrs?)??, size: None },
        Name::UnmapResource => {
            fields.unmap(Family::Single)?;
            What::UnmapResource
        }
        Name::Sync => What::Sync,
        Name::Failed => What::Failed,
    };
    Some(Line::Event { time: head.time, what, truncated })
}

/// How a number without `0x` is read.
#[derive(Clone, Copy)]
enum Radix {
    Hex,
    Decimal,
}

/// The fields of an event that matter, as they stand there.
#[derive(Default)]
struct Fields<'a> {
    device: Option<&'a [u8]>,
    dma_addr: Option<u64>,
    size: Option<u64>,
    /// The allocation has no virtual address: it failed.
    null: bool,
    /// Entries of the DMA lists that are real, and those that the driver has.
    ents: Option<(u64, u64)>,
    truncated: bool,
    dma_addrs: Option<&'a [u8]>,
    sizes: Option<&'a [u8]>,
    phys_addrs: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    /// Reads `key=value …`; `dma_addr` is in `radix`.
    fn read(mut text: &'a [u8], radix: Radix) -> Option<Self> {
        let mut fields = Self::default();
        loop {
            text = text.trim_ascii_start();
            let end = text.iter().position(|&b| b == b'=' || is_space(b)).unwrap_or(text.len());
            let (key, rest) = text.split_at(end);
            let Some((b'=', rest)) = rest.split_first() else {
                if key.is_empty() {
                    return Some(fields);
                }
                fields.truncated |= key == b"[TRUNCATED]";
                text = rest;
                continue;
            };
            let end = match rest {
                [b'{', ..] => memchr(b'}', rest)? + 1,
                [b'A', ..] if rest.starts_with(ARRAY) => memchr(b']', rest)? + 1,
                _ => rest.iter().position(|&b| is_space(b)).unwrap_or(rest.len()),
            };
            let (value, rest) = rest.split_at(end);
            text = rest;
            match key {
                b"dma_addr" | b"addr" => once(&mut fields.dma_addr, number(value, radix))?,
                b"size" => once(&mut fields.size, number(value, Radix::Decimal))?,
                b"virt_addr" => fields.null = is_null(value),
                b"ents" => once(&mut fields.ents, ents(value))?,
                b"full_ents" => once(&mut fields.ents, decimal(value).map(|all| (all, all)))?,
                b"truncated" => fields.truncated |= value == b"1",
                b"dma_addrs" => once(&mut fields.dma_addrs, Some(value))?,
                b"sizes" | b"lengths" => once(&mut fields.sizes, Some(value))?,
                b"phys_addrs" | b"addrs" => once(&mut fields.phys_addrs, Some(value))?,
                b"device" => once(&mut fields.device, Some(value))?,
                _ => {}
            }
        }
    }

    /// A mapping of one range.
    fn map(&self, family: Family, key: u64, scratch: &mut Scratch) -> Option<What> {
        let (addr, size) = (self.dma_addr?, self.size?);
        if addr == DMA_MAPPING_ERROR || self.null {
            return Some(What::Failed);
        }
        scratch.segments.clear();
        scratch.segments.push(Segment::new(addr, size)?);
        Some(What::Map { family, key })
    }

    /// The end of a mapping of one range.
    fn unmap(&self, family: Family) -> Option<What> {
        let range = Segment::new(self.dma_addr?, self.size?)?;
        Some(What::Unmap { family, key: range.addr(), size: Some(range.size()) })
    }

    /// A mapping of a list.
    fn map_list(&self, scratch: &mut Scratch, truncated: &mut bool) -> Option<What> {
        let (mut addrs, mut sizes) = (Items::of(self.dma_addrs?, 8)?, Items::of(self.sizes?, 4)?);
        let (real, all) = self.ents.unwrap_or((u64::MAX, 0));
        let mut shown = 0;
        scratch.segments.clear();
        loop {
            let (addr, size) = match (addrs.next(), sizes.next()) {
                (None, None) => break,
                (addr, size) => (addr??, size??),
            };
            // Some kernels print 128 entries whatever the list has: what follows the real ones is stale memory.
            if shown == real {
                continue;
            }
            shown += 1;
            if addr == DMA_MAPPING_ERROR {
                return Some(What::Failed);
            }
            scratch.segments.push(Segment::new(addr, size)?);
        }
        let first_addr = scratch.segments.first()?.addr();
        let key = self.phys_addrs.map_or(Some(None), first)?.unwrap_or(first_addr);
        *truncated = self.truncated || shown < all;
        Some(What::Map { family: Family::ScatterList, key })
    }

    /// The key of a scatter table.
    fn table_key(&self) -> Option<u64> {
        self.phys_addrs.map_or(Some(None), first)?.or(self.dma_addr)
    }
}

/// Sets a field that must not be there twice, to a value that must be good.
fn once<T>(field: &mut Option<T>, value: Option<T>) -> Option<()> {
    if field.is_some() {
        return None;
    }
    *field = Some(value?);
    Some(())
}

/// `64/64`: shown, of how many.
fn ents(value: &[u8]) -> Option<(u64, u64)> {
    let slash = memchr(b'/', value)?;
    Some((decimal(&value[..slash])?, decimal(&value[slash + 1..])?))
}

/// A null pointer, as the kernel and the C library print it.
fn is_null(value: &[u8]) -> bool {
    let digits = value.strip_prefix(b"0x").unwrap_or(value);
    matches!(value, b"(null)" | b"(nil)") || (!digits.is_empty() && digits.iter().all(|&b| b == b'0'))
}

/// The first element of a list, if it has any; nothing at all if an element does not parse.
fn first(list: &[u8]) -> Option<Option<u64>> {
    let mut items = Items::of(list, 8)?;
    let first = match items.next() {
        Some(item) => Some(item?),
        None => None,
    };
    items.all(|item| item.is_some()).then_some(first)
}

/// How libtraceevent begins a raw list.
const ARRAY: &[u8] = b"ARRAY[";

/// The elements of a list: `{0x1000,0x2000}`, or raw bytes `ARRAY[00, 10, …]`, lowest first. One that does not parse
/// comes as `None`.
struct Items<'a> {
    text: &'a [u8],
    /// Bytes an element, if it is raw.
    width: Option<u32>,
}

impl<'a> Items<'a> {
    fn of(list: &'a [u8], width: u32) -> Option<Self> {
        Some(match list {
            [b'{', text @ .., b'}'] => Self { text, width: None },
            _ => Self { text: list.strip_prefix(ARRAY)?.strip_suffix(b"]")?, width: Some(width) },
        })
    }

    fn part(&mut self) -> Option<&'a [u8]> {
        self.text = self.text.trim_ascii_start();
        if self.text.is_empty() {
            return None;
        }
        let end = memchr(b',', self.text).unwrap_or(self.text.len());
        let (part, rest) = self.text.split_at(end);
        self.text = rest.get(1..).unwrap_or_default();
        Some(part.trim_ascii_end())
    }

    fn raw(&mut self, width: u32) -> Option<Option<u64>> {
        let mut value = 0;
        for n in 0..width {
            let byte = match self.part() {
                Some(part) if part.len() == 2 => hex(part),
                None if n == 0 => return None,
                _ => None,
            };
            let Some(byte) = byte else { return Some(None) };
            value |= byte << (8 * n);
        }
        Some(Some(value))
    }
}

impl Iterator for Items<'_> {
    type Item = Option<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.width {
            Some(width) => self.raw(width),
            None => self.part().map(|part| number(part, Radix::Hex)),
        }
    }
}

fn number(digits: &[u8], radix: Radix) -> Option<u64> {
    match (digits.strip_prefix(b"0x"), radix) {
        (Some(digits), _) => hex(digits),
        (None, Radix::Hex) => hex(digits),
        (None, Radix::Decimal) => decimal(digits),
    }
}

fn hex(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let mut value = 0_u64;
    for &b in digits {
        let digit = match b {
            b'0'..=b'9' => b - b'0',
            b'a'..=b'f' => b - b'a' + 10,
            b'A'..=b'F' => b - b'A' + 10,
            _ => return None,
        };
        if value >> 60 != 0 {
            return None;
        }
        value = value << 4 | u64::from(digit);
    }
    Some(value)
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let mut value = 0_u64;
    for &b in digits {
        if !b.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(u64::from(b - b'0'))?;
    }
    Some(value)
}

fn is_space(b: u8) -> bool {
    b.is_ascii_whitespace()
}

/// The next word, and what follows it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    text.split_at(text.iter().position(|&b| is_space(b)).unwrap_or(text.len()))
}

/// tracefs says in its header how many events were overwritten before it was read.
fn comment(line: &[u8]) -> Line {
    let overwritten = || {
        let counts = line.strip_prefix(b"# entries-in-buffer/entries-written:")?;
        let (kept, written) = ents(word(counts).0)?;
        written.checked_sub(kept)
    };
    match overwritten() {
        Some(events @ 1..) => Line::Lost(events),
        _ => Line::Quiet,
    }
}

/// A line without the columns of an event; `line` has no spaces around it.
fn remark(line: &[u8]) -> Line {
    if line.is_empty() || line.starts_with(b"#") {
        return Line::Quiet;
    }
    if let Some(events) = lost(line) {
        return Line::Lost(events);
    }
    // How trace-cmd begins.
    let header = |prefix: &[u8]| line.strip_prefix(prefix).and_then(decimal).is_some();
    if header(b"cpus=") || header(b"version = ") { Line::Quiet } else { Line::Skip }
}

/// `CPU:0 [LOST 12 EVENTS]` of tracefs, `CPU:0 [12 EVENTS DROPPED]` of trace-cmd; 1 if neither knows how many.
fn lost(line: &[u8]) -> Option<u64> {
    let line = match line.strip_prefix(b"CPU") {
        Some(rest) => {
            let rest = rest.strip_prefix(b":").unwrap_or(rest).trim_ascii_start();
            let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
            rest[digits..].trim_ascii_start()
        }
        None => line,
    };
    let inside = line.strip_prefix(b"[")?.strip_suffix(b"]")?;
    if matches!(inside, b"LOST EVENTS" | b"EVENTS DROPPED") {
        return Some(1);
    }
    let count = match inside.strip_prefix(b"LOST ") {
        Some(rest) => rest.strip_suffix(b" EVENTS")?,
        None => inside.strip_suffix(b" EVENTS DROPPED")?,
    };
    decimal(count)
}

#[cfg(test)]
mod tests;
