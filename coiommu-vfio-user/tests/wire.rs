//! The protocol without I/O, message by message: what a client sends, in bytes, and what it gets, in bytes.

mod common;

use std::io::{PipeReader, pipe};
use std::os::fd::OwnedFd;

use coiommu_vfio_user::{
    Access, Answer, Area, DeviceInfo, DmaFlags, DmaRange, DmaUnmap, Errno, IoEventFd, IoEventFds, IrqAction, IrqChange,
    IrqFlags, IrqInfo, IrqRange, Limits, Mapping, ProtocolError, RegionFlags, RegionInfo, Request, Session, SetIrqs,
    Ticket,
};
use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const INVAL: u32 = 22;
const IO: u32 = 5;

/// A session that knows its client.
fn session() -> Session {
    let mut session = Session::new(Limits::default());
    let (_, event) = feed(&mut session, &version(), Vec::new(), usize::MAX);
    assert!(matches!(event, Ok(None)));
    sent(&mut session);
    session
}

/// The request that a message makes.
fn request(session: &mut Session, message: &[u8], fds: Vec<OwnedFd>) -> Request {
    let (taken, event) = feed(session, message, fds, usize::MAX);
    assert_eq!(taken, message.len());
    assert_eq!(sent(session), []);
    event.unwrap().expect("a request")
}

/// The error that a message is answered with.
fn refused(session: &mut Session, message: &[u8], fds: Vec<OwnedFd>) -> u32 {
    let (taken, event) = feed(session, message, fds, usize::MAX);
    assert!(matches!(event, Ok(None)), "{event:?}");
    assert_eq!(taken, message.len());
    match &*sent(session) {
        [(reply, 0)] => {
            let errno = u32::from_ne_bytes(reply[12..16].try_into().unwrap());
            let (id, command) = ([reply[0], reply[1]], [reply[2], reply[3]]);
            assert_eq!((&id[..], &command[..]), (&message[..2], &message[2..4]));
            assert_eq!(*reply, error(u16::from_ne_bytes(id), u16::from_ne_bytes(command), errno));
            errno
        }
        other => panic!("one error: {other:?}"),
    }
}

