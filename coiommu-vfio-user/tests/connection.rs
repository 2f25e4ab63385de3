//! A session on a socket: file descriptors, pieces, ends, and answers that find no room.

mod common;

use std::fs::{self, File};
use std::io::{IoSlice, Read, Write, pipe};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use coiommu_vfio_user::{
    Connection, ConnectionError, Errno, Event, Interest, IrqChange, Limits, Mapping, ProtocolError, RegionInfo,
    Request, SetIrqs, Wake,
};
use common::*;
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// A client's end, which blocks for 10 s at most, and the connection.
fn pair(limits: Limits) -> (UnixStream, Connection) {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut connection = Connection::new(server, limits);
    client.write_all(&version()).unwrap();
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    next(&mut client);
    (client, connection)
}

/// The next message that comes.
fn next(client: &mut UnixStream) -> Vec<u8> {
    let mut message = vec![0; 16];
    client.read_exact(&mut message).unwrap();
    let size = u32::from_ne_bytes(message[4..8].try_into().unwrap());
    message.resize(usize::try_from(size).unwrap(), 0);
    client.read_exact(&mut message[16..]).unwrap();
    message
}

/// Sends bytes with file descriptors.
fn send(client: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    assert_eq!(sendmsg(client, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()), Ok(bytes.len()));
}

fn request(connection: &mut Connection) -> Request {
    match connection.receive() {
        Ok(Event::Request(request)) => request,
        other => panic!("{other:?}"),
    }
}

fn reset(id: u16) -> Vec<u8> {
    message(id, RESET, 0, &[])
}

/// How many files this process has open that are this one.
fn open_as(file: &File) -> usize {
    let inode = |file: &fs::Metadata| (file.dev(), file.ino());
    let this = inode(&file.metadata().unwrap());
    let open = fs::read_dir("/proc/self/fd").unwrap();
    // One may be closed meanwhile, by another test.
    open.filter(|entry| fs::metadata(entry.as_ref().unwrap().path()).is_ok_and(|other| inode(&other) == this)).count()
}

#[test]
fn messages_that_come_together_come_one_by_one() {
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&[reset(1), reset(2), message(3, 99, 0, b"what?"), reset(4)].concat()).unwrap();
    for id in [1, 2, 4] {
        let Request::Reset(ticket) = request(&mut connection) else { panic!() };
        connection.answer(ticket, Ok(()));
        if id == 4 {
            assert_eq!(next(&mut client), error(3, 99, 38));
        }
        assert_eq!(next(&mut client), reply(id, RESET, &[]), "at once");
    }
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (mut client, mut connection) = pair(Limits::default());
    let message = message(1, REGION_WRITE, 0, &[access(1, 2, 3), b"abc".to_vec()].concat());
    for byte in message {
        assert!(matches!(connection.receive(), Ok(Event::Idle)));
        client.write_all(&[byte]).unwrap();
    }
    let Request::RegionWrite(write, _) = request(&mut connection) else { panic!() };
    assert_eq!(write.data(), b"abc");
}

#[test]
fn file_descriptors_are_of_the_message_that_they_came_with() {
    let (client, mut connection) = pair(Limits::default());
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"memory", 0).unwrap();
    let map = |id| message(id, DMA_MAP, 0, &dma_map(3, 0, u64::from(id) << 12, 0x1000));
    // The kernel may give the bytes of all three at once.
    send(&client, &map(1), &[]);
    send(&client, &map(2), &[file.try_clone().unwrap().into()]);
    send(&client, &map(3), &[]);
    let mut dropped = Vec::new();
    for id in 1..=3 {
        let Request::DmaMap(map, ticket) = request(&mut connection) else { panic!() };
        assert_eq!((map.range.start(), map.file.is_some()), (id << 12, id == 2));
        if let Some(file) = map.file {
            assert_eq!(fcntl_getfd(&file.fd), Ok(FdFlags::CLOEXEC), "no program that is run gets it");
            let mut bytes = [0; 6];
            File::from(file.fd).read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(&bytes, b"memory");
        }
        dropped.push(ticket);
    }
}

#[test]
fn eventfds_come_in_pieces_of_as_many_as_there_is_room_for() {
    let (mut client, mut connection) = pair(Limits::default());
    let set = |start: u32, count| message(1, SET_IRQS, 0, &u32s(&[20, 0x24, 2, start, count]));
    let (mut reader, writer) = pipe().unwrap();
    let mut eventfds = files(15);
    eventfds.push(writer.into());
    send(&client, &set(0, 16), &eventfds);
    drop(eventfds);
    let Request::SetIrqs(SetIrqs { change: IrqChange::Assign { mut eventfds, .. }, .. }, _) = request(&mut connection)
    else {
        panic!()
    };
    File::from(eventfds.pop().unwrap()).write_all(b"!").unwrap();
    let mut signalled = String::new();
    reader.read_to_string(&mut signalled).unwrap();
    assert_eq!((eventfds.len(), &*signalled), (15, "!"), "in order, and none is left anywhere");

    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    assert_eq!(next(&mut client), error(1, SET_IRQS, 5), "dropped");
    send(&client, &set(16, 253), &files(253));
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    assert_eq!(next(&mut client), error(1, SET_IRQS, 7), "too many");

    let (client, mut connection) = pair(Limits::default().max_msg_fds(253));
    send(&client, &set(0, 253), &files(253));
    let Request::SetIrqs(SetIrqs { change: IrqChange::Assign { eventfds, .. }, .. }, _) = request(&mut connection)
    else {
        panic!()
    };
    assert_eq!(eventfds.len(), 253);
}

