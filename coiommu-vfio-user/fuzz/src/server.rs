//! A server that answers everything, in one way or another: what a request says decides.

use coiommu_vfio_user::{
    Access, Answer, Area, DeviceInfo, DmaRange, DmaUnmap, Errno, IoEventFd, IoEventFds, IrqChange, IrqFlags, IrqInfo,
    IrqRange, Mapping, RegionInfo, Session, Ticket,
};

use crate::file;

/// What a request was, but for its file descriptors.
pub(crate) type Request = (&'static str, Vec<u64>);

/// An answer that is kept.
type Late = Box<dyn FnOnce(&mut Session)>;

/// What is answered at the end.
#[derive(Default)]
pub(crate) struct Server {
    late: Vec<Late>,
}

impl Server {
    /// Answers a request, now, later, or by dropping its ticket.
    pub(crate) fn serve(&mut self, session: &mut Session, request: coiommu_vfio_user::Request) -> Request {
        use coiommu_vfio_user::Request;
        match request {
            Request::DmaMap(map, ticket) => {
                let mut numbers = range(map.range);
                numbers.extend([map.flags.bits().into(), map.file.map_or(1, |file| file.offset)]);
                self.answer(session, ticket, map.range.start(), Ok(()));
                ("map", numbers)
            }
            Request::DmaUnmap(DmaUnmap::All, ticket) => {
                session.answer(ticket, Ok(()));
                ("unmap all", Vec::new())
            }
            Request::DmaUnmap(DmaUnmap::Range(unmap), ticket) => {
                self.answer(session, ticket, unmap.start(), Ok(()));
                ("unmap", range(unmap))
            }
            Request::DeviceInfo(ticket) => {
                session.answer(ticket, Ok(DeviceInfo::pci(true)));
                ("device", Vec::new())
            }
            Request::RegionInfo(index, ticket) => {
                self.answer(session, ticket, index.into(), Ok(region(index)));
                ("region", vec![index.into()])
            }
            Request::RegionIoFds(index, ticket) => {
                let event = IoEventFd { offset: 0, size: 1, value: Some(index.into()), fd: 0 };
                let events = vec![event; usize::try_from(index % 5).unwrap_or_default()];
                let fds = (0..index % 3).map(|_| file()).collect();
                self.answer(session, ticket, index.into(), Ok(IoEventFds { events, fds }));
                ("eventfds", vec![index.into()])
            }
            Request::IrqInfo(index, ticket) => {
                self.answer(session, ticket, index.into(), Ok(IrqInfo { flags: IrqFlags::EVENTFD, count: index }));
                ("irq", vec![index.into()])
            }
            Request::SetIrqs(set, ticket) => {
                let (kind, mut numbers) = irqs(set.change);
                numbers.push(set.index.into());
                self.answer(session, ticket, set.index.into(), Ok(()));
                (kind, numbers)
            }
            Request::RegionRead(access, ticket) => {
                let mut data = ticket.buffer();
                data.fill(access.offset.to_le_bytes()[0]);
                self.answer(session, ticket, access.offset, Ok(data));
                ("read", place(access))
            }
            Request::RegionWrite(write, ticket) => {
                let access = write.access();
                assert_eq!(write.data().len() as u64, u64::from(access.count));
                let sum = write.data().iter().map(|&byte| u64::from(byte)).sum();
                self.answer(session, ticket, access.offset, Ok(()));
                ("write", [place(access), vec![sum]].concat())
            }
            Request::Reset(ticket) => {
                session.answer(ticket, Ok(()));
                ("reset", Vec::new())
            }
            _ => ("what nobody knows", Vec::new()),
        }
    }

    /// Answers what is to be answered late, the last first.
    pub(crate) fn answer_late(&mut self, session: &mut Session) {
        while let Some(answer) = self.late.pop() {
            answer(session);
        }
    }

    fn answer<A: Answer + 'static>(
        &mut self,
        session: &mut Session,
        ticket: Ticket<A>,
        how: u64,
        answer: Result<A, Errno>,
    ) {
        match how % 8 {
            5 => self.late.push(Box::new(|session| session.answer(ticket, answer))),
            6 => drop(ticket),
            7 => session.answer(ticket, Err(Errno::INVAL)),
            _ => session.answer(ticket, answer),
        }
    }
}

fn region(index: u32) -> RegionInfo {
    let areas = |count| (0..count).map(|n| Area { offset: n << 13, size: 0x1000 }).collect();
    match index % 4 {
        0 => RegionInfo::trapped(0x1000),
        1 => RegionInfo::mapped(0x1000, Mapping::whole(file(), 0x1000)),
        _ => RegionInfo::mapped(0x1000, Mapping::sparse(file(), 0, areas((index % 32).into()))),
    }
}

/// Says that ranges are what they promise to be.
fn range(range: DmaRange) -> Vec<u64> {
    assert!(range.size() > 0 && range.last() >= range.start());
    vec![range.start(), range.size()]
}

fn place(access: Access) -> Vec<u64> {
    assert!(access.count > 0 && access.offset.checked_add(u64::from(access.count) - 1).is_some());
    vec![access.region.into(), access.offset, access.count.into()]
}

fn irqs(change: IrqChange) -> Request {
    let numbers = |range: IrqRange| {
        assert!(range.count() > 0 && range.start().checked_add(range.count()).is_some());
        vec![range.start().into(), range.count().into()]
    };
    match change {
        IrqChange::Disable => ("disable", Vec::new()),
        IrqChange::Assign { range, eventfds, .. } => {
            assert_eq!(eventfds.len() as u64, u64::from(range.count()));
            ("assign", numbers(range))
        }
        IrqChange::Unassign { range, .. } => ("unassign", numbers(range)),
        IrqChange::Act { range, only, .. } => {
            let only = only.map(|only| {
                assert_eq!(only.len() as u64, u64::from(range.count()));
                only.iter().filter(|&&one| one).count() as u64
            });
            ("act", [numbers(range), only.into_iter().collect()].concat())
        }
    }
}