/// What a ticket's answer looks like to the client: the message, and how many file descriptors go with it.
fn answered<A: Answer>(session: &mut Session, ticket: Ticket<A>, answer: Result<A, Errno>) -> (Vec<u8>, usize) {
    session.answer(ticket, answer);
    let mut all = sent(session);
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn done(session: &mut Session, ticket: Ticket<()>) -> Vec<u8> {
    answered(session, ticket, Ok(())).0
}

#[test]
fn a_client_begins_with_its_version() {
    let mut session = Session::new(Limits::default().max_msg_fds(8));
    assert_eq!(session.client(), None);
    let (_, event) = feed(&mut session, &version(), Vec::new(), 1);
    assert!(matches!(event, Ok(None)));
    let client = session.client().unwrap();
    assert_eq!((client.minor, client.max_msg_fds, client.max_data_xfer_size), (0, 16, 1 << 20));
    let told = br#"{"capabilities":{"max_data_xfer_size":1048576,"max_msg_fds":8}}"#;
    assert_eq!(sent(&mut session), [(reply(0, VERSION, &[&[0; 4], &told[..], &[0]].concat()), 0)]);

    assert_eq!(refused(&mut session, &version(), Vec::new()), INVAL, "once is enough");
    request(&mut session, &message(1, RESET, 0, &[]), Vec::new());

    let mut session = Session::new(Limits::default());
    let (taken, event) = feed(&mut session, &message(3, RESET, 0, &[]), Vec::new(), usize::MAX);
    assert_eq!((taken, event.unwrap_err()), (16, ProtocolError::NoVersion { command: RESET }));
    assert!(session.is_ended() && session.space().is_empty());
    assert!(matches!(session.received(1, files(1), false), Ok(None)));
    assert!(!session.is_inside_message(), "nothing is received any more");
}

#[test]
fn a_version_that_nobody_speaks_is_answered_and_ends_it() {
    for (body, why) in [
        (&[1, 0, 0, 0][..], ProtocolError::Version { major: 1, minor: 0 }),
        (&[0, 0], ProtocolError::VersionData),
        (b"\0\0\0\0{\"capabilities\":3}\0", ProtocolError::VersionData),
        (&[b' '; 5000], ProtocolError::VersionData),
    ] {
        let mut session = Session::new(Limits::default());
        let (_, event) = feed(&mut session, &message(7, VERSION, 0, body), Vec::new(), usize::MAX);
        assert_eq!(event.unwrap_err(), why);
        assert_eq!(sent(&mut session), [(error(7, VERSION, INVAL), 0)]);
        assert!(session.is_ended());
    }
}

#[test]
fn a_stream_without_sense_ends_it() {
    for size in [0, 15] {
        let mut session = session();
        let (_, event) = feed(&mut session, &header(1, RESET, size, 0, 0, &[]), Vec::new(), usize::MAX);
        assert_eq!(event.unwrap_err(), ProtocolError::Size { size });
        assert!(session.is_ended());
    }
    for flags in [1, 0x21, 2, 0xf] {
        let (_, event) = feed(&mut session(), &message(1, RESET, flags, &[]), Vec::new(), usize::MAX);
        assert_eq!(event.unwrap_err(), ProtocolError::NotACommand { flags });
    }
}

#[test]
fn memory_is_mapped() {
    let session = &mut session();
    let body = dma_map(3, 0x5000, 0x10_0000, 0x2000);
    let Request::DmaMap(map, ticket) = request(session, &message(9, DMA_MAP, 0, &body), files(1)) else { panic!() };
    assert_eq!(Some(map.range), DmaRange::new(0x10_0000, 0x2000));
    assert_eq!(map.flags, DmaFlags::READ | DmaFlags::WRITE);
    assert_eq!(map.file.unwrap().offset, 0x5000);
    assert_eq!(done(session, ticket), reply(9, DMA_MAP, &[]));

    let end_of_file = dma_map(3, (1 << 63) - 0x1000, 0, 0x1000);
    let Request::DmaMap(map, ticket) = request(session, &message(9, DMA_MAP, 0, &end_of_file), files(1)) else {
        panic!()
    };
    assert!(map.file.is_some());
    done(session, ticket);

    let last = dma_map(1, 0, u64::MAX - 0xfff, 0x1000);
    let Request::DmaMap(map, ticket) = request(session, &message(10, DMA_MAP, 0, &last), Vec::new()) else { panic!() };
    assert!(map.file.is_none() && map.flags == DmaFlags::READ && map.range.last() == u64::MAX);
    assert_eq!(answered(session, ticket, Err(Errno::EXIST)).0, error(10, DMA_MAP, 17));

    let short = &body[..31];
    for (body, fds) in [
        (dma_map(3, 0, 0, 0), 1),
        (dma_map(3, 0, u64::MAX, 2), 1),
        (dma_map(4, 0, 0, 0x1000), 1),
        (dma_map(3, u64::MAX, 0, 0x1000), 1),
        (dma_map(3, (1 << 63) - 0xfff, 0, 0x1000), 1),
        (dma_map(3, 0, 0, 0x1000), 2),
        ([&u32s(&[31]), &body[4..]].concat(), 1),
        (short.to_vec(), 1),
    ] {
        assert_eq!(refused(session, &message(1, DMA_MAP, 0, &body), files(fds)), INVAL, "{body:x?}");
    }
}

#[test]
fn memory_is_unmapped() {
    let session = &mut session();
    for (flags, address, size, expected) in
        [(0, 0x3000, 0x1000, DmaUnmap::Range(DmaRange::new(0x3000, 0x1000).unwrap())), (2, 0, 0, DmaUnmap::All)]
    {
        let body = dma_unmap(flags, address, size);
        let Request::DmaUnmap(unmap, ticket) = request(session, &message(2, DMA_UNMAP, 0, &body), Vec::new()) else {
            panic!()
        };
        assert_eq!(unmap, expected);
        assert_eq!(done(session, ticket), reply(2, DMA_UNMAP, &body), "the request comes back");
    }
    for (flags, address, size, errno) in [
        (0, 0, 0, INVAL),
        (0, 1, u64::MAX, 0),
        (0, 2, u64::MAX, INVAL),
        (2, 0, 1, INVAL),
        (1, 0, 1, 95),
        (8, 0, 1, INVAL),
    ] {
        let message = message(2, DMA_UNMAP, 0, &dma_unmap(flags, address, size));
        if errno == 0 {
            drop(request(session, &message, Vec::new()));
            sent(session);
        } else {
            assert_eq!(refused(session, &message, Vec::new()), errno, "{flags} {address:#x} {size:#x}");
        }
    }
}

#[test]
fn a_device_is_described() {
    let session = &mut session();
    let asked = message(3, GET_INFO, 0, &u32s(&[16, 0, 0, 0]));
    let Request::DeviceInfo(ticket) = request(session, &asked, Vec::new()) else { panic!() };
    assert_eq!(answered(session, ticket, Ok(DeviceInfo::pci(true))).0, reply(3, GET_INFO, &u32s(&[16, 3, 9, 5])));
    // More than is asked for today is no harm.
    let asked = message(3, GET_INFO, 0, &u32s(&[48, 0, 0, 0, 0, 0, 0]));
    let Request::DeviceInfo(ticket) = request(session, &asked, Vec::new()) else { panic!() };
    let info = DeviceInfo { resettable: false, regions: 2, irqs: 1 };
    assert_eq!(answered(session, ticket, Ok(info)).0, reply(3, GET_INFO, &u32s(&[16, 2, 2, 1])));

    let asked = message(4, GET_IRQ_INFO, 0, &u32s(&[16, 0, 2, 0]));
    let Request::IrqInfo(2, ticket) = request(session, &asked, Vec::new()) else { panic!() };
    let info = IrqInfo { flags: IrqFlags::EVENTFD | IrqFlags::NORESIZE, count: 2048 };
    assert_eq!(answered(session, ticket, Ok(info)).0, reply(4, GET_IRQ_INFO, &u32s(&[16, 9, 2, 2048])));

    for (command, body) in [
        (GET_INFO, vec![15, 0, 0, 0]),
        (GET_IRQ_INFO, vec![15, 0, 2, 0]),
        (GET_INFO, vec![16, 0, 0]),
        (GET_REGION_INFO, vec![31, 0, 0, 0, 0, 0, 0, 0]),
        (GET_REGION_INFO, vec![32, 0, 0, 0, 0, 0, 0]),
        (GET_REGION_IO_FDS, vec![15, 0, 0, 0]),
    ] {
        assert_eq!(refused(session, &message(1, command, 0, &u32s(&body)), Vec::new()), INVAL, "{command} {body:?}");
    }
}

fn region_info(session: &mut Session, argsz: u32, info: RegionInfo) -> (Vec<u8>, usize) {
    let asked = message(5, GET_REGION_INFO, 0, &[u32s(&[argsz, 0, 2, 0]), u64s(&[0, 0])].concat());
    let Request::RegionInfo(2, ticket) = request(session, &asked, Vec::new()) else { panic!() };
    answered(session, ticket, Ok(info))
}

/// The reply's body without capabilities.
fn region(argsz: u32, flags: u32, cap_offset: u32, size: u64, offset: u64) -> Vec<u8> {
    [u32s(&[argsz, flags, 2, cap_offset]), u64s(&[size, offset])].concat()
}

#[test]
fn regions_are_described() {
    let session = &mut session();
    let answer = region_info(session, 32, RegionInfo::default());
    assert_eq!(answer, (reply(5, GET_REGION_INFO, &region(32, 0, 0, 0, 0)), 0));
    let answer = region_info(session, 500, RegionInfo::trapped(256));
    assert_eq!(answer, (reply(5, GET_REGION_INFO, &region(32, 3, 0, 256, 0)), 0));

    let file = || files(1).remove(0);
    let whole = RegionInfo::mapped(0x2000, Mapping::whole(file(), 0x7000));
    let answer = region_info(session, 32, whole);
    assert_eq!(answer, (reply(5, GET_REGION_INFO, &region(32, 7, 0, 0x2000, 0x7000)), 1));

    let nothing =
        RegionInfo { flags: RegionFlags::READ, ..RegionInfo::mapped(1, Mapping::sparse(file(), 0x7000, vec![])) };
    let answer = region_info(session, 32, nothing);
    assert_eq!(answer, (reply(5, GET_REGION_INFO, &region(32, 1, 0, 1, 0)), 0), "as if there were no mapping");
}

#[test]
fn a_client_asks_again_for_areas() {
    let session = &mut session();
    let sparse = || {
        let areas = vec![Area { offset: 0, size: 0x1000 }, Area { offset: 0x3000, size: 0x5000 }];
        RegionInfo::mapped(0x8000, Mapping::sparse(files(1).remove(0), 0x2_0000, areas))
    };
    let head = region(32 + 16 + 32, 0xf, 32, 0x8000, 0x2_0000);
    for too_short in [32, 79] {
        assert_eq!(region_info(session, too_short, sparse()), (reply(5, GET_REGION_INFO, &head), 0));
    }
    // VFIO_REGION_INFO_CAP_SPARSE_MMAP, version 1, the last; two areas.
    let capability = [&1_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &u32s(&[0, 2, 0])].concat();
    let areas = u64s(&[0, 0x1000, 0x3000, 0x5000]);
    let all = reply(5, GET_REGION_INFO, &[head, capability, areas].concat());
    assert_eq!(region_info(session, 80, sparse()), (all.clone(), 1));
    assert_eq!(region_info(session, u32::MAX, sparse()), (all, 1));
}

#[test]
fn a_file_goes_once_however_its_answer_is_cut() {
    let session = &mut session();
    let asked = message(5, GET_REGION_INFO, 0, &[u32s(&[32, 0, 2, 0]), u64s(&[0, 0])].concat());
    let Request::RegionInfo(2, ticket) = request(session, &asked, Vec::new()) else { panic!() };
    session.answer(ticket, Ok(RegionInfo::mapped(0x1000, Mapping::whole(files(1).remove(0), 0))));
    assert_eq!(session.outgoing().unwrap().fds.len(), 1);
    session.sent(1);
    let rest = session.outgoing().unwrap();
    assert_eq!((rest.bytes.len(), rest.fds.len()), (47, 0));
}

#[test]
fn a_client_that_takes_no_file_descriptors_maps_nothing() {
    let session = &mut Session::new(Limits::default());
    let hello = [&[0; 4], &br#"{"capabilities":{"max_msg_fds":0}}"#[..]].concat();
    feed(session, &message(0, VERSION, 0, &hello), Vec::new(), usize::MAX).1.unwrap();
    sent(session);
    let file = || files(1).remove(0);
    let areas = vec![Area { offset: 0, size: 0x1000 }];
    for mapping in [Mapping::whole(file(), 0), Mapping::sparse(file(), 0x7000, areas)] {
        let answer = region_info(session, 500, RegionInfo::mapped(0x2000, mapping));
        assert_eq!(answer, (reply(5, GET_REGION_INFO, &region(32, 3, 0, 0x2000, 0)), 0));
    }
}

#[test]
fn doorbells_can_be_eventfds() {
    let session = &mut session();
    let mut ask = |argsz, fds| {
        let asked = message(6, GET_REGION_IO_FDS, 0, &u32s(&[argsz, 0, 3, 0]));
        let Request::RegionIoFds(3, ticket) = request(session, &asked, Vec::new()) else { panic!() };
        let events = vec![
            IoEventFd { offset: 0x18, size: 1, value: None, fd: 0 },
            IoEventFd { offset: 0x20, size: 4, value: Some(7), fd: 1 },
        ];
        answered(session, ticket, Ok(IoEventFds { events, fds: files(fds) }))
    };
    let head = u32s(&[16 + 80, 0, 3, 2]);
    assert_eq!(ask(95, 2), (reply(6, GET_REGION_IO_FDS, &head), 0));
    let first = [u64s(&[0x18, 1]), u32s(&[0, 0, 0, 0]), u64s(&[0])].concat();
    let second = [u64s(&[0x20, 4]), u32s(&[1, 0, 1, 0]), u64s(&[7])].concat();
    assert_eq!(ask(96, 2), (reply(6, GET_REGION_IO_FDS, &[head, first, second].concat()), 2));
    assert_eq!(ask(96, 17).0, error(6, GET_REGION_IO_FDS, 7), "more than the client takes");
}

fn set_irqs(flags: u32, start: u32, count: u32, booleans: &[u8]) -> Vec<u8> {
    let argsz = 20 + u32::try_from(booleans.len()).unwrap();
    message(8, SET_IRQS, 0, &[&u32s(&[argsz, flags, 2, start, count]), booleans].concat())
}

#[test]
fn interrupts_are_set_up() {
    let session = &mut session();
    let mut change = |flags, start, count, booleans: &[u8], fds| {
        let message = set_irqs(flags, start, count, booleans);
        let Request::SetIrqs(SetIrqs { index, change }, ticket) = request(session, &message, files(fds)) else {
            panic!()
        };
        assert_eq!(index, 2);
        assert_eq!(done(session, ticket), reply(8, SET_IRQS, &[]));
        change
    };
    let range = |start, count| IrqRange::new(start, count).unwrap();

    assert!(matches!(change(0x21, 0, 0, &[], 0), IrqChange::Disable));
    let IrqChange::Assign { action: IrqAction::Trigger, range: of, eventfds } = change(0x24, 16, 3, &[], 3) else {
        panic!()
    };
    assert_eq!((of, eventfds.len()), (range(16, 3), 3));
    let IrqChange::Assign { action: IrqAction::Unmask, eventfds, .. } = change(0x14, 0, 1, &[], 1) else { panic!() };
    assert_eq!(eventfds.len(), 1);
    let IrqChange::Unassign { action: IrqAction::Trigger, range: of } = change(0x24, 19, 2000, &[], 0) else {
        panic!()
    };
    assert_eq!(of, range(19, 2000), "an eventfd message without an eventfd");
    let IrqChange::Act { action: IrqAction::Mask, range: of, only: None } = change(0x09, 0, 1, &[], 0) else {
        panic!()
    };
    assert_eq!(of, range(0, 1));
    let IrqChange::Act { action: IrqAction::Trigger, range: of, only } = change(0x22, 4, 3, &[0, 1, 0xff], 0) else {
        panic!()
    };
    assert_eq!((of, only), (range(4, 3), Some(vec![false, true, true])));
}

#[test]
fn interrupts_that_cannot_be_set_up_are_not() {
    let session = &mut session();
    for (flags, start, count, booleans, fds) in [
        (0x20, 0, 1, &[][..], 0),        // no data type
        (0x01, 0, 1, &[], 0),            // no action
        (0x23, 0, 1, &[1], 0),           // two data types
        (0x31, 0, 1, &[], 0),            // two actions
        (0x61, 0, 1, &[], 0),            // what nobody knows
        (0x21, 1, 0, &[], 0),            // none
        (0x09, 0, 0, &[], 0),            // none to mask
        (0x24, 0, 0, &[], 0),            // no eventfd for none
        (0x24, 0, 3, &[], 2),            // neither all nor none
        (0x24, 0, 2, &[], 3),            // more
        (0x22, 0, 3, &[1, 1], 0),        // booleans are missing
        (0x22, 0, u32::MAX, &[1, 1], 0), // very many
        (0x21, 2, u32::MAX - 1, &[], 0), // past the end
    ] {
        let message = set_irqs(flags, start, count, booleans);
        assert_eq!(refused(session, &message, files(fds)), INVAL, "{flags:#x} {start} {count}");
    }
    let argsz = message(8, SET_IRQS, 0, &u32s(&[19, 0x21, 2, 0, 0]));
    assert_eq!(refused(session, &argsz, Vec::new()), INVAL);
}

#[test]
fn regions_are_read_and_written() {
    let session = &mut session();
    let asked = message(11, REGION_READ, 0, &access(7, 0x3c, 4));
    let Request::RegionRead(at, ticket) = request(session, &asked, Vec::new()) else { panic!() };
    assert_eq!(at, Access { region: 7, offset: 0x3c, count: 4 });
    let mut data = ticket.buffer();
    assert_eq!(*data, [0; 4]);
    data.copy_from_slice(b"data");
    let told = [&access(7, 0x3c, 4)[..], b"data"].concat();
    assert_eq!(answered(session, ticket, Ok(data)).0, reply(11, REGION_READ, &told));

    let asked = [access(0, 0x18, 3), b"abc".to_vec()].concat();
    let Request::RegionWrite(write, ticket) = request(session, &message(12, REGION_WRITE, 0, &asked), Vec::new())
    else {
        panic!()
    };
    assert_eq!((write.access(), write.data()), (Access { region: 0, offset: 0x18, count: 3 }, &b"abc"[..]));
    assert_eq!(done(session, ticket), reply(12, REGION_WRITE, &access(0, 0x18, 3)));

    // A buffer of another length, as of another read.
    let [long, short] = [8, 4].map(|count| message(1, REGION_READ, 0, &access(7, 0, count)));
    let Request::RegionRead(_, long) = request(session, &long, Vec::new()) else { panic!() };
    let Request::RegionRead(_, short) = request(session, &short, Vec::new()) else { panic!() };
    let data = long.buffer();
    assert_eq!(answered(session, short, Ok(data)).0, error(1, REGION_READ, IO));
    assert_eq!(answered(session, long, Err(Errno::INVAL)).0, error(1, REGION_READ, INVAL));
}

#[test]
fn accesses_have_limits() {
    let session = &mut session();
    for (offset, count, data) in
        [(0, 0, 0), (u64::MAX, 2, 2), (0, (1 << 20) + 1, 0), (0, u32::MAX, 0), (0, 4, 3), (0, 4, 5), (0, 4, 0)]
    {
        let body = [access(0, offset, count), vec![0; data]].concat();
        assert_eq!(refused(session, &message(1, REGION_WRITE, 0, &body), Vec::new()), INVAL, "{offset:#x} {count}");
        if data != 3 && data != 5 && count != 4 {
            assert_eq!(refused(session, &message(1, REGION_READ, 0, &body), Vec::new()), INVAL, "{offset:#x} {count}");
        }
    }
    let most = message(1, REGION_WRITE, 0, &[access(0, 0, 1 << 20), vec![7; 1 << 20]].concat());
    let Request::RegionWrite(write, _) = request(session, &most, Vec::new()) else { panic!() };
    assert_eq!(write.data(), [7; 1 << 20]);

    let mut small = Session::new(Limits::default().max_data_xfer_size(4096));
    feed(&mut small, &version(), Vec::new(), usize::MAX).1.unwrap();
    sent(&mut small);
    let body = [access(0, 0, 4097), vec![0; 4097]].concat();
    assert_eq!(refused(&mut small, &message(1, REGION_WRITE, 0, &body), Vec::new()), 90, "EMSGSIZE");
    assert_eq!(refused(&mut small, &message(1, REGION_READ, 0, &access(0, 0, 4097)), Vec::new()), INVAL);
}

#[test]
fn what_is_not_served_is_skipped_and_answered() {
    let session = &mut session();
    let body = vec![0xff; 10_000];
    for (command, errno) in
        [(11, 95), (12, 95), (14, 95), (15, 95), (16, 95), (17, 95), (18, 95), (0, 38), (19, 38), (!0, 38)]
    {
        assert_eq!(refused(session, &message(command, command, 0, &body), files(1)), errno, "{command}");
        assert_eq!(refused(session, &message(command, command, 0, &[]), Vec::new()), errno, "{command}");
        feed(session, &message(1, command, NO_REPLY, &body), Vec::new(), usize::MAX).1.unwrap();
        assert_eq!(sent(session), []);
    }
    for command in [DMA_MAP, SET_IRQS, GET_INFO, RESET, REGION_READ] {
        assert_eq!(refused(session, &message(1, command, 0, &body), Vec::new()), 90, "EMSGSIZE: {command}");
    }
    request(session, &message(1, RESET, 0, &[]), Vec::new());
}

#[test]
fn who_wants_no_reply_gets_none() {
    let session = &mut session();
    let body = [access(0, 0x18, 1), vec![1]].concat();
    let Request::RegionWrite(_, ticket) = request(session, &message(1, REGION_WRITE, NO_REPLY, &body), Vec::new())
    else {
        panic!()
    };
    assert!(!ticket.is_waited_for());
    session.answer(ticket, Ok(()));
    drop(request(session, &message(1, RESET, NO_REPLY, &[]), Vec::new()));
    let Request::Reset(ticket) = request(session, &message(1, RESET, NO_REPLY, &[]), Vec::new()) else { panic!() };
    session.answer(ticket, Err(Errno::IO));
    let nonsense = message(1, DMA_MAP, NO_REPLY, &[]);
    assert!(matches!(feed(session, &nonsense, Vec::new(), usize::MAX), (16, Ok(None))));
    assert_eq!(sent(session), []);
}

#[test]
fn every_ticket_is_an_answer() {
    let session = &mut session();
    let mut tickets: Vec<_> = (0..4)
        .map(|id| match request(session, &message(id, RESET, 0, &[]), Vec::new()) {
            Request::Reset(ticket) => ticket,
            other => panic!("{other:?}"),
        })
        .collect();
    // In any order.
    assert!(tickets[3].is_waited_for());
    session.answer(tickets.remove(2), Ok(()));
    session.answer(tickets.remove(0), Err(Errno::BUSY));
    assert_eq!(sent(session), [(reply(2, RESET, &[]), 0), (error(0, RESET, 16), 0)]);
    // Dropped, in another thread.
    std::thread::spawn(move || drop(tickets)).join().unwrap();
    assert_eq!(sent(session), [(error(1, RESET, IO), 0), (error(3, RESET, IO), 0)]);
}

#[test]
fn a_ticket_answers_nobody_but_its_client() {
    let (mut one, mut other) = (session(), session());
    let Request::Reset(ticket) = request(&mut one, &message(1, RESET, 0, &[]), Vec::new()) else { panic!() };
    other.answer(ticket, Ok(()));
    assert_eq!(sent(&mut other), []);
    assert_eq!(sent(&mut one), [(error(1, RESET, IO), 0)]);

    let Request::Reset(ticket) = request(&mut one, &message(1, RESET, 0, &[]), Vec::new()) else { panic!() };
    one.end();
    one.answer(ticket, Ok(()));
    assert_eq!(sent(&mut one), []);
    let Request::Reset(late) = request(&mut other, &message(1, RESET, 0, &[]), Vec::new()) else { panic!() };
    drop(other);
    drop(late);
}

#[test]
fn file_descriptors_come_with_their_message() {
    let session = &mut session();
    let eventfds = set_irqs(0x24, 0, 16, &[]);
    let Request::SetIrqs(SetIrqs { change: IrqChange::Assign { eventfds, .. }, .. }, _) =
        request(session, &eventfds, files(16))
    else {
        panic!()
    };
    assert_eq!(eventfds.len(), 16);
    sent(session);
    // Too many, and lost.
    assert_eq!(refused(session, &set_irqs(0x24, 0, 17, &[]), files(17)), 7, "E2BIG");
    let map = message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0x1000));
    session.space()[..16].copy_from_slice(&map[..16]);
    session.received(16, Vec::new(), true).unwrap();
    session.space()[..32].copy_from_slice(&map[16..]);
    session.received(32, Vec::new(), false).unwrap();
    assert_eq!(sent(session), [(error(1, DMA_MAP, 24), 0)], "EMFILE: not a mapping without a file");
    // With the body.
    session.space()[..16].copy_from_slice(&map[..16]);
    session.received(16, Vec::new(), false).unwrap();
    session.space()[..32].copy_from_slice(&map[16..]);
    let Ok(Some(Request::DmaMap(map, _))) = session.received(32, files(1), false) else { panic!() };
    assert!(map.file.is_some());
}