#[test]
fn a_file_goes_with_the_answer() {
    let (mut client, mut connection) = pair(Limits::default());
    let file = tempfile::tempfile().unwrap();
    client.write_all(&message(1, GET_REGION_INFO, 0, &[u32s(&[32, 0, 0, 0]), u64s(&[0, 0])].concat())).unwrap();
    let Request::RegionInfo(0, ticket) = request(&mut connection) else { panic!() };
    let mapping = Mapping::whole(file.try_clone().unwrap().into(), 0);
    connection.answer(ticket, Ok(RegionInfo::mapped(0x1000, mapping)));
    assert_eq!(open_as(&file), 1, "it is closed when it is sent");

    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let mut bytes = [0; 48];
    let received =
        recvmsg(&client, &mut [std::io::IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(received.bytes, 48);
    let fds = ancillary.drain().map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.count(),
        _ => panic!(),
    });
    assert_eq!(fds.sum::<usize>(), 1);
}

#[test]
fn nothing_is_left_open() {
    let file = tempfile::tempfile().unwrap();
    let copies = |count: usize| -> Vec<OwnedFd> { (0..count).map(|_| file.try_clone().unwrap().into()).collect() };
    for bytes in [
        reset(1),
        message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0)),
        message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0x1000)),
        message(1, 99, 0, b"what?"),
        message(1, RESET, 1, &[]),
        version(),
        b"half".to_vec(),
        message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0x1000))[..20].to_vec(),
    ] {
        for count in [1, 20, 100] {
            let (client, mut connection) = pair(Limits::default());
            send(&client, &bytes, &copies(count));
            drop(connection.receive());
            // What a message still has that is not whole.
            let most = if bytes.len() == 4 || bytes.len() == 20 { 16.min(count) } else { 0 };
            assert_eq!(open_as(&file), 1 + most, "{bytes:x?} {count}");
            drop(connection);
            assert_eq!(open_as(&file), 1, "{bytes:x?} {count}");
            drop(client);
        }
    }
    // What was sent and is not read goes with the socket.
    let (client, connection) = pair(Limits::default());
    send(&client, &reset(1), &copies(3));
    drop((client, connection));
    assert_eq!(open_as(&file), 1);
}

#[test]
fn a_client_comes_and_goes() {
    let (client, mut connection) = pair(Limits::default());
    assert_eq!(connection.client().unwrap().max_msg_fds, 16);
    drop(client);
    for _ in 0..3 {
        assert!(matches!(connection.receive(), Ok(Event::Closed)));
    }

    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&reset(1)[..15]).unwrap();
    drop(client);
    assert!(matches!(connection.receive(), Err(ConnectionError::CutShort)));
    assert!(matches!(connection.receive(), Ok(Event::Closed)));

    // It does not look at its answer.
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&reset(1)).unwrap();
    let Request::Reset(ticket) = request(&mut connection) else { panic!() };
    connection.answer(ticket, Ok(()));
    drop(client);
    assert!(matches!(connection.receive(), Ok(Event::Closed)));

    // It does not wait for its answer.
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&reset(1)).unwrap();
    drop(client);
    let Request::Reset(ticket) = request(&mut connection) else { panic!() };
    connection.answer(ticket, Ok(()));
    assert_eq!(connection.wait(None, Some(Duration::from_secs(10))).unwrap(), Wake::Connection);
    assert!(matches!(connection.receive(), Ok(Event::Closed)));
}

