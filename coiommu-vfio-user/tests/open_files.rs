//! A server that may open no more files. Alone in its process, as the limit is the process's.

mod common;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use coiommu_vfio_user::{Connection, Event, Limits};
use common::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn memory_whose_file_cannot_be_opened_is_not_memory_without_a_file() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(server, Limits::default());
    let file = files(1).remove(0);
    client.write_all(&version()).unwrap();
    assert!(matches!(connection.receive(), Ok(Event::Idle)));
    let _version_of_the_server = client.read(&mut [0; 1000]).unwrap();

    let limit = getrlimit(Resource::Nofile);
    let next = u64::try_from(file.try_clone().unwrap().as_raw_fd()).unwrap();
    setrlimit(Resource::Nofile, Rlimit { current: Some(next), ..limit }).unwrap();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    let fds = [file.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let map = message(1, DMA_MAP, 0, &dma_map(3, 0, 0, 0x1000));
    sendmsg(&client, &[IoSlice::new(&map)], &mut ancillary, SendFlags::empty()).unwrap();
    let event = connection.receive();
    setrlimit(Resource::Nofile, limit).unwrap();

    assert!(matches!(event, Ok(Event::Idle)), "{event:?}");
    let mut reply = [0; 16];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply.to_vec(), error(1, DMA_MAP, 24), "EMFILE");
}