#[test]
fn file_descriptors_that_nobody_wants_are_closed() {
    let session = &mut session();
    for message in [
        message(1, RESET, 0, &[]),
        message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0)),
        message(1, 99, 0, &[0; 5000]),
        set_irqs(0x21, 0, 1, &[]),
        version(),
        message(1, RESET, 1, &[]),
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(feed(session, &message, vec![writer.into()], 7).1);
        assert!(is_closed(&reader), "{message:x?}");
    }
    let (reader, writer) = pipe().unwrap();
    let session = &mut self::session();
    feed(session, &[0; 3], vec![writer.into()], 1).1.unwrap();
    assert!(!is_closed(&reader), "of a message that has only begun");
    session.end();
    assert!(is_closed(&reader));
}

/// Whether nobody has the other end of a pipe.
fn is_closed(reader: &PipeReader) -> bool {
    let mut fds = [PollFd::new(reader, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap();
    fds[0].revents().contains(PollFlags::HUP)
}

#[test]
fn a_client_that_takes_no_answers_is_not_read() {
    let session = &mut session();
    let ask = message(1, REGION_READ, 0, &access(0, 0, 4096));
    let mut answers = 0;
    loop {
        let (taken, event) = feed(session, &ask, Vec::new(), usize::MAX);
        if taken == 0 {
            break;
        }
        let Ok(Some(Request::RegionRead(_, ticket))) = event else { panic!() };
        let data = ticket.buffer();
        session.answer(ticket, Ok(data));
        answers += 1;
    }
    assert_eq!(answers, 16, "64 KiB");
    let first = session.outgoing().unwrap().bytes.len();
    session.sent(first - 1);
    assert_eq!((session.outgoing().unwrap().bytes.len(), session.space().len()), (1, 0));
    session.sent(1);
    assert_eq!(session.space().len(), 16, "it goes on");
    let (_, Ok(Some(Request::RegionRead(_, ticket)))) = feed(session, &ask, Vec::new(), usize::MAX) else { panic!() };
    let data = ticket.buffer();
    session.answer(ticket, Ok(data));
    assert!(session.space().is_empty(), "one at a time");
    assert_eq!(sent(session).len(), 16);
    assert!(!session.is_ended());
}

#[test]
fn a_client_that_takes_no_answers_has_few_files_opened() {
    let session = &mut session();
    let ask = message(5, GET_REGION_INFO, 0, &[u32s(&[32, 0, 2, 0]), u64s(&[0, 0])].concat());
    let mut answers = 0;
    while let (1.., event) = feed(session, &ask, Vec::new(), usize::MAX) {
        let Ok(Some(Request::RegionInfo(2, ticket))) = event else { panic!() };
        session.answer(ticket, Ok(RegionInfo::mapped(0x1000, Mapping::whole(files(1).remove(0), 0))));
        answers += 1;
    }
    assert_eq!(answers, 16);
    assert_eq!(sent(session).iter().map(|(_, fds)| fds).sum::<usize>(), 16);
    assert!(!session.space().is_empty());
}
