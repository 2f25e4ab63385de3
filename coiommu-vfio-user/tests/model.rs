//! Any stream, in any pieces, beside the plainest reading of it: one that has all bytes at hand and looks at one message
//! after the other.

mod common;

use std::fmt::Write as _;

use coiommu_vfio_user::{
    Access, DmaMap, DmaUnmap, Errno, IrqAction, IrqChange, IrqRange, Limits, Request, Session, SetIrqs, Ticket,
};
use common::*;
use proptest::collection::vec;
use proptest::prelude::*;

const MAX_FDS: usize = 2;
const MAX_DATA: u32 = 4096;

fn limits() -> Limits {
    Limits::default().max_msg_fds(MAX_FDS).max_data_xfer_size(MAX_DATA)
}

/// How many file descriptors come with a message, and whether some are lost: its id says so.
fn fds_of(id: u16) -> (usize, bool) {
    (usize::from(id & 3), id & 0xf0 == 0xf0)
}

/// Capabilities, and whether they make sense.
const CAPABILITIES: [(&str, bool); 7] = [
    ("", true),
    ("\0", true),
    ("{}\0", true),
    (r#"{"capabilities":{"max_msg_fds":1}}"#, true),
    ("{\"capabilities\":7}\0", false),
    ("[\0", false),
    ("\0\0", false),
];

/// What the library makes of a stream that comes in such pieces.
fn played(stream: &[u8], pieces: &[usize]) -> Vec<String> {
    let mut session = Session::new(limits());
    let (mut lines, mut at) = (Vec::new(), 0);
    let mut pieces = pieces.iter().cycle();
    while at < stream.len() {
        // What comes with a message comes with its first byte.
        let (mut fds, mut lost) = (0, false);
        if !session.is_inside_message() && stream.len() - at >= 2 {
            (fds, lost) = fds_of(u16::from_ne_bytes([stream[at], stream[at + 1]]));
        }
        let space = session.space();
        let count = space.len().min(*pieces.next().unwrap()).min(stream.len() - at);
        if count == 0 {
            break;
        }
        space[..count].copy_from_slice(&stream[at..at + count]);
        at += count;
        let event = session.received(count, files(fds), lost);
        let ended = event.is_err();
        if let Ok(Some(request)) = event {
            let mut line = String::new();
            answer(&mut session, request, &mut line);
            lines.push(line);
        }
        for (reply, fds) in sent(&mut session) {
            assert_eq!((fds, reply.len()), (0, usize::try_from(word(&reply, 4)).unwrap()));
            lines.push(format!("{:02x?}", without_capabilities(&reply)));
        }
        if ended {
            lines.push("end".to_owned());
        }
    }
    lines
}

/// A VERSION's reply is looked at elsewhere.
fn without_capabilities(reply: &[u8]) -> &[u8] {
    if half(reply, 2) == VERSION { &reply[..4] } else { reply }
}

/// Answers what needs no more than "done"; drops the rest.
fn answer(session: &mut Session, request: Request, line: &mut String) {
    let mut done = |ticket: Ticket<()>| session.answer(ticket, Ok(()));
    match request {
        Request::DmaMap(DmaMap { range, flags, file }, ticket) => {
            let offset = file.map(|file| file.offset);
            write!(line, "map {:#x}+{:#x} {:#x} {offset:?}", range.start(), range.size(), flags.bits()).unwrap();
            done(ticket);
        }
        Request::DmaUnmap(DmaUnmap::All, ticket) => {
            *line += "unmap all";
            done(ticket);
        }
        Request::DmaUnmap(DmaUnmap::Range(range), ticket) => {
            write!(line, "unmap {:#x}+{:#x}", range.start(), range.size()).unwrap();
            done(ticket);
        }
        Request::DeviceInfo(_dropped) => *line += "device",
        Request::RegionInfo(index, _dropped) => write!(line, "region {index}").unwrap(),
        Request::RegionIoFds(index, _dropped) => write!(line, "eventfds of {index}").unwrap(),
        Request::IrqInfo(index, ticket) => {
            write!(line, "irq {index}").unwrap();
            session.answer(ticket, Err(Errno::IO));
        }
        Request::SetIrqs(set, ticket) => {
            *line += &irqs(set);
            done(ticket);
        }
        Request::RegionRead(Access { region, offset, count }, ticket) => {
            assert_eq!(ticket.buffer().len(), usize::try_from(count).unwrap());
            write!(line, "read {region} {offset:#x}+{count:#x}").unwrap();
        }
        Request::RegionWrite(write, ticket) => {
            let Access { region, offset, count } = write.access();
            assert_eq!(write.data().len(), usize::try_from(count).unwrap());
            write!(line, "write {region} {offset:#x} {:02x?}", write.data()).unwrap();
            done(ticket);
        }
        Request::Reset(ticket) => {
            *line += "reset";
            done(ticket);
        }
        other => panic!("{other:?}"),
    }
}

fn irqs(SetIrqs { index, change }: SetIrqs) -> String {
    let of = |range: IrqRange, action| {
        let action = match action {
            IrqAction::Mask => 8,
            IrqAction::Unmask => 16,
            IrqAction::Trigger => 32,
        };
        format!("irqs {index} {}+{} {action}", range.start(), range.count())
    };
    match change {
        IrqChange::Disable => format!("irqs {index} off"),
        IrqChange::Assign { action, range, eventfds } => format!("{} eventfds {}", of(range, action), eventfds.len()),
        IrqChange::Unassign { action, range } => format!("{} eventfds 0", of(range, action)),
        IrqChange::Act { action, range, only } => format!("{} now {only:?}", of(range, action)),
    }
}

/// What is to be made of a stream.
fn read(mut stream: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut negotiated = false;
    while stream.len() >= 16 {
        let (id, command, size, flags) = (half(stream, 0), half(stream, 2), word(stream, 4), word(stream, 8));
        let size = usize::try_from(size).unwrap();
        if size < 16 || flags & 0xf != 0 || (!negotiated && command != VERSION) {
            lines.push("end".to_owned());
            break;
        }
        let Some(body) = stream.get(16..size) else { break };
        stream = &stream[size..];
        let most = match command {
            1..=9 | 13 => 4096,
            10 => 16 + usize::try_from(MAX_DATA).unwrap(),
            _ => usize::MAX,
        };
        let (fds, lost) = fds_of(id);
        let meaning = match command {
            11 | 12 | 14..=18 => Err(95),
            0 | 19.. => Err(38),
            _ if body.len() > most => Err(90),
            _ if lost => Err(24),
            _ if fds > MAX_FDS => Err(7),
            VERSION if negotiated => Err(22),
            VERSION => capable(body).then(|| (String::new(), Ok(Vec::new()))).ok_or(22),
            _ => meaning(command, body, fds).ok_or(22).flatten(),
        };
        // However wrong it is: what is wrong with a VERSION is always EINVAL.
        let meaning = if command == VERSION { meaning.map_err(|_| 22) } else { meaning };
        let refused = meaning.is_err();
        let body = meaning.and_then(|(line, body)| {
            lines.extend(Some(line).filter(|_| command != VERSION));
            body
        });
        if flags & NO_REPLY == 0 {
            let reply = match body {
                _ if command == VERSION => message(id, command, 0, &[])[..4].to_vec(),
                Ok(body) => reply(id, command, &body),
                Err(errno) => error(id, command, errno),
            };
            lines.push(format!("{reply:02x?}"));
        }
        if command == VERSION && refused && !negotiated {
            lines.push("end".to_owned());
            break;
        }
        negotiated = true;
    }
    lines
}

fn capable(body: &[u8]) -> bool {
    let known = |data: &[u8]| CAPABILITIES.iter().any(|&(known, sense)| sense && known.as_bytes() == data);
    body.len() >= 4 && half(body, 0) == 0 && known(&body[4..])
}

/// What a command asks for, and its reply's body or error; or that it makes no sense.
type Meaning = (String, Result<Vec<u8>, u32>);

fn meaning(command: u16, body: &[u8], fds: usize) -> Option<Result<Meaning, u32>> {
    const EIO: Result<Vec<u8>, u32> = Err(5);
    let fixed = match command {
        DMA_MAP | GET_REGION_INFO => 32,
        DMA_UNMAP => 24,
        SET_IRQS => 20,
        RESET => 0,
        _ => 16,
    };
    if body.len() < fixed || (matches!(command, 2..=8) && usize::try_from(word(body, 0)).unwrap() < fixed) {
        return None;
    }
    let last = |start: u64, size: u64| start.checked_add(size.checked_sub(1)?);
    Some(Ok(match command {
        DMA_MAP => {
            let (flags, offset, start, size) = (word(body, 4), long(body, 8), long(body, 16), long(body, 24));
            last(start, size)?;
            let file = (fds == 1).then_some(offset);
            if let Some(offset) = file {
                last(offset, size).filter(|&last| last < 1 << 63)?;
            }
            if fds > 1 || flags > 3 {
                return None;
            }
            (format!("map {start:#x}+{size:#x} {flags:#x} {file:?}"), Ok(Vec::new()))
        }
        DMA_UNMAP => {
            let (flags, start, size) = (word(body, 4), long(body, 8), long(body, 16));
            let line = match flags {
                0 => {
                    last(start, size)?;
                    format!("unmap {start:#x}+{size:#x}")
                }
                2 if start == 0 && size == 0 => "unmap all".to_owned(),
                _ if flags & 5 != 0 => return Some(Err(95)),
                _ => return None,
            };
            (line, Ok(body[..24].to_vec()))
        }
        GET_INFO => ("device".to_owned(), EIO),
        GET_REGION_INFO => (format!("region {}", word(body, 8)), EIO),
        GET_REGION_IO_FDS => (format!("eventfds of {}", word(body, 8)), EIO),
        GET_IRQ_INFO => (format!("irq {}", word(body, 8)), EIO),
        SET_IRQS => (meaning_of_irqs(body, fds)?, Ok(Vec::new())),
        REGION_READ | REGION_WRITE => {
            let (offset, region, count) = (long(body, 0), word(body, 8), word(body, 12));
            last(offset, count.into())?;
            let data = &body[16..];
            if count > MAX_DATA {
                return None;
            }
            if command == REGION_READ {
                (format!("read {region} {offset:#x}+{count:#x}"), EIO)
            } else if data.len() == usize::try_from(count).unwrap() {
                (format!("write {region} {offset:#x} {data:02x?}"), Ok(body[..16].to_vec()))
            } else {
                return None;
            }
        }
        RESET => ("reset".to_owned(), Ok(Vec::new())),
        _ => unreachable!(),
    }))
}

fn meaning_of_irqs(body: &[u8], fds: usize) -> Option<String> {
    let (flags, index, start, count) = (word(body, 4), word(body, 8), word(body, 12), word(body, 16));
    let (data, action) = (flags & 7, flags & !7);
    if !matches!(action, 8 | 16 | 32) {
        return None;
    }
    if flags == 0x21 && start == 0 && count == 0 {
        return Some(format!("irqs {index} off"));
    }
    if count == 0 || u64::from(start) + u64::from(count) > u64::from(u32::MAX) {
        return None;
    }
    let line = format!("irqs {index} {start}+{count} {action}");
    match data {
        1 => Some(format!("{line} now None")),
        2 => {
            let booleans: Vec<_> =
                body[20..].iter().map(|&byte| byte != 0).take(usize::try_from(count).unwrap()).collect();
            (booleans.len() == usize::try_from(count).unwrap()).then(|| format!("{line} now {:?}", Some(booleans)))
        }
        4 if fds == 0 || fds == usize::try_from(count).unwrap() => Some(format!("{line} eventfds {fds}")),
        _ => None,
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Numbers at which something changes, and others.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0_u32..4,
        3 => prop::sample::select(vec![8, 15, 16, 20, 23, 24, 32, 40, 0x21, 0x22, 0x24, 0x14, 0x0a]),
        2 => prop::sample::select(vec![0x1000, MAX_DATA, MAX_DATA + 1, u32::MAX, u32::MAX - 1, 1 << 31]),
        1 => any::<u32>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![3 => number().prop_map(u64::from), 1 => number().prop_map(|n| u64::MAX - u64::from(n)), 1 => any::<u64>()]
}

/// A command and its body, which mostly makes sense.
fn command() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let data = || vec(any::<u8>(), 0..40);
    prop_oneof![
        2 => (0..4_u32, address(), address(), address())
            .prop_map(|(flags, offset, at, size)| (DMA_MAP, dma_map(flags, offset, at, size))),
        2 => (0..3_u32, address(), address()).prop_map(|(flags, at, size)| (DMA_UNMAP, dma_unmap(flags, at, size))),
        1 => Just((DMA_UNMAP, dma_unmap(2, 0, 0))),
        2 => (4..8_u16, number(), number(), number(), data()).prop_map(|(command, argsz, index, more, data)| {
            (command, [&u32s(&[argsz | 32, 0, index, more, 0, 0, 0, 0]), &data[..]].concat())
        }),
        2 => (prop::sample::select(vec![0x21, 0x22, 0x24, 0x09, 0x0a, 0x14, 0x32]), 0..4_u32, 0..4_u32, data()).prop_map(
            |(flags, start, count, data)| (SET_IRQS, [&u32s(&[20, flags, 2, start, count]), &data[..]].concat())
        ),
        1 => Just((SET_IRQS, u32s(&[20, 0x21, 2, 0, 0]))),
        2 => (number(), address(), number()).prop_map(|(region, at, count)| (REGION_READ, access(region, at, count))),
        3 => (number(), address(), data()).prop_map(|(region, at, data)| {
            (REGION_WRITE, [access(region, at, u32::try_from(data.len()).unwrap()), data].concat())
        }),
        1 => Just((REGION_WRITE, [access(1, 2, MAX_DATA), vec![7; MAX_DATA as usize]].concat())),
        1 => Just((RESET, Vec::new())),
        1 => greeting().prop_map(|body| (VERSION, body)),
        2 => (0..20_u16, vec(number(), 0..12), data()).prop_map(|(command, words, data)| (command, [u32s(&words), data].concat())),
        1 => (any::<u16>(), 0..6000_usize).prop_map(|(command, length)| (command, vec![1; length])),
        1 => (0..20_u16, 4090..4120_usize).prop_map(|(command, length)| (command, vec![1; length])),
    ]
}

/// The body of a VERSION.
fn greeting() -> impl Strategy<Value = Vec<u8>> {
    let major = prop_oneof![8 => Just(0_u16), 1 => any::<u16>()];
    (major, any::<u16>(), prop::sample::select(CAPABILITIES.to_vec())).prop_map(|(major, minor, (data, _))| {
        [&major.to_ne_bytes()[..], &minor.to_ne_bytes(), data.as_bytes()].concat()
    })
}

/// A message, which mostly is as long as it says, and a command.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![20 => Just(0_u32), 4 => Just(NO_REPLY), 1 => Just(0xffff_ffe0), 1 => 0..16_u32];
    let longer = prop_oneof![40 => Just(0_i32), 1 => -40..40_i32, 1 => any::<i32>()];
    // In a command it means nothing.
    let error = prop_oneof![Just(0_u32), any::<u32>()];
    (any::<u16>(), command(), flags, longer, error).prop_map(|(id, (command, body), flags, longer, error)| {
        let size = (16 + u32::try_from(body.len()).unwrap()).wrapping_add_signed(longer);
        header(id, command, size, flags, error, &body)
    })
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let first = prop_oneof![
        12 => Just(message(0, VERSION, 0, &[0; 4])),
        2 => greeting().prop_map(|body| message(0, VERSION, 0, &body)),
        1 => Just(Vec::new()),
    ];
    (first, vec(any_message(), 0..20)).prop_map(|(first, messages)| [first, messages.concat()].concat())
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![3 => 1..20_usize, 1 => 1..5000_usize, 1 => Just(usize::MAX)], 1..10)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn a_stream_means_what_it_says_however_it_comes(stream in stream(), pieces in pieces()) {
        prop_assert_eq!(played(&stream, &pieces), read(&stream));
    }

    #[test]
    fn any_bytes_do_no_harm(stream in vec(any::<u8>(), 0..600), greeted: bool, pieces in pieces()) {
        let first = if greeted { message(0, VERSION, 0, &[0; 4]) } else { Vec::new() };
        let stream = [first, stream].concat();
        prop_assert_eq!(played(&stream, &pieces), read(&stream));
    }
}

/// What the model sees of generated streams: that they are not all nonsense.
#[test]
fn streams_are_of_every_kind() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut seen = String::new();
    for _ in 0..300 {
        seen += &read(&stream().new_tree(&mut runner).unwrap().current()).join("\n");
        seen += "\n";
    }
    for kind in [
        "map 0x",
        "Some(",
        "unmap 0x",
        "unmap all",
        "device",
        "region ",
        "eventfds of",
        "irq ",
        " off",
        "eventfds 1",
        "eventfds 0",
        "now None",
        "now Some",
        "read ",
        "write ",
        "reset",
        "end",
    ] {
        assert!(seen.contains(kind), "{kind}");
    }
    for errno in [5, 7, 22, 24, 38, 90, 95_u8] {
        let error = format!("21, 00, 00, 00, {errno:02x}, 00");
        assert!(seen.contains(&error), "errno {errno}");
    }
}