#[test]
fn a_client_that_cannot_be_understood_is_told_and_left() {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut connection = Connection::new(server, Limits::default());
    client.write_all(&message(1, VERSION, 0, &[9, 0, 0, 0])).unwrap();
    let why = connection.receive().unwrap_err();
    assert_eq!(why.to_string(), "the client speaks vfio-user 9.0, this server 0.0");
    assert!(matches!(why, ConnectionError::Protocol(ProtocolError::Version { major: 9, minor: 0 })));
    assert!(matches!(connection.receive(), Ok(Event::Closed)));
    assert_eq!(connection.interest(), Interest { read: false, write: false });
    assert_eq!(next(&mut client), error(1, VERSION, 22));
    drop(connection);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_without_end_does_not_hold_the_server() {
    let (mut client, mut connection) = pair(Limits::default());
    let writer = thread::spawn(move || {
        let nothing = message(1, 99, NO_REPLY, &[0; 4000]).repeat(8);
        while client.write_all(&nothing).is_ok() {}
    });
    let start = Instant::now();
    let mut turns = 0;
    while turns < 10 && start.elapsed() < Duration::from_secs(10) {
        if let Event::More = connection.receive().unwrap() {
            turns += 1;
        }
    }
    assert_eq!(turns, 10, "a client cannot keep it busy in one call");
    drop(connection);
    writer.join().unwrap();
}

#[test]
fn a_long_answer_goes_as_the_client_takes_it() {
    const LENGTH: u32 = 1 << 20;
    let (mut client, mut connection) = pair(Limits::default());
    assert_eq!(connection.interest(), Interest { read: true, write: false });
    let read = |id| message(id, REGION_READ, 0, &access(2, 0, LENGTH));
    client.write_all(&[read(1), read(2), reset(3)].concat()).unwrap();
    let Request::RegionRead(_, ticket) = request(&mut connection) else { panic!() };
    let mut data = ticket.buffer();
    for (n, byte) in (0..=u8::MAX).cycle().zip(data.iter_mut()) {
        *byte = n;
    }
    let expected = data.to_vec();
    connection.answer(ticket, Ok(data));
    // It does not fit, and nothing else is taken until it is.
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    assert_eq!(connection.interest(), Interest { read: false, write: true });
    assert_eq!(connection.wait(None, Some(Duration::ZERO)).unwrap(), Wake::Timeout);

    let reader = thread::spawn(move || (next(&mut client), next(&mut client), next(&mut client), client));
    let mut ids = 0;
    loop {
        match connection.receive().unwrap() {
            Event::Request(Request::RegionRead(_, ticket)) => {
                ids += 1;
                connection.answer(ticket, Err(Errno::BUSY));
            }
            Event::Request(Request::Reset(ticket)) => {
                connection.answer(ticket, Ok(()));
                break;
            }
            Event::Idle => assert_ne!(connection.wait(None, Some(Duration::from_secs(10))).unwrap(), Wake::Timeout),
            Event::More => {}
            other => panic!("{other:?}"),
        }
    }
    let (first, second, third, _client) = reader.join().unwrap();
    assert_eq!(ids, 1);
    assert_eq!(first, reply(1, REGION_READ, &[access(2, 0, LENGTH), expected].concat()));
    assert_eq!((second, third), (error(2, REGION_READ, 16), reply(3, RESET, &[])));
}

#[test]
fn a_wait_ends_with_what_it_waits_for() {
    let (mut client, mut connection) = pair(Limits::default());
    let (stopped, mut stop) = pipe().unwrap();
    let long = Some(Duration::from_secs(10));
    assert_eq!(connection.wait(Some(stopped.as_fd()), Some(Duration::from_millis(1))).unwrap(), Wake::Timeout);
    client.write_all(&reset(1)).unwrap();
    assert_eq!(connection.wait(Some(stopped.as_fd()), long).unwrap(), Wake::Connection);
    stop.write_all(b"!").unwrap();
    assert_eq!(connection.wait(Some(stopped.as_fd()), long).unwrap(), Wake::Stop, "before all that the client wants");
    assert_eq!(connection.wait(None, None).unwrap(), Wake::Connection);
}

#[test]
fn an_end_sends_what_is_answered() {
    const LENGTH: u32 = 1 << 20;
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&[message(1, REGION_READ, 0, &access(2, 0, LENGTH)), reset(2)].concat()).unwrap();
    let Request::RegionRead(_, ticket) = request(&mut connection) else { panic!() };
    let data = ticket.buffer();
    connection.answer(ticket, Ok(data));
    let reader = thread::spawn(move || {
        let answer = next(&mut client);
        // The reset was not read.
        let mut rest = Vec::new();
        (answer, client.read_to_end(&mut rest).map_or(0, |_| rest.len()))
    });
    connection.close(Duration::MAX);
    let (answer, rest) = reader.join().unwrap();
    assert_eq!((answer.len(), rest), (32 + (1 << 20), 0));
}

#[test]
fn an_end_does_not_wait_for_ever() {
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&message(1, REGION_READ, 0, &access(2, 0, 1 << 20))).unwrap();
    let Request::RegionRead(_, ticket) = request(&mut connection) else { panic!() };
    let data = ticket.buffer();
    connection.answer(ticket, Ok(data));
    let start = Instant::now();
    connection.close(Duration::from_millis(100));
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn answers_come_from_wherever_the_tickets_went() {
    let (mut client, mut connection) = pair(Limits::default());
    client.write_all(&[reset(1), reset(2)].concat()).unwrap();
    let first = request(&mut connection);
    let second = request(&mut connection);
    let Request::Reset(second) = thread::spawn(|| second).join().unwrap() else { panic!() };
    connection.answer(second, Ok(()));
    thread::spawn(|| drop(first)).join().unwrap();
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    assert_eq!(next(&mut client), reply(2, RESET, &[]));
    assert_eq!(next(&mut client), error(1, RESET, 5));
}
